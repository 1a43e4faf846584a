"""Columns of events that are not the model's: labels, weights and times, and how they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa

from stream_em.numerics import Array
from stream_em.schema import SchemaError, numbers_of


@dataclass(frozen=True)
class Roles:
    """Which columns are not the model's.

    Attributes
    ----------
    label
        Column with the truth about an event; for evaluation only.
    time
        Column with the event time: a number of seconds, a timestamp, a date, or ISO 8601 text.
    weight
        Column with the weight of an event.
    exclude
        Other columns to keep from the model.
    only
        When given, the model's fields; every other column is kept from it.

    """

    label: str | None = None
    time: str | None = None
    weight: str | None = None
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)

    def named(self) -> list[str]:
        """Columns that some role names."""
        return [name for name in (self.label, self.time, self.weight, *self.exclude) if name is not None]

    def model_fields(self, names: Iterable[str]) -> list[str]:
        """The columns of `names` that the model gets."""
        apart = set(self.named())
        return [name for name in names if name not in apart and (self.only is None or name in self.only)]


def seconds_of(values: Sequence[object]) -> Array:
    """Return event times (n,) in seconds since 1970 of numbers, dates and ISO 8601 text; NaN for anything else.

    >>> seconds_of([1.5, "1970-01-01T00:01:00Z", None])
    array([ 1.5, 60. ,  nan])

    """
    return np.array([_second(value) for value in values], np.float64)


def floats_of(values: Sequence[object]) -> Array:
    """Return numbers (n,) as they are; NaN for anything else.

    >>> floats_of([2, "2", None])
    array([ 2., nan, nan])

    """
    usable = (
        float("nan") if isinstance(value, bool) or not isinstance(value, (int, float)) else _second(value)
        for value in values
    )
    return np.fromiter(usable, np.float64, len(values))


def arrow_floats(table: pa.Table, name: str) -> Array:
    """Return a column (n,) as numbers.

    Raises
    ------
    SchemaError
        When the column is missing or holds no numbers.

    """
    return _as_floats(_column(table, name), name)


def arrow_seconds(table: pa.Table, name: str) -> Array:
    """Return a column (n,) of numbers, timestamps, dates or ISO 8601 text in seconds since 1970.

    Raises
    ------
    SchemaError
        When the column is missing or of another type.

    """
    column = _column(table, name)
    kind = column.type
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("ms"))
        kind = column.type
    if pa.types.is_timestamp(kind):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        return _as_floats(column.cast(pa.int64()), name) / per_second
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return seconds_of(column.to_pylist())
    return _as_floats(column, name)


def parse_number(text: str) -> float | None:
    """Return the number that a text spells, or None; "1_000" is no number in any file format."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.schema.names:
        present = ", ".join(map(repr, table.schema.names))
        raise SchemaError(f"the frame has no column {name!r}; its columns are {present}")
    return table[name]


def _as_floats(column: pa.ChunkedArray, name: str) -> Array:
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowException as error:
        raise SchemaError(f"column {name!r} is {column.type}, but numbers are needed") from error
    return np.concatenate([np.empty(0), *map(numbers_of, numbers.chunks)])


def _second(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("nan")
    if isinstance(value, str):
        spelled = parse_number(value)
        if spelled is not None:
            return spelled
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return float("nan")
    if isinstance(value, datetime):
        # A time without a zone is taken as UTC, as Arrow does.
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()  # noqa: UP017
    return float("nan")
