from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import CASES, NUMERIC, assert_sound, draw_batch

from stream_em import Batch, Field, Gaussian, Mixture, Poisson, Schema
from stream_em.seeding import Reservoir, concatenate, k_means_responsibilities, points_for_k_means, seed


def test_reservoir_keeps_everything_while_there_is_room() -> None:
    reservoir = Reservoir(100, np.random.default_rng(0))
    pieces = [draw_batch(CASES["product"], 30, number, missing=0.2, weighted=True) for number in range(3)]
    for piece in pieces:
        reservoir.add(piece)
    sample, whole = reservoir.sample(), concatenate(pieces)
    assert whole.weight is not None
    whole = whole.select(np.flatnonzero(whole.weight))
    assert np.array_equal(sample.values, whole.values, equal_nan=True)
    assert sample.weight is not None
    assert whole.weight is not None
    assert np.array_equal(sample.weight, whole.weight)


def test_reservoir_is_a_uniform_sample_of_the_stream() -> None:
    schema = Schema({"x": "numeric"})
    kept = np.zeros(200)
    for number in range(400):
        reservoir = Reservoir(20, np.random.default_rng(number))
        for start in range(0, 200, 40):
            reservoir.add(Batch(np.arange(start, start + 40.0)[None], schema))
        sample = reservoir.sample()
        assert sample.n_events == 20
        assert len(np.unique(sample.values)) == 20
        kept[sample.values[0].astype(int)] += 1
    # 40 expected of each event, standard deviation 6: early and late ones alike.
    assert np.abs(kept - 40.0).max() < 6.0 * 4.5
    assert kept.reshape(5, 40).mean(axis=1) == pytest.approx([40.0] * 5, abs=4.0)


def test_reservoir_draws_heavy_events_more_often_and_weightless_ones_never() -> None:
    schema = Schema({"x": "numeric"})
    weight = np.repeat([0.0, 1.0, 4.0, 1e-310], [50, 50, 50, 50])
    kept = np.zeros(200)
    for number in range(200):
        reservoir = Reservoir(20, np.random.default_rng(number))
        reservoir.add(Batch(np.arange(200.0)[None], schema, weight))
        sample = reservoir.sample()
        assert sample.weight is None
        kept[sample.values[0].astype(int)] += 1
    nothing, light, heavy, tiny = kept.reshape(4, 50).sum(axis=1)
    assert nothing == 0.0
    assert tiny == 0.0
    assert 2.5 < heavy / light < 5.0


