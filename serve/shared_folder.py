"""A folder that servers share, on a disk or at any fsspec URL. Files are whole, and can be created exclusively.

A name is relative, its parts joined by `/`. Not covered: what the files hold, and quoting parts that a client chose
(`quoted` does that).
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from oneword.engines.errors import OnewordError, UsageError, one_line
from oneword.engines.files import write_whole
from oneword.serve.errors import Unavailable

T = TypeVar("T")

_PLAIN = re.compile(r"[a-z0-9-]")
_MAX_PART = 120


def quoted(part: str) -> str:
    """A part of a name for any text: injective also where upper and lower case are the same, and never a special name.

    Lower-case letters, digits and `-` stay; other characters become `%` and hex digits. Long ones become a hash.
    """
    text = "".join(c if _PLAIN.match(c) else "".join(f"%{byte:02x}" for byte in _bytes(c)) for c in part)
    return text if 0 < len(text) <= _MAX_PART else f"%%{hashlib.sha256(_bytes(part)).hexdigest()}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class SharedFolder:
    """A folder, or anything that fsspec opens. Thread-safe. Nothing is cached, so other servers' writes are seen.

    Raises `UsageError` for an unusable URL, and `Unavailable` from every method if the store cannot be reached.
    """

    def __init__(self, url: str) -> None:
        try:
            self._fs, root = fsspec.url_to_fs(os.path.expanduser(url), use_listings_cache=False)
        except ImportError as error:
            raise UsageError(f"{url.partition('://')[0]}:// needs a package: {one_line(error)}") from error
        except Exception as error:  # of any type: the URL is wrong
            raise UsageError(f"{url} cannot be used as a store ({one_line(error)}): give a folder or a URL") from error
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is no such file."""
        return self._call(lambda: bytes(self._fs.cat_file(self._path(name))), missing=None)

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        """Writes a file whole, replacing an older one. With `sync`, a local file survives a power cut."""

        def write() -> None:
            if self._local:
                path = Path(self._path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, data, sync=sync)
            else:
                self._fs.pipe_file(self._path(name), data)

        self._call(write)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file that does not exist yet, whole. Returns whether it did: of several servers, one succeeds."""

        def create() -> bool:
            try:
                if self._local:
                    _link_whole(Path(self._path(name)), data)
                else:
                    self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError:  # some stores do not name the reason
                if self._fs.exists(self._path(name)):
                    return False
                raise
            return True

        return self._call(create)

    def list(self, folder: str) -> list[str]:
        """The names of the files and folders in a folder, sorted; empty if there is no such folder."""
        entries: list[str] = self._call(lambda: list(self._fs.ls(self._path(folder), detail=False)), missing=[])
        names = {posixpath.basename(entry.rstrip("/")) for entry in entries}
        return sorted(name for name in names if name and not name.startswith("."))

    def delete(self, name: str) -> None:
        """Deletes a file, or a folder and everything in it, if it exists."""
        self._call(lambda: self._fs.rm(self._path(name), recursive=True), missing=None)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _call(self, function: Callable[[], T], **missing: Any) -> T:
        """Calls `function`; its errors become `Unavailable`, except that a file that is missing is a result."""
        try:
            return function()
        except FileNotFoundError:
            if "missing" in missing:
                result: T = missing["missing"]
                return result
            raise Unavailable("the store lost a file while it was in use: try again") from None
        except OnewordError as error:
            raise Unavailable("the store cannot be written to: try again later") from error
        except Exception as error:  # of any type: the store's own library
            raise Unavailable("the store cannot be reached: try again later") from error


def _link_whole(path: Path, data: bytes) -> None:
    """Creates a local file that appears whole. Raises FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        write_whole(temporary, data)
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
