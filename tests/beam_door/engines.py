"""The engines that pipelines are tested on, each started once for all tests that use it."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.job_server import JobServer
from apache_beam.runners.portability.prism_runner import PrismJobServer
from ports import free_ports

ROOT = Path(__file__).parents[2]
FLINK = ROOT / ".jars" / "flink"
PRISM = ROOT / ".jars" / "prism" / "prism"


# Prism 2.77 splits a slow bundle of a stateful DoFn, and has bundles of one key run at the same time: what one of them
# wrote to the state is lost. It does so with a DoFn that counts and sleeps; the experiment has it split no bundle.
PRISM_FLAGS = ("--environment_type=LOOPBACK", "--experiments=prism_disable_sdf_split")

FLINK_FLAGS = ("--runner=PortableRunner", "--environment_type=LOOPBACK", "--parallelism=2")
# Flink and Beam look into classes of Java's own, which since Java 17 has to be allowed.
OPENED = ("lang", "lang.reflect", "util", "util.concurrent", "nio", "net", "io", "text", "time")
JAVA = [
    "java",
    "-Xmx1g",
    *(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in OPENED),
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-cp",
    f"{FLINK}/*",
]
# The shell kills what it started when this process ends, however it ends: then its standard input is closed.
WATCHED = ["sh", "-c", '"$@" </dev/null & read _; kill -9 $!; wait', "sh"]


class EngineMissingError(RuntimeError):
    """Raised when an engine is not installed; says what to do."""


@dataclass(frozen=True)
class Engine:
    """A Beam runner and the flags that a user would give."""

    name: str
    flags: tuple[str, ...]

    def options(self) -> PipelineOptions:
        return PipelineOptions(list(self.flags))

    def pipeline(self) -> beam.Pipeline:
        return beam.Pipeline(options=self.options())


@contextmanager
def embedded() -> Iterator[Engine]:
    yield Engine("embedded", ("--runner=FnApiRunner",))


@contextmanager
def processes() -> Iterator[Engine]:
    flags = ("--runner=FnApiRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
    yield Engine("processes", flags)


@contextmanager
def prism() -> Iterator[Engine]:
    if not PRISM.exists():
        raise EngineMissingError("Prism is not built: make prism")
    with served(PrismJobServer, f"--prism_location={PRISM}") as endpoint:
        yield Engine("prism", ("--runner=PrismRunner", endpoint, *PRISM_FLAGS))


@contextmanager
def flink() -> Iterator[Engine]:
    """Flink inside its job server, which makes a small cluster for each pipeline."""
    with tempfile.TemporaryDirectory() as folder, job_server(Path(folder), "[local]") as endpoint:
        yield Engine("flink", (*FLINK_FLAGS, endpoint))


def why_no_flink() -> str | None:
    """Why Flink cannot be run here, or None where it can."""
    if shutil.which("java") is None:
        return "Flink needs Java, and there is no `java` on the path"
    if not (FLINK / ".ready").exists():
        return "Flink's jars are not there: make flink-jars"
    return None


@contextmanager
def job_server(folder: Path, master: str) -> Iterator[str]:
    """Beam's job server for one Flink; yields the flag that names it."""
    reason = why_no_flink()
    if reason is not None:
        raise EngineMissingError(reason)
    (port,) = free_ports(1)
    arguments = (f"--flink-master={master}", f"--job-port={port}", "--artifact-port=0", "--expansion-port=0")
    kept = f"--artifacts-dir={folder / 'artifacts'}"
    log = folder / "job-server.txt"
    with jvm(log, "org.apache.beam.runners.flink.FlinkJobServerDriver", *arguments, kept):
        wait_for(lambda: _answers(port), log)
        yield f"--job_endpoint=localhost:{port}"


@contextmanager
def jvm(log: Path, main: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a class of Flink's jars in a process of its own; to close its standard input kills it."""
    with log.open("ab") as output:
        command = [*WATCHED, *JAVA, main, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that `jvm` started as a loss of power would."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def wait_for(ready: Callable[[], bool], log: Path, seconds: float = 120.0) -> None:
    """Wait until something is so; else fail with the end of a log."""
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError(f"{log.name} ends with:\n{log.read_text(errors='replace')[-4_000:]}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1.0).close()
    except OSError:
        return False
    return True


@contextmanager
def served(kind: Callable[[PipelineOptions], JobServer], *flags: str) -> Iterator[str]:
    """Keep one job server for many pipelines: a runner that is given no endpoint may start one for each."""
    (port,) = free_ports(1)
    server = kind(PipelineOptions([*flags, f"--job_port={port}"]))
    try:
        server.start()
        yield f"--job_endpoint=localhost:{port}"
    finally:
        server.stop()


ENGINES = {"embedded": embedded, "processes": processes, "flink": flink, "prism": prism}


class Collect(beam.PTransform):
    """Write all elements to a file, if there are any: no engine hands results to the driver. `collected` reads them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def expand(self, elements: beam.PCollection) -> beam.PCollection:
        return (
            elements
            | beam.WindowInto(beam.window.GlobalWindows())
            # A default, for no elements, is a side input, and with one of these Beam 2.62 fails Flink's checkpoints.
            | beam.CombineGlobally(beam.combiners.ToListCombineFn()).without_defaults()
            | beam.Map(_write, str(self.path))
        )


def collected(path: Path) -> list[Any]:
    elements: list[Any] = pickle.loads(path.read_bytes())
    return elements


def _write(elements: list[Any], path: str) -> None:
    # A bundle that is tried again finds the file of the first attempt, or none.
    pending = Path(f"{path}.{id(elements)}")
    pending.write_bytes(pickle.dumps(elements))
    pending.replace(path)
