"""Refining a word over HTTP."""

import asyncio
import base64
import io
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest

from oneword.runtime.concept import Concept, concept_of, read_safetensors
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.refine import Refinement
from oneword.serve import refine_api
from oneword.serve.errors import Busy, Unavailable
from oneword.serve.files import FolderFiles
from oneword.serve.keys import LOCAL
from oneword.serve.refinements import Refinements
from tests.serve.running import SECONDS, Running, word_bytes

WORD = "/v1/words/%3Cpet%3E"


@pytest.fixture
def word(http: httpx.Client) -> str:
    """A word that no test has refined."""
    http.put(WORD, content=word_bytes("<pet>", 3)).raise_for_status()
    http.post(f"{WORD}/refine", json={"action": "start"}).raise_for_status()
    return WORD


def test_a_round_is_drawn_judged_and_undone_and_the_word_changes_when_it_is_finished(
    http: httpx.Client, word: str
) -> None:
    before = http.get(word).json()
    first = http.post(f"{word}/refine", json={"action": "start"}).json()
    second = http.post(f"{word}/refine", json={"action": "judge", "round": 1, "likes": [1], "dislikes": [2]}).json()
    undone = http.post(f"{word}/refine", json={"action": "undo"}).json()
    http.post(f"{word}/refine", json={"action": "judge", "round": 1, "likes": [1]})
    unchanged = http.get(word).json()
    finished = http.post(f"{word}/refine", json={"action": "finish"}).json()

    assert (first["round"], second["round"], undone["round"]) == (1, 2, 1)
    assert undone["candidates"] == first["candidates"] != second["candidates"]
    for candidate in first["candidates"]:
        assert PIL.Image.open(io.BytesIO(base64.b64decode(candidate["b64_json"]))).size == (64, 64)
    assert unchanged == before
    assert finished["identity"] != before["identity"]
    assert finished["generation"] == before["generation"] + 1
    concept = concept_of(*read_safetensors(http.get(f"{word}/file").content, "word"), "word")
    state = Refinement.of(concept)
    assert state is not None
    assert [judged.levels.index(max(judged.levels)) for judged in state.rounds] == [1]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"action": "guess"}, 400, "action"),
        ({"action": "start", "likes": [1]}, 400, "likes"),
        ({"action": "judge", "round": 1, "likes": [99]}, 400, "likes[0]"),
        ({"action": "judge", "round": 1, "likes": [1], "dislikes": [1]}, 400, None),
        ({"action": "undo"}, 400, None),
        ({"action": "judge", "likes": [1]}, 400, "round"),
        ({"action": "start", "round": 1}, 400, "round"),
        ({"action": "finish", "round": 1}, 400, "round"),
        ({"action": "undo", "round": 0}, 400, "round"),
        ({"action": "undo", "round": 2}, 409, None),
        ({"action": "judge", "round": 3, "likes": [1]}, 409, None),
        ({"action": "start", "prompt": "a photo"}, 400, "prompt"),
    ],
)
def test_a_wrong_action_is_one_line(
    http: httpx.Client, word: str, body: dict[str, object], status: int, param: str | None
) -> None:
    response = http.post(f"{word}/refine", json=body)

    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_refinement_is_its_tenants_own(tenants: tuple[Running, Running]) -> None:
    alice, bob = tenants
    with alice.client() as hers, bob.client() as his:
        hers.put(WORD, content=word_bytes("<pet>", 3)).raise_for_status()
        assert hers.post(f"{WORD}/refine", json={"action": "start"}).status_code == 200
        assert his.post(f"{WORD}/refine", json={"action": "undo"}).status_code == 404


def test_without_a_start_there_is_nothing_to_judge(http: httpx.Client) -> None:
    http.put("/v1/words/%3Cfresh-pet%3E", content=word_bytes("<fresh-pet>", 4)).raise_for_status()

    assert (
        http.post("/v1/words/%3Cfresh-pet%3E/refine", json={"action": "judge", "round": 1, "likes": [0]}).status_code
        == 409
    )


