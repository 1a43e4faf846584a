"""What pipelines leave in files: scored events, rejected events and snapshots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filebasedsink import FileBasedSink
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.ml.inference.base import PredictionResult

from stream_em.beam.events import RejectedEvent
from stream_em.beam.storage import write_file
from stream_em.plain import plain
from stream_em.store import Learner, to_bytes

# Names of files may have 255 bytes, and some tools put more before or after them.
LONGEST_NAME = 120


class WriteRejected(beam.PTransform):
    r"""Write rejected events as JSON Lines, each with the reason: the dead letters of a pipeline.

    Parameters
    ----------
    folder
        Folder of the files, on any file system that Beam knows.
    name
        What the names of the files begin with.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with beam.Pipeline("FnApiRunner") as pipeline:
    ...         rejected = pipeline | beam.Create([RejectedEvent({"x": "?"}, "field 'x': got '?'")])
    ...         _ = rejected | WriteRejected(folder)
    ...     [file.read_text() for file in Path(folder).iterdir()]
    ['{"event": {"x": "?"}, "reason": "field \'x\': got \'?\'", "n_events": 1}\n']

    """

    def __init__(self, folder: str, name: str = "quarantine") -> None:
        super().__init__()
        self.folder = folder
        self.name = name

    def expand(self, rejected: beam.PCollection) -> Any:  # noqa: D102 - Beam's
        rows = rejected | "As dicts" >> beam.Map(RejectedEvent._asdict)
        return rows | "Lines" >> WriteJsonLines(self.folder, self.name)


class WriteJsonLines(beam.PTransform):
    """Write dicts as JSON Lines; values that JSON does not know are written as text. No dict, no file.

    Parameters
    ----------
    folder
        Folder of the files, on any file system that Beam knows.
    name
        What the names of the files begin with.

    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self.folder = folder
        self.name = name

    def expand(self, rows: beam.PCollection) -> Any:  # noqa: D102 - Beam's
        write = beam.io.WriteToText(
            FileSystems.join(self.folder, self.name), file_name_suffix=".jsonl", num_shards=1, skip_if_empty=True
        )
        return rows | "As JSON" >> beam.Map(_as_json) | "Write" >> write


class WriteTables(beam.PTransform):
    """Write Arrow tables of one schema as Parquet files. No table, no file.

    Parameters
    ----------
    folder
        Folder of the files, on any file system that Beam knows.
    name
        What the names of the files begin with.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with beam.Pipeline("FnApiRunner") as pipeline:
    ...         _ = pipeline | beam.Create([pa.table({"x": [1.0, 2.0]})]) | WriteTables(folder, "scored")
    ...     pq.read_table(folder)["x"].to_pylist()
    [1.0, 2.0]

    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self.sink = _ParquetSink(
            FileSystems.join(folder, name),
            coder=None,
            file_name_suffix=".parquet",
            compression_type=CompressionTypes.UNCOMPRESSED,
            skip_if_empty=True,
        )

    def expand(self, tables: beam.PCollection) -> Any:  # noqa: D102 - Beam's
        return tables | "Write" >> beam.io.Write(self.sink)


class _ParquetSink(FileBasedSink):
    """Parquet files, each of the schema of its first table."""

    def open(self, temp_path: str) -> _ParquetFile:
        return _ParquetFile(super().open(temp_path))

    def write_record(self, file_handle: _ParquetFile, value: pa.Table) -> None:
        file_handle.write(value)

    def close(self, file_handle: _ParquetFile) -> None:
        file_handle.close()


class _ParquetFile:
    def __init__(self, file: Any) -> None:
        self._file = file
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(_as_schema(table, self._writer.schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._file.close()


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Files of one job may differ in the order of columns and in how numbers and texts are stored."""
    if table.schema.equals(schema):
        return table
    if set(table.column_names) != set(schema.names):
        raise ValueError(
            f"the tables have different columns, {', '.join(schema.names)} and {', '.join(table.column_names)}: write "
            "them by jobs of their own"
        )
    for one in schema:
        given = table.schema.field(one.name).type
        if not given.equals(one.type):
            try:
                table.column(one.name).cast(one.type)
            except pa.ArrowException as error:
                raise ValueError(
                    f"column {one.name!r} is {one.type} in one file and {given} in another, with values that do not "
                    f"fit ({error}); write such files by jobs of their own"
                ) from None
    return table.select(schema.names).cast(schema)


def scored_table(result: PredictionResult, prefix: str = "", *, responsibilities: bool = False) -> pa.Table:
    """Return the events of a `PredictionResult` with the columns of their scores beside them.

    Parameters
    ----------
    result
        From `RunInference` with a `MixtureModelHandler`, of an example that holds many events.
    prefix
        Put before the names of the added columns.
    responsibilities
        Whether to add the column of responsibilities.

    Raises
    ------
    ValueError
        When the events have such a column already.

    """
    events = pa.Table.from_pylist(result.example) if isinstance(result.example, list) else pa.table(result.example)
    for name in ("component", "log_prob", "responsibilities") if responsibilities else ("component", "log_prob"):
        if prefix + name in events.column_names:
            raise ValueError(
                f"the events have a column {prefix + name!r} already: give the scores another prefix (output.prefix)"
            )
        events = events.append_column(prefix + name, result.inference[name])
    return events


class WriteSnapshots(beam.DoFn):
    """Write (key, time, learner) triples as snapshots, `<folder>/<key>/<time>.arrow`; hand on (key, path).

    The time is in UTC; the last snapshot of a stream that has ended is `last.arrow`. The
    name of a key's folder is the key itself, with the characters that file systems or addresses give a meaning to
    escaped; a key that is no text is written as Python does after a `@`, and one that is long is cut and ends in its
    digest. Without a key the folder is `@all`.

    Parameters
    ----------
    folder
        Where to write, on any file system that Beam knows.

    >>> import tempfile
    >>> import numpy as np
    >>> from stream_em import BatchEM, Gaussian, Mixture, load
    >>> learner = BatchEM(Mixture(Gaussian(), 1)).fit(np.array([[1.0], [3.0]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ((key, path),) = WriteSnapshots(folder).process(("pump 1", 60.0, learner))
    ...     path.removeprefix(folder), load(path).n_events
    ('/pump%201/1970-01-01T00:01:00.arrow', 2)

    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def process(self, snapshot: tuple[Any, float, Learner]) -> Iterator[tuple[Any, str]]:  # noqa: D102 - Beam's
        key, time, learner = snapshot
        path = FileSystems.join(self.folder, _folder_name(key), f"{_as_text(time)}.arrow")
        write_file(path, to_bytes(learner))
        yield key, path


def _folder_name(key: Any) -> str:
    """A name for each key, and no name for two; the @ is a sign that escaped text never holds."""
    if key is None:
        return "@all"
    name = quote(key if isinstance(key, str) else repr(key), safe="", errors="surrogatepass")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}@{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
    return name if isinstance(key, str) and key else f"@{name}"


def _as_text(time: float) -> str:
    try:
        return datetime.fromtimestamp(time, UTC).replace(tzinfo=None).isoformat()
    except (OverflowError, ValueError, OSError):
        return "last"


def _as_json(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
