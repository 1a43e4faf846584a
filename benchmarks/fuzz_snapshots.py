"""Open mutated snapshots: `python -m benchmarks.fuzz_snapshots --files 100000`.

Each file either loads to something valid, a learner that predicts, learns and can be saved again, or is refused with
`SnapshotError`. While it is opened no code is imported, compiled or run, no file or socket is opened, and no more
memory is taken than ten times the file's own size; nor does it take long, or end the process. File number n is always
the same file; `--only n --keep FILE` writes it and opens it here, where a debugger can look.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import Table
from benchmarks.reliability import publish
from stream_em import Batch, BatchEM, OnlineEM, SnapshotError
from stream_em.arrays import from_rows, to_rows
from stream_em.snapshot_file import read_rows, write_rows
from stream_em.store import DIGEST_KEY, HEADER_KEY, digest_of, from_bytes, to_bytes

SNAPSHOTS = Path(__file__).parents[1] / "tests" / "data" / "snapshots"

# What Python takes for a learner of any size, beside what the file's size accounts for.
MEMORY_OF_A_LEARNER = 2**20
MOST_TIMES_ITS_SIZE = 10
# Seconds after which opening a file counts as a hang; one takes some milliseconds where nothing else is running.
LONGEST = 60
# Address space that opening a file may take.
ROOM = 2**29
# A learner with more numbers than this is not asked to learn: it may, but it takes as long as it takes.
MOST_NUMBERS = 200_000

HARMLESS = {"builtins.id", "object.__getattr__", "object.__setattr__", "sys._getframe", "gc.collect", "array.__new__"}

Mutation = Callable[[np.random.Generator, bytes], bytes]

INTEGERS = (0, 1, -1, 2, 7, 8, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32, 2**53, 2**62, 2**63 - 1, -(2**63))
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 31, 10**6, 2**31, 2**62, 2**63, 10**30, 10**400, -(10**30), 0.5, -0.5, 1e-320),
    *(1e-300, 1e-12, 1e100, 1e300, -1e300, float("nan"), float("inf"), -float("inf"), "", "x", "x" * 10_000, "\ud800"),
    *("\U0001f600", "__class__", "soft", "hard", "full", "tied", "diag", "gaussian", "product", "category", "flag"),
    *("count", "ignore", "add", "OnlineEM", "BatchEM", "harmonic", "constant", "half_life", "adaptive_components"),
    *([], [0], [1, 1, 1], [None], [[]], {}, {"kind": "x"}, {"": {}}, {"family": "poisson"}),
    *({"kind": "constant", "value": 1e-300}, {"kind": "half_life", "half_life": 1e-300}),
)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, np.nan, np.inf, -np.inf, 1e-320, 1e-300, 1e-150, 1e150, 1e300, -1e300, 1e308)


def bases() -> list[bytes]:
    """The snapshots that are mutated: every one that is kept."""
    return [path.read_bytes() for path in sorted(SNAPSHOTS.glob("*/*.arrow"))]


# Bytes


def flipped_bits(generator: np.random.Generator, content: bytes) -> bytes:
    damaged = bytearray(content)
    for position in generator.integers(len(content), size=generator.integers(1, 9)).tolist():
        damaged[position] ^= 1 << int(generator.integers(8))
    return bytes(damaged)


def cut(generator: np.random.Generator, content: bytes) -> bytes:
    first, last = np.sort(generator.integers(len(content) + 1, size=2)).tolist()
    return content[:first] if generator.random() < 0.5 else content[:first] + content[last:]


def spliced(generator: np.random.Generator, content: bytes) -> bytes:
    first, last = np.sort(generator.integers(len(content) + 1, size=2)).tolist()
    piece = content[first : min(last, first + 256)]
    position = int(generator.integers(len(content) + 1))
    over = len(piece) if generator.random() < 0.5 else 0
    return content[:position] + piece + content[position + over :]


def overwritten_integers(generator: np.random.Generator, content: bytes) -> bytes:
    """Lengths, offsets and counts are what readers believe."""
    damaged = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        size = int(generator.choice([2, 4, 8]))
        position = int(generator.integers(0, len(content) - 8)) & ~(size - 1)
        value = INTEGERS[generator.integers(len(INTEGERS))] % 2 ** (8 * size)
        damaged[position : position + size] = value.to_bytes(size, "little")
    return bytes(damaged)


def copied_structs(generator: np.random.Generator, content: bytes) -> bytes:
    """Buffers are pairs of integers: one put in the place of another has two columns share their bytes."""
    damaged = bytearray(content)
    for _ in range(int(generator.integers(1, 4))):
        source, target = (8 * generator.integers(0, (len(content) - 16) // 8, size=2)).tolist()
        damaged[target : target + 16] = content[source : source + 16]
    return bytes(damaged)


# Arrow


def written(table: pa.Table, *, stream: bool = False, batches: int = 1, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema, options=options) as writer:
        for _ in range(batches):
            writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def other_arrow(generator: np.random.Generator, content: bytes) -> bytes:
    """Valid Arrow, but another file: other types, columns, rows, batches."""
    table = pa.Table.from_batches([read_rows(content)])
    name = table.column_names[generator.integers(table.num_columns)]
    position, column = table.column_names.index(name), table.column(name).combine_chunks()
    kind = int(generator.integers(12))
    if kind == 0:
        return written(table, stream=True)
    if kind == 1:
        return written(table, batches=int(generator.choice([0, 2, 5])))
    if kind == 2:
        return written(table.drop_columns([name]))
    if kind == 3:
        return written(table.append_column("more", pa.nulls(table.num_rows)))
    if kind == 4:
        return written(table.select(generator.permutation(table.column_names).tolist()))
    if kind == 5:
        text = pa.array([str(value) for value in column.to_pylist()])
        return written(table.set_column(position, name, text.dictionary_encode()))
    if kind == 6:
        return written(table.set_column(position, name, pa.nulls(table.num_rows, column.type)))
    if kind == 7:
        nested = pa.array([[[value]] for value in column.to_pylist()], pa.list_(pa.list_(column.type)))
        return written(table.set_column(position, name, nested))
    if kind == 8:
        field = pa.field(
            name, column.type, nullable=False, metadata={"ARROW:extension:name": "arrow.py_extension_type"}
        )
        return written(table.set_column(position, field, column))
    if kind == 9:
        return written(table.set_column(position, name, pa.array(generator.normal(size=table.num_rows))))
    if kind == 10:
        return written(pa.concat_tables([table] * int(generator.integers(2, 4))))
    return written(table.take(generator.integers(table.num_rows, size=table.num_rows)) if table.num_rows else table)


def exploding(generator: np.random.Generator, content: bytes) -> bytes:
    """Compressed buffers: some kilobytes that unpack to a hundred megabytes, or say that they do."""
    table = pa.Table.from_batches([read_rows(content)])
    compression = str(generator.choice(["lz4", "zstd"]))
    if generator.random() < 0.5:
        size = int(generator.choice([2**20, 2**24, 2**27]))
        zeros = pa.record_batch(
            [["zeros"], ["float64"], [[size // 8]], pa.array([bytes(size)], pa.large_binary())], schema=table.schema
        )
        return written(pa.Table.from_batches([zeros]), compression=compression)
    packed = bytearray(written(table, compression=compression))
    return overwritten_integers(generator, bytes(packed)) if generator.random() < 0.7 else bytes(packed)


def many_rows(generator: np.random.Generator, content: bytes) -> bytes:
    """A great many arrays with next to nothing in them."""
    count = int(generator.choice([10, 1_000, 20_000]))
    names = [f"{row:x}" for row in range(count)]
    header = read_rows(content).schema.metadata[HEADER_KEY]
    arrays = {name: np.empty(0) for name in names}
    return signed(header, arrays)


# Header and arrays, under a digest that is right


def signed(header: bytes, arrays: dict[str, Any]) -> bytes:
    """A snapshot of these, its digest right, so that what lies behind the digest is reached."""
    rows = to_rows(arrays, {HEADER_KEY: header})
    return write_rows(rows.replace_schema_metadata({HEADER_KEY: header, DIGEST_KEY: digest_of(header, rows)}))


def opened(content: bytes) -> tuple[Any, dict[str, Any]]:
    rows = read_rows(content)
    return json.loads(rows.schema.metadata[HEADER_KEY]), from_rows(rows)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within a value, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(generator: np.random.Generator, value: Any) -> Any:
    """A value like this one, or nothing like it."""
    chance = generator.random()
    if isinstance(value, (int, float)) and abs(value) < 1e300 and chance < 0.5:
        return value * (-1, 2, 10, 0.5, 1e9, 1e-9)[generator.integers(6)] + int(generator.integers(-1, 2))
    if isinstance(value, str) and chance < 0.3:
        return value[: int(generator.integers(len(value) + 1))] + str(generator.choice(["", "a", "/", "\x00"]))
    if isinstance(value, list) and value and chance < 0.6:
        return value[: int(generator.integers(len(value)))] if chance < 0.3 else value * int(generator.integers(2, 5))
    return VALUES[generator.integers(len(VALUES))]


def other_header(generator: np.random.Generator, content: bytes) -> bytes:
    header, arrays = opened(content)
    for _ in range(int(generator.integers(1, 4))):
        found = list(places(header))
        container, key = found[generator.integers(len(found))]
        chance = generator.random()
        if chance < 0.1:
            del container[key]
        elif chance < 0.2:
            other, at = found[generator.integers(len(found))]
            container[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
        elif chance < 0.25 and isinstance(container, dict):
            container[str(generator.choice(["x", "kind", "names", "n" * 5_000]))] = changed(generator, container[key])
        else:
            container[key] = changed(generator, container[key])
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return signed(text, arrays)


def deep_header(generator: np.random.Generator, content: bytes) -> bytes:
    """Nesting, and lists and objects of next to nothing, which take many times their text in memory."""
    header, arrays = opened(content)
    depth, many = int(generator.choice([50, 900, 100_000])), int(generator.choice([1_000, 200_000, 2_000_000]))
    odd = (
        "[" * depth + "]" * depth,
        '{"a":' * depth + "1" + "}" * depth,
        "[" + "[]," * (many // 3) + "0]",
        "[" + '{"":0},' * (many // 7) + "0]",
        "[" + "[-6,-7,-8]," * (many // 11) + "0]",
        "[" + '"ab",' * (many // 5) + "0]",
        "[" + "-6," * (many // 3) + "0]",
        '"' + "\U0001f600" + "a" * many + '"',
        "1" * many,
        '{"family": "product", "factors": [' * (depth // 2) + "0" + "]}" * (depth // 2),
    )[generator.integers(10)]
    marker = "a place for something odd"
    found = list(places(header))
    container, key = found[generator.integers(len(found))] if generator.random() < 0.5 else (header, "metadata")
    container[key] = marker if generator.random() < 0.5 else {"x": marker}
    return signed(json.dumps(header).replace(f'"{marker}"', odd).encode(), arrays)


def other_arrays(generator: np.random.Generator, content: bytes) -> bytes:
    header, arrays = opened(content)
    for _ in range(int(generator.integers(1, 4))):
        if not arrays:
            break
        name = list(arrays)[generator.integers(len(arrays))]
        array, chance = arrays[name], generator.random()
        if chance < 0.45 and array.size:
            value = NUMBERS[generator.integers(len(NUMBERS))]
            if array.dtype.kind == "i":
                value = INTEGERS[generator.integers(len(INTEGERS))]
            array = array.copy()
            array.flat[generator.integers(array.size) if generator.random() < 0.7 else slice(None)] = value
            arrays[name] = array
        elif chance < 0.6:
            arrays[name] = array * (-1, 0, 1e-200, 1e100, 1e200)[generator.integers(5)]
        elif chance < 0.7:
            arrays[name] = array.reshape((-1,) if generator.random() < 0.5 else (*array.shape, 1))
        elif chance < 0.8:
            arrays[name] = np.resize(array, tuple(generator.integers(0, 5, size=generator.integers(0, 4)).tolist()))
        elif chance < 0.85:
            del arrays[name]
        elif chance < 0.9:
            arrays[name] = array.astype(
                np.int64 if array.dtype.kind == "f" and np.isfinite(array).all() else np.float64
            )
        else:
            other = list(arrays)[generator.integers(len(arrays))]
            arrays[name], arrays[other] = arrays[other], arrays[name]
    return signed(json.dumps(header).encode(), arrays)


def whole(generator: np.random.Generator, content: bytes) -> bytes:
    return content


MUTATIONS: tuple[tuple[float, Mutation], ...] = (
    (0.10, flipped_bits),
    (0.05, cut),
    (0.06, spliced),
    (0.12, overwritten_integers),
    (0.06, copied_structs),
    (0.06, other_arrow),
    (0.03, exploding),
    (0.01, many_rows),
    (0.25, other_header),
    (0.01, deep_header),
    (0.23, other_arrays),
    (0.02, whole),
)


def mutated(number: int, originals: Sequence[bytes]) -> tuple[str, bytes]:
    """Return file number `number`, and how it was made."""
    generator = np.random.default_rng([20_251_125, number])
    content = originals[generator.integers(len(originals))]
    chances, mutations = zip(*MUTATIONS)
    mutation = mutations[generator.choice(len(mutations), p=np.array(chances))]
    with np.errstate(all="ignore"):
        return mutation.__name__, mutation(generator, content)


# What opening a file must not do


class Watch:
    """Notes what the interpreter is asked to do while a file is opened."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        # An Arrow buffer does not keep its pool: one that the garbage collector frees later goes back to a pool that
        # must still be there.
        self.pools: list[pa.MemoryPool] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is not None and event not in HARMLESS:
            self.seen.append(f"{event}{arguments!r:.200}")

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.seen = seen = []
        try:
            yield seen
        finally:
            self.seen = None


