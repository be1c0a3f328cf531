"""`ti-train`: folders of pictures in, concept files out. A thin skin over `oneword.train.run`."""

from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from oneword.engines.errors import FileError, MissingPackage, OnewordError, UsageError
from oneword.runtime.concept import save_concept
from oneword.train.recipe import RECIPES, Compute, Norm, Recipe, named_recipe

if TYPE_CHECKING:
    from oneword.train.preview import SheetFolders
    from oneword.train.run import Progress


class Interrupted(OnewordError):
    """The user pressed Ctrl-C; the message says how to go on."""

    exit_code = 130


class Interruption:
    """While entered, the first Ctrl-C is only noted, so that the step under way ends; the second interrupts as ever."""

    asked = False

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and ours."""

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError`."""
        raise UsageError(f"{message} ({self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The command line of `ti-train`."""
    p = Parser("ti-train", description="Learn a word, or many at once, from folders of pictures.")
    p.add_argument("images", nargs="*", type=Path, metavar="IMAGES_DIR", help="a folder of pictures for each word")
    p.add_argument("--model", required=True, help="a diffusers directory, a hub id, or miniature")
    p.add_argument("--token", action="append", default=[], help='what the word is called, for example "<toy>"')
    p.add_argument(
        "--init", action="append", default=[], help="a word or words to start from, random, or a concept file"
    )
    p.add_argument("--output", action="append", default=[], type=Path, help="the concept file to write (.safetensors)")
    p.add_argument(
        "--manifest", type=Path, help="a CSV with the columns images, token, init, output, in place of those"
    )
    p.add_argument("--recipe", default="fast", help=f"one of {', '.join(RECIPES)} (default fast)")
    p.add_argument("--steps", type=int, help="optimiser steps")
    p.add_argument("--vectors", type=int, help="vectors a word")
    p.add_argument("--learning-rate", type=float, help="of AdamW")
    p.add_argument("--batch-size", type=int, help="pictures a step, of each word")
    p.add_argument("--accumulation", type=int, help="backward passes a step")
    p.add_argument("--norm", choices=[norm.value for norm in Norm], help="what becomes of a vector's length")
    p.add_argument("--min-snr", type=float, help="gamma of min-SNR weighting")
    p.add_argument("--stop-below", type=float, help="stop a word early at this DVAR ratio (0.15 is usual)")
    p.add_argument("--flip", action="store_const", const=True, help="learn from mirrored pictures too")
    p.add_argument("--compute", choices=[compute.value for compute in Compute], help="what the UNet computes in")
    p.add_argument("--gradient-checkpointing", action="store_const", const=True, help="less memory, more time")
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of the recipe, repeated"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--checkpoints", type=Path, help="folder for the run's state (default: beside the output, .run)")
    p.add_argument("--checkpoint-every", type=int, default=25, help="steps between two states (default 25)")
    p.add_argument("--preview-every", type=int, metavar="K", help="sample sheets every K steps, in OUTPUT.previews/")
    p.add_argument("--report", type=Path, help="the run as one HTML page, samples included")
    p.add_argument("--tensorboard", type=Path, metavar="DIR", help="TensorBoard's logs")
    p.add_argument("--ray", metavar="ADDRESS", help="learn over a Ray cluster: auto, local or host:port")
    p.add_argument("--group", type=int, default=4, help="words a Ray task (default 4)")
    p.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ti-train`; the exit status."""
    console = Console(stderr=True, highlight=False)
    try:
        report = train(parser().parse_args(arguments), console)
    except OnewordError as error:
        print(f"ti-train: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ti-train: interrupted", file=sys.stderr)
        return 130
    if report is not None:
        print(json.dumps(report, indent=2))
    return 0


def train(args: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Parse, learn, write; what `--json` prints, or None."""
    recipe = recipe_of(args)
    rows = manifest_rows(args)
    check_report(args.report)
    check_outputs([Path(row["output"]) for row in rows])
    for option in ("checkpoint_every", "preview_every", "group"):
        if (given := getattr(args, option)) is not None and given < 1:
            raise UsageError(f"--{option.replace('_', '-')} is {given}: give a number, at least 1")
    if args.ray:
        return train_on_ray(args, recipe, rows, console)
    make_report = import_report() if args.report else None
    from oneword.train.checkpoint import forget, held
    from oneword.train.preview import SheetFolders
    from oneword.train.progress import log, show
    from oneword.train.run import Task, learn, quiet  # seconds of torch that a wrong option need not wait for

    quiet()
    checkpoints = args.checkpoints or Path(rows[0]["output"]).with_suffix(".run")
    tasks = [Task(Path(row["images"]), row["token"], row["init"]) for row in rows]
    started = time.perf_counter()
    preview_every = args.preview_every or (recipe.steps if args.report else None)
    run = learn(
        args.model,
        tasks,
        recipe,
        args.seed,
        checkpoints=checkpoints,
        checkpoint_every=args.checkpoint_every,
        preview_every=preview_every,
    )
    sheets = SheetFolders({row["token"]: Path(row["output"]).with_suffix(".previews") for row in rows})
    shown = show(run, console)
    if args.tensorboard:
        shown = log(shown, args.tensorboard, [task.token for task in tasks])
    last, notes = None, list[str]()
    with Interruption() as interruption, held(checkpoints):
        for last in shown:
            notes += last.notes
            if last.step == 1 and not last.concepts:  # begun anew
                sheets.forget()
            for sheet in last.sheets:
                sheets.keep(sheet)
            if interruption.asked and not last.concepts:
                run.close()
                raise Interrupted(f"stopped at step {last.step} of {last.steps}: the same command goes on from there")
    assert last is not None  # a run always yields its concepts
    seconds = time.perf_counter() - started
    for row, concept, losses in zip(rows, last.concepts, last.history, strict=True):
        save_concept(concept, row["output"])
        console.print(
            f"{concept.token} -> {row['output']}, {len(losses)} steps in {seconds:.0f} s", markup=False, soft_wrap=True
        )
    if make_report:
        write_report(args.report, make_report, args.model, recipe, args.seed, rows, last, notes, sheets)
        console.print(f"report -> {args.report}", markup=False, soft_wrap=True)
    forget(checkpoints)
    if not args.json:
        return None
    return {
        "concepts": [
            {
                **row,
                "vectors": {name: list(rows.shape) for name, rows in concept.vectors.items()},
                "loss": _number(losses[-1]),
                "steps": len(losses),
            }
            for row, concept, losses in zip(rows, last.concepts, last.history, strict=True)
        ],
        "model": args.model,
        "recipe": recipe.as_text(),
        "seed": args.seed,
        "steps": last.step,
        "seconds": {**{name: round(value, 3) for name, value in last.timings.items()}, "total": round(seconds, 3)},
    }


def train_on_ray(
    args: argparse.Namespace, recipe: Recipe, rows: Sequence[dict[str, str]], console: Console
) -> dict[str, Any] | None:
    """Learn over a cluster, write each group's words as they come; what `--json` prints, or None."""
    if args.preview_every or args.report or args.tensorboard or args.checkpoints:
        raise UsageError("--ray shows no run: leave out --preview-every, --report, --tensorboard and --checkpoints")
    from oneword.train.cluster import learn_on_ray
    from oneword.train.run import Task

    started = time.perf_counter()
    tasks = [Task(Path(row["images"]).absolute(), row["token"], row["init"]) for row in rows]
    for concepts, notes in learn_on_ray(args.model, tasks, recipe, args.seed, address=args.ray, group=args.group):
        for note in notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        for number, concept in concepts.items():
            save_concept(concept, rows[number]["output"])
            console.print(f"{concept.token} -> {rows[number]['output']}", markup=False, soft_wrap=True)
    if not args.json:
        return None
    seconds = {"total": round(time.perf_counter() - started, 3)}
    return {
        "concepts": list(rows),
        "model": args.model,
        "recipe": recipe.as_text(),
        "seed": args.seed,
        "steps": recipe.steps,
        "seconds": seconds,
    }


def import_report() -> Callable[..., str]:
    """What makes a report, looked for before the learning. Raises `MissingPackage`."""
    try:
        from oneword.train.report import report
    except ImportError as error:
        raise MissingPackage(str(error.name), "train") from error
    return report


def write_report(
    path: Path,
    make_report: Callable[..., str],
    model: str,
    recipe: Recipe,
    seed: int,
    rows: Sequence[dict[str, str]],
    last: Progress,
    notes: Sequence[str],
    sheets: SheetFolders,
) -> None:
    """The run's page, whole or not at all."""
    from oneword.engines.files import write_whole
    from oneword.train.learner import learning_rate_at
    from oneword.train.pictures import read_pictures
    from oneword.train.prompts import probes
    from oneword.train.report import LearnedWord

    likeness = {sheet.token: sheet.likeness for sheet in last.sheets}
    words = [
        LearnedWord(
            token=concept.token,
            init=row["init"],
            output=Path(row["output"]),
            vectors=len(next(iter(concept.vectors.values()))),
            pictures=[picture.pixels for picture in read_pictures(Path(row["images"]), 112)],
            losses=losses,
            sheets=sheets.kept(concept.token),
            prompts=probes(recipe.subject),
            likeness=likeness.get(concept.token),
            length=length,
        )
        for row, concept, losses, length in zip(rows, last.concepts, last.history, last.lengths, strict=True)
    ]
    page = make_report(
        words,
        model=model,
        settings={"seed": str(seed), **recipe.as_text()},
        rates=[learning_rate_at(recipe, step) for step in range(last.step)],
        notes=notes,
        seconds=last.timings,
    )
    write_whole(path, page.encode())


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The named recipe with the options given over it."""
    changes = {
        name: getattr(args, name)
        for name in (
            "steps", "vectors", "learning_rate", "batch_size", "accumulation", "min_snr", "stop_below", "flip",
            "gradient_checkpointing",
        )
        if getattr(args, name) is not None
    }  # fmt: skip
    if args.norm:
        changes["norm"] = Norm(args.norm)
    if args.compute:
        changes["compute"] = Compute(args.compute)
    return named_recipe(args.recipe).with_changes(**changes).with_text(args.set)


def manifest_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """images, token, init and output of every word, from the options or the CSV."""
    if args.manifest:
        if args.images or args.token or args.output or args.init:
            raise UsageError(
                "--manifest takes the place of IMAGES_DIR, --token, --init and --output: give one or the other"
            )
        return read_manifest(args.manifest)
    count = len(args.images)
    if not count:
        raise UsageError(
            "no folder of pictures: ti-train IMAGES_DIR --model miniature --token '<toy>' --output toy.safetensors"
        )
    inits = args.init or ["object"]
    if len(inits) == 1:
        inits = inits * count
    for option, given in (("--token", args.token), ("--init", inits), ("--output", args.output)):
        if len(given) != count:
            raise UsageError(f"{count} folders and {len(given)} times {option}: give one for each folder")
    return [
        {"images": str(images), "token": token, "init": init, "output": str(output)}
        for images, token, init, output in zip(args.images, args.token, inits, args.output, strict=True)
    ]


def read_manifest(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; folders and outputs are relative to it. Raises `UsageError` for columns that are not there."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise UsageError(f"{path} names no word: give a line of images, token, init, output for each")
    for number, row in enumerate(rows, start=2):
        if missing := [name for name in ("images", "token", "output") if not row.get(name)]:
            raise UsageError(
                f"{path} line {number} has no {', '.join(missing)}: the columns are images, token, init, output"
            )
    return [
        {
            "images": str(path.parent / row["images"]),
            "token": row["token"],
            "init": _from(path, row.get("init") or "object"),
            "output": str(path.parent / row["output"]),
        }
        for row in rows
    ]


def check_report(path: Path | None) -> None:
    """Raises `UsageError` where the report could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--report {path}: give a file, for example run.html, in a folder that is there")


def check_outputs(paths: Sequence[Path]) -> None:
    """Now, rather than after the learning: raises `UsageError` where a concept could not be written."""
    for path in paths:
        if path.suffix != ".safetensors":
            raise UsageError(f"--output {path}: a concept is written as .safetensors")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--output {path}: there is no folder {path.parent}: make it first")
        if paths.count(path) > 1:
            raise UsageError(f"--output {path} is given twice: give each word a file of its own")


def _from(manifest: Path, init: str) -> str:
    """An init that is a concept file is relative to the manifest, as the other paths are."""
    return str(manifest.parent / init) if init.endswith(".safetensors") else init


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
