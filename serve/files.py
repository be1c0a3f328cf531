"""Where the store keeps its bytes: a folder, or whatever fsspec opens by URL. Small files, read and written whole.

A path is relative, with / between its parts; a part that a client chose goes through `quoted`. Names that start with a
dot are never listed. Nothing is cached, so other servers' writes are seen at once. Not covered: what the files mean
(`oneword.serve.store`, `oneword.serve.job_files`, `oneword.serve.results`).
"""

import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import fsspec

from oneword.engines.errors import FileError, UsageError, one_line
from oneword.engines.files import sync, write_whole
from oneword.serve.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

MAX_BYTES: Final = 256 << 20  # of one file, unless its reader has a lower limit
_LOCKS: Final = tuple(threading.Lock() for _ in range(64))
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "s3": {"max_concurrency": 1},  # one request for a small file, without asking for its size first
    "s3a": {"max_concurrency": 1},
}
_LOCK: Final = ".lock"
_TEMPORARY: Final = re.compile(r"\.(.+\.)?[0-9a-f]{16}")
"""Names that `create` and `write_whole` give to what they have not finished; a folder may hold other hidden files."""
_PLAIN: Final = frozenset(string.ascii_lowercase + string.digits + "_-")
_QUOTES: Final = {byte: f"={byte:02x}" for byte in range(256) if chr(byte) not in _PLAIN}
_MAX_QUOTED: Final = 200  # characters; file systems allow 255 bytes
_CODE_POINT_BITS: Final = 18  # letters and digits have code points below 0x40000
_log = logging.getLogger("oneword.serve")


class Files(Protocol):
    """A folder or a bucket. Every method may be called from any thread and raises Unavailable if it fails."""

    def read(self, path: str, limit: int = MAX_BYTES) -> bytes | None:
        """The file's content, at most `limit` + 1 bytes of it; None if there is no such file."""
        ...

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Creates or replaces a file: it is there whole, or not at all. If `durable`, it survives a power cut."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """As `write`, unless there is such a file already: then False. Of several servers, one succeeds."""
        ...

    def delete(self, path: str) -> None:
        """Deletes a file, which need not exist."""
        ...

    def delete_folder(self, folder: str) -> None:
        """Deletes a folder and everything in it; it need not exist."""
        ...

    def touch(self, path: str) -> None:
        """Makes a file, which need not exist, as young as a new one."""
        ...

    def modified(self, path: str) -> float | None:
        """When the file was written, in seconds since 1970; None if there is no such file."""
        ...

    def names(self, folder: str) -> Sequence[str]:
        """The names of the files and folders in a folder, which need not exist, in any order."""
        ...

    def sweep(self, before: float) -> None:
        """Deletes what interrupted writes left behind before a time."""
        ...

    def locked(self, folder: str) -> AbstractContextManager[None]:
        """Locks a folder: for all processes if it is a local folder, else for the threads of this one."""
        ...


def open_files(location: str) -> Files:
    """The files at a folder or URL, created if there is none.

    Raises UsageError if that is not possible; it names the package that is missing.
    """
    protocol, separator, path = location.partition("://")
    if not separator:
        return FolderFiles(Path(location).expanduser())
    if protocol in ("file", "local"):
        return FolderFiles(Path(path))
    try:
        options = {"use_listings_cache": False, **_OPTIONS.get(protocol, {})}
        system, root = fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise UsageError(f"--words {protocol}://... needs a package that is missing: {one_line(error)}") from None
    except Exception as error:  # any library behind any protocol
        raise UsageError(
            f"--words {protocol}://... cannot be opened ({one_line(error)}): "
            "pass a folder, or a URL that fsspec opens, such as s3://bucket/words"
        ) from None
    return UrlFiles(system, root.rstrip("/"))


def _guarded(method: Callable[P, T]) -> Callable[P, T]:
    """Turns every exception into Unavailable, and logs its type: the text holds paths."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Unavailable:
            raise
        except Exception as error:  # OSError, FileError, or anything of a library behind fsspec
            cause = error.__cause__ or error
            _log.error("store: %s failed: %s", method.__name__, type(cause).__name__)
            raise Unavailable("the store cannot be read or written at the moment: try again later") from error

    return call


