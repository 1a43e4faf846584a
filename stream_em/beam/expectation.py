"""The E-step on workers and the merging of what they found: one EM iteration of a distributed fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.windowed_value import WindowedValue

from stream_em.beam.coders import StatisticsCoder
from stream_em.beam.events import EventBlocks
from stream_em.blas import OneBlasThread
from stream_em.columns import Roles
from stream_em.methods import LOADING_DENSITIES, Workload
from stream_em.models import Mixture, MixtureParameters
from stream_em.schema import Batch, FieldCounts, Schema
from stream_em.statistics import Statistics

NAMESPACE = "stream_em"
"""Namespace of the counters and distributions in Beam's metrics."""

REJECTED = "rejected"
"""Tag of the output of events that cannot be used, each a `RejectedEvent`."""

COUNTS = "counts"
"""Tag of the output of `EventCounts`, one value a bundle."""


# Of this process: a worker that has had much to do will have more. It may live for one iteration only, and then
# loading compiled code must be little beside what it does in all.
_WORKLOAD = Workload(5 * LOADING_DENSITIES)


class EventCounts(NamedTuple):
    """How many events a bundle, or all of them, held.

    Parameters
    ----------
    n_events
        Events that were used.
    n_rejected
        Events that could not be used.
    ignored_fields
        Names of unknown fields that were ignored, with the number of events that held them.

    """

    n_events: int = 0
    n_rejected: int = 0
    ignored_fields: tuple[tuple[str, int], ...] = ()

    def merge(self, other: EventCounts) -> EventCounts:
        """Return the counts of both."""
        ignored = FieldCounts(dict(self.ignored_fields))
        ignored.update(dict(other.ignored_fields))
        return EventCounts(
            self.n_events + other.n_events, self.n_rejected + other.n_rejected, tuple(sorted(ignored.items()))
        )


class ExpectationStep(beam.DoFn):
    """The E-step: events in, one value of expected sufficient statistics for each bundle (and window) out.

    The statistics of a bundle are merged in the worker, so that what is shuffled depends on the number of
    bundles, components and fields, never on the number of events.

    Parameters
    ----------
    model
        The mixture.
    schema
        The fields; categories outside it are counted as `other`.
    roles
        Columns that are not the model's: weight, label and others to leave out.

    Notes
    -----
    `process` takes an element (a dict, a list of dicts, an array (n, D), an Arrow table or record batch, a
    frame, an encoded `Batch`) and the `MixtureParameters` of the E-step: as a side input, or as they are where they are
    known when the pipeline is made, which is faster on engines such as Flink that begin a new stage at a side input, to
    which every event is sent. Several parameters by name, in a mapping, or by position, in a list or tuple, stand for
    several starts: then (name, statistics) or (position, statistics) pairs come out.

    Events that cannot be used go to the output tagged `REJECTED`, each with the reason; how many were used, to
    the one tagged `COUNTS`. Neither fails a bundle.

    Beam's metrics hold, under `NAMESPACE`, the counters `events` and `rejected` and the distribution
    `log_likelihood`: that of each bundle, per event, in thousandths, since Beam's distributions are of whole numbers.

    >>> from stream_em import Gaussian
    >>> from apache_beam.pvalue import AsSingleton
    >>> from apache_beam.testing.util import assert_that
    >>> model, schema = Mixture(Gaussian(), 1), Schema({"x": "numeric"})
    >>> start = model.pooled(schema.encode([{"x": 0.0}, {"x": 1.0}]))
    >>> def check(merged):
    ...     (statistics,) = merged
    ...     assert statistics.total_weight == 3.0
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     parameters = pipeline | "Parameters" >> beam.Create([start])
    ...     events = pipeline | "Events" >> beam.Create([{"x": 1.0}, {"x": 2.0}, {"x": 4.0}])
    ...     statistics = events | beam.ParDo(ExpectationStep(model, schema), AsSingleton(parameters))
    ...     _ = assert_that(statistics | beam.CombineGlobally(MergeStatistics()), check)

    """

    def __init__(self, model: Mixture, schema: Schema, *, roles: Roles | None = None) -> None:
        self.model = model
        self.schema = schema
        self.roles = roles
        self._events = Metrics.counter(NAMESPACE, "events")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")
        self._log_likelihood = Metrics.distribution(NAMESPACE, "log_likelihood")

    def setup(self) -> None:  # noqa: D102 - Beam's
        self._bound = self.model.bind(self.schema)

    def start_bundle(self) -> None:  # noqa: D102 - Beam's
        self._windows: dict[Any, _Gathered] = {}

    def process(  # noqa: D102 - Beam's
        self,
        element: Any,
        parameters: MixtureParameters | Sequence[MixtureParameters] | Mapping[Any, MixtureParameters],
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Any]:
        gathered = self._windows.get(window)
        if gathered is None:
            blocks = EventBlocks(self.schema, self.roles, self.model)
            gathered = self._windows[window] = _Gathered(self._bound, blocks, parameters)
        gathered.add(gathered.blocks.add(element))
        yield from self._take_rejected(gathered)

    def _take_rejected(self, gathered: _Gathered) -> Iterator[Any]:
        for rejected in gathered.blocks.take_rejected():
            gathered.n_rejected += rejected.n_events
            self._rejected.inc(rejected.n_events)
            yield beam.pvalue.TaggedOutput(REJECTED, rejected)

    def finish_bundle(self) -> Iterator[WindowedValue]:  # noqa: D102 - Beam's
        for window, gathered in self._windows.items():
            gathered.add(gathered.blocks.flush())
            outputs = [*self._take_rejected(gathered), beam.pvalue.TaggedOutput(COUNTS, gathered.counts())]
            self._events.inc(gathered.n_events)
            for name, statistics in gathered.statistics.items():
                outputs.append((name, statistics) if gathered.several else statistics)
                if statistics.total_weight > 0.0:
                    self._log_likelihood.update(round(1_000 * statistics.log_likelihood / statistics.total_weight))
            for output in outputs:
                yield _in_window(output, window)
        self._windows = {}


