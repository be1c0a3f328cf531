"""Families of transformers trained by flow matching, end to end, against diffusers' own pipelines.

The tokenizers of the tiny models take 20 tokens (CLIP) and 24 (T5). Exporting one takes a minute, so that each is
exported once.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.psnr import psnr
from oneword.engines.errors import ConceptError, UsageError
from oneword.engines.graph import Provider
from oneword.engines.open import Backend
from oneword.export import families
from oneword.export.cli import plan_warnings
from oneword.export.eager import EagerEngine, eager_model
from oneword.export.families import family_of
from oneword.export.pipelines import FLOW_FAMILIES, PIPELINES, UNSUPPORTED
from oneword.export.source import encoders_left_out, load_source
from oneword.export.trace import example_feeds
from oneword.export.write import Exported
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model, check_fits
from oneword.runtime.request import Image, Request
from oneword.runtime.scheduler import Scheduler
from oneword.train.cli import main
from tests.bundles import export_once
from tests.export.conftest import changed_copy, openvino_decibels
from tests.export.operators import attentions_and_norms
from tests.export.pictures import assert_planned, diffusers_picture, picture
from tests.export.test_preview import assert_mapped, assert_previewed

PROMPT = "a photo of the red painting, 7 cats"
WIDTHS = {"text_encoder": 16, "text_encoder_2": 12, "text_encoder_3": 32}


def compared(model: Path, bundle: Path, family: str, **options: Any) -> Exported:
    """The exported model, whose outputs are those of PyTorch."""
    exported = export_once(model, bundle, **options)
    assert exported.family == family
    assert max(difference.value for difference in exported.differences if difference.unit == "relative") <= 1e-4
    return exported


@pytest.fixture(scope="module")
def sd3_bundle(tiny_sd3_dir: Path, flow_preview_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    exported = compared(tiny_sd3_dir, folder / "bundle", "stable-diffusion-3", preview=flow_preview_dir)
    assert plan_warnings(exported) == []
    return exported.bundle.path


@pytest.fixture(scope="module")
def sd3(sd3_bundle: Path) -> Model:
    return Model.open(sd3_bundle, Backend.ONNXRUNTIME, threads=1)


@pytest.fixture(scope="module")
def sd3_without_t5(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("sd3-without-t5") / "bundle"
    exported = compared(tiny_sd3_dir, path, "stable-diffusion-3", without=("text_encoder_3",))
    return Model.open(exported.bundle.path, Backend.ONNXRUNTIME, threads=1)


@pytest.fixture
def sd3_pipeline(tiny_sd3_dir: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir)


@pytest.fixture(scope="module")
def flux_bundle(tiny_flux_dir: Path, flow_preview_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    exported = compared(tiny_flux_dir, folder / "bundle", "flux-1", preview=flow_preview_dir)
    assert plan_warnings(exported) == []
    return exported.bundle.path


@pytest.fixture(scope="module")
def flux(flux_bundle: Path) -> Model:
    return Model.open(flux_bundle, Backend.ONNXRUNTIME, threads=1)


@pytest.fixture
def flux_pipeline(tiny_flux_dir: Path) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(tiny_flux_dir)


@pytest.fixture(scope="module")
def chroma_bundle(tiny_chroma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = compared(tiny_chroma_dir, tmp_path_factory.mktemp("chroma") / "bundle", "chroma")
    assert plan_warnings(exported) == [
        "denoise_step may be slower in TensorRT: attentions with a mask before the softmax: 4 of 4"
    ]
    return exported.bundle.path


@pytest.fixture(scope="module")
def chroma(chroma_bundle: Path) -> Model:
    return Model.open(chroma_bundle, Backend.ONNXRUNTIME, threads=1)


@pytest.fixture
def chroma_pipeline(tiny_chroma_dir: Path) -> Any:
    from diffusers import ChromaPipeline

    return with_masks(ChromaPipeline.from_pretrained(tiny_chroma_dir))


def with_masks(pipeline: Any) -> Any:
    """diffusers adds Chroma's mask of ones and zeros to the scores (its issue 12116); a boolean mask masks."""
    prepare = pipeline._prepare_attention_mask
    pipeline._prepare_attention_mask = lambda **settings: (
        None if settings["attention_mask"] is None else prepare(**settings).bool()
    )
    return pipeline


@pytest.mark.parametrize(
    ("negative_prompt", "guidance_scale", "size"),
    [(None, 1.0, (64, 64)), (None, 7.0, (80, 64)), ("blue dog", 4.0, (48, 112))],
)
def test_sd3_matches_diffusers(
    sd3: Model, sd3_pipeline: Any, negative_prompt: str | None, guidance_scale: float, size: tuple[int, int]
) -> None:
    settings = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
    ours = picture(sd3, PROMPT, size=size, **settings)
    assert psnr(ours, flow_picture(sd3_pipeline, PROMPT, size=size, **settings)) >= 50


