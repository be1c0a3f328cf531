"""The learning process as the server sees it: started with an order, read report by report, stopped.

PyTorch is never imported here: whether it is installed is read from the package metadata, and a model's digest is
computed by a process of its own. Not covered: the queue, and what becomes of a report (`oneword.serve.jobs`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import msgspec

from oneword.engines.errors import UsageError, pip_line
from oneword.runtime.bundle import Manifest
from oneword.serve.errors import Invalid, NotInstalled
from oneword.serve.messages import Digest, Done, Failed, Order, Report

MODULE = "oneword.train.job"
PACKAGES = ("torch", "diffusers", "transformers")
STOP_SECONDS = 3.0  # for a process to save and end after its standard input is closed
MAX_STEPS = 5000
_PATH = re.compile(r"(?<![\w.:/])(~|[A-Za-z]:)?[/\\][^\s/\\]+[/\\]")


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe that a client may ask for: its steps unless the client says otherwise, and what it is for."""

    steps: int
    purpose: str


RECIPES: Mapping[str, RecipeChoice] = MappingProxyType(
    {
        "directional": RecipeChoice(50, "a thing, in seconds on a small model"),
        "fast": RecipeChoice(200, "a thing, learned longer from larger batches"),
        "style": RecipeChoice(200, "a style"),
        "one-word": RecipeChoice(5000, "the paper's method"),
    }
)
"""The recipes of `oneword.train.recipe` that a server offers, by name; the first is the default."""


class ProcessLost(Exception):
    """The process ended without saying why: it was killed, ran out of memory, or crashed. A new one resumes its run."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the learning process ended with status {status}")
        self.status = status


def is_installed() -> bool:
    """Whether learning is possible: PyTorch and its companions are installed. Nothing is imported."""
    return all(importlib.util.find_spec(package) for package in PACKAGES)


def require_installed() -> None:
    """Raises `NotInstalled` with the pip line if learning is not possible."""
    if not is_installed():
        raise NotInstalled(f"this server cannot learn, as PyTorch is not installed: {pip_line('train')}")


def recipe_of(name: str | None, steps: int | None) -> tuple[str, int]:
    """The recipe and the number of steps of a request. Raises `Invalid`."""
    name = name or next(iter(RECIPES))
    if name not in RECIPES:
        raise Invalid(f"unknown recipe {name[:80]!r}: choose from {', '.join(RECIPES)}", "recipe")
    steps = RECIPES[name].steps if steps is None else steps
    if not 1 <= steps <= MAX_STEPS:
        raise Invalid(f"steps is {steps}: give a whole number from 1 to {MAX_STEPS}", "steps")
    return name, steps


async def model_digest(model: str) -> Digest:
    """The digest of a model's files, from a process of its own. Raises `UsageError` if the model cannot be used."""
    process = await _start("--digest", model, stderr=DEVNULL)
    output, _ = await process.communicate()
    match _report_of(output):
        case Digest() as digest:
            return digest
        case Failed(error):
            raise UsageError(f"--model: {error}")
        case _:
            raise UsageError(f"--model {model}: its digest could not be computed, run python -m {MODULE} --digest")


async def check_model(model: str, manifest: Manifest) -> str:
    """The digest of the model's weights, which must be those of the bundle. Raises `UsageError` if they differ."""
    digest = (await model_digest(model)).digest
    if digest != manifest.source.digest:
        raise UsageError(
            f"--model {model} and the bundle have different weights (the bundle is of {manifest.source.id}): "
            "words learned on one do not work on the other, so give the model that the bundle was exported from"
        )
    return digest


class LearningProcess:
    """A process that carries out an order. Iterating yields its reports; the last one is `Done` or `Failed`.

        async with LearningProcess(order, log) as reports:
            async for report in reports: ...

    On leaving, the process is asked to save and end, then killed. If the server dies, the process ends by itself.
    Raises `ProcessLost` while iterating if it ends without a last report. `log` gets what libraries print.
    """

    def __init__(self, order: Order, log: Path) -> None:
        self.order = order
        self.log = log
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = process = await _start(stdin=PIPE, stderr=log.fileno())
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self.order) + b"\n")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(_drained(process), STOP_SECONDS)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    def kill(self) -> None:
        """Ends the process at once, without a checkpoint."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    async def __aiter__(self) -> AsyncIterator[Report]:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if (report := _report_of(line)) is None:
                raise ProcessLost(await _killed(process))
            yield report
            if isinstance(report, Done | Failed):
                return
        raise ProcessLost(await process.wait())


def public_text(text: str) -> str:
    """A report's text for a client: replaced as a whole if it seems to hold a path."""
    return "learning failed: the server's log has the reason" if _PATH.search(text) else text


async def _start(*arguments: str, stdin: int = DEVNULL, stderr: int = DEVNULL) -> Process:
    """Starts the module in a session of its own, so that Ctrl-C reaches only the server."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # not from a folder that happens to be the current one
        "-m",
        MODULE,
        *arguments,
        stdin=stdin,
        stdout=PIPE,
        stderr=stderr,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )


ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
"""The process computes on one thread that never spins: the others belong to the engine, and the bits stay the same."""


def _report_of(line: bytes) -> Report | None:
    """The report in a line; None for anything else."""
    with suppress(ValueError):  # msgspec's errors, and UnicodeDecodeError
        report: Report = msgspec.json.decode(line, type=Report)
        return report
    return None


async def _drained(process: Process) -> None:
    """Reads what is left of the output, so that the process is not blocked by a full pipe, until it ends."""
    assert process.stdout is not None
    while await process.stdout.read(1 << 16):
        pass
    await process.wait()


async def _killed(process: Process) -> int:
    with suppress(ProcessLookupError):
        process.kill()
    return await process.wait()
