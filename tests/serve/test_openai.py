"""OpenAI's images API, as its own clients use it and as the wire has it."""

import asyncio
import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import PIL.Image
import pytest

from oneword.runtime import Model, draw, generate
from oneword.runtime.bundle import Manifest
from oneword.runtime.events import StepDone
from oneword.runtime.prompt import Tokenizer
from oneword.runtime.request import Request, ResolvedSettings, resolve
from oneword.serve import openai
from oneword.serve.errors import Busy, Unavailable
from oneword.serve.generate import fitted, reduced
from oneword.serve.keys import Tenant, new_key
from oneword.serve.pictures import encode
from oneword.serve.pool import Generation
from tests.serve.conftest import Start
from tests.serve.running import Running, run_client, undecodable_png, word_bytes


def picture_of(item: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def png(side: int = 64, colour: str = "red") -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


@pytest.fixture
def attempts(tenants: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the requests for a retried cat came, in seconds. The first is refused, with Retry-After: 1."""
    pool, times = tenants[0].state.pool, list[float]()
    prepared = pool.prepared

    def busy_at_first(tenant: Tenant, request: Request, *arguments: Any, **settings: Any) -> Generation:
        if request.prompt == "a retried cat":
            times.append(time.monotonic())
            if len(times) == 1:
                raise Busy("there is no room: try again later", 1)
        return prepared(tenant, request, *arguments, **settings)

    monkeypatch.setattr(pool, "prepared", busy_at_first)
    return times


def check_retried(attempts: list[float]) -> None:
    """Two requests came, the second when the first one's answer said; by itself a client waits for half a second."""
    first, second = attempts
    assert second - first >= 1


def test_the_python_client_generates_streams_edits_varies_and_retries(
    tenants: tuple[Running, Running], attempts: list[float]
) -> None:
    found = run_client("openai_client.py", tenants[0].url, tenants[0].key)

    assert found["models"] == [tenants[0].state.name]
    assert found["generate"] == [[64, 64]] * 2
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]
    assert httpx.get(found["url"]).headers["content-type"] == "image/png"
    assert [kind for kind, _ in found["stream"]] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert all(size == [64, 64] for _, size in found["stream"])
    assert found["edit with mask"] == [[64, 64]]
    outside = np.ones((64, 64), bool)
    outside[16:48, 16:48] = False  # the mask's transparent pixels
    edited, uploaded = (picture_of({"b64_json": found[name]}) for name in ("edited", "uploaded"))
    assert np.array_equal(edited[outside], uploaded[outside])
    assert not np.array_equal(edited, uploaded)
    assert found["edit of two"] == [[64, 64]] * 2
    assert found["edit with an interval"] == [[64, 64]]
    assert found["edit stream"] == ["image_edit.partial_image", "image_edit.completed"]
    assert found["variations"] == [[64, 64]] * 2
    assert found["async"] == [[64, 64]] * 3
    assert found["async stream"] == [[f"image_generation.{kind}", [64, 64]] for kind in ("partial_image", "completed")]
    assert found["retried"] == [[64, 64]]
    check_retried(attempts)
    errors = found["errors"]
    assert errors["word"][:2] == ["BadRequestError", 400]
    assert "<nobody>" in errors["word"][2]
    assert errors["field"][:2] == ["BadRequestError", 400]
    assert "guidance_scale" in errors["field"][2]
    assert errors["size"][:2] == ["BadRequestError", 400]
    assert errors["model"][:2] == ["NotFoundError", 404]
    assert errors["key"][:2] == ["AuthenticationError", 401]


def test_the_node_client_generates_streams_edits_and_retries(
    tenants: tuple[Running, Running], attempts: list[float]
) -> None:
    found = run_client("openai_client.mjs", tenants[0].url, tenants[0].key)

    assert found["generate"] == [[64, 64]] * 2
    assert found["stream"] == ["image_generation.partial_image", "image_generation.completed"]
    assert found["edit"] == [[64, 64]]
    assert found["editOfTwo"] == [[64, 64]] * 2
    assert found["retried"] == [[64, 64]]
    check_retried(attempts)
    assert found["error"][:2] == ["BadRequestError", 400]


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("a red ring", {"steps": 5, "sampler": "euler-a", "guidance_scale": 3.0}),
        ("a [red ring:blue dog:0.5]", {"steps": 4, "sampler": "heun", "spacing": "karras", "guidance": "zero-star"}),
    ],
)
def test_a_served_picture_is_the_one_that_draw_makes(
    server: Running, http: httpx.Client, prompt: str, settings: dict[str, Any]
) -> None:
    settings = {"seed": 7, **settings}

    answer = http.post("/v1/images/generations", json={"prompt": prompt, "n": 2, **settings}).json()

    model = Model.open(server.state.settings.bundle, "onnxruntime", threads=1)
    alone = draw(model, prompt, num_images=2, **settings)
    assert [item["seed"] for item in answer["data"]] == [7, 8]
    for item, expected in zip(answer["data"], alone, strict=True):
        difference = picture_of(item).astype(int) - expected.image
        assert np.abs(difference).max() <= 1


