"""How well the miniature obeys its captions, through the exported bundle: python -m benchmarks.miniature

world         renders a second, one process: the bar is 1,000
judge         a CLIPModel reads real renders, zero-shot over the world's own words: the bar is 97 % for each attribute
VAE           picture -> latents -> picture through the exported graphs: the bar is 34 dB
one object    a picture for each of 200 captions. The judge reads shape, colours, pattern, background and medium;
              background and colours are read back from the pixels too, with no model (`readback`), and the silhouette's
              intersection over union with its shape (`silhouette`)
two objects   a picture for each of 100 captions: the share in which the silhouettes and colours of both are right
diffusers     the first eight captions made by its StableDiffusionPipeline on the same weights: the bar is 50 dB
The bars of pictures are shares of what the same witness reads on real renders of the same scenes; of the IoU, on real
renders after the VAE's round trip. Prints a table and, last, one line of JSON. Captions and seeds are fixed;
generated.png in the work folder shows all pictures of one object, pairs.png those of two.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.exported import exported
from oneword.export.source import find_model
from oneword.runtime.generate import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import world
from oneword.train.miniature.scores import (
    Pictures,
    both_right,
    judged_right,
    judged_second_colour,
    mean_iou,
    one_object_scenes,
    pixels_right,
    psnr,
    two_object_scenes,
)

BARS = {
    "shape": 0.97,
    "colour": 0.98,
    "second_colour": 0.95,
    "pattern": 0.98,
    "background": 0.99,
    "medium": 0.99,
    "silhouette": 0.95,
    "two_objects": 0.85,
}  # shares of what real renders reach
RENDERS_BAR, JUDGE_BAR, VAE_BAR, PARITY_BAR = 1000, 0.97, 34.0, 50.0
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
    model = Model.open(exported(args.model, args.work / "bundle"), "onnxruntime")
    scenes, pairs = one_object_scenes(args.captions), two_object_scenes(args.captions // 2)
    start = time.perf_counter()
    real = np.stack([world.render(scene, 5_000 + i)[0] for i, scene in enumerate(scenes)])
    renders = len(real) / (time.perf_counter() - start)
    real_pairs = np.stack([world.render(scene, 6_000 + i)[0] for i, scene in enumerate(pairs)])
    through = through_vae(model, real)
    captions = [world.caption(scene) for scene in scenes]
    drawn = drawn_from(model, captions, args.guidance)
    drawn_pairs = drawn_from(model, [world.caption(scene) for scene in pairs], args.guidance)
    Image.fromarray(sheet(drawn, 20)).save(args.work / "generated.png")
    Image.fromarray(sheet(drawn_pairs, 20)).save(args.work / "pairs.png")

    report: dict[str, dict[str, float]] = {
        "pixels": {
            **pixels_right(drawn, scenes),
            "silhouette": mean_iou(drawn, scenes),
            "two_objects": both_right(drawn_pairs, pairs),
        },
        "pixels, real": {
            **pixels_right(real, scenes),
            "silhouette": mean_iou(through, scenes),
            "two_objects": both_right(real_pairs, pairs),
        },
    }
    if (folder := find_model(args.model)[0] / "judge").is_dir():
        judge = Judge(folder)
        for name, pictures in (("judge", drawn), ("judge, real", real)):
            second = judged_second_colour(judge, pictures, scenes)
            report[name] = {**judged_right(judge, pictures, scenes), "second_colour": second}
    report["world"] = {"renders a second": renders}
    report["vae"] = {"dB": float(np.mean(psnr(through, real)))}
    report["diffusers"] = {"dB": parity(args.model, captions[:8], drawn, args.guidance)}
    show(report, args)


def drawn_from(model: Model, captions: Sequence[str], guidance: float) -> Pictures:
    """One picture a caption, 20 steps of DDIM, seed 100 + its place."""
    requests = [Request(text, seed=100 + i, steps=STEPS, guidance_scale=guidance) for i, text in enumerate(captions)]
    return np.stack([picture.image for picture in draw(model, *requests)])


def through_vae(model: Model, pictures: Pictures) -> Pictures:
    """Pictures encoded to latents and decoded again."""
    latents = np.stack([model.encode_image(picture)[0] for picture in pictures])
    return np.concatenate([model.decode(latents[i : i + 16])[0] for i in range(0, len(latents), 16)])


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
    witnesses = [name for name in ("judge", "pixels") if name in report]
    table = Table(
        "of what real renders reach",
        "bar",
        *witnesses,
        *(f"{name}: drawn, real" for name in witnesses),
        title=f"{args.captions} captions, {STEPS} DDIM steps, guidance {args.guidance}",
    )
    for attribute, bar in BARS.items():
        read = [
            (report[name][attribute], report[f"{name}, real"][attribute]) if attribute in report[name] else None
            for name in witnesses
        ]
        shares = [f"{pair[0] / pair[1]:.2%}" if pair else "" for pair in read]
        table.add_row(
            attribute, f"{bar:.0%}", *shares, *(f"{pair[0]:.1%}, {pair[1]:.1%}" if pair else "" for pair in read)
        )
    Console().print(table)
    print(f"renders a second: {report['world']['renders a second']:,.0f}, bar {RENDERS_BAR:,}")
    print(f"bar of the judge on real renders: {JUDGE_BAR:.0%} each")
    print(f"VAE round trip: {report['vae']['dB']:.1f} dB, bar {VAE_BAR:.0f}")
    print(f"least PSNR to diffusers' own pictures: {report['diffusers']['dB']:.1f} dB, bar {PARITY_BAR:.0f}")
    print(json.dumps({name: {k: round(v, 3) for k, v in values.items()} for name, values in report.items()}))


if __name__ == "__main__":
    main()
