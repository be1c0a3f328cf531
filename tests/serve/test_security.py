"""What an attacker tries, against the whole server on a real socket: other tenants' things, leaks, files, addresses.

Not covered: limits of connections and bodies by themselves (test_middleware), pictures that are bombs (test_pictures).
"""

import base64
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from oneword.serve.connection import Connection
from oneword.serve.keys import new_key
from tests.serve.conftest import Start
from tests.serve.machines import Process
from tests.serve.running import WIDTH, Running, word_bytes
from tests.serve.test_openai import png
from tests.serve.test_store import hostile_names, snapshot

WORD, PROMPT, TASK = "<alices-word>", "only alice knows this phrase", "task-of-alice"
LONG = {"prompt": PROMPT, "steps": 900, "seed": 1}
PICTURE = base64.b64encode(png()).decode()

Operation = tuple[str, str]


def operations(client: httpx.Client) -> list[Operation]:
    """Method and path of every route that /openapi.json lists."""
    paths = client.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, item in paths.items() for method in item]


def good_request(method: str, path: str) -> dict[str, Any]:
    """A body that a route accepts, where it takes one."""
    picture = {"image": ("a.png", png())}
    small = {"prompt": "a cat", "steps": 2}
    match method, path:
        case "POST", "/v1/images/generations":
            return {"json": small}
        case "POST", "/v1/images/edits" | "/v1/images/variations":
            return {"data": {"prompt": "a cat", "steps": "2"}, "files": picture}
        case "POST", "/v1/words/learn":
            return {
                "data": {"name": "<mine>", "steps": "1"},
                "files": [("image[]", (f"{i}.png", png())) for i in range(3)],
            }
        case "POST", "/v1/words":
            return {"files": {"file": ("mine.safetensors", word_bytes())}, "params": {"replace": True}}
        case "PUT", "/v1/words/{name}":
            return {"content": word_bytes(seed=9)}
        case "PATCH", "/v1/words/{name}":
            return {"json": {"name": "<another>"}}
        case "POST", "/v1/words/{name}/refine":
            return {"json": {"action": "start"}}
        case "POST", "/sdapi/v1/txt2img":
            return {"json": small}
        case "POST", "/sdapi/v1/img2img":
            return {"json": small | {"init_images": [PICTURE]}}
        case "POST", "/sdapi/v1/png-info":
            return {"json": {"image": PICTURE}}
        case "POST", "/sdapi/v1/options":
            return {"json": {}}
        case _:
            return {}


@dataclass
class House:
    """A server with a folder of its own, as two tenants see it."""

    alice: Running
    bob: Running
    folder: Path


@pytest.fixture(scope="module")
def house(start_server: Start, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    (folder / "keys.toml").write_text(f"{first}max_words = 20000\n{second}")
    settings = {"keys": folder / "keys.toml", "model": str(tiny_model_dir), "jobs": folder / "jobs", "max_wait": 1e6}
    running = start_server(words=str(folder / "store"), **settings)
    return House(Running(running.url, running.state, alice), Running(running.url, running.state, bob), folder)


@dataclass
class Belongings:
    """What alice has while bob looks for it."""

    job: str
    generations: list[str]
    answers: list[httpx.Response]
    """To those requests that are done."""


@contextlib.contextmanager
def belongings(alice: httpx.Client) -> Iterator[Belongings]:
    """A word, a job, and two requests in progress, one of them in A1111's dialect."""
    assert alice.put(f"/v1/words/{WORD}", content=word_bytes(WORD, 1)).status_code in (200, 201)
    pictures = [("image[]", (f"{i}.png", png())) for i in range(3)]
    fields = {"name": "<alices-next>", "init": "toy", "steps": "500"}
    job = alice.post("/v1/words/learn", data=fields, files=pictures).json()
    answers: list[httpx.Response] = []
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/v1/images/generations", LONG | {"size": "256x256"}),
        ("/sdapi/v1/txt2img", LONG | {"width": 256, "height": 256, "force_task_id": TASK}),
    ]

    def call(path: str, body: dict[str, Any]) -> None:
        answers.append(alice.post(path, json=body, timeout=None))

    threads = [threading.Thread(target=call, args=arguments) for arguments in calls]
    for thread in threads:
        thread.start()
    while len(queue := alice.get("/v1/queue").json()["data"]) < 2:
        assert not answers, answers[0].text
    try:
        yield Belongings(job["id"], [item["id"] for item in queue], answers)
    finally:
        for item in alice.get("/v1/queue").json()["data"]:
            alice.delete(f"/v1/queue/{item['id']}")
        for thread in threads:
            thread.join(60)
        assert alice.delete(f"/v1/jobs/{job['id']}").json()["status"] in ("cancelled", "succeeded")


