r"""Score the events of files with a snapshot: component, log-density and responsibilities of each event.

python -m pipelines.score --config configs/shuttle.yaml --snapshot output/refit/model.arrow \
    --set output.folder=output/score

Leaves Parquet files with the columns of the events and those of the scores, and rejected events as JSON Lines. Any of
Beam's options can be added, such as --runner=FlinkRunner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from stream_em.beam.expectation import REJECTED
from stream_em.beam.serving import MixtureModelHandler, SplitRejected
from stream_em.beam.storage import read_file
from stream_em.beam.writing import WriteRejected, WriteTables, scored_table
from stream_em.cli.beam_jobs import (
    JobOptions,
    apart,
    check_names,
    make_read,
    make_roles,
    read_job,
    remove_outputs,
    report,
    stem,
)
from stream_em.cli.common import scoring
from stream_em.cli.config import ConfigError
from stream_em.cli.main import run_program
from stream_em.store import from_bytes


class ScoreOptions(JobOptions, PipelineOptions):
    """Options of the scoring."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        parser.add_argument("--snapshot", metavar="FILE", help="snapshot of the model (.arrow)")


def run(argv: Sequence[str] | None = None) -> None:
    """Read the options, score the events, and write them."""
    options, config = read_job(argv, ScoreOptions)
    output, snapshot = config.output, options.snapshot
    if snapshot is None:
        raise ConfigError("--snapshot FILE is needed: the model that scores the events")
    # To learn in each worker that it is no snapshot would be too late.
    schema = from_bytes(read_file(snapshot), source=snapshot).schema
    if schema is not None:
        config = scoring(config, schema, snapshot)
    # What the events have beside the fields of the model is carried into what is written.
    roles = replace(make_roles(config), only=None if schema is None else schema.names)
    handler = MixtureModelHandler(snapshot, roles=roles)
    as_table = partial(scored_table, prefix=output.prefix, responsibilities=output.responsibilities)
    names = stem(output.scored_events, "scored"), stem(output.quarantine)
    check_names(scored_events=names[0], quarantine=names[1])
    remove_outputs(output.folder, f"{names[0]}-*.parquet", f"{names[1]}-*.jsonl")
    with beam.Pipeline(options=options) as pipeline:
        events, unreadable = pipeline | make_read(config, keep=apart(config))
        scored, unusable = (
            events | RunInference(handler) | beam.ParDo(SplitRejected()).with_outputs(REJECTED, main="scored")
        )
        _ = scored | "Tables" >> beam.Map(as_table) | WriteTables(output.folder, names[0])
        rejected = (unreadable, unusable) | beam.Flatten()
        _ = rejected | WriteRejected(output.folder, names[1])
    report(pipeline, output.folder, names[1])


if __name__ == "__main__":
    run_program(run)
