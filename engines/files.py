"""What a file needs to outlive a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
