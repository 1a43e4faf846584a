"""The loop of batch EM on its own, what resumes from it, and what keeps it from breaking down."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from cases import CASES, COVARIANCE_TYPES, draw_batch, draw_parameters

from stream_em import Batch, BatchEM, FamilyError, Gaussian, Harmonic, Mixture, OnlineEM, Schema
from stream_em.learners import iterations
from stream_em.seeding import points_for_k_means, separating_direction

four_covariance_types = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_that_of_batch_em_however_the_events_are_cut(name: str) -> None:
    case = CASES[name]
    model, start = draw_parameters(case, 3, 1)
    batch = draw_batch(case, 200, 2, missing=0.2)
    fitted = BatchEM(Mixture(case.family, 3), schema=case.schema, initial_parameters=start, max_iter=5, tol=0.0)
    fitted.fit(batch)
    for pieces in ([batch], [batch.select(slice(0, 70)), batch.select(slice(70, None))]):
        steps = list(islice(iterations(model, start, lambda pieces=pieces: pieces), 5))
        np.testing.assert_allclose([step.objective for step in steps], fitted.history, rtol=1e-9)
        np.testing.assert_allclose(steps[-1].parameters.weights, fitted.parameters.weights, rtol=1e-7)


def test_an_online_learner_resumes_a_batch_fit() -> None:
    case = CASES["gaussian_full"]
    model, start = draw_parameters(case, 3, 1)
    batch, more = draw_batch(case, 300, 2), draw_batch(case, 200, 3)
    step = next(iterations(model, start, lambda: [batch]))
    options: dict[str, Any] = {"schema": case.schema, "schedule": Harmonic(), "initial_parameters": step.parameters}
    learner = OnlineEM(Mixture(case.family, 3), **options).resume(step.statistics, batch.n_events).update(more)
    expected = step.statistics.merge(model.e_step(step.parameters, more))
    assert learner.n_events == 500
    assert learner.statistics is not None
    np.testing.assert_allclose(learner.statistics.weights, expected.weights, rtol=1e-12)
    np.testing.assert_allclose(learner.parameters.components.mean, model.m_step(expected).components.mean, rtol=1e-9)
    with pytest.raises(ValueError, match="has learned nothing yet"):
        learner.resume(step.statistics, 300)
    with pytest.raises(ValueError, match="with initial parameters"):
        OnlineEM(Mixture(case.family, 3)).resume(step.statistics, 300)


@four_covariance_types
def test_reg_covar_is_added_to_each_variance(kind: Any) -> None:
    batch = draw_batch(CASES["gaussian_full"], 100, 4)
    responsibilities = np.random.default_rng(5).dirichlet(np.ones(2), size=100).T
    plain, added = (
        Mixture(Gaussian(kind, reg_covar), 2).initialize(batch, responsibilities).components
        for reg_covar in (0.0, 0.25)
    )
    expected = plain.covariance + (0.25 * np.eye(3) if kind in ("full", "tied") else 0.25)
    np.testing.assert_allclose(added.covariance, expected, rtol=1e-12)
    np.testing.assert_array_equal(added.mean, plain.mean)


@pytest.mark.parametrize("wrong", [-1e-6, np.nan, np.inf])
def test_reg_covar_must_be_a_variance(wrong: float) -> None:
    with pytest.raises(FamilyError, match="reg_covar must be a variance from 0"):
        Gaussian(reg_covar=wrong)


@four_covariance_types
def test_ill_defined_components_are_found_and_shrunk(kind: Any) -> None:
    values = np.random.default_rng(6).normal(size=(3, 60)) * 10.0
    values[:, :20] = values[:, :1]
    batch = Schema({"x": "numeric", "y": "numeric", "z": "numeric"}).encode(np.ascontiguousarray(values.T))
    shares = np.stack([np.arange(60) < 20, np.arange(60) >= 20]).astype(float)
    model = Mixture(Gaussian(kind), 2, prior_weight=1e-25).bind(batch.schema)
    start = model.initialize(batch, shares)
    for _ in range(3):
        statistics = model.e_step(start, batch)
        prior = model.prior(statistics)
        start = model.m_step(statistics)
    # A tied covariance has the scatter of the other component.
    assert start.components.ill_defined.tolist() == [kind != "tied", False]
    kept = model.m_step(statistics, kept=(start, np.array([True, False])))
    assert kept.components.ill_defined.tolist() == [kind != "tied", False]
    strong = Mixture(Gaussian(kind), 2).bind(batch.schema)
    assert not strong.m_step(statistics).components.ill_defined.any()
    variance = values.var(axis=1)
    pooled = np.diag(np.full(3, variance.mean()) if kind == "spherical" else variance)
    found = model.family.covariances(start.components)
    if kind != "tied":
        np.testing.assert_allclose(found[0], 1e-12 * pooled, rtol=1e-6, atol=1e-20)
    # What the prior names is shrunk, well-defined or not.
    shrunk = model.m_step(statistics, replace(prior, shrunk=np.array([False, True])))
    expected = 0.99 * found[1] + 0.01 * pooled
    np.testing.assert_allclose(model.family.covariances(shrunk.components)[1], expected, rtol=1e-9, atol=1e-9)


@four_covariance_types
def test_a_narrow_component_far_away_is_not_taken_for_an_ill_defined_one(kind: Any) -> None:
    """In the first M-step its spread drowns in the rounding of its distance; in those that follow it does not."""
    generator = np.random.default_rng(17)
    values = generator.normal(size=(2, 400)) * 1e-3
    values[:, 200:] += 1e6
    batch = Batch(values, Schema({"x": "numeric", "y": "numeric"}))
    shares = np.stack([np.arange(400) < 200, np.arange(400) >= 200]).astype(float)
    model = Mixture(Gaussian(kind), 2, prior_weight=1e-25).bind(batch.schema)
    steps = list(islice(iterations(model, model.initialize(batch, shares), lambda: [batch]), 4))
    assert not steps[-1].parameters.components.ill_defined.any()
    variance = np.diagonal(model.family.covariances(steps[-1].parameters.components), axis1=1, axis2=2)
    np.testing.assert_allclose(variance, 1e-6, rtol=0.25)


@pytest.mark.parametrize("seed", range(4))
def test_the_separating_direction_is_that_of_clusters_in_a_row(seed: int) -> None:
    generator = np.random.default_rng(seed)
    row = 4.0 * generator.integers(3, size=2_000) + 0.6 * generator.normal(size=2_000)
    turn = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    events = np.column_stack([100.0 * generator.normal(size=(2_000, 3)), row]) @ turn
    batch = Schema({f"x{column}": "numeric" for column in range(4)}).encode(events)
    whitened = points_for_k_means(batch)[1]
    along = whitened @ separating_direction(whitened, np.ones(2_000), generator)
    assert abs(np.corrcoef(along.ravel(), row)[0, 1]) > 0.99


def test_there_is_a_direction_even_where_all_events_are_alike() -> None:
    assert np.isfinite(separating_direction(np.zeros((5, 2)), np.ones(5), np.random.default_rng(0))).all()


def test_k_means_points_are_weighted() -> None:
    events = np.random.default_rng(7).normal(size=(50, 2))
    weight = np.random.default_rng(8).integers(0, 4, size=50)
    schema = Schema({"x": "numeric", "y": "numeric"})
    weighted = points_for_k_means(schema.encode(events, weight))
    repeated = points_for_k_means(schema.encode(np.repeat(events, weight, axis=0)))
    for one, other in zip(weighted, repeated):
        np.testing.assert_allclose(np.abs(np.repeat(one, weight, axis=0)), np.abs(other), rtol=1e-9, atol=1e-9)
