"""Rows that join late, leave early, are cancelled or fail, beside others that must not notice."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

from oneword.engines.errors import EngineError, FeedError, NotFinite
from oneword.engines.loop import Loop
from oneword.engines.onnxruntime import OnnxRuntimeBinding
from oneword.runtime.batch import Batch, Failed, PictureDone, StepDone
from oneword.runtime.concept import Concept
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.samplers import Sampler

WORDS = [f"<w{i}>" for i in range(8)]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    """Eight words of one to three vectors are loaded, and one that the text encoder answers with NaN."""
    model = Model.open(tiny_bundle, threads=1)
    random = np.random.default_rng(0)
    for i, token in enumerate([*WORDS, "<broken>"]):
        model.load(Concept(token, {"text_encoder": random.normal(0, 0.5, (1 + i % 3, 32)).astype(np.float32)}))
    [table] = model._tables.values()
    table.array.write(list(table.ids["<broken>"]), np.nan)
    return model


class Recorded(Batch):
    """A batch that keeps every row's first sample, and the noise that the engine was fed at each step that draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fed: dict[int, list[npt.NDArray[np.float32]]] = defaultdict(list)

    def _denoise(self, group: Any) -> Any:
        first = [row.sample.copy() for row in group]
        events = super()._denoise(group)
        noise = next(reversed(self.model._steps.values())).loop.binding.inputs["noise"].numpy()
        for i, row in enumerate(group):
            if row.step == 1:
                self.fed[row.seed].append(first[i])
            if row.schedule.draws[row.step - 1]:
                self.fed[row.seed].append(noise[i].copy())
        return events


def run(batch: Batch) -> Iterator[StepDone | PictureDone | Failed]:
    while batch:
        yield from batch.step()


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-9))


def made(model: Model, requests: Sequence[Request]) -> tuple[dict[int, Image], dict[int, list[Any]]]:
    """Pictures by seed, and the noise that went into them."""
    batch = Recorded(model)
    for request in requests:
        batch.add(request)
    return {event.seed: event.image for event in run(batch) if isinstance(event, PictureDone)}, batch.fed


