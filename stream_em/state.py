"""What an online learner has learned, apart from how it goes on learning."""

from __future__ import annotations

from dataclasses import dataclass

from stream_em.families import Bernoulli, Categorical, Exponential, Family, Gaussian, Poisson, Product
from stream_em.families.gaussian import WEAK_PRIOR
from stream_em.models import Mixture, MixtureParameters
from stream_em.schedules import Constant, Harmonic, RobbinsMonro, Schedule
from stream_em.statistics import Statistics

COMPILED_FAMILIES: tuple[type[Family], ...] = (Bernoulli, Categorical, Exponential, Gaussian, Poisson)
COMPILED_SCHEDULES = (Constant, Harmonic, RobbinsMonro)


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


def has_compiled_form(model: Mixture, schedule: Schedule) -> bool:
    """Return whether single events can be learned in compiled code by a bound model under this schedule."""
    # A prior too weak to keep covariances well-defined asks for repairs that only NumPy makes.
    return (
        type(schedule) in COMPILED_SCHEDULES
        and type(model) is Mixture
        and model.prior_weight >= WEAK_PRIOR
        and all(type(family) in COMPILED_FAMILIES for family in _families(model))
    )


def has_compiled_blocks(model: Mixture, schedule: Schedule) -> bool:
    """Return whether mini-batches can be learned in compiled code, as long as no value is missing."""
    return (
        has_compiled_form(model, schedule)
        and model.assignment == "soft"
        and all(isinstance(family, Gaussian) and family.covariance_type != "tied" for family in _families(model))
    )


def _families(model: Mixture) -> list[Family]:
    """Return the families of a bound model that are no products."""
    if isinstance(model.family, Product):
        return [factor.family for factor in model.family.factors]
    return [model.family]
