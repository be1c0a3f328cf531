"""Prompt templates: the neutral prompts a word is learned with, and their encoder. No randomness.

A *template* has `{}` where the word goes. The object templates are the 27 in the paper's appendix (Gal et al. 2022,
after CLIP's ImageNet prompts), the style templates the 19 in its released code; both are as in diffusers' script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from oneword.engines.errors import EngineError, UsageError
from oneword.export.families import AnyEncoder
from oneword.runtime.bundle import Encoder
from oneword.runtime.prompt import Frame
from oneword.train.recipe import Subject

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

PLACE = "{}"

OBJECT_PROBES = ("a photo of a {}", "a painting of a {}", "a photo of a {} in the snow", "a photo of a {} at night")
STYLE_PROBES = (
    "a painting in the style of {}",
    "a red star in the style of {}",
    "a blue ring in the snow in the style of {}",
    "a flower at night in the style of {}",
)


def templates(subject: Subject) -> tuple[str, ...]:
    """The templates that a word of this kind is learned with."""
    return STYLE_TEMPLATES if subject is Subject.STYLE else OBJECT_TEMPLATES


def probes(subject: Subject) -> tuple[str, ...]:
    """Prompts that differ in the text around the word, for samples and to measure how much that text still matters."""
    return STYLE_PROBES if subject is Subject.STYLE else OBJECT_PROBES


def per_image_template(template: str, index: int) -> str:
    """`template` with the word of picture `index` after the shared word: 'a photo of a {} with {1}' (Gal et al., 5).

    `{}` is the shared word, `{1}`, `{2}`, ... the words of the first, second, ... picture.
    """
    return f"{template} with {{{index + 1}}}"


def caption_template(caption: str, token: str, source: str) -> str:
    """Turns a user's caption into a template: `token` becomes `{}`, one without brackets where it is a whole word.

    Raises `UsageError`, naming `source`, if the caption does not contain the token.
    """
    caption = unicodedata.normalize("NFC", caption)  # as tokens are, and prompts when they are drawn
    written = re.escape(token) if token.startswith("<") else rf"(?<!\w){re.escape(token)}(?!\w)"
    template, count = re.subn(written, PLACE, caption.replace("{", "(").replace("}", ")"))
    if not count:
        raise UsageError(
            f"{source}: the caption {caption!r} does not contain the word {token!r}: write it where the word belongs"
        )
    return template.strip()


class Text(NamedTuple):
    """A template to encode, with its word's `first` row among all learned rows, and its rows in use and in total.

    `text` replaces the word in the prompt of an encoder that it has no rows for; None if it has.
    """

    template: str
    first: int
    used: int
    total: int
    text: str | None = None


class Encoded(NamedTuple):
    """Hidden states [B, T, D] and pooled vectors [B, P] of texts, empty if the encoder does not return them, and the
    positions [B] of their eos, as in `oneword.runtime.prompt.Chunks`."""

    states: torch.Tensor
    pooled: torch.Tensor
    eos_index: torch.Tensor


class PromptEncoder:
    """Encodes templates with the exported text encoder and a table of only the rows in use."""

    def __init__(self, encoder: AnyEncoder, tokenizer: Any, facts: Encoder) -> None:
        self.encoder, self.tokenizer, self.facts = encoder, tokenizer, facts
        self.frame = Frame.of(facts.prefix, facts.suffix, facts.bos_id, facts.eos_id, self._text_ids)
        self._rows: dict[int, int] = {}  # vocabulary id -> row of the small table
        self._sequences: dict[Text, tuple[list[int], int]] = {}

    def __call__(self, texts: Sequence[Text], learned: torch.Tensor) -> Encoded:
        """Encodes B texts; `learned` [R, D] has all words' rows.

        Several threads may encode texts at once if `ids` has been called with each of these texts.
        """
        sequences, ends = zip(*map(self._sequence, texts), strict=True)
        frozen = self.encoder.table[list(self._rows)].to(learned.dtype)
        input_ids, eos_index = torch.tensor(sequences), torch.tensor(ends)
        input_ids = torch.where(input_ids < 0, len(frozen) - 1 - input_ids, input_ids)
        inputs = [input_ids, torch.cat([frozen, learned]).to(self.encoder.dtype)]  # in the order of the encoder's graph
        if self.facts.hidden_width is not None and self.facts.weighs_tokens:
            inputs.append(torch.ones(input_ids.shape))
        if self.facts.layers:
            inputs.append(torch.full((len(texts),), self.facts.default_layer or 0))
        if self.encoder.pools or self.encoder.masks_padding:
            inputs.append(eos_index)
        *outputs, _ = self.encoder(*inputs)
        return Encoded(
            outputs[0] if self.facts.hidden_width is not None else torch.empty(0),
            outputs[-1] if self.encoder.pools else torch.empty(0),
            eos_index,
        )

    def ids(self, text: Text) -> list[int]:
        """A text as row numbers of the small table, including BOS, EOS and padding; learned row r is -1 - r."""
        return self._sequence(text)[0]

    def places(self, text: Text) -> list[tuple[int, int]]:
        """Where a text has its word: each position among the T tokens, with the number of the word's row there."""
        numbers = [-1 - row - text.first for row in self.ids(text)]
        return [(position, number) for position, number in enumerate(numbers) if 0 <= number < text.used]

    def _sequence(self, text: Text) -> tuple[list[int], int]:
        """A text's `ids`, and the position of its eos, or of the last token of a chat template."""
        if text not in self._sequences:
            self._sequences[text] = self._encode(*text)
        return self._sequences[text]

    def _encode(self, template: str, first: int, count: int, total: int, text: str | None) -> tuple[list[int], int]:
        head, joined, tail = self.frame
        room = self.facts.length - len(head) - len(tail)
        pieces = re.split(r"\{(\d*)\}", template)
        pieces[0] = joined + pieces[0]
        inner: list[int] = []
        for position, piece in enumerate(pieces):
            if position % 2 == 0:
                inner += self._text_rows(piece)
            elif text is not None:
                inner += [] if piece else self._text_rows(text)
            elif piece:  # the word of one picture
                inner.append(-1 - (first + total + int(piece) - 1))
            else:
                inner += [-1 - (first + row) for row in range(count)]
        if any(row < 0 for row in inner[room:]):
            raise UsageError(
                f"the prompt {template!r} is {len(inner)} tokens with the word, but {self.facts.graph} takes {room}: "
                "use fewer vectors, or shorten the caption"
            )
        ids = [*map(self._row, head), *inner[:room], *map(self._row, tail)]
        end = len(ids) - 1 if self.facts.masks_padding else ids.index(self._row(self.facts.eos_id))
        return ids + [self._row(self.facts.pad_id)] * (self.facts.length - len(ids)), end

    def _text_rows(self, text: str) -> list[int]:
        return [self._row(i) for i in self._text_ids(text)]

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _row(self, token_id: int) -> int:
        return self._rows.setdefault(token_id, len(self._rows))


class FrozenPrompts:
    """Encodes templates with an encoder that no word has rows for: every distinct prompt once, without gradients.

    A prompt is encoded alone, so that its bits do not depend on the batch in which it first occurs.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._encoded: dict[tuple[int, ...], Encoded] = {}
        self._released = False

    def __call__(self, texts: Sequence[Text]) -> Encoded:
        """Encodes B texts. Several threads may do so at once if each of these texts has been encoded before."""
        return Encoded(*map(torch.cat, zip(*map(self._encode, texts), strict=True)))

    def release(self) -> None:
        """Frees the encoder's weights. Only prompts that have been encoded can be used from now on."""
        self._encoder.encoder.to("meta")
        self._released = True

    @torch.no_grad()
    def _encode(self, text: Text) -> Encoded:
        key = tuple(self._encoder.ids(text))
        if key not in self._encoded:
            if self._released:
                raise EngineError(f"{text.template!r} was not encoded before {self._encoder.facts.graph} was freed")
            self._encoded[key] = self._encoder([text], self._encoder.encoder.table[:0].float())
        return self._encoded[key]
