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


class BlockKernel:
    """Learns mini-batches of Gaussian factors.

    Parameters
    ----------
    kernel
        Whose state is updated; `has_compiled_blocks` says whether there is a compiled form.

    """

    def __init__(self, kernel: EventKernel) -> None:
        self._kernel = kernel
        self._table = feature_table((factor.positions, factor.kind == compiled.FULL) for factor in kernel.factors)
        self._center = np.empty(len(kernel.schema))
        self._pooled_means = [
            (factor.positions, kernel.array(index, compiled.POOLED_MEAN)) for index, factor in enumerate(kernel.factors)
        ]
        self._step = compiled_blocks.compiled_step_block(general=kernel.general is not None)

    def learn(self, batch: Batch, *, keep: bool) -> tuple[Array, npt.NDArray[np.int64], Array] | None:
        """Learn from a mini-batch; return what was thought of its events before.

        Parameters
        ----------
        batch
            At least one event, encoded with the kernel's schema, nothing missing.
        keep
            Whether components and responsibilities are wanted; they are left empty otherwise.

        Returns
        -------
        log_prob, component, responsibilities
            Shapes (B,), (B,) and (B, K); None when nothing was learned, because the numbers ask for more care.

        """
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
            kernel.general,
        )
        if math.isnan(log_likelihood):
            return None
        if log_likelihood == math.inf:
            kernel.repair(batch.n_events if batch.weight is None else int(np.count_nonzero(batch.weight)))
        return log_prob, kernel.component_ids[winners], responsibilities.T
