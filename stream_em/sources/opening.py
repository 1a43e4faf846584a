"""Opening a source by its path or name."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

from stream_em.columns import Roles
from stream_em.sources.delimited import CsvFiles, CsvStream
from stream_em.sources.faults import SourceError
from stream_em.sources.files import FORMATS, ByteStream, find_files, format_of
from stream_em.sources.json_lines import JsonLines
from stream_em.sources.parquet import ParquetFiles
from stream_em.sources.pieces import Reader
from stream_em.sources.river_data import RiverDataset
from stream_em.sources.source import Source

STANDARD_INPUT = "-"
_PARQUET_START = b"PAR1"


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
    quote: str | None = '"',
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
    quote
        What CSV cells that hold separators or line breaks stand between. Empty or None: nothing, and quotes are
        ordinary characters.
    limit
        Stop after this many events.
    leave_out
        Files not to read where a folder or a pattern stands for them too. A file that `path` names is read.

    Raises
    ------
    SourceError
        When there is nothing to read at `path`, the format cannot be told, or it has no cells to separate or quote.

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
    quote = quote or None
    if river is not None:
        _check_cells("a River data set", delimiter, quote)
        roles = Roles(label or "label", time, weight, tuple(exclude), None if only is None else tuple(only))
        return Source(RiverDataset(river, label or "label"), roles, limit)
    kinds = dict(fields or {})
    roles = Roles(label, time, weight, tuple(exclude), None if only is None else tuple(only), kinds)
    given = [path] if isinstance(path, (str, Path)) else list(path or ())
    if any(str(item) == STANDARD_INPUT for item in given):
        if len(given) > 1:
            raise SourceError("standard input ('-') cannot be mixed with files")
        return Source(_standard_input(format, delimiter, quote), roles, limit)
    paths, left_out = find_files(given, format, leave_out)
    kind = format_of(paths) if format == "auto" else format
    _check_cells(kind, delimiter, quote)
    reader: Reader
    if kind == "parquet":
        reader = ParquetFiles(_name(given), paths)
    elif kind == "csv":
        reader = CsvFiles(_name(given), paths, delimiter, quote)
    else:
        reader = JsonLines(_name(given), paths)
    return Source(reader, roles, limit, left_out)


def _name(given: Sequence[str | Path]) -> str:
    return str(given[0]) if len(given) == 1 else f"{given[0]} and {len(given) - 1} more"


def _check_cells(kind: str, delimiter: str | None, quote: str | None) -> None:
    """Refuse signs that no CSV file can have, and those of a source that has no cells."""
    given = {"delimiter": delimiter not in (None, ""), "quote": quote != '"'}
    if kind != "csv":
        for name in (name for name, is_given in given.items() if is_given):
            raise SourceError(f"{name} is for CSV, and the source is {kind}; leave it out")
    for name, sign in (("delimiter", delimiter), ("quote", quote)):
        if sign and (len(sign) > 1 or not sign.isascii() or sign in "\r\n"):
            raise SourceError(f"{name}: expected one ASCII character within a line, got {sign!r}")
    if quote and quote in (delimiter or ",\t"):
        raise SourceError(f"quote: {quote!r} separates the cells; set another, or none")


def _standard_input(format: str, delimiter: str | None, quote: str | None) -> Reader:  # noqa: A002
    stream = sys.stdin.buffer
    start = cast("io.BufferedReader", stream).peek(1) if format == "auto" else b""
    if format == "parquet" or start.startswith(_PARQUET_START):
        raise SourceError("standard input: Parquet needs a file, because its index stands at the end")
    if format == "auto":
        format = "jsonl" if start.lstrip()[:1] in (b"{", b"[") else "csv"  # noqa: A001
    _check_cells(format, delimiter, quote)
    held = ByteStream(stream, "standard input")
    return JsonLines(held.name, [held.name], held) if format == "jsonl" else CsvStream(held, delimiter, quote)
