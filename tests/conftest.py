"""Tiny models of real architecture with random weights: diffusers directories with their own BPE tokenizer."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

# Tracing tiny graphs takes a sixth less time with a large cache in SymPy and none of PyTorch's for operators' shapes.
os.environ.setdefault("SYMPY_CACHE_SIZE", "100000")
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "red",
    "blue",
    "green",
    "star",
    "ring",
    "cat",
    "dog",
    "in",
    "style",
    "and",
    "on",
    "with",
    "painting",
]

LONG = (
    "test_flow_families.py",
    "test_families.py",
    "test_learner_flow.py",
    "test_flux2.py",
    "test_on_a_device.py",
    "test_miniature_training.py",
    "test_shipped_miniature.py",
    "test_precision.py",
    "test_learner_diffusion.py",
    "test_checkpoint.py",
    "test_compress.py",
    "test_search.py",
    "test_precise.py",
    "test_scheduler.py",
)
"""The files that take longest, which run first, so that no process waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eps-prediction Stable Diffusion of toy size: 2 levels, VAE factor 8, width 32, 20 tokens."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", prediction_type="epsilon")


@pytest.fixture(scope="session")
def tiny_v_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like tiny_model_dir, but v-prediction."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-v") / "model", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> Path:
    return tiny_model_dir


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model_dir, exported."""
    return export_tiny(tiny_model_dir, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_v_bundle(tiny_v_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_v_model_dir, exported."""
    return export_tiny(tiny_v_model_dir, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_preview_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny for the latents of tiny_model_dir, which scales them, unlike the published ones."""
    return make_preview_decoder(tmp_path_factory.mktemp("preview") / "tiny", latent_channels=4, scaling_factor=0.5)


@pytest.fixture(scope="session")
def tiny_preview_bundle(tiny_model_dir: Path, tiny_preview_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model_dir, exported with a preview decoder."""
    from tests.bundles import export_once

    path = tmp_path_factory.mktemp("bundle-preview") / "bundle"
    return export_once(tiny_model_dir, path, preview=tiny_preview_dir).bundle.path


def make_preview_decoder(path: Path, **settings: Any) -> Path:
    """An AutoencoderTiny of toy size as a diffusers directory; its pictures have contrast."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(6)
    four = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    tiny = AutoencoderTiny(**four, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, **settings)
    torch.nn.init.normal_(tiny.decoder.layers[-1].weight, 0, 0.5)
    torch.nn.init.constant_(tiny.decoder.layers[-1].bias, 0.5)
    tiny.save_pretrained(path)
    return path


def export_tiny(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.bundles import export_once

    return export_once(model, tmp_path_factory.mktemp("bundle") / "bundle").bundle.path


def make_tiny_model(path: Path, *, prediction_type: str) -> Path:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer_dir = write_tiny_tokenizer(path.parent / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=20)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=20,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(text_encoder.final_layer_norm.bias, 0.1, 0.1)  # in a trained model the mean is not zero
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return path


def write_tiny_tokenizer(folder: Path) -> Path:
    """Writes a byte-level BPE in CLIP's layout: all bytes, all bytes at the end of a word, whole words by merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts[:2] = [parts[0] + parts[1]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 20,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
            }
        )
    )
    return folder
