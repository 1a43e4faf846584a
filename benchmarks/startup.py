"""Time to import."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Table, in_turn, verdict

TARGET = 1.3


def _import(names: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {names}"], check=True)


def run() -> list[Table]:
    """Measure whole processes that only import."""
    ours, base = in_turn(lambda: _import("stream_em"), lambda: _import("numpy, pyarrow, scipy.linalg"), repeats=15)
    row = (f"{base * 1e3:.0f}", f"{ours * 1e3:.0f}", f"{ours / base:.2f}×", verdict(ours / base, TARGET, at_most=True))
    print("  ", *row, flush=True)
    return [
        Table(
            "Import",
            "Whole processes, in turn, medians in ms.",
            ("numpy, pyarrow, scipy.linalg", "stream_em", "ratio", "target"),
            [row],
        )
    ]
