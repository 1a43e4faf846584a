"""Mini-batches through compiled code, on packed state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stream_em import compiled, compiled_blocks
from stream_em.blas import OneBlasThread
from stream_em.families.base import feature_table
from stream_em.models import Mixture
from stream_em.numerics import Array
from stream_em.schema import Schema

NO_WEIGHT: Array = np.empty(0)


class PackedFactor(Protocol):
    """A factor of the family: its kind, and its fields."""

    @property
    def kind(self) -> int:
        """Its kind, a constant of `compiled`."""

    @property
    def positions(self) -> npt.NDArray[np.intp]:
        """Positions of its fields in the schema."""


class PackedState(Protocol):
    """What a learner has learned, packed into one vector, as `EventKernel` holds it."""

    model: Mixture
    schema: Schema
    vector: Array
    general: float | None
    component_ids: npt.NDArray[np.int64]

    @property
    def factors(self) -> Sequence[PackedFactor]:
        """The factors in the order in which they are computed."""

    def array(self, index: int, slot: int) -> Array:
        """Return a part of the vector that belongs to a factor."""

    @property
    def winner(self) -> int:
        """Id of the most responsible component of the event scored last."""

    @property
    def responsibilities(self) -> list[float]:
        """Responsibilities of the event scored last."""

    def learn_values(self, values: Array, weight: float) -> float | None:
        """Learn from one encoded event; return log p(event), None where nothing was learned."""

    def repair(self, n_events: int) -> None:
        """Take the M-step in NumPy after compiled code could not."""


class BlockKernel:
    """Learns mini-batches of Gaussian factors.

    Parameters
    ----------
    state
        What is updated; `has_compiled_blocks` says whether there is a compiled form.

    """

    def __init__(self, state: PackedState) -> None:
        self._state = state
        self._table = feature_table((factor.positions, factor.kind == compiled.FULL) for factor in state.factors)
        self._step = compiled_blocks.compiled_step_block(general=state.general is not None)
        self._shared_from = compiled_blocks.shared_from(state.model.n_components * self._table.shape[1])
        self._n_answers = state.model.n_components + 2
        self._ids_are_positions = np.array_equal(state.component_ids, np.arange(len(state.component_ids)))
        self._no_answers: Array = np.empty((self._n_answers, 0))
        self._nothing_told = self._told(self._no_answers)

    def learn(
        self, values: Array, weight: Array | None = None, *, keep: bool
    ) -> tuple[Array, npt.NDArray[np.int64], Array] | None:
        """Learn from a mini-batch; return what was thought of its events before.

        Parameters
        ----------
        values
            (D, B) at least one event, encoded with its schema, in any layout. Of a block with a value that is missing
            or out of the range of numbers nothing is learned.
        weight
            (B,), or None when all count alike.
        keep
            Whether that is wanted.

        Returns
        -------
        log_prob, component, responsibilities
            Shapes (B,), (B,) and (B, K), B = 0 without `keep`; None when nothing was learned, because the numbers ask
            for more care.

        """
        # Compiled code takes the bits as they are.
        values = np.asarray(values, np.float64)
        weight = None if weight is None else np.ascontiguousarray(weight, np.float64)
        state, n_events = self._state, values.shape[1]
        if n_events == 1:
            # It has no spread that its offset from the pooled mean could be told from.
            return self._learn_single(values[:, 0], 1.0 if weight is None else float(weight[0]), keep=keep)
        answers = np.empty((self._n_answers, n_events)) if keep else self._no_answers
        given = state.vector, self._table, values, NO_WEIGHT if weight is None else weight, answers, state.general
        if n_events < self._shared_from:
            log_likelihood = self._step(*given)
        else:
            with OneBlasThread():
                log_likelihood = self._step(*given)
        if math.isnan(log_likelihood):
            return None
        if log_likelihood == math.inf:
            state.repair(n_events if weight is None else int(np.count_nonzero(weight)))
        return self._told(answers) if keep else self._nothing_told

    def _told(self, answers: Array) -> tuple[Array, npt.NDArray[np.int64], Array]:
        # Copies: who keeps one of these should not have to keep the responsibilities.
        winners = answers[-1].view(np.int64)
        component = winners.copy() if self._ids_are_positions else self._state.component_ids[winners]
        return answers[-2].copy(), component, answers[:-2].T

    def _learn_single(
        self, values: Array, weight: float, *, keep: bool
    ) -> tuple[Array, npt.NDArray[np.int64], Array] | None:
        state = self._state
        log_prob = state.learn_values(values, weight)
        if log_prob is None:
            return None
        if not keep:
            return self._nothing_told
        return np.array([log_prob]), np.array([state.winner], np.int64), np.array([state.responsibilities])
