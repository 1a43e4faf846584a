r"""Learn from events as they come: one model for each key, or one model of all that several shards share.

python -m pipelines.cluster_events --config configs/shuttle.yaml --initial output/refit/model.arrow \
    --shards 2 --set output.folder=output/online

Reads files, or with --kafka a topic; --key names the column whose every value gets a model. Leaves scored and rejected
events as JSON Lines, and the snapshots of each model, `<output.folder>/models/<key>/<time>.arrow`, the last one as
`last.arrow`. Any of Beam's options can be added, such as --runner=FlinkRunner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from stream_em import Schema, load
from stream_em.beam.expectation import REJECTED
from stream_em.beam.kafka import ReadKafka
from stream_em.beam.online import GlobalUpdate, OnlineUpdate, ScoredEvent
from stream_em.beam.writing import WriteJsonLines, WriteRejected, WriteSnapshots
from stream_em.cli.beam_jobs import (
    AsEvents,
    KeyedOptions,
    apart,
    check_names,
    keeping_key,
    known_schema,
    make_read,
    make_roles,
    options_refused,
    read_job,
    remove_outputs,
    report,
    stem,
)
from stream_em.cli.build import make_model
from stream_em.cli.config import Config, ConfigError
from stream_em.cli.main import run_program
from stream_em.columns import Roles
from stream_em.store import Learner

SNAPSHOT_EVERY = 3600.0


class ClusterOptions(KeyedOptions, PipelineOptions):
    """Options of the online models."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        parser.add_argument("--shards", type=int, default=4, help="without a key: learners that share the events")
        parser.add_argument(
            "--snapshot_every",
            type=float,
            help=f"of a topic: seconds of event time between snapshots of a model ({SNAPSHOT_EVERY:g})",
        )
        parser.add_argument("--kafka", metavar="SERVERS", help="read from Kafka: its bootstrap servers")
        parser.add_argument("--topic", action="append", default=[], help="topic to read; can be repeated")


def run(argv: Sequence[str] | None = None) -> None:
    """Read the options, learn from the events, write what comes out."""
    options, config = read_job(argv, ClusterOptions)
    if options.key is not None:
        config = keeping_key(config, options.key)
    output, learner = config.output, config.learner
    roles = make_roles(config)
    if learner.structure is not None:
        raise ConfigError(
            "learner.structure: is for `stream-em run`; in a pipeline each key keeps its model.n_components: leave out "
            "the structure"
        )
    if options.kafka is not None and not options.topic:
        raise ConfigError("--topic NAME is needed with --kafka: the topic to read; it can be repeated")
    if options.kafka is None and options.snapshot_every is not None:
        raise ConfigError(
            "--snapshot_every: is for --kafka; files are read to their end before event time moves on, so that there "
            "is one snapshot of each model, last.arrow"
        )
    initial = None if options.initial is None else load(options.initial)
    schema = known_schema(config, roles, options) if options.key is not None and initial is None else None
    with options_refused():
        update = _update(options, config, roles, initial, schema)
    names = stem(output.scored_events, "scored"), stem(output.quarantine)
    check_names(scored_events=names[0], quarantine=names[1])
    remove_outputs(output.folder, *(f"{name}-*.jsonl" for name in names))
    with beam.Pipeline(options=options) as pipeline:
        if options.kafka is not None:
            read = ReadKafka({"bootstrap.servers": options.kafka}, options.topic, time=config.source.time)
        else:
            read = make_read(config, keep=apart(config))
        events, unreadable = pipeline | "Read" >> read
        keyed, unkeyed = events | beam.ParDo(AsEvents(options.key, config.source.time)).with_outputs(
            REJECTED, main="events"
        )
        if options.key is not None:
            # Tagged outputs have no types, and Beam wants to know how to encode keys.
            keyed |= "Typed" >> beam.Map(lambda pair: pair).with_output_types(tuple[str, Any])
        outputs = keyed | update
        _ = (
            outputs.scored
            | "Rows" >> beam.Map(_row, options.key, output.prefix)
            | "Scored" >> WriteJsonLines(output.folder, names[0])
        )
        _ = outputs.snapshots | beam.ParDo(WriteSnapshots(FileSystems.join(output.folder, "models")))
        rejected = (unreadable, unkeyed, outputs.rejected) | beam.Flatten()
        _ = rejected | "Rejected" >> WriteRejected(output.folder, names[1])
    report(pipeline, output.folder, names[1])


def _update(
    options: ClusterOptions, config: Config, roles: Roles, initial: Learner | None, schema: Schema | None
) -> OnlineUpdate | GlobalUpdate:
    """Models by key, or one model that shards share."""
    learner = config.learner
    every = None
    if options.kafka is not None:
        every = SNAPSHOT_EVERY if options.snapshot_every is None else options.snapshot_every
    if options.key is not None:
        return OnlineUpdate(
            None if schema is None else make_model(config.model, schema),
            schema=schema,
            initial=initial,
            schedule=learner.schedule.make(),
            batch_size=learner.batch_size,
            warm_up=learner.warm_up,
            roles=roles,
            averaging=learner.averaging,
            snapshot_every=every,
            seed=learner.seed,
        )
    if initial is not None:
        return GlobalUpdate(
            initial,
            shards=options.shards,
            batch_size=learner.batch_size,
            roles=roles,
            merge_every=every,
        )
    raise ConfigError(
        "name the column of the key with --key, or, for one model of all events, the snapshot it starts from with "
        "--initial: shards of a model must start from the same components"
    )


def _row(scored: ScoredEvent, key: str | None, prefix: str) -> dict[str, Any]:
    of_key = {} if key is None else {key: scored.key}
    return {**of_key, **scored.event, f"{prefix}component": scored.component, f"{prefix}log_prob": scored.log_prob}


if __name__ == "__main__":
    run_program(run)
