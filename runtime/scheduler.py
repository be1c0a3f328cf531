"""Decides what runs next: `add` accepts requests, and every `step` returns events. Owns no buffers.

    scheduler = Scheduler(model)
    id = scheduler.add(request)
    while scheduler:
        for event in scheduler.step():
            ...

A step is one turn: waiting pictures are prepared and get slots, every row is denoised once, finished rows are decoded.
A sampler of two stages needs two turns for most of its own steps, and StepDone comes after the second.
Preparing is bounded in number and decoding in time, so that they hold up running rows and newcomers for a short time
only: a request of many texts is encoded over several turns, pictures that finish together are decoded over several. A
newcomer without a free slot waits for one. The rows that share a row's engine calls change its result by rounding only.
Not covered: slots and engine calls (`oneword.runtime.denoiser`), fairness between users, and limits on the queue.
"""

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from oneword.engines.errors import EngineError, NotFinite, OnewordError, UsageError, without_frames
from oneword.runtime.batched import CALLS
from oneword.runtime.contexts import EncodedPrompt, Sources, context_count
from oneword.runtime.denoiser import Denoiser, Size
from oneword.runtime.edit import edit_mask, latent_mask, paste
from oneword.runtime.events import Event, Failed, Latents, PictureDone, StepDone
from oneword.runtime.images import resized
from oneword.runtime.model import Model, TokenizedPrompt
from oneword.runtime.noise import TorchGenerator
from oneword.runtime.request import Request, ResolvedSettings, resolve
from oneword.runtime.row import NoiseStream, Row, time_ids
from oneword.runtime.samplers import Schedule

MAX_CHUNKS: Final = 64
MAX_CONTEXT_BYTES: Final = 64 << 20
"""Of the contexts of one request that has more than a prompt and a negative prompt."""
MAX_ROWS: Final = 16
"""Slots per size by default."""
_NEWCOMERS: Final = 4  # requests with different prompts or sizes, or edits, that a turn prepares while others run
_NEW_CHUNKS: Final = 8  # chunks of their prompts that it encodes, or a single longer prompt
_SHARE: Final = 0.2  # of a typical turn's denoising time, for preparing and decoding together
_PATIENCE: Final = 4  # turns in a row that decoding may be deferred for newcomers
_BACKLOG: Final = 4  # one in so many waiting pictures is decoded whatever its time
_RECENT: Final = 257  # turns, whose median is the typical one
_MORE_PRECISION: Final = "run it with --engine onnxruntime, or export the model with --precision fp32"
_AHEAD: Final = 32  # requests at the head of the queue that are considered for a free slot


