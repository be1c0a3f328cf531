"""Learning words: optimiser steps over batches that many words share. No files, no progress bars.

Only the words' rows [n, D], and output vectors if the recipe has any, are trained. The text encoder is the module that
is exported, given a small embedding table: the vocabulary rows that the prompts use, followed by the words' rows.
Output vectors are written into copies of a prompt's context, one for each layer of the network, as the runtime does it.
Each word has its own rows, loss, optimiser, random stream and stopping step; words in a batch do not affect each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch.nn.functional import mse_loss, pad

from oneword.engines.errors import EngineError, UsageError
from oneword.export.chroma import Chroma
from oneword.export.families import AnyEncoder, family_of
from oneword.export.flux import Flux
from oneword.export.modules import DenoiseStep, UNet
from oneword.export.sd3 import StableDiffusion3
from oneword.export.source import Source
from oneword.runtime.concept import Concept, check_size
from oneword.runtime.samplers import stage_at
from oneword.train.compute import compute_dtype, few_positions
from oneword.train.losses import distance_to_start
from oneword.train.noising import noising_of
from oneword.train.norms import vocabulary_mean_norm, vocabulary_norm, with_norm
from oneword.train.parallel import Recorded, in_threads, parts_of
from oneword.train.prompts import Encoded, FrozenPrompts, PromptEncoder, Text, probes
from oneword.train.recipe import Output, Recipe
from oneword.train.stopping import has_settled
from oneword.train.word import (
    Batch,
    Draw,
    Rows,
    Word,
    all_prompts,
    draw,
    group_by_shape,
    prepare,
    prepare_output,
    tensors_of,
)

NetworkModule: TypeAlias = UNet | StableDiffusion3 | Flux | Chroma
GUIDANCE = 1.0  # of a network that takes it as an input: the one without effect
TEXTS_PER_CALL = 32  # of a text encoder, where a word's captions are encoded: there may be a thousand


class Conditions(NamedTuple):
    """What the network attends to for B pictures: contexts [B, T, D], pooled vectors [B, P] and masks [B, T]; with
    output vectors, a pool of contexts [M, T, D] with masks [M, T], and the ones of each picture and layer, [B, 2, L]:
    for its keys and for its values."""

    context: torch.Tensor
    pooled: torch.Tensor | None
    mask: torch.Tensor | None
    branch_context: torch.Tensor | None


class Learner:
    """Learns words with a frozen model. All words are learned for the same text encoders.

    Raises `UsageError` for a model or prompt that cannot be used, `ConceptError` for a word that would be too large for
    a file, `EngineError` if a loss is not finite.
    """

    def __init__(self, source: Source, words: Sequence[Word], recipe: Recipe, seed: int) -> None:
        self.source = source
        self.words = words
        self.recipe = recipe
        self.steps_done = 0
        self.dtype = compute_dtype(recipe.compute)
        source.network.to(self.dtype, memory_format=torch.channels_last)
        if recipe.gradient_checkpointing:
            source.network.enable_gradient_checkpointing()
            source.network.train()  # diffusers checkpoints only in training mode; these networks have no dropout
        family = family_of(source)
        self.noising = noising_of(source, family, recipe)
        modules = {graph.name: graph.module for graph in family.graphs}
        self.network = Recorded(cast(NetworkModule, cast(DenoiseStep, modules["denoise_step"]).network))
        self.conditioning = family.conditioning
        self.encoders = {
            encoder.graph: PromptEncoder(
                cast(AnyEncoder, modules[encoder.graph]), source.tokenizers[encoder.graph], encoder
            )
            for encoder in family.encoders
        }
        self.target_norms = {name: vocabulary_norm(prompt.encoder.table) for name, prompt in self.encoders.items()}
        mean_lengths = {name: vocabulary_mean_norm(prompt.encoder.table) for name, prompt in self.encoders.items()}
        self._frozen: dict[str, FrozenPrompts] = {}
        self._first_row: list[int] = []
        next_row = 0
        for word in words:
            prepare(word, recipe, seed, mean_lengths)
            self._first_row.append(next_row)
            next_row += recipe.vectors + (word.moments.pictures if recipe.per_image else 0)
        for name, encoder in self.encoders.items():
            if not any(name in word.rows for word in words):
                self._frozen[name] = FrozenPrompts(encoder)
        if recipe.output is not Output.NONE:
            self._prepare_outputs()
        for word in words:
            check_size(word.token, sum(part.numel() for part in [*word.rows.values(), *word.out.values()]))
        self._check_prompts()
        # Each word's fixed batch, from a separate random stream, so that a resumed run has the same one.
        self._probes = [
            draw(word, recipe, len(self.noising), torch.Generator().manual_seed(seed + 1)) for word in words
        ]

    def finished(self) -> bool:
        """Whether all steps are done, or every word has stopped."""
        return self.steps_done >= self.recipe.steps or all(word.stopped for word in self.words)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.recipe.learning_rate_at(self.steps_done)

    def step(self) -> list[float]:
        """Takes one optimiser step for each word not stopped. Returns the words' losses, NaN for stopped words."""
        active = [index for index, word in enumerate(self.words) if not word.stopped]
        if self.steps_done == 0:
            for index in active:
                self.words[index].start_loss = self.probe_loss(index)
        losses = np.zeros(len(self.words))
        size = self.recipe.words_per_call or len(active)
        for _ in range(self.recipe.accumulation):
            for group in (active[first : first + size] for first in range(0, len(active), size)):
                draws = {index: draw(self.words[index], self.recipe, len(self.noising)) for index in group}
                losses[group] += np.divide(self._accumulate(draws), self.recipe.accumulation)
        for index in active:
            self._update(index, losses[index])
        self.steps_done += 1
        if self.recipe.stop_below is not None:
            for index in active:
                word = self.words[index]
                word.probe_losses.append(self.probe_loss(index))
                word.stopped = has_settled(word.probe_losses, self.recipe.stop_below)
        return [float(losses[index]) if index in active else math.nan for index in range(len(self.words))]

    @torch.no_grad()
    def probe_loss(self, index: int, batch: Draw | None = None) -> float:
        """A word's loss on a batch, without learning from it; by default on the word's fixed batch."""
        return float(self._losses({index: batch or self._probes[index]})[0])

    def gradient(self, index: int, batches: Sequence[Draw]) -> Rows:
        """The mean gradient of a word's loss on batches, by text encoder [n, D], without learning from it."""
        word = self.words[index]
        for batch in batches:
            self._accumulate({index: batch})
        gradients = {name: cast(torch.Tensor, rows.grad) / len(batches) for name, rows in word.rows.items()}
        for parameter in word.parameters():
            parameter.grad = None
        return gradients

    @torch.no_grad()
    def response(self, index: int, templates: Sequence[str], rows: Rows, out: Rows | None = None) -> float:
        """How much the network's prediction depends on the text around the word, with `rows` as the word's rows and
        `out` as its output vectors, by default those it has.

        This is the mean squared deviation from the mean over `templates`, for the same noise at four fifths of the
        schedule, where the scene is decided. It is near zero for a word that drowns out the rest of its prompt.
        """
        shape = self.words[index].moments.mean[0].shape
        noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).expand(len(templates), *shape)
        timesteps = torch.full((len(templates),), int(0.8 * len(self.noising)))
        self._set_attention(noise[0])
        stages = self._stages(timesteps, noise)
        out_of = {index: self.words[index].out if out is None else out}
        conditions = self._conditions([(index, template) for template in templates], stages, {index: rows}, out_of)
        predicted = self._predict(noise, timesteps, conditions)
        return float((predicted - predicted.mean(0)).square().mean())

    def release_encoders(self) -> None:
        """Frees the weights of text encoders that no word is learned for, after encoding every prompt of the run: those
        of the words, and the probes that `response` is given at its end. Their modules in the source are then empty."""
        for name, frozen in self._frozen.items():
            for index, word in enumerate(self.words):
                for prompt in [*all_prompts(word, self.recipe), *probes(self.recipe.subject)]:
                    frozen([self._text(name, index, prompt)])
            frozen.release()
            self.source.text_encoders[name].to("meta")

    def rows_in_use(self, index: int) -> int:
        """How many vectors a word has so far, by the steps it has taken: a stopped word gets no more vectors."""
        return self.recipe.vectors_at(len(self.words[index].losses))

    def concept(self, index: int, provenance: Mapping[str, str]) -> Concept:
        """The word as it is now."""
        word = self.words[index]
        count = self.rows_in_use(index)
        if word.rows.keys() != self.encoders.keys() or self.conditioning.zero_tokens:  # an encoder has no rows
            provenance = {**provenance, "text": word.text}
        layers = {name: self.encoders[name].facts.default_layer for name in word.out}
        return Concept(
            word.token,
            {name: rows.detach()[:count].numpy().copy() for name, rows in word.rows.items()},
            provenance,
            {name: vectors.detach().numpy().copy() for name, vectors in word.out.items()},
            values_only=self.recipe.values_only and bool(word.out),
            encoder_layers={name: layer for name, layer in layers.items() if layer is not None},
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that changes during learning: tensors, and facts as JSON values."""
        tensors: dict[str, torch.Tensor] = {}
        for index, word in enumerate(self.words):
            tensors[f"{index}.generator"] = word.generator.get_state()
            for name, value in tensors_of(word).items():
                tensors[f"{index}.{name}"] = value.detach().clone()
        names = ("start_loss", "losses", "probe_losses", "stopped")
        facts = [{name: getattr(word, name) for name in names} for word in self.words]
        return tensors, {"steps_done": self.steps_done, "words": facts}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continues from what `state` returned, bit for bit."""
        self.steps_done = facts["steps_done"]
        for index, (word, saved) in enumerate(zip(self.words, facts["words"], strict=True)):
            word.generator.set_state(tensors[f"{index}.generator"])
            word.start_loss, word.stopped = saved["start_loss"], saved["stopped"]
            word.losses, word.probe_losses = list(saved["losses"]), list(saved["probe_losses"])
            for name, value in tensors_of(word).items():
                with torch.no_grad():
                    value.copy_(tensors[f"{index}.{name}"])

    def _accumulate(self, draws: Mapping[int, Draw]) -> list[float]:
        """Adds the gradients of the drawn words' losses to their rows. Returns the losses.

        Pictures of the same shape are computed in parts, each on its own thread. Parts synchronise once per step, not
        in every operation, so another busy process slows learning by no more than its share of the processor.
        """
        batch = Batch.of(draws)
        parameters = [parameter for index in draws for parameter in self.words[index].parameters()]
        errors = torch.empty(len(batch.prompts))

        def gradients(part: Sequence[int]) -> Sequence[torch.Tensor | None]:
            part_errors = self._errors(batch, part)
            errors[part] = part_errors.detach()
            loss = (part_errors / batch.counts[part]).sum() / self.recipe.accumulation
            return torch.autograd.grad(loss, parameters, allow_unused=True)

        self._prepare(batch)
        for group in group_by_shape(batch.latents):
            self._set_attention(batch.latents[group[0]])
            parts = parts_of(group, torch.get_num_threads())
            if len(parts) > 1 and not self.recipe.gradient_checkpointing:
                self._record(batch, parts)
            for part_gradients in in_threads(gradients, parts):
                for rows, gradient in zip(parameters, part_gradients, strict=True):
                    if gradient is not None:  # None if the part has no pictures of this word
                        rows.backward(gradient)
        losses = batch.losses(errors)
        if self.recipe.init_weight:
            penalties = [self._penalty(index) for index in draws]
            torch.autograd.backward(torch.stack(penalties).sum() / self.recipe.accumulation)
            losses = [loss + penalty.detach() for loss, penalty in zip(losses, penalties, strict=True)]
        return [float(loss) for loss in losses]

    @torch.no_grad()
    def _record(self, batch: Batch, parts: Sequence[Sequence[int]]) -> None:
        """Records the network for parts of these sizes, unless it has been recorded."""
        for part in {len(part): part for part in parts}.values():
            noisy = torch.stack([batch.latents[picture] for picture in part])
            timesteps = batch.timesteps[part]
            conditions = self._conditions(
                [(batch.words[picture], batch.prompts[picture]) for picture in part], self._stages(timesteps, noisy)
            )
            self.network.record(*self._network_inputs(noisy, timesteps, conditions))

    def _penalty(self, index: int) -> torch.Tensor:
        """The weighted distance of a word to its initial rows, which the regularised recipe adds to its loss."""
        word = self.words[index]
        return self.recipe.init_weight * distance_to_start(word.rows, word.initial)

    def _losses(self, draws: Mapping[int, Draw]) -> list[torch.Tensor]:
        """The loss of each drawn word, without the penalty: one network call per picture size."""
        batch = Batch.of(draws)
        errors: list[torch.Tensor] = [torch.empty(0)] * len(batch.prompts)
        for group in group_by_shape(batch.latents):
            self._set_attention(batch.latents[group[0]])
            for picture, error in zip(group, self._errors(batch, group), strict=True):
                errors[picture] = error
        return batch.losses(torch.stack(errors))

    def _errors(self, batch: Batch, pictures: Sequence[int]) -> torch.Tensor:
        """The squared errors of pictures of one shape, weighted and summed over each picture's unmasked latents [B]."""
        x_0, eps, t = (
            torch.stack([values[picture] for picture in pictures])
            for values in (batch.latents, batch.eps, batch.timesteps)
        )
        x_t = self.noising.noisy(x_0, eps, t)
        conditions = self._conditions(
            [(batch.words[picture], batch.prompts[picture]) for picture in pictures], self._stages(t, x_0)
        )
        predicted = self._predict(x_t, t, conditions)
        error = mse_loss(predicted, self.noising.target(x_0, eps, t), reduction="none")
        error = error * self.noising.weights(t)[:, None, None, None]
        if batch.masks is not None:
            error = error * torch.stack([batch.masks[picture] for picture in pictures])
        return error.sum((1, 2, 3))

    def _set_attention(self, latents: torch.Tensor) -> None:
        """Gives a UNet the attention that is fastest for latents [C, h, w]; a transformer has its own."""
        plain = few_positions(self.dtype, latents.shape[-1] * latents.shape[-2])
        if isinstance(self.network.module, UNet) and self.network.variant is not plain:
            self.network.module.attend_plainly(plain)
            self.network.variant = plain

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The network's prediction [B, C, h, w] as float32, computed in the network's type."""
        return self.network(*self._network_inputs(noisy, timesteps, conditions)).float()

    def _network_inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor | None, ...]:
        context, pooled, mask, branch_context = conditions
        return (
            noisy.to(self.dtype, memory_format=torch.channels_last),
            self.noising.times(timesteps, noisy),
            context.to(self.dtype),
            None if pooled is None else pooled.to(self.dtype),
            self._time_ids(noisy) if self.conditioning.time_ids else None,
            branch_context,
            *((torch.full((len(noisy),), GUIDANCE),) if self.network.module.embeds_guidance else ()),
            *((mask,) if self.network.module.masks_context else ()),
        )

    def _prepare(self, batch: Batch) -> None:
        """Tokenizes the batch's prompts, and encodes them with frozen encoders, which only one thread may do; encoding
        them later reuses the ids and the frozen encoders' results."""
        for index, prompt in dict.fromkeys(zip(batch.words, batch.prompts, strict=True)):
            for name, encoder in self.encoders.items():
                text = self._text(name, index, prompt)
                encoder.ids(text)
                if name in self._frozen:
                    self._frozen[name]([text])

    def _text(self, encoder: str, index: int, prompt: str) -> Text:
        word = self.words[index]
        text = None if encoder in word.rows else word.text
        return Text(prompt, self._first_row[index], self.rows_in_use(index), self.recipe.vectors, text)

    def _check_prompts(self) -> None:
        """Raises `UsageError` for a prompt without room for all of its word's vectors, now and not at the step that
        draws it or has as many vectors."""
        vectors = self.recipe.vectors
        for first, word in zip(self._first_row, self.words, strict=True):
            for prompt in all_prompts(word, self.recipe):
                for name in word.rows:
                    self.encoders[name].ids(Text(prompt, first, vectors, vectors))

    def _prepare_outputs(self) -> None:
        """Gives every word output vectors: the states of its initial rows, averaged over its prompts.

        Raises `UsageError` for a network that cannot use them.
        """
        if self.recipe.values_only and not self.conditioning.repeatable:
            raise UsageError(
                f"values_only with {self.source.model}, whose keys and values share their states (joint attention): "
                "set values_only=false"
            )
        if not all(self.output_places.keys() & word.rows for word in self.words):
            raise UsageError(
                f"output vectors of {', '.join(self.words[0].rows)}, whose states are not in the network's context: "
                f"set encoders to any of {', '.join(self.output_places)}, or output to none"
            )
        layers = self.network.module.num_layers if self.recipe.output is Output.LAYERS else 1
        for index, word in enumerate(self.words):
            initial: dict[str, torch.Tensor] = {}
            for name in [name for name in self.output_places if name in word.rows]:
                encoder = self.encoders[name]
                texts = [self._text(name, index, prompt) for prompt in dict.fromkeys(word.captions or word.prompts)]
                sums = torch.zeros(self.recipe.vectors, encoder.facts.hidden_width or 0)
                for first in range(0, len(texts), TEXTS_PER_CALL):
                    part = texts[first : first + TEXTS_PER_CALL]
                    with torch.no_grad():
                        states = encoder(part, self._all_rows(name, {})).states
                    for text, text_states in zip(part, states, strict=True):
                        for position, number in encoder.places(text):
                            sums[number] += text_states[position]
                count = sum(len(encoder.places(text)) for text in texts) / self.recipe.vectors
                initial[name] = (sums / count).expand(self.recipe.stages, layers, -1, -1).clone()
            prepare_output(word, self.recipe, initial)

    @cached_property
    def output_places(self) -> dict[str, tuple[int, slice]]:
        """Of each encoder whose states are in the context: its first token and its columns."""
        places: dict[str, tuple[int, slice]] = {}
        token = 0
        for block in self.conditioning.context:
            column = 0
            for name in block:
                width = self.encoders[name].facts.hidden_width or 0
                places[name] = token, slice(column, column + width)
                column += width
            token += max(self.encoders[name].facts.length for name in block)
        return places

    def _stages(self, timesteps: torch.Tensor, x_0: torch.Tensor) -> list[int]:
        """The stage of each timestep [B]."""
        times = self.noising.times(timesteps, x_0).tolist()
        return [stage_at(time, self.recipe.stages, len(self.noising)) for time in times]

    def _conditions(
        self,
        prompts: Sequence[tuple[int, str]],
        stages: Sequence[int],
        rows_of: Mapping[int, Rows] | None = None,
        out_of: Mapping[int, Rows] | None = None,
    ) -> Conditions:
        """The conditions of words' prompts, each in its stage.

        `rows_of` and `out_of` override the rows and the output vectors of words by index.
        """
        context, pooled, mask = self._context(prompts, rows_of)
        if self.recipe.output is Output.NONE:
            return Conditions(context, pooled, mask, None)
        outs = [(out_of or {}).get(index, self.words[index].out) for index, _ in prompts]
        count = next(vectors.shape[1] for out in outs for vectors in out.values())
        written = context[:, None].repeat(1, count, 1, 1)
        for name, (first, columns) in self.output_places.items():
            pictures: list[int] = []
            tokens: list[int] = []
            vectors: list[torch.Tensor] = []  # [layers, Dh]
            for picture, ((index, template), stage, out) in enumerate(zip(prompts, stages, outs, strict=True)):
                if name in out:
                    for position, number in self.encoders[name].places(self._text(name, index, template)):
                        pictures.append(picture)
                        tokens.append(first + position)
                        vectors.append(out[name][stage, :, number])
            if vectors:
                written[pictures, :, tokens, columns] = torch.stack(vectors)
        indices, layers = torch.arange(len(prompts)), self.network.module.num_layers
        pool, owners = written.flatten(0, 1), indices.repeat_interleave(count)
        keys = values = indices[:, None] * count + torch.arange(layers) % count
        if self.recipe.values_only:
            pool, owners = torch.cat([context, pool]), torch.cat([indices, owners])
            keys, values = indices[:, None].expand(-1, layers), len(prompts) + values
        return Conditions(pool, pooled, None if mask is None else mask[owners], torch.stack([keys, values], 1))

    def _context(
        self, prompts: Sequence[tuple[int, str]], rows_of: Mapping[int, Rows] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encodes words' prompts to [B, T, D], [B, P] if the family pools, and [B, T] if it masks; each distinct prompt
        once.

        `rows_of` overrides the rows of words by index.
        """
        unique = list(dict.fromkeys(prompts))
        places = {pair: place for place, pair in enumerate(unique)}
        rows = [places[pair] for pair in prompts]
        encoded: dict[str, Encoded] = {}
        for name, encoder in self.encoders.items():
            texts, frozen = [self._text(name, index, prompt) for index, prompt in unique], self._frozen.get(name)
            encoded[name] = frozen(texts) if frozen else encoder(texts, self._all_rows(name, rows_of or {}))
        conditioning = self.conditioning
        blocks = [torch.cat([encoded[name].states for name in block], -1) for block in conditioning.context]
        if width := conditioning.width:
            blocks = [pad(block, (0, width - block.shape[-1])) for block in blocks]
            blocks.append(torch.zeros(len(unique), conditioning.zero_tokens, width))
        pooled = torch.cat([encoded[name].pooled for name in conditioning.pooled], -1) if conditioning.pooled else None
        mask = self._mask([encoded[block[0]] for block in conditioning.context])
        return (
            torch.cat(blocks, 1)[rows],
            None if pooled is None else pooled[rows],
            None if mask is None else mask[rows],
        )

    def _mask(self, blocks: Sequence[Encoded]) -> torch.Tensor | None:
        """[B, T]: 1 for tokens of the blocks' prompts that the network attends to; None if that is all of them."""
        padding = self.conditioning.attended_padding
        if padding is None:
            return None
        attended = [torch.arange(block.states.shape[1]) <= block.eos_index[:, None] + padding for block in blocks]
        return torch.cat(attended, 1).float()

    def _all_rows(self, encoder: str, rows_of: Mapping[int, Rows]) -> torch.Tensor:
        """Every word's rows [R, D], each word's followed by its per-picture rows."""
        stores = [
            store for i, word in enumerate(self.words) for store in (rows_of.get(i, word.rows), word.picture_rows)
        ]
        return torch.cat([store[encoder] for store in stores if encoder in store])

    def _time_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """SDXL's size conditioning [B, 6]: the original size is the picture's, uncropped."""
        factor = 2 ** (len(self.source.vae.config.block_out_channels) - 1)
        height, width = (float(side * factor) for side in latents.shape[-2:])
        return torch.tensor([height, width, 0.0, 0.0, height, width]).repeat(len(latents), 1)

    def _update(self, index: int, loss: float) -> None:
        word = self.words[index]
        if not math.isfinite(loss):
            raise EngineError(
                f"the loss of {word.token!r} is {loss} at step {self.steps_done + 1}: lower the learning rate "
                f"(it is {self.learning_rate:g}) or compute in fp32"
            )
        for group in word.optimizer.param_groups:
            group["lr"] = self.learning_rate
        word.optimizer.step()
        word.optimizer.zero_grad(set_to_none=True)
        if word.output_optimizer is not None:
            for group in word.output_optimizer.param_groups:
                group["lr"] = self.recipe.output_rate_at(self.steps_done) * group["spread"]
            word.output_optimizer.step()
            word.output_optimizer.zero_grad(set_to_none=True)
        count = self.rows_in_use(index)
        word.losses.append(loss)
        with torch.no_grad():
            for name, rows in word.rows.items():
                rows[count:] = word.initial[name][count:]  # not in use so far
                rows[:count] = with_norm(rows[:count], self.recipe.norm, self.target_norms[name], self.learning_rate)
