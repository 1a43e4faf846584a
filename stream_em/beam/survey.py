"""A first look at the events: their fields, how many there are, and a sample from which EM is seeded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from stream_em.arrays import from_rows, to_rows
from stream_em.beam.events import EventBlocks, RejectedEvent, _n_events
from stream_em.beam.expectation import COUNTS, NAMESPACE, REJECTED, EventCounts
from stream_em.beam.reading import ReadEvents
from stream_em.beam.storage import hand_over, working_folder
from stream_em.columns import Roles
from stream_em.learners import NotFittedError
from stream_em.models import Mixture
from stream_em.schema import (
    Batch,
    EventError,
    Field,
    Schema,
    SchemaError,
    _as_dicts,
    _as_matrix,
    _is_missing,
    _kind_of_column,
    _kind_of_value,
    in_memory,
)
from stream_em.seeding import Reservoir

Source = Any
"""What yields the events: a transform of the root of a pipeline, or the pattern of files for `ReadEvents`."""

# A text field with more values than this is an id or free text, and counting them would fill the memory.
MOST_LABELS = 100_000


def read_from(pipeline: beam.Pipeline, source: Source, roles: Roles | None) -> tuple[beam.PCollection, ...]:
    """Return the events of a source, all in one window, and those that its reading rejected, if it tells.

    Raises
    ------
    ValueError
        When the source has no end.

    """
    transform = ReadEvents(source, roles=roles) if isinstance(source, str) else unapplied(source)
    read = pipeline | "Read" >> transform
    events, *rejected = (read.events, read[REJECTED]) if isinstance(read, beam.pvalue.DoOutputsTuple) else (read,)
    return (in_one_window(events), *rejected)


def with_all_fields(events: beam.PCollection, schema: Schema) -> beam.PCollection:
    """Return the events with missing values in the columns that a frame lacks, as dicts may lack fields.

    This is for a schema that was inferred: its fields are those of all frames together, which need not be alike.
    """
    return events | "With all fields" >> beam.Map(_with_all_fields, schema)


_ARROW_TYPES = {"numeric": pa.float64(), "flag": pa.bool_(), "category": pa.string()}


def _with_all_fields(element: Any, schema: Schema) -> Any:
    try:
        events = in_memory(element)
    except SchemaError:
        # It is set apart, with the reason, when events are encoded.
        return element
    if isinstance(events, pa.Table):
        for field in schema.fields:
            if field.name not in events.schema.names:
                events = events.append_column(field.name, pa.nulls(len(events), _ARROW_TYPES[field.kind]))
    return events


def unapplied(transform: beam.PTransform) -> beam.PTransform:
    """Return a transform ready to be applied in another pipeline than the last: it remembers the one it was in."""
    transform.pipeline = None
    for part in (*vars(transform).values(), *getattr(transform, "_parts", ())):
        if isinstance(part, beam.PTransform):
            unapplied(part)
    return transform


def in_one_window(events: beam.PCollection) -> beam.PCollection:
    """Return the events, all in the global window.

    Raises
    ------
    ValueError
        When there is no end to them.

    """
    if not events.is_bounded:
        raise ValueError(
            "the events have no end, and batch EM needs all of them for each iteration; learn from a stream with "
            "OnlineUpdate"
        )
    return events | "In one window" >> beam.WindowInto(beam.window.GlobalWindows())


def untimed(roles: Roles | None) -> Roles | None:
    """Return the roles with the event time only kept from the model: batch EM has no use for it."""
    if roles is None or roles.time is None:
        return roles
    return replace(roles, time=None, exclude=(*roles.exclude, roles.time))


def infer_schema(
    source: Source,
    *,
    roles: Roles | None = None,
    max_categories: int = 32,
    folder: str | None = None,
    options: PipelineOptions | None = None,
    runner: Any = None,
) -> Schema:
    """Return the schema of all the events of a source, whatever the order and the shards they come in.

    Numbers become numeric fields, strings categories and booleans flags. The vocabulary of a category is made of
    its most frequent values, in the order of their counts and, where these are equal, of the alphabet.

    Parameters
    ----------
    source
        A transform of the root of a pipeline that yields events, or a file pattern.
    roles
        Columns that are not the model's. Its `kinds` are taken as they are.
    max_categories
        Most categories in a vocabulary.
    folder
        Where the workers and this program can both write, by default a temporary one on this machine.
    options, runner
        Beam's.

    Raises
    ------
    SchemaError
        When there is no field, with the first reason where events or files were rejected, or a field has values of
        several kinds or too many values.

    >>> events = [{"amount": 3, "country": "DE"}, {"amount": 1.5, "country": "FR"}, {"country": "FR"}]
    >>> infer_schema(beam.Create(events), runner="FnApiRunner").fields[1].categories
    ('FR', 'DE')

    """
    fields = _look(source, roles, folder, options, runner, otherwise="no field could be inferred")
    declared = {} if roles is None else roles.kinds
    return _schema_of(fields, declared, max_categories)


def infer_categories(
    schema: Schema,
    source: Source,
    *,
    roles: Roles | None = None,
    folder: str | None = None,
    options: PipelineOptions | None = None,
    runner: Any = None,
) -> Schema:
    """Return a declared schema with the categories of the fields that name none, found in all the events of a source.

    Workers share no vocabulary that grows as they read: a category that the schema does not know is `other` to them.

    Parameters
    ----------
    schema
        The fields. Where it knows the categories of all category fields, nothing is read.
    source, roles, folder, options, runner
        As of `infer_schema`.

    Raises
    ------
    SchemaError
        When a field has too many different texts for a category, or no event can be read.
    ValueError
        When the events have no end.

    >>> events = [{"amount": 3, "country": "DE"}, {"amount": 1.5, "country": "FR"}, {"country": "FR"}]
    >>> schema = Schema({"amount": "numeric", "country": "category"})
    >>> infer_categories(schema, beam.Create(events), runner="FnApiRunner").fields[1].categories
    ('FR', 'DE')

    """
    names = _without_categories(schema)
    if not names:
        return schema
    known = replace(roles or Roles(), only=tuple(names), kinds=dict.fromkeys(names, "category"))
    otherwise = f"no category of {', '.join(map(repr, names))} could be found"
    seen = _look(source, known, folder, options, runner, otherwise=otherwise)
    return Schema(
        [
            replace(one, categories=_categories_of(one.name, seen[one.name][2], one.max_categories))
            if one.name in seen and one.name in names
            else one
            for one in schema.fields
        ],
        unknown=schema.unknown,
    )


def check_categories(schema: Schema) -> None:
    """Refuse a schema with a category field that names no category, for transforms that cannot look for them.

    Raises
    ------
    ValueError
        When there is such a field: every value of it would be `other`.

    """
    for name in _without_categories(schema):
        raise ValueError(
            f"field {name!r} is a category of which no value is known, so every one would be `other`: declare them by "
            f"Field({name!r}, 'category', (...)), or leave the field out; infer_categories finds them in a source"
        )


def _without_categories(schema: Schema) -> list[str]:
    return [one.name for one in schema.fields if one.kind == "category" and not one.categories]


def _look(
    source: Source,
    roles: Roles | None,
    folder: str | None,
    options: PipelineOptions | None,
    runner: Any,
    *,
    otherwise: str,
) -> _Fields:
    """Read the events once; return what is seen of their fields, or say what comes of it that all were rejected."""
    known = untimed(roles)

    def build(pipeline: beam.Pipeline) -> list[beam.PCollection]:
        events, *rejected = read_from(pipeline, source, roles)
        seen = events | "Look" >> beam.ParDo(_LookAtFields(known)).with_outputs(REJECTED, main="fields")
        fields = seen.fields | "Merge" >> beam.CombineGlobally(_MergeFields())
        reason = first_reason((*rejected, seen[REJECTED]) | "All rejected" >> beam.Flatten())
        return [
            fields | "Encode" >> beam.Map(lambda found: ("fields", json.dumps(found).encode())),
            reason | "Encode reason" >> beam.MapTuple(lambda name, text: (name, text.encode())),
        ]

    with working_folder(folder) as place:
        found = hand_over(build, ["fields", "reason"], place, options=options, runner=runner)
    fields: _Fields = json.loads(found["fields"])
    if not fields and "reason" in found:
        raise SchemaError(
            f"{otherwise}: all events were rejected, the first of the reasons being: {found['reason'].decode()}"
        )
    return fields


# By name: the least position in an event, how many values of each kind, and how often each text comes (None: too many).
_Fields = dict[str, tuple[int, dict[str, int], dict[str, int] | None]]


class _LookAtFields(beam.DoFn):
    """Fields of the events of a bundle; what holds no events goes to the output tagged `REJECTED`."""

    def __init__(self, roles: Roles | None) -> None:
        self.roles = Roles() if roles is None else roles

    def start_bundle(self) -> None:
        self._fields: _Fields = {}

    def process(self, element: Any) -> Iterator[beam.pvalue.TaggedOutput]:
        if isinstance(element, Batch):
            raise SchemaError("encoded batches come with a schema: declare it")
        try:
            events = _as_events(element)
        except SchemaError as error:
            yield beam.pvalue.TaggedOutput(REJECTED, RejectedEvent(None, str(error), _n_events(element)))
            return
        for number, name, kinds, labels in self._look(events):
            _include(self._fields, name, (number, kinds, labels))

    def _look(self, element: Any) -> Iterator[tuple[int, str, dict[str, int], dict[str, int]]]:
        if isinstance(element, pa.Table):
            names = self.roles.model_fields(element.schema.names)
            for number, name in enumerate(names):
                yield number, name, *_look_at_column(name, element.column(name))
        elif isinstance(element, np.ndarray):
            kind = "flag" if element.dtype == np.bool_ else "numeric"
            for number in range(element.shape[1]):
                yield number, f"x{number}", {kind: len(element)}, {}
        else:
            for event in element:
                # What is no event at all is set apart, with the reason, when events are encoded.
                if isinstance(event, Mapping):
                    for number, name in enumerate(self.roles.model_fields(event)):
                        yield number, name, *_look_at_value(event[name])

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._fields:
            yield _globally(self._fields)


def _as_events(element: Any) -> Any:
    """Return a table, a matrix or dicts; raise `SchemaError` for what encoding would refuse as a whole."""
    element = in_memory(element)
    if isinstance(element, np.ndarray):
        return _as_matrix(element)
    if not isinstance(element, pa.Table):
        return _as_dicts(element)
    names = element.schema.names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SchemaError(f"the frame has duplicate columns: {', '.join(map(repr, repeated))}")
    return element


def _look_at_column(name: str, column: pa.ChunkedArray) -> tuple[dict[str, int], dict[str, int]]:
    there = len(column) - column.null_count
    try:
        kind = _kind_of_column(name, column.type)
    except SchemaError:
        return {str(column.type): there}, {}
    if kind != "category" or not there:
        return ({kind: there} if there else {}), {}
    counted = pc.value_counts(column.cast(pa.string()).drop_null())
    return {kind: there}, {str(one["values"]): one["counts"] for one in counted.to_pylist()}


def _look_at_value(value: Any) -> tuple[dict[str, int], dict[str, int]]:
    if _is_missing(value):
        return {}, {}
    if isinstance(value, str):
        return {"category": 1}, {value: 1}
    try:
        return {_kind_of_value(0, "", value): 1}, {}
    except EventError:
        return {type(value).__name__: 1}, {}


def _include(fields: _Fields, name: str, seen: tuple[int, dict[str, int], dict[str, int] | None]) -> None:
    known = fields.get(name)
    if known is None:
        fields[name] = (seen[0], dict(seen[1]), _limited(None if seen[2] is None else dict(seen[2])))
        return
    number, kinds, labels = known
    for kind, count in seen[1].items():
        kinds[kind] = kinds.get(kind, 0) + count
    if labels is not None and seen[2] is not None:
        for label, count in seen[2].items():
            labels[label] = labels.get(label, 0) + count
    else:
        labels = None
    fields[name] = (min(number, seen[0]), kinds, _limited(labels))


def _limited(labels: dict[str, int] | None) -> dict[str, int] | None:
    return None if labels is None or len(labels) > MOST_LABELS else labels


class _MergeFields(beam.CombineFn):
    """Merge what bundles saw of the fields."""

    def create_accumulator(self) -> _Fields:
        return {}

    def add_input(self, accumulator: _Fields, element: _Fields) -> _Fields:
        for name, seen in element.items():
            _include(accumulator, name, seen)
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[_Fields]) -> _Fields:
        return reduce(self.add_input, accumulators, {})

    def extract_output(self, accumulator: _Fields) -> _Fields:
        return accumulator


def _schema_of(fields: Mapping[str, Any], declared: Mapping[str, Any], max_categories: int) -> Schema:
    made = []
    # The place in the events goes first, since an array has nothing but the order to tell its fields by.
    for name, (_, kinds, labels) in sorted(fields.items(), key=lambda item: (item[1][0], item[0])):
        kind: Any = declared.get(name)
        if kind is None:
            if len(kinds) > 1:
                counted = " and ".join(f"{kind} in {count:,} events" for kind, count in sorted(kinds.items()))
                raise SchemaError(
                    f"field {name!r} is {counted}: declare its kind in a schema, and the events that do not fit it "
                    "are rejected one by one; or leave it out by a role"
                )
            kind = next(iter(kinds), "numeric")
        categories = _categories_of(name, labels, max_categories) if kind == "category" else ()
        made.append(Field(name, kind, categories, max_categories))
    if not made:
        raise SchemaError("no field could be inferred: the source has no event, or all its fields are excluded")
    return Schema(made)


def _categories_of(name: str, labels: Mapping[str, int] | None, max_categories: int) -> tuple[str, ...]:
    if labels is None:
        raise SchemaError(
            f"field {name!r} has more than {MOST_LABELS:,} different texts, so it is an id or free text: leave it "
            "out by a role, or declare its categories in a schema"
        )
    return tuple(sorted(labels, key=lambda label: (-labels[label], label))[:max_categories])


class EncodeEvents(beam.DoFn):
    """Events in, encoded blocks out.

    Events that cannot be used go to the output tagged `REJECTED`, how many there were to the one tagged `COUNTS`.

    Parameters
    ----------
    schema
        The fields; categories outside it are counted as `other`.
    roles
        Columns that are not the model's.
    model
        The mixture, which may have no density for events that lack some value.

    >>> from apache_beam.testing.util import assert_that, equal_to
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     events = pipeline | beam.Create([{"x": 1.0}, {"x": "?"}])
    ...     blocks, rejected = events | beam.ParDo(EncodeEvents(Schema({"x": "numeric"}))).with_outputs(
    ...         REJECTED, main="blocks"
    ...     )
    ...     _ = assert_that(rejected | beam.Map(lambda one: one.event), equal_to([{"x": "?"}]))

    """

    def __init__(self, schema: Schema, roles: Roles | None = None, model: Mixture | None = None) -> None:
        self.schema = schema
        self.roles = roles
        self.model = model
        self._events = Metrics.counter(NAMESPACE, "events")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")

    def start_bundle(self) -> None:  # noqa: D102 - Beam's
        self._blocks = EventBlocks(self.schema, self.roles, self.model)
        self._n_events = self._n_rejected = 0

    def process(self, element: Any) -> Iterator[Any]:  # noqa: D102 - Beam's
        yield from self._told(self._blocks.add(element))

    def _told(self, blocks: Iterable[Batch]) -> Iterator[Any]:
        for block in blocks:
            self._n_events += block.n_events
            yield block
        for rejected in self._blocks.take_rejected():
            self._n_rejected += rejected.n_events
            yield beam.pvalue.TaggedOutput(REJECTED, rejected)

    def finish_bundle(self) -> Iterator[Any]:  # noqa: D102 - Beam's
        for output in self._told(self._blocks.flush()):
            if isinstance(output, beam.pvalue.TaggedOutput):
                yield beam.pvalue.TaggedOutput(output.tag, _globally(output.value))
            else:
                yield _globally(output)
        self._events.inc(self._n_events)
        self._rejected.inc(self._n_rejected)
        ignored = tuple(sorted(self._blocks.ignored_fields.items()))
        counts = EventCounts(self._n_events, self._n_rejected, ignored)
        yield beam.pvalue.TaggedOutput(COUNTS, _globally(counts))


def _globally(value: Any) -> WindowedValue:
    window = GlobalWindow()
    return WindowedValue(value, window.max_timestamp(), [window])


class Sample(beam.PTransform):
    """Draw a sample of encoded blocks, by weight: a PCollection with one `Reservoir`, or none where there is no event.

    The random numbers of a block come from its content, so a bundle that is tried again draws the same ones.

    Parameters
    ----------
    schema
        The fields.
    capacity
        Number of events in the sample.
    seed
        Seed of the random numbers.

    Notes
    -----
    Blocks that are equal draw the same numbers. Of very many blocks of one or two events each, all of them of a few
    kinds, the sample would hold whole kinds; such blocks come about only where a bundle is that small.

    """

    def __init__(self, schema: Schema, capacity: int, seed: int) -> None:
        super().__init__()
        self.schema, self.capacity, self.seed = schema, capacity, seed

    def expand(self, blocks: beam.PCollection) -> beam.PCollection:  # noqa: D102 - Beam's
        merge = _MergeReservoirs(ReservoirCoder(self.schema, self.capacity))
        drawn = blocks | "Draw" >> beam.ParDo(_Draw(self.capacity, self.seed))
        return drawn | "Merge" >> beam.CombineGlobally(merge).without_defaults()


class ReservoirCoder(beam.coders.Coder):
    """A `Reservoir` as an Arrow IPC stream.

    Parameters
    ----------
    schema
        The fields of its events.
    capacity
        Its capacity.

    """

    def __init__(self, schema: Schema, capacity: int) -> None:
        self.schema, self.capacity = schema, capacity

    def encode(self, value: Reservoir) -> bytes:  # noqa: D102 - Beam's
        rows = to_rows(value.arrays(), {})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_batch(rows)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    def decode(self, encoded: bytes) -> Reservoir:  # noqa: D102 - Beam's
        with pa.ipc.open_stream(encoded) as reader:
            return Reservoir.from_arrays(self.capacity, self.schema, from_rows(reader.read_next_batch()))

    def is_deterministic(self) -> bool:  # noqa: D102 - Beam's
        return True


class _Draw(beam.DoFn):
    """The sample of the blocks of a bundle."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seed = capacity, seed

    def start_bundle(self) -> None:
        self._sample = Reservoir(self.capacity)
        self._any = False

    def process(self, block: Batch) -> None:
        drawn = Reservoir(self.capacity, np.random.default_rng([self.seed, _digest(block)]))
        drawn.add(block)
        self._sample, self._any = self._sample.merge(drawn), True

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._any:
            yield _globally(self._sample)


