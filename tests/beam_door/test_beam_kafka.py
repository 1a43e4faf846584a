"""ReadKafka, against librdkafka's mock cluster and, where its jars are, a real Kafka broker."""

import collections
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.sdf_utils import (
    RestrictionTrackerView,
    ThreadsafeRestrictionTracker,
    ThreadsafeWatermarkEstimator,
)
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp
from engines import EngineMissingError, prism

pytest.importorskip("kafka_broker", reason="needs confluent-kafka: the extra 'kafka'")

from kafka_follow import with_place

from stream_em.beam.expectation import NAMESPACE
from stream_em.beam.kafka import ReadKafka, _EventTimeWatermark, _ReadPartition
from stream_em.kafka import PartitionRange, decode_json

_FOUND = collections.defaultdict(list)


class _Keep(beam.DoFn):
    """Keep events with their timestamps in this process, where FnApiRunner runs its only worker."""

    def __init__(self, name):
        self.name = name

    def process(self, element, timestamp=beam.DoFn.TimestampParam):
        _FOUND[self.name].append((element, timestamp.micros / 1e6))


def read(transform):
    """Run a read; return its events and its rejected messages, each with its timestamp, and the result."""
    _FOUND.clear()
    pipeline = beam.Pipeline("FnApiRunner")
    outputs = pipeline | transform
    for name in ("events", "rejected"):
        _ = outputs[name] | f"Keep {name}" >> beam.ParDo(_Keep(name))
    result = pipeline.run()
    result.wait_until_finish()
    return _FOUND["events"], _FOUND["rejected"], result


def texts(numbers):
    return [json.dumps({"id": number}) for number in numbers]


def counter(result, name):
    (counter,) = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE).with_name(name))["counters"]
    return counter.committed


def ids(events):
    return sorted(event["id"] for event, _ in events)


def test_the_events_of_all_partitions_come_once_each_and_in_order(cluster):
    topic = cluster.topic()
    cluster.produce(topic, 0, texts(range(30_000)), [1e9 + i / 1_000 for i in range(30_000)])
    cluster.produce(topic, 1, texts(range(30_000, 40_000)), [2e9] * 10_000)
    events, rejected, result = read(ReadKafka(cluster.config, topic, stop="latest"))
    assert rejected == []
    assert ids(events) == list(range(40_000))
    for part in (range(30_000), range(30_000, 40_000)):
        assert [event["id"] for event, _ in events if event["id"] in part] == list(part)
    assert {timestamp for event, timestamp in events if event["id"] >= 30_000} == {2e9}
    assert {event["id"]: timestamp for event, timestamp in events}[1_234] == 1e9 + 1.234
    assert counter(result, "messages") == 40_000


def test_several_topics_and_what_a_message_holds_beside_its_value(cluster):
    topics = [cluster.topic(), cluster.topic()]
    for topic in topics:
        cluster.produce(topic, 1, ["1", "2"], keys=["a", None])

    def decode(message):
        return {"topic": message.topic, "place": (message.partition, message.offset), "key": message.key}

    events, _, _ = read(ReadKafka(cluster.config, topics, stop="latest", decode=decode))
    found = sorted((event["topic"], event["place"], event["key"]) for event, _ in events)
    assert found == [(topic, (1, offset), key) for topic in topics for offset, key in enumerate([b"a", None])]


def test_ranges_of_offsets_meet_without_loss_or_repetition(cluster):
    topic = cluster.topic()
    for partition in range(2):
        cluster.produce(topic, partition, texts(range(100 * partition, 100 * partition + 100)))
    border = {(topic, 0): 37, (topic, 1): 0}
    first, _, _ = read(ReadKafka(cluster.config, topic, stop=border))
    assert ids(first) == list(range(37))
    second, _, _ = read(ReadKafka(cluster.config, topic, start=border, stop={(topic, 0): 60}))
    assert ids(second) == [*range(37, 60), *range(100, 200)]
    third, _, _ = read(ReadKafka(cluster.config, topic, start={(topic, 0): 60, (topic, 1): 100}, stop="latest"))
    assert ids(first + second + third) == list(range(200))
    nothing, _, _ = read(ReadKafka(cluster.config, topic, start="latest", stop="latest"))
    assert nothing == []


