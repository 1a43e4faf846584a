"""From a configuration to the objects of the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from stream_em import BatchEM, Gaussian, Mixture, OnlineEM, Product, Schema, SchemaError
from stream_em.cli.config import Config, ConfigError, KafkaSourceSection, ModelSection, SourceSection
from stream_em.columns import Roles
from stream_em.families import BY_NAME, NAMES
from stream_em.families.base import Family
from stream_em.families.gaussian import CovarianceType
from stream_em.kafka import TopicReader
from stream_em.schema import Field
from stream_em.sources import Rows, Source, open_source


def make_source(section: SourceSection, **known: Any) -> Source:
    """Return the source that a configuration describes; `known` are further arguments of `open_source`."""
    if section.kafka is not None:
        return _make_kafka_source(section, section.kafka, only=known.get("only"))
    return open_source(
        section.path,
        river=section.river,
        format=section.format,
        label=section.label,
        time=section.time,
        weight=section.weight,
        exclude=section.exclude,
        delimiter=section.delimiter,
        quote=section.quote,
        limit=section.limit,
        **known,
    )


def _make_kafka_source(section: SourceSection, topic: KafkaSourceSection, only: Sequence[str] | None) -> Source:
    try:
        reader = TopicReader(
            topic.config,
            topic.topic,
            start=topic.start,
            to_end=topic.until == "end",
            max_wait=topic.max_wait,
            timestamp_field=topic.timestamp_field,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(f"source.kafka: {error}") from error
    apart = tuple(section.exclude)
    roles = Roles(section.label, section.time, section.weight, apart, None if only is None else tuple(only))
    return Source(reader, roles, section.limit)


def chunk_rows(source: Source, batch_size: int) -> int:
    """Events to read at once: whole batches, and many of them where reading in bulk is what makes it fast."""
    if source.live or not source.columnar:
        return batch_size
    return max(1, 65_536 // batch_size) * batch_size


def make_schema(config: Config, events: Rows) -> Schema:
    """Return the declared schema, or the one inferred from some first events."""
    section = config.fields_
    if section.fields is not None:
        declared = [Field(name, kind, max_categories=section.max_categories) for name, kind in section.fields.items()]
        return Schema(declared, unknown=section.unknown)
    sample = [_typical(events)] if isinstance(events, list) else events
    try:
        return Schema.infer(sample, unknown=section.unknown, max_categories=section.max_categories)
    except SchemaError as error:
        unusable = (
            [] if isinstance(sample, list) else [name for name in sample.column_names if not _usable(sample, name)]
        )
        if not unusable:
            raise
        raise SchemaError(
            f"{error}: {config.source.excluding(*unusable)} keeps what is of no such type from the model"
        ) from error


def _usable(events: pa.Table, name: str) -> bool:
    try:
        Schema.infer(events.select([name]).slice(0, 0))
    except SchemaError:
        return False
    return True


def make_model(section: ModelSection, schema: Schema) -> Mixture:
    """Return the mixture, with a family for each field of the schema."""
    for name in section.families:
        if name not in schema.names:
            raise ConfigError(
                f"model.families.{name}: the events have no such field (they have: {', '.join(schema.names)})"
            )
    chosen = section.families if section.family == "auto" else dict.fromkeys(schema.names, section.family)
    groups: dict[str, list[str]] = {}
    for name, family in chosen.items():
        groups.setdefault(family, []).append(name)
    if (joint := groups.get(NAMES[Gaussian])) is not None:
        joint += [one.name for one in schema.fields if one.kind == "numeric" and one.name not in chosen]
    whole: Family
    families: dict[str | tuple[str, ...], Family] = {
        tuple(sorted(names, key=schema.position)): _make_family(family, section.covariance_type)
        for family, names in groups.items()
    }
    # One family for all fields has no place for a new field of another kind.
    closed = section.family != "auto" or schema.unknown != "add"
    if closed and len(families) == 1 and sum(map(len, families)) == len(schema):
        (whole,) = families.values()
    elif closed and not families and all(one.kind == "numeric" for one in schema.fields):
        whole = Gaussian(section.covariance_type)
    else:
        whole = Product(families, others=section.covariance_type)
    options: dict[str, Any] = {"assignment": section.assignment}
    if section.prior_weight is not None:
        options["prior_weight"] = section.prior_weight
    return Mixture(whole, section.n_components, **options)


def make_online(config: Config, schema: Schema) -> OnlineEM:
    """Return the learner of `run`."""
    section, model = config.learner, make_model(config.model, schema)
    try:
        return OnlineEM(
            model,
            schedule=section.schedule.make(),
            schema=schema,
            batch_size=section.batch_size,
            warm_up=section.warm_up,
            averaging=section.averaging,
            structure=None if section.structure is None else section.structure.make(),
            seed=section.seed,
        )
    except ValueError as error:
        raise ConfigError(f"learner: {error}") from error


def make_batch(config: Config, schema: Schema) -> BatchEM:
    """Return the learner of `fit`."""
    section = config.learner
    return BatchEM(
        make_model(config.model, schema),
        schema=schema,
        max_iter=section.max_iter,
        tol=section.tol,
        n_init=section.n_init,
        seed=section.seed,
    )


def _make_family(name: str, covariance_type: CovarianceType) -> Family:
    return Gaussian(covariance_type) if name == NAMES[Gaussian] else BY_NAME[name]()


def _typical(events: list[dict[str, Any]]) -> dict[str, Any]:
    """An event that has, in each field, a value of the type most events have there.

    Inferring from the first events as they come would let one bad value decide the kind of a field.
    """
    types: dict[str, Counter[str]] = {}
    examples: dict[tuple[str, str], Any] = {}
    for event in events:
        for name, value in event.items():
            counts = types.setdefault(name, Counter())
            if value is None or value != value:  # NaN is the one value that differs from itself
                continue
            kind = "number" if type(value) in (int, float) else type(value).__name__
            counts[kind] += 1
            examples.setdefault((name, kind), value)
    return {name: examples[name, counts.most_common(1)[0][0]] if counts else None for name, counts in types.items()}
