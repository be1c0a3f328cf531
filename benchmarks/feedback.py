"""Refines words by the likes of a simulated user: python -m benchmarks.feedback [--write]

A user has one of the twelve held-out looks in mind, as five pictures. In each round it sees six pictures of "a photo
of a <word>", ten steps each, and ranks them by the judge's cosine to the five, plus noise (N(0, 0.05)). Eight rounds
are 48 pictures. Every method starts from `object` and has the same user.

likeness    mean cosine (by the judge) of six fresh pictures of the word to the five; after 3 rounds the target is 0.5,
            after 8 it is 0.8 of the ceiling
ceiling     the same for the word that `ti-train` learns from the five with its defaults
answers     how often the word found for each aspect is the look's; finding none is wrong
by pixels   on six backgrounds: how often the object fits its shape better than all others, in its first colour
seconds     of a round: proposing, drawing and laying out six pictures; the target is 3

The methods: `aspects` is `ti-refine`; `a third removed` is the same without a random third of the words; `rocchio` and
`cma-es` search among eight principal components of the vocabulary; `random` composes words at random and keeps the
best. `polished` is the word of `aspects`, learned further by `ti-train --polish` from the five pictures and the first
of each round; `polished on the five` is the same without the latter.

`--development` uses other looks, one per shape, on which settings may be tuned; it cannot be written. `--silhouettes`
uses eight looks whose silhouettes no word names, and reads the silhouette in place of `by pixels`: its intersection
over union with the shape, on six backgrounds (`oneword.train.miniature.silhouette`).

Every run is kept in `--work`, under the model's digest, and not repeated; delete that folder to measure again.
`--write` puts the table into docs/results/feedback.md. Ends in one line of JSON. Not covered: people.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks import words
from benchmarks.exported import exported
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
from benchmarks.store import model_digest
from oneword.engines.files import write_whole
from oneword.export.source import find_model
from oneword.runtime.aspects import Aspect
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.drawing import draw
from oneword.runtime.grid import labelled_grid
from oneword.runtime.images import save_png
from oneword.runtime.lexicon import Lexicon, joined
from oneword.runtime.model import Model
from oneword.runtime.refine import (
    CANDIDATES,
    DISLIKED,
    LIKED,
    Refinement,
    components,
    finish,
    judge,
    picture_file,
    propose,
)
from oneword.runtime.request import Request
from oneword.runtime.samplers import Sampler
from oneword.runtime.table import base_table
from oneword.train import cli
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.scores import Embeddings, likeness
from oneword.train.miniature import world
from oneword.train.miniature.scores import mean_iou
from oneword.train.miniature.silhouette import object_right, silhouette_iou
from oneword.train.recipe import DEFAULT_RECIPE

PAGE = RESULTS / "feedback.md"
NEW_PAGE = empty_page(
    "Words refined by likes", "A simulated user likes and dislikes pictures of a word.", "feedback", "silhouettes"
)
START, TOKEN, PROMPT = "object", "<word>", "a photo of a <word>"
ROUNDS, STEPS, GUIDANCE, NOISE = 8, 10, 4.0, 0.05
SCORED = (0, 2, 3, 4, 5, 8)
FRESH = 6
BAR_3, BAR_8, PICTURES_BAR, SECONDS_BAR = 0.5, 0.8, 48, 3.0
ASPECTS = (
    Aspect("colour", tuple(world.COLOURS)),
    Aspect("shape", tuple(world.SHAPES)),
    Aspect("pattern", world.PATTERNS),
)

Vectors = npt.NDArray[np.float64]


class Method(Protocol):
    """A way to refine a word."""

    def propose(self) -> Sequence[Concept]:
        """The next round's six candidates."""

    def judge(self, ranking: Sequence[int]) -> None:
        """Learns from the user's ranking of them, best first."""

    def word(self) -> Concept:
        """The best word so far."""

    def answers(self) -> Mapping[str, str]:
        """The word found for each aspect, if the method has aspects."""


class Aspects:
    """`ti-refine`."""

    def __init__(self, lexicon: Lexicon, seed: int, aspects: tuple[Aspect, ...] = ASPECTS) -> None:
        self.lexicon = lexicon
        self.state = Refinement(TOKEN, START, aspects, lexicon.digest, seed)

    def propose(self) -> Sequence[Concept]:
        return propose(self.state, self.lexicon)

    def judge(self, ranking: Sequence[int]) -> None:
        self.state = judge(self.state, ranking=ranking)

    def word(self) -> Concept:
        return finish(self.state, self.lexicon)

    def answers(self) -> Mapping[str, str]:
        return self.state.words


