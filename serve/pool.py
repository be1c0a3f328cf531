"""Which picture is next, and how much work is accepted: the queue in front of one engine thread.

    generation = pool.submit(tenant, request, partials=2)        raises ApiError, at no cost to the engine
    async for picture_event in generation:
        match picture_event.event:
            case Done(picture=picture): ...

A request enters picture by picture: picture i is a request of its own with the seed `seed + i`. Tenants take turns,
picture by picture; within a tenant it is first come, first served. Only as many pictures as the engine has slots, and a
few more, are handed to it, so that fairness and cancelling act early. One tenant never has all slots of a server with
keys, so that another's picture starts at once. Work is measured in seconds of the engine, estimated from its own recent
speed.

Everything here runs on the event loop; each event costs constant time. Most steps are not even events,
as these would cost more than the rest of a request: the engine thread notes the number of the newest step, and the loop
counts them when something else happens, or somebody asks. Not covered: words, which the request brings along, and
pictures as files.
"""

import asyncio
import contextlib
import copy
import functools
import itertools
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias

import numpy as np

from oneword.engines.errors import OnewordError
from oneword.runtime.bundle import Manifest
from oneword.runtime.concept import Concept
from oneword.runtime.edit import Paste
from oneword.runtime.events import Latents, PictureDone
from oneword.runtime.request import Image, Request, ResolvedSettings, resolve
from oneword.serve.errors import ApiError, Busy, Forbidden, Invalid, Unavailable, from_oneword
from oneword.serve.keys import LOCAL, Tenant
from oneword.serve.settings import MAX_WAITS
from oneword.serve.worker import (
    Done,
    Failed,
    Lost,
    Partial,
    Preview,
    Started,
    State,
    Step,
    Ticket,
    Work,
    Worker,
    WorkerEvent,
    branch_pixels,
)

MAX_PARTIALS: Final = 3
_AHEAD: Final = 4  # pictures that the engine has beside those in slots: they are prepared while others run
_MAX_RESERVE: Final = 2  # slots that one tenant leaves to the others, at most a quarter of all
_MARGIN: Final = 0.1  # of `max_wait`, at most, that has to become free after a refusal
_MAX_SEED: Final = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Dropped:
    """The picture will not come: its deadline has passed, the server stops, or the engine thread has ended."""

    error: ApiError


GenerationEvent: TypeAlias = Step | Preview | Partial | Done | Failed | Dropped
"""Of the steps, those with a preview; a generation's `steps` and `progress` count all of them."""


@dataclass(frozen=True, eq=False)
class PictureEvent:
    """An event of picture `index` of a generation."""

    index: int
    event: GenerationEvent


class Outcome(StrEnum):
    """How a picture ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DROPPED = "dropped"


class Phase(StrEnum):
    """Where a picture is."""

    WAITING = "waiting"
    """The engine does not have it yet."""
    ENCODING = "encoding"
    """The engine has it, and no step is done."""
    DENOISING = "denoising"
    DECODING = "decoding"


class Observer(Protocol):
    """Is notified, on the event loop, of what a pool does; for metrics."""

    def refused(self, code: str) -> None:
        """A request was refused with this code of an ApiError."""

    def taken_up(self, seconds: float) -> None:
        """The engine took a picture up, so long after its request came."""

    def first_step(self, seconds: float) -> None:
        """A picture's first step is done, so long after its request came."""

    def ended(self, outcome: Outcome, phase: Phase) -> None:
        """A picture ended in this phase."""


class NoObserver:
    """Ignores everything."""

    def refused(self, code: str) -> None:
        """See Observer."""

    def taken_up(self, seconds: float) -> None:
        """See Observer."""

    def first_step(self, seconds: float) -> None:
        """See Observer."""

    def ended(self, outcome: Outcome, phase: Phase) -> None:
        """See Observer."""


