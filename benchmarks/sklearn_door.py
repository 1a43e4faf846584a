"""The scikit-learn door against scikit-learn: fits, predictions, one pass over a stream, starts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.mixture
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from benchmarks.measure import Table, in_turn, verdict
from stream_em.sklearn import GaussianMixture

Size = tuple[int, int]

SIZES: tuple[Size, ...] = ((4, 5), (8, 8), (16, 16), (32, 32))
N_SAMPLES = 200_000
FIT_TARGET = 5.0
MEMORY_TARGET = 0.5
PREDICTION_TARGET = 4.0
BATCH_SIZE = 1_000
N_SEEDS = 5


def data(n_features: int, n_components: int, n_samples: int, seed: int = 0) -> np.ndarray:
    """Samples (N, D) of overlapping correlated clusters; the clusters are the same whatever the seed."""
    shape = np.random.default_rng(n_features)
    centers = 2.0 * shape.normal(size=(n_components, n_features))
    mixing = np.eye(n_features) + 0.3 * shape.normal(size=(n_components, n_features, n_features)) / n_features**0.5
    generator = np.random.default_rng(seed)
    labels = generator.integers(n_components, size=n_samples)
    samples = generator.normal(size=(n_samples, n_features))
    for label in range(n_components):
        chosen = labels == label
        samples[chosen] = samples[chosen] @ mixing[label] + centers[label]
    return samples


def from_a_start(samples: np.ndarray, n_components: int) -> dict[str, Any]:
    """Parameters of a fit from randomly chosen samples, the same for both libraries."""
    chosen = np.random.default_rng(1).choice(len(samples), n_components, replace=False)
    return {
        "n_components": n_components,
        "weights_init": np.full(n_components, 1.0 / n_components),
        "means_init": samples[chosen],
        "precisions_init": np.repeat(np.diag(1.0 / samples.var(axis=0))[None], n_components, axis=0),
        "max_iter": 200,
    }


# The data is read into place, so that what the process has reached before the fit is what it holds.
PEAK = """
import sys, warnings
from pathlib import Path
import numpy as np, sklearn.mixture
from stream_em.sklearn import GaussianMixture
from benchmarks.sklearn_door import from_a_start
def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
library, path, n_components = sys.argv[1:]
samples = np.load(path)
options = {**from_a_start(samples, int(n_components)), "max_iter": 3}
mixture = (GaussianMixture if library == "ours" else sklearn.mixture.GaussianMixture)(**options)
warnings.simplefilter("ignore")
# The libraries' own buffers belong to neither fit.
mixture.fit(samples[:1_000])
before = status("VmRSS")
mixture.fit(samples)
print(before, status("VmHWM"))
"""


def peak(library: str, path: Path, n_components: int) -> tuple[float, float]:
    """Peak memory in MB of a process that fits, and how much of it came with the fit."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, library, str(path), str(n_components)], capture_output=True, text=True, check=True
    )
    before, highest = map(float, done.stdout.split())
    return highest, highest - before


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fits(sizes: Sequence[Size], n_samples: int, repeats: int) -> Table:
    rows = []
    totals = np.zeros(2)
    for n_features, n_components in sizes:
        samples = data(n_features, n_components, n_samples)
        options = from_a_start(samples, n_components)
        mixtures = GaussianMixture(**options), sklearn.mixture.GaussianMixture(**options)
        taken = [[seconds(partial(mixture.fit, samples)) for mixture in mixtures] for _ in range(repeats)]
        mine, theirs = np.median(taken, axis=0)
        totals += mine, theirs
        found, expected = mixtures
        assert found.n_iter_ == expected.n_iter_
        assert abs(found.lower_bound_ - expected.lower_bound_) <= 1e-8 * abs(expected.lower_bound_)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.npy"
            np.save(path, samples)
            (whole, added), (their_whole, their_added) = (
                peak(library, path, n_components) for library in ("ours", "theirs")
            )
        share = added / their_added
        rows.append(
            (
                str(n_features),
                str(n_components),
                str(found.n_iter_),
                f"{theirs:.2f}",
                f"{mine:.2f}",
                f"{theirs / mine:.1f}×",
                f"{their_added:.0f} of {their_whole:.0f}",
                f"{added:.0f} of {whole:.0f}",
                f"{share:.2f}×",
                verdict(share, MEMORY_TARGET, at_most=True),
            )
        )
        print("  ", *rows[-1], flush=True)
    mine, theirs = totals
    faster = theirs / mine
    rows.append(
        ("all", "", "", f"{theirs:.2f}", f"{mine:.2f}", f"{faster:.1f}×", "", "", "", verdict(faster, FIT_TARGET))
    )
    return Table(
        "fit against scikit-learn",
        f"`fit` of both libraries on {n_samples:,} samples from the same start (samples chosen at random, full "
        "covariances) with the same tolerance, one thread, in turn; the numbers of iterations are equal and the lower "
        "bounds agree to 1e-8, or the run fails. Memory is that of a process of its own which makes three iterations: "
        "what the fit added to what was there, data and libraries, of the peak of the process. The target is for what "
        "was added.",
        (
            *("D", "K", "iterations", "scikit-learn, s", "stream_em, s", "faster"),
            *("scikit-learn, MB", "stream_em, MB", "memory", "target"),
        ),
        rows,
    )