def _in_window(output: Any, window: Any) -> Any:
    if isinstance(output, beam.pvalue.TaggedOutput):
        return beam.pvalue.TaggedOutput(output.tag, WindowedValue(output.value, window.max_timestamp(), [window]))
    return WindowedValue(output, window.max_timestamp(), [window])


class _Gathered:
    """What a bundle has gathered in one window."""

    def __init__(
        self,
        bound: Mixture,
        blocks: EventBlocks,
        parameters: MixtureParameters | Sequence[MixtureParameters] | Mapping[Any, MixtureParameters],
    ) -> None:
        self.blocks = blocks
        self.several = not isinstance(parameters, MixtureParameters)
        self.n_events = self.n_rejected = 0
        self._bound = bound
        several = [parameters] if isinstance(parameters, MixtureParameters) else parameters
        self._parameters = dict(several if isinstance(several, Mapping) else enumerate(several))
        self.statistics: dict[Any, Statistics] = {}

    def add(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.n_events += batch.n_events
            for name, parameters in self._parameters.items():
                compiled = _WORKLOAD.is_large_with(batch.n_events, parameters.n_components)
                # Workers share the cores.
                with OneBlasThread():
                    new = self._bound.e_step(parameters, batch, compiled=compiled)
                known = self.statistics.get(name)
                self.statistics[name] = new if known is None else known.merge(new)

    def counts(self) -> EventCounts:
        return EventCounts(self.n_events, self.n_rejected, tuple(sorted(self.blocks.ignored_fields.items())))


class MergeStatistics(beam.CombineFn):
    """Merge statistics of the same model into one value; None where there is none.

    It only merges: step sizes depend on order, which a distributed merge does not have.

    >>> from stream_em.statistics import Sums
    >>> merge, one = MergeStatistics(), Statistics({"components": Sums(np.ones(2))}, -2.0, np.arange(2))
    >>> accumulators = [merge.add_input(merge.create_accumulator(), one) for _ in range(2)]
    >>> merge.extract_output(merge.merge_accumulators(accumulators)).weights
    array([2., 2.])

    """

    def create_accumulator(self) -> Statistics | None:  # noqa: D102 - Beam's
        return None

    def add_input(self, accumulator: Statistics | None, element: Statistics) -> Statistics:  # noqa: D102 - Beam's
        return element if accumulator is None else accumulator.merge(element)

    def merge_accumulators(self, accumulators: Iterable[Statistics | None]) -> Statistics | None:  # noqa: D102 - Beam's
        return reduce(_merged, accumulators, None)

    def extract_output(self, accumulator: Statistics | None) -> Statistics | None:  # noqa: D102 - Beam's
        return accumulator

    def get_accumulator_coder(self) -> beam.coders.Coder:  # noqa: D102 - Beam's
        # The one hook that decides how accumulators travel; a coder registered for their type does not.
        return StatisticsCoder()

    def default_type_hints(self) -> Any:  # noqa: D102 - Beam's
        # By this Beam finds the coder of what comes out; without it, sizes would be estimated by pickling.
        return beam.typehints.decorators.IOTypeHints.empty().with_output_types(Statistics)


def _merged(one: Statistics | None, other: Statistics | None) -> Statistics | None:
    if one is None or other is None:
        return one if other is None else other
    return one.merge(other)


class MergePerKey(beam.PTransform):
    """Merge (key, statistics) pairs by key, in two levels where one worker would have too much to merge.

    Parameters
    ----------
    fanout
        Number of parts that each key's statistics are merged in first, or None to merge them at once. Beam's own
        `with_hot_key_fanout` would put the statistics on the wire as pickles.

    Raises
    ------
    ValueError
        When `fanout` is below 2.

    """

    def __init__(self, fanout: int | None = None) -> None:
        super().__init__()
        if fanout is not None and fanout < 2:
            raise ValueError(f"fanout must be at least 2, or None, got {fanout!r}")
        self.fanout = fanout

    def expand(self, statistics: beam.PCollection) -> beam.PCollection:  # noqa: D102 - Beam's
        pairs = tuple[Any, Statistics]
        if self.fanout is not None:
            statistics = (
                statistics
                | "Spread" >> beam.ParDo(_Spread(self.fanout)).with_output_types(pairs)
                | "Merge parts" >> beam.CombinePerKey(MergeStatistics())
                | "Gather" >> beam.MapTuple(lambda key, part: (key[0], part)).with_output_types(pairs)
            )
        return statistics | "Merge" >> beam.CombinePerKey(MergeStatistics())


class _Spread(beam.DoFn):
    """Deal pairs out to parts in turn, from a part of its own for each worker."""

    def __init__(self, fanout: int) -> None:
        self.fanout = fanout

    def setup(self) -> None:
        self._part = int(np.random.default_rng().integers(self.fanout))

    def process(self, pair: tuple[Any, Statistics]) -> Iterator[tuple[tuple[Any, int], Statistics]]:
        key, statistics = pair
        self._part = (self._part + 1) % self.fanout
        yield (key, self._part), statistics
