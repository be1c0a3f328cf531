"""A run's state on disk, whole or not there: kill the run at any instant and the same command goes on, bit by bit.

    toy.run/step-00000125/  state.safetensors  state.json  COMPLETE
            step-00000150/  ...

A checkpoint is written under another name, synced, marked with the hashes of its files, renamed, and the folder synced;
then all but the last two are deleted. What is neither marked nor as the mark says is passed over. Nothing in the folder
that is not a state is ever touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from oneword.engines.errors import FileError, UsageError
from oneword.engines.files import sync

KEEP = 2
MARK = "COMPLETE"
STATE = re.compile(r"step-\d{8}")
UNFINISHED = re.compile(r"\.step-\d{8}\.\d+")
FILES = ("state.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is: `tensors` by name, `facts` that JSON can hold, `settings` that must stay as they are."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    settings: Mapping[str, str]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it whole, then forget the older ones. Raises `FileError` if the disk does not take it."""
    final = folder / f"step-{checkpoint.step:08d}"
    staging = _unfinished(final)
    facts = {"step": checkpoint.step, "facts": checkpoint.facts, "settings": checkpoint.settings}
    contents = (
        safetensors.torch.save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}),
        json.dumps(facts).encode(),
    )
    try:
        folder.mkdir(exist_ok=True)
        for rest in _entries(folder, UNFINISHED):  # of a run killed while it wrote
            shutil.rmtree(rest)
        if _read(final) is not None:  # of a run killed or stopped right after it wrote: the same bits
            return
        staging.mkdir()
        for name, content in zip(FILES, contents, strict=True):
            _write_synced(staging / name, content)
        _write_synced(staging / MARK, json.dumps([hashlib.sha256(c).hexdigest() for c in contents]).encode())
        sync(staging)
        if final.exists():  # damaged
            shutil.rmtree(final)
        staging.rename(final)
        sync(folder)
        for old in _entries(folder, STATE)[:-KEEP]:
            shutil.rmtree(old)
    except OSError as error:
        raise FileError(
            f"{folder}: the run's state cannot be written ({error}): the last one written is kept"
        ) from error


def load_checkpoint(folder: Path, settings: Mapping[str, str]) -> Checkpoint | None:
    """The newest whole checkpoint, None where no run has begun.

    Raises `UsageError` naming every setting that is not as it was when the run began, `FileError` where none is whole.
    """
    paths = _entries(folder, STATE)
    for path in reversed(paths):
        found = _read(path)
        if found is not None:
            _check_settings(folder, found.settings, settings)
            return found
    if paths:
        raise FileError(f"{folder}: no state of the run in it can be read: delete that folder to begin anew")
    return None


def forget(folder: Path) -> None:
    """Delete a finished run's states, and the folder if nothing else is in it.

    Killed midway, it leaves no half state that a later start would stumble over.
    """
    for path in _entries(folder, STATE):
        with contextlib.suppress(OSError):
            path.rename(_unfinished(path))
    for path in _entries(folder, UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes off a run while it goes. Raises `UsageError` if one is at it, `FileError` without a disk."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FileError(f"{folder}: the run's state cannot be kept there ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(
            f"another ti-train is at the run in {folder}: wait for it, or give another --output"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was kept
        os.close(descriptor)


def _unfinished(state: Path) -> Path:
    """Where a state stands while it is written or taken away."""
    return state.with_name(f".{state.name}.{os.getpid()}")


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The folders of ours in `folder`, by name: the name fits and nothing but our files is inside."""
    found = [path for path in sorted(folder.glob("*step-*")) if pattern.fullmatch(path.name) and path.is_dir()]
    return [path for path in found if {inner.name for inner in path.iterdir()} <= {*FILES, MARK}]


def _read(path: Path) -> Checkpoint | None:
    try:
        contents = [(path / name).read_bytes() for name in FILES]
        if json.loads((path / MARK).read_bytes()) != [hashlib.sha256(c).hexdigest() for c in contents]:
            return None
        state = json.loads(contents[1])
    except (OSError, ValueError):
        return None
    return Checkpoint(state["step"], safetensors.torch.load(contents[0]), state["facts"], state["settings"])


def _check_settings(folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name} was {then.get(name)} and is {now.get(name)}" for name in names)
        raise UsageError(
            f"{folder} holds a run begun otherwise: {changes}; give the same command or delete that folder"
        )


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
