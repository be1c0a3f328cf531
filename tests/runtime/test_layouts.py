"""Embedding files of all tools, written in their layouts and read without PyTorch."""

import base64
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from oneword.engines.errors import ConceptError, OnewordError, UsageError
from oneword.runtime import cli_concept
from oneword.runtime.concept import XTI_KEYS, Concept, load_concept, save_concept
from oneword.runtime.layouts import read_concepts

ROWS = np.random.default_rng(0).normal(0, 0.02, (2, 768)).astype(np.float32)
WIDE = np.random.default_rng(1).normal(0, 0.02, (2, 1280)).astype(np.float32)
LONG, ROWS_OUT, WIDE_OUT, LONG_OUT = (
    np.random.default_rng(width).normal(0, 1, (2, width % 10_000)).astype(np.float32)
    for width in (4096, 10_768, 11_280, 14_096)
)
FIRST = {"text_encoder": ROWS}
TENSOR = torch.from_numpy(ROWS)
XTI = np.arange(16 * 2 * 768, dtype=np.float32).reshape(16, 2, 768) / 2**20  # sums of 16 layers are exact
XTI_MEAN = {"text_encoder": XTI[0] + np.float32(7.5 * 2 * 768 / 2**20)}
HALF = ROWS.astype(np.float16).astype(np.float32)


def _parameters(**rows: torch.Tensor) -> torch.nn.ParameterDict:
    return torch.nn.ParameterDict({key: torch.nn.Parameter(value) for key, value in rows.items()})


def _a1111(**fields: Any) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": TENSOR},
        "name": "stored name",
        "step": 4999,
        "sd_checkpoint": "4bdfc29c",
        "sd_checkpoint_name": "SD1.5",
        **fields,
    }


KEYS = "a key for each encoder"
PICKLED: list[tuple[str, Callable[[], Any], str, dict[str, dict[str, np.ndarray]]]] = [
    ("learned_embeds.bin", lambda: {"<toy>": TENSOR}, "diffusers, pickle", {"<toy>": {"text_encoder": ROWS}}),
    ("half.bin", lambda: {"<toy>": TENSOR.half()}, "diffusers, pickle", {"<toy>": {"text_encoder": HALF}}),
    ("view.bin", lambda: {"<toy>": torch.cat([-TENSOR, TENSOR])[2:]}, "diffusers, pickle", {"<toy>": FIRST}),
    ("turned.bin", lambda: {"<toy>": TENSOR.T.contiguous().T}, "diffusers, pickle", {"<toy>": FIRST}),
    ("learned.bin", lambda: {"<toy>": torch.nn.Parameter(TENSOR)}, "diffusers, pickle", {"<toy>": FIRST}),
    ("my toy.pt", _a1111, "A1111", {"my_toy": FIRST}),
    (
        "embeddings.pt",
        lambda: {
            "string_to_token": {"*": torch.tensor(265), "@": torch.tensor(266)},
            "string_to_param": _parameters(**{"*": TENSOR, "@": -TENSOR}),
        },
        "Gal et al.",
        {"*": FIRST, "@": {"text_encoder": -ROWS}},
    ),
    ("kohya.pt", lambda: {"emb_params": TENSOR}, "kohya or OneTrainer", {"kohya": FIRST}),
    (
        "pair.pt",
        lambda: {"clip_l": TENSOR, "clip_g": torch.from_numpy(WIDE)},
        KEYS,
        {"pair": {**FIRST, "text_encoder_2": WIDE}},
    ),
    (
        "flux.pt",
        lambda: {"clip_l": TENSOR, "t5": torch.from_numpy(LONG)},
        KEYS,
        {"flux": {**FIRST, "text_encoder_3": LONG}},
    ),
]


@pytest.mark.parametrize(("name", "content", "layout", "words"), PICKLED, ids=[case[0] for case in PICKLED])
def test_files_of_torch_save_are_read_without_torch(
    tmp_path: Path, name: str, content: Callable[[], Any], layout: str, words: dict[str, dict[str, np.ndarray]]
) -> None:
    torch.save(content(), tmp_path / name)
    found = read_concepts(tmp_path / name)
    assert [word.layout for word in found] == [layout] * len(words)
    assert [word.concept.token for word in found] == [*words]
    for word, vectors in zip(found, words.values(), strict=True):
        assert_same_arrays(word.concept.vectors, vectors)


