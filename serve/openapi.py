"""What /openapi.json says beyond the types of the routes: errors, uploads, streams, keys, and a summary for each route.

Not covered: the bodies and answers themselves, which are the routes' own models.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from fastapi import FastAPI
from pydantic import BaseModel, Field

from oneword.serve.fields import Fields
from oneword.serve.middleware import is_public
from oneword.serve.streams import PING_SECONDS

Responses: TypeAlias = dict[int | str, dict[str, Any]]

TAGS: Final = [
    {"name": "OpenAI images", "description": "OpenAI's images API, for its own clients. Extensions are marked."},
    {"name": "words", "description": "The caller's learned words: `<toy>` in a prompt means the word of that name."},
    {"name": "learning", "description": "Learning a word from three to five pictures, as a job."},
    {"name": "refining", "description": "Making a word better by liking and disliking pictures of it."},
    {"name": "pictures", "description": "Pictures that were asked for by address."},
    {"name": "server", "description": "The model, its limits, and the caller's place in the queue."},
    {"name": "health", "description": "For probes and Prometheus."},
    {
        "name": "A1111",
        "description": "The API of AUTOMATIC1111's web UI, for its clients, with its form of errors.",
    },
]
VERSION: Final = "3.2.0"
"""Of OpenAPI: the first with `itemSchema`, which describes one event of a stream."""
PICTURE_TYPES: Final = ("image/png", "image/jpeg", "image/webp")
WORD_TYPE: Final = "application/octet-stream"
WORD_NAME: Final[dict[str, Any]] = {
    "type": "string",
    "maxLength": 64,
    "pattern": r"^(<[\w.+*@#!~&$%^=-]+>|[\w.+*@#!~&$%^=-]+)$",
    "examples": ["<toy>"],
}
"""The schema of a word's name. `runtime.concept.check_token` checks it, with messages of its own."""

NULL_RESPONSE: Final[Responses] = {
    200: {"description": "Done.", "content": {"application/json": {"schema": {"type": "null"}}}}
}

_ERRORS: Final[Mapping[int, str]] = {
    400: "The request is malformed, or asks for something that does not exist.",
    401: "No key, or an unknown one.",
    403: "Known, but not allowed: a quota, another site's page, or a Host that is not this server's.",
    404: "It does not exist, or it belongs to another tenant.",
    408: "The body did not arrive in time.",
    409: "The name is taken, or has changed in the meantime.",
    413: "The body, or a file in it, is too large.",
    422: "The form is right, but a file, a picture or a word in it is refused.",
    429: "The queue is full, or a quota is used up for a while.",
    500: "The server failed; its log has the reason.",
    501: "This server cannot do this: an option or a package is missing.",
    503: "The server starts or stops, or could not finish in time.",
}
_RETRIED: Final = (429, 503)


class ErrorDetail(BaseModel):
    """What was given, what is allowed and how to fix it, in one line; and what programs need of it."""

    message: str
    type: str = Field(description="OpenAI's kind of error, such as invalid_request_error")
    param: str | None = Field(description="the field that is wrong")
    code: str = Field(description="for programs, such as invalid_request or quota_exceeded")


class ErrorAnswer(BaseModel):
    """The answer when something is wrong, in OpenAI's form."""

    error: ErrorDetail


def error_responses(model: type[BaseModel] = ErrorAnswer) -> Responses:
    """Every error that a route may answer, in one dialect: for `include_router`."""
    retry = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
    return {
        status: {"model": model, "description": text, **({"headers": retry} if status in _RETRIED else {})}
        for status, text in _ERRORS.items()
    }


def file_response(description: str, *media_types: str) -> Responses:
    """An answer that is a file."""
    schema = {"type": "string", "format": "binary"}
    return {200: {"description": description, "content": {media: {"schema": schema} for media in media_types}}}


def stream_response(description: str, *events: str) -> Responses:
    """An answer that is, or may be, server-sent events of these names; `description` says which."""
    pings = f"While there are no events, a comment (`: ping`) every {PING_SECONDS:g} seconds keeps the stream open."
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "object"}}
    fields = {"event": {"type": "string", "enum": [*events]}, "data": data}
    event = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    return {200: {"description": f"{description} {pings}", "content": {"text/event-stream": {"itemSchema": event}}}}


def file_field(description: str, most: int = 1, least: int = 0) -> dict[str, Any]:
    """The schema of one file, or of a list of files, in an upload."""
    file = {"type": "string", "format": "binary"}
    if most == 1:
        return {**file, "description": description}
    return {"type": "array", "items": file, "minItems": least, "maxItems": most, "description": description}


def upload(
    fields: type[Fields],
    files: Mapping[str, dict[str, Any]],
    required: tuple[str, ...] = (),
    *,
    media: str = ", ".join(PICTURE_TYPES),
    text: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`openapi_extra` of a route with a multipart body: the fields of a model, and files.

    `text` replaces the schemas of fields that are not sent as JSON has them. Nothing of a form is null.
    """
    schema = fields.model_json_schema()
    definitions = schema.pop("$defs", {})
    properties = {name: _in_form(field, definitions) for name, field in schema["properties"].items()}
    schema["properties"] = {**files, **properties, **(text or {})}
    schema["required"] = [*schema.get("required", []), *required]
    schema["additionalProperties"] = False
    for name in ("title", "description"):
        schema.pop(name, None)
    content = {"schema": schema, "encoding": {name: {"contentType": media} for name in files}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": content}}}


class DocumentedApp(FastAPI):
    """An app whose /openapi.json has a summary for every route, and says which of them need a key.

    A route's summary is the first sentence of its docstring, the description is the rest.
    """

    secured = False
    """Whether there are keys."""

    def openapi(self) -> dict[str, Any]:
        """The document of /openapi.json, made once."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        self.openapi_version = VERSION
        schema = super().openapi()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                _summarise(operation)
                if self.secured:
                    operation["security"] = [] if is_public(path) else [{"key": []}, {"password": []}]
        if self.secured:
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "The key, from ti-serve --new-key."},
                "password": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "The key as the password; the user is empty, or the key's name.",
                },
            }
        return schema


def _summarise(operation: dict[str, Any]) -> None:
    """Splits the description after its first sentence."""
    summary, _, description = " ".join(operation.get("description", "").split()).partition(". ")
    operation["summary"] = summary.rstrip(".")
    if description:
        operation["description"] = description
    else:
        operation.pop("description", None)


def _in_form(field: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """A field's schema in a form: with its definition in place, and without null."""
    description = {name: value for name, value in field.items() if name not in ("$ref", "anyOf", "default", "title")}
    if "default" in field and field["default"] is not None:
        description["default"] = field["default"]
    if "$ref" in field:
        definition: dict[str, Any] = definitions[field["$ref"].rpartition("/")[2]]
        return definition | description
    choices = [choice for choice in field.get("anyOf", []) if choice.get("type") != "null"]
    return _in_form(choices[0], definitions) | description if len(choices) == 1 else description
