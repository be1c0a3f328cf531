"""What a server and its learning process write to each other: one JSON object per line.

The server writes an `Order` to the process's standard input; the process writes `Report`s to its standard output. Not
covered: the process (`oneword.train.job`) and what the server makes of its reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One word to learn. `folder` holds the job's files: `pictures/`, `run/` (checkpoints), `snapshots/`.

    `digest` is that of the bundle's source: a model with other weights is refused. `encoders` are the bundle's text
    encoders: one that the bundle leaves out is not used for learning either. `snapshots` are the steps after which the
    word's vectors are reported.
    """

    folder: str
    model: str
    digest: str
    token: str
    init: str
    recipe: str
    steps: int
    seed: int
    encoders: tuple[str, ...]
    snapshots: tuple[int, ...] = ()
    checkpoint_every: int = 5


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The model is loaded and learning begins. `machine` is what the word's last bits depend on, besides the order."""

    machine: Mapping[str, str]


class Step(msgspec.Struct, frozen=True, tag="step"):
    """An optimiser step is done. `loss` is None before the first one."""

    step: int
    steps: int
    loss: float | None


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """The word's vectors after `step` are in `file`, relative to the order's folder."""

    step: int
    file: str


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A warning for the user."""

    text: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The word is in `file`, relative to the order's folder."""

    file: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The word cannot be learned, for the reason in `error`; trying again does not help."""

    error: str


class Digest(msgspec.Struct, frozen=True, tag="digest"):
    """The digest of a model's files, as a bundle's manifest records it."""

    digest: str
    name: str


Report: TypeAlias = Started | Step | Snapshot | Note | Done | Failed | Digest


def snapshot_steps(steps: int) -> tuple[int, ...]:
    """The steps after which a run of `steps` steps shows its word: early ones, then fewer and fewer, and the last."""
    early = [step for step in (0, 5, 10, 20, 35, 50) if step < steps]
    later = [50 << doubling for doubling in range(1, 15) if 50 << doubling < steps]
    return (*early, *later, steps)
