"""The pages of docs/results/. A benchmark replaces the text between two markers of a page and nothing else.

    <!-- generated: traffic -->
    <!-- end: traffic -->

Everything outside the markers is written by hand and stays as it is.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "results"
CPUINFO = Path("/proc/cpuinfo")
PATH = re.compile(r"[^\s=]*/[^\s]*")


def write_section(page: Path, name: str, text: str, new_page: str) -> None:
    """Replaces the text between the markers of section `name`.

    A page that does not exist is created from `new_page` (see `empty_page`). Raises SystemExit unless the page has both
    markers exactly once, the end after the beginning.
    """
    # Imported here because benchmarks.traffic also runs beside an older oneword, which does not have it.
    from oneword.engines.files import write_whole

    begin, end = markers(name)
    content = page.read_text(encoding="utf-8") if page.exists() else new_page
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(end) < content.index(begin):
        raise SystemExit(
            f"{page} has {content.count(begin)} times {begin!r} and {content.count(end)} times {end!r}, "
            "but should have each once, in this order: put both where the results belong"
        )
    head, _, tail = content.partition(begin)
    page.parent.mkdir(parents=True, exist_ok=True)
    whole = f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail.partition(end)[2]}"
    write_whole(page, whole.encode(), sync=False)


def empty_page(title: str, introduction: str, *names: str) -> str:
    """A page whose sections are still empty, in Markdown."""
    sections = ["\n".join(markers(name)) for name in names]
    return "\n\n".join([f"# {title}", introduction, *sections]) + "\n"


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a section."""
    return f"<!-- generated: {name} -->", f"<!-- end: {name} -->"


def model_name(model: str) -> str:
    """What a page calls the model of a `--model` option."""
    return "the miniature" if model == "miniature" else model


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column is aligned left, the others right. Numbers are printed as they are."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def marked(value: object, met: bool) -> str:
    """A value beside its target: bold if it misses it."""
    return str(value) if met else f"**{value}**"


def with_error(values: Sequence[float]) -> str:
    """The mean, and its standard error if there are several values."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def provenance(benchmark: str, *, stored: Path | None = None, device: str = "") -> str:
    """Date, machine and command of a measurement, in Markdown.

    `stored` is the file of a benchmark that resumes: its date is that of the last measurement. `device` is a GPU.
    """
    date = datetime.date.fromtimestamp(stored.stat().st_mtime) if stored else datetime.date.today()
    return f"{date}, {f'{device}, ' if device else ''}{machine()}:\n\n    {command(benchmark)}"


def machine() -> str:
    """The processor in plain words, such as `2 CPU cores (AMD EPYC) with bfloat16`."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cores = os.cpu_count() or 1
    bfloat16 = "with" if {"avx512_bf16", "amx_bf16"} & set(facts.get("flags", "").split()) else "without"
    model = facts.get("model name", platform.machine())
    return f"{cores} CPU core{'s' if cores > 1 else ''} ({model}) {bfloat16} bfloat16"


def command(benchmark: str) -> str:
    """The command line of this process; paths of this machine become PATH."""
    arguments = [PATH.sub("PATH", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments])
