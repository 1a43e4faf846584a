"""The files a job writes. Each is written under another name and renamed when the job has succeeded."""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stream_em.arrays import arrow_numbers
from stream_em.cli.segments import SegmentedParquet
from stream_em.plain import plain
from stream_em.schema import Schema
from stream_em.sources import Chunk, Rejection, SourceError

# Rows that are gathered before they are written: fewer make a Parquet file of many small row groups, slow to
# read; more cost memory.
ROW_GROUP = 65_536

# Different reasons, and different fields, that are counted by themselves, and characters by which they differ: hostile
# events may bring any number.
_MOST_COUNTED = 1_000
_LONGEST_COUNTED = 200
_OTHERS = "others"

# Bytes by whose digest the end of a file is known again.
_TAIL = 4_096

Committed: TypeAlias = dict[str, Any]
"""What is needed to go on with an output after a place in it, as JSON can hold it."""


class OutputError(ValueError):
    """A file that cannot be written."""


class Output(Protocol):
    """What a job writes as it goes, and can go on with after it was killed.

    It is made with the last thing that `commit` returned, or None for a new one: what it was given since then has never
    been. It ends by `publish` or by `close`.
    """

    def commit(self) -> Committed:
        """Make sure that nothing of what was written until now is lost, and return the place."""
        ...

    def publish(self) -> None:
        """Make the whole available to others, under its own name."""
        ...

    def close(self, *, keep: bool) -> None:
        """End early; `keep` what can be gone on with, or leave nothing behind."""
        ...


class ScoreSink(Output, Protocol):
    """Where scored events go.

    Attributes
    ----------
    count
        Events written.
    left_out
        Values that it had no place for, by field.

    """

    count: int
    left_out: Counter[str]

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    def add(self, scored: ScoredRows) -> None:
        """Write some events."""
        ...


