"""Learners: state plus an update rule. The only stateful objects."""

from stream_em.learners.batch import BatchEM, BatchRun
from stream_em.learners.fitted import FittedMixture, NotFittedError, Prediction
from stream_em.learners.online import OnlineEM
from stream_em.methods import Iteration, iterate, iterations

__all__ = [
    "BatchEM",
    "BatchRun",
    "FittedMixture",
    "Iteration",
    "NotFittedError",
    "OnlineEM",
    "Prediction",
    "iterate",
    "iterations",
]
