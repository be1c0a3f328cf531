"""How many CPU threads an engine gets."""

import os

from oneword.engines.errors import UsageError


def cpu_threads(threads: int | None) -> int:
    """`threads`, else OMP_NUM_THREADS (the first of a list), else 0, which leaves it to the back end.

    Raises UsageError for an OMP_NUM_THREADS that is no number.
    """
    if threads is not None:
        return threads
    given = os.environ.get("OMP_NUM_THREADS", "")
    first = given.split(",")[0].strip()
    if first and not first.isdecimal():
        raise UsageError(f"OMP_NUM_THREADS is {given!r}, allowed is a number such as 4: set it, or unset it")
    return int(first or 0)
