"""JSON Lines, files and streams, as pieces of a stream of events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from stream_em.columns import Roles
from stream_em.sources.faults import SourceError, guarded, reading
from stream_em.sources.files import ByteStream, files_after, open_binary
from stream_em.sources.pieces import Piece, Position, Read, Rejection, gathered, grouped

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonLines:
    """Files, or a stream that is handed on line by line as it comes."""

    columnar = False
    least_events = 0

    def __init__(self, name: str, paths: list[str], stream: ByteStream | None = None) -> None:
        self.name = name
        self.paths: Sequence[str] = paths
        self.stream = stream
        self.restartable = stream is None
        self.live = stream is not None

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:  # noqa: D102 - as Reader's
        index, line = after.get("from", 0), after.get("line", 0)
        for stream in self._streams(after):
            with stream:
                begin = {**stream.taken(b""), "from": index, "line": line}
                for group in grouped(self._events(stream, index, line), rows, index):
                    index, line = group[-1].at + 1, group[-1].line
                    end = {**stream.taken(b"".join(one.raw for one in group)), "from": index, "line": line}
                    yield gathered(stream.name, group, end, begin)
                    begin = end
            line = 0

    def _streams(self, after: Position) -> Iterator[ByteStream]:
        if self.stream is not None:
            self.stream.skip(after)
            yield self.stream
            return
        for path, place in files_after(self.paths, after):
            with reading(path, "JSON Lines"):
                stream = ByteStream(open_binary(path), path, place)
                if after:
                    # Only the first of them is begun.
                    stream.skip(after)
                    after = {}
            yield stream

    def _events(self, stream: ByteStream, index: int, number: int) -> Iterator[Read]:
        raw: list[bytes] = []
        for line in guarded(iter(stream), stream.name, "JSON Lines"):
            number += 1
            raw.append(line)
            if not line.strip():
                continue
            if index == 0 and line.lstrip().startswith(b"["):
                raise SourceError(
                    f"{stream.name}: begins with '[', so it is a JSON array; JSON Lines holds one object on each line"
                )
            yield Read(index, number, parse_event(line, index, stream.name, number), b"".join(raw))
            raw.clear()
            index += 1


def parse_event(line: bytes, index: int, path: str, number: int | None = None) -> dict[str, Any] | Rejection:
    """The object on a JSON line, or why it is no event."""
    reason = ""
    event: Any = None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        # Its line and column are those in this line, and the line has another number in its file.
        problem = error.msg if isinstance(error, json.JSONDecodeError) else error
        reason = f"expected a JSON object, but it does not parse: {problem}"
    else:
        if not isinstance(event, dict):
            reason = f"expected a JSON object, got {type(event).__name__}"
    if reason:
        text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
        return Rejection(index, path, number, None, None, reason, text)
    if _ESCAPED_SURROGATE.search(line):
        for name, value in event.items():
            if not _is_unicode(name) or not _is_unicode(value):
                reason = "expected Unicode text, but it holds half a character (an unpaired surrogate)"
                return Rejection(index, path, number, name, value, reason, event)
    return cast("dict[str, Any]", event)


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
