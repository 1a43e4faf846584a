from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from cases import CASES, assert_parameters_equal, assert_statistics_close, draw_batch, draw_parameters

from stream_em import Batch, BatchEM, Gaussian, Mixture, Schema
from stream_em.beam import RefitPerKey, RejectedEvent
from stream_em.beam.expectation import NAMESPACE
from stream_em.columns import Roles

RUNNER = "FnApiRunner"
CASE = CASES["product"]
MODEL = Mixture(CASE.family, 2)
REJECTED_HERE: list[RejectedEvent] = []


def keep_here(event: RejectedEvent) -> None:
    REJECTED_HERE.append(event)


def in_order(batch: Batch) -> Batch:
    rows = batch.values if batch.weight is None else np.vstack([batch.values, batch.weight])
    return batch.select(np.lexsort(rows))


def drawn(n_keys: int = 3, n_events: int = 40) -> dict[str, Batch]:
    return {f"device {key}": draw_batch(CASE, n_events + key, key, missing=0.2) for key in range(n_keys)}


def dicts_of(batch: Batch) -> list[dict[str, Any]]:
    return batch.schema.decode(batch.values).to_pylist()


def are_those_of(fits: dict[Any, BatchEM]) -> Callable[[list[tuple[Any, BatchEM]]], None]:
    def check(found: list[tuple[Any, BatchEM]]) -> None:
        assert {key for key, _ in found} == set(fits)
        assert len(found) == len(fits)
        for key, fit in found:
            wanted = fits[key]
            assert fit.history == wanted.history
            assert fit.converged == wanted.converged
            assert fit.n_events == wanted.n_events
            assert fit.origin == wanted.origin
            assert_parameters_equal(fit.parameters, wanted.parameters, fit.model.bind(fit.schema).family)

    return check


@pytest.mark.parametrize("seeded", [True, False])
def test_each_key_has_the_fit_of_batch_em_however_its_events_come(seeded: bool) -> None:
    batches = drawn()
    start = None if seeded else draw_parameters(CASE, 2, 5)[1]
    options: dict[str, Any] = {"schema": CASE.schema, "max_iter": 4, "tol": 0.0, "initial_parameters": start}
    check = are_those_of({key: BatchEM(MODEL, **options).fit(in_order(batch)) for key, batch in batches.items()})
    events = [{**event, "device": key} for key, batch in batches.items() for event in dicts_of(batch)]
    order = np.random.default_rng(0).permutation(len(events)).tolist()
    events = [events[position] for position in order]
    types = [*CASE.schema.decode(batches["device 0"].values).schema, pa.field("device", pa.string())]
    table = pa.Table.from_pylist(events, pa.schema(types))
    without = [
        (event["device"], {name: value for name, value in event.items() if name != "device"}) for event in events
    ]
    several = PipelineOptions(["--direct_num_workers=3", "--direct_running_mode=multi_threading"])
    for elements, key, how in (
        (events, "device", several),
        ([events[:50], events[50:]], "device", None),
        ([table.slice(0, 31), table.slice(31)], "device", several),
        (without, None, several),
        (list(batches.items()), None, None),
        ([(key, batch.schema.decode(batch.values)) for key, batch in batches.items()], None, None),
    ):
        with beam.Pipeline(RUNNER, options=how) as pipeline:
            source = pipeline | beam.Create(elements, reshuffle=False) | beam.Reshuffle()
            assert_that(source | RefitPerKey(MODEL, key=key, **options), check)


def test_keys_that_start_alike_can_be_merged() -> None:
    batches, (_, start) = drawn(2), draw_parameters(CASE, 2, 5)
    options: dict[str, Any] = {"schema": CASE.schema, "initial_parameters": start, "max_iter": 1}
    both = (
        MODEL.bind(CASE.schema)
        .e_step(start, batches["device 0"])
        .merge(MODEL.bind(CASE.schema).e_step(start, batches["device 1"]))
    )

    def check(found: list[tuple[str, BatchEM]]) -> None:
        (_, one), (_, other) = found
        merged = one.merge(other)
        assert merged.statistics is not None
        assert_statistics_close(merged.statistics, both)

    with beam.Pipeline(RUNNER) as pipeline:
        assert_that(pipeline | beam.Create(list(batches.items())) | RefitPerKey(MODEL, **options), check)


