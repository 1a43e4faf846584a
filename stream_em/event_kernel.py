"""One event at a time: dicts into packed numbers, and `stream_em.compiled` on them.

Needs Numba, and is imported only when single events are learned or scored.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from operator import itemgetter
from struct import Struct
from struct import error as PackingError  # noqa: N812 - an error, whatever its case
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_em import compiled
from stream_em.families import Bernoulli, Categorical, Exponential, Family, Gaussian, Poisson, Product
from stream_em.families.categorical import CategoricalParameters
from stream_em.families.gaussian import LOG_TWO_PI, GaussianParameters
from stream_em.families.mean_valued import MeanParameters, MeanValued
from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import LARGEST_VALUE, Array, safe_divide
from stream_em.schedules import LEAST_SHARE, Constant, RobbinsMonro, Schedule
from stream_em.schema import OTHER, SMALLEST_SAMPLE_WEIGHT, Schema, _is_missing
from stream_em.state import State
from stream_em.statistics import Moments, Part, Statistics, Sums

if TYPE_CHECKING:
    from stream_em.block_kernel import BlockKernel

KINDS = {
    "numeric": compiled.NUMERIC,
    "category": compiled.CATEGORY,
    "flag": compiled.FLAG,
    "count": compiled.COUNT,
    "duration": compiled.DURATION,
}
FAMILIES: dict[type[Family], int] = {
    Categorical: compiled.CATEGORICAL,
    Bernoulli: compiled.BERNOULLI,
    Poisson: compiled.POISSON,
    Exponential: compiled.EXPONENTIAL,
}
COVARIANCES = {
    "diag": compiled.DIAGONAL,
    "spherical": compiled.SPHERICAL,
    "tied": compiled.TIED,
    "full": compiled.FULL,
}
JOINT = (compiled.TIED, compiled.FULL)
GAUSSIAN = (compiled.DIAGONAL, compiled.SPHERICAL, *JOINT)

NOTHING: tuple[str, ...] = ()

WINNER, LOG_PROB = compiled.WINNER, compiled.LOG_PROB

# A weight below 0 asks `compiled.step` for the score alone.
SCORE_ONLY = -1.0

# Where the scale of the statistics has become so small, it is multiplied into them.
LEAST_SCALE = 1e-50

# Compiling for the first time takes seconds; a user who waits longer than this is told why.
PATIENCE = 1.0


class _Factor(NamedTuple):
    """One factor of the family: what it is, its fields, and the name under which its statistics are filed."""

    kind: int
    family: Family
    prefix: str
    positions: npt.NDArray[np.intp]


def _factors(model: Mixture, n_fields: int) -> list[_Factor]:
    """Return the factors in the order in which they are computed."""
    family = model.family
    if isinstance(family, Product):
        parts = [(one.family, f"{one.name}/", one.positions) for one in family.factors]
    else:
        parts = [(family, "", np.arange(n_fields))]
    factors = []
    for one, prefix, positions in parts:
        kind = COVARIANCES[one.covariance_type] if isinstance(one, Gaussian) else FAMILIES[type(one)]
        factors.append(_Factor(kind, one, prefix, positions))
    # Gaussian factors last: from there on the log-density only falls, so that far components are given up early.
    return sorted(factors, key=lambda factor: factor.kind)


class _Calls(NamedTuple):
    learn: Callable[..., float | None]
    score: Callable[[Mapping[str, Any]], float | None]
    predict: Callable[[Mapping[str, Any]], int | None]


@contextmanager
def _announced() -> Iterator[None]:
    """Say what takes so long, if it does."""
    logger = logging.getLogger("stream_em")
    message = "compiling the code that learns events; this is done once and kept on disk"
    timer = threading.Timer(PATIENCE, logger.warning, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class EventKernel:
    """A learner's state in packed form, to learn and score events one at a time.

    Parameters
    ----------
    model
        The mixture, bound to `schema`; `has_compiled_form` says whether it can be.
    schema
        The fields.
    schedule
        Step sizes.
    batch_size
        Events in a step of the schedule.
    state
        What was learned so far; its statistics and parameters are copied.
    ignored_fields
        Counts events with ignored fields, by the field's name; it is added to.

    """

    def __init__(
        self,
        model: Mixture,
        schema: Schema,
        schedule: Schedule,
        batch_size: int,
        state: State,
        ignored_fields: Counter[str],
    ) -> None:
        factors = _factors(model, len(schema))
        self.model, self.schema, self.factors = model, schema, factors
        self._schedule, self._batch_size = schedule, batch_size
        self._ignored_fields = ignored_fields
        self._size = compiled.HEADER + len(factors) * compiled.ROW
        self._places: list[dict[int, tuple[int, tuple[int, ...]]]] = [self._lay_out(factor) for factor in factors]
        n_components, n_fields = model.n_components, len(schema)
        header = {
            compiled.EVENT: self._take(n_fields),
            compiled.KINDS: self._take(n_fields),
            compiled.SHARES: self._take(n_components),
            compiled.WEIGHTS: self._take(n_components),
            compiled.NORMALIZERS: self._take(n_components),
            compiled.WORK: self._take(3 * n_fields + 2 * n_fields**2),
            compiled.N_COMPONENTS: n_components,
            compiled.N_FIELDS: n_fields,
            compiled.N_FACTORS: len(factors),
            compiled.HARD: model.assignment == "hard",
            compiled.BATCH_SIZE: batch_size,
            compiled.PRIOR_WEIGHT: model.prior_weight,
        }
        self.vector = np.zeros(self._size)
        for slot, value in header.items():
            self.vector[slot] = value
        self.general = None if all(factor.kind == compiled.FULL for factor in factors) else 0.0
        self._write_schedule(schedule)
        self._write_table()
        self._shares = self._slice(compiled.SHARES, n_components)
        self._weights = self._slice(compiled.WEIGHTS, n_components)
        self._normalizers = self._slice(compiled.NORMALIZERS, n_components)
        self._prepare_encoding()
        self._pack(state)
        self._n_collected = state.n_events

    def _take(self, length: int) -> int:
        start = self._size
        self._size += length
        return start

    def _slice(self, slot: int, length: int) -> Array:
        start = int(self.vector[slot])
        return self.vector[start : start + length]

    def _lay_out(self, factor: _Factor) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Return start and shape of each of the factor's arrays."""
        n_components, size = self.model.n_components, len(factor.positions)
        each, square = (n_components, size), (n_components, size, size)
        shapes: dict[int, tuple[int, ...]]
        if isinstance(factor.family, Categorical):
            codes = (n_components, sum(factor.family.n_codes))
            shapes = {
                compiled.MEAN: codes,
                compiled.LOCATION: codes,
                compiled.POOLED_MEAN: codes[1:],
                compiled.CODES: (size,),
            }
        elif factor.kind in GAUSSIAN:
            tied, joint = factor.kind == compiled.TIED, factor.kind in JOINT
            matrices = square[1:] if tied else square if joint else each
            shapes = {
                compiled.WEIGHT: () if joint else each,
                compiled.MEAN: each,
                compiled.SCATTER: matrices,
                compiled.LOCATION: each,
                compiled.SPREAD: matrices,
                compiled.FACTOR: matrices if joint else (),
                compiled.ROOT: (size,) if tied else each,
                compiled.CONSTANT: (1,) if tied else (n_components,) if joint else each,
                compiled.POOLED_WEIGHT: (size,),
                compiled.POOLED_MEAN: (size,),
                compiled.POOLED_SCATTER: (size,),
            }
        else:
            shapes = dict.fromkeys(
                (compiled.WEIGHT, compiled.MEAN, compiled.LOCATION, compiled.SLOPE, compiled.INTERCEPT), each
            )
            shapes |= dict.fromkeys((compiled.POOLED_WEIGHT, compiled.POOLED_MEAN), (size,))
        return {slot: (self._take(math.prod(shape)), shape) for slot, shape in shapes.items()}

    def _write_schedule(self, schedule: Schedule) -> None:
        vector = self.vector
        if isinstance(schedule, RobbinsMonro):
            vector[compiled.SCHEDULE] = compiled.ROBBINS_MONRO
            vector[compiled.ALPHA], vector[compiled.OFFSET] = schedule.alpha, schedule.offset
        elif isinstance(schedule, Constant):
            vector[compiled.SCHEDULE], vector[compiled.ALPHA] = compiled.CONSTANT_STEP, schedule.value
        else:
            vector[compiled.SCHEDULE] = compiled.HARMONIC

    def _write_table(self) -> None:
        """Write the factors' rows; the fields of the event are in the order of the factors."""
        kinds = self._slice(compiled.KINDS, len(self.schema))
        first = 0
        for index, (factor, places) in enumerate(zip(self.factors, self._places)):
            row, size = compiled.HEADER + index * compiled.ROW, len(factor.positions)
            self.vector[row + compiled.KIND] = factor.kind
            self.vector[row + compiled.SIZE] = size
            self.vector[row + compiled.FIRST] = first
            for slot, (start, _) in places.items():
                self.vector[row + slot] = start
            if isinstance(factor.family, Categorical):
                self.vector[row + compiled.N_CODES] = sum(factor.family.n_codes)
                self.array(index, compiled.CODES)[:] = factor.family.n_codes
            if isinstance(factor.family, Gaussian):
                self.vector[row + compiled.REGULARIZATION] = factor.family.reg_covar
            for position in factor.positions.tolist():
                kinds[first] = KINDS[self.schema.fields[position].kind]
                first += 1

    def array(self, index: int, slot: int) -> Array:
        """Return one of a factor's arrays, as a view of the vector."""
        start, shape = self._places[index][slot]
        return self.vector[start : start + math.prod(shape)].reshape(shape)

    def _pack(self, state: State) -> None:
        """Take over what was learned so far."""
        assert state.statistics is not None
        assert state.iterate is not None
        vector = self.vector
        self.component_ids = state.iterate.component_ids
        self.ids: list[int] = self.component_ids.tolist()
        vector[compiled.SCALE] = 1.0
        vector[compiled.STATE_WEIGHT] = state.statistics.total_weight
        vector[compiled.LOG_LIKELIHOOD] = state.statistics.log_likelihood
        vector[compiled.N_EVENTS] = state.n_events
        vector[compiled.TOTAL_WEIGHT] = state.total_weight
        vector[compiled.N_UPDATES] = state.n_updates
        self._weights[:] = state.statistics.weights
        self._normalizers[:] = 0.0
        for index, (factor, parameters) in enumerate(zip(self.factors, self._parameters_by_factor(state.iterate))):
            parts = {
                name.removeprefix(factor.prefix): part
                for name, part in state.statistics.parts.items()
                if name.startswith(factor.prefix)
            }
            self._pack_factor(index, factor, parts, parameters)
            self._derive(index, factor, parameters)
        self._measure_span()

    def _parameters_by_factor(self, parameters: MixtureParameters) -> list[Any]:
        family = self.model.family
        if not isinstance(family, Product):
            return [parameters.components]
        by_prefix = {f"{factor.name}/": one for factor, one in zip(family.factors, parameters.components)}
        return [by_prefix[factor.prefix] for factor in self.factors]

    def _pack_factor(self, index: int, factor: _Factor, parts: Mapping[str, Part], parameters: Any) -> None:
        if factor.kind == compiled.CATEGORICAL:
            self.array(index, compiled.MEAN)[:] = _sums(parts["counts"])
            self.array(index, compiled.LOCATION)[:] = parameters.probability
        elif factor.kind in GAUSSIAN:
            moments = parts["moments"]
            assert isinstance(moments, Moments)
            if factor.kind not in JOINT:
                self.array(index, compiled.WEIGHT)[:] = moments.weight
            self.array(index, compiled.MEAN)[:] = moments.mean
            self.array(index, compiled.SCATTER)[:] = moments.scatter
            self.array(index, compiled.LOCATION)[:] = parameters.mean
            spread = parameters.covariance
            self.array(index, compiled.SPREAD)[:] = spread[:, None] if factor.kind == compiled.SPHERICAL else spread
        else:
            self.array(index, compiled.WEIGHT)[:] = _sums(parts["weight"])
            self.array(index, compiled.MEAN)[:] = _sums(parts["sum"])
            self.array(index, compiled.LOCATION)[:] = parameters.mean

    def _derive(self, index: int, factor: _Factor, parameters: Any) -> None:
        """Write what follows from statistics and parameters: pooled statistics, factors, constants."""
        mean = self.array(index, compiled.MEAN)
        if factor.kind in GAUSSIAN:
            weight = self._weights[:, None] if factor.kind in JOINT else self.array(index, compiled.WEIGHT)
            scatter = self.array(index, compiled.SCATTER)
            total = np.broadcast_to(weight, mean.shape).sum(axis=0)
            average = safe_divide((weight * mean).sum(axis=0), total)
            between = (weight * (mean - average) ** 2).sum(axis=0)
            within = np.diagonal(scatter, axis1=-2, axis2=-1) if factor.kind in JOINT else scatter
            within = within if factor.kind == compiled.TIED else within.sum(axis=0)
            self.array(index, compiled.POOLED_WEIGHT)[:] = total
            self.array(index, compiled.POOLED_MEAN)[:] = average
            self.array(index, compiled.POOLED_SCATTER)[:] = between + within
        else:
            self.array(index, compiled.POOLED_MEAN)[:] = mean.sum(axis=0)
            if factor.kind != compiled.CATEGORICAL:
                self.array(index, compiled.POOLED_WEIGHT)[:] = self.array(index, compiled.WEIGHT).sum(axis=0)
                assert isinstance(factor.family, MeanValued)
                slope, intercept = factor.family.natural(parameters.mean)
                self.array(index, compiled.SLOPE)[:] = slope
                self.array(index, compiled.INTERCEPT)[:] = intercept
            return
        constant = self.array(index, compiled.CONSTANT)
        if factor.kind in JOINT:
            self.array(index, compiled.FACTOR)[:] = parameters.factor
            self.array(index, compiled.ROOT)[:] = 1.0 / np.diagonal(parameters.factor, axis1=-2, axis2=-1)
            constant[:] = parameters.log_normalizer
            self._normalizers += constant
        else:
            spread = self.array(index, compiled.SPREAD)
            self.array(index, compiled.PRECISION)[:] = 1.0 / spread
            constant[:] = -0.5 * (LOG_TWO_PI + np.log(spread))
            self._normalizers += constant.sum(axis=1)

    def _measure_span(self) -> None:
        pseudo = self.model.prior_weight
        total = float(self._weights.sum()) + self.model.n_components * pseudo
        self.vector[compiled.SPAN] = compiled.NEGLIGIBLE_LOG_SHARE + math.log(total / pseudo)

    @property
    def n_events(self) -> int:
        """Events learned."""
        return int(self.vector[compiled.N_EVENTS])

    @property
    def ahead(self) -> bool:
        """Whether events were learned since the state was packed or collected last."""
        return self.n_events != self._n_collected

    @property
    def mixing_weights(self) -> Array:
        """Mixing weights (K,) after the events learned."""
        weights = self.vector[compiled.SCALE] * self._weights + self.model.prior_weight
        shares: Array = weights / np.add.reduce(weights)
        return shares

    def collect(self) -> State:
        """Return what was learned so far, in arrays of its own."""
        state = self._unpack()
        self._n_collected = state.n_events
        return state

    def checkpoint(self) -> tuple[Array, int]:
        """Return what `restore` goes back to."""
        return self.vector.copy(), self._n_collected

    def restore(self, checkpoint: tuple[Array, int]) -> None:
        """Take everything back to where it was at the checkpoint."""
        self.vector[:], self._n_collected = checkpoint

    def _unpack(self) -> State:
        vector = self.vector
        scale = float(vector[compiled.SCALE])
        parts: dict[str, Part] = {"components": Sums(scale * self._weights)}
        parameters = {}
        for index, factor in enumerate(self.factors):
            of_factor, parameters[factor.prefix] = self._unpack_factor(index, factor, scale)
            parts |= {factor.prefix + name: part for name, part in of_factor.items()}
        log_likelihood = float(vector[compiled.LOG_LIKELIHOOD])
        family = self.model.family
        components: Any
        if isinstance(family, Product):
            components = tuple(parameters[f"{factor.name}/"] for factor in family.factors)
            # In the order of the family, as the NumPy path files them.
            order = [
                "components",
                *(name for one in family.factors for name in parts if name.startswith(f"{one.name}/")),
            ]
            parts = {name: parts[name] for name in order}
        else:
            (components,) = parameters.values()
        return State(
            Statistics(parts, log_likelihood, self.component_ids),
            MixtureParameters(self.mixing_weights, components, self.component_ids),
            int(vector[compiled.N_EVENTS]),
            float(vector[compiled.TOTAL_WEIGHT]),
            int(vector[compiled.N_UPDATES]),
        )

    def _unpack_factor(self, index: int, factor: _Factor, scale: float) -> tuple[dict[str, Part], Any]:
        if factor.kind == compiled.CATEGORICAL:
            probability = self.array(index, compiled.LOCATION).copy()
            return {"counts": Sums(scale * self.array(index, compiled.MEAN))}, CategoricalParameters(probability)
        mean, location = self.array(index, compiled.MEAN), self.array(index, compiled.LOCATION).copy()
        if factor.kind not in GAUSSIAN:
            weight = scale * self.array(index, compiled.WEIGHT)
            return {"weight": Sums(weight), "sum": Sums(scale * mean)}, MeanParameters(location)
        scatter = scale * self.array(index, compiled.SCATTER)
        spread = self.array(index, compiled.SPREAD).copy()
        if factor.kind in JOINT:
            weight, scatter, spread = scale * self._weights, _symmetric(scatter), _symmetric(spread)
        else:
            weight = scale * self.array(index, compiled.WEIGHT)
        if factor.kind == compiled.SPHERICAL:
            spread = spread[:, 0].copy()
        return {"moments": Moments(weight, mean.copy(), scatter)}, GaussianParameters(location, spread)

    def _prepare_encoding(self) -> None:
        self._order = np.concatenate([factor.positions for factor in self.factors])
        fields = [self.schema.fields[position] for position in self._order.tolist()]
        self._width = len(fields)
        self._event = self._slice(compiled.EVENT, self._width)
        self._names = tuple(one.name for one in fields)
        self._known_names = frozenset(self._names)
        getter = itemgetter(*self._names)
        self._getter = getter if self._width > 1 else lambda event: (getter(event),)
        self._categories = [(place, one) for place, one in enumerate(fields) if one.kind == "category"]
        self._codes = [
            (place, {label: code for code, label in enumerate(one.categories, 1)}) for place, one in self._categories
        ]
        self._pack_values = Struct(f"={self._width}d").pack_into
        self._memory = self.vector.data.cast("B")
        self._offset = int(self.vector[compiled.EVENT]) * self.vector.itemsize

    @cached_property
    def learn(self) -> Callable[..., float | None]:
        """Function of an event and, optionally, its weight that learns; it returns log p(event) as it was before.

        None when the event cannot be used as it is, or makes the schema grow. Nothing has changed then, and the
        learner's own path says what is wrong, or takes the event.
        """
        return self._calls.learn

    def learn_values(self, values: Array, weight: float = 1.0) -> float | None:
        """Learn from one encoded event (D,), nothing missing; return log p(event) as it was before.

        None when it has to be learned elsewhere; nothing has changed then.
        """
        self._event[:] = values[self._order]
        log_prob: float = self._step(self.vector, weight, None, self.general)
        return log_prob if log_prob < math.inf else self._learn_otherwise(log_prob, weight)

    @cached_property
    def score(self) -> Callable[[Mapping[str, Any]], float | None]:
        """Function that returns log p(event), None when the event cannot be used as it is; nothing is learned."""
        return self._calls.score

    @cached_property
    def predict(self) -> Callable[[Mapping[str, Any]], int | None]:
        """Function that returns the id of the most responsible component, None as `score` does."""
        return self._calls.predict

    @cached_property
    def _calls(self) -> _Calls:
        """Return functions with all they need at hand: attributes would take as long as the arithmetic."""
        width, getter, all_codes, general = self._width, self._getter, self._codes, self.general
        pack, memory, offset = self._pack_values, self._memory, self._offset
        vector, infinity, ignored_fields = self.vector, math.inf, self._ignored_fields
        ids, numbers = self.ids, self.vector.data
        step = self._step
        encode_with_gaps, learn_otherwise, score_otherwise = (
            self._encode_with_gaps,
            self._learn_otherwise,
            self._score_otherwise,
        )

        def encode(event: Mapping[str, Any]) -> bool:
            try:
                # Other mappings may answer for keys that they do not hold.
                if len(event) != width or event.__class__ is not dict:
                    return False
                values = getter(event)
                if all_codes:
                    values = list(values)
                    for place, codes in all_codes:
                        values[place] = codes[values[place]]
                pack(memory, offset, *values)
            except (KeyError, TypeError, PackingError, OverflowError):
                return False
            return True

        def learn(event: Mapping[str, Any], weight: float = 1.0) -> float | None:
            ignored = NOTHING if encode(event) else encode_with_gaps(event, True)
            if ignored is None:
                return None
            try:
                if weight != 1.0 and not (weight == 0.0 or SMALLEST_SAMPLE_WEIGHT <= weight <= LARGEST_VALUE):
                    return None
            except TypeError:
                return None
            told = step(vector, weight, None, general)
            log_prob = told if told < infinity else learn_otherwise(told, weight)
            if ignored and log_prob is not None:
                ignored_fields.update(ignored)
            return log_prob

        def score(event: Mapping[str, Any]) -> float | None:
            if not encode(event) and encode_with_gaps(event, False) is None:
                return None
            log_prob = step(vector, SCORE_ONLY, None, general)
            return log_prob if log_prob < infinity else score_otherwise()

        def predict(event: Mapping[str, Any]) -> int | None:
            if not encode(event) and encode_with_gaps(event, False) is None:
                return None
            if not step(vector, SCORE_ONLY, None, general) < infinity and score_otherwise() is None:
                return None
            return ids[int(numbers[WINNER])]

        return _Calls(learn, score, predict)

    def _encode_with_gaps(self, event: Mapping[str, Any], learning: bool) -> Sequence[str] | None:
        """Write an event that may miss fields, have others or hold new categories.

        Return the names of fields that are ignored, None when the event cannot be used without growing the schema.
        """
        extra = [name for name in event if name not in self._known_names]
        if extra and (self.schema.unknown == "refuse" or not all(isinstance(name, str) for name in extra)):
            return None
        # A field that holds nothing is as good as absent.
        extra = [name for name in extra if not _is_missing(event[name])]
        if extra and learning and self.schema.unknown == "add":
            return None
        values = [math.nan if (value := event.get(name)) is None else value for name in self._names]
        try:
            for (place, field), (_, codes) in zip(self._categories, self._codes):
                label = values[place]
                if isinstance(label, str):
                    if learning and label not in codes and len(codes) < field.max_categories:
                        return None
                    values[place] = codes.get(label, OTHER)
                elif not math.isnan(label):
                    return None
            self._pack_values(self._memory, self._offset, *values)
        except (TypeError, PackingError, OverflowError):
            return None
        return extra

    @cached_property
    def _step(self) -> Callable[..., float]:
        with _announced():
            return compiled.compiled_step(gaps=False, general=self.general is not None)

    @cached_property
    def _step_with_gaps(self) -> Callable[..., float]:
        with _announced():
            return compiled.compiled_step(gaps=True, general=self.general is not None)

    def _score_otherwise(self) -> float | None:
        log_prob = self._step_with_gaps(self.vector, SCORE_ONLY, 0.0, self.general)
        return None if math.isnan(log_prob) else log_prob

    def _learn_otherwise(self, log_prob: float, weight: float) -> float | None:
        """Go on where the usual step did not take the event, or could not finish the M-step; return log p or None."""
        if math.isnan(log_prob):
            if self.vector[compiled.SCALE] < LEAST_SCALE:
                self._pack(self._unpack())
            log_prob = self._step_with_gaps(self.vector, weight, 0.0, self.general)
        if log_prob == math.inf:
            log_prob = float(self.vector[LOG_PROB])
            self.repair(1)
        return None if math.isnan(log_prob) else log_prob

    def repair(self, n_events: int) -> None:
        """Take the M-step of the last update, of so many events with weight, in NumPy, which can repair covariances."""
        state, shares = self._unpack(), self._shares.copy()
        assert state.statistics is not None
        assert state.iterate is not None
        kept = None
        if state.n_events // self._batch_size == (state.n_events - n_events) // self._batch_size:
            kept = state.iterate, ~(shares > LEAST_SHARE)
        self._pack(replace(state, iterate=self.model.m_step(state.statistics, kept=kept)))

    @cached_property
    def blocks(self) -> BlockKernel:
        """The same state, to learn whole mini-batches."""
        with _announced():
            from stream_em.block_kernel import BlockKernel

            return BlockKernel(self)

    @property
    def winner(self) -> int:
        """Id of the most responsible component of the event scored last."""
        return self.ids[int(self.vector[compiled.WINNER])]

    @property
    def responsibilities(self) -> list[float]:
        """Responsibilities of the event scored last."""
        shares: list[float] = self._shares.tolist()
        return shares


def _sums(part: Part) -> Array:
    assert isinstance(part, Sums)
    return part.values


def _symmetric(lower: Array) -> Array:
    """Return symmetric matrices (..., D, D) of which only the lower halves are filled."""
    return np.where(_lower_half(lower.shape[-1]), lower, lower.swapaxes(-1, -2))


@cache
def _lower_half(size: int) -> npt.NDArray[np.bool_]:
    return np.tri(size, dtype=np.bool_)
