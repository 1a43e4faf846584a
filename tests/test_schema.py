from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from stream_em import Batch, EventError, Field, Schema, SchemaError

MIXED = Schema(
    [
        Field("x", "numeric"),
        Field("c", "category", ("a", "b")),
        Field("b", "flag"),
        Field("n", "count"),
        Field("d", "duration"),
    ]
)
EVENTS: list[dict[str, Any]] = [
    {"x": 1.5, "c": "b", "b": True, "n": 3, "d": 0.25},
    {"x": None, "c": "a", "b": False, "n": 0, "d": 0.0},
    {"x": -2, "c": None, "b": None, "n": None, "d": None},
    {"x": 1e100, "c": "zzz", "b": True, "n": 10**12, "d": 1e100},
]
VALUES = np.array(
    [
        [1.5, np.nan, -2.0, 1e100],
        [2.0, 1.0, np.nan, 0.0],
        [1.0, 0.0, np.nan, 1.0],
        [3.0, 0.0, np.nan, 1e12],
        [0.25, 0.0, np.nan, 1e100],
    ]
)


def test_every_form_of_events_gives_one_block() -> None:
    table = pa.Table.from_pylist(EVENTS)
    forms = [
        EVENTS,
        tuple(EVENTS),
        table,
        table.to_batches()[0],
        pa.concat_tables([table.slice(0, 1), table.slice(1, 3)]),
        pl.DataFrame(EVENTS),
        pl.DataFrame(EVENTS).with_columns(pl.col("c").cast(pl.Categorical)),
        pd.DataFrame(EVENTS).astype({"b": "boolean", "n": "Int64"}),
        pd.DataFrame(EVENTS).astype({"b": "boolean", "n": "Int64", "c": "category"}),
        table.set_column(1, "c", table["c"].dictionary_encode()),
        table.set_column(1, "c", table["c"].cast(pa.large_string())),
        table.set_column(0, "x", table["x"].cast(pa.float64())),
        table.set_column(3, "n", table["n"].cast(pa.uint64())),
    ]
    for form in forms:
        batch = MIXED.encode(form)
        np.testing.assert_array_equal(batch.values, VALUES)
        assert batch.schema is MIXED
    np.testing.assert_array_equal(MIXED.encode(EVENTS[0]).values, VALUES[:, :1])


def test_values_of_single_type_columns() -> None:
    table = pa.table(
        {"x": pa.array([1, 2], pa.int8()), "c": pa.nulls(2), "b": [1, 0], "n": [1.0, 2.0], "d": [True, False]}
    )
    np.testing.assert_array_equal(MIXED.encode(table).values, [[1, 2], [np.nan, np.nan], [1, 0], [1, 2], [1, 0]])
    decimals = Schema({"x": "numeric"}).encode(pa.table({"x": pa.array([1, 2], pa.int32()).cast(pa.decimal128(20, 2))}))
    np.testing.assert_array_equal(decimals.values, [[1.0, 2.0]])


def test_arrays_go_by_the_order_of_the_fields() -> None:
    schema = Schema({"x": "numeric", "n": "count"})
    array = np.array([[1.5, 2.0], [np.nan, 3.0]])
    for form in (array, array.astype(np.float32), np.asfortranarray(array)):
        np.testing.assert_array_equal(schema.encode(form).values, array.T)
    np.testing.assert_array_equal(schema.encode(np.array([[1, 2]], dtype=np.uint8)).values, [[1.0], [2.0]])


def test_how_events_are_grouped_changes_no_value() -> None:
    """A column is converted as a whole; what its neighbours hold must not change what one value means."""
    schema = Schema({"x": "numeric"})
    values: list[Any] = [True, 2, 2.5, None, np.float32(1.5), np.int64(3), 2**63, -(2**70), math.nan, False]
    together = schema.encode([{"x": value} for value in values], on_error="collect")
    alone = [schema.encode([{"x": value}], on_error="collect") for value in values]
    assert together.accepted is not None
    assert together.accepted.tolist() == [index for index, one in enumerate(alone) if one.n_events]
    assert together.values[0].tolist() == [one.values[0, 0] for one in alone if one.n_events]


def test_whole_numbers_beyond_float_precision_are_rounded_alike() -> None:
    schema = Schema({"x": "numeric"})
    for value in (2**53 + 1, 2**64 - 1, 10**30):
        found = [schema.encode([{"x": value}, {"x": other}]).values[0, 0] for other in (1, 1.5, 2**63)]
        assert found == [float(value)] * 3


# Inference


