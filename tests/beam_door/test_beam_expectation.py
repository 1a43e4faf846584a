from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from apache_beam.pvalue import AsSingleton
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from cases import CASES, NUMERIC, Case, assert_statistics_close, draw_batch, draw_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_em import Batch, BatchEM, LinearRegression, Mixture, MixtureParameters, Schema, Statistics
from stream_em.beam import ExpectationStep, MergePerKey, MergeStatistics, RejectedEvent, StatisticsCoder
from stream_em.beam.expectation import COUNTS, NAMESPACE, REJECTED, EventCounts
from stream_em.columns import Roles

CASE = CASES["product"]


def events_of(batch: Batch) -> list[dict[str, Any]]:
    return batch.schema.decode(batch.values).to_pylist()


def gathered(pipeline: beam.Pipeline, label: str, step: ExpectationStep, elements: list[Any], parameters: Any) -> Any:
    """Apply an E-step to elements in a pipeline of its own name."""
    given = pipeline | f"{label}: parameters" >> beam.Create([parameters])
    events = pipeline | f"{label}: events" >> beam.Create(elements)
    return events | f"{label}: E-step" >> beam.ParDo(step, AsSingleton(given)).with_outputs(
        REJECTED, COUNTS, main="statistics"
    )


def merged(found: Any, label: str) -> beam.PCollection:
    return found.statistics | f"{label}: merge" >> beam.CombineGlobally(MergeStatistics())


def is_close_to(expected: Statistics) -> Callable[[list[Statistics]], None]:
    def check(found: list[Statistics]) -> None:
        (one,) = found
        assert_statistics_close(one, expected)

    return check


def test_every_family_has_the_statistics_of_the_in_process_e_step() -> None:
    """Law 10."""
    with beam.Pipeline("FnApiRunner") as pipeline:
        for name, case in CASES.items():
            model, start = draw_parameters(case, 3, 1)
            batch = draw_batch(case, 120, 2, missing=0.3, weighted=True)
            pieces = [batch.select(slice(at, at + 7)) for at in range(0, 120, 7)]
            found = gathered(pipeline, name, ExpectationStep(model, case.schema), pieces, start)
            assert_that(merged(found, name), is_close_to(model.e_step(start, batch)), label=name)


def forms() -> Iterator[tuple[str, list[Any], Batch]]:
    """Events in every accepted form, with the batch that they are."""
    batch = draw_batch(CASE, 60, 3, missing=0.2)
    table = CASE.schema.decode(batch.values)
    shuffled = table.select(list(reversed(table.schema.names)))
    yield "dicts", events_of(batch), batch
    yield "lists", [events_of(batch)[:25], events_of(batch)[25:]], batch
    yield "tables", [table.slice(0, 13), shuffled.slice(13)], batch
    yield "record batches", table.to_batches(max_chunksize=17), batch
    yield "polars", [pl.from_arrow(table)], batch
    yield "batches", [batch.select(slice(0, 30)), batch.select(slice(30, None))], batch
    numeric = draw_batch(CASES["gaussian_full"], 60, 4, missing=0.2)
    yield "arrays", [numeric.values.T[:20], numeric.values.T[20:]], numeric
    yield "pandas", [pd.DataFrame(numeric.values.T[:, ::-1], columns=list(reversed(NUMERIC.names)))], numeric


def test_every_form_of_events_is_taken() -> None:
    with beam.Pipeline("FnApiRunner") as pipeline:
        for name, elements, batch in forms():
            case = CASE if batch.schema is CASE.schema else CASES["gaussian_full"]
            model, start = draw_parameters(case, 3, 5)
            found = gathered(pipeline, name, ExpectationStep(model, case.schema), elements, start)
            assert_that(merged(found, name), is_close_to(model.e_step(start, batch)), label=name)
            assert_that(found[REJECTED], equal_to([]), label=f"{name}: rejected")
            assert_that(found[COUNTS], equal_to([EventCounts(60)]), label=f"{name}: counts")


