"""`ti-run`: pictures from prompts. A thin skin over `Scheduler`."""

import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from oneword.engines.errors import FileError, OnewordError, UsageError, counted, one_line
from oneword.runtime.commands import (
    HELP,
    PATH,
    ProgressBar,
    engine_option,
    json_option,
    load_concepts,
    print_json,
    refuse_file,
    run_command,
    size,
    version_option,
)
from oneword.runtime.drawing import scheduler_for
from oneword.runtime.events import Failed, PictureDone, StepDone
from oneword.runtime.grid import Grid
from oneword.runtime.images import read_image, read_mask, save_png
from oneword.runtime.model import Model
from oneword.runtime.request import Request, resolve
from oneword.runtime.samplers import Guidance, Sampler
from oneword.runtime.scheduler import MAX_ROWS, Scheduler
from oneword.runtime.spacing import Spacing

_PLACE = "{}"
_SLUG_BYTES = 200  # of a file's name, which may have 255 in most file systems
_BUNDLES = "the bundle's"


@click.command(name="ti-run", context_settings=HELP)
@version_option
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option(
    "--concept",
    "concepts",
    type=PATH,
    multiple=True,
    help="File of a learned word, or a folder of them; may be repeated.",
)
@click.option("--negative-prompt", help="What to avoid.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first picture; picture i uses seed + i."
)
@click.option("--num-images", type=int, default=1, show_default=True, help="Pictures per prompt.")
@click.option("--steps", type=int, show_default=_BUNDLES, help="Denoising steps.")
@click.option(
    "--sampler",
    type=click.Choice([sampler.value for sampler in Sampler]),
    show_default=_BUNDLES,
    help="How each step removes noise.",
)
@click.option(
    "--spacing",
    type=click.Choice([spacing.value for spacing in Spacing]),
    show_default="the scheduler config's",
    help="Where the steps are.",
)
@click.option(
    "--guidance",
    type=click.Choice([guidance.value for guidance in Guidance]),
    default=Guidance.CFG.value,
    show_default=True,
    help="How the prompt's weight is applied; the scale of cfg++ is 0 to 2.",
)
@click.option(
    "--guidance-scale",
    type=float,
    show_default=f"{_BUNDLES}; 0.6 with cfg++",
    help="Weight of the prompt; 0 to 1 means no guidance, except with cfg++.",
)
@click.option(
    "--embedded-guidance",
    type=float,
    show_default=_BUNDLES,
    help="Guidance scale that a guidance-distilled model, such as FLUX.1 dev, takes as an input.",
)
@click.option("--guidance-rescale", type=float, default=0.0, show_default=True, help="Reduces overexposure, 0 to 1.")
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    show_default="all steps",
    help="Guide only steps with a noise level above LOW and at most HIGH. It is sigma / alpha; SD 1.5's falls from at "
    "most 14.6 to 0.",
)
@click.option("--eta", type=float, default=0.0, show_default=True, help="Noise added in each step, 0 to 1; DDIM only.")
@click.option(
    "--clip-skip",
    type=int,
    default=0,
    show_default=True,
    help="Number of the text encoder's last layers to skip, 1 for A1111's 2.",
)
@click.option("--size", type=size, metavar="WxH", show_default="--image's, else the bundle's", help="Size in pixels.")
@click.option("--image", type=PATH, help="A picture to start from.")
@click.option("--strength", type=float, help="How much to change --image, 0 to 1; needs --image.  [default: 0.8]")
@click.option("--mask", type=PATH, help="A picture of --image's size: white marks the area to regenerate.")
@click.option(
    "--paste/--no-paste", default=True, show_default=True, help="Keep --image's pixels where --mask is black."
)
@click.option(
    "--draft",
    is_flag=True,
    help="Decode with the bundle's preview decoder (ti-export --preview): faster, less exact.",
)
@engine_option
@click.option(
    "--max-rows", type=click.IntRange(1), default=MAX_ROWS, show_default=True, help="Maximum pictures per batch."
)
@click.option(
    "--word",
    "words",
    multiple=True,
    show_default="the words of every --concept",
    help="Replaces {} in the prompts, which must contain it; may be repeated, one picture per word.",
)
@click.option(
    "--grid", type=PATH, metavar="FILE.png", help="Also save all pictures in one grid: prompts by words and seeds."
)
@click.option(
    "--output",
    type=PATH,
    default=Path("output"),
    show_default=True,
    help="Folder for the pictures; existing ones are kept.",
)
@json_option
def command(
    bundle: Path,
    prompts: Sequence[str],
    concepts: Sequence[Path],
    image: Path | None,
    strength: float | None,
    mask: Path | None,
    engine: str,
    max_rows: int,
    words: Sequence[str],
    grid: Path | None,
    output: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate pictures from PROMPT... with the model in BUNDLE.

    {} in a prompt stands for each --word in turn, by default for each learned word.
    """
    start = time.perf_counter()
    if strength is not None and image is None:
        raise UsageError("--strength needs --image, the picture to start from")
    if words and not any(_PLACE in prompt for prompt in prompts):
        raise UsageError(f"--word needs {_PLACE} in a prompt, as in 'a photo of a {_PLACE}'")
    refuse_file("--output", output)
    shared = {
        **settings,
        **({} if strength is None else {"strength": strength}),
        "image": None if image is None else read_image(image),
        "mask": None if mask is None else read_mask(mask),
    }
    loaded = load_concepts(_concept_files(concepts))
    words = words or [concept.token for concept in loaded]
    requests = [Request(prompt, **shared) for prompt in _filled(prompts, words, grid)]
    model = Model.open(bundle, engine, concepts=loaded)
    sheet = None if grid is None else _grid(prompts, words, requests, model)
    opened = time.perf_counter()
    scheduler = scheduler_for(model, requests, max_rows)
    count = len(scheduler)
    try:
        with ProgressBar(counted(count, "picture"), unit="step") as progress:
            images, failed = _generate(scheduler, requests, output, progress)
    finally:
        model.stop_opening()
    files = [entry["file"] for entry in images]
    saved_grid, grid_error = None, None
    if grid is not None and sheet is not None and not failed:
        try:
            _save_grid(grid, sheet, images)
            saved_grid = str(grid)
            files.append(saved_grid)
        except OnewordError as error:  # raised once the pictures, which are saved, have been listed
            grid_error = error
    report = {
        "images": images,
        "failed": failed,
        "grid": saved_grid,
        "words": model.words,
        "engine": model.engine("denoise_step").backend if "denoise_step" in model.opened else None,
        "engine_choice": model.backend_reason or None,
        "digests": {name: graph.digest for name, graph in model.manifest.graphs.items()},
        "seconds": {
            "open": opened - start,
            "engines": model.opened,
            **scheduler.seconds,
            "total": time.perf_counter() - start,
        },
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10),
        "gpu_mib": model.gpu_mib,
    }
    if as_json:
        print_json(report)
    else:
        for file in files:
            click.echo(file)
    if failed:
        suffix = f" (and {len(failed) - 1} more of {count} pictures failed)" if len(failed) > 1 else ""
        raise OnewordError(f"{failed[0]['error']}{suffix}")
    if grid_error is not None:
        raise grid_error


def _generate(
    scheduler: Scheduler, requests: Sequence[Request], output: Path, progress: ProgressBar
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs the scheduler to its end. Returns the report's entries of saved and failed pictures, in request order.

    Each picture is saved when it is done. If one cannot be saved, the remaining ones are cancelled.
    """
    keys = [(id, index) for id, request in enumerate(requests) for index in range(request.num_images)]
    saved: dict[tuple[int, int], dict[str, Any]] = {}
    errors: dict[tuple[int, int], OnewordError] = {}
    counts = [resolve(request, scheduler.model.manifest).schedule.steps for request in requests]
    done, total = dict.fromkeys(keys, 0), sum(counts[id] for id, _ in keys)
    progress.update(completed=0, total=total)
    while scheduler:
        for event in scheduler.step(1 if progress.on_terminal else None):
            key = event.id, event.index
            match event:
                case StepDone():
                    done[key] = event.step
                case Failed():
                    errors[key] = event.error
                    done[key] = counts[event.id]
                case PictureDone():
                    try:
                        saved[key] = _save(event, output)
                        progress.line(f"{len(saved)}/{len(keys)} {saved[key]['file']}")
                    except FileError as error:
                        errors = dict.fromkeys(keys, error) | errors
                        scheduler.cancel_all()
        progress.update(completed=sum(done.values()), total=total)
    failed = [
        {"prompt": requests[id].prompt, "seed": requests[id].seed + index, "error": one_line(errors[id, index], None)}
        for id, index in keys
        if (id, index) not in saved
    ]
    return [saved[key] for key in keys if key in saved], failed


def _save(event: PictureDone, output: Path) -> dict[str, Any]:
    """Writes one picture under an unused name and returns its entry in the report. Raises FileError."""
    slug = re.sub(r"[\W_]+", "-", event.request.prompt).strip("-").lower()[:60]
    slug = slug.encode()[:_SLUG_BYTES].decode(errors="ignore") or "picture"
    path = output / f"{slug}-{event.seed}.png"
    for number in range(2, 100_000):
        if not path.exists():
            break
        path = output / f"{slug}-{event.seed}-{number}.png"
    event.save(path)
    return {
        "file": str(path),
        "prompt": event.request.prompt,
        "seed": event.seed,
        "width": event.settings.width,
        "height": event.settings.height,
        "parameters": event.parameters,
    }


def _filled(prompts: Sequence[str], words: Sequence[str], grid: Path | None) -> list[str]:
    """The prompts, each with every word in place of its {}. Raises UsageError if {} or the words are missing."""
    templates = [prompt for prompt in prompts if _PLACE in prompt]
    if templates and not words:
        raise UsageError(f"no word is given for the {_PLACE} of {templates[0][:80]!r}: add --word or --concept")
    if grid is not None and grid.suffix.lower() != ".png":
        raise UsageError(f"--grid is {grid}, but must end in .png")
    if grid is not None and 0 < len(templates) < len(prompts):
        plain = next(prompt for prompt in prompts if _PLACE not in prompt)
        raise UsageError(
            f"{plain[:80]!r} has no {_PLACE}, other prompts of this grid do: write {_PLACE} where the words should be"
        )
    return [
        filled
        for prompt in prompts
        for filled in ([prompt.replace(_PLACE, word) for word in words] if _PLACE in prompt else [prompt])
    ]


def _grid(prompts: Sequence[str], words: Sequence[str], requests: Sequence[Request], model: Model) -> Grid:
    """A grid with a row per prompt and a column per word and seed. Raises UsageError if it is too large."""
    first, per_prompt = requests[0], len(requests) // len(prompts)
    settings = resolve(first, model.manifest)
    seeds = [f"seed {first.seed + i}" for i in range(first.num_images)] * per_prompt
    headings = [words, seeds] if _PLACE in prompts[0] else [seeds]
    return Grid(prompts, headings, len(seeds), (settings.width, settings.height))


def _save_grid(path: Path, grid: Grid, entries: Sequence[dict[str, Any]]) -> None:
    """Saves all pictures as one."""
    pictures = [read_image(Path(entry["file"])) for entry in entries]
    rows = [pictures[i : i + grid.count] for i in range(0, len(pictures), grid.count)]
    save_png(grid.draw(rows), path, entries[0]["parameters"])


def _concept_files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the files in given folders, sorted by name."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        in_folder = sorted(path.glob("*.safetensors"))
        if not in_folder:
            raise UsageError(f"the folder {path} holds no .safetensors file: pass the file of a learned word")
        files += in_folder
    return files


def main() -> None:
    """The console script."""
    run_command(command, "ti-run")


if __name__ == "__main__":
    main()
