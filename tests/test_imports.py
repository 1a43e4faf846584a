from __future__ import annotations

import subprocess
import sys

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


def test_public_names_are_there() -> None:
    import stream_em

    assert len(set(stream_em.__all__)) == len(stream_em.__all__)
    assert all(hasattr(stream_em, name) for name in stream_em.__all__)
