"""The words of a tenant over HTTP: files of every tool's layout, renaming, replacing and removing.

Not covered: learning (test_jobs_api), quotas and other tenants (test_security), each wrong field (test_bad_input).
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL.PngImagePlugin import PngInfo

from oneword.runtime import Model, cli_concept, draw
from oneword.runtime.concept import XTI_KEYS, Concept, Vectors
from tests.serve.conftest import Start
from tests.serve.running import WIDTH, Running, word_bytes
from tests.serve.test_openai import picture_of

ROWS, WIDE = (
    np.random.default_rng(n).normal(0, 0.1, (2, width)).astype(np.float32) for n, width in enumerate((32, 64))
)
OUT = np.random.default_rng(2).normal(0, 1, (2, WIDTH)).astype(np.float32)
TENSOR = torch.from_numpy(ROWS)
COARSE = {kind: TENSOR.to(kind).float().numpy() for kind in (torch.float16, torch.bfloat16)}


def word_file(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save(dict(tensors), metadata)


FILES: list[tuple[str, bytes, str, Vectors]] = [
    # Name of the file, its content, the word's name and rows.
    ("learned_embeds.safetensors", word_file({"<diffusers>": TENSOR}), "<diffusers>", ROWS),
    ("one-vector.safetensors", word_file({"<one-vector>": TENSOR[0]}), "<one-vector>", ROWS[:1]),
    ("half.safetensors", word_file({"<half>": TENSOR.half()}), "<half>", COARSE[torch.float16]),
    ("brain.safetensors", word_file({"<brain>": TENSOR.bfloat16()}), "<brain>", COARSE[torch.bfloat16]),
    ("a1111.safetensors", word_file({"a1111": TENSOR}, {"format": "pt"}), "a1111", ROWS),
    ("my comfy toy.safetensors", word_file({"clip_l": TENSOR}), "my_comfy_toy", ROWS),
    ("kohya.safetensors", word_file({"emb_params": TENSOR}, {"ss_epoch": "3"}), "kohya", ROWS),
    ("onetrainer.safetensors", word_file({"emp_params": TENSOR}), "onetrainer", ROWS),
]
PROMPT = {"seed": 5, "steps": 3, "size": "64x64"}


@pytest.fixture(scope="module")
def library(start_server: Start) -> Running:
    """A server whose words are those of these tests only."""
    return start_server()


def test_the_type_of_a_form_may_be_in_any_case(library: Running) -> None:
    """RFC 9110, 8.3.1: types and subtypes are case-insensitive."""
    with library.client() as http:
        upload = http.build_request("POST", "/v1/words", files={"file": ("cased.safetensors", word_bytes("<cased>"))})
        upload.headers["Content-Type"] = upload.headers["Content-Type"].replace("multipart/form", "Multipart/Form")
        assert http.send(upload).status_code == 201
        http.delete("/v1/words/<cased>").raise_for_status()


@pytest.fixture
def http(library: Running) -> Iterator[httpx.Client]:
    with library.client() as client:
        yield client


def generated(http: httpx.Client, prompt: str) -> np.ndarray[Any, Any]:
    answer = http.post("/v1/images/generations", json={"prompt": prompt, **PROMPT})
    assert answer.status_code == 200, answer.text
    return picture_of(answer.json()["data"][0])


def upload(http: httpx.Client, file: str, content: bytes, **fields: str) -> httpx.Response:
    return http.post("/v1/words", files={"file": (file, content)}, data=fields)


def written(token: str) -> str:
    """A word in a prompt of OpenAI's API, where a bare name is ordinary text."""
    return token if token.startswith("<") else f"embedding:{token}"


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize(("name", "content", "token", "rows"), FILES, ids=[case[0] for case in FILES])
def test_a_file_of_every_tool_becomes_a_word_with_its_numbers_that_the_next_prompt_uses(
    http: httpx.Client, model: Model, name: str, content: bytes, token: str, rows: Vectors
) -> None:
    posted = upload(http, name, content)
    put = http.put("/v1/words/<put>", content=content)
    downloads = [http.get(f"/v1/words/{word}/file").content for word in (token, "<put>")]

    assert (posted.status_code, put.status_code) in [(201, 201), (201, 200)]
    assert [answer.json()["vectors"] for answer in (posted, put)] == [{"text_encoder": len(rows)}] * 2
    assert (posted.json()["name"], put.json()["name"]) == (token, "<put>")
    for word, data in zip((token, "<put>"), downloads, strict=True):
        [(key, value)] = safetensors.numpy.load(data).items()
        assert key == word
        np.testing.assert_array_equal(value, rows)
    concept = Concept(token, {"text_encoder": rows})
    alone = draw(model, f"a red {written(token)}", words={token: concept}, seed=5, steps=3)
    served = [generated(http, f"a red {written(word)}") for word in (token, "<put>")]
    for picture in served:  # a pixel may be rounded to the next value
        assert np.abs(picture.astype(int) - alone[0].image).max() <= 1
    assert np.abs(served[0].astype(int) - generated(http, "a red")).max() > 1


