"""Kafka topics, in Python alone: which offsets there are, messages in a defined order, scored events out.

A client is confluent-kafka's (the extra `kafka`), imported when one is made. No consumer group decides who reads what
and no offset is committed to Kafka: partitions are assigned by hand, and whoever reads keeps the offsets together with
what it made of the messages, so that both are of one moment.
"""

from __future__ import annotations

import json
import logging
import sys
import time as clock
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from stream_em.columns import Roles
from stream_em.sources import Piece, Position, Rejection, SourceError, grouped, parse_event

Offsets: TypeAlias = "str | Mapping[tuple[str, int], int]"

# The offset before which a partition without an end ends.
FOREVER = sys.maxsize
# Messages taken from a client at once.
BATCH = 500
METADATA_TIMEOUT = 30.0

# Settings that would let a client choose where to read, or not tell where a partition ends.
_OWN_SETTINGS = ("auto.offset.reset", "enable.auto.commit", "enable.auto.offset.store", "enable.partition.eof")
# Messages of all partitions together in a round of `replay`.
_ROUND = 1_000
# Messages that `replay` keeps waiting at most, of all partitions together, because they came before their turn.
_AHEAD = 50_000
# Longest wait for a message, seconds: a signal is heeded no later, and an idle stream tells that it is idle.
_WAIT = 0.5
# Seconds after which a topic that is followed is asked for new partitions.
_LOOK_FOR_PARTITIONS = 30.0
# Seconds until a partition without a leader is asked for again.
_WITHOUT_LEADER = 0.1
# Seconds to wait for the answer, while events wait.
_PATIENCE = 2.0

_log = logging.getLogger(__name__)


class KafkaMessage(NamedTuple):
    """A message of a Kafka topic.

    Parameters
    ----------
    topic
        Its topic.
    partition, offset
        Its place there.
    key, value
        Its bytes, or None.
    timestamp
        Seconds since 1970 at which it was made, or appended, as the topic is configured; None where it has none.
    headers
        Pairs of name and bytes.

    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: float | None
    headers: tuple[tuple[str, bytes | None], ...]

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}] at offset {self.offset}"


class PartitionRange(NamedTuple):
    """A partition, and the offsets to be read of it: from `start` up to but not including `stop`."""

    topic: str
    partition: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


def decode_json(message: KafkaMessage) -> Any:
    """Return the value of a message that holds JSON.

    Raises
    ------
    ValueError
        When there is no value, or it is no JSON.

    """
    if message.value is None:
        raise ValueError("expected a JSON object, but the message has no value")
    try:
        return json.loads(message.value)
    except ValueError as error:
        raise ValueError(f"expected a JSON object, but it does not parse: {error}") from error


def client_library() -> Any:
    """Return the module confluent_kafka, or say what it needs."""
    try:
        import confluent_kafka
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Kafka needs confluent-kafka: pip install 'stream-em[kafka]'") from error
    return confluent_kafka


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless settings of librdkafka leave to the reader what is the reader's."""
    if "bootstrap.servers" not in config:
        raise ValueError("config needs 'bootstrap.servers': the addresses of some brokers, host:port")
    for name in _OWN_SETTINGS:
        if name in config:
            raise ValueError(f"config must not set {name!r}: say where to read with start and stop")


def open_consumer(config: Mapping[str, Any]) -> Any:
    """Return a consumer without partitions; it tells where a partition ends and never chooses an offset itself."""
    defaults = {
        # A group has to have a name, though nothing is committed to it.
        "group.id": "stream-em",
        # How soon the broker says that there is nothing more, milliseconds.
        "fetch.wait.max.ms": 100,
        # Fetched ahead of each partition. librdkafka's own are five times as many, and when they are there a pause of a
        # second, in which they run out.
        "queued.min.messages": 20_000,
        "fetch.queue.backoff.ms": 20,
    }
    own = {"enable.auto.commit": False, "enable.partition.eof": True, "auto.offset.reset": "error"}
    return client_library().Consumer({**defaults, **config, **own}, logger=_log)


