"""RunInference with a snapshot: the learner's own answers, whatever form the events come in."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from apache_beam.ml.inference.base import (
    KeyedModelHandler,
    KeyModelMapping,
    KeyModelPathMapping,
    ModelMetadata,
    PredictionResult,
    RunInference,
)
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from hypothesis import given
from hypothesis import strategies as st

from stream_em import BatchEM, Gaussian, Mixture, OnlineEM, Product, Schema, save
from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import REJECTED
from stream_em.beam.serving import EventScore, MixtureModelHandler, SnapshotModel, SplitRejected
from stream_em.columns import Roles
from stream_em.learners import NotFittedError
from stream_em.store import Learner, SnapshotError

NAMES = ("x", "y", "z")
# The sums of a block of events may be taken in another order than those of one event.
ROUNDING = 1e-12


def readings(n_events: int = 400, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_events, 3)) + 6.0 * rng.integers(2, size=(n_events, 1))


def as_dicts(values: np.ndarray[Any, Any]) -> list[dict[str, float]]:
    return [dict(zip(NAMES, row)) for row in values.tolist()]


def fitted(seed: int = 0, shift: float = 0.0) -> BatchEM:
    schema = Schema(dict.fromkeys(NAMES, "numeric"))
    return BatchEM(Mixture(Gaussian(), n_components=3), schema=schema, seed=seed).fit(readings(seed=seed) + shift)


def saved(learner: Learner, path: Path) -> str:
    save(learner, path)
    return str(path)


def check(result: PredictionResult, learner: Learner) -> None:
    """Assert that an event got what the learner says of it."""
    example = result.example
    event = example._asdict() if hasattr(example, "_asdict") else example
    expected = learner.score_events(event[None] if isinstance(event, np.ndarray) else [event])
    assert isinstance(result.inference, EventScore)
    assert result.inference.component == expected.component[0]
    assert result.inference.log_prob == pytest.approx(expected.log_prob[0], rel=ROUNDING)
    assert result.inference.anomaly_score == -result.inference.log_prob
    assert list(result.inference.responsibilities) == learner.parameters.component_ids.tolist()
    told = list(result.inference.responsibilities.values())
    np.testing.assert_allclose(told, expected.responsibilities[0], rtol=1e-9, atol=1e-300)


def checked(learner: Learner, n_results: int) -> Callable[[list[PredictionResult]], None]:
    def matcher(results: list[PredictionResult]) -> None:
        assert len(results) == n_results
        for result in results:
            check(result, learner)

    return matcher


@pytest.mark.parametrize("form", ["dicts", "arrays", "rows"])
def test_single_events_get_the_learners_answers(form: str, tmp_path: Path) -> None:
    learner = fitted()
    path = saved(learner, tmp_path / "model.arrow")
    values = readings(50, seed=1)
    examples: list[Any] = {
        "dicts": as_dicts(values),
        "arrays": list(values),
        "rows": [beam.Row(**event) for event in as_dicts(values)],
    }[form]
    with beam.Pipeline("FnApiRunner") as pipeline:
        results = pipeline | beam.Create(examples) | RunInference(MixtureModelHandler(path))
        assert_that(results, checked(learner, 50))
        assert_that(results | beam.Map(_model_id) | beam.Distinct(), _equals([path]), label="model id")


def _model_id(result: PredictionResult) -> Any:
    return result.model_id


def test_the_digits_are_those_of_score_events(tmp_path: Path) -> None:
    learner = fitted()
    events = as_dicts(readings(70, seed=1))
    handler = MixtureModelHandler(saved(learner, tmp_path / "model.arrow"))
    results = list(handler.run_inference(events, handler.load_model()))
    expected = learner.score_events(events)
    assert [result.inference.log_prob for result in results] == expected.log_prob.tolist()
    assert [result.inference.component for result in results] == expected.component.tolist()
    told = [list(result.inference.responsibilities.values()) for result in results]
    assert told == expected.responsibilities.tolist()


@pytest.mark.parametrize("form", ["table", "record batch", "frame", "array", "list"])
def test_an_example_of_many_events_is_a_table_of_scores(form: str, tmp_path: Path) -> None:
    learner = fitted()
    values = readings(64, seed=2)
    table = pa.table(dict(zip(NAMES, values.T)))
    example: Any = {
        "table": table,
        "record batch": table.to_batches()[0],
        "frame": pd.DataFrame(values, columns=list(NAMES)),
        "array": values,
        "list": as_dicts(values),
    }[form]
    expected = learner.score_events(example)

    def matcher(results: list[PredictionResult]) -> None:
        (result,) = results
        assert type(result.example) is type(example)
        scores = result.inference
        assert scores.column_names == ["component", "log_prob", "responsibilities", "reason"]
        assert scores["log_prob"].to_pylist() == expected.log_prob.tolist()
        assert scores["component"].to_pylist() == expected.component.tolist()
        told = [list(row.values()) for row in scores["responsibilities"].to_pylist()]
        assert told == expected.responsibilities.tolist()
        assert scores["responsibilities"].type.field(1).name == str(learner.parameters.component_ids[1])
        assert scores["reason"].null_count == 64

    path = saved(learner, tmp_path / "model.arrow")
    with beam.Pipeline("FnApiRunner") as pipeline:
        assert_that(pipeline | beam.Create([example]) | RunInference(MixtureModelHandler(path)), matcher)


def test_a_batch_may_hold_every_form_at_once() -> None:
    learner = fitted()
    values = readings(6, seed=3)
    model = SnapshotModel(learner)
    scores = model.score([values[0], as_dicts(values)[1], values[2:5], beam.Row(**as_dicts(values)[5])])
    first, second, several, last = scores.inferences
    expected = learner.log_prob(values)
    told = [first.log_prob, second.log_prob, *several["log_prob"].to_pylist(), last.log_prob]
    np.testing.assert_allclose(told, expected, rtol=ROUNDING)
    assert (scores.n_events, scores.n_rejected) == (6, 0)


WRONG: list[Any] = [
    {"x": "high", "y": 0.0, "z": 0.0},
    {"x": float("inf"), "y": 0.0, "z": 0.0},
    {"x": None, "y": None, "z": None},
    {"x": 0.0, "y": 0.0, "z": 0.0, "w": 1.0},
    np.zeros(2),
    np.array(["a", "b", "c"]),
    np.array([0.0, np.inf, 0.0]),
    np.float64(3.0),
    "an event",
    None,
    pa.table({"x": [1.0], "y": [2.0]}),
    pa.table([[1.0], [2.0], [3.0], [4.0]], names=["x", "y", "z", "z"]),
    np.array(1.0),
    pd.DataFrame([[1.0, 2.0, 3.0, 4.0]], columns=["x", "y", "z", "z"]),
    pd.DataFrame({"x": [1.0, "high"], "y": 0.0, "z": 0.0}),
    np.zeros((2, 2, 3)),
]


@given(st.lists(st.integers(-1, len(WRONG) - 1), min_size=1, max_size=12))
def test_what_cannot_be_used_fails_nothing_else(picks: list[int]) -> None:
    learner, good = fitted(), as_dicts(readings(1, seed=4))[0]
    scores = SnapshotModel(learner, Roles(exclude=("key",))).score(
        [good if pick < 0 else WRONG[pick] for pick in picks]
    )
    expected = learner.log_prob([good])[0]
    for pick, inference in zip(picks, scores.inferences):
        if pick < 0:
            assert isinstance(inference, EventScore)
            assert inference.log_prob == pytest.approx(expected, rel=ROUNDING)
        else:
            assert isinstance(inference, RejectedEvent)
            assert inference.reason
    assert scores.n_events == picks.count(-1)
    # The last two examples hold two events each.
    assert scores.n_rejected == sum((pick >= 0) + (pick >= len(WRONG) - 2) for pick in picks)


def test_rejected_events_are_set_apart_and_counted(tmp_path: Path) -> None:
    learner = fitted()
    path = saved(learner, tmp_path / "model.arrow")
    good = as_dicts(readings(3, seed=5))
    bad = {"x": float("-inf"), "y": 0.0, "z": 0.0}
    mixed = pa.Table.from_pylist([good[0], bad, good[1]])
    lacking = pa.table({"x": [0.0, 1.0]})

    def scored(results: list[PredictionResult]) -> None:
        single, several = sorted(results, key=lambda result: isinstance(result.example, pa.Table))
        check(single, learner)
        assert several.example.to_pylist() == good[:2]
        assert several.inference.column_names == ["component", "log_prob", "responsibilities"]
        np.testing.assert_allclose(several.inference["log_prob"], learner.log_prob(good[:2]), rtol=ROUNDING)

    def rejected(events: list[RejectedEvent]) -> None:
        whole, in_table, alone = sorted(events, key=lambda one: (one.n_events != 2, one.reason[:7] != "event 1"))
        assert (whole.event, whole.n_events) == (None, 2)
        assert "no column 'y', 'z'" in whole.reason
        assert (alone.event, in_table.event) == (bad, bad)
        assert in_table.reason.startswith("event 1, field 'x': got -inf")
        assert alone.reason.startswith("event 0, field 'x': got -inf")

    pipeline = beam.Pipeline("FnApiRunner")
    results = pipeline | beam.Create([good[2], bad, mixed, lacking]) | RunInference(MixtureModelHandler(path))
    split = results | beam.ParDo(SplitRejected()).with_outputs(REJECTED, main="scored")
    assert_that(split.scored, scored)
    assert_that(split[REJECTED], rejected, label="rejected")
    counters = counted(pipeline)
    assert (counters["events"], counters["rejected"]) == (3, 4)
    assert counters["num_inferences"] == 4


def counted(pipeline: beam.Pipeline) -> dict[str, int]:
    """Run a pipeline; return its counters."""
    run = pipeline.run()
    run.wait_until_finish()
    counters = run.metrics().query()["counters"]
    return {one.key.metric.name: one.committed for one in counters if one.key.metric.namespace == "stream_em"}


def test_keys_stay_with_rejected_events(tmp_path: Path) -> None:
    path = saved(fitted(), tmp_path / "model.arrow")
    good, bad = as_dicts(readings(1))[0], {"x": "high", "y": 0.0, "z": 0.0}
    handler = KeyedModelHandler(MixtureModelHandler(path))
    with beam.Pipeline("FnApiRunner") as pipeline:
        results = pipeline | beam.Create([("pump", good), ("fan", bad)]) | RunInference(handler)
        split = results | beam.ParDo(SplitRejected()).with_outputs(REJECTED, main="scored")
        assert_that(split.scored | beam.Keys(), _equals(["pump"]))
        assert_that(split[REJECTED] | beam.MapTuple(_key_and_event), _equals([("fan", bad)]), label="rejected")


def _key_and_event(key: str, rejected: RejectedEvent) -> tuple[str, Any]:
    return key, rejected.event


def _equals(expected: list[Any]) -> Callable[[list[Any]], None]:
    def matcher(found: list[Any]) -> None:
        assert found == expected

    return matcher


def test_each_key_has_its_own_model(tmp_path: Path) -> None:
    learners = {"pump": fitted(), "fan": fitted(seed=1, shift=20.0)}
    paths = {key: saved(learner, tmp_path / f"{key}.arrow") for key, learner in learners.items()}
    handler = KeyedModelHandler([KeyModelMapping([key], MixtureModelHandler(path)) for key, path in paths.items()])
    events = as_dicts(readings(10, seed=6))

    def matcher(results: list[tuple[str, PredictionResult]]) -> None:
        assert sorted(key for key, _ in results) == 10 * ["fan"] + 10 * ["pump"]
        for key, result in results:
            assert result.model_id == paths[key]
            check(result, learners[key])

    with beam.Pipeline("FnApiRunner") as pipeline:
        keyed = pipeline | beam.Create([(key, event) for key in learners for event in events])
        assert_that(keyed | RunInference(handler), matcher)


def test_a_model_shared_by_processes_gives_the_same(tmp_path: Path) -> None:
    learner = fitted()
    handler = MixtureModelHandler(saved(learner, tmp_path / "model.arrow"), large_model=True)
    assert handler.share_model_across_processes()
    with beam.Pipeline("FnApiRunner") as pipeline:
        results = pipeline | beam.Create(as_dicts(readings(20, seed=7))) | RunInference(handler)
        assert_that(results, checked(learner, 20))


def test_a_newer_snapshot_takes_over_in_the_stream(tmp_path: Path) -> None:
    learners = [fitted(), fitted(seed=1, shift=30.0), fitted(seed=2, shift=-30.0)]
    paths = [saved(learner, tmp_path / f"{number}.arrow") for number, learner in enumerate(learners)]
    events = as_dicts(readings(9, seed=8))
    stream = test_stream.TestStream()
    for number in (1, 2):
        # Models before the events of their window.
        stream.add_elements([TimestampedValue(ModelMetadata(paths[number], str(number)), 10 * number)], tag="models")
        stream.add_elements(
            [TimestampedValue(event, 10 * number + at) for at, event in enumerate(events)], tag="events"
        )
        stream.advance_watermark_to(10 * (number + 1), tag="models")
        stream.advance_watermark_to(10 * (number + 1), tag="events")
    stream.advance_watermark_to_infinity(tag="models").advance_watermark_to_infinity(tag="events")

    def matcher(results: list[PredictionResult]) -> None:
        assert sorted(result.model_id for result in results) == 9 * [paths[1]] + 9 * [paths[2]]
        for result in results:
            check(result, learners[paths.index(result.model_id)])

    options = PipelineOptions()
    options.view_as(StandardOptions).streaming = True
    with beam.Pipeline("BundleBasedDirectRunner", options=options) as pipeline:
        arriving = pipeline | stream
        models = arriving["models"] | "Window models" >> beam.WindowInto(FixedWindows(10))
        windowed = arriving["events"] | beam.WindowInto(FixedWindows(10))
        results = windowed | RunInference(MixtureModelHandler(paths[0]), model_metadata_pcoll=models)
        assert_that(results, matcher)


def test_the_models_of_keys_are_replaced(tmp_path: Path) -> None:
    learners = {name: fitted(seed, 10.0 * seed) for seed, name in enumerate(["a", "b", "newer a", "newer b"])}
    paths = {name: saved(learner, tmp_path / f"{name}.arrow") for name, learner in learners.items()}
    handler = KeyedModelHandler([KeyModelMapping([key], MixtureModelHandler(paths[key])) for key in "ab"])
    model = handler.load_model()
    event = as_dicts(readings(1))[0]
    handler.override_metrics("stream_em")
    before = dict(handler.run_inference([("a", event), ("b", event)], model))
    handler.update_model_paths(model, [KeyModelPathMapping([key], paths[f"newer {key}"]) for key in "ab"])
    after = dict(handler.run_inference([("a", event), ("b", event)], model))
    for key in "ab":
        check(before[key], learners[key])
        check(after[key], learners[f"newer {key}"])


def test_columns_that_are_not_the_models_stay_in_the_example() -> None:
    learner = fitted()
    event = {"id": "a7", "x": 0.1, "y": 0.2, "z": 0.3, "label": True}
    roles = Roles(label="label", weight="w", exclude=("id",))
    model = SnapshotModel(learner, roles)
    one, table = model.score([event, pa.Table.from_pylist([event])]).inferences
    expected = learner.log_prob({"x": 0.1, "y": 0.2, "z": 0.3})[0]
    assert one.log_prob == pytest.approx(expected, rel=ROUNDING)
    assert table["log_prob"][0].as_py() == pytest.approx(expected, rel=ROUNDING)
    (refused,) = SnapshotModel(learner).score([event]).inferences
    assert "id" in refused.reason


def test_missing_values_are_marginalised_and_ignored_fields_counted(tmp_path: Path) -> None:
    schema = Schema({"x": "numeric", "shop": "category"}, unknown="ignore")
    model = Mixture(Product({}, others="full"), 2)
    events = [{"x": float(at % 7), "shop": "ab"[at % 2]} for at in range(60)]
    learner = OnlineEM(model, schema=schema, warm_up=40).update(events)
    expected = learner.log_prob([{"x": 1.0}, {"shop": "b"}]).tolist()

    def matcher(results: list[PredictionResult]) -> None:
        told = sorted(result.inference.log_prob for result in results)
        np.testing.assert_allclose(told, sorted(expected), rtol=ROUNDING)

    pipeline = beam.Pipeline("FnApiRunner")
    given = pipeline | beam.Create([{"x": 1.0, "colour": "red"}, {"x": float("nan"), "shop": "b"}])
    results = given | RunInference(MixtureModelHandler(saved(learner, tmp_path / "model.arrow")))
    assert_that(results, matcher)
    assert counted(pipeline)["ignored_fields"] == 1


def test_a_learner_in_its_warm_up_answers_as_itself() -> None:
    events = readings(30)
    learner = OnlineEM(Mixture(Gaussian(), 2), warm_up=50).update(events)
    (scores,) = SnapshotModel(learner).score([events]).inferences
    assert scores["log_prob"].to_pylist() == learner.log_prob(events).tolist()


def test_nothing_but_rejected_events_and_nothing_at_all() -> None:
    model = SnapshotModel(fitted())
    assert model.score([]).inferences == []
    (rejected,) = model.score([{"x": "a"}]).inferences
    assert isinstance(rejected, RejectedEvent)
    (empty,) = model.score([pa.table({name: pa.array([], pa.float64()) for name in NAMES})]).inferences
    assert empty.num_rows == 0


def test_snapshots_that_cannot_be_served_say_why(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.arrow"
    damaged.write_bytes(Path(saved(fitted(), tmp_path / "model.arrow")).read_bytes()[:-200])
    with pytest.raises(SnapshotError, match=r"damaged\.arrow"):
        MixtureModelHandler(damaged).load_model()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MixtureModelHandler(tmp_path / "nowhere.arrow").load_model()
    new = saved(OnlineEM(Mixture(Gaussian(), 2)), tmp_path / "new.arrow")
    with pytest.raises(SnapshotError, match=r"new\.arrow: nothing can be scored .* seen no event"):
        MixtureModelHandler(new).load_model()
    with pytest.raises(NotFittedError):
        SnapshotModel(OnlineEM(Mixture(Gaussian(), 2)))


def test_options_are_beams(tmp_path: Path) -> None:
    handler = MixtureModelHandler("m.arrow", min_batch_size=8, max_batch_size=64, model_copies=2, env_vars={"A": "b"})
    assert handler.batch_elements_kwargs() == {"min_batch_size": 8, "max_batch_size": 64}
    assert handler.model_copies() == 2
    assert handler.share_model_across_processes()
    assert not MixtureModelHandler("m.arrow").share_model_across_processes()
    with pytest.raises(TypeError, match="no option max_batchsize"):
        MixtureModelHandler("m.arrow", max_batchsize=64)
    with pytest.raises(ValueError, match="takes no inference_args"):
        RunInference(handler, inference_args={"temperature": 1}).expand(None)
    assert handler.get_metrics_namespace() == "stream_em"


def test_an_update_without_a_path_keeps_the_model(tmp_path: Path) -> None:
    path = saved(fitted(), tmp_path / "model.arrow")
    handler = MixtureModelHandler(path)
    # What Beam's WatchFilePattern says of files that were there before the pipeline.
    handler.update_model_path("")
    handler.update_model_path(None)
    (result,) = handler.run_inference(as_dicts(readings(1)), handler.load_model())
    assert result.model_id == path


def test_bytes_of_a_batch_grow_with_it() -> None:
    handler = MixtureModelHandler("m.arrow")
    table = pa.table({"x": np.zeros(1_000)})
    assert handler.get_num_bytes([table, np.zeros((500, 2))]) == 8_000 + 8_000
    one = handler.get_num_bytes([{"x": 1.0}])
    assert 0 < one < handler.get_num_bytes([{"x": 1.0}, beam.Row(x=1.0)])


def test_the_model_can_be_weakly_referenced_and_the_handler_pickled(tmp_path: Path) -> None:
    handler = MixtureModelHandler(saved(fitted(), tmp_path / "model.arrow"), roles=Roles(exclude=("id",)))
    again = pickle.loads(pickle.dumps(handler))
    model = again.load_model()
    event = as_dicts(readings(1))[0] | {"id": 1}
    (score,) = [result.inference for result in again.run_inference([event], model)]
    reference = weakref.ref(model)
    assert isinstance(score, EventScore)
    assert reference() is model
    del model
    gc.collect()
    assert reference() is None


def test_results_survive_the_wire() -> None:
    scores = SnapshotModel(fitted()).score([readings(3), as_dicts(readings(1))[0], {"x": "a"}]).inferences
    assert pickle.loads(pickle.dumps(scores)) == scores
