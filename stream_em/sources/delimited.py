"""CSV and TSV, files and streams, as pieces of a stream of events: the types of columns, and cells that do not fit."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from stream_em.columns import Roles, parse_number, seconds_of
from stream_em.sources.faults import (
    LONGEST_CSV_EVENT,
    OPEN_QUOTE,
    SourceError,
    check_columns,
    different_columns,
    guarded,
    reading,
)
from stream_em.sources.files import ByteStream, files_after, open_binary
from stream_em.sources.pieces import Piece, Position, Rejection, grouped

# What common writers put into a numeric cell that holds nothing. Not for categories: "NA" is Namibia.
_MISSING_NUMBERS = ("", "NA", "N/A", "NaN", "nan", "-nan", "null", "NULL", "None", "#N/A")
_TRUE = ("true", "True", "TRUE", "1", "1.0")
_FALSE = ("false", "False", "FALSE", "0", "0.0")

# A CSV column nobody declared is a number when this share of its cells in the first block are numbers. Not
# all of them: then a single bad cell would turn a sensor reading into a category.
_SHARE_OF_NUMBERS = 0.9
_NUMERIC_KINDS = ("numeric", "count", "duration")

# Bytes at the end of what is read at once, among which is one that is no line break.
_LONGEST_END = 64

# Where they stand in the name of the only column, the cells are not separated as was assumed.
_DELIMITERS = (";", "\t", "|", ",")


class CsvFiles:
    """Files, parsed by Arrow, from their start even where a position lies further on: to find cells takes little."""

    columnar = True
    restartable = True
    live = False
    least_events = 0

    def __init__(self, name: str, paths: list[str], delimiter: str | None, quote: str | None) -> None:
        self.name = name
        self.paths: Sequence[str] = paths
        self.delimiter = delimiter
        self.quote = quote

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:  # noqa: D102 - as Reader's
        columns = _CsvColumns.at(after, roles)
        index = after.get("first", 0)
        for path, place in files_after(self.paths, after):
            with reading(path, "CSV"):
                stream = open_binary(path)
            with stream:
                delimiter = self.delimiter or ("\t" if ".tsv" in Path(path).suffixes else ",")
                names, _ = _csv_header(stream, path, delimiter, self.quote, assumed=self.delimiter is None)
                if names is None:
                    continue
                check_columns(path, names, roles)
                if columns is None:
                    columns = _CsvColumns(roles, names)
                elif set(columns.names) != set(names):
                    raise SourceError(different_columns(path, names, columns.names, self.paths[0]))
                place = {**place, "first": index}
                for block in _parse_csv(stream, path, names, delimiter, self.quote):
                    if index + len(block) > after.get("index", 0):
                        yield columns.piece(block, path, names, index, place)
                    index += len(block)


class CsvStream:
    """Standard input, parsed line by line: Arrow would wait for more than the events that have come."""

    columnar = True
    restartable = False
    live = True
    least_events = 0

    def __init__(self, stream: ByteStream, delimiter: str | None, quote: str | None) -> None:
        self.name = stream.name
        self.paths: Sequence[str] = [stream.name]
        self.delimiter = delimiter or ","
        self.assumed = delimiter is None
        self.quote = quote
        self.stream = stream

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:  # noqa: D102 - as Reader's
        index, line = after.get("from", 0), after.get("line", 1)
        columns = _CsvColumns.at(after, roles)
        self.stream.skip(after)
        if columns is None:
            names, header = _csv_header(self.stream, self.name, self.delimiter, self.quote, assumed=self.assumed)
            if names is None:
                return
            check_columns(self.name, names, roles)
            columns = _CsvColumns(roles, names)
            self.stream.taken(header)
        names = columns.names
        for group in grouped(self._lines(line), rows, index):
            whole: list[_CsvLine] = []
            wrong: list[_CsvLine] = []
            for one in group:
                left_open = _goes_on(one.cells[-1], one.raw.rstrip(b"\r\n"), self.quote)
                (wrong if len(one.cells) != len(names) or left_open else whole).append(one)
            cells = [one.cells for one in whole]
            arrays = [pa.array(column, pa.binary()) for column in zip(*cells)] or [pa.array([], pa.binary())] * len(
                names
            )
            block = _CsvBlock(
                pa.RecordBatch.from_arrays(arrays, names=names),
                np.array([one.line for one in whole], np.int64),
                [(one.line, len(one.cells), _text(one.raw.strip(b"\r\n"))) for one in wrong],
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

        for cells in guarded(_csv_lines(texts(), self.delimiter, self.quote), self.name, "CSV"):
            if cells:
                line += 1
                yield _CsvLine(line, [cell.encode("utf-8", "surrogateescape") for cell in cells], b"".join(raw))
                raw.clear()


class _CsvLine(NamedTuple):
    """An event of a CSV stream: its line, its cells, and all the bytes since the event before."""

    line: int
    cells: list[bytes]
    raw: bytes


def _csv_lines(lines: Iterator[str], delimiter: str, quote: str | None, *, strict: bool = False) -> Iterator[list[str]]:
    if quote is None:
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=strict)
    return csv.reader(lines, delimiter=delimiter, quotechar=quote, strict=strict)


def _csv_header(
    stream: IO[bytes] | ByteStream, path: str, delimiter: str, quote: str | None, *, assumed: bool
) -> tuple[list[str] | None, bytes]:
    """Take the header off a stream: the names of the columns, None where there is nothing at all, and its bytes.

    A delimiter that nobody has named, but that is `assumed`, must not leave one column whose name holds another.
    """
    raw: list[bytes] = []

    def lines() -> Iterator[str]:
        encoding = "utf-8-sig"
        while line := stream.readline(LONGEST_CSV_EVENT):
            if len(line) == LONGEST_CSV_EVENT or b"\r" in line.rstrip(b"\r\n"):
                raise SourceError(
                    f"{path}: its first line has no end that CSV knows; lines must end in LF or CR LF, not in CR alone"
                )
            raw.append(line)
            yield line.decode(encoding)
            encoding = "utf-8"

    with reading(path, "CSV"):
        # The parser takes one line, or as many as a name in quotes has.
        names = next((cells for cells in _csv_lines(lines(), delimiter, quote, strict=True) if cells), None)
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


class _Tail:
    """A stream that remembers how what was read of it ends, line breaks left out."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.tail = content[-_LONGEST_END:].rstrip(b"\r\n")[-1:] or self.tail
        return content

    def close(self) -> None:
        """Leave the stream to whoever opened it."""


