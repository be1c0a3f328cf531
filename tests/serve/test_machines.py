"""Two `ti-serve` processes that share a word store, behind nginx with the configuration that ships.

Not covered: several hosts, TLS; Ray Serve (tests/serve/test_ray.py).
"""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from oneword.serve.keys import new_key
from tests.serve.machines import NGINX, PUBLIC, Process, Proxy
from tests.serve.running import word_bytes

pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx: apt-get install nginx")

NAMES = ("alice", *(f"user{i}" for i in range(19)))
SMALL = {"steps": 2, "size": "64x64", "guidance_scale": 1}
LONG = {"steps": 900, "size": "64x64"}


@dataclass
class Machines:
    """Two servers, the proxy, and everybody's key."""

    servers: tuple[Process, Process]
    proxy: Proxy
    keys: dict[str, str]

    def client(self, server: Process | None = None, name: str = "alice") -> httpx.Client:
        """A client of the proxy, or of one server."""
        url = self.proxy.url if server is None else server.url
        headers = {"Authorization": f"Bearer {self.keys[name]}", "Host": PUBLIC.removeprefix("http://")}
        return httpx.Client(base_url=url, headers=headers, timeout=120)

    def revive(self) -> None:
        """Starts again what was killed."""
        for server in self.servers:
            if server.process is None:
                server.start()
        for server in self.servers:
            server.wait_ready()


def started(bundle: Path, folder: Path, *options: str) -> Machines:
    pairs = {name: new_key(name) for name in NAMES}
    (folder / "keys.toml").write_text("\n".join(lines for _, lines in pairs.values()))
    options = ("--words", str(folder / "words"), "--keys", str(folder / "keys.toml"), *options)
    options += ("--public-url", PUBLIC, "--trusted-proxy", "127.0.0.1", "--max-rows", "4")
    headers = {"Authorization": f"Bearer {pairs['alice'][0]}"}
    first, second = (Process(bundle, folder / name, options, headers) for name in ("first", "second"))
    proxy = Proxy(folder / "nginx", (first, second))
    proxy.write()
    return Machines((first, second), proxy, {name: key for name, (key, _) in pairs.items()})


@contextlib.contextmanager
def serving(machines: Machines) -> Iterator[Machines]:
    """The servers and their proxy, until the end of the block."""
    try:
        machines.proxy.start()
        machines.revive()
        yield machines
    finally:
        machines.proxy.stop()
        for server in machines.servers:
            server.kill()


@pytest.fixture(scope="module")
def running(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with serving(started(tiny_bundle, tmp_path_factory.mktemp("machines"))) as machines:
        yield machines


@pytest.fixture
def machines(running: Machines) -> Machines:
    running.revive()
    return running


def generate(http: httpx.Client, prompt: str = "a cat", **settings: Any) -> httpx.Response:
    return http.post("/v1/images/generations", json={"prompt": prompt, "seed": 7, **SMALL, **settings})


def test_nginx_finds_no_fault_with_the_configuration(tmp_path: Path) -> None:
    servers = [Process(tmp_path, tmp_path, ()) for _ in range(2)]
    proxy = Proxy(tmp_path / "nginx", servers)
    proxy.write()
    checked = proxy.check()

    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr


def test_both_servers_make_the_same_picture_and_share_the_requests(machines: Machines) -> None:
    before = [server.metric("oneword_pictures_total") for server in machines.servers]
    with machines.client() as http, ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: generate(http), range(16))]
    pictures = {answer.json()["data"][0]["b64_json"] for answer in answers}
    after = [server.metric("oneword_pictures_total") for server in machines.servers]

    assert [answer.status_code for answer in answers] == [200] * 16
    assert sum(after) - sum(before) == 16
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert len(pictures) <= 2  # the seed decides; which pictures shared a batch may round one pixel


def test_a_word_put_on_one_server_is_used_by_the_other_in_its_next_request(machines: Machines) -> None:
    first, second = machines.servers
    with machines.client(first) as left, machines.client(second) as right:
        pictures = []
        for seed in range(4):  # put, then replaced, from either side
            written, read = (left, right) if seed % 2 == 0 else (right, left)
            put = written.put("/v1/words/%3Cshared%3E", content=word_bytes("<shared>", seed, rows=4))
            assert put.status_code in (200, 201), put.text
            pictures.append(generate(read, "a <shared>", steps=8, guidance_scale=7).json()["data"][0]["b64_json"])
            assert generate(read, "a <shared>").status_code == 200
            listed = read.get("/v1/words").json()["data"]
            assert [word["name"] for word in listed] == ["<shared>"]
            assert listed[0]["identity"] == put.json()["identity"]
        assert left.delete("/v1/words/%3Cshared%3E").status_code == 204
        gone = generate(right, "a <shared>")

    assert len(set(pictures)) == 4
    assert gone.status_code == 400


def test_a_stream_passes_event_by_event_and_closing_it_frees_the_row(machines: Machines) -> None:
    def figure(name: str) -> float:
        return sum(server.metric(name) for server in machines.servers)

    ended, cancelled = figure("oneword_pictures_total"), figure("oneword_cancelled_total")
    # One small preview half-way: a proxy that buffered would pass it on together with the finished picture.
    body = {"prompt": "a cat", **LONG, "size": "32x32", "stream": True, "previews": 500}
    with machines.client() as http, http.stream("POST", "/v1/images/generations", json=body) as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: image_generation.preview"
        data = json.loads(next(line for line in lines if line.startswith("data:")).removeprefix("data:"))
        assert data["step"] == 500

    while figure("oneword_pictures_total") == ended:  # the engine notices at the end of its turn
        pass
    assert figure("oneword_cancelled_total") == cancelled + 1
    assert figure("oneword_rows") == 0


