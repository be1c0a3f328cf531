"""/openapi.json: complete, and true of the server that publishes it, as schemathesis finds out."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oneword.serve.keys import new_key
from oneword.serve.middleware import is_public
from tests.serve.conftest import Start
from tests.serve.running import CLIENTS, Running

# What a picture or a word's file must hold cannot be said in a schema, and A1111's API takes "4" for 4.
NOT_SAID = "positive_data_acceptance,negative_data_rejection"
DIALECTS = {"/sdapi/": "#/components/schemas/Error", "/": "#/components/schemas/ErrorAnswer"}
SMALL_WORK = 20_000_000  # pixel-steps a minute, so that no generated request keeps the engine for long


@pytest.fixture(scope="module")
def documented(start_server: Start, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """A server that can do everything: with keys, and a model to learn with."""
    folder = tmp_path_factory.mktemp("documented")
    key, table = new_key("alice")
    (folder / "keys.toml").write_text(f"{table}pixel_steps_per_minute = {SMALL_WORK}\n")
    running = start_server(keys=folder / "keys.toml", model=str(tiny_model_dir), jobs=folder / "jobs")
    return Running(running.url, running.state, key)


@pytest.fixture(scope="module")
def document(documented: Running) -> dict[str, Any]:
    with documented.client() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By method and path."""
    return {f"{m.upper()} {path}": found for path, item in document["paths"].items() for m, found in item.items()}


def test_schemathesis_finds_no_failure_and_no_answer_that_is_not_documented_in_2000_cases(
    documented: Running, tmp_path: Path
) -> None:
    assert schemathesis(documented, tmp_path, examples=8, seed=1) >= 2_000


@pytest.mark.slow
def test_schemathesis_finds_no_failure_and_no_answer_that_is_not_documented_in_10000_cases(
    documented: Running, tmp_path: Path
) -> None:
    assert schemathesis(documented, tmp_path, examples=150, seed=2) >= 10_000


def schemathesis(running: Running, folder: Path, examples: int, seed: int) -> int:
    """Runs it, unmodified, with all of its checks but two; returns the number of cases that were checked."""
    if CLIENTS is None:
        pytest.skip("ONEWORD_CLIENTS is not set: make test-server installs the clients")
    report = folder / "report.json"
    command = [f"{CLIENTS}/bin/schemathesis", "run", f"{running.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {running.key}", "--exclude-checks", NOT_SAID]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--generation-database", "none", "--no-color"]
    command += ["--report", "json", "--report-json-path", str(report), "--no-shrink", "--request-timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["operations"]["tested"] == found["operations"]["total"]
    assert (found["failures"], found["errors"]) == ([], [])
    cases: dict[str, int] = found["test_cases"]
    return cases["generated"] - cases["without_checks"]


def test_the_document_is_valid_in_its_version_of_openapi(document: dict[str, Any], tmp_path: Path) -> None:
    if CLIENTS is None or not (validator := Path(CLIENTS, "bin", "openapi-spec-validator")).is_file():
        pytest.skip("openapi-spec-validator is not installed: make test-server installs it with the clients")
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    command = [str(validator), str(tmp_path / "openapi.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_streams_are_described_with_a_keyword_of_the_documents_version_and_with_their_comments(
    document: dict[str, Any],
) -> None:
    streams = [
        answer
        for operation in operations(document).values()
        for answer in operation["responses"].values()
        if "text/event-stream" in answer.get("content", {})
    ]

    assert len(streams) == 4
    assert document["openapi"] == "3.2.0"  # the first version with `itemSchema`
    assert all("(`: ping`) every 10 seconds" in answer["description"] for answer in streams)


def test_every_error_is_in_the_form_of_its_dialect(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        path = name.split()[1]
        form = next(form for prefix, form in DIALECTS.items() if path.startswith(prefix))
        for status, answer in operation["responses"].items():
            if status[0] in "45" and not path.startswith("/health/"):
                assert answer["content"]["application/json"]["schema"] == {"$ref": form}, (name, status)
        assert {"400", "401", "403", "404", "408", "413", "422", "429", "500", "503"} <= operation["responses"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_route_says_what_it_does_takes_and_answers(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        assert 5 <= len(operation["summary"]) <= 80, name
        assert operation["tags"], name
        success = [answer for status, answer in operation["responses"].items() if status[0] == "2" and status != "204"]
        assert success or "204" in operation["responses"], name
        for answer in success:
            assert all(media.get("schema") or media["itemSchema"] for media in answer["content"].values()), name
        if "requestBody" in operation:
            assert all(media["schema"] for media in operation["requestBody"]["content"].values()), name


def test_uploads_are_described_with_their_files_and_fields(document: dict[str, Any]) -> None:
    def form(name: str) -> dict[str, Any]:
        schema: dict[str, Any] = operations(document)[name]["requestBody"]["content"]["multipart/form-data"]["schema"]
        return schema

    edits, learn = form("POST /v1/images/edits"), form("POST /v1/words/learn")
    assert edits["properties"]["image"]["format"] == "binary"
    assert edits["properties"]["sampler"]["enum"][0] == "ddim"
    assert edits["properties"]["n"] == {"type": "integer", "minimum": 1, "maximum": 10}
    assert (learn["properties"]["image[]"]["minItems"], learn["properties"]["image[]"]["maxItems"]) == (3, 5)
    assert learn["required"] == ["name", "image[]"]
    assert form("POST /v1/images/variations")["required"] == ["image"]
    assert form("POST /v1/words")["required"] == form("PUT /v1/words/{name}")["required"] == ["file"]


def test_the_events_of_a_stream_are_those_that_are_described(document: dict[str, Any], documented: Running) -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 1, "previews": 1, "steps": 3}
    media = operations(document)["POST /v1/images/generations"]["responses"]["200"]["content"]["text/event-stream"]

    with documented.client() as client:
        blocks = client.post("/v1/images/generations", json=body).text.strip().split("\n\n")
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]

    # `schema` would describe each event in the eyes of some readers and the whole stream in those of others.
    assert media.keys() == {"itemSchema"}
    described = media["itemSchema"]["properties"]
    assert {event["event"] for event in events} == {*described["event"]["enum"]} - {"error"}
    assert all(event.keys() == described.keys() and isinstance(json.loads(event["data"]), dict) for event in events)


def test_routes_say_whether_they_need_a_key(document: dict[str, Any], server: Running) -> None:
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["security"] == ([] if is_public(path) else [{"key": []}, {"password": []}])
    with server.client() as client:
        open_document = client.get("/openapi.json").json()
    assert "securitySchemes" not in open_document["components"]


def test_a_method_that_is_not_allowed_is_answered_with_those_that_are(server: Running) -> None:
    with server.client() as client:
        paths = ("/v1/words", "/v1/words/x", "/v1/words/learn", "/sdapi/v1/options")
        answers = {path: client.request("OPTIONS", path) for path in paths}

    assert {path: (answer.status_code, answer.headers["allow"]) for path, answer in answers.items()} == {
        "/v1/words": (405, "GET, POST"),
        "/v1/words/x": (405, "GET, PUT, PATCH, DELETE"),
        "/v1/words/learn": (405, "POST"),
        "/sdapi/v1/options": (405, "GET, POST"),
    }
