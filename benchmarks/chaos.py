"""Faults on purpose: `python -m benchmarks.chaos [--only disk,burst] [--small] [--write]`.

Each fault is done to a real job in a real process, or to a learner where events alone make it, and what is promised is
asserted: the command ends with 1 if something else was seen. All of it stays on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from benchmarks import drift
from benchmarks.kills import Command, differences, kill_at_random
from benchmarks.measure import Table
from benchmarks.reliability import publish
from stream_em import Batch, Gaussian, HalfLife, Mixture, OnlineEM, load, save

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "stream_em.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
# No job here takes this long; one that does hangs.
LONGEST = 600.0
DAY = 86_400.0


@dataclass(frozen=True)
class Fault:
    """What was done to a job and what came of it.

    Parameters
    ----------
    tried
        What was done.
    promised
        What must come of it; it was asserted.
    not_promised
        What need not, in the reader's words.
    seen
        What came of it, in figures.

    """

    tried: str
    promised: str
    not_promised: str
    seen: str


# Jobs


def run(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a job to its end, whatever that is."""
    command = [*COMMAND, "run", "job.yaml", *arguments]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=LONGEST, check=False, **options
    )


@contextlib.contextmanager
def started(folder: Path, *arguments: str, **streams: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a job that does not outlive the block, whatever becomes of that."""
    command = [*COMMAND, "run", "job.yaml", *arguments]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **streams) as job:
        try:
            yield job
        finally:
            job.kill()


def write_job(folder: Path, **sections: Any) -> None:
    job = {"model": {"n_components": 3}, "learner": {"batch_size": 500}, "output": {"picture": None}}
    for name, section in sections.items():
        job[name] = {**job.get(name, {}), **section}
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps(job))


def table_of(n_events: int, seed: int = 0) -> pa.Table:
    events = drift.clusters(n_events, np.random.default_rng(seed))
    return pa.table(dict(zip(drift.NAMES, np.ascontiguousarray(events.T))))


def ended_badly(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a job that could not go on, which is one and no traceback."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return " ".join(done.stderr.split())


def ended_well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, of a few megabytes; needs the right to mount one."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Faults


def killed(folder: Path, small: bool) -> Fault:
    """SIGKILL, again and again."""
    n_kills, n_events = (6, 20_000) if small else (200, 40_000)
    lines = _lines(n_events, seed=8)
    for position in range(1_500, n_events, 100):
        lines[position] = b"{"
    (folder / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    every = n_events // 20
    write_job(folder, source={"path": "events.jsonl"}, output={"checkpoint_every": every})
    with Command() as stream_em:
        outcome = kill_at_random(stream_em, ("run", "job.yaml"), folder, n_kills=n_kills, seed=1)
    assert outcome.differences == [], outcome.differences
    return Fault(
        f"a job over {n_events:,} events, 1% of them malformed, with a checkpoint every {every:,}, killed by SIGKILL "
        f"at {n_kills} random moments and started again each time",
        "parameters, scored events and quarantine are, bit by bit, those of a job left alone",
        "what was done since the last checkpoint is done again",
        f"{outcome.n_kills} kills, {outcome.n_resumed} starts went on from a checkpoint; 0 files differ",
    )


def full_disk(folder: Path, small: bool) -> Fault:
    """No room for a snapshot, then none for the outputs of a job, then room again."""
    n_events = 60_000 if small else 200_000
    pq.write_table(table_of(n_events), folder / "events.parquet", row_group_size=10_000)
    (folder / "output").mkdir()
    write_job(
        folder,
        source={"path": "events.parquet"},
        output={"folder": "disk", "checkpoint_every": n_events // 10, "scored_events": "scored.parquet"},
    )
    ended_well(run(folder, "output.folder=undisturbed"))
    written = sum(path.stat().st_size for path in (folder / "undisturbed").iterdir())
    megabytes = written // 2**20 + 3
    with small_disk(folder, megabytes) as disk:
        learner = OnlineEM(Mixture(Gaussian(), 3), schema=drift.SCHEMA).update(table_of(2_000))
        save(learner, disk / "kept.arrow")
        kept = (disk / "kept.arrow").read_bytes()
        filler = disk / "filler"
        _fill_up(filler)
        for attempt in range(3):
            try:
                save(learner, disk / "kept.arrow", metadata={"attempt": attempt})
            except OSError:
                continue
            raise AssertionError("a snapshot was written to a full disk")
        assert {path.name for path in disk.iterdir()} == {"kept.arrow", "filler"}
        # Room for half of what the job writes.
        os.truncate(filler, filler.stat().st_size - written // 2)
        message = ended_badly(run(folder))
        assert "scored.parquet" in message, message
        assert (disk / "kept.arrow").read_bytes() == kept
        filler.unlink()
        assert "going on after" in ended_well(run(folder))
        (disk / "kept.arrow").unlink()
        assert differences(disk, folder / "undisturbed") == []
    return Fault(
        "disk full while a snapshot is saved (3 times), and while a job writes its outputs; then room again",
        "old files stay whole, to the last byte; the error is one line that names the file; the same command goes on "
        "from the last checkpoint, and its files are, bit by bit, those of a job left alone",
        "",
        f"3 of 3 saves refused, the job ended with “{message}”; started again with room, 0 files differ",
    )


def _fill_up(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1024))


def truncated_source(folder: Path, small: bool) -> Fault:
    """The file that a job reads loses its second half meanwhile."""
    table = table_of(200_000 if small else 2_000_000)
    write_job(folder, source={"path": "none"}, output={"folder": "output"})
    seen = []
    for name in ("events.parquet", "events.csv", "events.jsonl"):
        path = folder / name
        if path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=20_000)
        elif path.suffix == ".csv":
            pa_csv.write_csv(table, path)
        else:
            path.write_bytes(b"\n".join(_lines(table.num_rows // 4)) + b"\n")
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with started(folder, f"source.path={name}", **piped) as job:
            pending = folder / "output" / ".pending-scored.parquet"
            while job.poll() is None and not _size(pending):
                time.sleep(0.001)
            os.truncate(path, path.stat().st_size // 2)
            out, err = job.communicate(timeout=LONGEST)
        done = subprocess.CompletedProcess(job.args, job.returncode, out, err)
        if done.returncode == 0:
            # All of the file was read before it shrank, or all of what was left ended with a line.
            count = pq.read_metadata(folder / "output" / "scored.parquet").num_rows
            seen.append(f"{path.suffix[1:]}: ended well with {count:,} events of the file scored")
        else:
            seen.append(f"{path.suffix[1:]}: “{ended_badly(done)[:100]}”")
            assert not (folder / "output" / "scored.parquet").exists()
        for leftover in (folder / "output").iterdir():
            leftover.unlink()
        path.unlink()
    return Fault(
        "the source file loses its second half while it is read (Parquet, CSV, JSON Lines)",
        "one line that says which file is damaged, and no output that looks whole; or, where the rest ends with a "
        "whole event, a run over those events",
        "to notice a text file that was cut at the end of a line",
        "; ".join(seen),
    )


def _size(path: Path) -> int:
    """Bytes of a file that may be renamed at any time."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _lines(n_events: int, seed: int = 0) -> list[bytes]:
    """Events as lines of JSON."""
    events = drift.clusters(n_events, np.random.default_rng(seed)).tolist()
    return [json.dumps(dict(zip(drift.NAMES, event))).encode() for event in events]


MALFORMED: dict[str, bytes] = {
    "a text in a numeric field": b'{"x": "12,50", "y": 1.5, "items": 3, "wait": 0.25, "w": 1.0}',
    "infinity": b'{"x": Infinity, "y": 1.5, "items": 3, "wait": 0.25, "w": 1.0}',
    "minus infinity": b'{"x": 0.5, "y": -Infinity, "items": 3, "wait": 0.25, "w": 1.0}',
    "a nested value": b'{"x": {"a": [1]}, "y": 1.5, "items": 3, "wait": 0.25, "w": 1.0}',
    "an integer beyond the range of doubles": b'{"x": 1'
    + b"0" * 400
    + b', "y": 1.5, "items": 3, "wait": 0.25, "w": 1.0}',
    "an empty event": b"{}",
    "an unknown field": b'{"x": 0.5, "y": 1.5, "items": 3, "wait": 0.25, "w": 1.0, "z": 4.0}',
    "a negative count": b'{"x": 0.5, "y": 1.5, "items": -3, "wait": 0.25, "w": 1.0}',
    "half a count": b'{"x": 0.5, "y": 1.5, "items": 3.5, "wait": 0.25, "w": 1.0}',
    "a negative duration": b'{"x": 0.5, "y": 1.5, "items": 3, "wait": -0.25, "w": 1.0}',
    "a negative weight": b'{"x": 0.5, "y": 1.5, "items": 3, "wait": 0.25, "w": -1.0}',
    "a weight that is no number": b'{"x": 0.5, "y": 1.5, "items": 3, "wait": 0.25, "w": "much"}',
    "half an event": b'{"x": 0.5, "y": 1.5, "ite',
    "a list": b"[0.5, 1.5, 3]",
    "no text": b'{"x": 0.5, "y": "\xff\xfe"}',
}


def malformed(folder: Path, small: bool) -> Fault:
    """One event in a hundred cannot be used."""
    n_events = 20_000 if small else 400_000
    generator = np.random.default_rng(1)
    values = drift.clusters(n_events, generator)
    lines = [
        json.dumps({"x": x, "y": y, "items": count, "wait": wait, "w": 1.0}).encode()
        for x, y, count, wait in zip(
            values[:, 0].tolist(),
            values[:, 1].tolist(),
            generator.poisson(3.0, n_events).tolist(),
            generator.exponential(2.0, n_events).tolist(),
        )
    ]
    kinds = list(MALFORMED)
    wrong = np.sort(generator.choice(np.arange(1_000, n_events), size=n_events // 100, replace=False)).tolist()
    (folder / "clean.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    for at, position in enumerate(wrong):
        lines[position] = MALFORMED[kinds[at % len(kinds)]]
    (folder / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    fields = {"x": "numeric", "y": "numeric", "items": "count", "wait": "duration"}
    write_job(folder, source={"path": "events.jsonl", "weight": "w"}, schema={"fields": fields})
    ended_well(run(folder))
    ended_well(run(folder, "source.path=clean.jsonl", "output.folder=clean"))
    with (folder / "output" / "quarantine.jsonl").open() as stream:
        aside = [json.loads(line) for line in stream]
    assert [one["index"] for one in aside] == wrong
    scored = pq.read_table(folder / "output" / "scored.parquet")
    assert scored.num_rows == n_events - len(wrong)
    means = [
        float(np.nanmean(pq.read_table(folder / name / "scored.parquet")["log_prob"].to_numpy(zero_copy_only=False)))
        for name in ("output", "clean")
    ]
    assert abs(means[0] - means[1]) < 0.05, means
    return Fault(
        f"1% malformed events of {len(kinds)} kinds: {', '.join(kinds)}",
        "each of them in quarantine with index, field, value and reason; every other event scored and learned",
        "",
        f"{len(aside):,} of {n_events:,} events in quarantine, at the {len(wrong):,} positions where they were put; "
        f"mean log-density of the others {means[0]:.3f}, of an undisturbed run {means[1]:.3f}",
    )


def _learned(options: dict[str, Any], batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> OnlineEM:
    learner = OnlineEM(Mixture(Gaussian(), 3), schema=drift.SCHEMA, batch_size=500, warm_up=500, **options)
    for values, times in batches:
        learner.update(Batch(np.ascontiguousarray(values.T), drift.SCHEMA, time=times))
        drift.check_sound(learner)
    return learner


def _timed(n_events: int, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Iterator[Any]:
    """An event a second, half of them from other clusters than before, with the dates that `change` gives them."""
    generator = np.random.default_rng(3)
    for start in range(0, n_events, 500):
        draw = drift.clusters if start < n_events // 2 else drift.elsewhere
        yield draw(500, generator), change(start + np.arange(500.0), generator)


def _mean_log_density(learner: OnlineEM) -> float:
    test = drift.elsewhere(4_000, np.random.default_rng(4))
    return float(learner.log_prob(Batch(np.ascontiguousarray(test.T), drift.SCHEMA)).mean())


def wrong_dates(folder: Path, small: bool) -> Fault:
    """Late events, a clock that is set back, dates far in the future."""
    n_events = 60_000 if small else 400_000

    def late(times: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return times - np.where(generator.random(len(times)) < 0.1, generator.uniform(0.0, DAY, len(times)), 0.0)

    def set_back(times: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return np.where(times > 0.75 * n_events, times - DAY, times)

    def ahead(times: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return times + np.where(
            generator.random(len(times)) < 0.01, generator.uniform(DAY, 36_500.0 * DAY, len(times)), 0
        )

    guarded, open_to_all = HalfLife(3_600.0, max_ahead=6 * 3_600.0), HalfLife(3_600.0)
    means = {
        name: _mean_log_density(_learned({"schedule": schedule}, _timed(n_events, change)))
        for name, schedule, change in (
            ("right dates", open_to_all, lambda times, _: times),
            ("10% up to a day late", guarded, late),
            ("clock set back by a day", guarded, set_back),
            ("1% up to a century ahead, max_ahead", guarded, ahead),
            ("1% up to a century ahead, no max_ahead", open_to_all, ahead),
        )
    }
    right = means["right dates"]
    for name in ("10% up to a day late", "1% up to a century ahead, max_ahead"):
        assert means[name] > right - drift.CLOSE, means
    return Fault(
        "`HalfLife` of an hour, an event a second, other clusters halfway: 10% of the events up to a day late; the "
        "clock set back by a day; 1% of the dates up to a century ahead",
        "late events count by their age, in any order; with `max_ahead` events dated ahead are learned as of now, and "
        "counted",
        "without `max_ahead` one date in the future fades all else; after the clock was set back events count as late "
        "ones, so the model changes little until the clock has caught up",
        "mean log-density of the new clusters: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()),
    )


def missing_values(folder: Path, small: bool) -> Fault:
    """A tenth of the values are not there."""
    n_events = 20_000 if small else 400_000
    table = table_of(n_events, seed=5)
    generator = np.random.default_rng(6)
    gaps = pa.table(
        {
            name: pa.array(column.to_numpy(), mask=generator.random(n_events) < 0.1)
            for name, column in zip(drift.NAMES, table)
        }
    )
    pq.write_table(table, folder / "whole.parquet")
    pq.write_table(gaps, folder / "events.parquet")
    write_job(folder, source={"path": "events.parquet"})
    ended_well(run(folder))
    ended_well(run(folder, "source.path=whole.parquet", "output.folder=whole"))
    means = [
        np.sort(load(folder / name / "model.arrow").parameters.components.mean, axis=0) for name in ("output", "whole")
    ]
    true = np.sort(drift.CENTERS, axis=0)
    errors = [float(np.abs(one - true).max()) for one in means]
    empty = sum(1 for _ in (folder / "output" / "quarantine.jsonl").open())
    assert errors[0] < 0.2, errors
    return Fault(
        "10% of all values missing at random",
        "they are marginalised; an event without any value goes to quarantine",
        "",
        f"{n_events:,} events, {empty:,} of them empty and in quarantine; largest error of a component's mean "
        f"{errors[0]:.3f} standard deviations, {errors[1]:.3f} without gaps",
    )


def burst(folder: Path, small: bool) -> Fault:
    """Ten times as many events as usual, all at once."""
    rate, seconds = (2_000, 1.0) if small else (5_000, 10.0)
    write_job(folder, source={"path": "-", "format": "jsonl"})
    block = b"\n".join(_lines(rate // 20, seed=7)) + b"\n"
    sent = 0
    waits, memory = [], []
    with started(folder, stdin=subprocess.PIPE, **QUIET) as job:
        assert job.stdin is not None
        # The first events wait for the job to start.
        for factor in (1, 1, 10, 1):
            due, longest = time.monotonic(), 0.0
            for _ in range(int(20 * seconds)):
                begun = time.monotonic()
                for _ in range(factor):
                    job.stdin.write(block)
                job.stdin.flush()
                longest = max(longest, time.monotonic() - begun)
                sent += factor * (rate // 20)
                due += 0.05
                time.sleep(max(0.0, due - time.monotonic()))
            waits.append(longest)
            memory.append(resident(job.pid))
        job.stdin.close()
        begun = time.monotonic()
        assert job.wait(timeout=LONGEST) == 0
        drained = time.monotonic() - begun
    count = pq.read_metadata(folder / "output" / "scored.parquet").num_rows
    assert count == sent, (count, sent)
    return Fault(
        f"{rate:,} events/s on standard input, then {10 * rate:,} for {seconds:g} s, then {rate:,} again",
        "no event is lost: what the job cannot take at once waits in the pipe; memory stays as it was",
        "to keep up with any rate: the producer waits then",
        f"{sent:,} events sent, {count:,} scored; a twentieth of a second's events took the producer {waits[1]:.2f} s "
        f"at most, {waits[2]:.2f} s in the burst, {waits[3]:.2f} s after it; the job ended {drained:.1f} s after the "
        f"last event; {memory[1]:.0f} MB before the burst, {memory[2]:.0f} at its end, {memory[3]:.0f} after it",
    )


def broker_gone(folder: Path, small: bool) -> Fault:
    """A Kafka broker that is killed, and comes back."""
    # Tests of the Kafka source run against the same broker.
    from tests.kafka_broker import Broker, why_no_broker

    if (reason := why_no_broker()) is not None:
        return Fault("a Kafka broker that is killed and comes back", "", "", f"not run: {reason}")
    n_events, n_outages = (4_000, 1) if small else (100_000, 5)
    (folder / "broker").mkdir()
    lines = _lines(n_events, seed=9)
    with contextlib.closing(Broker(folder / "broker")) as broker:
        topic = broker.topic()
        write_job(
            folder,
            source={"kafka": {"bootstrap_servers": broker.servers, "topic": topic, "max_wait": 0.1}},
            output={"checkpoint_every": 500, "checkpoint_seconds": 0.2},
        )
        snapshot = folder / "output" / "model.arrow"
        with started(folder, **QUIET) as job:
            for outage in range(n_outages + 1):
                share = lines[outage * n_events // (n_outages + 1) : (outage + 1) * n_events // (n_outages + 1)]
                for partition in (0, 1):
                    broker.produce(topic, partition, share[partition::2])
                wanted = (outage + 1) * n_events // (n_outages + 1)
                _wait_until(lambda wanted=wanted: snapshot.exists() and load(snapshot).n_events == wanted, job)
                if outage < n_outages:
                    broker.kill()
                    time.sleep(2.0)
                    broker.start()
            job.terminate()
            assert job.wait(timeout=LONGEST) == 128 + signal.SIGTERM
    count = pq.read_metadata(folder / "output" / "scored.parquet").num_rows
    assert count == n_events, count
    return Fault(
        f"a Kafka broker that is killed {n_outages} times while a job reads from it, and comes back after 2 s",
        "the job waits for it, and goes on: every event is learned and scored once",
        "",
        f"{n_events:,} events sent, {count:,} scored, {load(snapshot).n_events:,} learned",
    )


def _wait_until(condition: Callable[[], bool], job: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + LONGEST
    while not condition():
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def two_writers(folder: Path, small: bool) -> Fault:
    """A second job with the same outputs."""
    pq.write_table(table_of(2_000), folder / "events.parquet")
    write_job(folder, source={"path": "-", "format": "jsonl"})
    lines = _lines(2_000)
    with started(folder, stdin=subprocess.PIPE, **QUIET) as job:
        assert job.stdin is not None
        job.stdin.write(b"\n".join(lines) + b"\n")
        job.stdin.flush()
        _wait_until((folder / "output" / ".pending-scored.parquet").exists, job)
        second = run(folder, "source.path=events.parquet", "source.format=parquet")
        assert second.returncode != 0, second.stdout
        assert "Traceback" not in second.stderr, second.stderr
        job.stdin.close()
        assert job.wait(timeout=LONGEST) == 0
    count = pq.read_metadata(folder / "output" / "scored.parquet").num_rows
    assert count == len(lines), count
    assert load(folder / "output" / "model.arrow").n_events == len(lines)
    return Fault(
        "a second job with the same output folder while the first runs",
        "the second is refused, in one line; the first goes on undisturbed",
        "the same of programs that call `save` themselves: the last of them wins, and each file is whole",
        f"refused with “{' '.join(second.stderr.split())}”; the first scored {count:,} of {len(lines):,} events",
    )


def resident(process: int | str) -> float:
    """Megabytes of memory that a process holds now."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


FAULTS: dict[str, Callable[[Path, bool], Fault]] = {
    "kills": killed,
    "disk": full_disk,
    "writers": two_writers,
    "truncated": truncated_source,
    "malformed": malformed,
    "dates": wrong_dates,
    "missing": missing_values,
    "burst": burst,
    "kafka": broker_gone,
}


def main() -> None:
    """Do the faults and print the tables; with `--write`, put them into docs/reliability.md."""
    names = [*FAULTS, "drift"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--only", help=f"some of these, separated by commas: {', '.join(names)}")
    parser.add_argument("--small", action="store_true", help="few events, for a first look")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/reliability.md")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"unknown faults: {', '.join(unknown)}")
    if arguments.write and (arguments.only or arguments.small):
        parser.error("--write is for all faults at their full size")
    faults = []
    for name in chosen:
        if name in FAULTS:
            print(name, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                faults.append(FAULTS[name](Path(folder), arguments.small))
            print("  ", faults[-1].seen, flush=True)
    table = Table(
        "Faults",
        "Done on purpose by `make chaos`; what is promised is asserted each time.",
        ("tried", "promised", "not promised", "seen"),
        [(fault.tried, fault.promised, fault.not_promised, fault.seen) for fault in faults],
    )
    publish("faults", table, write=arguments.write)
    if "drift" in chosen:
        publish("drift", drift.table(10_000 if arguments.small else 60_000), write=arguments.write)


if __name__ == "__main__":
    main()
