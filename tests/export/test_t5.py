"""T5's encoder and its tokenizer, against transformers."""

import base64
import random
import zlib
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from oneword.export.t5 import T5Encoder
from oneword.runtime.bundle import Encoder
from oneword.runtime.concept import Concept
from oneword.runtime.prompt import Tokenizer, Vocabulary, encode_ids
from tests.conftest import WORDS
from tests.export.conftest import t5, t5_tokenizer

CHARSMAP = (
    "eNol03mwjlUcB/Df+8oYQzPXP+YiM9Qg0RXZ21y0ikIRkoRbNNKGa3+vFupGKFkrlKzVJSpyFVowZI1Wu6GZ7BelUp+HZ+bzfM95fuecOTPPOX"
    "FFRFSLKHtlRCoisyk7HQWlI7K0Z1XwykpHob4nUyr5VjWijMyUT0emfsTi/MvjTc/MlmVl0i8nJ5ako6KJlcimCpWxRFxFcd10rCpKR/XLW4hr"
    "uJoafFAcUUvWpDbXUofruJ661CMH24gbuJEGNKIhTWhMM5pyE825hZu5jVvJpQWtaMnttOZO7uBu7qIN99CWe7mPdrTnfjrSgQd5gM50ogsP0Y"
    "2udOdhevAIPXmUXjxGH3rzOHn05QmepB/9kzFj0zFAPsUzPM1zPMtAnmcwgxhCPsMYygiGM4qRFCQ/lxcYzUu8yBhe5hXGUsirjOM1Xmc8E5nA"
    "G0xiMm8yhbeYxlRmMJ23mcm7vMNsZvEec5jL+8xLzgELmM8iFvIhi/mYj1hCEZ+wlOUs4zM+ZQWf8wUrk3PHKr5kNWv4inWs5Ru+5ju+ZQPrk1"
    "pRKjbKzWxiC9+zja3sYDs/sJPd7OInfuQXfuY3fmUve9jPPg5ygMMc4ggnslLxuzya1Jal4uDUVBzT/iOpcZxTnOQMpzlLCec5x1/8yd9c4F/+"
    "4T8uxqXLl5OT4xrlOop5fWPdgvgfTqyWKQ=="
)
"""Rules of a normalizer that SentencePiece 0.2.3 compiled, compressed: U+FB01 is fi, U+FF21 A, U+FF41 a, U+2460 1,
U+2026 three full stops, U+00A0, U+3000 and the tab are spaces, U+200B is nothing, and e with U+0301 is U+00E9."""


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return t5(t5_tokenizer(), width=32).eval().requires_grad_(False)


@pytest.mark.parametrize("length", [1, 7, 24, 60])
def test_the_states_are_those_of_transformers(model: Any, length: int) -> None:
    encoder = T5Encoder(model, max_length=60)  # distances above 16 share a bucket
    ids = torch.randint(0, model.config.vocab_size, (3, length))

    states, weight_scale, finite = encoder(ids, encoder.table, torch.ones(3, length))

    torch.testing.assert_close(states, model(ids)[0], rtol=1e-5, atol=1e-5)
    assert weight_scale.tolist() == [1, 1, 1]
    assert finite.all()


def test_padding_after_eos_is_masked_as_in_transformers_if_the_family_masks_it(model: Any) -> None:
    encoder = T5Encoder(model, max_length=24, masks_padding=True)
    ids, eos_index = torch.randint(2, model.config.vocab_size, (3, 24)), torch.tensor([0, 9, 23])
    mask = torch.arange(24) <= eos_index[:, None]

    states, _, finite = encoder(ids, encoder.table, torch.ones(3, 24), eos_index)

    torch.testing.assert_close(states, model(ids, attention_mask=mask.long())[0], rtol=1e-5, atol=1e-5)
    assert finite.all()


def test_a_row_of_the_table_beyond_the_vocabulary_is_a_learned_vector(model: Any) -> None:
    encoder, ids = T5Encoder(model, max_length=24), torch.randint(0, 50, (1, 9))
    vector = torch.randn(1, 32)
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 4] = vector
    ids[0, 4] = len(encoder.table)

    states, _, _ = encoder(ids, torch.cat([encoder.table, vector]), torch.ones(1, 9))

    torch.testing.assert_close(states, model(inputs_embeds=embeds)[0], rtol=1e-5, atol=1e-5)


def test_states_beyond_the_range_of_fp16_stay_finite_as_in_transformers(model: Any) -> None:
    for block in model.encoder.block:  # outputs of about 1e5, where fp16 ends at 65,504
        block.layer[1].DenseReluDense.wo.weight *= 1e5
    expected = model(torch.arange(9)[None])[0]
    half = model.half()
    for block in half.encoder.block:  # what transformers does when it loads T5 in fp16
        block.layer[1].DenseReluDense.wo.float()
    encoder = T5Encoder(half, max_length=24)

    states, _, finite = encoder(torch.arange(9)[None], encoder.table, torch.ones(1, 9))

    assert finite.all()
    assert (states - expected).abs().max() <= 0.02 * expected.abs().max()