def test_concatenation_fills_what_was_not_there_yet() -> None:
    small = Schema({"x": "numeric"})
    large = Schema({"x": "numeric", "y": "numeric"})
    joined = concatenate(
        [Batch(np.array([[1.0]]), small), Batch(np.array([[2.0], [3.0]]), large, np.array([5.0]), np.array([9.0]))]
    )
    np.testing.assert_array_equal(joined.values, [[1.0, 2.0], [np.nan, 3.0]])
    assert joined.schema is large
    assert joined.weight is not None
    assert joined.weight.tolist() == [1.0, 5.0]


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_whitening_makes_the_covariance_the_identity(offset: float, scale: float) -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(3, 500)) * np.array([[1.0], [100.0], [scale]])
    values[1] += 50.0 * values[0]
    values[0] += offset
    standardized, whitened = points_for_k_means(Batch(values, NUMERIC))
    np.testing.assert_allclose(whitened.T @ whitened / 500, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(standardized.T @ standardized / 500, np.corrcoef(values), atol=1e-6)


def test_low_rates_are_told_apart_though_many_of_their_counts_are_zero() -> None:
    """Square roots set the zeros apart, and from a component of nothing but zeros EM takes hundreds of iterations."""
    generator = np.random.default_rng(4)
    rates = np.array([1.0, 5.0, 12.0])[generator.choice(3, size=5_000, p=[0.8, 0.1, 0.1])]
    batch = Schema({"n": "count"}).encode(generator.poisson(rates)[:, None])
    for number in range(5):
        start = seed(Mixture(Poisson(), 3), batch, np.random.default_rng(number))
        np.testing.assert_allclose(np.sort(start.components.mean.ravel()), [1.0, 5.0, 12.0], rtol=0.3)


def test_whitening_leaves_out_what_does_not_vary() -> None:
    generator = np.random.default_rng(2)
    values = np.stack([generator.normal(size=100), np.full(100, 1e8 + 0.1), np.full(100, np.nan)])
    assert [one.shape for one in points_for_k_means(Batch(values, NUMERIC))] == [(100, 1), (100, 1)]
    assert [one.tolist() for one in points_for_k_means(Batch(np.ones((3, 10)), NUMERIC))] == [[[0.0]] * 10] * 2
    twice = np.stack([values[0], values[0], values[0] + 1.0])
    assert [one.shape for one in points_for_k_means(Batch(twice, NUMERIC))] == [(100, 3), (100, 1)]


def test_k_means_finds_separate_clusters() -> None:
    generator = np.random.default_rng(3)
    centers = generator.normal(size=(6, 4)) * 30.0
    truth = np.repeat(np.arange(6), 40)
    points = centers[truth] + generator.normal(size=(240, 4))
    responsibilities = k_means_responsibilities(points, np.ones(240), 6, generator)
    found = responsibilities.argmax(axis=0)
    assert responsibilities.sum() == 240.0
    assert len({(one, other) for one, other in zip(truth.tolist(), found.tolist())}) == 6


def test_k_means_goes_by_weight() -> None:
    points = np.array([[0.0], [1.0], [100.0]])
    weight = np.array([1.0, 1.0, 0.0])
    for number in range(20):
        found = k_means_responsibilities(points, weight, 2, np.random.default_rng(number)).argmax(axis=0)
        assert found[0] != found[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_events", [1, 2, 60])
def test_any_number_of_events_seeds_any_family(name: str, n_events: int) -> None:
    case = CASES[name]
    for weighted in (False, True):
        batch = draw_batch(case, n_events, 4, missing=0.3, weighted=weighted)
        model = Mixture(case.family, 3)
        parameters = seed(model, batch, np.random.default_rng(5))
        assert_sound(model, parameters, case.schema)
        assert parameters.component_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_seeding_splits_across_the_clusters_and_not_along_the_longest_axis(kind: Any) -> None:
    generator = np.random.default_rng(6)
    group = generator.integers(2, size=400)
    long = generator.normal(size=400)
    values = np.stack([1e4 * long, 100.0 * long + generator.normal(size=400) + 10.0 * group])
    schema = Schema([Field("x", "numeric"), Field("y", "numeric")])
    batch = Batch(values, schema)
    responsibilities = k_means_responsibilities(points_for_k_means(batch)[1], np.ones(400), 2, generator)
    agreement = np.mean(responsibilities.argmax(axis=0) == group)
    assert max(agreement, 1.0 - agreement) > 0.99
    # Correlated fields are beyond diagonal and spherical components, which divide the long axis instead.
    if kind in ("full", "tied"):
        model = Mixture(Gaussian(kind), 2).bind(schema)
        found = model.posterior(seed(model, batch, generator), batch).responsibilities.argmax(axis=0)
        assert max(np.mean(found == group), np.mean(found != group)) > 0.99


def test_reservoir_leaves_out_events_without_weight_also_where_it_samples() -> None:
    weight = np.zeros(100)
    weight[40:50] = 1.0
    reservoir = Reservoir(50, np.random.default_rng(0))
    reservoir.add(Batch(np.arange(100.0)[None], Schema({"x": "numeric"}), weight))
    sample = reservoir.sample()
    assert sample.values[0].tolist() == list(range(40, 50))
    assert sample.weight is not None
    assert sample.weight.tolist() == [1.0] * 10
