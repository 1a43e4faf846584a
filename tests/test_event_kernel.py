"""Single events through compiled code: law 12, and what must hold where that code hands over to NumPy."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import (
    CASES,
    COMPILED_CASES,
    NUMERIC,
    assert_parameters_equal,
    assert_sound,
    assert_statistics_close,
    draw_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_em import (
    Constant,
    EventError,
    Field,
    Gaussian,
    HalfLife,
    Harmonic,
    Mixture,
    OnlineEM,
    Poisson,
    RobbinsMonro,
    Schema,
)
from stream_em.event_kernel import EventKernel
from stream_em.families import automatic_family
from stream_em.numerics import LARGEST_LOG_DENSITY
from stream_em.schedules import StepSize
from stream_em.store import from_bytes, to_bytes

every_family = pytest.mark.parametrize("name", COMPILED_CASES)


def draw_events(name: str, n_events: int, seed: int, missing: float = 0.0) -> list[dict[str, Any]]:
    batch = draw_batch(CASES[name], n_events, seed, missing=missing)
    events: list[dict[str, Any]] = batch.schema.decode(batch.values).to_pylist()
    return events


def twins(name: str, **options: Any) -> tuple[OnlineEM, OnlineEM]:
    """Two learners alike, past their warm-up."""
    case = CASES[name]
    options = {"warm_up": 60, "seed": 1, "schema": case.schema} | options
    model = options.pop("model", None) or Mixture(case.family, 3, assignment=options.pop("assignment", "soft"))
    first, second = (OnlineEM(model, **options).update(draw_events(name, 61, 2)) for _ in range(2))
    return first, second


def kernel_of(learner: OnlineEM) -> EventKernel:
    kernel = learner.kernel()
    assert kernel is not None
    return kernel


def assert_alike(compiled: OnlineEM, reference: OnlineEM, tolerance: float = 1e-9) -> None:
    assert compiled.n_events == reference.n_events
    assert compiled.statistics is not None
    assert reference.statistics is not None
    assert_statistics_close(compiled.statistics, reference.statistics)
    family = reference.model.bind(reference.schema).family  # type: ignore[arg-type]
    found, wanted = compiled.parameters, reference.parameters
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=tolerance)
    arrays = family.arrays(found.components)
    for key, array in family.arrays(wanted.components).items():
        scale = np.abs(array).max() if "covariance" in key else 0.0
        np.testing.assert_allclose(arrays[key], array, rtol=tolerance, atol=tolerance * scale, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "missing", "n_events"), [("gaussian_full", 0.0, 10_000), ("product", 0.1, 3_000)])
def test_thousands_of_events_agree_with_blocks_of_one_in_numpy(name: str, missing: float, n_events: int) -> None:
    compiled, reference = twins(name)
    for position, event in enumerate(draw_events(name, n_events, 3, missing)):
        if position % 100 == 0:
            scored = kernel_of(compiled.update(event)).score(event)
            assert scored == pytest.approx(float(reference.update([event]).log_prob([event])[0]), rel=1e-9, abs=1e-9)
        else:
            compiled.update(event)
            reference.update([event])
    assert_alike(compiled, reference)


@every_family
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    missing=st.sampled_from([0.0, 0.3]),
    schedule=st.sampled_from([Harmonic(), RobbinsMonro(0.7, 2.0), Constant(0.3)]),
    batch_size=st.sampled_from([1, 7, 1000]),
    assignment=st.sampled_from(["soft", "hard"]),
)
def test_any_learner_agrees_with_blocks_of_one_in_numpy(
    name: str, seed: int, missing: float, schedule: StepSize, batch_size: int, assignment: str
) -> None:
    compiled, reference = twins(name, schedule=schedule, batch_size=batch_size, assignment=assignment)
    weights = np.random.default_rng(seed).exponential(size=30) * (np.arange(30) % 5 > 0)
    for event, weight in zip(draw_events(name, 30, seed, missing), weights.tolist()):
        compiled.update(event, weight)
        reference.update([event], weight)
    assert_alike(compiled, reference)
    for event in draw_events(name, 5, seed + 1, missing):
        kernel = kernel_of(compiled.update(event))
        reference.update([event])
        assert kernel.score(event) == pytest.approx(float(reference.log_prob([event])[0]), rel=1e-9, abs=1e-9)
        assert kernel.responsibilities == pytest.approx(reference.responsibilities([event])[0].tolist(), abs=1e-9)
        assert kernel.winner == kernel.predict(event) == reference.predict([event])[0]


def test_key_order_and_number_types_change_nothing() -> None:
    one, other = twins("gaussian_full")
    for event in draw_events("gaussian_full", 50, 5):
        whole = {name: round(value) for name, value in event.items()}
        one.update({name: float(value) for name, value in whole.items()})
        other.update({name: np.int64(whole[name]) if name == "x" else whole[name] for name in reversed(whole)})
    assert_parameters_equal(one.parameters, other.parameters, one.model.family)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"x": "much"}, "x"), ({"y": math.inf}, "y"), ({"z": [1.0]}, "z"), ({"z": 10**400}, "z"), ({"new": 1.0}, "new")],
)
def test_a_bad_event_names_its_field_and_leaves_no_trace(change: dict[str, Any], field: str) -> None:
    learner, _ = twins("gaussian_full")
    (good, event) = draw_events("gaussian_full", 2, 7)
    kernel_of(learner.update(good))
    before = to_bytes(learner)
    with pytest.raises(EventError) as caught:
        learner.update(event | change)
    assert caught.value.field == field
    assert to_bytes(learner) == before


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e-200])
def test_a_bad_weight_leaves_no_trace(weight: float) -> None:
    learner, _ = twins("gaussian_full")
    good, event = draw_events("gaussian_full", 2, 7)
    before = to_bytes(learner.update(good))
    with pytest.raises(EventError, match="weight"):
        learner.update(event, weight)
    assert to_bytes(learner) == before


@pytest.mark.parametrize(
    ("name", "value"), [("poisson", 1.5), ("poisson", -1), ("exponential", -0.5), ("bernoulli", 2)]
)
def test_values_out_of_a_fields_range_are_refused(name: str, value: float) -> None:
    learner, _ = twins(name)
    event = draw_events(name, 1, 7)[0]
    learner.update(event)
    field = next(iter(event))
    with pytest.raises(EventError) as caught:
        learner.update(event | {field: value})
    assert caught.value.field == field


def test_scoring_changes_nothing() -> None:
    learner, silent = twins("product")
    for position, event in enumerate(draw_events("product", 60, 4, missing=0.2)):
        learner.update(event)
        silent.update(event)
        for other in draw_events("product", 3, position):
            kernel_of(learner).score(other)
    assert to_bytes(learner) == to_bytes(silent)


def test_the_schema_grows_between_compiled_events() -> None:
    fields = [Field("x", "numeric"), Field("shop", "category", (), 3)]
    schema = Schema(fields)
    learners = [OnlineEM(Mixture(automatic_family(schema), 2), schema=schema, warm_up=20, seed=0) for _ in range(2)]
    generator = np.random.default_rng(0)
    shops = [*"ab" * 20, *"abc" * 20, *"abcdefgh" * 20]
    for value, shop in zip(generator.normal(size=len(shops)).tolist(), shops):
        event = {"x": value, "shop": shop}
        learners[0].update(event)
        learners[1].update([event])
    assert learners[0].schema.fields[1].categories == ("a", "b", "c")  # type: ignore[union-attr]
    assert_alike(*learners)


def test_ignored_fields_are_counted() -> None:
    schema = Schema(NUMERIC.fields, unknown="ignore")
    learner, _ = twins("gaussian_full", schema=schema)
    for event in draw_events("gaussian_full", 10, 3):
        learner.update(event | {"shop": "a"})
        assert kernel_of(learner).score(event | {"other": 1}) is not None
    assert learner.ignored_fields == {"shop": 10}


def test_a_far_outlier_gets_a_finite_score_and_is_survived() -> None:
    compiled, reference = twins("gaussian_full")
    for event in [*draw_events("gaussian_full", 20, 3), {"x": 1e99, "y": -1e99, "z": 0.0}]:
        compiled.update(event)
        reference.update([event])
    score = kernel_of(compiled).score({"x": -1e100, "y": 1e100, "z": 1e100})
    assert score is not None
    assert math.isfinite(score)
    assert_sound(compiled.model, compiled.parameters, NUMERIC)
    assert_alike(compiled, reference)


def test_fast_forgetting_does_not_wear_out_the_scale() -> None:
    compiled, reference = twins("product", schedule=Constant(0.999), batch_size=1)
    for event in draw_events("product", 120, 3):
        compiled.update(event)
        reference.update([event])
    assert_alike(compiled, reference)


def test_fields_on_a_line_are_repaired_as_numpy_repairs_them() -> None:
    # The prior is far too weak, beside such weights, to keep the covariances safely positive definite: rounding
    # decides how flat they are, and with it, to some digits, where the components lie.
    model = Mixture(Gaussian(), 2, prior_weight=2e-9)
    schema = Schema({"x": "numeric", "y": "numeric"})
    compiled, reference = (OnlineEM(model, schema=schema, warm_up=20, seed=0) for _ in range(2))
    for value in np.random.default_rng(0).normal(size=300).tolist():
        event = {"x": value, "y": 2.0 * value}
        compiled.update(event, 1e6)
        reference.update([event], 1e6)
    assert_sound(model, compiled.parameters, schema)
    np.testing.assert_allclose(compiled.parameters.components.mean, reference.parameters.components.mean, rtol=1e-3)


def test_blocks_and_single_events_may_alternate() -> None:
    compiled, reference = twins("gaussian_full")
    events = draw_events("gaussian_full", 90, 3)
    for start in range(0, 90, 30):
        for event in events[start : start + 15]:
            compiled.update(event)
            reference.update([event])
        compiled.update(events[start + 15 : start + 30])
        reference.update(events[start + 15 : start + 30])
    assert_alike(compiled, reference)


def test_pickles_and_snapshots_hold_what_single_events_taught() -> None:
    learner, _ = twins("product")
    events = draw_events("product", 40, 3)
    for event in events[:20]:
        learner.update(event)
    copies = [pickle.loads(pickle.dumps(learner)), from_bytes(to_bytes(learner))]
    for event in events[20:]:
        learner.update(event)
        for copy in copies:
            copy.update(event)
    for copy in copies:
        assert_alike(copy, learner, 1e-12)


def test_what_has_no_compiled_form_is_learned_in_numpy() -> None:
    class Halving(StepSize):
        def step_size(self, step: float) -> float:
            return 0.5

    case = CASES["poisson"]
    events = draw_events("poisson", 80, 3)
    for options in ({"averaging": True}, {"schedule": Halving()}, {"model": Mixture(Poisson(), 3, prior_weight=1e-12)}):
        learner, reference = twins("poisson", **options)
        for event in events:
            learner.update(event)
            reference.update([event])
        assert learner.kernel() is None
        assert_parameters_equal(learner.parameters, reference.parameters, case.family)
    learner = OnlineEM(Mixture(Poisson(), 3), schedule=HalfLife(10.0), schema=case.schema, warm_up=20)
    for time, event in enumerate(events):
        learner.update(event, time=float(time))
    assert learner.kernel() is None


def test_an_event_with_a_gap_whose_own_covariance_is_singular_is_left_to_numpy() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=200_000), 1e-4 * generator.normal(size=200_000)
    values = np.stack([first, first + second + 1e-7 * generator.normal(size=200_000), second], axis=1)
    learners = [
        OnlineEM(
            Mixture(Gaussian(), 1, prior_weight=1e-9), schedule=Harmonic(), warm_up=1_000, batch_size=10_000
        ).update(values)
        for _ in range(2)
    ]
    event = {"x1": float(values[5, 1]), "x2": float(values[5, 2])}
    assert kernel_of(learners[0]).score(event) is None
    learners[0].update(event)
    learners[1].update([event])
    assert_alike(*learners)


def test_only_what_is_learned_counts_as_ignored_and_only_once() -> None:
    schema = Schema({"a": "numeric", "b": "numeric"}, unknown="ignore")
    learner = OnlineEM(Mixture(Gaussian(), 2), schema=schema, warm_up=20, schedule=Constant(0.9), batch_size=1)
    learner.update(np.random.default_rng(0).normal(size=(25, 2)))
    assert learner.kernel() is not None
    for event, weight in (({"a": 1e200, "b": 2.0}, 1.0), ({"a": 1.0, "b": 2.0}, -1.0), ({"a": None, "b": None}, 1.0)):
        with pytest.raises(EventError):
            learner.update(event | {"z": 1.0}, weight)
    assert not learner.ignored_fields
    learner.update({"a": 1.0, "b": 2.0, "z": 5.0}, 1000.0)
    assert learner.ignored_fields == {"z": 1}


@pytest.mark.parametrize("kind", [defaultdict, Counter])
def test_mappings_that_answer_for_any_key_are_read_by_their_keys(kind: type[dict[str, float]]) -> None:
    schema = Schema({"a": "numeric", "b": "numeric"})
    learner = OnlineEM(Mixture(Gaussian(), 2), schema=schema, warm_up=20)
    learner.update(np.random.default_rng(0).normal(size=(25, 2)))
    assert learner.kernel() is not None
    event = kind(float) if kind is defaultdict else kind()
    event |= {"a": 1.0, "z": 3.0}
    for given_event in (event, [event]):
        with pytest.raises(EventError, match="'z'"):
            learner.update(given_event)
    assert event == {"a": 1.0, "z": 3.0}


def test_any_number_is_a_number_before_and_after_the_warm_up() -> None:
    numbers = {"x": Decimal("1.5"), "y": Fraction(1, 3), "z": np.float32(2.0)}
    learner, reference = twins("gaussian_full")
    for event in (numbers, {"x": Decimal("NaN"), "y": 1, "z": True}):
        learner.update(event)
        reference.update([event])
    assert_alike(learner, reference)


def test_schedule_and_batch_size_can_be_changed_on_the_way() -> None:
    learners = twins("gaussian_full")
    for position, event in enumerate(draw_events("gaussian_full", 90, 3)):
        for learner, given_event in zip(learners, (event, [event])):
            if position == 30:
                learner.batch_size = 10
            if position == 60:
                learner.schedule = Constant(0.3)
            learner.update(given_event)
    assert_alike(*learners)


@pytest.mark.parametrize(
    "setting", [{"NUMBA_DISABLE_JIT": "1"}, {"NUMBA_CACHE_DIR": "/proc/nowhere"}], ids=["no compiler", "no cache"]
)
def test_without_compiler_or_cache_events_are_still_learned(setting: dict[str, str]) -> None:
    program = (
        "import numpy as np; from stream_em import *\n"
        "learner = OnlineEM(Mixture(Gaussian(), 2), warm_up=20).update(np.random.default_rng(0).normal(size=(25, 2)))\n"
        "for _ in range(3): learner.update({'x0': 1.0, 'x1': 2.0})\n"
        "threads = BatchEM(Mixture(Gaussian(), 2), n_threads=2, max_iter=2)\n"
        "threads.fit(np.random.default_rng(0).normal(size=(9_999, 2)))\n"
        "print(learner.n_events)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")} | setting
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "28", done.stderr
    if "NUMBA_DISABLE_JIT" in setting:
        # Once for the events, once for the threads.
        assert done.stderr.count("compiled code cannot be loaded") == 2


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_one_event_that_outweighs_all_others_leaves_a_sound_model(kind: str) -> None:
    schema = Schema({"x": "numeric", "y": "numeric", "z": "numeric"})
    for seed in range(30):
        generator = np.random.default_rng(seed)
        learner = OnlineEM(
            Mixture(Gaussian(kind), 2),  # type: ignore[arg-type]
            schema=schema,
            schedule=Constant(0.9),
            batch_size=1,
            warm_up=20,
        ).update(generator.normal(size=(20, 3)))
        for _ in range(2):
            learner.update(generator.normal(size=(1, 3)).round(1), [1000.0])
        for _ in range(2):
            learner.update(dict(zip("xyz", generator.normal(size=3).round(1).tolist())), 1e6)
        assert_sound(learner.model, learner.parameters, schema)


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("name", ["gaussian_full", "gaussian_diag", "product"])
def test_events_without_weight_are_scored_and_leave_no_trace(name: str, assignment: str) -> None:
    learner, _ = twins(name, assignment=assignment)
    *events, last = draw_events(name, 40, 3)
    before = to_bytes(learner.update(last))
    for event in events:
        kernel = kernel_of(learner)
        assert kernel.learn(event, 0.0) == kernel.score(event)
        learner.update(event, 0.0).update([event], [0.0]).update(events, np.zeros(39))
    assert to_bytes(learner) == before


@every_family
def test_learning_tells_what_the_event_scored_before(name: str) -> None:
    learner, _ = twins(name)
    for event in draw_events(name, 30, 3, missing=0.2):
        kernel = kernel_of(learner)
        score = kernel.score(event)
        assert kernel.learn(event) == score
    assert kernel_of(learner).learn({"no field": 1.0}) is None


def test_a_failed_m_step_does_not_hide_what_the_event_scored() -> None:
    schema = Schema({"x": "numeric", "y": "numeric"})
    learner = OnlineEM(Mixture(Gaussian(), 1, prior_weight=1e-8), schema=schema, warm_up=20, batch_size=1)
    points = np.random.default_rng(0).normal(size=60).tolist()
    for value in points:
        event = {"x": value, "y": value}
        kernel = learner.kernel()
        if kernel is None:
            learner.update(event)
            continue
        score = kernel.score(event)
        assert score is not None
        assert math.isfinite(score)
        assert kernel.learn(event) == score
    assert_sound(learner.model, learner.parameters, schema)


def test_missing_values_of_unknown_fields_grow_no_schema() -> None:
    schema = Schema(NUMERIC.fields, unknown="add")
    learner, reference = twins("gaussian_full", schema=schema)
    kernel = kernel_of(learner)
    for event in draw_events("gaussian_full", 10, 3):
        odd = event | {"new": None}
        assert kernel.learn(odd) is not None
        reference.update([odd])
    assert kernel.learn({"x": 1.0, "new": 2.0}) is None
    assert learner.ignored_fields == reference.ignored_fields == {}
    assert_alike(learner, reference)


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("name", ["gaussian_full", "gaussian_tied", "gaussian_diag", "gaussian_spherical", "product"])
def test_an_event_beyond_the_range_of_doubles_is_equally_far_from_all(name: str, assignment: str) -> None:
    case = CASES[name]
    learner, _ = twins(name, assignment=assignment)
    learner.update(draw_events(name, 1, 4)[0])
    family = learner.model.bind(case.schema).family
    tiny = {
        key: array * (1e-120 if "covariance" in key else 1.0)
        for key, array in family.arrays(learner.parameters.components).items()
    }
    parameters = replace(learner.parameters, components=family.from_arrays(tiny))
    narrow = OnlineEM(learner.model, schema=case.schema, initial_parameters=parameters)
    event = draw_events(name, 1, 4)[0] | {field.name: 1e100 for field in case.schema.fields if field.kind == "numeric"}
    prediction = narrow.score_events([event])
    assert prediction.log_prob.tolist() == [-LARGEST_LOG_DENSITY]
    assert prediction.component.tolist() == [int(parameters.weights.argmax())]
    np.testing.assert_allclose(prediction.responsibilities, parameters.weights[None], rtol=1e-12)
    narrow._state = replace(learner._state, iterate=parameters)
    kernel = kernel_of(narrow)
    if (score := kernel.score(event)) is not None:
        assert score == pytest.approx(-LARGEST_LOG_DENSITY, rel=1e-12)
        assert kernel.responsibilities == pytest.approx(parameters.weights.tolist(), rel=1e-6)
    for told in (event, [event]):
        narrow.update(told, 1e10 if told is event else [1e10])
        assert np.isfinite(narrow.statistics.log_likelihood)  # type: ignore[union-attr]
    from_bytes(to_bytes(narrow))
