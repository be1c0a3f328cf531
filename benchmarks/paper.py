"""The paper's comparison (Gal et al. 2022, section 5) on the miniature: every set-up, its figure, and the biased noun.

    python -m benchmarks.paper [--looks 4] [--styles 2] [--steps 300] [--samples 16] [--page]

Held-out looks and styles, five pictures each, are learned in every set-up of the paper and in our own `fast`; the
words of a set-up share their batches. Scores are the paper's formulas by the miniature's judge, on pictures the runtime
draws (DDIM). Beside them stands what needs no word: captions as a person would write them in its place, short (shape
and main colour) and long (the whole look), the training pictures, and the prompt without the word. The paper has 5,000
steps, 64 samples and 50 DDIM steps: `--steps 5000 --samples 64 --sample-steps 50`.

The bias experiment: the miniature's biased noun was red in nine of ten of its pictures. A word is learned from a
balanced set, a picture of each colour, starting from the noun; the entropy of the colours in samples of both is
compared, as the judge names them and as the pixels say.

Everything measured is kept in `--work`, one JSON line each, and not measured again. `--page` writes docs/paper.md's
tables and figures. Not here: real photographs, and what people would say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.exported import exported
from benchmarks.pages import table, write_section
from oneword.export.source import digest_directory, find_model
from oneword.runtime.concept import load_concept, save_concept
from oneword.runtime.model import Model
from oneword.train.evaluation.evaluate import TRAINING, WORDLESS, bounds, evaluate, sample
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.prompts import (
    LIKENESS_PROMPT,
    MINIATURE_PROMPTS,
    MINIATURE_STYLE_PROMPTS,
    STYLE_LIKENESS_PROMPT,
)
from oneword.train.learn import learn, quiet
from oneword.train.miniature import readback, world
from oneword.train.miniature.claims import QUESTIONS
from oneword.train.plots import scatter
from oneword.train.recipe import RECIPES, Subject
from oneword.train.tasks import Task

PAGE = Path("docs/paper.md")
SETUPS = tuple(name for name in RECIPES if name != "style")
MULTIPLE = ("two-vectors", "three-vectors", "progressive-two", "progressive-three", "per-image")
CAPTIONS = ("caption, short", "caption, long")


def main() -> None:
    """Measure, keep, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="miniature")
    p.add_argument("--looks", type=int, default=4)
    p.add_argument("--styles", type=int, default=2)
    p.add_argument("--setups", default=",".join(SETUPS))
    p.add_argument("--steps", type=int, default=300, help="of every set-up but fast")
    p.add_argument("--samples", type=int, default=16, help="pictures a prompt")
    p.add_argument("--sample-steps", type=int, default=20)
    p.add_argument("--balanced-samples", type=int, default=64)
    p.add_argument("--work", type=Path, default=Path("build/paper"))
    p.add_argument("--page", action="store_true", help=f"write {PAGE}'s tables and figures")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    quiet()
    lab = Lab(args)
    subjects = [*looks(args.looks), *styles(args.styles)]
    for subject in subjects:
        subject.write(args.work)
    for setup in args.setups.split(","):
        lab.learn_and_score(setup, subjects)
    for subject in subjects:
        lab.score_without_a_word(subject)
    lab.bias()
    rows = lab.kept()
    means = means_of(rows)
    if args.page:
        write_page(rows, means, args)
    print(json.dumps({"setups": means, "order": order(means), "bias": [row for row in rows if "entropy" in row]}))


class Thing:
    """What is learned: a look or a style, its token, its five pictures, and how a person would describe it."""

    def __init__(
        self, token: str, subject: Subject, scenes: Sequence[world.Scene], seed: int, said: Sequence[str]
    ) -> None:
        self.token, self.subject, self.said = token, subject, said
        self.pictures = np.stack([world.render(scene, seed + i)[0] for i, scene in enumerate(scenes)])
        is_style = subject is Subject.STYLE
        self.prompts = MINIATURE_STYLE_PROMPTS if is_style else MINIATURE_PROMPTS
        self.likeness_prompt = STYLE_LIKENESS_PROMPT if is_style else LIKENESS_PROMPT
        self.init = "painting" if is_style else "object"

    def write(self, work: Path) -> None:
        """The pictures as a folder under `work`."""
        self.folder(work).mkdir(exist_ok=True)
        for number, picture in enumerate(self.pictures):
            Image.fromarray(picture).save(self.folder(work) / f"{number}.png")

    def folder(self, work: Path) -> Path:
        """Where its pictures are."""
        return work / self.token.strip("<>")


def looks(count: int) -> Iterable[Thing]:
    """Held-out looks on five backgrounds; captions by shape and colour, and by the whole look."""
    backgrounds = list(world.BACKGROUNDS)[:5]
    for number, look in enumerate(world.HELD_OUT_LOOKS[:count]):
        scenes = [world.Scene((world.Thing(look),), background) for background in backgrounds]
        said = (f"{look.colour} {look.shape}", look.words)
        yield Thing(f"<look{number}>", Subject.OBJECT, scenes, 1000 * number, said)


