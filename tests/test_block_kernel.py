"""Mini-batches through compiled code agree with NumPy, and hand over to it where they must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from cases import CASES, COMPILED_CASES, assert_statistics_close, draw_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from threadpoolctl import threadpool_info, threadpool_limits

from stream_em import (
    AdaptiveComponents,
    Batch,
    Constant,
    EventError,
    Gaussian,
    Harmonic,
    Mixture,
    OnlineEM,
    Product,
    RobbinsMonro,
    Schema,
    compiled_blocks,
)
from stream_em.block_kernel import BlockKernel
from stream_em.compiled_blocks import _accumulate, _project, compiled_step_block
from stream_em.learners import online
from stream_em.learners.online import WORTH_COMPILING
from stream_em.models import mixture
from stream_em.numerics import NumericalError
from stream_em.schedules import StepSize
from stream_em.state import has_compiled_blocks
from stream_em.store import to_bytes

SCHEMA = Schema({"u": "numeric", "x": "numeric", "v": "numeric", "y": "numeric"})
FAMILIES = {
    "full": Gaussian("full"),
    "diag": Gaussian("diag"),
    "spherical": Gaussian("spherical"),
    "mixed": Product({("x", "y"): Gaussian("full"), "u": Gaussian("diag"), "v": Gaussian("full", reg_covar=0.1)}),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def draw(n_events: int, seed: int, *, weighted: bool = False) -> Batch:
    generator = np.random.default_rng(seed)
    centers = np.array([[0.0, 0.0, 5.0, 1.0], [4.0, -3.0, 5.0, 1.0], [4.0, 6.0, -2.0, 1e3]])
    values = centers[generator.integers(3, size=n_events)] + generator.normal(size=(n_events, 4)) * [1, 2, 0.1, 5]
    weight = generator.exponential(size=n_events) * generator.integers(2, size=n_events) if weighted else None
    return SCHEMA.encode(values, weight)


def ready(name: str, **options: Any) -> OnlineEM:
    model = Mixture(FAMILIES[name], 3)
    return OnlineEM(model, schema=SCHEMA, warm_up=200, seed=1, **options).update(draw(400, 0))


def blocks_of(learner: OnlineEM) -> BlockKernel:
    """Have mini-batches learned in compiled code from now on, though they are few so far."""
    kernel = learner._kernel_with("blocks", has_compiled_blocks)
    assert kernel is not None
    return kernel.blocks


@every_family
@settings(max_examples=6)
@given(
    sizes=st.lists(st.integers(1, 2_500), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    schedule=st.sampled_from([Harmonic(), RobbinsMonro(0.8), Constant(0.3)]),
    weighted=st.booleans(),
)
def test_mini_batches_agree_with_numpy(
    name: str, sizes: list[int], seed: int, schedule: StepSize, weighted: bool
) -> None:
    compiled, reference = (ready(name, schedule=schedule, batch_size=1_500) for _ in range(2))
    for number, size in enumerate(sizes):
        batch = draw(size, seed + number, weighted=weighted)
        assert blocks_of(compiled)
        found, wanted = compiled.predict_then_update(batch), reference.predict_then_update(batch)
        np.testing.assert_allclose(found.log_prob, wanted.log_prob, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.responsibilities, wanted.responsibilities, atol=1e-9)
        assert np.array_equal(found.component, wanted.component)
    assert compiled.statistics is not None
    assert reference.statistics is not None
    assert_statistics_close(compiled.statistics, reference.statistics)
    family = reference.model.bind(SCHEMA).family
    arrays = family.arrays(compiled.parameters.components)
    for key, array in family.arrays(reference.parameters.components).items():
        np.testing.assert_allclose(arrays[key], array, rtol=1e-9, atol=1e-9 * np.abs(array).max(), err_msg=key)


@njit  # type: ignore[misc]
def multiply_in_tiles(theta: Any, features: Any, shares: Any, log_joint: Any, sums: Any) -> None:
    _project(theta, features, log_joint)
    _accumulate(shares, features, sums)


def test_products_in_tiles_are_those_of_numpy() -> None:
    # Whether the processor is one on which a step takes them, or not.
    generator = np.random.default_rng(0)
    for n_components in range(1, 10):
        for n_features in range(1, 10):
            theta = generator.normal(size=(n_components, n_features + 1))
            features, shares = generator.normal(size=(n_features, 11)), generator.normal(size=(n_components, 11))
            log_joint, sums = np.empty((n_components, 11)), np.ones((n_components, n_features + 1))
            multiply_in_tiles(theta, features, shares, log_joint, sums)
            np.testing.assert_allclose(log_joint, theta[:, :-1] @ features + theta[:, -1:], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(sums[:, :-1], shares @ features.T + 1.0, rtol=1e-12, atol=1e-12)


def test_many_correlated_fields_agree_with_numpy() -> None:
    n_fields = 70
    generator = np.random.default_rng(0)
    mix = np.eye(n_fields) + 0.5 * generator.normal(size=(n_fields, n_fields)) / n_fields**0.5
    events = generator.normal(size=(6_000, n_fields)) @ mix + 1e4 + 6.0 * generator.integers(2, size=(6_000, 1))
    compiled, reference = (OnlineEM(Mixture(Gaussian(), 2), batch_size=500).update(events[:3_000]) for _ in range(2))
    kernel = blocks_of(compiled)
    found, wanted = (one.predict_then_update(events[3_000:]) for one in (compiled, reference))
    assert compiled._kernel is not None
    assert compiled._kernel.blocks is kernel
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, rtol=1e-9)
    np.testing.assert_allclose(found.responsibilities, wanted.responsibilities, atol=1e-9)
    assert_statistics_close(compiled.statistics, reference.statistics)  # type: ignore[arg-type]
    covariance = reference.parameters.components.covariance
    np.testing.assert_allclose(compiled.parameters.components.covariance, covariance, rtol=1e-9, atol=1e-10)


@every_family
def test_arrays_of_single_events_are_learned_as_the_events_that_they_hold(name: str) -> None:
    by_array, by_batch, by_dict = (ready(name, batch_size=1) for _ in range(3))
    batch = draw(50, 3)
    assert blocks_of(by_array)
    assert blocks_of(by_batch)
    kernel = by_array._kernel
    for number, values in enumerate(batch.values.T):
        event = dict(zip(SCHEMA.names, values.tolist()))
        wanted = by_dict.score_events([event])
        found = by_array.predict_then_update(values[None])
        by_dict.update(event)
        np.testing.assert_allclose(found.log_prob, wanted.log_prob, rtol=1e-12)
        np.testing.assert_allclose(found.responsibilities, wanted.responsibilities, atol=1e-12)
        assert np.array_equal(found.component, wanted.component)
        by_batch.update(batch.select(slice(number, number + 1)))
    assert by_array._kernel is kernel
    assert to_bytes(by_array) == to_bytes(by_dict) == to_bytes(by_batch)


@every_family
@pytest.mark.parametrize("n_events", [1, 2, 3, 10, 1_000])
def test_mini_batches_of_any_size_are_learned_in_compiled_code(name: str, n_events: int) -> None:
    learner = ready(name)
    assert blocks_of(learner).learn(draw(n_events, 5).values, keep=False) is not None
    assert learner.n_events == 400 + n_events


@pytest.mark.parametrize("cause", ["far", "no weight"])
def test_what_asks_for_care_changes_nothing_in_compiled_code(cause: str) -> None:
    learner, batch = ready("full"), draw(300, 5)
    odd = replace(batch, values=batch.values + 1e9) if cause == "far" else replace(batch, weight=np.zeros(300))
    blocks, before = blocks_of(learner), to_bytes(learner)
    assert blocks.learn(odd.values, odd.weight, keep=True) is None
    assert to_bytes(learner) == before


@every_family
@settings(max_examples=30)
@given(
    value=st.sampled_from([np.nan, np.inf, -np.inf, 1e60, -1e200]),
    event=st.integers(0, 1_499),
    field=st.integers(0, 3),
    weight=st.sampled_from([None, 0.0, 1e-150, 1.0]),
)
def test_a_value_that_is_no_plain_number_changes_nothing_in_compiled_code(
    name: str, value: float, event: int, field: int, weight: float | None
) -> None:
    learner, batch = ready(name), draw(1_500, 5)
    values = batch.values.copy()
    values[field, event] = value
    weights = None if weight is None else np.ones(1_500)
    if weights is not None and weight is not None:
        weights[event] = weight
    blocks, before = blocks_of(learner), to_bytes(learner)
    learned = blocks.learn(values, weights, keep=True)
    if learned is None:
        assert to_bytes(learner) == before
    else:
        # What weighs next to nothing may be as far as it likes.
        assert weight is not None
        assert weight < 1.0
        assert abs(value) == 1e60
        assert learner.statistics is not None
        for part in learner.statistics.parts.values():
            assert all(np.isfinite(array).all() for array in part.arrays().values())


@pytest.mark.parametrize("cause", ["missing", "far", "no events", "no weight"])
def test_odd_mini_batches_between_compiled_ones_are_learned_in_numpy(cause: str) -> None:
    learner, reference = ready("full"), ready("full")
    batch = draw(300, 5)
    values, weight = batch.values.copy(), None
    if cause == "missing":
        values[1, 7] = np.nan
    elif cause == "far":
        values += 1e9
    elif cause == "no weight":
        weight = np.zeros(300)
    odd = Batch(values[:, :0] if cause == "no events" else values, SCHEMA, weight)
    assert blocks_of(learner)
    learner.update(odd).update(batch)
    reference.update(odd).update(batch)
    assert learner.statistics is not None
    assert reference.statistics is not None
    assert_statistics_close(learner.statistics, reference.statistics)


@pytest.mark.parametrize("name", [name for name in COMPILED_CASES if "gaussian" not in name] + ["gaussian_tied"])
def test_other_families_are_learned_in_numpy_after_compiled_events_too(name: str) -> None:
    case = CASES[name]
    learner, reference = (
        OnlineEM(Mixture(case.family, 2), schema=case.schema, warm_up=50).update(draw_batch(case, 100, 0))
        for _ in range(2)
    )
    assert learner.kernel() is not None
    batch = draw_batch(case, 50, 1)
    assert_statistics_close(learner.update(batch).statistics, reference.update(batch).statistics, 0.0)  # type: ignore[arg-type]


def test_a_failed_update_takes_earlier_pieces_back(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = ready("full", batch_size=100)
    blocks = blocks_of(learner)
    before = to_bytes(learner)
    blocks_of(learner)
    learn, calls = blocks.learn, []

    def interrupted(*block: Any, keep: bool) -> Any:
        calls.append(block)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*block, keep=keep)

    monkeypatch.setattr(blocks, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.update(draw(500, 3))
    assert len(calls) == 3
    assert to_bytes(learner) == before


@pytest.mark.parametrize("form", ["rows", "columns", "float32", "list", "more than a mini-batch"])
def test_an_array_is_learned_as_the_batch_that_it_encodes_to(form: str) -> None:
    learner, reference = ready("full", batch_size=300), ready("full", batch_size=300)
    batch = draw(500 if form == "more than a mini-batch" else 300, 5)
    rows: Any = np.ascontiguousarray(batch.values.T)
    if form == "columns":
        rows = np.asfortranarray(rows)
    elif form == "float32":
        rows = rows.astype(np.float32)
        batch = SCHEMA.encode(rows)
    elif form == "list":
        rows = [dict(zip(SCHEMA.names, row)) for row in rows.tolist()]
    assert blocks_of(learner)
    assert blocks_of(reference)
    found, expected = learner.predict_then_update(rows), reference.predict_then_update(batch)
    for mine, theirs in zip(found, expected):
        np.testing.assert_array_equal(mine, theirs)
    assert to_bytes(learner) == to_bytes(reference)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e101])
def test_an_array_that_cannot_be_learned_changes_nothing(value: float) -> None:
    learner = ready("full")
    before, rows = to_bytes(learner), np.ascontiguousarray(draw(300, 5).values.T)
    assert blocks_of(learner)
    rows[[3, 4], 1] = value
    with pytest.raises(EventError) as caught:
        learner.update(rows)
    assert (caught.value.index, caught.value.field) == (3, SCHEMA.names[1])
    assert to_bytes(learner) == before


def test_an_array_whose_repair_fails_is_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = ready("full")
    blocks = blocks_of(learner)
    before, learn = to_bytes(learner), blocks.learn
    blocks_of(learner)

    def fails_after_learning(*block: Any, keep: bool) -> Any:
        learn(*block, keep=keep)
        raise NumericalError("a covariance is not finite")

    monkeypatch.setattr(blocks, "learn", fails_after_learning)
    with pytest.raises(NumericalError):
        learner.update(np.ascontiguousarray(draw(300, 5).values.T))
    assert to_bytes(learner) == before


def test_missing_values_in_an_array_are_marginalised_after_compiled_arrays_too() -> None:
    learner, reference = ready("full"), ready("full")
    assert blocks_of(learner)
    batch = draw(300, 5)
    batch.values[0, 7] = np.nan
    learner.update(np.ascontiguousarray(batch.values.T))
    reference.update(replace(batch))
    assert_statistics_close(learner.statistics, reference.statistics)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["diag", "spherical", "mixed"])
def test_complete_mini_batches_after_ones_with_gaps_agree_with_numpy(name: str) -> None:
    gaps = draw(1_000, 1)
    gone = np.random.default_rng(2).random(1_000) < 0.9
    gaps.values[0, gone] = np.nan
    compiled, reference = (ready(name).update(replace(gaps)) for _ in range(2))
    for seed in (3, 4):
        batch = draw(1_000, seed)
        assert blocks_of(compiled)
        compiled.update(batch)
        reference.update(batch)
    assert compiled._kernel is not None
    assert compiled.statistics is not None
    assert reference.statistics is not None
    assert_statistics_close(compiled.statistics, reference.statistics)


def test_events_without_weight_move_no_clock() -> None:
    learner, reference = ready("mixed", batch_size=100), ready("mixed", batch_size=100)
    batch = draw(300, 5)
    for start in range(0, 300, 100):
        piece = batch.select(slice(start, start + 100))
        told = replace(piece, weight=(np.arange(100) < 60).astype(float))
        assert blocks_of(learner).learn(told.values, told.weight, keep=False) is not None
        reference.update(piece.select(slice(0, 60)))
    assert learner.n_events == reference.n_events == 580
    assert learner.statistics is not None
    assert reference.statistics is not None
    assert_statistics_close(learner.statistics, reference.statistics)


def test_the_usual_average_is_learned_in_numpy_once_it_is_wanted() -> None:
    learner, reference = ready("full"), ready("full")
    assert blocks_of(learner)
    for one in (learner, reference):
        one.averaging = True
        one.update(draw(500, 3)).update(draw(500, 4))
    assert learner._average.reported is not None
    np.testing.assert_allclose(
        learner.parameters.components.mean, reference.parameters.components.mean, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["int64", "float32", ">f8"])
def test_batches_of_any_type_of_number_are_learned_alike(kind: str) -> None:
    generator = np.random.default_rng(11)
    # Whole numbers, which all these types hold exactly.
    values = generator.integers(0, 5, size=(4, 1_200)) + 20 * generator.integers(2, size=1_200)
    weight = generator.integers(1, 4, size=1_200)
    learners = []
    for dtype in ("float64", kind):
        learner = OnlineEM(Mixture(Gaussian(), 2), schema=SCHEMA, warm_up=200, batch_size=50)
        learner.update(Batch(values[:, :600].astype(dtype), SCHEMA, weight[:600].astype(dtype)))
        assert learner.kernel() is not None
        learners.append(learner.update(Batch(values[:, 600:].astype(dtype), SCHEMA, weight[600:].astype(dtype))))
    expected, found = (learner.parameters for learner in learners)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-12)
    np.testing.assert_allclose(found.components.mean, expected.components.mean, rtol=1e-12)
    np.testing.assert_allclose(found.components.covariance, expected.components.covariance, rtol=1e-10)


@pytest.mark.parametrize(("covariance_type", "averaging"), [("tied", False), ("full", True)])
def test_what_has_no_compiled_step_takes_its_e_step_in_compiled_code(
    covariance_type: Literal["full", "tied"], averaging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = np.random.default_rng(0).normal(size=(1_500, 4)) + np.repeat([[0.0], [6.0], [0.0]], 500, axis=0)
    compiled, reference = (
        OnlineEM(Mixture(Gaussian(covariance_type), 2), batch_size=100, averaging=averaging).update(events[:1_000])
        for _ in range(2)
    )
    wanted = reference.predict_then_update(events[1_000:])
    entered = []
    e_step = mixture._sum_features()
    assert e_step is not None
    monkeypatch.setattr(mixture, "_sum_features", lambda: lambda *inputs: (entered.append(1), e_step(*inputs))[1])
    monkeypatch.setattr(online, "COMPILE_AFTER", compiled._state.n_updates)
    found = compiled.predict_then_update(events[1_000:])
    assert len(entered) == 5
    assert compiled._kernel is None
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, rtol=1e-9)
    np.testing.assert_allclose(found.responsibilities, wanted.responsibilities, atol=1e-9)
    assert_statistics_close(compiled.statistics, reference.statistics)  # type: ignore[arg-type]


def test_weights_are_told_without_working_out_the_other_parameters() -> None:
    learner = ready("full")
    assert blocks_of(learner)
    learner.update(draw(500, 3))
    weights = learner.weights
    assert learner._kernel is not None
    assert learner._kernel.ahead
    np.testing.assert_array_equal(weights, learner.parameters.weights)
    np.testing.assert_array_equal(learner.weights, weights)


@pytest.mark.parametrize(("n_events", "compiled"), [(WORTH_COMPILING * 50, True), (WORTH_COMPILING * 50 - 1, False)])
def test_for_many_events_compiled_code_is_there_at_once(n_events: int, compiled: bool) -> None:
    events = np.random.default_rng(0).normal(size=(1_500, 4)) + np.repeat([[0.0], [6.0], [0.0]], 500, axis=0)
    learner, reference = (OnlineEM(Mixture(Gaussian(), 2), batch_size=50, warm_up=100) for _ in range(2))
    learner.expect(n_events).update(events[:200])
    assert (learner._kernel is not None) == compiled
    learner.update(events[200:])
    assert_statistics_close(learner.statistics, reference.update(events).statistics)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_a_structure_that_is_taken_away_leaves_its_components_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "COMPILE_AFTER", 5)
    generator = np.random.default_rng(1)
    events = generator.normal(size=(6_000, 2)) + 10.0 * generator.integers(4, size=(6_000, 1))
    structure = AdaptiveComponents()
    learner = OnlineEM(
        Mixture(Gaussian(), 2), structure=structure, batch_size=200, schedule=Constant(0.05), seed=0
    ).update(events)
    n_components = learner.parameters.n_components
    assert n_components > 2
    learner.structure = None
    assert learner.predict_then_update(events[:200]).responsibilities.shape == (200, n_components)
    assert learner.kernel() is None


def test_blas_has_one_thread_while_it_multiplies_what_it_would_share_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads take longer over a mini-batch than one of them, and more of the processor.
    seen = []

    def watched(**kind: bool) -> Any:
        step = compiled_step_block(**kind)

        def watched_step(*inputs: Any) -> float:
            seen.append({one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"})
            return float(step(*inputs))

        return watched_step

    monkeypatch.setattr(compiled_blocks, "compiled_step_block", watched)
    generator = np.random.default_rng(0)
    learner = OnlineEM(Mixture(Gaussian(), 16), warm_up=400).update(generator.normal(size=(400, 20)))
    blocks = blocks_of(learner)
    with threadpool_limits(2, user_api="blas"):
        for n_events in (500, 20):
            blocks.learn(generator.normal(size=(20, n_events)), keep=False)
    # Few events it does not share out.
    assert seen == [{1}, {2}]
