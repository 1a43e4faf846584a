"""Pictures that another process draws, which may fail, be killed, or be left alone at any moment."""

import os
import pickle
import select
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_em import Gaussian, Mixture, OnlineEM
from stream_em.cli.drawing import Illustrator
from stream_em.sources import open_source

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(os.cpu_count() == 1, reason="on one processor no other process is started")

EVENTS = np.random.default_rng(0).normal(size=(300, 2)) + np.repeat([[0.0], [8.0], [16.0]], 100, axis=0)
HISTORY = [(100, -3.0, [0.5, 0.5]), (200, -2.5, [0.4, 0.6])]


@pytest.fixture
def learner():
    return OnlineEM(Mixture(Gaussian(), 2), warm_up=50, seed=0).update(EVENTS)


@pytest.fixture
def source(tmp_path):
    pq.write_table(pa.table({"x": EVENTS[:, 0], "y": EVENTS[:, 1]}), tmp_path / "events.parquet")
    return open_source(str(tmp_path / "events.parquet"))


@pytest.fixture
def prepared(source, monkeypatch):
    # A PDF says when it was made.
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    with Illustrator() as illustrator:
        illustrator.prepare(next(source.chunks(100)), source)
        assert illustrator._other.poll() is None
        yield illustrator


def bytes_drawn_here(learner, path):
    Illustrator().draw(path, "plot_run", learner, HISTORY)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_another_process_draws_the_same(prepared, learner, tmp_path, suffix, monkeypatch):
    expected = bytes_drawn_here(learner, tmp_path / f"expected{suffix}")
    monkeypatch.setattr("stream_em.cli.drawing.load_plots", None)
    prepared.draw(tmp_path / f"picture{suffix}", "plot_run", learner, HISTORY)
    assert (tmp_path / f"picture{suffix}").read_bytes() == expected


def test_it_draws_while_the_job_goes_on(prepared, learner, tmp_path):
    with prepared.drawing(tmp_path / "picture.png", "plot_learner", learner):
        assert not (tmp_path / "picture.png").exists()
        # Its answer comes while the block runs.
        assert select.select([prepared._other.stdout], [], [], 60.0)[0]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("what", ["killed before", "killed", "stopped"])
def test_what_befalls_it_is_made_good(prepared, learner, tmp_path, what, monkeypatch):
    monkeypatch.setattr("stream_em.cli.drawing.LONGEST_WAIT", 1.0)
    expected = bytes_drawn_here(learner, tmp_path / "expected.png")
    if what == "killed before":
        prepared._other.kill()
        prepared._other.wait()
    with prepared.drawing(tmp_path / "picture.png", "plot_run", learner, HISTORY):
        prepared._other.send_signal(signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
    assert (tmp_path / "picture.png").read_bytes() == expected


def test_what_cannot_be_drawn_is_told_by_this_process(prepared, learner, tmp_path, capfd):
    with pytest.raises(ValueError, match="one a component"):
        prepared.draw(tmp_path / "picture.png", "plot_run", learner, [(100, -3.0, [1.0])])
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]
    assert capfd.readouterr().err == ""


def test_nothing_is_drawn_for_a_job_that_fails(prepared, learner, tmp_path):
    with pytest.raises(RuntimeError), prepared.drawing(tmp_path / "picture.png", "plot_learner", learner):
        raise RuntimeError
    assert prepared._other is None
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]


def test_none_is_started_for_a_source_of_one_chunk(source):
    with Illustrator() as illustrator:
        illustrator.prepare(next(source.chunks(300)), source)
        assert illustrator._other is None


@pytest.mark.parametrize("asked", [False, True])
def test_it_ends_with_the_job_and_says_nothing(source, learner, tmp_path, asked):
    (tmp_path / "order").write_bytes(pickle.dumps((".png", "plot_learner", learner)))
    program = (
        "import pickle, sys, time\n"
        "from stream_em.cli.drawing import Illustrator; from stream_em.sources import open_source\n"
        "illustrator, source = Illustrator(), open_source(sys.argv[1])\n"
        "illustrator.prepare(next(source.chunks(100)), source)\n"
        "if sys.argv[2] == 'True': illustrator._tell(pickle.load(open('order', 'rb')))\n"
        "print(illustrator._other is not None, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, source.paths[0], str(asked)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as job:
        assert job.stdout.readline() == "True\n"
        job.kill()
        # Both have it, and its end comes when neither has it any more.
        _, told = job.communicate(timeout=60)
    assert told == ""


def test_a_run_and_a_fit_have_their_pictures_drawn(tmp_path):
    events = np.random.default_rng(0).normal(size=140_000) + np.tile([0.0, 9.0], 70_000)
    pq.write_table(pa.table({"x": events}), tmp_path / "events.parquet")
    (tmp_path / "job.yaml").write_text("{source: {path: events.parquet}, model: {n_components: 2}}")
    program = (
        "import sys, stream_em.cli.drawing as drawing; from stream_em.cli.main import main\n"
        "answer = drawing.Illustrator._answer\n"
        "drawing.Illustrator._answer = lambda self: sys.exit(answer(self) is None)\n"
        "main()"
    )
    for command in ("run", "fit"):
        done = subprocess.run(
            [sys.executable, "-c", program, command, "job.yaml", "output.folder=out"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
