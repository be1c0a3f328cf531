"""Pipelines of Stable Diffusion 1.5's and SDXL's architecture with random weights, as diffusers directories.

Their tokenizer is the miniature's, whose first words are those of the benchmarks' prompts. Pictures are noise, so such
a model shows time, memory and differences of arithmetic, not quality. Weights are in float16, as most checkpoints are
published: programs that keep them so and programs that expand them to float32 compute with the same numbers. Their
names are those of published checkpoints too.
"""

import importlib.resources
import sys
from pathlib import Path
from typing import Any

from benchmarks.architectures import CONFIGS


def save_sd15(path: str, dtype: str = "float16") -> None:
    """1.07 billion parameters."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(sample_size=512),
        text_encoder=_text_encoder(768, 12, 12),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(**CONFIGS["sd15"]),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(getattr(torch, dtype)).save_pretrained(path)


def save_sdxl(path: str) -> None:
    """3.5 billion parameters, made in float16, which halves the memory to make them."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    StableDiffusionXLPipeline(
        vae=_vae(sample_size=1024, scaling_factor=0.13025),
        text_encoder=_text_encoder(768, 12, 12),
        text_encoder_2=_text_encoder(1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=UNet2DConditionModel(**CONFIGS["sdxl"]),
        scheduler=_scheduler(),
    ).save_pretrained(path)


def _vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        **settings,
    )


def _text_encoder(width: int, layers: int, heads: int, **settings: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=77,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
        **settings,
    )
    return (CLIPTextModelWithProjection if "projection_dim" in settings else CLIPTextModel)(config)


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    folder = importlib.resources.files("oneword") / "miniature" / "tokenizer"
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _name_as_published(folder: Path) -> None:
    """Adds `text_model.` to the names of a text encoder's tensors, which transformers 5 leaves out when it saves them:
    stable-diffusion.cpp recognizes a model by the longer ones."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {
        name if name.startswith("text_projection") else f"text_model.{name}": tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})


if __name__ == "__main__":
    {"sd15": save_sd15, "sdxl": save_sdxl}[sys.argv[1]](sys.argv[2])
    for encoder in Path(sys.argv[2]).glob("text_encoder*"):
        _name_as_published(encoder)