class RandomSearch:
    """Composes random words as `ti-refine` does; the best picture of a round becomes candidate 0 of the next."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self.lexicon, self.rng = lexicon, np.random.default_rng(seed)
        self.best = Concept(TOKEN, lexicon.rows(START))
        self.tried: list[Concept] = []

    def propose(self) -> Sequence[Concept]:
        self.tried = [self.best]
        while len(self.tried) < CANDIDATES:
            chosen = [self.lexicon.rows(str(self.rng.choice(aspect.words))) for aspect in ASPECTS]
            words = [*chosen, self.lexicon.rows(START)]
            self.tried.append(Concept(TOKEN, joined(words)))
        return self.tried

    def judge(self, ranking: Sequence[int]) -> None:
        self.best = self.tried[ranking[0]]

    def word(self) -> Concept:
        return self.best

    def answers(self) -> Mapping[str, str]:
        return {}


class Directions:
    """Words of one row, as unit vectors [D]; their length is the vocabulary's mean."""

    def __init__(self, table: npt.NDArray[Any], start: npt.NDArray[Any]) -> None:
        """`table` is the vocabulary's rows [V, D], `start` the row of the word that searches start from [D]."""
        rows = table[table.any(1)].astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1)
        self.length = lengths.mean()
        self.start = unit(start.astype(np.float64))
        self.components = scaled(rows / lengths[:, None])
        """Eight principal components of the vocabulary's directions, [8, D]."""

    def concept(self, direction: Vectors) -> Concept:
        """The word of a direction [D] of any length."""
        return Concept(TOKEN, {"text_encoder": (unit(direction) * self.length).astype(np.float32)[None]})


