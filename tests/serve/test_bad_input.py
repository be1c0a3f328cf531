"""Every field of every route in /openapi.json, given a wrong value: one line that says what was given and what to do.

The fields and their limits come from the document, so a new field is tested without a new line here. Not covered:
settings that are wrong together (test_openai, test_a1111_dialect).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from oneword.serve.keys import new_key
from tests.serve.conftest import Start
from tests.serve.running import Running, word_bytes
from tests.serve.test_openai import png

FREE = {"/sdapi/v1/options"}  # a body without fields of its own
NOT_NAMED = {"image[]": "picture"}  # the word for a field in a message, if it is another
FIX = re.compile(
    r"\b(allowed|must|did you mean|similar words|this server has)\b"
    r"|[:,] (or )?(send|use|upload|give|remove|add|choose|make|leave|set|GET) "
)


@dataclass(frozen=True)
class Case:
    """A field, where it is, and a value that it does not take."""

    method: str
    path: str
    place: str
    field: str
    value: Any


@pytest.fixture(scope="module")
def learning(start_server: Start, tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("bad-input")
    key, table = new_key("alice")
    (folder / "keys.toml").write_text(table)
    running = start_server(keys=folder / "keys.toml", model=str(tiny_model_dir), jobs=folder / "jobs")
    return Running(running.url, running.state, key)


def wrong_values(schema: dict[str, Any], place: str) -> Iterator[Any]:
    """Values outside of a schema, as far as a place can hold them: all in a form or an address is text."""
    text = place != "json"
    match schema.get("type"):
        case "integer" | "number" as kind:
            yield "many"
            if kind == "integer":
                yield "1.5" if text else 1.5
            if not text:
                yield from ([], {}, [1])
            else:
                yield "nan"
            for name, offset in {"minimum": -1, "maximum": 1, "exclusiveMinimum": 0, "exclusiveMaximum": 0}.items():
                if name in schema:
                    limit = schema[name] + offset
                    yield str(limit) if text else int(limit) if kind == "integer" else limit
        case "boolean":
            yield "perhaps"
            if not text:
                yield from (5, [])
        case "array":
            if "format" not in schema["items"]:
                yield from (5, "many", {}, *([[{}]] if schema["items"] else []))
        case "object" if not text:
            yield from (5, "many", [])
        case "string" if "enum" in schema:
            yield "nonsense"
        case "string" if "pattern" in schema:
            yield "\u00a7 \u00a7"
        case "string" if not text:
            yield from (5, [], {})
        case _:
            pass
    if "format" in (schema, *[schema.get("items", {})])[-1] or schema.get("format") == "binary":
        yield b"no picture and no word"


def cases(document: dict[str, Any]) -> list[Case]:
    """All fields of the document with their wrong values, and a field that does not exist."""
    definitions = document["components"]["schemas"]

    def plain(schema: dict[str, Any]) -> dict[str, Any]:
        """A schema without null and references."""
        if "$ref" in schema:
            return plain(definitions[schema["$ref"].rpartition("/")[2]])
        choices = [choice for choice in schema.get("anyOf", []) if choice.get("type") != "null"]
        return plain(choices[0]) if choices and "type" not in schema else schema

    found: list[Case] = []
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for parameter in operation.get("parameters", []):
                place, name = parameter["in"], parameter["name"]
                match place:
                    case "query":
                        values = [*wrong_values(plain(parameter["schema"]), place)]
                    case "header":
                        values = ["two words", "x" * 256]
                    case _ if path.endswith("/pictures/{name}"):  # its job is not there either
                        values = []
                    case _:
                        values = ["two words"]
                found += [Case(method, path, place, name, value) for value in values]
            content = operation.get("requestBody", {}).get("content", {})
            for media, place in {"application/json": "json", "multipart/form-data": "form"}.items():
                if media not in content or path in FREE:
                    continue
                schema = plain(content[media]["schema"])
                for field, description in schema["properties"].items():
                    values = wrong_values(plain(description), place)
                    found += [Case(method, path, place, field, value) for value in values]
                for field in schema.get("required", []):
                    found.append(Case(method, path, place, field, None))
                if schema.get("additionalProperties") is False:
                    known = max(schema["properties"], key=len)
                    found += [Case(method, path, place, name, "x") for name in ("\u00fcnknown", f"{known}x")]
    return found


def ask(client: httpx.Client, case: Case) -> httpx.Response:
    """A request that is right but for one field."""
    parts = {"name": "<toy>", "id": "0" * 32, "model": "x"}
    address = case.path.format_map(parts | ({case.field: case.value} if case.place == "path" else {}))
    fields: dict[str, Any] = {}
    files: list[tuple[str, Any]] = []
    match case.path:
        case "/v1/words/learn":
            fields, files = {"name": "<new>"}, [("image[]", png())] * 3
        case "/v1/images/edits":
            fields, files = {"prompt": "a cat"}, [("image", png())]
        case "/v1/images/variations":
            fields, files = {"prompt": "a cat"}, [("image", png())]
        case "/v1/words" | "/v1/words/{name}" if case.place == "form":
            files = [("file", ("toy.safetensors", word_bytes()))]
        case "/v1/images/generations" | "/sdapi/v1/txt2img":
            fields = {"prompt": "a cat"}
        case "/v1/words/{name}/refine":
            fields = {"action": "start"}
        case "/v1/words/{name}" if case.method == "patch":
            fields = {"name": "<new>"}
        case _:
            pass
    if case.place == "query":
        return client.request(case.method, address, params={case.field: case.value})
    if case.place == "path":
        content = {"content": word_bytes()} if case.method == "put" else {"json": fields} if fields else {}
        return client.request(case.method, address, **content)
    if case.place == "header":
        body = {"data": fields, "files": files} if files else {"json": fields}
        return client.request(case.method, address, headers={case.field: case.value}, **body)
    fields = {name: value for name, value in fields.items() if name != case.field}
    if case.value is None or isinstance(case.value, bytes):
        files = [file for file in files if file[0] != case.field]
    if isinstance(case.value, bytes):
        replaced = [file for file in files if file[0] != "image" or case.field != "image[]"]
        files = [*replaced, *[(case.field, case.value)] * (3 if case.path.endswith("learn") else 1)]
    elif case.value is not None:
        fields[case.field] = case.value
    if case.place == "json":
        return client.request(case.method, address, json=fields)
    texts = [(name, (None, str(value))) for name, value in fields.items()]  # multipart, with or without a file
    return client.request(case.method, address, files=[*texts, *files] or [("name", (None, "<toy>"))])


def test_every_wrong_field_of_every_route_is_one_line_that_names_it_and_says_what_to_do(learning: Running) -> None:
    with learning.client() as client:
        assert client.put("/v1/words/<toy>", content=word_bytes()).status_code == 201
        table = cases(client.get("/openapi.json").json())
        wrong: list[str] = []
        for case in table:
            answer = ask(client, case)
            if problem := refusal_problem(case, answer):
                wrong.append(f"{case}: {answer.status_code} {problem}: {answer.text[:300]}")

    assert wrong == [], "\n".join([f"{len(wrong)} of {len(table)}", *wrong])
    assert len(table) > 300
    assert {case.place for case in table} == {"query", "path", "header", "json", "form"}
    assert {case.path for case in table} >= {"/v1/words", "/v1/words/learn", "/v1/images/edits", "/sdapi/v1/img2img"}


def shows(message: str, value: str | float) -> bool:
    """Whether a message has a value, or the length of a long one; or says that its field does not exist."""
    shown = f"text of {len(value)} characters" if isinstance(value, str) and len(value) > 60 else str(value)
    return shown in message or "is not a field of this request" in message


def refusal_problem(case: Case, answer: httpx.Response) -> str:
    """What is wrong with an answer to a wrong field; empty if nothing is."""
    if not 400 <= answer.status_code < 500:
        return "is no refusal"
    body = answer.json()
    message = body["detail"] if case.path.startswith("/sdapi/") else body["error"]["message"]
    named = NOT_NAMED.get(case.field, case.field.removesuffix("[]"))
    in_address = case.place == "path"  # where the message says what the name is of
    if case.field not in message and named not in message and not in_address and not isinstance(case.value, bytes):
        return "does not name the field"
    value = "has 1 item" if case.field.endswith("[]") and "item" in message else case.value  # a list of one
    if isinstance(value, str | int | float) and not shows(message, value):
        return "does not say what was given"
    if "\n" in message or len(message) > 400:
        return "is not one short line"
    return "" if FIX.search(message) else "does not say what to do"