def predictions(sizes: Sequence[Size], n_samples: int, repeats: int) -> Table:
    rows = []
    for n_features, n_components in sizes:
        samples = data(n_features, n_components, n_samples)
        theirs = sklearn.mixture.GaussianMixture(**{**from_a_start(samples, n_components), "max_iter": 5})
        theirs.fit(samples[:20_000])
        ours = GaussianMixture.from_sklearn(theirs)
        np.testing.assert_allclose(ours.score_samples(samples), theirs.score_samples(samples), rtol=1e-8)
        for verb in ("predict_proba", "score_samples"):
            works = [partial(getattr(mixture, verb), samples) for mixture in (ours, theirs)]
            mine, other = in_turn(*works, repeats=repeats)
            rows.append(
                (
                    str(n_features),
                    str(n_components),
                    verb,
                    f"{other / n_samples * 1e9:,.0f}",
                    f"{mine / n_samples * 1e9:,.0f}",
                    f"{other / mine:.1f}×",
                    verdict(other / mine, PREDICTION_TARGET),
                )
            )
            print("  ", *rows[-1], flush=True)
    return Table(
        "Predictions against scikit-learn",
        f"The same fitted mixture, {n_samples:,} samples, one thread, in turn; log-likelihoods agree to 1e-8 or the "
        "run fails. Medians of ns per sample.",
        ("D", "K", "method", "scikit-learn", "stream_em", "faster", "target"),
        rows,
    )


def stream(mixture: Any, samples: np.ndarray) -> Any:
    for start in range(0, len(samples), BATCH_SIZE):
        mixture.partial_fit(samples[start : start + BATCH_SIZE])
    return mixture


def as_mixture(clusters: MiniBatchKMeans, samples: np.ndarray, n_components: int) -> GaussianMixture:
    """The mixture whose components are the clusters: shares, means and covariances of the samples in each."""
    labels = clusters.predict(samples)
    mixture = GaussianMixture(n_components)
    mixture.weights_ = np.bincount(labels, minlength=n_components) / len(samples)
    members = [samples[labels == label] for label in range(n_components)]
    mixture.means_ = np.array([one.mean(axis=0) for one in members])
    floor = 1e-6 * np.eye(samples.shape[1])
    mixture.covariances_ = np.array([np.cov(one.T, bias=True) + floor for one in members])
    return mixture


