"""A model for each key: batch EM over the events of each device, customer or shop, in one pass."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.metrics import Metrics

from stream_em.beam.events import BLOCK_EVENTS, EventBlocks, RejectedEvent, _n_events
from stream_em.beam.expectation import NAMESPACE, REJECTED
from stream_em.beam.survey import _globally, check_categories, in_one_window, unapplied, untimed
from stream_em.blas import OneBlasThread
from stream_em.columns import Roles
from stream_em.learners import BatchEM
from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import Array
from stream_em.schema import Batch, Schema, SchemaError, in_memory
from stream_em.seeding import concatenate

# A worker holds this many events before it passes them on, and fits a key with no more than these in memory.
MOST_EVENTS = 262_144

KEYS = str | bytes | int | tuple  # type: ignore[type-arg]

_SHAPE = struct.Struct("<IQ?")


@dataclass(frozen=True, eq=False)
class KeyBlock:
    """Some of the events of a key, encoded.

    Parameters
    ----------
    values
        (D, B) as in `Batch`.
    weight
        (B,) sample weights, or None when all are 1.

    """

    values: Array
    weight: Array | None = None


class KeyBlockCoder(beam.coders.Coder):
    """Blocks of a key as their shape and their doubles: eight bytes a value and thirteen for the block.

    >>> coder = KeyBlockCoder()
    >>> coder.decode(coder.encode(KeyBlock(np.array([[1.0, np.nan]])))).values
    array([[ 1., nan]])

    """

    def encode(self, value: KeyBlock) -> bytes:  # noqa: D102 - Beam's
        weight = b"" if value.weight is None else value.weight.astype("<f8").tobytes()
        return (
            _SHAPE.pack(*value.values.shape, value.weight is not None) + value.values.astype("<f8").tobytes() + weight
        )

    def decode(self, encoded: bytes) -> KeyBlock:  # noqa: D102 - Beam's
        n_fields, n_events, weighted = _SHAPE.unpack_from(encoded)
        numbers = np.frombuffer(encoded, "<f8", offset=_SHAPE.size).astype(np.float64)
        values = numbers[: n_fields * n_events].reshape(n_fields, n_events)
        return KeyBlock(values, numbers[n_fields * n_events :] if weighted else None)

    def is_deterministic(self) -> bool:  # noqa: D102 - Beam's
        return True

    def estimate_size(self, value: KeyBlock) -> int:  # noqa: D102 - Beam's
        return int(_SHAPE.size + value.values.nbytes + (0 if value.weight is None else value.weight.nbytes))


beam.coders.registry.register_coder(KeyBlock, KeyBlockCoder)


class RefitPerKey(beam.PTransform):
    """Fit a model to the events of each key: (key, `BatchEM`) pairs, in one pass over the events.

    Parameters
    ----------
    model
        The mixture, the same for all keys.
    schema
        The fields of the events; categories outside it are counted as `other`. `infer_schema` finds it in a source,
        `infer_categories` the categories of declared fields.
    key
        Field that holds an event's key, which the model does not get, or a function of an event that is a dict. By
        default the elements are (key, event) pairs; the second of a pair may also be a table of events.
    roles
        Columns that are not the model's.
    max_iter, tol, n_init, initial_parameters, seed_events, seed
        As of `BatchEM`. Keys that start from the same `initial_parameters`, those of a model of all the events for
        instance, need no seeding, which takes most of the time, and their components correspond.
    rejected_to
        Transform that is applied to the `RejectedEvent` values: events that cannot be used, and keys with fewer
        events than components; they are counted in any case.

    Raises
    ------
    ValueError
        When a number is out of range, or no category of a category field is known.

    Notes
    -----
    Keys are strings, bytes, whole numbers, or tuples of these. Events are encoded where they are read, so that what
    is shuffled is eight bytes for each value, in one block for each key and bundle. The events of a key are put in an
    order of their own before it is fitted, so that its model does not depend on how they came; a key with more than
    262,144 events is fitted block by block, in the order in which they came.

    Beam's metrics hold, under "stream_em", the counters `events`, `rejected`, `ignored` (values of unknown fields)
    and `keys`.

    >>> from apache_beam.testing.util import assert_that, equal_to
    >>> from stream_em import Gaussian
    >>> events = [
    ...     {"shop": shop, "x": value + shift} for shop, shift in [("a", 0), ("b", 9)] for value in (0.0, 1.0, 5.0)
    ... ]
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     fits = RefitPerKey(Mixture(Gaussian(), 1), schema=Schema({"x": "numeric"}), key="shop")
    ...     models = pipeline | beam.Create(events) | fits
    ...     means = models | beam.MapTuple(lambda shop, fit: (shop, fit.parameters.components.mean.round(6).tolist()))
    ...     _ = assert_that(means, equal_to([("a", [[2.0]]), ("b", [[11.0]])]))

    """

    def __init__(
        self,
        model: Mixture,
        *,
        schema: Schema,
        key: str | Callable[[Mapping[str, Any]], Hashable] | None = None,
        roles: Roles | None = None,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        initial_parameters: MixtureParameters | None = None,
        seed_events: int = 10_000,
        seed: int = 0,
        rejected_to: beam.PTransform | None = None,
    ) -> None:
        super().__init__()
        check_categories(schema)
        self.model = model
        self.schema = schema
        self.key = key
        known = untimed(roles) or Roles()
        self.roles = replace(known, exclude=(*known.exclude, key)) if isinstance(key, str) else known
        self.rejected_to = rejected_to
        self.options: dict[str, Any] = {
            "max_iter": max_iter,
            "tol": tol,
            "n_init": n_init,
            "initial_parameters": initial_parameters,
            "seed_events": seed_events,
            "seed": seed,
        }
        # The learner knows what its options may be.
        BatchEM(model, schema=schema, **self.options)

    def expand(self, events: beam.PCollection) -> beam.PCollection:  # noqa: D102 - Beam's
        blocks = in_one_window(events) | "Encode" >> beam.ParDo(
            _EncodePerKey(self.model, self.schema, self.key, self.roles)
        ).with_outputs(REJECTED, main="blocks")
        fits = (
            blocks.blocks
            | "Typed blocks" >> _typed(tuple[Any, KeyBlock])
            | "Group" >> beam.GroupByKey()
            | "Fit" >> beam.ParDo(_FitKey(self.model, self.schema, self.options)).with_outputs(REJECTED, main="models")
        )
        if self.rejected_to is not None:
            rejected = (blocks[REJECTED], fits[REJECTED]) | "All rejected" >> beam.Flatten()
            _ = rejected | "Rejected" >> unapplied(self.rejected_to)
        return fits.models | "Typed models" >> _typed(tuple[Any, BatchEM])


def _typed(pair: Any) -> beam.PTransform:
    """Name the type of the pairs, by which their coder is found; a DoFn with tagged outputs cannot."""
    return beam.Map(lambda one: one).with_output_types(pair)


class _EncodePerKey(beam.DoFn):
    """Events in, (key, `KeyBlock`) pairs out: one for each key of a bundle."""

    def __init__(
        self,
        model: Mixture,
        schema: Schema,
        key: str | Callable[[Mapping[str, Any]], Hashable] | None,
        roles: Roles,
    ) -> None:
        self.model, self.schema, self.key, self.roles = model, schema, key, roles
        self._rejected = Metrics.counter(NAMESPACE, "rejected")
        self._ignored = Metrics.counter(NAMESPACE, "ignored")

    def start_bundle(self) -> None:
        self._blocks = EventBlocks(self.schema, self.roles, self.model)
        self._waiting: list[tuple[Any, Mapping[str, Any]]] = []
        self._parts: dict[Any, list[Batch]] = defaultdict(list)
        self._held = 0

    def process(self, element: Any) -> Iterator[Any]:
        if self.key is None and not (isinstance(element, tuple) and len(element) == 2):
            yield self._reject(RejectedEvent(None, f"got {element!r:.120}, expected a (key, event) pair"))
            return
        keys, events = (element[0], element[1]) if self.key is None else (None, element)
        try:
            events = in_memory(events)
        except SchemaError as error:
            yield self._reject(RejectedEvent(None, str(error)))
            return
        if isinstance(events, Mapping):
            self._waiting.append((keys if self.key is None else self._key_of(events), events))
            if len(self._waiting) >= BLOCK_EVENTS:
                yield from self._encode_waiting()
        elif self.key is None:
            yield from self._encode([keys] * _n_events(events), events)
        elif isinstance(events, pa.Table) and events.schema.names.count(self.key) > 1:
            reason = f"the frame has more than one column {self.key!r}, which holds the keys"
            yield self._reject(RejectedEvent(None, reason, len(events)))
        elif isinstance(events, pa.Table) and isinstance(self.key, str):
            held = self.key in events.schema.names
            keys = events.column(self.key).to_pylist() if held else [None] * len(events)
            yield from self._encode(keys, events)
        elif isinstance(events, Sequence) and not isinstance(events, str | bytes):
            yield from self._encode([self._key_of(event) for event in events], list(events))
        else:
            kind = type(element).__name__
            yield self._reject(
                RejectedEvent(None, f"got events of type {kind}, which hold no key; pass dicts or pairs")
            )
        if self._held >= MOST_EVENTS:
            yield from self._take()

    def _key_of(self, event: Any) -> Any:
        if not isinstance(event, Mapping) or self.key is None:
            return None
        if isinstance(self.key, str):
            return event.get(self.key)
        try:
            return self.key(event)
        except Exception as error:
            # Whatever the user's function raises, it is one event that has no key.
            return _NoKey(f"the key function raised {type(error).__name__}: {error}")

    def _encode_waiting(self) -> Iterator[Any]:
        waiting, self._waiting = self._waiting, []
        if waiting:
            keys, events = zip(*waiting)
            yield from self._encode(list(keys), list(events))

    def _encode(self, keys: list[Any], events: Any) -> Iterator[Any]:
        """Encode events and deal them out to their keys; yield what cannot be used."""
        keys = [key.item() if isinstance(key, np.generic) else key for key in keys]
        wrong = [position for position, key in enumerate(keys) if not _is_key(key)]
        if wrong:
            for position in wrong:
                event = _event_at(events, position)
                yield self._reject(RejectedEvent(event, _why_no_key(keys[position], self.key)))
            keep = np.setdiff1d(np.arange(len(keys)), wrong)
            keys, events = [keys[position] for position in keep], _events_at(events, keep)
        for batch in self._blocks.add(events) if keys else ():
            self._deal(keys, batch)
        for rejected in self._blocks.take_rejected():
            yield self._reject(rejected)

    def _deal(self, keys: list[Any], batch: Batch) -> None:
        positions: dict[Any, list[int]] = defaultdict(list)
        accepted = range(batch.n_events) if batch.accepted is None else batch.accepted.tolist()
        for position, given in enumerate(accepted):
            positions[keys[given]].append(position)
        for key, those in positions.items():
            whole = len(those) == batch.n_events
            self._parts[key].append(batch if whole else batch.select(np.array(those, dtype=np.intp)))
        self._held += batch.n_events

    def _reject(self, rejected: RejectedEvent) -> Any:
        self._rejected.inc(rejected.n_events)
        return beam.pvalue.TaggedOutput(REJECTED, rejected)

    def _take(self) -> Iterator[tuple[Any, KeyBlock]]:
        parts, self._parts = self._parts, defaultdict(list)
        self._held = 0
        for key, of_key in parts.items():
            block = concatenate(of_key)
            yield key, KeyBlock(block.values, block.weight)

    def finish_bundle(self) -> Iterator[Any]:
        for output in self._encode_waiting():
            yield beam.pvalue.TaggedOutput(REJECTED, _globally(output.value))
        for pair in self._take():
            yield _globally(pair)
        self._ignored.inc(sum(self._blocks.ignored_fields.values()))


@dataclass(frozen=True)
class _NoKey:
    """Stands for a key that could not be told."""

    reason: str


def _why_no_key(key: Any, column: Any) -> str:
    if isinstance(key, _NoKey):
        return key.reason
    place = f"key, column {column!r}" if isinstance(column, str) else "key"
    return f"{place}: got {key!r}, expected a string, bytes, a whole number or a tuple of these"


def _is_key(key: Any) -> bool:
    # Truth values would be taken for the numbers 0 and 1.
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return isinstance(key, KEYS) and not isinstance(key, bool)


def _event_at(events: Any, position: int) -> Any:
    if isinstance(events, pa.Table):
        return events.slice(position, 1).to_pylist()[0]
    event = events[position] if isinstance(events, list) else None
    return event if isinstance(event, Mapping) else None


def _events_at(events: Any, keep: np.ndarray[Any, Any]) -> Any:
    if isinstance(events, pa.Table):
        return events.take(pa.array(keep))
    if isinstance(events, Batch):
        return events.select(keep)
    return [events[position] for position in keep] if isinstance(events, list) else events[keep]


class _FitKey(beam.DoFn):
    """Batch EM on the blocks of a key."""

    def __init__(self, model: Mixture, schema: Schema, options: dict[str, Any]) -> None:
        self.model, self.schema, self.options = model, schema, options
        self._events = Metrics.counter(NAMESPACE, "events")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")
        self._keys = Metrics.counter(NAMESPACE, "keys")

    def process(self, element: tuple[Any, Iterable[KeyBlock]]) -> Iterator[Any]:
        key, blocks = element
        n_events = n_told = 0
        for block in blocks:
            n_events += block.values.shape[1]
            n_told += block.values.shape[1] if block.weight is None else int(np.count_nonzero(block.weight))
        if n_told < self.model.n_components:
            self._rejected.inc(n_events)
            reason = f"key {key!r} has {n_told} events with weight, fewer than the {self.model.n_components} components"
            yield beam.pvalue.TaggedOutput(REJECTED, RejectedEvent({"key": key}, reason, n_events))
            return
        self._events.inc(n_events)
        self._keys.inc()

        def batches() -> Iterator[Batch]:
            return (Batch(block.values, self.schema, block.weight) for block in blocks)

        learner = BatchEM(self.model, schema=self.schema, **self.options)
        # Workers share the cores.
        with OneBlasThread():
            learner.fit(_in_order(concatenate(list(batches()))) if n_events <= MOST_EVENTS else batches)
        yield key, learner


def _in_order(batch: Batch) -> Batch:
    """Return the events sorted by their values: an order that does not depend on how they came."""
    rows = batch.values if batch.weight is None else np.vstack([batch.values, batch.weight])
    return batch.select(np.lexsort(rows))
