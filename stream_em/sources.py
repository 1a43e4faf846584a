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
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, TypeVar, cast

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

# Longest event of a CSV file. Arrow parses block by block, and an event must fit into one; without an end, a
# quote left open would take the rest of the file into memory.
_CSV_BLOCK = 1 << 20

Rows: TypeAlias = "pa.Table | list[dict[str, Any]]"
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

    """

    index: int
    path: str
    line: int | None
    field: str | None
    value: object
    reason: str
    event: object

    def __str__(self) -> str:
        place = f"{self.path}, event {self.index}" + ("" if self.line is None else f" (line {self.line})")
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
        Events that could not be read since the chunk before.

    """

    rows: Rows
    events: Rows
    label: pa.ChunkedArray | None
    time: npt.NDArray[np.float64] | None
    weight: npt.NDArray[np.float64] | None
    index: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64] | None
    files: tuple[tuple[str, int], ...]
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

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
        return Rejection(int(self.index[row]), self.path_of(row), line, field, value, reason, event)


@dataclass(frozen=True)
class _Piece:
    """What a reader hands over: rows of one file, and the events it could not read among them."""

    rows: pa.RecordBatch | list[dict[str, Any]]
    path: str
    index: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64] | None = None
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def slice(self, start: int, stop: int) -> _Piece:
        rows = self.rows[start:stop] if isinstance(self.rows, list) else self.rows.slice(start, stop - start)
        return _Piece(rows, self.path, self.index[start:stop], None if self.line is None else self.line[start:stop])


def _cut(pieces: list[_Piece], rows: int) -> tuple[list[_Piece], list[_Piece]]:
    """Split pieces after `rows` rows."""
    taken: list[_Piece] = []
    for position, piece in enumerate(pieces):
        if len(piece) >= rows:
            taken.append(piece.slice(0, rows))
            rest = [piece.slice(rows, len(piece))] if len(piece) > rows else []
            return taken, rest + pieces[position + 1 :]
        if len(piece):
            taken.append(piece)
            rows -= len(piece)
    return taken, []


