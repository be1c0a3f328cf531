"""The comparison with diffusers' script: its ratios and differences, from rows made by hand."""

from typing import Any

import pytest

from benchmarks.pages import with_error
from benchmarks.training import differences, summarise

pytestmark = pytest.mark.benchmarks


def row(contender: str, word: int, steps: int, seconds: float, likeness: float, editability: float) -> dict[str, Any]:
    scores = {"likeness": likeness, "editability": editability}
    return {"contender": contender, "word": word, "steps": steps, "seconds": seconds, **scores}


ROWS = [
    row("oneword", 0, 50, 10, 0.80, 0.20),
    row("oneword", 0, 100, 20, 0.82, 0.21),
    row("diffusers", 0, 750, 100, 0.99, 0.99),  # only the longest run counts
    row("diffusers", 0, 3000, 400, 0.81, 0.21),
    row("oneword", 1, 50, 10, 0.70, 0.20),
    row("oneword", 1, 100, 25, 0.70, 0.20),
    row("diffusers", 1, 3000, 300, 0.60, 0.22),
]


def test_a_word_is_as_fast_as_the_shortest_run_with_both_scores() -> None:
    summary = summarise(ROWS)["their seconds over ours at their likeness and editability"]

    assert summary["by word"] == [20, 0]  # 400 s over 20 s; the other word's editability is not reached
    assert summary["median"] == 10
    assert (summary["reached"], summary["reached bar"]) == (1, 2)


def test_differences_are_means_over_words_with_their_standard_errors() -> None:
    _, _, fifty, hundred = differences(ROWS).splitlines()

    # likeness: (-0.01 + 0.10) / 2, and half their distance; editability: (-0.01 - 0.02) / 2
    assert fifty == "| oneword, 50 steps | 35.0 | 0.0450 ± 0.0550 | -0.0150 ± 0.0050 |"
    assert hundred == "| oneword, 100 steps | 16.0 | 0.0550 ± 0.0450 | -0.0100 ± 0.0100 |"
    assert with_error([0.5]) == "0.5000"
