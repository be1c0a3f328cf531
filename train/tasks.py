"""One word to learn: its pictures, token and init, checked against the model and turned into a `Word`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel

from oneword.engines.errors import ConceptError, FileError, UsageError
from oneword.export.families import family_of
from oneword.export.source import Source
from oneword.runtime.concept import check_token, load_concept
from oneword.train.initial import concept_file, initial_rows, initial_text, token_ids
from oneword.train.pictures import Picture, encode_moments, random_crops
from oneword.train.prompts import caption_template, templates
from oneword.train.recipe import Recipe
from oneword.train.word import Word


@dataclass(frozen=True)
class Task:
    """One word to learn: its folder of pictures, its token, and what it starts from.

    `init` is a word of the model's vocabulary, several words (their rows are averaged), `auto` (words that are found in
    the pictures), `random` (a random row of the vocabulary's median length), or a concept file. Raises `UsageError`
    for a token that the runtime would refuse. `more` are pictures outside the folder to learn from too.
    """

    images: Path
    token: str
    init: str = "object"
    more: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_token(self.token)
        except ConceptError as error:
            raise UsageError(str(error)) from None


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises `UsageError` if there is no task, or if two tasks have the same token."""
    if not tasks:
        raise UsageError("nothing to learn: give a folder of pictures")
    tokens = [task.token for task in tasks]
    if repeated := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise UsageError(f"{', '.join(repeated)} would be learned twice: give each folder its own token")


def check_tokens(source: Source, tasks: Sequence[Task]) -> None:
    """Raises `UsageError` for a token that is already a word of the model's vocabulary."""
    for task in tasks:
        for tokenizer in source.tokenizers.values():
            ids = token_ids(tokenizer, task.token)
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                raise UsageError(
                    f"the token {task.token!r} is already in the model's vocabulary: use <{task.token}> instead"
                )


def check_encoders(source: Source, encoders: Collection[str]) -> None:
    """Raises `UsageError` if a word cannot be learned for these text encoders only; none stands for all."""
    if not encoders:
        return
    facts = family_of(source).encoders
    names = [encoder.graph for encoder in facts]
    if unknown := [name for name in encoders if name not in names]:
        raise UsageError(f"encoders has {', '.join(unknown)}: the model's text encoders are {', '.join(names)}")
    optional = [encoder.graph for encoder in facts if encoder.word_optional]
    if missing := [name for name in names if name not in (*encoders, *optional)]:
        raise UsageError(
            f"encoders has no {', '.join(missing)}, which every word of this model needs: "
            f"add it; {', '.join(optional) or 'none'} may be left out"
        )


def check_polished(source: Source, tasks: Sequence[Task], encoders: Collection[str]) -> None:
    """Raises `UsageError` for a refined word with vectors for other text encoders than those it would be learned for.

    A task learns a refined word further if it has `more` pictures and its init is a file.
    """
    for task in tasks:
        if not task.more or (path := concept_file(task.init)) is None:
            continue
        present, known = load_concept(path).vectors.keys(), source.text_encoders.keys()
        if present - known or set(encoders or known) - present:
            raise UsageError(
                f"{path} has vectors for {', '.join(sorted(present))}, the model {source.name} would learn it for "
                f"{', '.join(sorted(encoders or known))}: give the model that the word was refined with"
            )


def make_word(source: Source, task: Task, pictures: Sequence[Picture], recipe: Recipe, seed: int) -> Word:
    """Returns the task's word, ready for the learner: pictures encoded, prompts chosen, initial rows computed."""
    captions = None
    if any(picture.caption for picture in pictures):
        if missing := [str(picture.path) for picture in pictures if not picture.caption]:
            raise UsageError(f"no caption for {', '.join(missing)}: give every picture a caption, or none")
        captions = [
            caption_template(picture.caption or "", task.token, str(picture.path.with_suffix(".txt")))
            for picture in pictures
        ]
    if blank := [picture.path for picture in pictures if picture.mask is not None and not picture.mask.any()]:
        raise FileError(
            f"{blank[0]} is transparent, or its mask black, in all of the part that is used, the middle: "
            "show the word there, or leave the picture out"
        )
    size, step = picture_size(source, recipe), side_step(source) if recipe.buckets else None
    crops = random_crops(pictures, recipe.crops, seed, size, step=step)
    return Word(
        task.token,
        encode_moments(source.vae, pictures, crops, flip=recipe.flip),
        initial_rows(source, task.init, recipe.vectors, seed, recipe.encoders),
        templates(recipe.subject),
        captions,
        initial_text(task.init),
    )


def picture_size(source: Source, recipe: Recipe) -> int:
    """The side, in pixels, of the pictures that are learned from: the recipe's, or the one the model was trained at.

    Raises `UsageError` for one that the model cannot take.
    """
    if recipe.size is None:
        return trained_size(source)
    family = family_of(source)
    multiple = side_step(source) if recipe.buckets else family.size_multiple
    longest = 2 if recipe.buckets else 1  # sides of a bucket's picture, in sizes
    limit = None if family.max_side is None else family.max_side // (longest * multiple) * multiple
    if recipe.size % multiple or (limit is not None and recipe.size > limit):
        buckets = " with buckets" if recipe.buckets else ""
        allowed = f"a multiple of {multiple}" + ("" if limit is None else f" and at most {limit}")
        raise UsageError(f"size is {recipe.size}{buckets}, but must be {allowed} for {source.model}")
    return recipe.size


def trained_size(source: Source) -> int:
    """The side, in pixels, that the model was trained at."""
    if not isinstance(source.network, UNet2DConditionModel):
        return family_of(source).defaults.width
    side = source.unet.config.sample_size
    if not isinstance(side, int):
        raise UsageError(f"the model's UNet has sample_size {side!r}: use a model of square pictures")
    return int(side * _vae_factor(source))


def side_step(source: Source) -> int:
    """The number of pixels that a picture's sides must be multiples of, for the VAE and the network."""
    if not isinstance(source.network, UNet2DConditionModel):
        return family_of(source).size_multiple
    return _vae_factor(source) * 2 ** (len(source.unet.config.block_out_channels) - 1)


def _vae_factor(source: Source) -> int:
    return 2 ** (len(source.vae.config.block_out_channels) - 1)
