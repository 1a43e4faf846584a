"""Rows 6 and 7: incremental and variance-reduced EM over a finite set of events."""

from __future__ import annotations

import gzip
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.literature.experiment import (
    Comparison,
    Section,
    Setup,
    color,
    comparison_table,
    dress,
    new_figure,
    spread,
)
from benchmarks.measure import Table
from stream_em import (
    FIEM,
    Batch,
    BatchEM,
    Constant,
    Gaussian,
    Harmonic,
    Incremental,
    Mixture,
    MixtureParameters,
    OnlineEM,
    Schema,
    Statistics,
    VarianceReduced,
)
from stream_em.families.gaussian import GaussianParameters
from stream_em.methods import iterations
from stream_em.numerics import Array

KNOWN_WEIGHTS, KNOWN_VARIANCES = np.array([0.2, 0.8]), np.ones(2)
N_EPOCHS = 30
N_SEEDS = {1_000: 3, 10_000: 1}
ERRORS = {
    "batch EM": {1_000: 2.6e-6, 10_000: 5.8e-5},
    "incremental EM": {1_000: 1.4e-5, 10_000: 1.6e-4},
    "online EM": {1_000: 2.5e-2, 10_000: 1.0e-2},
    "sEM-vr": {1_000: 6e-15, 10_000: 1.5e-14},
    "FIEM": {1_000: 1.4e-11, 10_000: 1.2e-10},
}
METHODS = {
    "batch EM": None,
    "incremental EM": Incremental(1),
    "sEM-vr": VarianceReduced(None, 1),
    "FIEM": FIEM(None, 1),
}


@dataclass(frozen=True)
class KnownShape(Mixture):
    """A mixture of which only the means are learned: weights and variances are known."""

    def m_step(self, statistics: Statistics, prior: Any = None, *, kept: Any = None) -> MixtureParameters:
        free = super().m_step(statistics, prior, kept=kept)
        return replace(free, weights=KNOWN_WEIGHTS, components=_unit(free.components.mean))


def _unit(mean: Array) -> GaussianParameters:
    return GaussianParameters(mean, KNOWN_VARIANCES)


def errors(n_events: int, n_epochs: int, method: str, seed: int) -> Array:
    """Distance of the minority mean from where batch EM converges to, after each epoch of a method."""
    generator = np.random.default_rng(seed)
    minority = generator.random(n_events) < KNOWN_WEIGHTS[0]
    values = np.where(minority, 0.5, -0.5) + generator.normal(size=n_events)
    batch = Schema({"x": "numeric"}).encode(values[:, None])
    # The paper has no prior; this one is below rounding.
    model = KnownShape(Gaussian("spherical"), 2, prior_weight=1e-12).bind(batch.schema)
    start = MixtureParameters(KNOWN_WEIGHTS, _unit(np.array([[1.0], [-1.0]])), np.arange(2))
    *_, settled = islice(iterations(model, start, lambda: [batch]), 1_000)
    if method == "online EM":
        path = _online(model, start, batch, generator)
    else:
        chosen = METHODS[method]
        if chosen is not None and not isinstance(chosen, Incremental):
            chosen = replace(chosen, seed=seed)
        steps = iterations if chosen is None else chosen.iterations
        path = (step.parameters for step in steps(model, start, lambda: [batch]))
    return np.array(
        [abs(one.components.mean[0, 0] - settled.parameters.components.mean[0, 0]) for one in islice(path, n_epochs)]
    )


def _online(
    model: Mixture, start: MixtureParameters, batch: Batch, generator: np.random.Generator
) -> Iterator[MixtureParameters]:
    """Yield the parameters after each epoch of single events drawn at random, with step size 1 / (k + 6), k from 0."""
    # Statistics of the weight of five events, as expected at the start, make the first step size 1 / 6.
    before = model.e_step(start, batch).scale(5.0 / batch.n_events)
    learner = OnlineEM(model, schema=batch.schema, schedule=Harmonic(), batch_size=1, initial_parameters=start).resume(
        before, n_events=5
    )
    while True:
        learner.update(batch.select(generator.integers(batch.n_events, size=batch.n_events)))
        yield learner.parameters


