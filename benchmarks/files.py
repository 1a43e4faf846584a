"""The command from Parquet to Parquet: time against PyArrow alone, and peak memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.measure import Table

N_FIELDS = 9
N_COMPONENTS = 5
BATCH_SIZES = (1_000, 10_000)
SIZES = (2_000_000, 20_000_000)
TARGET = 4.0
MOST_MEMORY = 500
ROWS = 100_000


def write_events(path: Path, n_events: int) -> None:
    """Write events around random centers, in row groups of 100,000."""
    generator = np.random.default_rng(0)
    centers = 3.0 * generator.normal(size=(N_COMPONENTS, N_FIELDS))
    names = [f"sensor_{field}" for field in range(N_FIELDS)]
    with pq.ParquetWriter(path, pa.schema([(name, pa.float64()) for name in names])) as writer:
        for _ in range(0, n_events, ROWS):
            block = centers[generator.integers(N_COMPONENTS, size=ROWS)] + generator.normal(size=(ROWS, N_FIELDS))
            writer.write_table(pa.table([np.ascontiguousarray(column) for column in block.T], names=names))


# The peak is asked of the process itself: what the system reports of a finished child includes its parent's.
PROGRAM = """
import sys
from pathlib import Path
from stream_em.cli.main import main
try:
    main()
finally:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
"""


def command(*arguments: str) -> tuple[float, float]:
    """Run the command; return wall seconds and the peak memory of the process in MB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"stream-em {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - start, int(done.stderr.split()[-1]) / 1024


def pyarrow_alone(events: Path, scored: Path, target: Path) -> float:
    """Seconds that PyArrow takes to read the events and to write the scored rows, and nothing else."""
    start = time.perf_counter()
    for _ in pq.ParquetFile(events).iter_batches(ROWS):
        pass
    seconds = time.perf_counter() - start
    source = pq.ParquetFile(scored)
    # Without dictionaries, as the command writes: measurements seldom repeat.
    with pq.ParquetWriter(target, source.schema_arrow, use_dictionary=False) as writer:
        for rows in source.iter_batches(ROWS):
            start = time.perf_counter()
            writer.write_batch(rows)
            seconds += time.perf_counter() - start
    return seconds


def read_alone(events: Path) -> float:
    """Seconds that PyArrow takes to read the events."""
    start = time.perf_counter()
    for _ in pq.ParquetFile(events).iter_batches(ROWS):
        pass
    return time.perf_counter() - start


def run() -> list[Table]:
    """Measure `stream-em run` and `stream-em fit` on 2 and 20 million rows."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n_events in SIZES:
            events, output = folder / f"{n_events}.parquet", folder / f"out_{n_events}"
            write_events(events, n_events)
            config = folder / "config.yaml"
            config.write_text(
                yaml.safe_dump(
                    {
                        "source": {"path": str(events)},
                        "model": {"n_components": N_COMPONENTS},
                        "output": {"folder": str(output)},
                    }
                )
            )
            base = 0.0
            for batch_size in BATCH_SIZES:
                seconds, memory = command("run", str(config), f"learner.batch_size={batch_size}")
                (scored,) = output.glob("*.parquet")
                base = base or pyarrow_alone(events, scored, folder / "copy.parquet")
                rows.append(_row(f"run, batches of {batch_size:,}", n_events, seconds, base, memory))
                print("  ", *rows[-1], flush=True)
            # Two passes over the rows: one to seed from, one EM iteration.
            seconds, memory = command("fit", str(config), "learner.max_iter=1")
            rows.append(_row("fit, 1 iteration", n_events, seconds, 2.0 * read_alone(events), memory))
            print("  ", *rows[-1], flush=True)
            for leftover in (*output.iterdir(), folder / "copy.parquet", events):
                leftover.unlink()
    return [
        Table(
            "From Parquet to Parquet",
            f"Whole processes of the command on rows of {N_FIELDS} doubles, K={N_COMPONENTS}, full covariances, "
            "start-up and picture included. For `run` the peer is PyArrow alone reading those rows and writing the "
            "scored rows back, with the same settings. `fit` writes no rows, so its peer is PyArrow reading them as "
            "often as it does: once to settle the schema and draw the seeding sample, once for the iteration.",
            ("command", "rows", "s", "PyArrow alone, s", "ratio", "peak MB", "target"),
            rows,
        )
    ]


def _row(name: str, n_events: int, seconds: float, base: float, memory: float) -> tuple[str, ...]:
    met = seconds / base <= TARGET and memory < MOST_MEMORY
    return (
        name,
        f"{n_events:,}",
        f"{seconds:.1f}",
        f"{base:.1f}",
        f"{seconds / base:.2f}×",
        f"{memory:.0f}",
        f"at most {TARGET:g}×, under {MOST_MEMORY} MB: {'met' if met else 'MISSED'}",
    )
