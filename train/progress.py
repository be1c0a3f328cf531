"""The progress of a run: a bar on a terminal, plain lines elsewhere and, optionally, TensorBoard logs.

Both functions yield a run's progress unchanged, so they can be nested.
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
    from oneword.train.learn import Progress


def show(run: Iterable[Progress], console: Console) -> Iterator[Progress]:
    """Shows loss, learning rate, likeness and the number of stopped words: a bar, or a line per tenth of the steps."""
    columns = (TextColumn("learning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Bar(*columns, TextColumn("{task.description}"), console=console, transient=True)
    smooth, likeness = math.nan, math.nan
    task: TaskID | None = None
    with bar if console.is_terminal else nullcontext():
        for progress in run:
            for note in progress.notes:
                console.print(f"note: {note}", markup=False, soft_wrap=True)
            losses = [loss for loss in progress.losses if math.isfinite(loss)]
            mean = sum(losses) / len(losses) if losses else smooth
            smooth = mean if math.isnan(smooth) else 0.9 * smooth + 0.1 * mean
            likenesses = [sheet.likeness for sheet in progress.sheets if sheet.likeness is not None]
            likeness = float(np.mean(likenesses)) if likenesses else likeness
            state = f"loss {smooth:.4f} learning rate {progress.learning_rate:.2g}"
            state += "" if math.isnan(likeness) else f" likeness {likeness:.3f}"
            if len(progress.stopped) > 1 and any(progress.stopped):
                state += f" stopped {sum(progress.stopped)} of {len(progress.stopped)}"
            if console.is_terminal:
                task = bar.add_task(state, total=progress.steps) if task is None else task
                bar.update(task, completed=progress.step, description=state)
            elif progress.step % max(1, progress.steps // 10) == 0:
                console.print(f"step {progress.step}/{progress.steps} {state}", markup=False, soft_wrap=True)
            yield progress


def log(run: Iterable[Progress], folder: Path, tokens: list[str]) -> Iterator[Progress]:
    """Writes TensorBoard logs to `folder`: loss, likeness and sheets of every word, and the learning rate."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackage("tensorboard", "tensorboard") from error
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise FileError(f"--tensorboard {folder}: {error.strerror or error}: give a writable folder") from error
    with writer:
        for progress in run:
            writer.add_scalar("learning_rate", progress.learning_rate, progress.step)
            for token, loss in zip(tokens, progress.losses, strict=True):
                if math.isfinite(loss):
                    writer.add_scalar(f"loss/{token}", loss, progress.step)
            for sheet in progress.sheets:
                writer.add_image(sheet.token, np.asarray(sheet.image()), sheet.step, dataformats="HWC")
                if sheet.likeness is not None:
                    writer.add_scalar(f"likeness/{sheet.token}", sheet.likeness, sheet.step)
            yield progress
