"""Beam: refits against one process and against adding events one by one, models by key, bytes shuffled."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions
from threadpoolctl import threadpool_limits

from benchmarks.files import N_FIELDS, ROWS, write_events
from benchmarks.measure import Table, verdict
from stream_em import Batch, BatchEM, Gaussian, Mixture, MixtureParameters, Schema
from stream_em.beam import LearnerCoder, ReadEvents, Refit, RefitPerKey, StatisticsCoder
from stream_em.statistics import Statistics

N_EVENTS = 5_000_000
N_COMPONENTS = 8
N_ITERATIONS = 10
N_NAIVE = 5_000
N_KEYS, EVENTS_PER_KEY = 100_000, 100
KEYED_FIELDS, KEYED_COMPONENTS = 4, 3
TARGET = 1.5
SCHEMA = Schema({f"sensor_{field}": "numeric" for field in range(N_FIELDS)})
MODEL = Mixture(Gaussian(), N_COMPONENTS)

EMBEDDED = ("--runner=FnApiRunner",)
PROCESSES = (*EMBEDDED, "--direct_num_workers=2", "--direct_running_mode=multi_processing")


def flink() -> AbstractContextManager[tuple[str, ...]] | None:
    """Flags for Flink, with one job server as long as the context lasts; None where its jars are not there."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "beam_door"))
    import engines

    class Flink(AbstractContextManager[tuple[str, ...]]):
        def __enter__(self) -> tuple[str, ...]:
            self._context = engines.flink()
            return self._context.__enter__().flags

        def __exit__(self, *error: Any) -> None:
            self._context.__exit__(*error)

    try:
        with Flink():
            return Flink()
    except engines.EngineMissingError as error:
        print("   not run on Flink:", error, flush=True)
        return None


def start(path: Path) -> MixtureParameters:
    """Parameters to start from, of the first events."""
    first = pq.ParquetFile(path).read_row_group(0).slice(0, 2_000)
    return BatchEM(MODEL, schema=SCHEMA, max_iter=3, seed=0).fit(first).parameters


def read(path: Path) -> Callable[[], Iterator[Batch]]:
    """The encoded events of a file, once more with each call."""

    def batches() -> Iterator[Batch]:
        for rows in pq.ParquetFile(path).iter_batches(65_536, use_threads=False):
            yield SCHEMA.encode(rows)

    return batches


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def refit(path: Path, flags: Sequence[str], parameters: MixtureParameters, n_iterations: int) -> BatchEM:
    fit = Refit(MODEL, schema=SCHEMA, initial_parameters=parameters, max_iter=n_iterations, tol=0.0)
    return fit.run(str(path), options=PipelineOptions(list(flags))).learner


class _NaiveEM(beam.CombineFn):
    """One E-step for each event, as a pipeline has it that knows of neither blocks nor bundles."""

    def __init__(self, parameters: MixtureParameters) -> None:
        self.parameters = parameters

    def create_accumulator(self) -> Statistics | None:
        return None

    def add_input(self, accumulator: Statistics | None, event: dict[str, float]) -> Statistics:
        one = MODEL.bind(SCHEMA).e_step(self.parameters, SCHEMA.encode([event]))
        return one if accumulator is None else accumulator.merge(one)

    def merge_accumulators(self, accumulators: Any) -> Statistics | None:
        merged: Statistics | None = None
        for one in accumulators:
            merged = one if merged is None else merged if one is None else merged.merge(one)
        return merged

    def extract_output(self, accumulator: Statistics | None) -> Statistics | None:
        return accumulator


def naive(path: Path, parameters: MixtureParameters) -> float:
    """Seconds for each event of the naive pipeline."""
    events = pq.ParquetFile(path).read_row_group(0).slice(0, N_NAIVE).to_pylist()

    def run(some: list[dict[str, float]]) -> None:
        with beam.Pipeline("FnApiRunner") as pipeline:
            _ = pipeline | beam.Create(some) | beam.CombineGlobally(_NaiveEM(parameters))

    return (timed(lambda: run(events))[0] - timed(lambda: run(events[:10]))[0]) / (N_NAIVE - 10)


def _refits() -> list[Table]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        path, small = Path(folder) / "events.parquet", Path(folder) / "few.parquet"
        write_events(path, N_EVENTS)
        pq.write_table(pq.ParquetFile(path).read_row_group(0).slice(0, 1_000), small)
        parameters = start(path)
        options: dict[str, Any] = {"schema": SCHEMA, "initial_parameters": parameters, "tol": 0.0}

        def in_process() -> BatchEM:
            return BatchEM(MODEL, max_iter=N_ITERATIONS, **options).fit(read(path))

        whole, reference = timed(in_process)
        rows.append(("one process, BatchEM", f"{whole:.1f}", "", "", "", ""))
        print("  ", *rows[-1], flush=True)
        per_event = naive(path, parameters)
        by_event = f"{per_event * N_EVENTS * N_ITERATIONS:,.0f} (from {N_NAIVE:,} events)"
        rows.append(("Beam, one add_input an event", by_event, "", "", "", ""))
        print("  ", *rows[-1], flush=True)
        on_flink = flink()
        engines: list[tuple[str, AbstractContextManager[Sequence[str]]]] = [
            ("Refit, FnApiRunner", nullcontext(EMBEDDED)),
            ("Refit, 2 worker processes", nullcontext(PROCESSES)),
        ]
        if on_flink is not None:
            engines.append(("Refit, Flink, parallelism 2", on_flink))
        for name, engine in engines:
            with engine as flags:
                started = [timed(lambda flags=flags: refit(small, flags, parameters, 2))[0] / 2 for _ in range(3)]
                begin = statistics.median(started)
                again = timed(in_process)[0]
                taken, learner = timed(lambda flags=flags: refit(path, flags, parameters, N_ITERATIONS))
            expected = reference.parameters.components.mean
            if not np.allclose(learner.parameters.components.mean, expected, rtol=1e-8, atol=1e-8):
                raise RuntimeError(f"{name} came to other means than one process")
            ratio = (taken - N_ITERATIONS * begin) / again
            figures = (f"{taken:.1f}", f"{begin:.2f}", f"{again:.1f}", f"{ratio:.2f}×")
            rows.append((name, *figures, verdict(ratio, TARGET, at_most=True)))
            print("  ", *rows[-1], flush=True)
    return [
        Table(
            "Beam: a refit",
            f"{N_ITERATIONS} iterations over {N_EVENTS:,} events of {N_FIELDS} fields in a Parquet file, read anew in "
            f"each; K={N_COMPONENTS}, full covariances, the same start; the means agree to 1e-8 or the run fails. "
            "Start-up is what an iteration over a thousand events takes on that engine; the ratio is of the time "
            "without it to that of one process (one thread), measured again just before.",
            ("what", "s", "start-up of an iteration, s", "one process, s", "without start-up", "target"),
            rows,
        )
    ]


