from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from cases import (
    CASES,
    NUMERIC,
    assert_parameters_equal,
    assert_sound,
    assert_statistics_close,
    draw_batch,
    draw_parameters,
    draw_values,
)

from stream_em import (
    Batch,
    BatchEM,
    Bernoulli,
    Categorical,
    Constant,
    EventError,
    Field,
    FittedMixture,
    Gaussian,
    HalfLife,
    Harmonic,
    MergeError,
    Mixture,
    MixtureParameters,
    NotFittedError,
    OnlineEM,
    Poisson,
    Product,
    RobbinsMonro,
    Schema,
    SchemaError,
)
from stream_em.families.gaussian import GaussianParameters
from stream_em.learners import Prediction
from stream_em.numerics import NumericalError
from stream_em.schedules import Schedule
from stream_em.store import from_bytes, to_bytes

every_family = pytest.mark.parametrize("name", CASES)
MODEL = Mixture(Gaussian(), 3)
EVENTS = draw_values(NUMERIC, 1_200, np.random.default_rng(3)).T
START = draw_parameters(CASES["gaussian_full"], 3, 5)[1]


def ready(**options: Any) -> OnlineEM:
    """A learner that starts from given parameters and takes its first M-step at once."""
    options = {"first_m_step": 1, "batch_size": 100, **options}
    return OnlineEM(MODEL, schema=NUMERIC, initial_parameters=START, **options)


# OnlineEM: the recursion


