"""Pictures from any source are read, and generated pictures are saved."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from oneword.engines.errors import FileError, UsageError
from oneword.runtime.images import open_picture, parameters_text, read_image, read_mask, resized, save_png
from oneword.runtime.request import Request, ResolvedSettings
from oneword.runtime.samplers import Sampler, make_schedule

RED = np.full((8, 12, 3), (255, 0, 0), np.uint8)
SCHEDULE = make_schedule({}, Sampler.DPMPP_2M_KARRAS, 20, guidance_scale=7.5)
SETTINGS = ResolvedSettings(20, Sampler.DPMPP_2M_KARRAS, 7.5, width=64, height=48, schedule=SCHEDULE)


def test_the_parameters_are_in_the_format_of_a1111(tmp_path: Path) -> None:
    text = parameters_text(Request("a cat", negative_prompt="blurry", clip_skip=1), SETTINGS, seed=7, model="tiny")
    save_png(RED, tmp_path / "deep" / "cat.png", text)

    with PIL.Image.open(tmp_path / "deep" / "cat.png") as picture:
        assert picture.info["parameters"] == (
            "a cat\nNegative prompt: blurry\n"
            "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: tiny, Clip skip: 2"
        )
        np.testing.assert_array_equal(np.asarray(picture), RED)


def test_the_parameters_include_every_setting_that_changes_the_picture() -> None:
    request = Request("a cat", eta=0.5, guidance_rescale=0.7, guidance_interval=(0.25, 5.0))
    text = parameters_text(request, SETTINGS, seed=7)

    assert text.endswith("Size: 64x48, Eta: 0.5, CFG Rescale: 0.7, CFG interval: 0.25-5")
    text = parameters_text(Request("a cat", spacing="sgm-uniform", guidance="zero-star"), SETTINGS, seed=7)
    assert text.endswith("Size: 64x48, Schedule type: SGM Uniform, Guidance: CFG-Zero*")
    assert parameters_text(Request("a cat", draft=True), SETTINGS, seed=7).endswith("VAE Decoder: TAESD")


def test_a_prompt_in_any_script_survives(tmp_path: Path) -> None:
    save_png(RED, tmp_path / "cat.png", "кот, 猫, 🐈")

    with PIL.Image.open(tmp_path / "cat.png") as picture:
        assert picture.info["parameters"] == "кот, 猫, 🐈"


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileError, match=r"cannot write .*cat.png: No space left on device"):
        save_png(RED, tmp_path / "cat.png", "")

    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_picture_is_saved_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(RED, tmp_path / "cat.png")

    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")

    with pytest.raises(FileError, match=r"notes\.txt is a file: give a folder$"):
        save_png(RED, tmp_path / "notes.txt" / "cat.png")


def test_a_rotated_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    PIL.Image.fromarray(RED).save(tmp_path / "turned.jpg", exif=exif)

    assert read_image(tmp_path / "turned.jpg").shape == (12, 8, 3)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (PIL.Image.new("LA", (4, 4), (0, 255)), (0, 0, 0)),
        (PIL.Image.new("L", (4, 4), 77), (77, 77, 77)),
        (PIL.Image.fromarray(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
        (PIL.Image.new("1", (4, 4), 1), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, picture: PIL.Image.Image, expected: tuple[int, int, int]) -> None:
    picture.save(tmp_path / "picture.png")

    image = read_image(tmp_path / "picture.png")

    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (4, 4, 3)))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("dark16.png", np.array([[0, 200, 65535]], np.uint16), [0, 1, 255]),
        ("darkest16.png", np.array([[0, 100, 200]], np.uint16), [0, 0, 1]),  # 200 * 255 / 65535 = 0.78
        ("grey16.tif", np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),  # 32896 * 255 / 65535 = 128
        ("unit.tif", np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        ("bytes.tif", np.array([[0, 128, 255]], np.float32), [0, 128, 255]),
        ("words.tif", np.array([[0, 32896, 65535]], np.float32), [0, 128, 255]),
        ("larger.tif", np.array([[0, 1e6, 2e6]], np.float32), [0, 128, 255]),
        ("broken.tif", np.array([[-1, np.nan, 0.5, np.inf]], np.float32), [0, 0, 128, 255]),
        ("integers.tif", np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        ("integers16.tif", np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
    ],
)
def test_sixteen_bits_and_floats_are_scaled_to_eight_bits(
    tmp_path: Path, name: str, values: npt.NDArray[Any], expected: list[int]
) -> None:
    PIL.Image.fromarray(values).save(tmp_path / name)

    np.testing.assert_array_equal(read_image(tmp_path / name), np.array(expected)[None, :, None].repeat(3, 2))
    np.testing.assert_array_equal(read_mask(tmp_path / name), np.array(expected)[None] >= 128)


@pytest.mark.parametrize("value", [0, 300, 65535])
def test_a_transparent_value_of_a_sixteen_bit_picture_becomes_white_and_no_other(tmp_path: Path, value: int) -> None:
    """The PNG specification, 11.3.2.1: pixels of exactly this value are transparent, all others are opaque."""
    values = np.array([[0, 256, 300, 32896, 65535]], np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "picture.png", transparency=value)

    expected = np.array([0, 1, 1, 128, 255])  # 256 * 255 / 65535 = 0.996, 300 * 255 / 65535 = 1.17
    expected[values[0] == value] = 255
    np.testing.assert_array_equal(read_image(tmp_path / "picture.png"), expected[None, :, None].repeat(3, 2))


def test_a_folder_is_not_read_as_a_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: pass one picture"):
        open_picture(tmp_path)


def test_a_picture_is_read_from_a_pipe_that_is_named(tmp_path: Path) -> None:
    """As in `--image <(command)`."""
    save_png(RED, tmp_path / "red.png", "")
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb") as pipe:
        pipe.write((tmp_path / "red.png").read_bytes())
        pipe.close()
        np.testing.assert_array_equal(read_image(Path(f"/dev/fd/{reading}")), RED)


def test_a_picture_in_lab_is_read_also_as_a_mask(tmp_path: Path) -> None:
    picture = PIL.Image.new("LAB", (4, 2), (255, 128, 128))  # white
    picture.paste((0, 128, 128), (0, 0, 2, 2))  # black
    picture.save(tmp_path / "lab.tif")

    np.testing.assert_array_equal(read_mask(tmp_path / "lab.tif"), [[False, False, True, True]] * 2)
    np.testing.assert_allclose(read_image(tmp_path / "lab.tif")[0, :, 0], [0, 0, 255, 255], atol=1)


def test_a_mask_is_true_where_it_is_closer_to_white_than_to_black(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "mask.png")

    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), [[False, False, True, True]])


def test_a_path_that_is_not_a_picture_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FileError, match=r"text.png cannot be read as a picture"):
        read_image(tmp_path / "text.png")

    with pytest.raises(UsageError, match="there is no picture"):
        read_image(tmp_path / "absent.png")

    with pytest.raises(UsageError, match="is a folder"):
        read_image(tmp_path)


def test_a_truncated_picture_and_a_decompression_bomb_are_refused(tmp_path: Path) -> None:
    save_png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), tmp_path / "whole.png", "")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError, match=r"half.png cannot be read as a picture"):
        read_image(tmp_path / "half.png")

    PIL.Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    with pytest.raises(
        FileError, match=r"bomb.png is 12000x12000, but may have at most 120000000 pixels: make it smaller"
    ):
        read_image(tmp_path / "bomb.png")

    PIL.Image.new("1", (30_000, 30_000)).save(tmp_path / "bigger.png")
    with pytest.raises(FileError, match=r"bigger.png cannot be read as a picture: .*900000000 pixels"):
        read_image(tmp_path / "bigger.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_damaged_file_is_a_picture_or_a_file_error(tmp_path: Path, format: str) -> None:
    rng = np.random.default_rng(0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / "whole", format, exif=exif)
    intact = np.frombuffer((tmp_path / "whole").read_bytes(), np.uint8)
    for _ in range(100):
        damaged = intact.copy()
        damaged[rng.integers(0, min(len(intact), 300), 4)] = rng.integers(0, 256, 4)
        (tmp_path / "damaged").write_bytes(damaged.tobytes())
        with contextlib.suppress(FileError):
            assert read_image(tmp_path / "damaged").shape[2] == 3


def test_a_picture_that_would_run_another_program_is_refused(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", format="EPS")  # Pillow hands EPS to Ghostscript

    with pytest.raises(
        FileError, match=r"picture.png cannot be read as a picture: its format must be one of PNG, JPEG, WEBP"
    ):
        read_image(tmp_path / "picture.png")


def test_a_picture_of_a_cameras_size_is_read(tmp_path: Path) -> None:
    PIL.Image.new("L", (6000, 4000)).save(tmp_path / "camera.jpg")

    assert read_image(tmp_path / "camera.jpg").shape == (4000, 6000, 3)


def test_resizing_to_the_same_size_returns_the_same_array() -> None:
    assert resized(RED, 12, 8) is RED
    assert resized(RED, 24, 16).shape == (16, 24, 3)
