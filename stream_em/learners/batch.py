"""Batch EM: events in memory, or batches that are read again in each iteration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from stream_em.learners.fitted import Events, FittedMixture, NotFittedError, adapted, count_told
from stream_em.learners.merging import check_mergeable, grown_statistics, origin_of
from stream_em.learners.online import OnlineEM
from stream_em.learners.progress import Progress
from stream_em.methods import Iteration, Method, iterate, iterations
from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import check_whole
from stream_em.schema import Batch, FieldCounts, Schema, SchemaError, in_memory
from stream_em.seeding import Reservoir
from stream_em.seeding import seed as seed_parameters
from stream_em.statistics import Statistics


@dataclass(frozen=True, eq=False)
class BatchRun:
    """A start of batch EM, and what its iterations have come to.

    Parameters
    ----------
    parameters
        The parameters after the last M-step; at first those of the start.
    origin
        Fingerprint of the start: component ids mean the same only where this is the same.
    prior
        The prior of every M-step, which is that of the first iteration's statistics.
    statistics
        Expected sufficient statistics of the last E-step.
    history
        Mean log-posterior of each iteration, up to a constant.
    converged
        Whether the last iteration gained less than the tolerance.
    halvings
        How often a step of the method was halved to stay within the parameter space.

    >>> from stream_em import Gaussian
    >>> batch = Schema({"x": "numeric"}).encode(np.array([[0.0], [2.0]]))
    >>> bound = Mixture(Gaussian(), 1).bind(batch.schema)
    >>> run = BatchRun.begin(bound.pooled(batch))
    >>> run = run.advance(bound, bound.e_step(run.parameters, batch), tol=1e-3)
    >>> run.parameters.components.mean, len(run.history), run.converged
    (array([[1.]]), 1, False)

    """

    parameters: MixtureParameters
    origin: str
    prior: Any = None
    statistics: Statistics | None = None
    history: tuple[float, ...] = ()
    converged: bool = False
    halvings: int = 0

    @classmethod
    def begin(cls, start: MixtureParameters) -> BatchRun:
        """Return the run that begins at these parameters."""
        return cls(start, origin_of(start))

    def advance(self, bound: Mixture, statistics: Statistics, tol: float) -> BatchRun:
        """Return the run one iteration later.

        Parameters
        ----------
        bound
            The mixture, bound to the schema of the events.
        statistics
            The expected sufficient statistics of all the events at `parameters`.
        tol
            Converged when the mean log-posterior gains less than this.

        """
        return self.include(iterate(bound, self.parameters, statistics, self.prior), tol)

    def include(self, iteration: Iteration, tol: float, *, monotone: bool = True) -> BatchRun:
        """Return the run with one more iteration.

        Parameters
        ----------
        iteration
            The iteration, by whatever method it was made.
        tol
            Converged when the mean log-posterior gains less than this.
        monotone
            Whether it never falls but by rounding, as in batch EM; elsewhere a fall is no sign of convergence.

        """
        history = (*self.history, iteration.objective)
        gain = history[-1] - history[-2] if len(history) > 1 else math.inf
        return BatchRun(
            iteration.parameters,
            self.origin,
            iteration.prior,
            iteration.statistics,
            history,
            (gain if monotone else abs(gain)) < tol,
            self.halvings + iteration.halvings,
        )

    def finished(self, max_iter: int) -> bool:
        """Whether no iteration is to follow."""
        return self.converged or len(self.history) >= max_iter

    @property
    def objective(self) -> float:
        """Mean log-posterior of the last iteration; that of a run without any is the lowest."""
        return self.history[-1] if self.history else -math.inf


class BatchEM(FittedMixture):
    """Batch EM (Dempster, Laird & Rubin 1977), in memory or over batches that can be read again.

    Parameters
    ----------
    model
        The mixture.
    method
        How the iterations combine the statistics of the events: None for batch EM, or `Incremental`,
        `VarianceReduced` or `FIEM`, whose iterations are epochs and which hold the events in memory.
    schema
        Fields of the events; inferred from the first events when None.
    max_iter
        Most EM iterations, >= 1.
    tol
        Converged when the mean log-posterior gains less than this in an iteration, >= 0; with a `method`, when it
        changes by less.
    n_init
        Number of starts; the one with the highest log-posterior is kept.
    initial_parameters
        Start from these instead of seeding; needs `schema`.
    seed_events
        Size of the sample of the events from which starts are seeded.
    n_threads
        Threads that share the blocks of a large batch. Meanwhile BLAS has one thread, in the whole process.
    progress
        Whether to show a progress bar.
    seed
        Seed of the random choices.

    Raises
    ------
    ValueError
        When a number is out of range, or `initial_parameters` come without `schema`.

    Attributes
    ----------
    history
        Mean log-posterior of each iteration of the kept start, up to a constant.
    converged
        Whether the kept start converged before `max_iter`.
    halvings
        How often a step of the method was halved to stay within the parameter space; 0 in batch EM.
    statistics
        Expected sufficient statistics of the last E-step.
    n_events
        Events fitted.

    >>> from stream_em import Gaussian
    >>> events = np.repeat([[0.0], [0.2], [5.0], [5.2]], 10, axis=0)
    >>> fitted = BatchEM(Mixture(Gaussian(), n_components=2), seed=0).fit(events)
    >>> np.sort(fitted.parameters.components.mean.ravel()).round(2), fitted.converged
    (array([0.1, 5.1]), True)

    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("method", "max_iter", "tol", "n_init", "seed_events", "n_threads", "seed")

    def __init__(
        self,
        model: Mixture,
        *,
        method: Method | None = None,
        schema: Schema | None = None,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        initial_parameters: MixtureParameters | None = None,
        seed_events: int = 10_000,
        n_threads: int = 1,
        progress: bool = False,
        seed: int = 0,
    ) -> None:
        check_whole(max_iter=max_iter, n_init=n_init, seed_events=seed_events, n_threads=n_threads)
        check_whole(least=0, below=None, seed=seed)
        if not 0.0 <= tol < math.inf:
            raise ValueError(
                f"tol must be >= 0 and finite, got {tol!r}: no iteration of EM lowers the log-posterior, so it never "
                "gains less"
            )
        if initial_parameters is not None and schema is None:
            raise ValueError("initial_parameters need the schema they are for")
        if not isinstance(method, Method | None):
            raise ValueError(f"method must be None, Incremental(), VarianceReduced() or FIEM(), got {method!r}")
        super().__init__(model, None, schema)
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.seed_events = seed_events
        self.n_threads = n_threads
        self.progress = progress
        self.seed = seed
        self.history: list[float] = []
        self.converged = False
        self.halvings = 0
        self.n_events = 0
        self.ignored_fields: Counter[str] = FieldCounts()
        self.statistics: Statistics | None = None
        self.origin = ""
        self._initial_parameters = initial_parameters

    def _progress_text(self) -> str:
        return f", {self.n_events:,} events"

    def fit(
        self,
        events: Events | Iterable[Events] | Callable[[], Iterable[Events]],
        weight: npt.ArrayLike | None = None,
    ) -> Self:
        """Fit the model; return the learner.

        Parameters
        ----------
        events
            Events in any accepted form; or an iterable of such batches that can be gone through again, or
            a function that returns a fresh one, when they do not fit in memory.
        weight
            Sample weights (n,) of events in memory. Batches that are read bring their own: encode them.

        Raises
        ------
        EventError, SchemaError
            When an event or a frame cannot be used.
        NotFittedError
            When there is no event with weight.

        """
        batches, sample, n_events, ignored_fields = self._read(events, weight)
        if self._initial_parameters is not None and sample.schema.fields != self._known_schema().fields:
            raise SchemaError(
                "the events have fields or categories that initial_parameters do not know: "
                f"{sample.schema!r} instead of {self._schema!r}"
            )
        bound = self.model.bind(sample.schema)
        generator = np.random.default_rng(self.seed)
        best: BatchRun | None = None
        starts = 1 if self._initial_parameters is not None else self.n_init
        with Progress(self.progress, starts * self.max_iter) as advance:
            for _ in range(starts):
                start = self._initial_parameters or seed_parameters(self.model, sample, generator)
                run = self._iterate(bound, start, batches, advance)
                if best is None or run.objective > best.objective:
                    best = run
        assert best is not None
        return self.adopt(best, bound, n_events=n_events, ignored_fields=ignored_fields)

    def adopt(
        self, run: BatchRun, bound: Mixture, *, n_events: int, ignored_fields: Mapping[str, int] | None = None
    ) -> Self:
        """Take over what the iterations of a start came to, wherever they were made; return the learner.

        Parameters
        ----------
        run
            The start, and what its iterations came to.
        bound
            The mixture, bound to the schema of the events.
        n_events
            Events fitted.
        ignored_fields
            Names of unknown fields that were ignored, with the number of events that held them.

        """
        self._bound, self._schema, self._parameters = bound, bound.schema, run.parameters
        self.statistics, self.history, self.converged = run.statistics, list(run.history), run.converged
        self.halvings = run.halvings
        self.n_events, self.ignored_fields, self.origin = n_events, FieldCounts(ignored_fields or {}), run.origin
        return self

    def _read(
        self, events: Any, weight: npt.ArrayLike | None
    ) -> tuple[Callable[[], Iterator[Batch]], Batch, int, Counter[str]]:
        """Go through the events once: settle the schema, draw the sample to seed from, count."""
        source = _batches_of(events)
        schema = self._schema
        # A generator of its own: starts must not depend on how the events were cut.
        reservoir = Reservoir(self.seed_events, np.random.default_rng([self.seed, 1]))
        if source is None:
            events = in_memory(events)
            batch = (Schema.infer(events) if schema is None else schema).encode(events, weight, extend=True)
            if not count_told(batch):
                raise NotFittedError("there is no event with weight to fit")
            whole = Batch(np.ascontiguousarray(batch.values), batch.schema, batch.weight)
            self.model.bind(whole.schema).check(whole)
            reservoir.add(whole)
            return lambda: iter((whole,)), reservoir.sample(), whole.n_events, Counter(batch.ignored_fields)
        if weight is not None:
            raise SchemaError("sample weights of batches that are read come with each batch: encode it with its weight")
        n_events = n_told = 0
        ignored_fields: Counter[str] = FieldCounts()
        for chunk in source():
            if isinstance(chunk, Batch):
                batch = chunk if schema is None or chunk.schema.extends(schema) else adapted(chunk, schema)
            else:
                batch = (Schema.infer(chunk) if schema is None else schema).encode(chunk, extend=True)
            schema = batch.schema
            self.model.bind(schema).check(batch)
            n_events += batch.n_events
            n_told += count_told(batch)
            ignored_fields.update(batch.ignored_fields)
            reservoir.add(batch)
        if n_told == 0 or schema is None:
            raise NotFittedError("there is no event with weight to fit")
        known = schema

        def again() -> Iterator[Batch]:
            for chunk in source():
                yield adapted(chunk if isinstance(chunk, Batch) else known.encode(chunk), known)

        return again, reservoir.sample(), n_events, ignored_fields

    def _iterate(
        self,
        bound: Mixture,
        start: MixtureParameters,
        batches: Callable[[], Iterator[Batch]],
        advance: Callable[[str], None],
    ) -> BatchRun:
        run = BatchRun.begin(start)
        steps = (iterations if self.method is None else self.method.iterations)(
            bound, start, batches, n_threads=self.n_threads
        )
        while not run.finished(self.max_iter):
            run = run.include(next(steps), self.tol, monotone=self.method is None)
            advance(f"mean log-posterior {run.objective:.6g}")
        return run

    def to_online(self) -> OnlineEM:
        """Return an online learner that goes on from the fit: with its components, and its events counted.

        Raises
        ------
        NotFittedError
            Before there is a fit.

        >>> import numpy as np
        >>> from stream_em import BatchEM, Gaussian, Mixture
        >>> learner = BatchEM(Mixture(Gaussian(), 1)).fit(np.array([[1.0], [3.0]])).to_online()
        >>> learner.update({"x0": 5.0}).n_events
        3

        """
        learner = OnlineEM(self.model, schema=self.schema, initial_parameters=self.parameters, seed=self.seed)
        if self.statistics is not None:
            learner.resume(self.statistics, self.n_events)
        learner.ignored_fields = FieldCounts(self.ignored_fields)
        return learner

    def merge(self, other: BatchEM) -> BatchEM:
        """Return a fit whose statistics are those of both, after one more M-step; neither is changed.

        Raises
        ------
        MergeError
            When the two do not descend from the same start.

        """
        schema = check_mergeable(self, other)
        options = {name: getattr(self, name) for name in self.OPTIONS}
        merged = BatchEM(self.model, schema=schema, progress=self.progress, **options)
        merged.statistics = grown_statistics(self, schema).merge(grown_statistics(other, schema))
        merged.n_events = self.n_events + other.n_events
        merged.ignored_fields = FieldCounts(self.ignored_fields)
        merged.ignored_fields.update(other.ignored_fields)
        merged.origin = self.origin
        merged._parameters = merged._bound_model().m_step(merged.statistics)
        return merged


def _batches_of(events: Any) -> Callable[[], Iterable[Any]] | None:
    """Return a function that yields batches, or None when `events` are themselves in memory."""
    if callable(events):
        return events  # type: ignore[no-any-return]
    if isinstance(events, Batch | np.ndarray | Mapping) or hasattr(events, "__arrow_c_stream__"):
        return None
    if isinstance(events, Sequence) and (not events or isinstance(events[0], Mapping)):
        return None
    if hasattr(events, "__arrow_c_array__"):
        return None
    if isinstance(events, Iterator):
        raise SchemaError(
            "an iterator can be gone through only once, and batch EM needs several passes; pass a function that "
            "returns a fresh iterator"
        )
    if isinstance(events, Iterable):
        return lambda: events
    raise SchemaError(f"events of type {type(events).__name__} are not supported")