def test_output_vectors_of_onetrainer_come_back_and_change_the_picture(http: httpx.Client) -> None:
    tensors = {"emp_params": TENSOR, "emp_params_out": torch.from_numpy(OUT)}
    upload(http, "precise.safetensors", word_file(tensors)).raise_for_status()
    upload(http, "ordinary.safetensors", word_file({"emp_params": TENSOR})).raise_for_status()

    downloaded = safetensors.numpy.load(http.get("/v1/words/precise/file").content)

    assert downloaded.keys() == {"precise", "precise.out.text_encoder"}
    np.testing.assert_array_equal(downloaded["precise"], ROWS)
    np.testing.assert_array_equal(downloaded["precise.out.text_encoder"], OUT[None, None])
    precise, ordinary = (generated(http, f"a red {written(word)}") for word in ("precise", "ordinary"))
    assert np.abs(precise.astype(int) - ordinary).max() > 1


def test_diffusers_reads_a_downloaded_word(http: httpx.Client, tiny_model_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    upload(http, "comfy.safetensors", word_file({"clip_l": TENSOR}), name="<downloaded>").raise_for_status()
    answer = http.get("/v1/words/<downloaded>/file")
    (tmp_path / "file.safetensors").write_bytes(answer.content)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_dir)
    pipeline.load_textual_inversion(tmp_path / "file.safetensors")

    ids = pipeline.tokenizer.convert_tokens_to_ids(["<downloaded>", "<downloaded>_1"])
    loaded = pipeline.text_encoder.get_input_embeddings().weight[ids].detach().numpy()
    np.testing.assert_array_equal(loaded, ROWS)
    assert answer.headers["content-disposition"] == 'attachment; filename="downloaded.safetensors"'


def pickled(*, legacy: bool = False, **content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def embedding_picture() -> bytes:
    """A1111's picture of a word."""
    content = {"string_to_param": {"*": {"TORCHTENSOR": ROWS.tolist()}}, "string_to_token": {"*": 265}, "name": "drawn"}
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()).decode())
    stream = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": TENSOR}, "name": "stored", "step": 99}
