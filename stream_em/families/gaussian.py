"""Gaussian components with full, tied, diagonal or spherical covariances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from stream_em.families.base import Block, Family, FamilyError, Mask, Parts
from stream_em.numerics import (
    EPSILON,
    LARGEST_VALUE,
    SMALLEST_WEIGHT,
    Array,
    cholesky,
    inverse_from_factor,
    safe_divide,
)
from stream_em.schema import Field
from stream_em.statistics import Moments

LOG_TWO_PI = float(np.log(2.0 * np.pi))

# Squared distance, in standard deviations, between a component and the origin of the features beyond which
# the rounding of the expanded square exceeds about 1e-9.
LARGEST_SQUARED_OFFSET = 4e6

# Below this a variance, and its products with others, would leave the range of doubles.
SMALLEST_VARIANCE = 1e-200

# A variance is that of rounding when it is less than this times the squared mean.
ROUNDING_OF_SQUARES = 256.0 * EPSILON**2

# A field that never varied gets this share of its value as its standard deviation.
CONSTANT_DEVIATION = 1e-3

# A component whose covariance is to be shrunk is moved this far towards the pooled variances.
SHRINKAGE = 0.01

# Events that are all alike get this share of the pooled variances, so narrow that, should it have been the
# rounding of statistics about a far point that made them alike, the next E-step takes them about their own mean.
LEAST_SHARE_OF_POOLED = 1e-12

# Pseudo-events below which the prior alone does not keep covariances well-defined.
WEAK_PRIOR = 1e-9

CovarianceType = Literal["full", "tied", "diag", "spherical"]
COVARIANCE_TYPES: tuple[CovarianceType, ...] = ("full", "tied", "diag", "spherical")


@dataclass(frozen=True, eq=False)
class GaussianParameters:
    """Means and covariances of all components.

    Parameters
    ----------
    mean
        (K, D).
    covariance
        (K, D, D) full, (D, D) tied, (K, D) diag, (K,) spherical: scikit-learn's shapes.

    """

    mean: Array
    covariance: Array

    @cached_property
    def factor(self) -> Array:
        """Lower Cholesky factors, (K, D, D) or (D, D)."""
        return cholesky(self.covariance)[1]

    @cached_property
    def ill_defined(self) -> npt.NDArray[np.bool_]:
        """Components (K,) whose covariances had to be repaired; a tied covariance is that of all."""
        return np.zeros(len(self.mean), dtype=bool)

    @cached_property
    def precision(self) -> Array:
        """Inverse covariances, (K, D, D) or (D, D)."""
        # By way of the factor, so that they are symmetric and no diagonal is negative, however flat the covariance.
        return inverse_from_factor(self.factor)

    @cached_property
    def root_precision(self) -> Array:
        """Square roots of the diagonals of the precisions, (K, D) or (D,)."""
        return np.sqrt(_diagonal(self.precision))

    @cached_property
    def inflation(self) -> Array:
        """Largest variance inflation factor of any field, (K,) or (): how nearly collinear the fields are."""
        inflation = _diagonal(self.precision) * _diagonal(np.ascontiguousarray(self.covariance))
        largest: Array = np.maximum.reduce(inflation, axis=-1, initial=1.0)
        return largest

    @cached_property
    def largest_inflation(self) -> float:
        """Largest variance inflation factor of any field in any component."""
        return float(np.max(self.inflation))

    @cached_property
    def log_normalizer(self) -> Array:
        """Log-density at the mean, (K,) or ()."""
        log_root = np.add.reduce(np.log(_diagonal(self.factor)), axis=-1)
        normalizer: Array = np.subtract(-0.5 * LOG_TWO_PI * self.mean.shape[1], log_root)
        return normalizer

    @cached_property
    def packed_precision(self) -> Array:
        """Coefficients of the products x_i x_j, i <= j, in the log-density: (K, D(D+1)/2) or (D(D+1)/2,)."""
        layout = _layout(self.mean.shape[1])
        flat = self.precision.reshape(*self.precision.shape[:-2], -1)
        return flat[..., layout.upper] * layout.coefficient


def _diagonal(matrices: Array) -> Array:
    """The diagonals (..., D) of contiguous matrices (..., D, D), as a view, which `np.diagonal` makes slower."""
    dimension = matrices.shape[-1]
    return matrices.reshape(*matrices.shape[:-2], dimension * dimension)[..., :: dimension + 1]


@dataclass(frozen=True)
class _Layout:
    """Where the products x_i x_j with i <= j stand among the feature rows."""

    upper: npt.NDArray[np.intp]
    coefficient: Array
    unpack: npt.NDArray[np.intp]
    squares: npt.NDArray[np.intp]
    n_products: int


@lru_cache(maxsize=256)
def _layout(dimension: int) -> _Layout:
    row, column = np.triu_indices(dimension)
    unpack = np.zeros((dimension, dimension), dtype=np.intp)
    unpack[row, column] = unpack[column, row] = np.arange(len(row))
    coefficient = np.where(row == column, -0.5, -1.0)
    return _Layout(row * dimension + column, coefficient, unpack, np.diagonal(unpack), len(row))


def _better_centers(centers: Array, offset: Array, variance: Array, weight: Array) -> Array | None:
    """Centers for the components whose variance (K, D) drowns in the rounding of their offset from the center."""
    squared = offset * offset
    if (squared <= LARGEST_SQUARED_OFFSET * variance).all():
        return None
    rounding = EPSILON * squared
    # Against the whole range of the data a variance of 0 is as good as one of 1e-15.
    pooled = weight @ squared / max(float(np.add.reduce(weight)), SMALLEST_WEIGHT)
    lost = (rounding > 1e-9 * variance + 1e-15 * pooled).any(axis=1) & (weight > SMALLEST_WEIGHT)
    return centers + np.where(lost[:, None], offset, 0.0) if lost.any() else None


class _JointBlock(Block):
    """Full and tied covariances: features are the products x_i x_j (i <= j), then x."""

    def __init__(self, parameters: GaussianParameters, observed: Mask | None) -> None:
        self.complete = parameters
        self.tied = parameters.covariance.ndim == 2
        self.observed: npt.NDArray[np.intp] | None = None
        if observed is not None and not observed.all():
            self.observed = np.flatnonzero(observed)
            parameters = _marginal_joint(parameters, self.observed)
        self.parameters = parameters
        self.dimension = parameters.mean.shape[1]
        self.layout = _layout(self.dimension)
        self.n_features = self.layout.n_products + self.dimension

    def natural(self, center: Array) -> tuple[Array, Array]:
        parameters, products = self.parameters, self.layout.n_products
        offset = parameters.mean - (center if self.observed is None else center[self.observed])
        if self.tied:
            linear = offset @ parameters.precision
        else:
            linear = np.matmul(parameters.precision, offset[:, :, None])[:, :, 0]
        theta = np.empty((len(offset), self.n_features))
        theta[:, :products] = parameters.packed_precision
        theta[:, products:] = linear
        constant = np.add.reduce(offset * linear, axis=1)
        constant *= -0.5
        constant += parameters.log_normalizer
        return theta, constant

    def unstable(self, center: Array) -> npt.NDArray[np.intp] | None:
        # The terms that cancel are x_i P_ij x_j. By Cauchy and Schwarz, D times the sum of x_i P_ii x_i bounds
        # them; x is the offset of the component, or, where fields are nearly collinear, its spread.
        limit = LARGEST_SQUARED_OFFSET / max(self.dimension, 1)
        parameters = self.parameters
        offset = parameters.mean - (center if self.observed is None else center[self.observed])
        offset *= parameters.root_precision
        if np.vdot(offset, offset) <= limit and parameters.largest_inflation <= limit:
            return None
        distance = np.add.reduce(offset * offset, axis=1)
        unstable = (distance > limit) | (parameters.inflation > limit)
        return np.flatnonzero(unstable) if unstable.any() else None

    def quadratic_factors(self) -> list[tuple[npt.NDArray[np.intp], bool]] | None:
        return [(np.arange(self.dimension), True)] if self.observed is None else None

    def log_density(self, values: Array, observed: Mask | None, component: int) -> Array:
        parameters = self.parameters
        kept = values if self.observed is None else values[self.observed]
        factor = parameters.factor if self.tied else parameters.factor[component]
        normalizer = parameters.log_normalizer if self.tied else parameters.log_normalizer[component]
        standardized = np.linalg.solve(factor, kept - parameters.mean[component][:, None])
        density: Array = normalizer - 0.5 * np.einsum("db,db->b", standardized, standardized)
        return density

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        shifted = out[self.layout.n_products :]
        if self.observed is not None:
            values, center = values[self.observed], center[self.observed]
        np.subtract(values, center[:, None], out=shifted)
        start = 0
        for row in range(self.dimension):
            stop = start + self.dimension - row
            np.multiply(shifted[row], shifted[row:], out=out[start:stop])
            start = stop

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, Array | None]:
        products = self.layout.n_products
        first = sums[:, products:]
        column = np.maximum(weight, SMALLEST_WEIGHT)[:, None]
        offset = first / column
        scatter = sums[:, self.layout.unpack]
        weighted = np.sqrt(column) * offset
        scatter -= weighted[:, :, None] * weighted[:, None, :]
        diagonal = _diagonal(scatter)
        np.maximum(diagonal, 0.0, out=diagonal)
        own_centers = centers if self.observed is None else centers[:, self.observed]
        better = _better_centers(own_centers, offset, diagonal / column, weight)
        if self.observed is not None:
            if better is not None:
                changed = np.repeat(centers, len(better), axis=0) if len(centers) == 1 else centers.copy()
                changed[:, self.observed] = better
                better = changed
            return {"moments": self._completed(weight, own_centers + offset, scatter)}, better
        if self.tied:
            scatter = np.add.reduce(scatter, axis=0)
        return {"moments": Moments(weight, centers + offset, scatter)}, better

    def _completed(self, weight: Array, mean: Array, scatter: Array) -> Moments:
        """Add the conditional expectations of the missing fields (Ghahramani & Jordan 1994).

        Given what is observed, the expected values are affine in it with coefficients that the parameters
        alone decide, so the completed statistics follow from the observed ones without touching an event.
        """
        assert self.observed is not None
        whole, observed = self.complete, self.observed
        n_components, dimension = whole.mean.shape
        missing = np.setdiff1d(np.arange(dimension), observed)
        covariance = whole.covariance[None] if self.tied else whole.covariance
        precision = self.parameters.precision[None] if self.tied else self.parameters.precision
        cross = covariance[:, missing[:, None], observed]
        regression = np.matmul(cross, precision)
        residual = covariance[:, missing[:, None], missing] - np.matmul(regression, cross.swapaxes(1, 2))
        completed_mean = np.empty_like(whole.mean)
        completed_mean[:, observed] = mean
        completed_mean[:, missing] = (
            whole.mean[:, missing] + np.matmul(regression, (mean - whole.mean[:, observed])[:, :, None])[:, :, 0]
        )
        across = np.matmul(regression, scatter)
        completed = np.empty((n_components, dimension, dimension))
        completed[:, observed[:, None], observed] = scatter
        completed[:, missing[:, None], observed] = across
        completed[:, observed[:, None], missing] = across.swapaxes(1, 2)
        within = np.matmul(across, regression.swapaxes(1, 2)) + weight[:, None, None] * residual
        # Where fields are nearly collinear its rounding is not small beside it, and would leave it unsymmetric.
        completed[:, missing[:, None], missing] = 0.5 * (within + within.swapaxes(1, 2))
        return Moments(weight, completed_mean, np.add.reduce(completed, axis=0) if self.tied else completed)


class _SeparateBlock(Block):
    """Diagonal and spherical covariances: features are x squared, then x, then which fields are observed."""

    def __init__(self, parameters: GaussianParameters, observed: Mask | None) -> None:
        self.mean = parameters.mean
        covariance = parameters.covariance
        self.variance = np.broadcast_to(covariance if covariance.ndim == 2 else covariance[:, None], self.mean.shape)
        self.dimension = self.mean.shape[1]
        self.masked = observed is not None
        self.n_features = (3 if self.masked else 2) * self.dimension

    def natural(self, center: Array) -> tuple[Array, Array]:
        dimension = self.dimension
        offset = self.mean - center
        precision = 1.0 / self.variance
        theta = np.empty((len(offset), self.n_features))
        theta[:, :dimension] = -0.5 * precision
        theta[:, dimension : 2 * dimension] = linear = offset * precision
        constant = -0.5 * (offset * linear + np.log(self.variance) + LOG_TWO_PI)
        if self.masked:
            theta[:, 2 * dimension :] = constant
            return theta, np.zeros(len(offset))
        return theta, np.add.reduce(constant, axis=1)

    def unstable(self, center: Array) -> npt.NDArray[np.intp] | None:
        offset = self.mean - center
        distance = np.add.reduce(offset * offset / self.variance, axis=1)
        return np.flatnonzero(distance > LARGEST_SQUARED_OFFSET) if (distance > LARGEST_SQUARED_OFFSET).any() else None

    def quadratic_factors(self) -> list[tuple[npt.NDArray[np.intp], bool]] | None:
        return None if self.masked else [(np.arange(self.dimension), False)]

    def log_density(self, values: Array, observed: Mask | None, component: int) -> Array:
        variance = self.variance[component][:, None]
        deviation = values - self.mean[component][:, None]
        terms = deviation * deviation / variance + np.log(variance) + LOG_TWO_PI
        if observed is not None:
            terms = np.where(observed, terms, 0.0)
        density: Array = -0.5 * np.add.reduce(terms, axis=0)
        return density

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        dimension = self.dimension
        shifted = out[dimension : 2 * dimension]
        np.subtract(values, center[:, None], out=shifted)
        if observed is not None:
            np.copyto(shifted, 0.0, where=~observed)
        if self.masked:
            np.copyto(out[2 * dimension :], 1.0 if observed is None else observed)
        np.multiply(shifted, shifted, out=out[:dimension])

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, Array | None]:
        dimension = self.dimension
        field_weight = np.empty(self.mean.shape)
        field_weight[:] = sums[:, 2 * dimension :] if self.masked else weight[:, None]
        divisor = np.maximum(field_weight, SMALLEST_WEIGHT)
        first = sums[:, dimension : 2 * dimension]
        offset = first / divisor
        scatter = np.maximum(sums[:, :dimension] - offset * first, 0.0)
        mean = centers + offset
        if self.masked:
            # A field never observed keeps the mean 0 of the zero statistics, not the origin of its features.
            mean = np.where(field_weight > 0.0, mean, 0.0)
        better = _better_centers(centers, offset, scatter / divisor, weight)
        return {"moments": Moments(field_weight, mean, scatter)}, better


def _marginal_joint(parameters: GaussianParameters, keep: npt.NDArray[np.intp]) -> GaussianParameters:
    covariance = parameters.covariance[..., keep[:, None], keep]
    return GaussianParameters(parameters.mean[:, keep], covariance)


def pooled_moments(moments: Moments) -> tuple[Array, Array]:
    """Mean and variance (D,) of each field over all components, the variance never 0.

    A field that never varied gets the standard deviation of a thousandth of its value (of 1 where that is
    0): there is no data to say better, and every covariance must stay positive definite.
    """
    weight = moments.weight if moments.is_separate else moments.weight[:, None]
    total = np.add.reduce(weight, axis=0)
    divisor = np.maximum(total, SMALLEST_WEIGHT)
    mean = np.add.reduce(weight * moments.mean, axis=0) / divisor
    deviation = moments.mean - mean
    deviation *= deviation
    deviation *= weight
    scatter = moments.scatter
    if moments.is_separate:
        deviation += scatter
    elif not moments.is_tied:
        deviation += _diagonal(scatter)
    variance = np.add.reduce(deviation, axis=0)
    if moments.is_tied:
        variance += _diagonal(scatter)
    variance /= divisor
    return mean, _positive_variance(mean, variance)


def _rounding_of(mean: Array) -> Array:
    """Variance that the rounding of values near `mean` may make."""
    rounding: Array = np.maximum(ROUNDING_OF_SQUARES * mean * mean, SMALLEST_VARIANCE)
    return rounding


def _positive_variance(mean: Array, variance: Array) -> Array:
    constant = variance <= _rounding_of(mean)
    if not constant.any():
        return variance
    unit = np.where(np.abs(mean) > np.sqrt(SMALLEST_VARIANCE), mean, 1.0)
    return np.where(constant, (CONSTANT_DEVIATION * unit) ** 2, variance)


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Pseudo-events that each component is given.

    Parameters
    ----------
    weight
        Number of pseudo-events.
    mean, variance
        (D,) of the pooled distribution that they come from, fields uncorrelated.
    shrunk
        (K,) components whose covariances are moved towards the pooled variances, well-defined or not; None for
        none. Where that was needed once it stays, or EM would go round in circles.

    """

    weight: float
    mean: Array
    variance: Array
    shrunk: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Gaussian(Family):
    """Gaussian components.

    Parameters
    ----------
    covariance_type
        "full": each component its own covariance; "tied": one covariance for all; "diag": each component
        its own variances; "spherical": each component one variance.
    reg_covar
        Added to each variance in every M-step, in squared units of the fields, from 0 to 1e200: what
        scikit-learn means by it. A prior, which knows the scale of each field, is the better way.

    Raises
    ------
    FamilyError
        When the covariance type is unknown or `reg_covar` is out of range.

    Notes
    -----
    Missing values are marginalised: for full and tied covariances by conditioning on the observed fields
    (Ghahramani & Jordan 1994, "Supervised learning from incomplete data via an EM approach"), otherwise by
    giving each field a weight of its own.

    Where the prior is too weak to keep a covariance well-defined (the component holds one event, copies of
    one, or events on a line), as little as possible is added to make it so, and `ill_defined` of the parameters says
    where. Those that the prior names as `shrunk` are moved a hundredth of the way to the pooled variances.

    >>> Gaussian(covariance_type="diag").n_parameters(n_fields=2, n_components=3)
    12

    """

    covariance_type: CovarianceType = "full"
    reg_covar: float = 0.0

    kinds: ClassVar[frozenset[str]] = frozenset({"numeric", "flag", "count", "duration"})

    def __post_init__(self) -> None:
        if self.covariance_type not in COVARIANCE_TYPES:
            raise FamilyError(
                f"covariance_type={self.covariance_type!r}, expected one of {', '.join(COVARIANCE_TYPES)}"
            )
        if not 0.0 <= self.reg_covar <= LARGEST_VALUE**2:
            raise FamilyError(f"reg_covar must be a variance from 0 to {LARGEST_VALUE**2:g}, got {self.reg_covar!r}")

    @property
    def _is_joint(self) -> bool:
        return self.covariance_type in ("full", "tied")

    def joint_fields(self, n_fields: int) -> Mask:  # noqa: D102
        return np.full(n_fields, self._is_joint)

    def block(self, parameters: GaussianParameters, observed: Mask | None) -> Block:  # noqa: D102
        return _JointBlock(parameters, observed) if self._is_joint else _SeparateBlock(parameters, observed)

    def pooled(self, values: Array, weight: Array, n_components: int) -> GaussianParameters:  # noqa: D102
        there = ~np.isnan(values)
        filled = np.where(there, values, 0.0)
        weights = np.where(there, weight, 0.0)
        total = weights.sum(axis=1)
        mean = safe_divide((weights * filled).sum(axis=1), total)
        deviation = np.where(there, values - mean[:, None], 0.0)
        variance = _positive_variance(mean, safe_divide((weights * deviation**2).sum(axis=1), total))
        means = np.repeat(mean[None], n_components, axis=0)
        if self.covariance_type == "full":
            return GaussianParameters(means, np.repeat(np.diag(variance)[None], n_components, axis=0))
        if self.covariance_type == "tied":
            return GaussianParameters(means, np.diag(variance))
        if self.covariance_type == "diag":
            return GaussianParameters(means, np.repeat(variance[None], n_components, axis=0))
        return GaussianParameters(means, np.full(n_components, variance.mean()))

    def prior(self, parts: Parts, prior_weight: float) -> GaussianPrior:  # noqa: D102
        moments = parts["moments"]
        assert isinstance(moments, Moments)
        return GaussianPrior(prior_weight, *pooled_moments(moments))

    def maximize(self, parts: Parts, prior: GaussianPrior) -> GaussianParameters:  # noqa: D102
        moments = parts["moments"]
        assert isinstance(moments, Moments)
        mean, covariance = self._estimate(moments, prior)
        ill_defined = np.zeros(len(mean), dtype=bool)
        if prior.weight < WEAK_PRIOR:
            covariance, factor, ill = self._well_defined(covariance, moments, prior)
            ill_defined |= ill
        elif self._is_joint:
            covariance, factor = cholesky(covariance)
        parameters = GaussianParameters(mean, covariance)
        parameters.__dict__["ill_defined"] = ill_defined
        if self._is_joint:
            # What `cholesky` had to compute anyway need not be computed again.
            parameters.__dict__["factor"] = factor
        return parameters

    def _well_defined(
        self, covariance: Array, moments: Moments, prior: GaussianPrior
    ) -> tuple[Array, Array | None, npt.NDArray[np.bool_]]:
        """Return the covariances, repaired where they are ill-defined, their factors if they are joint, and where."""
        flat = self._flat(moments, prior)
        if flat.any():
            self._add_variance(covariance, flat, LEAST_SHARE_OF_POOLED, prior)
        if prior.shrunk is not None and prior.shrunk.any():
            which = np.asarray(prior.shrunk.any()) if self.covariance_type == "tied" else prior.shrunk
            covariance[which] *= 1.0 - SHRINKAGE
            self._add_variance(covariance, which, SHRINKAGE, prior)
        if not self._is_joint:
            return covariance, None, flat
        repaired, factor = cholesky(covariance)
        return repaired, factor, flat | (repaired != covariance).any(axis=(-2, -1))

    def _estimate(self, moments: Moments, prior: GaussianPrior) -> tuple[Array, Array]:
        """Return means and covariances of the merge of the statistics with those of the pseudo-events."""
        total = moments.weight + prior.weight
        share = moments.weight / total
        deviation = moments.mean - prior.mean
        spread = prior.weight * prior.variance
        if not self._is_joint:
            mean = prior.mean + share * deviation
            scatter = moments.scatter + spread
            scatter += prior.weight * share * deviation * deviation
            if self.covariance_type == "spherical":
                variance = scatter.sum(axis=1) / total.sum(axis=1)
            else:
                variance = scatter / total
            return mean, variance + self.reg_covar
        mean = prior.mean + share[:, None] * deviation
        weighted = np.sqrt(prior.weight * share)[:, None] * deviation
        if self.covariance_type == "tied":
            scatter = moments.scatter + weighted.T @ weighted
            diagonal = _diagonal(scatter)
            diagonal += len(mean) * spread
            scatter /= np.add.reduce(total)
        else:
            scatter = weighted[:, :, None] * weighted[:, None, :]
            scatter += moments.scatter
            diagonal = _diagonal(scatter)
            diagonal += spread
            scatter /= total[:, None, None]
        if self.reg_covar:
            diagonal += self.reg_covar
        return mean, scatter

    def _flat(self, moments: Moments, prior: GaussianPrior) -> npt.NDArray[np.bool_]:
        """Return the components, (K,) or (), with events that are all alike in a field, up to rounding."""
        weight, scatter = moments.weight, moments.scatter
        rounding = _rounding_of(moments.mean)
        if self.covariance_type == "tied":
            weight, rounding = np.add.reduce(weight), np.maximum.reduce(rounding, axis=0)
        if self._is_joint:
            scatter, weight = _diagonal(scatter), weight[..., None]
        if self.covariance_type == "spherical":
            weight, scatter, rounding = (one.sum(axis=1, keepdims=True) for one in (weight, scatter, rounding))
            rounding /= moments.mean.shape[1]
        # A component that holds next to nothing is what the prior makes of it.
        alike = (safe_divide(scatter, weight) + self.reg_covar <= rounding) & (weight > prior.weight)
        flat: npt.NDArray[np.bool_] = np.logical_or.reduce(alike, axis=-1)
        return flat

    def _add_variance(
        self, covariance: Array, which: npt.NDArray[np.bool_], share: float, prior: GaussianPrior
    ) -> None:
        """Add a share of the pooled variances to some covariances, in place."""
        if self._is_joint:
            diagonal = _diagonal(covariance)
            diagonal[which] += share * prior.variance
        else:
            covariance[which] += share * (
                prior.variance.mean() if self.covariance_type == "spherical" else prior.variance
            )

    def keep(self, new: GaussianParameters, old: GaussianParameters, kept: Mask) -> GaussianParameters:  # noqa: D102
        parameters: GaussianParameters
        if self.covariance_type == "tied":
            parameters = replace(new, mean=np.where(kept[:, None], old.mean, new.mean))
        else:
            parameters = super().keep(new, old, kept)
        parameters.__dict__["ill_defined"] = new.ill_defined
        return parameters

    def log_prior(self, parameters: GaussianParameters, prior: GaussianPrior) -> float:  # noqa: D102
        theta, constant = self.block(parameters, None).natural(prior.mean)
        dimension = len(prior.mean)
        squares = _layout(dimension).squares if self._is_joint else np.arange(dimension)
        return prior.weight * float((theta[:, squares] @ prior.variance + constant).sum())

    def moments(self, parameters: GaussianParameters) -> tuple[Array, Array]:  # noqa: D102
        covariance, shape = parameters.covariance, parameters.mean.shape
        if self.covariance_type in ("full", "tied"):
            return parameters.mean, np.broadcast_to(np.diagonal(covariance, axis1=-2, axis2=-1), shape)
        return parameters.mean, np.broadcast_to(
            covariance if self.covariance_type == "diag" else covariance[:, None], shape
        )

    def covariances(self, parameters: GaussianParameters) -> Array:
        """Return the covariances as full matrices (K, D, D), whatever the covariance type."""
        n_components, dimension = parameters.mean.shape
        if self._is_joint:
            return np.broadcast_to(parameters.covariance, (n_components, dimension, dimension))
        return self.moments(parameters)[1][:, :, None] * np.eye(dimension)

    def covariance(self, parameters: GaussianParameters, first: int, second: int) -> Array:  # noqa: D102
        return self.covariances(parameters)[:, first, second]

    def sample(  # noqa: D102
        self, parameters: GaussianParameters, components: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> Array:
        dimension = parameters.mean.shape[1]
        noise = generator.standard_normal((len(components), dimension))
        if self._is_joint:
            factor = np.broadcast_to(parameters.factor, (len(parameters.mean), dimension, dimension))
            drawn = np.empty_like(noise)
            for component in range(len(parameters.mean)):
                chosen = components == component
                drawn[chosen] = noise[chosen] @ factor[component].T
        else:
            drawn = noise * np.sqrt(self.moments(parameters)[1])[components]
        return np.ascontiguousarray((parameters.mean[components] + drawn).T)

    def n_parameters(self, n_fields: int, n_components: int) -> int:  # noqa: D102
        of_covariance = {
            "full": n_components * n_fields * (n_fields + 1) // 2,
            "tied": n_fields * (n_fields + 1) // 2,
            "diag": n_components * n_fields,
            "spherical": n_components,
        }
        return n_components * n_fields + of_covariance[self.covariance_type]

    def marginal(self, parameters: GaussianParameters, keep: npt.NDArray[np.intp]) -> GaussianParameters:  # noqa: D102
        if self._is_joint:
            return _marginal_joint(parameters, keep)
        covariance = parameters.covariance if self.covariance_type == "spherical" else parameters.covariance[:, keep]
        return GaussianParameters(parameters.mean[:, keep], covariance)

    def conditional(  # noqa: D102
        self, parameters: GaussianParameters, given: npt.NDArray[np.intp], values: Array
    ) -> GaussianParameters:
        if not self._is_joint:
            return super().conditional(parameters, given, values)  # type: ignore[no-any-return]
        rest = np.setdiff1d(np.arange(parameters.mean.shape[1]), given)
        observed = _marginal_joint(parameters, given)
        cross = parameters.covariance[..., rest[:, None], given]
        regression = np.matmul(cross, observed.precision)
        deviation = values - observed.mean
        mean = parameters.mean[:, rest] + np.matmul(regression, deviation[:, :, None])[:, :, 0]
        covariance = parameters.covariance[..., rest[:, None], rest] - np.matmul(regression, cross.swapaxes(-1, -2))
        return GaussianParameters(mean, covariance)

    def grow(  # noqa: D102
        self, parts: Parts, old: tuple[Field, ...], new: tuple[Field, ...], pooled: GaussianParameters
    ) -> Parts:
        added = len(new) - len(old)
        moments = parts["moments"]
        assert isinstance(moments, Moments)
        if added == 0:
            return parts
        n_components = len(moments.mean)
        fresh_mean, fresh_variance = (one[:, len(old) :] for one in self.moments(pooled))
        mean = np.concatenate([moments.mean, fresh_mean], axis=1)
        if not self._is_joint:
            nothing = np.zeros((n_components, added))
            return {
                "moments": Moments(
                    np.concatenate([moments.weight, nothing], axis=1),
                    np.concatenate([moments.mean, nothing], axis=1),
                    np.concatenate([moments.scatter, nothing], axis=1),
                )
            }
        dimension = mean.shape[1]
        spread = moments.weight[:, None] * fresh_variance
        diagonal = np.arange(len(old), dimension)
        if self.covariance_type == "tied":
            scatter = np.zeros((dimension, dimension))
            scatter[: len(old), : len(old)] = moments.scatter
            scatter[diagonal, diagonal] = spread.sum(axis=0)
        else:
            scatter = np.zeros((n_components, dimension, dimension))
            scatter[:, : len(old), : len(old)] = moments.scatter
            scatter[:, diagonal, diagonal] = spread
        return {"moments": Moments(moments.weight, mean, scatter)}

    def settle(self, parts: Parts, positions: npt.NDArray[np.intp], pooled: GaussianParameters) -> Parts:  # noqa: D102
        moments = parts["moments"]
        assert isinstance(moments, Moments)
        if not self._is_joint:
            return parts
        mean, scatter = moments.mean.copy(), moments.scatter.copy()
        pooled_mean, variance = self.moments(pooled)
        mean[:, positions] = pooled_mean[:, positions]
        scatter[..., positions, :] = 0.0
        scatter[..., :, positions] = 0.0
        spread = moments.weight[:, None] * variance[:, positions]
        scatter[..., positions, positions] = spread.sum(axis=0) if moments.is_tied else spread
        return {"moments": Moments(moments.weight, mean, scatter)}

    def arrays(self, parameters: GaussianParameters) -> dict[str, Array]:  # noqa: D102
        return {"mean": parameters.mean, "covariance": parameters.covariance}

    def from_arrays(self, arrays: Mapping[str, Array]) -> GaussianParameters:  # noqa: D102
        try:
            mean, covariance = arrays["mean"], arrays["covariance"]
        except KeyError as error:
            raise ValueError(f"Gaussian parameters lack the array {error}") from None
        if mean.ndim != 2:
            raise ValueError(f"means must be (components, fields), got shape {mean.shape}")
        n_components, dimension = mean.shape
        shapes = {
            "full": (n_components, dimension, dimension),
            "tied": (dimension, dimension),
            "diag": (n_components, dimension),
            "spherical": (n_components,),
        }
        if covariance.shape != shapes[self.covariance_type]:
            raise ValueError(
                f"{self.covariance_type} covariances must have shape {shapes[self.covariance_type]}, "
                f"got {covariance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("Gaussian parameters must be finite")
        if self._is_joint:
            scale = np.sqrt(np.abs(np.diagonal(covariance, axis1=-2, axis2=-1)))
            asymmetry = np.abs(covariance - covariance.swapaxes(-1, -2))
            if not (asymmetry <= 1e-9 * scale[..., :, None] * scale[..., None, :]).all():
                raise ValueError("covariances must be symmetric")
            try:
                np.linalg.cholesky(covariance)
            except np.linalg.LinAlgError:
                raise ValueError("covariances must be positive definite") from None
        elif not (covariance > 0.0).all():
            raise ValueError("variances must be positive")
        return GaussianParameters(mean, covariance)
