from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from stream_em.numerics import NumericalError, cholesky, inverse_from_factor, safe_divide, softmax_in_place


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 10.0, 100.0]), offset=st.sampled_from([0.0, 1e5, -1e5]))
def test_softmax_is_that_of_scipy(seed: int, scale: float, offset: float) -> None:
    log_joint = np.random.default_rng(seed).normal(size=(4, 30)) * scale + offset
    shares = log_joint.copy()
    total = softmax_in_place(shares)
    np.testing.assert_allclose(total, logsumexp(log_joint, axis=0), rtol=1e-12)
    np.testing.assert_allclose(shares, softmax(log_joint, axis=0), rtol=1e-9, atol=1e-80)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0, rtol=1e-12)


def test_softmax_of_far_apart_values_stays_finite() -> None:
    shares = np.array([[0.0, -1e300, 1e5], [-1e300, -1e300, -1e5]])
    total = softmax_in_place(shares)
    assert np.isfinite(total).all()
    np.testing.assert_allclose(shares, [[1.0, 0.5, 1.0], [0.0, 0.5, 0.0]], atol=1e-80)


def test_well_conditioned_matrices_pass_untouched() -> None:
    root = np.random.default_rng(1).normal(size=(5, 3, 3))
    matrices = root @ root.transpose(0, 2, 1) + np.eye(3)
    repaired, factor = cholesky(matrices)
    assert np.array_equal(repaired, matrices)
    np.testing.assert_allclose(factor @ factor.transpose(0, 2, 1), matrices, rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize(
    "matrix",
    [
        np.ones((3, 3)),
        np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        np.ones((3, 3)) + 1e-15 * np.eye(3),
        np.array([[1.0, 1.0 + 1e-12, 0.0], [1.0 + 1e-12, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_singular_matrices_are_repaired_a_little_whatever_the_units(matrix: np.ndarray, unit: float) -> None:
    units = np.array([unit, 1.0, 1.0])
    given_matrix = matrix * np.outer(units, units)
    repaired, factor = cholesky(given_matrix[None])
    np.testing.assert_allclose(factor[0] @ factor[0].T, repaired[0], rtol=1e-9, atol=0.0)
    np.linalg.cholesky(repaired[0])
    # In units of the standard deviations, the repair is small and the same for every choice of units.
    assert np.abs(repaired[0] / np.outer(units, units) - matrix).max() < 1e-9


def test_stacks_and_single_matrices() -> None:
    stack = np.stack([np.eye(2), np.ones((2, 2))])
    repaired, factor = cholesky(stack)
    assert np.array_equal(repaired[0], np.eye(2))
    assert repaired[1, 0, 0] > 1.0
    alone, alone_factor = cholesky(np.ones((2, 2)))
    assert np.array_equal(alone, repaired[1])
    assert np.array_equal(alone_factor, factor[1])


def test_products_that_are_only_rounding_are_dropped() -> None:
    hopeless = np.array([[4.0, 90.0], [90.0, 1.0]])
    repaired, factor = cholesky(np.stack([np.eye(2), hopeless]))
    assert np.array_equal(repaired[1], np.diag([4.0, 1.0]))
    assert np.array_equal(factor[1], np.diag([2.0, 1.0]))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="covariance 1 is not finite"):
        cholesky(np.stack([np.eye(2), np.array([[1.0, np.nan], [np.nan, 1.0]])]))


@pytest.mark.parametrize("dimension", [1, 3, 16, 40])
@pytest.mark.parametrize("stack", [(), (5,)])
def test_matrices_are_inverted_from_their_factors(dimension: int, stack: tuple[int, ...]) -> None:
    generator = np.random.default_rng(dimension)
    matrix = np.tril(generator.normal(size=(*stack, dimension, dimension)), -1) / dimension + 2.0 * np.eye(dimension)
    before = matrix.copy()
    inverse = inverse_from_factor(matrix)
    whole = matrix @ matrix.swapaxes(-1, -2)
    np.testing.assert_allclose(inverse @ whole, np.broadcast_to(np.eye(dimension), matrix.shape), atol=1e-13)
    assert np.array_equal(inverse, inverse.swapaxes(-1, -2))
    assert np.array_equal(matrix, before)


def test_factors_in_any_layout_are_inverted_and_singular_ones_refused() -> None:
    factors = np.linalg.cholesky(np.tile(np.eye(16) + 1.0, (2, 3, 1, 1)))
    expected = inverse_from_factor(factors)
    np.testing.assert_array_equal(inverse_from_factor(np.asfortranarray(factors)), expected)
    np.testing.assert_allclose(inverse_from_factor(factors.astype(np.float32)), expected, rtol=1e-5)
    for dimension in (3, 16):
        with pytest.raises(np.linalg.LinAlgError):
            inverse_from_factor(np.diag([*np.ones(dimension - 1), 0.0]))


def test_safe_divide() -> None:
    quotient = safe_divide(np.array([[1.0, 2.0], [0.0, -0.0]]), np.array([[2.0], [0.0]]))
    assert quotient.tolist() == [[0.5, 1.0], [0.0, 0.0]]
