"""Kafka topics read in a defined order and written without loss, over sockets."""

import json
import threading
import time
from itertools import accumulate, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kafka_broker", reason="needs confluent-kafka: the extra 'kafka'")

from stream_em.columns import Roles
from stream_em.kafka import (
    PartitionRange,
    TopicReader,
    TopicWriter,
    find_partitions,
    follow,
    replay,
    rounds,
)
from stream_em.sources import Source, SourceError


def texts(numbers):
    return [json.dumps({"id": number}) for number in numbers]


def places(messages):
    return [(message.partition, message.offset) for message in messages]


def in_order(ranges, reached=None):
    """Every partition and offset, as `rounds` has them."""
    return [(one.partition, offset) for one in rounds(ranges, reached or {}) for offset in range(one.start, one.stop)]


RANGES = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 4_000)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    min_size=1,
    max_size=5,
).map(lambda pairs: [PartitionRange("t", number, *pair) for number, pair in enumerate(pairs)])


class TestRounds:
    @given(RANGES)
    def test_every_offset_comes_once_and_those_of_a_partition_ascend(self, ranges):
        order = in_order(ranges)
        assert sorted(order) == [(one.partition, offset) for one in ranges for offset in range(one.start, one.stop)]
        for one in ranges:
            offsets = [offset for number, offset in order if number == one.partition]
            assert offsets == sorted(offsets)

    @given(RANGES, st.data())
    def test_what_was_read_is_skipped_and_the_order_stays(self, ranges, data):
        order = in_order(ranges)
        n_read = data.draw(st.integers(0, len(order)))
        reached = {}
        for number, offset in order[:n_read]:
            reached[number] = offset + 1
        assert in_order(ranges, reached) == order[n_read:]

    def test_partitions_of_any_sizes_end_together(self):
        ranges = [PartitionRange("t", 0, 0, 90_000), PartitionRange("t", 1, 50, 10_050)]
        order = in_order(ranges)
        for begin in range(0, 100_000, 10_000):
            assert 950 <= sum(number for number, _ in order[begin : begin + 10_000]) <= 1_050


class TestReplay:
    def test_the_order_is_that_of_the_rounds_whatever_comes_first(self, cluster):
        topic = cluster.topic()
        sizes = {0: 30_000, 1: 2_500}
        for number, size in sizes.items():
            cluster.produce(topic, number, texts(range(size)))
        ranges = find_partitions(cluster.config, topic, "earliest", "latest")
        assert {one.partition: one.stop for one in ranges if one.stop} == sizes
        # What comes later is not read.
        cluster.produce(topic, 0, texts(range(10)))
        assert places(replay(cluster.config, ranges, {})) == in_order(ranges)

    def test_a_partition_that_is_far_ahead_waits(self, mock, monkeypatch):
        monkeypatch.setattr("stream_em.kafka._AHEAD", 100)
        topic = mock.topic()
        for number in range(4):
            mock.produce(topic, number, texts(range(1_000 + number)))
        ranges = find_partitions(mock.config, topic, "earliest", "latest")
        assert places(replay(mock.config, ranges, {})) == in_order(ranges)

    def test_reading_goes_on_anywhere(self, mock):
        topic = mock.topic()
        for number in range(3):
            mock.produce(topic, number, texts(range(1_000 * (number + 1))))
        ranges = find_partitions(mock.config, topic, "earliest", "latest")
        order = in_order(ranges)
        for n_read in (1, 999, 1_000, 4_321, 5_999, 6_000):
            reached = {}
            for number, offset in order[:n_read]:
                reached[number] = offset + 1
            assert places(replay(mock.config, ranges, reached)) == order[n_read:]

    def test_offsets_without_a_message_are_passed(self, broker):
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
        ranges = find_partitions(broker.config, topic, "earliest", "latest")
        assert [json.loads(message.value)["id"] for message in replay(broker.config, ranges, {})] == [0, 2, 4]


def gathered(groups, n, seconds=120.0):
    """Groups, until they have so many messages."""
    full = []
    until = time.monotonic() + seconds
    while sum(map(len, full)) < n and time.monotonic() < until:
        full.extend(group for group in [next(groups)] if group)
    return full