@dataclass(eq=False)
class _Pending:
    """A request with pictures that have no slot yet."""

    id: int
    request: Request
    settings: ResolvedSettings
    tokens: Sequence[TokenizedPrompt] = ()
    """[S]: the prompt of each step."""
    negatives: Sequence[TokenizedPrompt | EncodedPrompt] | None = None
    """[S]; None if no step is guided."""
    next_index: int = 0
    encoded: dict[TokenizedPrompt, EncodedPrompt] = field(default_factory=dict[TokenizedPrompt, EncodedPrompt])
    """The prompts that are encoded so far."""
    posterior: tuple[Latents, Latents] | None = None
    size: Size = (0, 0, 0)
    """h, w and T of its rows."""
    contexts: int = 0
    """How many contexts each of its rows can need in one step."""

    @property
    def left(self) -> int:
        """Pictures without a slot."""
        return self.request.num_images - self.next_index

    @property
    def branches(self) -> int:
        """N of each of its rows in their first step."""
        return 1 + bool(self.settings.schedule.guided[0])

    @functools.cached_property
    def preparation(self) -> Hashable:
        """What is prepared for it besides the noise. Equal for requests that share all of it: the server makes one
        request for each of several pictures. An edit shares only its encoded picture."""
        if self.request.image is not None:
            return self.id
        prompts = dict.fromkeys([*self.tokens, *(self.negatives or ())])
        return self.size, frozenset(prompt.key for prompt in prompts if isinstance(prompt, TokenizedPrompt))

    @property
    def missing(self) -> list[TokenizedPrompt]:
        """The prompts that are not encoded yet, each once, after those with the rows of single layers."""
        prompts = dict.fromkeys([*self.tokens, *(self.negatives or ())])
        new = [prompt for prompt in prompts if isinstance(prompt, TokenizedPrompt) and prompt not in self.encoded]
        return [part for prompt in new for part in (*prompt.layered, prompt) if part not in self.encoded]

    @property
    def cond(self) -> list[EncodedPrompt]:
        """[S]: the context of each step, once no prompt is missing."""
        return [self.encoded[prompt] for prompt in self.tokens]

    @property
    def uncond(self) -> list[EncodedPrompt] | None:
        """[S]; None if no step is guided."""
        if self.negatives is None:
            return None
        return [self.encoded[p] if isinstance(p, TokenizedPrompt) else p for p in self.negatives]

    def tokenize(self, model: Model) -> None:
        """Splits the prompts at learned words. Raises UsageError, ConceptError."""
        settings = self.settings
        self.tokens = self._tokenized(model, settings.prompts)
        if settings.schedule.guided.any():
            if settings.negative_prompts is None:
                self.negatives = [model.missing_negative(self.request.clip_skip)] * settings.schedule.steps
            else:
                self.negatives = self._tokenized(model, settings.negative_prompts)
        prompts = list(dict.fromkeys([*self.tokens, *(self.negatives or ())]))
        tokenized = [prompt for prompt in prompts if isinstance(prompt, TokenizedPrompt)]
        evened = dict(zip(tokenized, model.evened(tokenized), strict=True))
        self.tokens = [evened[prompt] for prompt in self.tokens]
        if self.negatives is not None:
            self.negatives = [
                evened[prompt] if isinstance(prompt, TokenizedPrompt) else prompt for prompt in self.negatives
            ]
        _check_lengths(list(evened.values()))
        lengths = [
            *map(model.context_length, evened.values()),
            *(len(prompt.hidden_states) for prompt in prompts if not isinstance(prompt, TokenizedPrompt)),
        ]
        if len(prompts) > 2 or any(prompt.layered for prompt in evened.values()):
            encodings = [1 + len(prompt.layered) for prompt in evened.values()]
            encodings += [1] * (len(lengths) - len(encodings))  # of a missing negative prompt
            width = 4 * model.manifest.context_width
            _check_bytes([width * length * count for length, count in zip(lengths, encodings, strict=True)])
        branches = [self.tokens] if self.negatives is None else [self.tokens, self.negatives]
        layers, distinct = model.manifest.layers, dict.fromkeys(itertools.chain(*branches))
        context_counts = {prompt: _context_count(prompt, layers) for prompt in distinct}
        self.contexts = max(sum(context_counts[prompt] for prompt in step) for step in zip(*branches, strict=True))
        factor = model.manifest.vae.factor
        self.size = self.settings.height // factor, self.settings.width // factor, math.lcm(*lengths)

    def _tokenized(self, model: Model, texts: Sequence[str]) -> list[TokenizedPrompt]:
        """The prompt of each step [S]."""
        tokens = {
            text: model.tokenize(text, self.request.clip_skip, self.request.words) for text in dict.fromkeys(texts)
        }
        return [tokens[text] for text in texts]


@dataclass(eq=False)
class _Finished:
    """A row to decode."""

    row: Row
    latents: Latents

    @property
    def call(self) -> tuple[tuple[int, ...], bool]:
        """What rows that are decoded together have in common."""
        return self.latents.shape, self.row.request.draft


