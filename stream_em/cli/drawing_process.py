"""The other process of an `Illustrator`, which gets ready to draw, and draws what it is told to."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

# Seconds that it waits. A job that takes longer does not miss what it saves.
PATIENCE = 60


def main() -> None:
    """Draw the picture that standard input asks for, and write its bytes to standard output, or None: both pickled."""
    # That ends the process.
    signal.alarm(PATIENCE)
    picture = None
    # Whoever asked draws what fails, or gives a warning, too, and says what is wrong.
    warnings.simplefilter("error", UserWarning)
    with suppress(Exception):
        picture = _asked_for()
    try:
        pickle.dump(picture, sys.stdout.buffer)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever asked is gone, and Python must not try again on its way out.
        os._exit(1)


def _asked_for() -> bytes:
    from matplotlib.figure import Figure

    from stream_em import plots

    # Whatever is loaded only for a first picture, fonts above all.
    first = Figure()
    first.add_subplot(title="first").plot([0.0, 1.0])
    first.savefig(BytesIO())
    suffix, plot, *arguments = pickle.load(sys.stdin.buffer)
    signal.alarm(0)
    with TemporaryDirectory() as folder:
        path = Path(folder, f"picture{suffix}")
        getattr(plots, plot)(*arguments, path)
        return path.read_bytes()
