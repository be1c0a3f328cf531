"""The embedding table that is fed to a compiled text encoder: the model's rows, then learned words' rows, in one array.

`place` writes the words that a call needs and that are not in the table yet, in place of those that were used longest
ago. Nothing else changes: no engine is touched, no vocabulary grows. `look_up` writes those of the model's own rows
that a run is the first to use. Not thread-safe.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors

from oneword.engines.engine import Array, HostArray
from oneword.engines.errors import BundleError, UsageError

DEFAULT_CAPACITY: Final = 1024
"""Learned rows."""

Ids = npt.NDArray[np.int64]


class EmbeddingTable:
    """`base` [V, D] and room for `capacity` learned rows, in the base's dtype. On the host, pages to which nothing was
    written take no memory.

    `place_array` puts the array into its memory, such as a GPU's; by default it stays on the host.
    """

    def __init__(
        self,
        base: npt.NDArray[Any],
        capacity: int = DEFAULT_CAPACITY,
        place_array: Callable[[npt.NDArray[Any]], Array] = HostArray,
    ) -> None:
        self.vocab_size, self.width = base.shape
        self.capacity = capacity
        self.array = place_array(np.zeros((self.vocab_size + capacity, self.width), base.dtype))
        """[V + capacity, D]: permanently bound to the graph's input `embedding_table`."""
        self.base = base
        self._written = np.zeros(self.vocab_size, bool)
        self._words: OrderedDict[str, Ids] = OrderedDict()
        self._free = list(range(self.vocab_size + capacity - 1, self.vocab_size - 1, -1))

    @property
    def resident(self) -> int:
        """Words that are in the table now."""
        return len(self._words)

    def fits(self, words: Mapping[str, npt.NDArray[np.floating[Any]]]) -> bool:
        """Whether the words, by identity, fit into the table together."""
        return sum(map(len, words.values())) <= self.capacity

    def check(self, words: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
        """Raises UsageError if the words, by identity, do not fit into the table together."""
        if not self.fits(words):
            needed = sum(map(len, words.values()))
            raise UsageError(
                f"the prompt's words have {needed} vectors, the embedding table has room for {self.capacity}: "
                f"open the model with capacity={needed}"
            )

    def place(self, words: Mapping[str, npt.NDArray[np.floating[Any]]]) -> dict[str, Ids]:
        """The ids [n], V and above, of each word's rows, given its vectors [n, D] by its identity.

        The ids are valid until the next call. Raises UsageError if the words do not fit into the table together.
        """
        self.check(words)
        for identity, vectors in words.items():
            if identity not in self._words:
                self._evict(len(vectors), words)
                self._write(identity, vectors)
            self._words.move_to_end(identity)
        return {identity: self._words[identity] for identity in words}

    def look_up(self, ids: Ids) -> None:
        """Writes the model's own rows with these ids [...] if no earlier call has; call it before a run that uses them.
        Ids of learned rows, V and above, are ignored."""
        used = np.unique(ids[ids < self.vocab_size])
        for row in used[~self._written[used]]:
            self.array.write(row, self.base[row])
        self._written[used] = True

    def _evict(self, rows: int, words: Mapping[str, object]) -> None:
        """Makes room for so many rows; the words of this call stay."""
        while len(self._free) < rows:
            oldest = next(identity for identity in self._words if identity not in words)
            self._free += self._words.pop(oldest).tolist()[::-1]

    def _write(self, identity: str, vectors: npt.NDArray[np.floating[Any]]) -> None:
        ids = self._free[: -len(vectors) - 1 : -1]
        for row, vector in zip(ids, vectors, strict=True):
            self.array.write(row, vector)
        del self._free[-len(vectors) :]
        self._words[identity] = np.array(ids, np.int64)


def base_table(path: Path) -> npt.NDArray[Any]:
    """The rows [V, D] of an encoder's file in a bundle. They are mapped: what is not used is not read.

    Raises BundleError if the file is damaged or holds something else.
    """
    try:
        with safetensors.safe_open(path, "numpy") as tensors:
            [name] = tensors.keys()
            tensor = tensors.get_slice(name)
            dtype, shape = {"F32": np.float32, "F16": np.float16}[tensor.get_dtype()], tuple(tensor.get_shape())
        if name != "embedding_table":
            raise KeyError(name)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        return np.asarray(np.memmap(path, dtype, "r", 8 + header, shape))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"{path} holds no embedding_table ({error}): export the model again with ti-export"
        ) from error
