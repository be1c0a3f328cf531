"""The rows of a model's words: `Lexicon`. Reads tables and tokenizers of a bundle, opens no engine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import UsageError
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept, Vectors
from oneword.runtime.prompt import Tokenizer
from oneword.runtime.table import base_table

Rows = Mapping[str, Vectors]
"""By encoder, the rows [n, D] of a word. n may differ between encoders, whose tokenizers may differ."""


class Lexicon:
    """The rows of the vocabulary and of learned words in one model."""

    def __init__(
        self,
        tables: Mapping[str, npt.NDArray[Any]],
        token_ids: Callable[[str, str], Sequence[int]],
        learned: Iterable[Concept] = (),
        digest: str = "",
    ) -> None:
        """`tables` are the encoders' rows [V, D]; `token_ids(encoder, text)` are the text's ids; `digest` identifies
        the model. Most callers should use `Lexicon.read`."""
        self.digest = digest
        self._tables = tables
        self._token_ids = token_ids
        self._learned = {concept.token: concept for concept in learned}

    @classmethod
    def read(cls, bundle: Bundle | str | Path, learned: Iterable[Concept] = ()) -> Self:
        """The lexicon of a bundle's model, and of learned words for it. Raises UsageError, BundleError."""
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        encoders = bundle.manifest.encoders
        tokenizers = {encoder.graph: Tokenizer.read(bundle.file(encoder.tokenizer), encoder) for encoder in encoders}
        tables = {encoder.graph: base_table(bundle.file(encoder.table)) for encoder in encoders}
        return cls(tables, lambda name, text: tokenizers[name].ids(text), learned, bundle.manifest.source.digest)

    @property
    def widths(self) -> dict[str, int]:
        """D of each encoder."""
        return {name: table.shape[1] for name, table in self._tables.items()}

    def tokens(self, text: str) -> int:
        """The largest number of ids that the text has in any encoder; 1 for a learned word."""
        return 1 if text in self._learned else max(len(self._token_ids(name, text)) for name in self._tables)

    def rows(self, text: str) -> Rows:
        """The rows of a learned word or an ordinary text.

        Raises UsageError if it has no token in the model's vocabulary, or if it looks like a learned word and is not.
        """
        if text in self._learned:
            return self.rows_of(self._learned[text])
        if text.startswith("<") and text.endswith(">"):
            loaded = ", ".join(self._learned) or "none"
            raise UsageError(f"no word {text!r} is loaded, loaded words: {loaded}: add its file with --concept")
        ids = {name: list(self._token_ids(name, text)) for name in self._tables}
        if not all(ids.values()):
            raise UsageError(f"{text!r} has no token in this model: name it with an ordinary word")
        return {name: self._tables[name][ids[name]].astype(np.float32) for name in self._tables}

    def rows_of(self, concept: Concept) -> Rows:
        """The rows of a learned word. Raises UsageError if it is for another model, or has vectors for layers."""
        if concept.out or concept.layer_rows:
            raise UsageError(
                f"{concept.token!r} has vectors for layers, which refining cannot change: use a word without, or drop "
                "them with ti-concept convert --rows-only"
            )
        widths = {name: rows.shape[1] for name, rows in concept.vectors.items()}
        if missing := self.widths.keys() - widths:
            raise UsageError(
                f"{concept.token!r} has no vectors for {', '.join(sorted(missing))}: refine a word that has some for "
                "every encoder of the model"
            )
        if widths != self.widths:
            raise UsageError(
                f"{concept.token!r} has vectors of width {_listed(widths)}, this model takes {_listed(self.widths)}: "
                "use a word that was learned for this model"
            )
        return concept.vectors


def joined(words: Sequence[Rows]) -> Rows:
    """The rows of one or more words of the same encoders, one after another."""
    return {encoder: np.concatenate([word[encoder] for word in words]) for encoder in words[0]}


def _listed(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{width} ({name})" for name, width in sorted(widths.items()))