def test_a_read_waits_for_messages_that_have_not_come_yet(cluster):
    topic = cluster.topic()
    cluster.produce(topic, 0, texts(range(10)))

    def produce_later():
        for number in range(10, 30):
            time.sleep(0.05)
            cluster.produce(topic, number % 2, texts([number]))

    thread = threading.Thread(target=produce_later)
    thread.start()
    events, _, _ = read(ReadKafka(cluster.config, topic, stop={(topic, 0): 20, (topic, 1): 10}))
    thread.join()
    assert ids(events) == list(range(30))


def test_event_times_out_of_order_are_those_of_the_events(cluster):
    topic = cluster.topic()
    times = [50, 10, 40, 20, 30, 0]
    forms = [
        lambda t: float(t),
        lambda t: datetime.fromtimestamp(t, timezone.utc).isoformat(),  # noqa: UP017 - as the library
    ]
    values = [json.dumps({"id": t, "at": forms[n % 2](t)}) for n, t in enumerate(times)]
    cluster.produce(topic, 0, values[:3], [2e9] * 3)
    cluster.produce(topic, 1, values[3:], [2e9] * 3)
    transform = ReadKafka(cluster.config, topic, stop="latest", time="at", max_out_of_orderness=60.0)
    events, rejected, _ = read(transform)
    assert (sorted((event["id"], at) for event, at in events), rejected) == ([(t, float(t)) for t in sorted(times)], [])
    transform = ReadKafka(cluster.config, topic, stop="latest", time=lambda event: 100 + event["id"])
    pipeline = beam.Pipeline("FnApiRunner")
    counts = (
        (pipeline | transform).events
        | beam.Map(lambda event: ("events", event["id"]))
        | beam.WindowInto(FixedWindows(30))
        | beam.GroupByKey()
    )
    _FOUND.clear()
    _ = counts | beam.MapTuple(lambda key, group: tuple(sorted(group))) | beam.ParDo(_Keep("windows"))
    pipeline.run().wait_until_finish()
    assert sorted(group for group, _ in _FOUND["windows"]) == [(0, 10), (20, 30, 40), (50,)]


def test_poison_is_set_aside_with_its_place_and_nothing_else_is_lost(cluster):
    topic = cluster.topic()
    poison = [b"\xff\xfe", "{", "[1, 2]", "7", None, '{"id": 1}', '{"at": "soon"}', '{"at": 1e300}', '{"at": Infinity}']
    good = [json.dumps({"id": number, "at": number}) for number in range(len(poison) + 1)]
    cluster.produce(topic, 1, [value for pair in zip(good, [*poison, good[-1]]) for value in pair][:-1], [5.0] * 19)
    events, rejected, result = read(ReadKafka(cluster.config, topic, stop="latest", time="at"))
    assert ids(events) == list(range(len(good)))
    rejected = sorted((message for message, _ in rejected), key=lambda message: message.event["offset"])
    assert [message.event["offset"] for message in rejected] == [2 * n + 1 for n in range(len(poison))]
    values = [value.encode() if isinstance(value, str) else value for value in poison]
    assert [message.event["value"] for message in rejected] == values
    for message, problem in zip(
        rejected,
        [
            "expected a JSON object, but it does not parse",
            "expected a JSON object, but it does not parse",
            "expected an event with named fields, got list",
            "expected an event with named fields, got int",
            "the message has no value",
            "no event time: field 'at' is None",
            "no event time: field 'at' is 'soon'",
            "no event time: field 'at' is 1e+300",
            "no event time: field 'at' is inf",
        ],
    ):
        assert message.reason.startswith(f"{topic}[1] at offset {message.event['offset']}: ")
        assert problem in message.reason
        assert message.n_events == 1
    assert counter(result, "rejected") == len(poison)
    assert counter(result, "messages") == len(poison) + len(good)


