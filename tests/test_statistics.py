from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import CASES, draw_batch, draw_parameters
from hypothesis import given
from hypothesis import strategies as st

from stream_em import MergeError, Statistics
from stream_em.statistics import Moments, Part, Sums

VALUES = np.random.default_rng(1).normal(size=(50, 3))


def moments(events: np.ndarray, weight: np.ndarray, shape: str) -> Moments:
    """Moments of one component, straight from their definition."""
    mean = weight @ events / weight.sum()
    deviation = events - mean
    if shape == "separate":
        scatter = (weight[:, None] * deviation**2).sum(axis=0)[None]
        return Moments(np.full((1, 3), weight.sum()), mean[None], scatter)
    scatter = np.einsum("n,ni,nj->ij", weight, deviation, deviation)
    return Moments(np.array([weight.sum()]), mean[None], scatter if shape == "tied" else scatter[None])


def statistics(value: float = 1.0, **options: object) -> Statistics:
    ids = np.array([0, 1])
    return replace(Statistics({"components": Sums(np.array([value, 2.0 * value]))}, -value, ids), **options)


@pytest.mark.parametrize("shape", ["full", "tied", "separate"])
@given(cut=st.integers(1, 49), seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 1e3, 1e8]))
def test_merged_moments_are_those_of_all_events(shape: str, cut: int, seed: int, offset: float) -> None:
    weight = np.random.default_rng(seed).exponential(size=50)
    events = VALUES + offset
    merged = moments(events[:cut], weight[:cut], shape).merge(moments(events[cut:], weight[cut:], shape))
    whole = moments(events, weight, shape)
    np.testing.assert_allclose(merged.weight, whole.weight, rtol=1e-12)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["full", "tied", "separate"])
def test_raw_sums_stay_available(shape: str) -> None:
    weight = np.random.default_rng(2).exponential(size=50)
    found = moments(VALUES, weight, shape)
    expected = np.einsum("n,ni,nj->ij", weight, VALUES, VALUES)
    assert float(found.counts.ravel()[0]) == pytest.approx(weight.sum())
    np.testing.assert_allclose(found.sums[0], weight @ VALUES, rtol=1e-12)
    squared = found.squared_sums.reshape(-1) if shape == "separate" else found.squared_sums.reshape(3, 3)
    np.testing.assert_allclose(squared, np.diag(expected) if shape == "separate" else expected, rtol=1e-10)


def test_tied_squared_sums_are_summed_over_components() -> None:
    weight = np.array([2.0, 3.0])
    mean = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = Moments(weight, mean, np.eye(2)).squared_sums
    assert found.tolist() == [[1.0 + 2.0, 0.0], [0.0, 1.0 + 12.0]]


@pytest.mark.parametrize("shape", ["full", "tied", "separate"])
def test_scaling_never_moves_a_mean(shape: str) -> None:
    found = moments(VALUES + 1e8, np.ones(50), shape)
    for factor in (0.0, 1e-300, 0.3):
        scaled = found.scale(factor)
        assert np.array_equal(scaled.mean, found.mean)
        assert np.array_equal(scaled.scatter, found.scatter * factor)
        assert np.array_equal(scaled.weight, found.weight * factor)


@pytest.mark.parametrize("shape", ["full", "tied", "separate"])
def test_scatter_stays_positive_semidefinite_over_many_merges(shape: str) -> None:
    generator = np.random.default_rng(3)
    state = moments(VALUES + 1e8, np.ones(50), shape)
    for _ in range(200):
        block = generator.normal(size=(4, 3)) * 1e-3 + 1e8
        state = state.scale(0.9).merge(moments(block, np.ones(4), shape))
    scatter = np.diag(state.scatter[0]) if shape == "separate" else state.scatter.reshape(3, 3)
    eigenvalues = np.linalg.eigvalsh(scatter)
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]


