"""The life of a real `ti-serve`, from its start to its end: wrong arguments, signals, kill -9, failures, hangs.

Nothing of the product helps: an engine breaks by a `sitecustomize` that Python imports before anything else. Not
covered: the watchdog by itself (tests/serve/test_watchdog.py), and a job's bits after kills (tests/serve/test_jobs.py).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.machines import Process
from tests.serve.running import word_bytes
from tests.serve.test_jobs import photos

SECONDS = 240.0
"""More than anything here takes: a test that waits for so long fails."""
MIB = 1 << 20
LONG = {"prompt": "a cat", "steps": 900, "size": "64x64", "seed": 1}
BROKEN = """
import os, pathlib
if "ONEWORD_HEARTBEAT" in os.environ:  # the server, not its parent
    import ctypes
    from oneword.runtime.scheduler import Scheduler
    order, step = pathlib.Path(os.environ["ORDER"]), Scheduler.step
    def breaking(self):
        events = step(self)
        if order.exists() and self.rows:
            order.rename(order.with_suffix(".done"))
            {action}
        return events
    Scheduler.step = breaking
"""
ACTIONS = {
    "exception": "raise ZeroDivisionError('injected')",
    "hang": "ctypes.PyDLL(None).sleep(100000)  # unlike CDLL, it keeps the interpreter's lock",
}

Serve = Callable[..., Process]


@pytest.fixture
def serve(tiny_bundle: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts servers and waits until they are ready; nothing of them is left at the end."""
    servers: list[Process] = []

    def start(*options: str, **environment: str) -> Process:
        folder = tmp_path / f"server{len(servers)}"
        words = ("--words", str(tmp_path / "words"), "--max-rows", "4", "--max-wait", "100000")
        servers.append(Process(tiny_bundle, folder, (*words, *options), environment=environment))
        servers[-1].start()
        servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def run(*arguments: object, prefix: Sequence[str] = (), **environment: str) -> tuple[int, str, str]:
    """Exit status and output of a `ti-serve` that ends by itself, once no process of it is left."""
    mark = uuid.uuid4().hex
    command = [*prefix, sys.executable, "-m", "oneword.serve.cli", *map(str, arguments)]
    env = {**os.environ, **environment, "ONEWORD_MARK": mark}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env, check=False)
    assert not marked(mark)
    return done.returncode, done.stdout, done.stderr


def marked(mark: str) -> list[int]:
    """The processes with this mark in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def refused(arguments: Sequence[object], **options: Any) -> tuple[int, str]:
    """Exit status and the one line on standard error of a `ti-serve` that cannot start."""
    status, output, errors = run(*arguments, **options)
    lines = errors.splitlines()
    assert output == ""
    assert len(lines) == 1, errors
    assert lines[0].startswith("ti-serve: ")
    return status, lines[0]


def wait_for(condition: Callable[[], Any], server: Process) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, server.log[-3000:]
        time.sleep(0.05)
    return value


def generate(server: Process, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json={**LONG, **fields}, timeout=SECONDS)


def readiness(server: Process) -> int:
    return httpx.get(f"{server.url}/health/ready", timeout=SECONDS).status_code


def python_path(folder: Path) -> str:
    """This process's PYTHONPATH, if it has one, after a folder."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def in_progress(server: Process) -> int:
    """The number of requests that have been accepted and are not done."""
    return len(httpx.get(f"{server.url}/v1/queue", timeout=SECONDS).json()["data"])


def end(server: Process) -> int:
    assert server.process is not None
    return server.process.wait(SECONDS)


# ---- before it serves ------------------------------------------------------------------------------------------------


def test_a_check_makes_a_picture_and_prints_the_figures(tiny_bundle: Path, tmp_path: Path) -> None:
    options = [tiny_bundle, "--check", "--words", tmp_path / "words", "--engine", "onnxruntime", "--threads", "1"]

    status, output, errors = run(*options)
    assert (status, errors) == (0, "")
    lines = dict(line.split(": ", 1) for line in output.splitlines())
    status, output, errors = run(*options, "--json")
    assert (status, errors) == (0, "")
    figures = json.loads(output)

    assert set(figures) == {"model", "backend", "ready_seconds", "picture_seconds", "size", "steps", "slots"}
    assert {name.replace("_", " ") for name in figures} == set(lines)
    assert figures["slots"] == 16
    assert figures["picture_seconds"] > 0
    assert "onnxruntime" in figures["backend"].lower()


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no bundle": ([], 2, "no bundle was given"),
    "another folder": (["{folder}"], 2, "is not a bundle"),
    "an unknown option": (["{bundle}", "--prot", "80"], 2, "--port"),
    "a port out of range": (["{bundle}", "--port", "65536"], 2, "--port is 65536"),
    "no key file": (["{bundle}", "--keys", "{folder}/none"], 2, "there is no key file"),
    "a broken key file": (["{bundle}", "--keys", "{folder}/broken.toml"], 1, "not valid TOML"),
    "a used port": (["{bundle}", "--port", "{used}"], 2, "cannot listen at 127.0.0.1 port {used}"),
    "a name for an address": (["{bundle}", "--host", "no.such.host.invalid", "--keys", "{folder}/keys"], 2, "listen"),
    "a store in a file": (["{bundle}", "--words", "{folder}/broken.toml/words"], 2, "--words"),
    "a store of no kind": (["{bundle}", "--words", "nonsense://x"], 2, "--words nonsense://"),
    "an open address": (["{bundle}", "--host", "0.0.0.0"], 2, "protect it with --keys FILE"),
    "a model that is none": (["{bundle}", "--model", "{folder}/none", "--jobs", "{folder}/jobs"], 2, "--model"),
}