REFUSED = {
    "stored.pt": pickled(**A1111),
    "legacy.pt": pickled(legacy=True, **A1111),
    "learned_embeds.bin": pickled(**{"<pickled>": TENSOR}),
    "kohya-toy.pt": pickled(emb_params=TENSOR),
    "drawn.png": embedding_picture(),
    "lora.safetensors": word_file(
        {f"bundle_emb.{name}.string_to_param": rows for name, rows in (("lora-toy", TENSOR), ("lora-ring", -TENSOR))}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_another_kind_is_refused_with_the_command_that_converts_it(http: httpx.Client, name: str) -> None:
    before = http.get("/v1/words").json()

    answers = [
        upload(http, name, REFUSED[name]),
        upload(http, name, REFUSED[name], name="<given>"),
        http.put("/v1/words/<given>", content=REFUSED[name]),
    ]

    for answer in answers:
        assert answer.status_code == 422, answer.text
        assert "ti-concept convert" in message_of(answer)
        assert "\n" not in message_of(answer)
    assert http.get("/v1/words").json() == before


CONVERTED = {  # The rows that each file has, by word.
    "stored.pt": {"stored": ROWS},
    "learned_embeds.bin": {"<pickled>": ROWS},
    "kohya-toy.pt": {"kohya-toy": ROWS},
    "drawn.png": {"drawn": ROWS},
    "lora.safetensors": {"lora-toy": ROWS, "lora-ring": -ROWS},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_the_command_converts_is_accepted(http: httpx.Client, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(REFUSED[name])

    result = CliRunner().invoke(cli_concept.command, ["convert", str(tmp_path / name), str(tmp_path / "converted")])

    assert result.exit_code == 0, result.output
    found = {}
    for path in (tmp_path / "converted").iterdir():
        answer = upload(http, path.name, path.read_bytes())
        assert answer.status_code == 201, answer.text
        word = answer.json()["name"]
        [found[word]] = safetensors.numpy.load(http.get(f"/v1/words/{word}/file").content).values()
        assert http.delete(f"/v1/words/{word}").status_code == 204
    assert found.keys() == CONVERTED[name].keys()
    for word, rows in CONVERTED[name].items():
        np.testing.assert_array_equal(found[word], rows)


WRONG: list[tuple[str, dict[str, torch.Tensor], str]] = [
    ("another width", {"<wide>": torch.from_numpy(WIDE)}, "width 64, text_encoder takes width 32"),
    ("SDXL", {"clip_l": TENSOR, "clip_g": torch.from_numpy(WIDE)}, "text_encoder_2, this model's encoders are"),
    ("layers", dict.fromkeys(XTI_KEYS, TENSOR), "rows for 16 cross-attention layers, this model has"),
    ("NaN", {"<nan>": TENSOR * float("nan")}, "NaN or infinity: its training failed, train it again"),
    (
        "whole numbers",
        {"<int>": torch.ones(2, WIDTH, dtype=torch.int32)},
        "'I32', but must be one of F16, F32, F64, BF16",
    ),
    ("76 vectors", {"<long>": torch.ones(76, WIDTH)}, "76 vectors, but must have 1 to 75"),
    ("a path", {"../../evil": TENSOR}, "looks like a path"),
]


@pytest.mark.parametrize(("tensors", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_word_that_the_model_cannot_use_is_refused_with_the_reason(
    http: httpx.Client, tensors: dict[str, torch.Tensor], message: str
) -> None:
    tensors = {key: value.clone() for key, value in tensors.items()}  # the format refuses tensors of the same memory
    answers = [
        upload(http, "wrong.safetensors", word_file(tensors)),
        http.put("/v1/words/x", content=word_file(tensors)),
    ]

    for answer in answers:
        assert answer.status_code == 422, answer.text
        assert message in message_of(answer)
    assert http.get("/v1/words/x").status_code == 404


def test_words_are_listed_by_name_a_page_at_a_time(start_server: Start) -> None:
    running = start_server()
    names = ["<a>", "<b>", "c", "d", "<e>"]
    with running.client() as http:
        assert http.get("/v1/words").json() == {"object": "list", "data": [], "has_more": False}
        for seed, name in enumerate(reversed(names)):
            http.put(f"/v1/words/{name}", content=word_bytes(seed=seed)).raise_for_status()

        pages, after = [], ""
        while not pages or pages[-1]["has_more"]:
            pages.append(http.get("/v1/words", params={"after": after, "limit": 2}).json())
            after = pages[-1]["data"][-1]["name"]

        listed = [word for page in pages for word in page["data"]]
        assert [len(page["data"]) for page in pages] == [2, 2, 1]
        assert [word["name"] for word in listed] == sorted(names)
        assert listed == [http.get(f"/v1/words/{name}").json() for name in sorted(names)]
        assert http.get("/v1/words").json()["data"] == listed


def test_a_damaged_word_does_not_end_the_list(start_server: Start, tmp_path: Path) -> None:
    running = start_server(words=str(tmp_path))
    names = ["a", "b", "c", "d"]
    with running.client() as http:
        for name in names:
            http.put(f"/v1/words/{name}", content=word_bytes(name)).raise_for_status()
        [record] = tmp_path.glob("names/*/b.json")
        record.write_bytes(b"{")

        first = http.get("/v1/words", params={"limit": 2}).json()
        second = http.get("/v1/words", params={"after": "c", "limit": 2}).json()

    assert ([word["name"] for word in first["data"]], first["has_more"]) == (["a", "c"], True)
    assert ([word["name"] for word in second["data"]], second["has_more"]) == (["d"], False)


def test_a_second_file_is_refused_by_its_number(http: httpx.Client) -> None:
    files = [("file", (f"{name}.safetensors", word_bytes(f"<{name}>"))) for name in ("first", "second")]

    answer = http.post("/v1/words", files=files)

    assert (answer.status_code, message_of(answer)) == (400, "too many files were sent: send at most 1")


def metadata_of(file: bytes) -> dict[str, str]:
    """The metadata in a safetensors file's header, whose length is in the first eight bytes."""
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return dict(header["__metadata__"])


def test_a_word_is_described_by_what_its_file_says(http: httpx.Client) -> None:
    metadata = {"format": "pt", "init": "toy", "steps": "500"}

    answer = upload(http, "facts.safetensors", word_file({"<facts>": TENSOR}, metadata))

    word = answer.json()
    assert http.get("/v1/words/<facts>").json() == word
    assert (word["object"], word["name"], word["generation"]) == ("word", "<facts>", 1)
    assert word["provenance"] == {"init": "toy", "steps": "500"}
    file = http.get("/v1/words/<facts>/file").content
    assert ROWS.nbytes < word["bytes"] <= len(file)
    assert metadata_of(file) == {**metadata, "token": "<facts>"}


def test_a_downloaded_word_uploaded_again_is_the_same_word(http: httpx.Client) -> None:
    first = upload(http, "again.safetensors", word_file({"<again>": TENSOR}, {"init": "toy"})).json()
    file = http.get("/v1/words/<again>/file").content
    assert http.delete("/v1/words/<again>").status_code == 204

    second = upload(http, "any.safetensors", file).json()

    downloaded = http.get("/v1/words/<again>/file").content
    assert metadata_of(downloaded) == metadata_of(file)
    [value], [expected] = (safetensors.numpy.load(data).values() for data in (downloaded, file))
    np.testing.assert_array_equal(value, expected)
    assert {**second, "created": 0} == {**first, "created": 0}


def test_a_renamed_word_has_its_numbers_under_the_new_name_only(http: httpx.Client) -> None:
    http.put("/v1/words/<old>", content=word_bytes(seed=1)).raise_for_status()
    before = http.get("/v1/words/<old>").json()
    picture = generated(http, "a red <old>")

    renamed = http.patch("/v1/words/<old>", json={"name": "<new>"})

    assert renamed.status_code == 200
    assert renamed.json()["name"] == "<new>"
    assert renamed.json()["identity"] == before["identity"]
    for address in ("/v1/words/<old>", "/v1/words/<old>/file"):
        assert http.get(address).status_code == 404
    np.testing.assert_array_equal(generated(http, "a red <new>"), picture)
    refused = http.post("/v1/images/generations", json={"prompt": "a red <old>"})
    assert (refused.status_code, "there is no word '<old>'" in message_of(refused)) == (400, True)
    assert http.patch("/v1/words/<old>", json={"name": "<newer>"}).status_code == 404


def test_a_word_is_not_renamed_to_a_taken_or_a_malformed_name(http: httpx.Client) -> None:
    for seed, name in enumerate(("<mine>", "<taken>")):
        http.put(f"/v1/words/{name}", content=word_bytes(seed=seed)).raise_for_status()
    before = [http.get(f"/v1/words/{name}").json() for name in ("<mine>", "<taken>")]

    taken = http.patch("/v1/words/<mine>", json={"name": "<taken>"})
    malformed = http.patch("/v1/words/<mine>", json={"name": "<two words>"})

    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "word_exists")
    assert message_of(taken) == "there is a word '<taken>' already: replace it, or take another name"
    assert (malformed.status_code, malformed.json()["error"]["param"]) == (400, "name")
    assert "'<two words>'" in message_of(malformed)
    assert [http.get(f"/v1/words/{name}").json() for name in ("<mine>", "<taken>")] == before


def test_a_taken_name_is_replaced_only_if_the_request_says_so(http: httpx.Client) -> None:
    files = [word_file({"<replaced>": rows}) for rows in (TENSOR, -TENSOR, 2 * TENSOR)]
    first = upload(http, "a.safetensors", files[0])
    identity = first.json()["identity"]

    refused = upload(http, "a.safetensors", files[1])

    assert (first.status_code, refused.status_code, refused.json()["error"]["code"]) == (201, 409, "word_exists")
    assert http.get("/v1/words/<replaced>").json()["identity"] == identity
    replaced = http.post("/v1/words", params={"replace": True}, files={"file": ("a.safetensors", files[1])})
    put = http.put("/v1/words/<replaced>", files={"file": ("a.safetensors", files[2])})
    assert [answer.status_code for answer in (replaced, put)] == [200, 200]
    assert [answer.json()["generation"] for answer in (first, replaced, put)] == [1, 2, 3]
    [value] = safetensors.numpy.load(http.get("/v1/words/<replaced>/file").content).values()
    np.testing.assert_array_equal(value, 2 * ROWS)


def test_a_deleted_word_is_gone_from_every_address_and_prompt(http: httpx.Client) -> None:
    http.put("/v1/words/<gone>", content=word_bytes()).raise_for_status()
    generated(http, "a <gone>")

    deleted = http.delete("/v1/words/<gone>")

    assert (deleted.status_code, deleted.content) == (204, b"")
    again = [
        http.delete("/v1/words/<gone>"),
        http.get("/v1/words/<gone>"),
        http.get("/v1/words/<gone>/file"),
        http.patch("/v1/words/<gone>", json={"name": "<back>"}),
    ]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in again] == [(404, "word_not_found")] * 4
    assert "<gone>" not in [word["name"] for word in http.get("/v1/words").json()["data"]]
    assert http.post("/v1/images/generations", json={"prompt": "a <gone>"}).status_code == 400
    assert http.put("/v1/words/<gone>", content=word_bytes(seed=2)).json()["generation"] == 1
