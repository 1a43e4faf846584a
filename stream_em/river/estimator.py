"""What the three estimators share: one learner each, and the short way to its compiled code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from river import base

from stream_em.families import Family, Product
from stream_em.families.gaussian import CovarianceType
from stream_em.learners import BatchEM, OnlineEM, Prediction
from stream_em.models import Mixture
from stream_em.numerics import check_whole
from stream_em.river.features import Features, IgnoredFeatures, aligned, warn_of_full
from stream_em.schedules import Constant, RobbinsMonro, Schedule
from stream_em.schema import Batch, Field, Kind, Schema, _is_missing
from stream_em.store import from_bytes, metadata_from_bytes, save

if TYPE_CHECKING:
    from stream_em.event_kernel import EventKernel
    from stream_em.river.frames import Frame

Unknown = Literal["add", "ignore", "refuse"]
OnDrift = Literal["forget", "reseed"]

# Of fewer events it cannot be told what is usual: log p(x) is 0 until then.
GRACE = 10


# Under which a snapshot's metadata hold what is the estimator's and not the learner's.
METADATA_KEY = "stream_em.river"


class Answer(NamedTuple):
    """What the model says of one event: log p, the winning component, and the responsibilities with their ids."""

    log_prob: float
    winner: int
    responsibilities: list[float]
    ids: list[int]


class _StepSize:
    """A parameter of the step sizes: it can be changed at any time, and takes effect with the next event."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, estimator: Any, owner: type | None = None) -> Any:
        return self if estimator is None else estimator.__dict__[self._name]

    def __set__(self, estimator: Any, value: Any) -> None:
        before = estimator.__dict__.get(self._name)
        estimator.__dict__[self._name] = value
        if hasattr(estimator, "_learner"):
            try:
                estimator._reschedule()
            except BaseException:
                estimator.__dict__[self._name] = before
                raise


