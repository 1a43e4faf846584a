"""Snapshots: model, schema, parameters, statistics and counters in one Arrow IPC file. Never pickle.

The file holds one record batch with a row for each array (name, type, shape, bytes), and a JSON header in
the metadata of its Arrow schema, with a digest of both. Any Arrow reader opens it; nothing in it is code.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_em.arrays import Arrays, each_row, from_rows, to_rows
from stream_em.clock import Clock
from stream_em.families import family_from_specification, specification_of_family
from stream_em.learners import BatchEM, BatchRun, OnlineEM
from stream_em.learners.averaging import Average
from stream_em.methods import FIEM, Incremental, Method, VarianceReduced
from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import LARGEST_VALUE, LARGEST_WHOLE, SMALLEST_WEIGHT
from stream_em.schedules import Constant, HalfLife, Harmonic, RobbinsMonro, Schedule
from stream_em.schema import Batch, Field, FieldCounts, Schema
from stream_em.seeding import concatenate
from stream_em.snapshot_file import read_rows, write_rows
from stream_em.state import State
from stream_em.statistics import Moments, Statistics, Sums, Window
from stream_em.structure import AdaptiveComponents, StructureChanges, StructureState
from stream_em.truncation import ExpandingTruncations, TruncationState

FORMAT_VERSION = 1
HEADER_KEY = b"stream_em"
DIGEST_KEY = b"stream_em_digest"
# Random bytes in the name of a temporary file.
TOKEN_BYTES = 8
SCHEDULES: dict[str, type[Schedule]] = {
    "harmonic": Harmonic,
    "robbins_monro": RobbinsMonro,
    "constant": Constant,
    "half_life": HalfLife,
}
METHODS: dict[str, type[Method]] = {"incremental": Incremental, "variance_reduced": VarianceReduced, "fiem": FIEM}

# Events have values and weights up to 1e100 (`LARGEST_VALUE`); rounding may take means a little beyond.
LARGEST_MEAN, LARGEST_STATISTICS = 2.0 * LARGEST_VALUE, LARGEST_VALUE**3
LARGEST_WEIGHT = LARGEST_VALUE * LARGEST_WHOLE

# Headers up to this size take little memory whatever they hold; longer ones hold no more lists and objects than one in
# so many bytes.
SMALL_HEADER, BYTES_FOR_A_CONTAINER = 2**16, 8

Learner = OnlineEM | BatchEM


class SnapshotError(ValueError):
    """Raised when a file is no snapshot that this version can load, or is damaged."""


def save(learner: Learner, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a learner to a file, all or nothing.

    The snapshot goes to a temporary file in the same folder, is flushed to disk, and is then renamed, so a
    reader finds either the old one whole or the new one whole. There is no lock: of two that save to one file at a time
    the last to rename wins. (Jobs of the command lock what they write.)

    Parameters
    ----------
    learner
        An `OnlineEM` (in its warm-up too) or a fitted `BatchEM`.
    path
        The file; an existing one is replaced.
    metadata
        Anything of the caller's that JSON can hold.

    Raises
    ------
    TypeError
        When it is no learner; estimators of River and scikit-learn have a `to_snapshot` of their own.
    SnapshotError
        When it has nothing to save yet, or a setting or the metadata cannot be written.

    >>> import tempfile
    >>> from stream_em import Gaussian
    >>> learner = OnlineEM(Mixture(Gaussian(), 2), warm_up=4).update(np.array([[0.0], [0.1], [5.0], [5.1]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(learner, Path(folder) / "model.arrow")
    ...     again = load(Path(folder) / "model.arrow")
    >>> np.array_equal(again.parameters.components.mean, learner.parameters.components.mean)
    True

    """
    # What a link points to is replaced, not the link.
    target = Path(path).resolve()
    content = to_bytes(learner, metadata=metadata)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(TOKEN_BYTES)}.pending")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The rename itself is durable only once the folder is on disk.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files of those who were killed while saving to a file; nobody may be saving to it now."""
    target = Path(path).resolve()
    # Nothing longer, which may be the temporary file of another whose name begins with this one's.
    token = "[0-9a-f]" * 2 * TOKEN_BYTES
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.{token}.pending"):
        temporary.unlink()


