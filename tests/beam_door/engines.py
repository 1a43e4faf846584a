"""The engines that pipelines are tested on, each started once for all tests that use it."""

from __future__ import annotations

import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer
from apache_beam.runners.portability.job_server import JobServer
from apache_beam.runners.portability.prism_runner import PrismJobServer

ROOT = Path(__file__).parents[2]
FLINK_JOB_SERVERS = ROOT / ".jars" / "flink"
PRISM = ROOT / ".jars" / "prism" / "prism"


# Prism 2.77 splits a slow bundle of a stateful DoFn, and has bundles of one key run at the same time: what one of them
# wrote to the state is lost. It does so with a DoFn that counts and sleeps; the experiment has it split no bundle.
PRISM_FLAGS = ("--environment_type=LOOPBACK", "--experiments=prism_disable_sdf_split")


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
    """Flink inside its job server."""
    jars = sorted(FLINK_JOB_SERVERS.glob("beam-runners-flink-*-job-server-*.jar"))
    if not jars:
        raise EngineMissingError("Flink's job server is not there: make flink-jars")
    if shutil.which("java") is None:
        raise EngineMissingError("Flink needs Java, and there is no `java` on the path")
    flags = ("--flink_master=[local]", f"--flink_job_server_jar={jars[-1]}", "--job_server_jvm_properties=-Xmx1g")
    with served(FlinkJarJobServer, *flags) as endpoint:
        yield Engine("flink", ("--runner=FlinkRunner", endpoint, "--environment_type=LOOPBACK", "--parallelism=2"))


@contextmanager
def served(kind: Callable[[PipelineOptions], JobServer], *flags: str) -> Iterator[str]:
    """Keep one job server for many pipelines: a runner that is given no endpoint may start one for each."""
    port = free_port()
    server = kind(PipelineOptions([*flags, f"--job_port={port}"]))
    try:
        server.start()
        yield f"--job_endpoint=localhost:{port}"
    finally:
        server.stop()


ENGINES = {"embedded": embedded, "processes": processes, "flink": flink, "prism": prism}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port: int = one.getsockname()[1]
        return port


class Collect(beam.PTransform):
    """Write all elements to a file, from where `collected` reads them: no engine hands results to the driver."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def expand(self, elements: beam.PCollection) -> beam.PCollection:
        return (
            elements
            | beam.WindowInto(beam.window.GlobalWindows())
            | beam.combiners.ToList()
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