def run_known_shape(setup: Setup) -> Section:
    """Row 6: how near each method comes to the fixed point of batch EM in 30 epochs."""
    n_epochs = setup.scaled(N_EPOCHS, 2)
    rows, paths = [], {}
    # The longest runs first, so that both processes end together.
    settings = [
        (n_published, setup.scaled(n_published, 20), method, seed)
        for n_published in sorted(N_SEEDS, reverse=True)
        for method in reversed(ERRORS)
        for seed in setup.seeds(N_SEEDS[n_published])
    ]
    found = setup.map(
        errors,
        [one[1] for one in settings],
        [n_epochs] * len(settings),
        *([one[at] for one in settings] for at in (2, 3)),
    )
    for (n_published, n_events, method, _), path in zip(settings, found):
        paths.setdefault((n_published, n_events, method), []).append(path)
    for n_published in N_SEEDS:
        for method, published in ERRORS.items():
            n_events = setup.scaled(n_published, 20)
            last = [float(path[-1]) for path in paths[n_published, n_events, method]]
            figure = statistics.median(last)
            met = figure <= 10.0 * published[n_published]
            rows.append(
                (
                    f"{n_events:,}",
                    method,
                    f"{published[n_published]:.1e}",
                    f"{figure:.1e}",
                    spread(last, ".1e"),
                    f"at most 10×: {'met' if met else 'MISSED'}",
                )
            )
    table = Table(
        "Row 6. Two Gaussians of known shape: incremental and variance-reduced EM",
        "Karimi, Wai, Moulines & Lavielle (2019, *NeurIPS*), section 4.1: means ±0.5, weights 0.2 and 0.8 and unit "
        f"variances known; start at ±1; blocks of one event, {n_epochs} epochs, step size n^(-2/3), that of online EM "
        "1 / (k + 6). Distance of the minority's mean from the fixed point of batch EM. The published figures were "
        "measured by others in these settings on other draws, and how fast EM converges depends on the draw: no more "
        "than ten times it is asked for. An epoch is one step for each event (sEM-vr: and one pass for the "
        "snapshot). Incremental EM takes the events in order, and FIEM renews its memories in a random order: in each "
        "epoch every event has its turn; where events are drawn with replacement some wait for many epochs. "
        f"Medians of {', '.join(f'{len(setup.seeds(N_SEEDS[n]))} run(s) at {n:,}' for n in N_SEEDS)}.",
        ("n", "method", "published", "ours, median", "least to most", "target"),
        rows,
    )
    return Section([table], *_errors_picture(paths))


def _errors_picture(paths: dict[tuple[int, int, str], list[Array]]) -> tuple[Figure, str]:
    figure, panels = new_figure(2)
    for axes, n_published in zip(panels, N_SEEDS):
        for position, method in enumerate(ERRORS):
            of_method = [(key[1], runs) for key, runs in paths.items() if key[0] == n_published and key[2] == method]
            ((n_events, runs),) = of_method
            for run, path in enumerate(runs):
                axes.plot(
                    np.arange(1, len(path) + 1),
                    np.maximum(path, 1e-16),
                    color=color(position),
                    linewidth=1.2,
                    label=method if run == 0 else None,
                )
        axes.set_yscale("log")
        dress(axes, f"{n_events:,} events", "epochs", "error of the minority's mean")
    panels[0].legend(fontsize=7, frameon=False)
    return figure, "Distance from the fixed point of batch EM after each epoch, one line for each run."


IMAGES = "mnist_t10k_images.idx3.gz"
N_DIRECTIONS, N_COMPONENTS = 20, 12
ONLINE_EPOCHS, FIEM_EPOCHS = 6, 47
STEP, BATCH_SIZE = 5e-3, 100
N_IMAGE_SEEDS = 10
PER_IMAGE = {"batch EM": (-50.43, -50.50), "online EM": (-50.33, -50.55), "online EM, then FIEM": (-50.43, -50.54)}


def read_images(path: Path, n_events: int) -> Array:
    """Return images (n, 20): constant pixels dropped, standardised, projected on the principal directions."""
    with gzip.open(path) as file:
        content = file.read()
    pixels = np.frombuffer(content, dtype=np.uint8, offset=16).reshape(-1, 28 * 28)[:n_events].astype(np.float64)
    deviation = pixels.std(axis=0)
    varying = deviation > 0.0
    standardized = (pixels[:, varying] - pixels[:, varying].mean(axis=0)) / deviation[varying]
    _, directions = np.linalg.eigh(standardized.T @ standardized)
    return np.ascontiguousarray(standardized @ directions[:, -N_DIRECTIONS:])


