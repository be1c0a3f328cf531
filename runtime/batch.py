"""The batch that anyone may join: `add`, `cancel`, `step`. Every row (picture) goes through a schedule of its own.

A step denoises every row once. Rows of one size share an engine call, whatever their prompts, words, samplers, steps,
guidance and seeds; what a row gets never depends on who shares the call. Nothing waits for the slowest: a row that is
done is decoded and leaves, a new one starts at the next step.

As long as the same rows are together their state stays where the engine works; it is read when their company changes.
"""

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.bundle import Manifest
from oneword.engines.engine import Array
from oneword.engines.errors import EngineError, NotFinite, OnewordError, UsageError
from oneword.engines.loop import Loop
from oneword.runtime.images import resized
from oneword.runtime.model import Context, Model, StepBinding, Tokens
from oneword.runtime.noise import TorchGenerator
from oneword.runtime.request import Image, Request, ResolvedSettings, resolve
from oneword.runtime.samplers import Schedule, make_schedule

_MAX_CHUNKS = 64
_MOST_NOISE = 16 << 20  # bytes that are drawn, and lie on the device, at once

Latents: TypeAlias = npt.NDArray[np.float32]
"""[C, h, w]"""


@dataclass(frozen=True, eq=False)
class StepDone:
    """A row has done `step` of its `steps`; `denoised` is the picture as the model now sees it, to preview."""

    id: int
    index: int
    step: int
    steps: int
    denoised: Latents


@dataclass(frozen=True, eq=False)
class PictureDone:
    """Picture `index` of request `id` is ready: uint8 [H, W, 3]."""

    id: int
    index: int
    seed: int
    image: Image
    request: Request
    settings: ResolvedSettings


@dataclass(frozen=True, eq=False)
class Failed:
    """Picture `index` of request `id` will not come; the others are as they were."""

    id: int
    index: int
    error: OnewordError


Event: TypeAlias = StepDone | PictureDone | Failed


@dataclass(eq=False)
class _Row:
    """One picture on its way."""

    id: int
    index: int
    request: Request
    settings: ResolvedSettings
    schedule: Schedule
    generator: TorchGenerator
    sample: Latents
    previous: Latents
    cond: Context
    uncond: Context | None
    known: Latents | None = None
    known_noise: Latents | None = None
    mask: Latents | None = None  # [1, h, w]
    step: int = 0
    drawn: dict[int, Latents] = field(default_factory=dict)  # noise of steps to come that has been asked for
    broken_at: int | None = None  # the step that gave NaN or infinity
    alone: bool = False  # shares no call: one that it shared has failed

    @property
    def contexts(self) -> list[Context]:
        """What this row's next step attends to: unconditional first, where the step is guided."""
        if self.uncond is not None and self.schedule.guided[self.step]:
            return [self.uncond, self.cond]
        return [self.cond]

    @property
    def seed(self) -> int:
        return self.request.seed + self.index

    @property
    def steps_alike(self) -> int:
        """How many of the next steps attend to the same contexts."""
        guided = self.schedule.guided[self.step :]
        if self.uncond is None:
            return len(guided)
        return next((i for i, each in enumerate(guided) if each != guided[0]), len(guided))

    def draw(self, steps: int) -> list[Latents | None]:
        """Of the next steps, where they draw: drawn in order, and once, however often a step is asked for."""
        coming = range(self.step, self.step + steps)
        for step in coming:
            if self.schedule.draws[step] and step not in self.drawn:
                self.drawn[step] = self.generator.randn(self.sample.shape)
        return [self.drawn.get(step) for step in coming]


