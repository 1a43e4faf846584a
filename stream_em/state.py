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

# With more features, such as those of 40 fields with full covariances, the matrix products are all that counts, and
# NumPy's are as fast.
MOST_FEATURES_IN_BLOCKS = 860


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
        and all(type(family) in COMPILED_FAMILIES for family, _ in _leaves(model))
    )


def has_compiled_blocks(model: Mixture, schedule: Schedule) -> bool:
    """Return whether mini-batches can be learned in compiled code, as long as no value is missing."""
    return (
        has_compiled_form(model, schedule)
        and model.assignment == "soft"
        and all(
            isinstance(family, Gaussian)
            and family.covariance_type != "tied"
            and (size * (size + 3) // 2 if family.covariance_type == "full" else 2 * size) <= MOST_FEATURES_IN_BLOCKS
            for family, size in _leaves(model)
        )
    )


def _leaves(model: Mixture) -> list[tuple[Family, int]]:
    """Return the families of a bound model that are no products, with their numbers of fields."""
    if isinstance(model.family, Product):
        return [(factor.family, len(factor.positions)) for factor in model.family.factors]
    assert model.schema is not None
    return [(model.family, len(model.schema))]
