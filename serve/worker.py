"""The engine thread, the only one that touches Model and Scheduler.

    worker = Worker(lambda: Model.open(bundle))
    worker.start()
    ticket = worker.submit(request, partial_steps, listener)
    worker.cancel(ticket)

Between two turns of the scheduler it takes all messages; without pictures in progress it waits for one. Events are
passed to a ticket's listener on the engine thread, so listeners must be quick and must not raise.

An unexpected exception ends the thread: the state is then `failed` and every listener gets `Lost`. The process should
end too, because the state after such an exception is unknown (`oneword.serve.watchdog`). Not covered: how much work is
accepted, and whose is next (`oneword.serve.pool`).
"""

import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import ShapeUse
from oneword.engines.errors import EngineError, OnewordError, UsageError, one_line, without_frames
from oneword.runtime.batched import CALLS
from oneword.runtime.events import Event, Latents, PictureDone, StepDone
from oneword.runtime.events import Failed as PictureFailed
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request, ResolvedSettings, resolve
from oneword.runtime.scheduler import MAX_ROWS, Scheduler
from oneword.serve.errors import log_failure
from oneword.serve.watchdog import Pulse

STAGES: Final = ("encode", "denoise", "decode", "partial")
"""The stages that the engine's time is divided into."""
_MEMORY_SECONDS: Final = 10.0  # of busy time, after which a measurement weighs 1/e
_PATIENCE: Final = 10.0  # times the expected seconds of a turn, before it counts as a hang
_WARM_UP_STEPS: Final = 3
_PARTIALS: Final = 2  # estimates decoded per turn at most, as every picture waits for them


class State(StrEnum):
    """What the engine thread is doing."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Started:
    """The scheduler has the picture: its prompts are encoded next, or it waits for a slot."""


@dataclass(frozen=True, eq=False)
class Step:
    """Step `step` of `steps` is done."""

    step: int
    steps: int
    denoised: Latents | None = None
    """The model's current estimate [C, h, w], where the request has a preview and the bundle no decoder for it."""


@dataclass(frozen=True, eq=False)
class Preview:
    """The estimate after step `step` of `steps`, where the request has a preview, decoded by the bundle's decoder for
    previews."""

    step: int
    steps: int
    image: Image


@dataclass(frozen=True, eq=False)
class Partial:
    """The estimate after this step, decoded."""

    step: int
    image: Image


@dataclass(frozen=True, eq=False)
class Done:
    """The picture is ready."""

    picture: PictureDone


@dataclass(frozen=True, eq=False)
class Failed:
    """The picture cannot be made."""

    error: OnewordError


@dataclass(frozen=True)
class Lost:
    """The engine thread ended before the picture was ready."""


WorkerEvent: TypeAlias = Started | Step | Preview | Partial | Done | Failed | Lost
Listener: TypeAlias = Callable[[WorkerEvent], None]


@dataclass(eq=False)
class Ticket:
    """One picture that was submitted."""

    request: Request
    partial_steps: frozenset[int]
    listener: Listener
    settings: ResolvedSettings | None = None
    cancelled: bool = False
    chunks: int = 0
    """Number of chunks of its prompts."""
    branch_pixels: Sequence[int] = ()
    """Of each step, once it was added."""
    id: int | None = None
    """The scheduler's."""


@dataclass(frozen=True)
class Turn:
    """Measurements of one turn."""

    rows: int
    """Pictures that were denoised."""
    seconds: Mapping[str, float]
    """By stage, of STAGES."""


