"""What the commands `run`, `fit` and `score` do."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from stream_em import Batch, BatchEM, EventError, FamilyError, NotFittedError, OnlineEM, Schema, load, save
from stream_em.cli.build import chunk_rows, make_batch, make_online, make_schema, make_source
from stream_em.cli.config import Config, ConfigError, SourceSection
from stream_em.cli.display import Progress, component_table, say
from stream_em.cli.outputs import PendingFile, Quarantine, ScoredEvents, is_quarantine, is_scored
from stream_em.cli.ranking import RankingScore
from stream_em.sources import Chunk, Rejection, Rows, Source, SourceError, same_file

# Points of the history that the picture draws; more would not be seen.
_MOST_POINTS = 512


class DataError(ValueError):
    """Events that cannot be used, found by a job."""


def run(config: Config, console: Console, *, read: Sequence[Path] = ()) -> None:
    """Score each batch of events, then learn from it; write scores, snapshot, picture and quarantine.

    Files that were `read` for the configuration are not overwritten, nor are those of the source.
    """
    output = config.output
    folder = Path(output.folder)
    source = _source(
        config,
        console,
        read,
        (output.scored_events, output.snapshot, output.picture, output.quarantine),
        fields=config.fields_.fields,
    )
    if output.picture is not None:
        # To learn at the end of a long run that no picture can be drawn would be too late.
        load_plots()
    ranking = _Ranking(config.source)
    history = _History()
    learner: OnlineEM | None = None
    scored: ScoredEvents | None = None
    n_learned = 0
    warm_up = _WarmUp()
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        quarantine = stack.enter_context(Quarantine(folder / output.quarantine))
        progress = stack.enter_context(Progress(console))
        for chunk in _until_stopped(source.chunks(chunk_rows(source, config.learner.batch_size)), stop):
            _set_aside(chunk.rejected, quarantine, config)
            if not len(chunk):
                continue
            if learner is None:
                learner = make_online(config, make_schema(config, chunk.events))
                if output.scored_events is not None:
                    scored = stack.enter_context(_scored_file(config, folder / output.scored_events, learner.schema))
            parts = _Parts()
            for start, batch in _mini_batches(learner, chunk, quarantine, config):
                # There is no mixture yet to score the events of the warm-up.
                n_warm = warm_up.count(learner, batch)
                try:
                    # Also of no events, for the fields that they had and the schema ignores to be counted.
                    prediction = learner.predict_then_update(batch)
                except FamilyError as error:
                    raise DataError(
                        f"{source.name}: a new field came after {n_learned:,} events and the model cannot take it "
                        f"({error}); declare it in schema.fields, or set schema.unknown=ignore"
                    ) from error
                parts.add(start, batch, prediction, keep_responsibilities=output.responsibilities, n_warm=n_warm)
                ranking.add(chunk.label, parts.kept[-1][n_warm:], prediction.log_prob[n_warm:])
                n_learned += batch.n_events
                history.add(n_learned, prediction.log_prob[n_warm:], learner)
                if progress.due():
                    progress.show(n_learned, **history.facts(learner))
                if stop.requested:
                    break
            if scored is not None:
                parts.write(scored, chunk, learner)
        if learner is None or n_learned == 0:
            raise DataError(_nothing_usable(source, quarantine))
        too_short = learner.warming_up
        learner.finish_warm_up()
        seconds = progress.seconds
        written = [quarantine.path] if quarantine.count else []
        if scored is not None:
            written.insert(0, scored.path)
        if output.snapshot is not None:
            save(learner, folder / output.snapshot, metadata={"source": source.name})
            written.append(folder / output.snapshot)
        if output.picture is not None:
            _picture(folder / output.picture, lambda path: load_plots().plot_run(learner, history.points(), path))
            written.append(folder / output.picture)
    if too_short:
        say(
            console,
            f"the source ended within the warm-up of {learner.warm_up:,} events: the components were made from all "
            "of them at the end, and none has a score; fit or a smaller learner.warm_up suits so few events better",
            "yellow",
        )
    if stop.requested:
        say(
            console,
            f"stopped by {stop.name} after the batch in hand; everything learned until then is kept",
            "yellow",
        )
    say(
        console,
        f"{n_learned:,} events from {source.name} in {seconds:.1f} s ({n_learned / seconds:,.0f} events/s), "
        f"mean log-likelihood {history.shown_mean}, effective components {learner.effective_components:.2f}",
        "bold",
    )
    if scored is not None:
        say(
            console,
            f"{warm_up.n_events:,} events came within the warm-up, before there was a mixture: their component and "
            "log_prob are null",
        )
    _report(console, learner, quarantine, None if scored is None else scored.left_out)
    ranking.report(console)
    _list_files(console, written)


def fit(config: Config, console: Console, *, read: Sequence[Path] = ()) -> None:
    """Fit by batch EM, reading the source once for each iteration; write the snapshot and a picture.

    Files that were `read` for the configuration are not overwritten, nor are those of the source.
    """
    output = config.output
    folder = Path(output.folder)
    written_names = (output.snapshot, output.picture, output.quarantine)
    source = _source(config, console, read, written_names, fields=config.fields_.fields)
    if not source.restartable:
        raise SourceError(
            f"{source.name}: fit reads its source once for each iteration, and this one can be read only "
            "once; write it to a file first, or use run"
        )
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        quarantine = stack.enter_context(Quarantine(folder / output.quarantine))
        progress = stack.enter_context(Progress(console))
        rows = chunk_rows(source, config.learner.batch_size)
        first_events = next((chunk.events for chunk in source.chunks(rows) if len(chunk)), None)
        if first_events is None:
            for chunk in source.chunks(rows):
                _set_aside(chunk.rejected, quarantine, config)
            raise DataError(_nothing_usable(source, quarantine))
        schema = make_schema(config, first_events)
        fitted = make_batch(config, schema)
        n_read = passes = 0

        def batches() -> Iterator[Batch]:
            nonlocal n_read, passes, schema
            passes += 1
            # Events that cannot be used are the same in every pass.
            first = quarantine if passes == 1 else None
            for chunk in source.chunks(rows):
                if stop.requested:
                    raise KeyboardInterrupt
                if first is not None:
                    _set_aside(chunk.rejected, first, config)
                if not len(chunk):
                    continue
                batch = _encode(schema, chunk, slice(0, len(chunk)), first, config, learning=True)
                schema = batch.schema
                n_read += batch.n_events
                yield batch
                if progress.due():
                    progress.show(n_read, reading=f"pass {passes}", **_log_posterior(fitted))

        try:
            fitted.fit(batches)
        except NotFittedError as error:
            raise DataError(_nothing_usable(source, quarantine)) from error
        seconds = progress.seconds
        written = [quarantine.path] if quarantine.count else []
        if output.snapshot is not None:
            save(fitted, folder / output.snapshot, metadata={"source": source.name})
            written.append(folder / output.snapshot)
        if output.picture is not None:
            draw_learner(fitted, folder / output.picture)
            written.append(folder / output.picture)
    n_iterations = len(fitted.history)
    ending = "converged" if fitted.converged else "stopped before it converged: raise learner.max_iter"
    say(
        console,
        f"{fitted.n_events:,} events from {source.name}, {passes} passes in {seconds:.1f} s "
        f"({n_read / seconds:,.0f} events/s), {n_iterations} iterations, {ending}; "
        f"mean log-posterior {fitted.history[-1]:.4f}",
        "bold",
    )
    _report(console, fitted, quarantine, None)
    _list_files(console, written)


def score(snapshot: Path, config: Config, console: Console, *, read: Sequence[Path] = ()) -> None:
    """Score a source with a learned model, without learning from it.

    Neither the snapshot nor files of the source nor those that were `read` for the configuration are overwritten.
    """
    output = config.output
    if output.scored_events is None:
        raise DataError("score has nothing to write: output.scored_events is null")
    learner = load_learner(snapshot)
    if learner.schema is None:
        raise DataError(f"{snapshot}: the model has not seen any event and knows no fields")
    kinds = {field.name: field.kind for field in learner.schema.fields}
    written = (output.scored_events, output.quarantine)
    source = _source(config, console, [snapshot, *read], written, fields=kinds, only=learner.schema.names)
    ranking = _Ranking(config.source)
    total = 0.0
    folder = Path(output.folder)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        quarantine = stack.enter_context(Quarantine(folder / output.quarantine))
        scored = stack.enter_context(_scored_file(config, folder / output.scored_events, learner.schema))
        progress = stack.enter_context(Progress(console))
        for chunk in _until_stopped(source.chunks(chunk_rows(source, config.learner.batch_size)), stop):
            _set_aside(chunk.rejected, quarantine, config)
            if not len(chunk):
                continue
            batch = _encode(learner, chunk, slice(0, len(chunk)), quarantine, config, learning=False)
            if batch.n_events:
                parts = _Parts()
                prediction = learner.score_events(batch)
                parts.add(0, batch, prediction, keep_responsibilities=output.responsibilities)
                ranking.add(chunk.label, parts.kept[-1], prediction.log_prob)
                parts.write(scored, chunk, learner)
                total += float(prediction.log_prob.sum())
            if progress.due():
                progress.show(scored.count, mean_log_likelihood=f"{total / max(scored.count, 1):.4f}")
        if not scored.count:
            raise DataError(_nothing_usable(source, quarantine))
        seconds = progress.seconds
    if stop.requested:
        say(
            console,
            f"stopped by {stop.name} after the batch in hand; the scores until then are kept",
            "yellow",
        )
    say(
        console,
        f"{scored.count:,} events from {source.name} scored in {seconds:.1f} s "
        f"({scored.count / seconds:,.0f} events/s), mean log-likelihood {total / scored.count:.4f}",
        "bold",
    )
    _report_counts(console, quarantine, scored.left_out, {})
    ranking.report(console)
    _list_files(console, [scored.path, *([quarantine.path] if quarantine.count else [])])


def load_learner(path: Path) -> OnlineEM | BatchEM:
    """Return the learner that a snapshot holds."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a snapshot; name the .arrow file in it")
    if not path.exists():
        raise DataError(f"{path}: there is no such file; a snapshot is what run, fit and merge write")
    return load(path)