@pytest.mark.parametrize("strength", [0.45, 0.75, 1.0])
def test_image_to_image_with_sd3_matches_diffusers(sd3: Model, sd3_pipeline: Any, strength: float) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    settings = {"strength": strength, "guidance_scale": 4.0}
    ours = picture(sd3, PROMPT, image=scene(80, 64), **settings)
    pipeline = StableDiffusion3Img2ImgPipeline(**sd3_pipeline.components)
    theirs = flow_picture(pipeline, PROMPT, image=PIL.Image.fromarray(scene(80, 64)), **settings)
    assert psnr(ours, theirs) >= 50


@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_a_masked_edit_with_sd3_matches_diffusers(sd3: Model, sd3_pipeline: Any, strength: float) -> None:
    from diffusers import StableDiffusion3InpaintPipeline

    settings = {"strength": strength, "guidance_scale": 4.0}
    ours = picture(sd3, PROMPT, image=scene(80, 64), mask=square(80, 64), paste=False, **settings)
    pipeline = StableDiffusion3InpaintPipeline(**sd3_pipeline.components)
    images = {"image": PIL.Image.fromarray(scene(80, 64)), "mask_image": PIL.Image.fromarray(square(80, 64))}
    shift = pipeline.vae.config.shift_factor
    decode = pipeline.vae.decode  # this pipeline leaves out the shift, which the others add
    pipeline.vae.decode = lambda latents, **settings: decode(latents + shift, **settings)
    assert psnr(ours, flow_picture(pipeline, PROMPT, **images, **settings)) >= 50


