"""`ti-train`: folders of pictures in, concept files out. A thin wrapper around `oneword.train.learn`."""

from __future__ import annotations

import csv
import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from oneword.engines.errors import FileError, MissingPackage, OnewordError, UsageError, counted
from oneword.engines.files import write_whole
from oneword.runtime.commands import (
    HELP,
    PATH,
    exit_status,
    json_option,
    refuse_file,
    require_folder_of,
    token_name,
    version_option,
)
from oneword.runtime.concept import Concept, save_concept
from oneword.train.recipe import DEFAULT_RECIPE, RECIPES, Compute, Norm, Recipe, named_recipe

if TYPE_CHECKING:
    from oneword.train.learn import Progress
    from oneword.train.preview import SheetFolders
    from oneword.train.tasks import Task

EXAMPLE = "ti-train IMAGES_DIR --model miniature --token '<toy>' --output toy.safetensors"
COLUMNS = ("images", "token", "init", "output")


@dataclass(frozen=True)
class Job:
    """What one call of `ti-train` learns: a row of COLUMNS per word, the model, the recipe, and what to save where.

    `liked` are pictures to learn from too, of a single word that `ti-refine` made.

    Raises `UsageError` for outputs that could not be written, before learning rather than after it.
    """

    model: str
    config: Path | None
    without: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    liked: tuple[Path, ...]
    recipe: Recipe
    seed: int
    checkpoints: Path | None
    checkpoint_every: int
    preview_every: int | None
    report: Path | None
    tensorboard: Path | None

    def __post_init__(self) -> None:
        check_outputs([Path(row["output"]) for row in self.rows])
        if self.report and (self.report.is_dir() or not self.report.absolute().parent.is_dir()):
            raise UsageError(f"--report {self.report}: give a file in an existing folder, for example run.html")
        if self.report and _place(self.report) in [_place(Path(row["output"])) for row in self.rows]:
            raise UsageError(f"--report {self.report} is --output too: give it a file of its own, for example run.html")
        for folder in self.sheet_folders().values():
            if (self.report or self.preview_every) and folder.exists() and not folder.is_dir():
                raise UsageError(f"{folder} is a file, but samples are saved in a folder of that name: move the file")
        if self.tensorboard:
            refuse_file("--tensorboard", self.tensorboard)
        if self.checkpoints:
            refuse_file("--checkpoints", self.checkpoints)

    def tasks(self) -> list[Task]:
        """The words to learn."""
        from oneword.train.tasks import Task

        return [Task(Path(row["images"]), row["token"], row["init"], self.liked) for row in self.rows]

    def sheet_folders(self) -> dict[str, Path]:
        """Where each word's samples are saved, by token."""
        return {row["token"]: Path(row["output"]).with_suffix(".previews") for row in self.rows}


class Interrupted(OnewordError):
    """The user pressed Ctrl-C; the message says how to resume."""

    exit_code = 130


class Interruption:
    """A context in which the first Ctrl-C only sets `requested`, so that the step finishes; the second interrupts."""

    requested = False

    def __enter__(self) -> Interruption:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)


