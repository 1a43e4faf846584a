"""Bernoulli, Poisson and Exponential components."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, draw_batch, draw_parameters
from scipy.stats import bernoulli, expon, poisson

from stream_em import Batch, Bernoulli, Exponential, FamilyError, Mixture, Poisson, Schema
from stream_em.families import Family
from stream_em.families.mean_valued import MeanParameters

REFERENCES = {
    "bernoulli": lambda mean, values: bernoulli(mean).pmf(values),
    "poisson": lambda mean, values: poisson(mean).pmf(values),
    "exponential": lambda mean, values: expon(scale=mean).pdf(values),
}
every_one = pytest.mark.parametrize("name", REFERENCES)


@every_one
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_log_density_is_that_of_scipy(name: str, missing: float) -> None:
    model, parameters = draw_parameters(CASES[name], 3, 1)
    batch = draw_batch(CASES[name], 60, 2, missing=missing)
    joint = np.repeat(parameters.weights[:, None], 60, axis=1)
    for k, means in enumerate(parameters.components.mean):
        for mean, values in zip(means, batch.values):
            joint[k] *= np.where(np.isnan(values), 1.0, REFERENCES[name](mean, np.nan_to_num(values)))
    posterior = model.posterior(parameters, batch)
    np.testing.assert_allclose(posterior.log_prob, np.log(joint.sum(axis=0)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(posterior.responsibilities, joint / joint.sum(axis=0), atol=1e-9)


@every_one
def test_m_step_is_the_weighted_mean_with_the_prior_as_pseudo_events(name: str) -> None:
    case = CASES[name]
    batch = draw_batch(case, 100, 3, missing=0.3, weighted=True)
    assert batch.weight is not None
    responsibilities = np.random.default_rng(4).dirichlet(np.ones(2), size=100).T
    shares = responsibilities * batch.weight
    parameters = Mixture(case.family, 2, prior_weight=2.0).initialize(batch, responsibilities)
    there = ~np.isnan(batch.values)
    filled = np.where(there, batch.values, 0.0)
    total, weight = filled @ batch.weight, there @ batch.weight
    # Half an event of each kind keeps the pooled mean off the edge; a duration has no natural half event.
    pooled = total / weight if name == "exponential" else (total + 0.5) / (weight + 1.0)
    expected = (shares @ filled.T + 2.0 * pooled) / (shares @ there.T + 2.0)
    np.testing.assert_allclose(parameters.components.mean, expected, rtol=1e-10)


@every_one
def test_moments_are_those_of_scipy_and_of_samples(name: str) -> None:
    model, parameters = draw_parameters(CASES[name], 2, 5)
    mean, variance = model.family.moments(parameters.components)
    reference = {"bernoulli": bernoulli, "poisson": poisson, "exponential": lambda m: expon(scale=m)}[name](mean)
    np.testing.assert_allclose(mean, reference.mean())
    np.testing.assert_allclose(variance, reference.var(), rtol=1e-9)
    values, components = model.sample(parameters, 40_000, np.random.default_rng(6))
    for k in range(2):
        mine = values[:, components == k]
        assert (np.abs(mine.mean(axis=1) - mean[k]) < 5.0 * np.sqrt(variance[k] / mine.shape[1])).all()
        np.testing.assert_allclose(mine.var(axis=1), variance[k], rtol=0.1)


@pytest.mark.parametrize("family", [Bernoulli(), Poisson(), Exponential()])
def test_one_kind_of_field_suits(family: Family) -> None:
    (kind,) = family.kinds
    for other in {"numeric", "category", "flag", "count", "duration"} - {kind}:
        with pytest.raises(FamilyError, match=f"'f' is of kind '{other}'"):
            family.bind(Schema({"f": other}).fields)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("family", "values"),
    [
        (Bernoulli(), [0.0]),
        (Bernoulli(), [1.0]),
        (Poisson(), [0.0]),
        (Exponential(), [0.0]),
        (Exponential(), [1e-95]),
        (Poisson(), [1e15]),
    ],
)
def test_a_value_never_seen_is_unlikely_and_not_impossible(family: Family, values: list[float]) -> None:
    (kind,) = family.kinds
    schema = Schema({"f": kind})  # type: ignore[dict-item]
    model = Mixture(family, 1).bind(schema)
    seen = Batch(np.array([values * 50]), schema)
    parameters = model.initialize(seen, np.ones((1, 50)))
    usual = model.log_prob(parameters, seen)[0]
    other = 1.0 - values[0] if kind == "flag" else values[0] * 3.0 + 1.0
    unusual = model.log_prob(parameters, Batch(np.array([[other]]), schema))[0]
    assert np.isfinite([usual, unusual]).all()
    assert unusual < usual


@every_one
def test_arrays_that_are_no_parameters_are_refused(name: str) -> None:
    family = CASES[name].family
    _, parameters = draw_parameters(CASES[name], 2, 7)
    again = family.from_arrays(family.arrays(parameters.components))
    assert isinstance(again, MeanParameters)
    assert np.array_equal(again.mean, parameters.components.mean)
    mean = parameters.components.mean
    for bad in (
        {},
        {"mean": mean[0]},
        {"mean": mean * np.nan},
        {"mean": -mean},
        {"mean": mean * 0.0},
        {"mean": mean + 1e200},
    ):
        with pytest.raises(ValueError, match="mean"):
            family.from_arrays(bad)
