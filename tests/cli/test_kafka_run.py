"""`stream-em run` from a Kafka topic and to one, as a process of its own, over sockets."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ports import free_ports

kafka_broker = pytest.importorskip("kafka_broker", reason="needs confluent-kafka: the extra 'kafka'")

from stream_em import load  # noqa: E402
from stream_em.cli.config import ConfigError, load_config  # noqa: E402
from stream_em.cli.outputs import ScoredRows  # noqa: E402
from stream_em.cli.scored_topic import ScoredTopic  # noqa: E402
from stream_em.kafka import find_partitions, replay  # noqa: E402
from stream_em.sources import open_source  # noqa: E402
from stream_em.store import read_metadata  # noqa: E402

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
COMMAND = [sys.executable, "-m", "stream_em.cli", "run", "job.yaml"]


def payments(n, seed=0):
    """Events as JSON, of three clusters; one in fifty cannot be used."""
    generator = np.random.default_rng(seed)
    centers = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])[generator.integers(3, size=n)]
    points = (centers + generator.normal(size=(n, 2))).tolist()
    events = [{"id": number, "x": x, "y": y} for number, (x, y) in enumerate(points)]
    return ["{" if number % 50 == 7 else json.dumps(event) for number, event in enumerate(events)]


def write_job(folder, cluster, topic, *, source=None, output=None, time=None, **learner):
    kafka = {"bootstrap_servers": cluster.servers, "topic": topic, **(source or {})}
    job = {
        "source": {"kafka": kafka, "exclude": ["id"], "time": time},
        "schema": {"fields": {"x": "numeric", "y": "numeric"}},
        "model": {"n_components": 3},
        "learner": {"batch_size": 100, "warm_up": 300, **learner},
        "output": {"folder": "out", "picture": None, "checkpoint_every": 1_000, **(output or {})},
    }
    folder.mkdir(exist_ok=True)
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps(job))


def start(folder, *arguments, **streams):
    return subprocess.Popen([*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, text=True, **streams)


def run(folder, *arguments, code=0):
    process = start(folder, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def wait_for(condition, process=None, seconds=60.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, "the job has ended"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


def n_read(folder):
    """Events that the last snapshot knows of."""
    snapshot = folder / "out" / "model.arrow"
    return read_metadata(snapshot)["checkpoint_of_run"]["position"]["index"] if snapshot.exists() else 0


def results(folder):
    """Parameters, scored events and quarantine of a job that is done."""
    out = folder / "out"
    parameters = load(out / "model.arrow").parameters
    arrays = [parameters.weights, parameters.components.mean, parameters.components.covariance]
    return [array.tobytes() for array in arrays] + [(out / name).read_bytes() for name in OUTPUTS]


OUTPUTS = ("scored.parquet", "quarantine.jsonl")


def scored_rows(folder):
    """Scored events, with their ids as the numbers that they were: columns that are kept from the model are texts."""
    rows = pq.read_table(folder / "out" / "scored.parquet").to_pylist()
    return [row | {"id": int(row["id"])} for row in rows]


def scored_ids(folder):
    return [row["id"] for row in scored_rows(folder)]


def fill(cluster, topic, events, partitions=2, made_at=None):
    """Deal events to partitions, in lots of different sizes; their messages may be made at another time than now."""
    for number in range(partitions):
        share = [event for position, event in enumerate(events) if min(position % 5, partitions - 1) == number]
        cluster.produce(topic, number, share, None if made_at is None else [made_at] * len(share))


def messages(cluster, topic):
    ranges = find_partitions(cluster.config, topic, "earliest", "latest")
    return [((one.key or b"").decode(), json.loads(one.value)) for one in replay(cluster.config, ranges, {})]


def n_messages(cluster, topic):
    return sum(one.stop for one in find_partitions(cluster.config, topic, "earliest", "latest"))


class TestToTheEnd:
    def test_a_topic_is_learned_scored_and_quarantined(self, cluster, tmp_path):
        topic = cluster.topic()
        events = payments(3_000)
        fill(cluster, topic, events)
        write_job(tmp_path, cluster, topic, source={"until": "end"})
        out, _ = run(tmp_path)
        good = [number for number in range(3_000) if number % 50 != 7]
        assert sorted(scored_ids(tmp_path)) == good
        assert f"{len(good):,} events from kafka:{topic}" in out
        learner = load(tmp_path / "out" / "model.arrow")
        assert learner.n_events == len(good)
        centers = learner.parameters.components.mean
        assert sorted(map(tuple, centers.round().astype(int).tolist())) == [(0, 0), (0, 9), (9, 0)]
        rejected = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
        assert len(rejected) == 60
        assert {one["source"] for one in rejected} == {topic}
        assert {one["partition"] for one in rejected} == {1}
        assert rejected[0]["event"] == "{"
        places = {(one["partition"], one["offset"]) for one in rejected}
        assert len(places) == 60

    @pytest.mark.slow
    def test_a_job_that_was_killed_ends_as_one_that_was_not(self, mock, tmp_path):
        topic = mock.topic()
        fill(mock, topic, payments(20_000), partitions=3)
        undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
        for folder in (undisturbed, killed):
            write_job(folder, mock, topic, source={"until": "end"})
        run(undisturbed)
        for wanted in (1, 9_000):
            job = start(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(lambda: n_read(killed) >= wanted, job)  # noqa: B023 - asked within the loop
            job.send_signal(signal.SIGKILL)
            job.wait()
        # What comes after the start does not belong to the job, however late it ends.
        mock.produce(topic, 0, payments(500, seed=1))
        out, _ = run(killed)
        assert "going on after" in out
        assert results(killed) == results(undisturbed)


class TestForEver:
    @pytest.mark.slow
    def test_every_event_comes_once_through_kills_and_stops(self, cluster, tmp_path):
        topic, scored = cluster.topic(), cluster.topic()
        # Others write to it as well.
        cluster.produce(scored, 0, ["{}"])
        output = {"checkpoint_every": 1_000, "kafka": {"bootstrap_servers": cluster.servers, "topic": scored}}
        write_job(tmp_path, cluster, topic, source={"max_wait": 0.1}, output=output)
        events = payments(6_000)
        for part, number in enumerate([signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]):
            fill(cluster, topic, events[2_000 * part : 2_000 * (part + 1)])
            job = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(lambda: n_messages(cluster, scored) >= 1_960 * part + 1_500, job)  # noqa: B023
            job.send_signal(number)
            job.wait(timeout=60)
        job = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert "going on after" in job.stdout.readline()
        # What was sent before the kill is not sent again, but learned again.
        wait_for(lambda: n_messages(cluster, scored) == 5_881 and n_read(tmp_path) == 6_000, job)
        job.terminate()
        out, err = job.communicate(timeout=60)
        assert job.returncode == 128 + signal.SIGTERM, err
        assert "stopped by SIGTERM" in out
        good = [number for number in range(6_000) if number % 50 != 7]
        assert sorted(scored_ids(tmp_path)) == good
        # None was killed before it had a checkpoint.
        assert sorted(event["id"] for _, event in messages(cluster, scored) if event) == good
        assert load(tmp_path / "out" / "model.arrow").n_events == 5_880
        assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 120

    def test_a_slow_stream_is_learned_after_a_while_and_put_into_the_snapshot(self, mock, tmp_path):
        topic = mock.topic()
        output = {"checkpoint_every": 1_000_000, "checkpoint_seconds": 0.2}
        write_job(tmp_path, mock, topic, source={"max_wait": 0.1}, output=output, batch_size=1_000)
        job = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for n in (10, 20):
            mock.produce(topic, 1, payments(10, seed=n))
            wait_for(lambda: n_read(tmp_path) == n, job)  # noqa: B023
        job.terminate()
        assert job.wait(timeout=60) == 128 + signal.SIGTERM

    @pytest.mark.slow
    def test_a_broker_that_is_killed_and_comes_back_costs_nothing(self, broker, tmp_path):
        topic = broker.topic()
        write_job(tmp_path, broker, topic, source={"max_wait": 0.1}, output={"checkpoint_every": 100})
        events = payments(4_000)
        fill(broker, topic, events[:2_000])
        job = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: n_read(tmp_path) == 2_000, job)
        broker.kill()
        # Killed as well, it is started while there is no broker, and waits for one.
        job.kill()
        job.wait()
        job = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        broker.start()
        fill(broker, topic, events[2_000:])
        wait_for(lambda: n_read(tmp_path) == 4_000, job)
        job.terminate()
        assert job.wait(timeout=60) == 128 + signal.SIGTERM
        assert sorted(scored_ids(tmp_path)) == [number for number in range(4_000) if number % 50 != 7]


class TestSink:
    def test_scored_events_carry_their_answers_under_the_place_of_the_event(self, cluster, tmp_path):
        topic, scored = cluster.topic(), cluster.topic()
        fill(cluster, topic, payments(2_000))
        kafka = {"bootstrap_servers": cluster.servers, "topic": scored}
        write_job(tmp_path, cluster, topic, source={"until": "end"}, output={"kafka": kafka, "responsibilities": True})
        out, _ = run(tmp_path)
        assert f"wrote kafka:{scored}" in out
        found = dict(messages(cluster, scored))
        rows = scored_rows(tmp_path)
        assert sorted(found.values(), key=lambda one: one["id"]) == sorted(rows, key=lambda one: one["id"])
        assert found[f"{topic}[1]@0"]["id"] == 1
        assert found[f"{topic}[1]@0"]["component"] is None

    @pytest.mark.slow
    def test_what_was_sent_is_not_sent_again_once_there_is_a_checkpoint(self, mock, tmp_path):
        topic = mock.topic()
        fill(mock, topic, payments(20_000))
        sinks = []
        n_again = 0
        for name in ("undisturbed", "killed"):
            folder, scored = tmp_path / name, mock.topic()
            kafka = {"bootstrap_servers": mock.servers, "topic": scored}
            output = {"kafka": kafka, "scored_events": None, "checkpoint_every": 10_000}
            write_job(folder, mock, topic, source={"until": "end"}, output=output)
            # Before the first checkpoint nobody knows what was sent; after it, everything is known.
            for wanted in () if name == "undisturbed" else (2_000, 12_000):
                job = start(folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                wait_for(lambda: n_messages(mock, scored) >= n_again + wanted, job)  # noqa: B023 - asked within the loop
                job.kill()
                job.wait()
                n_again = n_again or n_messages(mock, scored)
            run(folder)
            sinks.append(messages(mock, scored))
        undisturbed, killed = sinks
        expected = dict(undisturbed)
        assert len(undisturbed) == len(expected) == 19_600
        assert len(killed) == 19_600 + n_again
        # The same values each time, or a consumer could not drop the repeats.
        assert all(expected[key] == value for key, value in killed)
        assert dict(killed) == expected

    def test_files_are_scored_to_a_topic_too(self, mock, tmp_path):
        scored = mock.topic()
        write_job(tmp_path, mock, scored)
        job = json.loads((tmp_path / "job.yaml").read_text())
        job["output"] |= {"scored_events": None, "kafka": job["source"].pop("kafka")}
        job["source"]["path"] = "events.csv"
        (tmp_path / "job.yaml").write_text(json.dumps(job))
        lines = [f"{number},{number % 7},{number % 11 if number % 13 else ''}" for number in range(700)]
        (tmp_path / "events.csv").write_text("\n".join(["id,x,y", *lines]))
        run(tmp_path)
        found = dict(messages(mock, scored))
        assert found["events.csv@13"]["y"] is None
        assert found["events.csv@699"] | {"log_prob": 0.0, "component": 0} == {
            "id": "699", "x": 6.0, "y": 6.0, "log_prob": 0.0, "component": 0
        }  # fmt: skip
        assert len(found) == 700

    def test_values_that_were_left_out_stay_counted(self, mock, tmp_path):
        (tmp_path / "events.jsonl").write_text('{"x": 1.0}\n{"x": 2.0, "component": 7}\n')
        (chunk,) = open_source(tmp_path / "events.jsonl").chunks()
        topic, committed = mock.topic(), None
        for row in (0, 1, 1):
            sink = ScoredTopic(mock.config, topic, after=committed)
            answers = np.zeros(1, bool), np.zeros(1), np.zeros(1, np.int64)
            sink.add(ScoredRows(chunk, np.array([row]), *answers, None, [0]))
            committed = sink.commit()
        assert sink.left_out == {"component": 2}


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "problem"),
        [
            (["source.path=x.csv"], "expected exactly one of 'path', 'river' and 'kafka'"),
            (["source.kafka.topic=null"], "source.kafka.topic: expected a text"),
            (["source.kafka.tpoic=x"], "source.kafka.tpoic: no such key; did you mean 'topic'?"),
            (["source.kafka.until=now"], "source.kafka.until: expected one of end"),
            (["source.kafka.max_wait=0"], "source.kafka.max_wait: expected"),
            (["source.kafka.timestamp_field=at"], "name 'at' in source.time or source.exclude"),
            (["source.kafka.settings={auto.offset.reset: latest}"], "must not set 'auto.offset.reset'"),
        ],
    )
    def test_a_configuration_that_cannot_be_used_is_explained(self, mock, tmp_path, overrides, problem):
        write_job(tmp_path, mock, "t")
        with pytest.raises(ConfigError, match=re.escape(problem)):
            load_config(tmp_path / "job.yaml", overrides)

    def test_topics_that_are_not_there(self, broker, tmp_path):
        write_job(tmp_path, broker, "nowhere")
        _, err = run(tmp_path, code=1)
        assert "kafka:nowhere: topic 'nowhere'" in err
        topic = broker.topic()
        broker.produce(topic, 0, payments(10))
        kafka = {"bootstrap_servers": broker.servers, "topic": "nowhere"}
        write_job(tmp_path, broker, topic, source={"until": "end"}, output={"kafka": kafka})
        _, err = run(tmp_path, code=1)
        assert "kafka:nowhere: topic 'nowhere'" in err

    def test_secrets_do_not_get_into_the_snapshot(self, mock, tmp_path):
        topic = mock.topic()
        fill(mock, topic, payments(500))
        write_job(tmp_path, mock, topic, source={"until": "end", "settings": {"client.id": "hush"}})
        run(tmp_path)
        assert b"hush" not in (tmp_path / "out" / "model.arrow").read_bytes()


class TestWatching:
    def ask(self, port, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def test_a_job_tells_how_it_is(self, mock, tmp_path):
        topic = mock.topic()
        source = {"max_wait": 0.1, "timestamp_field": "made"}
        schedule = {"kind": "half_life", "half_life": 3_600.0}
        write_job(
            tmp_path, mock, topic, source=source, output={"checkpoint_every": 100}, time="made", schedule=schedule
        )
        (port,) = free_ports(1)
        log = (tmp_path / "log").open("w+")
        watched = ("--metrics-port", str(port), "--stall-after", "2", "--log-format", "json")
        job = start(tmp_path, *watched, stdout=subprocess.PIPE, stderr=log)
        made_at = time.time() - 500.0
        fill(mock, topic, payments(1_000), made_at=made_at)
        wait_for(lambda: n_read(tmp_path) == 1_000, job)
        status, text = self.ask(port, "/metrics")
        assert status == 200
        assert "stream_em_events_total 980.0" in text
        reason = (
            'stream_em_quarantined_events_total{field="",reason="expected a JSON object, but it does not parse"} 20.0'
        )
        assert reason in text
        assert 'stream_em_component_weight{component="2"} 0.' in text
        (age,) = re.findall(r"^stream_em_snapshot_age_seconds (\S+)$", text, re.M)
        assert 0.0 <= float(age) < 60.0
        (lag,) = re.findall(r"^stream_em_event_time_lag_seconds (\S+)$", text, re.M)
        assert 500.0 <= float(lag) <= time.time() - made_at + 1.0
        # Red when the stream stalls, and green when it goes on.
        status, text = wait_for(lambda: [answer for answer in [self.ask(port, "/healthz")] if answer[0] != 200], job)[0]
        assert status == 503
        assert re.match(r"no event came for \d+ seconds; after 2 the stream counts as stalled", text)
        fill(mock, topic, payments(100))
        wait_for(lambda: self.ask(port, "/healthz") == (200, "ok\n"), job)
        job.terminate()
        out, _ = job.communicate(timeout=60)
        assert (job.returncode, out) == (128 + signal.SIGTERM, "")
        with pytest.raises(urllib.error.URLError):
            self.ask(port, "/healthz")
        log.seek(0)
        lines = [json.loads(line) for line in log]
        told = [line["event"] for line in lines]
        assert told[0] == "started"
        assert {"snapshot", "quarantined", "stopped"} <= set(told)
        assert told.count("quarantined") == 1
        assert told[-1] == "finished"
        assert lines[-1]["n_events"] == 1_078
        assert lines[0]["source"] == f"kafka:{topic}"

    def test_a_job_that_fails_says_so_in_its_log(self, mock, tmp_path):
        write_job(tmp_path, mock, mock.topic(), source={"until": "end"})
        out, err = run(tmp_path, "--log-format", "json", code=1)
        assert out == ""
        (line,) = [json.loads(line) for line in err.splitlines() if '"failed"' in line]
        assert (line["level"], line["exit_code"]) == ("error", 1)
        assert "holds no events" in line["message"]
