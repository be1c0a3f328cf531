"""The number of CPU threads of an engine."""

import os
from typing import Final

from oneword.engines.errors import UsageError

MAX_THREADS: Final = 4096
"""More than any machine has; ONNX Runtime crashes if the system refuses to start as many."""


def cpu_threads(threads: int | None) -> int:
    """`threads`, else OMP_NUM_THREADS (the first of a list), else 0, which means the backend's default.

    Raises UsageError if it is not a number from 0 to MAX_THREADS.
    """
    if threads is not None:
        if not 0 <= threads <= MAX_THREADS:
            raise UsageError(f"threads is {threads}, but must be 0 to {MAX_THREADS}: 0 is the backend's default")
        return threads
    value = os.environ.get("OMP_NUM_THREADS", "")
    first = value.split(",")[0].strip()
    if first and not (first.isdecimal() and len(first) < 10 and int(first) <= MAX_THREADS):
        raise UsageError(
            f"OMP_NUM_THREADS is {value[:40]!r}, but must be a number such as 4, at most {MAX_THREADS}: set it to one, "
            "or unset it"
        )
    return int(first or 0)
