"""The guide's evidence: a drifting market under each schedule, and stationary streams under each choice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.csv as pc
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score

from benchmarks.literature.experiment import (
    WRONG_BASIN,
    Section,
    Setup,
    color,
    dress,
    new_figure,
    out_of,
    spread,
)
from benchmarks.literature.mixtures import Study, from_random_labels, iris1, log_likelihood
from benchmarks.measure import Table
from stream_em import (
    BatchEM,
    Constant,
    Gaussian,
    HalfLife,
    Harmonic,
    Mixture,
    MixtureParameters,
    OnlineEM,
    RobbinsMonro,
    Schema,
)
from stream_em.families.gaussian import GaussianParameters
from stream_em.numerics import Array
from stream_em.seeding import seed as seed_parameters

A_DAY = 48
SCORED_FROM = 28 * A_DAY
MARKET_FIELDS = ("nswprice", "nswdemand")
N_MARKET_SEEDS = 3
N_MARKET_COMPONENTS = 5


def market_learners() -> dict[str, dict[str, Any]]:
    """Options of `OnlineEM` by what the table calls them."""
    return {
        "`Harmonic()`": {"schedule": Harmonic()},
        "`RobbinsMonro(0.6)`, the default": {"schedule": RobbinsMonro(0.6)},
        **{f"`Constant({step:g})`": {"schedule": Constant(step)} for step in (0.003, 0.01, 0.03, 0.1)},
        **{f"`HalfLife`, {days} days": {"schedule": HalfLife(float(days))} for days in (2, 7, 14, 30, 90, 365)},
        **{f"`window`, {days} days": {"window": days * A_DAY} for days in (7, 28, 91)},
    }


# Days between refits, and days of events that each is made on.
REFITS = ((7, 7), (7, 28), (28, 28), (91, 91))


def read_market(path: Path, n_events: int) -> Array:
    """Return price and demand (n, 2), a row every half hour."""
    table = pc.read_csv(path)
    return np.stack([table[name].to_numpy().astype(np.float64) for name in MARKET_FIELDS], axis=1)[:n_events]


class Prequential(NamedTuple):
    """Log-densities (n,) that each event had before it was learned, and the processor seconds that all of it took."""

    log_prob: Array
    seconds: float


def follow(events: Array, options: dict[str, Any], seed: int) -> Prequential:
    """Score each day's events with what was known before, then learn them."""
    learner = OnlineEM(
        Mixture(Gaussian(), N_MARKET_COMPONENTS),
        schema=Schema(dict.fromkeys(MARKET_FIELDS, "numeric")),
        batch_size=A_DAY,
        warm_up=7 * A_DAY,
        seed=seed,
        **options,
    )
    days = np.arange(len(events)) / A_DAY
    begin = time.process_time()
    scores = [
        learner.predict_then_update(events[at : at + A_DAY], time=days[at : at + A_DAY]).log_prob
        for at in range(0, len(events), A_DAY)
    ]
    return Prequential(np.concatenate(scores), time.process_time() - begin)


def refit(events: Array, every: int, n_days: int, seed: int) -> Prequential:
    """Every so many days fit the events of the last ones by batch EM, and score the next ones with it."""
    size = n_days * A_DAY
    schema = Schema(dict.fromkeys(MARKET_FIELDS, "numeric"))
    # Until the first refit is due there is the fit of the first week.
    bounds = [7 * A_DAY, *range(size, len(events), every * A_DAY), len(events)]
    scores = [np.zeros(bounds[0])]
    begin = time.process_time()
    for start, stop in pairwise(bounds):
        if stop <= start:
            continue
        fitted = BatchEM(Mixture(Gaussian(), N_MARKET_COMPONENTS), schema=schema, seed=seed)
        scores.append(fitted.fit(events[max(0, start - size) : start]).log_prob(events[start:stop]))
    return Prequential(np.concatenate(scores), time.process_time() - begin)


