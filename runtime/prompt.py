"""Converts prompts to token ids: A1111's weights, BREAK, chunks, and learned words. Independent of the model.

    (red) [red]       weight 1.1, 1 / 1.1; they nest        (red:1.3)     weight 1.3
    \\( \\) \\[ \\] \\\\    the characters themselves; any other backslash is dropped
    BREAK                      starts a new chunk
    <word>  embedding:word     a learned word, anywhere       word          a learned word with a bare name, whole only
    {<a>|<b>:0.3}              the word between two learned words (`oneword.runtime.slider`)

Prompts that change from step to step are in `oneword.runtime.prompt_schedule`, which makes ordinary prompts of them.

The tokenizer's vocabulary is never changed: a prompt is split at known words, longest first, the text in between goes
to the tokenizer, and a word of n vectors becomes n ids. A prompt longer than the encoder's length becomes several
chunks, each with its own bos and eos; a word's ids stay in one chunk. Unlike in A1111, the mean that weights shift is
restored chunk by chunk (inside the text encoder's graph), so that rows stay independent, and commas do not move a
chunk's end.
"""

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import tokenizers

from oneword.engines.errors import BundleError, UsageError, one_line
from oneword.runtime.bundle import TOKENIZER, Encoder
from oneword.runtime.concept import FUSE, MAX_TOKEN_LENGTH, Concept
from oneword.runtime.slider import Slider, slider_at

MAX_CHARACTERS: Final = 20_000
MAX_WEIGHT: Final = 100.0

_ATTENTION: Final = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:")
_KINDS: Final = {"(": "(", ")": "(", "[": "[", "]": "["}
_FACTORS: Final = {"(": 1.1, "[": 1 / 1.1}
_BREAK: Final = re.compile(r"\bBREAK\b")
_NETWORK: Final = re.compile(r"<(lora|lyco|hypernet):[^<>]*>?", re.IGNORECASE)
"""How A1111's prompts load other networks."""
_NAMED: Final = re.compile(r"<([^\s<>]+)>|\bembedding:(<[^\s<>]+>|[\w.+*@#!~&$%^=-]+)", re.IGNORECASE)
_RUN: Final = re.compile(r"[\w.+*@#!~&$%^=-]{1,64}")
_RUNS: Final = re.compile(r"[\w.+*@#!~&$%^=-]+")


class Frame(NamedTuple):
    """The tokens around the prompt in each chunk: bos and eos, or the parts of a chat template."""

    head: list[int]
    joined: str
    """The whitespace at the end of the head, which is tokenized together with the prompt: it may merge with it."""
    tail: list[int]

    @classmethod
    def of(cls, prefix: str, suffix: str, bos_id: int | None, eos_id: int, ids: Callable[[str], list[int]]) -> Self:
        """That of a template's text before and after the prompt; `ids` tokenizes without bos and eos."""
        text = prefix.rstrip()
        bos = [] if bos_id is None else [bos_id]
        tail = ids(suffix) if suffix else [eos_id]
        return cls(bos + (ids(text) if text else []), prefix[len(text) :], tail)


class Tokenizer:
    """One encoder's vocabulary and the shape of its chunks."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, encoder: Encoder) -> None:
        """Turns off the truncation and padding of `tokenizer`: chunks are made by `encode_ids`."""
        self.length, self.eos_id, self.pad_id = encoder.length, encoder.eos_id, encoder.pad_id
        self.masks_padding, self.weighs = encoder.masks_padding, encoder.weighs_tokens
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.frame = Frame.of(encoder.prefix, encoder.suffix, encoder.bos_id, encoder.eos_id, self.ids)
        self.start = [(id_, 1.0) for id_ in self.ids(self.frame.joined)]
        """A chunk without a prompt, between the frame's head and tail."""
        if self.room <= len(self.start):
            raise BundleError(
                f"{encoder.graph} has chunks of {self.length} tokens, which its template fills: "
                "export a model whose tokenizer allows longer prompts"
            )

    @classmethod
    def read(cls, folder: Path, encoder: Encoder) -> Self:
        """Reads the folder's tokenizer.json. Raises BundleError if it is missing or broken."""
        file = folder / TOKENIZER
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for missing and broken files alike
            raise BundleError(f"{file} cannot be read ({one_line(error)}): export the bundle again") from None
        return cls(tokenizer, encoder)

    @property
    def room(self) -> int:
        """Ids per chunk, besides the frame's."""
        return self.length - len(self.frame.head) - len(self.frame.tail)

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without bos and eos, not truncated."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def knows(self, piece: str) -> bool:
        """Whether a text such as <|endoftext|> is a token of the model."""
        return self._tokenizer.token_to_id(piece) is not None


