"""Pictures compared with diffusers' pipelines on the same weights, and with the same pictures generated alone."""

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings

from oneword.engines.errors import BundleError, ConceptError, EngineError, OnewordError, UsageError
from oneword.engines.open import Backend
from oneword.runtime.concept import Concept, save_concept
from oneword.runtime.denoiser import Denoiser, Size
from oneword.runtime.drawing import draw, generate, scheduler_for
from oneword.runtime.events import Event, Failed, PictureDone, StepDone
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.scheduler import Scheduler

PIPELINES = dict[str, Any]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.open(tiny_bundle, "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def pipelines(tiny_model_dir: Path) -> PIPELINES:
    """diffusers' pipelines on one set of weights."""
    from diffusers import (
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
    )

    text = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    parts = {**text.components, "requires_safety_checker": False}
    pipelines = {
        "text": text,
        "image": StableDiffusionImg2ImgPipeline(**parts),
        "mask": StableDiffusionInpaintPipeline(**parts),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


EXPONENTIAL = {"timestep_spacing": "linspace", "use_exponential_sigmas": True}
THIRD_ORDER = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
TRAILING = {"timestep_spacing": "trailing"}


@pytest.fixture
def words(model: Model) -> Any:
    """Twelve words of one to three vectors, loaded."""
    random = np.random.default_rng(0)
    tokens = [f"<w{i}>" for i in range(12)]
    for i, token in enumerate(tokens):
        model.load(Concept(token, {"text_encoder": random.normal(0, 0.5, (1 + i % 3, 32)).astype(np.float32)}))
    yield tokens
    for token in tokens:
        model.unload(token)


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-9))


def of_diffusers(output: Any) -> Image:
    return np.asarray((output.images[0] * 255).round(), np.uint8)


def pictures(model: Model, requests: Sequence[Request]) -> dict[int, Image]:
    done = [event for event in generate(model, requests) if isinstance(event, PictureDone)]
    return {event.id: event.image for event in done}


def scene(size: int = 64) -> Image:
    y, x = np.mgrid[:size, :size] / size
    return (np.stack([x, y, (x - 0.5) ** 2 + (y - 0.5) ** 2], axis=-1) * 255).astype(np.uint8)


@pytest.mark.parametrize("negative_prompt", [None, "blue dog"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 120)])
def test_text_to_image_matches_diffusers(
    model: Model, pipelines: PIPELINES, negative_prompt: str | None, width: int, height: int
) -> None:
    import torch

    reference = pipelines["text"](
        "a photo of a red cat",
        negative_prompt=negative_prompt,
        num_inference_steps=12,
        guidance_scale=5.0,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(11),
        output_type="np",
    )
    request = Request(
        "a photo of a red cat",
        negative_prompt=negative_prompt,
        steps=12,
        guidance_scale=5.0,
        size=(width, height),
        seed=11,
    )
    image = pictures(model, [request])[0]

    assert image.shape == (height, width, 3)
    assert image.std() > 1  # there is something to compare
    assert psnr(image, of_diffusers(reference)) >= 50


@pytest.mark.parametrize(
    ("settings", "peer", "config"),
    [
        ({"sampler": "heun"}, "HeunDiscreteScheduler", {}),
        ({"sampler": "dpm2-a", "spacing": "exponential"}, "KDPM2AncestralDiscreteScheduler", EXPONENTIAL),
        ({"sampler": "dpmpp-3m-sde"}, "DPMSolverMultistepScheduler", THIRD_ORDER),
        ({"sampler": "unipc"}, "UniPCMultistepScheduler", {}),
        # a few-step student: SD-Turbo's settings
        ({"sampler": "euler-a", "spacing": "sgm-uniform", "steps": 2}, "EulerAncestralDiscreteScheduler", TRAILING),
    ],
)
@pytest.mark.parametrize("edit", [False, True])
def test_samplers_match_diffusers_pipelines(
    model: Model,
    pipelines: PIPELINES,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    peer: str,
    config: dict[str, Any],
    edit: bool,
) -> None:
    import diffusers
    import torch

    pipeline = pipelines["image" if edit else "text"]
    theirs = getattr(diffusers, peer).from_config({**pipeline.scheduler.config, **config})
    monkeypatch.setattr(pipeline, "scheduler", theirs)
    student = settings.get("steps") == 2
    settings = {"steps": 7, "guidance_scale": 1.0 if student else 4.0, **settings}
    start: dict[str, Any] = {"image": scene(), "strength": 0.6} if edit else {}
    theirs_start = {**start, "image": PIL.Image.fromarray(scene())} if edit else {}
    reference = pipeline(
        "a photo of a red cat",
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        generator=torch.Generator().manual_seed(11),
        output_type="np",
        **theirs_start,
    )

    image = pictures(model, [Request("a photo of a red cat", seed=11, **settings, **start)])[0]

    assert psnr(image, of_diffusers(reference)) >= 50