def _source(
    config: Config, console: Console, read: Sequence[Path], written: Sequence[str | None], **known: Any
) -> Source:
    """Open the source, and refuse outputs that would overwrite what is read."""
    output = config.output
    folder = Path(output.folder)
    own = []
    if output.scored_events is not None and is_scored(folder / output.scored_events, output.prefix):
        own.append(folder / output.scored_events)
    if is_quarantine(folder / output.quarantine):
        own.append(folder / output.quarantine)
    source = make_source(config.source, leave_out=own, **known)
    for path in (folder / name for name in written if name is not None):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder, and the name of a file is needed to write to")
        if not path.exists():
            continue
        for other in (*map(Path, source.paths), *read):
            if same_file(path, other):
                raise ConfigError(
                    f"{path}: is read by this job and would be overwritten; give the output another folder or name"
                )
    if source.left_out:
        say(console, f"not read, since this job writes them: {', '.join(source.left_out)}", "yellow")
    return source


class _WarmUp:
    """How many events came before there was a mixture."""

    def __init__(self) -> None:
        self.n_events = 0

    def count(self, learner: OnlineEM, batch: Batch) -> int:
        """Events at the start of a batch, about to be learned, that belong to the warm-up."""
        left = learner.warm_up_left
        if not left:
            return 0
        # An event without weight is scored, but it brings the end of the warm-up no nearer.
        told = np.ones(batch.n_events, bool) if batch.weight is None else batch.weight > 0.0
        n_warm = int(np.count_nonzero(np.cumsum(told) - told < left))
        self.n_events += n_warm
        return n_warm