@dataclass(frozen=True)
class ScoredRows:
    """Events of a chunk, and what the model says of them.

    Attributes
    ----------
    chunk
        Where they are from.
    kept
        (n,) their rows in it, ascending; it may hold others, which could not be used.
    unknown
        (n,) whether there was no mixture yet, so that the answers mean nothing.
    log_prob, component
        (n,) log-density, and id of the most responsible component.
    responsibilities
        (n, K), or None where nobody asked for them.
    component_ids
        (K,)

    """

    chunk: Chunk
    kept: npt.NDArray[np.intp]
    unknown: npt.NDArray[np.bool_]
    log_prob: npt.NDArray[np.float64]
    component: npt.NDArray[np.int64]
    responsibilities: npt.NDArray[np.float64] | None
    component_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.kept)

    def answers(self, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
        """What the model says of each event (n,), by the name of the column or field that it goes to."""
        answers: dict[str, npt.NDArray[Any]] = {"component": self.component, "log_prob": self.log_prob}
        if self.responsibilities is not None:
            for position, identity in enumerate(self.component_ids):
                answers[f"responsibility_{identity}"] = np.ascontiguousarray(self.responsibilities[:, position])
        return {prefix + name: values for name, values in answers.items()}


class PendingFile:
    """A file that gets its name only by `publish`; until then no other job can write it.

    Attributes
    ----------
    path
        The name it will have.
    pending
        The name it has until then, in the same folder and with the same suffix. It is always the same name, so
        that what a killed job left behind is gone on with, or replaced, by the next.

    Raises
    ------
    OutputError
        When another job is writing the file.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pending = _pending_name(self.path)
        self._lock = _lock(self.pending)
        self._open = True

    def publish(self) -> None:
        """Give the file its name, replacing an older one."""
        self.pending.replace(self.path)
        self._release()

    def discard(self, *, keep: bool = False) -> None:
        """Remove the file, unless it has its name; or `keep` it and let others write it."""
        if self._open:
            if not keep:
                self.pending.unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        self._open = False
        if self._lock is not None:
            os.close(self._lock)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other jobs from writing a file while the block runs, without a pending file of one's own.

    Raises
    ------
    OutputError
        When another job is writing the file.

    """
    file = PendingFile(path)
    try:
        yield
    finally:
        file.discard()


def is_pending(path: Path) -> bool:
    """Whether a job writes this file now, or was killed while it did."""
    return _pending_name(path).exists()


def _pending_name(path: Path) -> Path:
    return path.with_name(f".pending-{path.name}")


class GrowingFile(PendingFile):
    """A pending file that is only appended to, and gone on with after its writer was killed.

    Parameters
    ----------
    path
        The name it will have.
    after
        What `commit` returned: the file is cut off there. None for an empty file.

    Attributes
    ----------
    stream
        The file, at its end.

    Raises
    ------
    OutputError
        When another job is writing the file, or it is no longer there as it was.

    """

    def __init__(self, path: str | Path, after: Committed | None = None) -> None:
        path = Path(path)
        if after is not None and not _pending_name(path).exists():
            # The job was stopped, or killed on the point of ending: the file has its name already.
            with suppress(FileNotFoundError):
                path.replace(_pending_name(path))
        super().__init__(path)
        self.pending.touch()
        self.stream: IO[bytes] = self.pending.open("r+b")
        length = 0 if after is None else after["length"]
        if after is not None and self._tail(length) != after["tail"]:
            self.discard(keep=self.pending.stat().st_size > 0)
            raise OutputError(
                f"{path}: the first {length:,} bytes, which the job has written, are not there as they were; put them "
                "back, or start anew with --fresh"
            )
        self.stream.truncate(length)
        self.stream.seek(length)

    def commit(self) -> Committed:
        """Make sure that the file is on disk, and return where it ends."""
        self._sync()
        length = self.stream.seek(0, os.SEEK_END)
        tail = self._tail(length)
        self.stream.seek(length)
        return {"length": length, "tail": tail}

    def publish(self) -> None:  # noqa: D102 - inherited
        self._sync()
        self.stream.close()
        super().publish()

    def discard(self, *, keep: bool = False) -> None:  # noqa: D102 - inherited
        # What could not be written, on a full disk, is not wanted any more.
        with suppress(OSError):
            self.stream.close()
        super().discard(keep=keep)

    def _sync(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def _tail(self, length: int) -> str:
        start = max(0, length - _TAIL)
        self.stream.seek(start)
        return hashlib.blake2b(self.stream.read(length - start), digest_size=16).hexdigest()


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


def _numbered(path: Path, number: str) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def scored_files(path: Path, prefix: str) -> list[Path]:
    """Files of scored events of this name that are there, the numbered ones included, whichever job wrote them."""
    digits = "[0-9]" * 6
    pattern = _numbered(Path(glob.escape(path.name)), digits).name
    return [one for one in (path, *sorted(path.parent.glob(pattern))) if is_scored(one, prefix)]


def is_quarantine(path: Path) -> bool:
    """Whether a file holds events that could not be used, or nothing."""
    try:
        with path.open("rb") as stream:
            line = stream.readline()
        return not line or json.loads(line).keys() >= {"index", "source", "field", "value", "reason", "event"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


class _OfOneJob(ABC):
    """An output that a `with` block publishes, unless it fails: then it leaves nothing behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is not None:
            self.close(keep=False)
            return
        try:
            self.publish()
        except BaseException:
            self.close(keep=False)
            raise

    @abstractmethod
    def publish(self) -> None: ...

    @abstractmethod
    def close(self, *, keep: bool) -> None: ...


class Quarantine(_OfOneJob):
    """Events that could not be used, one JSON object on each line, with the place and the reason.

    Parameters
    ----------
    path
        Name of the file.
    after
        What `commit` returned, to go on there.

    Attributes
    ----------
    count
        Events written.
    reasons
        How many of them for which reason; those after the first thousand count as others.
    first
        The first of them that this process has set aside, as text, or None.

    """

    def __init__(self, path: str | Path, after: Committed | None = None) -> None:
        self._file = GrowingFile(path, after)
        self.path = self._file.path
        self.count: int = 0 if after is None else after["count"]
        self.reasons: Counter[str] = Counter({} if after is None else after["reasons"])
        self.first: str | None = None

    def add(self, rejection: Rejection) -> None:
        """Write one event."""
        place = {"index": rejection.index, "source": rejection.path}
        if rejection.line is not None:
            place["line"] = rejection.line
        if rejection.offset is not None:
            place["partition"], place["offset"] = rejection.offset
        record = {
            **place,
            "field": rejection.field,
            "value": rejection.value,
            "reason": rejection.reason,
            "event": rejection.event,
        }
        try:
            text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        except RecursionError:
            record |= dict.fromkeys(("value", "event"), "nested too deeply to be written")
            text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        # Half a character (an unpaired surrogate) has no UTF-8; replaced like this, it is an escape of JSON.
        self._file.stream.write(f"{text}\n".encode("utf-8", "backslashreplace"))
        self.count += 1
        if self.first is None:
            self.first = str(rejection)
        _count(self.reasons, f"{rejection.field}: {rejection.reason}" if rejection.field else rejection.reason)

    def commit(self) -> Committed:  # noqa: D102 - see `Output`
        return {**self._file.commit(), "count": self.count, "reasons": dict(self.reasons)}

    def publish(self) -> None:  # noqa: D102 - see `Output`
        self._file.publish()

    def close(self, *, keep: bool) -> None:  # noqa: D102 - see `Output`
        self._file.discard(keep=keep)


def _count(counter: Counter[str], key: str) -> None:
    key = key[:_LONGEST_COUNTED]
    counter[key if key in counter or len(counter) < _MOST_COUNTED else _OTHERS] += 1


class ScoredEvents(_OfOneJob):
    """Parquet files of events with `component`, `log_prob` and, where they are given, a column per responsibility.

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
    roll_events
        Begin a new file at the first commit after so many events; the files are numbered then. None for one file.
    after
        What `commit` returned, to go on there.

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
        roll_events: int | None = None,
        after: Committed | None = None,
    ) -> None:
        self._path = Path(path)
        if after is None and roll_events is not None:
            # Of an earlier job there may be more files than this one will write.
            for old in scored_files(self._path, prefix):
                if old != self._path:
                    old.unlink()
        self._schema = schema
        self._carried = carried
        self._prefix = prefix
        self._roll_events = roll_events
        state = after or {"number": 1, "count": 0, "in_file": 0, "left_out": {}, "ends": [], "schema": None}
        self._number: int = state["number"]
        self.count: int = state["count"]
        self._in_file: int = state["in_file"]
        self.left_out: Counter[str] = Counter(state["left_out"])
        self._file = self._file_at(after)
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0
        self._columns: pa.Schema | None = None
        self._file_schema: pa.Schema | None = None
        self._parquet: SegmentedParquet | None = None
        if state["schema"] is not None:
            self._file_schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(state["schema"])))
            self._parquet = SegmentedParquet(self._file.pending, self._file_schema, state["ends"])
            self._columns = pa.schema(list(self._file_schema)[: self._file_schema.names.index(f"{prefix}component")])

    @property
    def name(self) -> str:
        """Name of the file, or pattern of the names of the files."""
        return str(self._path if self._roll_events is None else _numbered(self._path, "*"))

    def _file_at(self, after: Committed | None) -> GrowingFile:
        rolls = self._roll_events is not None
        return GrowingFile(_numbered(self._path, f"{self._number:06}") if rolls else self._path, after)

    def add(self, scored: ScoredRows) -> None:
        """Write some events of a chunk, with null for the answers that are unknown."""
        if not len(scored):
            return
        chunk, kept = scored.chunk, scored.kept
        if isinstance(chunk.rows, list):
            rows = self._table(chunk, kept)
        elif len(kept) == kept[-1] - kept[0] + 1:
            rows = chunk.rows.slice(int(kept[0]), len(kept))
        else:
            rows = chunk.rows.take(arrow_numbers(kept))
        for name, values in scored.answers(self._prefix).items():
            if name in rows.column_names:
                raise SourceError(
                    f"{chunk.path_of(0)}: has a column {name!r} already; set output.prefix to write the "
                    "scores under other names"
                )
            rows = rows.append_column(name, arrow_numbers(values, scored.unknown))
        self._waiting.append(rows)
        self._n_waiting += rows.num_rows
        self._in_file += rows.num_rows
        self.count += rows.num_rows
        if self._n_waiting >= ROW_GROUP:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        if self._file_schema is None:
            # Without what the source's files say of their columns, which depends on where reading begins.
            self._file_schema = pa.schema(
                [pa.field(one.name, one.type, one.nullable) for one in self._waiting[0].schema]
            )
        if self._parquet is None:
            self._parquet = SegmentedParquet(self._file.pending, self._file_schema)
        self._parquet.write(pa.concat_tables(self._waiting), 2 * ROW_GROUP)
        self._waiting, self._n_waiting = [], 0

    def commit(self) -> Committed:  # noqa: D102 - see `Output`
        self._write()
        if self._parquet is not None:
            self._parquet.end_segment()
            if self._roll_events is not None and self._in_file >= self._roll_events:
                self._parquet.finish()
                self._file.publish()
                self._number += 1
                self._in_file = 0
                self._file = self._file_at(None)
                self._parquet = None
        schema = None if self._file_schema is None else base64.b64encode(self._file_schema.serialize()).decode()
        return {
            **self._file.commit(),
            "number": self._number,
            "count": self.count,
            "in_file": self._in_file,
            "left_out": dict(self.left_out),
            "ends": [] if self._parquet is None else self._parquet.ends,
            "schema": schema,
        }

    def publish(self) -> None:
        """Give the file its name, if there is any event in it."""
        self._write()
        if self._parquet is None or not self._in_file:
            self._file.discard()
        else:
            self._parquet.finish()
            self._file.publish()

    def close(self, *, keep: bool) -> None:  # noqa: D102 - see `Output`
        if self._parquet is not None:
            self._parquet.abandon()
        self._file.discard(keep=keep)

    def _table(self, chunk: Chunk, kept: npt.NDArray[np.intp]) -> pa.Table:
        """Dict events as a table with the columns of the first chunk."""
        rows: list[dict[str, Any]] = [chunk.rows[position] for position in kept.tolist()]
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
            for name in row.keys() - known:
                _count(self.left_out, name)
        arrays = []
        for column in self._columns:
            role = self._carried.get(column.name)
            if role == "time" and chunk.time is not None:
                values: Any = chunk.time[kept]
            elif role == "weight" and chunk.weight is not None:
                values = chunk.weight[kept]
            else:
                values = [row.get(column.name) for row in rows]
                values = [None if value is None else self._as(column, value) for value in values]
            arrays.append(pa.array(values, column.type, from_pandas=True))
        return pa.Table.from_arrays(arrays, schema=self._columns)

    def _as(self, column: pa.Field, value: Any) -> Any:
        """A value in the type of its column; None, and counted, if it cannot be."""
        try:
            if pa.types.is_string(column.type):
                return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
            if pa.types.is_boolean(column.type):
                return None if value != value else bool(value)
            if pa.types.is_floating(column.type):
                return float(value)
            return pa.scalar(value, column.type).as_py()
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            _count(self.left_out, column.name)
            return None


_ARROW_TYPE = {
    "numeric": pa.float64(),
    "count": pa.float64(),
    "duration": pa.float64(),
    "flag": pa.bool_(),
    "category": pa.string(),
}
