"""Which features of the events are in the model, and what becomes of the others."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stream_em.families import Family, Product, kind_for
from stream_em.learners import OnlineEM
from stream_em.plain import is_number
from stream_em.schema import Batch, Field, FieldCounts, Kind, Schema, SchemaError, _is_missing

# A new feature joins once it has had this many values: one value says nothing of its spread.
SUPPORT = 10

# New features whose values are kept at a time.
MOST_NEWCOMERS = 1_000
OTHER_FEATURES = "(other features)"


class IgnoredFeatures(FieldCounts):
    """Events in which features were ignored, by feature; warns of the first one.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     ignored = IgnoredFeatures()
    ...     ignored.update(["a", "b"])
    ...     ignored.update(["a"])
    >>> dict(ignored), len(caught)
    ({'a': 2, 'b': 1}, 1)

    """

    pool = OTHER_FEATURES

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        super().__init__()
        dict.update(self, counts or {})

    def update(self, names: Iterable[str] | Mapping[str, int] | None = None, /, **more: int) -> None:  # type: ignore[override]
        """Count events with these features."""
        counts = Counter(names, **more)
        if counts and not self:
            shown = ", ".join(map(repr, list(counts)[:3]))
            warnings.warn(
                f"features that are not in the model are ignored, the first of them {shown}; they are counted in "
                "`ignored_features`, and this is not said again",
                stacklevel=2,
            )
        super().update(counts)


class Features:
    """The features of one stream.

    Parameters
    ----------
    kinds
        Kinds that are stated, by feature.
    family
        Family of the components; those of its features that it names are in the model from the start.
    unknown
        What to do with a feature that is not in the model: "add", "ignore" or "refuse".
    max_features
        Features in the model beyond which none is added.

    >>> features = Features({}, Product({}, others="full"), "add", 10)
    >>> features.schema_of({"b": 1.0, "a": "x", "c": None})
    Schema({'a': 'category', 'b': 'numeric'}, unknown='add')

    """

    def __init__(self, kinds: Mapping[str, Kind], family: Family, unknown: Any, max_features: int) -> None:
        self.kinds, self.unknown, self.max_features = kinds, unknown, max_features
        self._families: dict[str, Family] = {}
        self._family_of_others: Family | None = family
        if isinstance(family, Product):
            for key, one in family.families.items():
                self._families.update(dict.fromkeys((key,) if isinstance(key, str) else key, one))
            self._family_of_others = None
        self._names_all = isinstance(family, Product) and family.others is None
        self.labels: dict[str, Hashable] = {}
        self._newcomers: dict[str, tuple[Field, list[Any]]] = {}
        self._kinds_taken: set[Kind] = set()

    def named(self, event: Mapping[Hashable, Any]) -> Mapping[str, Any]:
        """Return the event with strings for names, which is what the engine knows.

        Raises
        ------
        SchemaError
            When two names are the same as text.

        """
        if all(type(name) is str for name in event):
            return event  # type: ignore[return-value]
        renamed = {str(name): value for name, value in event.items()}
        if len(renamed) < len(event):
            raise SchemaError(f"two features have the same name as text: {', '.join(map(repr, event))}")
        return renamed

    def remember_labels(self, labels: Mapping[str, Hashable]) -> None:
        """Keep the labels that are no strings, for answers that are by feature."""
        self.labels.update(labels)

    def schema_of(self, event: Mapping[str, Any]) -> Schema:
        """Return the schema of a first event: its features that have a value, in the order of their names."""
        there = {name: event[name] for name in sorted(event) if not _is_missing(event[name])}
        return self._schema_like(Schema.infer([there or dict(event)], unknown=self.unknown))

    def schema_of_table(self, table: pa.Table) -> Schema:
        """Return the schema of a first table: its columns that hold a value, in the order of their names."""
        there = [name for name in sorted(table.column_names) if _some_values(table[name])]
        return self._schema_like(Schema.infer(table.select(there or table.column_names), unknown=self.unknown))

    def _schema_like(self, inferred: Schema) -> Schema:
        kinds = {name: self._kind_of(name, "numeric") for name in self._families}
        for one in inferred.fields:
            if one.name in self._families or not self._names_all:
                kinds[one.name] = self._kind_of(one.name, one.kind)
        return Schema({name: kinds[name] for name in sorted(kinds)}, unknown=inferred.unknown)

    def _kind_of(self, name: str, inferred: Kind) -> Kind:
        """Return the kind of a feature: the one stated, or for a number the one that its family takes."""
        if name in self.kinds:
            return self.kinds[name]
        family = self._families.get(name, self._family_of_others)
        return inferred if family is None or inferred != "numeric" else kind_for(family, inferred)

    def in_question(self, table: pa.Table, schema: Schema) -> pa.Table:
        """Return a table without the columns that are not in the model and hold nothing."""
        return table.select([name for name in table.column_names if name in schema.names or _some_values(table[name])])

    def split(
        self, event: Mapping[str, Any], learner: OnlineEM, schema: Schema
    ) -> tuple[Mapping[str, Any], dict[str, Field], list[str]]:
        """Return the part of an event that is in the model, the fields of its newcomers, and what is to be ignored.

        Raises
        ------
        EventError, FamilyError
            When a newcomer's value is not that of a feature, or the model has no family for it.

        """
        known = set(schema.names)
        extra = {name: [value] for name, value in sorted(event.items()) if name not in known and not _is_missing(value)}
        inside = {name: value for name, value in event.items() if name in known}
        if self.unknown == "ignore" or len(schema) >= self.max_features:
            return inside, {}, list(extra)
        newcomers = {
            name: self._field_of(name, [{name: some[0]}], some, learner, schema) for name, some in extra.items()
        }
        return inside, newcomers, []

    def grown(
        self, table: pa.Table, learner: OnlineEM, schema: Schema
    ) -> tuple[Schema, dict[str, Field], dict[str, list[Any]], dict[str, int]]:
        """Return the schema with the columns that can join it, and the fields and values of those that cannot yet.

        What is to be ignored comes last, with the number of its values.

        Raises
        ------
        EventError, SchemaError, FamilyError
            When a column is no feature, or the model has no family for it.

        """
        joined: list[Field] = []
        newcomers: dict[str, Field] = {}
        values: dict[str, list[Any]] = {}
        ignored: dict[str, int] = {}
        for name in sorted(set(table.column_names) - set(schema.names)):
            some = _some_values(table[name])
            if not some:
                continue
            if len(schema) + len(joined) >= self.max_features:
                ignored[name] = table.num_rows - table[name].null_count
                continue
            field = self._field_of(name, table.select([name]), some, learner, schema)
            if len(self._newcomers.get(name, (field, []))[1]) + len(some) >= SUPPORT:
                joined.append(field)
            else:
                newcomers[name], values[name] = field, some
        if joined:
            schema = Schema((*schema.fields, *joined), unknown=schema.unknown)
        return schema, newcomers, values, ignored

    def _field_of(self, name: str, source: Any, values: list[Any], learner: OnlineEM, schema: Schema) -> Field:
        """Return the field of a newcomer, as it was first seen in `source`, once its values are known to be its own."""
        if name in self._newcomers:
            field = self._newcomers[name][0]
        else:
            (inferred,) = Schema.infer(source).fields
            field = Field(name, self._kind_of(name, inferred.kind))
        Schema([field]).encode([{name: value} for value in values])
        # A family that names no fields takes all of one kind or none; a stream may bring a new field with each event.
        if field.kind not in self._kinds_taken:
            learner.model.bind(Schema((*schema.fields, field)))
        return field

    def welcome(
        self, newcomers: Mapping[str, Field], values: Mapping[str, list[Any]], learner: OnlineEM, schema: Schema
    ) -> Batch | None:
        """Keep the newcomers' values; return, encoded, those of the features that now join, None when there is none."""
        self._kinds_taken.update(field.kind for field in newcomers.values())
        ready: dict[str, tuple[Field, list[Any]]] = {}
        for name, field in newcomers.items():
            kept = self._newcomers.pop(name, (field, []))[1]
            kept = [*kept, *values[name][: SUPPORT - len(kept)]]
            if len(kept) == SUPPORT and len(schema) + len(ready) < self.max_features:
                ready[name] = field, kept
            else:
                self._newcomers[name] = field, kept
        while len(self._newcomers) > MOST_NEWCOMERS:
            longest_unseen = next(iter(self._newcomers))
            kept = self._newcomers.pop(longest_unseen)[1]
            learner.ignored_fields.update({longest_unseen: len(kept)})
        if not ready:
            return None
        fields = (*schema.fields, *(field for field, _ in ready.values()))
        events = [{name: value} for name, (_, kept) in ready.items() for value in kept]
        return Schema(fields, unknown=schema.unknown).encode(events, extend=True)

    def forget(self, names: Iterable[str]) -> None:
        """Keep no values of these features any longer, which have joined."""
        for name in names:
            self._newcomers.pop(name, None)


