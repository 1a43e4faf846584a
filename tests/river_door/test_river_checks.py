"""River's own checks, and its data-set checks on the clusterer too, which River does not run on clusterers."""

from __future__ import annotations

import random
from typing import Any
from urllib.error import URLError

import pytest
from river import checks, datasets
from river.checks import anomaly, common

from stream_em.river import MixtureAnomalyDetector, MixtureClusterer, MixtureTransformer

ESTIMATORS = [MixtureClusterer, MixtureAnomalyDetector, MixtureTransformer]

DATA_SET_CHECKS = [
    "check_learn_one",
    "check_pickling",
    "check_shuffle_features_no_impact",
    "check_emerging_features",
    "check_disappearing_features",
    "check_radically_disappearing_features",
    "check_predict_one_pure",
    "check_predict_one_before_any_learn",
    "check_no_state_aliasing_with_input",
    "check_clone_is_independent",
    "check_seeding_is_idempotent",
    "check_bounded_memory_growth",
]
DATA_SETS = ["Shuttle", "TrumpApproval", "ImageSegments", "Phishing"]


def yielded() -> list[Any]:
    cases = []
    for estimator in ESTIMATORS:
        for number, params in enumerate([{}, *estimator._unit_test_params()]):
            model = estimator(**params)
            cases += [
                pytest.param(model, check, id=f"{estimator.__name__}-{number}-{check.__name__}-{index}")
                for index, check in enumerate(checks.yield_checks(model))
            ]
    return cases


@pytest.mark.parametrize(("model", "check"), yielded())
def test_checks_that_river_yields(model: Any, check: Any) -> None:
    random.seed(0)
    if check.__name__ in model._unit_test_skips():
        pytest.skip("learn_many takes a mini-batch in one E-step, so it is not a learn_one for each row")
    try:
        check(model.clone())
    except URLError:
        pytest.skip("River runs this check on CreditCard, which it downloads; it runs on Shuttle below")


def test_learn_many_is_learn_one_for_each_row_within_the_warm_up() -> None:
    check = common.__dict__.get("check_learn_many_matches_learn_one")
    if check is None:
        pytest.skip("this River has no such check")
    check(MixtureTransformer(), list(datasets.TrumpApproval().take(200)))


def stream(name: str, n_events: int) -> list[Any]:
    if not hasattr(datasets, name):
        pytest.skip(f"this River does not bring the data set {name}")
    return list(getattr(datasets, name)().take(n_events))


@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize("name", DATA_SET_CHECKS)
@pytest.mark.parametrize(
    "model",
    [MixtureClusterer(n_components=3, warm_up=40), MixtureAnomalyDetector(n_components=3, warm_up=40)],
    ids=["clusterer", "detector"],
)
def test_data_set_checks(model: Any, name: str, data_set: str) -> None:
    check = getattr(common, name, None)
    if check is None:
        pytest.skip("this River has no such check")
    random.seed(0)
    events = stream(data_set, 1_000 if name == "check_bounded_memory_growth" else 120)
    # River before 0.26 passes the label on to `learn_one`, where a clusterer takes a weight.
    check(model.clone(), [(x, 1.0) for x, _ in events])


def test_the_detector_ranks_the_shuttle_stream() -> None:
    anomaly.check_roc_auc(MixtureAnomalyDetector(seed=0), stream("Shuttle", 3_000))
