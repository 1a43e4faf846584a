"""Poisson components: counts of things that happen at a rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stream_em.families.mean_valued import MeanValued
from stream_em.numerics import LARGEST_VALUE, Array


@dataclass(frozen=True)
class Poisson(MeanValued):
    """Independent counts; the parameters are the rates (K, D).

    >>> Poisson().natural(np.array([[2.0]]))[1]
    array([[-2.]])

    """

    has_base_measure: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"count"})
    mean_range: ClassVar[tuple[float, float]] = (1e-12, LARGEST_VALUE)

    def natural(self, mean: Array) -> tuple[Array, Array]:  # noqa: D102
        return np.log(mean), -mean

    def base_measure(self, values: Array) -> Array:  # noqa: D102
        from scipy.special import gammaln

        measure: Array = np.add.reduce(gammaln(values + 1.0), axis=0)
        return -measure

    def smoothed_mean(self, total: Array, weight: Array) -> Array:  # noqa: D102
        return (total + 0.5) / (weight + 1.0)

    def draw(self, mean: Array, generator: np.random.Generator) -> Array:  # noqa: D102
        return generator.poisson(mean).astype(np.float64)

    def variance(self, mean: Array) -> Array:  # noqa: D102
        return mean
