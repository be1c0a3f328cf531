"""Compares recipes and starts of learning on held-out looks and styles: python -m benchmarks.recipes [--write]

The miniature's twelve held-out looks and six held-out styles, five pictures each, are learned by every contender with
three seeds, each word in a run of its own. A contender is RECIPE[:INIT[:SETTING,SETTING]], such as `directional:auto`
or `directional:auto:steps=25,learning_rate=0.15`. INIT is `object` unless given; `shape` stands for the word that a
person would say, the look's shape. A style starts from `painting` unless INIT is `auto`, and has no `shape`.

likeness     of looks: mean cosine (by the judge) of ten generated pictures to the five, relative to that of other
             renders of the look on the same backgrounds; the target is 0.97
right        on six new backgrounds: shape, both colours, pattern and background are all right, relative to the rate
             that the look's true caption reaches with the same seeds; the target is 0.97. The judge names the pattern;
             the rest is read from the pixels (`silhouette`, `readback`)
styles       likeness and editability by the paper's formulas
passes       the time of learning, without the start, in forward and backward passes of the UNet over 8 pictures; the
             target is 90
search       seconds in which `auto` finds its start

Every measurement is stored in `--work`, one line of JSON each, and not repeated: the command can be stopped at any time
and continues where it was. `--write` puts the table into docs/results/recipes.md. Ends in one line of JSON. Not
covered: words of several vectors, other models.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import words
from benchmarks.exported import exported
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
from benchmarks.paper import Thing, styles
from benchmarks.store import Store, model_digest
from benchmarks.words import LIKENESS_BAR, NEW, PASSES_BAR, RIGHT_BAR, STEPS
from oneword.export.source import find_model, load_source, silence_libraries
from oneword.runtime.concept import Concept
from oneword.runtime.model import Model
from oneword.train.evaluation.evaluate import evaluate
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.prompts import MINIATURE_STYLE_PROMPTS, STYLE_LIKENESS_PROMPT
from oneword.train.evaluation.scores import likeness
from oneword.train.learn import learn
from oneword.train.miniature import world
from oneword.train.recipe import Recipe, Subject, named_recipe
from oneword.train.tasks import Task

PAGE = RESULTS / "recipes.md"
NEW_PAGE = empty_page("Recipes", "Recipes and starts of learning, compared on held-out looks and styles.", "recipes")
CONTENDERS = ("fast", "quick", "directional", "directional:shape", "directional:auto")
CAPTION = "the true caption"
GUIDANCE = 4.0
Row = Mapping[str, Any]


def main() -> None:
    """Measures what is not stored, prints a table and one line of JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--contenders", nargs="+", default=CONTENDERS, metavar="CONTENDER")
    p.add_argument("--looks", type=int, default=12)
    p.add_argument("--styles", type=int, default=6)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--samples", type=int, default=8, help="pictures per prompt of a style")
    p.add_argument("--work", type=Path, default=Path("build/recipes"))
    p.add_argument("--write", action="store_true", help="write the table into docs/results/recipes.md")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for contender in args.contenders:
        recipe_and_init(contender)  # raises if it is not one
    lab = Lab(args.work, args.samples)
    rows = [
        row
        for seed in range(args.seeds)
        for number in range(args.looks)
        for row in (lab.caption(number, seed), *(lab.look(name, number, seed) for name in args.contenders))
    ]
    things = list(styles(args.styles))
    of_styles = [name for name in args.contenders if recipe_and_init(name)[1] != "shape"]
    rows += [lab.style(name, thing, seed) for seed in range(args.seeds) for thing in things for name in of_styles]
    report = means(rows)
    text = f"{described(args)}\n\n{summary(report)}"
    print(text)
    if args.write:
        write_section(PAGE, "recipes", f"{provenance('recipes', stored=lab.store.file)}\n\n{text}", NEW_PAGE)
    print(json.dumps(report))


