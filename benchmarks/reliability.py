"""The page docs/reliability.md, each section of which is what one command saw."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from benchmarks.measure import Table, machine

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def publish(section: str, table: Table, *, write: bool) -> None:
    """Print a table; with `write`, put it into its section of the page."""
    text = f"{table.markdown()}\n{machine()}, {datetime.date.today()}."
    print(text, flush=True)
    if write:
        marked = re.compile(rf"(<!-- {section} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = PAGE.read_text()
        if not marked.search(page):
            raise ValueError(f"{PAGE} has no section <!-- {section} -->")
        PAGE.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page))
