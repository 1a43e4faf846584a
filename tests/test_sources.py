"""Sources: what is read, what is set apart, what is rejected, and what is refused."""

import gzip
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_em.sources import SourceError, open_source

# This checkout, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def table(n, offset=0):
    index = np.arange(offset, offset + n)
    return pa.table(
        {
            "x": index / 2,
            "y": -index.astype(float),
            "country": [("DE", "FR", "IT")[i % 3] for i in index],
            "bad": index % 7 == 0,
        }
    )


def write_csv(path, rows):
    path.write_text("\n".join(rows) + "\n")
    return path


def only(source, rows=65_536):
    chunks = list(source.chunks(rows))
    assert len(chunks) == 1
    return chunks[0]


class TestChunks:
    @pytest.mark.parametrize("rows", [1, 7, 10, 33, 100, 1000])
    def test_parquet_chunks_have_the_asked_size_whatever_the_files_and_row_groups(self, tmp_path, rows):
        for number, (start, n) in enumerate([(0, 10), (10, 1), (11, 70), (81, 19)]):
            pq.write_table(table(n, start), tmp_path / f"{number}.parquet", row_group_size=6)
        chunks = list(open_source(tmp_path, label="bad").chunks(rows))
        sizes = [len(chunk) for chunk in chunks]
        assert sizes == [rows] * (100 // rows) + [100 % rows] * (100 % rows > 0)
        assert np.concatenate([chunk.index for chunk in chunks]).tolist() == list(range(100))
        assert pa.concat_tables([chunk.rows for chunk in chunks]).equals(table(100))

    def test_every_format_yields_the_same_events(self, tmp_path):
        wanted = table(50)
        pq.write_table(wanted, tmp_path / "a.parquet")
        pa.csv.write_csv(wanted, tmp_path / "a.csv")
        (tmp_path / "a.tsv").write_text((tmp_path / "a.csv").read_text().replace(",", "\t"))
        lines = "".join(json.dumps(event) + "\n" for event in wanted.to_pylist())
        (tmp_path / "a.jsonl").write_text(lines)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz"):
            chunk = only(open_source(tmp_path / name, label="bad"))
            events = chunk.events if isinstance(chunk.events, list) else chunk.events.to_pylist()
            assert events == wanted.drop_columns("bad").to_pylist(), name
            assert chunk.label.to_pylist() == wanted["bad"].to_pylist(), name

    def test_the_first_parquet_file_says_how_many_events_there_are_at_least(self, tmp_path):
        for name, n in [("a", 30), ("b", 500)]:
            pq.write_table(table(n), tmp_path / f"{name}.parquet")
        pa.csv.write_csv(table(30), tmp_path / "c.csv")
        assert open_source(tmp_path / "*.parquet").least_events == 30
        assert open_source(tmp_path / "*.parquet", limit=7).least_events == 7
        assert open_source(tmp_path / "c.csv").least_events == 0

    def test_a_source_that_is_given_up_reads_no_further(self, tmp_path):
        pq.write_table(table(50), tmp_path / "a.parquet")
        chunks = open_source(tmp_path / "a.parquet").chunks(8)
        next(chunks)
        before = threading.active_count()
        chunks.close()
        assert threading.active_count() == before - 1

    def test_a_source_can_be_read_again(self, tmp_path):
        pq.write_table(table(30), tmp_path / "a.parquet")
        source = open_source(tmp_path / "a.parquet")
        first, second = (pa.concat_tables(c.rows for c in source.chunks(8)) for _ in range(2))
        assert first.equals(second)
        assert first.num_rows == 30

    def test_glob_list_and_folder_name_the_same_files(self, tmp_path):
        for number in range(3):
            pq.write_table(table(4, 4 * number), tmp_path / f"{number}.parquet")
        (tmp_path / "_SUCCESS").write_text("")
        (tmp_path / ".hidden.parquet").write_text("")
        paths = sorted(tmp_path.glob("[0-9].parquet"))
        for given in (tmp_path, f"{tmp_path}/*.parquet", paths):
            assert only(open_source(given)).rows.equals(table(12))

    def test_files_left_out_are_told_and_a_file_that_is_named_is_read(self, tmp_path):
        for number in range(3):
            pq.write_table(table(4, 4 * number), tmp_path / f"{number}.parquet")
        (tmp_path / "link").symlink_to(tmp_path)
        for given in (tmp_path, f"{tmp_path}/*.parquet"):
            source = open_source(given, leave_out=[tmp_path / "link" / "1.parquet"])
            assert source.left_out == (str(tmp_path / "1.parquet"),)
            assert only(source).rows.equals(pa.concat_tables([table(4), table(4, 8)]))
        source = open_source(tmp_path / "1.parquet", leave_out=[tmp_path / "1.parquet"])
        assert (source.left_out, source.paths) == ((), (str(tmp_path / "1.parquet"),))
        with pytest.raises(SourceError, match="files but those left out"):
            open_source(tmp_path, leave_out=sorted(tmp_path.glob("*.parquet")))

    def test_limit_counts_events(self, tmp_path):
        pq.write_table(table(30), tmp_path / "a.parquet", row_group_size=4)
        assert sum(len(chunk) for chunk in open_source(tmp_path / "a.parquet", limit=13).chunks(5)) == 13
        write_csv(tmp_path / "a.csv", ["x,y", *["1,2"] * 18, "a,2", *["1,2"] * 20])
        chunk = only(open_source(tmp_path / "a.csv", limit=20))
        assert (len(chunk), len(chunk.rejected)) == (19, 1)

    def test_columns_of_later_files_follow_the_first_in_order_and_type(self, tmp_path):
        pq.write_table(pa.table({"a": [1.5], "b": ["u"]}), tmp_path / "0.parquet")
        pq.write_table(pa.table({"b": ["v"], "a": pa.array([2], pa.int32())}), tmp_path / "1.parquet")
        assert only(open_source(tmp_path)).rows.to_pydict() == {"a": [1.5, 2.0], "b": ["u", "v"]}

    def test_csv_values_with_line_breaks_and_quotes(self, tmp_path):
        (tmp_path / "a.csv").write_text('t,x\n"a\nb",1\n"c ""d"", e",2\n')
        assert only(open_source(tmp_path / "a.csv")).rows.to_pydict() == {
            "t": ["a\nb", 'c "d", e'],
            "x": [1, 2],
        }

    def test_csv_blocks_keep_their_line_numbers(self, tmp_path):
        # Several blocks of a megabyte, with bad rows of both sorts in each.
        rows = ["x,y"]
        for i in range(200_000):
            rows.append("ragged" if i % 50_000 == 3 else f"no{i},0" if i % 50_000 == 9 else f"{i},{'0' * 20}")
        write_csv(tmp_path / "a.csv", rows)
        chunks = list(open_source(tmp_path / "a.csv").chunks(30_000))
        lines = np.concatenate([chunk.line for chunk in chunks])
        values = np.concatenate([chunk.rows["x"].to_numpy() for chunk in chunks])
        np.testing.assert_array_equal(values, lines - 2)
        np.testing.assert_array_equal(np.concatenate([chunk.index for chunk in chunks]), lines - 2)
        rejected = [r for chunk in chunks for r in chunk.rejected]
        assert [r.index for r in rejected] == [i + k for i in range(0, 200_000, 50_000) for k in (3, 9)]
        assert [r.line for r in rejected] == [r.index + 2 for r in rejected]


class TestRoles:
    def test_label_time_weight_and_excluded_columns_are_kept_from_the_model(self, tmp_path):
        events = pa.table({"x": [1.0, 2.0], "l": [0, 1], "t": [10, 20], "w": [0.5, 2.0], "id": ["a", "b"]})
        pq.write_table(events, tmp_path / "a.parquet")
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events.to_pylist()))
        pa.csv.write_csv(events, tmp_path / "a.csv")
        for name in ("a.parquet", "a.jsonl", "a.csv"):
            roles = {"label": "l", "time": "t", "weight": "w", "exclude": ["id"]}
            chunk = only(open_source(tmp_path / name, **roles))
            rows = chunk.events if isinstance(chunk.events, list) else chunk.events.to_pylist()
            assert rows == [{"x": 1.0}, {"x": 2.0}]
            assert chunk.label.to_pylist() == [0, 1]
            assert chunk.time.tolist() == [10.0, 20.0]
            assert chunk.weight.tolist() == [0.5, 2.0]
            kept = chunk.rows[1] if isinstance(chunk.rows, list) else chunk.rows.slice(1).to_pylist()[0]
            assert kept["id"] == "b"

    def test_only_carries_every_other_column_along_as_it_is(self, tmp_path):
        write_csv(tmp_path / "a.csv", ["id,x,note", "0017,1,5", "0018,2,NA"])
        chunk = only(open_source(tmp_path / "a.csv", only=["x"]))
        assert chunk.events.column_names == ["x"]
        assert chunk.rows.to_pydict() == {"id": ["0017", "0018"], "x": [1.0, 2.0], "note": ["5", "NA"]}

    @pytest.mark.parametrize(
        ("values", "seconds"),
        [
            (pa.array([1, 2]), [1, 2]),
            (pa.array([1.5, None]), [1.5, np.nan]),
            (pa.array([1500, None], pa.timestamp("ms")), [1.5, np.nan]),
            (pa.array([10**18 + 1, 0], pa.timestamp("ns", "Europe/Berlin")), [1e9, 0]),
            (pa.array([1, 2], pa.date32()), [86_400, 172_800]),
            (pa.array(["1970-01-01T00:01:00Z", "1970-01-01 00:02"]), [60, 120]),
        ],
    )
    def test_event_time_is_in_seconds(self, tmp_path, values, seconds):
        pq.write_table(pa.table({"x": [1.0, 2.0], "t": values}), tmp_path / "a.parquet")
        np.testing.assert_allclose(only(open_source(tmp_path / "a.parquet", time="t")).time, seconds)

    def test_event_time_in_csv_and_json(self, tmp_path):
        moment = datetime(2024, 5, 1, 12, tzinfo=timezone.utc)  # noqa: UP017 - also for Python 3.11's stubs
        write_csv(tmp_path / "a.csv", ["x,t", f"1,{moment.isoformat()}", f"2,{moment.timestamp()}", "3,noon"])
        chunk = only(open_source(tmp_path / "a.csv", time="t"))
        assert chunk.time.tolist() == [moment.timestamp()] * 2
        assert [(r.line, r.field, r.value) for r in chunk.rejected] == [(4, "t", "noon")]
        (tmp_path / "a.jsonl").write_text(f'{{"x": 1, "t": "{moment.isoformat()}"}}\n{{"x": 2, "t": "noon"}}\n')
        times = only(open_source(tmp_path / "a.jsonl", time="t")).time
        assert times[0] == moment.timestamp()
        assert np.isnan(times[1])