def test_a_column_of_weights_weighs_the_events() -> None:
    batch = draw_batch(CASES["poisson"], 40, 6, weighted=True)
    weight = batch.weight
    assert weight is not None
    dicts = [{**event, "w": w, "note": "?"} for event, w in zip(events_of(batch), weight.tolist())]
    model, start = draw_parameters(CASES["poisson"], 2, 7)
    step = ExpectationStep(model, batch.schema, roles=Roles(weight="w", exclude=("note",)))
    with beam.Pipeline("FnApiRunner") as pipeline:
        for name, elements in {"dicts": dicts, "table": [pa.Table.from_pylist(dicts)]}.items():
            found = gathered(pipeline, name, step, elements, start)
            assert_that(merged(found, name), is_close_to(model.e_step(start, batch)), label=name)


BAD: list[tuple[Any, Any, str, int]] = [
    ({"x": float("inf"), "y": 0.0, "z": 0.0}, ..., "field 'x': got inf, expected a finite number", 1),
    ({"x": "12,50", "y": 0.0, "z": 0.0}, ..., "field 'x': got '12,50'", 1),
    ({"x": 1.0, "y": 0.0, "colour": 1.0}, ..., "field 'colour'", 1),
    ({"x": None}, ..., "expected at least one field with a value", 1),
    (pa.table({"x": [1.0, 2.0], "y": [1.0, 2.0]}), None, "the frame has no column 'z'", 2),
    (np.zeros((3, 2)), None, "the array has 2 columns, the schema 3 fields", 3),
    (pd.DataFrame([[1.0, 2.0]], columns=["x", "x"]), None, "duplicate columns: 'x'", 1),
    ("x,y,z", None, "events of type str are not supported", 1),
    (7, None, "events of type int are not supported", 1),
]


def test_bad_events_go_to_the_dead_letters_and_nothing_else_is_lost() -> None:
    batch = draw_batch(CASES["gaussian_full"], 30, 8)
    model, start = draw_parameters(CASES["gaussian_full"], 2, 9)

    def check(found: list[RejectedEvent]) -> None:
        assert len(found) == len(BAD)
        for element, event, reason, n_events in BAD:
            assert [one.n_events for one in found if reason in one.reason] == [n_events], reason
            (one,) = (one for one in found if reason in one.reason)
            assert one.event == (element if event is ... else event)

    for roles in (None, Roles(weight="w")):
        pipeline = beam.Pipeline("FnApiRunner")
        elements = [*events_of(batch), *(element for element, *_ in BAD)]
        if roles is not None:
            # A role must not make an unreadable element fail.
            elements = [{**one, "w": 1.0} if isinstance(one, dict) else one for one in elements]
            elements = [one for one in elements if not isinstance(one, pa.Table | pd.DataFrame)]
        found = gathered(pipeline, "all", ExpectationStep(model, NUMERIC, roles=roles), elements, start)
        assert_that(merged(found, "all"), is_close_to(model.e_step(start, batch)))
        n_rejected = 12 if roles is None else 9
        assert_that(found[COUNTS], equal_to([EventCounts(30, n_rejected)]), label="counts")
        if roles is None:
            assert_that(found[REJECTED], check, label="rejected")
        result = pipeline.run()
        result.wait_until_finish()
        metrics = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(NAMESPACE))
        counters = {one.key.metric.name: one.committed for one in metrics["counters"]}
        assert counters == {"events": 30, "rejected": n_rejected}
        (likelihood,) = metrics["distributions"]
        expected = model.e_step(start, batch).log_likelihood / 30
        assert likelihood.committed.mean == round(1000 * expected)


def test_unknown_fields_and_categories_are_counted() -> None:
    schema = Schema(CASES["categorical"].schema.fields, unknown="ignore")
    model, start = draw_parameters(Case(CASES["categorical"].family, schema), 2, 1)
    events = [{"country": "DE", "plan": "paid"}, {"country": "XX", "plan": "free", "shop": 7}]
    with beam.Pipeline("FnApiRunner") as pipeline:
        found = gathered(pipeline, "all", ExpectationStep(model, schema), events, start)
        assert_that(found[COUNTS], equal_to([EventCounts(2, 0, (("shop", 1),))]), label="counts")
        assert_that(merged(found, "all"), is_close_to(model.e_step(start, schema.encode(events))))


