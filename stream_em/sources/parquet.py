"""Parquet files as pieces of a stream of events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stream_em.columns import Roles
from stream_em.sources.faults import SourceError, check_columns, different_columns, guarded, reading
from stream_em.sources.files import files_after
from stream_em.sources.pieces import Piece, Position, ahead


class ParquetFiles:
    """Files, of which all have the columns of the first."""

    columnar = True
    restartable = True
    live = False

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name = name
        self.paths: Sequence[str] = paths

    @cached_property
    def least_events(self) -> int:
        """The events of the first file: others may come."""
        with _open_parquet(self.paths[0]) as first:
            return int(first.metadata.num_rows)

    def pieces(self, rows: int, roles: Roles, after: Position) -> Iterator[Piece]:  # noqa: D102 - as Reader's
        expected: pa.Schema | None = None
        index = after.get("first", 0)
        for path, place in files_after(self.paths, after, may_grow=False):
            file = _open_parquet(path)
            with file:
                check_columns(path, file.schema_arrow.names, roles)
                columns = None
                if path == self.paths[0]:
                    expected = file.schema_arrow.remove_metadata()
                else:
                    if expected is None:
                        with _open_parquet(self.paths[0]) as first:
                            expected = first.schema_arrow.remove_metadata()
                    columns = _same_columns(path, file.schema_arrow, expected, roles, self.paths[0])
                place = {**place, "first": index}
                groups = list(range(file.num_row_groups))
                while groups and index + file.metadata.row_group(groups[0]).num_rows <= after.get("index", 0):
                    index += file.metadata.row_group(groups.pop(0)).num_rows
                batches = file.iter_batches(batch_size=rows, row_groups=groups, columns=columns) if groups else iter(())
                for batch in guarded(ahead(batches), path, "Parquet"):
                    if columns is not None and not batch.schema.equals(expected):
                        batch = _cast_batch(batch, expected, path, self.paths[0])
                    if batch.num_rows:
                        yield Piece(batch, path, np.arange(index, index + batch.num_rows), place, begin=place)
                        index += batch.num_rows
                # Arrow, reading through a buffer, takes a file that was cut meanwhile for one without further rows.
                if index - place["first"] != file.metadata.num_rows:
                    raise SourceError(
                        f"{path}: was cut while it was read: of the {file.metadata.num_rows:,} events that it states, "
                        f"{index - place['first']:,} are there"
                    )


def _open_parquet(path: str) -> pq.ParquetFile:
    with reading(path, "Parquet"):
        # Not pre-buffered: a reader that fetches whole row groups needs memory in proportion to them.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _same_columns(path: str, schema: pa.Schema, expected: pa.Schema, roles: Roles, first: str) -> list[str]:
    names = [name for name in schema.names if name not in roles.exclude or name in expected.names]
    if set(names) != set(expected.names):
        raise SourceError(different_columns(path, names, expected.names, first))
    return list(expected.names)


def _cast_batch(batch: pa.RecordBatch, expected: pa.Schema, path: str, first: str) -> pa.RecordBatch:
    arrays = []
    for wanted in expected:
        column = batch[wanted.name]
        try:
            arrays.append(column if column.type.equals(wanted.type) else column.cast(wanted.type))
        except pa.ArrowException as error:
            raise SourceError(
                f"{path}: column {wanted.name!r} is {column.type} but {wanted.type} in {first}, and not all "
                f"its values can be converted ({str(error).splitlines()[0]})"
            ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=expected)