def test_kinds_are_inferred() -> None:
    events = [
        {"i": 1, "f": 1.5, "s": "a", "b": True, "later": None},
        {"later": "z", "np": np.float32(1.0), "nb": np.bool_(1)},
    ]
    schema = Schema.infer(events)
    kinds = {one.name: one.kind for one in schema.fields}
    assert kinds == {
        "i": "numeric",
        "f": "numeric",
        "s": "category",
        "b": "flag",
        "later": "category",
        "np": "numeric",
        "nb": "flag",
    }
    table = pa.Table.from_pylist([dict(EVENTS[0].items())])
    for form in (table, table.to_pandas(), pl.from_arrow(table)):
        assert [one.kind for one in Schema.infer(form).fields] == ["numeric", "category", "flag", "numeric", "numeric"]


def test_inference_of_other_forms() -> None:
    assert Schema.infer(np.zeros((1, 2))).names == ("x0", "x1")
    assert Schema.infer(np.zeros((1, 1), dtype=bool)).fields[0].kind == "flag"
    assert Schema.infer(Batch(np.zeros((5, 0)), MIXED)) is MIXED
    assert Schema.infer([{"x": None}]).fields[0].kind == "numeric"
    assert Schema.infer([{"a": 1, "label": "x"}], exclude=["label"]).names == ("a",)
    assert Schema.infer({"a": 1}, unknown="ignore", max_categories=3).fields[0].max_categories == 3
    with pytest.raises(SchemaError, match="no field"):
        Schema.infer([{"a": 1}], exclude=["a"])
    with pytest.raises(EventError, match="event 1, field 'b': got \\[1\\]"):
        Schema.infer([{"a": 1}, {"b": [1]}])


# Unknown fields


@pytest.mark.parametrize("extend", [False, True])
def test_unknown_fields_ignored(extend: bool) -> None:
    schema = Schema({"x": "numeric"}, unknown="ignore")
    batch = schema.encode([{"x": 1.0, "y": 2.0}, {"x": 1.0, "y": 3.0, "z": "?"}, {"x": 4.0}], extend=extend)
    assert batch.schema is schema
    assert dict(batch.ignored_fields) == {"y": 2, "z": 1}
    assert dict(schema.encode(pa.table({"x": [1.0], "y": [[1]]}), extend=extend).ignored_fields) == {"y": 1}


def test_unknown_fields_added_only_when_learning() -> None:
    schema = Schema({"x": "numeric"}, unknown="add")
    events = [{"x": 1.0}, {"x": 2.0, "s": "a", "b": True}, {"x": 3.0, "s": None, "gone": None}]
    batch = schema.encode(events, extend=True)
    assert [(one.name, one.kind) for one in batch.schema.fields] == [("x", "numeric"), ("b", "flag"), ("s", "category")]
    np.testing.assert_array_equal(batch.values, [[1, 2, 3], [np.nan, 1, np.nan], [np.nan, 1, np.nan]])
    assert batch.schema.unknown == "add"
    assert schema.names == ("x",)
    scored = schema.encode(events)
    assert scored.schema is schema
    # A key without a value holds no field.
    assert dict(scored.ignored_fields) == {"s": 1, "b": 1}
    table = pa.table({"x": [1.0, 2.0, 3.0], "s": [None, "a", None], "b": [None, True, None]})
    assert dict(schema.encode(table).ignored_fields) == {"s": 1, "b": 1}
    table = pa.table({"new": ["a"], "x": [1.0]})
    assert schema.encode(table, extend=True).schema.names == ("x", "new")


# Categories


def test_vocabulary_grows_in_order_of_appearance_up_to_its_bound() -> None:
    schema = Schema([Field("c", "category", ("z",), max_categories=3)])
    labels = ["b", None, "a", "z", "c", "d", "b"]
    forms = [
        [{"c": label} for label in labels],
        pa.table({"c": labels}),
        pa.table({"c": pa.array(labels).dictionary_encode()}),
        pd.DataFrame({"c": labels}).astype("category"),
        pl.DataFrame({"c": labels}).with_columns(pl.col("c").cast(pl.Categorical)),
    ]
    for form in forms:
        batch = schema.encode(form, on_error="collect", extend=True)
        assert batch.schema.fields[0].categories == ("z", "b", "a")
        assert batch.values[0].tolist() == [2.0, 3.0, 1.0, 0.0, 0.0, 2.0]
    assert schema.fields[0].categories == ("z",)
    frozen = schema.encode(pa.table({"c": ["b", "z"]}))
    assert frozen.schema is schema
    assert frozen.values[0].tolist() == [0.0, 1.0]