class TestCsvTypes:
    def test_types_are_inferred_in_spite_of_bad_cells(self, tmp_path):
        rows = [f"{i}.5,{'true' if i % 2 else 'false'},c{i % 3}" for i in range(20)]
        rows[7] = "twelve,true,c0"
        chunk = only(open_source(write_csv(tmp_path / "a.csv", ["n,flag,c", *rows])))
        assert [str(type_) for type_ in chunk.events.schema.types] == ["double", "bool", "string"]
        (rejection,) = chunk.rejected
        assert (rejection.index, rejection.line, rejection.field, rejection.value) == (7, 9, "n", "twelve")
        assert rejection.event == {"n": "twelve", "flag": "true", "c": "c0"}
        assert "line 9" in str(rejection)
        assert str(tmp_path) in str(rejection)

    def test_declared_kinds_decide(self, tmp_path):
        write_csv(tmp_path / "a.csv", ["code,ok,n", "1,1,a", "2,0,b", "3,maybe,4"])
        kinds = {"code": "category", "ok": "flag", "n": "count"}
        chunk = only(open_source(tmp_path / "a.csv", fields=kinds))
        assert len(chunk) == 0
        assert [(r.field, r.value) for r in chunk.rejected] == [("n", "a"), ("n", "b"), ("ok", "maybe")]

    def test_missing_cells(self, tmp_path):
        write_csv(tmp_path / "a.csv", ["n,c", "1,NA", ",", "NaN,x", " 4 ,y"])
        chunk = only(open_source(tmp_path / "a.csv"))
        assert chunk.events.to_pydict() == {"n": [1, None, None, 4], "c": ["NA", None, "x", "y"]}

    def test_a_row_of_the_wrong_length_and_one_that_is_not_utf8_cost_only_themselves(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"n,c\n1,a\n2\n3,\xff\n4,d,e\n5,f\n")
        chunk = only(open_source(tmp_path / "a.csv"))
        assert chunk.events.to_pydict() == {"n": [1, 5], "c": ["a", "f"]}
        assert [(r.index, r.line) for r in chunk.rejected] == [(1, 3), (2, 4), (3, 5)]
        assert "2 cells" in chunk.rejected[0].reason
        assert chunk.rejected[1].field == "c"

    def test_underscores_do_not_make_a_number(self, tmp_path):
        write_csv(tmp_path / "a.csv", ["n", "1", "1_000"])
        chunk = only(open_source(tmp_path / "a.csv", fields={"n": "numeric"}))
        assert chunk.rejected[0].value == "1_000"

    def test_a_quote_left_open_costs_what_it_swallows(self, tmp_path):
        write_csv(tmp_path / "a.csv", ["x,y", "1,2", '"3,4', "5,6"])
        chunk = only(open_source(tmp_path / "a.csv"))
        assert chunk.events.to_pydict() == {"x": [1], "y": [2]}
        assert chunk.rejected[0].line == 3
        assert chunk.rejected[0].reason == (
            "expected 2 cells as in the header, got 1; a quote may have been left open: this event spans 2 lines"
        )

    @pytest.mark.parametrize("name", ["a.csv", "-"])
    @pytest.mark.parametrize("end", ["", "\n", "\n\n", '"\n7,8\n'])
    def test_how_many_lines_an_open_quote_has_swallowed_is_told(self, tmp_path, monkeypatch, name, end):
        swallowed = "\n".join(['"3', *["5,6"] * 1_999])
        text = f"x,y\n1,2\n\n{swallowed}{end}"
        (tmp_path / "a.csv").write_text(text)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        chunk = only(open_source(name if name == "-" else tmp_path / name, format="csv"))
        assert chunk.index.tolist() == ([0, 2] if "7" in end else [0])
        (rejection,) = chunk.rejected
        assert rejection.reason.endswith("a quote may have been left open: this event spans 2,000 lines")
        assert rejection.event.rstrip('"\n') == swallowed

    def test_an_open_quote_that_leaves_the_right_number_of_cells(self, tmp_path):
        # The next quote closes the cell, and what follows it belongs to it.
        write_csv(tmp_path / "a.csv", ["x,y,t", "1,2,a", '"3,4,a', *["5,6,a"] * 97, '"7,8,"b', 'c"', 'no,9,"d', 'e"'])
        chunk = only(open_source(tmp_path / "a.csv", fields={"x": "numeric", "y": "numeric", "t": "category"}))
        assert [(one.line, one.field, one.reason) for one in chunk.rejected] == [
            (3, "x", "expected a number; a quote may have been left open: this event spans 100 lines"),
            (4, "x", "expected a number"),
        ]

    @pytest.mark.parametrize("name", ["a.csv", "-"])
    def test_another_quote_or_none(self, tmp_path, monkeypatch, name):
        def read(text, quote):
            (tmp_path / "a.csv").write_text(text)
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
            return only(open_source(name if name == "-" else tmp_path / name, format="csv", quote=quote))

        chunk = read("'t,u',x\n'a\nb',1\n'c ''d'', e',2\n5\",3\n", "'")
        assert chunk.rows.to_pydict() == {"t,u": ["a\nb", "c 'd', e", '5"'], "x": [1, 2, 3]}
        for quote in ("", None):
            chunk = read('"t",x\n5",1\n"open,2\n"a ""b""",3\n"c,d",4\n\n"e",5\n', quote)
            assert chunk.rows.to_pydict() == {'"t"': ['5"', '"open', '"a ""b"""', '"e"'], "x": [1, 2, 3, 5]}
            (rejection,) = chunk.rejected
            assert (rejection.index, rejection.line, rejection.event) == (3, 5, '"c,d",4')
            assert rejection.reason == "expected 2 cells as in the header, got 3"

    def test_rows_that_are_all_of_the_wrong_length(self, tmp_path):
        chunk = only(open_source(write_csv(tmp_path / "a.csv", ["x,y", "1", "2,3,4"])))
        assert len(chunk) == 0
        assert [(r.index, r.line) for r in chunk.rejected] == [(0, 2), (1, 3)]

    def test_a_column_name_with_a_line_break_and_blank_lines_before_it(self, tmp_path):
        (tmp_path / "a.csv").write_text('\n\r\n"x\n1",y\n1,2\n')
        assert only(open_source(tmp_path / "a.csv")).events.to_pydict() == {"x\n1": [1], "y": [2]}

    def test_byte_order_mark(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfn\r\n1\r\n")
        assert only(open_source(tmp_path / "a.csv")).events.to_pydict() == {"n": [1.0]}


class TestJsonLines:
    def test_a_line_that_does_not_parse_costs_only_itself(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n{"x": \n\n[1]\n\xff\n' + b"[" * 9999 + b'\n{"x": 2}')
        chunk = only(open_source(tmp_path / "a.jsonl"))
        assert chunk.events == [{"x": 1}, {"x": 2}]
        assert chunk.index.tolist() == [0, 5]
        assert chunk.line.tolist() == [1, 7]
        assert [(r.index, r.line) for r in chunk.rejected] == [(1, 2), (2, 4), (3, 5), (4, 6)]
        assert chunk.rejected[0].event == '{"x": '
        # The parser's own line and column would be those within the line.
        assert chunk.rejected[0].reason == "expected a JSON object, but it does not parse: Expecting value"

    @pytest.mark.parametrize(
        ("line", "field"),
        [(rb'{"x": "\ud800"}', "x"), (rb'{"a": 1, "b": ["\uDFFF"]}', "b"), (rb'{"\udabc": 1}', "\udabc")],
    )
    def test_half_a_character_costs_its_event(self, tmp_path, line, field):
        (tmp_path / "a.jsonl").write_bytes(line + b'\n{"x": "\\ud83d\\ude00 \\\\ud800"}\n')
        chunk = only(open_source(tmp_path / "a.jsonl"))
        assert chunk.events == [{"x": "\U0001f600 \\ud800"}]
        (rejection,) = chunk.rejected
        assert (rejection.index, rejection.line, rejection.field) == (0, 1, field)
        assert "half a character" in rejection.reason

    def test_a_json_array_is_not_json_lines(self, tmp_path):
        (tmp_path / "a.json").write_text('[\n{"x": 1}\n]')
        with pytest.raises(SourceError, match=r"a\.json: begins with '\['"):
            list(open_source(tmp_path / "a.json").chunks())


class TestRiver:
    def test_shuttle(self):
        pytest.importorskip("river")
        chunks = list(open_source(river="Shuttle", label="anomaly", limit=1500).chunks(1000))
        assert [len(chunk) for chunk in chunks] == [1000, 500]
        assert sorted(chunks[0].events[0]) == [f"f{i}" for i in range(1, 10)]
        assert set(chunks[0].label.to_pylist()) == {0, 1}

    def test_an_unknown_name_gets_the_nearest(self):
        pytest.importorskip("river")
        with pytest.raises(SourceError, match="no data set 'Shutle'; did you mean 'Shuttle'"):
            open_source(river="Shutle")


class TestRefusals:
    def refused(self, match, *paths, **options):
        with pytest.raises(SourceError, match=match) as caught:
            list(open_source(*paths, **options).chunks())
        return str(caught.value)

    def test_truncated_parquet(self, tmp_path):
        pq.write_table(table(1000), tmp_path / "a.parquet")
        whole = (tmp_path / "a.parquet").read_bytes()
        for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / "a.parquet").write_bytes(whole[:size])
            self.refused(r"a\.parquet: cannot be read as Parquet, it may be truncated", tmp_path / "a.parquet")

    def test_damaged_parquet_pages(self, tmp_path):
        pq.write_table(table(1000), tmp_path / "a.parquet")
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        content[4:200] = b"\xff" * 196
        (tmp_path / "a.parquet").write_bytes(content)
        self.refused(r"a\.parquet: cannot be read", tmp_path / "a.parquet")

    @pytest.mark.parametrize("share", [0.1, 0.45, 0.5, 0.9])
    def test_parquet_that_is_cut_while_it_is_read(self, tmp_path, share):
        path = tmp_path / "a.parquet"
        rows = pa.table({"x": np.random.default_rng(0).normal(size=200_000)})
        pq.write_table(rows, path, row_group_size=20_000)
        chunks = open_source(path).chunks(10_000)
        next(chunks)
        os.truncate(path, int(share * path.stat().st_size))
        with pytest.raises(SourceError, match=r"cut while it was read|cannot be read as Parquet"):
            list(chunks)

    def test_truncated_gzip(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n' * 100)[:-10])
        self.refused(r"a\.jsonl\.gz: cannot be read", tmp_path / "a.jsonl.gz")

    @pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
    def test_damaged_gzip(self, tmp_path, name):
        rows = np.random.default_rng(0).integers(10**9, size=20_000)
        lines = "".join(f'{{"x": {i}}}\n' if "json" in name else f"{i}\n" for i in rows)
        whole = gzip.compress(("x\n" * ("csv" in name) + lines).encode())
        for start in (0, 2, 12, len(whole) // 2, len(whole) - 4):
            content = bytearray(whole)
            content[start : start + 4] = bytes(255 - byte for byte in content[start : start + 4])
            (tmp_path / name).write_bytes(content)
            self.refused(r"a\..*\.gz: cannot be read as", tmp_path / name)

    def test_lines_that_csv_does_not_know(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"x,y\r1,2\r3,4\r")
        self.refused(r"a\.csv: its first line has no end .* not in CR alone", tmp_path / "a.csv")
        (tmp_path / "a.csv").write_bytes(b"x" * 3_000_000)
        self.refused(r"a\.csv: its first line has no end", tmp_path / "a.csv")
        (tmp_path / "a.csv").write_bytes(b'x,"y\n1,2\n')
        self.refused(r"a\.csv: cannot be read as CSV", tmp_path / "a.csv")
        (tmp_path / "a.csv").write_bytes(b"x,y\n1,2\n" + b"9" * 10_000_000 + b",3\n4,5\n")
        self.refused(r"a\.csv: an event is longer than 1,048,576 bytes", tmp_path / "a.csv")

    def test_nothing_there(self, tmp_path):
        (tmp_path / "events.csv").write_text("x\n1\n")
        (tmp_path / "empty").mkdir()
        self.refused(r"event\.csv: no such file or folder; did you mean '.*events\.csv'", tmp_path / "event.csv")
        self.refused("no file matches the pattern", f"{tmp_path}/*.pq")
        self.refused("the folder holds no Parquet, CSV or JSON Lines files", tmp_path / "empty")

    def test_no_events(self, tmp_path):
        pq.write_table(table(0), tmp_path / "a.parquet")
        (tmp_path / "a.csv").write_text("x,y\n")
        (tmp_path / "b.csv").write_text("")
        (tmp_path / "a.jsonl").write_text("\n\n")
        for name in ("a.parquet", "a.csv", "b.csv", "a.jsonl"):
            self.refused(f"{name}: holds no events", tmp_path / name)

    def test_missing_columns_name_the_nearest(self, tmp_path):
        pq.write_table(table(3), tmp_path / "a.parquet")
        pa.csv.write_csv(table(3), tmp_path / "a.csv")
        (tmp_path / "a.jsonl").write_text('{"country": 1}\n{"country": 1}\n')
        for name in ("a.parquet", "a.csv", "a.jsonl"):
            self.refused(f"{name}: has no column 'contry'; did you mean 'country'", tmp_path / name, label="contry")
        for options in ({"exclude": ["contry"]}, {"only": ["contry"]}, {"fields": {"contry": "category"}}):
            self.refused("has no column 'contry'", tmp_path / "a.csv", **options)

    def test_a_stream_that_leaves_its_label_out_for_a_while_goes_on(self, tmp_path):
        lines = ['{"x": 1.0, "l": "a"}\n', *['{"x": 2.0}\n'] * 4]
        (tmp_path / "a.jsonl").write_text("".join(lines))
        chunks = list(open_source(tmp_path / "a.jsonl", label="l").chunks(2))
        assert [label for chunk in chunks for label in chunk.label.to_pylist()] == ["a", None, None, None, None]

    def test_duplicate_columns(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
        self.refused(r"a\.csv: has more than one column called 'x'", tmp_path / "a.csv")
        twice = pa.Table.from_arrays([pa.array([1.0])] * 2, names=["x", "x"])
        pq.write_table(twice, tmp_path / "a.parquet")
        self.refused(r"a\.parquet: has more than one column called 'x'", tmp_path / "a.parquet")

    def test_files_that_do_not_fit_together(self, tmp_path):
        pq.write_table(pa.table({"a": [1.0], "b": [1.0]}), tmp_path / "0.parquet")
        pq.write_table(pa.table({"a": [1.0], "c": [1.0]}), tmp_path / "1.parquet")
        message = self.refused("its columns differ", tmp_path)
        assert "1.parquet" in message
        assert "lacks b and also has c" in message
        pq.write_table(pa.table({"a": ["u"], "b": [1.0]}), tmp_path / "1.parquet")
        self.refused(r"1\.parquet: column 'a' is string but double in .*0\.parquet", tmp_path)
        (tmp_path / "2.csv").write_text("a,b\n1,2\n")
        self.refused(
            r"different formats \(csv, parquet\); set format \(in a job: source.format\) to one of them$", tmp_path
        )
        assert only(open_source(tmp_path, format="csv")).rows.num_rows == 1

    @pytest.mark.parametrize(("name", "sign"), [("delimiter", ";"), ("quote", "'"), ("quote", None)])
    def test_cells_of_what_has_none(self, tmp_path, monkeypatch, name, sign):
        pq.write_table(table(3), tmp_path / "a.parquet")
        (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
        for kind in ("parquet", "jsonl"):
            self.refused(f"{name} is for CSV, and the source is {kind}; leave", tmp_path / f"a.{kind}", **{name: sign})
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper((tmp_path / "a.jsonl").open("rb")))
        self.refused(f"{name} is for CSV, and the source is jsonl", "-", **{name: sign})
        self.refused(f"{name} is for CSV, and the source is a River data set", river="Shuttle", **{name: sign})

    def test_delimiters_and_quotes_that_no_csv_has(self, tmp_path):
        write_csv(tmp_path / "a.csv", ["x,y", "1,2"])
        for name in ("delimiter", "quote"):
            for sign in ("ab", "€", "\n"):
                self.refused(f"{name}: expected one ASCII character within a line, got", tmp_path, **{name: sign})
        for options in ({"quote": ","}, {"delimiter": '"'}, {"delimiter": "'", "quote": "'"}):
            self.refused("quote: .* separates the cells; set another", tmp_path, **options)

    def test_no_column_left_for_the_model(self, tmp_path):
        pq.write_table(pa.table({"a": [1.0]}), tmp_path / "a.parquet")
        self.refused("no column is left for the model", tmp_path / "a.parquet", exclude=["a"])

    def test_unknown_ending(self, tmp_path):
        (tmp_path / "a.dat").write_text("x\n1\n")
        self.refused(r"a\.dat: the format cannot be told from the name", tmp_path / "a.dat")
        assert len(only(open_source(tmp_path / "a.dat", format="csv"))) == 1

    def test_a_weight_or_time_that_is_no_number(self, tmp_path):
        pq.write_table(pa.table({"x": [1.0], "w": [[1.0]]}), tmp_path / "a.parquet")
        self.refused("column 'w' is list.*, but numbers are needed", tmp_path / "a.parquet", weight="w")


def in_a_process(code, given):
    program = "from stream_em.sources import open_source\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], input=given, capture_output=True, check=False, env=ENVIRONMENT
    )
    return done.stdout.decode(), done.stderr.decode()


class TestStandardInput:
    def test_csv_and_json_are_told_apart(self):
        code = """
            (chunk,) = open_source("-").chunks()
            print(chunk.events if isinstance(chunk.events, list) else chunk.events.to_pylist())
        """
        for given in (b"x,y\n1.5,a\n", b'{"x": 1.5, "y": "a"}\n'):
            assert in_a_process(code, given)[0] == "[{'x': 1.5, 'y': 'a'}]\n"

    def test_it_is_read_once(self):
        code = """
            source = open_source("-")
            print(len(list(source.chunks())))
            list(source.chunks())
        """
        out, err = in_a_process(code, b'{"x": 1}\n')
        assert out == "1\n"
        assert "standard input: can be read only once" in err

    def test_parquet_is_refused_by_its_name_or_by_its_first_bytes(self, tmp_path):
        pq.write_table(table(10), tmp_path / "events.parquet")
        given = (tmp_path / "events.parquet").read_bytes()
        for options in ("", ", format='parquet'"):
            _, err = in_a_process(f"open_source('-'{options})", given)
            assert "standard input: Parquet needs a file, because its index stands at the end" in err

    @pytest.mark.parametrize("lines", [b'{"x": %d}\n', b"%d\n"])
    def test_chunks_come_while_the_stream_is_open(self, lines):
        code = """
            import sys
            for chunk in open_source("-").chunks(2):
                print(len(chunk), flush=True)
        """
        program = "from stream_em.sources import open_source\n" + textwrap.dedent(code)
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        header = b"" if b"{" in lines else b"x\n"
        process.stdin.write(header + b"".join(lines % i for i in range(5)))
        process.stdin.flush()
        # Two full chunks are out before the end of the stream; were they not, reading would wait for ever.
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        assert [process.stdout.readline() for _ in range(2)] == [b"2\n", b"2\n"]
        watchdog.cancel()
        process.stdin.close()
        assert process.stdout.read() == b"1\n"
        assert process.wait(timeout=20) == 0


def test_importing_sources_imports_no_optional_package():
    code = """
        import sys
        print(sorted({"river", "typer", "rich", "pydantic", "yaml", "pandas"} & set(sys.modules)))
    """
    assert in_a_process(code, b"")[0] == "[]\n"


def test_named_pipes_are_files_too(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('{{\"x\": 1}}\\n')"])
    assert only(open_source(pipe)).events == [{"x": 1}]
    assert writer.wait(timeout=20) == 0


@pytest.mark.parametrize("name", ["events.csv", "-"])
def test_another_delimiter_than_was_assumed_is_told(tmp_path, monkeypatch, name):
    def opened(text, **options):
        (tmp_path / "events.csv").write_text(text)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        path = name if name == "-" else tmp_path / name
        return open_source(path, format="csv", **options)

    for text, other in (("x;y\n1;2\n", "';'"), ("x\ty\n1\t2\n", r"'\\t'")):
        with pytest.raises(SourceError, match=f"only column would be .*; is delimiter={other} meant"):
            list(opened(text).chunks())
    # One column whose name is in quotes, and one that somebody has said to be right.
    (chunk,) = opened('"x, y"\n1\n').chunks()
    assert chunk.events.column_names == ["x, y"]
    (chunk,) = opened("x;y\n1\n", delimiter=",").chunks()
    assert chunk.events.column_names == ["x;y"]


def test_wrong_arguments():
    with pytest.raises(SourceError, match="either a path or the name"):
        open_source()
    with pytest.raises(SourceError, match="format 'xml' is not one of"):
        open_source("a.xml", format="xml")
    with pytest.raises(SourceError, match="cannot be mixed"):
        open_source(["-", "a.csv"])


@pytest.mark.parametrize("break_", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("closing", ["", '"'])
def test_a_quote_that_is_open_at_the_end_costs_its_event_in_words(tmp_path, monkeypatch, break_, ending, closing):
    content = (
        break_.join(["x,s", "1,a", "2,b", '3,"c', "4,d", "5,e"]) + closing + ending.replace("\n", break_)
    ).encode()
    path = tmp_path / "events.csv"
    path.write_bytes(content)
    for source in (path, "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        chunks = list(open_source(source, format="csv").chunks(100))
        rejected = [one for chunk in chunks for one in chunk.rejected]
        assert sum(len(chunk) for chunk in chunks) == (3 if closing else 2)
        assert [one.index for one in rejected] == ([] if closing else [2])
        for one in rejected:
            assert "the source ended first; a quote may have been left open: this event spans 3 lines" in str(one)
    assert sum(len(chunk) for chunk in open_source(path, quote=None).chunks(100)) == 5
