"""The configuration of a job: a YAML file, overridden on the command line, checked key by key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from stream_em.kafka import check_config as check_kafka_config
from stream_em.schedules import Constant, HalfLife, Harmonic, RobbinsMonro, Schedule
from stream_em.schema import Kind
from stream_em.sources import STANDARD_INPUT
from stream_em.structure import AdaptiveComponents

FamilyName = Literal["gaussian", "categorical", "bernoulli", "poisson", "exponential"]


# Far more than any key needs, far less than what Python can follow.
_DEEPEST = 50


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what would be valid."""


# Endings of the names of pictures.
PICTURES = (".png", ".svg", ".pdf")
LISTED_PICTURES = f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}"


class Section(BaseModel):
    """Base of the sections: unknown keys are refused and values are not converted behind the user's back."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class KafkaSection(Section):
    """A Kafka topic."""

    bootstrap_servers: Annotated[str, Field(exclude=True)]
    """Addresses of some of its brokers, host:port, with commas between."""
    topic: str
    """Its name."""
    settings: Annotated[dict[str, str | int | float | bool], Field(exclude=True)] = {}
    """Further settings of librdkafka, such as `security.protocol`."""

    @property
    def config(self) -> dict[str, Any]:
        """Settings of librdkafka."""
        return {"bootstrap.servers": self.bootstrap_servers, **self.settings}

    @field_validator("settings")
    @classmethod
    def _allowed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        check_kafka_config({"bootstrap.servers": "", **settings})
        return settings


class KafkaSourceSection(KafkaSection):
    """A Kafka topic to read."""

    start: Literal["earliest", "latest"] = "earliest"
    """Where to begin; a run that goes on does so after what it has learned."""
    until: Literal["end"] | None = None
    """`end`: stop at what is last in the topic when the job starts; left out, go on for ever."""
    max_wait: Annotated[float, Field(gt=0.0)] = 1.0
    """Seconds that an event waits at most for its batch to fill, in a topic that is read for ever."""
    timestamp_field: str | None = None
    """Field that the timestamp of each message is put into, in seconds since 1970."""


class SourceSection(Section):
    """Where the events come from."""

    path: str | list[str] | None = None
    """File, folder, glob pattern, a list of them, or `-` for standard input."""
    river: str | None = None
    """Name of a data set in `river.datasets`, instead of a path."""
    kafka: KafkaSourceSection | None = None
    """Topic of JSON objects, instead of a path."""
    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    """Format of the files; `auto` goes by their names."""
    label: str | None = None
    """Column with the truth, kept from the model and used to rate the anomaly score."""
    anomaly_labels: list[str | int | float | bool] | None = None
    """Labels that mean anomaly; needed unless labels are 0 and 1 or false and true."""
    time: str | None = None
    """Column with the event time: seconds, a timestamp, or ISO 8601 text."""
    weight: str | None = None
    """Column with the weight of an event."""
    exclude: list[str] = []
    """Other columns kept from the model; they are carried into the scored events."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Separator of CSV cells; default a comma, a tab for .tsv files."""
    quote: Annotated[str, Field(max_length=1)] | None = '"'
    """What CSV cells with separators or line breaks stand between; null: nothing, quotes are ordinary characters."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many events."""

    def apart(self) -> list[tuple[str, str]]:
        """Return the columns that are kept from the model, each after the key that says so."""
        roles = {"source.label": self.label, "source.time": self.time, "source.weight": self.weight}
        named = [(key, name) for key, name in roles.items() if name is not None]
        return [*named, *(("source.exclude", name) for name in self.exclude)]

    def excluding(self, *names: str) -> str:
        """Return the key and value that would keep these columns from the model as well."""
        return f"source.exclude=[{', '.join([*self.exclude, *names])}]"

    @property
    def has_own_cells(self) -> bool:
        """Whether the cells of a CSV file are separated or quoted in another way than is assumed."""
        return self.delimiter is not None or self.quote != '"'

    @field_validator("quote")
    @classmethod
    def _no_quote(cls, quote: str | None) -> str | None:
        return quote or None

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSection:
        if sum(origin is not None for origin in (self.path, self.river, self.kafka)) != 1:
            raise ValueError("expected exactly one of 'path', 'river' and 'kafka'")
        if self.kafka is not None and self.has_own_cells:
            raise ValueError("delimiter and quote are for CSV, and a topic holds JSON; leave them out")
        field = None if self.kafka is None else self.kafka.timestamp_field
        if field is not None and field not in (self.time, *self.exclude):
            raise ValueError(f"kafka.timestamp_field: name {field!r} in source.time or source.exclude, too")
        return self


