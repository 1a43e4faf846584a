"""Expected sufficient statistics: values that can be merged, scaled and discounted to an event time.

Moments are stored centred (weight, mean, scatter about the mean), never as raw squared sums, which lose
everything at large offsets. Merging is the pairwise update of Chan, Golub & LeVeque (1983).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_em.arrays import from_rows, to_rows
from stream_em.numerics import EPSILON, Array, safe_divide

HEADER_KEY = b"stream_em_statistics"

# A difference is rounding when it is less than this share of what it is the difference of.
ROUNDING_OF_DIFFERENCES = 64.0 * EPSILON

# Eigenvalues of a scatter, in units of what it is the difference of, down to minus this are rounding too.
ROUNDING_OF_EIGENVALUES = 1e-12


class MergeError(ValueError):
    """Raised when two values do not describe the same model and so cannot be merged."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Weighted sums that merge by addition.

    Parameters
    ----------
    values
        (K, ...) float64.

    >>> Sums(np.ones(2)).merge(Sums(np.array([1.0, 4.0]))).scale(0.5).values
    array([1. , 2.5])

    """

    values: Array

    def zero(self) -> Sums:
        """Return the identity of `merge`, of the same shape."""
        return Sums(np.zeros_like(self.values))

    def merge(self, other: Sums) -> Sums:
        """Return the statistics of both sets of events."""
        return Sums(self.values + other.values)

    def scale(self, factor: float) -> Sums:
        """Return the statistics with each event's weight multiplied by `factor`."""
        return Sums(self.values * factor)

    @classmethod
    def combine(cls, coefficients: Array, parts: Sequence[Sums]) -> Sums | None:
        """Return the linear combination, or None where a sum would be negative, see `linear_combination`."""
        terms = np.stack([part.values for part in parts]) * _along(coefficients, parts[0].values)
        values = _without_rounding(np.add.reduce(terms), np.add.reduce(np.abs(terms)))
        return cls(values) if (values >= 0.0).all() else None

    def select(self, order: npt.NDArray[np.intp]) -> Sums:
        """Return the statistics of the components at these positions."""
        return Sums(self.values[order])

    def place(self, positions: npt.NDArray[np.intp], n_components: int) -> Sums:
        """Return the statistics of so many components, with these at the positions (K,) and no events in the others."""
        return Sums(_placed(self.values, positions, n_components))

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by name, for snapshots and coders."""
        return {"values": self.values}


@dataclass(frozen=True, eq=False)
class Moments:
    """Weight, mean and scatter about the mean.

    Parameters
    ----------
    weight
        (K,), or (K, D) when each field has its own weight because values may be missing.
    mean
        (K, D).
    scatter
        Weighted sum of squared deviations from the mean: (K, D) each field for itself, (K, D, D) full,
        or (D, D) full and summed over components (tied).

    >>> a = Moments(np.array([1.0]), np.array([[0.0]]), np.array([[[0.0]]]))
    >>> b = Moments(np.array([1.0]), np.array([[2.0]]), np.array([[[0.0]]]))
    >>> merged = a.merge(b)
    >>> merged.mean, merged.scatter, merged.squared_sums
    (array([[1.]]), array([[[2.]]]), array([[[4.]]]))

    """

    weight: Array
    mean: Array
    scatter: Array

    def zero(self) -> Moments:
        """Return the identity of `merge`, of the same shape."""
        return Moments(np.zeros_like(self.weight), np.zeros_like(self.mean), np.zeros_like(self.scatter))

    def merge(self, other: Moments) -> Moments:
        """Return the statistics of both sets of events."""
        weight = self.weight + other.weight
        share = safe_divide(other.weight, weight)
        reduced = self.weight * share
        delta = other.mean - self.mean
        if self.is_separate:
            mean = self.mean + share * delta
            between = reduced * delta * delta
        else:
            mean = self.mean + share[:, None] * delta
            # Written so that the products are the same for (i, j) and (j, i) to the last digit.
            weighted = np.sqrt(reduced)[:, None] * delta
            between = weighted.T @ weighted if self.is_tied else weighted[:, :, None] * weighted[:, None, :]
        between += self.scatter
        between += other.scatter
        return Moments(weight, mean, between)

    def scale(self, factor: float) -> Moments:
        """Return the statistics with each event's weight multiplied by `factor`; means do not move."""
        return Moments(self.weight * factor, self.mean, self.scatter * factor)

    @classmethod
    def combine(cls, coefficients: Array, parts: Sequence[Moments]) -> Moments | None:
        """Return the linear combination of the raw moments, or None where it is that of no events.

        All is taken about the mean of the first part, so nothing is lost at large offsets.
        """
        first = parts[0]
        weights = np.stack([part.weight for part in parts]) * _along(coefficients, first.weight)
        weight = _without_rounding(np.add.reduce(weights), np.add.reduce(np.abs(weights)))
        if not (weight >= 0.0).all():
            return None
        of_fields = weights if first.is_separate else weights[..., None]
        means = np.stack([part.mean for part in parts])
        shift = np.add.reduce(of_fields * (means - first.mean))
        mean = first.mean + safe_divide(shift, weight if first.is_separate else weight[:, None])
        deviations = means - mean
        scatters = np.stack([part.scatter for part in parts]) * _along(coefficients, first.scatter)
        size = np.abs(of_fields) * deviations * deviations
        if first.is_separate:
            scatter = np.add.reduce(scatters) + np.add.reduce(of_fields * deviations * deviations)
            scatter = _without_rounding(scatter, np.add.reduce(np.abs(scatters) + size))
            possible = (scatter >= 0.0).all() and not scatter[weight == 0.0].any()
            return cls(weight, mean, scatter) if possible else None
        products = "tk,tki,tkj->ij" if first.is_tied else "tk,tki,tkj->kij"
        scatter = np.add.reduce(scatters) + np.einsum(products, weights, deviations, deviations)
        scatter = 0.5 * (scatter + scatter.swapaxes(-1, -2))
        extent = np.add.reduce(np.abs(np.diagonal(scatters, axis1=-2, axis2=-1)))
        extent = extent + np.add.reduce(size, axis=(0, 1) if first.is_tied else 0)
        possible = _is_positive(scatter, extent) and (first.is_tied or not scatter[weight == 0.0].any())
        return cls(weight, mean, scatter) if possible else None

    @property
    def is_separate(self) -> bool:
        """Whether each field has its own weight and scatter."""
        return self.weight.ndim == 2

    @property
    def is_tied(self) -> bool:
        """Whether the scatter is summed over the components."""
        return self.weight.ndim == 1 and self.scatter.ndim == 2

    def select(self, order: npt.NDArray[np.intp]) -> Moments:
        """Return the statistics of the components at these positions; a tied scatter stays that of all."""
        return Moments(self.weight[order], self.mean[order], self.scatter if self.is_tied else self.scatter[order])

    def place(self, positions: npt.NDArray[np.intp], n_components: int) -> Moments:
        """Return the statistics of so many components, with these at the positions (K,) and no events in the others."""
        weight, mean = (_placed(one, positions, n_components) for one in (self.weight, self.mean))
        scatter = self.scatter if self.is_tied else _placed(self.scatter, positions, n_components)
        return Moments(weight, mean, scatter)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by name, for snapshots and coders."""
        return {"weight": self.weight, "mean": self.mean, "scatter": self.scatter}

    @property
    def counts(self) -> Array:
        """Weighted counts, the shape of `weight`."""
        return self.weight

    @property
    def sums(self) -> Array:
        """Weighted sums (K, D)."""
        return self.mean * (self.weight if self.is_separate else self.weight[:, None])

    @property
    def squared_sums(self) -> Array:
        """Raw weighted sums of squares or products, the shape of `scatter`; inexact at large offsets."""
        if self.is_separate:
            return self.scatter + self.weight * self.mean**2
        if self.is_tied:
            return self.scatter + (self.weight[:, None] * self.mean).T @ self.mean
        return self.scatter + self.weight[:, None, None] * self.mean[:, :, None] * self.mean[:, None, :]


def _placed(rows: Array, positions: npt.NDArray[np.intp], n_rows: int) -> Array:
    placed = np.zeros((n_rows, *rows.shape[1:]))
    placed[positions] = rows
    return placed


def _along(coefficients: Array, array: Array) -> Array:
    """Return the coefficients (T,) so that they multiply a stack (T, ...) of such arrays."""
    return coefficients.reshape(-1, *[1] * array.ndim)


def _without_rounding(values: Array, extent: Array) -> Array:
    """Return differences of numbers of this extent, those that are nothing but rounding as 0."""
    return np.where(np.abs(values) <= ROUNDING_OF_DIFFERENCES * extent, 0.0, values)


def _is_positive(scatter: Array, extent: Array) -> bool:
    """Whether matrices (..., D, D), differences of ones with diagonals `extent`, are positive semidefinite."""
    unit = np.sqrt(np.where(extent > 0.0, extent, 1.0))
    relative = scatter / unit[..., :, None] / unit[..., None, :]
    try:
        np.linalg.cholesky(relative + ROUNDING_OF_EIGENVALUES * np.eye(scatter.shape[-1]))
    except np.linalg.LinAlgError:
        return False
    return True


Part = Sums | Moments
_KINDS: dict[str, type[Part]] = {"sums": Sums, "moments": Moments}


@dataclass(frozen=True, eq=False)
class Statistics:
    """All the expected sufficient statistics of one model over a set of events.

    Parameters
    ----------
    parts
        Named statistics, all with the components on the first axis (but for tied scatters).
    log_likelihood
        Weighted sum of log p(event) under the parameters of the E-step.
    component_ids
        (K,) stable ids; statistics merge only with those of the same ids, in any order.
    half_life
        Event-time half-life, or None when events are not forgotten with time.
    time
        Reference time at which the weights are expressed, or None when there is no half-life or no event yet.

    >>> one = Statistics({"components": Sums(np.ones(1))}, -2.0, np.array([0]), half_life=1.0, time=0.0)
    >>> two = Statistics({"components": Sums(np.ones(1))}, -2.0, np.array([0]), half_life=1.0, time=3.0)
    >>> one.merge(two).parts["components"].values, two.merge(one).time
    (array([1.125]), 3.0)

    """

    parts: Mapping[str, Part]
    log_likelihood: float
    component_ids: npt.NDArray[np.int64]
    half_life: float | None = None
    time: float | None = None

    def zero(self) -> Statistics:
        """Return the identity of `merge` for this model."""
        parts = {name: part.zero() for name, part in self.parts.items()}
        return replace(self, parts=parts, log_likelihood=0.0, time=None)

    def scale(self, factor: float) -> Statistics:
        """Return the statistics with every event's weight multiplied by `factor` >= 0."""
        parts: dict[str, Part] = {name: part.scale(factor) for name, part in self.parts.items()}
        return Statistics(parts, self.log_likelihood * factor, self.component_ids, self.half_life, self.time)

    def discount_to(self, time: float) -> Statistics:
        """Return the statistics as seen from `time`, at or after the reference time.

        Raises
        ------
        ValueError
            When there is no half-life, or `time` lies before the reference time.

        """
        if self.half_life is None:
            raise ValueError("statistics without a half-life cannot be discounted to a time")
        if self.time is None or time == self.time:
            return replace(self, time=time)
        if time < self.time:
            raise ValueError(f"cannot discount backwards, from time {self.time} to {time}")
        return replace(self.scale(2.0 ** ((self.time - time) / self.half_life)), time=time)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of events, at the newer of the two reference times.

        Raises
        ------
        MergeError
            When the component ids, the half-lives or the shapes differ.

        """
        first, second = self, other._aligned_to(self)
        if first.half_life is not None and first.time != second.time:
            if second.time is None or (first.time is not None and first.time > second.time):
                assert first.time is not None
                second = second.discount_to(first.time)
            else:
                first = first.discount_to(second.time)
        parts: dict[str, Part] = {
            name: part.merge(second.parts[name])  # type: ignore[arg-type]  # _aligned_to checked the kinds
            for name, part in first.parts.items()
        }
        return Statistics(
            parts, first.log_likelihood + second.log_likelihood, first.component_ids, first.half_life, first.time
        )

    def _aligned_to(self, target: Statistics) -> Statistics:
        if self.component_ids is target.component_ids and self.half_life == target.half_life:
            # Both come from the same parameters, and so have the same parts.
            return self
        if self.half_life != target.half_life:
            raise MergeError(f"half-lives differ: {target.half_life} and {self.half_life}")
        if self.parts.keys() != target.parts.keys():
            raise MergeError(f"statistics of different models: {sorted(target.parts)} and {sorted(self.parts)}")
        for name, part in self.parts.items():
            mine, theirs = part.arrays(), target.parts[name].arrays()
            if type(part) is not type(target.parts[name]) or any(mine[key].shape != theirs[key].shape for key in mine):
                raise MergeError(f"the statistics {name!r} have different shapes or kinds and cannot be merged")
        if np.array_equal(self.component_ids, target.component_ids):
            return self
        if not np.array_equal(np.sort(self.component_ids), np.sort(target.component_ids)):
            raise MergeError(
                f"component ids differ: {target.component_ids.tolist()} and {self.component_ids.tolist()}; "
                "only states that descend from the same start can be merged"
            )
        position = {component: index for index, component in enumerate(self.component_ids.tolist())}
        return self.select(np.array([position[component] for component in target.component_ids.tolist()]))

    def select(self, order: npt.NDArray[np.intp]) -> Statistics:
        """Return the statistics with the components at the positions `order`."""
        parts = {name: part.select(order) for name, part in self.parts.items()}
        return replace(self, parts=parts, component_ids=self.component_ids[order])

    def merge_by_id(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of events, of every component that either has.

        A component that one of them lacks has no events there. Where the components differ, they come in the order of
        their ids.

        Raises
        ------
        MergeError
            When the half-lives or the shapes differ.

        >>> one = Statistics({"components": Sums(np.array([1.0, 2.0]))}, 0.0, np.array([0, 1]))
        >>> two = Statistics({"components": Sums(np.array([4.0, 8.0]))}, 0.0, np.array([7, 0]))
        >>> both = one.merge_by_id(two)
        >>> both.component_ids, both.weights
        (array([0, 1, 7]), array([9., 2., 4.]))

        """
        component_ids = np.union1d(self.component_ids, other.component_ids)
        if len(component_ids) == len(self.component_ids) == len(other.component_ids):
            return self.merge(other)
        return self._placed_at(component_ids).merge(other._placed_at(component_ids.copy()))

    def _placed_at(self, component_ids: npt.NDArray[np.int64]) -> Statistics:
        positions = np.searchsorted(component_ids, self.component_ids)
        parts = {name: part.place(positions, len(component_ids)) for name, part in self.parts.items()}
        return replace(self, parts=parts, component_ids=component_ids)

    @property
    def weights(self) -> Array:
        """Weighted counts of events in each component (K,)."""
        part = self.parts["components"]
        assert isinstance(part, Sums)
        return part.values

    @property
    def total_weight(self) -> float:
        """Weight of all the events."""
        return float(np.add.reduce(self.weights))

    @property
    def n_bytes(self) -> int:
        """Bytes of all the arrays."""
        arrays = (array for part in self.parts.values() for array in part.arrays().values())
        return self.component_ids.nbytes + sum(array.nbytes for array in arrays)

    def to_arrow(self) -> pa.RecordBatch:
        """Return the statistics as a record batch with a row for each array.

        Equal statistics give equal record batches, to the last byte.

        >>> one = Statistics({"components": Sums(np.ones(2))}, -2.0, np.array([0, 1]))
        >>> one.to_arrow().column("name").to_pylist()
        ['component_ids', 'components:values']

        """
        kinds = {name: type(part).__name__.lower() for name, part in sorted(self.parts.items())}
        header = {
            "parts": kinds,
            "log_likelihood": float(self.log_likelihood),
            "half_life": self.half_life,
            "time": self.time,
        }
        arrays: dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int64]] = {"component_ids": self.component_ids}
        for name in kinds:
            arrays.update({f"{name}:{key}": array for key, array in self.parts[name].arrays().items()})
        return to_rows(arrays, {HEADER_KEY: json.dumps(header).encode()})

    @classmethod
    def from_arrow(cls, rows: pa.RecordBatch) -> Statistics:
        """Return the statistics that `to_arrow` wrote.

        Raises
        ------
        ValueError
            When the record batch holds something else, or is damaged.

        """
        content = (rows.schema.metadata or {}).get(HEADER_KEY)
        if content is None:
            raise ValueError("the record batch holds no statistics: its header is missing")
        header, arrays = json.loads(content), from_rows(rows)
        of_parts: dict[str, dict[str, Array]] = {name: {} for name in header["parts"]}
        for key, array in arrays.items():
            name, _, of_array = key.rpartition(":")
            if name:
                of_parts[name][of_array] = array
        parts = {name: _KINDS[kind](**of_parts[name]) for name, kind in header["parts"].items()}
        return cls(parts, header["log_likelihood"], arrays["component_ids"], header["half_life"], header["time"])


