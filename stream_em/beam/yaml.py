"""Transforms for Beam YAML: rows in, rows out, options that YAML can spell. `pipelines/providers.yaml` names them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import apache_beam as beam
from apache_beam.ml.inference.base import PredictionResult, RunInference
from apache_beam.typehints.row_type import RowTypeConstraint

from stream_em.beam.events import RejectedEvent
from stream_em.beam.per_key import RefitPerKey
from stream_em.beam.refit import Refit
from stream_em.beam.serving import MixtureModelHandler
from stream_em.beam.storage import write_file
from stream_em.beam.writing import WriteSnapshots
from stream_em.columns import Roles
from stream_em.families import automatic_family
from stream_em.learners import BatchEM
from stream_em.models import Mixture
from stream_em.plain import plain
from stream_em.schema import Field, Kind, Schema, SchemaError
from stream_em.sources.faults import nearest
from stream_em.store import to_bytes

_GOOD = "good"
_Covariances = Literal["full", "tied", "diag", "spherical"]


class YamlRefit(beam.PTransform):
    """Batch EM in one pipeline, `StreamEMRefit` in Beam YAML: writes a snapshot and hands on a row for each component.

    Parameters
    ----------
    snapshot
        File of the snapshot, on any file system that Beam knows.
    fields
        Kind of every field of the model, or the list of its categories; what else is in a row is left out.
    n_components
        Number of components.
    iterations
        EM iterations, chained in the pipeline.
    covariance_type
        Shape of the covariances of the numeric fields.
    weight
        Column with the sample weight of an event.
    n_init, seed
        As of `BatchEM`.
    error_handling
        `{output: name}` of Beam YAML: rows that cannot be used go to the output of that name, with `element`, the row
        as JSON, and `msg`, the reason. Left out, they are only counted, by Beam's counter `rejected`.

    Raises
    ------
    SchemaError
        When the categories of a field are not listed, or not as text, or the rows have no such column.

    >>> import tempfile
    >>> from apache_beam.testing.util import assert_that
    >>> def check(rows):
    ...     assert sorted(round(row.weight, 2) for row in rows) == [0.25, 0.75]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     refit = YamlRefit(f"{folder}/model.arrow", {"x": "numeric"}, n_components=2, iterations=5)
    ...     with beam.Pipeline("FnApiRunner") as pipeline:
    ...         rows = pipeline | beam.Create([beam.Row(x=x) for x in [0.0, 9.0, 9.5, 10.0] * 9])
    ...         _ = assert_that(rows | refit, check)

    """

    def __init__(
        self,
        snapshot: str,
        fields: Mapping[str, Kind | list[str]],
        *,
        n_components: int = 8,
        iterations: int = 10,
        covariance_type: _Covariances = "full",
        weight: str | None = None,
        n_init: int = 1,
        seed: int = 0,
        error_handling: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.snapshot = snapshot
        self.columns = _named(*fields, weight)
        self.errors = _ErrorRows(error_handling)
        schema, roles = _schema(fields), Roles(weight=weight, only=tuple(fields))
        self.refit = Refit(
            _mixture(schema, n_components, covariance_type),
            schema=schema,
            roles=roles,
            unrolled=iterations,
            n_init=n_init,
            seed=seed,
            rejected_to=None if error_handling is None else self.errors,
        )

    def expand(self, rows: beam.PCollection) -> Any:  # noqa: D102 - Beam's
        _check_columns(rows, self.columns)
        learners = rows | "As dicts" >> beam.Map(_as_dict) | self.refit
        components = learners | "Save" >> beam.ParDo(_Save(self.snapshot)).with_output_types(
            RowTypeConstraint.from_fields([("component", int), ("weight", float), ("description", str)])
        )
        return self.errors.beside(components)


class YamlRefitPerKey(beam.PTransform):
    """A model for each key, `StreamEMRefitPerKey` in Beam YAML: writes snapshots and hands on a row for each key.

    Parameters
    ----------
    key
        Column that holds an event's key.
    folder
        Folder of the snapshots, `<folder>/<key>/last.arrow`.
    fields, n_components, covariance_type, weight, n_init, seed, error_handling
        As of `YamlRefit`. A key with fewer events than components is an error too.

    """

    def __init__(
        self,
        key: str,
        folder: str,
        fields: Mapping[str, Kind | list[str]],
        *,
        n_components: int = 2,
        covariance_type: _Covariances = "full",
        weight: str | None = None,
        n_init: int = 1,
        seed: int = 0,
        error_handling: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.columns = _named(*fields, weight, key)
        self.errors = _ErrorRows(error_handling)
        schema = _schema(fields)
        self.refit = RefitPerKey(
            _mixture(schema, n_components, covariance_type),
            schema=schema,
            key=key,
            roles=Roles(weight=weight, only=tuple(fields)),
            n_init=n_init,
            seed=seed,
            rejected_to=None if error_handling is None else self.errors,
        )

    def expand(self, rows: beam.PCollection) -> Any:  # noqa: D102 - Beam's
        _check_columns(rows, self.columns)
        written = (
            rows
            | "As dicts" >> beam.Map(_as_dict)
            | self.refit
            | "Last" >> beam.MapTuple(lambda key, learner: (key, float("inf"), learner))
            | "Snapshots" >> beam.ParDo(WriteSnapshots(self.folder))
        )
        as_row = beam.MapTuple(lambda key, path: beam.Row(key=str(key), path=path))
        row_type = RowTypeConstraint.from_fields([("key", str), ("path", str)])
        return self.errors.beside(written | "Rows" >> as_row.with_output_types(row_type))


class YamlScore(beam.PTransform):
    """Component and log-density of each row, `StreamEMScore` in Beam YAML; rows that cannot be used get null and why.

    Parameters
    ----------
    snapshot
        File of the snapshot.
    exclude
        Columns that are not the model's.

    """

    def __init__(self, snapshot: str, *, exclude: list[str] | None = None) -> None:
        super().__init__()
        self.handler = MixtureModelHandler(snapshot, roles=Roles(exclude=tuple(exclude or ())))

    def expand(self, rows: beam.PCollection) -> beam.PCollection:  # noqa: D102 - Beam's
        known = RowTypeConstraint.from_user_type(rows.element_type) or rows.element_type
        added = [("component", int | None), ("log_prob", float | None), ("reason", str | None)]
        fields = [*getattr(known, "_fields", ()), *added]
        return (
            rows
            | RunInference(self.handler)
            | "Rows" >> beam.Map(_scored).with_output_types(RowTypeConstraint.from_fields(fields))
        )


class _ErrorRows(beam.PTransform):
    """Rejected events as the rows of the error output that Beam YAML names, if it names one."""

    def __init__(self, error_handling: Mapping[str, str] | None) -> None:
        super().__init__()
        named = isinstance(error_handling, Mapping) and set(error_handling) == {"output"}
        if error_handling is not None and not (named and error_handling["output"] != _GOOD):
            raise ValueError(f"error_handling: got {error_handling!r}, expected {{output: NAME}}, NAME not {_GOOD!r}")
        self.output = None if error_handling is None else error_handling["output"]

    def expand(self, rejected: beam.PCollection) -> beam.PCollection:
        self.rows = rejected | "Rows" >> beam.Map(_error_row).with_output_types(
            RowTypeConstraint.from_fields([("element", str), ("msg", str)])
        )
        return self.rows

    def beside(self, good: beam.PCollection) -> Any:
        """Return the outputs of a transform, for which the rejected events were handed to this one."""
        return good if self.output is None else {_GOOD: good, self.output: self.rows}


class _Save(beam.DoFn):
    """Write the snapshot of a learner; a row for each of its components."""

    def __init__(self, path: str) -> None:
        self.path = path

    def process(self, learner: BatchEM) -> Iterator[beam.Row]:
        write_file(self.path, to_bytes(learner))
        for component in learner.describe():
            text = ", ".join(f"{field.name} {field.text}" for field in component.fields)
            yield beam.Row(component=int(component.id), weight=float(component.weight), description=text)


def _schema(fields: Mapping[str, Kind | list[str]]) -> Schema:
    made = []
    for name, kind in fields.items():
        if kind == "category" or kind == []:
            raise SchemaError(f"field {name!r}: list its categories, {name}: [DE, FR]; no worker knows what others see")
        if not isinstance(kind, list):
            made.append(Field(name, kind))
            continue
        for category in kind:
            if not isinstance(category, str):
                raise SchemaError(f"field {name!r}: got the category {category!r}, expected text; put it in quotes")
        made.append(Field(name, "category", tuple(kind), max_categories=len(kind)))
    return Schema(made)


def _mixture(schema: Schema, n_components: int, covariance_type: _Covariances) -> Mixture:
    return Mixture(automatic_family(schema, covariance_type), n_components)


def _named(*columns: str | None) -> list[str]:
    return [column for column in columns if column is not None]


def _check_columns(rows: beam.PCollection, columns: list[str]) -> None:
    """Refuse rows that are known to lack a column: it would be a missing value in every event."""
    row_type = RowTypeConstraint.from_user_type(rows.element_type) or rows.element_type
    if isinstance(row_type, RowTypeConstraint):
        held = [name for name, _ in row_type._fields]
        for column in columns:
            if column not in held:
                raise SchemaError(
                    f"the rows have no column {column!r} (they have: {', '.join(held)}){nearest(column, held)}"
                )


def _error_row(rejected: RejectedEvent) -> beam.Row:
    return beam.Row(element=json.dumps(plain(rejected.event)), msg=rejected.reason)


def _as_dict(row: Any) -> dict[str, Any]:
    return dict(row) if isinstance(row, Mapping) else dict(row._asdict())


def _scored(result: PredictionResult) -> beam.Row:
    inference = result.inference
    if isinstance(inference, RejectedEvent):
        added: dict[str, Any] = {"component": None, "log_prob": None, "reason": inference.reason}
    else:
        added = {"component": int(inference.component), "log_prob": float(inference.log_prob), "reason": None}
    return beam.Row(**_as_dict(result.example), **added)
