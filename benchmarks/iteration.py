"""One EM iteration against scikit-learn, and an online update against our own batch iteration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from sklearn.mixture import GaussianMixture
from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky
from threadpoolctl import threadpool_limits

from benchmarks.measure import Table, in_turn, verdict
from stream_em import Batch, Gaussian, Mixture, MixtureParameters, OnlineEM, Schema
from stream_em.blas import OneBlasThread
from stream_em.learners.online import COMPILE_AFTER
from stream_em.methods import LOADING_DENSITIES

SIZES = ((2, 3), (4, 5), (8, 8), (16, 16), (32, 32), (64, 16))
TARGETS = {(2, 3): 10.0, (4, 5): 10.0, (8, 8): 8.0, (16, 16): 6.0, (32, 32): 4.0, (64, 16): 1.6}
UPDATE_TARGET = 1.5
# Events in each of the many updates after which compiled code takes over.
SMALL_BATCH = 25
TWO_THREADS_TARGET = 1.6
TWO_THREADS_FROM = 8
# Of many events, where two threads are of use: what one of them does before and after takes half a millisecond. In a
# row, as a fit takes them: a core that has slept while one thread was timed is slow at first. And for longer than the
# moments in which a machine that is shared has but one core to give.
TIMES_AS_MANY, ITERATIONS_IN_A_ROW, TWO_THREADS_SECONDS = 5, 2, 6.0


def data(n_fields: int, n_components: int, n_events: int) -> tuple[np.ndarray, np.ndarray]:
    """Events (N, D) around random centers, and the component (N,) each came from."""
    generator = np.random.default_rng(n_fields)
    centers = 3.0 * generator.normal(size=(n_components, n_fields))
    components = generator.integers(n_components, size=n_events)
    return centers[components] + generator.normal(size=(n_events, n_fields)), components


class Case:
    """The same data and parameters for both libraries."""

    def __init__(self, covariance_type: str, n_fields: int, n_components: int, times: int = 1) -> None:
        n_events = times * (200_000 if n_fields < 32 else 50_000)
        self.events, components = data(n_fields, n_components, n_events)
        self.schema = Schema.infer(self.events)
        self.model = Mixture(Gaussian(covariance_type), n_components, prior_weight=1e-6)
        self.batch = Batch(np.ascontiguousarray(self.events.T), self.schema)
        responsibilities = np.eye(n_components)[components].T
        noise = np.random.default_rng(0).random(responsibilities.shape)
        blurred = 0.8 * responsibilities + 0.2 * noise / noise.sum(axis=0)
        self.parameters: MixtureParameters = self.model.initialize(self.batch, blurred)
        self.peer = GaussianMixture(n_components, covariance_type=covariance_type)
        self.log_likelihood = self.peer_log_likelihood = 0.0

    def ours(self, n_threads: int = 1, compiled: bool = False) -> None:
        statistics = self.model.e_step(self.parameters, self.batch, n_threads=n_threads, compiled=compiled)
        self.model.m_step(statistics)
        self.log_likelihood = statistics.log_likelihood / self.batch.n_events

    def in_a_row(self, n_threads: int = 1, compiled: bool = False) -> None:
        for _ in range(ITERATIONS_IN_A_ROW):
            self.ours(n_threads, compiled)

    def gain_of_two_threads(self, *, compiled: bool = False) -> float:
        # Against one peer at a time: the longer the other core has slept, the slower it is at first.
        one, two = in_turn(
            partial(self.in_a_row, compiled=compiled),
            partial(self.in_a_row, n_threads=2),
            repeats=5,
            at_least=TWO_THREADS_SECONDS,
        )
        return one / two

    def theirs(self) -> None:
        peer, components = self.peer, self.parameters.components
        peer.weights_, peer.means_, peer.covariances_ = self.parameters.weights, components.mean, components.covariance
        peer.precisions_cholesky_ = _compute_precision_cholesky(peer.covariances_, peer.covariance_type)
        self.peer_log_likelihood, log_responsibilities = peer._e_step(self.events)
        peer._m_step(self.events, log_responsibilities)


def with_one_thread(work: Callable[[], None]) -> None:
    """Do a work with BLAS limited to one thread, in a way that takes no time itself."""
    with OneBlasThread():
        work()


def judged(figure: float, target: float | None, *, at_most: bool = False) -> tuple[str, str]:
    """A ratio, and whether it meets its target."""
    return f"{figure:.2f}×", "none" if target is None else verdict(figure, target, at_most=at_most)


def run() -> list[Table]:
    """Measure all sizes for full and diagonal covariances."""
    iterations, threads, updates = [], [], []
    for covariance_type in ("full", "diag"):
        for size in SIZES:
            n_fields, n_components = size
            case = Case(covariance_type, n_fields, n_components)
            n_events = case.batch.n_events
            label = (covariance_type, str(n_fields), str(n_components))
            batch_size = 1000
            pieces = [case.events[start : start + batch_size] for start in range(0, n_events, batch_size)]
            # The first pass, which is not timed, only gathers statistics: a thousand events say too little of 32
            # covariances of 32 fields, and an ill-conditioned start is not what is measured.
            young, settled = (
                OnlineEM(case.model, schema=case.schema, initial_parameters=case.parameters, first_m_step=n_events)
                for _ in range(2)
            )

            def update(learner: OnlineEM, pieces: list[np.ndarray] = pieces) -> None:
                for piece in pieces:
                    learner.update(piece)

            def predict_then_update(learner: OnlineEM, pieces: list[np.ndarray] = pieces) -> None:
                for piece in pieces:
                    learner.predict_then_update(piece)

            update(young)
            update(settled)
            for start in range(0, SMALL_BATCH * COMPILE_AFTER, SMALL_BATCH):
                settled.update(case.events[start % n_events :][:SMALL_BATCH])
            with threadpool_limits(1):
                theirs, numpy, ours, online, scoring, before = in_turn(
                    case.theirs,
                    case.ours,
                    partial(case.ours, compiled=True),
                    partial(update, settled),
                    partial(predict_then_update, settled),
                    partial(update, young),
                    repeats=17 if n_fields < 16 else 9,
                )
                # More rounds would bring it to compiled code, and are not what its column says.
                assert young._known.n_updates < COMPILE_AFTER
                larger = Case(covariance_type, n_fields, n_components, TIMES_AS_MANY)
                gains = larger.gain_of_two_threads(), larger.gain_of_two_threads(compiled=True)
                gain_at_first = case.gain_of_two_threads(compiled=True)
            limited, alone = in_turn(partial(with_one_thread, partial(update, settled)), partial(update, settled))
            assert abs(case.log_likelihood - case.peer_log_likelihood) <= 1e-9 * abs(case.peer_log_likelihood)
            ratio = theirs / ours
            iterations.append(
                (
                    *label,
                    *(f"{seconds / n_events * 1e9:,.0f}" for seconds in (theirs, numpy, ours)),
                    f"{theirs / numpy:.1f}×",
                    f"{ratio:.1f}×",
                    verdict(ratio, TARGETS[size]),
                )
            )
            aim = TWO_THREADS_TARGET if n_fields >= TWO_THREADS_FROM else None
            threads.append((*label, *(cell for gain in gains for cell in judged(gain, aim)), f"{gain_at_first:.2f}×"))
            updates.append(
                (
                    *label,
                    *(f"{seconds / n_events * 1e9:,.0f}" for seconds in (before, online, scoring)),
                    *judged(online / numpy, UPDATE_TARGET, at_most=True),
                    *judged(online / ours, UPDATE_TARGET, at_most=True),
                    f"{scoring / ours:.2f}×",
                    f"{alone / limited:.2f}×",
                )
            )
            print("  ", *iterations[-1], "| 2 threads", *threads[-1][3:], "| update", *updates[-1][3:], flush=True)
    head = ("covariance", "D", "K")
    return [
        Table(
            "One EM iteration against scikit-learn",
            "E-step and M-step of `sklearn.mixture.GaussianMixture` and of `Mixture` on the same events (200,000; "
            "50,000 from D=32) from the same parameters, one thread, in turn. The log-likelihoods agree to 1e-9 "
            "relative, or the run fails. Medians of ns per event. A fit begins in NumPy and goes on in compiled code, "
            f"for which the targets are, after {LOADING_DENSITIES:,} densities (events × components × iterations), "
            "about as long as loading it takes.",
            (*head, "scikit-learn", "NumPy", "compiled", "NumPy faster", "compiled faster", "target"),
            iterations,
        ),
        Table(
            "Two threads against one",
            f"The same iteration on {TIMES_AS_MANY} times as many events, {ITERATIONS_IN_A_ROW} in a row as a fit "
            "takes them, with `n_threads=2`, which runs compiled code from the first iteration on, against one thread "
            "in NumPy, as a fit begins, and in compiled code, as a long one goes on; last, the latter on the events "
            "of the table above, where the half millisecond that is not shared out weighs more.",
            (*head, "than NumPy", "target", "than compiled", "target", "than compiled, on fewer"),
            threads,
        ),
        Table(
            "Online updates against the batch iteration",
            "`OnlineEM.update` with batches of 1,000 rows of a NumPy array, the same events: encoding, E-step, "
            "merge, M-step; and `predict_then_update`, which hands out what its one E-step thought of the events. ns "
            f"per event, in NumPy and in the compiled code that takes over after {COMPILE_AFTER:,} mini-batches; "
            "and the latter's cost against the batch iteration above in NumPy and in compiled code. The target is that "
            "of `update`. Last, what it takes with BLAS left alone, as users run it, of what it takes with one thread.",
            (
                *head,
                "NumPy",
                "update",
                "predict, then update",
                "update of NumPy's",
                "target",
                "update of the compiled",
                "target",
                "predict, then update of the compiled",
                "BLAS left alone",
            ),
            updates,
        ),
    ]
