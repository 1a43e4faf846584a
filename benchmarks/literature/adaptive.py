"""Row 13: the number of components found while the stream is learned, Zivkovic & van der Heijden (2004)."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.literature.experiment import Section, Setup, at_least, color, dress, new_figure, out_of
from benchmarks.literature.small_data import draw_fit
from benchmarks.measure import Table
from stream_em import AdaptiveComponents, Constant, Gaussian, Mixture, OnlineEM
from stream_em.numerics import Array
from stream_em.plots import INK

N_EVENTS = 9_000
N_SEEDS = 20
N_TRUE = 3
PUBLISHED_SHARE = 17 / 20

MEANS = np.array([[0.0, -2.0], [0.0, 0.0], [0.0, 2.0]])
VARIANCES = np.array([2.0, 0.2])

DEATHS = "deaths alone, from 30 components, single events, step 1/150"


class Setting(NamedTuple):
    """How many components there are at the start, and options of `OnlineEM`."""

    n_components: int
    options: dict[str, Any]


SETTINGS = {
    DEATHS: Setting(
        30,
        {
            "schedule": Constant(1 / 150),
            "batch_size": 1,
            "structure": AdaptiveComponents(births=False, merges=False, splits=False),
        },
    ),
    **{
        f"all moves, from {start}, mini-batches of 100, default schedule": Setting(
            start, {"batch_size": 100, "structure": AdaptiveComponents()}
        )
        for start in (30, 1)
    },
}


def draw(n_events: int, seed: int) -> Array:
    """Return events (n, 2) of three equally likely Gaussians, one above the other."""
    generator = np.random.default_rng(seed)
    return MEANS[generator.integers(3, size=n_events)] + generator.normal(size=(n_events, 2)) * np.sqrt(VARIANCES)


class Found(NamedTuple):
    """The learner at the end, and the number of components after every hundred events."""

    learner: OnlineEM
    n_components: list[int]


def follow(setting: Setting, n_events: int, seed: int) -> Found:
    events = draw(n_events, seed)
    learner = OnlineEM(Mixture(Gaussian(), setting.n_components), seed=seed, **setting.options)
    path = []
    for start in range(0, n_events, 100):
        learner.update(events[start : start + 100])
        path.append(setting.n_components if learner.warming_up else learner.parameters.n_components)
    return Found(learner, path)


def run(setup: Setup) -> Section:
    """How many of the runs end with three components."""
    n_events, seeds = setup.scaled(N_EVENTS, 1_000), setup.seeds(N_SEEDS)
    rows, of_deaths = [], []
    for name, setting in SETTINGS.items():
        found = setup.map(partial(follow, setting, n_events), seeds)
        numbers = [one.n_components[-1] for one in found]
        right = [number == N_TRUE for number in numbers]
        changes = np.sum([one.learner.structure_changes for one in found], axis=0)
        counted = ", ".join(f"{number}: {times}" for number, times in sorted(Counter(numbers).items()))
        published, target = "", ""
        if name == DEATHS:
            of_deaths = found
            published, target = "17 of 20 at least", at_least(sum(right), PUBLISHED_SHARE, len(right))
        rows.append(
            (name, published, out_of(right), counted, "/".join(f"{one / len(found):.1f}" for one in changes), target)
        )
    table = Table(
        "Row 13. As many components as there are",
        "Zivkovic & van der Heijden (2004, *IEEE Transactions on Pattern Analysis and Machine Intelligence* 26), "
        f"section 5: {n_events:,} events of three equally likely Gaussians with means (0, -2), (0, 0), (0, 2) and "
        f"covariance diag(2, 0.2); {len(seeds)} seeds. `structure=AdaptiveComponents(...)`: the paper's recursive "
        "deaths alone, in its settings; then births, merges and splits as well, from too many and from too few "
        "components.",
        ("", "published", "ended with 3", "components at the end: runs", "births/deaths/merges/splits a run", "target"),
        rows,
    )
    figure, (left, right_panel) = new_figure(2)
    for one in of_deaths:
        left.plot(
            100 * (np.arange(len(one.n_components)) + 1), one.n_components, color=color(0), linewidth=0.8, alpha=0.5
        )
    left.axhline(N_TRUE, color=INK, linewidth=0.8, linestyle=":")
    dress(left, "Deaths alone, from 30", "events", "components")
    draw_fit(right_panel, of_deaths[0].learner, draw(1_000, seeds[0]))
    dress(right_panel, "The first run at its end", "x", "y")
    return Section(
        [table],
        figure,
        "Left: the number of components in each of the runs of the published settings; dotted, the true number. Right: "
        "the components that were left in the first, as ellipses of two standard deviations.",
    )
