"""The command, run as a person runs it, on real files; in a process of its own where that is the point."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from stream_em import BatchEM, OnlineEM, RobbinsMonro, load, save
from stream_em.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
# This checkout, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
COMMAND = [sys.executable, "-m", "stream_em.cli"]


def events(n=3000, seed=0):
    """Three clusters, one of them in another country, and some anomalies far out."""
    generator = np.random.default_rng(seed)
    cluster = generator.integers(3, size=n)
    anomalous = generator.random(n) < 0.02
    x = generator.normal(size=(n, 2)) + np.array([[0, 0], [9, 0], [0, 9]])[cluster]
    x[anomalous] += 40
    return pa.table(
        {
            "id": [f"e{i}" for i in range(n)],
            "x": x[:, 0],
            "y": x[:, 1],
            "country": np.array(["DE", "DE", "FR"])[cluster],
            "ok": generator.random(n) < 0.5,
            "items": generator.poisson(3, n),
            "fraud": anomalous.astype(int),
        }
    )


SOURCE = {"label": "fraud", "exclude": ["id"]}
SMALL = {"model": {"n_components": 3}, "learner": {"batch_size": 250, "warm_up": 300}}


def stream_em(*arguments, cwd, given=None, code=0):
    """Call the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    left = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["stream-em", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO((given or "").encode()))))
        try:
            main()
        except SystemExit as ended:
            left = ended.code or 0
    done = subprocess.CompletedProcess(arguments, left, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    return done


def start(*arguments, cwd, **streams):
    """Start the command as a process."""
    return subprocess.Popen([*COMMAND, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, text=True, **streams)


def wait_until_idle(process):
    """Wait until a process has nothing to do but to wait, as far as one can tell."""
    status = Path(f"/proc/{process.pid}/stat")
    seen = []
    while len(seen) < 4 or len(set(seen[-4:])) > 1 or " S " not in seen[-1]:
        time.sleep(0.25)
        fields = status.read_text().split() if status.exists() else ["", "", "S"] + [""] * 12
        # Its state, and how long it has run.
        seen.append(f" {fields[2]} {fields[13]} {fields[14]}")


def write_job(folder, **sections):
    # JSON is YAML.
    (folder / "job.yaml").write_text(json.dumps({**SMALL, **sections}))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished run over a Parquet file."""
    folder = tmp_path_factory.mktemp("ran")
    pq.write_table(events(), folder / "events.parquet", row_group_size=700)
    write_job(folder, source={"path": "events.parquet", **SOURCE})
    done = stream_em("run", "job.yaml", "output.responsibilities=true", cwd=folder)
    return folder, done


class TestRun:
    def test_it_says_what_it_did(self, ran):
        _, done = ran
        assert re.search(
            r"^3,000 events from events\.parquet in .* events/s\), mean log-likelihood -\d", done.stdout, re.M
        )
        assert "effective components" in done.stdout
        assert re.search(r"x -?[\d.]+ ± ", done.stdout)
        assert "'FR'" in done.stdout
        assert "\x1b" not in done.stdout
        assert done.stderr == ""

    def test_scored_events_hold_the_events_and_what_the_model_says_of_them(self, ran):
        folder, _ = ran
        scored = pq.read_table(folder / "output" / "scored.parquet")
        assert scored.select(events().column_names).equals(events())
        assert scored.column_names[7:] == [
            "component",
            "log_prob",
            "responsibility_0",
            "responsibility_1",
            "responsibility_2",
        ]
        responsibilities = np.array([scored[name] for name in scored.column_names[9:]])
        warm = 300
        np.testing.assert_allclose(responsibilities[:, warm:].sum(axis=0), 1.0)
        np.testing.assert_array_equal(scored["component"].to_numpy()[warm:], responsibilities.argmax(axis=0)[warm:])
        # The cluster of the other country is found by the time the second half comes.
        french = np.array(scored["country"])[1500:] == "FR"
        component = scored["component"][1500:].to_numpy()
        typical = np.bincount(component[french]).argmax()
        assert np.mean((component == typical) == french) > 0.95

    def test_it_is_the_library_doing_predict_then_learn(self, ran):
        folder, _ = ran
        saved = load(folder / "output" / "model.arrow")
        learner = OnlineEM(saved.model, schedule=RobbinsMonro(0.6), batch_size=250, warm_up=300, seed=0)
        table = events().drop_columns(["id", "fraud"])
        log_prob = [
            learner.predict_then_update(learner_events).log_prob
            for learner_events in (table.slice(start, 250) for start in range(0, 3000, 250))
        ]
        scored = pq.read_table(folder / "output" / "scored.parquet")
        # The schema of the command counts "items" as numeric too: it is inferred from the same table.
        np.testing.assert_allclose(scored["log_prob"].to_numpy()[300:], np.concatenate(log_prob)[300:], rtol=1e-9)
        np.testing.assert_allclose(saved.parameters.weights, learner.parameters.weights, rtol=1e-9)

    def test_events_of_the_warm_up_have_no_score_and_are_counted(self, ran):
        folder, done = ran
        assert "300 events came within the warm-up" in done.stdout
        scored = pq.read_table(folder / "output" / "scored.parquet")
        for name in scored.column_names[7:]:
            assert np.flatnonzero(scored[name].is_null()).tolist() == list(range(300)), name

    def test_the_label_only_rates_the_score(self, ran):
        folder, done = ran
        assert load(folder / "output" / "model.arrow").schema.names == ("x", "y", "country", "ok", "items")
        area, n_anomalous, n_normal = re.search(
            r"ROC-AUC .* after the warm-up: ([\d.]+) \((\d+) anomalies, ([\d,]+) normal\)", done.stdout
        ).groups()
        metrics = pytest.importorskip("sklearn.metrics")
        scored = pq.read_table(folder / "output" / "scored.parquet").slice(300)
        expected = metrics.roc_auc_score(scored["fraud"], -scored["log_prob"].to_numpy())
        assert float(area) == pytest.approx(expected, abs=5e-5)
        assert int(n_anomalous) + int(n_normal.replace(",", "")) == 2700

    def test_picture_snapshot_and_an_empty_quarantine_are_there_and_nothing_else(self, ran):
        folder, done = ran
        output = folder / "output"
        written = ["model.arrow", "picture.png", "quarantine.jsonl", "scored.parquet"]
        assert sorted(path.name for path in output.iterdir()) == written
        assert (output / "picture.png").read_bytes().startswith(b"\x89PNG")
        assert (output / "quarantine.jsonl").read_text() == ""
        assert f"wrote {Path('output') / 'scored.parquet'}" in done.stdout

    def test_every_format_gives_the_same_scores(self, ran, tmp_path):
        folder, _ = ran
        pa_csv.write_csv(events(), tmp_path / "e.csv")
        lines = "".join(json.dumps(event) + "\n" for event in events().to_pylist())
        (tmp_path / "e.jsonl").write_text(lines)
        wanted = pq.read_table(folder / "output" / "scored.parquet")["log_prob"].to_numpy()
        write_job(tmp_path, source={"path": "e.csv", **SOURCE}, output={"picture": None})
        for arguments, given in (([], None), (["source.path=e.jsonl"], None), (["source.path=-"], lines)):
            stream_em("run", "job.yaml", *arguments, cwd=tmp_path, given=given)
            scored = pq.read_table(tmp_path / "output" / "scored.parquet")
            np.testing.assert_allclose(scored["log_prob"].to_numpy(), wanted, rtol=1e-9)
            assert scored["id"].to_pylist() == events()["id"].to_pylist()
            assert scored["fraud"].to_pylist() == events()["fraud"].to_pylist()

    def test_row_groups_are_large_and_rows_are_in_order_whatever_the_batch_size(self, tmp_path):
        n = 150_000
        table = pa.table({"x": np.random.default_rng(0).normal(size=n), "i": np.arange(n)})
        for number, start in enumerate(range(0, n, 40_000)):
            pq.write_table(table.slice(start, 40_000), tmp_path / f"{number}.parquet", row_group_size=3_000)
        write_job(tmp_path, source={"path": "*.parquet", "exclude": ["i"]}, output={"picture": None})
        stream_em("run", "job.yaml", "learner.batch_size=7000", cwd=tmp_path)
        file = pq.ParquetFile(tmp_path / "output" / "scored.parquet")
        assert file.num_row_groups <= 3
        assert file.read()["i"].equals(table["i"])

    def test_shuttle(self, tmp_path):
        pytest.importorskip("river")
        done = stream_em("run", CONFIGS / "shuttle.yaml", "output.picture=null", cwd=tmp_path)
        area = float(re.search(r"after the warm-up: ([\d.]+)", done.stdout).group(1))
        assert area > 0.95
        scored = pq.read_table(tmp_path / "output" / "shuttle" / "scored.parquet")
        assert scored.num_rows == 49_097
        assert sum(scored["anomaly"].to_pylist()) == 3_511
        assert "anomaly" not in load(tmp_path / "output" / "shuttle" / "model.arrow").schema.names


class TestBadEvents:
    @pytest.fixture(scope="class")
    @classmethod
    def bad(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("bad")
        stream = events(600).select(["x", "y", "country"]).to_pylist()
        self_made = {
            3: {"x": "12,5"},
            50: {"y": float("inf")},
            51: {"country": {"code": "DE"}},
            52: {"x": 10**400},
            300: {"country": 7},
            301: {"shop": 1},
        }
        for index, change in self_made.items():
            stream[index] = stream[index] | change
        stream[302] = {}
        lines = [json.dumps(event) for event in stream]
        lines[303] = lines[303][:-4]
        (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
        write_job(folder, source={"path": "events.jsonl"}, output={"picture": None})
        return folder, [*sorted(self_made), 302, 303]

    def test_they_are_set_aside_with_the_reason_and_counted(self, bad):
        folder, indices = bad
        done = stream_em("run", "job.yaml", cwd=folder)
        assert "592 events from events.jsonl" in done.stdout
        assert "8 events could not be used and are in quarantine" in done.stdout
        lines = (folder / "output" / "quarantine.jsonl").read_text().splitlines()
        records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        records.sort(key=lambda record: record["index"])
        assert [record["index"] for record in records] == indices
        assert all(record["line"] == record["index"] + 1 for record in records)
        assert {record["source"] for record in records} == {"events.jsonl"}
        fields = ["x", "y", "country", "x", "country", "shop", None, None]
        assert [record["field"] for record in records] == fields
        assert [record["value"] for record in records[:3]] == ["12,5", "inf", {"code": "DE"}]
        assert records[0]["event"]["x"] == "12,5"
        assert all(record["reason"] for record in records)
        scored = pq.read_table(folder / "output" / "scored.parquet")
        assert scored.num_rows == 592
        assert np.isfinite(scored["log_prob"].to_numpy()[300:]).all()
        assert scored["x"].null_count == 0

    def test_the_others_are_learned_as_if_the_bad_ones_had_never_been(self, bad, tmp_path):
        folder, indices = bad
        good = [e for i, e in enumerate(events(600).select(["x", "y", "country"]).to_pylist()) if i not in indices]
        (tmp_path / "good.jsonl").write_text("".join(json.dumps(event) + "\n" for event in good))
        fields = "schema.fields={x: numeric, y: numeric, country: category}"
        one_batch = [fields, "learner.batch_size=600", "learner.warm_up=100"]
        stream_em("run", "job.yaml", *one_batch, "output.folder=one", cwd=folder)
        write_job(tmp_path, source={"path": "good.jsonl"}, output={"picture": None})
        stream_em("run", "job.yaml", *one_batch, cwd=tmp_path)
        scores = [
            pq.read_table(path)["log_prob"].to_numpy()
            for path in (folder / "one" / "scored.parquet", tmp_path / "output" / "scored.parquet")
        ]
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-9)

    def test_endless_reasons_are_counted_together(self, tmp_path):
        lines = [json.dumps({"x": float(i % 9)} | ({f"y{i}" + 999 * "y": 1.0} if i % 2 else {})) for i in range(3000)]
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        write_job(
            tmp_path, source={"path": "events.jsonl"}, schema={"fields": {"x": "numeric"}}, output={"picture": None}
        )
        done = stream_em("run", "job.yaml", cwd=tmp_path)
        assert "1,500 events could not be used and are in quarantine:\n  500 × others\n" in done.stdout
        assert "and 991 more reasons" in done.stdout
        assert max(map(len, done.stdout.splitlines())) < 250

    def test_raise_stops_at_the_first_and_leaves_nothing(self, bad):
        folder, _ = bad
        done = stream_em("run", "job.yaml", "output.on_error=raise", "output.folder=strict", cwd=folder, code=1)
        assert done.stderr.startswith("error: events.jsonl, event 3 (line 4), field 'x': '12,5': expected")
        assert list((folder / "strict").iterdir()) == []

    def test_csv_cells(self, tmp_path):
        rows = [f"{i % 7}.5,{i}" for i in range(400)]
        rows[20], rows[30], rows[399] = "abc,1", "1.0", "2.0,-inf"
        (tmp_path / "events.csv").write_text("x,y\n" + "\n".join(rows) + "\n")
        write_job(tmp_path, source={"path": "events.csv"}, output={"picture": None})
        stream_em("run", "job.yaml", cwd=tmp_path)
        records = [json.loads(line) for line in (tmp_path / "output" / "quarantine.jsonl").read_text().splitlines()]
        found = [(record["line"], record["field"], record["value"]) for record in records]
        assert found == [(22, "x", "abc"), (32, None, None), (401, "y", "-inf")]

    def test_a_quote_left_open_is_told_before_all_other_reasons(self, tmp_path):
        rows = [f"{i % 7}.5,{i}" for i in range(400)]
        for wrong in range(3, 13):
            rows[10 * wrong], rows[10 * wrong + 1] = (",".join("1" * wrong),) * 2
        rows[200] = '"open,1'
        (tmp_path / "events.csv").write_text("x,y\n" + "\n".join(rows) + "\n")
        write_job(tmp_path, source={"path": "events.csv"}, output={"picture": None})
        done = stream_em("run", "job.yaml", cwd=tmp_path)
        reason = "expected 2 cells as in the header, got 1; a quote may have been left open: this event spans 200 lines"
        told = f"21 events could not be used and are in quarantine:\n  1 × {reason}\n  2 × expected 2 cells"
        assert told in done.stdout
        assert "  and 1 more reason\n" in done.stdout
        assert json.loads((tmp_path / "output" / "quarantine.jsonl").read_text().splitlines()[-1])["reason"] == reason
        done = stream_em("run", "job.yaml", "source.quote=", cwd=tmp_path)
        assert "21 events could not be used and are in quarantine:\n  2 × expected 2 cells" in done.stdout
        assert "379 events from events.csv" in done.stdout

    def test_quotes_left_open_hide_no_other_reason(self, tmp_path):
        rows = [f"{i}.5,{i}" for i in range(300)] + ["?,1"] * 40
        for spanned in range(12):
            rows += ['"open,1', *["1,2"] * spanned, 'closed",1,2']
        (tmp_path / "events.csv").write_text("x,y\n" + "\n".join(rows) + "\n")
        write_job(tmp_path, source={"path": "events.csv"}, schema={"fields": {"x": "numeric", "y": "numeric"}})
        done = stream_em("run", "job.yaml", "output.picture=null", cwd=tmp_path)
        _, *told = done.stdout[done.stdout.index("52 events could not") :].splitlines()[:5]
        assert all("a quote may have been left open" in line for line in told[:3])
        assert told[3] == "  40 × x: expected a number"

    def test_what_is_one_is_told_in_the_singular(self, tmp_path):
        (tmp_path / "events.csv").write_text("x\n" + "1\n2\n" * 200 + "a\n")
        write_job(tmp_path, source={"path": "events.csv"}, output={"picture": None})
        done = stream_em("run", "job.yaml", cwd=tmp_path)
        assert "1 event could not be used and is in quarantine:\n  1 × x: expected a number\n" in done.stdout
        (tmp_path / "new.csv").write_text("x\n1\n")
        done = stream_em("score", "output/model.arrow", "new.csv", "-o", "new.parquet", cwd=tmp_path)
        assert "1 event from new.csv scored" in done.stdout

    def test_a_quote_left_open_in_a_stream_is_told(self, tmp_path):
        write_job(tmp_path, source={"path": "-"}, output={"picture": None})
        given = 'x,y\n1,"2\n' + "3,4.5\n" * 40_000
        done = stream_em("run", "job.yaml", cwd=tmp_path, given=given, code=1)
        assert "standard input: an event is longer than 131,072 bytes" in done.stderr

    def test_when_no_event_can_be_used_the_commonest_reason_is_told(self, tmp_path):
        (tmp_path / "events.jsonl").write_text('{"y": 1.0}\n' * 20)
        write_job(tmp_path, source={"path": "events.jsonl"}, schema={"fields": {"x": "numeric"}})
        for command in ("run", "fit"):
            done = stream_em(command, "job.yaml", cwd=tmp_path, code=1)
            assert "none of its 20 events could be used; 20 of them because of y:" in done.stderr
            assert (
                "; the first: events.jsonl, event 0 (line 1), field 'y': 1.0: no field of the schema: to use"
                in done.stderr
            )

    @pytest.mark.parametrize("verb", ["run", "fit"])
    def test_an_id_that_was_left_in_is_told(self, tmp_path, verb):
        table = events(600).select(["id", "x", "country"])
        pq.write_table(
            table.append_column("shop", pa.array([f"s{i % 90}" for i in range(600)])), tmp_path / "e.parquet"
        )
        write_job(tmp_path, source={"path": "e.parquet"}, output={"picture": None})
        done = stream_em(verb, "job.yaml", "schema.max_categories=40", cwd=tmp_path)
        hint = "field 'id': nearly every value is none of the 40 that are kept; is it an id? Added to source.exclude,"
        assert hint in done.stdout
        assert done.stdout.count("is it an id?") == 1

    def test_numbers_that_were_stored_as_text_are_told(self, tmp_path):
        table = pa.table({"x": np.arange(600) % 7.0, "amount": [f"{i * 0.37:.2f}" for i in range(600)]})
        pq.write_table(table, tmp_path / "e.parquet")
        write_job(tmp_path, source={"path": "e.parquet"}, output={"picture": None})
        done = stream_em("run", "job.yaml", "schema.max_categories=40", cwd=tmp_path)
        assert "these are numbers written as text: convert the column to numbers. If it is an id, added" in done.stdout
        (tmp_path / "e.jsonl").write_text('{"x": 1.5, "amount": 2}\n{"x": 2.5, "amount": "2"}\n{"amount": "3"}\n' * 100)
        declared = ["source.path=e.jsonl", "schema.fields={x: numeric, amount: numeric}"]
        done = stream_em("run", "job.yaml", *declared, cwd=tmp_path)
        assert "more events could not be used than could: the model is that of the 100 events" in done.stdout

    def test_hard_but_legal_data(self, tmp_path):
        generator = np.random.default_rng(0)
        n = 1000
        table = pa.table(
            {
                "constant": np.full(n, 3.0),
                "offset": 1e8 + generator.normal(size=n),
                "tiny": 1e-8 * generator.normal(size=n),
                "gaps": pa.array(generator.normal(size=n), mask=generator.random(n) < 0.3),
            }
        )
        pq.write_table(table, tmp_path / "hard.parquet")
        pq.write_table(table.take([0] * n), tmp_path / "same.parquet")
        write_job(tmp_path, source={"path": "hard.parquet"})
        for path in ("hard.parquet", "same.parquet"):
            stream_em("run", "job.yaml", f"source.path={path}", cwd=tmp_path)
            mean, deviation = load(tmp_path / "output" / "model.arrow").marginals()
            assert np.isfinite(mean).all()
            assert (deviation > 0).all()
            scored = pq.read_table(tmp_path / "output" / "scored.parquet")
            assert np.isfinite(scored["log_prob"].to_numpy()[300:]).all()


class TestNothingIsOverwritten:
    """A job never writes over what it reads."""

    @pytest.fixture
    def job(self, tmp_path):
        (tmp_path / "data").mkdir()
        pq.write_table(events(600).select(["x", "y"]), tmp_path / "data" / "events.parquet")
        write_job(tmp_path, source={"path": "data/events.parquet"}, output={"picture": None})
        return tmp_path

    @pytest.mark.parametrize(
        "arguments",
        [
            ["output.folder=data", "output.scored_events=events.parquet"],
            ["output.folder=data", "output.scored_events=events.parquet", "source.path=data"],
            ["output.folder=data", "output.scored_events=events.parquet", "source.path=data/*.parquet"],
            ["output.folder=data", "output.snapshot=events.parquet", "source.path=[data/../data/events.parquet]"],
            ["output.folder=data/../data", "output.quarantine=events.parquet"],
            ["output.folder=link", "output.scored_events=events.parquet"],
            ["source.path=link.parquet", "output.folder=data", "output.scored_events=events.parquet"],
            ["output.folder=.", "output.scored_events=link.parquet"],
            ["output.folder=.", "output.snapshot=job.yaml"],
        ],
    )
    def test_run_refuses_to_write_over_its_source(self, job, arguments):
        (job / "link").symlink_to(job / "data")
        (job / "link.parquet").symlink_to(job / "data" / "events.parquet")
        before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
        done = stream_em("run", "job.yaml", *arguments, cwd=job, code=2)
        assert "is read by this job and would be overwritten" in done.stderr
        assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before

    def test_a_scored_file_or_a_quarantine_named_as_source_is_not_written_over(self, job):
        stream_em("run", "job.yaml", cwd=job)
        for name in ("scored.parquet", "quarantine.jsonl"):
            done = stream_em("run", "job.yaml", f"source.path=output/{name}", cwd=job, code=2)
            assert f"{name}: is read by this job" in done.stderr

    def test_score_refuses_as_well(self, job):
        stream_em("run", "job.yaml", cwd=job)
        (job / "output" / "model.arrow").rename(job / "m.arrow")
        (job / "m.parquet").symlink_to("m.arrow")
        for output in ("data/events.parquet", "m.parquet"):
            before = (job / output).read_bytes()
            done = stream_em("score", "m.arrow", "data/events.parquet", "-o", output, cwd=job, code=2)
            assert "would be overwritten" in done.stderr
            assert (job / output).read_bytes() == before
        (job / "d.parquet").mkdir()
        done = stream_em("score", "m.arrow", "data", "-o", "d.parquet", cwd=job, code=2)
        assert "d.parquet: is a folder" in done.stderr

    @pytest.mark.parametrize("path", ["data", "data/**/*.parquet"])
    def test_a_folder_that_holds_the_output_is_read_without_it(self, job, path):
        arguments = [f"source.path={path}", "output.folder=data/output"]
        assert "600 events" in stream_em("run", "job.yaml", *arguments, cwd=job).stdout
        for command in ("run", "fit"):
            done = stream_em(command, "job.yaml", *arguments, "source.format=parquet", cwd=job)
            assert done.stdout.count("not read, since this job writes them: data/output/scored.parquet\n") == 1
            assert "600 events" in done.stdout


class TestRolledFiles:
    def test_each_holds_the_events_up_to_a_checkpoint_and_those_of_an_earlier_job_go(self, tmp_path):
        (tmp_path / "data").mkdir()
        pq.write_table(events(), tmp_path / "data" / "events.parquet")
        write_job(tmp_path, source={"path": "data", **SOURCE}, output={"picture": None, "folder": "data/output"})
        for roll, rows in ((500, [500] * 6), (1000, [1000] * 3), (1100, [1500] * 2)):
            options = ["output.checkpoint_every=500", f"output.roll_events={roll}"]
            done = stream_em("run", "job.yaml", *options, cwd=tmp_path)
            assert "wrote data/output/scored-*.parquet" in done.stdout
            files = sorted((tmp_path / "data" / "output").glob("*.parquet"))
            assert [path.name for path in files] == [f"scored-{i:06}.parquet" for i in range(1, len(rows) + 1)]
            tables = [pq.read_table(path) for path in files]
            assert [table.num_rows for table in tables] == rows
            assert pa.concat_tables(tables).select(events().column_names).equals(events())


class TestHalfCharacters:
    def test_they_cost_their_event_and_are_written_as_escapes(self, tmp_path):
        lines = [json.dumps(event) for event in events(400).select(["x", "country"]).to_pylist()]
        lines[10] = '{"x": 1.0, "country": "\\ud800"}'
        lines[11] = '{"x": "\\udfff", "country": "DE"}'
        lines[12] = '{"x": 1.0, "\\ud800": "DE"}'
        lines[13] = '{"x": 1.0, "country": "\\ud83d\\ude00"}'
        lines[14] = '{"x": ' + "[" * 600 + "]" * 600 + "}"
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        write_job(tmp_path, source={"path": "events.jsonl"}, output={"picture": None})
        stream_em("run", "job.yaml", cwd=tmp_path)
        text = (tmp_path / "output" / "quarantine.jsonl").read_text(encoding="utf-8")
        records = sorted(map(json.loads, text.splitlines()), key=lambda record: record["index"])
        assert [record["index"] for record in records] == [10, 11, 12, 14]
        assert [record["value"] for record in records[:2]] == ["\ud800", "\udfff"]
        done = stream_em("run", "job.yaml", "output.on_error=raise", cwd=tmp_path, code=1)
        assert "\\ud800" in done.stderr


class TestNewFields:
    @pytest.fixture
    def job(self, tmp_path):
        lines = [json.dumps({"x": float(i % 9)} | ({"y": float(i % 5)} if i >= 600 else {})) for i in range(1000)]
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        write_job(tmp_path, source={"path": "events.jsonl"}, output={"picture": None})
        return tmp_path

    def test_refused(self, job):
        done = stream_em("run", "job.yaml", cwd=job)
        assert "400 events could not be used" in done.stdout
        assert (
            "y: no field of the schema: to use such events, set source.exclude=[y] or schema.unknown=ignore (exp"
            in done.stdout
        )
        assert load(job / "output" / "model.arrow").n_events == 600

    def test_ignored(self, job):
        done = stream_em("run", "job.yaml", "schema.unknown=ignore", cwd=job)
        assert "field 'y' is not in the schema and was ignored in 400 events" in done.stdout
        assert load(job / "output" / "model.arrow").schema.names == ("x",)

    @pytest.mark.parametrize("verb", ["run", "fit"])
    @pytest.mark.parametrize("grows", [False, True])
    def test_ignored_fields_of_events_that_cannot_be_used_are_counted_too(self, job, verb, grows):
        category = {"c": "a"} if grows else {}
        lines = [{"x": float(i % 9), **category} for i in range(750)]
        lines[250:500] = [{"y": 1.0}] * 250
        (job / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
        fields = "schema.fields={x: numeric, c: category}" if grows else "schema.fields={x: numeric}"
        done = stream_em(verb, "job.yaml", "schema.unknown=ignore", fields, cwd=job)
        assert "field 'y' is not in the schema and was ignored in 250 events" in done.stdout
        if verb == "run":
            assert len(pq.read_table(job / "output" / "scored.parquet")) == 500

    def test_added_where_one_family_was_named_for_all(self, job):
        text = (job / "events.jsonl").read_text().rstrip("\n")
        (job / "events.jsonl").write_text(text + "".join(f'\n{{"x": {i}.0, "c": "{"ab"[i % 2]}"}}' for i in range(300)))
        stream_em("run", "job.yaml", "schema.unknown=add", "model.families={x: gaussian}", cwd=job)
        assert load(job / "output" / "model.arrow").schema.names == ("x", "y", "c")

    def test_added(self, job):
        stream_em("run", "job.yaml", "schema.unknown=add", cwd=job)
        learner = load(job / "output" / "model.arrow")
        assert learner.schema.names == ("x", "y")
        assert learner.n_events == 1000

    def test_a_field_of_another_kind_is_added_with_the_family_of_its_kind(self, job):
        text = (job / "events.jsonl").read_text().rstrip("\n")
        (job / "events.jsonl").write_text(text + "".join(f'\n{{"x": {i}.0, "c": "{"ab"[i % 2]}"}}' for i in range(300)))
        stream_em("run", "job.yaml", "schema.unknown=add", "schema.fields={x: numeric, n: count}", cwd=job)
        learner = load(job / "output" / "model.arrow")
        assert learner.schema.names == ("x", "n", "y", "c")
        assert learner.n_events == 1300

    def test_a_field_that_the_model_cannot_take_is_named(self, job):
        text = (job / "events.jsonl").read_text()
        (job / "events.jsonl").write_text(text + '\n{"x": 1.0, "c": "a"}')
        done = stream_em("run", "job.yaml", "schema.unknown=add", "model.family=gaussian", cwd=job, code=1)
        assert "a new field came after 1,000 events" in done.stderr


def test_a_source_shorter_than_the_warm_up_still_gives_components(tmp_path):
    pq.write_table(events(200).select(["x", "y"]), tmp_path / "events.parquet")
    write_job(tmp_path, source={"path": "events.parquet"}, output={"picture": None})
    done = stream_em("run", "job.yaml", cwd=tmp_path)
    assert "the source ended within the warm-up of 300 events" in done.stdout
    mean = load(tmp_path / "output" / "model.arrow").marginals()[0]
    assert np.ptp(mean, axis=0).min() > 5


def test_a_prior_that_outweighs_the_warm_up_is_told(ran, tmp_path):
    folder, done = ran
    assert "components may blur" not in done.stdout
    write_job(tmp_path, source={"path": str(folder / "events.parquet"), **SOURCE}, output={"picture": None})
    done = stream_em("run", "job.yaml", "model.prior_weight=100", cwd=tmp_path)
    assert "weigh 300 events, the warm-up that they are made from only 300: components may blur" in done.stdout


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (
                ["run", "job.yaml", "model.n_component=3"],
                2,
                "model.n_component: no such key; did you mean 'n_components'?",
            ),
            (
                ["run", "job.yaml", "learner.schedule.half_life=3600"],
                2,
                "learner.schedule.half_life: no such key of this kind; set learner.schedule.kind to one that has it",
            ),
            (
                ["run", "job.yaml", "learner.schedule={kind: constant, half_life: 3600}"],
                2,
                "learner.schedule.half_life: no such key of this kind; set learner.schedule.kind to one that has it",
            ),
            (["run", "nowhere.yaml"], 2, "nowhere.yaml: No such file"),
            (["run", "job.yaml", "model.family=gaussian"], 2, "'country' is of kind 'category'"),
            (
                ["run", "job.yaml", "model.families.z=poisson"],
                2,
                "model.families.z: the events have no such field",
            ),
            (
                ["run", "job.yaml", "source.path=missing.parquet"],
                1,
                "missing.parquet: no such file or folder",
            ),
            (
                ["run", "job.yaml", "source.path=cut.parquet"],
                1,
                "cut.parquet: cannot be read as Parquet, it may be truncated",
            ),
            (["run", "job.yaml", "source.path=empty.csv"], 1, "empty.csv: holds no events"),
            (["run", "job.yaml", "source.label=frod"], 1, "has no column 'frod'; did you mean 'fraud'?"),
            (
                ["run", "job.yaml", "schema.unknown=refuse", "schema.fields={x: numeric, y: numeric, ok: flag}"],
                1,
                "events.parquet: has columns that are no field of the schema: 'country', 'items'; to use such events, "
                "set source.exclude=[id, country, items] or schema.unknown=ignore",
            ),
            (
                ["run", "job.yaml", "source.exclude=[id]", "source.path=scored.parquet"],
                1,
                "set output.prefix",
            ),
            (["fit", "job.yaml", "source.path=-"], 1, "this one can be read only once"),
            (["show", "job.yaml"], 1, "job.yaml: not a stream_em snapshot, or a damaged one"),
            (["show", "nowhere.arrow"], 1, "nowhere.arrow: there is no such file; a snapshot is what run"),
            (["show", "."], 1, "is a folder, not a snapshot"),
            (["run", "job.yaml", "output.folder=events.parquet"], 1, "events.parquet: File exists"),
            (["plot", "job.yaml", "-o", "picture.bmp"], 1, "job.yaml"),
            (
                ["score", "job.yaml", "events.parquet", "-o", "s.csv"],
                2,
                "--output s.csv: scores are written as Parquet",
            ),
            (["run", "job.yaml", "output.scored_events=s.csv"], 2, "scored_events: is written as Parquet"),
            (["merge", "job.yaml", "-o", "merged.arrow"], 2, "merge needs two snapshots or more"),
            (["score", "job.yaml"], 2, "Missing argument"),
            (["frobnicate"], 2, "No such command"),
        ],
    )
    def test_one_message_and_an_exit_code(self, tmp_path, arguments, code, message):
        table = events(50)
        pq.write_table(table, tmp_path / "events.parquet")
        pq.write_table(table.append_column("component", table["items"]), tmp_path / "scored.parquet")
        (tmp_path / "cut.parquet").write_bytes((tmp_path / "events.parquet").read_bytes()[:-50])
        (tmp_path / "empty.csv").write_text(",".join(table.column_names) + "\n")
        write_job(tmp_path, source={"path": "events.parquet", **SOURCE}, learner={"warm_up": 20})
        done = stream_em(*arguments, cwd=tmp_path, given="", code=code)
        assert message in " ".join(done.stderr.split())
        assert not list(tmp_path.rglob("output/*")), "a failed job left files behind"


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_finishes_the_batch_and_writes_everything(self, tmp_path, number):
        write_job(tmp_path, source={"path": "-"}, output={"picture": None})
        process = start(
            "run", "job.yaml", cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        stream = events(620).select(["x", "y", "country"]).to_pylist()
        process.stdin.write("".join(json.dumps(event) + "\n" for event in stream))
        process.stdin.flush()
        # It has begun to listen to signals once its quarantine is there, and then waits for more events.
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("output/.*quarantine.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        wait_until_idle(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert "stopped by" in out
        # Two whole batches of 250, and the 120 events that were waiting for a batch to be full.
        assert "620 events from standard input" in out
        assert load(tmp_path / "output" / "model.arrow").n_events == 620
        assert pq.read_table(tmp_path / "output" / "scored.parquet").num_rows == 620

    def test_a_killed_job_leaves_nothing_in_the_way_and_two_jobs_do_not_share_a_file(self, tmp_path):
        write_job(tmp_path, source={"path": "-"}, output={"picture": None})
        pq.write_table(events(600).select(["x", "y"]), tmp_path / "events.parquet")
        process = start("run", "job.yaml", cwd=tmp_path, stdin=subprocess.PIPE)
        process.stdin.write("x\n1.0\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("output/.*quarantine.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        for command in ("run", "fit"):
            arguments = [
                "source.path=events.parquet",
                "output.quarantine=other.jsonl",
                "output.scored_events=o.parquet",
            ]
            done = stream_em(command, "job.yaml", *arguments, cwd=tmp_path, code=1)
            assert "model.arrow: another job is writing this file now" in done.stderr
        done = stream_em(
            "run", "job.yaml", "source.path=events.parquet", "output.snapshot=o.arrow", cwd=tmp_path, code=1
        )
        assert "quarantine.jsonl: another job is writing this file now" in done.stderr
        process.kill()
        process.wait()
        process.stdin.close()
        assert list(tmp_path.glob("output/.*"))
        stream_em("run", "job.yaml", "source.path=events.parquet", cwd=tmp_path)
        assert not list(tmp_path.glob("output/.*"))

    def test_a_reader_that_goes_away_is_no_error(self, ran):
        folder, _ = ran
        command = " ".join([*COMMAND, "show", "output/model.arrow"])
        done = subprocess.run(
            f"{command} | true", shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr


class TestFit:
    def test_it_is_batch_em_over_the_whole_source(self, ran, tmp_path):
        folder, _ = ran
        arguments = [f"source.path={folder / 'events.parquet'}", "learner.max_iter=20"]
        write_job(tmp_path, source={"path": "later", **SOURCE})
        done = stream_em("fit", "job.yaml", *arguments, cwd=tmp_path)
        saved = load(tmp_path / "output" / "model.arrow")
        assert isinstance(saved, BatchEM)
        assert saved.n_events == 3000
        assert f"{len(saved.history)} iterations" in done.stdout
        table = events().drop_columns(["id", "fraud"])
        expected = BatchEM(saved.model, max_iter=20, seed=0).fit(lambda: iter([table]))
        np.testing.assert_allclose(saved.history, expected.history, rtol=1e-9)
        assert (tmp_path / "output" / "picture.png").stat().st_size > 0
        again = stream_em("score", "output/model.arrow", "job.yaml", arguments[0], cwd=tmp_path)
        (rated,) = re.findall("^ROC-AUC .*", done.stdout, re.M)
        assert rated in again.stdout

    def test_a_bad_event_is_counted_once_though_it_is_read_in_every_pass(self, tmp_path):
        lines = [json.dumps(event) for event in events(500).select(["x", "y"]).to_pylist()]
        lines[7] = "{"
        lines[8] = '{"x": "a", "y": 1}'
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        write_job(tmp_path, source={"path": "events.jsonl"}, output={"picture": None})
        done = stream_em("fit", "job.yaml", cwd=tmp_path)
        assert "2 events could not be used" in done.stdout
        assert len((tmp_path / "output" / "quarantine.jsonl").read_text().splitlines()) == 2
        assert load(tmp_path / "output" / "model.arrow").n_events == 498


class TestWhatIsTold:
    def test_the_fields_and_kinds_and_those_that_may_be_ids(self, tmp_path):
        table = events(600).append_column("number", pa.array(range(600))).append_column("again", pa.array([1, 2] * 300))
        pq.write_table(table, tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", **SOURCE}, output={"picture": None})
        told = "fields of the model: x (numeric), y (numeric), country (category), ok (flag), items (numeric), "
        for command in ("run", "fit"):
            done = stream_em(command, "job.yaml", cwd=tmp_path)
            assert told + "number (numeric), again (numeric)\n" in done.stdout
            (hint,) = re.findall("^.*is it an id, or a time.*", done.stdout, re.M)
            assert hint.startswith("field 'number': ")
            assert "Added to source.exclude, it is kept from the model" in hint
        declared = stream_em("run", "job.yaml", "schema.fields={number: count}", "schema.unknown=ignore", cwd=tmp_path)
        assert "is it an id" not in declared.stdout

    def test_numbers_of_json_lines_as_well(self, tmp_path):
        lines = [json.dumps({"number": i, "x": float(i), "again": i // 2}) for i in range(600)]
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        write_job(tmp_path, source={"path": "events.jsonl"}, output={"picture": None})
        done = stream_em("run", "job.yaml", cwd=tmp_path)
        assert re.findall("field '(.*)': whole numbers", done.stdout) == ["number"]

    def test_many_fields_are_counted(self, tmp_path):
        generator = np.random.default_rng(0)
        pq.write_table(pa.table({f"x{i}": generator.normal(size=300) for i in range(25)}), tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet"}, output={"picture": None})
        assert "x19 (numeric) and 5 more\n" in stream_em("run", "job.yaml", cwd=tmp_path).stdout

    def test_that_event_time_does_nothing_under_a_schedule_without_a_clock(self, tmp_path):
        pq.write_table(events(1000), tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", "time": "x", **SOURCE}, output={"picture": None})
        told = "source.time=x: the past does not fade by the clock under learner.schedule robbins_monro"
        assert told in stream_em("run", "job.yaml", cwd=tmp_path).stdout
        half_life = "learner.schedule={kind: half_life, half_life: 3600}"
        assert "does not fade" not in stream_em("run", "job.yaml", half_life, cwd=tmp_path).stdout

    def test_how_to_keep_columns_that_are_no_numbers_nor_text_from_the_model(self, tmp_path):
        table = events(300).append_column("at", pa.array([np.datetime64(i, "s") for i in range(300)]))
        pq.write_table(table.append_column("raw", pa.array([b"x"] * 300)), tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", **SOURCE}, output={"picture": None})
        for command in ("run", "fit"):
            done = stream_em(command, "job.yaml", cwd=tmp_path, code=1)
            assert "column 'at' has type timestamp[" in done.stderr
            (remedy,) = re.findall(r"source\.exclude=\[.*\]", done.stderr)
            assert remedy == "source.exclude=[id, at, raw]"
        assert "300 events from" in stream_em("run", "job.yaml", remedy, cwd=tmp_path).stdout


class TestSnapshots:
    def test_score_writes_what_the_model_says_and_carries_the_other_columns(self, ran, tmp_path):
        folder, _ = ran
        fresh = events(500, seed=1)
        pa_csv.write_csv(fresh, tmp_path / "fresh.csv")
        snapshot = folder / "output" / "model.arrow"
        done = stream_em("score", snapshot, "fresh.csv", "-o", "s.parquet", "source.label=fraud", cwd=tmp_path)
        scored = pq.read_table(tmp_path / "s.parquet")
        prediction = load(snapshot).score_events(fresh.drop_columns(["id", "fraud"]))
        np.testing.assert_allclose(scored["log_prob"].to_numpy(), prediction.log_prob, rtol=1e-9)
        assert scored["component"].to_pylist() == prediction.component.tolist()
        assert scored["id"].to_pylist() == fresh["id"].to_pylist()
        assert "ROC-AUC of -log p(x) against the labels: " in done.stdout

    def test_score_takes_the_source_of_a_job(self, ran):
        folder, _ = ran
        stream_em("score", "output/model.arrow", "job.yaml", "output.folder=scores", cwd=folder)
        assert pq.read_table(folder / "scores" / "scored.parquet").num_rows == 3000

    def test_score_replaces_what_is_there_only_where_it_is_named(self, ran, tmp_path):
        folder, _ = ran
        snapshot, path = folder / "output" / "model.arrow", folder / "output" / "scored.parquet"
        before = path.read_bytes()
        done = stream_em("score", snapshot, "job.yaml", cwd=folder, code=2)
        assert "output/scored.parquet: is there already, and may be what run wrote" in done.stderr
        assert path.read_bytes() == before
        keys = [folder / "events.parquet", "source.exclude=[id, fraud]"]
        stream_em("score", snapshot, *keys, cwd=tmp_path)
        quarantined = (folder / "output" / "quarantine.jsonl").stat()
        stream_em("score", snapshot, *keys, "-o", folder / "output" / "again.parquet", cwd=tmp_path)
        assert (folder / "output" / "quarantine.jsonl").stat() == quarantined
        assert (folder / "output" / "again-quarantine.jsonl").read_text() == ""
        for name in ("again.parquet", "again-quarantine.jsonl"):
            (folder / "output" / name).unlink()
        (tmp_path / "scored.parquet").rename(tmp_path / "first.parquet")
        (tmp_path / "quarantine.jsonl").write_text('{"event": 1}')
        assert "quarantine.jsonl: is there already" in stream_em("score", snapshot, *keys, cwd=tmp_path, code=2).stderr
        (tmp_path / "first.parquet").rename(tmp_path / "scored.parquet")
        overridden = ["output.folder=elsewhere", "output.scored_events=other.parquet"]
        stream_em("score", snapshot, *keys, *overridden, "-o", "named.parquet", cwd=tmp_path)
        assert (tmp_path / "named.parquet").exists()
        assert not (tmp_path / "elsewhere").exists()
        assert "scored.parquet: is there already" in stream_em("score", snapshot, *keys, cwd=tmp_path, code=2).stderr
        again = stream_em("score", snapshot, *keys, "-o", "scored.parquet", cwd=tmp_path)
        assert "wrote scored.parquet" in again.stdout

    @pytest.mark.parametrize("key", ["label=ok", "time=x", "weight=y", "exclude=[id, country]"])
    def test_score_does_not_keep_a_field_from_the_model_that_learned_it(self, ran, tmp_path, key):
        folder, _ = ran
        done = stream_em(
            "score", folder / "output/model.arrow", folder / "events.parquet", f"source.{key}", cwd=tmp_path, code=2
        )
        role, name = key.rstrip("]").split("=")
        assert f"source.{role}: {name.split(' ')[-1]!r} is a field of the model in" in done.stderr

    def test_show_lists_every_component(self, ran):
        folder, _ = ran
        done = stream_em("show", "output/model.arrow", cwd=folder)
        learner = load(folder / "output" / "model.arrow")
        for identity, weight in zip(learner.parameters.component_ids, learner.parameters.weights, strict=True):
            assert re.search(rf"{identity} .* {weight:.2%}", done.stdout)
        assert "3,000" in done.stdout

    def test_plot_draws_beside_the_snapshot_or_where_told(self, ran, tmp_path):
        folder, _ = ran
        stream_em("plot", folder / "output" / "model.arrow", "-o", "sub.svg", cwd=tmp_path)
        assert "<svg" in (tmp_path / "sub.svg").read_text()
        (tmp_path / "odd.png").write_bytes((folder / "output" / "model.arrow").read_bytes())
        done = stream_em("plot", "odd.png", cwd=tmp_path, code=2)
        assert "odd.png: is the snapshot and would be overwritten" in done.stderr

    def test_merge_adds_what_two_learned(self, ran, tmp_path):
        folder, _ = ran
        learner = load(folder / "output" / "model.arrow")
        workers = [learner.fork(), learner.fork()]
        for number, worker in enumerate(workers):
            worker.update(events(500, seed=number + 3).drop_columns(["id", "fraud"]))
            save(worker, tmp_path / f"{number}.arrow")
        stream_em("merge", "0.arrow", "1.arrow", "-o", "both.arrow", cwd=tmp_path)
        both, expected = load(tmp_path / "both.arrow"), workers[0].merge(workers[1])
        assert both.n_events == expected.n_events
        np.testing.assert_allclose(both.parameters.weights, expected.parameters.weights, rtol=1e-12)

    def test_strangers_do_not_merge(self, ran, tmp_path):
        folder, _ = ran
        pq.write_table(events(seed=2), tmp_path / "others.parquet")
        write_job(tmp_path, source={"path": "others.parquet", **SOURCE}, output={"picture": None})
        stream_em("run", "job.yaml", cwd=tmp_path)
        own = tmp_path / "output" / "model.arrow"
        done = stream_em("merge", folder / "output" / "model.arrow", own, "-o", "both.arrow", cwd=tmp_path, code=1)
        assert "do not merge" in done.stderr
        assert not (tmp_path / "both.arrow").exists()


class TestOptions:
    def test_labels_that_are_words(self, tmp_path):
        table = events()
        words = np.array(["fine", "fraud"])[table["fraud"].to_numpy()]
        table = table.set_column(6, "fraud", pa.array(words))
        pq.write_table(table, tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", **SOURCE}, output={"picture": None})
        assert "source.anomaly_labels" in stream_em("run", "job.yaml", cwd=tmp_path).stdout
        done = stream_em("run", "job.yaml", "source.anomaly_labels=[fraud]", cwd=tmp_path)
        assert float(re.search(r"after the warm-up: ([\d.]+)", done.stdout).group(1)) > 0.9

    def test_half_life_needs_and_uses_event_time(self, tmp_path):
        generator = np.random.default_rng(0)
        n = 2000
        table = pa.table({"x": generator.normal(size=n) + np.repeat([0.0, 50.0], n // 2), "t": np.arange(n)})
        pq.write_table(table, tmp_path / "events.parquet")
        schedule = "learner.schedule={kind: half_life, half_life: 100}"
        write_job(tmp_path, source={"path": "events.parquet", "time": "t"}, output={"picture": None})
        means = []
        for arguments in ([], [schedule]):
            stream_em("run", "job.yaml", "model.n_components=1", *arguments, cwd=tmp_path)
            means.append(load(tmp_path / "output" / "model.arrow").marginals()[0].item())
        assert means[0] < 49
        assert means[1] == pytest.approx(50, abs=0.5)

    def test_wrong_dates_are_counted_and_cost_nothing(self, tmp_path):
        generator = np.random.default_rng(0)
        n = 2000
        time = np.arange(float(n))
        time[100::100] += 1e9
        table = pa.table({"x": generator.normal(size=n) + np.repeat([0.0, 50.0], n // 2), "t": time})
        pq.write_table(table, tmp_path / "events.parquet")
        schedule = "learner.schedule={kind: half_life, half_life: 100}"
        write_job(tmp_path, source={"path": "events.parquet", "time": "t"}, output={"picture": None})
        done = stream_em("run", "job.yaml", "model.n_components=1", schedule, cwd=tmp_path)
        assert "19 events were dated further ahead" in " ".join(done.stdout.split())
        assert load(tmp_path / "output" / "model.arrow").marginals()[0].item() == pytest.approx(50, abs=0.5)

    def test_components_come_and_go_with_the_events(self, tmp_path):
        generator = np.random.default_rng(1)
        early, late = np.array([[0.0, 0.0], [9.0, 0.0]]), np.array([[30.0, 30.0], [30.0, 40.0], [40.0, 30.0]])
        centers = [early[generator.integers(2, size=5_000)], late[generator.integers(3, size=25_000)]]
        points = np.concatenate(centers) + generator.normal(size=(30_000, 2))
        pq.write_table(pa.table({"x": points[:, 0], "y": points[:, 1]}), tmp_path / "events.parquet")
        learner = {"structure": "adaptive_components", "schedule": {"kind": "constant", "value": 0.05}}
        write_job(
            tmp_path,
            source={"path": "events.parquet"},
            learner={**SMALL["learner"], **learner},
            model={"n_components": 5},
        )
        done = stream_em("run", "job.yaml", cwd=tmp_path)
        assert re.search(r"components: \d+ born, \d+ died, \d+ pairs merged, [1-9]\d* split", done.stdout)
        parameters = load(tmp_path / "output" / "model.arrow").parameters
        heavy = parameters.weights > 0.2
        found = parameters.components.mean[heavy].round().tolist()
        assert sorted(found) == [[30.0, 30.0], [30.0, 40.0], [40.0, 30.0]]
        scored = pq.read_table(tmp_path / "output" / "scored.parquet")
        assert scored.num_rows == 30_000
        last = np.unique(scored["component"][-2_000:].to_numpy())
        assert set(parameters.component_ids[heavy]) <= set(last)
        assert (tmp_path / "output" / "picture.png").exists()

    def test_a_memory_too_short_for_the_components_is_told(self, ran, tmp_path):
        folder, _ = ran
        changes = ["learner.structure=adaptive_components", "learner.schedule={kind: constant, value: 0.9}"]
        done = stream_em(
            "run", folder / "job.yaml", *changes, "model.n_components=100", f"source.path={folder}/events.parquet",
            f"output.folder={tmp_path}", cwd=tmp_path, code=2,
        )  # fmt: skip
        assert "learner: 100 components of" in done.stderr

    def test_families_by_kind_and_by_name(self, tmp_path):
        pq.write_table(events(), tmp_path / "events.parquet")
        fields = {"x": "numeric", "y": "numeric", "country": "category", "ok": "flag", "items": "count"}
        write_job(
            tmp_path,
            source={"path": "events.parquet", **SOURCE},
            schema={"fields": fields},
            output={"picture": None, "scored_events": None},
        )
        stream_em("run", "job.yaml", "model.covariance_type=diag", cwd=tmp_path)
        learner = load(tmp_path / "output" / "model.arrow")
        factors = learner.model.family.bind(learner.schema.fields).factors
        names = sorted(type(factor.family).__name__ for factor in factors)
        assert names == ["Bernoulli", "Categorical", "Gaussian", "Poisson"]
        assert learner.model.family.others == "diag"
        stream_em("run", "job.yaml", "model.families.items=gaussian", cwd=tmp_path)
        families = load(tmp_path / "output" / "model.arrow").model.family.families
        assert ("x", "y", "items") in families
        assert not (tmp_path / "output" / "scored.parquet").exists()

    def test_weights(self, tmp_path):
        table = events(1000).select(["x", "y"])
        weighted = table.append_column("w", pa.array([2.0] * 500 + [-1.0] + [0.5] * 499))
        pq.write_table(weighted, tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", "weight": "w"}, output={"picture": None})
        stream_em("run", "job.yaml", cwd=tmp_path)
        (record,) = map(json.loads, (tmp_path / "output" / "quarantine.jsonl").read_text().splitlines())
        assert (record["index"], record["field"], record["value"]) == (500, "w", -1.0)
        assert pq.read_table(tmp_path / "output" / "scored.parquet")["log_prob"].null_count == 300
        assert load(tmp_path / "output" / "model.arrow").schema.names == ("x", "y")

    def test_events_without_weight_do_not_end_the_warm_up(self, tmp_path):
        weight = np.ones(1000)
        weight[50:150] = 0.0
        table = events(1000).select(["x", "y"]).append_column("w", pa.array(weight))
        pq.write_table(table, tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", "weight": "w"}, output={"picture": None})
        done = stream_em("run", "job.yaml", cwd=tmp_path)
        assert "400 events came within the warm-up" in done.stdout

    @pytest.mark.parametrize("batch_size", [1, 100, 500])
    def test_a_start_without_any(self, tmp_path, batch_size):
        weight = np.ones(1000)
        weight[:300] = 0.0
        table = events(1000).select(["x", "y"]).append_column("w", pa.array(weight))
        pq.write_table(table, tmp_path / "events.parquet")
        write_job(tmp_path, source={"path": "events.parquet", "weight": "w"}, output={"picture": None})
        stream_em("run", "job.yaml", f"learner.batch_size={batch_size}", cwd=tmp_path)
        assert pq.read_table(tmp_path / "output" / "scored.parquet")["log_prob"].null_count == 600
        pq.write_table(table.slice(0, 300), tmp_path / "events.parquet")
        for command in ("run", "fit"):
            done = stream_em(command, "job.yaml", cwd=tmp_path, code=1)
            assert "events.parquet: no event was learned from" in done.stderr


@pytest.mark.parametrize("command", ["", "run", "fit", "score", "show", "plot", "merge"])
def test_help_teaches_by_examples(command, tmp_path):
    done = stream_em(*command.split(), "--help", cwd=tmp_path)
    assert f"stream-em {command or 'run'} " in done.stdout
    if command == "run":
        assert "learner.schedule.alpha" in done.stdout
        assert re.search(r"^ schema *$", done.stdout, re.M)
        assert "One of refuse, ignore, add." in " ".join(done.stdout.split())
        assert "'source.exclude=[id, comment]'" in done.stdout


def test_a_terminal_gets_a_live_line(tmp_path):
    pty = pytest.importorskip("pty")
    n = 300_000
    pq.write_table(pa.table({"x": np.random.default_rng(0).normal(size=n)}), tmp_path / "events.parquet")
    write_job(tmp_path, source={"path": "events.parquet"}, output={"picture": None})
    main, terminal = pty.openpty()
    process = start("run", "job.yaml", cwd=tmp_path, stdout=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65_536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=60) == 0
    lines = re.findall(rb"([\d,]+) events \xc2\xb7 [\d,]+ events/s", shown)
    assert len(lines) >= 2, shown
    assert b"\x1b[" in shown
