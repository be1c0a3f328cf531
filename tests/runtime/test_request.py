from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from oneword.engines.errors import BundleError, UsageError
from oneword.runtime.bundle import Bundle
from oneword.runtime.request import Request, resolve
from oneword.runtime.samplers import Sampler

IMAGE = np.zeros((16, 24, 3), np.uint8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be 1 to 1000"),
        ({"steps": 2.5}, r"steps is 2\.5, but must be a whole number"),
        ({"strength": 2}, "strength is 2, but must be 0 to 1"),
        ({"strength": 0.0, "image": IMAGE}, "strength is 0, which changes nothing"),
        ({"num_images": 0}, "num_images is 0, but must be 1 to 1024"),
        ({"seed": -1}, "seed is -1, but must be 0 to"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, but must be 0 to 100"),
        ({"guidance_scale": 100.5}, r"guidance_scale is 100\.5, but must be 0 to 100"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2, but must be 0 to 1"),
        ({"embedded_guidance": 101}, "embedded_guidance is 101, but must be 0 to 50"),
        ({"eta": 1.5}, r"eta is 1\.5, but must be 0 to 1"),
        (
            {"guidance_interval": (0.8, 0.2)},
            r"guidance_interval is 0\.8 to 0\.2, but must start at 0 or more and end higher",
        ),
        ({"guidance_interval": (1, 1)}, "guidance_interval is 1 to 1, but must start at 0 or more and end higher"),
        ({"guidance_interval": (-1, 1)}, "guidance_interval is -1 to 1, but must start at 0 or more and end higher"),
        (
            {"guidance_interval": (0, 10**400)},
            "guidance_interval has more than 300 digits: give a smaller number",
        ),
        ({"guidance_scale": 10**400}, "guidance_scale has more than 300 digits: give a smaller number"),
        (
            {"guidance_interval": (float("nan"), 1)},
            "guidance_interval is nan to 1, but must start at 0 or more and end higher",
        ),
        ({"guidance_interval": 0.5}, r"guidance_interval is 0\.5, but must be two numbers"),
        ({"guidance_interval": ("0", 1)}, "guidance_interval is '0', but must be a number"),
        ({"size": (64,)}, r"size is \(64,\), but must be two whole numbers"),
        ({"size": (64, 64.0)}, r"size is 64\.0, but must be a whole number"),
        ({"sampler": "nonsense"}, "sampler is 'nonsense', but must be one of ddim, ddpm, euler, euler-a, dpmpp-2m, "),
        ({"sampler": 5}, "sampler is 5, but must be one of ddim, "),
        (
            {"spacing": "even"},
            "spacing is 'even', but must be one of karras, exponential, beta, sgm-uniform, ays, ays-xl",
        ),
        ({"guidance": "cfg+"}, r"guidance is 'cfg\+', but must be one of cfg, cfg\+\+, zero-star"),
        ({"previews": -1}, "previews is -1, but must be 0 to 1000"),
        ({"previews": frozenset({2, 1.5})}, "previews is 1.5, but must be a whole number"),
        ({"prompt": None}, "the prompt is None, but must be text"),
        ({"negative_prompt": 5}, "the negative prompt is 5, but must be text"),
        ({"prompt": "a" * 20_001}, "the prompt has 20001 characters, but may have at most 20000: "),
        ({"prompt": "\ud800"}, "the prompt is not valid Unicode"),
        ({"image": IMAGE.astype(np.float32)}, r"image is float32 \[16, 24, 3\], but must be uint8 \[H, W, 3\]"),
        ({"mask": np.ones((16, 24), np.bool_)}, "a mask was given without an image"),
        ({"image": IMAGE, "mask": np.ones((24, 16), np.bool_)}, "the mask is 16x24, the image 24x16"),
        ({"image": IMAGE, "mask": np.zeros((16, 24), np.bool_)}, "the mask is all black"),
        ({"image": IMAGE, "mask": np.full((16, 24), 127, np.uint8)}, "the mask is all black"),
        ({"image": "a.png"}, r"image is of type str, but must be a numpy array of uint8 \[H, W, 3\]"),
        (
            {"image": IMAGE, "mask": [[True]]},
            r"mask is of type list, but must be a numpy array of uint8 or bool \[H, W\]",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_of_error_with_the_allowed_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Request(**{"prompt": "a cat", **settings})

    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_default_sampler_in_the_manifest_is_a_bundle_error(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    defaults = msgspec.structs.replace(manifest.defaults, sampler="nonsense")

    with pytest.raises(
        BundleError, match="names 'nonsense' as the default sampler, but must name one of ddim, ddpm, euler"
    ):
        resolve(Request("a cat"), msgspec.structs.replace(manifest, defaults=defaults))


@pytest.mark.parametrize("sampler", Sampler)
def test_a_sampler_may_be_given_by_name(tiny_bundle: Path, sampler: Sampler) -> None:
    request = Request("a cat", sampler=sampler.value)

    assert request.sampler is sampler
    assert resolve(request, Bundle.open(tiny_bundle).manifest).sampler is sampler


def test_numpys_numbers_are_numbers() -> None:
    numbers: Any = {"seed": np.int64(7), "guidance_scale": np.float32(2), "size": (np.int32(64), np.int32(32))}
    request = Request("a cat", **numbers, previews=frozenset({np.int64(2)}))  # type: ignore[arg-type]

    assert (request.seed, request.guidance_scale, request.size) == (7, 2.0, (64, 32))
    assert request.has_preview(2)
    assert request.size is not None
    assert {type(value) for value in (request.seed, *request.size)} == {int}


def test_a_mask_of_which_nothing_is_left_at_the_pictures_size_is_refused(tiny_bundle: Path) -> None:
    """A line of one pixel between the columns that nearest neighbour takes: 0, 4, 8, ..."""
    mask = np.zeros((256, 256), np.bool_)
    mask[:, 5] = True
    image = np.zeros((256, 256, 3), np.uint8)
    manifest = Bundle.open(tiny_bundle).manifest

    assert resolve(Request("a cat", image=image, mask=mask), manifest).width == 256
    with pytest.raises(UsageError, match="the mask is all black at 64x64, so it would change nothing: paint a larger"):
        resolve(Request("a cat", image=image, mask=mask, size=(64, 64)), manifest)


@pytest.mark.parametrize("sampler", ["ddim", Sampler.DDIM, None])
def test_eta_is_accepted_with_ddim_by_name_by_member_and_by_default(
    tiny_bundle: Path, sampler: Sampler | str | None
) -> None:
    manifest = Bundle.open(tiny_bundle).manifest  # whose default is ddim

    assert resolve(Request("a cat", sampler=sampler, eta=0.5), manifest).sampler is Sampler.DDIM


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "euler", "eta": 0.5}, r"eta is 0\.5 with the sampler euler, but must be 0: only ddim allows more"),
        ({"clip_skip": 3}, "clip_skip is 3, this model allows 0 to 2"),
        ({"size": (60, 64)}, "size 60x64: width must be a multiple of 8, for example 64"),
        ({"size": (0, 64)}, "size 0x64: width must be a multiple of 8, for example 8"),
        ({"size": (32768, 32768)}, "size 32768x32768 has 1073741824 pixels, but may have at most 16777216"),
        ({"image": IMAGE}, "this bundle has no vae_encoder, so it cannot edit pictures: export it again"),
    ],
)
def test_a_setting_that_the_model_does_not_support_is_refused_from_the_manifest_alone(
    tiny_bundle: Path, settings: dict[str, Any], message: str
) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "vae_encoder"}

    with pytest.raises(UsageError, match=message):
        resolve(Request("a cat", **settings), msgspec.structs.replace(manifest, graphs=graphs))


