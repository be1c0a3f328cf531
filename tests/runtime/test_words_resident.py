"""With any number of loaded words, encoding reads the one table in place, in every engine."""

from pathlib import Path

import numpy as np
import pytest

from oneword.engines.errors import ConceptError, UsageError
from oneword.engines.open import Backend
from oneword.runtime import Request, draw
from oneword.runtime.concept import Concept
from oneword.runtime.model import Model

RESIDENT = 5_000


@pytest.fixture(params=[Backend.ONNXRUNTIME, Backend.OPENVINO])
def model(tiny_bundle: Path, request: pytest.FixtureRequest) -> Model:
    pytest.importorskip(request.param.value)
    model = Model.open(tiny_bundle, request.param, threads=1, capacity=RESIDENT)
    for i, vector in enumerate(np.random.default_rng(0).normal(0, 0.5, (RESIDENT, 1, 32)).astype(np.float32)):
        model.load(Concept(f"<w{i}>", {"text_encoder": vector}))
    return model


def test_every_call_reads_the_table_in_place(model: Model) -> None:
    table = model._tables["text_encoder"].array.numpy()
    first, last, combined = (
        model.encode([model.tokenize(prompt)])[0].hidden_states
        for prompt in ("a <w0>", f"a <w{RESIDENT - 1}>", f"a <w0> and a <w{RESIDENT - 1}>")
    )
    bindings = model._graph("text_encoder")._bindings.values()

    assert all(np.shares_memory(binding.inputs["embedding_table"].numpy(), table) for binding in bindings)
    assert np.abs(first - last).max() > 0.01
    assert np.abs(first - combined).max() > 0.01


def test_a_word_loaded_into_a_table_in_use_is_read_by_the_next_call(model: Model) -> None:
    array, engine = model._tables["text_encoder"].array, model.engine("text_encoder")
    tokens = model.tokenize("a <w5>")
    before = model.encode([tokens])[0].hidden_states
    model.unload("<w5>")
    model.load(Concept("<w5>", {"text_encoder": np.full((1, 32), -0.4, np.float32)}))

    after = model.encode([model.tokenize("a <w5>")])[0].hidden_states

    assert model._tables["text_encoder"].array is array
    assert model.engine("text_encoder") is engine
    assert np.abs(before - after).max() > 0.01


def test_a_loaded_word_is_found_whatever_the_case_of_its_name(model: Model) -> None:
    """As in A1111, whose prompts CLIP's tokenizer lower-cases."""
    word = Concept("EasyNegative", {"text_encoder": np.full((1, 32), 0.3, np.float32)})
    model.load(word)

    for prompt in ("easynegative", "a EASYNEGATIVE, bad", "<easynegative>", "embedding:easyNegative"):
        assert [*model.tokenize(prompt).concepts] == [word]


def test_more_words_can_be_loaded_than_fit_into_the_table(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1, capacity=2)
    roomy = Model.open(tiny_bundle, "onnxruntime", threads=1)
    rng = np.random.default_rng(0)
    for i in range(4):
        concept = Concept(f"<w{i}>", {"text_encoder": rng.normal(0, 0.5, (1, 32)).astype(np.float32)})
        model.load(concept)
        roomy.load(concept)
    prompts = [f"a <w{i}> and a <w{(i + 1) % 4}>" for i in range(4)]

    encoded, expected = (m.encode([m.tokenize(prompt) for prompt in prompts]) for m in (model, roomy))

    for actual, wanted in zip(encoded, expected, strict=True):
        np.testing.assert_allclose(actual.hidden_states, wanted.hidden_states, atol=2e-6)
    with pytest.raises(UsageError, match="words have 3 vectors, the embedding table has room for 2"):
        model.tokenize("<w0> <w1> <w2>")
    with pytest.raises(ConceptError, match="has 3 vectors, the embedding table has room for 2"):
        model.load(Concept("<long>", {"text_encoder": np.ones((3, 32), np.float32)}))


def test_a_requests_own_words_replace_those_that_are_loaded(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    loaded, brought = (np.random.default_rng(i).normal(0, 0.5, (1, 32)).astype(np.float32) for i in range(2))
    model.load(Concept("<toy>", {"text_encoder": loaded}))
    model.load(Concept("<same>", {"text_encoder": brought}))
    words = {"<toy>": Concept("<toy>", {"text_encoder": brought})}
    settings = {"steps": 2, "seed": 3}

    with_own, same, with_loaded = draw(
        model,
        Request("a <toy>", words=words, **settings),
        Request("a <same>", **settings),
        Request("a <toy>", **settings),
    )

    np.testing.assert_array_equal(with_own.image, same.image)
    assert (with_own.image != with_loaded.image).any()
    with pytest.raises(UsageError, match="no word '<same>' is loaded"):
        draw(model, Request("a <same>", words=words))
    with pytest.raises(ConceptError, match="width 8, text_encoder takes width 32"):
        draw(model, Request("a <toy>", words={"<toy>": Concept("<toy>", {"text_encoder": brought[:, :8]})}))
