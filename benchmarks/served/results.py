"""The sections' results: rows with a figure and its bar, kept in a file of each section."""

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.pages import machine, marked, table
from oneword.engines.files import write_whole


@dataclass(frozen=True)
class Row:
    """A figure. `limit` is its bar, if it has one; `least` says that it is the smallest that is allowed."""

    title: str
    value: float
    limit: float | None = None
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure reaches its bar."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def cells(self) -> list[str]:
        """Title, bar and figure in Markdown."""
        bar = "" if self.limit is None else f"{'at least' if self.least else 'at most'} {number(self.limit)}"
        return [self.title, bar, marked(number(self.value), self.met)]


@dataclass
class Result:
    """A section's table, and what else the page says of it."""

    name: str
    title: str
    note: str
    """How it was measured, in one or two sentences."""
    rows: list[Row] = field(default_factory=list)
    extra: str = ""
    """Another table, in Markdown."""
    data: dict[str, Any] = field(default_factory=dict)
    """What a plot shows, in JSON."""
    scale: float = 1.0
    engine: str = "onnxruntime"
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    machine: str = field(default_factory=machine)
    """In words. A file without one counts as measured on this machine."""

    def add(self, title: str, value: float, limit: float | None = None, *, least: bool = False) -> None:
        """Appends a row."""
        self.rows.append(Row(title, float(value), limit, least))

    @property
    def missed(self) -> list[str]:
        """The titles of rows that miss their bar."""
        return [row.title for row in self.rows if not row.met]

    def table(self) -> str:
        """The rows in Markdown; bold misses its bar."""
        return table(["", "target", "measured"], [row.cells for row in self.rows])

    @property
    def origin(self) -> str:
        """Machine and engine."""
        return f"{self.machine}, `--engine {self.engine}`"

    def section(self, *, origin: bool = False) -> str:
        """The section of the page, with its date, and with its origin if asked to."""
        measured = f"Measured on {self.date}{f' on {self.origin}' if origin else ''}."
        parts = [f"## {self.title}", f"{self.note} {measured}", self.table(), self.extra]
        return "\n\n".join(filter(None, parts))

    def save(self, folder: Path) -> None:
        """Writes the section's file."""
        write_whole(folder / f"{self.name}.json", json.dumps(asdict(self), indent=1).encode(), sync=False)

    @classmethod
    def read(cls, folder: Path, name: str) -> Self | None:
        """What was measured last; None if nothing was."""
        path = folder / f"{name}.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return cls(**{**found, "rows": [Row(**row) for row in found["rows"]]})


def ratio(part: float, whole: float) -> float:
    """A quotient; NaN, which misses every bar, if there is nothing to divide by."""
    return part / whole if whole else math.nan


def number(value: float) -> str:
    """A number with three digits, or all of an integer's."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def rows_table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """A Markdown table of figures without bars."""
    return table(head, [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows])
