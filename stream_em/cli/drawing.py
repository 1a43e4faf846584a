"""Pictures of a job, for which another process gets ready while this one is at work."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from stream_em import BatchEM, OnlineEM
from stream_em.cli.common import DataError
from stream_em.cli.outputs import PendingFile
from stream_em.sources import Chunk, Source

# With modules from where this process found its own, and from nowhere else.
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from stream_em.cli.drawing_process import main; main()"

Plot = Literal["plot_run", "plot_learner"]

# Seconds that the other process may take for a picture once there is nothing else to do.
LONGEST_WAIT = 60.0


def load_plots() -> Any:
    """Return the module that draws, or say what it needs."""
    if find_spec("matplotlib") is None:
        raise DataError("a picture needs matplotlib: pip install 'stream-em[plots]', or set output.picture=null")
    from stream_em import plots

    return plots


class Illustrator:
    """Draws pictures of learners.

    To load Matplotlib takes longer than to draw. Who knows that a picture will be wanted later says so by `prepare`:
    another process loads it meanwhile, and draws. Without it, or if anything befalls it, this process does both.
    """

    def __init__(self) -> None:
        self._other: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        other, self._other = self._other, None
        if other is not None:
            with other:
                other.kill()

    def prepare(self, chunk: Chunk, source: Source) -> None:
        """Get ready for a picture, if a chunk is not the only one of its source, and the source has an end."""
        only = not chunk.before["index"] and source.least_events <= chunk.after["index"]
        if only or source.live or self._other is not None or os.cpu_count() == 1 or sys.platform == "win32":
            return
        command = [sys.executable, "-P", "-c", _PROGRAM, *sys.path]
        # Where no other can be started, this process does without.
        with suppress(OSError):
            # Ctrl-C is for this process, which decides whether there is still something to draw.
            self._other = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def draw(self, path: Path, plot: Plot, learner: OnlineEM | BatchEM, *more: Any) -> None:
        """Write a picture, see `drawing`."""
        with self.drawing(path, plot, learner, *more):
            pass

    @contextmanager
    def drawing(self, path: Path, plot: Plot, learner: OnlineEM | BatchEM, *more: Any) -> Iterator[None]:
        """Write a picture while the block runs; it is there after it, unless the block or drawing fails.

        Parameters
        ----------
        path
            Where to.
        plot
            The function of `stream_em.plots` that draws it.
        learner, more
            Its arguments up to the path.

        """
        try:
            self._tell((path.suffix, plot, learner, *more))
            yield
            picture = self._answer()
        finally:
            self._stop()
        file = PendingFile(path)
        try:
            if picture is None:
                getattr(load_plots(), plot)(learner, *more, file.pending)
            else:
                file.pending.write_bytes(picture)
            file.publish()
        finally:
            file.discard()

    def _tell(self, order: tuple[Any, ...]) -> None:
        if self._other is not None and self._other.stdin is not None:
            # To read the answer would flush it once more, and it is closed by then.
            orders, self._other.stdin = self._other.stdin, None
            # It may be gone; nothing about a picture keeps the rest of a job from being written.
            with suppress(Exception), orders:
                pickle.dump(order, orders)

    def _answer(self) -> bytes | None:
        if self._other is None:
            return None
        try:
            told, _ = self._other.communicate(timeout=LONGEST_WAIT)
            picture: bytes | None = pickle.loads(told)
        except Exception:
            # It is gone or does nothing, or something else wrote there: what is read may be anything.
            return None
        return picture
