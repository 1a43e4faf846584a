"""The River door beside River's own clusterers and detectors, on synthetic streams and River's bundled data."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from river import anomaly, base, cluster, datasets, preprocessing
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, roc_auc_score

from benchmarks.measure import Table, in_turn, verdict
from stream_em.river import MixtureAnomalyDetector, MixtureClusterer

Event = dict[str, Any]

LEARN_TARGETS = {(4, 5): 4.5, (8, 8): 7.5, (16, 16): 11.0}
MIXED_TARGET = 300_000
WARM_START_TARGET, COLD_START_TARGET = 0.7, 6.0
STEADY_TARGET = 1.05
N_TIMED = 50_000
N_LONG = 10_000_000
N_QUALITY = 10_000
N_SEEDS = 5


def clusters(n_fields: int, n_components: int, n_events: int) -> list[Event]:
    """Dicts of numbers around random centers."""
    rng = np.random.default_rng(n_fields)
    centers = 3.0 * rng.normal(size=(n_components, n_fields))
    values = centers[rng.integers(n_components, size=n_events)] + rng.normal(size=(n_events, n_fields))
    names = [f"x{field}" for field in range(n_fields)]
    return [dict(zip(names, row)) for row in values.tolist()]


def mixed(n_events: int) -> list[Event]:
    """Dicts of three numbers, two categories of ten, and a count."""
    rng = np.random.default_rng(0)
    far = rng.integers(5, size=n_events)
    numbers = 3.0 * far[:, None] + rng.normal(size=(n_events, 3))
    labels = np.array([f"label {label}" for label in range(10)])[
        (far[:, None] + rng.integers(4, size=(n_events, 2))) % 10
    ]
    counts = rng.poisson(1.0 + 2.0 * far)
    return [
        {"a": a, "b": b, "c": c, "shop": shop, "country": country, "items": items}
        for (a, b, c), (shop, country), items in zip(numbers.tolist(), labels.tolist(), counts.tolist())
    ]


def through(method: Callable[[Event], object], events: list[Event]) -> Callable[[], None]:
    def work() -> None:
        for event in events:
            method(event)

    return work


def _speed() -> list[Table]:
    rows = []
    for (n_fields, n_components), target in LEARN_TARGETS.items():
        events = clusters(n_fields, n_components, N_TIMED)
        clusterer = MixtureClusterer(n_components=n_components, seed=0)
        detector = MixtureAnomalyDetector(n_components=n_components, seed=0)
        peer = cluster.KMeans(n_components, seed=0)
        works = [
            through(method, events)
            for method in (clusterer.learn_one, detector.score_one, clusterer.predict_one, peer.learn_one)
        ]
        through(detector.learn_one, events[:5_000])()
        learn, score, predict, theirs = (len(events) / seconds for seconds in in_turn(*works))
        rows.append(
            (
                str(n_fields),
                str(n_components),
                *(f"{rate:,.0f}" for rate in (theirs, learn, score, predict)),
                f"{learn / theirs:.1f}×",
                verdict(learn / theirs, target),
                verdict(min(score, predict) / learn, 1.0),
            )
        )
        print("  ", *rows[-1], flush=True)
    events = mixed(N_TIMED)
    model = MixtureClusterer(kinds={"items": "count"}, seed=0)
    (seconds,) = in_turn(through(model.learn_one, events))
    rate = len(events) / seconds
    mixed_row = (f"{rate:,.0f}", verdict(rate / MIXED_TARGET, 1.0))
    print("  ", *mixed_row, flush=True)
    return [
        Table(
            "River: events per second, one dict at a time",
            "`learn_one`, `score_one` and `predict_one` of mixtures with full covariances beside the `learn_one` of "
            f"`river.cluster.KMeans` with as many clusters, on {N_TIMED:,} dicts of D numbers around K centers; one "
            "core, in turn, medians. The last column is the slower of score and predict against learn.",
            ("D", "K", "KMeans", "learn_one", "score_one", "predict_one", "faster", "target", "score, predict"),
            rows,
        ),
        Table(
            "River: mixed events",
            "`learn_one` of 3 numbers, 2 categories of 10 and a count; K=5. Events/s, and the target of "
            f"{MIXED_TARGET:,} as a ratio.",
            ("events/s", "target"),
            [mixed_row],
        ),
    ]


START = """
import time
import numpy, pyarrow, numba
imported = time.perf_counter()
from stream_em.river import MixtureClusterer
model = MixtureClusterer(n_components=2, warm_up=20, seed=0)
for index in range(25):
    model.learn_one({"x": float(index % 7), "y": float(index % 5)})