@dataclass(eq=False)
class _Run:
    """Rows that are together for some steps, and the loop that has their state: `give_back` reads it into them."""

    rows: tuple[_Row, ...]
    binding: StepBinding

    def __post_init__(self) -> None:
        self.binding.user = self
        self._began = [row.step for row in self.rows]

    @property
    def loop(self) -> Loop:
        return self.binding.loop

    @property
    def settled(self) -> bool:
        return self.binding.user is not self

    @property
    def over(self) -> bool:
        return self.loop.done == self.loop.steps

    def give_back(self) -> None:
        """Gives the loop away, once: the rows are where its last step left them, or where it found them if it fails."""
        if not self.settled:
            try:
                self.read()
            except OnewordError:
                self.undo()

    def read(self) -> None:
        """The state of the last step goes into the rows. Raises EngineError."""
        sample, previous, finite = self.loop.sample, self.loop.denoised, self.loop.finite
        for i, row in enumerate(self.rows):
            row.sample, row.previous = sample[i].copy(), previous[i].copy()
            row.drawn = {step: noise for step, noise in row.drawn.items() if step >= row.step}
            if not finite[:, i].all():
                row.broken_at = self._began[i] + int(finite[:, i].argmin()) + 1
        self.binding.user = None

    def undo(self) -> None:
        """The rows are where they were before."""
        self.binding.user = None
        for row, step in zip(self.rows, self._began, strict=True):
            row.step = step


@dataclass(eq=False)
class _Waiting:
    """A request that was added and not begun."""

    request: Request
    settings: ResolvedSettings
    schedule: Schedule
    tokens: Tokens
    negative: Tokens | Context | None


