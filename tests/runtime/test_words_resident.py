"""With any number of loaded words, encoding reads the one table in place, in every engine."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from oneword.engines.errors import ConceptError
from oneword.engines.open import Backend
from oneword.runtime.concept import Concept
from oneword.runtime.model import Model
from oneword.runtime.table import EmbeddingTable

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
    tokens.release()
    model.unload("<w5>")
    model.load(Concept("<w5>", {"text_encoder": np.full((1, 32), -0.4, np.float32)}))

    after = model.encode([model.tokenize("a <w5>")])[0].hidden_states

    assert model._tables["text_encoder"].array is array
    assert model.engine("text_encoder") is engine
    assert np.abs(before - after).max() > 0.01


def test_a_word_that_does_not_fit_into_one_encoders_table_is_loaded_into_none(tiny_bundle: Path) -> None:
    model = Model.open(tiny_bundle, "onnxruntime", capacity=2)
    small = EmbeddingTable(np.zeros((5, 32), np.float32), capacity=1)
    encoder = msgspec.structs.replace(model.manifest.encoders[0], graph="text_encoder_2")
    encoders = (*model.manifest.encoders, encoder)
    model.manifest = msgspec.structs.replace(model.manifest, encoders=encoders)
    model._tables["text_encoder_2"], model._words["text_encoder_2"] = small, {}
    rows = np.ones((2, 32), np.float32)

    with pytest.raises(ConceptError, match="needs 2 rows, 1 of 1 are free"):
        model.load(Concept("<a>", {"text_encoder": rows, "text_encoder_2": rows}))

    assert model.words == ()
    assert model._tables["text_encoder"].free_rows == 2
    model.load(Concept("<a>", {"text_encoder": rows, "text_encoder_2": rows[:1]}))
    assert model.words == ("<a>",)