@dataclass(frozen=True)
class Work:
    """An amount of work for the engine."""

    branch_pixels: int = 0
    """To denoise. A guided step has 2 x width x height branch pixels, an unguided one half of that."""
    pixels: int = 0
    """Of pictures to decode, and to encode for an edit."""
    estimates: int = 0
    """Pixels of partial pictures and previews to decode."""
    chunks: int = 0
    """Of prompts to encode."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.branch_pixels + other.branch_pixels,
            self.pixels + other.pixels,
            self.estimates + other.estimates,
            self.chunks + other.chunks,
        )

    def __mul__(self, count: int) -> "Work":
        return Work(self.branch_pixels * count, self.pixels * count, self.estimates * count, self.chunks * count)


@dataclass(frozen=True)
class WorkerFigures:
    """What the engine thread measured, as of its last turn."""

    rows: int = 0
    """Pictures with a slot."""
    waiting: int = 0
    """Pictures that the scheduler has and that have no slot: they wait for one, or to be decoded."""
    turns: int = 0
    seconds_per_branch_pixel: float = 0.0
    """To denoise, recently."""
    seconds_per_pixel: float = 0.0
    """To decode a picture and whatever else a picture takes, recently."""
    seconds_per_estimate: float = 0.0
    """Per pixel of a partial picture or preview that was requested, recently. Few of those that many rows request in
    the same turn are decoded."""
    seconds_per_chunk: float = 0.0
    """To encode a chunk of a prompt that is not cached, recently."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """So far, by stage, of STAGES."""
    words: int = 0
    """Learned words whose rows are in the embedding tables."""

    def seconds_for(self, work: Work) -> float:
        """How long so much work should take."""
        return (
            work.branch_pixels * self.seconds_per_branch_pixel
            + work.pixels * self.seconds_per_pixel
            + work.estimates * self.seconds_per_estimate
            + work.chunks * self.seconds_per_chunk
        )


@dataclass
class _Speed:
    """Seconds per unit of work, weighted towards recent seconds."""

    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        weight = math.exp(-seconds / _MEMORY_SECONDS)
        self.amount = weight * self.amount + amount
        self.seconds = weight * self.seconds + seconds

    @property
    def seconds_per_unit(self) -> float:
        """0 before the first measurement."""
        return self.seconds / self.amount if self.amount else 0.0


@dataclass(frozen=True, eq=False)
class _Cancel:
    ticket: Ticket


@dataclass(frozen=True)
class _Stop:
    cancel: bool


_Message: TypeAlias = Ticket | _Cancel | _Stop


class Worker:
    """The engine thread: opens the model, then generates what is submitted until `stop`."""

    def __init__(
        self,
        open_model: Callable[[], Model],
        *,
        max_rows: int = MAX_ROWS,
        sizes: Sequence[tuple[int, int]] = (),
        observer: Callable[[Turn], None] | None = None,
    ) -> None:
        """`open_model` runs on the engine thread. It is warmed up for pictures of these `sizes` (width, height), by
        default the bundle's. `observer` gets every turn's measurements, on the engine thread. Raises UsageError."""
        if max_rows < 1:
            raise UsageError(f"max_rows is {max_rows}, but must be 1 or more")
        self.max_rows = max_rows
        self.slots = max_rows
        """Pictures of the bundle's size that can share a step; fewer than `max_rows` if the engine has a limit."""
        self.state = State.STARTING
        self.backend = ""
        """What runs the graphs, with its version and precision, once it is open."""
        self.backend_reason = ""
        """Why `auto` chose it; empty if it was named."""
        self.failure = ""
        """Why the thread failed: one line, which may hold paths."""
        self.ready = threading.Event()
        self.figures = WorkerFigures()
        self.observer = observer
        self.last_turn = time.monotonic()
        """When the last turn ended, or when work arrived after an idle time."""
        self._open_model, self._sizes = open_model, tuple(sizes)
        self._thread = threading.Thread(target=self._run, name="oneword-engine", daemon=True)
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self._stopping = False  # nothing more is taken
        self._leaving = False  # the thread ends when nothing is in progress
        self._open: set[Ticket] = set()
        self._messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._due: dict[int, StepDone] = {}
        """Newest estimates to show as partial pictures, by the scheduler's id; those that wait longest come first."""
        self._due_previews: dict[int, StepDone] = {}
        """The same for previews, if the bundle has a decoder for them. Partial pictures come first."""
        self._denoising, self._decoding, self._estimating, self._encoding = _Speed(), _Speed(), _Speed(), _Speed()
        self._seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._turns = 0
        self._expected_seconds = 0.0

    def start(self) -> None:
        """Starts the thread and returns at once."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until the model is open and warm. Raises EngineError if it cannot be opened, or not in that time."""
        if not self._opened.wait(timeout):
            raise EngineError(f"the engine was not ready after {timeout:g} seconds")
        if self.state is not State.READY:
            raise EngineError(self.failure or "the engine was stopped")

    def submit(
        self,
        request: Request,
        partial_steps: frozenset[int],
        listener: Listener,
        settings: ResolvedSettings | None = None,
        chunks: int = 0,
    ) -> Ticket:
        """Queues one picture; never blocks. Its estimate is decoded after each of `partial_steps`.

        `settings` are those of `resolve`, if they are known, and `chunks` is how many its prompts are encoded in, for
        how long a turn may take. Raises UsageError for more than one picture.
        """
        if request.num_images != 1:
            raise UsageError(f"num_images is {request.num_images}, the worker takes single pictures")
        ticket = Ticket(request, partial_steps, listener, settings, chunks=chunks)
        with self._lock:
            alive = not self._stopping and self.state in (State.STARTING, State.READY)
            if alive:
                if not self._open:
                    self.last_turn = time.monotonic()
                self._open.add(ticket)
                self._messages.put(ticket)
        if not alive:
            listener(Lost())
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a picture at the end of the running turn; its listener gets no more events. Idempotent."""
        with self._lock:
            if ticket.cancelled or ticket not in self._open:
                return
            ticket.cancelled = True
            self._messages.put(_Cancel(ticket))

    def stop(self, cancel: bool = False) -> None:
        """Ends the thread once all pictures are ready, or with `cancel` at the end of the running turn."""
        with self._lock:
            self._stopping = True
            self._messages.put(_Stop(cancel))

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end of the thread; False if it still runs."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stalled(self, seconds: float) -> bool:
        """Whether pictures wait and no turn has ended for so long, and for ten times what this turn should take."""
        limit = max(seconds, _PATIENCE * self._expected_seconds)
        return self.state is State.READY and bool(self._open) and time.monotonic() - self.last_turn > limit

    def pulse(self, hang_seconds: float) -> Pulse:
        """The state for the watchdog."""
        if self.state is State.STARTING:
            return Pulse.STARTING
        if self.state is State.FAILED:
            return Pulse.FAILED
        return Pulse.HANGING if self.stalled(hang_seconds) else Pulse.WORKING

    def _run(self) -> None:
        try:
            scheduler = self._opened_scheduler()
            with self._lock:
                self.state = State.READY
                self.last_turn = time.monotonic()
            self.ready.set()
            self._opened.set()
            while self._take_messages(scheduler):
                self._turn(scheduler)
        except BaseException as error:
            if not (self.state is State.STARTING and isinstance(error, OnewordError)):  # which says what to do
                log_failure(error)
            self._end(State.FAILED, one_line(error))
        else:
            self._end(State.STOPPED, "")

    def _end(self, state: State, failure: str) -> None:
        with self._lock:
            self.state, self.failure = state, failure
            tickets = [ticket for ticket in self._open if not ticket.cancelled]
            self._open.clear()
        self._tickets.clear()
        self._due.clear()
        self._due_previews.clear()
        self.ready.clear()
        self._opened.set()
        for ticket in tickets:
            ticket.listener(Lost())

    def _opened_scheduler(self) -> Scheduler:
        """Opens the model, and draws a picture of each size to open the engines and to measure how fast they are."""
        model = self._open_model()
        scheduler = Scheduler(model, self.max_rows)
        defaults = model.manifest.defaults
        shape_use = model.engine("denoise_step").shape_use
        if model.stream.depth or shape_use is ShapeUse.PADDED:
            scheduler.warm(*self._sizes)
        elif shape_use is ShapeUse.ANY:
            scheduler.bind(*self._sizes)
        for size in self._sizes or [defaults.size]:
            request = Request("", size=size, steps=min(_WARM_UP_STEPS, defaults.steps))
            settings = resolve(request, model.manifest)
            scheduler.add(request, settings)
            seconds = []
            before, encoding = dict(scheduler.seconds), model.encoding_seconds
            while scheduler:
                start = scheduler.seconds["denoise"]
                for event in scheduler.step():
                    if isinstance(event, PictureFailed):
                        raise event.error
                seconds.append(scheduler.seconds["denoise"] - start)
            step = min(second for second in seconds if second)
            self._denoising.add(int(branch_pixels(settings).sum()) / len(settings.schedule), step)
            encode, decode = (scheduler.seconds[stage] - before[stage] for stage in ("encode", "decode"))
            pixels = settings.width * settings.height
            self._decoding.add(pixels, encode - (model.encoding_seconds - encoding) + decode)
            self._estimating.add(pixels, _preview_seconds(model, settings) if _has_decoder(model) else decode)
        encoding, chunks = model.encoding_seconds, model.encoded_chunks
        model.encode([model.tokenize("a")])  # with the encoders open, and nothing of it cached
        self._encoding.add(model.encoded_chunks - chunks, model.encoding_seconds - encoding)
        self.slots = scheduler.capacity(*model.manifest.defaults.size)
        self.backend, self.backend_reason = model.engine("denoise_step").backend, model.backend_reason
        self._publish(scheduler)
        return scheduler

    def _take_messages(self, scheduler: Scheduler) -> bool:
        """Takes all messages, waiting for one if nothing is in progress. False once the thread should end."""
        while scheduler or not self._leaving:
            try:
                self._take(scheduler, self._messages.get(block=not scheduler))
            except queue.Empty:
                return True
        return False

    def _take(self, scheduler: Scheduler, message: _Message) -> None:
        match message:
            case Ticket():
                self._add(scheduler, message)
            case _Cancel(ticket=ticket):
                if ticket.id in self._tickets:
                    scheduler.cancel(ticket.id)
                    self._close(ticket)
                    self._publish(scheduler)  # there may be no further turn
            case _Stop(cancel=cancel):
                self._leaving = True
                if cancel:
                    scheduler.cancel_all()

    def _add(self, scheduler: Scheduler, ticket: Ticket) -> None:
        """Hands a picture to the scheduler. A request that it cannot take fails alone."""
        if ticket.cancelled:
            self._close(ticket)
            return
        request = ticket.request
        try:
            if ticket.settings is None:
                ticket.settings = resolve(request, scheduler.model.manifest)
            if ticket.partial_steps:
                request = replace(request, previews=_preview_steps(request, ticket))
            ticket.branch_pixels = branch_pixels(ticket.settings).tolist()
            ticket.id = scheduler.add(request, ticket.settings)
        except Exception as error:
            if not isinstance(error, OnewordError):
                log_failure(error)
                error = EngineError("the prompt could not be tokenized")
            self._tell(ticket, Failed(without_frames(error)))
            self._close(ticket)
            return
        self._tickets[ticket.id] = ticket
        self._tell(ticket, Started())

    def _turn(self, scheduler: Scheduler) -> None:
        """Runs one turn and passes on its events."""
        self._expected_seconds = self._turn_seconds()
        model = scheduler.model
        before, encoding, chunks = dict(scheduler.seconds), model.encoding_seconds, model.encoded_chunks
        events = scheduler.step()
        self.last_turn = time.monotonic()
        seconds = {stage: total - before[stage] for stage, total in scheduler.seconds.items()}
        steps = [(self._tickets[event.id], event) for event in events if isinstance(event, StepDone)]
        denoised = sum(ticket.branch_pixels[event.step - 1] for ticket, event in steps)
        self._denoising.add(denoised, seconds["denoise"])  # a turn without the end of a step costs time too
        pixels = sum(event.image.shape[0] * event.image.shape[1] for event in events if isinstance(event, PictureDone))
        encoding = model.encoding_seconds - encoding
        self._encoding.add(model.encoded_chunks - chunks, encoding)
        self._decoding.add(pixels, seconds["encode"] - encoding + seconds["decode"])
        self._count(seconds)
        self._turns += 1
        self._publish(scheduler)  # before any listener is called
        decoded = _has_decoder(model)  # and passed on by _show
        for event in events:
            self._pass_on(replace(event, denoised=None) if decoded and isinstance(event, StepDone) else event)
        asked = [(ticket, event) for ticket, event in steps if event.denoised is not None and event.id in self._tickets]
        partials = {event.id: event for ticket, event in asked if event.step in ticket.partial_steps}
        previews = {event.id: event for _, event in asked if decoded and event.id not in partials}
        self._due |= partials
        self._due_previews |= previews
        seconds["partial"] = self._show(model) if self._due or self._due_previews else 0.0
        self._estimating.add(sum(_pixels(self._tickets[id]) for id in partials | previews), seconds["partial"])
        self.last_turn = time.monotonic()
        if self.observer is not None:
            self.observer(Turn(len(steps), seconds))

    def _count(self, seconds: Mapping[str, float]) -> None:
        """Counts the time of stages."""
        for stage, spent in seconds.items():
            self._seconds[stage] += spent

    def _show(self, model: Model) -> float:
        """Decodes the estimates that have waited longest and passes them on; the others wait for the next turn, or for
        their picture, which replaces them. Returns how many seconds it took."""
        start = time.perf_counter()
        estimates = [(self._tickets[id], self._due.pop(id)) for id in [*self._due][:_PARTIALS]]
        previews = [*self._due_previews][: _PARTIALS - len(estimates)]
        estimates += [(self._tickets[id], self._due_previews.pop(id)) for id in previews]
        for together in _grouped(estimates):
            self._decode_estimates(model, together)
        seconds = time.perf_counter() - start
        self._count({"partial": seconds})
        return seconds

    def _pass_on(self, event: Event) -> None:
        """Passes an event on to its listener; forgets the picture if this was the last event."""
        ticket = self._tickets[event.id]
        match event:
            case StepDone(step=step, steps=steps, denoised=denoised):
                self._tell(ticket, Step(step, steps, denoised if ticket.request.has_preview(step) else None))
            case PictureDone():
                self._tell(ticket, Done(event))
                self._close(ticket)
            case PictureFailed(error=error):
                self._tell(ticket, Failed(error))
                self._close(ticket)

    def _decode_estimates(self, model: Model, estimates: Sequence[tuple[Ticket, StepDone]]) -> None:
        """Decodes the estimates of pictures of one size, with the decoder for previews if there is one, and passes them
        on; if that fails, there are none."""
        draft = _has_decoder(model)
        estimates = [
            (ticket, event) for ticket, event in estimates if not ticket.cancelled and event.id in self._tickets
        ]
        latents = [event.denoised for _, event in estimates if event.denoised is not None]
        if not latents:
            return
        try:
            images, finite = model.decode(np.stack(latents), draft)
        except OnewordError as error:
            log_failure(error)
            model.forget_bindings()
            return
        for (ticket, event), image, ok in zip(estimates, images, finite, strict=True):
            if not ok:
                continue
            if event.step in ticket.partial_steps:
                self._tell(ticket, Partial(event.step, image))
            if draft and ticket.request.has_preview(event.step):
                self._tell(ticket, Preview(event.step, event.steps, image))

    def _tell(self, ticket: Ticket, event: WorkerEvent) -> None:
        if not ticket.cancelled:
            ticket.listener(event)

    def _close(self, ticket: Ticket) -> None:
        if ticket.id is not None:
            self._tickets.pop(ticket.id, None)
            self._due.pop(ticket.id, None)
            self._due_previews.pop(ticket.id, None)
        with self._lock:
            self._open.discard(ticket)

    def _turn_seconds(self) -> float:
        """How long the next turn takes if all prompts are encoded and every picture is denoised, shown and decoded."""
        pixels = sum(map(_pixels, self._tickets.values()))
        chunks = sum(ticket.chunks for ticket in self._tickets.values())
        per_pixel = 2 * self._denoising.seconds_per_unit + self._decoding.seconds_per_unit
        per_pixel += self._estimating.seconds_per_unit
        return pixels * per_pixel + chunks * self._encoding.seconds_per_unit

    def _publish(self, scheduler: Scheduler) -> None:
        self.figures = WorkerFigures(
            rows=scheduler.rows,
            waiting=len(scheduler) - scheduler.rows,
            turns=self._turns,
            seconds_per_branch_pixel=self._denoising.seconds_per_unit,
            seconds_per_pixel=self._decoding.seconds_per_unit,
            seconds_per_estimate=self._estimating.seconds_per_unit,
            seconds_per_chunk=self._encoding.seconds_per_unit,
            seconds=dict(self._seconds),
            words=scheduler.model.resident,
        )


def branch_pixels(settings: ResolvedSettings) -> npt.NDArray[np.int64]:
    """[S]: what each step of a picture costs: its pixels for each line of the schedule, twice if that is guided."""
    branches = settings.schedule.per_step(1 + settings.schedule.guided.astype(np.int64))
    return branches * settings.width * settings.height


def _settings(ticket: Ticket) -> ResolvedSettings:
    assert ticket.settings is not None  # since it was added
    return ticket.settings


def _pixels(ticket: Ticket) -> int:
    return _settings(ticket).width * _settings(ticket).height


def _has_decoder(model: Model) -> bool:
    """Whether partial pictures and previews are decoded by a decoder for previews."""
    return model.manifest.has_preview_decoder


def _preview_seconds(model: Model, settings: ResolvedSettings) -> float:
    """How long the decoder for previews takes, once it is open."""
    factor, channels = model.manifest.vae.factor, model.manifest.vae.latent_channels
    latents = np.zeros((channels, settings.height // factor, settings.width // factor), np.float32)
    model.preview(latents)
    start = time.perf_counter()
    model.preview(latents)
    return time.perf_counter() - start


def _preview_steps(request: Request, ticket: Ticket) -> frozenset[int]:
    """The steps where the request has a preview, and those whose estimate is decoded."""
    steps = range(1, _settings(ticket).schedule.steps + 1)
    return ticket.partial_steps | {step for step in steps if request.has_preview(step)}


def _grouped(estimates: Iterable[tuple[Ticket, StepDone]]) -> Iterator[list[tuple[Ticket, StepDone]]]:
    """The estimates by size, in groups that a call of the decoder takes."""
    by_size: dict[tuple[int, ...], list[tuple[Ticket, StepDone]]] = defaultdict(list)
    for ticket, event in estimates:
        if event.denoised is not None:
            by_size[event.denoised.shape].append((ticket, event))
    for together in by_size.values():
        for start in range(0, len(together), CALLS[0]):
            yield together[start : start + CALLS[0]]
