"""How well the miniature obeys its captions, through the exported bundle: python -m benchmarks.miniature [--write]

world         renders per second in one process; the target is 1,000
judge         a CLIPModel reads real renders, zero-shot with the world's own words; the target is 97 % per attribute
VAE           picture -> latents -> picture through the exported graphs; the target is 34 dB
one object    one picture for each of 200 captions. The judge reads shape, colours, pattern, background and medium;
              background and colours are also read from the pixels, without a model (`readback`), and the silhouette is
              compared with its shape by intersection over union (`silhouette`)
two objects   one picture for each of 100 captions: the share in which silhouette and colour of both are right
diffusers     StableDiffusionPipeline draws the first eight captions with the same weights; the target is 50 dB

Targets for pictures are relative to what the same reader, the judge or the pixels, finds on real renders of the same
scenes; for the silhouette, on real renders after the VAE's round trip. Captions and seeds are fixed. In `--work`,
generated.png shows the pictures of one object and pairs.png those of two. Prints a table and ends in one line of JSON;
`--write` puts the table into docs/results/miniature.md. With `--weights int8` the bundle has int8 weights.
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

from benchmarks.exported import exported
from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, write_section
from oneword.engines.graph import Weights
from oneword.export.source import find_model
from oneword.runtime.drawing import draw
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

PAGE = RESULTS / "miniature.md"
NEW_PAGE = empty_page("The miniature", "How well the miniature obeys its captions.", "miniature")
BARS = {
    "shape": 0.97,
    "colour": 0.98,
    "second_colour": 0.95,
    "pattern": 0.98,
    "background": 0.99,
    "medium": 0.99,
    "silhouette": 0.95,
    "two_objects": 0.85,
}  # relative to real renders
RENDERS_BAR, JUDGE_BAR, VAE_BAR, PARITY_BAR = 1000, 0.97, 34.0, 50.0
STEPS = 20
TITLES = {
    "shape": "shape",
    "colour": "first colour",
    "second_colour": "second colour",
    "pattern": "pattern",
    "background": "background",
    "medium": "medium",
    "silhouette": "silhouette, intersection over union (real renders after the VAE)",
    "two_objects": "both objects of two, shape and first colour",
}

Report = dict[str, dict[str, float]]
"""Values by reader and attribute."""


def main() -> None:
    """Renders, generates, reads, and prints a table and one line of JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="miniature")
    p.add_argument("--weights", choices=[weights.value for weights in Weights], default=Weights.FLOAT.value)
    p.add_argument("--captions", type=int, default=200)
    p.add_argument("--guidance", type=float, default=4.0)
    p.add_argument("--work", type=Path, default=Path("build/miniature"))
    p.add_argument("--write", action="store_true", help="write the table into docs/results/miniature.md")
    args = p.parse_args()
    if args.write and args.weights != Weights.FLOAT:
        p.error(f"--weights {args.weights} with --write: the page shows the miniature's own weights; drop one of them")

    args.work.mkdir(parents=True, exist_ok=True)
    model = Model.open(exported(args.model, args.work / "bundle", Weights(args.weights)), "onnxruntime")
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

    report: Report = {
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
    text = summary(report, args)
    print(text)
    if args.write:
        write_section(PAGE, "miniature", f"{provenance('miniature')}\n\n{text}", NEW_PAGE)
    print(json.dumps({name: {k: round(v, 3) for k, v in values.items()} for name, values in report.items()}))


def drawn_from(model: Model, captions: Sequence[str], guidance: float) -> Pictures:
    """One picture per caption: 20 DDIM steps, seed 100 + the caption's index."""
    requests = [Request(text, seed=100 + i, steps=STEPS, guidance_scale=guidance) for i, text in enumerate(captions)]
    return np.stack([picture.image for picture in draw(model, *requests)])


def through_vae(model: Model, pictures: Pictures) -> Pictures:
    """Pictures encoded to latents and decoded again."""
    latents = np.stack([model.encode_image(picture)[0] for picture in pictures])
    return np.concatenate([model.decode(latents[i : i + 16])[0] for i in range(0, len(latents), 16)])


def parity(name: str, captions: Sequence[str], pictures: Pictures, guidance: float) -> float:
    """The lowest PSNR between pictures and diffusers' own from the same captions and seeds, in dB."""
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


def summary(report: Report, args: argparse.Namespace) -> str:
    """The measurements beside their targets, in Markdown."""
    readers = [name for name in ("judge", "pixels") if name in report]
    rows = []
    for attribute, title in TITLES.items():
        cells = []
        for reader in readers:
            if attribute not in report[reader]:
                cells.append("")
                continue
            drawn, real = report[reader][attribute], report[f"{reader}, real"][attribute]
            share = drawn / real
            cells.append(
                f"{marked(percent(share, BARS[attribute]), share >= BARS[attribute])} ({drawn:.1%}, {real:.1%})"
            )
        rows.append([title, f"{BARS[attribute]:.0%}", *cells])
    attributes = table(
        ["relative to real renders (generated, real)", "at least", *readers],
        rows,
    )
    vae, parity_db = report["vae"]["dB"], report["diffusers"]["dB"]
    renders = report["world"]["renders a second"]
    model_rows: list[list[object]] = [
        ["VAE round trip, dB", VAE_BAR, marked(f"{vae:.1f}", vae >= VAE_BAR)],
        ["least PSNR to diffusers' pictures, dB", PARITY_BAR, marked(f"{parity_db:.1f}", parity_db >= PARITY_BAR)],
        ["renders per second", f"{RENDERS_BAR:,}", marked(f"{renders:,.0f}", renders >= RENDERS_BAR)],
    ]
    settings = f"{args.captions} captions of one object, {args.captions // 2} of two; {STEPS} DDIM steps, guidance "
    settings += f"{args.guidance:g}. Bold: misses its target."
    if "judge" in report:
        settings += f" The judge's own target on real renders is {JUDGE_BAR:.0%} per attribute."
    return "\n\n".join([settings, attributes, table(["", "at least", "measured"], model_rows)])


def percent(share: float, limit: float) -> str:
    """A share with one decimal, or with as many more as it takes to show that it misses the limit."""
    for decimals in range(1, 6):
        text = f"{share:.{decimals}%}"
        if share >= limit or float(text[:-1]) < 100 * limit:
            break
    return text


if __name__ == "__main__":
    main()