def test_missing_settings_are_the_bundles_defaults_and_an_images_size_is_rounded_down(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    defaults = manifest.defaults

    settings = resolve(Request("a cat"), manifest)
    edit = resolve(Request("a cat", image=np.zeros((70, 87, 3), np.uint8), steps=3), manifest)

    assert (settings.steps, settings.guidance_scale) == (defaults.steps, defaults.guidance_scale)
    assert (settings.width, settings.height) == (defaults.width, defaults.height)
    assert (edit.width, edit.height, edit.steps) == (80, 64, 3)


def test_cfg_pp_has_a_scale_of_its_own(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    settings = resolve(Request("a cat", sampler="euler", guidance="cfg++"), manifest)
    assert settings.guidance_scale == 0.6
    assert settings.schedule.guided.all()
    with pytest.raises(UsageError, match=r"guidance_scale is 7.5 with cfg\+\+, but must be 0 to 2: 0\.6 is usual"):
        resolve(Request("a cat", sampler="euler", guidance="cfg++", guidance_scale=7.5), manifest)


def test_a_spacing_that_the_sampler_does_not_allow_is_refused_before_anything_runs(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="spacing is karras with the sampler ddim, but must be sgm-uniform"):
        resolve(Request("a cat", sampler="ddim", spacing="karras"), Bundle.open(tiny_bundle).manifest)


def test_layers_cannot_be_skipped_if_no_encoder_has_a_choice_of_them(tiny_bundle: Path) -> None:
    """As in FLUX.1, whose CLIP only pools."""
    manifest = Bundle.open(tiny_bundle).manifest
    encoders = tuple(msgspec.structs.replace(e, layers=(), default_layer=None) for e in manifest.encoders)
    manifest = msgspec.structs.replace(manifest, encoders=encoders)

    with pytest.raises(UsageError, match=r"^clip_skip is 2, but must be 0: this model's encoders skip no layers$"):
        resolve(Request("a cat", clip_skip=2), manifest)
    assert resolve(Request("a cat"), manifest).steps == manifest.defaults.steps


def test_the_error_for_a_picture_smaller_than_a_latent_has_its_size(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest

    with pytest.raises(
        UsageError, match=r"^the image is 7x16, but must have at least 8 pixels per side: enlarge it, or"
    ):
        resolve(Request("a cat", image=np.zeros((16, 7, 3), np.uint8)), manifest)
    assert resolve(Request("a cat", image=np.zeros((16, 7, 3), np.uint8), size=(16, 16)), manifest).width == 16
