"""Batch EM over events that one machine does not hold: each iteration merges what workers found in their share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsDict, AsIter

from stream_em.beam.coders import StatisticsCoder
from stream_em.beam.expectation import COUNTS, REJECTED, EventCounts, ExpectationStep, MergePerKey
from stream_em.beam.reading import ReadEvents
from stream_em.beam.storage import hand_over, read_file, working_folder, write_file
from stream_em.beam.survey import (
    EncodeEvents,
    ReservoirCoder,
    Sample,
    Source,
    check_any,
    check_categories,
    decode_counts,
    encode_counts,
    first_reason,
    in_one_window,
    infer_categories,
    infer_schema,
    read_from,
    total_counts,
    unapplied,
    untimed,
    with_all_fields,
)
from stream_em.columns import Roles
from stream_em.learners import BatchEM, BatchRun, NotFittedError
from stream_em.learners.progress import Progress
from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import check_whole
from stream_em.schema import Schema
from stream_em.seeding import Reservoir
from stream_em.seeding import seed as seed_parameters
from stream_em.statistics import Statistics
from stream_em.store import SnapshotError, from_bytes, metadata_from_bytes, to_bytes

SETTINGS = "refit.json"
"""File of a run's folder that tells what it is a run of."""

MODEL = "model.arrow"
"""File of a run's folder that holds the learner in the end: the snapshot of the best start."""


_DELETE = "delete the folder of the run to begin anew"


class RefitError(ValueError):
    """Raised when a folder holds another run or a damaged one, or the events changed between two iterations."""


class RefitResult(NamedTuple):
    """What a refit came to.

    Parameters
    ----------
    learner
        The fitted learner, as `BatchEM.fit` would have returned it.
    counts
        How many events were used and rejected.

    """

    learner: BatchEM
    counts: EventCounts


