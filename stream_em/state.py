"""What an online learner has learned, apart from how it goes on learning."""

from __future__ import annotations

from dataclasses import dataclass

from stream_em.models import MixtureParameters
from stream_em.statistics import Statistics


@dataclass(frozen=True, eq=False)
class State:
    """Statistics, parameters and counters of an online learner.

    Parameters
    ----------
    statistics
        The discounted expected sufficient statistics, or None before the first ones.
    iterate
        Parameters at which the next E-step is taken, or None during the warm-up.
    n_events
        Events learned.
    total_weight
        Their undiscounted weight.
    n_updates
        M-steps taken.

    >>> State().n_events
    0

    """

    statistics: Statistics | None = None
    iterate: MixtureParameters | None = None
    n_events: int = 0
    total_weight: float = 0.0
    n_updates: int = 0
