"""Sample sheets of words during learning, drawn by the runtime over the torch modules that are exported as graphs.

A sheet shows what the exported bundle would draw with the same seeds, except that the network uses the number type it
learns with. Sampling does not touch learning's random numbers, so a run with sheets has the bits of one without.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from oneword.engines.errors import FileError
from oneword.engines.files import write_whole
from oneword.export.eager import eager_model
from oneword.export.source import Source
from oneword.runtime.concept import Concept
from oneword.train.evaluation.evaluate import Pictures, sample
from oneword.train.evaluation.judge import Judge
from oneword.train.evaluation.prompts import PLACE
from oneword.train.evaluation.scores import likeness
from oneword.train.pictures import Picture

SAMPLES = 4  # per prompt
STEPS = 20
SHEET = re.compile(r"step-([0-9]{6,7})\.png")


@dataclass(frozen=True)
class Sheet:
    """A word's samples after `step`: `pictures` [N, H, W, 3] by prompt.

    `likeness` is the mean cosine between the first prompt's samples and the training pictures; None without a judge.
    """

    token: str
    step: int
    pictures: Mapping[str, Pictures]
    likeness: float | None

    def image(self) -> Image.Image:
        """The samples as one picture, one row per prompt."""
        return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in self.pictures.values()]))


class Previewer:
    """Draws sheets with a source's current modules, and judges them if the source comes with a CLIP model."""

    def __init__(self, source: Source, prompts: Sequence[str], seed: int = 0) -> None:
        self.model = eager_model(source)
        self.prompts = prompts
        self.seed = seed
        judge = source.path / "judge"
        self.judge = Judge(judge) if judge.is_dir() else None

    def sheet(self, concept: Concept, step: int, training: Sequence[Picture]) -> Sheet:
        """Draws the word as it is now. Raises what the runtime raises."""
        texts = [prompt.replace(PLACE, concept.token) for prompt in self.prompts]
        self.model.load(concept)
        try:
            pictures = dict(zip(texts, sample(self.model, texts, SAMPLES, STEPS, self.seed), strict=True))
        finally:
            self.model.unload(concept.token)
        if self.judge is None:
            return Sheet(concept.token, step, pictures, None)
        embedded = self.judge.pictures([picture.pixels for picture in training])
        return Sheet(concept.token, step, pictures, likeness(self.judge.pictures(pictures[texts[0]]), embedded))


class SheetFolders:
    """Where a run's sheets are saved: `step-000050.png` and so on in one folder per word, by token."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = folders

    def forget(self) -> None:
        """Deletes the sheets of an earlier run."""
        for folder in self.folders.values():
            for old in _saved(folder).values():
                old.unlink()

    def keep(self, sheet: Sheet) -> None:
        """Writes a sheet atomically. Raises `FileError`."""
        folder, out = self.folders[sheet.token], io.BytesIO()
        sheet.image().save(out, "PNG")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot create the folder {folder}: {error.strerror}") from error
        write_whole(folder / f"step-{sheet.step:06d}.png", out.getvalue())

    def images(self, token: str) -> dict[int, Image.Image]:
        """A word's saved sheets, by step."""
        sheets = _saved(self.folders[token])
        return {step: Image.open(io.BytesIO(path.read_bytes())) for step, path in sheets.items()}


def _saved(folder: Path) -> dict[int, Path]:
    """The sheets in a folder, by step, in order; other files in it are the user's."""
    sheets = [(int(name[1]), path) for path in folder.glob("*.png") if (name := SHEET.fullmatch(path.name))]
    return dict(sorted(sheets))
