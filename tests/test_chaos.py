"""Short forms of what `make chaos` and `make soak` do; each asserts what docs/reliability.md promises."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import FAULTS
from benchmarks.soak import MOST_GROWTH, RUNS, soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and mounts a file system"),
]


# Those of a broker are tested with the Kafka source.
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "kafka"])
def test_what_is_promised_holds(name: str, tmp_path: Path) -> None:
    if name == "disk" and os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    assert FAULTS[name](tmp_path, small=True).seen


@pytest.mark.parametrize("name", RUNS)
def test_memory_stays_flat(name: str) -> None:
    seen = soak(name, RUNS[name][1](), 400_000)
    assert seen.growth <= MOST_GROWTH, seen