assert model._kernel is not None
print(time.perf_counter() - imported)
"""


def _start() -> list[Table]:
    rows = []
    with TemporaryDirectory() as folder:
        for name, target in (("not cached", COLD_START_TARGET), ("cached", WARM_START_TARGET)):
            taken = []
            for run_number in range(5):
                cache = Path(folder) / ("kept" if name == "cached" else str(run_number))
                environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
                for _ in range(1 if name == "not cached" or taken else 2):
                    command = [sys.executable, "-c", START]
                    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                taken.append(float(done.stdout))
            seconds = statistics.median(taken)
            rows.append((name, f"{seconds:.2f}", verdict(seconds, target, at_most=True).replace("×", " s")))
            print("  ", *rows[-1], flush=True)
    return [
        Table(
            "River: from process start to the first event in compiled code",
            "Seconds beyond importing NumPy, PyArrow and Numba until an event was learned by compiled code, River's "
            "own import and a warm-up of 20 events included; medians of 5 processes.",
            ("compiled code", "seconds", "target"),
            rows,
        )
    ]


def _steady() -> list[Table]:
    events = clusters(4, 5, 10_000)
    young, old = (through(MixtureClusterer(n_components=5, seed=0).learn_one, events) for _ in range(2))
    young()
    old()
    before = _resident_bytes()
    for _ in range(N_LONG // len(events)):
        old()
    after = _resident_bytes()
    # Side by side, for a shared machine is not as fast now as it was ten million events ago.
    early, late = in_turn(young, old)
    row = (
        f"{N_LONG:,}",
        f"{early / len(events) * 1e9:,.0f}",
        f"{late / len(events) * 1e9:,.0f}",
        verdict(late / early, STEADY_TARGET, at_most=True),
        f"{(after - before) / 2**20:+.1f}",
    )
    print("  ", *row, flush=True)
    return [
        Table(
            "River: a long stream",
            "ns per `learn_one` (D=4, K=5) of a clusterer that has just seen 10,000 events and of one that has seen "
            "all, in turn, and by how much the memory of the process grew meanwhile.",
            ("events", "ns after 10,000", "ns after all", "target", "MB"),
            [row],
        )
    ]


def _resident_bytes() -> int:
    (pages,) = Path("/proc/self/statm").read_text().split()[1:2]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def streams() -> Iterator[tuple[str, list[tuple[Event, Any]], int]]:
    """River's bundled data sets with labels, and the number of classes."""
    for name in ("ImageSegments", "Phishing", "Shuttle"):
        labelled = list(getattr(datasets, name)().take(N_QUALITY))
        yield name, labelled, len({label for _, label in labelled})


def _clusterers(n_classes: int) -> dict[str, Callable[[int], base.Clusterer]]:
    return {
        "stream_em, full": lambda seed: MixtureClusterer(n_classes, seed=seed),
        "stream_em, diag": lambda seed: MixtureClusterer(n_classes, covariance_type="diag", seed=seed),
        "stream_em, spherical": lambda seed: MixtureClusterer(n_classes, covariance_type="spherical", seed=seed),
        "River KMeans": lambda seed: cluster.KMeans(n_classes, seed=seed),
        "River STREAMKMeans": lambda seed: cluster.STREAMKMeans(n_clusters=n_classes, seed=seed),
        "River CluStream": lambda seed: cluster.CluStream(n_macro_clusters=n_classes, seed=seed),
        "River DBSTREAM": lambda seed: cluster.DBSTREAM(),
        "River DenStream": lambda seed: cluster.DenStream(),
    }


