"""How well the miniature obeys its captions, through the exported bundle: python -m benchmarks.miniature

judge         a CLIPModel reads real renders, zero-shot over the world's own words: the bar is 97 % for each attribute
VAE           picture -> latents -> picture through the exported graphs: the bar is 30 dB
generated     one picture for each of 200 captions of one object; the judge reads shape, object colour, background and
              medium, and colour and background are read back from the pixels too, with no model (`readback`); the same
              reading of real renders stands beside it, as the most that can be had
diffusers     the first eight captions made by its StableDiffusionPipeline on the same weights: the bar is 50 dB
Prints a table and, last, one line of JSON. Captions and seeds are fixed; generated.png in the work folder shows all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from oneword.export.source import find_model
from oneword.export.write import export_bundle
from oneword.runtime.batch import Failed, PictureDone
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.train.evaluate import Judge
from oneword.train.miniature import readback, world
from oneword.train.miniature.judge import QUESTIONS

Pictures = NDArray[np.uint8]  # [B, 64, 64, 3]
BARS = {"shape": 0.85, "colour": 0.90, "background": 0.95, "medium": 0.95}
JUDGE_BAR, VAE_BAR, PARITY_BAR = 0.97, 30.0, 50.0
STEPS = 20


def main() -> None:
    """Draw, generate, read, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="miniature")
    p.add_argument("--captions", type=int, default=200)
    p.add_argument("--guidance", type=float, default=4.0)
    p.add_argument("--work", type=Path, default=Path("build/miniature"))
    args = p.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    bundle = args.work / "bundle"
    if not (bundle / "bundle.json").is_file():
        export_bundle(args.model, bundle)
    model = Model.open(bundle)
    scenes = one_object_scenes(args.captions)
    real = np.stack([world.render(scene, 5_000 + i)[0] for i, scene in enumerate(scenes)])
    captions = [world.caption(scene) for scene in scenes]
    drawn = draw(model, captions, args.guidance)
    Image.fromarray(sheet(drawn, 20)).save(args.work / "generated.png")

    report: dict[str, dict[str, float]] = {
        "pixels": pixels_right(drawn, scenes),
        "pixels, real": pixels_right(real, scenes),
    }
    if (folder := find_model(args.model)[0] / "judge").is_dir():
        judge = Judge(folder)
        report["judge"] = judged_right(judge, drawn, scenes)
        report["judge, real"] = judged_right(judge, real, scenes)
    report["vae"] = {"dB": round_trip(model, real)}
    report["diffusers"] = {"dB": parity(args.model, captions[:8], drawn, args.guidance)}
    show(report, args)


def one_object_scenes(count: int) -> list[world.Scene]:
    """Captions of the world with one spelled-out object in one of the media; seeds apart from the training set's."""
    rng = np.random.default_rng(77)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if len(scene.things) == 1 and scene.medium and not scene.things[0].name:
            scenes.append(scene)
    return scenes


def draw(model: Model, captions: Sequence[str], guidance: float) -> Pictures:
    """One picture a caption, 20 steps of DDIM, seed 100 + its place."""
    requests = [Request(text, seed=100 + i, steps=STEPS, guidance_scale=guidance) for i, text in enumerate(captions)]
    pictures: list[Any] = [None] * len(requests)
    for event in generate(model, requests):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PictureDone):
            pictures[event.id] = event.image
    return np.stack(pictures)


def judged_right(judge: Judge, pictures: Pictures, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Share of pictures for which the judge's best caption of each attribute is the scene's."""
    seen = judge.pictures(list(pictures))
    right = {}
    for attribute, questions in QUESTIONS.items():
        names = list(questions)
        best = (seen @ judge.texts(list(questions.values())).T).argmax(1)
        right[attribute] = float(
            np.mean([names[b] == value_of(attribute, s) for b, s in zip(best, scenes, strict=True)])
        )
    return right


def pixels_right(pictures: Pictures, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Share of pictures whose background, and whose object's first colour on at least 30 % of it, read back right."""
    background, colour = [], []
    for picture, scene in zip(pictures, scenes, strict=True):
        style, look = scene.drawn_as, scene.things[0].look
        background.append(readback.read_background(picture, style) == scene.background)
        colour.append(readback.read_colours(picture, scene.background, style)[look.colour] >= 0.3)
    return {"background": float(np.mean(background)), "colour": float(np.mean(colour))}


def value_of(attribute: str, scene: world.Scene) -> str | None:
    """The scene's value of an attribute of `QUESTIONS`."""
    if attribute in ("background", "medium"):
        return str(getattr(scene, attribute))
    return str(getattr(scene.things[0].look, attribute))


def round_trip(model: Model, pictures: Pictures) -> float:
    """Mean PSNR of pictures through the VAE, dB."""
    latents = np.concatenate([model.encode_image(picture)[0] for picture in pictures])
    decoded = np.concatenate([model.decode(latents[i : i + 16])[0] for i in range(0, len(latents), 16)])
    return float(np.mean(psnr(decoded, pictures)))


def parity(name: str, captions: Sequence[str], pictures: Pictures, guidance: float) -> float:
    """The least PSNR of pictures to those diffusers makes of the same captions and seeds, dB."""
    pipeline = StableDiffusionPipeline.from_pretrained(find_model(name)[0], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = [
        pipeline(
            caption,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(100 + i),
            output_type="np",
        ).images[0]
        for i, caption in enumerate(captions)
    ]
    return float(psnr(pictures[: len(theirs)], (np.stack(theirs) * 255).round()).min())


def psnr(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Of each pair of pictures [B, H, W, 3] of 0 to 255, dB; 99 where they are equal."""
    errors = np.square((a.astype(float) - b) / 255).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(errors, 10**-9.9))


def sheet(pictures: Pictures, columns: int) -> Pictures:
    """All pictures in rows of `columns`."""
    whole = pictures[: len(pictures) // columns * columns]
    return np.concatenate([np.concatenate(list(whole[i : i + columns]), 1) for i in range(0, len(whole), columns)])


def show(report: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """The table, then the line of JSON."""
    witnesses = [name for name in report if "dB" not in report[name]]
    table = Table(
        "attribute", "bar", *witnesses, title=f"{args.captions} captions, {STEPS} DDIM steps, guidance {args.guidance}"
    )
    for attribute in QUESTIONS:
        bar = f"{BARS[attribute]:.0%}" if attribute in BARS else ""
        cells = [f"{report[w][attribute]:.1%}" if attribute in report[w] else "" for w in witnesses]
        table.add_row(attribute, bar, *cells)
    Console().print(table)
    print(f"bar of the judge on real renders: {JUDGE_BAR:.0%} each")
    print(f"VAE round trip: {report['vae']['dB']:.1f} dB, bar {VAE_BAR:.0f}")
    print(f"least PSNR to diffusers' own pictures: {report['diffusers']['dB']:.1f} dB, bar {PARITY_BAR:.0f}")
    print(json.dumps({name: {k: round(v, 3) for k, v in values.items()} for name, values in report.items()}))


if __name__ == "__main__":
    main()
