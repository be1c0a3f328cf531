"""Warnings about a word: before learning, from its pictures and init; afterwards, from its losses. Text only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oneword.engines.errors import UsageError, counted
from oneword.export.source import Source
from oneword.runtime.concept import load_concept
from oneword.train.initial import RANDOM, concept_file, split_words, token_ids
from oneword.train.learner import Learner
from oneword.train.pictures import Picture, near_duplicates, unread_pictures
from oneword.train.prompts import probes
from oneword.train.word import Word

FEW_PICTURES = 3
UNMOVED = 0.01  # of the word's length
UNIMPROVED = 0.999  # of the initial loss
DEAF = 0.3  # of the initial response to the rest of a prompt


def before(source: Source, images: Path, init: str, pictures: Sequence[Picture]) -> Iterator[str]:
    """Warns of too few pictures, skipped or duplicate pictures, and an init of several tokens."""
    if len(pictures) < FEW_PICTURES:
        yield f"{images} has {counted(len(pictures), 'picture')}: three to five are usual"
    if unread := unread_pictures(images):
        yield f"skipped {', '.join(unread)} in {images}: convert to PNG or JPEG"
    for first, second in near_duplicates(pictures):
        yield f"{first.name} and {second.name} in {images} are nearly identical: replace one of them"
    if path := concept_file(init):
        concept = load_concept(path)
        if concept.out or concept.layer_rows:
            yield f"init {init} has vectors for layers, which are not used: the word starts from its rows"
    if init == RANDOM or path:
        return
    tokenizer: Any = next(iter(source.tokenizers.values()))
    for word in split_words(init):
        if (count := len(token_ids(tokenizer, word))) > 1:
            yield (
                f"init {word!r} is {count} tokens in this model, so their mean is used; a common word works better "
                "(check the spelling)"
            )


def after(learner: Learner, index: int) -> Iterator[str]:
    """Warns of a word that did not move, a loss that did not fall, and a word that drowns out the rest of a prompt."""
    word = learner.words[index]
    if not has_moved(word):
        yield f"{word.token} is where it started: nothing was learned, raise the learning rate or the number of steps"
        return
    loss = learner.probe_loss(index)
    if loss > UNIMPROVED * word.start_loss:
        yield (
            f"{word.token}: the loss on a fixed batch was {word.start_loss:.4f} and is now {loss:.4f}: "
            "it did not fall, try another init, another learning rate or more steps"
        )
    templates = probes(learner.recipe.subject)
    try:
        initial = learner.response(index, templates, word.initial, word.initial_out)
        current = learner.response(index, templates, word.rows, word.out)
    except UsageError:
        return  # the word has too many vectors: the probes do not fit
    if current < DEAF * initial:
        yield (
            f"{word.token}: the rest of a prompt changes pictures {current / initial:.0%} as much as with its init: "
            "likely overfit, try fewer steps, a lower learning rate or --norm fixed"
        )


def has_moved(word: Word) -> bool:
    """Whether learning changed the word's rows or output vectors by more than a hundredth of their length."""
    return any(
        float((learned.detach() - initial[name]).norm()) > UNMOVED * float(initial[name].norm())
        for parameters, initial in ((word.rows, word.initial), (word.out, word.initial_out))
        for name, learned in parameters.items()
    )
