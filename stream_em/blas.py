"""The threads of BLAS, which an E-step of ours does without."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import LibController

# OpenBLAS multiplies matrices with no more products than this by one thread.
MOST_UNTHREADED_PRODUCTS = 262_144


@lru_cache(maxsize=1)
def _libraries() -> list[LibController]:
    # Compiled code multiplies by SciPy's library, which must be there to be found.
    import scipy.linalg.cython_blas  # noqa: F401
    from threadpoolctl import ThreadpoolController

    libraries: list[LibController] = ThreadpoolController().select(user_api="blas").lib_controllers
    return libraries


class _OneBlasThread:
    """The limit is one of the whole process: the first of those who are at work lowers it, the last restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._before: list[tuple[LibController, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_users:
                # A controller's own limit() describes every library anew, which takes as long as thousands of events.
                counts = ((library, library.num_threads) for library in _libraries())
                self._before = [(library, n_threads) for library, n_threads in counts if n_threads > 1]
                for library, _ in self._before:
                    library.set_num_threads(1)
            self._n_users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_users -= 1
            if not self._n_users:
                for library, n_threads in self._before:
                    library.set_num_threads(n_threads)


one_blas_thread = _OneBlasThread()