@click.command(name="ti-train", context_settings=HELP)
@version_option
@click.argument("images", metavar="[IMAGES_DIR]...", nargs=-1, type=PATH)
@click.option("--model", required=True, help="A diffusers directory, a hub id, a .safetensors file, or miniature.")
@click.option("--config", type=PATH, help="For a .safetensors file: a diffusers directory of the same kind.")
@click.option(
    "--without",
    multiple=True,
    metavar="ENCODER",
    help="Text encoder to leave out: text_encoder_3 (T5) of Stable Diffusion 3. The word then has no vectors for it.",
)
@click.option(
    "--token",
    "tokens",
    type=token_name,
    metavar="NAME",
    multiple=True,
    help='The new word, for example "<toy>"; once for each IMAGES_DIR.',
)
@click.option(
    "--init",
    "inits",
    multiple=True,
    help="What to start from: a word that describes the pictures, or several, whose mean is used; auto, to find such "
    "words in the pictures; random; or a .safetensors file of a word. Give it once for all folders, or once for each.  "
    "[default: object]",
)
@click.option(
    "--output",
    "outputs",
    multiple=True,
    type=PATH,
    help="The .safetensors file to write, in place of an existing one; once for each IMAGES_DIR.",
)
@click.option(
    "--manifest",
    type=PATH,
    help="A CSV of words with the columns images, token, init, output, instead of IMAGES_DIR and these three options.",
)
@click.option(
    "--polish",
    "polished",
    type=PATH,
    metavar="FILE",
    help="Learn a word of ti-refine further, from IMAGES_DIR and the pictures liked in its rounds; in place of --token "
    "and --init.",
)
@click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    show_default=True,
    help=f"The settings to start from: {', '.join(RECIPES)}. Each option from --steps to --set replaces one of them.",
)
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--vectors", type=int, help="Vectors per word.")
@click.option(
    "--learning-rate",
    type=float,
    help="The optimiser's learning rate; the directional optimiser's is the tangent of the angle of a step.",
)
@click.option("--batch-size", type=int, help="Pictures per step and word.")
@click.option("--accumulation", type=int, help="Backward passes per step, each of --batch-size pictures.")
@click.option(
    "--norm",
    type=click.Choice([norm.value for norm in Norm]),
    help="With AdamW, as in the recipe fast: whether a vector's length is free, fixed at the vocabulary's median, or "
    "pulled towards it in each step. The directional optimiser, the default recipe's, fixes it and takes only free.",
)
@click.option("--min-snr", type=float, help="Gamma of min-SNR weighting.")
@click.option(
    "--stop-below",
    type=float,
    help="Stop a word once the variance of its loss over the last 310 steps, relative to that of all steps, is below "
    "this (DVAR; 0.15 is usual). Needs more than 310 --steps.",
)
@click.option("--flip", is_flag=True, default=None, help="Also learn from mirrored pictures.")
@click.option("--compute", type=click.Choice([c.value for c in Compute]), help="Number type of the network.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Save memory, take more time.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other setting of the recipe; may be repeated."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the words' random batches.")
@click.option(
    "--checkpoints",
    type=PATH,
    help="Folder for the run's state, from which it resumes.  [default: the first output, ending in .run: toy.run]",
)
@click.option("--checkpoint-every", type=int, default=25, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--preview-every",
    type=int,
    metavar="K",
    help="Save samples every K steps, in a folder named like the output, ending in .previews: toy.previews.",
)
@click.option("--report", type=PATH, help="Write an HTML report with samples.")
@click.option("--tensorboard", type=PATH, metavar="DIR", help="Write TensorBoard logs.")
@click.option("--ray", metavar="ADDRESS", help="Learn on a Ray cluster: auto, local or host:port.")
@click.option("--group", type=int, default=4, show_default=True, help="Words per Ray task.")
@json_option
def command(
    images: Sequence[Path],
    model: str,
    config: Path | None,
    without: Sequence[str],
    tokens: Sequence[str],
    inits: Sequence[str],
    outputs: Sequence[Path],
    manifest: Path | None,
    polished: Path | None,
    recipe: str,
    settings: Sequence[str],
    norm: str | None,
    compute: str | None,
    seed: int,
    checkpoints: Path | None,
    checkpoint_every: int,
    preview_every: int | None,
    report: Path | None,
    tensorboard: Path | None,
    ray: str | None,
    group: int,
    as_json: bool,
    **changes: Any,
) -> None:
    """Learn a word, or many at once, from folders of pictures."""
    changes |= {"norm": norm and Norm(norm), "compute": compute and Compute(compute)}
    changes = {name: value for name, value in changes.items() if value is not None}
    for option, number in (
        ("checkpoint-every", checkpoint_every),
        ("preview-every", preview_every),
        ("group", group),
    ):
        if number is not None and number < 1:
            raise UsageError(f"--{option} is {number}: give a whole number, at least 1")
    liked: tuple[Path, ...] = ()
    if polished is not None:
        if manifest or tokens or inits or len(images) != 1:
            raise UsageError("--polish takes one IMAGES_DIR and --output: leave out --token, --init and --manifest")
        from oneword.train.polish import read_refined_word

        word = read_refined_word(polished)
        tokens, inits, liked = [word.token], [str(polished)], word.liked
        changes = {"vectors": word.vectors, **changes}
    job = Job(
        model,
        config,
        without,
        rows_of(images, tokens, inits, outputs, manifest),
        liked,
        named_recipe(recipe).with_text(settings, **changes),
        seed,
        checkpoints,
        checkpoint_every,
        preview_every,
        report,
        tensorboard,
    )
    console = Console(stderr=True, highlight=False)
    document = learn_on_ray(job, ray, group, console) if ray else learn_locally(job, console)
    if as_json:
        click.echo(json.dumps(document, indent=2))


def learn_locally(job: Job, console: Console) -> dict[str, Any]:
    """Learns in this process and writes the concepts. Returns what `--json` prints."""
    make_report = import_report() if job.report else None
    from oneword.export.source import silence_libraries  # imports torch, so only once the options are valid
    from oneword.train.checkpoint import forget, held
    from oneword.train.learn import learn
    from oneword.train.preview import SheetFolders
    from oneword.train.progress import log, show

    silence_libraries()
    started = time.perf_counter()
    checkpoints = job.checkpoints or Path(job.rows[0]["output"]).with_suffix(".run")
    tasks = job.tasks()
    run = learn(
        job.model,
        tasks,
        job.recipe,
        job.seed,
        config=job.config,
        without=job.without,
        checkpoints=checkpoints,
        checkpoint_every=job.checkpoint_every,
        preview_every=job.preview_every or (job.recipe.steps if job.report else None),
    )
    sheets = SheetFolders(job.sheet_folders())
    updates = show(run, console)
    if job.tensorboard:
        updates = log(updates, job.tensorboard, [task.token for task in tasks])
    last, notes = None, list[str]()
    with Interruption() as interruption, held(checkpoints), closing(run):
        for last in updates:
            notes += last.notes
            if last.step == 1:  # a new run
                sheets.forget()
            for sheet in last.sheets:
                sheets.keep(sheet)
            if interruption.requested and not last.concepts:
                raise Interrupted(f"stopped at step {last.step} of {last.steps}: run the same command to resume")
        assert last is not None  # a run always yields its concepts last
        seconds = time.perf_counter() - started
        for row, concept, losses in zip(job.rows, last.concepts, last.history, strict=True):
            save_concept(concept, row["output"])
            line = f"{concept.token} -> {row['output']}, {steps_taken(last.start, len(losses))} in {seconds:.0f} s"
            console.print(line, markup=False, soft_wrap=True)
        if job.report and make_report:
            page = report_of(job, make_report, last, notes, sheets)
            write_whole(job.report, page.encode(errors="replace"))  # names of files need not be UTF-8
            console.print(f"report -> {job.report}", markup=False, soft_wrap=True)
        forget(checkpoints)
    concepts = [
        {
            **reported_row(row, concept),
            "vectors": {name: list(vectors.shape) for name, vectors in concept.vectors.items()},
            "loss": losses[-1] if math.isfinite(losses[-1]) else None,
            "steps": len(losses),
        }
        for row, concept, losses in zip(job.rows, last.concepts, last.history, strict=True)
    ]
    return document_of(job, concepts, last.step, {**last.timings, "total": seconds})


def steps_taken(start: int, count: int) -> str:
    """The steps of a word that this run took, of `count` in all, after it resumed from step `start`."""
    if start == 0:
        return counted(count, "step")
    if start >= count:
        return "no more steps"
    return f"step {count}" if count == start + 1 else f"steps {start + 1} to {count}"


def learn_on_ray(job: Job, address: str, group: int, console: Console) -> dict[str, Any]:
    """Learns on a cluster and writes each group's concepts as it finishes. Returns what `--json` prints."""
    if job.preview_every or job.report or job.tensorboard or job.checkpoints:
        raise UsageError("--ray does not support --preview-every, --report, --tensorboard or --checkpoints: drop them")
    from oneword.train import ray

    started = time.perf_counter()
    groups = ray.learn_on_ray(
        job.model,
        job.tasks(),
        job.recipe,
        job.seed,
        config=job.config,
        without=job.without,
        address=address,
        group=group,
    )
    rows = list(job.rows)
    for concepts, notes in groups:
        for note in notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        for number, concept in concepts.items():
            save_concept(concept, job.rows[number]["output"])
            rows[number] = reported_row(job.rows[number], concept)
            console.print(f"{concept.token} -> {job.rows[number]['output']}", markup=False, soft_wrap=True)
    return document_of(job, rows, job.recipe.steps, {"total": time.perf_counter() - started})


def reported_row(row: Mapping[str, str], concept: Concept) -> Mapping[str, str]:
    """The row of a word that was learned, with the words that were found in place of `auto`."""
    return {**row, "init": concept.provenance["init"]} if row["init"] == "auto" else row


def document_of(
    job: Job, concepts: Sequence[Mapping[str, Any]], steps: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Returns what `--json` prints."""
    return {
        "concepts": list(concepts),
        "model": job.model,
        "recipe": job.recipe.as_text(),
        "seed": job.seed,
        "steps": steps,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def import_report() -> Callable[..., str]:
    """Imports the function that makes a report, before the learning. Raises `MissingPackage`."""
    try:
        from oneword.train.report import report
    except ImportError as error:
        raise MissingPackage(str(error.name), "train") from error
    return report


def report_of(
    job: Job, make_report: Callable[..., str], last: Progress, notes: Sequence[str], sheets: SheetFolders
) -> str:
    """Returns the run's report as HTML."""
    from oneword.train.pictures import read_pictures
    from oneword.train.prompts import probes
    from oneword.train.report import LearnedWord

    likeness = {sheet.token: sheet.likeness for sheet in last.sheets}
    words = [
        LearnedWord(
            token=concept.token,
            init=concept.provenance["init"],
            output=Path(row["output"]),
            vectors=len(next(iter(concept.vectors.values()))),
            pictures=[picture.pixels for picture in read_pictures(Path(row["images"]), 112)],
            losses=losses,
            sheets=sheets.images(concept.token),
            prompts=probes(job.recipe.subject),
            likeness=likeness.get(concept.token),
            length=length,
        )
        for row, concept, losses, length in zip(job.rows, last.concepts, last.history, last.lengths, strict=True)
    ]
    return make_report(
        words,
        model=job.model,
        config=None if job.config is None else str(job.config),
        settings={
            "seed": str(job.seed),
            **({"without": ", ".join(job.without)} if job.without else {}),
            "recipe": job.recipe.name,
            **{name: value for name, value in job.recipe.as_text().items() if name != "name"},
        },
        rates=[job.recipe.learning_rate_at(step) for step in range(last.step)],
        notes=notes,
        seconds=last.timings,
    )


def rows_of(
    images: Sequence[Path],
    tokens: Sequence[str],
    inits: Sequence[str],
    outputs: Sequence[Path],
    manifest: Path | None,
) -> list[dict[str, str]]:
    """Returns COLUMNS for every word, from the options or the CSV."""
    if manifest:
        if images or tokens or inits or outputs:
            raise UsageError("--manifest replaces IMAGES_DIR, --token, --init and --output: give one or the other")
        return read_manifest(manifest)
    count = len(images)
    if not count:
        raise UsageError(f"no folder of pictures given: {EXAMPLE}")
    inits = inits or ["object"]
    inits = list(inits) * count if len(inits) == 1 else inits
    for option, values in (("--token", tokens), ("--init", inits), ("--output", outputs)):
        if len(values) != count:
            raise UsageError(
                f"{counted(count, 'folder')}, but {counted(len(values), 'value')} of {option}: give one for each folder"
            )
    words = zip(map(str, images), tokens, inits, map(str, outputs), strict=True)
    return [dict(zip(COLUMNS, word, strict=True)) for word in words]


def read_manifest(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV; folders and outputs are relative to it. Raises `UsageError` for missing cells and
    unknown columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}: --manifest takes a CSV") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} is not a CSV in UTF-8: the columns are {', '.join(COLUMNS)}") from error
    if not rows:
        raise UsageError(f"{path} lists no words: add a line with {', '.join(COLUMNS)} for each")
    if unknown := [name for name in reader.fieldnames or () if name and name not in COLUMNS]:
        raise UsageError(f"{path} has the column {unknown[0]!r}, but the columns must be {', '.join(COLUMNS)}")
    for number, row in rows:
        if row.get(None) or row.get(""):  # DictReader puts cells that have no column under None
            raise UsageError(f"{path} line {number} has more cells than columns: put a cell that has commas in quotes")
        if missing := [name for name in COLUMNS if not row.get(name) and name != "init"]:
            raise UsageError(f"{path} line {number} has no {', '.join(missing)}: the columns are {', '.join(COLUMNS)}")
    return [
        {
            "images": str(path.parent / row["images"]),
            "token": row["token"],
            "init": _relative_init(path, row.get("init") or "object"),
            "output": str(path.parent / row["output"]),
        }
        for _, row in rows
    ]


def check_outputs(paths: Sequence[Path]) -> None:
    """Raises `UsageError` if a concept could not be written."""
    places = [_place(path) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if path.suffix != ".safetensors":
            raise UsageError(f"--output {path}: concepts are written as .safetensors files")
        require_folder_of("--output", path)
        if path.is_dir():
            raise UsageError(f"--output {path} is a folder: give a file, for example {path / 'toy.safetensors'}")
        if places.count(place) > 1:
            raise UsageError(f"--output {path} is given twice: give each word its own file")


def _place(file: Path) -> Path:
    """The file that is written, however its path is spelled: a link at its end is replaced, not followed."""
    return file.parent.resolve() / file.name


def _relative_init(manifest: Path, init: str) -> str:
    """Makes an init that is a concept file relative to the manifest, like the other paths."""
    return str(manifest.parent / init) if init.endswith(".safetensors") else init


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    return exit_status(command, "ti-train", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
