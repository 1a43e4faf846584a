"""Jobs that are killed and started again, and whether anything tells them from jobs left alone.

`Command` starts the command `stream-em` in processes of their own that share their imports, so that hundreds of them
take minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
# What changes a file system, as Python's audit hooks name it.
CALLS = ("open", "os.rename", "os.remove", "os.mkdir")


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes
    ----------
    code
        Its exit code; the negative number of the signal that killed it.
    text
        What it wrote to its standard output and error.
    calls
        How often it opened or changed a file of a folder `output`.
    seconds
        How long it took.

    """

    code: int
    text: str
    calls: int
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Command:
    """The command `stream-em`, started as often as wanted.

    >>> with Command() as stream_em:
    ...     stream_em("--version", cwd=".").code
    0

    """

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def __call__(
        self,
        *arguments: str,
        cwd: str | Path,
        stdin: str | Path | None = None,
        number: int = signal.SIGKILL,
        after: float | None = None,
        at_call: int | None = None,
    ) -> End:
        """Run the command.

        Parameters
        ----------
        arguments
            What follows `stream-em`.
        cwd
            Where to run it.
        stdin
            File that is its standard input.
        number
            A signal that it gets.
        after
            Seconds after which it gets it, if it still runs.
        at_call
            It gets it at the so-and-so-manieth call that is about to open or change a file of a folder `output`.

        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "stdin": os.devnull if stdin is None else str(stdin),
            "number": int(number),
            "after": after,
            "at_call": at_call,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return End(**json.loads(self._server.stdout.readline()))


@dataclass(frozen=True)
class Killed:
    """A job that was killed at random moments until it ended.

    Parameters
    ----------
    n_kills
        How often it was killed.
    n_resumed
        How many of its starts went on from a checkpoint.
    differences
        Files that are not those of an undisturbed job, bit by bit.

    """

    n_kills: int
    n_resumed: int
    differences: list[str]


def kill_at_random(
    stream_em: Command, arguments: Sequence[str], cwd: Path, *, n_kills: int, seed: int, stdin: Path | None = None
) -> Killed:
    """Run a job undisturbed, then with kills at random moments, and compare what is in its folder `output`.

    When it has come to its end, it is compared and begins anew, until it was killed so often.
    """
    generator = random.Random(seed)
    undisturbed = stream_em(*arguments, cwd=cwd, stdin=stdin)
    assert undisturbed.code == 0, undisturbed.text
    (cwd / "output").rename(cwd / "undisturbed")
    killed = resumed = 0
    wrong: list[str] = []
    while killed < n_kills:
        end = stream_em(*arguments, cwd=cwd, stdin=stdin, after=generator.uniform(0.0, undisturbed.seconds))
        killed += end.killed
        resumed += "going on after" in end.text
        if not end.killed:
            assert end.code == 0, end.text
            wrong += differences(cwd / "output", cwd / "undisturbed")
    end = stream_em(*arguments, cwd=cwd, stdin=stdin)
    assert end.code == 0, end.text
    return Killed(killed, resumed, wrong + differences(cwd / "output", cwd / "undisturbed"))


def differences(one: Path, other: Path) -> list[str]:
    """Names of the files that two folders do not have alike."""
    names = sorted({path.name for folder in (one, other) for path in folder.iterdir()})
    return [name for name in names if _content(one / name) != _content(other / name)]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def serve() -> None:
    """Start a process for each line of JSON, and answer with how it ended."""
    # No process that is forked has to load these again; Arrow imports pandas where it is installed.
    for name in ("stream_em.cli.main", "stream_em.block_kernel", "pandas", "rich.live"):
        with suppress(ModuleNotFoundError):
            import_module(name)
    with suppress(ModuleNotFoundError):
        compiled_blocks: Any = import_module("stream_em.compiled_blocks")
        compiled_blocks.compiled_step_block(general=False)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


def _run(
    arguments: list[str], cwd: str, stdin: str, number: int, after: float | None, at_call: int | None
) -> dict[str, Any]:
    started = time.monotonic()
    told, teller = os.pipe()
    counted, counter = os.pipe()
    process = os.fork()
    if not process:
        os.close(told)
        os.close(counted)
        os.chdir(cwd)
        for descriptor, target in ((os.open(stdin, os.O_RDONLY), 0), (teller, 1), (teller, 2)):
            os.dup2(descriptor, target)
        _become(arguments, counter, number, at_call)
    os.close(teller)
    os.close(counter)
    with _signalled(process, number, after), os.fdopen(told, "rb") as stream:
        text = stream.read().decode()
    with os.fdopen(counted, "rb") as stream:
        calls = len(stream.read())
    _, status = os.waitpid(process, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "text": text,
        "calls": calls,
        "seconds": time.monotonic() - started,
    }


@contextmanager
def _signalled(process: int, number: int, seconds: float | None) -> Iterator[None]:
    """Send a signal to a process if this block takes longer."""
    timer = threading.Timer(seconds or 0.0, os.kill, (process, number))
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _become(arguments: list[str], counter: int, number: int, at_call: int | None) -> None:
    """Be the command, and nothing else from here on."""
    calls = 0

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal calls
        if event not in CALLS or not any("output" in Path(str(one)).parts for one in details[:2]):
            return
        calls += 1
        os.write(counter, b".")
        if calls == at_call:
            os.kill(os.getpid(), number)

    from stream_em.cli.main import main

    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor
    sys.argv = ["stream-em", *arguments]
    sys.addaudithook(count)
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