def test_dpmpp_2m_with_sd3_matches_diffusers(sd3: Model, sd3_pipeline: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    sd3_pipeline.scheduler = DPMSolverMultistepScheduler.from_config(sd3_pipeline.scheduler.config, **config)
    ours = picture(sd3, PROMPT, guidance_scale=4.0, sampler="dpmpp-2m")
    assert psnr(ours, flow_picture(sd3_pipeline, PROMPT, guidance_scale=4.0)) >= 50


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
@pytest.mark.parametrize("size", [(80, 64), (48, 112)])
def test_dpmpp_2m_with_flux_dev_matches_diffusers(flux: Model, flux_pipeline: Any, size: tuple[int, int]) -> None:
    """The pipeline gives any scheduler the shift for the picture's size, which this one refuses for schnell."""
    from diffusers import DPMSolverMultistepScheduler

    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    flux_pipeline.scheduler = DPMSolverMultistepScheduler.from_config(flux_pipeline.scheduler.config, **config)
    ours = picture(flux, PROMPT, size=size, sampler="dpmpp-2m")
    assert psnr(ours, flow_picture(flux_pipeline, PROMPT, size=size, guidance_scale=3.5)) >= 50
    assert psnr(ours, picture(flux, PROMPT, size=size)) < 50  # Euler


def test_sd3_without_t5_attends_to_zeros_in_its_place(sd3_without_t5: Model, sd3_pipeline: Any) -> None:
    sd3_pipeline.text_encoder_3 = sd3_pipeline.tokenizer_3 = None

    ours = picture(sd3_without_t5, PROMPT, guidance_scale=4.0)

    assert "text_encoder_3" not in sd3_without_t5.manifest.graphs
    assert sd3_without_t5.context_length(sd3_without_t5.tokenize("")) == 20 + 256
    assert psnr(ours, flow_picture(sd3_pipeline, PROMPT, guidance_scale=4.0, max_sequence_length=256)) >= 50
    check_fits(concept(*WIDTHS), sd3_without_t5.manifest)  # the vectors for T5 are not used


def test_a_source_can_be_wrapped_twice_in_half_precision(tiny_flux_dir: Path) -> None:
    """`ti-train` learns on one wrapper and draws its samples with another."""
    source = load_source(tiny_flux_dir, torch.bfloat16)
    for model in (eager_model(source), eager_model(source)):
        [result] = draw(model, "a red star", seed=4, steps=1)
        assert result.image.std() > 1


def test_a_text_encoder_that_a_model_needs_cannot_be_left_out(tiny_sd3_dir: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"--without text_encoder: .* StableDiffusion3Pipeline, whose only optional encoder is text_enc",
    ):
        load_source(tiny_sd3_dir, without=["text_encoder"])
    with pytest.raises(UsageError, match=r"--without text_encoder_3: .* StableDiffusionPipeline, it needs all its"):
        load_source(tiny_model_dir, without=["text_encoder_3"])


def test_what_a_bundle_has_left_out_is_known_from_its_encoders(
    tiny_sd3_dir: Path, tiny_flux_dir: Path, tiny_model_dir: Path
) -> None:
    clip = ("text_encoder", "text_encoder_2")

    assert encoders_left_out(str(tiny_sd3_dir), clip) == ("text_encoder_3",)
    assert encoders_left_out(str(tiny_sd3_dir), (*clip, "text_encoder_3")) == ()
    assert encoders_left_out(str(tiny_flux_dir), ("text_encoder", "text_encoder_3")) == ()
    assert encoders_left_out(str(tiny_model_dir), ("text_encoder",)) == ()


def test_a_long_prompt_of_sd3_adds_tokens_to_the_negative_prompt_too(sd3: Model, sd3_pipeline: Any) -> None:
    words = ["red"] * 17 + ["cat", "blue", "dog"]  # 18 tokens of CLIP fit into a chunk, 23 of T5
    chunks = [" ".join(words[:18]), " ".join(words[18:])]
    with torch.no_grad():
        embeds = {
            name: contexts_of(sd3_pipeline, texts, t5_text)
            for name, texts, t5_text in (("", chunks, " ".join(words)), ("negative_", ["", ""], ""))
        }
    settings = {f"{name}prompt_embeds": context for name, (context, _) in embeds.items()}
    settings |= {f"{name}pooled_prompt_embeds": pooled for name, (_, pooled) in embeds.items()}

    ours = picture(sd3, " ".join(words), guidance_scale=4.0)

    assert settings["prompt_embeds"].shape[1] == 2 * 20 + 24
    assert psnr(ours, flow_picture(sd3_pipeline, None, guidance_scale=4.0, **settings)) >= 50


WEIGHTED = "(red:40) painting,[blue] cat"
"""In both tokenizers five tokens, the first of weight 40 and the fourth of 1 / 1.1: the tiny models' pictures depend
little on the prompt."""
PLAIN, WEIGHTS = "red painting, blue cat", (40, 1, 1, 1 / 1.1, 1)


def test_weights_in_a_prompt_of_sd3_scale_the_states_of_all_encoders(sd3: Model, sd3_pipeline: Any) -> None:
    with torch.no_grad():
        context, pooled = contexts_of(sd3_pipeline, [PLAIN], PLAIN, WEIGHTS)
        plain, _ = contexts_of(sd3_pipeline, [PLAIN], PLAIN)
    embeds = {"pooled_prompt_embeds": pooled, "negative_prompt": "", "guidance_scale": 7.0}

    ours = picture(sd3, WEIGHTED, guidance_scale=7.0)

    assert psnr(ours, flow_picture(sd3_pipeline, None, prompt_embeds=context, **embeds)) >= 70
    only_clip = torch.cat([context[:, :20], plain[:, 20:]], dim=1)
    only_t5 = torch.cat([plain[:, :20], context[:, 20:]], dim=1)
    for other in (plain, only_clip, only_t5):
        assert psnr(ours, flow_picture(sd3_pipeline, None, prompt_embeds=other, **embeds)) < 60


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_weights_in_a_prompt_of_flux_scale_the_states_of_t5_alone(flux: Model, flux_pipeline: Any) -> None:
    with torch.no_grad():
        states = flux_pipeline._get_t5_prompt_embeds(PLAIN, max_sequence_length=24)
        pooled = flux_pipeline._get_clip_prompt_embeds(PLAIN)
    settings = {"true_cfg_scale": 40.0, "negative_prompt": "dog", "guidance_scale": 3.5}

    ours = picture(flux, WEIGHTED, negative_prompt="dog", guidance_scale=40.0)

    embeds = {"prompt_embeds": weighted(states, WEIGHTS), "pooled_prompt_embeds": pooled}
    assert psnr(ours, flow_picture(flux_pipeline, None, **embeds, **settings)) >= 50
    assert psnr(ours, flow_picture(flux_pipeline, PLAIN, **settings)) < 50


def test_rows_of_sd3_that_share_a_call_are_those_drawn_alone(sd3: Model) -> None:
    requests = [
        Request(PROMPT, seed=1, steps=4, guidance_scale=4.0),
        Request("a blue dog", seed=2, steps=6, guidance_scale=1.0),
        Request("a ring", "a star", seed=3, steps=5, guidance_scale=7.0, sampler="dpmpp-2m"),
    ]
    assert_drawn_as_alone(sd3, requests)


def test_prompts_of_different_lengths_do_not_share_a_call_in_joint_attention(sd3: Model) -> None:
    scheduler = Scheduler(sd3)
    for prompt in ("a cat", "a dog", "red " * 20):
        scheduler.add(Request(prompt, steps=2, guidance_scale=4.0))
    scheduler.step()

    sizes = {size: len(arena.rows) for size, arena in scheduler.denoiser._arenas.items()}
    assert sizes == {(8, 8, 20 + 24): 2, (8, 8, 2 * 20 + 24): 1}


def test_a_word_of_all_three_encoders_of_sd3_matches_diffusers(sd3: Model, sd3_pipeline: Any, tmp_path: Path) -> None:
    save_concept(concept(*WIDTHS), tmp_path / "toy.safetensors")
    word = load_concept(tmp_path / "toy.safetensors")
    for index, encoder in enumerate(WIDTHS):
        add_word(sd3_pipeline, word, encoder, "" if index == 0 else f"_{index + 1}")

    ours = picture(sd3, "a photo of <toy> on the ring", guidance_scale=4.0, words={"<toy>": word})

    theirs = flow_picture(sd3_pipeline, "a photo of <toy><toy-1> on the ring", guidance_scale=4.0)
    assert psnr(ours, theirs) >= 50


@pytest.mark.parametrize(("provenance", "text"), [({"init": "painting"}, "painting"), ({}, "")])
def test_a_word_of_sdxl_works_in_sd3_and_t5_reads_its_text(
    sd3: Model, sd3_pipeline: Any, tmp_path: Path, provenance: dict[str, str], text: str
) -> None:
    """From a file as tools for SDXL write it, whose name is the word's."""
    in_memory = concept("text_encoder", "text_encoder_2", **provenance)
    clip_l, clip_g = (torch.from_numpy(in_memory.vectors[name].copy()) for name in ("text_encoder", "text_encoder_2"))
    save_file({"clip_g": clip_g, "clip_l": clip_l}, tmp_path / "<toy>.safetensors", provenance)
    word = load_concept(tmp_path / "<toy>.safetensors")
    for encoder, suffix in (("text_encoder", ""), ("text_encoder_2", "_2")):
        add_word(sd3_pipeline, word, encoder, suffix)

    ours = picture(sd3, "a photo of <toy> on the ring", guidance_scale=4.0, words={"<toy>": word})

    prompts = {"prompt_2": "a photo of <toy><toy-1> on the ring", "prompt_3": f"a photo of {text} on the ring"}
    theirs = flow_picture(sd3_pipeline, prompts["prompt_2"], guidance_scale=4.0, **prompts)
    assert psnr(ours, theirs) >= 50
    written = {"guidance_scale": 4.0, "words": {"<toy>": in_memory}}
    np.testing.assert_array_equal(ours, picture(sd3, "a photo of <toy> on the ring", **written))


def test_a_word_without_a_clip_encoder_of_sd3_is_refused(sd3: Model) -> None:
    message = "model's encoders are text_encoder, text_encoder_2, and text_encoder_3 optionally: learn the word for"
    with pytest.raises(ConceptError, match=message):
        sd3.load(concept("text_encoder", "text_encoder_3"))


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_flux_dev_matches_diffusers(flux: Model, flux_pipeline: Any, size: tuple[int, int]) -> None:
    ours = picture(flux, PROMPT, size=size, embedded_guidance=5.0)
    assert psnr(ours, flow_picture(flux_pipeline, PROMPT, size=size, guidance_scale=5.0)) >= 50
    ours = picture(flux, PROMPT, size=size, negative_prompt="blue dog", guidance_scale=2.0)
    guidance = {"true_cfg_scale": 2.0, "negative_prompt": "blue dog", "guidance_scale": 3.5}
    assert psnr(ours, flow_picture(flux_pipeline, PROMPT, size=size, **guidance)) >= 50


@pytest.mark.parametrize("tiny_flux_dir", ["schnell"], indirect=True)
@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_flux_schnell_matches_diffusers(flux: Model, flux_pipeline: Any, size: tuple[int, int]) -> None:
    assert (flux.manifest.defaults.steps, flux.manifest.defaults.guidance_scale) == (4, 1.0)
    ours = picture(flux, PROMPT, size=size, steps=4)
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0}
    assert psnr(ours, flow_picture(flux_pipeline, PROMPT, size=size, **settings)) >= 50
    with pytest.raises(UsageError, match="this model takes no embedded_guidance: use guidance_scale"):
        draw(flux, PROMPT, embedded_guidance=3.5)


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_edits_with_flux_match_diffusers(flux: Model, flux_pipeline: Any) -> None:
    from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline

    settings = {"strength": 0.75, "guidance_scale": 3.5}
    pipelines = [kind(**flux_pipeline.components) for kind in (FluxImg2ImgPipeline, FluxInpaintPipeline)]
    image, mask = scene(80, 64), square(80, 64)
    ours = picture(flux, PROMPT, image=image, strength=0.75)
    theirs = flow_picture(pipelines[0], PROMPT, image=PIL.Image.fromarray(image), **settings)
    assert psnr(ours, theirs) >= 50
    ours = picture(flux, PROMPT, image=image, mask=mask, paste=False, strength=0.75)
    images = {"image": PIL.Image.fromarray(image), "mask_image": PIL.Image.fromarray(mask)}
    assert psnr(ours, flow_picture(pipelines[1], PROMPT, **images, **settings)) >= 50


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_a_word_of_clip_and_t5_in_flux_matches_diffusers(flux: Model, flux_pipeline: Any, tmp_path: Path) -> None:
    save_concept(concept("text_encoder", "text_encoder_3"), tmp_path / "toy.safetensors")
    word = load_concept(tmp_path / "toy.safetensors")
    for name, suffix in (("text_encoder", ""), ("text_encoder_3", "_2")):
        load_rows(flux_pipeline, word.vectors[name], suffix)

    ours = picture(flux, "a photo of <toy> on the ring", words={"<toy>": word})

    assert psnr(ours, flow_picture(flux_pipeline, "a photo of <toy> on the ring")) >= 50


