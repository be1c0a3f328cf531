"""Files that appear whole or not at all, and survive a power cut; digests, and the size of a graph on disk."""

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from oneword.engines.errors import FileError

T = TypeVar("T")
Stamp: TypeAlias = list[str | int]
"""A file's sha256, size, mtime and inode: while the last three are unchanged, it need not be hashed again."""


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


def lock_folder(folder: Path) -> int | None:
    """Locks a folder against other processes that lock it; close the descriptor to unlock it, which the end of the
    process does too. None if it is locked. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def from_json(data: bytes, kind: type[T]) -> T:
    """Reads JSON of any origin. Raises ValueError if it is damaged or not of this kind."""
    try:
        return msgspec.json.decode(data, type=kind)  # its errors are ValueErrors, and so is UnicodeDecodeError
    except RecursionError as error:
        raise ValueError(str(error)) from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamp(digest: str, stat: os.stat_result) -> Stamp:
    """The stamp of a file with this sha256."""
    return [digest, stat.st_size, stat.st_mtime_ns, stat.st_ino]


def read_stamps(path: Path) -> Mapping[str, Stamp]:
    """The stamps in a file, by name; empty if it cannot be read."""
    try:
        return from_json(path.read_bytes(), dict[str, Stamp])
    except (OSError, ValueError):
        return {}


def write_stamps(path: Path, stamps: Mapping[str, Stamp]) -> None:
    """Records the files that were hashed; in a read-only folder they are hashed again the next time."""
    with contextlib.suppress(FileError):
        write_whole(path, msgspec.json.encode(stamps), sync=False)


def size_of(graph: Path) -> int:
    """Bytes of an .onnx file and its external data. Raises OSError."""
    return sum(file.stat().st_size for file in files_of(graph))


def files_of(graph: Path) -> list[Path]:
    """An .onnx file and its external data."""
    return sorted(graph.parent.glob(f"{graph.name}*"))


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
