"""Where EM starts: a reservoir of events, k-means++, a few batch iterations, the best of several."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from stream_em.models.mixture import Mixture, MixtureParameters
from stream_em.numerics import Array, safe_divide
from stream_em.schema import Batch, Schema

# Directions whose share of the total variance is smaller are rounding, not structure; whitening would
# blow them up to the size of the others.
SMALLEST_EIGENVALUE_SHARE = 1e-9


class Reservoir:
    """A uniform sample, by weight, of a stream of unknown length (Efraimidis & Spirakis 2006, A-Res).

    Parameters
    ----------
    capacity
        Number of events kept.
    generator
        Source of randomness, by default one of its own.

    >>> from stream_em import Schema
    >>> reservoir = Reservoir(2, np.random.default_rng(0))
    >>> schema = Schema({"x": "numeric"})
    >>> for start in (0.0, 3.0):
    ...     reservoir.add(schema.encode(np.arange(start, start + 3.0)[:, None]))
    >>> reservoir.sample().n_events
    2

    """

    def __init__(self, capacity: int, generator: np.random.Generator | None = None) -> None:
        self.capacity = capacity
        self._generator = np.random.default_rng() if generator is None else generator
        self._batches: list[Batch] = []
        self._keys = np.empty(0)
        self._complete = True

    def add(self, batch: Batch) -> None:
        """Offer a batch to the sample; events without weight are left out."""
        if batch.weight is not None:
            batch = batch.select(np.flatnonzero(batch.weight))
        drawn = np.log(self._generator.random(batch.n_events))
        if batch.weight is not None:
            with np.errstate(divide="ignore", over="ignore"):
                drawn = drawn / batch.weight
        self._offer(drawn, batch)

    def merge(self, other: Reservoir) -> Reservoir:
        """Return the sample of the events of both, whose generators are not the same; neither is changed.

        Whatever the order in which samples are merged, the same events stay.

        >>> from stream_em import Schema
        >>> batch = Schema({"x": "numeric"}).encode(np.arange(4.0)[:, None])
        >>> halves = [Reservoir(2, np.random.default_rng(half)) for half in range(2)]
        >>> for half in halves:
        ...     half.add(batch)
        >>> halves[0].merge(halves[1]).sample().n_events
        2

        """
        merged = Reservoir(self.capacity, self._generator)
        merged._batches, merged._keys = self._batches, self._keys
        merged._complete = self._complete and other._complete
        if other._batches:
            merged._offer(other._keys, concatenate(other._batches))
        return merged

    def arrays(self) -> dict[str, Array]:
        """Return the events of the sample and the keys by which they stay, for coders."""
        if not self._batches:
            return {}
        batch = concatenate(self._batches)
        weight = {} if batch.weight is None else {"weight": batch.weight}
        return {"values": batch.values, "keys": self._keys, "complete": np.array([float(self._complete)]), **weight}

    @classmethod
    def from_arrays(cls, capacity: int, schema: Schema, arrays: Mapping[str, Array]) -> Reservoir:
        """Return the sample that `arrays` was called on."""
        reservoir = cls(capacity)
        if arrays:
            reservoir._batches = [Batch(arrays["values"], schema, arrays.get("weight"))]
            reservoir._keys, reservoir._complete = arrays["keys"], bool(arrays["complete"][0])
        return reservoir

    def _offer(self, drawn: Array, batch: Batch) -> None:
        if batch.n_events > self.capacity:
            # No more than that can stay; the others need not be copied.
            entering = np.sort(np.argpartition(-drawn, self.capacity - 1)[: self.capacity])
            self._complete = False
            drawn, batch = drawn[entering], batch.select(entering)
        if len(self._keys) == self.capacity:
            # Of a long stream few events still make it into the sample; the others need not be copied.
            entering = np.flatnonzero(drawn > self._keys.min())
            self._complete = False
            drawn, batch = drawn[entering], batch.select(entering)
        keys = np.concatenate([self._keys, drawn])
        kept = concatenate([*self._batches, batch])
        if len(keys) > self.capacity:
            chosen = np.sort(np.argpartition(-keys, self.capacity - 1)[: self.capacity])
            keys, kept = keys[chosen], kept.select(chosen)
            self._complete = False
        self._keys, self._batches = keys, [kept]

    def sample(self, *, shuffled: bool = False) -> Batch:
        """Return the events of the sample, in the order in which they came or, `shuffled`, in one of chance.

        Once events had to be left out those kept count alike, since heavy events were drawn more often.
        """
        batch = concatenate(self._batches)
        if shuffled:
            batch = batch.select(np.argsort(-self._keys, kind="stable"))
        return Batch(batch.values, batch.schema, batch.weight if self._complete else None)


def concatenate(batches: list[Batch]) -> Batch:
    """Return the events of all batches in one, under the schema of the last, copied from what they view.

    Schemas may only have grown from one batch to the next; fields that came later are missing before.
    """
    schema = batches[-1].schema
    total = sum(batch.n_events for batch in batches)
    values = np.full((len(schema), total), np.nan)
    stop = 0
    for batch in batches:
        start, stop = stop, stop + batch.n_events
        values[: len(batch.values), start:stop] = batch.values

    def joined(name: str, default: float) -> Array | None:
        columns = [getattr(batch, name) for batch in batches]
        if all(column is None for column in columns):
            return None
        return np.concatenate(
            [np.full(batch.n_events, default) if one is None else one for batch, one in zip(batches, columns)]
        )

    return Batch(values, schema, joined("weight", 1.0), joined("time", 0.0))


def seed(
    model: Mixture, batch: Batch, generator: np.random.Generator, *, n_starts: int = 8, n_iterations: int = 10
) -> MixtureParameters:
    """Return parameters from which EM can go on.

    Parameters
    ----------
    model
        The mixture.
    batch
        Events to start from, at least one.
    generator
        Source of randomness.
    n_starts
        Number of k-means++ starts, in turn on whitened and on standardised points, and for the last quarter
        along one direction; the one with the highest log-posterior after `n_iterations` is kept.
    n_iterations
        EM iterations for each start.

    >>> from stream_em import Gaussian, Schema
    >>> batch = Schema({"x": "numeric"}).encode(np.repeat([[0.0], [0.1], [9.0], [9.1]], 5, axis=0))
    >>> start = seed(Mixture(Gaussian(), n_components=2), batch, np.random.default_rng(0))
    >>> np.sort(start.components.mean.ravel()).round(2)
    array([0.05, 9.05])

    """
    bound = model.bind(batch.schema)
    standardized, whitened = points_for_k_means(batch)
    weight = np.ones(batch.n_events) if batch.weight is None else batch.weight
    best: tuple[float, MixtureParameters] | None = None
    for start in range(n_starts if model.n_components > 1 else 1):
        # Whitening finds clusters stretched along one axis, which k-means would otherwise cut across it; but it
        # shrinks the axis along which clusters lie far apart, so every other start goes without. Many clusters in
        # a row are found along that row alone: beside the other directions its spread counts too little.
        points = standardized if start % 2 else whitened
        if start >= n_starts - n_starts // 4:
            points = whitened @ separating_direction(whitened, weight, generator)
        # Components that are no clusters have starts of their own, every other time.
        first = None if start % 2 else bound.family.start(batch.values, weight, model.n_components, generator)
        if first is None:
            first = k_means_responsibilities(points, weight, model.n_components, generator)
        parameters = bound.initialize(batch, first)
        prior = None
        objective = -math.inf
        for _ in range(n_iterations):
            statistics = bound.e_step(parameters, batch)
            prior = bound.prior(statistics) if prior is None else prior
            objective = statistics.log_likelihood + bound.log_prior(parameters, prior)
            parameters = bound.m_step(statistics, prior)
        if best is None or objective > best[0]:
            best = objective, parameters
    assert best is not None
    return best[1]


def points_for_k_means(batch: Batch) -> tuple[Array, Array]:
    """Return points (B, F) for k-means, first standardised, then whitened.

    Categories enter by indicators, a missing value by the mean. Standardised, each coordinate has variance 1; whitened,
    the pooled covariance is the identity. Before they are whitened, counts enter by their square root and durations by
    their logarithm, which evens out their spread, but sets the zeros apart, of which low rates have many; standardised,
    they stay what they are.
    """
    weight = np.full(batch.n_events, 1.0 / batch.n_events)
    if batch.weight is not None and batch.total_weight > 0.0:
        weight = batch.weight / batch.total_weight
    standardized, evened = (_standardized(_coordinates(batch, even), weight) for even in (False, True))
    eigenvalues, directions = np.linalg.eigh((evened * weight) @ evened.T)
    kept = eigenvalues > SMALLEST_EIGENVALUE_SHARE * max(eigenvalues.sum(), 1e-300)
    if not kept.any():
        return np.ascontiguousarray(standardized.T), np.zeros((batch.n_events, 1))
    projected: Array = (directions[:, kept] / np.sqrt(eigenvalues[kept])).T @ evened
    return np.ascontiguousarray(standardized.T), np.ascontiguousarray(projected.T)


def _coordinates(batch: Batch, even: bool) -> Array:
    """Return what fields are to k-means (F, B), NaN where missing; `even` evens out the spread of amounts."""
    rows: list[Array] = []
    for values, field in zip(batch.values, batch.schema.fields):
        if field.kind == "category":
            rows.extend(np.where(np.isnan(values), np.nan, values == code) for code in range(field.n_codes))
        elif field.kind == "count" and even:
            rows.append(np.sqrt(values))
        elif field.kind == "duration" and even:
            rows.append(
                np.log1p(values / max(float(np.nanmean(values)) if not np.isnan(values).all() else 1.0, 1e-300))
            )
        else:
            rows.append(values)
    return np.stack(rows)


def _standardized(rows: Array, weight: Array) -> Array:
    """Return the rows that vary, with mean 0 and variance 1; one row of 0 where none does."""
    there = ~np.isnan(rows)
    weights = np.where(there, weight, 0.0)
    mean = safe_divide((weights * np.where(there, rows, 0.0)).sum(axis=1), weights.sum(axis=1))
    centred = np.where(there, rows - mean[:, None], 0.0)
    spread = np.sqrt(centred**2 @ weight)
    varies = spread > 16.0 * np.finfo(np.float64).eps * np.abs(mean)
    if not varies.any():
        return np.zeros((1, rows.shape[1]))
    standardized: Array = centred[varies] / spread[varies, None]
    return standardized


def separating_direction(
    points: Array, weight: Array, generator: np.random.Generator, *, n_starts: int = 8, n_iterations: int = 20
) -> Array:
    """Return a direction (F, 1), of length 1, along which whitened points (B, F) lie in clusters, if along any.

    The kurtosis is low where clusters lie in a row (Peña & Prieto 2001, "Cluster identification using
    projections"); its extrema are found by the fixed-point iteration of Hyvärinen & Oja (1997).
    """
    share = (weight / max(float(weight.sum()), 1e-300))[:, None]
    directions = _unit_columns(generator.normal(size=(points.shape[1], n_starts)))
    for _ in range(n_iterations):
        along = points @ directions
        # Powers are many times slower than products.
        directions = _unit_columns(points.T @ (share * along * along * along) - 3.0 * directions)
    kurtosis = (share * np.square(np.square(points @ directions))).sum(axis=0)
    return directions[:, [int(kurtosis.argmin())]]


def _unit_columns(vectors: Array) -> Array:
    length = np.sqrt((vectors**2).sum(axis=0))
    even = np.full(vectors.shape, len(vectors) ** -0.5)
    unit: Array = np.divide(vectors, length, out=even, where=length > 0.0)
    return unit


def k_means_responsibilities(
    points: Array, weight: Array, n_clusters: int, generator: np.random.Generator, *, n_iterations: int = 10
) -> Array:
    """Return hard responsibilities (K, B) of greedy k-means++ followed by a few Lloyd iterations.

    Source: Arthur & Vassilvitskii 2007; the greedy choice among 2 + log K candidates is theirs too.
    """
    n_points = len(points)
    total = float(weight.sum())
    if total <= 0.0:
        weight, total = np.ones(n_points), float(n_points)
    centers = np.empty((n_clusters, points.shape[1]))
    centers[0] = points[generator.choice(n_points, p=weight / total)]
    distance = ((points - centers[0]) ** 2).sum(axis=1)
    n_candidates = 2 + int(math.log(n_clusters))
    for index in range(1, n_clusters):
        potential = distance * weight
        # With fewer distinct points than clusters nothing is left to cover: any point will do.
        probability = potential / potential.sum() if potential.sum() > 0.0 else weight / total
        candidates = generator.choice(n_points, size=n_candidates, p=probability)
        to_candidates = np.minimum(distance[:, None], _squared_distances(points, points[candidates]))
        chosen = int(np.argmin(weight @ to_candidates))
        centers[index], distance = points[candidates[chosen]], to_candidates[:, chosen]
    for _ in range(n_iterations):
        label = _squared_distances(points, centers).argmin(axis=1)
        responsibilities = np.zeros((n_clusters, n_points))
        responsibilities[label, np.arange(n_points)] = 1.0
        mass = responsibilities @ weight
        moved = (responsibilities * weight) @ points
        held = mass > 0.0
        centers[held] = moved[held] / mass[held, None]
    return responsibilities


def _squared_distances(points: Array, centers: Array) -> Array:
    squared: Array = (points**2).sum(axis=1)[:, None] - 2.0 * (points @ centers.T) + (centers**2).sum(axis=1)
    return np.maximum(squared, 0.0)
