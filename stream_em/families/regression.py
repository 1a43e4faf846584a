"""Linear regressions of one field on the others: components are lines (or planes), not clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from stream_em.families.base import Block, Family, FamilyError, Mask, Parts
from stream_em.families.gaussian import (
    LARGEST_SQUARED_OFFSET,
    LEAST_SHARE_OF_POOLED,
    LOG_TWO_PI,
    Gaussian,
    GaussianParameters,
    _diagonal,
    _JointBlock,
    pooled_moments,
)
from stream_em.numerics import SMALLEST_WEIGHT, Array, cholesky
from stream_em.schema import Field
from stream_em.statistics import Moments

# The pooled regression takes this share of each variance to be of that field alone. So it is well-defined for collinear
# covariates, and leaves some of the response unexplained even where it could fit every event.
LEAST_UNEXPLAINED = 1e-6

# Lines through few events that a start chooses from: among so many, one for each component is close to a true one.
N_CANDIDATES = 200

OF_COMPONENTS = ("coefficients", "intercept", "variance")
OF_COVARIATES = ("covariate_mean", "covariate_covariance")


@dataclass(frozen=True, eq=False)
class LinearRegressionParameters:
    """Regression lines of all components.

    Parameters
    ----------
    coefficients
        (K, P) slopes, one for each covariate, in the order of the fields.
    intercept
        (K,), 0 for lines through the origin.
    variance
        (K,) of the response about the line.
    covariate_mean, covariate_covariance
        (P,) and (P, P) of the covariates of all events. The components do not tell them apart, and no density depends
        on them; they are what `sample` draws covariates from.

    """

    coefficients: Array
    intercept: Array
    variance: Array
    covariate_mean: Array
    covariate_covariance: Array

    def predict(self, covariates: npt.ArrayLike) -> Array:
        """Return the expected response (n, K) in each component, given covariates (n, P) in the order of the fields.

        `predict(covariates) @ weights` is that of the mixture: covariates alone do not tell components apart.
        """
        expected: Array = np.asarray(covariates, dtype=np.float64) @ self.coefficients.T + self.intercept
        return expected

    @cached_property
    def covariates(self) -> GaussianParameters:
        """The distribution of the covariates, as that of a single component."""
        return GaussianParameters(self.covariate_mean[None], self.covariate_covariance)


@dataclass(frozen=True, eq=False)
class LinearRegressionPrior:
    """Pseudo-events that each component is given.

    Parameters
    ----------
    weight
        Number of pseudo-events.
    pooled
        The regression, of one component, over all events; pseudo-events come from it, with uncorrelated covariates.

    """

    weight: float
    pooled: LinearRegressionParameters


class _RegressionBlock(Block):
    """Features are those of a joint Gaussian of covariates and response: products x_i x_j (i <= j), then x."""

    def __init__(self, parameters: LinearRegressionParameters, response: int) -> None:
        self.mean, covariance = _joint_moments(parameters, parameters.covariate_covariance, response)
        self.spread = _diagonal(covariance)
        self.joint = _JointBlock(GaussianParameters(self.mean, covariance), None)
        self.n_features = self.joint.n_features
        self.variance = parameters.variance
        # The residual of an event x is `normal @ x - level`.
        self.normal = _normal(parameters.coefficients, response)
        self.level = parameters.intercept

    def natural(self, center: Array) -> tuple[Array, Array]:
        layout = self.joint.layout
        deviation = np.sqrt(self.variance)
        unit = self.normal / deviation[:, None]
        offset = (self.level - self.normal @ center) / deviation
        products = unit[:, :, None] * unit[:, None, :]
        theta = np.empty((len(unit), self.n_features))
        theta[:, : layout.n_products] = products.reshape(len(unit), -1)[:, layout.upper] * layout.coefficient
        theta[:, layout.n_products :] = offset[:, None] * unit
        return theta, -0.5 * (offset * offset + np.log(self.variance) + LOG_TWO_PI)

    def unstable(self, center: Array) -> npt.NDArray[np.intp] | None:
        # The terms that cancel in the squared residual are squares of D summands; here they are at their typical size.
        offset = self.mean - center
        terms = self.normal * self.normal * (offset * offset + self.spread)
        size = len(center) * np.add.reduce(terms, axis=1)
        unstable = size > LARGEST_SQUARED_OFFSET * self.variance
        return np.flatnonzero(unstable) if unstable.any() else None

    def quadratic_factors(self) -> list[tuple[npt.NDArray[np.intp], bool]] | None:
        return self.joint.quadratic_factors()

    def log_density(self, values: Array, observed: Mask | None, component: int) -> Array:
        residual = self.normal[component] @ values - self.level[component]
        variance = self.variance[component]
        density: Array = -0.5 * (residual * residual / variance + np.log(variance) + LOG_TWO_PI)
        return density

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        self.joint.write_features(values, center, None, out)

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, Array | None]:
        return self.joint.collect(sums, weight, centers)


class _NoResponseBlock(Block):
    """Events without a response: they have no features, the density 1 in each component, and no statistics."""

    n_features = 0

    def __init__(self, n_components: int) -> None:
        self.n_components = n_components

    def natural(self, center: Array) -> tuple[Array, Array]:
        return np.empty((self.n_components, 0)), np.zeros(self.n_components)

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        """Write nothing: there are no features."""

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, None]:
        dimension = centers.shape[1]
        mean, scatter = np.zeros((len(weight), dimension)), np.zeros((len(weight), dimension, dimension))
        return {"moments": Moments(np.zeros(len(weight)), mean, scatter)}, None


@lru_cache(maxsize=256)
def _covariates(dimension: int, response: int) -> npt.NDArray[np.intp]:
    """Return the positions of the fields that are not the response."""
    return np.delete(np.arange(dimension), response)


def _normal(coefficients: Array, response: int) -> Array:
    """Return what the fields (K, D) are multiplied by in the residual: 1 for the response, else -slope."""
    normal = np.ones((len(coefficients), coefficients.shape[1] + 1))
    normal[:, _covariates(normal.shape[1], response)] = -coefficients
    return normal


def _joint_moments(
    parameters: LinearRegressionParameters, covariate_covariance: Array, response: int
) -> tuple[Array, Array]:
    """Return means (K, D) and covariances (K, D, D) of all fields, were the covariates drawn with this covariance."""
    coefficients = parameters.coefficients
    n_components, n_covariates = coefficients.shape
    covariates = _covariates(n_covariates + 1, response)
    mean = np.empty((n_components, n_covariates + 1))
    mean[:, covariates] = parameters.covariate_mean
    mean[:, response] = parameters.intercept + coefficients @ parameters.covariate_mean
    cross = coefficients @ covariate_covariance
    covariance = np.empty((n_components, n_covariates + 1, n_covariates + 1))
    covariance[:, covariates[:, None], covariates] = covariate_covariance
    covariance[:, covariates, response] = covariance[:, response, covariates] = cross
    covariance[:, response, response] = np.add.reduce(cross * coefficients, axis=1) + parameters.variance
    return mean, covariance


def _least_squares(moments: Moments, response: int, intercept: bool) -> tuple[Array, Array, Array]:
    """Return coefficients (K, P), intercepts (K,) and mean squared residuals (K,), all of the events' own."""
    weight = np.maximum(moments.weight, SMALLEST_WEIGHT)
    second = moments.scatter / weight[:, None, None]
    if not intercept:
        second += moments.mean[:, :, None] * moments.mean[:, None, :]
    covariates = _covariates(moments.mean.shape[1], response)
    # In units of the covariates' own spread, no unit of theirs makes the equations ill-conditioned.
    unit = np.sqrt(np.maximum(_diagonal(second)[:, covariates], SMALLEST_WEIGHT))
    gram = second[:, covariates[:, None], covariates] / (unit[:, :, None] * unit[:, None, :])
    _diagonal(gram)[:] = 1.0
    cross = second[:, covariates, response] / unit
    coefficients = np.linalg.solve(cholesky(gram)[0], cross[:, :, None])[:, :, 0] / unit
    normal = _normal(coefficients, response)
    squared = np.matmul(normal[:, None, :], np.matmul(second, normal[:, :, None]))[:, 0, 0]
    level = np.add.reduce(normal * moments.mean, axis=1) if intercept else np.zeros(len(weight))
    return coefficients, level, np.maximum(squared, 0.0)


