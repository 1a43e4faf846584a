"""What the jobs have in common: opening the source, encoding and setting aside, the outputs, the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from stream_em import Batch, BatchEM, EventError, Field, OnlineEM, Schema, load
from stream_em.cli.build import make_source
from stream_em.cli.config import Config, ConfigError
from stream_em.cli.display import component_table, counted, say
from stream_em.cli.outputs import (
    Committed,
    Quarantine,
    ScoredEvents,
    ScoredRows,
    ScoreSink,
    is_quarantine,
    scored_files,
)
from stream_em.learners import Prediction
from stream_em.plain import is_number
from stream_em.sources import Chunk, Rejection, Rows, Source, same_file
from stream_em.sources.faults import OPEN_QUOTE

# Of an id's values, in any stream that is longer than a vocabulary, more than so many are new.
_SHARE_OF_NEW = 0.9
# Fields that are told at the start of a job.
_MOST_TOLD = 20
# Reasons that are told at the end of a job.
_MOST_REASONS, _MOST_QUOTES = 10, 3
# So many whole numbers in a row do not grow by chance.
_TELLING = 20


class DataError(ValueError):
    """Events that cannot be used, found by a job."""


def open_job_source(
    config: Config, console: Console, read: Sequence[Path], written: Sequence[str | None], **known: Any
) -> Source:
    """Open the source, and refuse outputs that would overwrite what is read."""
    output = config.output
    folder = Path(output.folder)
    own = []
    if output.scored_events is not None:
        own += scored_files(folder / output.scored_events, output.prefix)
    if is_quarantine(folder / output.quarantine):
        own.append(folder / output.quarantine)
    source = make_source(config.source, leave_out=own, **known)
    for path in dict.fromkeys([*(folder / name for name in written if name is not None), *own]):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder, and the name of a file is needed to write to")
        if not path.exists():
            continue
        for other in (*map(Path, source.paths), *read):
            if same_file(path, other):
                raise ConfigError(
                    f"{path}: is read by this job and would be overwritten; give the output another folder or name"
                )
    if source.left_out:
        say(console, f"not read, since this job writes them: {', '.join(source.left_out)}", "yellow")
    return source


def scoring(config: Config, schema: Schema, snapshot: str) -> Config:
    """Return a job's configuration with the fields of the model that is to score its events.

    Raises
    ------
    ConfigError
        When a column that is kept from the model is one of its fields.

    """
    for key, name in config.source.apart():
        if name in schema.names:
            raise ConfigError(
                f"{key}: {name!r} is a field of the model in {snapshot}, which has learned it; leave the key out, or "
                "learn a model with it"
            )
    kinds = {field.name: field.kind for field in schema.fields}
    section = config.fields_.model_copy(update={"fields": kinds, "unknown": "refuse"})
    return config.model_copy(update={"fields_": section})


def tell_fields(console: Console, schema: Schema) -> None:
    """Say which fields the model takes from the events, and of what kinds."""
    fields = [f"{one.name} ({one.kind})" for one in schema.fields]
    more = f" and {len(fields) - _MOST_TOLD:,} more" if len(fields) > _MOST_TOLD else ""
    say(console, f"fields of the model: {', '.join(fields[:_MOST_TOLD])}{more}")


def tell_likely_ids(console: Console, schema: Schema, events: Rows, config: Config) -> None:
    """Say which of the fields that were inferred from some first events look like no measurement."""
    for one in schema.fields if config.fields_.fields is None else ():
        if one.kind == "numeric" and _only_grows(events, one.name):
            say(
                console,
                f"field {one.name!r}: whole numbers that grow with each event; is it an id, or a time? Added to "
                "source.exclude, it is kept from the model",
                "yellow",
            )


def _only_grows(events: Rows, name: str) -> bool:
    values = [event.get(name) for event in events] if isinstance(events, list) else events[name].to_pylist()
    if len(values) < _TELLING or any(type(value) is not int for value in values):
        return False
    return all(one < following for one, following in pairwise(values))


def encode(
    encoder: OnlineEM | BatchEM | Schema,
    chunk: Chunk,
    config: Config,
    span: slice | None = None,
    *,
    learning: bool = True,
) -> Batch:
    """Encode the events of a chunk, or a span of them; those that cannot be used are left out.

    Raises
    ------
    DataError
        When the table of events has columns that the schema does not know and is not to ignore.

    """
    start, stop, _ = (span or slice(None)).indices(len(chunk))
    events: Rows = chunk.events
    if (start, stop) != (0, len(chunk)):
        events = events[start:stop] if isinstance(events, list) else events.slice(start, stop - start)
    schema = encoder if isinstance(encoder, Schema) else encoder.schema
    if schema is not None and schema.unknown == "refuse" and not isinstance(events, list):
        unknown = [name for name in events.column_names if name not in schema.names]
        if unknown:
            named = ", ".join(map(repr, unknown))
            raise DataError(
                f"{chunk.path_of(start)}: has columns that are no field of the schema: {named}; "
                + _use_them(unknown, config)
            )
    return encoder.encode(
        events,
        weight=None if chunk.weight is None or not learning else chunk.weight[start:stop],
        time=None if chunk.time is None or not learning else chunk.time[start:stop],
        on_error="collect",
        extend=learning,
    )


def _use_them(unknown: Sequence[str], config: Config) -> str:
    """How a job can use events with these unknown fields."""
    return f"to use such events, set {config.source.excluding(*unknown)} or schema.unknown=ignore"


def explain(
    errors: Iterable[EventError], schema: Schema, chunk: Chunk, config: Config, first_row: int = 0
) -> list[Rejection]:
    """Say which events of a chunk did not fit the schema, and why; rows are counted from `first_row`."""
    return [_explained(error, schema, chunk, first_row + error.index, config) for error in errors]


def _explained(error: EventError, schema: Schema, chunk: Chunk, row: int, config: Config) -> Rejection:
    field, value = error.field, error.value
    named = {"time": config.source.time, "weight": config.source.weight}
    column = named.get(field or "")
    if column is not None:
        # The engine knows event time and weight by these names; the person knows the column.
        event = chunk.reject(row, None, None, "").event
        field, value = column, event.get(column) if isinstance(event, dict) else value
    if field is not None and column is None and field not in schema.names:
        # How many fields there are, and so how long that is, nobody knows: what to do comes first.
        return chunk.reject(
            row, field, value, f"no field of the schema: {_use_them([field], config)} (expected {error.expected})"
        )
    return chunk.reject(row, field, value, f"expected {error.expected}")


def set_aside(rejections: Iterable[Rejection], quarantine: Quarantine, config: Config) -> None:
    """Put events that cannot be used into the quarantine, or raise for the first one if the job wants that."""
    for rejection in rejections:
        if config.output.on_error == "raise":
            raise DataError(f"{rejection} (output.on_error is 'raise')")
        quarantine.add(rejection)


def accepted_rows(batch: Batch) -> npt.NDArray[np.intp]:
    """Return the rows (n,) of the events in what was encoded."""
    return np.arange(batch.n_events) if batch.accepted is None else batch.accepted


class Answers:
    """What was predicted for the events of a chunk, batch by batch."""

    def __init__(self, chunk: Chunk, *, responsibilities: bool) -> None:
        self._chunk = chunk
        self._with_responsibilities = responsibilities
        self._kept: list[npt.NDArray[np.intp]] = []
        self._unknown: list[npt.NDArray[np.bool_]] = []
        self._predictions: list[Prediction] = []

    def add(self, first_row: int, batch: Batch, prediction: Prediction, n_unknown: int = 0) -> npt.NDArray[np.intp]:
        """Take the answers for a batch, of which the first ones mean nothing yet; return its rows (n,) in the chunk."""
        self._kept.append(first_row + accepted_rows(batch))
        self._unknown.append(np.arange(batch.n_events) < n_unknown)
        self._predictions.append(prediction)
        return self._kept[-1]

    def write(self, sink: ScoreSink, learner: OnlineEM | BatchEM) -> None:
        """Write the events and the answers for them."""
        predictions = self._predictions
        if not any(map(len, self._kept)):
            return
        scored = ScoredRows(
            self._chunk,
            np.concatenate(self._kept),
            np.concatenate(self._unknown),
            np.concatenate([one.log_prob for one in predictions]),
            np.concatenate([one.component for one in predictions]),
            np.concatenate([one.responsibilities for one in predictions]) if self._with_responsibilities else None,
            learner.component_ids.tolist(),
        )
        sink.add(scored)


def open_scored_events(
    config: Config, path: Path, schema: Schema, *, roll_events: int | None = None, after: Committed | None = None
) -> ScoredEvents:
    """Open a file of scored events, see there."""
    section, output = config.source, config.output
    carried = dict.fromkeys(section.exclude, "excluded")
    label = section.label or ("label" if section.river is not None else None)
    for role, name in (("label", label), ("time", section.time), ("weight", section.weight)):
        if name is not None:
            carried[name] = role
    return ScoredEvents(
        path,
        schema,
        carried,
        prefix=output.prefix,
        roll_events=roll_events,
        after=after,
    )


def load_learner(path: Path) -> OnlineEM | BatchEM:
    """Return the learner that a snapshot holds."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a snapshot; name the .arrow file in it")
    if not path.exists():
        raise DataError(f"{path}: there is no such file; a snapshot is what run, fit and merge write")
    return load(path)