@dataclass(eq=False)
class Batch:
    """Rows on their way through one model. At most `max_rows` share an engine call.

    Without `listen` there are no StepDone events, and a step goes on until a row is done or its guidance changes: on a
    GPU nothing is read in between.
    """

    model: Model
    max_rows: int = 16
    listen: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "denoise": 0.0, "decode": 0.0})
    """Time spent so far, by stage: encode, denoise, decode."""

    def __post_init__(self) -> None:
        self._ids = itertools.count()
        self._issued = 0
        self._waiting: dict[int, _Waiting] = {}
        self._rows: list[_Row] = []
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        """Pictures that are still to come."""
        return len(self._rows) + sum(waiting.request.num_images for waiting in self._waiting.values())

    def add(self, request: Request) -> int:
        """Takes a request in; its rows start at the next `step`. Raises UsageError for what can be known now."""
        manifest = self.model.manifest
        settings = resolve(request, manifest)
        schedule = _schedule(request, settings, manifest)
        if request.image is not None and "vae_encoder" not in manifest.graphs:
            raise UsageError(
                "this bundle has no vae_encoder, so it cannot edit pictures: export it again with ti-export"
            )
        tokens = self.model.tokenize(request.prompt, request.clip_skip)
        negative: Tokens | Context | None = None
        if any(schedule.guided):
            try:
                negative = self._negative(request)
            except OnewordError:
                self.model.release(tokens)
                raise
        if isinstance(negative, Tokens):
            self._check_lengths(tokens, negative)
        id = next(self._ids)
        self._issued = id + 1
        self._waiting[id] = _Waiting(request, settings, schedule, tokens, negative)
        return id

    def cancel(self, id: int) -> None:
        """Takes a request's rows out; one that is done already is left alone. Raises UsageError for an unknown id."""
        if not 0 <= id < self._issued:
            raise UsageError(f"no request has the id {id}, the last one is {self._issued - 1}")
        if id in self._waiting:
            self._release(self._waiting.pop(id))
        self._rows = [row for row in self._rows if row.id != id]

    def step(self) -> list[Event]:
        """Starts what waits, denoises every row once, decodes and takes out the rows that are done."""
        events = self._start()
        groups = [*self._groups()]
        for run in self._runs:
            if run.rows not in groups:
                run.give_back()
        self._runs = [run for run in self._runs if not run.settled]
        for group in groups:
            events += self._denoise(group)
        return events + self._finish()

    def _check_lengths(self, tokens: Tokens, negative: Tokens) -> None:
        """Both are repeated up to a common length: refuses what would not fit into memory. Raises UsageError."""
        for name, each in tokens.per_encoder.items():
            chunks = len(each.input_ids), len(negative.per_encoder[name].input_ids)
            if math.lcm(*chunks) > max(_MAX_CHUNKS, 4 * max(chunks)):
                self.model.release(tokens)
                self.model.release(negative)
                raise UsageError(
                    f"the prompt has {chunks[0]} chunks and the negative prompt {chunks[1]}, whose least common "
                    f"multiple is {math.lcm(*chunks)}, allowed is {max(_MAX_CHUNKS, 4 * max(chunks))}: shorten either"
                )

    def _negative(self, request: Request) -> Tokens | Context:
        if request.negative_prompt is None:
            return self.model.missing_negative(request.clip_skip)
        return self.model.tokenize(request.negative_prompt, request.clip_skip)

    def _release(self, waiting: _Waiting) -> None:
        for tokens in (waiting.tokens, waiting.negative):
            if isinstance(tokens, Tokens):
                self.model.release(tokens)

    def _start(self) -> list[Event]:
        """Encodes the prompts of all that wait in one call, and gives each row its noise."""
        if not self._waiting:
            return []
        start = time.perf_counter()
        events: list[Event] = []
        started, self._waiting = self._waiting, {}
        prompts = [t for w in started.values() for t in (w.tokens, w.negative) if isinstance(t, Tokens)]
        try:
            contexts = dict(zip(map(id, prompts), self.model.encode(prompts), strict=True))
        except OnewordError as error:
            return [Failed(i, n, error) for i, w in started.items() for n in range(w.request.num_images)]
        finally:
            for waiting in started.values():
                self._release(waiting)
        for request_id, waiting in started.items():
            negative = waiting.negative
            cond = contexts[id(waiting.tokens)]
            uncond = contexts[id(negative)] if isinstance(negative, Tokens) else negative
            try:
                if not (cond.finite and (uncond is None or uncond.finite)):
                    raise NotFinite("a text encoder gave NaN or infinity for this prompt: check the word's vectors")
                self._rows += self._new_rows(request_id, waiting, cond, uncond)
            except OnewordError as error:
                events += [Failed(request_id, n, error) for n in range(waiting.request.num_images)]
        self.seconds["encode"] += time.perf_counter() - start
        return events

    def _new_rows(self, id: int, waiting: _Waiting, cond: Context, uncond: Context | None) -> list[_Row]:
        """A row per picture, its draws in diffusers' order: the VAE's posterior first, then the noise."""
        request, settings, schedule = waiting.request, waiting.settings, waiting.schedule
        vae = self.model.manifest.vae
        shape = (vae.latent_channels, settings.height // vae.factor, settings.width // vae.factor)
        posterior = None
        if request.image is not None:
            posterior = self.model.encode_image(resized(request.image, settings.width, settings.height))
        white = _mask(request, settings)
        mask = None if white is None else _latent_mask(white, vae.factor)
        rows = []
        for index in range(request.num_images):
            generator = TorchGenerator(request.seed + index)
            known: Latents | None = None
            if posterior is not None:
                mean, std = posterior
                known = np.asarray(mean + std * generator.randn(shape), np.float32)
            noise = generator.randn(shape)
            if mask is not None:
                generator.randn(shape)  # diffusers samples the masked picture's latents here, and uses them elsewhere
            if known is None or (mask is not None and request.strength == 1):
                sample = np.float32(schedule.init_scale) * noise
            else:
                sample = np.float32(schedule.start_scale) * known + np.float32(schedule.start_sigma) * noise
            row = _Row(
                id=id,
                index=index,
                request=request,
                settings=settings,
                schedule=schedule,
                generator=generator,
                sample=sample,
                previous=np.zeros(shape, np.float32),
                cond=cond,
                uncond=uncond,
            )
            if mask is not None:
                row.known, row.known_noise, row.mask = known, noise, mask
            rows.append(row)
        return rows

    def _groups(self) -> Iterator[tuple[_Row, ...]]:
        """Rows that share a call: one size, and contexts whose common length is at most twice the longest."""
        groups: list[list[_Row]] = []
        for row in self._rows:
            for group in groups:
                if len(group) < self.max_rows and _fits(group, row):
                    group.append(row)
                    break
            else:
                groups.append([row])
        yield from map(tuple, groups)

    def _denoise(self, group: tuple[_Row, ...]) -> list[Event]:
        """The next step of every row of the group in one engine call, and where nobody listens all until one is done.

        Where the engine fails, each row is tried in a call of its own, now and from now on.
        """
        start = time.perf_counter()
        run = next((run for run in self._runs if run.rows == group and not run.settled), None)
        denoised: Latents | None = None  # of all rows [B, C, h, w]
        failure: OnewordError | None = None
        try:
            run = run or self._begin(group)
            before = run.loop.done
            if self.listen:
                run.loop.step()
                denoised = run.loop.denoised.copy()
            else:
                run.loop.finish()
            for row in group:
                row.step += run.loop.done - before
            if run.over or (self.listen and not run.loop.finite[-1].all()):
                run.read()
        except OnewordError as error:
            failure = error.with_traceback(None)  # whose frames would hold what was allocated
            if run is not None:
                run.undo()
        self.seconds["denoise"] += time.perf_counter() - start
        if isinstance(failure, EngineError) and len(group) > 1:
            self.model.forget_bindings()
            for row in group:
                row.alone = True
            return [event for row in group for event in self._denoise((row,))]
        if failure is not None:
            self._rows = [row for row in self._rows if row not in group]
            return [Failed(row.id, row.index, failure) for row in group]
        events: list[Event] = []
        for i, row in enumerate(group):
            if row.broken_at is not None:
                self._rows.remove(row)
                message = f"graph 'denoise_step' gave NaN or infinity at step {row.broken_at} of picture {row.index}: "
                events.append(Failed(row.id, row.index, NotFinite(message + "export the model with --precision fp32")))
            elif denoised is not None:
                events.append(StepDone(row.id, row.index, row.step, len(row.schedule.rows), denoised[i]))
        return events

    def _begin(self, group: tuple[_Row, ...]) -> _Run:
        """Writes the group into the engine's buffers: its state, its schedule and noise until its company changes.

        What has not changed since the buffers' last user is not written again.
        """
        used = _contexts_of(group)
        length = math.lcm(*(len(context.hidden_states) for context in used))
        branches = sum(len(row.contexts) for row in group)
        _, h, w = group[0].sample.shape
        prepared = self.model.bind_step(len(group), branches, len(used), length, h, w)
        steps = min(row.steps_alike for row in group)
        if any(row.schedule.draws[row.step :].any() for row in group):
            steps = max(1, min(steps, _MOST_NOISE // (4 * len(group) * group[0].sample.size)))
        if isinstance(prepared.user, _Run):
            prepared.user.give_back()
            steps = 1  # the two are in turn
        inputs = prepared.loop.binding.inputs
        signature = tuple((row, len(row.contexts)) for row in group)
        if prepared.written != signature:
            prepared.written = None
            _write_group(group, used, inputs)
            prepared.written = signature
        for i, row in enumerate(group):
            inputs["sample"].write(i, row.sample)
            inputs["previous"].write(i, row.previous)
        schedule = np.stack([row.schedule.rows[row.step : row.step + steps] for row in group], axis=1)
        prepared.loop.begin(np.asarray(schedule, np.float32), _noise_of(group, steps))
        run = _Run(group, prepared)
        self._runs.append(run)
        return run

    def _finish(self) -> list[Event]:
        """Decodes the rows that have done their last step, those of one size together, and takes them out."""
        start = time.perf_counter()
        done = [row for row in self._rows if row.step == len(row.schedule.rows)]
        self._rows = [row for row in self._rows if row.step < len(row.schedule.rows)]
        events: list[Event] = []
        for _, same in itertools.groupby(sorted(done, key=_size), key=_size):
            for rows in _chunks(list(same), self.max_rows):
                events += self._decode(rows)
        self.seconds["decode"] += time.perf_counter() - start
        return events

    def _decode(self, rows: Sequence[_Row]) -> list[Event]:
        """Where the call fails, each row is tried in one of its own."""
        try:
            images, finite = self.model.decode(np.stack([row.sample for row in rows]))
        except OnewordError as error:
            failure = error.with_traceback(None)
            if isinstance(error, EngineError) and len(rows) > 1:
                return [event for row in rows for event in self._decode([row])]
            return [Failed(row.id, row.index, failure) for row in rows]
        events: list[Event] = []
        for row, image, ok in zip(rows, images, finite, strict=True):
            if ok:
                image = _pasted(image, row.request, row.settings)
                events.append(PictureDone(row.id, row.index, row.seed, image, row.request, row.settings))
                continue
            message = f"graph 'vae_decoder' gave NaN or infinity for picture {row.index}: "
            events.append(Failed(row.id, row.index, NotFinite(message + "export it with --precision fp32")))
        return events


def _schedule(request: Request, settings: ResolvedSettings, manifest: Manifest) -> Schedule:
    schedule = make_schedule(
        manifest.scheduler,
        settings.sampler,
        settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        guidance_interval=request.guidance_interval,
        strength=1.0 if request.image is None else request.strength,
    )
    if len(schedule.rows) == 0:
        raise UsageError(f"strength {request.strength} of {settings.steps} steps leaves no step: give more of either")
    return schedule


def _mask(request: Request, settings: ResolvedSettings) -> npt.NDArray[np.bool_] | None:
    """What is made anew, at the picture's size [H, W]."""
    if request.mask is None:
        return None
    white = request.mask if request.mask.dtype == np.bool_ else request.mask >= 128
    height, width = white.shape
    rows = np.arange(settings.height) * height // settings.height
    columns = np.arange(settings.width) * width // settings.width
    return np.asarray(white[np.ix_(rows, columns)])


def _latent_mask(mask: npt.NDArray[np.bool_], factor: int) -> Latents:
    """The mask at the latents' size [1, h, w]: a latent is made anew where any of its pixels is."""
    height, width = mask.shape
    cells = mask.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(cells.any(axis=(1, 3)), np.float32)[None]


def _pasted(image: Image, request: Request, settings: ResolvedSettings) -> Image:
    """The picture with the given one's own pixels outside the mask: the decoder changes those too, a little."""
    mask = _mask(request, settings)
    if mask is None or request.image is None or not request.paste:
        return image
    return np.where(mask[..., None], image, resized(request.image, settings.width, settings.height))


def _noise_of(group: Sequence[_Row], steps: int) -> npt.NDArray[np.float32] | None:
    """Of the group's next steps [steps, B, C, h, w], zeros where a row draws none; None where none does."""
    drawn = [row.draw(steps) for row in group]
    if all(noise is None for each in drawn for noise in each):
        return None
    table = np.zeros((steps, len(group), *group[0].sample.shape), np.float32)
    for i, each in enumerate(drawn):
        for step, noise in enumerate(each):
            if noise is not None:
                table[step, i] = noise
    return table


def _fits(group: Sequence[_Row], row: _Row) -> bool:
    if row.alone or group[0].alone:
        return False
    lengths = [len(context.hidden_states) for each in (*group, row) for context in each.contexts]
    return _size(group[0]) == _size(row) and math.lcm(*lengths) <= 2 * max(lengths)


def _chunks(rows: Sequence[_Row], size: int) -> Iterator[Sequence[_Row]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _size(row: _Row) -> tuple[int, int]:
    return row.settings.width, row.settings.height


def _contexts_of(group: Sequence[_Row]) -> list[Context]:
    """The contexts that a group's next step attends to, each once."""
    return list(dict.fromkeys(context for row in group for context in row.contexts))


def _write_group(group: Sequence[_Row], contexts: Sequence[Context], inputs: Mapping[str, Array]) -> None:
    """Writes all that stays from step to step: contexts, who attends to what, and what is masked.

    A context shorter than the others is repeated whole up to their length, which cross-attention cannot tell.
    """
    length = inputs["context"].shape[1]
    for m, context in enumerate(contexts):
        inputs["context"].write(m, np.tile(context.hidden_states, (length // len(context.hidden_states), 1)))
        if "pooled" in inputs and context.pooled is not None:
            inputs["pooled"].write(m, context.pooled)
    n = 0
    for i, row in enumerate(group):
        inputs["uncond_branch"].write(i, n)
        for context in row.contexts:
            inputs["branch_row"].write(n, i)
            inputs["branch_context"].write(n, contexts.index(context))
            n += 1
        inputs["cond_branch"].write(i, n - 1)
        inputs["mask"].write(i, 1.0 if row.mask is None else row.mask)
        inputs["known"].write(i, 0.0 if row.known is None else row.known)
        inputs["known_noise"].write(i, 0.0 if row.known_noise is None else row.known_noise)
    if "time_ids" in inputs:
        width, height = _size(group[0])
        inputs["time_ids"].write(..., [height, width, 0, 0, height, width])