def test_a_judgement_that_is_sent_twice_counts_once(http: httpx.Client, word: str) -> None:
    body = {"action": "judge", "round": 1, "likes": [1]}
    first, second = (http.post(f"{word}/refine", json=body).json() for _ in range(2))
    other = http.post(f"{word}/refine", json={**body, "likes": [2]})

    assert (first["round"], second) == (2, first)
    assert other.status_code == 409


def test_an_undo_that_is_sent_twice_with_its_round_undoes_one_round(http: httpx.Client, word: str) -> None:
    for number in (1, 2, 3):
        http.post(f"{word}/refine", json={"action": "judge", "round": number, "likes": [1]}).raise_for_status()

    first, second = (http.post(f"{word}/refine", json={"action": "undo", "round": 3}).json() for _ in range(2))
    late = http.post(f"{word}/refine", json={"action": "undo", "round": 1})
    without_number = http.post(f"{word}/refine", json={"action": "undo"}).json()
    judged = http.post(f"{word}/refine", json={"action": "judge", "round": 2, "likes": [2]}).json()

    assert (first["round"], second) == (3, first)
    assert late.status_code == 409
    assert "round is 1, rounds judged so far: 2" in late.json()["error"]["message"]
    assert (without_number["round"], judged["round"]) == (2, 3)


def test_openapi_says_that_an_undo_may_name_its_round(http: httpx.Client) -> None:
    fields = http.get("/openapi.json").json()["components"]["schemas"]["RefineBody"]

    assert "round" not in fields["required"]
    assert "the judged round that `undo` undoes" in " ".join(fields["properties"]["round"]["description"].split())


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_a_refinement_ends_with_its_word(http: httpx.Client, word: str, change: str) -> None:
    if change == "delete":
        http.delete(word).raise_for_status()
    http.put(word, content=word_bytes("<pet>", 7)).raise_for_status()
    before = http.get(word).json()

    assert http.post(f"{word}/refine", json={"action": "finish"}).status_code == 409
    assert http.get(word).json() == before


def test_a_word_that_is_given_its_own_name_keeps_its_refinement(http: httpx.Client, word: str) -> None:
    http.patch(word, json={"name": "<pet>"}).raise_for_status()
    judged = http.post(f"{word}/refine", json={"action": "judge", "round": 1, "likes": [1]})
    http.patch(word, json={"name": "<dog>"}).raise_for_status()

    assert judged.json()["round"] == 2
    assert http.post("/v1/words/%3Cdog%3E/refine", json={"action": "undo"}).status_code == 409
    http.delete("/v1/words/%3Cdog%3E").raise_for_status()


