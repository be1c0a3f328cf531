"""The whole pipeline on the miniature: pictures -> ti-train -> ti-export -> ti-run -> one contact sheet.

    make demo        or, if it is installed:   python demo.py [--looks 0..11 0..11] [--model MODEL] [--output DIR]

It learns two looks that the miniature was never trained on, from five pictures each. It draws them on backgrounds, in
media and in styles that these pictures do not show, and both in one picture. Only the contact sheet is assembled here;
the commands a user would type do the work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from oneword.train.miniature.world import (
    BACKGROUNDS,
    HELD_OUT_LOOKS,
    STYLES,
    Look,
    Scene,
    Thing,
    render,
    with_article,
)

TOKENS = ("<toy>", "<gem>")
PHOTOGRAPHED = ("studio", "kitchen", "desert", "meadow", "brick")
ELSEWHERE = ("snow", "night", "sea", "forest", "sunset")
MEDIA = ("drawing", "icon", "painting")
SEED, GUIDANCE = 7, 4
FOLDERS = ("pictures", "more-pictures")
OUTPUTS = (*FOLDERS, "bundle", "generated")  # folders of an earlier demo, which are replaced

console = Console(stderr=True)


def main() -> int:
    """Learns, exports, generates, draws the sheet and reports the time per stage."""
    options = _options()
    output: Path = options.output
    looks = [HELD_OUT_LOOKS[number] for number in options.looks]
    if output.exists() and any(output.iterdir()) and not (output / "pictures").is_dir():
        raise SystemExit(f"{output} has files that are not from an earlier demo: give --output an empty or new folder")
    for part in OUTPUTS:
        shutil.rmtree(output / part, ignore_errors=True)
    stages = Stages()

    described = [with_article(look.words) for look in looks]
    with stages.timed("draw", f"{len(PHOTOGRAPHED)} pictures each of {' and '.join(described)}"):
        pictures = [
            draw_pictures(look, output / folder, 1000 + 100 * number)
            for number, (look, folder) in enumerate(zip(looks, FOLDERS, strict=True))
        ]
    words, bundle = [output / f"{token.strip('<>')}.safetensors" for token in TOKENS], output / "bundle"
    for word in words:
        word.unlink(missing_ok=True)
    outputs = [part for token, word in zip(TOKENS, words, strict=True) for part in ("--token", token, "--output", word)]
    stages.command(
        "learn", "ti-train", *(output / folder for folder in FOLDERS), "--model", options.model, *outputs,
        "--init", "auto", "--seed", SEED,
    )  # fmt: skip
    stages.command("export", "ti-export", options.model, bundle)
    groups = scenes()
    prompts = [prompt for rows in groups for _, row in rows for prompt in row]
    concepts = [part for word in words for part in ("--concept", word)]
    generated = stages.command(
        "generate", "ti-run", bundle, *prompts, *concepts, "--seed", SEED, "--guidance-scale", GUIDANCE,
        "--output", output / "generated", hidden=prompts[1:],
    )  # fmt: skip

    sheet = output / "contact-sheet.png"
    with stages.timed("sheet", str(sheet)):
        files = iter(Path(image["file"]) for image in generated["images"])
        learned_from = [
            [(f"{token}, learned from five pictures of {name}", [(path, path.stem) for path in paths])]
            for token, name, paths in zip(TOKENS, described, pictures, strict=True)
        ]
        rows = []
        for learned, drawn in zip([*learned_from, []], groups, strict=True):
            rows += [*learned, *((title, [(next(files), prompt) for prompt in row]) for title, row in drawn)]
        contact_sheet(rows).save(sheet)
    console.print(stages.table())
    console.print(f"Contact sheet: {sheet}", highlight=False)
    return 0


def draw_pictures(look: Look, folder: Path, seed: int) -> list[Path]:
    """Draws five photographs of the look, each on a different background."""
    folder.mkdir(parents=True)
    paths = []
    for i, background in enumerate(PHOTOGRAPHED):
        image, _ = render(Scene((Thing(look),), background), seed + i)
        paths.append(folder / f"{background}.png")
        Image.fromarray(image).save(paths[-1])
    return paths


Rows = list[tuple[str, list[str]]]
"""Titled rows of prompts."""


def scenes() -> tuple[Rows, Rows, Rows]:
    """What is drawn of the first word, of the second word and of both together; no picture of a word shows it."""
    toy, gem = TOKENS
    styles = [*STYLES][:2]
    places = [BACKGROUNDS[background].phrase for background in ("meadow", "night", "studio", "snow", "desert")]

    def elsewhere(token: str) -> tuple[str, list[str]]:
        prompts = [f"a photo of a {token} {BACKGROUNDS[background].phrase}" for background in ELSEWHERE]
        return f"{token} on backgrounds it was never seen on", prompts

    media = [f"{with_article(medium)} of a {toy} in the snow" for medium in MEDIA]
    media += [f"a {toy} in the meadow in the style of {name}" for name in styles]
    return (
        [elsewhere(toy), (f"{toy} in media and styles it was never seen in", media)],
        [elsewhere(gem)],
        [("both words in one prompt", [f"a photo of a {toy} and a {gem} {place}" for place in places])],
    )


@dataclass
class Stages:
    """Runs the stages, shows their command lines and records their times."""

    rows: list[tuple[str, float, str]] = field(default_factory=list)

    def timed(self, name: str, detail: str) -> _Timer:
        """A context manager that adds a row on exit."""
        return _Timer(self, name, detail)

    def command(self, name: str, *words: object, hidden: Sequence[str] = ()) -> Any:
        """Runs a command with --json, its progress on standard error. Exits if it fails.

        The command line is shown without the words in `hidden`, which are adjacent; their number is shown instead.
        """
        line = [str(word) for word in words]
        start = line.index(hidden[0]) if hidden else len(line)
        shown = [shlex.join(line[:start]), shlex.join(line[start + len(hidden) :])]
        text = f" ... ({len(hidden)} more prompts) ".join(shown) if hidden else shown[0]
        console.print(f"$ {text}", style="bold", soft_wrap=True, highlight=False, markup=False)
        with self.timed(name, line[0]):
            process = subprocess.run([_script(line[0]), *line[1:], "--json"], stdout=subprocess.PIPE, check=False)
        if process.returncode:
            raise SystemExit(process.returncode)
        return json.loads(process.stdout)

    def table(self) -> Table:
        """The time of each stage."""
        table = Table("stage", "detail", "seconds", title="time per stage, starting each command included")
        for name, seconds, detail in self.rows:
            table.add_row(name, detail, f"{seconds:.1f}")
        table.add_section()
        table.add_row("total", "", f"{sum(seconds for _, seconds, _ in self.rows):.1f}")
        return table


class _Timer:
    def __init__(self, stages: Stages, name: str, detail: str) -> None:
        self._stages, self._name, self._detail = stages, name, detail

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stages.rows.append((self._name, time.perf_counter() - self._start, self._detail))


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[Path, str]]]], zoom: int = 3) -> Image.Image:
    """Titled rows of captioned pictures as one picture."""
    cell, gap, line = 64 * zoom, 14, 16
    title_font, font = ImageFont.load_default(18), ImageFont.load_default(13)
    columns = max(len(row) for _, row in rows)
    row_height = 30 + cell + 2 * line + 2 * gap
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, row) in enumerate(rows):
        top = gap + i * row_height
        draw.text((gap, top), title, "black", title_font)
        for j, (path, caption) in enumerate(row):
            left = gap + j * (cell + gap)
            with Image.open(path) as picture:
                sheet.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), (left, top + 30))
            for k, text in enumerate(_wrap(caption, cell, draw, font)[:2]):
                draw.text((left, top + 34 + cell + k * line), text, (60, 60, 60), font)
    return sheet


def _wrap(text: str, width: int, draw: ImageDraw.ImageDraw, font: Any) -> list[str]:
    """Wraps text into as few lines of at most `width` pixels as possible."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _script(name: str) -> Path:
    """The path of a command, installed beside the running Python."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise SystemExit(f"{name} is not installed in {sys.prefix}: run make demo, or pip install -e '.[cpu,train]'")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(len(HELD_OUT_LOOKS))
    parser.add_argument("--looks", type=int, nargs=2, default=(0, 3), choices=numbers, help="two held-out looks")
    parser.add_argument("--model", default="miniature", help="a diffusers directory trained on the same world")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all output")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
