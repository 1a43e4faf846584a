"""The other process of an `Illustrator`, which gets ready to draw, and draws what it is told to."""

from __future__ import annotations

import gc
import pickle
import signal
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

# Seconds that it waits. A job that takes longer does not miss what it saves.
PATIENCE = 60


def main() -> None:
    """Draw the picture that standard input asks for, onto standard output; the exit code says whether all is there."""
    # That ends the process.
    signal.alarm(PATIENCE)
    from matplotlib.figure import Figure

    from stream_em import plots

    # Whatever is loaded only for a first picture, fonts above all.
    first = Figure()
    first.add_subplot(title="first").plot([0.0, 1.0])
    first.savefig(BytesIO())
    try:
        suffix, plot, *arguments = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        # Whoever might have asked is gone.
        sys.exit(1)
    signal.alarm(0)
    with TemporaryDirectory() as folder:
        picture = Path(folder, f"picture{suffix}")
        try:
            getattr(plots, plot)(*arguments, picture)
        except Exception:
            # Whoever asked draws it, too, and says what is wrong.
            sys.exit(1)
        sys.stdout.buffer.write(picture.read_bytes())
    # On its way out Python need not look for what can be collected.
    gc.freeze()
