"""Slots for rows in an engine's buffers. Owns every binding of `denoise_step` and all state on the device.

Rows of one size share an Arena. Its row arrays are bound at full capacity, so a row keeps its slot until it leaves, and
no other row's state or context moves when one joins or leaves; free slots are inert. Only the number of branches N
varies, so a binding is keyed by N. State is read only when a row is done, fails or needs a preview.

    place(row) -> step() ... step() -> take(row)

On a device one step is queued ahead of the running one, and a binding's step is captured and replayed if the engine
allows it. Not covered: which rows are admitted, when a row is done, and what happens to its latents
(`oneword.runtime.scheduler`).
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import Binding, Engine, Event, Replay, ShapeUse, Stream, shape_of
from oneword.engines.errors import EngineError, FeedError, OnewordError, UsageError, without_frames
from oneword.runtime.bundle import Manifest
from oneword.runtime.contexts import Context, Sources
from oneword.runtime.events import Latents
from oneword.runtime.model import Model
from oneword.runtime.row import Row
from oneword.runtime.samplers import COLUMNS

BUCKETS: Final = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 26, 28, 30, 32)
"""Branch counts that are captured, or compiled by `warm`; other counts are padded to the next one. They are closest
where padding costs most: in small calls, and in those of 16 rows of which most have guidance."""
CONTEXTS_PER_ROW: Final = 2
"""Contexts that every row may have, whatever the engine's limits; see `Manifest.max_contexts` for the others."""
_WARM_UP: Final = 2  # runs before a capture: libraries allocate and tune in them
_MAX_ARENAS: Final = 4
_MAX_BYTES: Final = 256 << 20  # of one arena's contexts, and of its rows' state
_STATE_ARRAYS: Final = 10  # arrays of latents per row: inputs, outputs and mask

Size = tuple[int, int, int]
"""h, w and T."""


@dataclass
class Stats:
    """Counts of all runs so far."""

    steps: int = 0
    replayed: int = 0
    branches: int = 0
    padding: int = 0
    """Unused branches that pad a call to a captured size; also counted in `branches`."""
    bindings: int = 0


@dataclass(eq=False)
class _Bound:
    """A binding at one N, and the layout in its index arrays."""

    binding: Binding
    layout: object = None
    runs: int = 0
    replay: Replay | None = None


@dataclass(frozen=True, eq=False)
class _Flight:
    """A queued step: `finite` [B] may be read after `event`."""

    event: Event
    finite: npt.NDArray[np.bool_]
    rows: tuple[tuple[int, Row, int], ...]
    """(slot, row, line number)"""


@dataclass(frozen=True, eq=False)
class _Held:
    """The contexts of a row's next step, which have places in the pool."""

    sources: tuple[Sources, ...]
    contexts: tuple[Context, ...]
    """Each once."""
    places: tuple[tuple[int, ...], ...]
    """For each of the sources: those of its keys, then of its values."""


