"""Numerical helpers shared by families and models; every function works on whole blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

EPSILON = float(np.finfo(np.float64).eps)

# exp() of anything below is a subnormal or nearly one. Subnormal responsibilities slow the matrix product
# that follows several times over, and 1e-87 of an event changes no double-precision sum.
LOG_RESPONSIBILITY_FLOOR = -200.0

# Largest magnitude whose square, and the sum of 1e100 such squares, is still a finite double.
LARGEST_VALUE = 1e100

# A pivot below this share of its variance means that rounding, not data, decides the covariance.
SMALLEST_RELATIVE_PIVOT = 1e-13


class NumericalError(ArithmeticError):
    """Raised when a covariance cannot be made positive definite."""


def softmax_in_place(log_joint: Array) -> Array:
    """Turn log-joints (K, B) into responsibilities in place and return the log-sum-exp (B,).

    >>> block = np.log(np.array([[1.0, 2.0], [3.0, 2.0]]))
    >>> np.exp(softmax_in_place(block))
    array([4., 4.])
    >>> block
    array([[0.25, 0.5 ],
           [0.75, 0.5 ]])

    """
    largest = np.maximum.reduce(log_joint, axis=0)
    log_joint -= largest
    np.maximum(log_joint, LOG_RESPONSIBILITY_FLOOR, out=log_joint)
    np.exp(log_joint, out=log_joint)
    total = np.add.reduce(log_joint, axis=0)
    log_joint /= total
    np.log(total, out=total)
    total += largest
    return total


def cholesky(covariance: Array, scale: Array) -> tuple[Array, Array]:
    """Cholesky factors of a stack of covariances, with jitter relative to the pooled scale where needed.

    Parameters
    ----------
    covariance
        (..., D, D) symmetric matrices.
    scale
        (D,) pooled variance of each field, > 0: the unit in which jitter is added.

    Returns
    -------
    covariance, factor
        Both (..., D, D): the covariances, repaired where they were not safely positive definite, and their
        lower factors.

    Raises
    ------
    NumericalError
        When a covariance stays indefinite with the pooled variance itself added to its diagonal.

    >>> repaired, factor = cholesky(np.array([[[1.0, 1.0], [1.0, 1.0]]]), np.ones(2))
    >>> bool(np.allclose(factor @ factor.transpose(0, 2, 1), repaired))
    True

    """
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return _cholesky_with_jitter(covariance, scale)
    dimension = covariance.shape[-1]
    pivots = factor.reshape(*factor.shape[:-2], -1)[..., :: dimension + 1]
    variances = covariance.reshape(*covariance.shape[:-2], -1)[..., :: dimension + 1]
    if not (pivots * pivots >= SMALLEST_RELATIVE_PIVOT * variances).all():
        return _cholesky_with_jitter(covariance, scale)
    return covariance, factor


def _cholesky_with_jitter(covariance: Array, scale: Array) -> tuple[Array, Array]:
    dimension = covariance.shape[-1]
    matrices = covariance.reshape(-1, dimension, dimension).copy()
    factors = np.empty_like(matrices)
    for index, matrix in enumerate(matrices):
        diagonal = np.maximum(np.diagonal(matrix), 0.0)
        # Work in units of the standard deviations: jitter then means the same for every field.
        unit = np.sqrt(np.maximum(diagonal, 1e-12 * scale))
        correlation = matrix / np.outer(unit, unit)
        for jitter in (0.0, *(10.0**exponent for exponent in range(-12, 1))):
            candidate = correlation + jitter * np.eye(dimension)
            try:
                factor = np.linalg.cholesky(candidate)
            except np.linalg.LinAlgError:
                continue
            if (np.diagonal(factor) ** 2 >= SMALLEST_RELATIVE_PIVOT * np.diagonal(candidate)).all():
                break
        else:
            raise NumericalError(
                f"covariance {index} is not positive definite even with the pooled variance added: {matrix.tolist()}"
            )
        matrices[index] = candidate * np.outer(unit, unit)
        factors[index] = factor * unit[:, None]
    return matrices.reshape(covariance.shape), factors.reshape(covariance.shape)


def inverse_lower(factor: Array) -> Array:
    """Inverses of a stack (..., D, D) of lower triangular factors, exactly lower triangular."""
    return np.tril(np.linalg.inv(factor))


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """`numerator / denominator` with 0 where the denominator is 0 (no weight, so nothing was seen)."""
    return np.divide(numerator, denominator, out=np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape)),
                     where=denominator > 0.0)
