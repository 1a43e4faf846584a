"""The laws that every family and every way of combining statistics must keep."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cases import (
    CASES,
    GAUSSIAN_CASES,
    NUMERIC,
    Case,
    assert_parameters_equal,
    assert_sound,
    assert_statistics_close,
    batches,
    draw_batch,
    draw_parameters,
    draw_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_em import (
    AdaptiveComponents,
    Batch,
    BatchEM,
    Constant,
    ExpandingTruncations,
    Field,
    Gaussian,
    HalfLife,
    Harmonic,
    Mixture,
    MixtureParameters,
    OnlineEM,
    RobbinsMonro,
    Schema,
    Statistics,
)
from stream_em.methods import FIEM, Incremental, VarianceReduced
from stream_em.store import from_bytes, to_bytes

every_family = pytest.mark.parametrize("name", CASES)
SEEDS = st.integers(0, 10**6)


def expected_statistics(data: st.DataObject, case: Case, n: int, *, half_life: float | None) -> list[Statistics]:
    """Statistics of `n` batches under the same parameters, each at a reference time of its own."""
    model, parameters = draw_parameters(case, data.draw(st.integers(1, 4)), data.draw(SEEDS))
    found = []
    for _ in range(n):
        statistics = model.e_step(parameters, data.draw(batches(case)))
        if half_life is not None:
            time = data.draw(st.integers(-20, 20))
            statistics = replace(statistics, half_life=half_life, time=float(time))
        found.append(statistics)
    return found


# Law 1: merge has an identity and is associative and commutative, shuffled event times included.


@every_family
@given(data=st.data(), half_life=st.sampled_from([None, 0.7, 5.0]))
def test_merge_is_associative(name: str, data: st.DataObject, half_life: float | None) -> None:
    a, b, c = expected_statistics(data, CASES[name], 3, half_life=half_life)
    assert_statistics_close(a.merge(b).merge(c), a.merge(b.merge(c)))


@every_family
@given(data=st.data(), half_life=st.sampled_from([None, 0.7, 5.0]))
def test_merge_is_commutative_in_any_order_of_events_and_times(
    name: str, data: st.DataObject, half_life: float | None
) -> None:
    parts = expected_statistics(data, CASES[name], 4, half_life=half_life)
    order = data.draw(st.permutations(range(4)))
    in_order, shuffled = parts[0], parts[order[0]]
    for index in range(1, 4):
        in_order, shuffled = in_order.merge(parts[index]), shuffled.merge(parts[order[index]])
    assert_statistics_close(shuffled, in_order)


@every_family
@given(data=st.data(), half_life=st.sampled_from([None, 3.0]))
def test_merge_has_an_identity(name: str, data: st.DataObject, half_life: float | None) -> None:
    (statistics,) = expected_statistics(data, CASES[name], 1, half_life=half_life)
    zero = statistics.zero()
    assert zero.total_weight == 0.0
    assert zero.time is None
    for merged in (statistics.merge(zero), zero.merge(statistics)):
        assert_statistics_close(merged, statistics, tolerance=0.0)
        assert merged.time == statistics.time


@every_family
@given(data=st.data())
def test_merge_aligns_components_by_id(name: str, data: st.DataObject) -> None:
    a, b = expected_statistics(data, CASES[name], 2, half_life=None)
    order = np.array(data.draw(st.permutations(range(len(a.component_ids)))))
    assert_statistics_close(a.merge(b.select(order)), a.merge(b))
    assert_statistics_close(a.select(order).merge(b), a.merge(b).select(order))


# Law 2: e_step(a ++ b) = merge(e_step(a), e_step(b)), however the events are cut into blocks.


@every_family
@given(data=st.data())
def test_blocks_may_be_cut_anywhere(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, data.draw(st.integers(1, 4)), data.draw(SEEDS))
    batch = data.draw(batches(case, min_events=1))
    cuts = sorted(data.draw(st.lists(st.integers(0, batch.n_events), max_size=4)))
    merged = None
    for start, stop in zip([0, *cuts], [*cuts, batch.n_events]):
        piece = model.e_step(parameters, batch.select(slice(start, stop)))
        merged = piece if merged is None else merged.merge(piece)
    assert merged is not None
    assert_statistics_close(merged, model.e_step(parameters, batch))


@every_family
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_large_batches_threads_and_compiled_code_give_the_statistics_of_small_blocks(name: str, missing: float) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, 3, 5)
    batch = draw_batch(case, 9_000, 6, missing=missing, weighted=True)
    whole = model.e_step(parameters, batch)
    pieces = [model.e_step(parameters, batch.select(slice(at, at + 900))) for at in range(0, 9_000, 900)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merge(piece)
    assert_statistics_close(whole, merged)
    assert_statistics_close(model.e_step(parameters, batch, n_threads=2), whole)
    assert_statistics_close(model.e_step(parameters, batch, compiled=True), whole)


@every_family
@given(data=st.data())
def test_order_of_events_does_not_matter(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, 3, data.draw(SEEDS))
    batch = data.draw(batches(case, min_events=1))
    order = np.random.default_rng(data.draw(SEEDS)).permutation(batch.n_events)
    assert_statistics_close(model.e_step(parameters, batch.select(order)), model.e_step(parameters, batch))
    np.testing.assert_allclose(
        model.log_prob(parameters, batch.select(order)), model.log_prob(parameters, batch)[order], rtol=1e-9, atol=1e-9
    )


# Law 3: an integer weight equals repetition; weight zero equals absence.


@every_family
@given(data=st.data(), hard=st.booleans())
def test_integer_weights_are_repetitions(name: str, data: st.DataObject, hard: bool) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(
        case, data.draw(st.integers(1, 4)), data.draw(SEEDS), assignment="hard" if hard else "soft"
    )
    batch = replace(data.draw(batches(case, min_events=1)), weight=None)
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=batch.n_events, max_size=batch.n_events)))
    weighted = replace(batch, weight=times.astype(float))
    repeated = batch.select(np.repeat(np.arange(batch.n_events), times))
    assert_statistics_close(model.e_step(parameters, weighted), model.e_step(parameters, repeated))


@every_family
@given(data=st.data())
def test_weight_zero_is_absence_even_of_outliers(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, 3, data.draw(SEEDS))
    batch = replace(data.draw(batches(case, min_events=1)), weight=None)
    outlier = np.array([[1.0 if field.kind in ("flag", "category") else 1e12] for field in case.schema.fields])
    values = np.concatenate([batch.values, outlier], axis=1)
    weight = np.append(np.ones(batch.n_events), 0.0)
    assert_statistics_close(
        model.e_step(parameters, Batch(values, case.schema, weight)), model.e_step(parameters, batch), tolerance=1e-8
    )


@every_family
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_weights_are_repetitions_in_the_first_parameters_too(name: str, missing: float) -> None:
    case = CASES[name]
    batch = draw_batch(case, 50, 3, missing=missing)
    generator = np.random.default_rng(4)
    times = generator.integers(0, 4, size=50)
    responsibilities = generator.dirichlet(np.ones(3), size=50).T
    model = Mixture(case.family, 3)
    positions = np.repeat(np.arange(50), times)
    weighted = model.initialize(replace(batch, weight=times.astype(float)), responsibilities)
    repeated = model.initialize(batch.select(positions), responsibilities[:, positions])
    probe = draw_batch(case, 20, 8)
    bound = model.bind(case.schema)
    np.testing.assert_allclose(bound.log_prob(weighted, probe), bound.log_prob(repeated, probe), rtol=1e-9)


# Law 4: scale distributes over merge.


@every_family
@given(data=st.data(), factor=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 7.0]), half_life=st.sampled_from([None, 2.0]))
def test_scale_distributes_over_merge(name: str, data: st.DataObject, factor: float, half_life: float | None) -> None:
    a, b = expected_statistics(data, CASES[name], 2, half_life=half_life)
    assert_statistics_close(a.merge(b).scale(factor), a.scale(factor).merge(b.scale(factor)))


@every_family
@given(data=st.data(), factor=st.sampled_from([0.25, 1.0, 3.0]))
def test_scale_is_the_weight_of_every_event(name: str, data: st.DataObject, factor: float) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, 3, data.draw(SEEDS))
    batch = data.draw(batches(case))
    weight = np.ones(batch.n_events) if batch.weight is None else batch.weight
    heavier = model.e_step(parameters, replace(batch, weight=factor * weight))
    assert_statistics_close(model.e_step(parameters, batch).scale(factor), heavier)


@every_family
@given(data=st.data(), steps=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=3))
def test_discounts_compose(name: str, data: st.DataObject, steps: list[float]) -> None:
    (statistics,) = expected_statistics(data, CASES[name], 1, half_life=1.5)
    assert statistics.time is not None
    time, by_steps = statistics.time, statistics
    for step in steps:
        time += step
        by_steps = by_steps.discount_to(time)
    assert_statistics_close(by_steps, statistics.discount_to(time))


# Law 5: the log-posterior never decreases over batch EM iterations.


@every_family
@given(data=st.data(), assignment=st.sampled_from(["soft", "hard"]), prior_weight=st.sampled_from([1e-3, 0.01, 2.0]))
def test_log_posterior_never_decreases(name: str, data: st.DataObject, assignment: str, prior_weight: float) -> None:
    case = CASES[name]
    options = {"assignment": assignment, "prior_weight": prior_weight}
    model, start = draw_parameters(case, data.draw(st.integers(1, 4)), data.draw(SEEDS), **options)
    batch = data.draw(batches(case, min_events=1, max_events=60))
    prior = None
    objectives = []
    parameters = start
    for _ in range(12):
        statistics = model.e_step(parameters, batch)
        prior = model.prior(statistics) if prior is None else prior
        objectives.append(statistics.log_likelihood + model.log_prior(parameters, prior))
        parameters = model.m_step(statistics, prior)
    gains = np.diff(objectives)
    assert (gains >= -1e-8 * (1.0 + np.abs(objectives[1:]))).all(), objectives
    assert objectives[-1] > objectives[0]
    assert_sound(model, parameters, case.schema)


# Law 6: adding 1e8 to a feature leaves covariances unchanged.


@pytest.mark.parametrize("name", [*GAUSSIAN_CASES, "product", "product_tied"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("offset", [1e4, 1e8, -1e8])
def test_covariances_do_not_depend_on_an_offset(name: str, missing: float, offset: float) -> None:
    case = CASES[name]
    generator = np.random.default_rng(11)
    batch = draw_batch(case, 300, 12, missing=missing, weighted=True)
    # On this grid the offset is added without rounding, so only the library could lose anything.
    numeric = np.array([field.kind == "numeric" for field in case.schema.fields])
    values = np.where(numeric[:, None], np.round(batch.values * 2**20) / 2**20, batch.values)
    moved = values.copy()
    moved[np.flatnonzero(numeric)[:2]] += offset
    responsibilities = generator.dirichlet(np.full(3, 0.3), size=300).T
    model = Mixture(case.family, 3).bind(case.schema)
    fits = []
    for block in (values, moved):
        cut = replace(batch, values=block)
        parameters = model.initialize(cut, responsibilities)
        for _ in range(5):
            parameters = model.m_step(model.e_step(parameters, cut))
        fits.append((parameters, model.family.moments(parameters.components)))
    (here, (mean, variance)), (there, (moved_mean, moved_variance)) = fits
    np.testing.assert_allclose(moved_variance, variance, rtol=1e-6)
    np.testing.assert_allclose(there.weights, here.weights, rtol=1e-6)
    shift = np.zeros(len(values))
    shift[np.flatnonzero(numeric)[:2]] = offset
    np.testing.assert_allclose(moved_mean - shift, mean, atol=1e-6, rtol=1e-6)
    if isinstance(case.family, Gaussian):
        np.testing.assert_allclose(
            case.family.covariances(there.components), case.family.covariances(here.components), rtol=1e-6, atol=1e-6
        )


# Law 7: shuffled keys or columns give the same result.


@every_family
@given(data=st.data())
def test_order_of_keys_and_columns_does_not_matter(name: str, data: st.DataObject) -> None:
    schema = CASES[name].schema
    batch = data.draw(batches(CASES[name], min_events=1, max_events=10))
    table = schema.decode(batch.values)
    order = data.draw(st.permutations(schema.names))
    generator = np.random.default_rng(data.draw(SEEDS))
    events = []
    for event in table.to_pylist():
        # A missing value may be spelt by its absence, and keys come in any order.
        present = {key: value for key, value in event.items() if value is not None or generator.random() < 0.5}
        events.append({key: present[key] for key in generator.permutation(list(present)).tolist()})
    for form in (table.select(order), table.select(order).to_pandas(), events):
        np.testing.assert_array_equal(schema.encode(form).values, batch.values)


@every_family
@given(data=st.data())
def test_order_of_the_schema_does_not_matter(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    batch = data.draw(batches(case, min_events=5))
    order = np.array(data.draw(st.permutations(range(len(case.schema)))))
    shuffled = Batch(batch.values[order], Schema([case.schema.fields[at] for at in order]), batch.weight)
    responsibilities = np.random.default_rng(data.draw(SEEDS)).dirichlet(np.ones(3), size=batch.n_events).T
    model = Mixture(case.family, 3)
    results = []
    for block in (batch, shuffled):
        bound = model.bind(block.schema)
        parameters = bound.m_step(bound.e_step(bound.initialize(block, responsibilities), block))
        results.append((bound.posterior(parameters, block), parameters.weights))
    np.testing.assert_allclose(results[1][0].log_prob, results[0][0].log_prob, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(results[1][0].responsibilities, results[0][0].responsibilities, atol=1e-7)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-7)


# Law 8: every hyperparameter changes some output.

EVENTS = draw_values(NUMERIC, 600, np.random.default_rng(21)).T
TIMES = np.linspace(0.0, 10.0, 600)
START = draw_parameters(CASES["gaussian_full"], 3, 23)[1]


def online(model: Mixture | None = None, **options: Any) -> list[float]:
    """Mean log-density after two updates of a stream, by default with a short warm-up and small batches."""
    options = {"warm_up": 100, "batch_size": 50, **options}
    learner = OnlineEM(Mixture(Gaussian(), 3) if model is None else model, **options)
    learner.update(EVENTS[:450], time=TIMES[:450])
    return [float(learner.log_prob(EVENTS).mean())]


def adaptive(**given: Any) -> list[float]:
    structure = AdaptiveComponents(**{"recent_events": 100, "tail": 0.2, **given})
    learner = OnlineEM(Mixture(Gaussian("diag"), 2), structure=structure, warm_up=100, batch_size=50)
    learner.update(EVENTS).update(-EVENTS)
    return [float(learner.log_prob(EVENTS).mean())]


def shaken(truncation: ExpandingTruncations | None) -> list[float]:
    learner = OnlineEM(Mixture(Gaussian(), 3), truncation=truncation, warm_up=100, batch_size=50).update(EVENTS)
    for _ in range(2):
        learner.update(np.full((50, 3), 1e5))
    return [float(learner.log_prob(EVENTS).mean())]


def few_events(**options: Any) -> list[float]:
    learner = OnlineEM(Mixture(Gaussian(), 3), schema=NUMERIC, initial_parameters=START, **options)
    return [float(learner.update(EVENTS[:25]).log_prob(EVENTS).mean())]


def unknown_field(unknown: Any) -> list[float]:
    learner = OnlineEM(Mixture(Gaussian(), 1), unknown=unknown, warm_up=1).update({"x": 1.0})
    try:
        learner.update({"x": 2.0, "y": 3.0})
    except ValueError:
        return [-1.0]
    return [float(len(learner.schema or ()))]


def in_batch(model: Mixture | None = None, **options: Any) -> list[float]:
    learner = BatchEM(Mixture(Gaussian(), 3) if model is None else model, **{"max_iter": 10, **options})
    return [float(learner.fit(EVENTS).log_prob(EVENTS).mean()), float(len(learner.history))]


def from_pieces(**options: Any) -> list[float]:
    learner = BatchEM(Mixture(Gaussian(), 3), max_iter=2, **options).fit([EVENTS[:300], EVENTS[300:]])
    return [float(learner.log_prob(EVENTS).mean())]


def by_blocks(method):
    return in_batch(method=method, max_iter=3, tol=0.0)


HYPERPARAMETERS: dict[type, dict[str, tuple[Callable[..., list[float]], Any, Any]]] = {
    OnlineEM: {
        "model": (online, Mixture(Gaussian(), 3), Mixture(Gaussian("diag"), 3)),
        "schedule": (online, Harmonic(), RobbinsMonro()),
        "schema": (online, None, Schema({"x": "numeric", "y": "numeric", "z": "duration"})),
        "unknown": (unknown_field, "refuse", "ignore"),
        "batch_size": (online, 10, 100),
        "warm_up": (online, 50, 200),
        "initial_parameters": (lambda **given: online(schema=NUMERIC, **given), None, START),
        "first_m_step": (few_events, 20, 30),
        "window": (online, None, 300),
        "structure": (online, None, AdaptiveComponents()),
        "truncation": (shaken, None, ExpandingTruncations()),
        "averaging": (online, False, True),
        "seed": (lambda **given: online(Mixture(Gaussian("spherical"), 12), **given), 0, 1),
    },
    BatchEM: {
        "model": (in_batch, Mixture(Gaussian(), 3), Mixture(Gaussian(), 4)),
        "method": (lambda **given: in_batch(tol=0.0, **given), None, Incremental()),
        "schema": (in_batch, None, Schema({"x": "numeric", "y": "numeric", "z": "duration"})),
        "max_iter": (lambda **given: in_batch(tol=0.0, **given), 2, 4),
        "tol": (in_batch, 0.0, 1e-1),
        "n_init": (lambda **given: in_batch(Mixture(Gaussian("spherical"), 12), **given), 1, 8),
        "initial_parameters": (lambda **given: in_batch(schema=NUMERIC, **given), None, START),
        "seed_events": (from_pieces, 20, 600),
        "seed": (lambda **given: in_batch(Mixture(Gaussian("spherical"), 12), **given), 0, 1),
    },
    Mixture: {
        "family": (lambda family: in_batch(Mixture(family, 3)), Gaussian(), Gaussian("tied")),
        "n_components": (lambda n_components: in_batch(Mixture(Gaussian(), n_components)), 2, 3),
        "prior_weight": (lambda prior_weight: in_batch(Mixture(Gaussian(), 3, prior_weight)), 0.01, 1.0),
        "assignment": (lambda assignment: in_batch(Mixture(Gaussian(), 3, assignment=assignment)), "soft", "hard"),
    },
    Gaussian: {
        "covariance_type": (lambda covariance_type: in_batch(Mixture(Gaussian(covariance_type), 3)), "full", "tied"),
        "reg_covar": (lambda reg_covar: in_batch(Mixture(Gaussian(reg_covar=reg_covar), 3)), 0.0, 0.1),
    },
    Incremental: {"batch_size": (lambda **given: by_blocks(Incremental(**given)), 50, 100)},
    VarianceReduced: {
        "step": (lambda **given: by_blocks(VarianceReduced(**given)), None, 0.1),
        "batch_size": (lambda **given: by_blocks(VarianceReduced(**given)), 50, 100),
        "seed": (lambda **given: by_blocks(VarianceReduced(**given)), 0, 1),
    },
    FIEM: {
        "step": (lambda **given: by_blocks(FIEM(**given)), None, 0.1),
        "batch_size": (lambda **given: by_blocks(FIEM(**given)), 50, 100),
        "seed": (lambda **given: by_blocks(FIEM(**given)), 0, 1),
    },
    RobbinsMonro: {
        "alpha": (lambda alpha: online(schedule=RobbinsMonro(alpha)), 0.6, 0.9),
        "offset": (lambda offset: online(schedule=RobbinsMonro(offset=offset)), 0.0, 5.0),
    },
    Constant: {"value": (lambda value: online(schedule=Constant(value)), 0.2, 0.5)},
    HalfLife: {
        "half_life": (lambda half_life: online(schedule=HalfLife(half_life)), 0.1, 1.0),
        "max_ahead": (lambda max_ahead: online(schedule=HalfLife(1.0, max_ahead)), None, 0.01),
    },
    AdaptiveComponents: {
        "births": (adaptive, True, False),
        "merges": (adaptive, True, False),
        "splits": (adaptive, True, False),
        "max_components": (adaptive, 2, 20),
        "recent_events": (adaptive, 100, 200),
        "tail": (adaptive, 0.05, 0.4),
    },
    ExpandingTruncations: {
        "radius": (lambda radius: shaken(truncation=ExpandingTruncations(radius)), 100.0, 1e9),
        "growth": (lambda growth: shaken(truncation=ExpandingTruncations(growth=growth)), 10.0, 1e9),
    },
    Field: {
        "name": (lambda name: Schema([Field(name, "numeric")]).encode({"a": 1.0}).values.ravel().tolist(), "a", "b"),
        "kind": (lambda kind: in_batch(schema=Schema([*NUMERIC.fields[:2], Field("z", kind)])), "numeric", "count"),
        "categories": (lambda categories: [float(Field("c", "category", categories).code("b"))], (), ("a", "b")),
        "max_categories": (
            lambda max_categories: [
                float(Field("c", "category", max_categories=max_categories).grown(["a", "b"]).n_codes)
            ],
            1,
            2,
        ),
    },
}
# These change how fast or how visibly the result is reached, never the result.
NOT_STATISTICAL = {BatchEM: {"n_threads", "progress"}}


@pytest.mark.parametrize(
    ("owner", "parameter"), [(owner, parameter) for owner, found in HYPERPARAMETERS.items() for parameter in found]
)
def test_every_hyperparameter_changes_some_output(owner: type, parameter: str) -> None:
    output, one, other = HYPERPARAMETERS[owner][parameter]
    results = []
    for value in (one, other):
        try:
            results.append(output(**{parameter: value}))
        except ValueError:
            results.append([float("-inf")])
    assert results[0] != results[1]


@pytest.mark.parametrize("owner", HYPERPARAMETERS)
def test_no_hyperparameter_is_left_untested(owner: type) -> None:
    known = HYPERPARAMETERS[owner].keys() | NOT_STATISTICAL.get(owner, set())
    assert set(inspect.signature(owner).parameters) == known


# Law 9: a snapshot round trip is bitwise.


@every_family
@settings(max_examples=5)
@given(data=st.data(), warm=st.booleans())
def test_snapshot_round_trip_is_bitwise(name: str, data: st.DataObject, warm: bool) -> None:
    case = CASES[name]
    batch = data.draw(batches(case, min_events=12))
    learner = OnlineEM(Mixture(case.family, 3), schema=case.schema, warm_up=10 if warm else 1000, batch_size=7)
    learner.update(batch)
    again = from_bytes(to_bytes(learner))
    assert to_bytes(again) == to_bytes(learner)
    assert_parameters_equal(again.parameters, learner.parameters, learner.model.bind(case.schema).family)
    more = draw_batch(case, 9, data.draw(SEEDS))
    assert isinstance(again, OnlineEM)
    again.update(more)
    learner.update(more)
    assert to_bytes(again) == to_bytes(learner)


# Law 11: data sampled from a model, refitted, gives the model back.


def separate(case: Case) -> MixtureParameters:
    """Parameters of two components, one for each of two groups of events that differ in every field."""
    generator = np.random.default_rng(31)
    values = draw_values(case.schema, 600, generator)
    group = np.arange(600) < 400
    for row, field in zip(values, case.schema.fields):
        if field.kind == "numeric":
            row[:] = generator.normal(size=600) + np.where(group, 0.0, 8.0)
        elif field.kind == "flag":
            row[:] = generator.random(600) < np.where(group, 0.1, 0.9)
        elif field.kind == "category":
            row[:] = np.where(generator.random(600) < 0.9, np.where(group, 1.0, 2.0), row)
        elif field.kind == "count":
            row[:] = generator.poisson(np.where(group, 2.0, 30.0))
        else:
            row[:] = generator.exponential(np.where(group, 0.1, 10.0))
    responsibilities = np.stack([group, ~group]).astype(float)
    return Mixture(case.family, 2).initialize(Batch(values, case.schema), responsibilities)


@every_family
@pytest.mark.parametrize("learning", ["batch", "online"])
def test_refitting_a_sample_gives_the_model_back(name: str, learning: str) -> None:
    case = CASES[name]
    truth = separate(case)
    model = Mixture(case.family, 2).bind(case.schema)
    n_events = 6_000
    values, components = model.sample(truth, n_events, np.random.default_rng(32))
    np.testing.assert_allclose(np.bincount(components) / n_events, truth.weights, atol=4 * 0.5 / n_events**0.5)
    sample = Batch(values, case.schema)
    learner: BatchEM | OnlineEM
    if learning == "batch":
        learner = BatchEM(Mixture(case.family, 2), schema=case.schema, tol=1e-7).fit(sample)
    else:
        schedule = Harmonic()
        learner = OnlineEM(Mixture(case.family, 2), schema=case.schema, schedule=schedule, batch_size=200)
        learner.update(sample)
    fresh = Batch(model.sample(truth, 20_000, np.random.default_rng(33))[0], case.schema)
    divergence = float((model.log_prob(truth, fresh) - learner.log_prob(fresh)).mean())
    # The divergence of a maximum-likelihood fit from the truth is n_parameters / (2 n) on average.
    assert divergence < 3.0 * learner.n_parameters() / n_events
    order = np.argsort(-learner.parameters.weights)
    true_order = np.argsort(-truth.weights)
    mean, deviation = learner.marginals()
    true_mean, true_variance = model.family.moments(truth.components)
    if name not in ("bernoulli", "categorical"):
        np.testing.assert_allclose(learner.parameters.weights[order], truth.weights[true_order], atol=0.03)
        error = np.abs(mean[order] - true_mean[true_order]) / np.sqrt(true_variance[true_order])
        assert (error < 0.15).all()
        np.testing.assert_allclose(deviation[order] ** 2, true_variance[true_order], rtol=0.15)


def test_decoded_samples_are_events_of_the_schema() -> None:
    case = CASES["product"]
    model, truth = draw_parameters(case, 3, 41)
    values, _ = model.sample(truth, 50, np.random.default_rng(42))
    table = case.schema.decode(values)
    assert isinstance(table, pa.Table)
    np.testing.assert_array_equal(case.schema.encode(table).values, np.where(values == 0.0, 0.0, values))