class FolderFiles:
    """A folder. Several processes, also on several machines, may share it if its file system has flock."""

    def __init__(self, root: Path) -> None:
        """Raises UsageError if the folder cannot be created."""
        self.root = root.absolute()
        try:
            self._make(self.root)
        except OSError as error:
            raise UsageError(f"--words {root} cannot be created as a folder: {error.strerror}") from None

    @_guarded
    def read(self, path: str, limit: int = MAX_BYTES) -> bytes | None:
        """See Files."""
        try:
            with (self.root / path).open("rb", buffering=0) as file:
                return file.read(limit + 1)
        except FileNotFoundError:
            return None

    @_guarded
    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """See Files."""
        file = self.root / path
        try:
            write_whole(file, data, sync=durable)
        except FileError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self._make(file.parent)  # another writer may have created it since
            write_whole(file, data, sync=durable)

    @_guarded
    def create(self, path: str, data: bytes) -> bool:
        """See Files. The file system must have hard links."""
        file = self.root / path
        if file.exists():
            return False
        whole = file.with_name(f".{secrets.token_hex(8)}")
        try:
            self.write(str(whole.relative_to(self.root)), data)
            os.link(whole, file)
        except FileExistsError:
            return False
        finally:
            whole.unlink(missing_ok=True)
        sync(file.parent)
        return True

    @_guarded
    def delete(self, path: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            (self.root / path).unlink()
            sync((self.root / path).parent)

    @_guarded
    def delete_folder(self, folder: str) -> None:
        """See Files."""
        while (self.root / folder).exists():
            with contextlib.suppress(FileNotFoundError):  # another server deletes it too
                shutil.rmtree(self.root / folder)

    @_guarded
    def touch(self, path: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / path)

    @_guarded
    def modified(self, path: str) -> float | None:
        """See Files."""
        try:
            return (self.root / path).stat().st_mtime
        except FileNotFoundError:
            return None

    @_guarded
    def names(self, folder: str) -> Sequence[str]:
        """See Files."""
        try:
            return [name for name in os.listdir(self.root / folder) if name[0] != "."]
        except FileNotFoundError:
            return []

    @_guarded
    def sweep(self, before: float) -> None:
        """See Files."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                file = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if _TEMPORARY.fullmatch(name) and file.stat().st_mtime <= before:
                        file.unlink()

    @contextlib.contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """See Files. The lock is a file in the folder; it is released when its process ends, however that ends."""
        descriptor = self._lock(folder)
        try:
            yield
        finally:
            os.close(descriptor)

    @_guarded
    def _lock(self, folder: str) -> int:
        file = self.root / folder / _LOCK
        self._make(file.parent)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make(self, folder: Path) -> None:
        """Creates a folder that survives a power cut."""
        if folder.is_dir():
            return
        self._make(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name")
        sync(folder.parent)


class UrlFiles:
    """A file system of fsspec. Whether a write is atomic and durable depends on what is behind it; in S3 it is."""

    def __init__(self, system: Any, root: str) -> None:
        """`system` is an fsspec.AbstractFileSystem, `root` a path in it."""
        self._system = system
        self._root = root

    @_guarded
    def read(self, path: str, limit: int = MAX_BYTES) -> bytes | None:
        """See Files."""
        try:
            data: bytes = self._system.cat_file(self._path(path))
        except FileNotFoundError:
            return None
        return data

    @_guarded
    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """See Files."""
        self._system.pipe_file(self._path(path), data)

    @_guarded
    def create(self, path: str, data: bytes) -> bool:
        """See Files. S3 refuses the second of two machines that create a file at the same moment."""
        try:
            self._system.pipe_file(self._path(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError:  # some do not name the reason
            if self._system.exists(self._path(path)):
                return False
            raise
        return True

    @_guarded
    def delete(self, path: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(path))

    @_guarded
    def delete_folder(self, folder: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._path(folder), recursive=True)

    @_guarded
    def touch(self, path: str) -> None:
        """See Files."""
        data = self.read(path)
        if data is not None:
            self.write(path, data)

    @_guarded
    def modified(self, path: str) -> float | None:
        """See Files."""
        try:
            return float(self._system.modified(self._path(path)).timestamp())
        except FileNotFoundError:
            return None

    @_guarded
    def names(self, folder: str) -> Sequence[str]:
        """See Files."""
        try:
            paths = self._system.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return [name for name in names if name and name[0] != "."]

    def sweep(self, before: float) -> None:
        """See Files. Nothing to do: an interrupted upload leaves no file."""

    @contextlib.contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """See Files."""
        with _LOCKS[hash((self._root, folder)) % len(_LOCKS)]:
            yield

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"


def quoted(text: str) -> str:
    """A name for a file: lower-case ASCII letters, digits, _ - = ~, at most 250 of them; different for each text.

    Other characters are =xx for each byte of UTF-8, and the empty text is =. If that is too long: ~ and 18 bits for
    each character in base 32, or ~~ and the text's sha256 for what no token is.
    """
    encoded = text.encode("utf-8", "surrogatepass")
    name = encoded.decode("latin-1").translate(_QUOTES)
    if len(name) <= _MAX_QUOTED:
        return name or "="
    if len(text) > 64 or max(map(ord, text)) >= 1 << _CODE_POINT_BITS:
        return f"~~{hashlib.sha256(encoded).hexdigest()}"
    number = functools.reduce(lambda number, character: number << _CODE_POINT_BITS | ord(character), text, 1)
    packed = base64.b32encode(number.to_bytes((number.bit_length() + 7) // 8))
    return "~" + packed.decode().rstrip("=").lower()


def unquoted(name: str) -> str | None:
    """The text whose `quoted` name this is; None for a name that `quoted` never gives."""
    try:
        if name.startswith("~"):
            text = _unpacked(name[1:])
        else:
            first, *codes = name.split("=")
            text = first + "".join(chr(int(part[:2], 16)) + part[2:] for part in codes)
            text = text.encode("latin-1").decode()
    except (ValueError, OverflowError):
        return None
    return text if quoted(text) == name else None


def _unpacked(code: str) -> str:
    number = int.from_bytes(base64.b32decode(code.upper() + "=" * (-len(code) % 8)))
    characters: list[str] = []
    while number > 1:
        characters.append(chr(number & ((1 << _CODE_POINT_BITS) - 1)))
        number >>= _CODE_POINT_BITS
    return "".join(reversed(characters))
