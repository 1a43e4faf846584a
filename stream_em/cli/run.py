"""The command `run`: score each batch of events, then learn from it; and go on where it was killed or stopped."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
from rich.console import Console

from stream_em import Batch, FamilyError, NotFittedError, OnlineEM, load, save
from stream_em.cli.build import chunk_rows, make_online, make_schema
from stream_em.cli.checkpoints import Checkpoint, check_same_job, forget_unfinished_run, settings_of, unfinished_run
from stream_em.cli.common import (
    Answers,
    DataError,
    encode,
    explain,
    list_files,
    nothing_usable,
    open_job_source,
    open_scored_events,
    report,
    set_aside,
    tell_fields,
    tell_likely_ids,
)
from stream_em.cli.config import Config
from stream_em.cli.display import Progress, counted, say
from stream_em.cli.drawing import Illustrator, load_plots
from stream_em.cli.history import History
from stream_em.cli.outputs import Output, Quarantine, ScoreSink, is_pending, only_writer
from stream_em.cli.ranking import LabelledRanking
from stream_em.cli.scored_topic import ScoredTopic
from stream_em.cli.stopping import StopRequest, signal_name
from stream_em.sources import Chunk, Position, Rejection, Source
from stream_em.sources.faults import ChangedSourceError
from stream_em.store import remove_leftovers

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who is told of a run what happens, as it happens."""

    def batch(
        self,
        learner: OnlineEM,
        n_events: int,
        log_prob: npt.NDArray[np.float64],
        event_time: npt.NDArray[np.float64] | None,
    ) -> None:
        """Take note of a batch just learned: its size, its log-densities after the warm-up (n,) and its times (n,)."""
        ...

    def quarantined(self, field: str | None, reason: str) -> None:
        """Take note of an event that could not be used."""
        ...

    def snapshot_written(self) -> None:
        """Take note that what was learned until now is in the snapshot."""
        ...


def run(
    config: Config,
    console: Console,
    *,
    read: Sequence[Path] = (),
    fresh: bool = False,
    observer: Observer | None = None,
) -> Signals | None:
    """Score each batch of events, then learn from it; write scores, snapshot, picture and quarantine.

    Files that were `read` for the configuration are not overwritten, nor are those of the source. A run that was killed
    or stopped goes on from its last checkpoint, unless it is to be a `fresh` one. Return the signal that stopped it, or
    None at the end of the source.

    Raises
    ------
    DataError
        When no event can be used, and when the snapshot holds an unfinished run of other settings.

    """
    output = config.output
    names = (output.scored_events, output.snapshot, output.picture, output.quarantine)
    source = open_job_source(config, console, read, names, fields=config.fields_.fields)
    if config.source.time is not None and config.learner.schedule.kind != "half_life":
        say(
            console,
            f"source.time={config.source.time}: the past does not fade by the clock under learner.schedule "
            f"{config.learner.schedule.kind}, but under {{kind: half_life, half_life: 3600}}, say",
            "yellow",
        )
    if output.picture is not None:
        # To learn at the end of a long run that no picture can be drawn would be too late.
        load_plots()
    # Signals are held until the report is out: by then all is written, and to cut it off would save nothing.
    with StopRequest() as stop:
        with ExitStack() as stack:
            if output.snapshot is not None:
                stack.enter_context(only_writer(Path(output.folder, output.snapshot)))
            illustrator = stack.enter_context(Illustrator())
            job = stack.enter_context(_Run(config, source, console, illustrator, fresh=fresh, observer=observer))
            progress = stack.enter_context(Progress(console, n_before=job.n_events))
            job.learn(stop, progress)
            seconds = progress.seconds
            job.finish()
        job.report(seconds)
    return job.stopped_by


