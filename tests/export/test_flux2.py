"""FLUX.2-klein, end to end, against diffusers' own pipelines. The tokenizer of the tiny model takes 48 tokens."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3Model

from benchmarks.psnr import psnr
from oneword.engines.errors import ConceptError, UsageError
from oneword.engines.graph import Provider
from oneword.engines.open import Backend
from oneword.export.cli import plan_warnings
from oneword.export.eager import eager_model
from oneword.export.qwen3 import Qwen3Encoder, chat_frame
from oneword.export.source import load_source
from oneword.runtime.bundle import Encoder
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.prompt import Tokenizer, Vocabulary, encode_ids
from oneword.runtime.request import Image, Request
from tests.conftest import WORDS
from tests.export.conftest import QWEN_LENGTH, QWEN_TEMPLATE, qwen_tokenizer
from tests.export.operators import attentions_and_norms
from tests.export.pictures import assert_planned, diffusers_picture, picture
from tests.export.test_flow_families import (
    PROMPT,
    add_word,
    assert_drawn_as_alone,
    assert_openvino_is_near,
    compared,
    learned_word,
    scene,
)

JOINED = "the tokenizer does not split the prompt from its chat template: give a model with Qwen3's own"
ONLY_BASE = pytest.mark.parametrize("tiny_flux2_dir", ["base"], indirect=True)


@pytest.fixture(scope="module")
def bundle(tiny_flux2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = compared(tiny_flux2_dir, tmp_path_factory.mktemp("flux2") / "bundle", "flux-2-klein")
    assert plan_warnings(exported) == []
    return exported.bundle.path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Model.open(bundle, Backend.ONNXRUNTIME, threads=1)


@pytest.fixture
def pipeline(tiny_flux2_dir: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline.from_pretrained(tiny_flux2_dir)


def theirs(pipeline: Any, prompt: str, **settings: Any) -> Image:
    return diffusers_picture(pipeline, prompt, **{"max_sequence_length": QWEN_LENGTH, **settings})


@ONLY_BASE
@pytest.mark.parametrize(
    ("prompt", "guidance_scale", "size", "steps"),
    [(PROMPT, 1.0, (64, 64), 6), (PROMPT, 4.0, (80, 64), 6), ("\n a ring <|im_end|>", 3.0, (48, 112), 3)],
)
def test_klein_matches_diffusers(
    model: Model, pipeline: Any, prompt: str, guidance_scale: float, size: tuple[int, int], steps: int
) -> None:
    settings = {"guidance_scale": guidance_scale, "size": size}
    expected = theirs(pipeline, prompt, num_inference_steps=steps, **settings)
    assert psnr(picture(model, prompt, steps=steps, **settings), expected) >= 50


@ONLY_BASE
def test_a_negative_prompt_is_that_of_the_second_branch(model: Model, pipeline: Any) -> None:
    negative, _ = pipeline.encode_prompt("a blue dog", max_sequence_length=QWEN_LENGTH)
    expected = theirs(pipeline, PROMPT, guidance_scale=4.0, negative_prompt_embeds=negative)
    assert psnr(picture(model, PROMPT, negative_prompt="a blue dog", guidance_scale=4.0), expected) >= 50


@pytest.mark.parametrize("tiny_flux2_dir", ["distilled"], indirect=True)
def test_distilled_klein_takes_few_steps_without_guidance(tiny_flux2_dir: Path, pipeline: Any) -> None:
    model = eager_model(load_source(tiny_flux2_dir))
    defaults = model.manifest.defaults
    assert (defaults.width, defaults.height, defaults.steps, defaults.guidance_scale) == (1024, 1024, 4, 1.0)
    assert psnr(picture(model, PROMPT, steps=4), theirs(pipeline, PROMPT, num_inference_steps=4)) >= 50


@ONLY_BASE
@pytest.mark.parametrize("masked", [False, True])
def test_edits_are_those_of_diffusers_without_its_reference_picture(model: Model, pipeline: Any, masked: bool) -> None:
    """Flux2KleinInpaintPipeline also shows the network the given picture as a reference. Without a mask, all is new."""
    from diffusers import Flux2KleinInpaintPipeline

    edit = Flux2KleinInpaintPipeline(**pipeline.components)
    edit.prepare_image_latents = lambda images, batch_size, *_: (
        torch.zeros(batch_size, 0, 16),
        torch.zeros(batch_size, 0, 4),
    )
    image, mask = scene(80, 64), np.full((64, 80), 255, np.uint8)
    settings = {"guidance_scale": 4.0, "strength": 0.75}
    if masked:
        mask[:16] = mask[48:] = mask[:, :32] = 0
    ours = picture(model, PROMPT, image=image, **settings, **({"mask": mask, "paste": False} if masked else {}))
    images = {"image": PIL.Image.fromarray(image), "mask_image": PIL.Image.fromarray(mask)}
    assert psnr(ours, theirs(edit, PROMPT, **images, **settings)) >= 50


@ONLY_BASE
def test_dpmpp_2m_matches_diffusers(model: Model, pipeline: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **config)
    ours = picture(model, PROMPT, guidance_scale=4.0, sampler="dpmpp-2m")
    assert psnr(ours, theirs(pipeline, PROMPT, guidance_scale=4.0)) >= 50


@ONLY_BASE
def test_rows_that_share_a_call_are_those_drawn_alone(model: Model) -> None:
    """One prompt has two chunks, and is in another call."""
    requests = [
        Request(PROMPT, seed=1, steps=4, guidance_scale=4.0, size=(64, 64)),
        Request("a blue dog", seed=2, steps=6, guidance_scale=1.0, size=(64, 64)),
        Request("a ring", "a star", seed=3, steps=5, guidance_scale=7.0, sampler="dpmpp-2m", size=(64, 64)),
        Request("a photo of the red painting, " * 6, seed=4, steps=4, guidance_scale=4.0, size=(64, 64)),
    ]
    assert_drawn_as_alone(model, requests)


@ONLY_BASE
def test_openvino_is_near_onnxruntime(model: Model, bundle: Path) -> None:
    assert_openvino_is_near(model, bundle, guidance_scale=4.0)


@ONLY_BASE
@pytest.mark.parametrize("provider", Provider)
def test_attention_of_klein_is_fused(bundle: Path, provider: Provider) -> None:
    # One block with two streams and two with one. Qwen3: the 27 layers before the last state that is read; they and
    # the blocks have norms without a mean or without weights.
    assert attentions_and_norms(bundle, provider) == {
        "text_encoder_qwen3": (27, 0),
        "denoise_step": (1 + 2, 0),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
    }


@ONLY_BASE
@pytest.mark.plans
def test_every_graph_becomes_a_plan(bundle: Path) -> None:
    assert_planned(bundle)


@ONLY_BASE
def test_weights_are_refused_and_brackets_can_be_written(model: Model, pipeline: Any) -> None:
    for prompt in ("a (red) ring", "a [red] ring", "(red:1.3)"):
        with pytest.raises(UsageError, match=r"of 'red': this model's prompts take no weights, write \\\( \\\)"):
            draw(model, prompt, steps=1)
    ours = picture(model, r"a \(red\) \[ring\]", guidance_scale=1.0)
    assert psnr(ours, theirs(pipeline, "a (red) [ring]", guidance_scale=1.0)) >= 50


@ONLY_BASE
def test_a_word_matches_diffusers(model: Model, pipeline: Any, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(0, 0.5, (2, 32)).astype(np.float32)
    save_concept(Concept("<toy>", {"text_encoder_qwen3": vectors}), tmp_path / "toy.safetensors")
    assert list(load_file(tmp_path / "toy.safetensors")) == ["qwen3_4b"]
    word = load_concept(tmp_path / "toy.safetensors")
    add_word(pipeline, word, "text_encoder_qwen3", "")

    for prompt in ("a photo of <toy> on the ring", "<toy>", " <toy> <toy> cat"):
        ours = picture(model, prompt, guidance_scale=4.0, words={"<toy>": word})
        expected = theirs(pipeline, prompt.replace("<toy>", "<toy><toy-1>"), guidance_scale=4.0)
        assert psnr(ours, expected) >= 50
    assert psnr(ours, picture(model, "star star cat", guidance_scale=4.0)) < 50
    with pytest.raises(ConceptError, match="encoders are text_encoder_qwen3: learn the word for this model"):
        model.load(Concept("<dog>", {"text_encoder": vectors}))


@ONLY_BASE
def test_a_learned_word_draws_the_picture_of_diffusers(
    tiny_flux2_dir: Path, model: Model, pipeline: Any, tmp_path: Path
) -> None:
    word = learned_word(tiny_flux2_dir, tmp_path, "--set", "size=64")
    add_word(pipeline, word, "text_encoder_qwen3", "")

    ours = picture(model, "a photo of <toy> on the ring", guidance_scale=4.0, words={"<toy>": word})

    assert psnr(ours, theirs(pipeline, "a photo of <toy> on the ring", guidance_scale=4.0)) >= 50
    assert psnr(ours, picture(model, "a photo of star on the ring", guidance_scale=4.0)) < 50  # its init


def test_the_ids_of_two_thousand_prompts_with_words_are_those_of_transformers() -> None:
    """Whatever a prompt contains, tokens of the template included."""
    length, reference = 128, qwen_tokenizer(model_max_length=128)
    prefix, suffix = chat_frame(reference)
    encoder = Encoder(
        graph="text_encoder_qwen3", table="", tokenizer="", vocab_size=len(reference), width=4, hidden_width=12,
        length=length, bos_id=None, eos_id=reference.eos_token_id, pad_id=reference.pad_token_id, layers=(),
        default_layer=None, masks_padding=True, weighs_tokens=False, prefix=prefix, suffix=suffix,
    )  # fmt: skip
    ours = Tokenizer(tokenizers.Tokenizer.from_str(reference.backend_tokenizer.to_str()), encoder)
    vectors = {"<toy>": 1, "<cat-toy>": 2}
    words = {
        name: Concept(name, {"text_encoder_qwen3": np.full((n, 4), 0.1 * n, np.float32)}) for name, n in vectors.items()
    }
    pieces = {name: [f"<{n}-{i}>" for i in range(n)] for name, n in vectors.items()}
    reference.add_tokens([*pieces["<toy>"], *pieces["<cat-toy>"]])
    choose = random.Random(0)
    fragments = [*WORDS, *words, "Éclair", "☃", "7", ", ", ".", "'s", "\n", "\n\n", "\t", "  ", "user", "assistant"]
    fragments += ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"]

    for _ in range(2000):
        prompt = "".join(choose.choice(fragments) + choose.choice(("", " ", " ")) for _ in range(choose.randint(0, 12)))
        text = prompt
        for name, names in pieces.items():
            text = text.replace(name, "".join(names))
        message = [{"role": "user", "content": text}]
        templated = reference.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        expected = reference(templated, padding="max_length", max_length=length, truncation=True)
        chunks = encode_ids(prompt, ours, Vocabulary(words), "text_encoder_qwen3")
        numbers = reference.convert_tokens_to_ids([piece for c in chunks.concepts for piece in pieces[c.token]])
        ids = [id_ if id_ >= 0 else numbers[-1 - id_] for id_ in chunks.input_ids[0].tolist()]
        assert ids == expected.input_ids, prompt
        assert chunks.eos_index.tolist() == [sum(expected.attention_mask) - 1], prompt
        assert len(chunks.input_ids) == 1


def test_qwen3_encodes_as_transformers_does() -> None:
    """Groups of heads that share keys, and padding that attends to the prompt alone; in float32 and in bfloat16."""
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=28, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3Model(config).eval().requires_grad_(False)
    ids, last = torch.randint(0, 50, (3, 11)), torch.tensor([10, 6, 0])
    mask = (torch.arange(11) <= last[:, None]).long()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model.to(dtype)
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        expected = torch.cat([hidden[layer] for layer in (9, 18, 27)], dim=-1).float()
        encoder = Qwen3Encoder(model)
        states, finite = encoder(ids, encoder.table.float(), last)
        assert finite.all()
        assert (states - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "the tokenizer has no chat template that can be used"),
        ({"chat_template": "{{ messages[0].content | trim }}"}, "the tokenizer's chat template changes the prompt"),
        ({"chat_template": QWEN_TEMPLATE.replace("+ '<|im_end|>", "+ '\\n<|im_end|>")}, JOINED),
        ({"chat_template": QWEN_TEMPLATE.replace("+ '<|im_end|>", "+ 'ing<|im_end|>")}, JOINED),  # as in "painting"
        ({"bos_token": "<|im_start|>"}, JOINED),  # which it does not add to a prompt
        ({"padding_side": "left"}, "the tokenizer pads on the left"),
    ],
)
def test_a_tokenizer_that_frames_prompts_otherwise_is_refused(change: dict[str, Any], message: str) -> None:
    tokenizer = qwen_tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(UsageError, match=message):
        chat_frame(tokenizer)


def test_a_qwen3_that_cannot_be_the_encoder_is_refused() -> None:
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    with pytest.raises(UsageError, match=r"has 27 layers, FLUX\.2 reads states up to 27, before the last"):
        Qwen3Encoder(Qwen3Model(Qwen3Config(**small, num_key_value_heads=1, num_hidden_layers=27)))
