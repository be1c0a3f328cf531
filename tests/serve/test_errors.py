"""Every error is answered in one line, in the client's dialect, and without anything from inside the server."""

import asyncio
import inspect
import io
import json
import logging
from enum import Enum
from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import Body, FastAPI, File, Form, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException
from starlette.requests import Request

from oneword.engines.errors import (
    BundleError,
    ConceptError,
    EngineError,
    FeedError,
    FileError,
    MissingPackage,
    NotFinite,
    OnewordError,
    UsageError,
)
from oneword.serve.errors import (
    ApiError,
    Busy,
    CatchErrors,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    NotInstalled,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    a1111_body,
    from_oneword,
    install,
    openai_body,
    unknown_field,
)
from oneword.serve.fields import validated
from oneword.serve.openai import GenerationBody

SECRETS = ("/secret/path", "0x7f0123456789", "Traceback", "ow_key")
FIXED = "the server could not do this: its log has the reason"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=100, min_length=1)
    n: int = Field(1, ge=1, le=10)
    scale: float = Field(7.5, gt=0, lt=100, allow_inf_nan=False)
    size: Literal["256x256", "512x512", "auto"] = "auto"
    colour: Colour = Colour.RED
    stream: bool = False
    sides: list[int] = Field(default_factory=list, max_length=2)
    picture: str | list[str] | None = None
    even: int = Field(2, multiple_of=2)
    seed: int = Field(0, le=2**63 - 1)
    sampler: str = "euler"
    name: str = Field("a", pattern="^[a-z]+$")

    @field_validator("sampler")
    @classmethod
    def _known(cls, sampler: str) -> str:
        if sampler != "euler":
            raise ValueError(f"the sampler is {sampler!r}, but must be euler")
        return sampler


def app_with(error: BaseException | None = None) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/images")
    @app.post("/sdapi/v1/txt2img")
    async def fields(fields: Fields) -> str:
        return fields.prompt

    @app.post("/v1/files")
    async def files(image: Annotated[UploadFile, File()], n: Annotated[int, Form()] = 1) -> int:
        return n

    @app.post("/v1/body")
    async def body(body: Annotated[dict[str, int], Body()]) -> int:
        return len(body)

    @app.get("/v1/list")
    async def page(limit: Annotated[int, Query(le=100)]) -> int:
        return limit

    @app.get("/v1/raises")
    @app.get("/sdapi/v1/raises")
    async def raises() -> None:
        assert error is not None
        raise error

    install(app)
    app.add_middleware(CatchErrors)
    return app


def ask(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(send())


def test_errors_are_answered_on_the_event_loop() -> None:
    """Starlette runs a plain function in a thread, which delays a refusal while the engine computes."""
    app = FastAPI()
    install(app)
    assert ApiError in app.exception_handlers
    assert all(inspect.iscoroutinefunction(app.exception_handlers[kind]) for kind in (ApiError, OnewordError))


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Invalid("x", "n"), 400, "invalid_request_error", "invalid_request"),
        (Unauthorized("x"), 401, "authentication_error", "invalid_api_key"),
        (Forbidden("x"), 403, "permission_error", "forbidden"),
        (Forbidden("x", code="quota_exceeded"), 403, "permission_error", "quota_exceeded"),
        (NotFound("x"), 404, "not_found_error", "not_found"),
        (Conflict("x"), 409, "invalid_request_error", "conflict"),
        (TooLarge("x"), 413, "invalid_request_error", "too_large"),
        (Unprocessable("x", "image"), 422, "invalid_request_error", "unprocessable"),
        (Busy("x", 2.1), 429, "rate_limit_error", "rate_limited"),
        (NotInstalled("x"), 501, "server_error", "not_installed"),
        (Unavailable("x"), 503, "server_error", "unavailable"),
        (ApiError(500, "x"), 500, "server_error", "server_error"),
    ],
)
def test_an_error_is_answered_in_openais_form_and_in_a1111s(error: ApiError, status: int, kind: str, code: str) -> None:
    app = app_with(error)

    answer = ask(app, "GET", "/v1/raises")
    assert answer.status_code == status
    assert answer.json() == {"error": {"message": "x", "type": kind, "param": error.param, "code": code}}
    assert answer.json() == openai_body(error)

    answer = ask(app, "GET", "/sdapi/v1/raises")
    assert answer.status_code == status
    assert (
        answer.json() == {"error": type(error).__name__, "detail": "x", "body": "", "errors": "x"} == a1111_body(error)
    )


