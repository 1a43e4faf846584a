"""Frames in, and answers out in the same kind with the same index."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_em.schema import in_memory


class Frame:
    """A frame that was passed, as an Arrow table, and the way back.

    Parameters
    ----------
    X
        A pandas, polars or other eager frame that Narwhals knows, an Arrow table or a record batch.

    Raises
    ------
    TypeError
        When `X` is no such frame.

    >>> frame = Frame(pa.table({"x": [1.0, 2.0]}))
    >>> frame.table.num_rows, frame.series("score", np.array([0.5, 0.7])).to_pylist()
    (2, [0.5, 0.7])

    """

    def __init__(self, X: Any) -> None:
        self._is_record_batch = isinstance(X, pa.RecordBatch)
        self._like = nw.from_native(pa.Table.from_batches([X]) if self._is_record_batch else X, eager_only=True)
        self.table: pa.Table = in_memory(X)

    @property
    def labels(self) -> dict[str, Hashable]:
        """The columns that are not named by strings, by the text under which they are in the table."""
        return {str(label): label for label in self._like.columns if not isinstance(label, str)}

    def series(self, name: str, values: npt.NDArray[Any]) -> Any:
        """Return a value for each row, as a series of the frame's kind (an Arrow array for a record batch)."""
        native = nw.new_series(name, values, backend=self._like.implementation).to_native()
        if self._is_record_batch:
            return native.combine_chunks()
        return self._with_index(native)

    def frame(self, columns: Mapping[Any, npt.NDArray[Any]]) -> Any:
        """Return columns with a value for each row, as a frame of the frame's kind.

        Only pandas has columns whose names are no strings.
        """
        like = self._like.implementation
        if not like.is_pandas_like():
            columns = {str(name): column for name, column in columns.items()}
        contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
        if self._is_record_batch:
            return pa.RecordBatch.from_pydict(contiguous)
        native = nw.from_dict(contiguous, backend=like).to_native()
        return self._with_index(native)

    def _with_index(self, native: Any) -> Any:
        index = nw.maybe_get_index(self._like)
        if index is not None:
            native.index = index
        return native
