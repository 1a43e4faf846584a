"""Kafka clusters for tests: librdkafka's mock cluster, and a real broker of one node (KRaft)."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from ports import free_ports

JARS = Path(__file__).parents[1] / ".jars" / "kafka"
JAVA = ["java", "-Xmx512m", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{JARS}/*"]
# The shell kills the broker when this process ends, however it ends: then its standard input is closed.
WATCHED = ["sh", "-c", '"$@" </dev/null & read _; kill -9 $!; wait', "sh"]
N_PARTITIONS = 2


def why_no_broker() -> str | None:
    """Why no real broker can be started here, or None where one can."""
    if shutil.which("java") is None:
        return "a Kafka broker needs Java 17 or newer"
    if not list(JARS.glob("kafka_2.13-*.jar")):
        return "no Kafka jars: `make test-kafka` fetches them with Maven"
    return None


class Cluster(ABC):
    """A Kafka cluster that answers at `servers`."""

    servers: str

    def __init__(self) -> None:
        self._names = (f"topic-{number}" for number in itertools.count())

    @property
    def config(self) -> dict[str, object]:
        return {"bootstrap.servers": self.servers}

    def topic(self) -> str:
        """Make a new topic of `N_PARTITIONS` partitions, or more."""
        return next(self._names)

    def produce(self, topic, partition, values, timestamps=None, keys=None) -> None:
        producer = self._producer()
        for number, value in enumerate(values):
            milliseconds = 0 if timestamps is None else round(1_000 * timestamps[number])
            key = None if keys is None else keys[number]
            producer.produce(topic, value, key, partition, on_delivery=_delivered, timestamp=milliseconds)
            producer.poll(0)
        assert producer.flush(30) == 0

    @abstractmethod
    def _producer(self) -> Producer:
        """Return a producer to the cluster."""


class MockCluster(Cluster):
    """The cluster that librdkafka keeps, behind real sockets, for as long as its producer lives."""

    def __init__(self) -> None:
        super().__init__()
        self._keeper = Producer({"test.mock.num.brokers": 1, "log_level": 0})
        (broker,) = self._keeper.list_topics(timeout=10).brokers.values()
        self.servers = f"{broker.host}:{broker.port}"

    def topic(self) -> str:
        name = super().topic()
        # It has four partitions.
        assert self._keeper.list_topics(name, timeout=10)
        return name

    def _producer(self) -> Producer:
        return self._keeper

    def close(self) -> None:
        del self._keeper


class Broker(Cluster):
    """An Apache Kafka broker in a process of its own, with its log in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        port, controller = free_ports(2)
        self.servers = f"127.0.0.1:{port}"
        self._settings = folder / "server.properties"
        self._settings.write_text(
            f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder / "log"}
auto.create.topics.enable=false
log.retention.ms=-1
log.message.timestamp.after.max.ms={2**63 - 1}
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
"""
        )
        cluster_id = uuid.uuid4().hex[:22]
        storage = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(self._settings)]
        subprocess.run([*JAVA, *storage], check=True, capture_output=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        log = self._folder / "broker.txt"
        with log.open("ab") as output:
            command = [*WATCHED, *JAVA, "kafka.Kafka", str(self._settings)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        admin = AdminClient({**self.config, "log_level": 0})
        until = time.monotonic() + 90
        while True:
            try:
                admin.list_topics(timeout=2)
                return
            except KafkaException:
                if time.monotonic() > until:
                    self.kill()
                    raise RuntimeError(f"the broker does not answer:\n{log.read_text()[-4_000:]}") from None

    def kill(self) -> None:
        """End the broker as a loss of power would."""
        assert self._process is not None
        self._process.stdin.close()
        self._process.wait()

    close = kill

    def topic(self) -> str:
        name = super().topic()
        admin = AdminClient(self.config)
        admin.create_topics([NewTopic(name, N_PARTITIONS, 1)])[name].result(30)
        return name

    def transactional_producer(self) -> Producer:
        producer = Producer({**self.config, "transactional.id": uuid.uuid4().hex})
        producer.init_transactions(60)
        return producer

    def _producer(self) -> Producer:
        return Producer(self.config)


def _delivered(error, message) -> None:
    if error is not None:
        raise KafkaException(error)
