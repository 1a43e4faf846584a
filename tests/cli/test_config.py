"""The configuration: overrides, and messages that name the key and what would be valid."""

from pathlib import Path

import pytest

from stream_em import AdaptiveComponents, HalfLife
from stream_em.cli.config import ConfigError, check_config, describe_keys, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def check(content=None, *overrides):
    return check_config({"source": {"path": "events.csv"}, **(content or {})}, overrides, "job.yaml")


def refused(content=None, *overrides):
    with pytest.raises(ConfigError) as caught:
        check(content, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_the_configurations_that_ship_are_valid(name):
    load_config(CONFIGS / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sorce": {}}, "job.yaml: sorce: no such key; did you mean 'source'?"),
        (
            {"model": {"n_component": 3}},
            "job.yaml: model.n_component: no such key; did you mean 'n_components'?",
        ),
        ({"model": {"seed": 3}}, "job.yaml: model.seed: no such key; did you mean 'learner.seed'?"),
        (
            {"model": {"n_components": "five"}},
            "job.yaml: model.n_components: expected a whole number, got 'five'",
        ),
        (
            {"model": {"n_components": True}},
            "job.yaml: model.n_components: expected a whole number, got True",
        ),
        ({"model": {"n_components": 2.0}}, "job.yaml: model.n_components: expected a whole number, got 2.0"),
        (
            {"model": {"n_components": 0}},
            "job.yaml: model.n_components: expected greater than or equal to 1, got 0",
        ),
        ({"learner": {"averaging": "yes"}}, "job.yaml: learner.averaging: expected true or false, got 'yes'"),
        ({"learner": {"tol": "small"}}, "job.yaml: learner.tol: expected a number, got 'small'"),
        ({"learner": {"tol": float("nan")}}, "job.yaml: learner.tol: expected"),
        ({"learner": 3}, "job.yaml: learner: expected keys with values below it, got 3"),
        ({"learner": {"schedule": {"kind": "robins_monro"}}}, "did you mean 'robbins_monro'?"),
        (
            {"learner": {"schedule": {"kind": "constant", "valeu": 0.1}}},
            "job.yaml: learner.schedule.valeu: no such key; did you mean 'value'?",
        ),
        ({"learner": {"schedule": {"kind": "constant"}}}, "job.yaml: learner.schedule.value: is missing"),
        ({"learner": {"schedule": {"alpha": 0.7}}}, "job.yaml: learner.schedule.kind: is missing"),
        (
            {"learner": {"schedule": {"kind": "robbins_monro", "alpha": 0.5}}},
            "job.yaml: learner.schedule: alpha must lie in (0.5, 1], got 0.5",
        ),
        (
            {"output": {"picture": "p.xyz"}},
            "output: picture: expected a name ending in .png, .svg or .pdf, got 'p.xyz'",
        ),
        ({"learner": {"schedule": {"kind": "half_life", "half_life": 60}}}, "name its column in source.time"),
        ({"schema": {"fields": {"a": "numerc"}}}, "schema.fields.a: expected one of numeric, category, flag"),
        ({"schema": {"fields": {"a": "numerc"}}}, "did you mean 'numeric'?"),
        ({"model": {"family": "gausian"}}, "did you mean 'gaussian'?"),
        ({"model": {"families": {"a": "poison"}}}, "model.families.a: expected one of"),
        (
            {"model": {"family": "gaussian", "families": {"a": "poisson"}}},
            "model.families needs model.family: auto",
        ),
        (
            {"schema": {"fields": {"a": "count"}}, "model": {"families": {"b": "poisson"}}},
            "model.families.b: schema.fields has no such field",
        ),
        (
            {"schema": {"fields": {"id": "numeric"}}, "source": {"path": "x", "exclude": ["id"]}},
            "schema.fields.id: is kept from the model by the source section",
        ),
        ({"source": {}}, "job.yaml: source: expected exactly one of 'path', 'river' and 'kafka'"),
        ({"source": {"path": "a", "river": "Shuttle"}}, "expected exactly one of 'path', 'river' and 'kafka'"),
        (
            {"source": {"kafka": {"bootstrap_servers": "a:1", "topic": "t"}, "quote": None}},
            "delimiter and quote are for CSV, and a topic holds JSON; leave them out",
        ),
        ({"source": {"path": ["a.csv", 3]}}, "job.yaml: source.path.1: expected a text, got 3"),
        ({"output": {"snapshot": "a.png", "picture": "a.png"}}, "expected a different file for each output"),
        ({"output": {"snapshot": "a.png", "picture": "./a.png"}}, "expected a different file for each output"),
        ({"output": {"snapshot": "../o/a", "quarantine": "a", "folder": "o"}}, "expected a different file"),
        ({"output": {"snapshot": ""}}, "job.yaml: output: expected file names of at least one character"),
        ({"model": {"prior_weight": float("inf")}}, "job.yaml: model.prior_weight: expected a finite number, got inf"),
        ({"model": {"n_components": 100_000_000}}, "model.n_components: expected less than or equal to 10000"),
        ({"learner": {"seed": -1}}, "job.yaml: learner.seed: expected greater than or equal to 0, got -1"),
        (
            {"learner": {"schedule": {"kind": "constant", "step": 1}}},
            "job.yaml: learner.schedule.step: no such key (there are: kind, value)",
        ),
        ({"learner": {"schedule": {"kind": "constant", "value": 1.5}}}, "a constant step size must lie in (0, 1)"),
        ({"learner": {"schedule": {"kind": "robbins_monro", "offset": -1.0}}}, "offset must be"),
    ],
)
def test_what_is_refused_and_how(content, message):
    assert message in refused(content)


