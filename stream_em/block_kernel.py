"""Mini-batches through compiled code, on the packed state of an `EventKernel`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stream_em import compiled, compiled_blocks
from stream_em.families.base import feature_table
from stream_em.numerics import Array
from stream_em.schema import Batch

if TYPE_CHECKING:
    from stream_em.event_kernel import EventKernel

NO_WEIGHT: Array = np.empty(0)

# From here on the matrix products are all that counts, and the families' own linear algebra is as fast.
MOST_FIELDS = 40


class BlockKernel:
    """Learns mini-batches of Gaussian factors, as long as nothing is missing.

    Parameters
    ----------
    kernel
        Whose state is updated.

    """

    def __init__(self, kernel: EventKernel) -> None:
        self._kernel = kernel
        plain = (compiled.DIAGONAL, compiled.SPHERICAL, compiled.FULL)
        sizes = [(factor.kind, len(factor.positions)) for factor in kernel.factors]
        self._takes_blocks = (
            all(kind in plain and size <= MOST_FIELDS for kind, size in sizes) and kernel.model.assignment == "soft"
        )
        if not self._takes_blocks:
            return
        left, right = feature_table(
            [(factor.positions, kind == compiled.FULL) for factor, (kind, _) in zip(kernel.factors, sizes)]
        )
        self._table = left, right
        self._center = np.empty(len(kernel.schema))
        self._pooled_means = [
            (factor.positions, kernel.array(index, compiled.POOLED_MEAN)) for index, factor in enumerate(kernel.factors)
        ]
        self._step = compiled_blocks.compiled_step_block()

    def learn(self, batch: Batch, *, keep: bool) -> tuple[Array, npt.NDArray[np.int64], Array] | None:
        """Learn from a mini-batch; return what was thought of its events before.

        Parameters
        ----------
        batch
            Events encoded with the kernel's schema.
        keep
            Whether components and responsibilities are wanted; they are left empty otherwise.

        Returns
        -------
        log_prob, component, responsibilities
            Shapes (B,), (B,) and (B, K); None when nothing was learned, because a value is missing, there is no
            compiled form, or the numbers ask for more care.

        """
        if not self._takes_blocks or batch.n_events == 0 or batch.observed is not None:
            return None
        kernel, n_kept = self._kernel, batch.n_events if keep else 0
        log_prob, winners = np.empty(batch.n_events), np.empty(n_kept, dtype=np.int64)
        responsibilities = np.empty((kernel.model.n_components, n_kept))
        for positions, mean in self._pooled_means:
            self._center[positions] = mean
        log_likelihood = self._step(
            kernel.vector,
            *self._table,
            self._center,
            np.ascontiguousarray(batch.values),
            NO_WEIGHT if batch.weight is None else np.ascontiguousarray(batch.weight),
            log_prob,
            responsibilities,
            winners,
        )
        if math.isnan(log_likelihood):
            return None
        if log_likelihood == math.inf:
            kernel.repair(batch.total_weight, batch.n_events)
        return log_prob, kernel.component_ids[winners], responsibilities.T
