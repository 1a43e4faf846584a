"""A mixture as an anomaly detector of `apache_beam.ml.anomaly`, online and offline."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.ml.anomaly.base import AnomalyDetector, AnomalyPrediction
from apache_beam.ml.anomaly.specifiable import specifiable
from apache_beam.ml.inference.base import PredictionResult

from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import NAMESPACE
from stream_em.families import Product
from stream_em.families.gaussian import CovarianceType
from stream_em.learners import OnlineEM
from stream_em.models import Mixture
from stream_em.schedules import Constant, RobbinsMonro
from stream_em.schema import EventError, Field, Kind, Schema, SchemaError, _is_missing, _kind_of_value
from stream_em.store import from_bytes, to_bytes

# Of fewer events it cannot be told what is usual.
GRACE = 10

# A score is a number for any event, also where log p(x) is -inf: quantiles of infinite scores are NaN.
LARGEST_SCORE = 1e300

_LOGGER = logging.getLogger(__name__)
_EVENTS = Metrics.counter(NAMESPACE, "events")
_REJECTED = Metrics.counter(NAMESPACE, "rejected")


@specifiable
class MixtureAnomalyDetector(AnomalyDetector):
    """Online mixture model as a detector for Beam's `AnomalyDetection`, over any number of features.

    The score is -log p(x) under a mixture that is fitted by online EM (Cappé & Moulines 2009): high where events are
    rare. It is NaN, which Beam's thresholds take for "not ready", for the first ten events of a key, and in the warm-up
    that of a single component.

    Numbers are jointly Gaussian, strings categorical, booleans Bernoulli. None, NaN and a feature that a row does not
    have are missing, and marginalised. A feature joins the model with the first value that is seen of it, which also
    tells its kind.

    Parameters
    ----------
    n_components
        Number of components.
    covariance_type
        Covariances of the numeric features within a component: "full", "tied", "diag" or "spherical".
    counts
        Features that are counts (Poisson).
    durations
        Features that are durations or other positive amounts (exponential).
    prior_weight
        Events' worth of the pooled data that each component is given as a prior. It is strong, since a component that
        gathers a few anomalies must not fit them tightly.
    alpha
        The step size is `(t + offset) ** -alpha` after t batches of events; in (0.5, 1].
    offset
        Batches added to the count; a larger one makes the first steps smaller.
    step_size
        A constant step size in (0, 1) instead, which follows drift.
    batch_size
        Events in a step; each event is learned at once, as a fraction of one.
    warm_up
        Events kept aside before there are components; None for 20 for each component, at least 200.
    seed
        Seed of the warm-up's random choices.
    kwargs
        Those of Beam's detectors: `model_id`, `features`, `target` (kept from the model), `threshold_criterion`.

    Raises
    ------
    ValueError
        When a number is out of range, once the detector is run: Beam's detectors are made late.

    Notes
    -----
    An event that cannot be used (an infinite number, a text where a number belongs, no value at all) fails nothing: its
    score is None, and so is its label; it is not learned, but counted by `n_rejected` and by Beam's counter `rejected`
    under `stream_em`. The log has the reason of the first one of each key.

    Beam keeps a detector for each key in its state, pickled after each bundle. What was learned is in it as the bytes
    of a snapshot, which a newer version of this library can read: 12 kB for nine features and five components.

    >>> from apache_beam.ml.anomaly.thresholds import FixedThreshold
    >>> from apache_beam.ml.anomaly.transforms import AnomalyDetection
    >>> from apache_beam.testing.util import assert_that
    >>> import random
    >>> rng = random.Random(0)
    >>> xs = [rng.gauss(0.0, 1.0) for _ in range(300)]
    >>> rows = [beam.Row(x=x, y=2.0 * x + rng.gauss(0.0, 0.1)) for x in xs]
    >>> detector = MixtureAnomalyDetector(n_components=2, warm_up=50, threshold_criterion=FixedThreshold(10.0))
    >>> for row in rows:
    ...     detector.learn_one(row)
    >>> detector.score_one(beam.Row(x=1.0, y=2.0)) < 3.0, detector.score_one(beam.Row(x=1.0, y=-2.0)) > 10.0
    (True, True)

    >>> def check(results):
    ...     labels = [result.predictions[0].label for result in results]
    ...     assert labels.count(-2) == 10  # not ready
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     _ = assert_that(pipeline | beam.Create(rows) | AnomalyDetection(detector), check)

    """

    def __init__(
        self,
        n_components: int = 5,
        covariance_type: CovarianceType = "full",
        counts: list[str] | None = None,
        durations: list[str] | None = None,
        prior_weight: float = 10.0,
        alpha: float = 0.6,
        offset: float = 0.0,
        step_size: float | None = None,
        batch_size: int = 1000,
        warm_up: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._kinds: dict[str, Kind] = {
            **dict.fromkeys(counts or (), "count"),
            **dict.fromkeys(durations or (), "duration"),
        }
        self.n_rejected = 0
        self._learner = OnlineEM(
            Mixture(Product({}, others=covariance_type), n_components, prior_weight),
            schedule=RobbinsMonro(alpha, offset) if step_size is None else Constant(step_size),
            batch_size=batch_size,
            warm_up=warm_up,
            seed=seed,
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # Beam makes a detector late: until then there is none.
        if "_learner" in state:
            state["_learner"] = to_bytes(state["_learner"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_learner" in state:
            learner = from_bytes(state["_learner"], source="state of the detector")
            assert isinstance(learner, OnlineEM)
            self._learner = learner

    def learn_one(self, x: beam.Row) -> None:
        """Learn from an event; one that cannot be used is counted instead.

        Parameters
        ----------
        x
            The features.

        """
        try:
            self._learn(self._event(x))
        except (EventError, SchemaError) as error:
            if not self.n_rejected:
                _LOGGER.warning("%s: an event is not learned, nor will be others like it: %s", self._model_id, error)
            self.n_rejected += 1
            _REJECTED.inc()
        else:
            _EVENTS.inc()

    def score_one(self, x: beam.Row) -> float | None:
        """Return how unusual an event is; nothing is learned.

        Parameters
        ----------
        x
            The features.

        Returns
        -------
        -log p(x), NaN for the first ten events, None for an event that cannot be used.

        """
        if self._learner.n_events < GRACE:
            return math.nan
        try:
            log_prob = self._log_prob(self._event(x))
        except (EventError, SchemaError):
            return None
        return min(0.0 - log_prob, LARGEST_SCORE)

    def _event(self, x: beam.Row) -> dict[str, Any]:
        event: dict[str, Any] = x._asdict()
        event.pop(self._target, None)
        return event

    def _learn(self, event: Mapping[str, Any]) -> None:
        learner, schema = self._learner, self._learner.schema
        names = () if schema is None else schema.names
        known = {name: value for name, value in event.items() if name in names or not _is_missing(value)}
        newcomers = [
            Field(name, self._kinds.get(name) or _kind_of_value(0, name, value))
            for name, value in known.items()
            if name not in names
        ]
        if not newcomers:
            if schema is None:
                raise EventError(0, None, None, "at least one field with a value")
            learner.update(known)
            return
        fields = newcomers if schema is None else [*schema.fields, *newcomers]
        learner.update(Schema(fields, unknown="ignore").encode(known, extend=True))

    def _log_prob(self, event: Mapping[str, Any]) -> float:
        learner = self._learner
        kernel = learner.kernel()
        log_prob = None if kernel is None else kernel.score(event)
        return float(learner.log_prob(event)[0]) if log_prob is None else log_prob


def to_anomaly_prediction(keyed: tuple[Any, PredictionResult]) -> tuple[Any, AnomalyPrediction]:
    """Return a key with the score of its event: what Beam's `OfflineDetector` wants from a model that was refitted.

    Parameters
    ----------
    keyed
        A key and the result of a `MixtureModelHandler` for one event.

    Returns
    -------
    The key and a prediction: -log p(event) for a score, or no score and the reason as `info` where the event could not
    be used.

    >>> from apache_beam.ml.anomaly.detectors.offline import OfflineDetector
    >>> from apache_beam.ml.inference.base import KeyedModelHandler
    >>> from stream_em.beam.serving import EventScore, MixtureModelHandler
    >>> handler = KeyedModelHandler(MixtureModelHandler("model.arrow"))
    >>> detector = OfflineDetector(handler.with_postprocess_fn(to_anomaly_prediction))
    >>> to_anomaly_prediction(("pump", PredictionResult(beam.Row(x=1.0), EventScore(0, -2.5, {0: 1.0}))))[1].score
    2.5

    """
    key, result = keyed
    if isinstance(result.inference, RejectedEvent):
        return key, AnomalyPrediction(info=result.inference.reason)
    return key, AnomalyPrediction(score=min(result.inference.anomaly_score, LARGEST_SCORE))