class TestFollow:
    def test_messages_are_handed_out_in_full_groups_or_after_a_while(self, cluster):
        topic = cluster.topic()
        groups = follow(cluster.config, topic, {0: 0, 1: 0}, 0, 100, max_wait=0.2)
        assert next(groups) == []
        cluster.produce(topic, 0, texts(range(250)))
        full = gathered(groups, 250)
        assert places(message for group in full for message in group) == [(0, offset) for offset in range(250)]
        # After a group that was not full, the next is smaller too, to end at a multiple.
        assert {100, 200, 250} <= set(accumulate(map(len, full)))
        cluster.produce(topic, 0, texts(range(60)))
        assert 300 in accumulate(map(len, gathered(groups, 60)), initial=250)
        groups.close()

    def test_partitions_that_are_added_are_read_from_their_start(self, broker, monkeypatch):
        from confluent_kafka.admin import AdminClient, NewPartitions

        monkeypatch.setattr("stream_em.kafka._LOOK_FOR_PARTITIONS", 0.5)
        topic = broker.topic()
        broker.produce(topic, 0, texts([0]))
        groups = follow(broker.config, topic, {0: 0, 1: 0}, 0, 10, max_wait=0.1)
        found = gathered(groups, 1)
        admin = AdminClient(broker.config)
        admin.create_partitions([NewPartitions(topic, 3)])[topic].result(30)
        broker.produce(topic, 2, texts([1, 2]))
        found += gathered(groups, 2)
        groups.close()
        assert places(message for group in found for message in group) == [(0, 0), (2, 0), (2, 1)]

    def test_a_partition_that_is_not_known_is_read_from_its_start(self, mock):
        topic = mock.topic()
        for number in range(2):
            mock.produce(topic, number, texts(range(3)))
        groups = follow(mock.config, topic, {1: 2}, 0, 4, max_wait=60.0)
        full = next(group for group in groups if group)
        groups.close()
        assert sorted(places(full)) == [(0, 0), (0, 1), (0, 2), (1, 2)]

    def test_members_of_a_group_that_come_and_go_take_nothing_away(self, cluster):
        from confluent_kafka import Consumer

        topic = cluster.topic()
        groups = follow(cluster.config, topic, {0: 0, 1: 0}, 0, 10, max_wait=0.1)
        # Of the very group that the client names, since it has to name one.
        member = Consumer({**cluster.config, "group.id": "stream-em", "auto.offset.reset": "earliest"})
        member.subscribe([topic])
        until = time.monotonic() + 60
        while not member.assignment() and time.monotonic() < until:
            member.poll(0.05)
        assert member.assignment()
        for step in range(2):
            for partition in range(2):
                cluster.produce(topic, partition, texts(range(50)))
            found = [message for group in gathered(groups, 100) for message in group]
            here = range(50 * step, 50 * step + 50)
            assert sorted(places(found)) == [(partition, offset) for partition in range(2) for offset in here]
            if step == 0:
                member.close()
        groups.close()

    def test_a_partition_that_is_gone_is_told(self, mock):
        with pytest.raises(ValueError, match="has no partition 17 any more"):
            next(follow(mock.config, mock.topic(), {0: 0, 17: 5}, 0, 1, max_wait=1.0))

    def test_brokers_that_are_away_at_the_start_are_waited_for(self, caplog):
        groups = follow({"bootstrap.servers": "127.0.0.1:1"}, "t", {0: 0}, 0, 1, max_wait=1.0)
        assert next(groups) == []
        groups.close()
        assert "topic 't' was not asked for new partitions" in caplog.text

    def test_an_offset_that_kafka_does_not_hold_is_an_error(self, cluster):
        topic = cluster.topic()
        cluster.produce(topic, 0, texts(range(3)))
        groups = follow(cluster.config, topic, {0: 100}, 0, 1, max_wait=1.0)
        with pytest.raises(ValueError, match=rf"{topic}\[0\]: cannot be read on .*out of range"):
            list(islice(groups, 60))