def run_market(setup: Setup) -> Section:
    """Prequential log-likelihood of every schedule on the electricity market, refitting beside them."""
    events = read_market(setup.file("elec2.csv"), setup.scaled(45_312, 2 * SCORED_FROM))
    seeds = setup.seeds(N_MARKET_SEEDS)
    works: dict[str, Callable[[int], Prequential]] = {
        **{name: partial(follow, events, options) for name, options in market_learners().items()},
        **{
            f"refit every {every} days on the last {days}": partial(refit, events, every, days)
            for every, days in REFITS
        },
    }
    jobs = [(name, work, seed) for name, work in works.items() for seed in seeds]
    found = setup.map(_call, [work for _, work, _ in jobs], [seed for _, _, seed in jobs])
    runs: dict[str, list[Prequential]] = {name: [] for name in works}
    for (name, _, _), one in zip(jobs, found):
        runs[name].append(one)
    rows = []
    for name, of_name in runs.items():
        means = [float(one.log_prob[SCORED_FROM:].mean()) for one in of_name]
        months = [_monthly(one.log_prob) for one in of_name]
        rows.append(
            (
                name,
                f"{statistics.median(means):.3f}",
                spread(means, ".3f"),
                f"{statistics.median(float(month.min()) for month in months):.3f}",
                f"{statistics.median(one.seconds for one in of_name):.2f}",
            )
        )
    table = Table(
        "A drifting stream",
        f"Price and demand of the New South Wales electricity market, {len(events):,} half-hours from May 1996; "
        f"{N_MARKET_COMPONENTS} full Gaussians, a mini-batch a day, warm-up of a week. Prequential: each day's events "
        "are scored with what was known the day before, then learned. Mean log-density in nats per event from the "
        f"fifth week on, its worst month, and the processor time of all that; medians of {len(seeds)} seeds.",
        ("", "mean log-density", "least to most", "worst month", "s"),
        rows,
    )
    figure, (axes,) = new_figure(1, height=4.0)
    shown = ("`Harmonic()`", "`RobbinsMonro(0.6)`, the default", "`HalfLife`, 7 days", "`HalfLife`, 90 days")
    for position, name in enumerate((*shown, "refit every 28 days on the last 28")):
        monthly = np.median([_monthly(one.log_prob) for one in runs[name]], axis=0)
        axes.plot(
            np.arange(len(monthly)) + 1, monthly, color=color(position), label=name.replace("`", ""), linewidth=1.4
        )
    axes.legend(fontsize=7, frameon=False)
    dress(axes, "A drifting stream", "months of 28 days, from the fifth week on", "mean log-density, nats per event")
    return Section(
        [table], figure, "Mean log-density in each month before its events were learned, medians of the seeds."
    )


def _call(work: Callable[[int], Prequential], seed: int) -> Prequential:
    return work(seed)


