"""How many components there are: they die, are born, merge and split while a stream is learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream_em.models import Mixture, MixtureParameters
from stream_em.numerics import Array, check_whole
from stream_em.schema import Batch
from stream_em.seeding import concatenate, seed
from stream_em.statistics import Moments, Part, Statistics

# Ids are exact in a double, and so in JSON; those below are left to the components that a learner starts with.
ID_BITS = 53
LEAST_NEW_ID = 2**32

# The weight of a component that is about to die, as a share of all: the logarithm of a weight must be finite.
LEAST_SHARE_OF_WEIGHT = 1e-9

# Components, the lightest first, without which it is tried at each check, and pairs, the most alike first.
LIGHTEST_TRIED, PAIRS_TRIED = 3, 3

# Starts and EM iterations of the two halves of a component, and iterations of a newborn one.
N_STARTS, N_ITERATIONS = 2, 10

# Starts of newborn components that are tried at each check.
NEWBORN_STARTS = 2

# Checks that change nothing are made ever more rarely, until they come after so many times `recent_events`; unless
# poorly explained events come so many times as often as they did at the last check.
LONGEST_WAIT, ALARM = 10, 2.0


class StructureChanges(NamedTuple):
    """How often the components of a learner changed.

    Parameters
    ----------
    births
        Components that came from poorly explained events.
    deaths
        Components that lost their events, or were no longer needed.
    merges
        Pairs that became one.
    splits
        Components that became two.

    """

    births: int = 0
    deaths: int = 0
    merges: int = 0
    splits: int = 0


NO_CHANGES = StructureChanges()


@dataclass(frozen=True, eq=False)
class StructureState:
    """What an adaptive number of components remembers of the stream.

    Parameters
    ----------
    recent
        The newest events, by which moves are judged; None before the first.
    poor
        Poorly explained events that no component was made of yet; None when there is none.
    poor_at
        How many events had been learned when each of them came.
    threshold
        Log-density below which an event is poorly explained; None before the first check.
    n_poor
        Poorly explained events since the last check.
    checked_at
        How many events had been learned at the last check.
    wait
        When the next check is due, in times `recent_events` from then.
    turn
        Number of components whose turn to be split has passed.
    changes
        What has changed so far.

    """

    recent: Batch | None = None
    poor: Batch | None = None
    poor_at: npt.NDArray[np.int64] | None = None
    threshold: float | None = None
    n_poor: int = 0
    checked_at: int = 0
    wait: int = 1
    turn: int = 0
    changes: StructureChanges = NO_CHANGES

    def apply(self, change: Callable[[Batch], Batch]) -> StructureState:
        """Return the state with a change made to all the events it holds."""
        recent, poor = (None if one is None else change(one) for one in (self.recent, self.poor))
        return replace(self, recent=recent, poor=poor)

    def merge(self, other: StructureState) -> StructureState:
        """Return the state of a learner that begins anew with what two have learned."""
        return StructureState(changes=StructureChanges(*(a + b for a, b in zip(self.changes, other.changes))))


@dataclass(frozen=True)
class AdaptiveComponents:
    """A number of components that follows the events, for `OnlineEM(structure=...)`.

    The model's `n_components` is the number at the start. From then on

    - components *die*: the weights have a Dirichlet prior with exponents -N/2, where N is the number of free
      parameters of a component, so that weights are proportional to max(n - N/2, 0) with n the weight of the events
      that the statistics hold for it. A component that comes to 0 is removed with its statistics, the lightest
      first, no more than one at each update, so that the others can take its events over before they are judged;
    - when that raises the log-posterior of the events, components that are not needed die, and two *merge*, as many as
      do; then one is *born*, or *splits*. That is checked each time that `recent_events` events have come; while checks
      change nothing ever more rarely, down to a tenth of that, as long as poorly explained events remain as rare.

    Ids are stable: a component keeps its id for life, of two that merge the heavier keeps its id, and so does the
    heavier part of one that splits. Ids of new components are random numbers of 53 bits, made from their statistics,
    that no component had before, nor one of another fork.

    Parameters
    ----------
    births
        Whether poorly explained events give rise to components.
    merges
        Whether components merge.
    splits
        Whether components split.
    max_components
        Most components; no birth and no split goes beyond it.
    recent_events
        Least number of events between checks, and most that are held to judge moves by; as many poorly explained
        ones are held besides.
    tail
        Share of the recent events, those of the lowest log-density, that count as poorly explained; in (0, 1/2].

    Raises
    ------
    ValueError
        When a number is out of range.

    Notes
    -----
    Half of the mean weight of a component is the most that the prior takes, and none dies before the events weigh more
    than all the components' N/2: with less there is no posterior mode with all weights above 0 to speak of. Hence a
    learner whose memory is that short (a `Constant` step size, with a mini-batch of B events, remembers B / step) is
    refused.

    Moves are judged by the message length of Figueiredo & Jain (2002), equation 15, whose prior is the same:
    log p(events) - N/2 sum log(n_k / 12) - K/2 log(n / 12) - K (N + 1)/2. A merge needs no event for its statistics,
    which are the merge of the two; its loss is estimated from the recent events, at the weight of all that the learner
    remembers. The parts of a split, and a newborn component, are fitted to every other recent or poorly explained
    event, and judged by those in between, at the weight of no more than these. So merges as well as splits are made
    only when the evidence is clear, and do not undo each other. The expected log-likelihood of complete events, which
    needs no events at all, would not do: it takes doubt about the component of an event for a loss, and so joins
    components that overlap.

    The published experiment is `Mixture(Gaussian(), 30)` with `schedule=Constant(1 / 150)`, `batch_size=1` and
    `structure=AdaptiveComponents(births=False, merges=False, splits=False)`.

    References
    ----------
    Zivkovic & van der Heijden (2004), "Recursive unsupervised learning of finite mixture models"; Figueiredo & Jain
    (2002), "Unsupervised learning of finite mixture models"; Ueda, Nakano, Ghahramani & Hinton (2000), "SMEM algorithm
    for mixture models", whose criterion chooses the pairs that may merge.

    >>> from stream_em import Gaussian, OnlineEM
    >>> generator = np.random.default_rng(0)
    >>> events = generator.normal(size=(20_000, 2)) + 8.0 * generator.integers(3, size=(20_000, 1))
    >>> learner = OnlineEM(Mixture(Gaussian(), n_components=12), structure=AdaptiveComponents(), seed=0).update(events)
    >>> learner.parameters.n_components, np.abs(np.sort(learner.parameters.components.mean[:, 0])).round()
    (3, array([ 0.,  8., 16.]))

    """

    births: bool = True
    merges: bool = True
    splits: bool = True
    max_components: int = 100
    recent_events: int = 1000
    tail: float = 0.01

    def __post_init__(self) -> None:
        for name in ("births", "merges", "splits"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_whole(max_components=self.max_components)
        check_whole(least=10, recent_events=self.recent_events)
        if not 0.0 < self.tail <= 0.5:
            raise ValueError(
                f"tail must lie in (0, 0.5], got {self.tail!r}: it is the share of the events that count as poorly "
                "explained, of which there must be some, and which cannot be most"
            )

    def check_memory(self, bound: Mixture, n_components: int, memory: float) -> None:
        """Check that a learner can remember enough events to tell superfluous components from others.

        Raises
        ------
        ValueError
            When it cannot.

        """
        least = n_components * _half_parameters(bound)
        if not memory > least:
            raise ValueError(
                f"{n_components} components of {2 * _half_parameters(bound):g} parameters each need a memory of more "
                f"than {least:g} events, or the prior, which takes half an event for each parameter, outweighs them; "
                f"this learner remembers {memory:g}: use fewer components or a smaller step size"
            )

    @property
    def moves(self) -> bool:
        """Whether any move asks for events to be held."""
        return self.births or self.merges or self.splits

    def m_step(
        self,
        bound: Mixture,
        statistics: Statistics,
        *,
        kept: tuple[MixtureParameters, npt.NDArray[np.bool_]] | None = None,
    ) -> MixtureParameters:
        """Return the M-step of a bound model with the prior of this structure on the weights."""
        least = LEAST_SHARE_OF_WEIGHT * statistics.total_weight or 1.0
        weights = np.maximum(statistics.weights - _taken(bound, statistics), least)
        return replace(bound.m_step(statistics, kept=kept), weights=weights / np.add.reduce(weights))

    def prune(self, bound: Mixture, statistics: Statistics) -> Statistics:
        """Return the statistics without the lightest component, if the prior leaves it nothing."""
        weights = statistics.weights
        lightest = int(np.argmin(weights))
        if (
            len(weights) == 1
            or weights[lightest] > _taken(bound, statistics)
            or statistics.total_weight <= len(weights) * _half_parameters(bound)
        ):
            return statistics
        return _without(statistics, lightest)

    def revise(
        self,
        bound: Mixture,
        statistics: Statistics,
        iterate: MixtureParameters,
        state: StructureState,
        piece: Batch,
        log_prob: Array | None,
        n_events: int,
        random_seed: int,
    ) -> tuple[Statistics, StructureState]:
        """Return the statistics after the moves that new events give rise to, the same when there is none.

        Parameters
        ----------
        bound
            The mixture, bound to the schema of the events.
        statistics
            What was learned, these events included.
        iterate
            The parameters after their M-step.
        state
            What is remembered.
        piece
            The new events.
        log_prob
            Their log-densities before they were learned; needed when there are `moves`.
        n_events
            How many events have been learned.
        random_seed
            Seed of the random choices.

        """
        pruned = self.prune(bound, statistics)
        if pruned is not statistics:
            state = _counted(state, deaths=1)
        if not self.moves:
            return pruned, state
        assert log_prob is not None
        state = self._remember(state, piece, log_prob, n_events)
        recent = state.recent
        # After a merge, or a long warm-up, many events have been learned of which few are held to judge by.
        if recent is None or recent.n_events < self.recent_events or not self._due(state, n_events):
            return pruned, state
        if pruned is not statistics:
            iterate = self.m_step(bound, pruned)
        generator = np.random.default_rng([random_seed, n_events])
        check = _Check(self, bound, pruned, iterate, state, recent, n_events, generator)
        moved, state = check.move()
        return moved, replace(
            state,
            threshold=float(np.quantile(check.log_prob, self.tail)),
            n_poor=0,
            checked_at=n_events,
            wait=min(2 * state.wait, LONGEST_WAIT) if moved is statistics else 1,
        )

    def _due(self, state: StructureState, n_events: int) -> bool:
        since = n_events - state.checked_at
        alarm = state.n_poor > ALARM * self.tail * since
        return since >= self.recent_events * (1 if alarm else state.wait)

    def _remember(self, state: StructureState, piece: Batch, log_prob: Array, n_events: int) -> StructureState:
        if piece.weight is not None:
            told = np.flatnonzero(piece.weight)
            piece, log_prob = piece.select(told), log_prob[told]
        state = replace(state, recent=_newest(state.recent, piece, self.recent_events))
        if state.threshold is None:
            return state
        chosen = log_prob < state.threshold
        n_poor = int(np.count_nonzero(chosen))
        state = replace(state, n_poor=state.n_poor + n_poor)
        if not (n_poor and self.births):
            return state
        poor = _newest(state.poor, piece.select(np.flatnonzero(chosen)), self.recent_events)
        earlier = np.empty(0, dtype=np.int64) if state.poor_at is None else state.poor_at
        poor_at = np.append(earlier, np.full(n_poor, n_events))[-poor.n_events :]
        return replace(state, poor=poor, poor_at=poor_at)


class _Check:
    """One look at whether a birth, a merge or a split raises the log-posterior."""

    def __init__(
        self,
        structure: AdaptiveComponents,
        bound: Mixture,
        statistics: Statistics,
        iterate: MixtureParameters,
        state: StructureState,
        recent: Batch,
        n_events: int,
        generator: np.random.Generator,
    ) -> None:
        self.structure, self.bound, self.state, self.recent = structure, bound, state, recent
        self.n_events, self.generator = n_events, generator
        self.half_parameters = _half_parameters(bound)
        self._settle_on(statistics, iterate)

    def _settle_on(self, statistics: Statistics, iterate: MixtureParameters) -> None:
        self.statistics, self.iterate = statistics, iterate
        self.log_prob, self.responsibilities = self.bound.posterior(iterate, self.recent)

    def _take(self, candidate: Statistics, **more: int) -> None:
        self._settle_on(candidate, self.structure.m_step(self.bound, candidate))
        self.state = _counted(self.state, **more)

    def move(self) -> tuple[Statistics, StructureState]:
        """Return the statistics after the moves that pay, and what is remembered then."""
        while len(self.statistics.weights) > 1:
            if (left := self._death()) is not None:
                self._take(left, deaths=1)
            elif self.structure.merges and (merged := self._merge()) is not None:
                self._take(merged, merges=1)
            else:
                break
        n_components = len(self.statistics.weights)
        if n_components < self.structure.max_components:
            if self.structure.births and (born := self._birth()) is not None:
                self.state = replace(self.state, poor=None, poor_at=None)
                self._take(born, births=1)
            elif self.structure.splits:
                self.state = replace(self.state, turn=self.state.turn + 1)
                if (split := self._split(self.state.turn % n_components)) is not None:
                    self._take(split, splits=1)
        return self.statistics, self.state

    def _pays(self, candidate: Statistics, gain: float, weight: float) -> bool:
        """Whether so much log-likelihood gained over events of this weight outweighs the change in message length."""
        if candidate.weights.min() <= _taken(self.bound, candidate) < self.statistics.weights.min():
            # A new component would be so light that it died at once.
            return False
        before, after = (
            _message_length(one.weights * (weight / one.total_weight), self.half_parameters)
            for one in (self.statistics, candidate)
        )
        return gain > after - before

    def _gain(self, candidate: Statistics, events: Batch, log_prob: Array) -> float:
        """Return the log-likelihood that a candidate gains over events with these log-densities."""
        change = self.bound.log_prob(self.structure.m_step(self.bound, candidate), events) - log_prob
        return float(change @ _weight_of(events))

    def _pays_for_all(self, candidate: Statistics) -> bool:
        """Whether a candidate is better for all that is remembered, going by the recent events."""
        weight, recent_weight = self.statistics.total_weight, float(_weight_of(self.recent).sum())
        gain = self._gain(candidate, self.recent, self.log_prob) * weight / recent_weight
        return self._pays(candidate, gain, weight)

    def _death(self) -> Statistics | None:
        weight = _weight_of(self.recent)
        found, expected = self.responsibilities @ weight, self.iterate.weights * weight.sum()
        # A rare component of which there are hardly any events just now cannot be judged by them.
        judged = np.flatnonzero(found >= np.maximum(0.5 * expected, 1.0))
        for position in judged[np.argsort(self.statistics.weights[judged], kind="stable")][:LIGHTEST_TRIED]:
            candidate = _without(self.statistics, int(position))
            if self._pays_for_all(candidate):
                return candidate
        return None

    def _merge(self) -> Statistics | None:
        # Pairs whose responsibilities are most alike, Ueda et al. (2000), equation 3.1.
        length = np.sqrt(np.einsum("kb,kb->k", self.responsibilities, self.responsibilities))
        alike = self.responsibilities @ self.responsibilities.T / np.maximum(np.outer(length, length), 1e-300)
        first, second = np.triu_indices(len(alike), 1)
        for pair in np.argsort(-alike[first, second], kind="stable")[:PAIRS_TRIED]:
            candidate = _fused(self.statistics, int(first[pair]), int(second[pair]))
            if self._pays_for_all(candidate):
                return candidate
        return None

    def _split(self, component: int) -> Statistics | None:
        weight = _weight_of(self.recent)
        share = self.responsibilities[component] * weight
        if share.sum() <= 8.0 * self.half_parameters:
            return None
        even, odd = (slice(start, None, 2) for start in (0, 1))
        halves = self._halves(component, self.recent.select(even), share[even])
        gain = self._gain(halves, self.recent.select(odd), self.log_prob[odd])
        weight_of_odd = float(weight[odd].sum())
        if weight_of_odd <= 0.0 or not self._pays(halves, gain * weight.sum() / weight_of_odd, float(weight.sum())):
            return None
        return self._halves(component, self.recent, share)

    def _halves(self, component: int, events: Batch, share: Array) -> Statistics:
        """Return the statistics with a component replaced by two, fitted to its shares of these events."""
        told = np.flatnonzero(share > 0.0)
        own = replace(events.select(told), weight=share[told])
        pair = replace(self.bound, n_components=2)
        start = seed(pair, own, self.generator, n_starts=N_STARTS, n_iterations=N_ITERATIONS)
        return self._replaced(component, self.bound.e_step(start, own))

    def _replaced(self, component: int, halves: Statistics) -> Statistics:
        of_component = self.statistics.weights[component]
        halves = halves.select(np.argsort(-halves.weights, kind="stable"))
        ids = [int(self.statistics.component_ids[component]), self._new_id(halves)]
        return self._with(_without(self.statistics, component), halves, ids, of_component / halves.total_weight)

    def _birth(self) -> Statistics | None:
        poor, poor_at = self.state.poor, self.state.poor_at
        if poor is None or poor_at is None or _weight_of(poor).sum() <= 2.0 * self.half_parameters:
            return None
        mean_weight = float(_weight_of(self.recent).mean())
        span = max(float(self.n_events - poor_at[0] + 1) * mean_weight, 2.0 * float(_weight_of(poor).sum()))
        log_prob = self.bound.log_prob(self.iterate, poor)
        pair = replace(self.bound, n_components=NEWBORN_STARTS)
        even, odd = (slice(start, None, 2) for start in (0, 1))
        learned, judged = poor.select(even), poor.select(odd)
        start = seed(pair, learned, self.generator, n_starts=N_STARTS, n_iterations=N_ITERATIONS)
        for chosen in range(NEWBORN_STARTS):
            first = self.bound.posterior(start, learned).responsibilities[chosen]
            newborn = self._newborn(learned, first, log_prob[even], 0.5 * span)
            if newborn is None:
                continue
            candidate = self._with_newborn(newborn, 0.5 * span)
            share = newborn.total_weight / (0.5 * span)
            rest = 0.5 * span - float(_weight_of(judged).sum())
            gain = self._gain(candidate, judged, log_prob[odd]) + rest * np.log1p(-share)
            if self._pays(candidate, 2.0 * gain, span):
                whole = self._newborn(poor, self.bound.posterior(start, poor).responsibilities[chosen], log_prob, span)
                return None if whole is None else self._with_newborn(whole, span)
        return None

    def _newborn(self, events: Batch, share: Array, log_prob: Array, span: float) -> Statistics | None:
        """Return the statistics of a component beside the others, which stay as they are, by EM.

        Parameters
        ----------
        events
            Poorly explained events.
        share
            Its first responsibilities for them.
        log_prob
            Their log-densities under the other components.
        span
            Weight of the events that they were the poorly explained ones of.

        """
        prior, weight = self.bound.prior(self.statistics), _weight_of(events)
        parameters = self.bound.pooled(events, 1)
        for _ in range(N_ITERATIONS):
            statistics = self.bound.e_step(parameters, replace(events, weight=weight * share))
            if not self.half_parameters < statistics.total_weight < 0.5 * span:
                return None
            parameters = self.bound.m_step(statistics, prior)
            mixed = statistics.total_weight / span
            log_odds = np.log(mixed) - np.log1p(-mixed) + self.bound.log_prob(parameters, events) - log_prob
            share = np.exp(-np.logaddexp(0.0, -log_odds))
        return statistics if statistics.total_weight > 2.0 * self.half_parameters else None

    def _with_newborn(self, newborn: Statistics, span: float) -> Statistics:
        """Return the statistics with a newborn component, whose weight the others give up in equal shares."""
        others = self.statistics.scale(1.0 - newborn.total_weight / span)
        return self._with(others, newborn, [self._new_id(newborn)], self.statistics.total_weight / span)

    def _with(self, others: Statistics, new: Statistics, ids: list[int], factor: float) -> Statistics:
        """Return the statistics of the others and of new components with these ids, their weight times a factor."""
        new = replace(
            new.scale(factor),
            component_ids=np.array(ids, dtype=np.int64),
            log_likelihood=0.0,
            half_life=self.statistics.half_life,
            time=self.statistics.time,
        )
        merged = others.merge_by_id(new)
        return replace(merged, log_likelihood=self.statistics.log_likelihood)

    def _new_id(self, new: Statistics) -> int:
        """Return an id that depends on all that tells the new component from those of other forks."""
        digest = hashlib.blake2b(self.n_events.to_bytes(8, "big"), digest_size=8)
        for name, part in sorted(new.parts.items()):
            digest.update(name.encode())
            for array in part.arrays().values():
                digest.update(np.ascontiguousarray(array).tobytes())
        known = set(self.statistics.component_ids.tolist())
        while True:
            number = int.from_bytes(digest.digest(), "big") >> (64 - ID_BITS)
            if number >= LEAST_NEW_ID and number not in known:
                return number
            digest.update(b"again")


def _half_parameters(bound: Mixture) -> float:
    """Return N/2, with N the free parameters that one more component adds, its weight left out."""
    assert bound.schema is not None
    n_fields = len(bound.schema)
    return 0.5 * (bound.family.n_parameters(n_fields, 2) - bound.family.n_parameters(n_fields, 1))


def _taken(bound: Mixture, statistics: Statistics) -> float:
    """Return the weight of events that the prior takes from each component."""
    return min(_half_parameters(bound), 0.5 * statistics.total_weight / len(statistics.weights))


def _message_length(weights: Array, half_parameters: float) -> float:
    """Return Figueiredo & Jain (2002), equation 15, without the log-likelihood, for components of weights (K,)."""
    weights = np.maximum(weights, 1e-300)
    of_components = half_parameters * np.log(weights / 12.0) + half_parameters + 0.5
    return float(of_components.sum() + 0.5 * len(weights) * np.log(weights.sum() / 12.0))


def _without(statistics: Statistics, position: int) -> Statistics:
    """Return the statistics without a component; of a tied scatter its share goes with it."""
    left = np.delete(np.arange(len(statistics.weights)), position)
    share = float(statistics.weights[left].sum()) / max(statistics.total_weight, 1e-300)
    others = statistics.select(left)
    return replace(others, parts={name: _tied_scaled(part, share) for name, part in others.parts.items()})


def _fused(statistics: Statistics, first: int, second: int) -> Statistics:
    """Return the statistics with two components merged into one, which has the id of the heavier."""
    light, heavy = sorted((first, second), key=lambda position: (statistics.weights[position], -position))
    others = statistics.select(np.delete(np.arange(len(statistics.weights)), light))
    moved = statistics.select(np.array([light]))
    moved = replace(
        moved,
        # A tied scatter is that of all: the others have it already.
        parts={name: _tied_scaled(part, 0.0) for name, part in moved.parts.items()},
        component_ids=statistics.component_ids[[heavy]],
        log_likelihood=0.0,
    )
    return others.merge_by_id(moved)


def _tied_scaled(part: Part, factor: float) -> Part:
    return replace(part, scatter=part.scatter * factor) if isinstance(part, Moments) and part.is_tied else part


def _weight_of(events: Batch) -> Array:
    return np.ones(events.n_events) if events.weight is None else events.weight


def _newest(held: Batch | None, piece: Batch, most: int) -> Batch:
    """Return the newest of the events held and new ones, copied from what they view."""
    piece = piece.select(slice(max(0, piece.n_events - most), None))
    if held is None:
        return concatenate([piece])
    left = max(0, most - piece.n_events)
    return concatenate([held.select(slice(max(0, held.n_events - left), None)), piece])


def _counted(state: StructureState, **more: int) -> StructureState:
    changes = state.changes._asdict()
    return replace(state, changes=StructureChanges(**{name: changes[name] + more.get(name, 0) for name in changes}))
