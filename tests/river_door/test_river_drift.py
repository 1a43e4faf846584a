"""Drift detectors and calibrated scores."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from river import anomaly, base, drift

from stream_em.river import MixtureAnomalyDetector, MixtureClusterer

Event = dict[str, float]


def events(n_events: int, centers: tuple[float, float], seed: int = 0) -> list[Event]:
    rng = np.random.default_rng(seed)
    chosen = rng.choice(centers, size=n_events)
    noise = rng.normal(size=(n_events, 2))
    return [{"x": float(c + a), "y": float(b - c)} for c, (a, b) in zip(chosen, noise)]


BEFORE, AFTER = events(3_000, (0.0, 8.0)), events(1_500, (20.0, 35.0), seed=1)


def run(**params: Any) -> tuple[MixtureAnomalyDetector, float]:
    """Learn the shift; return the model and its mean score over the last events."""
    model = MixtureAnomalyDetector(n_components=2, warm_up=200, batch_size=100, alpha=1.0, seed=0, **params)
    for event in BEFORE + AFTER:
        model.learn_one(event)
    return model, float(np.mean([model.score_one(event) for event in events(300, (20.0, 35.0), seed=2)]))


@pytest.mark.parametrize("detector", [drift.ADWIN(), drift.PageHinkley(threshold=200.0), drift.KSWIN(seed=1)])
@pytest.mark.parametrize("on_drift", ["forget", "reseed"])
def test_a_detector_of_any_kind_helps_after_a_shift(detector: Any, on_drift: str) -> None:
    plain = run()[1]
    model, score = run(drift_detector=detector, on_drift=on_drift)
    assert model.n_drifts >= 1
    assert score < plain - 0.5


def test_forgetting_keeps_ids_and_a_new_warm_up_makes_new_ones() -> None:
    clusterers = [
        MixtureClusterer(
            n_components=2, warm_up=200, batch_size=100, drift_detector=drift.ADWIN(), on_drift=how, seed=0
        )
        for how in ("forget", "reseed")
    ]
    for event in BEFORE + AFTER:
        for model in clusterers:
            model.learn_one(event)
    forgetting, reseeding = clusterers
    assert set(forgetting.centers) == {0, 1}
    assert set(reseeding.centers) == {2 * reseeding.n_drifts, 2 * reseeding.n_drifts + 1}
    assert sorted(round(center["x"] / 5) for center in reseeding.centers.values()) == [4, 7]
    assert reseeding.predict_one({"x": 20.0, "y": -20.0}) in reseeding.centers
    assert set(reseeding.predict_proba_one({})) == set(reseeding.centers)


def test_without_drift_the_detector_changes_nothing() -> None:
    watched = MixtureClusterer(n_components=2, warm_up=100, drift_detector=drift.NoDrift(), seed=0)
    plain = MixtureClusterer(n_components=2, warm_up=100, seed=0)
    for event in BEFORE[:600]:
        watched.learn_one(event)
        plain.learn_one(event)
    assert watched.n_drifts == 0
    assert pickle.dumps(watched.to_learner().statistics) == pickle.dumps(plain.to_learner().statistics)


class FedScores(base.DriftDetector):
    """Keeps what it is fed, and finds drift when it is told to."""

    def __init__(self, at: int = 10**9) -> None:
        super().__init__()
        self.at = at
        self.scores: list[float] = []

    def update(self, x: float) -> None:
        self.scores.append(x)
        self._drift_detected = len(self.scores) == self.at


def test_the_detector_is_fed_scores_from_before_learning_and_is_cloned() -> None:
    model = MixtureAnomalyDetector(n_components=2, warm_up=100, drift_detector=FedScores(), seed=0)
    scores = []
    for event in BEFORE[:300]:
        scores.append(model.score_one(event))
        model.learn_one(event)
    assert model._detector.scores == scores[100:]
    clone = model.clone()
    assert isinstance(clone.drift_detector, FedScores)
    assert clone.drift_detector is not model.drift_detector
    assert clone._detector.scores == []


def test_frames_are_watched_too() -> None:
    import pandas as pd

    model = MixtureAnomalyDetector(
        n_components=2,
        warm_up=100,
        drift_detector=FedScores(at=50),
        on_drift="reseed",
        calibration_window=10_000,
        seed=0,
    )
    for start in range(0, 1_000, 100):
        model.learn_many(pd.DataFrame(BEFORE[start : start + 100]))
    assert model.n_drifts >= 1
    assert model.to_learner().n_events < 1_000
    assert 0.0 <= model.score_one(BEFORE[0]) < 1.0


def test_calibrated_scores_are_tail_probabilities_of_recent_scores() -> None:
    params: dict[str, Any] = {"n_components": 2, "warm_up": 100, "seed": 0}
    plain, calibrated = MixtureAnomalyDetector(**params), MixtureAnomalyDetector(**params, calibration_window=50)
    recent: list[float] = []
    assert calibrated.score_one(BEFORE[0]) == 0.0
    for event in BEFORE[:400]:
        recent.append(plain.score_one(event))
        for model in (plain, calibrated):
            model.learn_one(event)
        if plain.to_learner().n_events == 100:
            recent.clear()
    score = plain.score_one(BEFORE[400])
    expected = (1 + sum(one >= score for one in recent[-50:])) / 51
    assert calibrated.tail_probability_one(BEFORE[400]) == expected
    assert calibrated.score_one(BEFORE[400]) == 1.0 - expected
    with pytest.raises(ValueError, match="calibration_window"):
        plain.tail_probability_one(BEFORE[0])


def test_a_threshold_on_calibrated_scores_is_a_rate_of_alarms() -> None:
    model = anomaly.ThresholdFilter(
        MixtureAnomalyDetector(n_components=2, warm_up=200, calibration_window=1_000, seed=0),
        threshold=0.98,
        protect_anomaly_detector=False,
    )
    detector = model.anomaly_detector
    alarms = []
    for event in BEFORE:
        alarms.append(model.classify(model.score_one(event)))
        detector.learn_one(event)
    # Of 1,800 events 36 are expected to raise an alarm, with a standard deviation of about 6 if they were independent.
    assert 15 <= sum(alarms[1_200:]) <= 60
    assert model.classify(model.score_one({"x": -40.0, "y": 40.0}))


@pytest.mark.parametrize("many", [False, True])
def test_scores_of_a_model_that_was_replaced_are_forgotten(many: bool) -> None:
    import pandas as pd

    model = MixtureAnomalyDetector(
        n_components=2,
        warm_up=100,
        drift_detector=FedScores(at=50),
        on_drift="reseed",
        calibration_window=10_000,
        seed=0,
    )
    old = None
    for start in range(0, 270, 90):
        piece = BEFORE[start : start + 90]
        for rows in [piece] if many else [[event] for event in piece]:
            before = model._learner
            model.learn_many(pd.DataFrame(rows)) if many else model.learn_one(rows[0])
            if model._learner is not before:
                old = before
                assert model._detector.scores == []
                assert len(model._recent) == 0
                assert model.n_drifts == 1
    for start in range(270, 900, 90):
        before = model._learner
        for event in BEFORE[start : start + 90]:
            model.learn_one(event)
            if model._learner is not before and old is None:
                old = before
                assert (model._detector.scores, len(model._recent)) == ([], 0)
        if old is not None:
            break
    assert old is not None


@pytest.mark.parametrize("on_drift", ["forget", "reseed"])
def test_watched_events_go_the_short_way_and_leave_it_when_the_model_changes(on_drift: Any) -> None:
    params: dict[str, Any] = {"n_components": 2, "warm_up": 100, "seed": 0, "batch_size": 20, "on_drift": on_drift}
    short = MixtureAnomalyDetector(**params, drift_detector=FedScores(at=150), calibration_window=500)
    long = MixtureAnomalyDetector(**params, drift_detector=FedScores(at=150), calibration_window=500)
    for event in BEFORE[:600]:
        short.learn_one(event)
        long._unbind()
        long._learn_otherwise(event, 1.0)
    assert short.n_drifts == long.n_drifts >= 1
    assert short._detector.scores == long._detector.scores
    assert list(short._recent) == list(long._recent)
    assert pickle.dumps(short.to_learner().statistics) == pickle.dumps(long.to_learner().statistics)
    kernel = short._learner.kernel()
    assert kernel is not None
    assert short._successor is not None or short._learn is kernel.learn
    fed, recent = len(short._detector.scores), len(short._recent)
    short.learn_one(BEFORE[0], w=0.0)
    assert (len(short._detector.scores), len(short._recent)) == (fed, recent)
