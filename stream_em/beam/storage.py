"""Files on any file system that Beam knows, and what a pipeline hands over to the program that ran it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

PENDING = "pending"


def write_file(path: str, content: bytes) -> None:
    """Write a file, all or nothing: to a temporary name in the same folder, which is then changed.

    >>> with TemporaryDirectory() as folder:
    ...     write_file(f"{folder}/new/a.txt", b"abc")
    ...     read_file(f"{folder}/new/a.txt")
    b'abc'

    """
    folder, name = FileSystems.split(path)
    temporary = FileSystems.join(folder, f".{name}-{secrets.token_hex(8)}.{PENDING}")
    with FileSystems.create(temporary) as file:
        file.write(content)
    FileSystems.rename([temporary], [path])


def read_file(path: str) -> bytes:
    """Return the content of a file."""
    with FileSystems.open(path) as file:
        content: bytes = file.read()
    return content


def at_home(path: str) -> str:
    """Return a path with the home folder for a leading `~`; names of remote files are left as they are.

    >>> at_home("gs://bucket/~/"), at_home("~/events/").endswith("/events/")
    ('gs://bucket/~/', True)

    """
    # Not by `Path`, which drops the slash at the end and one of those after a scheme.
    return os.path.expanduser(path)  # noqa: PTH111


def has_pattern(name: str) -> bool:
    """Whether a name has a character that file patterns give a meaning to."""
    return any(character in name for character in "*?[")


@contextmanager
def working_folder(folder: str | None) -> Iterator[str]:
    """A folder for the files of a run: the one that is named, or else a temporary one.

    Raises
    ------
    ValueError
        When its name has a character that file patterns give a meaning to.

    """
    if folder is None:
        with TemporaryDirectory(prefix="stream_em-") as temporary:
            yield temporary
        return
    folder = at_home(str(folder))
    if has_pattern(folder):
        raise ValueError(f"the folder {folder!r} must not hold *, ? or [, which file patterns give a meaning to")
    _discard(FileSystems.join(folder, PENDING, "*"))
    yield folder


def hand_over(
    build: Callable[[beam.Pipeline], Iterable[beam.PCollection]],
    names: Iterable[str],
    folder: str,
    *,
    options: PipelineOptions | None = None,
    runner: Any = None,
) -> dict[str, bytes]:
    """Run a pipeline and return what its workers found, handed over through files.

    Parameters
    ----------
    build
        Makes the pipeline; returns PCollections of (name, bytes) pairs, each name once.
    names
        The names that may come.
    folder
        Where the workers and this program can both read and write.
    options, runner
        Beam's.

    Returns
    -------
    dict
        Bytes by name, of the names that came.

    Raises
    ------
    RuntimeError
        When the pipeline was not done in the end, or nothing that it wrote can be found.

    >>> def build(pipeline):
    ...     return [pipeline | beam.Create([("a", b"1")])]
    >>> with TemporaryDirectory() as folder:
    ...     hand_over(build, ["a", "b"], folder, runner="FnApiRunner")
    {'a': b'1'}

    """
    prefix = FileSystems.join(folder, PENDING, secrets.token_hex(8))
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        found = tuple(build(pipeline))
        _ = found | "Flatten" >> beam.Flatten() | "Hand over" >> beam.ParDo(_Write(prefix))
    if pipeline.result.state != PipelineState.DONE:
        raise RuntimeError(f"the pipeline ended {pipeline.result.state}, not {PipelineState.DONE}")
    paths = {name: f"{prefix}-{name}" for name in names}
    contents = {name: read_file(path) for name, path in paths.items() if FileSystems.exists(path)}
    if not contents:
        raise RuntimeError(
            f"the pipeline is done, but nothing that it wrote is in {folder!r}: name a folder that the workers and "
            "this program can both reach"
        )
    _discard(f"{prefix}-*")
    return contents


def _discard(pattern: str) -> None:
    (matched,) = FileSystems.match([pattern])
    paths = [file.path for file in matched.metadata_list]
    if paths:
        FileSystems.delete(paths)


class _Write(beam.DoFn):
    """Write each (name, bytes) pair to a file; a bundle that is tried again replaces it by the same."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def process(self, pair: tuple[str, bytes]) -> None:
        name, content = pair
        write_file(f"{self.prefix}-{name}", content)
