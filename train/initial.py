"""A word's initial rows: a row of the vocabulary, a mean of several, a random row of median length, or a concept's.

`auto` stands for words that `oneword.train.search` finds in the pictures, starting from the vocabulary's mean row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from oneword.engines.errors import UsageError
from oneword.export.source import Source
from oneword.runtime.concept import Concept, load_concept
from oneword.train.norms import vocabulary_norm
from oneword.train.word import Rows

AUTO, RANDOM = "auto", "random"


def initial_rows(source: Source, init: str, vectors: int, seed: int, encoders: Collection[str] = ()) -> Rows:
    """Returns a word's initial rows, `vectors` for each of `encoders`, or for all of the model's if there are none.

    See `oneword.train.tasks.Task` for `init`.
    """
    models = {name: model for name, model in source.text_encoders.items() if not encoders or name in encoders}
    if path := concept_file(init):
        return _rows_of_concept(load_concept(path), models, vectors)
    rows: dict[str, torch.Tensor] = {}
    for name, model in models.items():
        table = embedding_table(model)
        if init == AUTO:
            rows[name] = table.mean(0, keepdim=True).repeat(vectors, 1)
        elif init == RANDOM:
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(vectors, table.shape[1], generator=generator)
            rows[name] = direction / direction.norm(dim=-1, keepdim=True) * vocabulary_norm(table)
        else:
            ids = [i for word in split_words(init) for i in token_ids(source.tokenizers[name], word)]
            rows[name] = table[ids].mean(0, keepdim=True).repeat(vectors, 1)
    return rows


def concept_file(init: str) -> Path | None:
    """The file of an init that is a concept; None if the init is words."""
    return Path(init) if init.endswith(".safetensors") else None


def initial_text(init: str) -> str:
    """What replaces a word in the prompt of a text encoder that it is not learned for: its init, if that is words."""
    return "" if init in (AUTO, RANDOM) or concept_file(init) else init


def _rows_of_concept(concept: Concept, models: Mapping[str, Any], vectors: int) -> Rows:
    rows: dict[str, torch.Tensor] = {}
    for name, model in models.items():
        width = embedding_table(model).shape[1]
        if name not in concept.vectors or concept.vectors[name].shape[1] != width:
            raise UsageError(
                f"the concept {concept.token!r} has no vectors of width {width} for {name}: give another init"
            )
        if not concept.vectors[name].any(-1).all():
            raise UsageError(
                f"the concept {concept.token!r} has rows of zeros for {name} beside its output vectors, from which "
                "learning cannot start: give another init"
            )
        if (count := len(concept.vectors[name])) > vectors:
            raise UsageError(
                f"the concept {concept.token!r} has {count} vectors for {name}, the word would have {vectors}: add "
                f"--vectors {count}, or give another init"
            )
        vectors_of_concept = torch.from_numpy(concept.vectors[name].copy())
        rows[name] = vectors_of_concept[torch.arange(vectors).clamp(max=len(vectors_of_concept) - 1)]
    return rows


def embedding_table(model: Any) -> torch.Tensor:
    """A text encoder's vocabulary rows [V, D] float32."""
    table: torch.Tensor = model.get_input_embeddings().weight
    return table.detach().float()


def split_words(init: str) -> list[str]:
    """The words of an init, separated by spaces or commas. Raises `UsageError` if there are none or one is not text."""
    words = [word for word in re.split(r"[\s,]+", init) if word]
    if not words:
        raise UsageError("init is empty: give a word that roughly describes the pictures, for example toy")
    if any("\ud800" <= character <= "\udfff" for character in init):  # how Python reads bytes that are not UTF-8
        raise UsageError(f"init is {init!r}, but must be UTF-8: give a word that describes the pictures")
    return words


def token_ids(tokenizer: Any, word: str) -> list[int]:
    """The token ids of a word, without BOS and EOS."""
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise UsageError(f"init {word!r} has no token in this model: give a word that describes the pictures")
    return ids
