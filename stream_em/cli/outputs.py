"""The files a job writes. Each is written under another name and renamed when the job has succeeded."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stream_em.schema import Schema
from stream_em.sources import Chunk, Rejection, SourceError

# Rows that are gathered before they are written: fewer make a Parquet file of many small row groups, slow to
# read; more cost memory.
ROW_GROUP = 65_536


class OutputError(ValueError):
    """A file that cannot be written."""


class PendingFile:
    """A file that gets its name only by `commit`; until then no other job can write it.

    Attributes
    ----------
    path
        The name it will have.
    pending
        The name it has until then, in the same folder and with the same suffix. It is always the same name, so
        that what a killed job left behind is replaced by the next.

    Raises
    ------
    OutputError
        When another job is writing the file.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pending = self.path.with_name(f".pending-{self.path.name}")
        self._lock = _lock(self.pending)
        self._open = True

    def commit(self) -> None:
        """Give the file its name, replacing an older one."""
        self.pending.replace(self.path)
        self._release()

    def discard(self) -> None:
        """Remove the file, unless it has its name."""
        if self._open:
            self.pending.unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        self._open = False
        if self._lock is not None:
            os.close(self._lock)


def _lock(path: Path) -> int | None:
    """Create a file and lock it until the descriptor is closed or the process ends, however it ends."""
    if sys.platform == "win32":
        return None
    from fcntl import LOCK_EX, LOCK_NB, flock

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{path.with_name(path.name.removeprefix('.pending-'))}: another job is writing this file now; wait "
                "for it, or set another output.folder"
            ) from None
        except OSError:
            # The file system has no locks.
            os.close(descriptor)
            return None
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        # The job that had the lock has just renamed or removed the file.
        os.close(descriptor)


