"""The directions of a model's words: `Lexicon`. Reads tables and tokenizers of a bundle, opens no engine.

A word's direction is one unit vector per text encoder, all encoders side by side in one array [D]. Lengths are those of
the vocabulary: the mean length of an encoder's rows that are not zero.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import UsageError
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept, Vectors
from oneword.runtime.model import base_table
from oneword.runtime.prompt import Tokenizer

Direction = npt.NDArray[np.float64]
"""[D], a unit vector in each encoder's part"""


class Lexicon:
    """The vocabulary's and the learned words' directions in one model."""

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
        self._tables = dict(sorted(tables.items()))
        self._token_ids = token_ids
        self._learned = {concept.token: concept for concept in learned}
        self.lengths: dict[str, float] = {}
        """The mean length of each encoder's rows."""
        means = []
        for name, table in self._tables.items():
            rows = table.astype(np.float32)
            lengths = np.linalg.norm(rows, axis=1)
            present = lengths > 0
            self.lengths[name] = float(lengths[present].mean(dtype=np.float64))
            means.append((rows[present] / lengths[present, None]).mean(0, dtype=np.float64))
        self.mean: npt.NDArray[np.float64] = np.concatenate(means)
        """The mean of the vocabulary's directions [D]; not a unit vector."""

    @classmethod
    def read(cls, bundle: Bundle | str | Path, learned: Iterable[Concept] = ()) -> Self:
        """The lexicon of a bundle's model, and of learned words for it. Raises UsageError, BundleError."""
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        encoders = bundle.manifest.encoders
        tokenizers = {encoder.graph: Tokenizer.read(bundle.file(encoder.tokenizer), encoder) for encoder in encoders}
        tables = {encoder.graph: base_table(bundle.file(encoder.table)) for encoder in encoders}
        return cls(tables, lambda name, text: tokenizers[name].ids(text), learned, bundle.manifest.source.digest)

    def tokens(self, text: str) -> int:
        """The largest number of ids that the text has in any encoder; 1 for a learned word."""
        return 1 if text in self._learned else max(len(self._token_ids(name, text)) for name in self._tables)

    def direction(self, text: str) -> Direction:
        """The direction of a learned word or an ordinary text: the mean of its rows' directions.

        Raises UsageError if it has no token in the model's vocabulary, or if it looks like a learned word and is not.
        """
        if text in self._learned:
            return self.direction_of(self._learned[text])
        if text.startswith("<") and text.endswith(">"):
            loaded = ", ".join(self._learned) or "none"
            raise UsageError(f"no word {text!r} is loaded, loaded words: {loaded}: add its file with --concept")
        ids = {name: list(self._token_ids(name, text)) for name in self._tables}
        if not all(ids.values()):
            raise UsageError(f"{text!r} has no token in this model: name it with an ordinary word")
        return self._mean_direction(text, {name: self._tables[name][ids[name]] for name in self._tables})

    def direction_of(self, concept: Concept) -> Direction:
        """The direction of a learned word. Raises UsageError if it was learned for another model."""
        widths = {name: rows.shape[1] for name, rows in concept.vectors.items()}
        expected = {name: table.shape[1] for name, table in self._tables.items()}
        if widths != expected:
            raise UsageError(
                f"{concept.token!r} has vectors of width {_listed(widths)}, this model takes {_listed(expected)}: "
                "use a word that was learned for this model"
            )
        return self._mean_direction(concept.token, concept.vectors)

    def unit(self, values: npt.NDArray[Any]) -> Direction:
        """`values` [D], scaled to a unit vector in each encoder's part; a part of zeros stays zero."""
        parts = self._parts(values.astype(np.float64))
        return np.concatenate([part / max(float(np.linalg.norm(part)), 1e-12) for part in parts.values()])

    def vectors(self, direction: npt.NDArray[Any]) -> dict[str, Vectors]:
        """A direction as the rows [1, D] of a word, by encoder, with the vocabulary's mean length."""
        parts = self._parts(self.unit(direction))
        return {name: (part * self.lengths[name]).astype(np.float32)[None] for name, part in parts.items()}

    def _mean_direction(self, text: str, rows: Mapping[str, npt.NDArray[Any]]) -> Direction:
        units = [rows[name].astype(np.float64) for name in self._tables]
        units = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in units]
        means = [part.mean(0) for part in units]
        if not all(np.linalg.norm(part) > 1e-6 for part in means):
            raise UsageError(f"the rows of {text!r} cancel out, so they have no direction: name it with another word")
        return self.unit(np.concatenate(means))

    def _parts(self, values: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        widths = [table.shape[1] for table in self._tables.values()]
        return dict(zip(self._tables, np.split(values, np.cumsum(widths)[:-1]), strict=True))


def _listed(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{width} ({name})" for name, width in sorted(widths.items()))