def open_watched(content: bytes, watch: Watch) -> tuple[OnlineEM | BatchEM | None, list[str]]:
    """Open a file; return what it holds, None if it was refused, and what was wrong with the way it went."""
    most = MOST_TIMES_ITS_SIZE * len(content) + MEMORY_OF_A_LEARNER
    learner, wrong, peak = open_measured(content, watch)
    if peak > most:
        # Python enlarges tables of its own now and then, which is no doing of the file's and happens once.
        peak = open_measured(content, watch)[2]
    if peak > most:
        wrong.append(f"took {peak:,} bytes for a file of {len(content):,}")
    return learner, wrong


def open_measured(content: bytes, watch: Watch) -> tuple[OnlineEM | BatchEM | None, list[str], int]:
    """Open a file; return what it holds, what was wrong, and the most bytes that were held at a time."""
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    watch.pools.append(pool)
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    learner, wrong = None, []
    try:
        with _little_room(), watch.watching() as seen:
            try:
                learner = from_bytes(content)
            except SnapshotError:
                pass
            except BaseException as error:
                wrong.append(f"{type(error).__name__}: {error!s:.200}")
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    return learner, wrong + [f"ran {event}" for event in seen], peak


def check_use(learner: OnlineEM | BatchEM) -> None:
    """Predict, learn and save again: a learner that was loaded is a learner."""
    content = to_bytes(learner)
    if to_bytes(from_bytes(content)) != content:
        raise AssertionError("saved again, it reads as another learner")
    schema = learner.schema
    if schema is None:
        # It has seen no event: whatever the first ones are, a family may be one of other fields.
        return
    if learner.model.n_components * len(schema) ** 2 > MOST_NUMBERS:
        return
    typical = {"numeric": 0.5, "flag": 1.0, "category": 0.0, "count": 2.0, "duration": 1.5}
    values = np.array([[typical[one.kind]] * 6 for one in schema.fields])
    values[:, 3:] *= 0.0
    if isinstance(learner, OnlineEM):
        learner.update(Batch(values, schema), time=np.arange(6.0))
        learner.finish_warm_up()
        learner.update(Batch(values, schema), time=np.arange(6.0))
    prediction = learner.score_events(Batch(values, schema))
    for name, array in (("log_prob", prediction.log_prob), ("responsibilities", prediction.responsibilities)):
        if not np.isfinite(array).all():
            raise AssertionError(f"{name} is not finite")
    mean, deviation = learner.marginals()
    if not (np.isfinite(learner.parameters.weights).all() and np.isfinite(mean).all() and np.isfinite(deviation).all()):
        raise AssertionError("the parameters are not finite")
    from_bytes(to_bytes(learner))


