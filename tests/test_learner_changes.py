"""What can be changed about a running learner."""

from __future__ import annotations

import numpy as np
import pytest

from stream_em import Constant, Gaussian, Mixture, NotFittedError, OnlineEM, RobbinsMonro


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
