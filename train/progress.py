"""A run shown while it goes: a bar on a terminal, plain lines elsewhere, TensorBoard's logs for who wants them.

Both functions pass a run's progress on as it comes, so that they can stand around one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from oneword.engines.errors import FileError, MissingPackage

if TYPE_CHECKING:
    from oneword.train.run import Progress


def show(run: Iterable[Progress], console: Console) -> Iterator[Progress]:
    """A bar with loss, rate, likeness and the words that have stopped; a line every tenth of the way elsewhere."""
    columns = (TextColumn("learning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Bar(*columns, TextColumn("{task.description}"), console=console, transient=True)
    smooth, seen = math.nan, math.nan
    shown: TaskID | None = None
    with bar if console.is_terminal else nullcontext():
        for progress in run:
            for note in progress.notes:
                console.print(f"note: {note}", markup=False, soft_wrap=True)
            now = [loss for loss in progress.losses if math.isfinite(loss)]
            mean = sum(now) / len(now) if now else smooth
            smooth = mean if math.isnan(smooth) else 0.9 * smooth + 0.1 * mean
            judged = [sheet.likeness for sheet in progress.sheets if sheet.likeness is not None]
            seen = float(np.mean(judged)) if judged else seen
            state = f"loss {smooth:.4f} rate {progress.learning_rate:.2g}"
            state += "" if math.isnan(seen) else f" likeness {seen:.3f}"
            if len(progress.stopped) > 1 and any(progress.stopped):
                state += f" stopped {sum(progress.stopped)} of {len(progress.stopped)}"
            if console.is_terminal:
                shown = bar.add_task(state, total=progress.steps) if shown is None else shown
                bar.update(shown, completed=progress.step, description=state)
            elif progress.step % max(1, progress.steps // 10) == 0:
                console.print(f"step {progress.step}/{progress.steps} {state}", markup=False, soft_wrap=True)
            yield progress


def log(run: Iterable[Progress], folder: Path, tokens: list[str]) -> Iterator[Progress]:
    """TensorBoard's logs in `folder`: loss, likeness and sheets of every word, and the rate."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackage("tensorboard", "tensorboard") from error
    try:
        opened = SummaryWriter(str(folder))
    except OSError as error:
        raise FileError(
            f"--tensorboard {folder}: {error.strerror or error}: give a folder that can be written"
        ) from error
    with opened as writer:
        for progress in run:
            writer.add_scalar("rate", progress.learning_rate, progress.step)
            for token, loss in zip(tokens, progress.losses, strict=True):
                if math.isfinite(loss):
                    writer.add_scalar(f"loss/{token}", loss, progress.step)
            for sheet in progress.sheets:
                writer.add_image(sheet.token, np.asarray(sheet.image()), sheet.step, dataformats="HWC")
                if sheet.likeness is not None:
                    writer.add_scalar(f"likeness/{sheet.token}", sheet.likeness, sheet.step)
            yield progress