FLAT: list[tuple[str, dict[str, np.ndarray], str, dict[str, np.ndarray], dict[str, np.ndarray]]] = [
    # Name, tensors, layout, rows and output vectors.
    ("a", {"<toy>": ROWS}, "diffusers, safetensors", FIRST, {}),
    ("b", {"clip_l": ROWS, "clip_g": WIDE}, KEYS, {**FIRST, "text_encoder_2": WIDE}, {}),
    (
        "c",
        {"clip_l": ROWS, "clip_g": WIDE, "clip_l_out": ROWS_OUT, "clip_g_out": WIDE_OUT},
        KEYS,
        {**FIRST, "text_encoder_2": WIDE},
        {"text_encoder": ROWS_OUT, "text_encoder_2": WIDE_OUT},
    ),
    ("d", {"text_encoders_0": ROWS, "text_encoders_1": WIDE}, KEYS, {**FIRST, "text_encoder_2": WIDE}, {}),
    ("e", {"clip_l": ROWS, "t5": LONG}, KEYS, {**FIRST, "text_encoder_3": LONG}, {}),
    ("t", {"clip_l": ROWS, "t5xxl": LONG}, KEYS, {**FIRST, "text_encoder_3": LONG}, {}),
    ("tt", {"t5": LONG, "t5xxl": LONG}, KEYS, {"text_encoder_3": LONG}, {}),
    (
        "s",  # ComfyUI's for Stable Diffusion 3.5
        {"clip_g": WIDE, "clip_l": ROWS, "t5xxl": LONG},
        KEYS,
        {**FIRST, "text_encoder_2": WIDE, "text_encoder_3": LONG},
        {},
    ),
    (
        "u",  # OneTrainer's files for FLUX.1 once called CLIP-L clip_g
        {"clip_g": ROWS, "t5": LONG, "clip_g_out": ROWS_OUT, "t5_out": LONG_OUT},
        KEYS,
        {**FIRST, "text_encoder_3": LONG},
        {"text_encoder": ROWS_OUT, "text_encoder_3": LONG_OUT},
    ),
    (
        "v",  # OneTrainer's for Stable Diffusion 3.5
        {
            "clip_l": ROWS,
            "clip_g": WIDE,
            "t5": LONG,
            "clip_l_out": ROWS_OUT,
            "clip_g_out": WIDE_OUT,
            "t5_out": LONG_OUT,
        },
        KEYS,
        {**FIRST, "text_encoder_2": WIDE, "text_encoder_3": LONG},
        {"text_encoder": ROWS_OUT, "text_encoder_2": WIDE_OUT, "text_encoder_3": LONG_OUT},
    ),
    ("w", {"t5xxl": LONG}, KEYS, {"text_encoder_3": LONG}, {}),
    ("x", {"t5": LONG, "t5_out": LONG_OUT}, KEYS, {"text_encoder_3": LONG}, {"text_encoder_3": LONG_OUT}),
    ("f", {"emb_params": ROWS}, "kohya or OneTrainer", FIRST, {}),
    (
        "g",
        {"emp_params": ROWS, "emp_params_out": ROWS_OUT},
        "kohya or OneTrainer",
        FIRST,
        {"text_encoder": ROWS_OUT},
    ),
    ("h", dict(zip(XTI_KEYS, XTI, strict=True)), "kohya XTI", XTI_MEAN, {}),
]
WRITTEN = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}  # ComfyUI's keys


