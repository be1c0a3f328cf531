"""The recipe that makes the miniature: tokenizer, VAE, text encoder with UNet, and the judge, from `world` alone.

Each stage runs for its minutes, keeps its state in the work folder, and goes on from it when run again with more
minutes. Stages train in bfloat16 where the processor has it; what is written is fp16 safetensors in diffusers' layout.
Not here: the bars the weights are held to (`benchmarks/miniature.py`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from oneword.engines.errors import UsageError
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import judge, scores, world
from oneword.train.miniature.words import LENGTH, make_tokenizer

LATENT_CHANNELS = 12
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
MUON = 1.5  # Muon's rate over AdamW's, both as a root mean square of the step
SNR = (0.4, 5.0)  # the loss counts the signal-to-noise ratio within: above, steps only sharpen (Hang et al. 2023);
# below, the caption alone says what to draw, and is learned there


@dataclass(frozen=True)
class Settings:
    """How long each stage runs, on which device, and with how many pictures. Minutes are of wall clock."""

    work: Path
    device: str = "cpu"
    vae_minutes: float = 30
    judge_minutes: float = 15
    unet_minutes: float = 240
    pictures: int = 200_000
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise UsageError(f"pictures is {self.pictures}: give at least 1, in thousands to learn anything from")


def tokenizer(work: Path) -> CLIPTokenizer:
    """The miniature's tokenizer, made on first use."""
    folder = work / "tokenizer"
    if not folder.exists():
        make_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def new_vae() -> AutoencoderKL:
    """[B, 3, 64, 64] <-> [B, 12, 8, 8]; 1.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_text_encoder(vocabulary: int, eos: int, bos: int) -> CLIPTextModel:
    """Ids [B, 32] -> hidden states [B, 32, 128]; 0.9 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=128,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Two levels with attention on both; 6.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(96, 144),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_judge(vocabulary: int, eos: int, bos: int) -> CLIPModel:
    """A CLIP of patches of 8 pixels, 96 wide where picture and text meet; 1.0 M parameters."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": world.SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def train(settings: Settings, say: Callable[[str], None] = print) -> None:
    """All stages in turn, each from where it stopped."""
    train_vae(settings, say)
    train_judge(settings, say)
    train_unet(settings, say)


# ---- stages ----------------------------------------------------------------------------------------------------------


def train_vae(settings: Settings, say: Callable[[str], None]) -> AutoencoderKL:
    """Picture -> latents -> picture: L1 + L2 + gradient L1 + a little KL."""
    torch.manual_seed(settings.seed)
    vae = new_vae()
    images: list[Tensor] = []

    def loss(step: int) -> Tensor:
        if not images:
            images.append(torch.from_numpy(_draw_many(min(settings.pictures, 24_000), 1 + step, say)[0]))
        rows = torch.randint(len(images[0]), (32,))
        x = _to_model(images[0][rows], settings.device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        total: Tensor = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-6 * posterior.kl().mean()
        return total

    _run_stage("vae", settings, settings.vae_minutes, [vae], loss, 2e-3, say, ema=0.998)
    return vae


def train_judge(settings: Settings, say: Callable[[str], None]) -> CLIPModel:
    """CLIP's loss, with every caption that is true of a picture (Khosla et al. 2020), and the world's questions."""
    torch.manual_seed(settings.seed)
    tokens = tokenizer(settings.work)
    model = new_judge(len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    rng = np.random.default_rng(settings.seed + 17)

    def loss(step: int) -> Tensor:
        pixels, ids, truth = judge.sample_batch(rng, 128, tokens)
        out = model(input_ids=ids.to(settings.device), pixel_values=pixels.to(settings.device), attention_mask=None)
        return judge.judge_loss(out.logits_per_image.float(), truth.to(settings.device))

    _run_stage("judge", settings, settings.judge_minutes, [model], loss, 2e-3, say, ema=0.998)
    return model


def train_unet(settings: Settings, say: Callable[[str], None]) -> None:
    """Text encoder and UNet together on v-prediction; one caption in ten is empty, for guidance."""
    vae = new_vae()
    vae_step = _load_stage("vae", settings, [vae])
    vae.to(settings.device).eval()
    torch.manual_seed(settings.seed + 1)
    tokens = tokenizer(settings.work)
    text_encoder = new_text_encoder(len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    unet = new_unet()
    latents, scenes, scale = _latent_pool(vae, vae_step, settings, say)
    alphas = torch.from_numpy(DDIMScheduler(**SCHEDULER).alphas_cumprod.numpy()).to(settings.device)
    rng = np.random.default_rng(int(time.time()))

    def loss(step: int) -> Tensor:
        rows = rng.integers(len(scenes), size=settings.batch)
        captions = ["" if rng.random() < 0.1 else world.paraphrase(scenes[row], rng) for row in rows]
        ids = tokens(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        x = (latents[rows].float() * scale).to(settings.device)
        t = torch.randint(1000, (len(rows),), device=settings.device)
        a = alphas[t].view(-1, 1, 1, 1)
        eps = torch.randn_like(x)
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x
        states = text_encoder(ids.to(settings.device))[0]
        guess = unet(noisy, t, states).sample.float()
        snr = a / (1 - a)
        weight = snr.clamp(*SNR) / (snr + 1)
        error: Tensor = weight * (guess - v).square()
        return error.mean() / weight.mean()

    _run_stage("unet", settings, settings.unet_minutes, [text_encoder, unet], loss, 1e-3, say, ema=0.998)


def export(settings: Settings, folder: Path) -> None:
    """Write the averaged weights as a diffusers directory in fp16, with the judge beside it once it is trained.

    Raises `UsageError` where the VAE has trained on since the UNet saw its latents.
    """
    tokens = tokenizer(settings.work)
    ids = (len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    vae, text_encoder, unet = new_vae(), new_text_encoder(*ids), new_unet()
    scale = settings.work / f"latents-{_load_stage('vae', settings, [vae])}-scale.pt"
    if not scale.exists():
        raise UsageError(
            f"{scale} is missing: the UNet has not trained on this VAE yet, run it with more --unet-minutes"
        )
    _load_stage("unet", settings, [text_encoder, unet])
    vae.register_to_config(scaling_factor=torch.load(scale, weights_only=True)["scale"])
    models = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    if (settings.work / "judge.pt").exists():
        models["judge"] = new_judge(*ids)
        _load_stage("judge", settings, [models["judge"]])
        side, half = {"height": world.SIZE, "width": world.SIZE}, [0.5] * 3
        CLIPImageProcessorPil(size=side, crop_size=side, image_mean=half, image_std=half).save_pretrained(
            folder / "judge"
        )
    for name, model in models.items():
        model.half().save_pretrained(folder / name)
    tokens.save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def reached(folder: Path) -> list[str]:
    """What exported weights reach on 200 fresh renders, a line a stage; the UNet is for `benchmarks.miniature`."""
    scenes = scores.one_object_scenes(200)
    images = np.stack([world.render(scene, 9_000 + i)[0] for i, scene in enumerate(scenes)])
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        x = _to_model(torch.from_numpy(images), "cpu")
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(50)])
    decibels = scores.psnr(((y.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).round().numpy(), images).mean()
    lines = [f"VAE: {decibels:.1f} dB round trip"]
    if (folder / "judge").is_dir():
        right = scores.judged_right(Judge(folder / "judge"), images, scenes)
        lines.append("judge: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()))
    return lines


# ---- how a stage runs ------------------------------------------------------------------------------------------------


def _run_stage(
    name: str,
    settings: Settings,
    minutes: float,
    models: list[nn.Module],
    loss: Callable[[int], Tensor],
    rate: float,
    say: Callable[[str], None],
    ema: float,
) -> None:
    """Train for what is left of `minutes`, saving once a minute; leaves the averaged weights in `models`.

    The rate warms up over 200 steps and falls to nothing with the share of the minutes that has passed, as a cosine.
    """
    for model in models:
        model.to(settings.device).train()
    weights = [p for model in models for p in model.parameters()]
    matrices, optimisers = _optimisers(models, rate)
    average = [p.detach().clone() for p in weights]
    step, spent = 0, 0.0
    path = settings.work / f"{name}.pt"
    if path.exists():
        state = torch.load(path, map_location=settings.device, weights_only=True)
        for p, a, saved, saved_average in zip(weights, average, state["weights"], state["average"], strict=True):
            p.data.copy_(saved)
            a.copy_(saved_average)
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    recent, since, saved_at = [], time.monotonic(), time.monotonic()
    while spent < minutes * 60:
        share = spent / (minutes * 60)
        pace = min(1, (step + 1) / 200) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * share))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = pace * group["initial_lr"]
        with torch.autocast(torch.device(settings.device).type, torch.bfloat16):
            value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        for weight, matrix in matrices:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimiser in optimisers:
            optimiser.step()
        for weight in weights:
            weight.grad = None
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(ema, step / (step + 10)))
        recent.append(value.item())
        now = time.monotonic()
        spent, since = spent + now - since, now
        if step % 100 == 0:
            say(f"{name} step {step} loss {np.mean(recent[-100:]):.4f} {spent / 60:.1f} of {minutes:.1f} min")
        if now - saved_at > 60 or spent >= minutes * 60:
            saved_at = now
            state = {"weights": weights, "average": average, "step": step, "spent": spent}
            _save({**state, "optimisers": [o.state_dict() for o in optimisers]}, path)
    for p, a in zip(weights, average, strict=True):
        p.data.copy_(a)


def _optimisers(
    models: list[nn.Module], rate: float
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[torch.optim.Optimizer]]:
    """Muon (Jordan et al. 2024) for the weights that mix features, AdamW for embeddings, biases and norms.

    Muon takes matrices only, so a kernel [out, in, h, w] is stepped through its view [out, in * h * w]: returned are
    the pairs (weight, view), whose gradients the caller hands over before each step.
    """
    tables = {id(m.weight) for model in models for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [p for model in models for p in model.parameters()]
    mixing = [p for p in weights if p.ndim >= 2 and id(p) not in tables]
    rest = [p for p in weights if p.ndim < 2 or id(p) in tables]
    matrices = [(p, p.detach().flatten(1)) for p in mixing]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([m for _, m in matrices], MUON * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, rate, weight_decay=0.01, fused=True),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return matrices, optimisers


def _save(state: object, path: Path) -> None:
    """Whole or not at all."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _load_stage(name: str, settings: Settings, models: list[nn.Module]) -> int:
    """The averaged weights a stage has reached so far, put into `models`; returns its step."""
    state = torch.load(settings.work / f"{name}.pt", map_location="cpu", weights_only=True)
    weights = [p for model in models for p in model.parameters()]
    for p, a in zip(weights, state["average"], strict=True):
        p.data.copy_(a)
    return int(state["step"])


