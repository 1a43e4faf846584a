"""A model moves to a file and back, and to the engine, River and Beam."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.mixture
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils._param_validation import InvalidParameterError

from stream_em import (
    BatchEM,
    Constant,
    Gaussian,
    HalfLife,
    Harmonic,
    Mixture,
    OnlineEM,
    Poisson,
    Product,
    RobbinsMonro,
    Schema,
    SnapshotError,
    load,
    save,
)
from stream_em.river import MixtureAnomalyDetector, MixtureClusterer
from stream_em.schedules import Schedule
from stream_em.sklearn import GaussianMixture, MixtureModel
from stream_em.store import read_metadata
from stream_em.structure import AdaptiveComponents

GENERATOR = np.random.default_rng(21)
X = GENERATOR.normal(size=(1_500, 2)) + 7.0 * GENERATOR.integers(3, size=(1_500, 1))
FIRST, REST = X[:900], X[900:]
GAPS = np.where(GENERATOR.random(X.shape) < 0.1, np.nan, X)
NUMBERS = pd.DataFrame(X, columns=["width", "height"])
MIXED = NUMBERS.assign(
    color=GENERATOR.choice(["red", "blue", "green"], len(X)),
    clicks=GENERATOR.poisson(4.0, len(X)),
    returned=GENERATOR.random(len(X)) < 0.3,
)
KINDS = ("full", "tied", "diag", "spherical")


def round_trip(mixture: Any, path: Path, **params: Any) -> Any:
    mixture.to_snapshot(path)
    return type(mixture).from_snapshot(path, **params)


def public(mixture: Any) -> dict[str, Any]:
    # Families may hold parameters in objects of their own, which predictions compare.
    return {name: value for name, value in vars(mixture).items() if name.endswith("_") and name != "parameters_"}


def assert_same(actual: Any, expected: Any, samples: Any) -> None:
    np.testing.assert_array_equal(actual.score_samples(samples), expected.score_samples(samples))
    np.testing.assert_array_equal(actual.predict_proba(samples), expected.predict_proba(samples))
    assert public(actual).keys() == public(expected).keys()
    for name, value in public(expected).items():
        found = getattr(actual, name)
        np.testing.assert_array_equal(found, value, err_msg=name)
        assert getattr(found, "dtype", None) == getattr(value, "dtype", None), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["fit", "partial_fit", "gaps", "weights", "float32", "frame", "no iteration"])
def test_a_gaussian_mixture_comes_back_bit_for_bit_and_goes_on(kind: Any, form: str, tmp_path: Path) -> None:
    mixture = GaussianMixture(3, covariance_type=kind, random_state=0, reg_covar=1e-5)
    first: Any = FIRST
    if form == "gaps":
        first = GAPS[:900]
    elif form == "float32":
        first = FIRST.astype(np.float32)
    elif form == "frame":
        first = NUMBERS[:900]
    elif form == "no iteration":
        mixture.set_params(max_iter=0)
    if form == "partial_fit":
        mixture.partial_fit(first)
    else:
        mixture.fit(first, sample_weight=np.linspace(1e-6, 2e-6, 900) if form == "weights" else None)
    again = round_trip(mixture, tmp_path / "model.arrow")
    assert again.get_params() == mixture.get_params()
    assert_same(again, mixture, first)
    more: Any = NUMBERS[900:] if form == "frame" else REST
    for start in range(0, 600, 150):
        mixture.partial_fit(more[start : start + 150])
        again.partial_fit(more[start : start + 150])
    assert_same(again, mixture, first)


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_a_warm_up_goes_on(init_params: Any, tmp_path: Path) -> None:
    mixture = GaussianMixture(3, init_params=init_params, random_state=0).partial_fit(FIRST[:25])
    again = round_trip(mixture, tmp_path / "model.arrow")
    assert again._learner.warming_up
    assert_same(again, mixture, X)
    assert_same(again.partial_fit(REST), mixture.partial_fit(REST), X)


@pytest.mark.parametrize(
    "families",
    [
        None,
        {"clicks": "poisson"},
        {("width", "height"): Gaussian("diag"), "clicks": Poisson()},
        Product({"clicks": Poisson()}, others="tied"),
    ],
)
def test_a_mixture_of_mixed_columns_comes_back_bit_for_bit_and_goes_on(families: Any, tmp_path: Path) -> None:
    mixture = MixtureModel(3, families=families, random_state=0, step_size=0.05).fit(MIXED[:900])
    again = round_trip(mixture, tmp_path / "model.arrow")
    assert again.get_params() == mixture.get_params()
    assert_same(again, mixture, MIXED)
    assert again.sample(3)[0].equals(mixture.sample(3)[0])
    unknown = MIXED[900:].assign(color="violet")
    assert_same(again.partial_fit(unknown), mixture.partial_fit(unknown), MIXED)
    with pytest.raises(ValueError, match="call fit, or set them back"):
        again.set_params(families={"clicks": Gaussian()}).partial_fit(MIXED)


def test_one_family_for_all_columns() -> None:
    named = MixtureModel(3, families={("width", "height"): Gaussian("diag")}, random_state=0).fit(NUMBERS)
    mixture = MixtureModel(3, families=Gaussian("diag"), random_state=0).fit(NUMBERS)
    assert mixture.family_ == Gaussian("diag")
    np.testing.assert_allclose(mixture.score_samples(NUMBERS), named.score_samples(NUMBERS), rtol=1e-12)
    counts = clone(mixture).set_params(families=Poisson()).fit(MIXED[["clicks"]])
    assert counts._learner.schema.fields[0].kind == "count"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_another_library_fitted_moves_too(dtype: Any, tmp_path: Path) -> None:
    samples = X.astype(dtype)
    mixture = GaussianMixture.from_sklearn(sklearn.mixture.GaussianMixture(3, random_state=0).fit(samples))
    again = round_trip(mixture, tmp_path / "model.arrow")
    np.testing.assert_allclose(again.score_samples(samples), mixture.score_samples(samples), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(again.means_, mixture.means_)
    assert load(tmp_path / "model.arrow").n_events == 0


def test_set_attributes_and_derived_mixtures_move_too(tmp_path: Path) -> None:
    mixture = GaussianMixture(3, random_state=0).fit(NUMBERS)
    mixture.means_ = mixture.means_ + 1.0
    for one, samples in ((mixture, NUMBERS), (mixture.marginal(["height"]), NUMBERS[["height"]])):
        again = round_trip(one, tmp_path / "model.arrow")
        np.testing.assert_array_equal(again.score_samples(samples), one.score_samples(samples))
    assert again.lower_bound_ == -np.inf


def test_forks_come_back_through_files(tmp_path: Path) -> None:
    start = GaussianMixture(3, random_state=0, step_size="harmonic").fit(FIRST)
    merged = start
    for number, share in enumerate(np.array_split(REST, 3)):
        start.fork().to_snapshot(tmp_path / f"{number}.arrow")
        fork = GaussianMixture.from_snapshot(tmp_path / f"{number}.arrow").partial_fit(share)
        merged = merged.merge(round_trip(fork, tmp_path / f"{number}.arrow"))
    assert merged.n_samples_seen_ == len(X)
    in_memory = start
    for share in np.array_split(REST, 3):
        in_memory = in_memory.merge(start.fork().partial_fit(share))
    np.testing.assert_array_equal(merged.score_samples(X), in_memory.score_samples(X))


def test_the_engine_goes_on_with_it(tmp_path: Path) -> None:
    mixture = GaussianMixture(3, random_state=0, batch_size=100).fit(FIRST)
    mixture.to_snapshot(tmp_path / "model.arrow")
    learner, copy = load(tmp_path / "model.arrow"), mixture.to_learner()
    for one in (learner, copy):
        np.testing.assert_array_equal(one.log_prob(X), mixture.score_samples(X))
        np.testing.assert_array_equal(one.predict(X), mixture.predict(X))
    before = mixture.score_samples(X)
    copy.update(REST)
    np.testing.assert_array_equal(mixture.score_samples(X), before)
    np.testing.assert_allclose(copy.log_prob(X), mixture.partial_fit(REST).score_samples(X), rtol=1e-12)


def test_beam_scores_with_it(tmp_path: Path) -> None:
    serving = pytest.importorskip("stream_em.beam.serving")
    mixture = GaussianMixture(3, random_state=0).fit(NUMBERS)
    mixture.to_snapshot(tmp_path / "model.arrow")
    events = NUMBERS[:50].to_dict("records")
    scores = serving.SnapshotModel(load(tmp_path / "model.arrow")).score(events).inferences
    np.testing.assert_allclose([one.log_prob for one in scores], mixture.score_samples(NUMBERS[:50]), rtol=1e-12)
    assert [one.component for one in scores] == mixture.predict(NUMBERS[:50]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_from_scikit_learn_to_river_and_back(kind: Any, tmp_path: Path) -> None:
    mixture = GaussianMixture(3, covariance_type=kind, random_state=0).fit(NUMBERS[:900])
    mixture.to_snapshot(tmp_path / "model.arrow")
    clusterer = MixtureClusterer.from_snapshot(tmp_path / "model.arrow")
    detector = MixtureAnomalyDetector.from_snapshot(tmp_path / "model.arrow")
    events = NUMBERS[:200].to_dict("records")
    assert [clusterer.predict_one(event) for event in events] == mixture.predict(NUMBERS[:200]).tolist()
    scores = [detector.score_one(event) for event in events]
    np.testing.assert_allclose(scores, -mixture.score_samples(NUMBERS[:200]), rtol=1e-12, atol=1e-12)
    for event in NUMBERS[900:].to_dict("records"):
        clusterer.learn_one(event)
    clusterer.to_snapshot(tmp_path / "model.arrow")
    again = GaussianMixture.from_snapshot(tmp_path / "model.arrow")
    assert (again.covariance_type, again.n_samples_seen_, again.reg_covar) == (kind, len(X), mixture.reg_covar)
    assert again.feature_names_in_.tolist() == ["width", "height"]
    np.testing.assert_allclose(
        again.score_samples(NUMBERS), clusterer.to_learner().log_prob(NUMBERS), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("estimator", [GaussianMixture, MixtureModel])
@pytest.mark.parametrize("n_learned", [30, 900])
@pytest.mark.parametrize("options", [{}, {"covariance_type": "diag", "step_size": 0.02, "batch_size": 50}])
def test_from_river_to_scikit_learn_and_back(
    estimator: Any, n_learned: int, options: dict[str, Any], tmp_path: Path
) -> None:
    original = MixtureClusterer(3, seed=0, **options)
    for event in NUMBERS[:n_learned].to_dict("records"):
        original.learn_one(event)
    original.to_snapshot(tmp_path / "model.arrow")
    mixture = estimator.from_snapshot(tmp_path / "model.arrow")
    learner = original.to_learner()
    assert mixture.feature_names_in_.tolist() == ["height", "width"]
    samples = NUMBERS[mixture.feature_names_in_]
    np.testing.assert_allclose(mixture.score_samples(samples), learner.log_prob(samples), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(mixture.predict(samples), learner.predict(samples))
    mixture.partial_fit(samples[900:])
    learner.update(samples[900:])
    np.testing.assert_allclose(mixture.score_samples(samples), learner.log_prob(samples), rtol=1e-9, atol=1e-9)
    mixture.to_snapshot(tmp_path / "model.arrow")
    back = MixtureClusterer.from_snapshot(tmp_path / "model.arrow")
    assert (back.prior_weight, back.unknown, back.batch_size, back.step_size, back.alpha) == (
        original.prior_weight,
        original.unknown,
        original.batch_size,
        original.step_size,
        original.alpha,
    )
    np.testing.assert_allclose(back.to_learner().log_prob(samples), learner.log_prob(samples), rtol=1e-9, atol=1e-9)
    assert estimator.from_snapshot(tmp_path / "model.arrow").fit(samples).converged_


def test_a_mixed_stream_of_river_becomes_a_mixture_of_mixed_columns(tmp_path: Path) -> None:
    stream = MixtureClusterer(3, seed=0, kinds={"clicks": "count"})
    stream.learn_many(MIXED)
    stream.to_snapshot(tmp_path / "model.arrow")
    mixture = MixtureModel.from_snapshot(tmp_path / "model.arrow")
    columns = MIXED[mixture.feature_names_in_]
    np.testing.assert_array_equal(mixture.score_samples(columns), stream.to_learner().log_prob(columns))
    assert mixture.partial_fit(columns).n_samples_seen_ == 2 * len(MIXED)
    with pytest.raises(ValueError, match=r"'color' \(category\).*MixtureModel\.from_snapshot takes any"):
        GaussianMixture.from_snapshot(tmp_path / "model.arrow")


@pytest.mark.parametrize("schedule", [Constant(0.1), Harmonic(), RobbinsMonro(0.8, 2.0)])
@pytest.mark.parametrize("estimator", [GaussianMixture, MixtureModel])
def test_the_step_sizes_of_a_learner_go_on(estimator: Any, schedule: Schedule, tmp_path: Path) -> None:
    model = Mixture(Gaussian(), 3, assignment="hard", prior_weight=2.0)
    learner = OnlineEM(model, schedule=schedule, batch_size=100, warm_up=70).update(FIRST)
    save(learner, tmp_path / "model.arrow")
    mixture = estimator.from_snapshot(tmp_path / "model.arrow")
    assert mixture.warm_up == 70
    assert not hasattr(mixture, "feature_names_in_")
    statistics = learner.statistics
    assert statistics is not None
    assert mixture.lower_bound_ == statistics.log_likelihood / statistics.total_weight
    np.testing.assert_array_equal(mixture.partial_fit(REST).score_samples(X), learner.update(REST).log_prob(X))


def test_parameters_that_were_given_are_learned_from_as_soon_as_by_the_learner(tmp_path: Path) -> None:
    start = BatchEM(Mixture(Gaussian(), 3), seed=0).fit(FIRST)
    learner = OnlineEM(start.model, schema=start.schema, initial_parameters=start.parameters)
    save(learner, tmp_path / "model.arrow")
    mixture = GaussianMixture.from_snapshot(tmp_path / "model.arrow").partial_fit(REST[:30])
    np.testing.assert_array_equal(mixture.score_samples(X), learner.update(REST[:30]).log_prob(X))


def test_a_batch_fit_goes_on(tmp_path: Path) -> None:
    fitted = BatchEM(Mixture(Gaussian("tied"), 3), seed=0).fit(FIRST)
    save(fitted, tmp_path / "model.arrow")
    mixture = GaussianMixture.from_snapshot(tmp_path / "model.arrow", step_size="harmonic")
    np.testing.assert_array_equal(mixture.score_samples(X), fitted.log_prob(X))
    assert (mixture.converged_, mixture.n_iter_) == (fitted.converged, len(fitted.history))
    assert mixture.partial_fit(REST).n_samples_seen_ == len(X)
    learner = fitted.to_online()
    learner.schedule = Harmonic()
    np.testing.assert_allclose(mixture.score_samples(X), learner.update(REST).log_prob(X), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int64"),
        ("dtype", None),
        ("named", 1),
        ("params", None),
        ("params", {"n_components": 3}),
        ("attributes", None),
        ("attributes", {"lower_bounds_": [], "n_iter_": "x"}),
        ("attributes", {"lower_bounds_": [None]}),
    ],
)
def test_metadata_that_no_estimator_wrote_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    GaussianMixture(3, random_state=0).fit(X).to_snapshot(path)
    kept = read_metadata(path)["stream_em.sklearn"]
    save(load(path), path, metadata={"stream_em.sklearn": {**kept, name: value}})
    with pytest.raises(SnapshotError, match=rf"{re.escape(str(path))}: no estimator of this version wrote"):
        GaussianMixture.from_snapshot(path)


def test_a_derived_class_keeps_its_parameters(tmp_path: Path) -> None:
    class Derived(GaussianMixture):
        pass

    Derived(3, random_state=0, tol=1e-5).fit(X).to_snapshot(tmp_path / "model.arrow")
    again = Derived.from_snapshot(tmp_path / "model.arrow")
    assert (type(again), again.tol, again.random_state) == (Derived, 1e-5, 0)


def test_a_covariance_type_that_a_family_makes_meaningless_is_refused(tmp_path: Path) -> None:
    save(BatchEM(Mixture(Gaussian(), 3), seed=0).fit(FIRST), tmp_path / "model.arrow")
    with pytest.raises(ValueError, match="covariance_type='diag' says nothing of a snapshot that holds Gaussian"):
        MixtureModel.from_snapshot(tmp_path / "model.arrow", covariance_type="diag")


@pytest.mark.parametrize("options", [{"averaging": True}, {"window": 1_000}, {"structure": AdaptiveComponents()}])
def test_other_ways_of_learning_need_a_mixture_model(options: dict[str, Any], tmp_path: Path) -> None:
    learner = OnlineEM(Mixture(Gaussian(), 3), **options).update(FIRST)
    save(learner, tmp_path / "model.arrow")
    (way,) = options
    with pytest.raises(ValueError, match=rf"learned with {way}.*MixtureModel\.from_snapshot takes any"):
        GaussianMixture.from_snapshot(tmp_path / "model.arrow")
    mixture = MixtureModel.from_snapshot(tmp_path / "model.arrow")
    np.testing.assert_array_equal(mixture.partial_fit(REST).score_samples(X), learner.update(REST).log_prob(X))


@pytest.mark.parametrize(
    "family",
    [
        Product({"x0": Gaussian(), "x1": Gaussian("diag")}),
        Product({("x1", "x0"): Gaussian()}),
        Product({"x0": Poisson()}, others="full"),
        Poisson(),
    ],
)
def test_other_families_need_a_mixture_model(family: Any, tmp_path: Path) -> None:
    kind = "count" if family == Poisson() else "numeric"
    kinds = {"x0": "count" if "x0" in getattr(family, "names", ()) and "Poisson" in repr(family) else kind, "x1": kind}
    samples = np.rint(np.abs(X))
    learner = OnlineEM(Mixture(family, 3), schema=Schema(kinds)).update(samples)
    save(learner, tmp_path / "model.arrow")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*MixtureModel\.from_snapshot takes any"):
        GaussianMixture.from_snapshot(tmp_path / "model.arrow")
    mixture = MixtureModel.from_snapshot(tmp_path / "model.arrow")
    np.testing.assert_array_equal(mixture.score_samples(samples), learner.log_prob(samples))
    assert mixture.family_ == family


@pytest.mark.parametrize("estimator", [GaussianMixture, MixtureModel])
def test_what_forgets_by_event_time_only_predicts(estimator: Any, tmp_path: Path) -> None:
    learner = OnlineEM(Mixture(Gaussian(), 3), schedule=HalfLife(500.0)).update(X, time=np.arange(len(X)))
    save(learner, tmp_path / "model.arrow")
    mixture = estimator.from_snapshot(tmp_path / "model.arrow")
    np.testing.assert_array_equal(mixture.score_samples(X), learner.log_prob(X))
    with pytest.raises(ValueError, match="forgets by event time"):
        mixture.partial_fit(X)
    np.testing.assert_array_equal(round_trip(mixture, tmp_path / "again.arrow").score_samples(X), learner.log_prob(X))
    assert mixture.fit(X).partial_fit(X).n_samples_seen_ == 2 * len(X)


def test_parameters_may_be_others_but_not_those_of_the_mixture(tmp_path: Path) -> None:
    mixture = GaussianMixture(3, random_state=0, means_init=X[:3]).fit(X)
    again = round_trip(mixture, tmp_path / "model.arrow", step_size=0.1, covariance_type="full", tol=0.5)
    assert (again.step_size, again.tol, again.n_components) == (0.1, 0.5, 3)
    assert again.partial_fit(X)._learner.schedule == Constant(0.1)
    np.testing.assert_array_equal(again.means_init, mixture.means_init)
    for params in ({"n_components": 4}, {"covariance_type": "diag"}, {"reg_covar": 1.0}):
        with pytest.raises(ValueError, match="leave out what describes the mixture, or fit anew"):
            GaussianMixture.from_snapshot(tmp_path / "model.arrow", **params)
    with pytest.raises(ValueError, match="leave out what describes the mixture, or fit anew"):
        MixtureModel.from_snapshot(tmp_path / "model.arrow", prior_weight=1.0)
    with pytest.raises(TypeError, match="stepsize"):
        GaussianMixture.from_snapshot(tmp_path / "model.arrow", stepsize=0.1)
    with pytest.raises(InvalidParameterError, match="step_size"):
        GaussianMixture.from_snapshot(tmp_path / "model.arrow", step_size=2.0)


def test_a_generator_of_random_numbers_stays_behind(tmp_path: Path) -> None:
    mixture = GaussianMixture(3, random_state=np.random.RandomState(0)).fit(X)
    again = round_trip(mixture, tmp_path / "model.arrow")
    assert again.random_state is None
    assert_same(again, mixture, X)


@pytest.mark.parametrize("estimator", [GaussianMixture(3), MixtureModel(3)])
def test_refusals(estimator: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    for verb in (lambda: estimator.to_snapshot(path), estimator.to_learner):
        with pytest.raises(NotFittedError):
            verb()
    assert not path.exists()
    fitted = clone(estimator).fit(X)
    with pytest.raises(TypeError, match=rf"got {type(fitted).__name__}.*model\.to_snapshot\(path\)"):
        save(fitted, path)
    with pytest.raises(ValueError, match="call fit, or set them back"):
        fitted.set_params(n_components=4).to_snapshot(path)
    with pytest.raises(FileNotFoundError):
        type(fitted).from_snapshot(path)
    path.write_bytes(b"something else")
    with pytest.raises(SnapshotError, match="not a stream_em snapshot"):
        type(fitted).from_snapshot(path)
    for schema in (None, Schema({"x": "numeric"})):
        save(OnlineEM(Mixture(Gaussian(), 2), schema=schema), path)
        with pytest.raises(ValueError, match="has seen no event yet"):
            type(fitted).from_snapshot(path)
