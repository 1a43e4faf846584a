"""What a River user relies on, beyond River's own checks."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import base, compose, evaluate, linear_model, metrics, preprocessing, stream
from river.anomaly import QuantileFilter

from stream_em import (
    Batch,
    BatchEM,
    Categorical,
    Constant,
    EventError,
    Gaussian,
    HalfLife,
    Mixture,
    OnlineEM,
    Poisson,
    Product,
    RobbinsMonro,
    Schema,
    SchemaError,
    load,
    save,
)
from stream_em.families import FamilyError
from stream_em.river import MixtureAnomalyDetector, MixtureClusterer, MixtureTransformer
from stream_em.river.features import MOST_NEWCOMERS, OTHER_FEATURES, SUPPORT
from stream_em.schema import MOST_NAMES

ESTIMATORS = [MixtureClusterer, MixtureAnomalyDetector, MixtureTransformer]
Event = dict[Any, Any]


def mixed_events(n_events: int, seed: int = 0) -> list[Event]:
    """Two clusters over numbers, a category, a flag and a count."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    for far in (rng.random(n_events) < 0.4).tolist():
        center = 6.0 if far else 0.0
        x = center + float(rng.normal())
        events.append(
            {
                "x": x,
                "y": 0.5 * x - center + 0.3 * float(rng.normal()),
                "shop": str(rng.choice(["a", "b"], p=[0.9, 0.1] if far else [0.2, 0.8])),
                "new": bool(rng.random() < 0.3),
                "items": int(rng.poisson(8 if far else 1)),
            }
        )
    return events


def numeric_events(n_events: int, seed: int = 0, shift: float = 0.0) -> list[Event]:
    return [{"x": event["x"] + shift, "y": event["y"]} for event in mixed_events(n_events, seed)]


def learned(model: Any, events: list[Event]) -> Any:
    for event in events:
        model.learn_one(event)
    return model


def statistics_of(model: Any) -> dict[str, np.ndarray]:
    statistics = model.to_learner().statistics
    return {f"{name}:{key}": array for name, part in statistics.parts.items() for key, array in part.arrays().items()}


def infer(model: Any, event: Event) -> Any:
    if isinstance(model, MixtureClusterer):
        return model.predict_one(event), model.predict_proba_one(event)
    return model.score_one(event) if isinstance(model, MixtureAnomalyDetector) else model.transform_one(event)


def as_numbers(model: Any, events: list[Event]) -> np.ndarray:
    if isinstance(model, MixtureAnomalyDetector):
        return np.array([model.score_one(event) for event in events])
    one = model.predict_proba_one if isinstance(model, MixtureClusterer) else model.transform_one
    return np.array([list(one(event).values()) for event in events])