def check(number: int, originals: Sequence[bytes], watch: Watch) -> tuple[str, bool, list[str]]:
    """Open file number `number`; return how it was made, whether it was loaded, and what went wrong."""
    kind, content = mutated(number, originals)
    learner, wrong = open_watched(content, watch)
    if learner is not None and not wrong:
        try:
            check_use(learner)
        except Exception as error:
            wrong.append(f"loaded, but in use {type(error).__name__}: {error!s:.300}")
    return kind, learner is not None, wrong


# Processes


def prepare() -> tuple[list[bytes], Watch]:
    """Open and use every original once: what is imported at the first use is no doing of a file's."""
    originals = bases()
    warnings.simplefilter("error")
    for content in originals:
        check_use(from_bytes(content))
    return originals, Watch()


def work(first: int, last: int, step: int) -> None:
    """Open some files in this process, with little room and little time; print a line for each one that goes wrong."""
    originals, watch = prepare()
    counts: Counter[str] = Counter()
    faulthandler.enable()
    for number in range(first, last, step):
        print(json.dumps({"at": number}), flush=True)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        kind, loaded, wrong = check(number, originals, watch)
        counts[f"{kind} {'loaded' if loaded else 'refused'}"] += 1
        if wrong:
            print(json.dumps({"number": number, "kind": kind, "wrong": wrong}), flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"counts": counts}), flush=True)


