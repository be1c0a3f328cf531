from pathlib import Path

import pytest

from oneword.engines.errors import UsageError
from oneword.export.source import load_source
from oneword.train.learn import learn
from oneword.train.pictures import read_pictures
from oneword.train.recipe import named_recipe
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
    word = make_word(source, task, read_pictures(folder, picture_size(source)), named_recipe("fast"), 0)
    assert word.captions == [f"the red {{}} number {i}" for i in range(5)]

    (folder / "3.txt").write_text("the red star")
    with pytest.raises(UsageError, match=r"3\.txt: the caption 'the red star' does not contain '<toy>'"):
        next(learn(tiny_model_dir, [Task(folder, "<toy>")], named_recipe("fast")))
