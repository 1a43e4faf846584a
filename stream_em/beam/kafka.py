"""Events of Kafka topics, read in Python alone: no Java expansion service."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.iobase import WatermarkEstimator
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.metrics import Metrics
from apache_beam.transforms.core import RestrictionProvider, WatermarkEstimatorProvider
from apache_beam.transforms.window import GlobalWindow, TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Duration, Timestamp

from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import NAMESPACE, REJECTED
from stream_em.columns import seconds_of
from stream_em.kafka import (
    FOREVER,
    KafkaMessage,
    Offsets,
    PartitionRange,
    check_config,
    client_library,
    decode_json,
    find_partitions,
    is_end,
    open_consumer,
    poll,
    read_message,
)

# A reader pauses after so many messages or seconds, so that its progress is checkpointed and its bundle ends.
_PAUSE_MESSAGES = 10_000
_PAUSE_SECONDS = 1.0
# Seconds to wait for a message: at first, when a connection may have to be made, and then.
_FIRST_WAIT = 10.0
_WAIT = 0.1
# Seconds until a partition that has been read to its end is looked at again.
_PAUSE_AT_END = 0.2
# The times that Beam's windows know, in seconds.
_EARLIEST = MIN_TIMESTAMP.micros / 1_000_000
_LATEST = GlobalWindow().max_timestamp().micros / 1_000_000


class ReadKafka(beam.PTransform):
    """Read the events of Kafka topics.

    Each partition is read in the order of its offsets, by a splittable `DoFn` whose restriction is a range of offsets:
    the runner's checkpoints hold how far it came, and no offset is committed to Kafka.

    Parameters
    ----------
    config
        Settings of librdkafka: `bootstrap.servers`, security, `isolation.level` and so on.
    topics
        A topic, or several. Their partitions are looked up when the pipeline starts; those that are added later are
        not read.
    start
        "earliest" or "latest", or the offset to begin with for each (topic, partition). A partition that is not
        named there is read from its earliest offset.
    stop
        None to go on for ever; "latest" to stop at the offsets that are last when the pipeline starts; or the offset to
        stop before for each (topic, partition), to wait for where it has not come yet. A partition that is not named
        there is read to its latest offset.
    decode
        What makes an event, a dict, of a `KafkaMessage`. By default its value is read as JSON.
    time
        Event time of an event: the name of a field, or a function of the event, that is a number of seconds since 1970,
        a `datetime` or ISO 8601 text. By default the timestamp of the message.
    max_out_of_orderness
        Seconds by which an event may come after younger ones of its partition without being late: the watermark is that
        much behind the latest event time.
    idle_timeout
        Seconds after which a partition that brings no events no longer holds the others up: its watermark then
        follows the clock, `max_out_of_orderness` behind. For event times that follow the clock too. By default, it
        waits.

    Returns
    -------
    DoOutputsTuple
        `events`: dicts, with their event time as timestamp.

        `rejected` (`REJECTED`): a `RejectedEvent` for each message that is no event or has no event time. Its `event`
        has the message's topic, partition, offset, key and value.

    Raises
    ------
    ValueError
        If `config` lacks the servers or sets what this transform decides; if offsets are neither numbers nor one of the
        words, or are of another topic. When the pipeline runs: if a topic or a partition does not exist, or an offset
        is not held by Kafka (any more), because reading elsewhere would lose events or repeat them.
    ConnectionError
        When the pipeline runs, if no broker answers.
    ModuleNotFoundError
        Without confluent-kafka.

    Notes
    -----
    Beam's metrics hold, under `NAMESPACE`, the counters `messages` and `rejected`.

    An event time far in the future carries the watermark with it, and events after it are late then. Where the field
    is not to be trusted, let `time` be a function that returns None for what cannot be: it is rejected.

    To go on after a pipeline that left no checkpoint, let `decode` put the offset into the event, and begin with the
    one after the last that was stored.

    >>> from confluent_kafka import Producer
    >>> from apache_beam.testing.util import assert_that, equal_to
    >>> producer = Producer({"test.mock.num.brokers": 1, "log_level": 0})  # a cluster within this process
    >>> for text in ('{"x": 1.5}', "no JSON", '{"x": 2.5}'):
    ...     producer.produce("readings", text, partition=0)
    >>> producer.flush()
    0
    >>> (broker,) = producer.list_topics().brokers.values()
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     config = {"bootstrap.servers": f"{broker.host}:{broker.port}"}
    ...     events, rejected = pipeline | ReadKafka(config, "readings", stop="latest")
    ...     _ = assert_that(events, equal_to([{"x": 1.5}, {"x": 2.5}]))
    ...     _ = assert_that(rejected | beam.Map(lambda bad: bad.event["offset"]), equal_to([1]), label="Rejected")

    """

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: str | Sequence[str],
        *,
        start: Offsets = "earliest",
        stop: Offsets | None = None,
        decode: Callable[[KafkaMessage], Any] = decode_json,
        time: str | Callable[[Mapping[str, Any]], Any] | None = None,
        max_out_of_orderness: float = 0.0,
        idle_timeout: float | None = None,
    ) -> None:
        super().__init__()
        client_library()
        check_config(config)
        for name, seconds in (("max_out_of_orderness", max_out_of_orderness), ("idle_timeout", idle_timeout)):
            if seconds is not None and not 0.0 <= seconds < math.inf:
                raise ValueError(f"{name} must be a number of seconds from 0 up, got {seconds!r}")
        self.topics = [topics] if isinstance(topics, str) else list(topics)
        if not self.topics:
            raise ValueError("topics is empty")
        _check_offsets("start", start, ("earliest", "latest"), self.topics)
        if stop is not None:
            _check_offsets("stop", stop, ("latest",), self.topics)
        self.config = dict(config)
        self.start = start
        self.stop = stop
        self.decode = decode
        self.time = time
        self.max_out_of_orderness = max_out_of_orderness
        self.idle_timeout = idle_timeout

    def expand(self, root: Any) -> beam.pvalue.DoOutputsTuple:  # noqa: D102 - Beam's
        read = _ReadPartition if self.stop is not None else _FollowPartition
        reader = read(self.config, self.decode, self.time, self.max_out_of_orderness, self.idle_timeout)
        return (
            root.pipeline
            | "Topics" >> beam.Create(list(dict.fromkeys(self.topics)))
            | "Partitions" >> beam.ParDo(_FindPartitions(self.config, self.start, self.stop))
            # What "latest" was when the pipeline started is kept, whatever has to be done again after it.
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(reader).with_outputs(REJECTED, main="events")
        )


def _check_offsets(name: str, offsets: Offsets, words: tuple[str, ...], topics: Sequence[str]) -> None:
    if isinstance(offsets, str):
        if offsets not in words:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, words))}, or a dict of offsets by (topic, partition), "
                f"got {offsets!r}"
            )
        return
    for (topic, partition), offset in offsets.items():
        if topic not in topics:
            raise ValueError(f"{name} has an offset for topic {topic!r}, but topics are {', '.join(map(repr, topics))}")
        if not isinstance(offset, int) or offset < 0:
            raise ValueError(f"{name} of {topic}[{partition}] must be a whole number from 0 up, got {offset!r}")


class _FindPartitions(beam.DoFn):
    """Topics in, their partitions out."""

    def __init__(self, config: Mapping[str, Any], start: Offsets, stop: Offsets | None) -> None:
        self.config = config
        self.start = start
        self.stop = stop

    def process(self, topic: str) -> Iterator[PartitionRange]:
        ranges = find_partitions(self.config, topic, self.start, self.stop)
        yield from (one for one in ranges if one.start < one.stop)


class _EndlessTracker(OffsetRestrictionTracker):
    """Offsets without an end: there is no part of what is left that another worker could begin with."""

    def try_split(self, fraction_of_remainder: float) -> Any:
        return super().try_split(0) if fraction_of_remainder == 0 else None

    def is_bounded(self) -> bool:
        return False


class _EventTimeWatermark(WatermarkEstimator):
    """Some seconds behind the latest event time, or behind the clock once the partition is idle.

    The state is the watermark, in microseconds, and when the last message came, in seconds.
    """

    def __init__(self, state: tuple[int, float], behind: float) -> None:
        micros, self._last_message = state
        self._watermark = Timestamp(micros=micros)
        self._behind = Duration(behind)

    def observe_timestamp(self, timestamp: Timestamp) -> None:
        # Rejected messages have timestamps too, and theirs are not event times.
        pass

    def current_watermark(self) -> Timestamp:
        return self._watermark

    def get_estimator_state(self) -> tuple[int, float]:
        return self._watermark.micros, self._last_message

    def advance(self, event_time: Timestamp) -> None:
        """Go on to what an event time allows."""
        self._watermark = max(self._watermark, event_time - self._behind)

    def came(self) -> None:
        """Messages have come."""
        self._last_message = clock.time()

    def none_came(self, idle_timeout: float) -> None:
        """No message has come; after the timeout the clock counts as the latest event time."""
        now = clock.time()
        if now - self._last_message >= idle_timeout:
            self.advance(Timestamp.of(now))


class _ReadPartition(beam.DoFn, RestrictionProvider, WatermarkEstimatorProvider):
    """Read a range of offsets of a partition."""

    def __init__(
        self,
        config: Mapping[str, Any],
        decode: Callable[[KafkaMessage], Any],
        time: str | Callable[[Mapping[str, Any]], Any] | None,
        max_out_of_orderness: float,
        idle_timeout: float | None,
    ) -> None:
        self.config = config
        self.decode = decode
        self.time = time
        self.max_out_of_orderness = max_out_of_orderness
        self.idle_timeout = idle_timeout
        self._messages = Metrics.counter(NAMESPACE, "messages")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")

    def initial_restriction(self, element: PartitionRange) -> OffsetRange:
        return OffsetRange(element.start, element.stop)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        kind = _EndlessTracker if restriction.stop == FOREVER else OffsetRestrictionTracker
        return kind(restriction)

    def restriction_size(self, element: PartitionRange, restriction: OffsetRange) -> int:
        # How many messages an endless range has to offer is not known; it is read by one worker anyway.
        size: int = restriction.size()
        return 1 if restriction.stop == FOREVER else size

    def initial_estimator_state(self, element: PartitionRange, restriction: OffsetRange) -> tuple[int, float]:
        return MIN_TIMESTAMP.micros, clock.time()

    def create_watermark_estimator(self, state: tuple[int, float]) -> _EventTimeWatermark:
        return _EventTimeWatermark(state, self.max_out_of_orderness)

    def setup(self) -> None:
        self._kafka = client_library()
        self._consumer = open_consumer(self.config)
        # Where the client is: topic, partition and the offset that it would give next.
        self._place: tuple[str, int, int] | None = None

    def teardown(self) -> None:
        self._consumer.close()

    def process(
        self,
        element: PartitionRange,
        tracker: Any = beam.DoFn.RestrictionParam(),  # noqa: B008 - Beam's way to declare it
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(),  # noqa: B008
    ) -> Iterator[Any]:
        offset = tracker.current_restriction().start
        wait = self._go_to(element, offset)
        until = clock.monotonic() + _PAUSE_SECONDS
        n_messages = 0
        while offset < tracker.current_restriction().stop:
            messages = poll(self._consumer, wait)
            at_end = not messages
            done, n_new, latest = False, 0, MIN_TIMESTAMP.micros
            for message in messages:
                if message.error() is not None:
                    at_end = is_end(message)
                    # Where transactions end there are offsets without a message, and they may be the last.
                    done = at_end and message.offset() >= tracker.current_restriction().stop
                    if done:
                        tracker.try_claim(message.offset())
                        break
                    continue
                if not tracker.try_claim(message.offset()):
                    done = True
                    break
                offset, at_end = message.offset() + 1, False
                n_new += 1
                output = self._read(message, watermark)
                if isinstance(output, TimestampedValue):
                    latest = max(latest, output.timestamp.micros)
                yield output
            self._messages.inc(n_new)
            if n_new:
                watermark.came()
                watermark.advance(Timestamp(micros=latest))
            elif self.idle_timeout is not None:
                watermark.none_came(self.idle_timeout)
            if done:
                return
            self._place = (element.topic, element.partition, offset)
            wait = _WAIT
            n_messages += n_new
            if at_end:
                tracker.defer_remainder(Duration(_PAUSE_AT_END))
                return
            if n_messages >= _PAUSE_MESSAGES or clock.monotonic() >= until:
                tracker.defer_remainder()
                return

    def _go_to(self, element: PartitionRange, offset: int) -> float:
        """Let the client read from an offset on; return how long to wait for the first message."""
        place = (element.topic, element.partition, offset)
        if self._place == place:
            wait = _WAIT
        else:
            self._consumer.assign([self._kafka.TopicPartition(*place)])
            wait = _FIRST_WAIT
        # Until a whole batch has been dealt with the client is somewhere behind it.
        self._place = None
        return wait

    def _read(self, message: Any, watermark: Any) -> Any:
        read = read_message(message)
        try:
            event = self.decode(read)
            if not isinstance(event, Mapping):
                raise ValueError(f"expected an event with named fields, got {type(event).__name__}")
            event_time = self._event_time(event, read)
        except Exception as error:  # whatever it is, it is the message's and must not stop the others
            return self._reject(read, error, watermark.current_watermark())
        return TimestampedValue(event, event_time)

    def _event_time(self, event: Mapping[str, Any], message: KafkaMessage) -> Timestamp:
        value: Any
        if self.time is None:
            what, value = "the message's timestamp", message.timestamp
        elif isinstance(self.time, str):
            what, value = f"field {self.time!r}", event.get(self.time)
        else:
            what, value = "the function time", self.time(event)
        # The common case by itself: arrays of one take their time.
        number = type(value) is float or type(value) is int
        timestamp = _timestamp(float(value) if number else float(seconds_of([value])[0]))
        if timestamp is None:
            raise ValueError(
                f"no event time: {what} is {value!r}, expected seconds since 1970, a datetime or ISO 8601 text"
            )
        return timestamp

    def _reject(self, message: KafkaMessage, error: Exception, watermark: Timestamp) -> beam.pvalue.TaggedOutput:
        self._rejected.inc()
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        fields = ("topic", "partition", "offset", "key", "value")
        rejected = RejectedEvent({name: getattr(message, name) for name in fields}, f"{message}: {problem}")
        # Not before the watermark, or a windowed dead-letter output would drop it for being late.
        made = None if message.timestamp is None else _timestamp(message.timestamp)
        timestamp = watermark if made is None else max(watermark, made)
        return beam.pvalue.TaggedOutput(REJECTED, TimestampedValue(rejected, timestamp))


class _FollowPartition(_ReadPartition):
    """Read a partition for ever."""

    @beam.DoFn.unbounded_per_element()  # type: ignore[untyped-decorator]
    def process(
        self,
        element: PartitionRange,
        tracker: Any = beam.DoFn.RestrictionParam(),  # noqa: B008
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(),  # noqa: B008
    ) -> Iterator[Any]:
        return super().process(element, tracker, watermark)


def _timestamp(seconds: float) -> Timestamp | None:
    """Return a time in Beam's form, or None where there it has none."""
    if not _EARLIEST <= seconds <= _LATEST:
        return None
    return Timestamp(micros=round(seconds * 1_000_000))
