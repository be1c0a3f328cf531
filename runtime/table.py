"""The embedding table that is fed to a compiled text encoder: the model's rows, then learned rows, in one array.

Loading a word only writes its rows; no engine is touched, no vocabulary grows. A row is reference-counted while prompts
that use it wait to be encoded, and is not reused for another word before that. Not thread-safe.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import Array, HostArray
from oneword.engines.errors import ConceptError, UsageError

DEFAULT_CAPACITY: Final = 1024
"""Learned rows. On the host, pages to which no word was written take no memory."""


class EmbeddingTable:
    """`base` [V, D] and room for `capacity` learned rows, in the base's dtype.

    `place` puts the array into its memory, such as a GPU's; by default it stays on the host.
    """

    def __init__(
        self,
        base: npt.NDArray[Any],
        capacity: int = DEFAULT_CAPACITY,
        place: Callable[[npt.NDArray[Any]], Array] = HostArray,
    ) -> None:
        self.vocab_size, self.width = base.shape
        self.capacity, self._dtype = capacity, base.dtype
        values = np.zeros((self.vocab_size + capacity, self.width), base.dtype)
        values[: self.vocab_size] = base
        self.array = place(values)
        """[V + capacity, D]: permanently bound to the graph's input `embedding_table`."""
        self._ids: dict[str, tuple[int, ...]] = {}
        self._identities: dict[int, bytes] = {}
        self._free = list(range(self.vocab_size + capacity - 1, self.vocab_size - 1, -1))
        self._holds: Counter[int] = Counter()
        self._free_on_release: set[int] = set()

    @property
    def ids(self) -> dict[str, tuple[int, ...]]:
        """The ids of every loaded word."""
        return dict(self._ids)

    @property
    def free_rows(self) -> int:
        """How many more vectors can be loaded now."""
        return len(self._free)

    def check(self, token: str, vectors: npt.NDArray[np.floating[Any]]) -> None:
        """Raises ConceptError if `load` would."""
        if token in self._ids:
            raise ConceptError(f"{token!r} is already loaded: unload it first")
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise ConceptError(
                f"{token!r} has vectors of shape {list(vectors.shape)}, this encoder takes [n, {self.width}]: "
                "the word was learned for another model"
            )
        if len(vectors) > len(self._free):
            raise ConceptError(
                f"{token!r} needs {len(vectors)} rows, {len(self._free)} of {self.capacity} are free: "
                "unload words first"
            )

    def load(self, token: str, vectors: npt.NDArray[np.floating[Any]]) -> tuple[int, ...]:
        """Writes a word's vectors [n, D]; returns its n ids, V and above. Raises ConceptError."""
        self.check(token, vectors)
        ids = tuple(self._free.pop() for _ in range(len(vectors)))
        for row, vector in zip(ids, vectors, strict=True):
            self.array.write(row, vector)
            self._identities[row] = hashlib.sha256(np.ascontiguousarray(vector, self._dtype).tobytes()).digest()[:16]
        self._ids[token] = ids
        return ids

    def unload(self, token: str) -> None:
        """Frees a word's rows; those held for waiting prompts are freed when released. Raises UsageError."""
        if token not in self._ids:
            raise UsageError(f"no word {token!r} is loaded: there is nothing to unload")
        for row in reversed(self._ids.pop(token)):
            if self._holds[row]:
                self._free_on_release.add(row)
            else:
                self._free.append(row)

    def hold(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Keeps the learned rows among these ids, of any shape, from being reused until they are released."""
        self._holds.update(self._learned(ids))

    def release(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Reverses one `hold` of the same ids."""
        for row, times in Counter(self._learned(ids)).items():
            self._holds[row] -= times
            if self._holds[row] <= 0:
                del self._holds[row]
                if row in self._free_on_release:
                    self._free_on_release.discard(row)
                    self._free.append(row)

    def identify(self, ids: npt.NDArray[np.integer[Any]]) -> bytes:
        """The ids [n, T] with learned rows replaced by digests of their vectors: equal bytes mean equal embeddings."""
        learned = ids >= self.vocab_size
        if not learned.any():
            return ids.tobytes()
        plain = np.where(learned, -1, ids).tobytes()
        return plain + b"".join(self._identities[row] for row in self._learned(ids))

    def _learned(self, ids: npt.NDArray[np.integer[Any]]) -> list[int]:
        return [int(row) for row in ids[ids >= self.vocab_size]]
