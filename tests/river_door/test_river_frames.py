"""Frames in, answers out in the same kind with the same index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from river import preprocessing

from stream_em import EventError, SchemaError
from stream_em.river import MixtureAnomalyDetector, MixtureClusterer, MixtureTransformer

KINDS = ["pandas", "polars", "arrow", "record batch"]


def frame(kind: str, n_rows: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    far = rng.random(n_rows) < 0.4
    table = pa.table(
        {
            "x": np.where(far, 6.0, 0.0) + rng.normal(size=n_rows),
            "shop": np.where(far, "a", "b"),
            "y": pa.array(rng.normal(size=n_rows), mask=rng.random(n_rows) < 0.1),
        }
    )
    if kind == "pandas":
        return table.to_pandas().set_index(pd.Index([f"row {row}" for row in range(n_rows)], name="label"))
    if kind == "polars":
        return pl.from_arrow(table)
    return table if kind == "arrow" else table.to_batches()[0]


def rows(X: Any) -> list[dict[str, Any]]:
    if isinstance(X, pd.DataFrame):
        return X.to_dict("records")
    return X.to_dicts() if isinstance(X, pl.DataFrame) else X.to_pylist()


def values(series: Any) -> list[Any]:
    return series.to_pylist() if hasattr(series, "to_pylist") else series.to_list()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_learned", [0, 30, 300])
def test_answers_are_of_the_frames_kind_and_those_of_its_rows(kind: str, n_learned: int) -> None:
    clusterer, detector, transformer = (
        one(n_components=2, warm_up=50, seed=0)
        for one in (MixtureClusterer, MixtureAnomalyDetector, MixtureTransformer)
    )
    for model in (clusterer, detector, transformer):
        if n_learned:
            model.learn_many(frame(kind, n_learned))
    X = frame(kind, 40, seed=1)
    clusters, scores = clusterer.predict_many(X), detector.score_many(X)
    shares, features = clusterer.predict_proba_many(X), transformer.transform_many(X)
    assert values(clusters) == [clusterer.predict_one(row) for row in rows(X)]
    np.testing.assert_allclose(values(scores), [detector.score_one(row) for row in rows(X)], rtol=1e-9, atol=1e-12)
    for row, of_row, of_features in zip(rows(X), rows(shares), rows(features)):
        expected = clusterer.predict_proba_one(row)
        np.testing.assert_allclose(list(of_row.values()), list(expected.values()), rtol=1e-9, atol=1e-12)
        assert [type(key)(id_) for key, id_ in zip(of_row, expected)] == list(of_row)
        assert list(of_features) == ["component_0", "component_1"]
    if kind == "pandas":
        assert all(answer.index.equals(X.index) for answer in (clusters, scores, shares, features))
        assert isinstance(shares, pd.DataFrame)
    elif kind == "polars":
        assert isinstance(scores, pl.Series)
        assert isinstance(features, pl.DataFrame)
    elif kind == "arrow":
        assert isinstance(scores, pa.ChunkedArray)
        assert isinstance(shares, pa.Table)
    else:
        assert isinstance(scores, pa.Array)
        assert isinstance(shares, pa.RecordBatch)


def test_every_kind_of_frame_teaches_the_same() -> None:
    learners = []
    for kind in KINDS:
        model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
        for seed in range(3):
            model.learn_many(frame(kind, 100, seed))
        learners.append(model.to_learner())
    first = learners[0]
    for other in learners[1:]:
        assert other.schema == first.schema
        for name, part in first.statistics.parts.items():
            for key, array in part.arrays().items():
                assert np.array_equal(other.statistics.parts[name].arrays()[key], array)


def test_learn_many_is_an_update_of_the_engine() -> None:
    model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
    model.learn_many(frame("arrow", 200))
    learner = model.to_learner()
    weight = np.linspace(0.5, 2.0, 100)
    model.learn_many(frame("arrow", 100, seed=1), w=weight)
    learner.update(frame("arrow", 100, seed=1), weight)
    assert model.to_learner().n_events == learner.n_events == 300
    mine, theirs = model.to_learner().statistics, learner.statistics
    assert np.array_equal(mine.weights, theirs.weights)


def test_learn_one_goes_on_after_learn_many() -> None:
    model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
    for seed in range(3):
        model.learn_many(frame("pandas", 100, seed))
        for row in rows(frame("pandas", 10, seed + 10)):
            model.learn_one(row)
    assert model.to_learner().n_events == 330


def test_columns_come_and_go() -> None:
    model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
    whole = frame("pandas", 300)
    model.learn_many(whole[["x"]])
    model.learn_many(whole.assign(empty=np.nan)[:5])
    assert model.to_learner().schema.names == ("x",)
    model.learn_many(whole)
    assert model.to_learner().schema.names == ("x", "shop", "y")
    model.learn_many(whole[["y", "shop"]].dropna())
    assert values(model.predict_many(whole[["shop"]])) == [
        model.predict_one({"shop": shop}) for shop in whole["shop"].tolist()
    ]
    assert len(model.predict_many(whole[:0])) == 0
    n_events = model.to_learner().n_events
    model.learn_many(pd.DataFrame({"x": [1.0, None], "late": [None, 3.0]}))
    assert model.to_learner().n_events == n_events + 1
    with pytest.raises(EventError, match="event 1"):
        model.learn_many(pd.DataFrame({"x": [1.0, None]}))
    nothing_known = pd.DataFrame({"other": [1.0, 2.0]})
    assert values(model.predict_many(nothing_known)) == [model.predict_one({})] * 2


def test_pandas_columns_may_be_numbers() -> None:
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 3)))
    model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
    model.learn_many(X)
    assert set(model.centers[0]) == {0, 1, 2}
    row = dict(enumerate(X.iloc[0].tolist()))
    assert model.predict_one(row) == model.predict_many(X)[0]


def test_a_pipeline_takes_frames() -> None:
    model = preprocessing.StandardScaler() | MixtureClusterer(n_components=2, warm_up=50, seed=0)
    X = frame("pandas", 200)[["x"]]
    model.learn_many(X)
    assert len(model.predict_many(X)) == 200


@pytest.mark.parametrize("n_learned", [0, 300])
def test_bad_frames_leave_the_model_untouched(n_learned: int) -> None:
    model = MixtureClusterer(n_components=2, warm_up=50, seed=0)
    if n_learned:
        model.learn_many(frame("arrow", n_learned))
    X = frame("pandas", 20)
    X.iloc[3, 0] = np.inf
    with pytest.raises(EventError, match="event 3, field 'x'"):
        model.learn_many(X)
    with pytest.raises(SchemaError, match="'when'"):
        model.learn_many(frame("pandas", 20).assign(when=pd.Timestamp("2026-01-01")))
    assert model.to_learner().n_events == n_learned
    with pytest.raises(TypeError, match="list"):
        model.learn_many([{"x": 1.0}])


def test_columns_that_are_ignored_are_counted_by_their_values() -> None:
    model = MixtureClusterer(n_components=2, warm_up=50, unknown="ignore", seed=0)
    model.learn_many(frame("pandas", 100))
    X = frame("pandas", 4).assign(late=[1.0, None, 3.0, 4.0])
    X.iloc[2, :3] = None
    with pytest.warns(UserWarning, match="'late'"):
        model.learn_many(X)
    assert model.ignored_features == {"late": 3}
    assert model.to_learner().n_events == 103
    for row in rows(X):
        model.learn_one(row)
    assert model.ignored_features == {"late": 6}
    full = MixtureClusterer(n_components=2, warm_up=50, max_features=3, seed=0)
    full.learn_many(frame("arrow", 100))
    with pytest.warns(UserWarning, match="'late'"):
        full.learn_many(X)
    assert full.ignored_features == {"late": 3}
