"""Scored events to a Kafka topic."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from stream_em.cli.outputs import Committed, OutputError, ScoredRows, plain
from stream_em.kafka import TopicWriter
from stream_em.sources import Chunk, SourceError


class ScoredTopic:
    """A Kafka topic of JSON objects: each event with `component`, `log_prob` and, on request, responsibilities.

    The key of a message is the place of its event: `payments[3]@1742` for partition and offset in a topic, and
    `payments.parquet@1742` for a position in files. What is committed is held by Kafka. What was sent after the last
    commit of a job that was killed is sent again when the job goes on, under the same keys.

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
        self.left_out: Counter[str] = Counter()
        self._prefix = prefix
        try:
            self._writer = TopicWriter(config, topic)
        except (ValueError, ConnectionError) as error:
            raise OutputError(f"{self.name}: {error}") from error

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
            for number, event in enumerate(_events(scored)):
                row = int(scored.kept[number])
                for name in answers.keys() & event.keys():
                    if not self.count:
                        raise SourceError(
                            f"{scored.chunk.path_of(row)}: has a field {name!r} already; set output.prefix to write "
                            "the scores under other names"
                        )
                    self.left_out[name] += 1
                known = not scored.unknown[number]
                event |= {name: values[number] if known else None for name, values in answers.items()}
                self._writer.write(_bytes(_place(scored.chunk, row)), _bytes(_json(event)))
        self.count += len(scored)

    def commit(self) -> Committed:
        """Return when Kafka holds everything."""
        with self._told():
            self._writer.flush()
        return {"count": self.count}

    def publish(self) -> None:
        """Return when Kafka holds everything: it has been there for others all along."""
        self.commit()

    def close(self, *, keep: bool) -> None:
        """Forget what is not sent yet: it is not committed, and comes again if the job goes on."""
        del keep
        self._writer.discard()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            raise OutputError(f"{self.name}: {error}") from error


def _events(scored: ScoredRows) -> list[dict[str, Any]]:
    rows = scored.chunk.rows
    if isinstance(rows, list):
        return [dict(rows[row]) for row in scored.kept.tolist()]
    events: list[dict[str, Any]] = rows.take(pa.array(scored.kept)).to_pylist()
    return events


def _place(chunk: Chunk, row: int) -> str:
    path = chunk.path_of(row)
    if chunk.offsets is None:
        return f"{path}@{chunk.index[row]}"
    partition, offset = chunk.offsets[row].tolist()
    return f"{path}[{partition}]@{offset}"


def _json(event: dict[str, Any]) -> str:
    # NaN is a missing value, and for that JSON has a word.
    present = {name: None if value != value else value for name, value in event.items()}
    return json.dumps(plain(present), ensure_ascii=False, allow_nan=False)


def _bytes(text: str) -> bytes:
    # Half a character (an unpaired surrogate) has no UTF-8; replaced like this, it is an escape of JSON.
    return text.encode("utf-8", "backslashreplace")
