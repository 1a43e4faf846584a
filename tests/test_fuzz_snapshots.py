"""A short form of `make fuzz`: mutated snapshots are refused or valid, and nothing else happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_mutated_snapshots_are_refused_or_valid() -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz_snapshots", "--files", "1000", "--processes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
