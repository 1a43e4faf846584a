"""Where events come from: files, standard input and River's data sets, all read as a stream of chunks.

A source reads Parquet, CSV, JSON Lines or a River data set and hands out `Chunk`s of a fixed number of
events. Memory does not depend on how many events there are. Columns that are not for the model (label, event
time, weight, anything excluded) are set apart here, so that no later step can learn from a label by accident.

What cannot be read is never dropped in silence: a bad CSV cell or JSON line becomes a `Rejection` for that
event alone, and a source that is broken as a whole raises `SourceError`, which names the path.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, Self, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from stream_em.columns import Roles, arrow_floats, arrow_seconds, floats_of, parse_number, seconds_of
from stream_em.schema import SchemaError

STANDARD_INPUT = "-"
FORMATS = ("parquet", "csv", "jsonl")

_SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
# What common writers put into a numeric cell that holds nothing. Not for categories: "NA" is Namibia.
_MISSING_NUMBERS = ("", "NA", "N/A", "NaN", "nan", "-nan", "null", "NULL", "None", "#N/A")
_TRUE = ("true", "True", "TRUE", "1", "1.0")
_FALSE = ("false", "False", "FALSE", "0", "0.0")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A CSV column nobody declared is a number when this share of its cells in the first block are numbers. Not
# all of them: then a single bad cell would turn a sensor reading into a category.
_SHARE_OF_NUMBERS = 0.9
_NUMERIC_KINDS = ("numeric", "count", "duration")

# Where they stand in the name of the only column, the cells are not separated as was assumed.
_DELIMITERS = (";", "\t", "|", ",")

# Longest event of a CSV file. Arrow parses block by block, and an event must fit into one; without an end, a
# quote left open would take the rest of the file into memory.
_CSV_BLOCK = 1 << 20

_PARQUET_START = b"PAR1"

# Bytes by which a file is told from another of its name; a whole file would have to be read.
_LONGEST_START = 1 << 16

Rows: TypeAlias = "pa.Table | list[dict[str, Any]]"
Position: TypeAlias = dict[str, Any]
"""A place between two events of a source, as JSON can hold it: `index`, the number of events before it, and what its
reader needs to find it."""

_Item = TypeVar("_Item")


class SourceError(ValueError):
    """A source that cannot be read as a whole: absent, empty, truncated, or with the wrong columns."""


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


class Reader(Protocol):
    """What a `Source` cuts into chunks: one format, or one service.

    Attributes
    ----------
    name, paths, columnar, restartable, live
        As those of `Source`.

    """

    name: str
    paths: Sequence[str]
    columnar: bool
    restartable: bool
    live: bool

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        """Yield all events after a position: the `end` of an earlier piece with the `index` of the next event.

        The position is empty at the start of the source. Events before `index` may be among the first ones. A live
        reader ends its pieces at multiples of `rows`, so that chunks are of one size, or earlier, where the next event
        keeps it waiting; a piece without events says that it still waits.
        """
        ...


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
            return Chunk(
                dicts,
                events,
                None if roles.label is None else _labels([row.get(roles.label) for row in dicts]),
                None if roles.time is None else seconds_of([row.get(roles.time) for row in dicts]),
                None if roles.weight is None else floats_of([row.get(roles.weight) for row in dicts]),
                index,
                line,
                files,
                rejected,
                before,
                after,
                np.concatenate(offsets) if offsets else None,
            )
        table = pa.Table.from_batches([piece.rows for piece in pieces])
        return Chunk(
            table,
            table.select(roles.model_fields(table.column_names)),
            None if roles.label is None else table[roles.label],
            None if roles.time is None else _from_column(arrow_seconds, table, roles.time, pieces[0].path),
            None if roles.weight is None else _from_column(arrow_floats, table, roles.weight, pieces[0].path),
            index,
            line,
            files,
            rejected,
            before,
            after,
        )

    def _check_named(self, names: Collection[str], dicts: list[dict[str, Any]], path: str) -> None:
        # In a stream of dicts a field may be absent from an event; one that a role names and that no event has had
        # yet should not be absent from a whole chunk, least of all because its name has a typing error.
        roles = (self._roles.label, self._roles.time, self._roles.weight)
        named = {name for name in roles if name is not None and name not in self._met}
        self._met |= named.intersection(names)
        if len(dicts) > 1 or not names:
            for name in sorted(named.difference(names)):
                raise SourceError(_missing_column(path, name, sorted(names)))


def open_source(
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    river: str | None = None,
    format: str = "auto",  # noqa: A002 - the name of the option in the configuration
    fields: Mapping[str, str] | None = None,
    label: str | None = None,
    time: str | None = None,
    weight: str | None = None,
    exclude: Sequence[str] = (),
    only: Sequence[str] | None = None,
    delimiter: str | None = None,
    limit: int | None = None,
    leave_out: Collection[str | Path] = (),
) -> Source:
    r"""Open a source of events.

    Parameters
    ----------
    path
        File, folder, glob pattern or a list of them; `"-"` is standard input. A folder stands for all its
        data files, in the order of their names. Files ending in `.gz` are decompressed (CSV, JSON Lines).
    river
        Name of a data set in `river.datasets`, instead of a path. Its target becomes the label, in a column
        called `label` ("label" if not given).
    format
        "parquet", "csv", "jsonl", or "auto": by the ending of the name; for standard input by its first byte.
    fields
        Kinds of fields, as in `Schema`: how to read the cells of a CSV file. A CSV column that is not named
        here is a number when nine tenths of its cells in the first block are, then a flag, else a category.
    label, time, weight, exclude
        Columns kept from the model, see `Roles`.
    only
        The model's fields, when they are known already; every other column is kept from it.
    delimiter
        Separator of CSV cells; default a comma, or a tab for `.tsv`.
    limit
        Stop after this many events.
    leave_out
        Files not to read where a folder or a pattern stands for them too. A file that `path` names is read.

    Raises
    ------
    SourceError
        When there is nothing to read at `path`, or the format cannot be told.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "events.csv")
    ...     _ = file.write_text("amount,country\n12.5,DE\nmany,FR\n3.0,\n" + "7.0,IT\n" * 8)
    ...     (chunk,) = open_source(file).chunks()
    >>> chunk.events.column_names, len(chunk)
    (['amount', 'country'], 10)
    >>> chunk.rejected[0].line, chunk.rejected[0].field, chunk.rejected[0].value
    (3, 'amount', 'many')

    """
    if (path is None) == (river is None):
        raise SourceError("a source needs either a path or the name of a River data set")
    if format != "auto" and format not in FORMATS:
        raise SourceError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
    if river is not None:
        roles = Roles(label or "label", time, weight, tuple(exclude), None if only is None else tuple(only))
        return Source(_River(river, label or "label"), roles, limit)
    kinds = dict(fields or {})
    roles = Roles(label, time, weight, tuple(exclude), None if only is None else tuple(only), kinds)
    given = [path] if isinstance(path, (str, Path)) else list(path or ())
    if any(str(item) == STANDARD_INPUT for item in given):
        if len(given) > 1:
            raise SourceError("standard input ('-') cannot be mixed with files")
        return Source(_standard_input(format, delimiter), roles, limit)
    paths, left_out = _find(given, format, leave_out)
    kind = _format_of(paths) if format == "auto" else format
    reader: Reader
    if kind == "parquet":
        reader = _Parquet(_name(given), paths)
    elif kind == "csv":
        reader = _Csv(_name(given), paths, delimiter)
    else:
        reader = _JsonLines(_name(given), paths)
    return Source(reader, roles, limit, left_out)


def river_dataset_names() -> list[str]:
    """Names that `open_source(river=...)` knows, sorted.

    >>> "Shuttle" in river_dataset_names()
    True

    """
    datasets = _river_module()
    return sorted(name for name in datasets.__all__ if isinstance(getattr(datasets, name), type) and name != "base")


def _files_after(paths: Sequence[str], after: Position, *, may_grow: bool = True) -> Iterator[tuple[str, Position]]:
    """Yield the files that are not read to their end, each with what a position in it begins with.

    That names the file, and tells it and those before it from others of the same names.

    Raises
    ------
    SourceError
        When the files are not those that were read up to the position.

    """
    wanted = after.get("file")
    read = hashlib.blake2b(digest_size=16)
    for path in paths:
        with _reading(path):
            size = _size(path)
            place: Position = {"file": path, "earlier": read.hexdigest(), "size": size, "start": _start_of(path, size)}
        if path == wanted and place["earlier"] == after["earlier"]:
            _check_unchanged(path, place, after, may_grow)
            wanted = None
        if wanted is None:
            yield path, place
        with _reading(path):
            read.update(f"{path!r} {_size(path)} ".encode())
    if wanted is not None:
        raise SourceError(
            f"{wanted}: events were read up to a place in this file, but now it is not among the files of the source, "
            "or those before it are not what they were; put them back, or start afresh"
        )


def _size(path: str) -> int | None:
    """Bytes of a file; None for a pipe, which has no size."""
    return Path(path).stat().st_size if Path(path).is_file() else None


def _start_of(path: str, size: int | None) -> str:
    """Digest of the first bytes of a file, of no more than `size` of them; none of a pipe, where they would be gone."""
    if not size:
        return ""
    with Path(path).open("rb") as stream:
        return hashlib.blake2b(stream.read(min(size, _LONGEST_START)), digest_size=16).hexdigest()


def _check_unchanged(path: str, place: Position, after: Position, may_grow: bool) -> None:
    then, now = after["size"], place["size"]
    if then is None or now is None:
        same = then == now
    else:
        same = (now >= then if may_grow else now == then) and _start_of(path, then) == after["start"]
    if not same:
        raise SourceError(
            f"{path}: has changed since events were read up to a place in it; put it back as it was, or start afresh"
        )


class _Parquet:
    columnar = True
    restartable = True
    live = False

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name = name
        self.paths: Sequence[str] = paths

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        expected: pa.Schema | None = None
        index = after.get("first", 0)
        for path, place in _files_after(self.paths, after, may_grow=False):
            file = _open_parquet(path)
            with file:
                _check_columns(path, file.schema_arrow.names, roles)
                columns = None
                if path == self.paths[0]:
                    expected = file.schema_arrow.remove_metadata()
                else:
                    if expected is None:
                        with _open_parquet(self.paths[0]) as first:
                            expected = first.schema_arrow.remove_metadata()
                    columns = _same_columns(path, file.schema_arrow, expected, roles, self.paths[0])
                place = {**place, "first": index}
                groups = list(range(file.num_row_groups))
                while groups and index + file.metadata.row_group(groups[0]).num_rows <= after.get("index", 0):
                    index += file.metadata.row_group(groups.pop(0)).num_rows
                batches = file.iter_batches(batch_size=rows, row_groups=groups, columns=columns) if groups else iter(())
                for batch in _guarded(batches, path, "Parquet"):
                    if columns is not None and not batch.schema.equals(expected):
                        batch = _cast_batch(batch, expected, path, self.paths[0])
                    if batch.num_rows:
                        yield Piece(batch, path, np.arange(index, index + batch.num_rows), place, begin=place)
                        index += batch.num_rows
                # Arrow, reading through a buffer, takes a file that was cut meanwhile for one without further rows.
                if index - place["first"] != file.metadata.num_rows:
                    raise SourceError(
                        f"{path}: was cut while it was read: of the {file.metadata.num_rows:,} events that it states, "
                        f"{index - place['first']:,} are there"
                    )


def _open_parquet(path: str) -> pq.ParquetFile:
    with _reading(path, "Parquet"):
        # Not pre-buffered: a reader that fetches whole row groups needs memory in proportion to them.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


class _Csv:
    """Files, parsed by Arrow, from their start even where a position lies further on: to find cells takes little."""

    columnar = True
    restartable = True
    live = False

    def __init__(self, name: str, paths: list[str], delimiter: str | None) -> None:
        self.name = name
        self.paths: Sequence[str] = paths
        self.delimiter = delimiter

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        columns = _CsvColumns.at(after, roles)
        index = after.get("first", 0)
        for path, place in _files_after(self.paths, after):
            with _reading(path, "CSV"):
                stream = _open_binary(path)
            with stream:
                delimiter = self.delimiter or ("\t" if ".tsv" in Path(path).suffixes else ",")
                names, _ = _csv_header(stream, path, delimiter, assumed=self.delimiter is None)
                if names is None:
                    continue
                _check_columns(path, names, roles)
                if columns is None:
                    columns = _CsvColumns(roles, names)
                elif set(columns.names) != set(names):
                    raise SourceError(_different_columns(path, names, columns.names, self.paths[0]))
                place = {**place, "first": index}
                for block in _parse_csv(stream, path, names, delimiter):
                    if index + len(block) > after.get("index", 0):
                        yield columns.piece(block, path, names, index, place)
                    index += len(block)


class _CsvStream:
    """Standard input, parsed line by line: Arrow would wait for more than the events that have come."""

    columnar = True
    restartable = False
    live = True

    def __init__(self, stream: _Bytes, delimiter: str | None) -> None:
        self.name = stream.name
        self.paths: Sequence[str] = [stream.name]
        self.delimiter = delimiter or ","
        self.assumed = delimiter is None
        self.stream = stream

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        index, line = after.get("from", 0), after.get("line", 1)
        columns = _CsvColumns.at(after, roles)
        self.stream.skip(after)
        if columns is None:
            names, header = _csv_header(self.stream, self.name, self.delimiter, assumed=self.assumed)
            if names is None:
                return
            _check_columns(self.name, names, roles)
            columns = _CsvColumns(roles, names)
            self.stream.taken(header)
        names = columns.names
        for group in grouped(self._lines(line), rows, index):
            cells = [one.cells for one in group if len(one.cells) == len(names)]
            arrays = [pa.array(column, pa.binary()) for column in zip(*cells)] or [pa.array([], pa.binary())] * len(
                names
            )
            block = _CsvBlock(
                pa.RecordBatch.from_arrays(arrays, names=names),
                np.array([one.line for one in group if len(one.cells) == len(names)], np.int64),
                [
                    (one.line, len(one.cells), _text(self.delimiter.encode().join(one.cells)))
                    for one in group
                    if len(one.cells) != len(names)
                ],
            )
            end = {"from": index + len(group), "line": group[-1].line}
            place = {**self.stream.taken(b"".join(one.raw for one in group)), **end}
            # To be read again, they must be sent again.
            yield replace(columns.piece(block, self.name, names, index, place), begin=None)
            index += len(group)

    def _lines(self, line: int) -> Iterator[_CsvLine]:
        raw: list[bytes] = []

        def texts() -> Iterator[str]:
            # Lines that are no UTF-8 pass through the parser and are found out when their cells are converted.
            for one in self.stream:
                raw.append(one)
                yield one.decode("utf-8", "surrogateescape")

        for cells in _guarded(csv.reader(texts(), delimiter=self.delimiter), self.name, "CSV"):
            if cells:
                line += 1
                yield _CsvLine(line, [cell.encode("utf-8", "surrogateescape") for cell in cells], b"".join(raw))
                raw.clear()


class _CsvLine(NamedTuple):
    """An event of a CSV stream: its line, its cells, and all the bytes since the event before."""

    line: int
    cells: list[bytes]
    raw: bytes


def _csv_header(
    stream: IO[bytes] | _Bytes, path: str, delimiter: str, *, assumed: bool
) -> tuple[list[str] | None, bytes]:
    """Take the header off a stream: the names of the columns, None where there is nothing at all, and its bytes.

    A delimiter that nobody has named, but that is `assumed`, must not leave one column whose name holds another.
    """
    raw: list[bytes] = []

    def lines() -> Iterator[str]:
        encoding = "utf-8-sig"
        while line := stream.readline(_CSV_BLOCK):
            if len(line) == _CSV_BLOCK or b"\r" in line.rstrip(b"\r\n"):
                raise SourceError(
                    f"{path}: its first line has no end that CSV knows; lines must end in LF or CR LF, not in CR alone"
                )
            raw.append(line)
            yield line.decode(encoding)
            encoding = "utf-8"

    with _reading(path, "CSV"):
        # The parser takes one line, or as many as a name in quotes has.
        names = next((cells for cells in csv.reader(lines(), delimiter=delimiter, strict=True) if cells), None)
    if assumed and names is not None and len(names) == 1:
        for other in _DELIMITERS:
            if other != delimiter and other in names[0]:
                raise SourceError(
                    f"{path}: its only column would be {names[0]!r}; is delimiter={other!r} meant? "
                    f"(delimiter={delimiter!r} says that it is right)"
                )
    return names, b"".join(raw)


@dataclass(frozen=True)
class _CsvBlock:
    """Consecutive lines of a CSV file: cells as bytes, and the lines with the wrong number of cells."""

    cells: pa.RecordBatch
    lines: npt.NDArray[np.int64]
    ragged: list[tuple[int, int, str]]

    def __len__(self) -> int:
        return len(self.lines) + len(self.ragged)


def _parse_csv(stream: IO[bytes], path: str, names: list[str], delimiter: str) -> Iterator[_CsvBlock]:
    """Parse by Arrow, in blocks of its own choice."""
    ragged: list[tuple[int, int, str]] = []

    def skip(row: Any) -> str:
        # Row 1 is the first after the header, which has been taken off the stream.
        ragged.append((row.number + 1, row.actual_columns, row.text))
        return "skip"

    schema = pa.schema([(name, pa.binary()) for name in names])
    try:
        with _reading(path, "CSV"):
            reader = pa_csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                # One thread: only then does Arrow number the rows it hands to `skip`.
                read_options=pa_csv.ReadOptions(use_threads=False, column_names=names, block_size=_CSV_BLOCK),
                parse_options=pa_csv.ParseOptions(
                    delimiter=delimiter, invalid_row_handler=skip, newlines_in_values=True
                ),
                # As bytes: a cell that is no number, or no UTF-8, must cost its own row and not the run.
                convert_options=pa_csv.ConvertOptions(column_types=schema),
            )
    except SourceError as error:
        if "Empty CSV" in str(error):
            return
        raise
    line = 2
    for block in _guarded(iter(reader), path, "CSV"):
        # Skipped rows take up line numbers between the good ones. Arrow parses ahead, so some of them may
        # belong to a later block.
        candidates = np.arange(line, line + block.num_rows + len(ragged))
        numbers = np.setdiff1d(candidates, [number for number, _, _ in ragged], assume_unique=True)
        numbers = numbers[: block.num_rows]
        if block.num_rows:
            line = int(numbers[-1]) + 1
            skipped = [row for row in ragged if row[0] < line]
            ragged[:] = ragged[len(skipped) :]
            yield _CsvBlock(block, numbers, skipped)
    if ragged:
        yield _CsvBlock(pa.RecordBatch.from_pylist([], schema), np.empty(0, np.int64), ragged)


class _CsvColumns:
    """Names and types of the columns of a CSV source, fixed by its first block, and the conversion of its cells."""

    def __init__(self, roles: Roles, names: list[str], types: Mapping[str, str] | None = None) -> None:
        self.roles = roles
        self.names = names
        self.types = dict(types or {})

    @classmethod
    def at(cls, position: Position, roles: Roles) -> _CsvColumns | None:
        """Those that the source had up to a position; None at its start."""
        return cls(roles, position["names"], position["types"]) if "names" in position else None

    def piece(self, block: _CsvBlock, path: str, names: list[str], index: int, place: Position) -> Piece:
        """The typed events of a block of which the first has this index, and those that cannot be read."""
        begin = {**place, "names": self.names, "types": self.types}
        if not self.types and block.cells.num_rows:
            self.types = {name: self._type(name, block.cells[name]) for name in self.names}
        every_line = np.sort([*block.lines.tolist(), *(number for number, _, _ in block.ragged)])
        rejected = {
            number: Rejection(
                index + int(np.searchsorted(every_line, number)),
                path,
                number,
                None,
                None,
                f"expected {len(names)} cells as in the header, got {n_cells}"
                + ("; a quote may have been left open" if "\n" in text.strip() else ""),
                text,
            )
            for number, n_cells, text in block.ragged
        }
        positions = index + np.searchsorted(every_line, block.lines)
        arrays = []
        bad: set[int] = set()
        for name, kind in self.types.items():
            array, faults = _CONVERTERS[kind](block.cells[name])
            arrays.append(array)
            for row in faults:
                if row not in bad:
                    bad.add(row)
                    number = int(block.lines[row])
                    event = {key: _text(cell) for key, cell in block.cells.slice(row, 1).to_pylist()[0].items()}
                    rejected[number] = Rejection(
                        int(positions[row]), path, number, name, event[name], _EXPECTED_CELL[kind], event
                    )
        typed = pa.RecordBatch.from_arrays(arrays, names=list(self.types))
        lines = block.lines
        if bad:
            kept = np.delete(np.arange(len(lines)), list(bad))
            typed, positions, lines = typed.take(pa.array(kept)), positions[kept], lines[kept]
        bad_ones = tuple(rejected[number] for number in sorted(rejected))
        return Piece(typed, path, positions, {**begin, "types": self.types}, lines, bad_ones, begin)

    def _type(self, name: str, cells: pa.Array) -> str:
        roles = self.roles
        if name == roles.time:
            return "time"
        if name == roles.weight:
            return "numeric"
        if name in roles.exclude or (roles.only is not None and name not in (*roles.only, roles.label)):
            return "text"
        declared = roles.kinds.get(name)
        if declared is not None:
            return "numeric" if declared in _NUMERIC_KINDS else "flag" if declared == "flag" else "text"
        texts = [_text(cell) for cell in cells.slice(0, 10_000).to_pylist()]
        held = [text for text in texts if text not in _MISSING_NUMBERS]
        needed = _SHARE_OF_NUMBERS * len(held)
        if sum(parse_number(text) is not None for text in held) >= needed:
            return "numeric"
        words = {"true", "false"}
        return "flag" if sum(text.lower() in words for text in held) >= needed else "text"


class _JsonLines:
    columnar = False

    def __init__(self, name: str, paths: list[str], stream: _Bytes | None = None) -> None:
        self.name = name
        self.paths: Sequence[str] = paths
        self.stream = stream
        self.restartable = stream is None
        self.live = stream is not None

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        index, line = after.get("from", 0), after.get("line", 0)
        for stream in self._streams(after):
            with stream:
                begin = {**stream.taken(b""), "from": index, "line": line}
                for group in grouped(self._events(stream, index, line), rows, index):
                    index, line = group[-1].at + 1, group[-1].line
                    end = {**stream.taken(b"".join(one.raw for one in group)), "from": index, "line": line}
                    yield _gathered(stream.name, group, end, begin)
                    begin = end
            line = 0

    def _streams(self, after: Position) -> Iterator[_Bytes]:
        if self.stream is not None:
            self.stream.skip(after)
            yield self.stream
            return
        for path, place in _files_after(self.paths, after):
            with _reading(path, "JSON Lines"):
                stream = _Bytes(_open_binary(path), path, place)
                if after:
                    # Only the first of them is begun.
                    stream.skip(after)
                    after = {}
            yield stream

    def _events(self, stream: _Bytes, index: int, number: int) -> Iterator[_Read]:
        raw: list[bytes] = []
        for line in _guarded(iter(stream), stream.name, "JSON Lines"):
            number += 1
            raw.append(line)
            if not line.strip():
                continue
            if index == 0 and line.lstrip().startswith(b"["):
                raise SourceError(
                    f"{stream.name}: begins with '[', so it is a JSON array; JSON Lines holds one object on each line"
                )
            yield _Read(index, number, parse_event(line, index, stream.name, number), b"".join(raw))
            raw.clear()
            index += 1


class _Bytes:
    """A stream of bytes, of which a position holds how many were read.

    Where that is not a file (with a `place`, as `_files_after` has it) but standard input or a pipe, it holds their
    digest as well: they come again only if whoever wrote them does it again.
    """

    def __init__(self, stream: IO[bytes], name: str, place: Position | None = None) -> None:
        self.name = name
        self.readline = stream.readline
        self._stream = stream
        self._place = place or {}
        self._offset = 0
        self._digest = None if self._place.get("size") is not None else hashlib.blake2b(digest_size=16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._place:
            self._stream.close()

    def __iter__(self) -> Iterator[bytes]:
        # `readline` and not the stream's own iterator: lines are handed on as they come.
        return iter(self.readline, b"")

    def taken(self, raw: bytes) -> Position:
        """Count bytes that were read, and return what a position after them begins with."""
        self._offset += len(raw)
        place = {**self._place, "offset": self._offset}
        if self._digest is None:
            return place
        self._digest.update(raw)
        return {**place, "digest": self._digest.hexdigest()}

    def skip(self, after: Position) -> None:
        """Go on after the bytes before a position.

        Raises
        ------
        SourceError
            When they are not those that were read up to it.

        """
        offset = after.get("offset", 0)
        if self._digest is None:
            self._stream.seek(offset)
            self._offset = offset
            return
        while (left := offset - self._offset) and (raw := self._stream.read(min(left, 1 << 20))):
            self.taken(raw)
        if offset and self.taken(b"")["digest"] != after["digest"]:
            raise SourceError(
                f"{self.name}: does not begin with the {offset:,} bytes that were read before; send the same stream "
                "again from its start, or start afresh"
            )


class _River:
    columnar = False
    restartable = True
    live = False
    paths: Sequence[str] = ()

    def __init__(self, dataset: str, label: str) -> None:
        self.name = f"river:{dataset}"
        self.label = label
        names = river_dataset_names()
        if dataset not in names:
            raise SourceError(f"River has no data set {dataset!r}{_nearest(dataset, names)}")
        try:
            self.dataset = getattr(_river_module(), dataset)()
        except TypeError as error:
            raise SourceError(f"{self.name}: needs arguments and cannot be opened by name ({error})") from error

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:
        start = after.get("index", 0)
        for group in grouped(self._events(start), rows, start):
            yield _gathered(self.name, group, {})

    def _events(self, start: int) -> Iterator[_Read]:
        events = _guarded(islice(self.dataset, start, None), self.name)
        for index, (event, target) in enumerate(events, start):
            if not isinstance(event, dict):
                raise SourceError(
                    f"{self.name}: its events are {type(event).__name__} and not named fields, so no mixture "
                    "model can be fitted to them"
                )
            if self.label in event:
                raise SourceError(f"{self.name}: has a field {self.label!r} already; give the label another name")
            yield _Read(index, None, {**event, self.label: target})


class _Read(NamedTuple):
    """An event as it is read: its position in the source, its line, and its fields or why it cannot be read.

    `raw` are all the bytes since the event before, where a position counts them.
    """

    at: int
    line: int | None
    event: dict[str, Any] | Rejection
    raw: bytes = b""


def _gathered(path: str, group: list[_Read], end: Position, begin: Position | None = None) -> Piece:
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


def grouped(items: Iterable[_Item], size: int, start: int = 0) -> Iterator[list[_Item]]:
    """Lists of items, of which the first has the number `start`, that end at every `size`.

    The last is shorter, and so is the one in hand when reading is interrupted.
    """
    group: list[_Item] = []
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


def _find(
    given: Sequence[str | Path],
    format: str,  # noqa: A002
    leave_out: Collection[str | Path],
) -> tuple[list[str], list[str]]:
    paths: list[str] = []
    left_out: list[str] = []

    def kept(found: list[str]) -> list[str]:
        apart = [name for name in found if any(same_file(name, other) for other in leave_out)]
        left_out.extend(apart)
        return [name for name in found if name not in apart]

    for item in given:
        path = Path(item).expanduser()
        if path.is_dir():
            found = sorted(
                str(inner)
                for inner in path.rglob("*")
                if inner.is_file()
                and not any(part.startswith((".", "_")) for part in inner.relative_to(path).parts)
                and (_format_of_name(inner) == format if format != "auto" else _format_of_name(inner))
            )
            found = kept(found)
            if not found:
                other = " but those left out" if left_out else ""
                raise SourceError(f"{item}: the folder holds no {_wanted(format)} files{other}")
            keyed = [inner for inner in found if "=" in str(Path(inner).relative_to(path).parent)]
            if keyed:
                raise SourceError(
                    f"{item}: is partitioned by columns that are only in the folder names ({keyed[0]}); "
                    "name the files with a glob pattern to read them without those columns"
                )
            paths.extend(found)
        elif path.is_file():
            paths.append(str(path))
        elif any(sign in str(item) for sign in "*?["):
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - absolute patterns too
            found = kept(sorted(name for name in matches if Path(name).is_file()))
            if not found:
                other = " but those left out" if left_out else ""
                raise SourceError(f"{item}: no file matches the pattern{other}")
            paths.extend(found)
        elif path.exists():
            # A named pipe or a process substitution of the shell.
            paths.append(str(path))
        else:
            near = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
            raise SourceError(f"{item}: no such file or folder{_nearest(str(path), near)}")
    if not paths:
        raise SourceError("the list of paths is empty")
    return paths, left_out


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two names lead to one file that is there, whatever links are on the way."""
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def _format_of_name(path: str | Path) -> str | None:
    name = Path(path)
    return _SUFFIXES.get(Path(name.stem).suffix if name.suffix == ".gz" else name.suffix)


