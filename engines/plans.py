"""Compiled plans on disk: a cache that several processes can share. A plan is native code, so only bytes whose hash is
in the index are ever returned. Not covered: what a plan computes.

    <folder>/index.json      key -> the fields of the key, and the sha256 of each of its files by name
    <folder>/<key>.plan
    <folder>/<key>.lock      held by the process that builds this plan

A plan that is too large for memory is stored as several files, which are hashed when they are new or have changed.
Their names contain their hashes, and one entry of the index names them all, so files of two builds are never read
together:

    <folder>/<key>-<hash>.xml, <key>-<hash>.bin
    <folder>/<key>.partial/  what the process that builds it has written so far
    <folder>/verified.json   size, mtime and inode of every file that was hashed
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from oneword.engines.errors import FileError
from oneword.engines.files import file_digest, from_json, read_stamps, stamp, sync, write_stamps, write_whole
from oneword.engines.graph import Precision

_VERIFIED = "verified.json"

Ranges = Mapping[str, tuple[int, int, int]]
"""Smallest, typical and largest size of each named axis."""


@dataclass(frozen=True)
class PlanKey:
    """Everything that a plan depends on; different keys are different files."""

    graph_digest: str
    backend: str
    version: str
    device: str
    precision: Precision
    ranges: Ranges
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A file name: 32 hex digits of the sha256 over all fields."""
        text = json.dumps(asdict(self), sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Entry(msgspec.Struct, frozen=True):
    files: dict[str, str]
    """sha256 by file name."""
    key: dict[str, object]


class PlanCache:
    """Plans in one folder. Safe against races, kills at any point, and damaged or foreign files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: PlanKey) -> bytes | None:
        """The plan, or None if it does not exist or its bytes have changed since it was built."""
        entry = self._index().get(key.name)
        if entry is None:
            return None
        try:
            plan = self.path(key).read_bytes()
        except OSError:
            return None
        return plan if hashlib.sha256(plan).hexdigest() == entry.files.get(self.path(key).name) else None

    def load_or_build(self, key: PlanKey, build: Callable[[], bytes]) -> bytes:
        """The plan, built once even if several processes request it at the same time.

        Raises FileError (disk), and whatever `build` raises.
        """
        if (plan := self.load(key)) is not None:
            return plan
        with self._lock(f"{key.name}.lock"):
            if (plan := self.load(key)) is None:  # else another process built it while this one waited
                plan = build()
                self._store(key, plan)
        return plan

    def load_files(self, key: PlanKey, suffixes: Sequence[str]) -> list[Path] | None:
        """The files of a plan that is too large to be read, one per suffix; None as for `load`.

        They are hashed once; after that size, mtime and inode must be unchanged, or they are hashed again.
        """
        entry, verified = self._index().get(key.name), self.folder / _VERIFIED
        digests = {} if entry is None else {Path(name).suffix: (name, digest) for name, digest in entry.files.items()}
        paths, remembered = [], read_stamps(verified)
        stamps = dict(remembered)
        try:
            for name, digest in [digests[suffix] for suffix in suffixes]:
                path = self.folder / name
                stamps[name] = stamp(digest, path.stat())  # before the hash: a later change is noticed next time
                if stamps[name] != remembered.get(name) and file_digest(path) != digest:
                    return None
                paths.append(path)
        except (KeyError, OSError):
            return None
        if stamps != remembered:
            write_stamps(verified, stamps)
        return paths

    def load_or_build_files(self, key: PlanKey, suffixes: Sequence[str], build: Callable[[Path], None]) -> list[Path]:
        """The plan's files, built if necessary: `build(path)` writes the first suffix's file at `path` and the others
        next to it, with the same stem. Files of the same graph for other versions or flags are deleted, and plans whose
        flags name such a file, so only one version at a time keeps them. Raises as `load_or_build` does."""
        if (paths := self.load_files(key, suffixes)) is not None:
            return paths
        with self._lock(f"{key.name}.lock"):
            if (paths := self.load_files(key, suffixes)) is None:
                partial = self.folder / f"{key.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                try:
                    partial.mkdir()
                    built = [partial / f"plan{suffix}" for suffix in suffixes]
                    build(built[0])
                    paths = self._adopt(key, built)
                except OSError as error:
                    raise FileError(f"cannot write into {self.folder}: {error.strerror or error}") from error
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        return paths

    def keep_graphs(self, digests: Collection[str]) -> None:
        """Deletes the plans of all other graphs. Raises FileError."""
        self._keep("graph_digest", digests)

    def keep_version(self, version: str) -> None:
        """Deletes the plans of all other versions of the backend. Raises FileError."""
        self._keep("version", (version,))

    def recorded(self) -> list[PlanKey]:
        """The keys of all plans in the index; entries that are not valid keys are skipped."""
        keys = []
        for entry in self._index().values():
            with contextlib.suppress(msgspec.ValidationError):
                keys.append(msgspec.convert(entry.key, PlanKey))
        return keys

    def path(self, key: PlanKey) -> Path:
        """The plan's file."""
        return self.folder / f"{key.name}.plan"

    def _keep(self, name: str, values: Collection[str]) -> None:
        """Deletes all plans but those whose key has one of these values in the field of this name."""
        with self._lock("index.lock"):
            self._replace_index({key: e for key, e in self._index().items() if e.key.get(name) in values})

    def _store(self, key: PlanKey, plan: bytes) -> None:
        """Writes the plan, then its index entry: a plan without one, as after a kill in between, is never loaded."""
        path = self.path(key)
        write_whole(path, plan)
        with self._lock("index.lock"):
            entry = _Entry({path.name: hashlib.sha256(plan).hexdigest()}, asdict(key))
            self._replace_index({**self._index(), key.name: entry})

    def _adopt(self, key: PlanKey, built: Sequence[Path]) -> list[Path]:
        """The same for the files of a plan, which are moved into the folder. Raises OSError too."""
        digests = [file_digest(path) for path in built]
        names = [f"{key.name}-{digest[:16]}{path.suffix}" for path, digest in zip(built, digests, strict=True)]
        entry = _Entry(dict(zip(names, digests, strict=True)), asdict(key))
        paths = [self.folder / name for name in names]
        for source, path in zip(built, paths, strict=True):
            sync(source)
            os.replace(source, path)
        sync(self.folder)
        with self._lock("index.lock"):
            index = self._index()
            replaced = {file for e in index.values() if _supersedes(entry, e) for file in e.files} - {*names}
            remaining = {n: e for n, e in index.items() if not (_supersedes(entry, e) or replaced & _flags(e))}
            self._replace_index({**remaining, key.name: entry})
        for path in self.folder.glob(f"{key.name}-*"):  # of a process that was killed before its entry was written
            if path not in paths:
                path.unlink(missing_ok=True)
        stamps = {path.name: stamp(digest, path.stat()) for path, digest in zip(paths, digests, strict=True)}
        write_stamps(self.folder / _VERIFIED, {**read_stamps(self.folder / _VERIFIED), **stamps})
        return paths

    def _replace_index(self, index: Mapping[str, _Entry]) -> None:
        """Writes the index, then deletes the files that only the previous one had. Its lock must be held."""
        previous = {name for entry in self._index().values() for name in entry.files}
        write_whole(self.folder / "index.json", msgspec.json.encode(index, order="sorted"))
        for name in previous.difference(*(entry.files for entry in index.values())):
            with contextlib.suppress(OSError):
                (self.folder / Path(name).name).unlink()

    def _index(self) -> dict[str, _Entry]:
        try:
            return from_json((self.folder / "index.json").read_bytes(), dict[str, _Entry])
        except (OSError, ValueError):
            return {}

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Holds a lock file; the kernel releases it when the process ends, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FileError(f"cannot write into {self.folder}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:  # a disk without locks
                raise FileError(f"cannot lock {self.folder / name}: {error.strerror}") from error
            yield
        finally:
            os.close(descriptor)


def _flags(entry: _Entry) -> set[object]:
    """The flags of a plan's key: among them are the files of another plan that it refers to."""
    flags = entry.key.get("flags")
    return {*flags} if isinstance(flags, list | tuple) else set()


def _supersedes(entry: _Entry, other: _Entry) -> bool:
    """Whether both are several files of one graph, of any versions and flags."""
    fields = ("graph_digest", "backend", "device")
    return len(other.files) > 1 and all(entry.key.get(name) == other.key.get(name) for name in fields)