def recipe_and_init(contender: str) -> tuple[Recipe, str]:
    """The recipe and the start that a contender names. Raises `UsageError`."""
    name, _, options = contender.partition(":")
    init, _, settings = options.partition(":")
    return named_recipe(name).with_text(filter(None, settings.split(","))), init or "object"


class Lab:
    """The model, its judge and the stored measurements."""

    def __init__(self, work: Path, samples: int) -> None:
        silence_libraries()
        self.work, self.samples = work, samples
        self.store = Store(work, model_digest("miniature"))
        self.model = Model.open(exported("miniature", work / "bundle"))
        self.judge = Judge(find_model("miniature")[0] / "judge")
        self.source = load_source("miniature")

    def look(self, contender: str, number: int, seed: int) -> Row:
        """Learns a held-out look and scores the word."""
        row = {"of": contender, "look": number, "seed": seed}
        return self.store.find(row) or self.keep({**row, **self.score_look(contender, number, seed)})

    def caption(self, number: int, seed: int) -> Row:
        """Scores a look's true caption in the word's place."""
        row = {"of": CAPTION, "look": number, "seed": seed}
        if stored := self.store.find(row):
            return stored
        look = world.HELD_OUT_LOOKS[number]
        pictures = self.draw(look.words, NEW, seed)
        return self.keep({**row, "right": self.right(pictures, look)})

    def style(self, contender: str, thing: Thing, seed: int) -> Row:
        """Learns a held-out style and scores the word."""
        row = {"of": contender, "style": thing.token, "seed": seed, "samples": self.samples}
        if stored := self.store.find(row):
            return stored
        recipe, init = recipe_and_init(contender)
        thing.write(self.work)
        task = Task(thing.folder(self.work), thing.token, init if init == "auto" else thing.init)
        concept, facts = self.learned(task, recipe.with_changes(subject=Subject.STYLE), seed)
        self.model.load(concept)
        scores, _ = evaluate(
            self.model,
            self.judge,
            thing.token,
            thing.pictures,
            MINIATURE_STYLE_PROMPTS,
            samples=self.samples,
            steps=STEPS,
            likeness_prompt=STYLE_LIKENESS_PROMPT,
        )
        self.model.unload(thing.token)
        return self.keep({**row, **facts, "likeness": scores.likeness, "editability": scores.mean_editability})

    def score_look(self, contender: str, number: int, seed: int) -> dict[str, Any]:
        """What is measured of a look's word."""
        look, token = world.HELD_OUT_LOOKS[number], "<word>"
        recipe, init = recipe_and_init(contender)
        training = words.draw(look, (words.SEEN[0], *words.SEEN), 1000 * number)
        folder = words.saved(training, self.work / f"{number:02d}")
        concept, facts = self.learned(Task(folder, token, look.shape if init == "shape" else init), recipe, seed)
        self.model.load(concept)
        pictures = self.draw(token, (*words.SEEN, *NEW), seed)
        self.model.unload(token)
        reference = self.judge.pictures(training)
        renders = self.judge.pictures(words.draw(look, (*words.SEEN, *NEW), 1000 * number + 500))
        ratio = likeness(self.judge.pictures(pictures), reference) / likeness(renders, reference)
        return {**facts, "likeness": ratio, "right": self.right(pictures[len(words.SEEN) :], look)}

    def learned(self, task: Task, recipe: Recipe, seed: int) -> tuple[Concept, dict[str, Any]]:
        """Learns a word alone. Returns it, what it starts from, and the seconds and passes of learning."""
        one_pass = words.pass_seconds(self.source)  # just before, because other processes may share the machine
        *_, last = learn(self.source, [task], recipe, seed)
        [concept] = last.concepts
        seconds = last.timings["learn"]
        return concept, {
            "init": concept.provenance["init"],
            "seconds": seconds,
            "passes": seconds / one_pass,
            "search": last.timings.get("search"),
        }

    def draw(self, name: str, backgrounds: Sequence[str], seed: int) -> np.ndarray:
        """A photo of the thing on each background [N, 64, 64, 3]."""
        return words.photographs(self.model, name, backgrounds, GUIDANCE, seed)

    def right(self, pictures: np.ndarray, look: world.Look) -> float:
        """The share of photos on the new backgrounds in which everything is right."""
        return words.all_right(words.read(self.judge, pictures, look))

    def keep(self, row: dict[str, Any]) -> Row:
        """Keeps a measurement, rounded."""
        return self.store.add({n: round(value, 4) if isinstance(value, float) else value for n, value in row.items()})


