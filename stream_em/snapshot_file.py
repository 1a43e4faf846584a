"""The Arrow file around a snapshot: named arrays and a header as bytes, and back again without trusting the bytes.

Arrow's own readers allocate what a file states: a few bytes of a compressed buffer may unpack to gigabytes, and columns
may share their bytes, each to be copied. What is read here is refused unless it takes about as much memory as the file.
"""

from __future__ import annotations

import struct
from itertools import islice

import pyarrow as pa

from stream_em.arrays import ROWS

# What stands before the messages of an Arrow file: its magic, padded.
MAGIC_SIZE = 8

# Positions of fields in tables of Arrow's Message.fbs, https://arrow.apache.org/docs/format/Columnar.html.
HEADER_OF_MESSAGE = 2
COMPRESSION_OF_RECORD_BATCH = 3


def write_rows(rows: pa.RecordBatch) -> bytes:
    """Return an Arrow file that holds one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_batch(rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_rows(content: bytes) -> pa.RecordBatch:
    """Return the record batch of named arrays that a file holds, as views of its bytes.

    Raises
    ------
    ValueError, OSError
        When the bytes are no Arrow file, or one that `write_rows` does not write.

    >>> from stream_em.arrays import to_rows
    >>> import numpy as np
    >>> read_rows(write_rows(to_rows({"a": np.zeros(3)}, {}))).num_rows
    1

    """
    buffer = pa.py_buffer(content)
    with pa.ipc.open_file(buffer) as reader:
        # The schema in the footer; with no dictionaries in it, nothing else has been read so far.
        schema = reader.schema
        if reader.num_record_batches != 1 or not schema.equals(ROWS):
            raise ValueError("an Arrow file of another kind")
    head, body = islice(pa.ipc.MessageReader.open_stream(buffer.slice(MAGIC_SIZE)), 2)
    if (head.type, body.type) != ("schema", "record batch"):
        raise ValueError(f"expected a schema and a record batch, got a {head.type} and a {body.type}")
    if not pa.ipc.read_schema(head).equals(schema, check_metadata=True):
        raise ValueError("the schemas at its start and at its end differ")
    if _is_compressed(body.metadata.to_pybytes()):
        raise ValueError("its buffers are compressed, which those of a snapshot never are")
    rows = pa.ipc.read_record_batch(body, schema)
    rows.validate(full=True)
    if rows.nbytes > len(content):
        raise ValueError("its columns share their bytes")
    return rows


def _is_compressed(message: bytes) -> bool:
    """Whether a record batch names a compression, by its metadata, a flatbuffer that Arrow has verified."""
    (root,) = struct.unpack_from("<I", message)
    header = _place(message, root, HEADER_OF_MESSAGE)
    if header is None:
        raise ValueError("its record batch says nothing of itself")
    (offset,) = struct.unpack_from("<I", message, header)
    return _place(message, header + offset, COMPRESSION_OF_RECORD_BATCH) is not None


def _place(flatbuffer: bytes, table: int, field: int) -> int | None:
    """Return where a field of a table stands, None where it is left out."""
    (to_fields,) = struct.unpack_from("<i", flatbuffer, table)
    fields = table - to_fields
    (size,) = struct.unpack_from("<H", flatbuffer, fields)
    entry = 4 + 2 * field
    if entry >= size:
        return None
    (offset,) = struct.unpack_from("<H", flatbuffer, fields + entry)
    return table + offset if offset else None
