"""Which files a source has, in what order, and whether they are still what they were when a position was taken."""

from __future__ import annotations

import glob
import gzip
import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Self

from stream_em.sources.faults import ChangedSourceError, SourceError, nearest, reading
from stream_em.sources.pieces import Position

FORMATS = ("parquet", "csv", "jsonl")
# What it is called by those who call the library, and by those who run a job.
_KEY = "format (in a job: source.format)"
_SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}

# Bytes by which a file is told from another of its name; a whole file would have to be read.
_LONGEST_START = 1 << 16


def files_after(paths: Sequence[str], after: Position, *, may_grow: bool = True) -> Iterator[tuple[str, Position]]:
    """Yield the files that are not read to their end, each with what a position in it begins with.

    That names the file, and tells it and those before it from others of the same names.

    Raises
    ------
    ChangedSourceError
        When the files are not those that were read up to the position.

    """
    wanted = after.get("file")
    read = hashlib.blake2b(digest_size=16)
    for path in paths:
        with reading(path):
            size = _size(path)
            place: Position = {"file": path, "earlier": read.hexdigest(), "size": size, "start": _start_of(path, size)}
        if path == wanted and place["earlier"] == after["earlier"]:
            _check_unchanged(path, place, after, may_grow)
            wanted = None
        if wanted is None:
            yield path, place
        with reading(path):
            read.update(f"{path!r} {_size(path)} ".encode())
    if wanted is not None:
        raise ChangedSourceError(
            f"{wanted}: events were read up to a place in this file, but now it is not among the files of the source, "
            "or those before it are not what they were; put them back, or start anew"
        )


def _size(path: str) -> int | None:
    """Bytes of a file; None for a pipe, which has no size."""
    return Path(path).stat().st_size if Path(path).is_file() else None


def _start_of(path: str, size: int | None) -> str:
    """Digest of the first bytes of a file, of no more than `size` of them; none of a pipe, where they would be gone."""
    if not size:
        return ""
    with Path(path).open("rb") as stream:
        return hashlib.blake2b(stream.read(min(size, _LONGEST_START)), digest_size=16).hexdigest()


def _check_unchanged(path: str, place: Position, after: Position, may_grow: bool) -> None:
    then, now = after["size"], place["size"]
    if then is None or now is None:
        same = then == now
    else:
        same = (now >= then if may_grow else now == then) and _start_of(path, then) == after["start"]
    if not same:
        raise ChangedSourceError(
            f"{path}: has changed since events were read up to a place in it; put it back as it was, or start anew"
        )


def find_files(
    given: Sequence[str | Path],
    format: str,  # noqa: A002
    leave_out: Collection[str | Path],
) -> tuple[list[str], list[str]]:
    """Return the files that paths, folders and patterns stand for, and those of them that are left out.

    Raises
    ------
    SourceError
        When one of them stands for nothing.

    """
    paths: list[str] = []
    left_out: list[str] = []

    def kept(found: list[str]) -> list[str]:
        apart = [name for name in found if any(same_file(name, other) for other in leave_out)]
        left_out.extend(apart)
        return [name for name in found if name not in apart]

    for item in given:
        path = Path(item).expanduser()
        if path.is_dir():
            found = sorted(
                str(inner)
                for inner in path.rglob("*")
                if inner.is_file()
                and not any(part.startswith((".", "_")) for part in inner.relative_to(path).parts)
                and (format_of_name(inner) == format if format != "auto" else format_of_name(inner))
            )
            found = kept(found)
            if not found:
                other = " but those left out" if left_out else ""
                raise SourceError(f"{item}: the folder holds no {_wanted(format)} files{other}")
            keyed = [inner for inner in found if "=" in str(Path(inner).relative_to(path).parent)]
            if keyed:
                raise SourceError(
                    f"{item}: is partitioned by columns that are only in the folder names ({keyed[0]}); "
                    "name the files with a glob pattern to read them without those columns"
                )
            paths.extend(found)
        elif path.is_file():
            paths.append(str(path))
        elif any(sign in str(item) for sign in "*?["):
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - absolute patterns too
            found = kept(sorted(name for name in matches if Path(name).is_file()))
            if not found:
                other = " but those left out" if left_out else ""
                raise SourceError(f"{item}: no file matches the pattern{other}")
            paths.extend(found)
        elif path.exists():
            # A named pipe or a process substitution of the shell.
            paths.append(str(path))
        else:
            near = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
            raise SourceError(f"{item}: no such file or folder{nearest(str(path), near)}")
    if not paths:
        raise SourceError("the list of paths is empty")
    return paths, left_out


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two names lead to one file that is there, whatever links are on the way."""
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def format_of_name(path: str | Path) -> str | None:
    """Return the format that a name ends in, or None."""
    name = Path(path)
    return _SUFFIXES.get(Path(name.stem).suffix if name.suffix == ".gz" else name.suffix)


def format_of(paths: list[str]) -> str:
    """Return the one format that the names of all files end in.

    Raises
    ------
    SourceError
        When a name tells no format, or names tell several.

    """
    formats = {path: format_of_name(path) for path in paths}
    for path, kind in formats.items():
        if kind is None:
            raise SourceError(
                f"{path}: the format cannot be told from the name; set {_KEY} to one of {', '.join(FORMATS)}"
            )
    kinds = {kind for kind in formats.values() if kind is not None}
    if len(kinds) > 1:
        raise SourceError(f"the files have different formats ({', '.join(sorted(kinds))}); set {_KEY} to one of them")
    return kinds.pop()


def _wanted(format: str) -> str:  # noqa: A002
    return "Parquet, CSV or JSON Lines" if format == "auto" else format


def open_binary(path: str) -> IO[bytes]:
    """Open a file as bytes, decompressed where its name ends in .gz."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return Path(path).open("rb")


class ByteStream:
    """A stream of bytes, of which a position holds how many were read.

    Where that is not a file (with a `place`, as `files_after` has it) but standard input or a pipe, it holds their
    digest as well: they come again only if whoever wrote them does it again.
    """

    def __init__(self, stream: IO[bytes], name: str, place: Position | None = None) -> None:
        self.name = name
        self.readline = stream.readline
        self._stream = stream
        self._place = place or {}
        self._offset = 0
        self._digest = None if self._place.get("size") is not None else hashlib.blake2b(digest_size=16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._place:
            self._stream.close()

    def __iter__(self) -> Iterator[bytes]:
        # `readline` and not the stream's own iterator: lines are handed on as they come.
        return iter(self.readline, b"")

    def taken(self, raw: bytes) -> Position:
        """Count bytes that were read, and return what a position after them begins with."""
        self._offset += len(raw)
        place = {**self._place, "offset": self._offset}
        if self._digest is None:
            return place
        self._digest.update(raw)
        return {**place, "digest": self._digest.hexdigest()}

    def skip(self, after: Position) -> None:
        """Go on after the bytes before a position.

        Raises
        ------
        ChangedSourceError
            When they are not those that were read up to it.

        """
        offset = after.get("offset", 0)
        if self._digest is None:
            self._stream.seek(offset)
            self._offset = offset
            return
        while (left := offset - self._offset) and (raw := self._stream.read(min(left, 1 << 20))):
            self.taken(raw)
        if offset and self.taken(b"")["digest"] != after["digest"]:
            raise ChangedSourceError(
                f"{self.name}: does not begin with the {offset:,} bytes that were read before; send the same stream "
                "again from its start, or start anew"
            )
