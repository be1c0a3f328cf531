"""Trains the miniature from `world` alone: tokenizer, VAE, text encoder with UNet, and judge.

Each stage runs for a number of minutes of wall clock, over which its rate falls to zero as a cosine. It saves its state
in the work folder, and resumes if run again with more minutes. A stage without a state starts from the weights in
`Stages.start_from`, a diffusers directory such as the one that ships, so that training can continue on a machine that
has only the repository. Only the VAE's decoder is then trained, because the UNet was trained on this encoder's latents.

Models compute in bfloat16 under autocast, or in float32 on a CPU without AVX512-BF16 or AMX; weights, their
averages and the optimisers' states are float32. A step's pictures are split into parts, which are computed by processes
of one thread each, so that another busy process delays a part and not every operation (docs/results/miniature.md has
the times). The output is fp16 safetensors in diffusers' layout.
Not covered: the targets that the weights have to meet (`benchmarks/miniature.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from oneword.engines.errors import UsageError, one_line
from oneword.engines.files import write_whole
from oneword.train.compute import compute_dtype
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import claims, scores, world
from oneword.train.miniature.muon import Muon
from oneword.train.miniature.tokenizer import LENGTH, make_tokenizer
from oneword.train.recipe import Compute

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
EMA = 0.998  # decay of the averaged weights, which are the ones exported
MUON = 1.5  # Muon's rate over AdamW's, both as the root mean square of a step
# Bounds on the signal-to-noise ratio in the loss weight. Above them, steps only sharpen (Hang et al. 2023); below them,
# only the caption says what to draw, and captions are learned there.
SNR = (0.4, 5.0)


@dataclass(frozen=True)
class Stages:
    """How long each stage runs, on which device, and with how many pictures. Minutes are of wall clock.

    A step of the UNet has `batch` pictures, in parts of `part`; its highest learning rate is `unet_rate`. `start_from`
    is the diffusers directory whose weights a stage without a state starts from; None starts from random weights.
    Raises `UsageError` for counts that cannot be used.
    """

    work: Path
    device: str = "cpu"
    vae_minutes: float = 30
    judge_minutes: float = 15
    unet_minutes: float = 240
    pictures: int = 200_000
    batch: int = 128
    part: int = 32
    threads: int = 2
    start_from: Path | None = None
    unet_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise UsageError(f"pictures is {self.pictures}: give at least 1, and thousands for useful training")
        if self.batch < 1 or self.part < 1 or self.batch % self.part:
            raise UsageError(f"a batch of {self.batch} in parts of {self.part}: give a multiple of the part")
        if self.threads < 1:
            raise UsageError(f"threads is {self.threads}: give at least 1")


def tokenizer(work: Path) -> CLIPTokenizer:
    """The miniature's tokenizer, created on first use."""
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
    """A CLIP model with patches of 8 pixels and a shared space of 96 dimensions; 1.0 M parameters."""
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


def train(stages: Stages, say: Callable[[str], None] = print) -> None:
    """Runs all stages in turn, each from where it stopped."""
    train_vae(stages, say)
    train_judge(stages, say)
    train_unet(stages, say)


# ---- stages ----------------------------------------------------------------------------------------------------------


