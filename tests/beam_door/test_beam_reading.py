"""ReadEvents: every event of every file once, what cannot be read told, and no more columns than needed."""

import gzip
import json
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystem import FileMetadata, MatchResult
from apache_beam.io.localfilesystem import LocalFileSystem
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that

from stream_em import BatchEM, Gaussian, Mixture, Schema
from stream_em.beam import ExpectationStep, MergeStatistics
from stream_em.beam.expectation import NAMESPACE
from stream_em.beam.reading import ReadEvents
from stream_em.columns import Roles
from stream_em.sources import SourceError


class ElsewhereFileSystem(LocalFileSystem):
    """Files of this machine under names that are not local ones, as those of an object store are."""

    @classmethod
    def scheme(cls):
        return "elsewhere"

    def _match(self, pattern):
        (match,) = super().match([pattern.removeprefix("elsewhere://")])
        files = [FileMetadata("elsewhere://" + file.path, file.size_in_bytes) for file in match.metadata_list]
        return MatchResult(pattern, files)

    def match(self, patterns, limits=None):
        return [self._match(pattern) for pattern in patterns]

    def open(self, path, *arguments, **options):
        return super().open(path.removeprefix("elsewhere://"), *arguments, **options)


def table(n, offset=0):
    index = np.arange(offset, offset + n)
    return pa.table(
        {
            "id": index,
            "x": index / 2,
            "country": [("DE", "FR", "IT")[i % 3] for i in index],
            "w": np.ones(n),
            "t": index * 10.0,
            "device": [f"d{i % 2}" for i in index],
        }
    )


def as_dicts(element):
    return element.to_pylist() if isinstance(element, pa.Table) else element


def written(folder, name, rows):
    """Write rows in the format of the name."""
    path = Path(folder, name)
    if name.endswith(".parquet"):
        pq.write_table(rows, path, row_group_size=7)
    elif name.endswith(".csv"):
        pyarrow.csv.write_csv(rows, path)
    else:
        lines = "".join(json.dumps(event) + "\n" for event in rows.to_pylist()).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return path


@pytest.fixture
def run(tmp_path_factory):
    """Run a read; return its elements, its rejected events and the pipeline's result."""
    coder = beam.coders.FastPrimitivesCoder()

    def run(read, options=None):
        # What a pipeline yields leaves it through files: workers may be other processes.
        folder = tmp_path_factory.mktemp("results")
        pipeline = beam.Pipeline("FnApiRunner", options=options)
        outputs = pipeline | read
        for name in ("events", "rejected"):
            everything = outputs[name] | f"All {name}" >> beam.combiners.ToList()
            _ = everything | f"Write {name}" >> beam.Map(
                lambda values, path: path.write_bytes(coder.encode(values)), folder / name
            )
        outcome = pipeline.run()
        outcome.wait_until_finish()
        elements, rejected = (coder.decode((folder / name).read_bytes()) for name in ("events", "rejected"))
        return elements, sorted(rejected, key=lambda item: item.reason), outcome

    return run


def events_of(elements):
    return sorted((event for element in elements for event in as_dicts(element)), key=lambda event: event["id"])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("where", ["", "elsewhere://"])
def test_every_event_of_every_file_comes_once(tmp_path, run, name, where):
    for part in range(3):
        written(tmp_path, f"{part}{name}", table(30, 30 * part))
    elements, rejected, _ = run(ReadEvents(f"{where}{tmp_path}/*{name}", rows=10))
    assert events_of(elements) == table(90).to_pylist()
    assert rejected == []
    assert max(map(len, elements)) <= 10


def test_formats_mix_and_a_format_can_be_named(tmp_path, run):
    written(tmp_path, "a.parquet", table(5))
    written(tmp_path, "b.jsonl", table(5, 5))
    elements, rejected, _ = run(ReadEvents([str(tmp_path / "a.parquet"), f"{tmp_path}/*.jsonl"]))
    assert (events_of(elements), rejected) == (table(10).to_pylist(), [])
    (tmp_path / "b.jsonl").rename(tmp_path / "events")
    elements, _, _ = run(ReadEvents(str(tmp_path / "events"), format="jsonl"))
    assert events_of(elements) == table(5, 5).to_pylist()