def test_whatever_a_decoder_raises_concerns_its_message_alone(mock):
    topic = mock.topic()
    mock.produce(topic, 0, ["1", "0", "4"])
    transform = ReadKafka(mock.config, topic, stop="latest", decode=lambda message: {"id": 4 / int(message.value)})
    events, ((rejected, _),), _ = read(transform)
    assert ids(events) == [1.0, 4.0]
    assert rejected.reason == f"{topic}[0] at offset 1: ZeroDivisionError: division by zero"


def test_a_reader_that_was_killed_is_followed_by_one_that_goes_on(cluster, tmp_path):
    topic, written = cluster.topic(), tmp_path / "events.jsonl"
    for partition in range(2):
        cluster.produce(topic, partition, texts(range(5_000 * partition, 5_000 * partition + 5_000)))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)])}
    command = [sys.executable, str(here / "kafka_follow.py"), cluster.servers, topic, str(written)]
    reader = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not written.exists() or written.read_bytes().count(b"\n") < 1_000:
            assert reader.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        reader.kill()
        reader.wait()
    lines = written.read_bytes().split(b"\n")[:-1]
    first = [json.loads(line) for line in lines]
    assert 1_000 <= len(first) < 10_000
    start = {(topic, partition): 0 for partition in range(2)}
    for event in first:
        start[topic, event["partition"]] = event["offset"] + 1
    rest, _, _ = read(ReadKafka(cluster.config, topic, start=start, stop="latest", decode=with_place))
    assert sorted([event["id"] for event in first] + [event["id"] for event, _ in rest]) == list(range(10_000))


def test_a_broker_that_is_killed_and_comes_back_costs_nothing(broker):
    topic = broker.topic()
    broker.produce(topic, 0, texts(range(1_000)))
    killed = threading.Event()

    def kill_and_produce():
        time.sleep(2.0)
        broker.kill()
        killed.set()
        time.sleep(2.0)
        broker.start()
        broker.produce(topic, 0, texts(range(1_000, 2_000)))

    thread = threading.Thread(target=kill_and_produce)
    thread.start()
    events, rejected, _ = read(ReadKafka({**broker.config, "log_level": 0}, topic, stop={(topic, 0): 2_000}))
    thread.join()
    assert killed.is_set()
    assert ([event["id"] for event, _ in events], rejected) == (list(range(2_000)), [])


def test_what_transactions_leave_in_a_partition_is_no_event(broker):
    topic = broker.topic()
    producer = broker.transactional_producer()
    for number in range(6):
        producer.begin_transaction()
        producer.produce(topic, texts([number])[0], partition=0)
        producer.flush()
        if number % 2:
            producer.abort_transaction()
        else:
            producer.commit_transaction()
    # The last offset is the mark of a transaction that was aborted.
    events, rejected, _ = read(ReadKafka({**broker.config, "isolation.level": "read_committed"}, topic, stop="latest"))
    assert ([event["id"] for event, _ in events], rejected) == ([0, 2, 4], [])
    events, _, _ = read(ReadKafka({**broker.config, "isolation.level": "read_uncommitted"}, topic, stop="latest"))
    assert [event["id"] for event, _ in events] == list(range(6))


def test_offsets_that_kafka_no_longer_holds_are_an_error_and_never_skipped(broker):
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    topic = broker.topic()
    broker.produce(topic, 0, texts(range(10)))
    admin, place = AdminClient(broker.config), TopicPartition(topic, 0, 4)
    admin.delete_records([place])[place].result(30)
    with pytest.raises(ValueError, match=rf"{topic}\[0\] cannot be read from offset 3: Kafka holds 4 to 9 \(next: 10"):
        read(ReadKafka(broker.config, topic, start={(topic, 0): 3}, stop="latest"))
    events, _, _ = read(ReadKafka(broker.config, topic, stop="latest"))
    assert ids(events) == list(range(4, 10))


def test_what_does_not_exist_is_told(cluster):
    topic = cluster.topic()
    cluster.produce(topic, 0, texts(range(3)))
    for transform, error, problem in [
        (ReadKafka(cluster.config, "nowhere", stop="latest"), ValueError, "topic 'nowhere': .*[Uu]nknown topic"),
        (ReadKafka(cluster.config, topic, start={(topic, 9): 0}), ValueError, r"start has an offset for .*\[9\], but"),
        (ReadKafka(cluster.config, topic, start={(topic, 0): 4}), ValueError, "cannot be read from offset 4"),
    ]:
        with pytest.raises(error, match=problem):
            read(transform)


