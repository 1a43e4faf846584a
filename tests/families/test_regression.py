from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import CASES, assert_sound, draw_batch, draw_parameters
from scipy.stats import norm

from stream_em import (
    Batch,
    BatchEM,
    Categorical,
    EventError,
    FamilyError,
    Gaussian,
    Harmonic,
    LinearRegression,
    Mixture,
    MixtureParameters,
    OnlineEM,
    Product,
    RobbinsMonro,
    Schema,
    SchemaError,
)
from stream_em.families.regression import LinearRegressionParameters
from stream_em.schema import Field
from stream_em.seeding import seed
from stream_em.state import has_compiled_blocks, has_compiled_form
from stream_em.statistics import Moments
from stream_em.store import to_bytes

CASE = CASES["regression"]
with_and_without_intercept = pytest.mark.parametrize("intercept", [True, False])


def covariates(batch: Batch) -> np.ndarray:
    return batch.values[[0, 2]].T


def drawn(intercept: bool = True, **options: Any) -> tuple[Mixture, MixtureParameters]:
    return draw_parameters(replace(CASE, family=LinearRegression("y", intercept)), 3, 1, **options)


@with_and_without_intercept
def test_log_density_is_that_of_the_response_given_the_covariates(intercept: bool) -> None:
    model, parameters = drawn(intercept)
    batch, lines = draw_batch(CASE, 50, 2), parameters.components
    expected = lines.intercept + covariates(batch) @ lines.coefficients.T
    density = norm.pdf(batch.values[1][:, None], expected, np.sqrt(lines.variance)) @ parameters.weights
    np.testing.assert_allclose(model.log_prob(parameters, batch), np.log(density), rtol=1e-9)
    np.testing.assert_allclose(lines.predict(covariates(batch)), expected, rtol=1e-12)
    assert intercept == bool(lines.intercept.any())


@with_and_without_intercept
@pytest.mark.parametrize("weighted", [False, True])
def test_one_component_is_least_squares(intercept: bool, weighted: bool) -> None:
    """The pseudo-events lie on the pooled line, so that they do not move the line that is the pooled one."""
    batch = draw_batch(CASE, 80, 3, weighted=weighted)
    model = Mixture(LinearRegression("y", intercept), 1, prior_weight=5.0)
    lines = model.initialize(batch, np.ones((1, 80))).components
    root = np.sqrt(np.ones(80) if batch.weight is None else batch.weight)
    design = covariates(batch)
    if intercept:
        design = np.column_stack([np.ones(80), design])
    solution = np.linalg.lstsq(design * root[:, None], batch.values[1] * root)[0]
    found = [*lines.intercept, *lines.coefficients[0]] if intercept else lines.coefficients[0]
    np.testing.assert_allclose(found, solution, rtol=1e-4)
    squared = float(((batch.values[1] - design @ solution) ** 2) @ root**2 / (root**2).sum())
    assert float(lines.variance[0]) == pytest.approx(squared, rel=1e-4)


@with_and_without_intercept
def test_no_other_parameters_are_better_than_those_of_the_m_step(intercept: bool) -> None:
    model = drawn(intercept, prior_weight=2.0)[0]
    batch = draw_batch(CASE, 60, 4)
    responsibilities = np.random.default_rng(5).dirichlet(np.ones(3), size=60).T
    statistics = model._expect(model.pooled(batch), batch, given=responsibilities)[0]
    prior = model.prior(statistics)

    def objective(lines: LinearRegressionParameters) -> float:
        expected = lines.intercept + covariates(batch) @ lines.coefficients.T
        density = norm.logpdf(batch.values[1][:, None], expected, np.sqrt(lines.variance))
        return float((responsibilities.T * density).sum()) + model.family.log_prior(lines, prior)

    best = model.m_step(statistics, prior).components
    generator = np.random.default_rng(6)
    for _ in range(30):
        other = replace(
            best,
            coefficients=best.coefficients + 1e-3 * generator.normal(size=(3, 2)),
            intercept=best.intercept + 1e-3 * intercept * generator.normal(size=3),
            variance=best.variance * np.exp(1e-3 * generator.normal(size=3)),
        )
        assert objective(other) < objective(best)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("offset", [1e4, 1e8, -1e8])
