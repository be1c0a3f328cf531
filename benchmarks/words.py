"""Learns the 12 held-out looks, five pictures each, and measures the words: python -m benchmarks.words [--write]

likeness    mean cosine (by the judge) of generated pictures to the five, relative to that of other renders of the same
            look on the same backgrounds; the target is 0.97
right       on six new backgrounds: shape, both colours, pattern and background are all right, relative to the rate
            that the look's true caption reaches with the same seeds; the target is 0.97. The judge names the pattern;
            the rest is read from the pixels (`silhouette`, `readback`)
passes      the time of learning, without the start, in forward and backward passes of the UNet over 8 pictures; the
            target is 90
together    all words in one batch, each picture compared with the one drawn alone; the target is 45 dB

`ti-train` learns the words with its defaults; the runtime draws the pictures from an exported bundle. `--write` puts
the table into docs/results/words.md. Not covered: styles, words of several vectors, and more than one seed
(`benchmarks.recipes`). Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from benchmarks.exported import exported
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
from oneword.export.families import family_of
from oneword.export.modules import DenoiseStep, UNet
from oneword.export.source import Source, find_model, load_source
from oneword.runtime.concept import load_concept
from oneword.runtime.model import Model
from oneword.train import cli
from oneword.train.compute import compute_dtype, few_positions
from oneword.train.evaluation.evaluate import sample
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.scores import likeness
from oneword.train.miniature import readback, world
from oneword.train.miniature.claims import QUESTIONS
from oneword.train.miniature.scores import psnr
from oneword.train.miniature.silhouette import object_right
from oneword.train.recipe import DEFAULT_RECIPE, Compute

PAGE = RESULTS / "words.md"
NEW_PAGE = empty_page("Words", "Twelve held-out looks, learned from five pictures each.", "words")
SEEN = ("snow", "meadow", "brick", "sunset")  # the backgrounds of the five pictures, the first one twice
NEW = tuple(name for name in world.BACKGROUNDS if name not in SEEN)
ATTRIBUTES = ("shape", "second colour", "pattern", "background")
STEPS = 20
LIKENESS_BAR, RIGHT_BAR, PASSES_BAR, TOGETHER_BAR = 0.97, 0.97, 90, 45


def main() -> None:
    """Learns, generates and measures; prints a table and one line of JSON."""
    p = parser("words", __doc__)
    p.add_argument("--looks", type=int, default=12)
    p.add_argument("--recipe", default=DEFAULT_RECIPE)
    p.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="further options for ti-train; must come last"
    )
    args = p.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    model = Model.open(exported(args.model, args.work / "bundle"))
    judge, source = Judge(find_model(args.model)[0] / "judge"), load_source(args.model)
    rows = [measure(args, source, model, judge, number) for number in range(args.looks)]
    for row in rows:
        print("{look:44} {seconds:4.0f} s  likeness {likeness:.2f}  right {right:.2f}".format_map(row))
    together = least_psnr_together(args, model)
    report = {**means(rows), "together_dB": together}
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


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means over words, the slowest word, and how often all is right relative to the captions."""
    names = ("seconds", "likeness", "right", "caption", *ATTRIBUTES)
    report = {name: float(np.mean([row[name] for row in rows])) for name in names}
    report["ratio"] = report["right"] / max(report["caption"], 1e-9)
    report["passes"] = float(np.median([row["passes"] for row in rows]))
    report["slowest"] = max(float(row["seconds"]) for row in rows)
    return report


def summary(report: Mapping[str, float], args: argparse.Namespace) -> str:
    """The means over words beside their targets, in Markdown."""
    near, right, passes, together = (report[name] for name in ("likeness", "ratio", "passes", "together_dB"))
    rows = [
        [
            "likeness to the five pictures, relative to other renders",
            f"at least {LIKENESS_BAR}",
            marked(f"{near:.4g}", near >= LIKENESS_BAR),
        ],
        [
            "all right on six new backgrounds, relative to the true captions",
            f"at least {RIGHT_BAR}",
            marked(f"{right:.4g}", right >= RIGHT_BAR),
        ],
        [
            "learning in passes of the UNet over 8 pictures, median",
            f"at most {PASSES_BAR}",
            marked(f"{passes:.4g}", passes <= PASSES_BAR),
        ],
        [
            "all words in one batch, each relative to itself alone, worst, dB",
            f"at least {TOGETHER_BAR}",
            marked(f"{together:.4g}", together >= TOGETHER_BAR),
        ],
        ["all right: words, captions", "", f"{report['right']:.1%}, {report['caption']:.1%}"],
        [f"of the words: {', '.join(ATTRIBUTES)}", "", ", ".join(f"{report[name]:.1%}" for name in ATTRIBUTES)],
        ["seconds per word, mean and slowest", "", f"{report['seconds']:.0f}, {report['slowest']:.0f}"],
    ]
    settings = f"Recipe `{args.recipe}`, {STEPS} DDIM steps, guidance {args.guidance:g}. Bold: misses its target."
    return f"{settings}\n\n{table([f'mean of {args.looks} words', 'target', 'measured'], rows)}"


