"""Coders that put statistics and learners on the wire as Arrow."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
import pyarrow as pa

from stream_em.learners import BatchEM, OnlineEM
from stream_em.statistics import Statistics
from stream_em.store import Learner, from_bytes, to_bytes

# What Arrow's schema, metadata and padding take beside the arrays: at all, and for each of them.
_HEADER_BYTES, _BYTES_PER_ARRAY = 850, 75
# What a snapshot takes beside its parameters and statistics.
_SNAPSHOT_BYTES = 3_500


class StatisticsCoder(beam.coders.Coder):
    """Statistics, or None for those of no event at all, as an Arrow IPC stream.

    >>> import numpy as np
    >>> from stream_em.statistics import Sums
    >>> coder = StatisticsCoder()
    >>> statistics = Statistics({"components": Sums(np.ones(2))}, -2.0, np.arange(2))
    >>> coder.decode(coder.encode(statistics)).weights, coder.decode(coder.encode(None))
    (array([1., 1.]), None)

    """

    def encode(self, value: Statistics | None) -> bytes:  # noqa: D102 - Beam's
        if value is None:
            return b""
        rows = value.to_arrow()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_batch(rows)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    def decode(self, encoded: bytes) -> Statistics | None:  # noqa: D102 - Beam's
        if not encoded:
            return None
        with pa.ipc.open_stream(encoded) as reader:
            return Statistics.from_arrow(reader.read_next_batch())

    def is_deterministic(self) -> bool:  # noqa: D102 - Beam's
        return True

    def estimate_size(self, value: Statistics | None) -> int:  # noqa: D102 - Beam's
        if value is None:
            return 0
        n_arrays = 1 + sum(len(part.arrays()) for part in value.parts.values())
        return value.n_bytes + _HEADER_BYTES + _BYTES_PER_ARRAY * n_arrays

    def to_type_hint(self) -> Any:  # noqa: D102 - Beam's
        return Statistics


class LearnerCoder(beam.coders.Coder):
    """A learner, `OnlineEM` or `BatchEM`, as the bytes of its snapshot; never pickle.

    >>> import numpy as np
    >>> from stream_em import BatchEM, Gaussian, Mixture
    >>> fitted = BatchEM(Mixture(Gaussian(), 1)).fit(np.array([[1.0], [3.0]]))
    >>> coder = LearnerCoder()
    >>> coder.decode(coder.encode(fitted)).parameters.components.mean
    array([[2.]])

    """

    def encode(self, value: Learner) -> bytes:  # noqa: D102 - Beam's
        return to_bytes(value)

    def decode(self, encoded: bytes) -> Learner:  # noqa: D102 - Beam's
        return from_bytes(encoded)

    def is_deterministic(self) -> bool:  # noqa: D102 - Beam's
        return True

    def estimate_size(self, value: Learner) -> int:  # noqa: D102 - Beam's
        # Statistics and parameters are of about the same size.
        return _SNAPSHOT_BYTES + 2 * (0 if value.statistics is None else value.statistics.n_bytes)


beam.coders.registry.register_coder(Statistics, StatisticsCoder)
for _kind in (OnlineEM, BatchEM):
    beam.coders.registry.register_coder(_kind, LearnerCoder)
