"""What every row is given and what it returns: settings, runs shared by two processes, a table, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom
from threadpoolctl import threadpool_limits

from benchmarks.measure import Table
from stream_em.plots import INK, PALETTE, QUIET

Outcome = TypeVar("Outcome")

WRONG_BASIN = 0.01
WRONG_BASIN_TEXT = (
    "A run counts as in a wrong basin when its log-likelihood is more than 1% below that of the true parameters."
)


@dataclass(frozen=True)
class Setup:
    """Where a row's data and processes are, and how far it is cut down.

    Parameters
    ----------
    data
        Folder of the data files, or None.
    executor
        Processes that share the runs.
    n_seeds
        Number of runs instead of a row's own.
    scale
        Factor on the numbers of events and of passes, 1 for the published settings.

    """

    data: Path | None
    executor: Executor
    n_seeds: int | None = None
    scale: float = 1.0

    @property
    def is_whole(self) -> bool:
        return self.n_seeds is None and self.scale == 1.0

    def seeds(self, usual: int) -> range:
        return range(usual if self.n_seeds is None else self.n_seeds)

    def scaled(self, usual: int, least: int = 1) -> int:
        return max(least, round(usual * self.scale))

    def file(self, name: str) -> Path:
        if self.data is None or not (self.data / name).exists():
            raise MissingFileError(f"{name} is not in the folder that --data names")
        return self.data / name

    def map(self, work: Callable[..., Outcome], *columns: Iterable[Any]) -> list[Outcome]:
        return list(self.executor.map(work, *columns))


def processes(number: int) -> ProcessPoolExecutor:
    """Processes started afresh, each of which keeps to one core."""
    return ProcessPoolExecutor(number, get_context("spawn"), initializer=threadpool_limits, initargs=(1,))


class MissingFileError(Exception):
    """Raised when a row's data file is not there: the row is not run."""


class Section(NamedTuple):
    """What a row came to.

    Parameters
    ----------
    tables
        The first is the published one, with ours beside it.
    figure
        The picture.
    caption
        What is seen in it.

    """

    tables: list[Table]
    figure: Figure
    caption: str


class Comparison(NamedTuple):
    """One published figure and what our runs gave.

    Parameters
    ----------
    label
        What it is the figure of.
    published
        The published figure.
    ours
        One for each run.
    tolerance
        How far our median may be from it.
    form
        Format of the figures.
    failed
        Which runs ended in a wrong basin, where that is defined.

    """

    label: str
    published: float
    ours: Sequence[float]
    tolerance: float
    form: str = ",.0f"
    failed: Sequence[bool] | None = None

    def cells(self) -> tuple[str, ...]:
        median = statistics.median(self.ours)
        verdict = f"±{self.tolerance:{self.form}}: met"
        if abs(median - self.published) > self.tolerance * (1.0 + 1e-9):
            low, high = median_interval(self.ours)
            verdict = f"±{self.tolerance:{self.form}}: MISSED"
            if low <= self.published <= high:
                verdict += f", by chance? Our median's 95% interval is {low:{self.form}} to {high:{self.form}}"
        return (
            self.label,
            f"{self.published:{self.form}}",
            f"{median:{self.form}}",
            spread(self.ours, self.form),
            "" if self.failed is None else out_of(self.failed),
            verdict,
        )


def comparison_table(title: str, method: str, comparisons: Iterable[Comparison]) -> Table:
    columns = ("", "published", "ours, median", "least to most", "wrong basin", "target")
    return Table(title, method, columns, [one.cells() for one in comparisons])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median, from the order statistics; the range of few values."""
    ordered = sorted(values)
    rank = max(0, int(binom.ppf((1.0 - confidence) / 2.0, len(ordered), 0.5)) - 1)
    return ordered[rank], ordered[-1 - rank]


def spread(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def out_of(which: Sequence[bool]) -> str:
    return f"{sum(map(bool, which))} of {len(which)}"


def at_least(count: int, share: float, total: int) -> str:
    """Whether something held in a share of all runs."""
    return f"at least {share:.0%}: {'met' if count >= share * total else 'MISSED'}"


def new_figure(n_panels: int = 1, *, width: float = 9.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, n_panels, panel + 1) for panel in range(n_panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=INK, labelsize=8)
    return figure, axes


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)


def color(position: int) -> str:
    return PALETTE[position % len(PALETTE)]


def draw_runs(axes: Axes, labels: Sequence[str], runs: Sequence[Sequence[float]], published: Sequence[float]) -> None:
    """Draw each run as a point, each published figure as a bar across them."""
    for position, (values, figure) in enumerate(zip(runs, published)):
        offset = [position + 0.3 * ((7 * run % 11) / 10 - 0.5) for run in range(len(values))]
        axes.scatter(offset, values, s=14, color=color(position), alpha=0.7, linewidths=0)
        axes.hlines(figure, position - 0.32, position + 0.32, color=INK, linewidth=1.4)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.annotate(
        "bars: published; points: our runs", (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=7, color=QUIET
    )