def test_a_key_may_be_a_function_and_of_any_stable_kind() -> None:
    model, schema = Mixture(Gaussian(), 1), Schema({"x": "numeric", "kind": "flag"})
    events = [{"x": float(x), "kind": kind} for kind in (True, False) for x in range(3)]
    keys: list[Any] = ["a", b"b", 7, ("a", 1), np.int64(8)]

    def check(found: list[tuple[Any, int]]) -> None:
        assert sorted(found, key=repr) == sorted([("a", 6), (b"b", 6), (7, 6), (("a", 1), 6), (8, 6)], key=repr)

    with beam.Pipeline(RUNNER) as pipeline:
        pairs = pipeline | beam.Create([(key, event) for key in keys for event in events])
        fits = pairs | RefitPerKey(model, schema=schema)
        assert_that(fits | beam.MapTuple(lambda key, fit: (key, fit.n_events)), check)
        by_kind = (
            pipeline
            | "Events" >> beam.Create(events)
            | "By kind" >> RefitPerKey(model, schema=schema, key=lambda event: ("kind", int(event["kind"])))
        )
        counted = by_kind | "Count" >> beam.MapTuple(lambda key, fit: (key, fit.n_events))
        assert_that(counted, equal_to([(("kind", 1), 3), (("kind", 0), 3)]), label="function")


def test_what_cannot_be_used_is_told_and_nothing_else_is_lost() -> None:
    model, schema = Mixture(Gaussian(), 3), Schema({"x": "numeric"}, unknown="ignore")
    good = [{"shop": "good", "x": float(x**2 % 13)} for x in range(20)]
    few = [{"shop": "few", "x": 1.0}, {"shop": "few", "x": 2.0}]
    wrong: list[Any] = [
        {"shop": "good", "x": "?"},
        {"shop": "good", "x": float("nan")},
        {"x": 1.0},
        {"shop": None, "x": 1.0},
        {"shop": 1.5, "x": 1.0},
        {"shop": True, "x": 1.0},
        {"shop": ("a", None), "x": 1.0},
        "no event",
        np.zeros((2, 1)),
        pa.table({"x": [1.0, 2.0]}),
        pa.table({"shop": ["good", None], "x": [9.0, 1.0]}),
        [{"shop": "good", "x": 3.0, "colour": "red"}, 5],
    ]
    REJECTED_HERE.clear()
    pipeline = beam.Pipeline(RUNNER)
    fits = (
        pipeline
        | beam.Create([*good, *few, *wrong])
        | RefitPerKey(model, schema=schema, key="shop", rejected_to=beam.Map(keep_here))
        | beam.MapTuple(lambda key, fit: (key, fit.n_events))
    )
    assert_that(fits, equal_to([("good", 22)]))
    result = pipeline.run()
    result.wait_until_finish()
    reasons = sorted(one.reason for one in REJECTED_HERE)
    assert [one for one in REJECTED_HERE if one.event == {"key": "few"}] == [
        RejectedEvent({"key": "few"}, "key 'few' has 2 events with weight, fewer than the 3 components", 2)
    ]
    for number, reason in (
        (1, "field 'x': got '?', expected a number"),
        (1, "expected at least one field with a value"),
        (6, "key, column 'shop': got None, expected a string"),
        (1, "key, column 'shop': got 1.5, expected a string"),
        (1, "key, column 'shop': got True, expected a string"),
        (1, "key, column 'shop': got ('a', None), expected a string"),
        (1, "got events of type str, which hold no key"),
        (1, "got events of type ndarray, which hold no key"),
    ):
        assert sum(reason in one for one in reasons) == number, (reason, reasons)
    assert sum(one.n_events for one in REJECTED_HERE) == len(reasons) + 1
    counters = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(NAMESPACE))["counters"]
    counts: Counter[str] = Counter()
    for one in counters:
        # Each step has a counter of its own.
        counts[one.key.metric.name] += one.committed
    assert counts == {"events": 22, "keys": 1, "rejected": len(reasons) + 1, "ignored": 1}


