"""A mixture as a transformer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from river import base

from stream_em.river.estimator import MixtureEstimator


class MixtureTransformer(MixtureEstimator, base.MiniBatchTransformer):
    """Responsibilities of an online mixture model as features.

    The features are the probabilities of the components of a mixture that is fitted by online expectation-maximisation
    (EM)[^1]: a soft, smooth coding of where in the data an event lies, for instance for a linear model. In the warm-up
    all components are equally probable.

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
    ignored_features : dict
        Features that were ignored, with the number of events that held them.
    n_drifts : int
        Drifts that were acted on.

    Examples
    --------
    >>> import random
    >>> from river import linear_model
    >>> from stream_em.river import MixtureTransformer

    >>> rng = random.Random(42)
    >>> mixture = MixtureTransformer(n_components=2, warm_up=50, seed=1)
    >>> for _ in range(500):
    ...     mixture.learn_one({"x": rng.gauss(rng.choice([0.0, 8.0]), 1.0)})
    >>> sorted(round(share, 3) for share in mixture.transform_one({"x": 7.5}).values())
    [0.0, 1.0]

    >>> model = (MixtureTransformer(n_components=2, seed=1)) | linear_model.LinearRegression()
    >>> model.learn_one({"x": 1.0}, 2.0)

    References
    ----------
    [^1]: [Cappé, O. and Moulines, E., 2009. On-line expectation-maximization algorithm for latent data models. Journal of the Royal Statistical Society: Series B, 71(3), pp.593-613.](https://arxiv.org/abs/0712.4273)

    """  # noqa: E501 - River links its references

    def _unit_test_skips(self) -> set[str]:
        # A mini-batch is taken in one E-step, so it is not learned as its rows one by one would be.
        return {"check_learn_many_matches_learn_one"}

    def transform_one(self, x: dict[Hashable, Any]) -> dict[Hashable, float]:
        """Return the responsibilities of the components for an event.

        Parameters
        ----------
        x
            A dictionary of features.

        Returns
        -------
        Probabilities that sum to 1, named `component_0` and so on by the components' ids.

        """
        kernel = self._kernel
        if kernel is None or self._score(x) is None:  # type: ignore[arg-type]
            answer = self._ask(x)
            return _by_component(answer.ids, answer.responsibilities)
        return _by_component(kernel.ids, kernel.responsibilities)

    def transform_many(self, X: Any) -> Any:
        """Return the responsibilities of the components for each event of a frame.

        Parameters
        ----------
        X
            A pandas, polars or Arrow frame, or a record batch.

        Returns
        -------
        A frame of the same kind with its index, a column for each component.

        """
        frame = self._frame(X)
        return frame.frame(_by_component(self._component_ids(), self._predict_many(frame).responsibilities.T))


def _by_component(ids: list[int], shares: Iterable[Any]) -> dict[Hashable, Any]:
    return {f"component_{id_}": share for id_, share in zip(ids, shares)}
