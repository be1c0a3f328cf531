"""Rows that join late, leave early, are cancelled or fail, without an effect on other rows."""

import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

from oneword.engines.errors import EngineError, FeedError, NotFinite, UsageError
from oneword.engines.onnxruntime import OnnxRuntimeBinding
from oneword.runtime import denoiser
from oneword.runtime.concept import Concept
from oneword.runtime.denoiser import Arena
from oneword.runtime.drawing import draw, generate
from oneword.runtime.events import Event, Failed, PictureDone, StepDone
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.row import Row
from oneword.runtime.samplers import Sampler
from oneword.runtime.scheduler import Scheduler

WORDS = [f"<w{i}>" for i in range(8)]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    """With eight words of one to three vectors, and one for which the text encoder returns NaN."""
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    random = np.random.default_rng(0)
    for i, token in enumerate([*WORDS, "<broken>"]):
        model.load(Concept(token, {"text_encoder": random.normal(0, 0.5, (1 + i % 3, 32)).astype(np.float32)}))
    [table], broken = model._tables.values(), model._words["<broken>"]
    [ids] = table.place({broken.identity: broken.vectors["text_encoder"]}).values()
    table.array.write(list(ids), np.nan)
    return model


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[npt.NDArray[np.float32]]]:
    """By seed: a row's first sample, and the noise fed to the engine at each step that draws."""
    fed: dict[int, list[npt.NDArray[np.float32]]] = defaultdict(list)
    place, step = Arena.place, Arena.step

    def recorded_place(arena: Arena, row: Row) -> bool:
        placed = place(arena, row)
        if placed and row.line == 0:
            fed[row.seed].append(arena.sample(row))
        return placed

    def recorded_step(arena: Arena) -> None:
        drawing = [(slot, row) for slot, row in enumerate(arena._rows) if row and row.schedule.draws[row.line]]
        step(arena)
        for slot, row in drawing:
            fed[row.seed].append(arena._inputs["noise"].read(slot))

    monkeypatch.setattr(Arena, "place", recorded_place)
    monkeypatch.setattr(Arena, "step", recorded_step)
    return fed


def run(scheduler: Scheduler) -> Iterator[Event]:
    while scheduler:
        yield from scheduler.step()


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-9))


def pictures_of(model: Model, requests: Sequence[Request], max_rows: int = 16) -> dict[int, Image]:
    """Pictures by seed."""
    return {picture.seed: picture.image for picture in draw(model, *requests, max_rows=max_rows)}


def mixed() -> list[Request]:
    """Eight rows that share only their size, one per sampler."""
    return [
        Request(
            f"a photo of {WORDS[i % len(WORDS)]}" + " and a red cat" * (3 * (i % 3)),
            negative_prompt=[None, WORDS[-1], "blue"][i % 3],
            seed=100 + i,
            steps=4 + i,
            sampler=sampler,
            guidance_scale=1.0 + i,
            guidance_rescale=0.5 * (i == 6),
            eta=0.5 * (i == 0),
            clip_skip=i % 2,
            guidance_interval=(0.5, 5.0) if i == 5 else None,
        )
        for i, sampler in enumerate(Sampler)
    ]


def test_rows_that_differ_in_everything_match_their_pictures_alone_and_their_noise_bit_for_bit(
    model: Model, fed: dict[int, list[npt.NDArray[np.float32]]]
) -> None:
    together = pictures_of(model, mixed())
    shared = dict(fed)
    fed.clear()

    assert len(together) == len(Sampler)
    for request in mixed():
        alone = pictures_of(model, [request])
        assert near(together[request.seed], alone[request.seed])
        assert len(shared[request.seed]) >= 1
        np.testing.assert_array_equal(shared[request.seed], fed[request.seed])


def near(image: Image, reference: Image) -> bool:
    """Whether no pixel differs by more than 1, the effect of summing in another order in fp32."""
    return bool(np.abs(image.astype(int) - reference).max() <= 1)


def scene(size: int = 64) -> Image:
    y, x = np.mgrid[:size, :size] / size
    return (np.stack([x, y, (x - 0.5) ** 2 + (y - 0.5) ** 2], axis=-1) * 255).astype(np.uint8)


def left_half() -> npt.NDArray[np.bool_]:
    mask = np.zeros((64, 64), np.bool_)
    mask[:, :32] = True
    return mask


