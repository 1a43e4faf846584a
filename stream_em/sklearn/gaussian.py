"""Gaussian mixtures as scikit-learn has them, that stream, weigh and tolerate gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import sklearn.mixture
from scipy.linalg.lapack import dtrtri
from sklearn.base import clone
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from stream_em.families import Gaussian
from stream_em.families.gaussian import CovarianceType, GaussianParameters
from stream_em.learners import FittedMixture, Iteration, OnlineEM
from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import LARGEST_VALUE, Array, cholesky, is_plain
from stream_em.schema import Batch, Field, Schema
from stream_em.sklearn.base import BaseMixture, check_given, check_listed, nearest
from stream_em.sklearn.snapshots import default_names, over_one_gaussian

# scikit-learn has no prior: this one only keeps a component without any event defined.
PRIOR_WEIGHT = 1e-25

# Beside samples of this weight altogether the prior is lost in rounding.
LEAST_TOTAL_WEIGHT = 1e-9

# A weight of 0 is allowed; its logarithm must be a number.
SMALLEST_WEIGHT = 1e-300

FITTED = ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_features_in_", "feature_names_in_")
ARRAYS = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")


class GaussianMixture(BaseMixture):
    """Gaussian mixture, a drop-in for scikit-learn's that streams, weighs and tolerates missing values.

    Parameters, fitted attributes and methods are those of `sklearn.mixture.GaussianMixture`, and from the same
    initial parameters so are the answers. `partial_fit`, `sample_weight`, NaN as a missing value, `merge`,
    `marginal` and `conditional` are what its structure cannot offer.

    Parameters
    ----------
    n_components : int, default=1
        The number of mixture components.
    covariance_type : {'full', 'tied', 'diag', 'spherical'}, default='full'
        'full': each component has its own general covariance matrix; 'tied': all components share one;
        'diag': each component has its own diagonal covariance matrix; 'spherical': each has a single variance.
    tol : float, default=1e-3
        EM stops when the mean log-likelihood of a sample changes by less.
    reg_covar : float, default=1e-6
        Non-negative regularization added to the diagonal of the covariances, in squared units of the features.
    max_iter : int, default=100
        The most EM iterations to perform.
    n_init : int, default=1
        The number of initializations to perform; the best is kept. On more than 10,000 samples they compete
        over a random sample of that size and only the best goes on to all samples.
    init_params : {'kmeans', 'k-means++', 'random', 'random_from_data'}, default='kmeans'
        How the first components are found, on a random sample of the samples where there are many:

        - 'kmeans': k-means++ and k-means, in turn on whitened and on standardised samples, so that clusters
          stretched along one axis are found too; the best of eight after ten EM iterations.
        - 'k-means++': samples spread out by k-means++, each with the samples that are nearest to it in the units
          of the data: where scikit-learn's first iteration leads.
        - 'random': responsibilities at random.
        - 'random_from_data': samples chosen at random, each with the samples nearest to it in the same way.
    weights_init : array-like of shape (n_components,), default=None
        Initial weights, which take the place of those found by `init_params`.
    means_init : array-like of shape (n_components, n_features), default=None
        Initial means. Weights and covariances that are not given are those of the samples nearest to each.
    precisions_init : array-like, default=None
        Initial precisions (inverse covariances), of the shape of `precisions_`.
    random_state : int, RandomState instance or None, default=None
        Seed of the initialization and of `sample`.
    warm_start : bool, default=False
        Whether `fit` goes on from the fitted components, whichever way they were fitted. `n_iter_` and
        `lower_bounds_` are those of the last call; the number of components, the covariance type and the
        features must be the same as before.
    verbose : int, default=0
        1 shows a progress bar with the lower bound (it needs rich), 2 also its change and the time taken.
    verbose_interval : int, default=10
        Iterations between updates of what the bar says.
    step_size : {'robbins-monro', 'harmonic'} or float in (0, 1), default='robbins-monro'
        How `partial_fit` weighs a mini-batch against the past: 'robbins-monro' is (t + step_offset) **
        -step_exponent at mini-batch t, and forgets slowly; 'harmonic' is 1 / t, so that all samples count the
        same; a number forgets all but the last 1 / step_size mini-batches.
    step_exponent : float in (0.5, 1], default=0.6
        Exponent of 'robbins-monro'.
    step_offset : float, default=0.0
        Mini-batches added to the count by 'robbins-monro', >= 0.
    batch_size : int, default=1000
        Samples in a mini-batch of `partial_fit`. More samples at once are taken in pieces of this size, fewer
        count as a fraction of a step.
    warm_up : int, default=None
        Samples that `partial_fit` gathers before it first tells components apart; by default 20 for each
        component, and no fewer than five times the features for each.
    n_jobs : int, default=None
        Threads that share the samples in `fit`; None is 1, -1 is all processors.

    Attributes
    ----------
    weights_ : ndarray of shape (n_components,)
        The weight of each component.
    means_ : ndarray of shape (n_components, n_features)
        The mean of each component.
    covariances_ : ndarray
        The covariances: (n_components,) if 'spherical', (n_features, n_features) if 'tied', (n_components,
        n_features) if 'diag', (n_components, n_features, n_features) if 'full'.
    precisions_ : ndarray
        The inverses of the covariances, of the same shape.
    precisions_cholesky_ : ndarray
        The upper Cholesky factors of the precisions, of the same shape.
    converged_ : bool
        Whether the best run of `fit` converged; False after `partial_fit`.
    n_iter_ : int
        Iterations of the best run of `fit`, and calls of `partial_fit` after it.
    lower_bound_ : float
        Mean log-likelihood of a sample under the parameters before the last M-step; after `partial_fit` the
        mean over what is remembered, each sample under the parameters before it was learned.
    lower_bounds_ : list of float
        The lower bound at each iteration of the best run of `fit`.
    n_samples_seen_ : int
        Samples with weight that the last fit learned, and those of `partial_fit` since.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where `X` has names that are all strings.

    See Also
    --------
    MixtureModel : The same over other families and over frames of mixed types.
    select_components : Choose the number of components and the covariance type.

    Notes
    -----
    A component whose covariance is ill-defined (a single sample, copies of one, collinear features) is shrunk to
    the pooled variances, with a `ConvergenceWarning` that names it, where scikit-learn gives up. Samples of type
    float32 are computed in float64, and the attributes and predictions are float32.

    What is predicted follows from `weights_`, `means_` and `covariances_` (or, without these,
    `precisions_cholesky_`), so a mixture may also be set up by setting them; `partial_fit` and warm starts go on
    from what was set.

    References
    ----------
    Dempster, Laird & Rubin (1977); Cappé & Moulines (2009) for `partial_fit`; Ghahramani & Jordan (1994) for
    missing values.

    Examples
    --------
    >>> import numpy as np
    >>> from stream_em.sklearn import GaussianMixture
    >>> X = np.array([[1, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
    >>> gm = GaussianMixture(n_components=2, random_state=0).fit(X)
    >>> gm.means_[np.argsort(gm.means_[:, 0])].round(6)
    array([[ 1.,  2.],
           [10.,  2.]])
    >>> bool(gm.predict([[0, 0]])[0] != gm.predict([[12, np.nan]])[0])
    True

    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseMixture._parameter_constraints,
        "reg_covar": [Interval(Real, 0.0, None, closed="left")],
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", None],
    }
    _regularizer = "reg_covar"

    means_: npt.NDArray[Any]

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: CovarianceType = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: Literal["kmeans", "k-means++", "random", "random_from_data"] = "kmeans",
        weights_init: npt.ArrayLike | None = None,
        means_init: npt.ArrayLike | None = None,
        precisions_init: npt.ArrayLike | None = None,
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
        step_size: Literal["robbins-monro", "harmonic"] | float = "robbins-monro",
        step_exponent: float = 0.6,
        step_offset: float = 0.0,
        batch_size: int = 1000,
        warm_up: int | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type: CovarianceType = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval
        self.step_size = step_size
        self.step_exponent = step_exponent
        self.step_offset = step_offset
        self.batch_size = batch_size
        self.warm_up = warm_up
        self.n_jobs = n_jobs

    def _read(self, X: Any, *, reset: bool, learn: bool, least: int = 1) -> Batch:
        try:
            matrix: npt.NDArray[Any] = validate_data(
                self,
                X,
                reset=reset,
                dtype=[np.float64, np.float32],
                ensure_all_finite="allow-nan",
                ensure_min_samples=least,
            )
        except ValueError as error:
            if "could not convert string to float" not in str(error):
                raise
            raise ValueError(f"{error}; stream_em.sklearn.MixtureModel takes frames with columns of strings") from error
        n_features = matrix.shape[1]
        if not reset and hasattr(self, "means_") and self.means_.shape[1] != n_features:
            raise ValueError(
                f"X has {n_features} features, but {type(self).__name__} is expecting {self.means_.shape[1]} features "
                "as input."
            )
        values = matrix.T
        if learn:
            if reset:
                self._dtype = matrix.dtype
            values = values.astype(np.float64, copy=False)
        self._check_magnitude(matrix)
        return Batch(values, self._schema(n_features))

    def _check_magnitude(self, matrix: npt.NDArray[Any]) -> None:
        if is_plain(matrix):
            return
        largest = np.fmax.reduce(np.abs(matrix), axis=0)
        for name, magnitude in zip(self._names(matrix.shape[1]), largest.tolist()):
            if magnitude > LARGEST_VALUE:
                raise ValueError(
                    f"Input X contains {magnitude:g} in feature {name!r}: values beyond {LARGEST_VALUE:g} cannot be "
                    "squared and summed in double precision; scale the feature."
                )

    def _names(self, n_features: int) -> list[str]:
        names = getattr(self, "feature_names_in_", None)
        return [*default_names(n_features)] if names is None else [str(name) for name in names]

    def _schema(self, n_features: int) -> Schema:
        return Schema([Field(name, "numeric") for name in self._names(n_features)])

    def _mixture(self, schema: Schema) -> Mixture:
        family = Gaussian(self.covariance_type, float(self.reg_covar))
        return Mixture(family, int(self.n_components), prior_weight=PRIOR_WEIGHT)

    def _described(self, fitted: FittedMixture) -> Mixture:
        # The prior of a snapshot from elsewhere stays, but is no parameter.
        return replace(super()._described(fitted), prior_weight=fitted.model.prior_weight)

    _snapshot_class = "GaussianMixture"

    @classmethod
    def _suited(cls, learner: OnlineEM, source: str) -> OnlineEM:
        return over_one_gaussian(learner, source)

    @classmethod
    def _described_by(cls, learner: OnlineEM) -> dict[str, Any]:
        family = learner.model.family
        assert isinstance(family, Gaussian)
        return {
            "n_components": learner.model.n_components,
            "covariance_type": family.covariance_type,
            "reg_covar": family.reg_covar,
        }

    def _plain_params(self) -> dict[str, Any]:
        params = super()._plain_params()
        given = {name: params[name] for name in ("weights_init", "means_init", "precisions_init")}
        return {**params, **{name: np.asarray(one).tolist() for name, one in given.items() if one is not None}}

    def _bound(self, iteration: Iteration) -> float:
        return iteration.statistics.log_likelihood / iteration.statistics.total_weight

    def _unit_of_weight(self, batch: Batch) -> float:
        if batch.weight is None:
            return 1.0
        # About the mean, for the prior to be next to nothing whatever the weights; a power of two rounds nothing.
        return math.ldexp(1.0, math.frexp(batch.total_weight / batch.n_events)[1] - 1)

    def _learned(self, learner: OnlineEM, batch: Batch) -> OnlineEM:
        remembered = sum(one.total_weight for one in learner._buffer)
        if learner.statistics is not None:
            remembered += learner.statistics.total_weight
        total = remembered + batch.total_weight
        if 0.0 < total < LEAST_TOTAL_WEIGHT:
            raise ValueError(
                f"the sample weights add up to {total:g} with those that are remembered, and partial_fit needs at "
                f"least {LEAST_TOTAL_WEIGHT:g}; multiply all weights by one factor, which changes nothing else"
            )
        return super()._learned(learner, batch)

    def _result_type(self, X: Any) -> npt.DTypeLike:
        return np.result_type(X.dtype, self.means_.dtype)

    def _fitted(self) -> FittedMixture:
        weights = np.maximum(np.asarray(self.weights_, dtype=np.float64), SMALLEST_WEIGHT)
        means = np.ascontiguousarray(self.means_, dtype=np.float64)
        if hasattr(self, "covariances_"):
            covariances = np.ascontiguousarray(self.covariances_, dtype=np.float64)
        else:
            covariances = _inverted(np.asarray(self.precisions_cholesky_, dtype=np.float64), self._fitted_type())
        parameters = MixtureParameters(
            weights, GaussianParameters(means, covariances), np.arange(len(weights), dtype=np.int64)
        )
        schema = self._schema(means.shape[1])
        family = Gaussian(self._fitted_type())
        return FittedMixture(Mixture(family, len(weights), PRIOR_WEIGHT), parameters, schema)

    def _fitted_type(self) -> CovarianceType:
        """Return the type of the fitted covariances, which the parameter may no longer be."""
        family = self._learner.model.family if hasattr(self, "_learner") else None
        return family.covariance_type if isinstance(family, Gaussian) else self.covariance_type

    def _is_published(self, parameters: MixtureParameters) -> bool:
        components = parameters.components
        made = (parameters.weights, components.mean, components.covariance)
        return all(
            hasattr(self, name) and np.array_equal(array.astype(self._dtype), getattr(self, name))
            for array, name in zip(made, ("weights_", "means_", "covariances_"))
        )

    def _publish(self, parameters: MixtureParameters) -> None:
        dtype, covariance_type = self._dtype, self._fitted_type()
        components = parameters.components
        factors = _precision_factors(components, covariance_type)
        self.weights_ = parameters.weights.astype(dtype)
        self.means_ = components.mean.astype(dtype)
        self.covariances_ = components.covariance.astype(dtype)
        self.precisions_cholesky_ = factors.astype(dtype)
        if covariance_type in ("full", "tied"):
            self.precisions_ = np.matmul(factors, factors.swapaxes(-1, -2)).astype(dtype)
        else:
            self.precisions_ = (factors**2).astype(dtype)

    def _given_start(self, bound: Mixture) -> MixtureParameters | None:
        assert bound.schema is not None
        weights, means, covariances = self._given(len(bound.schema))
        if weights is None or means is None or covariances is None:
            return None
        return self._complete(bound, weights, means, covariances)

    def _start(self, bound: Mixture, sample: Batch, random: np.random.Generator) -> MixtureParameters:
        weights, means, covariances = self._given(len(sample.schema))
        if means is None:
            found = super()._start(bound, sample, random)
        else:
            points = self._points(sample)
            spread = points.std(axis=0)
            unit = np.where(spread > 0.0, spread, 1.0)
            found = bound.initialize(sample, nearest(points / unit, (means - sample.center) / unit))
        return self._complete(
            bound,
            found.weights if weights is None else weights,
            found.components.mean if means is None else means,
            found.components.covariance if covariances is None else covariances,
        )

    def _points(self, sample: Batch) -> Array:
        # In the units of the data, as scikit-learn's components of one sample attract the others in its first E-step.
        return np.where(np.isnan(sample.values), 0.0, sample.values - sample.center[:, None]).T

    def _starts_from_data_alone(self) -> bool:
        given = (self.weights_init, self.means_init, self.precisions_init)
        return super()._starts_from_data_alone() and all(one is None for one in given)

    def _complete(self, bound: Mixture, weights: Array, means: Array, covariances: Array) -> MixtureParameters:
        ids = np.arange(bound.n_components, dtype=np.int64)
        return MixtureParameters(np.maximum(weights, SMALLEST_WEIGHT), GaussianParameters(means, covariances), ids)

    def _given(self, n_features: int) -> tuple[Array | None, Array | None, Array | None]:
        """Return the initial weights, means and covariances, each as far as they are given, checked."""
        weights = means = covariances = None
        if self.weights_init is not None:
            weights = _check_weights(self.weights_init, self.n_components)
        if self.means_init is not None:
            means = _check_shape(self.means_init, (self.n_components, n_features), "means")
        if self.precisions_init is not None:
            covariances = _covariances_of(self.precisions_init, self.covariance_type, self.n_components, n_features)
        return weights, means, covariances

    def sample(self, n_samples: int = 1) -> tuple[Array, npt.NDArray[np.int64]]:
        """Generate random samples, those that scikit-learn's mixture with these attributes would generate.

        Parameters
        ----------
        n_samples : int, default=1
            Number of samples.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            The samples, ordered by component.
        y : ndarray of shape (n_samples,)
            Component labels.

        """
        check_is_fitted(self)
        drawn: tuple[Array, npt.NDArray[np.int64]] = self.to_sklearn().sample(n_samples)
        return drawn

    def marginal(self, features: Sequence[str | int]) -> Self:
        """Return the mixture over some of the features.

        Parameters
        ----------
        features : sequence of str or int
            Names or positions of the features, in the order that the result is to have.

        Returns
        -------
        marginal : GaussianMixture
            A fitted mixture over these features. It has learned no samples of its own.

        Raises
        ------
        TypeError
            When `features` is a single feature, or one of them is no name or position.
        ValueError
            When a feature is unknown, or none is named.

        Examples
        --------
        >>> import numpy as np
        >>> from stream_em.sklearn import GaussianMixture
        >>> X = np.random.default_rng(0).normal(size=(50, 3))
        >>> GaussianMixture().fit(X).marginal([2, 0]).means_.shape
        (1, 2)

        """
        check_is_fitted(self)
        check_listed(features)
        fitted = self._fitted()
        return self._over(fitted.marginal([self._name(fitted, feature) for feature in features]))

    def conditional(self, given: Mapping[str, float] | Mapping[int, float]) -> Self:
        """Return the mixture over the other features given the values of some.

        Parameters
        ----------
        given : mapping of str or int to float
            Values by name or position of the feature.

        Returns
        -------
        conditional : GaussianMixture
            A fitted mixture over the remaining features, in their order: `means_` weighed by `weights_` is the
            regression of those features on the given ones.

        Raises
        ------
        TypeError
            When `given` is no mapping, or a feature is no name or position.
        ValueError
            When a feature is unknown or given more than once, a value is no finite number, or no feature is left.

        Examples
        --------
        >>> import numpy as np
        >>> from stream_em.sklearn import GaussianMixture
        >>> x = np.random.default_rng(0).normal(size=200)
        >>> line = GaussianMixture().fit(np.column_stack([x, 2.0 * x + 1.0]))
        >>> line.conditional({0: 3.0}).means_.round(3)
        array([[7.]])

        """
        check_is_fitted(self)
        check_given(given)
        fitted = self._fitted()
        values: dict[str, float] = {}
        for key, value in given.items():
            name = self._name(fitted, key)
            if name in values:
                raise ValueError(f"feature {name!r} is given more than once: name it, or give its position, not both")
            try:
                values[name] = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"the given value of {name!r} must be a finite number, got {value!r}") from None
        return self._over(fitted.conditional(values))

    def _name(self, fitted: FittedMixture, feature: Any) -> str:
        names = fitted._known_schema().names
        if isinstance(feature, str):
            if feature not in names:
                raise ValueError(f"there is no feature {feature!r}; the features are {', '.join(map(repr, names))}")
            return feature
        # A mask of booleans would be taken for positions.
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer):
            raise TypeError(f"features are given by name or by position, got {feature!r}")
        if not -len(names) <= feature < len(names):
            raise ValueError(f"there is no feature {feature}: the mixture has {len(names)} features")
        return names[feature]

    def _over(self, fitted: FittedMixture) -> Self:
        """Return an estimator of the same parameters at those of a mixture derived from this one."""
        names = fitted._known_schema().names
        derived: Self = clone(self).set_params(
            covariance_type=self._fitted_type(), weights_init=None, means_init=None, precisions_init=None
        )
        derived.n_features_in_ = len(names)
        if hasattr(self, "feature_names_in_"):
            derived.feature_names_in_ = np.array(names, dtype=object)
        derived.converged_ = getattr(self, "converged_", False)
        derived.n_iter_, derived.lower_bound_, derived.lower_bounds_ = 0, -np.inf, []
        derived._dtype = self.means_.dtype
        derived._publish(fitted.parameters)
        return derived

    def to_sklearn(self) -> sklearn.mixture.GaussianMixture:
        """Return scikit-learn's fitted object with the same parameters and attributes.

        Returns
        -------
        mixture : sklearn.mixture.GaussianMixture
            Its arrays are copies, bit for bit; it predicts the same up to rounding.

        Examples
        --------
        >>> import numpy as np
        >>> from stream_em.sklearn import GaussianMixture
        >>> gm = GaussianMixture().fit(np.array([[1.0], [3.0]]))
        >>> bool(gm.to_sklearn().means_ == gm.means_)
        True

        """
        check_is_fitted(self)
        peer = sklearn.mixture.GaussianMixture()
        peer.set_params(**{name: getattr(self, name) for name in peer.get_params()})
        _copy_fitted(self, peer)
        return peer

    @classmethod
    def from_sklearn(cls, fitted: sklearn.mixture.GaussianMixture, **params: Any) -> Self:
        """Return the mixture that scikit-learn fitted.

        Parameters
        ----------
        fitted : sklearn.mixture.GaussianMixture
            A fitted mixture.
        **params
            Parameters that scikit-learn's does not have, such as `step_size`.

        Returns
        -------
        mixture : GaussianMixture
            Its arrays are copies, bit for bit; it predicts the same up to rounding. `partial_fit` takes its
            components for the start: how many samples they were fitted to is not known.

        Raises
        ------
        TypeError
            When `fitted` is no `sklearn.mixture.GaussianMixture`.

        Examples
        --------
        >>> import sklearn.mixture
        >>> from stream_em.sklearn import GaussianMixture
        >>> theirs = sklearn.mixture.GaussianMixture().fit([[1.0], [3.0]])
        >>> GaussianMixture.from_sklearn(theirs).means_
        array([[2.]])

        """
        if not isinstance(fitted, sklearn.mixture.GaussianMixture):
            raise TypeError(f"expected a fitted sklearn.mixture.GaussianMixture, got {type(fitted).__name__}")
        check_is_fitted(fitted)
        made = cls(**{**fitted.get_params(), **params})
        _copy_fitted(fitted, made)
        made._dtype = made.means_.dtype
        return made