def test_a_learned_word_in_sd3_draws_the_picture_of_diffusers(
    tiny_sd3_dir: Path, sd3: Model, sd3_pipeline: Any, tmp_path: Path
) -> None:
    word = learned_word(tiny_sd3_dir, tmp_path)
    for index, encoder in enumerate(WIDTHS):
        add_word(sd3_pipeline, word, encoder, "" if index == 0 else f"_{index + 1}")

    ours = picture(sd3, "a photo of <toy> on the ring", guidance_scale=4.0, words={"<toy>": word})

    theirs = flow_picture(sd3_pipeline, "a photo of <toy> on the ring", guidance_scale=4.0)
    assert psnr(ours, theirs) >= 50
    assert psnr(ours, picture(sd3, "a photo of star on the ring", guidance_scale=4.0)) < 50  # its init


def test_a_word_learned_without_t5_draws_the_picture_of_diffusers_with_and_without_it(
    tiny_sd3_dir: Path, sd3: Model, sd3_without_t5: Model, sd3_pipeline: Any, tmp_path: Path
) -> None:
    """With T5, that reads the word's init."""
    word = learned_word(tiny_sd3_dir, tmp_path, "--without", "text_encoder_3")
    prompt, written = "a photo of <toy> on the ring", {"words": {"<toy>": word}, "guidance_scale": 4.0}
    assert word.vectors.keys() == {"text_encoder", "text_encoder_2"}
    for encoder, suffix in (("text_encoder", ""), ("text_encoder_2", "_2")):
        add_word(sd3_pipeline, word, encoder, suffix)

    with_t5 = flow_picture(sd3_pipeline, prompt, guidance_scale=4.0, prompt_3="a photo of star on the ring")
    sd3_pipeline.text_encoder_3 = sd3_pipeline.tokenizer_3 = None
    without = flow_picture(sd3_pipeline, prompt, guidance_scale=4.0, max_sequence_length=256)

    assert psnr(picture(sd3, prompt, **written), with_t5) >= 50
    assert psnr(picture(sd3_without_t5, prompt, **written), without) >= 50


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_a_learned_word_in_flux_draws_the_picture_of_diffusers_with_its_loader(
    tiny_flux_dir: Path, flux: Model, flux_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FLUX_SAMPLE_SIZE", 8)
    word = learned_word(tiny_flux_dir, tmp_path)
    rows = load_file(tmp_path / "toy.safetensors")
    for key, suffix in (("clip_l", ""), ("t5xxl", "_2")):
        load_rows(flux_pipeline, rows[key], suffix)

    ours = picture(flux, "a photo of <toy> on the ring", words={"<toy>": word})

    assert psnr(ours, flow_picture(flux_pipeline, "a photo of <toy> on the ring")) >= 50
    assert psnr(ours, picture(flux, "a photo of star on the ring")) < 50  # its init


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_a_word_learned_for_t5_alone_in_flux_draws_the_picture_of_diffusers_with_its_loader(
    tiny_flux_dir: Path, flux_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP reads the word's init. Values of text are larger, since little in the tiny model depends on T5."""
    monkeypatch.setattr(families, "FLUX_SAMPLE_SIZE", 8)
    word = learned_word(tiny_flux_dir, tmp_path, "--set", "encoders=text_encoder_3", "--learning-rate", "2")
    [(key, rows)] = load_file(tmp_path / "toy.safetensors").items()
    assert (key, [*word.vectors]) == ("t5xxl", ["text_encoder_3"])
    load_rows(flux_pipeline, rows, "_2")
    source, init = load_source(tiny_flux_dir), "a photo of star on the ring"
    for network in (source.network, flux_pipeline.transformer):
        network.transformer_blocks[0].attn.add_v_proj.weight.data.mul_(100)
    model = eager_model(source)

    ours = picture(model, "a photo of <toy> on the ring", words={"<toy>": word})

    assert psnr(ours, flow_picture(flux_pipeline, init, prompt_2="a photo of <toy> on the ring")) >= 50
    assert psnr(ours, picture(model, init)) < 50


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_rows_of_flux_that_share_a_call_are_those_drawn_alone(flux: Model) -> None:
    requests = [
        Request(PROMPT, seed=1, steps=4, embedded_guidance=2.0),
        Request("a blue dog", "a ring", seed=2, steps=6, guidance_scale=3.0),
        Request("a ring", seed=3, steps=5, sampler="dpmpp-2m"),
    ]
    assert_drawn_as_alone(flux, requests)


def test_chroma_matches_diffusers_if_it_masks(chroma: Model, chroma_pipeline: Any) -> None:
    """Prompts of different lengths, of one chunk: without guidance, and against an empty and a longer negative one."""
    for prompt, negative_prompt, guidance_scale, size in (
        (PROMPT, None, 1.0, (64, 64)),
        ("a cat", None, 5.0, (80, 64)),
        ("a cat", "blue dog of the red painting", 4.0, (48, 112)),
    ):
        settings = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale, "size": size}
        assert psnr(picture(chroma, prompt, **settings), flow_picture(chroma_pipeline, prompt, **settings)) >= 50


def test_image_to_image_with_chroma_matches_diffusers(chroma: Model, chroma_pipeline: Any) -> None:
    from diffusers import ChromaImg2ImgPipeline

    settings = {"strength": 0.75, "guidance_scale": 4.0}
    ours = picture(chroma, PROMPT, image=scene(80, 64), **settings)
    pipeline = with_masks(ChromaImg2ImgPipeline(**chroma_pipeline.components))
    theirs = flow_picture(pipeline, PROMPT, image=PIL.Image.fromarray(scene(80, 64)), **settings)
    assert psnr(ours, theirs) >= 50


def test_a_word_in_chroma_matches_diffusers(chroma: Model, chroma_pipeline: Any) -> None:
    word = concept("text_encoder_3")
    load_rows(chroma_pipeline, word.vectors["text_encoder_3"], "")

    ours = picture(chroma, "a photo of <toy> on the ring", words={"<toy>": word})

    assert psnr(ours, flow_picture(chroma_pipeline, "a photo of <toy> on the ring")) >= 50
    assert psnr(ours, picture(chroma, "a photo of a painting on the ring")) < 50
    with pytest.raises(ConceptError, match="this model's encoders are text_encoder_3: learn the word for this model"):
        chroma.load(concept("text_encoder"))


def test_a_learned_word_in_chroma_draws_the_picture_of_diffusers_with_its_loader(
    tiny_chroma_dir: Path, chroma: Model, chroma_pipeline: Any, tmp_path: Path
) -> None:
    word = learned_word(tiny_chroma_dir, tmp_path, "--set", "size=64")
    rows = load_file(tmp_path / "toy.safetensors")
    assert list(rows) == ["t5xxl"]
    load_rows(chroma_pipeline, rows["t5xxl"], "")

    ours = picture(chroma, "a photo of <toy> on the ring", words={"<toy>": word})

    assert psnr(ours, flow_picture(chroma_pipeline, "a photo of <toy> on the ring")) >= 50
    assert psnr(ours, picture(chroma, "a photo of star on the ring")) < 50  # its init


def test_rows_of_chroma_that_share_a_call_are_those_drawn_alone(chroma: Model) -> None:
    """Prompts of different lengths, with different masks; one of two chunks in another call."""
    requests = [
        Request(PROMPT, seed=1, steps=4, guidance_scale=1.0, size=(64, 64)),
        Request("a cat", "blue dog of the red painting", seed=2, steps=6, guidance_scale=3.0, size=(64, 64)),
        Request("a ring", seed=3, steps=5, sampler="dpmpp-2m", size=(64, 64)),
        Request(", ".join(["a photo of the red painting"] * 5), seed=4, steps=4, size=(64, 64)),
    ]
    assert_drawn_as_alone(chroma, requests)


def test_what_stands_in_the_padding_of_chroma_does_not_matter(tiny_chroma_dir: Path) -> None:
    """Masked tokens may hold anything, and may as well be missing."""
    [step] = [graph for graph in family_of(load_source(tiny_chroma_dir)).graphs if graph.name == "denoise_step"]
    sizes = {"B": 1, "N": 1, "M": 1, "T": 9, "h": 8, "w": 6}
    feeds = dict(example_feeds(step, sizes, seed=0))
    feeds["context_mask"] = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0]], np.float32)
    engine = EagerEngine(step)
    masked = engine.run(feeds)
    feeds["context"][0, 4:] = 1e3
    for name, expected in masked.items():
        np.testing.assert_allclose(engine.run(feeds)[name], expected, rtol=1e-6, atol=1e-6)
    feeds |= {name: np.ascontiguousarray(feeds[name][:, :4]) for name in ("context", "context_mask")}
    for name, expected in masked.items():
        np.testing.assert_allclose(engine.run(feeds)[name], expected, rtol=1e-4, atol=1e-5)