def test_a_word_is_used_in_the_request_after_it_was_put(http: httpx.Client) -> None:
    body = {"prompt": "a photo of a <fresh>", "seed": 1, "steps": 3}
    refused = http.post("/v1/images/generations", json=body)
    first = http.put("/v1/words/%3Cfresh%3E", content=word_bytes("<other>", 1))
    before = http.post("/v1/images/generations", json=body).json()
    second = http.put("/v1/words/%3Cfresh%3E", content=word_bytes("<other>", 2))
    after = http.post("/v1/images/generations", json=body).json()

    assert refused.status_code == 400
    assert [first.status_code, second.status_code] == [201, 200]
    assert not np.array_equal(picture_of(before["data"][0]), picture_of(after["data"][0]))


def test_a_prompt_that_changes_gets_the_words_of_its_steps_and_needs_no_others(http: httpx.Client) -> None:
    for name in ("a-c", "b-d"):
        http.put(f"/v1/words/%3C{name}%3E", content=word_bytes(f"<{name}>")).raise_for_status()
    body = {"prompt": "<[a|b]-[c|d]>", "negative_prompt": "[ring:<b-d>:0.5]", "steps": 4, "size": "64x64"}

    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text

    body["prompt"] = "<[a|b]-[c|d|e]>"  # its third step is <a-e>
    refused = http.post("/v1/images/generations", json=body)
    assert refused.status_code == 400
    assert "there is no word '<a-e>'" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("[a|b|c]" + "x" * 7_000, "the prompt's texts have 21003 characters"),
        ("{<a>|<b>:[0.3:0.7:0.5]}", "is not a slider: write {<word>|<word>:0.3}"),
    ],
)
def test_a_prompt_that_changes_too_much_is_one_line_of_error(http: httpx.Client, prompt: str, message: str) -> None:
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        answer = http.post(path, json={"prompt": prompt, "steps": 4})
        assert answer.status_code in (400, 422)
        assert message in answer.text


def test_others_are_answered_while_a_long_prompt_is_tokenized(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, entered, released = Tokenizer.ids, threading.Event(), threading.Event()

    def slow(tokenizer: Tokenizer, text: str) -> list[int]:
        if len(text) > 10_000:
            entered.set()
            assert released.wait(60)
        return ids(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "ids", slow)
    body = {"prompt": "y " * 9_999, "steps": 1}
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(http.post, "/v1/images/generations", json=body)
        assert entered.wait(60)
        assert http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}).status_code == 200
        assert not long.done()
        released.set()
        answer = long.result(60)

    assert answer.status_code == 200
    assert answer.json()["usage"]["input_tokens_details"]["text_tokens"] == 9_999
    refused = http.post("/v1/images/generations", json={"prompt": "y" * 20_001})
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400,
        "the prompt has 20001 characters, but may have at most 20000: use fewer",
    )


def test_the_stream_of_two_pictures_has_a_completed_event_for_each(http: httpx.Client) -> None:
    body = {"prompt": "a cat", "n": 2, "stream": True, "steps": 4, "previews": 2, "seed": 5}
    events = events_of(http.post("/v1/images/generations", json=body))

    completed = [data for name, data in events if name == "image_generation.completed"]
    previews = [data for name, data in events if name == "image_generation.preview"]
    assert sorted(data["seed"] for data in completed) == [5, 6]
    assert sorted((data["index"], data["step"]) for data in previews) == [(0, 2), (1, 2)]
    assert all(base64.b64decode(data["b64_json"])[:3] == b"\xff\xd8\xff" for data in previews)