class StopRequest:
    """Ctrl-C and a polite kill, heeded between batches.

    A signal sets `requested`. Only while the job waits for its source does it also raise KeyboardInterrupt,
    since standard input may never say another word. A second signal interrupts whatever goes on.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.requested = self.requested, True
        self.name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if again or self._waiting:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Be interrupted at once in this block."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False


def _until_stopped(chunks: Iterator[Chunk], stop: StopRequest) -> Iterator[Chunk]:
    while not stop.requested:
        try:
            with stop.waiting():
                chunk = next(chunks, None)
        except KeyboardInterrupt:
            return
        if chunk is None:
            return
        yield chunk


class _Parts:
    """What was predicted for a chunk, batch by batch."""

    def __init__(self) -> None:
        self.kept: list[npt.NDArray[np.intp]] = []
        self._component: list[npt.NDArray[np.int64]] = []
        self._log_prob: list[npt.NDArray[np.float64]] = []
        self._responsibilities: list[npt.NDArray[np.float64]] = []
        self._unknown: list[npt.NDArray[np.bool_]] = []
        self._gaps = False

    def add(self, start: int, batch: Batch, prediction: Any, *, keep_responsibilities: bool, n_warm: int = 0) -> None:
        self._unknown.append(np.arange(batch.n_events) < n_warm)
        if batch.accepted is None:
            self.kept.append(np.arange(start, start + batch.n_events))
        else:
            self.kept.append(start + batch.accepted)
            self._gaps = True
        self._component.append(prediction.component)
        self._log_prob.append(prediction.log_prob)
        if keep_responsibilities:
            self._responsibilities.append(prediction.responsibilities)

    def write(self, scored: ScoredEvents, chunk: Chunk, learner: OnlineEM | BatchEM) -> None:
        kept = np.concatenate(self.kept) if self.kept else np.empty(0, dtype=np.intp)
        if not len(kept):
            return
        whole = not self._gaps and len(kept) == kept[-1] + 1
        scored.add(
            chunk,
            slice(0, len(kept)) if whole else kept,
            np.concatenate(self._component),
            np.concatenate(self._log_prob),
            np.concatenate(self._responsibilities) if self._responsibilities else None,
            learner.parameters.component_ids.tolist(),
            np.concatenate(self._unknown),
        )


class _History:
    """How a run went, at no more than `_MOST_POINTS` points: neighbours are joined when there are more."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float, int, npt.NDArray[np.float64]]] = []
        self._open = (0.0, 0)
        self._stride = 1
        self._n_batches = 0
        self._total = 0.0
        self._count = 0

    def add(self, n_events: int, log_prob: npt.NDArray[np.float64], learner: OnlineEM) -> None:
        if not len(log_prob):
            return
        total = float(log_prob.sum())
        self._total += total
        self._count += len(log_prob)
        self._open = (self._open[0] + total, self._open[1] + len(log_prob))
        self._n_batches += 1
        if self._n_batches % self._stride == 0:
            self._points.append((n_events, *self._open, np.array(learner.parameters.weights)))
            self._open = (0.0, 0)
            if len(self._points) >= _MOST_POINTS:
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [(b[0], a[1] + b[1], a[2] + b[2], b[3]) for a, b in pairs]
                self._stride *= 2

    @property
    def shown_mean(self) -> str:
        """Mean log-likelihood of all events scored after the warm-up."""
        return f"{self._total / self._count:.4f}" if self._count else "not known"

    def points(self) -> list[tuple[int, float, npt.NDArray[np.float64]]]:
        """Events so far, mean log-likelihood since the point before, weights."""
        return [(n_events, total / count, weights) for n_events, total, count, weights in self._points]

    def facts(self, learner: OnlineEM) -> dict[str, str]:
        if not self._count:
            return {"warming": "up"}
        return {
            "mean_log_likelihood": self.shown_mean,
            "effective_components": f"{learner.effective_components:.2f}",
        }