class Refit(beam.PTransform):
    """Batch EM (Dempster, Laird & Rubin 1977) over a source of events, or over a PCollection.

    From the same start it comes to the numbers of `BatchEM`, but for rounding, however the events are sharded.

    `run` reads the source once for each iteration, in a pipeline of its own; it tests for convergence, writes a
    snapshot of every start after each iteration, and goes on from there when it is called again. As a transform,
    with `unrolled`, the iterations are chained in the pipeline of the events, which must hold them all that time.

    Parameters
    ----------
    model
        The mixture.
    schema
        The fields of the events; by default `run` infers them from all the events. The categories of a field that
        names none are found in the events by `run`; `initial_parameters` and `unrolled` need them. Other values of a
        category field are counted as `other`.
    roles
        Columns that are not the model's: weight, label and others to leave out.
    max_iter
        Most EM iterations, >= 1.
    tol
        Converged when the mean log-posterior gains less than this in an iteration, >= 0.
    n_init
        Number of starts, which share each reading of the events; the one with the highest log-posterior is kept.
    initial_parameters
        Start from these instead of seeding; needs `schema`.
    seed_events
        Size of the sample of the events, drawn by weight, from which starts are seeded.
    seed
        Seed of the random choices.
    fanout
        Number of parts in which the workers' statistics are merged first, see `MergePerKey`.
    unrolled
        Iterations to chain in one pipeline, instead of `max_iter`: needed, with `schema`, to apply this to a
        PCollection of events, for a PCollection with one `BatchEM`.
    rejected_to
        Transform that is applied to the `RejectedEvent` values of the first reading; they are counted in any case.

    Raises
    ------
    ValueError
        When a number is out of range, or a schema is needed.

    Notes
    -----
    What is shuffled in an iteration is one value of statistics for each bundle and start, whatever the number of
    events in it, and in the first reading a sample of at most `seed_events` for each bundle.

    >>> from stream_em import Gaussian
    >>> events = [{"x": value} for value in [0.0, 0.2, 5.0, 5.2] * 10]
    >>> learner, counts = Refit(Mixture(Gaussian(), 2)).run(beam.Create(events), runner="FnApiRunner")
    >>> np.sort(learner.parameters.components.mean.ravel()).round(2), learner.converged, counts.n_events
    (array([0.1, 5.1]), True, 40)

    """

    def __init__(
        self,
        model: Mixture,
        *,
        schema: Schema | None = None,
        roles: Roles | None = None,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        initial_parameters: MixtureParameters | None = None,
        seed_events: int = 10_000,
        seed: int = 0,
        fanout: int | None = None,
        unrolled: int | None = None,
        rejected_to: beam.PTransform | None = None,
    ) -> None:
        super().__init__()
        check_whole(unrolled=1 if unrolled is None else unrolled)
        if unrolled is not None and schema is None:
            raise ValueError("unrolled iterations need the schema of the events; infer_schema finds it in a source")
        if schema is not None and (unrolled is not None or initial_parameters is not None):
            check_categories(schema)
        self.model = model
        self.schema = schema
        self.roles = untimed(roles)
        self.initial_parameters = initial_parameters
        self.max_iter = max_iter if unrolled is None else unrolled
        self.tol = tol
        self.n_starts = n_init if initial_parameters is None else 1
        self.seed_events = seed_events
        self.seed = seed
        self.fanout = MergePerKey(fanout).fanout
        self.unrolled = unrolled
        self.rejected_to = rejected_to
        self.options: dict[str, Any] = {
            "max_iter": self.max_iter,
            "tol": tol,
            "n_init": n_init,
            "seed_events": seed_events,
            "seed": seed,
        }
        # The learner knows what its options may be.
        BatchEM(model, schema=schema, initial_parameters=initial_parameters, **self.options)

    def run(
        self,
        source: Source,
        folder: str | None = None,
        *,
        options: PipelineOptions | None = None,
        runner: Any = None,
        progress: bool = False,
    ) -> RefitResult:
        """Fit the model to the events of a source, a pipeline for each iteration.

        Parameters
        ----------
        source
            A transform of the root of a pipeline that yields the same events each time it is run (dicts, lists of
            dicts, arrays, Arrow tables, frames), such as `ReadFromParquetBatched`, or a pattern for `ReadEvents`.
        folder
            Where snapshots are kept: `start-<s>/iteration-<i>.arrow` of each start after each iteration, and
            `model.arrow` in the end. The workers must be able to write there. A run that was interrupted goes on from
            the last whole snapshots; files that have changed since it began are refused. By default a temporary folder
            of this machine.
        options, runner
            Beam's.
        progress
            Whether to show a progress bar.

        Raises
        ------
        NotFittedError
            When the source has no event that can be used, or none with weight.
        RefitError
            When the folder holds a run of something else, or a damaged one, or the source does not yield the same
            number of events each time.
        SchemaError
            When the schema cannot be inferred.

        """
        if self.unrolled is not None:
            raise ValueError("unrolled iterations are for a PCollection: events | Refit(...); leave it out to run")
        with working_folder(folder) as place:
            job = _Run(self, source, place, {"options": options, "runner": runner})
            with Progress(progress, self.n_starts * self.max_iter) as advance:
                return job.go(advance)

    def expand(self, events: beam.PCollection) -> beam.PCollection:
        """Return the PCollection with one fitted `BatchEM`.

        Raises
        ------
        ValueError
            Without `unrolled`, or when the events have no end.

        """
        if self.unrolled is None or self.schema is None:
            raise ValueError(
                "a PCollection lives in one pipeline, and the default is one pipeline for each iteration: chain a "
                "number of them with Refit(..., schema=..., unrolled=10), or pass a source to Refit(...).run(source)"
            )
        events = in_one_window(events)
        bound = self.model.bind(self.schema)
        blocks, counts, reason = self.encode(events, self.schema)
        total = total_counts(counts)
        runs = self._starts(events.pipeline, blocks)
        for number in range(1, self.unrolled + 1):
            going = (
                runs
                | f"Going on {number}" >> beam.Filter(lambda pair: not pair[1].converged)
                | f"Parameters {number}" >> beam.MapTuple(lambda start, run: (start, run.parameters))
            )
            step = beam.ParDo(ExpectationStep(self.model, self.schema, roles=self.roles), AsDict(going))
            merged = events | f"E-step {number}" >> step | f"Merge {number}" >> MergePerKey(self.fanout)
            runs = runs | f"M-step {number}" >> beam.Map(_advanced, bound, self.tol, AsDict(merged))
        one = events.pipeline | "One" >> beam.Create([None])
        return one | "Best" >> beam.Map(
            _best_learner, self.model, self.schema, self.options, AsDict(runs), AsDict(total), AsDict(reason)
        ).with_output_types(BatchEM)

    def encode(
        self, events: beam.PCollection, schema: Schema, rejected: Iterable[beam.PCollection] = ()
    ) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        """Return encoded blocks, the counts of each bundle, and the first reason; hand over what was rejected."""
        encoded = events | "Encode" >> beam.ParDo(EncodeEvents(schema, self.roles, self.model)).with_outputs(
            REJECTED, COUNTS, main="blocks"
        )
        return encoded.blocks, encoded[COUNTS], self.tell([encoded[REJECTED], *rejected])

    def tell(self, rejected: Iterable[beam.PCollection]) -> beam.PCollection:
        """Hand over the rejected events; return the first reason."""
        everything = tuple(rejected) | "All rejected" >> beam.Flatten()
        if self.rejected_to is not None:
            _ = everything | "Rejected" >> unapplied(self.rejected_to)
        return first_reason(everything)

    def _starts(self, pipeline: beam.Pipeline, blocks: beam.PCollection) -> beam.PCollection:
        assert self.schema is not None
        if self.initial_parameters is not None:
            return pipeline | "Start" >> beam.Create([(0, BatchRun.begin(self.initial_parameters))])
        sample = blocks | "Sample" >> Sample(self.schema, self.seed_events, self.seed)
        numbers = pipeline | "Starts" >> beam.Create(range(self.n_starts), reshuffle=True)
        return numbers | "Seed" >> beam.FlatMap(_seeded_from, self.model, self.seed, AsIter(sample))