def mixed() -> list[Request]:
    """Eight rows that have nothing in common but the size: one of each sampler."""
    return [
        Request(
            f"a photo of {WORDS[i]}" + " and a red cat" * (3 * (i % 3)),
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


def test_rows_that_differ_in_everything_are_each_as_alone_their_noise_bitwise(model: Model) -> None:
    together, noise = made(model, mixed())

    assert len(together) == 8
    for request in mixed():
        alone, own_noise = made(model, [request])
        assert psnr(together[request.seed], alone[request.seed]) >= 45
        assert len(noise[request.seed]) >= 1
        np.testing.assert_array_equal(noise[request.seed], own_noise[request.seed])


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
"""Their pictures' seeds are 10, 20, 30, 31, 40 and 50."""


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[int, Image]:
    """Every picture of REQUESTS, each request made alone."""
    return {seed: image for request in REQUESTS for seed, image in made(model, [request])[0].items()}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_join_late_leave_early_or_fail_leave_the_others_as_they_were(
    model: Model, alone: dict[int, Image], data: st.DataObject
) -> None:
    ends = st.sampled_from(["done", "done", "cancelled", "NaN"])
    plans = [(request, data.draw(st.integers(0, 5)), data.draw(ends)) for request in REQUESTS]
    plans += [(Request("a <broken>", seed=90, steps=2), data.draw(st.integers(0, 5)), "NaN")]
    batch, fates = Batch(model, max_rows=data.draw(st.integers(1, 6))), {}
    done: dict[int, Image] = {}
    failed: dict[int, Failed] = {}
    for turn in range(16):
        for request, join, end in plans:
            if join == turn:
                fates[batch.add(request)] = request, join, end
        for id, (_, join, end) in fates.items():
            if end == "cancelled" and turn == join + 1:
                batch.cancel(id)
            for row in batch._rows:
                if row.id == id and end == "NaN" and turn == join + 1:
                    for steps in batch._runs:
                        steps.give_back()
                    row.sample = np.full_like(row.sample, np.nan)
        for event in batch.step():
            if isinstance(event, PictureDone):
                done[event.seed] = event.image
            if isinstance(event, Failed):
                failed[fates[event.id][0].seed + event.index] = event

    assert len(batch) == 0
    seeds = {"done": set[int](), "cancelled": set[int](), "NaN": set[int]()}
    for request, _, end in fates.values():
        seeds[end] |= {request.seed + i for i in range(request.num_images)}
    assert done.keys() == seeds["done"]
    assert failed.keys() == seeds["NaN"]
    assert all(isinstance(event.error, NotFinite) for event in failed.values())
    for seed, image in done.items():
        assert psnr(image, alone[seed]) >= 45


def test_an_edit_keeps_every_pixel_outside_the_mask_and_makes_the_rest_anew(model: Model) -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[13:47, 21:50] = True  # no multiples of 8
    image = made(model, [Request("a blue star", image=scene(), mask=mask, strength=1.0, steps=4)])[0][0]

    np.testing.assert_array_equal(image[~mask], scene()[~mask])
    assert psnr(image[mask], scene()[mask]) < 25


def test_an_edit_without_pasting_stays_as_near_as_the_decoder_lets_it(model: Model) -> None:
    """The latents outside the mask end as they were; what is left is the decoder's, whose field of view is wide."""
    mask = left_half()
    batch = Batch(model)
    batch.add(Request("a blue star", image=scene(), mask=mask, strength=1.0, steps=5, paste=False))
    batch.step()
    [row] = batch._rows
    *_, event = run(batch)

    assert row.known is not None
    np.testing.assert_allclose(row.sample[:, :, 4:], row.known[:, :, 4:], atol=1e-5)
    assert np.abs(row.sample - row.known)[:, :, :4].max() > 0.1
    decoded, _ = model.decode(row.sample[None])
    assert isinstance(event, PictureDone)
    np.testing.assert_array_equal(event.image, decoded[0])


def test_one_white_pixel_is_enough_for_an_edit(model: Model) -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[30, 30] = True  # not the first pixel of its latent
    image = made(model, [Request("a blue star", image=scene(), mask=mask, strength=1.0, steps=4)])[0][0]

    changed = (image != scene()).any(-1)
    assert changed[30, 30]
    assert changed.sum() == 1


def test_a_mask_is_stretched_with_its_picture(model: Model) -> None:
    image = made(model, [Request("a star", image=scene(), mask=left_half(), strength=1.0, steps=2, size=(128, 32))])[0]

    changed = (image[0] != np.asarray(_stretched(scene()))).any(-1)
    assert image[0].shape == (32, 128, 3)
    assert changed[:, :64].mean() > 0.9
    assert not changed[:, 64:].any()


def _stretched(image: Image) -> Any:
    import PIL.Image

    return PIL.Image.fromarray(image).resize((128, 32), PIL.Image.Resampling.LANCZOS)


def test_where_nobody_listens_pictures_are_the_same_and_only_they_are_told(model: Model) -> None:
    requests = [*mixed(), *REQUESTS]
    batch = Batch(model, listen=False)
    for request in requests:
        batch.add(request)
    events = list(run(batch))
    expected, _ = made(model, requests)

    assert all(isinstance(event, PictureDone) for event in events)
    assert {event.seed for event in events} == expected.keys()
    for event in events:
        assert isinstance(event, PictureDone)
        np.testing.assert_array_equal(event.image, expected[event.seed])


def test_rows_whose_shared_call_fails_go_on_alone_with_the_noise_they_had(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory suffices for one row and not for three."""
    requests = [Request("a cat", seed=seed, steps=5, sampler=Sampler.EULER_A) for seed in range(3)]
    alone = {seed: made(model, [request])[0][seed] for seed, request in enumerate(requests)}
    step, calls = Loop.step, []

    def no_room(loop: Loop) -> None:
        rows = loop.binding.inputs["sample"].shape[0]
        calls.append(rows)
        if rows == 3 and len(calls) > 2:
            raise EngineError("out of memory")
        step(loop)

    monkeypatch.setattr(Loop, "step", no_room)
    together = {event.seed: event.image for event in generate(model, requests) if isinstance(event, PictureDone)}

    assert calls[:3] == [3, 3, 3]
    assert calls[3:] == [1] * 15
    for seed, image in alone.items():
        np.testing.assert_array_equal(together[seed], image)


@pytest.mark.parametrize("listen", [True, False])
def test_a_row_whose_own_call_fails_is_named_and_the_others_come(
    model: Model, monkeypatch: pytest.MonkeyPatch, listen: bool
) -> None:
    run_graph = OnnxRuntimeBinding.run

    def refused(binding: OnnxRuntimeBinding, stream: int | None = None) -> None:
        if "sample" in binding.inputs and (binding.inputs["sample"].numpy() == np.float32(7)).any():
            raise EngineError("the engine refuses this row")
        run_graph(binding, stream)

    monkeypatch.setattr(OnnxRuntimeBinding, "run", refused)
    batch = Batch(model, listen=listen)
    first, bad, last = (batch.add(Request("a cat", seed=seed, steps=4)) for seed in (1, 2, 3))
    events = batch._start()
    batch._rows[1].sample[0, 0, 0] = 7
    events += list(run(batch))

    assert [event.id for event in events if isinstance(event, Failed)] == [bad]
    assert {event.id for event in events if isinstance(event, PictureDone)} == {first, last}


def test_pictures_whose_shared_decoding_fails_are_decoded_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("a cat", seed=seed, steps=2) for seed in range(3)]
    expected, _ = made(model, requests)
    decode = model.decode

    def no_room(latents: npt.NDArray[np.float32]) -> Any:
        if len(latents) > 1:
            raise EngineError("out of memory")
        return decode(latents)

    monkeypatch.setattr(model, "decode", no_room)
    got, _ = made(model, requests)

    assert got.keys() == expected.keys()
    for seed, image in expected.items():
        assert psnr(got[seed], image) >= 45


def test_more_rows_than_the_engine_takes_are_told_so_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a plan of --max-batch 4: what mends it is another plan, not another try."""

    def too_many(*_: Any) -> Any:
        raise FeedError("denoise_step was given B = 3, its plan takes 1 to 2")

    monkeypatch.setattr(model, "bind_step", too_many)
    batch = Batch(model)
    batch.add(Request("a cat", num_images=3, steps=4))

    assert [type(event.error) for event in batch.step() if isinstance(event, Failed)] == [FeedError] * 3
    assert len(batch) == 0


def test_rows_of_one_size_in_two_calls_are_as_in_one(model: Model) -> None:
    """They take turns in one binding's buffers."""
    requests = [Request("a cat", seed=seed, steps=3 + seed, sampler=Sampler.EULER_A) for seed in range(3)]
    expected, _ = made(model, requests)
    for event in generate(model, requests, max_rows=1):
        if isinstance(event, PictureDone):
            assert psnr(event.image, expected[event.seed]) >= 45
