r"""Fit a model to the events of each key, of all keys in one pass.

python -m pipelines.refit_per_key --config configs/segments.yaml --key category

Leaves a snapshot for each key, `<output.folder>/models/<key>/last.arrow`, and as JSON Lines the events that could not
be read, those that could not be used, and the keys with fewer events than components. Any of Beam's options can be
added, such as --runner=FlinkRunner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from stream_em import load
from stream_em.beam.per_key import RefitPerKey
from stream_em.beam.survey import infer_categories
from stream_em.beam.writing import WriteRejected, WriteSnapshots
from stream_em.cli.beam_jobs import (
    KeyedOptions,
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
from stream_em.cli.config import ConfigError
from stream_em.cli.main import run_program


class _WriteAllRejected(WriteRejected):
    """Write what could not be used, and what could not even be read: two sinks would remove each other's files."""

    unreadable: beam.PCollection

    def expand(self, rejected: beam.PCollection) -> Any:
        return super().expand((rejected, self.unreadable) | "With unreadable ones" >> beam.Flatten())


def run(argv: Sequence[str] | None = None) -> None:
    """Read the options, fit the models, and write their snapshots."""
    options, config = read_job(argv, KeyedOptions)
    if options.key is None:
        raise ConfigError("--key COLUMN is needed: the column whose every value gets a model of its own")
    config = keeping_key(config, options.key)
    roles, output, section = make_roles(config), config.output, config.learner
    name = stem(output.quarantine)
    start = None if options.initial is None else load(options.initial)
    schema = None if start is None else start.schema
    if schema is None:
        schema = infer_categories(known_schema(config, roles, options), make_read(config), roles=roles, options=options)
    rejected = _WriteAllRejected(output.folder, name)
    with options_refused():
        refit = RefitPerKey(
            make_model(config.model, schema) if start is None else start.model,
            schema=schema,
            key=options.key,
            roles=roles,
            max_iter=section.max_iter,
            tol=section.tol,
            n_init=section.n_init,
            initial_parameters=None if start is None else start.parameters,
            seed=section.seed,
            rejected_to=rejected,
        )
    remove_outputs(output.folder, f"{name}-*.jsonl", "models/*/last.arrow")
    with beam.Pipeline(options=options) as pipeline:
        events, rejected.unreadable = pipeline | make_read(config, keep=[options.key])
        last = beam.MapTuple(lambda key, learner: (str(key), float("inf"), learner))
        write = beam.ParDo(WriteSnapshots(FileSystems.join(output.folder, "models")))
        _ = events | refit | "Last" >> last | "Snapshots" >> write
    report(pipeline, output.folder, name)


if __name__ == "__main__":
    run_program(run)
