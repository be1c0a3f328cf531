"""Draws two learned words in one prompt, beside the base model's own captions: python -m benchmarks.pairs [--write]

Each recipe learns a word for each held-out look and style of the miniature, from five pictures each (those of
`benchmarks.paper`). The pictures are on backgrounds that none of the five shows, with the same seeds for all.

two objects       photos of every two looks: the share in which silhouette and first colour of both are right, read from
                  the pixels (`silhouette`); the reference is the caption that spells out both looks
object and style  every look in every style: the share in which the object is right, by the same reader, and the style
                  too. The judge reads the style: of the candidates, it is the one whose renders of the same look and
                  background are nearest. Candidates are the media and six styles. No caption names a held-out style, so
                  the reference draws the same looks in styles that have a name: six of twelve

The target for both is 0.9 of the reference's rate. `second word only` spells out the first object and keeps the second
object's word, or the style's. The error of a ratio is its standard error over scenes. Words and measurements are stored
in `--work` and not repeated: the command can be stopped at any time and continues where it was. `--write` puts the
table into docs/results/pairs.md. Ends in one line of JSON. Not covered: patterns and second colours, three words.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.miniature import sheet
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
from benchmarks.paper import Thing, looks, styles
from benchmarks.recipes import GUIDANCE, Lab, Row
from benchmarks.words import STEPS
from oneword.runtime.concept import load_concept, save_concept
from oneword.runtime.drawing import draw
from oneword.runtime.request import Request
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.scores import unit
from oneword.train.miniature import world
from oneword.train.miniature.scores import Pictures, both_right
from oneword.train.miniature.silhouette import object_right
from oneword.train.miniature.world import Scene
from oneword.train.recipe import named_recipe
from oneword.train.tasks import Task

PAGE = RESULTS / "pairs.md"
NEW_PAGE = empty_page("Two words", "Two learned words in one prompt, beside the base model's own captions.", "pairs")
NEW = tuple(world.BACKGROUNDS)[5:]  # the backgrounds that are not in the five pictures
OBJECTS, STYLES = "two objects", "object and style"
CAPTION, REAL, REAL_NAMED = "the true captions", "real renders", "real renders, styles with a name"
SECOND = "second word only"
BAR = 0.9
RENDERS = 4  # of each candidate style
Shares = npt.NDArray[np.float64]  # [scenes], the shares of pictures that are right


def main() -> None:
    """Measures what is not stored, prints a table and one line of JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipes", nargs="+", default=["directional"], metavar="RECIPE")
    p.add_argument("--looks", type=int, default=len(world.HELD_OUT_LOOKS))
    p.add_argument("--styles", type=int, default=len(world.HELD_OUT_STYLES))
    p.add_argument("--samples", type=int, default=2, help="pictures per scene")
    p.add_argument("--work", type=Path, default=Path("build/pairs"))
    p.add_argument("--write", action="store_true", help="write the table into docs/results/pairs.md")
    args = p.parse_args()
    for recipe in args.recipes:
        named_recipe(recipe)  # raises if there is none
    args.work.mkdir(parents=True, exist_ok=True)
    lab = Lab(args.work, args.samples)
    kinds = {OBJECTS: two_objects(args.looks), STYLES: object_and_style(args.looks, args.styles)}
    named = object_and_style(args.looks, args.styles, named=True)
    rows = [measure(lab, name, STYLES, named, real=name == REAL_NAMED) for name in (REAL_NAMED, CAPTION)]
    rows += [measure(lab, name, OBJECTS, kinds[OBJECTS], real=name == REAL) for name in (REAL, CAPTION)]
    rows.append(measure(lab, REAL, STYLES, kinds[STYLES], real=True))
    for recipe in args.recipes:
        things = [*looks(args.looks), *styles(args.styles)]
        for thing in things:
            lab.model.load(load_concept(learned(lab, thing, recipe)))
        for kind, scenes in kinds.items():
            rows.append(measure(lab, recipe, kind, scenes, words=2))
            rows.append(measure(lab, f"{recipe}, {SECOND}", kind, scenes, words=1))
        for thing in things:
            lab.model.unload(thing.token)
    report = rates(rows)
    text = f"{described(args, kinds)}\n\n{summary(report)}"
    print(text)
    if args.write:
        write_section(PAGE, "pairs", f"{provenance('pairs', stored=lab.store.file)}\n\n{text}", NEW_PAGE)
    print(json.dumps(report))


