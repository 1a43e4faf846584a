"""Mixtures: each event comes from one of K components."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from stream_em.blas import MOST_UNSHARED_PRODUCTS, NOT_WORTH_SHARING, OneBlasThread
from stream_em.families.base import Block, Family, FamilyError, Mask, Parts, feature_table
from stream_em.numerics import (
    LARGEST_LOG_DENSITY,
    UNPACKED_PRODUCTS,
    Array,
    check_whole,
    compiled_or_none,
    softmax_in_place,
)
from stream_em.schema import Batch, EventError, Schema
from stream_em.statistics import Statistics, Sums

NOTHING = np.empty(0, dtype=np.intp)

# Blocks of events are large enough that calls cost little, yet small enough to stay near the core, and where that can
# be, of no more than `UNPACKED_PRODUCTS`.
USUAL_BLOCK, LARGEST_BLOCK, MOST_FEATURES = 1024, 8192, 2_400_000

# More than one, so that a slower core holds up no other: a thread that is done takes the next piece.
PIECES_PER_THREAD = 8

# More would not start, however many E-steps ask for them at a time.
MOST_THREADS = 256

# Each pass about better centers gains sixteen digits: enough to come from the largest values back to the smallest.
MOST_PASSES = 8


@dataclass(frozen=True, eq=False)
class MixtureParameters:
    """Parameters of a mixture.

    Parameters
    ----------
    weights
        (K,) mixing weights, summing to 1.
    components
        Parameters of the family.
    component_ids
        (K,) stable ids of the components.

    """

    weights: Array
    components: Any
    component_ids: npt.NDArray[np.int64]

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return len(self.weights)

    @cached_property
    def log_weights(self) -> Array:
        """Logarithms of the weights (K,)."""
        return np.log(self.weights)


class Posterior(NamedTuple):
    """What an E-step knows of each event.

    Parameters
    ----------
    log_prob
        (B,) log-density of each event.
    responsibilities
        (K, B) probability of each component given the event.

    """

    log_prob: Array
    responsibilities: Array


@dataclass(frozen=True)
class Mixture:
    """A mixture of K components of one family.

    Parameters
    ----------
    family
        Family of the components; `Product` gives fields families of their own.
    n_components
        K >= 1; the parameters of a learner that adapts it hold another number.
    prior_weight
        Strength of the prior, > 0: in the M-step each component is given this many pseudo-events drawn from
        the pooled distribution of all the data, so the scale of the data is the scale of the prior, a
        component that loses its events falls back to the pooled estimate, and no covariance is singular.
    assignment
        "soft" shares an event among components by responsibility (EM); "hard" gives it to the most
        responsible one (classification EM; with spherical components, k-means).

    Attributes
    ----------
    schema
        Fields the model is bound to, None before `bind`.

    Raises
    ------
    ValueError
        When a number or a word is out of range.

    Notes
    -----
    With pseudo-events as prior the M-step is the posterior mode (Dempster, Laird & Rubin 1977, section 3).

    >>> from stream_em import Batch, Gaussian, Schema
    >>> model = Mixture(Gaussian("diag"), n_components=1)
    >>> batch = Schema({"x": "numeric"}).encode([{"x": 1.0}, {"x": 3.0}])
    >>> parameters = model.initialize(batch, np.ones((1, 2)))
    >>> parameters.components.mean, model.e_step(parameters, batch).parts["moments"].scatter
    (array([[2.]]), array([[2.]]))

    """

    family: Family
    n_components: int
    prior_weight: float = 0.01
    assignment: Literal["soft", "hard"] = "soft"
    schema: Schema | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.family, Family):
            raise FamilyError(f"family must be a component family such as Gaussian(), got {self.family!r}")
        check_whole(n_components=self.n_components)
        if not (np.isfinite(self.prior_weight) and self.prior_weight > 0.0):
            raise ValueError(
                f"prior_weight must be a finite number of pseudo-events > 0, got {self.prior_weight!r}; without a "
                "prior a component that loses its events has no estimate"
            )
        if self.assignment not in ("soft", "hard"):
            raise ValueError(f'assignment must be "soft" or "hard", got {self.assignment!r}')

    def bind(self, schema: Schema) -> Self:
        """Return the model for the fields of a schema.

        Raises
        ------
        FamilyError
            When a field does not suit the family.

        """
        if self.schema is schema:
            return self
        bound = replace(self, family=self.family.bind(schema.fields))
        object.__setattr__(bound, "schema", schema)
        return bound

    def check(self, batch: Batch) -> None:
        """Check that a bound model has a density for each event of a batch.

        Raises
        ------
        EventError
            For the first event that lacks a value without which it has none.

        """
        for error in self._without_density(batch):
            raise error

    def screen(self, batch: Batch) -> Batch:
        """Return a batch without the events that a bound model has no density for, which join `rejected`."""
        errors = list(self._without_density(batch))
        if not errors:
            return batch
        kept = np.setdiff1d(np.arange(batch.n_events), [error.index for error in errors])
        place = np.arange(batch.n_events) if batch.accepted is None else batch.accepted
        late = (EventError(int(place[error.index]), error.field, error.value, error.expected) for error in errors)
        return replace(
            batch.select(kept),
            rejected=tuple(sorted((*batch.rejected, *late), key=lambda error: error.index)),
            accepted=place[kept],
            ignored_fields=batch.ignored_fields,
        )

    def _without_density(self, batch: Batch) -> Iterator[EventError]:
        lacking = None if batch.observed is None else self.family.lacking(batch.observed)
        if lacking is None:
            return
        for index in np.flatnonzero(lacking.any(axis=0)).tolist():
            name = batch.schema.names[int(lacking[:, index].argmax())]
            yield EventError(index, name, None, f"a value, without which {self.family} has no density for the event")

    def initialize(self, batch: Batch, responsibilities: Array) -> MixtureParameters:
        """Return parameters from given responsibilities (K, B): one M-step.

        Missing values of joint fields are taken at the pooled estimate.
        """
        bound = self.bind(batch.schema)
        statistics, _ = bound._expect(bound.pooled(batch), batch, given=responsibilities)
        return bound.m_step(statistics)

    def pooled(self, batch: Batch, n_components: int | None = None) -> MixtureParameters:
        """Return parameters of K identical components fitted to all the events: nothing told apart yet.

        Parameters
        ----------
        batch
            The events.
        n_components
            K, by default that of the model.

        """
        size = self.n_components if n_components is None else n_components
        weight = np.ones(batch.n_events) if batch.weight is None else batch.weight
        return MixtureParameters(
            np.full(size, 1.0 / size),
            self.bind(batch.schema).family.pooled(batch.values, weight, size),
            np.arange(size, dtype=np.int64),
        )

    def e_step(
        self, parameters: MixtureParameters, batch: Batch, *, n_threads: int = 1, compiled: bool = False
    ) -> Statistics:
        """Return the expected sufficient statistics of a batch.

        Parameters
        ----------
        parameters
            The parameters at which responsibilities are taken.
        batch
            Encoded events; their weights count, their times are left to the learner.
        n_threads
            Threads that share the blocks of a large batch, in compiled code where there is some.
        compiled
            Whether one thread goes through compiled code as well. It is up to three times as fast, but takes a moment
            to load, and sums differ in the last digits.

        """
        return self.bind(batch.schema)._expect(parameters, batch, n_threads=n_threads, compiled=compiled)[0]

    def e_step_with_posterior(
        self, parameters: MixtureParameters, batch: Batch, *, compiled: bool = False
    ) -> tuple[Statistics, Posterior]:
        """Return the expected sufficient statistics and what they were made from, in one E-step; see `e_step`."""
        statistics, posterior = self.bind(batch.schema)._expect(parameters, batch, keep=True, compiled=compiled)
        assert posterior is not None
        return statistics, posterior

    def posterior(self, parameters: MixtureParameters, batch: Batch) -> Posterior:
        """Return log-densities and responsibilities of a batch; nothing is learned."""
        posterior = self.bind(batch.schema)._expect(parameters, batch, keep=True, collect=False)[1]
        assert posterior is not None
        return posterior

    def log_prob(self, parameters: MixtureParameters, batch: Batch) -> Array:
        """Return the log-density (B,) of each event."""
        return self.posterior(parameters, batch).log_prob

    def m_step(
        self,
        statistics: Statistics,
        prior: Any = None,
        *,
        kept: tuple[MixtureParameters, npt.NDArray[np.bool_]] | None = None,
    ) -> MixtureParameters:
        """Return the posterior mode of the parameters given the statistics.

        Parameters
        ----------
        statistics
            Expected sufficient statistics of any number of events.
        prior
            What `prior` returned, by default for these very statistics.
        kept
            Earlier parameters, and which components (K,) keep theirs but for the weight.

        """
        if prior is None:
            prior = self.prior(statistics)
        weights = statistics.weights + self.prior_weight
        weights /= np.add.reduce(weights)
        components = self.family.maximize(statistics.parts, prior)
        if kept is not None:
            earlier, which = kept
            components = self.family.keep(components, earlier.components, which)
        return MixtureParameters(weights, components, statistics.component_ids)

    def prior(self, statistics: Statistics) -> Any:
        """Return the prior of the components, on the scale of the data that these statistics describe."""
        return self.family.prior(statistics.parts, self.prior_weight)

    def log_prior(self, parameters: MixtureParameters, prior: Any) -> float:
        """Return the log-density of the prior, up to a constant."""
        return self.prior_weight * float(parameters.log_weights.sum()) + self.family.log_prior(
            parameters.components, prior
        )

    def sample(
        self, parameters: MixtureParameters, n_events: int, generator: np.random.Generator
    ) -> tuple[Array, npt.NDArray[np.int64]]:
        """Draw events: values (D, n) in the schema's coding, and the id (n,) of each one's component."""
        components = generator.choice(parameters.n_components, size=n_events, p=parameters.weights)
        values = self.family.sample(parameters.components, components, generator)
        return values, parameters.component_ids[components]

    def n_parameters(self, schema: Schema, n_components: int | None = None) -> int:
        """Return the number of free parameters, the mixing weights included, of by default the model's K components."""
        size = self.n_components if n_components is None else n_components
        return size - 1 + self.family.bind(schema.fields).n_parameters(len(schema), size)

    def restrict(self, keep: npt.NDArray[np.intp]) -> Mixture:
        """Return the model of the fields at the positions `keep` of a bound model, to be bound to them."""
        return replace(self, family=self.family.restrict(keep))

    def marginal(self, parameters: MixtureParameters, keep: npt.NDArray[np.intp]) -> MixtureParameters:
        """Return the parameters over the fields at the positions `keep`, for `restrict(keep)`."""
        return replace(parameters, components=self.family.marginal(parameters.components, keep))

    def conditional(
        self, parameters: MixtureParameters, given: npt.NDArray[np.intp], values: Array
    ) -> MixtureParameters:
        """Return the parameters over the other fields, given `values` (G,) of the fields at the positions `given`.

        Values are in the schema's coding, and none is missing.
        """
        assert self.schema is not None
        event = np.full((len(self.schema), 1), np.nan)
        event[given, 0] = values
        weights = self.posterior(parameters, Batch(event, self.schema)).responsibilities[:, 0]
        components = self.family.conditional(parameters.components, given, event[given, 0])
        return MixtureParameters(weights, components, parameters.component_ids)

    def grow(self, statistics: Statistics, old: Schema, new: Schema, batch: Batch) -> Statistics:
        """Return the statistics for a schema that gained categories or fields.

        `batch`, encoded with the new schema, says what the events seen so far are taken to have held in
        new fields of a joint family.
        """
        bound = self.bind(new)
        pooled = bound.pooled(batch, len(statistics.component_ids))
        parts = bound.family.grow(statistics.parts, old.fields, new.fields, pooled.components)
        return replace(
            statistics,
            parts={"components": statistics.parts["components"], **parts},
            # A new array: statistics of the old fields, which share the old one, must not merge unchecked.
            component_ids=statistics.component_ids.copy(),
        )

    def settle(self, statistics: Statistics, positions: npt.NDArray[np.intp], batch: Batch) -> Statistics:
        """Return the statistics once fields that had no value so far, at these positions, appear in `batch`.

        Until then a joint family could only guess at them, and the guess would weigh as much as the past.
        """
        bound = self.bind(batch.schema)
        pooled = bound.pooled(batch, len(statistics.component_ids))
        parts = bound.family.settle(statistics.parts, positions, pooled.components)
        return replace(statistics, parts={"components": statistics.parts["components"], **parts})

    def _expect(
        self,
        parameters: MixtureParameters,
        batch: Batch,
        *,
        given: Array | None = None,
        keep: bool = False,
        collect: bool = True,
        n_threads: int = 1,
        compiled: bool = False,
    ) -> tuple[Statistics, Posterior | None]:
        """Run the E-step of a bound model; `given` responsibilities replace those of the parameters."""
        self.check(batch)
        posterior = _empty_posterior(parameters, batch) if keep else None
        weights: Array | None = None
        parts: Parts = {}
        log_likelihood = 0.0
        with _far_events():
            for positions, observed in _missing_patterns(batch, self.family):
                if positions is None:
                    expectation = _Expectation(self, parameters, batch, observed, n_threads, compiled)
                    of_pattern = expectation.run(given, posterior, collect)
                else:
                    alike = batch.select(positions)
                    into = _empty_posterior(parameters, alike) if keep else None
                    expectation = _Expectation(self, parameters, alike, observed, n_threads, compiled)
                    of_pattern = expectation.run(None if given is None else given[:, positions], into, collect)
                    if posterior is not None and into is not None:
                        posterior.log_prob[positions] = into.log_prob
                        posterior.responsibilities[:, positions] = into.responsibilities
                log_likelihood += of_pattern.log_likelihood
                if weights is None:
                    weights, parts = of_pattern.weights, of_pattern.parts
                else:
                    weights = weights + of_pattern.weights
                    parts = {name: part.merge(of_pattern.parts[name]) for name, part in parts.items()}  # type: ignore[arg-type]
        assert weights is not None
        return Statistics({"components": Sums(weights), **parts}, log_likelihood, parameters.component_ids), posterior


