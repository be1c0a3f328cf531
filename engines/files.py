"""Files that appear whole or not at all, and survive a power cut; digests, and the size of a graph on disk."""

import hashlib
import os
import secrets
from pathlib import Path

from oneword.engines.errors import FileError


def write_whole(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Writes a file atomically: it appears whole or not at all, and replaces an older one.

    With `sync` the file survives a power cut once this returns. The folder must exist. Raises FileError.
    """
    try:
        _write_and_rename(path, data, durable=sync)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's list of names, to disk. Raises OSError."""
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
    """Bytes of an .onnx file and its external data. Raises OSError."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))


def _write_and_rename(path: Path, data: bytes, *, durable: bool) -> None:
    """The temporary file is hidden, beside the final one, and named before it exists: Ctrl-C always finds it."""
    temporary = path.with_name(f".{path.name.removeprefix('.')[:40]}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)
