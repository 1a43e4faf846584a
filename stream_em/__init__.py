"""Online and batch EM over streams of events."""

from stream_em.describe import ComponentDescription, FieldDescription
from stream_em.families import (
    Bernoulli,
    Categorical,
    Exponential,
    FamilyError,
    Gaussian,
    LinearRegression,
    Poisson,
    Product,
)
from stream_em.learners import BatchEM, FittedMixture, NotFittedError, OnlineEM, Prediction
from stream_em.methods import FIEM, Incremental, VarianceReduced
from stream_em.models import Mixture, MixtureParameters
from stream_em.schedules import Constant, HalfLife, Harmonic, RobbinsMonro
from stream_em.schema import Batch, EventError, Field, Schema, SchemaError
from stream_em.statistics import MergeError, Statistics
from stream_em.store import SnapshotError, load, read_metadata, save
from stream_em.structure import AdaptiveComponents, StructureChanges
from stream_em.truncation import ExpandingTruncations

__all__ = [
    "FIEM",
    "AdaptiveComponents",
    "Batch",
    "BatchEM",
    "Bernoulli",
    "Categorical",
    "ComponentDescription",
    "Constant",
    "EventError",
    "ExpandingTruncations",
    "Exponential",
    "FamilyError",
    "Field",
    "FieldDescription",
    "FittedMixture",
    "Gaussian",
    "HalfLife",
    "Harmonic",
    "Incremental",
    "LinearRegression",
    "MergeError",
    "Mixture",
    "MixtureParameters",
    "NotFittedError",
    "OnlineEM",
    "Poisson",
    "Prediction",
    "Product",
    "RobbinsMonro",
    "Schema",
    "SchemaError",
    "SnapshotError",
    "Statistics",
    "StructureChanges",
    "VarianceReduced",
    "load",
    "read_metadata",
    "save",
]
