"""Averages of the parameters along the way."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from stream_em.models import MixtureParameters


@dataclass(frozen=True, eq=False)
class Average:
    """Running averages of the parameters over the last half to three quarters of the updates.

    How long the stream will be is not known, so averaging starts anew at each power of two and the
    average started at the power before is the one reported.
    """

    reported: MixtureParameters | None = None
    n_reported: int = 0
    running: MixtureParameters | None = None
    n_running: int = 0

    def include(self, parameters: MixtureParameters, update: int) -> Average:
        """Return the averages with the parameters of one more update, the first of which is number 1."""
        reported, n_reported, running, n_running = self.reported, self.n_reported, self.running, self.n_running
        if update & (update - 1) == 0:
            reported, n_reported, running, n_running = running, n_running, None, 0
        return Average(
            _interpolated(reported, parameters, n_reported),
            n_reported + 1,
            _interpolated(running, parameters, n_running),
            n_running + 1,
        )


def _interpolated(average: Any, new: Any, n_averaged: int) -> Any:
    """Mean of `n_averaged` parameters and one more; every family's parameters form a convex set."""
    if n_averaged == 0:
        return new
    if isinstance(new, np.ndarray):
        return average + (new - average) / (n_averaged + 1) if new.dtype.kind == "f" else new
    if isinstance(new, tuple):
        return tuple(_interpolated(one, other, n_averaged) for one, other in zip(average, new))
    assert is_dataclass(new)
    assert not isinstance(new, type)
    return replace(
        new,
        **{
            one.name: _interpolated(getattr(average, one.name), getattr(new, one.name), n_averaged)
            for one in fields(new)
        },
    )
