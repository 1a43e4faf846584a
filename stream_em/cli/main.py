"""The command `stream-em`."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from inspect import cleandoc
from itertools import groupby
from pathlib import Path
from signal import Signals
from typing import Annotated, Any, NoReturn, TypeVar

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from typer.core import TyperCommand, TyperGroup

    from stream_em.cli.config import (
        LISTED_PICTURES,
        PICTURES,
        Config,
        ConfigError,
        check_config,
        describe_keys,
        load_config,
    )
except ModuleNotFoundError as error:
    if (error.name or "").startswith("stream_em"):
        raise
    raise SystemExit(
        f"stream-em: the command needs {error.name}, which is not installed: pip install 'stream-em[cli]'"
    ) from error

from stream_em import (
    EventError,
    FamilyError,
    MergeError,
    NotFittedError,
    SchemaError,
    SnapshotError,
    save,
)
from stream_em.cli import jobs
from stream_em.cli.common import DataError, load_learner
from stream_em.cli.display import component_table, counted, facts_table, say
from stream_em.cli.drawing import Illustrator
from stream_em.cli.outputs import OutputError
from stream_em.cli.run import run as run_job
from stream_em.sources import SourceError, same_file

# Usage errors, which Typer reports, leave with 2 as well.
EXIT_DATA = 1
EXIT_CONFIG = 2
EXIT_SIGNAL = 128

_DATA_ERRORS = (
    SourceError,
    EventError,
    SchemaError,
    SnapshotError,
    MergeError,
    NotFittedError,
    DataError,
    OutputError,
)
_EXPLAINED = (ConfigError, FamilyError, *_DATA_ERRORS, OSError, KeyboardInterrupt)

_log = logging.getLogger(__name__)


def _epilog(*examples: tuple[str, str], keys: bool = False) -> str:
    lines = ["[bold]Examples[/bold]"]
    lines += [f"{what}:\n    [cyan]{escape(command)}[/cyan]" for what, command in examples]
    if keys:
        lines.append("\n[bold]Keys of the YAML file[/bold], and of section.key=value on the command line")
        for section, described in groupby(describe_keys(), key=lambda key: key[0].partition(".")[0]):
            lines.append(f"\n[bold]{section}[/bold]")
            lines += [f"[cyan]{path}[/cyan]  {escape(text)}" for path, text in described]
    return "\n".join(lines)


class _WithEpilog:
    """Its epilog is printed as it is written: what Typer makes of its lines differs from version to version."""

    epilog: str | None

    def format_help(self, context: Any, formatter: Any) -> None:
        epilog, self.epilog = self.epilog, None
        super().format_help(context, formatter)  # type: ignore[misc]
        self.epilog = epilog
        Console(highlight=False).print(Padding(epilog or "", (0, 1, 1, 1)))


class _Command(_WithEpilog, TyperCommand):
    pass


class _Group(_WithEpilog, TyperGroup):
    pass


app = typer.Typer(
    name="stream-em",
    cls=_Group,
    help="Clusters and anomaly scores for streams of events, by online and batch EM.",
    epilog=_epilog(
        (
            "Your own file, with a copy of the project's configs/events.yaml",
            "stream-em run events.yaml source.path=my.parquet 'source.exclude=[my_id]'",
        ),
        (
            "NASA's shuttle readings as they come, which are in the package river",
            "stream-em run configs/shuttle.yaml",
        ),
        ("What was learned", "stream-em show output/events/model.arrow"),
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_Function = TypeVar("_Function", bound=Callable[..., object])


def _command(*examples: tuple[str, str], keys: bool = False) -> Callable[[_Function], _Function]:
    """Make a command of a function; its docstring is the help, in lines as long as the terminal is wide."""

    def register(function: _Function) -> _Function:
        paragraphs = cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(one.split()) for one in paragraphs)
        return app.command(cls=_Command, help=text, epilog=_epilog(*examples, keys=keys))(function)

    return register


class LogFormat(StrEnum):
    """What a job tells on its way."""

    text = "text"
    json = "json"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the job.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Any key of the YAML file as section.key=value; the value is read as YAML.",
        show_default=False,
    ),
]
SnapshotFile = Annotated[
    Path, typer.Argument(metavar="SNAPSHOT", help="Snapshot that run, fit or merge wrote (.arrow).")
]


@_command(
    ("The demo", "stream-em run configs/shuttle.yaml"),
    (
        "More components, smaller batches",
        "stream-em run job.yaml model.n_components=12 learner.batch_size=500",
    ),
    (
        "From a pipe, one JSON object a line",
        "tail -F events.jsonl | stream-em run job.yaml source.path=-",
    ),
    ("Two columns are not for the model", "stream-em run job.yaml 'source.exclude=[id, comment]'"),
    (
        "Follow drift, by event time",
        "stream-em run job.yaml source.time=ts 'learner.schedule={kind: half_life, half_life: 3600}'",
    ),
    ("Stop at the first bad event", "stream-em run job.yaml output.on_error=raise"),
    (
        "Watched by Prometheus",
        "stream-em run kafka.yaml --metrics-port 9464 --stall-after 300 --log-format json",
    ),
    keys=True,
)
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, and give up what an unfinished run of this folder has done.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            min=0,
            max=65_535,
            help="Serve /metrics for Prometheus and /healthz at this port.",
            show_default=False,
        ),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option("--metrics-host", help="Address to serve them at; 0.0.0.0 lets other machines see them.")
    ] = "127.0.0.1",
    stall_after: Annotated[
        float | None,
        typer.Option(
            "--stall-after",
            min=0.0,
            metavar="SECONDS",
            help="/healthz answers 503 when nothing was learned for so long.",
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="json: one object a line on standard error, and nothing else.")
    ] = LogFormat.text,
) -> None:
    """Score each batch of events, then learn from it (online EM).

    Writes the scored events, a snapshot of the model, a picture, and the events that could not be used.
    Ctrl-C or SIGTERM finish the batch in hand and write everything; the exit code is then 130 or 143. A run that was
    stopped, or killed at any moment, goes on where it was when the same command is started again. A run that came to
    its end starts anew, and replaces what it wrote.
    """
    with ExitStack() as stack:
        console, monitor = Console(), None
        if log_format is LogFormat.json or metrics_port is not None:
            # Not for a job that nobody watches: a server takes a while to import.
            from stream_em.cli.monitoring import Monitor, json_log, served

            monitor = Monitor(stall_after)
        if log_format is LogFormat.json:
            console = Console(quiet=True, force_terminal=False)
            stack.enter_context(json_log(sys.stderr))
            stack.enter_context(_failure_logged())
        job = load_config(config, overrides or [])
        if monitor is not None and metrics_port is not None:
            stack.enter_context(served(monitor, metrics_host, metrics_port))
        _leave(run_job(job, console, read=[config], fresh=fresh, observer=monitor))


@_command(
    ("Ten starts, the best is kept", "stream-em fit job.yaml learner.n_init=10"),
    ("Until the gain is tiny", "stream-em fit job.yaml learner.tol=1e-6 learner.max_iter=500"),
    keys=True,
)
def fit(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fit a model by batch EM, which reads the source once for each iteration.

    Writes a snapshot, a picture, and the events that could not be used. Memory does not depend on the number
    of events. Where there are labels, one more pass rates the anomaly score.
    """
    jobs.fit(load_config(config, overrides or []), Console(), read=[config])


