"""What a reader of any format hands over: pieces of a stream of events, and the events among them that are none."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_em.columns import Roles
from stream_em.sources.faults import Item

Rows: TypeAlias = "pa.Table | list[dict[str, Any]]"
Position: TypeAlias = dict[str, Any]
"""A place between two events of a source, as JSON can hold it: `index`, the number of events before it, and what its
reader needs to find it."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """One event that could not be read.

    Attributes
    ----------
    index
        Position of the event in the source, from 0, rejected events counted.
    path
        File it came from.
    line
        Line of that file, from 1 (CSV: blank lines are not counted, and a value that holds line breaks counts
        as one line), or None where the format has no lines.
    field, value
        The field and the value that could not be read, or None where the whole event could not.
    reason
        What was expected.
    event
        The event as it was read: its fields, or the text of its line.
    offset
        Partition and offset of an event of a Kafka topic, or None.

    """

    index: int
    path: str
    line: int | None
    field: str | None
    value: object
    reason: str
    event: object
    offset: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = f"{self.path}, event {self.index}"
        if self.line is not None:
            place += f" (line {self.line})"
        if self.offset is not None:
            place += " (partition {}, offset {})".format(*self.offset)
        what = "" if self.field is None else f", field {self.field!r}: {self.value!r}"
        return f"{place}{what}: {self.reason}"


@dataclass(frozen=True)
class Piece:
    """What a reader hands over: consecutive events of one file.

    Attributes
    ----------
    rows
        The events that could be read: an Arrow table or dicts.
    path
        What to call the file in a message.
    index
        Position of each in the source, int64 of shape (n_events,), ascending.
    end
        Where the reader goes on after them: what `Reader.pieces` needs to find the place, and JSON can hold.
    line
        Line of each in its file, int64 of shape (n_events,), or None.
    rejected
        The events among them that could not be read, ascending.
    begin
        Where the reader goes on to read them again; None where that is after the piece before.
    offsets
        Partition and offset of each event of a Kafka topic, int64 of shape (n_events, 2), or None.

    """

    rows: pa.RecordBatch | list[dict[str, Any]]
    path: str
    index: npt.NDArray[np.int64]
    end: Position
    line: npt.NDArray[np.int64] | None = None
    rejected: tuple[Rejection, ...] = ()
    begin: Position | None = None
    offsets: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def start(self) -> int:
        """Index of the first event, read or rejected; 0 if there is none."""
        return min((*self.index[:1].tolist(), *(one.index for one in self.rejected[:1])), default=0)

    @property
    def stop(self) -> int:
        """Index after that of the last event, read or rejected; 0 if there is none."""
        return 1 + max((*self.index[-1:].tolist(), *(one.index for one in self.rejected[-1:])), default=-1)

    def split(self, index: int) -> tuple[Piece, Piece]:
        """The events before the one with this index, and the others."""
        row = int(np.searchsorted(self.index, index))
        bad = bisect_left(self.rejected, index, key=lambda rejection: rejection.index)
        return self._part(0, row, self.rejected[:bad]), self._part(row, len(self), self.rejected[bad:])

    def _part(self, start: int, stop: int, rejected: tuple[Rejection, ...]) -> Piece:
        rows = self.rows[start:stop] if isinstance(self.rows, list) else self.rows.slice(start, stop - start)
        line = None if self.line is None else self.line[start:stop]
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return replace(self, rows=rows, index=self.index[start:stop], line=line, rejected=rejected, offsets=offsets)


class Reader(Protocol):
    """What a `Source` cuts into chunks: one format, or one service.

    Attributes
    ----------
    name, paths, columnar, restartable, live, least_events
        As those of `Source`.

    """

    name: str
    paths: Sequence[str]
    columnar: bool
    restartable: bool
    live: bool

    @property
    def least_events(self) -> int:
        """As that of `Source`."""

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        """Yield all events after a position: the `end` of an earlier piece with the `index` of the next event.

        The position is empty at the start of the source. Events before `index` may be among the first ones. A live
        reader ends its pieces at multiples of `rows`, so that chunks are of one size, or earlier, where the next event
        keeps it waiting; a piece without events says that it still waits.
        """
        ...


class Read(NamedTuple):
    """An event as it is read: its position in the source, its line, and its fields or why it cannot be read.

    `raw` are all the bytes since the event before, where a position counts them.
    """

    at: int
    line: int | None
    event: dict[str, Any] | Rejection
    raw: bytes = b""


def gathered(path: str, group: list[Read], end: Position, begin: Position | None = None) -> Piece:
    """One piece of some events of a file."""
    good = [(one.at, one.line, one.event) for one in group if isinstance(one.event, dict)]
    numbered = any(one.line is not None for one in group)
    return Piece(
        [event for _, _, event in good],
        path,
        np.array([index for index, _, _ in good], np.int64),
        end,
        np.array([line for _, line, _ in good], np.int64) if numbered else None,
        tuple(one.event for one in group if isinstance(one.event, Rejection)),
        begin,
    )


def grouped(items: Iterable[Item], size: int, start: int = 0) -> Iterator[list[Item]]:
    """Lists of items, of which the first has the number `start`, that end at every `size`.

    The last is shorter, and so is the one in hand when reading is interrupted.
    """
    group: list[Item] = []
    room = size - start % size
    try:
        for item in items:
            group.append(item)
            if len(group) >= room:
                full, group, room = group, [], size
                yield full
    except KeyboardInterrupt:
        if group:
            yield group
        raise
    if group:
        yield group


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next of which another thread gets meanwhile."""
    with ThreadPoolExecutor(1) as other:
        coming = other.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = other.submit(next, items, None)
            yield item
