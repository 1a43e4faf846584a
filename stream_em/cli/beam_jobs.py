"""Jobs that run on Apache Beam: what the command `refit` and the pipelines share."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from rich.console import Console

from stream_em import NotFittedError, Schema, SchemaError, SnapshotError, save
from stream_em.beam.events import RejectedEvent
from stream_em.beam.expectation import NAMESPACE, REJECTED
from stream_em.beam.reading import ReadEvents
from stream_em.beam.refit import Refit, RefitError
from stream_em.beam.storage import has_pattern
from stream_em.beam.survey import infer_schema
from stream_em.beam.writing import WriteRejected
from stream_em.cli.build import make_model, make_schema, make_source
from stream_em.cli.checkpoints import refuse_unfinished_run
from stream_em.cli.common import DataError, tell_fields
from stream_em.cli.config import Config, ConfigError, SourceSection, load_config
from stream_em.cli.display import component_table, counted, say
from stream_em.cli.drawing import Illustrator, load_plots
from stream_em.columns import Roles, seconds_of
from stream_em.sources import SourceError

# Beam's timers fail on times that are much later than any event's.
EARLIEST, LATEST = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1, 3000))

WORKING = ".refit"
"""Folder, within that of the output, where a refit keeps its iterations until it is done."""


class JobOptions(PipelineOptions):
    """Options of every pipeline: the configuration of the job. All of Beam's options can be given as well."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        parser.add_argument("--config", metavar="FILE", help="YAML file that describes the job, as for stream-em run")
        parser.add_argument(
            "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the YAML file"
        )


# Beam takes for its own what PipelineOptions itself is a base of, and warns of all other options.
class KeyedOptions(JobOptions, PipelineOptions):
    """Options of the pipelines that have a model for each key, or one that starts from another."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        parser.add_argument("--key", metavar="COLUMN", help="column whose every value gets a model of its own")
        parser.add_argument("--initial", metavar="FILE", help="snapshot that every model starts from, as of a refit")


@contextmanager
def options_refused() -> Iterator[None]:
    """Make what a transform refuses of its options an error of the configuration."""
    try:
        yield
    except (SchemaError, SnapshotError, NotFittedError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


_Options = TypeVar("_Options", bound=JobOptions)


def read_job(argv: Sequence[str] | None, kind: type[_Options]) -> tuple[_Options, Config]:
    """Return the options of a pipeline, of its own kind, and the configuration that they name.

    Raises
    ------
    ConfigError
        When there is no configuration, or it cannot be used, or an argument is nobody's.

    """
    job = kind(argv)
    _check_arguments(sys.argv[1:] if argv is None else argv, job)
    embedded_by_default(job)
    if job.config is None:
        raise ConfigError("--config FILE is needed: the YAML file that describes the job")
    config = load_config(job.config, job.set)
    check_folder(config)
    return job, config


def _check_arguments(given: Sequence[str], options: JobOptions) -> None:
    """Refuse arguments that Beam would pass over with a warning, but for options that may be a runner's own."""
    own = [
        f"--{name}"
        for kind in type(options).__mro__
        if issubclass(kind, JobOptions)
        for name in options.view_as(kind).get_all_options(current_only=True)
    ]
    parsers: list[argparse.ArgumentParser] = []
    options.get_all_options(add_extra_args_fn=parsers.append)
    _, unknown = parsers[0].parse_known_args(list(given))
    before = ""
    for argument in unknown:
        name = argument.partition("=")[0]
        if not argument.startswith("-"):
            # What follows an option that has no value yet is its value.
            if not before.startswith("-") or "=" in before:
                raise ConfigError(f"{argument}: expected options; keys of the YAML file come after --set")
        elif near := difflib.get_close_matches(name, own, n=1, cutoff=0.75):
            raise ConfigError(f"{name}: no such option; did you mean {near[0]!r}?")
        before = argument


def check_folder(config: Config) -> None:
    """Refuse a folder of outputs whose name Beam would take for a pattern of names."""
    if has_pattern(config.output.folder):
        raise ConfigError(
            f"output.folder: {config.output.folder!r} must not hold *, ? or [, which Beam takes for patterns"
        )


def check_names(**names: str) -> None:
    """Refuse names of outputs of which one begins with another: a sink removes the files that begin with its name."""
    for (key, name), (other_key, other) in permutations(names.items(), 2):
        if f"{other}-".startswith(f"{name}-"):
            raise ConfigError(
                f"output.{key} and output.{other_key}: files that begin with {name!r} and {other!r} would remove one "
                "another; give one of them another name"
            )


def embedded_by_default(options: PipelineOptions) -> PipelineOptions:
    """Return the options, on Beam's embedded runner for bounded input where they name none.

    What Beam would take by default depends on what it can fetch at that moment, and may not be able to run timers.
    """
    standard = options.view_as(StandardOptions)
    if standard.runner is None and not standard.streaming:
        standard.runner = "FnApiRunner"
    return options


