"""The README's own code and commands run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for of_language, text in fenced if of_language == language]


def test_python_runs_in_order(tmp_path: Path) -> None:
    program = "\n".join([*blocks("python"), "assert merged.n_events == 10_000", "assert fitted.converged"])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.arrow").exists()
    assert "event 1, field 'x0': got inf" in done.stdout


@pytest.mark.slow
def test_commands_run_in_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    columns = {
        "payment_id": [f"p{row}" for row in range(3_000)],
        "amount": generator.normal(50.0, 9.0, 3_000),
        "country": generator.choice(["DE", "FR"], 3_000),
    }
    pq.write_table(pa.table(columns), tmp_path / "payments.parquet")
    (job,) = blocks("yaml")
    (tmp_path / "job.yaml").write_text(job)
    commands = [
        line.split("#")[0].strip()
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("stream-em")
    ]
    assert len(commands) >= 5
    for command in commands:
        arguments = shlex.split(command)[1:]
        done = subprocess.run(
            [sys.executable, "-m", "stream_em.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert pq.read_metadata(tmp_path / "again.parquet").num_rows == 3_000
