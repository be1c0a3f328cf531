"""`--init auto`: words of the vocabulary that pictures show. Uses no other model than the one being learned with.

With g, the gradient of a word's loss at the vocabulary's mean row, <g, row / |row|> is to first order how much the
loss rises per unit of length in the direction of a row. The words with the lowest of these slopes are tried on the same
noised pictures, and the best of them are found. All noise comes from the seed, so the same run finds the same words.

Not covered: words of several tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from oneword.engines.errors import EngineError, UsageError
from oneword.export.source import Source
from oneword.train.directional import unit
from oneword.train.initial import embedding_table, initial_rows, token_ids
from oneword.train.learner import Learner
from oneword.train.recipe import Recipe
from oneword.train.word import Draw, Rows, Word, draw

PICTURES = 32  # noised pictures that words are compared on
TRIED, FOUND = 12, 3
LETTERS = 3  # the fewest of a word


def words_of_pictures(source: Source, words: Sequence[Word], recipe: Recipe, seed: int) -> list[str]:
    """For each word, the FOUND words of the vocabulary that its pictures show most, best first, with spaces between.

    Raises `UsageError` if the model's vocabulary has no words, `EngineError` if a gradient or loss is not finite.
    """
    learner = Learner(source, [_of_one_row(word) for word in words], _search_recipe(recipe), seed)
    return [" ".join(_words_of(learner, index, seed)) for index in range(len(words))]


def _words_of(learner: Learner, index: int, seed: int) -> list[str]:
    batches = _batches(learner, index, seed)
    gradients = learner.gradient(index, batches)
    if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
        raise _not_finite(learner, index, "the gradient")
    tried = list(_steepest(learner.source, gradients))
    if not tried:
        raise UsageError("no word of the model's vocabulary can be tried: name one with --init, or use --init random")
    losses = {text: _loss(learner, index, text, batches) for text in tried}
    if not all(map(math.isfinite, losses.values())):
        raise _not_finite(learner, index, "the loss")
    return sorted(tried, key=lambda text: losses[text])[:FOUND]


def _not_finite(learner: Learner, index: int, quantity: str) -> EngineError:
    return EngineError(
        f"{quantity} of {learner.words[index].token!r} is not finite, so no start can be found: "
        "compute in fp32, or name a word with --init"
    )


def _of_one_row(word: Word) -> Word:
    """The word, to be searched for from the first of its initial rows."""
    first = {name: rows[:1] for name, rows in word.initial.items()}
    return Word(word.token, word.moments, first, word.prompts, word.captions)


def _search_recipe(recipe: Recipe) -> Recipe:
    """Only what decides the loss of a row, and what a batch needs in memory."""
    return Recipe(
        batch_size=recipe.batch_size,
        min_snr=recipe.min_snr,
        timesteps=recipe.timesteps,
        compute=recipe.compute,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )


def _batches(learner: Learner, index: int, seed: int) -> list[Draw]:
    """PICTURES noised pictures or a few more, in batches of the recipe's size."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-PICTURES // learner.recipe.batch_size)
    return [draw(learner.words[index], learner.recipe, len(learner.noising), generator) for _ in range(count)]


def _steepest(source: Source, gradients: Rows) -> Iterator[str]:
    """At most TRIED words, those in whose rows' direction the loss falls most steeply: by <g, row / |row|>, lowest
    first.

    Words are those of the first text encoder that has a gradient, since encoders may differ in their vocabularies.
    """
    name, gradient = next(iter(gradients.items()))
    tokenizer = source.tokenizers[name]
    count = 0
    for token_id in (unit(embedding_table(source.text_encoders[name])) @ gradient[0]).argsort().tolist():
        text = tokenizer.decode([token_id]).strip()
        if len(text) >= LETTERS and text.isalpha() and token_ids(tokenizer, text) == [token_id]:
            yield text
            count += 1
        if count == TRIED:
            return


def _loss(learner: Learner, index: int, text: str, batches: Sequence[Draw]) -> float:
    """The mean loss with the rows of `text`."""
    rows: Mapping[str, torch.nn.Parameter] = learner.words[index].rows
    with torch.no_grad():
        for name, row in initial_rows(learner.source, text, 1, seed=0, encoders=rows.keys()).items():
            rows[name].copy_(row)
    return sum(learner.probe_loss(index, batch) for batch in batches) / len(batches)