def _copy_fitted(source: Any, target: Any) -> None:
    for name in (*ARRAYS, *FITTED):
        if hasattr(source, name):
            value = getattr(source, name)
            setattr(target, name, value.copy() if isinstance(value, np.ndarray | list) else value)


def _precision_factors(components: GaussianParameters, covariance_type: str) -> Array:
    """Return the upper Cholesky factors of the precisions, as scikit-learn computes them."""
    if covariance_type not in ("full", "tied"):
        return 1.0 / np.sqrt(components.covariance)
    factor = components.factor
    stack = factor.reshape(-1, *factor.shape[-2:])
    return np.stack([dtrtri(one, lower=1)[0].T for one in stack]).reshape(factor.shape)


def _inverted(precision_factors: Array, covariance_type: str) -> Array:
    if covariance_type not in ("full", "tied"):
        return precision_factors**-2.0
    inverse = np.linalg.inv(precision_factors)
    covariances: Array = np.matmul(inverse.swapaxes(-1, -2), inverse)
    return covariances


def _check_shape(given: Any, shape: tuple[int, ...], name: str) -> Array:
    array: Array = check_array(given, dtype=np.float64, ensure_2d=False, allow_nd=True)
    if array.shape != shape:
        raise ValueError(f"The parameter '{name}' should have the shape of {shape}, but got {array.shape}")
    return array


