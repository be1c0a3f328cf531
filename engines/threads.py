"""The number of CPU threads of an engine."""

import os

from oneword.engines.errors import UsageError


def cpu_threads(threads: int | None) -> int:
    """`threads`, else OMP_NUM_THREADS (the first of a list), else 0, which means the backend's default.

    Raises UsageError if OMP_NUM_THREADS is not a number.
    """
    if threads is not None:
        return threads
    value = os.environ.get("OMP_NUM_THREADS", "")
    first = value.split(",")[0].strip()
    if first and not first.isdecimal():
        raise UsageError(f"OMP_NUM_THREADS is {value!r}, but must be a number such as 4: set it to one, or unset it")
    return int(first or 0)
