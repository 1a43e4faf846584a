"""What is wrong with a source as a whole, told by the path it has."""

from __future__ import annotations

import csv
import difflib
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

from stream_em.columns import Roles

# Longest event of a CSV file. Arrow parses block by block, and an event must fit into one; without an end, a
# quote left open would take the rest of the file into memory.
LONGEST_CSV_EVENT = 1 << 20
OPEN_QUOTE = "a quote may have been left open"

Item = TypeVar("Item")


class SourceError(ValueError):
    """A source that cannot be read as a whole: absent, empty, truncated, or with the wrong columns."""


class ChangedSourceError(SourceError):
    """A source that is no longer what it was when a position in it was taken."""


@contextmanager
def reading(path: str, what: str | None = None) -> Iterator[None]:
    """Turn whatever reading raises into a `SourceError` that names the path."""
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        # How Arrow, for files, and the parser of live streams say it.
        for sign, most in (("straddling object", LONGEST_CSV_EVENT), ("field limit", csv.field_size_limit())):
            if sign in str(error):
                raise SourceError(
                    f"{path}: an event is longer than {most:,} bytes, which is the most here; {OPEN_QUOTE} "
                    "(quote='' says that quotes are ordinary characters)"
                ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"read as {what}, it may be truncated or damaged" if what else "loaded"
        raise SourceError(f"{path}: cannot be {problem} ({first})") from error


def guarded(items: Iterator[Item], path: str, what: str | None = None) -> Iterator[Item]:
    """The same items; what reading one of them raises becomes a `SourceError`."""
    while True:
        with reading(path, what):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def nearest(name: str, names: Collection[str]) -> str:
    """Ask whether a name was meant that looks like this one; nothing where none does."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def missing_column(path: str, name: str, names: Sequence[str]) -> str:
    """Say that a column is not there, and which are."""
    return f"{path}: has no column {name!r}{nearest(name, names)} (it has: {', '.join(names)})"


def check_columns(path: str, names: Sequence[str], roles: Roles) -> None:
    """Refuse columns of one name, roles of columns that are not there, and a model without any.

    Raises
    ------
    SourceError
        When there is such a column or role.

    """
    for name in names:
        if list(names).count(name) > 1:
            raise SourceError(f"{path}: has more than one column called {name!r}; rename all but one")
    for name in roles.named() + list(roles.only or ()) + list(roles.kinds):
        if name not in names:
            raise SourceError(missing_column(path, name, names))
    if not roles.model_fields(names):
        raise SourceError(f"{path}: no column is left for the model (it has: {', '.join(names)})")


def different_columns(path: str, names: Collection[str], expected: Collection[str], first: str) -> str:
    """Say how the columns of a file differ from those of the first."""
    lacking = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    parts = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"also has {', '.join(extra)}"] * bool(extra)
    return f"{path}: its columns differ from those of {first}: it {' and '.join(parts)}"
