"""Learning a word: ti-train beside diffusers' textual_inversion.py, on the same model.

    python -m benchmarks.training SCRIPT [--words 12] [--script-steps 3000] [--budgets 50,100,200]   both, for each word
    python -m benchmarks.training SCRIPT --full-size           a step and a whole word on SD 1.5's architecture
    python -m benchmarks.training --many 16                    16 words in one run, and 16 runs of one word

SCRIPT is the path of diffusers' examples/textual_inversion/textual_inversion.py, which is not part of this project. It
learns with the settings of its README (constant rate 5e-4 times the batch of 4, seed 0, its own defaults otherwise),
from a copy of the model in fp32, and saves its word at each quarter of the run. It needs torchvision only for
RandomHorizontalFlip; a stand-in of ten lines replaces it, so that torchvision need not be installed.

Contenders run one after another, each in its own process with the same number of threads; seconds run from the start of
a process to its end. The miniature's judge scores likeness and editability on pictures that the runtime draws.
Measurements are stored in `--work`, one line of JSON each, and are not repeated. `--write` puts the section of this
call into docs/results/training.md. Not covered: GPUs, and words of several vectors. Ends in one line of JSON.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pages import RESULTS, empty_page, marked, provenance, table, with_error, write_section
from benchmarks.store import Store, all_rows, model_digest

PAGE = RESULTS / "training.md"
NEW_PAGE = empty_page(
    "Learning a word",
    "Time, quality and memory of `ti-train`, on the miniature and on SD 1.5's architecture.",
    "compared",
    "many",
    "full-size",
    "threads",
)
SPEEDUP_BAR, REACHED_BAR, MANY_BAR = 20, 10 / 12, 0.5
PARTS = ("start", "VAE", "text encoder", "UNet", "backward", "optimiser", "rest")
README_RATE = 5e-4  # the script multiplies it by its batch (--scale_lr)
BATCH = 4
README_STEPS = 3000
SCORES = ("likeness", "editability")


def main() -> None:
    """Runs the requested measurements, stores them and prints a summary."""
    if sys.argv[1:2] == ["--child"]:
        return child(Path(sys.argv[2]), sys.argv[3:])
    from oneword.train.recipe import DEFAULT_RECIPE

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", type=Path, nargs="?")
    p.add_argument("--model", default="miniature")
    p.add_argument("--init", default="object", help="one word of the vocabulary, as the script requires")
    p.add_argument("--words", type=int, default=12)
    p.add_argument("--script-steps", type=int, default=README_STEPS)
    p.add_argument(
        "--script-options", default="", help='further options for the script, such as "--mixed_precision bf16"'
    )
    p.add_argument("--budgets", default="50,100,200", help="numbers of steps for ti-train, one run each")
    p.add_argument("--recipe", default=DEFAULT_RECIPE)
    p.add_argument("--samples", type=int, default=16, help="pictures per prompt")
    p.add_argument("--sample-steps", type=int, default=20)
    p.add_argument("--full-size", action="store_true", help="SD 1.5's architecture at 512x512")
    p.add_argument("--full-steps", type=int, default=3)
    p.add_argument("--many", type=int, metavar="N", help="N words in one run, and N runs of one word")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--work", type=Path, default=Path("build/training"))
    p.add_argument("--write", action="store_true", help="write docs/results/training.md and its figure")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.store = Store(args.work, model_digest(args.model))
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.many:
        learn_together(args)
    elif args.full_size:
        full_size(args)
    elif args.script:
        compare(args)
    rows = [row for row in all_rows(args.store.file) if is_asked_for(row, args)]
    summary = summarise(rows)
    if args.write:
        write_page(rows, summary, args)
    print(json.dumps(summary))


def is_asked_for(row: Mapping[str, Any], args: argparse.Namespace) -> bool:
    """Whether a measurement is of this model and recipe; full size has its own."""
    of_recipe = row["contender"] == "diffusers" or row.get("recipe") == args.recipe
    if "full" in row:
        return of_recipe or "recipe" not in row
    return of_recipe and row["model"] == args.store.digest


# ---- ti-train and the script, word by word ---------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """Both contenders learn every held-out look; every word they save is scored."""
    from oneword.train.miniature import world

    for number in range(args.words):
        folder = pictures_of(world.HELD_OUT_LOOKS[number], args.work / f"{number:02d}", 1000 * number)
        for budget in map(int, args.budgets.split(",")):
            output = args.work / f"{number:02d}-{args.recipe}-{budget}.safetensors"
            more = ["--init", args.init, "--recipe", args.recipe, "--steps", str(budget)]
            row = {"contender": "oneword", "word": number, "recipe": args.recipe, "steps": budget}
            measured(args, row, partial(ours, args, {"<word>": (folder, output)}, more), score_of(args, output, folder))
        row = {"contender": "diffusers", "word": number, "steps": args.script_steps}
        output = args.work / f"{number:02d}-diffusers"
        final = output / "learned_embeds.safetensors"
        finished = measured(
            args,
            row,
            partial(script, args, in_fp32(args), folder, output, args.script_steps),
            score_of(args, final, folder),
        )
        for step in range(save_every(args.script_steps), args.script_steps, save_every(args.script_steps)):
            saved = output / f"learned_embeds-steps-{step}.safetensors"
            seconds = {"seconds": saved.stat().st_mtime - finished["began"]} if saved.is_file() else {}
            measured(args, {**row, "steps": step}, partial(dict, seconds), score_of(args, saved, folder))


def ours(args: argparse.Namespace, words: Mapping[str, tuple[Path, Path]], more: Sequence[str]) -> dict[str, Any]:
    """Runs `ti-train` in its own process; `words` maps a token to (pictures, output)."""
    folders = [str(folder) for folder, _ in words.values()]
    options = [text for token, (_, output) in words.items() for text in ("--token", token, "--output", str(output))]
    for _, output in words.values():
        output.unlink(missing_ok=True)
    return timed(args, ["ti-train", *folders, "--model", args.model, *options, *more])


def script(
    args: argparse.Namespace, model: Path, folder: Path, output: Path, steps: int, size: int = 0
) -> dict[str, Any]:
    """Runs diffusers' script in its own process."""
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
    """The model with fp32 weights: the script learns in the stored type, and in fp16 its rows become NaN."""
    from diffusers import StableDiffusionPipeline

    from oneword.export.source import find_model

    model = find_model(args.model)[0]
    folder: Path = args.work / f"fp32-{args.store.digest}"
    if not (folder / "model_index.json").is_file():
        pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype="float32", safety_checker=None)
        pipeline.save_pretrained(folder)
    return folder


