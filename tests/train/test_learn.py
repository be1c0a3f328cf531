from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from oneword.engines.errors import UsageError
from oneword.export.source import load_source
from oneword.train.initial import initial_rows, token_ids
from oneword.train.learn import learn
from oneword.train.recipe import named_recipe
from oneword.train.tasks import Task


def test_learning_uses_pictures_of_many_shapes_crops_and_mirror_images(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for i, size in enumerate([(64, 64), (200, 100), (90, 160)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "many" / f"{i}.png")
    recipe = named_recipe("fast").with_changes(steps=2, batch_size=6, buckets=True, crops=1, flip=True)

    *_, last = learn(tiny_model_dir, [Task(tmp_path / "many", "<toy>", "star")], recipe)

    (concept,) = last.concepts
    start = initial_rows(load_source(tiny_model_dir), "star", 1, 0)["text_encoder"]
    assert np.abs(concept.vectors["text_encoder"] - start.numpy()).max() > 1e-4


def test_words_are_shown_at_chosen_steps_also_when_a_run_resumes_there(
    folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    task, recipe = Task(folder, "<toy>", "star"), named_recipe("fast").with_changes(steps=4, batch_size=2)
    options = {"checkpoints": tmp_path / "run", "checkpoint_every": 1, "words_after": (0, 2, 4)}

    whole = list(learn(tiny_model_dir, [task], recipe, words_after=(0, 2, 4)))
    run = learn(tiny_model_dir, [task], recipe, **options)
    for progress in run:
        if progress.step == 2:
            break
    run.close()
    resumed = list(learn(tiny_model_dir, [task], recipe, **options))

    shown = {progress.step: progress.words[0].vectors["text_encoder"] for progress in whole if progress.words}
    assert list(shown) == [0, 2, 4]
    np.testing.assert_array_equal(
        shown[0], initial_rows(load_source(tiny_model_dir), "star", 1, 0)["text_encoder"].numpy()
    )
    np.testing.assert_array_equal(shown[4], whole[-1].concepts[0].vectors["text_encoder"])
    assert [progress.step for progress in resumed] == [2, 3, 4]
    assert ({progress.start for progress in whole}, {progress.start for progress in resumed}) == ({0}, {2})
    for progress in (resumed[0], resumed[-1]):
        np.testing.assert_array_equal(progress.words[0].vectors["text_encoder"], shown[progress.step])


def test_warnings_are_reported_at_the_first_step(folder: Path, tiny_model_dir: Path) -> None:
    for name in ("2", "3", "4"):
        (folder / f"{name}.png").unlink()
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "5.HEIC").write_bytes(b"from a phone")

    first = next(
        learn(tiny_model_dir, [Task(folder, "<toy>", "zebra")], named_recipe("fast").with_changes(batch_size=2))
    )

    assert "has 2 pictures: three to five are usual" in first.notes[0]
    assert "skipped 5.HEIC" in first.notes[1]
    assert "convert to PNG or JPEG" in first.notes[1]
    assert "0.png and 1.png" in first.notes[2]
    count = len(token_ids(load_source(tiny_model_dir).tokenizers["text_encoder"], "zebra"))
    assert first.notes[3] == (
        f"init 'zebra' is {count} tokens in this model, so their mean is used; a common word works better "
        "(check the spelling)"
    )


def test_a_word_starts_from_a_concept_and_a_run_whose_concept_changed_is_refused(
    folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    start = tmp_path / "start.safetensors"
    save_file({"<start>": torch.from_numpy(rows)}, start)
    source = load_source(tiny_model_dir)
    for vectors, expected in ((2, rows), (3, rows[[0, 1, 1]])):
        np.testing.assert_array_equal(initial_rows(source, str(start), vectors, 0)["text_encoder"], expected)

    task = Task(folder, "<toy>", str(start))
    recipe = named_recipe("fast").with_changes(steps=3, batch_size=2, vectors=2)
    run = learn(tiny_model_dir, [task], recipe, checkpoints=tmp_path / "run", checkpoint_every=1)
    next(run)
    run.close()
    save_file({"<start>": torch.from_numpy(rows + 1)}, start)
    with pytest.raises(UsageError, match="init of word 1"):
        next(learn(tiny_model_dir, [task], recipe, checkpoints=tmp_path / "run"))


def test_a_word_that_settles_is_named_and_has_its_own_steps(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two words whose probe losses count as settled at their third and at their fifth step."""
    settled = {3: iter([True, False]), 5: iter([True])}
    monkeypatch.setattr(
        "oneword.train.learner.has_settled", lambda losses, _: next(settled.get(len(losses), iter([False])), False)
    )
    tasks = [Task(folder, "<a>", "star"), Task(folder, "<b>", "ring")]
    recipe = named_recipe("fast").with_changes(steps=400, batch_size=1, stop_below=0.5)

    run = list(learn(tiny_model_dir, tasks, recipe))

    assert "<a> has settled: it stopped at step 3" in run[2].notes
    assert "<b> has settled: it stopped at step 5" in run[-1].notes
    assert sum("settled" in note for progress in run for note in progress.notes) == 2
    assert [concept.provenance["steps"] for concept in run[-1].concepts] == ["3", "5"]
    assert [len(losses) for losses in run[-1].history] == [3, 5]