class UnknownWord(UsageError):
    """A prompt names a word, as <word> or embedding:word, that the vocabulary does not contain."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name
        """As the prompt has it, <> and embedding: included."""


@dataclass(frozen=True)
class Vocabulary:
    """The learned words that prompts may use, by token. Refers to the given mapping, without a copy."""

    words: Mapping[str, Concept]
    bare_names: bool = True
    """Whether a word whose token has no <> is also found by its bare name."""
    ignore_case: bool = False
    """Whether a name means a word whose token differs in case too, if none has the name itself or the name in lower
    case; of several the first in alphabetical order."""

    def named(self, name: str) -> Concept | None:
        """The word for <name> or embedding:name, whether or not its token has <> itself."""
        tokens = tokens_for(name)
        exact = next((self.words[token] for token in tokens if token in self.words), None)
        return exact or next((self._lowered[token] for token in tokens if token in self._lowered), None)

    def bare(self, name: str) -> Concept | None:
        """The word whose token has no <>."""
        return self._get(name) if self.bare_names else None

    @cached_property
    def bare_lengths(self) -> Sequence[int]:
        """The lengths of the tokens without <>, longest first: a bare name has one of them."""
        lengths = {len(token) for token in self.words if not token.startswith("<")}
        return sorted(lengths, reverse=True) if self.bare_names else []

    def near(self, name: str) -> list[str]:
        """Up to three tokens with a similar name."""
        bare = {token.strip("<>").lower(): token for token in self.words}
        return [bare[match] for match in difflib.get_close_matches(name.strip("<>").lower(), bare, 3, 0.5)]

    def _get(self, token: str) -> Concept | None:
        lower = token.lower()
        return self.words.get(token) or self.words.get(lower) or self._lowered.get(lower)

    @cached_property
    def _lowered(self) -> Mapping[str, Concept]:
        """The words by their tokens in lower case, in which CLIP's tokenizer reads all text; empty if case matters."""
        tokens = sorted(self.words, reverse=True) if self.ignore_case else ()
        return {token.lower(): self.words[token] for token in tokens}


