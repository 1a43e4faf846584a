"""What can be changed about a running learner."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from stream_em import Constant, Gaussian, HalfLife, Mixture, NotFittedError, OnlineEM, RobbinsMonro
from stream_em.schedules import Schedule
from stream_em.schema import MOST_NAMES, OTHER_FIELDS
from stream_em.store import from_bytes, to_bytes


def numbers(n_events: int, center: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(center, size=(n_events, 2))


def dicts(n_events: int, center: float, seed: int) -> list[dict[str, float]]:
    return [dict(zip(("x0", "x1"), row)) for row in numbers(n_events, center, seed).tolist()]


def learner_of(n_events: int = 2_000) -> OnlineEM:
    return OnlineEM(Mixture(Gaussian(), 2), batch_size=100, warm_up=100, seed=0).update(numbers(n_events, 0.0, 0))


def test_another_schedule_reaches_compiled_code() -> None:
    changed, blocks = learner_of(), learner_of()
    for event in dicts(50, 0.0, 1):
        changed.update(event)
        blocks.update([event])
    for learner in (changed, blocks):
        learner.schedule = Constant(0.5)
    for event in dicts(100, 3.0, 2):
        changed.update(event)
        blocks.update([event])
    assert changed.schedule == Constant(0.5)
    for name in ("mean", "covariance"):
        mine, theirs = (getattr(one.parameters.components, name) for one in (changed, blocks))
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    unchanged = learner_of().update(dicts(50, 0.0, 1)).update(dicts(100, 3.0, 2))
    assert unchanged.schedule == RobbinsMonro()
    assert changed.statistics.total_weight < unchanged.statistics.total_weight


def test_forgetting_lets_new_events_count_for_more() -> None:
    learner, forgetful = learner_of(), learner_of().forget(100.0)
    assert forgetful.statistics.total_weight == pytest.approx(100.0, rel=1e-12)
    assert np.array_equal(forgetful.parameters.components.mean, learner.parameters.components.mean)
    for one in (learner, forgetful):
        one.update(numbers(100, 5.0, 1))
    means = [float(one.parameters.weights @ one.parameters.components.mean[:, 0]) for one in (learner, forgetful)]
    assert means[1] == pytest.approx(2.5, abs=0.3)
    assert means[0] < 1.5
    weight = forgetful.statistics.total_weight
    assert forgetful.forget(10_000.0).statistics.total_weight == weight


def test_other_ids_stand_for_the_same_components() -> None:
    learner, renumbered = learner_of(), learner_of().renumber(np.array([7, 3]))
    events = numbers(50, 0.0, 3)
    assert np.array_equal(renumbered.predict(events), np.array([7, 3])[learner.predict(events)])
    renumbered.update(dicts(30, 0.0, 4)).update({"x0": 0.0, "x1": 1.0})
    assert set(renumbered.predict(events)) <= {7, 3}
    with pytest.raises(ValueError, match="different"):
        learner.renumber(np.array([1, 1]))
    with pytest.raises(NotFittedError):
        OnlineEM(Mixture(Gaussian(), 2)).renumber(np.array([0, 1]))


@pytest.mark.parametrize(
    ("before", "after"),
    [(RobbinsMonro(), HalfLife(10.0)), (HalfLife(10.0), RobbinsMonro()), (HalfLife(10.0), HalfLife(1e6))],
)
def test_forgetting_by_event_time_begins_and_ends_at_any_time(before: Schedule, after: Schedule) -> None:
    learner = OnlineEM(Mixture(Gaussian(), 2), schedule=before, batch_size=100, warm_up=100, seed=0)
    learner.update(numbers(1_000, 0.0, 0), time=0.0)
    learner.schedule = after
    assert learner.statistics is not None
    weight = learner.statistics.total_weight
    learner.update(numbers(100, 0.0, 1), time=5.0)
    assert learner.statistics is not None
    assert learner.statistics.half_life == after.half_life
    if isinstance(before, HalfLife) and isinstance(after, HalfLife):
        # The time of what was learned so far is known still.
        assert learner.statistics.total_weight == pytest.approx(weight * 2.0**-5e-6 + 100.0)
    elif isinstance(after, HalfLife):
        assert learner.statistics.total_weight == pytest.approx(weight + 100.0)
        learner.update(numbers(100, 0.0, 1), time=15.0)
        assert learner.statistics.total_weight == pytest.approx((weight + 100.0) / 2.0 + 100.0)
    else:
        assert learner.statistics.time is None


def test_a_schedule_is_checked_whenever_it_is_set() -> None:
    learner = learner_of()
    with pytest.raises(ValueError, match="schedule must be"):
        learner.schedule = 0.5  # type: ignore[assignment]
    early = OnlineEM(Mixture(Gaussian(), 2)).update(numbers(50, 0.0, 0))
    with pytest.raises(ValueError, match="have no times"):
        early.schedule = HalfLife(1.0)
    assert learner.schedule == early.schedule == RobbinsMonro()
    early.finish_warm_up()
    early.schedule = HalfLife(1.0)


def test_averaging_begins_at_any_time() -> None:
    changed, blocks = learner_of(), learner_of()
    for learner in (changed, blocks):
        for event in dicts(20, 0.0, 1):
            learner.update(event if learner is changed else [event])
        learner.averaging = True
        for event in dicts(20, 3.0, 2):
            learner.update(event)
    mine, theirs = (one.parameters.components.mean for one in (changed, blocks))
    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert changed.parameters is changed._average.reported


def test_compiled_code_is_looked_for_again_on_another_machine() -> None:
    learner = learner_of()
    learner._compiles = False
    assert learner.update(dicts(1, 0.0, 1)[0]).kernel() is None
    moved = pickle.loads(pickle.dumps(learner))
    assert moved.kernel() is not None


def test_a_lowered_warm_up_ends_with_the_next_event() -> None:
    learner = OnlineEM(Mixture(Gaussian(), 2), warm_up=100).update(numbers(50, 0.0, 0))
    assert learner.warm_up_left == 50
    learner.warm_up = 30
    learner.update(numbers(10, 0.0, 1))
    assert not learner.warming_up
    assert (learner.n_events, learner.warm_up_left) == (60, 0)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_weights_that_nothing_can_have_are_not_forgotten_to(wrong: float) -> None:
    with pytest.raises(ValueError, match="weight must be finite and >= 0"):
        learner_of().forget(wrong)


def test_unknown_fields_beyond_a_thousand_are_counted_together() -> None:
    learner = OnlineEM(Mixture(Gaussian(), 1), unknown="ignore", warm_up=5).update(dicts(10, 0.0, 0))
    fork = learner.fork()
    for number, event in enumerate(dicts(1_500, 0.0, 1)):
        learner.update({**event, f"field {number}": 1.0})
        fork.update([{**event, f"other {number}": 1.0}])
    for one in (learner, fork, from_bytes(to_bytes(learner)), learner.merge(fork)):
        assert len(one.ignored_fields) == MOST_NAMES + 1
    assert learner.ignored_fields[OTHER_FIELDS] == 500
    assert learner.merge(fork).ignored_fields.total() == 3_000
