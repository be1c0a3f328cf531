"""A word during learning: what it is learned from, what changes, and its random batches. No models, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from oneword.engines.errors import UsageError
from oneword.train.directional import DirectionalDescent, unit
from oneword.train.pictures import Moments
from oneword.train.prompts import per_image_template
from oneword.train.recipe import Optimizer, Recipe

Rows = Mapping[str, torch.Tensor]  # by text encoder, [n, D] float32


@dataclass
class Word:
    """A word during learning: what it is learned from, and everything that changes.

    `prompts` are templates; `captions`, if given, are one template per picture and replace them. `text` replaces the
    word in the prompt of a text encoder without rows for it, as `Concept.text` does. `out` are output vectors by text
    encoder, [stages, layers, n, Dh], if the recipe has any. `start_loss` is the
    loss on a fixed batch before the first step; `probe_losses` are the losses on that batch after each step, if early
    stopping needs them.
    """

    token: str
    moments: Moments
    initial: Rows
    prompts: Sequence[str]
    captions: Sequence[str] | None = None
    text: str = ""
    rows: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    picture_rows: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    initial_out: Rows = field(default_factory=dict)
    out: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer = field(init=False)
    output_optimizer: torch.optim.Optimizer | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    losses: list[float] = field(default_factory=list)
    start_loss: float = math.nan
    probe_losses: list[float] = field(default_factory=list)
    stopped: bool = False

    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is learned: the word's rows, its per-picture rows and its output vectors."""
        return [*self.rows.values(), *self.picture_rows.values(), *self.out.values()]


@dataclass(frozen=True)
class Draw:
    """One word's share of a batch, B pictures.

    `latents` and `eps` are B tensors [C, h, w], whose sizes may differ; `timesteps` is [B] i64; `masks` is B tensors
    [1, h, w] or None; `prompts` is B templates.
    """

    latents: Sequence[torch.Tensor]
    eps: Sequence[torch.Tensor]
    timesteps: torch.Tensor
    masks: Sequence[torch.Tensor] | None
    prompts: Sequence[str]

    def count(self) -> float:
        """The number of unmasked latents."""
        if self.masks is None:
            return float(sum(latents.numel() for latents in self.latents))
        return sum(float(mask.sum()) * len(latents) for mask, latents in zip(self.masks, self.latents, strict=True))


@dataclass(frozen=True)
class Batch:
    """The draws of several words, B pictures in all.

    `words` are B indices. `latents`, `eps` and `masks` are as in `Draw`; `masks` is None if no word has masks, and all
    ones for words without them otherwise. `counts` [B] is the number of unmasked latents that a picture's word has in
    the batch, `sizes` the number of pictures of each word.
    """

    words: Sequence[int]
    latents: Sequence[torch.Tensor]
    eps: Sequence[torch.Tensor]
    timesteps: torch.Tensor
    masks: Sequence[torch.Tensor] | None
    prompts: Sequence[str]
    counts: torch.Tensor
    sizes: Sequence[int]

    @classmethod
    def of(cls, draws: Mapping[int, Draw]) -> Batch:
        """The draws, concatenated."""
        masks = None
        if any(part.masks is not None for part in draws.values()):
            masks = [
                mask
                for part in draws.values()
                for mask in part.masks or [torch.ones_like(latents[:1]) for latents in part.latents]
            ]
        sizes = [len(part.latents) for part in draws.values()]
        counts = [part.count() for part in draws.values()]
        return cls(
            [index for index, part in draws.items() for _ in part.latents],
            [latents for part in draws.values() for latents in part.latents],
            [eps for part in draws.values() for eps in part.eps],
            torch.cat([part.timesteps for part in draws.values()]),
            masks,
            [prompt for part in draws.values() for prompt in part.prompts],
            torch.tensor(counts).clamp(min=1e-6).repeat_interleave(torch.tensor(sizes)),
            sizes,
        )

    def losses(self, errors: torch.Tensor) -> list[torch.Tensor]:
        """Each word's mean over its unmasked latents, from the summed errors of its pictures [B]."""
        return [part.sum() for part in (errors / self.counts).split(self.sizes)]


