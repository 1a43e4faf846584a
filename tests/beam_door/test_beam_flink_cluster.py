"""Pipelines on a cluster of Flink, a process for each of its parts, one of which is killed."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from engine_cases import MODEL, SCHEMA, SlowShards, a_start, assert_same_fit, mixed_events
from engines import FLINK_FLAGS, Engine, job_server, jvm, kill, wait_for, why_no_flink
from ports import free_ports

from stream_em import BatchEM, HalfLife
from stream_em.beam import OnlineUpdate, ReadKafka, Refit, ScoredEvent

kafka_broker = pytest.importorskip("kafka_broker", reason="needs confluent-kafka: the extra 'kafka'")

# Beam's threads that listen to a killed process die with it, and say so.
pytestmark = [
    pytest.mark.flink,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

CONFIG = Path(__file__).parent / "flink"
N_WORKERS = 2
# Without the last of them elements wait in the operators of Beam 2.62, and none comes out.
STREAMING = ("--streaming", "--checkpointing_interval=1000", "--finish_bundle_before_checkpointing")
# Of a topic of the mock cluster.
N_PARTITIONS = 4
# Those of a partition fill a number of batches.
BATCH_SIZE = 25


class Cluster:
    """A job manager and two task managers of one slot each: a job that takes two slots is on both."""

    def __init__(self, folder: Path, ending: ExitStack) -> None:
        self.folder, self._ending = folder, ending
        rpc, rest = free_ports(2)
        self.address = f"localhost:{rest}"
        self._settings = [
            "--configDir",
            str(CONFIG),
            f"-Djobmanager.rpc.port={rpc}",
            f"-Drest.port={rest}",
            f"-Drest.bind-port={rest}",
            f"-Dio.tmp.dirs={folder}",
            f"-Dstate.checkpoints.dir={(folder / 'checkpoints').as_uri()}",
        ]
        entry = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self.log = folder / "job-manager.txt"
        ending.enter_context(jvm(self.log, entry, *self._settings))
        self._workers = [self._worker(number) for number in range(N_WORKERS)]
        endpoint = ending.enter_context(job_server(folder, self.address))
        self.engine = Engine("cluster", (*FLINK_FLAGS, endpoint))
        wait_for(self.complete, self.log)

    def _worker(self, number: int) -> subprocess.Popen[bytes]:
        log = self.folder / f"task-manager-{number}.txt"
        main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        return self._ending.enter_context(jvm(log, main, *self._settings))

    def complete(self) -> bool:
        try:
            return len(self.ask("/taskmanagers")["taskmanagers"]) == N_WORKERS
        except urllib.error.URLError:
            return False

    def replace_a_worker(self) -> None:
        """Kill a task manager, and start another as a supervisor would."""
        kill(self._workers[0])
        self._workers[0] = self._worker(0)

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
            return json.load(answer)

    def jobs(self) -> list[str]:
        """Identifiers of all jobs so far, the first one first."""
        found = self.ask("/jobs/overview")["jobs"]
        return [job["jid"] for job in sorted(found, key=lambda job: job["start-time"])]

    def n_attempts(self, job: str) -> int:
        """How often its parts were started, at most."""
        vertices = [vertex["id"] for vertex in self.ask(f"/jobs/{job}")["vertices"]]
        parts = [part for vertex in vertices for part in self.ask(f"/jobs/{job}/vertices/{vertex}")["subtasks"]]
        return 1 + max(int(part["attempt"]) for part in parts)

    def n_checkpoints(self, job: str) -> dict[str, int]:
        """How many checkpoints of a job were completed, and how many were gone back to."""
        counts: dict[str, int] = self.ask(f"/jobs/{job}/checkpoints")["counts"]
        return counts


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_no_flink()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as ending:
        yield Cluster(tmp_path_factory.mktemp("flink"), ending)


@pytest.fixture
def kafka() -> Iterator[Any]:
    mock = kafka_broker.MockCluster()
    yield mock
    mock.close()


def test_a_refit_that_loses_a_worker_comes_to_the_same_numbers(cluster: Cluster, tmp_path: Path) -> None:
    events = mixed_events()
    options: dict[str, Any] = {"schema": SCHEMA, "initial_parameters": a_start(events)[1], "max_iter": 2, "tol": 0.0}
    reading, folder = tmp_path / "reading", tmp_path / "run"
    first_iteration = folder / "start-0" / "iteration-0001.arrow"

    def kill_in_the_second_iteration() -> None:
        wait_for(first_iteration.exists, cluster.log)
        reading.unlink()
        wait_for(reading.exists, cluster.log)
        cluster.replace_a_worker()

    killer = threading.Thread(target=kill_in_the_second_iteration)
    killer.start()
    n_jobs = len(cluster.jobs())
    learner, counts = Refit(MODEL, **options).run(
        SlowShards(events, 0.5, reading), str(folder), options=cluster.engine.options()
    )
    killer.join()
    _, second = cluster.jobs()[n_jobs:]
    assert cluster.n_attempts(second) > 1
    assert_same_fit(learner, BatchEM(MODEL, **options).fit(events))
    assert (counts.n_events, counts.n_rejected) == (len(events), 0)


class WriteDown(beam.DoFn):
    """A sink that cannot take back what it was given: an event, a line."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def process(self, scored: ScoredEvent) -> None:
        with open(self.path, "a") as file:  # noqa: PTH123 - one line, at once
            file.write(f"{scored.event['x']!r} {scored.log_prob!r}\n")