def test_a_preview_of_a_small_decoder_is_a_small_jpeg_of_its_picture(
    start_server: Start, tiny_preview_bundle: Path
) -> None:
    server = start_server(bundle=tiny_preview_bundle)
    body = {"prompt": "a cat", "stream": True, "steps": 4, "previews": 2, "seed": 5, "size": "512x256"}
    with server.client() as http:
        events = events_of(http.post("/v1/images/generations", json=body))
    model = Model.open(tiny_preview_bundle, "onnxruntime", threads=1)
    request = Request("a cat", seed=5, steps=4, previews=2, size=(512, 256))
    [latents] = [e.denoised for e in generate(model, [request]) if isinstance(e, StepDone) and e.denoised is not None]
    decoded = model.preview(latents)

    [preview] = [data for name, data in events if name == "image_generation.preview"]
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(preview["b64_json"])))
    assert decoded is not None
    small, stream = PIL.Image.fromarray(decoded).resize((256, 128), PIL.Image.Resampling.BICUBIC), io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    expected = PIL.Image.open(stream)
    assert (preview["step"], preview["steps"], picture.format, picture.size) == (2, 4, "JPEG", (256, 128))
    assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).mean() < 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_that_somebody_cancels_is_a_conflict_and_not_tried_again(
    server: Running, http: httpx.Client, stream: bool
) -> None:
    body = {"prompt": "a cat", "steps": 900, "n": 3, "stream": stream}

    def drawn() -> httpx.Response:
        with server.client() as mine:
            return mine.post("/v1/images/generations", json=body)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(drawn)
        while not (entries := http.get("/v1/queue").json()["data"]):
            assert not answer.done()
        assert http.delete(f"/v1/queue/{entries[0]['id']}").status_code == 204

    response = answer.result()
    if stream:
        name, data = events_of(response)[-1]
        assert (response.status_code, name, data["error"]["code"]) == (200, "error", "cancelled")
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (409, "cancelled")
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": "a cat", "n": 0}, 400, "n"),
        ({"prompt": "a cat", "n": 11}, 400, "n"),
        ({"prompt": "a cat", "size": "big"}, 400, "size"),
        ({"prompt": "a cat", "size": "4096x4096"}, 400, "size"),
        ({"prompt": "a cat", "steps": 1001}, 400, "steps"),
        ({"prompt": "a cat", "steps": 3, "num_inference_steps": 4}, 400, "steps"),
        ({"prompt": "a cat", "sampler": "plms"}, 400, "sampler"),
        ({"prompt": "a cat", "spacing": "even"}, 400, "spacing"),
        ({"prompt": "a cat", "spacing": "beta", "sampler": "lcm"}, 400, None),
        ({"prompt": "a cat", "guidance": "cfg+"}, 400, "guidance"),
        ({"prompt": "a cat", "guidance": "cfg++", "sampler": "unipc"}, 400, None),
        ({"prompt": "a {<a>|<b>}"}, 400, None),
        ({"prompt": "[a|b|c|d|e|f|g] [h|i|j|k|l]", "steps": 50}, 400, None),
        ({"prompt": "a cat", "stepz": 4}, 400, "stepz"),
        ({"prompt": "a cat", "background": "transparent"}, 400, "background"),
        ({"prompt": "a cat", "partial_images": 2}, 400, "partial_images"),
        ({"prompt": "a cat", "stream": True, "response_format": "url"}, 400, "response_format"),
        ({"prompt": "a cat", "model": "sdxl"}, 404, "model"),
        ({"prompt": "(a cat:1000)"}, 400, None),
        ({"prompt": "a cat", "eta": 0.5, "sampler": "euler"}, 400, None),
        ({"prompt": "a cat", "guidance_interval": [3, 1]}, 400, None),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(
    http: httpx.Client, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = http.post("/v1/images/generations", json=body)
    error = response.json()["error"]

    assert response.status_code == status
    assert error["param"] == param or param is None
    assert len(error["message"].splitlines()) == 1


def test_a_file_in_an_unknown_field_and_a_text_instead_of_a_file_are_refused(http: httpx.Client) -> None:
    unknown = http.post("/v1/images/edits", data={"prompt": "a cat"}, files={"picture": png()})
    text = http.post(
        "/v1/images/edits", data={"prompt": "a cat", "image": "http://127.0.0.1/x.png"}, files={"mask": png()}
    )
    none = http.post("/v1/images/edits", data={"prompt": "a cat"}, files={"mask": png()})

    assert [response.status_code for response in (unknown, text, none)] == [400, 400, 400]
    assert [response.json()["error"]["param"] for response in (unknown, text, none)] == ["picture", "image", "image"]


def test_an_interval_in_a_form_is_a_text_or_one_field_for_each_number(http: httpx.Client) -> None:
    def edit(**fields: Any) -> httpx.Response:
        data = {"prompt": "a cat", "steps": "4", "seed": "3", **fields}
        return http.post("/v1/images/edits", data=data, files={"image": png()})

    whole, text, listed = edit(), edit(guidance_interval="0.2,0.8"), edit(**{"guidance_interval[]": ["0.2", "0.8"]})
    short, double = (
        edit(**{"guidance_interval[]": ["0.2"]}, **more) for more in ({}, {"guidance_interval": "0.2,0.8"})
    )

    assert listed.json()["data"] == text.json()["data"] != whole.json()["data"]
    for refused in (short, double, edit(steps=["4", "5"])):
        assert refused.status_code == 400
    assert [refused.json()["error"]["param"] for refused in (short, double)] == ["guidance_interval"] * 2


def test_a_prompt_whose_tokens_cannot_be_counted_leaves_nothing_in_the_queue(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompt: str) -> int:
        raise Unavailable("a test")

    monkeypatch.setattr(server.state, "tokens", fail)
    with server.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 900, "n": 10})
        left = http.get("/v1/queue").json()["data"]
        for entry in left:
            http.delete(f"/v1/queue/{entry['id']}")

    assert (answer.status_code, left) == (503, [])


