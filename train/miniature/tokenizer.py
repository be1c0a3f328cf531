"""The miniature's tokenizer: CLIP's BPE scheme over a vocabulary in which every word of the world is one token."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from oneword.train.miniature import world

LENGTH = 32  # tokens per prompt, including BOS and EOS
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Builds the tokenizer from merges that spell out each word of the world, without counting any frequencies."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges: list[tuple[str, str]] = []
    for word in sorted(world.vocabulary(), key=lambda word: (-len(word), word)):
        for merge in _spelling(word):
            if "".join(merge) not in vocabulary:
                vocabulary["".join(merge)] = len(vocabulary)
                merges.append(merge)
    for special in (BOS, EOS):
        vocabulary[special] = len(vocabulary)
    tokens = CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS,
        model_max_length=LENGTH,
    )  # fmt: skip
    return tokens


def _spelling(word: str) -> list[tuple[str, str]]:
    """The merges that build a word, starting from its end, so that no word's merges interfere with another's."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    merges = []
    while len(parts) > 1:
        left, right = parts[-2:]
        merges.append((left, right))
        parts[-2:] = [left + right]
    return merges
