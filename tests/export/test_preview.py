"""The linear map from latents to RGB, on latents of real pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oneword.export.modules import VaeDecoder, VaeEncoder
from oneword.export.preview import preview_of
from oneword.export.source import load_source
from oneword.runtime.bundle import Bundle
from oneword.runtime.model import Model
from oneword.train.miniature import world


def test_on_scenes_of_the_miniature_a_preview_is_closer_than_the_mean_colour() -> None:
    """The error is at most 30 % of the variance of decoded pictures around their mean colour, both averaged over each
    latent's square (measured: 24 %)."""
    source = load_source("miniature")
    random = np.random.default_rng(0)
    scenes = np.stack([world.render(world.sample_scene(random), seed)[0] for seed in range(24)])
    with torch.no_grad():
        latents = VaeEncoder(source.vae)(torch.from_numpy(scenes))[0]
        decoded = VaeDecoder(source.vae)(latents)[0].permute(0, 3, 1, 2).float() / 255
    pixels = F.avg_pool2d(decoded, decoded.shape[-1] // latents.shape[-1]).permute(0, 2, 3, 1).numpy()
    preview = preview_of(source)
    mapped = latents.permute(0, 2, 3, 1).numpy() @ np.array(preview.weights) + np.array(preview.bias)
    mean = pixels.mean(axis=(1, 2), keepdims=True)  # per picture, a better guess than the mean of all pictures
    ratio = ((mapped.clip(0, 1) - pixels) ** 2).mean() / ((mean - pixels) ** 2).mean()

    assert ratio <= 0.3


def test_the_preview_of_a_linear_decoder_is_that_decoder(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([[0.05, -0.02, 0.01], [0.0, 0.03, 0.02], [-0.04, 0.01, 0.0], [0.02, 0.02, -0.03]])

    class Linear(torch.nn.Module):
        def __init__(self, vae: object) -> None:
            super().__init__()

        def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
            rgb = latents.permute(0, 2, 3, 1) @ weights + 0.5
            return ((rgb * 255).repeat_interleave(8, 1).repeat_interleave(8, 2),)

    monkeypatch.setattr("oneword.export.preview.VaeDecoder", Linear)
    preview = preview_of(load_source(tiny_model_dir))

    np.testing.assert_allclose(preview.weights, weights, atol=2e-6)
    np.testing.assert_allclose(preview.bias, [0.5] * 3, atol=2e-6)


def test_the_model_of_a_bundle_previews_with_its_map(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    preview = Bundle.open(tiny_bundle).manifest.preview
    assert preview is not None
    latents = np.random.default_rng(0).normal(0, 20, (4, 5, 6)).astype(np.float32)
    image = model.preview(latents)

    assert image is not None
    assert (image.dtype, image.shape) == (np.uint8, (5, 6, 3))
    for y, x in ((0, 0), (4, 5), (2, 3)):
        rgb = [
            preview.bias[c] + sum(float(latents[i, y, x]) * preview.weights[i][c] for i in range(4)) for c in range(3)
        ]
        expected = [round(min(max(value, 0), 1) * 255) for value in rgb]
        assert np.abs(image[y, x].astype(int) - expected).max() <= 1