@pytest.mark.parametrize("path", ["generations", "edits"])
def test_each_request_is_made_and_resolved_once(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    made: list[object] = []
    init = Generation.__init__

    def counted(generation: Generation, *arguments: Any) -> None:
        made.append(generation)
        init(generation, *arguments)

    resolved: list[Request] = []

    def resolve_counted(request: Request, manifest: Manifest) -> ResolvedSettings:
        resolved.append(request)
        return resolve(request, manifest)

    monkeypatch.setattr(Generation, "__init__", counted)
    monkeypatch.setattr("oneword.serve.pool.resolve", resolve_counted)
    body = {"prompt": "a cat", "steps": "2"}
    if path == "edits":
        answer = http.post("/v1/images/edits", data=body, files={"image": png()})
    else:
        answer = http.post("/v1/images/generations", json={**body, "steps": 2})

    assert answer.status_code == 200
    assert (len(made), len(resolved)) == (1, 1)


def test_uploads_are_decoded_only_if_there_is_room_for_all_of_them(start_server: Start) -> None:
    running = start_server()
    upload = undecodable_png()
    with running.client() as client:

        def edit(count: int, **fields: Any) -> httpx.Response:
            files = [("image[]", (f"{i}.png", upload)) for i in range(count)]
            return client.post("/v1/images/edits", data={"prompt": "a cat", **fields}, files=files)

        damaged = edit(1)
        too_many = edit(11)
        large = edit(1, size="4096x4096")
        running.state.pool.max_wait = 1e-9
        client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 2})
        work = edit(1)
        running.state.pool.draining = True
        draining = client.post("/v1/images/variations", files={"image": upload})

    assert (damaged.status_code, damaged.json()["error"]["param"]) == (422, "image")
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
    assert (large.status_code, large.json()["error"]["param"]) == (400, "size")
    assert (work.status_code, work.json()["error"]["code"]) == (400, "too_much_work")
    assert draining.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_masked_edit_keeps_the_pixels_outside_the_mask(http: httpx.Client, stream: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[16:48, 16:48] = 0
    picture, mask = io.BytesIO(), io.BytesIO()
    PIL.Image.fromarray(image).save(picture, "PNG")
    PIL.Image.fromarray(np.dstack([image, alpha])).save(mask, "PNG")
    fields = {"prompt": "a cat", "steps": "4", **({"stream": "true", "partial_images": "1"} if stream else {})}

    answer = http.post("/v1/images/edits", data=fields, files={"image": picture.getvalue(), "mask": mask.getvalue()})

    if stream:
        encoded = [data["b64_json"] for _, data in events_of(answer)]
    else:
        encoded = [answer.json()["data"][0]["b64_json"]]
    assert len(encoded) == 1 + stream
    for text in encoded:
        pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text))))
        assert np.array_equal(pixels[alpha == 255], image[alpha == 255])
        assert not np.array_equal(pixels, image)


