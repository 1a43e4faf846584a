"""The threads of BLAS, which do more harm than good for all but large matrices."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import LibController

# OpenBLAS shares a product of matrices out to threads where it takes more multiplications than this: 65,536 times its
# GEMM_MULTITHREAD_THRESHOLD.
MOST_UNSHARED_PRODUCTS = 262_144

# Up to here its threads save NumPy nothing worth mentioning, and take as much of a processor again while they wait.
NOT_WORTH_SHARING = 8_000_000


def _libraries() -> list[LibController]:
    # Compiled code, and who uses it loads that first, multiplies by SciPy's library; NumPy has its own.
    return _libraries_with("scipy.linalg.cython_blas" in sys.modules)


@lru_cache(maxsize=2)
def _libraries_with(scipy: bool) -> list[LibController]:
    from threadpoolctl import ThreadpoolController

    libraries: list[LibController] = ThreadpoolController().select(user_api="blas").lib_controllers
    return libraries


_lock = threading.Lock()
# Weakly, so that who is interrupted before leaving, by Ctrl-C say, is not waited for.
_users: weakref.WeakSet[OneBlasThread] = weakref.WeakSet()
_before: dict[LibController, int] = {}


class OneBlasThread:
    """A context in which BLAS multiplies by one thread.

    The limit is one of the whole process: who comes to work lowers it, the last to leave restores it. One that the
    program sets by threadpoolctl in another thread meanwhile may outlive both.
    """

    def __enter__(self) -> None:
        with _lock:
            _users.add(self)
            _lower()

    def __exit__(self, *error: object) -> None:
        with _lock:
            _users.discard(self)
            if not _users:
                _restore()


def _lower() -> None:
    # A controller's own limit() describes every library anew, which takes as long as thousands of events.
    for library in _libraries():
        n_threads = library.num_threads
        if n_threads > 1:
            earlier = _before.get(library)
            _before[library] = n_threads
            _set_threads(library, 1)
            if library.num_threads > 1:
                # Another thread of the program decides.
                del _before[library]
                if earlier is not None:
                    _before[library] = earlier


def _restore() -> None:
    # One by one, so that what an interrupt leaves is restored by the next who leave.
    while _before:
        library, n_threads = next(iter(_before.items()))
        _set_threads(library, n_threads)
        del _before[library]


def _set_threads(library: LibController, n_threads: int) -> None:
    library.set_num_threads(n_threads)
    # The thread that limits OpenBLAS first is the only one that threadpoolctl heeds, until it says that it is done.
    release = getattr(library, "clear_controlling_thread", None)
    if release is not None:
        release()


def _forget_users() -> None:
    """Leave for all who were at work when this process was forked, and are not in it."""
    global _lock
    _lock = threading.Lock()
    _users.clear()
    _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_users)