class MixtureEstimator(base.Estimator):
    """Base of the estimators; it has none of River's roles."""

    alpha = _StepSize()
    offset = _StepSize()
    step_size = _StepSize()

    STEP_SIZES: ClassVar[tuple[str, ...]] = ("alpha", "offset", "step_size")
    # Parameters that the learner does not know.
    KEPT_PARAMS: ClassVar[tuple[str, ...]] = ("max_features", "on_drift")

    _learner: OnlineEM
    _kernel: EventKernel | None
    _learn: Callable[[Mapping[str, Any], float], float | None]
    _score: Callable[[Mapping[str, Any]], float | None]
    _winner: Callable[[Mapping[str, Any]], int | None]

    def __init__(
        self,
        n_components: int = 5,
        covariance_type: CovarianceType = "full",
        family: Family | None = None,
        kinds: dict[str, Kind] | None = None,
        prior_weight: float = 0.01,
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
    ) -> None:
        check_whole(max_features=max_features)
        if on_drift not in ("forget", "reseed"):
            raise ValueError(f'on_drift must be "forget" or "reseed", got {on_drift!r}')
        if unknown == "add" and isinstance(family, Product) and family.others is None:
            raise ValueError(
                "the family names the family of each feature, so there is none for new ones: "
                'pass unknown="ignore", or say Product(..., others="full")'
            )
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.family = family
        self.kinds = kinds
        self.prior_weight = prior_weight
        self.alpha = alpha
        self.offset = offset
        self.step_size = step_size
        self.batch_size = batch_size
        self.warm_up = warm_up
        self.unknown = unknown
        self.max_features = max_features
        self.drift_detector = drift_detector
        self.on_drift = on_drift
        self.seed = seed
        self._seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._features = Features(kinds or {}, self._family(), unknown, max_features)
        self._n_drifts = 0
        self._watches = drift_detector is not None
        self._detector = None if drift_detector is None else drift_detector.clone()
        self._refractory = 0
        self._successor: OnlineEM | None = None
        self._learner = self._make_learner(None)
        self._unbind()

    @classmethod
    def _unit_test_params(cls) -> Any:
        yield {"n_components": 3, "warm_up": 40}
        yield {"n_components": 3, "warm_up": 40, "covariance_type": "diag", "step_size": 0.05}

    @property
    def _mutable_attributes(self) -> set[str]:
        return set(self.STEP_SIZES)

    @property
    def _raw_memory_usage(self) -> int:
        # Compiled code refers to all of Numba; it is no part of the model.
        self._unbind()
        kernel, self._learner._kernel = self._learner._kernel, None
        try:
            return int(super()._raw_memory_usage)
        finally:
            self._learner._kernel = kernel

    @property
    def n_drifts(self) -> int:
        """Drifts that were acted on."""
        return self._n_drifts

    @property
    def ignored_features(self) -> dict[str, int]:
        """Features that were ignored, with the number of events that held them."""
        return dict(self._learner.ignored_fields)

    def to_learner(self) -> OnlineEM:
        """Return a copy of the learner, with its parameters and statistics; it goes on from here on its own."""
        return copy.deepcopy(self._learner)

    def to_snapshot(self, path: str | Path) -> None:
        """Write what was learned to a snapshot file, which `stream_em.load` and the command `stream-em` read as well.

        A drift detector is code and no part of it, nor are a warm-up that a drift began and the values of features that
        have not joined yet.
        """
        save(self._learner, path, metadata={METADATA_KEY: self._kept()})

    def _kept(self) -> dict[str, Any]:
        """Return, as plain data, what a snapshot of the learner does not hold."""
        return {"params": {name: getattr(self, name) for name in self.KEPT_PARAMS}}

    def _restore(self, kept: Mapping[str, Any]) -> None:
        """Take back what `_kept` returned, but for the parameters."""

    @classmethod
    def from_snapshot(cls, path: str | Path, **params: Any) -> Self:
        """Return an estimator that goes on from a snapshot, for instance one that `stream-em run` has written.

        Parameters
        ----------
        path
            The snapshot file.
        params
            Parameters that a snapshot does not hold, such as `drift_detector`, and others to go on with: step sizes,
            `max_features`, `on_drift` and `calibration_window`.

        Returns
        -------
        The estimator. What has no parameter here (averaging, hard assignment, forgetting by event time) stays as the
        snapshot has it, and a clone starts without it.

        Raises
        ------
        ValueError
            When a parameter is another than that of the snapshot.

        """
        content = Path(path).read_bytes()
        learner = from_bytes(content, source=str(path))
        # None where the snapshot was written by something else, such as the command.
        kept = metadata_from_bytes(content, source=str(path)).get(METADATA_KEY) or {"params": {}}
        if isinstance(learner, BatchEM):
            learner = learner.to_online()
        known = _params_of(learner)
        for name in known.keys() & params.keys() - set(cls.STEP_SIZES):
            if params[name] != known[name]:
                raise ValueError(
                    f"{name}={params[name]!r} differs from the snapshot, which was learned with {known[name]!r}; leave "
                    "it out, or start anew"
                )
        # Written by another of the estimators, it may name parameters that this one does not have.
        own = {name: kept["params"][name] for name in cls.KEPT_PARAMS if name in kept["params"]}
        estimator = cls(**{**known, **own, **params})
        learner.ignored_fields = IgnoredFeatures(learner.ignored_fields)
        estimator._learner = learner
        if params.keys() & set(cls.STEP_SIZES):
            estimator._reschedule()
        estimator._restore(kept)
        estimator._bind()
        return estimator

    def clone(self, new_params: dict[str, Any] | None = None, include_attributes: bool = False) -> Self:
        """Return an estimator with the same parameters that has learned nothing, see `river.base.Base.clone`."""
        # A copy of a bound method would be bound to a kernel of nobody's.
        self._unbind()
        return super().clone(new_params, include_attributes)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _kernel=None, _learn=_not_learned, _score=_not_scored, _winner=_not_scored)

    def _make_learner(self, schema: Schema | None) -> OnlineEM:
        learner = OnlineEM(
            Mixture(self._family(), self.n_components, self.prior_weight),
            schedule=self._schedule(),
            schema=schema,
            unknown=self.unknown,
            batch_size=self.batch_size,
            warm_up=self.warm_up,
            seed=self._seed,
        )
        learner.ignored_fields = IgnoredFeatures()
        return learner

    def _family(self) -> Family:
        return Product({}, others=self.covariance_type) if self.family is None else self.family

    def _schedule(self) -> Schedule:
        decreasing = RobbinsMonro(self.alpha, self.offset)
        return decreasing if self.step_size is None else Constant(self.step_size)

    def _reschedule(self) -> None:
        schedule = self._schedule()
        for learner in (self._learner, self._successor):
            if learner is not None:
                learner.schedule = schedule
        self._unbind()

    # One event at a time. What `_learn` and `_score` are bound to takes nearly every event, by itself.

    def learn_one(self, x: dict[Hashable, Any], w: float = 1.0) -> None:
        """Learn from an event.

        Parameters
        ----------
        x
            A dictionary of features; None, NaN and absent ones are missing.
        w
            Weight of the event, >= 0.

        """
        log_prob = self._learn(x, w)  # type: ignore[arg-type]
        if log_prob is None:
            self._learn_otherwise(x, w)
        elif self._watches:
            self._watch_learned(log_prob, w)

    def _unbind(self) -> None:
        self._kernel, self._learn, self._score, self._winner = None, _not_learned, _not_scored, _not_scored

    def _bind(self) -> None:
        """Take the short way to the kernel where there is one, and nothing else has to learn the events."""
        self._unbind()
        self._kernel = kernel = self._learner.kernel()
        if kernel is not None and not self._features.labels:
            self._score, self._winner = kernel.score, kernel.predict
            if self._successor is None:
                self._learn = kernel.learn

    def _learn_otherwise(self, x: Mapping[Hashable, Any], w: float) -> None:
        event = self._features.named(x)
        log_prob = [self._ask(event).log_prob] if self._watches and w != 0.0 else []
        learner, warming_up, schema = self._learner, self._learner.warming_up, self._learner.schema
        self._update(event, w)
        if learner.schema is not schema:
            warn_of_full(schema, learner.schema, stacklevel=4)
        if event is not x:
            self._features.remember_labels({str(name): name for name in x if not isinstance(name, str)})
        self._watch_all(log_prob, learner, warming_up)
        self._bind()

    def _update(self, event: Mapping[str, Any], w: float) -> None:
        learner, features, schema = self._learner, self._features, self._learner.schema
        kernel = learner.kernel()
        if kernel is not None and kernel.learn(event, w) is not None:
            self._teach_successor(event, w)
            return
        if schema is None:
            learner.update(features.schema_of(event).encode(dict(event), w, extend=True))
            return
        if self.unknown == "refuse":
            learner.update(dict(event), w)
            self._teach_successor(event, w)
            return
        inside, newcomers, ignored = features.split(event, learner, schema)
        if not all(map(_is_missing, inside.values())) or not (newcomers or ignored):
            learner.update(inside, w)
            self._teach_successor(inside, w)
        self._count_others(newcomers, {name: [event[name]] for name in newcomers}, dict.fromkeys(ignored, 1), w != 0.0)

    def _count_others(
        self, newcomers: Mapping[str, Any], values: Mapping[str, list[Any]], ignored: Mapping[str, int], told: bool
    ) -> None:
        """Count what was ignored, and keep the values of features that have yet to join."""
        learner = self._learner
        learner.ignored_fields.update(ignored)
        if newcomers and told:
            assert learner.schema is not None
            joining = self._features.welcome(newcomers, values, learner, learner.schema)
            for one in (learner, self._successor):
                if joining is not None and one is not None:
                    one.grow(joining)

    def _ask(self, event: Mapping[Any, Any]) -> Answer:
        """Return what the model says of an event that did not go the short way; nothing is learned."""
        named = self._features.named(event)
        if self._kernel is None:
            self._bind()
        kernel = self._kernel
        if kernel is not None and (log_prob := kernel.score(named)) is not None:
            return Answer(log_prob, kernel.winner, kernel.responsibilities, kernel.ids)
        prediction = self._predict([dict(named)], 1)
        responsibilities = prediction.responsibilities[0].tolist()
        return Answer(
            float(prediction.log_prob[0]), int(prediction.component[0]), responsibilities, self._component_ids()
        )

    def _component_ids(self) -> list[int]:
        ids: list[int] = self._learner.component_ids.tolist()
        return ids

    # Many events at a time.

    def learn_many(self, X: Any, w: npt.ArrayLike | None = None) -> None:
        """Learn from a frame of events, in mini-batches.

        Parameters
        ----------
        X
            A pandas, polars or Arrow frame, or a record batch, with a column for each feature. Columns may come and
            go between calls; what is null or NaN is missing.
        w
            Weights (n,) of the events, >= 0.

        """
        frame = self._frame(X)
        if frame.table.num_rows == 0:
            return
        learner, features, table = self._learner, self._features, frame.table
        schema = known = learner.schema
        newcomers: dict[str, Field] = {}
        values: dict[str, list[Any]] = {}
        ignored: dict[str, int] = {}
        if schema is None:
            schema = features.schema_of_table(table)
        elif self.unknown == "add":
            schema, newcomers, values, ignored = features.grown(table, learner, schema)
            table = table.select([name for name in table.column_names if name in schema.names])
        table = features.in_question(table, schema)
        batch = schema.encode(aligned(table, schema), w, on_error="collect", extend=True)
        # A row may hold nothing but features that are not in the model.
        _raise_first(batch, but_empty=bool(newcomers or ignored or batch.ignored_fields))
        warming_up = learner.warming_up
        if self._watches:
            prediction = learner.predict_then_update(batch)
        else:
            learner.update(batch)
        if self._successor is not None:
            self._teach_successor(batch, None)
        warn_of_full(known, learner.schema, stacklevel=3)
        features.forget(schema.names)
        features.remember_labels(frame.labels)
        self._count_others(newcomers, values, ignored, True)
        if self._watches:
            log_prob = prediction.log_prob if batch.weight is None else prediction.log_prob[batch.weight > 0.0]
            self._watch_all(log_prob.tolist(), learner, warming_up)
        self._bind()

    def _frame(self, X: Any) -> Frame:
        # Narwhals takes a while to import, and single events need none of it.
        from stream_em.river.frames import Frame

        return Frame(X)

    def _predict_many(self, frame: Frame) -> Prediction:
        table, schema = frame.table, self._learner.schema
        return self._predict(table if schema is None else aligned(table, schema), table.num_rows)

    def _predict(self, events: list[dict[str, Any]] | pa.Table, n_events: int) -> Prediction:
        """Return predictions; an event without any value in the model gets those of an event of which nothing is known.

        Raises
        ------
        EventError, SchemaError
            When a value or a column cannot be used.

        """
        learner, schema = self._learner, self._learner.schema
        if learner.warming_up:
            weights = np.full(self.n_components, 1.0 / self.n_components)
        else:
            weights = learner.parameters.weights
        ids = learner.component_ids
        log_prob, component = np.zeros(n_events), np.full(n_events, ids[np.argmax(weights)])
        responsibilities = np.repeat(weights[None], n_events, axis=0)
        if schema is None:
            return Prediction(log_prob, component, responsibilities)
        batch = schema.encode(events, on_error="collect")
        _raise_first(batch, but_empty=True)
        if batch.n_events:
            at = slice(None) if batch.accepted is None else batch.accepted
            log_prob[at], component[at], responsibilities[at] = learner.score_events(batch)
        if learner.n_events < GRACE:
            log_prob[:] = 0.0
        return Prediction(log_prob, component, responsibilities)

    # Drift.

    def _watch_learned(self, log_prob: float, w: float) -> None:
        """See what an event that went the short way scored before, which may end the short way."""
        if w != 0.0:
            self._watch(log_prob, False)
        if self._successor is not None or self._learner._kernel is not self._kernel:
            self._bind()

    def _watch_all(self, log_prob: list[float], learner: OnlineEM, warming_up: bool) -> None:
        """See what events scored before they were learned, unless the model that said so is no longer there."""
        if self._learner is not learner or (warming_up and not learner.warming_up):
            self._start_anew()
            return
        for one in log_prob:
            self._watch(one, warming_up)

    def _watch(self, log_prob: float, warming_up: bool) -> None:
        """See what an event scored before it was learned."""
        if self._detector is None or warming_up or self._successor is not None:
            return
        if self._refractory:
            self._refractory -= 1
            return
        self._detector.update(-log_prob)
        if self._detector.drift_detected:
            self._n_drifts += 1
            if self.on_drift == "reseed":
                self._successor = self._make_learner(self._learner.schema)
            else:
                self._learner.forget(self.batch_size)
                # The scores change while the model finds its feet again; that is no further drift.
                self._refractory = self.batch_size
                self._detector = self._detector.clone()

    def _teach_successor(self, events: Mapping[str, Any] | Batch, w: float | None) -> None:
        successor = self._successor
        if successor is None:
            return
        successor.update(dict(events) if isinstance(events, Mapping) else events, w)
        if not successor.warming_up:
            # Ids keep their meaning: those of the new components are new.
            successor.renumber(self._learner.component_ids.max() + 1 + np.arange(self.n_components))
            successor.ignored_fields = self._learner.ignored_fields
            self._learner, self._successor = successor, None

    def _start_anew(self) -> None:
        """Forget scores, which from now on are those of another model."""
        self._detector = None if self._detector is None else self._detector.clone()