def test_an_upload_waits_no_larger_than_it_is_used(server: Running) -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 128, 3), np.uint8)
    mask = np.zeros((256, 128), np.uint8)
    mask[100:200] = 255
    request = Request("a cat", image=image, mask=mask, size=(64, 64))
    settings = resolve(request, server.state.manifest)

    small = fitted(request, settings)

    assert small.image is not None
    assert small.mask is not None
    assert (small.image.shape, small.mask.shape, small.size) == ((64, 64, 3), (64, 64), (64, 64))
    assert np.array_equal(small.mask[:, 0], mask[::4, 0] == 255)
    again = resolve(small, server.state.manifest)
    assert (again.width, again.height, again.steps) == (settings.width, settings.height, settings.steps)


def test_uploads_that_are_read_hold_up_no_answer(server: Running) -> None:
    state = replace(server.state, _threads={})
    gate = threading.Event()

    def read() -> None:
        assert gate.wait(60)

    def written() -> str:
        return "answer"

    async def scenario() -> None:
        reads = [asyncio.create_task(state.in_thread(read)) for _ in range(8)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(state.in_thread(written), 30) == "answer"
        finally:
            gate.set()
            await asyncio.gather(*reads)

    asyncio.run(scenario())


def test_a_picture_requested_as_an_address_is_gone_after_an_hour(start_server: Start) -> None:
    running = start_server()
    clock = [1000.0]
    running.state.results._clock = lambda: clock[0]
    with running.client() as client:
        body = {"prompt": "a cat", "steps": 2, "response_format": "url", "output_format": "webp"}
        url = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        picture, head = client.get(url), client.head(url)
        assert picture.headers["content-type"] == head.headers["content-type"] == "image/webp"
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(picture.content)))
        clock[0] += 3601
        assert client.get(url).status_code == 404
        assert running.state.results.collect() == 1


@pytest.mark.parametrize(
    ("model", "setting", "kind"),
    [
        ("dall-e-3", "b64_json", "url"),
        ("gpt-image-1", "url", "b64_json"),
        ("chatgpt-image-latest", "url", "b64_json"),
        ("", "url", "url"),
        ("", "b64_json", "b64_json"),
    ],
)
def test_pictures_of_openais_models_are_returned_as_openai_does(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, model: str, setting: str, kind: str
) -> None:
    monkeypatch.setattr(server.state, "settings", replace(server.state.settings, response_format=setting))
    body = {"prompt": "a cat", "steps": 2, "model": model}

    (default,) = http.post("/v1/images/generations", json={**body, "response_format": ""}).json()["data"]
    (asked,) = http.post("/v1/images/generations", json={**body, "response_format": "b64_json"}).json()["data"]

    assert set(default) == {kind, "seed"}
    assert set(asked) == {"b64_json", "seed"}


def test_a_photograph_that_is_too_large_is_edited_at_a_smaller_size_unless_a_size_is_given(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.serve.state._ALWAYS", 0)  # so 128x128 pixels, four times the model's own size
    photograph = io.BytesIO()
    PIL.Image.new("RGB", (320, 90), "red").save(photograph, "PNG")

    def edit(**fields: str) -> httpx.Response:
        data = {"prompt": "a cat", "steps": "2", **fields}
        return http.post("/v1/images/edits", data=data, files={"image": photograph.getvalue()})

    empty, auto, exact = edit(size=""), edit(size="auto"), edit(size="320x96")

    assert (empty.json()["size"], auto.json()["size"]) == ("240x64", "240x64")  # 241.4x67.9 in multiples of 8
    assert (exact.status_code, exact.json()["error"]["param"]) == (400, "size")


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((1024, 1024), None, None),
        ((1039, 1039), None, (1024, 1024)),
        ((4000, 3000), None, (1176, 880)),  # 1182.4x886.8
        ((900, 600), 512, (512, 336)),  # 512x341.3
        ((512, 100), 512, None),
    ],
)
def test_a_picture_is_reduced_in_proportion_to_multiples_of_8(
    server: Running, size: tuple[int, int], max_side: int | None, expected: tuple[int, int] | None
) -> None:
    manifest = msgspec.structs.replace(server.state.manifest, max_side=max_side)
    assert reduced(replace(server.state, manifest=manifest), np.zeros((size[1], size[0], 3), np.uint8)) == expected


