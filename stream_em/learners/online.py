"""Online EM: a mini-batch at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from stream_em.clock import Clock
from stream_em.learners.averaging import Average
from stream_em.learners.fitted import (
    Events,
    FittedMixture,
    NotFittedError,
    Prediction,
    adapted,
    as_prediction,
    count_told,
    foreign_batch,
    with_columns,
)
from stream_em.learners.merging import check_mergeable, grown_statistics, origin_of
from stream_em.models import Mixture, MixtureParameters
from stream_em.models.mixture import Posterior
from stream_em.numerics import Array, check_whole, compiled_or_none
from stream_em.schedules import LEAST_SHARE, Constant, HalfLife, Harmonic, RobbinsMonro, Schedule
from stream_em.schema import UNKNOWN_POLICIES, Batch, FieldCounts, Schema, SchemaError, in_memory
from stream_em.seeding import concatenate
from stream_em.seeding import seed as seed_parameters
from stream_em.state import State, has_compiled_blocks, has_compiled_form
from stream_em.statistics import MergeError, Statistics, Window
from stream_em.structure import AdaptiveComponents, StructureChanges, StructureState
from stream_em.truncation import ExpandingTruncations, TruncationState

if TYPE_CHECKING:
    from stream_em.event_kernel import EventKernel
    from stream_em.learners.batch import BatchEM

STEPS_NEED_EVENTS = "each step of the schedule is one mini-batch, which needs an event to move the statistics towards"
M_STEPS_NEED_EVENTS = "an M-step needs the statistics of an event"

# Mini-batches, of a thousand events, after which compiled code would have saved about as long as it takes to load.
COMPILE_AFTER = 4_000
# From so many that are still to come on, it saves more than it takes to load.
WORTH_COMPILING = 1_500
Scored = list[tuple[Prediction, npt.NDArray[np.int64]]]
"""Predictions of the pieces of an update, with the ids of the components at the time."""


class OnlineEM(FittedMixture):
    """Online (stepwise) EM, Cappé & Moulines (2009).

    Events are taken in mini-batches; each is scored, its expected statistics are merged into the
    discounted state, and the M-step follows. Until `warm_up` events have come they are kept aside; then
    k-means++ and a few batch iterations over them give the first parameters. Predictions are
    defined from the start: before any event log p is 0, during the warm-up it is that of a single
    component fitted to what was seen, and all components are equally responsible.

    Parameters
    ----------
    model
        The mixture.
    schedule
        `RobbinsMonro`, `Harmonic`, `Constant` or, to forget with event time, `HalfLife`.
    schema
        Fields of the events; inferred from the first events when None.
    unknown
        What an inferred schema does with fields never seen before: "refuse", "ignore" or "add".
    batch_size
        Events in a mini-batch, which is the unit of the schedule's steps. A larger update is taken in
        pieces of this size; a smaller one counts as a fraction of a step.
    warm_up
        Events seen before the first parameters; by default 20 for each component, at least 200, but no more than
        a `window` holds.
    initial_parameters
        Start from these and skip the warm-up; needs `schema`.
    first_m_step
        With `initial_parameters`: events whose statistics are gathered before the first M-step.
    averaging
        Whether `parameters` is the running average (Polyak & Ruppert) over the second half of the
        updates or more, never less than the last half and never more than the last three quarters of
        them. E-steps go on from the last iterate.
    window
        Learn from the newest events only, no more than this many: a sliding window, which mini-batches enter and leave
        as a whole, and so do the events of the warm-up. Within it all events count alike, so the schedule is
        `Harmonic`, the default then, or `HalfLife`. Its statistics are held for each mini-batch in it.
    structure
        `AdaptiveComponents` for a number of components that follows the events; None to keep that of the model.
    truncation
        `ExpandingTruncations` to put parameters that go astray back to the start; None to let them go.
    seed
        Seed of the warm-up's random choices.

    Raises
    ------
    ValueError
        When a number is out of range, `initial_parameters` come without `schema`, or a `window` has less room than
        a mini-batch or the warm-up, or another schedule; when two of `window`, `structure` and `truncation` are
        given, or the memory is too short for the `structure`.

    Notes
    -----
    A learner is not locked, and a score taken during an update may be of neither state. Where threads share one, hold
    a lock for both; or give each thread a `fork`.

    Attributes
    ----------
    ignored_fields
        Names of unknown fields that were ignored, with the number of events that held them; names beyond a thousand
        are counted together.

    >>> from stream_em import Gaussian
    >>> generator = np.random.default_rng(0)
    >>> events = generator.normal(size=(2_000, 2)) + 8.0 * generator.integers(2, size=(2_000, 1))
    >>> learner = OnlineEM(Mixture(Gaussian(), n_components=2), seed=0).update(events)
    >>> np.abs(np.sort(learner.parameters.components.mean[:, 0])).round()
    array([0., 8.])
    >>> learner.n_events, learner.warming_up
    (2000, False)

    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "schedule",
        "unknown",
        "batch_size",
        "warm_up",
        "first_m_step",
        "averaging",
        "window",
        "structure",
        "truncation",
        "seed",
    )

    def __init__(
        self,
        model: Mixture,
        *,
        schedule: Schedule | None = None,
        schema: Schema | None = None,
        unknown: Literal["refuse", "ignore", "add"] = "refuse",
        batch_size: int = 1000,
        warm_up: int | None = None,
        initial_parameters: MixtureParameters | None = None,
        first_m_step: int = 20,
        averaging: bool = False,
        window: int | None = None,
        structure: AdaptiveComponents | None = None,
        truncation: ExpandingTruncations | None = None,
        seed: int = 0,
    ) -> None:
        check_whole(why=STEPS_NEED_EVENTS, batch_size=batch_size)
        check_whole(why=M_STEPS_NEED_EVENTS, warm_up=1 if warm_up is None else warm_up, first_m_step=first_m_step)
        check_whole(why=M_STEPS_NEED_EVENTS, window=1 if window is None else window)
        check_whole(least=0, below=None, seed=seed)
        if unknown not in UNKNOWN_POLICIES:
            raise ValueError(f"unknown={unknown!r}, expected one of {', '.join(UNKNOWN_POLICIES)}")
        if initial_parameters is not None and schema is None:
            raise ValueError("initial_parameters need the schema they are for")
        for name, value, kind in (
            ("structure", structure, AdaptiveComponents),
            ("truncation", truncation, ExpandingTruncations),
        ):
            if not isinstance(value, kind | None):
                raise ValueError(f"{name} must be {kind.__name__}() or None, got {value!r}")
        _check_alone(window=window, structure=structure, truncation=truncation)
        super().__init__(model, initial_parameters, schema)
        usual = RobbinsMonro() if window is None else Harmonic()
        self._schedule: Schedule = _checked(usual if schedule is None else schedule, window)
        self.unknown: Literal["refuse", "ignore", "add"] = unknown
        self._batch_size = batch_size
        usual_warm_up = max(200, 20 * model.n_components)
        if window is not None:
            usual_warm_up = min(usual_warm_up, window)
        self.warm_up = usual_warm_up if warm_up is None else warm_up
        self.first_m_step = first_m_step
        self.averaging = averaging
        self.window = window
        self.structure = structure
        self.truncation = truncation
        self.seed = seed
        if window is not None:
            _check_room(window, batch_size, self.warm_up)
        if structure is not None and self._bound is not None:
            structure.check_memory(self._bound, model.n_components, self._memory)
        self._window = Window()
        self._clock = Clock()
        self._structure = StructureState()
        self._truncation = TruncationState()
        self.ignored_fields: Counter[str] = FieldCounts()
        self.origin = "" if initial_parameters is None else origin_of(initial_parameters)
        self._known = State(iterate=initial_parameters)
        self._kernel: EventKernel | None = None
        self._compiles = True
        self._compiles_at_once = False
        self._average = Average()
        self._buffer: list[Batch] = []
        self._unseen: tuple[int, ...] = ()

    def _progress_text(self) -> str:
        return f", {self.n_events:,} events" + (", warming up" if self.warming_up else "")

    @property
    def _state(self) -> State:
        """What was learned so far, brought up to date with the single events that compiled code has learned."""
        if self._kernel is not None and self._kernel.ahead:
            self._known = self._kernel.collect()
            self._parameters = self._known.iterate
        return self._known

    @_state.setter
    def _state(self, state: State) -> None:
        self._known, self._kernel = state, None

    def __getstate__(self) -> dict[str, Any]:
        state = self._state
        # What was worked out to answer during the warm-up is no part of what was learned.
        parameters = None if state.iterate is None else self._parameters
        return dict(self.__dict__, _known=state, _kernel=None, _parameters=parameters, _compiles=True)

    def __copy__(self) -> Self:
        # A copy that shared the events kept for the warm-up would hand its own to the original.
        return deepcopy(self)

    @property
    def schedule(self) -> Schedule:
        """Step sizes; they can be changed at any time, but in the warm-up not to `HalfLife`, which needs its times."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        half_life = _checked(schedule, self.window).half_life
        if half_life is not None and any(batch.time is None for batch in self._buffer):
            raise ValueError("the events kept aside for the warm-up have no times: set HalfLife after finish_warm_up()")
        self._schedule = schedule
        # The kernel has a copy; what it has learned is taken over before it is dropped.
        state = self._state
        if state.statistics is not None:

            def refer(one: Statistics) -> Statistics:
                return replace(one, half_life=half_life, time=None if half_life is None else one.time)

            self._window = self._window.apply(refer)
            state = replace(state, statistics=refer(state.statistics))
        self._state = state

    @property
    def batch_size(self) -> int:
        """Events in a mini-batch; it can be changed at any time."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        check_whole(why=STEPS_NEED_EVENTS, batch_size=batch_size)
        if self.window is not None:
            _check_room(self.window, batch_size, self.warm_up)
        self._batch_size = batch_size
        self._state = self._state

    @property
    def n_events(self) -> int:
        """Events learned; those of weight 0 are not."""
        return self._known.n_events if self._kernel is None else self._kernel.n_events

    @property
    def statistics(self) -> Statistics | None:
        """The discounted expected sufficient statistics, or None during the warm-up."""
        return self._state.statistics

    @property
    def weights(self) -> Array:  # noqa: D102 - inherited
        # All other parameters need not be brought up to date for it.
        kernel = self._kernel
        return kernel.mixing_weights if kernel is not None and kernel.ahead else super().weights

    @property
    def n_ahead(self) -> int:
        """Events dated so far ahead that `HalfLife` with `max_ahead` did not believe it."""
        return self._clock.n_ahead

    @property
    def structure_changes(self) -> StructureChanges:
        """How often components were born, died, merged and split; all 0 without `structure`."""
        return self._structure.changes

    @property
    def truncations(self) -> int:
        """How often the parameters were put back to the start; 0 without `truncation`."""
        return self._truncation.count

    @property
    def warming_up(self) -> bool:
        """Whether the first parameters are still to come."""
        return self._known.iterate is None

    @property
    def warm_up_left(self) -> int:
        """Events with weight that are still to come before the first parameters; 0 after the warm-up."""
        return max(0, self.warm_up - sum(one.n_events for one in self._buffer)) if self.warming_up else 0

    @property
    def parameters(self) -> MixtureParameters:
        """The current parameters; during the warm-up those of identical components fitted to what was seen.

        Raises
        ------
        NotFittedError
            Before any event was seen.

        """
        state = self._state
        if self._parameters is None and self._buffer:
            assert state.iterate is None
            self._parameters = self._bound_model().pooled(concatenate(self._buffer))
        return super().parameters

    def encode(  # noqa: D102 - inherited
        self,
        events: Events,
        weight: npt.ArrayLike | None = None,
        time: npt.ArrayLike | None = None,
        *,
        on_error: Literal["raise", "collect"] = "raise",
        extend: bool = False,
    ) -> Batch:
        if isinstance(events, Batch):
            # It may be of an earlier or later state of the schema, which learning and scoring adapt to.
            return events.schema.encode(events, weight, time)
        schema = self._schema
        if schema is None:
            # A stream is read by the inference, so it must be kept for the encoding.
            events = in_memory(events)
            schema = Schema.infer(events, unknown=self.unknown)
        batch = schema.encode(events, weight, time, on_error=on_error, extend=extend)
        return batch if on_error == "raise" else self._screened(batch)

    def update(self, events: Events, weight: npt.ArrayLike | None = None, time: npt.ArrayLike | None = None) -> Self:
        """Learn from any number of events; return the learner.

        Parameters
        ----------
        events
            A dict, a list of dicts, an array (n, D), a frame, or an encoded `Batch`.
        weight
            Sample weights (n,), finite and >= 0.
        time
            Event times (n,); needed by `HalfLife`, in its units.

        Raises
        ------
        EventError, SchemaError
            When an event or the frame cannot be used; the learner is then exactly as before.

        """
        if type(events) is dict and time is None and isinstance(weight, float | int | None):
            kernel = self.kernel()
            if kernel is not None and kernel.learn(events, 1.0 if weight is None else weight) is not None:
                return self
        if weight is None and time is None and self._learn_rows(events, keep=False) is not None:
            return self
        self._learn(self.encode(events, weight, time, extend=True), None)
        return self

    def expect(self, n_events: int) -> Self:
        """Make ready for so many events, and return the learner.

        For many mini-batches compiled code, where there is some, is loaded with the first of them, which takes about
        half a second; else it is only after thousands, when it would have saved that much.

        Parameters
        ----------
        n_events
            Events that are still to come, at least.

        Examples
        --------
        >>> from stream_em import Gaussian, Mixture, OnlineEM
        >>> OnlineEM(Mixture(Gaussian(), 3)).expect(2_000_000).n_events
        0

        """
        check_whole(least=0, n_events=n_events)
        self._compiles_at_once = n_events >= WORTH_COMPILING * self.batch_size
        return self

    def kernel(self) -> EventKernel | None:
        """Return this learner's state as compiled code holds it, for single events, or None.

        There is none during the warm-up, without Numba, and for what has no compiled form: `averaging`, `window`,
        `structure`, `truncation`, `HalfLife`, families and schedules from outside this library. What the kernel
        learns, the learner has learned.
        """
        return self._kernel_with("learn", has_compiled_form)

    def _kernel_with(self, part: str, has_form: Callable[[Mixture, Schedule], bool]) -> EventKernel | None:
        """Return the kernel once a part of it is compiled, None where there is no compiled form or no way to it."""
        kernel = self._kernel
        if self.averaging or self.window is not None or not (self.structure is None and self.truncation is None):
            return None
        if kernel is not None and part in kernel.__dict__:
            return kernel
        state, bound, schema = self._known, self._bound, self._schema
        if bound is None or schema is None or not self._compiles or not has_form(bound, self.schedule):
            return None
        if kernel is None and (
            state.statistics is None
            or not state.n_updates
            or self._unseen
            # A `structure` that was taken away has left as many as it came to.
            or len(state.statistics.component_ids) != bound.n_components
        ):
            return None

        def load() -> EventKernel:
            from stream_em.event_kernel import EventKernel

            loaded = kernel or EventKernel(bound, schema, self.schedule, self.batch_size, state, self.ignored_fields)
            getattr(loaded, part)
            return loaded

        loaded = compiled_or_none(load)
        if loaded is None:
            self._state, self._compiles = self._state, False
        else:
            self._kernel = loaded
        return loaded

    def predict_then_update(
        self, events: Events, weight: npt.ArrayLike | None = None, time: npt.ArrayLike | None = None
    ) -> Prediction:
        """Score each event with what was known before its mini-batch, then learn from it: one E-step for both.

        What was known is the last iterate, also where `averaging` makes `parameters` its average. The columns of the
        responsibilities are the components after the update: where a `structure` took some away meanwhile, theirs
        are left out, and a row sums to less than 1.

        Raises
        ------
        EventError, SchemaError
            As `update`.

        """
        if weight is None and time is None:
            learned = self._learn_rows(events, keep=True)
            if learned is not None:
                return Prediction(*learned)
        batch = self.encode(events, weight, time, extend=True)
        scored: Scored = []
        self._learn(batch, scored)
        if not scored:
            n_components = len(self.component_ids)
            return Prediction(np.empty(0), np.empty(0, dtype=np.int64), np.empty((0, n_components)))
        predictions = [prediction for prediction, _ in scored]
        if self.structure is not None:
            left = self.component_ids
            predictions = [with_columns(prediction, ids, left) for prediction, ids in scored]
        if len(predictions) == 1:
            return predictions[0]
        return Prediction(*(np.concatenate(columns) for columns in zip(*predictions)))

    def _posterior(self, batch: Batch) -> Posterior:
        if self.warming_up:
            return self._warm_up_posterior(batch)
        return super()._posterior(batch)

    def score_events(self, events: Events) -> Prediction:  # noqa: D102 - inherited
        batch = self.encode(events)
        return as_prediction(self._posterior(batch), self.component_ids)

    @property
    def component_ids(self) -> npt.NDArray[np.int64]:
        """Ids (K,) of the components, in the order in which predictions have them; known before any event is."""
        # Events that compiled code has learned meanwhile have changed none.
        iterate = self._known.iterate
        return np.arange(self.model.n_components) if iterate is None else iterate.component_ids

    def _warm_up_posterior(self, batch: Batch) -> Posterior:
        n_components = self.model.n_components
        log_prob = np.zeros(batch.n_events)
        if self._buffer:
            log_prob = super()._posterior(batch).log_prob
        return Posterior(log_prob, np.full((n_components, batch.n_events), 1.0 / n_components))

    def _learn(self, batch: Batch, scored: Scored | None) -> None:
        before = dict(self.__dict__, _buffer=list(self._buffer))
        kernel = self._kernel
        checkpoint = None if kernel is None else kernel.checkpoint()
        try:
            batch, bound = self._accept(batch)
            if self.structure is not None and not self._known.n_updates:
                self.structure.check_memory(bound, len(self.component_ids), self._memory)
            for one in (*self._buffer, batch):
                bound.check(one)
            start = 0
            while start < batch.n_events:
                # None is left where `warm_up` was lowered meanwhile: the next event is the last.
                room = max(1, self.warm_up_left) if self.warming_up else self.batch_size
                stop = min(start + min(room, self.batch_size), batch.n_events)
                piece = batch if stop - start == batch.n_events else batch.select(slice(start, stop))
                if self.warming_up:
                    self._keep_aside(piece, scored)
                else:
                    self._step(bound, piece, scored)
                start = stop
        except BaseException:
            self.__dict__.update(before)
            if kernel is not None and checkpoint is not None:
                kernel.restore(checkpoint)
            raise
        if batch.ignored_fields:
            self.ignored_fields.update(batch.ignored_fields)

    def _accept(self, batch: Batch) -> tuple[Batch, Mixture]:
        """Check that the batch can be learned, grow to its schema, and return it with the bound model."""
        if self.schedule.half_life is not None and batch.time is None:
            raise SchemaError("the schedule HalfLife needs the time of the events: update(events, time=...)")
        known = self._schema
        if known is not None and known.extends(batch.schema):
            return adapted(batch, known), self._bound_model()
        if known is not None and not batch.schema.extends(known):
            raise foreign_batch(batch, known)
        bound = self.model.bind(batch.schema)
        statistics, iterate = self._state.statistics, self._state.iterate
        if statistics is not None and known is not None:
            old = known
            statistics = self._changed(statistics, lambda one: self.model.grow(one, old, batch.schema, batch))
            iterate = self._m_step(bound, statistics)
        elif iterate is not None and known is not None:
            # Until the first M-step there are parameters but no statistics that could grow.
            ignored = Counter(batch.ignored_fields)
            for name, row in zip(batch.schema.names[len(known) :], batch.values[len(known) :]):
                ignored[name] += int(np.count_nonzero(~np.isnan(row)))
            return replace(adapted(batch, known), ignored_fields=ignored), self._bound_model()
        self._buffer = [adapted(one, batch.schema) for one in self._buffer]
        self._structure = self._structure.apply(lambda one: adapted(one, batch.schema))
        self._schema, self._bound = batch.schema, bound
        self._state = replace(self._state, statistics=statistics, iterate=iterate)
        self._parameters = iterate
        self._average = Average()
        return batch, bound

    def _keep_aside(self, piece: Batch, scored: Scored | None) -> None:
        if scored is not None:
            ids = self.component_ids
            scored.append((as_prediction(self._warm_up_posterior(piece), ids), ids))
        # The events belong to the caller, who may reuse their memory; those without weight say nothing.
        told = piece if piece.weight is None else piece.select(np.flatnonzero(piece.weight))
        if told.n_events:
            self._buffer.append(concatenate([told]))
        self._parameters = None
        self._count(piece)
        if self.warm_up_left <= 0:
            self.finish_warm_up()

    def finish_warm_up(self) -> None:
        """Take the first parameters from the events seen so far; does nothing when they are already there.

        Raises
        ------
        NotFittedError
            Before any event was seen.

        """
        if not self.warming_up:
            return
        if not self._buffer:
            raise NotFittedError("the warm-up cannot end before any event was seen")
        before = dict(self.__dict__)
        try:
            self._take_first_parameters(self._bound_model(), concatenate(self._buffer))
        except BaseException:
            self.__dict__.update(before)
            raise

    def _take_first_parameters(self, bound: Mixture, seen: Batch) -> None:
        start = seed_parameters(self.model, seen, np.random.default_rng(self.seed))
        statistics = self._windowed(self._expected(bound, start, seen, None), seen.n_events)
        self._parameters = self._m_step(bound, statistics)
        if self.truncation is not None:
            _, self._truncation = self.truncation.hold(bound, statistics, self._parameters, self._truncation)
        self._state = replace(self._state, statistics=statistics, iterate=self._parameters, n_updates=1)
        # What is known of fields that depend on no other needs no settling once these come.
        unseen = np.isnan(seen.values).all(axis=1) & bound.family.joint_fields(len(seen.values))
        self._unseen = tuple(np.flatnonzero(unseen).tolist())
        self.origin = origin_of(start)
        self._buffer = []

    def _expected(
        self, bound: Mixture, parameters: MixtureParameters, piece: Batch, scored: Scored | None
    ) -> Statistics:
        """E-step on a piece, its statistics expressed at its newest event time under `HalfLife`."""
        half_life, newest = self.schedule.half_life, None
        if half_life is not None:
            piece = self._dated(piece)
            assert piece.time is not None
            told = piece.time if piece.weight is None else piece.time[piece.weight > 0.0]
            newest = float(np.max(told)) if len(told) else None
            reference = piece.time if newest is None else newest
            discount = np.exp2(np.minimum((piece.time - reference) / half_life, 0.0))
            piece = replace(piece, weight=discount if piece.weight is None else piece.weight * discount)
        # Compiled code that takes whole steps is not there for all models; that of the E-step is for more.
        compiled = self._known.n_updates >= COMPILE_AFTER
        if scored is None:
            statistics = bound.e_step(parameters, piece, compiled=compiled)
        else:
            statistics, posterior = bound.e_step_with_posterior(parameters, piece, compiled=compiled)
            scored.append((as_prediction(posterior, parameters.component_ids), parameters.component_ids))
        return statistics if half_life is None else replace(statistics, half_life=half_life, time=newest)

    @property
    def _memory(self) -> float:
        """Events that a learner remembers, as far as the schedule bounds them."""
        return self.batch_size / self.schedule.value if isinstance(self.schedule, Constant) else math.inf

    def _dated(self, piece: Batch) -> Batch:
        """Return a piece with its times as far as they are believed."""
        schedule, statistics = self.schedule, self._state.statistics
        assert piece.time is not None
        told = piece.time if piece.weight is None else piece.time[piece.weight > 0.0]
        if not isinstance(schedule, HalfLife) or schedule.max_ahead is None or not len(told):
            return piece
        newest = None if statistics is None else statistics.time
        self._clock, latest = self._clock.read(told, newest, schedule.max_ahead)
        return replace(piece, time=np.minimum(piece.time, latest))

    def _windowed(self, new: Statistics, n_events: int) -> Statistics:
        """Return what the window comes to with new statistics; without a window, these alone."""
        if self.window is None:
            return new
        self._window = self._window.append(new, n_events, self.batch_size).expire(self.window)
        return self._window.total

    def _changed(self, statistics: Statistics, change: Callable[[Statistics], Statistics]) -> Statistics:
        """Return the changed statistics, and change those of the window and of the start alike."""
        self._window, self._truncation = self._window.apply(change), self._truncation.apply(change)
        return change(statistics)

    def _m_step(
        self,
        bound: Mixture,
        statistics: Statistics,
        *,
        kept: tuple[MixtureParameters, npt.NDArray[np.bool_]] | None = None,
    ) -> MixtureParameters:
        if self.structure is None:
            return bound.m_step(statistics, kept=kept)
        return self.structure.m_step(bound, statistics, kept=kept)

    def _count(self, piece: Batch) -> None:
        state = self._state
        self._state = replace(
            state,
            n_events=state.n_events + count_told(piece),
            total_weight=state.total_weight + piece.total_weight,
        )

    def _step(self, bound: Mixture, piece: Batch, scored: Scored | None) -> None:
        if self._step_compiled(piece, scored):
            return
        if self._unseen and count_told(piece):
            self._settle(bound, piece)
        state = self._state
        assert state.iterate is not None
        if scored is None and self.structure is not None and self.structure.moves:
            scored = []
        new = self._expected(bound, state.iterate, piece, scored)
        if not count_told(piece):
            return
        self._count(piece)
        n_events, total_weight = self._state.n_events, self._state.total_weight
        statistics = self._windowed(new, count_told(piece))
        if state.statistics is not None and self.window is None:
            statistics = state.statistics
            retention = self.schedule.retention(
                n_events / self.batch_size, total_weight, piece.total_weight, statistics.total_weight
            )
            statistics = (statistics if retention == 1.0 else statistics.scale(retention)).merge(new)
        if not state.n_updates and n_events < self.first_m_step:
            self._state = replace(self._state, statistics=statistics)
            return
        kept = None
        if state.n_updates and n_events // self.batch_size == state.n_events // self.batch_size:
            # Between whole mini-batches, the components that have next to nothing of the new events stay.
            kept = state.iterate, ~(new.weights > LEAST_SHARE * piece.total_weight)
        iterate = self._m_step(bound, statistics, kept=kept)
        statistics, iterate = self._revised(bound, statistics, iterate, piece, scored)
        self._state = State(statistics, iterate, n_events, total_weight, state.n_updates + 1)
        if self.averaging:
            self._average = self._average.include(iterate, self._state.n_updates)
        self._parameters = self._average.reported if self.averaging else iterate

    def _revised(
        self, bound: Mixture, statistics: Statistics, iterate: MixtureParameters, piece: Batch, scored: Scored | None
    ) -> tuple[Statistics, MixtureParameters]:
        """Return what was learned after the changes that `structure` or `truncation` make to it."""
        revised = statistics
        if self.structure is not None:
            log_prob = scored[-1][0].log_prob if scored else None
            revised, self._structure = self.structure.revise(
                bound, statistics, iterate, self._structure, piece, log_prob, self.n_events, self.seed
            )
        elif self.truncation is not None:
            revised, self._truncation = self.truncation.hold(bound, statistics, iterate, self._truncation)
        if revised is statistics:
            return statistics, iterate
        self._average = Average()
        return revised, self._m_step(bound, revised)

    def _step_compiled(self, piece: Batch, scored: Scored | None) -> bool:
        """Take the step in compiled code, where there is some; return whether it was taken."""
        # Loading it takes as long as many steps in NumPy.
        if piece.observed is not None or (
            self._kernel is None and not self._compiles_at_once and self._known.n_updates < COMPILE_AFTER
        ):
            return False
        kernel = self._kernel_with("blocks", has_compiled_blocks)
        if kernel is None:
            return False
        learned = kernel.blocks.learn(piece.values, piece.weight, keep=scored is not None)
        if learned is None:
            return False
        if scored is not None:
            assert self._known.iterate is not None
            scored.append((Prediction(*learned), self._known.iterate.component_ids))
        return True

    def _learn_rows(self, rows: Any, *, keep: bool) -> tuple[Array, npt.NDArray[np.int64], Array] | None:
        """Learn from an array that is no more than a mini-batch in compiled code, as it is; None where that cannot be.

        Encoding and checking a small array take longer than learning from it.
        """
        if self._kernel is None or type(rows) is not np.ndarray:
            return None
        kernel = self._kernel_with("blocks", has_compiled_blocks)
        if kernel is None or not kernel.schema.takes_form(rows) or len(rows) > self._batch_size:
            return None
        checkpoint = kernel.checkpoint()
        try:
            return kernel.blocks.learn(rows.T, keep=keep)
        except BaseException:
            kernel.restore(checkpoint)
            raise

    def _settle(self, bound: Mixture, piece: Batch) -> None:
        """Take in fields that had no value in the warm-up, if they have one now."""
        unseen = np.array(self._unseen, dtype=np.intp)
        absent = np.logical_and.reduce(np.isnan(piece.values[unseen]), axis=1)
        statistics = self._state.statistics
        if not absent.all() and statistics is not None:
            self._unseen = tuple(unseen[absent].tolist())
            statistics = self._changed(statistics, lambda one: self.model.settle(one, unseen[~absent], piece))
            self._parameters = self._m_step(bound, statistics)
            self._state = replace(self._state, statistics=statistics, iterate=self._parameters)

    def grow(self, batch: Batch) -> Self:
        """Take in the new fields and categories of a batch's schema; return the learner.

        Parameters
        ----------
        batch
            Events that say what the new fields hold; nothing is learned from them.

        Raises
        ------
        FamilyError, SchemaError
            When a field has no family, or the batch's schema does not go on from this learner's.

        """
        self._state = self._state
        self._accept(batch)
        return self

    def forget(self, weight: float) -> Self:
        """Let all that was learned so far count for no more than this weight of events; return the learner.

        Until the schedule's own memory is filled again, new events count for as much as if the learner were that young.

        Raises
        ------
        ValueError
            When the weight is negative or not finite.

        """
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {weight!r}: learned events cannot count negative")
        state = self._state
        if state.statistics is not None and state.statistics.total_weight > weight:
            retention = weight / state.statistics.total_weight
            statistics = self._changed(state.statistics, lambda one: one.scale(retention))
            self._state = replace(state, statistics=statistics)
        return self

    def renumber(self, component_ids: npt.NDArray[np.int64]) -> Self:
        """Give the components other ids (K,), so that they are not taken for those of another learner.

        Raises
        ------
        NotFittedError
            During the warm-up, when there are no components yet.
        ValueError
            When the ids are not K different ones.

        """
        state = self._state
        if state.iterate is None or state.statistics is None:
            raise NotFittedError("a learner that is still warming up has no components that could be renumbered")
        n_components = state.iterate.n_components
        if component_ids.shape != (n_components,) or len(np.unique(component_ids)) != n_components:
            raise ValueError(f"component_ids must be {n_components} different numbers, got {component_ids}")
        iterate = replace(state.iterate, component_ids=component_ids)
        statistics = self._changed(state.statistics, lambda one: replace(one, component_ids=component_ids))
        self._state = replace(state, iterate=iterate, statistics=statistics)
        self._parameters, self._average = iterate, Average()
        return self

    def merge(self, other: OnlineEM) -> OnlineEM:
        """Return a learner that has learned what both have; neither is changed.

        With a `structure` the two may have different components, which are merged by their ids. One that was born
        in, or has died in, one of the two only, lives, with the statistics of the learner that has it; updates of the
        merged learner see whether it stays. With a `truncation` the merged state is the new start.

        Raises
        ------
        MergeError
            When the two do not descend from the same start, are still warming up, or slide a window.

        """
        schema = check_mergeable(self, other)
        if not (self.window is None and other.window is None):
            raise MergeError(
                "learners with a window cannot be merged: which events are the newest of both depends on an order "
                "that their blocks do not keep; merge learners with HalfLife, whose forgetting commutes with merging"
            )
        for what, mine, theirs in (
            ("schedules", self.schedule, other.schedule),
            ("structures", self.structure, other.structure),
            ("truncations", self.truncation, other.truncation),
        ):
            if mine != theirs:
                raise MergeError(f"{what} differ: {mine} and {theirs}")
        grown = self if schema is self.schema else other
        merged = self._like(schema=schema, initial_parameters=grown._state.iterate)
        told = [grown_statistics(one, schema) for one in (self, other) if one.statistics is not None]
        for one in (self, other):
            merged._count_with(one)
        merged.origin = self.origin
        merged._unseen = tuple(position for position in self._unseen if position in other._unseen)
        first, second = self._state, other._state
        state = replace(
            merged._state,
            n_events=first.n_events + second.n_events,
            total_weight=first.total_weight + second.total_weight,
            n_updates=first.n_updates + second.n_updates,
        )
        if told:
            statistics = self._merge_all(told)
            merged._parameters = merged._m_step(merged._bound_model(), statistics)
            state = replace(state, statistics=statistics, iterate=merged._parameters)
        merged._state = state
        return merged

    def _count_with(self, other: OnlineEM | BatchEM) -> None:
        """Count what another has ignored, not believed, changed and put back as well, and begin anew after it."""
        self.ignored_fields.update(other.ignored_fields)
        if isinstance(other, OnlineEM):
            self._clock = Clock(n_ahead=self.n_ahead + other.n_ahead)
            self._structure = self._structure.merge(other._structure)
            self._truncation = self._truncation.merge(other._truncation)

    def _merge_all(self, told: Iterable[Statistics]) -> Statistics:
        """Merge statistics of forks: those of a structure may have lost and gained components."""
        return reduce(Statistics.merge if self.structure is None else Statistics.merge_by_id, told)

    def fork(self) -> OnlineEM:
        """Return a learner with these parameters that has learned nothing yet, for another share of the events.

        Forks of one learner can be merged with each other and with it.

        Raises
        ------
        NotFittedError
            During the warm-up, when there are no components yet to share.

        """
        if self.warming_up:
            raise NotFittedError("a learner that is still warming up has no components to share with a fork")
        fork = self._like(schema=self._known_schema(), initial_parameters=self.parameters)
        fork.origin = self.origin
        fork._unseen = self._unseen
        return fork

    def resume(self, statistics: Statistics, n_events: int) -> Self:
        """Go on from statistics that the initial parameters were fitted to; return the learner.

        Parameters
        ----------
        statistics
            Expected sufficient statistics of a batch fit.
        n_events
            Events they are of.

        Raises
        ------
        ValueError
            When the learner has learned already, or has no initial parameters, or when the schedule forgets with event
            time and the statistics do not say of what time they are.

        """
        if self.warming_up or self.statistics is not None:
            raise ValueError("only a learner with initial parameters that has learned nothing yet can resume a fit")
        if statistics.half_life != self.schedule.half_life:
            raise ValueError(
                f"the statistics have half_life={statistics.half_life} and the schedule {self.schedule.half_life}; "
                "give them that of the schedule, and the time that they are of: "
                "dataclasses.replace(statistics, half_life=..., time=...)"
            )
        statistics = self._windowed(statistics, n_events)
        self._state = replace(
            self._state, statistics=statistics, n_events=n_events, total_weight=statistics.total_weight, n_updates=1
        )
        return self

    def _like(self, **more: Any) -> Self:
        return type(self)(self.model, **{name: getattr(self, name) for name in self.OPTIONS}, **more)


def _checked(schedule: Schedule, window: int | None) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be Harmonic(), RobbinsMonro(), Constant() or HalfLife(), got {schedule!r}")
    if window is not None and not isinstance(schedule, Harmonic | HalfLife):
        raise ValueError(
            f"a window forgets by leaving events out, and {schedule!r} by step sizes: with a window the schedule is "
            "Harmonic() or HalfLife()"
        )
    return schedule


def _check_alone(**given: Any) -> None:
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(
            f"{named[0]} and {named[1]} cannot be had together: components that come or go have no part in the "
            "events of a window or in a start to be put back to, and a window forgets whatever goes astray"
        )


def _check_room(window: int, batch_size: int, warm_up: int) -> None:
    if window < max(batch_size, warm_up):
        raise ValueError(
            f"window must hold at least a mini-batch ({batch_size} events) and the warm-up ({warm_up} events), got "
            f"{window}; set batch_size or warm_up lower"
        )
