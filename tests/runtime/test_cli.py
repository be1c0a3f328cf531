"""`ti-run` from the command line: output, files, exit status."""

import io
import json
import resource
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from rich.console import Console

from oneword.engines.errors import EngineError, FileError
from oneword.engines.open import Backend
from oneword.runtime import events
from oneword.runtime.bundle import Bundle
from oneword.runtime.cli import _generate, main
from oneword.runtime.commands import ProgressBar
from oneword.runtime.concept import Concept, save_concept
from oneword.runtime.drawing import draw, generate, scheduler_for
from oneword.runtime.events import PictureDone
from oneword.runtime.images import save_png
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.samplers import Sampler
from oneword.runtime.scheduler import Scheduler


def run(monkeypatch: pytest.MonkeyPatch, *line: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ti-run", *map(str, line)])
    try:
        main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_ctrl_c_leaves_no_engine_to_be_opened_in_the_background(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Model] = []
    open_ahead = Model.open_ahead

    def noted(model: Model, names: Iterable[str]) -> None:
        models.append(model)
        model._open_graph = lambda name: release.wait(60)  # type: ignore[assignment, return-value]
        open_ahead(model, names)

    def interrupt(scheduler: Scheduler, max_steps: int | None = 1) -> None:
        raise KeyboardInterrupt

    release = threading.Event()
    monkeypatch.setattr(Model, "open_ahead", noted)
    monkeypatch.setattr(Scheduler, "step", interrupt)

    assert run(monkeypatch, tiny_bundle, "a cat", "--steps", 1, "--output", tmp_path) == 130
    assert "vae_decoder" not in models[0]._ahead
    release.set()


def test_json_reports_the_pictures_and_what_generated_them(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words").mkdir()
    for name in ("toy", "cat"):
        vectors = {"text_encoder": np.full((1, 32), 0.1, np.float32)}
        save_concept(Concept(f"<{name}>", vectors), tmp_path / "words" / f"{name}.safetensors")
    line = [tiny_bundle, "a <toy>", "a <cat> & a <toy>", "--concept", tmp_path / "words", "--output", tmp_path / "out"]
    line += ["--engine", "onnxruntime"]

    status = run(monkeypatch, *line, "--steps", 2, "--seed", 4, "--num-images", 2, "--size", "64x72", "--json")

    assert status == 0
    report = json.loads(capsys.readouterr().out)
    entries = report["images"]
    assert [(e["prompt"], e["seed"]) for e in entries] == [
        ("a <toy>", 4),
        ("a <toy>", 5),
        ("a <cat> & a <toy>", 4),
        ("a <cat> & a <toy>", 5),
    ]
    assert report["engine"].startswith("onnxruntime")
    assert report["words"] == ["<cat>", "<toy>"]
    assert report["digests"]["denoise_step"] == Bundle.open(tiny_bundle).manifest.graphs["denoise_step"].digest
    assert set(report["seconds"]["engines"]) == {"text_encoder", "denoise_step", "vae_decoder"}
    with PIL.Image.open(entries[3]["file"]) as picture:
        assert picture.size == (64, 72)
        assert picture.info["parameters"].startswith("a <cat> & a <toy>\nSteps: 2, Sampler: DDIM, CFG scale: ")
        assert "Seed: 5, Size: 64x72" in picture.info["parameters"]


@pytest.mark.parametrize("backend", [Backend.ONNXRUNTIME, Backend.OPENVINO])
def test_every_option_sets_the_request_setting_of_that_name(
    tiny_bundle: Path,
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(backend.value)
    line = ["--negative-prompt", "a dog", "--sampler", "euler-a", "--steps", 4, "--guidance-scale", 3.5, "--seed", 9]
    line += ["--guidance-rescale", 0.4, "--guidance-interval", 0.2, 9, "--clip-skip", 1, "--engine", backend.value]
    line += ["--max-rows", 1, "--output", tmp_path, "--json"]

    assert run(monkeypatch, tiny_bundle, "a cat", *line) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["engine"].startswith(backend.value)
    request = Request(
        "a cat",
        negative_prompt="a dog",
        sampler=Sampler.EULER_A,
        steps=4,
        guidance_scale=3.5,
        seed=9,
        guidance_rescale=0.4,
        guidance_interval=(0.2, 9),
        clip_skip=1,
    )
    [expected] = [e.image for e in generate(Model.open(tiny_bundle, backend), [request]) if isinstance(e, PictureDone)]
    with PIL.Image.open(report["images"][0]["file"]) as picture:
        np.testing.assert_allclose(np.asarray(picture).astype(int), expected, atol=1)


def test_drafts_open_only_the_small_decoder(
    tiny_preview_bundle: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["a cat", "--steps", 2, "--engine", "onnxruntime", "--draft", "--output", tmp_path, "--json"]

    assert run(monkeypatch, tiny_preview_bundle, *line) == 0

    report = json.loads(capsys.readouterr().out)
    assert set(report["seconds"]["engines"]) == {"text_encoder", "denoise_step", "vae_preview"}
    [expected] = draw(Model.open(tiny_preview_bundle, "onnxruntime"), "a cat", steps=2, draft=True)
    with PIL.Image.open(report["images"][0]["file"]) as picture:
        np.testing.assert_allclose(np.asarray(picture).astype(int), expected.image, atol=1)
        assert "VAE Decoder: TAESD" in picture.info["parameters"]
    assert run(monkeypatch, tiny_bundle, *line) == 2
    assert "draft needs a preview decoder, which this bundle does not have" in capsys.readouterr().err


def test_a_grid_has_a_row_per_prompt_and_a_column_per_word_and_seed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_concept(Concept("<toy>", {"text_encoder": np.full((1, 32), 0.1, np.float32)}), tmp_path / "toy.safetensors")
    line = [tiny_bundle, "a photo of {}", "a painting of {}", "--concept", tmp_path / "toy.safetensors"]
    line += ["--word", "a <toy>", "--word", "a cat", "--num-images", 2, "--seed", 3, "--steps", 1]

    status = run(monkeypatch, *line, "--grid", tmp_path / "new" / "grid.png", "--output", tmp_path, "--json")

    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert [(entry["prompt"], entry["seed"]) for entry in report["images"]] == [
        (f"{medium} of {word}", seed)
        for medium in ("a photo", "a painting")
        for word in ("a <toy>", "a cat")
        for seed in (3, 4)
    ]
    assert report["grid"] == str(tmp_path / "new" / "grid.png")
    with PIL.Image.open(report["grid"]) as picture:
        grid, text = np.asarray(picture), picture.info["parameters"]
    assert text == report["images"][0]["parameters"]
    for i, entry in enumerate(report["images"]):
        cell = np.asarray(PIL.Image.open(entry["file"])).repeat(2, 0).repeat(2, 1)  # 64 pixels shown as 128
        left = grid.shape[1] - (4 - i % 4) * (128 + 8)
        top = grid.shape[0] - (2 - i // 4) * (128 + 8)
        np.testing.assert_array_equal(grid[top : top + 128, left : left + 128], cell)


def test_the_braces_are_replaced_by_every_loaded_word(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words").mkdir()
    for name in ("toy", "cat"):
        vectors = {"text_encoder": np.full((1, 32), 0.1, np.float32)}
        save_concept(Concept(f"<{name}>", vectors), tmp_path / "words" / f"{name}.safetensors")
    line = [tiny_bundle, "a {} in {}", "a dog", "--concept", tmp_path / "words", "--steps", 1, "--output", tmp_path]

    assert run(monkeypatch, *line, "--json") == 0

    prompts = [entry["prompt"] for entry in json.loads(capsys.readouterr().out)["images"]]
    assert prompts == ["a <cat> in <cat>", "a <toy> in <toy>", "a dog"]


def test_an_older_picture_is_not_overwritten(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert run(monkeypatch, tiny_bundle, "a cat", "--steps", 1, "--output", tmp_path) == 0

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cat-0-2.png", "a-cat-0.png"]


def test_a_files_name_is_short_enough_in_any_script(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names may have 255 bytes; these letters have four each."""
    prompt, seed = "\U00020000" * 70, 2**63 - 1
    for _ in range(2):
        assert run(monkeypatch, tiny_bundle, prompt, "--seed", seed, "--steps", 1, "--output", tmp_path) == 0

    stem = f"{prompt[:50]}-{seed}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}-2.png", f"{stem}.png"]


def test_an_edit_reads_its_picture_and_mask(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(np.full((64, 80, 3), 99, np.uint8), tmp_path / "in.png", "")
    mask = np.zeros((64, 80), np.uint8)
    mask[:32] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    line = [tiny_bundle, "a cat", "--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--strength", 0.5]

    assert run(monkeypatch, *line, "--steps", 4, "--output", tmp_path / "out") == 0

    with PIL.Image.open(tmp_path / "out" / "a-cat-0.png") as picture:
        assert picture.size == (80, 64)
        assert "Denoising strength: 0.5" in picture.info["parameters"]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        (["a cat", "--steps", "0"], 2, "steps is 0, but must be 1 to 1000"),
        (["a cat", "--size", "60x64"], 2, "size 60x64: width must be a multiple of 8"),
        (["a cat", "--size", "big"], 2, "'big' is not WIDTHxHEIGHT, for example 512x512"),
        (["a cat", "--sampler", "best"], 2, "'best' is not one of 'ddim', 'ddpm'"),
        (["a <nobody>"], 2, "nobody"),
        (["a cat", "--concept", "absent.safetensors"], 2, "there is no file absent.safetensors"),
        (
            ["a cat", "--concept", "large.png"],
            1,
            "large.png is a picture, not a word's file; if A1111 stored a word in it",
        ),
        (
            ["a cat", "--concept", "one/toy.safetensors", "--concept", "two"],
            2,
            "two files hold the word <toy>: one/toy.safetensors and two/again.safetensors; leave one out, or rename "
            "it: ti-concept convert FILE OUT --token NAME",
        ),
        (["a cat <lora:foo:0.8>"], 2, "fuse it when you export, with ti-export --lora FILE:0.8"),
        (["a cat", "--image", "absent.png"], 2, "there is no picture absent.png"),
        (["a cat", "--concept", "."], 2, "holds no .safetensors file"),
        (["a cat", "--word", "dog"], 2, "--word needs {} in a prompt, as in 'a photo of a {}'"),
        (["a cat", "--strength", "0.8"], 2, "--strength needs --image, the picture to start from"),
        (["a {}"], 2, "no word is given for the {} of 'a {}': add --word or --concept"),
        (["a cat", "--grid", "grid.jpg"], 2, "--grid is grid.jpg, but must end in .png"),
        (
            ["a {}", "a cat", "--word", "dog", "--grid", "grid.png"],
            2,
            "'a cat' has no {}, other prompts of this grid do",
        ),
        (
            ["a cat", "--num-images", "1000", "--size", "512x512", "--grid", "g.png"],
            2,
            "pixels, but may have at most 67108864",
        ),
        (["a cat", "--image", "large.png", "--strength", "2"], 2, "strength is 2.0, but must be 0 to 1"),
        (
            ["a cat", "--guidance-interval", "1", "1"],
            2,
            "guidance_interval is 1 to 1, but must start at 0 or more and end higher",
        ),
        (["a cat", "--eta", "0.5", "--sampler", "euler"], 2, "eta is 0.5 with the sampler euler, but must be 0"),
        (
            ["a cat", "--size", "32768x32768"],
            2,
            "has 1073741824 pixels, but may have at most 16777216: choose a smaller size",
        ),
        (
            ["a cat", "--image", "text.png"],
            1,
            "text.png cannot be read as a picture: its format must be one of PNG, JPEG",
        ),
        (["a cat", "--image", "half.png"], 1, "half.png cannot be read as a picture"),
        (["a cat", "--image", "large.png", "--mask", "small.png"], 2, "the mask is 16x16, the image 72x64"),
        (["a cat", "--mask", "small.png"], 2, "a mask was given without an image"),
        (["a cat", "--image", "large.png", "--mask", "black.png"], 2, "the mask is all black"),
        (["a cat", "--engine", "abacus"], 2, "'abacus' is not one of 'auto', 'onnxruntime'"),
        ([], 2, "PROMPT"),
        (["a cat", "--colour", "red"], 2, "No such option"),
    ],
)
def test_a_mistake_is_one_line_of_error_and_an_exit_status(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    save_png(np.full((64, 72, 3), 99, np.uint8), Path("large.png"), "")
    Path("half.png").write_bytes(Path("large.png").read_bytes()[:60])
    PIL.Image.new("L", (16, 16), 255).save("small.png")
    PIL.Image.new("L", (72, 64), 0).save("black.png")
    for name in ("one/toy.safetensors", "two/again.safetensors"):
        Path(name).parent.mkdir()
        save_concept(Concept("<toy>", {"text_encoder": np.full((1, 32), 0.1, np.float32)}), name)
    before = sorted(tmp_path.iterdir())

    assert run(monkeypatch, tiny_bundle, *line, "--output", tmp_path / "out") == status

    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("ti-run: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_is_a_file_is_refused_before_a_picture_is_drawn(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("kept")

    assert run(monkeypatch, tiny_bundle, "a cat", "--steps", 1, "--output", tmp_path / "notes.txt") == 2

    assert capsys.readouterr().err == f"ti-run: --output {tmp_path / 'notes.txt'} is a file: give a folder\n"
    assert (tmp_path / "notes.txt").read_text() == "kept"


class Bar(ProgressBar):
    """A bar on a terminal that records what it shows."""

    def __init__(self) -> None:
        super().__init__("", Console(file=io.StringIO(), force_terminal=True))
        self.shown: list[tuple[float | None, float | None]] = []

    def update(
        self, *, completed: float | None = None, total: float | None = None, description: str | None = None
    ) -> None:
        self.shown.append((completed, total))


@pytest.mark.parametrize("failing", [False, True])
def test_the_bar_counts_the_steps_of_all_pictures_from_the_start(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    """Three pictures of 4 steps, and one of half of 6 in an edit: 15, though only two pictures are drawn at a time."""
    model = Model.open(tiny_bundle, Backend.ONNXRUNTIME)
    grey = np.full((64, 64, 3), 128, np.uint8)
    requests = [
        Request("a cat", steps=4, num_images=3),
        Request("a dog", steps=6, strength=0.5, image=grey, sampler=Sampler.HEUN),
    ]
    if failing:
        second_fails(monkeypatch)
    bar = Bar()

    _generate(scheduler_for(model, requests, max_rows=2), requests, tmp_path, bar)

    assert bar.shown[0] == (0, 15)
    assert bar.shown[-1] == (15, 15)
    assert {total for _, total in bar.shown} == {15}
    completed = [done for done, _ in bar.shown if done is not None]
    assert completed == sorted(completed)
    assert len(set(completed)) > 5


def test_a_full_disk_is_one_line_of_error_and_leaves_no_partial_file(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # a file may grow to 500 bytes, a picture is larger
    try:
        status = run(monkeypatch, tiny_bundle, "a cat", "--steps", 1, "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("ti-run: cannot write ")
    assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def second_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the decoder report NaN for the second picture."""
    decode = Model.decode

    def broken(model: Model, latents: npt.NDArray[np.float32], draft: bool) -> tuple[Image, npt.NDArray[np.bool_]]:
        images, finite = decode(model, latents, draft)
        return images, finite & (np.arange(len(finite)) != 1)

    monkeypatch.setattr(Model, "decode", broken)


def test_when_a_picture_fails_the_others_are_saved_and_reported(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second_fails(monkeypatch)
    line = [tiny_bundle, "a cat", "--num-images", 3, "--seed", 4, "--steps", 1, "--output", tmp_path / "out"]

    assert run(monkeypatch, *line, "--grid", tmp_path / "grid.png", "--json") == 1

    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [entry["seed"] for entry in report["images"]] == [4, 6]
    assert [(entry["prompt"], entry["seed"]) for entry in report["failed"]] == [("a cat", 5)]
    assert report["failed"][0]["error"].startswith("graph 'vae_decoder' produced NaN or infinity for picture 1")
    assert captured.err.splitlines()[-1] == f"ti-run: {report['failed'][0]['error']}"
    assert report["grid"] is None
    assert not (tmp_path / "grid.png").exists()
    assert sorted(str(path) for path in (tmp_path / "out").iterdir()) == [entry["file"] for entry in report["images"]]


def test_when_a_grid_cannot_be_saved_its_pictures_are_reported(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = [tiny_bundle, "a cat", "--steps", 1, "--output", tmp_path / "out", "--grid", tmp_path / "file" / "grid.png"]

    assert run(monkeypatch, *line, "--json") == 1

    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [entry["file"] for entry in report["images"]] == [str(path) for path in (tmp_path / "out").iterdir()]
    assert report["grid"] is None
    assert captured.err.splitlines()[-1] == f"ti-run: {tmp_path / 'file'} is a file: give a folder"


def test_when_a_picture_cannot_be_saved_those_before_it_are_reported(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(image: Image, path: Path, text: str) -> None:
        if path.name != "a-cat-0.png":
            raise FileError(f"cannot write {path}: No space left on device")
        save_png(image, path, text)

    monkeypatch.setattr(events, "save_png", full)
    line = [tiny_bundle, "a cat", "--num-images", 3, "--steps", 1, "--output", tmp_path, "--json"]

    assert run(monkeypatch, *line) == 1

    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [entry["file"] for entry in report["images"]] == [str(tmp_path / "a-cat-0.png")]
    assert [entry["seed"] for entry in report["failed"]] == [1, 2]
    assert captured.err.endswith("No space left on device (and 1 more of 3 pictures failed)\n")


def test_without_json_the_files_that_were_saved_are_printed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second_fails(monkeypatch)

    line = [tiny_bundle, "a cat", "--num-images", 2, "--steps", 1, "--output", tmp_path]
    assert run(monkeypatch, *line) == 1

    assert capsys.readouterr().out == f"{tmp_path / 'a-cat-0.png'}\n"


def test_if_all_pictures_fail_each_is_reported_and_the_first_error_ends_the_command(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: Model, name: str) -> None:
        raise EngineError(f"cannot open graph {name!r}")

    monkeypatch.setattr(Model, "engine", broken)
    line = [tiny_bundle, "a cat", "a dog", "--steps", 1, "--output", tmp_path / "out", "--json"]

    assert run(monkeypatch, *line) == 1

    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["images"], report["engine"]) == ([], None)
    assert [entry["prompt"] for entry in report["failed"]] == ["a cat", "a dog"]
    assert captured.err == "ti-run: cannot open graph 'denoise_step' (and 1 more of 2 pictures failed)\n"


def test_more_vectors_than_the_default_capacity_are_loaded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(15):
        rows = {"text_encoder": np.full((70, 32), 0.01 + i, np.float32)}
        save_concept(Concept(f"<w{i}>", rows), tmp_path / f"w{i}.safetensors")
    line = [tiny_bundle, "a cat", "--concept", tmp_path, "--steps", 1, "--output", tmp_path, "--json"]

    assert run(monkeypatch, *line) == 0  # 1,050 vectors

    assert len(json.loads(capsys.readouterr().out)["words"]) == 15


def test_a_folder_that_is_not_a_bundle_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "a cat") == 2

    assert "is not a bundle (no bundle.json): make one with ti-export" in capsys.readouterr().err