def _digest(block: Batch) -> int:
    digest = hashlib.blake2b(block.values.tobytes(), digest_size=16)
    if block.weight is not None:
        digest.update(block.weight.tobytes())
    return int.from_bytes(digest.digest())


class _MergeReservoirs(beam.CombineFn):
    """Merge samples of the same capacity."""

    def __init__(self, coder: ReservoirCoder) -> None:
        self.coder = coder

    def create_accumulator(self) -> Reservoir:
        return Reservoir(self.coder.capacity)

    def add_input(self, accumulator: Reservoir, element: Reservoir) -> Reservoir:
        return accumulator.merge(element)

    def merge_accumulators(self, accumulators: Iterable[Reservoir]) -> Reservoir:
        return reduce(Reservoir.merge, accumulators)

    def extract_output(self, accumulator: Reservoir) -> Reservoir:
        return accumulator

    def get_accumulator_coder(self) -> beam.coders.Coder:
        return self.coder


def first_reason(rejected: beam.PCollection) -> beam.PCollection:
    """Return one pair ("reason", text), the first of all in the order of the alphabet; none where none was rejected."""
    reasons = rejected | "Reason" >> beam.Map(lambda one: ("reason", one.reason))
    return reasons | "First" >> beam.CombinePerKey(min)


def total_counts(counts: beam.PCollection, rejected: Iterable[beam.PCollection] = ()) -> beam.PCollection:
    """Return one pair ("counts", counts) of all bundles and of events rejected before they came to be counted."""
    more = [
        one | f"Count rejected {number}" >> beam.Map(lambda event: EventCounts(0, event.n_events))
        for number, one in enumerate(rejected)
    ]
    # There may be no bundle. The default that a global combination has for this is a side input and six transforms.
    none = counts.pipeline | "No events" >> beam.Create([EventCounts()], reshuffle=False)
    pairs = (none, counts, *more) | "All counts" >> beam.Flatten() | "Counts" >> beam.Map(lambda one: ("counts", one))
    return pairs | "Total" >> beam.CombinePerKey(_merged_counts)


def _merged_counts(counts: Iterable[EventCounts]) -> EventCounts:
    return reduce(EventCounts.merge, counts, EventCounts())


def encode_counts(counts: EventCounts) -> bytes:
    """Return counts as JSON."""
    return json.dumps(counts).encode()


def decode_counts(content: bytes | str) -> EventCounts:
    """Return the counts that `encode_counts` wrote."""
    n_events, n_rejected, ignored = json.loads(content)
    return EventCounts(n_events, n_rejected, tuple((name, count) for name, count in ignored))


def check_any(counts: EventCounts, reason: str | None) -> None:
    """Raise an error where no event can be used.

    Raises
    ------
    NotFittedError
        It tells a reason for which events were rejected.

    """
    if counts.n_events:
        return
    if not counts.n_rejected:
        raise NotFittedError("there is no event to fit")
    raise NotFittedError(
        f"there is no event to fit: all {counts.n_rejected:,} were rejected, the first of the reasons being: {reason}"
    )
