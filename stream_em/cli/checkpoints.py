"""A run's place in its snapshot: what another start of the same job goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stream_em import SnapshotError
from stream_em.cli.common import DataError
from stream_em.cli.config import Config
from stream_em.cli.display import counted
from stream_em.cli.outputs import Committed
from stream_em.sources import Position
from stream_em.store import read_metadata

_KEY = "checkpoint_of_run"
_FORMAT = 1
# What a job may change from one start to the next, since no event and no number depends on it.
_FREE = (("output", "folder"), ("output", "picture"))


@dataclass(frozen=True)
class Checkpoint:
    """A run between two events of its source; the learner itself is in the same snapshot.

    Attributes
    ----------
    settings
        The configuration.
    finished
        Whether the source was read to its end, so that nothing is left to be gone on with.
    position
        Where the source goes on.
    n_events, n_warm_up
        Events learned, and those of them that came before there was a mixture.
    history, ranking
        For the report at the end.
    quarantine, sinks
        Where the outputs go on; those of scored events by their kind.

    """

    settings: dict[str, Any]
    finished: bool
    position: Position
    n_events: int
    n_warm_up: int
    history: dict[str, Any]
    ranking: dict[str, Any]
    quarantine: Committed
    sinks: dict[str, Committed]
    format: int = _FORMAT

    def metadata(self) -> dict[str, Any]:
        """Return it as a snapshot's metadata."""
        return {_KEY: asdict(self)}


def settings_of(config: Config) -> dict[str, Any]:
    """Return everything in a configuration that a run's numbers and outputs depend on."""
    settings = config.model_dump(mode="json", by_alias=True)
    for section, key in _FREE:
        del settings[section][key]
    return settings


def unfinished_run(path: Path) -> Checkpoint | None:
    """Return the checkpoint in a snapshot, if there is one and the run is not finished.

    Raises
    ------
    DataError
        When there is a file that cannot be read: nobody knows what would be lost by writing over it.

    """
    if not path.is_file():
        return None
    try:
        stated = read_metadata(path).get(_KEY)
    except SnapshotError as error:
        raise DataError(
            f"{error}; it would be overwritten: give output.snapshot another name, or remove the file"
        ) from error
    if stated is None or stated["finished"]:
        return None
    if stated["format"] != _FORMAT:
        raise DataError(
            f"{path}: holds an unfinished run of another version of this library (its checkpoint has format "
            f"{stated['format']}, this one reads {_FORMAT}); finish it with that version, or start anew with --fresh"
        )
    return Checkpoint(**stated)


def forget_unfinished_run(path: Path) -> None:
    """Remove a snapshot that holds an unfinished run or cannot be read: the files that it speaks of are about to go."""
    try:
        forgotten = unfinished_run(path) is not None
    except DataError:
        forgotten = True
    if forgotten:
        path.unlink()


def check_same_job(checkpoint: Checkpoint, config: Config, path: Path) -> None:
    """Check that a configuration is that of the unfinished run.

    Raises
    ------
    DataError
        When it is not; the message names the keys that differ.

    """
    changes = list(_changes(checkpoint.settings, settings_of(config)))
    if changes:
        shown = "; ".join(f"{key} was {then!r} and is {now!r}" for key, then, now in changes[:5])
        raise DataError(
            f"{path}: holds a run that is not finished, of a job with other settings: {shown}. Finish it with its own, "
            "give this job another output.folder, or start it anew with --fresh, which gives up what the other has done"
        )


def refuse_unfinished_run(config: Config) -> None:
    """Raise if the output folder holds an unfinished run, whose files another job would overwrite.

    Raises
    ------
    DataError
        When it does.

    """
    if config.output.snapshot is None:
        return
    path = Path(config.output.folder, config.output.snapshot)
    checkpoint = unfinished_run(path)
    if checkpoint is not None:
        raise DataError(
            f"{path}: holds a run that is not finished, after {counted(checkpoint.position['index'], 'event')}; finish "
            "it, or give this job another output.folder"
        )


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    # A key that a later version has added stands for what was done before.
    for key, old in then.items():
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
