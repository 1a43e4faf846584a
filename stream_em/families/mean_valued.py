"""What the one-parameter families share: a component is known by the mean of each field."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from stream_em.families.base import Block, Family, Mask, Parts
from stream_em.numerics import Array
from stream_em.schema import Field
from stream_em.statistics import Sums


@dataclass(frozen=True, eq=False)
class MeanParameters:
    """Means of all components.

    Parameters
    ----------
    mean
        (K, D) expected value of each field.

    """

    mean: Array


@dataclass(frozen=True, eq=False)
class MeanPrior:
    """Pseudo-events that each component is given.

    Parameters
    ----------
    weight
        Number of pseudo-events.
    mean
        (D,) of the pooled distribution that they come from.

    """

    weight: float
    mean: Array


class _MeanValuedBlock(Block):
    """Features are x, then which fields are observed; the log-density is slope(mean) x + intercept(mean)."""

    def __init__(self, family: MeanValued, parameters: MeanParameters, observed: Mask | None) -> None:
        self.family = family
        self.mean = parameters.mean
        self.dimension = self.mean.shape[1]
        self.masked = observed is not None
        self.has_base_measure = family.has_base_measure
        self.n_features = (2 if self.masked else 1) * self.dimension

    def natural(self, center: Array) -> tuple[Array, Array]:
        slope, intercept = self.family.natural(self.mean)
        if self.masked:
            return np.concatenate([slope, intercept], axis=1), np.zeros(len(slope))
        return slope, np.add.reduce(intercept, axis=1)

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        np.copyto(out[: self.dimension], values)
        if observed is not None:
            np.copyto(out[: self.dimension], 0.0, where=~observed)
        if self.masked:
            np.copyto(out[self.dimension :], 1.0 if observed is None else observed)

    def base_measure(self, values: Array, observed: Mask | None) -> Array:
        return self.family.base_measure(values if observed is None else np.where(observed, values, 0.0))

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, None]:
        if self.masked:
            field_weight = sums[:, self.dimension :].copy()
        else:
            field_weight = np.repeat(weight[:, None], self.dimension, axis=1)
        return {"weight": Sums(field_weight), "sum": Sums(sums[:, : self.dimension].copy())}, None


class MeanValued(Family):
    """Base of the families whose expected sufficient statistics are a weight and a sum for each field."""

    has_base_measure: ClassVar[bool] = False

    mean_range: ClassVar[tuple[float, float]]
    """Open interval in which means lie."""

    @abstractmethod
    def natural(self, mean: Array) -> tuple[Array, Array]:
        """Return slope and intercept (K, D) of the log-density as a function of the field's value."""

    @abstractmethod
    def smoothed_mean(self, total: Array, weight: Array) -> Array:
        """Return a mean strictly within range for sums `total` over events of weight `weight`."""

    @abstractmethod
    def draw(self, mean: Array, generator: np.random.Generator) -> Array:
        """Draw a value for each mean."""

    @abstractmethod
    def variance(self, mean: Array) -> Array:
        """Return the variance at each mean."""

    def base_measure(self, values: Array) -> Array:
        """Return the part of the log-density (B,) that no parameter changes."""
        return np.zeros(values.shape[1])

    def _clip(self, mean: Array) -> Array:
        return np.clip(mean, *self.mean_range)

    def block(self, parameters: MeanParameters, observed: Mask | None) -> Block:  # noqa: D102
        return _MeanValuedBlock(self, parameters, observed)

    def pooled(self, values: Array, weight: Array, n_components: int) -> MeanParameters:  # noqa: D102
        there = ~np.isnan(values)
        total = (np.where(there, values, 0.0) * weight).sum(axis=1)
        mean = self._clip(self.smoothed_mean(total, np.where(there, weight, 0.0).sum(axis=1)))
        return MeanParameters(np.repeat(mean[None], n_components, axis=0))

    def prior(self, parts: Parts, prior_weight: float) -> MeanPrior:  # noqa: D102
        weight, total = _weight_and_sum(parts)
        mean = self.smoothed_mean(np.add.reduce(total, axis=0), np.add.reduce(weight, axis=0))
        return MeanPrior(prior_weight, self._clip(mean))

    def maximize(self, parts: Parts, prior: MeanPrior) -> MeanParameters:  # noqa: D102
        weight, total = _weight_and_sum(parts)
        return MeanParameters(self._clip((total + prior.weight * prior.mean) / (weight + prior.weight)))

    def log_prior(self, parameters: MeanParameters, prior: MeanPrior) -> float:  # noqa: D102
        slope, intercept = self.natural(parameters.mean)
        return prior.weight * float((slope * prior.mean + intercept).sum())

    def moments(self, parameters: MeanParameters) -> tuple[Array, Array]:  # noqa: D102
        return parameters.mean, self.variance(parameters.mean)

    def sample(  # noqa: D102
        self, parameters: MeanParameters, components: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> Array:
        return np.ascontiguousarray(self.draw(parameters.mean[components], generator).T, dtype=np.float64)

    def n_parameters(self, n_fields: int, n_components: int) -> int:  # noqa: D102
        return n_fields * n_components

    def marginal(self, parameters: MeanParameters, keep: npt.NDArray[np.intp]) -> MeanParameters:  # noqa: D102
        return MeanParameters(parameters.mean[:, keep])

    def grow(  # noqa: D102
        self, parts: Parts, old: tuple[Field, ...], new: tuple[Field, ...], pooled: MeanParameters
    ) -> Parts:
        weight, total = _weight_and_sum(parts)
        nothing = np.zeros((len(weight), len(new) - len(old)))
        return {
            "weight": Sums(np.concatenate([weight, nothing], axis=1)),
            "sum": Sums(np.concatenate([total, nothing], axis=1)),
        }

    def arrays(self, parameters: MeanParameters) -> dict[str, Array]:  # noqa: D102
        return {"mean": parameters.mean}

    def from_arrays(self, arrays: Mapping[str, Array]) -> MeanParameters:  # noqa: D102
        name = type(self).__name__
        if "mean" not in arrays:
            raise ValueError(f"{name} parameters lack the array 'mean'")
        mean = arrays["mean"]
        low, high = self.mean_range
        if mean.ndim != 2:
            raise ValueError(f"{name} means must be (components, fields), got shape {mean.shape}")
        if not ((mean >= low) & (mean <= high)).all():
            raise ValueError(f"{name} means must lie between {low:g} and {high:g}")
        return MeanParameters(mean)


def _weight_and_sum(parts: Parts) -> tuple[Array, Array]:
    weight, total = parts["weight"], parts["sum"]
    assert isinstance(weight, Sums)
    assert isinstance(total, Sums)
    return weight.values, total.values