def _format_of(paths: list[str]) -> str:
    formats = {path: _format_of_name(path) for path in paths}
    for path, kind in formats.items():
        if kind is None:
            raise SourceError(
                f"{path}: the format cannot be told from the name; set format to one of {', '.join(FORMATS)}"
            )
    kinds = {kind for kind in formats.values() if kind is not None}
    if len(kinds) > 1:
        raise SourceError(f"the files have different formats ({', '.join(sorted(kinds))}); name one with format")
    return kinds.pop()


def _wanted(format: str) -> str:  # noqa: A002
    return "Parquet, CSV or JSON Lines" if format == "auto" else format


def _name(given: Sequence[str | Path]) -> str:
    return str(given[0]) if len(given) == 1 else f"{given[0]} and {len(given) - 1} more"


def _standard_input(format: str, delimiter: str | None) -> Reader:  # noqa: A002
    stream = sys.stdin.buffer
    start = cast("io.BufferedReader", stream).peek(1) if format == "auto" else b""
    if format == "parquet" or start.startswith(_PARQUET_START):
        raise SourceError("standard input: Parquet needs a file, because its index stands at the end")
    if format == "auto":
        format = "jsonl" if start.lstrip()[:1] in (b"{", b"[") else "csv"  # noqa: A001
    held = _Bytes(stream, "standard input")
    return _JsonLines(held.name, [held.name], held) if format == "jsonl" else _CsvStream(held, delimiter)


