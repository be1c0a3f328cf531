"""Families of flow matching, and words of several encoders, against diffusers' models."""

import gc
import math
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from oneword.engines.errors import EngineError, UsageError
from oneword.export import families
from oneword.export.source import Source, load_source
from oneword.runtime.concept import load_concept
from oneword.runtime.schedule import ScheduleKind
from oneword.train.cli import main
from oneword.train.learn import learn
from oneword.train.learner import Learner
from oneword.train.noising import FlowMatching
from oneword.train.pictures import Moments, read_pictures
from oneword.train.recipe import RECIPES, Compute, Recipe
from oneword.train.tasks import Task, make_word, picture_size
from oneword.train.word import Draw, Word, draw

QUICK = Recipe(steps=4, batch_size=4, learning_rate=0.01, weight_decay=0.0, compute=Compute.FP32)
WIDTHS = {"text_encoder": 16, "text_encoder_2": 12, "text_encoder_3": 32}
QWEN_WIDTH = 32
CLIP = ("text_encoder", "text_encoder_2")
FLUX = ("text_encoder", "text_encoder_3")
PROMPTS = ["a photo of a {}", "the {} on the ring"]


def a_word(*encoders: str, prompts: list[str] = PROMPTS) -> Word:
    rng = torch.Generator().manual_seed(1)
    mean = list(torch.randn(3, 16, 8, 8, generator=rng))
    rows = {name: torch.randn(1, WIDTHS.get(name, QWEN_WIDTH), generator=rng) * 0.1 for name in encoders}
    return Word("<toy>", Moments(3, mean, [torch.zeros(16, 8, 8)] * 3, None), rows, prompts, text="painting")


@pytest.mark.parametrize("size", [(8, 8), (16, 32)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_times_are_the_shifted_sigmoid_of_normal_quantiles(dynamic: bool, size: tuple[int, int]) -> None:
    """Static: shift 3. Dynamic: e^mu, with mu from 0.5 at 256 tokens to 1.15 at 4,096 (FluxPipeline)."""
    x_0, t = torch.zeros(3, 16, *size), torch.tensor([0, 500, 999])
    config = {"use_dynamic_shifting": True, "shift": 3.0} if dynamic else {"shift": 3.0}
    noising = FlowMatching(config, ScheduleKind.FLOW, patch=2)
    tokens = size[0] // 2 * size[1] // 2
    shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)) if dynamic else 3.0
    logistic = [1 / (1 + math.exp(-NormalDist().inv_cdf(p))) for p in (0.0005, 0.5005, 0.9995)]
    expected = torch.tensor([shift * s / (1 + (shift - 1) * s) for s in logistic])

    torch.testing.assert_close(noising.times(t, x_0), 1000 * expected)
    eps = torch.ones_like(x_0)
    torch.testing.assert_close(noising.noisy(x_0 + 2, eps, t), (2 - expected)[:, None, None, None].expand_as(x_0))
    torch.testing.assert_close(noising.target(x_0 + 2, eps, t), -eps)


@pytest.mark.parametrize("without", [(), ("text_encoder_3",)])
def test_the_gradient_in_sd3_is_that_of_the_original_models(tiny_sd3_dir: Path, without: tuple[str, ...]) -> None:
    """Reference: diffusers' pipeline and transformer, with autograd through the embedding tables."""
    from diffusers import StableDiffusion3Pipeline

    encoders = {name: suffix for name, suffix in zip(WIDTHS, ("", "_2", "_3"), strict=True) if name not in without}
    word, source = a_word(*encoders), load_source(tiny_sd3_dir, without=without)
    batch = draw(word, QUICK, 1000, torch.Generator().manual_seed(2))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir)
    if without:
        pipe.text_encoder_3 = pipe.tokenizer_3 = None
    tables = {name: add_word(pipe, word, name, suffix) for name, suffix in encoders.items()}
    texts = [prompt.format("<toy>") for prompt in batch.prompts]
    length = 256 if without else 24
    states, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    noisy, sigma, target = reference_noise(batch, lambda s: 3 * s / (1 + 2 * s))
    predicted = pipe.transformer(
        hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=states, pooled_projections=pooled
    ).sample

    assert_same_gradients(Learner(source, [word], QUICK, seed=7), batch, (predicted - target).square().mean(), tables)