def test_a_stream_that_loses_a_worker_learns_each_event_once(cluster: Cluster, kafka: Any, tmp_path: Path) -> None:
    """What has left the pipeline since the last checkpoint leaves it once more, with the same scores.

    The score of a batch tells what all batches of its key before it have taught, so that one that was learned twice, or
    never, shows in all that follow. Models by event time cannot be waited for: with checkpoints, no event-time timer of
    such a stream fires on Beam 2.62.
    """
    # A key for each partition, so that each key's batches are always the same.
    events = [
        {**event, "at": float(second), "key": second % N_PARTITIONS} for second, event in enumerate(mixed_events())
    ]
    update = OnlineUpdate(
        initial=BatchEM(MODEL, schema=SCHEMA).fit([_keyed(event)[1] for event in events]),
        schedule=HalfLife(100.0),
        batch_size=BATCH_SIZE,
        max_wait=None,
        warm_up=50,
    )
    topic, left = kafka.topic(), tmp_path / "left"
    left.touch()
    pipeline = Engine("streaming", (*cluster.engine.flags, *STREAMING)).pipeline()
    read = pipeline | ReadKafka({**kafka.config, "log_level": 0}, topic, time="at")
    outputs = read.events | beam.Map(_keyed).with_output_types(tuple[int, Any]) | update
    _ = outputs.scored | beam.ParDo(WriteDown(left))

    def produce(some: list[dict[str, Any]]) -> None:
        for event in some:
            kafka.produce(topic, event["key"], [json.dumps(event)])

    def scores() -> list[tuple[float, float]]:
        whole = left.read_text().rpartition("\n")[0]
        return [(float(x), float(log_prob)) for x, log_prob in map(str.split, whole.splitlines())]

    n_jobs, part = len(cluster.jobs()), len(events) // 4
    produce(events[:part])
    running = pipeline.run()
    try:
        wait_for(scores, cluster.log)
        (job,) = cluster.jobs()[n_jobs:]
        n_completed = cluster.n_checkpoints(job)["completed"]
        wait_for(lambda: cluster.n_checkpoints(job)["completed"] >= n_completed + 2, cluster.log)
        n_before = len(scores())
        produce(events[part : 2 * part])
        wait_for(lambda: len(scores()) > n_before, cluster.log)
        cluster.replace_a_worker()
        produce(events[2 * part :])
        xs = {event["x"] for event in events}
        wait_for(lambda: {x for x, _ in scores()} == xs, cluster.log)
        assert cluster.n_checkpoints(job)["restored"] >= 1
    finally:
        running.cancel()
    undisturbed: dict[float, float] = {}
    for key in range(N_PARTITIONS):
        undisturbed |= _scored(update, [event for event in events if event["key"] == key])
    for x, log_prob in scores():
        assert log_prob == pytest.approx(undisturbed[x], rel=1e-10)


def _keyed(event: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return event["key"], {name: event[name] for name in SCHEMA.names}


def _scored(update: OnlineUpdate, events: list[dict[str, Any]]) -> dict[float, float]:
    """Return log p(x) by x of the events of one key, batch by batch in this process."""
    learner, log_prob = deepcopy(update.start), {}
    for begin in range(0, len(events), BATCH_SIZE):
        batch = events[begin : begin + BATCH_SIZE]
        fields = [_keyed(event)[1] for event in batch]
        prediction = learner.predict_then_update(learner.encode(fields, time=[event["at"] for event in batch]))
        log_prob |= dict(zip([event["x"] for event in batch], prediction.log_prob.tolist()))
    return log_prob
