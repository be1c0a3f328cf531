"""Learning as jobs: accepted with pictures, queued, carried out by a process of its own, watched, cancelled, resumed.

    jobs = Jobs("~/words", Path("~/jobs"), "miniature", digest, keep=words.put)
    await jobs.start()
    job = await jobs.add("alice", pictures, "<toy>", "toy")
    async for event in jobs.events("alice", job.id): ...

A job's files are in the store, so that any server shows it (`oneword.serve.job_files`). The server that accepts a job
owns it and keeps it in its queue on local disk. A server that is started again continues its jobs; the jobs of one
that gives no sign of life for `lease_seconds` are taken over by another with the same model, or deleted if they were
not accepted yet. A job that no server has continued for `keep_seconds` is ended. An event is published once it is in
the store: readers on all servers see the same events with the same numbers.

Not covered: routes, drawing previews from snapshots, and quotas of words.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar

import msgspec

from oneword.engines.errors import ConceptError, OnewordError, one_line
from oneword.engines.files import write_whole
from oneword.runtime.concept import Concept, check_token, concept_of, read_safetensors
from oneword.serve import messages
from oneword.serve.containers import take_apart
from oneword.serve.errors import ApiError, Busy, Invalid, NotFound, NotInstalled, Unavailable, Unprocessable
from oneword.serve.files import open_files
from oneword.serve.job_files import (
    Cancelled,
    Damaged,
    Failed,
    JobFiles,
    JobRequest,
    Note,
    Progress,
    SnapshotSaved,
    State,
    Status,
    StoredEvent,
    WordSaved,
)
from oneword.serve.learning import LearningProcess, ProcessLost, public_text, recipe_of, require_installed
from oneword.serve.pictures import decode, encode
from oneword.serve.queue import Entry, Queue

P = ParamSpec("P")
T = TypeVar("T")

PICTURES = (3, 5)  # the fewest and the most
MIN_SIDE = 16  # as in oneword.train.pictures
MAX_SEED = 2**63 - 2  # as in oneword.train.learn
MAX_WAITING = 20  # jobs of one tenant
MAX_KEPT = 100  # jobs of one tenant, with those that have ended
CANCEL_SECONDS = 5.0  # that a request waits for a process to end
SWEEP_SECONDS = 3600.0  # between two looks for old jobs
MAX_LOST = 5  # processes in a row that end without progress
ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_ORIENTATION_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%c\0\0\0\0\0\0\0"
_INIT = re.compile(r"[\w'-]+([ ,]+[\w'-]+){0,7}")
_IDENTIFIER = re.compile(r"[0-9a-f]{32}")
_PICTURE_NAME = re.compile(r"[a-z0-9-]{1,64}\.(png|jpg|webp)")
_log = logging.getLogger("oneword.serve.jobs")
_ABANDONED = "the server that had it is gone, and no other one has continued it: send the pictures again"
_DAMAGED = "job %s is left alone: one of its files in the store is damaged"


@dataclass(frozen=True)
class Snapshot:
    """The word as it is after `step`, for drawing previews."""

    number: int
    step: int
    concept: Concept


@dataclass(frozen=True)
class Done:
    """The word is learned and in the store. The last event."""

    number: int
    concept: Concept


JobEvent: TypeAlias = Progress | Snapshot | Note | Done | Failed | Cancelled


@dataclass(frozen=True)
class Job:
    """A job as its tenant sees it. `position` is the number of jobs before it, None if another server has it.

    `snapshots` are the steps whose words are available, `word` is the learned word's identity. A cancelled job has
    neither pictures nor snapshots.
    """

    id: str
    tenant: str
    token: str
    init: str
    recipe: str
    steps: int
    seed: int
    created: float
    pictures: Sequence[str]
    status: Status
    step: int
    loss: float | None
    seconds_left: float | None
    position: int | None
    snapshots: Sequence[int]
    word: str | None
    error: str | None
    kind: str = "learn"


@dataclass
class _Owned:
    """A job of this server. `state` is what the store has; `changed` is set, and replaced, when it changes."""

    id: str
    term: int
    request: JobRequest
    state: State
    cancel: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    running: bool = False
    saving: bool = False
    taken_over: bool = False

    @property
    def tenant(self) -> str:
        return self.request.tenant


class Jobs:
    """The learning jobs of all tenants. Use it from one event loop; the store is read and written on threads.

    `store` is a folder or fsspec URL that all servers share, `folder` is this server's own, on local disk. `model` and
    `digest` are what words are learned on (`learning.check_model`), with those `encoders` that the bundle has. Without
    a model nothing is accepted and the folder is not used: other servers' jobs are shown, cancelled, and deleted when
    they are old. `keep` puts a learned word into its tenant's words, and replaces one of the same name only if asked
    to; it may be called twice with the same word, and an `ApiError` fails the job.

    Raises `UsageError` and `FileError` for a store or folder that cannot be used.
    """

    def __init__(
        self,
        store: str,
        folder: Path,
        model: str | None,
        digest: str = "",
        *,
        encoders: Sequence[str] = ("text_encoder",),
        keep: Callable[[str, Concept, bool], Awaitable[object]] | None = None,
        at_once: int = 1,
        lease_seconds: float = 15.0,
        keep_seconds: float = 7 * 86400.0,
        poll_seconds: float = 1.0,
        progress_seconds: float = 0.25,
        retry_seconds: float = 1.0,
        max_lost: int = MAX_LOST,
        checkpoint_every: int = 5,
    ) -> None:
        self._files = JobFiles(open_files(store))
        self._folder = folder.expanduser()
        self._model = model
        self._digest = digest
        self._encoders = tuple(encoders)
        self._keep = keep
        self._at_once = at_once
        self._lease_seconds = lease_seconds
        self._keep_seconds = keep_seconds
        self._poll_seconds = poll_seconds
        self._progress_seconds = progress_seconds
        self._retry_seconds = retry_seconds
        self._max_lost = max_lost
        self._checkpoint_every = checkpoint_every
        self._queue = Queue(None if model is None else self._folder)
        self._queue_thread = ThreadPoolExecutor(1, "jobs-queue")
        self._store_threads = ThreadPoolExecutor(8, "jobs-store")
        self._owned: dict[str, _Owned] = {}  # in the queue's order
        self._last_turns: dict[str, int] = {}  # of the tenants whose jobs were begun
        self._turns = itertools.count()
        self._admissions: dict[str, asyncio.Lock] = {}
        self._arriving: list[str] = []  # tenants of jobs that are being accepted
        self._added = asyncio.Event()
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._sightings: dict[str, tuple[str | None, float]] = {}
        self._owners: dict[str, str] = {}  # of other servers' open jobs
        self._abandoned: dict[str, float] = {}  # open jobs, and since when this server sees no other continue them

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Continues this server's jobs, and begins to accept and to take over others. Without a model, only deletes."""
        if self._model is None:
            self._tasks.append(asyncio.create_task(self._keep_clean()))
            return
        await self._beat()
        await self._recover()
        self._tasks += [asyncio.create_task(self._work()) for _ in range(self._at_once)]
        self._tasks.append(asyncio.create_task(self._keep_lease()))

    async def drain(self) -> None:
        """Accepts and begins no more jobs, and ends the learning processes, which save their runs. The jobs continue at
        another server, or when this one is started again; they are shown, and a request to cancel one is kept."""
        self._draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._owned.clear()
        if self._model is not None:
            with suppress(ApiError):
                await self._stored(self._files.write_beat, self._queue.server, "")

    async def stop(self) -> None:
        """As `drain`, and releases the folder."""
        await self.drain()
        self.close()

    def close(self) -> None:
        """Releases the folder, for another process. Enough if nothing was started."""
        self._store_threads.shutdown()
        self._queue_thread.shutdown()
        self._queue.close()

    @property
    def running(self) -> int:
        """The number of jobs that this server is learning now."""
        return sum(owned.running for owned in self._owned.values())

    @property
    def waiting(self) -> int:
        """The number of jobs in this server's queue."""
        return len(self._owned) - self.running

    # ---- what routes call --------------------------------------------------------------------------------------------

    def check_accepting(self) -> None:
        """Raises `NotInstalled` without PyTorch or a model, `Unavailable` once the server stops."""
        if self._draining:
            raise Unavailable("the server stops and learns no more words: send the request again in a few seconds", 5)
        require_installed()
        if self._model is None:
            raise NotInstalled(
                "this server cannot learn: start it with --model, the model its bundle was exported from"
            )

    async def add(
        self,
        tenant: str,
        images: Sequence[bytes],
        token: str,
        init: str = "object",
        recipe: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        *,
        replace: bool = False,
    ) -> Job:
        """Accepts a job and returns it, once it would survive the end of this process. Of the tenant's jobs that have
        ended, the oldest make room for it. With `replace`, the word may take the place of another.

        Raises as `check_accepting`, `Busy` if the tenant has too many jobs waiting, and `Invalid`, `Unprocessable` or
        `TooLarge` for an order that cannot be learned.
        """
        self.check_accepting()
        recipe, steps = recipe_of(recipe, steps)
        _check_words(token, init)
        if not 0 <= seed <= MAX_SEED:
            raise Invalid(f"seed is {seed}: give a whole number from 0 to {MAX_SEED}", "seed")
        self._check_room(tenant)
        self._arriving.append(tenant)
        try:
            pictures = await self._stored(learnable_pictures, images)
            created = time.time()
            identifier, names = new_identifier(created), tuple(pictures)
            model = self._digest, self._encoders
            request = JobRequest(tenant, token, init, recipe, steps, seed, names, *model, created, replace)
            return await self._accept(identifier, request, list(pictures.values()))
        finally:
            self._arriving.remove(tenant)

    async def _accept(self, identifier: str, request: JobRequest, pictures: Sequence[bytes]) -> Job:
        """Writes a new job to the store and to the queue, or leaves nothing of it."""
        state = State(self._queue.server, request.steps)
        try:
            await self._stored(self._files.create, identifier, request, pictures, state)
            await self._queued(self._queue.add, Entry(identifier, request.tenant, 1))
        except BaseException:
            with suppress(ApiError):
                await self._stored(self._files.delete, request.tenant, identifier)
            raise
        self._owned[identifier] = _Owned(identifier, 1, request, state)
        self._added.set()
        with suppress(ApiError):  # the job is accepted in any case
            await self._stored(self._files.delete_oldest, request.tenant, MAX_KEPT)
        return self._job(identifier, request, state)

    async def get(self, tenant: str, identifier: str) -> Job:
        """A tenant's job. Raises `NotFound`."""
        return self._job(identifier, *await self._read(tenant, identifier))

    async def list(self, tenant: str, limit: int = 100, before: str = "") -> list[Job]:
        """A tenant's newest jobs, the newest first; with `before`, those before that job. Leaves out damaged ones."""
        identifiers = await self._stored(self._files.identifiers, tenant)
        older = [identifier for identifier in reversed(identifiers) if not before or identifier < before]
        jobs: list[Job] = []
        for identifier in older:
            if len(jobs) == limit:
                break
            with suppress(NotFound, Damaged):  # just being written or deleted
                jobs.append(await self.get(tenant, identifier))
        return jobs

    def admission(self, tenant: str) -> asyncio.Lock:
        """To be held from a look at `open_tokens` until the job is added, so that the tenant's requests take turns."""
        return self._admissions.setdefault(tenant, asyncio.Lock())

    async def open_tokens(self, tenant: str) -> Sequence[str]:
        """The words of a tenant's jobs that have not ended, at any server."""
        unfinished = set(await self._stored(self._files.open_identifiers))
        tokens: list[str] = []
        for identifier in await self._stored(self._files.identifiers, tenant):
            if identifier in unfinished:
                with suppress(NotFound, Damaged):  # just being written or deleted
                    tokens.append((await self._read(tenant, identifier))[0].token)
        return tokens

    async def cancel(self, tenant: str, identifier: str) -> Job:
        """Cancels a job; one that has ended, or is saving its word, stays as it is. Raises `NotFound`.

        The job that is returned may still be running if another server has it.
        """
        await self._read(tenant, identifier)
        owned = self._owned.get(identifier)
        if owned is not None:
            await self._cancel(owned)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended(owned), CANCEL_SECONDS)
        if owned is None or owned.taken_over:
            await self._cancel_elsewhere(tenant, identifier)
        return await self.get(tenant, identifier)

    async def _cancel_elsewhere(self, tenant: str, identifier: str) -> None:
        """Asks the server that has a job to cancel it, or ends the job of one that gives no sign of life."""
        newest = await self._stored(self._files.newest, tenant, identifier)
        if newest is None or newest[1].status.ended:
            return
        term, state = newest
        if self._is_alive(state.owner, await self._stored(self._files.beats), time.monotonic()):
            await self._stored(self._files.request_cancel, identifier)
            newest = await self._stored(self._files.newest, tenant, identifier)
            if newest is None or newest[1].status.ended:  # meanwhile: nobody would delete the request
                await self._stored(self._files.close, identifier)
        elif await self._stored(self._files.take, tenant, identifier, term + 1, state.cancelled()):
            await self._stored(self._files.delete_pictures, tenant, identifier)
            await self._stored(self._files.close, identifier)

    async def events(self, tenant: str, identifier: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """What has happened since the event numbered `after`, then what happens, until the job has ended. `NotFound`.

        Of past progress only the last is repeated.
        """
        while True:
            owned = self._owned.get(identifier)
            changed = owned.changed if owned else None
            _, state = await self._read(tenant, identifier)
            for event in state.events:
                if event.number > after:
                    yield await self._public(tenant, identifier, event)
                    after = event.number
            if state.status.ended:
                return
            if changed is None:
                await asyncio.sleep(self._poll_seconds)
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), self._poll_seconds)

    async def snapshot(self, tenant: str, identifier: str, step: int) -> Concept:
        """The word as it was after `step`. Raises `NotFound`, also for a cancelled job."""
        await self._check_pictures(tenant, identifier)
        return await self._stored(self._files.snapshot, tenant, identifier, step)

    async def word(self, tenant: str, identifier: str) -> Concept:
        """The learned word, also if it could not be kept under its name. Raises `NotFound`."""
        await self._read(tenant, identifier)
        return await self._stored(self._files.word, tenant, identifier)

    async def picture(self, tenant: str, identifier: str, name: str) -> bytes:
        """A picture of a job: one that it learns from, or one that `write_picture` has added. Raises `NotFound`."""
        if not _PICTURE_NAME.fullmatch(name):
            raise NotFound("the job has no such picture")
        await self._read(tenant, identifier)
        return await self._stored(self._files.picture, tenant, identifier, name)

    async def write_picture(self, tenant: str, identifier: str, name: str, data: bytes) -> None:
        """Adds a picture, such as a preview, to a job, for all servers. Names are like `preview-5-0.jpg`."""
        if not _PICTURE_NAME.fullmatch(name) or name.startswith("picture-"):
            raise ValueError(f"{name!r} is not a name for a job's picture")
        await self._check_pictures(tenant, identifier)
        await self._stored(self._files.write_picture, tenant, identifier, name, data)

    async def _check_pictures(self, tenant: str, identifier: str) -> None:
        """Raises `NotFound` for a job that may have no pictures: they were deleted when it was cancelled."""
        if (await self._read(tenant, identifier))[1].status is Status.CANCELLED:
            raise NotFound("the job was cancelled, and its pictures were deleted")

    async def delete_old(self, now: float | None = None) -> int:
        """Deletes jobs that ended more than `keep_seconds` ago, pictures included, and this server's logs of them.
        Returns the number of jobs."""
        before = (time.time() if now is None else now) - self._keep_seconds
        await self._stored(_delete_logs, self._folder / "failed", before)
        return await self._stored(self._files.delete_ended, new_identifier(before), before)

    # ---- carrying out ------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Carries out this server's jobs, one after the other, the tenants in turn."""
        while True:
            owned = next(iter(self._line()), None)
            if owned is None:
                self._added.clear()
                await self._added.wait()
                continue
            owned.running = True
            self._last_turns[owned.tenant] = next(self._turns)
            try:
                await self._carry_out(owned)
            except _TakenOver:
                owned.taken_over = True
                await self._disown(owned)
            except Exception as error:  # so that the other jobs continue
                _log.error("job %s is tried again: %s", owned.id, type(error).__name__)
                await asyncio.sleep(self._retry_seconds)
            finally:
                owned.running = False

    def _line(self) -> Sequence[_Owned]:
        """The jobs that wait, in the order in which they are begun: a round has one job of each tenant, and starts with
        the tenant whose turn was longest ago."""
        rounds = Counter[str]()
        turns: dict[str, tuple[int, int]] = {}
        waiting = [owned for owned in self._owned.values() if not owned.running]
        for owned in waiting:
            turns[owned.id] = rounds[owned.tenant], self._last_turns.get(owned.tenant, -1)
            rounds[owned.tenant] += 1
        return sorted(waiting, key=lambda owned: turns[owned.id])

    async def _carry_out(self, owned: _Owned) -> None:
        """Learns a job's word, again and again if the process or the store fails, until the job has ended."""
        lost, wait, furthest = 0, self._retry_seconds, owned.state.step
        while True:
            try:
                await self._attempt(owned)
                return
            except ProcessLost as error:
                _log.warning("job %s: %s", owned.id, error)
                lost = 1 if owned.state.step > furthest else lost + 1
                furthest = max(furthest, owned.state.step)
                wait = self._retry_seconds
                if lost >= self._max_lost:
                    text = f"the learning process ended {lost} times without progress: the server may lack memory"
                    await self._end_surely(owned, owned.state.failed(text))
                    return
            except Damaged:
                self._leave(owned)
                return
            except NotFound:
                await self._end_surely(owned, owned.state.failed("its pictures are not in the store: send them again"))
                return
            except (ApiError, OnewordError, OSError) as error:  # the store, or the local disk
                _log.warning("job %s waits: %s", owned.id, type(error).__name__)
                wait = min(30.0, 2 * wait)
            if owned.cancel.is_set():  # the store cannot take the last state
                await asyncio.sleep(wait)
            with suppress(TimeoutError):
                await asyncio.wait_for(owned.cancel.wait(), wait)

    async def _attempt(self, owned: _Owned) -> None:
        """Learns until the word is saved, the order is refused, or the job is cancelled."""
        await self._check_term(owned)
        if owned.state.status.ended or owned.cancel.is_set():
            await self._end(owned, owned.state if owned.state.status.ended else owned.state.cancelled())
            return
        learning = asyncio.create_task(self._learn(owned))
        cancelled = asyncio.create_task(owned.cancel.wait())
        try:
            await asyncio.wait({learning, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            if owned.cancel.is_set() and not owned.saving and not learning.done():
                learning.cancel()
                await asyncio.gather(learning, return_exceptions=True)
                if owned.taken_over:
                    raise _TakenOver
                await self._end(owned, owned.state.cancelled())
            else:
                await learning
        finally:
            cancelled.cancel()
            learning.cancel()
            await asyncio.gather(learning, cancelled, return_exceptions=True)

    async def _learn(self, owned: _Owned) -> None:
        """Runs the process, and puts what it reports into the store."""
        folder, request = self._run_folder(owned.id), owned.request
        await self._stored(self._prepare, owned, folder)
        order = messages.Order(
            folder=str(folder.absolute()),
            model=self._model or "",
            digest=request.digest,
            token=request.token,
            init=request.init,
            recipe=request.recipe,
            steps=request.steps,
            seed=request.seed,
            encoders=request.encoders,
            snapshots=messages.snapshot_steps(request.steps),
            checkpoint_every=self._checkpoint_every,
        )
        state, pace, published, saved, last_read = owned.state, Pace(), 0.0, time.monotonic(), -1
        async with LearningProcess(order, folder / "learn.log") as reports:
            try:
                async for report in reports:
                    now, due = time.monotonic(), True
                    match report:
                        case messages.Started(machine):
                            state = _on_machine(state, machine)
                        case messages.Step(step, steps, loss):
                            last_read = step
                            state = state.after_progress(step, steps, loss, pace.seconds_left(step, steps, now))
                            due = now - published >= self._progress_seconds
                        case messages.Snapshot(step) if step in state.snapshots():
                            pass  # reported before
                        case messages.Snapshot(step, file):
                            data = await self._stored((folder / file).read_bytes)
                            await self._stored(self._files.write_snapshot, owned.tenant, owned.id, step, data)
                            state = state.after_snapshot(step)
                        case messages.Note(text):
                            state = state.after_note(public_text(text))
                        case messages.Done(file):
                            owned.saving = True
                            await self._finish(owned, state, await self._stored((folder / file).read_bytes))
                            return
                        case messages.Failed(error):
                            await self._end(owned, state.failed(public_text(error)))
                            return
                        case messages.Digest():
                            pass
                    if due:
                        await self._publish(owned, state)
                        published = now
                    if now - saved > 2 * self._lease_seconds:
                        await self._publish(owned, state)
                        save, run = self._files.save_checkpoint, folder / "run"
                        if await self._stored(save, owned.tenant, owned.id, run, last_read):
                            saved = now
            finally:
                owned.saving = False
                if owned.cancel.is_set():
                    reports.kill()

    async def _finish(self, owned: _Owned, state: State, data: bytes) -> None:
        """Puts the learned word into the store and its tenant's words, unless another server has the job, and may have
        cancelled it. Raises `_TakenOver` then."""
        await self._check_term(owned)
        concept = concept_of(*read_safetensors(data, "the word"), "the word")
        await self._stored(self._files.write_word, owned.tenant, owned.id, data)
        if self._keep is not None:
            try:
                await self._keep(owned.tenant, concept, owned.request.replace)
            except ApiError as error:
                if error.status >= 500:
                    raise
                where = f"GET /v1/jobs/{owned.id}/word returns the learned word"
                await self._end(owned, state.failed(f"{error.message} ({where})"))
                return
        await self._end(owned, state.succeeded(concept.identity))

    def _prepare(self, owned: _Owned, folder: Path) -> None:
        """Writes the job's pictures to local disk, and its checkpoint if another server had the job."""
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for name in owned.request.pictures:
            if not (folder / "pictures" / name).exists():
                write_whole(folder / "pictures" / name, self._files.picture(owned.tenant, owned.id, name))
        if owned.term > 1 and not (folder / "run").exists():
            self._files.load_checkpoint(owned.tenant, owned.id, folder / "run")

    async def _publish(self, owned: _Owned, state: State) -> None:
        """Writes a state to the store, then shows it to readers."""
        if state == owned.state:
            return
        await self._stored(self._files.write, owned.tenant, owned.id, owned.term, state)
        owned.state = state
        changed, owned.changed = owned.changed, asyncio.Event()
        changed.set()

    async def _end(self, owned: _Owned, state: State) -> None:
        """Publishes a job's last state and removes what this server has of it. Raises `_TakenOver`, at no cost to the
        new owner."""
        await self._check_term(owned)
        await self._publish(owned, state)
        if state.status is Status.CANCELLED:
            await self._stored(self._files.delete_pictures, owned.tenant, owned.id)
        await self._stored(self._files.close, owned.id)
        await self._disown(owned)

    async def _cancel(self, owned: _Owned) -> None:
        """Ends a job that waits, or leaves it to the server that has taken it over; asks for one that is carried out to
        be ended."""
        owned.cancel.set()
        if not owned.running:
            owned.running = True
            try:
                await self._end(owned, owned.state.cancelled())
            except _TakenOver:
                owned.taken_over = True
                await self._disown(owned)
            finally:
                owned.running = False

    async def _ended(self, owned: _Owned) -> None:
        """Returns once a job has ended here, or this server does not have it any more."""
        while self._owned.get(owned.id) is owned and not (owned.state.status.ended or owned.taken_over):
            await owned.changed.wait()

    async def _end_surely(self, owned: _Owned, state: State) -> None:
        """As `_end`, however long the store cannot be reached. Raises `Damaged`."""
        while True:
            try:
                await self._end(owned, state)
                return
            except Damaged:
                raise
            except ApiError:
                await asyncio.sleep(self._retry_seconds)

    async def _disown(self, owned: _Owned) -> None:
        """Removes a job from this server: it has ended, or another server has it."""
        folder = self._run_folder(owned.id)
        if owned.state.status is Status.FAILED:
            with suppress(OSError):
                (self._folder / "failed").mkdir(exist_ok=True)
                (folder / "learn.log").replace(self._folder / "failed" / f"{owned.id}.log")
        await self._stored(shutil.rmtree, folder, True)
        await self._queued(self._queue.remove, owned.id)
        self._owned.pop(owned.id, None)
        owned.changed.set()

    def _leave(self, owned: _Owned) -> None:
        """Leaves a damaged job until this server starts again, so that it does not stop the others."""
        _log.error(_DAMAGED, owned.id)
        self._owned.pop(owned.id, None)
        owned.changed.set()

    # ---- ownership ---------------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Finds this server's jobs: those in its queue, and those it had accepted when it died. Skips damaged ones."""
        seen = set[str]()
        for entry in await self._queued(self._queue.entries):
            seen.add(entry.id)
            with _skipped_if_damaged(entry.id):
                newest = await self._stored(self._files.newest, entry.tenant, entry.id)
                if newest is None or newest[0] != entry.term:
                    await self._queued(self._queue.remove, entry.id)
                else:
                    await self._adopt(entry.tenant, entry.id, *newest)
        for identifier in await self._stored(self._files.open_identifiers):
            if identifier not in seen:
                with _skipped_if_damaged(identifier):
                    await self._recover_accepted(identifier)
        wanted = {entry.id for entry in await self._queued(self._queue.entries)}
        runs = self._folder / "runs"
        for path in list(runs.iterdir()) if runs.is_dir() else []:
            if path.name not in wanted:
                await self._stored(shutil.rmtree, path, True)

    async def _recover_accepted(self, identifier: str) -> None:
        """Finds an open job that this server had accepted, but not put into its queue."""
        mark = await self._stored(self._files.open_job, identifier)
        if mark is None:
            return
        newest = await self._stored(self._files.newest, mark.tenant, identifier)
        if newest is None and mark.server == self._queue.server:  # never accepted: its client got no answer
            await self._stored(self._files.delete, mark.tenant, identifier)
        elif newest is not None and newest[1].owner == self._queue.server:
            await self._adopt(mark.tenant, identifier, *newest)

    async def _adopt(self, tenant: str, identifier: str, term: int, state: State) -> None:
        """Puts a job of which this server owns the newest term into its queue."""
        request = await self._stored(self._files.request, tenant, identifier)
        if request is None:
            return
        await self._queued(self._queue.add, Entry(identifier, tenant, term))
        self._owned[identifier] = _Owned(identifier, term, request, state)
        self._added.set()

    async def _keep_lease(self) -> None:
        """Gives signs of life, follows requests to cancel, takes over or ends dead servers' jobs, deletes old ones."""
        swept, renewed = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            try:
                await self._beat()
                late, renewed = time.monotonic() - renewed > self._lease_seconds, time.monotonic()
                requests = set(await self._stored(self._files.cancel_requests))
                for owned in list(self._owned.values()):
                    if late or owned.running:
                        await self._leave_if_taken_over(owned)
                    if owned.id in requests and owned.id in self._owned:
                        await self._cancel(owned)
                await self._take_over()
                if time.monotonic() - swept > SWEEP_SECONDS:
                    await self.delete_old()
                    swept = time.monotonic()
            except Exception as error:  # so that the lease is kept
                _log.warning("the jobs' store cannot be used: %s", type(error).__name__)

    async def _keep_clean(self) -> None:
        """Ends dead servers' jobs and deletes old ones, without signs of life of its own."""
        while True:
            try:
                await self._take_over()
                await self.delete_old()
            except Exception as error:
                _log.warning("the jobs' store cannot be used: %s", type(error).__name__)
            await asyncio.sleep(SWEEP_SECONDS)

    async def _beat(self) -> None:
        await self._stored(self._files.write_beat, self._queue.server, secrets.token_hex(8))

    async def _take_over(self) -> None:
        """Begins a new term for every open job whose owner is dead, or ends it if no server can continue it."""
        beats = await self._stored(self._files.beats)
        now = time.monotonic()
        unfinished = set(await self._stored(self._files.open_identifiers)) - set(self._owned)
        self._owners = {identifier: owner for identifier, owner in self._owners.items() if identifier in unfinished}
        self._abandoned = {identifier: at for identifier, at in self._abandoned.items() if identifier in unfinished}
        for identifier in sorted(unfinished):
            if not ((owner := self._owners.get(identifier)) and self._is_alive(owner, beats, now)):
                try:
                    await self._take_over_job(identifier, beats, now)
                except Damaged:  # as its own server has logged, or will when it starts
                    await self._end_damaged(identifier, beats, now)
        for server in set(beats) - {self._queue.server, *self._owners.values()}:
            if not self._is_alive(server, beats, now):
                await self._stored(self._files.forget_server, server)

    async def _take_over_job(self, identifier: str, beats: dict[str, str], now: float) -> None:
        """Begins a new term for an open job if its owner is dead and this server has its model. Deletes it if nobody
        has accepted it, and ends it if no server has continued it for long."""
        mark = await self._stored(self._files.open_job, identifier)
        if mark is None:
            return
        newest = await self._stored(self._files.newest, mark.tenant, identifier)
        owner = mark.server if newest is None else newest[1].owner
        mine = owner == self._queue.server  # and not in its queue: just being accepted, or left over from that
        if not mine and self._is_continued(identifier, owner, beats, now):
            return
        if newest is None:
            if not mine or await self._is_abandoned(identifier, mark.tenant, owner, now):  # its client got no answer
                ended = State(self._queue.server, 0).failed(_ABANDONED)
                await self._stored(self._files.delete_unaccepted, mark.tenant, identifier, ended)
            return
        request = await self._stored(self._files.request, mark.tenant, identifier)
        if not mine and self._model is not None and request is not None and request.digest == self._digest:
            await self._begin_term(mark.tenant, identifier, *newest)
        elif await self._is_abandoned(identifier, mark.tenant, owner, now):
            await self._end_abandoned(mark.tenant, identifier, *newest)

    async def _begin_term(self, tenant: str, identifier: str, term: int, state: State) -> None:
        """Makes another server's job, which is in a term and state, this server's."""
        taken = msgspec.structs.replace(state, owner=self._queue.server)
        if await self._stored(self._files.take, tenant, identifier, term + 1, taken):
            _log.info("job %s: taken over", identifier)
            self._owners.pop(identifier)
            await self._adopt(tenant, identifier, term + 1, taken)

    async def _end_abandoned(self, tenant: str, identifier: str, term: int, state: State) -> None:
        """Ends a job that no server continues, which is in a term and state."""
        failed = state.failed(_ABANDONED)
        if state.status.ended or await self._stored(self._files.take, tenant, identifier, term + 1, failed):
            _log.warning("job %s: ended, as no server has continued it", identifier)
            await self._stored(self._files.close, identifier)

    async def _end_damaged(self, identifier: str, beats: dict[str, str], now: float) -> None:
        """Ends an open job with a damaged file if no server has continued it for long. Its owner may be unknown."""
        tenant, owner = None, self._owners.get(identifier)
        with suppress(Damaged):
            mark = await self._stored(self._files.open_job, identifier)
            if mark is None:
                return
            tenant, owner = mark.tenant, owner or mark.server
        if owner not in (None, self._queue.server) and self._is_continued(identifier, owner, beats, now):
            return
        if await self._is_abandoned(identifier, tenant, owner, now):
            _log.error("job %s: ended, as one of its files in the store is damaged", identifier)
            await self._stored(self._files.close, identifier)

    def _is_continued(self, identifier: str, owner: str, beats: dict[str, str], now: float) -> bool:
        """Whether an open job's owner, another server, is alive; notes the owner."""
        self._owners[identifier] = owner
        if self._is_alive(owner, beats, now):
            self._abandoned.pop(identifier, None)
            return True
        return False

    async def _is_abandoned(self, identifier: str, tenant: str | None, owner: str | None, now: float) -> bool:
        """Whether no server has continued an open job for `keep_seconds`, by the times of its files and of its owner's
        sign of life, and another server that could take it over has had the time to."""
        since = self._abandoned.setdefault(identifier, now)
        if now - since <= 2 * self._lease_seconds:
            return False
        server = None if owner == self._queue.server else owner  # this one is alive and does not continue it
        last = await self._stored(self._files.last_sign, identifier, tenant, server)
        return last < time.time() - self._keep_seconds

    def _is_alive(self, server: str, beats: dict[str, str], now: float) -> bool:
        """Whether a server has changed its sign of life within the lease, as seen by this server's clock."""
        beat = beats.get(server)
        if beat == "":  # it has stopped
            return False
        last, since = self._sightings.get(server, (None, None))
        if since is None or beat != last:
            self._sightings[server] = (beat, now)
            return True
        return now - since < self._lease_seconds

    async def _check_term(self, owned: _Owned) -> None:
        """Raises `_TakenOver` if another server has the job, as after a long pause of this one."""
        newest = await self._stored(self._files.newest, owned.tenant, owned.id)
        if newest is None or newest[0] != owned.term:
            raise _TakenOver

    async def _leave_if_taken_over(self, owned: _Owned) -> None:
        """Stops working on a job that another server has."""
        try:
            await self._check_term(owned)
        except _TakenOver:
            owned.taken_over = True
            owned.cancel.set()
            if not owned.running:
                await self._disown(owned)
        except Damaged:
            if not owned.running:  # else it finds out itself
                self._leave(owned)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    async def _read(self, tenant: str, identifier: str) -> tuple[JobRequest, State]:
        """A job's request and newest state, from memory if this server owns it. Raises `NotFound`."""
        if not _IDENTIFIER.fullmatch(identifier):
            raise NotFound(f"there is no job {identifier[:80]!r}: GET /v1/jobs lists yours", "id")
        if (owned := self._owned.get(identifier)) and owned.tenant == tenant:
            return owned.request, owned.state
        request = await self._stored(self._files.request, tenant, identifier)
        newest = None if request is None else await self._stored(self._files.newest, tenant, identifier)
        if request is None or newest is None:
            raise NotFound(f"there is no job {identifier[:80]!r}: GET /v1/jobs lists yours", "id")
        return request, newest[1]

    async def _public(self, tenant: str, identifier: str, event: StoredEvent) -> JobEvent:
        match event:
            case SnapshotSaved(number, step):
                return Snapshot(number, step, await self._stored(self._files.snapshot, tenant, identifier, step))
            case WordSaved(number, _):
                return Done(number, await self._stored(self._files.word, tenant, identifier))
            case _:
                return event

    def _job(self, identifier: str, request: JobRequest, state: State) -> Job:
        line = [*(owned for owned in self._owned.values() if owned.running), *self._line()]
        position = next((place for place, owned in enumerate(line) if owned.id == identifier), None)
        return Job(
            id=identifier,
            tenant=request.tenant,
            token=request.token,
            init=request.init,
            recipe=request.recipe,
            steps=state.steps,
            seed=request.seed,
            created=request.created,
            pictures=() if state.status is Status.CANCELLED else request.pictures,
            status=state.status,
            step=state.step,
            loss=state.loss,
            seconds_left=state.seconds_left,
            position=None if state.status.ended else position,
            snapshots=() if state.status is Status.CANCELLED else state.snapshots(),
            word=state.identity,
            error=state.error,
        )

    def _check_room(self, tenant: str) -> None:
        waiting = sum(owned.tenant == tenant for owned in self._owned.values()) + self._arriving.count(tenant)
        if waiting >= MAX_WAITING:
            raise Busy(f"{waiting} of your words are waiting to be learned: try again when one is done", 30)

    def _run_folder(self, identifier: str) -> Path:
        return self._folder / "runs" / identifier

    async def _stored(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function of the store on a thread."""
        return await _finished_on(self._store_threads, lambda: function(*args, **kwargs))

    async def _queued(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function of the queue on its thread."""
        return await _finished_on(self._queue_thread, lambda: function(*args, **kwargs))


class Pace:
    """Estimates the seconds left from the steps of one process, without its first, which prepares the others."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int, steps: int, now: float) -> float | None:
        """The estimate after `step` at the time `now`; None before two steps have been timed."""
        if step == 0:
            return None
        if self._first is None:
            self._first = (step, now)
        first, since = self._first
        if step == first:
            return None
        return (now - since) / (step - first) * (steps - step)


def learnable_pictures(images: Sequence[bytes]) -> dict[str, bytes]:
    """Checks pictures to learn from. Returns the files that are kept, without metadata, under names of our own.

    Raises `Invalid` for their number, `TooLarge` and `Unprocessable` for a picture that cannot be used.
    """
    fewest, most = PICTURES
    if not fewest <= len(images) <= most:
        raise Invalid(f"{len(images)} pictures were sent: send {fewest} to {most} of the same thing", "image")
    pictures: dict[str, bytes] = {}
    for number, data in enumerate(images, start=1):
        ending, clean = _without_metadata(data, f"picture {number}")
        pictures[f"picture-{number}.{ending}"] = clean
    return pictures


def new_identifier(created: float) -> str:
    """A job's id: 32 hex digits that sort by time and cannot be guessed."""
    return f"{max(0, int(created * 1000)):012x}{secrets.token_hex(10)}"


@contextmanager
def _skipped_if_damaged(identifier: str) -> Iterator[None]:
    """Logs that a job's file is damaged, instead of raising `Damaged`, so that it does not stop the others."""
    try:
        yield
    except Damaged:
        _log.error(_DAMAGED, identifier)


async def _finished_on(threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    """The result of a call on a thread. A caller that is cancelled waits for it, so that writes keep their order."""
    future = asyncio.get_running_loop().run_in_executor(threads, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        future.exception()  # retrieved, so that asyncio does not report it
        raise


def _delete_logs(folder: Path, before: float) -> None:
    """Deletes the logs in a folder, which need not exist, that were written before a time."""
    for path in folder.glob("*.log"):
        if path.stat().st_mtime < before:
            path.unlink()


class _TakenOver(Exception):
    """Another server owns the job."""


def _without_metadata(data: bytes, name: str) -> tuple[str, bytes]:
    """A picture's ending and file, with no metadata but its orientation. Raises what `decode` does."""
    image = decode(data, name)
    height, width, _ = image.shape
    if min(width, height) < MIN_SIDE:
        raise Unprocessable(
            f"{name} is {width}x{height}: too small to learn from, send at least {MIN_SIDE} pixels per side", "image"
        )
    container = take_apart(data)
    if container.orientation == 1:
        return ENDINGS[container.format], container.file
    if container.format == "JPEG":
        exif = _ORIENTATION_EXIF % container.orientation
        segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
        return "jpg", container.file[:2] + segment + container.file[2:]
    return "png", encode(image, "png")


def _check_words(token: str, init: str) -> None:
    """Raises `Unprocessable` for a token, `Invalid` for an init, that is not a word. An init is never a file here."""
    try:
        check_token(token, "name")
    except ConceptError as error:
        raise Unprocessable(one_line(error), "name", "invalid_name") from error
    if len(init) > 100 or not _INIT.fullmatch(init):
        raise Invalid(f"init is {init[:80]!r}: give one word that roughly describes the pictures, such as toy", "init")


def _on_machine(state: State, machine: Mapping[str, str]) -> State:
    """The state of a job that is learned on a machine; noted if an earlier part was learned on a different one."""
    differing = [name for name, fact in machine.items() if state.machine and state.machine.get(name) != fact]
    if differing:
        changes = ", ".join(f"{name} was {state.machine.get(name)} and is {machine[name]}" for name in differing)
        state = state.after_note(f"continued on a different machine ({changes}): the last bits may differ")
    return msgspec.structs.replace(state, machine=machine, status=Status.RUNNING)
