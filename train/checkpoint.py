"""A run's state on disk, whole or not there: kill the run at any instant and the same command goes on, bit by bit.

    toy.run/step-00000125/  state.safetensors  state.json  COMPLETE
            step-00000150/  ...

A checkpoint is written under another name, synced, marked with the hashes of its files, renamed, and the folder synced;
then all but the last two are deleted. What is neither marked nor as the mark says is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from oneword.engines.errors import FileError, UsageError

KEEP = 2
MARK = "COMPLETE"
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
    staging = folder / f".{final.name}.{os.getpid()}"
    facts = {"step": checkpoint.step, "facts": checkpoint.facts, "settings": checkpoint.settings}
    contents = (
        safetensors.torch.save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}),
        json.dumps(facts).encode(),
    )
    try:
        folder.mkdir(exist_ok=True)
        for rest in folder.glob(".step-*"):  # of a run killed while it wrote
            shutil.rmtree(rest)
        staging.mkdir()
        for name, content in zip(FILES, contents, strict=True):
            _write_synced(staging / name, content)
        _write_synced(staging / MARK, json.dumps([hashlib.sha256(c).hexdigest() for c in contents]).encode())
        _sync_folder(staging)
        if final.exists():  # of a run killed after it wrote and before it went on; the same bits, or damaged
            shutil.rmtree(final)
        staging.rename(final)
        _sync_folder(folder)
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    except OSError as error:
        raise FileError(
            f"{folder}: the run's state cannot be written ({error}): the last one written is kept"
        ) from error


def load_checkpoint(folder: Path, settings: Mapping[str, str]) -> Checkpoint | None:
    """The newest whole checkpoint, None where no run has begun.

    Raises `UsageError` naming every setting that is not as it was when the run began, `FileError` where none is whole.
    """
    paths = sorted(folder.glob("step-*"), reverse=True)
    for path in paths:
        found = _read(path)
        if found is not None:
            _check_settings(folder, found.settings, settings)
            return found
    if paths:
        raise FileError(f"{folder}: no state of the run in it can be read: delete that folder to begin anew")
    return None


def forget(folder: Path) -> None:
    """Delete a finished run's state."""
    shutil.rmtree(folder, ignore_errors=True)


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
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