def read(source, rows=100, after=None):
    return list(source.chunks(rows, after))


def source(cluster, topic, *, limit=None, label=None, **options):
    return Source(TopicReader(cluster.config, topic, **options), Roles(label, None, None, ()), limit)


class TestTopicReader:
    def test_events_carry_their_place_and_bad_messages_are_set_aside_with_theirs(self, cluster):
        topic = cluster.topic()
        values = ['{"x": 1}', b"\xff", "[1]", None, '{"x": "\\ud800"}', '{"x": 2}']
        cluster.produce(topic, 1, values)
        (chunk,) = read(source(cluster, topic, to_end=True))
        assert chunk.events == [{"x": 1}, {"x": 2}]
        assert chunk.index.tolist() == [0, 5]
        assert chunk.offsets.tolist() == [[1, 0], [1, 5]]
        assert [rejection.offset for rejection in chunk.rejected] == [(1, offset) for offset in range(1, 5)]
        assert [rejection.index for rejection in chunk.rejected] == [1, 2, 3, 4]
        assert {rejection.path for rejection in chunk.rejected} == {topic}
        assert str(chunk.rejected[2]) == (
            f"{topic}, event 3 (partition 1, offset 3): expected a JSON object, but the message has no value"
        )
        assert str(chunk.reject(1, "x", 2, "expected less")) == (
            f"{topic}, event 5 (partition 1, offset 5), field 'x': 2: expected less"
        )

    def test_the_timestamp_of_a_message_becomes_a_field(self, mock):
        topic = mock.topic()
        mock.produce(topic, 0, ['{"x": 1}', '{"x": 2, "at": 3}'], [1e9 + 0.5, 1e9])
        (chunk,) = read(source(mock, topic, to_end=True, timestamp_field="at"))
        assert chunk.events == [{"x": 1, "at": 1e9 + 0.5}]
        ((rejection),) = chunk.rejected
        assert (rejection.field, rejection.value, rejection.offset) == ("at", 3, (0, 1))

    def test_a_bounded_source_is_read_again_and_from_any_position(self, mock):
        topic = mock.topic()
        for number in range(3):
            mock.produce(topic, number, texts(range(10_000 * number, 10_000 * number + 700 * (number + 1))))
        events = source(mock, topic, to_end=True)
        chunks = read(events)
        mock.produce(topic, 0, texts(range(5)))
        again = read(events)
        assert [chunk.events for chunk in again] == [chunk.events for chunk in chunks]
        assert sum(map(len, chunks)) == 4_200
        for number in (0, 7, 41):
            after = json.loads(json.dumps(chunks[number].after))
            rest = read(source(mock, topic, to_end=True), after=after)
            assert [chunk.events for chunk in rest] == [chunk.events for chunk in chunks[number + 1 :]]
            assert [chunk.index.tolist() for chunk in rest] == [chunk.index.tolist() for chunk in chunks[number + 1 :]]
        middle = json.loads(json.dumps(chunks[5].position(530)))
        assert read(source(mock, topic, to_end=True), after=middle)[0].index.tolist() == list(range(530, 600))

    def test_a_topic_is_followed_from_its_position(self, mock):
        topic = mock.topic()
        for number in range(2):
            mock.produce(topic, number, texts(range(1_000 * number, 1_000 * number + 100)))
        found = []
        after = None
        for limit in (30, 130, 200):
            for chunk in source(mock, topic, limit=limit, max_wait=0.2).chunks(10, after):
                found.extend(event["id"] for event in chunk.events)
                after = json.loads(json.dumps(chunk.after))
        assert sorted(found) == [*range(100), *range(1_000, 1_100)]

    def test_only_what_comes_after_the_start_is_read_if_wanted(self, mock):
        topic = mock.topic()
        mock.produce(topic, 0, texts(range(5)))
        chunks = source(mock, topic, start="latest", max_wait=0.1, limit=2).chunks(2)
        first = next(chunks)
        assert len(first) == 0
        mock.produce(topic, 0, texts([5, 6]))
        assert [event["id"] for chunk in chunks for event in chunk.events] == [5, 6]
        # What was not there when reading began is read after a stop before the first event, too.
        mock.produce(topic, 1, texts([7]))
        (chunk,) = [chunk for chunk in source(mock, topic, limit=1).chunks(1, first.after) if len(chunk)]
        assert chunk.events[0]["id"] in (5, 7)

    def test_what_is_wrong_is_told_as_of_any_source(self, mock, monkeypatch):
        with pytest.raises(SourceError, match=r"kafka:nowhere: topic 'nowhere': .*[Uu]nknown topic"):
            read(source(mock, "nowhere", to_end=True))
        with pytest.raises(SourceError, match="holds no events"):
            read(source(mock, mock.topic(), to_end=True))
        monkeypatch.setattr("stream_em.kafka.METADATA_TIMEOUT", 0.5)
        reader = TopicReader({"bootstrap.servers": "127.0.0.1:1"}, "t")
        with pytest.raises(SourceError, match=r"kafka:t: no answer from the Kafka brokers at 127\.0\.0\.1:1"):
            read(Source(reader, Roles(None, None, None, ())))


