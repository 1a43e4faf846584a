"""The drop-in for scikit-learn's GaussianMixture: the same answers, and more."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.mixture
from cases import COVARIANCE_TYPES, assert_statistics_close
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.datasets import load_wine, make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.utils._param_validation import InvalidParameterError

from stream_em import Batch, Schema
from stream_em.sklearn import GaussianMixture, MixtureModel
from stream_em.statistics import MergeError

four_covariance_types = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
ARRAYS = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")
EYES = {"full": np.tile(np.eye(3), (4, 1, 1)), "tied": np.eye(3), "diag": np.ones((4, 3)), "spherical": np.ones(4)}


def clusters(n_samples: int = 2_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples (N, 3) of four correlated clusters that overlap a little, and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(4, size=n_samples)
    centers = 3.0 * generator.normal(size=(4, 3))
    mixing = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 0.7]])
    return centers[labels] + generator.normal(size=(n_samples, 3)) @ mixing, labels


X, LABELS = clusters()


def from_a_start(kind: str, **more: Any) -> dict[str, Any]:
    start = {"weights_init": np.full(4, 0.25), "means_init": X[:4], "precisions_init": EYES[kind]}
    return {"n_components": 4, "covariance_type": kind, **start, **more}


# The same answers.


@four_covariance_types
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_twenty_iterations_agree_with_scikit_learn(kind: str) -> None:
    options = from_a_start(kind, tol=0.0, max_iter=20)
    theirs = sklearn.mixture.GaussianMixture(**options).fit(X)
    ours = GaussianMixture(**options).fit(X)
    assert ours.n_iter_ == theirs.n_iter_ == 20
    for name in (*ARRAYS, "lower_bounds_"):
        wanted = getattr(theirs, name)
        # Entries near 0 are differences of larger ones.
        np.testing.assert_allclose(getattr(ours, name), wanted, rtol=1e-8, atol=1e-8 * np.abs(wanted).max())


@four_covariance_types
def test_it_converges_where_scikit_learn_does(kind: str) -> None:
    options = from_a_start(kind, random_state=3)
    theirs = sklearn.mixture.GaussianMixture(**options).fit(X)
    ours = GaussianMixture(**options).fit(X)
    assert (ours.n_iter_, ours.converged_) == (theirs.n_iter_, theirs.converged_)
    np.testing.assert_allclose(ours.lower_bound_, theirs.lower_bound_, rtol=1e-10)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-9)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(ours.score(X), theirs.score(X), rtol=1e-10)
    np.testing.assert_allclose((ours.bic(X), ours.aic(X)), (theirs.bic(X), theirs.aic(X)), rtol=1e-10)
    np.testing.assert_array_equal(GaussianMixture(**options).fit_predict(X), ours.predict(X))


@four_covariance_types
def test_conversions_are_exact(kind: str) -> None:
    options = {"n_components": 4, "covariance_type": kind, "random_state": 1, "tol": 1e-4}
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    theirs = sklearn.mixture.GaussianMixture(**options).fit(frame)
    ours = GaussianMixture.from_sklearn(theirs, step_size=0.25)
    back = ours.to_sklearn()
    assert ours.step_size == 0.25
    assert back.get_params() == theirs.get_params()
    for name, wanted in vars(theirs).items():
        np.testing.assert_array_equal(getattr(ours, name), wanted)
        np.testing.assert_array_equal(getattr(back, name), wanted)
    np.testing.assert_allclose(ours.score_samples(frame), theirs.score_samples(frame), rtol=1e-10)
    for one, other in zip(ours.sample(50), theirs.sample(50)):
        np.testing.assert_array_equal(one, other)
    ours.means_ += 1.0
    assert not np.array_equal(ours.means_, theirs.means_)


def test_only_scikit_learns_own_mixture_is_converted() -> None:
    with pytest.raises(TypeError, match="got BayesianGaussianMixture"):
        GaussianMixture.from_sklearn(sklearn.mixture.BayesianGaussianMixture())  # type: ignore[arg-type]


def test_a_mixture_may_be_set_up_by_its_attributes() -> None:
    for mixture in (GaussianMixture(2), sklearn.mixture.GaussianMixture(2)):
        mixture.weights_ = np.array([0.3, 0.7])
        mixture.means_ = np.array([[0.0], [5.0]])
        mixture.precisions_cholesky_ = np.array([[[1.0]], [[2.0]]])
        np.testing.assert_allclose(
            mixture.score_samples([[1.0]]),
            np.log(0.3 * multivariate_normal(0.0, 1.0).pdf(1.0) + 0.7 * multivariate_normal(5.0, 0.25).pdf(1.0)),
            rtol=1e-10,
        )


def test_learning_goes_on_from_attributes_that_were_set() -> None:
    means = np.array([X[label == LABELS].mean(axis=0) for label in range(4)])
    by_hand = GaussianMixture(4)
    by_hand.weights_ = np.full(4, 0.25)
    by_hand.means_ = means
    by_hand.covariances_ = EYES["full"]
    fork = by_hand.fork()
    np.testing.assert_array_equal(fork.means_, means)
    changed = GaussianMixture(4, random_state=0).fit(X)
    changed.weights_, changed.means_, changed.covariances_ = by_hand.weights_, by_hand.means_, by_hand.covariances_
    for mixture in (fork, changed, by_hand):
        mixture.partial_fit(X)
    np.testing.assert_array_equal(changed.means_, by_hand.means_)
    np.testing.assert_array_equal(fork.means_, by_hand.means_)
    assert not np.array_equal(by_hand.means_, means)


def test_no_iteration_leaves_the_start_as_in_scikit_learn() -> None:
    options = from_a_start("full", max_iter=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GaussianMixture(**options).fit(X)
    np.testing.assert_array_equal(ours.means_, X[:4])
    assert (ours.n_iter_, ours.converged_, ours.lower_bound_, ours.lower_bounds_) == (0, False, -np.inf, [])


# Errors and warnings in scikit-learn's words.

WORDS: dict[str, tuple[dict[str, Any], Any]] = {
    "too few samples": ({"n_components": 5}, X[:4]),
    "one sample": ({}, X[:1]),
    "no component": ({"n_components": 0}, X),
    "negative tol": ({"tol": -1.0}, X),
    "negative reg_covar": ({"reg_covar": -1.0}, X),
    "unknown covariance type": ({"covariance_type": "banana"}, X),
    "ill-shaped weights": ({"n_components": 2, "weights_init": [1.0]}, X),
    "weights that do not sum to 1": ({"n_components": 2, "weights_init": [0.5, 0.6]}, X),
    "ill-shaped means": ({"n_components": 2, "means_init": [[1.0, 2.0]]}, X),
    "ill-shaped precisions": ({"precisions_init": np.eye(2), "covariance_type": "tied"}, X),
    "negative precisions": ({"precisions_init": -np.ones((1, 3)), "covariance_type": "diag"}, X),
    "indefinite precisions": ({"precisions_init": -np.eye(3)[None]}, X),
    "infinite value": ({}, np.array([[1.0], [np.inf], [2.0]])),
    "one dimension": ({}, X[:, 0]),
}


@pytest.mark.parametrize("case", WORDS)
def test_errors_are_those_of_scikit_learn(case: str) -> None:
    options, samples = WORDS[case]
    with pytest.raises((ValueError, TypeError)) as theirs:
        sklearn.mixture.GaussianMixture(**options).fit(samples)
    with pytest.raises((ValueError, TypeError)) as ours:
        GaussianMixture(**options).fit(samples)
    assert isinstance(ours.value, type(theirs.value))
    # The set of accepted words has no order.
    assert str(ours.value).split("{")[0] == str(theirs.value).split("{")[0]


def test_weights_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"'weights' should be in the range \[0, 1\], but got max value 1.5.*-0.5"):
        GaussianMixture(2, weights_init=[1.5, -0.5]).fit(X)


@pytest.mark.parametrize("verb", ["predict", "predict_proba", "score_samples", "score", "bic", "aic", "sample"])
def test_what_is_not_fitted_says_so_as_in_scikit_learn(verb: str) -> None:
    arguments = () if verb == "sample" else (X,)
    with pytest.raises(ValueError, match="not fitted") as theirs:
        getattr(sklearn.mixture.GaussianMixture(), verb)(*arguments)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(GaussianMixture(), verb)(*arguments)
    assert str(ours.value) == str(theirs.value)


def test_no_convergence_is_warned_of_as_in_scikit_learn() -> None:
    options = from_a_start("full", max_iter=1)
    with pytest.warns(ConvergenceWarning) as theirs:
        sklearn.mixture.GaussianMixture(**options).fit(X)
    with pytest.warns(ConvergenceWarning) as ours:
        GaussianMixture(**options).fit(X)
    assert [str(one.message) for one in ours] == [str(one.message) for one in theirs]
    assert ours[0].filename == __file__


def test_values_too_large_to_be_squared_are_named() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [1e200, 3.0]})
    with pytest.raises(ValueError, match=r"1e\+200 in feature 'b'"):
        GaussianMixture().fit(frame)


@pytest.mark.parametrize("weight", [[-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0], [1.0, 1.0], [1e-200, 1, 1]])
def test_wrong_weights_are_refused(weight: list[float]) -> None:
    for verb in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=r"(?i)weight"):
            getattr(GaussianMixture(), verb)(X[:3], sample_weight=weight)


# Weights.


@four_covariance_types
@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_integer_weights_are_repeated_rows(kind: str, init_params: str) -> None:
    generator = np.random.default_rng(2)
    weight = generator.integers(0, 4, size=500)
    rows = generator.permutation(np.repeat(X[:500], weight, axis=0))
    options = {"n_components": 3, "covariance_type": kind, "init_params": init_params, "random_state": 0}
    weighted = GaussianMixture(**options).fit(X[:500], sample_weight=weight)
    repeated = GaussianMixture(**options).fit(rows)
    assert weighted.n_iter_ == repeated.n_iter_
    np.testing.assert_allclose(weighted.lower_bounds_, repeated.lower_bounds_, rtol=1e-9)
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-7)
    for name in ("score", "bic", "aic", "icl"):
        ours = getattr(weighted, name)(X[:500], sample_weight=weight)
        np.testing.assert_allclose(ours, getattr(weighted, name)(rows), rtol=1e-9)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-90, 1e-28, 1e-3, 1.0, 1e3, 1e28, 1e90]))
def test_the_scale_of_weights_does_not_matter(seed: int, scale: float) -> None:
    weight = np.random.default_rng(seed).exponential(size=200)
    one, other = (
        GaussianMixture(2, random_state=0).fit(X[:200], sample_weight=factor * weight) for factor in (1.0, scale)
    )
    np.testing.assert_allclose(other.score_samples(X), one.score_samples(X), rtol=1e-6)


@four_covariance_types
def test_powers_of_two_in_all_weights_change_no_bit(kind: str) -> None:
    options: dict[str, Any] = {"n_components": 4, "covariance_type": kind, "random_state": 0}
    for weight in (np.ones(len(X)), 1.0 + np.arange(len(X)) % 3):
        usual, tiny = (GaussianMixture(**options).fit(X, sample_weight=factor * weight) for factor in (1.0, 2.0**-93))
        for name in (*ARRAYS, "lower_bounds_"):
            np.testing.assert_array_equal(getattr(tiny, name), getattr(usual, name))


def test_partial_fit_counts_weights_in_the_unit_of_fit() -> None:
    """What a weighted fit learned weighs as much as its weights say beside what comes after."""
    options: dict[str, Any] = {"step_size": "harmonic", "reg_covar": 0.0}
    mixture = GaussianMixture(**options).fit(X[:500], sample_weight=np.full(500, 300.0))
    mixture.partial_fit(X[500:], sample_weight=np.full(1_500, 50.0))
    weight = np.repeat([300.0, 50.0], [500, 1_500])
    np.testing.assert_allclose(mixture.means_[0], np.average(X, axis=0, weights=weight), rtol=1e-10)
    assert mixture._learner.statistics is not None
    assert mixture._learner.statistics.total_weight == pytest.approx(weight.sum(), rel=1e-12)


def test_partial_fit_refuses_weights_beside_which_its_prior_would_count() -> None:
    options: dict[str, Any] = {"n_components": 4, "random_state": 0}
    with pytest.raises(ValueError, match=r"add up to 2e-25 .* at least 1e-09; multiply all weights by one factor"):
        GaussianMixture(**options).partial_fit(X, sample_weight=np.full(len(X), 1e-28))
    light, reference = (
        GaussianMixture(**options).partial_fit(X, sample_weight=np.full(len(X), weight)) for weight in (1e-12, 1.0)
    )
    np.testing.assert_allclose(light.score_samples(X), reference.score_samples(X), rtol=1e-6)
    # One light sample among others is no mistake.
    assert light.partial_fit(X[:1], sample_weight=[1e-28]).n_samples_seen_ == len(X) + 1
    fitted = GaussianMixture(**options).fit(X, sample_weight=np.full(len(X), 1e-28))
    for mixture in (fitted, fitted.fork()):
        before = pickle.dumps(mixture)
        with pytest.raises(ValueError, match="with those that are remembered"):
            mixture.partial_fit(X[:10], sample_weight=np.full(10, 1e-28))
        assert pickle.dumps(mixture) == before
    assert fitted.partial_fit(X).score(X) > reference.score(X) - 0.01


# Missing values.


@four_covariance_types
def test_missing_values_are_marginalised(kind: str) -> None:
    generator = np.random.default_rng(4)
    gaps = np.where(generator.random(X.shape) < 0.4, np.nan, X)
    assert np.isnan(gaps).all(axis=1).any()
    mixture = GaussianMixture(4, covariance_type=kind, random_state=0, tol=1e-5, reg_covar=0.0, max_iter=500).fit(gaps)
    assert (np.diff(mixture.lower_bounds_) > -1e-9).all()
    for missing, kept in (([0], [1, 2]), ([1, 2], [0])):
        part = X[:50].copy()
        part[:, missing] = np.nan
        alone = mixture.marginal(kept)
        np.testing.assert_allclose(mixture.score_samples(part), alone.score_samples(part[:, kept]), rtol=1e-9)
        np.testing.assert_allclose(mixture.predict_proba(part), alone.predict_proba(part[:, kept]), atol=1e-9)
    nothing = np.full((1, 3), np.nan)
    np.testing.assert_allclose(mixture.predict_proba(nothing)[0], mixture.weights_, rtol=1e-12)
    np.testing.assert_allclose(mixture.score_samples(nothing), 0.0, atol=1e-12)


def test_gaps_at_random_cost_little() -> None:
    generator = np.random.default_rng(6)
    gaps = np.where(generator.random(X.shape) < 0.2, np.nan, X)
    complete, partial = (GaussianMixture(4, random_state=0, tol=1e-6).fit(one) for one in (X, gaps))
    assert partial.score(X) > complete.score(X) - 0.05


# Marginal and conditional.


@four_covariance_types
def test_joint_is_marginal_times_conditional(kind: str) -> None:
    mixture = GaussianMixture(4, covariance_type=kind, random_state=0).fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    at = X[7]
    joint = mixture.score_samples(pd.DataFrame([at], columns=["a", "b", "c"]))
    given_two = mixture.conditional({"c": at[2], "a": at[0]})
    marginal = mixture.marginal(["c", "a"])
    assert given_two.feature_names_in_.tolist() == ["b"]
    assert marginal.feature_names_in_.tolist() == ["c", "a"]
    parts = given_two.score_samples(pd.DataFrame({"b": at[[1]]})) + marginal.score_samples(
        pd.DataFrame([at[[2, 0]]], columns=["c", "a"])
    )
    np.testing.assert_allclose(joint, parts, rtol=1e-9)
    assert given_two.sample(3)[0].shape == (3, 1)
    assert given_two.to_sklearn().n_features_in_ == 1


def test_wrong_lists_of_features_are_refused() -> None:
    mixture = GaussianMixture().fit(pd.DataFrame(X, columns=["temp", "vib", "load"]))
    with pytest.raises(ValueError, match="the given value of 'temp' must be a finite number, got 'hot'"):
        mixture.conditional({"temp": "hot"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="the given value of 'temp' must be a finite number, got None"):
        mixture.conditional({"temp": None})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"given must map features to their values, such as \{0: 1.5\}, got \[0\]"):
        mixture.conditional([0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sequence of features, such as \['vib'\], got 'vib'"):
        mixture.marginal("vib")
    with pytest.raises(TypeError, match=r"sequence of features, such as \[1\], got 1"):
        mixture.marginal(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name at least one feature"):
        mixture.marginal([])
    for feature in (True, 0.0):
        with pytest.raises(TypeError, match=f"by name or by position, got {feature}"):
            mixture.marginal([feature])  # type: ignore[list-item]
    np.testing.assert_array_equal(mixture.marginal(np.array([1])).means_, mixture.means_[:, [1]])


@pytest.mark.parametrize("strings", [[["a"], ["b"]], np.array([["a", "b"]] * 5), pd.DataFrame({"c": ["a", "b"] * 3})])
def test_strings_are_refused_in_scikit_learns_words_and_told_where_to_go(strings: Any) -> None:
    with pytest.raises(ValueError, match=r"could not convert string to float: .*'a'") as theirs:
        sklearn.mixture.GaussianMixture().fit(strings)
    with pytest.raises(ValueError, match=r"stream_em\.sklearn\.MixtureModel takes") as ours:
        GaussianMixture().fit(strings)
    assert str(ours.value).startswith(str(theirs.value))


@pytest.mark.parametrize("weight", [None, [1.0, 1.0, 1.0, 0.0]])
def test_samples_without_any_value_are_no_fit(weight: Any) -> None:
    nothing = np.full((4, 2), np.nan)
    if weight is not None:
        nothing[3] = 1.0
    for estimator in (GaussianMixture(2), MixtureModel(2)):
        with pytest.raises(ValueError, match=r"holds no value: all of its \d samples with weight are missing"):
            estimator.fit(nothing, sample_weight=weight)


def test_features_that_are_not_there_are_named() -> None:
    mixture = GaussianMixture().fit(X)
    with pytest.raises(ValueError, match="no feature 3: the mixture has 3 features"):
        mixture.marginal([3])
    with pytest.raises(ValueError, match="no feature 'y'; the features are 'x0', 'x1', 'x2'"):
        mixture.conditional({"y": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        mixture.conditional({0: np.nan})
    for given_twice in ({0: 1.0, "x0": 2.0}, {-3: 1.0, 0: 1.0}):
        with pytest.raises(ValueError, match="feature 'x0' is given more than once"):
            mixture.conditional(given_twice)  # type: ignore[arg-type]


# The usual traps.


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_lower_bounds_are_of_the_types_of_scikit_learns(dtype: Any) -> None:
    for max_iter in (0, 5):
        options = {"n_components": 4, "random_state": 0, "max_iter": max_iter}
        theirs = sklearn.mixture.GaussianMixture(**options).fit(X.astype(dtype))
        ours = GaussianMixture(**options).fit(X.astype(dtype))
        assert type(ours.lower_bound_) is type(theirs.lower_bound_)
        assert [type(one) for one in ours.lower_bounds_] == [type(one) for one in theirs.lower_bounds_]
    fork = ours.fork().partial_fit(X.astype(dtype))
    merged = ours.merge(fork)
    assert {type(one.lower_bound_) for one in (fork, merged)} == {dtype}


@four_covariance_types
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_float32_stays_float32_and_loses_nothing(kind: str) -> None:
    single = X.astype(np.float32)
    ours = GaussianMixture(**from_a_start(kind)).fit(single)
    reference = GaussianMixture(**from_a_start(kind)).fit(single.astype(np.float64))
    for name in ARRAYS:
        assert getattr(ours, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(ours, name), getattr(reference, name).astype(np.float32))
    assert ours.predict_proba(single).dtype == ours.score_samples(single).dtype == np.float32
    assert ours.score_samples(X).dtype == np.float64
    np.testing.assert_allclose(ours.score_samples(single), reference.score_samples(X), rtol=1e-4, atol=1e-4)
    assert ours.partial_fit(single).means_.dtype == np.float32


@four_covariance_types
def test_huge_offsets_change_no_covariance(kind: str) -> None:
    near, far = (
        GaussianMixture(**from_a_start(kind, means_init=X[:4] + offset)).fit(X + offset) for offset in (0.0, 1e8)
    )
    # An offset of 1e8 rounds the values themselves to 1.5e-8.
    np.testing.assert_allclose(far.covariances_, near.covariances_, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(far.predict(X + 1e8), near.predict(X))


@four_covariance_types
@pytest.mark.parametrize("constant", [0.0, 1.0, -3e8])
def test_a_constant_column_has_the_variance_of_the_regularisation(kind: str, constant: float) -> None:
    samples = X.copy()
    samples[:, 1] = constant
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        mixture = GaussianMixture(4, covariance_type=kind, random_state=0, reg_covar=1e-5).fit(samples)
    assert np.isfinite(mixture.score_samples(samples)).all()
    np.testing.assert_allclose(mixture.means_[:, 1], constant, rtol=1e-12, atol=1e-12)
    if kind != "spherical":
        variance = {"full": lambda c: c[:, 1, 1], "tied": lambda c: c[1, 1], "diag": lambda c: c[:, 1]}[kind]
        np.testing.assert_allclose(variance(mixture.covariances_), 1e-5, rtol=1e-6)


@four_covariance_types
def test_duplicated_rows_and_as_many_components_as_rows(kind: str) -> None:
    few = X[:12]
    own = GaussianMixture(12, covariance_type=kind, random_state=0).fit(few)
    assert sorted(own.predict(few).tolist()) == list(range(12))
    copies = np.repeat(X[:3], 10, axis=0)
    same = GaussianMixture(3, covariance_type=kind, random_state=0).fit(copies)
    np.testing.assert_allclose(np.sort(same.means_, axis=0), np.sort(X[:3], axis=0), atol=1e-9)
    np.testing.assert_allclose(same.weights_, 1.0 / 3.0, rtol=1e-9)
    identical = GaussianMixture(2, covariance_type=kind, random_state=0).fit(np.ones((5, 2)))
    assert np.isfinite(identical.score_samples(np.ones((1, 2)))).all()


COLLAPSED = np.vstack([np.full((30, 2), 5e5), 1e7 * np.random.default_rng(0).normal(size=(60, 2))])
COLLINEAR = np.outer(np.random.default_rng(1).normal(size=60), [1.0, 2.0, -1.0])


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_a_collapsed_component_is_shrunk_and_named(kind: str) -> None:
    narrow = {"full": np.eye(2), "diag": np.ones(2), "spherical": 1.0}[kind]
    mixture = GaussianMixture(
        2,
        covariance_type=kind,
        reg_covar=0.0,
        weights_init=[0.5, 0.5],
        means_init=[[0.0, 0.0], [5e5, 5e5]],
        precisions_init=np.array([1e-14 * narrow, 1e-2 * narrow]),
    )
    with pytest.warns(ConvergenceWarning, match="Components 1 have ill-defined empirical covariance") as caught:
        mixture.fit(COLLAPSED)
    assert len(caught) == 1
    assert mixture.converged_
    assert mixture.predict(np.full((1, 2), 5e5)).tolist() == [1]
    spread = mixture.marginal([0])
    deviation = float(np.sqrt(spread.covariances_.ravel()[1]))
    # A tenth of the pooled deviation is where a shrunk covariance stands when its samples are all alike.
    assert 0.1 * COLLAPSED[:, 0].std() <= deviation <= COLLAPSED[:, 0].std()


def test_a_tied_covariance_is_that_of_all_components() -> None:
    with pytest.warns(ConvergenceWarning, match="Components 0, 1 have ill-defined empirical covariance"):
        mixture = GaussianMixture(2, covariance_type="tied", random_state=0, reg_covar=0.0).fit(COLLINEAR)
    assert (np.linalg.eigvalsh(mixture.covariances_) > 0.0).all()


def test_recovery_where_scikit_learn_gives_up() -> None:
    options = {"n_components": 1, "reg_covar": 0.0}
    with pytest.raises(ValueError, match="ill-defined empirical covariance"):
        sklearn.mixture.GaussianMixture(**options).fit(COLLINEAR)
    with pytest.warns(ConvergenceWarning, match="Components 0 have ill-defined empirical covariance"):
        mixture = GaussianMixture(**options).fit(COLLINEAR)
    # A hundredth of the way from the sample covariance to the pooled variances.
    sample = np.cov(COLLINEAR.T, bias=True)
    expected = 0.99 * sample + 0.01 * np.diag(np.diag(sample))
    np.testing.assert_allclose(mixture.covariances_[0], expected, rtol=1e-9)
    with pytest.warns(ConvergenceWarning, match="Components 0 have ill-defined"):
        GaussianMixture(**options).partial_fit(COLLINEAR)


# Starts.


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n_clusters", [2, 3, 5])
def test_the_start_survives_stretched_clusters(n_clusters: int, turned: bool) -> None:
    """Clusters in a row, stretched across it: where a k-means start cuts all of them in two."""
    generator = np.random.default_rng(n_clusters)
    labels = generator.integers(n_clusters, size=1_500)
    samples = np.column_stack([100.0 * generator.normal(size=1_500), 4.0 * labels + 0.6 * generator.normal(size=1_500)])
    if turned:
        samples = samples @ np.linalg.qr(generator.normal(size=(2, 2)))[0]
    theirs = sklearn.mixture.GaussianMixture(n_clusters, random_state=0).fit_predict(samples)
    ours = GaussianMixture(n_clusters, random_state=0).fit_predict(samples)
    assert adjusted_rand_score(labels, theirs) < 0.1
    assert adjusted_rand_score(labels, ours) > 0.92


def test_the_start_survives_stretched_blobs() -> None:
    """The blobs of scikit-learn's example, the axis that separates them compressed and the other stretched."""
    samples, labels = make_blobs(n_samples=1_500, random_state=170)
    stretched = samples @ np.array([[1.0, 0.0], [0.0, 30.0]])
    for seed in range(3):
        ours = GaussianMixture(3, random_state=seed).fit_predict(stretched)
        assert adjusted_rand_score(labels, ours) > 0.92