@dataclass(eq=False)
class _Picture:
    """A picture that the engine has."""

    generation: "Generation"
    index: int
    ticket: Ticket | None = None
    step: int = 0
    steps: int = 0
    reported: int = 0
    """Steps that the engine's thread has reported; `step` of them are counted."""
    first_step: float = 0.0
    """When it reported the first one."""

    @property
    def phase(self) -> Phase:
        """Where it is."""
        if self.step == 0:
            return Phase.ENCODING
        return Phase.DENOISING if self.step < self.steps else Phase.DECODING


class Generation:
    """One request in the pool: an asynchronous iterator over the events of its pictures.

    It has one consumer, and ends after the last event of every picture, or when it is cancelled. A consumer that falls
    behind gets only the newest preview of each picture. As a context manager it is cancelled on exit, if it still runs.
    """

    def __init__(
        self,
        pool: "Pool",
        tenant: Tenant,
        request: Request,
        settings: ResolvedSettings,
        partials: int,
        label: object,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.tenant = tenant
        self.request = request
        self.settings = settings
        self.label = label
        """A label by which the caller finds it."""
        self.estimate: Latents | Image | None = None
        """The newest preview: latents [C, h, w], or decoded [H, W, 3]."""
        self.created = pool.clock()
        self.pictures: list[PictureDone | None] = [None] * request.num_images
        """The pictures that are ready, by index."""
        self.cancelled = False
        self.only_ends = False
        """Whether its consumer wants the last event of each picture only: others are then neither kept nor reported."""
        self.partial_steps = spread(partials, settings.schedule.steps)
        self._pool = pool
        # By picture: branch pixels that are done after step i, all of them, and all of its work but for the prompts.
        self._done_work = np.concatenate([[0], np.cumsum(branch_pixels(settings))])
        self._branch_pixels = int(self._done_work[-1])
        pixels, estimates = settings.width * settings.height, _estimates(self, pool.manifest)
        self._picture_work = Work(self._branch_pixels, pixels, pixels * estimates)
        self.chunks = len(settings.texts)
        """Number of chunks of the prompts: one per text until `price` counts them."""
        self._shared_work = Work(pixels=0 if request.image is None else pixels, chunks=self.chunks)
        """For all pictures together, to encode the prompts and the given picture; none after the first step of one."""
        self._next_index = 0
        self._running: dict[int, _Picture] = {}
        self._left = request.num_images
        self._work_done = 0
        self._unread: OrderedDict[tuple[int, str], PictureEvent] = OrderedDict()
        self.news = asyncio.Event()
        """Set when there is something to read or nothing more will come; several generations may share one."""
        self.taken = False
        """Whether the engine has got one of its pictures."""
        self._timer: asyncio.TimerHandle | None = None
        self._together: Sequence[Generation] = ()
        """Those that entered with it, until its timer ends."""

    async def __aiter__(self) -> AsyncIterator[PictureEvent]:
        while True:
            while (event := self.read()) is not None:
                yield event
            if self.done:
                return
            self.news.clear()
            await self.news.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    @property
    def done(self) -> bool:
        """Whether nothing more will happen."""
        return self._left == 0

    @property
    def waiting(self) -> int:
        """Pictures that the engine does not have yet."""
        return 0 if self.done else self.request.num_images - self._next_index

    @property
    def steps(self) -> tuple[int, int]:
        """The steps of the oldest picture in progress that are done, and all of its steps."""
        return next((picture.step for picture in self._running.values()), 0), self.settings.schedule.steps

    @property
    def _pixel_steps(self) -> int:
        """Of one picture."""
        return len(self.settings.schedule) * self.settings.width * self.settings.height

    @property
    def progress(self) -> float:
        """The part of its denoising that is done, 0 to 1."""
        return self._work_done / (self._branch_pixels * self.request.num_images)

    @property
    def position(self) -> int:
        """How many waiting pictures are handed to the engine before its next one; 0 if none of its pictures waits."""
        return self._pool.position(self)

    @property
    def seconds_left(self) -> float:
        """Estimated seconds until its last picture is ready."""
        return self._pool.seconds_left(self)

    def read(self) -> PictureEvent | None:
        """Takes the oldest event that was not read, None if there is none."""
        return self._unread.popitem(last=False)[1] if self._unread else None

    async def wait(self) -> list[PictureDone]:
        """All pictures as the engine makes them, by index. Raises the ApiError of the first one that fails, and cancels
        the others."""
        self.only_ends = True
        with self:
            async for picture_event in self:
                match picture_event.event:
                    case Failed(error=error):
                        raise from_oneword(error)
                    case Dropped(error=refusal):
                        raise refusal
        return [picture for picture in self.pictures if picture is not None]

    def pasted(self, image: Image) -> Image:
        """A picture that the engine has made, or an estimate of it, pasted into the original of a masked edit. The
        engine's thread does not do it: call it in another one."""
        return image if self._paste is None else self._paste.pasted(image)

    @functools.cached_property
    def _paste(self) -> Paste | None:
        return Paste.of(self.request, self.settings)

    def cancel(self) -> None:
        """Drops what waits, and frees the engine of what runs at the end of its running call. Idempotent."""
        self._pool.cancel(self)

    def price(self) -> None:
        """Counts the chunks of the prompts with the words that the request has now, before it enters: call it in a
        thread if they are long. Raises ApiError for a malformed prompt."""
        words = self.request.words or {}
        try:
            self.chunks = sum(self._pool.chunks(text, words) for text in self.settings.texts)
        except OnewordError as error:
            raise from_oneword(error) from None
        self._shared_work = replace(self._shared_work, chunks=self.chunks)

    def _branch_pixels_left(self, step: int) -> int:
        """Of one picture after so many steps."""
        return self._branch_pixels - int(self._done_work[step])

    @property
    def _work_left(self) -> Work:
        """Of all pictures."""
        done = Work(self._branch_pixels * (self.request.num_images - self._left) - self._work_done)
        return self._picture_work * self._left + self._shared_work + done

    def _push(self, index: int, event: GenerationEvent) -> None:
        if self.only_ends and isinstance(event, Step | Preview | Partial):
            return
        kind = f"partial {event.step}" if isinstance(event, Partial) else type(event).__name__
        self._unread.pop((index, kind), None)
        self._unread[index, kind] = PictureEvent(index, event)
        self.news.set()


@dataclass(eq=False)
class _Account:
    """A tenant's generations and its share of the work."""

    generations: OrderedDict[str, Generation] = field(default_factory=OrderedDict)
    """All that are not done, by id."""
    waiting: OrderedDict[str, Generation] = field(default_factory=OrderedDict)
    """Those with pictures that the engine does not have yet."""
    work: Work = field(default_factory=Work)
    needing_slots: int = 0


class Pool:
    """The queue in front of one worker."""

    def __init__(
        self,
        worker: Worker,
        manifest: Manifest,
        *,
        max_wait: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
        chunks: Callable[[str, Mapping[str, Concept]], int] = lambda text, words: 1,
    ) -> None:
        """`max_wait` is how many seconds of work may be queued, `chunks` how many chunks a text with these words is
        encoded in."""
        self.worker, self.manifest, self.max_wait, self.clock, self.chunks = worker, manifest, max_wait, clock, chunks
        self.observer: Observer = NoObserver() if observer is None else observer
        self.draining = False
        self._work = Work()
        self._accounts: dict[str, _Account] = {}
        self._turns: OrderedDict[str, None] = OrderedDict()
        """Tenants with waiting pictures, the next one first."""
        self._handed = 0  # pictures that the engine has
        self._needing_slots: dict[_Picture, None] = {}
        """Those of them that are not fully denoised, the oldest first."""
        self._budgets: dict[str, _Budget] = {}
        self._refused: dict[str, float] = {}
        """Seconds of work that there was no room for when a tenant was last refused, at most a margin."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: deque[tuple[_Picture, WorkerEvent, float]] = deque()
        """Events with the time when the engine's thread reported them."""
        self._stepped = False
        """Whether the engine's thread has reported steps that are not counted."""
        self._woken = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._hurry = asyncio.Event()

    def submit(
        self,
        tenant: Tenant,
        request: Request,
        settings: ResolvedSettings | None = None,
        *,
        partials: int = 0,
        deadline: float | None = None,
        label: object = None,
    ) -> Generation:
        """Queues a request, at once. `settings` are those of `resolve`, if they are known. If the engine has none of
        its pictures `deadline` seconds from now, they are dropped.

        Raises Unavailable if the server starts or stops, Invalid for a request that this model cannot fulfil, Busy if
        the tenant has used up its quota, or if the work would take more than `max_wait` seconds, in its turn. A server
        without work takes requests of up to ten times as many seconds; Invalid for a larger one.
        """
        generation = self.prepared(tenant, request, settings, partials=partials, label=label)
        generation.price()
        self.enter(generation, deadline=deadline)
        return generation

    def prepared(
        self,
        tenant: Tenant,
        request: Request,
        settings: ResolvedSettings | None = None,
        *,
        partials: int = 0,
        label: object = None,
        beside: Sequence[Generation] = (),
    ) -> Generation:
        """The generation of a request that there is room for now, `beside` others that will enter with it, for `enter`.
        Raises as `submit`, but for quotas."""
        with self.refusals():
            self._read_inbox()
            self._check_ready()
            if not 0 <= partials <= MAX_PARTIALS:
                raise Invalid(f"partials is {partials}, but must be 0 to {MAX_PARTIALS}")
            if request.seed + request.num_images - 1 > _MAX_SEED:
                raise Invalid(
                    f"seed is {request.seed}, but must be at most {_MAX_SEED - request.num_images + 1} for "
                    f"{request.num_images} pictures"
                )
            if settings is None:
                self._check_wait(tenant, 0.0)  # a full queue refuses a request before it is resolved
                settings = resolved(request, self.manifest)
            generation = Generation(self, tenant, request, settings, partials, label)
            self._check_room(*beside, generation)
            return generation

    def enter(self, *generations: Generation, deadline: float | None = None) -> None:
        """Queues generations of one tenant that were `prepared`, all or none. Their requests may have got other
        words, and pictures of the same size, since; `Generation.price` comes after that. If the engine has no picture
        of any of them `deadline` seconds from now, all are dropped. Raises as `submit`."""
        with self.refusals():
            self._read_inbox()
            self._check_ready()
            self._check_room(*generations)
            self._spend(*generations)
        loop = asyncio.get_running_loop()
        now = loop.time()
        for generation in generations:
            self._enter(generation)
            if deadline is not None:  # the same moment for all
                generation._timer = loop.call_at(now + deadline, self._expire, generation, deadline)
                generation._together = generations
        self._read_inbox()  # a step that freed a slot did not wake the loop up if nothing waited so far
        self._hand_over()

    def check(self, tenant: Tenant) -> None:
        """Raises what `submit` would for any request, before it is known: Unavailable, and Busy if there is no room, or
        if the tenant was refused and there is still no room for as much. That may refuse a smaller request than the one
        before; else each one that just fits would have to be read while larger ones never found room."""
        with self.refusals():
            self._read_inbox()
            self._check_ready()
            self._check_wait(tenant, self._refused.get(tenant.name, 0.0))
            self._refused.pop(tenant.name, None)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Reports the ApiError that the block raises."""
        try:
            yield
        except ApiError as error:
            self.observer.refused(error.code)
            raise

    @property
    def queued_seconds(self) -> float:
        """Estimated seconds of work that were accepted and are not done."""
        self._read_inbox()
        return self._queued_seconds

    @property
    def _queued_seconds(self) -> float:
        """The same as of the last event that was read."""
        return self._seconds(self._work)

    @property
    def running(self) -> int:
        """Pictures that the engine has."""
        return self._handed

    @property
    def waiting(self) -> int:
        """Pictures that the engine does not have yet."""
        return sum(generation.waiting for account in self._accounts.values() for generation in account.waiting.values())

    def generations(self, tenant: Tenant) -> list[Generation]:
        """A tenant's generations that are not done, oldest first."""
        self._read_inbox()
        account = self._accounts.get(tenant.name)
        return [] if account is None else [*account.generations.values()]

    async def drain(self, seconds: float | None = None) -> None:
        """Takes no more requests, and returns when nothing runs. With a limit, what is not ready after `seconds` is
        dropped, with an Unavailable event; a second call drops it at once."""
        if self.draining:
            self._hurry.set()
        self.draining = True
        waits = [asyncio.ensure_future(event.wait()) for event in (self._empty, self._hurry)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._drop_all(Unavailable("the server stops, and the picture was not ready in time: send the request again"))

    def cancel(self, generation: Generation) -> None:
        """See Generation.cancel."""
        if generation.done:
            return
        generation.cancelled = True
        self._refund(generation)
        self._drop_waiting(generation, Outcome.CANCELLED)
        for picture in [*generation._running.values()]:
            if picture.ticket is not None:
                self.worker.cancel(picture.ticket)
            self._finish(picture, Outcome.CANCELLED)
        generation._unread.clear()
        generation.news.set()
        self._hand_over()

    def position(self, generation: Generation) -> int:
        """See Generation.position."""
        if not generation.waiting:
            return 0
        line = self._accounts[generation.tenant.name].waiting.values()
        ahead = 0
        for earlier in line:
            if earlier is generation:
                break
            ahead += earlier.waiting
        total, passed = ahead, False
        for name in self._turns:  # a tenant that is earlier in the round gets one more turn
            if name == generation.tenant.name:
                passed = True
            else:
                pictures = sum(other.waiting for other in self._accounts[name].waiting.values())
                total += min(pictures, ahead + (not passed))
        return total

    def seconds_left(self, generation: Generation) -> float:
        """See Generation.seconds_left."""
        if generation.done:
            return 0.0
        account = self._accounts[generation.tenant.name]
        work = Work()
        for earlier in account.generations.values():
            work += earlier._work_left
            if earlier is generation:
                break
        earlier_pictures = itertools.takewhile(
            lambda picture: picture.generation is not generation, self._needing_slots
        )
        before = 0.0 if generation._work_done else self._seconds_to_slot(sum(1 for _ in earlier_pictures))
        return min(self._queued_seconds, before + self._seconds(work) * len(self._accounts))

    def _seconds(self, work: Work) -> float:
        return self.worker.figures.seconds_for(work)

    def _check_ready(self) -> None:
        if self.draining:
            raise Unavailable("the server stops and takes no more requests: send it again in a few seconds", 5)
        if self.worker.state is State.STARTING:
            raise Unavailable("the server is still loading the model: try again in a few seconds", 5)
        if self.worker.state is not State.READY:
            raise Unavailable("the engine has stopped: the server starts again if it is supervised", 5)

    def _check_room(self, *generations: Generation) -> None:
        """Raises Invalid for a request that is too large, Busy if it would be done later than allowed."""
        tenant = generations[0].tenant
        seconds = self._seconds(sum((generation._work_left for generation in generations), Work()))
        if seconds > MAX_WAITS * self.max_wait:
            raise Invalid(
                f"this request would take {seconds:.0f} seconds, but may take at most {MAX_WAITS * self.max_wait:g}: "
                "ask for fewer steps, pixels, pictures or texts",
                code="too_much_work",
            )
        try:
            self._check_wait(tenant, seconds)
        except Busy:
            self._refused[tenant.name] = min(seconds, _MARGIN * self.max_wait)
            raise

    def _check_wait(self, tenant: Tenant, seconds: float) -> None:
        """Raises Busy if work of so many seconds, in its turn among the tenants, would be done later than allowed."""
        if not self._accounts:
            return
        account = self._accounts.get(tenant.name)
        before = 0.0 if account is None else self._seconds(account.work)
        tenants = len(self._accounts) + (account is None)
        wait = min(
            self._queued_seconds + seconds,
            self._seconds_to_slot(len(self._needing_slots)) + (before + seconds) * tenants,
        )
        if wait > self.max_wait:
            raise Busy(
                f"this request would be ready in {wait:.0f} seconds, but at most {self.max_wait:g} are allowed: "
                "try again later",
                min(wait - self.max_wait, self._queued_seconds),
            )

    def _seconds_to_slot(self, earlier: int) -> float:
        """Estimated seconds until a picture has a slot that `earlier` others get one before; rows share the engine
        evenly."""
        ahead = earlier - self.worker.slots
        if ahead < 0:
            return 0.0
        running = itertools.islice(self._needing_slots, self.worker.slots)
        left = sorted(picture.generation._branch_pixels_left(picture.step) for picture in running)
        longest = left[min(ahead, len(left) - 1)]
        return self._seconds(Work(sum(min(work, longest) for work in left)))

    def _spend(self, *generations: Generation) -> None:
        """Takes the request's pixel-steps from its tenant's budget. Raises Busy if there are not enough, Forbidden if
        there are never any."""
        tenant = generations[0].tenant
        limit = tenant.pixel_steps_per_minute
        if limit is None:
            return
        if limit == 0:
            raise Forbidden("this key may not generate pictures: ask this server's operator", code="quota_exceeded")
        budget = self._budgets.setdefault(tenant.name, _Budget(limit, self.clock()))
        budget.refill(limit, self.clock())
        cost = sum(generation._pixel_steps * generation.request.num_images for generation in generations)
        missing = min(cost, limit) - budget.left
        if missing > 0:
            raise Busy(
                f"this request has {cost} pixel-steps and {budget.left:.0f} of {limit} per minute are left: "
                "send it again later, or ask for fewer steps, pixels or pictures",
                60 * missing / limit,
                code="quota_exceeded",
            )
        budget.left -= cost

    def _enter(self, generation: Generation) -> None:
        account = self._accounts.setdefault(generation.tenant.name, _Account())
        account.generations[generation.id] = account.waiting[generation.id] = generation
        self._turns.setdefault(generation.tenant.name)
        self._count(generation, generation._work_left)
        self._empty.clear()
        self._loop = asyncio.get_running_loop()

    def _hand_over(self) -> None:
        """Hands pictures to the engine, the tenants in turn, while it has room."""
        limit = self.worker.slots + _AHEAD
        while len(self._needing_slots) < limit and self._handed < 2 * limit:
            # At most a few tenants can have all that one may have, so this looks at a few.
            name = next((name for name in self._turns if self._has_room(name)), None)
            if name is None:
                return
            del self._turns[name]
            account = self._accounts[name]
            generation = next(iter(account.waiting.values()))
            index = generation._next_index
            generation._next_index += 1
            generation.taken = True
            self._stop_timer(generation)
            if not generation.waiting:
                del account.waiting[generation.id]
            if account.waiting:
                self._turns[name] = None
            picture = _Picture(generation, index, steps=generation.settings.schedule.steps)
            generation._running[index] = picture
            self._handed += 1
            self._needing_slots[picture] = None
            account.needing_slots += 1
            picture.ticket = self.worker.submit(
                _single(generation.request, index),
                generation.partial_steps,
                partial(self._hear, picture),
                generation.settings,
                generation.chunks,
            )

    def _has_room(self, name: str) -> bool:
        """Whether a tenant may have one more of the slots."""
        account, slots = self._accounts[name], self.worker.slots
        reserve = min(_MAX_RESERVE, slots // 4)
        shared = next(iter(account.waiting.values())).tenant is not LOCAL  # who is the only tenant
        return not (shared and reserve) or account.needing_slots < slots - reserve

    def _free_slot(self, picture: _Picture) -> None:
        if picture in self._needing_slots:
            del self._needing_slots[picture]
            self._accounts[picture.generation.tenant.name].needing_slots -= 1

    def _hear(self, picture: _Picture, event: WorkerEvent) -> None:
        """On the engine thread: notes an event, and wakes the loop up if it must act on it now."""
        now = self.clock()
        match event:
            case Started():
                self._inbox.append((picture, event, now))
                return
            case Step(step=step, steps=steps, denoised=estimate):
                if picture.reported == 0:
                    picture.first_step = now
                picture.reported = step
                self._stepped = True
                if estimate is not None and picture.generation.only_ends:
                    picture.generation.estimate = estimate  # for callers that ask
                elif estimate is not None:
                    self._inbox.append((picture, event, now))
                    self._call_loop()
                if step == steps and self._turns:  # it frees a slot for a picture
                    self._call_loop()
            case Preview(image=image) if picture.generation.only_ends:
                picture.generation.estimate = image
            case _:
                self._inbox.append((picture, event, now))
                self._call_loop()

    def _call_loop(self) -> None:
        if self._woken or self._loop is None:
            return
        self._woken = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake_up)

    def _wake_up(self) -> None:
        self._woken = False  # before the inbox is read: an event that comes after this wakes the loop up again
        self._read_inbox()

    def _read_inbox(self) -> None:
        if not (self._inbox or self._stepped):
            return
        if self._stepped:
            self._stepped = False  # before they are counted: a step that comes after this is counted next time
            for picture in [*self._needing_slots]:
                self._advance(picture)
        while self._inbox:
            self._receive(*self._inbox.popleft())
        self._hand_over()

    def _receive(self, picture: _Picture, event: WorkerEvent, time: float) -> None:
        generation = picture.generation
        if generation._running.get(picture.index) is not picture:
            return  # it was cancelled
        self._advance(picture)
        match event:
            case Started():
                self.observer.taken_up(time - generation.created)
            case Step(denoised=estimate):
                generation.estimate = estimate
                generation._push(picture.index, event)
            case Partial():
                generation._push(picture.index, event)
            case Preview():
                generation.estimate = event.image
                generation._push(picture.index, event)
            case Done(picture=result):
                generation.pictures[picture.index] = result
                self._finish(picture, Outcome.DONE)
                generation._push(picture.index, event)
            case Failed():
                self._finish(picture, Outcome.FAILED)
                generation._push(picture.index, event)
            case Lost():
                self._drop_all(
                    Unavailable("the engine stopped before the picture was ready: send the request again", 5)
                )

    def _advance(self, picture: _Picture) -> None:
        """Counts the steps of a picture that the engine's thread has reported."""
        generation, before, step = picture.generation, picture.step, picture.reported
        if step == before:
            return
        if before == 0:
            self._count_encoded(generation)
            self.observer.first_step(picture.first_step - generation.created)
        done = int(generation._done_work[step] - generation._done_work[before])
        picture.step = step
        if picture.phase is Phase.DECODING:
            self._free_slot(picture)
        generation._work_done += done
        self._count(generation, Work(-done))

    def _finish(self, picture: _Picture, outcome: Outcome) -> None:
        """Forgets a picture that the engine has."""
        self.observer.ended(outcome, picture.phase)
        generation = picture.generation
        del generation._running[picture.index]
        self._handed -= 1
        self._free_slot(picture)
        picture.ticket = None  # which refers to the picture
        done = Work(int(generation._done_work[picture.step]))
        self._count(generation, done + generation._picture_work * -1)
        self._leave(generation, 1)

    def _drop_waiting(self, generation: Generation, outcome: Outcome, error: ApiError | None = None) -> None:
        """Removes a generation's waiting pictures, with an event for each if there is an error."""
        count = generation.waiting
        if not count:
            return
        account = self._accounts[generation.tenant.name]
        del account.waiting[generation.id]
        if not account.waiting:
            del self._turns[generation.tenant.name]
        self._stop_timer(generation)
        first = generation._next_index
        generation._next_index = generation.request.num_images
        self._count(generation, generation._picture_work * -count)
        self._leave(generation, count)
        for index in range(first, first + count):
            self.observer.ended(outcome, Phase.WAITING)
            if error is not None:
                generation._push(index, Dropped(error))

    def _leave(self, generation: Generation, pictures: int) -> None:
        """Counts pictures of a generation as over, and forgets it after the last one."""
        generation._left -= pictures
        if generation._left:
            return
        self._count_encoded(generation)
        account = self._accounts[generation.tenant.name]
        del account.generations[generation.id]
        if not account.generations:
            del self._accounts[generation.tenant.name]
        if not self._accounts:
            self._empty.set()

    def _expire(self, generation: Generation, deadline: float) -> None:
        begun = any(other.taken for other in generation._together)
        self._stop_timer(generation)
        if begun:
            return
        message = f"the engine did not get to this request within {deadline:g} seconds: send it again"
        error = Unavailable(message, self._queued_seconds, code="deadline_exceeded")
        self._refund(generation)
        self._drop_waiting(generation, Outcome.DROPPED, error)

    def _drop_all(self, error: ApiError) -> None:
        for account in [*self._accounts.values()]:
            for generation in [*account.generations.values()]:
                self._drop_waiting(generation, Outcome.DROPPED, error)
                for index, picture in [*generation._running.items()]:
                    if picture.ticket is not None:
                        self.worker.cancel(picture.ticket)
                    self._finish(picture, Outcome.DROPPED)
                    generation._push(index, Dropped(error))

    def _refund(self, generation: Generation) -> None:
        """Gives the pixel-steps of waiting pictures back to their tenant."""
        budget = self._budgets.get(generation.tenant.name)
        if budget is not None:
            budget.left += generation._pixel_steps * generation.waiting

    def _count_encoded(self, generation: Generation) -> None:
        """Counts what a generation's pictures share as encoded."""
        if generation._shared_work.chunks:
            self._count(generation, generation._shared_work * -1)
            generation._shared_work = Work()

    def _count(self, generation: Generation, work: Work) -> None:
        """Adds to the work that is not done."""
        self._work += work
        self._accounts[generation.tenant.name].work += work

    def _stop_timer(self, generation: Generation) -> None:
        if generation._timer is not None:
            generation._timer.cancel()
            generation._timer, generation._together = None, ()


@dataclass
class _Budget:
    """Pixel-steps that a tenant may still use, refilled evenly to a minute's worth; negative after a large request."""

    left: float
    time: float

    def refill(self, limit: int, now: float) -> None:
        self.left = min(limit, self.left + (now - self.time) * limit / 60)
        self.time = now


def resolved(request: Request, manifest: Manifest) -> ResolvedSettings:
    """The settings of `resolve`. Raises ApiError."""
    try:
        return resolve(request, manifest)
    except OnewordError as error:
        raise from_oneword(error) from None


def spread(partials: int, steps: int) -> frozenset[int]:
    """The steps after which to show so many partial pictures: evenly spread, before the last one, all different."""
    return frozenset(round(steps * i / (partials + 1)) for i in range(1, partials + 1)) & frozenset(range(1, steps))


def _estimates(generation: Generation, manifest: Manifest) -> int:
    """How many estimates of each picture are decoded, as partial pictures and as previews."""
    shown = generation.partial_steps
    if manifest.has_preview_decoder and generation.request.previews:
        steps = range(1, generation.settings.schedule.steps)
        shown |= {step for step in steps if generation.request.has_preview(step)}
    return len(shown)


def _single(request: Request, index: int) -> Request:
    """Picture `index` of a request as a request of its own, which is not pasted."""
    if request.num_images == 1 and not (request.mask is not None and request.paste):
        return request
    return replace_unchecked(request, num_images=1, seed=request.seed + index, paste=False)


def replace_unchecked(request: Request, **fields: Any) -> Request:
    """A request with other values of these fields, which are allowed: `replace` would check its prompts again, which
    takes milliseconds if they are long."""
    other = copy.copy(request)
    assert fields.keys() <= vars(other).keys()
    vars(other).update(fields)
    return other