@pytest.mark.parametrize(("arguments", "status", "text"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_wrong_is_one_line_and_leaves_no_process(
    tiny_bundle: Path, tmp_path: Path, arguments: list[str], status: int, text: str
) -> None:
    """A server that cannot start is not started again either."""
    (tmp_path / "broken.toml").write_text("[alice\n")
    (tmp_path / "keys").write_text(f'[alice]\nsha256 = "{"0" * 64}"\n')
    with socket.create_server(("127.0.0.1", 0)) as used:
        values = {"bundle": tiny_bundle, "folder": tmp_path, "used": used.getsockname()[1]}
        command = [argument.format(**values) for argument in arguments]
        command += ["--supervise"]
        command += ["--words", str(tmp_path / "words")] if "--words" not in command else []
        command += ["--port", "0"] if "--port" not in command else []

        assert (found := refused(command))[0] == status, found
        assert text.format(**values) in found[1]


def test_a_store_that_can_only_be_read_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    (words / "store.json").write_text('{"version": 1}\n')
    no_writes = ("bash", "-c", 'ulimit -f 0; exec "$@"', "-")  # unlike a folder's rights, it holds for root too

    status, line = refused([tiny_bundle, "--port", "0", "--words", words], prefix=no_writes)

    assert status == 2
    assert "--words cannot be read and written" in line


def test_a_model_with_other_weights_is_one_line_and_is_not_started_again(
    tiny_bundle: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = next((model / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    options = ["--model", model, "--jobs", tmp_path / "jobs", "--words", tmp_path / "words", "--port", "0"]

    for more in (["--supervise"], ["--check"]):
        status, line = refused([tiny_bundle, *options, *more])
        assert status == 2
        assert "have different weights" in line


def test_a_model_that_cannot_be_opened_ends_the_server_with_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """It listens by then, and has said so."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import os
        if "ONEWORD_HEARTBEAT" in os.environ:
            from oneword.engines.errors import EngineError
            from oneword.runtime.model import Model
            def fail(*args, **options):
                raise EngineError("the graph cannot be opened")
            Model.open = fail
        """)
    )
    path = python_path(tmp_path)
    options = [tiny_bundle, "--words", tmp_path / "words", "--port", "0"]

    status, _, errors = run(*options, "--supervise", PYTHONPATH=path)
    requests = [line for line in errors.splitlines() if "INFO" not in line]
    assert (status, requests) == (1, ["ti-serve: the graph cannot be opened"])
    assert refused([*options, "--check"], PYTHONPATH=path) == (1, "ti-serve: the graph cannot be opened")


# ---- while it serves -------------------------------------------------------------------------------------------------


def test_the_parent_stays_small(serve: Serve) -> None:
    server = serve()
    assert server.process is not None

    status = Path(f"/proc/{server.process.pid}/status").read_text()
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()

    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    assert int(match[1]) * 1024 < 60 * MIB
    assert not re.search("numpy|pydantic|onnxruntime", mapped)
    assert re.search("numpy", Path(f"/proc/{server.server}/maps").read_text())


def test_sigterm_under_load_finishes_all_that_was_accepted(serve: Serve) -> None:
    server = serve()
    assert server.process is not None
    with ThreadPoolExecutor(6) as threads, httpx.Client(base_url=server.url, timeout=SECONDS) as http:
        answers = [threads.submit(generate, server, n=2, steps=400, stream=number % 2 == 1) for number in range(6)]
        wait_for(lambda: in_progress(server) == 6, server)
        server.process.terminate()
        wait_for(lambda: readiness(server) == 503, server)

        assert http.get("/health/live").status_code == 200
        refusal = http.post("/v1/images/generations", json=LONG)
        assert in_progress(server) > 0
        for answer in answers:
            assert answer.result().status_code == 200
    assert end(server) == 0

    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "unavailable")
    assert int(refusal.headers["Retry-After"]) >= 1
    for number, answer in enumerate(answers):
        text = answer.result().text
        count = text.count("event: image_generation.completed") if number % 2 else len(json.loads(text)["data"])
        assert count == 2
        assert "event: error" not in text
    assert "Traceback" not in server.log


def test_a_second_sigterm_ends_it_soon_with_an_error_for_each_request(serve: Serve) -> None:
    server = serve("--drain-seconds", "100000")
    assert server.process is not None
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(generate, server, n=10, stream=number % 2 == 1) for number in range(4)]
        wait_for(lambda: in_progress(server) == 4, server)
        server.process.terminate()
        wait_for(lambda: readiness(server) == 503, server)
        server.process.terminate()
        assert end(server) == 0

    for number, answer in enumerate(answers):
        if number % 2:
            assert answer.result().text.count("event: error") == 1
        else:
            assert answer.result().status_code == 503
        assert "the server stops" in answer.result().text
    assert "Traceback" not in server.log


def test_a_stream_of_a_jobs_events_does_not_keep_it_alive(serve: Serve, tiny_model_dir: Path) -> None:
    server = serve("--model", str(tiny_model_dir))
    assert server.process is not None
    job = learn(server, steps=1000)

    with httpx.stream("GET", f"{server.url}/v1/jobs/{job}/events", timeout=SECONDS) as events:
        lines = events.iter_lines()
        next(lines)
        server.process.terminate()
        for _ in lines:
            pass
    assert end(server) == 0
    assert "Traceback" not in server.log


def test_after_kill_9_it_is_back_with_its_words_jobs_and_kept_results(serve: Serve, tiny_model_dir: Path) -> None:
    server = serve("--supervise", "--model", str(tiny_model_dir))
    word = httpx.put(f"{server.url}/v1/words/<toy>", content=word_bytes(), timeout=SECONDS).json()
    job = learn(server, steps=20)
    body = {"prompt": "a cat", "steps": 2, "response_format": "url"}

    def answer_with_key() -> httpx.Response:
        address, headers = f"{server.url}/v1/images/generations", {"Idempotency-Key": "key"}
        return httpx.post(address, json=body, headers=headers, timeout=SECONDS)

    answer = answer_with_key()
    picture = httpx.get(answer.json()["data"][0]["url"], timeout=SECONDS).content
    first = server.server
    assert first is not None
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(generate, server, n=10)
        wait_for(lambda: in_progress(server) >= 1, server)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            lost.result()
    wait_for(lambda: server.server not in (None, first), server)
    server.wait_ready()

    assert httpx.get(f"{server.url}/v1/words/<toy>", timeout=SECONDS).json() == word
    assert generate(server, prompt="a <toy>", steps=2).status_code == 200
    again = answer_with_key()
    assert again.content == answer.content
    assert httpx.get(again.json()["data"][0]["url"], timeout=SECONDS).content == picture

    def ended() -> Any:
        body = httpx.get(f"{server.url}/v1/jobs/{job}", timeout=SECONDS).json()
        return body if body["status"] not in ("queued", "running") else None

    assert wait_for(ended, server)["status"] == "succeeded"
    assert httpx.get(f"{server.url}/v1/words/<learned>", timeout=SECONDS).status_code == 200


@pytest.mark.parametrize(
    ("kind", "report"), [("exception", "the engine failed"), ("hang", "the server was silent for 8 seconds")]
)
def test_a_broken_engine_is_noticed_and_started_again(serve: Serve, tmp_path: Path, kind: str, report: str) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BROKEN.replace("{action}", ACTIONS[kind]))
    path = python_path(tmp_path / "path")
    server = serve("--supervise", "--hang-seconds", "8", PYTHONPATH=path, ORDER=str(tmp_path / "order"))
    httpx.put(f"{server.url}/v1/words/<toy>", content=word_bytes(), timeout=SECONDS).raise_for_status()
    first = server.server

    (tmp_path / "order").touch()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(generate, server)
        wait_for(lambda: server.server not in (None, first), server)
        server.wait_ready()
        if kind == "exception":
            assert answer.result().status_code == 503
        else:
            assert isinstance(answer.exception(), httpx.TransportError)

    assert report in server.log
    assert "starting it again" in server.log
    assert "injected" not in server.log
    assert generate(server, prompt="a <toy>", steps=2).status_code == 200


def test_a_broken_engine_ends_a_server_that_is_not_supervised(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BROKEN.replace("{action}", ACTIONS["exception"]))
    path = python_path(tmp_path / "path")
    server = serve(PYTHONPATH=path, ORDER=str(tmp_path / "order"))

    (tmp_path / "order").touch()
    answer = generate(server)

    assert answer.status_code == 503
    assert end(server) == 1
    assert "the engine failed" in server.log
    assert "Traceback" not in server.log


def learn(server: Process, *, steps: int) -> str:
    """The id of a new job that learns <learned>."""
    files = [("image[]", (f"{number}.png", data, "image/png")) for number, data in enumerate(photos())]
    fields = {"name": "<learned>", "init": "star", "steps": str(steps)}
    answer = httpx.post(f"{server.url}/v1/words/learn", data=fields, files=files, timeout=SECONDS)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])