def test_an_edit_at_a_size_of_another_shape_keeps_the_middle_of_the_picture(http: httpx.Client) -> None:
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    mask = np.full((64, 128), 255, np.uint8)
    mask[:, 32:48] = 0
    files = {}
    smaller_mask = np.zeros((64, 64, 4), np.uint8)
    for name, pixels in (("image", image), ("mask", np.dstack([image, mask])), ("smaller", smaller_mask)):
        stream = io.BytesIO()
        PIL.Image.fromarray(pixels).save(stream, "PNG")
        files[name] = stream.getvalue()

    def edit(mask: str, size: str = "64x64") -> httpx.Response:
        uploads = {"image": files["image"], "mask": files[mask]}
        return http.post("/v1/images/edits", data={"prompt": "a cat", "steps": "4", "size": size}, files=uploads)

    answer, outside, smaller = edit("mask"), edit("mask", "16x64"), edit("smaller")

    assert (outside.status_code, outside.json()["error"]["param"]) == (422, "mask")
    assert "the mask is 64x64, the image 128x64" in smaller.json()["error"]["message"]
    pixels = picture_of(answer.json()["data"][0])
    assert np.array_equal(pixels[:, 16:], image[:, 48:96])
    assert not np.array_equal(pixels[:, :16], image[:, 32:48])


def test_the_list_of_models_may_end_in_a_slash(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_a_form_may_repeat_a_field_with_the_same_value(http: httpx.Client) -> None:
    def edit(*steps: str) -> httpx.Response:
        return http.post("/v1/images/edits", data={"prompt": "a cat", "steps": [*steps]}, files={"image": png()})

    assert edit("2", "2").status_code == 200
    assert edit("2", "3").json()["error"]["message"] == "the field 'steps' was sent twice, but may have only one value"


def test_a_server_can_return_addresses_unless_a_request_asks_otherwise(start_server: Start) -> None:
    body = {"prompt": "a cat", "steps": 2, "seed": 3}
    with start_server(response_format="url").client() as client:
        (by_default,) = client.post("/v1/images/generations", json=body).json()["data"]
        (in_json,) = client.post("/v1/images/generations", json={**body, "response_format": "b64_json"}).json()["data"]
        stream = client.post("/v1/images/generations", json={**body, "stream": True}).text
        file = client.get(by_default["url"]).content

    assert set(by_default) == {"url", "seed"}
    assert base64.b64decode(in_json["b64_json"]) == file
    assert in_json["b64_json"] in stream


def test_a_key_without_room_for_a_picture_is_refused_before_it_is_drawn(start_server: Start, tmp_path: Path) -> None:
    key, lines = new_key("alice")
    (tmp_path / "keys.toml").write_text(f"{lines}max_result_bytes = {3 * 64 * 64}\n")
    running = start_server(keys=tmp_path / "keys.toml", words=str(tmp_path / "words"))
    with Running(running.url, running.state, key).client() as client:
        body = {"prompt": "a cat", "steps": 2, "size": "64x64"}
        refused = client.post("/v1/images/generations", json={**body, "response_format": "url"})
        accepted = client.post("/v1/images/generations", json=body)

    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota_exceeded")
    assert accepted.status_code == 200
    assert not (tmp_path / "words" / "results").exists()


def test_nothing_is_kept_of_a_request_whose_pictures_are_not_all_ready(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_server(words=str(tmp_path))
    encoded: list[bytes] = []

    def encode_one(*arguments: Any) -> bytes:
        if encoded:
            raise Unavailable("a test")
        encoded.append(encode(*arguments))
        return encoded[0]

    monkeypatch.setattr(openai, "encode", encode_one)
    with running.client() as client:
        body = {"prompt": "a cat", "steps": 2, "n": 3, "response_format": "url"}
        answer = client.post("/v1/images/generations", json=body)

    assert (answer.status_code, len(encoded)) == (503, 1)
    assert not (tmp_path / "results").exists()