def warn_of_full(before: Schema | None, after: Schema | None, *, stacklevel: int) -> None:
    """Warn of the features whose vocabulary is full since `before`: from now on any other value is 'other'.

    >>> full = Schema([Field("id", "category", ("a", "b"), max_categories=2)])
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_of_full(Schema([Field("id", "category", ("a",), max_categories=2)]), full, stacklevel=2)
    ...     warn_of_full(full, full, stacklevel=2)
    >>> [str(one.message)[:42] for one in caught]
    ["feature 'id' has had 2 different strings, "]

    """
    known = {} if before is None else {one.name: one for one in before.fields}
    for one in () if after is None else after.fields:
        if len(one.categories) < one.max_categories or known.get(one.name) == one:
            continue
        advice = "if it is an id or free text, leave it out, as with `compose.Discard`"
        if all(map(is_number, one.categories)):
            advice = (
                "they are all numbers: convert them, as with `converters` of `stream.iter_csv`, which reads text where "
                "there are none; if it is an id, leave it out, as with `compose.Discard`"
            )
        warnings.warn(
            f"feature {one.name!r} has had {len(one.categories)} different strings, as many as a category may have: "
            f"from now on any other is 'other'; {advice}",
            stacklevel=stacklevel,
        )


def aligned(table: pa.Table, schema: Schema) -> pa.Table:
    """Return the table with columns of nulls for the fields of the schema that it does not have."""
    for name in schema.names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table


def _some_values(column: pa.ChunkedArray) -> list[Any]:
    """Return the first values of a column, as many as a newcomer needs."""
    there = column.drop_null()
    if pa.types.is_floating(there.type):
        there = there.filter(pc.invert(pc.is_nan(there)))
    values: list[Any] = there[:SUPPORT].to_pylist()
    return values