def test_chroma_in_openvino_is_near_onnxruntime(chroma: Model, chroma_bundle: Path) -> None:
    assert_openvino_is_near(chroma, chroma_bundle, guidance_scale=4.0)


@pytest.mark.plans
def test_every_graph_of_chroma_becomes_a_plan(chroma_bundle: Path) -> None:
    assert_planned(chroma_bundle)


def test_a_draft_of_sd3_matches_diffusers_with_its_small_decoder(
    sd3: Model, sd3_pipeline: Any, flow_preview_dir: Path
) -> None:
    assert_draft_matches(sd3, sd3_pipeline, flow_preview_dir)


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_a_draft_of_flux_matches_diffusers_with_its_small_decoder(
    flux: Model, flux_pipeline: Any, flow_preview_dir: Path
) -> None:
    assert_draft_matches(flux, flux_pipeline, flow_preview_dir)


def test_previews_of_sd3_are_those_of_its_small_decoder_or_of_its_map(
    sd3: Model, sd3_without_t5: Model, flow_preview_dir: Path
) -> None:
    assert_previewed(sd3, flow_preview_dir, size=(80, 64))
    assert not sd3_without_t5.manifest.has_preview_decoder
    assert_mapped(sd3_without_t5)


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_previews_of_flux_are_those_of_its_small_decoder(flux: Model, flow_preview_dir: Path) -> None:
    assert_previewed(flux, flow_preview_dir, size=(80, 64))


