"""`ti-run`: prompts become pictures. A thin skin over `generate`; with --json one document on standard output."""

import json
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import oneword
from oneword.engines.errors import OnewordError, UsageError
from oneword.engines.open import Backend
from oneword.runtime.batch import Batch, Failed, PictureDone, StepDone
from oneword.runtime.commands import run_command
from oneword.runtime.concept import load_concept
from oneword.runtime.grid import Grid
from oneword.runtime.images import parameters_text, read_image, read_mask, save_png
from oneword.runtime.model import Model
from oneword.runtime.request import Request, resolve
from oneword.runtime.samplers import Sampler
from oneword.runtime.table import DEFAULT_CAPACITY


def size(value: str) -> tuple[int, int]:
    """`512x768` as (width, height)."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not WIDTHxHEIGHT, for example 512x512")
    return int(match[1]), int(match[2])


_PATH = click.Path(path_type=Path)
_PLACE = "{}"


@click.command(name="ti-run", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(oneword.__version__, prog_name="oneword")
@click.argument("bundle", type=_PATH)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("--concept", "concepts", type=_PATH, multiple=True, help="A learned word's file, or a folder of them.")
@click.option("--negative-prompt", help="What the pictures shall not be.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first picture; picture i has seed + i.")
@click.option("--num-images", type=int, default=1, show_default=True, help="Pictures of each prompt.")
@click.option("--steps", type=int, help="Denoising steps; else the bundle's default.")
@click.option("--sampler", type=click.Choice([sampler.value for sampler in Sampler]), help="Else the bundle's default.")
@click.option("--guidance-scale", type=float, help="How strongly the prompt is obeyed; 1 is no guidance.")
@click.option("--guidance-rescale", type=float, default=0.0, help="Against washed-out colours, 0 to 1.")
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="Guide only where low < sigma / alpha <= high; else every step.",
)
@click.option("--eta", type=float, default=0.0, help="Noise that DDIM adds in each step, 0 to 1.")
@click.option("--clip-skip", type=int, default=0, help="Last layers of the text encoder that are not run.")
@click.option("--size", type=size, metavar="WxH", help="Width and height in pixels.")
@click.option("--image", type=_PATH, help="A picture to start from.")
@click.option("--strength", type=float, default=0.8, show_default=True, help="How far from --image, 0 to 1.")
@click.option("--mask", type=_PATH, help="White where --image shall be made anew.")
@click.option(
    "--paste/--no-paste", default=True, show_default=True, help="Keep --image's own pixels where --mask is black."
)
@click.option(
    "--engine", type=click.Choice([backend.value for backend in Backend]), default="onnxruntime", show_default=True
)
@click.option("--max-rows", type=click.IntRange(1), default=16, show_default=True, help="Pictures made at a time.")
@click.option(
    "--word", "words", multiple=True, help="What stands for {} in the prompts, in turn; else every --concept."
)
@click.option("--grid", type=_PATH, metavar="FILE.png", help="Also all pictures as one: prompts by words and seeds.")
@click.option("--output", type=_PATH, default=Path("output"), show_default=True, help="Folder for the pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
def command(
    bundle: Path,
    prompts: Sequence[str],
    concepts: Sequence[Path],
    image: Path | None,
    mask: Path | None,
    sampler: str | None,
    engine: str,
    max_rows: int,
    words: Sequence[str],
    grid: Path | None,
    output: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Makes pictures from PROMPT... with the model in BUNDLE; {} in a prompt stands for each word in turn."""
    start = time.perf_counter()
    shared = {
        **settings,
        "sampler": None if sampler is None else Sampler(sampler),
        "image": None if image is None else read_image(image),
        "mask": None if mask is None else read_mask(mask),
    }
    loaded = [load_concept(file) for file in _concept_files(concepts)]
    words = words or [concept.token for concept in loaded]
    requests = [Request(prompt, **shared) for prompt in _filled(prompts, words, grid)]
    vectors = sum(max(map(len, concept.vectors.values())) for concept in loaded)
    model = Model.open(bundle, Backend(engine), capacity=max(DEFAULT_CAPACITY, vectors))
    for concept in loaded:
        model.load(concept)
    console = Console(stderr=True)
    batch = Batch(model, max_rows, listen=console.is_terminal)
    for request in requests:
        batch.add(request)
    sheet = None if grid is None else _grid(prompts, words, requests, model)
    opened = time.perf_counter()
    saved = _run(batch, output, model, console)
    images = [saved[key] for key in sorted(saved)]
    if grid is not None and sheet is not None:
        _save_grid(grid, sheet, images)
    report = {
        "images": images,
        "grid": None if grid is None else str(grid),
        "words": model.words,
        "engine": model.engine("denoise_step").backend,
        "digests": {name: graph.digest for name, graph in model.manifest.graphs.items()},
        "seconds": {
            "open": opened - start,
            "engines": model.opened,
            **batch.seconds,
            "total": time.perf_counter() - start,
        },
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "gpu_mib": model.gpu_mib,
    }
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for entry in images:
        click.echo(entry["file"])
    if grid is not None:
        click.echo(str(grid))