def test_starts_compete_over_a_sample_and_the_best_goes_on_to_all() -> None:
    near, labels = clusters(25_000, seed=3)
    many = near + 20.0 * np.eye(4)[labels, :3]
    one, best = (
        GaussianMixture(4, n_init=n_init, init_params="k-means++", tol=1e-6, random_state=0).fit(many)
        for n_init in (1, 5)
    )
    assert best.n_samples_seen_ == 25_000
    assert best.lower_bound_ >= one.lower_bound_ - 1e-6
    assert adjusted_rand_score(labels, best.predict(many)) > 0.99
    # Parameters that converged on the sample have little left to do on all samples.
    assert best.n_iter_ <= one.n_iter_
    np.testing.assert_allclose(best.lower_bound_, best.score(many), atol=1e-5)


@pytest.mark.parametrize("init_params", ["k-means++", "random_from_data"])
@pytest.mark.parametrize("data", ["blobs", "wine"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_few_rows_of_many_features_start_as_well_as_in_scikit_learn(data: str, init_params: str) -> None:
    if data == "blobs":
        samples, labels = make_blobs(200, n_features=12, centers=4, cluster_std=2.0, random_state=3)
    else:
        samples, labels = load_wine(return_X_y=True)
        samples = (samples - samples.mean(axis=0)) / samples.std(axis=0)
    k = len(set(labels.tolist()))
    ours, theirs = (
        np.median([of(k, init_params=init_params, random_state=seed).fit(samples).lower_bound_ for seed in range(12)])
        for of in (GaussianMixture, sklearn.mixture.GaussianMixture)
    )
    # The bound depends on the chosen samples: the median of 12 varies by about 0.1 from seeds to seeds.
    assert ours > theirs - 0.2


def test_chosen_samples_attract_those_nearest_in_the_units_of_the_data() -> None:
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(300, 2)) * [100.0, 1.0] + [1e4, 0.0]
    for init_params in ("k-means++", "random_from_data"):
        start = GaussianMixture(4, init_params=init_params, random_state=1, max_iter=0).fit(wide)
        # Along the wide feature alone, so that parts of the samples, one after the other, are the components.
        order = np.argsort(start.means_[:, 0])
        shares = np.round(start.weights_[order] * len(wide)).astype(int)
        parts = np.split(np.sort(wide[:, 0]), np.cumsum(shares)[:-1])
        np.testing.assert_allclose(start.means_[order, 0], [part.mean() for part in parts], rtol=1e-3)


def test_given_means_are_where_it_starts() -> None:
    means = np.array([X[label == LABELS].mean(axis=0) for label in range(4)])
    start = GaussianMixture(4, means_init=means, max_iter=0).fit(X)
    np.testing.assert_array_equal(start.means_, means)
    nearest = ((X[:, None] - means) / X.std(axis=0)).__pow__(2).sum(axis=2).argmin(axis=1)
    np.testing.assert_allclose(start.weights_, np.bincount(nearest) / len(X), rtol=1e-9)


# Warm starts.


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_warm_start_goes_on_where_it_stopped() -> None:
    whole = GaussianMixture(**from_a_start("full", max_iter=6, tol=0.0)).fit(X)
    pieces = GaussianMixture(**from_a_start("full", max_iter=2, tol=0.0, warm_start=True))
    bounds = []
    for _ in range(3):
        bounds += pieces.fit(X).lower_bounds_
        assert pieces.n_iter_ == 2
    np.testing.assert_allclose(bounds, whole.lower_bounds_, rtol=1e-12)
    np.testing.assert_allclose(pieces.means_, whole.means_, rtol=1e-12)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_warm_start_one_iteration_at_a_time_converges() -> None:
    mixture = GaussianMixture(**from_a_start("full", max_iter=1, warm_start=True))
    reference = GaussianMixture(**from_a_start("full")).fit(X)
    calls = 0
    while not (calls and mixture.converged_):
        mixture.fit(X)
        calls += 1
    assert calls == reference.n_iter_
    np.testing.assert_allclose(mixture.means_, reference.means_, rtol=1e-12)


def test_warm_start_goes_on_from_partial_fit_and_from_conversions() -> None:
    streamed = GaussianMixture(4, warm_start=True, random_state=0, tol=1e-6).partial_fit(X)
    before = streamed.score(X)
    streamed.fit(X)
    assert streamed.lower_bounds_[0] == pytest.approx(before, rel=1e-12)
    theirs = sklearn.mixture.GaussianMixture(4, random_state=0, max_iter=200).fit(X)
    converted = GaussianMixture.from_sklearn(theirs, warm_start=True).fit(X)
    assert converted.n_iter_ <= 2


def test_warm_start_with_another_shape_is_refused() -> None:
    mixture = GaussianMixture(4, warm_start=True, random_state=0).fit(X)
    with pytest.raises(ValueError, match="set warm_start=False to start anew"):
        mixture.set_params(n_components=3).fit(X)
    with pytest.raises(ValueError, match="expecting 3 features"):
        mixture.set_params(n_components=4).fit(X[:, :2])


# Streaming.


@four_covariance_types
@given(cuts=st.lists(st.integers(1, 599), max_size=6), seed=st.integers(0, 10**6))
def test_partial_fit_over_any_split_gives_the_same_statistics(kind: str, cuts: list[int], seed: int) -> None:
    # So far apart that every responsibility is 0 or 1 whatever was learned before: they are fixed.
    generator = np.random.default_rng(seed)
    labels = np.arange(600) % 4
    samples = generator.normal(size=(600, 3)) + 100.0 * labels[:, None]
    weight = generator.integers(0, 3, size=600).astype(float)
    weight[0] = 1.0
    options = from_a_start(kind, means_init=100.0 * np.arange(4)[:, None] * np.ones(3), step_size="harmonic")
    whole = GaussianMixture(**options).partial_fit(samples, sample_weight=weight)
    split = GaussianMixture(**options)
    for rows in np.split(np.arange(600), sorted(set(cuts))):
        split.partial_fit(samples[rows], sample_weight=weight[rows])
    assert whole._learner.statistics is not None
    assert split._learner.statistics is not None
    for part, wanted in whole._learner.statistics.parts.items():
        for name, array in wanted.arrays().items():
            found = split._learner.statistics.parts[part].arrays()[name]
            # Products of different features may cancel to a small part of the scatter.
            np.testing.assert_allclose(found, array, rtol=1e-9, atol=1e-9 * np.abs(array).max())
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(split, name), getattr(whole, name), rtol=1e-7, atol=1e-9)


