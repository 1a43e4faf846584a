from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that, equal_to

from stream_em import BatchEM, Gaussian, Mixture, Schema, SchemaError
from stream_em.beam import ReadEvents, Refit, RefitError, RefitPerKey, RejectedEvent, infer_schema
from stream_em.columns import Roles
from stream_em.sources import SourceError
from stream_em.store import to_bytes

RUNNER = "FnApiRunner"
ONE = Mixture(Gaussian(), 1)
X = Schema({"x": "numeric"})
ANY = Schema(X.fields, unknown="ignore")
REJECTED_HERE: list[RejectedEvent] = []


def keep_here(event: RejectedEvent) -> None:
    REJECTED_HERE.append(event)


def test_a_column_that_some_files_lack_is_missing_there(tmp_path: Path) -> None:
    values = np.arange(8.0)
    pq.write_table(pa.table({"x": values, "y": values[::-1], "note": ["a"] * 8}), tmp_path / "whole.parquet")
    pq.write_table(pa.table({"x": values + 1}), tmp_path / "part.parquet")
    roles = Roles(exclude=("note",))
    refit = Refit(Mixture(Gaussian("diag"), 1), roles=roles, max_iter=2)
    learner, counts = refit.run(str(tmp_path / "*.parquet"), runner=RUNNER)
    assert (counts.n_events, counts.n_rejected) == (16, 0)
    assert learner.parameters.components.mean.ravel() == pytest.approx([4.0, 3.5])
    declared = Refit(ONE, schema=Schema({"x": "numeric", "y": "numeric"}), roles=roles, max_iter=1)
    counts = declared.run(str(tmp_path / "*.parquet"), runner=RUNNER).counts
    assert (counts.n_events, counts.n_rejected) == (8, 8)


def test_the_reason_why_no_field_can_be_inferred_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=r"first of the reasons being: .*a\.parquet.*'w'"):
        infer_schema(str(tmp_path / "a.parquet"), roles=Roles(weight="w"), runner=RUNNER)


def test_a_look_at_the_fields_passes_over_what_holds_no_events() -> None:
    twice = pa.table([[1.0], [2.0]], names=["x", "x"])
    elements: list[Any] = [5, np.array(5.0), np.zeros(3), twice, {"x": 1.0}]
    assert infer_schema(beam.Create(elements), runner=RUNNER).names == ("x",)
    with pytest.raises(SchemaError, match=r"all events were rejected.* events of type int are not supported"):
        infer_schema(beam.Create([5]), runner=RUNNER)


def test_a_key_that_cannot_be_told_costs_its_events_and_no_others() -> None:
    events: list[Any] = [{"k": "a", "x": 1.0}, {"x": 2.0}, {"k": "a", "x": 3.0}]
    twice = pa.table([["a"], ["b"], [1.0]], names=["k", "k", "x"])
    for key, given, reason in (
        (lambda event: event["k"], events, "the key function raised KeyError: 'k'"),
        ("k", [events[0], events[2], twice], "the frame has more than one column 'k', which holds the keys"),
    ):
        REJECTED_HERE.clear()
        with beam.Pipeline(RUNNER) as pipeline:
            fits = (
                pipeline | beam.Create(given) | RefitPerKey(ONE, schema=ANY, key=key, rejected_to=beam.Map(keep_here))
            )
            assert_that(fits | beam.MapTuple(lambda name, fit: (name, fit.n_events)), equal_to([("a", 2)]))
        assert [(one.reason, one.n_events) for one in REJECTED_HERE] == [(reason, 1)]


@pytest.mark.parametrize("damage", ["", "[]", "{"])
def test_settings_that_are_damaged_are_told(tmp_path: Path, damage: str) -> None:
    (tmp_path / "refit.json").write_text(damage)
    with pytest.raises(RefitError, match=r"refit\.json: is damaged.*delete the folder"):
        Refit(ONE, schema=X).run(beam.Create([{"x": 1.0}]), str(tmp_path), runner=RUNNER)


def test_snapshots_that_a_run_cannot_go_on_from_are_told(tmp_path: Path) -> None:
    events = beam.Create([{"x": value} for value in (1.0, 2.0, 4.0)])
    refit = Refit(ONE, schema=X, max_iter=2, tol=0.0)
    refit.run(events, str(tmp_path), runner=RUNNER)
    first, last = (tmp_path / "start-0" / f"iteration-000{number}.arrow" for number in (1, 2))
    whole = first.read_bytes()
    first.write_bytes(b"half a snapshot")
    with pytest.raises(RefitError, match=r"iteration-0001\.arrow.*delete the folder"):
        refit.run(events, str(tmp_path), runner=RUNNER)
    first.write_bytes(whole)
    last.write_bytes(to_bytes(BatchEM(ONE).fit([{"x": 1.0}, {"x": 2.0}])))
    with pytest.raises(RefitError, match=r"iteration-0002\.arrow: is a snapshot of something else.*delete the folder"):
        refit.run(events, str(tmp_path), runner=RUNNER)


def test_names_with_a_meaning_in_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / "a[1].parquet")
    with pytest.raises(SourceError, match=r"no file matches the pattern, though there is a file of that very name"):
        beam.Pipeline(RUNNER) | ReadEvents(str(tmp_path / "a[1].parquet"))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = Refit(ONE, max_iter=1).run("~/*.parquet", "~/run", runner=RUNNER)
    assert found.counts.n_events == 2
    assert (tmp_path / "run" / "model.arrow").exists()