def _run(batch: Batch, output: Path, model: Model, console: Console) -> dict[tuple[int, int], dict[str, Any]]:
    """Steps the batch to its end; pictures are saved as they come. Raises the first failure, once all else is saved."""
    saved: dict[tuple[int, int], dict[str, Any]] = {}
    failures: list[OnewordError] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = len(batch)
        task = progress.add_task(f"{total} picture{'s' * (total > 1)}", total=None)
        steps: dict[tuple[int, int], tuple[int, int]] = {}
        while batch:
            for event in batch.step():
                match event:
                    case StepDone():
                        steps[event.id, event.index] = event.step, event.steps
                    case PictureDone():
                        entry = _save(event, output, model)
                        saved[event.id, event.index] = entry
                        if not console.is_terminal:
                            console.print(f"{len(saved)}/{total} {entry['file']}", markup=False, soft_wrap=True)
                    case Failed():
                        failures.append(event.error)
            progress.update(
                task, completed=sum(done for done, _ in steps.values()), total=sum(all for _, all in steps.values())
            )
    if failures:
        raise failures[0]
    return saved


def _save(event: PictureDone, output: Path, model: Model) -> dict[str, Any]:
    """Writes one picture under a name that is free, and says what it is."""
    text = parameters_text(event.request, event.settings, event.seed, Path(model.manifest.source.id).name)
    slug = re.sub(r"[\W_]+", "-", event.request.prompt).strip("-").lower()[:60] or "picture"
    path = output / f"{slug}-{event.seed}.png"
    for number in range(2, 100_000):
        if not path.exists():
            break
        path = output / f"{slug}-{event.seed}-{number}.png"
    save_png(event.image, path, text)
    return {
        "file": str(path),
        "prompt": event.request.prompt,
        "seed": event.seed,
        "width": event.settings.width,
        "height": event.settings.height,
        "parameters": text,
    }


def _filled(prompts: Sequence[str], words: Sequence[str], grid: Path | None) -> list[str]:
    """The prompts, each with every word in place of its {}. Raises UsageError where words or places for them lack."""
    places = [prompt for prompt in prompts if _PLACE in prompt]
    if places and not words:
        raise UsageError(f"no word is given for the {_PLACE} of {places[0][:80]!r}: give --word or --concept")
    if grid is not None and grid.suffix.lower() != ".png":
        raise UsageError(f"--grid {grid}, allowed is a file name that ends in .png")
    if grid is not None and 0 < len(places) < len(prompts):
        without = next(prompt for prompt in prompts if _PLACE not in prompt)
        raise UsageError(
            f"{without[:80]!r} has no {_PLACE}, others of this grid have: write it where words shall stand"
        )
    return [
        filled
        for prompt in prompts
        for filled in ([prompt.replace(_PLACE, word) for word in words] if _PLACE in prompt else [prompt])
    ]


def _grid(prompts: Sequence[str], words: Sequence[str], requests: Sequence[Request], model: Model) -> Grid:
    """A row for each prompt, its columns the words, and under each word the seeds. Raises UsageError if too large."""
    first, per_prompt = requests[0], len(requests) // len(prompts)
    settings = resolve(first, model.manifest)
    seeds = [f"seed {first.seed + i}" for i in range(first.num_images)] * per_prompt
    headings = [words, seeds] if _PLACE in prompts[0] else [seeds]
    return Grid(prompts, headings, len(seeds), (settings.width, settings.height))


def _save_grid(path: Path, grid: Grid, entries: Sequence[dict[str, Any]]) -> None:
    """One picture of all that were saved."""
    pictures = [read_image(Path(entry["file"])) for entry in entries]
    rows = [pictures[i : i + grid.count] for i in range(0, len(pictures), grid.count)]
    save_png(grid.draw(rows), path, entries[0]["parameters"])


def _concept_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and those in folders, in the order of their names."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise UsageError(f"the folder {path} holds no .safetensors file: give a learned word's file")
        files += found
    return files


def main() -> None:
    """The console script."""
    run_command(command, "ti-run")


if __name__ == "__main__":
    main()
