"""Engines with a limit per call: larger work is split into several calls, with the same result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oneword.engines.engine import AnyArray, Binding, Engine, NumpyArray, ShapeUse, bound_shapes
from oneword.engines.errors import FeedError
from oneword.engines.open import open_engine
from oneword.runtime import model as module
from oneword.runtime.drawing import draw, generate
from oneword.runtime.events import Failed, PictureDone
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.scheduler import Scheduler


class Limited:
    """A real engine that refuses sizes beyond its limits, as TensorRT's plans do."""

    def __init__(self, engine: Engine, limits: Mapping[str, int], shape_use: ShapeUse = ShapeUse.ANY) -> None:
        self._engine, self.shape_use = engine, shape_use
        self.name, self.backend, self.inputs, self.outputs = engine.name, engine.backend, engine.inputs, engine.outputs
        axes = {axis for spec in engine.inputs.values() for axis in spec.axes}
        self.limits = {axis: size for axis, size in limits.items() if axis in axes}
        self.bound: list[dict[str, int]] = []

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> Binding:
        array_shapes = {name: array.shape for name, array in {**(inputs or {}), **(outputs or {})}.items()}
        sizes, _, _ = bound_shapes(self.name, self.inputs, self.outputs, shapes, array_shapes)
        self.check(sizes)
        self.bound.append(sizes)
        return self._engine.bind(shapes, inputs, outputs)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises FeedError if a size is beyond its limit."""
        for axis, size in sizes.items():
            if size > self.limits.get(axis, size):
                raise FeedError(f"{self.name} was given {axis} = {size}, its plan takes 1 to {self.limits[axis]}")

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        return self._engine.run(feeds)


LIMITS = {"B": 4, "N": 8, "M": 8}


def limited(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: Mapping[str, int] = LIMITS,
    shape_use: ShapeUse = ShapeUse.ANY,
) -> Model:
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_engine", lambda *args: Limited(open_engine(*args), limits, shape_use))
        model = Model.open(bundle, "onnxruntime", threads=1)
        for name in model.manifest.graphs:
            model.engine(name)
    return model


@pytest.fixture(scope="module")
def free(tiny_bundle: Path) -> Model:
    return Model.open(tiny_bundle, "onnxruntime", threads=1)


def largest(model: Model, graph: str, axis: str) -> int:
    """The largest size that a graph was bound with."""
    engine: Any = model.engine(graph)
    return max(sizes[axis] for sizes in engine.bound)


def test_five_prompts_and_the_empty_negative_are_encoded_in_several_calls(
    tiny_bundle: Path, free: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(tiny_bundle, monkeypatch)
    long = "a red star and a blue ring in the style of a painting with a green cat on the dog " * 2
    prompts = ["a cat", "a dog", "a red star", "a ring", "a blue cat", "", long]

    def encoded(model: Model) -> list[Any]:
        return model.encode([model.tokenize(prompt) for prompt in prompts])

    for actual, expected in zip(encoded(model), encoded(free), strict=True):
        np.testing.assert_array_equal(actual.hidden_states, expected.hidden_states)
    assert largest(model, "text_encoder", "B") == 4


def test_five_pictures_of_a_prompt_are_drawn_without_an_error_about_limits(
    tiny_bundle: Path, free: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(tiny_bundle, monkeypatch)
    settings = {"num_images": 5, "steps": 4, "seed": 3}
    actual, expected = draw(model, "a cat", **settings), draw(free, "a cat", **settings)

    assert [picture.seed for picture in actual] == [3, 4, 5, 6, 7]
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    assert largest(model, "denoise_step", "B") == 4
    assert 2 <= largest(model, "denoise_step", "N") <= 8
    assert largest(model, "denoise_step", "M") == 8
    assert largest(model, "vae_decoder", "B") <= 4


def test_an_engine_that_compiles_for_its_first_shapes_gets_one_prompt_and_one_picture_per_call(
    tiny_bundle: Path, free: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(tiny_bundle, monkeypatch, {}, ShapeUse.FIRST)
    actual = draw(model, "a cat", num_images=3, steps=2)

    for a, b in zip(actual, draw(free, "a cat", num_images=3, steps=2), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    assert largest(model, "text_encoder", "B") == largest(model, "vae_decoder", "B") == 1
    assert largest(model, "denoise_step", "B") == 3


def test_requests_of_five_prompts_are_drawn_together(
    tiny_bundle: Path, free: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(tiny_bundle, monkeypatch)
    requests = [
        Request(f"a {word}", seed=seed, steps=3, negative_prompt=negative)
        for seed, (word, negative) in enumerate(
            [("cat", None), ("dog", "red"), ("ring", None), ("star", "a blue painting"), ("photo", "")]
        )
    ]
    for a, b in zip(draw(model, *requests), draw(free, *requests), strict=True):
        np.testing.assert_array_equal(a.image, b.image)


@pytest.mark.parametrize(
    ("limits", "capacity"),
    [
        ({"B": 4, "N": 8, "M": 8}, 4),
        ({"B": 3}, 3),
        ({"N": 5}, 2),
        ({"M": 6}, 3),
        ({"B": 9, "N": 1}, 1),
        ({}, 16),
    ],
)
def test_as_many_rows_share_a_call_as_the_engine_allows(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], capacity: int
) -> None:
    model = limited(tiny_bundle, monkeypatch, limits)
    assert Scheduler(model).denoiser.capacity((8, 8, 20)) == capacity


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_any_number_of_pictures_is_decoded(
    tiny_bundle: Path, free: Model, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    model = limited(tiny_bundle, monkeypatch, {"B": 3})  # not a power of two
    latents = np.random.default_rng(0).standard_normal((count, 4, 8, 9)).astype(np.float32)
    images, finite = model.decode(latents)
    np.testing.assert_array_equal(images, free.decode(latents)[0])
    assert finite.tolist() == [True] * count
    assert largest(model, "vae_decoder", "B") == {1: 1, 3: 2, 5: 2, 7: 2}[count]


def test_a_warm_up_stays_within_the_limits(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = limited(tiny_bundle, monkeypatch)
    Scheduler(model).warm()
    assert largest(model, "denoise_step", "N") == 8


def test_a_picture_that_exceeds_the_limits_fails_and_the_others_are_drawn(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(tiny_bundle, monkeypatch, {**LIMITS, "h": 8, "w": 8})
    requests = [Request("a cat", steps=2, size=(64, 64)), Request("a dog", steps=2, size=(64, 128), num_images=2)]
    events = list(generate(model, requests))

    assert [event.id for event in events if isinstance(event, PictureDone)] == [0]
    failures = [event for event in events if isinstance(event, Failed)]
    assert [(event.id, event.index) for event in failures] == [(1, 0), (1, 1)]
    for failure in failures:
        assert isinstance(failure.error, FeedError)
        assert "denoise_step was given h = 16, its plan takes 1 to 8" in str(failure.error)


def test_a_guided_picture_needs_two_branches_and_an_unguided_one_needs_one(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = limited(tiny_bundle, monkeypatch, {"N": 1})
    with pytest.raises(FeedError, match="denoise_step was given N = 2, its plan takes 1 to 1"):
        draw(model, "a cat", steps=2)
    [picture] = draw(model, "a cat", steps=2, guidance_scale=1.0)
    assert picture.image.shape == (64, 64, 3)
