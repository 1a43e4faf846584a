"""Results published elsewhere, or measured with other programs, that the engine must reproduce."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris, load_wine
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from stream_em import (
    BatchEM,
    Exponential,
    Gaussian,
    Harmonic,
    Mixture,
    MixtureParameters,
    OnlineEM,
    Poisson,
    RobbinsMonro,
    Schema,
)
from stream_em.families.gaussian import GaussianParameters

IRIS = load_iris()
# A prior this weak leaves the maximum-likelihood answers below as they are to their last digit.
WEAK = 1e-6


@pytest.mark.parametrize(
    ("kind", "n_components", "log_likelihood", "rand"),
    [("full", 2, -214.355, 0.568), ("full", 3, -180.185, 0.904), ("tied", 3, -256.354, 0.941)],
)
def test_iris(kind: Any, n_components: int, log_likelihood: float, rand: float) -> None:
    """Log-likelihood and adjusted Rand index at the maximum that scikit-learn reaches too."""
    fitted = BatchEM(Mixture(Gaussian(kind), n_components, prior_weight=WEAK), tol=1e-9, max_iter=2_000).fit(IRIS.data)
    assert float(fitted.log_prob(IRIS.data).sum()) == pytest.approx(log_likelihood, abs=2e-3)
    assert adjusted_rand_score(IRIS.target, fitted.predict(IRIS.data)) == pytest.approx(rand, abs=1e-3)


@pytest.mark.parametrize("n_components", [2, 3])
def test_iris_by_many_passes_of_online_em(n_components: int) -> None:
    batch = BatchEM(Mixture(Gaussian(), n_components), tol=1e-9, max_iter=2_000).fit(IRIS.data)
    learner = OnlineEM(Mixture(Gaussian(), n_components), warm_up=150, batch_size=50, averaging=True)
    generator = np.random.default_rng(0)
    for _ in range(100):
        learner.update(IRIS.data[generator.permutation(150)])
    assert learner.log_prob(IRIS.data).mean() == pytest.approx(batch.log_prob(IRIS.data).mean(), abs=0.05)
    assert adjusted_rand_score(batch.predict(IRIS.data), learner.predict(IRIS.data)) > 0.9


def scikit_learn_fit(kind: Any, data: np.ndarray) -> GaussianMixture:
    peer = GaussianMixture(3, covariance_type=kind, tol=1e-9, max_iter=5_000, n_init=3, random_state=0, reg_covar=0.0)
    return peer.fit(data)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_no_worse_than_scikit_learn_on_iris(kind: Any) -> None:
    fitted = BatchEM(Mixture(Gaussian(kind), 3, prior_weight=WEAK), tol=1e-8, max_iter=2_000, n_init=3).fit(IRIS.data)
    peer = scikit_learn_fit(kind, IRIS.data)
    assert fitted.log_prob(IRIS.data).mean() > peer.score(IRIS.data) - 1e-3
    assert fitted.n_parameters() == peer._n_parameters()


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("data", [IRIS.data, load_wine().data[:, :5]], ids=["iris", "wine"])
def test_where_scikit_learn_stops_so_do_we(kind: Any, data: np.ndarray) -> None:
    peer = scikit_learn_fit(kind, data)
    schema = Schema.infer(data)
    start = MixtureParameters(
        peer.weights_, GaussianParameters(peer.means_, peer.covariances_), np.arange(3, dtype=np.int64)
    )
    model = Mixture(Gaussian(kind), 3, prior_weight=1e-12)
    fitted = BatchEM(model, schema=schema, initial_parameters=start, max_iter=20, tol=0.0).fit(data)
    assert fitted.log_prob(data).mean() == pytest.approx(peer.score(data), abs=1e-6)
    np.testing.assert_allclose(fitted.parameters.components.mean, peer.means_, rtol=5e-3)
    np.testing.assert_allclose(fitted.responsibilities(data), peer.predict_proba(data), atol=5e-3)


@pytest.mark.parametrize(
    ("dtype", "offsets"), [(np.float64, (0.0, 1e3, 1e6, 1e8)), (np.float32, (0.0, 1e3, 1e4))], ids=["double", "single"]
)
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_variance_survives_a_large_offset(kind: Any, dtype: Any, offsets: tuple[float, ...]) -> None:
    """N(offset, 1), 200,000 events in blocks of 1,000: raw sums of squares lose this altogether."""
    noise = np.random.default_rng(0).normal(size=(200_000, 1))
    for offset in offsets:
        events = (noise + offset).astype(dtype)
        learner = OnlineEM(Mixture(Gaussian(kind), 1), schedule=Harmonic(), batch_size=1_000)
        for start in range(0, 200_000, 1_000):
            learner.update(events[start : start + 1_000])
        expected = float(events.astype(np.float64).var())
        assert learner.marginals()[1][0, 0] ** 2 == pytest.approx(expected, rel=0.005)
        assert learner.marginals()[0][0, 0] == pytest.approx(float(events.astype(np.float64).mean()), abs=1e-3)


def three_equal_iris_gaussians(n_events: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    species = [IRIS.data[IRIS.target == one] for one in range(3)]
    drawn = [generator.multivariate_normal(one.mean(axis=0), np.cov(one.T), size=n_events // 3) for one in species]
    return generator.permutation(np.concatenate(drawn))


def test_iris_like_stream_reaches_the_true_likelihood() -> None:
    """Nguyen, Forbes & McLachlan (2020), Iris1: true parameters give -1.2533 a reading, in one pass."""
    events = three_equal_iris_gaussians(60_000)
    learner = OnlineEM(Mixture(Gaussian(), 3), schedule=RobbinsMonro(0.6), averaging=True).update(events)
    assert learner.log_prob(events).mean() == pytest.approx(-1.2533, abs=0.02)


def test_poisson_mixture_of_three_rates() -> None:
    """Nguyen, Forbes & McLachlan (2020), Poi1, a million counts: the maximum is about -1.99676 an event."""
    generator = np.random.default_rng(2)
    rates = np.array([1.0, 5.0, 12.0])[generator.choice(3, size=1_000_000, p=[0.8, 0.1, 0.1])]
    # Equal counts are one event of that weight, which is the same stream in a blink.
    counts, times = np.unique(generator.poisson(rates), return_counts=True)
    schema = Schema({"n": "count"})
    fitted = BatchEM(Mixture(Poisson(), 3), schema=schema, tol=1e-10, max_iter=5_000)
    fitted.fit(counts[:, None], weight=times.astype(float))
    mean_log_likelihood = float(times @ fitted.log_prob(counts[:, None])) / 1e6
    assert mean_log_likelihood == pytest.approx(-1.99676, abs=4e-3)
    np.testing.assert_allclose(np.sort(fitted.parameters.components.mean.ravel()), [1.0, 5.0, 12.0], rtol=0.05)


def test_exponential_mixture_of_three_rates() -> None:
    """Nguyen, Forbes & McLachlan (2020), Exp1: true parameters give 0.80197 an event."""
    generator = np.random.default_rng(3)
    rates = np.array([1.0, 9.0, 15.0])[generator.choice(3, size=100_000, p=[0.2, 0.1, 0.7])]
    events = Schema({"d": "duration"}).encode(generator.exponential(1.0 / rates)[:, None])
    fitted = BatchEM(Mixture(Exponential(), 3), tol=1e-7, max_iter=500).fit(events)
    assert fitted.log_prob(events).mean() == pytest.approx(0.80197, abs=0.015)
