"""Concept files against safetensors' own writer, and the files that are refused."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from oneword.engines.errors import ConceptError, FileError, UsageError
from oneword.runtime.concept import PNG, Concept, check_token, load_concept, save_concept

ROWS = np.linspace(-0.3, 0.3, 2 * 16, dtype=np.float32).reshape(2, 16)


def _write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def _described(tensors: dict[str, object]) -> bytes:
    return json.dumps(tensors).encode()


def test_a_saved_word_is_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(Concept("<toy>", {"text_encoder": ROWS}, {"base_model": "miniature", "seed": "7"}), path)
    loaded = load_concept(path)
    assert loaded.token == "<toy>"
    np.testing.assert_array_equal(loaded.vectors["text_encoder"], ROWS)
    assert dict(loaded.provenance) == {"base_model": "miniature", "seed": "7"}
    np.testing.assert_array_equal(load_file(path)["<toy>"].numpy(), ROWS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.safetensors"]


def test_a_word_for_two_encoders_is_written_as_sdxl_tools_read_it(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(Concept("<toy>", {"text_encoder": ROWS, "text_encoder_2": -ROWS[:, :8]}), path)
    assert_file_and_word(path, {"clip_l": ROWS, "clip_g": -ROWS[:, :8]}, ["text_encoder", "text_encoder_2"])


def assert_file_and_word(path: Path, tensors: dict[str, np.ndarray], encoders: list[str]) -> None:
    """A file holds exactly these tensors, and its word <toy> the same numbers for these encoders."""
    written, word = safetensors.numpy.load_file(path), load_concept(path)
    assert word.token == "<toy>"
    for arrays, names in ((written, [*tensors]), (word.vectors, encoders)):
        assert arrays.keys() == set(names)
        for name, expected in zip(names, tensors.values(), strict=True):
            assert arrays[name].shape == expected.shape
            np.testing.assert_array_equal(arrays[name], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(ROWS).to(dtype)
    save_file({"<toy>": rows}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        load_concept(tmp_path / "a.safetensors").vectors["text_encoder"], rows.float().numpy()
    )


@pytest.mark.parametrize("key", ["emb_params", "emp_params"])
def test_words_of_kohya_and_onetrainer_are_named_after_their_file(tmp_path: Path, key: str) -> None:
    safetensors.numpy.save_file({key: ROWS}, tmp_path / "my toy.safetensors")
    assert load_concept(tmp_path / "my toy.safetensors").token == "my_toy"


def test_a_vector_without_its_first_axis_as_in_old_diffusers_is_a_word(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"<toy>": ROWS[0]}, tmp_path / "a.safetensors")
    assert load_concept(tmp_path / "a.safetensors").vectors["text_encoder"].shape == (1, 16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((1, 16), np.nan, np.float32), "NaN or infinity"),
        (np.full((1, 16), 1e300), "NaN or infinity"),
        (np.full((1, 16), 1e6, np.float32), "plausible"),
        (np.zeros((1, 16), np.float32), "plausible"),
        (np.ones((76, 16), np.float32), "has 76 vectors, but must have 1 to 75"),
        (np.ones((1, 2, 16), np.float32), "has shape"),
        (np.ones((1, 16), np.int64), "is 'I64', but must be one of"),
    ],
)
def test_tensors_that_are_not_a_word_are_refused(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    safetensors.numpy.save_file({"<toy>": rows}, tmp_path / "a.safetensors")
    with pytest.raises(ConceptError, match=message):
        load_concept(tmp_path / "a.safetensors")


ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (_described({"../../etc/passwd": ENTRY}), bytes(8), "looks like a path"),
        (b'{"a": 1, "a": 2}', b"", "appears twice"),
        (_described({"a": ENTRY | {"shape": [0, 2**40], "data_offsets": [0, 0]}}), b"", "has shape"),
        (_described({"a": ENTRY | {"shape": [2**62, 2**62]}}), bytes(8), "has shape"),
        (_described({"a": ENTRY | {"data_offsets": [0, 80]}}), bytes(8), "does not fill"),
        (_described({"a": ENTRY | {"shape": [True, 2]}}), bytes(8), "has shape"),
        (_described({"a": ENTRY}), bytes(12), "4 bytes after the last tensor"),
        (_described({"a": ENTRY, "b": ENTRY}), bytes(8), "overlap"),
        (_described({"a": 7}), bytes(8), "is not described"),
        (_described({}), b"", "holds 0 tensors"),
        (_described({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}), bytes(16), "holds 2 tensors"),
        (_described({"__metadata__": {"a": 1}, "a": ENTRY}), bytes(8), "__metadata__"),
        (b"[" * 60_000, b"", "not JSON"),
        (b"[]", b"", "list, not a table"),
        (b"{" + b" " * 65_536, b"", "has a header of 65537 bytes, but at most 65536 are allowed"),
    ],
)
def test_a_malicious_header_is_refused_with_the_reason(
    tmp_path: Path, header: bytes, data: bytes, message: str
) -> None:
    path = _write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ConceptError, match=message) as caught:
        load_concept(path)
    assert "\n" not in str(caught.value)


def test_an_error_shows_little_of_a_header_and_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    long = 9 * "\x1b[2J\ud800"
    out = {"dtype": "F32", "shape": [1, 1, 1, 2], "data_offsets": [8, 16]}
    facts = {"stages": "1", "layers": "1", "values_only": long}
    for number, header in enumerate(
        (
            {"a": ENTRY | {"dtype": long}},
            {"a": ENTRY, "a.out.text_encoder": out, "__metadata__": facts},
        )
    ):
        path = _write(tmp_path / f"{number}.safetensors", _described(header), bytes(8 + 8 * number))
        with pytest.raises(ConceptError, match=r"\\x1b\[2J") as caught:
            load_concept(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200 + len(str(path))


def test_metadata_that_could_not_be_written_again_is_refused_on_reading(tmp_path: Path) -> None:
    for metadata in ({"where": "\ud800"}, {"\ud800": "here"}):
        header = _described({"<toy>": ENTRY, "__metadata__": metadata})
        path = _write(tmp_path / "a.safetensors", header, b"\0\0\0?" * 2)
        with pytest.raises(ConceptError, match="in its metadata, which is not valid Unicode: it contains") as caught:
            load_concept(path)
        assert str(caught.value).isprintable()


RESERVED = ["clip_l", "clip_g", "t5", "t5xxl", "text_encoders_0", "text_encoders_1", "qwen3_4b", "qwen3_8b"]


@pytest.mark.parametrize("token", [*RESERVED, "emb_params", "emp_params_out", "__metadata__"])
def test_a_word_cannot_be_named_after_a_key_with_another_meaning_in_its_file(tmp_path: Path, token: str) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.raises(ConceptError, match=f"token '{token}' is a key .*: rename the word, for example <{token}>"):
        save_concept(Concept(token, {"text_encoder": ROWS}), path)
    with pytest.raises(ConceptError, match="rename the word"):
        check_token(token)  # as where a word is named, before it is learned
    assert not path.exists()

    save_concept(Concept(f"<{token}>", {"text_encoder": ROWS}, {"seed": "7"}), path)
    save_concept(Concept(token, {"text_encoder": ROWS, "text_encoder_2": ROWS}), other)  # named in the metadata

    word = load_concept(path)
    assert (word.token, dict(word.provenance), set(word.vectors)) == (f"<{token}>", {"seed": "7"}, {"text_encoder"})
    np.testing.assert_array_equal(word.vectors["text_encoder"], ROWS)
    assert load_concept(other).token == token


def test_a_file_that_is_named_after_such_a_key_is_still_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"emb_params": ROWS}, tmp_path / "t5.safetensors")

    word = load_concept(tmp_path / "t5.safetensors")

    assert (word.token, set(word.vectors)) == ("t5", {"text_encoder"})


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for data, message in [
        (b"", "has 0 bytes"),
        (b"PK\x03\x04" + bytes(99), "is a pickle"),
        (b"\x80\x02" + bytes(99), "is a pickle"),
        ((200).to_bytes(8, "little") + b"{}", "is truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808 bytes"),
        (b"a text that is long enough", r"a.safetensors is not a safetensors file: give one of a word, such as"),
        (PNG, "is a picture, not a word's file; if A1111 stored a word in it, run ti-concept convert first"),
        (PNG + bytes(2 << 20), "is a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "is a picture, not a word's file: learn a word from pictures with ti-train"),
        (b"RIFF\0\0\0\0WEBP" + bytes(99), "is a picture, not a word's file"),
        (bytes((1 << 20) + 1), "has 1048577 bytes"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ConceptError, match=message):
            load_concept(path)
    with pytest.raises(UsageError, match=r"there is no file .*absent\.safetensors"):
        load_concept(tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match="is a folder: give a word's file"):
        load_concept(tmp_path)


@pytest.mark.parametrize(
    ("layer", "factors"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", ["lora_down.weight", "lora_up.weight", "alpha"]),  # kohya
        ("unet.down_blocks.0.attentions.0.to_q", ["lora_A.weight", "lora_B.weight"]),  # diffusers
        ("base_model.model.attentions.0.to_q", ["lora_A.default.weight", "lora_B.default.weight"]),  # PEFT
        ("unet.down_blocks.0.attn1.processor", ["to_q_lora.down.weight", "to_q_lora.up.weight"]),  # diffusers, older
        ("lora_unet_mid_block_attentions_0_proj_in", ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]),  # LyCORIS
        ("lycoris_mid_block_attentions_0_proj_in", ["lokr_w1", "lokr_w2"]),
    ],
)
@pytest.mark.parametrize("size", [16, 2 << 20])
@pytest.mark.parametrize("metadata", [0, 2 << 20])
def test_a_lora_of_any_size_is_refused_with_what_to_do_with_it(
    tmp_path: Path, layer: str, factors: list[str], size: int, metadata: int
) -> None:
    """Its metadata, such as kohya's counts of captions, is before the names of its tensors."""
    path, facts = tmp_path / "style.safetensors", {"ss_tag_frequency": "x" * metadata}
    tensors = {f"{layer}.{factor}": np.ones(size // 4, np.float32) for factor in factors}
    safetensors.numpy.save_file(tensors, path, facts)

    with pytest.raises(ConceptError, match="is a LoRA, not a word's file: fuse it when you export, with ti-export --l"):
        load_concept(path)

    safetensors.numpy.save_file({**tensors, "bundle_emb.toy.emb_params": ROWS}, path, facts)
    with pytest.raises(ConceptError, match="is a LoRA with words in it: ti-concept convert writes these as files"):
        load_concept(path)


def test_a_word_whose_name_resembles_a_loras_tensors_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    facts = {"ss_network_module": "networks.lora", "x_lora_A": "x_lora_B", "json": '{"a.lora_up": {"b.lora_down": {}}}'}
    safetensors.numpy.save_file({"<lora_down>": ROWS}, path, facts)

    assert load_concept(path).token == "<lora_down>"


@pytest.mark.parametrize(
    "token",
    [
        "my_lora_A",
        "style_lora_up",
        "x.lora_B",
        "x.lora_down.weight",
        "a.lora.up",
        "b_hada_w1_a",
        "c.lokr_w2",
        "_lora_A",
    ],
)
def test_a_word_that_is_named_as_a_tensor_of_a_lora_is_saved_and_loaded(tmp_path: Path, token: str) -> None:
    path, out, layers = tmp_path / "a.safetensors", np.ones((1, 1, 2, 4), np.float32), ROWS[None]
    names = ("text_encoder", "text_encoder_2")
    for encoders in (names[:1], names):
        rows = dict.fromkeys(encoders, ROWS)
        for parts in ({}, {"out": dict.fromkeys(encoders, out)}, {"layer_rows": dict.fromkeys(encoders, layers)}):
            word = Concept(token, rows, {"x_lora_A": "x_lora_B"}, **parts)

            save_concept(word, path)

            loaded = load_concept(path)
            assert (loaded.token, loaded.identity) == (token, word.identity)


@pytest.mark.parametrize("token", ["", "a b", "../toy", "a/b", "(toy:2)", "<a", "x" * 65, "to\ny", "e\u0301", "\u202e"])
def test_a_token_that_is_not_safe_in_a_prompt_is_refused(token: str) -> None:
    with pytest.raises(ConceptError, match="token"):
        Concept(token, {"text_encoder": ROWS})


@pytest.mark.parametrize("token", ["<toy>", "sks", "*", "S*", "<cat-toy>", "été", "人形", "a.b"])
def test_common_tokens_are_accepted(token: str) -> None:
    assert Concept(token, {"text_encoder": ROWS}).token == token


def test_a_word_is_immutable() -> None:
    rows = ROWS.copy()
    concept = Concept("<toy>", {"text_encoder": rows})
    rows[:] = 0
    np.testing.assert_array_equal(concept.vectors["text_encoder"], ROWS)
    with pytest.raises(ValueError, match="read-only"):
        concept.vectors["text_encoder"][0, 0] = 1


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.safetensors"
    save_concept(Concept("<toy>", {"text_encoder": ROWS}), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="No space left on device"):
        save_concept(Concept("<toy>", {"text_encoder": ROWS * 2}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_largest_allowed_header_is_refused_quickly(tmp_path: Path) -> None:
    entries = {f"{i:x}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(950)}
    path = _write(tmp_path / "a.safetensors", _described(entries), bytes(3_800))
    start = time.process_time()
    with pytest.raises(ConceptError, match="holds 950 tensors"):
        load_concept(path)
    print(f"950 tensors refused in {1e3 * (time.process_time() - start):.1f} ms")


def test_vectors_for_t5_are_written_as_comfyui_reads_them_and_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    long = 100 * ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True) * 10  # of norm 1,000
    save_concept(Concept("<toy>", {"text_encoder": ROWS, "text_encoder_3": long}), path)
    assert_file_and_word(path, {"clip_l": ROWS, "t5xxl": long}, ["text_encoder", "text_encoder_3"])
    with pytest.raises(ConceptError, match="has norm 1e\\+03, a plausible vector has one above 0 and at most 300"):
        Concept("<toy>", {"text_encoder": long})
    with pytest.raises(ConceptError, match="at most 30000"):
        Concept("<toy>", {"text_encoder_3": 1000 * long})


def test_a_word_for_t5_alone_is_written_under_comfyuis_key(tmp_path: Path) -> None:
    rows = np.linspace(0.1, 0.2, 2 * 4096, dtype=np.float32).reshape(2, 4096)
    save_concept(Concept("<toy>", {"text_encoder_3": rows}), tmp_path / "toy.safetensors")
    assert_file_and_word(tmp_path / "toy.safetensors", {"t5xxl": rows}, ["text_encoder_3"])


@pytest.mark.parametrize(
    ("key", "width"),
    [("gemma", 2304), ("llama", 4096), ("qwen3_06b", 1024), ("qwen25_7b", 3584)],
)
def test_vectors_for_an_encoder_of_no_supported_model_are_refused_by_name(tmp_path: Path, key: str, width: int) -> None:
    tensors = {"clip_l": np.full((2, 768), 0.1, np.float32), key: np.full((2, width), 0.1, np.float32)}
    for number, keys in enumerate(([key], ["clip_l", key])):
        path = tmp_path / f"{number}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in keys}, path)
        refused = f"has vectors for {key}, a text encoder of no supported model: the encoder must be one of"
        with pytest.raises(ConceptError, match=refused):
            load_concept(path)
    save_concept(Concept(key, {"text_encoder": ROWS}), tmp_path / "word.safetensors")  # a word with that name
    assert load_concept(tmp_path / "word.safetensors").token == key


def test_onetrainers_old_key_for_clip_l_is_recognised_by_its_width(tmp_path: Path) -> None:
    clip_l = np.linspace(0.1, 0.2, 2 * 768, dtype=np.float32).reshape(2, 768)
    t5 = np.linspace(0.3, 0.4, 2 * 4096, dtype=np.float32).reshape(2, 4096)
    safetensors.numpy.save_file({"clip_g": clip_l, "t5": t5}, tmp_path / "<toy>.safetensors")
    assert_file_and_word(
        tmp_path / "<toy>.safetensors", {"clip_g": clip_l, "t5": t5}, ["text_encoder", "text_encoder_3"]
    )


@pytest.mark.parametrize(
    ("provenance", "text"),
    [
        ({}, ""),
        ({"init": "toy"}, "toy"),
        ({"init": "toy.safetensors"}, ""),
        ({"init": "random"}, ""),
        ({"init": "toy", "text": "a plush dog"}, "a plush dog"),
        ({"text": "toy" * 1000}, ("toy" * 1000)[:200]),
    ],
)
def test_the_text_of_a_word_is_its_class_word(provenance: dict[str, str], text: str) -> None:
    assert Concept("<toy>", {"text_encoder": ROWS}, provenance).text == text


@pytest.mark.parametrize(("key", "width"), [("qwen3_4b", 2560), ("qwen3_8b", 4096)])
def test_a_word_of_qwen3_has_the_key_that_comfyui_reads_for_its_size(tmp_path: Path, key: str, width: int) -> None:
    vectors = np.linspace(0.01, 0.02, 2 * width, dtype=np.float32).reshape(2, width)
    safetensors.numpy.save_file({key: vectors}, tmp_path / "<toy>.safetensors")  # as ComfyUI's users make it

    save_concept(load_concept(tmp_path / "<toy>.safetensors"), tmp_path / "again.safetensors")

    for name in ("<toy>", "again"):
        assert_file_and_word(tmp_path / f"{name}.safetensors", {key: vectors}, ["text_encoder_qwen3"])
