"""How well the miniature obeys its captions, through the exported bundle: python -m benchmarks.miniature

world         renders a second, one process: the bar is 1,000
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.exported import exported
from oneword.export.source import find_model
from oneword.runtime.batch import Failed, PictureDone
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import world
from oneword.train.miniature.judge import QUESTIONS
from oneword.train.miniature.scores import Pictures, judged_right, one_object_scenes, pixels_right, psnr

BARS = {"shape": 0.85, "colour": 0.90, "background": 0.95, "medium": 0.95}
RENDERS_BAR, JUDGE_BAR, VAE_BAR, PARITY_BAR = 1000, 0.97, 30.0, 50.0
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
    model = Model.open(exported(args.model, args.work / "bundle"))
    scenes = one_object_scenes(args.captions)
    start = time.perf_counter()
    real = np.stack([world.render(scene, 5_000 + i)[0] for i, scene in enumerate(scenes)])
    renders = len(real) / (time.perf_counter() - start)
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
    report["world"] = {"renders a second": renders}
    report["vae"] = {"dB": round_trip(model, real)}
    report["diffusers"] = {"dB": parity(args.model, captions[:8], drawn, args.guidance)}
    show(report, args)


def draw(model: Model, captions: Sequence[str], guidance: float) -> Pictures:
    """One picture a caption, 20 steps of DDIM, seed 100 + its place."""
    requests = [Request(text, seed=100 + i, steps=STEPS, guidance_scale=guidance) for i, text in enumerate(captions)]
    pictures: list[Any] = [None] * len(requests)
    for event in generate(model, requests, listen=False):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PictureDone):
            pictures[event.id] = event.image
    return np.stack(pictures)


def round_trip(model: Model, pictures: Pictures) -> float:
    """Mean PSNR of pictures through the VAE, dB."""
    latents = np.stack([model.encode_image(picture)[0] for picture in pictures])
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


def sheet(pictures: Pictures, columns: int) -> Pictures:
    """All pictures in rows of `columns`."""
    whole = pictures[: len(pictures) // columns * columns]
    return np.concatenate([np.concatenate(list(whole[i : i + columns]), 1) for i in range(0, len(whole), columns)])


def show(report: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """The table, then the line of JSON."""
    witnesses = [name for name in report if name not in ("world", "vae", "diffusers")]
    table = Table(
        "attribute", "bar", *witnesses, title=f"{args.captions} captions, {STEPS} DDIM steps, guidance {args.guidance}"
    )
    for attribute in QUESTIONS:
        bar = f"{BARS[attribute]:.0%}" if attribute in BARS else ""
        cells = [f"{report[w][attribute]:.1%}" if attribute in report[w] else "" for w in witnesses]
        table.add_row(attribute, bar, *cells)
    Console().print(table)
    print(f"renders a second: {report['world']['renders a second']:,.0f}, bar {RENDERS_BAR:,}")
    print(f"bar of the judge on real renders: {JUDGE_BAR:.0%} each")
    print(f"VAE round trip: {report['vae']['dB']:.1f} dB, bar {VAE_BAR:.0f}")
    print(f"least PSNR to diffusers' own pictures: {report['diffusers']['dB']:.1f} dB, bar {PARITY_BAR:.0f}")
    print(json.dumps({name: {k: round(v, 3) for k, v in values.items()} for name, values in report.items()}))


if __name__ == "__main__":
    main()
