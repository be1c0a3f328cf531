import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.train.miniature import world
from oneword.train.pictures import (
    encode_moments,
    near_duplicates,
    nearest_shape,
    random_crops,
    read_picture,
    read_pictures,
    shapes,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def halves(width: int, height: int) -> Image.Image:
    """A picture that is red on the left and blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_a_picture_of_the_models_size_is_read_unchanged(tmp_path: Path) -> None:
    image = noise(64, 64)
    image.save(tmp_path / "a.png")

    picture = read_picture(tmp_path / "a.png", 64)

    np.testing.assert_array_equal(picture.pixels, np.asarray(image))
    assert picture.mask is None
    assert picture.caption is None


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn by 90 degrees clockwise: the left half becomes the upper half
    halves(64, 64).save(tmp_path / "a.png", exif=exif)

    pixels = read_picture(tmp_path / "a.png", 64).pixels

    np.testing.assert_array_equal(pixels[10, 32], [255, 0, 0])
    np.testing.assert_array_equal(pixels[54, 32], [0, 0, 255])


def test_a_wide_picture_is_cropped_around_its_centre(tmp_path: Path) -> None:
    pixels = np.zeros((800, 8000, 3), np.uint8)
    pixels[:, 3500:4500] = [0, 255, 0]
    Image.fromarray(pixels).save(tmp_path / "panorama.png")

    picture = read_picture(tmp_path / "panorama.png", 40)

    np.testing.assert_array_equal(picture.pixels, np.broadcast_to([0, 255, 0], (40, 40, 3)))


def test_transparent_pictures_are_put_on_white_and_alpha_becomes_the_mask(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = [255, 0, 0, 255]
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")

    picture = read_picture(tmp_path / "a.png", 32)

    np.testing.assert_array_equal(picture.pixels[0, 0], [255, 0, 0])
    np.testing.assert_array_equal(picture.pixels[31, 0], [255, 255, 255])
    assert picture.mask is not None
    np.testing.assert_array_equal(picture.mask[[0, 31], 0], [1.0, 0.0])


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    Image.new("RGB", (32, 32), "white").convert(mode).save(tmp_path / name)

    pixels = read_picture(tmp_path / name, 32).pixels

    assert pixels.shape == (32, 32, 3)
    assert pixels.min() >= 254


def test_sixteen_bits_are_scaled_to_eight_not_clipped(tmp_path: Path) -> None:
    grey = np.full((32, 32), 32896, np.uint16)  # 128 / 255 of 65535
    Image.fromarray(grey).save(tmp_path / "a.png")

    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", 32).pixels, 128)


def test_a_dark_picture_of_sixteen_bits_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "a.png")

    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", 32).pixels, 1)


def test_floats_from_zero_to_one_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 128 / 255, np.float32)).save(tmp_path / "a.tif")

    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif", 32).pixels, 128)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame_of_an_animation_is_read(tmp_path: Path, name: str) -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    red.save(tmp_path / name, save_all=True, append_images=[blue], lossless=True)

    np.testing.assert_array_equal(read_picture(tmp_path / name, 32).pixels[0, 0], [255, 0, 0])


def test_a_program_disguised_as_a_picture_is_not_run(tmp_path: Path) -> None:
    """EPS is a program for Ghostscript, and Pillow would run it whatever the file's name is."""
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(all your files) run\n%%EOF\n"
    (tmp_path / "a.png").write_text(program)

    with pytest.raises(FileError, match=r"a\.png cannot be read as a picture: its format must be one of PNG, JPEG"):
        read_picture(tmp_path / "a.png", 64)


def test_an_unusable_picture_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("I am not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    noise(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    noise(1, 1).save(tmp_path / "dot.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 50 KB that would be 1.2 GB

    for name in ("text.png", "empty.png", "cut.jpg", "dot.png", "bomb.png"):
        with pytest.raises(FileError, match=name) as caught:
            read_picture(tmp_path / name, 64)
        assert "\n" not in str(caught.value)


def test_a_missing_or_empty_folder_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("none here")
    with pytest.raises(UsageError, match="has no pictures"):
        read_pictures(tmp_path, 64)
    with pytest.raises(UsageError, match="is not a folder"):
        read_pictures(tmp_path / "nowhere", 64)
    (tmp_path / "phone.HEIC").write_bytes(b"")
    with pytest.raises(UsageError, match=r"has no pictures that can be read: convert phone\.HEIC to PNG or JPEG"):
        read_pictures(tmp_path, 64)


def test_a_captions_byte_order_mark_is_not_part_of_it(tmp_path: Path) -> None:
    noise(32, 32).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a photo of <toy>", encoding="utf-8-sig")
    [picture] = read_pictures(tmp_path, 32)
    assert picture.caption == "a photo of <toy>"


def test_a_pipe_in_a_folder_is_refused(tmp_path: Path) -> None:
    """Nobody writes into it, so that it would be read forever."""
    os.mkfifo(tmp_path / "x.png")

    with pytest.raises(UsageError, match=r"x\.png is not a file: remove it, or put a picture in its place"):
        read_pictures(tmp_path, 64)


def test_a_folder_is_read_in_name_order_with_captions_and_masks(tmp_path: Path) -> None:
    noise(32, 32, 1).save(tmp_path / "b.png")
    noise(32, 32, 2).save(tmp_path / "a.JPG")
    (tmp_path / "b.txt").write_text("a photo  of <toy>\n")
    halves(32, 32).convert("L").point(lambda v: 255 if v > 50 else 0).save(tmp_path / "b.mask.png")
    (tmp_path / ".hidden.png").write_text("not read")

    first, second = read_pictures(tmp_path, 32)

    assert [first.path.name, second.path.name] == ["a.JPG", "b.png"]
    assert second.caption == "a photo of <toy>"
    assert second.mask is not None
    np.testing.assert_array_equal(second.mask[0, [0, 31]], [1.0, 0.0])


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    noise(32, 32).save(tmp_path / "a.png")
    noise(32, 16).save(tmp_path / "a.mask.png")
    with pytest.raises(OnewordError, match=r"a\.mask\.png is 32x16"):
        read_picture(tmp_path / "a.png", 32)


def test_transparent_areas_are_not_learned_even_where_a_mask_is_white(tmp_path: Path) -> None:
    """Each hides one half: a quarter is left."""
    left, top = (Image.new("L", (32, 32)) for _ in range(2))
    left.paste(255, (0, 0, 16, 32))
    top.paste(255, (0, 0, 32, 16))
    picture = noise(32, 32)
    picture.putalpha(left)
    picture.save(tmp_path / "a.png")
    top.save(tmp_path / "a.mask.png")

    [read] = read_pictures(tmp_path, 32)

    expected = np.zeros((32, 32))
    expected[:16, :16] = 1
    assert read.mask is not None
    np.testing.assert_array_equal(read.mask, expected)


@pytest.mark.parametrize("name", ["b.mask.png", "a.mask.jpg", "a.mask.PNG", "a.MASK.png"])
def test_a_mask_that_no_picture_would_use_is_refused_and_not_learned(tmp_path: Path, name: str) -> None:
    noise(32, 32).save(tmp_path / "a.png")
    noise(32, 32).save(tmp_path / name)
    with pytest.raises(FileError, match=rf"{name} is the mask of no picture, but must be named after one"):
        read_pictures(tmp_path, 32)


def test_the_mask_of_a_picture_that_is_skipped_is_skipped_too(tmp_path: Path) -> None:
    noise(32, 32).save(tmp_path / "a.png")
    noise(32, 32).save(tmp_path / "phone.mask.png")
    (tmp_path / "phone.HEIC").write_bytes(b"")

    assert [picture.path.name for picture in read_pictures(tmp_path, 32)] == ["a.png"]


def test_near_duplicates_are_found(tmp_path: Path) -> None:
    photograph, _ = world.render(world.Scene((world.Thing(world.HELD_OUT_LOOKS[0]),), "snow"), 1)
    Image.fromarray(photograph).save(tmp_path / "a.png")
    Image.fromarray(photograph).save(tmp_path / "b.jpg", quality=80)
    halves(64, 64).save(tmp_path / "c.png")

    pairs = near_duplicates(read_pictures(tmp_path, 64))

    assert [(first.name, second.name) for first, second in pairs] == [("a.png", "b.jpg")]


def test_moments_are_the_vaes_scaled_and_mirrored(tmp_path: Path, tiny_model_dir: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_model_dir / "vae")
    noise(32, 32).save(tmp_path / "a.png")
    (picture,) = read_pictures(tmp_path, 32)

    (crop,) = random_crops([picture], 1, 0, 32)

    moments = encode_moments(vae, [picture], [crop], flip=True)

    views = torch.stack([torch.from_numpy(view.pixels.copy()) for view in (picture, crop)])
    views = views.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(torch.cat([views, views.flip(-1)])).latent_dist
    scale = vae.config.scaling_factor
    assert moments.pictures == 1
    torch.testing.assert_close(torch.stack(list(moments.mean)), expected.mean * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(list(moments.std)), expected.std * scale, rtol=1e-4, atol=1e-5)


def test_shapes_are_as_large_as_the_square_allows() -> None:
    """By hand for 64 pixels in steps of 16: 4096 // 48 = 85, so 80; 4096 // 32 = 128, which is twice 64."""
    allowed = shapes(64, 16)

    assert {(64, 64), (48, 80), (80, 48), (32, 128), (128, 32)} <= set(allowed)
    assert all(h * w <= 64 * 64 and h % 16 == w % 16 == 0 and min(h, w) >= 32 for h, w in allowed)
    assert nearest_shape(1.05, allowed) == (64, 64)
    assert nearest_shape(0.6, allowed) == (48, 80)
    assert nearest_shape(0.01, allowed) == (32, 128)


def test_with_buckets_a_picture_keeps_its_aspect_ratio(tmp_path: Path) -> None:
    halves(500, 300).save(tmp_path / "wide.png")
    halves(300, 320).save(tmp_path / "square.png")
    alpha = Image.new("L", (500, 300), 0)
    alpha.paste(255, (250, 0, 500, 300))
    alpha.save(tmp_path / "wide.mask.png")

    square, wide = read_pictures(tmp_path, 64, step=16)

    assert (square.pixels.shape, wide.pixels.shape) == ((64, 64, 3), (48, 80, 3))
    assert wide.mask is not None
    np.testing.assert_array_equal(wide.pixels[0, [0, 79]], [[255, 0, 0], [0, 0, 255]])
    np.testing.assert_array_equal(wide.mask[0, [0, 79]], [0, 1])


def test_crops_are_parts_of_the_picture_and_reproducible(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None] * 2, (100, 100, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    pictures = read_pictures(tmp_path, 50)

    crops = random_crops(pictures, 4, 7, 50)

    assert len(crops) == 4
    spans = [int(crop.pixels[0, -1, 0]) - int(crop.pixels[0, 0, 0]) for crop in crops]
    assert all(0.8 * 190 <= span <= 198 for span in spans)  # the ramp spans 198
    assert len(set(spans)) > 1
    for crop, repeated in zip(crops, random_crops(pictures, 4, 7, 50), strict=True):
        np.testing.assert_array_equal(crop.pixels, repeated.pixels)