@pytest.mark.parametrize(("name", "tensors", "layout", "rows", "out"), FLAT, ids=[case[0] for case in FLAT])
def test_every_safetensors_layout_is_read_and_converted_without_changing_a_number(
    tmp_path: Path,
    name: str,
    tensors: dict[str, np.ndarray],
    layout: str,
    rows: dict[str, np.ndarray],
    out: dict[str, np.ndarray],
) -> None:
    path, converted = tmp_path / f"{name}.safetensors", tmp_path / "converted.safetensors"
    safetensors.numpy.save_file(tensors, path)
    [word] = read_concepts(path)
    shared = {encoder: vectors[None, None] for encoder, vectors in out.items()}
    layers = {"text_encoder": XTI} if layout == "kohya XTI" else {}
    assert word.layout == layout
    assert_same_arrays(word.concept.vectors, rows)
    assert_same_arrays(word.concept.out, shared)
    assert_same_arrays(word.concept.layer_rows, layers)

    result = CliRunner().invoke(cli_concept.command, ["convert", str(path), str(converted)])

    assert result.exit_code == 0, result.output
    token = "<toy>" if layout == "diffusers, safetensors" else name
    single = rows.keys() == {"text_encoder"}
    written = {token if single else WRITTEN[encoder]: vectors for encoder, vectors in rows.items()}
    written |= {f"{token}.out.{encoder}": vectors for encoder, vectors in shared.items()}
    written |= {f"{token}.rows.{encoder}": vectors for encoder, vectors in layers.items()}
    assert_same_arrays(safetensors.numpy.load_file(converted), written)