class SchemaSection(Section):
    """Which fields the events have."""

    fields: Annotated[dict[str, Kind], Field(min_length=1)] | None = None
    """Kind of every field the model uses; left out, the fields are inferred from the first events."""
    unknown: Literal["refuse", "ignore", "add"] = "refuse"
    """What to do with a field that the schema does not have."""
    max_categories: Annotated[int, Field(ge=1)] = 32
    """Categories kept per field; the ones after that count as `other`."""


class ModelSection(Section):
    """The mixture model."""

    family: Literal["auto", FamilyName] = "auto"
    """Family of all fields, or `auto`: by the kind of each field, numeric fields jointly."""
    families: dict[str, FamilyName] = {}
    """Families of single fields, where `auto` should not choose."""
    covariance_type: Literal["full", "tied", "diag", "spherical"] = "full"
    """Shape of the covariances of Gaussian components."""
    n_components: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Number of components."""
    prior_weight: Annotated[float, Field(gt=0.0)] | None = None
    """Pseudo-events that the prior is worth in each component; left out, the library's default. A strong prior needs a
    long warm-up."""
    assignment: Literal["soft", "hard"] = "soft"
    """Whether an event is shared among components (EM) or given to one of them (as in k-means)."""


class _ScheduleSection(Section):
    """Base of the schedules: their options are those of the library's class, which knows their ranges."""

    made_as: ClassVar[type[Schedule]]

    def make(self) -> Schedule:
        """Return the schedule."""
        return self.made_as(**self.model_dump(exclude={"kind"}))

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        self.make()
        return self


class HarmonicSection(_ScheduleSection):
    """Step size 1/t: every event counts the same for ever."""

    made_as = Harmonic
    kind: Literal["harmonic"]


class RobbinsMonroSection(_ScheduleSection):
    """Step size (t + offset)^-alpha."""

    made_as = RobbinsMonro
    kind: Literal["robbins_monro"]
    alpha: float = RobbinsMonro.alpha
    """Decay of the step size."""
    offset: float = RobbinsMonro.offset
    """Batches added to the count: larger means smaller first steps."""


class ConstantSection(_ScheduleSection):
    """The same step size for ever, to follow drift."""

    made_as = Constant
    kind: Literal["constant"]
    value: float
    """Weight of each new batch."""


class HalfLifeSection(_ScheduleSection):
    """An event's weight halves every `half_life` of event time."""

    made_as = HalfLife
    kind: Literal["half_life"]
    half_life: float
    """In the units of `source.time`: seconds for timestamps."""
    max_ahead: Annotated[float, Field(gt=0.0)] | None = None
    """How far ahead of the newest event before it a date is believed, in the same units; left out, 30 half-lives."""

    def make(self) -> Schedule:
        """Return the schedule, which does not believe a date so far ahead that the past would be as good as gone."""
        return HalfLife(self.half_life, 30.0 * self.half_life if self.max_ahead is None else self.max_ahead)


ScheduleSection = Annotated[
    HarmonicSection | RobbinsMonroSection | ConstantSection | HalfLifeSection, Field(discriminator="kind")
]


