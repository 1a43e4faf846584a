"""The command from Parquet to Parquet: time against PyArrow alone, and peak memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.measure import Table, in_turn

N_FIELDS = 9
N_COMPONENTS = 5
BATCH_SIZES = (1_000, 10_000)
# Rows, and how often they are timed.
SIZES = {2_000_000: 5, 20_000_000: 1}
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


PROGRAM = "from stream_em.cli.main import main; main()"


class Command:
    """A command to run; `peak` is the largest memory of its processes together, in MB."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.peak = 0.0

    def __call__(self) -> None:
        command = [sys.executable, "-c", PROGRAM, *self.arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                self.peak = max(self.peak, resident(process.pid))
                # Often enough to see it grow, too seldom to hold it up.
                time.sleep(0.05)
            assert process.stderr is not None
            told = process.stderr.read()
        if process.returncode != 0:
            raise RuntimeError(f"stream-em {' '.join(self.arguments)} ended with {process.returncode}: {told}")


def resident(process: int) -> float:
    """Memory of a process and of those that it has started, in MB; what is shared is divided among all that have it."""
    try:
        memory = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        # It has ended.
        return 0.0
    kilobytes = [int(line.split()[1]) for line in memory.splitlines() if line.startswith("Pss:")]
    return sum(kilobytes) / 1024 + sum(resident(int(child)) for child in children.split())


# Two columns once more stand for the scores, whose making takes no time here. Without dictionaries, as the command
# writes: measurements seldom repeat.
PEER = """
import sys
import pyarrow as pa
import pyarrow.parquet as pq
source = pq.ParquetFile(sys.argv[1])
schema = source.schema_arrow
for name, column in (("component", 0), ("log_prob", 1)):
    schema = schema.append(schema.field(column).with_name(name))
with pq.ParquetWriter(sys.argv[2], schema, use_dictionary=False) as writer:
    for rows in source.iter_batches(int(sys.argv[3])):
        columns = rows.columns
        writer.write_batch(pa.RecordBatch.from_arrays([*columns, *columns[:2]], schema=schema))
"""


READ_TWICE = """
import sys
import pyarrow.parquet as pq
for _ in range(2):
    for _ in pq.ParquetFile(sys.argv[1]).iter_batches(int(sys.argv[2])):
        pass
"""


def reads_alone(events: Path) -> None:
    """Read the events twice in a process of PyArrow's alone."""
    subprocess.run([sys.executable, "-c", READ_TWICE, str(events), str(ROWS)], check=True)


def pyarrow_alone(events: Path, target: Path) -> None:
    """Read the events and write the scored rows in a process of PyArrow's alone."""
    subprocess.run([sys.executable, "-c", PEER, str(events), str(target), str(ROWS)], check=True)


def run() -> list[Table]:
    """Measure `stream-em run` and `stream-em fit` on 2 and 20 million rows."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n_events, repeats in SIZES.items():
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
            job = str(config)
            commands = {
                f"run, batches of {size:,}": Command("run", job, f"learner.batch_size={size}") for size in BATCH_SIZES
            }
            # Two passes over the rows: one to seed from, one EM iteration.
            commands["fit, 1 iteration"] = Command("fit", job, "learner.max_iter=1")
            peer = partial(pyarrow_alone, events, folder / "copy.parquet")
            base, reading, *taken = in_turn(peer, partial(reads_alone, events), *commands.values(), repeats=repeats)
            for (name, command), seconds in zip(commands.items(), taken):
                told = f"{reading:.1f}" if name.startswith("fit") else ""
                rows.append(_row(name, n_events, seconds, base, told, command.peak))
                print("  ", *rows[-1], flush=True)
            for leftover in (*output.iterdir(), folder / "copy.parquet", events):
                leftover.unlink()
    return [
        Table(
            "From Parquet to Parquet",
            f"Whole processes over rows of {N_FIELDS} doubles, K={N_COMPONENTS}, full covariances, start-up and "
            "picture included. The peer is a process in which PyArrow alone reads those rows and writes them back with "
            "two columns of scores, with the same settings; in turn, once before for the caches, medians of "
            f"{' and '.join(map(str, SIZES.values()))}. `fit` writes no rows: it reads them twice, to settle the "
            "schema and draw the seeding sample, and for the iteration; what that alone takes stands beside it. "
            "Memory is that of all processes of the command together, looked at twenty times a second.",
            ("command", "rows", "s", "PyArrow alone, s", "ratio", "reading twice alone, s", "peak MB", "target"),
            rows,
        )
    ]


def _row(name: str, n_events: int, seconds: float, base: float, reading: str, memory: float) -> tuple[str, ...]:
    met = seconds / base <= TARGET and memory < MOST_MEMORY
    return (
        name,
        f"{n_events:,}",
        f"{seconds:.1f}",
        f"{base:.1f}",
        f"{seconds / base:.2f}×",
        reading,
        f"{memory:.0f}",
        f"at most {TARGET:g}×, under {MOST_MEMORY} MB: {'met' if met else 'MISSED'}",
    )
