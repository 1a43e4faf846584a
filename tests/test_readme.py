"""The code and commands of the README, and the code of the other pages, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text())


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [text for of_language, text in fenced if of_language == language]


def test_python_runs_in_order(tmp_path: Path) -> None:
    program = "\n".join([*blocks("python"), "assert merged.n_events == 10_000", "assert fitted.converged"])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.arrow").exists()
    assert "event 1, field 'x0': got inf" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks("python") if "import " in block])
def test_python_that_imports_stands_alone(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_pages_runs_in_order(page: str, tmp_path: Path) -> None:
    program = "\n".join(blocks("python", (ROOT / "docs" / page).read_text()))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if page == "sklearn.md":
        assert "country 'FR' 100%" in done.stdout


@pytest.mark.slow
def test_commands_run_in_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    columns = {
        "payment_id": [f"p{row}" for row in range(3_000)],
        "ts": np.datetime64("2026-01-01T00:00:00") + np.arange(3_000).astype("timedelta64[m]"),
        "amount": generator.normal(50.0, 9.0, 3_000),
        "country": generator.choice(["DE", "FR"], 3_000),
    }
    pq.write_table(pa.table(columns), tmp_path / "payments.parquet")
    (job,) = blocks("yaml")
    (tmp_path / "job.yaml").write_text(job)
    commands = [
        line.partition("  #")[0].strip()
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith(("stream-em", "python -m pipelines"))
    ]
    assert len(commands) >= 9
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands:
        program, *arguments = shlex.split(command)
        whole = [sys.executable, *(arguments if program == "python" else ["-m", "stream_em.cli", *arguments])]
        done = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert pq.read_metadata(tmp_path / "again.parquet").num_rows == 3_000
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "output" / "score").iterdir()) == 49_097
    assert (tmp_path / "output" / "segments" / "models" / "sky" / "last.arrow").exists()