def test_sd3_in_openvino_is_near_onnxruntime(sd3: Model, sd3_bundle: Path) -> None:
    assert_openvino_is_near(sd3, sd3_bundle, guidance_scale=4.0)


def test_flux_in_openvino_is_near_onnxruntime(flux: Model, flux_bundle: Path) -> None:
    assert_openvino_is_near(flux, flux_bundle)


@pytest.mark.plans
def test_every_graph_of_sd3_becomes_a_plan(sd3_bundle: Path) -> None:
    assert_planned(sd3_bundle)


@pytest.mark.plans
def test_every_graph_of_flux_becomes_a_plan(flux_bundle: Path) -> None:
    assert_planned(flux_bundle)


@pytest.mark.parametrize("provider", Provider)
def test_attention_and_residual_norms_of_sd3_are_fused(sd3_bundle: Path, provider: Provider) -> None:
    # Three joint attentions and one of the image alone; the norms have no weights. CLIP: three layers, the last sum is
    # normed for the pooled state. T5: two layers, without a mean in their norms.
    assert attentions_and_norms(sd3_bundle, provider) == {
        "text_encoder": (3, 6),
        "text_encoder_2": (3, 6),
        "text_encoder_3": (2, 0),
        "denoise_step": (3 + 1, 0),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
        "vae_preview": (0, 0),
    }


