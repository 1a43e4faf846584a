"""Run the benchmarks: `python -m benchmarks [--only iteration,startup] [--write]`."""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path

from benchmarks import beam_door, detection, files, iteration, river_door, sklearn_door, startup
from benchmarks.measure import compile_modules, machine

SECTIONS = {
    "iteration": iteration.run,
    "startup": startup.run,
    "detection": detection.run,
    "files": files.run,
    "sklearn": sklearn_door.run,
    "river": river_door.run,
    "river_data": river_door.run_on_data,
    "beam": beam_door.run,
}

PAGE = Path(__file__).parent / "README.md"


def main() -> None:
    """Print the tables; with `--write`, put them into benchmarks/README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--write", action="store_true", help="write each section into benchmarks/README.md when done")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"unknown sections: {', '.join(unknown)}")
    page = PAGE.read_text()
    head = page[: page.index("<!-- ")]
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    compile_modules()
    for name in chosen:
        print(name, flush=True)
        tables = "\n".join(table.markdown() for table in SECTIONS[name]())
        sections[name] = f"{tables}\n{machine()}, {datetime.date.today()}."
        print(sections[name], flush=True)
        if arguments.write:
            parts = (f"<!-- {one} -->\n{sections[one]}\n<!-- end -->\n" for one in SECTIONS if one in sections)
            PAGE.write_text(head + "\n".join(parts))


if __name__ == "__main__":
    main()
