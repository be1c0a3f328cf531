"""Tiny random models of the families' real architectures, as diffusers directories."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WORDS, make_preview_decoder


@pytest.fixture(scope="session")
def clip_tokenizer_dir(tiny_model_dir: Path) -> Path:
    """The tokenizer of the tiny Stable Diffusion."""
    return tiny_model_dir / "tokenizer"


@pytest.fixture(scope="session")
def tiny_sd2_dir(tmp_path_factory: pytest.TempPathFactory, clip_tokenizer_dir: Path) -> Path:
    """Stable Diffusion 2.1: v-prediction, linear projections, attention in float32, padding with "!", and an OpenCLIP
    encoder without its last layer, so that its penultimate state is the last."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(clip_tokenizer_dir, pad_token="!")
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=with_a_mean(CLIPTextModel(clip_config(tokenizer, width=24, layers=2, hidden_act="gelu"))),
        tokenizer=tokenizer,
        unet=tiny_unet(24, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True),
        scheduler=DDIMScheduler(**BETAS, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipeline, tmp_path_factory.mktemp("sd2") / "model")


@pytest.fixture(scope="session")
def tiny_sdxl_dir(tmp_path_factory: pytest.TempPathFactory, clip_tokenizer_dir: Path) -> Path:
    """SDXL: a CLIP and an OpenCLIP encoder, pooled vectors and time ids, Euler."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    first, second = clip_tokenizer(clip_tokenizer_dir), clip_tokenizer(clip_tokenizer_dir, pad_token="!")
    unet = tiny_unet(
        16 + 24,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    beta = {key: value for key, value in BETAS.items() if key not in ("clip_sample", "set_alpha_to_one")}
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=with_a_mean(CLIPTextModel(clip_config(first, width=16, layers=3, hidden_act="quick_gelu"))),
        text_encoder_2=with_a_mean(
            CLIPTextModelWithProjection(clip_config(second, width=24, layers=3, hidden_act="gelu", projection_dim=20))
        ),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**beta, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return saved(pipeline, tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="session", params=["AutoencoderKL", "VQModel"])
def tiny_ldm_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LDM text-to-image: LDMBert over WordPiece, with the released model's AutoencoderKL or a VQModel."""
    return make_tiny_ldm(tmp_path_factory.mktemp("ldm") / "model", request.param)


def make_tiny_ldm(path: Path, autoencoder: str) -> Path:
    import torch
    from diffusers import DDIMScheduler, LDMTextToImagePipeline, VQModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    torch.manual_seed(3)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["a", "photo", "of", "the", "red", "blue", "cat", "dog", "paint"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words[1:], "##ing", "##s", "##t"]
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512})
    )
    config = LDMBertConfig(
        vocab_size=len(vocabulary) + 3, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, head_dim=8, max_position_embeddings=77,
    )  # fmt: skip
    bert = LDMBertModel(config)
    torch.nn.init.normal_(bert.model.layer_norm.bias, 0.1, 0.1)
    unet = tiny_unet(24, attention_head_dim=4)  # before the autoencoder, so that both models share it
    if autoencoder == "VQModel":
        vqvae: Any = VQModel(
            block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, num_vq_embeddings=64,
        )  # fmt: skip
        torch.nn.init.normal_(vqvae.quantize.embedding.weight, 0, 3)  # codes in the range of the latents
    else:
        vqvae = tiny_vae()
    pipeline = LDMTextToImagePipeline(
        vqvae=vqvae,
        bert=bert,
        tokenizer=BertTokenizer.from_pretrained(path.parent),
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )
    return saved(pipeline, path)


@pytest.fixture(scope="session")
def tiny_sd3_dir(tmp_path_factory: pytest.TempPathFactory, clip_tokenizer_dir: Path) -> Path:
    """Stable Diffusion 3.5: two CLIP encoders, T5, joint attention with a second image attention in one layer."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(4)
    first, second = clip_tokenizer(clip_tokenizer_dir), clip_tokenizer(clip_tokenizer_dir, pad_token="!")
    third = t5_tokenizer(model_max_length=24)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=36, out_channels=16,
        pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=with_a_mean(
            CLIPTextModelWithProjection(
                clip_config(first, width=16, layers=3, hidden_act="quick_gelu", projection_dim=16)
            )
        ),
        tokenizer=first,
        text_encoder_2=with_a_mean(
            CLIPTextModelWithProjection(clip_config(second, width=12, layers=3, hidden_act="gelu", projection_dim=20))
        ),
        tokenizer_2=second,
        text_encoder_3=t5(third, width=32),
        tokenizer_3=third,
    )
    return saved(pipeline, tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="session", params=["dev", "schnell"])
def tiny_flux_dir(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip_tokenizer_dir: Path
) -> Path:
    """FLUX.1: a CLIP encoder that only pools, and T5."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(5)
    dev = request.param == "dev"
    first, second = clip_tokenizer(clip_tokenizer_dir), t5_tokenizer(model_max_length=24)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=dev, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if dev else {"shift": 1.0}
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=flow_vae(),
        text_encoder=with_a_mean(CLIPTextModel(clip_config(first, width=16, layers=2, hidden_act="quick_gelu"))),
        tokenizer=first,
        text_encoder_2=t5(second, width=32),
        tokenizer_2=second,
    )
    return saved(pipeline, tmp_path_factory.mktemp(f"flux-{request.param}") / "model")


