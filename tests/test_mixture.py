from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import (
    CASES,
    CONDITIONAL_CASES,
    COVARIANCE_TYPES,
    NUMERIC,
    assert_sound,
    assert_statistics_close,
    draw_batch,
    draw_parameters,
    draw_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import expon, multivariate_normal, norm, poisson
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from stream_em import (
    Batch,
    BatchEM,
    Bernoulli,
    FamilyError,
    Gaussian,
    Mixture,
    MixtureParameters,
    Poisson,
    Product,
    Schema,
)
from stream_em.families.gaussian import GaussianParameters
from stream_em.models import mixture
from stream_em.numerics import LARGEST_LOG_DENSITY

EVENTS = draw_values(NUMERIC, 500, np.random.default_rng(1)).T
# So weak a prior moves nothing that a comparison with maximum likelihood could see.
NO_PRIOR = 1e-12

four_covariance_types = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


def precisions(kind: str, covariance: np.ndarray) -> np.ndarray:
    return np.linalg.inv(covariance) if kind in ("full", "tied") else 1.0 / covariance


def sklearn_mixture(kind: str, start: MixtureParameters, n_iterations: int, events: np.ndarray) -> GaussianMixture:
    """scikit-learn's mixture after exactly this many iterations from the same start."""
    mixture = GaussianMixture(
        start.n_components,
        covariance_type=kind,
        weights_init=start.weights,
        means_init=start.components.mean,
        precisions_init=precisions(kind, start.components.covariance),
        reg_covar=0.0,
        tol=0.0,
        max_iter=n_iterations,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(events)


# Agreement with scikit-learn


@four_covariance_types
def test_twenty_iterations_are_those_of_scikit_learn(kind: Any) -> None:
    model = Mixture(Gaussian(kind), 3, prior_weight=NO_PRIOR).bind(NUMERIC)
    batch = NUMERIC.encode(EVENTS)
    responsibilities = np.random.default_rng(2).dirichlet(np.ones(3), size=len(EVENTS)).T
    start = parameters = model.initialize(batch, responsibilities)
    for iteration in range(1, 21):
        parameters = model.m_step(model.e_step(parameters, batch))
        if iteration not in (1, 2, 5, 20):
            continue
        peer = sklearn_mixture(kind, start, iteration, EVENTS)
        np.testing.assert_allclose(parameters.weights, peer.weights_, rtol=1e-7)
        np.testing.assert_allclose(parameters.components.mean, peer.means_, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(parameters.components.covariance, peer.covariances_, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(model.log_prob(parameters, batch), peer.score_samples(EVENTS), rtol=1e-7)
        np.testing.assert_allclose(
            model.posterior(parameters, batch).responsibilities.T, peer.predict_proba(EVENTS), atol=1e-7
        )


@four_covariance_types
def test_weighted_e_and_m_steps_are_those_of_scikit_learn_on_repeated_events(kind: Any) -> None:
    times = np.random.default_rng(3).integers(0, 4, size=len(EVENTS))
    model = Mixture(Gaussian(kind), 3, prior_weight=NO_PRIOR).bind(NUMERIC)
    batch = NUMERIC.encode(EVENTS, weight=times.astype(float))
    responsibilities = np.random.default_rng(4).dirichlet(np.ones(3), size=len(EVENTS)).T
    start = parameters = model.initialize(batch, responsibilities)
    for _ in range(5):
        parameters = model.m_step(model.e_step(parameters, batch))
    peer = sklearn_mixture(kind, start, 5, np.repeat(EVENTS, times, axis=0))
    np.testing.assert_allclose(parameters.weights, peer.weights_, rtol=1e-7)
    np.testing.assert_allclose(parameters.components.mean, peer.means_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(parameters.components.covariance, peer.covariances_, rtol=1e-6, atol=1e-7)


@four_covariance_types
@pytest.mark.parametrize("n_components", [1, 4])
def test_information_criteria_are_those_of_scikit_learn(kind: Any, n_components: int) -> None:
    fitted = BatchEM(Mixture(Gaussian(kind), n_components), max_iter=5).fit(EVENTS)
    peer = GaussianMixture(n_components, covariance_type=kind, max_iter=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer.fit(EVENTS)
    # Both are functions of the log-likelihood, so give scikit-learn's formulas ours.
    covariance = fitted.parameters.components.covariance
    peer.weights_, peer.means_, peer.covariances_ = fitted.parameters.weights, fitted.marginals()[0], covariance
    peer.precisions_cholesky_ = {
        "full": lambda: np.stack([np.linalg.inv(np.linalg.cholesky(one)).T for one in covariance]),
        "tied": lambda: np.linalg.inv(np.linalg.cholesky(covariance)).T,
        "diag": lambda: 1.0 / np.sqrt(covariance),
        "spherical": lambda: 1.0 / np.sqrt(covariance),
    }[kind]()
    assert fitted.bic(EVENTS) == pytest.approx(peer.bic(EVENTS), rel=1e-10)
    assert fitted.aic(EVENTS) == pytest.approx(peer.aic(EVENTS), rel=1e-10)


def test_numbers_of_parameters_of_the_other_families() -> None:
    assert Mixture(Bernoulli(), 3).n_parameters(CASES["bernoulli"].schema) == 2 + 3 * 3
    assert Mixture(CASES["categorical"].family, 2).n_parameters(CASES["categorical"].schema) == 1 + 2 * (3 + 2)
    # x, y: 2 means and 3 covariances; country 3; z: 2; two flags; a rate; a mean.
    assert Mixture(CASES["product"].family, 2).n_parameters(CASES["product"].schema) == 1 + 2 * (5 + 3 + 2 + 2 + 1 + 1)


# Hard assignment


def test_hard_assignment_with_spherical_components_is_k_means() -> None:
    generator = np.random.default_rng(4)
    corners = np.array([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
    events = np.concatenate([corner + generator.normal(size=(100, 2)) for corner in corners])
    first = events[[0, 100, 200, 300]]
    peer = KMeans(4, init=first, n_init=1, tol=0.0).fit(events)
    schema = Schema({"x": "numeric", "y": "numeric"})
    start = MixtureParameters(np.full(4, 0.25), GaussianParameters(first, np.ones(4)), np.arange(4, dtype=np.int64))
    model = Mixture(Gaussian("spherical"), 4, prior_weight=NO_PRIOR, assignment="hard")
    fitted = BatchEM(model, schema=schema, initial_parameters=start, tol=0.0).fit(events)
    assert np.array_equal(fitted.predict(events), peer.labels_)
    np.testing.assert_allclose(fitted.parameters.components.mean, peer.cluster_centers_, rtol=1e-9)
    np.testing.assert_allclose(fitted.parameters.weights, 0.25)
    within = float((fitted.parameters.components.covariance * 2 * 100).sum())
    assert within == pytest.approx(peer.inertia_, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_hard_assignment_gives_each_event_to_its_most_responsible_component(name: str) -> None:
    case = CASES[name]
    batch = draw_batch(case, 80, 5, missing=0.2, weighted=True)
    model, parameters = draw_parameters(case, 3, 6, assignment="hard")
    posterior = model.posterior(parameters, batch)
    assert posterior.responsibilities.max(axis=0).min() < 0.95
    winner = np.zeros_like(posterior.responsibilities)
    winner[posterior.responsibilities.argmax(axis=0), np.arange(80)] = 1.0
    soft = Mixture(case.family, 3).bind(case.schema)
    expected = soft._expect(parameters, batch, given=winner)[0]
    found = model.e_step(parameters, batch)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-12)
    assert found.log_likelihood < soft.e_step(parameters, batch).log_likelihood
    next_parameters = model.m_step(found)
    expected_parameters = soft.m_step(expected)
    np.testing.assert_allclose(
        model.log_prob(next_parameters, batch), soft.log_prob(expected_parameters, batch), rtol=1e-9
    )


# Marginals and conditionals of a Gaussian mixture


@four_covariance_types
def test_marginal_is_the_integral_over_the_other_fields(kind: Any) -> None:
    model, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 3, 7)
    keep = np.array([2, 0])
    marginal = model.marginal(parameters, keep)
    covariances = Gaussian(kind).covariances(parameters.components)
    points = EVENTS[:40][:, keep]
    expected = sum(
        weight * multivariate_normal(mean[keep], covariance[np.ix_(keep, keep)]).pdf(points)
        for weight, mean, covariance in zip(parameters.weights, parameters.components.mean, covariances)
    )
    schema = Schema({"z": "numeric", "x": "numeric"})
    found = Mixture(Gaussian(kind), 3).log_prob(marginal, Batch(points.T, schema))
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-9)


@four_covariance_types
def test_conditional_is_the_joint_over_the_marginal(kind: Any) -> None:
    """Bayes' rule, evaluated with densities that know nothing of regression coefficients."""
    model, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 3, 8)
    given, rest = np.array([2, 1]), np.array([0])
    covariances = Gaussian(kind).covariances(parameters.components)
    schema = Schema({"x": "numeric"})
    for event in EVENTS[:15]:
        conditional = model.conditional(parameters, given, event[given])
        joint = sum(
            weight * multivariate_normal(mean, covariance).pdf(event)
            for weight, mean, covariance in zip(parameters.weights, parameters.components.mean, covariances)
        )
        marginal = sum(
            weight * multivariate_normal(mean[given], covariance[np.ix_(given, given)]).pdf(event[given])
            for weight, mean, covariance in zip(parameters.weights, parameters.components.mean, covariances)
        )
        found = Mixture(Gaussian(kind), 3).log_prob(conditional, Batch(event[rest][:, None], schema))
        np.testing.assert_allclose(np.exp(found[0]), joint / marginal, rtol=1e-8)
        assert_sound(Mixture(Gaussian(kind), 3), conditional, schema)


@four_covariance_types
def test_conditional_integrates_to_one(kind: Any) -> None:
    model, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 3, 9)
    conditional = model.conditional(parameters, np.array([0, 1]), np.array([1.0, -1.0]))
    grid = np.linspace(-60.0, 60.0, 60_001)
    density = np.exp(Mixture(Gaussian(kind), 3).log_prob(conditional, Batch(grid[None], Schema({"z": "numeric"}))))
    assert float(density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in CONDITIONAL_CASES and len(CASES[name].schema) > 1]
)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_joint_is_marginal_times_conditional_in_every_family(name: str, data: st.DataObject) -> None:
    model, parameters = draw_parameters(CASES[name], 3, 10)
    model, schema = model.bind(CASES[name].schema), CASES[name].schema
    order = data.draw(st.permutations(range(len(schema))))
    split = data.draw(st.integers(1, len(schema) - 1))
    given_fields, rest = np.array(sorted(order[:split])), np.array(sorted(order[split:]))
    values, _ = model.sample(parameters, 3, np.random.default_rng(1))
    shuffled = np.array(order[:split])
    of_given = model.restrict(shuffled).log_prob(
        model.marginal(parameters, shuffled),
        Batch(values[shuffled], Schema([schema.fields[position] for position in shuffled])),
    )
    of_rest = [
        model.restrict(rest).log_prob(
            model.conditional(parameters, given_fields, event[given_fields]),
            Batch(event[rest][:, None], Schema([schema.fields[position] for position in rest])),
        )[0]
        for event in values.T
    ]
    np.testing.assert_allclose(of_given + of_rest, model.log_prob(parameters, Batch(values, schema)), rtol=1e-8)


# Missing values


@four_covariance_types
def test_missing_values_are_marginalised(kind: Any) -> None:
    model, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 3, 11)
    batch = draw_batch(CASES[f"gaussian_{kind}"], 60, 12, missing=0.5)
    covariances = Gaussian(kind).covariances(parameters.components)
    posterior = model.posterior(parameters, batch)
    for event, log_prob, responsibilities in zip(batch.values.T, posterior.log_prob, posterior.responsibilities.T):
        there = np.flatnonzero(~np.isnan(event))
        joint = np.array(
            [
                weight * multivariate_normal(mean[there], covariance[np.ix_(there, there)]).pdf(event[there])
                for weight, mean, covariance in zip(parameters.weights, parameters.components.mean, covariances)
            ]
        )
        assert log_prob == pytest.approx(math.log(joint.sum()), rel=1e-9)
        np.testing.assert_allclose(responsibilities, joint / joint.sum(), atol=1e-9)


def ghahramani_jordan(
    values: np.ndarray, weight: np.ndarray, responsibilities: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Completed statistics of Gaussian components, event by event (Ghahramani & Jordan 1994, section 3)."""
    n_components, dimension = mean.shape
    count, total = np.zeros(n_components), np.zeros((n_components, dimension))
    second = np.zeros((n_components, dimension, dimension))
    for event, own_weight, shares in zip(values.T, weight, responsibilities.T):
        seen, gone = np.flatnonzero(~np.isnan(event)), np.flatnonzero(np.isnan(event))
        for k in range(n_components):
            completed, extra = event.copy(), np.zeros((dimension, dimension))
            if len(gone):
                within = covariance[k][np.ix_(seen, seen)]
                across = covariance[k][np.ix_(gone, seen)]
                completed[gone] = mean[k, gone] + across @ np.linalg.solve(within, event[seen] - mean[k, seen])
                extra[np.ix_(gone, gone)] = covariance[k][np.ix_(gone, gone)] - across @ np.linalg.solve(
                    within, across.T
                )
            share = own_weight * shares[k]
            count[k] += share
            total[k] += share * completed
            second[k] += share * (np.outer(completed, completed) + extra)
    return count, total, second


@pytest.mark.parametrize("kind", ["full", "tied"])
@pytest.mark.parametrize("weighted", [False, True])
def test_completed_statistics_are_those_of_ghahramani_and_jordan(kind: Any, weighted: bool) -> None:
    model, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 3, 13)
    batch = draw_batch(CASES[f"gaussian_{kind}"], 50, 14, missing=0.4, weighted=weighted)
    weight = np.ones(50) if batch.weight is None else batch.weight
    covariances = Gaussian(kind).covariances(parameters.components)
    responsibilities = model.posterior(parameters, batch).responsibilities
    count, total, second = ghahramani_jordan(
        batch.values, weight, responsibilities, parameters.components.mean, covariances
    )
    moments = model.e_step(parameters, batch).parts["moments"]
    np.testing.assert_allclose(moments.counts, count, rtol=1e-9)
    np.testing.assert_allclose(moments.sums, total, rtol=1e-9, atol=1e-9)
    expected = second.sum(axis=0) if kind == "tied" else second
    np.testing.assert_allclose(moments.squared_sums, expected, rtol=1e-8, atol=1e-8)


def test_a_missing_field_of_a_product_says_nothing() -> None:
    case = CASES["product"]
    model, parameters = draw_parameters(case, 3, 15)
    batch = draw_batch(case, 30, 16, missing=0.4)
    schema = case.schema
    gaussian, categorical, z, flags, clicks, wait = parameters.components
    row = {name: schema.position(name) for name in schema.names}
    log_prob = model.log_prob(parameters, batch)
    for event, found in zip(batch.values.T, log_prob):
        joint = parameters.weights.copy()
        pair = event[[row["x"], row["y"]]]
        there = np.flatnonzero(~np.isnan(pair))
        for k in range(3):
            if len(there):
                covariance = gaussian.covariance[k][np.ix_(there, there)]
                joint[k] *= multivariate_normal(gaussian.mean[k, there], covariance).pdf(pair[there])
            if not np.isnan(event[row["country"]]):
                joint[k] *= categorical.probability[k, int(event[row["country"]])]
            if not np.isnan(event[row["z"]]):
                joint[k] *= norm(z.mean[k, 0], math.sqrt(z.covariance[k, 0])).pdf(event[row["z"]])
            for position, flag in enumerate("ab"):
                if not np.isnan(event[row[flag]]):
                    chance = flags.mean[k, position]
                    joint[k] *= chance if event[row[flag]] == 1.0 else 1.0 - chance
            if not np.isnan(event[row["clicks"]]):
                joint[k] *= poisson(clicks.mean[k, 0]).pmf(event[row["clicks"]])
            if not np.isnan(event[row["wait"]]):
                joint[k] *= expon(scale=wait.mean[k, 0]).pdf(event[row["wait"]])
        assert found == pytest.approx(math.log(joint.sum()), rel=1e-9)


def test_every_joint_field_of_an_event_may_be_missing() -> None:
    schema = Schema({"x": "numeric", "y": "numeric", "n": "count"})
    model = Mixture(Product({("x", "y"): Gaussian(), "n": Poisson()}), 2)
    events = [{"x": float(i % 7), "y": float(i % 5), "n": i % 4} for i in range(60)] + [{"n": 3}] * 10
    fitted = BatchEM(model, schema=schema).fit(events)
    rates = fitted.parameters.components[1].mean[:, 0]
    expected = fitted.parameters.weights @ poisson(rates).pmf(3)
    assert fitted.log_prob({"n": 3})[0] == pytest.approx(math.log(expected), rel=1e-9)
    assert_sound(model, fitted.parameters, schema)


# Far components, other corners


def test_components_far_apart_keep_their_precision() -> None:
    """Each block has one origin; components a million deviations away must not lose their covariance to it."""
    generator = np.random.default_rng(17)
    narrow = generator.normal(size=(400, 2)) * 1e-3
    narrow[200:] += 1e6
    schema = Schema({"x": "numeric", "y": "numeric"})
    responsibilities = np.zeros((2, 400))
    responsibilities[0, :200] = responsibilities[1, 200:] = 1.0
    # The prior is on the scale of all the data, a million here, so even NO_PRIOR would drown a thousandth.
    for kind in COVARIANCE_TYPES:
        model = Mixture(Gaussian(kind), 2, prior_weight=1e-30).bind(schema)
        batch = Batch(np.ascontiguousarray(narrow.T), schema)
        parameters = model.initialize(batch, responsibilities)
        for _ in range(3):
            parameters = model.m_step(model.e_step(parameters, batch))
        found = Gaussian(kind).covariances(parameters.components)
        within = np.stack([part.var(axis=0) for part in (narrow[:200], narrow[200:])])
        expected = within if kind in ("full", "diag") else within.mean(axis=0 if kind == "tied" else 1, keepdims=True)
        if kind == "spherical":
            expected = expected.T.reshape(2, 1)
        np.testing.assert_allclose(
            np.diagonal(found, axis1=1, axis2=2), np.broadcast_to(expected, (2, 2)), rtol=1e-6, err_msg=kind
        )
        scores = model.log_prob(parameters, batch)
        direct = [
            math.log(0.5) + multivariate_normal(mean, covariance).logpdf(narrow[at : at + 5])
            for at, mean, covariance in zip((0, 200), parameters.components.mean, found)
        ]
        np.testing.assert_allclose(scores[[*range(5), *range(200, 205)]], np.concatenate(direct), rtol=1e-6)


def test_a_starved_component_falls_back_to_the_pooled_estimate() -> None:
    for name, case in CASES.items():
        batch = draw_batch(case, 200, 18)
        model = Mixture(case.family, 2).bind(case.schema)
        responsibilities = np.zeros((2, 200))
        responsibilities[0] = 1.0
        parameters = model.initialize(batch, responsibilities)
        assert_sound(model, parameters, case.schema)
        mean, variance = model.family.moments(parameters.components)
        np.testing.assert_allclose(mean[1], mean[0], rtol=0.05, atol=0.05, err_msg=name)
        np.testing.assert_allclose(variance[1], variance[0], rtol=0.2, atol=0.05, err_msg=name)
        assert parameters.weights[1] < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_no_events_give_parameters_still(name: str) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, 3, 19)
    statistics = model.e_step(parameters, draw_batch(case, 0, 1))
    assert statistics.total_weight == 0.0
    assert_sound(model, model.m_step(statistics), case.schema)


@pytest.mark.parametrize("name", CASES)
def test_initialize_is_one_m_step_of_the_given_responsibilities(name: str) -> None:
    case = CASES[name]
    model, parameters = draw_parameters(case, 3, 20)
    batch = draw_batch(case, 70, 21, weighted=True)
    responsibilities = model.posterior(parameters, batch).responsibilities
    by_hand = model.initialize(batch, responsibilities)
    by_step = model.m_step(model.e_step(parameters, batch))
    np.testing.assert_allclose(model.log_prob(by_hand, batch), model.log_prob(by_step, batch), rtol=1e-8)
    assert_statistics_close(model.e_step(by_hand, batch), model.e_step(by_step, batch), tolerance=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"n_components": 0},
        {"n_components": 1.5},
        {"prior_weight": 0.0},
        {"prior_weight": -1.0},
        {"prior_weight": math.nan},
        {"prior_weight": math.inf},
        {"assignment": "firm"},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Mixture(**{"family": Gaussian(), "n_components": 2, **options})


def test_family_must_be_a_family() -> None:
    with pytest.raises(FamilyError, match="family"):
        Mixture("gaussian", 2)  # type: ignore[arg-type]
    with pytest.raises(FamilyError, match="family"):
        Mixture(Gaussian, 2)  # type: ignore[arg-type]


def test_family_must_suit_the_fields() -> None:
    with pytest.raises(FamilyError, match="'c' is of kind 'category'"):
        Mixture(Gaussian(), 2).bind(Schema({"x": "numeric", "c": "category"}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
def test_threads_work_in_a_process_forked_after_them() -> None:
    program = """
import os
import signal
import numpy as np
from stream_em import Gaussian, Mixture, Schema

events = np.random.default_rng(0).normal(size=(40_000, 2))
batch = Schema.infer(events).encode(events)
model = Mixture(Gaussian(), 2)
parameters = model.initialize(batch, np.random.default_rng(1).dirichlet([1.0, 1.0], len(events)).T)
expected = model.e_step(parameters, batch, n_threads=2).log_likelihood
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(int(model.e_step(parameters, batch, n_threads=2).log_likelihood != expected))
raise SystemExit(int(os.waitpid(child, 0)[1] != 0))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_one_event_beyond_the_range_of_doubles_spoils_no_block(assignment: Any, n_threads: int) -> None:
    case = CASES["gaussian_full"]
    model, start = draw_parameters(case, 3, 1, assignment=assignment)
    narrow = replace(start, components=GaussianParameters(start.components.mean, start.components.covariance * 1e-120))
    batch = draw_batch(case, 5_000, 2)
    batch.values[:, 7] = 1e100
    statistics = model.e_step(narrow, batch, n_threads=n_threads)
    posterior = model.posterior(narrow, batch)
    assert posterior.log_prob[7] == -LARGEST_LOG_DENSITY
    np.testing.assert_allclose(posterior.responsibilities[:, 7], narrow.weights, rtol=1e-12)
    assert np.isfinite(posterior.responsibilities).all()
    assert np.isfinite(statistics.log_likelihood)
    assert statistics.total_weight == pytest.approx(5_000.0)


def test_compiled_threads_hand_over_what_is_beyond_the_range_of_doubles() -> None:
    case = CASES["gaussian_full"]
    model, start = draw_parameters(case, 3, 1)
    narrow = replace(start, components=GaussianParameters(start.components.mean, start.components.covariance * 1e-2))
    batch = draw_batch(case, 20_000, 2)
    # Opposite to each other, so that they do not move the center of the events.
    batch.values[:, :2] = [[1e100, -1e100]] * 3
    one, two = (model.e_step(narrow, batch, n_threads=n_threads) for n_threads in (1, 2))
    assert one.log_likelihood == pytest.approx(-2.0 * LARGEST_LOG_DENSITY, rel=1e-9)
    assert two.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-9)
    np.testing.assert_allclose(two.weights, one.weights, rtol=1e-9)


@pytest.mark.parametrize("kind", ["int64", "float32", ">f8"])
def test_an_e_step_takes_batches_of_any_type_of_number(kind: str) -> None:
    model = Mixture(Gaussian(), 2).bind(NUMERIC)
    # More than a block, so that there is work for two threads.
    values = np.random.default_rng(0).integers(-9, 9, size=(3, 20_000))
    weight = np.full(20_000, 2)
    plain = Batch(values.astype(np.float64), NUMERIC, weight.astype(np.float64))
    parameters = model.pooled(plain)
    given = Batch(values.astype(kind), NUMERIC, weight.astype(kind))
    expected = model.e_step(parameters, plain)
    for found in (
        model.e_step(parameters, given),
        model.e_step(parameters, given, compiled=True),
        model.e_step(parameters, given, n_threads=2),
    ):
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        assert_statistics_close(found, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distance", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("family", ["full", "diag", "mixed"])
def test_wide_models_agree_with_numpy_however_far_apart_their_components_are(
    family: str, distance: float, weighted: bool
) -> None:
    # From next to all responsibilities counting to one for each event; so wide that matrices are multiplied.
    generator = np.random.default_rng(3)
    n_fields, n_components = 24, 16
    schema = Schema({f"x{field:02}": "numeric" for field in range(n_fields)})
    mixed = Product({tuple(schema.names[:9:2]): Gaussian("full"), tuple(schema.names[20:]): Gaussian("diag")})
    model = Mixture(mixed if family == "mixed" else Gaussian(family), n_components)
    if family == "mixed":
        schema = Schema(dict.fromkeys((*schema.names[:9:2], *schema.names[20:]), "numeric"))
    centers = distance * generator.normal(size=(n_components, len(schema)))
    came_from = generator.integers(n_components, size=3_000)
    batch = schema.encode(
        centers[came_from] + generator.normal(size=(3_000, len(schema))),
        generator.exponential(size=3_000) if weighted else None,
    )
    bound = model.bind(schema)
    shares = np.eye(n_components)[came_from].T
    parameters = bound.initialize(batch, 0.9 * shares + 0.1 / n_components)
    wanted, posterior = bound.e_step_with_posterior(parameters, batch)
    found, other = bound.e_step_with_posterior(parameters, batch, compiled=True)
    np.testing.assert_allclose(other.log_prob, posterior.log_prob, rtol=1e-10)
    np.testing.assert_allclose(other.responsibilities, posterior.responsibilities, atol=1e-10)
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-12)
    assert_statistics_close(found, wanted)


@pytest.mark.parametrize("where", ["in the caller", "in the other thread"])
def test_what_goes_wrong_in_a_thread_reaches_the_caller_when_none_is_at_work(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mixture(Gaussian(), 2).bind(NUMERIC)
    batch = NUMERIC.encode(np.random.default_rng(0).normal(size=(40_000, 3)))
    caller, begun, ended = threading.get_ident(), [], []
    sum_features = mixture._sum_features()
    assert sum_features is not None

    def failing(*inputs: Any) -> float:
        begun.append(1)
        if (threading.get_ident() == caller) == (where == "in the caller"):
            raise MemoryError("no room for the features")
        time.sleep(0.05)
        ended.append(1)
        return sum_features(*inputs)

    monkeypatch.setattr(mixture, "_sum_features", lambda: failing)
    with pytest.raises(MemoryError, match="no room"):
        model.e_step(model.pooled(batch), batch, n_threads=2)
    assert len(begun) == len(ended) + 1
    time.sleep(0.1)
    assert len(begun) == len(ended) + 1 <= 3


def test_threads_give_the_same_sums_whoever_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixture(Gaussian(), 2).bind(NUMERIC)
    batch = NUMERIC.encode(np.random.default_rng(0).normal(size=(40_000, 3)))
    parameters = model.pooled(batch)
    usual = model.e_step(parameters, batch, n_threads=2)
    sum_features, order = mixture._sum_features(), []
    assert sum_features is not None

    def delayed(*inputs: Any) -> float:
        start = inputs[5]
        if start == 0:
            time.sleep(0.2)
        order.append(start)
        return sum_features(*inputs)

    monkeypatch.setattr(mixture, "_sum_features", lambda: delayed)
    late = model.e_step(parameters, batch, n_threads=2)
    assert order[-1] == 0
    assert late.log_likelihood == usual.log_likelihood
    for name, part in usual.parts.items():
        for one, other in zip(vars(part).values(), vars(late.parts[name]).values()):
            np.testing.assert_array_equal(one, other)


def test_blas_has_its_threads_again_when_overlapping_callers_are_done() -> None:
    # In a process of its own, since the limit is one of the process.
    program = """
import threading, time
import numpy as np, scipy.linalg, threadpoolctl
from stream_em import Gaussian, Mixture, Schema
schema = Schema(dict.fromkeys(("a", "b", "c", "d"), "numeric"))
batch = schema.encode(np.random.default_rng(0).normal(size=(200_000, 4)))
model = Mixture(Gaussian(), 8)
parameters = model.bind(schema).pooled(batch)
callers = [threading.Thread(target=model.e_step, args=(parameters, batch), kwargs={"n_threads": 2}) for _ in range(6)]
for caller in callers:
    caller.start()
    time.sleep(0.005)
for caller in callers:
    caller.join()
print({one["num_threads"] for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas"})
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "{2}\n"


@pytest.mark.parametrize("how", ["n_threads=2", "compiled=True"])
def test_blas_of_compiled_code_has_one_thread_though_it_is_loaded_after_a_step_in_numpy(how: str) -> None:
    program = f"""
import numpy as np, threadpoolctl
from stream_em import Gaussian, Mixture, Schema
from stream_em.models import mixture
schema = Schema(dict.fromkeys(("a", "b", "c", "d"), "numeric"))
batch = schema.encode(np.random.default_rng(0).normal(size=(50_000, 4)))
soft, hard = Mixture(Gaussian(), 8), Mixture(Gaussian(), 8, assignment="hard")
parameters = soft.bind(schema).pooled(batch)
hard.e_step(parameters, batch, n_threads=2)
threadpoolctl.threadpool_limits(2, user_api="blas")
compiled, seen = mixture._sum_features(), set()
def watched(*inputs):
    seen.update(one["num_threads"] for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas")
    return compiled(*inputs)
mixture._sum_features = lambda: watched
soft.e_step(parameters, batch, {how})
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "{1}\n"
