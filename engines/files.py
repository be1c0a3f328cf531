"""File helpers: fsync, digests, and the size of a graph on disk."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(graph: Path) -> int:
    """Bytes of an .onnx and of the external data beside it. Raises OSError."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
