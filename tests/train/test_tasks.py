from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oneword.engines.errors import FileError, UsageError
from oneword.export.source import load_source
from oneword.train.learn import learn
from oneword.train.pictures import read_pictures
from oneword.train.recipe import Recipe, named_recipe
from oneword.train.tasks import Task, make_word, picture_size


def test_a_word_learned_twice_is_refused(folder: Path, tiny_model_dir: Path) -> None:
    tasks = [Task(folder, "<a>"), Task(folder, "<a>")]
    with pytest.raises(UsageError, match="<a> would be learned twice"):
        next(learn(tiny_model_dir, tasks, named_recipe("fast")))


def test_captions_replace_templates_and_must_contain_the_word(folder: Path, tiny_model_dir: Path) -> None:
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"the red <toy> number {path.stem}")
    task = Task(folder, "<toy>")
    source = load_source(tiny_model_dir)
    recipe = named_recipe("fast")
    word = make_word(source, task, read_pictures(folder, picture_size(source, recipe)), recipe, 0)
    assert word.captions == [f"the red {{}} number {i}" for i in range(5)]

    (folder / "3.txt").write_text("the red star")
    with pytest.raises(UsageError, match=r"3\.txt: the caption 'the red star' does not contain the word '<toy>'"):
        next(learn(tiny_model_dir, [Task(folder, "<toy>")], named_recipe("fast")))


@pytest.mark.parametrize("alpha", [False, True])
def test_a_picture_whose_mask_leaves_nothing_of_the_middle_is_refused(
    folder: Path, tiny_model_dir: Path, alpha: bool
) -> None:
    """White at the left end of a wide picture, which is cropped to the square in its middle."""
    mask = Image.new("L", (200, 64))
    mask.paste(255, (0, 0, 40, 64))
    wide = Image.effect_noise((200, 64), 60).convert("RGB")
    if alpha:
        wide.putalpha(mask)
    else:
        mask.save(folder / "wide.mask.png")
    wide.save(folder / "wide.png")

    with pytest.raises(
        FileError, match=r"wide\.png is transparent, or its mask black, in all of the part that is used"
    ):
        next(learn(tiny_model_dir, [Task(folder, "<toy>", "star")], named_recipe("fast")))


@pytest.mark.parametrize(("size", "side"), [(None, 64), (96, 96), (40, 40)])
def test_pictures_are_learned_at_the_recipes_size(
    folder: Path, tiny_model_dir: Path, size: int | None, side: int
) -> None:
    recipe, source = Recipe(size=size, crops=1, steps=1, batch_size=2), load_source(tiny_model_dir)
    pictures = read_pictures(folder, picture_size(source, recipe))

    moments = make_word(source, Task(folder, "<toy>"), pictures, recipe, 0).moments

    assert {picture.pixels.shape for picture in pictures} == {(side, side, 3)}
    assert [mean.shape for mean in moments.mean] == [(4, side // 8, side // 8)] * 10  # the crops too
    *_, last = learn(source, [Task(folder, "<toy>", "star")], recipe)
    assert last.step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 44}, "size is 44, but must be a multiple of 8 for "),
        ({"size": 40, "buckets": True}, "size is 40 with buckets, but must be a multiple of 16 for "),
    ],
)
def test_a_size_that_a_unet_cannot_take_is_refused(
    folder: Path, tiny_model_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        next(learn(tiny_model_dir, [Task(folder, "<toy>")], Recipe(**settings)))
