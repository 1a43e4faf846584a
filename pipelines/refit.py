"""Refit a mixture over all of history: batch EM, one pipeline for each iteration.

python -m pipelines.refit --config configs/shuttle.yaml --set output.folder=output/refit

Any of Beam's options can be added, such as --runner=FlinkRunner. `stream-em refit` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from stream_em.cli.beam_jobs import JobOptions, read_job, refit
from stream_em.cli.main import run_program


class RefitOptions(JobOptions, PipelineOptions):
    """Options of the refit."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        parser.add_argument(
            "--work_folder", help="folder of the iterations, which workers and this program can both reach"
        )


def run(argv: Sequence[str] | None = None) -> None:
    """Read the options, fit, and write the snapshot."""
    options, config = read_job(argv, RefitOptions)
    refit(config, Console(), options, work_folder=options.work_folder)


if __name__ == "__main__":
    run_program(run)