class AdaptiveComponentsSection(Section):
    """A number of components that follows the events; `model.n_components` is the first."""

    kind: Literal["adaptive_components"]
    births: bool = AdaptiveComponents.births
    """Whether poorly explained events give rise to components."""
    merges: bool = AdaptiveComponents.merges
    """Whether components merge."""
    splits: bool = AdaptiveComponents.splits
    """Whether components split."""
    max_components: int = AdaptiveComponents.max_components
    """Most components."""
    recent_events: int = AdaptiveComponents.recent_events
    """Least number of events between checks, and most that are held to judge by."""
    tail: float = AdaptiveComponents.tail
    """Share of the events that count as poorly explained."""

    def make(self) -> AdaptiveComponents:
        """Return what the learner takes."""
        return AdaptiveComponents(**self.model_dump(exclude={"kind"}))

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        self.make()
        return self


# Sections of the learner with a kind, which may stand for the whole: `schedule: harmonic`.
DEFAULT_KINDS = {"schedule": "robbins_monro", "structure": "adaptive_components"}


class LearnerSection(Section):
    """How the model learns."""

    schedule: ScheduleSection = RobbinsMonroSection(kind="robbins_monro")
    """Step sizes of `run`."""
    batch_size: Annotated[int, Field(ge=1)] = 1_000
    """Events in a batch: `run` scores a batch, then learns from it."""
    warm_up: Annotated[int, Field(ge=1)] | None = None
    """Events collected before the first components are made; left out, the library's default."""
    averaging: bool = False
    """Whether `run` averages the parameters over the second half of the stream."""
    structure: AdaptiveComponentsSection | None = None
    """How `run` changes the number of components; left out, it stays as it is."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random choice."""
    max_iter: Annotated[int, Field(ge=1)] = 100
    """Most passes over the source that `fit` makes."""
    tol: Annotated[float, Field(ge=0.0)] = 1e-3
    """`fit` stops when the mean log-posterior gains less than this."""
    n_init: Annotated[int, Field(ge=1)] = 1
    """Starts of `fit`; the best one is kept."""

    @field_validator(*DEFAULT_KINDS, mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


class OutputSection(Section):
    """What is written, and where."""

    folder: str = "output"
    """Folder for everything below."""
    scored_events: str | None = "scored.parquet"
    """File of scored events, or null for none."""
    kafka: KafkaSection | None = None
    """Topic that `run` sends each scored event to, as JSON."""
    snapshot: str | None = "model.arrow"
    """File of the learned model, or null for none."""
    picture: str | None = "picture.png"
    """Picture of the components and the run, or null for none."""
    quarantine: str = "quarantine.jsonl"
    """File of the events that could not be used, each with the reason; empty when all could."""
    responsibilities: bool = False
    """Whether scored events get a column with the responsibility of each component."""
    prefix: str = ""
    """Put before the names of the added columns, for events that have such columns already."""
    on_error: Literal["quarantine", "raise"] = "quarantine"
    """Whether an event that cannot be used is set aside or ends the run."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1_000_000
    """`run` writes its snapshot after about so many events; killed, it goes on from there."""
    checkpoint_seconds: Annotated[float, Field(gt=0.0)] | None = None
    """`run` writes its snapshot also when so many seconds have passed since the last, for streams that are slow."""
    roll_events: Annotated[int, Field(ge=1)] | None = None
    """`run` begins a new file of scored events at the first snapshot after so many; left out, there is one file."""

    @model_validator(mode="after")
    def _distinct(self) -> OutputSection:
        names = [self.scored_events, self.snapshot, self.picture, self.quarantine]
        if "" in names:
            raise ValueError("expected file names of at least one character, or null for none")
        if self.scored_events is not None and Path(self.scored_events).suffix != ".parquet":
            raise ValueError(
                f"scored_events: is written as Parquet; the name must end in .parquet, got {self.scored_events!r}"
            )
        if self.picture is not None and Path(self.picture).suffix not in PICTURES:
            raise ValueError(f"picture: expected a name ending in {LISTED_PICTURES}, got {self.picture!r}")
        files = [Path(self.folder, name).resolve() for name in names if name is not None]
        if len(set(files)) < len(files):
            raise ValueError("expected a different file for each output")
        if self.roll_events is not None and self.snapshot is None:
            raise ValueError("roll_events needs a snapshot: files are rolled when it is written")
        return self


class Config(Section):
    """A whole job."""

    source: SourceSection
    fields_: SchemaSection = Field(default=SchemaSection(), alias="schema")
    model: ModelSection = ModelSection()
    learner: LearnerSection = LearnerSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if isinstance(self.learner.schedule, HalfLifeSection) and self.source.time is None:
            raise ValueError("learner.schedule 'half_life' forgets by event time: name its column in source.time")
        if self.learner.structure is not None and self.output.responsibilities:
            raise ValueError(
                "output.responsibilities: there is no column for each component where learner.structure lets them come "
                "and go; leave out one of the two"
            )
        if self.model.family != "auto" and self.model.families:
            raise ValueError("model.families needs model.family: auto")
        if self.fields_.fields:
            for name in self.model.families:
                if name not in self.fields_.fields:
                    raise ValueError(f"model.families.{name}: schema.fields has no such field")
            apart = [self.source.label, self.source.time, self.source.weight, *self.source.exclude]
            for name in self.fields_.fields:
                if name in apart:
                    raise ValueError(f"schema.fields.{name}: is kept from the model by the source section")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check the result.

    Raises
    ------
    ConfigError
        When the file cannot be read or parsed, and for every unknown, missing or ill-typed key.

    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file; the configuration is a YAML file") from error
    content = _parse(text, str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections such as 'source:', got {_shown(content)}")
    return check_config(content, overrides, str(path))


def check_config(content: dict[str, Any], overrides: Sequence[str] = (), origin: str = "command line") -> Config:
    """Apply overrides to the content of a configuration, and check it.

    >>> check_config({"source": {"path": "events.csv"}}, ["model.n_components=3"]).model.n_components
    3
    >>> check_config({"source": {"path": "events.csv"}, "learner": {"sede": 3}})
    Traceback (most recent call last):
    stream_em.cli.config.ConfigError: command line: learner.sede: no such key; did you mean 'seed'?

    """
    overridden = [_override(content, text) for text in overrides]
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines = list(_explanations(error.errors(), content, overridden, origin))
        raise ConfigError("\n".join(lines)) from None


def _override(content: dict[str, Any], text: str) -> tuple[str, ...]:
    key, sign, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not sign or not all(keys):
        raise ConfigError(f"{text!r}: expected section.key=value, as in learner.batch_size=500{_with_sign(text)}")
    # Names of data fields may hold dots; nothing else has a free name at the end.
    for free in (("schema", "fields"), ("model", "families")):
        if keys[:2] == free and len(keys) > 3:
            keys = (*free, ".".join(keys[2:]))
    section: Any = content
    for depth, name in enumerate(keys[:-1]):
        below = section.get(name)
        if below is None:
            below = section[name] = {}
        elif keys[:depth] == ("learner",) and name in DEFAULT_KINDS and isinstance(below, str):
            below = section[name] = {"kind": below}
        elif not isinstance(below, dict):
            raise ConfigError(f"{text!r}: {'.'.join(keys[: depth + 1])} is a value and has no keys")
        section = below
    # A lone hyphen, standard input, would be a list with nothing in it.
    parsed = value.strip() if value.strip() == STANDARD_INPUT else _parse(value, text)
    if keys[0] == "learner" and len(keys) == 3 and keys[1] in DEFAULT_KINDS:
        if keys[2] == "kind" and section.get("kind") != parsed:
            # Another kind has other options.
            section.clear()
        else:
            section.setdefault("kind", DEFAULT_KINDS[keys[1]])
    section[keys[-1]] = parsed
    return keys


class _Loader(yaml.SafeLoader):
    """Safe YAML with its traps closed.

    `1e-3` is a number. A key that stands twice is an error, and so are aliases, by which a short file stands for
    a huge one, and nesting without end.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, f"aliases (*{event.anchor}) are not accepted; write the value out", event.start_mark
            )
        if self._depth == _DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"values are nested more than {_DEEPEST} deep", event.start_mark
            )
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            if isinstance(key, (str, int, float, bool)):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{origin}{where}: is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: is not valid YAML: {error}") from error


