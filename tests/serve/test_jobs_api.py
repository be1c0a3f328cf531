"""Learning over HTTP, with the tiny model and real learning processes."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from oneword.runtime.concept import Concept, concept_of, read_safetensors
from oneword.serve import jobs_api
from oneword.serve.errors import Unavailable
from oneword.serve.keys import Tenant, new_key
from oneword.serve.state import State
from tests.serve.conftest import Start
from tests.serve.running import Running, word_bytes

STEPS = 6
STEPS_OF_A_SHORT_JOB = 40
NOBODYS = "0" * 32  # a job's id
STEPS_OF_A_LONG_JOB = 4000  # more than any test waits for
MAX_WORDS = 3  # of bob's


@pytest.fixture(scope="module")
def learners(
    start_server: Start, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Running, Running]:
    """A server that learns, as alice and bob see it."""
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    folder = tmp_path_factory.mktemp("learners")
    (folder / "keys.toml").write_text(f"{first}{second}max_words = {MAX_WORDS}\n")
    running = start_server(keys=folder / "keys.toml", model=str(tiny_model_dir), jobs=folder / "jobs")
    return Running(running.url, running.state, alice), Running(running.url, running.state, bob)


@pytest.fixture
def alice(learners: tuple[Running, Running]) -> Iterator[httpx.Client]:
    with learners[0].client() as client:
        yield client


@pytest.fixture
def bob(learners: tuple[Running, Running]) -> Iterator[httpx.Client]:
    with learners[1].client() as client:
        yield client


def test_a_word_is_learned_watched_and_used(alice: httpx.Client) -> None:
    assert alice.get("/v1/model").json()["learn"] is True

    answer = learn(alice, name="<toy>", init="cat", recipe="directional", steps=STEPS, seed=7)
    job = answer.json()
    events = list(events_of(alice, job["id"]))

    assert answer.status_code == 202
    assert (job["object"], job["kind"], job["status"], job["steps"]) == ("job", "learn", "queued", STEPS)
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "done"
    assert kinds.count("done") == 1
    losses = {data["step"]: data["loss"] for kind, data in events if kind == "progress"}
    assert max(losses) == STEPS
    assert all(loss is None or loss > 0 for loss in losses.values())
    numbers = [data["number"] for _, data in events if "number" in data]
    assert numbers == sorted(set(numbers))

    word = alice.get("/v1/words/<toy>").json()
    assert events[-1][1]["word"] == {"name": "<toy>", "identity": word["identity"]}
    assert word["provenance"]["steps"] == str(STEPS)
    ended = alice.get(f"/v1/jobs/{job['id']}").json()
    assert (ended["status"], ended["step"], ended["word"]["identity"]) == ("succeeded", STEPS, word["identity"])
    pictures = [generated(alice, f"a photo of a {name}") for name in ("<toy>", "cat")]
    assert (pictures[0] != pictures[1]).any()


def test_the_previews_are_the_words_of_their_steps_drawn_from_the_same_seed(alice: httpx.Client) -> None:
    job = learn(alice, name="<seen>", init="cat", steps=STEPS).json()

    previews = [data for kind, data in events_of(alice, job["id"]) if kind == "preview"]

    ended = alice.get(f"/v1/jobs/{job['id']}").json()
    places = [(step, index) for step in (0, 5, STEPS) for index in range(3)]
    assert [(preview["step"], preview["index"]) for preview in previews] == places
    assert [preview["prompt"] for preview in previews[:3]] == ended["prompts"]
    assert ended["prompts"][0] == "a photo of a <seen>"
    for preview, named in zip(previews, ended["previews"], strict=True):
        answer = alice.get(named["url"])
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.content == base64.b64decode(preview["b64_json"])
    drawn = generated(alice, "a photo of a <seen>", steps=20)
    assert np.abs(drawn - decoded(previews[-3]["b64_json"])).mean() < 8  # a JPEG of the same picture
    again = [data for kind, data in events_of(alice, job["id"]) if kind == "preview"]
    assert again == previews


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the index of every preview that is drawn."""
    indices: list[int] = []

    async def draw(state: State, tenant: Tenant, concept: Concept, index: int) -> bytes:
        indices.append(index)
        return await draw_preview(state, tenant, concept, index)

    draw_preview = jobs_api._drawn
    monkeypatch.setattr(jobs_api, "_drawn", draw)
    return indices


def test_a_preview_that_two_look_at_is_drawn_once(alice: httpx.Client, drawn: list[int]) -> None:
    job = learn(alice, name="<watched>", steps=3).json()
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: [*events_of(alice, job["id"])], range(2))

    previews, repetitions = ([data for kind, data in events if kind == "preview"] for events in (first, second))
    assert len(previews) == len(drawn) == 6  # of three prompts, after steps 0 and 3
    assert repetitions == previews