def _clustering() -> list[Table]:
    rows = []
    for name, labelled, n_classes in streams():
        scaler = preprocessing.StandardScaler()
        scaled = []
        for event, _ in labelled:
            scaler.learn_one(event)
            scaled.append(scaler.transform_one(event))
        truth = [label for _, label in labelled]
        for label, make in _clusterers(n_classes).items():
            ari, nmi, rates = [], [], []
            for seed in range(N_SEEDS):
                model = make(seed)
                start = time.perf_counter()
                for event in scaled:
                    model.learn_one(event)
                rates.append(len(scaled) / (time.perf_counter() - start))
                found = [model.predict_one(event) for event in scaled]
                ari.append(adjusted_rand_score(truth, found))
                nmi.append(normalized_mutual_info_score(truth, found))
                if label in ("River DBSTREAM", "River DenStream"):
                    break
            rows.append((name, label, _spread(ari), _spread(nmi), f"{statistics.median(rates):,.0f}"))
            print("  ", *rows[-1], flush=True)
    return [
        Table(
            "River: clusterers on the bundled data",
            f"One pass over the first {N_QUALITY:,} events behind `StandardScaler`, then every event predicted; as "
            "many clusters as classes, everything else by default. Median (least to most) over "
            f"{N_SEEDS} seeds; DBSTREAM and DenStream have none. Classes are no clusters: this says how far a "
            "clusterer finds these labels, no more.",
            ("data", "clusterer", "ARI", "NMI", "learn_one/s"),
            rows,
        )
    ]


def _detectors() -> dict[str, Callable[[int], Any]]:
    scaled = preprocessing.StandardScaler, preprocessing.MinMaxScaler
    return {
        "stream_em": lambda seed: MixtureAnomalyDetector(seed=seed),
        "stream_em, prior_weight=0.01": lambda seed: MixtureAnomalyDetector(prior_weight=0.01, seed=seed),
        "stream_em, prior_weight=100": lambda seed: MixtureAnomalyDetector(prior_weight=100.0, seed=seed),
        "stream_em, calibrated": lambda seed: MixtureAnomalyDetector(calibration_window=1_000, seed=seed),
        "River HalfSpaceTrees, MinMaxScaler": lambda seed: scaled[1]() | anomaly.HalfSpaceTrees(seed=seed),
        "River LODA, StandardScaler": lambda seed: scaled[0]() | anomaly.LODA(seed=seed),
        "River OneClassSVM, StandardScaler": lambda seed: scaled[0]() | anomaly.OneClassSVM(),
        "River GaussianScorer, worst feature": lambda seed: _GaussianScorers(),
    }


class _GaussianScorers:
    """A `GaussianScorer`, which scores a single number, for each feature; the highest score counts."""

    def __init__(self) -> None:
        self._scorers: dict[str, anomaly.GaussianScorer] = {}

    def score_one(self, event: Event) -> float:
        return max(self._of(name).score_one(None, value) for name, value in event.items())

    def learn_one(self, event: Event) -> None:
        for name, value in event.items():
            self._of(name).learn_one(None, value)

    def _of(self, name: str) -> anomaly.GaussianScorer:
        return self._scorers.setdefault(name, anomaly.GaussianScorer())


def _detection() -> list[Table]:
    labelled = list(datasets.Shuttle().take(N_QUALITY))
    truth = [bool(label) for _, label in labelled]
    rows = []
    for name, make in _detectors().items():
        areas, rates = [], []
        for seed in range(N_SEEDS):
            model = make(seed)
            scores = []
            start = time.perf_counter()
            for event, _ in labelled:
                scores.append(model.score_one(event))
                model.learn_one(event)
            rates.append(len(labelled) / (time.perf_counter() - start))
            areas.append(roc_auc_score(truth[1_000:], scores[1_000:]))
            if name.startswith(("River OneClassSVM", "River GaussianScorer")):
                break
        rows.append((name, _spread(areas), f"{statistics.median(rates):,.0f}"))
        print("  ", *rows[-1], flush=True)
    return [
        Table(
            "River: detectors on the Shuttle stream",
            f"Score, then learn, on the first {N_QUALITY:,} readings; ROC-AUC after the first 1,000. Median (least to "
            f"most) over {N_SEEDS} seeds; OneClassSVM and GaussianScorer have none. The default of prior_weight was "
            "chosen with an eye on this stream.",
            ("detector", "ROC-AUC", "score and learn/s"),
            rows,
        )
    ]


def _spread(figures: list[float]) -> str:
    middle = f"{statistics.median(figures):.3f}"
    return middle if len(figures) == 1 else f"{middle} ({min(figures):.3f} to {max(figures):.3f})"


def run() -> list[Table]:
    """Measure speed, start and a long stream."""
    return [*_speed(), *_start(), *_steady()]


def run_on_data() -> list[Table]:
    """Measure what is found in River's bundled data."""
    return [*_clustering(), *_detection()]
