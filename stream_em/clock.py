"""Which event times are believed: one wrong date far ahead must not make everything else fade for good."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stream_em.numerics import Array

# How many more events must be dated ahead than not before the stream is taken to have moved on.
MAJORITY = 100


@dataclass(frozen=True)
class Clock:
    """What is remembered of events dated further ahead of all others than can be believed.

    A wrong date comes among right ones; after a pause of the stream all dates lie ahead. So events dated ahead vote
    against those that are not (Boyer & Moore 1991, "MJRTY: a fast majority vote algorithm"), and when they lead by
    `MAJORITY` they are right: the clock goes to the earliest of their dates, and on from there as far as dates follow
    each other within reach. Until then each is taken to have come with the newest event that is believed: what it says
    is learned, when it says it was is not.

    Parameters
    ----------
    votes
        By how many events those dated ahead lead.
    ahead
        The earliest date of those and the last one within reach of it, None without votes.
    n_ahead
        Events that were taken to have come earlier than they said.

    >>> clock, latest = Clock().read(np.array([1.0, 2.0, 9_999.0, 3.0]), newest=0.0, max_ahead=10.0)
    >>> latest, clock.n_ahead
    (3.0, 1)

    """

    votes: int = 0
    ahead: tuple[float, float] | None = None
    n_ahead: int = 0

    def read(self, times: Array, newest: float | None, max_ahead: float) -> tuple[Clock, float]:
        """Return the clock after some events, and the latest time that is believed; those after it are taken for it.

        Parameters
        ----------
        times
            Their event times (n,), at least one.
        newest
            The newest time believed so far; None before any, when the median of `times` is.
        max_ahead
            Furthest that an event is believed to lie ahead of the newest one before it.

        """
        dates = _Dates(times, max_ahead)
        start = dates.median if newest is None else newest
        votes, ahead = self.votes, self.ahead
        if ahead is not None and ahead[0] <= start:
            # What merged has come there by itself.
            votes, ahead = 0, None
        while True:
            n_believed, reached = dates.within_reach(start)
            votes = max(0, votes + dates.n_events - 2 * n_believed)
            if n_believed < dates.n_events:
                ahead = dates.joined(ahead, n_believed)
            if votes < MAJORITY or ahead is None or n_believed == dates.n_events:
                break
            start, votes, ahead = ahead[1], 0, None
        clock = Clock(votes, ahead if votes else None, self.n_ahead + dates.n_events - n_believed)
        return clock, reached


class _Dates:
    """The dates of some events in order, and where the next lies out of reach."""

    def __init__(self, times: Array, max_ahead: float) -> None:
        self.n_events, self._max_ahead = len(times), max_ahead
        self._ordered = np.sort(times)
        with np.errstate(over="ignore"):
            self._leaps = np.flatnonzero(np.diff(self._ordered) > max_ahead) + 1

    @property
    def median(self) -> float:
        return float(self._ordered[(self.n_events - 1) // 2])

    def within_reach(self, start: float) -> tuple[int, float]:
        """Return how many dates lie before the first leap after `start`, and the newest time until then."""
        count = int(np.searchsorted(self._ordered, start, side="right"))
        if count == self.n_events or float(self._ordered[count]) - start <= self._max_ahead:
            further = self._leaps[np.searchsorted(self._leaps, count, side="right") :]
            count = int(further[0]) if len(further) else self.n_events
        return count, max(start, float(self._ordered[count - 1])) if count else start

    def joined(self, ahead: tuple[float, float] | None, first: int) -> tuple[float, float]:
        """Return the earliest of the dates ahead, of which these are the first, and the last within reach of it."""
        earliest = float(self._ordered[first])
        if ahead is None:
            return earliest, self.within_reach(earliest)[1]
        earliest = min(earliest, ahead[0])
        last = self.within_reach(earliest)[1]
        if last + self._max_ahead >= ahead[0]:
            last = self.within_reach(max(last, ahead[1]))[1]
        return earliest, last
