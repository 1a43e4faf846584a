"""Runs that are killed or stopped and started again, in real processes: nothing tells them from runs left alone."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from benchmarks.kills import Command, differences, kill_at_random
from stream_em import load
from stream_em.cli.config import load_config
from stream_em.cli.run import run
from stream_em.learners.online import COMPILE_AFTER, WORTH_COMPILING
from stream_em.sources import open_source

N_EVENTS = 2_400


@pytest.fixture(scope="module")
def stream_em():
    with Command() as command:
        yield command


def events(n=N_EVENTS):
    """Three clusters, with labels, and events of every kind that cannot be used."""
    generator = np.random.default_rng(0)
    cluster = generator.integers(3, size=n)
    x = generator.normal(size=(n, 2)) + 9.0 * np.array([[0, 0], [1, 0], [0, 1]])[cluster]
    x[::97, 1] = np.inf
    return pa.table({"x": x[:, 0], "y": x[:, 1], "c": np.array(["a", "b", "b"])[cluster], "bad": cluster == 2})


JOB = {
    "source": {"label": "bad"},
    "model": {"n_components": 3},
    "learner": {"batch_size": 50, "warm_up": 300},
    "output": {"picture": None, "checkpoint_every": 500},
}


def write_source(folder, kind):
    """Write the events in a format; return the name of the file."""
    table = events()
    path = folder / f"events.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=700)
    elif kind == "csv":
        pa_csv.write_csv(table, path)
        lines = path.read_text().splitlines()
        lines[40], lines[1_700] = "x,2,a,true", "1,2"
        path.write_text("\n".join(lines) + "\n")
    else:
        lines = [json.dumps(event) for event in table.to_pylist()]
        lines[41], lines[1_303] = "{", '{"z": 1}'
        path.write_text("\n".join(lines) + "\n")
    return path.name


def write_job(folder, kind="jsonl", **sections):
    name = write_source(folder, kind)
    job = {section: {**JOB[section], **sections.get(section, {})} for section in JOB}
    job["source"].setdefault("path", name)
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps(job))
    return folder


def undisturbed(stream_em, folder, *arguments, **more):
    end = stream_em("run", "job.yaml", *arguments, cwd=folder, **more)
    assert end.code == 0, end.text
    (folder / "output").rename(folder / "undisturbed")
    return end


def contents(folder):
    """What is in the files of a folder; those left out that hold nothing which anybody could go on with."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not re.match(r"\.(pending-)?model", path.name)}


def scored(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("scored*.parquet"))])