def fit_images(events: Array, epochs: tuple[int, int], seed: int) -> dict[str, Array]:
    """Mean log-likelihood after each epoch of each method, from a common start."""
    generator = np.random.default_rng(seed)
    schema = Schema.infer(events)
    batch = schema.encode(events)
    model = Mixture(Gaussian("tied"), N_COMPONENTS)
    means = events[generator.choice(len(events), size=N_COMPONENTS, replace=False)]
    start = MixtureParameters(
        np.full(N_COMPONENTS, 1.0 / N_COMPONENTS),
        GaussianParameters(means, np.cov(events.T, bias=True)),
        np.arange(N_COMPONENTS),
    )

    def score(parameters: MixtureParameters) -> float:
        return float(model.log_prob(parameters, batch).mean())

    online_epochs, fiem_epochs = epochs
    n_epochs = online_epochs + fiem_epochs
    batch_path = [
        score(one.parameters) for one in islice(iterations(model.bind(schema), start, lambda: [batch]), n_epochs)
    ]
    # What is expected of all images at the start weighs so much that the first step size is already the constant one.
    weight = round(BATCH_SIZE / STEP)
    learner = OnlineEM(
        model, schema=schema, schedule=Constant(STEP), batch_size=BATCH_SIZE, initial_parameters=start
    ).resume(model.e_step(start, batch).scale(weight / len(events)), weight)
    online_path, middle = [], start
    for epoch in range(n_epochs):
        learner.update(batch.select(generator.permutation(len(events))))
        online_path.append(score(learner.parameters))
        if epoch + 1 == online_epochs:
            middle = learner.parameters
    method = FIEM(STEP, BATCH_SIZE, seed)
    steps = method.iterations(model.bind(schema), middle, lambda: [batch])
    fiem_path = [*online_path[:online_epochs], *(score(one.parameters) for one in islice(steps, fiem_epochs))]
    return {
        "batch EM": np.array(batch_path),
        "online EM": np.array(online_path),
        "online EM, then FIEM": np.array(fiem_path),
        "seeded": np.array(
            [score(BatchEM(model, schema=schema, max_iter=n_epochs, tol=0.0, seed=seed).fit(batch).parameters)]
        ),
    }


def run_images(setup: Setup) -> Section:
    """Row 7: batch EM, online EM and FIEM on handwritten digits."""
    events = read_images(setup.file(IMAGES), setup.scaled(10_000, 500))
    epochs = setup.scaled(ONLINE_EPOCHS), setup.scaled(FIEM_EPOCHS)
    seeds = setup.seeds(N_IMAGE_SEEDS)
    paths = setup.map(fit_images, [events] * len(seeds), [epochs] * len(seeds), seeds)
    comparisons = []
    for method, published in PER_IMAGE.items():
        last = [float(path[method][-1]) for path in paths]
        center = statistics.mean(published)
        comparisons.append(Comparison(f"{method}: log-likelihood per image", center, last, 0.005 * abs(center), ".2f"))
    seeded = [float(path["seeded"][-1]) for path in paths]
    table = comparison_table(
        "Row 7. Handwritten digits: batch EM, online EM and FIEM",
        "The model of Fort, Moulines & Wai (2021, *Statistics and Computing* 31) on the 10,000 test images of MNIST: "
        f"constant pixels dropped, standardised, {N_DIRECTIONS} principal directions, {N_COMPONENTS} Gaussians with "
        f"one covariance; {len(events):,} images, blocks of {BATCH_SIZE}, step size {STEP:g}; {sum(epochs)} epochs, "
        f"of which the last line spends {epochs[0]} on online EM and {epochs[1]} on FIEM. All start from the same "
        f"random images as means and the pooled covariance; {len(seeds)} seeds. Published is the mean of two seeds "
        "that were measured by others (-50.43 and -50.50, -50.33 and -50.55, -50.43 and -50.54). With this many "
        "components the seeds end in different local maxima. From the library's own seeding batch EM ends at "
        f"{statistics.median(seeded):.2f} ({spread(seeded, '.2f')}); from scikit-learn's k-means others measured "
        "-50.15 to -50.33.",
        comparisons,
    )
    figure, (axes,) = new_figure(1, width=7.0)
    for position, method in enumerate(PER_IMAGE):
        for run, path in enumerate(paths):
            axes.plot(
                np.arange(1, len(path[method]) + 1),
                path[method],
                color=color(position),
                linewidth=0.9,
                alpha=0.8,
                label=method if run == 0 else None,
            )
    axes.legend(fontsize=7, frameon=False)
    dress(axes, "Handwritten digits", "epochs", "log-likelihood per image")
    last = [float(path[method][-1]) for path in paths for method in PER_IMAGE]
    axes.set_ylim(min(last) - 1.0, max(last) + 0.2)
    return Section([table], figure, "Mean log-likelihood after each epoch, one line for each seed and method.")
