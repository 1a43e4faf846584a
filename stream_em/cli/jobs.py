"""What the commands `fit` and `score` do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import Signals

from rich.console import Console

from stream_em import Batch, BatchEM, NotFittedError, save
from stream_em.cli.build import chunk_rows, make_batch, make_schema
from stream_em.cli.checkpoints import refuse_unfinished_run
from stream_em.cli.common import (
    Answers,
    DataError,
    accepted_rows,
    encode,
    explain,
    list_files,
    load_learner,
    nothing_usable,
    open_job_source,
    open_scored_events,
    report,
    report_counts,
    scoring,
    set_aside,
    tell_fields,
    tell_likely_ids,
)
from stream_em.cli.config import Config
from stream_em.cli.display import Progress, counted, say
from stream_em.cli.drawing import Illustrator
from stream_em.cli.outputs import Quarantine, only_writer
from stream_em.cli.ranking import LabelledRanking
from stream_em.cli.stopping import StopRequest, signal_name
from stream_em.sources import SourceError


def fit(config: Config, console: Console, *, read: Sequence[Path] = ()) -> None:
    """Fit by batch EM, reading the source once for each iteration; write the snapshot and a picture.

    Files that were `read` for the configuration are not overwritten, nor are those of the source.
    """
    output = config.output
    folder = Path(output.folder)
    written_names = (output.snapshot, output.picture, output.quarantine)
    source = open_job_source(config, console, read, written_names, fields=config.fields_.fields)
    if not source.restartable:
        raise SourceError(
            f"{source.name}: fit reads its source once for each iteration, and this one can be read only "
            "once; write it to a file first, or use run"
        )
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        illustrator = stack.enter_context(Illustrator())
        if output.snapshot is not None:
            stack.enter_context(only_writer(folder / output.snapshot))
        refuse_unfinished_run(config)
        with Quarantine(folder / output.quarantine) as quarantine, Progress(console) as progress:
            rows = chunk_rows(source, config.learner.batch_size)
            first_events = next((chunk.events for chunk in source.chunks(rows) if len(chunk)), None)
            if first_events is None:
                for chunk in source.chunks(rows):
                    set_aside(chunk.rejected, quarantine, config)
                raise nothing_usable(source, quarantine)
            schema = make_schema(config, first_events)
            tell_fields(console, schema)
            tell_likely_ids(console, schema, first_events, config)
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
                    if output.picture is not None:
                        illustrator.prepare(chunk, source)
                    if first is not None:
                        set_aside(chunk.rejected, first, config)
                    if not len(chunk):
                        continue
                    batch = encode(schema, chunk, config)
                    if first is not None:
                        set_aside(explain(batch.rejected, batch.schema, chunk, config), first, config)
                    schema = batch.schema
                    n_read += batch.n_events
                    yield batch
                    if progress.due():
                        progress.show(n_read, reading=f"pass {passes}", **_log_posterior(fitted))

            try:
                fitted.fit(batches)
            except NotFittedError as error:
                raise nothing_usable(source, quarantine) from error
            seconds = progress.seconds
            written = [quarantine.path] if quarantine.count else []
            if output.snapshot is not None:
                save(fitted, folder / output.snapshot, metadata={"source": source.name})
                written.append(folder / output.snapshot)
            ranking = LabelledRanking(config.source)
            if ranking.wanted:
                for chunk in stop.until(source, rows):
                    if len(chunk):
                        batch = encode(fitted, chunk, config, learning=False)
                        ranking.add(chunk.label, accepted_rows(batch), fitted.log_prob(batch))
        if output.picture is not None:
            illustrator.draw(folder / output.picture, "plot_learner", fitted)
            written.append(folder / output.picture)
    n_iterations = len(fitted.history)
    of_start = f" of the best of {config.learner.n_init} starts" if config.learner.n_init > 1 else ""
    ending = "converged" if fitted.converged else "stopped before it converged: raise learner.max_iter"
    say(
        console,
        f"{counted(fitted.n_events, 'event')} from {source.name}, {counted(passes, 'pass', 'passes')} in "
        f"{seconds:.1f} s ({n_read / seconds:,.0f} events/s), {counted(n_iterations, 'iteration')}{of_start}, "
        f"{ending}; mean log-posterior {fitted.history[-1]:.4f}",
        "bold",
    )
    report(console, fitted, quarantine, Counter())
    if not stop.requested:
        ranking.report(console, after_warm_up=False)
    list_files(console, written)


def score(snapshot: Path, config: Config, console: Console, *, read: Sequence[Path] = ()) -> Signals | None:
    """Score a source with a learned model, without learning from it; return the signal that stopped it, if one did.

    Neither the snapshot nor files of the source nor those that were `read` for the configuration are overwritten.
    """
    output = config.output
    if output.scored_events is None:
        raise DataError("score has nothing to write: output.scored_events is null")
    learner = load_learner(snapshot)
    if learner.schema is None:
        raise DataError(f"{snapshot}: the model has not seen any event and knows no fields")
    config = scoring(config, learner.schema, str(snapshot))
    written = (output.scored_events, output.quarantine)
    source = open_job_source(
        config, console, [snapshot, *read], written, fields=config.fields_.fields, only=learner.schema.names
    )
    refuse_unfinished_run(config)
    ranking = LabelledRanking(config.source)
    total = 0.0
    folder = Path(output.folder)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        quarantine = stack.enter_context(Quarantine(folder / output.quarantine))
        scored = stack.enter_context(open_scored_events(config, folder / output.scored_events, learner.schema))
        progress = stack.enter_context(Progress(console))
        for chunk in stop.until(source, chunk_rows(source, config.learner.batch_size)):
            set_aside(chunk.rejected, quarantine, config)
            if not len(chunk):
                continue
            batch = encode(learner, chunk, config, learning=False)
            set_aside(explain(batch.rejected, batch.schema, chunk, config), quarantine, config)
            if batch.n_events:
                answers = Answers(chunk, responsibilities=output.responsibilities)
                prediction = learner.score_events(batch)
                kept = answers.add(0, batch, prediction)
                ranking.add(chunk.label, kept, prediction.log_prob)
                answers.write(scored, learner)
                total += float(prediction.log_prob.sum())
            if progress.due():
                progress.show(scored.count, mean_log_likelihood=f"{total / max(scored.count, 1):.4f}")
        if not scored.count:
            raise nothing_usable(source, quarantine)
        seconds = progress.seconds
    if stop.signal is not None:
        say(
            console,
            f"stopped by {signal_name(stop.signal)} after the batch in hand; the scores until then are kept",
            "yellow",
        )
    say(
        console,
        f"{counted(scored.count, 'event')} from {source.name} scored in {seconds:.1f} s "
        f"({scored.count / seconds:,.0f} events/s), mean log-likelihood {total / scored.count:.4f}",
        "bold",
    )
    report_counts(console, quarantine, scored.left_out, {})
    ranking.report(console, after_warm_up=False)
    list_files(console, [scored.name, *([quarantine.path] if quarantine.count else [])])
    return stop.signal


def _log_posterior(learner: BatchEM) -> dict[str, str]:
    return {"mean_log_posterior": f"{learner.history[-1]:.4f}"} if learner.history else {}
