"""Events of files, on any file system that Beam knows, as Arrow tables."""

from __future__ import annotations

import glob
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics

from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import NAMESPACE, REJECTED
from stream_em.beam.storage import at_home
from stream_em.columns import Roles
from stream_em.sources import FORMATS, Rejection, SourceError, format_of_name, open_source
from stream_em.sources.faults import check_columns

# What Arrow, Beam's file systems and Python raise for a file that is not there, not readable or damaged.
_UNREADABLE = (pa.ArrowException, BeamIOError, OSError, EOFError)


class ReadEvents(beam.PTransform):
    r"""Read the events of the files that match a pattern.

    Parquet files are shared out to the workers by row group, other files whole.

    Parameters
    ----------
    pattern
        File, folder or glob pattern (`*` within a folder, `**` across folders), or several of them, on any file
        system that Beam knows; `~` is the home folder. A folder, which ends in `/` where it is not local, stands for
        all its data files.
    format
        "parquet", "csv" or "jsonl"; by default each file's own, by the ending of its name.
    roles
        Columns that are not the model's. When given, nothing is read but the fields of the model, the weight, the
        event time and `keep`; otherwise every column is. A Parquet file is spared the reading of the others.
    keep
        Other columns to be read, such as a key or an id; as text, in CSV.
    rows
        Events in a table, at most.

    Returns
    -------
    DoOutputsTuple
        `events`: Arrow tables, with the columns in the order of the file. JSON Lines, which do not type their values,
        are lists of dicts.

        `rejected` (`REJECTED`): a `RejectedEvent` for each event, or file, that cannot be read, and for a file that
        lacks a column; the other files are read on. Its `event` is the event as far as it was read, `{"text": ...}`
        for a line that could not be parsed, and None for a file. `n_events` of a Parquet file is what it holds, of
        another file, which nobody can count, 1, and of a file without events 0. A file that turns out to be damaged
        in the middle may have yielded some of its events before.

    Raises
    ------
    SourceError
        When the pipeline is built, if no file matches a pattern.
    ValueError
        If `format` is unknown or `rows` is below 1.

    Notes
    -----
    Remote files other than Parquet are copied to a temporary file first. Storage that does not answer is asked again by
    Beam's file systems; a file is rejected when they have given up.

    Beam's metrics hold the counter `rejected` under `NAMESPACE`, which counts events rejected here with those that
    `ExpectationStep` rejects.

    >>> import os, tempfile
    >>> from apache_beam.testing.util import assert_that, equal_to
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "events.csv").write_text("amount,country\n" + "3.5,DE\n" * 9 + "many,FR\n")
    ...     with beam.Pipeline("FnApiRunner") as pipeline:
    ...         events, rejected = pipeline | ReadEvents(os.path.join(folder, "*.csv"))
    ...         _ = assert_that(events | beam.Map(lambda table: table.num_rows), equal_to([9]))
    ...         values = rejected | beam.Map(lambda rejected: rejected.event["amount"])
    ...         _ = assert_that(values, equal_to(["many"]), label="Rejected")

    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        *,
        format: str | None = None,  # noqa: A002 - as in `open_source`
        roles: Roles | None = None,
        keep: Sequence[str] = (),
        rows: int = 65_536,
    ) -> None:
        super().__init__()
        if format is not None and format not in FORMATS:
            raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows!r}")
        self.patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        self.columns = _Columns(roles, tuple(keep))
        self.format = format
        self.rows = rows

    def fingerprint(self) -> str:
        """Return what tells these files from others, and from themselves once they are changed.

        It is made of the names, sizes and times of change of the files; their content is not read.
        """
        digest = hashlib.blake2b(repr((self.format, self.rows)).encode(), digest_size=16)
        for pattern in self.patterns:
            for file in sorted(_Pattern.of(pattern).files(), key=lambda file: str(file.path)):
                told = file.path, file.size_in_bytes, file.last_updated_in_seconds
                digest.update(repr(told).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def expand(self, root: Any) -> beam.pvalue.DoOutputsTuple:  # noqa: D102 - Beam's
        patterns = [_Pattern.of(pattern) for pattern in self.patterns]
        for pattern in patterns:
            pattern.check()
        return (
            root.pipeline
            | "Patterns" >> beam.Create(patterns)
            | "Match" >> beam.FlatMap(_Pattern.matching)
            | "Spread files" >> beam.Reshuffle()
            | "Parts" >> beam.ParDo(_FindParts(self.columns, self.format, self.rows))
            | "Spread parts" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(_ReadParts(self.columns, self.rows)).with_outputs(REJECTED, main="events")
        )


class _Pattern(NamedTuple):
    """A pattern of files; `folder` is set where the user named nothing but the folder."""

    pattern: str
    folder: str | None = None

    @classmethod
    def of(cls, given: str) -> _Pattern:
        given = at_home(given)
        if given.endswith("/") or (FileSystems.get_scheme(given) is None and Path(given).is_dir()):
            folder = given.rstrip("/") + "/"
            return cls(folder + "**", folder)
        return cls(given)

    def check(self) -> None:
        """Raise `SourceError` when there is nothing to read, or not all of it can be read."""
        first = next(self.matching(), None)
        if first is None:
            if self.folder is not None:
                raise SourceError(f"{self.folder}: the folder holds no Parquet, CSV or JSON Lines files")
            raise SourceError(f"{self.pattern}: no file matches the pattern{self._hint()}")
        if self.folder is not None and "=" in str(self._inner(first).parent):
            raise SourceError(
                f"{self.folder}: is partitioned by columns that are only in the folder names ({first}); "
                "name the files with a glob pattern to read them without those columns"
            )

    def _hint(self) -> str:
        if FileSystems.get_scheme(self.pattern) is not None or not Path(self.pattern).exists():
            return ""
        meant = glob.escape(self.pattern)
        return f", though there is a file of that very name: *, ? and [ have a meaning in patterns, so write {meant!r}"

    def matching(self) -> Iterator[str]:
        for file in self.files():
            yield file.path

    def files(self) -> Iterator[FileMetadata]:
        (match,) = FileSystems.match([self.pattern])
        yield from filter(self._takes, match.metadata_list)

    def _takes(self, file: FileMetadata) -> bool:
        if self.folder is None:
            return True
        hidden = any(part.startswith((".", "_")) for part in self._inner(file.path).parts)
        return not hidden and format_of_name(file.path) is not None

    def _inner(self, path: str) -> PurePosixPath:
        return PurePosixPath(path[len(self.folder or "") :])


class _Columns:
    """Which columns of a file are read."""

    def __init__(self, roles: Roles | None, keep: tuple[str, ...]) -> None:
        self._given = roles
        self._keep = keep
        roles = Roles() if roles is None else roles
        apart = tuple(name for name in keep if name not in (roles.only or ()))
        self.roles = replace(roles, exclude=roles.exclude + apart)

    def check(self, path: str, names: Sequence[str]) -> None:
        """Raise `SourceError` when a column is lacking that is to be read."""
        roles = self.roles
        needless = {name for name in (roles.label, *roles.exclude) if name not in names} - set(self._keep)
        exclude = tuple(name for name in roles.exclude if name not in needless)
        label = None if roles.label in needless else roles.label
        check_columns(path, names, replace(roles, label=label, exclude=exclude))

    def wanted(self, names: Sequence[str]) -> list[str]:
        """The columns to be read, in the order of the file."""
        roles = self._given
        if roles is None:
            return list(names)
        wanted = {*roles.model_fields(names), roles.weight, roles.time, *self._keep}
        return [name for name in names if name in wanted]

    def of(self, rows: Any) -> Any:
        """An Arrow table, or a list of dicts, with nothing but what is wanted."""
        if isinstance(rows, pa.Table):
            return rows.select(self.wanted(rows.column_names))
        if self._given is None:
            return rows
        return [{name: row[name] for name in self.wanted(list(row))} for row in rows]


class _Part(NamedTuple):
    """What one worker reads at a time: some row groups of a Parquet file, or all of another file."""

    path: str
    format: str
    row_groups: tuple[int, ...] = ()


class _FindParts(beam.DoFn):
    """Cut files into parts; a file that cannot be read becomes a `RejectedEvent`."""

    def __init__(self, columns: _Columns, format: str | None, rows: int) -> None:  # noqa: A002
        self.columns = columns
        self.format = format
        self.rows = rows

    def process(self, path: str) -> Iterator[_Part | RejectedEvent]:
        kind = self.format or format_of_name(path)
        if kind is None:
            yield RejectedEvent(
                None,
                f"{path}: the format cannot be told from the name; set format to one of {', '.join(FORMATS)}",
            )
        elif kind == "parquet":
            yield from self._row_groups(path)
        else:
            yield _Part(path, kind)

    def _row_groups(self, path: str) -> Iterator[_Part | RejectedEvent]:
        try:
            with ExitStack() as stack:
                metadata = _open_parquet(path, stack).metadata
        except _UNREADABLE as error:
            yield RejectedEvent(None, _damaged(path, error))
            return
        try:
            self.columns.check(path, metadata.schema.to_arrow_schema().names)
        except SourceError as error:
            yield RejectedEvent(None, str(error), metadata.num_rows)
            return
        if not metadata.num_rows:
            yield RejectedEvent(None, f"{path}: holds no events", 0)
        part: list[int] = []
        n_events = 0
        for row_group in range(metadata.num_row_groups):
            # Row groups that are too small for a table are read together.
            part.append(row_group)
            n_events += metadata.row_group(row_group).num_rows
            if n_events >= self.rows or row_group + 1 == metadata.num_row_groups:
                yield _Part(path, "parquet", tuple(part))
                part, n_events = [], 0


class _ReadParts(beam.DoFn):
    """Read the events of parts."""

    def __init__(self, columns: _Columns, rows: int) -> None:
        self.columns = columns
        self.rows = rows
        self._rejected = Metrics.counter(NAMESPACE, "rejected")

    def process(self, part: _Part | RejectedEvent) -> Iterator[Any]:
        if isinstance(part, RejectedEvent):
            yield self._reject(part)
        elif part.format == "parquet":
            yield from self._read_row_groups(part)
        else:
            yield from self._read_file(part)

    def _reject(self, rejected: RejectedEvent) -> beam.pvalue.TaggedOutput:
        self._rejected.inc(rejected.n_events)
        return beam.pvalue.TaggedOutput(REJECTED, rejected)

    def _read_row_groups(self, part: _Part) -> Iterator[Any]:
        left = 1
        try:
            with ExitStack() as stack:
                file = _open_parquet(part.path, stack)
                left = sum(file.metadata.row_group(row_group).num_rows for row_group in part.row_groups)
                wanted = self.columns.wanted(file.schema_arrow.names)
                batches = file.iter_batches(self.rows, list(part.row_groups), wanted, use_threads=False)
                for batch in batches:
                    yield pa.Table.from_batches([batch]).select(wanted)
                    left -= batch.num_rows
        except _UNREADABLE as error:
            yield self._reject(RejectedEvent(None, _damaged(part.path, error), left))

    def _read_file(self, part: _Part) -> Iterator[Any]:
        roles = self.columns.roles
        with ExitStack() as stack:
            local = part.path
            try:
                if FileSystems.get_scheme(part.path) is not None:
                    local = _copied(part.path, stack)
                source = open_source(
                    local,
                    format=part.format,
                    fields=roles.kinds,
                    label=roles.label,
                    time=roles.time,
                    weight=roles.weight,
                    exclude=roles.exclude,
                    only=roles.only,
                )
                for chunk in source.chunks(self.rows):
                    for rejection in chunk.rejected:
                        reason = str(rejection).replace(local, part.path)
                        yield self._reject(RejectedEvent(_as_read(rejection), reason))
                    if len(chunk):
                        yield self.columns.of(chunk.rows)
            except (SourceError, *_UNREADABLE) as error:
                reason = str(error).replace(local, part.path)
                yield self._reject(RejectedEvent(None, reason, 0 if reason.endswith("holds no events") else 1))


def _open_parquet(path: str, stack: ExitStack) -> pq.ParquetFile:
    if FileSystems.get_scheme(path) is None:
        return stack.enter_context(pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20))
    handle = stack.enter_context(FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED))
    # Fetched ahead, all columns of a row group at once: each request to remote storage takes its time.
    return stack.enter_context(pq.ParquetFile(handle, pre_buffer=True))


def _copied(path: str, stack: ExitStack) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    copy = Path(folder, PurePosixPath(path).name)
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as remote, copy.open("wb") as local:
        shutil.copyfileobj(remote, local, 1 << 20)
    return str(copy)


def _damaged(path: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path}: cannot be read as Parquet, it may be truncated or damaged ({first})"


def _as_read(rejection: Rejection) -> dict[str, Any]:
    event = rejection.event
    return event if isinstance(event, dict) else {"text": event}
