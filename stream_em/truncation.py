"""Stochastic approximation with expanding truncations: iterates that go astray are put back to the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import Array
from stream_em.statistics import Statistics

# Stands in for an infinite extent, whose logarithm would be of no use.
LARGEST_EXTENT = 1e300


@dataclass(frozen=True, eq=False)
class TruncationState:
    """Where a truncated learner is put back to, and how often it was.

    Parameters
    ----------
    start
        Statistics at the start, None before the first M-step.
    level
        Number of the set that the parameters are held in.
    count
        Truncations so far.
    whole
        Mean and variance (D,) of all events at the start, None until they are needed.

    """

    start: Statistics | None = None
    level: int = 0
    count: int = 0
    whole: tuple[Array, Array] | None = None

    def apply(self, change: Callable[[Statistics], Statistics]) -> TruncationState:
        """Return the state with a change made to the statistics at the start."""
        return self if self.start is None else replace(self, start=change(self.start), whole=None)

    def merge(self, other: TruncationState) -> TruncationState:
        """Return the state of a learner that begins anew with what two have learned."""
        return TruncationState(level=max(self.level, other.level), count=self.count + other.count)


@dataclass(frozen=True)
class ExpandingTruncations:
    """Compact sets that hold the parameters of online EM, for `OnlineEM(truncation=...)`.

    The sets grow: with r = `radius` times `growth` to the power of the number of truncations so far, they hold the
    parameters for which in every component

    - the weight is at least 1 / (K r),
    - the mean of each field lies within r standard deviations of the mean of all events at the start,
    - its variance lies between 1 / r² and r² times the variance of all events at the start (categories apart),
    - and the correlations of dependent fields have no eigenvalue below 1 / r².

    Parameters that leave the set are put back, with the statistics, to the start, which is the first M-step (after
    the warm-up, where there is one), and the next set is larger. The step size stays where it is. When the estimates
    are bounded at all this happens a finite number of times, and does not change the limit.

    Parameters
    ----------
    radius
        Size of the first set, finite and > 1. The first set that holds the start is taken, if this one does not.
    growth
        Factor from one set to the next, finite and > 1.

    Raises
    ------
    ValueError
        When a number is out of range.

    References
    ----------
    Chen (1993), "Asymptotically efficient stochastic approximation"; Andrieu, Moulines & Priouret (2005),
    "Stability of stochastic approximation under verifiable conditions"; Cappé & Moulines (2009), section 3, for
    online EM.

    >>> from stream_em import Gaussian, OnlineEM
    >>> generator = np.random.default_rng(0)
    >>> learner = OnlineEM(Mixture(Gaussian(), 2), batch_size=10, truncation=ExpandingTruncations(radius=5.0), seed=0)
    >>> learner = learner.update(generator.normal(size=(300, 1))).update(np.full((10, 1), 1e4))
    >>> learner.truncations, bool(np.abs(learner.parameters.components.mean).max() < 5.0)
    (1, True)

    """

    radius: float = 100.0
    growth: float = 10.0

    def __post_init__(self) -> None:
        for name, value in (("radius", self.radius), ("growth", self.growth)):
            if not (math.isfinite(value) and value > 1.0):
                raise ValueError(
                    f"{name} must be a finite number > 1, got {value!r}: the sets must hold the start, and grow until "
                    "they hold the limit"
                )

    def hold(
        self, bound: Mixture, statistics: Statistics, parameters: MixtureParameters, state: TruncationState
    ) -> tuple[Statistics, TruncationState]:
        """Return the statistics, or those of the start if the parameters have left the set, at the same weight.

        Parameters
        ----------
        bound
            The mixture, bound to the schema of the events.
        statistics
            What was learned.
        parameters
            Their M-step.
        state
            Where it started, and how often it was put back.

        """
        if state.start is None:
            level = self._first_level(_extent(bound, parameters, *_all_events(bound, parameters)))
            return statistics, TruncationState(statistics, max(level, state.level), state.count)
        start, whole = state.start, state.whole or _all_events(bound, bound.m_step(state.start))
        state = replace(state, whole=whole)
        if _extent(bound, parameters, *whole) <= self._radius(state.level):
            return statistics, state
        back = start.scale(statistics.total_weight / start.total_weight)
        back = replace(back, half_life=statistics.half_life, time=statistics.time)
        return back, replace(state, level=state.level + 1, count=state.count + 1)

    def _radius(self, level: int) -> float:
        try:
            return self.radius * self.growth**level
        except OverflowError:
            return math.inf

    def _first_level(self, extent: float) -> int:
        return max(0, math.ceil(math.log(min(extent, LARGEST_EXTENT) / self.radius) / math.log(self.growth)))


def _all_events(bound: Mixture, parameters: MixtureParameters) -> tuple[Array, Array]:
    """Return mean and variance (D,) of each field over all components."""
    means, variances = bound.family.moments(parameters.components)
    mean = parameters.weights @ means
    return mean, parameters.weights @ (variances + (means - mean) ** 2)


def _extent(bound: Mixture, parameters: MixtureParameters, mean: Array, variance: Array) -> float:
    """Return the radius of the smallest set that holds the parameters, with mean and variance (D,) at the start."""
    assert bound.schema is not None
    means, variances = bound.family.moments(parameters.components)
    deviation = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
    deviations = np.sqrt(variances)
    extent = [1.0 / (parameters.n_components * float(parameters.weights.min()))]
    extent.append(float((np.abs(means - mean) / deviation).max()))
    ordered = np.array([field.kind != "category" for field in bound.schema.fields])
    if ordered.any():
        ratio = (deviations / deviation)[:, ordered]
        extent += [float(ratio.max()), float(1.0 / ratio.min())]
    joint = np.flatnonzero(bound.family.joint_fields(len(mean)))
    if len(joint) > 1:
        correlations = np.repeat(np.eye(len(joint))[None], parameters.n_components, axis=0)
        for first, second in zip(*np.triu_indices(len(joint), 1)):
            covariance = bound.family.covariance(parameters.components, int(joint[first]), int(joint[second]))
            scale = deviations[:, joint[first]] * deviations[:, joint[second]]
            correlations[:, first, second] = correlations[:, second, first] = covariance / scale
        smallest = float(np.linalg.eigvalsh(correlations).min())
        extent.append(smallest**-0.5 if smallest > 0.0 else math.inf)
    return max(extent)
