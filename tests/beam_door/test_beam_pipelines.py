"""The pipelines as a user runs them: real files, a real runner, the command and Beam YAML in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines import cluster_events, refit, refit_per_key, score
from stream_em import BatchEM, Gaussian, Mixture, NotFittedError, Schema, SchemaError, SnapshotError, load
from stream_em.beam import RejectedEvent, WriteRejected, WriteSnapshots
from stream_em.beam.yaml import YamlRefit, YamlRefitPerKey
from stream_em.cli.common import DataError
from stream_em.cli.config import ConfigError

ROOT = Path(__file__).parents[2]
ON_EMBEDDED = ["--runner=FnApiRunner"]


def payments(n_events: int = 600) -> pa.Table:
    generator = np.random.default_rng(5)
    night = generator.random(n_events) < 0.3
    return pa.table(
        {
            "amount": np.where(night, 900.0, 20.0) + generator.normal(size=n_events),
            "hour": np.where(night, 3.0, 14.0) + generator.normal(size=n_events),
            "shop": [f"shop {number}" for number in generator.integers(3, size=n_events)],
            "at": np.arange(float(n_events)),
        }
    )


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "payments").mkdir()
    table = payments()
    for number in range(4):
        pq.write_table(table.slice(150 * number, 150), tmp_path / "payments" / f"{number}.parquet")
    content: dict[str, Any] = {
        "source": {"path": "payments", "time": "at", "exclude": ["shop"]},
        "model": {"n_components": 2},
        "learner": {"batch_size": 50, "warm_up": 60},
        "output": {"folder": "output", "picture": None},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))

    def arguments(*more: str, **sets: str) -> list[str]:
        overrides = [f"--set={key.replace('__', '.')}={value}" for key, value in sets.items()]
        return ["--config", "job.yaml", *ON_EMBEDDED, *overrides, *more]

    return arguments


def rows_of(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(Path().glob(pattern)) for line in path.read_text().splitlines()]


def run_beam_yaml(pipeline: dict[str, Any]) -> None:
    providers = [{"include": str(ROOT / "pipelines" / "providers.yaml")}]
    Path("beam.yaml").write_text(yaml.safe_dump({"pipeline": pipeline, "providers": providers}))
    command = [sys.executable, "-m", "apache_beam.yaml.main", "--yaml_pipeline_file=beam.yaml", *ON_EMBEDDED]
    subprocess.run(command, check=True, capture_output=True)


def test_refit_then_score(job: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    refit.run(job())
    assert "600 events" in capsys.readouterr().out
    fitted = load("output/model.arrow")
    table = payments()
    in_process = BatchEM(Mixture(Gaussian(), 2), schema=fitted.schema, seed=0).fit(table.select(["amount", "hour"]))
    assert np.sort(fitted.marginals()[0][:, 0]) == pytest.approx(np.sort(in_process.marginals()[0][:, 0]), rel=1e-6)
    score.run(job("--snapshot", "output/model.arrow", output__responsibilities="true"))
    scored = pa.concat_tables(pq.read_table(path) for path in Path("output").glob("scored-*.parquet")).sort_by("at")
    assert scored.num_rows == 600
    assert scored["shop"].to_pylist() == table["shop"].to_pylist()
    expected = fitted.score_events(table.select(["amount", "hour"]))
    np.testing.assert_allclose(scored["log_prob"].to_numpy(), expected.log_prob, rtol=1e-12)
    np.testing.assert_array_equal(scored["component"].to_numpy(), expected.component)
    assert not list(Path("output").glob("quarantine*"))


def test_what_cannot_be_read_or_used_is_kept_with_the_reason(job: Callable[..., list[str]]) -> None:
    (Path("payments") / "broken.parquet").write_bytes(b"PAR1 and no more")
    strange = payments(50).set_column(0, "amount", [[*[1.0] * 49, float("inf")]])
    pq.write_table(strange, "payments/strange.parquet")
    pq.write_table(payments(20).drop_columns(["hour"]), "payments/lacking.parquet")
    refit.run(job(schema__fields="{amount: numeric, hour: numeric}"))
    reasons = {row["reason"]: row["n_events"] for row in rows_of("output/quarantine-*.jsonl")}
    assert any("broken.parquet" in reason for reason in reasons)
    assert any("'amount': got inf" in reason for reason in reasons)
    assert next(count for reason, count in reasons.items() if "no column 'hour'" in reason) == 20
    assert load("output/model.arrow").n_events == 600 + 49


def test_no_event_that_can_be_used(job: Callable[..., list[str]]) -> None:
    with pytest.raises(NotFittedError, match=r"all 600 were rejected.*no column 'price'"):
        refit.run(job(schema__fields="{price: numeric}"))
    refit.run(job(schema__fields="{amount: numeric, hour: numeric}"))
    with pytest.raises(DataError, match=r"no event could be used, the first of the reasons.*has no column 'area'"):
        refit_per_key.run(job("--key", "area"))


def test_declared_categories_are_those_of_the_events(job: Callable[..., list[str]]) -> None:
    pq.write_table(payments().append_column("day", [[number % 2 for number in range(600)]]), "days.parquet")
    sets = {"schema__fields": "{amount: numeric, shop: category}", "source__path": "days.parquet"}
    refit.run(job(**sets, source__exclude="[hour, day]"))
    refit_per_key.run(job("--key", "day", **sets, source__exclude="[hour]", model__n_components="1"))
    for path in ("output/model.arrow", *map(str, Path("output/models").glob("*/last.arrow"))):
        schema = load(path).schema
        assert schema is not None
        assert set(schema.fields[1].categories) == {"shop 0", "shop 1", "shop 2"}


def test_refit_per_key(job: Callable[..., list[str]]) -> None:
    pq.write_table(payments(1).set_column(2, "shop", [["tiny"]]), "payments/tiny.parquet")
    refit_per_key.run(job("--key", "shop"))
    table = payments()
    for number in range(3):
        of_shop = table.filter(pa.compute.equal(table["shop"], f"shop {number}"))
        fitted = load(f"output/models/shop%20{number}/last.arrow")
        assert fitted.n_events == of_shop.num_rows
        assert fitted.schema is not None
        assert fitted.schema.names == ("amount", "hour")
    (rejected,) = rows_of("output/quarantine-0*.jsonl")
    assert "tiny" in rejected["reason"]
    assert not Path("output/models/tiny").exists()


def test_what_cannot_be_read_lies_beside_what_cannot_be_used(
    job: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"x": float(number % 9), "shop": "ab"[number % 2]}) for number in range(40)]
    lines[7], lines[9], lines[30] = "no event", '{"x": 1.0, "shop": "\\ud800"}', '{"x": 1.0, "shop": "c"}'
    Path("events.jsonl").write_text("\n".join(lines))
    for limit in ({}, {"source__limit": "40"}):
        arguments = job(
            "--key", "shop", source__path="events.jsonl", source__exclude="[]", source__time="null", **limit
        )
        refit_per_key.run(arguments)
        reasons = " ".join(row["reason"] for row in rows_of("output/quarantine-*.jsonl"))
        assert "does not parse" in reasons
        assert "half a character" in reasons
        assert "key 'c' has 1 events" in reasons
        assert "37 events used, 3 rejected" in capsys.readouterr().out


def test_cluster_events_by_key_and_from_a_refit(job: Callable[..., list[str]]) -> None:
    cluster_events.run(job("--key", "shop", output__folder="keyed"))
    rows = rows_of("keyed/scored-*.jsonl")
    assert len(rows) == 600
    assert sum(row["component"] is None for row in rows) == 3 * 60
    (last,) = Path("keyed/models/shop%200").iterdir()
    assert last.name == "last.arrow"
    assert load(last).n_events == payments()["shop"].to_pylist().count("shop 0")
    refit.run(job())
    cluster_events.run(job("--initial", "output/model.arrow", "--shards=2", output__folder="shared"))
    assert [path.name for path in Path("shared/models/@all").iterdir()] == ["last.arrow"]
    assert load("shared/models/@all/last.arrow").n_events == 600 + 600
    assert {row["component"] for row in rows_of("shared/scored-*.jsonl")} == {0, 1}


def test_online_events_keep_their_key_and_bad_times_fail_nothing(job: Callable[..., list[str]]) -> None:
    for path in Path("payments").iterdir():
        path.unlink()
    times = [*np.arange(90.0), float("inf"), 1e300, 1.7e12, -1e300, float("nan"), 95.0]
    table = payments(96).set_column(3, "at", [times]).set_column(2, "shop", [[*["a/.."] * 95, None]])
    pq.write_table(table, "payments/0.parquet")
    cluster_events.run(job("--key", "shop"))
    rows = rows_of("output/scored-*.jsonl")
    assert len(rows) == 90
    assert {row["shop"] for row in rows} == {"a/.."}
    reasons = [row["reason"] for row in rows_of("output/quarantine-*.jsonl")]
    assert sum("between the years 1 and 2999" in reason for reason in reasons) == 4
    assert sum("its key is needed" in reason for reason in reasons) == 1
    assert sum("a finite event time" in reason for reason in reasons) == 1


def test_files_that_store_the_same_columns_in_other_ways(job: Callable[..., list[str]]) -> None:
    refit.run(job())
    table = payments(40)
    other = table.select(["at", "shop", "hour", "amount"])
    other = other.set_column(1, "shop", other["shop"].dictionary_encode())
    other = other.set_column(0, "at", other["at"].cast(pa.int64()))
    pq.write_table(other, "payments/other.parquet")
    score.run(job("--snapshot", "output/model.arrow"))
    scored = pa.concat_tables(pq.read_table(path) for path in Path("output").glob("scored-*.parquet"))
    assert scored.num_rows == 640
    assert scored.schema.field("at").type == pa.float64()


def test_a_second_run_leaves_nothing_of_the_first(job: Callable[..., list[str]]) -> None:
    pq.write_table(payments(9).set_column(2, "shop", [["gone"] * 9]), "payments/gone.parquet")
    pq.write_table(payments(3).set_column(0, "amount", [[1.0, 2.0, float("inf")]]), "payments/bad.parquet")
    refit.run(job("--work_folder", "."))
    refit_per_key.run(job("--key", "shop"))
    assert rows_of("output/quarantine-*.jsonl")
    assert Path("output/models/gone/last.arrow").exists()
    for name in ("gone", "bad"):
        Path(f"payments/{name}.parquet").unlink()
    refit_per_key.run(job("--key", "shop"))
    assert not rows_of("output/quarantine-*.jsonl")
    assert not Path("output/models/gone/last.arrow").exists()
    assert sorted(path.name for path in Path().iterdir()) == ["job.yaml", "output", "payments"]


def test_no_two_keys_share_a_folder_and_none_leaves_it(tmp_path: Path) -> None:
    learner = BatchEM(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"})).fit([{"x": 1.0}, {"x": 2.0}])
    keys = [
        None,
        "all",
        "@all",
        "",
        ".",
        "..",
        "a/b",
        "a",
        1,
        "1",
        b"1",
        "b'1'",
        ("a", 1),
        "('a', 1)",
        "%2E.",
        "ü" * 300,
    ]
    keys += ["ü" * 299, "\ud800", "-", "a b"]
    written = [path for key in keys for _, path in WriteSnapshots(str(tmp_path)).process((key, 1.0, learner))]
    assert len({Path(path).resolve() for path in written}) == len(keys)
    assert {Path(path).resolve().parent.parent for path in written} == {tmp_path.resolve()}


def test_options_that_do_not_go_together(job: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError, match="--config FILE is needed"):
        refit.run(ON_EMBEDDED)
    with pytest.raises(ConfigError, match="--key COLUMN is needed"):
        refit_per_key.run(job())
    with pytest.raises(ConfigError, match="--key, or, for one model"):
        cluster_events.run(job())
    with pytest.raises(ConfigError, match="in a pipeline each key keeps its"):
        cluster_events.run(job("--key", "shop", learner__structure="adaptive_components"))
    with pytest.raises(ConfigError, match="--snapshot FILE is needed"):
        score.run(job())
    with pytest.raises(ConfigError, match=r"^model\.n_components=3: expected options; .* come after --set"):
        refit.run([*job(), "--experiments", "use_x=1", "--unknown", "1", "model.n_components=3"])
    with pytest.raises(ConfigError, match=r"^--shrds: no such option; did you mean '--shards'\?"):
        cluster_events.run(job("--shrds", "2"))
    with pytest.raises(ConfigError, match="--snapshot_every: is for --kafka"):
        cluster_events.run(job("--key", "shop", "--snapshot_every", "60"))
    with pytest.raises(ConfigError, match=r"must not hold \*, \? or \["):
        refit.run(job(output__folder="'out[1]'"))
    with pytest.raises(ConfigError, match=r"output\.scored_events and output\.quarantine: .* would remove one another"):
        cluster_events.run(job("--key", "shop", output__quarantine="scored-not.jsonl"))
    with pytest.raises(SnapshotError, match=r"job\.yaml: not a stream_em snapshot"):
        score.run(job("--snapshot", "job.yaml"))
    with pytest.raises(ConfigError, match=r"is declared in schema\.fields"):
        refit_per_key.run(job("--key", "amount", schema__fields="{amount: numeric}"))


def test_a_snapshot_of_another_schema_rejects_every_event(job: Callable[..., list[str]]) -> None:
    from stream_em import save

    save(BatchEM(Mixture(Gaussian(), 1), schema=Schema({"price": "numeric"})).fit([{"price": 1.0}]), "other.arrow")
    with pytest.raises(DataError, match=r"no event could be used.*'price'"):
        score.run(job("--snapshot", "other.arrow"))
    rejected = rows_of("output/quarantine-*.jsonl")
    assert sum(row["n_events"] for row in rejected) == 600
    assert all("'price'" in row["reason"] for row in rejected)


def test_columns_that_the_model_does_not_know_are_carried_into_the_scores(job: Callable[..., list[str]]) -> None:
    refit.run(job(learner__max_iter="1"))
    pq.write_table(payments(30).append_column("note", [["n"] * 30]), "noted.parquet")
    declared = "{amount: numeric, hour: numeric}"
    sets = {"source__path": "noted.parquet", "schema__fields": declared, "schema__unknown": "ignore"}
    score.run(job("--snapshot", "output/model.arrow", **sets))
    (scored,) = Path("output").glob("scored-*.parquet")
    assert pq.read_table(scored).column_names == ["amount", "hour", "shop", "at", "note", "component", "log_prob"]


def test_numbers_that_json_has_no_name_for_are_text_in_the_quarantine(tmp_path: Path) -> None:
    rejected = RejectedEvent({"x": float("inf"), "y": [np.float64("nan"), 1.0]}, "of no use")
    with beam.Pipeline("FnApiRunner") as pipeline:
        _ = pipeline | beam.Create([rejected]) | WriteRejected(str(tmp_path))
    ((line,),) = (file.read_text().splitlines() for file in tmp_path.iterdir())
    assert json.loads(line, parse_constant=pytest.fail)["event"] == {"x": "inf", "y": ["nan", 1.0]}


@pytest.mark.parametrize("pipeline", [refit, refit_per_key, score, cluster_events])
def test_help_names_the_options(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipeline.run(["--help"])
    told = capsys.readouterr().out
    assert {"--config", "--set"} < set(told.split())
    assert ("--key" in told.split()) == ("--initial" in told.split()) == (pipeline in (refit_per_key, cluster_events))
    assert ("--snapshot" in told.split()) == (pipeline is score)


def test_options_are_known_to_beam(job: Callable[..., list[str]], caplog: pytest.LogCaptureFixture) -> None:
    refit.run(job("--work_folder", "work", learner__max_iter="1"))
    score.run(job("--snapshot", "output/model.arrow"))
    cluster_events.run(job("--initial", "output/model.arrow", "--shards", "2"))
    refit_per_key.run(job("--key", "shop"))
    assert "--config" not in caplog.text
    assert not [line for line in caplog.messages if "parseable" in line]


def test_nothing_is_lost_of_a_category_without_a_value(job: Callable[..., list[str]]) -> None:
    pq.write_table(payments(9).append_column("land", [pa.nulls(9, pa.string())]), "lands.parquet")
    fields = "{amount: numeric, land: category}"
    sets = {"source__path": "lands.parquet", "source__exclude": "[hour, shop]", "schema__fields": fields}
    refit.run(job(**sets))
    assert load("output/model.arrow").n_events == 9
    with pytest.raises(ConfigError, match="field 'land' is a category of which no value is known"):
        refit_per_key.run(job("--key", "shop", **sets))
    Path("lands.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SchemaError, match=r"no category of 'land' could be found: all events were rejected.*damaged"):
        refit_per_key.run(job("--key", "shop", **sets))


def test_an_initial_model_that_may_grow_is_refused(job: Callable[..., list[str]]) -> None:
    from stream_em import save

    schema = Schema({"amount": "numeric", "hour": "numeric"}, unknown="add")
    save(BatchEM(Mixture(Gaussian(), 1), schema=schema).fit(payments().select(["amount", "hour"])), "grows.arrow")
    with pytest.raises(ConfigError, match='unknown="add"'):
        cluster_events.run(job("--initial", "grows.arrow"))


@pytest.mark.slow
def test_the_command(job: Callable[..., list[str]]) -> None:
    command = [sys.executable, "-m", "stream_em.cli", "refit", "job.yaml", "learner.max_iter=3", "--", *ON_EMBEDDED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote output/model.arrow" in done.stdout
    assert load("output/model.arrow").n_events == 600
    refused = subprocess.run([*command[:4], "absent.yaml"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "absent.yaml" in refused.stderr


def test_beam_yaml_lists_categories(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"field 'land': list its categories, land: \[DE, FR\]"):
        YamlRefit("model.arrow", {"land": "category"})
    with pytest.raises(SchemaError, match="field 'land': got the category False, expected text; put it in quotes"):
        YamlRefit("model.arrow", {"land": ["DE", False]})
    refit_of_rows = YamlRefit(str(tmp_path / "model.arrow"), {"land": ["DE", "FR"]}, n_components=1, iterations=1)
    with beam.Pipeline("FnApiRunner") as pipeline:
        _ = pipeline | beam.Create([beam.Row(land=land) for land in ("DE", "FR", "FR", "NO")]) | refit_of_rows
    (component,) = load(tmp_path / "model.arrow").describe()
    assert component.fields[0].text == "'FR' 50%"


def test_beam_yaml_names_the_columns_that_rows_lack() -> None:
    rows = beam.Pipeline("FnApiRunner") | beam.Create([beam.Row(amount=1.0, shop="a")])
    refused = r"the rows have no column 'amont' \(they have: amount, shop\); did you mean 'amount'\?"
    with pytest.raises(SchemaError, match=refused):
        _ = rows | YamlRefit("model.arrow", {"amont": "numeric"})
    with pytest.raises(SchemaError, match="no column 'weight'"):
        _ = rows | "Weighted" >> YamlRefit("model.arrow", {"amount": "numeric"}, weight="weight")
    with pytest.raises(SchemaError, match="no column 'sho'"):
        _ = rows | YamlRefitPerKey("sho", "models", {"amount": "numeric"})


@pytest.mark.parametrize("wrong", [{"output": "good"}, {}, {"outptu": "errors"}, "errors"])
def test_beam_yaml_refuses_an_error_output_without_a_name(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"error_handling: got .*, expected \{output: NAME\}"):
        YamlRefit("model.arrow", {"amount": "numeric"}, error_handling=wrong)


@pytest.mark.slow
def test_beam_yaml_hands_on_rows_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2", reason="Beam YAML needs apache-beam[yaml]")
    monkeypatch.chdir(tmp_path)
    elements = [{"x": 1.0 * i, "shop": "a"} for i in range(9)] + [{"x": 1e300, "shop": "a"}, {"x": 2.0, "shop": "b"}]
    options = {"fields": {"x": "numeric"}, "n_components": 2, "error_handling": {"output": "errors"}}
    write = {"type": "WriteToJson"}
    transforms = [
        {"type": "Create", "config": {"elements": elements}},
        {"type": "StreamEMRefit", "input": "Create", "config": {"snapshot": "model.arrow", **options}},
        {"type": "StreamEMRefitPerKey", "input": "Create", "config": {"key": "shop", "folder": "models", **options}},
        {**write, "name": "Refitted", "input": "StreamEMRefit", "config": {"path": "refit.json"}},
        {**write, "name": "Refused", "input": "StreamEMRefit.errors", "config": {"path": "errors.json"}},
        {**write, "name": "Of keys", "input": "StreamEMRefitPerKey.errors", "config": {"path": "keys.json"}},
    ]
    run_beam_yaml({"transforms": transforms})
    assert len(rows_of("refit.json*")) == 2
    (error,) = rows_of("errors.json*")
    assert json.loads(error["element"]) == {"x": 1e300, "shop": "a"}
    assert "field 'x': got 1e+300" in error["msg"]
    of_event, of_key = sorted(error["msg"] for error in rows_of("keys.json*"))
    assert "field 'x': got 1e+300" in of_event
    assert of_key.startswith("key 'b' has 1 event")


@pytest.mark.slow
def test_beam_yaml(job: Callable[..., list[str]]) -> None:
    pytest.importorskip("jinja2", reason="Beam YAML needs apache-beam[yaml]")
    read = {"type": "ReadFromParquet", "config": {"path": "payments/*.parquet"}}
    fields = {"amount": "numeric", "hour": "numeric"}
    jobs = {
        "refit": ("StreamEMRefit", {"snapshot": "model.arrow", "fields": fields, "n_components": 2}),
        "keys": ("StreamEMRefitPerKey", {"key": "shop", "folder": "models", "fields": fields, "n_components": 2}),
        "score": ("StreamEMScore", {"snapshot": "model.arrow", "exclude": ["shop", "at"]}),
    }
    for name, (kind, config) in jobs.items():
        write = {"type": "WriteToJson", "config": {"path": f"{name}.json"}}
        run_beam_yaml({"type": "chain", "transforms": [read, {"type": kind, "config": config}, write]})
    assert sorted(round(row["weight"], 1) for row in rows_of("refit.json*")) == [0.3, 0.7]
    assert {row["key"] for row in rows_of("keys.json*")} == {"shop 0", "shop 1", "shop 2"}
    rows = sorted(rows_of("score.json*"), key=lambda row: row["at"])
    expected = load("model.arrow").log_prob(payments().select(["amount", "hour"]))
    np.testing.assert_allclose([row["log_prob"] for row in rows], expected, rtol=1e-9)