class TestKilled:
    @pytest.mark.parametrize("n_warm", [300, 1_100])
    def test_at_every_call_that_touches_a_file(self, stream_em, tmp_path, n_warm):
        write_job(tmp_path, learner={"warm_up": n_warm}, output={"checkpoint_every": 800, "roll_events": 1_200})
        n_calls = undisturbed(stream_em, tmp_path).calls
        n_killed = n_resumed = n_ended = 0
        for call in range(1, n_calls + 1):
            end = stream_em("run", "job.yaml", cwd=tmp_path, at_call=call)
            n_killed += end.killed
            n_resumed += "going on after" in end.text
            if not end.killed:
                assert end.code == 0, end.text
                assert differences(tmp_path / "output", tmp_path / "undisturbed") == [], call
                n_ended += 1
        assert n_killed > 20
        assert n_resumed > 10
        assert n_ended > 3

    @pytest.mark.slow
    def test_before_the_first_checkpoint_it_starts_again_and_says_so(self, stream_em, tmp_path):
        write_job(tmp_path, output={"checkpoint_every": 800})
        calls = undisturbed(stream_em, tmp_path).calls
        told = "was killed, and left no checkpoint (this one makes the first after 800 events"
        first = next(
            call for call in range(1, calls) if "going on" in self._killed_and_again(stream_em, tmp_path, call)
        )
        assert told in self._killed_and_again(stream_em, tmp_path, first - 1)
        assert told not in stream_em("run", "job.yaml", cwd=tmp_path).text

    @staticmethod
    def _killed_and_again(stream_em, tmp_path, call):
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        assert stream_em("run", "job.yaml", cwd=tmp_path, at_call=call).killed
        return stream_em("run", "job.yaml", cwd=tmp_path).text

    @pytest.mark.slow
    def test_at_every_call_that_touches_a_file_and_left_alone_then(self, stream_em, tmp_path):
        write_job(tmp_path, "parquet", output={"checkpoint_every": 800})
        for call in range(1, undisturbed(stream_em, tmp_path).calls + 1):
            assert stream_em("run", "job.yaml", cwd=tmp_path, at_call=call).killed
            end = stream_em("run", "job.yaml", cwd=tmp_path)
            assert end.code == 0, end.text
            assert differences(tmp_path / "output", tmp_path / "undisturbed") == [], call

    @pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
    @pytest.mark.parametrize("piped", [False, True])
    def test_at_random_moments(self, stream_em, tmp_path, kind, piped):
        if kind == "parquet" and piped:
            pytest.skip("Parquet has no streams")
        write_job(tmp_path, kind, source={"path": "-"} if piped else {})
        stdin = tmp_path / f"events.{kind}" if piped else None
        outcome = kill_at_random(stream_em, ("run", "job.yaml"), tmp_path, n_kills=2, seed=7, stdin=stdin)
        assert outcome.differences == []

    @pytest.mark.parametrize(
        "options",
        [
            ["learner.averaging=true", "output.responsibilities=true"],
            ["learner.schedule={kind: half_life, half_life: 500.0}", "source.time=x"],
            ["model.family=auto", "model.assignment=hard", "schema.unknown=add", "learner.schedule=harmonic"],
            [
                "learner.structure={kind: adaptive_components, recent_events: 100}",
                "learner.schedule={kind: constant, value: 0.2}",
                "model.n_components=10",
                "model.covariance_type=diag",
            ],
            ["source.exclude=[c]", "schema.unknown=ignore", "schema.fields={x: numeric}", "source.limit=2001"],
        ],
    )
    def test_with_every_kind_of_learner(self, stream_em, tmp_path, options):
        write_job(tmp_path)
        half = undisturbed(stream_em, tmp_path, *options).calls // 2
        assert stream_em("run", "job.yaml", *options, cwd=tmp_path, at_call=half).killed
        end = stream_em("run", "job.yaml", *options, cwd=tmp_path)
        assert "going on after" in end.text
        assert differences(tmp_path / "output", tmp_path / "undisturbed") == []

    # The code is loaded after thousands of mini-batches, or with the first where the file says that many will come.
    @pytest.mark.parametrize(
        ("kind", "compiled_after", "checkpoint"), [("csv", COMPILE_AFTER, "[78]"), ("parquet", 0, "[23]")]
    )
    def test_where_compiled_code_learns(self, stream_em, tmp_path, kind, compiled_after, checkpoint):
        pytest.importorskip("numba")
        options = ["learner.batch_size=2", "source.exclude=[c]", "output.checkpoint_every=1000"]
        write_job(tmp_path, kind)
        path = tmp_path / f"events.{kind}"
        write = pq.write_table if kind == "parquet" else pa_csv.write_csv
        write(events(2 * (compiled_after or WORTH_COMPILING) + 1_000), path)
        assert (open_source(str(path)).least_events > 2 * WORTH_COMPILING) == (compiled_after == 0)
        calls = undisturbed(stream_em, tmp_path, *options).calls
        assert load(tmp_path / "undisturbed" / "model.arrow")._state.n_updates > compiled_after + 10
        assert stream_em("run", "job.yaml", *options, cwd=tmp_path, at_call=calls - 10).killed
        end = stream_em("run", "job.yaml", *options, cwd=tmp_path)
        assert re.match(f"going on after {checkpoint},000 events", end.text)
        assert differences(tmp_path / "output", tmp_path / "undisturbed") == []

    def test_over_a_river_data_set(self, stream_em, tmp_path):
        pytest.importorskip("river")
        source = {"path": None, "river": "Shuttle", "limit": 1_800, "label": "anomaly"}
        write_job(tmp_path, source=source, learner={"batch_size": 100})
        half = undisturbed(stream_em, tmp_path).calls // 2
        assert stream_em("run", "job.yaml", cwd=tmp_path, at_call=half).killed
        assert "going on after" in stream_em("run", "job.yaml", cwd=tmp_path).text
        assert differences(tmp_path / "output", tmp_path / "undisturbed") == []

    def test_the_report_and_the_picture_are_of_the_whole_run(self, stream_em, tmp_path):
        pytest.importorskip("matplotlib")
        write_job(tmp_path, output={"picture": "picture.svg"})
        whole = undisturbed(stream_em, tmp_path)
        assert stream_em("run", "job.yaml", cwd=tmp_path, at_call=whole.calls // 2).killed
        end = stream_em("run", "job.yaml", cwd=tmp_path)
        told = [re.sub(r" in [\d.]+ s \([\d,]+ events/s\)", "", line) for line in whole.text.splitlines()]
        again = re.sub(r"(, [\d,]+ of them now,)? in [\d.]+ s \([\d,]+ events/s\)", "", end.text).splitlines()
        assert again[0].startswith("going on after")
        assert again[1:] == told
        drawn = [
            re.sub(r"<dc:date>.*|id=\"\w+\"|#\w+", "", (tmp_path / folder / "picture.svg").read_text())
            for folder in ("output", "undisturbed")
        ]
        assert drawn[0] == drawn[1]


class TestStopped:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("kind", ["parquet", "jsonl"])
    def test_the_same_command_goes_on(self, stream_em, tmp_path, kind, number):
        write_job(tmp_path, kind, learner={"batch_size": 10})
        whole = undisturbed(stream_em, tmp_path)
        wanted = scored(tmp_path / "undisturbed")
        n_stopped = 0
        half = whole.seconds / 2
        for at_call, after in ((9, None), (12, None), (None, half), (14, None), (None, half), (None, None)):
            end = stream_em("run", "job.yaml", cwd=tmp_path, at_call=at_call, after=after, number=number)
            if "stopped by" not in end.text:
                # A signal that comes as the process leaves finds nothing to finish, and ends it.
                assert end.code in (0, -number), end.text
                assert "wrote output/model.arrow" in end.text
                break
            assert end.code == 128 + number, end.text
            n_stopped += 1
            assert "the same command goes on from there" in end.text
            # What was done until then is whole, and nothing else is there.
            before = scored(tmp_path / "output")
            assert before.equals(wanted.slice(0, load(tmp_path / "output" / "model.arrow").n_events))
            names = sorted(path.name for path in (tmp_path / "output").iterdir())
            assert names == ["model.arrow", "quarantine.jsonl", "scored.parquet"]
        assert n_stopped >= 2
        assert "going on after" in end.text
        assert scored(tmp_path / "output").equals(wanted)
        # Where it was stopped, a row group of the file ends.
        assert set(differences(tmp_path / "output", tmp_path / "undisturbed")) <= {"scored.parquet"}

    def test_before_any_event_was_learned(self, stream_em, tmp_path):
        write_job(tmp_path)
        end = stream_em("run", "job.yaml", cwd=tmp_path, at_call=2, number=signal.SIGTERM)
        assert (end.code, end.text) == (
            1,
            "error: stopped by SIGTERM before any event was learned; nothing was written\n",
        )
        assert list((tmp_path / "output").iterdir()) == []

    def test_one_that_comes_when_all_is_written_does_not_cut_off_the_report(self, tmp_path, monkeypatch):
        class SignalledConsole(Console):
            signalled = False

            def print(self, *told, **how):
                super().print(*told, **how)
                if "effective components" in str(told) and not self.signalled:
                    self.signalled = True
                    signal.raise_signal(signal.SIGINT)

        write_job(tmp_path)
        monkeypatch.chdir(tmp_path)
        console = SignalledConsole(file=io.StringIO(), width=200)
        assert run(load_config(tmp_path / "job.yaml", []), console) is None
        assert console.signalled
        assert "wrote output/model.arrow" in console.file.getvalue()

    def test_a_batch_that_waits_for_events_is_learned_and_the_next_ones_fall_into_step(self, stream_em, tmp_path):
        write_job(tmp_path, source={"path": "-"})
        undisturbed(stream_em, tmp_path, stdin=tmp_path / "events.jsonl")
        lines = (tmp_path / "events.jsonl").read_bytes().splitlines(keepends=True)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)

        def feed():
            with pipe.open("wb") as stream, contextlib.suppress(BrokenPipeError):
                stream.write(b"".join(lines[:730]))
                stream.flush()
                ended.wait(60)

        # The first signal that comes when something was learned stops it.
        for seconds in (2.0, 8.0, 32.0):
            ended = threading.Event()
            feeder = threading.Thread(target=feed)
            feeder.start()
            end = stream_em("run", "job.yaml", cwd=tmp_path, stdin=pipe, after=seconds, number=signal.SIGTERM)
            ended.set()
            feeder.join()
            if end.code == 128 + signal.SIGTERM:
                break
        assert "stopped by SIGTERM" in end.text
        end = stream_em("run", "job.yaml", cwd=tmp_path, stdin=tmp_path / "events.jsonl")
        assert "going on after" in end.text
        again, wanted = scored(tmp_path / "output"), scored(tmp_path / "undisturbed")
        assert again.drop_columns(["component", "log_prob"]).equals(wanted.drop_columns(["component", "log_prob"]))
        # One mini-batch was learned in two parts; what it made of the parameters is all but the same.
        np.testing.assert_allclose(again["log_prob"].to_numpy()[800:], wanted["log_prob"].to_numpy()[800:], rtol=0.05)
        assert differences(tmp_path / "output", tmp_path / "undisturbed") == ["model.arrow", "scored.parquet"]


