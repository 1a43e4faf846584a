"""Follow a topic for ever and write each event down as it comes: a process for the tests to kill."""

import json
import sys

import apache_beam as beam

from stream_em.beam.kafka import ReadKafka


def with_place(message):
    return {**json.loads(message.value), "partition": message.partition, "offset": message.offset}


class WriteDown(beam.DoFn):
    def __init__(self, path):
        self.path = path

    def process(self, event):
        with open(self.path, "a") as file:  # noqa: PTH123 - one line, at once
            file.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    servers, topic, path = sys.argv[1:]
    with beam.Pipeline("FnApiRunner") as pipeline:
        read = pipeline | ReadKafka({"bootstrap.servers": servers}, topic, decode=with_place)
        _ = read.events | beam.ParDo(WriteDown(path))