@pytest.mark.parametrize("encoders", [FLUX, ("text_encoder_3",)])
@pytest.mark.parametrize("tiny_flux_dir", ["dev", "schnell"], indirect=True)
def test_the_gradient_in_flux_is_that_of_the_original_models(tiny_flux_dir: Path, encoders: tuple[str, ...]) -> None:
    """The network's guidance is 1. An encoder that the word is not learned for reads its text."""
    from diffusers import FluxPipeline

    word, source = a_word(*encoders), load_source(tiny_flux_dir)
    batch = draw(word, QUICK, 1000, torch.Generator().manual_seed(2))
    pipe = FluxPipeline.from_pretrained(tiny_flux_dir)
    suffixes = {"text_encoder": "", "text_encoder_3": "_2"}
    tables = {name: add_word(pipe, word, name, suffixes[name]) for name in encoders}
    texts = {name: [p.format("<toy>" if name in encoders else "painting") for p in batch.prompts] for name in FLUX}
    states, pooled, ids = pipe.encode_prompt(texts["text_encoder"], texts["text_encoder_3"], max_sequence_length=24)
    dev = pipe.transformer.config.guidance_embeds
    shift = math.exp(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)) if dev else 1
    noisy, sigma, target = reference_noise(batch, lambda s: shift * s / (1 + (shift - 1) * s))
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, 4, 16, 8, 8),
        timestep=sigma,
        guidance=torch.ones(4) if dev else None,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=ids,
        img_ids=pipe._prepare_latent_image_ids(4, 4, 4, torch.device("cpu"), torch.float32),
    ).sample
    loss = (predicted - pipe._pack_latents(target, 4, 16, 8, 8)).square().mean()

    assert_same_gradients(Learner(source, [word], QUICK, seed=7), batch, loss, tables)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_in_chroma_is_that_of_the_original_models(tiny_chroma_dir: Path, checkpointing: bool) -> None:
    """Reference: diffusers' pipeline and transformer, with a boolean mask. Its checkpointing loses the mask."""
    from diffusers import ChromaPipeline

    recipe = QUICK.with_changes(gradient_checkpointing=checkpointing)
    word, source = a_word("text_encoder_3", prompts=[*PROMPTS, "the</s> {} on the ring"]), load_source(tiny_chroma_dir)
    batch = draw(word, recipe, 1000, torch.Generator().manual_seed(2))
    assert any("</s>" in prompt for prompt in batch.prompts)  # it masks nothing
    pipe = ChromaPipeline.from_pretrained(tiny_chroma_dir)
    tables = {"text_encoder_3": add_word(pipe, word, "text_encoder_3", "")}
    texts = [prompt.format("<toy>") for prompt in batch.prompts]
    states, ids, mask, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=24)
    noisy, sigma, target = reference_noise(batch, lambda s: 3 * s / (1 + 2 * s))
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, 4, 16, 8, 8),
        timestep=sigma,
        encoder_hidden_states=states,
        txt_ids=ids,
        img_ids=pipe._prepare_latent_image_ids(4, 4, 4, torch.device("cpu"), torch.float32),
        attention_mask=pipe._prepare_attention_mask(4, 16, torch.float32, mask).bool(),
    ).sample
    loss = (predicted - pipe._pack_latents(target, 4, 16, 8, 8)).square().mean()

    assert_same_gradients(Learner(source, [word], recipe, seed=7), batch, loss, tables)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tiny_flux2_dir", ["base"], indirect=True)
def test_the_gradient_in_flux_2_is_that_of_the_original_models(tiny_flux2_dir: Path, checkpointing: bool) -> None:
    """The shift is that of many steps: e^mu, with mu from 0.5 at 256 tokens to 1.15 at 4,096, as in FLUX.1 dev."""
    from diffusers import Flux2KleinPipeline

    recipe = QUICK.with_changes(gradient_checkpointing=checkpointing)
    word, source = a_word("text_encoder_qwen3"), load_source(tiny_flux2_dir)
    batch = draw(word, recipe, 1000, torch.Generator().manual_seed(2))
    pipe = Flux2KleinPipeline.from_pretrained(tiny_flux2_dir)
    tables = {"text_encoder_qwen3": add_word(pipe, word, "text_encoder_qwen3", "")}
    texts = [prompt.format("<toy>") for prompt in batch.prompts]
    states, ids = pipe.encode_prompt(texts, max_sequence_length=48)
    shift = math.exp(0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256))
    noisy, sigma, target = reference_noise(batch, lambda s: shift * s / (1 + (shift - 1) * s))
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy),
        timestep=sigma,
        encoder_hidden_states=states,
        txt_ids=ids,
        img_ids=pipe._prepare_latent_ids(noisy),
    ).sample
    loss = (predicted - pipe._pack_latents(target)).square().mean()

    assert_same_gradients(Learner(source, [word], recipe, seed=7), batch, loss, tables)


