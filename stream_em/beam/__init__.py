"""Apache Beam: distributed refits, keyed online models and serving."""

from stream_em.beam.coders import LearnerCoder, StatisticsCoder
from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import ExpectationStep, MergePerKey, MergeStatistics

__all__ = [
    "ExpectationStep",
    "LearnerCoder",
    "MergePerKey",
    "MergeStatistics",
    "RejectedEvent",
    "StatisticsCoder",
]