def _open_binary(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return Path(path).open("rb")


def _river_module() -> Any:
    try:
        from river import datasets
    except ModuleNotFoundError as error:
        raise SourceError("River data sets need the river package: pip install 'stream-em[river]'") from error
    return datasets


@contextmanager
def _reading(path: str, what: str | None = None) -> Iterator[None]:
    """Turn whatever reading raises into a `SourceError` that names the path."""
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        # How Arrow, for files, and the parser of live streams say it.
        for sign, most in (("straddling object", _CSV_BLOCK), ("field limit", csv.field_size_limit())):
            if sign in str(error):
                raise SourceError(
                    f"{path}: an event is longer than {most:,} bytes, which is the most here; a quote may have been "
                    "left open"
                ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"read as {what}, it may be truncated or damaged" if what else "loaded"
        raise SourceError(f"{path}: cannot be {problem} ({first})") from error


def _guarded(items: Iterator[_Item], path: str, what: str | None = None) -> Iterator[_Item]:
    """The same items; what reading one of them raises becomes a `SourceError`."""
    while True:
        with _reading(path, what):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _missing_column(path: str, name: str, names: Sequence[str]) -> str:
    return f"{path}: has no column {name!r}{_nearest(name, names)} (it has: {', '.join(names)})"


def _check_columns(path: str, names: Sequence[str], roles: Roles) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise SourceError(f"{path}: has more than one column called {name!r}; rename all but one")
    for name in roles.named() + list(roles.only or ()) + list(roles.kinds):
        if name not in names:
            raise SourceError(_missing_column(path, name, names))
    if not roles.model_fields(names):
        raise SourceError(f"{path}: no column is left for the model (it has: {', '.join(names)})")


def _different_columns(path: str, names: Collection[str], expected: Collection[str], first: str) -> str:
    lacking = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    parts = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"also has {', '.join(extra)}"] * bool(extra)
    return f"{path}: its columns differ from those of {first}: it {' and '.join(parts)}"


def _same_columns(path: str, schema: pa.Schema, expected: pa.Schema, roles: Roles, first: str) -> list[str]:
    names = [name for name in schema.names if name not in roles.exclude or name in expected.names]
    if set(names) != set(expected.names):
        raise SourceError(_different_columns(path, names, expected.names, first))
    return list(expected.names)


def _cast_batch(batch: pa.RecordBatch, expected: pa.Schema, path: str, first: str) -> pa.RecordBatch:
    arrays = []
    for wanted in expected:
        column = batch[wanted.name]
        try:
            arrays.append(column if column.type.equals(wanted.type) else column.cast(wanted.type))
        except pa.ArrowException as error:
            raise SourceError(
                f"{path}: column {wanted.name!r} is {column.type} but {wanted.type} in {first}, and not all "
                f"its values can be converted ({str(error).splitlines()[0]})"
            ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=expected)


def parse_event(line: bytes, index: int, path: str, number: int | None = None) -> dict[str, Any] | Rejection:
    """The object on a JSON line, or why it is no event."""
    reason = ""
    event: Any = None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"expected a JSON object, but it does not parse: {error}"
    else:
        if not isinstance(event, dict):
            reason = f"expected a JSON object, got {type(event).__name__}"
    if reason:
        text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
        return Rejection(index, path, number, None, None, reason, text)
    if _ESCAPED_SURROGATE.search(line):
        for name, value in event.items():
            if not _is_unicode(name) or not _is_unicode(value):
                reason = "expected Unicode text, but it holds half a character (an unpaired surrogate)"
                return Rejection(index, path, number, name, value, reason, event)
    return cast("dict[str, Any]", event)


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(cell: bytes | None) -> str:
    return "" if cell is None else cell.decode("utf-8", "backslashreplace")


def _numeric_cells(cells: pa.Array) -> tuple[pa.Array, list[int]]:
    missing = pc.is_in(cells, value_set=pa.array(_MISSING_NUMBERS, pa.binary()))
    held = pc.if_else(missing, pa.scalar(None, pa.binary()), cells)
    try:
        return pc.cast(pc.cast(held, pa.string()), pa.float64()), []
    except pa.ArrowException:
        values: list[float | None] = []
        faults = []
        for row, cell in enumerate(held.to_pylist()):
            text = _text(cell).strip()
            value = None if text in _MISSING_NUMBERS else parse_number(text)
            if value is None and text not in _MISSING_NUMBERS:
                faults.append(row)
            values.append(value)
        return pa.array(values, pa.float64()), faults


def _flag_cells(cells: pa.Array) -> tuple[pa.Array, list[int]]:
    values: list[bool | None] = []
    faults = []
    for row, cell in enumerate(cells.to_pylist()):
        text = _text(cell).strip()
        value = True if text in _TRUE else False if text in _FALSE else None
        if value is None and text not in _MISSING_NUMBERS:
            faults.append(row)
        values.append(value)
    return pa.array(values, pa.bool_()), faults


def _text_cells(cells: pa.Array) -> tuple[pa.Array, list[int]]:
    held = pc.if_else(pc.equal(cells, b""), pa.scalar(None, pa.binary()), cells)
    try:
        return pc.cast(held, pa.string()), []
    except pa.ArrowException:
        values: list[str | None] = []
        faults = []
        for row, cell in enumerate(held.to_pylist()):
            try:
                values.append(None if cell is None else cell.decode())
            except UnicodeDecodeError:
                values.append(None)
                faults.append(row)
        return pa.array(values, pa.string()), faults


def _time_cells(cells: pa.Array) -> tuple[pa.Array, list[int]]:
    numbers, faults = _numeric_cells(cells)
    if not faults:
        return numbers, []
    texts, undecodable = _text_cells(cells)
    seconds = seconds_of(texts.to_pylist())
    bad = np.isnan(seconds) & ~np.asarray(texts.is_null())
    faults = sorted({*undecodable, *np.flatnonzero(bad).tolist()})
    return pa.array(seconds, pa.float64(), from_pandas=True), faults


_CONVERTERS = {"numeric": _numeric_cells, "flag": _flag_cells, "text": _text_cells, "time": _time_cells}
_EXPECTED_CELL = {
    "numeric": "expected a number",
    "flag": "expected true or false",
    "text": "expected UTF-8 text",
    "time": "expected an event time: a number of seconds or an ISO 8601 timestamp",
}


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
