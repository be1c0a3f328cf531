"""Measurements that a benchmark keeps and does not repeat, one line of JSON each. No scores, no tables.

Imports nothing that is slow to load: `benchmarks.training` times the start of a process.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


class Store:
    """The measurements in `results.jsonl` of a folder. New ones are of the model of `digest`."""

    def __init__(self, work: Path, digest: str) -> None:
        self.file = file_of(work)
        self.digest = digest

    def rows(self) -> list[dict[str, Any]]:
        """The measurements of this model."""
        return [row for row in all_rows(self.file) if row["model"] == self.digest]

    def find(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The first measurement of this model with these facts, if there is one."""
        return next((row for row in self.rows() if facts.items() <= row.items()), None)

    def add(self, row: Mapping[str, Any], hidden: Collection[str] = ()) -> dict[str, Any]:
        """Prints a measurement without its `hidden` facts, and appends it to the file with the model."""
        whole = {**row, "model": self.digest}
        print(json.dumps({name: value for name, value in row.items() if name not in hidden}), flush=True)
        with self.file.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        return whole


def file_of(work: Path) -> Path:
    """The file of a folder's measurements."""
    return work / "results.jsonl"


def all_rows(file: Path) -> list[dict[str, Any]]:
    """The measurements of all models, oldest first."""
    return list(map(json.loads, file.read_text().splitlines())) if file.is_file() else []


def model_digest(model: str) -> str:
    """The start of a model's digest, which identifies its weights."""
    from oneword.export.source import digest_directory, find_model

    return digest_directory(find_model(model)[0])[:12]