@four_covariance_types
def test_the_door_gives_the_statistics_of_the_engine(kind: str) -> None:
    mixture = GaussianMixture(**from_a_start(kind, step_size="harmonic", batch_size=5_000)).partial_fit(X)
    schema = Schema({"x0": "numeric", "x1": "numeric", "x2": "numeric"})
    model = mixture._mixture(schema).bind(schema)
    start = GaussianMixture(**from_a_start(kind, max_iter=0)).fit(X)._fitted().parameters
    expected = model.e_step(start, Batch(np.ascontiguousarray(X.T), schema))
    assert mixture._learner.statistics is not None
    assert_statistics_close(mixture._learner.statistics, expected)


def test_a_stream_reaches_what_fit_reaches() -> None:
    many, _ = clusters(20_000, seed=8)
    fresh, _ = clusters(5_000, seed=8)
    streamed = GaussianMixture(4, random_state=0)
    for start in range(0, len(many), 500):
        streamed.partial_fit(many[start : start + 500])
    fitted = GaussianMixture(4, random_state=0).fit(many)
    assert streamed.score(fresh) > fitted.score(fresh) - 0.01
    assert streamed.n_iter_ == 40
    assert streamed.n_samples_seen_ == 20_000
    assert streamed.lower_bound_ == pytest.approx(streamed.score(many), abs=0.1)