def test_labels_of_a_dictionary_that_no_event_holds_do_not_count() -> None:
    schema = Schema([Field("c", "category", max_categories=2), Field("x", "numeric")])
    labels = pa.array(["unused", "b", None, "a"])
    column = pa.DictionaryArray.from_arrays(pa.array([3, 1, 2, None, 3]), labels)
    batch = schema.encode(pa.table({"c": column, "x": [1.0] * 5}), extend=True)
    assert batch.schema.fields[0].categories == ("a", "b")
    np.testing.assert_array_equal(batch.values[0], [1.0, 2.0, np.nan, np.nan, 1.0])


def test_chunks_of_a_column_may_have_dictionaries_of_their_own() -> None:
    chunks = [pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", "c", None]).dictionary_encode()]
    column = pa.chunked_array([one.cast(pa.dictionary(pa.int32(), pa.string())) for one in chunks])
    batch = Schema({"c": "category", "x": "numeric"}).encode(pa.table({"c": column, "x": [0.0] * 5}), extend=True)
    assert batch.schema.fields[0].categories == ("a", "b", "c")
    np.testing.assert_array_equal(batch.values[0], [1.0, 2.0, 2.0, 3.0, np.nan])


def test_rejected_events_leave_no_trace_in_the_schema() -> None:
    schema = Schema({"c": "category", "x": "numeric"}, unknown="add")
    events = [
        {"c": "bad", "x": "?"},
        {"c": "good", "x": 1.0},
        {"c": "worse", "x": 1.0, "new": [1]},
        {"c": "good", "x": 2.0, "fresh": 3.0},
        {"c": "bad", "x": "?", "stale": 1.0},
    ]
    batch = schema.encode(events, weight=np.arange(5.0), on_error="collect", extend=True)
    assert batch.schema.names == ("c", "x", "fresh")
    assert batch.schema.fields[0].categories == ("good",)
    assert [error.index for error in batch.rejected] == [0, 2, 4]
    assert batch.accepted is not None
    assert batch.accepted.tolist() == [1, 3]
    np.testing.assert_array_equal(batch.values, [[1, 1], [1, 2], [np.nan, 3]])
    assert batch.weight is not None
    assert batch.weight.tolist() == [1.0, 3.0]
    table = pa.table({"c": ["bad", "good"], "x": [math.inf, 1.0]})
    from_frame = schema.encode(table, on_error="collect", extend=True)
    assert from_frame.schema.fields[0].categories == ("good",)
    assert from_frame.values.tolist() == [[1.0], [1.0]]


def test_labels_and_codes_are_inverse() -> None:
    field = Field("c", "category", ("a", "b"))
    assert [field.label(field.code(one)) for one in ("a", "b", "zzz")] == ["a", "b", "other"]
    assert field.n_codes == 3
    assert field.grown([]) is field
    assert field.grown(["a"]) is field
    assert field.grown(["c", "a", "c"]).categories == ("a", "b", "c")


# Batches, weights, times


def test_decode_is_the_inverse_of_encode() -> None:
    table = MIXED.decode(VALUES[:, :3])
    assert table.to_pylist() == EVENTS[:3]
    np.testing.assert_array_equal(MIXED.encode(table).values, VALUES[:, :3])
    assert MIXED.decode(VALUES[:, 3:])["c"].to_pylist() == ["other"]
    assert MIXED.decode(VALUES[:, :0]).num_rows == 0


def test_weights_and_times() -> None:
    batch = MIXED.encode(EVENTS, weight=2.0, time=np.array(["1970-01-02", "1970-01-01"] * 2, dtype="datetime64[ms]"))
    assert batch.weight is not None
    assert batch.weight.tolist() == [2.0] * 4
    assert batch.time is not None
    assert batch.time.tolist() == [86_400.0, 0.0, 86_400.0, 0.0]
    assert batch.total_weight == 8.0
    assert MIXED.encode(EVENTS).total_weight == 4.0
    part = batch.select(slice(1, 3))
    assert (part.n_events, part.total_weight) == (2, 4.0)
    assert part.time is not None
    assert part.time.tolist() == [0.0, 86_400.0]


def test_batches_are_adopted_only_by_their_schema() -> None:
    batch = MIXED.encode(EVENTS)
    assert MIXED.encode(batch) is batch
    assert Schema(MIXED.fields, unknown="ignore").encode(batch) is batch
    weighted = MIXED.encode(batch, weight=3.0)
    assert weighted.total_weight == 12.0
    assert batch.weight is None
    with pytest.raises(EventError, match="event 0, field 'weight'"):
        MIXED.encode(batch, weight=-1.0)
    with pytest.raises(SchemaError, match="another schema"):
        Schema({"x": "numeric"}).encode(batch)


def test_center_is_the_mean_of_what_is_there() -> None:
    schema = Schema({"x": "numeric", "y": "numeric"})
    batch = Batch(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]), schema)
    assert batch.center.tolist() == [2.0, 0.0]
    assert batch.observed is not None
    assert batch.observed.tolist() == [[True, False, True], [False, False, False]]
    assert Batch(np.zeros((2, 0)), schema).center.tolist() == [0.0, 0.0]
    assert Batch(np.zeros((2, 3)), schema).observed is None