def remove_outputs(folder: str, *patterns: str) -> None:
    """Remove what an earlier job of this kind wrote, which would lie beside the new as if it belonged to it."""
    for found in FileSystems.match([FileSystems.join(folder, pattern) for pattern in patterns]):
        if found.metadata_list:
            FileSystems.delete([file.path for file in found.metadata_list])


def report(pipeline: beam.Pipeline, folder: str, *rejected: str) -> None:
    """Say how many events a pipeline that has ended has used and rejected, and where its output is.

    Raises
    ------
    DataError
        When it could use none of them; what the names of the files of `rejected` events begin with tells the reason.

    """
    totals: Counter[str] = Counter()
    for counter in pipeline.result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]:
        totals[counter.key.metric.name] += counter.result
    console = Console()
    used = f"{counted(totals['events'], 'event')} used, {totals['rejected']:,} rejected; " if totals else ""
    say(console, f"{used}wrote to {folder}", "bold")
    reason = _first_reason([FileSystems.join(folder, f"{name}-*.jsonl") for name in rejected])
    # An engine that counts nothing does not tell that nothing was used.
    if totals and not totals["events"]:
        why = "the source holds none" if reason is None else f"the first of the reasons being: {reason}"
        raise DataError(f"no event could be used, {why}")
    if reason is not None:
        say(console, f"the first that could not be used: {reason}", "yellow")


def _first_reason(patterns: list[str]) -> str | None:
    for found in FileSystems.match(patterns):
        for file in found.metadata_list:
            with FileSystems.open(file.path) as stream:
                return str(json.loads(stream.readline())["reason"])
    return None


class ReadChunks(beam.PTransform):
    """Read any source of the command that can be read again, in one worker; what `ReadEvents` has no eye for."""

    def __init__(self, section: SourceSection, kinds: Mapping[str, str]) -> None:
        super().__init__()
        self.section = section
        self.kinds = kinds
        source = make_source(section, fields=kinds)
        if not source.restartable:
            raise SourceError(f"{source.name}: a pipeline reads its source in its workers; write it to a file first")

    def expand(self, root: Any) -> beam.pvalue.DoOutputsTuple:  # noqa: D102 - Beam's
        one = root.pipeline | "One" >> beam.Create([None])
        return one | "Read" >> beam.ParDo(_Chunks(self.section, self.kinds)).with_outputs(REJECTED, main="events")


class _Chunks(beam.DoFn):
    def __init__(self, section: SourceSection, kinds: Mapping[str, str]) -> None:
        self.section = section
        self.kinds = kinds
        self._rejected = Metrics.counter(NAMESPACE, "rejected")

    def process(self, _: None) -> Iterator[Any]:
        for chunk in make_source(self.section, fields=self.kinds).chunks(65_536):
            for rejection in chunk.rejected:
                event = rejection.event if isinstance(rejection.event, Mapping) else None
                self._rejected.inc()
                yield beam.pvalue.TaggedOutput(REJECTED, RejectedEvent(event, str(rejection)))
            if len(chunk):
                yield chunk.rows


def make_roles(config: Config) -> Roles:
    """Return which columns are not the model's."""
    section, declared = config.source, config.fields_.fields
    label = section.label or ("label" if section.river is not None else None)
    # Under "ignore" the fields that are declared are all that need be read.
    only = tuple(declared) if declared and config.fields_.unknown == "ignore" else None
    return Roles(label, section.time, section.weight, tuple(section.exclude), only, declared or {})


def make_read(config: Config, *, keep: Sequence[str] = ()) -> beam.PTransform:
    """Return the transform that reads the source: tables or lists of dicts, and what could not be read.

    `keep` are columns to be read that are not the model's.
    """
    section = config.source
    if section.river is not None or section.limit is not None or section.has_own_cells or section.path == "-":
        return ReadChunks(section, config.fields_.fields or {})
    assert section.path is not None
    return ReadEvents(
        section.path,
        format=None if section.format == "auto" else section.format,
        roles=make_roles(config),
        keep=tuple(keep),
    )


def keeping_key(config: Config, key: str) -> Config:
    """Return the configuration with the column of the key kept from the model.

    Raises
    ------
    ConfigError
        When it is declared as a field of the model.

    """
    if key in (config.fields_.fields or {}):
        raise ConfigError(
            f"--key {key}: is declared in schema.fields, and a key is no field of the model: leave it out there"
        )
    if key in apart(config):
        return config
    section = config.source.model_copy(update={"exclude": [*config.source.exclude, key]})
    return config.model_copy(update={"source": section})


def apart(config: Config) -> list[str]:
    """Return the columns that are kept from the model and carried into what is written."""
    roles = make_roles(config)
    return [name for name in (roles.label, roles.time, roles.weight, *roles.exclude) if name is not None]


def stem(name: str | None, otherwise: str = "") -> str:
    """Return what the names of an output's files begin with."""
    return otherwise if name is None else Path(name).stem