def assert_same_arrays(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, shapes and numbers."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].shape == array.shape
        np.testing.assert_array_equal(actual[name], array)


def test_a_word_for_one_encoder_is_converted_from_any_layout_to_that_of_diffusers(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    for name, content, *_ in PICKLED:
        torch.save(content(), tmp_path / name)
    for name, tensors, *_ in FLAT:
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
    words = [word for path in tmp_path.iterdir() for word in read_concepts(path)]
    single = [word.concept for word in words if set(word.concept.vectors) == {"text_encoder"}]
    config = CLIPTextConfig(hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    pipeline = StableDiffusionPipeline(
        None,
        CLIPTextModel(config),
        CLIPTokenizer.from_pretrained(tiny_model_dir / "tokenizer"),
        None,
        None,
        None,
        None,
        requires_safety_checker=False,
    )

    assert len(single) == 13
    for number, concept in enumerate(single):
        token, out = f"<{number}>", tmp_path / f"{number}.safetensors"
        save_concept(concept.rows_only(), out)
        pipeline.load_textual_inversion(out, token=token)
        ids = pipeline.tokenizer.convert_tokens_to_ids([token, f"{token}_1"])
        loaded = pipeline.text_encoder.get_input_embeddings().weight[ids].detach().numpy()
        np.testing.assert_array_equal(loaded, concept.vectors["text_encoder"])


def test_words_in_a_lora_are_read_and_its_other_weights_are_not(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file(
        {
            "lora_unet.weight": np.zeros((2_000, 500), np.float32),
            "bundle_emb.toy.string_to_param": ROWS,
            "bundle_emb.ring.clip_l": ROWS,
            "bundle_emb.ring.clip_g": WIDE,
            "bundle_emb.star.clip_l": -ROWS,
            "bundle_emb.star.t5": LONG,
        },
        path,
    )
    concepts = {word.concept.token: word.concept for word in read_concepts(path)}
    assert set(concepts) == {"toy", "ring", "star"}
    assert_same_arrays(concepts["toy"].vectors, FIRST)
    assert_same_arrays(concepts["ring"].vectors, {**FIRST, "text_encoder_2": WIDE})
    assert_same_arrays(concepts["star"].vectors, {"text_encoder": -ROWS, "text_encoder_3": LONG})


def test_words_in_a_lora_of_a1111_are_read_under_their_names(tmp_path: Path) -> None:
    """modules/networks.py of A1111: the name ends before string_to_param, whose key is any; other keys are ignored."""
    path = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file(
        {
            "lora_unet.weight": np.zeros((20, 50), np.float32),
            "bundle_emb.toy.string_to_param.*": ROWS,
            "bundle_emb.toy.string_to_token.*": np.array([265], np.int64),
            "bundle_emb.star.v2.string_to_param.star": -ROWS,
            "bundle_emb.t5.string_to_param.*": ROWS * 2,  # a word for CLIP whose name is a key of other files
        },
        path,
    )

    words = {word.concept.token: word.concept.vectors for word in read_concepts(path)}

    assert set(words) == {"toy", "star.v2", "t5"}
    for name, rows in (("toy", ROWS), ("star.v2", -ROWS), ("t5", ROWS * 2)):
        assert_same_arrays(words[name], {"text_encoder": rows})


@pytest.mark.parametrize(
    ("key", "token"),
    [
        ("my\ntoy.string_to_param.*", "my_toy"),
        (f"{'a.' * 30}b.string_to_param.*", f"{'a.' * 30}b"),
        (f"toy.string_to_param.{'.string_to_param' * 60}", "toy"),
        (f"toy.string_to_param{'.x' * 400}", "toy"),
        (f"{'string_to_param' * 60}.emb_params", ("string_to_param" * 60)[:62]),
        ("toy.v2.emb_params", "toy.v2"),
    ],
)
def test_a_long_key_of_a_word_in_a_lora_is_split_at_its_dictionary_or_its_last_part(
    tmp_path: Path, key: str, token: str
) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file({"lora_unet.weight": ROWS, f"bundle_emb.{key}": -ROWS}, path)

    [word] = read_concepts(path)

    assert word.concept.token == token
    assert_same_arrays(word.concept.vectors, {"text_encoder": -ROWS})


@pytest.mark.parametrize("part", [".string_to_param", "\n", ".", ".string_to_param\n", "a"])
def test_a_key_of_a_word_in_a_lora_is_limited(tmp_path: Path, part: str) -> None:
    """131 kB; of a key that a pattern matches by trial and error, they took 8.8 seconds."""
    path, key = tmp_path / "lora.safetensors", "bundle_emb.a" + (part * (1 << 17))[: 1 << 17]
    safetensors.numpy.save_file({key: ROWS}, path)
    with pytest.raises(
        ConceptError, match=r"key 'bundle_emb.* has 131084 characters, but a word's key may have at most 1000"
    ) as e:
        read_concepts(path)
    assert len(str(e.value)) < 500


def test_a_word_in_a_lora_with_two_tensors_in_one_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {f"bundle_emb.toy.string_to_param.{key}": ROWS for key in ("a", "b")}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ConceptError, match="'toy' has two tensors in emb_params, but may have only one"):
        read_concepts(path)


def test_words_in_a_lora_that_share_the_same_bytes_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    path, size = tmp_path / "lora.safetensors", 1 << 20
    entry = {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}
    header = json.dumps({f"bundle_emb.toy{i}.clip_l": entry for i in range(9)}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ConceptError, match=r"more than 8388608 bytes \(8 MiB\) in all"):
        read_concepts(path)


def _picture(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


def test_an_a1111_picture_holds_a_word_with_its_name(tmp_path: Path) -> None:
    content = _a1111(string_to_param={"*": {"TORCHTENSOR": ROWS.tolist()}})
    text = base64.b64encode(json.dumps(content).encode()).decode()
    [word] = read_concepts(_picture(tmp_path / "picture.png", text))
    assert (word.layout, word.concept.token) == ("A1111 picture", "stored_name")
    np.testing.assert_array_equal(word.concept.vectors["text_encoder"], ROWS)
    assert word.concept.provenance["sd_checkpoint_name"] == "SD1.5"


def test_a_new_token_replaces_the_name_in_every_layout(tmp_path: Path) -> None:
    for name, content, *_ in PICKLED:
        torch.save(content(), tmp_path / name)
    for name, tensors, *_ in FLAT:
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
    tensors = {"lora_unet.weight": ROWS, "bundle_emb.toy.string_to_param.*": ROWS, "bundle_emb.ring.clip_l": ROWS}
    safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
    _picture(tmp_path / "picture.png", _json(_a1111(string_to_param={"*": {"TORCHTENSOR": ROWS.tolist()}})))
    (tmp_path / "library").mkdir()
    torch.save({"<toy>": TENSOR}, tmp_path / "library" / "learned_embeds.bin")

    for path in tmp_path.iterdir():
        before, after = read_concepts(path), read_concepts(path, "<new>")
        assert [word.concept.token for word in after] == ["<new>"] * len(before), path.name
        assert [word.concept.identity for word in after] == [word.concept.identity for word in before]


def test_a_folder_of_the_concepts_library_holds_one_word(tmp_path: Path) -> None:
    torch.save({"<toy>": TENSOR}, tmp_path / "learned_embeds.bin")
    (tmp_path / "token_identifier.txt").write_text("<toy>")
    [word] = read_concepts(tmp_path)
    assert (word.layout, word.concept.token) == ("sd-concepts-library, diffusers, pickle", "<toy>")


class _Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
    return path


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    import os

    marker = tmp_path / "ran"
    for function, arguments in [
        (os.system, (f"touch {marker}",)),
        (eval, (f"open({str(marker)!r}, 'w')",)),
        (subprocess.Popen, (["touch", str(marker)],)),
        (torch.load, ("x",)),
        (getattr, ("x", "upper")),
    ]:
        torch.save({"<toy>": _Evil(function, *arguments)}, tmp_path / "evil.pt")
        with pytest.raises(ConceptError, match=r"refers to .* which is not data: refused"):
            read_concepts(tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}, 2)[:-2], "damaged"),
        (pickle.dumps(b"x" * 10, 4), "opcode FRAME|opcode SHORT_BINBYTES"),
        (b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".", "damaged|opcode BYTEARRAY8"),
        (b"\x80\x02}r" + (2**31).to_bytes(4, "little") + b".", "memo entry 2147483648"),
        (b"\x80\x02" + b"N0" * 3_000 + b"N.", "opcode POP"),
        (b"\x80\x02" + b")\x85" * 9_000 + b".", r"opcode .* \(number 5001\)"),
        (pickle.dumps([1, 2], 2), "holds a list, an embedding file holds a dictionary"),
        (pickle.dumps({"a": 1}, 2), "has no known layout: its keys are 'a'"),
        (pickle.dumps({"string_to_param": {"*": 1}, "name": "a"}, 2), "holds a int, not vectors"),
    ],
)
def test_a_pickle_that_torch_never_writes_is_refused_with_the_reason(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ConceptError, match=message):
        read_concepts(_archive(tmp_path / "a.pt", data))


