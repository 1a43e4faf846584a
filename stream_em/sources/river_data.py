"""The data sets of River as pieces of a stream of events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from stream_em.columns import Roles
from stream_em.sources.faults import SourceError, guarded, nearest
from stream_em.sources.pieces import Piece, Position, Read, gathered, grouped


def river_dataset_names() -> list[str]:
    """Names that `open_source(river=...)` knows, sorted.

    >>> "Shuttle" in river_dataset_names()
    True

    """
    datasets = _river_module()
    return sorted(name for name in datasets.__all__ if isinstance(getattr(datasets, name), type) and name != "base")


class RiverDataset:
    """A data set of River that needs no arguments, its target a field like the others."""

    columnar = False
    restartable = True
    live = False
    least_events = 0
    paths: Sequence[str] = ()

    def __init__(self, dataset: str, label: str) -> None:
        self.name = f"river:{dataset}"
        self.label = label
        names = river_dataset_names()
        if dataset not in names:
            raise SourceError(f"River has no data set {dataset!r}{nearest(dataset, names)}")
        try:
            self.dataset = getattr(_river_module(), dataset)()
        except TypeError as error:
            raise SourceError(f"{self.name}: needs arguments and cannot be opened by name ({error})") from error

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:  # noqa: D102 - as Reader's
        start = after.get("index", 0)
        for group in grouped(self._events(start), rows, start):
            yield gathered(self.name, group, {})

    def _events(self, start: int) -> Iterator[Read]:
        events = guarded(islice(self.dataset, start, None), self.name)
        for index, (event, target) in enumerate(events, start):
            if not isinstance(event, dict):
                raise SourceError(
                    f"{self.name}: its events are {type(event).__name__} and not named fields, so no mixture "
                    "model can be fitted to them"
                )
            if self.label in event:
                raise SourceError(f"{self.name}: has a field {self.label!r} already; give the label another name")
            yield Read(index, None, {**event, self.label: target})


def _river_module() -> Any:
    try:
        from river import datasets
    except ModuleNotFoundError as error:
        raise SourceError("River data sets need the river package: pip install 'stream-em[river]'") from error
    return datasets