def test_lines_do_not_depend_on_an_offset(missing: float, offset: float) -> None:
    batch = draw_batch(CASE, 300, 7, missing=missing, weighted=True)
    # On this grid the offset is added without rounding, so only the library could lose anything.
    values = np.round(batch.values * 2**20) / 2**20
    responsibilities = np.random.default_rng(8).dirichlet(np.full(3, 0.3), size=300).T
    model = Mixture(CASE.family, 3).bind(CASE.schema)
    fits = []
    for block in (values, values + offset):
        cut = replace(batch, values=block)
        parameters = model.initialize(cut, responsibilities)
        for _ in range(5):
            parameters = model.m_step(model.e_step(parameters, cut))
        fits.append(parameters)
    here, there = (fit.components for fit in fits)
    np.testing.assert_allclose(fits[1].weights, fits[0].weights, rtol=1e-6)
    np.testing.assert_allclose(there.coefficients, here.coefficients, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(there.variance, here.variance, rtol=1e-6)
    np.testing.assert_allclose(there.covariate_covariance, here.covariate_covariance, rtol=1e-6)


def test_lines_follow_the_units_of_each_field() -> None:
    units = np.array([1e-6, 1e3, 1e6])
    batch = draw_batch(CASE, 100, 9, missing=0.2)
    responsibilities = np.random.default_rng(10).dirichlet(np.ones(3), size=100).T
    model = Mixture(CASE.family, 3, prior_weight=0.5).bind(CASE.schema)
    results = []
    for unit in (np.ones(3), units):
        scaled = Batch(batch.values * unit[:, None], CASE.schema)
        parameters = model.initialize(scaled, responsibilities)
        for _ in range(3):
            parameters = model.m_step(model.e_step(parameters, scaled))
        results.append(parameters)
    plain, changed = (result.components for result in results)
    np.testing.assert_allclose(results[1].weights, results[0].weights, rtol=1e-7)
    np.testing.assert_allclose(changed.coefficients / (units[1] / units[[0, 2]]), plain.coefficients, rtol=1e-6)
    np.testing.assert_allclose(changed.variance / units[1] ** 2, plain.variance, rtol=1e-7)


def test_lines_that_nearly_explain_everything_keep_their_precision() -> None:
    """The expanded square of the residual would lose what a noise of 1e-5 of the response says."""
    generator = np.random.default_rng(11)
    x, rising, noise = generator.normal(size=4_000), generator.random(4_000) < 0.6, generator.normal(size=4_000)
    y = np.where(rising, 3.0 + 2.0 * x, -x) + 1e-5 * noise
    schema = Schema({"x": "numeric", "y": "numeric"})
    fitted = BatchEM(Mixture(LinearRegression("y"), 2, prior_weight=1e-12), schema=schema, tol=1e-9)
    fitted.fit(Batch(np.stack([x, y]), schema))
    order = np.argsort(fitted.parameters.components.coefficients[:, 0])
    lines = fitted.parameters.components
    np.testing.assert_allclose(lines.coefficients[order, 0], [-1.0, 2.0], atol=2e-6)
    np.testing.assert_allclose(np.sqrt(lines.variance[order]), 1e-5, rtol=0.05)
    assert np.mean(fitted.predict(Batch(np.stack([x, y]), schema)) == order[rising.astype(int)]) > 0.999


@pytest.mark.parametrize("case", ["collinear", "constant", "fewer events than covariates", "one event", "no noise"])
@with_and_without_intercept
def test_lines_that_the_events_do_not_determine(case: str, intercept: bool) -> None:
    generator = np.random.default_rng(12)
    values = generator.normal(size=(3, 2 if case.startswith("fewer") else 1 if case.startswith("one") else 60))
    if case == "collinear":
        values[2] = 2.0 * values[0]
    elif case == "constant":
        values[2] = 1e3
    elif case == "no noise":
        values[1] = values[0] - 3.0 * values[2]
    batch = Batch(values, CASE.schema)
    for prior_weight in (1e-300, 1e-9, 0.01):
        model = Mixture(LinearRegression("y", intercept), 2, prior_weight=prior_weight)
        fitted = BatchEM(model).fit(batch)
        assert_sound(model, fitted.parameters, CASE.schema)
        assert np.isfinite(fitted.log_prob(batch)).all()


# Missing values


def test_an_event_without_response_says_nothing() -> None:
    model, parameters = drawn()
    batch = draw_batch(CASE, 40, 13)
    values = batch.values.copy()
    values[1, 10:25] = np.nan
    values[0, 12] = np.nan
    some = Batch(values, CASE.schema)
    posterior = model.posterior(parameters, some)
    # The weights add up to 1 but for rounding, which is not the same on every processor.
    np.testing.assert_allclose(posterior.log_prob[10:25], 0.0, rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(posterior.responsibilities[:, 10:25], np.repeat(parameters.weights[:, None], 15, axis=1))
    there = batch.select(np.r_[0:10, 25:40])
    found, expected = model.e_step(parameters, some), model.e_step(parameters, there)
    moments, wanted = found.parts["moments"], expected.parts["moments"]
    for name, array in wanted.arrays().items():
        np.testing.assert_allclose(moments.arrays()[name], array, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(found.weights, expected.weights + 15.0 * parameters.weights, rtol=1e-12)


def test_an_event_with_a_response_but_not_all_covariates_is_refused() -> None:
    events = CASE.schema.decode(draw_batch(CASE, 60, 14).values).to_pylist()
    lacking = [*events[:7], {**events[7], "z": None}, *events[8:]]
    message = (
        r"event 7, field 'z': got None, expected a value, without which LinearRegression\(response='y'.* no density"
    )
    young = OnlineEM(Mixture(CASE.family, 2), schema=CASE.schema, warm_up=1_000).update(events[:5])
    old = OnlineEM(Mixture(CASE.family, 2), schema=CASE.schema, warm_up=20, batch_size=3).update(events)
    for learner in (young, old):
        before = to_bytes(learner)
        with pytest.raises(EventError, match=message):
            learner.update(lacking)
        assert to_bytes(learner) == before
        with pytest.raises(EventError, match=message):
            learner.predict_then_update(lacking)
        assert to_bytes(learner) == before
        with pytest.raises(EventError, match=message):
            learner.log_prob(lacking)
    for source in (lacking, [lacking, events]):
        with pytest.raises(EventError, match=message):
            BatchEM(Mixture(CASE.family, 2), schema=CASE.schema).fit(source)


def test_a_covariate_cannot_come_later() -> None:
    schema = Schema({"x": "numeric", "y": "numeric"}, unknown="add")
    events = [{"x": float(at % 7), "y": float(at % 5)} for at in range(40)]
    for warm_up, error in ((20, FamilyError), (1_000, EventError)):
        learner = OnlineEM(Mixture(LinearRegression("y"), 2), schema=schema, warm_up=warm_up).update(events)
        before = to_bytes(learner)
        with pytest.raises(error, match=r"covariates 'w'|field 'w'"):
            learner.update({"x": 1.0, "y": 2.0, "w": 3.0})
        assert to_bytes(learner) == before


# Seeding


def curves(n_events: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cappé & Moulines (2009), section 5: covariates u and u² / 10, and two responses that cross twice."""
    u, second = generator.uniform(0.0, 10.0, size=n_events), generator.random(n_events) < 0.5
    y = np.where(second, 15.0 + 10.0 * u - u * u, 5.0 * u) + 9.0 * generator.normal(size=n_events)
    return np.stack([u, u * u / 10.0, y]), second


CURVES = Schema({"u": "numeric", "s": "numeric", "y": "numeric"})


@pytest.mark.parametrize("number", range(5))
def test_seeding_finds_lines_that_cross(number: int) -> None:
    generator = np.random.default_rng(number)
    batch = Batch(curves(2_000, generator)[0], CURVES)
    model = Mixture(LinearRegression("y"), 2)
    truth = LinearRegressionParameters(
        np.array([[5.0, 0.0], [10.0, -10.0]]), np.array([0.0, 15.0]), np.full(2, 81.0), np.zeros(2), np.eye(2)
    )
    best = BatchEM(
        model, schema=CURVES, initial_parameters=MixtureParameters(np.full(2, 0.5), truth, np.arange(2)), tol=1e-7
    ).fit(batch)
    start = seed(model, batch, generator)
    found = BatchEM(model, schema=CURVES, initial_parameters=start, tol=1e-7, max_iter=1_000).fit(batch)
    assert found.history[-1] > best.history[-1] - 1e-3


def test_seeding_finds_four_planes() -> None:
    generator = np.random.default_rng(15)
    names = [f"z{position}" for position in range(5)]
    slopes = 3.0 * generator.normal(size=(4, 5))
    z, component = generator.normal(size=(5, 2_000)), generator.integers(4, size=2_000)
    y = (slopes[component].T * z).sum(axis=0) + 0.5 * generator.normal(size=2_000)
    schema = Schema(dict.fromkeys([*names, "y"], "numeric"))
    fitted = BatchEM(Mixture(LinearRegression("y", intercept=False), 4), schema=schema).fit(
        Batch(np.vstack([z, y]), schema)
    )
    found = fitted.parameters.components.coefficients
    distance = np.abs(found[:, None] - slopes).max(axis=2)
    assert sorted(distance.argmin(axis=0).tolist()) == [0, 1, 2, 3]
    assert distance.min(axis=0).max() < 0.15


# Marginals and conditionals


def test_given_all_covariates_the_response_has_the_density_of_the_event() -> None:
    model, parameters = drawn()
    batch = draw_batch(CASE, 10, 16)
    schema = Schema({"y": "numeric"})
    for event, log_prob in zip(batch.values.T, model.log_prob(parameters, batch)):
        given = model.conditional(parameters, np.array([0, 2]), event[[0, 2]])
        of_response = model.restrict(np.array([1]))
        assert of_response.log_prob(given, Batch(event[[1]][:, None], schema))[0] == pytest.approx(log_prob, rel=1e-9)
        expected = float(parameters.components.predict(event[None, [0, 2]])[0] @ parameters.weights)
        assert float(given.weights @ given.components.mean[:, 0]) == pytest.approx(expected, rel=1e-12)


def test_some_covariates_given_leave_a_regression_on_the_others() -> None:
    for intercept in (True, False):
        model, parameters = drawn(intercept)
        batch = draw_batch(CASE, 10, 17)
        rest = np.array([1, 2])
        schema = Schema([CASE.schema.fields[position] for position in rest])
        for event, log_prob in zip(batch.values.T, model.log_prob(parameters, batch)):
            given = model.conditional(parameters, np.array([0]), event[:1])
            of_rest = model.restrict(rest)
            assert of_rest.log_prob(given, Batch(event[rest][:, None], schema))[0] == pytest.approx(log_prob, rel=1e-9)
            assert_sound(of_rest, given, schema)


def test_there_is_no_density_of_covariates_or_without_them() -> None:
    batch = draw_batch(CASE, 60, 18)
    fitted = BatchEM(Mixture(CASE.family, 2), schema=CASE.schema).fit(batch)
    with pytest.raises(FamilyError, match="no density of the covariates alone: keep the response 'y'"):
        fitted.marginal(["x", "z"])
    with pytest.raises(FamilyError, match="no density of 'y' without the covariates 'x': give their values"):
        fitted.marginal(["z", "y"])
    with pytest.raises(EventError, match="field 'x'"):
        fitted.conditional({"y": 1.0, "z": 2.0})
    turned = fitted.marginal(["z", "y", "x"])
    events = batch.values.T
    np.testing.assert_allclose(turned.log_prob(events[:, [2, 1, 0]]), fitted.log_prob(events), rtol=1e-12)
    assert turned.model.bind(turned.schema).family.intercept  # type: ignore[arg-type, attr-defined]


def test_samples_have_the_covariates_moments_and_the_lines() -> None:
    model, parameters = drawn()
    lines = parameters.components
    values, components = model.sample(parameters, 50_000, np.random.default_rng(19))
    np.testing.assert_allclose(np.cov(values[[0, 2]]), lines.covariate_covariance, rtol=0.05)
    mean, variance = model.family.moments(lines)
    for k in range(3):
        mine = values[:, components == k]
        residual = mine[1] - lines.predict(mine[[0, 2]].T)[:, k]
        assert abs(residual.mean()) < 5.0 * math.sqrt(lines.variance[k] / len(residual))
        assert float(residual.var()) == pytest.approx(float(lines.variance[k]), rel=0.05)
        np.testing.assert_allclose(mine.mean(axis=1), mean[k], atol=5.0 * np.sqrt(variance[k].max() / len(residual)))
        np.testing.assert_allclose(mine.var(axis=1), variance[k], rtol=0.05)
        np.testing.assert_allclose(model.family.covariance(lines, 0, 1)[k], np.cov(mine[:2])[0, 1], rtol=0.05)


def test_a_regression_beside_other_fields() -> None:
    generator = np.random.default_rng(20)
    values, second = curves(1_500, generator)
    schema = Schema([Field("c", "category", ("a", "b")), *CURVES.fields])
    code = 1.0 + (generator.random(1_500) < np.where(second, 0.8, 0.2))
    batch = Batch(np.vstack([code, values]), schema)
    model = Mixture(Product({("u", "s", "y"): LinearRegression("y"), "c": Categorical()}), 2)
    fitted = BatchEM(model, schema=schema, tol=1e-7, max_iter=500).fit(batch)
    order = np.argsort(fitted.parameters.components[0].intercept)
    assert np.mean(fitted.predict(batch) == order[second.astype(int)]) > 0.85
    probabilities = fitted.parameters.components[1].probability
    np.testing.assert_allclose(probabilities[order, 2], [0.2, 0.8], atol=0.08)
    given = fitted.conditional({"u": 5.0, "s": 2.5, "c": "b"})
    expected = fitted.parameters.components[0].predict([[5.0, 2.5]])[0]
    np.testing.assert_allclose(given.marginals()[0][:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(given.parameters.weights[order], [0.2, 0.8], atol=0.1)
    with pytest.raises(EventError, match="event 0, field 's'"):
        fitted.log_prob({"c": "a", "u": 5.0, "y": 1.0})
    assert fitted.log_prob({"c": "a", "u": 5.0})[0] < 0.0


# Settings


def test_every_setting_changes_some_output() -> None:
    batch = draw_batch(CASE, 100, 21)
    fits = [
        BatchEM(Mixture(family, 2), schema=CASE.schema).fit(batch).history[-1]
        for family in (LinearRegression("y"), LinearRegression("x"), LinearRegression("y", intercept=False))
    ]
    assert len(set(fits)) == 3


def test_fields_that_do_not_suit_are_refused() -> None:
    fields = Schema({"x": "numeric", "y": "numeric", "c": "category"}).fields
    with pytest.raises(FamilyError, match="the response 'w' is no field; the fields are 'x', 'y'"):
        LinearRegression("w").bind(fields[:2])
    with pytest.raises(FamilyError, match="no field to explain the response 'x' by; without covariates, use Gaussian"):
        LinearRegression("x").bind(fields[:1])
    with pytest.raises(FamilyError, match="'c' is of kind 'category'"):
        LinearRegression("y").bind(fields)
    with pytest.raises(FamilyError, match="response must be the name of a field, got 3"):
        LinearRegression(3)  # type: ignore[arg-type]
    with pytest.raises(FamilyError, match="intercept must be True or False, got 'no'"):
        LinearRegression("y", "no")  # type: ignore[arg-type]
    with pytest.raises(FamilyError, match="bind the model to a schema first"):
        LinearRegression("y").moments(drawn()[1].components)
    with pytest.raises(SchemaError, match="all fields are given"):
        BatchEM(Mixture(CASE.family, 1)).fit(draw_batch(CASE, 20, 22)).conditional({"x": 0.0, "y": 0.0, "z": 0.0})


def test_numbers_of_parameters() -> None:
    assert Mixture(LinearRegression("y"), 4).n_parameters(CASE.schema) == 3 + 4 * (2 + 1 + 1)
    assert Mixture(LinearRegression("y", intercept=False), 4).n_parameters(CASE.schema) == 3 + 4 * (2 + 1)


def test_arrays_that_are_no_parameters_are_refused() -> None:
    model, parameters = drawn()
    arrays = model.family.arrays(parameters.components)
    for bad in (
        *({name: array for name, array in arrays.items() if name != left_out} for left_out in arrays),
        {**arrays, "coefficients": arrays["coefficients"][0]},
        {**arrays, "coefficients": arrays["coefficients"][:, :1]},
        {**arrays, "coefficients": arrays["coefficients"] * math.nan},
        {**arrays, "intercept": arrays["intercept"][:2]},
        {**arrays, "intercept": arrays["intercept"] * math.inf},
        {**arrays, "variance": -arrays["variance"]},
        {**arrays, "variance": arrays["variance"][:, None]},
        {**arrays, "covariate_mean": arrays["covariate_mean"][:1]},
        {**arrays, "covariate_mean": arrays["covariate_mean"] * math.nan},
        {**arrays, "covariate_covariance": -arrays["covariate_covariance"]},
        {**arrays, "covariate_covariance": arrays["covariate_covariance"][:1]},
    ):
        with pytest.raises(ValueError, match=r"coefficient|intercept|variance|mean|finite|shape|positive|lack"):
            model.family.from_arrays(bad)
    through_origin = drawn(intercept=False)[0].family
    with pytest.raises(ValueError, match="no intercept other than 0"):
        through_origin.from_arrays(arrays)


def test_there_is_no_compiled_form() -> None:
    """A learner goes on in NumPy, single events included."""
    model = Mixture(CASE.family, 2)
    assert not has_compiled_form(model.bind(CASE.schema), RobbinsMonro())
    assert not has_compiled_blocks(model.bind(CASE.schema), RobbinsMonro())
    learner = OnlineEM(model, schema=CASE.schema, warm_up=20).update(draw_batch(CASE, 50, 23))
    assert learner.kernel() is None
    assert learner.update({"x": 1.0, "y": 2.0, "z": 3.0}).n_events == 51
    assert not isinstance(CASE.family, Gaussian)


# Cappé & Moulines (2009), section 5


def published_start() -> MixtureParameters:
    lines = LinearRegressionParameters(
        np.array([[4.9, 0.0], [0.0, 0.0]]),
        np.array([0.0, 30.0]),
        np.full(2, 230.0),
        np.array([5.0, 10.0 / 3.0]),
        np.diag([100.0 / 12.0, 80.0 / 9.0]),
    )
    return MixtureParameters(np.full(2, 0.5), lines, np.arange(2))


def replications(values: np.ndarray, alpha: float, *, average_from: int | None = None) -> np.ndarray:
    """Online EM, one event at a time, for many streams at once: coefficients (R, 2, 3), intercept first.

    Each stream's two components are two of 2 R components of the library's family, whose statistics, merge, discount
    and M-step this uses; the E-step alone is written out, since each event belongs to its own stream's two.

    Parameters
    ----------
    values
        (3, R, n) events of R streams.
    alpha
        Step sizes are n^-alpha, and 1 / n for the first 20 events, which come before the first M-step.
    average_from
        Events after which coefficients are averaged; None returns the last.

    """
    n_streams, n_events = values.shape[1:]
    family = LinearRegression("y").bind(CURVES.fields)
    start = published_start().components
    lines = replace(
        start,
        coefficients=np.tile(start.coefficients, (n_streams, 1)),
        intercept=np.tile(start.intercept, n_streams),
        variance=np.tile(start.variance, n_streams),
    )
    every = values.reshape(3, -1)
    pooled = Moments(np.ones(1), every.mean(axis=1)[None], np.cov(every, bias=True)[None])
    prior = family.prior({"moments": pooled}, 1e-9)
    weights = np.full((n_streams, 2), 0.5)
    no_scatter = np.zeros((2 * n_streams, 3, 3))
    state: Moments | None = None
    total = np.zeros((2 * n_streams, 3))
    for n in range(1, n_events + 1):
        event = np.repeat(values[:, :, n - 1].T, 2, axis=0)
        residual = event[:, 2] - (lines.coefficients * event[:, :2]).sum(axis=1) - lines.intercept
        log_density = -0.5 * (residual**2 / lines.variance + np.log(lines.variance)).reshape(-1, 2)
        shares = weights * np.exp(log_density - log_density.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        new = Moments(shares.ravel(), event, no_scatter)
        step = n**-alpha if n > 20 else 1.0 / n
        state = new if state is None else state.scale(1.0 - step).merge(new.scale(step))
        if n >= 20:
            lines, weights = family.maximize({"moments": state}, prior), state.weight.reshape(-1, 2)
        if average_from is not None and n > average_from:
            total += np.column_stack([lines.intercept, lines.coefficients])
    if average_from is None:
        return np.column_stack([lines.intercept, lines.coefficients]).reshape(-1, 2, 3)
    return total.reshape(-1, 2, 3) / (n_events - average_from)


def test_replications_are_online_em() -> None:
    values = np.stack([curves(400, np.random.default_rng(stream))[0] for stream in range(3)], axis=1)
    found = replications(values, 1.0)
    for stream in range(3):
        learner = OnlineEM(
            Mixture(LinearRegression("y"), 2, prior_weight=1e-9),
            schema=CURVES,
            initial_parameters=published_start(),
            schedule=Harmonic(),
            batch_size=1,
            first_m_step=20,
        )
        lines = learner.update(Batch(values[:, stream], CURVES)).parameters.components
        np.testing.assert_allclose(found[stream], np.column_stack([lines.intercept, lines.coefficients]), rtol=1e-5)


@pytest.mark.slow
def test_published_medians_of_two_regressions() -> None:
    """Median of the second regression's coefficients (15, 10, -10), over 20 streams of 10,000 events.

    The figures are medians of 100 streams, and so are compared at the rounding they were stated with plus four times
    the standard error of a median of 20, from the spread between the streams.
    """
    values = np.stack([curves(10_000, np.random.default_rng([1, stream]))[0] for stream in range(20)], axis=1)
    batch = []
    for stream in range(20):
        fitted = BatchEM(
            Mixture(LinearRegression("y"), 2, prior_weight=1e-9),
            schema=CURVES,
            initial_parameters=published_start(),
            max_iter=5,
            tol=0.0,
        ).fit(Batch(values[:, stream], CURVES))
        lines = fitted.parameters.components
        batch.append([lines.intercept[1], *lines.coefficients[1]])
    for found, stated in (
        (np.array(batch), (13.40, 9.45, -9.05)),
        (replications(values, 1.0)[:, 1], (13.79, 9.60, -9.34)),
        (replications(values, 0.6)[:, 1], (14.86, 9.86, -9.76)),
        (replications(values, 0.6, average_from=5_000)[:, 1], (14.77, 9.98, -9.99)),
    ):
        spread = (np.quantile(found, 0.75, axis=0) - np.quantile(found, 0.25, axis=0)) / 1.35
        error = 1.2533 * spread * math.sqrt(1 / 20 + 1 / 100)
        assert (np.abs(np.median(found, axis=0) - stated) < 0.005 + 4.0 * error).all()


def test_events_without_a_density_are_collected_like_any_other_that_cannot_be_used() -> None:
    schema = Schema({"x": "numeric", "y": "numeric"})
    learner = OnlineEM(Mixture(LinearRegression("y"), 1), schema=schema, warm_up=2)
    events = [{"x": 1.0, "y": 2.0}, {"y": 3.0}, {"x": float("inf"), "y": 1.0}, {"x": 2.0, "y": 4.1}, {"x": 3.0}]
    batch = learner.encode(events, on_error="collect")
    assert [(error.index, error.field) for error in batch.rejected] == [(1, "x"), (2, "x")]
    assert batch.accepted is not None
    assert batch.accepted.tolist() == [0, 3, 4]
    assert learner.update(batch).n_events == 3