def _bytes() -> list[Table]:
    rows = []
    sizes: list[int] = []
    encode = StatisticsCoder.encode

    def counted(self: StatisticsCoder, value: Statistics | None) -> bytes:
        encoded = encode(self, value)
        sizes.append(len(encoded))
        return encoded

    with tempfile.TemporaryDirectory() as folder:
        for n_events in (100_000, 1_000_000):
            path = Path(folder) / f"{n_events}.parquet"
            write_events(path, n_events)
            if n_events == 100_000:
                parameters = start(path)
            for n_workers in (1, 4):
                flags = (*EMBEDDED, "--direct_running_mode=multi_threading", f"--direct_num_workers={n_workers}")
                sizes.clear()
                StatisticsCoder.encode = counted  # type: ignore[method-assign]
                try:
                    refit(path, flags, parameters, 1)
                finally:
                    StatisticsCoder.encode = encode  # type: ignore[method-assign]
                rows.append((f"{n_events:,}", f"{n_workers}", f"{len(sizes)}", f"{sum(sizes):,}", f"{max(sizes):,}"))
                print("  ", *rows[-1], flush=True)
    return [
        Table(
            "Beam: bytes of statistics in an iteration",
            f"Statistics that FnApiRunner encoded in one iteration of a refit (K={N_COMPONENTS}, {N_FIELDS} fields, "
            "full covariances): at bundles, merges and the hand-over to the driver. They depend on the number of "
            "bundles, not on that of events.",
            ("events", "worker threads", "values encoded", "bytes in all", "bytes of the largest"),
            rows,
        )
    ]


def _per_key() -> list[Table]:
    names = [f"sensor_{field}" for field in range(KEYED_FIELDS)]
    schema = Schema(dict.fromkeys(names, "numeric"))
    model = Mixture(Gaussian(), KEYED_COMPONENTS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keyed.parquet"
        generator = np.random.default_rng(0)
        centers = 4.0 * generator.normal(size=(KEYED_COMPONENTS, KEYED_FIELDS))

        def table(keys: np.ndarray[Any, Any]) -> pa.Table:
            values = centers[generator.integers(KEYED_COMPONENTS, size=len(keys))]
            values = values + generator.normal(size=values.shape) + 0.1 * (keys % 7)[:, None]
            return pa.table([keys, *np.ascontiguousarray(values.T)], names=["key", *names])

        initial = BatchEM(model, schema=schema, seed=0).fit(table(np.arange(2_000)).drop_columns("key"))
        for name, n_keys, options in (
            ("each seeded on its own", N_KEYS // 100, {}),
            ("all from the components of one model", N_KEYS, {"initial_parameters": initial.parameters}),
        ):
            keys = generator.permutation(np.repeat(np.arange(n_keys), EVENTS_PER_KEY))
            pq.write_table(table(keys), path, row_group_size=ROWS)
            sizes = Path(folder) / "sizes"

            def run(options: dict[str, Any] = options, sizes: str = str(sizes)) -> None:
                with beam.Pipeline("FnApiRunner") as pipeline:
                    events, _ = pipeline | ReadEvents(str(path))
                    fits = events | RefitPerKey(model, schema=schema, key="key", **options)
                    size = fits | beam.MapTuple(lambda key, learner: len(LearnerCoder().encode(learner)))
                    _ = size | beam.combiners.ToList() | beam.Map(_keep, sizes)

            seconds, _ = timed(run)
            found = [int(size) for size in sizes.read_text().split()]
            if len(found) != n_keys:
                raise RuntimeError(f"{len(found)} models came out for {n_keys} keys")
            figures = (f"{n_keys:,}", f"{seconds:.0f}", f"{n_keys / seconds:,.0f}", f"{statistics.median(found):,.0f}")
            rows.append((name, *figures))
            print("  ", *rows[-1], flush=True)
    return [
        Table(
            "Beam: models by key",
            f"`RefitPerKey` on FnApiRunner: {EVENTS_PER_KEY} events a key in random order, {KEYED_FIELDS} fields, "
            f"K={KEYED_COMPONENTS}, full covariances, up to 100 iterations each; bytes are those of a key's snapshot, "
            "which is also the state of an online model.",
            ("start", "keys", "s", "keys/s", "bytes a key"),
            rows,
        )
    ]


def _keep(found: list[int], path: str) -> None:
    Path(path).write_text(" ".join(map(str, found)))


def run() -> list[Table]:
    """The tables of the Beam door."""
    return [*_refits(), *_bytes(), *_per_key()]
