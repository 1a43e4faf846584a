"""Serving: scores and soft clusters from a snapshot, through Beam's `RunInference`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from stream_em.beam.events import RejectedEvent, _event
from stream_em.beam.expectation import NAMESPACE, REJECTED
from stream_em.columns import Roles
from stream_em.learners import NotFittedError, Prediction
from stream_em.schema import Batch, EventError, FieldCounts, SchemaError, in_memory
from stream_em.seeding import concatenate
from stream_em.store import Learner, SnapshotError, from_bytes

# Beam's own handler takes any keyword and says nothing of those that it does not know.
_OPTIONS = {*inspect.signature(ModelHandler.__init__).parameters, "env_vars"} - {"self", "kwargs"}

_REASON = "reason"


class EventScore(NamedTuple):
    """What the model says of one event: the `inference` of its `PredictionResult`.

    Parameters
    ----------
    component
        Stable id of the most responsible component.
    log_prob
        Log-density log p(event).
    responsibilities
        Probability of each component given the event, by its id.

    >>> EventScore(4, -2.5, {0: 0.1, 4: 0.9}).anomaly_score
    2.5

    """

    component: int
    log_prob: float
    responsibilities: dict[int, float]

    @property
    def anomaly_score(self) -> float:
        """-log p(event): high where events are rare."""
        return 0.0 - self.log_prob


class Scores(NamedTuple):
    """What the model says of a batch of examples.

    Parameters
    ----------
    inferences
        For each example an `EventScore`, a table with a row for each of its events, or a `RejectedEvent`.
    n_events
        Events that were scored.
    n_rejected
        Events that could not be used.
    ignored_fields
        Names of unknown fields that were ignored, with the number of events that held them.

    """

    inferences: list[EventScore | pa.Table | RejectedEvent]
    n_events: int
    n_rejected: int
    ignored_fields: FieldCounts


class SnapshotModel:
    """The learner of a snapshot as `RunInference` holds it, or a proxy of it where processes share one.

    Parameters
    ----------
    learner
        An `OnlineEM` or a fitted `BatchEM`.
    roles
        Columns that are not the model's.

    Raises
    ------
    NotFittedError
        When the learner has seen no event.

    >>> from stream_em import BatchEM, Gaussian, Mixture
    >>> model = SnapshotModel(BatchEM(Mixture(Gaussian(), 1)).fit(np.array([[-1.0], [1.0]])))
    >>> usable, unusable = model.score([{"x0": 0.0}, {"x0": "high"}]).inferences
    >>> usable.component, usable.responsibilities, unusable.reason
    (0, {0: 1.0}, "event 0, field 'x0': got 'high', expected a number")

    """

    def __init__(self, learner: Learner, roles: Roles | None = None) -> None:
        self._ids: list[int] = learner.parameters.component_ids.tolist()
        assert learner.schema is not None
        self._learner = learner
        self._schema = learner.schema
        self._roles = roles

    def score(self, examples: Sequence[Any]) -> Scores:
        """Return what the model says of each example, from one E-step for all of them.

        Parameters
        ----------
        examples
            Single events: dicts, `beam.Row`s and named tuples, arrays (D,) in the order of the schema. Examples of many
            events: Arrow tables and record batches, frames, arrays (n, D), lists of dicts.

        """
        inferences: list[Any] = [None] * len(examples)
        parts: list[_Part] = []
        n_rejected = 0
        for part in self._parts(examples):
            try:
                part.batch = self._encode(part.events)
                parts.append(part)
            except SchemaError as error:
                n_rejected += part.reject(str(error), inferences)
        n_events = 0
        ignored_fields = FieldCounts()
        if parts:
            batches = [part.batch for part in parts]
            prediction = self._learner.score_events(batches[0] if len(batches) == 1 else concatenate(batches))
            for part, batch in zip(parts, batches):
                share = slice(n_events, n_events + batch.n_events)
                log_prob, component, responsibilities = prediction
                part.tell(Prediction(log_prob[share], component[share], responsibilities[share]), self._ids, inferences)
                n_events = share.stop
                n_rejected += len(batch.rejected)
                ignored_fields.update(batch.ignored_fields)
        return Scores(inferences, n_events, n_rejected, ignored_fields)

    def _parts(self, examples: Sequence[Any]) -> Iterator[_Part]:
        """Yield the examples, the single events of a kind together."""
        events: dict[int, Mapping[str, Any]] = {}
        rows: dict[int, npt.NDArray[Any]] = {}
        for position, example in enumerate(examples):
            if isinstance(example, Mapping):
                events[position] = example
            elif hasattr(example, "_asdict"):
                events[position] = example._asdict()
            elif not isinstance(example, np.ndarray) or example.ndim != 1:
                yield _Part([position], example, single=False)
            elif len(example) == len(self._schema) and example.dtype.kind in "fiub" and type(example) is np.ndarray:
                rows[position] = example
            else:
                yield _Part([position], example[None], single=True)
        if events:
            yield _Part(list(events), list(events.values()), single=True)
        if rows:
            yield _Part(list(rows), np.stack(list(rows.values())), single=True)

    def _encode(self, events: Any) -> Batch:
        events, roles = in_memory(events), self._roles
        if roles is not None and isinstance(events, pa.Table):
            kept = set(roles.model_fields(events.column_names))
            # By position: the encoding says which columns are there twice.
            events = events.select([at for at, name in enumerate(events.column_names) if name in kept])
        elif roles is not None and isinstance(events, list):
            events = [
                {name: event[name] for name in roles.model_fields(event)} if isinstance(event, Mapping) else event
                for event in events
            ]
        return self._learner.encode(events, on_error="collect")


class _Part:
    """Examples that are encoded together: single events, or one example of many events."""

    batch: Batch

    def __init__(self, positions: list[int], events: Any, *, single: bool) -> None:
        self.positions = positions
        self.events = events
        self.single = single

    def reject(self, reason: str, inferences: list[Any]) -> int:
        """Say that none of the examples can be used; return the number of their events."""
        if not self.single:
            rejected = RejectedEvent(None, reason, _n_events(self.events))
            inferences[self.positions[0]] = rejected
            return rejected.n_events
        for at, position in enumerate(self.positions):
            inferences[position] = RejectedEvent(_event(self.events, at), reason)
        return len(self.positions)

    def tell(self, prediction: Prediction, ids: list[int], inferences: list[Any]) -> None:
        """Write down what the model says of each example."""
        batch = self.batch
        if not self.single:
            inferences[self.positions[0]] = _as_table(prediction, ids, batch)
            return
        scores = map(
            EventScore,
            prediction.component.tolist(),
            prediction.log_prob.tolist(),
            (dict(zip(ids, each)) for each in prediction.responsibilities.tolist()),
        )
        accepted = range(batch.n_events) if batch.accepted is None else batch.accepted.tolist()
        for at, score in zip(accepted, scores):
            inferences[self.positions[at]] = score
        for error in batch.rejected:
            # Where the event was in the batch says nothing: Beam makes the batches.
            reason = str(EventError(0, error.field, error.value, error.expected))
            inferences[self.positions[error.index]] = RejectedEvent(_event(self.events, error.index), reason)


def _n_events(events: Any) -> int:
    if isinstance(events, np.ndarray):
        return len(events) if events.ndim else 1
    return len(events) if isinstance(events, Sized) and not isinstance(events, str | bytes) else 1


def _as_table(prediction: Prediction, ids: list[int], batch: Batch) -> pa.Table:
    """Return a row for each event, null where it was rejected."""
    n_events = batch.n_events + len(batch.rejected)
    accepted: Any = slice(None) if batch.accepted is None else batch.accepted
    absent = np.ones(n_events, dtype=bool)
    absent[accepted] = False

    def column(values: npt.NDArray[Any]) -> pa.Array:
        whole = np.zeros(n_events, values.dtype)
        whole[accepted] = values
        return pa.array(whole, mask=absent)

    responsibilities = [column(each) for each in prediction.responsibilities.T]
    reasons: list[str | None] = [None] * n_events
    for error in batch.rejected:
        reasons[error.index] = str(error)
    return pa.table(
        {
            "component": column(prediction.component),
            "log_prob": column(prediction.log_prob),
            "responsibilities": pa.StructArray.from_arrays(
                responsibilities, [str(one) for one in ids], mask=pa.array(absent)
            ),
            _REASON: pa.array(reasons, pa.string()),
        }
    )


class MixtureModelHandler(ModelHandler):
    """A mixture for Beam's `RunInference`, from a snapshot file.

    Parameters
    ----------
    path
        The snapshot, on any of Beam's file systems: what `stream_em.save` or the command has written.
    roles
        Columns that are not the model's: ids, labels, times. They stay in the example.
    options
        Those of `apache_beam.ml.inference.base.ModelHandler`: `min_batch_size`, `max_batch_size`,
        `max_batch_duration_secs`, `large_model`, `model_copies`, `env_vars` and others.

    Raises
    ------
    TypeError
        When an option is not one of Beam's.

    Notes
    -----
    An example is one event (a dict, a `beam.Row` or named tuple, an array (D,) in the order of the schema), or holds
    many (an Arrow table or record batch, a frame, an array (n, D), a list of dicts). A batch of examples takes one
    E-step. The `inference` of a `PredictionResult` is an `EventScore` for one event. For many it is a table with the
    columns `component`, `log_prob`, `responsibilities` (a struct with a field for each component's id) and `reason`,
    a row for each event.

    Events that cannot be used fail nothing: their inference is a `RejectedEvent`, which also stands for a table that
    cannot be used as a whole; in a table of scores their row is null but for the `reason`. `SplitRejected` sets them
    apart. What is missing in an event (no key, None, NaN) is marginalised.

    The model can be replaced while the pipeline runs: give `RunInference` the paths of newer snapshots as
    `model_metadata_pcoll`, or as `watch_model_pattern` where the runner reads without end, as Beam's embedded ones do
    not. Each is a file of its own, never one that is written over: Beam knows a model by its path, which is also the
    `model_id` of the results. `KeyedModelHandler` takes this handler, one for all keys or one for each.

    Loading a file that is no snapshot, a damaged one, or one of a model that has seen no event raises
    `stream_em.store.SnapshotError`.

    Beam's metrics hold, under `stream_em`, the counters `events`, `rejected` and `ignored_fields` (values of unknown
    fields), beside those of `RunInference`.

    >>> import tempfile
    >>> from apache_beam.ml.inference.base import RunInference
    >>> from apache_beam.testing.util import assert_that
    >>> from stream_em import BatchEM, Gaussian, Mixture, save
    >>> readings = np.repeat([[0.0], [0.2], [9.0], [9.2]], 25, axis=0)
    >>> fitted = BatchEM(Mixture(Gaussian(), n_components=2), seed=0).fit(readings)
    >>> def check(results):
    ...     (result,) = results
    ...     assert result.inference.component == fitted.predict({"x0": 0.1})[0]
    ...     assert result.inference.anomaly_score == -fitted.log_prob({"x0": 0.1})[0]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(fitted, f"{folder}/model.arrow")
    ...     with beam.Pipeline("FnApiRunner") as pipeline:
    ...         events = pipeline | beam.Create([{"x0": 0.1}])
    ...         results = events | RunInference(MixtureModelHandler(f"{folder}/model.arrow"))
    ...         _ = assert_that(results, check)

    """

    def __init__(self, path: str | os.PathLike[str], *, roles: Roles | None = None, **options: Any) -> None:
        unknown = sorted(options.keys() - _OPTIONS)
        if unknown:
            raise TypeError(
                f"Beam's model handlers have no option {', '.join(unknown)}; they have {', '.join(sorted(_OPTIONS))}"
            )
        super().__init__(**options)
        self._path = os.fspath(path)
        self._roles = roles
        self._events = Metrics.counter(NAMESPACE, "events")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")
        self._ignored_fields = Metrics.counter(NAMESPACE, "ignored_fields")

    def load_model(self) -> SnapshotModel:  # noqa: D102 - Beam's
        with FileSystems.open(self._path) as file:
            content = file.read()
        try:
            return SnapshotModel(from_bytes(content, source=self._path), self._roles)
        except NotFittedError as error:
            raise SnapshotError(f"{self._path}: nothing can be scored with this snapshot: {error}") from None

    def update_model_path(self, model_path: str | None = None) -> None:  # noqa: D102 - Beam's
        self._path = model_path or self._path

    def run_inference(  # noqa: D102 - Beam's
        self, batch: Sequence[Any], model: SnapshotModel, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        scores = model.score(batch)
        self._events.inc(scores.n_events)
        self._rejected.inc(scores.n_rejected)
        self._ignored_fields.inc(scores.ignored_fields.total())
        return [
            PredictionResult(example, inference, self._path) for example, inference in zip(batch, scores.inferences)
        ]

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:  # noqa: D102 - Beam's
        if inference_args:
            raise ValueError(f"a mixture takes no inference_args, got {', '.join(map(repr, inference_args))}")

    def get_num_bytes(self, batch: Sequence[Any]) -> int:  # noqa: D102 - Beam's
        return sum(map(_n_bytes, batch))

    def get_metrics_namespace(self) -> str:  # noqa: D102 - Beam's
        return NAMESPACE


def _n_bytes(example: Any) -> int:
    if isinstance(example, Mapping):
        return sys.getsizeof(example) + sum(map(sys.getsizeof, example.values()))
    n_bytes = getattr(example, "nbytes", None)
    return n_bytes if isinstance(n_bytes, int) else sys.getsizeof(example)


class SplitRejected(beam.DoFn):
    """Set events that could not be used apart from the results of `RunInference`.

    Notes
    -----
    It takes `PredictionResult`s of a `MixtureModelHandler`, or (key, result) pairs of a `KeyedModelHandler` with one.
    The results of usable events come out, tables without the rows of those that are not and without `reason`. Each
    event that could not be used goes to the output tagged `REJECTED`, a `RejectedEvent`, in a pair with its key where
    there are keys.

    >>> from apache_beam.testing.util import assert_that, equal_to
    >>> usable = PredictionResult({"x": 1.0}, EventScore(0, -1.0, {0: 1.0}), "model.arrow")
    >>> unusable = RejectedEvent({"x": "high"}, "got 'high', expected a number")
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     results = pipeline | beam.Create([usable, PredictionResult(unusable.event, unusable, "model.arrow")])
    ...     split = results | beam.ParDo(SplitRejected()).with_outputs(REJECTED, main="scored")
    ...     _ = assert_that(split.scored, equal_to([usable]))
    ...     _ = assert_that(split[REJECTED], equal_to([unusable]), label="rejected")

    """

    def process(self, element: Any) -> Iterator[Any]:  # noqa: D102 - Beam's
        if isinstance(element, PredictionResult):
            yield from _split(element)
            return
        key, result = element
        for one in _split(result):
            if isinstance(one, beam.pvalue.TaggedOutput):
                yield beam.pvalue.TaggedOutput(one.tag, (key, one.value))
            else:
                yield key, one


def _split(result: PredictionResult) -> Iterator[Any]:
    inference = result.inference
    if isinstance(inference, RejectedEvent):
        yield beam.pvalue.TaggedOutput(REJECTED, inference)
    elif isinstance(inference, pa.Table):
        yield from _split_table(result.example, inference, result.model_id)
    else:
        yield result


def _split_table(example: Any, scores: pa.Table, model_id: str) -> Iterator[Any]:
    reasons, scores = scores[_REASON], scores.drop_columns(_REASON)
    if reasons.null_count == len(reasons):
        yield PredictionResult(example, scores, model_id)
        return
    events = in_memory(example)
    usable = reasons.is_null()
    accepted = np.flatnonzero(usable)
    if len(accepted):
        yield PredictionResult(_take(events, accepted), scores.filter(usable), model_id)
    for at, reason in enumerate(reasons.to_pylist()):
        if reason is not None:
            yield beam.pvalue.TaggedOutput(REJECTED, RejectedEvent(_event(events, at), reason))


def _take(events: Any, positions: npt.NDArray[np.intp]) -> Any:
    if isinstance(events, np.ndarray):
        return events[positions]
    return events.take(positions) if isinstance(events, pa.Table) else [events[at] for at in positions.tolist()]