REQUESTS = [
    Request("a cat", seed=10, steps=3, sampler=Sampler.EULER_A),
    Request(f"a {WORDS[0]} and a {WORDS[1]}", seed=20, steps=5, sampler=Sampler.DPMPP_2M),
    Request(f"a ring, {WORDS[2]}", seed=30, steps=4, guidance_scale=1.0, num_images=2),
    Request("a blue star", seed=40, steps=4, image=scene(), strength=0.75),
    Request("a blue star", seed=50, steps=4, image=scene(), mask=left_half(), strength=1.0),
]
"""The seeds of their pictures are 10, 20, 30, 31, 40 and 50."""


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[int, Image]:
    """Every picture of REQUESTS, each request generated alone."""
    return {seed: image for request in REQUESTS for seed, image in pictures_of(model, [request]).items()}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_join_late_leave_early_or_fail_do_not_affect_other_rows(
    model: Model, alone: dict[int, Image], data: st.DataObject
) -> None:
    ends = st.sampled_from(["done", "done", "cancelled", "NaN"])
    plans = [(request, data.draw(st.integers(0, 5)), data.draw(ends)) for request in REQUESTS]
    plans += [(Request("a <broken>", seed=90, steps=2), data.draw(st.integers(0, 5)), "NaN")]
    scheduler, fates = Scheduler(model, max_rows=data.draw(st.integers(1, 6))), {}
    done: dict[int, Image] = {}
    failed: dict[int, Failed] = {}
    broken: set[Row] = set()
    turn = 0
    while turn < 6 or scheduler:
        for request, join, end in plans:
            if join == turn:
                fates[scheduler.add(request)] = request, join, end
        for id, (_, join, end) in fates.items():
            if end == "cancelled" and turn == join + 1:
                scheduler.cancel(id)
        for row in scheduler.denoiser.rows:
            if fates[row.id][2] == "NaN" and row not in broken:
                [arena] = scheduler.denoiser._holding(row)
                arena._inputs["sample"].write(arena._rows.index(row), np.nan)
                broken.add(row)
        for event in scheduler.step():
            if isinstance(event, PictureDone):
                done[event.seed] = event.image
            if isinstance(event, Failed):
                failed[fates[event.id][0].seed + event.index] = event
        turn += 1

    assert len(scheduler) == 0
    assert scheduler.denoiser.rows == []
    seeds = {"done": set[int](), "cancelled": set[int](), "NaN": set[int]()}
    for request, _, end in fates.values():
        seeds[end] |= {request.seed + i for i in range(request.num_images)}
    assert seeds["done"] <= done.keys() <= seeds["done"] | seeds["cancelled"]
    assert failed.keys() == seeds["NaN"]
    assert all(isinstance(event.error, NotFinite) for event in failed.values())
    for seed, image in done.items():
        assert near(image, alone[seed])


def test_final_latents_in_a_batch_are_within_rounding_of_those_alone(model: Model) -> None:
    """In fp32, within 1e-4 of their largest value."""
    together, single = (final_latents(model, requests) for requests in (mixed(), None))

    for seed, latents in single.items():
        assert np.abs(together[seed] - latents).max() <= 1e-4 * np.abs(latents).max()


def final_latents(model: Model, requests: Sequence[Request] | None) -> dict[int, npt.NDArray[np.float32]]:
    """The final latents of these requests together; if None, of `mixed` one by one."""
    latents: dict[int, npt.NDArray[np.float32]] = {}
    for group in [requests] if requests is not None else [[request] for request in mixed()]:
        scheduler = Scheduler(model)
        for request in group:
            scheduler.add(request)
        take = scheduler.denoiser.take

        def record(row: Row, take: Any = take) -> npt.NDArray[np.float32]:
            latents[row.seed] = take(row)
            return latents[row.seed]

        scheduler.denoiser.take = record  # type: ignore[method-assign]
        for _ in run(scheduler):
            pass
    return latents


def test_an_edit_keeps_every_pixel_outside_the_mask_and_regenerates_the_rest(model: Model) -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[13:47, 21:50] = True  # not multiples of 8
    image = pictures_of(model, [Request("a blue star", image=scene(), mask=mask, strength=1.0, steps=4)])[0]

    np.testing.assert_array_equal(image[~mask], scene()[~mask])
    assert psnr(image[mask], scene()[mask]) < 25


def test_an_edit_without_pasting_keeps_the_latents_outside_the_mask(model: Model) -> None:
    """The pixels there still change: the decoder has a wide field of view."""
    scheduler = Scheduler(model)
    scheduler.add(Request("a blue star", image=scene(), mask=left_half(), strength=1.0, steps=5, paste=False))
    scheduler.step()
    [row] = scheduler.denoiser.rows
    take, final = scheduler.denoiser.take, []
    scheduler.denoiser.take = lambda row: final.append(take(row)) or final[0]  # type: ignore[method-assign, func-returns-value]
    *_, event = run(scheduler)

    assert row.known is not None
    np.testing.assert_allclose(final[0][:, :, 4:], row.known[:, :, 4:], atol=1e-5)
    assert np.abs(final[0] - row.known)[:, :, :4].max() > 0.1
    decoded, _ = model.decode(final[0][None])
    assert isinstance(event, PictureDone)
    np.testing.assert_array_equal(event.image, decoded[0])