def is_scored(path: Path, prefix: str) -> bool:
    """Whether a file holds scored events, with the names that a job with this prefix gives the scores."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        return False
    return prefix + "component" in names and prefix + "log_prob" in names


def is_quarantine(path: Path) -> bool:
    """Whether a file holds events that could not be used, or nothing."""
    try:
        with path.open("rb") as stream:
            line = stream.readline()
        return not line or json.loads(line).keys() >= {"index", "source", "field", "value", "reason", "event"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


class Quarantine:
    """Events that could not be used, one JSON object on each line, with the place and the reason."""

    def __init__(self, path: str | Path) -> None:
        self._file = PendingFile(path)
        # Half a character (an unpaired surrogate) has no UTF-8; replaced like this, it is an escape of JSON.
        self._stream: IO[str] = self._file.pending.open("w", encoding="utf-8", errors="backslashreplace")
        self.path = self._file.path
        self.count = 0
        self.reasons: Counter[str] = Counter()

    def add(self, rejection: Rejection) -> None:
        """Write one event."""
        place = {"index": rejection.index, "source": rejection.path}
        if rejection.line is not None:
            place["line"] = rejection.line
        record = {
            **place,
            "field": rejection.field,
            "value": rejection.value,
            "reason": rejection.reason,
            "event": rejection.event,
        }
        try:
            text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
        except RecursionError:
            record |= dict.fromkeys(("value", "event"), "nested too deeply to be written")
            text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
        self._stream.write(text + "\n")
        self.count += 1
        self.reasons[f"{rejection.field}: {rejection.reason}" if rejection.field else rejection.reason] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._stream.close()
        if kind is None:
            self._file.commit()
        else:
            self._file.discard()


class ScoredEvents:
    """A Parquet file of events with `component`, `log_prob` and, on request, a column per responsibility.

    Parameters
    ----------
    path
        Name of the file.
    schema
        Fields of the model: they fix the types of events that come as dicts.
    carried
        Other columns of events that come as dicts: label, event time, weight, excluded ones.
    prefix
        Put before the names of the added columns.
    responsibilities
        Whether to write them.

    Attributes
    ----------
    left_out
        Values of dict events that the file has no column or no type for, by field. Its columns are fixed when
        the first events are written.

    """

    def __init__(
        self,
        path: str | Path,
        schema: Schema,
        carried: Mapping[str, str],
        *,
        prefix: str = "",
        responsibilities: bool = False,
    ) -> None:
        self._file = PendingFile(path)
        self.path = self._file.path
        self.left_out: Counter[str] = Counter()
        self._schema = schema
        self._carried = carried
        self._prefix = prefix
        self._with_responsibilities = responsibilities
        self._columns: pa.Schema | None = None
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0
        self.count = 0

    def add(
        self,
        chunk: Chunk,
        kept: npt.NDArray[np.intp] | slice,
        component: npt.NDArray[np.int64],
        log_prob: npt.NDArray[np.float64],
        responsibilities: npt.NDArray[np.float64] | None,
        component_ids: Sequence[int],
        unknown: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Write the events of a chunk at the positions `kept`, with the model's answers (n,) for them.

        Where `unknown` (n,) is true there was no mixture yet, and null is written for its answers.
        """
        if len(log_prob) == 0:
            return
        if isinstance(chunk.rows, list):
            rows = self._table(chunk, kept)
        elif isinstance(kept, slice):
            rows = chunk.rows.slice(kept.start or 0, len(log_prob))
        else:
            rows = chunk.rows.take(pa.array(kept))
        added: dict[str, npt.NDArray[Any]] = {"component": component, "log_prob": log_prob}
        if self._with_responsibilities and responsibilities is not None:
            for position, identity in enumerate(component_ids):
                added[f"responsibility_{identity}"] = np.ascontiguousarray(responsibilities[:, position])
        for name, values in added.items():
            column = self._prefix + name
            if column in rows.column_names:
                raise SourceError(
                    f"{chunk.path_of(0)}: has a column {column!r} already; set output.prefix to write the "
                    "scores under other names"
                )
            rows = rows.append_column(column, pa.array(values, mask=unknown))
        self._waiting.append(rows)
        self._n_waiting += rows.num_rows
        self.count += rows.num_rows
        if self._n_waiting >= ROW_GROUP:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        table = self._waiting[0] if len(self._waiting) == 1 else pa.concat_tables(self._waiting)
        if self._writer is None:
            # Measurements seldom repeat: a dictionary of them is built at great cost, only to be given up.
            repeating = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
            self._writer = pq.ParquetWriter(self._file.pending, table.schema, use_dictionary=repeating)
        self._writer.write_table(table, row_group_size=2 * ROW_GROUP)
        self._waiting, self._n_waiting = [], 0

    def _table(self, chunk: Chunk, kept: npt.NDArray[np.intp] | slice) -> pa.Table:
        """Dict events as a table with the columns of the first chunk."""
        positions = np.arange(len(chunk))[kept]
        rows: list[dict[str, Any]] = [chunk.rows[position] for position in positions.tolist()]
        if self._columns is None:
            types = {field.name: _ARROW_TYPE[field.kind] for field in self._schema.fields}
            extra = dict.fromkeys(name for row in rows for name in row)
            for name in dict.fromkeys([*extra, *self._carried]):
                role = self._carried.get(name)
                if name not in types:
                    number = role in ("time", "weight")
                    types[name] = pa.float64() if number else pa.string()
                    if role == "label" and chunk.label is not None and not pa.types.is_null(chunk.label.type):
                        types[name] = chunk.label.type
            self._columns = pa.schema(list(types.items()))
        known = set(self._columns.names)
        for row in rows:
            if not row.keys() <= known:
                self.left_out.update(row.keys() - known)
        arrays = []
        for column in self._columns:
            role = self._carried.get(column.name)
            if role == "time" and chunk.time is not None:
                values: Any = chunk.time[positions]
            elif role == "weight" and chunk.weight is not None:
                values = chunk.weight[positions]
            else:
                values = [row.get(column.name) for row in rows]
                values = [None if value is None else self._as(column, value) for value in values]
            arrays.append(pa.array(values, column.type, from_pandas=True))
        return pa.Table.from_arrays(arrays, schema=self._columns)

    def _as(self, column: pa.Field, value: Any) -> Any:
        """A value in the type of its column; None, and counted, if it cannot be."""
        try:
            if pa.types.is_string(column.type):
                return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)
            if pa.types.is_boolean(column.type):
                return None if value != value else bool(value)
            if pa.types.is_floating(column.type):
                return float(value)
            return pa.scalar(value, column.type).as_py()
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            self.left_out[column.name] += 1
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            if self._writer is not None:
                self._writer.close()
        if kind is None and self._writer is not None:
            self._file.commit()
        else:
            self._file.discard()


_ARROW_TYPE = {
    "numeric": pa.float64(),
    "count": pa.float64(),
    "duration": pa.float64(),
    "flag": pa.bool_(),
    "category": pa.string(),
}


def _plain(value: Any) -> Any:
    """The same value with everything that JSON has no form for turned into text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return value.item() if isinstance(value, np.generic) else str(value)