class _Reader(Protocol):
    name: str
    paths: list[str]
    columnar: bool
    restartable: bool
    live: bool

    def pieces(self, rows: int, roles: Roles) -> Iterator[_Piece]: ...


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

    def __init__(self, reader: _Reader, roles: Roles, limit: int | None = None, left_out: Sequence[str] = ()) -> None:
        self._reader = reader
        self._roles = roles
        self._limit = limit
        self._started = False
        self.name = reader.name
        self.paths = () if reader.live else tuple(reader.paths)
        self.left_out = tuple(left_out)
        self.columnar = reader.columnar
        self.restartable = reader.restartable
        self.live = reader.live

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    def chunks(self, rows: int = 65_536) -> Iterator[Chunk]:
        """Read the events from the first, in chunks of `rows` events.

        Only the last chunk is smaller. A live source hands out a chunk once `rows` events have come, those that
        cannot be read counted, and so its chunks may be smaller too. If reading is interrupted (KeyboardInterrupt), the
        events read until then come in one more chunk before the interrupt goes on.

        Raises
        ------
        SourceError
            When there is no event at all, when a column is missing, when a file is damaged, and when a source
            that cannot be restarted is read a second time.

        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        if self._started and not self.restartable:
            raise SourceError(f"{self.name}: can be read only once; write it to a file first")
        self._started = True
        waiting: list[_Piece] = []
        rejected: list[Rejection] = []
        count = read = 0
        try:
            for piece in self._limited(self._reader.pieces(rows, self._roles)):
                rejected.extend(piece.rejected)
                read += len(piece) + len(piece.rejected)
                waiting.append(piece)
                count += len(piece)
                while count >= rows or (self.live and count):
                    taken, waiting = _cut(waiting, rows)
                    count -= min(rows, count)
                    yield self._chunk(taken, rejected)
                    rejected = []
        except KeyboardInterrupt:
            # A live stream is often stopped by hand: what came before the stop was read and counts.
            if count or rejected:
                yield self._chunk([piece for piece in waiting if len(piece)], rejected)
            raise
        if count or rejected:
            yield self._chunk([piece for piece in waiting if len(piece)], rejected)
        if not read:
            raise SourceError(f"{self.name}: holds no events")

    def _limited(self, pieces: Iterator[_Piece]) -> Iterator[_Piece]:
        if self._limit is None:
            yield from pieces
            return
        for piece in pieces:
            keep = int(np.searchsorted(piece.index, self._limit))
            early = tuple(rejection for rejection in piece.rejected if rejection.index < self._limit)
            cut = piece.slice(0, keep)
            yield _Piece(cut.rows, cut.path, cut.index, cut.line, early)
            read = keep + len(early)
            if read < len(piece) + len(piece.rejected) or (keep and piece.index[-1] + 1 >= self._limit):
                return

    def _chunk(self, pieces: list[_Piece], rejected: list[Rejection]) -> Chunk:
        roles = self._roles
        if not pieces:
            none = np.empty(0, np.int64)
            return Chunk([], [], None, None, None, none, None, (), tuple(rejected))
        index = np.concatenate([piece.index for piece in pieces])
        lines = [piece.line for piece in pieces if piece.line is not None]
        line = np.concatenate(lines) if lines else None
        files = tuple((piece.path, len(piece)) for piece in pieces)
        if isinstance(pieces[0].rows, list):
            dicts: list[dict[str, Any]] = [row for piece in pieces for row in piece.rows]
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
                tuple(rejected),
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
            tuple(rejected),
        )

    def _check_named(self, names: Collection[str], dicts: list[dict[str, Any]], path: str) -> None:
        # In a stream of dicts a field may be absent from an event; one that a role names should not be absent
        # from a whole chunk, least of all because its name has a typing error.
        if len(dicts) > 1 or not names:
            for name in (self._roles.label, self._roles.time, self._roles.weight):
                if name is not None and name not in names:
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
    reader: _Reader
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


class _Parquet:
    columnar = True
    restartable = True
    live = False

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name = name
        self.paths = paths

    def pieces(self, rows: int, roles: Roles) -> Iterator[_Piece]:
        expected: pa.Schema | None = None
        index = 0
        for path in self.paths:
            with _reading(path, "Parquet"):
                # Not pre-buffered: a reader that fetches whole row groups needs memory in proportion to them.
                file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
            with file:
                _check_columns(path, file.schema_arrow.names, roles)
                if expected is None:
                    expected = file.schema_arrow.remove_metadata()
                    columns = None
                else:
                    columns = _same_columns(path, file.schema_arrow, expected, roles, self.paths[0])
                for batch in _guarded(file.iter_batches(batch_size=rows, columns=columns), path, "Parquet"):
                    if columns is not None and not batch.schema.equals(expected):
                        batch = _cast_batch(batch, expected, path, self.paths[0])
                    if batch.num_rows:
                        yield _Piece(batch, path, np.arange(index, index + batch.num_rows))
                        index += batch.num_rows


class _Csv:
    columnar = True

    def __init__(self, name: str, paths: list[str], delimiter: str | None, stream: IO[bytes] | None = None) -> None:
        self.name = name
        self.paths = paths
        self.delimiter = delimiter
        self.stream = stream
        self.restartable = stream is None
        self.live = stream is not None

    def pieces(self, rows: int, roles: Roles) -> Iterator[_Piece]:
        columns: _CsvColumns | None = None
        index = 0
        for path in self.paths:
            with _reading(path, "CSV"):
                stream = _open_binary(path) if self.stream is None else self.stream
            with stream:
                delimiter = self.delimiter or ("\t" if ".tsv" in Path(path).suffixes else ",")
                names = _csv_header(stream, path, delimiter)
                if names is None:
                    continue
                _check_columns(path, names, roles)
                if columns is None:
                    columns = _CsvColumns(roles)
                elif set(columns.names) != set(names):
                    raise SourceError(_different_columns(path, names, columns.names, self.paths[0]))
                parse = _parse_live_csv if self.live else _parse_csv
                for block in parse(stream, path, names, delimiter, rows):
                    piece = columns.piece(block, path, names, index)
                    index += len(piece) + len(piece.rejected)
                    yield piece


def _csv_header(stream: IO[bytes], path: str, delimiter: str) -> list[str] | None:
    """Take the header off a stream: the names of the columns, or None where there is nothing at all."""

    def lines() -> Iterator[str]:
        encoding = "utf-8-sig"
        while line := stream.readline(_CSV_BLOCK):
            if len(line) == _CSV_BLOCK or b"\r" in line.rstrip(b"\r\n"):
                raise SourceError(
                    f"{path}: its first line has no end that CSV knows; lines must end in LF or CR LF, not in CR alone"
                )
            yield line.decode(encoding)
            encoding = "utf-8"

    with _reading(path, "CSV"):
        # The parser takes one line, or as many as a name in quotes has.
        return next((cells for cells in csv.reader(lines(), delimiter=delimiter, strict=True) if cells), None)


@dataclass(frozen=True)
class _CsvBlock:
    """Consecutive lines of a CSV file: cells as bytes, and the lines with the wrong number of cells."""

    cells: pa.RecordBatch
    lines: npt.NDArray[np.int64]
    ragged: list[tuple[int, int, str]]


def _parse_csv(stream: IO[bytes], path: str, names: list[str], delimiter: str, _: int) -> Iterator[_CsvBlock]:
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


def _parse_live_csv(stream: IO[bytes], path: str, names: list[str], delimiter: str, rows: int) -> Iterator[_CsvBlock]:
    """Parse line by line, and hand out the lines as soon as there are enough: Arrow would wait for more."""
    # Lines that are no UTF-8 pass through the parser and are found out when their cells are converted.
    texts = (line.decode("utf-8", "surrogateescape") for line in stream)
    parsed = (cells for cells in _guarded(csv.reader(texts, delimiter=delimiter), path, "CSV") if cells)
    for group in _groups(enumerate(parsed, 2), rows):
        whole = [(line, cells) for line, cells in group if len(cells) == len(names)]
        ragged = [(line, len(cells), delimiter.join(cells)) for line, cells in group if len(cells) != len(names)]
        columns = [
            [cell.encode("utf-8", "surrogateescape") for cell in column] for column in zip(*(c for _, c in whole))
        ]
        arrays = [pa.array(column, pa.binary()) for column in columns or [[]] * len(names)]
        lines = np.array([line for line, _ in whole], np.int64)
        yield _CsvBlock(pa.RecordBatch.from_arrays(arrays, names=names), lines, ragged)


class _CsvColumns:
    """Types of the columns of a CSV source, fixed by its first block, and the conversion of its cells."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.names: list[str] = []
        self.types: dict[str, str] = {}

    def piece(self, block: _CsvBlock, path: str, names: list[str], index: int) -> _Piece:
        """The typed events of a block of which the first has this index, and those that cannot be read."""
        if not self.types and block.cells.num_rows:
            self.names = names
            self.types = {name: self._type(name, block.cells[name]) for name in names}
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
        return _Piece(typed, path, positions, lines, tuple(rejected[number] for number in sorted(rejected)))

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

    def __init__(self, name: str, paths: list[str], stream: IO[bytes] | None = None) -> None:
        self.name = name
        self.paths = paths
        self.stream = stream
        self.restartable = stream is None
        self.live = stream is not None

    def pieces(self, rows: int, roles: Roles) -> Iterator[_Piece]:
        index = 0
        for path in self.paths:
            with _reading(path, "JSON Lines"):
                stream = _open_binary(path) if self.stream is None else self.stream
            with stream:
                for group in _groups(self._events(stream, path, index), rows):
                    index += len(group)
                    yield _gathered(path, group)

    def _events(self, stream: IO[bytes], path: str, index: int) -> Iterator[_Read]:
        for number, line in enumerate(_guarded(iter(stream), path, "JSON Lines"), 1):
            if not line.strip():
                continue
            if index == 0 and line.lstrip().startswith(b"["):
                raise SourceError(
                    f"{path}: begins with '[', so it is a JSON array; JSON Lines holds one object on each line"
                )
            yield index, number, _parse(line, index, path, number)
            index += 1


