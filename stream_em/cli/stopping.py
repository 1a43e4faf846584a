"""Ctrl-C and a polite kill, heeded between batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from stream_em.sources import Chunk, Position, Source


def signal_name(by: signal.Signals) -> str:
    """What a person calls a signal."""
    return "Ctrl-C" if by is signal.SIGINT else by.name


class StopRequest:
    """Ctrl-C and a polite kill, heeded between batches.

    A signal is noted. Only while the job waits for a live source does it also raise KeyboardInterrupt, since standard
    input may never say another word. A second signal interrupts whatever goes on.

    Attributes
    ----------
    signal
        The one that came last, or None.

    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether there was a signal."""
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.requested, signal.Signals(number)
        if again or self._waiting:
            raise KeyboardInterrupt

    def until(self, source: Source, rows: int, after: Position | None = None) -> Iterator[Chunk]:
        """Yield the chunks of a source, see there, that come until a stop is requested."""
        chunks = source.chunks(rows, after)
        while not self.requested:
            try:
                self._waiting = source.live
                chunk = next(chunks, None)
            except KeyboardInterrupt:
                if not source.live:
                    raise
                return
            finally:
                self._waiting = False
            if chunk is None:
                return
            yield chunk