@dataclass(frozen=True)
class Chunks:
    """One prompt for one encoder, in chunks."""

    input_ids: npt.NDArray[np.int64]
    """[chunks, T]; -1, -2, ... are the vectors of `concepts`, one after another"""
    token_weights: npt.NDArray[np.float32]
    """[chunks, T]; 1 for bos, eos and padding"""
    eos_index: npt.NDArray[np.int64]
    """[chunks]: position of the first eos, where CLIP pools. For an encoder that masks padding, it is that of the last
    token before the padding, so that an eos within the prompt masks nothing."""
    concepts: tuple[Concept, ...] = ()
    """The learned words in the prompt, each once, in the order of their first use."""

    def placed(self, rows: Iterable[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        """`input_ids` [chunks, T] with the words' vectors replaced by rows of a table, given for each concept."""
        ids, learned = self.input_ids.copy(), self.input_ids < 0
        if learned.any():
            ids[learned] = np.concatenate([*rows])[-1 - ids[learned]]
        return ids

    def attended(self, padding: int) -> npt.NDArray[np.bool_]:
        """[chunks, T]: whether a token is one of a chunk, or one of the first `padding` tokens after its eos."""
        _, t = self.input_ids.shape
        return np.arange(t) <= self.eos_index[:, None] + padding

    def at_layer(self, layer: int) -> Self:
        """These chunks with the words of one cross-attention layer, where a word has rows for each."""
        words = (concept.by_layer[layer] if concept.by_layer else concept for concept in self.concepts)
        return replace(self, concepts=tuple(words))

    def extended(self, count: int, tokenizer: Tokenizer) -> Self:
        """These chunks, and empty ones up to `count`."""
        if count == len(self.input_ids):
            return self
        empty = _padded([tokenizer.start] * (count - len(self.input_ids)), tokenizer, ())
        ids, weights, eos = (
            np.concatenate([getattr(self, name), getattr(empty, name)])
            for name in ("input_ids", "token_weights", "eos_index")
        )
        return replace(self, input_ids=ids, token_weights=weights, eos_index=eos)


def encode_ids(prompt: str, tokenizer: Tokenizer, vocabulary: Vocabulary, encoder: str = "text_encoder") -> Chunks:
    """A prompt as chunks of ids and weights. A word without vectors for this encoder is replaced by its text.

    Raises UsageError for unknown learned words and invalid weights.
    """
    chunks: list[list[tuple[int, float]]] = [[*tokenizer.start]]
    words: dict[str, tuple[Concept, range]] = {}
    for part in weighted_parts(prompt):
        if part is None:
            chunks.append([*tokenizer.start])
            continue
        if part.weight != 1 and not tokenizer.weighs:
            raise UsageError(
                f"weight {part.weight:g} of {part.text[:40]!r}: this model's prompts take no weights, "
                "write \\( \\) \\[ \\] for brackets"
            )
        for piece in split_at_words(part.text, vocabulary, tokenizer.knows):
            piece = piece.concept if isinstance(piece, Slider) else piece
            is_word = not isinstance(piece, str) and encoder in piece.vectors
            if isinstance(piece, str):
                ids = tokenizer.ids(piece)
                if tokenizer.start and chunks[-1] == tokenizer.start:
                    chunks[-1], ids = [], tokenizer.ids(tokenizer.frame.joined + piece)
            else:
                start = -1 - sum(len(numbers) for _, numbers in words.values())
                numbers = range(start, start - len(piece.vectors.get(encoder, ())), -1)
                ids = list(words.setdefault(piece.identity, (piece, numbers))[1]) or tokenizer.ids(piece.text)
            if is_word and len(ids) > (room := tokenizer.room - len(tokenizer.start)):
                raise UsageError(f"a word of {len(ids)} vectors does not fit this encoder's {room} tokens")
            taken = 0
            while taken < len(ids):
                room = tokenizer.room - len(chunks[-1])
                if room == 0 or (is_word and room < len(ids)):
                    chunks.append([*tokenizer.start])
                    continue
                chunks[-1] += [(id_, part.weight) for id_ in ids[taken : taken + room]]
                taken += room
    if chunks[-1] == tokenizer.start and len(chunks) > 1:
        chunks.pop()  # BREAK at the very end
    return _padded(chunks, tokenizer, tuple(concept for concept, _ in words.values()))


class Part(NamedTuple):
    """A piece of a prompt and its weight."""

    text: str
    weight: float


def check_prompt(prompt: object, name: str = "prompt") -> None:
    """Raises UsageError for a prompt that is too long, not valid Unicode, or not text, and for one with a LoRA."""
    if not isinstance(prompt, str):
        raise UsageError(f"the {name} is {prompt!r}, but must be text")
    if len(prompt) > MAX_CHARACTERS:
        raise UsageError(f"the {name} has {len(prompt)} characters, but may have at most {MAX_CHARACTERS}: use fewer")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(f"the {name} is not valid Unicode: it contains half of a surrogate pair")
    if network := _NETWORK.search(prompt):
        kind = "a hypernetwork" if network.group(1).lower() == "hypernet" else "a LoRA"
        fix = "leave it out" if kind == "a hypernetwork" else FUSE
        raise UsageError(f"the {name} has {network.group()[:80]!r}, but {kind} cannot be used in a prompt: {fix}")


def weighted_parts(prompt: str) -> list[Part | None]:
    """A prompt's pieces in A1111's syntax, None for BREAK. Adjacent pieces of equal weight are merged.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, parse_prompt_attention.
    Raises UsageError as `check_prompt`, and for weights that are not a number or beyond +-100.
    """
    check_prompt(prompt)
    tokens = [*_ATTENTION.finditer(unicodedata.normalize("NFC", prompt))]
    factors = _factors(tokens)
    parts: list[tuple[str | None, float]] = []
    weights = {"(": [1.0], "[": [1.0]}  # of the open brackets, each with those around it
    for i, match in enumerate(tokens):
        text, kind = match.group(), _KINDS.get(match.group()[-1], "")
        if i in factors and text == kind:
            weights[kind].append(weights[kind][-1] * factors[i])
        elif i in factors:
            weights[kind].pop()
        else:
            weight = weights["("][-1] * weights["["][-1]
            if text[0] == "\\":
                parts.append((text[1:], weight))
                continue
            pieces = _BREAK.split(text)
            for j, between in enumerate(pieces):
                between = between.lstrip() if j > 0 else between
                between = between.rstrip() if j < len(pieces) - 1 else between
                parts += [(None, 1.0)] * (j > 0) + [(between, weight)]
    return list(_joined(parts))


def _factors(tokens: Sequence[re.Match[str]]) -> dict[int, float]:
    """The factor of each bracket that opens, by its index; brackets that close one have an entry too, others none."""
    factors: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for i, match in enumerate(tokens):
        text, kind = match.group(), _KINDS.get(match.group()[-1], "")
        if text == kind:
            factors[i] = _FACTORS[kind]
            opened[kind].append(i)
        elif kind and text[0] != "\\" and opened[kind]:
            weight = match.group(1)
            factors[i] = factors[opened[kind].pop()] = _FACTORS[kind] if weight is None else _number(weight)
    return factors


class NamedWords(NamedTuple):
    """The names in a prompt that may be those of learned words, whether or not such words exist."""

    bracketed: frozenset[str]
    """x for each <x> and embedding:<x>."""
    embeddings: frozenset[str]
    """What follows each embedding: without <>. The word is the longest prefix that is one."""
    bare: frozenset[str]
    """What may start with a bare name. The word is the longest prefix that is one and does not end within a word."""


def named_words(prompt: str) -> NamedWords:
    """The names for which `encode_ids` would search the vocabulary, for callers that fetch the words first.

    It may contain more than the prompt uses: `used_words` decides. A prompt with schedules has to be given as the texts
    of its steps. Raises UsageError for a malformed prompt.
    """
    bracketed, embeddings, bare = set[str](), set[str](), set[str]()
    for part in filter(None, weighted_parts(prompt)):
        position = 0
        while named := _NAMED.search(part.text, position):
            if _has_brackets(named):
                bracketed.add((named.group(1) or named.group(2)).removeprefix("<").removesuffix(">"))
                position = named.end()
            else:
                embeddings.add(named.group(2)[:MAX_TOKEN_LENGTH])
                position = named.start(2)  # the name may end anywhere, and another begin there
        unnamed = _NAMED.sub(_unbracketed, part.text)
        for run in _RUNS.findall(unnamed):
            starts = (i for i in range(len(run)) if not _word_character(run, i - 1))
            bare.update(run[start : start + MAX_TOKEN_LENGTH] for start in starts)
    return NamedWords(frozenset(bracketed), frozenset(embeddings), frozenset(bare))


def used_words(prompt: str, vocabulary: Vocabulary, knows: Callable[[str], bool]) -> list[Concept]:
    """The learned words in a prompt, in order. `knows` is Tokenizer.knows, or the same for several tokenizers.
    Raises UsageError for a malformed prompt, UnknownWord.
    """
    parts = filter(None, weighted_parts(prompt))
    pieces = (piece for part in parts for piece in split_at_words(part.text, vocabulary, knows))
    words = ((piece.first, piece.second) if isinstance(piece, Slider) else (piece,) for piece in pieces)
    return [word for group in words for word in group if not isinstance(word, str)]


def tokens_for(name: str) -> tuple[str, ...]:
    """The tokens that <name> and embedding:name may mean, the first that exists wins."""
    bare = name.removeprefix("<").removesuffix(">")
    return tuple(dict.fromkeys((f"<{bare}>", f"<{bare.lower()}>", bare, bare.lower())))


def split_at_words(text: str, vocabulary: Vocabulary, knows: Callable[[str], bool]) -> Iterator[str | Concept | Slider]:
    """Yields the text between learned words, and each learned word or slider. Raises UnknownWord, UsageError.

    `knows` says whether a text such as <|endoftext|> is a token of the model, and therefore no learned word.
    """
    start = position = 0
    while position < len(text):
        end, concept = _word_at(text, position, vocabulary, knows)
        if concept is not None:
            if position > start:
                yield text[start:position]
            yield concept
            start = end
        position = end
    if start < len(text):
        yield text[start:]


def _word_at(
    text: str, position: int, vocabulary: Vocabulary, knows: Callable[[str], bool]
) -> tuple[int, Concept | Slider | None]:
    """The learned word at a position, after its end; if there is none, the next position to try, and None."""
    if text[position] == "{" and (slider := slider_at(text, position)):
        first, second = (_word_of(slider.group(i), vocabulary) for i in (1, 2))
        return slider.end(), Slider(first, second, float(slider.group(3)))
    if named := _NAMED.match(text, position):
        name = named.group(1) or named.group(2)
        if not _has_brackets(named):  # embedding:toys is toy, then s: the longest known name
            for length in range(min(len(name), MAX_TOKEN_LENGTH), 0, -1):
                if concept := vocabulary.named(name[:length]):
                    return named.start(2) + length, concept
        if concept := vocabulary.named(name):
            return named.end(), concept
        if not knows(named.group()):
            raise _unknown(named.group(), vocabulary)
        return named.end(), None
    if vocabulary.bare_lengths and not _word_character(text, position - 1) and (run := _RUN.match(text, position)):
        for end in (position + length for length in vocabulary.bare_lengths if length <= len(run.group())):
            if not _word_character(text, end) and (concept := vocabulary.bare(text[position:end])):
                return end, concept
    return position + 1, None


def _word_of(name: str, vocabulary: Vocabulary) -> Concept:
    if (concept := vocabulary.named(name)) is None:
        raise _unknown(name, vocabulary)
    return concept


def _unknown(name: str, vocabulary: Vocabulary) -> UnknownWord:
    near = vocabulary.near(name) or list(vocabulary.words)[:3]
    return UnknownWord(
        f"no word {name[:80]!r} is loaded, "
        + (f"similar words: {', '.join(near)}" if near else "and no other: add its file with --concept"),
        name,
    )


def _has_brackets(named: re.Match[str]) -> bool:
    """Whether a match of _NAMED is <x> or embedding:<x>, so that its end is certain."""
    return named.group().endswith(">")


def _unbracketed(named: re.Match[str]) -> str:
    """The part of a match of _NAMED in which a bare name may be: in a-embedding:<x> the word a-embedding, for one."""
    if not _has_brackets(named):
        return named.group()
    joined = named.group(2) and named.start() and _RUN.match(named.string, named.start() - 1)
    return f"{named.group().partition(':')[0]} " if joined else " "


def _word_character(text: str, position: int) -> bool:
    return 0 <= position < len(text) and (text[position].isalnum() or text[position] == "_")


def _joined(parts: list[tuple[str | None, float]]) -> Iterator[Part | None]:
    text, weight = "", 1.0
    for piece, factor in [*parts, (None, math.nan)]:
        if piece is not None and (factor == weight or not text):
            text, weight = text + piece, factor
            continue
        if text:
            if not abs(weight) <= MAX_WEIGHT:
                raise UsageError(
                    f"the weight of {text[:40]!r} is {weight:g}, but must be -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
                )
            yield Part(text, weight)
        text, weight = piece or "", factor if piece else 1.0
        if piece is None and not math.isnan(factor):
            yield None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"weight {text[:40]!r} is not a number: write (word:1.2), or \\( for the character") from None


def _padded(chunks: list[list[tuple[int, float]]], tokenizer: Tokenizer, concepts: tuple[Concept, ...]) -> Chunks:
    shape = (len(chunks), tokenizer.length)
    input_ids, token_weights = np.full(shape, tokenizer.pad_id, np.int64), np.ones(shape, np.float32)
    head, _, tail = tokenizer.frame
    for row, chunk in enumerate(chunks):
        ids = [*head, *(id_ for id_, _ in chunk), *tail]
        input_ids[row, : len(ids)] = ids
        token_weights[row, len(head) : len(head) + len(chunk)] = [weight for _, weight in chunk]
    last = len(head) + len(tail) - 1 + np.array([len(chunk) for chunk in chunks], np.int64)
    eos_index = last if tokenizer.masks_padding else (input_ids == tokenizer.eos_id).argmax(1)
    return Chunks(input_ids, token_weights, eos_index, concepts)
