"""A source: pieces of any reader, cut into chunks of one size and parted by the roles of their columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_em.columns import Roles, arrow_floats, arrow_seconds, floats_of, seconds_of
from stream_em.schema import SchemaError
from stream_em.sources.faults import SourceError, missing_column
from stream_em.sources.pieces import Piece, Position, Reader, Rejection, Rows


@dataclass(frozen=True)
class Chunk:
    """Consecutive events of a source, ready for a learner.

    Attributes
    ----------
    rows
        Everything that was read, label and excluded columns included: an Arrow table, or a list of dicts
        where the format does not type its values (JSON Lines, River).
    events
        The same events with the model's fields only.
    label
        Labels, in the order of the events, as an Arrow column, or None.
    time
        Event times in seconds, float64 of shape (n_events,), or None. NaN where an event has none.
    weight
        Weights, float64 of shape (n_events,), or None. NaN where an event has none.
    index
        Position of each event in the source, int64 of shape (n_events,); rejected events leave gaps.
    line
        Line of each event in its file, int64 of shape (n_events,), or None.
    files
        Pairs of path and number of events from it, in order.
    rejected
        Events among these that could not be read.
    before, after
        Where the source goes on to read these events again, and those after them.
    offsets
        Partition and offset of each event of a Kafka topic, int64 of shape (n_events, 2), or None.

    """

    rows: Rows
    events: Rows
    label: pa.ChunkedArray | None
    time: npt.NDArray[np.float64] | None
    weight: npt.NDArray[np.float64] | None
    index: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64] | None
    files: tuple[tuple[str, int], ...]
    rejected: tuple[Rejection, ...]
    before: Position
    after: Position
    offsets: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def position(self, index: int) -> Position:
        """Where the source goes on at the event with this index, which is in this chunk or the first after it."""
        return self.after if index == self.after["index"] else {**self.before, "index": index}

    def path_of(self, row: int) -> str:
        """File that the event at position `row` of this chunk came from."""
        for path, count in self.files:
            if row < count:
                return path
            row -= count
        raise IndexError("the chunk has fewer events")

    def reject(self, row: int, field: str | None, value: object, reason: str) -> Rejection:
        """Rejection of the event at position `row` of this chunk, for a reason found after reading."""
        event = self.rows[row] if isinstance(self.rows, list) else self.rows.slice(row, 1).to_pylist()[0]
        line = None if self.line is None else int(self.line[row])
        offset = None if self.offsets is None else (int(self.offsets[row, 0]), int(self.offsets[row, 1]))
        return Rejection(int(self.index[row]), self.path_of(row), line, field, value, reason, event, offset)


class _Unread:
    """Pieces that have not been handed out, and the position before them."""

    def __init__(self, position: Position) -> None:
        self.position: Position = {"index": 0, **position}
        self._pieces: list[Piece] = []
        self.stop = self.index

    @property
    def index(self) -> int:
        """Index of the next event to be handed out."""
        index: int = self.position["index"]
        return index

    def add(self, piece: Piece) -> None:
        """Take a piece, of which the events before the position were handed out earlier."""
        self.stop = max(self.stop, piece.stop)
        self._pieces.append(piece.split(self.index)[1] if piece.start < self.index else piece)

    def take(self, stop: int) -> list[Piece]:
        """Hand out the events with an index below this."""
        n_whole = 0
        place = self.position
        while n_whole < len(self._pieces) and self._pieces[n_whole].stop <= stop:
            place = self._pieces[n_whole].end
            n_whole += 1
        taken, self._pieces = self._pieces[:n_whole], self._pieces[n_whole:]
        if self._pieces:
            place = self._pieces[0].begin or place
            begun, self._pieces[0] = self._pieces[0].split(stop)
            taken.append(begun)
        self.position = {**place, "index": stop}
        return taken


class Source:
    """Events to be read in chunks, as often as wanted if the source can be restarted.

    Build one with `open_source`.

    Attributes
    ----------
    name
        What to call the source in a message.
    paths
        Files that are read, in order; none for standard input and River.
    left_out
        Files that `path` stands for and that are not read, because `leave_out` names them.
    columnar
        Whether chunks are Arrow tables; otherwise they are lists of dicts.
    restartable
        Whether `chunks` can be called again; standard input cannot.
    live
        Whether events may be slow to come, so that chunks should not be larger than needed.
    least_events
        How many events there are at least, as far as that is known before they are read. It is the same however many
        files come after the first.

    """

    def __init__(self, reader: Reader, roles: Roles, limit: int | None = None, left_out: Sequence[str] = ()) -> None:
        self._reader = reader
        self._roles = roles
        self._limit = limit
        self._started = False
        # Fields with a role that some event has had.
        self._met: set[str] = set()
        self.name = reader.name
        self.paths = () if reader.live else tuple(reader.paths)
        self.left_out = tuple(left_out)
        self.columnar = reader.columnar
        self.restartable = reader.restartable
        self.live = reader.live

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    @property
    def least_events(self) -> int:  # noqa: D102 - among the attributes above
        least = self._reader.least_events
        return least if self._limit is None else min(least, self._limit)

    def chunks(self, rows: int = 65_536, after: Position | None = None) -> Iterator[Chunk]:
        """Read the events, from the first or from a position, in chunks that end at every `rows` events.

        Events that cannot be read are counted, so that what is in a chunk depends on nothing but `rows`: reading that
        goes on after any position gives, from the next multiple of `rows` on, the same chunks as one from the first
        event. Only a live source hands out smaller ones, where it would have to wait for the next event, and empty ones
        while it waits. If reading is interrupted (KeyboardInterrupt), what a live source has read until then comes in
        one more chunk before the interrupt goes on; other sources can read it again.

        Parameters
        ----------
        rows
            Events in a chunk, at least 1.
        after
            A `Chunk.after` or `Chunk.position` of a source of the same events, read with the same `rows`.

        Raises
        ------
        SourceError
            When there is no event at all, when a column is missing, when a file is damaged, when a source that cannot
            be restarted is read a second time, and when the source no longer begins as it did before the position.

        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        if self._started and not self.restartable:
            raise SourceError(f"{self.name}: can be read only once; write it to a file first")
        self._started = True
        unread = _Unread(after or {})
        if unread.index == self._limit:
            return
        try:
            for piece in self._reader.pieces(rows, self._roles, after or {}):
                unread.add(piece)
                while (stop := self._next_stop(unread.index, rows)) <= unread.stop:
                    yield self._chunk(unread, stop)
                    if stop == self._limit:
                        return
                if self.live and (unread.index < unread.stop or piece.stop == 0):
                    yield self._chunk(unread, unread.stop)
        except KeyboardInterrupt:
            # A live stream is often stopped by hand: what came before the stop was read and counts.
            if self.live and unread.index < unread.stop:
                yield self._chunk(unread, unread.stop)
            raise
        if unread.index < unread.stop:
            yield self._chunk(unread, unread.stop)
        if not unread.stop:
            raise SourceError(f"{self.name}: holds no events")

    def _next_stop(self, index: int, rows: int) -> int:
        stop = (index // rows + 1) * rows
        return stop if self._limit is None else min(stop, self._limit)

    def _chunk(self, unread: _Unread, stop: int) -> Chunk:
        roles = self._roles
        before = unread.position
        taken = unread.take(stop)
        after = unread.position
        rejected = tuple(rejection for piece in taken for rejection in piece.rejected)
        pieces = [piece for piece in taken if len(piece)]
        if not pieces:
            none = np.empty(0, np.int64)
            return Chunk([], [], None, None, None, none, None, (), rejected, before, after)
        index = np.concatenate([piece.index for piece in pieces])
        lines = [piece.line for piece in pieces if piece.line is not None]
        line = np.concatenate(lines) if lines else None
        offsets = [piece.offsets for piece in pieces if piece.offsets is not None]
        files = tuple((piece.path, len(piece)) for piece in pieces)
        if isinstance(pieces[0].rows, list):
            dicts: list[dict[str, Any]] = [row for piece in pieces for row in piece.rows]
            if not offsets:
                # A topic has no end at which its first messages could be put right.
                self._check_named(set().union(*dicts), dicts, pieces[0].path)
            events: Rows = dicts
            if roles.only is not None or roles.named():
                apart, only = set(roles.named()), roles.only
                events = [
                    {key: value for key, value in row.items() if key not in apart and (only is None or key in only)}
                    for row in dicts
                ]
            rows: Rows = dicts
            label = None if roles.label is None else _labels([row.get(roles.label) for row in dicts])
            time = None if roles.time is None else seconds_of([row.get(roles.time) for row in dicts])
            weight = None if roles.weight is None else floats_of([row.get(roles.weight) for row in dicts])
        else:
            rows = table = pa.Table.from_batches([piece.rows for piece in pieces])
            events = table.select(roles.model_fields(table.column_names))
            path = pieces[0].path
            label = None if roles.label is None else table[roles.label]
            time = None if roles.time is None else _from_column(arrow_seconds, table, roles.time, path)
            weight = None if roles.weight is None else _from_column(arrow_floats, table, roles.weight, path)
        return Chunk(
            rows,
            events,
            label,
            time,
            weight,
            index,
            line,
            files,
            rejected,
            before,
            after,
            np.concatenate(offsets) if offsets else None,
        )

    def _check_named(self, names: Collection[str], dicts: list[dict[str, Any]], path: str) -> None:
        # In a stream of dicts a field may be absent from an event; one that a role names and that no event has had
        # yet should not be absent from a whole chunk, least of all because its name has a typing error.
        roles = (self._roles.label, self._roles.time, self._roles.weight)
        named = {name for name in roles if name is not None and name not in self._met}
        self._met |= named.intersection(names)
        if len(dicts) > 1 or not names:
            for name in sorted(named.difference(names)):
                raise SourceError(missing_column(path, name, sorted(names)))


def _labels(values: Sequence[object]) -> pa.ChunkedArray:
    try:
        return pa.chunked_array([pa.array(values)])
    except (pa.ArrowException, OverflowError):
        texts = [value if value is None or isinstance(value, str) else repr(value) for value in values]
        return pa.chunked_array([pa.array(texts, pa.string())])


def _from_column(
    read: Callable[[pa.Table, str], npt.NDArray[np.float64]], table: pa.Table, name: str, path: str
) -> npt.NDArray[np.float64]:
    try:
        return read(table, name)
    except SchemaError as error:
        raise SourceError(f"{path}: {error}") from error