def test_each_class_has_one_role() -> None:
    detector = type(MixtureAnomalyDetector()).__mro__
    roles = {"Clusterer", "AnomalyDetector", "Transformer", "Classifier", "Regressor"}
    assert {one.__name__ for one in MixtureClusterer.__mro__} & roles == {"Clusterer"}
    assert {one.__name__ for one in detector} & roles == {"AnomalyDetector"}
    assert {one.__name__ for one in MixtureTransformer.__mro__} & roles == {"Transformer"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n_learned", [0, 10, 60])
def test_inference_changes_nothing(estimator: Any, n_learned: int) -> None:
    model = learned(estimator(n_components=2, warm_up=50, seed=3), mixed_events(n_learned))
    before = pickle.dumps(model)
    states = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002 - the global one must stay as it is
    for event in [*mixed_events(5, seed=1), {"x": 1.0}, {"shop": "never seen"}, {"other": 3.0}, {}]:
        infer(model, event)
    if estimator is MixtureClusterer:
        assert isinstance(model.centers, dict)
    assert pickle.dumps(model) == before
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states  # noqa: NPY002


@pytest.mark.parametrize("n_learned", [0, 1, 49, 50, 51, 300])
def test_answers_are_defined_at_every_moment(n_learned: int) -> None:
    params: dict[str, Any] = {"n_components": 3, "warm_up": 50, "seed": 0, "kinds": {"items": "count"}}
    events = mixed_events(n_learned)
    clusterer, detector = (learned(one(**params), events) for one in (MixtureClusterer, MixtureAnomalyDetector))
    for event in [*mixed_events(3, seed=9), {"x": 1e100}, {"items": 10**12}, {"shop": "?"}, {"unknown": 1.0}, {}]:
        assert math.isfinite(detector.score_one(event))
        shares = clusterer.predict_proba_one(event)
        assert clusterer.predict_one(event) == max(shares, key=lambda id_: (shares[id_], -id_))
        assert math.isclose(sum(shares.values()), 1.0, rel_tol=1e-12)


@given(seed=st.integers(0, 10**6))
def test_the_order_of_keys_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    events = mixed_events(150)
    shuffled = []
    for event in events:
        names = rng.sample(list(event), len(event))
        shuffled.append({name: event[name] for name in names})
    models = [learned(MixtureClusterer(n_components=2, warm_up=50, seed=0), some) for some in (events, shuffled)]
    first, second = map(statistics_of, models)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_same_seed_same_result() -> None:
    events = mixed_events(300)
    models = [learned(MixtureClusterer(n_components=4, warm_up=50, seed=7), events) for _ in range(2)]
    assert pickle.dumps(models[0]) == pickle.dumps(models[1])
    assert MixtureClusterer()._seed != MixtureClusterer()._seed


def test_statistics_are_those_of_the_engine() -> None:
    events = numeric_events(600)
    model = learned(MixtureClusterer(n_components=3, family=Gaussian(), warm_up=100, seed=5), events)
    learner = OnlineEM(Mixture(Gaussian(), 3), schema=Schema({"x": "numeric", "y": "numeric"}), warm_up=100, seed=5)
    for event in events:
        learner.update(event)
    ours, theirs = model.to_learner(), learner
    assert ours.n_events == theirs.n_events == 600
    for name, part in theirs.statistics.parts.items():
        for key, array in part.arrays().items():
            assert np.array_equal(ours.statistics.parts[name].arrays()[key], array)
    automatic = learned(MixtureClusterer(n_components=3, warm_up=100, seed=5), events)
    means = automatic.to_learner().marginals()[0]
    np.testing.assert_allclose(means, theirs.marginals()[0], rtol=1e-12)


def test_missing_features_are_marginalised() -> None:
    model = learned(MixtureAnomalyDetector(n_components=2, family=Gaussian(), warm_up=50, seed=0), numeric_events(300))
    marginal = model.to_learner().marginal(["y"])
    for event in ({"y": 0.3}, {"y": 0.3, "x": None}, {"y": 0.3, "x": math.nan}, {"y": 0.3, "unknown": 5.0}):
        assert math.isclose(model.score_one(event), -marginal.log_prob({"y": 0.3})[0], rel_tol=1e-12)
    assert model.score_one({}) == 0.0


def test_weights_count_like_copies() -> None:
    events = mixed_events(300)
    weighted = learned(MixtureClusterer(n_components=2, warm_up=50, seed=0), events[:60])
    before = weighted.to_learner().statistics.total_weight
    weighted.learn_one(events[60], w=0.0)
    assert weighted.to_learner().statistics.total_weight == pytest.approx(before, rel=1e-12)
    weighted.learn_one(events[60], w=5.0)
    assert weighted.to_learner().statistics.total_weight == pytest.approx(before + 5.0, rel=1e-12)
    with pytest.raises(EventError, match="weight"):
        weighted.learn_one(events[60], w=-1.0)
    with pytest.raises(SchemaError, match="weight must be a number for each event, got 'much'"):
        weighted.learn_one(events[60], w="much")


# Features that come and go.


def test_new_features_of_every_kind_join() -> None:
    events = mixed_events(1_200)
    early = [{"shop": event["shop"]} for event in events[:300]]
    model = MixtureClusterer(n_components=2, warm_up=100, kinds={"items": "count"}, seed=0)
    learned(model, early)
    learned(model, events[300 : 300 + SUPPORT - 1])
    assert model.to_learner().schema.names == ("shop",)
    learned(model, events[300 + SUPPORT - 1 :])
    schema = model.to_learner().schema
    assert {one.name: one.kind for one in schema.fields} == {
        "shop": "category",
        "items": "count",
        "new": "flag",
        "x": "numeric",
        "y": "numeric",
    }
    near, far = ({"x": 0.0, "y": 0.0, "items": 1}, {"x": 6.0, "y": -3.0, "items": 8})
    assert model.predict_one(near) != model.predict_one(far)
    assert model.ignored_features == {}


def test_a_new_feature_does_not_upset_what_was_learned() -> None:
    events = numeric_events(1_500)
    plain = learned(MixtureClusterer(n_components=2, warm_up=100, seed=0), events)
    noisy = learned(MixtureClusterer(n_components=2, warm_up=100, seed=0), events[:1_000])
    rng = np.random.default_rng(0)
    learned(noisy, [{**event, "noise": float(rng.normal(50.0, 3.0))} for event in events[1_000:]])
    assert "noise" in noisy.to_learner().schema.names
    same = [plain.predict_one(event) == noisy.predict_one(event) for event in numeric_events(300, seed=1)]
    assert np.mean(same) > 0.98


def test_a_stream_that_invents_features_is_bounded_counted_and_warned_of_once() -> None:
    rng = np.random.default_rng(0)
    model = MixtureClusterer(n_components=2, warm_up=50, max_features=8, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(3 * MOST_NEWCOMERS):
            model.learn_one({"x": float(rng.normal()), f"k{index}": 1.0})
        for index in range(SUPPORT * 20):
            model.learn_one({"x": float(rng.normal()), f"often{index % 20}": 1.0})
    assert len(caught) == 1
    assert "k1" in str(caught[0].message)
    assert len(model.to_learner().schema) == 8
    assert len(model.ignored_features) == MOST_NAMES + 1
    assert model.ignored_features[OTHER_FEATURES] > 900
    assert model.to_learner().n_events == 3 * MOST_NEWCOMERS + SUPPORT * 20


@pytest.mark.parametrize("many", [False, True])
def test_vocabularies_that_are_full_are_warned_of_once_by_name(many: bool) -> None:
    import pandas as pd

    events = [
        {"amount": f"{0.5 * row}", "id": f"p{row}", "shop": f"s{row % 31}", "x": float(row % 7)} for row in range(300)
    ]
    model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start in range(0, 300, 20):
            if many:
                model.learn_many(pd.DataFrame(events[start : start + 20]))
            else:
                for event in events[start : start + 20]:
                    model.learn_one(event)
    texts = sorted(str(one.message) for one in caught)
    assert [text.split("'")[1] for text in texts] == ["amount", "id"]
    assert "converters" in texts[0]
    assert "converters" not in texts[1]
    assert "leave it out" in texts[1]
    assert {one.filename for one in caught} == {__file__}


def test_ignored_and_refused_features() -> None:
    events = numeric_events(120)
    ignoring = learned(MixtureClusterer(n_components=2, warm_up=50, unknown="ignore", seed=0), events)
    before = statistics_of(learned(ignoring.clone(), events + events[:40]))
    with pytest.warns(UserWarning, match="'z'") as caught:
        learned(ignoring, [{**event, "z": 1.0} for event in events[:40]])
    assert len(caught) == 1
    assert ignoring.ignored_features == {"z": 40}
    assert all(np.array_equal(array, before[name]) for name, array in statistics_of(ignoring).items())
    n_events = ignoring.to_learner().n_events
    ignoring.learn_one({"z": 1.0})
    assert ignoring.to_learner().n_events == n_events
    refusing = learned(MixtureClusterer(n_components=2, warm_up=50, unknown="refuse", seed=0), events)
    with pytest.raises(EventError, match="'z'"):
        refusing.learn_one({**events[0], "z": 1.0})
    with pytest.raises(EventError, match="'z'"):
        refusing.predict_one({**events[0], "z": 1.0})


def test_features_may_be_named_by_numbers() -> None:
    points = [[event["x"], event["y"]] for event in numeric_events(400)]
    by_number, by_text = (MixtureClusterer(n_components=3, warm_up=60, seed=0) for _ in range(2))
    silhouette = metrics.Silhouette()
    for x, _ in stream.iter_array(points):
        by_number.learn_one(x)
        by_text.learn_one({str(name): value for name, value in x.items()})
        assert by_number.predict_one(x) == by_text.predict_one({str(name): value for name, value in x.items()})
        silhouette.update(x, by_number.predict_one(x), by_number.centers)
    assert set(by_number.centers[0]) == {0, 1}
    assert 0.0 < silhouette.get() < 1.0
    first, second = statistics_of(by_number), statistics_of(by_text)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="same name"):
        by_number.learn_one({0: 1.0, "0": 2.0})


# Bad input.


@pytest.mark.parametrize("n_learned", [0, 10, 100])
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"x": "text", "y": 1.0}, "'x'"),
        ({"x": math.inf, "y": 1.0}, "'x'"),
        ({"x": [1.0], "y": 1.0}, "'x'"),
        ({"x": 1.0, "y": object()}, "'y'"),
        ({"x": 1.0, "y": 1.0, "z": math.inf}, "'z'"),
        ({"x": 1.0, "y": 1.0, "other": True, "z": math.inf}, "'z'"),
        ({"x": math.inf, "y": 1.0, "other": "new"}, "'x'"),
        ({"x": None}, "at least one field"),
        ({}, "at least one field|no field"),
    ],
)
def test_bad_values_are_named_and_leave_the_model_untouched(n_learned: int, bad: Event, named: str) -> None:
    if n_learned == 0 and "text" in bad.values():
        pytest.skip("the first event says what is text")
    model = learned(MixtureClusterer(n_components=2, warm_up=50, seed=0), numeric_events(n_learned))
    before = pickle.dumps(model)
    with pytest.raises(ValueError, match=named):
        model.learn_one(bad)
    assert pickle.dumps(model) == before
    if n_learned and "z" not in bad and named.startswith("'"):
        with pytest.raises(EventError, match=named):
            model.predict_one(bad)


