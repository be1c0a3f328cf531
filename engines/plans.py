"""Compiled plans on disk: a cache that several processes can share. A plan is native code, so only bytes whose hash is
in the index are ever returned. Not covered: what a plan computes.

    <folder>/index.json      key -> size, sha256 and the fields of the key
    <folder>/<key>.plan
    <folder>/<key>.lock      held by the process that builds this plan
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from oneword.engines.errors import FileError
from oneword.engines.files import write_whole
from oneword.engines.graph import Precision

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
        with self._lock("index.lock"):
            index = {**self._index(), key.name: entry}
            write_whole(self.folder / "index.json", msgspec.json.encode(index, order="sorted"))

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
