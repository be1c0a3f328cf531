import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oneword.engines.errors import UsageError
from oneword.export.source import load_source
from oneword.runtime.concept import load_concept
from oneword.train.cli import main
from oneword.train.miniature import world
from oneword.train.pictures import read_pictures
from oneword.train.recipe import named_recipe
from oneword.train.run import Task, initial_rows, learn, make_word, picture_size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of a look, as PNG."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, background in enumerate(list(world.BACKGROUNDS)[:5]):
        pixels, _ = world.render(world.Scene((world.Thing(world.HELD_OUT_LOOKS[0]),), background), i)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def command(folder: Path, model: Path, output: Path, *more: str) -> list[str]:
    learn_it = [str(folder), "--model", str(model), "--token", "<toy>", "--init", "star", "--output", str(output)]
    return [*learn_it, "--steps", "3", "--batch-size", "2", *more]


def test_the_command_writes_a_concept_and_says_what_it_did(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "toy.safetensors"

    status = main(command(folder, tiny_model_dir, output, "--json", "--seed", "5"))

    told = capsys.readouterr()
    assert status == 0, told.err
    report = json.loads(told.out)
    assert report["steps"] == 3
    assert report["concepts"][0]["output"] == str(output)
    assert "step 3/3 loss" in told.err
    concept = load_concept(output)
    assert concept.token == "<toy>"
    assert concept.vectors["text_encoder"].shape == (1, 32)
    with safe_open(output, "numpy") as file:  # as diffusers reads it
        assert list(file.keys()) == ["<toy>"]
        metadata = file.metadata()
    assert metadata["base_model"] == tiny_model_dir.name  # the file is for sharing: no paths of this machine
    assert (metadata["recipe"], metadata["seed"], metadata["steps"], metadata["init"]) == ("fast", "5", "3", "star")


def test_a_command_that_cannot_be_done_says_why_in_one_line_before_it_learns(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = command(folder, tiny_model_dir, tmp_path / "toy.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "none.csv").write_text("images,token,init,output\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("text")
    cases = [
        (["--model", str(tiny_model_dir)], 2, "no folder of pictures"),
        ([str(empty), *good[1:]], 2, "holds no picture"),
        ([str(tmp_path / "bad"), *good[1:]], 1, "x.png is not a picture"),
        ([*good, "--recipe", "nothing"], 2, "unknown recipe 'nothing'"),
        ([*good, "--learning-rate", "0"], 2, "learning_rate is 0.0"),
        ([*good, "--token", "<again>"], 2, "1 folders and 2 times --token"),
        ([str(folder), *good], 2, "2 folders and 1 times --token"),
        ([*good[:-1], "x", "--steps", "many"], 2, "argument --batch-size"),
        (command(folder, tiny_model_dir, tmp_path / "toy.bin"), 2, "written as .safetensors"),
        (command(folder, tiny_model_dir, tmp_path / "no" / "toy.safetensors"), 2, "make it first"),
        (command(folder, tmp_path / "no-model", tmp_path / "toy.safetensors"), 2, "no-model"),
        ([*good[:4], "../x", *good[5:]], 1, "looks like a path"),
        ([*good[:4], "star", *good[5:]], 2, "'star' is a word of the model's own vocabulary: call the new one <star>"),
        ([*good[:6], " ", *good[7:]], 2, "init is empty"),
        ([*good, "--set", "speed=9"], 2, "'speed=9' is no setting"),
        ([*good, "--seed", "-1"], 2, "the seed is -1: give a whole number from 0"),
        ([*good, "--seed", str(10**30)], 2, "the seed is 1000"),
        ([*good, "--set", "betas=0.9,1.5"], 2, "betas is (0.9, 1.5)"),
        (["--manifest", str(tmp_path / "none.csv"), "--model", str(tiny_model_dir)], 2, "names no word"),
        ([*good, "--preview-every", "0"], 2, "--preview-every is 0"),
        ([*good, "--report", str(tmp_path / "no" / "run.html")], 2, "in a folder that is there"),
        ([str(folder), *good, "--token", "<toy>", "--output", str(tmp_path / "b.safetensors")], 2, "learned twice"),
        ([str(folder), *good, "--token", "<b>", "--output", str(tmp_path / "toy.safetensors")], 2, "is given twice"),
    ]
    for arguments, status, message in cases:
        assert main(arguments) == status, arguments
        told = capsys.readouterr()
        assert message in told.err
        assert told.err.count("\n") == 1
        assert told.out == ""
    assert not list(tmp_path.glob("*.safetensors"))


def with_nan(model: Path, part: str, copy: Path) -> Path:
    """The model with the weights of a part gone bad."""
    shutil.copytree(model, copy)
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, file, {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("part", "message"),
    [("unet", "the loss of '<toy>' is nan at step 1: lower the rate"), ("vae", "0.png: the VAE gives NaN for it")],
)
def test_a_model_that_gives_nan_is_one_line_and_writes_nothing(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, message: str
) -> None:
    model = with_nan(tiny_model_dir, part, tmp_path / "model")

    assert main(command(folder, model, tmp_path / "toy.safetensors")) == 1
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "toy.safetensors").exists()


def test_a_full_disk_at_the_end_loses_nothing(
    folder: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = command(folder, tiny_model_dir, tmp_path / "toy.safetensors")

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert main(arguments) == 1
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("toy")] == ["toy.run"]

    assert main(arguments) == 0
    assert "going on from step 3 of 3" in capsys.readouterr().err
    assert load_concept(tmp_path / "toy.safetensors").token == "<toy>"
    assert not (tmp_path / "toy.run").exists()


def test_one_picture_of_any_kind_is_enough(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("CMYK", (300, 40), (0, 255, 255, 0)).save(tmp_path / "one" / "wide.jpg")

    assert main(command(tmp_path / "one", tiny_model_dir, tmp_path / "toy.safetensors")) == 0


def test_a_manifest_learns_several_words_and_its_paths_are_relative_to_it(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "words.csv"
    lines = "images,token,init,output\npictures,<a>,star,a.safetensors\npictures,<b>,,b.safetensors\n"
    manifest.write_text(lines, encoding="utf-8-sig")  # as Excel saves it

    arguments = ["--manifest", str(manifest), "--model", str(tiny_model_dir), "--steps", "2", "--batch-size", "2"]

    assert main(arguments) == 0, capsys.readouterr().err
    assert load_concept(tmp_path / "a.safetensors").token == "<a>"
    assert load_concept(tmp_path / "b.safetensors").token == "<b>"

    manifest.write_text("images,token,init,output\npictures,<c>,a.safetensors,c.safetensors\n")
    assert main(arguments) == 0, capsys.readouterr().err
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        assert file.metadata()["init"] == "a.safetensors"


def test_a_word_learned_twice_is_refused(folder: Path, tiny_model_dir: Path) -> None:
    tasks = [Task(folder, "<a>"), Task(folder, "<a>")]
    with pytest.raises(UsageError, match="<a> is to be learned twice"):
        next(learn(tiny_model_dir, tasks, named_recipe("fast")))


def test_a_word_starts_from_a_row_a_mean_of_rows_or_a_random_row(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    table = source.text_encoders["text_encoder"].get_input_embeddings().weight  # type: ignore[operator]
    star, ring = (
        source.tokenizers["text_encoder"](word, add_special_tokens=False).input_ids for word in ("star", "ring")
    )
    assert len(star) == len(ring) == 1

    one = initial_rows(source, "star", 2, 0)["text_encoder"]
    mean = initial_rows(source, "star, ring", 1, 0)["text_encoder"]
    random = initial_rows(source, "random", 3, 0)["text_encoder"]

    torch.testing.assert_close(one, table[star].repeat(2, 1))
    torch.testing.assert_close(mean, (table[star] + table[ring]) / 2)
    median = np.median(np.linalg.norm(table.numpy(), axis=1))
    np.testing.assert_allclose(np.linalg.norm(random.numpy(), axis=1), median, rtol=0.02)


def test_captions_beside_pictures_are_learned_from_and_must_hold_the_word(folder: Path, tiny_model_dir: Path) -> None:
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"the red <toy> number {path.stem}")
    task = Task(folder, "<toy>")
    source = load_source(tiny_model_dir)
    word = make_word(source, task, read_pictures(folder, picture_size(source)), named_recipe("fast"), 0)
    assert word.captions == [f"the red {{}} number {i}" for i in range(5)]

    (folder / "3.txt").write_text("the red star")
    with pytest.raises(UsageError, match=r"3\.txt: the caption 'the red star' does not hold the word '<toy>'"):
        next(learn(tiny_model_dir, [Task(folder, "<toy>")], named_recipe("fast")))


def test_pictures_of_many_shapes_crops_and_mirror_images_are_learned_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for i, size in enumerate([(64, 64), (200, 100), (90, 160)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "many" / f"{i}.png")
    recipe = named_recipe("fast").with_changes(steps=2, batch_size=6, buckets=True, crops=1, flip=True)

    *_, last = learn(tiny_model_dir, [Task(tmp_path / "many", "<toy>", "star")], recipe)

    (concept,) = last.concepts
    start = initial_rows(load_source(tiny_model_dir), "star", 1, 0)["text_encoder"]
    assert np.abs(concept.vectors["text_encoder"] - start.numpy()).max() > 1e-4


def test_sheets_and_report_are_written_and_change_no_bit_of_the_word(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, seen = tmp_path / "plain.safetensors", tmp_path / "seen.safetensors"
    (tmp_path / "seen.previews").mkdir()
    (tmp_path / "seen.previews" / "step-000999.png").write_bytes(b"of an older run")
    looks = ["--preview-every", "2", "--report", str(tmp_path / "run.html")]

    assert main(command(folder, tiny_model_dir, plain)) == 0
    assert main(command(folder, tiny_model_dir, seen, *looks)) == 0, capsys.readouterr().err

    np.testing.assert_array_equal(
        load_concept(plain).vectors["text_encoder"], load_concept(seen).vectors["text_encoder"]
    )
    assert sorted(path.name for path in (tmp_path / "seen.previews").iterdir()) == [
        "step-000002.png",
        "step-000003.png",
    ]
    page = (tmp_path / "run.html").read_text()
    assert page.count("data:image/png;base64,") == 5 + 2


def test_what_the_user_should_know_is_told_at_the_first_step(folder: Path, tiny_model_dir: Path) -> None:
    for name in ("2", "3", "4"):
        (folder / f"{name}.png").unlink()
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "5.HEIC").write_bytes(b"from a telephone")

    first = next(
        learn(tiny_model_dir, [Task(folder, "<toy>", "zebra")], named_recipe("fast").with_changes(batch_size=2))
    )

    assert "holds 2 pictures: three to five are usual" in first.notes[0]
    assert "5.HEIC" in first.notes[1]
    assert "is not read: save it as PNG or JPEG" in first.notes[1]
    assert "0.png and 1.png" in first.notes[2]
    assert "init 'zebra' is several tokens" in first.notes[3]


def test_a_word_starts_from_another_concept_and_a_run_from_what_it_held(
    folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    start = tmp_path / "start.safetensors"
    save_file({"<start>": torch.from_numpy(rows)}, start)
    source = load_source(tiny_model_dir)
    for vectors, expected in ((1, rows[:1]), (2, rows), (3, rows[[0, 1, 1]])):
        np.testing.assert_array_equal(initial_rows(source, str(start), vectors, 0)["text_encoder"], expected)

    task, recipe = Task(folder, "<toy>", str(start)), named_recipe("fast").with_changes(steps=3, batch_size=2)
    run = learn(tiny_model_dir, [task], recipe, checkpoints=tmp_path / "run", checkpoint_every=1)
    next(run)
    run.close()
    save_file({"<start>": torch.from_numpy(rows + 1)}, start)
    with pytest.raises(UsageError, match="init of word 1"):
        next(learn(tiny_model_dir, [task], recipe, checkpoints=tmp_path / "run"))


def test_a_word_that_settles_is_named_and_has_its_own_steps(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two words whose watched losses are called settled at their third step, and at their fifth."""
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