def nothing_usable(source: Source, quarantine: Quarantine) -> DataError:
    """The error of a source without a single usable event."""
    if not quarantine.count:
        return DataError(f"{source.name}: no event was learned from")
    reason, count = quarantine.reasons.most_common(1)[0]
    example = "" if quarantine.first is None else f"; the first: {quarantine.first}"
    return DataError(
        f"{source.name}: none of its {counted(quarantine.count, 'event')} could be used; {count:,} of them because of "
        f"{reason}{example}"
    )


def report(console: Console, learner: OnlineEM | BatchEM, quarantine: Quarantine, left_out: Counter[str]) -> None:
    """Say what was learned, and what was left out."""
    console.print(component_table(learner))
    if isinstance(learner, OnlineEM) and learner.structure is not None:
        born, died, merged, split = learner.structure_changes
        say(console, f"components: {born:,} born, {died:,} died, {counted(merged, 'pair')} merged, {split:,} split")
    report_counts(console, quarantine, left_out, learner.ignored_fields)
    if isinstance(learner, OnlineEM) and learner.n_ahead:
        say(
            console,
            f"{counted(learner.n_ahead, 'event')} {'was' if learner.n_ahead == 1 else 'were'} dated further ahead of "
            "the others than learner.schedule.max_ahead, and learned as if dated with the newest of those",
            "yellow",
        )
    for field in _likely_ids(learner):
        guess = "; is it an id? Added"
        if all(map(is_number, field.categories)):
            guess = ", and these are numbers written as text: convert the column to numbers. If it is an id, added"
        say(
            console,
            f"field {field.name!r}: nearly every value is none of the {field.max_categories} that are kept{guess} to "
            "source.exclude, it is kept from the model",
            "yellow",
        )
    if quarantine.count > learner.n_events:
        say(
            console,
            f"more events could not be used than could: the model is that of the {counted(learner.n_events, 'event')} "
            "that are left. Do schema.fields and source.* say what the columns hold?",
            "bold yellow",
        )


