"""What a graph's files weigh, and what a file needs to outlive a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(graph: Path) -> int:
    """Bytes of an .onnx and of the external data beside it. Raises OSError."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
