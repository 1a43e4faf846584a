"""What the estimators share: scikit-learn's verbs around the learners."""

from __future__ import annotations

import math
import reprlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import sklearn.mixture
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator, DensityMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from stream_em.families import Gaussian
from stream_em.families.gaussian import GaussianParameters
from stream_em.learners import BatchEM, FittedMixture, Iteration, OnlineEM, iterations
from stream_em.learners.progress import Progress
from stream_em.models import Mixture, MixtureParameters
from stream_em.models.mixture import Posterior
from stream_em.numerics import Array
from stream_em.schedules import Constant, Harmonic, RobbinsMonro, Schedule
from stream_em.schema import Batch, Schema
from stream_em.seeding import Reservoir, concatenate, k_means_responsibilities, points_for_k_means
from stream_em.seeding import seed as seed_parameters
from stream_em.sklearn.snapshots import METADATA_KEY, check_kept, default_names, pace_of
from stream_em.statistics import MergeError, Statistics
from stream_em.store import from_bytes, metadata_from_bytes, save

# Rows over which `n_init` starts compete.
SAMPLE_ROWS = 10_000

# Rows from which each start is seeded: enough for each mean and variance, without making small fits slow.
LEAST_SEED_ROWS, SEED_ROWS_PER_MEAN = 2_000, 20

# Rows scored at once: enough to fill the engine's blocks, few enough to keep memory near the result's size.
CHUNK_ROWS = 32_768

# Fitted attributes that a snapshot of the learner does not hold.
KEPT = ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_samples_seen_")

ILL_DEFINED = (
    "Components {} have ill-defined empirical covariance (for instance caused by singleton or collapsed samples): "
    "they were shrunk to the pooled estimate. Try to decrease the number of components, increase {}, or scale the "
    "input data."
)
NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or increase max_iter, tol, or "
    "check for degenerate data."
)


class _Run(NamedTuple):
    """EM from one start: where it ended, the statistics there, the bounds on the way."""

    parameters: MixtureParameters
    statistics: Statistics | None
    bounds: list[float]
    converged: bool
    ill_defined: npt.NDArray[np.bool_]

    @property
    def bound(self) -> float:
        return self.bounds[-1] if self.bounds else -math.inf


class Criteria(NamedTuple):
    """Information criteria of a fitted mixture on some samples; lower is better.

    Parameters
    ----------
    log_likelihood : float
        Weighted sum of the samples' log-likelihoods.
    n_parameters : int
        Number of free parameters.
    bic : float
        Bayesian information criterion (Schwarz 1978).
    aic : float
        Akaike's information criterion (Akaike 1974).
    icl : float
        Integrated completed likelihood (Biernacki, Celeux & Govaert 2000).

    """

    log_likelihood: float
    n_parameters: int
    bic: float
    aic: float
    icl: float