def test_weights_multiply_states_and_keep_a_mean(model: Any) -> None:
    encoder, ids = T5Encoder(model, max_length=24), torch.arange(9)[None]
    plain = model(ids)[0]
    weights = torch.ones(1, 9)
    weights[0, 1:3] = 1.4
    weighted = plain * weights[..., None]
    factor = plain.mean() / weighted.mean()
    assert 1 / 1.4 < factor < 0.99  # within the range of the weights, and not only rounding error

    states, scale, _ = encoder(ids, encoder.table, weights)

    torch.testing.assert_close(states, weighted * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale, factor[None])


def tokenizer_like(reference: Any, masks_padding: bool = False) -> Tokenizer:
    """The runtime's tokenizer for chunks of 64 tokens."""
    encoder = Encoder(
        graph="text_encoder_3", table="", tokenizer="", vocab_size=len(reference), width=4, hidden_width=4, length=64,
        bos_id=None, eos_id=1, pad_id=0, layers=(), default_layer=None, masks_padding=masks_padding,
    )  # fmt: skip
    return Tokenizer(tokenizers.Tokenizer.from_str(reference.backend_tokenizer.to_str()), encoder)


@pytest.mark.parametrize("prompt", ["", "a red ring", "a red</s> ring", "</s>", "a </s></s> ring </s>", "a <pad> ring"])
def test_an_eos_within_a_prompt_masks_nothing_if_the_encoder_masks_padding(prompt: str) -> None:
    """The denoiser attends to one token of padding more, as in `ChromaPipeline._get_t5_prompt_embeds`."""
    reference = t5_tokenizer(model_max_length=64)
    expected = reference(prompt, padding="max_length", max_length=64, truncation=True)
    length = sum(expected.attention_mask)

    chunks = encode_ids(prompt, tokenizer_like(reference, masks_padding=True), Vocabulary({}), "text_encoder_3")
    assert chunks.input_ids.tolist() == [expected.input_ids]
    assert chunks.attended(0).tolist() == [expected.attention_mask]
    assert chunks.attended(1).tolist() == [(np.arange(64) <= length).tolist()]


def normalizing_tokenizer() -> Any:
    """A tokenizer with a precompiled normalizer, as the published T5 has one."""
    charsmap = zlib.decompress(base64.b64decode(CHARSMAP))
    return t5_tokenizer(model_max_length=64, _spm_precompiled_charsmap=charsmap)


def test_a_precompiled_normalizer_acts_on_each_part_of_a_prompt() -> None:
    reference = normalizing_tokenizer()
    ours = tokenizer_like(reference)
    rows = np.full((1, 4), 0.1, np.float32)
    vocabulary = Vocabulary({"<toy>": Concept("<toy>", {"text_encoder_3": rows})})

    written, plain = (
        encode_ids(prompt, ours, vocabulary, "text_encoder_3").input_ids.tolist()
        for prompt in (
            "\uff21 ri\u200bng\u2026\u00a0<toy>\u3000\ufb01 (\uff41:1.3)\t\u2460",
            "A ring... <toy> fi (a:1.3) 1",
        )
    )

    assert written == plain
    assert reference("\uff21 ri\u200bng\u2026").input_ids == reference("A ring...").input_ids
    without = encode_ids("\uff21", tokenizer_like(t5_tokenizer(model_max_length=64)), vocabulary, "text_encoder_3")
    assert 2 in without.input_ids  # unknown


@pytest.mark.parametrize("normalizes", [False, True])
def test_the_ids_of_two_thousand_prompts_with_words_are_those_of_transformers(normalizes: bool) -> None:
    reference = normalizing_tokenizer() if normalizes else t5_tokenizer(model_max_length=64)
    ours = tokenizer_like(reference)
    names = ["<toy>", "<cat-toy>", "<style.2>"]
    words = {
        name: Concept(name, {"text_encoder_3": np.full((1 + i, 4), 0.1 * (i + 1), np.float32)})
        for i, name in enumerate(names)
    }
    pieces = [f"<{i}-{j}>" for i in range(3) for j in range(1 + i)]
    reference.add_tokens(pieces)
    learned = {reference.convert_tokens_to_ids(piece): number for number, piece in enumerate(pieces)}
    choose = random.Random(0)
    fragments = [*WORDS, *names, "paintings", "redring", "Éclair", "ü", "☃", "7", ", ", ".", "-", "  ", "\t", "'s"]
    fragments += ["\ufb01", "\uff21\uff41", "\u2460", "\u2026", "\u00a0", "\u3000", "a\u200bnd", "\u00e9"]

    for _ in range(2000):
        prompt = "".join(choose.choice(fragments) + choose.choice(("", " ", " ")) for _ in range(choose.randint(0, 12)))
        text = prompt
        for i, name in enumerate(names):
            text = text.replace(name, "".join(f"<{i}-{j}>" for j in range(1 + i)))
        expected = reference(text, padding="max_length", max_length=64, truncation=True).input_ids
        chunks = encode_ids(prompt, ours, Vocabulary(words), "text_encoder_3")
        numbers = [piece for concept in chunks.concepts for piece in _numbers(names.index(concept.token))]
        ids = [id_ if id_ >= 0 else -1 - numbers[-1 - id_] for id_ in chunks.input_ids[0].tolist()]
        assert ids == [-1 - learned[id_] if id_ in learned else id_ for id_ in expected], prompt


def _numbers(word: int) -> range:
    """The places of a word's vectors in the list of all."""
    start = word * (word + 1) // 2
    return range(start, start + word + 1)