def _not_learned(event: Mapping[str, Any], weight: float = 1.0) -> None:
    return None


def _not_scored(event: Mapping[str, Any]) -> None:
    return None


def _raise_first(batch: Batch, *, but_empty: bool) -> None:
    """Raise the first error, but not that of an event without a value if these may be left out."""
    for error in batch.rejected:
        if not (but_empty and error.field is None and error.value is None):
            raise error


def _params_of(learner: OnlineEM) -> dict[str, Any]:
    """Return the parameters that describe a learner."""
    model, schema, schedule = learner.model, learner.schema, learner.schedule
    params: dict[str, Any] = {
        "n_components": model.n_components,
        "prior_weight": model.prior_weight,
        "batch_size": learner.batch_size,
        "warm_up": learner.warm_up,
        "unknown": learner.unknown if schema is None else schema.unknown,
        "seed": learner.seed,
    }
    if isinstance(model.family, Product) and not model.family.families:
        params["covariance_type"] = model.family.others
    else:
        params["family"] = model.family
    if schema is not None:
        params["kinds"] = {one.name: one.kind for one in schema.fields if one.kind in ("count", "duration")} or None
    if isinstance(schedule, Constant):
        params["step_size"] = schedule.value
    elif isinstance(schedule, RobbinsMonro):
        params["alpha"], params["offset"] = schedule.alpha, schedule.offset
    else:
        params["alpha"] = 1.0
    return params