def styles(count: int) -> Iterable[Thing]:
    """Held-out styles on five scenes. No caption of the world can say them."""
    rng = np.random.default_rng(5)
    for number, style in enumerate(list(world.HELD_OUT_STYLES)[:count]):
        things = [(world.sample_thing(rng),) for _ in range(5)]
        scenes = [
            world.Scene(thing, background, None, style)
            for thing, background in zip(things, list(world.BACKGROUNDS)[:5], strict=True)
        ]
        yield Thing(f"<style{number}>", Subject.STYLE, scenes, 50_000 + 1000 * number, ())


class Lab:
    """The model, its judge, and what has been measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.digest = digest_directory(find_model(args.model)[0])[:12]
        self.model = Model.open(exported(args.model, args.work / "bundle"))
        self.judge = Judge(find_model(args.model)[0] / "judge")
        self.how = {"samples": args.samples, "steps": args.sample_steps}

    def learn_and_score(self, setup: str, things: Sequence[Thing]) -> None:
        """One set-up: the looks in one run, the styles in another, every word scored."""
        for subject in Subject:
            some = [thing for thing in things if thing.subject is subject]
            rows = [{"setup": setup, "word": thing.token, **self.how, "learned": self.args.steps} for thing in some]
            if not some or all(self.find(row) for row in rows):
                continue
            steps = {} if setup == "fast" else {"steps": self.args.steps}
            recipe = RECIPES[setup].with_changes(subject=subject, **steps)
            tasks = [Task(thing.folder(self.args.work), thing.token, thing.init) for thing in some]
            *_, last = learn(self.args.model, tasks, recipe)
            for thing, row, concept in zip(some, rows, last.concepts, strict=True):
                path = self.args.work / f"{setup}-{thing.token.strip('<>')}.safetensors"
                save_concept(concept, path)
                self.model.load(load_concept(path))
                self.keep({**row, **self.scores(thing, thing.token), "seconds": last.timings["learn"] / len(some)})
                self.model.unload(thing.token)

    def score_without_a_word(self, thing: Thing) -> None:
        """Captions in the word's place, and the two bounds."""
        for name, said in zip(CAPTIONS, thing.said, strict=False):
            row = {"setup": name, "word": thing.token, **self.how}
            if not self.find(row):
                self.keep({**row, **self.scores(thing, said)})
        rows = {name: {"setup": name, "word": thing.token, **self.how} for name in (TRAINING, WORDLESS)}
        if all(map(self.find, rows.values())):
            return
        prompts = {"likeness_prompt": thing.likeness_prompt, **self.how}
        [ends] = bounds(self.model, self.judge, [thing.pictures], thing.prompts, **prompts)
        for name, row in rows.items():
            self.keep({**row, "likeness": ends[name].likeness, "editability": ends[name].mean_editability})

    def scores(self, thing: Thing, token: str) -> dict[str, float]:
        """Likeness and editability of prompts with `token` in the word's place."""
        found, _ = evaluate(
            self.model,
            self.judge,
            token,
            thing.pictures,
            thing.prompts,
            likeness_prompt=thing.likeness_prompt,
            **self.how,
        )
        return {"likeness": found.likeness, "editability": found.mean_editability}

    def bias(self) -> None:
        """Colours of the biased noun's samples, and of a word's that was learned from every colour once."""
        row = {"bias": world.BIASED_NOUN, "samples": self.args.balanced_samples, "steps": self.args.sample_steps}
        if self.find(row):
            return
        flowers = [
            world.Look(world.BIASED_SHAPE, name, "black" if name == "white" else "white", "plain")
            for name in world.COLOURS
        ]
        scenes = [world.Scene((world.Thing(look),), "studio") for look in flowers]
        balanced = Thing("<fair>", Subject.OBJECT, scenes, 90_000, ())
        balanced.write(self.args.work)
        *_, last = learn(
            self.args.model, [Task(balanced.folder(self.args.work), "<fair>", world.BIASED_NOUN)], RECIPES["fast"]
        )
        self.model.load(last.concepts[0])
        prompts = [f"a photo of a {word} in the studio" for word in (world.BIASED_NOUN, "<fair>")]
        before, after = sample(self.model, prompts, self.args.balanced_samples, self.args.sample_steps, 0)
        self.model.unload("<fair>")
        sheet = np.concatenate([np.concatenate(list(some[:12]), 1) for some in (before, after)])
        Image.fromarray(sheet).save(self.args.work / "bias.png")
        for name, pictures in (("the noun", before), ("the word", after)):
            colours = {"judge": self.named(pictures), "pixels": [painted(picture) for picture in pictures]}
            entropies = {witness: round(entropy(some), 3) for witness, some in colours.items()}
            red = {witness: round(some.count("red") / len(some), 3) for witness, some in colours.items()}
            self.keep({**row, "of": name, "entropy": entropies, "red": red})

    def named(self, pictures: np.ndarray) -> list[str]:
        """The colour the judge names for each picture."""
        asked = QUESTIONS["colour"]
        return np.array(list(asked))[
            (self.judge.pictures(pictures) @ self.judge.texts(list(asked.values())).T).argmax(1)
        ].tolist()

    def find(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured under these facts against these weights."""
        wanted = {**row, "model": self.digest}
        return next((old for old in self.kept() if wanted.items() <= old.items()), None)

    def keep(self, row: Mapping[str, Any]) -> None:
        """One line more."""
        print(json.dumps(row), flush=True)
        with (self.args.work / "results.jsonl").open("a") as file:
            file.write(json.dumps({**row, "model": self.digest}) + "\n")

    def kept(self) -> list[dict[str, Any]]:
        """Everything measured against these weights."""
        path = self.args.work / "results.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [row for row in map(json.loads, lines) if row["model"] == self.digest]


def painted(picture: np.ndarray) -> str:
    """The paint that covers most of the object, by its pixels."""
    colours = readback.read_colours(picture, "studio", world.MEDIA["photo"])
    return max(colours, key=colours.__getitem__)


def entropy(values: Sequence[str]) -> float:
    """Of the values' shares, in bits: 0 where all are one, log2(12) = 3.58 where twelve are equally many."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def means_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean likeness and editability of each set-up, over looks and over styles apart."""
    means: dict[str, dict[str, float]] = {}
    for setup in dict.fromkeys(row["setup"] for row in rows if "setup" in row):
        means[setup] = {
            f"{kind} {name}": round(float(np.mean(values)), 4)
            for kind in ("look", "style")
            for name in ("likeness", "editability")
            if (values := [r[name] for r in rows if r.get("setup") == setup and r["word"].startswith(f"<{kind}")])
        }
    return means


def order(means: Mapping[str, Mapping[str, float]]) -> list[tuple[str, bool]]:
    """What the paper found, and whether it is so here (looks)."""
    like = {name: m["look likeness"] for name, m in means.items() if "look likeness" in m}
    edit = {name: m["look editability"] for name, m in means.items() if "look editability" in m}
    claims: list[tuple[str, bool]] = []
    if "one-word" in like:
        several = [name for name in MULTIPLE if name in like]
        one = "one-word"
        claims += [(f"one word is as like as {name} (within 0.02)", like[one] >= like[name] - 0.02) for name in several]
        claims += [(f"one word is more editable than {name}", edit[one] > edit[name]) for name in several]
        claims += [
            (f"one word is more like than the {name}", like[one] > like[name]) for name in CAPTIONS if name in like
        ]
        if {"high-rate", "low-rate"} <= like.keys():
            claims.append(
                (
                    "a low rate is less like and more editable",
                    like["low-rate"] < like[one] and edit["low-rate"] > edit[one],
                )
            )
            claims.append(
                (
                    "a high rate is more like and less editable",
                    like["high-rate"] > like[one] and edit["high-rate"] < edit[one],
                )
            )
    return claims


def write_page(
    rows: Sequence[Mapping[str, Any]], means: Mapping[str, Mapping[str, float]], args: argparse.Namespace
) -> None:
    """docs/paper.md's tables, docs/paper.svg, docs/paper-bias.png."""
    columns = [f"{kind} {name}" for kind in ("look", "style") for name in ("likeness", "editability")]
    lines = [(name, *(f"{m[c]:.3f}" if c in m else "" for c in columns)) for name, m in means.items()]
    points = [(name, m["look likeness"], m["look editability"]) for name, m in means.items() if "look likeness" in m]
    near = [name for name, _, _ in points if name not in (TRAINING, WORDLESS)]
    PAGE.with_suffix(".svg").write_text(scatter(points, near=near))
    agreed = "\n".join(f"- {'agrees' if holds else '**disagrees**'}: {claim}" for claim, holds in order(means))
    settings = f"{args.looks} looks, {args.styles} styles, {args.steps} steps of batch 4 (fast: its own)"
    settings += f"; {args.samples} samples a prompt, {args.sample_steps} DDIM steps."
    cells = table(("mean over words", *columns), lines)
    write_section(PAGE, "setups", f"{settings}\n\n{cells}\n\n![the paper's figure](paper.svg)\n\n{agreed}")
    biased = [row for row in rows if "entropy" in row]
    if biased:
        PAGE.with_name("paper-bias.png").write_bytes((args.work / "bias.png").read_bytes())
        head = ("samples of", "entropy, judge", "entropy, pixels", "red, judge", "red, pixels")
        cells = [
            (row["of"], *(row[what][w] for what in ("entropy", "red") for w in ("judge", "pixels"))) for row in biased
        ]
        text = f"{biased[0]['samples']} samples each; of twelve colours, at most 3.58 bits.\n\n{table(head, cells)}"
        write_section(PAGE, "bias", f"{text}\n\n![above the noun, below the word](paper-bias.png)")


if __name__ == "__main__":
    main()