def linear_combination(terms: Sequence[tuple[float, Statistics]]) -> Statistics | None:
    """Return the sum of coefficients times statistics, or None where no events have such statistics.

    Coefficients may be negative, and then a weight, a sum or a scatter can come out negative: the combination lies
    outside the cone of what events can have. Differences within rounding of 0 are 0.

    Parameters
    ----------
    terms
        Coefficients with the statistics they multiply; one at least.

    Raises
    ------
    MergeError
        When the component ids or the shapes differ, or statistics fade with event time.

    >>> one = Statistics({"components": Sums(np.array([1.0]))}, -2.0, np.array([0]))
    >>> linear_combination([(3.0, one), (-1.0, one)]).weights, linear_combination([(-1.0, one)])
    (array([2.]), None)

    """
    first = terms[0][1]
    if any(statistics.half_life is not None for _, statistics in terms):
        raise MergeError("statistics that fade with event time have no linear combination other than their merge")
    coefficients = np.array([coefficient for coefficient, _ in terms])
    aligned = [statistics._aligned_to(first) for _, statistics in terms]
    parts: dict[str, Part] = {}
    for name, part in first.parts.items():
        alike: list[Any] = [statistics.parts[name] for statistics in aligned]
        combined = part.combine(coefficients, alike)
        if combined is None:
            return None
        parts[name] = combined
    log_likelihood = sum(coefficient * statistics.log_likelihood for coefficient, statistics in terms)
    return Statistics(parts, log_likelihood, first.component_ids)


