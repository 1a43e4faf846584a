"""Named arrays as rows of an Arrow record batch: what snapshots and statistics on the wire are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Arrays = dict[str, npt.NDArray[Any]]

ROWS = pa.schema(
    [("name", pa.string()), ("type", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())]
)
# As Python objects rows take many times their bytes, so that they are not all made at once.
ROWS_AT_ONCE = 1_000
TYPES = {"float64": np.dtype("<f8"), "int64": np.dtype("<i8")}


def to_rows(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[bytes, bytes]) -> pa.RecordBatch:
    """Return float64 and int64 arrays of any shape as a record batch, in their order.

    >>> to_rows({"a": np.zeros((2, 3))}, {}).num_rows
    1

    """
    names, types, shapes, data = list[bytes](), list[bytes](), list[tuple[int, ...]](), list[bytes]()
    for name, array in arrays.items():
        kind = "int64" if array.dtype.kind == "i" else "float64"
        plain = np.ascontiguousarray(array, dtype=TYPES[kind])
        names.append(name.encode())
        types.append(kind.encode())
        shapes.append(plain.shape)
        data.append(plain.tobytes())
    columns = [
        _texts(names, pa.string()),
        _texts(types, pa.string()),
        _lists(shapes),
        _texts(data, pa.large_binary()),
    ]
    return pa.record_batch(columns, schema=ROWS.with_metadata(dict(metadata)))


# From buffers: to make an array of NumPy's or of Python's objects Arrow imports pandas, where that is installed, which
# takes longer than to save a model.
def arrow_numbers(values: npt.NDArray[Any], unknown: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Return numbers (n,) as an Arrow array with null where they are unknown (n,).

    >>> arrow_numbers(np.array([1.5, 2.5]), np.array([False, True])).to_pylist()
    [1.5, None]

    """
    known = None if unknown is None or not unknown.any() else pa.py_buffer(np.packbits(~unknown, bitorder="little"))
    numbers = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [known, numbers])


def _texts(texts: Sequence[bytes], kind: pa.DataType) -> pa.Array:
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64 if pa.types.is_large_binary(kind) else np.int32)
    return pa.Array.from_buffers(kind, len(texts), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))])


def _lists(lists: Sequence[tuple[int, ...]]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    numbers = np.array([number for numbers in lists for number in numbers], np.int64)
    buffers = [None, pa.py_buffer(offsets)]
    return pa.ListArray.from_buffers(pa.list_(pa.int64()), len(lists), buffers, children=[arrow_numbers(numbers)])


def from_rows(rows: pa.RecordBatch) -> Arrays:
    """Return the arrays that `to_rows` wrote.

    Raises
    ------
    ValueError
        When the record batch is of another kind, or the bytes of an array do not fit its type and shape.

    """
    if not rows.schema.equals(ROWS):
        raise ValueError(f"expected the columns {', '.join(ROWS.names)}, got {', '.join(rows.schema.names)}")
    arrays: Arrays = {}
    for name, kind, shape, data in each_row(rows):
        if not isinstance(name, str) or name in arrays:
            raise ValueError(f"the array {name!r} has no name of its own")
        arrays[name] = _array(name, kind, shape, data)
    return arrays


def each_row(rows: pa.RecordBatch) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield name, type, shape and bytes (a view) of each array; whatever is null is None."""
    for start in range(0, rows.num_rows, ROWS_AT_ONCE):
        names, kinds, shapes, data = rows.slice(start, ROWS_AT_ONCE).columns
        content = (one.as_buffer() for one in data)
        yield from zip(names.to_pylist(), kinds.to_pylist(), shapes.to_pylist(), content)


def _array(name: Any, kind: Any, shape: Any, data: Any) -> npt.NDArray[Any]:
    if kind not in TYPES or shape is None or data is None or any(size is None or size < 0 for size in shape):
        raise ValueError(f"the array {name!r} is damaged")
    if math.prod(shape) * 8 != len(data):
        raise ValueError(f"the array {name!r} has {len(data)} bytes, not those of shape {shape}")
    try:
        return np.frombuffer(data, TYPES[kind]).reshape(shape).astype(TYPES[kind].newbyteorder("="))
    except ValueError as error:
        raise ValueError(f"the array {name!r} has an impossible shape: {error}") from None
