"""Arrays as JSON."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt


def pack(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Return an array as JSON can hold it, bit by bit.

    >>> unpack(pack(np.array([[0.1, np.nan]])))
    array([[0.1, nan]])

    """
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def unpack(packed: dict[str, Any]) -> npt.NDArray[Any]:
    """Return the array that `pack` packed."""
    values = np.frombuffer(base64.b64decode(packed["data"]), np.dtype(packed["dtype"]))
    return values.reshape(packed["shape"]).copy()
