"""Expanding truncations: estimates that go astray are put back to the start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import CASES, assert_parameters_equal, assert_sound, assert_statistics_close, draw_batch

from stream_em import ExpandingTruncations, Gaussian, Harmonic, MergeError, Mixture, OnlineEM, Schema
from stream_em.store import from_bytes, to_bytes

every_family = pytest.mark.parametrize("name", CASES)


def _learner(case_name: str, truncation: ExpandingTruncations | None, **options: Any) -> OnlineEM:
    case = CASES[case_name]
    return OnlineEM(
        Mixture(case.family, 2), schema=case.schema, batch_size=10, warm_up=60, truncation=truncation, **options
    )


@every_family
def test_a_set_that_is_never_left_changes_nothing(name: str) -> None:
    held, free = (_learner(name, one) for one in (ExpandingTruncations(1e9), None))
    for learner in (held, free):
        learner.update(draw_batch(CASES[name], 200, 1))
    assert held.truncations == 0
    assert_parameters_equal(held.parameters, free.parameters, free.model.bind(CASES[name].schema).family)


@every_family
def test_a_set_that_is_left_puts_the_learner_back(name: str) -> None:
    """With the smallest possible sets the estimates leave again and again, until the sets have grown around them."""
    learner = _learner(name, ExpandingTruncations(1.0001, 1.01))
    events = draw_batch(CASES[name], 600, 1)
    counts = [learner.update(events.select(slice(at, at + 10))).truncations for at in range(0, 600, 10)]
    assert counts == sorted(counts)
    assert_sound(learner.model, learner.parameters, CASES[name].schema)
    assert learner.n_events == 600


def _shocked(truncation: ExpandingTruncations | None) -> OnlineEM:
    learner = OnlineEM(Mixture(Gaussian(), 2), batch_size=10, schedule=Harmonic(), truncation=truncation, seed=0)
    return learner.update(np.random.default_rng(1).normal(size=(300, 2)))


def test_the_start_comes_back_at_the_weight_that_was_reached() -> None:
    learner = _shocked(ExpandingTruncations(5.0))
    before = learner.statistics
    assert before is not None
    start = learner._truncation.start
    assert start is not None
    learner.update(np.full((10, 2), 1e5))
    assert learner.truncations == 1
    assert learner.statistics is not None
    assert learner.statistics.total_weight == pytest.approx(before.total_weight + 10.0)
    assert_statistics_close(learner.statistics, start.scale(learner.statistics.total_weight / start.total_weight))
    assert np.abs(learner.parameters.components.mean).max() < 3.0
    assert np.abs(_shocked(None).update(np.full((10, 2), 1e5)).parameters.components.mean).max() > 1e3


def test_the_sets_grow_until_they_hold_the_limit() -> None:
    learner = _shocked(ExpandingTruncations(3.0, 3.0))
    moved = np.random.default_rng(2).normal(200.0, 1.0, size=(4_000, 2))
    counts = [learner.update(moved[at : at + 100]).truncations for at in range(0, 4_000, 100)]
    assert 1 <= counts[-1] < 10
    assert counts[-1] == counts[len(counts) // 2]
    assert learner.parameters.components.mean.max() > 150.0


def test_merged_learners_start_anew_and_count_on() -> None:
    start = _shocked(ExpandingTruncations(5.0))
    first, second = start.fork(), start.fork()
    first.update(np.random.default_rng(2).normal(size=(50, 2))).update(np.full((10, 2), 1e5))
    second.update(np.random.default_rng(3).normal(size=(50, 2)))
    merged = first.merge(second)
    assert merged.truncations == first.truncations + second.truncations
    merged.update(np.random.default_rng(4).normal(size=(50, 2)))
    assert np.abs(merged.parameters.components.mean).max() < 3.0
    other = start.fork()
    other.truncation = None
    with pytest.raises(MergeError, match="truncations differ"):
        merged.merge(other.update(np.zeros((5, 2))))


@pytest.mark.parametrize("unit", [1e-95, 1e95])
def test_the_unit_makes_no_difference(unit: float) -> None:
    events = np.random.default_rng(1).normal(size=(600, 2))
    # After the start the fields are the same.
    events[300:, 1] = events[300:, 0]
    options: dict[str, Any] = {"batch_size": 10, "truncation": ExpandingTruncations(2.0, 1.1), "seed": 0}
    counts = [OnlineEM(Mixture(Gaussian(), 2), **options).update(events * factor).truncations for factor in (1.0, unit)]
    assert 0 < counts[0] == counts[1]


def test_without_a_warm_up_the_first_m_step_is_the_start() -> None:
    schema = Schema({"x0": "numeric"})
    model = Mixture(Gaussian(), 1).bind(schema)
    initial = model.pooled(schema.encode(np.array([[-1.0], [1.0]])))
    learner = OnlineEM(
        model, schema=schema, initial_parameters=initial, truncation=ExpandingTruncations(5.0), first_m_step=20
    )
    learner.update(np.random.default_rng(1).normal(size=(30, 1))).update(np.array([[1e6]]))
    assert learner.truncations == 1
    assert abs(learner.parameters.components.mean[0, 0]) < 1.0


def test_settings_out_of_range_are_refused() -> None:
    for wrong in (1.0, 0.0, -3.0, np.inf, np.nan):
        for name in ("radius", "growth"):
            with pytest.raises(ValueError, match=f"{name} must be a finite number > 1"):
                ExpandingTruncations(**{name: wrong})
    with pytest.raises(ValueError, match="window and truncation cannot be had together"):
        OnlineEM(Mixture(Gaussian(), 2), window=10_000, truncation=ExpandingTruncations())


@pytest.mark.parametrize("name", ["gaussian_full", "product"])
def test_a_snapshot_keeps_the_start(name: str) -> None:
    learner = _learner(name, ExpandingTruncations(1.5, 1.1)).update(draw_batch(CASES[name], 300, 1))
    again, more = from_bytes(to_bytes(learner)), draw_batch(CASES[name], 300, 2)
    assert isinstance(again, OnlineEM)
    assert again.truncation == learner.truncation
    assert again.truncations == learner.truncations
    assert to_bytes(again) == to_bytes(learner)
    assert to_bytes(again.update(more)) == to_bytes(learner.update(more))