def _monthly(log_prob: Array) -> Array:
    scored = log_prob[SCORED_FROM:]
    size = 28 * A_DAY
    return scored[: len(scored) // size * size].reshape(-1, size).mean(axis=1)


N_STREAM_EVENTS = 100_000
N_STREAM_SEEDS = 10


def sixteen() -> Study:
    """Sixteen Gaussians of four fields, of unequal weights and shapes, some of which overlap."""
    generator = np.random.default_rng(16)
    roots = generator.normal(size=(16, 4, 4)) / 2.0
    covariance = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(4)
    weights = generator.dirichlet(np.full(16, 5.0))
    components = GaussianParameters(4.0 * generator.normal(size=(16, 4)), covariance)
    return Study(
        "Sixteen",
        "sixteen Gaussians of four fields and unequal weights",
        Mixture(Gaussian(), 16),
        Schema(dict.fromkeys("abcd", "numeric")),
        MixtureParameters(weights, components, np.arange(16)),
        {},
    )


STREAMS = {"Iris1": iris1, "Sixteen": sixteen}


class Learned(NamedTuple):
    """Nats per event below the true parameters on held-out events, adjusted Rand index, whether the basin is wrong."""

    below: float
    rand: float
    failed: bool


def learn(name: str, n_events: int, options: dict[str, Any], start: str, seed: int) -> Learned:
    """One pass of online EM, with the library's defaults but for the options, and a start of that kind."""
    study = STREAMS[name]()
    batch, _ = study.draw(n_events, seed)
    held_out, components = study.draw(n_events // 5, seed + 1_000)
    first = None
    generator = np.random.default_rng([seed, 1])
    if start == "one start":
        first = seed_parameters(study.model, batch.select(slice(0, 2_000)), generator, n_starts=1)
    elif start == "random labels":
        first = from_random_labels(study, batch.select(slice(0, 2_000)), generator)
    learner = OnlineEM(study.model, schema=study.schema, initial_parameters=first, seed=seed, **options)
    if learner.batch_size == 1:
        # One event at a time, as a stream brings them: compiled code takes those.
        for event in study.schema.decode(batch.values).to_pylist():
            learner.update(event)
    else:
        learner.update(batch)
    true = log_likelihood(study, study.truth, held_out) / held_out.n_events
    prediction = learner.score_events(held_out)
    below = true - float(prediction.log_prob.mean())
    return Learned(below, float(adjusted_rand_score(components, prediction.component)), below > WRONG_BASIN * abs(true))


class Choice(NamedTuple):
    """A choice of the guide: its title, what was done, and options of `OnlineEM` and kind of start by row."""

    title: str
    method: str
    rows: dict[str, tuple[dict[str, Any], str]]


SEEDED = "the library's"
CHOICES = {
    "batch-size": Choice(
        "Mini-batch size",
        "One pass with the library's defaults but for what the row says.",
        {f"`batch_size={size:,}`": ({"batch_size": size}, SEEDED) for size in (1, 10, 100, 1_000, 10_000)},
    ),
    "schedule": Choice(
        "Step size and averaging",
        "One pass with the library's defaults, which are mini-batches of 1,000, but for what the row says.",
        {
            **{
                f"`RobbinsMonro({alpha:g})`{', averaged' if averaging else ''}": (
                    {"schedule": RobbinsMonro(alpha), "averaging": averaging},
                    SEEDED,
                )
                for alpha in (0.55, 0.6, 0.8, 1.0)
                for averaging in (False, True)
            },
            **{f"`Constant({step:g})`": ({"schedule": Constant(step)}, SEEDED) for step in (0.01, 0.1)},
        },
    ),
    "warm-up": Choice(
        "Warm-up",
        "One pass with the library's defaults but for the number of events from which the first parameters come.",
        {f"`warm_up={size:,}`": ({"warm_up": size}, SEEDED) for size in (50, 200, 500, 2_000, 10_000)},
    ),
    "seeding": Choice(
        "Seeding",
        "One pass with the library's defaults, from a start on the first 2,000 events.",
        {
            "the library's: best of eight starts": ({"warm_up": 2_000}, SEEDED),
            "one of these starts": ({}, "one start"),
            "random labels": ({}, "random labels"),
        },
    ),
}


def run_choice(name: str, setup: Setup) -> Section:
    """What a choice changes on streams that do not drift."""
    n_events = setup.scaled(N_STREAM_EVENTS, 2_500)
    seeds = setup.seeds(N_STREAM_SEEDS)
    choice = CHOICES[name]
    jobs = [(stream, row, seed) for row in choice.rows for stream in STREAMS for seed in seeds]
    found = setup.map(
        learn,
        [stream for stream, _, _ in jobs],
        [n_events] * len(jobs),
        [choice.rows[row][0] for _, row, _ in jobs],
        [choice.rows[row][1] for _, row, _ in jobs],
        [seed for _, _, seed in jobs],
    )
    runs: dict[tuple[str, str], list[Learned]] = {}
    for (stream, row, _), one in zip(jobs, found):
        runs.setdefault((stream, row), []).append(one)
    columns = ("", *(f"{stream}: {what}" for stream in STREAMS for what in ("below the truth", "wrong basin", "ARI")))
    rows = [(row, *_summaries(runs[stream, row] for stream in STREAMS)) for row in choice.rows]
    method = (
        f"{choice.method} {n_events:,} events of two streams that do not drift: Iris1, three Gaussians of four fields "
        "that overlap, and sixteen Gaussians of four fields and unequal weights. Median nats per event by which "
        "held-out events fall below their log-likelihood under the true parameters, runs more than 1% below it, "
        f"median adjusted Rand index; {len(seeds)} seeds."
    )
    return Section([Table(choice.title, method, columns, rows)], *_choice_picture(choice, runs))


def _summaries(streams: Iterable[Sequence[Learned]]) -> Iterable[str]:
    for runs in streams:
        yield f"{statistics.median(one.below for one in runs):.4f}"
        yield out_of([one.failed for one in runs])
        yield f"{statistics.median(one.rand for one in runs):.3f}"


def _choice_picture(choice: Choice, runs: dict[tuple[str, str], list[Learned]]) -> tuple[Figure, str]:
    figure, (axes,) = new_figure(1, width=8.0, height=0.9 + 0.32 * len(choice.rows) + 0.6)
    for position, stream in enumerate(STREAMS):
        for at, row in enumerate(choice.rows):
            below = [max(one.below, 1e-5) for one in runs[stream, row]]
            height = [at + 0.3 * (position - 0.5)] * len(below)
            axes.scatter(below, height, s=14, alpha=0.6, color=color(position), linewidths=0)
        axes.scatter([], [], s=14, color=color(position), label=stream)
    axes.set_xscale("log")
    axes.set_yticks(range(len(choice.rows)), [row.replace("`", "") for row in choice.rows], fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    dress(axes, choice.title, "nats per event below the true parameters, held out", "")
    return (
        figure,
        "Every run as a point: how far held-out events fall below their log-likelihood under the true parameters.",
    )
