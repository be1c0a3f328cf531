import time

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFilter
import pytest

from oneword.engines.errors import UsageError
from oneword.runtime.edit import blended, edit_mask, latent_mask, paste, paste_weights
from oneword.runtime.request import Request, ResolvedSettings
from oneword.runtime.samplers import Sampler, Schedule

NO_STEPS = Schedule({}, np.zeros(0, np.bool_), np.zeros(0, np.bool_), 1.0, 1.0, 0.0)


def settings(width: int, height: int) -> ResolvedSettings:
    return ResolvedSettings(1, Sampler.DDIM, 1.0, width, height, NO_STEPS)


def square(side: int, start: int, end: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((side, side), np.bool_)
    mask[start:end, start:end] = True
    return mask


def test_the_blur_of_one_pixel_is_a_gaussian_cut_off_at_two_and_a_half_deviations() -> None:
    mask = np.zeros((9, 9), np.bool_)
    mask[4, 4] = True

    weights = paste_weights(mask, 1.0)

    # exp(-k^2 / 2) for k = 0..3 is 1, 0.606531, 0.135335, 0.011109; their two-sided sum is 2.505950
    line = np.array([0, 0.004433, 0.054006, 0.242036, 0.399050, 0.242036, 0.054006, 0.004433, 0])
    np.testing.assert_allclose(weights, np.outer(line, line), atol=2e-6)


def test_a_straight_edge_is_half_new_between_its_two_pixels() -> None:
    weights = paste_weights(np.arange(40)[None].repeat(40, 0) >= 20, 4.0)

    assert weights[20, 19] + weights[20, 20] == pytest.approx(1, abs=1e-6)
    assert (weights[:, :9] == 0).all()  # int(2.5 * 4 + 0.5) = 10 pixels wide
    assert weights[20, 10] > 0
    np.testing.assert_allclose(weights[:, 31:], 1, atol=1e-6)


@pytest.mark.parametrize("blur", [1.0, 4.0, 9.5])
def test_the_blur_is_close_to_pillows(blur: float) -> None:
    mask = square(128, 50, 78)
    reference = PIL.Image.fromarray(mask.astype(np.uint8) * 255).filter(PIL.ImageFilter.GaussianBlur(blur))

    # Pillow approximates the Gaussian by three box blurs, and does not cut it off.
    np.testing.assert_allclose(paste_weights(mask, blur) * 255, np.asarray(reference), atol=8)


def test_a_mask_that_reaches_the_border_is_whole_there() -> None:
    np.testing.assert_allclose(paste_weights(np.ones((5, 3), np.bool_), 4.0), 1, atol=1e-6)


def test_a_blend_rounds_to_the_nearest_value_and_leaves_0_and_1_exact() -> None:
    image, original = np.full((1, 4, 3), 255, np.uint8), np.full((1, 4, 3), 10, np.uint8)

    mixture = blended(image, original, np.array([[0, 0.5, 0.25, 1]], np.float32))

    assert mixture[0, :, 0].tolist() == [10, 132, 71, 255]  # 132.5 and 71.25


def test_mask_blur_softens_what_is_pasted_and_not_what_is_regenerated() -> None:
    mask = square(64, 16, 48)
    original, image = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
    hard, soft = (Request("", image=original, mask=mask, mask_blur=blur) for blur in (0.0, 4.0))

    hard_picture, soft_picture = (paste(image, request, settings(64, 64)) for request in (hard, soft))

    white = edit_mask(soft, settings(64, 64))
    assert white is not None
    np.testing.assert_array_equal(white, mask)
    np.testing.assert_array_equal(latent_mask(white, 8)[0], square(8, 2, 6))
    assert set(np.unique(hard_picture).tolist()) == {0, 200}
    assert (soft_picture[:5] == 0).all()  # beyond 10 pixels from the edge
    assert (soft_picture[27:37, 27:37] == 200).all()
    assert soft_picture[32, 12:20, 0].tolist() == sorted(set(soft_picture[32, 12:20, 0].tolist()))


def test_without_pasting_there_is_nothing_to_soften() -> None:
    original, image = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 200, np.uint8)
    request = Request("", image=original, mask=square(16, 4, 12), mask_blur=4, paste=False)

    assert paste(image, request, settings(16, 16)) is image


@pytest.mark.parametrize("blur", [-1, 64.5, float("nan")])
def test_a_blur_out_of_range_is_refused(blur: float) -> None:
    with pytest.raises(UsageError, match=r"mask_blur is \S+, but must be 0 to 64"):
        Request("", mask_blur=blur)


@pytest.mark.parametrize("blur", [6.0, 8.0, 20.0, 64.0])
def test_a_large_blur_is_near_the_exact_one(blur: float) -> None:
    mask = np.zeros((200, 230), np.bool_)
    mask[:40, :30] = mask[80:150, 90:200] = mask[170, 40] = True

    np.testing.assert_allclose(paste_weights(mask, blur), exact(mask, blur), atol=0.01)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns", "blur"),
    [
        (128, 104, slice(0, 1), slice(20, 90), 8.0),  # a line at the border, which reflection has once
        (192, 184, slice(78, 83), slice(63, 184), 8.0),
        (440, 296, slice(25, 440), slice(2, 296), 8.0),
        (8, 8, slice(1, 8), slice(1, 8), 10.0),
        (8, 8, slice(1, 8), slice(1, 8), 64.0),
    ],
)
def test_a_large_blur_is_near_the_exact_one_at_borders_and_in_small_pictures(
    height: int, width: int, rows: slice, columns: slice, blur: float
) -> None:
    mask = np.zeros((height, width), np.bool_)
    mask[rows, columns] = True

    np.testing.assert_allclose(paste_weights(mask, blur), exact(mask, blur), atol=0.01)


def exact(mask: npt.NDArray[np.bool_], blur: float) -> npt.NDArray[np.float64]:
    """OpenCV's GaussianBlur, pixel by pixel."""
    radius = int(2.5 * blur + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / blur) ** 2)
    expected = np.pad(mask.astype(float), radius, "reflect")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, kernel / kernel.sum(), "valid")
    return np.asarray(expected, np.float64)


def test_a_large_blur_costs_no_more_than_a_small_one() -> None:
    mask = np.ones((1024, 1024), np.bool_)
    seconds = []
    for blur in (7.9, 64.0):
        start = time.process_time()
        paste_weights(mask, blur)
        seconds.append(time.process_time() - start)

    assert seconds[1] < seconds[0]  # eight times as much, if it were computed pixel by pixel
