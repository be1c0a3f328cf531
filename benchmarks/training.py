"""Learning a word: ti-train beside diffusers' textual_inversion.py, on one model, in one call.

    python -m benchmarks.training SCRIPT [--words 6] [--script-steps 3000] [--budgets 50,100,200]   both, for each word
    python -m benchmarks.training SCRIPT --full-size           seconds a step and peak memory, SD 1.5's architecture
    python -m benchmarks.training --many 16                    16 words in one run, and 16 runs of one word

SCRIPT is the path of diffusers' examples/textual_inversion/textual_inversion.py, which is not part of this project. It
learns with what its README gives (constant rate 5e-4 times the batch of 4, seed 0, everything else its own default),
from a copy of the model in fp32, and keeps its word at each quarter of the way. torchvision has no CPU build on the
registries we use, and the script needs it for one RandomHorizontalFlip: a stand-in of ten lines takes its place.

Every contender is a process of its own, in turn; its seconds run from the start of the process to its end, and the same
two threads are there for all. Likeness and editability are the miniature's judge's, on pictures the runtime draws.
Everything measured is kept in `--work`, one JSON line each, and not measured again. `--page` writes docs/training.md.
Not here: GPUs, and words of several vectors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import runpy
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pages import table, write_section

PAGE = Path("docs/training.md")
PARTS = ("start", "VAE", "text encoder", "UNet", "backward", "optimiser", "rest")
README_RATE = 5e-4  # of the script, times its batch (--scale_lr)
BATCH = 4


def main() -> None:
    """Measure what is asked for, print it, keep it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", type=Path, nargs="?")
    p.add_argument("--model", default="miniature")
    p.add_argument("--init", default="object", help="one word, as the script wants it")
    p.add_argument("--words", type=int, default=6)
    p.add_argument("--script-steps", type=int, default=3000)
    p.add_argument("--script-options", default="", help='more options for the script, "--mixed_precision bf16"')
    p.add_argument("--budgets", default="50,100,200", help="steps of ours, a run of its own each")
    p.add_argument("--recipe", default="fast")
    p.add_argument("--samples", type=int, default=16, help="pictures a prompt")
    p.add_argument("--sample-steps", type=int, default=20)
    p.add_argument("--full-size", action="store_true")
    p.add_argument("--full-steps", type=int, default=3)
    p.add_argument("--many", type=int, metavar="N")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--work", type=Path, default=Path("build/training"))
    p.add_argument("--page", action="store_true", help=f"write {PAGE} and its figure from what is in --work")
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]), sys.argv[3:])
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.digest = digest_of(args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.many:
        many(args)
    elif args.full_size:
        full_size(args)
    elif args.script:
        compare(args)
    rows = [row for row in kept(args.work) if row["model"] == args.digest or "full" in row]
    summary = summarise(rows)
    if args.page:
        write_page(rows, summary, args)
    print(json.dumps(summary))


def digest_of(args: argparse.Namespace) -> str:
    """Which weights are measured: the start of the model's digest."""
    from oneword.export.source import digest_directory, find_model

    return digest_directory(find_model(args.model)[0])[:12]


# ---- the two, word by word -------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """Both learn every held-out look; every word either keeps is scored."""
    from oneword.train.miniature import world

    for number in range(args.words):
        folder = pictures_of(world.HELD_OUT_LOOKS[number], args.work / f"{number:02d}", 1000 * number)
        for budget in map(int, args.budgets.split(",")):
            output = args.work / f"{number:02d}-ours-{budget}.safetensors"
            more = ["--init", args.init, "--recipe", args.recipe, "--steps", str(budget)]
            row = {"contender": "oneword", "word": number, "steps": budget}
            measured(args, row, partial(ours, args, {"<word>": (folder, output)}, more), score_of(args, output, folder))
        row = {"contender": "diffusers", "word": number, "steps": args.script_steps}
        output = args.work / f"{number:02d}-diffusers"
        final = output / "learned_embeds.safetensors"
        done = measured(
            args,
            row,
            partial(script, args, in_fp32(args), folder, output, args.script_steps),
            score_of(args, final, folder),
        )
        for step in range(save_every(args.script_steps), args.script_steps, save_every(args.script_steps)):
            saved = output / f"learned_embeds-steps-{step}.safetensors"
            seconds = {"seconds": saved.stat().st_mtime - done["began"]} if saved.is_file() else {}
            measured(args, {**row, "steps": step}, lambda seconds=seconds: seconds, score_of(args, saved, folder))


def ours(args: argparse.Namespace, words: Mapping[str, tuple[Path, Path]], more: Sequence[str]) -> dict[str, Any]:
    """`ti-train` in a process of its own; `words` are token -> (pictures, output)."""
    folders = [str(folder) for folder, _ in words.values()]
    each = [text for token, (_, output) in words.items() for text in ("--token", token, "--output", str(output))]
    for _, output in words.values():
        output.unlink(missing_ok=True)
    return timed(args, ["ti-train", *folders, "--model", args.model, *each, *more])


def script(
    args: argparse.Namespace, model: Path, folder: Path, output: Path, steps: int, size: int = 0
) -> dict[str, Any]:
    """diffusers' script in a process of its own."""
    size = size or Image.open(next(folder.glob("*.png"))).width
    batch = BATCH if not args.full_size else 1
    options = {
        "pretrained_model_name_or_path": model, "train_data_dir": folder, "output_dir": output,
        "placeholder_token": "<word>", "initializer_token": args.init, "learnable_property": "object",
        "resolution": size, "train_batch_size": batch, "max_train_steps": steps, "lr_warmup_steps": 0,
        "learning_rate": README_RATE * BATCH, "save_steps": save_every(steps), "checkpointing_steps": 10**9, "seed": 0,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return timed(args, [str(args.script), *flags, *args.script_options.split()])


def in_fp32(args: argparse.Namespace) -> Path:
    """The model with fp32 weights: the script learns in the type that is stored, and fp16 rows become NaN."""
    from diffusers import StableDiffusionPipeline

    from oneword.export.source import find_model

    model = find_model(args.model)[0]
    folder: Path = args.work / f"fp32-{args.digest}"
    if not (folder / "model_index.json").is_file():
        pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype="float32", safety_checker=None)
        pipeline.save_pretrained(folder)
    return folder


def save_every(steps: int) -> int:
    """How often the script keeps its word: at each quarter."""
    return max(1, steps // 4)


def score_of(args: argparse.Namespace, output: Path, folder: Path) -> Callable[[], dict[str, float]]:
    """What scores the word in `output`, when it is there: likeness and mean editability."""

    def score() -> dict[str, float]:
        from oneword.runtime.concept import Concept, load_concept
        from oneword.train.evaluation.evaluate import evaluate
        from oneword.train.evaluation.prompts import MINIATURE_PROMPTS
        from oneword.train.pictures import read_pictures

        model, judge = judged(args)
        concept = Concept("<word>", load_concept(output).vectors)
        training = np.stack([picture.pixels for picture in read_pictures(folder, model.manifest.defaults.width)])
        model.load(concept)
        options = {"samples": args.samples, "steps": args.sample_steps}
        found, _ = evaluate(model, judge, concept.token, training, MINIATURE_PROMPTS, **options)
        model.unload(concept.token)
        return {"likeness": round(found.likeness, 4), "editability": round(found.mean_editability, 4)}

    return score


def judged(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model's bundle, exported once, and its judge."""
    from benchmarks.exported import exported
    from oneword.export.source import find_model
    from oneword.runtime.model import Model
    from oneword.train.evaluation.judge import Judge

    return Model.open(exported(args.model, args.work / "bundle")), Judge(find_model(args.model)[0] / "judge")


def pictures_of(look: Any, folder: Path, seed: int) -> Path:
    """Five photos of a look on five backgrounds."""
    from oneword.train.miniature import world

    folder.mkdir(exist_ok=True)
    for index, background in enumerate(list(world.BACKGROUNDS)[:5]):
        pixels, _ = world.render(world.Scene((world.Thing(look),), background), seed + index)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


# ---- many at once, full size -----------------------------------------------------------------------------------------


def many(args: argparse.Namespace) -> None:
    """N words in one run, and each in a run of its own."""
    from oneword.train.miniature import world

    looks = [*world.HELD_OUT_LOOKS, *world.NOUNS.values()][: args.many]
    words = {
        f"<word{number}>": (
            pictures_of(look, args.work / f"many-{number:02d}", 1000 * number),
            args.work / f"many-{number:02d}.safetensors",
        )
        for number, look in enumerate(looks)
    }
    more = ["--recipe", args.recipe, *(text for _ in words for text in ("--init", args.init))]
    row = {"contender": "oneword", "many": args.many, "recipe": args.recipe}
    measured(args, {**row, "run": "together"}, lambda: ours(args, words, more))
    for token, word in words.items():
        alone = ["--recipe", args.recipe, "--init", args.init]
        measured(args, {**row, "run": token}, lambda t=token, w=word, a=alone: ours(args, {t: w}, a))


def full_size(args: argparse.Namespace) -> None:
    """A few steps of batch 1 at 512x512 against SD 1.5's architecture with random weights."""
    args.model = str(random_sd15(args.work / "sd15"))
    folder = args.work / "noise"
    folder.mkdir(exist_ok=True)
    for index in range(3):
        Image.effect_noise((512, 512), 80).convert("RGB").save(folder / f"{index}.png")
    steps = args.full_steps
    more = ["--init", args.init, "--recipe", "one-word", "--batch-size", "1", "--steps", str(steps)]
    output = args.work / "full.safetensors"
    row = {"full": "sd15", "steps": steps}
    measured(args, {**row, "contender": "oneword"}, lambda: ours(args, {"<word>": (folder, output)}, more))
    peer = partial(script, args, Path(args.model), folder, args.work / "full-diffusers", steps, 512)
    measured(args, {**row, "contender": "diffusers"}, peer)


def random_sd15(folder: Path) -> Path:
    """SD 1.5's architecture, random weights (4.3 GB), and the miniature's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from oneword.export.source import find_model

    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(find_model("miniature")[0] / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


# ---- a process of its own, watched -----------------------------------------------------------------------------------


def timed(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Runs a command under `child`: seconds, seconds of each part, of a step, and peak MiB. Shows what fails."""
    told = args.work / "child.json"
    told.unlink(missing_ok=True)
    log = (args.work / "child.log").open("w+")
    began, start = time.time(), time.perf_counter()
    arguments = [sys.executable, "-m", "benchmarks.training", "--child", str(told), *command]
    pid = os.posix_spawn(
        sys.executable,
        arguments,
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), n) for n in (1, 2)],
    )
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        log.seek(0)
        raise SystemExit(f"{' '.join(command)}\n{log.read()[-4000:]}")
    parts = json.loads(told.read_text())
    step = parts.pop("step")
    parts["rest"] = max(0.0, seconds - sum(parts.values()))
    return {"seconds": seconds, "began": began, "step": step, "peak_mib": used.ru_maxrss // 1024, "parts": parts}


def child(told: Path, command: Sequence[str]) -> None:
    """Runs ti-train or a script in this process, timing the parts of its steps."""
    start = time.perf_counter() - time.process_time()  # about when the process began
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from oneword.export.modules import TextEncoder, VaeEncoder
    from oneword.train.parallel import Recorded

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    lock = threading.Lock()
    parts = dict.fromkeys(PARTS, 0.0)
    ends: list[float] = []

    def watch(owner: Any, name: str, part: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if part == "UNet" and not parts["start"]:
                parts["start"] = time.perf_counter() - start - sum(parts.values())
            before = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                share = torch.get_num_threads() / threads  # parts of a batch run at the same time
                with lock:
                    parts[part] += (time.perf_counter() - before) * share
                if part == "optimiser":
                    ends.append(time.perf_counter())

        setattr(owner, name, call)

    if command[0] == "ti-train":
        watch(VaeEncoder, "forward", "VAE")
        watch(TextEncoder, "forward", "text encoder")
        watch(Recorded, "__call__", "UNet")
        watch(torch.autograd, "grad", "backward")
    else:
        watch(AutoencoderKL, "encode", "VAE")
        watch(CLIPTextModel, "forward", "text encoder")
        watch(UNet2DConditionModel, "forward", "UNet")
    watch(torch.autograd, "backward", "backward")
    watch(torch.optim.AdamW, "step", "optimiser")

    status: object = 0
    if command[0] == "ti-train":
        from oneword.train.cli import main as ti_train

        status = ti_train(command[1:])
    else:
        sys.modules["torchvision"] = stand_in()
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
    step = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else math.nan
    told.write_text(json.dumps({**parts, "step": step}))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sys.exit(status)


def stand_in() -> types.ModuleType:
    """A torchvision of one transform: RandomHorizontalFlip."""
    import random

    from PIL import ImageOps

    class RandomHorizontalFlip:
        def __init__(self, p: float = 0.5) -> None:
            self.p = p

        def __call__(self, image: Image.Image) -> Image.Image:
            return ImageOps.mirror(image) if random.random() < self.p else image

    torchvision, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    transforms.RandomHorizontalFlip = RandomHorizontalFlip  # type: ignore[attr-defined]
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    return torchvision


# ---- what is kept, and what it says ----------------------------------------------------------------------------------


def measured(
    args: argparse.Namespace,
    row: dict[str, Any],
    run: Callable[[], dict[str, Any]],
    score: Callable[[], dict[str, float]] = dict,
) -> dict[str, Any]:
    """The row as it is kept, or measured now and kept; what was measured against other weights does not count."""
    row = {**row, "model": args.digest}
    for old in kept(args.work):
        if row.items() <= old.items():
            return old
    new = {**row, **run()}
    new |= score()
    with (args.work / "results.jsonl").open("a") as file:
        file.write(json.dumps(new) + "\n")
    print(json.dumps({name: value for name, value in new.items() if name not in ("parts", "began")}), flush=True)
    return new


def kept(work: Path) -> list[dict[str, Any]]:
    """Everything measured so far."""
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratios that the bars speak of, of whatever has been measured."""
    summary: dict[str, Any] = {}
    both = {row["word"] for row in rows if row["contender"] == "diffusers" and "word" in row}
    ratios = [ratio_of(rows, word) for word in sorted(both)]
    if ratios:
        summary["their seconds over ours at their likeness and editability"] = {
            "by word": [round(ratio, 2) for ratio in ratios],
            "median": round(statistics.median(ratios), 2),
            "bar": 5,
        }
    together = {row["many"]: row["seconds"] for row in rows if row.get("run") == "together"}
    for count, seconds in together.items():
        alone = [row["seconds"] for row in rows if row.get("many") == count and row["run"] != "together"]
        if len(alone) == count:
            summary[f"{count} words together over {count} runs"] = {"ratio": round(seconds / sum(alone), 3), "bar": 0.5}
    for row in rows:
        if "full" in row:
            facts = {"seconds a step": round(row["step"], 2), "peak MiB": row["peak_mib"]}
            summary.setdefault("full size", {})[row["contender"]] = facts
    return summary


def ratio_of(rows: Sequence[Mapping[str, Any]], word: int) -> float:
    """The script's seconds over those of our shortest run that is as like and as editable; 0 where none is."""
    mine = [row for row in rows if row.get("word") == word]
    theirs = max((row for row in mine if row["contender"] == "diffusers"), key=lambda row: row["steps"])
    good = [
        row["seconds"]
        for row in mine
        if row["contender"] == "oneword" and all(row[name] >= theirs[name] for name in ("likeness", "editability"))
    ]
    return float(theirs["seconds"] / min(good)) if good else 0.0


def write_page(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], args: argparse.Namespace) -> None:
    """The tables and the figure of docs/training.md."""
    from oneword.train.plots import trajectories

    words = [row for row in rows if "word" in row]
    medians: dict[tuple[str, int], dict[str, float]] = {}
    for who, steps in dict.fromkeys((row["contender"], row["steps"]) for row in words):
        some = [row for row in words if (row["contender"], row["steps"]) == (who, steps)]
        names = ("seconds", "likeness", "editability")
        medians[who, steps] = {name: statistics.median(row[name] for row in some) for name in names}
    if medians:
        panels = {
            name: {
                who: [
                    (m["seconds"], [row[name] for row in words if (row["contender"], row["steps"]) == (who, steps)])
                    for (w, steps), m in sorted(medians.items())
                    if w == who
                ]
                for who in dict.fromkeys(who for who, _ in medians)
            }
            for name in ("likeness", "editability")
        }
        PAGE.with_suffix(".svg").write_text(trajectories(panels, "seconds, from the start of the process"))
        lines = [
            (
                f"{who}, {steps} steps",
                *(f"{m[n]:.{d}f}" for n, d in (("seconds", 1), ("likeness", 3), ("editability", 3))),
            )
            for (who, steps), m in sorted(medians.items())
        ]
        text = table(("median of words", "seconds", "likeness", "editability"), lines)
        text += "\n\n![likeness and editability against seconds](training.svg)\n\n" + parts_table(words)
        write_section(PAGE, "compared", text)
    write_section(PAGE, "summary", "```json\n" + json.dumps(summary, indent=2) + "\n```")


def parts_table(words: Sequence[Mapping[str, Any]]) -> str:
    """Where the seconds go: the longest runs of either, medians over words."""
    lines = []
    for who in ("oneword", "diffusers"):
        mine = [row for row in words if row["contender"] == who and "parts" in row]
        most = max((row["steps"] for row in mine), default=0)
        mine = [row for row in mine if row["steps"] == most]
        if mine:
            shares = [statistics.median(row["parts"][part] for row in mine) for part in PARTS]
            step = statistics.median(row["step"] for row in mine)
            lines.append((f"{who}, {most} steps", *(f"{share:.1f}" for share in shares), f"{1000 * step:.0f}"))
    return table(("seconds of", *PARTS, "ms a step"), lines)


if __name__ == "__main__":
    main()