@dataclass(eq=False)
class Scheduler:
    """The pictures in progress on one model. At most `max_rows` of a size share an engine call."""

    model: Model
    max_rows: int = MAX_ROWS
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "denoise": 0.0, "decode": 0.0})
    """Time spent so far, by stage."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise UsageError(f"max_rows is {self.max_rows}, but must be 1 or more")
        self.denoiser = Denoiser(self.model, self.max_rows)
        self._issued = 0
        self._pending: deque[_Pending] = deque()
        self._rows: list[Row] = []
        self._finished: deque[_Finished] = deque()
        self._turn_seconds: deque[float] = deque([0.0], maxlen=_RECENT)  # of denoising
        self._decode_seconds = 0.0  # of one picture, most recently
        self._admitted = False  # whether this turn prepared a picture
        self._left = 0.0  # seconds that this turn has for preparing and decoding
        self._postponed = 0  # turns in a row that had no time left for decoding

    def __len__(self) -> int:
        """Number of pictures that are not done."""
        return len(self._rows) + len(self._finished) + sum(pending.left for pending in self._pending)

    @property
    def rows(self) -> int:
        """Number of pictures that have a slot."""
        return len(self._rows)

    def warm(self, *sizes: tuple[int, int]) -> None:
        """Opens the engines, and runs every call that pictures of these sizes (width, height) and prompts of one chunk
        can need, so that no later step compiles or binds. Defaults to the bundle's size. Raises EngineError."""
        for width, height in sizes or [self.model.manifest.defaults.size]:
            self.model.warm(width, height)
            self.denoiser.warm(self._latent_size(width, height))

    def bind(self, *sizes: tuple[int, int]) -> None:
        """Opens the engine of the denoising step, and binds it for every number of rows of these sizes (width, height)
        with prompts of one chunk. This is the part of `warm` that runs nothing. Raises EngineError."""
        for width, height in sizes or [self.model.manifest.defaults.size]:
            self.denoiser.bind(self._latent_size(width, height))

    def capacity(self, width: int, height: int) -> int:
        """How many pictures of this size, with prompts of one chunk, can share a step. Opens the engine."""
        return self.denoiser.capacity(self._latent_size(width, height))

    def _latent_size(self, width: int, height: int) -> Size:
        factor = self.model.manifest.vae.factor
        return height // factor, width // factor, self.model.context_length(self.model.tokenize(""))

    def add(self, request: Request, settings: ResolvedSettings | None = None) -> int:
        """Queues a request; its pictures start in the next steps. Returns its id.

        `settings` are those of `resolve`, if they are known. Raises UsageError for everything that can be checked
        before it runs.
        """
        settings = resolve(request, self.model.manifest) if settings is None else settings
        pending = _Pending(self._issued, request, settings)
        pending.tokenize(self.model)
        self._issued += 1
        self._pending.append(pending)
        return pending.id

    def cancel(self, id: int) -> None:
        """Cancels the unfinished pictures of a request. Raises UsageError for an unknown id."""
        if not 0 <= id < self._issued:
            raise UsageError(f"no request has the id {id}, {self._issued} have been added so far")
        self._pending = deque(pending for pending in self._pending if pending.id != id)
        for row in [row for row in self._rows if row.id == id]:
            self._remove(row)
        self._finished = deque(done for done in self._finished if done.row.id != id)

    def cancel_all(self) -> None:
        """Cancels every picture."""
        rows = [*self._rows, *(done.row for done in self._finished)]
        for id in {*(pending.id for pending in self._pending), *(row.id for row in rows)}:
            self.cancel(id)

    def step(self, max_steps: int | None = 1) -> list[Event]:
        """Runs one turn, or up to `max_steps` while nothing but StepDone happens; None means no limit."""
        if max_steps is not None and max_steps < 1:
            raise UsageError(f"max_steps is {max_steps}, but must be 1 or more, or None")
        events: list[Event] = []
        for _ in itertools.count() if max_steps is None else range(max_steps):
            self._left = _SHARE * statistics.median(self._turn_seconds)
            turn = [*self._admit(), *self._denoise(), *self._decode()]
            events += turn
            if not self or any(not isinstance(event, StepDone) or event.denoised is not None for event in turn):
                break
        return events

    def _admit(self) -> Iterator[Event]:
        """Prepares waiting requests and gives their pictures slots: a few per turn, all of them if nothing runs."""
        start = time.perf_counter()
        newcomers = self._newcomers(_NEWCOMERS if self._rows else self.max_rows)
        if newcomers and not self._rows:  # in a first turn this compiles, while the encoders are opened
            size, branches = newcomers[0].size, newcomers[0].branches
            try:
                self.denoiser.prepare(size, branches, max(p.contexts for p in newcomers if p.size == size))
            except OnewordError as error:  # compiling again for each request could take minutes
                alike = [pending for pending in newcomers if (pending.size, pending.branches) == (size, branches)]
                newcomers = [pending for pending in newcomers if pending not in alike]
                for pending in alike:
                    yield from self._drop(pending, without_frames(error))
                    self._pending.remove(pending)
        for pending in newcomers:
            pending.encoded |= self.model.cached(prompt for prompt in pending.missing if prompt.layered)
        portions = _portions(newcomers, _NEW_CHUNKS if self._rows else math.inf, self.model.is_cached)
        with contextlib.suppress(OnewordError):  # each request is tried again alone
            self._encode(portions)
        lacking: set[Size] = set()
        for pending in newcomers:
            if pending.size in lacking:
                continue
            try:
                self._encode({pending: portions[pending]})
            except OnewordError as error:
                yield from self._drop(pending, without_frames(error))
            while pending.left and not pending.missing and self.denoiser.has_room(pending.size, pending.contexts):
                try:
                    row = self._prepare(pending)
                    placed = self.denoiser.place(row)
                except OnewordError as error:
                    yield from self._drop(pending, without_frames(error))
                    break
                if not placed:  # memory was short for more contexts; the row is prepared again
                    break
                self._rows.append(row)
                pending.next_index += 1
            if not pending.left:
                self._pending.remove(pending)
            elif self.denoiser.lacks_contexts(pending.size, pending.contexts):
                lacking.add(pending.size)
        self._admitted = bool(newcomers)
        seconds = time.perf_counter() - start
        self._left -= seconds
        self.seconds["encode"] += seconds

    def _newcomers(self, count: int) -> list[_Pending]:
        """The next requests that there is room for, in the order of the queue. None overtakes a first one that waits
        for an arena, and none of its size one that waits for contexts."""
        waiting = [*itertools.islice(self._pending, _AHEAD)]
        newcomers: list[_Pending] = []
        if waiting and self.denoiser.crowded_out(waiting[0].size):
            return newcomers
        lacking: set[Size] = set()
        for pending in waiting:
            if pending.size in lacking:
                continue
            if self.denoiser.has_room(pending.size, pending.contexts):
                newcomers.append(pending)
            elif self.denoiser.lacks_contexts(pending.size, pending.contexts):
                lacking.add(pending.size)
        preparations = set[Hashable]()
        for place, pending in enumerate(newcomers):  # none overtakes the first that is left out
            preparations.add(pending.preparation)
            if len(preparations) > count:
                return newcomers[:place]
        return newcomers

    def _drop(self, pending: _Pending, error: OnewordError) -> Iterator[Event]:
        """Reports the pictures of a request that failed."""
        for index in range(pending.next_index, pending.request.num_images):
            yield Failed(pending.id, index, error)
        pending.next_index = pending.request.num_images

    def _prepare(self, pending: _Pending) -> Row:
        """The request's next picture. It draws in diffusers' order: the VAE's posterior first, then the noise."""
        request, settings = pending.request, pending.settings
        schedule = settings.schedule
        manifest = self.model.manifest
        cond, uncond = pending.cond, pending.uncond
        if not all(prompt.finite for prompt in {*cond, *(uncond or ())}):
            raise NotFinite("a text encoder produced NaN or infinity for this prompt: check the word's vectors")
        if request.image is not None and pending.posterior is None:
            pending.posterior = self.model.encode_image(resized(request.image, settings.width, settings.height))
        shape = (manifest.vae.latent_channels, *pending.size[:2])
        white = edit_mask(request, settings)
        generator = TorchGenerator(request.seed + pending.next_index)
        known: Latents | None = None
        if pending.posterior is not None:
            mean, std = pending.posterior
            known = (
                np.asarray(mean + std * generator.randn(shape), np.float32) if manifest.vae.draws_posterior else mean
            )
        noise = generator.randn(shape)
        if white is not None:
            generator.randn(shape)  # diffusers also samples the masked picture's latents at this point
        if known is None or (white is not None and request.strength == 1):
            sample = np.float32(schedule.init_scale) * noise
        else:
            sample = np.float32(schedule.start_scale) * known + np.float32(schedule.start_sigma) * noise
        row = Row(
            id=pending.id,
            index=pending.next_index,
            request=request,
            settings=settings,
            lines=schedule.table(manifest.columns),
            noise=NoiseStream(generator, shape, schedule.draws),
            cond=_sources(cond, schedule, manifest.layers),
            uncond=None if uncond is None else _sources(uncond, schedule, manifest.layers),
            most_contexts=pending.contexts,
            tokens=pending.size[2],
            time_ids=time_ids(manifest.conditioning.time_ids, settings),
            sample=sample,
            previous=np.zeros(shape, np.float32),
            previous2=np.zeros(shape, np.float32),
        )
        if white is not None:
            row.known, row.known_noise, row.mask = known, noise, latent_mask(white, manifest.vae.factor)
        return row

    def _encode(self, portions: Mapping[_Pending, Sequence[TokenizedPrompt]]) -> None:
        """Encodes these prompts of these requests, unless they are encoded. Raises EngineError."""
        prompts = {
            prompt: pending
            for pending, portion in portions.items()
            for prompt in portion
            if prompt not in pending.encoded
        }
        layers = {p.key: encoded for pending in portions for p, encoded in pending.encoded.items() if p.of_layer}
        for (prompt, pending), encoded in zip(prompts.items(), self.model.encode([*prompts], layers), strict=True):
            pending.encoded[prompt] = encoded

    def _denoise(self) -> Iterator[Event]:
        """Runs one step of every row; rows that are done leave their slots."""
        start = time.perf_counter()
        before = {row: row.step for row in self._rows}
        failures = self.denoiser.step() if self._rows else []
        for row, error in failures:
            self._remove(row)
            yield Failed(row.id, row.index, error)
        for row in [*self._rows]:
            yield from self._progress(row, row.step > before[row])
        seconds = time.perf_counter() - start
        self._turn_seconds += [seconds] if before else []
        self.seconds["denoise"] += seconds

    def _progress(self, row: Row, stepped: bool) -> Iterator[Event]:
        """The events of one row in this turn; `stepped` if it ended a step."""
        preview, latents = None, None
        try:
            if stepped and row.step == row.steps:
                latents = self.denoiser.take(row)
            elif stepped and row.request.has_preview(row.step):
                preview = self.denoiser.denoised(row)
        except OnewordError as error:
            self._remove(row)
            yield Failed(row.id, row.index, without_frames(error))
            return
        if row.broken_at is not None:
            self._remove(row)
            step = row.schedule.step_of(row.broken_at)
            message = f"graph 'denoise_step' produced NaN or infinity at step {step} of picture {row.index}: "
            yield Failed(row.id, row.index, NotFinite(message + _MORE_PRECISION))
            return
        if stepped:
            yield StepDone(row.id, row.index, row.step, row.steps, preview)
        if latents is not None:
            self._rows.remove(row)
            self._finished.append(_Finished(row, latents))

    def _remove(self, row: Row) -> None:
        self.denoiser.remove(row)
        self._rows.remove(row)

    def _decode(self) -> Iterator[Event]:
        """Decodes finished rows while the turn has time for it, at least one unless newcomers were prepared.

        If pictures finish faster than that, a quarter of those that wait is decoded, at most eight in a turn.
        """
        start = time.perf_counter()
        count = min(len(self._finished), CALLS[0])
        if self._decode_seconds:
            due = not self._admitted or self._postponed >= _PATIENCE
            count = min(count, max(int(self._left / self._decode_seconds), len(self._finished) // _BACKLOG, int(due)))
        self._postponed = self._postponed + 1 if self._finished and count < 1 else 0
        while count > 0:
            chosen = self._next_finished(min(count, self.max_rows))
            count -= len(chosen)
            yield from self._decode_together(chosen)
        self.seconds["decode"] += time.perf_counter() - start

    def _next_finished(self, limit: int) -> list[_Finished]:
        """Up to `limit` of the oldest finished rows, all with the size and the decoder of the first."""
        chosen = [done for done in self._finished if done.call == self._finished[0].call][:limit]
        for done in chosen:
            self._finished.remove(done)
        return chosen

    def _decode_together(self, finished: list[_Finished], again: bool = False) -> Iterator[Event]:
        """Decodes rows in one call. If the engine fails, the buffers of encoders and decoders are released, and each
        row is decoded `again`, alone."""
        start = time.perf_counter()
        draft = finished[0].row.request.draft
        try:
            images, finite = self.model.decode(np.stack([done.latents for done in finished]), draft)
        except OnewordError as error:
            failure = without_frames(error)
            if isinstance(failure, EngineError) and not again:
                self.model.forget_bindings()
                for done in finished:
                    yield from self._decode_together([done], again=True)
                return
            for done in finished:
                yield Failed(done.row.id, done.row.index, failure)
            return
        self._decode_seconds = (time.perf_counter() - start) / len(finished)
        for done, image, ok in zip(finished, images, finite, strict=True):
            row = done.row
            if not ok:
                graph = "vae_preview" if draft else "vae_decoder"
                message = f"graph {graph!r} produced NaN or infinity for picture {row.index}: "
                yield Failed(row.id, row.index, NotFinite(message + "export it with --precision fp32"))
                continue
            image = paste(image, row.request, row.settings)
            yield PictureDone(row.id, row.index, row.seed, image, row.request, row.settings, self.model.name)


def _portions(
    requests: Sequence[_Pending], chunks: float, is_cached: Callable[[TokenizedPrompt], bool]
) -> dict[_Pending, list[TokenizedPrompt]]:
    """The prompts to encode next of each request: up to so many chunks of all together, at least one prompt. Prompts
    that are cached, or that an earlier request has too, cost nothing."""
    portions: dict[_Pending, list[TokenizedPrompt]] = {pending: [] for pending in requests}
    left, keys, is_full = chunks, set[bytes](), False
    for pending in requests:
        for prompt in pending.missing:
            if prompt.key not in keys and not is_cached(prompt):
                count = max(len(part.input_ids) for part in prompt.per_encoder.values())
                is_full = is_full or count > left < chunks
                if is_full:
                    continue
                left -= count
                keys.add(prompt.key)
            portions[pending].append(prompt)
    return portions


def _context_count(prompt: TokenizedPrompt | EncodedPrompt, layers: int) -> int:
    """How many contexts a branch with this prompt needs."""
    if isinstance(prompt, EncodedPrompt):
        return 1
    return context_count(prompt.precise_words, layers, layered=bool(prompt.layered))


def _sources(prompts: Sequence[EncodedPrompt], schedule: Schedule, layers: int) -> list[Sources]:
    """What a branch attends to in each step [S], given its prompts: one object while nothing changes."""
    known: dict[tuple[EncodedPrompt, tuple[int, ...]], Sources] = {}
    by_step: list[Sources] = []
    for step, prompt in enumerate(prompts):
        stages = tuple(schedule.stage_of(step, insertion.concept.stages) for insertion in prompt.insertions)
        if (prompt, stages) not in known:
            known[prompt, stages] = prompt.sources(stages, layers)
        by_step.append(known[prompt, stages])
    return by_step


def _check_bytes(contexts: Sequence[int]) -> None:
    """Raises UsageError if the contexts of a request's texts would take too much memory."""
    if sum(contexts) > MAX_CONTEXT_BYTES:
        raise UsageError(
            f"the {len(contexts)} texts of the prompts, negative ones included, take {sum(contexts) / 2**20:.1f} MiB "
            f"when encoded, but may take at most {MAX_CONTEXT_BYTES >> 20} MiB: use fewer or shorter ones"
        )


def _check_lengths(prompts: Sequence[TokenizedPrompt]) -> None:
    """Raises UsageError if the common length, to which all prompts are repeated, would not fit into memory."""
    for name in prompts[0].per_encoder:
        chunks = list(dict.fromkeys(len(prompt.per_encoder[name].input_ids) for prompt in prompts))
        if math.lcm(*chunks) > max(MAX_CHUNKS, 4 * max(chunks)):
            raise UsageError(
                f"the prompts, negative ones included, have {' and '.join(map(str, chunks))} chunks, whose least "
                f"common multiple is {math.lcm(*chunks)}, but must be at most {max(MAX_CHUNKS, 4 * max(chunks))}: "
                "shorten one"
            )