@dataclass(frozen=True)
class LinearRegression(Family):
    """Linear regressions of one field, the response, on all the others, the covariates.

    The model is conditional: the log-density of an event is that of its response given its covariates, about which
    nothing is said, so that all components share their distribution.

    Parameters
    ----------
    response
        Name of the field that the others explain.
    intercept
        Whether lines have an intercept; otherwise they go through the origin.
    names
        The fields; `bind` sets them from the schema.

    Raises
    ------
    FamilyError
        When the response is no field, or there is no other field.

    Notes
    -----
    The mixture is that of Cappé & Moulines (2009), section 5. Its sufficient statistics are the moments of covariates
    and response together, as of a Gaussian with a full covariance; the pseudo-events of the prior come from the
    regression over all the events.

    An event without a response says nothing about its component, whose responsibilities are the weights then, and
    nothing about any line. One with a response and without some covariate has no density: it is refused.

    >>> from stream_em import BatchEM, Mixture
    >>> generator = np.random.default_rng(0)
    >>> x, rising = generator.uniform(0.0, 10.0, size=500), generator.random(500) < 0.7
    >>> y = np.where(rising, 2.0 * x, 15.0 - x) + generator.normal(scale=0.5, size=500)
    >>> events = [{"x": one, "y": other} for one, other in zip(x.tolist(), y.tolist())]
    >>> fitted = BatchEM(Mixture(LinearRegression(response="y"), n_components=2)).fit(events)
    >>> lines, weights = fitted.parameters.components, fitted.parameters.weights
    >>> np.sort(lines.coefficients[:, 0]).round(1)
    array([-1.,  2.])
    >>> np.sort(lines.predict([[3.0]])).round(), (lines.predict([[3.0]]) @ weights).round()
    (array([[ 6., 12.]]), array([8.]))
    >>> np.sort(fitted.conditional({"x": 3.0}).parameters.components.mean.ravel()).round()
    array([ 6., 12.])

    """

    response: str
    intercept: bool = True
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)

    kinds: ClassVar[frozenset[str]] = Gaussian.kinds

    def __post_init__(self) -> None:
        if not isinstance(self.response, str):
            raise FamilyError(f"response must be the name of a field, got {self.response!r}")
        if not isinstance(self.intercept, bool):
            raise FamilyError(f"intercept must be True or False, got {self.intercept!r}")

    def bind(self, fields: tuple[Field, ...]) -> Self:  # noqa: D102
        names = tuple(one.name for one in fields)
        if self.response not in names:
            known = ", ".join(map(repr, names))
            raise FamilyError(f"the response {self.response!r} is no field; the fields are {known}")
        if len(names) == 1:
            raise FamilyError(
                f"there is no field to explain the response {self.response!r} by; without covariates, use Gaussian"
            )
        return replace(super().bind(fields), names=names)

    @property
    def _response(self) -> int:
        if not self.names:
            raise FamilyError("the fields are not known yet: bind the model to a schema first")
        return self.names.index(self.response)

    def joint_fields(self, n_fields: int) -> Mask:  # noqa: D102
        return np.ones(n_fields, dtype=bool)

    def lacking(self, observed: Mask) -> Mask:  # noqa: D102
        lacking: Mask = ~observed & observed[self._response]
        return lacking

    def block(self, parameters: LinearRegressionParameters, observed: Mask | None) -> Block:  # noqa: D102
        response = self._response
        if observed is not None and not observed[response]:
            return _NoResponseBlock(len(parameters.variance))
        return _RegressionBlock(parameters, response)

    def pooled(self, values: Array, weight: Array, n_components: int) -> LinearRegressionParameters:  # noqa: D102
        told = ~np.isnan(values).any(axis=0)
        values, weight = values[:, told], weight[told]
        total = np.add.reduce(weight)
        mean = values @ weight / max(total, SMALLEST_WEIGHT)
        deviation = values - mean[:, None]
        moments = Moments(total[None], mean[None], ((deviation * weight) @ deviation.T)[None])
        one = self._pooled(moments)
        repeated = {name: np.repeat(getattr(one, name), n_components, axis=0) for name in OF_COMPONENTS}
        return replace(one, **repeated)

    def _pooled(self, moments: Moments) -> LinearRegressionParameters:
        """Return the regression over all the events, as that of one component."""
        mean, variance = pooled_moments(moments)
        deviation = moments.mean - mean
        scatter = np.add.reduce(moments.scatter) + (moments.weight[:, None] * deviation).T @ deviation
        covariance = scatter / max(float(np.add.reduce(moments.weight)), SMALLEST_WEIGHT)
        np.fill_diagonal(covariance, variance * (1.0 + LEAST_UNEXPLAINED))
        response = self._response
        whole = Moments(np.ones(1), mean[None], covariance[None])
        coefficients, intercept, squared = _least_squares(whole, response, self.intercept)
        covariates = _covariates(len(mean), response)
        return LinearRegressionParameters(
            coefficients,
            intercept,
            squared,
            mean[covariates],
            covariance[covariates[:, None], covariates],
        )

    def prior(self, parts: Parts, prior_weight: float) -> LinearRegressionPrior:  # noqa: D102
        return LinearRegressionPrior(prior_weight, self._pooled(_moments(parts)))

    def _pseudo_events(self, prior: LinearRegressionPrior) -> tuple[Array, Array]:
        """Return mean (1, D) and covariance (1, D, D) of the pseudo-events."""
        variance = np.diag(np.diagonal(prior.pooled.covariate_covariance))
        return _joint_moments(prior.pooled, variance, self._response)

    def maximize(self, parts: Parts, prior: LinearRegressionPrior) -> LinearRegressionParameters:  # noqa: D102
        moments, pooled = _moments(parts), prior.pooled
        mean, covariance = self._pseudo_events(prior)
        weight = np.full(len(moments.weight), prior.weight)
        pseudo = Moments(weight, np.broadcast_to(mean, moments.mean.shape), prior.weight * covariance)
        coefficients, intercept, squared = _least_squares(moments.merge(pseudo), self._response, self.intercept)
        # Only a prior too weak to tell from rounding leaves less than that.
        variance = np.maximum(squared, LEAST_SHARE_OF_POOLED * pooled.variance)
        return LinearRegressionParameters(
            coefficients, intercept, variance, pooled.covariate_mean, pooled.covariate_covariance
        )

    def keep(  # noqa: D102
        self, new: LinearRegressionParameters, old: LinearRegressionParameters, kept: Mask
    ) -> LinearRegressionParameters:
        return replace(
            new,
            coefficients=np.where(kept[:, None], old.coefficients, new.coefficients),
            intercept=np.where(kept, old.intercept, new.intercept),
            variance=np.where(kept, old.variance, new.variance),
        )

    def log_prior(self, parameters: LinearRegressionParameters, prior: LinearRegressionPrior) -> float:  # noqa: D102
        mean, covariance = (one[0] for one in self._pseudo_events(prior))
        normal = _normal(parameters.coefficients, self._response)
        squared = (normal @ mean - parameters.intercept) ** 2 + ((normal @ covariance) * normal).sum(axis=1)
        density = -0.5 * (squared / parameters.variance + np.log(parameters.variance) + LOG_TWO_PI)
        return prior.weight * float(density.sum())

    def start(  # noqa: D102
        self, values: Array, weight: Array, n_components: int, generator: np.random.Generator
    ) -> Array | None:
        told = np.flatnonzero(~np.isnan(values).any(axis=0) & (weight > 0.0))
        if len(told) == 0:
            return None
        values, chance = values[:, told], weight[told] / weight[told].sum()
        size = len(values) - 1 + self.intercept
        subsets = values[:, generator.choice(len(told), size=(N_CANDIDATES, size), p=chance)]
        mean = subsets.mean(axis=2)
        deviation = subsets - mean[:, :, None]
        scatter = np.einsum("inb,jnb->nij", deviation, deviation)
        moments = Moments(np.full(N_CANDIDATES, float(size)), np.ascontiguousarray(mean.T), scatter)
        coefficients, level, _ = _least_squares(moments, self._response, self.intercept)
        residual = np.abs(_normal(coefficients, self._response) @ values - level[:, None])
        # Greedy, as in k-means++; absolute residuals, for a line close to few events beats one midway between many.
        chosen: list[int] = []
        nearest = np.full(len(told), np.inf)
        for _ in range(n_components):
            best = int(np.argmin(np.minimum(residual, nearest) @ chance))
            chosen.append(best)
            nearest = np.minimum(nearest, residual[best])
        responsibilities = np.full((n_components, len(weight)), 1.0 / n_components)
        responsibilities[:, told] = np.arange(n_components)[:, None] == residual[chosen].argmin(axis=0)
        return responsibilities

    def moments(self, parameters: LinearRegressionParameters) -> tuple[Array, Array]:
        """Return mean and variance (K, D) of each field in each component; the covariates' are those of all events."""
        response, coefficients, covariance = self._response, parameters.coefficients, parameters.covariate_covariance
        covariates = _covariates(coefficients.shape[1] + 1, response)
        mean, variance = np.empty((2, len(coefficients), coefficients.shape[1] + 1))
        mean[:, covariates], variance[:, covariates] = parameters.covariate_mean, _diagonal(covariance)
        mean[:, response] = parameters.intercept + coefficients @ parameters.covariate_mean
        explained = np.add.reduce((coefficients @ covariance) * coefficients, axis=1)
        variance[:, response] = explained + parameters.variance
        return mean, variance

    def covariance(self, parameters: LinearRegressionParameters, first: int, second: int) -> Array:  # noqa: D102
        return _joint_moments(parameters, parameters.covariate_covariance, self._response)[1][:, first, second]

    def sample(
        self, parameters: LinearRegressionParameters, components: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> Array:
        """Draw one event (D,) from each of the `components` (n,); return (D, n).

        The model does not know how covariates are distributed: they are drawn from a Gaussian with the mean and
        covariance that they had in all events. For responses at covariates of your own, see `Mixture.conditional`.
        """
        alike = np.zeros(len(components), dtype=np.intp)
        covariates = Gaussian("tied").sample(parameters.covariates, alike, generator)
        response = parameters.intercept[components] + np.add.reduce(parameters.coefficients[components].T * covariates)
        response += np.sqrt(parameters.variance[components]) * generator.standard_normal(len(components))
        return np.insert(covariates, self._response, response, axis=0)

    def n_parameters(self, n_fields: int, n_components: int) -> int:  # noqa: D102
        return n_components * (n_fields + self.intercept)

    def grow(  # noqa: D102
        self,
        parts: Parts,
        old: tuple[Field, ...],
        new: tuple[Field, ...],
        pooled: LinearRegressionParameters,
    ) -> Parts:
        if len(new) > len(old):
            added = ", ".join(repr(one.name) for one in new[len(old) :])
            raise FamilyError(
                f"the regression cannot gain the covariates {added}: the events learned so far have no value of them; "
                'leave unknown fields out with unknown="ignore", or start anew'
            )
        return parts

    def restrict(self, keep: npt.NDArray[np.intp]) -> Family:  # noqa: D102
        if self._response not in keep:
            raise FamilyError(
                f"a regression knows no density of the covariates alone: keep the response {self.response!r}"
            )
        if len(keep) == 1:
            return Gaussian("diag")
        # The part of given covariates becomes an intercept.
        return replace(self, intercept=self.intercept or len(keep) < len(self.names), names=())

    def marginal(  # noqa: D102
        self, parameters: LinearRegressionParameters, keep: npt.NDArray[np.intp]
    ) -> LinearRegressionParameters:
        left_out = [name for position, name in enumerate(self.names) if position not in keep]
        if left_out:
            raise FamilyError(
                f"a regression knows no density of {self.response!r} without the covariates "
                f"{', '.join(map(repr, left_out))}: give their values to `conditional` instead"
            )
        order = _covariates_at(keep[keep != self._response], self._response)
        return replace(
            parameters,
            coefficients=parameters.coefficients[:, order],
            covariate_mean=parameters.covariate_mean[order],
            covariate_covariance=parameters.covariate_covariance[order[:, None], order],
        )

    def conditional(  # noqa: D102
        self, parameters: LinearRegressionParameters, given: npt.NDArray[np.intp], values: Array
    ) -> LinearRegressionParameters | GaussianParameters:
        known = _covariates_at(given, self._response)
        rest = np.setdiff1d(np.arange(parameters.coefficients.shape[1]), known)
        intercept = parameters.intercept + parameters.coefficients[:, known] @ values
        if len(rest) == 0:
            return GaussianParameters(intercept[:, None], parameters.variance[:, None])
        covariates = Gaussian("tied").conditional(parameters.covariates, known, values)
        return LinearRegressionParameters(
            parameters.coefficients[:, rest],
            intercept,
            parameters.variance,
            covariates.mean[0],
            cholesky(covariates.covariance)[0],
        )

    def arrays(self, parameters: LinearRegressionParameters) -> dict[str, Array]:  # noqa: D102
        return {name: getattr(parameters, name) for name in (*OF_COMPONENTS, *OF_COVARIATES)}

    def from_arrays(self, arrays: Mapping[str, Array]) -> LinearRegressionParameters:  # noqa: D102
        try:
            coefficients, intercept, variance = (arrays[name] for name in OF_COMPONENTS)
            mean, covariance = (arrays[name] for name in OF_COVARIATES)
        except KeyError as error:
            raise ValueError(f"LinearRegression parameters lack the array {error}") from None
        if coefficients.ndim != 2 or coefficients.shape[1] != len(self.names) - 1:
            raise ValueError(
                f"coefficients must be (components, {len(self.names) - 1} covariates), got shape {coefficients.shape}"
            )
        for name, array in (("intercept", intercept), ("variance", variance)):
            if array.shape != coefficients.shape[:1]:
                raise ValueError(f"{name} must have shape {coefficients.shape[:1]}, got {array.shape}")
        if not all(np.isfinite(array).all() for array in (coefficients, intercept, variance)):
            raise ValueError("LinearRegression parameters must be finite")
        if not (variance > 0.0).all():
            raise ValueError("variances must be positive")
        if not self.intercept and intercept.any():
            raise ValueError("lines through the origin have no intercept other than 0")
        if mean.shape != coefficients.shape[1:]:
            raise ValueError(f"the covariates' mean must have shape {coefficients.shape[1:]}, got {mean.shape}")
        Gaussian("tied").from_arrays({"mean": mean[None], "covariance": covariance})
        return LinearRegressionParameters(coefficients, intercept, variance, mean, covariance)


def _moments(parts: Parts) -> Moments:
    moments = parts["moments"]
    assert isinstance(moments, Moments)
    return moments


def _covariates_at(positions: npt.NDArray[np.intp], response: int) -> npt.NDArray[np.intp]:
    """Return which covariates the fields at these positions are."""
    return positions - (positions > response)
