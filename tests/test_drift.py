"""Streams that change: learners find their way back, and nothing breaks meanwhile."""

from __future__ import annotations

import pytest

from benchmarks.drift import LEARNERS, cases, follow

CHANGES = cases(30_000)
FIXED = [name for name in LEARNERS if not name.startswith("adaptive")]


@pytest.mark.slow
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "unit of one field / 1000"])
def test_adaptive_components_find_the_new_clusters(change: str) -> None:
    # Where a variance is to fall by a million, every learner that forgets takes twenty half-lives.
    for recovery in follow(CHANGES[change], LEARNERS["adaptive, HalfLife of 10 batches"])[1:]:
        assert recovery.needed is not None, recovery


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_number_of_components_follows_at_least_as_one(name: str) -> None:
    for recovery in follow(cases(60_000)["other clusters"], LEARNERS[name])[1:]:
        assert recovery.needed_for_one is not None, recovery


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Constant(0.05)", "window of 20 batches"])
def test_a_field_may_die_and_come_back(name: str) -> None:
    assert follow(CHANGES["a field dies and comes back"], LEARNERS[name])[-1].needed_for_one is not None
