"""Step sizes: how much weight a new mini-batch has against everything learned before it.

Every schedule but `HalfLife` is a sequence of step sizes, one for each mini-batch of equal size.
Learners turn a step size into the *effective weight* that the state keeps, so that mini-batches of
unequal size are treated alike: after `t` steps' worth of events with total weight `V`, the state keeps
`V / (t * step_size(t))`, or all of `V` where that is less. For mini-batches of equal weight this is the
stochastic approximation `s <- (1 - step) s + step * s_batch` of Cappé & Moulines (2009), equation 11, with
the step size never below 1 / t: a constant step size, say, comes into force once there are as many
mini-batches as it remembers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

# An update that does not complete a mini-batch leaves a component's parameters as they are when its
# responsibility for the new events is below this: less than its share of rounding up the mini-batch.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class StepSize(ABC):
    """Base of the schedules that are a sequence of step sizes."""

    half_life: ClassVar[None] = None

    @abstractmethod
    def step_size(self, step: float) -> float:
        """Weight of mini-batch number `step`, in (0, 1] from the first whole one on; fractions may be asked for."""

    def retention(self, step: float, total_weight: float, batch_weight: float, state_weight: float) -> float:
        """Factor in [0, 1] by which the state is discounted before a mini-batch is merged into it.

        Parameters
        ----------
        step
            Number of mini-batches' worth of events seen, the new one included.
        total_weight
            Undiscounted weight of all the events seen, the new ones included.
        batch_weight
            Weight of the new mini-batch.
        state_weight
            Weight that the state holds now.

        """
        if state_weight <= 0.0:
            return 1.0
        effective_weight = total_weight / (step * self.step_size(step))
        return min(1.0, max(0.0, (effective_weight - batch_weight) / state_weight))


@dataclass(frozen=True)
class Harmonic(StepSize):
    """Step size 1/t: every event counts the same for ever, as in batch EM.

    >>> Harmonic().step_size(4)
    0.25

    """

    def step_size(self, step: float) -> float:  # noqa: D102 - inherited
        return 1.0 / step

    def retention(self, step: float, total_weight: float, batch_weight: float, state_weight: float) -> float:  # noqa: D102
        return 1.0


@dataclass(frozen=True)
class RobbinsMonro(StepSize):
    """Step size (t + offset)^(-alpha), Cappé & Moulines (2009), section 3.2.

    Parameters
    ----------
    alpha
        In (1/2, 1]. At 1/2 and below the squared steps do not sum to a finite number and the estimates
        never settle; above 1 the steps sum to a finite number and learning stops short.
    offset
        Mini-batches added to the count, >= 0: a larger offset makes the first steps smaller.

    Raises
    ------
    ValueError
        When `alpha` or `offset` is out of range.

    >>> RobbinsMonro(alpha=1.0, offset=1.0).step_size(3)
    0.25

    """

    alpha: float = 0.6
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0.5 < self.alpha <= 1.0:
            raise ValueError(
                f"alpha must lie in (0.5, 1], got {self.alpha!r}: the step sizes must sum to infinity (alpha <= 1) "
                "and their squares to a finite number (alpha > 0.5) for the estimates to converge"
            )
        if not (math.isfinite(self.offset) and self.offset >= 0.0):
            raise ValueError(f"offset must be a finite number of mini-batches >= 0, got {self.offset!r}")

    def step_size(self, step: float) -> float:  # noqa: D102 - inherited
        return float((step + self.offset) ** -self.alpha)


@dataclass(frozen=True)
class Constant(StepSize):
    """The same step size for ever: old mini-batches are forgotten geometrically, so drift is followed.

    Parameters
    ----------
    value
        Weight of each mini-batch, in (0, 1).

    Raises
    ------
    ValueError
        When `value` is out of range.

    >>> Constant(0.05).step_size(1_000)
    0.05

    """

    value: float

    def __post_init__(self) -> None:
        if not 0.0 < self.value < 1.0:
            raise ValueError(
                f"a constant step size must lie in (0, 1), got {self.value!r}: 0 never learns and 1 forgets "
                "everything at each mini-batch"
            )

    def step_size(self, step: float) -> float:  # noqa: D102 - inherited
        return self.value


@dataclass(frozen=True)
class HalfLife:
    """Event-time forgetting: an event's weight halves every `half_life` units of event time.

    It needs the `time` of the events. Statistics under it commute, so late events and merges of workers
    that saw different stretches of time are exact.

    Parameters
    ----------
    half_life
        In the units of `time` (seconds when `time` is a timestamp), finite and > 0.
    max_ahead
        How far ahead of the newest event before it, in the units of `time`, an event's date is believed, > 0; None to
        believe every date. With one date far in the future everything before it, and everything after it with a right
        date, would fade to nothing. With a bound such an event is learned as one of the newest, and counted in
        `OnlineEM.n_ahead`, unless the events dated ahead come to outnumber the others by a hundred, as they do after
        a pause of the stream. Then they are believed.

    Raises
    ------
    ValueError
        When `half_life` or `max_ahead` is out of range.

    >>> HalfLife(3600.0).half_life
    3600.0

    """

    half_life: float
    max_ahead: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.half_life) and self.half_life > 0.0):
            raise ValueError(
                f"half_life must be a finite number > 0 in the units of event time, got {self.half_life!r}: the weight "
                "2^(-age / half_life) must fall with an event's age, neither at once nor never (that is Harmonic)"
            )
        if self.max_ahead is not None and not (math.isfinite(self.max_ahead) and self.max_ahead > 0.0):
            raise ValueError(
                f"max_ahead must be a finite number > 0 in the units of event time, or None, got {self.max_ahead!r}: "
                "with 0 no time would ever move on"
            )

    def retention(self, step: float, total_weight: float, batch_weight: float, state_weight: float) -> float:
        """Return 1: the past fades with event time, when statistics of different times are merged."""
        return 1.0


Schedule = StepSize | HalfLife
