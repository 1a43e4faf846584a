"""Numerical helpers shared by families and models; every function works on whole blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Loaded = TypeVar("Loaded")

EPSILON = float(np.finfo(np.float64).eps)

# exp() of less is subnormal, which slows the matrix products that follow several times over, while 1e-261
# of an event changes no double-precision sum.
LOG_RESPONSIBILITY_FLOOR = -600.0

# Stands in for a weight of 0 in a division, where the numerator is 0 as well.
SMALLEST_WEIGHT = 1e-300

# Largest magnitude whose square, and the sum of 1e100 such squares, is still a finite double.
LARGEST_VALUE = 1e100

# Beyond this an event is equally impossible under every component. Weights are at most `LARGEST_VALUE`, so that sums
# of log-densities, weighted, are finite doubles.
LARGEST_LOG_DENSITY = 1e200

# A pivot below this share of its variance means that rounding, not data, decides the covariance.
SMALLEST_RELATIVE_PIVOT = 1e-13

# From this size on a call of LAPACK for each triangular matrix is much faster than one of NumPy for all, which takes no
# notice of the zeros; below it the gain is not worth the import.
SMALLEST_FOR_LAPACK = 16

# Matrices with no more products than this are not packed first by OpenBLAS, where it has the vectors of AVX-512.
UNPACKED_PRODUCTS = 1_000_000

# OpenBLAS shares products of longer vectors out to threads.
LONGEST_UNSHARED_VECTOR = 10_000

# Whole numbers stay below this, so that any two may be added or divided as doubles or 64-bit integers.
LARGEST_WHOLE = 2**62


class NumericalError(ArithmeticError):
    """Raised when a covariance cannot be made positive definite."""


def check_whole(*, least: int = 1, below: int | None = LARGEST_WHOLE, why: str = "", **given: Any) -> None:
    """Check that named numbers are whole and within a range; `why` is the reason that an error gives.

    Raises
    ------
    ValueError
        For the first one that is not.

    """
    for name, value in given.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or int(value) < least or (below is not None and int(value) >= below):
            reason = f": {why}" if why else ""
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}{reason}")


def is_plain(values: Array) -> bool:
    """Whether no value is missing or beyond the range of numbers, as one pass tells: the sum of squares is small."""
    flat = values.ravel(order="K")
    with np.errstate(over="ignore", invalid="ignore"):
        if flat.size <= LONGEST_UNSHARED_VECTOR:
            return float(np.dot(flat, flat)) < LARGEST_VALUE
        # Not by BLAS: its threads, once woken, wait busily for more, for longer than it takes to learn what is checked.
        return float(np.einsum("i,i->", flat, flat)) < LARGEST_VALUE


def softmax_in_place(log_joint: Array) -> Array:
    """Turn log-joints (K, B) into responsibilities in place and return the log-sum-exp (B,).

    >>> block = np.log(np.array([[1.0, 2.0], [3.0, 2.0]]))
    >>> np.exp(softmax_in_place(block))
    array([4., 4.])
    >>> block
    array([[0.25, 0.5 ],
           [0.75, 0.5 ]])

    """
    # Looking first is cheaper: comparing with a number costs as much as the exponential.
    lowest, highest = np.minimum.reduce(log_joint, axis=None), np.maximum.reduce(log_joint, axis=None)
    # Within these limits no exponential is subnormal or too large, so that nothing need be taken from the exponents.
    largest = None
    if not (lowest >= LOG_RESPONSIBILITY_FLOOR and highest <= -LOG_RESPONSIBILITY_FLOOR):
        largest = np.maximum.reduce(log_joint, axis=0)
        log_joint -= largest
        if np.minimum.reduce(log_joint, axis=None) < LOG_RESPONSIBILITY_FLOOR:
            np.maximum(log_joint, LOG_RESPONSIBILITY_FLOOR, out=log_joint)
    np.exp(log_joint, out=log_joint)
    total: Array = np.add.reduce(log_joint, axis=0)
    log_joint *= np.divide(1.0, total)
    np.log(total, out=total)
    if largest is not None:
        total += largest
    return total


def cholesky(covariance: Array) -> tuple[Array, Array]:
    """Cholesky factors of a stack of covariances, with jitter relative to the variances where needed.

    Parameters
    ----------
    covariance
        (..., D, D) symmetric matrices with positive diagonals.

    Returns
    -------
    covariance, factor
        Both (..., D, D): the covariances, repaired where they were not safely positive definite, and their
        lower factors.

    Raises
    ------
    NumericalError
        When a covariance is not finite.

    >>> repaired, factor = cholesky(np.array([[[1.0, 1.0], [1.0, 1.0]]]))
    >>> bool(np.allclose(factor @ factor.transpose(0, 2, 1), repaired))
    True

    """
    try:
        factor = cast(Array, np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:
        return _cholesky_with_jitter(covariance)
    dimension = covariance.shape[-1]
    pivots = factor.reshape(*factor.shape[:-2], -1)[..., :: dimension + 1]
    variances = covariance.reshape(*covariance.shape[:-2], -1)[..., :: dimension + 1]
    if not (pivots * pivots >= SMALLEST_RELATIVE_PIVOT * variances).all():
        return _cholesky_with_jitter(covariance)
    return covariance, factor


def inverse_from_factor(factor: Array) -> Array:
    """Inverses (..., D, D) of positive definite matrices, from their lower Cholesky factors (..., D, D).

    They are symmetric to the last digit, and no diagonal is negative.

    Raises
    ------
    numpy.linalg.LinAlgError
        When a factor is singular.

    >>> inverse_from_factor(np.array([[[2.0, 0.0], [1.0, 1.0]]]))
    array([[[ 0.5, -0.5],
            [-0.5,  1. ]]])

    """
    dimension = factor.shape[-1]
    if dimension < SMALLEST_FOR_LAPACK:
        root = np.linalg.inv(factor)
    else:
        from scipy.linalg.lapack import dtrtri

        factors = factor.reshape(-1, dimension, dimension)
        roots = np.empty(factors.shape)
        for one, into in zip(factors, roots):
            # LAPACK's columns are NumPy's rows: what is lower here is upper there.
            inverse, singular = dtrtri(one.T)
            if singular:
                raise np.linalg.LinAlgError("Singular matrix")
            into[:] = inverse.T
        root = roots.reshape(factor.shape)
    # Not by LAPACK's dpotri, which wakes threads whatever the size, and takes ten times as long where they compete
    # with those of NumPy's own BLAS.
    return cast(Array, np.matmul(root.swapaxes(-1, -2), root))


def _cholesky_with_jitter(covariance: Array) -> tuple[Array, Array]:
    dimension = covariance.shape[-1]
    matrices = covariance.reshape(-1, dimension, dimension).copy()
    factors = np.empty_like(matrices)
    for index, matrix in enumerate(matrices):
        # In units of the standard deviations jitter means the same for every field.
        unit = np.sqrt(np.maximum(np.diagonal(matrix), SMALLEST_WEIGHT))
        # Where rounding has left a negative variance these overflow, and no jitter makes them positive definite.
        with np.errstate(over="ignore"):
            correlation = matrix / unit / unit[:, None]
        for jitter in (0.0, *(10.0**exponent for exponent in range(-12, 1))):
            candidate = correlation + jitter * np.eye(dimension)
            try:
                factor = np.linalg.cholesky(candidate)
            except np.linalg.LinAlgError:
                continue
            if (np.diagonal(factor) ** 2 >= SMALLEST_RELATIVE_PIVOT * np.diagonal(candidate)).all():
                break
        else:
            if not np.isfinite(matrix).all():
                raise NumericalError(f"covariance {index} is not finite: {matrix.tolist()}")
            # Nothing of the correlations is left but rounding.
            candidate = factor = np.eye(dimension)
        if jitter:
            # What is well-defined stays as it is, to the last bit.
            matrices[index] = candidate * unit * unit[:, None]
        factors[index] = factor * unit[:, None]
    return matrices.reshape(covariance.shape), factors.reshape(covariance.shape)


def compiled_or_none(load: Callable[[], Loaded]) -> Loaded | None:
    """Return what `load` imports and compiles; None without Numba, or, with a warning, where that fails."""
    try:
        return load()
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "numba"):
            warnings.warn(
                f"compiled code cannot be loaded ({type(error).__name__}: {error}), so NumPy takes its place, which is "
                "slower; if its cache is damaged or cannot be written, set NUMBA_CACHE_DIR to another folder",
                RuntimeWarning,
                stacklevel=3,
            )
        return None


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """`numerator / denominator` where a denominator of 0 (no weight, so nothing was seen) gives 0."""
    quotient: Array = numerator / np.maximum(denominator, SMALLEST_WEIGHT)
    return quotient
