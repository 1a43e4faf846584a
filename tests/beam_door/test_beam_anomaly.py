"""The detector in Beam's AnomalyDetection: an OnlineEM that learns one event at a time."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import apache_beam as beam
import cloudpickle
import numpy as np
import pytest
from apache_beam.ml.anomaly.aggregations import MaxScore
from apache_beam.ml.anomaly.base import AnomalyResult, EnsembleAnomalyDetector
from apache_beam.ml.anomaly.detectors.offline import OfflineDetector
from apache_beam.ml.anomaly.detectors.zscore import ZScore
from apache_beam.ml.anomaly.specifiable import Spec, Specifiable
from apache_beam.ml.anomaly.thresholds import FixedThreshold, QuantileThreshold
from apache_beam.ml.anomaly.transforms import AnomalyDetection
from apache_beam.ml.inference.base import KeyedModelHandler
from apache_beam.testing.util import assert_that
from river import datasets
from sklearn.metrics import roc_auc_score

from stream_em import BatchEM, Gaussian, Mixture, OnlineEM, Product, RobbinsMonro, save
from stream_em.beam.anomaly import GRACE, LARGEST_SCORE, MixtureAnomalyDetector, to_anomaly_prediction
from stream_em.beam.serving import MixtureModelHandler

NOT_READY = -2
# States are taken up from memory and from Beam's state, between which the discount is multiplied out.
CHECKPOINTED = 1e-9


def events(n_events: int = 400, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n_events) + 5.0 * rng.integers(2, size=n_events)
    y = 2.0 * x + rng.normal(size=n_events)
    return [{"x": a, "y": b} for a, b in zip(x.tolist(), y.tolist())]


def rows(of: list[dict[str, Any]]) -> list[beam.Row]:
    return [beam.Row(**event) for event in of]


def make(**params: Any) -> MixtureAnomalyDetector:
    return MixtureAnomalyDetector(**{"n_components": 3, "warm_up": 60, **params})


def learner() -> OnlineEM:
    model = Mixture(Product({}, others="full"), 3, 10.0)
    return OnlineEM(model, schedule=RobbinsMonro(0.6), warm_up=60, seed=0)


def progressive(of: list[dict[str, Any]], online: OnlineEM) -> list[float]:
    """-log p(x) of each event by what was learned before, one event at a time."""
    scores = []
    for event in of:
        scores.append(math.nan if online.n_events < GRACE else -float(online.log_prob(event)[0]))
        online.update(event)
    return scores


def score_and_learn(detector: MixtureAnomalyDetector, of: list[dict[str, Any]]) -> list[float | None]:
    scores = []
    for row in rows(of):
        scores.append(detector.score_one(row))
        detector.learn_one(row)
    return scores


def scores_of(results: list[AnomalyResult]) -> list[float | None]:
    return [result.predictions[0].score for result in results]


def test_scores_are_those_of_the_learner_one_event_at_a_time() -> None:
    expected = progressive(events(), learner())
    # Compiled code and NumPy sum in another order.
    np.testing.assert_allclose(score_and_learn(make(), events()), expected, rtol=1e-9, atol=1e-9)
    assert np.isnan(expected[:GRACE]).all()
    assert np.isfinite(expected[GRACE:]).all()


@pytest.mark.parametrize("keyed", [False, True])
def test_in_a_pipeline_each_key_has_a_detector_of_its_own(keyed: bool) -> None:
    streams = {"a": events(120), "b": events(90, seed=1)} if keyed else {"a": events(120)}
    # One key's events reach Beam's detector in the order in which Reshuffle hands them on.
    elements: list[Any] = [(key, row) for key, of in streams.items() for row in rows(of)]

    def matcher(found: list[Any]) -> None:
        by_key: dict[str, list[AnomalyResult]] = {key: [] for key in streams}
        for element in found:
            key, result = element if keyed else ("a", element)
            by_key[key].append(result)
        for key, results in by_key.items():
            arrived = [result.example._asdict() for result in results]
            assert sorted(map(str, arrived)) == sorted(map(str, streams[key]))
            expected = progressive(arrived, learner())
            np.testing.assert_allclose(scores_of(results), expected, rtol=CHECKPOINTED, atol=1e-9)

    with beam.Pipeline("FnApiRunner") as pipeline:
        arriving = pipeline | beam.Create(elements if keyed else [row for _, row in elements])
        assert_that(arriving | AnomalyDetection(make()), matcher)


def test_beams_thresholds_label_the_scores() -> None:
    odd = {"x": 0.0, "y": 60.0}
    fixed = make(threshold_criterion=FixedThreshold(20.0), model_id="fixed")
    quantile = make(threshold_criterion=QuantileThreshold(0.9), model_id="quantile")

    def by_fixed(found: list[AnomalyResult]) -> None:
        predictions = [result.predictions[0] for result in found]
        labels = [one.label for one in predictions]
        assert labels.count(NOT_READY) == GRACE
        assert all((one.score >= 20.0) == one.label for one in predictions if one.label != NOT_READY)
        assert [result.example._asdict() for result in found if result.predictions[0].label == 1] == [odd]
        assert {(one.model_id, one.threshold) for one in predictions} == {("fixed", 20.0)}

    def by_quantile(found: list[AnomalyResult]) -> None:
        labels = [result.predictions[0].label for result in found]
        # One tenth, as far as 390 scores can tell: four standard deviations of a binomial share.
        assert abs(labels.count(1) / (len(labels) - GRACE) - 0.1) < 4.0 * math.sqrt(0.1 * 0.9 / 390)

    with beam.Pipeline("FnApiRunner") as pipeline:
        arriving = pipeline | beam.Create(rows([*events(200), odd, *events(199, seed=1)]))
        assert_that(arriving | "Fixed" >> AnomalyDetection(fixed), by_fixed, label="fixed")
        assert_that(arriving | "Quantile" >> AnomalyDetection(quantile), by_quantile, label="quantile")


def test_it_joins_ensembles() -> None:
    mixture = make(model_id="mixture")
    ensemble = EnsembleAnomalyDetector(
        [ZScore(features=["x"], model_id="z"), mixture], aggregation_strategy=MaxScore(include_source_predictions=True)
    )

    def matcher(found: list[AnomalyResult]) -> None:
        assert len(found) == 100
        sources = [{one.model_id: one.score for one in result.predictions[0].source_predictions} for result in found]
        assert all(set(source) == {"z", "mixture"} for source in sources)
        assert sum(math.isnan(source["mixture"]) for source in sources) == GRACE

    with beam.Pipeline("FnApiRunner") as pipeline:
        assert_that(pipeline | beam.Create(rows(events(100))) | AnomalyDetection(ensemble), matcher)


def test_missing_features_are_marginalised() -> None:
    detector, online = make(), learner()
    given = events(300)
    for at in range(5, 300, 7):
        given[at]["y"] = math.nan if at % 2 else None  # type: ignore[assignment]
    np.testing.assert_allclose(score_and_learn(detector, given), progressive(given, online), rtol=1e-9, atol=1e-9)
    expected = -online.log_prob([{"x": 0.5}])[0]
    for row in (beam.Row(x=0.5, y=None), beam.Row(x=0.5, y=math.nan), beam.Row(x=0.5)):
        assert detector.score_one(row) == pytest.approx(expected, rel=1e-9)


def test_a_feature_joins_with_its_first_value_and_tells_its_kind() -> None:
    detector = make(counts=["clicks"], durations=["seconds"])
    rng = np.random.default_rng(0)
    for at in range(200):
        late = at >= 100
        detector.learn_one(
            beam.Row(
                x=float(rng.normal()),
                shop=str(rng.choice(["a", "b"])) if late else None,
                clicks=int(rng.poisson(3.0)),
                seconds=float(rng.exponential(2.0)),
                new=bool(rng.random() < 0.5) if late else math.nan,
            )
        )
    schema = detector._learner.schema
    assert schema is not None
    kinds = {one.name: one.kind for one in schema.fields}
    assert kinds == {"x": "numeric", "shop": "category", "clicks": "count", "seconds": "duration", "new": "flag"}
    assert (detector.n_rejected, detector._learner.n_events) == (0, 200)
    usual = beam.Row(x=0.0, shop="a", clicks=3, seconds=1.0, new=True)
    assert detector.score_one(beam.Row(**{**usual._asdict(), "clicks": 40})) > detector.score_one(usual) + 5.0


BAD = [{"x": math.inf, "y": 0.0}, {"x": "high", "y": 0.0}, {"x": None, "y": math.nan}, {"x": [1.0], "y": 0.0}]


def test_events_that_cannot_be_used_fail_nothing(caplog: pytest.LogCaptureFixture) -> None:
    detector = make()
    with caplog.at_level(logging.WARNING, "stream_em.beam.anomaly"):
        mixed = score_and_learn(detector, [*events(200), *BAD, *events(50, seed=1)])
    clean = score_and_learn(make(), [*events(200), *events(50, seed=1)])
    assert mixed[200:204] == 4 * [None]
    np.testing.assert_array_equal([*mixed[:200], *mixed[204:]], clean)
    assert detector.n_rejected == 4
    assert sum("got inf, expected a finite number" in record.message for record in caplog.records) == 1
    first = make()
    first.learn_one(beam.Row(x=None))
    assert (first.n_rejected, first._learner.n_events) == (1, 0)
    assert math.isnan(first.score_one(beam.Row(x=None)))


def test_rejected_events_are_counted_by_beam() -> None:
    def matcher(found: list[AnomalyResult]) -> None:
        assert sum(score is None for score in scores_of(found)) + sum(map(_not_ready, found)) >= GRACE
        assert len(found) == 64

    pipeline = beam.Pipeline("FnApiRunner")
    detector = make(threshold_criterion=FixedThreshold(20.0))
    assert_that(pipeline | beam.Create(rows([*events(60), *BAD])) | AnomalyDetection(detector), matcher)
    run = pipeline.run()
    run.wait_until_finish()
    counters = {one.key.metric.name: one.committed for one in run.metrics().query()["counters"]}
    assert (counters["events"], counters["rejected"]) == (60, 4)


def _not_ready(result: AnomalyResult) -> bool:
    score = result.predictions[0].score
    return score is not None and math.isnan(score)


@pytest.mark.parametrize("n_events", [0, 30, 150])
@pytest.mark.parametrize("through", ["pickle", "cloudpickle", "deepcopy"])
def test_a_copy_goes_on_as_the_original(n_events: int, through: str) -> None:
    detector = make(threshold_criterion=FixedThreshold(3.0))
    score_and_learn(detector, [*BAD[:1], *events(n_events)])
    again: MixtureAnomalyDetector = {
        "pickle": lambda: pickle.loads(pickle.dumps(detector)),
        "cloudpickle": lambda: cloudpickle.loads(cloudpickle.dumps(detector)),
        "deepcopy": lambda: copy.deepcopy(detector),
    }[through]()
    assert again.n_rejected == detector.n_rejected == 1
    more = events(100, seed=2)
    np.testing.assert_allclose(score_and_learn(again, more), score_and_learn(detector, more), rtol=1e-9, atol=1e-9)


def test_a_detector_that_has_not_been_made_yet_is_copied_too() -> None:
    again = pickle.loads(pickle.dumps(make(seed=3)))
    assert again._learner.seed == 3


def test_the_state_is_small_and_stays_so() -> None:
    detector = make(n_components=5)
    fields = "abcdefghi"
    sizes = []
    rng = np.random.default_rng(0)
    for at in range(2_000):
        detector.learn_one(beam.Row(**dict(zip(fields, rng.normal(size=9).tolist()))))
        if at in (500, 1_999):
            sizes.append(len(cloudpickle.dumps(detector)))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    # 5 components x (1 + 9 + 81) doubles, thrice: statistics, parameters, and as much again for names and shapes.
    assert sizes[1] < 3 * 8 * 5 * 91 * 2


def test_the_specification_makes_the_same_detector() -> None:
    detector = make(counts=["clicks"], step_size=0.05, threshold_criterion=FixedThreshold(4.0), features=["x", "y"])
    specification = detector.to_spec()
    assert isinstance(specification, Spec)
    assert specification.type == "MixtureAnomalyDetector"
    again = Specifiable.from_spec(specification)
    assert again.to_spec() == specification
    assert again._learner.schedule == detector._learner.schedule
    assert score_and_learn(again, events(100))[GRACE:] == score_and_learn(detector, events(100))[GRACE:]


@pytest.mark.parametrize(
    "params",
    [
        {"n_components": 1},
        {"covariance_type": "diag"},
        {"counts": ["n"]},
        {"durations": ["n"]},
        {"prior_weight": 1.0},
        {"alpha": 0.9},
        {"offset": 5.0},
        {"step_size": 0.1},
        {"batch_size": 80},
        {"warm_up": 100},
        {"seed": 7},
    ],
    ids=lambda params: next(iter(params)),
)
def test_every_parameter_matters(params: dict[str, Any]) -> None:
    given = [{**event, "n": at % 5} for at, event in enumerate(events())]
    plain = score_and_learn(make(batch_size=50), given)
    assert score_and_learn(make(**{"batch_size": 50, **params}), given)[-1] != plain[-1]


def test_features_and_target() -> None:
    only_x = make(features=["x"])
    without_y = make(target="y")
    given = events(80)
    with beam.Pipeline("FnApiRunner") as pipeline:
        arriving = pipeline | beam.Create(rows(given))
        for name, detector in (("features", only_x), ("target", without_y)):
            assert_that(arriving | name >> AnomalyDetection(detector), _scored_by_x, label=name)


def _scored_by_x(found: list[AnomalyResult]) -> None:
    expected = progressive([{"x": result.example.x} for result in found], learner())
    np.testing.assert_allclose(scores_of(found), expected, rtol=CHECKPOINTED, atol=1e-9)


def test_no_score_is_infinite() -> None:
    detector = make()
    score_and_learn(detector, events(200))
    score = detector.score_one(beam.Row(x=1e99, y=-1e99))
    assert score is not None
    assert 1e100 < score <= LARGEST_SCORE


def test_a_wrong_parameter_is_told_when_the_detector_is_made() -> None:
    with pytest.raises(ValueError, match="warm_up"):
        make(warm_up=0).run_original_init()


def test_a_refitted_model_scores_offline(tmp_path: Path) -> None:
    fitted = BatchEM(Mixture(Gaussian(), 2), seed=0).fit(events())
    save(fitted, tmp_path / "model.arrow")
    handler = KeyedModelHandler(MixtureModelHandler(tmp_path / "model.arrow"))
    detector = OfflineDetector(
        handler.with_postprocess_fn(to_anomaly_prediction),
        threshold_criterion=FixedThreshold(12.0),
        model_id="refit",
    )
    given = [*events(30, seed=3), {"x": 0.0, "y": 50.0}]

    def matcher(found: list[tuple[str, AnomalyResult]]) -> None:
        assert len(found) == 32
        for key, result in found:
            assert key == "pump"
            prediction = result.predictions[0]
            event = result.example._asdict()
            assert prediction.model_id == "refit"
            if event == BAD[0]:
                assert (prediction.score, prediction.label) == (None, None)
                assert "got inf" in prediction.info
            else:
                expected = -fitted.log_prob(event)[0]
                assert prediction.score == pytest.approx(expected, rel=1e-12)
                assert prediction.label == (expected >= 12.0)

    with beam.Pipeline("FnApiRunner") as pipeline:
        keyed = pipeline | beam.Create([("pump", row) for row in rows([*given, BAD[0]])])
        assert_that(keyed | AnomalyDetection(detector), matcher)


def test_it_finds_the_anomalies_of_the_shuttle() -> None:
    stream = list(datasets.Shuttle().take(5_000))
    given, truth = [x for x, _ in stream], [y for _, y in stream]
    detector = MixtureAnomalyDetector()
    scores = score_and_learn(detector, given)
    model = Mixture(Product({}, others="full"), 5, 10.0)
    expected = progressive(given, OnlineEM(model, seed=0))
    np.testing.assert_allclose(scores, expected, rtol=1e-7, atol=1e-7)
    ready = slice(GRACE, None)
    area = roc_auc_score(truth[ready], scores[ready])
    assert area == pytest.approx(roc_auc_score(truth[ready], expected[ready]), abs=1e-6)
    assert area > 0.9