def literal_stepwise_em(
    events: np.ndarray,
    start: MixtureParameters,
    step_size: Callable[[int], float],
    batch_size: int,
    prior_weight: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cappé & Moulines (2009), equation 11, event by event, on uncentred sufficient statistics.

    The M-step adds `prior_weight` pseudo-events of the pooled distribution to each component.
    """
    weights, means, covariances = start.weights, start.components.mean, start.components.covariance
    n_components, dimension = means.shape
    s0, s1 = np.zeros(n_components), np.zeros((n_components, dimension))
    s2 = np.zeros((n_components, dimension, dimension))
    for number, first in enumerate(range(0, len(events), batch_size), start=1):
        block = events[first : first + batch_size]
        b0, b1, b2 = np.zeros_like(s0), np.zeros_like(s1), np.zeros_like(s2)
        for event in block:
            joint = np.empty(n_components)
            for k in range(n_components):
                deviation = event - means[k]
                joint[k] = weights[k] * math.exp(-0.5 * deviation @ np.linalg.solve(covariances[k], deviation))
                joint[k] /= math.sqrt((2.0 * math.pi) ** dimension * np.linalg.det(covariances[k]))
            shares = joint / joint.sum()
            b0 += shares / len(block)
            b1 += shares[:, None] * event / len(block)
            b2 += shares[:, None, None] * np.outer(event, event) / len(block)
        step = step_size(number)
        s0, s1, s2 = s0 + step * (b0 - s0), s1 + step * (b1 - s1), s2 + step * (b2 - s2)
        # The statistics are means over events; the prior is a number of events, so it is set against the
        # number of events that the discounted statistics are worth.
        prior = prior_weight * step / batch_size
        pooled_mean = s1.sum(axis=0) / s0.sum()
        pooled_variance = np.diag(s2.sum(axis=0)) / s0.sum() - pooled_mean**2
        pseudo = np.diag(pooled_variance) + np.outer(pooled_mean, pooled_mean)
        weights = (s0 + prior) / (s0 + prior).sum()
        means = (s1 + prior * pooled_mean) / (s0 + prior)[:, None]
        second = (s2 + prior * pseudo) / (s0 + prior)[:, None, None]
        covariances = second - means[:, :, None] * means[:, None, :]
    return weights, means, covariances


@pytest.mark.parametrize(
    ("schedule", "step_size"),
    [
        (RobbinsMonro(0.6), lambda t: t**-0.6),
        (RobbinsMonro(1.0), lambda t: 1.0 / t),
        (Harmonic(), lambda t: 1.0 / t),
    ],
)
def test_updates_are_the_stepwise_recursion_of_cappe_and_moulines(
    schedule: Schedule, step_size: Callable[[int], float]
) -> None:
    learner = ready(schedule=schedule)
    for first in range(0, 1_200, 100):
        learner.update(EVENTS[first : first + 100])
    weights, means, covariances = literal_stepwise_em(EVENTS, START, step_size, 100, MODEL.prior_weight)
    np.testing.assert_allclose(learner.parameters.weights, weights, rtol=1e-8)
    np.testing.assert_allclose(learner.parameters.components.mean, means, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(learner.parameters.components.covariance, covariances, rtol=1e-6, atol=1e-7)


def test_constant_step_follows_the_recursion_once_it_is_settled() -> None:
    learner = ready(schedule=Constant(0.25))
    for first in range(0, 600, 100):
        learner.update(EVENTS[first : first + 100])
    assert learner.statistics is not None
    # The state is worth 1 / step mini-batches, and the next one enters with exactly the step size.
    assert learner.statistics.total_weight == pytest.approx(400.0)
    before = learner.statistics
    new = MODEL.e_step(learner.parameters, NUMERIC.encode(EVENTS[600:700]))
    learner.update(EVENTS[600:700])
    np.testing.assert_allclose(
        learner.statistics.weights / 400.0, 0.75 * before.weights / 400.0 + 0.25 * new.weights / 100.0
    )


def test_first_m_step_waits() -> None:
    learner = ready(first_m_step=20)
    learner.update(EVENTS[:19])
    assert learner.parameters is START
    learner.update(EVENTS[19:20])
    expected = MODEL.m_step(MODEL.e_step(START, NUMERIC.encode(EVENTS[:20])))
    np.testing.assert_allclose(learner.parameters.components.mean, expected.components.mean, rtol=1e-9)


# OnlineEM: how events are cut


@pytest.mark.parametrize("schedule", [Harmonic(), RobbinsMonro(0.6), Constant(0.2)])
def test_one_large_update_is_the_mini_batches_it_is_cut_into(schedule: Schedule) -> None:
    whole = OnlineEM(MODEL, schedule=schedule, warm_up=250, batch_size=100, averaging=True).update(EVENTS)
    cuts = [0, 100, 200, 250, *range(350, 1_200, 100), 1_200]
    pieces = OnlineEM(MODEL, schedule=schedule, warm_up=250, batch_size=100, averaging=True)
    for start, stop in itertools.pairwise(cuts):
        pieces.update(EVENTS[start:stop])
    assert_parameters_equal(whole.parameters, pieces.parameters, MODEL.family)
    assert whole.n_events == pieces.n_events == 1_200


@pytest.mark.parametrize("schedule", [RobbinsMonro(0.6), RobbinsMonro(0.9, 3.0), Constant(0.1), Harmonic()])
@pytest.mark.parametrize("piece", [1, 7, 100])
def test_the_weight_of_the_past_does_not_depend_on_how_events_are_cut(schedule: Schedule, piece: int) -> None:
    events = EVENTS[:600]
    reference = OnlineEM(MODEL, schedule=schedule, warm_up=100, batch_size=100).update(events)
    learner = OnlineEM(MODEL, schedule=schedule, warm_up=100, batch_size=100)
    for start in range(0, 600, piece):
        learner.update(events[start : start + piece])
    assert learner.n_events == 600
    assert learner.statistics is not None
    assert reference.statistics is not None
    assert learner.statistics.total_weight == pytest.approx(reference.statistics.total_weight, rel=0.02)
    np.testing.assert_allclose(np.sort(learner.parameters.weights), np.sort(reference.parameters.weights), atol=0.05)


@every_family
def test_harmonic_keeps_every_event(name: str) -> None:
    case = CASES[name]
    learner = OnlineEM(Mixture(case.family, 3), schema=case.schema, schedule=Harmonic(), warm_up=50, batch_size=64)
    learner.update(draw_batch(case, 500, 1, missing=0.1))
    assert learner.statistics is not None
    assert learner.statistics.total_weight == pytest.approx(500.0)
    assert_sound(learner.model, learner.parameters, case.schema)


@every_family
def test_forms_of_input_are_alike(name: str) -> None:
    case = CASES[name]
    batch = draw_batch(case, 120, 8, missing=0.1)
    table = case.schema.decode(batch.values)
    learners = [
        OnlineEM(Mixture(case.family, 3), schema=case.schema, warm_up=40, batch_size=50).update(form)
        for form in (batch, table, table.to_pylist())
    ]
    for learner in learners[1:]:
        assert to_bytes(learner) == to_bytes(learners[0])


# OnlineEM: event time


def test_half_life_is_exact_in_any_order_of_events_and_batches() -> None:
    generator = np.random.default_rng(6)
    events, time = EVENTS[:300], generator.uniform(0.0, 40.0, size=300)
    weight = generator.exponential(size=300)
    discounted = weight * 2.0 ** ((time - time.max()) / 5.0)
    mean = discounted @ events / discounted.sum()
    scatter = np.einsum("n,ni,nj->ij", discounted, events - mean, events - mean)
    for order in (np.argsort(time), np.argsort(-time), generator.permutation(300)):
        # With one component responsibilities are 1, so the state depends on nothing but weights and times.
        learner = OnlineEM(Mixture(Gaussian(), 1), schedule=HalfLife(5.0), warm_up=20, batch_size=40)
        for chunk in np.array_split(order, 11):
            learner.update(events[chunk], weight=weight[chunk], time=time[chunk])
        state = learner.statistics
        assert state is not None
        assert state.time == time.max()
        np.testing.assert_allclose(state.weights, [discounted.sum()])
        np.testing.assert_allclose(state.parts["moments"].mean[0], mean, rtol=1e-10)
        np.testing.assert_allclose(state.parts["moments"].scatter[0], scatter, rtol=1e-9)


@every_family
def test_late_events_within_a_batch_are_like_sorted_ones(name: str) -> None:
    case = CASES[name]
    batch = draw_batch(case, 80, 9, missing=0.2)
    time = np.random.default_rng(10).uniform(-5.0, 5.0, size=80)
    _model, start = draw_parameters(case, 3, 11)
    learners = []
    for order in (np.arange(80), np.argsort(time)):
        learner = OnlineEM(
            Mixture(case.family, 3), schema=case.schema, initial_parameters=start, schedule=HalfLife(2.0)
        )
        learners.append(learner.update(batch.select(order), time=time[order]))
    first, second = (learner.statistics for learner in learners)
    assert first is not None
    assert second is not None
    assert_statistics_close(first, second)


def test_half_life_forgets_what_is_long_past() -> None:
    learner = OnlineEM(Mixture(Gaussian(), 1), schedule=HalfLife(1.0), warm_up=50)
    learner.update(EVENTS[:100] - 500.0, time=0.0)
    learner.update(EVENTS[:100], time=1e6)
    np.testing.assert_allclose(learner.parameters.components.mean[0], EVENTS[:100].mean(axis=0), rtol=1e-6)
    learner.update(EVENTS[:100] - 500.0, time=0.0)
    np.testing.assert_allclose(learner.parameters.components.mean[0], EVENTS[:100].mean(axis=0), rtol=1e-6)
    assert_sound(learner.model, learner.parameters, learner.schema or NUMERIC)


def test_half_life_takes_timestamps() -> None:
    seconds = np.arange(100) * 60
    stamps = np.datetime64("2024-01-01T00:00:00") + seconds.astype("timedelta64[s]")
    by_stamp = OnlineEM(MODEL, schedule=HalfLife(600.0), warm_up=60).update(EVENTS[:100], time=stamps)
    start = float((stamps[0] - np.datetime64(0, "s")) / np.timedelta64(1, "s"))
    by_second = OnlineEM(MODEL, schedule=HalfLife(600.0), warm_up=60).update(EVENTS[:100], time=start + seconds)
    assert to_bytes(by_stamp) == to_bytes(by_second)


def test_half_life_needs_times() -> None:
    learner = OnlineEM(MODEL, schedule=HalfLife(1.0))
    with pytest.raises(SchemaError, match="HalfLife needs the time"):
        learner.update(EVENTS[:10])
    assert learner.n_events == 0
    assert learner.schema is None


# OnlineEM: averaging


def test_averaging_is_the_mean_over_the_last_half_to_three_quarters() -> None:
    averaged, plain = ready(averaging=True), ready()
    iterates = []
    for number, first in enumerate(range(0, 1_200, 100), start=1):
        averaged.update(EVENTS[first : first + 100])
        iterates.append(plain.update(EVENTS[first : first + 100]).parameters)
        start = 2 ** max(0, number.bit_length() - 2)
        included = iterates[start - 1 :]
        assert number / 2 <= len(included) <= 0.75 * number + 1
        np.testing.assert_allclose(
            averaged.parameters.weights, np.mean([one.weights for one in included], axis=0), rtol=1e-12
        )
        for array in ("mean", "covariance"):
            expected = np.mean([getattr(one.components, array) for one in included], axis=0)
            np.testing.assert_allclose(getattr(averaged.parameters.components, array), expected, rtol=1e-10)


@every_family
def test_averages_are_parameters(name: str) -> None:
    case = CASES[name]
    learner = OnlineEM(Mixture(case.family, 3), schema=case.schema, warm_up=40, batch_size=20, averaging=True)
    learner.update(draw_batch(case, 400, 12, missing=0.1))
    assert_sound(learner.model, learner.parameters, case.schema)
    assert learner.log_prob(draw_batch(case, 100, 13)).mean() > -30.0


# OnlineEM: warm-up


def test_predictions_before_any_event() -> None:
    learner = OnlineEM(MODEL)
    prediction = learner.score_events(EVENTS[:4])
    assert prediction.log_prob.tolist() == [0.0] * 4
    assert prediction.component.tolist() == [0] * 4
    np.testing.assert_allclose(prediction.responsibilities, 1.0 / 3.0)
    assert learner.log_prob([{"x": 1.0, "y": 2.0}]).tolist() == [0.0]
    assert learner.responsibilities({"x": 1.0}).shape == (1, 3)
    assert learner.predict(EVENTS[:2]).tolist() == [0, 0]
    assert learner.schema is None
    with pytest.raises(NotFittedError):
        learner.parameters  # noqa: B018
    with pytest.raises(NotFittedError):
        learner.finish_warm_up()


def test_predictions_during_the_warm_up_are_those_of_one_pooled_component() -> None:
    learner = OnlineEM(Mixture(Gaussian("diag"), 3), warm_up=200)
    learner.update(EVENTS[:100])
    assert learner.warming_up
    assert learner.statistics is None
    prediction = learner.score_events(EVENTS[100:150])
    np.testing.assert_allclose(prediction.responsibilities, 1.0 / 3.0)
    mean, deviation = EVENTS[:100].mean(axis=0), EVENTS[:100].std(axis=0)
    standardized = (EVENTS[100:150] - mean) / deviation
    expected = (-0.5 * standardized**2 - np.log(deviation) - 0.5 * math.log(2.0 * math.pi)).sum(axis=1)
    np.testing.assert_allclose(prediction.log_prob, expected, rtol=1e-9)
    learner.update(EVENTS[100:200])
    assert not learner.warming_up
    assert learner.n_events == 200
    assert np.ptp(learner.responsibilities(EVENTS[:50])) > 0.9


def test_warm_up_ends_when_asked() -> None:
    learner = OnlineEM(MODEL).update(EVENTS[:100])
    learner.finish_warm_up()
    assert not learner.warming_up
    early = learner.parameters
    learner.finish_warm_up()
    assert learner.parameters is early
    assert_sound(MODEL, early, learner.schema or NUMERIC)


def test_events_kept_aside_are_copies() -> None:
    memory = EVENTS[:150].copy()
    learner, twin = OnlineEM(MODEL), OnlineEM(MODEL)
    learner.update(memory)
    twin.update(EVENTS[:150])
    memory[:] = 1e6
    assert to_bytes(learner.update(EVENTS[150:300])) == to_bytes(twin.update(EVENTS[150:300]))


def test_default_warm_up_grows_with_the_components() -> None:
    assert OnlineEM(Mixture(Gaussian(), 3)).warm_up == 200
    assert OnlineEM(Mixture(Gaussian(), 50)).warm_up == 1_000


# OnlineEM: predict, then update


@every_family
@pytest.mark.parametrize("n_before", [0, 10, 100])
def test_predict_then_update_is_score_then_update(name: str, n_before: int) -> None:
    case = CASES[name]
    first, second = (
        OnlineEM(Mixture(case.family, 3), schema=case.schema, warm_up=40, batch_size=50, schedule=RobbinsMonro(0.8))
        for _ in range(2)
    )
    if n_before:
        batch = draw_batch(case, n_before, 14, missing=0.1)
        first.update(batch)
        second.update(batch)
    more = draw_batch(case, 30, 15, missing=0.1, weighted=True)
    at_once = first.predict_then_update(more)
    scored = second.score_events(more)
    second.update(more)
    assert isinstance(at_once, Prediction)
    assert np.array_equal(at_once.log_prob, scored.log_prob)
    assert np.array_equal(at_once.component, scored.component)
    assert np.array_equal(at_once.responsibilities, scored.responsibilities)
    assert to_bytes(first) == to_bytes(second)


def test_each_mini_batch_is_scored_before_it_is_learned() -> None:
    whole = OnlineEM(MODEL, warm_up=150, batch_size=100)
    pieces = OnlineEM(MODEL, warm_up=150, batch_size=100)
    together = whole.predict_then_update(EVENTS[:400])
    cuts = [0, 100, 150, 250, 350, 400]
    apart = [pieces.predict_then_update(EVENTS[start:stop]) for start, stop in itertools.pairwise(cuts)]
    for index, name in enumerate(Prediction._fields):
        assert np.array_equal(getattr(together, name), np.concatenate([one[index] for one in apart])), name
    assert together.log_prob.shape == (400,)
    assert together.responsibilities.shape == (400, 3)


def test_responsibilities_sum_to_one_and_components_have_the_largest() -> None:
    learner = OnlineEM(MODEL).update(EVENTS)
    prediction = learner.score_events(EVENTS)
    np.testing.assert_allclose(prediction.responsibilities.sum(axis=1), 1.0, rtol=1e-12)
    ids = learner.parameters.component_ids
    assert np.array_equal(ids[prediction.responsibilities.argmax(axis=1)], prediction.component)
    assert np.array_equal(learner.predict(EVENTS), prediction.component)
    assert np.array_equal(learner.responsibilities(EVENTS), prediction.responsibilities)
    assert np.array_equal(learner.log_prob(EVENTS), prediction.log_prob)


def test_no_events_change_nothing() -> None:
    for n_before in (50, 400):
        learner = OnlineEM(MODEL, schema=NUMERIC).update(EVENTS[:n_before])
        before = to_bytes(learner)
        for nothing in ([], EVENTS[:0], NUMERIC.encode([])):
            assert to_bytes(learner.update(nothing)) == before
            prediction = learner.predict_then_update(nothing)
            assert prediction.log_prob.shape == (0,)
            assert prediction.responsibilities.shape == (0, 3)
            assert learner.score_events(nothing).component.shape == (0,)
        assert to_bytes(learner) == before


def test_predictions_learn_nothing() -> None:
    learner = OnlineEM(MODEL, unknown="ignore").update(EVENTS[:400])
    before = to_bytes(learner)
    learner.score_events(EVENTS)
    learner.log_prob([{"x0": 1.0, "unheard of": 2.0}])
    learner.responsibilities(EVENTS)
    learner.describe()
    learner.sample(10, seed=1)
    assert to_bytes(learner) == before


# OnlineEM: fields and categories that come later


def test_vocabulary_grows_and_keeps_what_was_learned() -> None:
    learner = OnlineEM(Mixture(Categorical(), 1), warm_up=10, schedule=Harmonic(), batch_size=10)
    learner.update([{"c": "a"}] * 30 + [{"c": "b"}] * 10)
    learner.update([{"c": "new"}] * 40)
    assert learner.schema is not None
    assert learner.schema.fields[0].categories == ("a", "b", "new")
    np.testing.assert_allclose(learner.parameters.components.probability[0], [0, 3 / 8, 1 / 8, 4 / 8], atol=1e-3)
    assert learner.log_prob([{"c": "never seen"}])[0] < learner.log_prob([{"c": "b"}])[0]


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("n_before", [5, 200])
def test_new_field_is_added(kind: Any, n_before: int) -> None:
    learner = OnlineEM(Mixture(Gaussian(kind), 2), unknown="add", warm_up=50, schedule=Harmonic())
    events = [{"x": float(x), "y": float(y)} for x, y, _ in EVENTS[:n_before]]
    learner.update(events)
    learner.update([{"x": float(x), "y": float(y), "z": float(z)} for x, y, z in EVENTS[200:500]])
    assert learner.schema is not None
    assert learner.schema.names == ("x", "y", "z")
    assert_sound(learner.model, learner.parameters, learner.schema)
    mean = learner.parameters.weights @ learner.marginals()[0]
    np.testing.assert_allclose(mean[2], EVENTS[200:500, 2].mean(), atol=0.5)
    assert np.isfinite(learner.log_prob([{"x": 1.0}, {"z": 2.0}])).all()


def test_unknown_fields_are_ignored_and_counted() -> None:
    learner = OnlineEM(MODEL, unknown="ignore").update(EVENTS[:300])
    learner.update([{"x0": 1.0, "x1": 2.0, "x2": 3.0, "shop": 7}, {"x0": 1.0, "shop": 8, "city": "X"}])
    assert learner.ignored_fields == Counter({"shop": 2, "city": 1})
    assert learner.n_events == 302


# Batches of other schemas


def test_batches_of_other_fields_are_refused() -> None:
    learner = OnlineEM(MODEL, schema=NUMERIC).update(EVENTS[:300])
    before = to_bytes(learner)
    for other in (
        Schema({"a": "numeric", "b": "numeric", "c": "numeric"}),
        Schema({"x": "numeric", "y": "numeric", "z": "count"}),
        Schema({"y": "numeric", "x": "numeric", "z": "numeric"}),
    ):
        batch = other.encode(np.abs(EVENTS[:5]).round())
        for verb in (learner.update, learner.log_prob, learner.predict_then_update, learner.responsibilities):
            with pytest.raises(SchemaError):
                verb(batch)
    assert to_bytes(learner) == before


def test_batches_of_other_vocabularies_are_never_mixed_up() -> None:
    open_schema = Schema({"c": "category"})
    first = open_schema.encode([{"c": "a"}, {"c": "b"}] * 10, extend=True)
    second = open_schema.encode([{"c": "z"}, {"c": "a"}] * 10, extend=True)
    learner = OnlineEM(Mixture(Categorical(), 2), warm_up=10).update(first)
    before = to_bytes(learner)
    with pytest.raises(SchemaError):
        learner.update(second)
    with pytest.raises(SchemaError):
        learner.log_prob(second)
    assert to_bytes(learner) == before
    for source in ([first, second], lambda: iter([first, second])):
        with pytest.raises(SchemaError):
            BatchEM(Mixture(Categorical(), 2)).fit(source)


def test_batches_of_other_fields_do_not_fit_together() -> None:
    one, other = Schema({"a": "numeric"}).encode(EVENTS[:50, :1]), Schema({"b": "numeric"}).encode(EVENTS[:50, :1])
    with pytest.raises(SchemaError):
        BatchEM(MODEL).fit([one, other])


# Errors


def failing_updates() -> list[tuple[Any, dict[str, Any]]]:
    good = [{"x": 1.0, "y": 2.0, "z": 3.0}] * 40
    return [
        ([*good, {"x": "1", "y": 2.0, "z": 3.0}], {}),
        ([*good, {"x": float("inf"), "y": 2.0, "z": 3.0}], {}),
        ([*good, {"x": 1.0, "y": 2.0, "z": 3.0, "new": 1.0}], {}),
        ([*good, {}], {}),
        (good, {"weight": [1.0] * 39 + [-1.0]}),
        (good, {"weight": [1.0] * 39 + [math.nan]}),
        (good, {"weight": [1.0] * 39}),
        (good, {"time": [1.0] * 39 + [math.inf]}),
        (EVENTS[:40, :2], {}),
        (pa.table({"x": [1.0], "y": [1.0]}), {}),
        ("nonsense", {}),
    ]


@pytest.mark.parametrize("number", range(len(failing_updates())))
@pytest.mark.parametrize("n_before", [0, 30, 300])
@pytest.mark.parametrize("verb", ["update", "predict_then_update"])
def test_an_error_leaves_the_state_bitwise_as_before(number: int, n_before: int, verb: str) -> None:
    events, options = failing_updates()[number]
    learner = OnlineEM(MODEL, schema=NUMERIC, warm_up=60, batch_size=16).update(EVENTS[:n_before])
    before = to_bytes(learner)
    with pytest.raises((EventError, SchemaError)):
        getattr(learner, verb)(events, **options)
    assert to_bytes(learner) == before
    assert learner.n_events == n_before


def test_an_error_in_the_first_events_fixes_no_schema() -> None:
    learner = OnlineEM(MODEL)
    with pytest.raises(EventError):
        learner.update([{"a": 1.0}, {"a": "x"}])
    assert learner.schema is None
    assert learner.update(EVENTS[:10]).n_events == 10


def test_a_failed_update_grows_no_vocabulary() -> None:
    learner = OnlineEM(Mixture(Product({"c": Categorical(), "x": Gaussian()}), 2), warm_up=5)
    learner.update([{"c": "a", "x": float(x)} for x in range(20)])
    before = to_bytes(learner)
    with pytest.raises(EventError):
        learner.update([{"c": "new", "x": 1.0}, {"c": "b", "x": "?"}])
    assert to_bytes(learner) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0: each step of the schedule"),
        ({"warm_up": 0}, "warm_up must be .* at least 1, got 0: an M-step needs"),
        ({"first_m_step": 0}, "first_m_step must be .* at least 1, got 0: an M-step needs"),
        ({"window": 0}, "window must be .* at least 1, got 0: an M-step needs"),
        ({"structure": True}, r"structure must be AdaptiveComponents\(\) or None, got True"),
        ({"truncation": 10.0}, r"truncation must be ExpandingTruncations\(\) or None, got 10"),
        ({"initial_parameters": START}, "initial_parameters need the schema"),
    ],
)
def test_settings_out_of_range_are_refused_online(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        OnlineEM(MODEL, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": 0},
        {"tol": -1.0},
        {"tol": math.nan},
        {"n_init": 0},
        {"seed_events": 0},
        {"n_threads": 0},
        {"initial_parameters": START},
    ],
)
def test_settings_out_of_range_are_refused_in_batch(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        BatchEM(MODEL, **options)


# Fork and merge


@every_family
def test_forks_merged_are_one_learner(name: str) -> None:
    case = CASES[name]
    model = Mixture(case.family, 3)
    _, start = draw_parameters(case, 3, 20)
    batch = draw_batch(case, 300, 21, missing=0.2, weighted=True)
    origin = OnlineEM(model, schema=case.schema, initial_parameters=start, first_m_step=1, schedule=Harmonic())
    merged = origin.fork().update(batch.select(slice(0, 90)))
    for start_at, stop in ((90, 91), (91, 200), (200, 300)):
        merged = merged.merge(origin.fork().update(batch.select(slice(start_at, stop))))
    alone = origin.update(batch)
    assert merged.n_events == alone.n_events == np.count_nonzero(batch.weight)
    assert merged.statistics is not None
    assert alone.statistics is not None
    assert_statistics_close(merged.statistics, alone.statistics)
    np.testing.assert_allclose(merged.log_prob(batch), alone.log_prob(batch), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n_shards", [1, 2, 8, 64])
def test_shards_give_the_parameters_of_one_machine(n_shards: int) -> None:
    """Literature: the same parameters in any number of shards, to 1e-10 relative."""
    batch = NUMERIC.encode(EVENTS[:640])
    parameters = whole = START
    for _ in range(10):
        whole = MODEL.m_step(MODEL.e_step(whole, batch))
        shards = [
            MODEL.e_step(parameters, batch.select(slice(at, at + 640 // n_shards)))
            for at in range(0, 640, 640 // n_shards)
        ]
        merged = shards[0]
        for shard in shards[1:]:
            merged = merged.merge(shard)
        parameters = MODEL.m_step(merged)
    np.testing.assert_allclose(parameters.weights, whole.weights, rtol=1e-10)
    np.testing.assert_allclose(parameters.components.mean, whole.components.mean, rtol=1e-10)
    np.testing.assert_allclose(parameters.components.covariance, whole.components.covariance, rtol=1e-10, atol=1e-10)


def test_merge_changes_neither_side_and_goes_on_learning() -> None:
    learner = OnlineEM(MODEL, batch_size=100).update(EVENTS[:400])
    fork = learner.fork().update(EVENTS[400:800])
    before = to_bytes(learner), to_bytes(fork)
    merged = learner.merge(fork)
    assert (to_bytes(learner), to_bytes(fork)) == before
    assert merged.n_events == 800
    merged.update(EVENTS[800:])
    assert merged.n_events == 1_200
    assert_sound(MODEL, merged.parameters, learner.schema or NUMERIC)


def test_merge_of_event_times_is_commutative() -> None:
    learner = OnlineEM(MODEL, schedule=HalfLife(3.0), warm_up=100).update(EVENTS[:200], time=np.arange(200.0) / 20)
    late = learner.fork().update(EVENTS[200:300], time=np.arange(100.0) / 50)
    one, other = learner.merge(late), late.merge(learner)
    assert one.statistics is not None
    assert other.statistics is not None
    assert_statistics_close(one.statistics, other.statistics)


def test_what_does_not_belong_together_is_not_merged() -> None:
    learner = OnlineEM(MODEL).update(EVENTS[:400])
    strangers = [
        OnlineEM(MODEL).update(EVENTS[400:800]),
        OnlineEM(MODEL, schedule=Harmonic(), schema=learner.schema),
        OnlineEM(Mixture(Gaussian(), 4)).update(EVENTS[:400]),
        OnlineEM(MODEL, schema=NUMERIC).update(EVENTS[:400]),
        OnlineEM(MODEL).update(EVENTS[:20]),
        OnlineEM(MODEL, schedule=Harmonic()).update(EVENTS[:400]),
        OnlineEM(MODEL),
        BatchEM(MODEL).fit(EVENTS[:400]),
    ]
    before = to_bytes(learner)
    for stranger in strangers:
        with pytest.raises(MergeError):
            learner.merge(stranger)  # type: ignore[arg-type]
    assert to_bytes(learner) == before


def test_a_learner_in_its_warm_up_is_not_forked() -> None:
    learner = OnlineEM(MODEL).update(EVENTS[:50])
    with pytest.raises((MergeError, NotFittedError)):
        learner.fork()
    with pytest.raises((MergeError, NotFittedError)):
        OnlineEM(MODEL).fork()


# BatchEM


def chunks(events: np.ndarray, size: int) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (events[at : at + size] for at in range(0, len(events), size))


@every_family
@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_fit_over_batches_is_fit_in_memory(name: str, missing: float) -> None:
    case = CASES[name]
    batch = draw_batch(case, 240, 30, missing=missing)
    table = case.schema.decode(batch.values)
    options: dict[str, Any] = {"schema": case.schema, "max_iter": 5, "tol": 1e-4}
    model = Mixture(case.family, 3)
    in_memory = BatchEM(model, **options).fit(batch)
    tables = [table.slice(at, 50) for at in range(0, 240, 50)]
    for source in (lambda: iter(tables), [one.to_pylist() for one in tables]):
        read = BatchEM(model, **options).fit(source)
        assert read.n_events == in_memory.n_events == 240
        np.testing.assert_allclose(read.history, in_memory.history, rtol=1e-9)
        np.testing.assert_allclose(read.parameters.weights, in_memory.parameters.weights, rtol=1e-6)
        np.testing.assert_allclose(read.log_prob(batch), in_memory.log_prob(batch), rtol=1e-6, atol=1e-6)


def test_categories_met_in_later_batches_join_the_vocabulary() -> None:
    source = [[{"c": "a"}] * 10, [{"c": "b"}] * 30]
    fitted = BatchEM(Mixture(Categorical(), 1)).fit(source)
    assert fitted.schema is not None
    assert fitted.schema.fields[0].categories == ("a", "b")
    np.testing.assert_allclose(fitted.parameters.components.probability[0], [0.0, 0.25, 0.75], atol=1e-3)


def test_weights_of_batches_that_are_read() -> None:
    generator = np.random.default_rng(31)
    weight = generator.integers(0, 3, size=600).astype(float)
    schema = Schema({"x0": "numeric", "x1": "numeric", "x2": "numeric"})
    pieces = [schema.encode(EVENTS[at : at + 200], weight[at : at + 200]) for at in (0, 200, 400)]
    read = BatchEM(MODEL, max_iter=10).fit(pieces)
    whole = BatchEM(MODEL, max_iter=10).fit(EVENTS[:600], weight=weight)
    np.testing.assert_allclose(read.log_prob(EVENTS), whole.log_prob(EVENTS), rtol=1e-8)
    with pytest.raises(SchemaError, match="weight"):
        BatchEM(MODEL).fit(chunks(EVENTS, 100), weight=weight)


@every_family
@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_history_rises_to_convergence(name: str, assignment: Any) -> None:
    case = CASES[name]
    batch = draw_batch(case, 100, 32, missing=0.1, weighted=True)
    fitted = BatchEM(Mixture(case.family, 3, assignment=assignment), tol=1e-6, max_iter=500).fit(batch)
    assert (np.diff(fitted.history) >= -1e-10 * (1.0 + np.abs(fitted.history[1:]))).all()
    assert fitted.converged
    assert fitted.history[-1] - fitted.history[-2] < 1e-6
    assert len(fitted.history) < 500
    short = BatchEM(Mixture(case.family, 3, assignment=assignment), tol=0.0, max_iter=2).fit(batch)
    assert len(short.history) == 2


def test_more_starts_are_never_worse() -> None:
    events = EVENTS[:300]
    model = Mixture(Gaussian("spherical"), 8)
    single = [BatchEM(model, seed=0, n_init=n).fit(events).history[-1] for n in (1, 2, 5, 10)]
    assert single == sorted(single)
    assert single[-1] > single[0]


def test_seed_decides() -> None:
    model = Mixture(Gaussian("spherical"), 8)
    one, same, other = (BatchEM(model, seed=seed).fit(EVENTS[:300]) for seed in (1, 1, 2))
    assert to_bytes(one) == to_bytes(same)
    assert to_bytes(one) != to_bytes(other)


def test_an_iterator_is_refused() -> None:
    for once in (iter([EVENTS]), chunks(EVENTS, 100)()):
        with pytest.raises(SchemaError, match="function that returns a fresh iterator"):
            BatchEM(MODEL).fit(once)


def test_no_events_are_refused() -> None:
    for nothing in (EVENTS[:0], lambda: iter([]), [EVENTS[:0]], NUMERIC.encode([])):
        with pytest.raises(NotFittedError, match="no event"):
            BatchEM(MODEL).fit(nothing)
    for unreadable in (3, None):
        with pytest.raises(SchemaError):
            BatchEM(MODEL).fit(unreadable)


def test_a_failed_fit_leaves_the_learner_as_before() -> None:
    bad = np.full((3, 3), np.inf)
    fitted = BatchEM(MODEL).fit(EVENTS[:200])
    before = to_bytes(fitted)
    for source in ([EVENTS[:150], bad], lambda: iter([EVENTS, bad]), bad, EVENTS[:10, :2], [EVENTS[:0]]):
        with pytest.raises(ValueError, match=r"."):
            fitted.fit(source)
        assert to_bytes(fitted) == before
    fresh = BatchEM(MODEL)
    with pytest.raises(EventError):
        fresh.fit([EVENTS[:150], bad])
    assert fresh.n_events == 0
    assert fresh.schema is None
    with pytest.raises(NotFittedError):
        fresh.log_prob(EVENTS)


def test_fitting_again_forgets_the_first_fit() -> None:
    twice = BatchEM(MODEL).fit(EVENTS[:200]).fit(EVENTS[200:500])
    assert to_bytes(twice) == to_bytes(BatchEM(MODEL).fit(EVENTS[200:500]))


def test_threads_change_no_result() -> None:
    events = np.tile(EVENTS, (8, 1)) + np.random.default_rng(1).normal(size=(9_600, 3))
    one, two = (BatchEM(MODEL, n_threads=n_threads, max_iter=5).fit(events) for n_threads in (1, 2))
    np.testing.assert_allclose(one.history, two.history, rtol=1e-12)
    np.testing.assert_allclose(one.log_prob(events), two.log_prob(events), rtol=1e-9)


def test_a_long_fit_goes_on_in_compiled_code_and_repeats_itself() -> None:
    program = (
        "import sys, numpy as np; from stream_em import *\n"
        "events = np.random.default_rng(0).normal(size=(30_000, 2))\n"
        "def fit(n): return BatchEM(Mixture(Gaussian(), 2), max_iter=n, tol=0.0).fit([events[:9], events[9:]])\n"
        "fit(30); print('numba' in sys.modules)\n"
        "once = fit(400).history; print('numba' in sys.modules, once == fit(400).history)\n"
        "print(max(abs(after - before) for before, after in zip(once[330:], once[331:])) < 1e-6)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True", "True"], done.stderr


def test_progress_is_shown_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = BatchEM(MODEL, max_iter=3).fit(EVENTS)
    assert capsys.readouterr().out == ""
    shown = BatchEM(MODEL, max_iter=3, progress=True).fit(EVENTS)
    assert "log-posterior" in capsys.readouterr().out
    assert shown.history == quiet.history


def test_two_fits_of_one_start_are_merged() -> None:
    options: dict[str, Any] = {"schema": NUMERIC, "initial_parameters": START, "max_iter": 1}
    one, two = (BatchEM(MODEL, **options).fit(NUMERIC.encode(EVENTS[at : at + 300])) for at in (0, 300))
    whole = BatchEM(MODEL, **options).fit(NUMERIC.encode(EVENTS[:600]))
    merged = one.merge(two)
    assert merged.n_events == 600
    np.testing.assert_allclose(merged.log_prob(EVENTS[:50]), whole.log_prob(EVENTS[:50]), rtol=1e-9)
    with pytest.raises(MergeError):
        one.merge(BatchEM(MODEL, schema=NUMERIC, seed=3).fit(NUMERIC.encode(EVENTS[:100])))


# What a fitted mixture tells


def test_effective_components_is_the_exponential_of_the_entropy() -> None:
    for weights, expected in (([0.25] * 4, 4.0), ([0.5, 0.5], 2.0), ([1.0], 1.0)):
        n_components = len(weights)
        model, parameters = draw_parameters(CASES["gaussian_diag"], n_components, 40)
        fitted = FittedMixture(model, replace(parameters, weights=np.array(weights)), NUMERIC)
        assert fitted.effective_components == pytest.approx(expected)


def test_describe_names_the_fields_that_set_components_apart() -> None:
    generator = np.random.default_rng(41)
    events = [
        {
            "country": ("DE" if generator.random() < 0.95 else "FR") if group else "FR",
            "noise": float(generator.normal()),
            "amount": float(generator.normal(100.0 if group else 10.0, 2.0)),
            "member": bool(generator.random() < (0.9 if group else 0.2)),
        }
        for group in generator.random(600) < 0.7
    ]
    families = {"country": Categorical(), ("noise", "amount"): Gaussian(), "member": Bernoulli()}
    fitted = BatchEM(Mixture(Product(families), 2)).fit(events)
    first, second = fitted.describe()
    assert first.weight > second.weight
    assert first.weight + second.weight == pytest.approx(1.0)
    assert {first.id, second.id} == set(fitted.parameters.component_ids.tolist())
    for described in (first, second):
        assert [field.name for field in described.fields][-1] == "noise"
        effects = [abs(field.effect) for field in described.fields]
        assert effects == sorted(effects, reverse=True)
    texts = {field.name: field.text for field in first.fields}
    assert texts["country"].startswith("'DE' 9")
    assert texts["amount"].startswith("100")
    assert " ± 2" in texts["amount"] or " ± 1.9" in texts["amount"]
    assert texts["member"].startswith("true ")


def test_marginals_and_pair_covariances_agree_with_samples() -> None:
    case = CASES["product"]
    fitted = BatchEM(Mixture(case.family, 2), max_iter=20).fit(draw_batch(case, 400, 42))
    table, components = fitted.sample(40_000, seed=1)
    values = case.schema.encode(table).values
    mean, deviation = fitted.marginals()
    covariance = fitted.pair_covariance(case.schema.position("x"), case.schema.position("y"))
    apart = fitted.pair_covariance(case.schema.position("x"), case.schema.position("clicks"))
    for row, identity in enumerate(fitted.parameters.component_ids):
        mine = values[:, components == identity]
        error = deviation[row] / np.sqrt(mine.shape[1])
        assert (np.abs(mine.mean(axis=1) - mean[row]) < 5.0 * error + 1e-12).all()
        np.testing.assert_allclose(mine.std(axis=1), deviation[row], rtol=0.15)
        pair = mine[[case.schema.position("x"), case.schema.position("y")]]
        np.testing.assert_allclose(covariance[row], np.cov(pair), rtol=0.1, atol=0.1)
        assert apart[row, 0, 1] == 0.0


def test_samples_are_reproducible_tables() -> None:
    fitted = BatchEM(Mixture(Product({"n": Poisson(), "c": Categorical()}), 2)).fit(
        Schema([Field("n", "count"), Field("c", "category")]).encode(
            [{"n": n % 5, "c": "ab"[n % 2]} for n in range(60)], extend=True
        )
    )
    table, components = fitted.sample(50, seed=3)
    again, _ = fitted.sample(50, seed=3)
    assert table.equals(again)
    assert not table.equals(fitted.sample(50, seed=4)[0])
    assert table.schema.names == ["n", "c"]
    assert table["n"].type == pa.int64()
    assert set(table["c"].to_pylist()) <= {"a", "b", "other"}
    assert components.shape == (50,)


def test_a_marginal_may_keep_a_part_of_the_categories_of_one_family() -> None:
    generator = np.random.default_rng(0)
    table = pa.table({"c": generator.choice(["a", "b", "c"], 300), "d": generator.choice(["e", "f"], 300)})
    table = table.append_column("x", pa.array(generator.normal(size=300)))
    fitted = BatchEM(Mixture(Product({("c", "d"): Categorical(), "x": Gaussian()}), 2), seed=0).fit(table)
    gone = pa.nulls(300, pa.string())
    for kept, left_out in (("c", "d"), ("d", "c")):
        blank = table.set_column(table.column_names.index(left_out), left_out, gone)
        marginal = fitted.marginal([kept, "x"])
        np.testing.assert_allclose(marginal.log_prob(table.select([kept, "x"])), fitted.log_prob(blank), rtol=1e-12)


def test_conditional_and_marginal_name_their_fields() -> None:
    fitted = BatchEM(MODEL).fit(EVENTS)
    marginal = fitted.marginal(["x2", "x0"])
    assert marginal.schema is not None
    assert marginal.schema.names == ("x2", "x0")
    np.testing.assert_allclose(
        marginal.log_prob(EVENTS[:, [2, 0]]),
        fitted.log_prob(np.column_stack([EVENTS[:, 0], np.full(len(EVENTS), np.nan), EVENTS[:, 2]])),
        rtol=1e-9,
    )
    conditional = fitted.conditional({"x1": 0.5})
    assert conditional.schema is not None
    assert conditional.schema.names == ("x0", "x2")
    with pytest.raises(SchemaError, match="'nope'"):
        fitted.marginal(["nope"])
    with pytest.raises(SchemaError, match="none is left"):
        fitted.conditional({"x0": 1.0, "x1": 1.0, "x2": 1.0})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="x1"):
            fitted.conditional({"x1": value})


def test_a_batch_of_events_is_scored_as_it_was_encoded() -> None:
    fitted = BatchEM(MODEL, schema=NUMERIC).fit(NUMERIC.encode(EVENTS))
    batch = Batch(EVENTS[:20].T, NUMERIC)
    assert np.array_equal(fitted.log_prob(batch), fitted.log_prob(EVENTS[:20]))


# What a stream in the wild brings


def test_values_too_small_to_square_are_constants() -> None:
    events = np.c_[np.random.default_rng(0).normal(size=1_000), np.full(1_000, 1e-170)]
    for kind in ("full", "tied", "diag", "spherical"):
        learner = OnlineEM(Mixture(Gaussian(kind), 2)).update(events)  # type: ignore[arg-type]
        assert np.isfinite(learner.parameters.weights).all()
        assert np.isfinite(learner.log_prob(events)).all()


def test_an_update_that_fails_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = OnlineEM(MODEL, warm_up=100).update(EVENTS[:50])
    before = to_bytes(learner)

    def fail(*_: object) -> None:
        raise ArithmeticError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr("stream_em.learners.online.seed_parameters", fail)
        with pytest.raises(ArithmeticError):
            learner.update(EVENTS[50:400])
    assert to_bytes(learner) == before
    expected = OnlineEM(MODEL, warm_up=100).update(EVENTS[:50]).update(EVENTS[50:400])
    assert to_bytes(learner.update(EVENTS[50:400])) == to_bytes(expected)


def test_a_stream_that_can_be_read_once_is_learned_whole() -> None:
    table = pa.table({"x": EVENTS[:, 0], "y": EVENTS[:, 1]})
    learner = OnlineEM(MODEL).update(table.to_reader())
    assert learner.n_events == len(EVENTS)
    assert BatchEM(MODEL, max_iter=2).fit(table.to_reader()).n_events == len(EVENTS)


def test_the_index_of_a_frame_is_no_field() -> None:
    frame = pd.DataFrame({"x": EVENTS[:, 0], "y": EVENTS[:, 1]})
    filtered = frame[frame["x"] > frame["x"].median()]
    learner = OnlineEM(MODEL, warm_up=50).update(filtered)
    assert learner.schema is not None
    assert learner.schema.names == ("x", "y")
    assert learner.log_prob(frame.sample(7, random_state=0)).shape == (7,)


def test_times_may_be_given_as_dates() -> None:
    schedule = HalfLife(3_600.0)
    stamps = pd.Series(pd.date_range("2026-01-01", periods=len(EVENTS), freq="s", tz="Europe/Berlin"))
    seconds = stamps.astype("int64").to_numpy() / (1e9 if stamps.dt.unit == "ns" else 1e6)
    expected = OnlineEM(MODEL, schedule=schedule).update(EVENTS, time=seconds)
    for given in (stamps, stamps.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy(), list(stamps), stamps.map(str)):
        learner = OnlineEM(MODEL, schedule=schedule).update(EVENTS, time=given)
        np.testing.assert_allclose(learner.parameters.components.mean, expected.parameters.components.mean, rtol=1e-9)


def test_an_event_without_weight_moves_no_clock() -> None:
    schedule = HalfLife(10.0)
    weight, time = np.ones(400), np.arange(400.0)
    weight[-1], time[-1] = 0.0, 1e9
    learner = OnlineEM(MODEL, schedule=schedule, batch_size=50).update(EVENTS[:400], weight=weight, time=time)
    plain = OnlineEM(MODEL, schedule=schedule, batch_size=50).update(EVENTS[:399], time=time[:399])
    np.testing.assert_allclose(learner.parameters.components.mean, plain.parameters.components.mean, rtol=1e-9)


def test_forks_may_meet_new_categories() -> None:
    schema = Schema({"x": "numeric", "c": "category"})
    model = Mixture(Product({"x": Gaussian(), "c": Categorical()}), 2)
    known = [{"x": float(i % 2) * 9.0, "c": "ab"[i % 2]} for i in range(300)]
    learner = OnlineEM(model, schema=schema, schedule=Harmonic()).update(known)
    fork, idle, other = learner.fork(), learner.fork(), learner.fork()
    fork.update([{"x": 0.0, "c": "new"}] * 30).update([{"x": 0.0, "c": "new"}] * 30)
    other.update(known[:50])
    merged = other.merge(fork).merge(idle)
    assert merged.n_events == 110
    assert merged.schema is not None
    assert merged.schema.fields[1].categories == ("a", "b", "new")
    assert merged.statistics is not None
    assert merged.statistics.total_weight == pytest.approx(110)


def test_a_state_is_not_merged_with_itself() -> None:
    learner = OnlineEM(MODEL).update(EVENTS[:400])
    with pytest.raises(MergeError, match="identical"):
        learner.merge(from_bytes(to_bytes(learner)))  # type: ignore[arg-type]


def test_nearly_collinear_fields_keep_their_precision() -> None:
    correlation = 1.0 - 1e-10
    covariance = np.array([[[1.0, correlation], [correlation, 1.0]]])
    parameters = MixtureParameters(np.ones(1), GaussianParameters(np.zeros((1, 2)), covariance), np.zeros(1, np.int64))
    schema = Schema({"x": "numeric", "y": "numeric"})
    fitted = FittedMixture(Mixture(Gaussian(), 1), parameters, schema)
    events = np.array([[1.5, 1.5], [2.0, 2.0 + 1e-5], [-1.0, -1.0 - 2e-5]])
    # In the directions (1, 1) and (1, -1), where nothing cancels.
    along, across = events.sum(axis=1), np.array([0.0, -1e-5, 2e-5])
    expected = -0.5 * (along**2 / (2 + 2 * correlation) + across**2 / (2 - 2 * correlation))
    expected -= 0.5 * math.log((1 - correlation) * (1 + correlation)) + math.log(2 * math.pi)
    np.testing.assert_allclose(fitted.log_prob(events), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "tied", "diag"])
def test_a_field_without_a_value_in_the_warm_up_is_taken_in_when_it_comes(kind: Any) -> None:
    generator = np.random.default_rng(4)
    early = np.c_[generator.normal(size=400), np.full(400, np.nan)]
    late = np.c_[generator.normal(size=2_000), generator.normal(1e6, 2.0, 2_000)]
    learner = OnlineEM(Mixture(Gaussian(kind), 1), schedule=Harmonic()).update(early)
    learner = from_bytes(to_bytes(learner))  # type: ignore[assignment]
    learner.update(late)
    mean, deviation = learner.marginals()
    assert mean[0, 1] == pytest.approx(1e6, abs=0.5)
    assert deviation[0, 1] == pytest.approx(2.0, rel=0.1)
    # The entropy of two independent normals with deviations 1 and 2.
    assert learner.log_prob(late).mean() == pytest.approx(-(math.log(2 * math.pi) + 1 + math.log(2)), abs=0.1)


def test_a_single_component_is_described_by_its_commonest_category() -> None:
    events = [{"c": "rare"}, *[{"c": "usual"}] * 9]
    fitted = BatchEM(Mixture(Categorical(), 1)).fit(events)
    assert fitted.describe()[0].fields[0].text == "'usual' 90%"


def test_m_steps_go_on_at_once_after_a_short_warm_up_or_a_fit() -> None:
    short = OnlineEM(MODEL, warm_up=10).update(EVENTS[:10])
    first = short.parameters
    assert not np.array_equal(short.update(EVENTS[10:12]).parameters.components.mean, first.components.mean)
    fitted = BatchEM(MODEL, seed=0).fit(EVENTS[:15])
    assert fitted.statistics is not None
    resumed = OnlineEM(MODEL, schema=fitted.schema, initial_parameters=fitted.parameters)
    resumed.resume(fitted.statistics, 15).update(EVENTS[15:17])
    assert not np.array_equal(resumed.parameters.components.mean, fitted.parameters.components.mean)


def test_a_fit_is_resumed_under_event_time_once_its_statistics_have_one() -> None:
    fitted = BatchEM(MODEL, seed=0).fit(EVENTS)
    assert fitted.statistics is not None
    learner = OnlineEM(
        MODEL, schema=fitted.schema, initial_parameters=fitted.parameters, schedule=HalfLife(60.0), first_m_step=1
    )
    with pytest.raises(ValueError, match=r"half_life=None and the schedule 60\.0"):
        learner.resume(fitted.statistics, len(EVENTS))
    learner.resume(replace(fitted.statistics, half_life=60.0, time=0.0), len(EVENTS))
    learner.update(EVENTS[:1], time=[60.0])
    assert learner.statistics is not None
    assert learner.statistics.total_weight == pytest.approx(len(EVENTS) / 2 + 1)


def test_a_warm_up_that_cannot_end_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = OnlineEM(MODEL, schedule=HalfLife(5.0, max_ahead=1.0), window=300, batch_size=10, warm_up=200).update(
        EVENTS[:50], time=np.append(np.arange(49.0), 1e6)
    )
    before, n_ahead = to_bytes(learner), learner.n_ahead
    with monkeypatch.context() as patch:
        patch.setattr(Mixture, "m_step", lambda *_, **__: (_ for _ in ()).throw(NumericalError("no M-step")))
        with pytest.raises(NumericalError):
            learner.finish_warm_up()
    assert (to_bytes(learner), learner.n_ahead) == (before, n_ahead)
    learner.finish_warm_up()
    assert not learner.warming_up


@pytest.mark.parametrize("schedule", [RobbinsMonro(0.6), Constant(0.2)])
def test_events_without_weight_do_not_move_the_step_size(schedule: Schedule) -> None:
    plain, idle = (OnlineEM(MODEL, schedule=schedule, batch_size=100).update(EVENTS[:400]) for _ in range(2))
    idle.update(EVENTS, np.zeros(len(EVENTS)))
    for learner in (plain, idle):
        learner.update(EVENTS[400:500])
    assert idle.n_events == plain.n_events == 500
    assert to_bytes(idle) == to_bytes(plain)


@pytest.mark.parametrize("read", [False, True])
def test_events_without_any_weight_cannot_be_fitted(read: bool) -> None:
    weight = np.zeros(100)
    batch = NUMERIC.encode(EVENTS[:100], weight)
    with pytest.raises(NotFittedError, match="no event with weight"):
        BatchEM(MODEL).fit([batch, batch] if read else batch)


def test_a_source_that_can_be_read_only_once_is_named() -> None:
    once = iter([EVENTS[:100]])
    with pytest.raises(SchemaError, match="could be read only once"):
        BatchEM(MODEL).fit(lambda: once)


def test_a_batch_of_an_earlier_vocabulary_is_learned_with_and_without_weights() -> None:
    schema = Schema([Field("c", "category", ("a", "b"))])
    learners = [OnlineEM(Mixture(Categorical(), 1), schema=schema, warm_up=20) for _ in range(2)]
    early = learners[0].encode([{"c": "a"}, {"c": "b"}])
    for learner in learners:
        learner.update([{"c": "ab"[index % 2]} for index in range(30)] + [{"c": "new"}])
    learners[0].update(early)
    learners[1].update(early, np.ones(2))
    assert learners[0].n_events == learners[1].n_events == 33
    assert_parameters_equal(learners[0].parameters, learners[1].parameters, learners[0]._bound_model().family)


def test_nothing_to_condition_on_is_named() -> None:
    learner = OnlineEM(MODEL).update(EVENTS[:300])
    with pytest.raises(SchemaError, match="no field is given"):
        learner.conditional({})


def test_a_field_without_a_value_in_the_warm_up_keeps_no_other_from_compiled_code() -> None:
    schema = Schema([Field("x", "numeric"), Field("c", "category")])
    model = Mixture(Product({"x": Gaussian(), "c": Categorical()}), 2)
    learner, reference = (OnlineEM(model, schema=schema, warm_up=50) for _ in range(2))
    events: list[dict[str, Any]] = [{"x": float(index % 7), "c": None} for index in range(60)]
    for event in events:
        learner.update(event)
        reference.update([event])
    assert learner.kernel() is not None
    for event in [*events[:10], {"x": 1.0, "c": "a"}, *events[:3]]:
        learner.update(event)
        reference.update([event])
    assert learner.statistics is not None
    assert reference.statistics is not None
    assert_statistics_close(learner.statistics, reference.statistics)


def test_a_copy_in_the_warm_up_takes_nothing_from_the_original() -> None:
    events = np.random.default_rng(0).normal(size=(90, 2))
    learner = OnlineEM(Mixture(Gaussian(), 2), seed=0).update(events[:30])
    left = learner.warm_up_left
    copy(learner).update(events[30:])
    assert learner.warm_up_left == left
    assert learner.n_events == 30
