"""What a person sees: progress, tables, messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stream_em import BatchEM, OnlineEM

_log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_FRAMES = 0.1


class Progress:
    """A live line on a terminal; elsewhere a plain line every few seconds, without control codes.

    Parameters
    ----------
    console
        Where to show it.
    n_before
        Events that were there at the start.

    """

    def __init__(self, console: Console, n_before: int = 0) -> None:
        self._console = console
        self._n_before = n_before
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started = time.perf_counter()
        self._shown = self._started

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def due(self) -> bool:
        """Whether it is time to show something again."""
        wait = _SECONDS_BETWEEN_LINES if self._live is None else _SECONDS_BETWEEN_FRAMES
        return time.perf_counter() - self._shown >= wait

    def show(self, n_events: int, **facts: str) -> None:
        """Show the number of events, their rate, and other facts by name."""
        self._shown = time.perf_counter()
        rate = (n_events - self._n_before) / max(self.seconds, 1e-9)
        _log.info("progress", extra={"fields": {"n_events": n_events, "events_per_second": round(rate)}})
        parts = [counted(n_events, "event"), f"{rate:,.0f} events/s"]
        parts.extend(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
        line = " · ".join(parts)
        if self._live is None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._live.update(Text(line, style="cyan"), refresh=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: object, ___: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: paths and values are not markup, and are not wrapped when piped."""
    # Data may hold what has no UTF-8 (an unpaired surrogate).
    text = text.encode("utf-8", "backslashreplace").decode()
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what is counted, in the singular or the plural.

    >>> counted(1, "event"), counted(1_000, "event"), counted(0, "anomaly", "anomalies")
    ('1 event', '1,000 events', '0 anomalies')

    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def component_table(learner: OnlineEM | BatchEM, n_fields: int = 4) -> Table:
    """Table of components by weight: id, weight, and the fields that set each apart."""
    table = Table(title="components", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("what sets it apart", overflow="fold")
    for component in sorted(learner.describe(), key=lambda component: -component.weight):
        telling = "   ".join(f"{field.name} {field.text}" for field in component.fields[:n_fields])
        table.add_row(str(component.id), f"{component.weight:.2%}", Text(telling))
    return table


def facts_table(facts: Iterable[tuple[str, Any]]) -> Table:
    """Two columns without a frame: names and values."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(str(value)))
    return table