def test_each_window_has_statistics_of_its_own() -> None:
    batch = draw_batch(CASES["poisson"], 40, 2)
    model, start = draw_parameters(CASES["poisson"], 2, 3)
    early, late = (model.e_step(start, batch.select(slice(at, at + 20))) for at in (0, 20))

    def check(found: list[Statistics]) -> None:
        first, second = found
        if abs(first.log_likelihood - early.log_likelihood) > 1e-6:
            first, second = second, first
        assert_statistics_close(first, early)
        assert_statistics_close(second, late)

    with beam.Pipeline("FnApiRunner") as pipeline:
        parameters = pipeline | "Parameters" >> beam.Create([start])
        timed = [TimestampedValue(event, 10.0 * number) for number, event in enumerate(events_of(batch))]
        statistics = (
            pipeline
            | beam.Create(timed)
            | beam.Map(lambda event: event)
            | beam.WindowInto(FixedWindows(200.0))
            | beam.ParDo(ExpectationStep(model, batch.schema), AsSingleton(parameters))
            | beam.CombineGlobally(MergeStatistics()).without_defaults()
        )
        assert_that(statistics, check)


def test_several_starts_share_the_events() -> None:
    batch = draw_batch(CASE, 50, 2, missing=0.1)
    starts = [draw_parameters(CASE, 2, seed) for seed in (3, 4)]
    expected = [model.e_step(start, batch) for model, start in starts]
    given = [start for _, start in starts]
    named = dict(zip("ab", given))

    def check(names: Any) -> Callable[[list[tuple[Any, Statistics]]], None]:
        def of_pairs(found: list[tuple[Any, Statistics]]) -> None:
            assert sorted(name for name, _ in found) == list(names)
            for (_, one), wanted in zip(sorted(found, key=lambda pair: pair[0]), expected):
                assert_statistics_close(one, wanted)

        return of_pairs

    with beam.Pipeline("FnApiRunner") as pipeline:
        step = ExpectationStep(starts[0][0], CASE.schema)
        for label, parameters, names in (("list", given, [0, 1]), ("mapping", named, ["a", "b"])):
            found = gathered(pipeline, label, step, events_of(batch), parameters)
            for fanout in (None, 3):
                per_key = found.statistics | f"{label}: {fanout}" >> MergePerKey(fanout)
                assert_that(per_key, check(names), label=f"{label}: {fanout} merged")


def test_no_event_is_no_statistics() -> None:
    model, start = draw_parameters(CASE, 2, 3)
    with beam.Pipeline("FnApiRunner") as pipeline:
        found = gathered(pipeline, "none", ExpectationStep(model, CASE.schema), [], start)
        assert_that(merged(found, "none"), equal_to([None]))
        assert_that(found[COUNTS], equal_to([]), label="counts")


@pytest.mark.parametrize("fanout", [1, 0, -3])
def test_a_fanout_is_of_two_parts_or_more(fanout: int) -> None:
    with pytest.raises(ValueError, match="fanout must be at least 2"):
        MergePerKey(fanout)


def make_statistics(number: int) -> tuple[str, Statistics]:
    batch = draw_batch(CASES["poisson"], 5, number)
    model, start = draw_parameters(CASES["poisson"], 2, 1)
    return "ab"[number % 2], model.e_step(start, batch)


