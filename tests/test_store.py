from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cases import CASES, NUMERIC, Case, assert_parameters_equal, draw_batch

from stream_em import (
    BatchEM,
    Categorical,
    Constant,
    Gaussian,
    HalfLife,
    Harmonic,
    MergeError,
    Mixture,
    OnlineEM,
    RobbinsMonro,
    Schema,
    SnapshotError,
    load,
    read_metadata,
    save,
)
from stream_em.families import specification_of_family
from stream_em.schedules import Schedule
from stream_em.snapshot_file import read_rows
from stream_em.store import (
    DIGEST_KEY,
    FORMAT_VERSION,
    HEADER_KEY,
    digest_of,
    from_bytes,
    remove_leftovers,
    to_bytes,
)

NUMBERS = np.random.default_rng(1).normal(size=(120, 3))


def online(case: Case, n_events: int = 60, **options: Any) -> OnlineEM:
    options = {"warm_up": 20, "batch_size": 16, **options}
    learner = OnlineEM(Mixture(case.family, 3), schema=case.schema, **options)
    batch = draw_batch(case, n_events, 3, missing=0.1, weighted=True)
    return learner.update(batch, time=np.arange(float(n_events)))


def assert_same_learner(actual: OnlineEM | BatchEM, expected: OnlineEM | BatchEM) -> None:
    assert type(actual) is type(expected)
    assert actual.model == expected.model
    assert actual.schema == expected.schema
    assert actual.n_events == expected.n_events
    assert actual.ignored_fields == expected.ignored_fields
    family = expected.model.bind(expected.schema).family if expected.schema else expected.model.family
    assert_parameters_equal(actual.parameters, expected.parameters, family)
    if expected.statistics is None:
        assert actual.statistics is None
        return
    assert actual.statistics is not None
    for name in ("log_likelihood", "half_life", "time"):
        assert getattr(actual.statistics, name) == getattr(expected.statistics, name)
    for name, part in expected.statistics.parts.items():
        for key, array in part.arrays().items():
            assert np.array_equal(actual.statistics.parts[name].arrays()[key], array)


