"""Learns the 12 held-out looks, five pictures each, and measures the words: python -m benchmarks.words [--write]

likeness    mean cosine (by the judge) of generated pictures to the five, relative to that of other renders of the same
            look on the same backgrounds; the target is 0.9
in place    on six new backgrounds: the judge finds the look's shape and colour and the background; the target is 85 %.
            The background is also read from the pixels in closed form (`readback`)
together    all words in one batch, each picture compared with the one drawn alone; the target is 45 dB

`ti-train` learns the words with its defaults; the runtime draws the pictures from an exported bundle. `--write` puts
the table into docs/results/words.md. Not covered: styles, and words of several vectors. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.exported import exported
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
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

PAGE = RESULTS / "words.md"
NEW_PAGE = empty_page("Words", "Twelve held-out looks, learned from five pictures each.", "words")
SEEN = ("snow", "meadow", "brick", "sunset")  # the backgrounds of the five pictures, the first one twice
STEPS = 20
LIKENESS_BAR, IN_PLACE_BAR, SECONDS_BAR, TOGETHER_BAR = 0.9, 0.85, 300, 45


def main() -> None:
    """Learns, generates and measures; prints a table and one line of JSON."""
    p = parser("words", __doc__)
    p.add_argument("--looks", type=int, default=12)
    p.add_argument("--recipe", default="fast")
    p.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="further options for ti-train; must come last"
    )
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
    report = {**means, "slowest": slowest, "together_dB": together}
    text = summary(report, args)
    print(text)
    if args.write:
        write_section(PAGE, "words", f"{provenance('words')}\n\n{text}", NEW_PAGE)
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that learns words and writes docs/results/NAME.md."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="miniature")
    p.add_argument("--init", default="object")
    p.add_argument("--guidance", type=float, default=4.0)
    p.add_argument("--work", type=Path, default=Path("build", name))
    p.add_argument("--write", action="store_true", help=f"write the table into docs/results/{name}.md")
    return p


def summary(report: dict[str, float], args: argparse.Namespace) -> str:
    """The means over words beside their targets, in Markdown."""
    like, in_place = report["likeness"], report["in_place"]
    slowest, together = report["slowest"], report["together_dB"]
    parts = ", ".join(f"{report[name]:.1%}" for name in ("shape", "colour", "background"))
    seconds = f"{report['seconds']:.0f}, {slowest:.0f}"
    rows = [
        [
            "likeness to the five pictures, relative to other renders of the look",
            f"at least {LIKENESS_BAR}",
            marked(f"{like:.2f}", like >= LIKENESS_BAR),
        ],
        [
            "shape, colour and background all right, on six new backgrounds",
            f"at least {IN_PLACE_BAR:.0%}",
            marked(f"{in_place:.1%}", in_place >= IN_PLACE_BAR),
        ],
        ["of these: shape, colour, background", "", parts],
        ["background, by the pixels", "", f"{report['background_by_pixels']:.1%}"],
        ["seconds per word, mean and slowest", f"at most {SECONDS_BAR}", marked(seconds, slowest <= SECONDS_BAR)],
        [
            "all words in one batch, each relative to itself alone, worst, dB",
            f"at least {TOGETHER_BAR}",
            marked(f"{together:.0f}", together >= TOGETHER_BAR),
        ],
    ]
    settings = f"Recipe `{args.recipe}`, {STEPS} DDIM steps, guidance {args.guidance:g}. Bold: misses its target."
    return f"{settings}\n\n{table([f'mean of {args.looks} words', 'target', 'measured'], rows)}"


def measure(args: argparse.Namespace, model: Model, judge: Judge, number: int) -> dict[str, float | str]:
    """Learns one look from five pictures, then scores it in ten."""
    look, token = world.HELD_OUT_LOOKS[number], f"<look{number}>"
    folder, output = args.work / f"{number:02d}", args.work / f"{number:02d}.safetensors"
    training = draw(look, (SEEN[0], *SEEN), 1000 * number)
    saved(training, folder)
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

    renders = draw(look, (*SEEN, *new), 1000 * number + 500)
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
        "likeness": likeness(embedded, reference) / likeness(judge.pictures(renders), reference),
        "in_place": float(np.mean(np.logical_and.reduce(list(right.values())))),
        **{name: float(np.mean(hits)) for name, hits in right.items()},
        "background_by_pixels": float(np.mean(by_pixels)),
    }


def draw(look: world.Look, backgrounds: tuple[str, ...], seed: int) -> np.ndarray:
    """Photos of a look [N, 64, 64, 3], one per background."""
    scenes = [world.Scene((world.Thing(look),), background) for background in backgrounds]
    return np.stack([world.render(scene, seed + index)[0] for index, scene in enumerate(scenes)])


def saved(pictures: np.ndarray, folder: Path) -> Path:
    """Writes pictures [N, 64, 64, 3] for `ti-train`; returns the folder."""
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


def answers(judge: Judge, embedded: np.ndarray, question: str) -> np.ndarray:
    """The judge's answer for each embedded picture, zero-shot."""
    choices = QUESTIONS[question]
    return np.array(list(choices))[(embedded @ judge.texts(list(choices.values())).T).argmax(1)]


def least_psnr_together(args: argparse.Namespace, model: Model) -> float:
    """The lowest PSNR between each word drawn alone and all words drawn in one batch of the same open engine."""
    tokens = [f"<look{number}>" for number in range(args.looks)]
    for number in range(args.looks):
        model.load(load_concept(args.work / f"{number:02d}.safetensors"))
    prompts = [f"a photo of a {token} {world.BACKGROUNDS['forest'].phrase}" for token in tokens]
    alone = [sample(model, [prompt], 1, STEPS, 3, args.guidance)[0] for prompt in prompts]
    batch = sample(model, prompts, 1, STEPS, 3, args.guidance)
    return float(psnr(np.concatenate(batch), np.concatenate(alone)).min())


if __name__ == "__main__":
    main()