class TestTopicWriter:
    def test_what_is_flushed_is_there_in_order(self, cluster):
        topic = cluster.topic()
        writer = TopicWriter(cluster.config, topic)
        for number in range(5_000):
            writer.write(b"same key", b"%d" % number)
        writer.flush()
        ranges = find_partitions(cluster.config, topic, "earliest", "latest")
        messages = list(replay(cluster.config, ranges, {}))
        assert [int(message.value) for message in messages] == list(range(5_000))
        assert {message.key for message in messages} == {b"same key"}

    def test_a_queue_that_is_full_is_waited_for(self, mock):
        topic = mock.topic()
        writer = TopicWriter({**mock.config, "queue.buffering.max.messages": 10}, topic)
        for number in range(200):
            writer.write(b"%d" % number, b"value")
        writer.flush()
        ranges = find_partitions(mock.config, topic, "earliest", "latest")
        assert sum(one.stop for one in ranges) == 200

    def test_a_message_that_kafka_refuses_is_an_error(self, broker):
        writer = TopicWriter({**broker.config, "message.max.bytes": 10_000_000}, broker.topic())
        writer.write(b"key", b"x" * 9_000_000)
        with pytest.raises(ConnectionError, match="did not take a message"):
            writer.flush()

    def test_a_topic_is_written_to_as_soon_as_it_is_made(self, broker):
        # For a moment its partitions have no leader.
        for _ in range(20):
            assert TopicWriter(broker.config, broker.topic()).ends == {0: 0, 1: 0}

    def test_a_topic_that_is_not_there_is_told(self, broker):
        with pytest.raises(ValueError, match="topic 'nowhere'"):
            TopicWriter(broker.config, "nowhere")

    def test_brokers_that_do_not_answer_are_told(self, monkeypatch):
        monkeypatch.setattr("stream_em.kafka.METADATA_TIMEOUT", 0.5)
        with pytest.raises(ConnectionError, match="no answer from the Kafka brokers"):
            TopicWriter({"bootstrap.servers": "127.0.0.1:1"}, "t")


@pytest.mark.slow
def test_a_broker_that_is_killed_and_comes_back_costs_nothing(broker):
    topic = broker.topic()
    writer = TopicWriter(broker.config, topic)
    groups = follow(broker.config, topic, {0: 0, 1: 0}, 0, 100, max_wait=0.2)
    for number in range(1_000):
        writer.write(b"key", b"%d" % number)
    writer.flush()
    found = gathered(groups, 1_000)
    broker.kill()
    # Neither side has to be told, and neither gives up.
    assert gathered(groups, 1, seconds=3.0) == []
    for number in range(1_000, 2_000):
        writer.write(b"key", b"%d" % number)
    restart = threading.Timer(1.0, broker.start)
    restart.start()
    writer.flush()
    restart.join()
    found += gathered(groups, 1_000)
    groups.close()
    assert [int(message.value) for group in found for message in group] == list(range(2_000))
