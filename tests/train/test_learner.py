import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from oneword.engines.errors import EngineError, UsageError
from oneword.export.source import load_source
from oneword.train.learner import Learner
from oneword.train.pictures import Moments
from oneword.train.recipe import Compute, Norm, Recipe
from oneword.train.word import Batch, Draw, Word, draw

QUICK = Recipe(steps=4, batch_size=4, learning_rate=0.01, weight_decay=0.0, compute=Compute.FP32)
WIDTH = 32


def random_moments(seed: int = 0, pictures: int = 3) -> Moments:
    rng = torch.Generator().manual_seed(seed)
    mean = list(torch.randn(pictures, 4, 4, 4, generator=rng))
    return Moments(pictures, mean, [torch.full_like(mean[0], 0.1)] * pictures, None)


def a_word(token: str = "<toy>", seed: int = 0, recipe: Recipe = QUICK) -> Word:
    rows = torch.randn(recipe.vectors, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.1
    return Word(token, random_moments(seed), {"text_encoder": rows}, ["a photo of a {}", "the {}"])


def learned(model: Path, words: list[Word], recipe: Recipe = QUICK) -> list[np.ndarray]:
    learner = Learner(load_source(model), words, recipe, seed=7)
    while not learner.finished():
        learner.step()
    return [learner.concept(i, {}).vectors["text_encoder"] for i in range(len(words))]


@pytest.mark.parametrize("fixture", ["tiny_model_dir", "tiny_v_model_dir"])
def test_the_gradient_is_that_of_the_textbook_loss_through_the_original_models(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """Reference: the modules of diffusers and transformers, with the row in their embedding matrix."""
    model: Path = request.getfixturevalue(fixture)
    word = a_word()
    learner = Learner(load_source(model), [word], QUICK, seed=7)
    state = word.generator.get_state()
    batch = draw(word, QUICK, 1000)
    word.generator.set_state(state)
    loss = learner._losses({0: batch})[0]
    loss.backward()

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.tokenizer.add_tokens(["<toy>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    row = pipe.tokenizer.convert_tokens_to_ids("<toy>")
    matrix = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        matrix[row] = word.initial["text_encoder"][0]
    prompts = [prompt.format("<toy>") for prompt in batch.prompts]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    latents, eps = torch.stack(list(batch.latents)), torch.stack(list(batch.eps))
    noisy = scheduler.add_noise(latents, eps, batch.timesteps)
    predicted = pipe.unet(noisy, batch.timesteps, pipe.text_encoder(ids.input_ids)[0]).sample
    target = (
        scheduler.get_velocity(latents, eps, batch.timesteps)
        if scheduler.config.prediction_type == "v_prediction"
        else eps
    )
    reference = (predicted - target).square().mean()
    reference.backward()

    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    grad = word.rows["text_encoder"].grad
    assert grad is not None
    torch.testing.assert_close(
        grad[0], matrix.grad[row], rtol=1e-3, atol=1e-6 * float(matrix.grad[row].abs().max()) + 1e-9
    )


def test_only_the_rows_are_learned_and_in_the_optimiser(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    frozen = {f"{part}.{name}": value.clone() for part, name, value in weights_of(source)}
    word = a_word()
    learner = Learner(source, [word], QUICK, seed=7)

    learner.step()

    assert all(torch.equal(frozen[f"{part}.{name}"], value) for part, name, value in weights_of(source))
    assert all(not value.requires_grad and value.grad is None for _, _, value in weights_of(source))
    numbers = sum(p.numel() for group in word.optimizer.param_groups for p in group["params"])
    assert numbers == WIDTH
    state = word.optimizer.state_dict()["state"]
    assert sum(value.numel() for value in state[0].values() if value.ndim) == 2 * WIDTH
    assert not torch.equal(word.rows["text_encoder"].detach(), word.initial["text_encoder"])


def weights_of(source: Any) -> list[tuple[str, str, torch.Tensor]]:
    parts = {"unet": source.unet, "vae": source.vae, **source.text_encoders}
    return [(part, name, value) for part, module in parts.items() for name, value in module.named_parameters()]


def test_words_in_one_batch_do_not_affect_each_other(tiny_model_dir: Path) -> None:
    """Equal up to the order of summation, which depends on the batch size."""
    together = learned(tiny_model_dir, [a_word("<a>", 1), a_word("<b>", 2)])
    alone = [learned(tiny_model_dir, [a_word("<a>", 1)])[0], learned(tiny_model_dir, [a_word("<b>", 2)])[0]]

    for rows, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(rows, expected, atol=2e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_with_one_word_per_call_a_word_has_the_bits_it_has_alone(tiny_model_dir: Path) -> None:
    recipe = QUICK.with_changes(words_per_call=1)
    together = learned(tiny_model_dir, [a_word("<a>", 1), a_word("<b>", 2)], recipe)
    alone = learned(tiny_model_dir, [a_word("<b>", 2)], recipe)

    np.testing.assert_array_equal(together[1], alone[0])


def test_nothing_before_the_first_cross_attention_is_differentiated(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    word = a_word()
    learner = Learner(source, [word], QUICK, seed=7)
    wants_gradient: dict[str, bool] = {}
    first_block = source.unet.down_blocks[0]
    for name, module in (("conv_in", source.unet.conv_in), ("resnet", first_block.resnets[0])):
        module.register_forward_hook(
            lambda module, inputs, output, name=name: wants_gradient.update({name: output.requires_grad})
        )
    first_block.attentions[0].register_forward_hook(
        lambda module, inputs, output: wants_gradient.update(attention=output[0].requires_grad)
    )

    learner._losses({0: draw(word, QUICK, 1000)})

    assert wants_gradient == {"conv_in": False, "resnet": False, "attention": True}


def test_pictures_of_two_shapes_share_a_step(tiny_model_dir: Path) -> None:
    """The loss is the mean over all latents: 48 and 64 per channel, weighted by hand from each shape's loss."""
    word = a_word()
    learner = Learner(load_source(tiny_model_dir), [word], QUICK, seed=7)
    rng = torch.Generator().manual_seed(3)
    latents, eps = ([torch.randn(4, h, w, generator=rng) for h, w in ((8, 6), (8, 8))] for _ in range(2))

    def loss(*rows: int) -> float:
        timesteps = torch.tensor([100 + 500 * row for row in rows])
        return learner.probe_loss(
            0, Draw([latents[r] for r in rows], [eps[r] for r in rows], timesteps, None, ["the {}"] * len(rows))
        )

    assert loss(0, 1) == pytest.approx((48 * loss(0) + 64 * loss(1)) / 112, rel=1e-5)


def test_the_response_to_two_prompts_is_their_predictions_variance(tiny_model_dir: Path) -> None:
    """Reference: the modules of diffusers and transformers."""
    word = a_word()
    learner = Learner(load_source(tiny_model_dir), [word], QUICK, seed=7)
    star = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    row = star.tokenizer("star", add_special_tokens=False).input_ids
    rows = {"text_encoder": star.text_encoder.get_input_embeddings().weight[row].detach()}
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    ids = star.tokenizer(["a star", "a painting of a star"], padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        states = star.text_encoder(ids.input_ids)[0]
        first, second = star.unet(noise, torch.tensor([800, 800]), states).sample

    response = learner.response(0, ["a {}", "a painting of a {}"], rows)

    assert response == pytest.approx(float((first - second).square().mean()) / 4, rel=1e-3)
    assert learner.response(0, ["a {}", "a {}"], rows) == pytest.approx(0, abs=1e-12)


def test_the_same_seed_gives_the_same_bits(tiny_model_dir: Path) -> None:
    np.testing.assert_array_equal(learned(tiny_model_dir, [a_word()])[0], learned(tiny_model_dir, [a_word()])[0])


def test_learning_lowers_the_loss_on_a_fixed_batch(tiny_model_dir: Path) -> None:
    recipe = QUICK.with_changes(steps=60, learning_rate=0.05)
    word = a_word(recipe=recipe)
    learner = Learner(load_source(tiny_model_dir), [word], recipe, seed=7)
    batch = draw(a_word_with_another_stream(), recipe, 1000)
    before = learner.probe_loss(0, batch)

    while not learner.finished():
        learner.step()

    assert learner.probe_loss(0, batch) < before


def a_word_with_another_stream() -> Word:
    word = a_word()
    word.generator.manual_seed(99)
    return word


def test_a_vector_that_has_not_joined_keeps_its_initial_value(tiny_model_dir: Path) -> None:
    recipe = QUICK.with_changes(vectors=2, grow_at=(2,), weight_decay=0.1)
    word = a_word(recipe=recipe)
    learner = Learner(load_source(tiny_model_dir), [word], recipe, seed=7)

    learner.step()
    start = word.initial["text_encoder"]
    assert torch.equal(word.rows["text_encoder"][1], start[1])
    assert not torch.equal(word.rows["text_encoder"][0], start[0])
    for _ in range(3):
        learner.step()
    assert not torch.equal(word.rows["text_encoder"][1], start[1])


def test_a_word_that_stopped_gets_no_further_vectors(tiny_model_dir: Path) -> None:
    recipe = QUICK.with_changes(vectors=2, grow_at=(2,))
    words = [a_word("<a>", 1, recipe), a_word("<b>", 2, recipe)]
    learner = Learner(load_source(tiny_model_dir), words, recipe, seed=7)
    learner.step()
    words[0].stopped = True
    while not learner.finished():
        learner.step()

    assert [len(learner.concept(i, {}).vectors["text_encoder"]) for i in range(2)] == [1, 2]


def test_per_picture_words_learn_beside_the_shared_word_and_are_left_out_of_the_concept(tiny_model_dir: Path) -> None:
    recipe = QUICK.with_changes(per_image=1.0)
    word = a_word(recipe=recipe)
    learner = Learner(load_source(tiny_model_dir), [word], recipe, seed=7)
    learner.step()

    assert word.picture_rows["text_encoder"].shape == (3, WIDTH)
    assert (word.picture_rows["text_encoder"].detach() != word.initial["text_encoder"]).any(dim=1).all()
    assert learner.concept(0, {}).vectors["text_encoder"].shape == (1, WIDTH)


def test_parts_on_threads_add_up_to_the_gradient_of_the_whole_batch(tiny_model_dir: Path) -> None:
    """Two words of 8 pictures, the first with half of them masked: two parts, equal up to the order of sums."""
    recipe = QUICK.with_changes(batch_size=8, init_weight=0.1)
    words = [a_word("<a>", 1, recipe), a_word("<b>", 2, recipe)]
    learner = Learner(load_source(tiny_model_dir), words, recipe, seed=7)
    draws = {index: draw(word, recipe, 1000) for index, word in enumerate(words)}
    masks = [torch.full((1, 4, 4), float(i % 2)) for i in range(8)]
    draws[0] = replace(draws[0], masks=masks)
    rows = [word.rows["text_encoder"] for word in words]
    whole = [loss + learner._penalty(index) for index, loss in enumerate(learner._losses(draws))]
    expected = torch.autograd.grad(torch.stack(whole).sum(), rows)
    before = torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        losses = learner._accumulate(draws)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

    assert list(map(callable, learner.network._recordings.values())) == [True]
    assert losses == pytest.approx([loss.item() for loss in whole], rel=1e-5)
    for row, grad in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.grad, grad, rtol=1e-3, atol=1e-6)


def test_each_part_of_a_step_runs_on_its_own_single_thread(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads and 16 pictures, so that nothing waits for a thread that a busy process delays."""
    recipe = QUICK.with_changes(batch_size=16)
    learner = Learner(load_source(tiny_model_dir), [a_word(recipe=recipe)], recipe, seed=7)
    parts: list[tuple[int, int, int]] = []
    errors = learner._errors

    def recording_errors(batch: Batch, part: Sequence[int]) -> torch.Tensor:
        parts.append((threading.get_ident(), torch.get_num_threads(), len(part)))
        return errors(batch, part)

    monkeypatch.setattr(learner, "_errors", recording_errors)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        learner.step()
    finally:
        torch.set_num_threads(before)

    step = parts[1:]  # the first is the probe
    assert [(threads, size) for _, threads, size in step] == [(1, 8), (1, 8)]
    assert len({thread for thread, _, _ in step}) == 2


def test_masked_latents_do_not_count(tiny_model_dir: Path) -> None:
    """The loss is the mean over unmasked latents: the losses of two halves average to the loss of the whole."""
    word = a_word()
    learner = Learner(load_source(tiny_model_dir), [word], QUICK, seed=7)
    plain = draw(word, QUICK, 1000)
    mask = torch.zeros(4, 1, 4, 4)
    mask[..., :2] = 1

    def loss(m: torch.Tensor) -> float:
        return learner.probe_loss(0, Draw(plain.latents, plain.eps, plain.timesteps, list(m), plain.prompts))

    assert loss(torch.ones_like(mask)) == pytest.approx(learner.probe_loss(0, plain), rel=1e-5)
    assert (loss(mask) + loss(1 - mask)) / 2 == pytest.approx(learner.probe_loss(0, plain), rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_word(tiny_model_dir: Path) -> None:
    word = a_word()
    word.moments = Moments(3, [torch.full((4, 4, 4), torch.nan)] * 3, [torch.ones(4, 4, 4)] * 3, None)
    learner = Learner(load_source(tiny_model_dir), [word], QUICK, seed=7)

    with pytest.raises(EngineError, match="the loss of '<toy>' is nan at step 1"):
        learner.step()


def test_a_prompt_too_long_for_the_word_is_refused(tiny_model_dir: Path) -> None:
    word = a_word()
    word.prompts = ["a photo of a red blue green star ring cat dog in style and on with painting red red {}"]

    with pytest.raises(UsageError, match="shorten the caption"):
        Learner(load_source(tiny_model_dir), [word], QUICK, seed=7)


@pytest.mark.parametrize("later", [{"grow_at": (3,)}, {"per_image": 0.01}])
def test_a_prompt_that_would_be_too_long_at_a_later_step_is_refused_at_once(
    tiny_model_dir: Path, later: dict[str, Any]
) -> None:
    """The prompt and the word fill the encoder once the last vector has joined; a picture's word is one token more,
    after " with"."""
    source = load_source(tiny_model_dir)
    room = source.text_encoders["text_encoder"].config.max_position_embeddings - 2
    fitting = QUICK.with_changes(vectors=room - 4)  # "a photo of a"
    longer = fitting.with_changes(vectors=fitting.vectors + ("grow_at" in later), **later)
    words = [a_word(recipe=recipe) for recipe in (fitting, longer)]
    for word in words:
        word.prompts = ["the {}", "a photo of a {}"]

    Learner(source, words[:1], fitting, seed=7)
    with pytest.raises(UsageError, match=rf"'a photo of a {{}}.*tokens with the word, but text_encoder takes {room}"):
        Learner(source, words[1:], longer, seed=7)


def test_accumulated_gradients_are_the_mean_of_their_draws(tiny_model_dir: Path) -> None:
    recipe = QUICK.with_changes(accumulation=3, batch_size=2)
    word, twin = a_word(), a_word()
    learner, reference = (Learner(load_source(tiny_model_dir), [item], recipe, seed=7) for item in (word, twin))
    gradients = []
    for _ in range(3):
        (loss,) = reference._losses({0: draw(twin, recipe, 1000)})
        gradients += torch.autograd.grad(loss, twin.rows["text_encoder"])

    accumulated: list[torch.Tensor] = []
    word.rows["text_encoder"].register_post_accumulate_grad_hook(lambda rows: accumulated.append(rows.grad.clone()))
    learner.step()

    torch.testing.assert_close(accumulated[-1], torch.stack(gradients).mean(0), rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_no_word(tiny_model_dir: Path) -> None:
    expected = learned(tiny_model_dir, [a_word()])[0]
    learner = Learner(load_source(tiny_model_dir), [a_word()], QUICK.with_changes(gradient_checkpointing=True), 7)
    forwards: list[object] = []
    block = learner.source.unet.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: forwards.append(None))
    learner._losses({0: draw(learner.words[0], QUICK, 1000, torch.Generator())})[0].backward()
    assert len(forwards) == 2  # once for the loss, once more for its gradient
    recomputed = learned(tiny_model_dir, [a_word()], QUICK.with_changes(gradient_checkpointing=True))[0]

    np.testing.assert_allclose(recomputed, expected, atol=1e-5)


def test_plain_and_fused_attention_predict_the_same(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(load_source(tiny_model_dir), [a_word()], QUICK, 0)
    plain = learner.probe_loss(0)
    processors = learner.source.unet.attn_processors.values()
    assert all(processor.plain for processor in processors)
    monkeypatch.setattr("oneword.train.learner.few_positions", lambda dtype, positions: False)
    fused = learner.probe_loss(0)

    assert not any(processor.plain for processor in processors)
    assert plain == pytest.approx(fused, rel=1e-5)


def test_min_snr_weighs_each_picture_by_its_timestep(tiny_model_dir: Path) -> None:
    """eps-prediction: min(SNR, gamma) / SNR, with SNR = a / (1 - a)."""
    learner = Learner(load_source(tiny_model_dir), [a_word()], QUICK.with_changes(min_snr=5.0), seed=7)
    plain = Learner(load_source(tiny_model_dir), [a_word()], QUICK, seed=7)
    single = draw(a_word(), QUICK.with_changes(batch_size=1), 1000, torch.Generator().manual_seed(0))
    for t in (0, 100, 999):
        batch = replace(single, timesteps=torch.tensor([t]))
        a = float(plain.noising.scheduler.alphas_cumprod[t])
        weight = min(a / (1 - a), 5.0) / (a / (1 - a))
        assert learner.probe_loss(0, batch) == pytest.approx(weight * plain.probe_loss(0, batch), rel=1e-4)


def test_the_distance_to_the_initial_rows_is_added_to_the_loss_but_not_to_the_probe_loss(tiny_model_dir: Path) -> None:
    word = a_word()
    learner = Learner(load_source(tiny_model_dir), [word], QUICK.with_changes(init_weight=0.5), seed=7)
    batch = draw(word, QUICK, 1000)
    with torch.no_grad():
        word.rows["text_encoder"] += 0.1

    added = learner._accumulate({0: batch})[0] - learner.probe_loss(0, batch)

    assert added == pytest.approx(0.5 * WIDTH * 0.1**2, rel=1e-3)


def test_a_fixed_norm_holds_after_every_step(tiny_model_dir: Path) -> None:
    source = load_source(tiny_model_dir)
    table = source.text_encoders["text_encoder"].get_input_embeddings().weight.detach().numpy()
    rows = learned(tiny_model_dir, [a_word()], QUICK.with_changes(norm=Norm.FIXED))[0]

    np.testing.assert_allclose(np.linalg.norm(rows), np.median(np.linalg.norm(table, axis=1)), rtol=1e-5)


def test_a_settled_word_stops_and_the_other_continues(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first word's probe loss is constant from its fifth step on; the second's never is."""
    recipe = QUICK.with_changes(steps=400, batch_size=1, stop_below=0.1)
    words = [a_word("<a>", 1), a_word("<b>", 2)]
    learner = Learner(load_source(tiny_model_dir), words, recipe, seed=7)
    monkeypatch.setattr(
        learner, "probe_loss", lambda index: float(index or len(words[0].losses) < 5) * (-1) ** len(words[index].losses)
    )
    monkeypatch.setattr(
        learner,
        "_errors",
        lambda batch, part: torch.stack([words[batch.words[i]].rows["text_encoder"].sum() for i in part]),
    )

    losses = [learner.step() for _ in range(320)]

    steps_taken = len(words[0].losses)
    assert words[0].stopped
    assert not words[1].stopped
    assert 310 < steps_taken < 320
    assert len(words[1].losses) == 320
    assert math.isnan(losses[-1][0])
    assert not math.isnan(losses[-1][1])
