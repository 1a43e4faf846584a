"""Rows 11 and 12: what must not depend on shards and on where zero is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from benchmarks.literature.experiment import Section, Setup, color, dress, new_figure
from benchmarks.literature.small_data import WEAK, read_faithful
from benchmarks.measure import Table
from stream_em import Batch, BatchEM, Gaussian, Harmonic, Mixture, MixtureParameters, OnlineEM, Statistics
from stream_em.numerics import Array
from stream_em.plots import INK

SHARDS = (1, 2, 8, 64)
SAME = 1e-10
N_ITERATIONS = 50

N_EVENTS, BLOCK = 200_000, 1_000
OFFSETS = {"float64": (1e3, 1e6, 1e8), "float32": (1e3, 1e4)}
WITHIN = 0.005


def fit_in_shards(model: Mixture, start: MixtureParameters, shards: Sequence[Batch], seed: int) -> MixtureParameters:
    """Batch EM whose expected statistics travel from each shard as Arrow, and are merged in an order of chance."""
    generator = np.random.default_rng(seed)
    parameters = start
    for _ in range(N_ITERATIONS):
        sent = [model.e_step(parameters, shard).to_arrow() for shard in shards]
        received = [Statistics.from_arrow(sent[at]) for at in generator.permutation(len(sent))]
        parameters = model.m_step(reduce(Statistics.merge, received))
    return parameters


def difference(one: MixtureParameters, other: MixtureParameters) -> float:
    """Largest relative difference of any parameter."""
    pairs = (
        (one.weights, other.weights),
        (one.components.mean, other.components.mean),
        (one.components.covariance, other.components.covariance),
    )
    return max(float((np.abs(a - b) / np.abs(b)).max()) for a, b in pairs)


def run_shards(setup: Setup) -> Section:
    """Row 11: the same parameters from any number of shards."""
    events = read_faithful(setup.file("faithful.csv"))
    model = Mixture(Gaussian(), 2, prior_weight=WEAK)
    start = BatchEM(model, max_iter=1, seed=0).fit(events)
    assert start.schema is not None
    whole = start.schema.encode(events)
    expected = fit_in_shards(model, start.parameters, [whole], 0)
    rows, differences = [], []
    for n_shards in SHARDS:
        # Dealt out at random, so that shards are of different sizes too.
        dealt = np.random.default_rng(n_shards).integers(n_shards, size=len(events))
        shards = [whole.select(np.flatnonzero(dealt == at)) for at in range(n_shards)]
        found = difference(fit_in_shards(model, start.parameters, shards, n_shards), expected)
        differences.append(found)
        sizes = [shard.n_events for shard in shards]
        met = "met" if found <= SAME else "MISSED"
        rows.append((str(n_shards), f"{min(sizes)} to {max(sizes)}", f"{found:.1e}", f"at most {SAME:g}: {met}"))
    table = Table(
        "Row 11. The same parameters from any number of shards",
        f"Old Faithful, two full Gaussians, {N_ITERATIONS} iterations of EM. In each, every shard's expected "
        "statistics are sent as Arrow and merged in a random order. Largest relative difference of a weight, mean or "
        "(co)variance from those of the events in one piece.",
        ("shards", "events in a shard", "relative difference", "target"),
        rows,
    )
    figure, (axes,) = new_figure(1, width=6.0)
    axes.plot(SHARDS, np.maximum(differences, 1e-17), marker="o", color=color(0))
    axes.axhline(SAME, color=INK, linestyle=":", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SHARDS, [str(one) for one in SHARDS])
    dress(axes, "Old Faithful in shards", "shards", "largest relative difference")
    return Section([table], figure, "Rounding is all that the number of shards changes; dotted, the target.")


def variance_error(events: Array) -> float:
    """Relative error of the variance that online EM has after all the blocks."""
    learner = OnlineEM(Mixture(Gaussian(), 1), schedule=Harmonic(), batch_size=BLOCK)
    for start in range(0, len(events), BLOCK):
        learner.update(events[start : start + BLOCK])
    expected = float(events.astype(np.float64).var())
    return abs(float(learner.parameters.components.covariance[0, 0, 0]) - expected) / expected


def variance_error_of_raw_sums(events: Array) -> float:
    """Relative error of the variance from raw sums of squares, added up block by block in the events' own precision."""
    total, squares = events.dtype.type(0.0), events.dtype.type(0.0)
    for start in range(0, len(events), BLOCK):
        block = events[start : start + BLOCK, 0]
        total, squares = total + block.sum(), squares + (block * block).sum()
    mean = total / events.dtype.type(len(events))
    expected = float(events.astype(np.float64).var())
    return abs(float(squares / events.dtype.type(len(events)) - mean * mean) - expected) / expected


def run_offsets(setup: Setup) -> Section:
    """Row 12: the variance far from zero."""
    noise = np.random.default_rng(0).normal(size=(setup.scaled(N_EVENTS, 2_000), 1))
    rows = []
    figure, (axes,) = new_figure(1, width=6.0)
    for position, (dtype, offsets) in enumerate(OFFSETS.items()):
        samples = [(noise + offset).astype(dtype) for offset in offsets]
        ours = [variance_error(one) for one in samples]
        raw = [variance_error_of_raw_sums(one) for one in samples]
        for offset, found, naive in zip(offsets, ours, raw):
            met = "met" if found <= WITHIN else "MISSED"
            rows.append((dtype, f"{offset:g}", f"{found:.1e}", f"{naive:.1e}", f"at most {WITHIN:.1%}: {met}"))
        axes.plot(offsets, np.maximum(ours, 1e-17), marker="o", color=color(position), label=f"stream_em, {dtype}")
        axes.plot(offsets, raw, marker="x", linestyle="--", color=color(position), label=f"raw sums, {dtype}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(WITHIN, color=INK, linestyle=":", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    dress(axes, "The variance of N(offset, 1)", "offset", "relative error")
    table = Table(
        "Row 12. The variance far from zero",
        f"{len(noise):,} events of N(offset, 1) in blocks of {BLOCK:,}, one Gaussian, `Harmonic()`. Relative error of "
        "the variance against that of the sample; beside it what raw sums of squares in the same precision give.",
        ("input", "offset", "relative error", "raw sums", "target"),
        rows,
    )
    return Section([table], figure, "Solid, statistics about the mean, as here; dashed, raw sums; dotted, the target.")