class Arena:
    """The slots of one size, and every binding of them."""

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        manifest: Manifest,
        size: Size,
        capacity: int,
        contexts: int,
        stats: Stats,
        branches: int = 1,
    ) -> None:
        """`contexts` is M; `branches` is the N of the first binding, for whose shapes a large graph may be compiled."""
        self.capacity, self.contexts, self.size = capacity, contexts, size
        self._engine, self._stream, self._stats = engine, stream, stats
        self._rows: list[Row | None] = [None] * capacity
        self._pool = _ContextPool(contexts)
        self._held: dict[Row, _Held] = {}
        self._bound: dict[int, _Bound] = {}
        self._captures = True
        self._specialized = False
        self._layout: object = None
        self._flights: deque[_Flight] = deque()
        self._turn = 0
        first = self._bind(branches)
        self._inputs, self._outputs = first.binding.inputs, first.binding.outputs
        self._captures = first.binding.capturable
        shape = self._inputs["sample"].shape
        inert = np.array([COLUMNS[name] for name in manifest.columns], np.float32)
        ring = range(stream.depth + 2)
        self._inert = np.broadcast_to(inert, (capacity, len(inert)))
        self._schedule = [stream.pinned((capacity, len(inert)), np.float32) for _ in ring]
        self._noise = [stream.pinned(shape, np.float32) for _ in ring]
        self._finite = [stream.pinned((capacity,), np.bool_) for _ in ring]

    @property
    def rows(self) -> list[Row]:
        """The rows that have a slot."""
        return [row for row in self._rows if row is not None]

    @property
    def reserved_contexts(self) -> int:
        """The most contexts that the rows can need in one step."""
        return sum(row.most_contexts for row in self.rows)

    def place(self, row: Row) -> bool:
        """Gives a row a free slot and writes its state; False if there is none, or too little room for its contexts.

        Raises UsageError if there would be too little room for them without any other row.
        """
        if row.most_contexts > self.contexts:
            raise UsageError(
                f"the words of a picture's prompts need {row.most_contexts} contexts, an engine call has room for "
                f"{self.contexts}: use fewer words with output vectors or shorter prompts, or build the plans again, "
                "with ti-export and a larger --max-batch"
            )
        if None not in self._rows or row.most_contexts > self.contexts - self.reserved_contexts:
            return False
        slot = self._rows.index(None)
        try:
            self._write(row, slot)
        except BaseException:
            if row in self._held:
                self._pool.forget(self._held.pop(row).contexts)
            raise
        self._rows[slot] = row
        return True

    def _write(self, row: Row, slot: int) -> None:
        """Writes a row's contexts and state."""
        self._write_contexts(row)
        values: Mapping[str, npt.ArrayLike] = {
            "sample": row.sample,
            "previous": row.previous,
            "previous2": row.previous2,
            "mask": 1.0 if row.mask is None else row.mask,
            "known": 0.0 if row.known is None else row.known,
            "known_noise": 0.0 if row.known_noise is None else row.known_noise,
            "time_ids": row.time_ids,
        }
        for name, value in values.items():
            if name in self._inputs:
                self._inputs[name].write(slot, value)

    def remove(self, row: Row) -> None:
        """Frees a row's slot, which becomes inert."""
        slot = self._rows.index(row)
        if row.broken_at is not None:  # inert slots must hold finite numbers
            for name in ("sample", "previous", "previous2"):
                self._inputs[name].write(slot, 0.0)
        self._rows[slot] = None
        self._pool.release(self._held.pop(row).contexts)

    def step(self) -> None:
        """Queues one step of every row, and waits for the step before the running one. Raises EngineError."""
        live = [(slot, row) for slot, row in enumerate(self._rows) if row is not None]
        for _, row in live:
            if row.sources != self._held[row].sources:  # the prompt changes from step to step, or the stage does
                self._write_contexts(row)
        turn = self._turn = (self._turn + 1) % len(self._schedule)
        bound = self._lay_out(live)
        schedule, noise, finite = self._schedule[turn], self._noise[turn], self._finite[turn]
        schedule[...] = self._inert
        drawn = False
        for slot, row in live:
            schedule[slot] = row.lines[row.line]
            if (values := row.draw()) is not None:
                noise[slot], drawn = values, True
        self._stream.upload(self._inputs["schedule"], schedule)
        if drawn:
            self._stream.upload(self._inputs["noise"], noise)
        self._run(bound)
        self._stream.download(finite, self._outputs["finite"])
        rows = tuple((slot, row, row.line + 1) for slot, row in live)
        self._flights.append(_Flight(self._stream.record(), finite, rows))
        for _, row in live:
            row.began()
            row.noise.prefetch()
        while len(self._flights) > self._stream.depth:
            self._land()

    def settle(self) -> None:
        """Waits for every queued step, and marks the rows that produced NaN. Raises EngineError."""
        while self._flights:
            self._land()

    def sample(self, row: Row) -> Latents:
        """A row's state after its last step [C, h, w]. Waits."""
        return self._inputs["sample"].read(self._rows.index(row))

    def denoised(self, row: Row) -> Latents:
        """The model's estimate of a row's picture after its last step [C, h, w]. Waits."""
        return self._inputs["previous"].read(self._rows.index(row))

    def clear(self) -> list[Row]:
        """Removes and returns every row, with its state. Raises EngineError if the state cannot be read."""
        self.settle()
        rows = self.rows
        for row in rows:
            slot = self._rows.index(row)
            row.sample, row.previous, row.previous2 = (
                self._inputs[name].read(slot) for name in ("sample", "previous", "previous2")
            )
        self._rows = [None] * self.capacity
        return rows

    def warm(self) -> None:
        """Runs a step of inert rows at every number of branches; compiles or captures it if the engine benefits."""
        if self.rows:
            raise UsageError("the warm-up would overwrite pictures in progress: warm up before requests are added")
        self.settle()
        self._specialized = self._engine.shape_use is ShapeUse.PADDED
        schedule = self._schedule[0]
        schedule[...] = self._inert
        self._stream.upload(self._inputs["schedule"], schedule)
        for bound in self.bind():
            bound.binding.specialize()
            for _ in range(_WARM_UP + 1 if self._captures else 1):
                self._run(bound, count=False)
        self._stream.record().wait()
        self.bind()  # if nothing can be captured after all, other numbers of branches occur too

    def bind(self) -> list[_Bound]:
        """Binds a step at every number of branches that can occur, and runs none."""
        numbers = range(1, 2 * self.capacity + 1)
        return [self._bound.get(n) or self._bind(n) for n in numbers if n == self._padded(n)]

    def _land(self) -> None:
        flight = self._flights.popleft()
        flight.event.wait()
        for slot, row, line in flight.rows:
            if row.broken_at is None and not flight.finite[slot]:
                row.broken_at = line

    def _lay_out(self, live: list[tuple[int, Row]]) -> _Bound:
        """The binding for the branches of these rows; its index arrays are written if the layout has changed."""
        branches = [(slot, places) for slot, row in live for places in self._held[row].places[-row.branches :]]
        n = self._padded(len(branches))
        self._stats.branches, self._stats.padding = self._stats.branches + n, self._stats.padding + n - len(branches)
        layout = tuple(branches)
        bound = self._bound.get(n) or self._bind(n)
        if bound.layout != layout:
            bound.layout = None
            padded = branches + branches[:1] * (n - len(branches))
            inputs = bound.binding.inputs
            contexts = np.empty(inputs["branch_context"].shape, np.int64)
            for sources, (_, places) in zip(contexts, padded, strict=True):
                sources[...] = np.reshape(places, (2, -1))  # of each layer, or of all
            inputs["branch_row"].write(..., np.array([slot for slot, _ in padded], np.int64))
            inputs["branch_context"].write(..., contexts)
            if "branch_pooled" in inputs:
                inputs["branch_pooled"].write(..., contexts[:, 0, 0])  # the same in all contexts of a prompt
            bound.layout = layout
        if self._layout != layout:
            self._layout = None
            first, last = np.zeros(self.capacity, np.int64), np.zeros(self.capacity, np.int64)
            for i, (slot, _) in enumerate(branches):
                last[slot] = i
                if i == 0 or branches[i - 1][0] != slot:
                    first[slot] = i
            self._inputs["uncond_branch"].write(..., first)
            self._inputs["cond_branch"].write(..., last)
            self._layout = layout
        return bound

    def _padded(self, branches: int) -> int:
        if not (self._captures or self._specialized):
            return branches
        limit = 2 * self.capacity
        return next((n for n in BUCKETS if branches <= n <= limit), min(-(-branches // 8) * 8, limit))

    def _bind(self, n: int) -> _Bound:
        h, w, t = self.size
        sizes = {"B": self.capacity, "N": n, "M": self.contexts, "T": t, "h": h, "w": w}
        specs = self._engine.inputs
        unshared = {name for name, spec in specs.items() if "N" in spec.axes}
        shared = {name: array for name, array in self._inputs.items() if name not in unshared} if self._bound else {}
        shapes = {name: shape_of(self._engine.name, spec, sizes) for name, spec in specs.items() if name not in shared}
        bound = _Bound(self._engine.bind(shapes, shared, self._outputs if self._bound else {}))
        self._bound[n] = bound
        self._stats.bindings += 1
        return bound

    def _run(self, bound: _Bound, count: bool = True) -> None:
        if self._captures and bound.replay is None and bound.runs >= _WARM_UP:
            try:
                bound.replay = self._stream.capture(lambda: self._advance(bound.binding))
            except EngineError:
                self._captures = False  # do not try again
        if bound.replay is not None:
            bound.replay()
        else:
            self._advance(bound.binding)
        bound.runs += 1
        if count:
            self._stats.steps += 1
            self._stats.replayed += bound.replay is not None

    def _advance(self, binding: Binding) -> None:
        """Queues one run of the graph, then copies its outputs to its inputs."""
        self._stream.run(binding)
        self._stream.copy(self._inputs["previous2"], self._inputs["previous"])
        self._stream.copy(self._inputs["previous"], self._outputs["denoised"])
        self._stream.copy(self._inputs["sample"], self._outputs["next_sample"])

    def _write_contexts(self, row: Row) -> None:
        """Holds the contexts of a row's next step in place of those of its last one, and writes those that are not in
        the pool. One shorter than T is repeated, which is exact."""
        contexts = dict.fromkeys(context for sources in row.sources for context in sources.contexts)
        before = dict.fromkeys(self._held[row].contexts if row in self._held else ())
        self._pool.release(context for context in before if context not in contexts)
        places = [(c, self._pool.hold(c)) for c in contexts if c not in before]  # all, before any write can fail
        indices = tuple(sources.indices(self._pool.slots) for sources in row.sources)
        self._held[row] = _Held(row.sources, tuple(contexts), indices)
        for context, place in places:
            if place is not None:
                states = context.hidden_states
                repeats = self.size[2] // len(states)
                self._inputs["context"].write(place, states if repeats == 1 else np.tile(states, (repeats, 1)))
                if "pooled" in self._inputs and context.pooled is not None:
                    self._inputs["pooled"].write(place, context.pooled)
                if "context_mask" in self._inputs:
                    mask = np.ones(len(states), np.float32) if context.mask is None else context.mask
                    self._inputs["context_mask"].write(place, np.tile(mask, repeats))


class _ContextPool:
    """Assigns contexts to places in `context`. One that no row uses stays until its place is needed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: OrderedDict[Context, int] = OrderedDict()
        self._rows: Counter[Context] = Counter()
        self._free = list(reversed(range(capacity)))

    def hold(self, context: Context) -> int | None:
        """Counts a row that uses a context. Returns the place to write it to, or None if it is already written."""
        self._rows[context] += 1
        if context in self.slots:
            self.slots.move_to_end(context)
            return None
        if self._free:
            place = self._free.pop()
        else:
            unused = next(candidate for candidate in self.slots if candidate not in self._rows)
            place = self.slots.pop(unused)
        self.slots[context] = place
        return place

    def forget(self, contexts: Iterable[Context]) -> None:
        """Reverses `hold` for a row that could not be written, and drops contexts that may not have been written."""
        for context in contexts:
            if self._rows[context] > 1:
                self._rows[context] -= 1
            elif context in self._rows:
                del self._rows[context]
                self._free += [self.slots.pop(context)] if context in self.slots else []

    def release(self, contexts: Iterable[Context]) -> None:
        """Reverses `hold` for a row that leaves, or does not need these contexts any more."""
        for context in contexts:
            self._rows[context] -= 1
            if not self._rows[context]:
                del self._rows[context]


@dataclass(eq=False)
class Denoiser:
    """Every arena of a model: at most `max_rows` rows of a size share an engine call.

    If a step fails, the rows of its arena continue in one of half the capacity, and those without a slot there wait in
    `displaced` with their last state. Only a row that fails alone is reported.

    An arena has two contexts for each row, as ordinary pictures need. Once a row needs more, its arena is replaced by
    one with as many as `contexts` says.
    """

    model: Model
    max_rows: int
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self._arenas: OrderedDict[Size, Arena] = OrderedDict()
        self._reduced: dict[Size, int] = {}
        # Sizes whose arenas need more than two contexts per row, with why they have no more; None if they have.
        self._shortages: dict[Size, OnewordError | None] = {}
        self.displaced: deque[Row] = deque()

    @property
    def rows(self) -> list[Row]:
        """The rows that have a slot."""
        return [row for arena in self._arenas.values() for row in arena.rows]

    def capacity(self, size: Size) -> int:
        """How many rows of a size can share an engine call. Opens the engine, and raises as that does."""
        limits = self.model.engine("denoise_step").limits
        count = min(self.max_rows, limits.get("B", self.max_rows), limits.get("N", 2 * self.max_rows) // 2)
        count = min(count, limits.get("M", CONTEXTS_PER_ROW * count) // CONTEXTS_PER_ROW)
        h, w, tokens = size
        context_bytes = 4 * tokens * self.model.manifest.context_width
        state_bytes = 4 * h * w * _STATE_ARRAYS * self.model.manifest.vae.latent_channels
        count = min(count, _MAX_BYTES // (CONTEXTS_PER_ROW * context_bytes), _MAX_BYTES // state_bytes)
        return max(1, min(count, self._reduced.get(size, count)))

    def contexts(self, size: Size, capacity: int) -> int:
        """The most that M of an arena can be now: that of `most_contexts`, unless there was no memory or no plan."""
        return self.most_contexts(size, capacity) if self._shortages.get(size) is None else CONTEXTS_PER_ROW * capacity

    def most_contexts(self, size: Size, capacity: int) -> int:
        """The most that M of an arena may be: `Manifest.max_contexts`, as far as the engine's limit and 256 MiB
        allow."""
        manifest = self.model.manifest
        limit = _MAX_BYTES // (4 * size[2] * manifest.context_width)
        limit = min(limit, self.model.engine("denoise_step").limits.get("M", limit))
        return max(CONTEXTS_PER_ROW * capacity, min(limit, manifest.max_contexts(capacity)))

    def warm(self, size: Size) -> None:
        """Creates an arena and runs every number of branches, so that no later step binds or captures."""
        self._arena(size).warm()

    def bind(self, size: Size) -> None:
        """Creates an arena and binds every number of branches, so that no later step does. Raises EngineError,
        FeedError."""
        self._arena(size).bind()

    def prepare(self, size: Size, branches_per_row: int, contexts: int) -> None:
        """Creates the arena that rows of this size, with so many branches and contexts, will get. Raises EngineError,
        FeedError."""
        self._arena_for(size, branches_per_row, contexts)

    def has_room(self, size: Size, contexts: int = CONTEXTS_PER_ROW) -> bool:
        """Whether a new row of this size, with so many contexts, would get a slot now; displaced rows come first."""
        arena = self._arenas.get(size)
        if arena is None:
            return not self._displaced(size) and sum(bool(a.rows) for a in self._arenas.values()) < _MAX_ARENAS
        return not self._displaced(size) and len(arena.rows) < arena.capacity and self._has_contexts(arena, contexts)

    def lacks_contexts(self, size: Size, contexts: int) -> bool:
        """Whether there is a slot for a row of this size, but not enough room for so many contexts."""
        arena = self._arenas.get(size)
        return arena is not None and len(arena.rows) < arena.capacity and not self._has_contexts(arena, contexts)

    def _has_contexts(self, arena: Arena, contexts: int) -> bool:
        """Whether so many contexts are free; also if they never can be, which `place` then refuses."""
        room = self.contexts(arena.size, arena.capacity)
        return contexts <= room - arena.reserved_contexts or contexts > room

    def crowded_out(self, size: Size) -> bool:
        """Whether this size has no arena and cannot get one, because all are in use."""
        return size not in self._arenas and not self.has_room(size)

    def place(self, row: Row) -> bool:
        """Gives a row a slot; False if there is no room. Raises EngineError, FeedError, UsageError."""
        if self._displaced(row.size):
            return False
        self._arena_for(row.size, row.branches, row.most_contexts)
        return not self._displaced(row.size) and self._place(row)

    def remove(self, row: Row) -> None:
        """Removes a row, placed or displaced; does nothing for any other row."""
        if row in self.displaced:
            self.displaced.remove(row)
        for arena in self._holding(row):
            arena.remove(row)
            self._release_reduced(arena)

    def take(self, row: Row) -> Latents:
        """Removes a finished row and returns its latents [C, h, w]. Waits. Raises EngineError."""
        [arena] = self._holding(row)
        arena.settle()
        sample = arena.sample(row)
        self.remove(row)
        return sample

    def denoised(self, row: Row) -> Latents:
        """The model's current estimate of a row's picture [C, h, w], for a preview. Waits. Raises EngineError."""
        [arena] = self._holding(row)
        arena.settle()
        return arena.denoised(row)

    def step(self) -> list[tuple[Row, OnewordError]]:
        """Runs one step of every row that has a slot. Returns the rows that cannot continue, each with its error."""
        failures: list[tuple[Row, OnewordError]] = []
        for _ in range(len(self.displaced)):
            row = self.displaced.popleft()
            try:
                self._arena_for(row.size, row.branches, row.most_contexts)
                placed = self._place(row)
            except OnewordError as error:
                failures.append((row, without_frames(error)))
                continue
            if not placed:
                self.displaced.append(row)
        for size in [size for size, arena in self._arenas.items() if arena.rows]:
            failures += self._step(size)
        return failures

    def _step(self, size: Size) -> Iterator[tuple[Row, OnewordError]]:
        before = [row.line for row in self._arenas[size].rows]
        try:
            self._arenas[size].step()
            return
        except OnewordError as error:
            failure = without_frames(error)  # frames would keep the buffers alive
        rows, capacity = self._arenas[size].rows, self._arenas[size].capacity
        idle = any(not arena.rows for arena in self._arenas.values())
        retry = isinstance(failure, EngineError) and (len(rows) > 1 or idle) and before == [row.line for row in rows]
        if retry:
            try:
                self._arenas[size].clear()
            except EngineError:
                retry = False
        if not retry:
            self._delete(size)
            yield from ((row, failure) for row in rows)
            return
        del self._arenas[size]  # and its buffers, before new ones are allocated
        self._forget_idle(len(self._arenas))
        self._reduced[size] = max(1, min(capacity, len(rows)) // 2)
        if size in self._shortages:  # fewer rows may leave memory for more contexts
            self._shortages[size] = None
        self.displaced.extendleft(reversed(rows))
        yield from self._resume(size)

    def _resume(self, size: Size) -> Iterator[tuple[Row, OnewordError]]:
        """Places the displaced rows of a size as far as they fit, and repeats the step that failed."""
        for row in self._displaced(size):
            try:
                self._arena_for(size, row.branches, row.most_contexts)
            except OnewordError as error:
                failure = without_frames(error)
                failed = self._displaced(size)
                for other in failed:
                    self.displaced.remove(other)
                yield from ((other, failure) for other in failed)
                return
            try:
                placed = self._place(row)
            except OnewordError as error:  # of this row alone
                self.displaced.remove(row)
                yield row, without_frames(error)
                continue
            if not placed:
                break
            self.displaced.remove(row)
        if self._arenas[size].rows:
            yield from self._step(size)
        else:
            self._release_reduced(self._arenas[size])

    def _place(self, row: Row) -> bool:
        """Gives a row a slot of its size's arena, which exists; False if there is no room. Raises EngineError if memory
        is too short for its contexts, and as `Arena.place` does."""
        arena, shortage = self._arenas[row.size], self._shortages.get(row.size)
        try:
            enough = self.most_contexts(row.size, arena.capacity)
            if arena.contexts < row.most_contexts <= enough and isinstance(shortage, EngineError):
                raise EngineError(
                    f"the words of a picture's prompts need {row.most_contexts} contexts, an engine call has room for "
                    f"{arena.contexts} while memory is short: try again later, or use fewer words with output vectors"
                ) from shortage
            return arena.place(row)
        except OnewordError:
            self._release_reduced(arena)
            raise

    def _release_reduced(self, arena: Arena) -> None:
        """Releases an arena without rows that has less than full capacity, or fewer contexts than it was to have, so
        that the next one of its size gets all of them if it can."""
        size = arena.size
        if (
            not arena.rows
            and not self._displaced(size)
            and (size in self._reduced or self._shortages.get(size) is not None)
        ):
            self._delete(size)

    def _forget_idle(self, count: int) -> None:
        """Releases up to `count` arenas without rows, least recently used first."""
        for size in [size for size, arena in self._arenas.items() if not arena.rows][: max(0, count)]:
            self._delete(size)

    def _delete(self, size: Size) -> None:
        """Releases an arena. Displaced rows of its size are then placed in one of the same capacity."""
        del self._arenas[size]
        if not self._displaced(size):
            self._forget_limits(size)

    def _forget_limits(self, size: Size) -> None:
        """The next arena of a size has full capacity and two contexts per row again."""
        self._reduced.pop(size, None)
        self._shortages.pop(size, None)

    def _arena_for(self, size: Size, branches_per_row: int, contexts: int) -> Arena:
        """The arena of a size, with room for a row of so many contexts if it can have it."""
        if contexts > CONTEXTS_PER_ROW and size not in self._shortages:
            if size in self._arenas:
                self._widen(size, branches_per_row)
            else:
                self._shortages[size] = None
        return self._arena(size, branches_per_row)

    def _widen(self, size: Size, branches_per_row: int) -> None:
        """Replaces an arena by one with more contexts, and places its rows there. Raises EngineError; rows without a
        slot are then displaced."""
        rows = self._arenas[size].clear()
        del self._arenas[size]  # and its buffers, before new ones are allocated
        self._shortages[size] = None
        self.displaced.extendleft(reversed(rows))
        for row in rows:
            if not self._arena(size, branches_per_row).place(row):
                break
            self.displaced.remove(row)

    def _arena(self, size: Size, branches_per_row: int = 0) -> Arena:
        """The arena of a size. A new one is first bound for rows of so many branches; 0 means a single branch.

        If memory is short, arenas without rows are released. If there is no memory or no plan for more contexts, the
        arena has two per row; if the engine has no plan for full capacity either, that is halved, and more contexts are
        tried again. If there is no arena in the end, the next one is tried in full again.
        """
        try:
            self._open_arena(size, branches_per_row)
        except OnewordError:
            self._forget_limits(size)
            raise
        self._arenas.move_to_end(size)
        return self._arenas[size]

    def _open_arena(self, size: Size, branches_per_row: int) -> None:
        """Creates the arena of a size, unless it exists."""
        while size not in self._arenas:
            self._forget_idle(len(self._arenas) + 1 - _MAX_ARENAS)
            capacity, retry = self.capacity(size), False
            try:
                self._arenas[size] = self._new_arena(size, capacity, max(1, capacity * branches_per_row))
            except FeedError as error:
                if self._is_wide(size):
                    self._shortages[size] = without_frames(error)
                elif capacity == 1:
                    raise
                else:
                    self._reduced[size] = capacity // 2
                    if size in self._shortages:
                        self._shortages[size] = None
            except EngineError as error:
                retry = any(not arena.rows for arena in self._arenas.values())
                if not (retry or self._is_wide(size)):
                    raise
                if not retry:
                    self._shortages[size] = without_frames(error)
            if retry:  # outside the handler, whose traceback keeps the allocated memory alive
                self._forget_idle(len(self._arenas))

    def _is_wide(self, size: Size) -> bool:
        """Whether the arena of a size has, or is to have, more than two contexts per row."""
        return size in self._shortages and self._shortages[size] is None

    def _new_arena(self, size: Size, capacity: int, branches: int) -> Arena:
        engine, manifest = self.model.engine("denoise_step"), self.model.manifest
        contexts = self.most_contexts(size, capacity) if self._is_wide(size) else CONTEXTS_PER_ROW * capacity
        return Arena(engine, self.model.stream, manifest, size, capacity, contexts, self.stats, branches)

    def _displaced(self, size: Size) -> list[Row]:
        return [row for row in self.displaced if row.size == size]

    def _holding(self, row: Row) -> list[Arena]:
        return [arena for arena in self._arenas.values() if row in arena.rows]
