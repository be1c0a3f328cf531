"""The server on Ray Serve: a real local cluster with two replicas, one of which is really killed.

Not covered: several hosts, KubeRay.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from oneword.engines.errors import UsageError
from tests.serve.machines import free_port
from tests.serve.running import word_bytes

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="pip install 'oneword[ray]'")
serve = pytest.importorskip("ray.serve", reason="pip install 'oneword[ray]'", exc_type=ImportError)
yaml = pytest.importorskip("yaml")

# Ray does not wait for its daemons.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
    ),
]

DEPLOY = Path(__file__).parents[2] / "serve" / "deploy"
SMALL = {"steps": 2, "size": "64x64", "guidance_scale": 1}
LONG = {"steps": 900, "size": "64x64"}
PATIENCE = 300.0
"""Seconds; a shared machine may be slow, and nothing here measures time."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of Ray Serve's proxy on a small cluster of this machine."""
    port = free_port()
    before = set(ray_processes(""))
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    for pid in set(ray_processes("")) - before:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def url(cluster: str, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two replicas with a shared word store."""
    deploy(tiny_bundle, tmp_path_factory.mktemp("words"), min_replicas=2, max_replicas=2, max_wait=10000)
    return cluster


def deploy(bundle: Path, words: Path, **arguments: Any) -> None:
    build = importlib.import_module("oneword.serve.ray").app
    settings = {"bundle": str(bundle), "words": str(words), "engine": "onnxruntime", "threads": 1, "max_rows": 8}
    serve.delete("oneword")  # a new version of an application would start with as many replicas as it had
    serve.run(build(settings | arguments), name="oneword", route_prefix="/")
    wait_for(lambda: running_replicas() == arguments["min_replicas"])


def ray_processes(title: str) -> list[int]:
    """The ids of processes of Ray on this machine whose title begins so."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if entry.read_bytes().startswith(f"ray::{title}".encode()):
                pids.append(int(entry.parent.name))
    return pids


def replicas() -> list[int]:
    return ray_processes("ServeReplica:oneword")


def running_replicas() -> int:
    deployment = serve.status().applications["oneword"].deployments["oneword"]
    return int(deployment.replica_states.get("RUNNING", 0))


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return value


def generate(url: str, prompt: str = "a cat", **settings: Any) -> httpx.Response:
    body = {"prompt": prompt, "seed": 7, **SMALL, **settings}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=PATIENCE)


