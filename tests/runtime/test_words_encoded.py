"""Learned words through the text encoder, against a transformers model with the words in its vocabulary."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from oneword.export.modules import TextEncoder
from oneword.runtime.bundle import Encoder
from oneword.runtime.concept import Concept
from oneword.runtime.prompt import Tokenizer, Vocabulary, encode_ids
from oneword.runtime.table import EmbeddingTable

PROMPTS = ["a photo of <toy>", "<toy> in the style of <zuma>, red", "<zuma>", "a red star", "<toy><toy> cat, dog"]
WORDS = {"<toy>": 3, "<zuma>": 1}


@pytest.fixture(scope="module")
def clip_tokenizer(tiny_model: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny_model, subfolder="tokenizer", model_max_length=20)


@pytest.fixture(scope="module")
def model(clip_tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        projection_dim=24,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


@torch.no_grad()
def test_hidden_states_and_pooled_match_a_model_with_the_words_in_its_vocabulary(
    clip_tokenizer: CLIPTokenizer, model: CLIPTextModelWithProjection, tmp_path: Path
) -> None:
    clip_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    base = model.get_input_embeddings().weight.numpy()
    encoder = Encoder(
        graph="text_encoder",
        table="t",
        tokenizer="t",
        vocab_size=len(base),
        width=32,
        hidden_width=32,
        length=20,
        bos_id=clip_tokenizer.bos_token_id,
        eos_id=clip_tokenizer.eos_token_id,
        pad_id=clip_tokenizer.pad_token_id,
        layers=(1, 2, 3),
        default_layer=3,
    )
    tokenizer, table = Tokenizer.read(tmp_path, encoder), EmbeddingTable(base, capacity=50)
    rows = {
        word: np.random.default_rng(count).normal(0, 0.4, (count, 32)).astype(np.float32)
        for word, count in WORDS.items()
    }
    table.place({"other": np.ones((2, 32), np.float32)})
    vocabulary = Vocabulary({word: Concept(word, {"text_encoder": vectors}) for word, vectors in rows.items()})

    extended, extended_tokenizer = copy.deepcopy(model), copy.deepcopy(clip_tokenizer)
    names = {word: [word, *(f"{word}_{i}" for i in range(1, count))] for word, count in WORDS.items()}
    for word, tokens in names.items():
        extended_tokenizer.add_tokens(tokens)
        extended.resize_token_embeddings(len(extended_tokenizer), mean_resizing=False)
        ids = extended_tokenizer.convert_tokens_to_ids(tokens)
        extended.get_input_embeddings().weight[ids] = torch.from_numpy(rows[word])

    for prompt in PROMPTS:
        spelled = prompt
        for word, tokens in names.items():
            spelled = spelled.replace(word, " ".join(tokens))
        expected = extended(torch.tensor([extended_tokenizer(spelled, padding="max_length").input_ids]))
        tokens_ = encode_ids(prompt, tokenizer, vocabulary)
        places = table.place({concept.identity: concept.vectors["text_encoder"] for concept in tokens_.concepts})
        input_ids = tokens_.placed(places[concept.identity] for concept in tokens_.concepts)
        table.look_up(input_ids)
        states, _, pooled, finite = TextEncoder(model, pools=True)(
            torch.from_numpy(input_ids),
            torch.from_numpy(table.array.numpy()),
            torch.from_numpy(tokens_.token_weights),
            torch.tensor([3]),
            torch.from_numpy(tokens_.eos_index),
        )
        assert finite.all()
        torch.testing.assert_close(states, expected.last_hidden_state, rtol=0, atol=2e-6)
        torch.testing.assert_close(pooled, expected.text_embeds, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_learned_id_moves_the_pooling_of_legacy_clip_but_not_our_eos_index(
    clip_tokenizer: CLIPTokenizer, model: CLIPTextModelWithProjection
) -> None:
    learned = len(clip_tokenizer) + 7
    ids = np.full((1, 20), clip_tokenizer.eos_token_id)
    ids[0, :4] = clip_tokenizer.bos_token_id, 5, learned, 6
    assert ids.argmax() == 2
    assert (ids == clip_tokenizer.eos_token_id).argmax() == 4
    legacy = copy.deepcopy(model)
    legacy.resize_token_embeddings(learned + 1, mean_resizing=False)
    legacy.text_model.eos_token_id = 2  # as in the configs of SD 1 and 2
    right = copy.deepcopy(legacy)
    right.text_model.eos_token_id = clip_tokenizer.eos_token_id
    moved = legacy(torch.from_numpy(ids)).text_embeds
    expected = right(torch.from_numpy(ids)).text_embeds
    assert (moved - expected).abs().max() > 1e-3
    _, _, pooled, _ = TextEncoder(model, pools=True)(
        torch.from_numpy(ids),
        right.get_input_embeddings().weight,
        torch.ones(1, 20),
        torch.tensor([3]),
        torch.tensor([4]),
    )
    torch.testing.assert_close(pooled, expected, rtol=0, atol=2e-6)
