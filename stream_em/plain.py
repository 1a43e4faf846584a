"""Values as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return the same value with everything that JSON has no form for turned into text.

    >>> plain({"x": np.float32("inf"), "n": np.int64(2), "at": np.datetime64("2026-01-01"), 3: (None, b"?")})
    {'x': 'inf', 'n': 2, 'at': '2026-01-01', '3': [None, "b'?'"]}

    """
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        number = value.item()
        # A number of more digits than Python's has no other form.
        return str(value) if isinstance(number, np.generic) else plain(number)
    return str(value)


def is_number(text: str) -> bool:
    """Whether a text says a number.

    >>> [is_number(text) for text in ("22.30", "1e3", "EUR")]
    [True, True, False]

    """
    try:
        float(text)
    except ValueError:
        return False
    return True