@pytest.mark.parametrize("name", CASES)
def test_batch_learner_survives_the_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    fitted = BatchEM(Mixture(case.family, 3), max_iter=4, n_init=2, seed=5).fit(draw_batch(case, 60, 1, missing=0.2))
    save(fitted, tmp_path / "model.arrow")
    again = load(tmp_path / "model.arrow")
    assert isinstance(again, BatchEM)
    assert_same_learner(again, fitted)
    assert (again.history, again.converged) == (fitted.history, fitted.converged)
    for option in ("max_iter", "tol", "n_init", "seed_events", "n_threads", "seed", "origin"):
        assert getattr(again, option) == getattr(fitted, option)
    events = draw_batch(case, 20, 2)
    assert np.array_equal(again.log_prob(events), fitted.log_prob(events))
    with pytest.raises(MergeError, match="identical"):
        again.merge(fitted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n_events", "averaging"), [(8, False), (60, False), (60, True)])
def test_online_learner_goes_on_from_the_file_as_if_nothing_had_happened(
    name: str, n_events: int, averaging: bool, tmp_path: Path
) -> None:
    case = CASES[name]
    learner = online(case, n_events, averaging=averaging)
    assert learner.warming_up == (n_events < 20)
    save(learner, tmp_path / "model.arrow")
    again = load(tmp_path / "model.arrow")
    assert isinstance(again, OnlineEM)
    assert again.warming_up == learner.warming_up
    assert_same_learner(again, learner)
    for seed in (7, 8):
        more = draw_batch(case, 30, seed, missing=0.2)
        before, expected = again.predict_then_update(more), learner.predict_then_update(more)
        for found, wanted in zip(before, expected):
            assert np.array_equal(found, wanted)
    assert_same_learner(again, learner)
    assert to_bytes(again) == to_bytes(learner)


@pytest.mark.parametrize("schedule", [Harmonic(), RobbinsMonro(0.7, 2.0), Constant(0.1), HalfLife(12.5)])
def test_every_schedule_survives(schedule: Schedule) -> None:
    learner = online(CASES["product"], schedule=schedule)
    again = from_bytes(to_bytes(learner))
    assert isinstance(again, OnlineEM)
    assert again.schedule == schedule
    assert_same_learner(again, learner)
    more = draw_batch(CASES["product"], 40, 9)
    time = np.arange(40.0) + 60.0
    assert to_bytes(again.update(more, time=time)) == to_bytes(learner.update(more, time=time))


def test_learner_without_events_survives() -> None:
    for schema in (None, NUMERIC):
        learner = OnlineEM(Mixture(Gaussian(), 2, 0.5, "hard"), schema=schema, warm_up=30, seed=9, averaging=True)
        again = from_bytes(to_bytes(learner))
        assert isinstance(again, OnlineEM)
        assert again.schema == schema
        assert to_bytes(again.update(NUMBERS)) == to_bytes(learner.update(NUMBERS))


def test_initial_parameters_before_the_first_m_step_survive() -> None:
    start = online(CASES["gaussian_full"]).parameters
    learner = OnlineEM(Mixture(Gaussian(), 3), schema=NUMERIC, initial_parameters=start).update(NUMBERS[:10])
    again = from_bytes(to_bytes(learner))
    assert isinstance(again, OnlineEM)
    assert to_bytes(again.update(NUMBERS)) == to_bytes(learner.update(NUMBERS))


def test_fork_of_a_loaded_learner_merges_with_the_saved_one() -> None:
    learner = online(CASES["gaussian_full"])
    again = from_bytes(to_bytes(learner))
    assert isinstance(again, OnlineEM)
    merged = learner.merge(again.fork().update(NUMBERS))
    assert merged.n_events == learner.n_events + len(NUMBERS)


def test_schema_with_its_vocabulary_and_policy_survives() -> None:
    learner = OnlineEM(Mixture(Categorical(), 2), unknown="ignore", warm_up=2)
    learner.update([{"c": "é'\"/\n"}, {"c": ""}, {"c": "other"}, {"c": None, "d": "x"}])
    learner.update({"c": "é'\"/\n", "extra": 3})
    again = from_bytes(to_bytes(learner))
    assert again.schema == learner.schema
    assert again.ignored_fields == Counter({"extra": 1})


def test_settings_given_as_numpy_numbers_can_be_saved() -> None:
    learner = OnlineEM(Mixture(Gaussian(), np.int64(2)), batch_size=np.int32(50), seed=np.int64(3)).update(NUMBERS)
    again = from_bytes(to_bytes(learner))
    assert isinstance(again, OnlineEM)
    assert (again.batch_size, again.seed, again.model.n_components) == (50, 3, 2)


def test_metadata_is_kept(tmp_path: Path) -> None:
    metadata = {"source": "événements", "steps": [1, 2.5, None], "nested": {"a": True}}
    save(online(CASES["poisson"]), tmp_path / "model.arrow", metadata=metadata)
    assert read_metadata(tmp_path / "model.arrow") == metadata


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for metadata in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(SnapshotError, match="metadata"):
            save(online(CASES["poisson"]), tmp_path / "model.arrow", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_unfitted_batch_learner_is_refused() -> None:
    with pytest.raises(SnapshotError, match="fitted"):
        to_bytes(BatchEM(Mixture(Gaussian(), 2)))


class Estimator:
    def to_snapshot(self, path: Path) -> None: ...


@pytest.mark.parametrize(
    ("given", "hint"), [(3, "got int$"), ("model", "got str$"), (Estimator(), r"got Estimator: .*to_snapshot\(path\)$")]
)
def test_what_is_no_learner_is_refused(given: Any, hint: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"an OnlineEM or a BatchEM, {hint}"):
        save(given, tmp_path / "model.arrow")
    assert list(tmp_path.iterdir()) == []


def test_any_arrow_reader_opens_the_file(tmp_path: Path) -> None:
    learner = online(CASES["gaussian_diag"])
    save(learner, tmp_path / "model.arrow")
    with pa.ipc.open_file(tmp_path / "model.arrow") as reader:
        rows = {row["name"]: row for row in reader.read_all().to_pylist()}
    mean = rows["iterate/components/mean"]
    found = np.frombuffer(mean["data"], "<f8").reshape(mean["shape"])
    assert np.array_equal(found, learner.parameters.components.mean)


# Damage


@pytest.fixture(scope="module")
def content() -> bytes:
    return to_bytes(online(CASES["gaussian_diag"], 20))


def test_every_truncation_is_noticed(content: bytes) -> None:
    for length in range(len(content)):
        with pytest.raises(SnapshotError):
            from_bytes(content[:length])


def test_no_flipped_bit_changes_the_state_unnoticed(content: bytes) -> None:
    generator = np.random.default_rng(2)
    noticed = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(generator.integers(8))
        try:
            learner = from_bytes(bytes(damaged))
        except SnapshotError:
            noticed += 1
            continue
        # Only padding may change without being noticed.
        assert to_bytes(learner) == content
    assert noticed > len(content) // 2


def test_random_damage_is_noticed(content: bytes) -> None:
    generator = np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(content)
        start = int(generator.integers(len(content)))
        length = int(generator.integers(16, 200))
        damaged[start : start + length] = generator.bytes(length)
        try:
            learner = from_bytes(bytes(damaged))
        except SnapshotError:
            continue
        assert to_bytes(learner) == content


def test_other_files_are_refused(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0]})
    with pa.ipc.new_file(tmp_path / "table.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "empty.arrow").write_bytes(b"")
    (tmp_path / "text.arrow").write_text("hello")
    (tmp_path / "pickle.arrow").write_bytes(pickle.dumps({"format": 1}))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SnapshotError, match=path.name):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.arrow")


