from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from cases import CASES, assert_parameters_equal, draw_batch, draw_parameters
from hypothesis import given
from hypothesis import strategies as st

from stream_em import BatchEM, Mixture, OnlineEM, Statistics
from stream_em.beam import LearnerCoder, StatisticsCoder
from stream_em.beam.per_key import KeyBlock, KeyBlockCoder
from stream_em.beam.survey import ReservoirCoder
from stream_em.seeding import Reservoir
from stream_em.store import SnapshotError

every_case = pytest.mark.parametrize("name", CASES)


def draw_statistics(name: str, n_events: int = 50, n_components: int = 3) -> Statistics:
    case = CASES[name]
    model, start = draw_parameters(case, n_components, 1)
    return model.e_step(start, draw_batch(case, n_events, 2, missing=0.2, weighted=True))


def assert_statistics_equal(actual: Statistics, expected: Statistics) -> None:
    """Compare bit for bit."""
    assert actual.parts.keys() == expected.parts.keys()
    for name, wanted in expected.parts.items():
        found = actual.parts[name]
        assert type(found) is type(wanted)
        for key, array in wanted.arrays().items():
            assert found.arrays()[key].dtype == array.dtype
            assert np.array_equal(found.arrays()[key], array), (name, key)
    assert actual.log_likelihood == expected.log_likelihood
    assert np.array_equal(actual.component_ids, expected.component_ids)
    assert (actual.half_life, actual.time) == (expected.half_life, expected.time)


@every_case
def test_statistics_come_back_bit_for_bit(name: str) -> None:
    coder, statistics = StatisticsCoder(), draw_statistics(name)
    again = coder.decode(coder.encode(statistics))
    assert again is not None
    assert_statistics_equal(again, statistics)
    # What comes off the wire merges like what was put on it.
    assert_statistics_equal(again.merge(again), statistics.merge(statistics))


@every_case
def test_equal_statistics_have_equal_bytes(name: str) -> None:
    coder, statistics = StatisticsCoder(), draw_statistics(name)
    turned = Statistics(
        dict(reversed(list(statistics.parts.items()))), statistics.log_likelihood, statistics.component_ids.copy()
    )
    assert coder.is_deterministic()
    assert coder.encode(turned) == coder.encode(statistics)
    other = Statistics(statistics.parts, np.nextafter(statistics.log_likelihood, 0.0), statistics.component_ids)
    assert coder.encode(other) != coder.encode(statistics)


def test_event_times_come_back() -> None:
    one = draw_statistics("poisson")
    aged = Statistics(one.parts, one.log_likelihood, one.component_ids, half_life=3600.0, time=1.7e9 + 1 / 3)
    again = StatisticsCoder().decode(StatisticsCoder().encode(aged))
    assert again is not None
    assert_statistics_equal(again, aged)


@every_case
@pytest.mark.parametrize("n_components", [8, 32])
def test_the_size_is_estimated_without_encoding(name: str, n_components: int, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = draw_statistics(name, 200, n_components)
    encoded = StatisticsCoder().encode(statistics)
    monkeypatch.setattr(Statistics, "to_arrow", None)
    estimate = StatisticsCoder().estimate_size(statistics)
    assert estimate == pytest.approx(len(encoded), rel=0.03)


@every_case
def test_statistics_of_many_events_are_no_longer_than_those_of_a_few(name: str) -> None:
    few, many = (len(StatisticsCoder().encode(draw_statistics(name, n_events))) for n_events in (100, 100_000))
    # But for the digits of the log-likelihood in the header, and Arrow's padding after it.
    assert abs(few - many) <= 64


@pytest.mark.parametrize("damaged", [b"x", b"\xff\xff\xff\xff" * 8])
def test_damaged_bytes_are_refused(damaged: bytes) -> None:
    with pytest.raises((pa.ArrowException, OSError)):
        StatisticsCoder().decode(damaged)
    with pytest.raises(SnapshotError):
        LearnerCoder().decode(damaged)


@every_case
def test_learners_come_back_as_they_were(name: str) -> None:
    case = CASES[name]
    batch, coder = draw_batch(case, 300, 3, missing=0.1), LearnerCoder()
    model = Mixture(case.family, 2)
    fitted = BatchEM(model, schema=case.schema, max_iter=3).fit(batch)
    online = OnlineEM(model, schema=case.schema, warm_up=100).update(batch)
    young = OnlineEM(model, schema=case.schema).update(batch.select(slice(0, 20)))
    for learner in (fitted, online, young):
        content = coder.encode(learner)
        again = coder.decode(content)
        assert type(again) is type(learner)
        assert again.n_events == learner.n_events
        assert_parameters_equal(again.parameters, learner.parameters, model.bind(case.schema).family)
        assert coder.encode(again) == content


@given(st.integers(1, 5), st.integers(0, 30), st.booleans(), st.integers(0, 10**6))
def test_blocks_of_a_key_come_back_bit_for_bit(n_fields: int, n_events: int, weighted: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(n_events, n_fields)).T
    values[generator.random(values.shape) < 0.2] = np.nan
    block = KeyBlock(values, generator.random(n_events) if weighted else None)
    coder = KeyBlockCoder()
    content = coder.encode(block)
    again = coder.decode(content)
    assert np.array_equal(again.values, values, equal_nan=True)
    assert (again.weight is None) == (block.weight is None)
    assert again.weight is None or np.array_equal(again.weight, block.weight)
    assert coder.encode(KeyBlock(np.ascontiguousarray(values), block.weight)) == content
    assert coder.estimate_size(block) == len(content)


@pytest.mark.parametrize("n_events", [0, 5, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_samples_come_back_and_go_on(n_events: int, weighted: bool) -> None:
    case = CASES["product"]
    coder = ReservoirCoder(case.schema, 20)
    reservoir = Reservoir(20, np.random.default_rng(0))
    batch = draw_batch(case, n_events, 1, missing=0.2, weighted=weighted)
    if n_events:
        reservoir.add(batch)
    again = coder.decode(coder.encode(reservoir))
    other = Reservoir(20, np.random.default_rng(1))
    other.add(draw_batch(case, 3, 4))
    for one, two in zip((again.merge(other), other.merge(again)), (reservoir.merge(other), other.merge(reservoir))):
        found, wanted = one.sample(), two.sample()
        assert np.array_equal(found.values, wanted.values, equal_nan=True)
        assert (found.weight is None) == (wanted.weight is None)
        assert found.weight is None or np.array_equal(found.weight, wanted.weight)