@pytest.mark.parametrize("action", [{"action": "start"}, {"action": "judge", "round": 1, "likes": [1]}])
def test_nothing_is_drawn_if_the_store_cannot_be_written(
    server: Running, http: httpx.Client, word: str, action: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise Unavailable("the store cannot be written")

    async def draw(*_: object) -> None:
        raise AssertionError("candidates were drawn")

    with monkeypatch.context() as patch:
        patch.setattr(server.state.refinements, "write", full)
        patch.setattr(refine_api, "_candidates", draw)
        assert http.post(f"{word}/refine", json=action).status_code == 503

    assert http.post(f"{word}/refine", json={"action": "start"}).json()["round"] == 1


def test_a_start_that_is_drawn_while_a_round_is_judged_does_not_undo_the_judgement(
    server: Running, http: httpx.Client, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's dialog is closed after a judgement, and opened again."""
    draw, began, judged = refine_api._candidates, threading.Event(), threading.Event()

    async def slow_start(*arguments: Any) -> Any:
        if not began.is_set():
            began.set()
            await asyncio.to_thread(judged.wait, SECONDS)
        return await draw(*arguments)

    monkeypatch.setattr(refine_api, "_candidates", slow_start)
    with ThreadPoolExecutor(1) as threads, server.client() as other:
        start = threads.submit(other.post, f"{word}/refine", json={"action": "start"})
        assert began.wait(SECONDS)
        second = http.post(f"{word}/refine", json={"action": "judge", "round": 1, "likes": [1]}).json()
        judged.set()
        assert start.result().json()["round"] == 1

    assert second["round"] == 2
    assert http.post(f"{word}/refine", json={"action": "start"}).json() == second


@pytest.mark.parametrize("damage", ["file", "state"])
def test_a_refinement_that_is_damaged_or_of_another_version_is_begun_again(
    server: Running, http: httpx.Client, word: str, damage: str
) -> None:
    http.post(f"{word}/refine", json={"action": "judge", "round": 1, "likes": [1]}).raise_for_status()
    path = "refinements/local/=3cpet=3e.json"
    files = server.state.refinements._files
    record = json.loads(files.read(path) or b"")
    record["refinement"] = json.dumps({**json.loads(record["refinement"]), "added_later": 1})
    files.write(path, b'{"identity": "\xff"}' if damage == "file" else json.dumps(record).encode())

    again = http.post(f"{word}/refine", json={"action": "start"})

    assert (again.status_code, again.json()["round"]) == (200, 1)


def test_a_prompt_of_candidates_may_name_other_words(http: httpx.Client, word: str) -> None:
    def start(prompt: str) -> list[dict[str, Any]]:
        answer = http.post(f"{word}/refine", json={"action": "start", "prompt": prompt})
        answer.raise_for_status()
        candidates: list[dict[str, Any]] = answer.json()["candidates"]
        return candidates

    pictures = []
    for seed in (5, 6):
        http.put("/v1/words/%3Chat%3E", content=word_bytes("<hat>", seed)).raise_for_status()
        pictures.append([candidate["b64_json"] for candidate in start("a photo of a {} and a <hat>")])
    unknown = http.post(f"{word}/refine", json={"action": "start", "prompt": "a {} and a <hat-of-nobody>"})

    assert all(first != second for first, second in zip(*pictures, strict=True))
    assert len({*pictures[0]}) > 1  # they draw the candidates, not the stored word
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "unknown_word")


def test_the_words_of_a_round_are_looked_up_once(
    server: Running, http: httpx.Client, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, calls = server.state.words.resolve, itertools.count()

    async def counted(*arguments: Any) -> dict[str, Concept]:
        next(calls)
        return await resolve(*arguments)

    monkeypatch.setattr(server.state.words, "resolve", counted)
    candidates = http.post(f"{word}/refine", json={"action": "start"}).json()["candidates"]

    assert len(candidates) > 1
    assert next(calls) == 1


def test_two_who_first_refine_a_word_read_the_vocabulary_once(tmp_path: Path) -> None:
    reads: list[Lexicon] = []

    def read() -> Lexicon:
        time.sleep(0.2)  # the other one comes meanwhile
        reads.append(Lexicon({}, lambda encoder, text: []))
        return reads[-1]

    refinements = Refinements(FolderFiles(tmp_path), read)
    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(lambda _: refinements.lexicon(), range(2))]

    assert len(reads) == 1
    assert all(lexicon is reads[0] for lexicon in found)


def test_a_full_queue_leaves_no_candidate_behind(server: Running, http: httpx.Client, word: str) -> None:
    pool, prepared, count = server.state.pool, server.state.pool.prepared, itertools.count()

    def refuse_the_fifth(*arguments: Any, **settings: Any) -> Any:
        if next(count) == 4:
            raise Busy("full", 1)
        return prepared(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "prepared", refuse_the_fifth)
        assert http.post(f"{word}/refine", json={"action": "start"}).status_code == 429
    assert pool.generations(LOCAL) == []
