"""Learning words: one optimiser step over a batch that many words share. No files, no progress bars.

Of all the numbers in play only the words' rows [n, D] are parameters. The text encoder is the module that is exported,
fed with a small table: the few vocabulary rows the prompts use, then the words' rows. Each word has its own rows, loss,
optimiser, random stream and end; words in one batch do not see one another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.nn.functional import mse_loss

from oneword.engines.errors import EngineError, UsageError
from oneword.export.families import family_of
from oneword.export.modules import TextEncoder, UNet
from oneword.export.source import Source
from oneword.runtime.bundle import Encoder
from oneword.runtime.concept import Concept
from oneword.train.pictures import Moments
from oneword.train.prompts import per_image_template
from oneword.train.recipe import Compute, Norm, Rate, Recipe
from oneword.train.stopping import has_settled

Rows = Mapping[str, torch.Tensor]  # of each text encoder, [n, D] float32


@dataclass
class Word:
    """A word on its way: what it is learned from, and everything that changes while it is.

    `prompts` are templates; `captions`, where there are any, hold one template a picture and take their place.
    """

    token: str
    moments: Moments
    initial: Rows
    prompts: Sequence[str]
    captions: Sequence[str] | None = None
    rows: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    picture_rows: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    optimizer: torch.optim.AdamW = field(init=False)
    generator: torch.Generator = field(default_factory=torch.Generator)
    losses: list[float] = field(default_factory=list)
    at_start: float = math.nan  # the loss on a fixed batch before the first step
    watched: list[float] = field(default_factory=list)  # and after every one, where that decides when to stop
    stopped: bool = False


@dataclass(frozen=True)
class Draw:
    """One word's share of a batch, B rows.

    `latents` and `eps` are B times [C, h, w] (pictures of several shapes have several sizes), `timesteps` [B] i64,
    `masks` B times [1, h, w] or None, `prompts` B templates.
    """

    latents: Sequence[torch.Tensor]
    eps: Sequence[torch.Tensor]
    timesteps: torch.Tensor
    masks: Sequence[torch.Tensor] | None
    prompts: Sequence[str]


class Learner:
    """Learns words against a frozen model.

    Raises `UsageError` for a model or a prompt that cannot be learned with, `EngineError` where a loss is not finite.
    """

    def __init__(self, source: Source, words: Sequence[Word], recipe: Recipe, seed: int) -> None:
        self.source = source
        self.words = words
        self.recipe = recipe
        self.steps_done = 0
        self.scheduler = noise_scheduler(source.scheduler_config)
        self.dtype = compute_dtype(recipe.compute)
        source.unet.to(self.dtype, memory_format=torch.channels_last)
        if recipe.gradient_checkpointing:
            source.unet.enable_gradient_checkpointing()
            source.unet.train()  # diffusers checkpoints only then; nothing in these networks drops out
        self.unet = UNet(source.unet)
        family = family_of(source)
        modules = {graph.name: graph.module for graph in family.graphs}
        self.conditioning = family.conditioning
        self.encoders = {
            encoder.graph: PromptEncoder(
                cast(TextEncoder, modules[encoder.graph]), source.tokenizers[encoder.graph], encoder
            )
            for encoder in family.encoders
        }
        self.target_norms = {name: vocabulary_norm(prompt.encoder.table) for name, prompt in self.encoders.items()}
        self._watched: dict[int, Draw] = {}
        self._first_row: list[int] = []
        next_row = 0
        for word in words:
            _prepare(word, recipe, seed)
            self._first_row.append(next_row)
            next_row += recipe.vectors + (word.moments.pictures if recipe.per_image else 0)
        for index, word in enumerate(words):  # a batch of its own stream, the same whenever the run goes on
            self._watched[index] = draw(word, recipe, len(self.scheduler), torch.Generator().manual_seed(seed + 1))

    def finished(self) -> bool:
        """Whether all steps are done, or every word has stopped."""
        return self.steps_done >= self.recipe.steps or all(word.stopped for word in self.words)

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return learning_rate_at(self.recipe, self.steps_done)

    def step(self) -> list[float]:
        """One optimiser step for every word not stopped; their losses, in the words' order (NaN for stopped words)."""
        active = [index for index, word in enumerate(self.words) if not word.stopped]
        if self.steps_done == 0:
            for index in active:
                self.words[index].at_start = self.watch(index)
        losses = np.zeros(len(self.words))
        size = self.recipe.words_a_call or len(active)
        for _ in range(self.recipe.accumulation):
            for together in (active[first : first + size] for first in range(0, len(active), size)):
                draws = {index: draw(self.words[index], self.recipe, len(self.scheduler)) for index in together}
                each = self._losses(draws)
                torch.autograd.backward(torch.stack(each).sum() / self.recipe.accumulation)
                losses[together] += [loss.item() / self.recipe.accumulation for loss in each]
        for index in active:
            self._update(index, losses[index])
        self.steps_done += 1
        if self.recipe.stop_below is not None:
            for index in active:
                word = self.words[index]
                word.watched.append(self.watch(index))
                word.stopped = has_settled(word.watched, self.recipe.stop_below)
        return [float(losses[index]) if index in active else math.nan for index in range(len(self.words))]

    @torch.no_grad()
    def watch(self, index: int, batch: Draw | None = None) -> float:
        """The loss of a word on a batch, nothing learned; by default on one of its own that is always the same."""
        return float(self._losses({index: batch or self._watched[index]}, regularized=False)[0])

    @torch.no_grad()
    def response(self, index: int, templates: Sequence[str], rows: Rows) -> float:
        """How much the UNet's prediction differs between prompts that differ around the word, were it `rows`.

        The mean squared deviation from the prompts' mean, from the same noise at four fifths of the schedule, where
        the scene is settled. A word that drowns the rest of its prompt brings it near zero.
        """
        shape = self.words[index].moments.mean[0].shape
        noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).expand(len(templates), *shape)
        timesteps = torch.full((len(templates),), int(0.8 * len(self.scheduler)))
        predicted = self._predict(noise, timesteps, *self._context({index: templates}, {index: rows}))
        return float((predicted - predicted.mean(0)).square().mean())

    def rows_in_use(self, index: int) -> int:
        """How many of its vectors a word has by now, by the steps it has taken itself: a stopped word gets no more."""
        return self.recipe.vectors_at(len(self.words[index].losses))

    def concept(self, index: int, provenance: Mapping[str, str]) -> Concept:
        """The word as it is now."""
        word = self.words[index]
        count = self.rows_in_use(index)
        return Concept(
            word.token, {name: rows.detach()[:count].numpy().copy() for name, rows in word.rows.items()}, provenance
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that changes while it learns: tensors, and what JSON can hold."""
        tensors: dict[str, torch.Tensor] = {}
        for index, word in enumerate(self.words):
            tensors[f"{index}.generator"] = word.generator.get_state()
            for name, value in _tensors_of(word).items():
                tensors[f"{index}.{name}"] = value.detach().clone()
        names = ("at_start", "losses", "watched", "stopped")
        facts = [{name: getattr(word, name) for name in names} for word in self.words]
        return tensors, {"steps_done": self.steps_done, "words": facts}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, bit by bit."""
        self.steps_done = facts["steps_done"]
        for index, (word, told) in enumerate(zip(self.words, facts["words"], strict=True)):
            word.generator.set_state(tensors[f"{index}.generator"])
            word.at_start, word.stopped = told["at_start"], told["stopped"]
            word.losses, word.watched = list(told["losses"]), list(told["watched"])
            for name, value in _tensors_of(word).items():
                with torch.no_grad():
                    value.copy_(tensors[f"{index}.{name}"])

    def _losses(self, draws: Mapping[int, Draw], *, regularized: bool = True) -> list[torch.Tensor]:
        """The loss of each drawn word: one UNet call for all of them, or one for each size of picture."""
        latents, eps, prompts = (
            [row for one in draws.values() for row in getattr(one, name)] for name in ("latents", "eps", "prompts")
        )
        masks: list[torch.Tensor | None] = []
        for one in draws.values():
            masks += [None] * len(one.latents) if one.masks is None else one.masks
        timesteps = torch.cat([one.timesteps for one in draws.values()])
        context, pooled = self._context({index: one.prompts for index, one in draws.items()})
        errors: list[torch.Tensor] = [torch.empty(0)] * len(prompts)  # summed over a picture's unmasked latents
        counts: list[torch.Tensor] = [torch.empty(0)] * len(prompts)  # how many those are
        for rows in of_one_shape(latents):
            clean, noise, t = (torch.stack([some[row] for row in rows]) for some in (latents, eps, timesteps))
            noisy = self.scheduler.add_noise(clean, noise, t)
            predicted = self._predict(noisy, t, context[rows], None if pooled is None else pooled[rows])
            error = mse_loss(predicted, prediction_target(self.scheduler, clean, noise, t), reduction="none")
            if self.recipe.min_snr is not None:
                error = error * min_snr_weights(self.scheduler, t, self.recipe.min_snr)[:, None, None, None]
            for row, part in zip(rows, error, strict=True):
                mask = masks[row]
                errors[row] = part.sum() if mask is None else (part * mask).sum()
                counts[row] = torch.tensor(float(part.numel())) if mask is None else mask.sum() * len(part)
        sizes = [len(one.latents) for one in draws.values()]
        losses = [
            error.sum() / count.sum().clamp(min=1e-6)
            for error, count in zip(torch.stack(errors).split(sizes), torch.stack(counts).split(sizes), strict=True)
        ]
        if regularized and self.recipe.init_weight:
            losses = [
                loss + self.recipe.init_weight * distance_to_start(self.words[index])
                for loss, index in zip(losses, draws, strict=True)
            ]
        return losses

    def _predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """The UNet's answer [B, C, h, w] float32, computed in its own type."""
        self.unet.attend_plainly(few_positions(self.dtype, noisy.shape[-1] * noisy.shape[-2]))
        return self.unet(
            noisy.to(self.dtype, memory_format=torch.channels_last),
            timesteps,
            context.to(self.dtype),
            None if pooled is None else pooled.to(self.dtype),
            self._time_ids(noisy) if self.conditioning.time_ids else None,
        ).float()

    def _context(
        self, prompts: Mapping[int, Sequence[str]], rows_of: Mapping[int, Rows] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encoded prompts [sum of B, T, D] and, where the family pools, [sum of B, P]; each different prompt once.

        `rows_of` takes the place of words' own rows.
        """
        wanted = [(index, prompt) for index, some in prompts.items() for prompt in some]
        unique = list(dict.fromkeys(wanted))
        places = {key: position for position, key in enumerate(unique)}
        rows = [places[key] for key in wanted]
        texts = [
            (prompt, self._first_row[index], self.rows_in_use(index), self.recipe.vectors) for index, prompt in unique
        ]
        encoded = {
            name: self.encoders[name](texts, self._all_rows(name, rows_of or {}))
            for block in self.conditioning.context
            for name in block
        }
        pooled = encoded[self.conditioning.pooled[0]][1] if self.conditioning.pooled else None
        states = torch.cat([states for states, _ in encoded.values()], -1)
        return states[rows], None if pooled is None else pooled[rows]

    def _all_rows(self, encoder: str, rows_of: Mapping[int, Rows]) -> torch.Tensor:
        """Every word's rows [R, D], each word's pictures' own after them."""
        stores = [
            store for i, word in enumerate(self.words) for store in (rows_of.get(i, word.rows), word.picture_rows)
        ]
        return torch.cat(tuple(store[encoder] for store in stores if encoder in store))

    def _time_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """SDXL's sizes [B, 6]: as if each picture had always been as large as it is now, uncropped."""
        factor = 2 ** (len(self.source.vae.config.block_out_channels) - 1)
        height, width = (float(side * factor) for side in latents.shape[-2:])
        return torch.tensor([height, width, 0.0, 0.0, height, width]).repeat(len(latents), 1)

    def _update(self, index: int, loss: float) -> None:
        word = self.words[index]
        if not math.isfinite(loss):
            raise EngineError(
                f"the loss of {word.token!r} is {loss} at step {self.steps_done + 1}: lower the rate "
                f"(it is {self.learning_rate:g}) or compute in fp32"
            )
        for group in word.optimizer.param_groups:
            group["lr"] = self.learning_rate
        word.optimizer.step()
        word.optimizer.zero_grad(set_to_none=True)
        count = self.rows_in_use(index)
        word.losses.append(loss)
        with torch.no_grad():
            for name, rows in word.rows.items():
                rows[count:] = word.initial[name][count:]  # those that have not joined yet
                rows[:count] = with_norm(rows[:count], self.recipe.norm, self.target_norms[name], self.learning_rate)


class PromptEncoder:
    """Templates to hidden states, through the exported text encoder and a table of only the rows in use."""

    def __init__(self, encoder: TextEncoder, tokenizer: Any, facts: Encoder) -> None:
        self.encoder, self.tokenizer, self.facts = encoder, tokenizer, facts
        self._ids: dict[int, int] = {}  # vocabulary id -> row of the small table

    def __call__(
        self, texts: Sequence[tuple[str, int, int, int]], learned: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode B texts.

        A text is (template, the word's first row in `learned`, its rows in use, its rows in all); `learned` [R, D]
        holds all words' rows. Returns hidden states [B, T, D] and, if the encoder pools, [B, P].
        """
        sequences = [self._encode(*text) for text in texts]  # learned rows as negative numbers, -1 - row
        frozen = self.encoder.table[list(self._ids)].to(learned.dtype)
        input_ids = torch.tensor(sequences)
        eos = (input_ids == self._row(self.facts.eos_id)).int().argmax(-1) if self.encoder.pools else None
        input_ids = torch.where(input_ids < 0, len(frozen) - 1 - input_ids, input_ids)
        layers = torch.full((len(texts),), self.facts.default_layer or 0)
        states, _, *pooled, _ = self.encoder(
            input_ids, torch.cat([frozen, learned]).to(self.encoder.dtype), torch.ones(input_ids.shape), layers, eos
        )
        return states, pooled[0] if pooled else None

    def _encode(self, template: str, first: int, count: int, total: int) -> list[int]:
        """`template` as rows of the small table, BOS, EOS and padding included; -1 - r for learned row r."""
        bos = [] if self.facts.bos_id is None else [self.facts.bos_id]
        room = self.facts.length - len(bos) - 1
        pieces = re.split(r"\{(\d*)\}", template)
        inner: list[int] = []
        for position, piece in enumerate(pieces):
            if position % 2 == 0:
                inner += [self._row(i) for i in self.tokenizer(piece, add_special_tokens=False).input_ids]
            elif piece:  # the word of one picture
                inner.append(-1 - (first + total + int(piece) - 1))
            else:
                inner += [-1 - (first + row) for row in range(count)]
        if any(row < 0 for row in inner[room:]):
            raise UsageError(
                f"the prompt {template!r} is {len(inner)} tokens, {self.facts.graph} reads {room}: "
                "shorten it until the word fits"
            )
        ids = [*map(self._row, bos), *inner[:room], self._row(self.facts.eos_id)]
        return ids + [self._row(self.facts.pad_id)] * (self.facts.length - len(ids))

    def _row(self, token_id: int) -> int:
        return self._ids.setdefault(token_id, len(self._ids))


def draw(word: Word, recipe: Recipe, timesteps: int, generator: torch.Generator | None = None) -> Draw:
    """A word's next batch from its own random stream, or from another.

    Pictures come in shuffled rounds, and timesteps one from each of B equal parts (Kingma et al. 2021, arXiv
    2107.00630, appendix I.1): both unbiased, and much less scattered than independent draws.
    """
    rng, count, moments = generator or word.generator, recipe.batch_size, word.moments
    rounds = -(-count // len(moments.mean))
    chosen = torch.cat([torch.randperm(len(moments.mean), generator=rng) for _ in range(rounds)])[:count].tolist()
    posterior, eps = (
        [torch.randn(moments.mean[index].shape, generator=rng) for index in chosen] for _ in ("posterior", "eps")
    )
    parts = (torch.randperm(count, generator=rng) + torch.rand(1, generator=rng)) / count
    low, high = recipe.timesteps
    templates = torch.randint(len(word.prompts), (count,), generator=rng).tolist()
    prompts = [word.prompts[index] for index in templates]
    if word.captions is not None:
        prompts = [word.captions[index % moments.pictures] for index in chosen]
    if recipe.per_image:
        own = (torch.rand(count, generator=rng) < recipe.per_image).tolist()
        prompts = [
            per_image_template(prompt, index % moments.pictures) if mixed else prompt
            for prompt, index, mixed in zip(prompts, chosen, own, strict=True)
        ]
    return Draw(
        [moments.mean[index] + moments.std[index] * noise for index, noise in zip(chosen, posterior, strict=True)],
        eps,
        ((low + (high - low) * parts) * timesteps).long().clamp(max=timesteps - 1),
        None if moments.masks is None else [moments.masks[index] for index in chosen],
        prompts,
    )


def of_one_shape(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The places of tensors that can be stacked, shape by shape."""
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    return list(places.values())


def _prepare(word: Word, recipe: Recipe, seed: int) -> None:
    """Rows, random stream and optimiser at the start."""
    word.generator.manual_seed(seed)
    for name, initial in word.initial.items():
        if initial.shape[0] != recipe.vectors:
            raise UsageError(f"{word.token!r} starts from {initial.shape[0]} vectors, the recipe has {recipe.vectors}")
        word.rows[name] = torch.nn.Parameter(initial.clone())
        if recipe.per_image:
            word.picture_rows[name] = torch.nn.Parameter(initial[:1].repeat(word.moments.pictures, 1))
    word.optimizer = torch.optim.AdamW(
        [*word.rows.values(), *word.picture_rows.values()],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        foreach=False,
    )


def _tensors_of(word: Word) -> dict[str, torch.Tensor]:
    """The word's rows and its optimiser's moments, by name; made if no step has been taken yet."""
    parameters = {f"rows.{name}": rows for name, rows in word.rows.items()}
    parameters |= {f"picture_rows.{name}": rows for name, rows in word.picture_rows.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        moments = word.optimizer.state[parameter]
        if not moments:  # as AdamW makes them at its first step
            moments.update(
                step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        tensors[name] = parameter
        tensors |= {f"{name}.{moment}": value for moment, value in moments.items()}
    return tensors


def noise_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The model's own noise schedule, whatever sampler its config was written for."""
    keys = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
        "rescale_betas_zero_snr",
    )  # fmt: skip
    return DDPMScheduler(**{key: config[key] for key in keys if key in config})


def prediction_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, eps: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet is asked for: eps, v (Salimans and Ho 2022) or x0."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return cast(torch.Tensor, scheduler.get_velocity(latents, eps, timesteps))
    if kind == "sample":
        return latents
    raise UsageError(f"the model predicts {kind!r}: epsilon, v_prediction and sample can be learned with")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma) as the weight of the x0 error (Hang et al., arXiv 2303.09556), for each prediction."""
    alphas: torch.Tensor = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    clipped = snr.clamp(max=gamma)
    weights = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}
    return weights[scheduler.config.prediction_type]


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The rate of optimiser step `step` (the first is 0): linear warm-up, then constant or half a cosine down to 0."""
    rate = recipe.learning_rate * min(1.0, (step + 1) / (recipe.warmup + 1))
    if recipe.rate is Rate.CONSTANT:
        return rate
    return rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def with_norm(rows: torch.Tensor, norm: Norm, target: float, rate: float) -> torch.Tensor:
    """`rows` [n, D] with their lengths free, set to `target`, or pulled there by 100 x rate, at most all the way.

    The pull is cloneofsimo's (lora, `ti_train`), the target the vocabulary's median (OneTrainer).
    """
    if norm is Norm.FREE:
        return rows
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-8)
    pull = 1.0 if norm is Norm.FIXED else min(1.0, 100 * rate)
    return rows / length * (length + pull * (target - length))


def vocabulary_norm(table: torch.Tensor) -> float:
    """The median length of the vocabulary's rows [V, D]."""
    return float(torch.linalg.vector_norm(table.float(), dim=-1).median())


def distance_to_start(word: Word) -> torch.Tensor:
    """Mean squared distance of the word's rows to where they started, summed over its encoders."""
    return torch.stack([(rows - word.initial[name]).square().sum(-1).mean() for name, rows in word.rows.items()]).sum()


def few_positions(dtype: torch.dtype, positions: int) -> bool:
    """Whether products and a softmax attend faster than PyTorch's fused kernels.

    In bf16, whose fused backward is ten times slower on a CPU, a thousand are few.
    """
    return positions <= (1024 if dtype is torch.bfloat16 else 256)


def compute_dtype(compute: Compute) -> torch.dtype:
    """bf16 where it was asked for, or where this processor multiplies it natively."""
    if compute is Compute.AUTO:
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return torch.bfloat16 if compute is Compute.BF16 else torch.float32


def has_fast_bf16() -> bool:
    """Whether this processor has bf16 products (AVX512-BF16 or AMX)."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16"))
