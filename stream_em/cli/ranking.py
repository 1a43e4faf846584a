"""ROC-AUC of a stream of scores, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Up to here the scores themselves are kept and the area is exact. After that they are counted in bins.
EXACT_LIMIT = 1_000_000
_N_BINS = 1 << 16


class RankingScore:
    """Area under the ROC curve of anomaly scores: the chance that an anomaly scores above a normal event.

    Parameters
    ----------
    exact_limit
        Number of events up to which the area is exact. Beyond it scores are counted in bins of equal numbers
        of events, and `bound` says how far off the area can be.

    >>> score = RankingScore()
    >>> score.add(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    >>> score.area, score.bound
    (0.75, 0.0)

    """

    def __init__(self, exact_limit: int = EXACT_LIMIT) -> None:
        self._exact_limit = exact_limit
        self._scores: list[npt.NDArray[np.float64]] = []
        self._anomalous: list[npt.NDArray[np.bool_]] = []
        self._edges: npt.NDArray[np.float64] | None = None
        self._counts = np.zeros((2, _N_BINS + 1), np.int64)
        self.n_normal = 0
        self.n_anomalous = 0

    def add(self, scores: npt.NDArray[np.float64], anomalous: npt.NDArray[np.bool_]) -> None:
        """Count events: scores (n,), and whether each is an anomaly (n,)."""
        n_anomalous = int(np.count_nonzero(anomalous))
        self.n_anomalous += n_anomalous
        self.n_normal += len(scores) - n_anomalous
        if self._edges is not None:
            self._count(scores, anomalous)
            return
        self._scores.append(scores)
        self._anomalous.append(anomalous)
        if self.n_normal + self.n_anomalous > self._exact_limit:
            scores, anomalous = np.concatenate(self._scores), np.concatenate(self._anomalous)
            self._edges = np.unique(np.quantile(scores, np.linspace(0.0, 1.0, _N_BINS)))
            self._counts = np.zeros((2, len(self._edges) + 1), np.int64)
            self._count(scores, anomalous)
            self._scores, self._anomalous = [], []

    def _count(self, scores: npt.NDArray[np.float64], anomalous: npt.NDArray[np.bool_]) -> None:
        if self._edges is None:
            raise AssertionError("there are no bins yet")
        bins = np.searchsorted(self._edges, scores, side="right")
        self._counts[1] += np.bincount(bins[anomalous], minlength=self._counts.shape[1])
        self._counts[0] += np.bincount(bins[~anomalous], minlength=self._counts.shape[1])

    @property
    def defined(self) -> bool:
        """Whether there are events of both sorts."""
        return self.n_normal > 0 and self.n_anomalous > 0

    @property
    def area(self) -> float:
        """Area under the curve, ties counting half; NaN unless `defined`."""
        if not self.defined:
            return float("nan")
        normal, anomalous = self._tallies()
        below = np.cumsum(normal) - normal
        return float(np.dot(anomalous, below + 0.5 * normal) / (self.n_normal * self.n_anomalous))

    @property
    def bound(self) -> float:
        """How far `area` can be from the exact area: half the share of pairs that fell into one bin."""
        if self._edges is None or not self.defined:
            return 0.0
        normal, anomalous = self._tallies()
        return float(0.5 * np.dot(anomalous, normal) / (self.n_normal * self.n_anomalous))

    def _tallies(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Normal and anomalous events at each distinct score, or in each bin, ascending."""
        if self._edges is not None:
            return self._counts[0].astype(np.float64), self._counts[1].astype(np.float64)
        scores, anomalous = np.concatenate(self._scores), np.concatenate(self._anomalous)
        _, place = np.unique(scores, return_inverse=True)
        size = int(place.max()) + 1
        return (
            np.bincount(place[~anomalous], minlength=size).astype(np.float64),
            np.bincount(place[anomalous], minlength=size).astype(np.float64),
        )