class TestRefused:
    @pytest.fixture
    def unfinished(self, stream_em, tmp_path):
        write_job(tmp_path)
        assert stream_em("run", "job.yaml", cwd=tmp_path, at_call=15).killed
        return tmp_path

    def test_another_job(self, stream_em, unfinished):
        before = contents(unfinished / "output")
        for command, options in (
            ("run", ["learner.batch_size=100", "model.n_components=4", "output.picture=p.png"]),
            ("fit", []),
            ("refit", []),
        ):
            end = stream_em(command, "job.yaml", *options, cwd=unfinished)
            assert end.code == 1
            assert "model.arrow: holds a run that is not finished" in end.text
            if command == "run":
                assert "model.n_components was 3 and is 4; learner.batch_size was 50 and is 100. Finish" in end.text
        end = stream_em("score", "output/model.arrow", "job.yaml", cwd=unfinished)
        assert "holds a run that is not finished" in end.text
        assert contents(unfinished / "output") == before

    def test_unless_it_is_to_be_a_fresh_one(self, stream_em, unfinished):
        end = stream_em("run", "job.yaml", "--fresh", "learner.batch_size=100", cwd=unfinished)
        assert end.code == 0, end.text
        assert "going on" not in end.text
        assert scored(unfinished / "output").num_rows == N_EVENTS - 27
        # A job that is finished starts anew by itself.
        end = stream_em("run", "job.yaml", cwd=unfinished)
        assert "going on" not in end.text

    def test_a_fresh_job_that_is_killed_does_not_go_on_with_the_one_before(self, stream_em, unfinished):
        assert stream_em("run", "job.yaml", "--fresh", cwd=unfinished, at_call=10).killed
        end = stream_em("run", "job.yaml", cwd=unfinished)
        assert end.code == 0, end.text
        assert "going on" not in end.text

    @pytest.mark.parametrize("name", [".pending-scored.parquet", ".pending-quarantine.jsonl"])
    @pytest.mark.parametrize("change", ["gone", "shorter", "other"])
    def test_outputs_that_are_not_what_they_were(self, stream_em, unfinished, name, change):
        path = unfinished / "output" / name
        content = path.read_bytes()
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:50] if change == "shorter" else content.replace(b"a", b"b"))
        others = contents(unfinished / "output")
        others.pop(name, None)
        end = stream_em("run", "job.yaml", cwd=unfinished)
        assert end.code == 1
        assert re.search(
            rf"{name.removeprefix('.pending-')}: the first [\d,]+ bytes, which the job has writt", end.text
        )
        kept = contents(unfinished / "output")
        for other, before in others.items():
            # A file that is as it was has been cut off where the checkpoint says, and no further.
            assert kept[other]
            assert before.startswith(kept[other])

    def test_another_stream(self, stream_em, tmp_path):
        write_job(tmp_path, source={"path": "-"})
        events_file = tmp_path / "events.jsonl"
        assert stream_em("run", "job.yaml", cwd=tmp_path, stdin=events_file, at_call=15).killed
        other = tmp_path / "other.jsonl"
        other.write_text("\n" + events_file.read_text())
        end = stream_em("run", "job.yaml", cwd=tmp_path, stdin=other)
        assert "standard input: does not begin with the" in end.text
        assert "start anew (--fresh)" in end.text
        assert "the same command goes on" not in end.text
        assert "going on after" in stream_em("run", "job.yaml", cwd=tmp_path, stdin=events_file).text

    def test_a_file_that_has_changed(self, stream_em, unfinished):
        path = unfinished / "events.jsonl"
        content = path.read_text()
        path.write_text(content.replace("1", "2", 1))
        end = stream_em("run", "job.yaml", cwd=unfinished)
        assert end.code == 1
        assert end.text.splitlines()[-1] == (
            "error: events.jsonl: has changed since events were read up to a place in it; put it back as it was, or "
            "start anew (--fresh)"
        )
        assert "what was done up to the last checkpoint is kept" not in end.text
        path.write_text(content)
        end = stream_em("run", "job.yaml", cwd=unfinished)
        assert end.code == 0, end.text
        assert "going on after" in end.text

    @pytest.mark.parametrize("quote", ["'", None])
    def test_another_quote(self, stream_em, tmp_path, quote):
        write_job(tmp_path, "csv")
        assert stream_em("run", "job.yaml", cwd=tmp_path, at_call=15).killed
        end = stream_em("run", "job.yaml", f"source.quote={json.dumps(quote)}", cwd=tmp_path)
        assert end.code == 1
        assert f"source.quote was '\"' and is {quote!r}. Finish" in end.text

    def test_a_snapshot_that_cannot_be_read_is_not_written_over(self, stream_em, tmp_path):
        write_job(tmp_path)
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "model.arrow").write_text("a letter")
        end = stream_em("run", "job.yaml", cwd=tmp_path)
        assert end.code == 1
        assert "model.arrow: not a stream_em snapshot" in end.text
        assert (tmp_path / "output" / "model.arrow").read_text() == "a letter"


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk that is soon full, and a function to make it larger."""
    folder = tmp_path / "output"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, check=False)

    if shutil.which("mount") is None or mount("-o", "size=72k").returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield lambda: mount("-o", "remount,size=8m")
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_nothing_once_there_is_room(stream_em, tmp_path, small_disk):
    write_job(tmp_path, "parquet")
    assert stream_em("run", "job.yaml", "output.folder=elsewhere", cwd=tmp_path).code == 0
    for _ in range(2):
        end = stream_em("run", "job.yaml", cwd=tmp_path)
        assert end.code == 1
        assert "No space left on device" in end.text
        assert "what was done up to the last checkpoint is kept" in end.text
    small_disk()
    end = stream_em("run", "job.yaml", cwd=tmp_path)
    assert "going on after" in end.text
    assert differences(tmp_path / "output", tmp_path / "elsewhere") == []