@pytest.mark.parametrize("init_params", ["kmeans", "k-means++", "random", "random_from_data"])
def test_a_stream_of_single_samples_tells_components_apart_after_its_warm_up(init_params: Any) -> None:
    mixture = GaussianMixture(2, random_state=0, warm_up=30, init_params=init_params)
    samples = np.concatenate([X[LABELS == 0][:30], X[LABELS == 0][:30] + 50.0], axis=1).reshape(-1, 3)
    for row, sample in enumerate(samples):
        mixture.partial_fit(sample[None])
        assert np.isfinite(mixture.score_samples(samples)).all()
        assert len(set(mixture.predict(samples).tolist())) == (1 if row < 29 else 2)
    assert mixture.n_samples_seen_ == 60


def test_partial_fit_starts_from_given_parameters() -> None:
    means = np.array([X[label == LABELS].mean(axis=0) for label in range(4)])
    mixture = GaussianMixture(4, means_init=means, random_state=0).partial_fit(X)
    np.testing.assert_allclose(mixture.means_, means, atol=0.5)


def test_partial_fit_goes_on_from_a_fit() -> None:
    mixture = GaussianMixture(4, random_state=0, step_size="harmonic").fit(X[:1_000])
    iterations = mixture.n_iter_
    mixture.partial_fit(X[1_000:])
    assert mixture.n_samples_seen_ == 2_000
    assert mixture.n_iter_ == iterations + 1
    whole = GaussianMixture(4, random_state=0).fit(X)
    assert mixture.score(X) > whole.score(X) - 0.01