def two_objects(count: int) -> list[Scene]:
    """A photo of every two of the first `count` looks, which are named by their words."""
    things = [world.Thing(look, f"<look{number}>") for number, look in enumerate(world.HELD_OUT_LOOKS[:count])]
    return [
        Scene(pair if number % 2 else pair[::-1], NEW[number % len(NEW)])
        for number, pair in enumerate(itertools.combinations(things, 2))
    ]


def object_and_style(count: int, style_count: int, *, named: bool = False) -> list[Scene]:
    """Every look in every held-out style, or in as many styles with a name, which are others for every second look."""
    return [
        Scene((world.Thing(look, f"<look{number}>"),), NEW[(number + index) % len(NEW)], None, style)
        for number, look in enumerate(world.HELD_OUT_LOOKS[:count])
        for index, style in enumerate(styles_of(number, style_count, named))
    ]


def styles_of(look: int, count: int, named: bool) -> list[str]:
    """The names of the styles that a look is drawn in."""
    if named:
        return [*world.STYLES][look % 2 * count :][:count]
    return [*world.HELD_OUT_STYLES][:count]


def prompt(scene: Scene, words: int) -> str:
    """The scene's caption with two learned words, with only the second of them, or with none."""
    things = [thing if index >= 2 - words else replace(thing, name=None) for index, thing in enumerate(scene.things)]
    caption = world.caption(replace(scene, things=tuple(things)))
    for number, style in enumerate(world.HELD_OUT_STYLES):
        caption = caption.replace(f"in the style of {style}", f"in the style of <style{number}>")
    return caption


def learned(lab: Lab, thing: Thing, recipe: str) -> Path:
    """The file of a look's or style's word, which is learned unless it exists."""
    path = lab.work / f"{recipe}-{thing.token.strip('<>')}-{lab.store.digest}.safetensors"
    if not path.is_file():
        thing.write(lab.work)
        task = Task(thing.folder(lab.work), thing.token, thing.init)
        concept, facts = lab.learned(task, named_recipe(recipe).with_changes(subject=thing.subject), 0)
        save_concept(concept, path)
        print(f"{recipe} {thing.token}: {facts['seconds']:.0f} s", flush=True)
    return path


def measure(lab: Lab, of: str, kind: str, scenes: Sequence[Scene], *, words: int = 0, real: bool = False) -> Row:
    """The shares of pictures of each scene that are right: drawn by the model, or real renders."""
    facts = {"of": of, "kind": kind, "scenes": len(scenes), "samples": lab.samples}
    if stored := lab.store.find(facts):
        return stored
    if real:
        pictures = np.stack(
            [world.render(scene, seed)[0] for scene, seeds in seeded(scenes, lab.samples) for seed in seeds]
        )
    else:
        pictures = drawn(lab, scenes, words)
    Image.fromarray(sheet(pictures, lab.samples)).save(lab.work / f"{of}-{kind}.png".replace(" ", "-"))
    groups = [pictures[first : first + lab.samples] for first in range(0, len(pictures), lab.samples)]
    pairs = [*zip(groups, scenes, strict=True)]
    if kind == OBJECTS:
        return lab.keep({**facts, "right": [both_right(group, [scene] * len(group)) for group, scene in pairs]})
    objects = [[object_right(picture, scene, 0) for picture in group] for group, scene in pairs]
    in_style = [style_right(lab.judge, group, scene, rivals(scenes, scene)) for group, scene in pairs]
    shares = np.logical_and(objects, in_style).mean(1).tolist()
    return lab.keep({**facts, "right": shares, "object": float(np.mean(objects)), "style": float(np.mean(in_style))})


def drawn(lab: Lab, scenes: Sequence[Scene], words: int) -> Pictures:
    """The model's pictures of scenes, `lab.samples` of each."""
    requests = [
        Request(prompt(scene, words), seed=seeds[0], num_images=len(seeds), steps=STEPS, guidance_scale=GUIDANCE)
        for scene, seeds in seeded(scenes, lab.samples)
    ]
    return np.stack([picture.image for picture in draw(lab.model, *requests)])