@_command(
    ("Two processes of this machine", "stream-em refit job.yaml -- --direct_num_workers=2"),
    ("On Flink", "stream-em refit job.yaml -- --runner=FlinkRunner --flink_master=localhost:8081"),
    keys=True,
)
def refit(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fit a model by batch EM on Apache Beam, one pipeline for each iteration; any of Beam's options after --.

    Writes a snapshot, a picture, and the events that could not be used. A refit that was interrupted goes on from
    its last whole iteration when it is started again.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions

        from stream_em.cli import beam_jobs
    except ModuleNotFoundError as error:
        raise ConfigError(f"refit needs {error.name}, which is not installed: pip install 'stream-em[beam]'") from error
    given = overrides or []
    flags = [one for one in given if one.startswith("--")]
    keys = [one for one in given if not one.startswith("--")]
    options = beam_jobs.embedded_by_default(PipelineOptions(flags))
    beam_jobs.refit(load_config(config, keys), Console(), options)


@_command(
    ("A file", "stream-em score model.arrow new.parquet -o scored.parquet"),
    ("The source of a job", "stream-em score model.arrow job.yaml output.responsibilities=true"),
    (
        "With the truth at hand, to rate the score",
        "stream-em score model.arrow new.csv source.label=fraud",
    ),
    ("A River data set", "stream-em score output/shuttle/model.arrow river:Shuttle"),
)
def score(
    snapshot: SnapshotFile,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Events: file, folder, glob pattern, - (standard input), river:NAME, or a job's YAML file.",
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Parquet file to write (.parquet). Default: the job's, or scored.parquet here; then one that is "
            "there already is not replaced.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score events with a learned model, without learning from them.

    Columns that the model does not know are carried along. Events that cannot be used go to again-quarantine.jsonl
    beside again.parquet, where that is --output, else to the job's quarantine. The keys are those that stream-em run
    --help lists under source and output.
    """
    read = [Path(source)] if _is_config(source) else []
    _leave(jobs.score(snapshot, _score_config(source, overrides or [], output), Console(), read=read))


@_command(("The demo's model", "stream-em show output/shuttle/model.arrow"))
def show(
    snapshot: SnapshotFile,
    fields: Annotated[int, typer.Option("--fields", "-n", min=1, help="Fields to list per component.")] = 4,
) -> None:
    """Show the components of a learned model: id, weight, and the fields that set each apart."""
    learner = load_learner(snapshot)
    schema = learner.schema
    console = Console()
    facts: list[tuple[str, Any]] = [
        ("learner", type(learner).__name__),
        ("model", repr(learner.model)),
        ("events", f"{learner.n_events:,}"),
        ("effective components", f"{learner.effective_components:.2f} of {learner.model.n_components}"),
    ]
    if schema is not None:
        facts.append(("fields", ", ".join(f"{field.name} ({field.kind})" for field in schema.fields)))
    console.print(facts_table(facts))
    console.print(component_table(learner, fields))


@_command(("The demo's model", "stream-em plot output/shuttle/model.arrow -o shuttle.png"))
def plot(
    snapshot: SnapshotFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=f"Picture to write: {LISTED_PICTURES}. Default: the snapshot's name, ending in .png.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw the components of a learned model."""
    learner = load_learner(snapshot)
    path = output or snapshot.with_suffix(".png")
    if path.suffix not in PICTURES:
        raise ConfigError(f"--output {path}: expected a name ending in {LISTED_PICTURES}")
    if same_file(path, snapshot):
        raise ConfigError(f"{path}: is the snapshot and would be overwritten; name the picture with --output")
    Illustrator().draw(path, "plot_learner", learner)
    say(Console(), f"wrote {path}")


@_command(
    (
        "Two workers that started from one model",
        "stream-em merge monday.arrow tuesday.arrow -o both.arrow",
    )
)
def merge(
    snapshots: Annotated[
        list[Path],
        typer.Argument(metavar="SNAPSHOT SNAPSHOT...", help="Snapshots of one model, two or more."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Snapshot to write.", show_default=False)],
) -> None:
    """Merge snapshots of one model that learned from different events.

    Their components are matched by id, so they must descend from the same model.
    """
    if len(snapshots) < 2:
        raise ConfigError("merge needs two snapshots or more")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; name the snapshot to write in it")
    # A learner merges with its own kind and says so otherwise.
    merged: Any = load_learner(snapshots[0])
    for path in snapshots[1:]:
        other = load_learner(path)
        try:
            merged = merged.merge(other)
        except (MergeError, SchemaError) as error:
            raise DataError(f"{snapshots[0]} and {path} do not merge: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    save(merged, output)
    console = Console()
    console.print(component_table(merged))
    say(console, f"wrote {output} ({counted(merged.n_events, 'event')})")


def _version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("stream-em")
        except PackageNotFoundError:
            number = "(run from its source, not installed)"
        typer.echo(f"stream-em {number}")
        raise typer.Exit


@app.callback()
def _global(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del show_version


def _score_config(source: str, overrides: list[str], output: Path | None) -> Config:
    changes = overrides if output is None else [_own_quarantine(output), *overrides, *_chosen(output)]
    if _is_config(source):
        config = load_config(source, changes)
    else:
        origin = {"river": source.removeprefix("river:")} if source.startswith("river:") else {"path": source}
        config = check_config({"source": origin, "output": {"folder": "."}}, changes)
    for name in (config.output.scored_events, config.output.quarantine) if output is None else ():
        # Many a run leaves an empty quarantine, which holds nothing that could be lost.
        path = Path(config.output.folder, name or "")
        if path.is_file() and path.stat().st_size:
            raise ConfigError(
                f"{path}: is there already, and may be what run wrote; name a file to write with --output"
            )
    return config


def _is_config(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _chosen(output: Path) -> list[str]:
    if output.suffix != ".parquet":
        raise ConfigError(f"--output {output}: scores are written as Parquet; end its name in .parquet")
    return [f"output.folder={_quoted(str(output.parent))}", f"output.scored_events={_quoted(output.name)}"]


def _own_quarantine(output: Path) -> str:
    # Beside the scores of a run lies the quarantine of that run.
    return f"output.quarantine={_quoted(f'{output.stem}-quarantine.jsonl')}"


def _quoted(name: str) -> str:
    """A name as a YAML string in quotes, since it may look like something else."""
    return "'" + name.replace("'", "''") + "'"


def _leave(stopped_by: Signals | None) -> None:
    """Leave with the code that shells give to a signal: `stream-em run job.yaml && next` must not take half for all."""
    if stopped_by is not None:
        raise typer.Exit(EXIT_SIGNAL + stopped_by)


def _fail(message: str, code: int) -> NoReturn:
    console = Console(stderr=True)
    for line in message.splitlines() or [""]:
        console.print("error:", style="bold red", end=" ")
        say(console, line)
    sys.exit(code)


def run_program(program: Callable[[], object]) -> None:
    """Run a program; errors of the user's making are one message on standard error, and an exit code.

    0: done. 1: the data cannot be used. 2: the command line or the configuration cannot. 130 or 143: stopped by Ctrl-C
    or SIGTERM before that.
    """
    # Else Python, on its way out, looks through all that was loaded for what can be collected, for up to half a second.
    atexit.register(gc.freeze)
    try:
        program()
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; Python must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_DATA)
    except _EXPLAINED as error:
        _fail(*_explained(error))


def _explained(error: BaseException) -> tuple[str, int]:
    """Message and exit code of an error of the user's making."""
    if isinstance(error, (ConfigError, FamilyError)):
        return str(error), EXIT_CONFIG
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before it was done", EXIT_SIGNAL + Signals.SIGINT
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror or error}", EXIT_DATA
    return str(error), EXIT_DATA


@contextmanager
def _failure_logged() -> Iterator[None]:
    """Log an error of the user's making, instead of writing it for a person."""
    try:
        yield
    except _EXPLAINED as error:
        message, code = _explained(error)
        _log.error("failed", extra={"fields": {"message": message, "exit_code": code}})
        raise typer.Exit(code) from error


def main() -> None:
    """Run the command."""
    run_program(app)