@contextmanager
def _little_room() -> Iterator[None]:
    """Leave this process little more address space than it has; not every way to take memory is counted."""
    if sys.platform != "linux":
        yield
        return
    import resource

    usual = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


def fuzz(files: int, processes: int, first: int = 0) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Open so many files in so many processes; return how many were loaded and refused, and what went wrong."""
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(process)) for process in range(processes)]
        started = []
        for process, output in enumerate(outputs):
            parts = [str(first + process), str(first + files), str(processes)]
            with output.open("wb") as stdout, output.with_suffix(".err").open("wb") as stderr:
                command = [sys.executable, "-m", "benchmarks.fuzz_snapshots", "--work", *parts]
                started.append(subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=Path(__file__).parents[1]))
        for child, output in zip(started, outputs):
            code = child.wait()
            last = {}
            for line in output.read_text().splitlines():
                last = json.loads(line)
                counts.update(last.get("counts", {}))
                if "wrong" in last:
                    failures.append(last)
            if code != 0 or "counts" not in last:
                error = output.with_suffix(".err").read_text()[-2_000:]
                failures.append({"number": last.get("at"), "kind": "process", "wrong": [f"ended with {code}: {error}"]})
    return counts, failures


def main() -> None:
    """Open mutated snapshots; end with 1 if one of them does what it must not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_snapshots", description=__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="how many files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="open this file alone, in this process")
    parser.add_argument("--keep", type=Path, help="with --only: write the file")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    if arguments.only is not None:
        if arguments.keep:
            arguments.keep.write_bytes(mutated(arguments.only, bases())[1])
        print(*check(arguments.only, *prepare()))
        return
    start = time.monotonic()
    counts, failures = fuzz(arguments.files, arguments.processes, arguments.first)
    seconds = time.monotonic() - start
    rows = [
        (name.replace("_", " "), f"{counts[f'{name} loaded']:,}", f"{counts[f'{name} refused']:,}")
        for name in sorted({one.rpartition(" ")[0] for one in counts})
    ]
    table = Table(
        "Mutated snapshots",
        f"{counts.total():,} files made from the {len(bases())} that are kept, opened in {seconds:.0f} s; "
        f"{len(failures)} did what they must not. Changed headers and arrays come with a digest that is right; what "
        "was loaded was asked to predict, to learn and to be saved again.",
        ("changed", "loaded", "refused"),
        rows,
    )
    publish("fuzz", table, write=arguments.write and not failures)
    for failure in failures[:50]:
        print(json.dumps(failure))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
