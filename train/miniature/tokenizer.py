"""The miniature's tokenizer: CLIP's BPE scheme over a vocabulary in which every word of the world is one token."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from oneword.train.miniature import world

LENGTH = 32  # tokens a prompt, bos and eos included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Merges that spell out each word of the world, so that no word needs a frequency to become one token."""
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
    """The merges that build a word: from its end, so that a word's pieces never stand in for another word's."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    merges = []
    while len(parts) > 1:
        left, right = parts[-2:]
        merges.append((left, right))
        parts[-2:] = [left + right]
    return merges
