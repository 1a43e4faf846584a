"""Exponential components: durations, waiting times and other amounts from 0 up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stream_em.families.mean_valued import MeanValued
from stream_em.numerics import LARGEST_VALUE, Array


@dataclass(frozen=True)
class Exponential(MeanValued):
    """Independent durations; the parameters are the means (K, D), which are 1 / rate.

    >>> Exponential().natural(np.array([[2.0]]))[0]
    array([[-0.5]])

    """

    kinds: ClassVar[frozenset[str]] = frozenset({"duration"})
    mean_range: ClassVar[tuple[float, float]] = (1e-100, LARGEST_VALUE)

    def natural(self, mean: Array) -> tuple[Array, Array]:  # noqa: D102
        return -1.0 / mean, -np.log(mean)

    def smoothed_mean(self, total: Array, weight: Array) -> Array:  # noqa: D102
        # Durations have a unit, so there is no pseudo-duration to add; 1 stands in until one is above 0.
        seen = (total > 0.0) & (weight > 0.0)
        return np.divide(total, weight, out=np.ones_like(total), where=seen)

    def draw(self, mean: Array, generator: np.random.Generator) -> Array:  # noqa: D102
        return generator.exponential(mean)

    def variance(self, mean: Array) -> Array:  # noqa: D102
        return mean * mean
