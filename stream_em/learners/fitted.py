"""What a fitted mixture can do with events, however it was fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_em.describe import ComponentDescription, describe
from stream_em.families.base import FamilyError
from stream_em.models import Mixture, MixtureParameters
from stream_em.models.mixture import Posterior
from stream_em.numerics import Array
from stream_em.schema import OTHER, Batch, Schema, SchemaError

if TYPE_CHECKING:
    import pyarrow as pa


Events = Any
"""A dict, a list of dicts, an array (n, D), a frame (Arrow, pandas, polars) or an encoded `Batch`."""


class NotFittedError(ValueError):
    """Raised when something is asked of a learner that has not seen any event."""


class Prediction(NamedTuple):
    """What a model says of each event.

    Parameters
    ----------
    log_prob
        (n,) log-density; its negative is an anomaly score.
    component
        (n,) stable id of the most responsible component.
    responsibilities
        (n, K) probability of each component.

    """

    log_prob: Array
    component: npt.NDArray[np.int64]
    responsibilities: Array


class FittedMixture:
    """A mixture at fixed parameters: scores, soft clusters, samples and sub-models.

    Parameters
    ----------
    model
        The mixture.
    parameters
        Its parameters.
    schema
        The fields they are for.

    >>> from stream_em import BatchEM, Gaussian
    >>> events = np.repeat([[0.0, 1.0], [0.2, 0.8], [9.0, 5.0], [9.3, 5.1]], 5, axis=0)
    >>> fitted = BatchEM(Mixture(Gaussian("diag"), 2), seed=0).fit(events)
    >>> fitted.marginal(["x1"]).predict(np.array([[1.0], [5.0]])).tolist() == fitted.predict(events[[0, 10]]).tolist()
    True

    """

    def __init__(self, model: Mixture, parameters: MixtureParameters | None, schema: Schema | None) -> None:
        self.model = model
        self._schema = schema
        self._bound = None if schema is None else model.bind(schema)
        self._parameters = parameters

    def __repr__(self) -> str:
        fields = "no fields yet" if self._schema is None else f"{len(self._schema)} fields"
        n_components = (self._parameters or self.model).n_components
        return f"<{type(self).__name__} of {n_components} components, {fields}{self._progress_text()}>"

    def _progress_text(self) -> str:
        return ""

    @property
    def schema(self) -> Schema | None:
        """The fields, or None before any event was seen."""
        return self._schema

    @property
    def parameters(self) -> MixtureParameters:
        """The current parameters.

        Raises
        ------
        NotFittedError
            Before any event was seen.

        """
        if self._parameters is None:
            raise NotFittedError(f"this {type(self).__name__} has no parameters yet: it has seen no event with weight")
        return self._parameters

    @property
    def weights(self) -> Array:
        """Mixing weights (K,) of the components, as `parameters` has them."""
        return self.parameters.weights

    @property
    def component_ids(self) -> npt.NDArray[np.int64]:
        """Ids (K,) of the components, in the order in which predictions have them."""
        return self.parameters.component_ids

    def encode(
        self,
        events: Events,
        weight: npt.ArrayLike | None = None,
        time: npt.ArrayLike | None = None,
        *,
        on_error: Literal["raise", "collect"] = "raise",
        extend: bool = False,
    ) -> Batch:
        """Return events as a `Batch`, see `Schema.encode`; nothing is learned."""
        batch = self._known_schema().encode(events, weight, time, on_error=on_error, extend=extend)
        return batch if on_error == "raise" else self._screened(batch)

    def _screened(self, batch: Batch) -> Batch:
        """Leave out the events that the model has no density for."""
        try:
            bound = self.model.bind(batch.schema)
        except FamilyError:
            # It has a field that the model cannot take, which learning from it will say.
            return batch
        return bound.screen(batch)

    def _known_schema(self) -> Schema:
        if self._schema is None:
            raise NotFittedError(f"this {type(self).__name__} knows no fields yet: it has seen no event")
        return self._schema

    def _bound_model(self) -> Mixture:
        if self._bound is None:
            raise NotFittedError(f"this {type(self).__name__} knows no fields yet: it has seen no event")
        return self._bound

    def _posterior(self, batch: Batch) -> Posterior:
        return self._bound_model().posterior(self.parameters, adapted(batch, self._known_schema()))

    def score_events(self, events: Events) -> Prediction:
        """Return log-density, component and responsibilities of each event; nothing is learned."""
        return as_prediction(self._posterior(self.encode(events)), self.component_ids)

    def log_prob(self, events: Events) -> Array:
        """Return log p(event) (n,)."""
        return self._posterior(self.encode(events)).log_prob

    def responsibilities(self, events: Events) -> Array:
        """Return the probability (n, K) of each component given each event."""
        return self._posterior(self.encode(events)).responsibilities.T

    def predict(self, events: Events) -> npt.NDArray[np.int64]:
        """Return the id (n,) of the most responsible component of each event."""
        return self.score_events(events).component

    def sample(self, n_events: int, *, seed: int | None = None) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """Draw events from the model; return them as a table, with the id (n,) of each one's component."""
        values, components = self._bound_model().sample(self.parameters, n_events, np.random.default_rng(seed))
        return self._known_schema().decode(values), components

    def n_parameters(self) -> int:
        """Return the number of free parameters."""
        n_components = None if self._parameters is None else self._parameters.n_components
        return self.model.n_parameters(self._known_schema(), n_components)

    def bic(self, events: Events) -> float:
        """Return the Bayesian information criterion on these events; lower is better (Schwarz 1978)."""
        log_prob = self.log_prob(events)
        return -2.0 * float(log_prob.sum()) + self.n_parameters() * math.log(len(log_prob))

    def aic(self, events: Events) -> float:
        """Return Akaike's information criterion on these events; lower is better (Akaike 1974)."""
        return -2.0 * float(self.log_prob(events).sum()) + 2.0 * self.n_parameters()

    def marginal(self, names: Sequence[str]) -> FittedMixture:
        """Return the mixture over some of the fields.

        Raises
        ------
        SchemaError
            When a field is unknown, or none is named.

        """
        schema, bound = self._known_schema(), self._bound_model()
        keep = np.array([schema.position(name) for name in names], dtype=np.intp)
        kept = Schema([schema.fields[position] for position in keep], unknown=schema.unknown)
        return FittedMixture(bound.restrict(keep), bound.marginal(self.parameters, keep), kept)

    def conditional(self, given: Mapping[str, Any]) -> FittedMixture:
        """Return the mixture over the other fields given values of some.

        Raises
        ------
        SchemaError
            When no field is given or left, one is unknown, or a value is missing or of another kind.

        """
        schema, bound = self._known_schema(), self._bound_model()
        if not given:
            raise SchemaError("no field is given to condition on")
        at = np.array(sorted(schema.position(name) for name in given), dtype=np.intp)
        if len(at) == len(schema):
            raise SchemaError("all fields are given: none is left for the conditional distribution")
        for name, value in given.items():
            if value is None or value != value:  # NaN is the one value that differs from itself
                raise SchemaError(
                    f"the given value of {name!r} must be finite, got {value!r}; leave the field out if it is missing"
                )
        event = schema.encode([dict(given)], on_error="collect")
        if event.rejected:
            error = event.rejected[0]
            raise SchemaError(f"the given value of {error.field!r} must be {error.expected}, got {error.value!r}")
        values = event.values[at, 0]
        rest = np.setdiff1d(np.arange(len(schema)), at)
        parameters = bound.conditional(self.parameters, at, values)
        return FittedMixture(
            bound.restrict(rest), parameters, Schema([schema.fields[one] for one in rest], unknown=schema.unknown)
        )

    @property
    def effective_components(self) -> float:
        """Exponential of the entropy of the weights: K when all weigh the same, 1 when one has it all."""
        weights = self.parameters.weights
        return float(np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum()))

    def describe(self) -> list[ComponentDescription]:
        """Return the components by falling weight, with the fields that set each apart."""
        return describe(self._bound_model().family, self.parameters, self._known_schema())

    def marginals(self) -> tuple[Array, Array]:
        """Return mean and standard deviation (K, D) of each field in each component, in the fields' coding."""
        mean, variance = self._bound_model().family.moments(self.parameters.components)
        return mean, np.sqrt(variance)

    def pair_covariance(self, first: int, second: int) -> Array:
        """Return the covariances (K, 2, 2) of the fields at two positions; 0 between independent fields."""
        family, components = self._bound_model().family, self.parameters.components
        variance = family.moments(components)[1]
        pair = np.empty((len(variance), 2, 2))
        pair[:, 0, 0], pair[:, 1, 1] = variance[:, first], variance[:, second]
        pair[:, 0, 1] = pair[:, 1, 0] = family.covariance(components, first, second)
        return pair


