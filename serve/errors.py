"""The answers to a client when something is wrong: exceptions, and their two JSON forms (OpenAI's and A1111's).

A message is one line: what was given, what is allowed, how to fix it. It never holds a path, a memory address or
another library's text. Not covered: errors inside a stream, whose events the routes write with `openai_body`.

ApiError              any status
├── Invalid           400   the request is malformed or asks for something that does not exist
├── Unauthorized      401   no key, or an unknown one
├── Forbidden         403   known, but not allowed
├── NotFound          404
├── Conflict          409
├── Cancelled         409   somebody has cancelled the generation
├── TooLarge          413
├── Unprocessable     422   a file or picture is refused
├── Busy              429   try again after `retry_after` seconds
├── NotInstalled      501   an optional package is missing
└── Unavailable       503   starting, stopping, or not able to finish in time
"""

import difflib
import logging
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oneword.engines.errors import (
    ConceptError,
    MissingPackage,
    NotFinite,
    OnewordError,
    UsageError,
    counted,
    one_line,
)

_log = logging.getLogger("oneword.serve")
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_A1111_PREFIX = "/sdapi/"
_INTERNAL = "the server could not do this: its log has the reason"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    422: "unprocessable",
    429: "rate_limited",
    501: "not_installed",
    503: "unavailable",
}


UNKNOWN: Final = "unknown_parameter"
"""The code of an answer to a field that no such request has; also the type of pydantic's error for it."""


class ApiError(Exception):
    """An answer other than success: HTTP status, one line, a code for programs, and the parameter that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status, "server_error" if status >= 500 else "invalid_request")
        self.param = param
        self.headers = headers


class Invalid(ApiError):
    """400: the request is malformed or asks for something that does not exist."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, code, param)


class Unauthorized(ApiError):
    """401: no key, or an unknown one. The connection is closed, as the body may not have been read."""

    def __init__(self, message: str) -> None:
        # No Basic challenge, although Basic is accepted: with one, browsers open a dialog of their own over the page.
        super().__init__(401, message, headers={"WWW-Authenticate": 'Bearer realm="oneword"', "Connection": "close"})


class Forbidden(ApiError):
    """403: the request is understood, but not allowed."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(403, message, code, param)


class NotFound(ApiError):
    """404: it does not exist, or it belongs to another tenant."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(404, message, code, param)


class Conflict(ApiError):
    """409: the name is taken, or has changed in the meantime. Without the header, openai's client would retry."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(409, message, code, param, {"x-should-retry": "false"})


class Cancelled(ApiError):
    """409: somebody has cancelled the generation, so this request has no pictures. Without the header, openai's client
    would retry."""

    def __init__(self) -> None:
        message = "the generation was cancelled: send the request again if you want its pictures"
        super().__init__(409, message, "cancelled", headers={"x-should-retry": "false"})


class TooLarge(ApiError):
    """413: the body or a file in it. The connection is closed, as the body has not been read to its end."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(413, message, param=param, headers={"Connection": "close"})


