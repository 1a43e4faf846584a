"""What a component family must offer. A new family is one new file with a `Family` and a `Block`.

All the families here are linear in their sufficient statistics: with T (Q, B) the features of a block of
events, the log-densities are `theta (K, Q) @ T + constant`, and the expected statistics are sums
`responsibilities (K, B) @ T.T`. Features are shifted by a point near the data first, which is what keeps
squares from cancelling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from stream_em.numerics import Array
from stream_em.schema import Field
from stream_em.statistics import Part

Mask = npt.NDArray[np.bool_]
Parts = Mapping[str, Part]


class FamilyError(ValueError):
    """Raised when a family does not suit the fields it is given."""


class Block(ABC):
    """A family at fixed parameters, ready to be applied to blocks of events.

    Attributes
    ----------
    n_features
        Q, number of feature rows.
    has_base_measure
        Whether part of the log-density depends on the event alone.

    """

    n_features: int
    has_base_measure: bool = False

    @abstractmethod
    def natural(self, center: Array) -> tuple[Array, Array]:
        """Return coefficients (K, Q) and constants (K,) of the log-density for features about `center` (D,)."""

    def unstable(self, center: Array) -> npt.NDArray[np.intp] | None:
        """Return the components for which features about `center` (D,) lose precision, None when there is none."""
        return None

    def quadratic_factors(self) -> list[tuple[npt.NDArray[np.intp], bool]] | None:
        """Return positions of the fields of each factor, and whether its features are all products or only squares.

        None when the features are others, as with missing values.
        """
        return None

    def log_density(self, values: Array, observed: Mask | None, component: int) -> Array:
        """Return the log-density (B,) under one component, at full precision; for the unstable ones."""
        features = np.empty((self.n_features, values.shape[1]))
        center = np.zeros(len(values))
        self.write_features(values, center, observed, features)
        theta, constant = self.natural(center)
        density: Array = theta[component] @ features + constant[component]
        return density

    @abstractmethod
    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        """Write the features (Q, B) of a block of values (D, B) about `center` (D,), 0 where a value is missing."""

    def base_measure(self, values: Array, observed: Mask | None) -> Array:
        """Return the part of the log-density (B,) that no parameter changes."""
        return np.zeros(values.shape[1])

    @abstractmethod
    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, Array | None]:
        """Turn sums of features (K, Q) about `centers` (K or 1, D), and weights (K,), into statistics.

        Where squares lost precision to cancellation, better centers (K, D) are returned as well, the rows
        of the other components unchanged; None when nothing was lost.
        """


def feature_table(
    factors: Iterable[tuple[npt.NDArray[np.intp], bool]],
) -> npt.NDArray[np.int64]:
    """Return what each feature is, as `compiled_blocks.sum_features` wants to know it.

    Parameters
    ----------
    factors
        Positions of the fields of each Gaussian factor, and whether its covariance is full.

    Returns
    -------
    table
        (2, Q) left and right; shared between calls, not to be written to.

    >>> feature_table([(np.array([0, 1]), True)])  # the products 00, 01 and 11 of rows 3 and 4, then the fields
    array([[ 3,  3,  4,  0,  1],
           [ 3,  4,  4, -1, -1]])

    """
    return _feature_table(tuple((tuple(positions.tolist()), full) for positions, full in factors))


@lru_cache(maxsize=256)
def _feature_table(factors: tuple[tuple[tuple[int, ...], bool], ...]) -> npt.NDArray[np.int64]:
    left: list[int] = []
    right: list[int] = []
    for positions, full in factors:
        size = len(positions)
        pairs = np.array(np.triu_indices(size) if full else 2 * [range(size)]) + len(left)
        pairs += pairs.shape[1]
        left += [*pairs[0].tolist(), *positions]
        right += [*pairs[1].tolist(), *size * [-1]]
    return np.array([left, right], dtype=np.int64)


class Family(ABC):
    """A parametric family of component densities over one or more fields."""

    kinds: ClassVar[frozenset[str]]

    def bind(self, fields: tuple[Field, ...]) -> Self:
        """Return the family for these fields.

        Raises
        ------
        FamilyError
            When a field's kind does not suit the family.

        """
        for one in fields:
            if one.kind not in self.kinds:
                raise FamilyError(
                    f"{type(self).__name__} takes fields of kind {' or '.join(sorted(self.kinds))}, "
                    f"but {one.name!r} is of kind {one.kind!r}; use Product to give it a family of its own"
                )
        return self

    def joint_fields(self, n_fields: int) -> Mask:
        """Return which of the fields (D,) depend on each other, so that events are grouped by which are missing."""
        return np.zeros(n_fields, dtype=bool)

    def lacking(self, observed: Mask) -> Mask | None:
        """Return which missing values (D, B) leave their event without a density; None when none ever does."""
        return None

    @abstractmethod
    def block(self, parameters: Any, observed: Mask | None) -> Block:
        """Return the family at these parameters.

        Parameters
        ----------
        parameters
            As `maximize` returns them.
        observed
            None when nothing is missing. Otherwise (D,): for joint fields which are observed, in the whole
            block alike; the other fields are then masked event by event.

        """

    @abstractmethod
    def pooled(self, values: Array, weight: Array, n_components: int) -> Any:
        """Return parameters of identical components fitted to all the events (D, B), NaN where missing."""

    @abstractmethod
    def prior(self, parts: Parts, prior_weight: float) -> Any:
        """Return the pooled distribution of the events, of which each component gets `prior_weight` pseudo-events."""

    @abstractmethod
    def maximize(self, parts: Parts, prior: Any) -> Any:
        """Return the parameters that maximise the expected log-likelihood of the events and pseudo-events."""

    def keep(self, new: Any, old: Any, kept: Mask) -> Any:
        """Return the `new` parameters, but the `old` ones of the components that `kept` (K,) marks."""
        of_old = self.arrays(old)
        return replace(
            new,
            **{
                name: np.where(kept.reshape(-1, *[1] * (array.ndim - 1)), of_old[name], array)
                for name, array in self.arrays(new).items()
            },
        )

    @abstractmethod
    def log_prior(self, parameters: Any, prior: Any) -> float:
        """Return the expected log-density of the pseudo-events, up to a constant."""

    def start(self, values: Array, weight: Array, n_components: int, generator: np.random.Generator) -> Array | None:
        """Return responsibilities (K, B) to start EM from, for events (D, B) with NaN where a value is missing.

        None where components are clusters of events, which k-means finds.
        """
        return None

    @abstractmethod
    def moments(self, parameters: Any) -> tuple[Array, Array]:
        """Return mean and variance (K, D) of each field in each component, in the fields' coding."""

    @abstractmethod
    def sample(self, parameters: Any, components: npt.NDArray[np.intp], generator: np.random.Generator) -> Array:
        """Draw one event (D,) from each of the `components` (n,); return (D, n)."""

    @abstractmethod
    def n_parameters(self, n_fields: int, n_components: int) -> int:
        """Return the number of free parameters of all components."""

    @abstractmethod
    def grow(self, parts: Parts, old: tuple[Field, ...], new: tuple[Field, ...], pooled: Any) -> Parts:
        """Return statistics for fields that gained categories, or for more fields appended at the end.

        `pooled` are parameters of identical components over the new fields; they say what the events seen
        so far are taken to have held where a joint family needs a value.
        """

    def settle(self, parts: Parts, positions: npt.NDArray[np.intp], pooled: Any) -> Parts:
        """Return statistics in which fields that had no value so far are taken to have held the pooled one.

        Fields that depend on no other have no weight yet, so for them nothing changes.
        """
        return parts

    def restrict(self, keep: npt.NDArray[np.intp]) -> Family:
        """Return the family of the fields at the positions `keep`, to be bound to them."""
        return self

    @abstractmethod
    def marginal(self, parameters: Any, keep: npt.NDArray[np.intp]) -> Any:
        """Return the parameters over the fields at the positions `keep`."""

    def conditional(self, parameters: Any, given: npt.NDArray[np.intp], values: Array) -> Any:
        """Return the parameters over the other fields, given `values` (G,) of the fields at the positions `given`."""
        n_fields = self.moments(parameters)[0].shape[1]
        return self.marginal(parameters, np.setdiff1d(np.arange(n_fields), given))

    def covariance(self, parameters: Any, first: int, second: int) -> Array:
        """Return the covariance (K,) of two different fields in each component."""
        return np.zeros(len(self.moments(parameters)[0]))

    def probabilities(self, parameters: Any, position: int) -> Array:
        """Return the probabilities (K, C) of the codes of the category field at this position.

        Raises
        ------
        FamilyError
            When the field is no category.

        """
        raise FamilyError(f"{type(self).__name__} has no categories")

    @abstractmethod
    def arrays(self, parameters: Any) -> dict[str, Array]:
        """Return the parameters as named arrays, for snapshots."""

    @abstractmethod
    def from_arrays(self, arrays: Mapping[str, Array]) -> Any:
        """Return the parameters of `arrays`.

        Raises
        ------
        ValueError
            When an array is missing, ill-shaped or out of range.

        """