def _empty_posterior(parameters: MixtureParameters, batch: Batch) -> Posterior:
    return Posterior(np.empty(batch.n_events), np.empty((parameters.n_components, batch.n_events)))


def _missing_patterns(batch: Batch, family: Family) -> Iterator[tuple[npt.NDArray[np.intp] | None, Mask | None]]:
    """Yield positions of events (None: all) that miss the same joint fields, and which fields are observed."""
    if batch.observed is None:
        yield None, None
        return
    joint = family.joint_fields(len(batch.values))
    gone = ~batch.observed[joint]
    if not gone.any():
        yield None, np.ones(len(batch.values), dtype=bool)
        return
    packed = np.ascontiguousarray(np.packbits(gone, axis=0).T)
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(np.bincount(inverse))
    for pattern, positions in enumerate(np.split(order, ends[:-1])):
        observed = np.ones(len(batch.values), dtype=bool)
        observed[joint] = ~gone[:, first[pattern]]
        yield positions, observed


class _Collected(NamedTuple):
    """What one E-step brings: log-likelihood, weights (K,) of the components, the family's statistics."""

    log_likelihood: float
    weights: Array
    parts: Parts


_workspaces = threading.local()


def _workspace(name: str, rows: int, columns: int) -> Array:
    """A block of memory that this thread keeps between calls: fresh pages cost more than the arithmetic."""
    buffer: Array | None = getattr(_workspaces, name, None)
    if buffer is None or buffer.size < rows * columns:
        buffer = np.empty(rows * columns)
        setattr(_workspaces, name, buffer)
    return buffer[: rows * columns].reshape(rows, columns)