def test_parameters_are_checked() -> None:
    for params in (
        {"n_components": 0},
        {"alpha": 0.3},
        {"step_size": 1.5},
        {"batch_size": 0},
        {"unknown": "guess"},
        {"on_drift": "panic"},
        {"max_features": 0},
        {"covariance_type": "round"},
        {"family": Product({"x": Gaussian()})},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            MixtureClusterer(**params)
    with pytest.raises(ValueError, match="calibration_window"):
        MixtureAnomalyDetector(calibration_window=0)
    with pytest.raises(FamilyError, match="Product"):
        MixtureClusterer(family=Gaussian()).learn_one({"x": "text"})


# Within River.


def test_pipelines_and_evaluation() -> None:
    events = numeric_events(300)
    model = preprocessing.StandardScaler() | MixtureClusterer(n_components=3, warm_up=60, seed=0)
    assert isinstance(model, base.Clusterer) or isinstance(model["MixtureClusterer"], base.Clusterer)
    silhouette = metrics.Silhouette()
    for event in events:
        model.learn_one(event)
        x = model["StandardScaler"].transform_one(event)
        silhouette.update(x, model.predict_one(event), model["MixtureClusterer"].centers)
    assert 0.0 < silhouette.get() < 1.0

    labelled = [(event, event["x"] > 3.0) for event in events]
    labelled[250] = ({"x": 40.0, "y": -90.0}, True)
    # River's ROCAUC takes thresholds between 0 and 1.
    detector = MixtureAnomalyDetector(n_components=2, warm_up=50, calibration_window=200, seed=0)
    truth = [(event, index == 250) for index, (event, _) in enumerate(labelled)]
    assert evaluate.progressive_val_score(truth, detector, metrics.ROCAUC()).get() > 0.9

    classifier = MixtureTransformer(n_components=2, warm_up=50, seed=0) | linear_model.LogisticRegression()
    assert evaluate.progressive_val_score(labelled, classifier, metrics.Accuracy()).get() > 0.8
    both = (MixtureTransformer(n_components=2, seed=0) + preprocessing.StandardScaler()) | (
        linear_model.LogisticRegression()
    )
    both.learn_one(events[0], True)
    assert {"component_0", "x"} <= set(both.transform_one(events[1]))


def test_clustering_metrics_in_progressive_validation() -> None:
    labelled = [(event, None) for event in numeric_events(120)]
    for model in (
        MixtureClusterer(n_components=3, warm_up=60, seed=0),
        preprocessing.StandardScaler() | MixtureClusterer(n_components=3, warm_up=60, seed=0),
    ):
        try:
            steps = list(evaluate.iter_progressive_val_score(labelled, model, metrics.Silhouette(), step=40))
        except (TypeError, AttributeError):
            pytest.skip("this River cannot validate clusterers progressively")
        assert [step["Step"] for step in steps] == [40, 80, 120]
        assert 0.0 < steps[-1]["Silhouette"].get() < 1.0


def test_quantile_filter_keeps_anomalies_from_the_model() -> None:
    events = numeric_events(400)
    model = QuantileFilter(MixtureAnomalyDetector(n_components=2, warm_up=50, seed=0), q=0.99)
    for event in events:
        model.learn_one(event)
    n_before = model.anomaly_detector.to_learner().n_events
    odd = {"x": 100.0, "y": 100.0}
    assert model.classify(model.score_one(odd))
    model.learn_one(odd)
    assert model.anomaly_detector.to_learner().n_events == n_before


def test_nested_models_print_in_full() -> None:
    text = repr(preprocessing.StandardScaler() | MixtureClusterer(n_components=7))
    assert "n_components=7" in text
    assert "n_components=7" in repr(QuantileFilter(MixtureAnomalyDetector(n_components=7), q=0.9))
    assert "n_components=7" in repr(compose.Grouper(MixtureTransformer(n_components=7), by="k"))


def test_clone_is_as_new_and_parameters_are_verbatim() -> None:
    family = Gaussian("diag")
    model = MixtureClusterer(family=family, alpha=0.7, warm_up=50, seed=1)
    learned(model, numeric_events(100))
    clone = model.clone({"n_components": 2})
    assert (clone.n_components, clone.alpha, clone.family, clone.seed) == (2, 0.7, family, 1)
    assert clone.to_learner().n_events == 0
    full = model.clone(include_attributes=True)
    model.learn_one({"x": 1.0, "y": 1.0})
    full.learn_one({"x": 1.0, "y": 1.0})
    assert full.to_learner().n_events == model.to_learner().n_events == 101
    assert pickle.dumps(full.to_learner().statistics) == pickle.dumps(model.to_learner().statistics)


@pytest.mark.parametrize(
    ("change", "schedule"), [({"alpha": 0.9}, RobbinsMonro(0.9)), ({"step_size": 0.3}, Constant(0.3))]
)
def test_mutate_changes_the_steps_of_a_running_model(change: dict[str, Any], schedule: Any) -> None:
    events = numeric_events(3_000)
    params: dict[str, Any] = {"n_components": 2, "family": Gaussian(), "warm_up": 50, "batch_size": 100, "seed": 0}
    model = learned(MixtureClusterer(**params), events[:2_000])
    learner = model.to_learner()
    model.mutate(change)
    learner.schedule = schedule
    unchanged = model.to_learner()
    learned(model, events[2_000:])
    for event in events[2_000:]:
        learner.update(event)
    assert pickle.dumps(model.to_learner().statistics) == pickle.dumps(learner.statistics)
    assert not np.allclose(learner.statistics.total_weight, unchanged.statistics.total_weight)
    with pytest.raises(ValueError, match="alpha"):
        model.mutate({"alpha": 7.0})
    assert model.alpha == change.get("alpha", 0.6)
    with pytest.raises(ValueError, match="not a mutable"):
        model.mutate({"n_components": 3})


def test_pickle_goes_on_in_another_process(tmp_path: Path) -> None:
    events = mixed_events(200)
    model = learned(MixtureClusterer(n_components=2, warm_up=50, seed=0), events[:150])
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, events[150:])))
    program = (
        "import pickle, sys; model, events = pickle.load(open('model.pickle', 'rb'))\n"
        "for event in events: model.learn_one(event)\n"
        "pickle.dump([model.predict_proba_one(event) for event in events], open('answers.pickle', 'wb'))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    learned(model, events[150:])
    there = pickle.loads((tmp_path / "answers.pickle").read_bytes())
    assert there == [model.predict_proba_one(event) for event in events[150:]]


def test_without_numba_the_answers_are_the_same(tmp_path: Path) -> None:
    program = """
import pickle, sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None
from stream_em.river import MixtureAnomalyDetector
events = pickle.load(open("events.pickle", "rb"))
model = MixtureAnomalyDetector(n_components=2, warm_up=50, kinds={"items": "count"}, seed=0)
scores = []
for event in events:
    scores.append(model.score_one(event))
    model.learn_one(event)
assert (model._kernel is None) == (sys.argv[1] == "without")
pickle.dump(scores, open(sys.argv[1], "wb"))
"""
    (tmp_path / "events.pickle").write_bytes(pickle.dumps(mixed_events(400)))
    for name in ("with", "without"):
        subprocess.run([sys.executable, "-c", program, name], cwd=tmp_path, check=True)
    compiled, plain = (np.array(pickle.loads((tmp_path / name).read_bytes())) for name in ("with", "without"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-9, atol=1e-9)


def test_memory_does_not_grow_with_the_stream() -> None:
    model = learned(
        MixtureAnomalyDetector(n_components=2, warm_up=50, calibration_window=100, seed=0), mixed_events(500)
    )
    before = model._raw_memory_usage
    learned(model, mixed_events(3_000, seed=1))
    assert model._raw_memory_usage <= before + 2_000
    assert before < 1_000_000


# Snapshots.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_snapshots_go_on_where_they_stopped(estimator: Any, tmp_path: Path) -> None:
    events = mixed_events(300)
    params: dict[str, Any] = {
        "n_components": 3,
        "warm_up": 50,
        "kinds": {"items": "count"},
        "step_size": 0.2,
        "seed": 0,
    }
    model = learned(estimator(**params), events[:200])
    model.to_snapshot(tmp_path / "model.arrow")
    loaded = estimator.from_snapshot(tmp_path / "model.arrow")
    assert {name: getattr(loaded, name) for name in params} == params
    for one in (model, loaded):
        learned(one, events[200:])
    # Packing and unpacking the state for compiled code rounds.
    np.testing.assert_allclose(as_numbers(loaded, events), as_numbers(model, events), rtol=1e-9, atol=1e-12)
    assert load(tmp_path / "model.arrow").n_events == 200
    assert loaded.clone()._get_params() == loaded._get_params()


def test_a_snapshot_keeps_recent_scores_and_parameters(tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    events = numeric_events(400)
    model = MixtureAnomalyDetector(
        n_components=2, warm_up=50, calibration_window=100, max_features=3, on_drift="reseed", seed=0
    )
    learned(model, events[:300]).to_snapshot(path)
    loaded = MixtureAnomalyDetector.from_snapshot(path)
    assert (loaded.calibration_window, loaded.max_features, loaded.on_drift) == (100, 3, "reseed")
    probes = [*events[300:], {"x": 40.0, "y": -40.0}]
    assert [loaded.score_one(event) for event in probes] == [model.score_one(event) for event in probes]
    # The oldest score leaves first, in both.
    for one in (model, loaded):
        learned(one, events[300:360])
    np.testing.assert_allclose(
        list(loaded._recent.unsorted_window), list(model._recent.unsorted_window), rtol=1e-9, atol=1e-12
    )
    third_feature = [{**event, "z": 1.0 + index % 3, "w": 1.0} for index, event in enumerate(events[:40])]
    with pytest.warns(UserWarning, match="'z'"):
        assert len(learned(loaded, third_feature).to_learner().schema) == 3


def test_an_argument_wins_over_what_a_snapshot_keeps(tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    model = MixtureAnomalyDetector(n_components=2, warm_up=50, calibration_window=100, max_features=3, seed=0)
    learned(model, numeric_events(300)).to_snapshot(path)
    shorter = MixtureAnomalyDetector.from_snapshot(path, calibration_window=30, max_features=9, on_drift="reseed")
    assert (shorter.calibration_window, shorter.max_features, shorter.on_drift) == (30, 9, "reseed")
    assert list(shorter._recent.unsorted_window) == list(model._recent.unsorted_window)[-30:]
    plain = MixtureAnomalyDetector.from_snapshot(path, calibration_window=None)
    assert plain.score_one({"x": 40.0, "y": -40.0}) > 10.0
    clusterer = MixtureClusterer.from_snapshot(path)
    assert clusterer.max_features == 3
    clusterer.to_snapshot(path)
    assert MixtureAnomalyDetector.from_snapshot(path).calibration_window is None
    begun = MixtureAnomalyDetector.from_snapshot(path, calibration_window=20)
    assert begun.tail_probability_one({"x": 40.0, "y": -40.0}) == 1.0


def test_snapshots_of_the_engine_load(tmp_path: Path) -> None:
    events = numeric_events(300)
    model = Mixture(Product({("x", "y"): Gaussian("tied")}), 2)
    path = tmp_path / "learner.arrow"
    save(OnlineEM(model, schedule=RobbinsMonro(0.8, 2.0), warm_up=50, seed=3).update(events), path)
    loaded = MixtureAnomalyDetector.from_snapshot(path, calibration_window=50)
    assert (loaded.alpha, loaded.offset, loaded.unknown, loaded.calibration_window) == (0.8, 2.0, "refuse", 50)
    assert loaded.clone().family == model.family
    save(OnlineEM(model, schedule=HalfLife(60.0), warm_up=50).update(events, time=np.arange(300.0)), path)
    faded = MixtureAnomalyDetector.from_snapshot(path)
    assert math.isclose(faded.score_one(events[0]), -load(path).log_prob(events[0])[0], rel_tol=1e-12)
    with pytest.raises(ValueError, match="HalfLife"):
        faded.learn_one(events[0])
    save(BatchEM(model, seed=0).fit(events), path)
    fitted = MixtureAnomalyDetector.from_snapshot(path)
    assert math.isclose(fitted.score_one(events[0]), -load(path).log_prob(events[0])[0], rel_tol=1e-12)
    fitted.learn_one(events[0])
    assert fitted.to_learner().n_events == 301


@pytest.mark.slow
def test_a_snapshot_of_the_command_loads(tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command needs the extra cli")
    import pyarrow as pa
    import pyarrow.parquet as pq

    events = mixed_events(2_000)
    pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")
    (tmp_path / "job.yaml").write_text(
        "source: {path: events.parquet}\nmodel: {n_components: 2}\noutput: {folder: out, picture: null}\n"
    )
    subprocess.run(
        [sys.executable, "-m", "stream_em.cli", "run", "job.yaml"], cwd=tmp_path, check=True, capture_output=True
    )
    clusterer = MixtureClusterer.from_snapshot(tmp_path / "out" / "model.arrow")
    learner = load(tmp_path / "out" / "model.arrow")
    assert [clusterer.predict_one(event) for event in events[:50]] == learner.predict(events[:50]).tolist()
    clusterer.learn_one(events[0])
    assert clusterer.to_learner().n_events == 2_001


def test_a_product_says_which_features_are_in_the_model_and_of_which_kind() -> None:
    family = Product({("x", "y"): Gaussian(), "items": Poisson()})
    model = MixtureClusterer(n_components=2, family=family, warm_up=50, unknown="ignore", seed=0)
    with pytest.warns(UserWarning, match="'shop'"):
        learned(model, [{"items": 3}, *mixed_events(200)])
    assert model.to_learner().schema == Schema({"items": "count", "x": "numeric", "y": "numeric"}, unknown="ignore")
    assert model.ignored_features == {"shop": 200, "new": 200}
    assert model.predict_one({"items": 0}) != model.predict_one({"items": 9})


def test_growth_of_a_product_with_named_families() -> None:
    family = Product({"shop": Categorical(), ("x",): Gaussian("diag")}, others="full")
    model = learned(MixtureClusterer(n_components=2, family=family, warm_up=50, seed=0), mixed_events(200))
    learner = model.to_learner()
    assert isinstance(learner.encode(mixed_events(1)), Batch)
    assert len(learner.schema) == 5
    assert model.predict_one({"x": 0.0, "items": 1}) != model.predict_one({"x": 6.0, "items": 8})


def test_a_snapshot_goes_on_with_other_steps_but_is_no_other_model(tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    events = numeric_events(300)
    learned(MixtureClusterer(n_components=2, warm_up=50, seed=0), events).to_snapshot(path)
    loaded = MixtureClusterer.from_snapshot(path, step_size=0.05, n_components=2)
    assert loaded.step_size == 0.05
    assert loaded.to_learner().schedule == Constant(0.05)
    reference = MixtureClusterer.from_snapshot(path)
    reference.mutate({"step_size": 0.05})
    for one in (loaded, reference):
        learned(one, events)
    assert pickle.dumps(loaded.to_learner().statistics) == pickle.dumps(reference.to_learner().statistics)
    for change in ({"n_components": 3}, {"batch_size": 7}, {"unknown": "ignore"}, {"prior_weight": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* differs from the snapshot"):
            MixtureClusterer.from_snapshot(path, **change)