DEEP = b")" + b"\x85" * 3_000  # ((((...)))), which cannot be printed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02}" + DEEP + b"Ns.", "has no known layout: its keys are a tuple$"),
        (
            b"\x80\x02}X\x0f\x00\x00\x00string_to_param}" + DEEP + b"Nss.",
            "string_to_param has the keys a tuple, but they must be names",
        ),
        (b"\x80\x02cos\n\x1b[31m\n.", r"refers to 'os\.\\x1b\[31m', which is not data"),
    ],
)
def test_a_pickle_that_cannot_be_printed_is_refused_with_the_reason(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ConceptError, match=message) as caught:
        read_concepts(_archive(tmp_path / "a.pt", data))
    assert str(caught.value).isprintable()


def test_facts_that_are_neither_text_nor_numbers_are_left_out(tmp_path: Path) -> None:
    deep: tuple[Any, ...] = ()
    for _ in range(200):
        deep = (deep,)
    torch.save(_a1111(step=torch.ones(2), sd_checkpoint=deep, sd_checkpoint_name="SD1.5"), tmp_path / "toy.pt")

    [word] = read_concepts(tmp_path / "toy.pt")

    assert dict(word.concept.provenance) == {"sd_checkpoint_name": "SD1.5"}


def test_archives_that_are_bombs_or_invalid_are_refused_with_the_reason(tmp_path: Path) -> None:
    bomb = _archive(tmp_path / "bomb.pt", bytes(100_000_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ConceptError, match="refused as a bomb"):
        read_concepts(bomb)
    torch.save({"<toy>": TENSOR}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConceptError, match="before 2020"):
        read_concepts(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for i in range(201):
            archive.writestr(f"a/data/{i}", b"")
    with pytest.raises(ConceptError, match="archive of 201 files, but at most 200 are allowed"):
        read_concepts(tmp_path / "many.pt")


def test_a_tensor_that_reads_past_its_numbers_is_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    torch.save({"<toy>": tensor}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        names = archive.namelist()
        data = archive.read(names[0])
    [size] = [
        position for op, argument, position in pickletools.genops(data) if op.name == "BININT1" and argument == 4
    ][1:]
    broken = data[: size + 1] + b"\xff" + data[size + 2 :]
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("a/data.pkl", broken)
        archive.writestr("a/data/0", tensor.numpy().tobytes())
    with pytest.raises(ConceptError, match="reads past its 4 numbers"):
        read_concepts(tmp_path / "b.pt")


def test_a_tensor_without_an_axis_is_refused(tmp_path: Path) -> None:
    for key, value in (("<toy>", 1.0), ("clip_g", 3)):
        torch.save({key: torch.tensor(value)}, tmp_path / "toy.pt")
        with pytest.raises(ConceptError, match=r"has shape \[\], a word is \[n, D\]"):
            read_concepts(tmp_path / "toy.pt")


def test_tensors_of_a_pickle_cannot_exceed_a_limit_by_sharing_bytes(tmp_path: Path) -> None:
    torch.save({"<toy>": torch.ones(1).expand(1000, 1000)}, tmp_path / "expanded.pt")
    with pytest.raises(ConceptError, match="reads past its 1 numbers"):
        read_concepts(tmp_path / "expanded.pt")
    shared = torch.ones(200_000)
    torch.save({f"<w{i}>": shared.view(1, -1) for i in range(11)}, tmp_path / "shared.pt")
    with pytest.raises(ConceptError, match="more than 8 MiB in all"):
        read_concepts(tmp_path / "shared.pt")


def _json(content: object) -> str:
    """As A1111 writes it into a picture."""
    return base64.b64encode(json.dumps(content).encode()).decode()


def test_pictures_without_a_word_are_refused_with_the_reason(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "long.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**31, b"tEXt"))
    for path, message in [
        (tmp_path / "plain.png", "holds no embedding"),
        (tmp_path / "text.png", "is not a PNG"),
        (tmp_path / "long.png", "text chunk of 2147483648 bytes"),
        (_picture(tmp_path / "damaged.png", "!!!"), "damaged picture"),
        (_picture(tmp_path / "odd.png", base64.b64encode(b'{"a": {"TORCHTENSOR": {}}}').decode()), "damaged picture"),
        (_picture(tmp_path / "large.png", _json({"a": {"TORCHTENSOR": [[10**400]]}})), "damaged picture"),
        (_picture(tmp_path / "list.png", _json({"string_to_param": {"*": 1}, "name": []})), "name is a list, not text"),
        (
            _picture(
                tmp_path / "unicode.png",
                _json(_a1111(string_to_param={"*": {"TORCHTENSOR": [[1.0]]}}, step="\ud800")),
            ),
            r"'step' = '\\ud800' in its metadata, which is not valid Unicode",
        ),
        (_picture(tmp_path / "empty.png", base64.b64encode(b"{}").decode()), "has no known layout"),
    ]:
        with pytest.raises(ConceptError, match=message):
            read_concepts(path)


def test_other_files_and_empty_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="holds neither learned_embeds"):
        read_concepts(tmp_path)
    with pytest.raises(ConceptError, match=r"give a \.safetensors, \.pt, \.bin or \.png file, or a word's folder"):
        read_concepts(tmp_path / "a.txt")
    for name in ("a.pt", "a.safetensors", "a.png"):
        with pytest.raises(UsageError, match=f"there is no file .*{name}"):
            read_concepts(tmp_path / name)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_file_of_any_layout_is_a_word_or_a_one_line_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        folder.mkdir()
        save_concept(Concept("<toy>", {"text_encoder": ROWS[:, :6]}), folder / "whole.safetensors")
        torch.save({"<toy>": TENSOR[:, :6].clone()}, folder / "whole.bin")
        torch.save({"string_to_param": _parameters(a=TENSOR[:, :6].clone())}, folder / "whole.pt")
        text = base64.b64encode(json.dumps(_a1111(string_to_param={"*": {"TORCHTENSOR": [[1.0]]}})).encode())
        _picture(folder / "whole.png", text.decode())
    intact = folder / data.draw(st.sampled_from(["whole.safetensors", "whole.bin", "whole.pt", "whole.png"]))
    content = bytearray(intact.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    broken = folder / f"broken{intact.suffix}"
    broken.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    message = ""
    try:
        words = read_concepts(broken)
    except OnewordError as error:
        message = str(error)
    else:
        assert all(np.isfinite(rows).all() for word in words for rows in word.concept.vectors.values())
    assert "\n" not in message


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.binary(max_size=64))
def test_any_bytes_as_a_header_are_a_one_line_error(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(ConceptError) as caught:
        load_concept(path)
    assert "\n" not in str(caught.value)


def test_the_layouts_are_read_if_torch_cannot_be_imported(tmp_path: Path) -> None:
    torch.save(_a1111(), tmp_path / "toy.pt")
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from oneword.runtime.layouts import read_concepts\n"
        f"print(read_concepts(Path({str(tmp_path / 'toy.pt')!r}))[0].concept.token)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "toy\n"