def seeded(scenes: Sequence[Scene], samples: int) -> Iterator[tuple[Scene, range]]:
    """Scenes, each with the seeds of its pictures."""
    for number, scene in enumerate(scenes):
        yield scene, range(10_000 + number * samples, 10_000 + (number + 1) * samples)


def rivals(scenes: Sequence[Scene], scene: Scene) -> list[str | world.Style]:
    """The candidates for a scene's style: the media, and the styles in which its object is drawn."""
    look = scene.things[0].look
    named = [cast(str, other.style) for other in scenes if other.things[0].look == look]
    return [*named, *world.MEDIA.values()]


def style_right(
    judge: Judge, pictures: Pictures, scene: Scene, candidates: Sequence[str | world.Style]
) -> npt.NDArray[np.bool_]:
    """Whether the nearest renders of the scene, of those in each candidate style, are those in the scene's own."""
    centres = [centre(judge, replace(scene, style=style)) for style in candidates]
    nearest = (judge.pictures(pictures) @ unit(np.stack(centres)).T).argmax(1)
    return cast("npt.NDArray[np.bool_]", nearest == list(candidates).index(cast(str, scene.style)))


@cache
def centre(judge: Judge, scene: Scene) -> npt.NDArray[np.float32]:
    """The mean embedding [P] of a scene's renders."""
    return judge.pictures(np.stack([world.render(scene, seed)[0] for seed in range(RENDERS)])).mean(0)


def rates(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By contender: the rates of both kinds, and their ratios to the captions' with standard errors."""
    report: dict[str, dict[str, Any]] = {}
    references = {row["kind"]: np.array(row["right"]) for row in rows if row["of"] == CAPTION}
    for row in rows:
        entry, kind, right = report.setdefault(row["of"], {}), row["kind"], np.array(row["right"])
        entry[kind] = round(float(right.mean()), 4)
        entry |= {name: row[name] for name in ("object", "style") if name in row}
        if row["of"] not in (CAPTION, REAL, REAL_NAMED):
            entry[f"{kind}, relative"] = [round(value, 4) for value in ratio(right, references[kind])]
    return {name: report[name] for name in sorted(report, key=[REAL, REAL_NAMED, CAPTION, *report].index)}


def ratio(values: Shares, references: Shares) -> tuple[float, float]:
    """The ratio of two means over the same scenes, and its standard error (Cochran 1977, Sampling Techniques, 6.4)."""
    quotient = values.mean() / max(references.mean(), 1e-9)
    error = np.std(values - quotient * references, ddof=1) / np.sqrt(len(values)) / max(references.mean(), 1e-9)
    return float(quotient), float(error)


def described(args: argparse.Namespace, kinds: Mapping[str, Sequence[Scene]]) -> str:
    """What was measured, in a sentence."""
    return (
        f"{len(kinds[OBJECTS])} pairs of {args.looks} looks, and {len(kinds[STYLES])} pairs of a look and one of "
        f"{args.styles} styles; pictures per pair: {args.samples}; {STEPS} DDIM steps, guidance {GUIDANCE:g}. "
        "*Relative* is relative to the true captions, with its standard error. The targets are for two learned words "
        "only. Bold: misses its target."
    )


def summary(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The rates beside the targets, in Markdown."""
    head = ["", OBJECTS, "relative", STYLES, "object", "style", "relative"]
    rows: list[list[object]] = [["target", "", f"at least {BAR}", "", "", "", f"at least {BAR}"]]
    for name, entry in report.items():
        cells: list[object] = [
            f"{entry[key]:.1%}" if key in entry else "" for key in (OBJECTS, STYLES, "object", "style")
        ]
        relative = [relative_to_captions(name, entry.get(f"{kind}, relative")) for kind in (OBJECTS, STYLES)]
        rows.append([name, cells[0], relative[0], *cells[1:], relative[1]])
    return table(head, rows)


def relative_to_captions(name: str, value: Sequence[float] | None) -> str:
    """A ratio and its error; bold if it misses its target, which only two learned words have."""
    if value is None:
        return ""
    return marked(f"{value[0]:.3f} ± {value[1]:.3f}", value[0] >= BAR or SECOND in name)


if __name__ == "__main__":
    main()