def test_other_columns_are_refused_and_leave_the_model_untouched() -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    mixture = GaussianMixture(4, random_state=0).partial_fit(frame)
    before = pickle.dumps(mixture)
    wrong = {
        "feature names": frame.rename(columns={"a": "z"}),
        "same order": frame[["c", "b", "a"]],
        "infinity": frame.replace(frame.iloc[3, 1], np.inf),
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=message):
            mixture.partial_fit(other)
        assert pickle.dumps(mixture) == before
    unnamed = GaussianMixture(4, random_state=0).partial_fit(X)
    before = pickle.dumps(unnamed)
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 3 features as input"):
        unnamed.partial_fit(X[:, :2])
    assert pickle.dumps(unnamed) == before


def test_another_mixture_than_was_fitted_is_refused() -> None:
    mixture = GaussianMixture(4, random_state=0).fit(X).set_params(n_components=3)
    with pytest.raises(ValueError, match="call fit, or set them back"):
        mixture.partial_fit(X)


@pytest.mark.parametrize("stage", ["warming up", "streaming", "fitted", "converted"])
@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("batch_size", 2.5), ("step_size", "foo"), ("reg_covar", -1.0)]
)
def test_partial_fit_checks_parameters_whatever_came_before(stage: str, name: str, value: Any) -> None:
    mixture = GaussianMixture(2, random_state=0).partial_fit(X[:10] if stage == "warming up" else X)
    if stage == "fitted":
        mixture.fit(X)
    if stage == "converted":
        mixture = GaussianMixture.from_sklearn(mixture.to_sklearn())
    density = mixture.score_samples(X)
    mixture.set_params(**{name: value})
    with pytest.raises(InvalidParameterError, match=f"The '{name}' parameter of GaussianMixture must be"):
        mixture.partial_fit(X)
    # What was fitted is still there, and none of these parameters takes part in predictions.
    np.testing.assert_array_equal(mixture.score_samples(X), density)