def means(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By contender: likeness and right with the lowest and highest mean of a seed, styles' scores, medians of costs.

    `right` is relative to the captions' rate, which is that of the contender CAPTION itself.
    """
    report: dict[str, dict[str, Any]] = {}
    rates = over_seeds([row for row in rows if row["of"] == CAPTION], "right")
    for name in dict.fromkeys(row["of"] for row in rows):
        looks = [row for row in rows if row["of"] == name and "look" in row]
        of_styles = [row for row in rows if row["of"] == name and "style" in row]
        if name == CAPTION:
            report[name] = {"right": rates}
            continue
        entry: dict[str, Any] = {}
        if looks:
            entry["likeness"] = over_seeds(looks, "likeness")
            entry["right"] = [round(value / max(rates[0], 1e-9), 4) for value in over_seeds(looks, "right")]
        for score in ("likeness", "editability") if of_styles else ():
            entry[f"style {score}"] = over_seeds(of_styles, score)[0]
        for cost in ("seconds", "passes", "search"):
            values = [row[cost] for row in (*looks, *of_styles) if row[cost] is not None]
            entry[cost] = round(statistics.median(values), 2) if values else None
        report[name] = entry
    return report


def over_seeds(rows: Sequence[Row], name: str) -> list[float]:
    """The mean of a measure, and the lowest and highest mean of one seed."""
    by_seed = [
        float(np.mean([row[name] for row in rows if row["seed"] == seed])) for seed in sorted({r["seed"] for r in rows})
    ]
    return [round(value, 4) for value in (float(np.mean(by_seed)), min(by_seed), max(by_seed))]


def described(args: argparse.Namespace) -> str:
    """What was measured, in a sentence."""
    return (
        f"{args.looks} looks and {args.styles} styles, seeds: {args.seeds}; {STEPS} DDIM steps, guidance {GUIDANCE:g} "
        "for looks. In brackets: the lowest and the highest mean of a seed. Bold: misses its target."
    )


def summary(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The contenders beside the targets, in Markdown."""
    head = [
        "recipe:start",
        "likeness",
        "all right",
        "style: likeness",
        "style: editability",
        "seconds",
        "passes",
        "search, s",
    ]
    rows: list[list[object]] = [
        ["target", f"at least {LIKENESS_BAR}", f"at least {RIGHT_BAR}", "", "", "", f"at most {PASSES_BAR}", ""]
    ]
    for name, entry in report.items():
        if name == CAPTION:
            continue
        likeness_, right, passes = entry.get("likeness"), entry.get("right"), entry.get("passes")
        rows.append(
            [
                name,
                marked(ranged(likeness_), likeness_[0] >= LIKENESS_BAR) if likeness_ else "",
                marked(ranged(right), right[0] >= RIGHT_BAR) if right else "",
                *(f"{entry[key]:.3f}" if key in entry else "" for key in ("style likeness", "style editability")),
                f"{entry['seconds']:.1f}",
                marked(f"{passes:.0f}", entry["passes"] <= PASSES_BAR),
                "" if entry["search"] is None else f"{entry['search']:.1f}",
            ]
        )
    text = table(head, rows)
    if CAPTION in report:
        text += f"\n\n*All right* is relative to {CAPTION}, which is right in {report[CAPTION]['right'][0]:.1%}."
    return text


def ranged(values: Sequence[float]) -> str:
    """A mean with the lowest and highest mean of a seed."""
    mean, low, high = values
    return f"{mean:.3f} ({low:.3f}, {high:.3f})"


if __name__ == "__main__":
    main()