def test_one_white_pixel_is_enough_for_an_edit(model: Model) -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[30, 30] = True  # not the first pixel of its latent
    image = pictures_of(model, [Request("a blue star", image=scene(), mask=mask, strength=1.0, steps=4)])[0]

    changed = (image != scene()).any(-1)
    assert changed[30, 30]
    assert changed.sum() == 1


def test_a_mask_is_stretched_with_its_picture(model: Model) -> None:
    image = pictures_of(
        model, [Request("a star", image=scene(), mask=left_half(), strength=1.0, steps=2, size=(128, 32))]
    )[0]

    changed = (image != np.asarray(_stretched(scene()))).any(-1)
    assert image.shape == (32, 128, 3)
    assert changed[:, :64].mean() > 0.9
    assert not changed[:, 64:].any()


def _stretched(image: Image) -> Any:
    import PIL.Image

    return PIL.Image.fromarray(image).resize((128, 32), PIL.Image.Resampling.LANCZOS)


def test_pictures_are_the_same_with_any_number_of_steps_per_turn(model: Model) -> None:
    requests = [*mixed(), *REQUESTS]
    expected = {e.seed: e.image for e in generate(model, requests) if isinstance(e, PictureDone)}
    scheduler = Scheduler(model)
    for request in requests:
        scheduler.add(request)
    turns = 0
    events = []
    while scheduler:
        events += scheduler.step(max_steps=None)
        turns += 1
    pictures = [event for event in events if isinstance(event, PictureDone)]

    assert turns <= len(pictures)
    assert {event.seed for event in pictures} == expected.keys()
    for event in pictures:
        assert near(event.image, expected[event.seed])


def test_a_preview_ends_a_turn_of_many_steps(model: Model) -> None:
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", steps=10, previews=4))
    steps = [[e.step for e in scheduler.step(None) if isinstance(e, StepDone)] for _ in range(3)]

    assert steps == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_previews_come_at_chosen_steps_but_never_at_the_last(model: Model) -> None:
    events = generate(model, [Request("a cat", steps=6, previews=frozenset({1, 2, 5, 6, 40}))])

    assert [e.step for e in events if isinstance(e, StepDone) and e.denoised is not None] == [1, 2, 5]


def test_a_row_keeps_its_slot_and_its_context_while_other_rows_join_and_leave(model: Model) -> None:
    scheduler = Scheduler(model, max_rows=4)
    ids = [scheduler.add(Request(f"a {WORDS[i]}", seed=i, steps=6 + i)) for i in range(3)]
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()
    slots = [row and row.id for row in arena._rows]
    writes: list[object] = []
    context = arena._inputs["context"]
    write = context.write
    context.write = lambda region, values: (writes.append(region), write(region, values))  # type: ignore[method-assign]
    scheduler.cancel(ids[1])
    scheduler.add(Request("a red cat", seed=9, steps=3))
    scheduler.step()

    assert slots == [ids[0], ids[1], ids[2], None]
    assert [row and row.id for row in arena._rows] == [ids[0], 3, ids[2], None]
    assert len(writes) == 1  # the newcomer's prompt; the shared empty prompt is already there


@pytest.mark.parametrize("prepare", [Scheduler.warm, Scheduler.bind])
def test_nothing_is_bound_after_the_warm_up(model: Model, prepare: Callable[[Scheduler], None]) -> None:
    scheduler = Scheduler(model, max_rows=4)
    prepare(scheduler)
    bindings = scheduler.denoiser.stats.bindings
    for request in [*mixed()[:2], *REQUESTS]:
        scheduler.add(request)
    for _ in run(scheduler):
        pass
    one_chunk = [arena for size, arena in scheduler.denoiser._arenas.items() if size == (8, 8, 20)]

    assert len(one_chunk) == 1
    assert bindings == 8
    assert len(one_chunk[0]._bound) == 8


def test_two_sizes_have_two_arenas_and_neither_is_bound_again(model: Model) -> None:
    scheduler = Scheduler(model, max_rows=2)
    for turn in range(6):
        scheduler.add(Request("a cat", seed=turn, steps=3, size=[(64, 64), (32, 64)][turn % 2]))
        scheduler.step()
    for _ in run(scheduler):
        pass

    assert len(scheduler.denoiser._arenas) == 2
    assert scheduler.denoiser.stats.bindings == sum(len(a._bound) for a in scheduler.denoiser._arenas.values()) <= 8


def test_an_empty_negative_prompt_is_one_context_for_all_rows(model: Model) -> None:
    scheduler = Scheduler(model)
    for seed in range(5):
        scheduler.add(Request(f"a {WORDS[seed]}", seed=seed, steps=2))
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()

    assert len(arena._pool.slots) == 6


