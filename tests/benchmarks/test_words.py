"""What `benchmarks.words` reads from real renders, and its table, from measurements made up here."""

from argparse import Namespace

import numpy as np

from benchmarks import words
from oneword.export.source import find_model
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import world

LOOK = world.Look("star", "red", "white", "dots")


def test_real_renders_are_right_and_what_differs_in_others_is_wrong() -> None:
    judge = Judge(find_model("miniature")[0] / "judge")
    renders = words.draw(LOOK, words.NEW, 3)

    hits = words.read(judge, renders, LOOK)
    of_another = words.read(judge, renders, world.Look("moon", "red", "blue", "stripes"))
    elsewhere = words.read(judge, np.roll(renders, 1, axis=0), LOOK)

    assert list(hits) == [*words.ATTRIBUTES]
    assert words.all_right(hits) >= 5 / 6  # no reader is perfect
    assert not any(of_another["shape"] + of_another["second colour"] + of_another["pattern"])
    assert all(of_another["background"])
    assert not any(elsewhere["background"])


def test_all_must_be_right_in_the_same_picture() -> None:
    assert words.all_right({"shape": [True, True, False, True], "pattern": [True, False, True, True]}) == 0.5


def test_the_table_compares_words_with_their_captions_and_marks_what_misses_its_target() -> None:
    row = {"seconds": 5.0, "passes": 80.0, "likeness": 0.98, "caption": 0.9, **dict.fromkeys(words.ATTRIBUTES, 0.95)}
    rows = [{**row, "right": 0.9}, {**row, "right": 0.8, "seconds": 9.0, "passes": 120.0}]

    text = words.summary({**words.means(rows), "together_dB": 44.0}, Namespace(recipe="quick", guidance=4.0, looks=2))

    assert "| likeness to the five pictures, relative to other renders | at least 0.97 | 0.98 |" in text
    assert "relative to the true captions | at least 0.97 | **0.9444** |" in text
    assert "| learning in passes of the UNet over 8 pictures, median | at most 90 | **100** |" in text
    assert "worst, dB | at least 45 | **44** |" in text
    assert "| all right: words, captions |  | 85.0%, 90.0% |" in text
    assert "| seconds per word, mean and slowest |  | 7, 9 |" in text


def test_a_narrow_miss_of_a_target_differs_from_it_in_the_table() -> None:
    row = {"seconds": 5.0, "caption": 1.0, **dict.fromkeys(words.ATTRIBUTES, 1.0)}
    missed = {**row, "likeness": 0.9697, "right": 0.9697, "passes": 90.4}
    met = {**row, "likeness": 0.97, "right": 0.97, "passes": 90.0}
    options = Namespace(recipe="quick", guidance=4.0, looks=1)

    bold = words.summary({**words.means([missed]), "together_dB": 44.96}, options)
    plain = words.summary({**words.means([met]), "together_dB": 45.0}, options)

    assert bold.count("| at least 0.97 | **0.9697** |") == 2
    assert "| at most 90 | **90.4** |" in bold
    assert "| at least 45 | **44.96** |" in bold
    assert "**" not in plain
