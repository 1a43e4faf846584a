"""Which states may be merged: those that descend from the same start."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from stream_em.models import MixtureParameters
from stream_em.schema import Batch, Schema
from stream_em.statistics import MergeError, Statistics

if TYPE_CHECKING:
    from stream_em.learners.batch import BatchEM
    from stream_em.learners.online import OnlineEM


def origin_of(parameters: MixtureParameters) -> str:
    """Fingerprint of the first parameters: component ids mean the same only where this is the same."""
    digest = hashlib.blake2b(digest_size=16)

    def include(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, tuple):
            for one in value:
                include(one)
        else:
            for one in fields(value):
                include(getattr(value, one.name))

    include(parameters)
    return digest.hexdigest()


def check_mergeable(first: OnlineEM | BatchEM, second: OnlineEM | BatchEM) -> Schema:
    """Return the schema of both, or the one of the two whose vocabularies grew beyond the other's.

    Raises
    ------
    MergeError
        When the components of the two do not correspond, or one of them has none.

    """
    if type(first) is not type(second):
        raise MergeError(f"a {type(first).__name__} cannot be merged with a {type(second).__name__}")
    if first.model != second.model:
        raise MergeError(f"the models differ: {first.model} and {second.model}")
    if not (first.origin and second.origin):
        raise MergeError("a learner that is still warming up has no components to merge; give it more events first")
    if first.origin != second.origin:
        raise MergeError(
            "the two states do not descend from the same start, so their components do not correspond; "
            "fork one learner, feed each fork its share of the events, and merge those"
        )
    if first.n_events and _fingerprint(first) == _fingerprint(second):
        raise MergeError("the two states are identical: merging them would count the same events twice")
    mine, theirs = first._known_schema(), second._known_schema()
    if mine.names == theirs.names:
        for schema, other in ((mine, theirs), (theirs, mine)):
            if schema.extends(other):
                return schema
    raise MergeError(f"the fields, or the order in which categories were first seen, differ: {mine!r} and {theirs!r}")


def _fingerprint(learner: OnlineEM | BatchEM) -> tuple[Any, ...]:
    """What tells two states apart: the events counted, and the bytes of the statistics."""
    statistics = learner.statistics
    parts = {} if statistics is None else statistics.parts
    arrays = (array.tobytes() for part in parts.values() for array in part.arrays().values())
    return learner.n_events, *arrays


def grown_statistics(learner: OnlineEM | BatchEM, schema: Schema) -> Statistics:
    """Return the statistics of a learner for a schema with the same fields and more categories."""
    known, statistics = learner._known_schema(), learner.statistics
    assert statistics is not None
    if known.fields == schema.fields:
        return statistics
    nothing = Batch(np.empty((len(schema), 0)), schema)
    return learner.model.grow(statistics, known, schema, nothing)