@pytest.fixture(scope="session")
def tiny_chroma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chroma: T5 alone, modulation by an approximator, a static shift."""
    import torch
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(6)
    tokenizer = t5_tokenizer(model_max_length=24)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=2,
    )  # fmt: skip
    pipeline = ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=t5(tokenizer, width=32),
        tokenizer=tokenizer,
    )
    return saved(pipeline, tmp_path_factory.mktemp("chroma") / "model")


@pytest.fixture(scope="session", params=["base", "distilled"])
def tiny_flux2_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.2-klein: Qwen3 with a chat template, latents in normalised squares, a shift by size and steps."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    tokenizer = qwen_tokenizer(model_max_length=QWEN_LENGTH)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=28,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    for name, weight in transformer.named_parameters():  # so that pictures depend on the prompt
        if "norm_" in name:
            torch.nn.init.constant_(weight, 3)
        elif name == "context_embedder.weight" or "add_v_proj" in name:
            torch.nn.init.normal_(weight)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=64
    )
    torch.nn.init.normal_(vae.bn.running_mean, 0, 0.5)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 4)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=with_larger_rows(Qwen3ForCausalLM(config)),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=request.param == "distilled",
    )
    return saved(pipeline, tmp_path_factory.mktemp(f"flux2-{request.param}") / "model")


@pytest.fixture(scope="session")
def flow_preview_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny for the latents of the tiny Stable Diffusion 3 and FLUX.1, with a scale and a shift."""
    path = tmp_path_factory.mktemp("flow-preview") / "tiny"
    return make_preview_decoder(path, latent_channels=16, scaling_factor=0.5, shift_factor=0.25)


BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def saved(pipeline: Any, path: Path) -> Path:
    pipeline.save_pretrained(path)
    return path


def changed_copy(model: Path, folder: Path, file: str, change: Mapping[str, object]) -> Path:
    """A copy of a model in `folder`, with other settings in one of its JSON files."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return copy


def clip_tokenizer(folder: Path, **settings: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, **settings)


def clip_config(tokenizer: Any, *, width: int, layers: int, **settings: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def with_a_mean(model: Any) -> Any:
    """A trained model's states have a mean; a fresh layer norm has none."""
    import torch

    torch.nn.init.normal_(getattr(model, "text_model", model).final_layer_norm.bias, 0.1, 0.1)
    return model


def tiny_unet(context: int, **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=context, **{**blocks, **settings},
    )  # fmt: skip


def tiny_vae(**settings: Any) -> Any:
    """Equal for equal settings, so that models share its graphs."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(8)
        return AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, layers_per_block=1, sample_size=64,
            **{"latent_channels": 4, **settings},
        )  # fmt: skip


def flow_vae() -> Any:
    """The VAE of SD3 and FLUX.1: 16 channels, a shift, no convolutions around the latents."""
    return tiny_vae(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )


def t5_tokenizer(**settings: Any) -> Any:
    """A Unigram tokenizer in T5's layout: special tokens, letters, pieces and whole words."""
    from transformers import T5TokenizerFast

    letters = [(chr(code), -6.0) for code in range(33, 127)] + [(letter, -6.5) for letter in "éü☃"]
    pieces = [(piece, -3.0 - 0.1 * len(piece)) for piece in ("ing", "s", "ed", "er", "in", "th", "▁th", "▁a", "▁s")]
    words = [(f"▁{word}", -2.0 - 0.01 * i) for i, word in enumerate(WORDS)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.5)]
    vocabulary = dict([*words, *pieces, *letters])
    return T5TokenizerFast(vocab=[*special, *vocabulary.items()], extra_ids=2, **settings)


def t5(tokenizer: Any, *, width: int) -> Any:
    """Equal for equal settings, so that models share its graph."""
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer) + 3, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return T5EncoderModel(config)


def openvino_decibels() -> int:
    """The PSNR that OpenVINO's pictures must have against ONNX Runtime's: 50, or 30 on a processor with
    bfloat16, in which it then computes."""
    openvino = pytest.importorskip("openvino")
    return 30 if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else 50


QWEN_LENGTH = 48
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def qwen_tokenizer(**settings: Any) -> Any:
    """A byte-level BPE tokenizer in Qwen3's layout, whose merges are those of the tests' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers_regex(PRETOKENIZE_REGEX), behavior="isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [f" {word}" for word in WORDS] + ["user\n", "assistant\n", "\n\n", "\n\n\n", " \n", "  \n"] * 3
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        chat_template=QWEN_TEMPLATE,
        **settings,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def tokenizers_regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def with_larger_rows(model: Any) -> Any:
    """Rows as large as a trained model's in proportion to what its layers add, so that prompts differ."""
    import torch

    torch.nn.init.normal_(model.get_input_embeddings().weight, 0, 0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model
