"""The threads of BLAS, which compiled code does without."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import LibController

# OpenBLAS shares a product of matrices out to threads where it takes more multiplications than this: 65,536 times its
# GEMM_MULTITHREAD_THRESHOLD.
MOST_UNSHARED_PRODUCTS = 262_144


@lru_cache(maxsize=1)
def _libraries() -> list[LibController]:
    # Compiled code multiplies by SciPy's library, which must be there to be found.
    import scipy.linalg.cython_blas  # noqa: F401
    from threadpoolctl import ThreadpoolController

    libraries: list[LibController] = ThreadpoolController().select(user_api="blas").lib_controllers
    return libraries


def _set_threads(library: LibController, n_threads: int) -> None:
    library.set_num_threads(n_threads)
    # The thread that limits OpenBLAS first is the only one that threadpoolctl heeds, until it says that it is done.
    release = getattr(library, "clear_controlling_thread", None)
    if release is not None:
        release()


class _OneBlasThread:
    """The limit is one of the whole process: the first of those who are at work lowers it, the last restores it.

    Where threadpoolctl lets another thread of the program decide, the limit is as that one has set it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._before: list[tuple[LibController, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._n_users += 1
            if self._n_users > 1:
                return
            try:
                self._before = []
                # A controller's own limit() describes every library anew, which takes as long as thousands of events.
                for library in _libraries():
                    n_threads = library.num_threads
                    if n_threads > 1:
                        _set_threads(library, 1)
                        if library.num_threads == 1:
                            self._before.append((library, n_threads))
            except BaseException:
                self._leave()
                raise

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._leave()

    def _leave(self) -> None:
        self._n_users -= 1
        if not self._n_users:
            for library, n_threads in self._before:
                _set_threads(library, n_threads)

    def forget_users(self) -> None:
        """Leave for all who were at work when this process was forked, and are not in it."""
        self._lock = threading.Lock()
        if self._n_users:
            self._n_users = 1
            self._leave()


one_blas_thread = _OneBlasThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_blas_thread.forget_users)
