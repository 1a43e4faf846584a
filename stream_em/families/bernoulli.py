"""Bernoulli components: flags that are true with a probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stream_em.families.mean_valued import MeanValued
from stream_em.numerics import Array


@dataclass(frozen=True)
class Bernoulli(MeanValued):
    """Independent flags; the parameters are the probabilities (K, D) of true.

    >>> Bernoulli().natural(np.array([[0.5]]))[1].round(4)
    array([[-0.6931]])

    """

    kinds: ClassVar[frozenset[str]] = frozenset({"flag"})
    # A probability of exactly 0 or 1 would make one contrary event infinitely unlikely.
    mean_range: ClassVar[tuple[float, float]] = (1e-12, 1.0 - 1e-12)

    def natural(self, mean: Array) -> tuple[Array, Array]:  # noqa: D102
        false = np.log1p(-mean)
        return np.log(mean) - false, false

    def smoothed_mean(self, total: Array, weight: Array) -> Array:  # noqa: D102
        return (total + 0.5) / (weight + 1.0)

    def draw(self, mean: Array, generator: np.random.Generator) -> Array:  # noqa: D102
        return (generator.random(mean.shape) < mean).astype(np.float64)

    def variance(self, mean: Array) -> Array:  # noqa: D102
        return mean * (1.0 - mean)
