"""Warnings about a word: before learning, from its pictures and init, and after it, from its losses. Only text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oneword.engines.errors import UsageError
from oneword.export.source import Source
from oneword.train.initial import concept_file, split_words, token_ids
from oneword.train.learner import Learner
from oneword.train.pictures import Picture, near_duplicates, unread_pictures
from oneword.train.prompts import probes
from oneword.train.word import Word

FEW_PICTURES = 3
UNMOVED = 0.01  # of its length
UNIMPROVED = 0.999  # of the loss at the start
DEAF = 0.3  # of the initial response to the rest of a prompt


def before(source: Source, images: Path, init: str, pictures: Sequence[Picture]) -> Iterator[str]:
    """Too few pictures, unread or repeated ones, an init of several tokens."""
    if len(pictures) < FEW_PICTURES:
        yield f"{images} holds {len(pictures)} picture{'s'[: len(pictures) - 1]}: three to five are usual"
    if unread := unread_pictures(images):
        yield f"{', '.join(unread)} in {images} is not read: save it as PNG or JPEG"
    for one, other in near_duplicates(pictures):
        yield f"{one.name} and {other.name} in {images} are nearly the same picture: one of them teaches nothing"
    if init == "random" or concept_file(init):
        return
    tokenizer: Any = next(iter(source.tokenizers.values()))
    for word in split_words(init):
        if len(token_ids(tokenizer, word)) > 1:
            yield f"init {word!r} is several tokens of this model, their mean is used: a common word starts better"


def after(learner: Learner, index: int) -> Iterator[str]:
    """A word that did not move, a loss that did not fall, a word that drowns the rest of its prompt."""
    word = learner.words[index]
    if not has_moved(word):
        yield f"{word.token} is where it started: nothing was learned, raise the rate or the steps"
        return
    loss = learner.probe_loss(index)
    if loss > UNIMPROVED * word.start_loss:
        yield (
            f"{word.token}: the loss on one and the same batch was {word.start_loss:.4f} and is {loss:.4f}: "
            "it never moved, try another init, another rate or more steps"
        )
    templates = probes(learner.recipe.subject)
    try:
        start, now = (learner.response(index, templates, rows) for rows in (word.initial, word.rows))
    except UsageError:
        return  # a word of so many vectors leaves no room for the probes
    if now < DEAF * start:
        yield (
            f"{word.token}: what stands around it in a prompt changes pictures {now / start:.0%} as much as around its "
            "init: likely overfit, try fewer steps, a lower rate or --norm fixed"
        )


def has_moved(word: Word) -> bool:
    """Whether learning changed the word by more than a hundredth of its length."""
    return any(
        float((rows.detach() - word.initial[name]).norm()) > UNMOVED * float(word.initial[name].norm())
        for name, rows in word.rows.items()
    )