@pytest.mark.parametrize("provider", Provider)
def test_attention_and_residual_norms_of_flux_are_fused(flux_bundle: Path, provider: Provider) -> None:
    # One block with two streams and two with one. CLIP: two layers, of which only the pooled state is used.
    assert attentions_and_norms(flux_bundle, provider) == {
        "text_encoder": (2, 4),
        "text_encoder_3": (2, 0),
        "denoise_step": (1 + 2, 0),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
        "vae_preview": (0, 0),
    }


@pytest.mark.parametrize("provider", Provider)
def test_attention_of_chroma_is_fused(chroma_bundle: Path, provider: Provider) -> None:
    # Two blocks with two streams and two with one, all with a mask. T5: two layers, without a mean in their norms.
    assert attentions_and_norms(chroma_bundle, provider) == {
        "text_encoder_3": (2, 0),
        "denoise_step": (2 + 2, 0),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
    }


@pytest.mark.parametrize("size", [(384, 64), (64, 384)])
def test_the_longest_sides_of_sd3_match_diffusers(sd3: Model, sd3_pipeline: Any, size: tuple[int, int]) -> None:
    ours = picture(sd3, PROMPT, size=size, steps=2, guidance_scale=4.0)
    theirs = flow_picture(sd3_pipeline, PROMPT, size=size, num_inference_steps=2, guidance_scale=4.0)
    assert psnr(ours, theirs) >= 50


