"""Every kind of bad input: a clear message, the state as before, and never a NaN or a singular covariance."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from cases import CASES, COVARIANCE_TYPES, assert_sound, draw_batch

from stream_em import (
    BatchEM,
    Categorical,
    Constant,
    EventError,
    Exponential,
    Field,
    Gaussian,
    HalfLife,
    Mixture,
    NotFittedError,
    OnlineEM,
    Poisson,
    Product,
    Schema,
    SchemaError,
)
from stream_em.store import from_bytes, to_bytes

SCHEMA = Schema({"x": "numeric", "c": "category", "b": "flag", "n": "count", "d": "duration"})
GOOD: dict[str, Any] = {"x": 1.5, "c": "a", "b": True, "n": 3, "d": 0.5}
HUGE = 10**400

BAD_VALUES = [
    ("x", "12,50", "a number"),
    ("x", "", "a number"),
    ("x", math.inf, "a finite number"),
    ("x", -math.inf, "a finite number"),
    ("x", 1e101, "magnitude at most 1e+100"),
    ("x", HUGE, "magnitude at most 1e+100"),
    ("x", -HUGE, "a finite number"),
    ("x", [1.0], "a number"),
    ("x", {"nested": 1.0}, "a number"),
    ("x", np.array([1.0, 2.0]), "a number"),
    ("x", 1j, "a number"),
    ("x", b"1", "a number"),
    ("c", 3, "a string"),
    ("c", 2.5, "a string"),
    ("c", True, "a string"),
    ("c", ["a"], "a string"),
    ("b", 2, "true or false"),
    ("b", "true", "true or false"),
    ("b", 0.5, "true or false"),
    ("n", -1, "a whole number >= 0"),
    ("n", 1.5, "a whole number >= 0"),
    ("n", math.inf, "a whole number >= 0"),
    ("n", HUGE, "a whole number >= 0"),
    ("n", "3", "a whole number >= 0"),
    ("d", -1e-9, "a finite number >= 0"),
    ("d", math.inf, "a finite number >= 0"),
    ("d", (1, 2), "a finite number >= 0"),
]


@cache
def snapshot() -> bytes:
    families = {"x": Gaussian(), "c": Categorical(), "b": CASES["bernoulli"].family, "n": Poisson(), "d": Exponential()}
    model = Mixture(Product(families), 2)
    made = OnlineEM(model, schema=SCHEMA, warm_up=20, batch_size=8)
    made.update([{**GOOD, "x": float(i % 7), "n": i % 5, "d": 0.1 * i} for i in range(40)])
    return to_bytes(made)


def learner() -> OnlineEM:
    made = from_bytes(snapshot())
    assert isinstance(made, OnlineEM)
    return made


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize(
    ("field", "value", "expected"), BAD_VALUES, ids=[f"{f}-{str(v)[:12]}" for f, v, _ in BAD_VALUES]
)
def test_bad_value_is_named_and_changes_nothing(field: str, value: Any, expected: str, position: int) -> None:
    made = learner()
    before = to_bytes(made)
    events = [dict(GOOD) for _ in range(5)]
    events[position][field] = value
    with pytest.raises(EventError) as caught:
        made.update(events)
    error = caught.value
    assert (error.index, error.field) == (position, field)
    assert expected in error.expected
    message = str(error)
    assert f"event {position}, field {field!r}" in message
    assert expected in message
    assert len(message) < 300
    assert repr(value)[:60] in message or repr(float(value))[:60] in message
    assert to_bytes(made) == before


@pytest.mark.parametrize(
    ("field", "value", "expected"), BAD_VALUES, ids=[f"{f}-{str(v)[:12]}" for f, v, _ in BAD_VALUES]
)
def test_bad_events_are_collected_and_the_others_kept(field: str, value: Any, expected: str) -> None:
    events = [{**GOOD, "n": index} for index in range(5)]
    events[2][field] = value
    batch = learner().encode(events, weight=np.arange(5.0), time=10.0 * np.arange(5), on_error="collect")
    (error,) = batch.rejected
    assert (error.index, error.field) == (2, field)
    assert expected in error.expected
    assert batch.accepted is not None
    assert batch.accepted.tolist() == [0, 1, 3, 4]
    assert batch.values[3].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert batch.weight is not None
    assert batch.weight.tolist() == [0.0, 1.0, 3.0, 4.0]
    assert batch.time is not None
    assert batch.time.tolist() == [0.0, 10.0, 30.0, 40.0]


def test_one_error_an_event_all_events_of_a_batch() -> None:
    events = [{**GOOD, "x": "?", "n": -1}, GOOD, {**GOOD, "b": "?"}, {}, {**GOOD, "unheard": 1}, 7, {**GOOD, "d": -1.0}]
    batch = SCHEMA.encode(events, on_error="collect")
    assert [error.index for error in batch.rejected] == [0, 2, 3, 4, 5, 6]
    assert batch.n_events == 1


@pytest.mark.parametrize("event", [{}, dict.fromkeys(GOOD), dict.fromkeys(GOOD, math.nan)])
def test_empty_event(event: dict[str, Any]) -> None:
    made = learner()
    before = to_bytes(made)
    with pytest.raises(EventError, match=r"event 1: got .* expected at least one field with a value"):
        made.update([GOOD, event])
    assert to_bytes(made) == before


@pytest.mark.parametrize("event", [None, 3, "x", ["x", 1.0], ("a", "b", "c", "d", "e")])
def test_event_that_is_no_mapping(event: Any) -> None:
    made = learner()
    before = to_bytes(made)
    with pytest.raises(EventError, match=r"event 1: got .* expected a mapping"):
        made.update([GOOD, event])
    assert to_bytes(made) == before


def test_unknown_field_in_an_event() -> None:
    made = learner()
    before = to_bytes(made)
    with pytest.raises(EventError, match="event 1, field 'shop': got 7, expected only the fields 'x'") as caught:
        made.update([GOOD, {**GOOD, "shop": 7}])
    assert (caught.value.index, caught.value.field, caught.value.value) == (1, "shop", 7)
    assert to_bytes(made) == before


def test_field_name_that_is_no_string() -> None:
    for unknown in ("refuse", "ignore", "add"):
        with pytest.raises(EventError, match="field '7'"):
            Schema({"x": "numeric"}, unknown=unknown).encode([{"x": 1.0, 7: 2.0}], extend=True)  # type: ignore[arg-type]
    with pytest.raises(EventError, match="a field name that is a string"):
        Schema.infer([{7: 2.0}])


FRAME = {"x": [1.0, 2.0], "c": ["a", "b"], "b": [True, False], "n": [1, 2], "d": [0.5, 1.5]}


def frames(columns: dict[str, list[Any]]) -> list[Any]:
    return [pa.table(columns), pa.table(columns).to_batches()[0], pd.DataFrame(columns), pl.DataFrame(columns)]


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize(
    ("column", "values", "index", "expected"),
    [
        ("x", ["1", None], 0, "a number"),
        ("x", [1.0, math.inf], 1, "a finite number"),
        ("n", [1, -2], 1, "a whole number >= 0"),
        ("n", [0.5, 1.0], 0, "a whole number >= 0"),
        ("d", [1.0, -2.0], 1, "a finite number >= 0"),
        ("b", [1, 5], 1, "true or false"),
    ],
)
def test_bad_value_in_a_frame(form: int, column: str, values: list[Any], index: int, expected: str) -> None:
    made = learner()
    before = to_bytes(made)
    frame = frames({**FRAME, column: values})[form]
    with pytest.raises(EventError) as caught:
        made.update(frame)
    assert (caught.value.index, caught.value.field) == (index, column)
    assert expected in caught.value.expected
    assert to_bytes(made) == before


@pytest.mark.parametrize("form", range(4))
def test_missing_and_unknown_columns(form: int) -> None:
    made = learner()
    before = to_bytes(made)
    with pytest.raises(SchemaError, match="no column 'n'; its columns are 'x', 'c', 'b', 'd'"):
        made.update(frames({name: values for name, values in FRAME.items() if name != "n"})[form])
    with pytest.raises(SchemaError, match="no field of the schema: 'shop'"):
        made.update(frames({**FRAME, "shop": [1, 2]})[form])
    assert to_bytes(made) == before


@pytest.mark.parametrize("column", ["x", "c"])
def test_column_of_a_type_that_no_field_has(column: str) -> None:
    made = learner()
    before = to_bytes(made)
    with pytest.raises(SchemaError, match=f"'{column}' has type"):
        made.update(pa.table({**FRAME, column: [[1.0], [2.0]]}))
    with pytest.raises(SchemaError, match=f"'{column}' has type"):
        made.update(pa.table({**FRAME, column: pa.array([1, 2], pa.timestamp("s"))}))
    assert to_bytes(made) == before
    with pytest.raises(SchemaError, match="'t' has type timestamp"):
        Schema.infer(pa.table({"t": pa.array([1], pa.timestamp("s"))}))


def test_category_column_of_numbers() -> None:
    made = learner()
    numbers = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([7, 8]))
    for column in (pa.array([1.0, 2.0]), numbers):
        with pytest.raises(SchemaError, match="'c' has type"):
            made.update(pa.table({**FRAME, "c": column}))


def test_duplicate_columns() -> None:
    doubled = pd.DataFrame(np.zeros((2, 6)), columns=["x", "c", "b", "n", "d", "x"])
    table = pa.Table.from_arrays([pa.array([1.0])] * 2, names=["x", "x"])
    made = learner()
    before = to_bytes(made)
    for frame in (doubled, table):
        with pytest.raises(SchemaError, match="duplicate columns: 'x'"):
            made.update(frame)
        with pytest.raises(SchemaError, match="duplicate columns: 'x'"):
            Schema({"x": "numeric"}).encode(frame)
        with pytest.raises(SchemaError, match="duplicate columns: 'x'"):
            BatchEM(made.model).fit(frame)
    assert to_bytes(made) == before


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e101])
def test_bad_weight(weight: float) -> None:
    made = learner()
    before = to_bytes(made)
    with pytest.raises(EventError, match=r"event 1, field 'weight': got .* expected a finite weight >= 0") as caught:
        made.update([GOOD, GOOD, GOOD], weight=[1.0, weight, 1.0])
    assert (caught.value.index, caught.value.field) == (1, "weight")
    assert to_bytes(made) == before
    batch = SCHEMA.encode([GOOD] * 3, weight=[1.0, weight, 2.0], on_error="collect")
    assert batch.accepted is not None
    assert batch.accepted.tolist() == [0, 2]
    with pytest.raises(EventError):
        BatchEM(made.model, schema=SCHEMA).fit([GOOD] * 3, weight=[1.0, weight, 1.0])


@pytest.mark.parametrize("given", [[1.0], [[1.0, 1.0]], ["a", "b"], [None, "x"]])
def test_weights_and_times_of_another_shape_or_type(given: Any) -> None:
    made = learner()
    before = to_bytes(made)
    for name in ("weight", "time"):
        with pytest.raises(SchemaError, match=name):
            made.update([GOOD, GOOD], **{name: given})
    assert to_bytes(made) == before


@pytest.mark.parametrize("time", [math.nan, math.inf, np.datetime64("NaT")])
def test_bad_time(time: Any) -> None:
    made = OnlineEM(Mixture(Gaussian(), 1), schedule=HalfLife(1.0), warm_up=2).update(np.ones((4, 1)), time=0.0)
    before = to_bytes(made)
    good = np.datetime64("2024-01-01") if isinstance(time, np.datetime64) else 1.0
    with pytest.raises(EventError, match=r"event 1, field 'time': got nan|event 1, field 'time': got inf"):
        made.update(np.ones((2, 1)), time=np.array([good, time]))
    assert to_bytes(made) == before


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array(1.0), "two dimensions"),
        (np.zeros(3), "two dimensions"),
        (np.zeros((2, 2, 2)), "two dimensions"),
        (np.array([["a", "b"]]), "holds numbers"),
        (np.array([[1, None]], dtype=object), "holds numbers"),
        (np.zeros((2, 3)), "3 columns, the schema 2"),
    ],
)
def test_bad_array(array: np.ndarray, reason: str) -> None:
    made = OnlineEM(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric", "y": "numeric"}), warm_up=4)
    for learned in (np.empty((0, 2)), np.arange(8.0).reshape(4, 2)):
        made.update(learned).kernel()
        before = to_bytes(made)
        with pytest.raises(SchemaError, match=reason):
            made.update(array)
        assert to_bytes(made) == before


def test_array_cannot_hold_categories() -> None:
    with pytest.raises(SchemaError, match="'c' is a category"):
        Schema({"c": "category"}).encode(np.zeros((2, 1)))


def test_empty_sources() -> None:
    for nothing in ([], pa.table({}), np.zeros((0, 0))):
        with pytest.raises(SchemaError, match="no field could be inferred"):
            OnlineEM(Mixture(Gaussian(), 1)).update(nothing)
    for nothing in (np.zeros((0, 2)), pa.table({"x": pa.array([], pa.float64())})):
        with pytest.raises(NotFittedError, match="no event"):
            BatchEM(Mixture(Gaussian(), 1)).fit(nothing)


# Degenerate but valid data: never a NaN, never a singular covariance

GENERATOR = np.random.default_rng(1)
N = 120
NOISE = GENERATOR.normal(size=(N, 3))
DEGENERATE: dict[str, np.ndarray] = {
    "constant field": np.column_stack([NOISE[:, :2], np.full(N, 7.0)]),
    "constant zero field": np.column_stack([NOISE[:, :2], np.zeros(N)]),
    "constant field at 1e8": np.column_stack([NOISE[:, :2], np.full(N, 1e8 + 1 / 3)]),
    "constant field of 1e-8": np.column_stack([NOISE[:, :2], np.full(N, 1e-8)]),
    "all events identical": np.tile([[1.0, -2.0, 0.1]], (N, 1)),
    "all events zero": np.zeros((N, 3)),
    "all events identical at 1e8": np.full((N, 3), 1e8 + 0.1),
    "two distinct events": np.repeat([[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]], N // 2, axis=0),
    "one event": NOISE[:1],
    "two events": NOISE[:2],
    "offset 1e8": NOISE + np.array([1e8, 0.0, -1e8]),
    "scale 1e-8": NOISE * np.array([1e-8, 1.0, 1.0]),
    "scale 1e-8 at offset 1": NOISE * 1e-8 + 1.0,
    "scales 1e-8 and 1e8": NOISE * np.array([1e-8, 1.0, 1e8]),
    "scale 1e-60": NOISE * 1e-60,
    "scale 1e60": NOISE * 1e60,
    "one outlier of 1e100": np.vstack([NOISE, [[1e100, -1e100, 0.0]]]),
    "copied field": NOISE[:, [0, 0, 1]],
    "almost copied field": np.column_stack([NOISE[:, 0], NOISE[:, 0] * (1 + 1e-9), NOISE[:, 1]]),
    "sum of fields": np.column_stack([NOISE[:, :2], NOISE[:, 0] + NOISE[:, 1]]),
    "field without values": np.column_stack([NOISE[:, :2], np.full(N, np.nan)]),
    "field with one value": np.column_stack([NOISE[:, :2], np.append(np.full(N - 1, np.nan), 3.0)]),
    "fields never together": np.column_stack(
        [
            np.where(np.arange(N) % 2, NOISE[:, 0], np.nan),
            np.where(np.arange(N) % 2, np.nan, NOISE[:, 1]),
            np.full(N, np.nan),
        ]
    ),
    "mostly zero": np.where(GENERATOR.random((N, 3)) < 0.98, 0.0, NOISE),
}
EASY = np.random.default_rng(2).normal(size=(50, 3))


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_in_batch(kind: Any, name: str) -> None:
    events = DEGENERATE[name]
    schema = Schema({"x0": "numeric", "x1": "numeric", "x2": "numeric"})
    for options in ({}, {"assignment": "hard", "prior_weight": 1e-6}):
        model = Mixture(Gaussian(kind), 3, **options)
        fitted = BatchEM(model, schema=schema, max_iter=8).fit(events)
        assert_sound(model, fitted.parameters, schema)
        assert np.isfinite(fitted.history).all()
        prediction = fitted.score_events(events)
        assert np.isfinite(prediction.log_prob).all()
        np.testing.assert_allclose(prediction.responsibilities.sum(axis=1), 1.0)
        assert np.isfinite(fitted.log_prob(EASY)).all()


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_online(kind: Any, name: str) -> None:
    events = DEGENERATE[name]
    schema = Schema({"x0": "numeric", "x1": "numeric", "x2": "numeric"})
    model = Mixture(Gaussian(kind), 3)
    for warm_up, schedule in ((1, None), (40, Constant(0.9))):
        learner = OnlineEM(model, schema=schema, warm_up=warm_up, batch_size=16, schedule=schedule)
        for start in range(0, len(events), 60):
            prediction = learner.predict_then_update(events[start : start + 60])
            assert np.isfinite(prediction.log_prob).all()
            assert_sound(model, learner.parameters, schema)
        # What comes after degenerate data is learned as usual.
        learner.update(EASY)
        assert_sound(model, learner.parameters, schema)


DEGENERATE_OF_KIND: dict[str, list[Any]] = {
    "count": [0, 10**12, None],
    "duration": [0.0, 1e-90, 1e90, None],
    "flag": [True, False, None],
    "category": ["a", None],
}


@pytest.mark.parametrize("kind", DEGENERATE_OF_KIND)
def test_degenerate_data_of_the_other_families(kind: Any) -> None:
    family = {
        "count": Poisson(),
        "duration": Exponential(),
        "flag": CASES["bernoulli"].family,
        "category": Categorical(),
    }[kind]
    schema = Schema([Field("f", kind), Field("x", "numeric")])
    model = Mixture(Product({"f": family, "x": Gaussian()}), 3)
    values = DEGENERATE_OF_KIND[kind]
    streams = [[value] * 60 for value in values] + [(values * 60)[:60]]
    for stream in streams:
        events = [{"f": value, "x": float(x)} for value, x in zip(stream, NOISE[:, 0])]
        batch = schema.encode(events, extend=True)
        fitted = BatchEM(model, max_iter=20).fit(batch)
        assert_sound(model, fitted.parameters, batch.schema)
        assert np.isfinite(fitted.log_prob(batch)).all()
        online = OnlineEM(model, schema=schema, warm_up=10, batch_size=7).update(events)
        assert online.schema is not None
        assert_sound(model, online.parameters, online.schema)
        for other in values:
            assert np.isfinite(online.log_prob({"f": other, "x": 0.0})).all()


@pytest.mark.parametrize("name", CASES)
def test_all_weights_zero(name: str) -> None:
    case = CASES[name]
    batch = draw_batch(case, 60, 3)
    weight = np.zeros(60)
    model = Mixture(case.family, 3)
    with pytest.raises(NotFittedError, match="no event with weight"):
        BatchEM(model).fit(batch, weight)
    online = OnlineEM(model, schema=case.schema, warm_up=20, batch_size=10)
    online.update(case.schema.encode(batch, weight))
    # What has no weight is as if it had not come: the warm-up goes on.
    assert online.warming_up
    with pytest.raises(NotFittedError):
        online.parameters  # noqa: B018
    assert online.log_prob(batch).tolist() == [0.0] * 60
    online.update(batch)
    assert not online.warming_up
    assert_sound(model, online.parameters, case.schema)
    assert np.isfinite(online.log_prob(batch)).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weight", [1e-100, 1e100])
def test_extreme_weights(name: str, weight: float) -> None:
    case = CASES[name]
    batch = draw_batch(case, 60, 4)
    model = Mixture(case.family, 3)
    heavy = case.schema.encode(batch, np.full(60, weight))
    fitted = BatchEM(model, max_iter=3).fit(heavy)
    assert_sound(model, fitted.parameters, case.schema)
    online = OnlineEM(model, schema=case.schema, warm_up=20, batch_size=10).update(heavy).update(batch)
    assert_sound(model, online.parameters, case.schema)


def test_values_at_the_edge_of_what_is_accepted() -> None:
    schema = Schema({"x": "numeric", "y": "numeric"})
    events = np.array([[1e100, -1e100], [-1e100, 1e100], [0.0, 1.0], [1e-100, 3.0]] * 10)
    for kind in COVARIANCE_TYPES:
        model = Mixture(Gaussian(kind), 2)
        fitted = BatchEM(model, max_iter=20).fit(events)
        assert_sound(model, fitted.parameters, schema)
        assert np.isfinite(fitted.log_prob(events)).all()


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_fewer_distinct_events_than_components_are_still_told_apart(kind: Any) -> None:
    events = np.repeat([[0.0, 0.0], [10.0, 5.0]], 30, axis=0)
    fitted = BatchEM(Mixture(Gaussian(kind), 5)).fit(events)
    near, far = fitted.responsibilities(events[[0, 59]])
    assert float(near @ far) < 1e-3


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
@pytest.mark.parametrize("change", ["offset", "scale"])
def test_clusters_are_found_whatever_the_units(kind: Any, change: str) -> None:
    generator = np.random.default_rng(5)
    group = generator.integers(2, size=400)
    events = np.column_stack([generator.normal(size=400) + 8.0 * group, generator.normal(size=400)])
    events[:, 0] = events[:, 0] + 1e8 if change == "offset" else events[:, 0] * 1e-8
    if kind == "spherical" and change == "scale":
        # One variance for both fields cannot see the small one; with that field alone it can.
        events = events[:, :1]
    for fitted in (
        BatchEM(Mixture(Gaussian(kind), 2)).fit(events),
        OnlineEM(Mixture(Gaussian(kind), 2), batch_size=50).update(events),
    ):
        found = fitted.predict(events)
        assert max(np.mean(found == group), np.mean(found != group)) > 0.98
