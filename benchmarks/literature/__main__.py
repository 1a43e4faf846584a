"""Run published experiments: `python -m benchmarks.literature [--data FOLDER] [--rows 2,3,8] [--write]`."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.literature import adaptive, choosing, finite_sum, mixtures, numerics, regressions, small_data
from benchmarks.literature.experiment import MissingFileError, Section, Setup, processes
from benchmarks.measure import machine

ROWS: dict[str, Callable[[Setup], Section]] = {
    "1": regressions.run,
    **{str(row): partial(mixtures.run, row) for row in mixtures.STUDIES},
    "6": finite_sum.run_known_shape,
    "7": finite_sum.run_images,
    "8": small_data.run_faithful,
    "9": small_data.run_iris,
    "10": small_data.run_asterisk,
    "11": numerics.run_shards,
    "12": numerics.run_offsets,
    "13": adaptive.run,
}
# These belong to the guide.
GUIDE: dict[str, Callable[[Setup], Section]] = {
    "elec2": choosing.run_market,
    **{name: partial(choosing.run_choice, name) for name in choosing.CHOICES},
}

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    """Print the sections; with `--write`, put them into the pages."""
    known = {**ROWS, **GUIDE}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.literature", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the data files; rows without theirs are not run")
    parser.add_argument("--rows", help=f"separated by commas: {', '.join(known)}")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=DOCS, metavar="DOCS", help="renew the sections in the pages of a folder"
    )
    parser.add_argument("--seeds", type=int, help="runs of every row, instead of its own number")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of events and of passes")
    parser.add_argument("--processes", type=int, default=2, help="processes that share the runs")
    arguments = parser.parse_args()
    chosen = arguments.rows.split(",") if arguments.rows else list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown rows: {', '.join(unknown)}; known are {', '.join(known)}")
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error(f"there is no folder {arguments.data}")
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    if not 0.0 < arguments.scale <= 1.0:
        parser.error(f"--scale must be above 0 and at most 1, got {arguments.scale:g}")
    begin = time.monotonic()
    with processes(arguments.processes) as executor:
        setup = Setup(arguments.data, executor, arguments.seeds, arguments.scale)
        for name in chosen:
            began = time.monotonic()
            try:
                section = known[name](setup)
            except MissingFileError as missing:
                print(f"Row {name} was not run: {missing}.\n", flush=True)
                continue
            tables = "\n".join(table.markdown() for table in section.tables)
            reduced = "" if setup.is_whole else f" Cut down: --seeds {setup.n_seeds} --scale {setup.scale:g}."
            footer = (
                f"{machine()}, {datetime.date.today()}; {time.monotonic() - began:.0f} s in {arguments.processes} "
                f"processes.{reduced}"
            )
            print(tables, footer, "", sep="\n", flush=True)
            if arguments.write is not None:
                picture = f"literature/{f'row-{int(name):02}' if name.isdecimal() else name}.png"
                (arguments.write / "literature").mkdir(exist_ok=True)
                section.figure.savefig(arguments.write / picture, dpi=110, metadata={"Software": None})
                body = f"{tables}\n![{section.caption}]({picture})\n\n{section.caption}\n\n{footer}"
                renew(arguments.write / ("literature.md" if name in ROWS else "choosing.md"), name, body)
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)


def renew(page: Path, name: str, body: str) -> None:
    """Put a section between its markers in a page."""
    begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
    before, marker, rest = page.read_text().partition(begin)
    _, other, after = rest.partition(end)
    if not (marker and other):
        raise SystemExit(f"{page} has no place for row {name}: it needs the lines {begin.strip()} and {end.strip()}")
    page.write_text(f"{before}{begin}{body}{end}{after}")


if __name__ == "__main__":
    main()
