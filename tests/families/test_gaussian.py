from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import CASES, COVARIANCE_TYPES, NUMERIC, draw_batch, draw_parameters
from scipy.stats import multivariate_normal

from stream_em import Batch, FamilyError, Gaussian, Mixture, Schema

four_covariance_types = pytest.mark.parametrize("kind", COVARIANCE_TYPES)


@four_covariance_types
@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_log_density_is_that_of_scipy(kind: Any, dimension: int) -> None:
    generator = np.random.default_rng(1)
    schema = Schema({f"x{column}": "numeric" for column in range(dimension)})
    batch = Batch(generator.normal(size=(dimension, 40)) * 5.0, schema)
    model = Mixture(Gaussian(kind), 3).bind(schema)
    parameters = model.initialize(batch, generator.dirichlet(np.ones(3), size=40).T)
    covariances = Gaussian(kind).covariances(parameters.components)
    density = sum(
        weight * multivariate_normal(mean, covariance).pdf(batch.values.T)
        for weight, mean, covariance in zip(parameters.weights, parameters.components.mean, covariances)
    )
    np.testing.assert_allclose(model.log_prob(parameters, batch), np.log(density), rtol=1e-9)


@four_covariance_types
def test_m_step_is_weighted_means_and_covariances_with_the_prior_as_pseudo_events(kind: Any) -> None:
    batch = draw_batch(CASES["gaussian_full"], 200, 2)
    responsibilities = np.random.default_rng(3).dirichlet(np.ones(2), size=200).T
    model = Mixture(Gaussian(kind), 2, prior_weight=3.0)
    parameters = model.initialize(batch, responsibilities)
    pooled_mean, pooled_variance = batch.values.mean(axis=1), batch.values.var(axis=1)
    weights = responsibilities.sum(axis=1) + 3.0
    means = (responsibilities @ batch.values.T + 3.0 * pooled_mean) / weights[:, None]
    scatters = np.empty((2, 3, 3))
    for k in range(2):
        deviation = batch.values - means[k][:, None]
        apart = pooled_mean - means[k]
        scatters[k] = (responsibilities[k] * deviation) @ deviation.T
        scatters[k] += 3.0 * (np.diag(pooled_variance) + np.outer(apart, apart))
    expected = {
        "full": scatters / weights[:, None, None],
        "tied": scatters.sum(axis=0) / weights.sum(),
        "diag": np.diagonal(scatters, axis1=1, axis2=2) / weights[:, None],
        "spherical": np.trace(scatters, axis1=1, axis2=2) / (3.0 * weights),
    }[kind]
    np.testing.assert_allclose(parameters.weights, weights / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(parameters.components.mean, means, rtol=1e-9)
    np.testing.assert_allclose(parameters.components.covariance, expected, rtol=1e-9, atol=1e-12)


@four_covariance_types
def test_the_prior_follows_the_units_of_each_field(kind: Any) -> None:
    """Changing the unit of a field changes means and variances by it and no responsibility (but for spherical)."""
    units = np.array([1e-6, 1.0, 1e6]) if kind != "spherical" else np.full(3, 1e6)
    batch = draw_batch(CASES["gaussian_full"], 100, 4, missing=0.2)
    responsibilities = np.random.default_rng(5).dirichlet(np.ones(3), size=100).T
    model = Mixture(Gaussian(kind), 3, prior_weight=0.5).bind(NUMERIC)
    results = []
    for factor in (np.ones(3), units):
        scaled = Batch(batch.values * factor[:, None], NUMERIC)
        parameters = model.initialize(scaled, responsibilities)
        for _ in range(3):
            parameters = model.m_step(model.e_step(parameters, scaled))
        results.append((parameters, model.posterior(parameters, scaled).responsibilities))
    (plain, shares), (changed, changed_shares) = results
    np.testing.assert_allclose(changed_shares, shares, atol=1e-7)
    np.testing.assert_allclose(changed.components.mean / units, plain.components.mean, rtol=1e-6, atol=1e-8)
    deviations = [np.sqrt(model.family.moments(one.components)[1]) for one in (changed, plain)]
    np.testing.assert_allclose(deviations[0] / units, deviations[1], rtol=1e-6)


@four_covariance_types
def test_samples_have_the_moments_of_their_component(kind: Any) -> None:
    model, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 2, 6)
    values, components = model.sample(parameters, 60_000, np.random.default_rng(7))
    covariances = Gaussian(kind).covariances(parameters.components)
    for k in range(2):
        mine = values[:, components == k]
        error = np.sqrt(np.diag(covariances[k]) / mine.shape[1])
        assert (np.abs(mine.mean(axis=1) - parameters.components.mean[k]) < 5.0 * error).all()
        unit = np.sqrt(np.diag(covariances[k]))
        np.testing.assert_allclose(
            np.cov(mine) / np.outer(unit, unit), covariances[k] / np.outer(unit, unit), atol=0.05
        )


def test_numbers_of_parameters() -> None:
    expected = {"full": 4 * 3 + 4 * 6, "tied": 4 * 3 + 6, "diag": 4 * 3 + 4 * 3, "spherical": 4 * 3 + 4}
    assert {kind: Gaussian(kind).n_parameters(3, 4) for kind in COVARIANCE_TYPES} == expected


def test_counts_flags_and_durations_may_be_gaussian_and_categories_not() -> None:
    Gaussian().bind(Schema({"n": "count", "b": "flag", "d": "duration"}).fields)
    with pytest.raises(FamilyError, match="'c' is of kind 'category'"):
        Gaussian().bind(Schema({"c": "category"}).fields)


def test_covariance_type_is_one_of_four_words() -> None:
    with pytest.raises(FamilyError, match="covariance_type='diagonal', expected one of full, tied, diag, spherical"):
        Gaussian("diagonal")  # type: ignore[arg-type]


@four_covariance_types
def test_arrays_that_are_no_parameters_are_refused(kind: Any) -> None:
    family = Gaussian(kind)
    _, parameters = draw_parameters(CASES[f"gaussian_{kind}"], 2, 8)
    arrays = family.arrays(parameters.components)
    again = family.from_arrays(arrays)
    assert all(np.array_equal(family.arrays(again)[name], array) for name, array in arrays.items())
    bad: list[dict[str, np.ndarray]] = [
        {"mean": arrays["mean"]},
        {"covariance": arrays["covariance"]},
        {**arrays, "mean": arrays["mean"][0]},
        {**arrays, "mean": arrays["mean"] * math.nan},
        {**arrays, "covariance": arrays["covariance"] * math.inf},
        {**arrays, "covariance": -arrays["covariance"]},
        {**arrays, "covariance": arrays["covariance"] * 0.0},
        {**arrays, "covariance": arrays["covariance"][..., None]},
    ]
    for one in bad:
        with pytest.raises(ValueError, match=r"mean|covariance|finite|shape|positive|variances"):
            family.from_arrays(one)
