"""Categorical components: each field takes one of a bounded vocabulary, or `other`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from stream_em.families.base import Block, Family, FamilyError, Mask, Parts
from stream_em.numerics import Array, safe_divide
from stream_em.schema import Field
from stream_em.statistics import Sums

SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True, eq=False)
class CategoricalParameters:
    """Probabilities of all codes.

    Parameters
    ----------
    probability
        (K, C): the codes of the first field (0 is `other`), then those of the second, and so on.

    """

    probability: Array


class _CategoricalBlock(Block):
    """Features are one indicator a code; a missing value has none set, which is what masks it."""

    def __init__(self, parameters: CategoricalParameters, n_codes: tuple[int, ...]) -> None:
        self.parameters = parameters
        self.n_codes = n_codes
        self.n_features = sum(n_codes)

    def natural(self, center: Array) -> tuple[Array, Array]:
        probability = self.parameters.probability
        return np.log(probability), np.zeros(len(probability))

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        start = 0
        for row, size in zip(values, self.n_codes):
            stop = start + size
            np.equal(row, np.arange(float(size))[:, None], out=out[start:stop])
            start = stop

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, None]:
        return {"counts": Sums(sums.copy())}, None


@dataclass(frozen=True)
class Categorical(Family):
    """Independent categories.

    Parameters
    ----------
    n_codes
        Number of codes of each field, `other` included; `bind` sets it from the schema.

    >>> Categorical(n_codes=(3, 2)).n_parameters(n_fields=2, n_components=5)
    15

    """

    n_codes: tuple[int, ...] = field(default=(), compare=False, repr=False)

    kinds: ClassVar[frozenset[str]] = frozenset({"category"})

    def bind(self, fields: tuple[Field, ...]) -> Self:  # noqa: D102
        return replace(super().bind(fields), n_codes=tuple(one.n_codes for one in fields))

    def block(self, parameters: CategoricalParameters, observed: Mask | None) -> Block:  # noqa: D102
        return _CategoricalBlock(parameters, self.n_codes)

    def _by_field(self, codes: Array) -> list[Array]:
        if not self.n_codes:
            raise FamilyError("the number of categories is not known yet: bind the model to a schema first")
        return np.split(codes, np.cumsum(self.n_codes)[:-1], axis=-1)

    def _normalized(self, counts: Array) -> Array:
        shares = [safe_divide(one, one.sum(axis=-1, keepdims=True)) for one in self._by_field(counts)]
        return np.maximum(np.concatenate(shares, axis=-1), SMALLEST_PROBABILITY)

    def _smoothed(self, counts: Array) -> Array:
        even = [np.full(size, 1.0 / size) for size in self.n_codes]
        return self._normalized(counts + np.concatenate(even) if even else counts)

    def pooled(self, values: Array, weight: Array, n_components: int) -> CategoricalParameters:  # noqa: D102
        counts = np.concatenate(
            [
                np.bincount(row[there].astype(np.intp), weight[there], minlength=size)
                for row, there, size in zip(values, ~np.isnan(values), self.n_codes)
            ]
        )
        return CategoricalParameters(np.repeat(self._smoothed(counts)[None], n_components, axis=0))

    def prior(self, parts: Parts, prior_weight: float) -> Array:
        """Return pseudo-counts (C,): `prior_weight` events of the pooled distribution."""
        return prior_weight * self._smoothed(np.add.reduce(_counts(parts), axis=0))

    def maximize(self, parts: Parts, prior: Array) -> CategoricalParameters:  # noqa: D102
        return CategoricalParameters(self._normalized(_counts(parts) + prior))

    def log_prior(self, parameters: CategoricalParameters, prior: Array) -> float:  # noqa: D102
        return float((np.log(parameters.probability) @ prior).sum())

    def moments(self, parameters: CategoricalParameters) -> tuple[Array, Array]:
        """Return mean and variance (K, D) of the codes; they order nothing and serve only to tell fields apart."""
        means, variances = [], []
        for probability in self._by_field(parameters.probability):
            code = np.arange(probability.shape[1])
            mean = probability @ code
            means.append(mean)
            variances.append(probability @ code**2 - mean**2)
        return np.stack(means, axis=1), np.maximum(np.stack(variances, axis=1), 0.0)

    def probabilities(self, parameters: CategoricalParameters, position: int) -> Array:  # noqa: D102
        return self._by_field(parameters.probability)[position]

    def sample(  # noqa: D102
        self, parameters: CategoricalParameters, components: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> Array:
        rows = []
        for probability in self._by_field(parameters.probability):
            steps = np.cumsum(probability, axis=1)
            steps /= steps[:, -1:]
            drawn = generator.random(len(components))
            rows.append((steps[components] < drawn[:, None]).sum(axis=1).astype(np.float64))
        return np.stack(rows)

    def n_parameters(self, n_fields: int, n_components: int) -> int:  # noqa: D102
        return n_components * sum(size - 1 for size in self.n_codes)

    def marginal(  # noqa: D102
        self, parameters: CategoricalParameters, keep: npt.NDArray[np.intp]
    ) -> CategoricalParameters:
        by_field = self._by_field(parameters.probability)
        return CategoricalParameters(np.concatenate([by_field[position] for position in keep], axis=1))

    def grow(  # noqa: D102
        self, parts: Parts, old: tuple[Field, ...], new: tuple[Field, ...], pooled: CategoricalParameters
    ) -> Parts:
        counts = np.split(_counts(parts), np.cumsum([one.n_codes for one in old])[:-1], axis=1)
        grown = []
        for position, one in enumerate(new):
            known = counts[position] if position < len(old) else np.zeros((len(counts[0]), 0))
            grown.append(np.pad(known, ((0, 0), (0, one.n_codes - known.shape[1]))))
        return {"counts": Sums(np.concatenate(grown, axis=1))}

    def arrays(self, parameters: CategoricalParameters) -> dict[str, Array]:  # noqa: D102
        return {"probability": parameters.probability}

    def from_arrays(self, arrays: Mapping[str, Array]) -> CategoricalParameters:  # noqa: D102
        if "probability" not in arrays:
            raise ValueError("Categorical parameters lack the array 'probability'")
        probability = arrays["probability"]
        if probability.ndim != 2 or probability.shape[1] != sum(self.n_codes):
            raise ValueError(f"probabilities must be (components, {sum(self.n_codes)}), got shape {probability.shape}")
        if not ((probability > 0.0) & (probability <= 1.0)).all():
            raise ValueError("probabilities must lie in (0, 1]")
        return CategoricalParameters(probability)


def _counts(parts: Parts) -> Array:
    counts = parts["counts"]
    assert isinstance(counts, Sums)
    return counts.values
