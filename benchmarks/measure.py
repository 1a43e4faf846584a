"""How things are measured: in turn, several times, medians, ratios."""

from __future__ import annotations

import compileall
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import stream_em


@dataclass(frozen=True)
class Table:
    """A measured table: a title, what was done, column names, rows of cells."""

    title: str
    method: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.method, "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "---|" * len(self.columns))
        lines.extend("| " + " | ".join(row) + " |" for row in self.rows)
        return "\n".join(lines) + "\n"


def in_turn(*works: Callable[[], object], repeats: int = 7, at_least: float = 0.0) -> list[float]:
    """Median seconds of each work; the works take turns, so that a slow moment of the machine hits all alike.

    `at_least` is for how many seconds to go on, beyond `repeats`.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    end = time.perf_counter() + at_least
    while len(seconds[0]) < repeats or time.perf_counter() < end:
        for taken, work in zip(seconds, works):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def compile_modules() -> None:
    """Compile the library's modules to bytecode, as pip does on installing it and has done for every peer."""
    compileall.compile_dir(Path(stream_em.__file__).parent, quiet=1)


def verdict(figure: float, target: float, *, at_most: bool = False) -> str:
    """The target with whether the figure meets it."""
    met = figure <= target if at_most else figure >= target
    return f"{'at most' if at_most else 'at least'} {target:g}×: {'met' if met else 'MISSED'}"


def machine() -> str:
    """The machine and the versions that the figures belong to."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    names = ("numpy", "scipy", "pyarrow", "scikit-learn", "river", "numba", "apache-beam")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{processor}, {platform.system()}, Python {platform.python_version()}, {versions}"
