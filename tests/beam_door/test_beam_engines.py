"""The same pipelines on every engine, against the same work done in this process."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import apache_beam as beam
import grpc
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.pvalue import AsSingleton
from apache_beam.transforms.window import FixedWindows, GlobalWindows, TimestampedValue
from engine_cases import MODEL, SCHEMA, InShards, SlowShards, a_start, assert_same, assert_same_fit, mixed_events
from engines import ENGINES, PRISM, PRISM_FLAGS, Collect, Engine, EngineMissingError, collected, prism
from ports import free_ports

from stream_em import (
    BatchEM,
    HalfLife,
    save,
)
from stream_em.beam import ExpectationStep, MergePerKey, MergeStatistics
from stream_em.beam.expectation import COUNTS, REJECTED
from stream_em.beam.online import OnlineUpdate
from stream_em.beam.per_key import RefitPerKey
from stream_em.beam.refit import Refit
from stream_em.beam.serving import MixtureModelHandler, SplitRejected
from stream_em.seeding import seed

# Beam's threads that listen to Flink say so when it ends a job before they do.
QUIET = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
MARKS = {"processes": (pytest.mark.slow,), "flink": (pytest.mark.flink, QUIET), "prism": (pytest.mark.prism,)}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in ENGINES])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        # Worker processes import what the tests define.
        here, paths = Path(__file__).parent, os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent), *([paths] if paths else [])]))
        context = ENGINES[request.param]()
        try:
            started = context.__enter__()
        except EngineMissingError as error:
            pytest.skip(str(error))
        try:
            yield started
        finally:
            context.__exit__(None, None, None)


def test_statistics_equal_those_of_the_e_step_in_this_process(engine: Engine, tmp_path: Path) -> None:
    events = mixed_events()
    batch, start = a_start(events)
    unusable = {"x": float("inf"), "y": 0.0, "shop": "a"}
    with engine.pipeline() as pipeline:
        parameters = pipeline | "Parameters" >> beam.Create([start])
        found = (
            pipeline
            | "Events" >> InShards([*events, unusable], 64)
            | beam.ParDo(ExpectationStep(MODEL, SCHEMA), AsSingleton(parameters)).with_outputs(
                REJECTED, COUNTS, main="statistics"
            )
        )
        merged = found.statistics | beam.CombineGlobally(MergeStatistics())
        _ = merged | "KeepStatistics" >> Collect(tmp_path / "statistics")
        _ = found[REJECTED] | "KeepRejected" >> Collect(tmp_path / "rejected")
        _ = found[COUNTS] | "KeepCounts" >> Collect(tmp_path / "counts")
    (statistics,) = collected(tmp_path / "statistics")
    assert_same(statistics, MODEL.bind(SCHEMA).e_step(start, batch))
    (rejected,) = collected(tmp_path / "rejected")
    assert rejected.event == unusable
    counts = collected(tmp_path / "counts")
    assert (sum(one.n_events for one in counts), sum(one.n_rejected for one in counts)) == (len(events), 1)


def test_several_starts_are_merged_apart_in_parts(engine: Engine, tmp_path: Path) -> None:
    events = mixed_events()
    batch, start = a_start(events)
    starts = (start, seed(MODEL, batch, np.random.default_rng(2)))
    with engine.pipeline() as pipeline:
        parameters = pipeline | "Parameters" >> beam.Create([starts])
        _ = (
            pipeline
            | "Events" >> InShards(events, 8)
            | beam.ParDo(ExpectationStep(MODEL, SCHEMA), AsSingleton(parameters))
            | MergePerKey(fanout=4)
            | Collect(tmp_path / "merged")
        )
    merged = dict(collected(tmp_path / "merged"))
    assert sorted(merged) == [0, 1]
    for position, parameters_of_start in enumerate(starts):
        assert_same(merged[position], MODEL.bind(SCHEMA).e_step(parameters_of_start, batch))


@pytest.mark.parametrize("shards", [1, 64])
def test_refit_equals_batch_em_in_this_process(engine: Engine, shards: int) -> None:
    events = mixed_events()
    options: dict[str, Any] = {
        "schema": SCHEMA,
        "initial_parameters": a_start(events)[1],
        "max_iter": 2,
        "tol": 0.0,
    }
    unusable = {"x": float("inf"), "y": 0.0, "shop": "a"}
    source = InShards([*events, unusable], shards)
    learner, counts = Refit(MODEL, **options).run(source, options=engine.options())
    assert_same_fit(learner, BatchEM(MODEL, **options).fit(events))
    assert (counts.n_events, counts.n_rejected) == (len(events), 1)


def test_unrolled_iterations_equal_batch_em_in_this_process(engine: Engine, tmp_path: Path) -> None:
    events = mixed_events()
    options: dict[str, Any] = {"schema": SCHEMA, "initial_parameters": a_start(events)[1], "tol": 0.0}
    with engine.pipeline() as pipeline:
        fitted = pipeline | InShards(events, 8) | Refit(MODEL, unrolled=3, **options)
        _ = fitted | "Keep" >> Collect(tmp_path / "fitted")
    (learner,) = collected(tmp_path / "fitted")
    assert_same_fit(learner, BatchEM(MODEL, max_iter=3, **options).fit(events))


def test_refit_per_key_equals_batch_em_of_each_key(engine: Engine, tmp_path: Path) -> None:
    events = mixed_events()
    options: dict[str, Any] = {"initial_parameters": a_start(events)[1], "max_iter": 5, "tol": 0.0}
    keyed = [(("shop", index % 5), event) for index, event in enumerate(events)]
    few = [(("shop", 9), event) for event in events[:2]]
    with engine.pipeline() as pipeline:
        rejected_to = Collect(tmp_path / "rejected")
        fits = RefitPerKey(MODEL, schema=SCHEMA, rejected_to=rejected_to, **options)
        _ = pipeline | beam.Create([*keyed, *few]) | fits | "Keep" >> Collect(tmp_path / "fits")
    fitted = dict(collected(tmp_path / "fits"))
    assert sorted(fitted) == [("shop", number) for number in range(5)]
    for key, learner in fitted.items():
        mine = [event for one, event in keyed if one == key]
        assert_same_fit(learner, BatchEM(MODEL, schema=SCHEMA, **options).fit(mine))
    assert [one.n_events for one in collected(tmp_path / "rejected")] == [2]


@pytest.mark.parametrize("width", [None, 200.0])
def test_event_time_timers_emit_the_model_of_each_key_and_window(
    engine: Engine, width: float | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if engine.name == "prism" and width is not None:
        reason = "Prism 2.77 loses the first of the windows that GroupIntoBatches gathers, in plain Beam too"
        request.applymarker(pytest.mark.xfail(raises=AssertionError, strict=True, reason=reason))
    # One batch for each key and window, so that the order in which an engine brings the events changes nothing.
    events = mixed_events()
    update = OnlineUpdate(
        initial=BatchEM(MODEL, schema=SCHEMA).fit(events),
        schedule=HalfLife(100.0),
        batch_size=len(events),
        max_wait=None,
        warm_up=50,
        snapshot_every=50.0,
    )
    # One event a second; the last window is not full.
    stamped = [(index % 3, 20.0 + index, event) for index, event in enumerate(events)]
    unusable = {"x": float("inf")}
    with engine.pipeline() as pipeline:
        outputs = (
            pipeline
            | beam.Create([*((str(key), second, event) for key, second, event in stamped), ("0", 30.0, unusable)])
            | beam.MapTuple(lambda key, second, event: TimestampedValue((key, event), second))
            | beam.WindowInto(GlobalWindows() if width is None else FixedWindows(width))
            | update
        )
        _ = outputs.scored | "KeepScored" >> Collect(tmp_path / "scored")
        _ = outputs.snapshots | "KeepSnapshots" >> Collect(tmp_path / "snapshots")
        _ = outputs.rejected | "KeepRejected" >> Collect(tmp_path / "rejected")
    together = defaultdict(list)
    for key, second, event in stamped:
        together[key, 0.0 if width is None else second // width].append((second, event))
    expected, log_prob = {}, {}
    for (key, _), timed in together.items():
        learner = deepcopy(update.start)
        mine, times = [event for _, event in timed], [second for second, _ in timed]
        prediction = learner.predict_then_update(learner.encode(mine, time=times))
        expected[str(key), 50.0 * (min(times) // 50.0 + 1.0)] = learner
        log_prob |= dict(zip([event["x"] for event in mine], prediction.log_prob))
    snapshots = {(key, due): learner for key, due, learner in collected(tmp_path / "snapshots")}
    assert snapshots.keys() == expected.keys()
    for at, learner in expected.items():
        assert snapshots[at].n_events == learner.n_events
        assert snapshots[at].statistics.time == learner.statistics.time
        assert_same(snapshots[at].statistics, learner.statistics)
    scored = collected(tmp_path / "scored")
    assert len(scored) == len(events)
    np.testing.assert_allclose([one.log_prob for one in scored], [log_prob[one.event["x"]] for one in scored], 1e-10)
    (rejected,) = collected(tmp_path / "rejected")
    assert rejected.event == unusable


def test_no_event_is_lost_in_small_batches(engine: Engine, tmp_path: Path) -> None:
    events = mixed_events()
    with engine.pipeline() as pipeline:
        outputs = (
            pipeline
            | beam.Create([(index % 3, event) for index, event in enumerate(events)])
            | OnlineUpdate(MODEL, schema=SCHEMA, batch_size=20, warm_up=60)
        )
        _ = outputs.scored | "KeepScored" >> Collect(tmp_path / "scored")
        _ = outputs.snapshots | "KeepSnapshots" >> Collect(tmp_path / "snapshots")
    scored = collected(tmp_path / "scored")
    assert sorted(one.event["x"] for one in scored) == sorted(event["x"] for event in events)
    # Each key warmed up over its own first events, and then scored all others.
    assert [sum(one.log_prob is None for one in scored if one.key == key) for key in range(3)] == [60, 60, 60]
    snapshots = collected(tmp_path / "snapshots")
    latest = {key: max(learner.n_events for one, _, learner in snapshots if one == key) for key in range(3)}
    assert latest == {0: 334, 1: 333, 2: 333}


def test_run_inference_scores_what_the_learner_scores(engine: Engine, tmp_path: Path) -> None:
    events = mixed_events()
    fitted = BatchEM(MODEL, schema=SCHEMA).fit(events)
    save(fitted, tmp_path / "model.arrow")
    unusable = {"x": float("inf"), "y": 0.0, "shop": "a"}
    with engine.pipeline() as pipeline:
        split = (
            pipeline
            | beam.Create([*events, unusable])
            | RunInference(MixtureModelHandler(tmp_path / "model.arrow"))
            | beam.ParDo(SplitRejected()).with_outputs(REJECTED, main="scored")
        )
        _ = split.scored | "KeepScored" >> Collect(tmp_path / "scored")
        _ = split[REJECTED] | "KeepRejected" >> Collect(tmp_path / "rejected")
    by_x = {result.example["x"]: result.inference for result in collected(tmp_path / "scored")}
    scores = [by_x[event["x"]] for event in events]
    assert len(by_x) == len(events)
    expected = fitted.score_events(events)
    assert [score.component for score in scores] == expected.component.tolist()
    np.testing.assert_allclose([score.log_prob for score in scores], expected.log_prob, rtol=1e-10)
    (rejected,) = collected(tmp_path / "rejected")
    assert rejected.event == unusable


# Beam's threads that listen to the engine die with it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.prism
@pytest.mark.slow
def test_a_refit_whose_engine_is_killed_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    if not PRISM.exists():
        pytest.skip("Prism is not built: make prism")
    events = mixed_events()
    refit = Refit(MODEL, schema=SCHEMA, initial_parameters=a_start(events)[1], max_iter=3, tol=0.0)
    reading, folder = tmp_path / "reading", tmp_path / "run"
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [PRISM, "--job_port", str(port), "--serve_http=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def kill_in_the_second_iteration() -> None:
        while not (folder / "start-0" / "iteration-0001.arrow").exists():
            if server.poll() is not None:
                return
            time.sleep(0.01)
        reading.unlink()
        while not reading.exists() and server.poll() is None:
            time.sleep(0.01)
        server.kill()

    killer = threading.Thread(target=kill_in_the_second_iteration)
    killer.start()
    try:
        engine = Engine("killed", ("--runner=PrismRunner", f"--job_endpoint=localhost:{port}", *PRISM_FLAGS))
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            refit.run(SlowShards(events, 0.1, reading), str(folder), options=engine.options())
    finally:
        server.kill()
        server.wait()
        killer.join()
    kept = [path.name for path in sorted((folder / "start-0").iterdir())]
    assert kept == ["iteration-0001.arrow"]
    with prism() as another:
        resumed = refit.run(SlowShards(events, 0.0, reading), str(folder), options=another.options())
        undisturbed = refit.run(SlowShards(events, 0.0, reading), options=another.options())
    assert resumed.counts == undisturbed.counts
    assert_same_fit(resumed.learner, undisturbed.learner)
