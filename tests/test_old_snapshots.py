"""Snapshots of every released format version, see tests/data/snapshots/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_snapshots import FOLDER, learners, numbers

from stream_em import Batch, OnlineEM, load, read_metadata
from stream_em.store import FORMAT_VERSION, from_bytes, to_bytes

FILES = sorted(FOLDER.glob("format-*/*.arrow"))


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_an_old_snapshot_is_read_bit_for_bit_and_goes_on(path: Path) -> None:
    learner = load(path)
    found = numbers(learner)
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as expected:
        assert sorted(expected) == sorted(found)
        for name in expected:
            assert np.array_equal(found[name], expected[name], equal_nan=True), name
            assert found[name].dtype == expected[name].dtype
    assert read_metadata(path) == {"name": path.stem}
    again = from_bytes(to_bytes(learner))
    assert to_bytes(again) == to_bytes(learner)
    if isinstance(learner, OnlineEM):
        schema = learner.schema
        values = np.ones((2 if schema is None else len(schema), 30))
        events = values.T if schema is None else Batch(values, schema)
        time = np.full(30, 1_000.0)
        assert to_bytes(again.update(events, time=time)) == to_bytes(learner.update(events, time=time))
        assert np.isfinite(learner.log_prob(events)).all()


def test_every_kind_of_learner_has_a_snapshot_of_this_format() -> None:
    assert {name for name, _ in learners()} <= {
        path.stem for path in FILES if path.parent.name == f"format-{FORMAT_VERSION}"
    }