def rewritten(content: bytes, header: Any) -> bytes:
    with pa.ipc.open_file(pa.BufferReader(content)) as reader:
        rows = reader.read_all()
    sink = pa.BufferOutputStream()
    schema = rows.schema.with_metadata({**(rows.schema.metadata or {}), HEADER_KEY: header})
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(rows.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()


def test_newer_format_is_refused_by_name(content: bytes) -> None:
    newer = f'{{"format": {FORMAT_VERSION + 1}, "library": "9.9.9"}}'
    with pytest.raises(SnapshotError, match=rf"format {FORMAT_VERSION + 1}, written by stream_em 9\.9\.9"):
        from_bytes(rewritten(content, newer))


@pytest.mark.parametrize("header", ["", "null", "[1]", "{}", '{"format": "1"}', "[" * 100_000, b"\xff\xfe"])
def test_damaged_header_is_refused(content: bytes, header: str | bytes) -> None:
    with pytest.raises(SnapshotError, match="damaged"):
        from_bytes(rewritten(content, header))


def broken(learner: OnlineEM, **arrays: np.ndarray) -> bytes:
    """A snapshot whose digest is right and whose parameters or statistics are not."""
    components = learner.parameters.components
    for name, array in arrays.items():
        owner = components if hasattr(components, name) else learner.parameters
        object.__setattr__(owner, name, array)
    return to_bytes(learner)


SYMMETRIC = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("family", "arrays", "reason"),
    [
        ("gaussian_full", {"covariance": np.repeat(SYMMETRIC[None], 3, axis=0)}, "positive definite"),
        ("gaussian_full", {"covariance": np.triu(np.ones((3, 3, 3)))}, "symmetric"),
        ("gaussian_tied", {"covariance": SYMMETRIC}, "positive definite"),
        ("gaussian_diag", {"covariance": np.zeros((3, 3))}, "positive"),
        ("gaussian_spherical", {"covariance": np.full(3, -1.0)}, "positive"),
        ("gaussian_full", {"covariance": np.ones((3, 3))}, "shape"),
        ("gaussian_diag", {"mean": np.full((3, 3), np.nan)}, "finite"),
        ("gaussian_diag", {"mean": np.zeros((3, 2))}, "shape"),
        ("gaussian_diag", {"mean": np.zeros((2, 3)), "covariance": np.ones((2, 3))}, "components"),
        ("gaussian_diag", {"weights": np.array([0.5, 0.5, 0.5])}, "sum to 1"),
        ("gaussian_diag", {"weights": np.array([1.5, -0.5, 0.0])}, "positive"),
        ("gaussian_diag", {"component_ids": np.array([0, 0, 1])}, "ids"),
        ("poisson", {"mean": np.full((3, 2), -1.0)}, "means"),
        ("exponential", {"mean": np.zeros((3, 2))}, "means"),
        ("bernoulli", {"mean": np.full((3, 3), 2.0)}, "means"),
        ("categorical", {"probability": np.full((3, 7), -0.1)}, "probabilities"),
    ],
)
def test_impossible_parameters_are_refused(family: str, arrays: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(SnapshotError, match=reason):
        from_bytes(broken(online(CASES[family]), **arrays))


@pytest.mark.parametrize(
    ("part", "array", "value", "reason"),
    [
        ("moments", "weight", -1.0, "negative"),
        ("moments", "scatter", np.nan, "finite"),
        ("moments", "mean", np.inf, "finite"),
        ("components", "values", np.nan, "finite"),
        ("components", "values", -1.0, "negative"),
        ("moments", "scatter", -1.0, "negative"),
    ],
)
def test_impossible_statistics_are_refused(part: str, array: str, value: float, reason: str) -> None:
    learner = online(CASES["gaussian_diag"])
    assert learner.statistics is not None
    learner.statistics.parts[part].arrays()[array][0] = value
    with pytest.raises(SnapshotError, match=reason):
        from_bytes(to_bytes(learner))


# Writing


FULL_DISK = """
import resource, signal, sys
import numpy as np
from stream_em import Gaussian, Mixture, OnlineEM, save

learner = OnlineEM(Mixture(Gaussian(), 2)).update(np.zeros((300, 2)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save(learner, sys.argv[1])
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_save_without_room_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    save(online(CASES["poisson"]), path, metadata={"version": 1})
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert done.stdout == "OSError\n"
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["model.arrow"]


def test_save_that_cannot_rename_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model.arrow").mkdir()
    with pytest.raises(OSError, match="model"):
        save(online(CASES["poisson"]), tmp_path / "model.arrow")
    assert [one.name for one in tmp_path.iterdir()] == ["model.arrow"]


def test_save_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.arrow"
    for version in (1, 2):
        save(online(CASES["poisson"]), path, metadata={"version": version})
    assert read_metadata(path) == {"version": 2}
    assert [one.name for one in tmp_path.iterdir()] == ["model.arrow"]


def test_saving_changes_nothing_in_the_learner() -> None:
    for n_events in (8, 60):
        learner, twin = online(CASES["product"], n_events), online(CASES["product"], n_events)
        to_bytes(learner)
        more = draw_batch(CASES["product"], 30, 4)
        assert to_bytes(learner.update(more)) == to_bytes(twin.update(more))


def test_only_the_temporary_files_of_the_same_name_are_removed(tmp_path: Path) -> None:
    own, other = (tmp_path / f".{name}.0123456789abcdef.pending" for name in ("model", "model.eu"))
    own.touch()
    other.touch()
    remove_leftovers(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_loading_never_unpickles(tmp_path: Path) -> None:
    (tmp_path / "model.arrow").write_bytes(pickle.dumps(Harmful(tmp_path / "touched")))
    with pytest.raises(SnapshotError):
        load(tmp_path / "model.arrow")
    assert not (tmp_path / "touched").exists()


def test_specification_names_every_family() -> None:
    for case in CASES.values():
        specification = specification_of_family(case.family)
        assert isinstance(specification["family"], str)
        assert from_bytes(to_bytes(online(case))).model.family == case.family


def test_zero_rows_with_a_new_field_during_the_warm_up_can_be_saved() -> None:
    learner = OnlineEM(Mixture(Gaussian("diag"), 2), schema=Schema({"x": "numeric"}, unknown="add"), warm_up=10)
    learner.update([{"x": 1.0}] * 5)
    learner.update(pa.table({"x": pa.array([], pa.float64()), "y": pa.array([], pa.float64())}))
    again = from_bytes(to_bytes(learner))
    assert again.schema == learner.schema
    assert np.isfinite(again.log_prob({"x": 1.0, "y": 2.0})).all()


# Memory


def peak_of_opening(content: bytes) -> int:
    """Bytes taken, by Python, NumPy and Arrow, while a snapshot is opened, be it to be refused."""
    pool, usual = pa.proxy_memory_pool(pa.system_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        with suppress(SnapshotError):
            from_bytes(content)
        return int(tracemalloc.get_traced_memory()[1]) + int(pool.max_memory())
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def with_rows(rows: pa.RecordBatch, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(rows)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_before_they_unpack(content: bytes, compression: str) -> None:
    schema = read_rows(content).schema
    zeros = pa.record_batch(
        [["zeros"], ["float64"], [[2**21]], pa.array([bytes(2**24)], pa.large_binary())], schema=schema
    )
    packed = with_rows(zeros, compression=compression)
    assert len(packed) < 2**18
    with pytest.raises(SnapshotError, match="compressed"):
        from_bytes(packed)
    assert peak_of_opening(packed) < 2**20


def test_columns_that_share_their_bytes_are_refused(content: bytes) -> None:
    schema = read_rows(content).schema
    # The name has as many bytes as the data; then the buffer of the data is said to be that of the name, and left out.
    text = b"a" * (8 * 8_191)
    rows = pa.record_batch(
        [[text.decode()], ["float64"], [[8_191]], pa.array([text], pa.large_binary())], schema=schema
    )
    file = with_rows(rows)
    size = list(pa.ipc.MessageReader.open_stream(pa.py_buffer(file)[8:]))[1].body.size
    last = file.rindex(text)
    small = bytearray(file[:last] + file[last + len(text) :])
    length, before, after = (struct.pack("<q", one) for one in (len(text), size, size - len(text)))
    name, data = (at for at in range(0, small.index(text), 8) if small[at : at + 8] == length)
    small[data - 8 : data] = small[name - 8 : name]
    shared = bytes(small).replace(before, after)
    assert len(shared) < 1.2 * len(text)
    with pytest.raises(SnapshotError, match="share their bytes"):
        from_bytes(shared)


@pytest.mark.parametrize(
    ("family", "n_fields"), [(Gaussian("tied"), 80), (Gaussian("full"), 40), (Gaussian("diag"), 150)]
)
def test_no_more_than_ten_times_the_file_is_taken(family: Gaussian, n_fields: int) -> None:
    events = np.random.default_rng(0).normal(size=(300, n_fields))
    learner = OnlineEM(Mixture(family, n_fields // 2), warm_up=200).update(events)
    content = to_bytes(learner)
    # Beside a megabyte for the learner itself.
    assert peak_of_opening(content) < 10 * len(content) + 2**20


def test_headers_of_nothing_but_lists_are_neither_written_nor_read(content: bytes) -> None:
    lists = {"lists": [[]] * 100_000}
    with pytest.raises(SnapshotError, match="longer lists"):
        to_bytes(online(CASES["poisson"]), metadata=lists)
    header = read_rows(content).schema.metadata[HEADER_KEY].decode()
    forged = rewritten(content, header.replace('"metadata": {}', f'"metadata": {json.dumps(lists)}'))
    with pytest.raises(SnapshotError, match="lists and objects"):
        from_bytes(forged)


def test_an_array_that_stands_there_twice_is_refused(content: bytes) -> None:
    rows = read_rows(content)
    twice = pa.Table.from_batches([rows, rows]).combine_chunks().to_batches()[0]
    header = rows.schema.metadata[HEADER_KEY]
    signed = twice.replace_schema_metadata({HEADER_KEY: header, DIGEST_KEY: digest_of(header, twice)})
    with pytest.raises(SnapshotError, match="name of its own"):
        from_bytes(with_rows(signed))


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag"])
@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e40])
def test_weights_of_sixty_orders_of_magnitude_survive(covariance_type: str, scale: float) -> None:
    # Single events outweigh all others, so what their components hold besides is rounding.
    for seed in range(2):
        generator = np.random.default_rng(seed)
        values = scale * (generator.normal(size=(100, 4)) + 30.0 * generator.integers(3, size=(100, 1)))
        gone = generator.random(values.shape) < 0.3
        gone[np.arange(100), generator.integers(4, size=100)] = False
        values[gone] = np.nan
        weight = 10.0 ** generator.uniform(-30.0, 30.0, size=100)
        learner = OnlineEM(Mixture(Gaussian(covariance_type), 4), warm_up=30, batch_size=20, window=60)  # type: ignore[arg-type]
        for start in range(0, 100, 20):
            learner.update(values[start : start + 20], weight[start : start + 20])
        content = to_bytes(learner)
        assert to_bytes(from_bytes(content)) == content
