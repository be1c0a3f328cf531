"""A1111's API, as webuiapi uses it and as the wire has it."""

import base64
import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from oneword.runtime import Model, draw
from oneword.serve.a1111 import answers
from tests.serve.conftest import Start
from tests.serve.running import Running, run_client, undecodable_png, word_bytes

SMALL = {"width": 64, "height": 64, "steps": 4, "prompt": "a red ring"}
LONG = {**SMALL, "steps": 1000, "n_iter": 8, "sampler_name": "Euler a"}


def picture_of(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text))))


def png(width: int = 64, height: int = 64, colour: str = "red") -> str:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def progress(client: httpx.Client, **query: Any) -> dict[str, Any]:
    answer = client.get("/sdapi/v1/progress", params=query)
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body


def wait_for_step(client: httpx.Client, step: int, request: threading.Event, **query: Any) -> dict[str, Any]:
    """Polls progress until a picture has made so many steps."""
    while not request.is_set():
        state = progress(client, **query)
        if state["state"]["sampling_step"] >= step:
            return state
    raise AssertionError("the request ended before its progress was seen")


def test_webuiapi_generates_edits_inpaints_and_interrupts(tenants: tuple[Running, Running]) -> None:
    alice, _ = tenants
    with alice.client() as client:
        client.put("/v1/words/toy", content=word_bytes("toy", rows=2)).raise_for_status()

    found = run_client("webuiapi_client.py", alice.url, alice.key)

    earlier = {"Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE", "DDIM", "DDPM", "LCM"}
    assert {*found["samplers"]} == earlier | {"Heun", "DPM2 a", "DPM++ 2S a", "DPM++ 3M SDE", "UniPC"}
    assert {"automatic", "karras"} <= {*found["schedulers"]}
    assert found["models"] == [found["model"]]
    assert found["options"] == [True, None, True]
    assert found["embeddings"]["loaded"]["toy"]["vectors"] == 2
    assert found["embeddings"]["loaded"]["toy"]["shape"] == 32
    assert found["lists"]["scripts"] == {"txt2img": [], "img2img": []}
    assert found["lists"]["memory"]["ram"]["total"] > 0
    assert (found["rest"]["progress"], found["rest"]["state"]["job_count"]) == (0, 0)
    drawn = found["txt2img"]
    assert drawn["sizes"] == [[64, 64]] * 4
    assert drawn["seeds"] == [40, 41, 42, 43]
    assert drawn["sampler"] == "Euler a"
    assert drawn["infotexts"][2].startswith(
        "a red ring\nNegative prompt: blurry\nSteps: 6, Sampler: Euler a, CFG scale: 5"
    )
    assert "Seed: 42" in drawn["infotexts"][2]
    assert drawn["parameters"]["cfg_scale"] == 5
    assert found["repeated"] <= 1  # alone and among three others
    assert found["random"] >= 0
    assert found["word"] is True
    assert found["png_info"] == drawn["infotexts"][0]
    assert "Sampler: DPM++ 2M Karras" in found["karras"][0]
    assert "Clip skip: 2" in found["karras"][0]
    assert found["img2img"] == [[64, 64], 0.5, None]
    navy = [0, 0, 128]
    for name in ("full", "whole", "default"):
        size, outside, inside = found["inpaint"][name]
        assert size == [96, 64]
        assert outside == navy
        assert inside != navy
    assert found["inpaint"]["inverted"][0] == navy
    assert found["inpaint"]["inverted"][1] != navy
    stopped = found["interrupt"]
    assert 0 < stopped["progress"]["progress"] < 1
    assert stopped["progress"]["state"]["job_count"] == 8
    assert stopped["progress"]["state"]["sampling_steps"] == 1000
    assert stopped["progress"]["current_image"] is True
    assert stopped["progress"]["eta_relative"] > 0
    assert stopped["answer"] == {}
    assert stopped["pictures"] < 8
    assert stopped["seed"] == 3
    assert found["skip"] == {}
    assert found["errors"]["sampler"][0] == 404
    assert found["errors"]["hr"][0] == 422
    assert "enable_hr" in found["errors"]["hr"][1]
    assert found["errors"]["size"][0] == 400
    assert "<nobody>" in found["errors"]["word"][1]