class Unprocessable(ApiError):
    """422: the form is right, but a file, picture or word in it is refused."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(422, message, code, param)


class Busy(ApiError):
    """429: the queue is full or a quota is used up for `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float, param: str | None = None, code: str | None = None) -> None:
        super().__init__(429, message, code, param, _retry_after(retry_after))


class NotInstalled(ApiError):
    """501: an optional package is missing; the message carries the pip line."""

    def __init__(self, message: str) -> None:
        super().__init__(501, message, headers={"x-should-retry": "false"})


class Unavailable(ApiError):
    """503: the server is starting or stopping, or could not finish in time."""

    def __init__(self, message: str, retry_after: float = 1.0, code: str | None = None) -> None:
        super().__init__(503, message, code, headers=_retry_after(retry_after))


def from_oneword(error: OnewordError) -> ApiError:
    """The answer to one of our own exceptions. Errors of files and engines get a fixed text, as theirs hold paths."""
    match error:
        case UsageError():
            return Invalid(one_line(error, limit=1000))
        case ConceptError():
            return Unprocessable(one_line(error, limit=1000))
        case MissingPackage():
            return NotInstalled(one_line(error))
        case NotFinite():
            return ApiError(500, "the model produced NaN or infinity: try other settings or another seed", "not_finite")
        case _:
            return ApiError(500, _INTERNAL)


def unknown_field(name: str, known: Iterable[str]) -> Invalid:
    """400 for a field that does not exist; it names similar ones."""
    near = difflib.get_close_matches(name[:100], list(known), 3)
    fix = f"did you mean {' or '.join(repr(known_name) for known_name in near)}?" if near else "remove it"
    return Invalid(f"{_shown(name)} is not a field of this request: {fix}", param=name[:100], code=UNKNOWN)


def openai_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's form, and that of our own routes."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def a1111_body(error: ApiError) -> dict[str, Any]:
    """A1111's form."""
    return {"error": type(error).__name__, "detail": error.message, "body": "", "errors": error.message}


def route_path(scope: Scope) -> str:
    """The path without the prefix that a proxy has added."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def error_response(path: str, error: ApiError) -> Response:
    """The answer in the dialect of the path, which is that of the route."""
    body = a1111_body(error) if path.startswith(_A1111_PREFIX) else openai_body(error)
    return JSONResponse(body, error.status, error.headers)


def from_validation(errors: Sequence[Mapping[str, Any]], status: int = 400) -> ApiError:
    """One line for pydantic's errors: the first one, and how many more there are."""
    if not errors:
        return ApiError(status, "the request is not valid: /openapi.json describes it")
    first = errors[0]
    param = _field(first)
    more = len({_field(error) for error in errors} - {param})
    suffix = f" (and {more} more field{'s' * (more > 1)})" if more else ""
    code = first["type"] if first["type"] == UNKNOWN else None
    return ApiError(status, _explained(first, param) + suffix, code, param)


def _field(error: Mapping[str, Any]) -> str | None:
    """The field of one of pydantic's errors; that of an unknown field is in its context."""
    return (error.get("ctx") or {}).get("field") or _param(error["loc"])


def install(app: FastAPI) -> None:
    """Adds the exception handlers to an app. `middleware.install` adds what catches errors outside of the routes."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(OnewordError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)


def as_api_error(error: BaseException, path: str = "") -> ApiError:
    """The answer to any exception; an unforeseen one is logged, without its text, and answered without any detail."""
    match error:
        case ApiError():
            return error
        case OnewordError():
            answer = from_oneword(error)
            if answer.status >= 500:
                log_failure(error)
            return answer
        case RequestValidationError():
            return from_validation(error.errors(), 422 if path.startswith(_A1111_PREFIX) else 400)
        case HTTPException():
            if isinstance(error.__cause__, ApiError):  # FastAPI wraps whatever is raised while it reads the body
                return error.__cause__
            return _from_http(error)
        case _:
            log_failure(error)
            return ApiError(500, _INTERNAL, "server_error")


def log_failure(error: BaseException) -> None:
    """Logs where an exception was raised: types and functions, without texts, which may hold prompts, keys or paths."""
    names: list[str] = []
    link: BaseException | None = error
    while link is not None and len(names) < 8:
        names.append(f"{type(link).__name__} in {_place(link)}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    _log.error("request failed: %s", ", caused by ".join(names))


class CatchErrors:
    """ASGI middleware: any exception becomes an answer; once an answer has begun, the connection is cut off instead."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except ClientDisconnect:
            return  # there is no client left to answer
        except Exception as error:
            path = route_path(scope)
            answer = as_api_error(error, path)
            if not started:
                await error_response(path, answer)(scope, receive, send)
            elif isinstance(error, ApiError):  # the others are logged already
                log_failure(error)


async def _answer(request: Request, error: Exception) -> Response:  # a plain function would run in a thread
    path = route_path(request.scope)
    if isinstance(error, HTTPException) and error.status_code == 405 and (methods := _allowed(request)):
        error.headers = {"Allow": ", ".join(methods)}
    return error_response(path, as_api_error(error, path))


def _allowed(request: Request) -> list[str]:
    """The methods of an address. Starlette names those of one route only."""
    literal = request.app.openapi()["paths"].get(route_path(request.scope))
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    found = [m for m, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]
    if literal is None:
        return found
    # A literal such as /v1/words/learn, which /v1/words/{name} matches too. HEAD is in no schema.
    return [method for method in found if method.lower() in literal or method == "HEAD"]


def _from_http(error: HTTPException) -> ApiError:
    """Starlette's and FastAPI's own refusals, in our words."""
    match error.status_code:
        case 404:
            return NotFound("there is nothing at this address: /openapi.json lists the routes")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            suffix = f", only {allowed}" if allowed else ": /openapi.json lists the routes"
            message = f"this address does not take this method{suffix}"
            return ApiError(405, message, headers={"Allow": allowed} if allowed else {})
        case 413:
            return TooLarge("the body is too large: send less")
        case status if status >= 500:
            return ApiError(status, _INTERNAL)
        case status:
            return ApiError(status, "the body cannot be read: check its Content-Type and that it is complete")


def _retry_after(seconds: float) -> Mapping[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _place(error: BaseException) -> str:
    """The innermost function of an exception's traceback, as module.function:line."""
    frames = error.__traceback__
    if frames is None:
        return "?"
    while frames.tb_next is not None:
        frames = frames.tb_next
    code = frames.tb_frame.f_code
    return f"{frames.tb_frame.f_globals.get('__name__', '?')}.{code.co_qualname}:{frames.tb_lineno}"


def _param(location: Sequence[str | int]) -> str | None:
    """A field's name from pydantic's location, without the part of the request and without the branches of a union."""
    names: list[str] = []
    for part in location[1:]:
        if isinstance(part, int):
            if names:  # the location of broken JSON is an offset
                names.append(f"[{part}]")
        elif part.isidentifier() and part not in _BRANCHES:
            names.append(f".{part}" if names else part)
        elif not names:
            names.append(part)
        else:
            break
    return "".join(names)[:100] or None


_BRANCHES = {"str", "int", "float", "bool", "bytes", "none"}
_SINGLE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_unicode": "text in UTF-8",
    "bytes_type": "a file",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}


def _explained(error: Mapping[str, Any], param: str | None) -> str:
    """What was given, what is allowed and how to fix it, by pydantic's type of error."""
    kind, value, limits = str(error["type"]), error.get("input"), error.get("ctx") or {}
    name = "the body" if param is None else _shown(param)
    shown = f"{name} is {_shown(value)}"
    match kind:
        case "missing":
            where = {"query": "the address", "path": "the address", "header": "a header"}.get(
                error["loc"][0], "the body"
            )
            if param is None:
                return "the body is missing: send one, as /openapi.json describes"
            return f"{name} is missing: add it to {where}"
        case "json_invalid":
            return "the body is not valid JSON: check quotes, commas and brackets, and send it as UTF-8"
        case _ if param is None and isinstance(value, bytes):  # FastAPI parses JSON only
            return "the body was not sent as JSON: add the header 'Content-Type: application/json'"
        case _ if kind == UNKNOWN:  # of `serve.fields`
            return str(limits["text"])
        case "extra_forbidden":
            return f"{name} is not a field of this request: remove it, or check its spelling"
        case "literal_error" | "enum":
            return f"{shown}, but must be {limits.get('expected', 'another value')}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal" | "multiple_of":
            word, key = _RANGES[kind]
            return f"{shown}, but must be {word} {_number(limits.get(key))}"
        case "string_too_long" | "too_long" | "bytes_too_long":
            unit = "item" if kind == "too_long" else "character"
            return f"{_sized(name, value, unit, 'many')}, but must have at most {limits.get('max_length')}: shorten it"
        case "string_too_short" | "too_short" | "bytes_too_short":
            unit = "item" if kind == "too_short" else "character"
            return f"{_sized(name, value, unit, 'few')}, but must have at least {limits.get('min_length')}: add to it"
        case "string_pattern_mismatch":
            return f"{shown}, but must match {limits.get('pattern')}"
        case "value_error" | "assertion_error":
            return _from_validator(limits.get("error"), name, shown)
        case _ if kind in _SINGLE:
            return f"{shown}, but must be {_SINGLE[kind]}"
        case _:
            return f"{shown}, which is not allowed: /openapi.json describes it"


_RANGES = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def _sized(name: str, value: object, unit: str, amount: str) -> str:
    return f"{name} has {counted(len(value), unit) if isinstance(value, Sized) else f'too {amount} {unit}s'}"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _from_validator(error: object, name: str, shown: str) -> str:
    """The message of a ValueError that one of our validators raised; FastAPI's own one is about a file that is text."""
    text = one_line(error, limit=500) if isinstance(error, Exception) else ""
    if text.startswith("Expected UploadFile"):
        return f"{name} is not a file, but must be one: send the request as multipart/form-data"
    return text or f"{shown}, which is not allowed: /openapi.json describes it"


def _shown(value: object) -> str:
    """A value in an error message: its kind where it is large, else its text, which is cut off after 60 characters."""
    match value:
        case str() if len(value) > 60:
            return f"text of {len(value)} characters"
        case bytes():
            return f"{len(value)} bytes"
        case Mapping():
            return "an object"
        case list() | tuple():
            return f"a list of {len(value)}"
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case str():
            return repr(value)
        case int() | float():
            return reprlib.repr(value)
        case _:
            return f"of the type {type(value).__name__}"