def test_brokers_that_do_not_answer_are_told(monkeypatch):
    monkeypatch.setattr("stream_em.kafka.METADATA_TIMEOUT", 0.5)
    with pytest.raises(ConnectionError, match=r"no answer from the Kafka brokers at 127\.0\.0\.1:1 "):
        read(ReadKafka({"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, "topic", stop="latest"))


@pytest.mark.parametrize(
    ("config", "options", "problem"),
    [
        ({}, {}, "config needs 'bootstrap.servers'"),
        ({"bootstrap.servers": "a", "auto.offset.reset": "earliest"}, {}, "must not set 'auto.offset.reset'"),
        (None, {"topics": []}, "topics is empty"),
        (None, {"start": "now"}, "start must be 'earliest' or 'latest', or a dict"),
        (None, {"stop": "earliest"}, "stop must be 'latest', or a dict"),
        (None, {"stop": {("other", 0): 1}}, "stop has an offset for topic 'other', but topics are 't'"),
        (None, {"start": {("t", 0): -1}}, r"start of t\[0\] must be a whole number from 0 up, got -1"),
        (None, {"max_out_of_orderness": -1.0}, "max_out_of_orderness must be a number of seconds"),
        (None, {"idle_timeout": float("inf")}, "idle_timeout must be a number of seconds"),
    ],
)
def test_arguments_are_checked(config, options, problem):
    topics = options.pop("topics", "t")
    with pytest.raises(ValueError, match=problem):
        ReadKafka({"bootstrap.servers": "a"} if config is None else config, topics, **options)


def test_only_a_read_without_an_end_is_unbounded(mock):
    pipeline = beam.Pipeline("FnApiRunner")
    for stop, bounded in [(None, False), ("latest", True), ({("t", 0): 5}, True)]:
        outputs = pipeline | f"{stop}" >> ReadKafka(mock.config, "t", stop=stop)
        assert outputs.events.is_bounded == bounded


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("n_before", [1, 250])
def test_a_split_in_the_middle_of_a_batch_neither_loses_nor_repeats(mock, fraction, n_before):
    topic = mock.topic()
    mock.produce(topic, 0, texts(range(600)))
    partition = PartitionRange(topic, 0, 0, 600)
    reader = _ReadPartition(mock.config, decode_json, None, 0.0, None)
    reader.setup()

    def begin(restriction):
        tracker = ThreadsafeRestrictionTracker(reader.create_tracker(restriction))
        state = reader.initial_estimator_state(partition, restriction)
        watermark = ThreadsafeWatermarkEstimator(reader.create_watermark_estimator(state))
        return tracker, reader.process(partition, RestrictionTrackerView(tracker), watermark)

    tracker, outputs = begin(reader.initial_restriction(partition))
    found = [next(outputs) for _ in range(n_before)]
    primary, residual = tracker.try_split(fraction)
    assert (primary.start, primary.stop, residual.stop) == (0, residual.start, 600)
    found.extend(outputs)
    tracker.check_done()
    assert (
        len(found) == primary.stop == (n_before if fraction == 0.0 else n_before - 1 + int((601 - n_before) * fraction))
    )
    tracker, outputs = begin(residual)
    found.extend(outputs)
    tracker.check_done()
    assert [output.value["id"] for output in found] == list(range(600))
    reader.teardown()


class TestWatermark:
    def test_it_follows_the_latest_event_time_and_never_goes_back(self):
        watermark = _EventTimeWatermark((MIN_TIMESTAMP.micros, 0.0), behind=10.0)
        assert watermark.current_watermark() == MIN_TIMESTAMP
        found = []
        for seconds in (100, 95, 120, 60, 121):
            watermark.advance(Timestamp(seconds))
            # The state is what a reader resumes from.
            watermark = _EventTimeWatermark(watermark.get_estimator_state(), behind=10.0)
            found.append(watermark.current_watermark())
        assert found == [90, 90, 110, 110, 111]

    def test_timestamps_of_rejected_messages_do_not_move_it(self):
        watermark = _EventTimeWatermark((0, 0.0), behind=0.0)
        watermark.observe_timestamp(Timestamp(100))
        assert watermark.current_watermark() == 0

    def test_an_idle_partition_follows_the_clock(self):
        now = time.time()
        watermark = _EventTimeWatermark((0, now), behind=5.0)
        watermark.none_came(idle_timeout=1_000.0)
        assert watermark.current_watermark() == 0
        watermark = _EventTimeWatermark((0, now - 2_000.0), behind=5.0)
        watermark.none_came(idle_timeout=1_000.0)
        assert now - 5.1 <= float(watermark.current_watermark().micros / 1e6) <= time.time() - 5.0
        watermark = _EventTimeWatermark((0, now - 2_000.0), behind=5.0)
        watermark.came()
        watermark.none_came(idle_timeout=1_000.0)
        assert watermark.current_watermark() == 0


class _WriteDown(beam.DoFn):
    def __init__(self, path):
        self.path = path

    def process(self, element):
        with self.path.open("a") as file:
            file.write(json.dumps(element) + "\n")


class _Slow(beam.DoFn):
    def process(self, element):
        time.sleep(0.0005)
        yield element


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wait_for_lines(path, n):
    until = time.monotonic() + 60
    while len(_lines(path)) < n and time.monotonic() < until:
        time.sleep(0.05)
    return _lines(path)


@pytest.fixture(scope="module")
def streaming_flags():
    try:
        with prism() as engine:
            # Prism may split bundles that take long, and these tests want it to.
            yield [flag for flag in engine.flags if "disable_sdf_split" not in flag]
    except EngineMissingError as error:
        pytest.skip(str(error))


@pytest.mark.prism
class TestStreaming:
    """What needs an engine that streams: watermarks, and readers that pause and go on elsewhere."""

    def test_a_range_that_is_read_in_several_goes_is_read_once(self, mock, streaming_flags, tmp_path):
        topic = mock.topic()
        for partition in range(2):
            mock.produce(topic, partition, texts(range(4_000 * partition, 4_000 * partition + 4_000)))
        with beam.Pipeline(options=PipelineOptions(streaming_flags)) as pipeline:
            events = (pipeline | ReadKafka(mock.config, topic, stop="latest")).events
            _ = events | beam.ParDo(_Slow()) | beam.ParDo(_WriteDown(tmp_path / "events"))
        assert sorted(event["id"] for event in _lines(tmp_path / "events")) == list(range(8_000))

    def test_windows_close_as_the_watermark_passes_them_and_miss_nothing(self, mock, streaming_flags, tmp_path):
        topic, seen, closed = mock.topic(), tmp_path / "seen", tmp_path / "closed"
        pipeline = beam.Pipeline(options=PipelineOptions([*streaming_flags, "--streaming"]))
        events = (pipeline | ReadKafka(mock.config, topic, time="id", max_out_of_orderness=10.0)).events
        _ = events | "See" >> beam.ParDo(_WriteDown(seen))
        counts = events | beam.WindowInto(FixedWindows(20)) | beam.combiners.Count.Globally().without_defaults()
        _ = counts | "Close" >> beam.ParDo(_WriteDown(closed))
        result = pipeline.run()
        try:
            for step in range(10):
                # Out of order by up to nine seconds, in each of the four partitions. They go in step, because Prism
                # 2.77 takes the watermark of the bundle that came last and not the least of all partitions.
                for partition in range(4):
                    mock.produce(topic, partition, texts([10 * step + 5, 10 * step, 10 * step + 9]))
                _wait_for_lines(seen, 12 * (step + 1))
            # The latest event time is 99 and the watermark 89: the window from 80 to 100 stays open.
            assert _wait_for_lines(closed, 4) == [24] * 4
            time.sleep(1.0)
            assert _lines(closed) == [24] * 4
            for partition in range(4):
                mock.produce(topic, partition, texts([110]))
            assert _wait_for_lines(closed, 5) == [24] * 5
        finally:
            result.cancel()
