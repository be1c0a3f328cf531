"""What a branch attends to: encoded prompts, and words' output vectors written into them. Pure arrays: runs no graph.

    sources = prompt.sources(stages, layers)      the contexts of each layer's keys and values, in one step
    sources.contexts[0].hidden_states             [chunks * T, D]

A context is described by the vectors that are written into it, and built when its numbers are needed: contexts are
equal exactly if they are written alike, so layers, steps and pictures share one where they do not differ. Not covered:
where contexts are stored (`oneword.runtime.denoiser`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.runtime.concept import Concept
from oneword.runtime.prompt import Chunks

Ids: TypeAlias = npt.NDArray[np.int64]
States: TypeAlias = npt.NDArray[np.float32]
Choice: TypeAlias = tuple[int, int] | None
"""The stage and layer of the vectors that are written; None leaves the encoder's states."""


@dataclass(frozen=True, eq=False)
class Insertion:
    """Where the output vectors of a word for one encoder are written into a prompt's context, at R places."""

    concept: Concept
    encoder: str
    rows: Ids
    """[R]"""
    columns: slice
    numbers: Ids
    """[R]: which of the word's n vectors"""
    scales: States
    """[R]: the token's weight, times the factor that restored the chunk's mean"""

    def write(self, states: States, stage: int, layer: int) -> None:
        """Replaces the states [chunks * T, D] at the word's places."""
        vectors = self.concept.out[self.encoder][stage, layer]
        states[self.rows, self.columns] = vectors[self.numbers] * self.scales[:, None]


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt's context as the encoders return it, and what is written into it for precise words."""

    hidden_states: States
    """[chunks * T, D]"""
    pooled: States | None
    """[P]"""
    finite: bool
    weight_scale: Mapping[str, States]
    """By encoder, [chunks]: the factor that restored each chunk's mean after A1111's weights."""
    mask: States | None = None
    """[chunks * T]: 1 for tokens that the denoiser attends to, else 0; None if that is all of them."""
    insertions: tuple[Insertion, ...] = ()
    layered: "tuple[EncodedPrompt, ...]" = ()
    """The prompt with each layer's rows, if a word has rows for each layer."""

    @property
    def nbytes(self) -> int:
        """The size of its contexts, and of the output vectors that are written into them."""
        contexts = [self.hidden_states, *(prompt.hidden_states for prompt in self.layered)]
        vectors = [insertion.concept.out[insertion.encoder] for insertion in self.insertions]
        return sum(array.nbytes for array in (*contexts, *vectors))

    def sources(self, stages: Sequence[int], layers: int) -> "Sources":
        """The contexts in a step, given the stage of each insertion in it and the network's L."""
        words = [insertion.concept for insertion in self.insertions]
        written = written_choices(words, stages, layers, layered=bool(self.layered))
        prompts = self.layered or (self,) * layers
        keys, values = (
            tuple(Context(prompts[layer], choices) for layer, choices in enumerate(kind)) for kind in written
        )
        return Sources(keys, values)


class Context(NamedTuple):
    """A prompt's context, with the chosen output vectors in it: one choice for each insertion."""

    prompt: EncodedPrompt
    choices: tuple[Choice, ...] = ()

    @property
    def hidden_states(self) -> States:
        """[chunks * T, D]; the prompt's own array if nothing is written."""
        if all(choice is None for choice in self.choices):
            return self.prompt.hidden_states
        states = self.prompt.hidden_states.copy()
        for insertion, choice in zip(self.prompt.insertions, self.choices, strict=True):
            if choice is not None:
                insertion.write(states, *choice)
        return states

    @property
    def pooled(self) -> States | None:
        """[P]"""
        return self.prompt.pooled

    @property
    def mask(self) -> States | None:
        """[chunks * T]: 1 for tokens that are attended to; what is written does not change it."""
        return self.prompt.mask


@dataclass(frozen=True, eq=False)
class Sources:
    """The contexts that a branch attends to in one step: one for each of L layers, or one for all."""

    keys: tuple[Context, ...]
    values: tuple[Context, ...]

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        """Each context once."""
        return tuple(dict.fromkeys((*self.keys, *self.values)))

    def indices(self, places: Mapping[Context, int]) -> tuple[int, ...]:
        """The places of the keys' contexts, then of the values', as many."""
        return tuple(places[context] for context in (*self.keys, *self.values))


def written_choices(
    words: Sequence[Concept], stages: Sequence[int], layers: int, *, layered: bool = False
) -> tuple[list[tuple[Choice, ...]], list[tuple[Choice, ...]]]:
    """What is written for keys and for values, by layer: one choice for each of the words with output vectors.

    `stages` are those of the words in the step; `layers` is L. The lists have one element for all layers if no word
    has vectors for each layer and the prompt is not `layered`.
    """

    def choices(layer: int, *, keys: bool) -> tuple[Choice, ...]:
        return tuple(
            None if keys and word.values_only else (stage, layer if word.layers > 1 else 0)
            for word, stage in zip(words, stages, strict=True)
        )

    count = layers if layered or any(word.layers > 1 for word in words) else 1
    keys, values = ([choices(layer, keys=kind) for layer in range(count)] for kind in (True, False))
    return keys, values


def context_count(words: Sequence[Concept], layers: int, *, layered: bool = False) -> int:
    """How many contexts a prompt has in every step, given its words with output vectors, once for each encoder.

    `layered`: whether a word has rows for each layer.
    """
    keys, values = written_choices(words, [0] * len(words), layers, layered=layered)
    written = (*enumerate(keys), *enumerate(values))
    return len({(layer if layered else 0, choices) for layer, choices in written})


def insertions_of(
    chunks: Chunks, encoder: str, weight_scale: States, first_row: int, columns: slice, repeats: int
) -> Iterator[Insertion]:
    """The insertions of a prompt's words for one encoder, whose states [chunks * T, Dh] are in these columns of the
    context from `first_row` on, `repeats` times."""
    ids, scales = chunks.input_ids.ravel(), (chunks.token_weights * weight_scale[:, None]).ravel()
    starts = first_row + len(ids) * np.arange(repeats)
    used = 0
    for concept in chunks.concepts:
        count = len(concept.vectors.get(encoder, ()))
        if encoder in concept.out:
            numbers = -1 - used - ids
            places = np.flatnonzero((numbers >= 0) & (numbers < count))
            yield Insertion(
                concept,
                encoder,
                (starts[:, None] + places).ravel(),
                columns,
                np.tile(numbers[places], repeats),
                np.tile(scales[places], repeats),
            )
        used += count
