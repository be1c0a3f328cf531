"""Output vectors in families of several encoders: where they are written, and what cannot be used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.psnr import psnr
from oneword.engines.errors import ConceptError
from oneword.export.eager import eager_model
from oneword.export.source import load_source
from oneword.runtime.concept import Concept, Vectors
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from tests.export.pictures import picture
from tests.export.test_flow_families import PROMPT, add_word, flow_picture, learned_word, load_rows, with_masks
from tests.runtime.test_precise_words import LONG

SENTENCE = "a photo of <toy> on the ring"


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


SD3_PLACES = {  # CLIP's encoders share 20 tokens, T5's follow
    "text_encoder": ("", 0, 0),
    "text_encoder_2": ("_2", 0, 16),
    "text_encoder_3": ("_3", 20, 0),
}


@pytest.mark.parametrize("encoders", [tuple(SD3_PLACES), tuple(SD3_PLACES)[:2]])
def test_learned_output_vectors_in_sd3_draw_what_diffusers_draws(
    tiny_sd3_dir: Path, sd3: Model, tmp_path: Path, encoders: tuple[str, ...]
) -> None:
    """In the prompt of an encoder that the word is not learned for, its init replaces it."""
    from diffusers import StableDiffusion3Pipeline

    changes = ("values_only=false", "stages=2", "output_rate=5", f"encoders={','.join(encoders)}")
    options = [option for change in changes for option in ("--set", change)]
    word = learned_word(tiny_sd3_dir, tmp_path, "--recipe", "precise", "--steps", "20", *options)
    assert word.out.keys() == word.vectors.keys() == set(encoders)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_dir)
    for name in encoders:
        add_word(pipeline, word, name, SD3_PLACES[name][0])
    texts = {} if "text_encoder_3" in encoders else {"prompt_3": SENTENCE.replace("<toy>", "star")}
    places = {name: SD3_PLACES[name] for name in encoders}
    theirs = picture_with_vectors(pipeline, word, places, timesteps_per_unit=1, texts=texts, guidance_scale=4.0)

    assert psnr(picture(sd3, SENTENCE, guidance_scale=4.0, words={"<toy>": word}), theirs) >= 50
    assert psnr(picture(sd3, SENTENCE, guidance_scale=4.0, words={"<toy>": word.rows_only()}), theirs) < 50


def t5_word(stages: int, **other: Vectors) -> Concept:
    """Two rows for T5 and for other encoders, and output vectors for T5."""
    rows = {"text_encoder_3": random(2, 32), **other}
    return Concept("<toy>", rows, out={"text_encoder_3": random(stages, 1, 2, 32)})


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_output_vectors_in_flux_draw_what_diffusers_draws(tiny_flux_dir: Path) -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(tiny_flux_dir)
    word = t5_word(2, text_encoder=random(2, 16))
    load_rows(pipeline, word.vectors["text_encoder"], "")
    load_rows(pipeline, word.vectors["text_encoder_3"], "_2")
    places = {"text_encoder_3": ("_2", 0, 0)}
    theirs = picture_with_vectors(pipeline, word, places, true_cfg_scale=2.0, negative_prompt="blue dog")

    model = eager_model(load_source(tiny_flux_dir))
    settings = {"guidance_scale": 2.0, "negative_prompt": "blue dog", "words": {"<toy>": word}}
    assert psnr(picture(model, SENTENCE, **settings), theirs) >= 50


def test_output_vectors_in_chroma_draw_what_diffusers_draws_if_it_masks(tiny_chroma_dir: Path) -> None:
    from diffusers import ChromaPipeline

    word, settings = t5_word(2), {"guidance_scale": 4.0, "negative_prompt": "blue dog of the red painting"}
    pipeline = with_masks(ChromaPipeline.from_pretrained(tiny_chroma_dir))
    load_rows(pipeline, word.vectors["text_encoder_3"], "")
    theirs = picture_with_vectors(pipeline, word, {"text_encoder_3": ("", 0, 0)}, **settings)

    model = eager_model(load_source(tiny_chroma_dir))
    assert psnr(picture(model, SENTENCE, **settings, words={"<toy>": word}), theirs) >= 50
    assert psnr(picture(model, SENTENCE, **settings, words={"<toy>": word.rows_only()}), theirs) < 50


@pytest.fixture(scope="module")
def chroma(tiny_chroma_dir: Path) -> Model:
    return eager_model(load_source(tiny_chroma_dir))


def test_rows_of_precise_words_in_chroma_that_share_a_call_are_those_drawn_alone(chroma: Model) -> None:
    """Prompts of different lengths, with masks of their own, and contexts that change with the stage."""
    word, size = {"<toy>": t5_word(3)}, (64, 64)
    requests = [
        Request(SENTENCE, seed=1, steps=6, guidance_scale=3.0, size=size, words=word),
        Request("<toy>", "the red painting of <toy>", seed=2, steps=4, guidance_scale=2.0, size=size, words=word),
        Request(PROMPT, seed=3, steps=5, guidance_scale=1.0, size=size),
        Request(f"{PROMPT} {PROMPT} <toy>", seed=4, steps=4, guidance_scale=2.0, size=size, words=word),
    ]
    together = [result.image for result in draw(chroma, *requests)]
    for request, image in zip(requests, together, strict=True):
        [alone] = draw(chroma, request)
        assert psnr(image, alone.image) >= 50


def test_a_written_vector_leaves_the_mask_of_its_context(chroma: Model) -> None:
    """T5 reads 24 tokens: those of the prompt, eos, and of the padding only the first is attended to."""
    tokens = chroma.tokenize("a <toy>", words={"<toy>": t5_word(2)})
    [length] = tokens.per_encoder["text_encoder_3"].eos_index + 2
    [encoded] = chroma.encode([tokens])
    contexts = [context for stage in (0, 1) for context in encoded.sources([stage], 1).contexts]
    assert len({context.hidden_states.tobytes() for context in contexts}) == 2
    for context in contexts:
        np.testing.assert_array_equal(context.mask, [1] * length + [0] * (24 - length))


def test_rows_for_the_only_layer_of_chroma_are_drawn_as_those_of_an_ordinary_word(chroma: Model) -> None:
    word = Concept("<toy>", {"text_encoder_3": random(1, 32)}, layer_rows={"text_encoder_3": random(1, 1, 32)})
    [ordinary] = word.by_layer
    ours, theirs, plain = (
        picture(chroma, SENTENCE, guidance_scale=4.0, words={"<toy>": concept})
        for concept in (word, ordinary, word.rows_only())
    )
    assert psnr(ours, theirs) >= 50
    assert psnr(ours, plain) < 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"out": {}, "layer_rows": {"text_encoder_3": random(16, 2, 32)}},
            "rows for 16 cross-attention layers, this model has 1: ",
        ),
        (
            {"out": {"text_encoder_3": random(1, 16, 2, 32)}},
            "vectors for 16 cross-attention layers, this model has 1: ",
        ),
        ({"values_only": True}, r"for values only, but this model's keys and values share their states \(joint"),
    ],
)
def test_vectors_that_joint_attention_cannot_use_are_refused_in_one_line(
    chroma: Model, changes: dict[str, Any], message: str
) -> None:
    word = replace(t5_word(1), **changes)
    with pytest.raises(ConceptError, match=message):
        chroma.load(word)


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


def picture_with_vectors(
    pipeline: Any,
    word: Concept,
    places: dict[str, tuple[str, int, int]],
    timesteps_per_unit: float = 1000,
    texts: dict[str, str] | None = None,
    **settings: Any,
) -> Image:
    """diffusers' picture. At the word's tokens, the output vectors of each step's stage, of two, replace the states of
    the prompt, not those of the negative prompt.

    `places` are, by encoder, the suffix of its name in the pipeline, and its first token and column in the context;
    `timesteps_per_unit` are those of 1,000 in one unit of the network's time; `texts` are prompts of single encoders.
    """
    texts, columns = texts or {}, list[tuple[list[int], slice, torch.Tensor]]()
    for name, (suffix, token, column) in places.items():
        tokenizer, out = getattr(pipeline, f"tokenizer{suffix}"), torch.from_numpy(word.out[name][:, 0].copy())
        convert = getattr(pipeline, "maybe_convert_prompt", lambda text, _: text)
        ids = tokenizer(convert(SENTENCE, tokenizer)).input_ids
        words = tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"][: out.shape[1]])
        tokens = [token + ids.index(word_id) for word_id in words]
        columns.append((tokens, slice(column, column + out.shape[2]), out))
    own_texts = [texts.get(f"prompt_{i}") for i in (2, 3) if hasattr(pipeline, f"text_encoder_{i}")]
    with torch.no_grad():  # the kernels of attention, and so the bits, depend on it
        [states] = pipeline.encode_prompt(SENTENCE, *(own_texts or [None]), max_sequence_length=24)[0]
    stages = set()

    def with_vectors(network: Any, inputs: Any, named: dict[str, Any]) -> Any:
        contexts = named["encoder_hidden_states"].clone()
        for context in contexts:
            if torch.equal(context, states):
                stage = int(999 - timesteps_per_unit * named["timestep"][0] >= 500)
                stages.add(stage)
                for tokens, part, out in columns:
                    context[tokens, part] = out[stage]
        return inputs, {**named, "encoder_hidden_states": contexts}

    pipeline.transformer.register_forward_pre_hook(with_vectors, with_kwargs=True)
    image = flow_picture(pipeline, SENTENCE, **texts, **settings)
    assert stages == {0, 1}
    return image
