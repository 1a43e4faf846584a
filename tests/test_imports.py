from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

OPTIONAL = (
    "apache_beam",
    "confluent_kafka",
    "hypothesis",
    "matplotlib",
    "numba",
    "pandas",
    "polars",
    "prometheus_client",
    "pydantic",
    "rich",
    "river",
    "scipy.special",
    "scipy.stats",
    "sklearn",
    "stream_em.cli",
    "stream_em.plots",
    "threadpoolctl",
    "typer",
    "yaml",
)

LEARN = """
import numpy as np
from stream_em import BatchEM, Gaussian, Mixture, OnlineEM

events = np.arange(800.0).reshape(-1, 2) % 7
learner = OnlineEM(Mixture(Gaussian(), 2)).update(events)
learner.log_prob(events)
BatchEM(Mixture(Gaussian("diag"), 2)).fit(events)
"""


@pytest.mark.parametrize("program", ["import stream_em", LEARN], ids=["import", "learn"])
def test_optional_packages_stay_unloaded(program: str) -> None:
    program += f"\nimport sys\nprint([name for name in {OPTIONAL!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_job_over_parquet_does_not_load_pandas(tmp_path: Path) -> None:
    # Arrow imports it for much that it is asked, a quarter of a second of every command.
    events = np.random.default_rng(0).normal(size=(400, 2))
    weights, labels = pa.array([1, None] * 200), pa.array(["a", "b", None, "c"] * 100).dictionary_encode()
    events[[60, 75], 0] = 1e150  # out of the range of numbers: not all rows of a chunk are kept
    columns = {"x": events[:, 0], "y": pa.array(events[:, 1], mask=events[:, 1] > 1.0), "n": weights, "c": labels}
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    (tmp_path / "job.yaml").write_text(
        "source: {path: events.parquet}\nlearner: {warm_up: 50}\noutput: {folder: out}\n"
    )
    program = """
import sys
from stream_em.cli.main import main
try:
    main()
finally:
    print("pandas" in sys.modules, file=sys.stderr)
"""
    command = [sys.executable, "-c", program, "run", "job.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
    assert pq.read_metadata(tmp_path / "out" / "scored.parquet").num_rows == 398


def test_public_names_are_there() -> None:
    import stream_em

    assert len(set(stream_em.__all__)) == len(stream_em.__all__)
    assert all(hasattr(stream_em, name) for name in stream_em.__all__)


def test_rooms_import_only_rooms_above_them_in_the_map() -> None:
    root = Path(__file__).parents[1]
    table = (root / "docs" / "concepts.md").read_text().split("| room |")[1]
    rows = [re.findall("`(.*?)`", rooms) for rooms in re.findall(r"^\| (`[^|]*) \|", table, re.M)]
    floor = {room.rstrip("/").removesuffix(".py"): row for row, rooms in enumerate(rows) for room in rooms}
    paths = list((root / "stream_em").rglob("*.py"))
    doors = {"beam", "river", "sklearn"}
    looked_at = set()
    for path in paths:
        room = path.relative_to(root / "stream_em").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        looked_at.add(room)
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                head, _, other = module.partition(".")
                other = other.split(".")[0]
                if head == "stream_em" and other:
                    assert floor[other] <= floor[room], f"{path} imports {module}"
                    assert other == room or not {room, other} <= doors, f"{path} imports {module}"
    assert looked_at == set(floor)