class AsEvents(beam.DoFn):
    """Tables and lists of dicts in, single events with their timestamps out; (key, event) pairs where there is a key.

    Keys are handed on as text. An event without its key, or with a time that no calendar of events holds, goes to the
    output tagged `REJECTED`.
    """

    def __init__(self, key: str | None, time: str | None) -> None:
        self.key = key
        self.time = time
        self._rejected = Metrics.counter(NAMESPACE, "rejected")

    def process(self, element: Any) -> Iterator[Any]:  # noqa: D102 - Beam's
        if isinstance(element, Mapping):
            events: list[Any] = [element]
        elif isinstance(element, list):
            events = element
        else:
            events = pa.table(element).to_pylist()
        times = (
            np.full(len(events), np.nan) if self.time is None else seconds_of([one.get(self.time) for one in events])
        )
        for event, time in zip(events, times.tolist()):
            key = None if self.key is None else event.get(self.key)
            if self.key is not None and (key is None or key != key):  # NaN is the one value that differs from itself
                yield self._reject(event, f"field {self.key!r}: the event has no value of it, and its key is needed")
            elif not (math.isnan(time) or EARLIEST <= time < LATEST):
                reason = f"field {self.time!r}: got {event[self.time]!r}, expected a time between the years 1 and 2999"
                yield self._reject(event, f"{reason}; numbers are seconds since 1970")
            else:
                output = event
                if self.key is not None:
                    output = str(key), {name: value for name, value in event.items() if name != self.key}
                # What has no time that can be read keeps the timestamp it has; the model says what is wrong with it.
                yield output if math.isnan(time) else beam.window.TimestampedValue(output, time)

    def _reject(self, event: Mapping[str, Any], reason: str) -> beam.pvalue.TaggedOutput:
        self._rejected.inc()
        return beam.pvalue.TaggedOutput(REJECTED, RejectedEvent(event, reason))


def known_schema(config: Config, roles: Roles, options: PipelineOptions | None, folder: str | None = None) -> Schema:
    """Return the declared schema, or the one that a first reading of the source infers.

    Raises
    ------
    SchemaError
        When it cannot be inferred.

    """
    section = config.fields_
    if section.fields is not None:
        return make_schema(config, [])
    inferred = infer_schema(
        make_read(config), roles=roles, max_categories=section.max_categories, folder=folder, options=options
    )
    return Schema(inferred.fields, unknown="ignore" if section.unknown == "ignore" else "refuse")


def refit(
    config: Config, console: Console, options: PipelineOptions | None = None, *, work_folder: str | None = None
) -> None:
    """Fit by batch EM, one Beam pipeline for each iteration; write the snapshot and a picture.

    A refit that was interrupted goes on from its last whole iteration when it is started again.
    """
    check_folder(config)
    refuse_unfinished_run(config)
    output, section = config.output, config.learner
    folder = Path(output.folder)
    working = FileSystems.join(work_folder or str(folder), WORKING)
    if not FileSystems.exists(working):
        remove_outputs(str(folder), f"{stem(output.quarantine)}-*.jsonl")
    if output.picture is not None:
        # To learn at the end of a long refit that no picture can be drawn would be too late.
        load_plots()
    roles = make_roles(config)
    schema = known_schema(config, roles, options, working)
    tell_fields(console, schema)
    job = Refit(
        make_model(config.model, schema),
        schema=schema,
        roles=roles,
        max_iter=section.max_iter,
        tol=section.tol,
        n_init=section.n_init,
        seed=section.seed,
        rejected_to=WriteRejected(str(folder), stem(output.quarantine)),
    )
    try:
        fitted, counts = job.run(make_read(config), working, options=options, progress=console.is_terminal)
    except NotFittedError:
        # There is nothing to go on with.
        FileSystems.delete([working])
        raise
    except RefitError as error:
        raise DataError(f"{error}; to give up what was done of it, delete {working}") from error
    written = []
    if output.snapshot is not None:
        save(fitted, folder / output.snapshot, metadata={"source": config.source.river or config.source.path})
        written.append(folder / output.snapshot)
    if output.picture is not None:
        Illustrator().draw(folder / output.picture, "plot_learner", fitted)
        written.append(folder / output.picture)
    FileSystems.delete([working])
    ending = "converged" if fitted.converged else "stopped before it converged: raise learner.max_iter"
    say(
        console,
        f"{counted(counts.n_events, 'event')}, {counted(len(fitted.history), 'iteration')}, mean log-posterior "
        f"{fitted.history[-1]:.6g}, {ending}",
        "bold",
    )
    console.print(component_table(fitted))
    if counts.n_rejected:
        files = folder / f"{stem(output.quarantine)}-*.jsonl"
        say(console, f"{counted(counts.n_rejected, 'event')} could not be used, see {files}", "yellow")
    for name, count in counts.ignored_fields:
        say(console, f"field {name!r} is not in the schema and was ignored in {counted(count, 'event')}", "yellow")
    for path in written:
        say(console, f"wrote {path}")
