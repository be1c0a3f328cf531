"""Output vectors in families of several encoders: where they are written, and what cannot be used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oneword.engines.errors import ConceptError
from oneword.export.eager import eager_model
from oneword.export.source import load_source
from oneword.runtime.concept import Concept, Vectors
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from tests.runtime.test_precise_words import LONG


def random(*shape: int) -> Vectors:
    return np.random.default_rng(len(shape)).normal(0, 0.5, shape).astype(np.float32)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl_dir: Path) -> Model:
    return eager_model(load_source(tiny_sdxl_dir))


def sdxl_word(layers: int) -> Concept:
    """Two rows for the first encoder, one for the second."""
    rows = {"text_encoder": random(2, 16), "text_encoder_2": random(1, 24)}
    out = {"text_encoder": random(2, layers, 2, 16), "text_encoder_2": random(2, layers, 1, 24)}
    return Concept("<toy>", rows, {}, out, True, {"text_encoder": 2, "text_encoder_2": 2})


def test_each_encoder_of_sdxl_has_its_columns_also_where_its_chunks_are_repeated(sdxl: Model) -> None:
    """The word moves to a second chunk of the first encoder, and fits into the only chunk of the second."""
    word = sdxl_word(sdxl.manifest.layers)
    sdxl.load(word)
    [encoded] = sdxl.encode([sdxl.tokenize(f"{LONG} (<toy>:1.4)")])
    scales = encoded.weight_scale
    assert [len(scales[name]) for name in ("text_encoder", "text_encoder_2")] == [2, 1]
    assert encoded.hidden_states.shape == (40, 40)

    sources = encoded.sources([1, 1], sdxl.manifest.layers)
    for layer, context in enumerate(sources.values):
        expected = encoded.hidden_states.copy()
        first, second = (word.out[name][1, layer] * np.float32(1.4) for name in scales)
        expected[21:23, :16] = first * scales["text_encoder"][1]
        expected[[18, 38], 16:] = second[0] * scales["text_encoder_2"][0]
        np.testing.assert_allclose(context.hidden_states, expected, atol=1e-6)
        assert context.pooled is encoded.pooled
    assert {context.hidden_states is encoded.hidden_states for context in sources.keys} == {True}
    [picture], [plain] = (
        draw(sdxl, Request("a <toy>", steps=3, words={"<toy>": concept})) for concept in (word, word.rows_only())
    )
    assert (picture.image != plain.image).any()


def test_a_prompt_with_rows_for_each_layer_has_the_pooled_vector_of_its_words_own_rows(sdxl: Model) -> None:
    layers = sdxl.manifest.layers
    rows = {"text_encoder": random(1, 16), "text_encoder_2": random(1, 24)}
    word = Concept("<toy>", rows, layer_rows={name: random(layers, *value.shape) for name, value in rows.items()})
    prompts = [sdxl.tokenize("a <toy>", words={"<toy>": w}) for w in (word, word.rows_only(), *word.by_layer)]
    encoded, plain, *by_layer = sdxl.encode(prompts)
    sources = encoded.sources([], layers)

    assert len(by_layer) == layers > 1
    assert (by_layer[0].pooled != plain.pooled).any()
    for contexts in (sources.keys, sources.values):
        for context, expected in zip(contexts, by_layer, strict=True):
            np.testing.assert_array_equal(context.pooled, plain.pooled)
            np.testing.assert_allclose(context.hidden_states, expected.hidden_states, atol=1e-6)


def test_output_vectors_of_one_encoder_of_two_leave_the_others_columns(sdxl: Model) -> None:
    word = sdxl_word(sdxl.manifest.layers)
    out = {"text_encoder_2": word.out["text_encoder_2"]}
    half = replace(word, out=out, encoder_layers={"text_encoder_2": 2})
    [encoded] = sdxl.encode([sdxl.tokenize("a <toy>", words={"<toy>": half})])
    [context, *_] = encoded.sources([0], sdxl.manifest.layers).values
    changed = np.argwhere(context.hidden_states != encoded.hidden_states)
    assert {*changed[:, 0]} == {2}
    assert changed[:, 1].min() == 16


@pytest.fixture(scope="module")
def sd3(tiny_sd3_dir: Path) -> Model:
    return eager_model(load_source(tiny_sd3_dir))


def test_a_model_of_joint_attention_takes_output_vectors_for_keys_and_values(sd3: Model) -> None:
    rows = {"text_encoder": random(1, 16), "text_encoder_2": random(1, 12), "text_encoder_3": random(1, 32)}
    out = {name: random(1, 1, *value.shape) for name, value in rows.items()}
    word = Concept("<toy>", rows, out=out)
    tokens = sd3.tokenize("a <toy>", words={"<toy>": word})
    [[_, place]] = np.argwhere(tokens.per_encoder["text_encoder_3"].input_ids < 0)
    [encoded] = sd3.encode([tokens])
    sources = encoded.sources([0] * len(encoded.insertions), sd3.manifest.layers)
    [context] = sources.contexts
    expected = encoded.hidden_states.copy()
    expected[2, :16], expected[2, 16:28] = out["text_encoder"][0, 0, 0], out["text_encoder_2"][0, 0, 0]
    expected[20 + place, :32] = out["text_encoder_3"][0, 0, 0]  # after the 20 tokens of CLIP
    np.testing.assert_allclose(context.hidden_states, expected, atol=1e-6)
    assert sources.keys == sources.values == (context,)
    [picture] = draw(sd3, Request("a <toy>", steps=2, words={"<toy>": word}))
    [plain] = draw(sd3, Request("a <toy>", steps=2, words={"<toy>": word.rows_only()}))
    assert (picture.image != plain.image).any()


def test_values_only_is_refused_where_keys_and_values_share_their_states(sd3: Model) -> None:
    rows = {"text_encoder": random(1, 16), "text_encoder_2": random(1, 12)}
    word = Concept("<toy>", rows, {}, {"text_encoder": random(1, 1, 1, 16)}, True)
    with pytest.raises(ConceptError, match=r"for values only, but this model's keys and values share .* \(joint"):
        sd3.load(word)


def test_output_vectors_for_an_encoder_that_only_pools_are_refused(tiny_flux_dir: Path) -> None:
    model = eager_model(load_source(tiny_flux_dir))
    word = Concept("<toy>", {"text_encoder": random(1, 16), "text_encoder_3": random(1, 32)})
    word = replace(word, out={"text_encoder": random(1, 1, 1, 16)})
    with pytest.raises(ConceptError, match="for text_encoder, of which this model uses no states: use ti-concept"):
        model.load(word)
