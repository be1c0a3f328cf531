"""Words with vectors for layers: their files, those of other tools, what is refused; other words are as before."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from safetensors import safe_open

from oneword.engines.errors import ConceptError, UsageError
from oneword.runtime import cli_concept
from oneword.runtime.concept import (
    XTI_KEYS,
    Concept,
    concept_bytes,
    concept_of,
    load_concept,
    read_safetensors,
    save_concept,
)
from oneword.runtime.layouts import paired, read_concepts
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.slider import Slider

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(0, 0.02, (2, 32)).astype(np.float32)
OUT = RANDOM.normal(0, 1, (4, 3, 2, 24)).astype(np.float32)
LAYERS = RANDOM.normal(0, 0.02, (3, 2, 32)).astype(np.float32)
VECTOR = RANDOM.normal(0, 1, (2, 24)).astype(np.float32)
FACTS = {"stages": "4", "layers": "3", "values_only": "true"}


def precise(**changes: Any) -> Concept:
    word = Concept("<toy>", {"text_encoder": ROWS}, {"seed": "7"}, {"text_encoder": OUT}, True, {"text_encoder": 12})
    return replace(word, **changes)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    safetensors.numpy.save_file(dict(tensors), path, dict(metadata or {}))
    return path


def test_a_saved_word_is_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(precise(), path)
    word = load_concept(path)

    np.testing.assert_array_equal(word.vectors["text_encoder"], ROWS)
    np.testing.assert_array_equal(word.out["text_encoder"], OUT)
    assert (word.token, word.stages, word.layers, word.values_only) == ("<toy>", 4, 3, True)
    assert dict(word.encoder_layers) == {"text_encoder": 12}
    assert dict(word.provenance) == {"seed": "7"}
    assert word.identity == precise().identity
    with pytest.raises(ValueError, match="read-only"):
        word.out["text_encoder"][0] = 1


def test_the_file_has_the_rows_where_other_tools_read_them_and_states_the_facts_of_the_output_vectors(
    tmp_path: Path,
) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(precise(), path)
    with safe_open(path, "numpy") as file:
        assert [*file.keys()] == ["<toy>", "<toy>.out.text_encoder"]
        metadata = file.metadata()
    assert {**FACTS, "encoder_layer.text_encoder": "12"}.items() <= metadata.items()
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(tensors["<toy>"], ROWS)
    np.testing.assert_array_equal(tensors["<toy>.out.text_encoder"], OUT)


def test_a_word_of_two_encoders_is_loaded_unchanged(tmp_path: Path) -> None:
    rows = {"text_encoder": ROWS, "text_encoder_2": -ROWS[:, :8]}
    out = {"text_encoder": OUT, "text_encoder_2": -OUT[..., :5]}
    word = Concept("toy", rows, {}, out, False, {"text_encoder": 11, "text_encoder_2": 31})
    save_concept(word, tmp_path / "a.safetensors")
    loaded = load_concept(tmp_path / "a.safetensors")

    assert loaded.identity == word.identity
    written = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert written.keys() == {"clip_l", "clip_g", "toy.out.text_encoder", "toy.out.text_encoder_2"}
    for name, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        for arrays, expected, out_key in ((loaded.vectors, rows, key), (loaded.out, out, f"toy.out.{name}")):
            np.testing.assert_array_equal(arrays[name], expected[name])
            np.testing.assert_array_equal(written[out_key], expected[name])


def test_diffusers_reads_the_rows_once_the_output_vectors_are_left_out(tmp_path: Path, tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    whole, bare = tmp_path / "toy.safetensors", tmp_path / "rows.safetensors"
    save_concept(precise(), whole)
    result = CliRunner().invoke(cli_concept.command, ["convert", str(whole), str(bare), "--rows-only"])
    assert result.exit_code == 0, result.output

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="single key"):
        pipeline.load_textual_inversion(whole)
    pipeline.load_textual_inversion(bare)
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
    loaded = pipeline.text_encoder.get_input_embeddings().weight[ids].detach().numpy()
    np.testing.assert_array_equal(loaded, ROWS)
    assert not load_concept(bare).out


def test_the_identity_of_a_word_without_output_vectors_is_that_of_its_rows() -> None:
    expected = hashlib.sha256(b"text_encoder [2, 32]\n" + ROWS.tobytes()).hexdigest()
    assert Concept("<toy>", {"text_encoder": ROWS}).identity == expected


def test_the_identity_of_a_precise_word_is_the_hash_of_its_canonical_form() -> None:
    rows = b"text_encoder [2, 32]\n" + ROWS.tobytes()
    out = b"out text_encoder [4, 3, 2, 24]\n" + OUT.tobytes()
    facts = b"encoder_layer.text_encoder 12\nlayers 3\nstages 4\nvalues_only true\n"
    assert precise().identity == hashlib.sha256(rows + out + facts).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"out": {}, "values_only": False, "encoder_layers": {}},
        {"out": {"text_encoder": OUT * 2}},
        {"out": {"text_encoder": OUT.reshape(3, 4, 2, 24)}},
        {"values_only": False},
        {"encoder_layers": {}},
        {"encoder_layers": {"text_encoder": 11}},
        {"vectors": {"text_encoder": ROWS * 2}},
    ],
)
def test_whatever_changes_a_picture_changes_the_identity(changes: dict[str, Any]) -> None:
    assert precise(**changes).identity != precise().identity


def test_names_and_provenance_do_not_change_the_identity() -> None:
    assert precise(token="<gem>", provenance={}).identity == precise().identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"out": {"text_encoder": OUT[0]}},
            r"has output vectors \[3, 2, 24\] for 2 rows, but must have \[stages, layers",
        ),
        ({"out": {"text_encoder": OUT[:, :, :1]}}, r"has output vectors \[4, 3, 1, 24\] for 2 rows"),
        ({"out": {"text_encoder": OUT[:0]}}, r"has output vectors \[0, 3, 2, 24\]"),
        ({"out": {"text_encoder": OUT * np.float32(np.nan)}}, "has output vectors with NaN or infinity"),
        ({"out": {"text_encoder": OUT * 1e5}}, r"has an output vector of norm .*, but at most 30000 is allowed"),
        (
            {"out": {"text_encoder": np.ones((101, 1, 2, 4))}},
            "for 101 stages and 1 layer, but at most 100 and 100 are allowed",
        ),
        (
            {"out": {"text_encoder": np.ones((1, 101, 2, 4))}},
            "for 1 stage and 101 layers, but at most 100 and 100 are allowed",
        ),
        ({"out": {"text_encoder_2": OUT}, "encoder_layers": {}}, r"\(text_encoder_2\) has output vectors and no rows"),
        ({"out": {}}, "has values_only and no output vectors: leave it out"),
        ({"out": {}, "values_only": False}, "each needs output vectors"),
        ({"encoder_layers": {"text_encoder_2": 3}}, "each needs output vectors"),
        ({"encoder_layers": {"text_encoder": 0}}, "of the encoder's layer 0, but the layer must be 1 to 100"),
        ({"vectors": {"text_encoder": ROWS * 1e6}}, "plausible"),
        (
            {
                "vectors": {"text_encoder": ROWS, "text_encoder_2": ROWS},
                "out": {"text_encoder": OUT, "text_encoder_2": OUT[:1]},
            },
            "stages and layers must be equal for every encoder",
        ),
    ],
)
def test_output_vectors_that_cannot_be_used_are_one_line_of_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptError, match=message) as caught:
        precise(**changes)
    assert "\n" not in str(caught.value)


def test_rows_may_be_zeros_only_beside_output_vectors() -> None:
    assert not precise(vectors={"text_encoder": ROWS * 0}).vectors["text_encoder"].any()
    with pytest.raises(ConceptError, match="plausible"):
        precise(vectors={"text_encoder": ROWS * 0}).rows_only()


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT}, {}, "has stages = None in its metadata, output vectors need"),
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT}, FACTS | {"layers": "x"}, "has layers = 'x' in its metadata"),
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT}, FACTS | {"stages": "-4"}, "has stages = '-4'"),
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT}, FACTS | {"stages": "3"}, "its metadata says 3 stages and 3"),
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT[0]}, FACTS, r"has output vectors \[3, 2, 24\] for text_encoder"),
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT}, FACTS | {"values_only": "1"}, "has values_only = '1'"),
        (
            {"<toy>": ROWS, "<toy>.out.text_encoder": OUT},
            FACTS | {"encoder_layer.text_encoder": "1e9"},
            "has encoder_layer.text_encoder = '1e9'",
        ),
        (
            {"<toy>": ROWS, "<toy>.out.text_encoder": OUT},
            FACTS | {"encoder_layer.text_encoder_2": "1"},
            "each needs output vectors",
        ),
        ({"<toy>": ROWS, "<gem>.out.text_encoder": OUT}, FACTS, "layers of '<gem>' and the word '<toy>'"),
        ({"<toy>": ROWS, "<gem>": ROWS, "<toy>.out.text_encoder": OUT}, FACTS, "holds 2 tensors"),
        ({"<toy>.out.text_encoder": OUT, "<toy>.out.text_encoder_2": OUT}, FACTS, "holds 0 tensors"),
        ({"<toy>.out.text_encoder": OUT}, FACTS, "is not safe in a prompt"),
        ({"<toy>": ROWS[None]}, {}, "has shape"),
        ({"<toy>": ROWS[None, None, None]}, {}, "has shape"),
        ({"<toy>": ROWS, "<toy>.out.text_encoder": OUT.astype(np.int32)}, FACTS, "is 'I32', but must be one of"),
    ],
)
def test_a_file_that_describes_its_output_vectors_wrongly_is_one_line_of_error(
    tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(ConceptError, match=message) as caught:
        load_concept(path)
    assert "\n" not in str(caught.value)


def test_metadata_of_these_names_is_provenance_in_a_word_without_output_vectors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"<toy>": ROWS}, {"layers": "many", "stages": "0"})
    assert dict(load_concept(path).provenance) == {"layers": "many", "stages": "0"}


def test_a_file_that_would_be_too_large_to_load_is_not_written(tmp_path: Path) -> None:
    large = precise(out={"text_encoder": np.full((100, 16, 2, 128), 0.1, np.float32)})
    refused = (
        r"would have 16\d+ bytes, but at most 1048576 are allowed \(1 MiB\): learn fewer vectors, stages or layers"
    )
    with pytest.raises(ConceptError, match=refused):
        save_concept(large, tmp_path / "a.safetensors")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(ConceptError, match=refused):
        concept_bytes(large)


def test_a_file_of_float16_is_converted_within_the_same_size(tmp_path: Path) -> None:
    path, out = tmp_path / "toy.safetensors", tmp_path / "gem.safetensors"
    half = RANDOM.normal(0, 1, (20, 16, 1, 1024)).astype(np.float16)  # 655 KB, 1.3 MB as float32
    facts = FACTS | {"stages": "20", "layers": "16"}
    write(path, {"<toy>": ROWS[:1], "<toy>.out.text_encoder": half}, facts)
    result = CliRunner().invoke(cli_concept.command, ["convert", str(path), str(out), "--token", "<gem>"])
    assert result.exit_code == 0, result.output
    assert load_concept(out).identity == load_concept(path).identity
    assert out.stat().st_size < 700_000


def test_vectors_twice_under_keys_of_two_tools_are_refused(tmp_path: Path) -> None:
    xti = dict.fromkeys(XTI_KEYS, ROWS)
    onetrainer = {"emp_params": ROWS, "emp_params_out": VECTOR}
    for tensors, message in (
        (onetrainer | {"a.out.text_encoder": OUT}, "has out of text_encoder twice, under keys of two tools"),
        (xti | {"a.rows.text_encoder": np.stack([ROWS] * 16)}, "has rows of text_encoder twice, under keys of two"),
    ):
        path = write(tmp_path / "a.safetensors", tensors, FACTS)
        for read in (load_concept, read_concepts):
            with pytest.raises(ConceptError, match=message):
                read(path)


def test_a_long_key_is_cut_in_the_error(tmp_path: Path) -> None:
    tensors = {"<toy>": ROWS, "x" * 5000 + ".rows.text_encoder": np.stack([ROWS] * 3)}
    with pytest.raises(ConceptError, match=r"has vectors for layers of 'x{80}' and the word '<toy>'") as caught:
        load_concept(write(tmp_path / "a.safetensors", tensors))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "facts",
    [
        {"encoder_layer.text_encoder": "5"},
        {"encoder_layer.text_encoder_2": "1"},
        {"encoder_layer.": "x", "stages": "9", "layers": "9", "values_only": "true"},
    ],
)
def test_metadata_of_another_tools_file_does_not_become_facts_of_the_converted_word(
    tmp_path: Path, facts: dict[str, str]
) -> None:
    path, out = tmp_path / "toy.safetensors", tmp_path / "ours.safetensors"
    write(path, {"emp_params": ROWS, "emp_params_out": VECTOR}, facts | {"ss_steps": "7"})
    word = load_concept(path)
    save_concept(word, out)

    assert dict(word.provenance) == dict(load_concept(out).provenance) == {"ss_steps": "7"}
    assert (word.values_only, dict(word.encoder_layers), word.stages) == (False, {}, 1)
    assert load_concept(out).identity == word.identity
    assert concept_of(*read_safetensors(concept_bytes(word), "a"), "a").identity == word.identity


def test_ti_concept_shows_checks_and_converts_output_vectors(tmp_path: Path) -> None:
    path, out = tmp_path / "toy.safetensors", tmp_path / "gem.safetensors"
    save_concept(precise(), path)
    run = CliRunner()

    text = run.invoke(cli_concept.command, ["show", str(path)]).stdout
    assert "<toy>  (oneword, " in text
    assert "  text_encoder: 2 x 32, norms" in text
    low, high = np.linalg.norm(OUT, axis=-1).min(), np.linalg.norm(OUT, axis=-1).max()
    assert (
        f"  text_encoder, output: 4 stages x 3 layers x 2 x 24, norms {low:.3g} to {high:.3g}, for values only, of the "
        "encoder's layer 12"
    ) in text
    [shown] = json.loads(run.invoke(cli_concept.command, ["show", str(path), "--json"]).stdout)
    assert shown["values_only"] is True
    assert {key: shown["out"]["text_encoder"][key] for key in ("stages", "layers", "count", "width")} == {
        "stages": 4,
        "layers": 3,
        "count": 2,
        "width": 24,
    }
    assert shown["out"]["text_encoder"]["encoder_layer"] == 12
    assert run.invoke(cli_concept.command, ["check", str(path)]).stdout.startswith("ok")
    assert run.invoke(cli_concept.command, ["convert", str(path), str(out), "--token", "<gem>"]).exit_code == 0
    assert (load_concept(out).token, load_concept(out).identity) == ("<gem>", precise().identity)


def test_words_with_output_vectors_are_not_a_pair_of_files(tmp_path: Path) -> None:
    save_concept(precise(), tmp_path / "toy.safetensors")
    with pytest.raises(ConceptError, match="are not a pair: their file already holds every encoder"):
        paired(read_concepts(tmp_path / "toy.safetensors") * 2)


def test_a_slider_interpolates_output_vectors_and_refuses_different_kinds() -> None:
    first, second = np.zeros((1, 2, 1, 3), np.float32), np.zeros((1, 2, 1, 3), np.float32)
    first[..., 0], second[..., 1] = 2, 4
    words = [
        Concept(f"<{name}>", {"text_encoder": rows}, {}, {"text_encoder": out}, True)
        for name, rows, out in (("a", [[1.0, 0]], first), ("b", [[0, 1.0]], second))
    ]
    middle = Slider(words[0], words[1], 0.5).concept
    np.testing.assert_allclose(middle.out["text_encoder"][0, 1, 0], 3 * np.array([0.5**0.5, 0.5**0.5, 0]), atol=1e-6)
    assert middle.values_only
    for other in (replace(words[1], values_only=False), words[1].rows_only()):
        with pytest.raises(UsageError, match="have vectors for layers of different kinds: a slider needs"):
            _ = Slider(words[0], other, 0.5).concept


def test_a_slider_of_opposite_output_vectors_is_refused() -> None:
    out = np.ones((1, 1, 1, 3), np.float32)
    words = [
        Concept(f"<{name}>", {"text_encoder": rows}, {}, {"text_encoder": sign * out}, True)
        for name, rows, sign in (("a", [[1.0, 0]], 1), ("b", [[0, 1.0]], -1))
    ]
    with pytest.raises(UsageError, match="is not a word: the two are opposite, change the share"):
        _ = Slider(words[0], words[1], 0.5).concept


def test_refining_a_word_with_output_vectors_is_refused() -> None:
    lexicon = Lexicon({"text_encoder": np.ones((3, 32), np.float32)}, lambda name, text: [0])
    for word in (precise(), layered()):
        with pytest.raises(UsageError, match="has vectors for layers, which refining cannot change"):
            lexicon.rows_of(word)


def layered(**changes: Any) -> Concept:
    return replace(Concept("<toy>", {"text_encoder": ROWS}, layer_rows={"text_encoder": LAYERS}), **changes)


def test_rows_of_layers_are_saved_and_loaded_unchanged_and_are_part_of_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(layered(), path)
    word = load_concept(path)

    np.testing.assert_array_equal(word.layer_rows["text_encoder"], LAYERS)
    np.testing.assert_array_equal(word.vectors["text_encoder"], ROWS)
    expected = b"text_encoder [2, 32]\n" + ROWS.tobytes() + b"rows text_encoder [3, 2, 32]\n" + LAYERS.tobytes()
    assert word.identity == hashlib.sha256(expected).hexdigest()
    assert [*safetensors.numpy.load_file(path)] == ["<toy>", "<toy>.rows.text_encoder"]
    for layer, concept in enumerate(word.by_layer):
        assert concept.identity == Concept("<toy>", {"text_encoder": LAYERS[layer]}).identity
    text = CliRunner().invoke(cli_concept.command, ["show", str(path)]).stdout
    assert "  text_encoder, rows of layers: 3 layers x 2 x 32" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_rows": {"text_encoder": LAYERS[:, :1]}},
            r"has rows \[3, 1, 32\] for each layer and \[2, 32\] for all",
        ),
        ({"layer_rows": {"text_encoder_2": LAYERS}}, r"has rows \[3, 2, 32\] for each layer and none for all"),
        ({"layer_rows": {"text_encoder": LAYERS[:0]}}, "has rows for 0 layers, but must have them for 1 to 100"),
        ({"layer_rows": {"text_encoder": LAYERS * np.float32(np.nan)}}, "NaN or infinity"),
        ({"out": {"text_encoder": OUT}}, "has rows for each layer and output vectors: a word has one of the two"),
        (
            {
                "vectors": {"text_encoder": ROWS, "text_encoder_2": ROWS},
                "layer_rows": {"text_encoder": LAYERS, "text_encoder_2": LAYERS[:2]},
            },
            r"has rows \[3, 2, 32\] and \[2, 2, 32\]: layers must be equal for every encoder",
        ),
    ],
)
def test_rows_of_layers_that_cannot_be_used_are_one_line_of_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptError, match=message) as caught:
        layered(**changes)
    assert "\n" not in str(caught.value)


def test_the_rows_of_kohyas_xti_are_read_in_the_order_of_the_layers_and_written_as_ours(tmp_path: Path) -> None:
    rows = RANDOM.normal(0, 0.02, (16, 2, 768)).astype(np.float32)
    write(tmp_path / "my toy.safetensors", dict(zip(XTI_KEYS, rows, strict=True)))
    word = load_concept(tmp_path / "my toy.safetensors")

    assert XTI_KEYS[:7] == ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID")
    assert XTI_KEYS[7:] == tuple(f"OUT{i:02}" for i in range(3, 12))
    assert word.token == "my_toy"
    np.testing.assert_array_equal(word.layer_rows["text_encoder"], rows)
    np.testing.assert_allclose(word.vectors["text_encoder"], rows.mean(0), atol=1e-7)
    result = CliRunner().invoke(
        cli_concept.command, ["convert", str(tmp_path / "my toy.safetensors"), str(tmp_path / "toy.safetensors")]
    )
    assert result.exit_code == 0, result.output
    assert load_concept(tmp_path / "toy.safetensors").identity == word.identity
    written = safetensors.numpy.load_file(tmp_path / "toy.safetensors")
    assert written.keys() == {"my_toy", "my_toy.rows.text_encoder"}
    np.testing.assert_array_equal(written["my_toy.rows.text_encoder"], rows)
    np.testing.assert_allclose(written["my_toy"], rows.mean(0), atol=1e-7)


def test_the_rows_of_kohyas_xti_must_have_one_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**dict.fromkeys(XTI_KEYS, ROWS), "MID": ROWS[:1]})
    with pytest.raises(ConceptError, match="has rows of different shapes for its 16 layers"):
        load_concept(path)


@pytest.mark.parametrize(
    ("tensors", "out"),
    [
        ({"emp_params": ROWS, "emp_params_out": VECTOR}, {"text_encoder": VECTOR}),
        ({"emb_params": ROWS, "emb_params_out": VECTOR}, {"text_encoder": VECTOR}),
        ({"emp_params": ROWS * 0, "emp_params_out": VECTOR}, {"text_encoder": VECTOR}),  # as OneTrainer writes it
        (
            {"clip_l": ROWS * 0, "clip_g": ROWS * 0, "clip_l_out": VECTOR, "clip_g_out": -VECTOR},
            {"text_encoder": VECTOR, "text_encoder_2": -VECTOR},
        ),
        ({"clip_l": ROWS, "t5": ROWS * 0, "t5_out": VECTOR}, {"text_encoder_3": VECTOR}),
    ],
)
def test_output_vectors_of_onetrainer_are_for_keys_and_values_of_every_stage_and_layer(
    tmp_path: Path, tensors: dict[str, np.ndarray], out: dict[str, np.ndarray]
) -> None:
    path = write(tmp_path / "toy.safetensors", tensors)
    word, [found] = load_concept(path), read_concepts(path)

    assert word.identity == found.concept.identity
    assert (word.token, word.stages, word.layers, word.values_only) == ("toy", 1, 1, False)
    assert word.out.keys() == out.keys()
    for name, vectors in out.items():
        np.testing.assert_array_equal(word.out[name], vectors[None, None])
    save_concept(word, tmp_path / "ours.safetensors")
    assert load_concept(tmp_path / "ours.safetensors").identity == word.identity


def test_output_vectors_in_a_lora_are_read(tmp_path: Path) -> None:
    write(
        tmp_path / "lora.safetensors",
        {"bundle_emb.toy.emp_params": ROWS * 0, "bundle_emb.toy.emp_params_out": VECTOR, "lora.weight": ROWS},
    )
    [found] = read_concepts(tmp_path / "lora.safetensors")
    assert (found.concept.token, found.layout) == ("toy", "LoRA bundle")
    np.testing.assert_array_equal(found.concept.out["text_encoder"], VECTOR[None, None])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": ROWS, "clip_g_out": VECTOR}, "mixes 'clip_g_out', 'clip_l'|mixes 'clip_l', 'clip_g_out'"),
        ({"clip_l": ROWS, "other": VECTOR}, "besides the keys of encoders, only their output vectors"),
        ({"emp_params": ROWS, "emp_params_out": VECTOR[:1]}, r"has output vectors \[1, 1, 1, 24\] for 2 rows"),
        ({"emp_params_out": VECTOR}, "has emp_params_out and no emp_params: output vectors need rows"),
        ({"emb_params": ROWS, "emp_params_out": VECTOR}, "has emp_params_out and no emp_params"),
        ({"<toy>": ROWS, "emb_params_out": VECTOR}, "has emb_params_out and no emb_params"),
        ({"t5": ROWS, "t5xxl": ROWS * 2}, "has two different tensors for text_encoder_3: leave out one"),
        (
            {"t5": ROWS, "t5xxl": ROWS, "t5_out": VECTOR, "t5xxl_out": VECTOR * 2},
            "has two different tensors for text_encoder_3",
        ),
        ({"emp_params": ROWS * 0}, "plausible"),
    ],
)
def test_output_vectors_of_onetrainer_that_cannot_be_used_are_one_line_of_error(
    tmp_path: Path, tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ConceptError, match=message) as caught:
        load_concept(write(tmp_path / "a.safetensors", tensors))
    assert "\n" not in str(caught.value)
