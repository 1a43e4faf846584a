"""The random numbers of R 3.5, as far as the scripts behind published tables draw them.

A table whose runs end far apart can be met only on the very events that its authors drew. `RStream` draws what R does
after `set.seed`: Mersenne Twister, normal numbers by inversion, binomial numbers by the BTPE algorithm, and labels by
rounding, as `sample` did before R 3.6. The formulas are those of the papers that R's manual names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
from scipy.linalg import eigh
from scipy.special import ndtri

from stream_em.numerics import Array

STATE_WORDS = 624
# A number that would be 0 or 1 is moved away by half of this.
SMALLEST_STEP = 1.0 / (2**32 - 1)
# A normal number is made from two uniform ones, the first of which gives its leading 27 bits.
LEADING = 134217728


class RStream:
    """What R draws after `set.seed(seed)`, number by number.

    Parameters
    ----------
    seed
        The seed.

    """

    def __init__(self, seed: int) -> None:
        words, word = np.empty(STATE_WORDS, dtype=np.uint32), seed
        # Fifty words are thrown away, then one for the position in the state.
        for position in range(-51, STATE_WORDS):
            word = (69069 * word + 1) % 2**32
            if position >= 0:
                words[position] = word
        self._bits = np.random.MT19937()
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": STATE_WORDS}}

    def uniform(self, n: int) -> Array:
        """Return numbers (n,) in (0, 1)."""
        drawn = self._bits.random_raw(n) * 2.0**-32
        return np.clip(drawn, 0.5 * SMALLEST_STEP, 1.0 - 0.5 * SMALLEST_STEP)

    def skip(self, n: int) -> None:
        """Pass over uniform numbers."""
        self._bits.random_raw(n, output=False)

    def normal(self, n: int) -> Array:
        """Return standard normal numbers (n,), by inversion."""
        leading, rest = self.uniform(2 * n).reshape(n, 2).T
        drawn: Array = ndtri((np.floor(LEADING * leading) + rest) / LEADING)
        return drawn

    def labels(self, n: int, n_labels: int) -> np.ndarray:
        """Return labels (n,) from 0 on, as `sample(n_labels, n, replace=TRUE)` does from 1 on."""
        return np.floor(n_labels * self.uniform(n)).astype(np.intp)

    def multinomial(self, n: int, chances: Sequence[float]) -> list[int]:
        """Return how many of n fall on each (K,), as a chain of binomial numbers."""
        counts, left, chance_left = [], n, math.fsum(chances)
        for chance in chances[:-1]:
            counts.append(self.binomial(left, chance / chance_left))
            left, chance_left = left - counts[-1], chance_left - chance
        return [*counts, left]

    def binomial(self, n: int, chance: float) -> int:
        """Return a binomial number with a mean of at least 30, by BTPE, Kachitvichyanukul & Schmeiser (1988)."""
        p = min(chance, 1.0 - chance)
        q = 1.0 - p
        if n * p < 30.0:
            raise ValueError(f"BTPE needs a mean of at least 30 both ways, got n={n}, chance={chance}")
        variance, shifted_mean = n * p * q, n * p + p
        mode = int(shifted_mean)
        # The hat: a triangle, parallelograms beside it, exponential tails.
        half = int(2.195 * math.sqrt(variance) - 4.6 * q) + 0.5
        middle = mode + 0.5
        left, right = middle - half, middle + half
        height = 0.134 + 20.5 / (15.3 + mode)
        slope = (shifted_mean - left) / (shifted_mean - left * p)
        left_rate = slope * (1.0 + 0.5 * slope)
        slope = (right - shifted_mean) / (right * q)
        right_rate = slope * (1.0 + 0.5 * slope)
        area_2 = half * (1.0 + 2.0 * height)
        area_3 = area_2 + height / left_rate
        area_4 = area_3 + height / right_rate
        while True:
            u, v = self.uniform(2).tolist()
            u *= area_4
            if u <= half:
                drawn = int(middle - half * v + u)
                break
            if u <= area_2:
                x = left + (u - half) / height
                v = v * height + 1.0 - abs(middle - x) / half
                if not 0.0 < v <= 1.0:
                    continue
                drawn = int(x)
            elif u > area_3:
                drawn = int(right - math.log(v) / right_rate)
                if drawn > n:
                    continue
                v *= (u - area_3) * right_rate
            else:
                drawn = int(left + math.log(v) / left_rate)
                if drawn < 0:
                    continue
                v *= (u - area_2) * left_rate
            log_ratio = (
                math.lgamma(mode + 1)
                + math.lgamma(n - mode + 1)
                - math.lgamma(drawn + 1)
                - math.lgamma(n - drawn + 1)
                + (drawn - mode) * math.log(p / q)
            )
            if math.log(v) <= log_ratio:
                break
        return n - drawn if chance > 0.5 else drawn

    def multivariate_normal(self, n: int, mean: Array, covariance: Array) -> Array:
        """Return events (n, D), as `MASS::mvrnorm` does."""
        # Largest eigenvalue first; the signs of the vectors are LAPACK's, by the same routine.
        eigenvalues, vectors = eigh(covariance, driver="evr")
        root = vectors[:, ::-1] * np.sqrt(eigenvalues[::-1])
        return mean + (root @ self.normal(n * len(mean)).reshape(len(mean), n)).T

    def mixture(self, n: int, weights: Array, means: Array, covariances: Array) -> tuple[Array, np.ndarray]:
        """Return events (n, D) and the component (n,) each came from, as `MixSim::simdataset` does: in their order."""
        n_components = len(weights)
        # One event of each component is certain.
        sizes = [1 + one for one in self.multinomial(n - n_components, weights.tolist())]
        events = [self.multivariate_normal(*one) for one in zip(sizes, means, covariances)]
        return np.concatenate(events), np.repeat(np.arange(n_components), sizes)

    def runs(self, n_runs: int, n: int, weights: Array, n_fields: int) -> Iterator[RStream]:
        """Yield the stream as each of several runs finds it that draw `mixture` and then `labels`."""
        stream = deepcopy(self)
        for _ in range(n_runs):
            yield deepcopy(stream)
            stream.multinomial(n - len(weights), weights.tolist())
            stream.skip(2 * n * n_fields + n)