class _Expectation:
    """One E-step over events that miss the same joint fields."""

    def __init__(
        self,
        model: Mixture,
        parameters: MixtureParameters,
        batch: Batch,
        observed: Mask | None,
        n_threads: int,
        compiled: bool,
    ) -> None:
        self.hard = model.assignment == "hard"
        self.batch = batch
        self.mask = batch.observed if observed is not None else None
        self.n_threads = n_threads
        self.compiled = compiled
        self.n_components = parameters.n_components
        self.block: Block = model.family.block(parameters.components, observed)
        self.center = batch.center
        self.theta = np.empty((self.n_components, self.block.n_features + 1))
        self.theta[:, :-1], constant = self.block.natural(self.center)
        np.add(constant, parameters.log_weights, out=self.theta[:, -1])
        self.weights, self.log_weights = parameters.weights, parameters.log_weights
        # Components whose log-density would lose precision in the expanded square, too far away or nearly flat:
        # theirs is computed directly, and their features are taken about their own mean.
        unstable = self.block.unstable(self.center)
        self.direct = NOTHING if unstable is None else unstable
        self.centers = self.center[None]
        if unstable is not None:
            self.centers = np.repeat(self.centers, self.n_components, axis=0)
            self.centers[unstable] = model.family.moments(parameters.components)[0][unstable]

    def run(self, given: Array | None, into: Posterior | None, collect: bool) -> _Collected:
        log_likelihood, sums = self._pass(given, into, self.centers if collect else None)
        if not collect:
            return _Collected(log_likelihood, sums[:, -1], {})
        parts, better = self.block.collect(sums[:, :-1], sums[:, -1], self.centers)
        for _ in range(MOST_PASSES):
            if better is None:
                break
            centers = better
            _, sums = self._pass(given, None, centers)
            parts, better = self.block.collect(sums[:, :-1], sums[:, -1], centers)
        return _Collected(log_likelihood, sums[:, -1], parts)

    def _pass(self, given: Array | None, into: Posterior | None, centers: Array | None) -> tuple[float, Array]:
        """Go through all blocks; with `centers` (K, D), sum the features about them."""
        n_events = self.batch.n_events
        usual = max(USUAL_BLOCK, UNPACKED_PRODUCTS // self.theta.size)
        size = min(LARGEST_BLOCK, usual, MOST_FEATURES // self.theta.shape[1])
        # Whole cache lines, and an odd number of them, so that the rows of a block do not compete for the same places.
        size = 8 * (max(0, size // 8 - 1) | 1)
        own = self.direct
        if centers is not None and centers is not self.centers:
            own = np.flatnonzero((centers != self.center).any(axis=1))
        starts = range(0, n_events, size)
        n_threads = min(self.n_threads, len(starts))
        compiled = self._compiled_blocks(given, into, centers, own) if self.compiled or n_threads > 1 else None
        blocks = compiled or partial(self._blocks, size=size, given=given, into=into, centers=centers, own=own)
        if n_threads <= 1:
            n_products = self.theta.size * min(size, n_events)
            alone = compiled or MOST_UNSHARED_PRODUCTS < n_products <= NOT_WORTH_SHARING
            with OneBlasThread() if alone else nullcontext():
                return blocks(0, n_events)
        # Ever smaller pieces, so that no thread waits long for another's last one.
        most = min(PIECES_PER_THREAD * n_threads, len(starts))
        ahead = {int(len(starts) * (1.0 - piece / most) ** 2) for piece in range(most)} - {0}
        bounds = [starts[-blocks_ahead] for blocks_ahead in sorted(ahead, reverse=True)] + [n_events]
        pieces, done = iter(enumerate(pairwise(bounds))), {}

        def work() -> None:
            try:
                # That the caller ignores these warnings does not reach into another thread.
                with _far_events():
                    for piece, span in pieces:
                        done[piece] = blocks(*span)
            except BaseException:
                # The other threads find no piece left.
                deque(pieces, maxlen=0)
                raise

        others: list[Future[None]] = []
        with OneBlasThread():
            try:
                others.extend(_threads().submit(work) for _ in range(n_threads - 1))
                work()
            finally:
                # Those at work read and write what belongs to the caller; for those not begun no piece is left.
                at_work = [other for other in others if not other.cancel()]
                wait(at_work)
        for other in at_work:
            other.result()
        # In the order of the events, whoever was faster, so that the same events give the same sums.
        log_likelihoods, sums = zip(*(done[piece] for piece in range(len(ahead))))
        return sum(log_likelihoods), np.add.reduce(sums)

    def _compiled_blocks(
        self, given: Array | None, into: Posterior | None, centers: Array | None, own: npt.NDArray[np.intp]
    ) -> Callable[[int, int], tuple[float, Array]] | None:
        """Return what `_blocks` does as compiled code, which does not hold Python's lock; None where it cannot."""
        factors = self.block.quadratic_factors()
        if factors is None or given is not None or self.hard or len(self.direct) or len(own):
            return None
        sum_features = _sum_features()
        if sum_features is None:
            return None
        nothing = np.empty(0)
        table, center = feature_table(factors), np.ascontiguousarray(self.center)
        # Compiled code takes the bits as they are.
        values = np.ascontiguousarray(self.batch.values, np.float64)
        weight = nothing if self.batch.weight is None else np.ascontiguousarray(self.batch.weight, np.float64)
        posterior = Posterior(np.empty(0), np.empty((self.n_components, 0))) if into is None else into

        def blocks(start: int, stop: int) -> tuple[float, Array]:
            sums = np.zeros(self.theta.shape)
            log_likelihood = sum_features(
                self.theta, table, center, values, weight, start, stop, *posterior, NOTHING, sums
            )
            if -LARGEST_LOG_DENSITY <= log_likelihood < math.inf:
                return log_likelihood, sums
            # Some event is impossible under every component, or so many are all but impossible.
            return self._blocks(start, stop, size=USUAL_BLOCK, given=given, into=into, centers=centers, own=own)

        return blocks

    def _blocks(
        self,
        start: int,
        stop: int,
        *,
        size: int,
        given: Array | None,
        into: Posterior | None,
        centers: Array | None,
        own: npt.NDArray[np.intp],
    ) -> tuple[float, Array]:
        size = max(1, min(size, stop - start))
        features = _workspace("features", self.theta.shape[1], size)
        features[-1] = 1.0
        shares = _workspace("shares", self.n_components, size)
        # Features first: OpenBLAS is faster that way round.
        total = np.zeros(self.theta.shape[::-1])
        sums = total if stop - start <= size else np.empty(total.shape)
        log_likelihood = 0.0
        weight = self.batch.weight
        for first in range(start, stop, size):
            span = slice(first, min(first + size, stop))
            if span.stop - first < size:
                features, shares = features[:, : span.stop - first], shares[:, : span.stop - first]
            self._write_features(span, self.center, features)
            if given is None:
                np.matmul(self.theta, features, out=shares)
                for component in self.direct:
                    shares[component] = self._log_joint(span, component)
                log_likelihood += self._normalize(shares, span, into)
            else:
                np.copyto(shares, given[:, span])
            if centers is None:
                continue
            if weight is not None:
                shares *= weight[span]
            np.matmul(features, shares.T, out=sums)
            for component in own:
                sums[:, component] = self._features_about(span, centers[component]) @ shares[component]
            if sums is not total:
                total += sums
        return log_likelihood, np.ascontiguousarray(total.T)

    def _log_joint(self, span: slice, component: int) -> Array:
        observed = None if self.mask is None else self.mask[:, span]
        density = self.block.log_density(self.batch.values[:, span], observed, component)
        density += self.log_weights[component]
        return density

    def _normalize(self, shares: Array, span: slice, into: Posterior | None) -> float:
        """Turn log-joints into responsibilities in place; return the log-likelihood of the block."""
        log_prob = softmax_in_place(shares)
        # It is not a number where densities leave the range of doubles: every component is equally far then.
        if not np.minimum.reduce(log_prob) >= -LARGEST_LOG_DENSITY:
            lost = ~(log_prob >= -LARGEST_LOG_DENSITY)
            shares[:, lost] = self.weights[:, None]
            log_prob[lost] = -LARGEST_LOG_DENSITY
        if self.block.has_base_measure:
            base = self.block.base_measure(
                self.batch.values[:, span], None if self.mask is None else self.mask[:, span]
            )
            log_prob += base
        if into is not None:
            into.log_prob[span] = log_prob
            into.responsibilities[:, span] = shares
        if self.hard:
            at = np.argmax(shares, axis=0), np.arange(shares.shape[1])
            log_prob = log_prob + np.log(shares[at])
            shares[:] = 0.0
            shares[at] = 1.0
        weight = self.batch.weight
        return float(np.add.reduce(log_prob) if weight is None else log_prob @ weight[span])

    def _write_features(self, span: slice, center: Array, features: Array) -> None:
        observed = None if self.mask is None else self.mask[:, span]
        self.block.write_features(self.batch.values[:, span], center, observed, features[:-1])

    def _features_about(self, span: slice, center: Array) -> Array:
        features = _workspace("own_features", self.theta.shape[1], span.stop - span.start)
        features[-1] = 1.0
        self._write_features(span, center, features)
        return features


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Threads that live on: to start one takes as long as thousands of events."""
    return ThreadPoolExecutor(MOST_THREADS, "stream_em")


# A forked process has none of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _far_events() -> np.errstate:
    """Densities of far events leave the range of doubles; `_normalize` sees to them."""
    return np.errstate(over="ignore", invalid="ignore")


@lru_cache(maxsize=1)
def _sum_features() -> Callable[..., float] | None:
    def load() -> Callable[..., float]:
        from stream_em.compiled_blocks import compiled_sum_features

        return compiled_sum_features()

    return compiled_or_none(load)
