"""Which texts are read in a thread, so that nobody else waits. Not covered: which threads."""

from collections.abc import Iterable
from typing import Final

LONG: Final = 2000
"""Characters that are read on the event loop, of all texts together."""


def are_long(texts: Iterable[str | None]) -> bool:
    """Whether texts take too long to be read on the event loop."""
    return sum(len(text) for text in texts if text) > LONG
