"""A mixture as an anomaly detector."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stream_em.families import Family
from stream_em.families.gaussian import CovarianceType
from stream_em.numerics import check_whole
from stream_em.river.estimator import MixtureEstimator, OnDrift, Unknown
from stream_em.schema import Kind

if TYPE_CHECKING:
    from river.utils import SortedWindow

try:
    from river.base import AnomalyDetector
except ImportError:  # before River 0.26
    from river.anomaly.base import AnomalyDetector  # type: ignore[no-redef]


class MixtureAnomalyDetector(MixtureEstimator, AnomalyDetector):
    """Online mixture model as an anomaly detector.

    The score is -log p(x) under a mixture that is fitted by online expectation-maximisation (EM)[^1]: high where events
    are rare. It is finite for every event, 0 for the first ten, and in the warm-up that of a single component.

    With `calibration_window` it is instead the share of the stream's own recent scores that are lower, as in conformal
    anomaly detection[^2]: a threshold is then a rate of false alarms, and metrics with thresholds between 0 and 1, such
    as `river.metrics.ROCAUC`, can be used.

    Anomalies that are so frequent that they form clusters of their own score low, as they should in a density model; a
    strong prior and few components keep them from that.

    Parameters
    ----------
    n_components
        Number of components.
    covariance_type
        Covariances of the numeric features within a component: "full", "tied", "diag" or "spherical"; not used with
        `family`.
    family
        Family of the components, such as `stream_em.Gaussian("diag")`, or a `stream_em.Product` that names features;
        None for the families that suit the features.
    kinds
        Kinds of features that their values do not tell, such as `{"clicks": "count", "seconds": "duration"}`.
    prior_weight
        Events' worth of the pooled data that each component is given as a prior. It is stronger than that of the
        clusterer: a component that gathers a few anomalies must not fit them tightly.
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
    unknown
        What to do with features that are not in the model: "add", "ignore" (with one warning) or "refuse".
    max_features
        Features in the model beyond which none is added; those of the first event are taken in any case.
    drift_detector
        A detector of `river.drift` that is fed -log p(x) of each event before it is learned.
    on_drift
        "forget" lets the past count for no more than a batch of events, so that steps are large for a while; "reseed"
        gathers a new warm-up beside the old model, whose place the new components take, with new ids.
    seed
        Seed of the warm-up's random choices.
    calibration_window
        Recent scores that a score is compared with; None for -log p(x) itself.

    Attributes
    ----------
    ignored_features : dict
        Features that were ignored, with the number of events that held them.
    n_drifts : int
        Drifts that were acted on.

    Examples
    --------
    >>> import random
    >>> from river import anomaly
    >>> from stream_em.river import MixtureAnomalyDetector

    >>> rng = random.Random(42)
    >>> model = MixtureAnomalyDetector(n_components=2, warm_up=50, seed=1)
    >>> for _ in range(500):
    ...     x = rng.gauss(0.0, 1.0)
    ...     model.learn_one({"x": x, "y": 2.0 * x + rng.gauss(0.0, 0.1)})

    >>> usual, unusual = {"x": 1.0, "y": 2.0}, {"x": 1.0, "y": -2.0}
    >>> model.score_one(usual) < 2.0, model.score_one(unusual) > 20.0
    (True, True)

    >>> calibrated = MixtureAnomalyDetector(n_components=2, warm_up=50, seed=1, calibration_window=400)
    >>> for _ in range(500):
    ...     x = rng.gauss(0.0, 1.0)
    ...     calibrated.learn_one({"x": x, "y": 2.0 * x + rng.gauss(0.0, 0.1)})
    >>> round(calibrated.score_one(unusual), 4), round(calibrated.tail_probability_one(unusual), 4)
    (0.9975, 0.0025)

    References
    ----------
    [^1]: [Cappé, O. and Moulines, E., 2009. On-line expectation-maximization algorithm for latent data models. Journal of the Royal Statistical Society: Series B, 71(3), pp.593-613.](https://arxiv.org/abs/0712.4273)
    [^2]: [Laxhammar, R. and Falkman, G., 2014. Online learning and sequential anomaly detection in trajectories. IEEE Transactions on Pattern Analysis and Machine Intelligence, 36(6), pp.1158-1173.](https://doi.org/10.1109/TPAMI.2013.172)

    """  # noqa: E501 - River links its references

    def __init__(
        self,
        n_components: int = 5,
        covariance_type: CovarianceType = "full",
        family: Family | None = None,
        kinds: dict[str, Kind] | None = None,
        prior_weight: float = 10.0,
        alpha: float = 0.6,
        offset: float = 0.0,
        step_size: float | None = None,
        batch_size: int = 1000,
        warm_up: int | None = None,
        unknown: Unknown = "add",
        max_features: int = 64,
        drift_detector: Any = None,
        on_drift: OnDrift = "forget",
        seed: int | None = None,
        calibration_window: int | None = None,
    ) -> None:
        super().__init__(
            n_components=n_components,
            covariance_type=covariance_type,
            family=family,
            kinds=kinds,
            prior_weight=prior_weight,
            alpha=alpha,
            offset=offset,
            step_size=step_size,
            batch_size=batch_size,
            warm_up=warm_up,
            unknown=unknown,
            max_features=max_features,
            drift_detector=drift_detector,
            on_drift=on_drift,
            seed=seed,
        )
        if calibration_window is not None:
            check_whole(calibration_window=calibration_window)
        self.calibration_window = calibration_window
        self._watches = self._watches or calibration_window is not None
        self._start_anew()

    KEPT_PARAMS = (*MixtureEstimator.KEPT_PARAMS, "calibration_window")

    @classmethod
    def _unit_test_params(cls) -> Any:
        yield from super()._unit_test_params()
        yield {"n_components": 3, "warm_up": 40, "calibration_window": 100}

    def _start_anew(self) -> None:
        super()._start_anew()
        self._recent: SortedWindow[float] | None = None
        if self.calibration_window is not None:
            from river.utils import SortedWindow  # which imports Narwhals

            self._recent = SortedWindow(self.calibration_window)

    def _kept(self) -> dict[str, Any]:
        recent = [] if self._recent is None else list(self._recent.unsorted_window)
        return {**super()._kept(), "recent_scores": recent}

    def _restore(self, kept: Mapping[str, Any]) -> None:
        super()._restore(kept)
        if self._recent is not None:
            # Of more than the window holds the last ones stay.
            for score in kept.get("recent_scores", ()):
                self._recent.append(float(score))

    def _watch(self, log_prob: float, warming_up: bool) -> None:
        if self._recent is not None:
            self._recent.append(-log_prob)
        super()._watch(log_prob, warming_up)

    def score_one(self, x: dict[Hashable, Any]) -> float:
        """Return how unusual an event is.

        Parameters
        ----------
        x
            A dictionary of features.

        Returns
        -------
        -log p(x); with `calibration_window` 1 minus the tail probability of it, in [0, 1).

        """
        log_prob = self._score(x)  # type: ignore[arg-type]
        if log_prob is None:
            log_prob = self._ask(x).log_prob
        return 0.0 - log_prob if self._recent is None else 1.0 - self._tail_probability(-log_prob)

    def tail_probability_one(self, x: dict[Hashable, Any]) -> float:
        """Return the share of the recent scores that are at least as high as this event's, itself included.

        Parameters
        ----------
        x
            A dictionary of features.

        Returns
        -------
        A probability in (0, 1], small for anomalies; 1 before there are any scores.

        Raises
        ------
        ValueError
            When there is no `calibration_window`.

        """
        return self._tail_probability(-self._ask(x).log_prob)

    def _tail_probability(self, score: float) -> float:
        if self._recent is None:
            raise ValueError("tail probabilities need recent scores: pass calibration_window, such as 1000")
        n_recent = len(self._recent)
        return (1 + n_recent - bisect_left(self._recent, score)) / (1 + n_recent)

    def score_many(self, X: Any) -> Any:
        """Return how unusual each event of a frame is.

        Parameters
        ----------
        X
            A pandas, polars or Arrow frame, or a record batch.

        Returns
        -------
        A series of the frame's kind with its index; an Arrow array for a record batch.

        """
        frame = self._frame(X)
        scores = 0.0 - self._predict_many(frame).log_prob
        if self._recent is not None:
            scores = np.array([1.0 - self._tail_probability(score) for score in scores.tolist()])
        return frame.series("score", scores)