def test_a_served_picture_is_the_one_that_draw_makes(server: Running, http: httpx.Client) -> None:
    body = {**SMALL, "seed": 7, "sampler_name": "DPM++ 2M", "cfg_scale": 3.0, "n_iter": 2}

    answer = http.post("/sdapi/v1/txt2img", json=body).json()

    model = Model.open(server.state.settings.bundle, "onnxruntime", threads=1)
    alone = draw(model, "a red ring", num_images=2, steps=4, seed=7, sampler="dpmpp-2m", guidance_scale=3.0)
    for text, done in zip(answer["images"], alone, strict=True):
        assert np.abs(picture_of(text).astype(int) - done.image).max() <= 1
    assert json.loads(answer["info"])["all_seeds"] == [7, 8]


def test_bare_names_are_words_and_comfyui_gets_their_names(server: Running, http: httpx.Client) -> None:
    http.put("/v1/words/sprout", content=word_bytes("sprout", seed=3)).raise_for_status()
    http.put("/v1/words/<gnome>", content=word_bytes("<gnome>", seed=4)).raise_for_status()

    pictures = [
        picture_of(http.post("/sdapi/v1/txt2img", json={**SMALL, "prompt": prompt, "seed": 1}).json()["images"][0])
        for prompt in ("a photo of sprout", "a photo of <sprout>", "a photo of sprouts", "a photo of <gnome>")
    ]

    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert len({picture.tobytes() for picture in pictures}) == 3  # sprouts is no word, and another text
    names = http.get("/embeddings").json()
    assert {"sprout", "gnome"} <= {*names}
    assert {"sprout", "<gnome>"} <= http.get("/sdapi/v1/embeddings").json()["loaded"].keys()


@pytest.mark.parametrize(
    ("picture", "status", "message"),
    [
        ("http://127.0.0.1:1/x.png", 422, "address"),
        ("https://example.com/x.png", 422, "address"),
        ("!!!!", 422, "base64"),
        (base64.b64encode(b"no picture").decode(), 422, "'init_images'"),
        ("", 422, "empty"),
    ],
)
def test_what_is_not_a_picture_is_refused_and_never_fetched(
    http: httpx.Client, picture: str, status: int, message: str
) -> None:
    answer = http.post("/sdapi/v1/img2img", json={**SMALL, "init_images": [picture]})

    assert answer.status_code == status
    assert message in answer.json()["detail"]
    assert answer.json().keys() == {"error", "detail", "body", "errors"}


def test_pictures_and_masks_come_with_and_without_a_data_uri(http: httpx.Client) -> None:
    uri = "data:image/png;base64,"
    body = {**SMALL, "seed": 3, "inpainting_fill": 1, "denoising_strength": 1}

    answers = [
        http.post(
            "/sdapi/v1/img2img",
            json={**body, "init_images": [prefix + png()], "mask": prefix + png(colour="white")},
        )
        for prefix in ("", uri)
    ]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["images"] == answers[1].json()["images"]


def test_an_edit_needs_one_picture(http: httpx.Client) -> None:
    none = http.post("/sdapi/v1/img2img", json=SMALL)
    two = http.post("/sdapi/v1/img2img", json={**SMALL, "init_images": [png(), png()]})

    assert (none.status_code, two.status_code) == (404, 422)
    assert "Init image not found" in none.json()["detail"]


def test_pictures_are_decoded_only_if_there_is_room(start_server: Start) -> None:
    running = start_server()
    picture = base64.b64encode(undecodable_png()).decode()
    with running.client() as client:
        damaged = client.post("/sdapi/v1/img2img", json={**SMALL, "init_images": [picture]})
        running.state.pool.draining = True
        draining = client.post("/sdapi/v1/img2img", json={**SMALL, "init_images": [picture]})

    assert (damaged.status_code, draining.status_code) == (422, 503)