@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (0.2, "1"), (1.0, "1"), (2.1, "3"), (3600, "3600")])
def test_a_busy_server_says_when_to_try_again(seconds: float, header: str) -> None:
    for error in (Busy("full", seconds), Unavailable("starting", seconds)):
        assert ask(app_with(error), "GET", "/v1/raises").headers["Retry-After"] == header


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("steps is 0,\n but must be 1 to 1000"), 400, "steps is 0, but must be 1 to 1000"),
        (
            FeedError("'sample' is 2x4x96x96, the plan allows at most 64x64"),
            400,
            "'sample' is 2x4x96x96, the plan allows",
        ),
        (ConceptError("a pickle: ti-concept convert"), 422, "a pickle: ti-concept convert"),
        (MissingPackage("torch", "train"), 501, "torch is not installed: in a checkout of oneword, pip install -c "),
        (NotFinite("unet at 0x7f0123456789"), 500, "the model produced NaN or infinity: try other settings"),
        (EngineError("ORT /secret/path"), 500, FIXED),
        (FileError("cannot write /secret/path"), 500, FIXED),
        (BundleError("/secret/path is broken"), 500, FIXED),
        (OnewordError("/secret/path"), 500, FIXED),
    ],
)
def test_our_own_exceptions_become_answers_without_paths(error: OnewordError, status: int, message: str) -> None:
    answer = ask(app_with(error), "GET", "/v1/raises")

    assert (answer.status_code, from_oneword(error).status) == (status, status)
    assert answer.json()["error"]["message"].startswith(message)
    assert not any(secret in answer.text for secret in SECRETS)


@pytest.mark.parametrize(
    "error", [RuntimeError("/secret/path ow_key"), OSError(2, "no", "/secret/path"), KeyError("ow_key")]
)
def test_an_unforeseen_exception_is_a_500_without_detail_and_its_log_names_the_place_only(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    error.__cause__ = ValueError("<object at 0x7f0123456789>")
    with caplog.at_level(logging.DEBUG):
        answer = ask(app_with(error), "GET", "/v1/raises")

    assert answer.status_code == 500
    assert answer.json()["error"] == {"message": FIXED, "type": "server_error", "param": None, "code": "server_error"}
    assert f"{type(error).__name__} in " in caplog.text
    assert "raises:" in caplog.text
    assert "caused by ValueError" in caplog.text
    assert not any(secret in answer.text + caplog.text for secret in SECRETS)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "'prompt' is missing: add it to the body"),
        ({"prompt": 5}, "prompt", "'prompt' is 5, but must be text"),
        ({"prompt": None}, "prompt", "'prompt' is null, but must be text"),
        ({"prompt": "secret" * 50}, "prompt", "'prompt' has 300 characters, but must have at most 100: shorten it"),
        ({"prompt": ""}, "prompt", "'prompt' has 0 characters, but must have at least 1: add to it"),
        ({"n": 11}, "n", "'n' is 11, but must be at most 10"),
        ({"n": 0}, "n", "'n' is 0, but must be at least 1"),
        ({"n": 1.5}, "n", "'n' is 1.5, but must be a whole number"),
        ({"n": "many"}, "n", "'n' is 'many', but must be a whole number"),
        ({"n": [1]}, "n", "'n' is a list of 1, but must be a whole number"),
        ({"n": "x" * 5000}, "n", "'n' is text of 5000 characters, but must be a whole number"),
        ({"scale": 0}, "scale", "'scale' is 0, but must be more than 0"),
        ({"scale": 100}, "scale", "'scale' is 100, but must be less than 100"),
        ({"scale": {}}, "scale", "'scale' is an object, but must be a number"),
        ({"size": "1x1"}, "size", "'size' is '1x1', but must be '256x256', '512x512' or 'auto'"),
        ({"colour": "green"}, "colour", "'colour' is 'green', but must be 'red' or 'blue'"),
        ({"stream": "maybe"}, "stream", "'stream' is 'maybe', but must be true or false"),
        ({"sides": 5}, "sides", "'sides' is 5, but must be a list"),
        ({"sides": [1, "a"]}, "sides[1]", "'sides[1]' is 'a', but must be a whole number"),
        ({"sides": [1, 2, 3]}, "sides", "'sides' has 3 items, but must have at most 2: shorten it"),
        ({"picture": 5}, "picture", "'picture' is 5, but must be text"),
        ({"seed": 2**63}, "seed", f"'seed' is {2**63}, but must be at most {2**63 - 1}"),
        ({"even": 3}, "even", "'even' is 3, but must be a multiple of 2"),
        ({"sampler": "magic"}, "sampler", "the sampler is 'magic', but must be euler"),
        ({"name": "A"}, "name", "'name' is 'A', but must match ^[a-z]+$"),
        ({"sed": 1}, "sed", "'sed' is not a field of this request: remove it, or check its spelling"),
        ({"n": 0, "scale": 0}, "n", "'n' is 0, but must be at least 1 (and 1 more field)"),
        ({"n": 0, "scale": 0, "even": 1}, "n", "'n' is 0, but must be at least 1 (and 2 more fields)"),
    ],
)
def test_a_wrong_field_is_one_line_that_says_what_was_given_and_what_is_allowed(
    fields: dict[str, Any], param: str, message: str
) -> None:
    body = fields if not fields or "prompt" in fields else {"prompt": "a cat", **fields}

    answer = ask(app_with(), "POST", "/v1/images", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_request",
    }
    assert ask(app_with(), "POST", "/sdapi/v1/txt2img", json=body).status_code == 422  # as A1111's own server
    assert ask(app_with(), "POST", "/sdapi/v1/txt2img", json=body).json()["detail"] == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not valid JSON: check quotes, commas and brackets, and send it as UTF-8"),
        (b'{"prompt": "\xff"}', "the body cannot be read: check its Content-Type and that it is complete"),
        (b"", "the body is missing: send one, as /openapi.json describes"),
        (b"[]", "the body is a list of 0, but must be an object"),
        (b'"text"', "the body is 'text', but must be an object"),
        (b'{"prompt": "a", "scale": NaN}', "'scale' is nan, but must be a finite number"),
        (b'{"prompt": "\\ud800"}', "'prompt' is "),
        (b'{"prompt": "a", "n": ' + b"9" * 10_000 + b"}", "the body cannot be read"),
        (b'{"prompt": "a", "n": ' + b"9" * 3_000 + b"}", "'n' is 999"),
        (b"[" * 100_000, "the body cannot be read"),
    ],
)
def test_a_body_that_is_not_an_object_is_described(content: bytes, message: str) -> None:
    answer = ask(app_with(), "POST", "/v1/images", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_json_without_its_content_type_is_refused_by_that_name(headers: dict[str, str]) -> None:
    answer = ask(app_with(), "POST", "/v1/images", content=b'{"prompt": "a"}', headers=headers)

    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == "the body was not sent as JSON: add the header 'Content-Type: application/json'"


def test_forms_and_queries_are_described_too() -> None:
    app = app_with()

    answer = ask(app, "POST", "/v1/files", data={"image": "text"})
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["message"]
        == "'image' is not a file, but must be one: send the request as multipart/form-data"
    )
    answer = ask(app, "POST", "/v1/files", data={"n": "x"}, files={"image": ("a", io.BytesIO(b"x"))})
    assert answer.json()["error"]["message"] == "'n' is 'x', but must be a whole number"
    answer = ask(app, "POST", "/v1/files", content=b"--x", headers={"Content-Type": "multipart/form-data"})
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["message"] == "the body cannot be read: check its Content-Type and that it is complete"
    )
    answer = ask(app, "GET", "/v1/list")
    assert answer.json()["error"]["message"] == "'limit' is missing: add it to the address"
    answer = ask(app, "GET", "/v1/list?limit=101")
    assert answer.json()["error"] == {
        "message": "'limit' is '101', but must be at most 100",
        "type": "invalid_request_error",
        "param": "limit",
        "code": "invalid_request",
    }