def test_bob_finds_nothing_of_alice_on_any_route(house: House) -> None:
    with house.alice.client() as alice, house.bob.client() as bob, belongings(alice) as hers:
        names = {"id": hers.job, "name": WORD, "model": house.bob.state.name}
        known = [WORD, WORD.strip("<>"), PROMPT, TASK, hers.job, *hers.generations, "alices-next", "alice"]
        checked = 0
        for method, path in operations(bob):
            if "queue" in path:
                names["id"] = hers.generations[0]
            if "pictures/{name}" in path:
                names["name"] = "picture-1.png"
            address = path.format_map(names)
            names |= {"id": hers.job, "name": WORD}
            foreign = "{id}" in path or ("{name}" in path and method != "PUT")
            answer = bob.request(method, address, **good_request(method, path))
            if foreign:
                assert answer.status_code == 404, (method, path, answer.text)
                missing = bob.request(method, re.sub(r"\{\w+\}", "0" * 32, path), **good_request(method, path))
                assert masked(answer, address) == masked(missing, "0" * 32), "a 404 must not tell whether it exists"
                checked += 1
            else:
                assert answer.status_code < 500, (method, path, answer.text)
                text = answer.text + str(answer.headers)
                if method != "PUT":  # where bob has just put a word of this name
                    assert [item for item in known if item in text] == [], (method, path)
            if method == "PUT":
                assert bob.delete(address).status_code == 204

        assert checked >= 9
        assert bob.get("/sdapi/v1/progress", params={"force_task_id": TASK}).json()["progress"] == 0
        bob.post("/sdapi/v1/interrupt", params={"force_task_id": TASK})
        refused = bob.post("/v1/images/generations", json={"prompt": "<alices-wor>"})
        assert refused.status_code == 400
        assert WORD not in refused.text
        assert len(alice.get("/v1/queue").json()["data"]) + len(hers.answers) == 2
        for body in (answer.json() for answer in hers.answers):  # not one was cut short
            assert len(body.get("data") or body["images"]) == 1
        assert alice.get(f"/v1/words/{WORD}").json()["generation"] >= 1
        assert alice.get(f"/v1/jobs/{hers.job}").json()["status"] in ("queued", "running", "succeeded")


def masked(answer: httpx.Response, address: str) -> str:
    """A 404's text without what was asked for."""
    asked = address.rpartition("/")[2]
    return re.sub(r"'[^']*'", "''", answer.text.replace(asked, ""))


def test_a_page_of_another_site_and_a_rebound_name_get_nothing_on_any_route(house: House) -> None:
    attacks = [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost.evil.example:8000"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://localhost.evil.example"},
        {"Origin": "file://"},
    ]
    with house.alice.client() as alice:
        before = alice.get("/v1/words").json()
        routes = [*operations(alice), ("GET", "/"), ("GET", "/static/page.js"), ("GET", "/openapi.json")]
        for index, (method, path) in enumerate(routes):
            address = path.format_map({"id": "0" * 32, "name": "<attacked>", "model": "x"})
            for attack in (attacks[index % len(attacks)], {"Origin": "http://evil.example"}):
                answer = alice.request(method, address, headers=attack, **good_request(method, path))
                assert (answer.status_code, answer.headers["connection"]) == (403, "close"), (method, path, attack)
                assert "access-control-allow-origin" not in answer.headers
        assert alice.get("/v1/words").json() == before


def test_a_browser_asks_again_for_each_file_of_the_page_after_an_update(house: House) -> None:
    """Without Cache-Control it may keep a file for a part of its age (RFC 9111, 4.2.2): old modules beside new ones."""
    with house.alice.client() as alice:
        for path in ("/", "/static/main.js", "/static/css/base.css"):
            answer = alice.get(path)
            again = alice.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")
            assert again.status_code in (200, 304)
            assert again.headers["cache-control"] == "no-cache"


