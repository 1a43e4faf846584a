"""Expected sufficient statistics: values that can be merged, scaled and discounted to an event time.

Moments are stored centred (weight, mean, scatter about the mean), never as raw squared sums, which lose
everything at large offsets. Merging is the pairwise update of Chan, Golub & LeVeque (1983).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_em.arrays import from_rows, to_rows
from stream_em.numerics import Array, safe_divide

HEADER_KEY = b"stream_em_statistics"


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

    def select(self, order: npt.NDArray[np.intp]) -> Sums:
        """Return the statistics of the components at these positions."""
        return Sums(self.values[order])

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
            if self.is_tied:
                weighted = np.sqrt(reduced)[:, None] * delta
                between = weighted.T @ weighted
            else:
                between = delta[:, :, None] * delta[:, None, :]
                between *= reduced[:, None, None]
        scatter = self.scatter + other.scatter
        scatter += between
        return Moments(weight, mean, scatter)

    def scale(self, factor: float) -> Moments:
        """Return the statistics with each event's weight multiplied by `factor`; means do not move."""
        return Moments(self.weight * factor, self.mean, self.scatter * factor)

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