def test_all_mistakes_are_reported_at_once():
    assert refused({"sorce": {}, "model": {"n_component": 1}}, "learner.sede=1").count("\n") == 2


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("model.n_components=3", "model", "n_components", 3),
        ("learner.tol=1e-3", "learner", "tol", 1e-3),
        ("source.path=-", "source", "path", "-"),
        ("source.quote=", "source", "quote", None),
        ("source.quote=''", "source", "quote", None),
        ("source.exclude=[a, b]", "source", "exclude", ["a", "b"]),
        ("output.picture=null", "output", "picture", None),
        ("output.responsibilities=true", "output", "responsibilities", True),
        ("source.path=a=b.csv", "source", "path", "a=b.csv"),
        ("model.families.net.amount=poisson", "model", "families", {"net.amount": "poisson"}),
    ],
)
def test_overrides_are_yaml(override, section, key, value):
    assert getattr(getattr(check(None, override), section), key) == value


def test_overrides_of_the_schedule():
    assert check(None, "learner.schedule=harmonic").learner.schedule.kind == "harmonic"
    assert check(None, "learner.schedule.alpha=0.9").learner.schedule.alpha == 0.9
    given = {"learner": {"schedule": {"kind": "robbins_monro", "alpha": 0.7}}}
    changed = check(given, "learner.schedule.kind=constant", "learner.schedule.value=0.1")
    assert changed.learner.schedule.value == 0.1


def test_overrides_of_the_structure():
    assert check().learner.structure is None
    assert check(None, "learner.structure=adaptive_components").learner.structure.make() == AdaptiveComponents()
    changed = check(None, "learner.structure.tail=0.05", "learner.structure.splits=false")
    assert changed.learner.structure.make() == AdaptiveComponents(tail=0.05, splits=False)
    given = {"learner": {"structure": "adaptive_components"}}
    assert check(given, "learner.structure.max_components=9").learner.structure.max_components == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.structure=adaptive", "expected one of adaptive_components, got 'adaptive'"),
        ("learner.structure.tail=0.9", "learner.structure: tail must lie in (0, 0.5], got 0.9"),
        ("learner.structure.tial=0.1", "learner.structure.tial: no such key; did you mean 'tail'?"),
    ],
)
def test_refused_structures(override, message):
    assert message in refused(None, override)
    both = {"learner": {"structure": "adaptive_components"}, "output": {"responsibilities": True}}
    assert "output.responsibilities: there is no column for each component" in refused(both)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n_components=3", "command line: n_components: no such key; did you mean 'model.n_components'?"),
        ("model.n_components=x", "command line: model.n_components: expected a whole number, got 'x'"),
        ("model.n_components", "as in learner.batch_size=500; did you mean 'model.n_components=...'?"),
        ("n_components 3", "as in learner.batch_size=500; did you mean 'model.n_components=3'?"),
        ("model.n_components 3", "as in learner.batch_size=500; did you mean 'model.n_components=3'?"),
        ("source.exclude: [a, b]", "did you mean 'source.exclude=[a, b]'?"),
        ("=3", "expected section.key=value"),
        ("source.quote=ab", "command line: source.quote: expected"),
        ("source.path.x=1", "source.path is a value and has no keys"),
        ("source.exclude=[a", "is not valid YAML"),
    ],
)
def test_refused_overrides(override, message):
    assert message in refused(None, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "source: {path: a}\nsource: {path: b}\n",
            "line 2: is not valid YAML: the key 'source' stands there twice",
        ),
        ("source: [", "is not valid YAML"),
        ("source: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("source: " + "[" * 5_000 + "]" * 5_000, "line 1: is not valid YAML: values are nested more than 50 deep"),
        ("a: &a [x]\nb: *a\n", "line 2: is not valid YAML: aliases (*a) are not accepted; write the value out"),
        ("source: &a {path: e.csv}\nmodel:\n  <<: *a\n", "line 3: is not valid YAML: aliases (*a)"),
        ("- source", "expected sections such as 'source:'"),
        ("", "source: is missing"),
    ],
)
def test_refused_files(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"job\.yaml: No such file"):
        load_config(tmp_path / "job.yaml")


def test_every_key_is_described():
    described = dict(describe_keys())
    assert all(text.strip(" .") for text in described.values())
    assert {"source.path", "learner.schedule.alpha", "output.on_error"} <= described.keys()


@pytest.mark.parametrize(("options", "max_ahead"), [({}, 1_800.0), ({"max_ahead": 86_400.0}, 86_400.0)])
def test_a_job_does_not_believe_every_date(options, max_ahead):
    schedule = {"kind": "half_life", "half_life": 60.0, **options}
    config = check_config({"source": {"path": "x.csv", "time": "t"}, "learner": {"schedule": schedule}})
    assert config.learner.schedule.make() == HalfLife(60.0, max_ahead)