def test_attributes_that_were_set_must_fit_the_parameters_to_go_on() -> None:
    mixture = GaussianMixture(2)
    mixture.weights_, mixture.means_ = np.array([1.0]), np.zeros((1, 3))
    mixture.covariances_ = np.eye(3)[None]
    with pytest.raises(ValueError, match="call fit, or set them back"):
        mixture.partial_fit(X)


def test_fit_forgets_what_was_streamed() -> None:
    streamed = GaussianMixture(4, random_state=0).partial_fit(X + 50.0).fit(X)
    np.testing.assert_array_equal(streamed.means_, GaussianMixture(4, random_state=0).fit(X).means_)


# Merging.


def test_shares_merge_into_the_whole() -> None:
    start = GaussianMixture(4, random_state=0, step_size="harmonic").fit(X[:500])
    merged = start
    for share in np.array_split(X[500:], 3):
        merged = merged.merge(start.fork().partial_fit(share))
    assert merged.n_samples_seen_ == 2_000
    assert start.n_samples_seen_ == 500
    assert merged.score(X) > GaussianMixture(4, random_state=0).fit(X).score(X) - 0.01
    merged.partial_fit(X)
    assert merged.n_samples_seen_ == 4_000


def test_scikit_learns_own_mixture_is_told_apart_when_it_does_not_merge() -> None:
    theirs = sklearn.mixture.GaussianMixture(2, random_state=0).fit(X)
    with pytest.raises(MergeError, match=r"with a sklearn\.mixture\.GaussianMixture; GaussianMixture\.from_sklearn"):
        GaussianMixture(2, random_state=0).fit(X).merge(theirs)  # type: ignore[arg-type]