def train_vae(stages: Stages, say: Callable[[str], None]) -> AutoencoderKL:
    """Picture -> latents -> picture: L1 + L2 + gradient L1 + a little KL. Only the decoder if `start_from` is set."""
    torch.manual_seed(stages.seed)
    vae = new_vae()
    if stages.start_from:
        vae.encoder.requires_grad_(False)
    images: list[Tensor] = []

    def loss(models: Sequence[nn.Module], count: int) -> Tensor:
        vae: Any = models[0]
        rows = torch.randint(len(images[0]), (count,))
        x = _to_model(images[0][rows], stages.device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        total: Tensor = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-6 * posterior.kl().mean()
        return total

    def draw(step: int) -> None:
        images.append(torch.from_numpy(_draw_pictures(min(stages.pictures, 24_000), 1 + step, say)[0]))

    run_stage("vae", stages, stages.vae_minutes, [vae], loss, (16, 16), 2e-3, say, begin=draw)
    return vae


def train_judge(stages: Stages, say: Callable[[str], None]) -> CLIPModel:
    """CLIP's loss with every caption that is true of a picture (Khosla et al. 2020), plus the world's questions."""
    torch.manual_seed(stages.seed)
    tokens = tokenizer(stages.work)
    model = new_judge(len(tokens), tokens.eos_token_id, tokens.bos_token_id)

    def loss(models: Sequence[nn.Module], count: int) -> Tensor:
        (model,) = models
        pixels, ids, truth = claims.sample_batch(_generator(), count, tokens)
        out = model(input_ids=ids.to(stages.device), pixel_values=pixels.to(stages.device), attention_mask=None)
        return claims.judge_loss(out.logits_per_image.float(), truth.to(stages.device))

    run_stage("judge", stages, stages.judge_minutes, [model], loss, (128,), 2e-3, say)  # contrastive, so in one part
    return model


def train_unet(stages: Stages, say: Callable[[str], None]) -> None:
    """Trains text encoder and UNet together on v-prediction; one caption in ten is empty, for guidance."""
    vae = new_vae()
    _load_stage("vae", stages, [vae])
    vae.to(stages.device).eval()
    torch.manual_seed(stages.seed + 1)
    tokens = tokenizer(stages.work)
    text_encoder = new_text_encoder(len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    unet = new_unet()
    attend_plainly(text_encoder, unet)
    latents, scenes, scale = _latent_pool(vae, stages, say)
    alphas = torch.from_numpy(DDIMScheduler(**SCHEDULER).alphas_cumprod.numpy()).to(stages.device)

    def loss(models: Sequence[nn.Module], count: int) -> Tensor:
        text_encoder, unet = models
        rng = _generator()
        rows = rng.integers(len(scenes), size=count)
        captions = ["" if rng.random() < 0.1 else world.paraphrase(scenes[row], rng) for row in rows]
        ids = tokens(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        x = (latents[rows].float() * scale).to(stages.device)
        t = torch.randint(1000, (count,), device=stages.device)
        a = alphas[t].view(-1, 1, 1, 1)
        eps = torch.randn_like(x)
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x
        states = text_encoder(ids.to(stages.device))[0]
        guess = unet(noisy, t, states).sample.float()
        snr = a / (1 - a)
        weight = snr.clamp(*SNR) / (snr + 1)
        error: Tensor = weight * (guess - v).square()
        return error.mean() / weight.mean()

    parts = (stages.part,) * (stages.batch // stages.part)
    run_stage("unet", stages, stages.unet_minutes, [text_encoder, unet], loss, parts, stages.unet_rate, say)


def attend_plainly(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Replaces the fused kernels, whose backward pass is slow on a CPU for few positions, by products and a softmax."""
    text_encoder.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())


def export(stages: Stages, folder: Path) -> None:
    """Writes the averaged weights as an fp16 diffusers directory, with the judge in it if it has been trained.

    Raises `UsageError` if the VAE has been trained further since the UNet was trained on its latents.
    """
    tokens = tokenizer(stages.work)
    ids = (len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    vae, text_encoder, unet = new_vae(), new_text_encoder(*ids), new_unet()
    _load_stage("vae", stages, [vae])
    scale = _scale_path(vae, stages)
    if not scale.exists():
        raise UsageError(
            f"{scale} is missing: the UNet has not been trained on this VAE, run it with more --unet-minutes"
        )
    _load_stage("unet", stages, [text_encoder, unet])
    vae.register_to_config(scaling_factor=torch.load(scale, weights_only=True)["scale"])
    models = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    if _has_weights("judge", stages):
        models["judge"] = new_judge(*ids)
        _load_stage("judge", stages, [models["judge"]])
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


def quality(folder: Path) -> list[str]:
    """Measures exported weights on 200 fresh renders: one line each for the VAE and the judge.

    Not covered: the UNet (see `benchmarks.miniature`).
    """
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


def run_stage(
    name: str,
    stages: Stages,
    minutes: float,
    models: list[nn.Module],
    loss: Callable[[Sequence[nn.Module], int], Tensor],
    parts: Sequence[int],
    rate: float,
    say: Callable[[str], None],
    begin: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains for the rest of `minutes`, saving once per minute; leaves the averaged weights in `models`.

    A step has sum(parts) pictures. `begin` is called with the first step, if any minutes remain. The rate warms up over
    200 steps and falls to zero, as a cosine of the share of the minutes that has passed.
    """
    path = stages.work / f"{name}.pt"
    state = torch.load(path, map_location=stages.device, weights_only=True) if path.exists() else None
    if state is None and stages.start_from:
        _load_stage(name, stages, models)
    for model in models:
        model.to(stages.device).train()
    weights = [p for model in models for p in model.parameters()]
    matrices, optimisers = new_optimisers(models, rate)
    average = [p.detach().clone() for p in weights]
    step, spent = 0, 0.0
    if state is not None:
        for p, a, saved, saved_average in zip(weights, average, state["weights"], state["average"], strict=True):
            p.data.copy_(saved)
            a.copy_(saved_average)
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
            for group in optimiser.param_groups:
                group["initial_lr"] = rate * (MUON if isinstance(optimiser, Muon) else 1)
        step, spent = state["step"], state["spent"]
    if spent >= minutes * 60:
        _copy(average, weights)
        return
    begin(step)
    torch.manual_seed(stages.seed + step)  # every run and every worker draws different pictures
    recent, logged, since, saved_at = [], spent, time.monotonic(), time.monotonic()
    with Workers(models, loss, parts, matrices, optimisers, stages) as workers:
        while spent < minutes * 60:
            pace = min(1, (step + 1) / 200) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * spent / (minutes * 60)))
            recent.append(workers.step(pace))
            step += 1
            torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(EMA, step / (step + 10)))
            now = time.monotonic()
            spent, since = spent + now - since, now
            if step % 100 == 0:
                per_picture, logged = 10 * (spent - logged) / sum(parts), spent  # ms, over a hundred steps
                say(
                    f"{name} step {step} loss {np.mean(recent[-100:]):.4f} {per_picture:.1f} ms per picture, "
                    f"{spent / 60:.1f} of {minutes:.1f} min"
                )
            if now - saved_at > 60 or spent >= minutes * 60:
                saved_at = now
                state = {"weights": weights, "average": average, "step": step, "spent": spent}
                _save({**state, "optimisers": [o.state_dict() for o in optimisers]}, path)
    _copy(average, weights)


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.data.copy_(s)


class Workers:
    """Processes of one thread each that share the weights and compute a step's parts, each as it becomes free.

    PyTorch's threads wait for each other in every operation, which takes most of the time beside a busy process.
    Workers synchronise twice per step: to sum the gradients, and for the update, which divides the optimisers among
    them. The first worker is this process; on a device other than the CPU it is the only one.
    """

    def __init__(
        self,
        models: list[nn.Module],
        loss: Callable[[Sequence[nn.Module], int], Tensor],
        parts: Sequence[int],
        matrices: list[tuple[nn.Parameter, Tensor]],
        optimisers: list[torch.optim.Optimizer],
        stages: Stages,
    ) -> None:
        self.models, self.loss, self.parts, self.optimisers = models, loss, parts, optimisers
        self.device = torch.device(stages.device).type
        self.weights = _trained(models)
        count = min(stages.threads, len(parts)) if self.device == "cpu" else 1
        total = sum(p.numel() for p in self.weights)
        self.gradients = torch.zeros(count, total, device=stages.device)  # a row per worker; the first gets the sum
        self._use_row(0)
        for weight, matrix in matrices:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for muon in optimisers[:-1]:  # AdamW, the last one, is always stepped by this process
            for matrix in muon.param_groups[0]["params"]:
                muon.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        if count > 1:
            momenta = [state["momentum_buffer"] for muon in optimisers[:-1] for state in muon.state.values()]
            for tensor in [self.gradients, *momenta, *(p.data for p in self.weights)]:
                tensor.share_memory_()
        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        fork = multiprocessing.get_context("fork")
        self.parts_taken = fork.Value("i", 0)
        self.pipes: list[Connection] = []
        self.processes = []
        for row in range(1, count):
            ours, theirs = fork.Pipe()
            self.pipes.append(ours)
            self.processes.append(fork.Process(target=self._serve, args=(row, count, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()
        torch.set_num_threads(self.threads_before)

    def step(self, pace: float) -> float:
        """Updates the weights at `pace` times the optimisers' rates. Returns the mean loss over all parts."""
        self.parts_taken.value = 0
        self._send(None)
        value = self._accumulate(0) + sum(self._receive())
        for row in self.gradients[1:]:
            self.gradients[0].add_(row)
        self.gradients[0].mul_((1 / (self.gradients[0].norm() + 1e-6)).clamp(max=1))  # to a norm of at most 1
        self._send(pace)
        self._update(0, len(self.gradients), pace)
        self._receive()
        return value

    def _send(self, message: float | None) -> None:
        for pipe in self.pipes:
            pipe.send(message)

    def _receive(self) -> list[float]:
        return [pipe.recv() for pipe in self.pipes]

    def _serve(self, row: int, count: int, pipe: Connection) -> None:
        """The loop of a worker process: a message of None requests gradients, a pace requests an update."""
        for ours in self.pipes:
            ours.close()
        torch.manual_seed(torch.initial_seed() + 2**32 * row)
        self._use_row(row)
        with suppress(EOFError, BrokenPipeError):
            while True:
                pace = pipe.recv()
                pipe.send(self._accumulate(row) if pace is None else self._update(row, count, pace))

    def _use_row(self, row: int) -> None:
        parts = self.gradients[row].split([p.numel() for p in self.weights])
        for weight, part in zip(self.weights, parts, strict=True):
            weight.grad = part.view_as(weight)

    def _accumulate(self, row: int) -> float:
        """Computes parts that no worker has taken, with gradients in this worker's row. Returns the sum of losses."""
        self.gradients[row].zero_()
        value = 0.0
        while (count := self._take()) is not None:
            with _autocast(self.device):
                part = self.loss(self.models, count) * (count / sum(self.parts))
            part.backward()
            value += part.item()
        return value

    def _take(self) -> int | None:
        with self.parts_taken.get_lock():
            index = self.parts_taken.value
            self.parts_taken.value += 1
        return self.parts[index] if index < len(self.parts) else None

    def _update(self, row: int, count: int, pace: float) -> float:
        for optimiser in [*self.optimisers[row:-1:count], *(self.optimisers[-1:] if row == 0 else [])]:
            for group in optimiser.param_groups:
                group["lr"] = pace * group["initial_lr"]
            optimiser.step()
        return pace


def _product_dtype(device: torch.device) -> torch.dtype:
    """bf16, except on a CPU that would have to emulate it."""
    return compute_dtype(Compute.AUTO) if device.type == "cpu" else torch.bfloat16


def _autocast(name: str) -> torch.autocast:
    device = torch.device(name)
    return torch.autocast(device.type, torch.bfloat16, enabled=_product_dtype(device) is torch.bfloat16)


def _trained(models: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for model in models for p in model.parameters() if p.requires_grad]


def new_optimisers(
    models: list[nn.Module], rate: float
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[torch.optim.Optimizer]]:
    """Muon (Jordan et al. 2024) for the weights that mix features, AdamW for embeddings, biases and norms.

    Muon takes only matrices, so a kernel [out, in, h, w] is stepped through its view [out, in * h * w]. Returns pairs
    (weight, view), for the caller to share gradients between, and the optimisers. Each of two Muons has half of the
    matrices, so that two workers can step them.
    """
    tables = {id(m.weight) for model in models for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = _trained(models)
    mixing = [p for p in weights if p.ndim >= 2 and id(p) not in tables]
    non_mixing = [p for p in weights if p.ndim < 2 or id(p) in tables]
    matrices = [(p, p.detach().flatten(1)) for p in mixing]
    views = sorted((m for _, m in matrices), key=lambda m: min(m.shape) * m.numel())  # by the cost of orthogonalising
    dtype = _product_dtype(weights[0].device)
    optimisers: list[torch.optim.Optimizer] = [
        Muon(half, MUON * rate, weight_decay=0.01, dtype=dtype) for half in (views[0::2], views[1::2])
    ]
    optimisers.append(torch.optim.AdamW(non_mixing, rate, weight_decay=0.01, fused=True))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return matrices, optimisers


def _save(state: object, path: Path) -> None:
    """Writes a state atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue(), sync=False)


#: The folders of a stage's models in a diffusers directory, in the stage's order.
_FOLDERS: dict[str, dict[str, Any]] = {
    "vae": {"vae": AutoencoderKL},
    "judge": {"judge": CLIPModel},
    "unet": {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel},
}


def _has_weights(name: str, stages: Stages) -> bool:
    folders = [stages.start_from / folder for folder in _FOLDERS[name]] if stages.start_from else []
    return (stages.work / f"{name}.pt").exists() or bool(folders and all(folder.is_dir() for folder in folders))


def _load_stage(name: str, stages: Stages, models: list[nn.Module]) -> None:
    """Loads a stage's averaged weights so far, or those of `start_from`, into `models`.

    Raises `UsageError` if there are none, or if `start_from` has another architecture.
    """
    if not _has_weights(name, stages):
        raise UsageError(f"{stages.work} has no {name}.pt: train that stage first, or give --start-from MODEL_DIR")
    if stages.start_from:
        for model, (folder, kind) in zip(models, _FOLDERS[name].items(), strict=True):
            saved = kind.from_pretrained(stages.start_from / folder, torch_dtype=torch.float32)
            try:
                model.load_state_dict(saved.state_dict())
            except RuntimeError as error:
                raise UsageError(
                    f"{stages.start_from / folder} has another architecture than training.py: {one_line(error)}"
                ) from error
    path = stages.work / f"{name}.pt"
    if path.exists():
        weights = [p for model in models for p in model.parameters()]
        average = torch.load(path, map_location="cpu", weights_only=True)["average"]
        for p, a in zip(weights, average, strict=True):
            p.data.copy_(a)


def _generator() -> np.random.Generator:
    """A generator seeded by PyTorch's, which is different in each worker."""
    return np.random.default_rng(int(torch.randint(2**62, ())))


def _draw_pictures(count: int, seed: int, say: Callable[[str], None]) -> tuple[np.ndarray, list[world.Scene]]:
    say(f"drawing {count} pictures")
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    return np.stack([world.render(scene, int(rng.integers(2**31)))[0] for scene in scenes]), scenes


def _to_model(images: Tensor, device: str) -> Tensor:
    """uint8 [B, H, W, 3] -> [-1, 1] [B, 3, H, W]."""
    return (images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def _latent_pool(
    vae: AutoencoderKL, stages: Stages, say: Callable[[str], None]
) -> tuple[Tensor, list[world.Scene], float]:
    """The training set as fp16 latents, with its scenes and scale. Saved in chunks; a run draws only missing chunks.

    The chunks' names contain the encoder's hash, because a further trained encoder has different latents, and the size.
    """
    chunk = min(stages.pictures, 5_000)  # pictures beyond the last full chunk are left out
    latents, scenes = [], []
    for part in range(stages.pictures // chunk):
        path = stages.work / f"latents-{_encoder_hash(vae)}-{chunk}-{part}.pt"
        seed = 1_000 + part
        if path.exists():
            latents.append(torch.load(path, weights_only=True))
            rng = np.random.default_rng(seed)
            scenes += [world.sample_scene(rng) for _ in range(chunk)]
            continue
        images, new_scenes = _draw_pictures(chunk, seed, say)
        encoded = list(_encode(vae, images, stages.device))
        latents.append(torch.cat(encoded))
        scenes += new_scenes
        _save(latents[-1], path)
    pool = torch.cat(latents)
    scale = _scale(vae, pool[:chunk], stages)
    say(f"pool of {len(pool)} latents, scale {scale:.4f}")
    return pool, scenes, scale


def _scale(vae: AutoencoderKL, latents: Tensor, stages: Stages) -> float:
    """The factor on the UNet's latents: `start_from`'s factor for its own encoder, else 1 / standard deviation."""
    path = _scale_path(vae, stages)
    if not path.exists():
        scale = 1 / latents.float().std().item()
        if stages.start_from:
            start_vae = AutoencoderKL.from_pretrained(stages.start_from / "vae", torch_dtype=torch.float32)
            if _encoder_hash(start_vae) == _encoder_hash(vae):
                scale = start_vae.config.scaling_factor
        _save({"scale": scale}, path)
    return float(torch.load(path, weights_only=True)["scale"])


def _scale_path(vae: AutoencoderKL, stages: Stages) -> Path:
    return stages.work / f"latents-{_encoder_hash(vae)}-scale.pt"


def _encoder_hash(vae: AutoencoderKL) -> str:
    weights = (p.detach().cpu().numpy().tobytes() for p in vae.encoder.parameters())
    return hashlib.sha256(b"".join(weights)).hexdigest()[:8]


def _encode(vae: AutoencoderKL, images: np.ndarray, device: str) -> Iterator[Tensor]:
    for start in range(0, len(images), 250):
        with torch.no_grad(), _autocast(device):
            x = _to_model(torch.from_numpy(images[start : start + 250]), device)
            yield vae.encode(x).latent_dist.mean.half().cpu()