def test_a_sampler_of_two_stages_reports_steps_and_not_evaluations(model: Model) -> None:
    events = list(generate(model, [Request("a cat", steps=4, sampler="heun", previews=2)]))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(event.step, event.steps) for event in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [event.step for event in steps if event.denoised is not None] == [2]


def test_a_graph_of_a_bundle_that_was_replaced_is_not_used_beside_those_of_the_other(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle", "onnxruntime", threads=1)
    image = np.zeros((64, 64, 3), np.uint8)
    [before] = draw(model, "a cat", steps=2)
    manifest = tmp_path / "bundle" / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"revision": null', '"revision": "another"'))

    with pytest.raises(BundleError, match="was replaced or removed after it was opened: open it again"):
        draw(model, "a cat", steps=2, image=image)
    [after] = draw(model, "a cat", steps=2)
    np.testing.assert_array_equal(after.image, before.image)


def test_openvino_generates_the_same_picture(model: Model, tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    request = Request("a photo of a red cat", seed=3, steps=10, guidance_scale=5.0)
    openvino = Model.open(tiny_bundle, Backend.OPENVINO, threads=1)

    # 35 dB if it computes in bfloat16: eight bits of mantissa, but not in the sampler's state
    assert psnr(pictures(openvino, [request])[0], pictures(model, [request])[0]) >= 35


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_matches_an_earlier_layer_of_transformers_encoder(
    model: Model, pipelines: PIPELINES, clip_skip: int
) -> None:
    import torch

    pipeline = pipelines["text"]  # its clip_skip does not support this release of transformers
    ids = pipeline.tokenizer("a dog", padding="max_length", max_length=20, return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
        embeds = pipeline.text_encoder.final_layer_norm(states)
    reference = pipeline(
        prompt_embeds=embeds,
        num_inference_steps=4,
        guidance_scale=1.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    image = pictures(model, [Request("a dog", steps=4, guidance_scale=1.0, clip_skip=clip_skip)])[0]

    assert psnr(image, of_diffusers(reference)) >= 50


@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
def test_image_to_image_matches_diffusers(model: Model, pipelines: PIPELINES, strength: float) -> None:
    import PIL.Image
    import torch

    reference = pipelines["image"](
        "a green ring",
        image=PIL.Image.fromarray(scene()),
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    )
    request = Request("a green ring", image=scene(), strength=strength, steps=8, guidance_scale=3.0, seed=5)

    assert psnr(pictures(model, [request])[0], of_diffusers(reference)) >= 50


@pytest.mark.parametrize(("strength", "eta"), [(0.75, 0.0), (1.0, 0.0), (0.75, 0.8)])
def test_a_masked_edit_matches_diffusers(model: Model, pipelines: PIPELINES, strength: float, eta: float) -> None:
    import PIL.Image
    import torch

    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 8:48] = 255
    reference = pipelines["mask"](
        "a blue star",
        image=PIL.Image.fromarray(scene()),
        mask_image=PIL.Image.fromarray(mask),
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        eta=eta,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    )
    edit = Request("a blue star", image=scene(), mask=mask, strength=strength, steps=8, guidance_scale=3.0, seed=5)
    request = replace(edit, eta=eta, paste=False)  # diffusers leaves the whole picture to the decoder

    assert psnr(pictures(model, [request])[0], of_diffusers(reference)) >= 50


def test_a_picture_that_was_encoded_before_is_not_encoded_again(
    model: Model, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a copy of it. After a pixel has changed, it is."""
    model.encode_image(other := np.zeros((64, 64, 3), np.uint8))
    graph, calls = model._graph("vae_encoder"), []
    monkeypatch.setattr(model, "_graph", lambda name: calls.append(name) or graph)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    first, again = model.encode_image(image), model.encode_image(image.copy())
    model.encode_image(other)
    image[0, 0] ^= 255
    changed = model.encode_image(image)
    alone = Model.open(tiny_bundle, Backend.ONNXRUNTIME, threads=1)

    assert calls == ["vae_encoder"] * 2
    assert all(map(np.array_equal, first, again))
    assert all(map(np.array_equal, changed, alone.encode_image(image)))
    assert not np.array_equal(first[0], changed[0])


def test_picture_i_has_the_seed_plus_i(model: Model) -> None:
    events = list(generate(model, [Request("a cat", seed=7, num_images=3, steps=3)]))
    three = {event.seed: event.image for event in events if isinstance(event, PictureDone)}
    alone = pictures(model, [Request("a cat", seed=9, steps=3)])[0]

    assert sorted(three) == [7, 8, 9]
    assert psnr(three[9], alone) >= 45
    assert psnr(three[7], alone) < 40


def test_twelve_words_share_engines_and_a_batch_and_change_no_picture(model: Model, words: list[str]) -> None:
    requests = [Request(f"a photo of a {word}", seed=3, steps=6) for word in words]
    alone = [pictures(model, [request])[0] for request in requests]
    opened = dict(model.opened)
    together = pictures(model, requests)

    assert model.opened == opened
    assert all(psnr(alone[i], together[i]) >= 45 for i in range(12))
    similarities = [psnr(alone[0], image) for image in alone[1:]]
    assert max(similarities) < 45  # the words have an effect


def test_a_word_that_breaks_the_encoder_fails_alone(model: Model) -> None:
    model.load(Concept("<huge>", {"text_encoder": np.full((1, 32), 1.0, np.float32)}))
    huge, table = model._words["<huge>"], model._tables["text_encoder"]
    [ids] = table.place({huge.identity: huge.vectors["text_encoder"]}).values()
    table.array.write(list(ids), np.nan)
    events: list[Event] = list(generate(model, [Request("a <huge>", steps=2), Request("a cat", steps=2)]))
    model.unload("<huge>")

    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.id for event in failed] == [0]
    assert "produced NaN or infinity for this prompt" in str(failed[0].error)
    assert [event.id for event in events if isinstance(event, PictureDone)] == [1]


def test_unloading_a_word_waits_for_its_prompts(model: Model) -> None:
    random = np.random.default_rng(1)
    first, second = (random.normal(0, 0.5, (1, 32)).astype(np.float32) for _ in range(2))
    model.load(Concept("<one>", {"text_encoder": first}))
    request = Request("a <one>", steps=3)
    expected = pictures(model, [request])[0]
    scheduler = Scheduler(model)
    scheduler.add(request)
    model.unload("<one>")
    model.load(Concept("<two>", {"text_encoder": second}))
    image = None
    while scheduler:
        for event in scheduler.step():
            if isinstance(event, PictureDone):
                image = event.image
    model.unload("<two>")

    assert image is not None
    np.testing.assert_array_equal(image, expected)
    with pytest.raises(UsageError, match="<one>"):
        scheduler.add(request)


def test_every_step_is_an_event_and_some_have_a_preview(model: Model) -> None:
    events = list(generate(model, [Request("a cat", steps=4, previews=2)]))

    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(event.step, event.steps) for event in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [event.denoised is None for event in steps] == [True, False, True, True]
    assert steps[1].denoised is not None
    assert steps[1].denoised.shape == (4, 8, 8)
    assert model.preview(steps[1].denoised).shape == (8, 8, 3)  # type: ignore[union-attr]


def test_the_preview_of_the_last_step_is_the_picture_without_the_last_noise(model: Model) -> None:
    """DDIM's last step ends at the model's estimate of x0."""
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", steps=4, previews=1))
    events = [event for _ in range(3) for event in scheduler.step()]
    [preview] = [event.denoised for event in events if isinstance(event, StepDone) and event.step == 3]
    *_, done = [event for event in scheduler.step() if isinstance(event, PictureDone)]

    assert preview is not None
    images, _ = model.decode(preview[None])
    assert psnr(images[0], done.image) >= 25


def test_guidance_of_one_costs_one_branch(model: Model) -> None:
    scheduler = Scheduler(model)
    scheduler.add(Request("a cat", steps=2, guidance_scale=1.0))
    scheduler.add(Request("a cat", steps=2, guidance_scale=4.0))
    scheduler.step()

    assert scheduler.denoiser.stats.branches == 3
    assert scheduler.denoiser.stats.padding == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (60, 64)}, "size 60x64: width must be a multiple of 8, for example 64"),
        ({"size": (32768, 32768)}, "size 32768x32768 has 1073741824 pixels, but may have at most 16777216"),
        ({"clip_skip": 3}, "clip_skip is 3, this model allows 0 to 2"),
        ({"prompt": "a <nobody>"}, "<nobody>"),
        ({"image": scene(), "strength": 0.01, "steps": 3}, "strength 0.01"),
    ],
)
def test_a_request_that_the_model_does_not_support_is_refused_when_added(
    model: Model, changes: dict[str, Any], message: str
) -> None:
    scheduler = Scheduler(model)
    with pytest.raises(UsageError, match=message):
        scheduler.add(Request(**{"prompt": "a cat", **changes}))

    assert len(scheduler) == 0


def test_prompts_that_would_exhaust_memory_are_refused(model: Model) -> None:
    scheduler = Scheduler(model)
    long, longer = ("BREAK ".join([f"a {word} "] * n) for word, n in (("dog", 13), ("cat", 11)))
    with pytest.raises(
        UsageError, match=r"have 13 and 11 chunks, whose least common multiple is 143, but must be at most 64: "
    ):
        scheduler.add(Request(long, negative_prompt=longer))

    assert len(scheduler) == 0
    scheduler.add(Request("BREAK ".join(["a cat "] * 7), negative_prompt="BREAK ".join(["a dog "] * 6), steps=1))
    assert isinstance(scheduler.step()[-1], PictureDone)


def test_a_word_of_another_width_is_refused(model: Model) -> None:
    concept = Concept("<wide>", {"text_encoder": np.ones((1, 768), np.float32)})

    with pytest.raises(ConceptError, match="vectors of width 768, text_encoder takes width 32"):
        model.load(concept)
    assert "<wide>" not in model.words


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(alphabet=st.one_of(st.sampled_from("()[]\\:<>1.2 aBREAK_"), st.characters()), max_size=80))
def test_any_prompt_is_generated_or_refused_with_one_line_of_error(model: Model, prompt: str) -> None:
    with contextlib.suppress(OnewordError):
        events = list(generate(model, [Request(prompt, steps=1, guidance_scale=1.0)]))
        assert isinstance(events[-1], PictureDone)


RUN_WITHOUT_TORCH = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "onnx", "accelerate"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
from oneword.runtime.cli import main
sys.argv[0] = "ti-run"
main()
"""


def test_the_command_runs_with_torch_diffusers_and_transformers_blocked(tiny_bundle: Path, tmp_path: Path) -> None:
    save_concept(Concept("<toy>", {"text_encoder": np.full((2, 32), 0.1, np.float32)}), tmp_path / "toy.safetensors")
    line = [str(tiny_bundle), "a photo of <toy>", "--steps", "2", "--concept", str(tmp_path / "toy.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_TORCH, *line, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-photo-of-toy-0.png"]
    assert done.stdout.strip() == str(tmp_path / "out" / "a-photo-of-toy-0.png")


def test_encoders_and_decoders_are_opened_while_the_denoiser_is(tiny_bundle: Path) -> None:
    """The text encoder waits for the denoiser to begin, which would never come if they were opened in turn."""
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    began, open_graph = threading.Event(), model._open_graph

    def waiting(name: str) -> Any:
        if name == "denoise_step":
            began.set()
        elif name == "text_encoder":
            assert began.wait(60)
        return open_graph(name)

    model._open_graph = waiting
    [*_, last] = generate(model, [Request("a photo of a red ring", steps=1)])

    assert isinstance(last, PictureDone)
    assert model.opened.keys() == {"text_encoder", "denoise_step", "vae_decoder"}  # not the encoder of pictures


def test_a_picture_to_start_from_opens_its_encoder_and_a_refused_request_opens_nothing(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    with pytest.raises(UsageError):
        scheduler_for(model, [Request("a ring", steps=0)])
    assert not model.opened
    assert not model._ahead

    scheduler_for(model, [Request("a ring", image=np.zeros((32, 32, 3), np.uint8))])
    assert [*model._ahead] == ["text_encoder", "vae_encoder", "vae_decoder"]
    for name in [*model._ahead]:
        model.engine(name)


def slow_text_encoder(model: Model, release: threading.Event) -> list[str]:
    """Opening the text encoder waits for `release`. Returns a growing list of the graphs that are opened."""
    began, open_graph = list[str](), model._open_graph

    def waiting(name: str) -> Any:
        began.append(name)
        if name == "text_encoder":
            assert release.wait(60)
        return open_graph(name)

    model._open_graph = waiting
    return began


@pytest.mark.parametrize("error", [EngineError("no memory"), KeyboardInterrupt()])
def test_after_an_error_or_ctrl_c_nothing_more_is_opened_in_the_background(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The denoiser cannot be compiled while the text encoder is being opened; the decoder waits behind it."""
    model, release = Model.open(tiny_bundle, "onnxruntime", threads=1), threading.Event()
    began = slow_text_encoder(model, release)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Denoiser, "prepare", fail)
    with contextlib.suppress(KeyboardInterrupt):
        assert [type(event) for event in generate(model, [Request("a ring", steps=1)])] == [Failed]

    release.set()
    model.engine("text_encoder")  # the one that was being opened is not opened twice
    for thread in threading.enumerate():
        if thread.name.startswith("oneword-open"):
            thread.join(60)
    assert began == ["text_encoder"]
    monkeypatch.undo()
    assert isinstance([*generate(model, [Request("a ring", steps=1)])][-1], PictureDone)


def test_a_size_that_cannot_be_compiled_is_tried_once_for_all_its_requests(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes, arena = Model.open(tiny_bundle, "onnxruntime", threads=1), list[Size](), Denoiser._arena

    def refuse(denoiser: Denoiser, size: Size, branches: int = 0) -> Any:
        sizes.append(size)
        if size[:2] == (8, 8):
            raise EngineError("no memory")
        return arena(denoiser, size, branches)

    monkeypatch.setattr(Denoiser, "_arena", refuse)
    factor = model.manifest.vae.factor
    large = [Request("a ring", steps=1, size=(8 * factor, 8 * factor), num_images=2) for _ in range(3)]
    events = [*generate(model, [*large, Request("a ring", steps=1, size=(4 * factor, 4 * factor))])]

    assert [size[:2] for size in sizes].count((8, 8)) == 1
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.id, event.index) for event in failed] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(str(event.error) == "no memory" for event in failed)
    assert isinstance(events[-1], PictureDone)


def test_an_engine_that_cannot_be_opened_in_the_background_fails_when_it_is_needed(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    open_graph = model._open_graph

    def broken(name: str) -> Any:
        if name == "vae_decoder":
            raise EngineError("no memory")
        return open_graph(name)

    model._open_graph = broken
    [*_, last] = generate(model, [Request("a ring", steps=1)])

    assert isinstance(last, Failed)
    assert str(last.error) == "no memory"
