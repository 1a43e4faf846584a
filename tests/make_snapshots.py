"""Write the snapshots of this format version into tests/data/snapshots: see the README there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cases import CASES, Case, draw_batch

from stream_em import (
    FIEM,
    AdaptiveComponents,
    BatchEM,
    Constant,
    ExpandingTruncations,
    Gaussian,
    HalfLife,
    Incremental,
    Mixture,
    OnlineEM,
    Schema,
    VarianceReduced,
    save,
)
from stream_em.store import FORMAT_VERSION, Learner

FOLDER = Path(__file__).parent / "data" / "snapshots"


def online(case: Case, n_events: int = 60, **options: object) -> OnlineEM:
    """A learner of few events, some of their values missing, that has gone through its warm-up if they are 20."""
    learner = OnlineEM(Mixture(case.family, 3), schema=case.schema, **{"warm_up": 20, "batch_size": 16} | options)
    return learner.update(draw_batch(case, n_events, 3, missing=0.1, weighted=True), time=np.arange(float(n_events)))


def learners() -> Iterator[tuple[str, Learner]]:
    """Every kind of learner, with the name of its file."""
    for name, case in CASES.items():
        yield f"online-{name}", online(case)
    full, mixed = CASES["gaussian_full"], CASES["product"]
    yield "warm-up", online(mixed, 12, schedule=HalfLife(8.0))
    yield "no-events", OnlineEM(Mixture(Gaussian(), 2), seed=7)
    yield "constant", online(full, schedule=Constant(0.1))
    yield "half-life", online(mixed, schedule=HalfLife(12.5))
    yield "averaging", online(full, 200, averaging=True)
    yield "averaging-product", online(mixed, 200, averaging=True)
    yield "window", online(full, 200, window=64)
    yield "window-half-life", online(CASES["gaussian_tied"], 200, window=64, schedule=HalfLife(40.0))
    yield (
        "hard",
        OnlineEM(Mixture(Gaussian("spherical"), 3, 0.5, "hard"), warm_up=20).update(
            np.random.default_rng(1).normal(size=(60, 2))
        ),
    )
    ignoring = OnlineEM(Mixture(CASES["categorical"].family, 2), unknown="ignore", warm_up=4)
    yield (
        "ignored-fields",
        ignoring.update([{"c": "é", "d": "x"}, {"c": ""}, {"c": "other"}, {"c": None, "d": "y"}] * 2),
    )
    start = online(full).parameters
    waiting = OnlineEM(Mixture(Gaussian(), 3), schema=full.schema, initial_parameters=start, first_m_step=50)
    yield "before-first-m-step", waiting.update(draw_batch(full, 10, 4))
    growing = OnlineEM(Mixture(Gaussian("diag"), 2), schema=Schema({"x": "numeric"}, unknown="add"), warm_up=10)
    yield "field-not-seen-yet", growing.update([{"x": float(i % 3), "y": None} for i in range(30)])
    ahead = online(full, schedule=HalfLife(12.5, max_ahead=100.0))
    yield "dates-ahead", ahead.update(draw_batch(full, 30, 4), time=np.r_[np.arange(61.0, 81.0), np.full(10, 1e6)])
    adaptive = OnlineEM(Mixture(Gaussian("diag"), 4), structure=AdaptiveComponents(recent_events=200), warm_up=80)
    clusters = np.random.default_rng(2).normal(size=(1_100, 2)) + 9.0 * np.arange(1_100)[:, None] % 27.0
    yield "adaptive", adaptive.update(clusters)
    yield "truncation", online(full, 120, truncation=ExpandingTruncations(), schedule=Constant(0.3))
    events = draw_batch(full, 120, 5)
    yield "batch", BatchEM(Mixture(Gaussian(), 3), max_iter=5).fit(events)
    yield "batch-product", BatchEM(Mixture(mixed.family, 3), max_iter=4).fit(draw_batch(mixed, 60, 1, missing=0.2))
    for method in (Incremental(), VarianceReduced(), FIEM()):
        name = type(method).__name__.lower()
        yield f"batch-{name}", BatchEM(Mixture(Gaussian("diag"), 3), method=method, max_iter=4).fit(events)


def numbers(learner: Learner) -> dict[str, np.ndarray]:
    """The parameters and statistics of a learner as named arrays, or the events of its warm-up."""
    if isinstance(learner, OnlineEM) and learner.warming_up:
        return {"buffer": np.hstack([one.values for one in learner._buffer])} if learner._buffer else {}
    assert learner.schema is not None
    parameters = learner.parameters
    family = learner.model.bind(learner.schema).family
    named = {"weights": parameters.weights, "component_ids": parameters.component_ids}
    named |= {f"components/{key}": array for key, array in family.arrays(parameters.components).items()}
    if learner.statistics is not None:
        for part, values in learner.statistics.parts.items():
            named |= {f"statistics/{part}:{key}": array for key, array in values.arrays().items()}
    return named


def main() -> None:
    """Write the files that are not there yet, and the numbers that are to be read from them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER / f"format-{FORMAT_VERSION}")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, learner in learners():
        if (folder / f"{name}.arrow").exists():
            continue
        save(learner, folder / f"{name}.arrow", metadata={"name": name})
        np.savez(folder / f"{name}.npz", **numbers(learner))
        print(folder / f"{name}.arrow")


if __name__ == "__main__":
    main()