@pytest.mark.parametrize("name", CASES)
def test_values_are_never_changed_in_place(name: str) -> None:
    model, parameters = draw_parameters(CASES[name], 3, 4)
    a, b = (model.e_step(parameters, draw_batch(CASES[name], 30, seed, missing=0.2)) for seed in (5, 6))
    a, b = (replace(one, half_life=2.0, time=time) for one, time in ((a, 1.0), (b, 5.0)))
    arrays = [array for one in (a, b) for part in one.parts.values() for array in part.arrays().values()]
    copies = [array.copy() for array in arrays]
    a.merge(b).scale(0.5).discount_to(9.0)
    b.merge(a).select(np.array([2, 0, 1]))
    a.zero().merge(b)
    model.m_step(a)
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, copies))


def test_half_life_halves() -> None:
    state = statistics(8.0, half_life=3.0, time=10.0)
    later = state.discount_to(16.0)
    assert later.weights.tolist() == [2.0, 4.0]
    assert later.log_likelihood == -2.0
    assert later.time == 16.0
    assert state.discount_to(10.0).weights.tolist() == [8.0, 16.0]
    assert state.zero().discount_to(99.0).time == 99.0


def test_merge_goes_to_the_newer_time() -> None:
    old, new = statistics(8.0, half_life=1.0, time=0.0), statistics(1.0, half_life=1.0, time=2.0)
    for merged in (old.merge(new), new.merge(old)):
        assert merged.time == 2.0
        assert merged.weights.tolist() == [3.0, 6.0]


def test_extreme_times_do_not_overflow() -> None:
    old, new = statistics(1.0, half_life=1e-3, time=-1e308), statistics(1.0, half_life=1e-3, time=1e308)
    for merged in (old.merge(new), new.merge(old)):
        assert merged.weights.tolist() == [1.0, 2.0]
        assert merged.time == 1e308


def test_discounting_wrongly_is_refused() -> None:
    with pytest.raises(ValueError, match="without a half-life"):
        statistics().discount_to(1.0)
    with pytest.raises(ValueError, match=r"cannot discount backwards, from time 5.0 to 4.0"):
        statistics(half_life=1.0, time=5.0).discount_to(4.0)


OTHERS: list[tuple[Statistics, str]] = [
    (statistics(half_life=2.0), "half-lives differ"),
    (statistics(component_ids=np.array([0, 7])), "component ids differ"),
    (statistics(parts={"components": Sums(np.ones(2)), "more": Sums(np.ones(2))}), "different models"),
    (statistics(parts={"components": Sums(np.ones(3))}), "different shapes"),
    (statistics(parts={"components": Moments(np.ones(2), np.ones((2, 1)), np.ones((2, 1, 1)))}), "shapes or kinds"),
]


@pytest.mark.parametrize(("other", "reason"), OTHERS)
def test_what_does_not_belong_together_is_not_merged(other: Statistics, reason: str) -> None:
    for first, second in ((statistics(), other), (other, statistics())):
        with pytest.raises(MergeError, match=reason):
            first.merge(second)


def test_components_are_aligned_by_id() -> None:
    parts: dict[str, Part] = {
        "components": Sums(np.array([1.0, 2.0])),
        "moments": Moments(np.array([1.0, 2.0]), np.array([[1.0], [5.0]]), np.ones((2, 1, 1))),
    }
    one = Statistics(parts, 0.0, np.array([3, 9]))
    other = one.select(np.array([1, 0]))
    assert other.component_ids.tolist() == [9, 3]
    merged = one.merge(other)
    assert merged.component_ids.tolist() == [3, 9]
    assert merged.weights.tolist() == [2.0, 4.0]
    found = merged.parts["moments"]
    assert isinstance(found, Moments)
    assert found.mean.tolist() == [[1.0], [5.0]]
    assert found.scatter.ravel().tolist() == [2.0, 2.0]


def test_totals() -> None:
    assert statistics(3.0).total_weight == 9.0
    assert statistics(3.0).merge(statistics(1.0)).log_likelihood == -4.0
