"""A mixture as a clusterer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from river import base

from stream_em.river.estimator import MixtureEstimator


class MixtureClusterer(MixtureEstimator, base.Clusterer):
    """Online mixture model as a clusterer.

    Components are fitted by online expectation-maximisation (EM)[^1]: clusters are soft, of any size and orientation,
    and over mixed features. Numbers are jointly Gaussian, strings categorical, booleans Bernoulli; other kinds can be
    stated. The first events are kept aside to seed from; until then every event is in the first cluster. Missing
    features are marginalised, and new ones grow the model once they have had ten values.

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
        Events' worth of the pooled data that each component is given as a prior.
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

    Attributes
    ----------
    centers : dict
        Means of the numeric, flag, count and duration features of each cluster, by its id.
    ignored_features : dict
        Features that were ignored, with the number of events that held them.
    n_drifts : int
        Drifts that were acted on.

    Examples
    --------
    >>> import random
    >>> from stream_em.river import MixtureClusterer

    >>> rng = random.Random(42)
    >>> model = MixtureClusterer(n_components=2, warm_up=50, seed=1)

    >>> for _ in range(500):
    ...     shift = rng.choice([0.0, 8.0])
    ...     x = {"x": rng.gauss(shift, 1.0), "y": rng.gauss(-shift, 0.5), "color": "red" if shift else "blue"}
    ...     model.learn_one(x)

    >>> model.predict_one({"x": 8.1, "y": -7.9}) == model.predict_one({"color": "red"})
    True
    >>> model.predict_one({"x": 0.2, "y": 0.1}) == model.predict_one({"color": "red"})
    False
    >>> sorted(round(center["x"]) for center in model.centers.values())
    [0, 8]

    References
    ----------
    [^1]: [Cappé, O. and Moulines, E., 2009. On-line expectation-maximization algorithm for latent data models. Journal of the Royal Statistical Society: Series B, 71(3), pp.593-613.](https://arxiv.org/abs/0712.4273)

    """  # noqa: E501 - River links its references

    def predict_one(self, x: dict[Hashable, Any]) -> int:
        """Return the id of the most probable cluster.

        Parameters
        ----------
        x
            A dictionary of features.

        Returns
        -------
        A cluster's id, which never changes its meaning.

        """
        winner = self._winner(x)  # type: ignore[arg-type]
        return self._ask(x).winner if winner is None else winner

    def predict_proba_one(self, x: dict[Hashable, Any]) -> dict[int, float]:
        """Return the probability of each cluster.

        Parameters
        ----------
        x
            A dictionary of features.

        Returns
        -------
        Probabilities by the cluster's id.

        """
        kernel = self._kernel
        if kernel is None or self._score(x) is None:  # type: ignore[arg-type]
            answer = self._ask(x)
            return dict(zip(answer.ids, answer.responsibilities))
        return dict(zip(kernel.ids, kernel.responsibilities))

    def predict_many(self, X: Any) -> Any:
        """Return the id of the most probable cluster of each event of a frame.

        Parameters
        ----------
        X
            A pandas, polars or Arrow frame, or a record batch.

        Returns
        -------
        A series of the frame's kind with its index; an Arrow array for a record batch.

        """
        frame = self._frame(X)
        return frame.series("cluster", self._predict_many(frame).component)

    def predict_proba_many(self, X: Any) -> Any:
        """Return the probability of each cluster for each event of a frame.

        Parameters
        ----------
        X
            A pandas, polars or Arrow frame, or a record batch.

        Returns
        -------
        A frame of the same kind with its index, a column for each cluster's id.

        """
        frame = self._frame(X)
        return frame.frame(dict(zip(self._component_ids(), self._predict_many(frame).responsibilities.T)))

    @property
    def centers(self) -> dict[int, dict[Hashable, float]]:
        """Means of the features of each cluster, by its id, without categories; nothing before the first event."""
        learner = self._learner
        if learner.schema is None:
            return {}
        labels = self._features.labels
        averaged = [
            (position, labels.get(one.name, one.name))
            for position, one in enumerate(learner.schema.fields)
            if one.kind != "category"
        ]
        return {
            id_: {name: mean[position] for position, name in averaged}
            for id_, mean in zip(self._component_ids(), learner.marginals()[0].tolist())
        }
