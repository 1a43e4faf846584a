"""How a run went, for its report and its picture."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_em import OnlineEM
from stream_em.cli.packing import pack, unpack

# Points of the history that the picture draws; more would not be seen.
_MOST_POINTS = 512


class History:
    """Log-likelihood and weights at no more than `_MOST_POINTS` points: neighbours are joined when there are more.

    Parameters
    ----------
    after
        What `state` returned, to go on there.

    """

    def __init__(self, after: dict[str, Any] | None = None) -> None:
        self._points: list[tuple[int, float, int, dict[int, float]]] = []
        self._open = (0.0, 0)
        self._stride = 1
        self._n_batches = 0
        self._total = 0.0
        self._count = 0
        if after is not None:
            self._stride, self._n_batches, self._count, n_open = after["counts"]
            self._total, open_total = unpack(after["totals"]).tolist()
            self._open = (open_total, n_open)
            everything = zip(after["component_ids"], unpack(after["weights"]).tolist())
            weights = [dict(islice(everything, size)) for size in after["sizes"]]
            points = zip(after["n_events"], unpack(after["point_totals"]).tolist(), after["point_counts"], weights)
            self._points = list(points)

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        weights = [weights for _, _, _, weights in self._points]
        everything = [weight for one in weights for weight in one.values()]
        return {
            "counts": [self._stride, self._n_batches, self._count, self._open[1]],
            "totals": pack(np.array([self._total, self._open[0]])),
            "n_events": [n_events for n_events, _, _, _ in self._points],
            "point_totals": pack(np.array([total for _, total, _, _ in self._points])),
            "point_counts": [count for _, _, count, _ in self._points],
            "weights": pack(np.array(everything)),
            "component_ids": [identity for one in weights for identity in one],
            "sizes": [len(one) for one in weights],
        }

    def add(self, n_events: int, log_prob: npt.NDArray[np.float64], learner: OnlineEM) -> None:
        """Take note of a batch that was scored, with so many events learned until then."""
        if not len(log_prob):
            return
        total = float(log_prob.sum())
        self._total += total
        self._count += len(log_prob)
        self._open = (self._open[0] + total, self._open[1] + len(log_prob))
        self._n_batches += 1
        if self._n_batches % self._stride == 0:
            weights = dict(zip(learner.component_ids.tolist(), learner.weights.tolist()))
            self._points.append((n_events, *self._open, weights))
            self._open = (0.0, 0)
            if len(self._points) >= _MOST_POINTS:
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [(b[0], a[1] + b[1], a[2] + b[2], b[3]) for a, b in pairs]
                self._stride *= 2

    @property
    def mean(self) -> float | None:
        """Mean log-likelihood of all events scored after the warm-up; None before there are any."""
        return self._total / self._count if self._count else None

    @property
    def shown_mean(self) -> str:
        """The mean, for people."""
        return "not known" if self.mean is None else f"{self.mean:.4f}"

    def points(self) -> list[tuple[int, float, dict[int, float]]]:
        """Events so far, mean log-likelihood since the point before, weights by component id."""
        return [(n_events, total / count, weights) for n_events, total, count, weights in self._points]

    def facts(self, learner: OnlineEM) -> dict[str, str]:
        """What a person likes to see while it runs."""
        if not self._count:
            return {"warming": "up"}
        return {
            "mean_log_likelihood": self.shown_mean,
            "effective_components": f"{learner.effective_components:.2f}",
        }
