"""One Parquet file in segments that outlive whoever writes them.

Parquet keeps the index of a file in its footer, so that a file whose writer was killed can neither be read nor gone on
with. Here every segment ends with a footer of its own row groups. The last footer, of which alone readers know, joins
them all; the others are a few bytes between row groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"PAR1"
# Bytes of a footer after its metadata: their length, and the magic.
_END_OF_FOOTER = 8


class SegmentedParquet:
    """Writes row groups to the end of a file, in a thread of its own: an error is raised by every later call.

    Parameters
    ----------
    path
        The file.
    schema
        Of all tables.
    ends
        Where the segments end that the file has already, the last of them at its end.

    Attributes
    ----------
    ends
        Where the segments end. A file that is cut off at one of them can be gone on with.

    >>> import os, tempfile
    >>> numbers = pa.table({"x": [1.0, 2.0, 3.0]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "x.parquet")
    ...     parquet = SegmentedParquet(file, numbers.schema)
    ...     parquet.write(numbers, row_group_size=2)
    ...     parquet.end_segment()
    ...     parquet.write(numbers, row_group_size=2)
    ...     parquet.abandon()
    ...     os.truncate(file, parquet.ends[-1])
    ...     parquet = SegmentedParquet(file, numbers.schema, parquet.ends)
    ...     parquet.write(numbers.slice(1), row_group_size=2)
    ...     parquet.finish()
    ...     pq.read_table(file)["x"].to_pylist()
    [1.0, 2.0, 3.0, 2.0, 3.0]

    """

    def __init__(self, path: Path, schema: pa.Schema, ends: Sequence[int] = ()) -> None:
        self.ends = list(ends)
        self._path = path
        self._schema = schema
        # Repeated values get a dictionary. Measurements seldom repeat, and theirs would be built at great cost, only
        # to be given up.
        self._repeating = [field.name for field in schema if not pa.types.is_floating(field.type)]
        self._file: pa.NativeFile | None = None
        self._writer: pq.ParquetWriter | None = None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, table: pa.Table, row_group_size: int) -> None:
        """Write rows, as row groups of no more than so many, while the caller goes on."""
        self._wait()
        with _named(self._path):
            if self._writer is None:
                self._file = pa.OSFile(str(self._path), "ab")
                # The writer wants a file without content. Wherever this one seems to be, it appends, and then knows its
                # true place again: all offsets are those in the whole file.
                os.lseek(_descriptor(self._file, self._path), 0, os.SEEK_SET)
                self._writer = pq.ParquetWriter(self._file, self._schema, use_dictionary=self._repeating)
        self._writing = self._thread.submit(self._write, self._writer, table, row_group_size)

    @staticmethod
    def _write(writer: pq.ParquetWriter, table: pa.Table, row_group_size: int) -> None:
        # In one piece, so that the pages do not depend on the pieces that the source has read.
        writer.write_table(table.combine_chunks(), row_group_size=row_group_size)

    def _wait(self) -> None:
        """Wait until all is written; raise the error that kept it from being."""
        if self._writing is not None:
            with _named(self._path):
                self._writing.result()
            self._writing = None

    def end_segment(self) -> None:
        """End the segment in hand, if there is one."""
        self._wait()
        if self._writer is not None and self._file is not None:
            with _named(self._path):
                self._writer.close()
                self._writer = None
                self.ends.append(self._file.tell())
                self._file.close()

    def finish(self) -> None:
        """Make a readable file of the segments."""
        try:
            self.end_segment()
        finally:
            self._thread.shutdown()
        if len(self.ends) < 2:
            # The footer of the only segment is that of the file.
            return
        with self._path.open("r+b") as file:
            joined, *others = (_read_footer(file, end) for end in self.ends)
            for footer in others:
                joined.append_row_groups(footer)
            sink = pa.BufferOutputStream()
            joined.write_metadata_file(sink)
            file.seek(self.ends[-1])
            file.write(sink.getvalue().to_pybytes()[len(_MAGIC) :])

    def abandon(self) -> None:
        """Write nothing more."""
        self._thread.shutdown()
        if self._writer is not None:
            # Arrow's writer would end the segment when it is forgotten.
            self._writer.is_open = False
            self._writer = None
        if self._file is not None:
            self._file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have errors of the system name the file, which Arrow's do not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _descriptor(file: pa.OSFile, path: Path) -> int:
    try:
        descriptor: int = file.fileno()
    except AttributeError:
        # Before version 25 Arrow cannot tell. It is the only one here that was opened to append to the file.
        from fcntl import F_GETFL, fcntl

        for descriptor in (int(link.name) for link in Path("/dev/fd").iterdir()):
            with suppress(OSError):
                if fcntl(descriptor, F_GETFL) & os.O_APPEND and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        raise
    return descriptor


def _read_footer(file: IO[bytes], end: int) -> pq.FileMetaData:
    file.seek(end - _END_OF_FOOTER)
    length = int.from_bytes(file.read(4), "little") + _END_OF_FOOTER
    file.seek(end - length)
    return pq.read_metadata(pa.BufferReader(_MAGIC + file.read(length)))
