from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from oneword.engines.errors import BundleError, UsageError
from oneword.runtime.bundle import Bundle
from oneword.runtime.request import Request, settle

IMAGE = np.zeros((16, 24, 3), np.uint8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, allowed is 1 to 1000"),
        ({"steps": 2.5}, r"steps is 2\.5, allowed is a whole number"),
        ({"strength": 2}, "strength is 2, allowed is 0 to 1"),
        ({"strength": 0.0, "image": IMAGE}, "strength is 0, which changes nothing"),
        ({"num_images": 0}, "num_images is 0, allowed is 1 to 1024"),
        ({"seed": -1}, "seed is -1, allowed is 0 to"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, allowed is 0 to 100"),
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval is 0\.2, allowed is 0\.8 to"),
        ({"prompt": "a" * 20_001}, "the prompt has 20001 characters, allowed are 20000"),
        ({"prompt": "\ud800"}, "the prompt is not valid Unicode"),
        ({"image": IMAGE.astype(np.float32)}, r"image is float32 \[16, 24, 3\], allowed is uint8 \[H, W, 3\]"),
        ({"mask": np.ones((16, 24), np.bool_)}, "a mask was given without an image"),
        ({"image": IMAGE, "mask": np.ones((24, 16), np.bool_)}, "the mask is 16x24, the image 24x16"),
        ({"image": IMAGE, "mask": np.zeros((16, 24), np.bool_)}, "the mask is all black"),
    ],
)
def test_a_wrong_setting_is_one_line_with_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Request(**{"prompt": "a cat", **settings})

    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_default_that_the_manifest_misspells_is_the_bundles_fault(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    defaults = msgspec.structs.replace(manifest.defaults, sampler="heun")

    with pytest.raises(BundleError, match="names the sampler 'heun' as default, there are ddim, ddpm, euler"):
        settle(Request("a cat"), msgspec.structs.replace(manifest, defaults=defaults))