def test_a_folder_stands_for_its_data_files(tmp_path, run):
    (tmp_path / "data" / "inner").mkdir(parents=True)
    written(tmp_path / "data", "a.parquet", table(5))
    written(tmp_path / "data" / "inner", "b.parquet", table(5, 5))
    for name in ("_SUCCESS", ".hidden.parquet", "notes.txt"):
        (tmp_path / "data" / name).write_text("")
    elements, rejected, _ = run(ReadEvents(str(tmp_path / "data")))
    assert (events_of(elements), rejected) == (table(10).to_pylist(), [])


@pytest.mark.parametrize(
    ("roles", "keep", "columns"),
    [
        (Roles(weight="w", time="t", exclude=("id", "device")), (), ["x", "country", "w", "t"]),
        (Roles(weight="w", time="t", exclude=("id", "device")), ("id",), ["id", "x", "country", "w", "t"]),
        (Roles(only=("x",), label="country"), ("device",), ["x", "device"]),
        (Roles(only=("x",), time="t"), ("x",), ["x", "t"]),
    ],
)
def test_only_what_the_roles_need_is_read(tmp_path, run, roles, keep, columns):
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        written(tmp_path, name, table(7))
    elements, rejected, _ = run(ReadEvents(str(tmp_path), roles=roles, keep=keep))
    assert rejected == []
    assert [list(as_dicts(element)[0]) for element in elements] == [columns] * 3


def test_columns_that_are_not_needed_are_not_even_looked_at(tmp_path, run):
    # The pages of a column are damaged: who does not read it does not notice.
    file = pq.ParquetFile(written(tmp_path, "a.parquet", table(5)))
    column = file.metadata.row_group(0).column(file.schema_arrow.names.index("device"))
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(content)
    path = str(tmp_path / "a.parquet")
    elements, rejected, _ = run(ReadEvents(path, roles=Roles(only=("x",))))
    assert (as_dicts(elements[0]), rejected) == (table(5).select(["x"]).to_pylist(), [])
    elements, (rejected,), _ = run(ReadEvents(path))
    assert (elements, rejected.event, rejected.n_events) == ([], None, 5)
    assert rejected.reason.startswith(f"{path}: cannot be read as Parquet")


@pytest.mark.parametrize("where", ["", "elsewhere://"])
def test_what_cannot_be_read_is_told_and_costs_nothing_else(tmp_path, run, where):
    written(tmp_path, "good.parquet", table(10))
    written(tmp_path, "lacks.parquet", table(4).drop_columns("x"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-50])
    pq.write_table(table(0), tmp_path / "empty.parquet")
    (tmp_path / "a.csv").write_text("id,x\n10,5.0\n11,many\n12\n13,6.5\n" + "".join(f"{i},7\n" for i in range(14, 30)))
    (tmp_path / "empty.csv").write_text("id,x\n")
    (tmp_path / "lacks.csv").write_text("id,y\n1,2\n")
    (tmp_path / "a.jsonl").write_text('{"id": 30, "x": 1}\n{"id": 31, \n{"id": 32, "x": 2}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1, "x": 1}\n' * 100)[:-12])
    (tmp_path / "a.xlsx").write_text("")
    folder = f"{where}{tmp_path}"
    elements, rejected, outcome = run(ReadEvents(f"{folder}/*.*", roles=Roles(only=("x",)), keep=("id",)))
    ids = [int(event["id"]) for element in elements for event in as_dicts(element)]
    assert sorted(ids) == [*range(11), *range(13, 31), 32]
    told = [(r.reason.removeprefix(folder + "/").split(",")[0].split(":")[0], r.event, r.n_events) for r in rejected]
    assert told == [
        ("a.csv", {"id": "11", "x": "many"}, 1),
        ("a.csv", {"text": "12"}, 1),
        ("a.jsonl", {"text": '{"id": 31, '}, 1),
        ("a.xlsx", None, 1),
        ("cut.jsonl.gz", None, 1),
        ("cut.parquet", None, 1),
        ("empty.csv", None, 0),
        ("empty.parquet", None, 0),
        ("lacks.csv", None, 1),
        ("lacks.parquet", None, 4),
    ]
    assert "has no column 'x'" in rejected[-1].reason
    (counter,) = outcome.metrics().query(MetricsFilter().with_namespace(NAMESPACE).with_name("rejected"))["counters"]
    assert counter.committed == sum(r.n_events for r in rejected)