def find_partitions(
    config: Mapping[str, Any], topic: str, start: Offsets, stop: Offsets | None
) -> list[PartitionRange]:
    """Return the partitions of a topic, with the offsets to read of each, in the order of their numbers.

    Parameters
    ----------
    config
        Settings of librdkafka.
    topic
        Its name.
    start
        "earliest" or "latest", or the offset to begin with for each (topic, partition); a partition not named there
        begins with its earliest.
    stop
        None for no end, "latest", or the offset to stop before for each (topic, partition); a partition not named there
        ends at its latest.

    Raises
    ------
    ValueError
        When the topic or a partition does not exist, or Kafka does not hold an offset.
    ConnectionError
        When no broker answers.

    """
    kafka = client_library()
    consumer = open_consumer(config)
    try:
        found = partition_numbers(consumer, topic, METADATA_TIMEOUT)
        for name, offsets in (("start", start), ("stop", stop)):
            named = [] if offsets is None or isinstance(offsets, str) else list(offsets)
            for other, partition in named:
                if other == topic and partition not in found:
                    raise ValueError(
                        f"{name} has an offset for {topic}[{partition}], but the topic has partitions "
                        f"{', '.join(map(str, found))}"
                    )
        ranges = []
        for partition in found:
            place = kafka.TopicPartition(topic, partition)
            earliest, latest = _watermarks(consumer, place)
            ranges.append(_range(topic, partition, earliest, latest, start, stop))
        return ranges
    except kafka.KafkaException as error:
        raise ConnectionError(
            f"no answer from the Kafka brokers at {config['bootstrap.servers']} ({error.args[0].str()})"
        ) from error
    finally:
        consumer.close()


def _watermarks(consumer: Any, place: Any) -> tuple[int, int]:
    """Return the earliest offset of a partition and that of its next message."""
    kafka = client_library()
    codes = kafka.KafkaError
    until = clock.monotonic() + METADATA_TIMEOUT
    while True:
        try:
            watermarks: tuple[int, int] = consumer.get_watermark_offsets(place, timeout=METADATA_TIMEOUT)
            return watermarks
        except kafka.KafkaException as error:
            # A topic was just made, or a broker has just gone: another leads the partition before long.
            passing = error.args[0].code() in (codes.NOT_LEADER_FOR_PARTITION, codes.LEADER_NOT_AVAILABLE)
            if not passing or clock.monotonic() >= until:
                raise
            clock.sleep(_WITHOUT_LEADER)


def partition_numbers(client: Any, topic: str, timeout: float) -> list[int]:
    """Return the numbers of a topic's partitions, sorted.

    Raises
    ------
    ValueError
        When there is no such topic.
    confluent_kafka.KafkaException
        When no broker answers.

    """
    found = client.list_topics(topic, timeout=timeout).topics[topic]
    if found.error is not None:
        raise ValueError(f"topic {topic!r}: {found.error.str()}")
    return sorted(found.partitions)


def _range(
    topic: str, partition: int, earliest: int, latest: int, start: Offsets, stop: Offsets | None
) -> PartitionRange:
    first = {"earliest": earliest, "latest": latest}[start] if isinstance(start, str) else None
    if first is None:
        first = start.get((topic, partition), earliest)  # type: ignore[union-attr]
        if not earliest <= first <= latest:
            raise ValueError(
                f"{topic}[{partition}] cannot be read from offset {first}: Kafka holds {earliest} to {latest - 1} "
                f"(next: {latest})"
            )
    named = {(topic, partition): FOREVER} if stop is None else {} if isinstance(stop, str) else stop
    return PartitionRange(topic, partition, first, named.get((topic, partition), latest))


def poll(consumer: Any, wait: float, most: int = BATCH) -> list[Any]:
    """Messages and signs that have come, at most so many; none only when none came in so many seconds."""
    first = consumer.poll(wait)
    return [] if first is None else [first, *consumer.consume(most - 1, 0)]


def is_end(message: Any) -> bool:
    """Whether what came instead of a message is the end of its partition; what does not pass is raised.

    Raises
    ------
    ValueError
        When Kafka does not hold the offset that is to be read.
    RuntimeError
        When reading is not possible for another reason that does not pass by itself.

    """
    error, codes = message.error(), client_library().KafkaError
    place = f"{message.topic()}[{message.partition()}]"
    if error.code() == codes._AUTO_OFFSET_RESET:
        raise ValueError(
            f"{place}: cannot be read on ({error.str()}). Kafka does not hold that offset any more, or the topic was "
            "made anew; choose where to begin again"
        )
    passing = (codes._TRANSPORT, codes._ALL_BROKERS_DOWN, codes._TIMED_OUT, codes._RESOLVE)
    if error.code() == codes._PARTITION_EOF:
        return True
    if error.code() not in passing and not error.retriable():
        raise RuntimeError(f"{place}: cannot be read ({error.str()})")
    return False