LEARNED = [
    ("sd3", tuple(WIDTHS)),
    ("sd3", CLIP),
    ("flux", FLUX),
    ("flux", ("text_encoder_3",)),
    ("chroma", ("text_encoder_3",)),
    ("flux2", ("text_encoder_qwen3",)),
]
"""Models, and the encoders that a word is learned for."""


@pytest.mark.parametrize(
    ("model", "encoders", "recipe"),
    [
        *[(*case, recipe) for case in LEARNED for recipe in ("directional", "precise")],
        (*LEARNED[0], "fast"),  # AdamW
    ],
)
@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
@pytest.mark.parametrize("tiny_flux2_dir", ["base"], indirect=True)
def test_the_loss_falls_to_a_fifth_if_a_word_can_explain_the_targets(
    tiny_sd3_dir: Path,
    tiny_flux_dir: Path,
    tiny_chroma_dir: Path,
    tiny_flux2_dir: Path,
    model: str,
    encoders: tuple[str, ...],
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = {"sd3": tiny_sd3_dir, "flux": tiny_flux_dir, "chroma": tiny_chroma_dir, "flux2": tiny_flux2_dir}
    source, word = load_source(folders[model]), a_word(*encoders, prompts=PROMPTS[:1])
    assert_loss_falls_to_a_fifth(source, word, settings_of(recipe), "proj_out", monkeypatch)


def turned(vectors: torch.Tensor, angle: float, rng: torch.Generator) -> torch.Tensor:
    """Vectors [..., D] turned in random directions by about an angle, of the same lengths."""
    noise = torch.randn(vectors.shape, generator=rng)
    unit, aside = (v / v.norm(dim=-1, keepdim=True) for v in (vectors, noise))
    away = unit + angle * aside
    return away * (vectors.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True))


def test_sd3_without_t5_attends_to_zeros_in_its_place(tiny_sd3_dir: Path) -> None:
    learner = Learner(load_source(tiny_sd3_dir, without=["text_encoder_3"]), [a_word(*CLIP)], QUICK, seed=7)
    context, pooled, mask = learner._context([(0, "a {}")])
    assert mask is None
    assert context.shape == (1, 20 + 256, 32)
    assert pooled is not None
    assert not context[0, 20:].any()
    assert not context[0, :20, 16 + 12 :].any()


@pytest.mark.parametrize("recipe", ["directional", "precise"])
@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
@pytest.mark.parametrize("tiny_flux2_dir", ["base"], indirect=True)
def test_directions_keep_the_mean_length_of_each_encoders_vocabulary(
    tiny_sd3_dir: Path, tiny_flux_dir: Path, tiny_flux2_dir: Path, recipe: str
) -> None:
    """The word's two vectors start at a half and at three times that."""
    for model, encoders in (
        (tiny_sd3_dir, tuple(WIDTHS)),
        (tiny_flux_dir, FLUX),
        (tiny_flux2_dir, ("text_encoder_qwen3",)),
    ):
        source, word = load_source(model), a_word(*encoders)
        lengths = {name: mean_length(source.text_encoders[name]) for name in encoders}
        assert len({round(length, 3) for length in lengths.values()}) == len(encoders)
        scaled = {name: rows / rows.norm() * lengths[name] for name, rows in word.initial.items()}
        word.initial = start = {name: torch.cat([rows / 2, 3 * rows.flip(1)]) for name, rows in scaled.items()}
        learner = Learner(source, [word], settings_of(recipe, steps=3, batch_size=2, vectors=2), seed=7)
        for _ in range(3):
            learner.step()
            for name, rows in learner.concept(0, {}).vectors.items():
                np.testing.assert_allclose(np.linalg.norm(rows, axis=1), lengths[name], rtol=1e-5)
        for name, rows in word.rows.items():
            assert (torch.cosine_similarity(rows, start[name]) < 0.9999).all()


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_words_of_transformers_are_learned_at_the_recipes_size(
    tiny_sd3_dir: Path, tiny_flux_dir: Path, tmp_path: Path
) -> None:
    task = Task(Path(arguments(tmp_path, tiny_sd3_dir, tmp_path)[0]), "<toy>", "star")
    for model in (tiny_sd3_dir, tiny_flux_dir):
        source, recipe = load_source(model), QUICK.with_changes(steps=1, size=96)
        pictures = read_pictures(task.images, picture_size(source, recipe))
        assert make_word(source, task, pictures, recipe, 0).moments.mean[0].shape == (16, 12, 12)
        *_, last = learn(source, [task], recipe)
        assert math.isfinite(last.history[0][0])
    for settings, message in (
        ({"size": 88}, "size is 88, but must be a multiple of 16 and at most 384 for "),
        ({"size": 400}, "size is 400, but must be a multiple of 16 and at most 384 for "),
        ({"size": 208, "buckets": True}, "size is 208 with buckets, but must be a multiple of 16 and at most 192 for "),
    ):
        with pytest.raises(UsageError, match=message):
            picture_size(load_source(tiny_sd3_dir), QUICK.with_changes(**settings))


