"""Mini-batches through compiled code, on the packed state of an `EventKernel`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stream_em import compiled, compiled_blocks
from stream_em.families.base import feature_table
from stream_em.numerics import Array

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
        self._ids_are_positions = np.array_equal(kernel.component_ids, np.arange(len(kernel.component_ids)))

    def learn(
        self, values: Array, weight: Array | None = None, *, keep: bool
    ) -> tuple[Array, npt.NDArray[np.int64], Array] | None:
        """Learn from a mini-batch; return what was thought of its events before.

        Parameters
        ----------
        values
            (D, B) at least one event, encoded with the kernel's schema, nothing missing.
        weight
            (B,), or None when all count alike.
        keep
            Whether components and responsibilities are wanted; they are left empty otherwise.

        Returns
        -------
        log_prob, component, responsibilities
            Shapes (B,), (B,) and (B, K); None when nothing was learned, because the numbers ask for more care.

        """
        kernel, n_events = self._kernel, values.shape[1]
        n_kept = n_events if keep else 0
        log_prob, winners = np.empty(n_events), np.empty(n_kept, dtype=np.int64)
        responsibilities = np.empty((kernel.model.n_components, n_kept))
        for positions, mean in self._pooled_means:
            self._center[positions] = mean
        log_likelihood = self._step(
            kernel.vector,
            *self._table,
            self._center,
            np.ascontiguousarray(values),
            NO_WEIGHT if weight is None else np.ascontiguousarray(weight),
            log_prob,
            responsibilities,
            winners,
            kernel.general,
        )
        if math.isnan(log_likelihood):
            return None
        if log_likelihood == math.inf:
            kernel.repair(n_events if weight is None else int(np.count_nonzero(weight)))
        component = winners if self._ids_are_positions else kernel.component_ids[winners]
        return log_prob, component, responsibilities.T
