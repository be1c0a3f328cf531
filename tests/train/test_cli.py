import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import oneword
from oneword.export.source import load_source
from oneword.runtime.concept import load_concept
from oneword.train.cli import main, steps_taken
from tests.original_layout import original_layout


def command(folder: Path, model: Path, output: Path, *more: str) -> list[str]:
    options = [str(folder), "--model", str(model), "--token", "<toy>", "--init", "star", "--output", str(output)]
    return [*options, "--steps", "3", "--batch-size", "2", *more]


def test_the_command_writes_a_concept_and_says_what_it_did(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "toy.safetensors"

    status = main(command(folder, tiny_model_dir, output, "--json", "--seed", "5"))

    captured = capsys.readouterr()
    assert status == 0, captured.err
    report = json.loads(captured.out)
    assert report["steps"] == 3
    assert report["concepts"][0]["output"] == str(output)
    assert "step 3/3 loss" in captured.err
    assert re.search(r"toy\.safetensors, 3 steps in \d+ s$", captured.err, re.M)
    concept = load_concept(output)
    assert concept.token == "<toy>"
    assert concept.vectors["text_encoder"].shape == (1, 32)
    with safe_open(output, "numpy") as file:  # as diffusers reads it
        assert list(file.keys()) == ["<toy>"]
        metadata = file.metadata()
    assert metadata["base_model"] == tiny_model_dir.name  # the file may be shared: no paths
    facts = [metadata[name] for name in ("recipe", "seed", "steps", "init")]
    assert facts == ["directional", "5", "3", "star"]


def test_a_command_that_cannot_succeed_fails_with_one_line_before_learning(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = command(folder, tiny_model_dir, tmp_path / "toy.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "none.csv").write_text("images,token,init,output\n")
    (tmp_path / "0.csv").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "x.csv").write_text("images,token,init,output\npictures,x y,star,x.safetensors\n")
    (tmp_path / "more.csv").write_text("images,token,output,init\n\npictures,<x>,x.safetensors,red, toy\n")
    (tmp_path / "typo.csv").write_text("images,token,Init,output\npictures,<x>,star,x.safetensors\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "in.safetensors").mkdir()
    (tmp_path / "toy.previews").write_text("")
    (tmp_path / "bad" / "x.png").write_text("text")
    cases = [
        (["--model", str(tiny_model_dir)], 2, "no folder of pictures"),
        ([str(empty), *good[1:]], 2, "has no pictures"),
        ([str(tmp_path / "bad"), *good[1:]], 1, "x.png cannot be read as a picture"),
        ([*good, "--recipe", "nothing"], 2, "unknown recipe 'nothing'"),
        ([*good, "--learning-rate", "0"], 2, "learning_rate is 0.0"),
        ([*good, "--token", "<again>"], 2, "1 folder, but 2 values of --token: give one for each folder"),
        ([str(folder), *good], 2, "2 folders, but 1 value of --token: give one for each folder"),
        ([*good[:-1], "x"], 2, "Invalid value for '--batch-size': 'x' is not a valid integer"),
        (good[:1], 2, "Missing option '--model'"),
        ([*good, "--config", str(tiny_model_dir)], 2, "--config is for a single .safetensors file"),
        (command(folder, tiny_model_dir, tmp_path / "toy.bin"), 2, "written as .safetensors"),
        (command(folder, tiny_model_dir, tmp_path / "no" / "toy.safetensors"), 2, "create it first"),
        (command(folder, tmp_path / "no-model", tmp_path / "toy.safetensors"), 2, "no-model"),
        ([*good[:4], "../x", *good[5:]], 2, "looks like a path"),
        ([*good[:4], "x y", *good[5:]], 2, "token 'x y' is not safe"),
        ([*good[:6], "absent.safetensors", *good[7:]], 2, "there is no file absent.safetensors"),
        ([*good, "--set", "buckets=yes"], 2, "buckets is 'yes': give true or false"),
        ([*good, "--checkpoints", str(tmp_path / "none.csv")], 2, "none.csv is a file: give a folder"),
        ([*good, "--tensorboard", str(tmp_path / "none.csv")], 2, "none.csv is a file: give a folder"),
        ([*good[:4], "star", *good[5:]], 2, "'star' is already in the model's vocabulary: use <star> instead"),
        ([*good[:6], " ", *good[7:]], 2, "init is empty"),
        ([*good, "--set", "speed=9"], 2, "'speed=9' is not a setting"),
        ([*good, "--seed", "-1"], 2, "the seed is -1: give a whole number from 0"),
        ([*good, "--seed", str(10**30)], 2, "the seed is 1000"),
        ([*good, "--set", "betas=0.9,1.5"], 2, "betas is 0.9,1.5: give two numbers"),
        (["--manifest", str(tmp_path / "none.csv"), "--model", str(tiny_model_dir)], 2, "lists no words"),
        (
            ["--manifest", str(tmp_path / "no.csv"), "--model", str(tiny_model_dir)],
            2,
            f"no file {tmp_path / 'no.csv'}:",
        ),
        (["--manifest", str(tmp_path / "0.csv"), "--model", str(tiny_model_dir)], 1, "0.csv is not a CSV in UTF-8"),
        (["--manifest", str(tmp_path / "x.csv"), "--model", str(tiny_model_dir)], 2, "token 'x y' is not safe"),
        (
            ["--manifest", str(tmp_path / "more.csv"), "--model", str(tiny_model_dir)],
            2,
            "more.csv line 3 has more cells than columns: put a cell that has commas in quotes",
        ),
        (
            ["--manifest", str(tmp_path / "typo.csv"), "--model", str(tiny_model_dir)],
            2,
            "typo.csv has the column 'Init', but the columns must be images, token, init, output",
        ),
        ([*good[:6], os.fsdecode(b"\xff"), *good[7:]], 2, r"init is '\udcff', but must be UTF-8"),
        ([*good, "--preview-every", "0"], 2, "--preview-every is 0"),
        ([*good, "--report", str(tmp_path / "no" / "run.html")], 2, "in an existing folder"),
        ([str(folder), *good, "--token", "<toy>", "--output", str(tmp_path / "b.safetensors")], 2, "learned twice"),
        ([str(folder), *good, "--token", "<b>", "--output", str(tmp_path / "toy.safetensors")], 2, "is given twice"),
        (
            [str(folder), *good, "--token", "<b>", "--output", str(tmp_path / "bad" / ".." / "toy.safetensors")],
            2,
            "is given twice",
        ),
        (command(folder, tiny_model_dir, tmp_path / "in.safetensors"), 2, "in.safetensors is a folder: give a file"),
        ([*good, "--report", str(tmp_path / "bad" / ".." / "toy.safetensors")], 2, "is --output too: give it a file"),
        ([*good, "--preview-every", "1"], 2, "toy.previews is a file, but samples are saved in a folder of that name"),
        ([*good, "--report", str(tmp_path / "run.html")], 2, "toy.previews is a file, but samples are saved in a"),
    ]
    for arguments, status, message in cases:
        assert main(arguments) == status, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["in.safetensors"]


@pytest.mark.parametrize(
    ("start", "count", "text"),
    [
        (0, 1, "1 step"),
        (0, 50, "50 steps"),
        (10, 50, "steps 11 to 50"),
        (49, 50, "step 50"),
        (50, 50, "no more steps"),
        (50, 20, "no more steps"),
    ],
)
def test_only_the_steps_of_this_run_are_reported(start: int, count: int, text: str) -> None:
    assert steps_taken(start, count) == text


def with_nan(model: Path, part: str, copy: Path) -> Path:
    """A copy of the model in which the weights of one part are NaN."""
    shutil.copytree(model, copy)
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, file, {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", "the loss of '<toy>' is nan at step 1: lower the learning rate"),
        ("vae", "0.png: the VAE gives NaN for it"),
    ],
)
def test_a_model_that_gives_nan_fails_with_one_line_and_writes_nothing(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, message: str
) -> None:
    model = with_nan(tiny_model_dir, part, tmp_path / "model")

    assert main(command(folder, model, tmp_path / "toy.safetensors")) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
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
    error = capsys.readouterr().err
    assert "resuming from step 3 of 3" in error
    assert re.search(r"toy\.safetensors, no more steps in \d+ s$", error, re.M)
    assert load_concept(tmp_path / "toy.safetensors").token == "<toy>"
    assert not (tmp_path / "toy.run").exists()


def test_a_single_picture_of_any_kind_is_enough(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("CMYK", (300, 40), (0, 255, 255, 0)).save(tmp_path / "one" / "wide.jpg")

    assert main(command(tmp_path / "one", tiny_model_dir, tmp_path / "toy.safetensors")) == 0


def test_a_manifest_lists_several_words_with_paths_relative_to_itself(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "words.csv"
    lines = "images,token,init,output\npictures,<a>,star,a.safetensors\npictures,<b>,,b.safetensors\n"
    manifest.write_text(lines, encoding="utf-8-sig")  # as Excel saves it

    arguments = ["--manifest", str(manifest), "--model", str(tiny_model_dir), "--steps", "2", "--batch-size", "2"]

    assert main(arguments) == 0, capsys.readouterr().err
    assert load_concept(tmp_path / "a.safetensors").token == "<a>"
    assert load_concept(tmp_path / "b.safetensors").token == "<b>"

    spreadsheet = "images,token,init,output,\npictures,<c>,a.safetensors,c.safetensors,\n"  # with an empty column
    manifest.write_text(spreadsheet)
    assert main(arguments) == 0, capsys.readouterr().err
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        assert file.metadata()["init"] == "a.safetensors"


def test_sheets_and_a_report_are_written_without_changing_a_bit_of_the_word(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, previewed = tmp_path / "plain.safetensors", tmp_path / "previewed.safetensors"
    (tmp_path / "previewed.previews").mkdir()
    (tmp_path / "previewed.previews" / "step-000999.png").write_bytes(b"of an older run")
    options = ["--preview-every", "2", "--report", str(tmp_path / "run.html")]

    assert main(command(folder, tiny_model_dir, plain)) == 0
    assert main(command(folder, tiny_model_dir, previewed, *options)) == 0, capsys.readouterr().err

    np.testing.assert_array_equal(
        load_concept(plain).vectors["text_encoder"], load_concept(previewed).vectors["text_encoder"]
    )
    assert sorted(path.name for path in (tmp_path / "previewed.previews").iterdir()) == [
        "step-000002.png",
        "step-000003.png",
    ]
    page = (tmp_path / "run.html").read_text()
    assert page.count("data:image/png;base64,") == 5 + 2


def test_names_of_files_need_not_be_utf_8(folder: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A note in the report names the twin of a picture, and the word's metadata the file it started from."""
    strange = os.fsdecode(b"\xff")
    shutil.copy(folder / "0.png", folder / f"{strange}.png")
    start, output, page = (tmp_path / name for name in (f"{strange}.safetensors", "toy.safetensors", "run.html"))
    assert main(command(folder, tiny_model_dir, start)) == 0

    arguments = command(folder, tiny_model_dir, output, "--report", str(page))
    arguments[arguments.index("star")] = str(start)

    assert main(arguments) == 0
    assert load_concept(output).provenance["init"] == "?.safetensors"
    assert "0.png and ?.png" in page.read_text()


def test_a_run_of_one_step_has_no_samples_of_an_older_run(folder: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.previews").mkdir()
    (tmp_path / "toy.previews" / "step-000050.png").write_bytes(b"of an older run")

    status = main(
        command(folder, tiny_model_dir, tmp_path / "toy.safetensors", "--steps", "1", "--report", str(tmp_path / "r"))
    )

    assert status == 0
    assert [path.name for path in (tmp_path / "toy.previews").iterdir()] == ["step-000001.png"]


def test_a_single_file_model_gives_the_same_word_as_its_directory(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With samples, a report, and a config directory without weights. The same weights give the same word."""
    checkpoint, config = tmp_path / "tiny.safetensors", tmp_path / "config"
    save_file(original_layout(load_source(tiny_model_dir)), checkpoint)
    shutil.copytree(tiny_model_dir, config, ignore=shutil.ignore_patterns("*.safetensors"))
    page = tmp_path / "run.html"
    single = command(
        folder, checkpoint, tmp_path / "single.safetensors", "--config", str(config), "--report", str(page)
    )

    assert main(single) == 0, capsys.readouterr().err
    assert main(command(folder, tiny_model_dir, tmp_path / "whole.safetensors")) == 0

    concept, expected = (load_concept(tmp_path / f"{name}.safetensors") for name in ("single", "whole"))
    np.testing.assert_array_equal(concept.vectors["text_encoder"], expected.vectors["text_encoder"])
    assert concept.provenance["base_model"] == "tiny.safetensors"
    assert concept.provenance["base_model_digest"] != expected.provenance["base_model_digest"]
    assert f"ti-export {checkpoint} tiny.bundle --config {config}" in page.read_text()
    assert main(command(folder, checkpoint, tmp_path / "none.safetensors")) == 2
    assert "give --config" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["oneword.train.cli", "oneword.train.evaluation.cli"])
def test_help_and_version_do_not_import_torch(module: str) -> None:
    script = f"""
import sys
from {module} import main
assert main(["--help"]) == main(["-h"]) == main(["--version"]) == 0
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: ti-") == 2
    assert "--json" in result.stdout
    assert f"version {oneword.__version__}" in result.stdout
