"""Run the benchmarks: `python -m benchmarks [--only iteration,startup] [--write]`."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from benchmarks import detection, files, iteration, river_door, sklearn_door, startup
from benchmarks.measure import machine

SECTIONS = {
    "iteration": iteration.run,
    "startup": startup.run,
    "detection": detection.run,
    "files": files.run,
    "sklearn": sklearn_door.run,
    "river": river_door.run,
}


def main() -> None:
    """Print the tables; with `--write`, put them into benchmarks/README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"unknown sections: {', '.join(unknown)}")
    texts = []
    for name in chosen:
        print(name, flush=True)
        texts.extend(table.markdown() for table in SECTIONS[name]())
    page = (
        "# Benchmarks\n\n"
        "Printed by `make bench` (`python -m benchmarks --write`). Peers run in the same process or the same call, "
        "and the figure is a ratio; absolute times are those of one shared machine.\n\n"
        f"{machine()}, {datetime.date.today()}.\n\n" + "\n".join(texts)
    )
    print(page)
    if arguments.write:
        (Path(__file__).parent / "README.md").write_text(page)


if __name__ == "__main__":
    main()