def one_pass(sizes: Sequence[Size], n_samples: int) -> Table:
    rows = []
    for n_features, n_components in sizes:
        samples = data(n_features, n_components, n_samples)
        held_out = data(n_features, n_components, n_samples // 4, seed=1)
        candidates: dict[str, Callable[[], Any]] = {
            "stream_em partial_fit": partial(stream, GaussianMixture(n_components, random_state=0), samples),
            "stream_em fit": partial(GaussianMixture(n_components, random_state=0).fit, samples),
            "scikit-learn fit": partial(sklearn.mixture.GaussianMixture(n_components, random_state=0).fit, samples),
            "MiniBatchKMeans partial_fit": partial(
                stream, MiniBatchKMeans(n_components, random_state=0, batch_size=BATCH_SIZE, n_init=3), samples
            ),
        }
        for name, work in candidates.items():
            start = time.perf_counter()
            fitted = work()
            taken = time.perf_counter() - start
            if isinstance(fitted, MiniBatchKMeans):
                fitted = as_mixture(fitted, samples, n_components)
            rows.append((str(n_features), str(n_components), name, f"{taken:.2f}", f"{fitted.score(held_out):.3f}"))
            print("  ", *rows[-1], flush=True)
    return Table(
        "One pass over a stream",
        f"One pass of `partial_fit` in batches of {BATCH_SIZE:,} over {n_samples:,} samples, against full fits and "
        "against k-means over the same batches, each from its own start (seed 0), one thread. The log-likelihood is "
        "the mean over held-out samples of the same clusters; for k-means that of the mixture whose components have "
        "the shares, means and covariances of its clusters, which takes another pass that is not timed.",
        ("D", "K", "method", "s", "held-out log-likelihood"),
        rows,
    )


def stretched(n_clusters: int, n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters in a row, stretched across it, turned at random; and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(n_clusters, size=n_samples)
    row = 4.0 * labels + 0.6 * generator.normal(size=n_samples)
    samples = np.column_stack([100.0 * generator.normal(size=n_samples), row])
    return samples @ np.linalg.qr(generator.normal(size=(2, 2)))[0], labels


def blobs(n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The blobs of scikit-learn's k-means example, one axis stretched thirtyfold; and the labels."""
    samples, labels = make_blobs(n_samples=n_samples, random_state=170 + seed)
    return samples @ np.array([[1.0, 0.0], [0.0, 30.0]]), labels


def starts(n_samples: int) -> Table:
    cases: dict[str, tuple[int, Callable[[int], tuple[np.ndarray, np.ndarray]]]] = {
        f"{n_clusters} clusters in a row": (
            n_clusters,
            lambda seed, n_clusters=n_clusters: stretched(n_clusters, n_samples, seed),
        )
        for n_clusters in (2, 3, 5)
    }
    cases["3 stretched blobs"] = 3, lambda seed: blobs(n_samples, seed)
    rows = []
    for name, (n_clusters, draw) in cases.items():
        agreement: dict[type, list[float]] = {sklearn.mixture.GaussianMixture: [], GaussianMixture: []}
        for seed in range(N_SEEDS):
            samples, labels = draw(seed)
            for mixture, found in agreement.items():
                found.append(adjusted_rand_score(labels, mixture(n_clusters, random_state=seed).fit_predict(samples)))
        rows.append((name, *(f"{np.median(found):.2f} ({min(found):.2f})" for found in agreement.values())))
        print("  ", *rows[-1], flush=True)
    return Table(
        "Starts on stretched clusters",
        f"Adjusted Rand index of `fit_predict` with default parameters on {n_samples:,} samples: clusters that lie in "
        "a row and are stretched a hundredfold across it, turned at random; and the blobs of scikit-learn's k-means "
        f"example with one axis stretched. Median of {N_SEEDS} seeds, and the worst.",
        ("data", "scikit-learn", "stream_em"),
        rows,
    )


def run(sizes: Sequence[Size] = SIZES, n_samples: int = N_SAMPLES, repeats: int = 3) -> list[Table]:
    """Measure everything; smaller arguments are for trying it out."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [
            fits(sizes, n_samples, repeats),
            predictions(sizes, n_samples, 2 * repeats + 1),
            one_pass(sizes, n_samples),
            starts(min(n_samples, 1_500)),
        ]