def routes_with_bodies(client: httpx.Client) -> list[Operation]:
    """The routes whose requests have a body, with addresses."""
    paths = client.get("/openapi.json").json()["paths"]
    names = {"id": "0" * 32, "name": "toy", "model": "x"}
    found = [(m.upper(), path) for path, item in paths.items() for m, route in item.items() if "requestBody" in route]
    return [(method, path.format_map(names)) for method, path in found]


@pytest.mark.parametrize("framing", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_a_wrong_key_is_refused_after_64_kib_of_a_body_of_1_gib_on_every_route(
    house: House, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    received = Connection.data_received
    read: dict[Connection, int] = {}

    def counted(self: Connection, data: bytes) -> None:
        read[self] = read.get(self, 0) + len(data)
        received(self, data)

    monkeypatch.setattr(Connection, "data_received", counted)
    address = httpx.URL(house.alice.url)
    piece = bytes(1 << 20) if "Length" in framing else b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with house.alice.client() as alice:
        routes = routes_with_bodies(alice)
    read.clear()
    for method, path in routes:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", framing, "Authorization: Bearer wrong"]
        lines += ["Content-Type: multipart/form-data; boundary=x", "", ""]
        with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall("\r\n".join(lines).encode())
                for _ in range(1024):
                    connection.sendall(piece)
            with contextlib.suppress(ConnectionError):  # of what was sent after the answer
                while part := connection.recv(65536):
                    answer += part

        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 "), (method, path, answer)
        refusal = json.loads(body)
        assert "key" in (refusal["detail"] if path.startswith("/sdapi/") else refusal["error"]["message"])

    assert len(routes) >= 12
    assert {path for _, path in routes} >= {"/v1/images/edits", "/v1/words/learn", "/v1/words/toy/refine"}
    assert len(read) == len(routes)
    assert max(read.values()) <= 64 << 10


def test_an_address_instead_of_a_picture_is_refused_and_never_fetched(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, house.alice.client() as alice:
        port = listener.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}/a.png", f"HTTPS://127.0.0.1:{port}/a.png", f"//127.0.0.1:{port}/a.png"]
        urls += [f"ftp://127.0.0.1:{port}/a", "file:///etc/passwd", f"s3://127.0.0.1:{port}/a", "/etc/passwd"]
        for url in urls:
            upload, word = {"image": (url, url.encode())}, {"file": (url, url.encode())}
            calls: list[tuple[str, dict[str, Any]]] = [
                ("/v1/images/generations", {"json": {"prompt": "a cat", "image": url}}),
                ("/v1/images/generations", {"json": {"prompt": "a cat", "response_format": url}}),
                ("/v1/images/edits", {"data": {"prompt": "a cat", "image": url}, "files": {"mask": png()}}),
                ("/v1/images/edits", {"data": {"prompt": "a cat"}, "files": upload}),
                ("/v1/images/edits", {"data": {"prompt": "a cat", "mask": url}, "files": {"image": png()}}),
                ("/v1/images/variations", {"files": upload}),
                ("/v1/words", {"files": word}),
                ("/v1/words/learn", {"data": {"name": "<a>", "image[]": url}, "files": upload}),
                ("/v1/words/learn", {"data": {"name": "<a>", "init": url}, "files": [("image[]", png())] * 3}),
                ("/sdapi/v1/img2img", {"json": {"init_images": [url]}}),
                ("/sdapi/v1/img2img", {"json": {"init_images": [PICTURE], "mask": url}}),
                ("/sdapi/v1/png-info", {"json": {"image": url}}),
            ]
            for path, body in calls:
                answer = alice.post(path, **body)
                assert 400 <= answer.status_code < 500, (path, url, answer.text)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def multipart(
    parts: list[tuple[str, bytes, bytes]], fields: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Field, raw file name and content, as a client that escapes nothing sends them."""
    body = b""
    for field, text in fields.items():
        body += f'--cut\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{text}\r\n'.encode()
    for field, name, content in parts:
        body += b'--cut\r\nContent-Disposition: form-data; name="' + field.encode() + b'"; filename="' + name + b'"\r\n'
        body += b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=cut"}
    return {"content": body + b"--cut--\r\n", "headers": headers}


def batches(names: list[bytes], size: int) -> list[list[bytes]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def test_ten_thousand_hostile_file_names_touch_nothing_outside_the_store(house: House) -> None:
    quoted = [name.encode("utf-8", "surrogatepass") for name in hostile_names(10_000)]
    safe = re.compile(rb'["\r\n\x00]')
    target = str(house.folder / "written").encode()
    names = [safe.sub(b"_", name) + random.Random(name).choice([b"", b".safetensors", b"/"]) for name in quoted]
    names[::50] = [b"../" * (i % 9) + target for i in range(len(names[::50]))]
    data = safetensors.numpy.save({"emb_params": np.full((1, WIDTH), 0.1, np.float32)})  # the file's name is the word's
    store = house.folder / "store"

    def outside() -> dict[str, tuple[int, int, int]]:
        return {path: stat for path, stat in snapshot(house.folder).items() if not path.startswith(("store", "jobs"))}

    def send(path: str, body: dict[str, Any]) -> httpx.Response:
        answer = alice.post(path, **body)
        if answer.status_code == 202:  # before its learning takes time
            alice.delete(f"/v1/jobs/{answer.json()['id']}").raise_for_status()
        return answer

    before = outside()
    picture, no_picture = png(16), b"no picture"
    with house.alice.client() as alice, ThreadPoolExecutor(4) as threads:
        words, learned, edited, undecodable = names[:2000], names[2000:2075], names[2075:2275], names[2275:]
        calls = [("/v1/words?replace=true", multipart([("file", name, data)])) for name in words]
        for index, batch in enumerate(batches(learned, 5)):
            fields = {"name": f"<hostile-{index}>", "init": "toy", "steps": "5000"}
            calls.append(("/v1/words/learn", multipart([("image[]", name, picture) for name in batch], fields)))
        for batch in batches(edited, 10):
            fields = {"prompt": "a cat", "steps": "2", "size": "64x64"}
            calls.append(("/v1/images/edits", multipart([("image[]", name, picture) for name in batch], fields)))
        for index, batch in enumerate(batches(undecodable, 8)):
            path = ("/v1/words/learn", "/v1/images/edits")[index % 2]
            calls.append((path, multipart([("image[]", name, no_picture) for name in batch])))
        answers = list(threads.map(lambda call: send(*call), calls))
        bodies = [answer.json() for answer in answers if answer.is_success]
        stored = [body["name"] for body in bodies if body.get("object") == "word"]
        jobs = [body["id"] for body in bodies if body.get("object") == "job"]
        for name in [*dict.fromkeys(stored)][:50]:
            path = httpx.URL(house.alice.url).copy_with(raw_path=b"/v1/words/" + quote(name) + b"/file")
            disposition = alice.get(path).headers["content-disposition"]
            assert re.fullmatch(r'attachment; filename="[^"/\\\r\n]+\.safetensors"', disposition)

    assert {answer.status_code for answer in answers} <= {200, 201, 202, 400, 422}
    assert len(set(stored)) >= 1000
    assert len(jobs) == 15
    assert [len(body["data"]) for body in bodies if "data" in body] == [10] * 20
    assert len(stored) >= 1750
    assert outside() == before
    for path in store.rglob("*"):
        assert not path.is_symlink()
        assert path.parts[len(store.parts)] in ("store.json", "names", "blobs", "results", "jobs", "servers")


def quote(name: str) -> bytes:
    return "".join(f"%{byte:02X}" for byte in name.encode()).encode()


def test_the_quotas_of_a_key_hold_over_http_and_say_what_is_allowed(start_server: Start, tmp_path: Path) -> None:
    (words, first), (size, second), (steps, third) = new_key("words"), new_key("bytes"), new_key("steps")
    tables = [f"{first}max_words = 2\n", f"{second}max_bytes = 3000\n", f"{third}pixel_steps_per_minute = 20000\n"]
    (tmp_path / "keys.toml").write_text("".join(tables))
    running = start_server(keys=tmp_path / "keys.toml")

    def put(key: str, name: str, rows: int = 1) -> httpx.Response:
        with Running(running.url, running.state, key).client() as client:
            return client.put(f"/v1/words/{name}", content=word_bytes(rows=rows))

    def refusal(answer: httpx.Response) -> tuple[int, str, str]:
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["message"]

    assert [put(words, name).status_code for name in ("a", "b", "a")] == [201, 201, 200]
    message = "you have 2 words, and may have at most 2: delete some first"
    assert refusal(put(words, "c")) == (403, "quota_exceeded", message)
    assert put(size, "a").status_code == 201
    status, code, message = refusal(put(size, "b", rows=40))
    assert (status, code) == (403, "quota_exceeded")
    expected = r"this word has \d+ bytes and your others have \d+, but together they may have at most 3000: .+"
    assert re.fullmatch(expected, message)
    assert put(size, "b").status_code == 201

    with Running(running.url, running.state, steps).client() as client:
        body = {"prompt": "a cat", "steps": 4, "width": 64, "height": 64}
        assert client.post("/sdapi/v1/txt2img", json=body).status_code == 200
        answers = [
            client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 4}),
            client.post("/sdapi/v1/txt2img", json=body),
        ]
    text = r"this request has 16384 pixel-steps and \d+ of 20000 per minute are left: send it again later, .+"
    assert [answer.status_code for answer in answers] == [429, 429]
    assert answers[0].json()["error"]["code"] == "quota_exceeded"
    assert re.fullmatch(text, answers[0].json()["error"]["message"])
    assert re.fullmatch(text, answers[1].json()["detail"])
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers)


@dataclass
class Keyed(Process):
    """A `ti-serve` with keys, on its own port."""

    key: str = ""

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def await_line(self, pattern: str, count: int = 1) -> str:
        """Waits until the log has a line that matches, for the `count`th time."""
        while len(found := re.findall(pattern, self.log)) < count:
            assert self.running.poll() is None, self.log
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running.wait(0.05)
        return str(found[count - 1])

    def client(self, key: str | None = None, address: str = "127.0.0.1") -> httpx.Client:
        """A client with the right key, or another, from an address of this machine."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        transport = httpx.HTTPTransport(local_address=address)
        return httpx.Client(base_url=self.url, headers=headers, transport=transport, timeout=60)


@pytest.fixture
def process(tiny_bundle: Path, tiny_model_dir: Path, tmp_path: Path) -> Iterator[Keyed]:
    key, table = new_key("alice")
    (tmp_path / "keys.toml").write_text(table)
    options = [
        "--words",
        str(tmp_path / "store"),
        "--keys",
        str(tmp_path / "keys.toml"),
        "--model",
        str(tiny_model_dir),
    ]
    found = Keyed(tiny_bundle, tmp_path, options, environment={"PYTHONUNBUFFERED": "1"}, key=key)
    found.start()
    try:
        found.wait_ready()
        yield found
    finally:
        found.kill()


def test_the_key_file_is_read_again_on_sighup_and_a_broken_one_changes_nothing(process: Keyed) -> None:
    def status(key: str) -> int:
        with process.client(key) as client:
            return client.get("/v1/words").status_code

    key, table = new_key("carol")
    assert [status(process.key), status(key)] == [200, 401]
    (process.folder / "keys.toml").write_text(table + new_key("eve")[1])
    process.running.send_signal(signal.SIGHUP)
    process.await_line("read 2 keys")
    assert [status(process.key), status(key)] == [401, 200]
    (process.folder / "keys.toml").write_text(table + "[dave]\nsha256 = 'short'\n")
    process.running.send_signal(signal.SIGHUP)
    process.await_line(r"the keys stay as they were: the file of --keys: sha256 of \[dave\]")
    assert [status(process.key), status(key)] == [401, 200]


CLIENT = "127.0.0.77"
"""The clients' address, which is not the server's."""
SECRET = "zebra-in-a-secret-prompt"
PUBLIC = ("/health", "/health/live", "/health/ready")


def test_no_key_prompt_path_address_or_traceback_is_in_any_answer_or_log(process: Keyed) -> None:
    wrong_key = "ow_this-key-is-wrong"
    answers: list[httpx.Response] = []
    refused: list[httpx.Response] = []
    with process.client(address=CLIENT) as client, process.client(wrong_key, CLIENT) as stranger:
        for method, path in operations(client):
            address = path.format_map({"id": SECRET, "name": f"<{SECRET}>", "model": SECRET})
            answers += [client.request(method, address, **body) for body in secret_requests(method, path)]
            refused += [stranger.request(method, address, **body) for body in secret_requests(method, path)]
        answers += [client.post(path, **body) for path, body in bad_requests()]
        answers += failures(client, process.folder)
    process.running.terminate()
    process.running.wait(60)

    assert {answer.status_code for answer in answers} >= {200, 400, 404, 422}
    closed = [answer for answer in refused if answer.request.url.path not in PUBLIC]
    assert {answer.status_code for answer in closed if "/v1/pictures/" not in answer.request.url.path} == {401}
    assert [answer.text for answer in closed if SECRET in f"{answer.headers} {answer.text}"] == []
    answers += refused
    assert len(answers) > 250
    never = [process.key, wrong_key, str(process.folder), CLIENT, "Traceback", 'File "', str(Path(__file__).parents[2])]
    for answer in answers:
        text = f"{answer.headers} {answer.text}"
        assert [word for word in never if word in text] == [], (answer.request.url, text[:500])
        if answer.status_code >= 400:
            assert not re.search(r"\b0x[0-9a-f]{6,}", text)
            assert "\n" not in answer.text
    log = process.log
    assert log.count('"route"') >= len(answers)
    assert [word for word in [*never, SECRET, "a cat"] if word in log] == []
    assert not re.search(r"0x[0-9a-f]{6,}", log)
    for line in re.findall(r"oneword\.access INFO (.*)", log):
        assert json.loads(line).keys() == {"method", "route", "status", "seconds", "bytes", "tenant", "id"}


def secret_requests(method: str, path: str) -> list[dict[str, Any]]:
    """A good request to a route and two bad ones, all with a secret in them."""
    bodies = [{"content": b"\xff{" + SECRET.encode()}, {"json": {"prompt": 5, SECRET: SECRET}}]
    return [good_request(method, path) | {"params": {"q": SECRET}}, *bodies]


def bad_requests() -> list[tuple[str, dict[str, Any]]]:
    """Requests that fail in many places, with a prompt in most of them."""
    prompts = [SECRET, f"({SECRET}:99999)", f"<{SECRET}>", f"embedding:{SECRET}", SECRET + "\x00", f"[{SECRET}" * 99]
    settings: list[dict[str, Any]] = [
        {"size": "63x64"},
        {"size": "99999x8"},
        {"steps": 0},
        {"sampler": SECRET},
        {"model": SECRET},
        {"n": 10, "steps": 1000, "stream": True, "partial_images": 9},
        {"stream": True, "steps": 2},
        {"output_format": "gif"},
        {"guidance_interval": [1]},
        {"seed": 1 << 70},
    ]
    damaged = png()[:40] + b"\0" * 40
    calls: list[tuple[str, dict[str, Any]]] = []
    for index, prompt in enumerate(prompts):
        for setting in settings[index % 2 :: 2]:
            calls.append(("/v1/images/generations", {"json": {"prompt": prompt} | setting}))
            calls.append(("/sdapi/v1/txt2img", {"json": {"prompt": prompt, "steps": 2} | setting}))
        for file in (damaged, b"", SECRET.encode(), b"GIF89a" + bytes(99)):
            upload = {"image": (f"{SECRET}.png", file)}
            calls.append(("/v1/images/edits", {"data": {"prompt": prompt}, "files": upload}))
            text = base64.b64encode(file).decode()
            calls.append(("/sdapi/v1/img2img", {"json": {"prompt": prompt, "init_images": [text]}}))
            calls.append(("/v1/words", {"files": {"file": (f"{SECRET}.pt", file)}}))
            calls.append(("/v1/words/learn", {"data": {"name": SECRET}, "files": [("image[]", file)] * 3}))
    return calls


def failures(client: httpx.Client, folder: Path) -> list[httpx.Response]:
    """The server's own failures: its store is damaged while it runs."""
    assert client.put("/v1/words/broken", content=word_bytes(seed=5)).status_code == 201
    for record in (folder / "store" / "names").rglob("*broken*"):
        record.write_text(f"not a record, {SECRET}")
    (folder / "store" / "results").rmdir() if (folder / "store" / "results").is_dir() else None
    (folder / "store" / "results").write_text("not a folder")
    body = {"prompt": SECRET, "steps": 2, "response_format": "url"}
    calls: list[Callable[[], httpx.Response]] = [
        lambda: client.get("/v1/words/broken"),
        lambda: client.get("/v1/words/broken/file"),
        lambda: client.get("/v1/words"),
        lambda: client.post("/v1/images/generations", json={"prompt": f"{SECRET} <broken>"}),
        lambda: client.post("/v1/images/generations", json=body),
    ]
    found = [call() for call in calls]
    assert {answer.status_code for answer in found} & {500, 503}
    return found