def test_what_is_no_pair_is_told() -> None:
    REJECTED_HERE.clear()
    with beam.Pipeline(RUNNER) as pipeline:
        elements: list[Any] = [{"x": 1.0}, ("a", {"x": 1.0}), ("a", {"x": 2.0}), ("a", 5)]
        refit = RefitPerKey(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}), rejected_to=beam.Map(keep_here))
        fits = pipeline | beam.Create(elements) | refit
        assert_that(fits | beam.MapTuple(lambda key, fit: (key, fit.n_events)), equal_to([("a", 2)]))
    reasons = sorted(one.reason for one in REJECTED_HERE)
    assert len(reasons) == 2
    assert reasons[0].startswith("events of type int are not supported")
    assert reasons[1] == "got {'x': 1.0}, expected a (key, event) pair"


def test_weights_weigh_and_labels_stay_out() -> None:
    batch = draw_batch(CASES["poisson"], 30, 2, weighted=True)
    assert batch.weight is not None
    rows = zip(dicts_of(batch), batch.weight.tolist())
    events = [{**event, "w": weight, "note": "?", "t": "never", "shop": "a"} for event, weight in rows]
    options: dict[str, Any] = {"schema": batch.schema, "max_iter": 3}
    model = Mixture(CASES["poisson"].family, 2)
    check = are_those_of({"a": BatchEM(model, **options).fit(in_order(batch))})
    roles = Roles(weight="w", label="note", time="t")
    with beam.Pipeline(RUNNER) as pipeline:
        assert_that(pipeline | beam.Create(events) | RefitPerKey(model, key="shop", roles=roles, **options), check)


def test_a_key_without_weight_is_told() -> None:
    REJECTED_HERE.clear()
    events = [{"shop": shop, "x": float(x), "w": w} for shop, w in (("a", 0.0), ("b", 1.0)) for x in range(3)]
    refit = RefitPerKey(
        Mixture(Gaussian(), 1),
        schema=Schema({"x": "numeric"}),
        key="shop",
        roles=Roles(weight="w"),
        rejected_to=beam.Map(keep_here),
    )
    with beam.Pipeline(RUNNER) as pipeline:
        fits = pipeline | beam.Create(events) | refit
        assert_that(fits | beam.Keys(), equal_to(["b"]))
    reason = "key 'a' has 0 events with weight, fewer than the 1 components"
    assert list(REJECTED_HERE) == [RejectedEvent({"key": "a"}, reason, 3)]


def test_a_large_key_is_fitted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_em.beam.per_key.MOST_EVENTS", 50)
    case = CASES["gaussian_full"]
    batch, (_, start) = draw_batch(case, 200, 3, missing=0.1), draw_parameters(case, 2, 4)
    options: dict[str, Any] = {"schema": case.schema, "initial_parameters": start, "max_iter": 3, "tol": 0.0}
    model = Mixture(case.family, 2)
    expected = BatchEM(model, **options).fit(batch)

    def check(found: list[tuple[str, BatchEM]]) -> None:
        ((_, fit),) = found
        assert fit.n_events == 200
        np.testing.assert_allclose(fit.history, expected.history, rtol=1e-10)

    pieces = [("a", batch.select(slice(*pair))) for pair in pairwise(range(0, 201, 20))]
    with beam.Pipeline(RUNNER) as pipeline:
        assert_that(pipeline | beam.Create(pieces) | RefitPerKey(model, **options), check)


def test_frames_of_pandas_hold_keys() -> None:
    frame = pd.DataFrame({"shop": ["a", "b"] * 10, "x": np.arange(20.0)})
    with beam.Pipeline(RUNNER) as pipeline:
        fits = (
            pipeline
            | beam.Create([frame])
            | RefitPerKey(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}), key="shop")
        )
        means = fits | beam.MapTuple(lambda key, fit: (key, round(float(fit.parameters.components.mean[0, 0]), 9)))
        assert_that(means, equal_to([("a", 9.0), ("b", 10.0)]))


def test_no_event_is_no_model() -> None:
    with beam.Pipeline(RUNNER) as pipeline:
        fits = pipeline | beam.Create([]) | RefitPerKey(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}))
        assert_that(fits, equal_to([]))


def test_a_stream_without_end_is_refused() -> None:
    refit = RefitPerKey(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}))
    with pytest.raises(ValueError, match="the events have no end"):
        _ = beam.Pipeline(RUNNER) | PeriodicImpulse(fire_interval=1.0) | refit


@pytest.mark.parametrize("wrong", [{"max_iter": 0}, {"tol": -1.0}, {"n_init": 0}, {"seed": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RefitPerKey(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}), **wrong)
