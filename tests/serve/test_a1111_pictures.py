import numpy as np
import numpy.typing as npt
import pytest

from oneword.serve.a1111.pictures import Crop, covering, filled, filling

Mask = npt.NDArray[np.bool_]


def mask_of(width: int, height: int, left: int, top: int, right: int, bottom: int) -> Mask:
    mask = np.zeros((height, width), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def columns(width: int, height: int) -> npt.NDArray[np.uint8]:
    """A picture whose pixels are the numbers of their columns."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3)).copy()


@pytest.mark.parametrize(
    ("area", "size", "padding", "box"),
    [
        ((40, 40, 60, 60), (64, 64), 0, (40, 40, 60, 60)),
        ((40, 40, 60, 60), (64, 64), 8, (32, 32, 68, 68)),
        ((40, 40, 60, 50), (64, 64), 0, (40, 35, 60, 55)),  # 20x10 grows to 20x20
        ((40, 40, 50, 60), (64, 32), 0, (25, 40, 65, 60)),  # 10x20 grows to 40x20
        ((0, 0, 10, 20), (64, 64), 0, (0, 0, 20, 20)),  # moved into the picture
        ((90, 40, 100, 60), (64, 64), 0, (80, 40, 100, 60)),
        ((0, 40, 100, 60), (64, 64), 4, (0, 0, 100, 80)),  # 100x28 needs a height of 100, the picture has 80
        ((50, 40, 51, 41), (64, 64), 200, (0, 0, 100, 80)),
    ],
)
def test_a_crop_is_the_mask_and_its_padding_in_the_aspect_ratio_of_the_size(
    area: tuple[int, int, int, int], size: tuple[int, int], padding: int, box: tuple[int, int, int, int]
) -> None:
    crop = Crop.around(mask_of(100, 80, *area), columns(100, 80), blur=0, padding=padding, size=size)

    assert (crop.left, crop.top, crop.right, crop.bottom) == box


def test_a_crop_has_room_for_the_blur_of_the_mask() -> None:
    crop = Crop.around(mask_of(100, 80, 40, 30, 60, 50), columns(100, 80), blur=4, padding=0, size=(64, 64))

    # The Gaussian ends after 10 pixels; its outermost weight, 0.0046, is still visible.
    assert (crop.left, crop.top, crop.right, crop.bottom) == (30, 20, 70, 60)


def test_a_crop_contains_a_mask_of_which_a_wide_blur_leaves_nothing() -> None:
    crop = Crop.around(mask_of(100, 80, 50, 40, 51, 41), columns(100, 80), blur=64, padding=4, size=(64, 64))

    assert (crop.left, crop.top, crop.right, crop.bottom) == (46, 36, 55, 45)


def test_pasting_changes_the_mask_only() -> None:
    original, mask = columns(100, 80), mask_of(100, 80, 40, 40, 60, 60)
    crop = Crop.around(mask, original, blur=0, padding=10, size=(64, 64))

    picture = crop.pasted(np.full((64, 64, 3), 250, np.uint8))

    assert (picture[mask] == 250).all()
    np.testing.assert_array_equal(picture[~mask], original[~mask])
    np.testing.assert_array_equal(original, columns(100, 80))


def test_pasting_fades_with_the_blurred_mask() -> None:
    mask = mask_of(100, 80, 40, 0, 100, 80)
    crop = Crop.around(mask, np.zeros((80, 100, 3), np.uint8), blur=4, padding=0, size=(64, 64))

    line = crop.pasted(np.full((64, 64, 3), 200, np.uint8))[40, :, 0].astype(int)

    assert line[39] + line[40] == 200  # the edge is where both halves are equal
    assert 0 < line[35] < line[39] < line[40] < line[45] < 200
    assert line[29] == 0
    assert line[60] == 200


def test_an_unchanged_crop_pastes_back_to_the_original() -> None:
    original, mask = columns(96, 80), mask_of(96, 80, 40, 30, 50, 40)
    crop = Crop.around(mask, original, blur=2, padding=3, size=(64, 64))

    picture = crop.pasted(filling(crop.cut(original), 64, 64))

    assert np.abs(picture.astype(int) - original).max() <= 1  # a ramp, enlarged and made smaller again


def test_cropping_keeps_the_middle_and_filling_repeats_the_border() -> None:
    wide = columns(40, 20)

    np.testing.assert_array_equal(covering(wide, 20, 20), wide[:, 10:30])
    filled = filling(wide, 40, 40)
    np.testing.assert_array_equal(filled[10:30], wide)
    assert (filled[:10] == wide[0]).all()
    assert (filled[30:] == wide[-1]).all()


def test_filling_a_mask_takes_the_colours_around_it() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 0, 0), (0, 0, 100)
    mask = mask_of(64, 64, 16, 16, 48, 48)
    picture[mask] = (0, 255, 0)

    image = filled(picture, mask)

    np.testing.assert_array_equal(image[~mask], picture[~mask])
    assert (image[mask][:, 1] <= 1).all()  # nothing of what was inside, up to rounding
    red, blue = image[32, 17], image[32, 46]
    assert red[0] > 150 > 50 > red[2]
    assert blue[2] > 75 > 50 > blue[0]
    assert abs(int(image[32, 31, 0]) - 100) < 25  # the middle is a mixture


def test_filling_a_mask_without_surroundings_is_grey() -> None:
    image = filled(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.bool_))

    assert (image == 128).all()


@pytest.mark.parametrize("size", [(7, 7), (64, 8), (8, 64), (200, 16), (1, 1)])
@pytest.mark.parametrize("shape", [(20, 40), (1, 1), (3, 200)])
def test_both_resize_modes_give_exactly_the_size(size: tuple[int, int], shape: tuple[int, int]) -> None:
    for resize in (covering, filling):
        assert resize(np.zeros((*shape, 3), np.uint8), *size).shape == (size[1], size[0], 3)
        mask = resize(np.ones(shape, np.bool_), *size)
        assert mask.dtype == np.bool_
        assert mask.shape == (size[1], size[0])
        assert mask.all()
