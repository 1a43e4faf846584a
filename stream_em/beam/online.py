"""Online models of keyed events: one learner for each key in Beam's state, and a global one by periodic merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.coders import BooleanCoder, TupleCoder, VarIntCoder
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp

from stream_em.beam.coders import LearnerCoder
from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import NAMESPACE, REJECTED
from stream_em.blas import OneBlasThread
from stream_em.columns import Roles, floats_of, seconds_of
from stream_em.learners import BatchEM, OnlineEM
from stream_em.models import Mixture
from stream_em.numerics import check_whole
from stream_em.schedules import Harmonic, Schedule
from stream_em.schema import Batch, Schema
from stream_em.store import Learner, from_bytes, to_bytes

SNAPSHOTS = "snapshots"
"""Tag of the output of models as they were at some event time."""

_MICROS = 1_000_000


class ScoredEvent(NamedTuple):
    """An event and what its key's model said of it before it was learned.

    Parameters
    ----------
    key
        The event's key; under `GlobalUpdate` the number of the shard that learned it.
    event
        The event as it came.
    component
        Stable id of the most responsible component; None in the warm-up, when there is no mixture yet.
    log_prob
        Log-density; its negative is an anomaly score. None in the warm-up.

    """

    key: Any
    event: Any
    component: int | None
    log_prob: float | None


class OnlineOutputs(NamedTuple):
    """What comes out of `OnlineUpdate` and `GlobalUpdate`.

    Parameters
    ----------
    scored
        A `ScoredEvent` for each event that could be used, with the event's own timestamp.
    snapshots
        Triples (key, time, learner): a model as it was when event time reached `time`, in seconds.
    rejected
        A `RejectedEvent` for each event that could not be used, with the event's own timestamp.

    """

    scored: beam.PCollection
    snapshots: beam.PCollection
    rejected: beam.PCollection


class OnlineUpdate(beam.PTransform):
    """Online EM by key: (key, event) pairs in; scored events, snapshots of the models and rejected events out.

    Each key has an `OnlineEM` of its own, in Beam's state as the bytes of its snapshot. Events are gathered into
    batches by key; each batch is scored with what was known before it, then learned, with one E-step for both.

    Parameters
    ----------
    model
        The mixture; may be left out where `initial` is given.
    schema
        The fields, alike for all keys. It is required unless `initial` has one: what the first batch of a key happens
        to hold would make models of different fields.
    schedule
        How fast the past fades: by default that of `initial` if it is an `OnlineEM`, else `RobbinsMonro()`. `HalfLife`
        is in seconds of event time.
    batch_size
        Events of a key in a batch, which is a step of the schedule.
    max_wait
        Seconds (of the clock, not of event time) after which a batch is learned though it is not full; None to wait
        for it, or for the end of the window.
    warm_up
        Events of a key before its first components, or, with `initial`, before its first M-step; by default 20 for
        each component, at least 200.
    initial
        A learner with components, such as a batch fit. Each key starts with its components, and with no events of its
        own, as a fork does: the models of all keys can be merged. Without it each key warms up for itself.
    roles
        Columns that are not the model's. Without a time among them, an event's time is its timestamp in Beam.
    averaging
        Whether `parameters` of the models is the running average over the last updates.
    snapshot_every
        Seconds of event time between snapshots of a key; None for one at the end of the window only.
    seed
        Seed of each warm-up's random choices.

    Raises
    ------
    ValueError
        When a number is out of range, model or schema is missing or differs from that of `initial`, or the schema adds
        unknown fields, which would make the keys' models differ in their fields.
    NotFittedError
        When `initial` has no components yet.

    Notes
    -----
    **Snapshots.** An event-time timer emits a snapshot of each key that has learned since its last one, when the
    watermark passes a multiple of `snapshot_every`, and the last one at the end of the input. A snapshot has learned
    every batch that was complete by then: an event may wait for its batch for `max_wait`. Over bounded input engines
    move the watermark only when all of it is read: the first timer then finds everything learned, so leave
    `snapshot_every` out. A learner that is still in its warm-up is emitted too, and goes on warming up where it is
    loaded.

    **Late events** are learned like any other; under `HalfLife` with the weight that their time leaves them, so that
    the statistics do not depend on the order of events. An event waits for its batch, and has its own timestamp when
    it comes out: give a window further on an allowed lateness of `max_wait` or more.

    **Windows.** State is by key and window: in other windows than the global one each key starts anew in each window,
    and events later than the allowed lateness are left to the runner, which drops them. Merging windows (sessions)
    cannot hold state in Beam.

    **FnApiRunner** (Beam 2.77) loses timers where two stateful transforms read one collection: in a test with two
    updates of the same events, put `beam.Reshuffle()` before one of them.

    **Categories** outside the schema join a key's vocabulary as they come. With `initial` they are counted as `other`,
    since models whose vocabularies grew differently cannot be merged.

    **Cost.** For 5 components of 4 fields with full covariances the state of a key takes 5.8 kB. On one core a batch
    took 0.6 ms to encode it, 1.6 ms to decode and check it, and 0.3 ms to copy it (so that a bundle that fails leaves
    a state that the runner has cached as it was), against 1.1 ms to score and learn 100 events. Only the copy is for
    each batch: a key's state is decoded at its first batch in a bundle, unless the runner caches it, and encoded at
    the end of the bundle.

    Beam's metrics hold, under the namespace "stream_em", the counters `events` and `rejected` and the distributions
    `snapshot_bytes` and `log_likelihood`: that of each batch, per event, in thousandths.

    >>> from stream_em import Gaussian
    >>> from apache_beam.testing.util import assert_that
    >>> def check(snapshots):
    ...     assert sorted((key, learner.n_events) for key, time, learner in snapshots) == [("a", 2), ("b", 1)]
    >>> update = OnlineUpdate(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}), warm_up=2)
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     readings = pipeline | beam.Create([("a", {"x": 1.0}), ("b", {"x": 9.0}), ("a", {"x": 2.0})])
    ...     outputs = readings | update
    ...     _ = assert_that(outputs.snapshots, check)

    """

    _key_called: ClassVar[str] = "key"

    def __init__(
        self,
        model: Mixture | None = None,
        *,
        schema: Schema | None = None,
        schedule: Schedule | None = None,
        batch_size: int = 500,
        max_wait: float | None = 10.0,
        warm_up: int | None = None,
        initial: Learner | None = None,
        roles: Roles | None = None,
        averaging: bool = False,
        snapshot_every: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, seconds in (("max_wait", max_wait), ("snapshot_every", snapshot_every)):
            # Beam's times are whole microseconds.
            if seconds is not None and not 1e-6 <= seconds < 1e12:
                raise ValueError(f"{name} must be a number of seconds > 0, or None, got {seconds!r}")
        self.start = (
            _first(model, schema, schedule, batch_size, warm_up, averaging, seed)
            if initial is None
            else _fork(initial, model, schema, schedule, batch_size, warm_up, averaging)
        )
        self.extend = initial is None
        self.batch_size = batch_size
        self.max_wait = max_wait
        self.roles = Roles() if roles is None else roles
        self.snapshot_every = snapshot_every
        self._clock: Callable[[], float] = time.time

    def expand(self, keyed_events: beam.PCollection) -> OnlineOutputs:  # noqa: D102 - Beam's
        key = getattr(keyed_events.element_type, "tuple_types", (Any, Any))[0]
        stamped = keyed_events | "Stamp" >> beam.ParDo(_Stamp()).with_outputs(REJECTED, main="pairs")
        # Tagged outputs have no types, and Beam wants to know how to encode keys.
        typed = beam.Map(lambda pair: pair).with_output_types(tuple[key, Any])  # type: ignore[valid-type]
        outputs = (
            stamped.pairs
            | "Typed" >> typed
            | "Gather"
            >> beam.GroupIntoBatches(self.batch_size, self.max_wait, self._clock).with_output_types(
                tuple[key, list[Any]]  # type: ignore[valid-type]
            )
            | "Learn"
            >> beam.ParDo(
                _Learn(self.start, self.roles, self.snapshot_every, extend=self.extend, called=self._key_called)
            ).with_outputs(SNAPSHOTS, REJECTED, main="scored")
        )
        # Tagged outputs take no coder from a type, so learners leave the state as bytes.
        learners = beam.MapTuple(_decoded).with_output_types(tuple[Any, float, OnlineEM])
        rejected = (stamped[REJECTED], outputs[REJECTED]) | "All rejected" >> beam.Flatten()
        return OnlineOutputs(outputs.scored, outputs[SNAPSHOTS] | "Learners" >> learners, rejected)


def _first(
    model: Mixture | None,
    schema: Schema | None,
    schedule: Schedule | None,
    batch_size: int,
    warm_up: int | None,
    averaging: bool,
    seed: int,
) -> OnlineEM:
    if model is None:
        raise ValueError("a model is needed, or an initial learner that has one")
    if schema is None:
        raise ValueError("a schema is needed, or an initial learner that has one: all keys must have the same fields")
    _check_closed(schema)
    model.bind(schema)
    return OnlineEM(
        model,
        schedule=schedule,
        schema=schema,
        batch_size=batch_size,
        warm_up=warm_up,
        averaging=averaging,
        seed=seed,
    )


def _fork(
    initial: Learner,
    model: Mixture | None,
    schema: Schema | None,
    schedule: Schedule | None,
    batch_size: int,
    warm_up: int | None,
    averaging: bool,
) -> OnlineEM:
    """Return a learner with the components of `initial` and nothing learned."""
    if model is not None and model != initial.model:
        raise ValueError(f"the model differs from that of the initial learner: {model} and {initial.model}")
    if schema is not None and initial.schema is not None and schema.fields != initial.schema.fields:
        raise ValueError(f"the schema differs from that of the initial learner: {schema!r} and {initial.schema!r}")
    check_whole(batch_size=batch_size, warm_up=1 if warm_up is None else warm_up)
    if isinstance(initial, OnlineEM):
        fork = initial.fork()
    else:
        fork = OnlineEM(initial.model, schema=initial.schema, initial_parameters=initial.parameters)
        fork.origin = initial.origin
    assert fork.schema is not None
    _check_closed(fork.schema)
    if schedule is not None:
        fork.schedule = schedule
    fork.batch_size = batch_size
    fork.first_m_step = max(200, 20 * fork.model.n_components) if warm_up is None else warm_up
    fork.averaging = averaging
    return fork


def _check_closed(schema: Schema) -> None:
    if schema.unknown == "add":
        raise ValueError(
            'the schema says unknown="add", but keys that add different fields would have models that cannot be '
            'compared; name all fields, with unknown="refuse" or "ignore"'
        )


def _decoded(key: Any, seconds: float, content: bytes) -> tuple[Any, float, Learner]:
    return key, seconds, from_bytes(content)


class _Stamp(beam.DoFn):
    """Put the timestamp of each event beside it, where it outlives the gathering into batches.

    What is no (key, event) pair, or has a key that cannot be found again, goes to the output tagged `REJECTED`.
    """

    def __init__(self) -> None:
        self._rejected = Metrics.counter(NAMESPACE, "rejected")

    def process(self, element: Any, timestamp: Any = beam.DoFn.TimestampParam) -> Iterator[Any]:
        if not (isinstance(element, tuple) and len(element) == 2):
            yield self._reject(None, f"got {element!r:.120}, expected a (key, event) pair")
            return
        key, event = element
        if key is None or key != key:  # NaN is the one value that differs from itself
            yield self._reject(event, f"key: got {key!r}, expected a value that is equal to itself")
            return
        yield key, (event, timestamp.micros)

    def _reject(self, event: Any, reason: str) -> beam.pvalue.TaggedOutput:
        self._rejected.inc()
        return beam.pvalue.TaggedOutput(REJECTED, RejectedEvent(_as_mapping(event), reason))


class _Learn(beam.DoFn):
    """Score and learn the batches of a key, and emit its learner when it is due."""

    LEARNER = ReadModifyWriteStateSpec("learner", LearnerCoder())
    # Event time in microseconds at which a snapshot is due, or before which none is; and whether the timer is set.
    DUE = ReadModifyWriteStateSpec("due", TupleCoder((VarIntCoder(), BooleanCoder())))
    TIMER = TimerSpec("snapshot", TimeDomain.WATERMARK)

    def __init__(
        self, start: OnlineEM, roles: Roles, snapshot_every: float | None, *, extend: bool, called: str
    ) -> None:
        self._start_content = to_bytes(start)
        self.roles = roles
        self.every = None if snapshot_every is None else round(snapshot_every * _MICROS)
        self.extend = extend
        self.called = called
        self._events = Metrics.counter(NAMESPACE, "events")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")
        self._log_likelihood = Metrics.distribution(NAMESPACE, "log_likelihood")
        self._snapshot_bytes = Metrics.distribution(NAMESPACE, "snapshot_bytes")

    def setup(self) -> None:
        start = from_bytes(self._start_content)
        assert isinstance(start, OnlineEM)
        self._start = start

    def process(
        self,
        element: tuple[Any, Sequence[tuple[Any, int]]],
        window: Any = beam.DoFn.WindowParam,
        state: Any = beam.DoFn.StateParam(LEARNER),  # noqa: B008 - Beam's
        due: Any = beam.DoFn.StateParam(DUE),  # noqa: B008 - Beam's
        timer: Any = beam.DoFn.TimerParam(TIMER),  # noqa: B008 - Beam's
    ) -> Iterator[Any]:
        key, stamped = element
        learner = _working_copy(state.read() or self._start)
        events, stamps = [event for event, _ in stamped], [micros for _, micros in stamped]
        batch = self._encoded(learner, events, stamps)
        self._rejected.inc(len(batch.rejected))
        for error in batch.rejected:
            # Its position in a batch that Beam has gathered would tell nobody where it is.
            rejected = RejectedEvent(_as_mapping(events[error.index]), f"{self.called} {key!r}: {error.problem}")
            yield beam.pvalue.TaggedOutput(REJECTED, _at(stamps[error.index], rejected))
        if not batch.n_events:
            return
        n_warm = _n_warm(learner, batch)
        # Workers share the cores.
        with OneBlasThread():
            prediction = learner.predict_then_update(batch)
        state.write(learner)
        self._set_timer(due, timer, min(stamps), window)
        self._events.inc(batch.n_events)
        if n_warm < batch.n_events:
            self._log_likelihood.update(round(1_000 * float(prediction.log_prob[n_warm:].mean())))
        positions = range(batch.n_events) if batch.accepted is None else batch.accepted.tolist()
        for row, (position, component, log_prob) in enumerate(
            zip(positions, prediction.component.tolist(), prediction.log_prob.tolist())
        ):
            told = (None, None) if row < n_warm else (component, log_prob)
            yield _at(stamps[position], ScoredEvent(key, events[position], *told))

    @on_timer(TIMER)  # type: ignore[untyped-decorator]
    def snapshot(
        self,
        key: Any = beam.DoFn.KeyParam,
        window: Any = beam.DoFn.WindowParam,
        state: Any = beam.DoFn.StateParam(LEARNER),  # noqa: B008 - Beam's
        due: Any = beam.DoFn.StateParam(DUE),  # noqa: B008 - Beam's
    ) -> Iterator[Any]:
        learner = state.read()
        micros, _ = due.read()
        due.write((micros if self.every is None else micros + self.every, False))
        content = to_bytes(learner)
        self._snapshot_bytes.update(len(content))
        # The end of a window is the first moment after it.
        inside = min(micros, window.max_timestamp().micros)
        yield beam.pvalue.TaggedOutput(SNAPSHOTS, _at(inside, (key, micros / _MICROS, content)))

    def _set_timer(self, due: Any, timer: Any, earliest: int, window: Any) -> None:
        """Have a snapshot made at the first multiple of the period after an event that is not before the last."""
        known = due.read()
        if known is not None and known[1]:
            return
        micros = window.end.micros
        if self.every is not None:
            following = (earliest // self.every + 1) * self.every
            micros = min(micros, following if known is None else max(following, known[0]))
        timer.set(Timestamp(micros=micros))
        due.write((micros, True))

    def _encoded(self, learner: OnlineEM, events: Sequence[Any], stamps: Sequence[int]) -> Batch:
        roles = self.roles
        fields = [
            {name: event[name] for name in roles.model_fields(event)} if isinstance(event, Mapping) else event
            for event in events
        ]
        weight = None if roles.weight is None else floats_of([_value(event, roles.weight) for event in events])
        times = None
        if roles.time is not None:
            times = seconds_of([_value(event, roles.time) for event in events])
        elif learner.schedule.half_life is not None:
            # An event that was never given a timestamp has Beam's least one.
            told = (np.nan if micros <= MIN_TIMESTAMP.micros else micros / _MICROS for micros in stamps)
            times = np.fromiter(told, np.float64, len(stamps))
        return learner.encode(fields, weight, times, on_error="collect", extend=self.extend)


def _working_copy(learner: OnlineEM) -> OnlineEM:
    # What was read may be the runner's own copy, which must stay as it is if the bundle fails.
    copy = deepcopy(learner)
    # Compiled code holds the state in a form of its own: bringing it there for one batch takes longer than the batch.
    copy._compiles = False
    return copy


def _value(event: Any, name: str) -> Any:
    return event.get(name) if isinstance(event, Mapping) else None


def _as_mapping(event: Any) -> Mapping[str, Any] | None:
    return event if isinstance(event, Mapping) else None


def _at(micros: int, value: Any) -> TimestampedValue:
    return TimestampedValue(value, Timestamp(micros=micros))


def _n_warm(learner: OnlineEM, batch: Batch) -> int:
    """Events at the start of a batch, about to be learned, that belong to the warm-up."""
    if not learner.warming_up:
        return 0
    # An event without weight is scored, but it brings the end of the warm-up no nearer.
    told = np.ones(batch.n_events, bool) if batch.weight is None else batch.weight > 0.0
    n_told_before = sum(one.n_events for one in learner._buffer) + np.cumsum(told) - told
    return int(np.count_nonzero(n_told_before < learner.warm_up))


class _ShardUpdate(OnlineUpdate):
    _key_called = "shard"


class GlobalUpdate(beam.PTransform):
    """One online model of all events, learned by several shards and merged once in a period of event time.

    Events are dealt to shards, each a fork of one learner. When event time reaches the end of a period, the shards'
    statistics are merged, and one model comes out: no key has all the events, and what is merged is a few kilobytes
    for each shard and period.

    Parameters
    ----------
    initial
        A learner with components, such as a batch fit of some first events. What it has learned counts in the merged
        model as well, unless `schedule` has another half-life than it.
    shards
        Number of learners that share the events.
    merge_every
        Seconds of event time between merged models; None for one at the end of the window only.
    schedule
        How fast the past fades: by default that of `initial` if it is an `OnlineEM`, else `Harmonic()`. `Harmonic` and
        `HalfLife` merge to what one learner would have; the others forget by the count of events that one shard has
        learned, so `shards` times as slowly.
    batch_size, max_wait, warm_up, roles, averaging
        As in `OnlineUpdate`, for each shard.

    Raises
    ------
    ValueError
        When a number is out of range, or the schema of `initial` adds unknown fields.
    NotFittedError
        When `initial` has no components yet.

    Notes
    -----
    The outputs are those of `OnlineUpdate`; in `snapshots` the key is None, and in `scored` it is the shard.

    Beam pipelines have no loops, so the merged model never comes back to the shards: each takes its E-steps at what it
    has learned itself. What this costs: events are scored by one shard's model, which has learned 1 / `shards` of the
    events; shards that start far from the optimum come nearer to it only after `shards` times as many events; and
    from a start between two optima shards may go to different ones, whose merge is neither. So start from a fit, and
    take few shards: as many as the rate of events needs. Restart the pipeline from a merged snapshot to give the
    shards what all of them have learned.

    Shards that had no event in a period count with what they had learned before it. In windows other than the global
    one, shards start anew in each.

    >>> from stream_em import Gaussian
    >>> from apache_beam.testing.util import assert_that
    >>> initial = BatchEM(Mixture(Gaussian(), 1)).fit([{"x": 0.0}, {"x": 2.0}])
    >>> def check(snapshots):
    ...     key, time, learner = max(snapshots, key=lambda snapshot: snapshot[1])
    ...     assert learner.n_events == 2 + 4 and learner.parameters.components.mean[0, 0].round(2) == 2.0
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     events = pipeline | beam.Create([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}, {"x": 4.0}])
    ...     _ = assert_that((events | GlobalUpdate(initial, shards=2)).snapshots, check)

    """

    def __init__(
        self,
        initial: Learner,
        *,
        shards: int = 4,
        merge_every: float | None = 60.0,
        schedule: Schedule | None = None,
        batch_size: int = 500,
        max_wait: float | None = 10.0,
        warm_up: int | None = None,
        roles: Roles | None = None,
        averaging: bool = False,
    ) -> None:
        super().__init__()
        check_whole(shards=shards)
        self.initial = initial
        self.shards = shards
        self.update = _ShardUpdate(
            initial=initial,
            schedule=Harmonic() if schedule is None and isinstance(initial, BatchEM) else schedule,
            batch_size=batch_size,
            max_wait=max_wait,
            warm_up=warm_up,
            roles=roles,
            averaging=averaging,
            snapshot_every=merge_every,
        )

    def expand(self, events: beam.PCollection) -> OnlineOutputs:  # noqa: D102 - Beam's
        outputs = (
            events
            | "Deal" >> beam.ParDo(_Deal(self.shards)).with_output_types(tuple[int, Any])
            | "Shards" >> self.update
        )
        together = beam.Map(_together).with_output_types(tuple[int, tuple[int, float, OnlineEM]])
        merged = (
            outputs.snapshots
            | "Together" >> together
            | "Merge" >> beam.ParDo(_MergeShards(self.update.start, _own(self.initial, self.update.start)))
            | "Learners" >> beam.MapTuple(_decoded).with_output_types(tuple[Any, float, OnlineEM])
        )
        return OnlineOutputs(outputs.scored, merged, outputs.rejected)


def _together(snapshot: tuple[int, float, OnlineEM]) -> tuple[int, tuple[int, float, OnlineEM]]:
    return 0, snapshot


def _own(initial: Learner, start: OnlineEM) -> Learner | None:
    """Return the initial learner if what it has learned can be merged with what its forks learn."""
    statistics = initial.statistics
    return None if statistics is None or statistics.half_life != start.schedule.half_life else initial


class _Deal(beam.DoFn):
    """Deal events out to shards in turn, from a shard of its own for each worker."""

    def __init__(self, shards: int) -> None:
        self.shards = shards

    def setup(self) -> None:
        self._shard = int(np.random.default_rng().integers(self.shards))

    def process(self, event: Any) -> Iterator[tuple[int, Any]]:
        self._shard = (self._shard + 1) % self.shards
        yield self._shard, event


class _MergeShards(beam.DoFn):
    """Keep the latest snapshots of the shards, and merge them when event time reaches one of them.

    A combiner by windows of a period would lose the shards that learned nothing in it.
    """

    LATEST = BagStateSpec("latest", TupleCoder((VarIntCoder(), VarIntCoder(), LearnerCoder())))
    TIMER = TimerSpec("merge", TimeDomain.WATERMARK)

    def __init__(self, start: OnlineEM, initial: Learner | None) -> None:
        self._start_content = to_bytes(start)
        self._initial_content = None if initial is None else to_bytes(initial)

    def setup(self) -> None:
        start = from_bytes(self._start_content)
        assert isinstance(start, OnlineEM)
        self._start = start
        self._initial = None if self._initial_content is None else from_bytes(self._initial_content)

    def process(
        self,
        element: tuple[int, tuple[int, float, OnlineEM]],
        window: Any = beam.DoFn.WindowParam,
        latest: Any = beam.DoFn.StateParam(LATEST),  # noqa: B008 - Beam's
        timer: Any = beam.DoFn.TimerParam(TIMER),  # noqa: B008 - Beam's
    ) -> None:
        shard, seconds, learner = element[1]
        micros = round(seconds * _MICROS)
        latest.add((shard, micros, learner))
        timer.set(Timestamp(micros=min(micros, window.end.micros)), dynamic_timer_tag=str(micros))

    @on_timer(TIMER)  # type: ignore[untyped-decorator]
    def merge(
        self,
        tag: str = beam.DoFn.DynamicTimerTagParam,
        window: Any = beam.DoFn.WindowParam,
        latest: Any = beam.DoFn.StateParam(LATEST),  # noqa: B008 - Beam's
    ) -> Iterator[Any]:
        micros = int(tag)
        newest: dict[int, tuple[int, int, OnlineEM]] = {}
        later = []
        for one in latest.read():
            known = newest.get(one[0])
            if one[1] > micros:
                later.append(one)
            elif known is None or _age(one) > _age(known):
                newest[one[0]] = one
        latest.clear()
        for one in (*newest.values(), *later):
            latest.add(one)
        learners = [newest[shard][2] for shard in sorted(newest)]
        content = to_bytes(_merged(self._start, self._initial, learners))
        yield _at(min(micros, window.max_timestamp().micros), (None, micros / _MICROS, content))


def _age(snapshot: tuple[int, int, OnlineEM]) -> tuple[int, int]:
    return snapshot[1], snapshot[2].n_events


def _merged(start: OnlineEM, initial: Learner | None, learners: Iterable[OnlineEM]) -> OnlineEM:
    """Return what the forks, and the learner that they were forked from, have learned.

    `OnlineEM.merge` takes two equal states for one state merged twice; those of two shards may well be equal.
    """
    told: list[Learner] = [*([] if initial is None else [initial]), *learners]
    statistics = start._merge_all(one.statistics for one in told if one.statistics is not None)
    n_events = sum(one.n_events for one in told)
    parameters = start.parameters
    if initial is not None or n_events >= start.first_m_step:
        assert start.schema is not None
        parameters = start._m_step(start.model.bind(start.schema), statistics)
    merged = OnlineEM(
        start.model,
        schema=start.schema,
        initial_parameters=parameters,
        **{name: getattr(start, name) for name in OnlineEM.OPTIONS},
    )
    merged.origin = start.origin
    for one in told:
        merged._count_with(one)
    return merged.resume(statistics, n_events)
