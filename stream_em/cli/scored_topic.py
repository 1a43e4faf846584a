"""Scored events to a Kafka topic."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stream_em.arrays import arrow_numbers
from stream_em.cli.outputs import Committed, OutputError, ScoredRows
from stream_em.kafka import TopicWriter, messages_since
from stream_em.plain import plain
from stream_em.sources import Chunk, SourceError

# Header of each message: the run that has sent it, and partition and number of the event.
_HEADER = "stream_em"


class ScoredTopic:
    """A Kafka topic of JSON objects: each event with `component`, `log_prob` and, on request, responsibilities.

    The key of a message is the place of its event: `payments[3]@1742` for partition and offset in a topic, and
    `payments.parquet@1742` for a position in files. What is committed is held by Kafka. A job that goes on after it was
    killed looks up in the topic what it has sent since its last commit, and does not send that again.

    Parameters
    ----------
    config
        Settings of librdkafka.
    topic
        Its name.
    prefix
        Put before the names of the added fields.
    after
        What `commit` returned, to go on there.

    Attributes
    ----------
    name
        What to call it in a message.
    count
        Events written.
    left_out
        Values of events that lost their place to an answer, by field.

    Raises
    ------
    OutputError
        When there is no such topic, or no broker answers.

    """

    def __init__(
        self, config: Mapping[str, Any], topic: str, *, prefix: str = "", after: Committed | None = None
    ) -> None:
        self.name = f"kafka:{topic}"
        self.count: int = 0 if after is None else after["count"]
        self.left_out: Counter[str] = Counter({} if after is None else after["left_out"])
        self._prefix = prefix
        self._config = dict(config)
        self._topic = topic
        # Others may write to the topic, even scores of the same events.
        self._run: str = secrets.token_hex(8) if after is None else after["run"]
        # The last event of each partition that was sent, or needed not to be.
        self._reached: dict[int, int] = {} if after is None else dict(after["reached"])
        with self._told():
            self._writer = TopicWriter(config, topic)
            # Where to look, after a kill, for what is not to be sent again.
            self._since: dict[int, int] = dict(self._writer.ends if after is None else after["ends"])
            sent = set() if after is None else set(self._sent_since())
        self._sent = self._ahead(sent)

    def _sent_since(self) -> Iterator[tuple[int, int]]:
        own = f"{self._run} ".encode()
        for message in messages_since(self._config, self._topic, self._since):
            for name, value in message.headers:
                if name == _HEADER and value is not None and value.startswith(own):
                    partition, number = value.removeprefix(own).split()
                    yield int(partition), int(number)

    def _ahead(self, places: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those that this run has not come to yet."""
        return {place for place in places if place[1] > self._reached.get(place[0], -1)}

    def add(self, scored: ScoredRows) -> None:
        """Send some events, with null for the answers that are unknown.

        Raises
        ------
        SourceError
            When the first events have a field with the name of an answer. Of a later event its value is left out: one
            message of somebody else's must not end the job.
        OutputError
            When Kafka has refused a message.

        """
        answers = {name: values.tolist() for name, values in scored.answers(self._prefix).items()}
        with self._told():
            for at, event in enumerate(_events(scored)):
                row = int(scored.kept[at])
                for name in answers.keys() & event.keys():
                    if not self.count:
                        raise SourceError(
                            f"{scored.chunk.path_of(row)}: has a field {name!r} already; set output.prefix to write "
                            "the scores under other names"
                        )
                    self.left_out[name] += 1
                known = not scored.unknown[at]
                event |= {name: values[at] if known else None for name, values in answers.items()}
                key, partition, number = _place(scored.chunk, row)
                self._reached[partition] = number
                if (partition, number) not in self._sent:
                    header = (_HEADER, f"{self._run} {partition} {number}".encode())
                    self._writer.write(_bytes(key), _bytes(_json(event)), [header])
        self.count += len(scored)

    def commit(self) -> Committed:
        """Return when Kafka holds everything."""
        with self._told():
            self._writer.flush()
            # To come by all of them may take more than one checkpoint: they need not come in the order they had.
            self._sent = self._ahead(self._sent)
            if not self._sent:
                self._since = dict(self._writer.ends)
        return {
            "count": self.count,
            "left_out": dict(self.left_out),
            "run": self._run,
            "reached": list(self._reached.items()),
            "ends": list(self._since.items()),
        }

    def publish(self) -> None:
        """Return when Kafka holds everything: it has been there for others all along."""
        with self._told():
            self._writer.flush()

    def close(self, *, keep: bool) -> None:
        """Forget what is not sent yet: it is not committed, and comes again if the job goes on."""
        del keep
        self._writer.discard()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except SourceError:
            raise
        except (ValueError, RuntimeError, ConnectionError) as error:
            raise OutputError(f"{self.name}: {error}") from error


def _events(scored: ScoredRows) -> list[dict[str, Any]]:
    rows = scored.chunk.rows
    if isinstance(rows, list):
        return [dict(rows[row]) for row in scored.kept.tolist()]
    events: list[dict[str, Any]] = rows.take(arrow_numbers(scored.kept)).to_pylist()
    return events


def _place(chunk: Chunk, row: int) -> tuple[str, int, int]:
    """Key of an event, its partition, 0 where there are none, and its number there."""
    path = chunk.path_of(row)
    if chunk.offsets is None:
        return f"{path}@{chunk.index[row]}", 0, int(chunk.index[row])
    partition, offset = chunk.offsets[row].tolist()
    return f"{path}[{partition}]@{offset}", partition, offset


def _json(event: dict[str, Any]) -> str:
    # NaN is a missing value, and for that JSON has a word.
    present = {name: None if value != value else value for name, value in event.items()}
    return json.dumps(plain(present), ensure_ascii=False, allow_nan=False)


def _bytes(text: str) -> bytes:
    # Half a character (an unpaired surrogate) has no UTF-8; replaced like this, it is an escape of JSON.
    return text.encode("utf-8", "backslashreplace")
