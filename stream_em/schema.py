"""Events to numbers: the only place that knows field names, order, categories and missing values."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from operator import itemgetter
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stream_em.arrays import arrow_numbers
from stream_em.numerics import LARGEST_VALUE, Array, is_plain

Kind = Literal["numeric", "category", "flag", "count", "duration"]
KINDS: tuple[Kind, ...] = ("numeric", "category", "flag", "count", "duration")
UNKNOWN_POLICIES = ("refuse", "ignore", "add")

# Beyond this the log-probability of a count, a small difference of large numbers, has no digit left to trust.
LARGEST_COUNT = 1e12

# Smaller weights would be lost beside the prior, and their products leave the range of doubles.
SMALLEST_SAMPLE_WEIGHT = 1e-100

NUMBERS = int | float | np.integer | np.floating | Decimal | Fraction

EXPECTED: dict[str, str] = {
    "numeric": f"a finite number of magnitude at most {LARGEST_VALUE:g}",
    "category": "a string",
    "flag": "true or false (or 1 or 0)",
    "count": f"a whole number >= 0 (at most {LARGEST_COUNT:g})",
    "duration": "a finite number >= 0",
}

EXPECTED_WEIGHT = f"a finite weight >= 0 (0, or from {SMALLEST_SAMPLE_WEIGHT:g} to {LARGEST_VALUE:g})"

# Unknown fields that are counted by name, and what the others are counted under.
MOST_NAMES = 1_000
OTHER_FIELDS = "(other fields)"

# Code of every category outside the vocabulary. It is 0 so that the codes of known categories never move
# when the vocabulary grows.
OTHER = 0


class SchemaError(ValueError):
    """Raised when the columns of a whole frame, or a declaration of fields, do not fit."""


class EventError(ValueError):
    """Raised when one event cannot be used.

    Parameters
    ----------
    index
        Position of the event in what was passed.
    field
        Name of the field, or None when the event as a whole is at fault.
    value
        What was found.
    expected
        What would have been accepted.

    >>> print(EventError(3, "amount", "12,50", "a number"))
    event 3, field 'amount': got '12,50', expected a number

    """

    def __init__(self, index: int, field: str | None, value: object, expected: str) -> None:
        self.index = index
        self.field = field
        self.value = value
        self.expected = expected
        super().__init__(f"event {index}{': ' if field is None else ', '}{self.problem}")

    @property
    def problem(self) -> str:
        """The message without the position, for where the event is told otherwise."""
        shown = repr(self.value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        place = "" if self.field is None else f"field {self.field!r}: "
        return f"{place}got {shown}, expected {self.expected}"

    def __reduce__(self) -> tuple[Any, ...]:
        return EventError, (self.index, self.field, self.value, self.expected)


class FieldCounts(Counter[str]):
    """Events by the name of a field; names beyond a thousand are pooled, since a stream may bring new ones for ever.

    >>> counts = FieldCounts({f"field {number}": 1 for number in range(1_500)})
    >>> len(counts), counts[OTHER_FIELDS], counts.total()
    (1001, 500, 1500)

    """

    pool: ClassVar[str] = OTHER_FIELDS

    def update(self, names: Iterable[str] | Mapping[str, int] | None = None, /, **more: int) -> None:  # type: ignore[override]
        """Count events with these fields."""
        for name, count in Counter(names, **more).items():
            known = name in self or len(self) < MOST_NAMES
            self[name if known else self.pool] += count


@dataclass(frozen=True)
class Field:
    """One named field of the events.

    Parameters
    ----------
    name
        Key in the event, or name of the column.
    kind
        "numeric", "category", "flag", "count" (whole numbers >= 0) or "duration" (>= 0).
    categories
        Known categories of a category field, in order of their codes 1, 2, ...
    max_categories
        The vocabulary grows up to this many; every category after that is `other`.

    Raises
    ------
    SchemaError
        When the kind is unknown, or the categories repeat or are too many.

    >>> Field("country", "category", ("DE", "FR")).code("FR"), Field("country", "category").code("FR")
    (2, 0)

    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    max_categories: int = 32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SchemaError(f"field {self.name!r}: unknown kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind != "category" and self.categories:
            raise SchemaError(f"field {self.name!r}: only a category field has categories, not {self.kind!r}")
        if self.max_categories < 1:
            raise SchemaError(f"field {self.name!r}: max_categories must be at least 1, got {self.max_categories}")
        if len(set(self.categories)) != len(self.categories):
            raise SchemaError(f"field {self.name!r}: categories are listed more than once")
        if len(self.categories) > self.max_categories:
            raise SchemaError(
                f"field {self.name!r}: {len(self.categories)} categories exceed max_categories={self.max_categories}"
            )

    def code(self, category: str) -> int:
        """Return the code of a category, 0 for one outside the vocabulary."""
        return self._codes.get(category, OTHER)

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {category: code for code, category in enumerate(self.categories, start=1)}

    @property
    def n_codes(self) -> int:
        """Number of codes, `other` included."""
        return len(self.categories) + 1

    def label(self, code: int) -> str:
        """Return the category of a code."""
        return "other" if code == OTHER else self.categories[code - 1]

    def grown(self, categories: Iterable[str]) -> Field:
        """Return the field with the new ones of these categories added, as far as there is room."""
        new = [category for category in dict.fromkeys(categories) if category not in self._codes]
        room = self.max_categories - len(self.categories)
        if not new or room <= 0:
            return self
        return replace(self, categories=self.categories + tuple(new[:room]))


@dataclass(frozen=True)
class Batch:
    """A feature-major block of encoded events.

    Parameters
    ----------
    values
        (D, B) float64, one row a field; NaN where a value is missing, codes for categories, 0 and 1 for flags.
    schema
        The schema that names the rows.
    weight
        (B,) sample weights, or None when all are 1.
    time
        (B,) event times, or None.
    rejected
        Errors of the events left out, when they were collected.
    accepted
        Positions of the events that are in the block, or None when all of them are.
    ignored_fields
        Names of unknown fields that were ignored, with the number of events that held them.

    >>> Batch(np.array([[1.0, np.nan]]), Schema({"x": "numeric"})).observed
    array([[ True, False]])

    """

    values: Array
    schema: Schema
    weight: Array | None = None
    time: Array | None = None
    rejected: tuple[EventError, ...] = ()
    accepted: npt.NDArray[np.intp] | None = None
    ignored_fields: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_events(self) -> int:
        """Number of events in the block."""
        return int(self.values.shape[1])

    @property
    def total_weight(self) -> float:
        """Weight of all the events."""
        return float(self.n_events) if self.weight is None else float(np.add.reduce(self.weight))

    @cached_property
    def observed(self) -> npt.NDArray[np.bool_] | None:
        """(D, B) whether each value is there, or None when nothing is missing."""
        if np.isnan(self._row_sums).any():
            return ~np.isnan(self.values)
        return None

    @cached_property
    def _row_sums(self) -> Array:
        # In double precision also where the values are not, as are the differences to the center.
        sums: Array = np.add.reduce(self.values, axis=1, dtype=np.float64)
        return sums

    @cached_property
    def center(self) -> Array:
        """(D,) mean of the observed values, 0 where there is none: a reference point near the data."""
        if self.observed is None:
            return self._row_sums / max(self.n_events, 1)
        counts = np.maximum(self.observed.sum(axis=1), 1)
        mean: Array = np.where(self.observed, self.values, 0.0).sum(axis=1, dtype=np.float64) / counts
        return mean

    def select(self, positions: npt.NDArray[np.intp] | slice) -> Batch:
        """Return the events at these positions as a batch of their own."""
        chosen = Batch(
            self.values[:, positions],
            self.schema,
            None if self.weight is None else self.weight[positions],
            None if self.time is None else self.time[positions],
        )
        if self.__dict__.get("observed", ...) is None:
            chosen._know_complete()
        return chosen

    def _know_complete(self) -> None:
        """Take note that no value is missing, which then need not be found out again."""
        self.__dict__["observed"] = None


class Schema:
    """Names, order and kinds of the fields; turns events in any accepted form into a `Batch`.

    Parameters
    ----------
    fields
        Mapping of name to kind or `Field`, or an iterable of `Field`.
    unknown
        What to do with a field that is not in the schema: "refuse" the event, "ignore" the field and count
        it, or "add" it to the schema when learning.

    Raises
    ------
    SchemaError
        When there is no field, a name repeats, or a declaration is wrong.

    >>> schema = Schema({"amount": "numeric", "country": "category"}, unknown="ignore")
    >>> batch = schema.encode([{"country": "DE", "amount": 3}, {"amount": 5.0, "shop": 7}], extend=True)
    >>> batch.values
    array([[ 3.,  5.],
           [ 1., nan]])
    >>> batch.schema.fields[1].categories, dict(batch.ignored_fields)
    (('DE',), {'shop': 1})

    """

    __slots__ = ("_all_numeric", "_getter", "_index", "fields", "names", "unknown")

    def __init__(
        self,
        fields: Mapping[str, Kind | Field] | Iterable[Field],
        *,
        unknown: Literal["refuse", "ignore", "add"] = "refuse",
    ) -> None:
        if isinstance(fields, Mapping):
            declared = []
            for name, kind in fields.items():
                made = kind if isinstance(kind, Field) else Field(name, kind)
                if made.name != name:
                    raise SchemaError(f"field {made.name!r} is declared under the name {name!r}")
                declared.append(made)
        else:
            declared = list(fields)
        if not declared:
            raise SchemaError("a schema needs at least one field")
        if unknown not in UNKNOWN_POLICIES:
            raise SchemaError(f"unknown={unknown!r}, expected one of {', '.join(UNKNOWN_POLICIES)}")
        self.fields: tuple[Field, ...] = tuple(declared)
        self.names: tuple[str, ...] = tuple(one.name for one in declared)
        self.unknown: Literal["refuse", "ignore", "add"] = unknown
        self._all_numeric = all(one.kind == "numeric" for one in declared)
        self._index = {name: index for index, name in enumerate(self.names)}
        if len(self._index) != len(self.names):
            repeated = [name for name, count in Counter(self.names).items() if count > 1]
            raise SchemaError(f"fields are declared more than once: {', '.join(map(repr, repeated))}")
        getter = itemgetter(*self.names)
        self._getter = getter if len(self.names) > 1 else lambda event: (getter(event),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.fields == other.fields and self.unknown == other.unknown

    def __hash__(self) -> int:
        return hash((self.fields, self.unknown))

    def __repr__(self) -> str:
        kinds = ", ".join(f"{one.name!r}: {one if one.categories else one.kind!r}" for one in self.fields)
        return f"Schema({{{kinds}}}, unknown={self.unknown!r})"

    @property
    def may_grow(self) -> bool:
        """Whether events may add fields or categories."""
        return self.unknown == "add" or any(
            one.kind == "category" and len(one.categories) < one.max_categories for one in self.fields
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_schema, (self.fields, self.unknown)

    def __len__(self) -> int:
        return len(self.fields)

    def position(self, name: str) -> int:
        """Return the row of a field.

        Raises
        ------
        SchemaError
            When there is no such field.

        """
        try:
            return self._index[name]
        except KeyError:
            raise SchemaError(f"no field {name!r}; the fields are {', '.join(map(repr, self.names))}") from None

    def extends(self, other: Schema) -> bool:
        """Return whether every block encoded with `other` means the same to this schema, but for new fields.

        It does when the fields of `other` come first here, with the same kinds, and their categories come
        first in the vocabularies.

        >>> Schema([Field("c", "category", ("a", "b"))]).extends(Schema([Field("c", "category", ("a",))]))
        True
        >>> Schema([Field("c", "category", ("b", "a"))]).extends(Schema([Field("c", "category", ("a",))]))
        False

        """
        if self is other:
            return True
        return len(self) >= len(other) and all(
            mine is theirs
            or (
                (mine.name, mine.kind) == (theirs.name, theirs.kind)
                and mine.categories[: len(theirs.categories)] == theirs.categories
            )
            for mine, theirs in zip(self.fields, other.fields)
        )

    @classmethod
    def infer(
        cls,
        events: Any,
        *,
        unknown: Literal["refuse", "ignore", "add"] = "refuse",
        exclude: Iterable[str] = (),
        max_categories: int = 32,
    ) -> Schema:
        """Return the schema of some first events: float and int numeric, str category, bool flag.

        Category vocabularies are left empty; they grow when events are encoded with `extend=True`.

        Raises
        ------
        SchemaError
            When no field can be inferred or a column's type is not supported.
        EventError
            When a value is nested or of a type that is no field's.

        >>> Schema.infer([{"b": True, "x": 1}, {"x": None, "s": "a"}])
        Schema({'b': 'flag', 'x': 'numeric', 's': 'category'}, unknown='refuse')

        """
        left_out = set(exclude)
        kinds: dict[str, Kind]
        if isinstance(events, Batch):
            return events.schema
        if isinstance(events, np.ndarray):
            values = _as_matrix(events)
            kind: Kind = "flag" if values.dtype == np.bool_ else "numeric"
            kinds = {f"x{column}": kind for column in range(values.shape[1])}
        elif _is_frame(events):
            table = _as_arrow(events)
            kinds = {name: _kind_of_column(name, type_) for name, type_ in zip(table.schema.names, table.schema.types)}
        else:
            kinds = _kinds_of_dicts(_as_dicts(events), left_out)
        fields = [
            Field(name, kind, max_categories=max_categories) for name, kind in kinds.items() if name not in left_out
        ]
        if not fields:
            raise SchemaError("no field could be inferred: the events are empty or all their fields are excluded")
        return cls(fields, unknown=unknown)

    def encode(
        self,
        events: Any,
        weight: npt.ArrayLike | None = None,
        time: npt.ArrayLike | None = None,
        *,
        on_error: Literal["raise", "collect"] = "raise",
        extend: bool = False,
    ) -> Batch:
        """Return the events as a feature-major block.

        Parameters
        ----------
        events
            A dict, a list of dicts, an array (n, D) in the order of the schema, an Arrow table or record
            batch, anything with `__arrow_c_stream__` (pandas, polars), or a `Batch`.
        weight
            Sample weights (n,) or one for all, finite and >= 0.
        time
            Event times (n,) or one for all: finite numbers, or datetime64 (seconds since 1970).
        on_error
            "raise" the first error, or "collect" the errors and leave those events out.
        extend
            Whether new categories join the vocabularies, and new fields the schema under `unknown="add"`.
            The block's `schema` is then the extended one; this schema never changes.

        Raises
        ------
        EventError
            With `on_error="raise"`, for the first event that cannot be used.
        SchemaError
            When the frame as a whole does not fit: duplicate, missing or unsupported columns.

        """
        if on_error not in ("raise", "collect"):
            raise ValueError(f'on_error must be "raise" or "collect", got {on_error!r}')
        if isinstance(events, Batch):
            return self._adopt(events, weight, time)
        errors: dict[int, EventError] = {}
        ignored: dict[str, int] = {}
        schema = self
        if isinstance(events, np.ndarray):
            values = self._encode_matrix(events)
        elif isinstance(events := in_memory(events), pa.Table):
            schema, values = self._encode_frame(events, errors, ignored, extend)
        else:
            schema, values = self._encode_dicts(_as_dicts(events), errors, ignored, extend)
        complete = schema._check_values(values, errors)
        n_events = values.shape[1]
        weights = _check_weight(weight, n_events, errors)
        times = _check_time(time, n_events, errors)
        if not errors:
            batch = Batch(values, schema, weights, times, ignored_fields=ignored)
            if complete:
                batch._know_complete()
            return batch
        rejected = tuple(errors[index] for index in sorted(errors))
        if on_error == "raise":
            raise rejected[0]
        keep = np.ones(n_events, dtype=bool)
        keep[[error.index for error in rejected]] = False
        accepted = np.flatnonzero(keep)
        weights = None if weights is None else weights[accepted]
        times = None if times is None else times[accepted]
        if schema is self:
            return Batch(values[:, accepted], schema, weights, times, rejected, accepted, ignored)
        # The schema grew. An event that is left out has no say in what it grows by, so encode the others anew.
        others = _take(events, accepted)
        batch = self.encode(others, weights, times, on_error="collect", extend=extend)
        late = tuple(
            EventError(int(accepted[error.index]), error.field, error.value, error.expected) for error in batch.rejected
        )
        if batch.accepted is not None:
            accepted = accepted[batch.accepted]
        rejected = tuple(sorted((*rejected, *late), key=lambda error: error.index))
        return replace(batch, rejected=rejected, accepted=accepted, ignored_fields=ignored)

    def _adopt(self, batch: Batch, weight: npt.ArrayLike | None, time: npt.ArrayLike | None) -> Batch:
        if batch.schema is not self and batch.schema.fields != self.fields:
            raise SchemaError(f"the batch was encoded with another schema: {batch.schema!r} instead of {self!r}")
        if weight is None and time is None:
            return batch
        errors: dict[int, EventError] = {}
        weights = batch.weight if weight is None else _check_weight(weight, batch.n_events, errors)
        times = batch.time if time is None else _check_time(time, batch.n_events, errors)
        if errors:
            raise errors[min(errors)]
        return replace(batch, weight=weights, time=times)

    def _encode_matrix(self, matrix: npt.NDArray[Any]) -> Array:
        matrix = _as_matrix(matrix)
        if matrix.shape[1] != len(self.fields):
            raise SchemaError(
                f"the array has {matrix.shape[1]} columns, the schema {len(self.fields)} fields "
                f"({', '.join(map(repr, self.names))})"
            )
        for one in () if self._all_numeric else self.fields:
            if one.kind == "category":
                raise SchemaError(
                    f"field {one.name!r} is a category, which an array of numbers cannot hold; pass a frame or dicts"
                )
        values: Array = matrix.T.astype(np.float64, copy=False)
        return values

    def _encode_frame(
        self, table: pa.Table, errors: dict[int, EventError], ignored: dict[str, int], extend: bool
    ) -> tuple[Schema, Array]:
        names = table.schema.names
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise SchemaError(f"the frame has duplicate columns: {', '.join(map(repr, repeated))}")
        missing = [name for name in self.names if name not in names]
        if missing:
            lacking, present = (", ".join(map(repr, some)) for some in (missing, names))
            raise SchemaError(f"the frame has no column {lacking}; its columns are {present}")
        schema = self
        unknown = [name for name in names if name not in self._index]
        if unknown:
            if self.unknown == "refuse":
                raise SchemaError(
                    f"the frame has columns that are no field of the schema: {', '.join(map(repr, unknown))}; "
                    'drop them, or make the schema with unknown="ignore" or "add"'
                )
            if self.unknown == "add" and extend:
                schema = self._with_fields(
                    Field(name, _kind_of_column(name, table.schema.field(name).type)) for name in unknown
                )
            else:
                ignored.update({name: table.num_rows - table.column(name).null_count for name in unknown})
        fields = list(schema.fields)
        values = np.empty((len(fields), table.num_rows))
        for row, one in enumerate(fields):
            fields[row] = _encode_column(one, table.column(one.name), values[row], errors, extend)
        if any(new is not old for new, old in zip(fields, schema.fields)):
            schema = Schema(fields, unknown=self.unknown)
        return schema, values

    def _encode_dicts(
        self,
        events: Sequence[Mapping[str, Any]],
        errors: dict[int, EventError],
        ignored: dict[str, int],
        extend: bool,
    ) -> tuple[Schema, Array]:
        width = len(self.names)
        schema = self
        try:
            # Mappings other than dicts may answer for keys that they do not hold.
            if any(len(event) != width or type(event) is not dict for event in events):
                raise KeyError
            rows = list(map(self._getter, events))
        except (KeyError, TypeError):
            schema = self._check_keys(events, errors, ignored, extend)
            rows = [
                tuple(event.get(name) for name in schema.names) if isinstance(event, Mapping) else (None,) * len(schema)
                for event in events
            ]
        columns: Sequence[Sequence[Any]] = list(zip(*rows)) if rows else [()] * len(schema)
        fields = list(schema.fields)
        values = np.empty((len(fields), len(events)))
        for row, one in enumerate(fields):
            fields[row] = _encode_objects(one, columns[row], values[row], errors, extend)
        if any(new is not old for new, old in zip(fields, schema.fields)):
            schema = Schema(fields, unknown=self.unknown)
        return schema, values

    def _check_keys(
        self,
        events: Sequence[Any],
        errors: dict[int, EventError],
        ignored: dict[str, int],
        extend: bool,
    ) -> Schema:
        new: dict[str, Field] = {}
        for index, event in enumerate(events):
            if not isinstance(event, Mapping):
                errors[index] = EventError(index, None, event, "a mapping of field names to values")
                continue
            for name in event:
                if name in self._index:
                    continue
                if self.unknown == "refuse" or not isinstance(name, str):
                    expected = "only the fields " + ", ".join(map(repr, self.names))
                    errors.setdefault(index, EventError(index, str(name), event[name], expected))
                elif self.unknown == "add" and extend:
                    if name not in new and not _is_missing(event[name]):
                        try:
                            new[name] = Field(name, _kind_of_value(index, name, event[name]))
                        except EventError as error:
                            errors.setdefault(index, error)
                elif not _is_missing(event[name]):
                    ignored[name] = ignored.get(name, 0) + 1
        return self._with_fields(new[name] for name in sorted(new)) if new else self

    def _with_fields(self, fields: Iterable[Field]) -> Schema:
        return Schema((*self.fields, *fields), unknown=self.unknown)

    def takes_form(self, events: npt.NDArray[Any]) -> bool:
        """Whether an array is one of events (n, D), n > 0, that `encode` would not change, whatever its values.

        >>> schema = Schema({"x": "numeric"})
        >>> schema.takes_form(np.array([[1.0], [np.nan]])), schema.takes_form(np.array([[1]]))
        (True, False)

        """
        return (
            self._all_numeric
            and events.dtype == np.float64
            and events.ndim == 2
            and events.shape[0] > 0
            and events.shape[1] == len(self.fields)
            and events.flags.aligned
        )

    def _check_values(self, values: Array, errors: dict[int, EventError]) -> bool:
        """Add an error for every value out of its field's range, and for every event without any value.

        Return whether no value is missing.
        """
        if values.shape[1] == 0:
            return True
        complete = is_plain(values)
        if complete and self._all_numeric:
            return True
        if not complete:
            empty = np.isnan(values).all(axis=0)
            for index in np.flatnonzero(empty).tolist():
                errors.setdefault(index, EventError(index, None, None, "at least one field with a value"))
        for row, one in zip(values, self.fields):
            if one.kind == "category" or (complete and one.kind == "numeric"):
                continue
            wrong = np.abs(row) > LARGEST_VALUE
            if one.kind in ("count", "duration"):
                wrong |= row < 0.0
            if one.kind == "count":
                wrong |= ((row != np.floor(row)) & ~np.isnan(row)) | (row > LARGEST_COUNT)
            if one.kind == "flag":
                wrong |= (row != 0.0) & (row != 1.0) & ~np.isnan(row)
            for index in np.flatnonzero(wrong).tolist():
                errors.setdefault(index, EventError(index, one.name, float(row[index]), EXPECTED[one.kind]))
        return complete

    def check(self, batch: Batch) -> None:
        """Check a block of this schema that `encode` did not make.

        Raises
        ------
        EventError
            For the first event that `encode` would have refused.

        """
        errors: dict[int, EventError] = {}
        self._check_values(batch.values, errors)
        for row, one in zip(batch.values, self.fields):
            if one.kind == "category":
                codes = np.isnan(row) | np.isin(row, np.arange(one.n_codes))
                for index in np.flatnonzero(~codes).tolist():
                    errors.setdefault(index, EventError(index, one.name, float(row[index]), "the code of a category"))
        _check_weight(batch.weight, batch.n_events, errors)
        _check_time(batch.time, batch.n_events, errors)
        if errors:
            raise errors[min(errors)]

    def decode(self, values: Array) -> pa.Table:
        """Return a feature-major block (D, B) as a table of events.

        >>> Schema({"n": "count"}).decode(np.array([[2.0, np.nan]]))["n"].to_pylist()
        [2, None]

        """
        columns: dict[str, pa.Array] = {}
        for one, row in zip(self.fields, values):
            missing = np.isnan(row)
            if one.kind == "category":
                labels = ["other", *one.categories]
                columns[one.name] = pa.array(
                    [None if gone else labels[int(code)] for code, gone in zip(row.tolist(), missing.tolist())],
                    pa.string(),
                )
            elif one.kind == "flag":
                columns[one.name] = pa.array(np.where(missing, 0.0, row) > 0.5, mask=missing)
            elif one.kind == "count":
                columns[one.name] = pa.array(np.where(missing, 0.0, row).astype(np.int64), mask=missing)
            else:
                columns[one.name] = pa.array(row, mask=missing)
        return pa.table(columns)


def _rebuild_schema(fields: tuple[Field, ...], unknown: Literal["refuse", "ignore", "add"]) -> Schema:
    return Schema(fields, unknown=unknown)


def in_memory(events: Any) -> Any:
    """Return events that can be gone through twice: a frame that is a stream is read into a table."""
    return _as_arrow(events) if _is_frame(events) else events


def _is_frame(events: Any) -> bool:
    return isinstance(events, pa.RecordBatch | pa.Table) or hasattr(events, "__arrow_c_stream__")


def _as_arrow(events: Any) -> pa.Table:
    if isinstance(events, pa.RecordBatch):
        events = pa.Table.from_batches([events])
    if not isinstance(events, pa.Table):
        names = getattr(events, "columns", None)
        repeated = [] if names is None else [str(name) for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise SchemaError(f"the frame has duplicate columns: {', '.join(map(repr, repeated))}")
        try:
            events = pa.RecordBatchReader.from_stream(events).read_all()
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise SchemaError(f"the {type(events).__name__} cannot be read as a table of columns: {error}") from None
    # pandas hands its index over as columns; it labels the rows and is no field.
    described = (events.schema.pandas_metadata or {}).get("index_columns", ())
    index = [name for name in described if isinstance(name, str) and name in events.column_names]
    return events.drop_columns(index) if index else events


def _as_matrix(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if matrix.ndim != 2:
        raise SchemaError(f"an array of events has two dimensions (events, fields), got shape {matrix.shape}")
    if matrix.dtype.kind not in "fiub":
        raise SchemaError(f"an array of events holds numbers, got dtype {matrix.dtype}; pass a frame or dicts")
    if isinstance(matrix, np.ma.MaskedArray):
        matrix = np.ma.filled(matrix.astype(np.float64), np.nan)
    return np.asarray(matrix)


def _as_dicts(events: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(events, Mapping):
        return [events]
    if isinstance(events, Sequence) and not isinstance(events, str | bytes):
        return events
    raise SchemaError(
        f"events of type {type(events).__name__} are not supported; pass a dict, a list of dicts, a two-dimensional "
        "NumPy array, or a frame (Arrow, pandas, polars)"
    )


def _take(events: Any, positions: npt.NDArray[np.intp]) -> Any:
    """Return the events, a frame or dicts, at these positions."""
    if _is_frame(events):
        return _as_arrow(events).take(arrow_numbers(positions))
    dicts = _as_dicts(events)
    return [dicts[position] for position in positions.tolist()]


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind_of_value(index: int, name: str, value: object) -> Kind:
    if isinstance(value, bool | np.bool_):
        return "flag"
    if isinstance(value, NUMBERS):
        return "numeric"
    if isinstance(value, str):
        return "category"
    raise EventError(index, name, value, "a number, a string, true or false")


def _kinds_of_dicts(events: Sequence[Mapping[str, Any]], left_out: set[str]) -> dict[str, Kind]:
    kinds: dict[str, Kind | None] = {}
    for index, event in enumerate(events):
        if not isinstance(event, Mapping):
            raise EventError(index, None, event, "a mapping of field names to values")
        for name, value in event.items():
            if name in left_out or kinds.get(name) is not None:
                continue
            if not isinstance(name, str):
                raise EventError(index, str(name), value, "a field name that is a string")
            kinds[name] = None if _is_missing(value) else _kind_of_value(index, name, value)
    return {name: kind or "numeric" for name, kind in kinds.items()}


def _kind_of_column(name: str, type_: pa.DataType) -> Kind:
    if pa.types.is_boolean(type_):
        return "flag"
    if (
        pa.types.is_integer(type_)
        or pa.types.is_floating(type_)
        or pa.types.is_decimal(type_)
        or pa.types.is_null(type_)
    ):
        return "numeric"
    value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_string(value_type) or pa.types.is_large_string(value_type) or pa.types.is_string_view(value_type):
        return "category"
    raise SchemaError(f"column {name!r} has type {type_}, which is no number, string or boolean; convert or exclude it")


def _expected_of_no_number(kind: Kind) -> str:
    # How large a number may be is beside the point.
    return "a number" if kind == "numeric" else EXPECTED[kind]


def _encode_column(
    one: Field, column: pa.ChunkedArray, out: Array, errors: dict[int, EventError], extend: bool
) -> Field:
    if one.kind == "category":
        return _encode_strings(one, column, out, extend)
    type_ = column.type
    if pa.types.is_boolean(type_) or pa.types.is_decimal(type_):
        column = pc.cast(column, pa.float64())
    elif not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_null(type_)):
        # Anything but strings raises: the column as a whole is no field's.
        _kind_of_column(one.name, type_)
        for index, value in enumerate(column.to_pylist()):
            out[index] = np.nan
            if value is not None:
                errors.setdefault(index, EventError(index, one.name, value, _expected_of_no_number(one.kind)))
        return one
    start = 0
    for chunk in column.chunks:
        stop = start + len(chunk)
        out[start:stop] = np.nan if pa.types.is_null(type_) else numbers_of(chunk)
        start = stop
    return one


def numbers_of(array: pa.Array) -> npt.NDArray[Any]:
    """Return the values of a numeric Arrow array, NaN where there is none.

    Arrow's own `to_numpy` imports pandas, where that is installed, which takes longer than to read a file, and so does
    what makes a scalar or an array of Python's objects.
    """
    if array.null_count:
        array = pc.fill_null(array.cast(pa.float64(), safe=False), _scalar(math.nan))
    return np.from_dlpack(array)


def _scalar(number: float) -> pa.Scalar:
    return arrow_numbers(np.array([number]))[0]


def _encode_strings(one: Field, column: pa.ChunkedArray, out: Array, extend: bool) -> Field:
    if not pa.types.is_null(column.type) and _kind_of_column(one.name, column.type) != "category":
        raise SchemaError(f"column {one.name!r} has type {column.type}, but the field is a category of strings")
    if not pa.types.is_dictionary(column.type):
        column = pc.cast(column, pa.string()).dictionary_encode()
    start = 0
    for chunk in column.chunks:
        labels = chunk.dictionary.to_pylist()
        indices = np.from_dlpack(pc.fill_null(chunk.indices.cast(pa.int64()), _scalar(len(labels))))
        if extend and len(one.categories) < one.max_categories and any(one.code(label) == OTHER for label in labels):
            # A dictionary may hold labels that no event uses, and its order says nothing: go by first appearance.
            seen, first = np.unique(indices, return_index=True)
            in_order = seen[np.argsort(first)].tolist()
            one = one.grown(labels[at] for at in in_order if at < len(labels) and labels[at] is not None)
        codes = np.array([np.nan if label is None else one.code(label) for label in labels] + [np.nan])
        out[start : start + len(chunk)] = codes[indices]
        start += len(chunk)
    return one


def _encode_objects(
    one: Field, column: Sequence[Any], out: Array, errors: dict[int, EventError], extend: bool
) -> Field:
    if one.kind == "category":
        if extend:
            one = one.grown(value for value in column if isinstance(value, str))
        for index, value in enumerate(column):
            if isinstance(value, str):
                out[index] = one.code(value)
            else:
                out[index] = np.nan
                if not _is_missing(value):
                    errors.setdefault(index, EventError(index, one.name, value, EXPECTED["category"]))
        return one
    try:
        block = np.array(column)
    except (ValueError, OverflowError):
        block = np.array(0)
    if block.dtype.kind in "fiub" and block.ndim == 1:
        out[:] = block
        return one
    for index, value in enumerate(column):
        out[index] = np.nan
        if isinstance(value, NUMBERS | np.bool_):
            try:
                out[index] = value
            except (OverflowError, ValueError):
                errors.setdefault(index, EventError(index, one.name, value, EXPECTED[one.kind]))
        elif not _is_missing(value):
            errors.setdefault(index, EventError(index, one.name, value, _expected_of_no_number(one.kind)))
    return one


def _check_weight(weight: npt.ArrayLike | None, n_events: int, errors: dict[int, EventError]) -> Array | None:
    if weight is None:
        return None
    weights = _per_event("weight", weight, n_events)
    wrong = ~((weights == 0.0) | ((weights >= SMALLEST_SAMPLE_WEIGHT) & (weights <= LARGEST_VALUE)))
    for index in np.flatnonzero(wrong).tolist():
        errors[index] = EventError(index, "weight", float(weights[index]), EXPECTED_WEIGHT)
    return weights


def _check_time(time: npt.ArrayLike | None, n_events: int, errors: dict[int, EventError]) -> Array | None:
    if time is None:
        return None
    moments = np.asarray(time)
    if moments.dtype.kind in "OU":
        moments = _from_dates(moments)
    if moments.dtype.kind == "M":
        moments = (moments - np.datetime64(0, "s")) / np.timedelta64(1, "s")
    times = _per_event("time", moments, n_events)
    for index in np.flatnonzero(~np.isfinite(times)).tolist():
        errors.setdefault(index, EventError(index, "time", float(times[index]), "a finite event time"))
    return times


def _from_dates(moments: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return datetime objects, with or without a zone, and ISO 8601 text as datetime64; anything else unchanged."""
    with suppress(pa.ArrowException):
        given = pa.array(moments.ravel().tolist())
        if pa.types.is_timestamp(given.type) or pa.types.is_string(given.type):
            for stamp in (pa.timestamp("us", "UTC"), pa.timestamp("us")):
                with suppress(pa.ArrowException):
                    dates: npt.NDArray[Any] = given.cast(stamp).cast(pa.timestamp("us")).to_numpy(zero_copy_only=False)
                    return dates
    return moments


def _per_event(what: str, given: npt.ArrayLike, n_events: int) -> Array:
    try:
        numbers = np.asarray(given)
        if numbers.dtype.kind == "c":
            raise TypeError
        numbers = numbers.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError):
        raise SchemaError(f"{what} must be a number for each event, got {reprlib.repr(given)}") from None
    if numbers.ndim == 0:
        return np.full(n_events, float(numbers))
    if numbers.shape != (n_events,):
        raise SchemaError(f"{what} has shape {numbers.shape}, expected ({n_events},): one for each event")
    return numbers