class Rocchio:
    """Moves towards the upper half and away from the lower half, by antithetic pairs in eight components."""

    def __init__(self, directions: Directions, seed: int) -> None:
        self.directions, self.rng = directions, np.random.default_rng(seed)
        self.centre, self.sigma = directions.start, 1.0
        self.tried: Vectors = np.empty(0)

    def propose(self) -> Sequence[Concept]:
        basis = self.directions.components
        steps = self.sigma * self.rng.standard_normal((CANDIDATES // 2, len(basis))) @ basis
        self.tried = np.stack([unit(self.centre + sign * step) for step in steps for sign in (1, -1)])
        return [self.directions.concept(direction) for direction in self.tried]

    def judge(self, ranking: Sequence[int]) -> None:
        half = CANDIDATES // 2
        best, worst = self.tried[[*ranking[:half]]].mean(0), self.tried[[*ranking[half:]]].mean(0)
        moved = self.centre + LIKED * (best - self.centre) - DISLIKED * (worst - self.centre)
        self.centre, self.sigma = unit(moved), self.sigma * 0.93

    def word(self) -> Concept:
        return self.directions.concept(self.centre)

    def answers(self) -> Mapping[str, str]:
        return {}


class CmaEs:
    """CMA-ES over eight components, with the defaults of Hansen (2016, arXiv 1604.00772), table 1, without its negative
    weights."""

    def __init__(self, directions: Directions, seed: int) -> None:
        self.directions, self.rng = directions, np.random.default_rng(seed)
        count = len(directions.components)
        self.mean, self.sigma, self.covariance = np.zeros(count), 0.5, np.eye(count)
        self.path, self.sigma_path, self.generation = np.zeros(count), np.zeros(count), 0
        self.tried: Vectors = np.empty(0)

    def propose(self) -> Sequence[Concept]:
        factor = np.linalg.cholesky(self.covariance)
        self.tried = self.mean + self.sigma * self.rng.standard_normal((CANDIDATES, len(self.mean))) @ factor.T
        return [self._concept(point) for point in self.tried]

    def judge(self, ranking: Sequence[int]) -> None:
        n, parents = len(self.mean), CANDIDATES // 2
        weights = np.log((CANDIDATES + 1) / 2) - np.log(np.arange(1, parents + 1))
        weights /= weights.sum()
        effective = 1 / np.square(weights).sum()
        c_sigma = (effective + 2) / (n + effective + 5)
        damping = 1 + 2 * max(0, np.sqrt((effective - 1) / (n + 1)) - 1) + c_sigma
        c_path = (4 + effective / n) / (n + 4 + 2 * effective / n)
        c_one = 2 / ((n + 1.3) ** 2 + effective)
        c_mu = min(1 - c_one, 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective))
        length = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        steps = (self.tried[[*ranking[:parents]]] - self.mean) / self.sigma
        step = weights @ steps
        self.generation += 1
        values, vectors = np.linalg.eigh(self.covariance)
        whitened = vectors @ (vectors.T @ step / np.sqrt(values))
        self.sigma_path = (1 - c_sigma) * self.sigma_path + np.sqrt(c_sigma * (2 - c_sigma) * effective) * whitened
        norm = float(np.linalg.norm(self.sigma_path))
        steady = norm / np.sqrt(1 - (1 - c_sigma) ** (2 * self.generation)) < (1.4 + 2 / (n + 1)) * length
        self.path = (1 - c_path) * self.path + steady * np.sqrt(c_path * (2 - c_path) * effective) * step
        self.covariance = (
            (1 - c_one - c_mu) * self.covariance
            + c_one * (np.outer(self.path, self.path) + (not steady) * c_path * (2 - c_path) * self.covariance)
            + c_mu * (steps.T * weights) @ steps
        )
        self.mean = self.mean + self.sigma * step
        self.sigma *= float(np.exp(c_sigma / damping * (norm / length - 1)))

    def word(self) -> Concept:
        return self._concept(self.mean)

    def answers(self) -> Mapping[str, str]:
        return {}

    def _concept(self, point: Vectors) -> Concept:
        return self.directions.concept(self.directions.start + point @ self.directions.components)


@dataclass(frozen=True)
class Lab:
    """What every run needs."""

    model: Model
    lexicon: Lexicon
    judge: Judge
    directions: Directions

    def method(self, name: str, seed: int) -> Method:
        """A method at its start."""
        match name:
            case "aspects":
                return Aspects(self.lexicon, seed)
            case "a third removed":
                return Aspects(self.lexicon, seed, without_a_third(ASPECTS, seed))
            case "rocchio":
                return Rocchio(self.directions, seed)
            case "cma-es":
                return CmaEs(self.directions, seed)
            case _:
                return RandomSearch(self.lexicon, seed)


POLISHED, POLISHED_ON_THE_FIVE = "polished", "polished on the five"
WITH_ASPECTS = ("aspects", "a third removed")
METHODS = (*WITH_ASPECTS, "rocchio", "cma-es", "random", POLISHED, POLISHED_ON_THE_FIVE)


def main() -> None:
    """Runs every method with every look and seed; prints a table and one line of JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--looks", type=int, default=12)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    kinds = p.add_mutually_exclusive_group()
    kinds.add_argument("--development", action="store_true", help="other looks, on which settings may be tuned")
    kinds.add_argument("--silhouettes", action="store_true", help="looks whose silhouettes no word names")
    p.add_argument("--no-ceiling", action="store_true", help="do not learn the words that the ceiling needs")
    p.add_argument("--work", type=Path, default=Path("build/feedback"))
    p.add_argument("--write", action="store_true", help="write the table into docs/results/feedback.md")
    args = p.parse_args()
    if args.write and args.development:
        p.error("--development cannot be written: its looks are for tuning")

    args.work.mkdir(parents=True, exist_ok=True)
    lab = opened(args.work)
    kind = "development" if args.development else "silhouettes" if args.silhouettes else "held-out"
    looks = {"development": development_looks, "silhouettes": unnamed_looks}.get(kind, held_out_looks)()[: args.looks]
    args.looks = len(looks)
    folders = [args.work / (f"{number:02d}" if kind == "held-out" else f"{kind}-{number:02d}") for number in range(12)]
    digest = model_digest("miniature")
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.methods:
        learns = name in (POLISHED, POLISHED_ON_THE_FIVE)
        results[name] = [
            stored(
                run_file(args.work, kind, name, number, seed, digest=digest, learns=learns),
                polished if learns else run,
                *(lab, name, look, number, seed, folders[number]),
            )
            for number, look in enumerate(looks)
            for seed in range(args.seeds)
        ]
        print(f"{name:20}", "  ".join(f"{n}: {value:.2f}" for n, value in means(results[name]).items()), flush=True)
    ceilings = [
        stored(
            run_file(args.work, kind, "ceiling", number, digest=digest, learns=True),
            *(ceiling, lab, look, number, folders[number]),
        )
        for number, look in enumerate(looks)
        if not args.no_ceiling
    ]
    text = summary(results, ceilings, args)
    print(text)
    if args.write:
        newest = max(args.work.glob(f"{kind}-*-{digest}*.json"), key=lambda file: file.stat().st_mtime)
        section = "silhouettes" if args.silhouettes else "feedback"
        write_section(PAGE, section, f"{provenance('feedback', stored=newest)}\n\n{text}", NEW_PAGE)
    print(json.dumps(report(results, ceilings)))


def run_file(work: Path, kind: str, name: str, *numbers: int, digest: str, learns: bool) -> Path:
    """Where a run is kept: its name has the model's digest, and the recipe of a run that learns from pictures."""
    parts = [kind, name.replace(" ", "-"), *map(str, numbers), digest, *([DEFAULT_RECIPE] if learns else [])]
    return work / f"{'-'.join(parts)}.json"


def stored(file: Path, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `measure(*arguments)` returned when it was first called; the file keeps it."""
    if not file.exists():
        write_whole(file, json.dumps(measure(*arguments)).encode(), sync=False)
    measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def opened(work: Path) -> Lab:
    """The miniature and its judge."""
    bundle = Bundle.open(exported("miniature", work / "bundle"))
    lexicon = Lexicon.read(bundle)
    table = base_table(bundle.file(bundle.manifest.encoders[0].table))
    directions = Directions(table, lexicon.rows(START)["text_encoder"][0])
    return Lab(Model.open(bundle.path), lexicon, Judge(find_model("miniature")[0] / "judge"), directions)


def unit(values: Vectors) -> Vectors:
    """A vector [D], scaled to length 1."""
    return values / float(np.linalg.norm(values))


def scaled(directions: Vectors) -> Vectors:
    """Eight principal components of directions [N, D], each as long as the directions' standard deviation along it."""
    basis = components(directions, 8)
    return basis * ((directions - directions.mean(0)) @ basis.T).std(0)[:, None]


def development_looks() -> tuple[world.Look, ...]:
    """For each shape the first look with a pattern that a noun names; none is held out."""
    patterned = [look for look in world.NOUNS.values() if look.pattern != "plain"]
    return tuple(next(look for look in patterned if look.shape == shape) for shape in world.SHAPES)


def held_out_looks() -> tuple[world.Look, ...]:
    """The twelve looks of the table."""
    return world.HELD_OUT_LOOKS


def unnamed_looks() -> tuple[world.Look, ...]:
    """A look for each silhouette that no word names, in one colour each."""
    return tuple(
        world.Look(shape, colour, "white", "plain")
        for shape, colour in zip(world.HELD_OUT_SHAPES, world.COLOURS, strict=False)
    )


def without_a_third(aspects: Sequence[Aspect], seed: int) -> tuple[Aspect, ...]:
    """The aspects without a random third of each one's words, rounded up."""
    rng = np.random.default_rng([seed, 3])
    return tuple(
        replace(
            aspect,
            words=tuple(
                aspect.words[i] for i in sorted(rng.permutation(len(aspect.words))[: len(aspect.words) * 2 // 3])
            ),
        )
        for aspect in aspects
    )


@dataclass(frozen=True)
class Turn:
    """A round that the simulated user has judged."""

    number: int
    pictures: Sequence[Any]
    seconds: float


def turns(lab: Lab, method: Method, hidden: Embeddings, seed: int) -> Iterator[Turn]:
    """The user's rounds with a method, which learns from each."""
    rng = np.random.default_rng([seed, 7])
    for number in range(1, ROUNDS + 1):
        start = time.perf_counter()
        pictures = pictures_of(lab, method.propose(), [PROMPT], 5000 + 10 * seed + number)
        labelled_grid([pictures], [""], [[str(i) for i in range(1, CANDIDATES + 1)]])
        seconds = time.perf_counter() - start
        noisy = (lab.judge.pictures(pictures) @ hidden.T).mean(1) + rng.normal(0, NOISE, CANDIDATES)
        method.judge(np.argsort(-noisy).tolist())
        yield Turn(number, pictures, seconds)


def run(lab: Lab, name: str, look: world.Look, number: int, seed: int, folder: Path) -> dict[str, Any]:
    """One user refines one word: likeness by round, the answers, and the seconds of a round."""
    hidden = lab.judge.pictures(five(look, number))
    seed += 100 * number
    method = lab.method(name, seed)
    scores, seconds, drawn = {"0": score(lab, method.word(), hidden)}, [], 0
    for turn in turns(lab, method, hidden, seed):
        seconds.append(turn.seconds)
        drawn += len(turn.pictures)
        if turn.number in SCORED:
            scores[str(turn.number)] = score(lab, method.word(), hidden)
    wanted = {"shape": look.shape, "colour": look.colour, "pattern": look.pattern}
    wanted = {aspect: word for aspect, word in wanted.items() if word not in world.HELD_OUT_SHAPES}
    found = method.answers()
    return {
        "scores": scores,
        "seconds": seconds,
        "answers": {aspect: found.get(aspect) == word for aspect, word in wanted.items()}
        if name in WITH_ASPECTS
        else {},
        "pictures": drawn,
        "pixels": by_pixels(lab, method.word(), look),
    }


def polished(lab: Lab, name: str, look: world.Look, number: int, seed: int, folder: Path) -> dict[str, Any]:
    """The word of `aspects`, learned further from pictures: its scores, and the seconds of learning."""
    training = five(look, number)
    hidden = lab.judge.pictures(training)
    refined = folder.with_name(f"{folder.name}-refined-{seed}.safetensors")
    output = folder.with_name(f"{folder.name}-{name.replace(' ', '-')}-{seed}.safetensors")
    method = lab.method("aspects", seed + 100 * number)
    for turn in turns(lab, method, hidden, seed + 100 * number):
        for index, picture in enumerate(turn.pictures):
            save_png(picture, picture_file(refined, turn.number, index), "")
    word = method.word()
    save_concept(word, refined)
    words.saved(training, folder)
    start = time.perf_counter()
    line = [str(folder), "--model", "miniature", "--output", str(output)]
    if name == POLISHED:
        line += ["--polish", str(refined)]
    else:
        vectors = len(word.vectors["text_encoder"])
        line += ["--token", TOKEN, "--init", str(refined), "--recipe", DEFAULT_RECIPE, "--vectors", str(vectors)]
    learn(line)
    seconds = time.perf_counter() - start
    concept = load_concept(output)
    scores = {str(ROUNDS): score(lab, concept, hidden)}
    return {"scores": scores, "seconds": [seconds], "answers": {}, "pixels": by_pixels(lab, concept, look)}


def pictures_of(lab: Lab, concepts: Sequence[Concept], prompts: Sequence[str], seed: int) -> list[Any]:
    """A picture of each prompt with each word, all with one seed."""
    requests = [
        Request(
            prompt,
            seed=seed,
            steps=STEPS,
            sampler=Sampler.DDIM,
            guidance_scale=GUIDANCE,
            words={TOKEN: replace(concept, token=TOKEN)},
        )
        for concept in concepts
        for prompt in prompts
    ]
    return [picture.image for picture in draw(lab.model, *requests)]


def score(lab: Lab, concept: Concept, hidden: Embeddings) -> float:
    """The likeness of six fresh pictures of the word to the five."""
    request = Request(
        PROMPT,
        seed=77,
        num_images=FRESH,
        steps=STEPS,
        sampler=Sampler.DDIM,
        guidance_scale=GUIDANCE,
        words={TOKEN: replace(concept, token=TOKEN)},
    )
    return likeness(lab.judge.pictures([picture.image for picture in draw(lab.model, request)]), hidden)


def by_pixels(lab: Lab, concept: Concept, look: world.Look) -> float:
    """How often the word's object has the look's shape and first colour, on the six backgrounds not seen.

    For a silhouette that no word names, the mean score of its silhouette.
    """
    names = [name for name in world.BACKGROUNDS if name not in words.SEEN]
    pictures = pictures_of(lab, [concept], [f"{PROMPT} {world.BACKGROUNDS[name].phrase}" for name in names], 99)
    scenes = [world.Scene((world.Thing(look),), name) for name in names]
    read = silhouette_iou if look.shape in world.HELD_OUT_SHAPES else object_right
    return float(np.mean([read(image, scene, 0) for image, scene in zip(pictures, scenes, strict=True)]))


def five(look: world.Look, number: int) -> npt.NDArray[np.uint8]:
    """The five pictures that a user has in mind, which are those of `benchmarks.words`."""
    return words.draw(look, (words.SEEN[0], *words.SEEN), 1000 * number)


def learn(line: list[str]) -> None:
    """Runs `ti-train`. Raises SystemExit if it fails."""
    if status := cli.main(line):
        raise SystemExit(status)


def ceiling(lab: Lab, look: world.Look, number: int, folder: Path) -> dict[str, float]:
    """The scores of the word that `ti-train` learns from the five pictures."""
    training = five(look, number)
    output = folder.with_suffix(".safetensors")
    words.saved(training, folder)
    line = [str(folder), "--model", "miniature", "--token", TOKEN, "--init", START, "--output", str(output)]
    learn([*line, "--recipe", DEFAULT_RECIPE])
    concept = load_concept(output)
    return {"likeness": score(lab, concept, lab.judge.pictures(training)), "pixels": by_pixels(lab, concept, look)}


def means(runs: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The mean likeness after each round that was scored."""
    return {
        number: round(float(np.mean([entry["scores"][str(number)] for entry in runs])), 3)
        for number in SCORED
        if str(number) in runs[0]["scores"]
    }


def report(
    results: Mapping[str, Sequence[Mapping[str, Any]]], ceilings: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """All means."""
    methods = {}
    for name, runs in results.items():
        answers = [entry["answers"] for entry in runs if entry["answers"]]
        counts = [entry["pictures"] for entry in runs if "pictures" in entry]
        methods[name] = {
            "likeness": means(runs),
            "pixels": round(float(np.mean([entry["pixels"] for entry in runs])), 3),
            "answers": {aspect: round(float(np.mean([found[aspect] for found in answers])), 3) for aspect in answers[0]}
            if answers
            else {},
            **({"pictures": max(counts)} if counts else {}),
            "seconds": round(float(np.median([second for entry in runs for second in entry["seconds"]])), 3),
            "slowest": round(max(second for entry in runs for second in entry["seconds"]), 3),
        }
    top = (
        {name: round(float(np.mean([entry[name] for entry in ceilings])), 3) for name in ("likeness", "pixels")}
        if ceilings
        else {}
    )
    return {"methods": methods, "ceiling": top}


def real_silhouettes() -> float:
    """The silhouettes' mean score on real renders, on the six backgrounds not seen."""
    names = [name for name in world.BACKGROUNDS if name not in words.SEEN]
    scenes = [world.Scene((world.Thing(look),), name) for look in unnamed_looks() for name in names]
    return mean_iou(np.stack([world.render(scene, 900 + i)[0] for i, scene in enumerate(scenes)]), scenes)


def summary(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    ceilings: Sequence[Mapping[str, float]],
    args: argparse.Namespace,
) -> str:
    """The means beside their targets, in Markdown."""
    figures = report(results, ceilings)
    methods, top = figures["methods"], figures["ceiling"]
    head = ["likeness after rounds", *map(str, SCORED), "silhouette" if args.silhouettes else "right by pixels"]
    pixels = "{:.2f}" if args.silhouettes else "{:.0%}"
    entries = {**methods, **({"learned from the five": {**top, "likeness": {ROUNDS: top["likeness"]}}} if top else {})}
    rows = [
        [
            name,
            *(f"{entry['likeness'][number]:.2f}" if number in entry["likeness"] else "" for number in SCORED),
            pixels.format(entry["pixels"]),
        ]
        for name, entry in entries.items()
    ]
    if args.silhouettes:
        rows.append(["real renders", *[""] * len(SCORED), pixels.format(real_silhouettes())])
    parts = [
        f"{args.looks} looks, users per look: {args.seeds}; {ROUNDS} rounds of {CANDIDATES} pictures; "
        f"{STEPS} DDIM steps, guidance {GUIDANCE:g}. Bold: misses its target.",
        table(head, rows),
    ]
    if (entry := methods.get("aspects")) and not args.silhouettes:
        count = entry.get("pictures")
        three, share = entry["likeness"][3], entry["likeness"][8] / top["likeness"] if top else np.nan
        bars = [
            ["likeness after 3 rounds", f"at least {BAR_3}", marked(f"{three:.3f}", three >= BAR_3)],
            [
                "likeness after 8 rounds, relative to the ceiling",
                f"at least {BAR_8}",
                marked(f"{share:.3f}", share >= BAR_8) if top else "not measured",
            ],
            [
                "pictures",
                f"at most {PICTURES_BAR}",
                marked(count, count <= PICTURES_BAR) if count else "not measured",
            ],
            [
                "seconds of a round, median and slowest",
                f"less than {SECONDS_BAR:g}",
                marked(f"{entry['seconds']:.2f}, {entry['slowest']:.2f}", entry["slowest"] < SECONDS_BAR),
            ],
        ]
        parts.append(table(["`ti-refine`", "target", "measured"], bars))
    answers = [
        [name, *(f"{value:.0%}" for value in entry["answers"].values())]
        for name, entry in methods.items()
        if entry["answers"]
    ]
    if answers:
        aspects = next(entry["answers"] for entry in methods.values() if entry["answers"])
        parts.append(table(["right answers after 8 rounds", *aspects], answers))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
