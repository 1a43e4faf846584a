"""Positions: reading that goes on from one gives what an undisturbed reading gives from there."""

import contextlib
import gzip
import io
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_em.sources import SourceError, open_source

N_EVENTS = 230


def lines_of(n, offset=0):
    """JSON lines, some of them blank or no events."""
    lines = []
    for i in range(offset, offset + n):
        lines.append("" if i % 23 == 5 else "  ")
        lines.append("{" if i % 17 == 3 else json.dumps({"x": i / 2, "c": "ab"[i % 2]}))
    return "".join(f"{line}\n" for line in lines)


def rows_of(n, offset=0):
    """Rows of a CSV file, some of them with a bad cell or too few."""
    rows = [f'{i / 2},"{"ab"[i % 2]}\n"' for i in range(offset, offset + n)]
    for i in range(n):
        if (i + offset) % 17 == 3:
            rows[i] = "bad,a"
        if (i + offset) % 29 == 7:
            rows[i] = "1"
    return "".join(f"{row}\n" for row in rows)


def write_files(folder, kind):
    """Three files of one source, the second with a single event."""
    for number, (start, n) in enumerate([(0, 100), (100, 1), (101, N_EVENTS - 101)]):
        path = folder / f"{number}.{kind}"
        if kind == "parquet":
            index = np.arange(start, start + n)
            table = pa.table({"x": index / 2, "c": np.array(["a", "b"])[index % 2]})
            pq.write_table(table, path, row_group_size=7)
        elif kind == "csv":
            path.write_text("x,c\n" + rows_of(n, start))
        elif kind == "jsonl":
            path.write_text(lines_of(n, start))
        else:
            path.write_bytes(gzip.compress(lines_of(n, start).encode()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for kind in ("parquet", "csv", "jsonl", "jsonl.gz"):
        folders[kind] = tmp_path_factory.mktemp("positions")
        write_files(folders[kind], kind)
    return folders


def told(chunk):
    """All that a chunk says, apart from its positions."""
    rows = chunk.rows if isinstance(chunk.rows, list) else chunk.rows.to_pylist()
    lines = None if chunk.line is None else chunk.line.tolist()
    paths = [chunk.path_of(row) for row in range(len(chunk))]
    return rows, chunk.index.tolist(), lines, paths, [str(one) for one in chunk.rejected], chunk.after["index"]


def plain(position):
    """A position as it comes back from a file."""
    return json.loads(json.dumps(position))


KINDS = ["parquet", "csv", "jsonl", "jsonl.gz"]


class TestFiles:
    @given(kind=st.sampled_from(KINDS), rows=st.integers(1, 300), limit=st.none() | st.integers(1, 250), data=st.data())
    def test_reading_goes_on_after_any_chunk(self, folders, kind, rows, limit, data):
        wanted = list(open_source(folders[kind], limit=limit).chunks(rows))
        at = data.draw(st.integers(0, len(wanted) - 1))
        again = list(open_source(folders[kind], limit=limit).chunks(rows, plain(wanted[at].after)))
        assert [told(chunk) for chunk in again] == [told(chunk) for chunk in wanted[at + 1 :]]
        assert [chunk.after for chunk in again] == [chunk.after for chunk in wanted[at + 1 :]]

    @given(kind=st.sampled_from(KINDS), rows=st.integers(1, 300), data=st.data())
    def test_reading_goes_on_before_any_event_and_falls_into_step(self, folders, kind, rows, data):
        wanted = list(open_source(folders[kind]).chunks(rows))
        at = data.draw(st.integers(0, len(wanted) - 1))
        chunk, following = wanted[at], wanted[at + 1 :]
        index = data.draw(st.integers(chunk.before["index"], chunk.after["index"]))
        others = list(open_source(folders[kind]).chunks(rows, plain(chunk.position(index))))
        if index < chunk.after["index"]:
            begun = others.pop(0)
            assert begun.index.tolist() == [i for i in chunk.index.tolist() if i >= index]
            assert [str(one) for one in begun.rejected] == [str(one) for one in chunk.rejected if one.index >= index]
        assert [told(chunk) for chunk in others] == [told(chunk) for chunk in following]

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_chunk_ends_at_a_multiple_whatever_could_not_be_read(self, folders, kind):
        chunks = list(open_source(folders[kind]).chunks(50))
        assert [chunk.after["index"] for chunk in chunks] == [50, 100, 150, 200, N_EVENTS]
        for chunk in chunks:
            indices = sorted([*chunk.index.tolist(), *(one.index for one in chunk.rejected)])
            assert indices == list(range(chunk.before["index"], chunk.after["index"]))

    def test_types_of_csv_columns_are_those_of_the_first_block(self, tmp_path):
        # In the second block, and so from the position on, every other cell is no number.
        cells = ["1.5"] * 300_000 + ["1.5", "many"] * 50_000
        (tmp_path / "a.csv").write_text("x\n" + "\n".join(cells) + "\n")
        wanted = list(open_source(tmp_path / "a.csv").chunks(100_000))
        again = list(open_source(tmp_path / "a.csv").chunks(100_000, plain(wanted[2].after)))
        assert [told(chunk) for chunk in again] == [told(chunk) for chunk in wanted[3:]]
        assert len(again[0].rejected) == 50_000

    @pytest.mark.parametrize("quote", ['"', None])
    @pytest.mark.parametrize("name", ["a.csv", "-"])
    def test_reading_goes_on_around_a_quote_left_open(self, tmp_path, monkeypatch, name, quote):
        rows = [f"{i},a" for i in range(300)]
        rows[50], rows[120], rows[260] = '"50,a', '5",a', '"open,a'
        text = "x,c\n" + "\n".join(rows) + "\n"
        (tmp_path / "a.csv").write_text(text)

        def read(after=None):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
            source = open_source(name if name == "-" else tmp_path / name, format="csv", quote=quote)
            return list(source.chunks(20, after))

        wanted = read()
        n_lines = sum(len(chunk) + len(chunk.rejected) for chunk in wanted)
        # The first swallows the lines up to the next quote.
        assert n_lines == (300 if quote is None else 300 - 70 - 39)
        for at, chunk in enumerate(wanted):
            assert [told(one) for one in read(plain(chunk.after))] == [told(one) for one in wanted[at + 1 :]]

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_a_text_file_may_have_grown(self, tmp_path, kind):
        write_files(tmp_path, kind)
        last = tmp_path / f"2.{kind}"
        whole = last.read_bytes()
        cut = whole[: whole[: len(whole) // 2].rindex(b"\n") + 1]
        if kind == "csv":
            # Not within a value that has a line break.
            cut = whole[: whole[: len(whole) // 2].rindex(b'"\n') + 2]
        last.write_bytes(cut)
        *_, chunk = open_source(tmp_path).chunks(30)
        last.write_bytes(whole)
        wanted = [i for chunk in open_source(tmp_path).chunks(30) for i in chunk.index.tolist()]
        again = [i for one in open_source(tmp_path).chunks(30, plain(chunk.after)) for i in one.index.tolist()]
        assert again == [i for i in wanted if i >= chunk.after["index"]]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("change", ["shorter", "other", "gone", "earlier", "added"])
    def test_other_files_are_refused(self, tmp_path, kind, change):
        write_files(tmp_path, kind)
        chunk = list(open_source(tmp_path).chunks(50))[2]
        assert chunk.after["file"] == str(tmp_path / f"2.{kind}")
        reached = tmp_path / f"2.{kind}"
        if change == "shorter":
            reached.write_bytes((tmp_path / f"1.{kind}").read_bytes())
        elif change == "other":
            content = bytearray(reached.read_bytes())
            content[12] ^= 1
            reached.write_bytes(content)
        elif change == "gone":
            reached.unlink()
        elif change == "earlier":
            (tmp_path / f"0.{kind}").write_bytes((tmp_path / f"1.{kind}").read_bytes())
        else:
            (tmp_path / f"00.{kind}").write_bytes((tmp_path / f"1.{kind}").read_bytes())
        with pytest.raises(
            SourceError, match=rf"{reached}: (has changed since|events were read up to a place in this)"
        ):
            list(open_source(tmp_path).chunks(50, plain(chunk.after)))

    def test_nothing_is_left_at_the_end(self, folders):
        for kind in KINDS:
            *_, chunk = open_source(folders[kind]).chunks(64)
            assert list(open_source(folders[kind]).chunks(64, plain(chunk.after))) == []


def test_river_goes_on_at_the_event():
    pytest.importorskip("river")
    wanted = list(open_source(river="Shuttle", limit=700).chunks(200))
    again = list(open_source(river="Shuttle", limit=700).chunks(200, plain(wanted[1].after)))
    assert [told(chunk) for chunk in again] == [told(chunk) for chunk in wanted[2:]]


class TestStandardInput:
    @pytest.fixture(params=["csv", "jsonl"])
    def content(self, request):
        text = "x,c\n" + rows_of(N_EVENTS) if request.param == "csv" else lines_of(N_EVENTS)
        return text.encode()

    def chunks(self, content, *arguments, interrupt=None):
        """The chunks of standard input, until it ends or is interrupted when so many bytes are read."""

        class Stream(io.BufferedReader):
            def readline(self, *arguments):
                if interrupt is not None and self.tell() >= interrupt:
                    raise KeyboardInterrupt
                return super().readline(*arguments)

        given = Stream(io.BytesIO(content))
        chunks = []
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(sys, "stdin", io.TextIOWrapper(given))
            chunks.extend(open_source("-").chunks(*arguments))
        return chunks

    @pytest.mark.parametrize("rows", [1, 40, 230, 1000])
    def test_the_same_stream_goes_on_after_any_chunk(self, content, rows):
        wanted = self.chunks(content, rows)
        for at, chunk in enumerate(wanted[:: max(1, len(wanted) // 7)]):
            at *= max(1, len(wanted) // 7)
            again = self.chunks(content, rows, plain(chunk.after))
            assert [told(chunk) for chunk in again] == [told(chunk) for chunk in wanted[at + 1 :]]
            assert [chunk.after for chunk in again] == [chunk.after for chunk in wanted[at + 1 :]]

    def test_the_same_stream_goes_on_before_any_event(self, content):
        wanted = self.chunks(content, 40)
        for index in (0, 7, 40, 55, 119, 229):
            again = self.chunks(content, 40, plain(wanted[index // 40].position(index)))
            found = [i for chunk in again for i in chunk.index.tolist()]
            assert found == [i for chunk in wanted for i in chunk.index.tolist() if i >= index]
            assert [told(chunk) for chunk in again[1:]] == [told(chunk) for chunk in wanted[index // 40 + 1 :]]

    def test_another_stream_is_refused(self, content):
        position = plain(self.chunks(content, 40)[1].after)
        for other in (content[1:], content[: position["offset"] - 1], b"", bytes([content[0] ^ 1]) + content[1:]):
            with pytest.raises(SourceError, match="standard input: does not begin with the"):
                self.chunks(other, 40, position)

    def test_what_came_before_an_interrupt_is_handed_out_and_the_next_chunks_fall_into_step(self, content):
        wanted = self.chunks(content, 40)
        for interrupt in range(200, len(content) - 200, 777):
            first = self.chunks(content, 40, interrupt=interrupt)
            again = self.chunks(content, 40, plain(first[-1].after))
            events = [event for chunk in [*first, *again] for event in told(chunk)[0]]
            assert events == [event for chunk in wanted for event in told(chunk)[0]]
            ends = [chunk.after["index"] for chunk in again]
            assert ends == [end for end in (40, 80, 120, 160, 200, N_EVENTS) if end > first[-1].after["index"]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_is_read_again_up_to_the_position(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)

    def chunks(content, *arguments):
        writer = threading.Thread(target=Path.write_bytes, args=(pipe, content))
        writer.start()
        try:
            return list(open_source(pipe).chunks(50, *arguments))
        finally:
            writer.join(timeout=20)

    content = lines_of(N_EVENTS).encode()
    wanted = chunks(content)
    again = chunks(content, plain(wanted[1].after))
    assert [told(chunk) for chunk in again] == [told(chunk) for chunk in wanted[2:]]
    with pytest.raises(SourceError, match="does not begin with"):
        chunks(content[2:], plain(wanted[1].after))