def test_the_pictures_of_a_request_are_encoded_one_at_a_time(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[int] = []
    in_thread = server.state.in_thread

    async def counted(function: Any, *arguments: Any) -> Any:
        def work() -> Any:
            encoded: list[bytes] = []
            with pytest.MonkeyPatch.context() as patch:
                encode = answers.encode
                patch.setattr(answers, "encode", lambda *a, **k: encoded.append(encode(*a, **k)) or encoded[-1])
                result = function(*arguments)
            jobs.append(len(encoded))
            return result

        return await in_thread(work)

    monkeypatch.setattr(server.state, "in_thread", counted)

    made = http.post("/sdapi/v1/txt2img", json={**SMALL, "n_iter": 3}).json()
    silent = http.post("/sdapi/v1/txt2img", json={**SMALL, "n_iter": 3, "send_images": False}).json()

    assert (len(made["images"]), silent["images"]) == (3, [])
    assert jobs == [1, 1, 1, 0, 0]


def test_memory_is_answered_where_the_system_does_not_say_what_is_free(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: sysconf(name) if name != "SC_AVPHYS_PAGES" else sysconf("no name"))
    without_free = http.get("/sdapi/v1/memory")
    monkeypatch.delattr(os, "sysconf")
    without_any = http.get("/sdapi/v1/memory")

    assert (without_free.status_code, without_any.status_code) == (200, 200)
    assert without_free.json()["ram"] == without_any.json()["ram"] == {"error": "unavailable"}


def test_comfyuis_list_reads_no_word(http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    http.put("/v1/words/listed", content=word_bytes("listed")).raise_for_status()
    read: list[str] = []
    records = server.state.words.store.records
    monkeypatch.setattr(server.state.words.store, "records", lambda *of: read.append(of[0]) or records(*of))

    assert "listed" in http.get("/embeddings").json()
    assert read == []


def test_the_mask_blur_softens_the_edge_of_what_is_pasted(http: httpx.Client) -> None:
    mask = PIL.Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    body = {
        **SMALL,
        "seed": 3,
        "init_images": [png(colour="navy")],
        "mask": base64.b64encode(stream.getvalue()).decode(),
        "inpainting_fill": 1,
        "inpaint_full_res": False,
        "denoising_strength": 1,
    }

    hard, soft = (
        picture_of(http.post("/sdapi/v1/img2img", json={**body, "mask_blur": blur}).json()["images"][0])
        for blur in (0, 4)
    )

    assert (hard[:, :32] == (0, 0, 128)).all()
    assert (soft[:, :22] == (0, 0, 128)).all()
    assert (soft[:, 22:32] != (0, 0, 128)).any()
    np.testing.assert_array_equal(soft[:, 43:], hard[:, 43:])


def test_progress_and_interrupt_are_the_callers_own(tenants: tuple[Running, Running]) -> None:
    (alice, bob), ended = tenants, threading.Event()
    with alice.client() as her, bob.client() as his, ThreadPoolExecutor(1) as pool:

        def drawn() -> httpx.Response:
            try:
                return her.post("/sdapi/v1/txt2img", json={**LONG, "force_task_id": "task(her-1)"})
            finally:
                ended.set()

        answer = pool.submit(drawn)
        with alice.client() as other:
            state = wait_for_step(other, 1, ended)
            assert state["state"]["job_count"] == 8
            assert state["current_task"] == "task(her-1)"
            assert progress(other, force_task_id="task(her-2)")["state"]["job_count"] == 0
            assert progress(his)["state"]["job_count"] == 0
            assert his.post("/sdapi/v1/interrupt").json() == {}
            other.post("/sdapi/v1/interrupt", params={"force_task_id": "task(her-2)"})
            assert progress(other, force_task_id="task(her-1)")["state"]["job_count"] == 8
            other.post("/sdapi/v1/interrupt", params={"force_task_id": "task(her-1)"})
            assert progress(other)["state"]["job_count"] == 0

        assert answer.result().status_code == 200
        assert len(answer.result().json()["images"]) < 8


def test_without_keys_the_caller_is_an_address(server: Running, http: httpx.Client) -> None:
    ended = threading.Event()
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with server.client(transport=elsewhere) as other, server.client() as mine, ThreadPoolExecutor(1) as pool:

        def drawn() -> httpx.Response:
            try:
                return mine.post("/sdapi/v1/txt2img", json=LONG)
            finally:
                ended.set()

        answer = pool.submit(drawn)
        wait_for_step(http, 1, ended)
        assert progress(other)["state"]["job_count"] == 0
        other.post("/sdapi/v1/skip")
        assert progress(http)["state"]["job_count"] == 8
        assert http.post("/sdapi/v1/skip").json() == {}
        assert progress(http)["state"]["job_count"] == 0

        assert len(answer.result().json()["images"]) < 8


def test_another_dialects_pictures_are_not_in_the_progress(server: Running, http: httpx.Client) -> None:
    ended = threading.Event()
    with server.client() as other, ThreadPoolExecutor(1) as pool:

        def drawn() -> None:
            with server.client() as mine:
                mine.post(
                    "/v1/images/generations", json={"prompt": "a red ring", "steps": 1000, "n": 8, "sampler": "euler-a"}
                )
            ended.set()

        pool.submit(drawn)
        queue: list[dict[str, Any]] = []
        while not queue and not ended.is_set():
            queue = other.get("/v1/queue").json()["data"]
        assert queue
        assert progress(http)["state"]["job_count"] == 0
        http.post("/sdapi/v1/interrupt")
        assert [item["id"] for item in other.get("/v1/queue").json()["data"]] == [queue[0]["id"]]
        other.delete(f"/v1/queue/{queue[0]['id']}").raise_for_status()


def test_a_picture_contains_the_parameters_that_made_it(http: httpx.Client) -> None:
    for name, fields in {"PNG": {}, "JPEG": {"override_settings": {"samples_format": "jpg"}}}.items():
        made = http.post("/sdapi/v1/txt2img", json={**SMALL, "seed": 9, **fields}).json()
        data = made["images"][0]
        assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).format == name

        answer = http.post("/sdapi/v1/png-info", json={"image": data}).json()

        assert answer["info"] == json.loads(made["info"])["infotexts"][0]
        assert answer["parameters"]["Prompt"] == "a red ring"
        assert answer["parameters"]["Seed"] == "9"
        assert (answer["parameters"]["Size-1"], answer["parameters"]["Size-2"]) == ("64", "64")


def test_a_picture_without_parameters_has_no_info(http: httpx.Client) -> None:
    answer = http.post("/sdapi/v1/png-info", json={"image": png()}).json()

    assert answer == {"info": "", "items": {}, "parameters": {}}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("txt2img", {"steps": "many"}, 422, "'steps' is 'many', but must be a whole number"),
        ("txt2img", {"n_iter": 0}, 422, "'n_iter' is 0, but must be at least 1"),
        ("txt2img", {"steps": 0}, 400, "steps is 0, but must be 1 to 1000"),
        ("txt2img", {"width": 60}, 400, "size 60x64: width must be a multiple of 8"),
        ("txt2img", {"prompt": "\ud800"}, 400, "the prompt is not valid Unicode"),
        ("txt2img", {"force_task_id": "\ud800"}, 422, "'force_task_id' is '\\ud800'"),
        ("txt2img", {"sampler_name": "\ud800"}, 404, "Sampler not found: '\\ud800'"),
        ("txt2img", {"sampler_name": "Nonsense"}, 404, "Sampler not found: 'Nonsense'"),
        ("img2img", {"init_images": ["aa"], "resize_mode": 3}, 422, "'init_images'"),
        ("img2img", {"init_images": [png()], "resize_mode": 3}, 422, "resize_mode is 3"),
        ("img2img", {"init_images": [png()], "mask": png(32, 32)}, 400, "the mask is 32x32, the image 64x64"),
        ("img2img", {"init_images": [png()], "mask": png(), "inpainting_fill": 2}, 422, "inpainting_fill is 2"),
        ("options", {"CLIP_stop_at_last_layers": 2}, 422, "'CLIP_stop_at_last_layers' stays as it is"),
        ("options", {"emphasis": "No norm"}, 422, "emphasis is 'No norm', this server allows 'Original' only"),
        ("options", {"sd_model_checkpoint": "sdxl"}, 404, "this server has no model 'sdxl'"),
        ("png-info", {"image": "http://127.0.0.1/x.png"}, 422, "address"),
        ("png-info", {}, 422, "'image' is missing"),
    ],
)
def test_a_wrong_field_is_one_line_of_error(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    content = json.dumps({**(SMALL if path.endswith("2img") else {}), **body})
    answer = http.post(f"/sdapi/v1/{path}", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_the_route_options_ignores_settings_of_display(http: httpx.Client) -> None:
    before = http.get("/sdapi/v1/options").json()

    answer = http.post("/sdapi/v1/options", json={"live_previews_enable": False, "show_progress_every_n_steps": 0})

    assert (answer.status_code, answer.json()) == (200, None)
    assert http.get("/sdapi/v1/options").json() == before


@pytest.mark.parametrize("path", ["extra-single-image", "interrogate", "train/embedding"])
def test_what_is_absent_answers_404(http: httpx.Client, path: str) -> None:
    answer = http.get(f"/sdapi/v1/{path}")

    assert answer.status_code == 404
    assert answer.json().keys() == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize("path", ["face-restorers", "latent-upscale-modes", "extensions", "loras"])
def test_lists_that_clients_read_at_their_start_are_empty(http: httpx.Client, path: str) -> None:
    assert http.get(f"/sdapi/v1/{path}").json() == []


def test_numbers_that_are_not_finite_are_refused(http: httpx.Client) -> None:
    for text in ('{"cfg_scale": NaN}', '{"cfg_scale": Infinity}', '{"comments": {"a": NaN}, "steps": 1e999}'):
        answer = http.post("/sdapi/v1/txt2img", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