def _explanations(
    errors: list[ErrorDetails], content: Mapping[str, Any], overridden: list[tuple[str, ...]], origin: str
) -> Iterator[str]:
    seen = set()
    places = [_walk(error["loc"]) for error in errors]
    for error, (keys, section) in zip(errors, places, strict=True):
        if any(len(other) > len(keys) and other[: len(keys)] == keys for other, _ in places if keys):
            # A list that does not fit is reported at the item that does not.
            continue
        place = "command line" if keys in overridden else origin
        path = ".".join(keys)
        if path in seen:
            # The branches of one union each report the same value.
            continue
        seen.add(path)
        kind = error["type"]
        if kind == "extra_forbidden":
            valid = _keys(section) if section is not None else []
            near = difflib.get_close_matches(keys[-1], valid, n=1, cutoff=0.5)
            if path in _all_paths():
                hint = f" of this kind; set {'.'.join(keys[:-1])}.kind to one that has it"
            elif near:
                hint = f"; did you mean {near[0]!r}?"
            else:
                hint = _nearest_path(keys, valid)
            yield f"{place}: {path}: no such key{hint}"
        elif kind in ("missing", "union_tag_not_found"):
            path = f"{path}.kind" if kind == "union_tag_not_found" else path
            yield f"{place}: {path}: is missing"
        elif kind == "value_error":
            message = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
            yield f"{place}: {path}: {message}" if path else f"{place}: {message}"
        elif kind in ("literal_error", "union_tag_invalid"):
            context = error.get("ctx", {})
            path = f"{path}.kind" if kind == "union_tag_invalid" else path
            allowed = re.findall(r"'([^']*)'", context.get("expected") or context.get("expected_tags", ""))
            value = context.get("tag", error["input"])
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{place}: {path}: expected one of {', '.join(allowed)}, got {_shown(value)}{hint}"
        else:
            expected = _expected(error)
            yield f"{place}: {path or 'configuration'}: expected {expected}, got {_shown(error['input'])}"


