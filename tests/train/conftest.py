from pathlib import Path

import pytest
from PIL import Image

from oneword.train.miniature import world
from tests.export.conftest import (
    clip_tokenizer_dir,
    tiny_chroma_dir,
    tiny_flux2_dir,
    tiny_flux_dir,
    tiny_ldm_dir,
    tiny_sd3_dir,
    tiny_sdxl_dir,
)

__all__ = [
    "clip_tokenizer_dir",
    "tiny_chroma_dir",
    "tiny_flux2_dir",
    "tiny_flux_dir",
    "tiny_ldm_dir",
    "tiny_sd3_dir",
    "tiny_sdxl_dir",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of one look, as PNG files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, background in enumerate(list(world.BACKGROUNDS)[:5]):
        pixels, _ = world.render(world.Scene((world.Thing(world.HELD_OUT_LOOKS[0]),), background), i)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder
