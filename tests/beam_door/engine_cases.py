"""Events, a model and comparisons that the tests of engines share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

from stream_em import (
    Batch,
    BatchEM,
    Categorical,
    Field,
    Gaussian,
    Mixture,
    MixtureParameters,
    Product,
    Schema,
    Statistics,
)
from stream_em.seeding import seed

MODEL = Mixture(Product({("x", "y"): Gaussian(), "shop": Categorical()}), 3)
SCHEMA = Schema([Field("x", "numeric"), Field("y", "numeric"), Field("shop", "category", ("a", "b"))])


def mixed_events(n_events: int = 1_000) -> list[dict[str, Any]]:
    """Three clusters far from the origin, every seventh event without its y."""
    rng = np.random.default_rng(0)
    events: list[dict[str, Any]] = []
    for index, center in enumerate(rng.choice([1e4, 1e4 + 6.0, 1e4 - 9.0], n_events).tolist()):
        x, y = (center + rng.normal(size=2)).tolist()
        events.append({"x": x, "y": None if index % 7 == 0 else y, "shop": "a" if rng.random() < 0.3 else "b"})
    return events


def a_start(events: list[dict[str, Any]]) -> tuple[Batch, MixtureParameters]:
    batch = SCHEMA.encode(events)
    return batch, seed(MODEL, batch, np.random.default_rng(1))


def assert_same(first: Statistics, second: Statistics) -> None:
    """Equal to 1e-10 of the largest entry of each array: sums of other orders round otherwise."""
    assert first.log_likelihood == pytest.approx(second.log_likelihood, rel=1e-10)
    assert first.parts.keys() == second.parts.keys()
    for name, part in first.parts.items():
        for key, array in part.arrays().items():
            other = second.parts[name].arrays()[key]
            np.testing.assert_allclose(array, other, rtol=1e-10, atol=1e-10 * np.abs(other).max(initial=0.0))


class InShards(beam.PTransform):
    """Events as so many elements, spread over the workers."""

    def __init__(self, events: Sequence[dict[str, Any]], shards: int) -> None:
        super().__init__()
        self.lists = [list(part) for part in np.array_split(np.array(events, dtype=object), shards)]

    def expand(self, root: beam.Pipeline) -> beam.PCollection:
        return root | beam.Create(self.lists, reshuffle=False) | beam.Reshuffle()


def assert_same_fit(first: BatchEM, second: BatchEM) -> None:
    assert first.statistics is not None
    assert second.statistics is not None
    assert_same(first.statistics, second.statistics)
    assert first.history == pytest.approx(second.history, rel=1e-10)
    assert (first.n_events, first.converged, first.origin) == (second.n_events, second.converged, second.origin)


class SlowShards(beam.PTransform):
    """Events that take a while to read; a file tells that a worker is reading them."""

    def __init__(self, events: Sequence[dict[str, Any]], seconds: float, reading: Path) -> None:
        super().__init__()
        self.shards, self.seconds, self.reading = InShards(events, 16), seconds, reading

    def expand(self, root: beam.Pipeline) -> beam.PCollection:
        return root | self.shards | beam.Map(_slowly, self.seconds, str(self.reading))


def _slowly(events: list[dict[str, Any]], seconds: float, reading: str) -> list[dict[str, Any]]:
    Path(reading).touch()
    time.sleep(seconds)
    return events
