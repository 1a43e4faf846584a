"""Streams that change: how many events a learner needs until it is as good as a model of the new events only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.measure import Table
from stream_em import (
    AdaptiveComponents,
    Batch,
    BatchEM,
    Constant,
    Gaussian,
    HalfLife,
    Harmonic,
    Mixture,
    OnlineEM,
    RobbinsMonro,
    Schema,
)
from stream_em.numerics import Array

N_COMPONENTS = 3
BATCH = 500
SCHEMA = Schema({"x": "numeric", "y": "numeric", "z": "numeric"})
NAMES = SCHEMA.names
CENTERS = np.array([[0.0, 0.0, 0.0], [6.0, 0.0, 3.0], [0.0, 6.0, -3.0]])
# An event a second; what is forgotten after ten mini-batches is forgotten after as many seconds.
LEARNERS: dict[str, dict[str, object]] = {
    "Constant(0.05)": {"schedule": Constant(0.05)},
    "HalfLife of 10 batches": {"schedule": HalfLife(10.0 * BATCH)},
    "window of 20 batches": {"schedule": Harmonic(), "window": 20 * BATCH},
    "RobbinsMonro(0.6)": {"schedule": RobbinsMonro(0.6)},
    "adaptive, Constant(0.05)": {"schedule": Constant(0.05), "structure": AdaptiveComponents()},
    "adaptive, HalfLife of 10 batches": {"schedule": HalfLife(10.0 * BATCH), "structure": AdaptiveComponents()},
}
# Mean log-density may lie this far below that of a model of the new events only.
CLOSE = 0.1


@dataclass(frozen=True)
class Phase:
    """A stretch of a stream over which nothing changes.

    Parameters
    ----------
    name
        What is seen in it.
    draw
        Returns so many events (n, D), NaN where a value is missing.
    n_events
        How many there are.
    fields
        Those whose density is compared; a field that has become a constant has one without bound.

    """

    name: str
    draw: Callable[[int, np.random.Generator], Array]
    n_events: int
    fields: tuple[str, ...] = NAMES


def clusters(n_events: int, generator: np.random.Generator, *, shift: float = 0.0, scale: float = 1.0) -> Array:
    chosen = generator.integers(N_COMPONENTS, size=n_events)
    return scale * (CENTERS[chosen] + shift + generator.normal(size=(n_events, len(NAMES))))


def elsewhere(n_events: int, generator: np.random.Generator) -> Array:
    """Three other clusters, of other shapes and weights, elsewhere."""
    centers = np.array([[20.0, 20.0, 20.0], [20.0, 26.0, 10.0], [10.0, 10.0, 30.0]])
    chosen = generator.choice(N_COMPONENTS, size=n_events, p=(0.6, 0.3, 0.1))
    return centers[chosen] + generator.normal(size=(n_events, len(NAMES))) * np.array([[2.0], [0.5], [1.0]])[chosen]


def z_as(value: float) -> Callable[[int, np.random.Generator], Array]:
    def draw(n_events: int, generator: np.random.Generator) -> Array:
        values = clusters(n_events, generator)
        values[:, 2] = value
        return values

    return draw


def z_times(factor: float) -> Callable[[int, np.random.Generator], Array]:
    def draw(n_events: int, generator: np.random.Generator) -> Array:
        return clusters(n_events, generator) * np.array([1.0, 1.0, factor])

    return draw


def cases(n_events: int) -> dict[str, tuple[Phase, ...]]:
    """The changes, each after some events and with some to follow."""
    usual = Phase("before", clusters, n_events)
    return {
        "other clusters": (usual, Phase("after", elsewhere, n_events)),
        "unit of one field × 1000": (usual, Phase("after", z_times(1_000.0), n_events)),
        "unit of all fields × 1000": (usual, Phase("after", lambda n, g: clusters(n, g, scale=1_000.0), n_events)),
        "unit of one field / 1000": (usual, Phase("after", z_times(1e-3), n_events)),
        "a field dies and comes back": (
            usual,
            Phase("constant", z_as(7.0), n_events, ("x", "y")),
            Phase("missing", z_as(np.nan), n_events, ("x", "y")),
            Phase("back", clusters, n_events),
        ),
        "a field appears": (Phase("without", z_as(np.nan), n_events, ("x", "y")), Phase("with", clusters, n_events)),
    }


@dataclass(frozen=True)
class Recovery:
    """How a learner came through one phase.

    Parameters
    ----------
    phase
        Its name.
    needed
        Events from its start on until the learner is as good as a model of the phase only, and stays so; None if never.
    needed_for_one
        The same for a model with a single component.
    final, reference
        Mean log-density of events of the phase under the learner at its end, and under the model of it only.

    """

    phase: str
    needed: int | None
    needed_for_one: int | None
    final: float
    reference: float


def follow(phases: tuple[Phase, ...], options: dict[str, object], *, seed: int = 0) -> list[Recovery]:
    """Learn a stream and compare the learner, in each phase, with models of that phase only.

    Raises
    ------
    AssertionError
        When a parameter or a score is not finite, or a covariance not positive definite, at any time.

    """
    generator = np.random.default_rng([seed, 1])
    learner = OnlineEM(
        Mixture(Gaussian(), N_COMPONENTS), schema=SCHEMA, batch_size=BATCH, warm_up=BATCH, seed=seed, **options
    )
    second, recoveries = 0.0, []
    for phase in phases:
        test, references = reference(phase, seed)
        needed: list[int | None] = [None, None]
        final = -np.inf
        for start in range(0, phase.n_events, BATCH):
            times = second + np.arange(float(BATCH))
            second += BATCH
            events = phase.draw(BATCH, generator)
            prediction = learner.predict_then_update(Batch(events.T.copy(), SCHEMA, time=times))
            assert np.isfinite(prediction.log_prob).all()
            check_sound(learner)
            final = float(learner.marginal(phase.fields).log_prob(test).mean())
            for which, one in enumerate(references):
                if final < one - CLOSE:
                    needed[which] = None
                elif needed[which] is None:
                    needed[which] = start + BATCH
        recoveries.append(Recovery(phase.name, *needed, final, references[0]))
    return recoveries


@cache
def reference(phase: Phase, seed: int) -> tuple[Array, tuple[float, float]]:
    """Return events of a phase, and how likely they are under models, of all components and of one, of other events."""
    generator = np.random.default_rng([seed, 2])
    kept = [NAMES.index(name) for name in phase.fields]
    train, test = (phase.draw(n_events, generator)[:, kept] for n_events in (10_000, 2_000))
    schema = Schema(dict.fromkeys(phase.fields, "numeric"))
    of_all, of_one = (
        BatchEM(Mixture(Gaussian(), n_components), schema=schema, n_init=3, max_iter=50, seed=seed).fit(train)
        for n_components in (N_COMPONENTS, 1)
    )
    return test, (float(of_all.log_prob(test).mean()), float(of_one.log_prob(test).mean()))


def check_sound(learner: OnlineEM) -> None:
    """Check that nothing is NaN, every weight positive and every covariance positive definite."""
    parameters = learner.parameters
    assert np.isfinite(parameters.weights).all()
    assert (parameters.weights > 0.0).all()
    family = learner.model.bind(SCHEMA).family
    # Reading the arrays back refuses what is not finite or not positive definite.
    family.from_arrays(family.arrays(parameters.components))


def table(n_events: int = 60_000) -> Table:
    """Measure every change with every learner."""
    rows: dict[str, list[str]] = {}
    for change, phases in cases(n_events).items():
        for options in LEARNERS.values():
            for recovery in follow(phases, options)[1:]:
                what = change if len(phases) == 2 else f"{change}: {recovery.phase}"
                rows.setdefault(what, []).append(_shown(recovery))
        for what, cells in rows.items():
            if what.startswith(change):
                print("  ", what, *cells, sep=" | ", flush=True)
    return Table(
        "Drift",
        f"Three clusters of three numbers, mini-batches of {BATCH}, and after {n_events:,} events the stream "
        "changes; each change lasts as long. *Adaptive* learners have `structure=AdaptiveComponents()`. A number is "
        f"the events from then on until the mean log-density of fresh events is within {CLOSE:g} of that of a model "
        "fitted by batch EM to the new events only, and stays there; *one: n* means that the learner did not find "
        "the new clusters within these events, but came, after n of them, as close to a model with a single "
        "component. All the way every number is finite and every covariance positive definite. A field that has "
        "become a constant has a density without bound, so there the other fields are compared.",
        ("change", *LEARNERS),
        [(what, *cells) for what, cells in rows.items()],
    )


def _shown(recovery: Recovery) -> str:
    if recovery.needed is not None:
        return f"{recovery.needed:,}"
    if recovery.needed_for_one is not None:
        return f"one: {recovery.needed_for_one:,}"
    return f"not yet: {recovery.final:.2f} for {recovery.reference:.2f}"
