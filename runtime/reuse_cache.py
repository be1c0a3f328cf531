"""A cache of encoded prompts or pictures, so that one that is used again is not encoded again.

What was used once leaves before anything that was used again: a stream of new prompts, such as one with a word that is
replaced all the time, pushes out none of those that come back. Source: the segmented LRU of Karedla et al. (1994).
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, Protocol, TypeVar

_AGAIN: Final = 0.75  # of the entries, at most, that were used again


class Sized(Protocol):
    """A value that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        ...


T = TypeVar("T", bound=Sized)


class ReuseCache(Generic[T]):
    """At most `count` values of together `size` bytes; one larger value may be alone in it."""

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._bytes = 0
        # Least recently used first.
        self._once: OrderedDict[Hashable, T] = OrderedDict()
        self._again: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._once or key in self._again

    def get(self, key: Hashable) -> T | None:
        """The value, which counts as used again; None if it is not cached."""
        value = self._once.pop(key, None)
        if value is None:
            value = self._again.pop(key, None)
        if value is None:
            return None
        self._again[key] = value
        if len(self._again) > max(1, int(_AGAIN * self._count)):
            oldest, demoted = self._again.popitem(last=False)
            self._once[oldest] = demoted
        return value

    def put(self, key: Hashable, value: T) -> None:
        """Adds a new value, and removes others until all fit."""
        self._once[key] = value
        self._bytes += value.nbytes
        while len(self) > (1 if self._bytes > self._size else self._count):
            _, removed = (self._once if len(self._once) > 1 or not self._again else self._again).popitem(last=False)
            self._bytes -= removed.nbytes

    def clear(self) -> None:
        """Removes all values."""
        self._once.clear()
        self._again.clear()
        self._bytes = 0