def test_a_wrong_address_and_a_wrong_method_are_described() -> None:
    app = app_with()

    answer = ask(app, "GET", "/v2")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "there is nothing at this address: /openapi.json lists the routes"
    answer = ask(app, "DELETE", "/v1/images")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == "this address does not take this method, only POST"
    assert ask(app, "GET", "/sdapi/v1/absent").json()["error"] == "NotFound"


def test_an_unknown_field_names_similar_ones() -> None:
    error = unknown_field("guidence_scale", ["guidance_scale", "steps"])

    assert error.message == "'guidence_scale' is not a field of this request: did you mean 'guidance_scale'?"
    assert (error.param, error.code, error.status) == ("guidence_scale", "unknown_parameter", 400)
    with pytest.raises(ApiError, match=r"'guidence_scale' is not a field .* did you mean 'guidance_scale'") as answer:
        validated(GenerationBody, {"prompt": "a cat", "guidence_scale": 3})
    assert (answer.value.param, answer.value.code) == (error.param, error.code)
    with pytest.raises(ApiError) as alone:
        validated(GenerationBody, {"prompt": "a cat", "foo": 1})
    assert alone.value.message == "'foo' is not a field of this request: remove it"
    assert unknown_field("x", ["steps"]).message == "'x' is not a field of this request: remove it"
    assert len(unknown_field("x" * 10**6, ["steps"]).message) < 200


def test_an_error_while_the_body_is_read_is_not_hidden_by_the_framework() -> None:
    app = FastAPI()

    @app.post("/v1/images")
    async def fields(fields: Fields) -> str:
        return fields.prompt

    install(app)

    class Failing:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def failing() -> Any:
                raise TooLarge("too large")

            await self.inner(scope, failing, send)

    app.add_middleware(Failing)

    assert ask(app, "POST", "/v1/images", json={"prompt": "a"}).status_code == 413


def test_errors_of_the_framework_have_no_text_of_the_framework() -> None:
    for status in (400, 413, 418, 500, 502):
        answer = ask(app_with(HTTPException(status, "object at 0x7f0123456789")), "GET", "/v1/raises")
        assert answer.status_code == status
        assert "0x" not in answer.text


def test_an_error_after_the_answer_has_begun_leaves_it_incomplete(caplog: pytest.LogCaptureFixture) -> None:
    messages: list[Any] = []

    async def started_then_failed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("/secret/path")

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError

    scope = Request({"type": "http", "path": "/", "method": "GET", "headers": []}).scope
    asyncio.run(CatchErrors(started_then_failed)(scope, receive, send))

    assert [message["type"] for message in messages] == ["http.response.start"]
    assert "RuntimeError in " in caplog.text
    assert "/secret" not in caplog.text
    assert json.dumps(messages, default=str)
