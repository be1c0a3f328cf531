"""`ti-eval`: scores learned words as the paper does, and draws its figure. A wrapper around `evaluation.evaluate`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from oneword.engines.errors import FileError, UsageError, counted
from oneword.engines.files import write_whole
from oneword.runtime.commands import HELP, PATH, exit_status, json_option, refuse_file, version_option
from oneword.runtime.concept import load_concept
from oneword.runtime.model import Model
from oneword.train.evaluation.prompts import LIKENESS_PROMPT, PROMPTS, STYLE_LIKENESS_PROMPT
from oneword.train.evaluation.scores import SAMPLES, STEPS, Formula
from oneword.train.recipe import Subject


@click.command(name="ti-eval", context_settings=HELP)
@version_option
@click.argument("bundle", type=PATH)
@click.option("--concept", "concepts", multiple=True, required=True, type=PATH, help="A learned word; may be repeated.")
@click.option(
    "--images",
    "folders",
    multiple=True,
    required=True,
    type=PATH,
    help="Folder of the training pictures, once for each --concept.",
)
@click.option("--judge", default="miniature", show_default=True, help="Directory of a CLIP model.")
@click.option("--prompts", type=click.Choice(list(PROMPTS)), help="Set of prompts.  [default: the judge's]")
@click.option(
    "--subject",
    type=click.Choice([subject.value for subject in Subject]),
    default=Subject.OBJECT.value,
    show_default=True,
    help="What the words stand for.",
)
@click.option(
    "--formula",
    type=click.Choice([formula.value for formula in Formula]),
    default=Formula.PAPER.value,
    show_default=True,
    help="Formula for editability.",
)
@click.option("--samples", type=int, default=SAMPLES, show_default=True, help="Pictures per prompt.")
@click.option(
    "--steps",
    type=int,
    default=STEPS,
    show_default=True,
    help="Steps of DDIM, or of Euler for a model of flow matching.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of each prompt's first sample.")
@click.option("--output", type=PATH, help="Folder for samples-N.png, scores.json and figure.svg.")
@json_option
def command(
    bundle: Path,
    concepts: Sequence[Path],
    folders: Sequence[Path],
    judge: str,
    prompts: str | None,
    subject: str,
    formula: str,
    samples: int,
    steps: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score learned words by likeness and editability (Gal et al. 2022, section 5), with the model in BUNDLE."""
    if len(concepts) != len(folders):
        words, given_folders = counted(len(concepts), "concept"), counted(len(folders), "folder")
        raise UsageError(f"{words} and {given_folders}: give --images for each --concept")
    if samples < 1:
        raise UsageError(f"--samples is {samples}: give at least 1")
    if output:
        refuse_file("--output", output)
    prompts = prompts or ("miniature" if judge == "miniature" else "paper")
    settings = {"subject": subject, "formula": formula, "samples": samples, "steps": steps, "seed": seed}
    report = score(bundle, concepts, folders, judge, prompts, settings, output)
    from oneword.train.evaluation.report import figure, table

    if output:
        write_whole(output / "scores.json", (json.dumps(report, indent=2) + "\n").encode())
        write_whole(output / "figure.svg", figure(report).encode())
    click.echo(json.dumps(report, indent=2) if as_json else table(report))


def score(
    bundle: Path,
    concepts: Sequence[Path],
    folders: Sequence[Path],
    judge: str,
    prompts: str,
    settings: dict[str, Any],
    output: Path | None,
) -> dict[str, Any]:
    """Returns every word's scores and the paper's two bounds as JSON values; writes sample sheets to `output`."""
    import numpy as np

    from oneword.export.source import silence_libraries  # imports torch, so not for --help
    from oneword.train.evaluation.evaluate import bounds, evaluate
    from oneword.train.evaluation.judge import Judge
    from oneword.train.evaluation.report import as_json, sheet
    from oneword.train.pictures import read_pictures

    silence_libraries()
    subject = Subject(settings["subject"])
    groups = PROMPTS[prompts][subject]
    options: dict[str, Any] = {
        "samples": settings["samples"],
        "steps": settings["steps"],
        "seed": settings["seed"],
        "formula": Formula(settings["formula"]),
        "likeness_prompt": STYLE_LIKENESS_PROMPT if subject is Subject.STYLE else LIKENESS_PROMPT,
    }
    clip = Judge(judge_folder(judge))
    model = Model.open(bundle)
    if output:
        make_folder(output)
    side = model.manifest.defaults.width
    loaded = [load_concept(path) for path in concepts]
    for concept in loaded:  # refuses a word of another model now, not after hours of drawing
        model.load(concept)
        model.unload(concept.token)
    training = [np.stack([picture.pixels for picture in read_pictures(folder, side)]) for folder in folders]
    ends = bounds(model, clip, training, groups, **options)
    words = []
    for number, (path, concept) in enumerate(zip(concepts, loaded, strict=True)):
        model.load(concept)
        scores, pictures = evaluate(model, clip, concept.token, training[number], groups, **options)
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
        if output:
            png = io.BytesIO()
            sheet(list(pictures.values())).save(png, "PNG")
            write_whole(output / f"samples-{number}.png", png.getvalue())
    return {
        **settings,
        "judge": judge,
        "prompts": {name: list(group) for name, group in groups.items()},
        "words": words,
    }


def judge_folder(judge: str) -> Path:
    """The CLIP directory, or the miniature's judge. Raises `UsageError` if it does not exist."""
    from oneword.export.source import find_model

    folder = find_model(judge)[0] / "judge" if judge == "miniature" else Path(judge)
    if not folder.is_dir():
        raise UsageError(f"--judge {judge}: the folder {folder} does not exist: give the directory of a CLIP model")
    return folder


def make_folder(output: Path) -> None:
    """Creates `output`. Raises `FileError` if it cannot be created."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--output {output}: {error.strerror}: give a writable folder") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    return exit_status(command, "ti-eval", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