@pytest.mark.parametrize("recipe", ["directional", "precise", "fast"])
@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
@pytest.mark.parametrize("tiny_flux2_dir", ["base"], indirect=True)
def test_a_resumed_run_has_the_same_bits(
    tiny_sd3_dir: Path, tiny_flux_dir: Path, tiny_chroma_dir: Path, tiny_flux2_dir: Path, recipe: str
) -> None:
    settings = settings_of(recipe, steps=4, batch_size=2, compute=Compute.BF16)
    cases = [
        (tiny_sd3_dir, tuple(WIDTHS)),
        (tiny_sd3_dir, CLIP),
        (tiny_flux_dir, FLUX),
        (tiny_chroma_dir, ("text_encoder_3",)),
        (tiny_flux2_dir, ("text_encoder_qwen3",)),
    ]
    for model, encoders in cases[:1] if recipe == "fast" else cases:
        # CLIP only pools in FLUX.1.
        out = {} if recipe != "precise" else set(encoders) - ({"text_encoder"} if model == tiny_flux_dir else set())
        assert_same_bits_resumed(model, lambda names=encoders: a_word(*names), settings, set(out))


class Forgetful(dict[Any, Any]):
    """A cache that finds nothing."""

    def __contains__(self, key: object) -> bool:
        return False


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
@pytest.mark.parametrize(("encoders", "frozen"), [(CLIP, "text_encoder_3"), (("text_encoder_3",), "text_encoder")])
def test_an_encoder_without_rows_encodes_each_prompt_once_and_changes_no_bit(
    tiny_sd3_dir: Path, tiny_flux_dir: Path, encoders: tuple[str, ...], frozen: str
) -> None:
    model = tiny_sd3_dir if encoders is CLIP else tiny_flux_dir
    settings = QUICK.with_changes(per_image=0.5)
    cached, uncached, released = (Learner(load_source(model), [a_word(*encoders)], settings, seed=7) for _ in range(3))
    uncached._frozen[frozen]._encoded = Forgetful()
    released.release_encoders()
    calls: dict[int, list[Any]] = {id(learner): [] for learner in (cached, uncached)}
    for learner in (cached, uncached):
        module, called = learner.encoders[frozen].encoder, calls[id(learner)]
        module.register_forward_pre_hook(lambda module, inputs, called=called: called.append(inputs))

    for learner in (cached, uncached, released):
        while not learner.finished():
            learner.step()

    # Two prompts, with and without the word of a picture, which this encoder reads as nothing.
    assert len(calls[id(cached)]) <= 4 < len(calls[id(uncached)])
    for learner in (uncached, released):
        assert learner.words[0].losses == cached.words[0].losses
        for name in encoders:
            assert torch.equal(learner.words[0].rows[name], cached.words[0].rows[name])
    plain = cached.encoders[frozen]
    texts = [cached._text(frozen, 0, prompt) for prompt in PROMPTS]
    none = torch.zeros(0, WIDTHS[frozen])
    for ours, theirs in zip(cached._frozen[frozen](texts), plain(texts, none), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # one by one, and as a batch
    with pytest.raises(EngineError, match=f"'another {{}}' was not encoded before {frozen} was freed"):
        released._context([(0, "another {}")])


def test_weights_of_encoders_without_rows_are_freed(
    tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import T5EncoderModel

    folder = Path(arguments(tmp_path, tiny_sd3_dir, tmp_path)[0])
    sources, weights = list[Source](), list[weakref.ref[torch.Tensor]]()

    def load(*arguments: Any, **options: Any) -> Source:
        sources.append(load_source(*arguments, **options))
        weights.extend(map(weakref.ref, sources[-1].text_encoders["text_encoder_3"].parameters()))
        return sources[-1]

    monkeypatch.setattr("oneword.train.learn.load_source", load)
    for encoders, freed in ((tuple(WIDTHS), False), (CLIP, True)):
        recipe = QUICK.with_changes(encoders=encoders, steps=2, batch_size=2)
        *_, last = learn(tiny_sd3_dir, [Task(folder, "<toy>", "star")], recipe)
        assert last.concepts[0].vectors.keys() == set(encoders)
        source = sources.pop()
        parts = {"transformer": source.network, "vae": source.vae, **source.text_encoders}
        in_memory = {name for name, part in parts.items() if not all(p.is_meta for p in part.parameters())}
        assert in_memory == parts.keys() - ({"text_encoder_3"} if freed else set())
        assert all(not p.is_meta for name in in_memory for p in parts[name].parameters())
        gc.collect()
        assert all(weight() is None for weight in weights) is freed
        weights.clear()

    t5 = T5EncoderModel.from_pretrained(tiny_sd3_dir / "text_encoder_3").num_parameters()
    assert numbers_in_memory(load_source(tiny_sd3_dir)) - numbers_in_memory(source) == t5
    assert (t5, numbers_in_memory(source)) == (19_648, 225_803)  # as docs/guide/training.md says


def numbers_in_memory(source: Source) -> int:
    parts = [source.network, source.vae, *source.text_encoders.values()]
    return sum(p.numel() for part in parts for p in part.parameters() if not p.is_meta)


@pytest.mark.parametrize("encoders", [tuple(WIDTHS), CLIP])
def test_parts_on_threads_and_checkpointing_give_the_gradients_of_the_whole_batch(
    tiny_sd3_dir: Path, encoders: tuple[str, ...]
) -> None:
    recipe = QUICK.with_changes(batch_size=16)
    word = a_word(*encoders)
    learner = Learner(load_source(tiny_sd3_dir), [word], recipe, seed=7)
    draws = {0: draw(word, recipe, 1000)}
    expected = torch.autograd.grad(learner._losses(draws)[0], list(word.rows.values()))
    saving_word = a_word(*encoders)
    saving = Learner(load_source(tiny_sd3_dir), [saving_word], recipe.with_changes(gradient_checkpointing=True), seed=7)
    before = torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        learner._accumulate(draws)
        saving._accumulate(draws)
    finally:
        torch.set_num_threads(before)

    assert list(map(callable, learner.network._recordings.values())) == [True]
    for rows, other, gradient in zip(word.rows.values(), saving_word.rows.values(), expected, strict=True):
        for learned in (rows, other):
            tolerance = 1e-6 * float(gradient.abs().max()) + 1e-9
            torch.testing.assert_close(learned.grad, gradient, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "widths", "text"),
    [
        ([], {"clip_g": 12, "clip_l": 16, "t5xxl": 32}, None),
        (["--set", "encoders=text_encoder,text_encoder_2"], {"clip_g": 12, "clip_l": 16}, "star"),
    ],
)
def test_the_command_writes_a_word_of_sd3(
    tiny_sd3_dir: Path, tmp_path: Path, settings: list[str], widths: dict[str, int], text: str | None
) -> None:
    output = tmp_path / "toy.safetensors"

    assert main([*arguments(tmp_path, tiny_sd3_dir, output), *settings, "--preview-every", "2"]) == 0

    assert_written(output, widths, text)
    assert len(list(tmp_path.glob("toy.previews/*.png"))) == 1


@pytest.mark.parametrize(
    ("settings", "widths", "text"),
    [([], {"clip_l": 16, "t5xxl": 32}, None), (["--set", "encoders=text_encoder_3"], {"t5xxl": 32}, "star")],
)
@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_the_command_writes_a_word_of_flux(
    tiny_flux_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    widths: dict[str, int],
    text: str | None,
) -> None:
    monkeypatch.setattr(families, "FLUX_SAMPLE_SIZE", 8)
    output = tmp_path / "toy.safetensors"

    assert main([*arguments(tmp_path, tiny_flux_dir, output), *settings]) == 0

    assert_written(output, widths, text)


def assert_written(output: Path, widths: dict[str, int], text: str | None) -> None:
    """The file has a row of each key's width, which are those of the word, and the text for other encoders."""
    with safe_open(output, "numpy") as file:
        rows = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is not a mapping
        assert file.metadata().get("text") == text
    assert {key: value.shape for key, value in rows.items()} == {key: (1, width) for key, width in widths.items()}
    assert all(np.isfinite(value).all() and value.any() for value in rows.values())
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    vectors = load_concept(output).vectors
    assert {keys[name] for name in vectors} == rows.keys()
    for name, value in vectors.items():
        np.testing.assert_array_equal(value, rows[keys[name]])


@pytest.mark.parametrize(
    ("encoders", "missing"),
    [
        ("text_encoder", "text_encoder_2"),
        ("text_encoder_2", "text_encoder"),
        ("text_encoder_3", "text_encoder, text_encoder_2"),
        ("text_encoder,text_encoder_3", "text_encoder_2"),
        ("text_encoder_2,text_encoder_3", "text_encoder"),
    ],
)
def test_a_word_of_sd3_without_a_clip_encoder_is_refused_in_one_line(
    tiny_sd3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoders: str, missing: str
) -> None:
    output = tmp_path / "toy.safetensors"
    assert main([*arguments(tmp_path, tiny_sd3_dir, output), "--set", f"encoders={encoders}"]) != 0
    [error] = capsys.readouterr().err.splitlines()
    message = f"encoders has no {missing}, which every word of this model needs: add it; text_encoder_3 may be left out"
    assert message in error
    assert not output.exists()


def test_the_command_does_not_load_an_encoder_that_is_left_out(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """The model's folder has no T5, so loading it would fail."""
    model, output = tmp_path / "model", tmp_path / "toy.safetensors"
    shutil.copytree(tiny_sd3_dir, model, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    command = arguments(tmp_path, model, output)

    assert main(command) == 1
    assert main([*command, "--without", "text_encoder_3"]) == 0

    with safe_open(output, "numpy") as file:
        assert sorted(file.keys()) == ["clip_g", "clip_l"]
        assert file.metadata()["text"] == "star"  # for T5, in models that have it


def test_a_run_is_not_resumed_with_other_encoders(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    folder, recipe = Path(arguments(tmp_path, tiny_sd3_dir, tmp_path)[0]), QUICK.with_changes(batch_size=2)
    run = learn(tiny_sd3_dir, [Task(folder, "<toy>", "star")], recipe, checkpoints=tmp_path / "run")
    next(run)
    run.close()

    options = {"checkpoints": tmp_path / "run", "without": ["text_encoder_3"]}
    message = "text encoders was text_encoder, text_encoder_2, text_encoder_3 and is text_encoder, text_encoder_2;"
    with pytest.raises(UsageError, match=message):
        next(learn(tiny_sd3_dir, [Task(folder, "<toy>", "star")], recipe, **options))
    with pytest.raises(UsageError, match="encoders has text_encoder_3: the model's text encoders are text_encoder"):
        next(learn(tiny_sd3_dir, [Task(folder, "<toy>")], recipe.with_changes(encoders=tuple(WIDTHS)), **options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--without", "text_encoder"],
            "--without text_encoder: the model is a FluxPipeline, it needs all its encoders",
        ),
        (["--set", "encoders=t5"], "encoders has t5: the model's text encoders are text_encoder, text_encoder_3"),
        (
            ["--set", "encoders=text_encoder"],
            "encoders has no text_encoder_3, which every word of this model needs: add it; text_encoder may be left",
        ),
        (["--min-snr", "5"], "min_snr is 5.0 and .* is a model of flow matching, whose loss has no weights: leave"),
    ],
)
@pytest.mark.parametrize("tiny_flux_dir", ["schnell"], indirect=True)
def test_settings_that_do_not_suit_flux_are_refused(
    tiny_flux_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(families, "FLUX_SAMPLE_SIZE", 8)
    assert main([*arguments(tmp_path, tiny_flux_dir, tmp_path / "toy.safetensors"), *settings]) != 0
    [error] = capsys.readouterr().err.splitlines()
    assert re.search(message, error)


def arguments(folder: Path, model: Path, output: Path) -> list[str]:
    """Of a command that learns from three pictures of noise for two steps."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 60).convert("RGB").save(pictures / f"{i}.png")
    options = [str(pictures), "--model", str(model), "--token", "<toy>", "--init", "star", "--output", str(output)]
    return [*options, "--steps", "2", "--batch-size", "2"]


def add_word(pipe: Any, word: Word, encoder: str, suffix: str) -> torch.Tensor:
    """Adds the word's row to one encoder of a pipeline. Returns the encoder's table and the row's id."""
    tokenizer, model = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
    tokenizer.add_tokens([word.token])
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    table: torch.Tensor = model.get_input_embeddings().weight
    with torch.no_grad():
        table[tokenizer.convert_tokens_to_ids(word.token)] = word.initial[encoder][0]
    return table


def reference_noise(
    batch: Draw, shift: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x = (1 - s) x0 + s eps, s [B] and eps - x0."""
    x_0, eps = torch.stack(list(batch.latents)), torch.stack(list(batch.eps))
    normal = torch.tensor([NormalDist().inv_cdf((int(t) + 0.5) / 1000) for t in batch.timesteps])
    sigma = shift(torch.sigmoid(normal))
    wide = sigma[:, None, None, None]
    return (1 - wide) * x_0 + wide * eps, sigma, eps - x_0


def assert_same_gradients(
    learner: Learner, batch: Draw, reference: torch.Tensor, tables: dict[str, torch.Tensor]
) -> None:
    loss = learner._losses({0: batch})[0]
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for name, table in tables.items():
        grad, word = learner.words[0].rows[name].grad, learner.words[0]
        [row] = (table.detach() - word.initial[name][0]).abs().sum(1).lt(1e-9).nonzero()[:, 0].tolist()
        assert grad is not None
        assert table.grad is not None
        expected = table.grad[row]
        torch.testing.assert_close(grad[0], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def assert_loss_falls_to_a_fifth(
    source: Source, word: Word, recipe: Recipe, last_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targets are the network's predictions with another word, whose rows are half a radian away, and its output
    vectors a tenth. A word is one token of many, so the predictions depend little on it."""
    source.network.get_submodule(last_layer).weight.mul_(100)  # the prior of directions is not scaled with the loss
    settings = recipe.with_changes(steps=40, batch_size=4, output_rate=0.03)
    learner = Learner(source, [word], settings, seed=7)
    rng = torch.Generator().manual_seed(3)
    rows, out = (
        {name: turned(value.detach(), angle, rng) for name, value in vectors.items()}
        for vectors, angle in ((word.rows, 0.5), (word.out, 0.1))
    )

    @torch.no_grad()
    def target(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        prompts = [(0, word.prompts[0])] * len(x_0)
        conditions = learner._conditions(prompts, learner._stages(t, x_0), {0: rows}, {0: out})
        return learner._predict(learner.noising.noisy(x_0, eps, t), t, conditions)

    monkeypatch.setattr(learner.noising, "target", target)
    while not learner.finished():
        learner.step()
    assert learner.probe_loss(0) < 0.2 * word.start_loss


def assert_same_bits_resumed(model: Path, new_word: Callable[[], Word], recipe: Recipe, out: set[str]) -> None:
    """A run of four steps against one that another process would continue after two; `out` are the encoders that the
    word has output vectors of."""
    whole, first, second = (Learner(load_source(model), [new_word()], recipe, seed=7) for _ in range(3))
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    second.restore(*first.state())
    for _ in range(2):
        second.step()
    [expected], [resumed] = whole.words, second.words
    assert resumed.losses == expected.losses
    for name in expected.initial:
        assert torch.equal(resumed.rows[name], expected.rows[name])
        assert not torch.equal(expected.rows[name], expected.initial[name])
    assert resumed.out.keys() == expected.out.keys() == out
    for name in out:
        assert torch.equal(resumed.out[name], expected.out[name])
        assert not torch.equal(expected.out[name], expected.initial_out[name])


def settings_of(recipe: str, **changes: Any) -> Recipe:
    """A recipe for joint attention, whose keys and values share their states."""
    values_only = {"values_only": False} if recipe == "precise" else {}
    return RECIPES[recipe].with_changes(**{"compute": Compute.FP32, **values_only, **changes})


def mean_length(encoder: Any) -> float:
    """Of the rows of a transformers model's vocabulary; none is zero in the tiny models."""
    lengths = encoder.get_input_embeddings().weight.detach().norm(dim=1)
    return float(lengths[lengths > 0].mean())
