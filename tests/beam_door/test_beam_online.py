"""Online models on Beam: each key's learner is one fed the same batches, whatever the stream does meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import reduce

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.test_stream import TestStream as EventStream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from stream_em import (
    AdaptiveComponents,
    BatchEM,
    Categorical,
    Gaussian,
    HalfLife,
    Harmonic,
    Mixture,
    OnlineEM,
    Product,
    RobbinsMonro,
    Schema,
    load,
    save,
)
from stream_em.beam.online import GlobalUpdate, OnlineUpdate
from stream_em.columns import Roles
from stream_em.learners import NotFittedError
from stream_em.river import MixtureClusterer
from stream_em.store import to_bytes

SCHEMA = Schema({"x": "numeric", "y": "numeric"})
MODEL = Mixture(Gaussian(), 2)
# A check looks at its collection at the end of the global window: what it should see must be due before that.
END = 1_000_000


def readings(n_events: int, seed: int, shift: float = 0.0) -> list[dict[str, float]]:
    generator = np.random.default_rng(seed)
    centers = np.array([[0.0, 0.0], [6.0, 3.0]]) + shift
    values = centers[generator.integers(2, size=n_events)] + generator.normal(size=(n_events, 2))
    return [{"x": x, "y": y} for x, y in values.tolist()]


def with_timestamp(value, timestamp=beam.DoFn.TimestampParam):
    return timestamp.micros / 1e6, value


def no_time():
    return 0.0


def streaming() -> beam.Pipeline:
    options = PipelineOptions()
    options.view_as(StandardOptions).streaming = True
    return beam.Pipeline("BundleBasedDirectRunner", options=options)


def check(collection, expectation, label="check"):
    """Have a function look at all elements of a collection, which must be reached."""
    assert_that(collection, expectation, label=label)


def known_answer(events, batch_size, **options) -> tuple[OnlineEM, np.ndarray]:
    learner = OnlineEM(MODEL, schema=SCHEMA, batch_size=batch_size, **options)
    log_prob = [
        learner.predict_then_update(events[start : start + batch_size]).log_prob
        for start in range(0, len(events), batch_size)
    ]
    return learner, np.concatenate(log_prob)


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("bundle_repeat", [0, 2])
def test_a_key_has_the_learner_that_was_fed_its_batches(bundle_repeat, averaging):
    # With repeated bundles, what a bundle learned must not be in the state that its repetition reads.
    of_key = {"a": readings(330, 1), "b": readings(270, 2, shift=50.0)}
    options = {"schedule": RobbinsMonro(0.7), "warm_up": 100, "averaging": averaging, "seed": 3}
    pairs = [(key, event) for key, events in of_key.items() for event in events]
    pairs = [pairs[position] for position in np.argsort(np.arange(600) % 7, kind="stable")]
    in_order = defaultdict(list)
    for key, event in pairs:
        in_order[key].append(event)
    expected = {key: known_answer(events, 60, **options) for key, events in in_order.items()}

    def check_snapshots(snapshots):
        assert {key: to_bytes(learner) for key, _, learner in snapshots} == {
            key: to_bytes(learner) for key, (learner, _) in expected.items()
        }
        assert len(snapshots) == 2

    def check_scored(scored):
        assert len(scored) == 600
        for key, events in in_order.items():
            log_prob = {tuple(one.event.values()): one.log_prob for one in scored if one.key == key}
            found = [log_prob[tuple(event.values())] for event in events]
            assert found == [None] * 100 + expected[key][1][100:].tolist()
        assert all((one.component is None) == (one.log_prob is None) for one in scored)

    with beam.Pipeline(FnApiRunner(bundle_repeat=bundle_repeat)) as pipeline:
        outputs = pipeline | beam.Create(pairs) | OnlineUpdate(MODEL, schema=SCHEMA, batch_size=60, **options)
        check(outputs.snapshots, check_snapshots, "snapshots")
        check(outputs.scored, check_scored, "scored")
        check(outputs.rejected, lambda rejected: assert_equal(rejected, []), "rejected")


def assert_equal(found, expected):
    assert found == expected


def test_the_state_goes_through_its_coder_between_bundles_and_nothing_changes():
    events = readings(240, 4)
    expected, _ = known_answer(events, 40, warm_up=60)
    stream = EventStream()
    for start in range(0, 240, 10):
        stream.add_elements([TimestampedValue(("a", event), 1) for event in events[start : start + 10]])

    def check_snapshots(snapshots):
        assert [to_bytes(learner) for _, _, learner in snapshots] == [to_bytes(expected)]

    with streaming() as pipeline:
        update = OnlineUpdate(MODEL, schema=SCHEMA, batch_size=40, warm_up=60, max_wait=None, snapshot_every=1_000.0)
        check(
            (pipeline | stream.advance_watermark_to(END).advance_watermark_to_infinity() | update).snapshots,
            check_snapshots,
        )


def test_snapshots_come_at_the_right_event_times_and_only_of_what_was_learned():
    one, two, three, four, five, six = readings(6, 5)
    stream = (
        EventStream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(("a", one), 1), TimestampedValue(("a", two), 12)])
        .add_elements([TimestampedValue(("b", six), 33)])
        .advance_watermark_to(9)
        .advance_watermark_to(11)
        .add_elements([TimestampedValue(("a", three), 13)])
        .add_elements([TimestampedValue(("a", four), 5)])  # late
        .advance_watermark_to(25)
        .advance_watermark_to(45)  # nothing new of either
        .add_elements([TimestampedValue(("a", five), 46)])
        .advance_watermark_to(END)
        .advance_watermark_to_infinity()
    )

    def check_snapshots(snapshots):
        found = sorted((key, time, timestamp, learner.n_events) for timestamp, (key, time, learner) in snapshots)
        assert found == [("a", 10.0, 10.0, 2), ("a", 20.0, 20.0, 4), ("a", 50.0, 50.0, 5), ("b", 40.0, 40.0, 1)]

    with streaming() as pipeline:
        update = OnlineUpdate(MODEL, schema=SCHEMA, batch_size=1, max_wait=None, snapshot_every=10.0)
        outputs = pipeline | stream | update
        check(outputs.snapshots | beam.Map(with_timestamp), check_snapshots)


def test_late_events_do_not_make_a_snapshot_each():
    events = readings(6, 5)
    stream = EventStream().advance_watermark_to(1_000)
    for event in events:
        stream.add_elements([TimestampedValue(("a", event), 999)])
    stream.advance_watermark_to(END).advance_watermark_to_infinity()

    def check_times(times):
        # Two are overdue, so at once; the next is due at 1,010.
        assert sorted(times) == [1_000.0, 1_010.0]

    with streaming() as pipeline:
        update = OnlineUpdate(MODEL, schema=SCHEMA, batch_size=1, max_wait=None, snapshot_every=10.0)
        snapshots = (pipeline | stream | update).snapshots
        check(snapshots | beam.MapTuple(lambda key, time, learner: time), check_times)


def test_a_batch_that_is_not_full_is_learned_after_max_wait():
    stream = (
        EventStream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(("a", event), 1) for event in readings(3, 6)])
        .advance_processing_time(20)
        .advance_watermark_to(10)
        .advance_watermark_to(END)
        .advance_watermark_to_infinity()
    )

    def check_snapshots(snapshots):
        # Learned before event time reached 10: else the first snapshot would be empty, so not there.
        assert [(time, learner.n_events) for _, time, learner in snapshots] == [(5.0, 3)]

    with streaming() as pipeline:
        update = OnlineUpdate(MODEL, schema=SCHEMA, batch_size=100, max_wait=15.0, snapshot_every=5.0)
        # The clock of a test stream stands at 0 until it is advanced.
        update._clock = no_time
        check((pipeline | stream | update).snapshots, check_snapshots)


def test_scored_events_keep_their_own_timestamps():
    events = readings(7, 7)
    stamped = [TimestampedValue(("a", event), 10.0 * row) for row, event in enumerate(events)]
    expected = {tuple(event.values()): 10.0 * row for row, event in enumerate(events)}

    def check_scored(scored):
        assert {tuple(one.event.values()): timestamp for timestamp, one in scored} == expected

    with beam.Pipeline("FnApiRunner") as pipeline:
        pairs = pipeline | beam.Create(stamped) | beam.Map(lambda stamped: stamped)
        outputs = pairs | OnlineUpdate(MODEL, schema=SCHEMA, batch_size=3)
        check(outputs.scored | beam.Map(with_timestamp), check_scored)


def test_out_of_order_and_late_events_fade_with_their_own_time():
    one = Mixture(Gaussian(), 1)
    events = readings(60, 8)
    initial = BatchEM(one, schema=SCHEMA).fit(events[:20])
    times = np.random.default_rng(8).permutation(60).astype(float)
    in_order = initial_fork(initial, HalfLife(10.0))
    for position in np.argsort(times).tolist():
        in_order.update([events[position]], time=[times[position]])
    stream = EventStream()
    for start in range(0, 60, 6):
        # From the second on, events are late as often as not.
        stream.add_elements(
            [TimestampedValue(("a", events[row]), times[row]) for row in range(start, start + 6)]
        ).advance_watermark_to(20 + start // 2)
    stream.advance_watermark_to(END).advance_watermark_to_infinity()

    def check_snapshots(snapshots):
        ((_, _, learner),) = snapshots
        assert learner.n_events == 60
        assert learner.statistics.time == 59.0
        for name, part in in_order.statistics.parts.items():
            for key, array in part.arrays().items():
                np.testing.assert_allclose(learner.statistics.parts[name].arrays()[key], array, rtol=1e-11, atol=1e-12)

    with streaming() as pipeline:
        update = OnlineUpdate(
            initial=initial, schedule=HalfLife(10.0), batch_size=5, max_wait=None, snapshot_every=1_000.0
        )
        outputs = pipeline | stream | update
        check(outputs.snapshots, check_snapshots)
        check(outputs.scored, lambda scored: assert_equal(len(scored), 60), "scored")


def initial_fork(initial: BatchEM, schedule) -> OnlineEM:
    return OnlineEM(initial.model, schema=initial.schema, initial_parameters=initial.parameters, schedule=schedule)


def test_events_that_cannot_be_used_are_rejected_and_the_others_learned():
    good = [{**event, "at": 100.0 + row} for row, event in enumerate(readings(20, 9))]
    bad = [
        {"x": float("inf"), "y": 0.0, "at": 1.0},
        {"x": "7", "y": 0.0, "at": 1.0},
        {"at": 1.0},
        {"x": 1.0, "y": 0.0, "z": 1.0, "at": 1.0},
        {"x": 1.0, "y": 0.0, "at": "yesterday"},
        {"x": 1.0, "y": 0.0},
        "not a mapping",
        None,
    ]
    mixed = [("a", event) for pair in zip(good, bad) for event in pair] + [("a", event) for event in good[len(bad) :]]

    def check_rejected(rejected):
        assert len(rejected) == len(bad)
        assert Counter(repr(one.event) for one in rejected) == Counter(
            repr(event if isinstance(event, dict) else None) for event in bad
        )
        assert all(one.reason.startswith("key 'a': ") and one.n_events == 1 for one in rejected)

    def check_scored(scored):
        assert [one.event for one in scored] == good

    def check_snapshots(snapshots):
        ((_, _, learner),) = snapshots
        expected = OnlineEM(MODEL, schema=SCHEMA, schedule=HalfLife(5.0), batch_size=28, warm_up=10)
        expected.update([{"x": event["x"], "y": event["y"]} for event in good], time=[event["at"] for event in good])
        assert to_bytes(learner) == to_bytes(expected)

    pipeline = beam.Pipeline("FnApiRunner")
    roles = Roles(time="at")
    update = OnlineUpdate(MODEL, schema=SCHEMA, schedule=HalfLife(5.0), batch_size=28, warm_up=10, roles=roles)
    outputs = pipeline | beam.Create(mixed) | update
    check(outputs.rejected, check_rejected, "rejected")
    check(outputs.scored, check_scored, "scored")
    check(outputs.snapshots, check_snapshots, "snapshots")
    metrics = pipeline.run().metrics().query(beam.metrics.MetricsFilter().with_namespace("stream_em"))
    counters = {counter.key.metric.name: counter.committed for counter in metrics["counters"]}
    assert counters == {"events": 20, "rejected": 8}
    distributions = {one.key.metric.name: one.committed for one in metrics["distributions"]}
    assert distributions["snapshot_bytes"].min > 1_000
    assert distributions["log_likelihood"].count == 1


def test_an_event_without_any_time_is_rejected_where_time_matters():
    timed = TimestampedValue(("a", {"x": 0.0, "y": 1.0}), 5.0)

    def check_rejected(rejected):
        ((timestamp, one),) = rejected
        assert "time" in one.reason
        assert timestamp == pytest.approx(beam.utils.timestamp.MIN_TIMESTAMP.micros / 1e6)

    with beam.Pipeline("FnApiRunner") as pipeline:
        untimed = pipeline | "Untimed" >> beam.Create([("a", {"x": 1.0, "y": 0.0})])
        others = pipeline | "Timed" >> beam.Create([timed]) | beam.Map(lambda stamped: stamped)
        outputs = (untimed, others) | beam.Flatten() | OnlineUpdate(MODEL, schema=SCHEMA, schedule=HalfLife(60.0))
        check(outputs.rejected | beam.Map(with_timestamp), check_rejected, "rejected")
        check(outputs.scored, lambda scored: assert_equal(len(scored), 1), "scored")


def test_weights_and_other_columns_are_kept_from_the_model():
    events = [{**event, "w": row % 3, "id": str(row)} for row, event in enumerate(readings(90, 10))]
    expected = OnlineEM(MODEL, schema=SCHEMA, batch_size=90, warm_up=30)
    expected.update([{"x": event["x"], "y": event["y"]} for event in events], weight=[event["w"] for event in events])

    def check_snapshots(snapshots):
        assert [to_bytes(learner) for _, _, learner in snapshots] == [to_bytes(expected)]

    def check_scored(scored):
        # Of the warm-up's 30 events with weight, the last is number 44 (from 0).
        assert [one.event["id"] for one in scored if one.component is None] == [str(row) for row in range(45)]

    with beam.Pipeline("FnApiRunner") as pipeline:
        roles = Roles(weight="w", exclude=("id",))
        update = OnlineUpdate(MODEL, schema=SCHEMA, batch_size=90, warm_up=30, roles=roles)
        outputs = pipeline | beam.Create([("a", event) for event in events]) | update
        check(outputs.snapshots, check_snapshots, "snapshots")
        check(outputs.scored, check_scored, "scored")


def test_each_window_has_learners_of_its_own():
    events = readings(40, 11)
    stamped = [TimestampedValue((row % 2, event), float(row)) for row, event in enumerate(events)]

    def check_snapshots(snapshots):
        # Within their windows: the last moment of each.
        assert sorted((timestamp, key, time, learner.n_events) for timestamp, (key, time, learner) in snapshots) == [
            (9.999999, 0, 10.0, 5),
            (9.999999, 1, 10.0, 5),
            (19.999999, 0, 20.0, 5),
            (19.999999, 1, 20.0, 5),
            (29.999999, 0, 30.0, 5),
            (29.999999, 1, 30.0, 5),
            (39.999999, 0, 40.0, 5),
            (39.999999, 1, 40.0, 5),
        ]

    with beam.Pipeline("FnApiRunner") as pipeline:
        pairs = pipeline | beam.Create(stamped) | beam.Map(lambda one: one) | beam.WindowInto(FixedWindows(10))
        outputs = pairs | OnlineUpdate(MODEL, schema=SCHEMA, batch_size=4)
        check(outputs.snapshots | beam.Map(with_timestamp), check_snapshots)


def test_a_snapshot_goes_on_in_other_rooms(tmp_path):
    events = readings(300, 12)
    path = tmp_path / "model.arrow"
    expected, _ = known_answer(events, 100)

    def write(snapshots):
        ((_, _, learner),) = snapshots
        save(learner, path)

    with beam.Pipeline("FnApiRunner") as pipeline:
        outputs = (
            pipeline
            | beam.Create([("a", event) for event in events])
            | OnlineUpdate(MODEL, schema=SCHEMA, batch_size=100)
        )
        check(outputs.snapshots, write)
    assert to_bytes(load(path)) == to_bytes(expected)
    clusterer = MixtureClusterer.from_snapshot(path)
    assert [clusterer.predict_one(event) for event in events[:50]] == expected.predict(events[:50]).tolist()
    clusterer.learn_one(events[0])


def test_models_of_keys_that_start_from_one_fit_can_be_merged():
    initial = OnlineEM(MODEL, schedule=Harmonic(), schema=SCHEMA).update(readings(400, 13))
    pairs = [(row % 3, event) for row, event in enumerate(readings(300, 14))]

    def check_snapshots(snapshots):
        learners = {key: learner for key, _, learner in snapshots}
        merged = reduce(OnlineEM.merge, learners.values(), initial)
        assert merged.n_events == 700
        for key, learner in learners.items():
            fork = initial.fork()
            fork.batch_size, fork.first_m_step = 50, 200
            for start in (0, 50):
                fork.update([event for other, event in pairs if other == key][start : start + 50])
            assert learner.parameters.components.mean.tolist() == fork.parameters.components.mean.tolist()
            assert learner.statistics.weights.tolist() == fork.statistics.weights.tolist()

    with beam.Pipeline("FnApiRunner") as pipeline:
        outputs = pipeline | beam.Create(pairs) | OnlineUpdate(initial=initial, batch_size=50)
        check(outputs.snapshots, check_snapshots)
        check(
            outputs.scored,
            lambda scored: assert_equal((len(scored), any(one.component is None for one in scored)), (300, False)),
            "scored",
        )


def test_vocabularies_grow_by_key_unless_the_models_are_to_be_merged():
    schema = Schema({"c": "category"})
    model = Mixture(Product({"c": Categorical()}), 1)
    pairs = [("a", {"c": "red"}), ("b", {"c": "blue"})]
    initial = BatchEM(model, schema=schema).fit([{"c": "red"}, {"c": "green"}])

    def check_grown(snapshots):
        assert {key: learner.schema.fields[0].categories for key, _, learner in snapshots} == {
            "a": ("red",),
            "b": ("blue",),
        }

    def check_fixed(snapshots):
        assert {learner.schema.fields[0].categories for _, _, learner in snapshots} == {("red", "green")}

    for update, expectation in (
        (OnlineUpdate(model, schema=schema), check_grown),
        (OnlineUpdate(initial=initial), check_fixed),
    ):
        with beam.Pipeline("FnApiRunner") as pipeline:
            check((pipeline | beam.Create(pairs) | update).snapshots, expectation)


@pytest.mark.parametrize("kind", [BatchEM, OnlineEM])
def test_a_global_model_by_merge_fits_as_well_as_one_learner(kind):
    first, events, held_out = readings(400, 15), readings(4_000, 16), readings(2_000, 17)
    options = {"schedule": Harmonic()} if kind is OnlineEM else {}
    initial = kind(MODEL, schema=SCHEMA, **options)
    initial = initial.fit(first) if kind is BatchEM else initial.update(first)
    one = OnlineEM(MODEL, schedule=Harmonic(), schema=SCHEMA, batch_size=100, initial_parameters=initial.parameters)
    one.resume(initial.statistics, 400)
    one.update(events)
    margin = one.log_prob(held_out).mean()

    def check_snapshots(snapshots):
        key, _, merged = max(snapshots, key=lambda snapshot: snapshot[2].n_events)
        assert (key, merged.n_events) == (None, 4_400)
        assert merged.statistics.total_weight == pytest.approx(4_400)
        # Measured: better by 7e-5, of a mean of -3.54, from either start.
        assert abs(merged.log_prob(held_out).mean() - margin) < 3e-4

    with beam.Pipeline("FnApiRunner") as pipeline:
        outputs = pipeline | beam.Create(events) | GlobalUpdate(initial, shards=4, batch_size=100)
        check(outputs.snapshots, check_snapshots)
        check(outputs.scored, lambda scored: assert_equal(len(scored), 4_000), "scored")
        check(outputs.scored, lambda scored: assert_equal({one.key for one in scored}, {0, 1, 2, 3}), "shards")


def test_what_a_shard_cannot_use_is_told_of_the_shard():
    initial = BatchEM(MODEL, schema=SCHEMA).fit(readings(400, 15))
    with beam.Pipeline("FnApiRunner") as pipeline:
        outputs = pipeline | beam.Create([{"x": float("inf"), "y": 0.0}]) | GlobalUpdate(initial, shards=1)
        told = outputs.rejected | beam.Map(lambda one: one.reason.split(", expected")[0])
        assert_that(told, equal_to(["shard 0: field 'x': got inf"]))


def test_a_merge_of_shards_is_that_of_learners():
    events = readings(300, 18)
    # One of the dates is far ahead of all others.
    initial = OnlineEM(MODEL, schedule=HalfLife(100.0, max_ahead=1_000.0), schema=SCHEMA)
    initial.update(readings(400, 19), time=np.where(np.arange(400) == 350, 1e9, 0.0))
    shards = [initial.fork() for _ in range(3)]
    for number, shard in enumerate(shards):
        shard.batch_size, shard.first_m_step = 50, 200
        for start in (0, 50):
            rows = range(number, 300, 3)[start : start + 50]
            shard.update([events[row] for row in rows], time=[1.0 + row for row in rows])
    expected = reduce(OnlineEM.merge, shards, initial)

    def check_merged(snapshots):
        ((_, time, merged),) = snapshots
        assert (time, merged.n_events, expected.n_events) == (1_000.0, 700, 700)
        assert merged.n_ahead == expected.n_ahead == 1
        np.testing.assert_allclose(merged.statistics.weights, expected.statistics.weights, rtol=1e-12)
        np.testing.assert_allclose(merged.parameters.components.mean, expected.parameters.components.mean, rtol=1e-10)
        # It was forked from the same start, so it can be merged with others of it.
        assert merged.merge(initial.fork().update(events[:250], time=np.ones(250))).n_events == 950

    with beam.Pipeline("FnApiRunner") as pipeline:
        # One worker deals in order; from which shard on makes no difference to the merge.
        stamped = [TimestampedValue(event, 1.0 + row) for row, event in enumerate(events)]
        dealt = pipeline | beam.Create(stamped) | beam.Map(lambda one: one)
        check((dealt | GlobalUpdate(initial, shards=3, batch_size=50, merge_every=1_000.0)).snapshots, check_merged)


def test_shards_whose_components_differ_are_merged_by_id():
    initial = OnlineEM(MODEL, schedule=Harmonic(), schema=SCHEMA, structure=AdaptiveComponents())
    initial.update(readings(2_000, 20))
    # Each shard meets the new clusters for itself, and gives what it makes of them ids of its own.
    events = [one for pair in zip(readings(4_000, 21), readings(4_000, 22, shift=40.0)) for one in pair]

    def check_merged(snapshots):
        ((_, _, merged),) = snapshots
        ids = merged.parameters.component_ids.tolist()
        assert merged.n_events == 10_000
        assert {0, 1} < set(ids)
        assert len(set(ids)) == len(ids) == len(merged.statistics.weights)
        assert merged.parameters.weights.sum() == pytest.approx(1.0)
        assert merged.structure_changes.births + merged.structure_changes.splits >= len(ids) - 2

    with beam.Pipeline("FnApiRunner") as pipeline:
        outputs = pipeline | beam.Create(events) | GlobalUpdate(initial, shards=2, batch_size=100)
        check(outputs.snapshots, check_merged)


def test_shards_count_in_periods_without_events_of_theirs_and_may_be_alike():
    initial = BatchEM(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"})).fit([{"x": 0.0}, {"x": 2.0}])
    stream = (
        EventStream()
        .advance_watermark_to(0)
        # Two shards with the very same events.
        .add_elements([TimestampedValue({"x": 4.0}, 1)] * 2)
        .advance_watermark_to(15)
        # One of them only.
        .add_elements([TimestampedValue({"x": 8.0}, 16)])
        .advance_watermark_to(END)
        .advance_watermark_to_infinity()
    )

    def check_snapshots(snapshots):
        found = sorted((time, learner.n_events, learner.statistics.total_weight) for _, time, learner in snapshots)
        assert found == [(10.0, 4, 4.0), (20.0, 5, 5.0)]
        means = {time: learner.parameters.components.mean[0, 0] for _, time, learner in snapshots}
        assert means == pytest.approx({10.0: 2.5, 20.0: 3.6}, rel=1e-2)

    with streaming() as pipeline:
        update = GlobalUpdate(initial, shards=2, merge_every=10.0, batch_size=1, max_wait=None)
        check((pipeline | stream | update).snapshots, check_snapshots)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "a model is needed"),
        ({"model": MODEL}, "a schema is needed"),
        ({"model": MODEL, "schema": Schema({"x": "numeric"}, unknown="add")}, "keys that add different fields"),
        ({"model": MODEL, "schema": SCHEMA, "batch_size": 0}, "batch_size"),
        ({"model": MODEL, "schema": SCHEMA, "max_wait": 0.0}, "max_wait"),
        ({"model": MODEL, "schema": SCHEMA, "snapshot_every": float("nan")}, "snapshot_every"),
        ({"model": MODEL, "schema": SCHEMA, "warm_up": 0}, "warm_up"),
    ],
)
def test_wrong_arguments_are_refused_when_the_pipeline_is_built(wrong, said):
    with pytest.raises(ValueError, match=said):
        OnlineUpdate(**wrong)


def test_an_initial_learner_must_fit_and_have_components():
    initial = BatchEM(MODEL, schema=SCHEMA).fit(readings(50, 20))
    with pytest.raises(ValueError, match="the model differs"):
        OnlineUpdate(Mixture(Gaussian(), 3), initial=initial)
    with pytest.raises(ValueError, match="the schema differs"):
        OnlineUpdate(schema=Schema({"x": "numeric"}), initial=initial)
    with pytest.raises(ValueError, match="warm_up"):
        OnlineUpdate(initial=initial, warm_up=-1)
    with pytest.raises(NotFittedError):
        OnlineUpdate(initial=OnlineEM(MODEL, schema=SCHEMA))
    with pytest.raises(NotFittedError):
        GlobalUpdate(BatchEM(MODEL, schema=SCHEMA))
    with pytest.raises(ValueError, match="shards"):
        GlobalUpdate(initial, shards=0)


def test_what_has_no_key_that_can_be_found_again_is_rejected_and_counted_once() -> None:
    def check(rejected):
        assert sorted(one.reason.split(",")[0] for one in rejected) == ["got 5", "key: got None", *3 * ["key: got nan"]]

    update = OnlineUpdate(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}), warm_up=2)
    pairs = [("a", {"x": 1.0}), (None, {"x": 1.0}), *3 * [(float("nan"), {"x": 2.0})], 5, ("a", {"x": 2.0})]
    with beam.Pipeline("FnApiRunner") as pipeline:
        outputs = pipeline | beam.Create(pairs) | update
        assert_that(outputs.rejected, check)
        assert_that(outputs.scored | beam.Map(lambda one: one.key), equal_to(["a", "a"]), label="scored")
