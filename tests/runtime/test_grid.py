"""Labelled grids of pictures."""

import time

import numpy as np
import pytest

from oneword.engines.errors import UsageError
from oneword.runtime.grid import labelled_grid
from oneword.runtime.request import Image

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (9, 9, 99), (99, 9, 9)]


def flat(colour: tuple[int, int, int], height: int = 64, width: int = 48) -> Image:
    return np.full((height, width, 3), colour, np.uint8)


def boxes(grid: Image, colours: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of each colour's area, which must be a filled rectangle."""
    areas = []
    for colour in colours:
        ys, xs = np.nonzero((grid == np.array(colour)).all(-1))
        box = (ys.min(), xs.min(), np.ptp(ys) + 1, np.ptp(xs) + 1)
        assert len(ys) == box[2] * box[3]
        areas.append(tuple(map(int, box)))
    return areas


def test_every_picture_is_in_its_row_and_column() -> None:
    pictures = [[flat(COLOURS[4 * i + j]) for j in range(4)] for i in range(2)]

    grid = labelled_grid(pictures, ["a photo", "a drawing"], [["<toy>", "<cat>"], ["7", "8", "7", "8"]], smallest=100)

    areas = boxes(grid, COLOURS)
    assert {box[2:] for box in areas} == {(128, 96)}  # enlarged twice: the longer side has at least 100 pixels
    tops, lefts = [box[0] for box in areas], [box[1] for box in areas]
    assert len(set(tops[:4])) == len(set(tops[4:])) == 1
    assert tops[4] >= tops[0] + 128
    assert lefts[:4] == lefts[4:] == sorted(set(lefts[:4]))
    assert np.diff(lefts[:4]).min() > 96


def ink(area: Image) -> int:
    return int((area < 128).all(-1).sum())


def test_labels_are_beside_rows_and_above_columns() -> None:
    grid = labelled_grid([[flat(COLOURS[0]), flat(COLOURS[1])]], ["a photo"], [["<toy>", ""]], smallest=1)

    (top, left, height, width), (_, second, _, _) = boxes(grid, COLOURS[:2])
    assert ink(grid[top : top + height, :left]) > 20
    assert ink(grid[:top, left : left + width]) > 20
    assert ink(grid[:top, second:]) == 0


def test_a_long_label_is_wrapped_and_the_row_grows() -> None:
    label = " ".join(["a photo of a red star"] * 20) + " " + "x" * 300
    grid = labelled_grid([[flat(COLOURS[0])], [flat(COLOURS[1])]], [label, ""], [], smallest=1)

    (top, left, _, _), (second, _, _, _) = boxes(grid, COLOURS[:2])
    assert left <= 340
    assert second > top + 300  # below the label's many lines
    assert ink(grid[top:second, left - 8 : left]) == 0  # which end before the picture


@pytest.mark.parametrize("label", ["图" * 2000, "x" * 2000])
def test_a_long_label_without_spaces_is_wrapped_in_little_time(label: str) -> None:
    """Chinese and Japanese prompts have none. Measuring every beginning of every line took three minutes."""
    start = time.process_time()
    grid = labelled_grid([[flat(COLOURS[0])]], [label], [], smallest=1)
    assert time.process_time() - start < 5

    [(_, left, _, _)] = boxes(grid, COLOURS[:1])
    assert left <= 340
    assert len(grid) > 17 * 2000 // (320 // 5)  # lines of 17 pixels, of at most 64 letters, which have 5 or more


def test_a_grid_without_labels_has_only_pictures() -> None:
    assert labelled_grid([[flat(COLOURS[0], 64, 64)]], [""], [[""]], smallest=1).shape == (64 + 16, 64 + 16, 3)


@pytest.mark.parametrize(
    ("pictures", "rows", "columns", "message"),
    [
        ([[flat(COLOURS[0])], []], ["a", "b"], [], "not a table"),
        ([[flat(COLOURS[0])]], ["a", "b"], [], "not a table"),
        ([], [], [], "not a table"),
        ([[flat(COLOURS[0])] * 4], ["a"], [["1", "2", "3"]], "do not share 4 columns evenly"),
        ([[flat(COLOURS[0], 512, 512)] * 300], ["a"], [], "but may have at most 67108864: "),
    ],
)
def test_an_invalid_grid_is_refused(
    pictures: list[list[Image]], rows: list[str], columns: list[list[str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        labelled_grid(pictures, rows, columns)
