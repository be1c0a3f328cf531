"""Learns silhouettes that no word names, five pictures each, by several recipes: python -m benchmarks.shapes [--write]

silhouette  intersection over union of the object with its shape, read from the pixels (`silhouette`), relative to that
            of real renders after the VAE's round trip; the target is 0.92
likeness    mean cosine (by the judge) of generated pictures to the five, relative to that of other renders of the same
            look on the same backgrounds; the target is 0.97
kept        backgrounds of photos and of other media, from the pixels (`readback`), and media, by the judge; the target
            is 98 %

The looks are the eight of `world.HELD_OUT_SHAPES`, which no picture of the miniature's training set shows. Each recipe
learns each word alone, by `ti-train`; the runtime draws photos on ten backgrounds, and the other media on those that
are not in the five pictures, with the same seeds for every recipe. `--work` gets the words, a sheet for each, with the
five pictures above those of the word, and the measurements, one line of JSON each, which are not repeated: the command
can be stopped at any time and continues where it was. `--write` puts the table into docs/results/shapes.md. Not
covered: patterns, and shapes beside other objects. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.exported import exported
from benchmarks.miniature import through_vae
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
from benchmarks.store import Store, model_digest
from benchmarks.words import NEW, SEEN, parser, saved
from oneword.export.source import find_model
from oneword.runtime.concept import load_concept
from oneword.runtime.model import Model
from oneword.train import cli
from oneword.train.evaluation.evaluate import sample
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.scores import likeness
from oneword.train.miniature import readback, world
from oneword.train.miniature.claims import QUESTIONS
from oneword.train.miniature.scores import Pictures, mean_iou
from oneword.train.miniature.world import Look, Scene, Thing

PAGE = RESULTS / "shapes.md"
NEW_PAGE = empty_page("Shapes", "Silhouettes that no word names, learned from five pictures each.", "shapes")
MEDIA = ("drawing", "icon", "painting")
COLOURS = ("red", "blue", "yellow", "orange", "purple", "lime", "pink", "cyan")  # of the shapes, in their order
LOOKS = tuple(
    Look(shape, colour, "white", "plain") for shape, colour in zip(world.HELD_OUT_SHAPES, COLOURS, strict=True)
)
STEPS = 20
TOKEN = "<shape>"
BARS = (  # the score, its name in the table, and the target
    ("silhouette", "silhouette, relative to real renders after the VAE", 0.92),
    ("likeness", "likeness to the five pictures, relative to other renders of the look", 0.97),
    ("backgrounds", "share of backgrounds kept in photos, by the pixels", 0.98),
    ("media", "share of media kept, by the judge", 0.98),
    ("media_backgrounds", "share of backgrounds kept in other media, by the pixels", 0.98),
)
FURTHER_SCORES = (
    ("worst_silhouette", "silhouette of the worst shape"),
    ("iou", "silhouette, not relative"),
    ("media_iou", "silhouette in other media, not relative"),
    ("seconds", "seconds per word"),
)
REAL = "real renders after the VAE"


def main() -> None:
    """Learns, draws and measures; prints a table and one line of JSON."""
    p = parser("shapes", __doc__)
    p.add_argument("--recipes", default="fast,precise", help="separated by commas")
    p.add_argument("--shapes", type=int, default=len(LOOKS), help="how many of the shapes")
    p.add_argument("--samples", type=int, default=2, help="pictures per prompt")
    args = p.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    model = Model.open(exported(args.model, args.work / "bundle"))
    judge = Judge(find_model(args.model)[0] / "judge")
    recipes, store = args.recipes.split(","), Store(args.work, model_digest(args.model))
    rows = [row for number in range(args.shapes) for row in measure(args, model, judge, store, number, recipes)]
    report = {name: means([row for row in rows if row["recipe"] == name]) for name in (*recipes, REAL)}
    text = summary(report, recipes, args)
    print(text)
    if args.write:
        write_section(PAGE, "shapes", f"{provenance('shapes', stored=store.file)}\n\n{text}", NEW_PAGE)
    print(json.dumps({name: {k: round(v, 3) for k, v in values.items()} for name, values in report.items()}))


def measure(
    args: argparse.Namespace, model: Model, judge: Judge, store: Store, number: int, recipes: Sequence[str]
) -> list[dict[str, Any]]:
    """Learns one look by each recipe, and scores its pictures."""
    look = LOOKS[number]
    training = np.stack(
        [world.render(scene, 1000 * number + index)[0] for index, scene in enumerate(photos(look, (SEEN[0], *SEEN)))]
    )
    folder = saved(training, args.work / look.shape)
    in_photos, in_media = photos(look, world.BACKGROUNDS), other_media(look)
    renders = np.stack([world.render(scene, 1000 * number + 500 + i)[0] for i, scene in enumerate(in_photos)])
    in_other_media = np.stack([world.render(scene, 1000 * number + 600 + i)[0] for i, scene in enumerate(in_media)])
    reference = judge.pictures(training)
    most_likeness = likeness(judge.pictures(renders), reference)
    real = scores(judge, through_vae(model, renders), in_photos, through_vae(model, in_other_media), in_media)

    def learned(recipe: str) -> dict[str, float]:
        seconds = learn(args, folder, recipe)
        model.load(replace(load_concept(folder / f"{recipe}.safetensors"), token=TOKEN))
        photo, other = (
            np.concatenate(
                sample(model, [world.caption(scene) for scene in scenes], args.samples, STEPS, 0, args.guidance)
            )
            for scenes in (in_photos, in_media)
        )
        model.unload(TOKEN)
        Image.fromarray(sheet_of([training, photo[:: args.samples]])).save(args.work / f"{look.shape}-{recipe}.png")
        in_each, in_others = (
            [scene for scene in scenes for _ in range(args.samples)] for scenes in (in_photos, in_media)
        )
        row = scores(judge, photo, in_each, other, in_others)
        similar = likeness(judge.pictures(photo), reference) / most_likeness
        return row | {"silhouette": row["iou"] / real["iou"], "likeness": similar, "seconds": seconds}

    rows: list[dict[str, Any]] = [{"recipe": REAL, "silhouette": 1.0, "likeness": 1.0, **real}]
    for recipe in recipes:
        facts = {"shape": look.shape, "recipe": recipe, "init": args.init}
        facts |= {"guidance": args.guidance, "samples": args.samples}
        rows.append(store.find(facts) or store.add(facts | learned(recipe)))
    return rows


def learn(args: argparse.Namespace, folder: Path, recipe: str) -> float:
    """Learns the word of a folder's pictures by a recipe. Returns the seconds."""
    output = folder / f"{recipe}.safetensors"
    started = time.perf_counter()
    options = ["--model", args.model, "--token", TOKEN, "--init", args.init, "--recipe", recipe]
    if status := cli.main([str(folder), *options, "--output", str(output)]):
        raise SystemExit(status)
    return time.perf_counter() - started


