"""Learns the 12 held-out looks, five pictures each, and measures the words: python -m benchmarks.words

likeness    mean cosine (the judge's) of generated pictures to the five, over that of other renders of the same look
            against the same prompts' backgrounds; the bar is 0.9
in place    on six new backgrounds: the judge finds the look's shape and colour and the background; the bar is 85 %;
            the background also by closed form, read back from the pixels (`readback`)
together    all words in one batch, each picture against the one it is alone: the bar is 45 dB
Words are learned by `ti-train` as it ships, and pictures made by the runtime from an exported bundle. What is not
measured: styles, and words of several vectors. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.exported import exported
from oneword.export.source import find_model
from oneword.runtime.concept import load_concept
from oneword.runtime.model import Model
from oneword.train import cli
from oneword.train.evaluation.evaluate import sample
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.scores import likeness
from oneword.train.miniature import readback, world
from oneword.train.miniature.claims import QUESTIONS
from oneword.train.miniature.scores import psnr

SEEN = ("snow", "meadow", "brick", "sunset")  # the backgrounds of the five pictures, the first twice
STEPS = 20


def main() -> None:
    """Learn, generate, measure, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="miniature")
    p.add_argument("--looks", type=int, default=12)
    p.add_argument("--init", default="object")
    p.add_argument("--recipe", default="fast")
    p.add_argument("--guidance", type=float, default=4.0)
    p.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options for ti-train, last")
    p.add_argument("--work", type=Path, default=Path("build/words"))
    args = p.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    model = Model.open(exported(args.model, args.work / "bundle"))
    judge = Judge(find_model(args.model)[0] / "judge")
    rows = [measure(args, model, judge, number) for number in range(args.looks)]
    for row in rows:
        print("{look:44} {seconds:4.0f} s  likeness {likeness:.2f}  in place {in_place:.2f}".format_map(row))
    together = least_psnr_together(args, model)
    names = ("seconds", "likeness", "in_place", "shape", "colour", "background", "background_by_pixels")
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    slowest = max(float(row["seconds"]) for row in rows)
    print("means: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()) + f"; slowest {slowest:.0f} s")
    print(f"all words in one batch, each against itself alone: {together:.1f} dB at least, bar 45")
    report = {**means, "slowest": slowest, "together_dB": together}
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


def measure(args: argparse.Namespace, model: Model, judge: Judge, number: int) -> dict[str, float | str]:
    """One look: learned from five pictures, then looked for in ten."""
    look, token = world.HELD_OUT_LOOKS[number], f"<look{number}>"
    folder, output = args.work / f"{number:02d}", args.work / f"{number:02d}.safetensors"
    training = draw(look, (SEEN[0], *SEEN), 1000 * number)
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(training):
        Image.fromarray(picture).save(folder / f"{index}.png")
    started = time.perf_counter()
    learn = [str(folder), "--model", args.model, "--token", token, "--init", args.init, "--recipe", args.recipe]
    if status := cli.main([*learn, "--output", str(output), *args.options]):
        raise SystemExit(status)
    seconds = time.perf_counter() - started

    model.load(load_concept(output))
    new = [name for name in world.BACKGROUNDS if name not in SEEN]
    prompts = [f"a photo of a {token} {world.BACKGROUNDS[name].phrase}" for name in (*SEEN, *new)]
    pictures = np.concatenate(sample(model, prompts, 1, STEPS, 0, args.guidance))
    model.unload(token)
    Image.fromarray(np.concatenate([*training, *pictures], 1)).save(args.work / f"{number:02d}.png")

    others = draw(look, (*SEEN, *new), 1000 * number + 500)
    reference = judge.pictures(training)
    embedded = judge.pictures(pictures)
    in_new = embedded[len(SEEN) :]
    right = {
        "shape": answers(judge, in_new, "shape") == look.shape,
        "colour": answers(judge, in_new, "colour") == look.colour,
        "background": answers(judge, in_new, "background") == np.array(new),
    }
    photo = world.MEDIA["photo"]
    by_pixels = [
        readback.read_background(picture, photo) == name
        for picture, name in zip(pictures[len(SEEN) :], new, strict=True)
    ]
    return {
        "look": look.words,
        "seconds": seconds,
        "likeness": likeness(embedded, reference) / likeness(judge.pictures(others), reference),
        "in_place": float(np.mean(np.logical_and.reduce(list(right.values())))),
        **{name: float(np.mean(found)) for name, found in right.items()},
        "background_by_pixels": float(np.mean(by_pixels)),
    }


def draw(look: world.Look, backgrounds: tuple[str, ...], seed: int) -> np.ndarray:
    """Photos of a look [N, 64, 64, 3], one a background."""
    scenes = [world.Scene((world.Thing(look),), background) for background in backgrounds]
    return np.stack([world.render(scene, seed + index)[0] for index, scene in enumerate(scenes)])


def answers(judge: Judge, embedded: np.ndarray, question: str) -> np.ndarray:
    """The judge's answer for each embedded picture, zero-shot."""
    choices = QUESTIONS[question]
    return np.array(list(choices))[(embedded @ judge.texts(list(choices.values())).T).argmax(1)]


def least_psnr_together(args: argparse.Namespace, model: Model) -> float:
    """Every word drawn alone, one after another, and all in one batch of an engine that stays open: the least PSNR."""
    tokens = [f"<look{number}>" for number in range(args.looks)]
    for number in range(args.looks):
        model.load(load_concept(args.work / f"{number:02d}.safetensors"))
    prompts = [f"a photo of a {token} {world.BACKGROUNDS['forest'].phrase}" for token in tokens]
    alone = [sample(model, [prompt], 1, STEPS, 3, args.guidance)[0] for prompt in prompts]
    batch = sample(model, prompts, 1, STEPS, 3, args.guidance)
    return float(psnr(np.concatenate(batch), np.concatenate(alone)).min())


if __name__ == "__main__":
    main()
