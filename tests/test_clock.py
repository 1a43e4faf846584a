"""Which event times are believed."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, draw_batch
from hypothesis import given
from hypothesis import strategies as st

from stream_em import Batch, Gaussian, HalfLife, Mixture, OnlineEM, Schema
from stream_em.clock import MAJORITY, Clock
from stream_em.store import from_bytes, to_bytes

YEAR = 365.0 * 86_400.0
SCHEMA = Schema({"x": "numeric", "y": "numeric"})


def read_all(
    times: np.ndarray, sizes: list[int], max_ahead: float, newest: float | None = None
) -> tuple[Clock, np.ndarray]:
    clock, believed = Clock(), []
    for piece in np.split(times, np.cumsum(sizes)[:-1]):
        clock, newest = clock.read(piece, newest, max_ahead)
        believed.append(np.minimum(piece, newest))
    return clock, np.concatenate(believed)


def cuts(n_events: int, size: int) -> list[int]:
    return [min(size, n_events - start) for start in range(0, n_events, size)]


@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_dates_within_reach_are_believed_and_late_ones_always(size: int) -> None:
    generator = np.random.default_rng(0)
    times = np.arange(1_000.0) - np.where(generator.random(1_000) < 0.2, generator.uniform(0.0, 86_400.0, 1_000), 0.0)
    clock, believed = read_all(times, cuts(1_000, size), max_ahead=100.0, newest=0.0)
    assert np.array_equal(believed, times)
    assert clock == Clock()


@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_wrong_dates_among_right_ones_are_those_of_the_newest(size: int) -> None:
    generator = np.random.default_rng(1)
    right = np.arange(5_000.0)
    wrong = generator.random(5_000) < 0.05
    times = right + np.where(wrong, generator.uniform(YEAR, 100.0 * YEAR, 5_000), 0.0)
    clock, believed = read_all(times, cuts(5_000, size), max_ahead=60.0, newest=0.0)
    assert np.array_equal(believed[~wrong], right[~wrong])
    assert (np.abs(believed - right)[wrong] <= size + 10).all()
    assert clock.n_ahead == wrong.sum()


@pytest.mark.parametrize("size", [1, 10, 1_000])
def test_after_a_pause_the_new_dates_are_believed(size: int) -> None:
    generator = np.random.default_rng(2)
    times = np.concatenate([np.arange(300.0), YEAR + np.arange(1_000.0)])
    # Some of the events from before the pause come only now, and some dates are wrong.
    times[300::50] = generator.uniform(0.0, 300.0, 20)
    times[325::50] = 50.0 * YEAR
    clock, believed = read_all(times, [300, *cuts(1_000, size)], max_ahead=60.0)
    assert believed[-30:].max() == YEAR + 999.0
    assert np.array_equal(believed[300 + 2 * MAJORITY : 1_250 : 2], times[300 + 2 * MAJORITY : 1_250 : 2])
    assert clock.n_ahead <= 2 * MAJORITY + 20


def test_a_vote_of_old_is_no_vote_once_the_clock_has_come_there() -> None:
    clock, _ = Clock().read(np.full(50, 100.0), newest=0.0, max_ahead=10.0)
    assert (clock.votes, clock.ahead) == (50, (100.0, 100.0))
    # Merging, say, has moved the clock on to where those dates are past.
    moved, latest = clock.read(np.full(60, 1_000.0), newest=200.0, max_ahead=10.0)
    assert (latest, moved.votes, moved.n_ahead) == (200.0, 60, 110)


@given(
    st.lists(st.floats(-1e308, 1e308), min_size=1, max_size=300),
    st.floats(-1e308, 1e308),
    st.floats(1e-300, 1e308),
    st.integers(0, 2 * MAJORITY),
)
def test_the_clock_never_goes_back_and_counts_what_it_does_not_believe(
    times: list[float], newest: float, max_ahead: float, votes: int
) -> None:
    told = np.array(times)
    before = Clock(votes, (newest + 1.0, newest + 2.0) if votes else None)
    clock, latest = before.read(told, newest, max_ahead)
    assert latest >= newest
    assert clock.n_ahead == (told > latest).sum()
    assert clock.votes < MAJORITY or clock.n_ahead == 0
    assert (clock.ahead is not None) == (clock.votes > 0)


# In a learner


def learner_after(wrong: float, schedule: HalfLife, size: int = 100) -> OnlineEM:
    """A learner of a stream that goes elsewhere halfway, with a share of the dates a century ahead."""
    generator = np.random.default_rng(3)
    learner = OnlineEM(Mixture(Gaussian(), 1), schema=SCHEMA, schedule=schedule, batch_size=100, warm_up=200)
    for start in range(0, 6_000, size):
        values = generator.normal(size=(2, size)) + 30.0 * (start >= 3_000)
        wrongly = generator.random(size) < wrong
        times = start + np.arange(float(size)) + np.where(wrongly, generator.uniform(1.0, 100.0, size) * YEAR, 0.0)
        learner.update(Batch(values, SCHEMA, time=times))
    return learner


def test_one_date_in_the_future_does_not_stop_learning() -> None:
    frozen = learner_after(0.01, HalfLife(300.0))
    assert frozen.statistics is not None
    # What it knows is the one event with the latest date.
    assert frozen.statistics.total_weight < 1.5
    guarded, right = learner_after(0.01, HalfLife(300.0, max_ahead=60.0)), learner_after(0.0, HalfLife(300.0))
    assert guarded.n_ahead == pytest.approx(60, abs=25)
    assert (right.n_ahead, frozen.n_ahead) == (0, 0)
    for one in (guarded, right):
        assert np.allclose(one.parameters.components.mean, 30.0, atol=0.5)
    assert guarded.statistics is not None
    assert guarded.statistics.time == 5_999.0


def test_wrong_dates_in_the_warm_up_are_not_believed_either() -> None:
    learner = OnlineEM(Mixture(Gaussian(), 2), schedule=HalfLife(300.0, max_ahead=50.0), warm_up=200)
    times = np.arange(200.0)
    times[[0, 50, 199]] = 100.0 * YEAR
    learner.update(np.random.default_rng(0).normal(size=(200, 2)), time=times)
    assert learner.statistics is not None
    assert (learner.statistics.time, learner.n_ahead) == (198.0, 3)


def test_without_wrong_dates_the_bound_changes_nothing() -> None:
    free, guarded = (learner_after(0.0, HalfLife(300.0, max_ahead)) for max_ahead in (None, 1_000.0))
    assert np.array_equal(free.parameters.components.mean, guarded.parameters.components.mean)


def test_events_without_weight_have_no_vote() -> None:
    learner = learner_after(0.0, HalfLife(300.0, max_ahead=60.0))
    values, times = np.zeros((2, 300)), np.full(300, 100.0 * YEAR)
    learner.update(Batch(values, SCHEMA, weight=np.zeros(300), time=times))
    assert learner.statistics is not None
    assert (learner.statistics.time, learner.n_ahead) == (5_999.0, 0)


def test_a_refused_update_leaves_no_votes_behind() -> None:
    learner = learner_after(0.0, HalfLife(300.0, max_ahead=60.0))
    before = to_bytes(learner)
    with pytest.raises(ValueError, match="inf"):
        learner.update(np.full((50, 2), np.inf), time=np.full(50, 100.0 * YEAR))
    assert to_bytes(learner) == before


def test_votes_go_into_the_snapshot_and_merges_add_up_what_was_counted() -> None:
    learner = learner_after(0.0, HalfLife(300.0, max_ahead=60.0))
    fork = learner.fork()
    again = None
    for _ in range(3):
        events, times = draw_batch(CASES["gaussian_full"], 30, 5).values[:2], np.full(30, YEAR)
        learner.update(Batch(events, SCHEMA, time=times))
        again = from_bytes(to_bytes(learner))
        assert isinstance(again, OnlineEM)
        assert again.n_ahead == learner.n_ahead
    assert again is not None
    for one in (learner, again):
        one.update(Batch(np.zeros((2, 30)), SCHEMA, time=np.full(30, YEAR)))
        assert one.statistics is not None
        assert one.statistics.time == YEAR
    assert to_bytes(again) == to_bytes(learner)
    fork.update(Batch(np.zeros((2, 10)), SCHEMA, time=np.r_[np.zeros(9), YEAR]))
    assert (learner.n_ahead, fork.n_ahead, learner.merge(fork).n_ahead) == (90, 1, 91)


@pytest.mark.parametrize("max_ahead", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_out_of_range_is_refused(max_ahead: float) -> None:
    with pytest.raises(ValueError, match="max_ahead"):
        HalfLife(1.0, max_ahead)