def _seeded(number: int, model: Mixture, seed: int, sample: Reservoir) -> BatchRun:
    """The run of a start."""
    events = sample.sample(shuffled=True)
    if not events.n_events:
        raise NotFittedError("there is no event with weight to fit")
    return BatchRun.begin(seed_parameters(model, events, np.random.default_rng([seed, number])))


def _seeded_from(
    number: int, model: Mixture, seed: int, samples: Iterable[Reservoir]
) -> Iterator[tuple[int, BatchRun]]:
    """The run of a numbered start; none where there is no event to seed from."""
    for sample in samples:
        yield number, _seeded(number, model, seed, sample)


def _advanced(
    pair: tuple[int, BatchRun], bound: Mixture, tol: float, merged: Mapping[int, Statistics]
) -> tuple[int, BatchRun]:
    """M-step: the run one iteration later, or as it is when it goes on no more."""
    start, run = pair
    return start, _next(run, bound, merged[start], tol) if start in merged else run


def _next(run: BatchRun, bound: Mixture, statistics: Statistics, tol: float) -> BatchRun:
    if not statistics.total_weight > 0.0:
        raise NotFittedError("there is no event with weight to fit")
    return run.advance(bound, statistics, tol)


def _best_learner(
    _: None,
    model: Mixture,
    schema: Schema,
    options: dict[str, Any],
    runs: Mapping[int, BatchRun],
    counts: Mapping[str, EventCounts],
    reason: Mapping[str, str],
) -> BatchEM:
    check_any(counts["counts"], reason.get("reason"))
    return _learner(model, schema, options, _best(runs), counts["counts"])


def _learner(model: Mixture, schema: Schema, options: dict[str, Any], run: BatchRun, counts: EventCounts) -> BatchEM:
    """The learner that a run comes to."""
    ignored = dict(counts.ignored_fields)
    learner = BatchEM(model, schema=schema, **options)
    return learner.adopt(run, model.bind(schema), n_events=counts.n_events, ignored_fields=ignored)


def _best(runs: Mapping[int, BatchRun]) -> BatchRun:
    return max((runs[start] for start in sorted(runs)), key=lambda run: run.objective)