class _Ranking:
    """ROC-AUC of the anomaly score -log p(x), when the source has labels."""

    def __init__(self, section: SourceSection) -> None:
        self._score = RankingScore()
        self._wanted = section.label is not None or section.river is not None
        self._given = section.anomaly_labels
        self._unlabelled = 0
        self._problem = ""

    def add(
        self,
        label: pa.ChunkedArray | None,
        kept: npt.NDArray[np.intp],
        log_prob: npt.NDArray[np.float64],
    ) -> None:
        if label is None or not len(kept) or self._problem or not self._wanted:
            return
        label = label.slice(int(kept[0]), int(kept[-1] - kept[0]) + 1)
        if len(label) > len(kept):
            label = label.take(pa.array(kept - kept[0]))
        there = np.asarray(label.is_valid())
        anomalous = self._anomalous(label)
        if anomalous is not None:
            self._unlabelled += int(np.count_nonzero(~there))
            self._score.add(-log_prob[there], anomalous[there])

    def _anomalous(self, label: pa.ChunkedArray) -> npt.NDArray[np.bool_] | None:
        if pa.types.is_dictionary(label.type):
            label = label.cast(label.type.value_type)
        if self._given is not None:
            texts = [str(value) for value in self._given]
            if pa.types.is_boolean(label.type):
                texts = [text.lower() for text in texts]
            # Otherwise compared as text, so that 1 in the configuration is both 1 and "1" in the data.
            elif pa.types.is_floating(label.type):
                numbers = pa.array([float(text) for text in texts if _is_number(text)], pa.float64())
                return np.asarray(pc.is_in(label, value_set=numbers.cast(label.type)))
            return np.asarray(pc.is_in(label.cast(pa.string()), value_set=pa.array(texts, pa.string())))
        if pa.types.is_boolean(label.type):
            return np.asarray(label.fill_null(False))
        if pa.types.is_integer(label.type) or pa.types.is_floating(label.type):
            values = np.asarray(label.cast(pa.float64()).fill_null(0.0))
            ones: npt.NDArray[np.bool_] = values == 1.0
            if (ones | (values == 0.0)).all():
                return ones
        if pa.types.is_null(label.type):
            return np.zeros(len(label), bool)
        example = next(value for value in label.to_pylist() if value not in (None, 0, 1))
        self._problem = (
            f"no ROC-AUC: the labels are not 0 and 1 (there is {example!r}); say which of them mean anomaly "
            "in source.anomaly_labels"
        )
        return None

    def report(self, console: Console) -> None:
        if not self._wanted:
            return
        score = self._score
        if self._problem:
            say(console, self._problem, "yellow")
        elif not score.defined:
            lacking = "normal events" if score.n_anomalous else "anomalies"
            say(console, f"no ROC-AUC: after the warm-up there were no {lacking} among the labels", "yellow")
        else:
            bound = f" ± {score.bound:.1g}" if score.bound else ""
            unlabelled = f", {self._unlabelled:,} without a label" if self._unlabelled else ""
            say(
                console,
                f"ROC-AUC of -log p(x) against the labels, after the warm-up: {score.area:.4f}{bound} "
                f"({score.n_anomalous:,} anomalies, {score.n_normal:,} normal{unlabelled})",
                "bold green",
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mini_batches(
    learner: OnlineEM, chunk: Chunk, quarantine: Quarantine, config: Config
) -> Iterator[tuple[int, Batch]]:
    """Yield the first row and the events of each mini-batch of a chunk.

    The whole chunk is encoded at once, unless its events may make the schema grow: then each mini-batch must meet
    the schema as those before have left it.
    """
    size = config.learner.batch_size
    if learner.schema is None or learner.schema.may_grow:
        for start in range(0, len(chunk), size):
            yield start, _encode(learner, chunk, slice(start, start + size), quarantine, config, learning=True)
        return
    whole = _encode(learner, chunk, slice(0, len(chunk)), None, config, learning=True)
    rejected = iter(whole.rejected)
    error = next(rejected, None)
    for start in range(0, len(chunk), size):
        while error is not None and error.index < start + size:
            _set_aside((_explain(error, chunk, error.index, config),), quarantine, config)
            error = next(rejected, None)
        if whole.accepted is None:
            piece = whole.select(slice(start, start + size))
        else:
            first, last = np.searchsorted(whole.accepted, [start, start + size])
            piece = replace(whole.select(slice(first, last)), accepted=whole.accepted[first:last] - start)
        yield start, replace(piece, ignored_fields=whole.ignored_fields) if start == 0 else piece


def _encode(
    encoder: OnlineEM | BatchEM | Schema,
    chunk: Chunk,
    span: slice,
    quarantine: Quarantine | None,
    config: Config,
    *,
    learning: bool,
) -> Batch:
    """Encode some events of a chunk; those that cannot be used go to the quarantine."""
    whole = span.start == 0 and span.stop >= len(chunk)
    events: Rows = chunk.events
    if not whole:
        events = events[span] if isinstance(events, list) else events.slice(span.start, span.stop - span.start)
    batch: Batch = encoder.encode(
        events,
        weight=None if chunk.weight is None or not learning else chunk.weight[span],
        time=None if chunk.time is None or not learning else chunk.time[span],
        on_error="collect",
        extend=learning,
    )
    if quarantine is not None:
        for error in batch.rejected:
            rejection = _explain(error, chunk, span.start + error.index, config)
            _set_aside((rejection,), quarantine, config)
    return batch


def _explain(error: EventError, chunk: Chunk, row: int, config: Config) -> Rejection:
    field, value = error.field, error.value
    named = {"time": config.source.time, "weight": config.source.weight}
    column = named.get(field or "")
    if column is not None:
        # The engine knows event time and weight by these names; the person knows the column.
        event = chunk.reject(row, None, None, "").event
        field, value = column, event.get(column) if isinstance(event, dict) else value
    return chunk.reject(row, field, value, f"expected {error.expected}")


def _set_aside(rejections: tuple[Rejection, ...], quarantine: Quarantine, config: Config) -> None:
    for rejection in rejections:
        if config.output.on_error == "raise":
            raise DataError(f"{rejection} (output.on_error is 'raise')")
        quarantine.add(rejection)


def _scored_file(config: Config, path: Path, schema: Schema | None) -> ScoredEvents:
    if schema is None:
        raise AssertionError("the schema is known once the learner is made")
    section = config.source
    carried = dict.fromkeys(section.exclude, "excluded")
    label = section.label or ("label" if section.river is not None else None)
    for role, name in (("label", label), ("time", section.time), ("weight", section.weight)):
        if name is not None:
            carried[name] = role
    output = config.output
    return ScoredEvents(path, schema, carried, prefix=output.prefix, responsibilities=output.responsibilities)


def load_plots() -> Any:
    """Return the module that draws, or say what it needs."""
    if find_spec("matplotlib") is None:
        raise DataError("a picture needs matplotlib: pip install 'stream-em[plots]', or set output.picture=null")
    from stream_em import plots

    return plots


def draw_learner(learner: OnlineEM | BatchEM, path: Path) -> None:
    """Write a picture of the components."""
    _picture(path, lambda pending: load_plots().plot_learner(learner, pending))


def _picture(path: Path, draw: Callable[[Path], Any]) -> None:
    file = PendingFile(path)
    try:
        draw(file.pending)
        file.commit()
    finally:
        file.discard()


def _log_posterior(learner: BatchEM) -> dict[str, str]:
    return {"mean_log_posterior": f"{learner.history[-1]:.4f}"} if learner.history else {}


def _nothing_usable(source: Source, quarantine: Quarantine) -> str:
    if not quarantine.count:
        return f"{source.name}: no event was learned from"
    reason, count = quarantine.reasons.most_common(1)[0]
    return (
        f"{source.name}: none of its {quarantine.count:,} events could be used; {count:,} of them because of {reason}"
    )


def _report(
    console: Console, learner: OnlineEM | BatchEM, quarantine: Quarantine, left_out: Counter[str] | None
) -> None:
    console.print(component_table(learner))
    _report_counts(console, quarantine, left_out or Counter(), learner.ignored_fields)


def _report_counts(console: Console, quarantine: Quarantine, left_out: Counter[str], ignored: dict[str, int]) -> None:
    if quarantine.count:
        say(console, f"{quarantine.count:,} events could not be used and are in quarantine:", "yellow")
        for reason, count in quarantine.reasons.most_common(5):
            say(console, f"  {count:,} × {reason}")
        if len(quarantine.reasons) > 5:
            say(console, f"  and {len(quarantine.reasons) - 5} more reasons")
    for name, count in ignored.items():
        say(console, f"field {name!r} is not in the schema and was ignored in {count:,} events", "yellow")
    for name, count in left_out.items():
        say(console, f"field {name!r} of {count:,} events has no place in the scored events", "yellow")


def _list_files(console: Console, paths: list[Path]) -> None:
    for path in paths:
        say(console, f"wrote {path}")