def load(path: str | os.PathLike[str]) -> Learner:
    """Return the learner that a file holds.

    Raises
    ------
    SnapshotError
        When the file is damaged, no snapshot, or of a newer format.
    FileNotFoundError
        When there is no such file.

    """
    return from_bytes(Path(path).read_bytes(), source=str(path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `metadata` that was saved with a snapshot."""
    return metadata_from_bytes(Path(path).read_bytes(), source=str(path))


def metadata_from_bytes(content: bytes, *, source: str = "snapshot") -> dict[str, Any]:
    """Return the `metadata` that `to_bytes` was given."""
    header, _ = _read(content, source)
    return dict(header["metadata"])


def to_bytes(learner: Learner, *, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Return the snapshot of a learner as bytes."""
    _check_kind(learner)
    header, arrays = _state_of(learner)
    header["metadata"] = dict(metadata or {})
    try:
        text = json.dumps(header, allow_nan=False, default=_plain_number)
        _check_size(text.encode())
    except (TypeError, ValueError) as error:
        raise SnapshotError(f"a setting or the metadata cannot be written as JSON: {error}") from None
    rows = to_rows(arrays, {HEADER_KEY: text.encode()})
    return write_rows(
        rows.replace_schema_metadata({**rows.schema.metadata, DIGEST_KEY: digest_of(text.encode(), rows)})
    )


def _check_kind(learner: object) -> None:
    if not isinstance(learner, Learner):
        hint = ": its own method writes one, model.to_snapshot(path)" if hasattr(learner, "to_snapshot") else ""
        raise TypeError(f"a snapshot is made of an OnlineEM or a BatchEM, got {type(learner).__name__}{hint}")


def _plain_number(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is of type {type(value).__name__}")


def from_bytes(content: bytes, *, source: str = "snapshot") -> Learner:
    """Return the learner that `to_bytes` wrote.

    Raises
    ------
    SnapshotError
        When the bytes are damaged, no snapshot, or of a newer format.

    """
    header, arrays = _read(content, source)
    try:
        # Numbers beyond all bounds overflow here, and are refused for what comes of it.
        with np.errstate(over="ignore", invalid="ignore"):
            return _learner_of(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise SnapshotError(f"{source}: the snapshot is inconsistent: {reason}") from error


def _read(content: bytes, source: str) -> tuple[dict[str, Any], Arrays]:
    try:
        rows = read_rows(content)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SnapshotError(f"{source}: not a stream_em snapshot, or a damaged one: {error}") from None
    stated = rows.schema.metadata or {}
    text = stated.get(HEADER_KEY)
    if text is None:
        raise SnapshotError(f"{source}: not a stream_em snapshot (the header is missing)")
    try:
        _check_size(text)
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{source}: the snapshot's header is damaged: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise SnapshotError(f"{source}: the snapshot's header is damaged: it states no format")
    if header["format"] != FORMAT_VERSION:
        raise SnapshotError(
            f"{source}: the snapshot has format {header['format']}, written by stream_em "
            f"{header.get('library')}; this version reads format {FORMAT_VERSION}"
        )
    if not isinstance(header.get("metadata"), dict):
        raise SnapshotError(f"{source}: the snapshot's header is damaged: it holds no metadata")
    if stated.get(DIGEST_KEY) != digest_of(text, rows):
        raise SnapshotError(f"{source}: the snapshot is damaged: its content does not match its digest")
    try:
        return header, from_rows(rows)
    except ValueError as error:
        raise SnapshotError(f"{source}: {error}") from None


def _check_size(header: bytes) -> None:
    """Check that a header takes no more memory, as objects, than some times its length.

    Text and numbers take up to a dozen times their length, but a list of two characters takes thirty times its own.
    """
    containers = header.count(b"[") + header.count(b"{")
    if len(header) > SMALL_HEADER and containers > len(header) // BYTES_FOR_A_CONTAINER:
        raise ValueError(
            f"{containers:,} lists and objects in {len(header):,} bytes of JSON are more than one in "
            f"{BYTES_FOR_A_CONTAINER} bytes; put numbers into longer lists"
        )


def digest_of(header: bytes, rows: pa.RecordBatch) -> bytes:
    """Fingerprint of everything in a snapshot: a number changed by a damaged disk is still a number."""
    digest = hashlib.blake2b(header, digest_size=16)
    for name, kind, shape, data in each_row(rows):
        digest.update(f"{name!r} {kind!r} {shape!r} ".encode())
        digest.update(data or b"")
    return digest.hexdigest().encode()


def _library_version() -> str:
    try:
        return version("stream-em")
    except PackageNotFoundError:
        return "unknown"


def _state_of(learner: Learner) -> tuple[dict[str, Any], Arrays]:
    schema = learner.schema
    arrays: Arrays = {}
    header: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "library": _library_version(),
        "kind": type(learner).__name__,
        "model": {
            "family": specification_of_family(learner.model.family),
            "n_components": int(learner.model.n_components),
            "prior_weight": float(learner.model.prior_weight),
            "assignment": learner.model.assignment,
        },
        "schema": None if schema is None else _specification_of_schema(schema),
        "n_events": learner.n_events,
        "ignored_fields": dict(learner.ignored_fields),
        "origin": learner.origin,
        "statistics": None,
        "learner": {name: getattr(learner, name) for name in learner.OPTIONS},
    }
    statistics = learner.statistics
    if statistics is not None:
        header["statistics"] = _add_statistics(arrays, "statistics", statistics)
    if isinstance(learner, BatchEM):
        if learner._parameters is None:
            raise SnapshotError("a BatchEM must be fitted before it is saved")
        header["learner"] |= {
            "method": None if learner.method is None else _specification_of("method", learner.method, METHODS),
            "history": learner.history,
            "converged": learner.converged,
            "halvings": learner.halvings,
        }
        _add_parameters(arrays, "parameters", learner, learner._parameters)
        return header, arrays
    header["learner"] |= {
        "schedule": _specification_of("schedule", learner.schedule, SCHEDULES),
        "total_weight": learner._state.total_weight,
        "n_updates": learner._state.n_updates,
        "unseen": list(learner._unseen),
        "clock": None if learner._clock == Clock() else vars(learner._clock),
        "n_averaged": [learner._average.n_reported, learner._average.n_running],
        "structure": None if learner.structure is None else vars(learner.structure),
        "truncation": None if learner.truncation is None else vars(learner.truncation),
    }
    if learner.structure is not None:
        header["structure"] = _add_structure(arrays, learner._structure)
    if learner.truncation is not None:
        start = learner._truncation.start
        header["truncation"] = {
            "level": learner._truncation.level,
            "count": learner._truncation.count,
            "start": None if start is None else _add_statistics(arrays, "start", start),
        }
    if learner.window is not None:
        header["blocks"] = {
            "counts": list(learner._window.counts),
            **{
                name: [_add_statistics(arrays, f"{name}/{at}", one) for at, one in enumerate(blocks)]
                for name, blocks in _blocks_of(learner._window).items()
            },
        }
    for name, parameters in (
        ("iterate", learner._state.iterate),
        ("reported", learner._average.reported),
        ("running", learner._average.running),
    ):
        if parameters is not None:
            _add_parameters(arrays, name, learner, parameters)
    if learner._buffer:
        _add_events(arrays, "buffer", concatenate(learner._buffer))
    return header, arrays


def _add_events(arrays: Arrays, name: str, events: Batch) -> None:
    for key, array in (("values", events.values), ("weight", events.weight), ("time", events.time)):
        if array is not None:
            arrays[f"{name}/{key}"] = array


def _add_structure(arrays: Arrays, state: StructureState) -> dict[str, Any]:
    """Add the events that an adaptive number of components holds; return what else it remembers."""
    for name, events in (("recent", state.recent), ("poor", state.poor)):
        if events is not None:
            _add_events(arrays, name, events)
    if state.poor_at is not None:
        arrays["poor_at"] = state.poor_at
    return {
        "threshold": state.threshold,
        "n_poor": state.n_poor,
        "checked_at": state.checked_at,
        "wait": state.wait,
        "turn": state.turn,
        "changes": list(state.changes),
    }


def _add_statistics(arrays: Arrays, name: str, statistics: Statistics) -> dict[str, Any]:
    """Add the arrays of statistics; return what else they hold."""
    arrays[f"{name}/component_ids"] = statistics.component_ids
    for part_name, part in statistics.parts.items():
        arrays.update({f"{name}/parts/{part_name}:{key}": array for key, array in part.arrays().items()})
    return {
        "log_likelihood": statistics.log_likelihood,
        "half_life": statistics.half_life,
        "time": statistics.time,
    }


def _add_parameters(arrays: Arrays, name: str, learner: Learner, parameters: MixtureParameters) -> None:
    arrays[f"{name}/weights"] = parameters.weights
    arrays[f"{name}/component_ids"] = parameters.component_ids
    family = learner._bound_model().family
    arrays.update({f"{name}/components/{key}": array for key, array in family.arrays(parameters.components).items()})


def _blocks_of(window: Window) -> dict[str, tuple[Statistics, ...]]:
    of_newer = () if window.of_newer is None else (window.of_newer,)
    return {"older": window.older, "newer": window.newer, "of_newer": of_newer}


def _window_of(
    learner: Learner, parameters: MixtureParameters | None, blocks: Mapping[str, Any], arrays: Arrays
) -> Window:
    older, newer, of_newer = (
        tuple(
            _statistics_of(learner, parameters, scalars, arrays, f"{name}/{at}")
            for at, scalars in enumerate(blocks[name])
        )
        for name in ("older", "newer", "of_newer")
    )
    counts = tuple(_whole(count) for count in blocks["counts"])
    if len(counts) != len(older) + len(newer) or len(of_newer) != min(1, len(newer)):
        raise ValueError("the blocks of the window do not fit together")
    return Window(older, newer, of_newer[0] if of_newer else None, counts)


def _specification_of(what: str, setting: Schedule | Method, kinds: Mapping[str, type[Any]]) -> dict[str, Any]:
    for kind, one in kinds.items():
        if type(setting) is one:
            return {"kind": kind, **vars(setting)}
    raise SnapshotError(f"a {what} of type {type(setting).__name__} cannot be saved; use one of {', '.join(kinds)}")


def _clock_of(specification: Mapping[str, Any]) -> Clock:
    votes, ahead = _whole(specification["votes"]), specification["ahead"]
    if (votes > 0) != (ahead is not None):
        raise ValueError("the events dated ahead and their dates do not fit together")
    if ahead is not None:
        earliest, last = map(_finite, ahead)
        if earliest > last:
            raise ValueError(f"the last of the dates ahead is before the first: {ahead}")
        ahead = earliest, last
    return Clock(votes, ahead, _whole(specification["n_ahead"]))


def _specification_of_schema(schema: Schema) -> dict[str, Any]:
    fields = [
        {
            "name": one.name,
            "kind": one.kind,
            "categories": list(one.categories),
            "max_categories": one.max_categories,
        }
        for one in schema.fields
    ]
    return {"fields": fields, "unknown": schema.unknown}


def _schema_of(specification: Mapping[str, Any]) -> Schema:
    fields = []
    for one in specification["fields"]:
        if not (isinstance(one["name"], str) and all(isinstance(label, str) for label in one["categories"])):
            raise ValueError("field names and categories must be strings")
        fields.append(Field(one["name"], one["kind"], tuple(one["categories"]), _whole(one["max_categories"])))
    return Schema(fields, unknown=specification["unknown"])


def _whole(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < LARGEST_WHOLE:
        raise ValueError(f"expected a whole number of at least {least}, got {value!r}")
    return value


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


def _learner_of(header: dict[str, Any], arrays: Arrays) -> Learner:
    specification = header["model"]
    model = Mixture(
        family_from_specification(specification["family"]),
        _whole(specification["n_components"], 1),
        _finite(specification["prior_weight"]),
        specification["assignment"],
    )
    schema = None if header["schema"] is None else _schema_of(header["schema"])
    options, n_events = dict(header["learner"]), _whole(header["n_events"])
    learner: Learner
    if header["kind"] == "BatchEM":
        history = [_finite(value) for value in options.pop("history")]
        converged = bool(options.pop("converged"))
        # Snapshots of earlier versions, which had but one method, name none.
        halvings = _whole(options.pop("halvings", 0))
        stated = options.pop("method", None)
        method = None if stated is None else METHODS[stated["kind"]](**{k: v for k, v in stated.items() if k != "kind"})
        learner = BatchEM(model, method=method, schema=schema, **options)
        parameters = _parameters_of(learner, arrays, "parameters")
        if parameters is None:
            raise ValueError("there are no parameters")
        statistics = None
        if header["statistics"] is not None:
            statistics = _statistics_of(learner, parameters, header["statistics"], arrays)
        run = BatchRun(parameters, "", None, statistics, tuple(history), converged, halvings)
        learner.adopt(run, learner._bound_model(), n_events=n_events)
    elif header["kind"] == "OnlineEM":
        total_weight, n_updates = _finite(options.pop("total_weight")), _whole(options.pop("n_updates"))
        unseen = tuple(_whole(position) for position in options.pop("unseen"))
        if unseen and (schema is None or max(unseen) >= len(schema)):
            raise ValueError(f"fields without a value are at positions {unseen}, which do not exist")
        # Snapshots of earlier versions, which believed every date, have no clock.
        clock = options.pop("clock", None)
        n_reported, n_running = (_whole(count) for count in options.pop("n_averaged"))
        # Snapshots of earlier versions have neither of these.
        for name, kind in (("structure", AdaptiveComponents), ("truncation", ExpandingTruncations)):
            if options.get(name) is not None:
                options[name] = kind(**options[name])
        schedule = dict(options.pop("schedule"))
        learner = OnlineEM(model, schedule=SCHEDULES[schedule.pop("kind")](**schedule), schema=schema, **options)
        if not isinstance(options["averaging"], bool):
            raise ValueError(f"averaging must be true or false, got {options['averaging']!r}")
        if total_weight < 0.0:
            raise ValueError(f"the total weight must be >= 0, got {total_weight}")
        iterate = learner._parameters = _parameters_of(learner, arrays, "iterate")
        learner._unseen = unseen
        if clock is not None:
            learner._clock = _clock_of(clock)
        learner._state = State(
            None if header["statistics"] is None else _statistics_of(learner, iterate, header["statistics"], arrays),
            iterate,
            n_events,
            total_weight,
            n_updates,
        )
        if learner.structure is not None:
            learner._structure = _structure_of(learner, header["structure"], arrays)
        if learner.truncation is not None:
            learner._truncation = _truncation_of(learner, iterate, header["truncation"], arrays)
        if learner.window is not None:
            learner._window = _window_of(learner, iterate, header["blocks"], arrays)
        reported, running = (_parameters_of(learner, arrays, name, like=iterate) for name in ("reported", "running"))
        if any((count > 0) != (one is not None) for count, one in ((n_reported, reported), (n_running, running))):
            raise ValueError("the averages and the numbers of parameters that they are of do not fit together")
        learner._average = Average(reported, n_reported, running, n_running)
        if learner.averaging and learner._average.reported is not None:
            learner._parameters = learner._average.reported
        if "buffer/values" in arrays and schema is not None:
            learner._buffer = [_events_of(schema, arrays, "buffer")]
    else:
        raise ValueError(f"unknown kind of learner {header['kind']!r}")
    learner.ignored_fields = FieldCounts({name: _whole(count) for name, count in header["ignored_fields"].items()})
    learner.origin = str(header["origin"])
    return learner


def _parameters_of(
    learner: Learner, arrays: Arrays, name: str, *, like: MixtureParameters | None = None
) -> MixtureParameters | None:
    if f"{name}/weights" not in arrays:
        return None
    weights, n_components = arrays[f"{name}/weights"], learner.model.n_components
    if like is not None:
        n_components = like.n_components
    elif isinstance(learner, OnlineEM) and learner.structure is not None:
        n_components = weights.size
    component_ids = _component_ids(arrays[f"{name}/component_ids"], n_components)
    if (
        weights.shape != (n_components,)
        or not (weights > 0.0).all()
        or not math.isclose(weights.sum(), 1.0, rel_tol=1e-9)
    ):
        raise ValueError(f"the weights of {name} are not {n_components} positive numbers that sum to 1")
    prefix = f"{name}/components/"
    family = learner._bound_model().family
    components = family.from_arrays(
        {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}
    )
    shape = (n_components, len(learner._known_schema()))
    mean, variance = family.moments(components)
    if mean.shape != shape or variance.shape != shape:
        raise ValueError(f"the parameters of {name} are not those of {n_components} components of the schema's fields")
    if not ((np.abs(mean) <= LARGEST_MEAN).all() and (variance <= 2.0 * LARGEST_MEAN**2).all()):
        raise ValueError(f"the parameters of {name} are beyond those of any events")
    return MixtureParameters(weights, components, component_ids)


def _component_ids(array: npt.NDArray[Any], n_components: int) -> npt.NDArray[np.int64]:
    if array.dtype != np.int64 or array.shape != (n_components,) or len(np.unique(array)) != n_components:
        raise ValueError(f"component ids must be {n_components} different whole numbers")
    return array


def _ids_of_statistics(array: npt.NDArray[Any], parameters: MixtureParameters) -> npt.NDArray[np.int64]:
    if not np.array_equal(np.sort(_component_ids(array, parameters.n_components)), np.sort(parameters.component_ids)):
        raise ValueError("the statistics and the parameters are of components with different ids")
    return array


def _statistics_of(
    learner: Learner,
    parameters: MixtureParameters | None,
    scalars: Mapping[str, Any],
    arrays: Arrays,
    at: str = "statistics",
) -> Statistics:
    schema = learner._known_schema()
    if parameters is None:
        raise ValueError("there are statistics but no parameters")
    n_components = parameters.n_components
    # A single component shows the shapes: an E-step of them all may take far more memory than the file.
    one, nothing = replace(learner.model, n_components=1), Batch(np.empty((len(schema), 0)), schema)
    parts: dict[str, Sums | Moments] = {}
    for name, template in one.e_step(one.pooled(nothing), nothing).parts.items():
        found = {key: arrays[f"{at}/parts/{name}:{key}"] for key in template.arrays()}
        for key, of_one in template.arrays().items():
            shared = isinstance(template, Moments) and template.is_tied and key == "scatter"
            expected = of_one.shape if shared else (n_components, *of_one.shape[1:])
            if found[key].shape != expected or found[key].dtype != np.float64:
                raise ValueError(f"the statistics {name!r} have shape {found[key].shape}, expected {expected}")
            if not np.isfinite(found[key]).all():
                raise ValueError(f"the statistics {name!r} are not finite")
            largest = LARGEST_WEIGHT if key == "weight" or name == "components" else LARGEST_STATISTICS
            if np.abs(found[key]).max(initial=0.0) > largest:
                raise ValueError(f"the statistics {name!r} are beyond those of any events")
        parts[name] = type(template)(**found)
        separate = "weight" in found and found["weight"].ndim == 2
        never_negative = {"values", "weight", "scatter"} if separate else {"values", "weight"}
        if any((array < 0.0).any() for key, array in found.items() if key in never_negative):
            raise ValueError(f"the statistics {name!r} hold negative weights or sums")
        part = parts[name]
        if isinstance(part, Moments):
            _check_moments(name, part)
    time, half_life = scalars["time"], scalars["half_life"]
    expected_half_life = learner.schedule.half_life if isinstance(learner, OnlineEM) else None
    if half_life != expected_half_life or (half_life is None and time is not None):
        raise ValueError(
            f"the statistics have the half-life {half_life!r} and the time {time!r}, the schedule other ones"
        )
    statistics = Statistics(
        parts,
        _finite(scalars["log_likelihood"]),
        _ids_of_statistics(arrays[f"{at}/component_ids"], parameters),
        expected_half_life,
        None if time is None else _finite(time),
    )
    # What the M-step makes of them must be parameters that would be read.
    family, made = learner._bound_model().family, learner._bound_model().m_step(statistics)
    family.from_arrays(family.arrays(made.components))
    return statistics


def _check_moments(name: str, moments: Moments) -> None:
    """Check that moments are within the bounds of any events, and a joint scatter symmetric.

    Whether it has negative directions tells nothing: where one event outweighs all others, or fields are nearly
    collinear, rounding alone gives it some, and the M-step sees to them.
    """
    scatter, weight = moments.scatter, moments.weight
    of_fields = weight if moments.is_separate else weight[:, None]
    squares, held = of_fields * moments.mean**2, np.broadcast_to(of_fields, moments.mean.shape)
    if not moments.is_separate:
        scatter = np.abs(scatter).max(axis=-1, initial=0.0)
    if moments.is_tied:
        squares, held = np.add.reduce(squares), np.add.reduce(held)
    # Of means and of mean squares, merging makes averages, so what is within these bounds stays within them.
    bounded = scatter + squares <= np.maximum(held, SMALLEST_WEIGHT) * LARGEST_MEAN**2
    if not (bounded.all() and (np.abs(moments.mean) <= LARGEST_MEAN).all()):
        raise ValueError(f"the statistics {name!r} are beyond those of any events")
    if moments.is_separate:
        return
    asymmetry = np.abs(moments.scatter - moments.scatter.swapaxes(-1, -2)).max(axis=(-2, -1), initial=0.0)
    if not (asymmetry <= 1e-6 * np.abs(moments.scatter).max(axis=(-2, -1), initial=0.0)).all():
        raise ValueError(f"the statistics {name!r} hold a scatter that is not symmetric")


def _events_of(schema: Schema, arrays: Arrays, name: str) -> Batch:
    values = arrays[f"{name}/values"]
    if values.ndim != 2 or len(values) != len(schema):
        raise ValueError(f"the events that are held as {name!r} do not fit the schema")
    events = Batch(values, schema, arrays.get(f"{name}/weight"), arrays.get(f"{name}/time"))
    schema.check(events)
    return events


def _structure_of(learner: OnlineEM, specification: Mapping[str, Any], arrays: Arrays) -> StructureState:
    assert learner.structure is not None
    recent, poor = (
        _events_of(learner._known_schema(), arrays, name) if f"{name}/values" in arrays else None
        for name in ("recent", "poor")
    )
    most, poor_at = learner.structure.recent_events, arrays.get("poor_at")
    if any(one is not None and not 0 < one.n_events <= most for one in (recent, poor)):
        raise ValueError(f"the events that moves are judged by must be 1 to {most}")
    if (poor is None) != (poor_at is None):
        raise ValueError("the poorly explained events and the numbers of events before them do not fit together")
    if poor is not None and poor_at is not None:
        counts = poor_at if poor_at.dtype == np.int64 and poor_at.shape == (poor.n_events,) else np.array([-1])
        if not (counts[0] >= 0 and (np.diff(counts) >= 0).all() and counts[-1] <= learner.n_events):
            raise ValueError("the numbers of events before the poorly explained ones are out of range")
    threshold, checked_at = specification["threshold"], _whole(specification["checked_at"])
    if checked_at > learner.n_events:
        raise ValueError(f"the last check was at {checked_at} events, of which there are {learner.n_events}")
    return StructureState(
        recent,
        poor,
        poor_at,
        None if threshold is None else _finite(threshold),
        _whole(specification["n_poor"]),
        checked_at,
        _whole(specification["wait"], 1),
        _whole(specification["turn"]),
        StructureChanges(*(_whole(count) for count in specification["changes"])),
    )


def _truncation_of(
    learner: OnlineEM, iterate: MixtureParameters | None, specification: Mapping[str, Any], arrays: Arrays
) -> TruncationState:
    scalars = specification["start"]
    return TruncationState(
        None if scalars is None else _statistics_of(learner, iterate, scalars, arrays, "start"),
        _whole(specification["level"]),
        _whole(specification["count"]),
    )
