from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from stream_em import Constant, HalfLife, Harmonic, RobbinsMonro
from stream_em.schedules import StepSize


@pytest.mark.parametrize("schedule", [RobbinsMonro(0.6), RobbinsMonro(0.75), RobbinsMonro(1.0), Harmonic()])
def test_equal_batches_enter_with_exactly_the_step_size(schedule: StepSize) -> None:
    """Cappé & Moulines (2009), equation 11: s <- (1 - step) s + step * new."""
    weight = state = mean = 0.0
    recursion = 0.0
    for step in range(1, 200):
        new = math.sin(step)
        weight += 50.0
        state *= schedule.retention(step, weight, 50.0, state)
        mean = (state * mean + 50.0 * new) / (state + 50.0)
        state += 50.0
        size = schedule.step_size(step)
        recursion = (1.0 - size) * recursion + size * new
        assert mean == pytest.approx(recursion, rel=1e-9, abs=1e-12)
        assert state == pytest.approx(50.0 / size)


@pytest.mark.parametrize(
    "schedule", [RobbinsMonro(0.6), RobbinsMonro(0.8, 10.0), Constant(0.1), Constant(0.9), Harmonic()]
)
def test_retention_is_a_share_whatever_the_batches(schedule: StepSize) -> None:
    generator = np.random.default_rng(1)
    state = total = 0.0
    n_events = 0
    for _ in range(500):
        size = int(generator.integers(1, 3_000))
        weight = float(generator.exponential() * size)
        n_events += size
        total += weight
        retention = schedule.retention(n_events / 1_000, total, weight, state)
        assert 0.0 <= retention <= 1.0
        state = retention * state + weight
        assert math.isfinite(state)
    assert state <= total * (1.0 + 1e-12)


def test_harmonic_forgets_nothing() -> None:
    assert Harmonic().retention(1e9, 1e12, 1.0, 1e12) == 1.0


def test_constant_keeps_the_last_mini_batches() -> None:
    state = total = 0.0
    for step in range(1, 400):
        total += 100.0
        state = Constant(0.1).retention(step, total, 100.0, state) * state + 100.0
        assert state == pytest.approx(min(100.0 * step, 1_000.0))


def test_offset_makes_the_first_steps_smaller() -> None:
    plain, late = RobbinsMonro(0.7), RobbinsMonro(0.7, 20.0)
    assert [late.step_size(step) for step in (1, 10)] == [plain.step_size(step) for step in (21, 30)]


def test_empty_state_is_kept() -> None:
    for schedule in (RobbinsMonro(), Constant(0.5), Harmonic()):
        assert schedule.retention(1.0, 10.0, 10.0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("schedule", "options", "reason"),
    [
        *((RobbinsMonro, {"alpha": alpha}, "alpha") for alpha in (0.5, 0.0, 1.01, -1.0, math.nan, math.inf)),
        *((RobbinsMonro, {"offset": offset}, "offset") for offset in (-1.0, math.nan, math.inf)),
        *((Constant, {"value": value}, "constant step size") for value in (0.0, 1.0, -0.1, 2.0, math.nan)),
        *((HalfLife, {"half_life": value}, "half_life") for value in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_numbers_out_of_range_are_refused(schedule: Any, options: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        schedule(**options)