def with_columns(prediction: Prediction, ids: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Prediction:
    """Return a prediction whose responsibilities, of components with these ids, have a column for each of others."""
    if np.array_equal(ids, columns):
        return prediction
    responsibilities = np.zeros((len(prediction.log_prob), len(columns)))
    _, at, of_columns = np.intersect1d(ids, columns, return_indices=True)
    responsibilities[:, of_columns] = prediction.responsibilities[:, at]
    return prediction._replace(responsibilities=responsibilities)


def as_prediction(posterior: Posterior, component_ids: npt.NDArray[np.int64]) -> Prediction:
    """Return a posterior as users see it: ids of components, and responsibilities by event."""
    responsibilities = posterior.responsibilities
    return Prediction(posterior.log_prob, component_ids[np.argmax(responsibilities, axis=0)], responsibilities.T)


def foreign_batch(batch: Batch, schema: Schema) -> SchemaError:
    """Return the error that a batch was encoded with a schema that this one does not descend from."""
    return SchemaError(
        f"the batch was encoded with another schema, {batch.schema!r} instead of {schema!r}, or with other "
        "categories; encode events with the learner's own schema"
    )


def adapted(batch: Batch, schema: Schema) -> Batch:
    """Return a batch of an earlier or later state of `schema` as `schema` sees it.

    Fields that came later are missing; new fields are left out and new categories are `other`.

    Raises
    ------
    SchemaError
        When neither schema descends from the other.

    """
    if batch.schema is schema:
        return batch
    if schema.extends(batch.schema):
        values = batch.values
        if len(schema) > len(values):
            values = np.full((len(schema), batch.n_events), np.nan)
            values[: len(batch.values)] = batch.values
        return replace(batch, values=values, schema=schema)
    if not batch.schema.extends(schema):
        raise foreign_batch(batch, schema)
    values = batch.values[: len(schema)].copy()
    for row, field in zip(values, schema.fields):
        if field.kind == "category":
            row[row >= field.n_codes] = OTHER
    return replace(batch, values=values, schema=schema)


def count_told(batch: Batch) -> int:
    """Return how many events have weight: the others say nothing, and move no clock."""
    return batch.n_events if batch.weight is None else int(np.count_nonzero(batch.weight))