def metrics(url: str) -> tuple[str, dict[str, float]]:
    """The replica that answered, and the sums of its metrics over their labels."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name = re.split(r"[ {]", line, maxsplit=1)[0]
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    found = re.search(r'oneword_replica_info\{id="(\w+)"\}', text)
    assert found is not None
    return found[1], sums


def all_metrics(url: str, count: int = 2) -> dict[str, dict[str, float]]:
    """The metrics of every replica, by its id."""
    found: dict[str, dict[str, float]] = {}

    def ask() -> bool:
        name, sums = metrics(url)
        found[name] = sums
        return len(found) >= count

    wait_for(ask)
    return found


def total(url: str, name: str) -> float:
    return sum(sums.get(name, 0.0) for sums in all_metrics(url).values())


def test_both_replicas_serve_and_agree(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: generate(url), range(24))]

    assert [answer.status_code for answer in answers] == [200] * 24
    assert len(replicas()) == 2
    assert all(sums["oneword_pictures_total"] > 0 for sums in all_metrics(url).values())
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) <= 2  # up to rounding in a batch


def test_the_errors_and_headers_are_the_servers_own(url: str) -> None:
    unknown = generate(url, "a <nobody>")
    assert unknown.status_code == 400
    assert unknown.json()["error"]["type"] == "invalid_request_error"
    assert unknown.headers["X-Content-Type-Options"] == "nosniff"

    attacked = httpx.get(f"{url}/v1/words", headers={"Host": "evil.example.com"})
    assert attacked.status_code == 403

    large = httpx.put(f"{url}/v1/words/%3Cbig%3E", content=bytes(17 << 20), timeout=PATIENCE)
    assert large.status_code == 413


def test_a_word_put_through_one_replica_is_used_by_both_in_the_next_requests(url: str) -> None:
    pictures = set()
    for seed in range(3):
        put = httpx.put(f"{url}/v1/words/%3Ctoy%3E", content=word_bytes("<toy>", seed, rows=4), timeout=PATIENCE)
        assert put.status_code in (200, 201)
        before = all_metrics(url)
        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda _: generate(url, "a <toy>", steps=8, guidance_scale=7), range(16))]
        assert [answer.status_code for answer in answers] == [200] * 16
        after = all_metrics(url)
        assert all(after[name]["oneword_pictures_total"] > before[name]["oneword_pictures_total"] for name in after)
        made = {answer.json()["data"][0]["b64_json"] for answer in answers}
        assert not made & pictures  # never a picture of the word as it was before
        pictures |= made


def test_a_stream_passes_event_by_event_and_a_disconnect_frees_the_row(url: str) -> None:
    before = total(url, "oneword_cancelled_total")
    body = {"prompt": "a cat", **LONG, "stream": True, "previews": 500}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=PATIENCE) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: image_generation.preview"
        data = json.loads(next(line for line in lines if line.startswith("data:")).removeprefix("data:"))
        assert data["step"] == 500  # of 900: the picture is not ready

    wait_for(lambda: total(url, "oneword_cancelled_total") == before + 1)
    assert total(url, "oneword_rows") == 0


def test_a_client_that_leaves_while_it_waits_for_an_answer_frees_the_row(url: str) -> None:
    before = total(url, "oneword_cancelled_total")
    client = httpx.Client(timeout=httpx.Timeout(PATIENCE, read=0.5))
    with pytest.raises(httpx.ReadTimeout):
        client.post(f"{url}/v1/images/generations", json={"prompt": "a cat", **LONG, "n": 8})
    client.close()

    wait_for(lambda: total(url, "oneword_cancelled_total") > before)
    wait_for(lambda: total(url, "oneword_rows") == 0)


def test_a_killed_replica_loses_only_its_own_requests_and_is_back(url: str) -> None:
    victim, survivor = replicas()
    all_run = threading.Barrier(9)

    def follow(seed: int) -> bool:
        """Follows a stream to its end; whether it ended with the picture."""
        body = {"prompt": "a cat", **LONG, "seed": seed, "stream": True, "previews": 10}
        ended = False
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # cut off
            httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=PATIENCE) as stream,
        ):
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: image_generation.preview"
            all_run.wait(PATIENCE)
            ended = "event: image_generation.completed" in lines
        return ended

    with ThreadPoolExecutor(8) as pool:
        followed = [pool.submit(follow, seed) for seed in range(8)]
        all_run.wait(PATIENCE)
        os.kill(victim, signal.SIGKILL)
        during = [generate(url).status_code for _ in range(4)]
        ended = [stream.result() for stream in followed]

    assert 0 < ended.count(True) < 8  # all of one replica's, none of the other's
    assert 200 in during
    assert set(during) <= {200, 500, 503}  # Ray may send one to the replica before it has noticed
    wait_for(lambda: len(replicas()) == 2 and running_replicas() == 2)
    assert survivor in replicas()
    assert victim not in replicas()
    assert [generate(url).status_code for _ in range(8)] == [200] * 8
    assert len(all_metrics(url)) == 2


@pytest.mark.slow
def test_seconds_of_queued_work_start_a_second_replica(cluster: str, tiny_bundle: Path, tmp_path: Path) -> None:
    scaling = {"target_seconds": 1.0, "upscale_delay": 1.0}
    deploy(tiny_bundle, tmp_path, min_replicas=1, max_replicas=2, max_wait=10000, **scaling)
    assert running_replicas() == 1

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(generate, cluster, **LONG, n=2) for _ in range(16)]
        wait_for(lambda: running_replicas() == 2 or all(answer.done() for answer in answers))
        scaled = running_replicas()
        assert [answer.result().status_code for answer in answers] == [200] * 16

    assert scaled == 2


# ---- the files in serve/deploy ---------------------------------------------------------------------------------------


def _applications() -> list[Any]:
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    texts = [(DEPLOY / "serve.yaml").read_text(), service["spec"]["serveConfigV2"]]
    return [application for text in texts for application in schema.model_validate(yaml.safe_load(text)).applications]


@pytest.mark.parametrize("index", [0, 1], ids=["serve.yaml", "rayservice.yaml"])
def test_the_configuration_files_are_valid_and_build_the_application(index: int) -> None:
    application = _applications()[index]
    module, _, name = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(application.args)

    names = [deployment.name for deployment in application.deployments]
    assert names == [built._bound_deployment.name]
    (settings,) = built._bound_deployment.init_args
    assert settings.words == "s3://my-bucket/words"
    assert built._bound_deployment._deployment_config.autoscaling_config.max_replicas == 4


def test_wrong_arguments_are_named() -> None:
    build = importlib.import_module("oneword.serve.ray").app

    with pytest.raises(UsageError, match=r"no bundle was given"):
        build({})
    with pytest.raises(UsageError, match=r"there is no argument 'rows': use one of .*bundle, .*max_rows"):
        build({"bundle": "b", "rows": 3})
    with pytest.raises(UsageError, match=r"max_replicas is 'many', but must be a number"):
        build({"bundle": "b", "max_replicas": "many"})
    with pytest.raises(UsageError, match=r"with more than one replica, words must name a folder or a URL"):
        build({"bundle": "b", "max_replicas": 2})
    for name in ("bundle", "port"):
        with pytest.raises(UsageError, match=rf"{name} is null: leave it out for its default"):
            build({"bundle": "b", name: None})


def test_null_is_the_value_of_an_argument_that_may_have_none() -> None:
    build = importlib.import_module("oneword.serve.ray").app

    application = build({"bundle": "b", "keys": None, "deadline": None, "model": None})

    (settings,) = application._bound_deployment.init_args
    assert (settings.keys, settings.deadline, settings.model) == (None, None, None)
