import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from oneword.train.learn import Progress
from oneword.train.preview import Sheet
from oneword.train.progress import log, show

SHEET = Sheet("<a>", 2, {"a photo of a <a>": np.full((2, 8, 8, 3), 128, np.uint8)}, 0.75)
RUN = [
    Progress(1, 2, [0.5, 0.25], 0.1, [False, False], ["a note"]),
    Progress(2, 2, [0.4, math.nan], 0.05, [False, True], sheets=[SHEET]),
]


def printed(*, terminal: bool) -> str:
    out = io.StringIO()
    assert list(show(RUN, Console(file=out, force_terminal=terminal, width=200))) == RUN
    return out.getvalue()


def test_without_a_terminal_there_are_plain_lines() -> None:
    """The loss is the words' mean, smoothed with nine tenths of the previous value: 0.375, 0.3775."""
    assert printed(terminal=False).splitlines() == [
        "note: a note",
        "step 1/2 loss 0.3750 learning rate 0.1",
        "step 2/2 loss 0.3775 learning rate 0.05 likeness 0.750 stopped 1 of 2",
    ]


def test_on_a_terminal_the_bar_shows_loss_likeness_and_stopped_words() -> None:
    assert "loss 0.3775 learning rate 0.05 likeness 0.750 stopped 1 of 2" in printed(terminal=True)


def test_tensorboard_logs_have_every_words_numbers_and_sheets(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    assert list(log(RUN, tmp_path, ["<a>", "<b>"])) == RUN

    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    numbers = {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert numbers == {
        "learning_rate": [(1, 0.1), (2, 0.05)],
        "loss/<a>": [(1, 0.5), (2, 0.4)],
        "loss/<b>": [(1, 0.25)],
        "likeness/<a>": [(2, 0.75)],
    }
    assert [(image.step, image.width, image.height) for image in events.Images("<a>")] == [(2, 16, 8)]