def _expected(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    message = {
        "dictionary or instance of": "a mapping of keys to values",
        "dictionary": "a mapping of keys to values",
    }.get(" ".join(message.split()[:3]), message)
    articles = {
        "string": "a text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "list": "a list",
    }
    if message.startswith("dictionary"):
        return "keys with values below it"
    return articles.get(message, message)


def _walk(location: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[BaseModel] | None]:
    """The keys in the file that lead to a place in the model, and the section the last one stands in."""
    keys: list[str] = []
    section: type[BaseModel] | None = Config
    annotation: Any = None
    for part in location:
        if section is not None:
            known = {info.alias or name: info.annotation for name, info in section.model_fields.items()}
            keys.append(str(part))
            if part not in known:
                return tuple(keys), section
            annotation = known[str(part)]
            inner = _models(annotation)
            following = inner[0] if len(inner) == 1 else None
            if len(location) > len(keys) and (following is not None or len(inner) > 1):
                section = following
                continue
            return (tuple(keys), section) if len(location) == len(keys) else (_plain(keys, location), None)
        # Pydantic puts the tag of a union between the key and what is below it; it is no key of the file.
        tagged = [one for one in _models(annotation) if part in get_args(one.model_fields["kind"].annotation)]
        if not tagged:
            return _plain(keys, location), None
        rest = location[location.index(part) + 1 :]
        if not rest:
            return tuple(keys), tagged[0]
        return (*keys, *map(str, rest)), tagged[0]
    return tuple(keys), section


def _plain(keys: list[str], location: tuple[int | str, ...]) -> tuple[str, ...]:
    # Below a key with a value of several types, Pydantic adds names of types; keep field names and positions.
    types = {"str", "int", "float", "bool", "[key]"}
    rest = [
        str(part)
        for part in location[len(keys) :]
        if isinstance(part, int) or (part not in types and not re.match(r"(list|dict|literal|function)\[", part))
    ]
    return (*keys, *rest)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated or origin is Union or str(origin) == "<class 'types.UnionType'>":
        return [model for inner in get_args(annotation) for model in _models(inner)]
    return []


def _keys(section: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in section.model_fields.items()]


def _all_paths(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        inner = _models(info.annotation)
        if not inner:
            yield path
        for model in inner:
            yield from _all_paths(model, f"{path}.")


def describe_keys() -> list[tuple[str, str]]:
    """Dotted path of every key, with what it means and its default."""
    described = []
    for name, info in Config.model_fields.items():
        for section in _models(info.annotation):
            prefix = info.alias or name
            for key, inner in section.model_fields.items():
                nested = _models(inner.annotation)
                text = " ".join((inner.description or "").split())
                if nested and "kind" not in nested[0].model_fields:
                    described.append((f"{prefix}.{key}", text))
                    described.extend(
                        (f"{prefix}.{key}.{option}", _meaning(more)) for option, more in nested[0].model_fields.items()
                    )
                elif nested:
                    kinds = [get_args(one.model_fields["kind"].annotation)[0] for one in nested]
                    described.append((f"{prefix}.{key}", f"{text} One of {', '.join(kinds)}."))
                    for kind, one in zip(kinds, nested, strict=True):
                        described.extend(
                            (f"{prefix}.{key}.{option}", f"({kind}) {_meaning(more)}")
                            for option, more in one.model_fields.items()
                            if option != "kind"
                        )
                else:
                    described.append((f"{prefix}.{key}", _meaning(inner)))
    return described


def _meaning(info: FieldInfo) -> str:
    """What a key means, the values it may have where they are few, and its default."""
    choices = [one for one in _choices(info.annotation) if isinstance(one, str)]
    one_of = f" One of {', '.join(choices)}." if len(choices) > 1 else ""
    return f"{' '.join((info.description or '').split())}{one_of}{_default(info)}"


def _choices(annotation: Any) -> list[Any]:
    """The fixed values within an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def _default(info: FieldInfo) -> str:
    if info.is_required() or info.default in (None, [], {}, ""):
        return ""
    return f" Default: {str(info.default).lower() if isinstance(info.default, bool) else info.default}."


def _nearest_path(keys: Sequence[str], valid: Sequence[str]) -> str:
    """The dotted path that was probably meant, or else the keys that there are."""
    near = _near_path(keys)
    if near is not None:
        section, _, key = near.rpartition(".")
        # Another kind of this very section may have a key of that name.
        if key in valid or section != ".".join(keys[:-1]):
            return f"; did you mean {near!r}?"
    return f" (there are: {', '.join(valid)})" if valid else ""


def _near_path(keys: Sequence[str]) -> str | None:
    paths = list(dict.fromkeys(_all_paths()))
    path = ".".join(keys)
    if path in paths:
        return path
    by_name = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = difflib.get_close_matches(keys[-1], by_name, n=1, cutoff=0.8)
    if near:
        return by_name[near[0]]
    return next(iter(difflib.get_close_matches(path, paths, n=1, cutoff=0.7)), None)


def _with_sign(text: str) -> str:
    """What was probably meant by an override with a space or a colon for its sign, or with none."""
    key, *value = re.split(r"[\s:=]+", text.strip(), maxsplit=1)
    near = _near_path(key.split("."))
    return "" if near is None else f"; did you mean '{near}={''.join(value) or '...'}'?"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
