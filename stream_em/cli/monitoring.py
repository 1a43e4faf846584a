"""What a running job tells those who watch it: metrics for Prometheus, whether events flow, and a log of JSON lines."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from socket import AF_INET, AF_INET6
from socketserver import ThreadingMixIn
from threading import Lock, Thread
from typing import IO, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stream_em import OnlineEM
from stream_em.cli.config import ConfigError

_log = logging.getLogger(__name__)

# Reasons that are counted by themselves: more than anybody reads, and names of fields may come from hostile events.
_MOST_REASONS = 100
_OTHER_REASONS = ("", "other")
# What follows in a reason is the value that was found or how a parser puts it, and differs from event to event.
_VALUE = re.compile(r": |, got ")
# The rate is that of the last so many seconds, to a second.
_RATE_SECONDS = 60.0
# Longest that a client may take over its request, seconds.
_REQUEST_SECONDS = 10


class Monitor(Collector):
    """Numbers of a running job, and whether events still come.

    One thread tells it what happens; others may ask at any time.

    Parameters
    ----------
    stall_after
        Seconds after which a job that learns nothing counts as stalled; None for never.
    clock
        Seconds since some moment.

    >>> from stream_em import Gaussian, Mixture
    >>> learner = OnlineEM(Mixture(Gaussian(), 2), warm_up=2).update([{"x": 0.0}, {"x": 5.0}])
    >>> monitor = Monitor(stall_after=60.0)
    >>> monitor.batch(learner, 2, np.array([-1.5, -2.5]))
    >>> monitor.quarantined("x", "expected a finite number")
    >>> {sample.name: sample.value for family in monitor.collect() for sample in family.samples}[
    ...     "stream_em_log_likelihood"
    ... ]
    -2.0
    >>> monitor.problem is None
    True

    """

    def __init__(self, stall_after: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_after = stall_after
        self._clock = clock
        self._lock = Lock()
        self._n_events = 0
        self._quarantined: Counter[tuple[str, str]] = Counter()
        self._log_likelihood: float | None = None
        self._weights: dict[int, float] = {}
        self._event_time: float | None = None
        self._snapshot: float | None = None
        self._started = self._came = self._learned = self._clock()
        # How many events there were at most moments of the last minute, a second apart.
        self._marks: deque[tuple[float, int]] = deque([(self._started, 0)])

    def batch(
        self,
        learner: OnlineEM,
        n_events: int,
        log_prob: npt.NDArray[np.float64],
        event_time: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Take note of a batch.

        Parameters
        ----------
        learner
            It has just learned the batch.
        n_events
            How many events the batch had.
        log_prob
            Their log-densities before they were learned, those of the warm-up left out.
        event_time
            Their event times, in seconds since 1970.

        """
        if not n_events:
            return
        now = self._clock()
        with self._lock:
            self._came = self._learned = now
            self._n_events += n_events
            if len(log_prob):
                self._log_likelihood = float(log_prob.mean())
            if event_time is not None:
                self._event_time = float(event_time.max())
            if learner.n_events and (now - self._marks[-1][0] >= 1.0 or not self._weights):
                # Nobody asks more often.
                self._weights = dict(zip(learner.component_ids.tolist(), learner.weights.tolist()))
                self._marks.append((now, self._n_events))
                while now - self._marks[1][0] >= _RATE_SECONDS:
                    self._marks.popleft()

    def quarantined(self, field: str | None, reason: str) -> None:
        """Take note of an event that could not be used: it came all the same."""
        # Without the value, since each pair of labels is a time series of its own.
        kind = (field or "", _VALUE.split(reason, maxsplit=1)[0])
        with self._lock:
            if kind not in self._quarantined and len(self._quarantined) >= _MOST_REASONS:
                kind = _OTHER_REASONS
            first = kind not in self._quarantined
            self._quarantined[kind] += 1
            self._came = self._clock()
        if first:
            _log.info("quarantined", extra={"fields": {"field": field, "reason": reason}})

    def snapshot_written(self) -> None:
        """Take note that what was learned until now is in a snapshot."""
        with self._lock:
            self._snapshot = self._clock()

    @property
    def problem(self) -> str | None:
        """Why the job is not well; None while it is."""
        now = self._clock()
        with self._lock:
            came, learned = now - self._came, now - self._learned
        if self._stall_after is None or learned <= self._stall_after:
            return None
        if came <= self._stall_after:
            return f"events come, but for {learned:.0f} seconds none could be used: see the quarantine"
        return f"no event came for {came:.0f} seconds; after {self._stall_after:g} the stream counts as stalled"

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now; what is not known yet is absent."""
        now = self._clock()
        with self._lock:
            n_events, quarantined = self._n_events, self._quarantined.copy()
            weights, log_likelihood = self._weights, self._log_likelihood
            idle = now - self._came
            # What there was a minute ago, or at the start.
            earlier = [mark for mark in self._marks if now - mark[0] >= _RATE_SECONDS]
            _, before = earlier[-1] if earlier else self._marks[0]
            seconds = min(now - self._started, _RATE_SECONDS)
            lag = None if self._event_time is None else time.time() - self._event_time
            age = None if self._snapshot is None else now - self._snapshot
        yield CounterMetricFamily("stream_em_events", "Events that this process learned.", n_events)
        counted = CounterMetricFamily(
            "stream_em_quarantined_events", "Events that could not be used.", labels=("field", "reason")
        )
        for kind, count in quarantined.items():
            counted.add_metric(kind, count)
        yield counted
        rate = (n_events - before) / max(seconds, 1e-9)
        yield from _gauge("events_per_second", "Events learned per second, over the last minute.", rate)
        yield from _gauge("idle_seconds", "Seconds since an event came.", idle)
        yield from _gauge("log_likelihood", "Mean log-density of the newest batch.", log_likelihood)
        yield from _gauge("event_time_lag_seconds", "Seconds from the newest event time until now.", lag)
        yield from _gauge("snapshot_age_seconds", "Seconds since a snapshot was written.", age)
        components = GaugeMetricFamily("stream_em_component_weight", "Weight of a component.", labels=("component",))
        for identity, weight in weights.items():
            components.add_metric((str(identity),), weight)
        yield components


def _gauge(name: str, meaning: str, value: float | None) -> Iterator[Metric]:
    if value is not None:
        yield GaugeMetricFamily(f"stream_em_{name}", meaning, value)


@contextmanager
def served(monitor: Monitor, host: str, port: int) -> Iterator[int]:
    """Answer over HTTP while the block runs: `/metrics` for Prometheus, and `/healthz`.

    `/healthz` has the status 200 while events come and 503, with the reason, when they do not.

    Parameters
    ----------
    monitor
        What to tell.
    host
        Address to listen at; one that is not of the loopback lets others see the metrics.
    port
        Port; 0 for any that is free.

    Yields
    ------
    int
        The port.

    Raises
    ------
    ConfigError
        When it is not possible to listen there.

    """
    registry = CollectorRegistry()
    registry.register(monitor)
    ProcessCollector(registry=registry)
    metrics = make_wsgi_app(registry)

    def answer(environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environment.get("PATH_INFO")
        if path == "/metrics":
            page: Iterable[bytes] = metrics(environment, start_response)
            return page
        if path == "/healthz":
            problem = monitor.problem
            status, text = ("200 OK", "ok") if problem is None else ("503 Service Unavailable", problem)
        else:
            status, text = "404 Not Found", "there are /metrics and /healthz"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    try:
        server = _Server((host, port), _Handler)
    except OSError as error:
        raise ConfigError(f"metrics cannot be served at {host}, port {port}: {error.strerror or error}") from error
    server.set_app(answer)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    # A client that does not go away must not keep the job from ending.
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Of a client that has hung up there is nothing to tell; anything else is a mistake of ours.
        if not isinstance(sys.exception(), OSError):
            _log.exception("request failed")


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has in the base
        # Prometheus asks every few seconds: that is no news.
        pass


class _JsonLine(logging.Formatter):
    """One JSON object: time, level, logger, event, and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextmanager
def json_log(stream: IO[str]) -> Iterator[None]:
    """Write what this package logs, and the warnings of any other, as JSON lines while the block runs."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonLine())
    root, own = logging.getLogger(), logging.getLogger("stream_em")
    level = own.level
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        own.setLevel(level)
        root.removeHandler(handler)