class _Run:
    """The runs of all starts of a refit, and the folder that they are kept in."""

    def __init__(self, refit: Refit, source: Source, folder: str, how: dict[str, Any]) -> None:
        self.refit, self.source, self.folder, self.how = refit, source, folder, how
        self.schema = refit.schema
        self.counts: EventCounts | None = None
        self.runs: dict[int, BatchRun] = {}

    def go(self, advance: Any) -> RefitResult:
        refit = self.refit
        self._check_settings()
        self._resume()
        if refit.initial_parameters is not None and not self.runs:
            self.runs = {0: BatchRun.begin(refit.initial_parameters)}
        elif len(self.runs) < refit.n_starts:
            self._begin()
        assert self.schema is not None
        self.bound = refit.model.bind(self.schema)
        for run in self.runs.values():
            for _ in run.history:
                advance("resumed")
        while going := {start: run for start, run in self.runs.items() if not run.finished(refit.max_iter)}:
            self._iterate(going)
            best = _best(self.runs)
            for _ in going:
                advance(f"mean log-posterior {best.objective:.6g}")
        assert self.counts is not None
        learner = self._learner(_best(self.runs))
        write_file(FileSystems.join(self.folder, MODEL), to_bytes(learner, metadata={"counts": self.counts}))
        return RefitResult(learner, self.counts)

    def _check_settings(self) -> None:
        """Note what this is a run of, or refuse a folder that holds a run of something else."""
        refit = self.refit
        initial = refit.initial_parameters
        settings = {
            "model": repr(refit.model),
            "schema": repr(refit.schema),
            "roles": repr(refit.roles),
            "source": _told(self.source),
            "initial_parameters": None if initial is None else BatchRun.begin(initial).origin,
            **refit.options,
        }
        path = FileSystems.join(self.folder, SETTINGS)
        if not FileSystems.exists(path):
            write_file(path, json.dumps(settings, indent=1).encode())
            return
        try:
            found = json.loads(read_file(path))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RefitError(f"{path}: is damaged, it does not tell what the folder is a run of; {_DELETE}")
        differing = [name for name in settings if found.get(name) != settings[name]]
        if differing:
            told = "; ".join(f"{name} was {found.get(name)!r} and is {settings[name]!r}" for name in differing)
            raise RefitError(f"the folder {self.folder!r} holds another run: {told}; name a folder of its own for each")

    def _path(self, start: int, iteration: int) -> str:
        path: str = FileSystems.join(self.folder, f"start-{start}", f"iteration-{iteration:04d}.arrow")
        return path

    def _resume(self) -> None:
        """Take up each start where its last whole snapshot left it."""
        for start in range(self.refit.n_starts):
            first = 0 if self.refit.initial_parameters is None else 1
            there = takewhile(lambda iteration: FileSystems.exists(self._path(start, iteration)), count(first))  # noqa: B023
            for iteration in reversed(list(there)):
                try:
                    learner, self.counts = self._read(start, iteration)
                except SnapshotError:
                    continue
                self.runs[start] = self._run_of(learner, start)
                break

    def _read(self, start: int, iteration: int) -> tuple[BatchEM, EventCounts]:
        path = self._path(start, iteration)
        content = read_file(path)
        learner = from_bytes(content, source=path)
        metadata = metadata_from_bytes(content, source=path)
        if not isinstance(learner, BatchEM) or "counts" not in metadata:
            raise RefitError(f"{path}: is a snapshot of something else than a refit; {_DELETE}")
        return learner, decode_counts(json.dumps(metadata["counts"]))

    def _run_of(self, learner: BatchEM, start: int) -> BatchRun:
        self.schema = learner.schema
        assert learner.schema is not None
        prior = None
        if learner.history:
            # The prior of every iteration is that of the first one's statistics.
            try:
                first, _ = self._read(start, 1)
            except SnapshotError as error:
                raise RefitError(f"{error}; later iterations cannot go on without the first: {_DELETE}") from error
            assert first.statistics is not None
            prior = self.refit.model.bind(learner.schema).prior(first.statistics)
        return BatchRun(
            learner.parameters, learner.origin, prior, learner.statistics, tuple(learner.history), learner.converged
        )

    def _begin(self) -> None:
        """Read the events for their fields, if these are not declared, and for a sample; seed the starts."""
        refit = self.refit
        schema = refit.schema
        if schema is None:
            schema = infer_schema(self.source, roles=refit.roles, folder=self.folder, **self.how)
        else:
            schema = infer_categories(schema, self.source, roles=refit.roles, folder=self.folder, **self.how)
        self.schema = schema
        self.bound = refit.model.bind(schema)
        coder = ReservoirCoder(schema, refit.seed_events)

        def build(pipeline: beam.Pipeline) -> list[beam.PCollection]:
            events, *rejected = self._events(pipeline)
            blocks, counts, reason = refit.encode(events, schema, rejected)
            sample = blocks | "Sample" >> Sample(schema, refit.seed_events, refit.seed)
            return [
                sample | "Encode sample" >> beam.Map(lambda one: ("sample", coder.encode(one))),
                _counts_and_reason(total_counts(counts, rejected), reason),
            ]

        found = hand_over(build, ["sample", "counts", "reason"], self.folder, **self.how)
        self._count(found)
        sample = coder.decode(found["sample"])
        for start in range(refit.n_starts):
            self._keep(start, _seeded(start, refit.model, refit.seed, sample))

    def _events(self, pipeline: beam.Pipeline) -> tuple[beam.PCollection, ...]:
        """Return the events and what their reading rejected."""
        events, *rejected = read_from(pipeline, self.source, self.refit.roles)
        assert self.schema is not None
        return (with_all_fields(events, self.schema) if self.refit.schema is None else events, *rejected)

    def _iterate(self, going: dict[int, BatchRun]) -> None:
        """One EM iteration of the starts that go on, in one reading of the events."""
        refit, schema = self.refit, self.schema
        assert schema is not None
        parameters = {start: run.parameters for start, run in going.items()}

        def build(pipeline: beam.Pipeline) -> list[beam.PCollection]:
            events, *rejected = self._events(pipeline)
            # Not as a side input: at one Flink begins a new stage, to which every event would be sent.
            step = beam.ParDo(ExpectationStep(refit.model, schema, roles=refit.roles), parameters)
            found = events | "E-step" >> step.with_outputs(REJECTED, COUNTS, main="statistics")
            merged = found.statistics | "Merge" >> MergePerKey(refit.fanout)
            total = total_counts(found[COUNTS], rejected)
            told = _counts_and_reason(total, refit.tell([found[REJECTED], *rejected])) if first else _counts(total)
            return [merged | "Encode" >> beam.MapTuple(_encoded), told]

        first = self.counts is None
        found = hand_over(build, ["counts", "reason", *map(_name, going)], self.folder, **self.how)
        self._count(found)
        for start, run in going.items():
            statistics = StatisticsCoder().decode(found[_name(start)])
            assert statistics is not None
            self._keep(start, _next(run, self.bound, statistics, refit.tol))

    def _count(self, found: dict[str, bytes]) -> None:
        counts = decode_counts(found["counts"])
        if self.counts is None:
            check_any(counts, found["reason"].decode() if "reason" in found else None)
            self.counts = counts
        elif counts.n_events != self.counts.n_events:
            raise RefitError(
                f"the source yielded {counts.n_events:,} events that can be used, and {self.counts.n_events:,} when "
                "this run began; EM needs the same events in each iteration"
            )

    def _keep(self, start: int, run: BatchRun) -> None:
        self.runs[start] = run
        content = to_bytes(self._learner(run), metadata={"counts": self.counts})
        write_file(self._path(start, len(run.history)), content)

    def _learner(self, run: BatchRun) -> BatchEM:
        assert self.schema is not None
        assert self.counts is not None
        return _learner(self.refit.model, self.schema, self.refit.options, run, self.counts)


def _told(source: Source) -> str:
    """What a source is, as far as it can be told without reading it."""
    reading = ReadEvents(source) if isinstance(source, str) else source
    if isinstance(reading, ReadEvents):
        return f"{', '.join(reading.patterns)} (files {reading.fingerprint()})"
    return type(source).__name__


def _name(start: int) -> str:
    return f"statistics-{start}"


def _encoded(start: int, statistics: Statistics) -> tuple[str, bytes]:
    return _name(start), StatisticsCoder().encode(statistics)


def _counts(total: beam.PCollection) -> beam.PCollection:
    return total | "Encode counts" >> beam.MapTuple(lambda name, counts: (name, encode_counts(counts)))


def _counts_and_reason(total: beam.PCollection, reason: beam.PCollection) -> beam.PCollection:
    told = reason | "Encode reason" >> beam.MapTuple(lambda name, text: (name, text.encode()))
    return (_counts(total), told) | "Told" >> beam.Flatten()