@dataclass(frozen=True, eq=False)
class Window:
    """The statistics of the newest blocks of a stream, merged without ever taking any back.

    A queue of two stacks: the older blocks are held as what each and those after it come to, so leaving the oldest
    out is leaving out the first; the newer ones are merged as they come. Each block is merged three times in all.

    Parameters
    ----------
    older
        Statistics of each of the older blocks and the older ones after it, oldest first.
    newer
        Statistics of each of the newer blocks, oldest first.
    of_newer
        Their merge, None when there is none.
    counts
        Events in each block of both, oldest first.

    >>> window = Window()
    >>> for weight in (1.0, 2.0, 4.0):
    ...     one = Statistics({"components": Sums(np.array([weight]))}, 0.0, np.array([0]))
    ...     window = window.append(one, n_events=10, block=10).expire(most=20)
    >>> window.total.weights, window.n_events
    (array([6.]), 20)

    """

    older: tuple[Statistics, ...] = ()
    newer: tuple[Statistics, ...] = ()
    of_newer: Statistics | None = None
    counts: tuple[int, ...] = ()

    @property
    def n_events(self) -> int:
        """Events in the window."""
        return sum(self.counts)

    @property
    def total(self) -> Statistics:
        """The statistics of all the blocks; there must be one."""
        if self.of_newer is None:
            return self.older[0]
        return self.older[0].merge(self.of_newer) if self.older else self.of_newer

    def append(self, statistics: Statistics, n_events: int, block: int) -> Window:
        """Return the window with statistics of more events; they fill up the newest block as long as all fit in it.

        Parameters
        ----------
        statistics
            Their statistics.
        n_events
            How many they are.
        block
            Most events in a block, unless they come together.

        """
        of_newer = statistics if self.of_newer is None else self.of_newer.merge(statistics)
        if self.newer and self.counts[-1] + n_events <= block:
            filled = *self.newer[:-1], self.newer[-1].merge(statistics)
            return Window(self.older, filled, of_newer, (*self.counts[:-1], self.counts[-1] + n_events))
        return Window(self.older, (*self.newer, statistics), of_newer, (*self.counts, n_events))

    def expire(self, most: int) -> Window:
        """Return the window without the oldest blocks, so that it holds no more events than this; the newest stays."""
        window, n_events = self, self.n_events
        while n_events > most and len(window.counts) > 1:
            n_events -= window.counts[0]
            older = window.older or tuple(accumulate(reversed(window.newer), lambda later, one: one.merge(later)))[::-1]
            newer, of_newer = (window.newer, window.of_newer) if window.older else ((), None)
            window = Window(older[1:], newer, of_newer, window.counts[1:])
        return window

    def apply(self, change: Callable[[Statistics], Statistics]) -> Window:
        """Return the window with a change made to all its statistics, one that commutes with merging."""
        of_newer = None if self.of_newer is None else change(self.of_newer)
        return Window(tuple(map(change, self.older)), tuple(map(change, self.newer)), of_newer, self.counts)
