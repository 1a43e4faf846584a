"""What scikit-learn asks of every estimator, and what a user of its own mixture has come to expect."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import sklearn.mixture
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from stream_em import Poisson
from stream_em.sklearn import GaussianMixture, MixtureModel

GENERATOR = np.random.default_rng(5)
LABELS = GENERATOR.integers(3, size=400)
X = GENERATOR.normal(size=(400, 3)) + 7.0 * LABELS[:, None]
COUNTS = np.rint(np.abs(X))
WORDS = pd.DataFrame({"word": [*"abcd" * 50]})


@parametrize_with_checks(
    [
        GaussianMixture(),
        GaussianMixture(2, covariance_type="diag", init_params="random_from_data"),
        GaussianMixture(2, covariance_type="tied", init_params="random", step_size="harmonic"),
        MixtureModel(),
        MixtureModel(2, covariance_type="spherical"),
    ]
)
def test_estimator_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_every_parameter_of_scikit_learn_is_there_with_its_default() -> None:
    ours = inspect.signature(GaussianMixture).parameters
    for name, theirs in inspect.signature(sklearn.mixture.GaussianMixture).parameters.items():
        assert (ours[name].default, ours[name].kind) == (theirs.default, theirs.kind), name


def test_every_public_name_of_scikit_learn_is_there() -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    ours, theirs = (one(3, random_state=0).fit(frame) for one in (GaussianMixture, sklearn.mixture.GaussianMixture))
    assert {name for name in dir(theirs) if not name.startswith("_")} <= set(dir(ours))
    for name in vars(theirs):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        assert np.shape(found) == np.shape(wanted) or name == "lower_bounds_", name


def test_a_pipeline_and_a_grid_search_choose_the_number_of_components() -> None:
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), GaussianMixture(random_state=0))
    search = GridSearchCV(pipeline, {"gaussianmixture__n_components": [1, 2, 3]}, n_jobs=1)
    search.fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    assert search.best_params_ == {"gaussianmixture__n_components": 3}
    assert search.best_estimator_[-1].feature_names_in_.tolist() == ["a", "b", "c"]


def test_sample_weight_is_routed() -> None:
    weight = np.where(LABELS == 0, 1.0, 0.0)
    with sklearn.config_context(enable_metadata_routing=True):
        mixture = GaussianMixture().set_fit_request(sample_weight=True)
        made = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), mixture)
        routed = made.fit(X, sample_weight=weight)
    scaled = StandardScaler().fit_transform(X)
    expected = GaussianMixture().fit(scaled[LABELS == 0])
    np.testing.assert_allclose(routed[-1].means_, expected.means_, rtol=1e-12)


@pytest.mark.parametrize("estimator", [GaussianMixture(3, random_state=0), MixtureModel(3, random_state=0)])
def test_clone_pickle_and_joblib(estimator: Any, tmp_path: Any) -> None:
    fitted = clone(estimator).fit(X[:200])
    path = tmp_path / "mixture.joblib"
    joblib.dump(fitted, path)
    for again in (pickle.loads(pickle.dumps(fitted)), joblib.load(path)):
        np.testing.assert_array_equal(again.score_samples(X), fitted.score_samples(X))
        again.partial_fit(X[200:])
        expected = pickle.loads(pickle.dumps(fitted)).partial_fit(X[200:])
        np.testing.assert_array_equal(again.score_samples(X), expected.score_samples(X))
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


def test_forks_learn_in_other_processes() -> None:
    start = GaussianMixture(3, random_state=0, step_size="harmonic").fit(X[:100])
    shares = np.array_split(X[100:], 3)
    work = joblib.delayed(lambda fork, share: fork.partial_fit(share))
    forks = joblib.Parallel(n_jobs=2)(work(start.fork(), share) for share in shares)
    merged = start
    for fork in forks:
        merged = merged.merge(fork)
    assert merged.n_samples_seen_ == len(X)
    # The clusters lie far apart, so that responsibilities do not depend on what was learned in between.
    order = np.argsort(merged.means_[:, 0])
    expected = [X[label == LABELS].mean(axis=0) for label in range(3)]
    np.testing.assert_allclose(merged.means_[order], expected, rtol=1e-6)


def test_a_representation_names_the_parameters_that_were_set() -> None:
    assert repr(GaussianMixture(3, step_size=0.1)) == "GaussianMixture(n_components=3, step_size=0.1)"
    assert "MixtureModel" in MixtureModel(2)._repr_html_()


def outputs(fitted: Any) -> list[float]:
    return [*fitted.score_samples(X[:20]), fitted.n_iter_, float(fitted.predict(X).sum())]


def batch(estimator: Any) -> list[float]:
    return outputs(estimator.fit(X))


def refitted(estimator: Any) -> list[float]:
    return outputs(estimator.fit(X[:200]).fit(X))


def streamed(estimator: Any) -> list[float]:
    for start in range(0, len(X), 100):
        estimator.partial_fit(X[start : start + 100])
    return outputs(estimator)


ROUGH = {"n_components": 6, "covariance_type": "spherical", "max_iter": 3, "random_state": 0}
SHARED: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "n_components": (batch, 2, 3, {}),
    "covariance_type": (batch, "full", "diag", {}),
    "tol": (batch, 1e-3, 0.0, {}),
    "max_iter": (batch, 1, 20, {"n_components": 6}),
    "n_init": (batch, 1, 6, ROUGH),
    "init_params": (batch, "kmeans", "random", {"n_components": 3, "max_iter": 1}),
    "random_state": (batch, 0, 1, ROUGH),
    "warm_start": (refitted, False, True, ROUGH),
    "step_size": (streamed, "harmonic", 0.5, {"warm_up": 50, "batch_size": 20}),
    "step_exponent": (streamed, 0.6, 1.0, {"warm_up": 50, "batch_size": 20}),
    "step_offset": (streamed, 0.0, 50.0, {"warm_up": 50, "batch_size": 20}),
    "batch_size": (streamed, 10, 100, {"warm_up": 50}),
    "warm_up": (streamed, 50, 200, {"n_components": 3, "batch_size": 20}),
}
OF_GAUSSIAN: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    **SHARED,
    "reg_covar": (batch, 1e-6, 1.0, {}),
    "weights_init": (batch, None, [0.9, 0.1], {"n_components": 2, "max_iter": 1}),
    "means_init": (batch, None, [[0.0, 0, 0], [1, 1, 1]], {"n_components": 2, "max_iter": 1}),
    "precisions_init": (batch, None, [np.eye(3)] * 2, {"n_components": 2, "max_iter": 1}),
}
OF_MODEL: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    **SHARED,
    "prior_weight": (batch, 0.01, 10.0, {}),
    "max_categories": (lambda one: [*one.fit(WORDS).score_samples(WORDS)], 32, 2, {}),
    "families": (lambda one: [*one.fit(COUNTS).score_samples(COUNTS)], None, {"x0": Poisson()}, {}),
}
PROGRESS = {"verbose", "verbose_interval", "n_jobs"}


@pytest.mark.parametrize(
    ("estimator", "parameter"),
    [(GaussianMixture, name) for name in OF_GAUSSIAN] + [(MixtureModel, name) for name in OF_MODEL],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_parameter_changes_some_output(estimator: Any, parameter: str) -> None:
    work, one, other, more = (OF_GAUSSIAN if estimator is GaussianMixture else OF_MODEL)[parameter]
    results = [work(estimator(**{"random_state": 0, **more, parameter: value})) for value in (one, other)]
    assert results[0] != results[1]


def test_no_parameter_is_left_untested() -> None:
    assert set(GaussianMixture().get_params()) == OF_GAUSSIAN.keys() | PROGRESS
    assert set(MixtureModel().get_params()) == OF_MODEL.keys() | PROGRESS


def test_threads_change_nothing() -> None:
    many = np.tile(X, (40, 1))
    one, two = (GaussianMixture(3, random_state=0, n_jobs=jobs).fit(many) for jobs in (1, 2))
    np.testing.assert_allclose(two.means_, one.means_, rtol=1e-9)


def test_verbose_shows_the_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for verbose, interval in ((0, 1), (1, 1), (2, 1), (1, 3)):
        rough = GaussianMixture(3, init_params="random", max_iter=4, tol=0.0, random_state=0, verbose=verbose)
        with pytest.warns(sklearn.exceptions.ConvergenceWarning):
            rough.set_params(verbose_interval=interval).fit(X)
        texts.append(" ".join(capsys.readouterr().out.split()))
    silent, shown, detailed, rare = texts
    assert silent == ""
    assert "iteration 4, lower bound" in shown
    assert "change" in detailed
    assert "iteration 3, lower bound" in rare


def test_the_door_opens_no_other_and_leaves_optional_packages_alone() -> None:
    names = ("stream_em.river", "stream_em.beam", "river", "apache_beam", "numba", "matplotlib")
    program = (
        "import numpy as np\n"
        "from stream_em.sklearn import GaussianMixture, select_components\n"
        "GaussianMixture(2, random_state=0).fit(np.arange(40.0).reshape(20, 2) % 7).partial_fit(np.ones((1, 2)))\n"
        f"import sys\nprint([name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