def _with_last(blocks: Iterator[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, bool]]:
    """Yield each block with whether it is the last one that holds a row."""
    before: pa.RecordBatch | None = None
    for block in blocks:
        if block.num_rows:
            if before is not None:
                yield before, False
            before = block
    if before is not None:
        yield before, True


def _goes_on(cell: bytes, tail: bytes, quote: str | None) -> bool:
    """Whether the last cell of an event goes on to where the source ended, for want of a quote in its tail."""
    return quote is not None and b"\n" in cell and not tail.endswith(quote.encode())


def _left_open(block: pa.RecordBatch, tail: bytes, delimiter: str, quote: str | None) -> str | None:
    """Return the text of the last event where its last cell goes on to the end of the source for want of a quote."""
    cells = [column[-1].as_py() or b"" for column in block.columns]
    if quote is None or not _goes_on(cells[-1], tail, quote):
        return None
    return _text(delimiter.encode().join([*cells[:-1], quote.encode() + cells[-1]]))


def _parse_csv(
    stream: IO[bytes], path: str, names: list[str], delimiter: str, quote: str | None
) -> Iterator[_CsvBlock]:
    """Parse by Arrow, in blocks of its own choice."""
    ragged: list[tuple[int, int, str]] = []

    def skip(row: Any) -> str:
        # Row 1 is the first after the header, which has been taken off the stream.
        ragged.append((row.number + 1, row.actual_columns, row.text))
        return "skip"

    schema = pa.schema([(name, pa.binary()) for name in names])
    held = _Tail(stream)
    try:
        with reading(path, "CSV"):
            reader = pa_csv.open_csv(
                pa.PythonFile(held, mode="r"),
                # One thread: only then does Arrow number the rows it hands to `skip`.
                read_options=pa_csv.ReadOptions(use_threads=False, column_names=names, block_size=LONGEST_CSV_EVENT),
                parse_options=pa_csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char=quote or False,
                    invalid_row_handler=skip,
                    newlines_in_values=quote is not None,
                ),
                # As bytes: a cell that is no number, or no UTF-8, must cost its own row and not the run.
                convert_options=pa_csv.ConvertOptions(column_types=schema),
            )
    except SourceError as error:
        if "Empty CSV" in str(error):
            return
        raise
    line = 2
    for block, is_last in _with_last(guarded(iter(reader), path, "CSV")):
        text = _left_open(block, held.tail, delimiter, quote) if is_last else None
        if text is not None:
            number = line + block.num_rows - 1 + len(ragged)
            ragged.append((number, len(names), text))
            block = block.slice(0, block.num_rows - 1)
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
                _wrong_cells(len(names), n_cells) + _spanned(text),
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
                    spanned = _spanned("".join(event.values())) if "\n" in event[name] else ""
                    reason = _EXPECTED_CELL[kind] + spanned
                    rejected[number] = Rejection(int(positions[row]), path, number, name, event[name], reason, event)
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


def _wrong_cells(expected: int, got: int) -> str:
    if got == expected:
        return "expected the end of a cell in quotes, and the source ended first"
    return f"expected {expected} cells as in the header, got {got}"


def _spanned(text: str) -> str:
    """What to add to the reason where an event spans several lines."""
    n_lines = 1 + text.rstrip("\r\n").count("\n")
    return f"; {OPEN_QUOTE}: this event spans {n_lines:,} lines" if n_lines > 1 else ""


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
