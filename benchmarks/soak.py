"""A long run: `python -m benchmarks.soak [--events 100000000] [--write]`.

Learners of every kind of path take event after event in this process, without end in sight, and memory and speed are
looked at all along the way: both must stay flat.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from benchmarks import drift
from benchmarks.chaos import resident
from benchmarks.measure import Table
from benchmarks.reliability import publish
from stream_em import (
    Batch,
    Categorical,
    Constant,
    Field,
    Gaussian,
    HalfLife,
    Mixture,
    OnlineEM,
    Poisson,
    Product,
    Schema,
)

POOL = 200_000
CHUNK = 10_000
# Looks at memory and speed along the way.
LOOKS = 20
# Megabytes that a process may grow by after its first twentieth, and how much slower its last quarter may be.
MOST_GROWTH = 16.0
MOST_SLOWDOWN = 1.25

Step = Callable[[int], None]


@dataclass(frozen=True)
class Soak:
    """Memory and speed along a long run.

    Parameters
    ----------
    name
        What was run.
    n_events
        Events learned.
    speed
        Events in a second of processor time, which neighbours on the machine take no part of, between two looks.
    memory
        Megabytes held at each look.

    """

    name: str
    n_events: int
    speed: list[float]
    memory: list[float]

    @property
    def slowdown(self) -> float:
        """Median speed of the first quarter, the first look left out, by that of the last."""
        quarter = max(1, (len(self.speed) - 1) // 4)
        return float(np.median(self.speed[1 : 1 + quarter]) / np.median(self.speed[-quarter:]))

    @property
    def growth(self) -> float:
        """Megabytes gained since the first look."""
        return self.memory[-1] - self.memory[0]


def in_batches(**options: object) -> Step:
    """Mini-batches of numbers, predicted, then learned."""
    generator = np.random.default_rng(0)
    pool = np.ascontiguousarray(drift.clusters(POOL, generator).T)
    learner = OnlineEM(Mixture(Gaussian(), 3), schema=drift.SCHEMA, **options)

    def step(start: int) -> None:
        at = start % POOL
        learner.predict_then_update(Batch(pool[:, at : at + CHUNK], drift.SCHEMA, time=start + np.arange(float(CHUNK))))

    step(0)
    # Compiled code, which takes over after thousands of mini-batches, is no leak, but would come between two looks.
    learner.kernel()
    return step


def with_gaps() -> Step:
    """Mini-batches of numbers, counts and ever new categories, a tenth of the values missing."""
    generator = np.random.default_rng(0)
    numbers = drift.clusters(POOL, generator)
    numbers[generator.random(numbers.shape) < 0.1] = np.nan
    counts = generator.poisson(3.0, POOL).astype(float)
    family = Product({("x", "y", "z"): Gaussian(), "items": Poisson(), "shop": Categorical()})
    schema = Schema(
        [*(Field(name, "numeric") for name in drift.NAMES), Field("items", "count"), Field("shop", "category")]
    )
    learner = OnlineEM(Mixture(family, 3), schema=schema, schedule=Constant(0.01))

    def step(start: int) -> None:
        at = start % POOL
        block = slice(at, at + CHUNK)
        columns = {name: numbers[block, position] for position, name in enumerate(drift.NAMES)}
        shops = [f"shop {start + row // 100}" for row in range(CHUNK)]
        frame = pa.table({**columns, "items": counts[block], "shop": shops})
        learner.predict_then_update(frame)

    return step


def one_by_one() -> Step:
    """Single events, as dicts, each with a field of a name never seen before that is ignored."""
    generator = np.random.default_rng(0)
    pool = [dict(zip(drift.NAMES, row)) for row in drift.clusters(CHUNK, generator).tolist()]
    learner = OnlineEM(Mixture(Gaussian(), 3), schedule=Constant(0.01), unknown="ignore").update(pool)

    def step(start: int) -> None:
        for at, event in enumerate(pool):
            learner.update({**event, f"field {start + at}": 1.0} if at % 10 == 0 else event)

    return step


# With the share of the events that each gets.
RUNS: dict[str, tuple[float, Callable[[], Step]]] = {
    "batches of 1,000, RobbinsMonro": (0.6, in_batches),
    "batches of 1,000, HalfLife": (0.1, lambda: in_batches(schedule=HalfLife(1e5, max_ahead=1e4))),
    "batches of 1,000, window of 100,000": (0.1, lambda: in_batches(window=100_000)),
    "batches of 1,000, averaging": (0.1, lambda: in_batches(averaging=True)),
    "tables with gaps, counts, new categories": (0.05, with_gaps),
    "single events, some with new fields": (0.05, one_by_one),
}


def soak(name: str, step: Step, n_events: int) -> Soak:
    """Learn so many events, and look at memory and speed along the way."""
    chunks = max(LOOKS, n_events // CHUNK)
    speed, memory = [], []
    last, begun = 0, time.process_time()
    for chunk in range(chunks):
        step(chunk * CHUNK)
        if (chunk + 1) * LOOKS // chunks > chunk * LOOKS // chunks:
            now = time.process_time()
            speed.append((chunk + 1 - last) * CHUNK / (now - begun))
            memory.append(resident("self"))
            last, begun = chunk + 1, now
    return Soak(name, chunks * CHUNK, speed, memory)


def soaks(n_events: int) -> Iterator[Soak]:
    """Make every run with its share of the events."""
    for name, (share, prepare) in RUNS.items():
        yield soak(name, prepare(), int(share * n_events))


def main() -> None:
    """Make the long runs; end with 1 if memory or speed did not stay flat."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--events", type=int, default=100_000_000, help="how many in all")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    arguments = parser.parse_args()
    rows, flat = [], True
    for one in soaks(arguments.events):
        met = one.growth <= MOST_GROWTH and one.slowdown <= MOST_SLOWDOWN
        flat &= met
        rows.append(
            (
                one.name,
                f"{one.n_events:,}",
                f"{np.median(one.speed):,.0f}",
                f"{one.slowdown:.2f}",
                f"{one.memory[0]:.0f}",
                f"{one.memory[-1]:.0f}",
                "flat" if met else "NOT FLAT",
            )
        )
        print("  ", *rows[-1], flush=True)
    table = Table(
        "Long runs",
        "Events that `make soak` has learners take in one process, of three numbers in three clusters. Speed and "
        f"memory are looked at {LOOKS} times along the way: flat is a last quarter no more than {MOST_SLOWDOWN:g} "
        f"times slower than the first, and no more than {MOST_GROWTH:g} MB gained since the first look.",
        ("learner", "events", "events/s of one core", "slower by", "MB at first", "MB at last", ""),
        rows,
    )
    publish("soak", table, write=arguments.write)
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