class BaseMixture(DensityMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """Base of the estimators; see `GaussianMixture` and `MixtureModel`."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "covariance_type": [StrOptions({"full", "tied", "diag", "spherical"})],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "init_params": [StrOptions({"kmeans", "random", "random_from_data", "k-means++"})],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "verbose_interval": [Interval(Integral, 1, None, closed="left")],
        "step_size": [StrOptions({"robbins-monro", "harmonic"}), Interval(Real, 0.0, 1.0, closed="neither")],
        "step_exponent": [Interval(Real, 0.5, 1.0, closed="right")],
        "step_offset": [Interval(Real, 0.0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "warm_up": [Interval(Integral, 1, None, closed="left"), None],
        "n_jobs": [Integral, None],
    }
    _regularizer: ClassVar[str]
    _learner: OnlineEM
    _dtype: npt.DTypeLike = np.float64

    n_components: int
    tol: float
    max_iter: int
    n_init: int
    init_params: str
    random_state: Any
    warm_start: bool
    verbose: int
    verbose_interval: int
    step_size: str | float
    step_exponent: float
    step_offset: float
    batch_size: int
    warm_up: int | None
    n_jobs: int | None

    @abstractmethod
    def _read(self, X: Any, *, reset: bool, learn: bool, least: int = 1) -> Batch:
        """Validate `X` and return it encoded; `reset` takes its columns for the model's, `learn` lets them grow."""

    @abstractmethod
    def _mixture(self, schema: Schema) -> Mixture:
        """Return the mixture that the parameters describe, for these columns."""

    def _described(self, fitted: FittedMixture) -> Mixture:
        """Return the mixture that the parameters describe for the columns of a fitted one.

        How events are assigned is no parameter, and may be another where it comes from a snapshot.
        """
        return replace(self._mixture(fitted._known_schema()), assignment=fitted.model.assignment)

    @abstractmethod
    def _fitted(self) -> FittedMixture:
        """Return the mixture at the fitted parameters."""

    def _warn_of_others(self, batch: Batch, stacklevel: int) -> None:
        """Warn, once for each column, of categories in learned samples for which there was no room."""

    def _is_published(self, parameters: MixtureParameters) -> bool:
        """Return whether the fitted attributes are still those made from these parameters."""
        return True

    @abstractmethod
    def _publish(self, parameters: MixtureParameters) -> None:
        """Set the fitted attributes that are made from the parameters."""

    @abstractmethod
    def _bound(self, iteration: Iteration) -> float:
        """Return what EM increases."""

    def _result_type(self, X: Any) -> npt.DTypeLike:
        return np.float64

    def _unit_of_weight(self, batch: Batch) -> float:
        """Return the weight that counts as one sample while `fit` runs."""
        return 1.0

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    # Fitting.

    def fit(self, X: Any, y: Any = None, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Estimate the parameters with the EM algorithm.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The data; NaN is a missing value, which is marginalised.
        y : Ignored
            Not used, present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights >= 0 of the samples; an integer weight is that many copies of the sample, and a sample of
            weight 0 is as good as absent.

        Returns
        -------
        self : object
            The fitted mixture.

        """
        self._fit(X, sample_weight)
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """Estimate the parameters and predict the labels of the same samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The data.
        y : Ignored
            Not used, present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples.

        Returns
        -------
        labels : ndarray of shape (n_samples,)
            Component labels, the same as those of `fit(X).predict(X)`.

        """
        return self._labels(self._fit(X, sample_weight))

    def _fit(self, X: Any, sample_weight: npt.ArrayLike | None) -> Batch:
        self._validate_params()
        warm = bool(self.warm_start) and self._is_fitted()
        whole = self._read(X, reset=not warm, learn=not warm, least=2)
        if whole.n_events < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {whole.n_events}"
            )
        batch = _with_weight(_weighted(whole, weights_of(sample_weight, whole.values.T)))
        if np.isnan(batch.values).all():
            raise ValueError(
                f"Input X holds no value: all of its {batch.n_events} samples with weight are missing in every feature"
            )
        unit = self._unit_of_weight(batch)
        weight = None if batch.weight is None else batch.weight / unit
        batch = replace(batch, values=np.ascontiguousarray(batch.values, dtype=np.float64), weight=weight)
        model = self._mixture(batch.schema)
        start = self._continued(model) if warm else None
        bound = model.bind(batch.schema)
        if start is None:
            start = self._given_start(bound)
        previous = float(getattr(self, "lower_bound_", -math.inf)) if warm else -math.inf
        starts = 1 if start is not None else self.n_init
        random = self._generator()
        with Progress(bool(self.verbose), starts * self.max_iter) as advance:
            if start is not None:
                best = self._run(bound, start, batch, advance, previous)
            else:
                best = self._best_of(starts, bound, batch, random, advance)
        self._settle(model, best, batch, unit)
        if not warm:
            self._warn_of_others(batch, 4)
        return whole

    def _best_of(self, starts: int, bound: Mixture, batch: Batch, random: np.random.Generator, advance: Any) -> _Run:
        # A generator of its own: starts must not depend on whether a weight or copies count a sample.
        reservoir = Reservoir(SAMPLE_ROWS, random.spawn(1)[0])
        reservoir.add(batch)
        sample = _distinct(reservoir.sample())
        # On many rows the starts compete over the sample, and only the best goes on to all of them.
        few = batch.n_events <= SAMPLE_ROWS
        best: _Run | None = None
        n_rows = max(LEAST_SEED_ROWS, SEED_ROWS_PER_MEAN * self.n_components * len(sample.values))
        for _ in range(starts):
            start = self._start(bound, _sampled(sample, n_rows, random), random)
            if starts == 1:
                return self._run(bound, start, batch, advance)
            run = self._run(bound, start, batch if few else sample, advance)
            if best is None or run.bound > best.bound:
                best = run
        assert best is not None
        return best if few else self._run(bound, best.parameters, batch, advance)

    def _run(
        self, bound: Mixture, start: MixtureParameters, batch: Batch, advance: Any, previous: float = -math.inf
    ) -> _Run:
        bounds: list[float] = []
        shrunk = doubtful = np.zeros(self.n_components, dtype=bool)
        run = _Run(start, None, bounds, False, shrunk)
        text, began = "", time.perf_counter()
        threads = effective_n_jobs(self.n_jobs)
        steps = iterations(bound, start, lambda: (batch,), n_threads=threads)
        for _ in range(self.max_iter):
            iteration = next(steps)
            bounds.append(self._bound(iteration))
            change = bounds[-1] - previous
            previous = bounds[-1]
            # Once may be the rounding of a poor start; what is ill-defined twice is shrunk, and stays so.
            ill = _ill_defined(iteration.parameters) & ~shrunk
            if (ill & doubtful).any():
                shrunk = shrunk | (ill & doubtful)
                prior = replace(iteration.prior, shrunk=shrunk)
                steps = iterations(bound, iteration.parameters, lambda: (batch,), prior=prior, n_threads=threads)
            doubtful = ill
            if len(bounds) % self.verbose_interval == 0 or not text:
                text = f"iteration {len(bounds)}, lower bound {previous:.5f}"
                if self.verbose >= 2:
                    text += f", change {change:.5f}, {time.perf_counter() - began:.2f} s"
            advance(text)
            converged = abs(change) < self.tol and not ill.any()
            run = _Run(iteration.parameters, iteration.statistics, bounds, converged, shrunk | ill)
            if converged:
                break
        return run

    def _settle(self, model: Mixture, run: _Run, batch: Batch, unit: float) -> None:
        """Keep what a fit came to, so that `partial_fit` can go on from it, and say what went wrong."""
        learner = self._make_learner(model, batch.schema, run.parameters)
        if run.statistics is not None:
            learner.resume(run.statistics.scale(unit), batch.n_events)
        self._learner = learner
        self.converged_ = run.converged
        self.n_iter_ = len(run.bounds)
        self.lower_bounds_ = list(np.array(run.bounds, dtype=self._dtype))
        self.lower_bound_ = self.lower_bounds_[-1] if self.lower_bounds_ else -math.inf
        self.n_samples_seen_ = batch.n_events
        self._publish(run.parameters)
        if run.ill_defined.any():
            named = ", ".join(map(str, np.flatnonzero(run.ill_defined)))
            warnings.warn(ILL_DEFINED.format(named, self._regularizer), ConvergenceWarning, stacklevel=4)
        if not run.converged and self.max_iter > 0:
            warnings.warn(NOT_CONVERGED, ConvergenceWarning, stacklevel=4)

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1, size=4))

    def _start(self, bound: Mixture, sample: Batch, random: np.random.Generator) -> MixtureParameters:
        """Return one start from a sample of the rows."""
        if self.init_params == "kmeans":
            return seed_parameters(bound, sample, random)
        if self.init_params == "random":
            shares = random.random((self.n_components, sample.n_events))
            return bound.initialize(sample, shares / shares.sum(axis=0))
        points = self._points(sample)
        weight = np.ones(sample.n_events) if sample.weight is None else sample.weight
        if self.init_params == "k-means++":
            shares = k_means_responsibilities(points, weight, self.n_components, random, n_iterations=1)
        else:
            few = sample.n_events < self.n_components
            chosen = random.choice(sample.n_events, self.n_components, replace=few, p=weight / weight.sum())
            shares = nearest(points, points[chosen])
        return bound.initialize(sample, shares)

    def _points(self, sample: Batch) -> Array:
        """Return points (B, F), near which samples belong to the one that was chosen for a component."""
        return points_for_k_means(sample)[0]

    def _given_start(self, bound: Mixture) -> MixtureParameters | None:
        """Return the start that the parameters state in full, if they do."""
        return None

    def _starts_from_data_alone(self) -> bool:
        return self.init_params == "kmeans"

    def _continued(self, model: Mixture) -> MixtureParameters:
        fitted = self._fitted()
        if not _same_shape(fitted.model, model):
            raise ValueError(
                "warm_start=True goes on from the fitted components, but they are others now: fitted was "
                f"{fitted.model}, asked for is {model}; set warm_start=False to start anew"
            )
        return fitted.parameters

    # Online learning.

    def partial_fit(self, X: Any, y: Any = None, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Learn from some more samples (online EM, Cappé & Moulines 2009).

        It goes on from whatever was fitted before: from `fit`, from earlier calls, or from parameters that
        were set or converted. A call that raises leaves the model as it was.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Any number of samples; NaN is a missing value.
        y : Ignored
            Not used, present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights >= 0 of the samples.

        Returns
        -------
        self : object
            The mixture.

        """
        self._validate_params()
        known = self._is_fitted()
        batch = self._read(X, reset=not known, learn=True)
        # Once something was learned, samples without any weight are no mistake: they add nothing.
        batch = _weighted(batch, weights_of(sample_weight, batch.values.T, none_will_do=known))
        if known:
            learner = self._current_learner()
        else:
            model = self._mixture(batch.schema)
            learner = self._make_learner(model, batch.schema, self._given_start(model.bind(batch.schema)))
        self._set_pace(learner)
        learner = self._learned(learner, batch)
        statistics = learner.statistics
        self._learner = learner
        self.converged_ = False
        self.n_iter_ = getattr(self, "n_iter_", 0) + 1 if known else 1
        self.lower_bound_ = self._mean_log_likelihood(statistics)
        self.lower_bounds_ = getattr(self, "lower_bounds_", []) if known else []
        self.n_samples_seen_ = learner.n_events
        self._publish(learner.parameters)
        ill = _ill_defined(learner.parameters)
        if ill.any():
            named = ", ".join(map(str, np.flatnonzero(ill)))
            warnings.warn(ILL_DEFINED.format(named, self._regularizer), ConvergenceWarning, stacklevel=2)
        self._warn_of_others(batch, 3)
        return self

    def _set_pace(self, learner: OnlineEM) -> None:
        if learner.schedule.half_life is not None:
            raise ValueError(
                "the mixture comes from a snapshot that forgets by event time, and samples have no time here: it can "
                "predict but not learn; go on with stream_em.load(path).update(events, time=...), or call fit"
            )
        schedule, batch_size = self._schedule(), int(self.batch_size)
        learner.warm_up = learner.first_m_step = self._rows(len(learner._known_schema()))
        # Setting either costs the learner its compiled state.
        if learner.schedule != schedule:
            learner.schedule = schedule
        if learner.batch_size != batch_size:
            learner.batch_size = batch_size

    def _mean_log_likelihood(self, statistics: Statistics | None) -> Any:
        if statistics is None:
            return -math.inf
        return np.asarray(statistics.log_likelihood / statistics.total_weight, dtype=self._dtype)[()]

    def _learned(self, learner: OnlineEM, batch: Batch) -> OnlineEM:
        """Return a learner that has learned the batch too: the same, or the one that follows its warm-up."""
        if not learner.warming_up or self._starts_from_data_alone():
            return learner.update(batch)
        told = np.ones(batch.n_events, dtype=bool) if batch.weight is None else batch.weight > 0.0
        # Through the event that ends the warm-up, which is the next one where `warm_up` was lowered meanwhile.
        room = int(np.searchsorted(np.cumsum(told), max(1, learner.warm_up_left))) + 1
        if batch.n_events < room:
            return learner.update(batch)
        seen = concatenate([*learner._buffer, batch.select(slice(0, room))])
        bound = learner.model.bind(batch.schema)
        start = self._start(bound, _distinct(_with_weight(seen)), self._generator())
        follower = self._make_learner(learner.model, batch.schema, start)
        follower.resume(bound.e_step(start, seen), seen.n_events)
        return follower.update(batch.select(slice(room, None)))

    def _current_learner(self) -> OnlineEM:
        learner: OnlineEM | None = getattr(self, "_learner", None)
        if learner is not None and not self._is_published(learner.parameters):
            learner = None
        fitted = self._fitted() if learner is None else learner
        described = self._described(fitted)
        same = _same_shape(fitted.model, described) if learner is None else learner.model == described
        if not same:
            raise ValueError(
                "partial_fit and snapshots go on with the mixture that was fitted, but parameters that describe it "
                f"were changed since: it was {fitted.model}, it is {described}; call fit, or set them back"
            )
        if learner is not None:
            return learner
        start, total = fitted.parameters, fitted.parameters.weights.sum()
        if not math.isclose(total, 1.0, rel_tol=1e-9):
            # Rounded to float32, for instance.
            start = replace(start, weights=start.weights / total)
        return self._make_learner(described, fitted._known_schema(), start)

    def _rows(self, n_fields: int) -> int:
        """Return the samples that it takes to tell components apart."""
        return self.n_components * max(20, 5 * n_fields) if self.warm_up is None else int(self.warm_up)

    def _make_learner(self, model: Mixture, schema: Schema, start: MixtureParameters | None) -> OnlineEM:
        rows = self._rows(len(schema))
        return OnlineEM(
            model,
            schedule=self._schedule(),
            schema=schema,
            batch_size=int(self.batch_size),
            warm_up=rows,
            first_m_step=rows,
            initial_parameters=start,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
        )

    def _schedule(self) -> Schedule:
        if self.step_size == "harmonic":
            return Harmonic()
        if self.step_size == "robbins-monro":
            return RobbinsMonro(float(self.step_exponent), float(self.step_offset))
        return Constant(float(self.step_size))

    # Sharing the work.

    def fork(self) -> Self:
        """Return an estimator with these components that has learned nothing yet, for a share of the samples.

        Forks go to other threads, processes or machines, learn by `partial_fit`, and come back by `merge`.

        Returns
        -------
        fork : object
            A mixture of the same class and parameters.

        """
        check_is_fitted(self)
        fork = self._twin(self._current_learner().fork())
        fork.n_iter_ = 0
        fork.n_samples_seen_ = 0
        return fork

    def merge(self, other: Self) -> Self:
        """Return a mixture that has learned what both have; neither is changed.

        Statistics of different shares of the samples add up, so where `step_size="harmonic"` the result is
        that of one mixture that has learned all the shares.

        Merge each fork once: a mixture does not know which forks it holds already, and counts the samples of one
        that comes again, or of another copy of it, a second time.

        Parameters
        ----------
        other : object
            A fork of this mixture, another fork of the same, or the mixture both were forked from.

        Returns
        -------
        merged : object
            A mixture of the same class and parameters.

        Raises
        ------
        MergeError
            When the two do not descend from one start: their components do not correspond then. When fitted
            attributes of either were set: what it has learned is of other components.

        """
        check_is_fitted(self)
        if type(other) is not type(self):
            hint = ""
            if isinstance(other, sklearn.mixture.GaussianMixture):
                hint = "; GaussianMixture.from_sklearn takes over its components, but not the samples behind them"
            raise MergeError(f"a {class_of(self)} cannot be merged with a {class_of(other)}{hint}")
        check_is_fitted(other)
        mine, theirs = getattr(self, "_learner", None), getattr(other, "_learner", None)
        if mine is None or theirs is None:
            raise MergeError("only mixtures that have learned can be merged: parameters alone say nothing of samples")
        for place, one, learner in (("first", self, mine), ("second", other, theirs)):
            if not one._is_published(learner.parameters):
                raise MergeError(
                    f"fitted attributes of the {place} mixture were set since it learned, so that what it has learned "
                    "is of other components; fork it as it is now, and merge forks of it"
                )
        merged = self._twin(mine.merge(theirs))
        merged.lower_bound_ = self._mean_log_likelihood(merged._learner.statistics)
        merged.n_iter_ = self.n_iter_ + other.n_iter_
        return merged

    def _twin(self, learner: OnlineEM) -> Self:
        """Return an estimator of the same parameters and columns in the state of `learner`."""
        twin: Self = clone(self)
        for name in ("n_features_in_", "feature_names_in_", "_dtype", "_from_frame", "_inferred", "_overflowed"):
            if hasattr(self, name):
                setattr(twin, name, getattr(self, name))
        twin._learner = learner
        twin.converged_ = False
        twin.lower_bound_ = -math.inf
        twin.lower_bounds_ = []
        twin.n_samples_seen_ = learner.n_events
        twin._publish(learner.parameters)
        return twin

    # Snapshots.

    @classmethod
    @abstractmethod
    def _described_by(cls, learner: OnlineEM) -> dict[str, Any]:
        """Return the parameters that describe the mixture of a learner."""

    # The estimator whose parameters are kept in a snapshot, also those of a class derived from it.
    _snapshot_class: ClassVar[str]

    @classmethod
    def _check_params(cls, known: dict[str, Any], params: dict[str, Any], source: str) -> None:
        """Refuse parameters that the snapshot's would make mean nothing."""

    @classmethod
    def _suited(cls, learner: OnlineEM, source: str) -> OnlineEM:
        """Return the learner as the estimator can hold it."""
        return learner

    def _plain_params(self) -> dict[str, Any]:
        """Return the parameters as plain data; a generator of random numbers is none."""
        params: dict[str, Any] = self.get_params(deep=False)
        if not isinstance(self.random_state, Integral):
            params["random_state"] = None
        return params

    @classmethod
    def _params_from_plain(cls, plain: dict[str, Any]) -> dict[str, Any]:
        return plain

    def _kept(self) -> dict[str, Any]:
        """Return, as plain data, what a snapshot of the learner does not hold."""
        attributes = {name: getattr(self, name) for name in KEPT if hasattr(self, name)}
        if not math.isfinite(attributes.get("lower_bound_", 0.0)):
            del attributes["lower_bound_"]
        return {
            "class": self._snapshot_class,
            "params": self._plain_params(),
            "attributes": attributes,
            "dtype": np.dtype(self._dtype).name,
            "named": hasattr(self, "feature_names_in_"),
        }

    def _adopt(self, learner: OnlineEM, kept: dict[str, Any]) -> None:
        """Take the state of a learner, and what `_kept` returned."""
        names = learner._known_schema().names
        self._learner = learner
        self._dtype = dtype = np.dtype(kept.get("dtype", "float64"))
        self.n_features_in_ = len(names)
        if kept.get("named", names != default_names(len(names))):
            self.feature_names_in_ = np.array(names, dtype=object)
        attributes = {"lower_bound_": -math.inf, **kept["attributes"]}
        for name in KEPT:
            if name in attributes:
                setattr(self, name, attributes[name])
        self.lower_bound_ = dtype.type(self.lower_bound_)
        self.lower_bounds_ = list(np.array(self.lower_bounds_, dtype=dtype))
        self._publish(learner.parameters)

    def to_learner(self) -> OnlineEM:
        """Return a copy of the learner, with its parameters and statistics; it goes on from here on its own.

        Returns
        -------
        learner : stream_em.OnlineEM
            Its components come in the order of the labels. Where fitted attributes were set or converted it has learned
            nothing yet, as `partial_fit` goes on then.

        Raises
        ------
        ValueError
            When parameters that describe the mixture were changed since the fit.

        """
        check_is_fitted(self)
        return deepcopy(self._current_learner())

    def to_snapshot(self, path: str | Path) -> None:
        """Write what was learned to a snapshot file, which `stream_em.load`, River's estimators and the command read.

        Parameters
        ----------
        path : str or Path
            The file; an existing one is replaced, all or nothing. It holds data and no code, so a `random_state` that
            is a generator is left out.

        Raises
        ------
        ValueError
            When parameters that describe the mixture were changed since the fit.

        """
        check_is_fitted(self)
        save(self._current_learner(), path, metadata={METADATA_KEY: self._kept()})

    @classmethod
    def from_snapshot(cls, path: str | Path, **params: Any) -> Self:
        """Return the mixture that a snapshot holds, for instance one of `stream-em run` or of River's estimators.

        Parameters
        ----------
        path : str or Path
            The snapshot file.
        **params
            Parameters to go on with, such as `step_size`; those that describe the mixture are the snapshot's.

        Returns
        -------
        mixture : object
            It predicts as what was saved, and `partial_fit` goes on as that would have. One from elsewhere that forgets
            by event time only predicts. Labels are positions of components, not ids that another numbering gave them.

        Raises
        ------
        ValueError
            When the class cannot hold the mixture, or a parameter is another than that of the snapshot.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from stream_em.sklearn import GaussianMixture
        >>> gm = GaussianMixture().fit(np.array([[1.0], [3.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gm.to_snapshot(f"{folder}/model.arrow")
        ...     again = GaussianMixture.from_snapshot(f"{folder}/model.arrow")
        >>> again.means_
        array([[2.]])

        """
        content = Path(path).read_bytes()
        found = from_bytes(content, source=str(path))
        learner = found.to_online() if isinstance(found, BatchEM) else found
        if learner.warming_up and not learner._buffer:
            raise ValueError(f"{path}: the snapshot holds a learner that has seen no event yet, which is no mixture")
        learner = cls._suited(learner, str(path))
        kept = metadata_from_bytes(content, source=str(path)).get(METADATA_KEY)
        if isinstance(kept, dict) and kept.get("class") == cls._snapshot_class:
            check_kept(kept, cls._get_param_names(), str(path))
            known = cls._params_from_plain(kept["params"])
        else:
            known = {**cls._described_by(learner), **pace_of(learner)}
            attributes = {
                "converged_": isinstance(found, BatchEM) and found.converged,
                "n_iter_": len(found.history) if isinstance(found, BatchEM) else 0,
                "lower_bounds_": [],
                "n_samples_seen_": learner.n_events,
            }
            statistics = learner.statistics
            if statistics is not None:
                attributes["lower_bound_"] = statistics.log_likelihood / statistics.total_weight
            kept = {"attributes": attributes}
        cls._check_params(known, params, str(path))
        mixture = cls(**{**known, **params})
        mixture._validate_params()
        mixture._adopt(learner, kept)
        described = mixture._described(learner)
        if described != learner.model:
            raise ValueError(
                f"{path}: the snapshot holds {learner.model}, and {params} would make it {described}; leave out what "
                "describes the mixture, or fit anew"
            )
        return mixture

    # Prediction.

    def _is_fitted(self) -> bool:
        return hasattr(self, "weights_")

    def _posteriors(self, batch: Batch) -> Iterator[tuple[slice, Posterior]]:
        fitted = self._fitted()
        bound, parameters = fitted._bound_model(), fitted.parameters
        for start in range(0, batch.n_events, CHUNK_ROWS):
            span = slice(start, min(start + CHUNK_ROWS, batch.n_events))
            values = np.asarray(batch.values[:, span], dtype=np.float64)
            yield span, bound.posterior(parameters, Batch(values, batch.schema))

    def _labels(self, batch: Batch) -> npt.NDArray[np.int64]:
        labels = np.empty(batch.n_events, dtype=np.int64)
        for span, posterior in self._posteriors(batch):
            labels[span] = np.argmax(posterior.responsibilities, axis=0)
        return labels

    def score_samples(self, X: Any) -> Array:
        """Compute the log-likelihood of each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples; a missing value is marginalised.

        Returns
        -------
        log_prob : ndarray of shape (n_samples,)
            Log-likelihood of each sample; its negative is an anomaly score.

        """
        check_is_fitted(self)
        batch = self._read(X, reset=False, learn=False)
        log_prob = np.empty(batch.n_events, dtype=self._result_type(batch.values))
        for span, posterior in self._posteriors(batch):
            log_prob[span] = posterior.log_prob
        return log_prob

    def score(self, X: Any, y: Any = None, sample_weight: npt.ArrayLike | None = None) -> float:
        """Compute the mean log-likelihood of the samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.
        y : Ignored
            Not used, present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples in the mean.

        Returns
        -------
        log_likelihood : float
            Mean log-likelihood of a sample.

        """
        log_prob = self.score_samples(X).astype(np.float64, copy=False)
        return float(np.average(log_prob, weights=weights_of(sample_weight, log_prob)))

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """Predict the labels of the samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.

        Returns
        -------
        labels : ndarray of shape (n_samples,)
            Index of the component most responsible for each sample.

        """
        check_is_fitted(self)
        return self._labels(self._read(X, reset=False, learn=False))

    def predict_proba(self, X: Any) -> Array:
        """Compute the probability of each component given each sample.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.

        Returns
        -------
        responsibilities : ndarray of shape (n_samples, n_components)
            Probabilities; the rows sum to 1.

        """
        check_is_fitted(self)
        batch = self._read(X, reset=False, learn=False)
        shape = (self._fitted().parameters.n_components, batch.n_events)
        responsibilities = np.empty(shape, dtype=self._result_type(batch.values))
        for span, posterior in self._posteriors(batch):
            responsibilities[:, span] = posterior.responsibilities
        return responsibilities.T

    def bic(self, X: Any, sample_weight: npt.ArrayLike | None = None) -> float:
        """Bayesian information criterion on the samples (Schwarz 1978); the lower the better.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples; their sum takes the place of their number.

        Returns
        -------
        bic : float
            The criterion.

        """
        return self.criteria(X, sample_weight).bic

    def aic(self, X: Any, sample_weight: npt.ArrayLike | None = None) -> float:
        """Akaike's information criterion on the samples (Akaike 1974); the lower the better.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples.

        Returns
        -------
        aic : float
            The criterion.

        """
        return self.criteria(X, sample_weight).aic

    def icl(self, X: Any, sample_weight: npt.ArrayLike | None = None) -> float:
        """Integrated completed likelihood on the samples; the lower the better.

        It is BIC plus twice the entropy of the soft clusters, so that components which overlap cost more
        (Biernacki, Celeux & Govaert 2000).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples; their sum takes the place of their number.

        Returns
        -------
        icl : float
            The criterion.

        """
        return self.criteria(X, sample_weight).icl

    def criteria(self, X: Any, sample_weight: npt.ArrayLike | None = None) -> Criteria:
        """Compute all the information criteria on the samples in one go.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The samples.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples; their sum takes the place of their number.

        Returns
        -------
        criteria : Criteria
            `log_likelihood`, `n_parameters`, `bic`, `aic` and `icl`.

        """
        check_is_fitted(self)
        batch = self._read(X, reset=False, learn=False)
        weights = weights_of(sample_weight, batch.values.T)
        weights = np.ones(batch.n_events) if weights is None else weights
        log_likelihood = entropy = 0.0
        for span, posterior in self._posteriors(batch):
            shares = posterior.responsibilities
            log_likelihood += float(posterior.log_prob @ weights[span])
            entropy -= float(np.add.reduce(shares * np.log(np.maximum(shares, 1e-300)), axis=0) @ weights[span])
        n_parameters = self._fitted().n_parameters()
        bic = -2.0 * log_likelihood + n_parameters * math.log(weights.sum())
        aic = -2.0 * log_likelihood + 2.0 * n_parameters
        return Criteria(log_likelihood, n_parameters, bic, aic, bic + 2.0 * entropy)


def check_listed(features: Any) -> None:
    """Raise an error that says what is wrong unless `features` is a list of one feature or more.

    Raises
    ------
    TypeError
        When it is a single feature.
    ValueError
        When it is empty.

    """
    if isinstance(features, str) or not hasattr(features, "__len__"):
        raise TypeError(f"features must be a sequence of features, such as [{features!r}], got {features!r}")
    if len(features) == 0:
        raise ValueError("features is empty: name at least one feature to keep")


def check_given(given: Any) -> None:
    """Raise an error that says what is wrong unless `given` maps features to values.

    Raises
    ------
    TypeError
        When it is no mapping.

    """
    if not hasattr(given, "items"):
        raise TypeError(f"given must map features to their values, such as {{0: 1.5}}, got {reprlib.repr(given)}")


def class_of(estimator: Any) -> str:
    """Return the class of an object with the public module that it comes from."""
    return f"{type(estimator).__module__.split('._')[0]}.{type(estimator).__name__}"


def weights_of(sample_weight: npt.ArrayLike | None, X: Any, *, none_will_do: bool = False) -> Array | None:
    """Return checked sample weights, in scikit-learn's words where they are wrong."""
    if sample_weight is None:
        return None
    nothing = none_will_do and not np.any(sample_weight)
    given = np.ones(np.shape(sample_weight)) if nothing else sample_weight
    weights: Array = _check_sample_weight(given, X, dtype=np.float64, ensure_non_negative=True)
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return np.zeros_like(weights) if nothing else weights


def _weighted(batch: Batch, weights: Array | None) -> Batch:
    """Return the batch with its weights, which must be numbers the engine can add up."""
    return batch if weights is None else batch.schema.encode(batch, weights)


def _with_weight(batch: Batch) -> Batch:
    """Return the events whose weight is not 0."""
    if batch.weight is None or batch.weight.all():
        return batch
    return batch.select(np.flatnonzero(batch.weight))


def _distinct(batch: Batch) -> Batch:
    """Return the different events, in an order of their own, each with the weight of all its copies.

    So a start depends neither on the order of the events nor on whether a weight or copies count them.
    """
    keys = np.where(np.isnan(batch.values), np.inf, batch.values)
    order = np.lexsort(keys)
    keys = keys[:, order]
    first = np.ones(batch.n_events, dtype=bool)
    first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    if first.all() and batch.weight is None:
        return batch.select(order)
    weight = np.ones(batch.n_events) if batch.weight is None else batch.weight[order]
    starts = np.flatnonzero(first)
    return Batch(batch.values[:, order[starts]], batch.schema, np.add.reduceat(weight, starts))


def _sampled(batch: Batch, n_events: int, random: np.random.Generator) -> Batch:
    if batch.n_events <= n_events:
        return batch
    reservoir = Reservoir(n_events, random)
    reservoir.add(batch)
    return reservoir.sample()


def nearest(points: Array, centers: Array) -> Array:
    """Return hard responsibilities (K, B) of the nearest centers."""
    distance = np.stack([((points - center) ** 2).sum(axis=1) for center in centers])
    shares: Array = (np.arange(len(centers))[:, None] == distance.argmin(axis=0)).astype(np.float64)
    return shares


def _same_shape(one: Mixture, other: Mixture) -> bool:
    """Return whether parameters of one mixture are parameters of the other."""
    if one.n_components != other.n_components or type(one.family) is not type(other.family):
        return False
    if isinstance(one.family, Gaussian) and isinstance(other.family, Gaussian):
        return one.family.covariance_type == other.family.covariance_type
    return one.family == other.family


def _ill_defined(parameters: MixtureParameters) -> npt.NDArray[np.bool_]:
    components = parameters.components
    if isinstance(components, GaussianParameters):
        return components.ill_defined
    return np.zeros(parameters.n_components, dtype=bool)
