"""The linear map from latents to RGB, on latents of real pictures, and the small decoder that may replace it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from benchmarks.psnr import psnr
from oneword.engines.errors import NotFinite, UsageError
from oneword.export.modules import VaeDecoder, VaeEncoder
from oneword.export.preview import preview_of
from oneword.export.source import load_source
from oneword.export.write import export_bundle
from oneword.runtime.bundle import Bundle
from oneword.runtime.drawing import draw, generate
from oneword.runtime.events import StepDone
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.train.miniature import world
from tests.bundles import export_once
from tests.conftest import make_preview_decoder


@pytest.fixture(scope="module")
def previewing(tiny_preview_bundle: Path) -> Model:
    return Model.open(tiny_preview_bundle, "onnxruntime", threads=1)


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


def test_the_preview_of_a_decoder_in_fp16_is_that_of_its_weights_in_fp32(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    source.vae.half().float()
    preview = preview_of(source)
    source.vae.half()

    assert preview_of(source) == preview
    assert source.vae.dtype == torch.float16


def test_the_preview_of_a_flow_model_includes_the_scale_and_the_shift_of_its_vae(tiny_sd3_dir: Path) -> None:
    source = load_source(tiny_sd3_dir)
    weights = torch.linspace(0.04, 0.08, 16 * 3).reshape(16, 3)

    class Linear(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            rgb = torch.einsum("nchw,cd->ndhw", latents, weights)
            return rgb.repeat_interleave(8, 2).repeat_interleave(8, 3)

    source.vae.decoder = Linear()
    preview = preview_of(source)

    scale, shift = 1.5305, 0.0609  # the decoder's input is latents / scale + shift, its output is from -1 to 1
    np.testing.assert_allclose(preview.weights, weights / scale / 2, atol=8e-4)  # pixels are rounded to 1 / 255
    np.testing.assert_allclose(preview.bias, shift * weights.sum(0) / 2 + 0.5, atol=2e-3)


def test_the_model_of_a_bundle_previews_with_its_map(tiny_bundle: Path) -> None:
    assert_mapped(Model.open(tiny_bundle, "onnxruntime", threads=1))


@pytest.mark.parametrize("size", [(64, 64), (80, 72)])
def test_a_draft_matches_diffusers_with_the_small_decoder(
    previewing: Model, tiny_model_dir: Path, tiny_preview_dir: Path, size: tuple[int, int]
) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 6, "guidance_scale": 5.0, "width": size[0], "height": size[1]}
    ours = [
        draw(previewing, "a red cat", steps=6, guidance_scale=5.0, seed=4, size=size, draft=draft)[0].image
        for draft in (False, True)
    ]
    for image, vae in zip(ours, (pipeline.vae, AutoencoderTiny.from_pretrained(tiny_preview_dir)), strict=True):
        pipeline.vae = vae
        output = pipeline("a red cat", generator=torch.Generator().manual_seed(4), output_type="np", **settings)
        assert psnr(image, (output.images[0] * 255).round()) >= 50
        assert image.std() > 10
    assert psnr(*ours) < 30


def test_previews_are_those_of_diffusers_small_decoder(previewing: Model, tiny_preview_dir: Path) -> None:
    assert_previewed(previewing, tiny_preview_dir, size=(72, 64))
    assert previewing.manifest.preview is not None  # for who decodes nothing


def test_drafts_and_previews_of_sdxl_are_those_of_diffusers_with_its_small_decoder(
    tiny_sdxl_dir: Path, tiny_preview_dir: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionXLPipeline

    bundle = export_once(tiny_sdxl_dir, tmp_path / "bundle", preview=tiny_preview_dir).bundle.path
    model = Model.open(bundle, "onnxruntime", threads=1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl_dir, vae=AutoencoderTiny.from_pretrained(tiny_preview_dir), add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 6, "guidance_scale": 5.0, "width": 80, "height": 64}
    generator = torch.Generator().manual_seed(4)
    expected = pipeline("a red cat", generator=generator, output_type="np", **settings).images[0]

    ours, full = (
        draw(model, "a red cat", steps=6, guidance_scale=5.0, seed=4, size=(80, 64), draft=draft)[0].image
        for draft in (True, False)
    )

    assert psnr(ours, (expected * 255).round()) >= 50
    assert psnr(ours, full) < 30
    assert_previewed(model, tiny_preview_dir, size=(80, 64))


def test_the_small_decoder_has_nothing_to_fuse(tiny_preview_bundle: Path) -> None:
    graph = Bundle.open(tiny_preview_bundle).graph("vae_preview")
    assert (graph.files, graph.fused) == (("vae_preview.onnx",), {})


def test_drafts_and_full_pictures_that_finish_together_each_have_their_decoder(previewing: Model) -> None:
    requests = [Request("a cat", seed=seed, steps=3, draft=draft) for seed, draft in ((1, True), (2, False), (3, True))]
    together = draw(previewing, *requests)
    for request, picture in zip(requests, together, strict=True):
        [alone] = draw(previewing, request)
        assert np.abs(picture.image.astype(int) - alone.image).max() <= 1
        assert ("VAE Decoder: TAESD" in picture.parameters) is request.draft


def test_a_small_decoder_that_gives_nan_is_named(previewing: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = previewing.decode

    def broken(latents: npt.NDArray[np.float32], draft: bool) -> tuple[Image, npt.NDArray[np.bool_]]:
        return decode(latents, draft)[0], np.zeros(len(latents), bool)

    monkeypatch.setattr(previewing, "decode", broken)
    with pytest.raises(NotFinite, match="graph 'vae_preview' produced NaN or infinity for picture 0: export it with"):
        draw(previewing, "a cat", steps=1, draft=True)
    with pytest.raises(NotFinite, match="graph 'vae_preview' produced NaN or infinity: export it with --precision fp"):
        previewing.preview(np.zeros((4, 8, 8), np.float32))


def test_a_bundle_without_a_small_decoder_draws_no_drafts(tiny_bundle: Path) -> None:
    message = "draft needs a preview decoder, which this bundle does not have: leave it out, or export the bundle again"
    with pytest.raises(UsageError, match=message):
        draw(Model.open(tiny_bundle, "onnxruntime", threads=1), "a cat", draft=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_channels": 16}, "its channels of a latent are 16, the model's 4: give the AutoencoderTiny that was"),
        ({"upsampling_scaling_factor": 1}, "its pixels along a latent's side are 1, the model's 8: give the Autoenc"),
        ({"out_channels": 4}, "its channels of a picture are 4, the model's 3: give the AutoencoderTiny that was"),
    ],
)
def test_a_small_decoder_that_does_not_fit_is_refused(
    tiny_model_dir: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    decoder = make_preview_decoder(tmp_path / "decoder", **settings)
    assert_refused(tiny_model_dir, tmp_path, decoder, message)


def test_what_is_not_a_small_decoder_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    message = "is a AutoencoderKL: give a diffusers directory of an AutoencoderTiny, such as TAESD's"
    assert_refused(tiny_model_dir, tmp_path, tiny_model_dir / "vae", message)
    assert_refused(
        tiny_model_dir, tmp_path, tmp_path / "nothing", "has no config.json of a model: give a diffusers dir"
    )


def assert_refused(model: Path, folder: Path, decoder: Path, message: str) -> None:
    """With one line, before a bundle is written."""
    with pytest.raises(UsageError, match=message) as caught:
        export_bundle(model, folder / "bundle", preview=decoder)
    assert str(caught.value).startswith(f"--preview {decoder}")
    assert "\n" not in str(caught.value)
    assert not (folder / "bundle").exists()


def assert_previewed(model: Model, decoder: Path, size: tuple[int, int]) -> None:
    """The preview of a step has the pixels of diffusers' AutoencoderTiny."""
    from diffusers import AutoencoderTiny
    from diffusers.image_processor import VaeImageProcessor

    tiny = AutoencoderTiny.from_pretrained(decoder)
    events = generate(model, [Request("a red cat", steps=4, previews=2, size=size)])
    [latents] = [event.denoised for event in events if isinstance(event, StepDone) and event.denoised is not None]
    with torch.no_grad():
        unscaled = torch.from_numpy(latents)[None] / tiny.config.scaling_factor + tiny.config.shift_factor
        [expected] = VaeImageProcessor().postprocess(tiny.decode(unscaled).sample, output_type="np")

    image = model.preview(latents)

    assert image is not None
    assert image.shape == (size[1], size[0], 3)
    assert image.std() > 10
    assert psnr(image, (expected * 255).round()) >= 50


def assert_mapped(model: Model) -> None:
    """The preview of latents is the manifest's linear map of them, which is computed here by hand."""
    preview, channels = model.manifest.preview, model.manifest.vae.latent_channels
    assert preview is not None
    latents = np.random.default_rng(0).normal(0, 20, (channels, 5, 6)).astype(np.float32)
    image = model.preview(latents)

    assert image is not None
    assert (image.dtype, image.shape) == (np.uint8, (5, 6, 3))
    for y, x in ((0, 0), (4, 5), (2, 3)):
        rgb = [
            preview.bias[c] + sum(float(latents[i, y, x]) * preview.weights[i][c] for i in range(channels))
            for c in range(3)
        ]
        expected = [round(min(max(value, 0), 1) * 255) for value in rgb]
        assert np.abs(image[y, x].astype(int) - expected).max() <= 1