def measure(
    args: argparse.Namespace, source: Source, model: Model, judge: Judge, number: int
) -> dict[str, float | str]:
    """Learns one look from five pictures, then scores it in ten; its true caption in six."""
    look, token = world.HELD_OUT_LOOKS[number], f"<look{number}>"
    folder, output = args.work / f"{number:02d}", args.work / f"{number:02d}.safetensors"
    training = draw(look, (SEEN[0], *SEEN), 1000 * number)
    saved(training, folder)
    shutil.rmtree(output.with_suffix(".run"), ignore_errors=True)  # a run that resumes takes less time
    one_pass = pass_seconds(source)  # just before, because other processes may share the machine
    learn = [str(folder), "--model", args.model, "--token", token, "--init", args.init, "--recipe", args.recipe]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main([*learn, "--output", str(output), "--json", *args.options])
    if status:
        raise SystemExit(status)
    times = json.loads(printed.getvalue())["seconds"]
    seconds, passes = times["total"], times["learn"] / one_pass

    model.load(load_concept(output))
    pictures = photographs(model, token, (*SEEN, *NEW), args.guidance)
    by_caption = photographs(model, look.words, NEW, args.guidance)
    model.unload(token)
    Image.fromarray(np.concatenate([*training, *pictures], 1)).save(args.work / f"{number:02d}.png")

    renders = draw(look, (*SEEN, *NEW), 1000 * number + 500)
    reference = judge.pictures(training)
    hits = read(judge, pictures[len(SEEN) :], look)
    return {
        "look": look.words,
        "seconds": seconds,
        "passes": passes,
        "likeness": likeness(judge.pictures(pictures), reference) / likeness(judge.pictures(renders), reference),
        "right": all_right(hits),
        "caption": all_right(read(judge, by_caption, look)),
        **{name: float(np.mean(hit)) for name, hit in hits.items()},
    }


def photographs(model: Model, name: str, backgrounds: Sequence[str], guidance: float, seed: int = 0) -> np.ndarray:
    """A generated photo of the thing on each background [N, 64, 64, 3]."""
    prompts = [f"a photo of {world.with_article(name)} {world.BACKGROUNDS[place].phrase}" for place in backgrounds]
    return np.concatenate(sample(model, prompts, 1, STEPS, seed, guidance))


def read(judge: Judge, pictures: np.ndarray, look: world.Look) -> dict[str, list[bool]]:
    """What is right in photos of a look, one on each new background: by attribute, for each picture.

    `shape` includes the first colour: the object fits the look's shape, drawn in that colour, better than all others.
    """
    patterns = answers(judge, judge.pictures(pictures), "pattern")
    hits: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for picture, pattern, name in zip(pictures, patterns, NEW, strict=True):
        scene = world.Scene((world.Thing(look),), name)
        shares = readback.read_colours(picture, name, scene.drawn_as)
        del shares[look.colour]
        hits["shape"].append(bool(object_right(picture, scene, 0)))
        hits["second colour"].append(max(shares, key=shares.__getitem__) == look.second_colour)
        hits["pattern"].append(bool(pattern == look.pattern))
        hits["background"].append(readback.read_background(picture, scene.drawn_as) == name)
    return hits


def all_right(hits: Mapping[str, Sequence[bool]]) -> float:
    """The share of pictures in which everything is right."""
    return float(np.mean(np.logical_and.reduce(list(hits.values()))))


def pass_seconds(source: Source) -> float:
    """Seconds of one forward and backward pass of the UNet over 8 pictures, as learning computes it: a median."""
    graph = next(graph for graph in family_of(source).graphs if graph.name == "denoise_step")
    network, config = cast(UNet, cast(DenoiseStep, graph.module).network), source.unet.config
    dtype = compute_dtype(Compute.AUTO)
    network.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.attend_plainly(few_positions(dtype, config.sample_size**2))
    noisy = torch.randn(8, config.in_channels, config.sample_size, config.sample_size).to(dtype)
    noisy = noisy.to(memory_format=torch.channels_last)
    context = torch.randn(8, 32, config.cross_attention_dim).to(dtype).requires_grad_()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        torch.autograd.grad(network(noisy, torch.full((8,), 500), context).float().square().mean(), context)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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