def test_row_groups_are_gathered_up_to_the_size_of_a_table(tmp_path, run):
    pq.write_table(table(100), tmp_path / "a.parquet", row_group_size=3)
    elements, _, _ = run(ReadEvents(str(tmp_path / "a.parquet"), rows=20))
    # Seven row groups of three are the first to make a table of twenty.
    assert sorted((len(element) for element in elements), reverse=True)[:4] == [20] * 4
    assert events_of(elements) == table(100).to_pylist()


def test_two_worker_processes_read_the_same(tmp_path, run):
    pq.write_table(table(1_000), tmp_path / "a.parquet", row_group_size=50)
    options = PipelineOptions(["--direct_num_workers=2", "--direct_running_mode=multi_processing"])
    elements, rejected, _ = run(ReadEvents(str(tmp_path), rows=50), options)
    assert (events_of(elements), rejected) == (table(1_000).to_pylist(), [])


def test_what_is_not_there_is_told_when_the_pipeline_is_built(tmp_path):
    pipeline = beam.Pipeline("FnApiRunner")
    with pytest.raises(SourceError, match=r"nothing-\*.parquet: no file matches the pattern"):
        pipeline | "Nothing" >> ReadEvents(f"{tmp_path}/nothing-*.parquet")
    with pytest.raises(SourceError, match="the folder holds no Parquet, CSV or JSON Lines files"):
        pipeline | "Empty" >> ReadEvents(str(tmp_path))
    (tmp_path / "country=DE").mkdir()
    written(tmp_path / "country=DE", "a.parquet", table(2))
    with pytest.raises(SourceError, match="only in the folder names"):
        pipeline | "Keyed" >> ReadEvents(str(tmp_path))
    with pytest.raises(ValueError, match="format 'xml' is not one of parquet, csv, jsonl"):
        ReadEvents("a.xml", format="xml")
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        ReadEvents("a.csv", rows=0)


def test_statistics_of_a_read_equal_those_in_process(tmp_path):
    values = np.random.default_rng(0).normal(size=(500, 2))
    weights = np.random.default_rng(1).uniform(size=500)
    rows = pa.table({"a": values[:, 0], "b": values[:, 1], "w": weights, "note": ["-"] * 500})
    for part, start in enumerate(range(0, 500, 125)):
        written(tmp_path, f"{part}.parquet", rows.slice(start, 125))
    schema, model = Schema({"a": "numeric", "b": "numeric"}), Mixture(Gaussian(), 3)
    events = schema.encode(rows.select(["a", "b"]), weights)
    parameters = BatchEM(model, schema=schema, max_iter=2, tol=0.0, seed=0).fit(events).parameters
    wanted = model.bind(schema).e_step(parameters, events)
    roles = Roles(weight="w", exclude=("note",))

    def check(found):
        (statistics,) = found
        np.testing.assert_allclose(statistics.weights, wanted.weights, rtol=1e-12)
        np.testing.assert_allclose(statistics.log_likelihood, wanted.log_likelihood, rtol=1e-12)

    with beam.Pipeline("FnApiRunner") as pipeline:
        read = pipeline | ReadEvents(str(tmp_path), roles=roles)
        statistics = read.events | beam.ParDo(ExpectationStep(model, schema, roles=roles), parameters)
        assert_that(statistics | beam.CombineGlobally(MergeStatistics()), check)
