"""Parquet in segments: whatever they are cut into, and whoever was killed between them, readers find one plain file."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_em.cli.segments import SegmentedParquet

N_ROWS = 1_000
GENERATOR = np.random.default_rng(0)
TABLE = pa.table(
    {
        "number": GENERATOR.normal(size=N_ROWS),
        "text": pa.array([f"word {i % 50}" if i % 7 else None for i in range(N_ROWS)]),
        "flag": GENERATOR.random(N_ROWS) < 0.5,
        "time": pa.array(range(N_ROWS), pa.timestamp("us", "Europe/Berlin")),
        "word": pa.array([f"w{i % 3}" for i in range(N_ROWS)]).dictionary_encode(),
        "list": pa.array([[float(i)] * (i % 4) for i in range(N_ROWS)]),
        "record": pa.array([{"a": i, "b": None if i % 5 else "b"} for i in range(N_ROWS)]),
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("segments")


def write(path, cuts, killed_after=()):
    """Write the table in segments that end at these rows; after some of them another writer goes on."""
    path.unlink(missing_ok=True)
    parquet = SegmentedParquet(path, TABLE.schema)
    start = 0
    for number, stop in enumerate([*sorted(cuts), N_ROWS]):
        if number in killed_after:
            # It has begun another segment, of which nobody knows.
            parquet.write(TABLE.slice(0, 400), 100)
            parquet.abandon()
            os.truncate(path, parquet.ends[-1] if parquet.ends else 0)
            parquet = SegmentedParquet(path, TABLE.schema, parquet.ends)
        if start < stop:
            parquet.write(TABLE.slice(start, stop - start), 300)
        parquet.end_segment()
        start = stop
    parquet.finish()
    return path


CUTS = st.lists(st.integers(0, N_ROWS), max_size=6)


@given(cuts=CUTS)
def test_readers_find_one_table(folder, cuts):
    path = write(folder / "cut.parquet", cuts)
    assert pq.read_table(path).equals(TABLE)
    file = pq.ParquetFile(path)
    assert file.metadata.num_rows == N_ROWS
    assert file.schema_arrow.equals(TABLE.schema)
    first = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows = TABLE.slice(first, group.num_rows)
        assert file.read_row_group(number).equals(rows)
        statistics = group.column(0).statistics
        assert statistics.min == min(rows["number"].to_pylist())
        assert statistics.max == max(rows["number"].to_pylist())
        first += group.num_rows
    for name in TABLE.column_names:
        assert pq.read_table(path, columns=[name])[name].equals(TABLE[name])
    assert pq.read_table(path, filters=[("number", ">", 1.0)]).num_rows == sum(TABLE["number"].to_numpy() > 1.0)


@given(cuts=CUTS, killed_after=st.sets(st.integers(0, 6)))
def test_a_writer_that_was_killed_leaves_no_trace(folder, cuts, killed_after):
    whole, gone_on = write(folder / "whole.parquet", cuts), write(folder / "gone_on.parquet", cuts, killed_after)
    assert gone_on.read_bytes() == whole.read_bytes()


def test_one_segment_is_the_file_that_arrow_writes(folder):
    path = write(folder / "one.parquet", [])
    repeating = [field.name for field in TABLE.schema if not pa.types.is_floating(field.type)]
    pq.write_table(TABLE, folder / "arrow.parquet", row_group_size=300, use_dictionary=repeating)
    assert path.read_bytes() == (folder / "arrow.parquet").read_bytes()


def test_another_reader_finds_the_same(folder):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(write(folder / "cut.parquet", [1, 500, 730]), use_pyarrow=False)
    assert frame["number"].to_list() == TABLE["number"].to_pylist()
    assert frame["record"].to_list() == TABLE["record"].to_pylist()
    lazy = polars.scan_parquet(folder / "cut.parquet").filter(polars.col("number") > 1.0).select("text").collect()
    assert lazy["text"].to_list() == TABLE.filter(pa.compute.greater(TABLE["number"], 1.0))["text"].to_pylist()


@pytest.mark.parametrize("step", ["write", "end_segment", "finish"])
def test_what_kept_rows_from_being_written_is_raised_by_every_later_call(folder, step):
    parquet = SegmentedParquet(folder / "other.parquet", TABLE.schema)
    parquet.write(TABLE.select(["number"]), 300)
    calls = {"write": lambda: parquet.write(TABLE, 300), "end_segment": parquet.end_segment, "finish": parquet.finish}
    for _ in range(2):
        with pytest.raises(ValueError, match="schema does not match"):
            calls[step]()
    assert not parquet.ends
    parquet.abandon()