class _Run:
    """A run between its start, or its last checkpoint, and the end of the source.

    What it is made of is what a `Checkpoint` holds. At each checkpoint the outputs are brought to disk first, then the
    snapshot says how far they go; and the run goes on with the learner that the snapshot holds, as another start would.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        console: Console,
        illustrator: Illustrator,
        *,
        fresh: bool,
        observer: Observer | None,
    ) -> None:
        self._config = config
        self._source = source
        self._console = console
        self._illustrator = illustrator
        self._fresh = fresh
        self._observer = observer
        self._folder = Path(config.output.folder)
        self._rows, self._checkpoint_every = _strides(config, source)
        self._outputs: list[Output] = []
        self._can_go_on = False

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> None:
        path = self._snapshot_path
        checkpoint = learner = None
        if path is not None:
            remove_leftovers(path)
            if self._fresh:
                forget_unfinished_run(path)
            checkpoint = unfinished_run(path)
        if path is not None and checkpoint is not None:
            check_same_job(checkpoint, self._config, path)
            self._can_go_on = True
            learner = _load(path)
        elif path is not None and not self._fresh and is_pending(self._folder / self._config.output.quarantine):
            say(
                self._console,
                "a job that wrote to this folder was killed, and left no checkpoint (this one makes the first after "
                f"{counted(self._checkpoint_every, 'event')}, see output.checkpoint_every): starting at the first "
                "event",
                "yellow",
            )
        self._start(checkpoint, learner)

    def _start(self, checkpoint: Checkpoint | None, learner: OnlineEM | None) -> None:
        """Begin, or go on where the checkpoint was taken."""
        self.position: Position | None = None if checkpoint is None else checkpoint.position
        self._saved, self._saved_index = time.monotonic(), 0 if self.position is None else self.position["index"]
        self.n_events = self._n_before = 0 if checkpoint is None else checkpoint.n_events
        self._n_warm_up = 0 if checkpoint is None else checkpoint.n_warm_up
        self._history = History(None if checkpoint is None else checkpoint.history)
        self._ranking = LabelledRanking(self._config.source, None if checkpoint is None else checkpoint.ranking)
        quarantine_path = self._folder / self._config.output.quarantine
        self._quarantine = Quarantine(quarantine_path, None if checkpoint is None else checkpoint.quarantine)
        self._outputs.append(self._quarantine)
        self._sinks: dict[str, ScoreSink] = {}
        self._open_topic(checkpoint)
        self._learner = learner
        if learner is not None:
            self._made_ready(learner)
            self._open_sinks(learner, checkpoint)
        fields = {"source": self._source.name, "n_events": self.n_events}
        _log.info("started" if checkpoint is None else "resumed", extra={"fields": fields})
        if checkpoint is not None:
            say(
                self._console,
                f"going on after {counted(checkpoint.position['index'], 'event')} of {self._source.name}, where "
                f"{self._snapshot_path} was written (--fresh would start anew)",
                "yellow",
            )
        if learner is not None and learner.schema is not None:
            tell_fields(self._console, learner.schema)

    def _open_sinks(self, learner: OnlineEM, checkpoint: Checkpoint | None) -> None:
        output = self._config.output
        after = {} if checkpoint is None else checkpoint.sinks
        if output.scored_events is not None:
            assert learner.schema is not None
            self._sinks["file"] = open_scored_events(
                self._config,
                self._folder / output.scored_events,
                learner.schema,
                roll_events=output.roll_events,
                after=after.get("file"),
            )
            self._outputs.append(self._sinks["file"])

    def _open_topic(self, checkpoint: Checkpoint | None) -> None:
        # Not with the first event, which may be long in coming: whether there is such a topic is known now.
        output = self._config.output
        if output.kafka is not None:
            after = None if checkpoint is None else checkpoint.sinks["kafka"]
            topic = ScoredTopic(output.kafka.config, output.kafka.topic, prefix=output.prefix, after=after)
            self._sinks["kafka"] = topic
            self._outputs.append(topic)

    @property
    def _snapshot_path(self) -> Path | None:
        name = self._config.output.snapshot
        return None if name is None else self._folder / name

    def learn(self, stop: StopRequest, progress: Progress) -> None:
        """Score and learn the events that are left, until a stop is requested."""
        for chunk in stop.until(self._source, self._rows, self.position):
            if self._config.output.picture is not None:
                self._illustrator.prepare(chunk, self._source)
            self._learn_chunk(chunk, stop, progress)
            if not stop.requested and self._is_due(chunk):
                self._make_checkpoint()
        self.stopped_by = stop.signal

    def _is_due(self, chunk: Chunk) -> bool:
        """Whether a checkpoint comes after this chunk.

        That depends on its place alone, as everything does, unless the job asks for checkpoints by the clock too.
        """
        index: int = chunk.after["index"]
        if index > chunk.before["index"] and index % self._checkpoint_every == 0:
            return True
        seconds = self._config.output.checkpoint_seconds
        return seconds is not None and index > self._saved_index and time.monotonic() - self._saved >= seconds

    def _learn_chunk(self, chunk: Chunk, stop: StopRequest, progress: Progress) -> None:
        learner = self._learner
        if learner is None and len(chunk):
            schema = make_schema(self._config, chunk.events)
            tell_fields(self._console, schema)
            tell_likely_ids(self._console, schema, chunk.events, self._config)
            learner = self._learner = self._made_ready(make_online(self._config, schema))
            self._open_sinks(learner, None)
        if learner is None:
            self._set_aside(chunk.rejected)
            self.position = chunk.after
            return
        # At once, unless events may make the schema grow: then each mini-batch must meet it as those before left it.
        grows = learner.schema is None or learner.schema.may_grow
        whole = None if grows or not len(chunk) else encode(learner, chunk, self._config)
        answers = Answers(chunk, responsibilities=self._config.output.responsibilities)
        row = 0
        for one in _mini_batches(learner, chunk, whole, self._config):
            self._set_aside(one.rejected)
            if one.batch is not None:
                self._learn_batch(learner, chunk, row, one.batch, answers)
                if progress.due():
                    progress.show(self.n_events, **self._history.facts(learner))
            row, self.position = one.stop, chunk.position(one.stop_index)
            if stop.requested:
                break
        if whole is not None:
            counted = whole if row == len(chunk) else encode(learner, chunk, self._config, slice(row))
            learner.ignored_fields.update(counted.ignored_fields)
        for sink in self._sinks.values():
            answers.write(sink, learner)

    def _learn_batch(self, learner: OnlineEM, chunk: Chunk, row: int, batch: Batch, answers: Answers) -> None:
        # There is no mixture yet to score the events of the warm-up.
        n_warm = _n_of_warm_up(learner, batch)
        try:
            # Also of no events, for the fields that they had and the schema ignores to be counted.
            prediction = learner.predict_then_update(batch)
        except FamilyError as error:
            raise DataError(
                f"{self._source.name}: a new field came after {counted(self.n_events, 'event')} and the model "
                f"cannot take it ({error}); declare it in schema.fields, or set schema.unknown=ignore"
            ) from error
        kept = answers.add(row, batch, prediction, n_warm)
        log_prob = prediction.log_prob[n_warm:]
        self._ranking.add(chunk.label, kept[n_warm:], log_prob)
        self.n_events += batch.n_events
        self._n_warm_up += n_warm
        self._history.add(self.n_events, log_prob, learner)
        if self._observer is not None:
            self._observer.batch(learner, batch.n_events, log_prob, batch.time)

    def _set_aside(self, rejections: Sequence[Rejection]) -> None:
        set_aside(rejections, self._quarantine, self._config)
        if self._observer is not None:
            for rejection in rejections:
                self._observer.quarantined(rejection.field, rejection.reason)

    def _make_checkpoint(self) -> None:
        if self._snapshot_path is None or self._learner is None:
            return
        self._save(finished=False)
        self._learner = self._made_ready(_load(self._snapshot_path))

    def _made_ready(self, learner: OnlineEM) -> OnlineEM:
        # Not for what is left of the source: a run that goes on learns exactly as one that was not disturbed.
        return learner.expect(self._source.least_events)

    def _save(self, *, finished: bool) -> None:
        if self._snapshot_path is None or self._learner is None:
            return
        assert self.position is not None
        checkpoint = Checkpoint(
            settings=settings_of(self._config),
            finished=finished,
            position=self.position,
            n_events=self.n_events,
            n_warm_up=self._n_warm_up,
            history={} if finished else self._history.state(),
            ranking={} if finished else self._ranking.state(),
            quarantine={} if finished else self._quarantine.commit(),
            sinks={} if finished else {kind: sink.commit() for kind, sink in self._sinks.items()},
        )
        save(self._learner, self._snapshot_path, metadata={"source": self._source.name, **checkpoint.metadata()})
        self._can_go_on = True
        self._saved, self._saved_index = time.monotonic(), self.position["index"]
        fields = {"path": str(self._snapshot_path), "n_events": self.n_events, "finished": finished}
        _log.info("snapshot", extra={"fields": fields})
        if self._observer is not None:
            self._observer.snapshot_written()

    def finish(self) -> None:
        """Give every file its name; after a stop, so that another start takes them up again."""
        learner = self._learner
        if learner is None or self.n_events == 0:
            if self.stopped_by:
                raise DataError(
                    f"stopped by {signal_name(self.stopped_by)} before any event was learned; nothing was written"
                )
            raise nothing_usable(self._source, self._quarantine)
        self._within_warm_up = learner.warming_up
        if self.stopped_by:
            self._save(finished=False)
        try:
            learner.finish_warm_up()
        except NotFittedError as error:
            # All events were without weight.
            raise nothing_usable(self._source, self._quarantine) from error
        picture = self._config.output.picture
        with ExitStack() as stack:
            if picture is not None:
                points = self._history.points()
                stack.enter_context(self._illustrator.drawing(self._folder / picture, "plot_run", learner, points))
            for output in self._outputs:
                output.publish()
            self._outputs = []
            if not self.stopped_by:
                self._save(finished=True)
                self._can_go_on = False

    def report(self, seconds: float) -> None:
        """Say how it went."""
        console, learner, history = self._console, self._learner, self._history
        assert learner is not None
        if self._within_warm_up and not self.stopped_by:
            say(
                console,
                f"the source ended within the warm-up of {learner.warm_up:,} events: the components were made from all "
                "of them at the end, and none has a score; fit or a smaller learner.warm_up suits so few events better",
                "yellow",
            )
        prior = learner.model.prior_weight * learner.model.n_components
        if prior >= learner.warm_up:
            say(
                console,
                f"the priors of all components weigh {prior:g} events, the warm-up that they are made from only "
                f"{learner.warm_up:,}: components may blur; lower model.prior_weight or raise learner.warm_up",
                "yellow",
            )
        if self.stopped_by:
            going_on = "" if self._snapshot_path is None else "; the same command goes on from there"
            within = ", within the warm-up" if self._within_warm_up else ""
            say(
                console,
                f"stopped by {signal_name(self.stopped_by)} after the batch in hand{within}; everything learned until "
                f"then is kept{going_on}",
                "yellow",
            )
        n_now = self.n_events - self._n_before
        of_them = "" if n_now == self.n_events else f", {n_now:,} of them now,"
        say(
            console,
            f"{counted(self.n_events, 'event')} from {self._source.name}{of_them} in {seconds:.1f} s "
            f"({n_now / seconds:,.0f} events/s), mean log-likelihood {history.shown_mean}, "
            f"effective components {learner.effective_components:.2f}",
            "bold",
        )
        if self._sinks:
            say(
                console,
                f"{counted(self._n_warm_up, 'event')} came within the warm-up, before there was a mixture: their "
                "component and log_prob are null",
            )
        left_out = sum((sink.left_out for sink in self._sinks.values()), Counter[str]())
        report(console, learner, self._quarantine, left_out)
        self._ranking.report(console, after_warm_up=True)
        output = self._config.output
        written: list[Path | str] = [sink.name for sink in self._sinks.values()]
        if self._quarantine.count:
            written.append(self._quarantine.path)
        written += [self._folder / name for name in (output.snapshot, output.picture) if name is not None]
        list_files(console, written)
        if self.stopped_by:
            _log.info("stopped", extra={"fields": {"by": signal_name(self.stopped_by)}})
        told = {
            "n_events": self.n_events,
            "n_quarantined": self._quarantine.count,
            "seconds": round(seconds, 3),
            "mean_log_likelihood": history.mean,
            "effective_components": round(learner.effective_components, 2),
            "files": [str(path) for path in written],
        }
        _log.info("finished", extra={"fields": told})

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None:
            return
        self._close()
        if isinstance(error, ChangedSourceError):
            # The same command would be refused again.
            raise DataError(f"{error} (--fresh)") from error
        if self._can_go_on:
            say(
                Console(stderr=True, quiet=self._console.quiet),
                "what was done up to the last checkpoint is kept: the same command goes on from there",
                "yellow",
            )

    def _close(self) -> None:
        """Leave what another start can go on with, or nothing."""
        with ExitStack() as stack:
            for output in self._outputs:
                stack.callback(output.close, keep=self._can_go_on)


def _load(path: Path) -> OnlineEM:
    learner = load(path)
    assert isinstance(learner, OnlineEM)
    return learner


class _MiniBatch(NamedTuple):
    """Events of a chunk up to a row and the index there: those to learn, if any, and those that cannot be used."""

    batch: Batch | None
    rejected: list[Rejection]
    stop: int
    stop_index: int


def _mini_batches(learner: OnlineEM, chunk: Chunk, whole: Batch | None, config: Config) -> Iterator[_MiniBatch]:
    """Yield a chunk batch by batch, cut at multiples of the batch size in the source.

    Parameters
    ----------
    learner
        It learns each before the next is asked for.
    chunk
        The events.
    whole
        All of them encoded, or None where each batch is to be encoded when its turn comes.
    config
        The job's.

    """
    size = config.learner.batch_size
    unread = deque(chunk.rejected)
    errors = deque(sorted(whole.rejected, key=lambda error: error.index) if whole is not None else ())
    first, last = chunk.before["index"], chunk.after["index"]
    start = 0
    for stop_index in [*range((first // size + 1) * size, last, size), last]:
        stop = int(np.searchsorted(chunk.index, stop_index))
        rejected = []
        while unread and unread[0].index < stop_index:
            rejected.append(unread.popleft())
        batch = None
        if whole is None and start < stop:
            batch = encode(learner, chunk, config, slice(start, stop))
            rejected += explain(batch.rejected, batch.schema, chunk, config, start)
        elif whole is not None:
            batch = _part(whole, start, stop)
            found = []
            while errors and errors[0].index < stop:
                found.append(errors.popleft())
            rejected += explain(found, whole.schema, chunk, config)
        yield _MiniBatch(batch, sorted(rejected, key=lambda one: one.index), stop, stop_index)
        start = stop


def _part(whole: Batch, start: int, stop: int) -> Batch:
    """The events of some rows of a chunk that is encoded as a whole."""
    if whole.accepted is None:
        return whole.select(slice(start, stop))
    first, last = np.searchsorted(whole.accepted, [start, stop])
    return replace(whole.select(slice(first, last)), accepted=whole.accepted[first:last] - start)


def _n_of_warm_up(learner: OnlineEM, batch: Batch) -> int:
    """How many events at the start of a batch, about to be learned, come before there is a mixture."""
    left = learner.warm_up_left
    if not left:
        return 0
    # An event without weight is scored, but it brings the end of the warm-up no nearer.
    told = np.ones(batch.n_events, bool) if batch.weight is None else batch.weight > 0.0
    return int(np.count_nonzero(np.cumsum(told) - told < left))


def _strides(config: Config, source: Source) -> tuple[int, int]:
    """Events in a chunk, whole batches, and events between two checkpoints, whole chunks."""
    size, wanted = config.learner.batch_size, config.output.checkpoint_every
    rows = min(chunk_rows(source, size), -(-wanted // size) * size)
    return rows, -(-wanted // rows) * rows