class _River:
    columnar = False
    restartable = True
    live = False
    paths: list[str] = []  # noqa: RUF012 - there never is one

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

    def pieces(self, rows: int, roles: Roles) -> Iterator[_Piece]:
        for group in _groups(self._events(), rows):
            yield _gathered(self.name, group)

    def _events(self) -> Iterator[_Read]:
        for index, (event, target) in enumerate(_guarded(iter(self.dataset), self.name)):
            if not isinstance(event, dict):
                raise SourceError(
                    f"{self.name}: its events are {type(event).__name__} and not named fields, so no mixture "
                    "model can be fitted to them"
                )
            if self.label in event:
                raise SourceError(f"{self.name}: has a field {self.label!r} already; give the label another name")
            yield index, None, {**event, self.label: target}


# An event as it is read: its position in the source, its line, and its fields or why it cannot be read.
_Read: TypeAlias = "tuple[int, int | None, dict[str, Any] | Rejection]"


def _gathered(path: str, group: list[_Read]) -> _Piece:
    """One piece of some events of a file."""
    good = [(index, line, event) for index, line, event in group if isinstance(event, dict)]
    numbered = any(line is not None for _, line, _ in group)
    return _Piece(
        [event for _, _, event in good],
        path,
        np.array([index for index, _, _ in good], np.int64),
        np.array([line for _, line, _ in good], np.int64) if numbered else None,
        tuple(event for _, _, event in group if isinstance(event, Rejection)),
    )


def _groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Lists of `size` items; the last is shorter, and so is the one in hand when reading is interrupted."""
    group: list[_Item] = []
    try:
        for item in items:
            group.append(item)
            if len(group) >= size:
                full, group = group, []
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


def _standard_input(format: str, delimiter: str | None) -> _Reader:  # noqa: A002
    stream = sys.stdin.buffer
    held = cast("IO[bytes]", _Unclosed(stream))
    if format == "parquet":
        raise SourceError("standard input: Parquet needs a file, because its index stands at the end")
    if format == "auto":
        start = cast("io.BufferedReader", stream).peek(1)
        format = "jsonl" if start.lstrip()[:1] in (b"{", b"[") else "csv"  # noqa: A001
    if format == "jsonl":
        return _JsonLines("standard input", ["standard input"], held)
    return _Csv("standard input", ["standard input"], delimiter, held)


class _Unclosed:
    """Standard input as a stream whose `with` block does not close it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __enter__(self) -> _Unclosed:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[bytes]:
        # `readline` and not the stream's own iterator: lines are handed on as they come.
        return iter(self._stream.readline, b"")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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


def _parse(line: bytes, index: int, path: str, number: int) -> dict[str, Any] | Rejection:
    """The object on a JSON line, or why it is no event."""
    reason = ""
    event: Any = None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"expected a JSON object, but the line does not parse: {error}"
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