def test_what_does_not_descend_from_one_start_is_refused() -> None:
    one, other = (GaussianMixture(4, random_state=seed).fit(X) for seed in (0, 1))
    with pytest.raises(MergeError, match="do not descend from the same start"):
        one.merge(other)
    with pytest.raises(MergeError, match=r"cannot be merged with a builtins\.int"):
        one.merge(3)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="parameters alone say nothing"):
        one.merge(GaussianMixture.from_sklearn(one.to_sklearn()))


@pytest.mark.parametrize("name", ["weights_", "means_", "covariances_"])
def test_what_was_learned_before_attributes_were_set_does_not_merge(name: str) -> None:
    start = GaussianMixture(4, random_state=0).fit(X[:500])
    share = start.fork().partial_fit(X[500:])
    changed = pickle.loads(pickle.dumps(start))
    setattr(changed, name, getattr(changed, name)[::-1].copy())
    with pytest.raises(MergeError, match="attributes of the first mixture were set since it learned"):
        changed.merge(share)
    with pytest.raises(MergeError, match="attributes of the second mixture were set since it learned"):
        share.merge(changed)
    one, other = (changed.fork().partial_fit(samples) for samples in (X[:500], X[500:]))
    assert one.merge(other).n_samples_seen_ == 2_000


def test_partial_fit_learns_at_once_after_a_fit_on_few_rows() -> None:
    mixture = GaussianMixture(5, random_state=0).fit(X[:50])
    before = mixture.means_
    mixture.partial_fit(X[50:90] + 3.0)
    assert not np.allclose(mixture.means_, before, atol=0.1)


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_the_warm_up_counts_rows_with_weight_and_may_be_changed(init_params: Any) -> None:
    weight = (np.arange(200) % 2).astype(float)
    mixture = GaussianMixture(4, warm_up=150, init_params=init_params, random_state=0)
    mixture.partial_fit(X[:200], sample_weight=weight)
    assert mixture._learner.warming_up
    assert mixture.n_samples_seen_ == 100
    mixture.partial_fit(X[200:280])
    assert not mixture._learner.warming_up
    assert mixture.n_samples_seen_ == 180
    late = GaussianMixture(4, warm_up=1_000, init_params=init_params, random_state=0).partial_fit(X[:100])
    assert late._learner.warming_up
    late.set_params(warm_up=50).partial_fit(X[100:110])
    assert not late._learner.warming_up
    assert late.n_samples_seen_ == 110