def test_pictures_without_a_slot_wait_and_are_generated_later(model: Model) -> None:
    requests = [Request("a cat", seed=10 * i, num_images=3, steps=3 + i) for i in range(3)]
    expected = pictures_of(model, requests)
    queued = pictures_of(model, requests, max_rows=2)

    assert queued.keys() == expected.keys()
    assert all(near(queued[seed], image) for seed, image in expected.items())


def failing(monkeypatch: pytest.MonkeyPatch, refuses: Any) -> list[int]:
    """Makes `denoise_step` fail if `refuses(inputs)`. Returns a growing list with the live rows of every call."""
    run_graph, calls = OnnxRuntimeBinding.run, list[int]()

    def maybe(binding: OnnxRuntimeBinding, stream: int | None = None) -> None:
        if "sample" in binding.inputs:
            inputs = {name: array.numpy() for name, array in binding.inputs.items()}
            calls.append(len(set(inputs["branch_row"].tolist())))
            if refuses(inputs):
                raise EngineError("out of memory")
        run_graph(binding, stream)

    monkeypatch.setattr(OnnxRuntimeBinding, "run", maybe)
    return calls


@pytest.mark.parametrize("limit", [1, 2])
def test_rows_that_do_not_fit_into_memory_together_take_turns_and_keep_their_noise(
    model: Model, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    requests = [Request("a cat", seed=seed, steps=5, sampler=Sampler.EULER_A) for seed in range(5)]
    alone = {seed: pictures_of(model, [request])[seed] for seed, request in enumerate(requests)}
    steps: list[None] = []

    def no_room(inputs: dict[str, Any]) -> bool:
        steps.append(None)
        return len(steps) > 2 and len(inputs["sample"]) > limit

    calls = failing(monkeypatch, no_room)
    together = pictures_of(model, requests)

    assert calls[:3] == [5, 5, 5]
    assert max(calls[5:]) <= limit
    for seed, image in alone.items():
        assert near(together[seed], image)


def test_a_row_that_fails_alone_is_reported_and_the_others_return_to_full_capacity(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda inputs: (inputs["sample"][inputs["branch_row"]] == np.float32(7)).any())
    scheduler = Scheduler(model, max_rows=4)
    first, bad, last = (scheduler.add(Request("a cat", seed=seed, steps=9)) for seed in (1, 2, 3))
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()
    [row] = [row for row in arena.rows if row.id == bad]
    arena._inputs["sample"].write((arena._rows.index(row), 0, 0), 7.0)
    events = list(run(scheduler))

    assert [event.id for event in events if isinstance(event, Failed)] == [bad]
    assert {event.id for event in events if isinstance(event, PictureDone)} == {first, last}
    assert scheduler.denoiser.capacity(row.size) == 4


def test_a_failed_call_releases_its_buffers_before_new_ones_are_allocated(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[bool] = []
    failed: list[weakref.ref[Any]] = []
    bind = Arena._bind

    def watched(arena: Arena, n: int) -> Any:
        alive.extend(ref() is not None for ref in failed)
        return bind(arena, n)

    def refuse(inputs: dict[str, Any]) -> bool:
        if len(inputs["sample"]) > 1:
            failed.append(weakref.ref(inputs["sample"]))
            return True
        return False

    monkeypatch.setattr(Arena, "_bind", watched)
    failing(monkeypatch, refuse)
    pictures = pictures_of(model, [Request("a cat", seed=seed, steps=2) for seed in range(4)])

    assert len(pictures) == 4
    assert len(failed) == 2  # four rows, then two
    assert alive
    assert not any(alive)


def test_pictures_that_fail_to_decode_together_are_decoded_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("a cat", seed=seed, steps=2) for seed in range(3)]
    expected = pictures_of(model, requests)
    decode = model.decode

    def no_room(latents: npt.NDArray[np.float32], draft: bool) -> Any:
        if len(latents) > 1:
            raise EngineError("out of memory")
        return decode(latents, draft)

    monkeypatch.setattr(model, "decode", no_room)
    decoded = pictures_of(model, requests)

    assert decoded.keys() == expected.keys()
    assert all(near(decoded[seed], image) for seed, image in expected.items())


def test_a_lone_picture_is_decoded_again_once_other_buffers_are_released(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("a cat", seed=3, steps=2)
    expected = pictures_of(model, [request])[3]
    decode, forget, attempts, room = model.decode, model.forget_bindings, list[int](), list[bool]()

    def no_room(latents: npt.NDArray[np.float32], draft: bool) -> Any:
        attempts.append(len(latents))
        if not room:
            raise EngineError("out of memory")
        return decode(latents, draft)

    def released() -> None:
        forget()
        room.append(True)

    monkeypatch.setattr(model, "decode", no_room)
    monkeypatch.setattr(model, "forget_bindings", released)

    np.testing.assert_array_equal(pictures_of(model, [request])[3], expected)
    assert attempts == [1, 1]


def test_a_picture_that_cannot_be_decoded_fails_after_two_attempts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = list[int]()

    def broken(latents: npt.NDArray[np.float32], draft: bool) -> Any:
        attempts.append(len(latents))
        raise EngineError("out of memory")

    monkeypatch.setattr(model, "decode", broken)
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", steps=2))
    events = [event for _ in range(4) for event in scheduler.step()]

    assert [str(event.error) for event in events if isinstance(event, Failed)] == ["out of memory"]
    assert attempts == [1, 1]
    assert len(scheduler) == 0


def test_a_request_that_the_engine_cannot_accept_fails_immediately(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: Any) -> Any:
        raise FeedError("denoise_step was given T = 300, its plan takes 1 to 77")

    monkeypatch.setattr(Arena, "_bind", too_many)
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", num_images=3, steps=4))

    assert [type(event.error) for event in scheduler.step() if isinstance(event, Failed)] == [FeedError] * 3
    assert len(scheduler) == 0


def test_a_waiting_request_keeps_a_word_that_is_unloaded_or_replaced(model: Model) -> None:
    once, other = (
        Concept("<once>", {"text_encoder": np.random.default_rng(i).normal(0, 0.5, (1, 32)).astype(np.float32)})
        for i in (7, 8)
    )
    model.load(once)
    [expected] = draw(model, "a <once>", steps=2)
    model._contexts.clear()  # so that it is encoded again
    scheduler = Scheduler(model)
    scheduler.add(Request("a <once>", steps=2))
    model.unload("<once>")
    model.load(other)
    [*_, event] = scheduler.step(max_steps=None)
    model.unload("<once>")

    assert isinstance(event, PictureDone)
    np.testing.assert_array_equal(event.image, expected.image)


def test_loading_a_word_keeps_other_prompts_cached(model: Model) -> None:
    """And a replaced word is not served from the cache."""
    first, second = ({"text_encoder": np.random.default_rng(i).normal(0, 0.5, (1, 32)).astype("f4")} for i in (5, 6))
    model.load(Concept("<swap>", first))
    cat, swap = (model.encode([model.tokenize(text)])[0] for text in ("a cat", "a <swap>"))
    model.unload("<swap>")
    model.load(Concept("<swap>", second))
    replaced = model.encode([model.tokenize("a <swap>")])[0]
    model.unload("<swap>")
    model.load(Concept("<swap>", first))

    assert model.encode([model.tokenize("a cat")])[0] is cat
    assert replaced is not swap
    assert np.abs(replaced.hidden_states - swap.hidden_states).max() > 0.01
    assert model.encode([model.tokenize("a <swap>")])[0] is swap
    model.unload("<swap>")


def test_a_request_of_many_texts_is_encoded_over_several_turns_while_others_run(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = model.encode

    def counted(prompts: Any, layers: Any = None) -> Any:
        calls.append(len({prompt.key for prompt in prompts}))
        return encode(prompts, layers)

    monkeypatch.setattr(model, "encode", counted)
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", steps=20))
    scheduler.step()
    changing = scheduler.add(
        Request("[" + "|".join(map(str, range(20))) + "] stars", "a dog", steps=20, guidance_scale=2.0)
    )
    calls.clear()

    events = [scheduler.step() for _ in range(4)]

    assert [count for count in calls if count] == [8, 8, 5]  # 20 texts and a negative one
    assert [any(isinstance(e, StepDone) and e.id == changing for e in turn) for turn in events] == [
        False,
        False,
        True,
        True,
    ]


def test_a_prompt_that_cannot_be_encoded_fails_alone_in_the_turn_of_its_texts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(prompts: Any, layers: Any = None) -> Any:
        if any(prompt.key == bad for prompt in prompts):
            raise EngineError("out of memory")
        return encode(prompts, layers)

    encode, bad = model.encode, model.tokenize("a bad one").key
    monkeypatch.setattr(model, "encode", failing)
    scheduler = Scheduler(model)
    first, second = (scheduler.add(Request(prompt, steps=2)) for prompt in ("a [cat|bad one]", "a ring"))
    events = []
    while scheduler:
        events += scheduler.step()
    assert [(e.id, str(e.error)) for e in events if isinstance(e, Failed)] == [(first, "out of memory")]
    assert [e.id for e in events if isinstance(e, PictureDone)] == [second]


def test_texts_that_take_too_much_memory_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    size = model.encode([model.tokenize("cat")])[0].hidden_states.nbytes
    monkeypatch.setattr("oneword.runtime.scheduler.MAX_CONTEXT_BYTES", 3 * size - 1)
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat " * 80, "a dog", steps=2, guidance_scale=2.0))
    scheduler.add(Request("a [cat|dog]", steps=2, guidance_scale=1.0))
    with pytest.raises(UsageError, match=r"^the 3 texts of the prompts, negative ones included, take 0.0 MiB when enc"):
        scheduler.add(Request("a [cat|dog]", "no", steps=2, guidance_scale=2.0))


def test_a_newcomer_steps_within_two_turns_whatever_else_arrives(model: Model) -> None:
    scheduler = Scheduler(model, max_rows=16)
    for seed in range(3):
        scheduler.add(Request("a cat", seed=seed, steps=12))
    scheduler.step()
    for seed in range(6):
        scheduler.add(Request(f"a {WORDS[seed]}", seed=seed, steps=4, image=scene(), mask=left_half()))
    first = [e.id for _ in range(2) for e in scheduler.step() if isinstance(e, StepDone) and e.step == 1]

    assert 3 in first


def test_requests_that_differ_in_the_seed_only_are_one_newcomer(model: Model) -> None:
    scheduler = Scheduler(model, max_rows=20)
    scheduler.add(Request("a cat", steps=12))
    scheduler.step()
    ids = [scheduler.add(Request("a dog", "a ring", seed=seed, steps=4)) for seed in range(5)]
    ids += [scheduler.add(Request(f"a {word}", steps=4)) for word in WORDS[:4]]
    ids += [scheduler.add(Request("a dog", "a ring", seed=9, steps=4))]  # it does not overtake the fifth kind
    turns = [{event.id for event in scheduler.step() if isinstance(event, StepDone)} for _ in range(2)]

    assert turns[0] & {*ids} == {*ids[:8]}
    assert turns[1] >= {*ids}


def test_edits_of_one_picture_are_newcomers_of_their_own(model: Model) -> None:
    scheduler = Scheduler(model, max_rows=20)
    scheduler.add(Request("a cat", steps=12))
    scheduler.step()
    image = scene()
    ids = [scheduler.add(Request("a dog", seed=seed, steps=4, image=image)) for seed in range(6)]
    turns = [{event.id for event in scheduler.step() if isinstance(event, StepDone)} for _ in range(2)]

    assert [turn & {*ids} for turn in turns] == [{*ids[:4]}, {*ids}]


def on_a_clock(monkeypatch: pytest.MonkeyPatch, scheduler: Scheduler, decoding: float = 0.0) -> None:
    """Denoising takes one second per turn, decoding so many per picture, and nothing else takes time."""
    now = 0.0
    decode, denoise = scheduler.model.decode, scheduler.denoiser.step

    def timed_decode(latents: npt.NDArray[np.float32], draft: bool) -> Any:
        nonlocal now
        now += decoding * len(latents)
        return decode(latents, draft)

    def timed_denoise() -> Any:
        nonlocal now
        now += 1.0
        return denoise()

    monkeypatch.setattr("oneword.runtime.scheduler.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(scheduler.model, "decode", timed_decode)
    monkeypatch.setattr(scheduler.denoiser, "step", timed_denoise)


def finished(events: Sequence[Event]) -> int:
    return sum(isinstance(event, PictureDone) for event in events)


@pytest.mark.parametrize(
    ("seconds", "counts"),
    [
        (0.0, [8]),
        (0.09, [2, 2, 2, 2]),  # two take less than a fifth of the turn's denoising time, three would take more
        (9.0, [2, 1, 1, 1, 1, 1, 1]),  # one per turn, and a quarter of those that wait
    ],
)
def test_pictures_that_finish_together_are_decoded_as_far_as_the_turn_has_time(
    model: Model, monkeypatch: pytest.MonkeyPatch, seconds: float, counts: list[int]
) -> None:
    scheduler = Scheduler(model)
    on_a_clock(monkeypatch, scheduler, seconds)
    scheduler.add(Request("a cat", steps=3))
    for _ in run(scheduler):  # after which the time of one picture is known
        pass
    scheduler.add(Request("a cat", steps=3, num_images=8))
    turns = [finished(turn) for turn in iter(lambda: scheduler.step() if scheduler else None, None)]

    assert [count for count in turns if count] == counts


def test_finished_pictures_do_not_pile_up_behind_newcomers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arrive and finish in each turn, whose time is too short for any of them."""
    scheduler = Scheduler(model)
    on_a_clock(monkeypatch, scheduler, 1.0)
    scheduler.add(Request("a cat", steps=200))
    waiting, done = [], 0
    for _ in range(60):
        scheduler.add(Request("a cat", steps=1, num_images=2))
        done += finished(scheduler.step())
        waiting.append(len(scheduler) - scheduler.rows)

    assert max(waiting) <= 8
    assert done >= 120 - 8


def test_a_cancelled_picture_that_waits_to_be_decoded_is_not_decoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(model)
    on_a_clock(monkeypatch, scheduler, 9.0)
    scheduler.add(Request("a cat", steps=1))
    scheduler.step()
    first, second = (scheduler.add(Request("a cat", seed=seed, steps=1)) for seed in (1, 2))
    events = scheduler.step()
    scheduler.cancel(second)
    events += scheduler.step()

    assert Counter(event.id for event in events if isinstance(event, PictureDone)) == {first: 1}
    assert len(scheduler) == 0


def test_in_openvino_each_picture_is_closest_to_the_same_picture_generated_alone(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it computes in bf16, sums depend on the size of a call: identical for equal N, otherwise a median of 45 dB."""
    pytest.importorskip("openvino")
    monkeypatch.setattr("oneword.engines.openvino.OFTEN", 1 << 30)  # one version of the graphs throughout
    model = Model.open(tiny_bundle, "openvino", threads=1)
    for i, token in enumerate(WORDS):
        vectors = np.random.default_rng(i).normal(0, 0.5, (1 + i % 3, 32)).astype(np.float32)
        model.load(Concept(token, {"text_encoder": vectors}))
    together = pictures_of(model, mixed())
    alone = {request.seed: pictures_of(model, [request])[request.seed] for request in mixed()}
    again = {request.seed: pictures_of(model, [request])[request.seed] for request in mixed()}

    assert np.median([psnr(together[seed], image) for seed, image in alone.items()]) >= 45
    for seed, image in together.items():
        np.testing.assert_array_equal(again[seed], alone[seed])
        assert max(alone, key=lambda candidate: psnr(image, alone[candidate])) == seed


def test_openvinos_versions_for_one_shape_draw_the_same_picture_up_to_rounding(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    model = Model.open(tiny_bundle, "openvino", threads=1)
    request = Request("a cat", seed=1, steps=4)
    before = pictures_of(model, [request])[1]
    compiler = model.engine("denoise_step")._compiler  # type: ignore[attr-defined]
    monkeypatch.setattr("oneword.engines.openvino.OFTEN", 1)
    deadline = time.monotonic() + 60
    while not compiler._static:
        assert time.monotonic() < deadline
        pictures_of(model, [request])
    after = pictures_of(model, [request])[1]

    if "bf16" in model.engine("denoise_step").backend:
        assert psnr(after, before) >= 40  # 42 to 45 with AVX-512, for nine seeds
    else:
        assert np.abs(after.astype(np.int16) - before).max() <= 1


def test_an_engine_that_prefers_few_shapes_gets_no_new_ones_after_the_warm_up(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    model = Model.open(tiny_bundle, "openvino", threads=1)
    scheduler = Scheduler(model, max_rows=4)
    scheduler.warm()
    [arena] = scheduler.denoiser._arenas.values()
    for seed in range(3):
        scheduler.add(Request("a cat", seed=seed, steps=2, guidance_scale=3.0 if seed else 1.0))
    scheduler.step()

    assert sorted(arena._bound) == [1, 2, 3, 4, 6, 8]
    assert all(bound.binding._compiled.static for bound in arena._bound.values())  # type: ignore[attr-defined]
    bindings = [binding for graph in model._batched.values() for binding in graph._bindings.values()]
    assert len(bindings) == 9  # one to eight prompts, one to eight pictures, and a picture to read in
    assert all(binding._compiled.static for binding in bindings)  # type: ignore[attr-defined]
    assert (scheduler.denoiser.stats.branches, scheduler.denoiser.stats.padding) == (6, 1)


def test_one_guided_picture_binds_the_step_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large graph may be compiled for its first shapes."""
    bound: list[int] = []
    bind = Arena._bind
    monkeypatch.setattr(Arena, "_bind", lambda arena, n: bound.append(n) or bind(arena, n))  # type: ignore[func-returns-value]
    pictures_of(model, [Request("a cat", steps=2)])
    pictures_of(model, [Request("a cat", steps=2, guidance_scale=1.0, num_images=3)])

    assert bound == [2, 3]


def test_a_context_that_could_not_be_written_is_written_for_the_next_row(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(f"a {WORDS[3]}", seed=4, steps=3)
    expected = pictures_of(model, [request])[4]
    write, failed = Arena._write_contexts, list[None]()

    def fail_once(arena: Arena, row: Row) -> None:
        write(arena, row)
        if not failed:
            failed.append(None)
            for place in arena._pool.slots.values():
                arena._inputs["context"].write(place, 0.0)  # as if the write had not happened
            raise EngineError("the device was lost")

    monkeypatch.setattr(Arena, "_write_contexts", fail_once)
    scheduler = Scheduler(model)
    scheduler.add(request)
    scheduler.add(request)
    events = list(run(scheduler))

    assert [event.id for event in events if isinstance(event, Failed)] == [0]
    [image] = [event.image for event in events if isinstance(event, PictureDone)]
    assert near(image, expected)


def test_a_displaced_row_that_cannot_be_placed_again_is_reported(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda inputs: len(inputs["sample"]) > 1)
    scheduler = Scheduler(model, max_rows=4)
    for seed in range(4):
        scheduler.add(Request("a cat", seed=seed, steps=3))
    events = scheduler.step()
    place = Arena.place

    def lost(arena: Arena, row: Row) -> bool:
        if row.seed == 3:
            raise EngineError("the device was lost")
        return place(arena, row)

    monkeypatch.setattr(Arena, "place", lost)
    events += list(run(scheduler))

    assert len(scheduler) == 0
    assert [event.index for event in events if isinstance(event, Failed)] == [0]
    assert {event.seed for event in events if isinstance(event, PictureDone)} == {0, 1, 2}


def test_a_displaced_row_keeps_its_smaller_call_while_another_size_joins(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "_MAX_ARENAS", 1)
    failing(monkeypatch, lambda inputs: inputs["sample"].shape[0] > 1 and inputs["sample"].shape[-1] == 8)
    scheduler = Scheduler(model, max_rows=2)
    for seed in range(2):
        scheduler.add(Request("a cat", seed=seed, steps=1))
    events = scheduler.step(max_steps=1)
    assert [row.seed for row in scheduler.denoiser.displaced] == [1]
    scheduler.add(Request("a cat", seed=2, steps=1, size=(32, 32)))
    events += list(run(scheduler))

    assert [event for event in events if isinstance(event, Failed)] == []
    assert {event.seed for event in events if isinstance(event, PictureDone)} == {0, 1, 2}


def test_a_lone_row_gets_the_memory_of_unused_sizes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", steps=1, size=(32, 32)))
    for _ in run(scheduler):
        pass
    failing(monkeypatch, lambda inputs: len(scheduler.denoiser._arenas) > 1)
    scheduler.add(Request("a cat", steps=2, seed=5))

    assert [event.seed for event in run(scheduler) if isinstance(event, PictureDone)] == [5]


def test_at_most_eight_pictures_are_decoded_per_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model)
    on_a_clock(monkeypatch, scheduler)
    scheduler.add(Request("a cat", num_images=12, steps=1))

    assert [finished(scheduler.step()) for _ in range(2)] == [8, 4]


def test_a_fifth_size_waits_until_one_of_four_is_done(model: Model) -> None:
    scheduler = Scheduler(model)
    for i, side in enumerate((32, 40, 48, 56, 64)):
        scheduler.add(Request("a cat", seed=i, steps=3 + i, size=(side, side)))
    scheduler.step()
    waiting = len(scheduler.denoiser.rows)
    done = [event.seed for event in run(scheduler) if isinstance(event, PictureDone)]

    assert waiting == 4
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert len(scheduler.denoiser._arenas) <= 4


def test_a_warm_up_while_pictures_are_in_progress_is_refused(model: Model) -> None:
    scheduler = Scheduler(model, max_rows=2)
    scheduler.add(Request("a cat", steps=2))
    scheduler.step()

    with pytest.raises(UsageError, match="warm up before requests are added"):
        scheduler.warm()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: Scheduler(model, max_rows=0),
        lambda model: Scheduler(model).step(max_steps=0),
        lambda model: draw(model, Request("a cat"), steps=5),
        lambda model: Scheduler(model).cancel(0),
    ],
)
def test_invalid_calls_are_refused(model: Model, call: Any) -> None:
    with pytest.raises(UsageError, match=r"but must be 1 or more|set them in each Request|0 have been added"):
        call(model)


def test_a_plan_that_allows_fewer_rows_at_a_size_gets_fewer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one plan for many small pictures and one for a single large one, the limits are the widest of both."""
    bind = Arena._bind

    def narrow(arena: Arena, n: int) -> Any:
        if arena.capacity > 2:
            raise FeedError("denoise_step was given B = 4, its plan takes 1 to 2")
        return bind(arena, n)

    monkeypatch.setattr(Arena, "_bind", narrow)

    assert len(pictures_of(model, [Request("a cat", num_images=5, steps=2)])) == 5


def test_a_row_that_cannot_be_written_takes_no_context_from_another(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newcomer shares its prompt with a row in progress, and fails at its own negative prompt."""
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", negative_prompt="red", seed=1, steps=4))
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()
    before = dict(arena._pool._rows)
    context: Any = arena._inputs["context"]

    def lost(region: Any, values: Any) -> None:
        raise EngineError("the device was lost")

    monkeypatch.setattr(context, "write", lost)
    scheduler.add(Request("a cat", negative_prompt="blue", seed=2, steps=4))
    events = scheduler.step()

    assert [event.id for event in events if isinstance(event, Failed)] == [1]
    assert dict(arena._pool._rows) == before
