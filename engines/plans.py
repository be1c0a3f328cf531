"""Compiled plans on disk: a cache that several processes can share. A plan is native code, so only bytes whose hash is
in the index are ever returned. Not covered: what a plan computes.

    <folder>/index.json      key -> size, sha256 and the fields of the key
    <folder>/<key>.plan
    <folder>/<key>.lock      held by the process that builds this plan

A plan that is too large for memory is some files instead, which are hashed when they are new or have changed:

    <folder>/<key>.xml, <key>.bin
    <folder>/<key>.partial/  what the process that builds it has written so far
    <folder>/verified.json   size, mtime and inode of every file that was hashed
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from oneword.engines.errors import FileError
from oneword.engines.files import file_digest, read_stamps, stamp, sync, write_stamps, write_whole
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
    sha256: str
    size: int
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
        return plan if (len(plan), hashlib.sha256(plan).hexdigest()) == (entry.size, entry.sha256) else None

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
        index, verified = self._index(), self.folder / _VERIFIED
        paths, remembered = self._files(key, suffixes), read_stamps(verified)
        stamps = dict(remembered)
        try:
            for path in paths:
                digest = index[path.name].sha256
                stamps[path.name] = stamp(digest, path.stat())  # before the hash: a later change is noticed next time
                if stamps[path.name] != remembered.get(path.name) and file_digest(path) != digest:
                    return None
        except (KeyError, OSError):
            return None
        if stamps != remembered:
            write_stamps(verified, stamps)
        return paths

    def load_or_build_files(self, key: PlanKey, suffixes: Sequence[str], build: Callable[[Path], None]) -> list[Path]:
        """The plan's files, built if necessary: `build(path)` writes the first suffix's file at `path` and the others
        beside it. Raises as `load_or_build` does."""
        if (paths := self.load_files(key, suffixes)) is not None:
            return paths
        with self._lock(f"{key.name}.lock"):
            if (paths := self.load_files(key, suffixes)) is None:
                paths, partial = self._files(key, suffixes), self.folder / f"{key.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                try:
                    partial.mkdir()
                    build(partial / paths[0].name)
                    for path in paths:
                        self._adopt(key, partial / path.name, path)
                except OSError as error:
                    raise FileError(f"cannot write into {self.folder}: {error.strerror or error}") from error
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        return paths

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

    def _store(self, key: PlanKey, plan: bytes) -> None:
        """Writes the plan, then the index entry that vouches for it: after a kill in between it is never loaded."""
        entry = _Entry(hashlib.sha256(plan).hexdigest(), len(plan), asdict(key))
        write_whole(self.path(key), plan)
        self._record(key.name, entry)

    def _adopt(self, key: PlanKey, built: Path, path: Path) -> None:
        """The same for a file that is moved to `path`. Raises OSError too."""
        entry = _Entry(file_digest(built), built.stat().st_size, asdict(key))
        sync(built)
        os.replace(built, path)
        sync(self.folder)
        self._record(path.name, entry)
        verified = self.folder / _VERIFIED
        write_stamps(verified, {**read_stamps(verified), path.name: stamp(entry.sha256, path.stat())})

    def _record(self, name: str, entry: _Entry) -> None:
        with self._lock("index.lock"):
            index = {**self._index(), name: entry}
            write_whole(self.folder / "index.json", msgspec.json.encode(index, order="sorted"))

    def _files(self, key: PlanKey, suffixes: Sequence[str]) -> list[Path]:
        return [self.folder / f"{key.name}{suffix}" for suffix in suffixes]

    def _index(self) -> dict[str, _Entry]:
        try:
            return msgspec.json.decode((self.folder / "index.json").read_bytes(), type=dict[str, _Entry])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
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
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
