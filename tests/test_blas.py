"""BLAS has one thread while others are at work, and its own again when they are done, whatever happens meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAD = """
import os, threading
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits
from stream_em.blas import OneBlasThread

def threads():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}

lowered, done = threading.Event(), threading.Event()

def work():
    with OneBlasThread():
        lowered.set()
        done.wait(60)

worker = threading.Thread(target=work)
"""

PROGRAMS = {
    "an error among nested users": """
try:
    with OneBlasThread(), OneBlasThread():
        print(threads())
        1 / 0
except ZeroDivisionError:
    print(threads())
""",
    "the last to leave did not come first": """
worker.start()
lowered.wait(60)
with OneBlasThread():
    done.set()
    worker.join()
    print(threads())
print(threads())
""",
    "the first to come lives on": """
def come_and_stay():
    with OneBlasThread():
        lowered.set()
        second.wait(60)
    first_left.set()
    done.wait(60)

second, first_left = threading.Event(), threading.Event()
worker = threading.Thread(target=come_and_stay)
worker.start()
lowered.wait(60)
with OneBlasThread():
    second.set()
    first_left.wait(60)
    print(threads())
print(threads())
done.set()
""",
    "a limit that is refused": """
first, second = OneBlasThread(), OneBlasThread()
first.__enter__()
limited, refused = threading.Event(), threading.Event()

def limit():
    with threadpool_limits(3, user_api="blas"):
        limited.set()
        refused.wait(60)

other = threading.Thread(target=limit)
other.start()
limited.wait(60)
second.__enter__()
refused.set()
other.join()
print(threads())
second.__exit__()
first.__exit__()
print(threads())
""",
    "an interrupt on leaving": """
import signal
from stream_em import blas

class Interrupting(dict):
    def items(self):
        signal.raise_signal(signal.SIGINT)

blas._before = Interrupting()
try:
    with OneBlasThread():
        pass
except KeyboardInterrupt:
    print(threads())
blas._before = dict(blas._before)
with OneBlasThread():
    pass
print(threads())
""",
    "limits of the program's own": """
with threadpool_limits(3, user_api="blas"):
    with OneBlasThread():
        print(threads())
    assert threads() == {3}, threads()
print(threads())
""",
    "another thread's limit": """
with threadpool_limits(1, user_api="blas"):
    worker.start()
    lowered.wait(60)
    print(threads())
done.set()
worker.join()
print(threads())
""",
}

FORKED = """
worker.start()
lowered.wait(60)
print(threads(), flush=True)
child = os.fork()
if not child:
    print(threads(), flush=True)
    with OneBlasThread():
        print(threads(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
done.set()
worker.join()
print(threads())
"""


def told(program: str) -> str:
    # In a process of its own, since the limit is one of the process.
    command = [sys.executable, "-c", HEAD + program]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("what", PROGRAMS)
def test_threads_come_back_after(what: str) -> None:
    assert told(PROGRAMS[what]).split() == ["{1}", "{2}"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_knows_nobody_at_work() -> None:
    assert told(FORKED).split() == ["{1}", "{2}", "{1}", "{2}"]


@pytest.mark.parametrize(("n_fields", "n_components", "expected"), [(2, 2, "{2}"), (9, 5, "{1}"), (70, 20, "{2}")])
def test_numpy_has_one_thread_where_more_would_wait_longer_than_they_work(
    n_fields: int, n_components: int, expected: str
) -> None:
    program = f"""
import numpy as np
from stream_em import Batch, Gaussian, Mixture, Schema
from stream_em.models.mixture import _Expectation

blocks = _Expectation._blocks
_Expectation._blocks = lambda *given, **named: (print(threads()), blocks(*given, **named))[1]
events = np.random.default_rng(0).normal(size=(2_000, {n_fields}))
batch = Batch(events.T, Schema.infer(events))
model = Mixture(Gaussian(), {n_components}).bind(batch.schema)
model.e_step(model.initialize(batch, np.full(({n_components}, 2_000), 1 / {n_components})), batch)
print(threads())
"""
    *during, after = told(program).split()
    assert set(during) == {expected}
    assert after == "{2}"
