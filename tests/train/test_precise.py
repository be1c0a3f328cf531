"""Learning output vectors: their start, that they learn and resume, and that the runtime draws what was learned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from oneword.engines.errors import ConceptError, UsageError
from oneword.export.eager import eager_model
from oneword.export.source import load_source
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.contexts import States
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.train.advice import before, has_moved
from oneword.train.directional import unit
from oneword.train.initial import initial_rows
from oneword.train.learner import Learner
from oneword.train.norms import vocabulary_mean_norm
from oneword.train.prompts import Encoded, PromptEncoder, Text
from oneword.train.recipe import Compute, Optimizer, Output, named_recipe
from oneword.train.word import Word, draw
from tests.runtime.test_precise_words import Case, Reference, final_latents
from tests.train.test_learner import a_word, a_word_with_another_stream, random_moments
from tests.train.test_learner_flow import a_word as flow_word

RECIPE = named_recipe("precise").with_changes(steps=8, batch_size=8, compute=Compute.FP32)
LAYERS = 4
TEMPLATES = ["a photo of a {}", "the {}"]  # of a_word


def learner_of(model: Path, **changes: Any) -> Learner:
    recipe = RECIPE.with_changes(**changes)
    return Learner(load_source(model), [a_word(recipe=recipe)], recipe, seed=7)


def learned(learner: Learner, steps: int | None = None) -> Concept:
    while not learner.finished() and steps != learner.steps_done:
        learner.step()
    return learner.concept(0, {})


def test_output_vectors_start_as_the_states_of_the_initial_row_at_the_vocabularys_mean_length(
    tiny_model_dir: Path,
) -> None:
    """Reference: transformers' encoder with that row in its embedding matrix."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    length = vocabulary_mean_norm(pipe.text_encoder.get_input_embeddings().weight.detach())
    pipe.tokenizer.add_tokens(["<toy>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    token = pipe.tokenizer.convert_tokens_to_ids("<toy>")
    row = length * unit(a_word(recipe=RECIPE).initial["text_encoder"])
    pipe.text_encoder.get_input_embeddings().weight.data[token] = row
    states = []
    for template in TEMPLATES:
        ids = pipe.tokenizer(template.replace("{}", "<toy>"), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            states.append(pipe.text_encoder(ids).last_hidden_state[0][ids[0] == token])

    out = learner_of(tiny_model_dir).concept(0, {}).out["text_encoder"]

    assert out.shape == (4, LAYERS, 1, 32)
    expected = torch.stack(states).mean(0).expand(4, LAYERS, 1, 32)
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-5)


def test_learning_lowers_the_loss_on_a_fixed_batch_and_moves_every_stage_and_layer(tiny_model_dir: Path) -> None:
    learner = learner_of(tiny_model_dir, steps=40)
    start = learner.concept(0, {}).out["text_encoder"]
    batch = draw(a_word_with_another_stream(), learner.recipe, 1000)
    before = learner.probe_loss(0, batch)

    moved = np.abs(learned(learner).out["text_encoder"] - start)

    assert learner.probe_loss(0, batch) < before
    assert (moved.max((2, 3)) > 1e-3).all()


def test_output_vectors_lower_the_loss_more_than_the_row_alone(tiny_model_dir: Path) -> None:
    batch = draw(a_word_with_another_stream(), RECIPE, 1000)
    losses = []
    for changes in ({}, {"output": Output.NONE, "stages": 1}):
        learner = learner_of(tiny_model_dir, steps=40, **changes)
        learned(learner)
        losses.append(learner.probe_loss(0, batch))
    assert losses[0] < losses[1]


def test_the_first_step_of_output_vectors_is_the_rate_times_their_initial_deviation(tiny_model_dir: Path) -> None:
    """AdamW's first step moves every number by the rate, whatever its gradient: warm-up makes that a seventh."""
    learner = learner_of(tiny_model_dir)
    start = learner.concept(0, {}).out["text_encoder"]
    moved = np.abs(learned(learner, steps=1).out["text_encoder"] - start)
    rate = RECIPE.output_rate / 7 * start[0, 0].std(ddof=1)
    np.testing.assert_allclose(moved.max(), rate, rtol=1e-2)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tiny_model_dir: Path, steps: int) -> None:
    expected = learned(learner_of(tiny_model_dir))
    interrupted, resumed = learner_of(tiny_model_dir), learner_of(tiny_model_dir)
    learned(interrupted, steps)
    resumed.restore(*interrupted.state())

    assert learned(resumed).identity == expected.identity


def test_parts_on_threads_add_up_to_the_whole_batch(tiny_model_dir: Path) -> None:
    """With two threads the batch of 16 is computed in two recorded parts of eight."""
    threads = torch.get_num_threads()
    words = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            words.append(learned(learner_of(tiny_model_dir, batch_size=16), steps=1).out["text_encoder"])
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(words[0], words[1], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"values_only": False},
        {"output": Output.SHARED, "stages": 3},
        {"optimizer": Optimizer.ADAMW, "learning_rate": 0.02, "stages": 1, "vectors": 2},
    ],
)
def test_the_learned_file_draws_in_the_runtime_what_diffusers_draws(
    tiny_model_dir: Path, tiny_bundle: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    learner = learner_of(tiny_model_dir, output_rate=0.5, **changes)  # so that stages and layers differ plainly
    save_concept(learned(learner), tmp_path / "toy.safetensors")
    word = load_concept(tmp_path / "toy.safetensors")
    assert dict(word.encoder_layers) == {"text_encoder": 3}
    model = Model.open(tiny_bundle, "onnxruntime", threads=1, concepts=[tmp_path / "toy.safetensors"])
    case = Case(
        Request("a photo of (<toy>:1.2)", seed=3, steps=6, guidance_scale=3.0),
        [[("a photo of", 1), ("<toy>", 1.2)]],
    )
    [actual] = final_latents(model, [case.request]).values()
    expected = Reference(tiny_model_dir, tiny_bundle, {"<toy>": word}).latents(case)
    assert np.abs(actual - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_the_learner_predicts_what_the_runtime_draws_with(tiny_model_dir: Path, tiny_bundle: Path) -> None:
    """One evaluation of the network in each stage: the learner's, and diffusers' with the learned file."""
    learner = learner_of(tiny_model_dir, output_rate=0.5)
    word = learned(learner)
    reference = Reference(tiny_model_dir, tiny_bundle, {"<toy>": word})
    x, stages = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 3]
    timesteps = torch.tensor([900, 600, 300, 10])
    assert learner._stages(timesteps, x) == stages
    with torch.no_grad():
        conditions = learner._conditions([(0, "a photo of a {}")] * 4, stages)
        actual = learner._predict(x, timesteps, conditions)
    for picture, stage in enumerate(stages):
        inputs = reference.contexts([[("a photo of a", 1), ("<toy>", 1)]], {"<toy>": stage})
        expected = reference.predicted(x[picture], float(timesteps[picture]), inputs)
        torch.testing.assert_close(actual[picture], expected, rtol=0, atol=1e-5)


def test_a_word_whose_file_could_be_too_large_is_refused_before_it_is_learned(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of 32 numbers, and two for each of 100 stages and four layers, of four bytes; and 64 KiB."""
    size = 4 * (2 * 32 + 100 * LAYERS * 2 * 32)
    monkeypatch.setattr("oneword.runtime.concept.MAX_FILE_BYTES", (64 << 10) + size)
    learner_of(tiny_model_dir, vectors=2, stages=100)
    monkeypatch.setattr("oneword.runtime.concept.MAX_FILE_BYTES", (64 << 10) + size - 1)
    with pytest.raises(ConceptError, match=f"'<toy>' would have {size} bytes of vectors, its file has room for") as e:
        learner_of(tiny_model_dir, vectors=2, stages=100)
    assert str(e.value).endswith("use fewer vectors, stages, layers or encoders")


def test_captions_are_encoded_in_parts(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is the mean over all captions, however they are divided."""
    expected = learner_of(tiny_model_dir).concept(0, {}).out["text_encoder"]
    monkeypatch.setattr("oneword.train.learner.TEXTS_PER_CALL", 1)
    sizes = []
    call = PromptEncoder.__call__

    def counted(self: PromptEncoder, texts: Sequence[Text], learned: torch.Tensor) -> Encoded:
        sizes.append(len(texts))
        return call(self, texts, learned)

    monkeypatch.setattr(PromptEncoder, "__call__", counted)
    actual = learner_of(tiny_model_dir).concept(0, {}).out["text_encoder"]
    assert sizes == [1, 1]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_output_vectors_need_an_encoder_with_states_in_the_context(tiny_flux_dir: Path) -> None:
    recipe = RECIPE.with_changes(values_only=False, encoders=("text_encoder",))
    with pytest.raises(UsageError, match=r"output vectors of text_encoder, whose states are not .* of text_encoder_3"):
        Learner(load_source(tiny_flux_dir), [flow_word("text_encoder")], recipe, seed=7)


@pytest.mark.parametrize(
    ("values_only", "output", "stages"), [(True, Output.LAYERS, 4), (False, Output.LAYERS, 2), (True, Output.SHARED, 1)]
)
def test_the_learners_contexts_in_sdxl_are_those_of_the_runtime(
    tiny_sdxl_dir: Path, values_only: bool, output: Output, stages: int
) -> None:
    """Each encoder has its columns. The word has two vectors."""
    rows = {"text_encoder": torch.randn(2, 16) * 0.1, "text_encoder_2": torch.randn(2, 24) * 0.1}
    word = Word("<toy>", random_moments(), rows, TEMPLATES)
    assert_same_contexts(tiny_sdxl_dir, word, values_only=values_only, output=output, stages=stages, vectors=2)


@pytest.mark.parametrize(
    "encoders", [("text_encoder", "text_encoder_2", "text_encoder_3"), ("text_encoder", "text_encoder_2")]
)
def test_the_learners_contexts_in_sd3_are_those_of_the_runtime(tiny_sd3_dir: Path, encoders: tuple[str, ...]) -> None:
    """CLIP's encoders share 20 tokens, T5's tokens follow."""
    word = flow_word(*encoders)
    assert_same_contexts(tiny_sd3_dir, word, values_only=False, output=Output.LAYERS, stages=2)


def test_the_learners_contexts_in_flux_are_those_of_the_runtime(tiny_flux_dir: Path) -> None:
    """CLIP, which only pools, learns its row and has no output vectors."""
    word = flow_word("text_encoder", "text_encoder_3")
    assert_same_contexts(tiny_flux_dir, word, values_only=False, output=Output.LAYERS, stages=2)


@pytest.mark.parametrize("output", [Output.LAYERS, Output.SHARED])
def test_the_learners_contexts_and_masks_in_chroma_are_those_of_the_runtime(
    tiny_chroma_dir: Path, output: Output
) -> None:
    word = flow_word("text_encoder_3")
    assert_same_contexts(tiny_chroma_dir, word, values_only=False, output=output, stages=2)


def assert_same_contexts(folder: Path, word: Word, **changes: Any) -> None:
    """After a step, which moves every encoder's output vectors, and with random ones, so that all of them differ."""
    recipe = RECIPE.with_changes(batch_size=4, **changes)
    learner = Learner(load_source(folder), [word], recipe, seed=7)
    learner.step()
    assert word.out.keys() == word.rows.keys() & learner.output_places.keys()
    with torch.no_grad():
        for name, vectors in word.out.items():
            assert not torch.equal(vectors, word.initial_out[name])
            vectors.copy_(torch.randn_like(vectors))
    concept = learner.concept(0, {})
    model = eager_model(load_source(folder))
    layers = model.manifest.layers
    prompts = [(0, template) for template in TEMPLATES for _ in range(recipe.stages)]
    stages = [*range(recipe.stages)] * len(TEMPLATES)
    with torch.no_grad():
        context, pooled, masks, branch_context = learner._conditions(prompts, stages)
    assert branch_context is not None
    for picture, ((_, template), stage) in enumerate(zip(prompts, stages, strict=True)):
        tokens = model.tokenize(template.replace("{}", "<toy>"), words={"<toy>": concept})
        [encoded] = model.encode([tokens])
        sources = encoded.sources([stage] * len(encoded.insertions), layers)
        for kind, contexts in enumerate((sources.keys, sources.values)):
            for layer in range(layers):
                place = branch_context[picture, kind, layer]
                expected = contexts[layer % len(contexts)]
                np.testing.assert_allclose(context[place].numpy(), expected.hidden_states, atol=1e-5)
                assert_equal_or_missing(None if pooled is None else pooled[picture], expected.pooled)
                assert_equal_or_missing(None if masks is None else masks[place], expected.mask)


def assert_equal_or_missing(actual: torch.Tensor | None, expected: States | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


def test_a_word_whose_output_vectors_alone_learned_has_moved(tiny_model_dir: Path) -> None:
    learner = learner_of(tiny_model_dir)
    word = learner.words[0]
    assert not has_moved(word)
    with torch.no_grad():
        word.out["text_encoder"] += 1

    assert has_moved(word)


def test_a_word_starts_from_the_rows_of_a_precise_word_but_not_from_rows_of_zeros(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    source, path = load_source(tiny_model_dir), tmp_path / "toy.safetensors"
    rows, out = np.full((1, 32), 0.1, np.float32), {"text_encoder": np.ones((1, 1, 1, 32), np.float32)}
    save_concept(Concept("<toy>", {"text_encoder": rows}, out=out), path)

    np.testing.assert_array_equal(initial_rows(source, str(path), 1, 0)["text_encoder"], rows)
    assert [*before(source, tmp_path, str(path), [])][-1] == (
        f"init {path} has vectors for layers, which are not used: the word starts from its rows"
    )
    save_concept(Concept("<toy>", {"text_encoder": 0 * rows}, out=out), path)
    with pytest.raises(UsageError, match="has rows of zeros for text_encoder beside its output vectors"):
        initial_rows(source, str(path), 1, 0)


def test_values_only_is_refused_for_a_model_of_joint_attention(tiny_sd3_dir: Path) -> None:
    recipe = RECIPE.with_changes(batch_size=1, encoders=("text_encoder",))
    word = a_word(recipe=recipe)
    word.initial = {"text_encoder": torch.ones(1, 16)}
    with pytest.raises(UsageError, match=r"values_only with .* \(joint attention\): set values_only=false"):
        Learner(load_source(tiny_sd3_dir), [word], recipe, seed=7)