@pytest.mark.parametrize("fanout", [None, 3])
def test_accumulators_travel_as_arrow(fanout: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = StatisticsCoder.encode

    def counting(self: StatisticsCoder, value: Statistics | None) -> bytes:
        encoded.append(value)
        return encode(self, value)

    def refuse(self: Statistics, protocol: Any) -> Any:
        raise pickle.PicklingError("statistics were put on the wire as a pickle")

    monkeypatch.setattr(StatisticsCoder, "encode", counting)
    monkeypatch.setattr(Statistics, "__reduce_ex__", refuse)
    with beam.Pipeline("FnApiRunner") as pipeline:
        totals = (
            pipeline
            | beam.Create(range(8))
            | beam.Map(make_statistics).with_output_types(tuple[str, Statistics])
            | MergePerKey(fanout)
            | beam.MapTuple(lambda key, one: (key, round(one.total_weight, 6)))
        )
        assert_that(totals, equal_to([("a", 20.0), ("b", 20.0)]))
    # One for each key and level: the eight values were merged before they were encoded.
    assert 2 <= len(encoded) <= (2 if fanout is None else 2 * fanout + 2)


@given(
    name=st.sampled_from(list(CASES)),
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 64), min_size=63, max_size=63),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=20)
def test_sixty_four_shares_merge_in_any_order_and_stay_as_they_are(
    name: str, seed: int, cuts: list[int], order: Any
) -> None:
    case = CASES[name]
    model, start = draw_parameters(case, 3, seed % 7)
    batch = draw_batch(case, 64, seed, missing=0.2, weighted=True)
    bounds = [0, *sorted(cuts), 64]
    shares = [model.e_step(start, batch.select(slice(*pair))) for pair in pairwise(bounds)]
    for share in shares:
        for part in share.parts.values():
            for array in part.arrays().values():
                # Arrays that were decoded from Arrow may be read-only, and inputs must not change.
                array.flags.writeable = False
    order.shuffle(shares)
    merge = MergeStatistics()
    accumulators = []
    for at in range(0, 64, 8):
        accumulator = merge.create_accumulator()
        for share in shares[at : at + 8]:
            accumulator = merge.add_input(accumulator, share)
        accumulators.append(accumulator)
    accumulators.insert(3, merge.create_accumulator())
    total = merge.extract_output(merge.merge_accumulators(iter(accumulators)))
    assert total is not None
    assert_statistics_close(total, model.e_step(start, batch))


def test_the_events_are_not_touched() -> None:
    values = draw_batch(CASES["gaussian_full"], 30, 5).values
    values.flags.writeable = False
    model, start = draw_parameters(CASES["gaussian_full"], 2, 1)
    step = ExpectationStep(model, NUMERIC)
    step.setup()
    step.start_bundle()
    before = parameter_bytes(model, start)
    list(step.process(values.T, start, beam.window.GlobalWindow()))
    event = {"x": 1.0, "y": None, "z": 3.0}
    list(step.process(event, start, beam.window.GlobalWindow()))
    list(step.finish_bundle())
    assert event == {"x": 1.0, "y": None, "z": 3.0}
    assert parameter_bytes(model, start) == before


def parameter_bytes(model: Mixture, parameters: MixtureParameters) -> list[bytes]:
    arrays = model.family.arrays(parameters.components).values()
    return [parameters.weights.tobytes(), *(array.tobytes() for array in arrays)]


def test_events_that_the_model_has_no_density_for_are_rejected() -> None:
    schema = Schema({"x": "numeric", "y": "numeric"})
    model = Mixture(LinearRegression("y"), 1)
    events = [{"x": float(x), "y": 2.0 * x + x % 2} for x in range(10)]
    start = BatchEM(model, schema=schema).fit(events).parameters
    with beam.Pipeline("FnApiRunner") as pipeline:
        parameters = pipeline | "Parameters" >> beam.Create([start])
        step = beam.ParDo(ExpectationStep(model, schema), AsSingleton(parameters)).with_outputs(REJECTED, main="found")
        outputs = pipeline | "Events" >> beam.Create([*events, {"y": 1.0}]) | step
        reasons = outputs[REJECTED] | beam.Map(lambda one: one.reason.split(": ")[0])
        assert_that(reasons, equal_to(["event 10, field 'x'"]))
        weights = outputs.found | beam.Map(lambda statistics: statistics.total_weight)
        assert_that(weights, equal_to([10.0]), label="weights")