def read_message(message: Any) -> KafkaMessage:
    """Return a message of the client as a value of its own."""
    kind, milliseconds = message.timestamp()
    dated = kind != client_library().TIMESTAMP_NOT_AVAILABLE
    return KafkaMessage(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        milliseconds / 1_000 if dated else None,
        tuple(message.headers() or ()),
    )


def rounds(ranges: Sequence[PartitionRange], reached: Mapping[int, int]) -> Iterator[PartitionRange]:
    """Cut ranges of offsets into rounds, and skip what was reached before.

    Every round takes the same share of each partition, in the order of their numbers, so that partitions of any sizes
    end together. The order depends on the ranges alone.

    >>> whole = [PartitionRange("t", 0, 0, 2_000), PartitionRange("t", 1, 10, 1_010)]
    >>> [(one.partition, one.start, one.stop) for one in rounds(whole, {0: 700})]
    [(1, 10, 343), (0, 700, 1333), (1, 343, 676), (0, 1333, 2000), (1, 676, 1010)]

    """
    ranges = [one for one in ranges if one.start < one.stop]
    n_rounds = -(-sum(one.stop - one.start for one in ranges) // _ROUND)
    done = [n_rounds * (reached.get(one.partition, one.start) - one.start) // (one.stop - one.start) for one in ranges]
    for number in range(min(done, default=0), n_rounds):
        for one in ranges:
            length = one.stop - one.start
            first = one.start + length * number // n_rounds
            start = max(first, reached.get(one.partition, first))
            stop = one.start + length * (number + 1) // n_rounds
            if start < stop:
                yield one._replace(start=start, stop=stop)


def replay(
    config: Mapping[str, Any], ranges: Sequence[PartitionRange], reached: Mapping[int, int]
) -> Iterator[KafkaMessage]:
    """Read ranges of offsets of a topic to their end, in an order that depends on the ranges alone.

    Parameters
    ----------
    config
        Settings of librdkafka.
    ranges
        What there is to read: partitions of one topic.
    reached
        The offset to go on with, for partitions of which a part was read before.

    Yields
    ------
    KafkaMessage
        In the order of `rounds`, and in each of these by offset.

    Raises
    ------
    ValueError
        When Kafka does not hold an offset (any more).
    RuntimeError
        When reading is not possible for another reason that does not pass by itself.

    """
    kafka = client_library()
    shares = rounds(ranges, reached)
    left = {one.partition: one for one in ranges if reached.get(one.partition, one.start) < one.stop}
    # Everything before this offset has come; where transactions end there are offsets without a message.
    known = {number: reached.get(number, one.start) for number, one in left.items()}
    waiting: dict[int, deque[Any]] = {number: deque() for number in left}
    places = {number: kafka.TopicPartition(one.topic, number, known[number]) for number, one in left.items()}
    paused: set[int] = set()
    # A partition whose messages come sooner than they are wanted has to wait.
    most = _AHEAD // max(len(left), 1) + BATCH
    consumer = open_consumer(config)
    try:
        consumer.assign(list(places.values()))
        for share in shares:
            queue = waiting[share.partition]
            while known[share.partition] < share.stop:
                if share.partition in paused:
                    consumer.resume([places[share.partition]])
                    paused.remove(share.partition)
                for message in poll(consumer, _WAIT):
                    number = message.partition()
                    if message.error() is None:
                        waiting[number].append(message)
                        known[number] = message.offset() + 1
                    elif is_end(message):
                        known[number] = max(known[number], message.offset())
                full = [
                    number
                    for number, held in waiting.items()
                    if number not in paused and (len(held) >= most or known[number] >= left[number].stop)
                ]
                if full:
                    consumer.pause([places[number] for number in full])
                    paused.update(full)
            while queue and queue[0].offset() < share.stop:
                yield read_message(queue.popleft())
    finally:
        consumer.close()


def messages_since(config: Mapping[str, Any], topic: str, since: Mapping[int, int]) -> Iterator[KafkaMessage]:
    """Read what has come to a topic since it had these ends, by partition, as far as Kafka still holds it.

    Raises
    ------
    ValueError
        When there is no such topic.
    ConnectionError
        When no broker answers.

    """
    held = find_partitions(config, topic, "earliest", "latest")
    ranges = [one._replace(start=max(one.start, since.get(one.partition, one.start))) for one in held]
    yield from replay(config, ranges, {})


def follow(
    config: Mapping[str, Any], topic: str, reached: Mapping[int, int], index: int, rows: int, max_wait: float
) -> Iterator[list[KafkaMessage]]:
    """Read a topic for ever, in the order in which its messages come.

    Partitions that are not in `reached`, because they were added to the topic since, are read from their earliest
    offset; a topic is asked for such partitions at the start and then every half minute.

    Parameters
    ----------
    config
        Settings of librdkafka.
    topic
        Its name.
    reached
        The offset to begin with for each partition.
    index
        How many messages were read before.
    rows
        Messages to gather: to the next multiple, counted with those before.
    max_wait
        Seconds that a message waits for others at most.

    Yields
    ------
    list of KafkaMessage
        Those of one partition by offset; an empty list about every half second while none come.
        When reading is interrupted (KeyboardInterrupt), those in hand come before the interrupt goes on.

    Raises
    ------
    ValueError
        When Kafka does not hold an offset (any more), or a partition is gone.
    RuntimeError
        When reading is not possible for another reason that does not pass by itself.

    """
    kafka = client_library()
    consumer = open_consumer(config)
    held: list[KafkaMessage] = []
    assigned = set(reached)
    look = clock.monotonic()
    deadline = 0.0
    try:
        consumer.assign([kafka.TopicPartition(topic, number, offset) for number, offset in reached.items()])
        while True:
            if clock.monotonic() >= look:
                look = clock.monotonic() + _LOOK_FOR_PARTITIONS
                added = _added_partitions(consumer, topic, assigned)
                consumer.incremental_assign(
                    [kafka.TopicPartition(topic, number, kafka.OFFSET_BEGINNING) for number in added]
                )
                assigned.update(added)
            # The client counts in whole milliseconds.
            wait = min(_WAIT, max(deadline - clock.monotonic(), 0.0) + 0.001) if held else _WAIT
            wanted = rows - index % rows
            came = poll(consumer, wait, min(wanted - len(held), BATCH))
            for message in came:
                if message.error() is not None:
                    is_end(message)
                    continue
                if not held:
                    deadline = clock.monotonic() + max_wait
                held.append(read_message(message))
            if held and (len(held) == wanted or clock.monotonic() >= deadline):
                index += len(held)
                full, held = held, []
                yield full
            elif not came:
                yield []
    except KeyboardInterrupt:
        if held:
            yield held
        raise
    finally:
        consumer.close()


def _added_partitions(consumer: Any, topic: str, known: Collection[int]) -> list[int]:
    kafka = client_library()
    try:
        found = partition_numbers(consumer, topic, _PATIENCE)
    except (kafka.KafkaException, ValueError) as error:
        # A broker that is gone, or has just come back, is nothing to end for: the client goes on trying.
        _log.warning("topic %r was not asked for new partitions: %s", topic, error)
        return []
    gone = sorted(set(known) - set(found))
    if gone:
        raise ValueError(
            f"topic {topic!r} has no partition {', '.join(map(str, gone))} any more: it was made anew, or this is "
            "another cluster; choose where to begin again"
        )
    return [number for number in found if number not in known]


class TopicReader:
    """The events of a Kafka topic, for `stream_em.sources.Source`: JSON objects, one in each message.

    Parameters
    ----------
    config
        Settings of librdkafka: `bootstrap.servers`, security, `isolation.level` and so on.
    topic
        Its name.
    start
        "earliest" or "latest": where to begin when no position is given.
    to_end
        Whether to stop at the offsets that are last when reading begins. The order of the events is that of `replay`
        then, and depends on the topic alone. Otherwise the topic is followed for ever, see `follow`.
    max_wait
        Seconds that an event of a topic that is followed waits at most for others to be handed out with.
    timestamp_field
        Field of the events that the timestamp of the message is put into, in seconds since 1970.

    Raises
    ------
    ValueError
        If `config` lacks the servers or sets what the reader decides.
    ModuleNotFoundError
        Without confluent-kafka.

    Notes
    -----
    A position holds the offsets of all partitions: where reading began, goes on, and ends.

    """

    columnar = False
    least_events = 0
    paths: Sequence[str] = ()

    def __init__(
        self,
        config: Mapping[str, Any],
        topic: str,
        *,
        start: str = "earliest",
        to_end: bool = False,
        max_wait: float = 1.0,
        timestamp_field: str | None = None,
    ) -> None:
        client_library()
        check_config(config)
        self.name = f"kafka:{topic}"
        self.live = not to_end
        self.restartable = to_end
        self._config = dict(config)
        self._topic = topic
        self._start = start
        self._max_wait = max_wait
        self._timestamp_field = timestamp_field
        self._ranges: list[PartitionRange] = []

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        """Yield all events after a position, as `stream_em.sources.Reader` has it."""
        del roles
        try:
            yield from self._pieces(rows, after)
        except (ValueError, RuntimeError, ConnectionError, client_library().KafkaException) as error:
            raise SourceError(f"{self.name}: {error}") from error

    def _pieces(self, rows: int, after: Position) -> Iterator[Piece]:
        if "ranges" in after:
            self._ranges = [PartitionRange(self._topic, *numbers) for numbers in after["ranges"]]
        elif not self._ranges and "reached" not in after:
            self._ranges = find_partitions(self._config, self._topic, self._start, None if self.live else "latest")
        begin = [(one.partition, one.start) for one in self._ranges]
        reached: dict[int, int] = dict(after.get("reached", begin))
        index: int = after.get("from", 0)
        # Nothing has been read yet, but from here on it is settled what will be.
        yield self._piece([], index, reached)
        if self.live:
            groups = follow(self._config, self._topic, dict(reached), index, rows, self._max_wait)
        else:
            groups = grouped(replay(self._config, self._ranges, dict(reached)), rows, index)
        for group in groups:
            reached.update((message.partition, message.offset + 1) for message in group)
            yield self._piece(group, index, reached)
            index += len(group)

    def _piece(self, messages: Sequence[KafkaMessage], index: int, reached: Mapping[int, int]) -> Piece:
        events = [self._event(message, number) for number, message in enumerate(messages, index)]
        kept = [row for row, event in enumerate(events) if isinstance(event, dict)]
        offsets = [(messages[row].partition, messages[row].offset) for row in kept]
        end: Position = {"from": index + len(messages), "reached": sorted(reached.items())}
        if not self.live:
            end["ranges"] = [(one.partition, one.start, one.stop) for one in self._ranges]
        return Piece(
            [events[row] for row in kept],
            self._topic,
            np.array(kept, np.int64) + index,
            end,
            rejected=tuple(event for event in events if isinstance(event, Rejection)),
            offsets=np.array(offsets, np.int64).reshape(-1, 2),
        )

    def _event(self, message: KafkaMessage, index: int) -> dict[str, Any] | Rejection:
        place = (message.partition, message.offset)
        if message.value is None:
            reason = "expected a JSON object, but the message has no value"
            return Rejection(index, self._topic, None, None, None, reason, None, place)
        event = parse_event(message.value, index, self._topic)
        if isinstance(event, Rejection):
            return replace(event, offset=place)
        field = self._timestamp_field
        if field is not None:
            if field in event:
                reason = "expected no such field, since the timestamp of the message is put there"
                return Rejection(index, self._topic, None, field, event[field], reason, event, place)
            event[field] = message.timestamp
        return event


class TopicWriter:
    """Messages to a topic; once flushed, all of them are held by Kafka.

    The producer is idempotent: what it sends again after a fault of the network is there once and in order. While no
    broker answers, messages wait, and writing with them.

    Parameters
    ----------
    config
        Settings of librdkafka.
    topic
        Its name.

    Attributes
    ----------
    ends
        The offset after the last message of each partition: as it was at the start, and then after our own.

    Raises
    ------
    ValueError
        When there is no such topic.
    ConnectionError
        When no broker answers at the start.

    """

    def __init__(self, config: Mapping[str, Any], topic: str) -> None:
        kafka = client_library()
        defaults = {"linger.ms": 20, "message.timeout.ms": 0}
        self._producer = kafka.Producer({**defaults, **config, "enable.idempotence": True}, logger=_log)
        self._topic = topic
        self._failed: str | None = None
        self.ends = {one.partition: one.stop for one in find_partitions(config, topic, "earliest", "latest")}

    def write(self, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> None:
        """Hand a message over; it waits where too many wait already.

        Raises
        ------
        ConnectionError
            When Kafka has refused a message.

        """
        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=self._delivered, headers=list(headers))
                break
            except BufferError:
                self._producer.poll(_WAIT)
                self._check()
        self._producer.poll(0)
        self._check()

    def flush(self) -> None:
        """Return when Kafka holds every message.

        Raises
        ------
        ConnectionError
            When Kafka has refused a message.

        """
        while self._producer.flush(_WAIT):
            self._check()
        self._check()

    def discard(self) -> None:
        """Forget the messages that are not sent yet."""
        self._producer.purge()
        self._producer.flush(_WAIT)

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failed = error.str()
        else:
            self.ends[message.partition()] = message.offset() + 1

    def _check(self) -> None:
        if self._failed is not None:
            raise ConnectionError(f"topic {self._topic!r} did not take a message: {self._failed}")
