"""What a job tells those who watch it, asked as they ask: over HTTP, and from its standard error."""

import contextlib
import io
import json
import logging
import socket
import time
import urllib.error
import urllib.request
import warnings
from datetime import datetime

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream_em import Gaussian, Mixture, OnlineEM
from stream_em.cli.config import ConfigError
from stream_em.cli.monitoring import Monitor, json_log, served


def ask(port, path, host="127.0.0.1"):
    """Status and text of an answer."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(port, **options):
    """Value of each sample, by its name and labels."""
    status, text = ask(port, "/metrics", **options)
    assert status == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def learner():
    return OnlineEM(Mixture(Gaussian(), 3), warm_up=50, seed=0).update(np.random.default_rng(0).normal(size=(200, 2)))


def test_the_metrics_are_what_the_job_told(learner):
    monitor = Monitor()
    with served(monitor, "127.0.0.1", 0) as port:
        first = metrics(port)
        assert first["stream_em_events_total",] == 0
        # What is not known is not there, rather than zero.
        assert not {
            "stream_em_log_likelihood",
            "stream_em_snapshot_age_seconds",
            "stream_em_event_time_lag_seconds",
        } & {name for name, *_ in first}
        monitor.batch(learner, 20, np.empty(0))
        monitor.batch(learner, 30, np.array([-3.0, -1.0]), np.array([time.time() - 90.0, time.time() - 100.0]))
        monitor.snapshot_written()
        found = metrics(port)
    assert found["stream_em_events_total",] == 50
    assert found["stream_em_events_per_second",] > 0
    assert found["stream_em_log_likelihood",] == -2.0
    assert 90.0 <= found["stream_em_event_time_lag_seconds",] < 100.0
    assert found["stream_em_snapshot_age_seconds",] >= 0.0
    weights = {label: value for (name, *rest), value in found.items() for label in rest if "component" in name}
    assert weights == {
        str(identity): weight
        for identity, weight in zip(learner.parameters.component_ids.tolist(), learner.parameters.weights.tolist())
    }
    assert found["process_resident_memory_bytes",] > 1e6


def test_the_rate_is_that_of_the_last_minute(learner):
    now = 1_000.0

    def rate():
        return next(
            sample.value
            for family in monitor.collect()
            for sample in family.samples
            if sample.name == "stream_em_events_per_second"
        )

    monitor = Monitor(clock=lambda: now)
    for _ in range(300):
        now += 1.0
        monitor.batch(learner, 50, np.zeros(50))
    assert rate() == pytest.approx(50.0, rel=0.02)
    now += 30.0
    assert rate() == pytest.approx(25.0, rel=0.02)
    now += 31.0
    assert rate() == 0.0
    # Batches further apart than a minute are not lost between two looks.
    monitor.batch(learner, 600, np.zeros(600))
    assert rate() == 10.0


def test_reasons_are_counted_without_the_values_in_them_and_not_without_end(learner):
    monitor = Monitor()
    for number in range(1_000):
        monitor.quarantined(None, f"expected a JSON object, but it does not parse: char {number}")
        monitor.quarantined(None, f"expected 3 cells as in the header, got {number}; a quote may have been left open")
        monitor.quarantined("amount", "expected a finite number")
    for number in range(1_000):
        monitor.quarantined(f"field {number}", "expected a field of the schema")
    with served(monitor, "127.0.0.1", 0) as port:
        counts = {key[1:]: value for key, value in metrics(port).items() if key[0].endswith("quarantined_events_total")}
    assert sum(counts.values()) == 4_000
    assert counts["", "expected a JSON object, but it does not parse"] == 1_000
    assert counts["", "expected 3 cells as in the header"] == 1_000
    assert counts["amount", "expected a finite number"] == 1_000
    assert counts["", "other"] > 800
    assert len(counts) <= 101


def test_health_turns_red_when_the_stream_stalls_and_green_when_it_goes_on(learner):
    now = 1_000.0
    monitor = Monitor(stall_after=30.0, clock=lambda: now)
    with served(monitor, "127.0.0.1", 0) as port:
        assert ask(port, "/healthz") == (200, "ok\n")
        now += 31.0
        status, reason = ask(port, "/healthz")
        assert (status, reason) == (503, "no event came for 31 seconds; after 30 the stream counts as stalled\n")
        monitor.batch(learner, 1, np.zeros(1))
        assert ask(port, "/healthz")[0] == 200
        now += 29.0
        monitor.quarantined("x", "expected a finite number")
        assert ask(port, "/healthz")[0] == 200
        now += 2.0
        status, reason = ask(port, "/healthz")
        assert status == 503
        assert "for 31 seconds none could be used" in reason
        assert ask(port, "/")[0] == 404


def test_a_job_without_a_limit_never_counts_as_stalled():
    now = 0.0
    monitor = Monitor(clock=lambda: now)
    now = 1e9
    assert monitor.problem is None


def test_the_server_ends_with_the_block_and_two_do_not_meet(learner):
    with served(Monitor(), "127.0.0.1", 0) as port, served(Monitor(), "127.0.0.1", 0) as other:
        assert port != other
        message = rf"metrics cannot be served at 127\.0\.0\.1, port {port}: Address"
        with pytest.raises(ConfigError, match=message), served(Monitor(), "127.0.0.1", port):
            pass
        # A client that says nothing must not hold the end up.
        silent = contextlib.closing(socket.create_connection(("127.0.0.1", port)))
    with silent, pytest.raises(urllib.error.URLError):
        ask(port, "/healthz")
    with served(Monitor(), "127.0.0.1", port):
        assert ask(port, "/healthz")[0] == 200


def test_it_listens_where_it_is_told():
    with served(Monitor(), "127.0.0.2", 0) as port:
        assert ask(port, "/healthz", host="127.0.0.2")[0] == 200
        with pytest.raises(urllib.error.URLError):
            ask(port, "/healthz", host="127.0.0.1")


def test_log_lines_are_json_with_event_and_fields():
    stream = io.StringIO()
    with json_log(stream):
        logging.getLogger("stream_em.cli").info("snapshot", extra={"fields": {"path": "ä\n", "events": 3}})
        logging.getLogger("stream_em.cli").debug("not wanted")
        logging.getLogger("elsewhere").info("not wanted")
        logging.getLogger("elsewhere").warning("wanted: %s", 7)
        warnings.warn("of Python", stacklevel=1)
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("stream_em").exception("failed")
    logging.getLogger("stream_em.cli").warning("after it")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines[:2]] == ["snapshot", "wanted: 7"]
    assert (lines[0]["path"], lines[0]["events"], lines[0]["level"]) == ("ä\n", 3, "info")
    assert "of Python" in lines[2]["event"]
    assert "ValueError: why" in lines[3]["exception"]
    assert len(lines) == 4
    assert all(time.time() - 60 < datetime.fromisoformat(line["time"]).timestamp() for line in lines)
