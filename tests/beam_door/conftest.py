from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import ENGINES, Engine, EngineMissingError

# Beam's threads that listen to Flink say so when it ends a job before they do.
QUIET = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
MARKS = {"processes": (pytest.mark.slow,), "flink": (pytest.mark.flink, QUIET), "prism": (pytest.mark.prism,)}


@pytest.fixture(scope="session", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in ENGINES])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        # Worker processes import what the tests define.
        here, paths = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", here if not paths else os.pathsep.join([here, paths]))
        context = ENGINES[request.param]()
        try:
            started = context.__enter__()
        except EngineMissingError as error:
            pytest.skip(str(error))
        try:
            yield started
        finally:
            context.__exit__(None, None, None)
