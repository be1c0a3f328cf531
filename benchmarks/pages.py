"""Generated parts of documentation pages: `write_section` replaces what stands between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Puts `text` between `<!-- name -->` and `<!-- /name -->`. Raises SystemExit where the page has no such place."""
    before, after = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = page.read_text(encoding="utf-8")
    if content.count(before) != 1 or content.count(after) != 1:
        raise SystemExit(f"{page} has no place for the section: write {before} and {after} in it")
    head, _, rest = content.partition(before)
    page.write_text(f"{head}{before}\n\n{text.strip()}\n\n{after}{rest.partition(after)[2]}", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers stand as they are given, the first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