def _likely_ids(learner: OnlineEM | BatchEM) -> list[Field]:
    """Category fields whose values are nearly all beyond a vocabulary that is full."""
    found = []
    for field in () if learner.schema is None else learner.schema.fields:
        if field.kind == "category" and len(field.categories) == field.max_categories:
            unseen = "".join(field.categories) + "?"  # longer than all of them, and so none
            if learner.marginal([field.name]).log_prob([{field.name: unseen}])[0] > np.log(_SHARE_OF_NEW):
                found.append(field)
    return found


def report_counts(console: Console, quarantine: Quarantine, left_out: Counter[str], ignored: dict[str, int]) -> None:
    """Say how many events, and values of which fields, were left out."""
    if quarantine.count:
        are = "is" if quarantine.count == 1 else "are"
        say(console, f"{counted(quarantine.count, 'event')} could not be used and {are} in quarantine:", "yellow")
        # Behind a quote left open, which counts as one event, many may have been lost.
        commonest = quarantine.reasons.most_common()
        first = [one for one in commonest if OPEN_QUOTE in one[0]][:_MOST_QUOTES]
        reasons = [*first, *(one for one in commonest if one not in first)]
        for reason, count in reasons[:_MOST_REASONS]:
            say(console, f"  {count:,} × {reason}")
        if len(reasons) > _MOST_REASONS:
            say(console, f"  and {counted(len(reasons) - _MOST_REASONS, 'more reason')}")
    for name, count in Counter(ignored).most_common(5):
        say(console, f"field {name!r} is not in the schema and was ignored in {counted(count, 'event')}", "yellow")
    if len(ignored) > 5:
        say(console, f"the same goes for {counted(len(ignored) - 5, 'more field')}", "yellow")
    for name, count in left_out.items():
        say(console, f"field {name!r} of {counted(count, 'event')} has no place in the scored events", "yellow")


def list_files(console: Console, paths: Iterable[Path | str]) -> None:
    """Say what was written."""
    for path in paths:
        say(console, f"wrote {path}")