def photos(look: Look, backgrounds: Iterable[str]) -> list[Scene]:
    """Photos of a look, one on each background."""
    return [Scene((Thing(look, TOKEN),), background) for background in backgrounds]


def other_media(look: Look) -> list[Scene]:
    """The look in each other medium, on each background that is not in the five pictures."""
    return [Scene((Thing(look, TOKEN),), background, medium) for medium in MEDIA for background in NEW]


def scores(
    judge: Judge, photo: Pictures, in_photos: Sequence[Scene], other: Pictures, in_media: Sequence[Scene]
) -> dict[str, float]:
    """The scores of photos and of pictures in other media that do not depend on the five pictures."""
    return {
        "iou": mean_iou(photo, in_photos),
        "backgrounds": backgrounds_kept(photo, in_photos),
        "media": media_kept(judge, other, in_media),
        "media_backgrounds": backgrounds_kept(other, in_media),
        "media_iou": mean_iou(other, in_media),
    }


def backgrounds_kept(pictures: Pictures, scenes: Sequence[Scene]) -> float:
    """The share of pictures whose background is that of their scene."""
    pairs = zip(pictures, scenes, strict=True)
    return float(np.mean([readback.read_background(p, scene.drawn_as) == scene.background for p, scene in pairs]))


def media_kept(judge: Judge, pictures: Pictures, scenes: Sequence[Scene]) -> float:
    """The share of pictures whose medium is that of their scene."""
    choices = QUESTIONS["medium"]
    answers = np.array([*choices])[(judge.pictures(pictures) @ judge.texts([*choices.values()]).T).argmax(1)]
    return float(np.mean(answers == [scene.medium for scene in scenes]))


def sheet_of(rows: Sequence[Pictures]) -> npt.NDArray[np.uint8]:
    """Rows of pictures as one picture, white where a row is shorter than the longest."""
    width = max(map(len, rows))
    sheet = np.full((len(rows), width, world.SIZE, world.SIZE, 3), 255, np.uint8)
    for line, pictures in zip(sheet, rows, strict=True):
        line[: len(pictures)] = pictures
    return np.concatenate([np.concatenate([*line], 1) for line in sheet])


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each score over shapes, and the worst silhouette."""
    names = [name for name, *_ in (*BARS, *FURTHER_SCORES) if name in rows[0]]
    worst = min(row["silhouette"] for row in rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in names} | {"worst_silhouette": worst}


def summary(report: dict[str, dict[str, float]], recipes: Sequence[str], args: argparse.Namespace) -> str:
    """The recipes' means beside their targets, in Markdown."""
    rows = [
        [
            text,
            f"at least {bar}",
            *(marked(f"{report[r][name]:.3f}", report[r][name] >= bar) for r in recipes),
            f"{report[REAL][name]:.3f}",
        ]
        for name, text, bar in BARS
    ]
    columns = (*recipes, REAL)
    rows += [
        [text, "", *(f"{report[c][name]:.3g}" if name in report[c] else "" for c in columns)]
        for name, text in FURTHER_SCORES
    ]
    settings = (
        f"{STEPS} DDIM steps, guidance {args.guidance:g}, pictures per prompt: {args.samples}. Bold: misses its target."
    )
    return f"{settings}\n\n{table([f'mean of {args.shapes} shapes', 'target', *columns], rows)}"


if __name__ == "__main__":
    main()