def save_every(steps: int) -> int:
    """The steps between two of the script's saves: a quarter of the run."""
    return max(1, steps // 4)


def score_of(args: argparse.Namespace, output: Path, folder: Path) -> Callable[[], dict[str, float]]:
    """A function that scores the word in `output` once it exists: likeness and mean editability."""

    def score() -> dict[str, float]:
        from oneword.runtime.concept import load_concept
        from oneword.train.evaluation.evaluate import evaluate
        from oneword.train.evaluation.prompts import MINIATURE_PROMPTS
        from oneword.train.pictures import read_pictures

        model, judge = judged(args)
        concept = replace(load_concept(output), token="<word>")
        training = np.stack([picture.pixels for picture in read_pictures(folder, model.manifest.defaults.width)])
        model.load(concept)
        options = {"samples": args.samples, "steps": args.sample_steps}
        scores, _ = evaluate(model, judge, concept.token, training, MINIATURE_PROMPTS, **options)
        model.unload(concept.token)
        return {"likeness": round(scores.likeness, 4), "editability": round(scores.mean_editability, 4)}

    return score


def judged(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, opened from a bundle that is exported once, and its judge."""
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


# ---- many words in one run, full size --------------------------------------------------------------------------------


def learn_together(args: argparse.Namespace) -> None:
    """Learns N words in one run, then each of them in its own run."""
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
        measured(args, {**row, "run": token}, partial(ours, args, {token: word}, alone))


def full_size(args: argparse.Namespace) -> None:
    """A few steps of one picture at 512x512, on SD 1.5's architecture with random weights, and a whole word of the
    recipe, whose pictures are computed one at a time."""
    from benchmarks.random_models import save_sd15
    from oneword.train.recipe import named_recipe

    args.model = str(args.work / "sd15")
    if not (args.work / "sd15" / "model_index.json").is_file():
        save_sd15(args.model, "float32")  # 4.3 GB
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
    recipe = named_recipe(args.recipe)
    per_step = recipe.batch_size * recipe.accumulation
    more = ["--init", args.init, "--recipe", args.recipe, "--batch-size", "1", "--accumulation", str(per_step)]
    row = {"full": "sd15", "contender": "oneword", "recipe": args.recipe, "pictures": recipe.steps * per_step}
    measured(args, row, lambda: ours(args, {"<word>": (folder, args.work / "whole.safetensors")}, more))


# ---- one contender in its own process, timed -------------------------------------------------------------------------


def timed(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Runs a command under `child`: seconds in total, per part and per step, and peak MiB.

    Raises SystemExit with the end of the log if it fails.
    """
    report = args.work / "child.json"
    report.unlink(missing_ok=True)
    log = (args.work / "child.log").open("w+")
    began, start = time.time(), time.perf_counter()
    arguments = [sys.executable, "-m", "benchmarks.training", "--child", str(report), *command]
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
    parts = json.loads(report.read_text())
    step = parts.pop("step")
    parts["rest"] = max(0.0, seconds - sum(parts.values()))
    return {"seconds": seconds, "began": began, "step": step, "peak_mib": used.ru_maxrss // 1024, "parts": parts}


def child(report: Path, command: Sequence[str]) -> None:
    """Runs ti-train or a script in this process, times the parts of its steps and writes them to `report`."""
    start = time.perf_counter() - time.process_time()  # roughly the start of the process
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from oneword.export.modules import TextEncoder, VaeEncoder
    from oneword.train.directional import DirectionalDescent
    from oneword.train.parallel import Recorded

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    lock = threading.Lock()
    parts = dict.fromkeys(PARTS, 0.0)
    ends: dict[object, list[float]] = {}  # of steps, by optimiser: some recipes have two

    def watch(owner: Any, name: str, part: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if part == "UNet" and not parts["start"]:
                parts["start"] = time.perf_counter() - start - sum(parts.values())
            before = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                share = torch.get_num_threads() / threads  # parts of a batch run in parallel
                with lock:
                    parts[part] += (time.perf_counter() - before) * share
                if part == "optimiser":
                    ends.setdefault(owner, []).append(time.perf_counter())

        setattr(owner, name, call)

    if command[0] == "ti-train":
        watch(VaeEncoder, "forward", "VAE")
        watch(TextEncoder, "forward", "text encoder")
        watch(Recorded, "__call__", "UNet")
        watch(torch.autograd, "grad", "backward")
        watch(DirectionalDescent, "step", "optimiser")
    else:
        watch(AutoencoderKL, "encode", "VAE")
        watch(CLIPTextModel, "forward", "text encoder")
        watch(UNet2DConditionModel, "forward", "UNet")
    watch(torch.autograd, "backward", "backward")
    watch(torch.optim.AdamW, "step", "optimiser")

    status = 0
    if command[0] == "ti-train":
        from oneword.train.cli import main as ti_train

        status = ti_train(command[1:])
    else:
        sys.modules["torchvision"] = stand_in()
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
    times = next(iter(ends.values()), [])
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else math.nan
    report.write_text(json.dumps({**parts, "step": step}))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sys.exit(status)


def stand_in() -> types.ModuleType:
    """A torchvision with one transform: RandomHorizontalFlip."""
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


# ---- stored measurements and the page --------------------------------------------------------------------------------


def measured(
    args: argparse.Namespace,
    row: dict[str, Any],
    run: Callable[[], dict[str, Any]],
    score: Callable[[], dict[str, float]] = dict,
) -> dict[str, Any]:
    """The stored row, if these weights were measured before; else measures and stores it."""
    if old := args.store.find(row):
        return old
    new = {**row, **run()}
    return args.store.add({**new, **score()}, hidden=("parts", "began"))


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratios that have targets, from what has been measured so far."""
    summary: dict[str, Any] = {}
    ratios = [ratio_of(rows, script_run) for _, script_run in sorted(script_runs(rows).items())]
    if ratios:
        summary["their seconds over ours at their likeness and editability"] = {
            "by word": [round(ratio, 2) for ratio in ratios],
            "median": round(statistics.median(ratios), 2),
            "bar": SPEEDUP_BAR,
            "reached": sum(ratio > 0 for ratio in ratios),
            "reached bar": reached_bar(len(ratios)),
        }
    together = {row["many"]: row["seconds"] for row in rows if row.get("run") == "together"}
    for count, seconds in together.items():
        alone = [row["seconds"] for row in rows if row.get("many") == count and row["run"] != "together"]
        if len(alone) == count:
            ratio = round(seconds / sum(alone), 3)
            summary[f"{count} words together over {count} runs"] = {"ratio": ratio, "bar": MANY_BAR}
    for row in rows:
        if "full" in row:
            run = f"{row['contender']}, a word" if "pictures" in row else row["contender"]
            seconds = {"seconds": row["seconds"]} if "pictures" in row else {"seconds a step": round(row["step"], 2)}
            facts = {**seconds, "peak MiB": row["peak_mib"]}
            summary.setdefault("full size", {})[run] = facts
    return summary


def reached_bar(words: int) -> int:
    """How many words must reach the script's likeness and editability: ten of twelve."""
    return math.ceil(REACHED_BAR * words)


def script_runs(rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The script's longest run on each word."""
    runs = [row for row in rows if row["contender"] == "diffusers" and "word" in row]
    return {row["word"]: row for row in sorted(runs, key=lambda row: row["steps"])}


def ratio_of(rows: Sequence[Mapping[str, Any]], script_run: Mapping[str, Any]) -> float:
    """The script's seconds over those of our shortest run with its likeness and editability; 0 if no run has both."""
    good = [
        row["seconds"]
        for row in rows
        if row["contender"] == "oneword"
        and row.get("word") == script_run["word"]
        and all(row[name] >= script_run[name] for name in SCORES)
    ]
    return float(script_run["seconds"] / min(good)) if good else 0.0


def write_page(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Writes the section of this call into docs/results/training.md."""
    if args.many:
        name, text = "many", many_table(rows, args.many)
    elif args.full_size:
        name, text = "full-size", full_size_table(rows)
    else:
        name, text = "compared", f"Recipe `{args.recipe}`, threads: {args.threads}.\n\n{compared(rows, summary)}"
    origin = provenance("training", stored=args.store.file)
    write_section(PAGE, name, f"{origin}\n\n{text}", NEW_PAGE)


def compared(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """Likeness and editability against seconds, and where the seconds go; writes the figure."""
    from oneword.train.plots import trajectories

    words = [row for row in rows if "word" in row]
    if not words:
        raise SystemExit("no word has been measured in --work: give the path of diffusers' script")
    runs = sorted({(row["contender"], row["steps"]) for row in words})
    names = ("seconds", *SCORES)
    values = {
        run: {name: [row[name] for row in words if (row["contender"], row["steps"]) == run] for name in names}
        for run in runs
    }
    panels = {
        name: {
            contender: [
                (statistics.median(values[run]["seconds"]), values[run][name]) for run in runs if run[0] == contender
            ]
            for contender in dict.fromkeys(row["contender"] for row in words)
        }
        for name in SCORES
    }
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.with_suffix(".svg").write_text(trajectories(panels, "seconds, from the start of the process"))
    lines = [
        (
            f"{run[0]}, {run[1]} steps",
            *(f"{statistics.median(values[run][name]):.{1 if name == 'seconds' else 3}f}" for name in names),
        )
        for run in runs
    ]
    parts = [table(("median of words", *names), lines), "![likeness and editability against seconds](training.svg)"]
    if speedup := summary.get("their seconds over ours at their likeness and editability"):
        by_word = ", ".join(f"{ratio:g}" for ratio in speedup["by word"])
        reached, least = speedup["reached"], speedup["reached bar"]
        lines = [
            ("median of words", f"at least {SPEEDUP_BAR}", marked(speedup["median"], speedup["median"] >= SPEEDUP_BAR)),
            (
                f"words of {len(speedup['by word'])} for which a run of oneword reached both",
                f"at least {least}",
                marked(reached, reached >= least),
            ),
            ("by word (0: no run of oneword reached both)", "", by_word),
        ]
        parts.append(
            table(("the script's seconds over oneword's, at its likeness and editability", "target", "measured"), lines)
        )
    return "\n\n".join([*parts, differences(words), parts_table(words)])


def differences(words: Sequence[Mapping[str, Any]]) -> str:
    """Our runs compared with the script's longest run on the same word: medians of times, and means of differences
    with their standard errors over words."""
    script = script_runs(words)
    ours = [row for row in words if row["contender"] == "oneword" and row["word"] in script]
    lines = []
    for steps in sorted({row["steps"] for row in ours}):
        pairs = [(row, script[row["word"]]) for row in ours if row["steps"] == steps]
        times = statistics.median(theirs["seconds"] / mine["seconds"] for mine, theirs in pairs)
        scores = ([mine[name] - theirs[name] for mine, theirs in pairs] for name in SCORES)
        lines.append((f"oneword, {steps} steps", f"{times:.1f}", *map(with_error, scores)))
    longest = max(row["steps"] for row in script.values())
    head = (f"compared with the script's {longest} steps", "times faster", *(f"{name} higher by" for name in SCORES))
    return table(head, lines)


def many_table(rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """N words in one run beside N runs."""
    runs = {row["run"]: row["seconds"] for row in rows if row.get("many") == count}
    together = runs.pop("together")
    ratio = together / sum(runs.values())
    lines = [
        (
            f"{count} words in one run over {count} runs",
            f"at most {MANY_BAR}",
            marked(f"{ratio:.2f}", ratio <= MANY_BAR),
        ),
        (f"{count} words in one run, s", "", f"{together:.0f}"),
        ("one word in its own run, s, median", "", f"{statistics.median(runs.values()):.0f}"),
    ]
    return table(("", "target", "measured"), lines)


def full_size_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds per step and peak memory on SD 1.5's architecture, and those of a whole word.

    The script's word is not measured: it is its step times the pictures of its README.
    """
    full = [row for row in rows if "full" in row]
    steps = {row["contender"]: row for row in full if "pictures" not in row}
    lines = [(name, f"{row['step']:.1f}", f"{row['peak_mib'] / 1024:.1f}") for name, row in steps.items()]
    parts = [table(("SD 1.5's architecture, 512x512, batch 1", "s per step", "peak GiB"), lines)]
    for word in (row for row in full if "pictures" in row):
        script, pictures = steps["diffusers"], README_STEPS * BATCH
        words = [
            (f"oneword, `{word['recipe']}`", word["pictures"], word["seconds"], word["peak_mib"]),
            (f"diffusers, {README_STEPS} steps, extrapolated", pictures, pictures * script["step"], script["peak_mib"]),
        ]
        columns = [(name, str(n), f"{seconds / 60:.0f}", f"{mib / 1024:.1f}") for name, n, seconds, mib in words]
        parts.append(table(("a whole word", "pictures", "minutes", "peak GiB"), columns))
    return "\n\n".join(parts)


def parts_table(words: Sequence[Mapping[str, Any]]) -> str:
    """Seconds per part in the longest runs of each contender, medians over words."""
    lines = []
    for contender in ("oneword", "diffusers"):
        runs = [row for row in words if row["contender"] == contender and "parts" in row]
        steps = max((row["steps"] for row in runs), default=0)
        runs = [row for row in runs if row["steps"] == steps]
        if runs:
            seconds = [statistics.median(row["parts"][part] for row in runs) for part in PARTS]
            step = statistics.median(row["step"] for row in runs)
            lines.append((f"{contender}, {steps} steps", *(f"{part:.1f}" for part in seconds), f"{1000 * step:.0f}"))
    return table(("seconds", *PARTS, "ms per step"), lines)


if __name__ == "__main__":
    main()
