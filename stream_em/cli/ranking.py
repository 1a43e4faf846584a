"""ROC-AUC of a stream of scores, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from stream_em.arrays import arrow_numbers
from stream_em.cli.config import SourceSection
from stream_em.cli.display import counted, say
from stream_em.cli.packing import pack, unpack
from stream_em.plain import is_number

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
    after
        What `state` returned, to go on there.

    >>> score = RankingScore()
    >>> score.add(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    >>> score.area, score.bound
    (0.75, 0.0)

    """

    def __init__(self, exact_limit: int = EXACT_LIMIT, *, after: dict[str, Any] | None = None) -> None:
        self._exact_limit = exact_limit
        self._scores: list[npt.NDArray[np.float64]] = []
        self._anomalous: list[npt.NDArray[np.bool_]] = []
        self._edges: npt.NDArray[np.float64] | None = None
        self._counts = np.zeros((2, _N_BINS + 1), np.int64)
        self.n_normal = 0
        self.n_anomalous = 0
        if after is not None:
            self.n_normal, self.n_anomalous = after["n_normal"], after["n_anomalous"]
            if "edges" in after:
                self._edges, self._counts = unpack(after["edges"]), unpack(after["counts"])
            else:
                self._scores, self._anomalous = [unpack(after["scores"])], [unpack(after["anomalous"])]

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        state: dict[str, Any] = {"n_normal": self.n_normal, "n_anomalous": self.n_anomalous}
        if self._edges is not None:
            return {**state, "edges": pack(self._edges), "counts": pack(self._counts)}
        scores = np.concatenate(self._scores) if self._scores else np.empty(0)
        anomalous = np.concatenate(self._anomalous) if self._anomalous else np.empty(0, bool)
        return {**state, "scores": pack(scores), "anomalous": pack(anomalous)}

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


class LabelledRanking:
    """ROC-AUC of the anomaly score -log p(x), when the source has labels.

    Parameters
    ----------
    section
        Which labels mean anomaly.
    after
        What `state` returned, to go on there.

    Attributes
    ----------
    wanted
        Whether the source has labels.

    """

    def __init__(self, section: SourceSection, after: dict[str, Any] | None = None) -> None:
        self._score = RankingScore(after=None if after is None else after["score"])
        self.wanted = section.label is not None or section.river is not None
        self._given = section.anomaly_labels
        self._unlabelled: int = 0 if after is None else after["unlabelled"]
        self._problem: str = "" if after is None else after["problem"]

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        return {"score": self._score.state(), "unlabelled": self._unlabelled, "problem": self._problem}

    def add(
        self,
        label: pa.ChunkedArray | None,
        kept: npt.NDArray[np.intp],
        log_prob: npt.NDArray[np.float64],
    ) -> None:
        """Count events: the labels of a chunk, the rows (n,) of it that are meant, and their log-densities (n,)."""
        if label is None or not len(kept) or self._problem or not self.wanted:
            return
        label = label.slice(int(kept[0]), int(kept[-1] - kept[0]) + 1)
        if len(label) > len(kept):
            label = label.take(arrow_numbers(kept - kept[0]))
        there = np.asarray(label.is_valid())
        anomalous = self._anomalous(label)
        if anomalous is not None:
            self._unlabelled += int(np.count_nonzero(~there))
            self._score.add(-log_prob[there], anomalous[there])

    def _anomalous(self, label: pa.ChunkedArray) -> npt.NDArray[np.bool_] | None:
        if pa.types.is_dictionary(label.type):
            label = label.cast(label.type.value_type)
        if self._given is not None:
            texts = [str(value) for value in self._given]
            if pa.types.is_boolean(label.type):
                texts = [text.lower() for text in texts]
            # Otherwise compared as text, so that 1 in the configuration is both 1 and "1" in the data.
            elif pa.types.is_floating(label.type):
                numbers = pa.array([float(text) for text in texts if is_number(text)], pa.float64())
                return np.asarray(pc.is_in(label, value_set=numbers.cast(label.type)))
            return np.asarray(pc.is_in(label.cast(pa.string()), value_set=pa.array(texts, pa.string())))
        if pa.types.is_boolean(label.type):
            return np.asarray(label.fill_null(False))
        if pa.types.is_integer(label.type) or pa.types.is_floating(label.type):
            values = np.asarray(label.cast(pa.float64()).fill_null(0.0))
            ones: npt.NDArray[np.bool_] = values == 1.0
            if (ones | (values == 0.0)).all():
                return ones
        if pa.types.is_null(label.type):
            return np.zeros(len(label), bool)
        example = next(value for value in label.to_pylist() if value not in (None, 0, 1))
        self._problem = (
            f"no ROC-AUC: the labels are not 0 and 1 (there is {example!r}); say which of them mean anomaly "
            "in source.anomaly_labels"
        )
        return None

    def report(self, console: Console, *, after_warm_up: bool) -> None:
        """Say how well the score ranks; that of a run, events of its warm-up have not."""
        if not self.wanted:
            return
        score, those = self._score, ", after the warm-up" if after_warm_up else ""
        if self._problem:
            say(console, self._problem, "yellow")
        elif not score.defined:
            lacking = "normal events" if score.n_anomalous else "anomalies"
            say(console, f"no ROC-AUC: there were no {lacking} among the labels{those}", "yellow")
        else:
            bound = f" ± {score.bound:.1g}" if score.bound else ""
            unlabelled = f", {self._unlabelled:,} without a label" if self._unlabelled else ""
            say(
                console,
                f"ROC-AUC of -log p(x) against the labels{those}: {score.area:.4f}{bound} "
                f"({counted(score.n_anomalous, 'anomaly', 'anomalies')}, {score.n_normal:,} normal{unlabelled})",
                "bold green",
            )
