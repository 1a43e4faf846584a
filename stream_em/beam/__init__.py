"""Apache Beam: distributed refits, keyed online models and serving."""

from stream_em.beam.anomaly import MixtureAnomalyDetector, to_anomaly_prediction
from stream_em.beam.coders import LearnerCoder, StatisticsCoder
from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import ExpectationStep, MergePerKey, MergeStatistics
from stream_em.beam.kafka import ReadKafka
from stream_em.beam.online import GlobalUpdate, OnlineOutputs, OnlineUpdate, ScoredEvent
from stream_em.beam.per_key import RefitPerKey
from stream_em.beam.reading import ReadEvents
from stream_em.beam.refit import Refit, RefitError, RefitResult
from stream_em.beam.serving import EventScore, MixtureModelHandler, SplitRejected
from stream_em.beam.survey import infer_categories, infer_schema
from stream_em.beam.writing import WriteRejected, WriteSnapshots
from stream_em.kafka import KafkaMessage

__all__ = [
    "EventScore",
    "ExpectationStep",
    "GlobalUpdate",
    "KafkaMessage",
    "LearnerCoder",
    "MergePerKey",
    "MergeStatistics",
    "MixtureAnomalyDetector",
    "MixtureModelHandler",
    "OnlineOutputs",
    "OnlineUpdate",
    "ReadEvents",
    "ReadKafka",
    "Refit",
    "RefitError",
    "RefitPerKey",
    "RefitResult",
    "RejectedEvent",
    "ScoredEvent",
    "SplitRejected",
    "StatisticsCoder",
    "WriteRejected",
    "WriteSnapshots",
    "infer_categories",
    "infer_schema",
    "to_anomaly_prediction",
]
