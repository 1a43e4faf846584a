"""Ways to iterate EM over a finite set of events: each another combination of the same expected statistics.

`iterations` is batch EM. The methods take an M-step after each block of events instead of after all of them, so an
iteration of theirs is one epoch: as many steps as there are blocks. All of them stop where batch EM stops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import check_whole
from stream_em.schema import Batch, SchemaError
from stream_em.statistics import Statistics, linear_combination

# Densities, one for each event and component, that NumPy takes about as long for as compiled code takes to load.
LOADING_DENSITIES = 20_000_000

# Halvings of one step after which it is left out: less than 1e-15 of it would be taken.
MOST_HALVINGS = 50


class Iteration(NamedTuple):
    """One iteration of EM over a finite set of events.

    Parameters
    ----------
    parameters
        The parameters after its M-step.
    statistics
        The expected sufficient statistics of its E-step.
    objective
        Mean log-posterior, up to a constant, of the parameters before its M-step.
    prior
        The prior of its M-step.
    halvings
        How often a step had to be halved to stay within the parameter space; only those of a `Method` ever have to.

    """

    parameters: MixtureParameters
    statistics: Statistics
    objective: float
    prior: Any
    halvings: int = 0


def iterate(bound: Mixture, parameters: MixtureParameters, statistics: Statistics, prior: Any = None) -> Iteration:
    """Return the iteration of batch EM that these statistics, the E-step at these parameters, belong to.

    Parameters
    ----------
    bound
        The mixture, bound to the schema of the events.
    parameters
        The parameters of the E-step.
    statistics
        The expected sufficient statistics of all the events.
    prior
        What `Mixture.prior` returned, by default for these statistics.

    """
    prior = bound.prior(statistics) if prior is None else prior
    maximum = bound.m_step(statistics, prior)
    return Iteration(maximum, statistics, _objective(bound, parameters, statistics, prior), prior)


def iterations(
    bound: Mixture,
    parameters: MixtureParameters,
    batches: Callable[[], Iterable[Batch]],
    *,
    prior: Any = None,
    n_threads: int = 1,
) -> Iterator[Iteration]:
    """Yield the iterations of batch EM, without end.

    Parameters
    ----------
    bound
        The mixture, bound to the schema of the events.
    parameters
        Where to start.
    batches
        Returns the encoded events, in one batch or several, once for each iteration.
    prior
        What `Mixture.prior` returned, by default for the statistics of the first iteration.
    n_threads
        Threads that share the blocks of a large batch.

    >>> from stream_em import Gaussian, Schema
    >>> batch = Schema({"x": "numeric"}).encode(np.array([[0.0], [2.0]]))
    >>> bound = Mixture(Gaussian(), 1).bind(batch.schema)
    >>> next(iterations(bound, bound.pooled(batch), lambda: [batch])).parameters.components.mean
    array([[1.]])

    """
    workload = Workload()
    while True:
        statistics = _expected_of_all(bound, parameters, batches(), n_threads, workload)
        iteration = iterate(bound, parameters, statistics, prior)
        parameters, prior = iteration.parameters, iteration.prior
        yield iteration


class Workload:
    """Counts the densities that were computed, which tells when compiled code will have made up for its loading.

    Until then NumPy does the work. What decides is the work alone and no clock, so that the same events and settings
    give the same numbers.

    Parameters
    ----------
    enough
        How many densities suggest that there will be as many again.

    >>> workload = Workload()
    >>> workload.is_large_with(10_000_000, 1), workload.is_large_with(5_000_000, 2)
    (False, True)

    """

    def __init__(self, enough: int = LOADING_DENSITIES) -> None:
        self._enough = enough
        self._n_densities = 0

    def is_large_with(self, n_events: int, n_components: int) -> bool:
        """Count an E-step; return whether there is enough work by now, this E-step included."""
        self._n_densities += n_events * n_components
        return self._n_densities >= self._enough


def _expected_of_all(
    bound: Mixture, parameters: MixtureParameters, batches: Iterable[Batch], n_threads: int, workload: Workload
) -> Statistics:
    total: Statistics | None = None
    for batch in batches:
        compiled = workload.is_large_with(batch.n_events, parameters.n_components)
        statistics = bound.e_step(parameters, batch, n_threads=n_threads, compiled=compiled)
        total = statistics if total is None else total.merge(statistics)
    if total is None:
        raise SchemaError(
            "the events could be read only once, and batch EM needs several passes; pass a function that returns a "
            "fresh iterator each time"
        )
    return total


class Method(ABC):
    """A way to iterate EM over a finite set of events, for `BatchEM(method=...)`."""

    @abstractmethod
    def iterations(
        self,
        bound: Mixture,
        parameters: MixtureParameters,
        batches: Callable[[], Iterable[Batch]],
        *,
        n_threads: int = 1,
    ) -> Iterator[Iteration]:
        """Yield the epochs, without end; the parameters are as those of `iterations`.

        The events are read once and held in memory. The objective of an epoch is that of the parameters before it,
        over all the events, which is one E-step more for each event.
        """


@dataclass(frozen=True)
class Incremental(Method):
    """Incremental EM, Neal & Hinton (1998): a block's last statistics are replaced by its new ones.

    The first iteration is one of batch EM. From then on each block's E-step is followed by an M-step on the newest
    statistics of all the blocks, in the order of the events. An epoch costs two E-steps for each event, one of them
    over all at once for the objective; memory holds two statistics for each block.

    Parameters
    ----------
    batch_size
        Events in a block.

    Raises
    ------
    ValueError
        When `batch_size` is no whole number >= 1.

    Notes
    -----
    The sum over the blocks is made of those done and those to come, so nothing is ever subtracted: each step is as
    exact as one of batch EM, and none can leave the parameter space.

    References
    ----------
    Neal & Hinton (1998), "A view of the EM algorithm that justifies incremental, sparse, and other variants".

    >>> from stream_em import BatchEM, Gaussian
    >>> events = np.repeat([[0.0], [0.2], [5.0], [5.2]], 10, axis=0)
    >>> fitted = BatchEM(Mixture(Gaussian(), 2), method=Incremental(batch_size=5), seed=0).fit(events)
    >>> np.sort(fitted.parameters.components.mean.ravel()).round(2), fitted.converged
    (array([0.1, 5.1]), True)

    """

    batch_size: int = 100

    def __post_init__(self) -> None:
        check_whole(why="a block needs an event to take an E-step on", batch_size=self.batch_size)

    def iterations(  # noqa: D102 - inherited
        self,
        bound: Mixture,
        parameters: MixtureParameters,
        batches: Callable[[], Iterable[Batch]],
        *,
        n_threads: int = 1,
    ) -> Iterator[Iteration]:
        held, workload = list(batches()), Workload()
        blocks = _blocks(held, self.batch_size)
        memory = [bound.e_step(parameters, block) for block in blocks]
        iteration = iterate(bound, parameters, _sums_from_the_end(memory)[0])
        parameters, prior = iteration.parameters, iteration.prior
        while True:
            yield iteration
            now = _expected_of_all(bound, parameters, held, n_threads, workload)
            objective = _objective(bound, parameters, now, prior)
            to_come = _sums_from_the_end(memory)
            done: Statistics | None = None
            for position, block in enumerate(blocks):
                memory[position] = new = bound.e_step(parameters, block)
                done = statistics = new if done is None else done.merge(new)
                if position + 1 < len(blocks):
                    statistics = done.merge(to_come[position + 1])
                parameters = bound.m_step(statistics, prior)
            iteration = Iteration(parameters, statistics, objective, prior)


@dataclass(frozen=True)
class VarianceReduced(Method):
    """Stochastic EM with variance reduction (sEM-vr), Chen, Zhu, Teh & Zhang (2018).

    Each epoch begins with an E-step over all the events at a snapshot of the parameters; its steps use a random block
    each, corrected by what the same block had at the snapshot. With a step size that stays constant it converges
    geometrically, as batch EM does, to a point where batch EM stops. An epoch costs three E-steps for each event, one
    of them over all at once; memory does not grow with the number of blocks.

    Parameters
    ----------
    step
        Step size, constant, in (0, 1]; by default (number of blocks)^(-2/3).
    batch_size
        Events in a block.
    seed
        Seed of the choice of the blocks.

    Raises
    ------
    ValueError
        When a number is out of range.

    References
    ----------
    Chen, Zhu, Teh & Zhang (2018), "Stochastic expectation maximization with variance reduction"; the
    default step of Karimi, Wai, Moulines & Lavielle (2019), "On the global convergence of (fast) incremental
    expectation maximization methods".

    >>> from stream_em import BatchEM, Gaussian
    >>> events = np.repeat([[0.0], [0.2], [5.0], [5.2]], 10, axis=0)
    >>> fitted = BatchEM(Mixture(Gaussian(), 2), method=VarianceReduced(batch_size=5), seed=0).fit(events)
    >>> np.sort(fitted.parameters.components.mean.ravel()).round(2), fitted.halvings
    (array([0.1, 5.1]), 0)

    """

    step: float | None = None
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_step(self.step)
        check_whole(why="a block needs an event to take an E-step on", batch_size=self.batch_size)
        check_whole(least=0, seed=self.seed)

    def iterations(  # noqa: D102 - inherited
        self,
        bound: Mixture,
        parameters: MixtureParameters,
        batches: Callable[[], Iterable[Batch]],
        *,
        n_threads: int = 1,
    ) -> Iterator[Iteration]:
        held, workload = list(batches()), Workload()
        blocks = _blocks(held, self.batch_size)
        n_blocks, step = len(blocks), _step_size(self.step, len(blocks))
        generator = np.random.default_rng(self.seed)
        statistics: Statistics | None = None
        prior = None
        while True:
            snapshot = parameters
            anchor = _expected_of_all(bound, snapshot, held, n_threads, workload)
            statistics = anchor if statistics is None else statistics
            prior = bound.prior(anchor) if prior is None else prior
            halvings = 0
            for position in generator.integers(n_blocks, size=n_blocks).tolist():
                new, old = (bound.e_step(one, blocks[position]) for one in (parameters, snapshot))
                target = (n_blocks, new), (-n_blocks, old), (1.0, anchor)
                statistics, halved = _step_towards(statistics, target, step)
                parameters = bound.m_step(statistics, prior)
                halvings += halved
            statistics = replace(statistics, log_likelihood=anchor.log_likelihood)
            yield Iteration(parameters, statistics, _objective(bound, snapshot, anchor, prior), prior, halvings)


@dataclass(frozen=True)
class FIEM(Method):
    """Fast incremental EM, Karimi, Wai, Moulines & Lavielle (2019) and Fort, Moulines & Wai (2021).

    The first iteration is one of batch EM, whose statistics of each block are the first memory. Each step from then
    on renews the memory of one block, and moves the statistics along another, random block's, corrected by
    that block's memory. An epoch costs three E-steps for each event, one of them over all at once for the objective;
    memory holds one statistics for each block, and a second one at the beginning of each epoch.

    Parameters
    ----------
    step
        Step size, constant, in (0, 1]; by default (number of blocks)^(-2/3).
    batch_size
        Events in a block.
    seed
        Seed of the choice of the blocks.

    Raises
    ------
    ValueError
        When a number is out of range.

    Notes
    -----
    The papers draw the block to be renewed independently of earlier ones, so that by chance some memories stay old for
    many epochs, and these decide how far the estimates get. Here each epoch renews all the blocks in a random order, at
    the same cost. The expected step is the same: only the block that it is taken along must be drawn independently.

    References
    ----------
    Karimi, Wai, Moulines & Lavielle (2019), "On the global convergence of (fast) incremental expectation maximization
    methods"; Fort, Moulines & Wai (2021), "Fast incremental expectation maximization for finite-sum optimization:
    nonasymptotic convergence".

    >>> from stream_em import BatchEM, Gaussian
    >>> events = np.repeat([[0.0], [0.2], [5.0], [5.2]], 10, axis=0)
    >>> fitted = BatchEM(Mixture(Gaussian(), 2), method=FIEM(batch_size=5), seed=0).fit(events)
    >>> np.sort(fitted.parameters.components.mean.ravel()).round(2), fitted.halvings
    (array([0.1, 5.1]), 0)

    """

    step: float | None = None
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_step(self.step)
        check_whole(why="a block needs an event to take an E-step on", batch_size=self.batch_size)
        check_whole(least=0, seed=self.seed)

    def iterations(  # noqa: D102 - inherited
        self,
        bound: Mixture,
        parameters: MixtureParameters,
        batches: Callable[[], Iterable[Batch]],
        *,
        n_threads: int = 1,
    ) -> Iterator[Iteration]:
        held, workload = list(batches()), Workload()
        blocks = _blocks(held, self.batch_size)
        n_blocks, step = len(blocks), _step_size(self.step, len(blocks))
        generator = np.random.default_rng(self.seed)
        memory = [bound.e_step(parameters, block) for block in blocks]
        iteration = iterate(bound, parameters, _sums_from_the_end(memory)[0])
        parameters, statistics, prior = iteration.parameters, iteration.statistics, iteration.prior
        while True:
            yield iteration
            # Summed anew in each epoch, so that rounding does not pile up.
            total = _sums_from_the_end(memory)[0]
            now = _expected_of_all(bound, parameters, held, n_threads, workload)
            objective, halvings = _objective(bound, parameters, now, prior), 0
            order = zip(generator.permutation(n_blocks).tolist(), generator.integers(n_blocks, size=n_blocks).tolist())
            for renewed, taken in order:
                old, memory[renewed] = memory[renewed], bound.e_step(parameters, blocks[renewed])
                replaced = linear_combination([(1.0, total), (-1.0, old), (1.0, memory[renewed])])
                # The sum over the memory is one of events: that it seems not to be can be rounding alone.
                total = _sums_from_the_end(memory)[0] if replaced is None else replaced
                target = (n_blocks, bound.e_step(parameters, blocks[taken])), (-n_blocks, memory[taken]), (1.0, total)
                statistics, halved = _step_towards(statistics, target, step)
                parameters = bound.m_step(statistics, prior)
                halvings += halved
            statistics = replace(statistics, log_likelihood=now.log_likelihood)
            iteration = Iteration(parameters, statistics, objective, prior, halvings)


def _check_step(step: float | None) -> None:
    if step is not None and not 0.0 < step <= 1.0:
        raise ValueError(
            f"the step size must lie in (0, 1], got {step!r}: 0 never learns, and beyond 1 the old statistics would "
            "enter with a negative weight; None stands for (number of blocks)^(-2/3)"
        )


def _step_size(step: float | None, n_blocks: int) -> float:
    return float(n_blocks ** (-2.0 / 3.0)) if step is None else step


def _blocks(batches: list[Batch], batch_size: int) -> list[Batch]:
    blocks = [
        batch.select(slice(start, start + batch_size))
        for batch in batches
        for start in range(0, batch.n_events, batch_size)
    ]
    if not blocks:
        raise SchemaError("there is no event to fit: the function that yields the batches yielded none")
    return blocks


def _sums_from_the_end(memory: list[Statistics]) -> list[Statistics]:
    """Return at each position the statistics of this block and all that follow."""
    return list(accumulate(reversed(memory), lambda later, one: one.merge(later)))[::-1]


def _step_towards(
    statistics: Statistics, target: tuple[tuple[float, Statistics], ...], step: float
) -> tuple[Statistics, int]:
    """Move statistics towards a linear combination, and halve the step until they are such that events can have.

    Return them with the number of halvings; after `MOST_HALVINGS` the step is left out.
    """
    for halvings in range(MOST_HALVINGS):
        terms = ((step * coefficient, one) for coefficient, one in target)
        moved = linear_combination([(1.0 - step, statistics), *terms])
        if moved is not None:
            return moved, halvings
        step *= 0.5
    return statistics, MOST_HALVINGS


def _objective(bound: Mixture, parameters: MixtureParameters, statistics: Statistics, prior: Any) -> float:
    log_posterior = statistics.log_likelihood + bound.log_prior(parameters, prior)
    return log_posterior / max(statistics.total_weight, 1e-300)