def test_a_whole_stream_ends_with_the_picture(machines: Machines) -> None:
    body = {"prompt": "a cat", **SMALL, "steps": 8, "stream": True, "partial_images": 2}
    with machines.client() as http:
        text = http.post("/v1/images/generations", json=body).text

    events = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event:")]
    assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_a_picture_by_address_is_fetched_through_any_server(machines: Machines) -> None:
    with machines.client() as http:
        address = generate(http, response_format="url").json()["data"][0]["url"]
    assert address.startswith(f"{PUBLIC}/v1/pictures/")
    path = address.removeprefix(PUBLIC)

    answers = [httpx.get(server.url + path, timeout=60) for server in (*machines.servers, machines.proxy)]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].content.startswith(b"\x89PNG")


def test_a_key_of_a1111_always_meets_the_same_server_and_keys_spread_over_both(machines: Machines) -> None:
    for name in NAMES:
        with machines.client(name=name) as http:
            assert {http.get("/sdapi/v1/samplers").status_code for _ in range(4)} == {200}

    met = [
        {line["tenant"] for line in server.requests() if line["route"] == "/sdapi/v1/samplers"}
        for server in machines.servers
    ]
    assert met[0] | met[1] == set(NAMES)
    assert met[0] & met[1] == set()
    assert met[0]
    assert met[1]


@pytest.mark.parametrize("name", NAMES[:4])
def test_progress_and_interrupt_reach_the_server_that_makes_the_picture(machines: Machines, name: str) -> None:
    body = {"prompt": "a cat", "steps": 150, "width": 64, "height": 64, "batch_size": 4, "n_iter": 4}
    with machines.client(name=name) as http, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, "/sdapi/v1/txt2img", json=body)
        while (first := http.get("/sdapi/v1/progress").json()["progress"]) == 0:
            assert not answer.done()
        later = [http.get("/sdapi/v1/progress").json()["progress"] for _ in range(4)]
        assert http.post("/sdapi/v1/interrupt").status_code == 200
        interrupted = answer.result()

    assert all(figure >= first for figure in later)
    assert interrupted.status_code == 200
    assert len(interrupted.json()["images"]) < 16


def test_a_large_upload_passes_and_one_beyond_the_limit_is_refused(machines: Machines) -> None:
    with machines.client() as http:
        picture = base64.b64decode(generate(http).json()["data"][0]["b64_json"])
        form = {"prompt": "a cat", "steps": "2", "size": "64x64"}
        padded = picture + bytes(8 << 20)
        large = http.post("/v1/images/edits", data=form, files={"image": ("cat.png", padded, "image/png")})
        beyond = http.put("/v1/words/%3Cbig%3E", content=bytes(17 << 20))

    assert large.status_code == 200, large.text
    assert beyond.status_code == 413


def test_killing_a_server_loses_no_request_that_it_had_not_answered(machines: Machines) -> None:
    victim, survivor = machines.servers
    with machines.client() as http, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(generate, http, **LONG, guidance_scale=1) for _ in range(6)]
        while not all(server.metric("oneword_rows") for server in machines.servers):
            assert not any(answer.done() for answer in waiting)
        victim.kill()
        after = [generate(http).status_code for _ in range(8)]
        words = http.put("/v1/words/%3Ckept%3E", content=word_bytes("<kept>")).status_code
        statuses = [answer.result().status_code for answer in waiting]

    assert after == [200] * 8
    assert words in (200, 201)
    assert statuses == [200] * 6  # those of the victim were made by the other server
    machines.revive()
    with machines.client(victim) as http:
        assert generate(http, "a <kept>").status_code == 200
    assert survivor.process is not None


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Two servers of the miniature, which learn words."""
    pytest.importorskip("torch")
    if exported := os.environ.get("ONEWORD_MINIATURE_BUNDLE"):
        bundle = Path(exported)
    else:
        from tests.bundles import export_once

        bundle = export_once("miniature", tmp_path_factory.mktemp("miniature") / "bundle").bundle.path
    with serving(started(bundle, tmp_path_factory.mktemp("learners"), "--model", "miniature")) as machines:
        yield machines


def test_a_learning_job_is_seen_and_followed_through_either_server(learners: Machines) -> None:
    first, second = learners.servers
    with learners.client() as http:
        made = [generate(http, seed=seed).json()["data"][0]["b64_json"] for seed in range(3)]
        files = [("image[]", (f"{i}.png", base64.b64decode(data), "image/png")) for i, data in enumerate(made)]
        accepted = http.post("/v1/words/learn", data={"name": "<ball>", "init": "ball", "steps": "2"}, files=files)
    assert accepted.status_code == 202, accepted.text
    job = accepted.json()["id"]

    ends = []
    for server in (first, second):
        with learners.client(server) as http:
            assert [entry["id"] for entry in http.get("/v1/jobs").json()["data"]] == [job]
            with http.stream("GET", f"/v1/jobs/{job}/events") as stream:
                events = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event:")]
            ends.append(events[-1])
            assert "progress" in events
            assert http.get(f"/v1/jobs/{job}").json()["status"] == "succeeded"
            shown = http.get(http.get(f"/v1/jobs/{job}").json()["pictures"][0])
            assert shown.status_code == 200
            assert generate(http, "a <ball>").status_code == 200  # the word is everywhere at once

    assert ends == ["done", "done"]
