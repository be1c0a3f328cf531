"""Checkpoints of a run, complete or absent. A run killed at any instant resumes with the same command, bit for bit.

    toy.run/step-00000125/  state.safetensors  state.json  COMPLETE
            step-00000150/  ...

A checkpoint is written under a temporary name, synced, marked with the hashes of its files and renamed, and the folder
is synced; then all but the last two are deleted. A checkpoint whose mark is missing or wrong is skipped. Nothing else
in the folder is ever touched.
"""

from __future__ import annotations

import contextlib
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
from oneword.engines.files import lock_folder, sync

KEEP = 2
MARK = "COMPLETE"
STATE = re.compile(r"step-\d{8}")
UNFINISHED = re.compile(r"\.step-\d{8}\.\d+")
FILES = ("state.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run: `tensors` by name, `facts` as JSON values, and the `settings` a resumed run must share."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    settings: Mapping[str, str]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically, then deletes all but the last two. Raises `FileError` if it cannot be written."""
    final = folder / f"step-{checkpoint.step:08d}"
    staging = _unfinished(final)
    facts = {"step": checkpoint.step, "facts": checkpoint.facts, "settings": checkpoint.settings}
    contents = (
        safetensors.torch.save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}),
        json.dumps(facts).encode(),
    )
    try:
        folder.mkdir(exist_ok=True)
        for unfinished in _entries(folder, UNFINISHED):  # left by a run killed while writing
            shutil.rmtree(unfinished)
        if _read(final) is not None:  # left by a run that ended right after writing: the same bits
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
            f"{folder}: cannot write a checkpoint ({error}): the last one is intact, resume with the same command"
        ) from error


def load_checkpoint(folder: Path, settings: Mapping[str, str]) -> Checkpoint | None:
    """Returns the newest intact checkpoint, or None if no run has started.

    Raises `UsageError` naming every setting that differs from the run's, `FileError` if no checkpoint is intact.
    """
    paths = _entries(folder, STATE)
    for path in reversed(paths):
        checkpoint = _read(path)
        if checkpoint is not None:
            _check_settings(folder, checkpoint.settings, settings)
            return checkpoint
    if paths:
        raise FileError(f"{folder}: none of its checkpoints can be read: delete that folder to start over")
    return None


def forget(folder: Path) -> None:
    """Deletes a finished run's checkpoints, and the folder if nothing else is in it.

    If killed midway, it leaves nothing that a later run would refuse.
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
    """Locks the run's folder. Raises `UsageError` if another process holds it, `FileError` if it cannot be created."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = lock_folder(folder)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be used for checkpoints ({error.strerror}): choose a folder with --checkpoints"
        ) from error
    if descriptor is None:
        raise UsageError(f"another ti-train is using {folder}: wait for it to finish, or give another --output")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        os.close(descriptor)


def _unfinished(state: Path) -> Path:
    """The temporary name of a checkpoint while it is written or deleted."""
    return state.with_name(f".{state.name}.{os.getpid()}")


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The checkpoints in `folder`, by name: folders whose name matches and that contain only a checkpoint's files."""
    states = [path for path in sorted(folder.glob("*step-*")) if pattern.fullmatch(path.name) and path.is_dir()]
    return [path for path in states if {inner.name for inner in path.iterdir()} <= {*FILES, MARK}]


def _read(path: Path) -> Checkpoint | None:
    try:
        contents = [(path / name).read_bytes() for name in FILES]
        if json.loads((path / MARK).read_bytes()) != [hashlib.sha256(c).hexdigest() for c in contents]:
            return None
        state = json.loads(contents[1])
    except (OSError, ValueError):
        return None
    return Checkpoint(state["step"], safetensors.torch.load(contents[0]), state["facts"], state["settings"])


def _check_settings(folder: Path, saved: Mapping[str, str], requested: Mapping[str, str]) -> None:
    names = [name for name in dict.fromkeys([*saved, *requested]) if saved.get(name) != requested.get(name)]
    if names:
        changes = ", ".join(f"{name} was {saved.get(name)} and is {requested.get(name)}" for name in names)
        raise UsageError(
            f"{folder} holds a run with other settings: {changes}; give the same command or delete that folder"
        )


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        unwritten = memoryview(content)
        while unwritten:
            unwritten = unwritten[os.write(descriptor, unwritten) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