def _draw_many(count: int, seed: int, say: Callable[[str], None]) -> tuple[np.ndarray, list[world.Scene]]:
    say(f"drawing {count} pictures")
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    return np.stack([world.render(scene, int(rng.integers(2**31)))[0] for scene in scenes]), scenes


def _to_model(images: Tensor, device: str) -> Tensor:
    """uint8 [B, H, W, 3] -> [-1, 1] [B, 3, H, W]."""
    return (images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def _latent_pool(
    vae: AutoencoderKL, vae_step: int, settings: Settings, say: Callable[[str], None]
) -> tuple[Tensor, list[world.Scene], float]:
    """The training set as fp16 latents with its scenes; kept in chunks, so a new run draws only what is missing.

    A VAE that has trained on since has latents of its own: `vae_step` is in the chunks' names, as is their size.
    """
    chunk = min(settings.pictures, 5_000)  # pictures beyond whole chunks are left out
    latents, scenes = [], []
    for part in range(settings.pictures // chunk):
        path = settings.work / f"latents-{vae_step}-{chunk}-{part}.pt"
        seed = 1_000 + part
        if path.exists():
            latents.append(torch.load(path, weights_only=True))
            rng = np.random.default_rng(seed)
            scenes += [world.sample_scene(rng) for _ in range(chunk)]
            continue
        images, drawn = _draw_many(chunk, seed, say)
        encoded = list(_encode(vae, images, settings.device))
        latents.append(torch.cat(encoded))
        scenes += drawn
        _save(latents[-1], path)
    pool = torch.cat(latents)
    scale = float(1 / pool[:chunk].float().std())
    _save({"scale": scale}, settings.work / f"latents-{vae_step}-scale.pt")
    say(f"pool of {len(pool)} latents, scale {scale:.4f}")
    return pool, scenes, scale


def _encode(vae: AutoencoderKL, images: np.ndarray, device: str) -> Iterator[Tensor]:
    for start in range(0, len(images), 250):
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            x = _to_model(torch.from_numpy(images[start : start + 250]), device)
            yield vae.encode(x).latent_dist.mean.half().cpu()