def test_encoding_leaves_the_events_alone() -> None:
    array = np.ones((3, 1))
    array.flags.writeable = False
    Schema({"x": "numeric"}).encode(array)
    events = [{"x": 1.0}]
    Schema({"x": "numeric"}, unknown="add").encode(events, extend=True)
    assert events == [{"x": 1.0}]


# Declarations


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Schema({}), "at least one field"),
        (lambda: Schema({"x": "number"}), "unknown kind 'number'"),  # type: ignore[dict-item]
        (lambda: Schema({"x": "numeric"}, unknown="drop"), "unknown='drop'"),  # type: ignore[arg-type]
        (lambda: Schema([Field("x", "numeric"), Field("x", "count")]), "more than once: 'x'"),
        (lambda: Schema({"x": Field("y", "numeric")}), "'y' is declared under the name 'x'"),
        (lambda: Field("x", "numeric", ("a",)), "only a category field"),
        (lambda: Field("x", "category", ("a", "a")), "more than once"),
        (lambda: Field("x", "category", max_categories=0), "at least 1"),
        (lambda: Field("x", "category", ("a", "b"), 1), "exceed max_categories=1"),
    ],
)
def test_wrong_declarations_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        make()


def test_on_error_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match="on_error"):
        MIXED.encode(EVENTS, on_error="skip")  # type: ignore[arg-type]


def test_schemas_compare_by_value_and_travel() -> None:
    same = Schema(list(MIXED.fields))
    assert same == MIXED
    assert hash(same) == hash(MIXED)
    assert Schema(MIXED.fields, unknown="ignore") != MIXED
    assert Schema({"x": "numeric", "y": "numeric"}) != Schema({"y": "numeric", "x": "numeric"})
    travelled = pickle.loads(pickle.dumps(MIXED))
    assert travelled == MIXED
    np.testing.assert_array_equal(travelled.encode(EVENTS).values, VALUES)
    error = pickle.loads(pickle.dumps(EventError(3, "x", "?", "a number")))
    assert (error.index, error.field, error.value, str(error)) == (
        3,
        "x",
        "?",
        "event 3, field 'x': got '?', expected a number",
    )


def test_positions() -> None:
    assert [MIXED.position(name) for name in MIXED.names] == [0, 1, 2, 3, 4]
    assert len(MIXED) == 5
    with pytest.raises(SchemaError, match="no field 'y'; the fields are 'x', 'c'"):
        MIXED.position("y")


def test_extends_means_that_codes_and_rows_keep_their_meaning() -> None:
    base = Schema([Field("x", "numeric"), Field("c", "category", ("a",))])
    grown = Schema([Field("x", "numeric"), Field("c", "category", ("a", "b")), Field("y", "flag")])
    assert base.extends(base)
    assert grown.extends(base)
    assert not base.extends(grown)
    for other in (
        Schema([Field("c", "category", ("a",)), Field("x", "numeric")]),
        Schema([Field("x", "count"), Field("c", "category", ("a",))]),
        Schema([Field("x", "numeric"), Field("c", "category", ("b", "a"))]),
        Schema([Field("x", "numeric")]),
    ):
        assert not other.extends(base)


def test_long_values_are_shortened_in_messages() -> None:
    error = EventError(0, "x", "y" * 10_000, "a number")
    assert len(str(error)) < 200
    assert error.value == "y" * 10_000


def test_masked_values_are_missing() -> None:
    array = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], mask=[[False, True], [False, False]])
    values = Schema({"x": "numeric", "y": "numeric"}).encode(array).values
    np.testing.assert_array_equal(values, [[1.0, 3.0], [np.nan, 4.0]])


@pytest.mark.parametrize("frame", [pd.Series([1.0, 2.0]), pl.Series("x", [1.0]), pd.DataFrame({"x": [1.0, "a", (2,)]})])
def test_what_is_no_table_of_columns_is_refused_by_name(frame: Any) -> None:
    # pandas before 3 does not offer a series as Arrow.
    with pytest.raises(SchemaError, match=r"cannot be read as a table of columns|of type Series are not supported"):
        Schema({"x": "numeric"}).encode(frame)
