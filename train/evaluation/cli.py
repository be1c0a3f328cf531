"""`ti-eval`: scores learned words as the paper does, and draws its figure. A thin skin over `train.evaluate`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.runtime.concept import load_concept, write_whole
from oneword.runtime.model import Model
from oneword.train.cli import Parser
from oneword.train.evaluate import (
    LIKENESS_PROMPT,
    MINIATURE_PROMPTS,
    MINIATURE_STYLE_PROMPTS,
    PAPER_PROMPTS,
    PAPER_STYLE_PROMPTS,
    SAMPLES,
    STEPS,
    STYLE_LIKENESS_PROMPT,
    Formula,
    Judge,
    Scores,
    bounds,
    evaluate,
)
from oneword.train.pictures import read_pictures
from oneword.train.plots import scatter
from oneword.train.recipe import Subject
from oneword.train.run import quiet

PROMPTS = {
    ("paper", Subject.OBJECT): PAPER_PROMPTS,
    ("paper", Subject.STYLE): PAPER_STYLE_PROMPTS,
    ("miniature", Subject.OBJECT): MINIATURE_PROMPTS,
    ("miniature", Subject.STYLE): MINIATURE_STYLE_PROMPTS,
}


def parser() -> argparse.ArgumentParser:
    """The command line of `ti-eval`."""
    p = Parser("ti-eval", description="Score learned words by likeness and editability (Gal et al. 2022, section 5).")
    p.add_argument("bundle", type=Path, metavar="BUNDLE")
    p.add_argument("--concept", action="append", required=True, type=Path, help="a learned word, repeated for several")
    p.add_argument("--images", action="append", required=True, type=Path, help="its training pictures, one for each")
    p.add_argument("--judge", default="miniature", help="a directory with a CLIP model (default: the miniature's)")
    p.add_argument("--prompts", choices=["paper", "miniature"], help="which prompts (default: as the judge)")
    p.add_argument("--subject", choices=[s.value for s in Subject], default="object", help="what the words name")
    p.add_argument("--formula", choices=[f.value for f in Formula], default="paper", help="of editability")
    p.add_argument("--samples", type=int, default=SAMPLES, help=f"pictures a prompt (default {SAMPLES})")
    p.add_argument("--steps", type=int, default=STEPS, help=f"DDIM steps (default {STEPS})")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="folder for samples.png, scores.json and figure.svg")
    p.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ti-eval`; the exit status."""
    try:
        args = parser().parse_args(arguments)
        report = score(args)
        if args.output:
            write_whole(args.output / "scores.json", (json.dumps(report, indent=2) + "\n").encode())
            write_whole(args.output / "figure.svg", figure(report).encode())
    except OnewordError as error:
        print(f"ti-eval: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"ti-eval: {args.output}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ti-eval: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Every word's scores and the two bounds of the paper."""
    if len(args.concept) != len(args.images):
        raise UsageError(
            f"{len(args.concept)} concepts and {len(args.images)} folders: give --images for each --concept"
        )
    if args.samples < 1:
        raise UsageError(f"--samples is {args.samples}: give at least 1")
    quiet()
    subject = Subject(args.subject)
    prompts = PROMPTS[args.prompts or ("miniature" if args.judge == "miniature" else "paper"), subject]
    options: dict[str, Any] = {
        "samples": args.samples,
        "steps": args.steps,
        "seed": args.seed,
        "formula": Formula(args.formula),
        "likeness_prompt": STYLE_LIKENESS_PROMPT if subject is Subject.STYLE else LIKENESS_PROMPT,
    }
    judge = Judge(judge_folder(args.judge))
    model = Model.open(args.bundle)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    side = model.manifest.defaults.width
    concepts = [load_concept(path) for path in args.concept]
    training = [np.stack([picture.pixels for picture in read_pictures(folder, side)]) for folder in args.images]
    ends = bounds(model, judge, training, prompts, **options)
    words = []
    for number, (path, concept, seen) in enumerate(zip(args.concept, concepts, training, strict=True)):
        model.load(concept)
        scores, pictures = evaluate(model, judge, concept.token, seen, prompts, **options)
        model.unload(concept.token)
        words.append(
            {
                "token": concept.token,
                "file": str(path),
                "recipe": concept.provenance.get("recipe", ""),
                **as_json(scores),
                "bounds": {name: as_json(bound) for name, bound in ends[number].items()},
            }
        )
        if args.output:
            sheet, out = np.concatenate([np.concatenate(list(some[:8]), 1) for some in pictures.values()]), io.BytesIO()
            Image.fromarray(sheet).save(out, "PNG")
            write_whole(args.output / f"samples-{number}.png", out.getvalue())
    settings = {
        "subject": args.subject,
        "formula": args.formula,
        "samples": args.samples,
        "steps": args.steps,
        "seed": args.seed,
    }
    return {
        **settings,
        "judge": args.judge,
        "prompts": {name: list(group) for name, group in prompts.items()},
        "words": words,
    }


def as_json(scores: Scores) -> dict[str, Any]:
    """Likeness, and editability by group and in the mean."""
    return {"likeness": scores.likeness, "editability": {**scores.editability, "mean": scores.mean_editability}}


def judge_folder(judge: str) -> Path:
    """A CLIP directory, or the miniature's judge."""
    from oneword.export.source import find_model

    folder = find_model(judge)[0] / "judge" if judge == "miniature" else Path(judge)
    if not folder.is_dir():
        raise FileError(f"--judge {judge}: there is no folder {folder}: give a directory with a CLIP model")
    return folder


def table(report: Mapping[str, Any]) -> str:
    """The scores as text, a word a line and its bounds below it."""
    groups = [*report["prompts"], "mean"]
    lines = [f"{'word':26} {'likeness':>9}" + "".join(f"{name:>13}" for name in groups)]
    for word in report["words"]:
        for name, scores in {word["token"]: word, **{f"  {name}": end for name, end in word["bounds"].items()}}.items():
            cells = "".join(f"{scores['editability'][group]:13.3f}" for group in groups)
            lines.append(f"{name:26} {scores['likeness']:9.3f}{cells}")
    lines.append(f"editability by the {report['formula']}'s formula")
    return "\n".join(lines)


def figure(report: Mapping[str, Any]) -> str:
    """The paper's scatter as SVG: editability across, likeness up, a dot a word and one for the mean of each bound."""
    words = report["words"]
    points = [(word["recipe"] or word["token"], word["likeness"], word["editability"]["mean"]) for word in words]
    for name in dict.fromkeys(name for word in words for name in word["bounds"]):
        ends = [word["bounds"][name] for word in words if name in word["bounds"]]
        like = float(np.mean([end["likeness"] for end in ends]))
        points.append((name, like, float(np.mean([end["editability"]["mean"] for end in ends]))))
    return scatter(points, across=f"editability, the {report['formula']}'s formula")
