"""Mixtures of any family over frames of mixed types."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import issparse
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from stream_em.describe import ComponentDescription
from stream_em.families import BY_NAME, OF_KIND, Family, Product, automatic_family, kind_for
from stream_em.families.gaussian import CovarianceType
from stream_em.learners import FittedMixture, Iteration, OnlineEM
from stream_em.models import Mixture, MixtureParameters
from stream_em.schema import OTHER, Batch, Field, Kind, Schema, SchemaError, in_memory
from stream_em.sklearn.base import BaseMixture, check_given, check_listed
from stream_em.sklearn.snapshots import families_from_plain, plain_families
from stream_em.store import SnapshotError


class MixtureModel(BaseMixture):
    """Mixture over the columns of a frame, each column with a family that suits its type.

    Numbers are jointly Gaussian, strings and categoricals categorical, booleans Bernoulli; `families` says
    otherwise, for example that whole numbers are Poisson counts. Within a component columns of different
    families are independent. Categories are strings; whole numbers and booleans that are categories become text
    (`str(value)`). Samples may be a frame, an array, or dicts with the columns for keys.

    Parameters
    ----------
    n_components : int, default=1
        The number of mixture components.
    families : mapping or family, default=None
        Families by column name: 'gaussian', 'poisson' (counts), 'exponential' (durations), 'bernoulli' (flags),
        'categorical', or a family such as `stream_em.Gaussian("diag")`. A tuple of names gives these columns
        one family together; no column may have two. The columns of an array are called x0, x1 and so on. A family
        instead of a mapping is that of all columns together; a `stream_em.Product` names them itself.
    covariance_type : {'full', 'tied', 'diag', 'spherical'}, default='full'
        Covariance of the numeric columns.
    prior_weight : float, default=0.01
        Pseudo-samples of the pooled data that each component is given, > 0: raise it for anomaly detection. They
        count beside sample weights as they are, and outweigh samples whose weights add up to less.
    max_categories : int, default=32
        A column's vocabulary grows up to this many categories; those after are 'other', with one warning.
    tol : float, default=1e-3
        EM stops when the mean log-posterior of a sample changes by less.
    max_iter, n_init, init_params, random_state, warm_start, verbose, verbose_interval
        As in `GaussianMixture`.
    step_size, step_exponent, step_offset, batch_size, warm_up, n_jobs
        As in `GaussianMixture`.

    Attributes
    ----------
    weights_ : ndarray of shape (n_components,)
        The weight of each component.
    family_ : Family
        The family that was chosen for the columns.
    parameters_ : object
        The family's parameters; `describe` tells them in the columns' own terms.
    converged_, n_iter_, lower_bound_, lower_bounds_, n_samples_seen_, n_features_in_, feature_names_in_
        As in `GaussianMixture`; the lower bound is the mean log-posterior up to a constant.

    See Also
    --------
    GaussianMixture : A drop-in for scikit-learn's.

    Examples
    --------
    >>> import pandas as pd
    >>> from stream_em.sklearn import MixtureModel
    >>> visits = pd.DataFrame({"country": ["DE", "DE", "FR", "FR"] * 25, "clicks": [1, 2, 30, 33] * 25})
    >>> model = MixtureModel(2, families={"clicks": "poisson"}, random_state=0).fit(visits)
    >>> sorted(part.fields[0].text for part in model.describe())
    ["'DE' 100%", "'FR' 100%"]
    >>> model.predict_proba(pd.DataFrame({"country": [None], "clicks": [31]})).max().round(3)
    np.float64(1.0)

    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseMixture._parameter_constraints,
        "families": [Mapping, Family, None],
        "prior_weight": [Interval(Real, 0.0, None, closed="neither")],
        "max_categories": [Interval(Integral, 1, None, closed="left")],
    }
    _regularizer = "prior_weight"

    def __init__(
        self,
        n_components: int = 1,
        *,
        families: Mapping[Any, str | Family] | Family | None = None,
        covariance_type: CovarianceType = "full",
        prior_weight: float = 0.01,
        max_categories: int = 32,
        tol: float = 1e-3,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: Literal["kmeans", "k-means++", "random", "random_from_data"] = "kmeans",
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
        self.families = families
        self.covariance_type: CovarianceType = covariance_type
        self.prior_weight = prior_weight
        self.max_categories = max_categories
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
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

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = True
        return tags

    def _read(self, X: Any, *, reset: bool, learn: bool, least: int = 1) -> Batch:
        if _is_event(X) or (isinstance(X, list | tuple) and X and _is_event(X[0])):
            X = _table_of([X] if _is_event(X) else X, [] if reset else self._names())
        from_frame = hasattr(X, "__arrow_c_stream__") or isinstance(X, pa.RecordBatch)
        events: Any
        if from_frame:
            validate_data(self, X, reset=reset, skip_check_array=True)
            if X.shape[0] < least:
                raise ValueError(
                    f"Found array with {X.shape[0]} sample(s) (shape={X.shape}) while a minimum of {least} is required "
                    f"by {type(self).__name__}."
                )
            events = in_memory(X)
        else:
            events = validate_data(
                self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", ensure_min_samples=least
            )
        if reset:
            self._from_frame = from_frame
            self._overflowed: frozenset[str] = frozenset()
            self._inferred = Schema.infer(_with_text(events), max_categories=int(self.max_categories))
            schema = self._with_kinds(self._inferred)
            return _encode(schema, _with_text(events, schema), extend=True)
        schema = self._learner._known_schema()
        if learn:
            # A smaller limit drops no category that is known.
            limit = int(self.max_categories)
            fields = [replace(one, max_categories=max(limit, len(one.categories))) for one in schema.fields]
            schema = Schema(fields, unknown=schema.unknown)
        return _encode(schema, _with_text(events, schema), extend=learn)

    def _names(self) -> Sequence[str]:
        check_is_fitted(self)
        return self._inferred.names

    def _warn_of_others(self, batch: Batch, stacklevel: int) -> None:
        for one, row in zip(batch.schema.fields, batch.values):
            if one.kind == "category" and one.name not in self._overflowed and (row == OTHER).any():
                self._overflowed |= {one.name}
                warnings.warn(
                    f"column {one.name!r} has more than {one.max_categories} categories: those that came later are "
                    "'other'. If it holds numbers as text, convert it; if it holds ids or free text, leave it out; "
                    "else raise max_categories",
                    stacklevel=stacklevel,
                )

    def _chosen(self, columns: Schema) -> Mapping[Any, str | Family]:
        """Return what `families` says of the columns."""
        if isinstance(self.families, Product):
            return self.families.families
        return {columns.names: self.families} if isinstance(self.families, Family) else self.families or {}

    def _with_kinds(self, inferred: Schema) -> Schema:
        """Return the columns with the kinds that their types and `families` give them."""
        chosen: dict[str, str | Family] = {}
        for key, family in self._chosen(inferred).items():
            for name in _names_of(key):
                if name in chosen:
                    raise ValueError(f"families gives column {name!r} two: {chosen[name]!r} and {family!r}; choose one")
                chosen[name] = family
        kinds: dict[str, Kind] = {
            name: _kind_for(family, inferred.fields[inferred.position(name)]) for name, family in chosen.items()
        }
        return Schema(
            [
                Field(one.name, kinds.get(one.name, one.kind), max_categories=one.max_categories)
                for one in inferred.fields
            ]
        )

    def _mixture(self, schema: Schema) -> Mixture:
        # By today's `families`, which may have been changed since the fit that `schema` is of.
        fields = self._with_kinds(self._inferred).fields
        if isinstance(self.families, Family):
            return Mixture(self.families, int(self.n_components), prior_weight=float(self.prior_weight))
        chosen = {key: one for key, one in (self.families or {}).items() if isinstance(one, Family)}
        taken = {name for key in chosen for name in _names_of(key)}
        rest = [one for one in fields if one.name not in taken]
        if chosen:
            families: dict[Any, Family] = dict(chosen)
            if rest:
                others = automatic_family(Schema(rest), self.covariance_type)
                names = tuple(one.name for one in rest)
                families.update(others.families if isinstance(others, Product) else {names: others})
            family: Family = Product(families)
        else:
            family = automatic_family(Schema(fields), self.covariance_type)
        return Mixture(family, int(self.n_components), prior_weight=float(self.prior_weight))

    def _bound(self, iteration: Iteration) -> float:
        return iteration.objective

    def _fitted(self) -> FittedMixture:
        fitted: FittedMixture = self._learner
        return FittedMixture(fitted.model, fitted.parameters, fitted.schema)

    def _publish(self, parameters: MixtureParameters) -> None:
        self.weights_ = parameters.weights
        self.parameters_ = parameters.components
        self.family_ = self._learner.model.family

    _snapshot_class = "MixtureModel"

    @classmethod
    def _check_params(cls, known: dict[str, Any], params: dict[str, Any], source: str) -> None:
        families = known["families"]
        if isinstance(families, Family) and "covariance_type" in params and "families" not in params:
            raise ValueError(
                f"{source}: covariance_type={params['covariance_type']!r} says nothing of a snapshot that holds "
                f"{families}; leave it out, or fit anew"
            )

    @classmethod
    def _described_by(cls, learner: OnlineEM) -> dict[str, Any]:
        return {
            "n_components": learner.model.n_components,
            "families": learner.model.family,
            "prior_weight": learner.model.prior_weight,
            "max_categories": max(one.max_categories for one in learner._known_schema().fields),
        }

    def _plain_params(self) -> dict[str, Any]:
        return {**super()._plain_params(), "families": plain_families(self.families)}

    @classmethod
    def _params_from_plain(cls, plain: dict[str, Any]) -> dict[str, Any]:
        return {**plain, "families": families_from_plain(plain["families"])}

    def _kept(self) -> dict[str, Any]:
        kinds = [one.kind for one in self._inferred.fields]
        return {
            **super()._kept(),
            "from_frame": self._from_frame,
            "inferred": kinds,
            "overflowed": sorted(self._overflowed),
        }

    def _adopt(self, learner: OnlineEM, kept: dict[str, Any]) -> None:
        super()._adopt(learner, kept)
        fields = learner._known_schema().fields
        kinds = kept.get("inferred", [one.kind for one in fields])
        if not isinstance(kinds, list) or len(kinds) != len(fields):
            raise SnapshotError(f"the snapshot names kinds of {kinds!r} for {len(fields)} columns")
        self._inferred = Schema(
            [Field(one.name, kind, max_categories=one.max_categories) for one, kind in zip(fields, kinds)]
        )
        self._from_frame = kept.get("from_frame", hasattr(self, "feature_names_in_"))
        self._overflowed = frozenset(kept.get("overflowed", ()))

    def describe(self) -> list[ComponentDescription]:
        """Return the components by falling weight, with the columns that set each apart.

        Returns
        -------
        components : list of ComponentDescription
            Each with `id`, `weight` and `fields` (`name`, `text`, `effect`), the most telling first.

        """
        check_is_fitted(self)
        return self._fitted().describe()

    def sample(self, n_samples: int = 1) -> tuple[Any, npt.NDArray[np.int64]]:
        """Generate random samples from the fitted mixture.

        Parameters
        ----------
        n_samples : int, default=1
            Number of samples.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features) or pyarrow.Table
            The samples: a table with the columns' own types where the mixture was fitted to a frame.
        y : ndarray of shape (n_samples,)
            Component labels.

        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"Invalid value for 'n_samples': {n_samples} . The sampling requires at least one sample.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        table, components = self._fitted().sample(n_samples, seed=seed)
        if self._from_frame:
            return table, components
        return np.column_stack([column.to_numpy().astype(np.float64) for column in table.columns]), components

    def marginal(self, features: Sequence[str]) -> FittedMixture:
        """Return the mixture over some of the columns.

        Parameters
        ----------
        features : sequence of str
            Names of the columns.

        Returns
        -------
        marginal : FittedMixture
            A mixture at fixed parameters, with `log_prob`, `predict`, `sample` and so on.

        """
        check_is_fitted(self)
        check_listed(features)
        return self._fitted().marginal(features)

    def conditional(self, given: Mapping[str, Any]) -> FittedMixture:
        """Return the mixture over the other columns given values of some.

        Parameters
        ----------
        given : mapping of str to value
            Values by column name.

        Returns
        -------
        conditional : FittedMixture
            A mixture at fixed parameters, with `log_prob`, `predict`, `sample` and so on.

        """
        check_is_fitted(self)
        check_given(given)
        fields = self._fitted()._known_schema().fields
        categories = {one.name for one in fields if one.kind == "category"}
        return self._fitted().conditional(
            {
                name: str(value) if name in categories and isinstance(value, Integral | np.bool_) else value
                for name, value in given.items()
            }
        )


def _names_of(key: Any) -> tuple[str, ...]:
    names = key if isinstance(key, tuple) else (key,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"families has the key {key!r}, expected the name of a column or a tuple of names; the columns of an array "
            "are called 'x0', 'x1' and so on"
        )
    return names


def _kind_for(family: str | Family, field: Field) -> Kind:
    if isinstance(family, str):
        if family not in BY_NAME:
            raise ValueError(
                f"the family of column {field.name!r} is {family!r}, expected one of "
                f"{', '.join(map(repr, BY_NAME))}, or a family such as stream_em.Gaussian()"
            )
        # A name stands for the family that the kind alone brings about.
        return cast(Kind, next((kind for kind, one in OF_KIND.items() if one is BY_NAME[family]), "numeric"))
    if not isinstance(family, Family):
        raise TypeError(f"the family of column {field.name!r} must be a name or a family, got {family!r}")
    return kind_for(family, field.kind)


def _is_event(X: Any) -> bool:
    # One form of sparse matrices is a mapping too.
    return isinstance(X, Mapping) and not issparse(X)


def _table_of(events: Sequence[Mapping[str, Any]], names: Sequence[str]) -> pa.Table:
    """Return events that are dicts as a table: these columns, then those of other keys as they come."""
    for index, event in enumerate(events):
        if not isinstance(event, Mapping):
            raise TypeError(f"sample {index} is {event!r}, expected a mapping of columns to values as sample 0 is")
    columns = {}
    for name in dict.fromkeys((*names, *(name for event in events for name in event))):
        if not isinstance(name, str):
            raise TypeError(f"the columns of samples that are mappings are named by strings, got {name!r}")
        try:
            columns[name] = pa.array([event.get(name) for event in events], from_pandas=True)
        # What Arrow says of values that are not of one type that it knows; a lack of memory is no such thing.
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"column {name!r} holds values of different or unknown types: {error}") from None
    return pa.table(columns)


def _with_text(events: Any, schema: Schema | None = None) -> Any:
    """Return a table whose categories are text: those of pandas may be whole numbers or booleans.

    Columns of a schema go by its kinds, and without one by their own types.
    """
    if not isinstance(events, pa.Table):
        return events
    for position, name in enumerate(events.column_names):
        column = events.column(position)
        encoded = pa.types.is_dictionary(column.type)
        if schema is None or name not in schema.names:
            is_category = encoded
        else:
            is_category = schema.fields[schema.position(name)].kind == "category"
        if is_category:
            column = _as_text(name, column)
        elif encoded:
            column = column.cast(column.type.value_type)
        events = events.set_column(position, name, column)
    return events


def _as_text(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    type_ = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(type_):
        return column.cast(type_).cast(pa.string())
    if pa.types.is_boolean(type_):
        return pc.if_else(column.cast(type_), "True", "False")
    if pa.types.is_floating(type_):
        raise SchemaError(
            f"column {name!r} has type {column.type}, but the field is a category: floats are no names; convert it "
            "with .astype(str), or with .astype(float) if it is a number after all"
        )
    return column


def _encode(schema: Schema, events: Any, *, extend: bool) -> Batch:
    """Return the events encoded; a row without any value is kept, since every model says something of it."""
    batch = schema.encode(events, on_error="collect", extend=extend)
    if batch.accepted is None:
        return batch
    for error in batch.rejected:
        if error.field is not None:
            raise error
    values = np.full((len(batch.schema), len(batch.accepted) + len(batch.rejected)), np.nan)
    values[:, batch.accepted] = batch.values
    return replace(batch, values=values, rejected=(), accepted=None)