def _check_weights(given: Any, n_components: int) -> Array:
    weights = _check_shape(given, (n_components,), "weights")
    if (weights < 0.0).any() or (weights > 1.0).any():
        raise ValueError(
            "The parameter 'weights' should be in the range [0, 1], but got max value "
            f"{weights.max():.5f}, min value {weights.min():.5f}"
        )
    tolerance = 1e-6 if getattr(given, "dtype", None) == np.float32 else 1e-8
    if abs(1.0 - weights.sum()) > tolerance:
        raise ValueError(f"The parameter 'weights' should be normalized, but got sum(weights) = {weights.sum():.5f}")
    return weights


def _covariances_of(given: Any, covariance_type: str, n_components: int, n_features: int) -> Array:
    shapes = {
        "full": (n_components, n_features, n_features),
        "tied": (n_features, n_features),
        "diag": (n_components, n_features),
        "spherical": (n_components,),
    }
    precisions = _check_shape(given, shapes[covariance_type], f"{covariance_type} precision")
    if covariance_type in ("diag", "spherical"):
        if (precisions <= 0.0).any():
            raise ValueError(f"'{covariance_type} precision' should be positive")
        return 1.0 / precisions
    symmetric = np.allclose(precisions, precisions.swapaxes(-1, -2), rtol=1e-5, atol=1e-8)
    if not symmetric or not (np.linalg.eigvalsh(precisions) > 0.0).all():
        raise ValueError(f"'{covariance_type} precision' should be symmetric, positive-definite")
    covariances = np.linalg.inv(precisions)
    return cholesky(0.5 * (covariances + covariances.swapaxes(-1, -2)))[0]