def draw(word: Word, recipe: Recipe, timesteps: int, generator: torch.Generator | None = None) -> Draw:
    """Draws a word's next batch, from the word's random stream unless `generator` is given.

    Pictures are drawn in shuffled rounds, and one timestep from each of B equal parts of the schedule (Kingma et al.
    2021, arXiv 2107.00630, appendix I.1). Both are unbiased and have much less variance than independent draws.
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
        with_picture_word = (torch.rand(count, generator=rng) < recipe.per_image).tolist()
        prompts = [
            per_image_template(prompt, index % moments.pictures) if has_word else prompt
            for prompt, index, has_word in zip(prompts, chosen, with_picture_word, strict=True)
        ]
    return Draw(
        [moments.mean[index] + moments.std[index] * noise for index, noise in zip(chosen, posterior, strict=True)],
        eps,
        ((low + (high - low) * parts) * timesteps).long().clamp(max=timesteps - 1),
        None if moments.masks is None else [moments.masks[index] for index in chosen],
        prompts,
    )


def all_prompts(word: Word, recipe: Recipe) -> list[str]:
    """Every prompt that `draw` can return."""
    prompts = [*(word.prompts if word.captions is None else word.captions)]
    if recipe.per_image:
        prompts += [per_image_template(prompt, index) for prompt in prompts for index in range(word.moments.pictures)]
    return prompts


def group_by_shape(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The indices of tensors that can be stacked, grouped by shape."""
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    return list(groups.values())


def prepare(word: Word, recipe: Recipe, seed: int, lengths: Mapping[str, float]) -> None:
    """Sets a word's rows, random stream and optimiser to their initial state.

    `lengths` are the encoders' mean lengths of a vocabulary row, which a directional recipe's rows have.
    """
    word.generator.manual_seed(seed)
    directional = recipe.optimizer is Optimizer.DIRECTIONAL
    if directional:
        word.initial = {name: lengths[name] * unit(initial) for name, initial in word.initial.items()}
    for name, initial in word.initial.items():
        if initial.shape[0] != recipe.vectors:
            raise UsageError(
                f"{word.token!r} starts from {initial.shape[0]} vectors and the recipe has {recipe.vectors}: "
                "give as many initial rows as the recipe has vectors"
            )
        word.rows[name] = torch.nn.Parameter(initial.clone())
        if recipe.per_image:
            word.picture_rows[name] = torch.nn.Parameter(initial[:1].repeat(word.moments.pictures, 1))
    if directional:
        groups = [
            {"params": [store[name]], "length": lengths[name]}
            for store in (word.rows, word.picture_rows)
            for name in store
        ]
        word.optimizer = DirectionalDescent(groups, recipe.learning_rate)
        return
    word.optimizer = torch.optim.AdamW(
        word.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        foreach=False,
    )


def prepare_output(word: Word, recipe: Recipe, initial: Rows) -> None:
    """Gives a word output vectors, [stages, layers, n, Dh] by text encoder, and their optimiser, after `prepare`."""
    word.initial_out = initial
    word.out |= {name: torch.nn.Parameter(vectors.clone()) for name, vectors in initial.items()}
    groups = [{"params": [word.out[name]], "spread": float(vectors[0, 0].std())} for name, vectors in initial.items()]
    word.output_optimizer = torch.optim.AdamW(
        groups, lr=recipe.output_rate, betas=recipe.betas, weight_decay=0.0, foreach=False
    )


def tensors_of(word: Word) -> dict[str, torch.Tensor]:
    """What the word learns and its optimisers' moments, by name; creates the moments before the first step."""
    parameters = {f"rows.{name}": rows for name, rows in word.rows.items()}
    parameters |= {f"picture_rows.{name}": rows for name, rows in word.picture_rows.items()}
    learned = [(word.optimizer, name, parameter) for name, parameter in parameters.items()]
    if word.output_optimizer is not None:
        learned += [(word.output_optimizer, f"out.{name}", vectors) for name, vectors in word.out.items()]
    tensors: dict[str, torch.Tensor] = {}
    for optimizer, name, parameter in learned:
        moments = optimizer.state[parameter]
        if not moments and isinstance(optimizer, torch.optim.AdamW):  # as it does at its first step
            moments.update(
                step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        tensors[name] = parameter
        tensors |= {f"{name}.{moment}": value for moment, value in moments.items()}
    return tensors