def test_a_preview_that_cannot_be_kept_is_sent_and_not_drawn_again(
    alice: httpx.Client, learners: tuple[Running, Running], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise Unavailable("the store cannot be written")

    monkeypatch.setattr(learners[0].state.jobs, "write_picture", full)
    job = learn(alice, name="<unkept>", steps=3).json()

    previews = [data for kind, data in events_of(alice, job["id"]) if kind == "preview"]

    assert len(previews) == len(drawn) == 6


def test_addresses_have_the_prefix_of_the_proxy(start_server: Start, tiny_model_dir: Path, tmp_path: Path) -> None:
    running = start_server(root_path="/oneword", model=str(tiny_model_dir), jobs=tmp_path)
    with running.client() as http:
        job = learn(http, name="<toy>", steps=1).json()
        list(events_of(http, job["id"]))
        job = http.get(f"/v1/jobs/{job['id']}").json()

        for address in (*job["pictures"], *(preview["url"] for preview in job["previews"])):
            assert address.startswith(f"/oneword/v1/jobs/{job['id']}/pictures/")
            assert http.get(address.removeprefix("/oneword")).status_code == 200  # which the proxy removes
        wrong = http.post("/sdapi/v1/txt2img", json={"steps": "many"})
        assert (wrong.status_code, "steps" in wrong.json()["detail"]) == (422, True)
        method = http.get("/sdapi/v1/txt2img")
        assert (method.status_code, method.headers["allow"]) == (405, "POST")
        assert "detail" in method.json()


def test_a_reader_that_comes_back_gets_only_what_it_has_missed(alice: httpx.Client) -> None:
    job = learn(alice, name="<again>", steps=3).json()
    numbers = [data["number"] for _, data in events_of(alice, job["id"]) if "number" in data]

    later = list(events_of(alice, job["id"], after=numbers[-2]))

    assert [(kind, data["number"]) for kind, data in later if "number" in data] == [("done", numbers[-1])]


def test_a_job_is_cancelled_while_it_learns_and_leaves_no_word(alice: httpx.Client) -> None:
    job = learn(alice, name="<never>", steps=STEPS_OF_A_LONG_JOB).json()
    events = events_of(alice, job["id"])
    assert next(kind for kind, data in events if kind == "progress" and data["step"] > 0)

    cancelled = alice.delete(f"/v1/jobs/{job['id']}")

    assert cancelled.json()["status"] == "cancelled"
    assert [kind for kind, _ in events][-1] == "cancelled"
    assert alice.get("/v1/words/<never>").status_code == 404
    assert alice.delete(f"/v1/jobs/{job['id']}").json() == alice.get(f"/v1/jobs/{job['id']}").json()


def test_a_job_waits_for_its_turn_and_can_be_cancelled_before_it(alice: httpx.Client) -> None:
    first, second = (learn(alice, name=f"<turn{number}>", steps=STEPS_OF_A_LONG_JOB).json() for number in range(2))

    waiting = alice.get(f"/v1/jobs/{second['id']}").json()
    ended = alice.delete(f"/v1/jobs/{second['id']}").json()

    assert (waiting["status"], waiting["position"]) == ("queued", 1)
    assert (ended["status"], ended["step"]) == ("cancelled", 0)
    assert [kind for kind, _ in events_of(alice, second["id"])] == ["cancelled"]
    assert alice.delete(f"/v1/jobs/{first['id']}").json()["status"] == "cancelled"


def test_jobs_are_listed_newest_first_in_pages(alice: httpx.Client) -> None:
    identifiers = [learn(alice, name=f"<page{number}>", steps=STEPS_OF_A_LONG_JOB).json()["id"] for number in range(3)]
    for identifier in identifiers:
        alice.delete(f"/v1/jobs/{identifier}")

    first = alice.get("/v1/jobs", params={"limit": 2}).json()
    second = alice.get("/v1/jobs", params={"limit": 1, "before": first["data"][-1]["id"]}).json()

    assert [job["id"] for job in (*first["data"], *second["data"])] == identifiers[::-1]
    assert first["has_more"] is True


def test_another_tenants_job_is_not_there(alice: httpx.Client, bob: httpx.Client) -> None:
    job = learn(alice, name="<mine>", steps=1).json()
    list(events_of(alice, job["id"]))
    address = f"/v1/jobs/{job['id']}"

    for path in ("", "/events", "/pictures/picture-1.png", "/pictures/preview-0-0.jpg"):
        assert alice.get(address + path).status_code == 200
        theirs, nobodys = bob.get(address + path), bob.get(f"/v1/jobs/{NOBODYS}{path}")
        assert (theirs.status_code, nobodys.status_code) == (404, 404)
        assert theirs.text.replace(job["id"], NOBODYS) == nobodys.text
    assert bob.delete(address).status_code == 404
    assert bob.get("/v1/jobs").json()["data"] == []
    assert alice.get(address).json()["status"] == "succeeded"


def test_the_pictures_of_a_job_are_those_that_were_sent(alice: httpx.Client) -> None:
    job = learn(alice, name="<kept>", steps=1).json()

    sent = [np.asarray(Image.open(io.BytesIO(photograph(number)))) for number in range(3)]
    pictures_kept = [np.asarray(Image.open(io.BytesIO(alice.get(url).content))) for url in job["pictures"]]

    assert all((a == b).all() for a, b in zip(sent, pictures_kept, strict=True))
    for name in ("preview-1-3.jpg", "preview-7-0.jpg", "preview--1-0.jpg", "run.json", "..%2F..%2Fjob.json", "a" * 300):
        assert alice.get(f"/v1/jobs/{job['id']}/pictures/{name}").status_code == 404, name
    list(events_of(alice, job["id"]))


@pytest.mark.parametrize(
    ("changes", "status", "param", "text"),
    [
        ({"name": None}, 400, "name", "name"),
        ({"name": ""}, 422, "name", "name '' is not safe in a prompt"),
        ({"name": "<a b>"}, 422, None, "not safe in a prompt"),
        ({"init": "<toy>"}, 400, "init", "give one word"),
        ({"recipe": "slow"}, 400, "recipe", "choose from directional, fast, style, one-word"),
        ({"steps": 0}, 400, "steps", "1"),
        ({"steps": 5001}, 400, "steps", "1 to 5000"),
        ({"steps": "many"}, 400, "steps", "steps"),
        ({"seed": -1}, 400, "seed", "0"),
        ({"replace": "perhaps"}, 400, "replace", "replace"),
        ({"colour": "red"}, 400, "colour", "colour"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(
    alice: httpx.Client, changes: dict[str, Any], status: int, param: str | None, text: str
) -> None:
    fields: dict[str, Any] = {"name": "<other>", "steps": STEPS_OF_A_LONG_JOB, **changes}
    answer = learn(alice, None, **fields)

    error = answer.json()["error"]
    assert answer.status_code == status
    assert param is None or error["param"] == param
    assert text in error["message"]


@pytest.mark.parametrize(
    ("pictures", "status", "text"),
    [
        (lambda: [photograph(number) for number in range(2)], 400, "2 pictures were sent: send 3 to 5"),
        (lambda: [photograph(number) for number in range(6)], 400, "6 pictures were sent: send 3 to 5"),
        (list, 400, "0 pictures were sent"),
        (lambda: [photograph(0), photograph(1), b"GIF89a" + bytes(99)], 422, "picture 3"),
        (lambda: [photograph(0), photograph(1), b""], 422, "picture 3"),
        (lambda: [photograph(0), photograph(1), photograph(2)[:99]], 422, "picture 3"),
        (lambda: [photograph(0), photograph(1), photograph(2, side=15)], 422, "too small to learn from"),
    ],
)
def test_pictures_that_cannot_be_learned_from_are_refused(
    alice: httpx.Client, pictures: Any, status: int, text: str
) -> None:
    answer = learn(alice, pictures(), name="<other>")

    assert (answer.status_code, text in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_file_under_another_name_and_a_body_of_another_kind_are_refused(alice: httpx.Client) -> None:
    named = alice.post("/v1/words/learn", files=[("photo", photograph(0))], data={"name": "<toy>"})
    other = alice.post("/v1/words/learn", json={"name": "<toy>"})

    assert (named.status_code, named.json()["error"]["param"]) == (400, "photo")
    assert other.status_code == 422
    assert "multipart/form-data" in other.json()["error"]["message"]


def test_a_server_without_a_model_says_what_learning_needs_and_shows_jobs(http: httpx.Client) -> None:
    answer = learn(http, name="<toy>")

    assert http.get("/v1/model").json()["learn"] is False
    assert answer.status_code == 501
    assert "--model" in answer.json()["error"]["message"]
    assert http.get("/v1/jobs").json() == {"object": "list", "data": [], "has_more": False}
    assert http.get(f"/v1/jobs/{'0' * 32}").status_code == 404


def test_a_name_that_is_taken_is_refused_before_anything_is_learned_unless_the_word_may_be_replaced(
    alice: httpx.Client,
) -> None:
    alice.put("/v1/words/<taken>", content=word_bytes("<taken>")).raise_for_status()

    refused = learn(alice, name="<taken>", steps=1)
    accepted = learn(alice, name="<taken>", steps=1, replace="true")

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "word_exists")
    assert accepted.status_code == 202
    ended = [data for kind, data in events_of(alice, accepted.json()["id"]) if kind == "done"]
    assert alice.get("/v1/words/<taken>").json()["identity"] == ended[0]["word"]["identity"]
    assert alice.get("/v1/words/<taken>").json()["generation"] == 2


def test_a_name_is_taken_while_a_job_learns_it(alice: httpx.Client, bob: httpx.Client) -> None:
    with ThreadPoolExecutor(3) as threads:
        order = {"name": "<soon>", "steps": STEPS_OF_A_LONG_JOB}
        answers = list(threads.map(lambda _: learn(alice, **order), range(3)))
    job = next(answer.json()["id"] for answer in answers if answer.status_code == 202)
    allowed = [learn(alice, **order, replace="true"), learn(bob, **order)]

    assert sorted(answer.status_code for answer in answers) == [202, 409, 409]
    refused = next(answer.json()["error"] for answer in answers if answer.status_code == 409)
    assert (refused["code"], "'<soon>' is being learned" in refused["message"]) == ("word_exists", True)
    assert [answer.status_code for answer in allowed] == [202, 202]
    for client, identifier in ((alice, job), *zip((alice, bob), (a.json()["id"] for a in allowed), strict=True)):
        assert client.delete(f"/v1/jobs/{identifier}").json()["status"] == "cancelled"


def test_words_that_are_being_learned_count_against_the_quota(bob: httpx.Client) -> None:
    accepted = [learn(bob, name=f"<next{number}>", steps=STEPS_OF_A_LONG_JOB) for number in range(MAX_WORDS)]
    refused = learn(bob, name="<one-more>", steps=STEPS_OF_A_LONG_JOB)
    bob.delete(f"/v1/jobs/{accepted[-1].json()['id']}").raise_for_status()  # it waits, so that it ends at once
    again = learn(bob, name="<one-more>", steps=STEPS_OF_A_LONG_JOB)
    for answer in (*accepted[:-1], again):
        bob.delete(f"/v1/jobs/{answer.json()['id']}").raise_for_status()

    assert [answer.status_code for answer in (*accepted, refused, again)] == [202, 202, 202, 403, 202]
    assert "you have 0 words and are learning 3, and may have at most 3" in refused.json()["error"]["message"]


def test_a_word_that_takes_the_name_while_a_job_learns_is_not_replaced(alice: httpx.Client) -> None:
    answer = learn(alice, name="<both>", steps=STEPS_OF_A_SHORT_JOB)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    alice.put("/v1/words/<both>", content=word_bytes("<both>")).raise_for_status()
    before = alice.get("/v1/words/<both>").json()

    kind, data = list(events_of(alice, job["id"]))[-1]

    assert kind == "error"
    assert "there is a word '<both>' already" in data["error"]["message"]
    assert f"GET /v1/jobs/{job['id']}/word returns the learned word" in data["error"]["message"]
    assert alice.get("/v1/words/<both>").json() == before
    learned = alice.get(f"/v1/jobs/{job['id']}/word")
    assert learned.headers["content-disposition"] == 'attachment; filename="both.safetensors"'
    assert concept_of(*read_safetensors(learned.content, "the word"), "the word").identity != before["identity"]


def test_a_tenant_without_room_for_a_word_is_refused_before_anything_is_learned(bob: httpx.Client) -> None:
    before = len(bob.get("/v1/jobs").json()["data"])
    words = [f"<full{number}>" for number in range(MAX_WORDS)]
    for word in words:
        bob.put(f"/v1/words/{word}", content=word_bytes(word)).raise_for_status()

    answer = learn(bob, name="<more>", steps=1)

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_exceeded")
    assert len(bob.get("/v1/jobs").json()["data"]) == before
    for word in words:
        bob.delete(f"/v1/words/{word}").raise_for_status()


def learn(client: httpx.Client, pictures: list[bytes] | None = None, **fields: Any) -> httpx.Response:
    images = [photograph(number) for number in range(3)] if pictures is None else pictures
    parts: list[Any] = [(name, (None, str(value))) for name, value in fields.items() if value is not None]
    parts += [("image[]", (f"{number}.png", data, "image/png")) for number, data in enumerate(images)]
    return client.post("/v1/words/learn", files=parts)


def events_of(client: httpx.Client, identifier: str, after: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a job until the server ends the stream."""
    with client.stream("GET", f"/v1/jobs/{identifier}/events", params={"after": after}) as response:
        assert response.status_code == 200
        kind = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


def generated(client: httpx.Client, prompt: str, **fields: Any) -> Any:
    body = {"prompt": prompt, "seed": 0, "steps": 4} | fields
    answer = client.post("/v1/images/generations", json=body).raise_for_status()
    return decoded(answer.json()["data"][0]["b64_json"])


def decoded(b64_json: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")).astype(np.int16)


def photograph(number: int, side: int = 32) -> bytes:
    """A picture of noise, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
