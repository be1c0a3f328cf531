"""The report of `ti-eval`: every word's scores and bounds as JSON values, as a table and as the paper's figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from oneword.train.evaluation.evaluate import Pictures
from oneword.train.evaluation.scores import Scores
from oneword.train.plots import scatter


def as_json(scores: Scores) -> dict[str, Any]:
    """Likeness, and editability by group and on average."""
    return {"likeness": scores.likeness, "editability": {**scores.editability, "mean": scores.mean_editability}}


def table(report: Mapping[str, Any]) -> str:
    """The scores as text: one line per word, followed by its bounds."""
    groups = [*report["prompts"], "mean"]
    lines = [f"{'word':26} {'likeness':>9}" + "".join(f"{name:>13}" for name in groups)]
    for word in report["words"]:
        for name, scores in {word["token"]: word, **{f"  {name}": end for name, end in word["bounds"].items()}}.items():
            cells = "".join(f"{scores['editability'][group]:13.3f}" for group in groups)
            lines.append(f"{name:26} {scores['likeness']:9.3f}{cells}")
    lines.append(f"editability by the {report['formula']}'s formula")
    return "\n".join(lines)


def figure(report: Mapping[str, Any]) -> str:
    """The paper's scatter plot as SVG: editability across, likeness up, one dot per word and one per bound's mean."""
    words = report["words"]
    names = [word["recipe"] or word["token"] for word in words]
    points = [
        (f"{name} {word['token']}" if names.count(name) > 1 else name, word["likeness"], word["editability"]["mean"])
        for name, word in zip(names, words, strict=True)
    ]
    for name in dict.fromkeys(name for word in words for name in word["bounds"]):
        ends = [word["bounds"][name] for word in words if name in word["bounds"]]
        likeness = float(np.mean([end["likeness"] for end in ends]))
        points.append((name, likeness, float(np.mean([end["editability"]["mean"] for end in ends]))))
    return scatter(points, across=f"editability, the {report['formula']}'s formula")


def sheet(pictures: Sequence[Pictures], count: int = 8) -> Image.Image:
    """The first `count` samples of each prompt: one row per prompt."""
    return Image.fromarray(np.concatenate([np.concatenate(list(samples[:count]), 1) for samples in pictures]))
