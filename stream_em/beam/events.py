"""Events of a PCollection, in any accepted form, gathered into encoded blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from stream_em.columns import Roles, arrow_floats, arrow_seconds, floats_of, seconds_of
from stream_em.models import Mixture
from stream_em.numerics import Array
from stream_em.schema import Batch, FieldCounts, Schema, SchemaError, in_memory

# Single events are gathered into blocks of this many before they are encoded.
BLOCK_EVENTS = 4_096


class _RejectedEvent(NamedTuple):
    event: Mapping[str, Any] | None
    reason: str
    n_events: int = 1


class RejectedEvent(_RejectedEvent):
    """An event that cannot be used, and why: what goes to the dead-letter output.

    Parameters
    ----------
    event
        The event, or None where a whole table cannot be used.
    reason
        What was wrong, where, and what would have been accepted. The position of an event is that in its table, or in
        the block that single events were gathered into: where a runner cuts those is its own affair.
    n_events
        Number of events left out by it: 1, or the rows of a table.

    """

    __slots__ = ()

    def __new__(cls, event: Mapping[str, Any] | None, reason: str, n_events: int = 1) -> Self:  # noqa: D102
        return super().__new__(cls, _encodable(event), _encodable(reason), n_events)


def _encodable(value: Any) -> Any:
    """Return the same value without halves of characters, which no coder of Beam takes: escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value


class EventBlocks:
    """Gathers events into encoded blocks of one schema; what cannot be used is set aside with the reason.

    Parameters
    ----------
    schema
        The fields; it does not grow.
    roles
        Columns that are not the model's.
    model
        The mixture, which may have no density for events that lack some value.
    size
        Single events in a block.

    Attributes
    ----------
    rejected
        Events set aside since they were last taken.
    ignored_fields
        Names of unknown fields that were ignored, with the number of events that held them.

    >>> blocks = EventBlocks(Schema({"x": "numeric"}))
    >>> list(blocks.add({"x": 1.0})), [block.n_events for block in blocks.flush()]
    ([], [1])

    """

    def __init__(
        self,
        schema: Schema,
        roles: Roles | None = None,
        model: Mixture | None = None,
        *,
        size: int = BLOCK_EVENTS,
    ) -> None:
        self.schema = schema
        self.roles = Roles() if roles is None else roles
        self.size = size
        self._bound = None if model is None else model.bind(schema)
        self.rejected: list[RejectedEvent] = []
        self.ignored_fields = FieldCounts()
        self._waiting: list[Mapping[str, Any]] = []

    def add(self, element: Any) -> Iterator[Batch]:
        """Take an element of the PCollection; yield the blocks that are full now.

        Parameters
        ----------
        element
            A dict (one event), a list of dicts, an array (n, D), an Arrow table or record batch, any frame with
            `__arrow_c_stream__`, or an encoded `Batch`.

        """
        if isinstance(element, Mapping):
            self._waiting.append(element)
            if len(self._waiting) >= self.size:
                yield from self.flush()
        else:
            yield from self._encoded(element)

    def flush(self) -> Iterator[Batch]:
        """Yield what is left of the single events as a block."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            yield from self._encoded(waiting)

    def take_rejected(self) -> list[RejectedEvent]:
        """Return the events set aside since the last call."""
        rejected, self.rejected = self.rejected, []
        return rejected

    def _encoded(self, element: Any) -> Iterator[Batch]:
        events = element
        try:
            events = in_memory(element)
            batch = self.schema.encode(*self._set_apart(events), on_error="collect")
            if self._bound is not None:
                batch = self._bound.screen(batch)
        except SchemaError as error:
            self.rejected.append(RejectedEvent(None, str(error), _n_events(events)))
            return
        self.ignored_fields.update(batch.ignored_fields)
        self.rejected.extend(RejectedEvent(_event(events, error.index), str(error)) for error in batch.rejected)
        if batch.n_events:
            yield batch

    def _set_apart(self, events: Any) -> tuple[Any, Array | None, Array | None]:
        """Return the events with nothing but what is the model's, their weights and their times."""
        roles = self.roles
        if roles == Roles() or not isinstance(events, pa.Table | Sequence) or isinstance(events, str | bytes):
            return events, None, None
        if isinstance(events, pa.Table):
            return (
                events.select(roles.model_fields(events.schema.names)),
                None if roles.weight is None else arrow_floats(events, roles.weight),
                None if roles.time is None else arrow_seconds(events, roles.time),
            )
        # What is no event at all is for the schema to refuse.
        known = [event if isinstance(event, Mapping) else {} for event in events]
        return (
            [{name: event[name] for name in roles.model_fields(event)} for event in known],
            None if roles.weight is None else floats_of([event.get(roles.weight) for event in known]),
            None if roles.time is None else seconds_of([event.get(roles.time) for event in known]),
        )


def _n_events(events: Any) -> int:
    if isinstance(events, Batch):
        return events.n_events
    if isinstance(events, np.ndarray) and not events.ndim:
        return 1
    return 1 if isinstance(events, str | bytes) or not isinstance(events, Sized) else len(events)


def _event(events: Any, index: int) -> Mapping[str, Any]:
    if isinstance(events, np.ndarray):
        return {f"x{column}": value for column, value in enumerate(events[index].tolist())}
    event: Mapping[str, Any] = events.slice(index, 1).to_pylist()[0] if isinstance(events, pa.Table) else events[index]
    return event