def test_sizes_that_sd3_cannot_draw_are_refused(sd3: Model) -> None:
    with pytest.raises(UsageError, match="size 72x64: width must be a multiple of 16, for example 64"):
        draw(sd3, "a cat", size=(72, 64))
    with pytest.raises(UsageError, match="size 400x64: this model allows up to 384 pixels per side"):
        draw(sd3, "a cat", size=(400, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler"},
            "the scheduler is EulerDiscreteScheduler, which is not one of flow",
        ),
        ({"shift_terminal": 0.02}, "shift_terminal = 0.02"),
    ],
)
def test_a_scheduler_that_does_not_suit_sd3_is_refused(
    tiny_sd3_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = changed_copy(tiny_sd3_dir, tmp_path, "scheduler/scheduler_config.json", change)
    shutil.rmtree(model / "transformer")
    with pytest.raises(UsageError, match=message):
        load_source(model)


def test_a_network_that_its_pipeline_does_not_have_is_refused(tiny_model_dir: Path, tiny_sd3_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    object.__setattr__(source, "pipeline", "StableDiffusion3Pipeline")
    with pytest.raises(UsageError, match="has the network UNet2DConditionModel, its pipeline needs SD3Transformer2DM"):
        family_of(source)
    source = load_source(tiny_sd3_dir)
    object.__setattr__(source, "pipeline", "StableDiffusionPipeline")
    with pytest.raises(UsageError, match="has the network SD3Transformer2DModel: give a model with a UNet"):
        family_of(source)


PARTS = ("Combined", "Prior", "Decoder")


def test_every_other_family_that_people_train_is_refused_by_name() -> None:
    """The names are those of diffusers' pipelines."""
    import diffusers

    assert {
        *("Flux2Pipeline", "ZImagePipeline", "QwenImagePipeline"),
        *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "SanaSprintPipeline", "Lumina2Pipeline"),
        *("HiDreamImagePipeline", "Krea2Pipeline", "Ideogram4Pipeline", "ErnieImagePipeline"),
        *("HunyuanVideoPipeline", "LuminaPipeline", "ZImageOmniPipeline", "QwenImageEditPipeline"),
        *(f"{family}{part}Pipeline" for family in ("StableCascade", "Wuerstchen") for part in PARTS),
        *(f"Flux{kind}Pipeline" for kind in ("Fill", "Kontext", "KontextInpaint", "PriorRedux", "Control")),
        *(f"{family}ControlNetPipeline" for family in ("Flux", "StableDiffusion3")),
    } <= UNSUPPORTED.keys()
    assert not PIPELINES.keys() & UNSUPPORTED.keys()
    assert set(PIPELINES.values()) == families.FAMILIES.keys() > set(FLOW_FAMILIES)
    assert [name for name in (*PIPELINES, *UNSUPPORTED) if not hasattr(diffusers, name)] == []


@pytest.mark.parametrize("pipeline", UNSUPPORTED)
def test_other_families_are_refused_with_what_is_missing(tmp_path: Path, pipeline: str) -> None:
    """The folder has no weights."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UsageError, match=f"is a {pipeline}, which needs .*: give a model of a supported family"):
        load_source(tmp_path)


def flow_picture(pipeline: Any, prompt: str | None, size: tuple[int, int] = (80, 64), **settings: Any) -> Image:
    """As `diffusers_picture`, with T5's tokens in the tests."""
    return diffusers_picture(pipeline, prompt, size, **{"max_sequence_length": 24, **settings})


def contexts_of(
    pipeline: Any, clip_texts: list[str], t5_text: str, weights: Sequence[float] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The context and pooled vector of SD3, from diffusers' own encoding of each chunk. The first chunk's first tokens
    have these weights."""
    clip = [pipeline._get_clip_prompt_embeds(clip_texts, clip_model_index=index) for index in (0, 1)]
    hidden = torch.cat([weighted(states, (1, *weights)).flatten(0, 1) for states, _ in clip], dim=-1)[None]
    t5 = weighted(pipeline._get_t5_prompt_embeds(t5_text, max_sequence_length=24), weights)
    hidden = torch.nn.functional.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
    return torch.cat([hidden, t5], dim=1), torch.cat([pooled[:1] for _, pooled in clip], dim=-1)


def weighted(states: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The states [B,T,D] of a prompt whose first tokens have A1111's weights: the first row's mean is restored, as far
    as one of the weights would."""
    row, numbers = states[0], torch.ones(states.shape[1])
    numbers[: len(weights)] = torch.tensor(weights)
    factor = (row.mean() / (row * numbers[:, None]).mean()).clamp(1 / numbers.max(), 1 / numbers.min())
    return torch.cat([(row * numbers[:, None] * factor)[None], states[1:]])


def concept(*encoders: str, **provenance: str) -> Concept:
    """A word of two vectors for each of these encoders."""
    random = np.random.default_rng(0)
    vectors = {name: random.normal(0, 0.5, (2, WIDTHS[name])).astype(np.float32) for name in encoders}
    return Concept("<toy>", vectors, provenance)


def add_word(pipeline: Any, word: Concept, encoder: str, suffix: str) -> None:
    """Adds <toy> and <toy-1> to one encoder of a pipeline, which diffusers cannot load for SD3 itself."""
    tokenizer, model = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
    tokenizer.add_tokens(["<toy>", "<toy-1>"])
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    ids = tokenizer.convert_tokens_to_ids(["<toy>", "<toy-1>"])
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] = torch.from_numpy(word.vectors[encoder].copy())


def load_rows(pipeline: Any, rows: npt.ArrayLike, suffix: str) -> None:
    """Adds <toy> to one encoder of a pipeline with diffusers' own loader."""
    pipeline.load_textual_inversion(
        torch.from_numpy(np.array(rows)),
        token="<toy>",
        text_encoder=getattr(pipeline, f"text_encoder{suffix}"),
        tokenizer=getattr(pipeline, f"tokenizer{suffix}"),
    )


def learned_word(model: Path, folder: Path, *options: str) -> Concept:
    """<toy>, learned by the command from two pictures."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for side in (64, 80):
        PIL.Image.fromarray(scene(side, 64)).save(pictures / f"{side}.png")
    output = folder / "toy.safetensors"
    arguments = [str(pictures), "--model", str(model), "--token", "<toy>", "--init", "star", "--output", str(output)]
    settings = ["--recipe", "fast", "--steps", "5", "--batch-size", "2", "--learning-rate", "0.2"]
    assert main([*arguments, *settings, *options]) == 0
    return load_concept(output)


def scene(width: int, height: int) -> Image:
    y, x = np.mgrid[:height, :width] / 64
    return (np.stack([x, y, (x - 0.5) ** 2 + (y - 0.5) ** 2], axis=-1).clip(0, 1) * 255).astype(np.uint8)


def square(width: int, height: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[16:40, 8:48] = 255
    return mask


def assert_drawn_as_alone(model: Model, requests: list[Request]) -> None:
    """No value of a pixel differs by more than one level."""
    together = draw(model, *requests)
    for request, drawn in zip(requests, together, strict=True):
        [alone] = draw(model, request)
        assert np.abs(drawn.image.astype(int) - alone.image).max() <= 1


def assert_draft_matches(model: Model, pipeline: Any, decoder: Path) -> None:
    from diffusers import AutoencoderTiny

    pipeline.vae = AutoencoderTiny.from_pretrained(decoder)
    ours = picture(model, PROMPT, draft=True)
    settings = {"guidance_scale": model.manifest.defaults.embedded_guidance or model.manifest.defaults.guidance_scale}
    assert psnr(ours, flow_picture(pipeline, PROMPT, **settings)) >= 50
    assert psnr(ours, picture(model, PROMPT)) < 50


def assert_openvino_is_near(model: Model, bundle: Path, **settings: Any) -> None:
    """Its picture is near that of `model`, which runs in ONNX Runtime."""
    decibels = openvino_decibels()
    openvino = Model.open(bundle, Backend.OPENVINO, threads=1)
    assert psnr(picture(model, PROMPT, **settings), picture(openvino, PROMPT, **settings)) >= decibels
