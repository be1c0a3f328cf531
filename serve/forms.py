"""Multipart bodies: their text fields and their files, each by name. Not covered: what the fields mean."""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from oneword.engines.errors import one_of
from oneword.serve.errors import Invalid, Unprocessable

_MULTIPART: Final = "multipart/form-data"
_MAX_FIELDS: Final = 64
_MAX_TEXT: Final = 1 << 20  # bytes of a text field


@dataclass(frozen=True)
class File:
    """An uploaded file; `name` is what the client calls it."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Form:
    """A multipart body. What one field was sent with several times is in that order."""

    text: Mapping[str, str]
    files: Mapping[str, Sequence[File]]
    lists: Mapping[str, Sequence[str]]
    """The text of fields that may be sent several times."""

    def data(self, *fields: str) -> list[bytes]:
        """The content of the files of these fields."""
        return [file.data for field in fields for file in self.files.get(field, ())]


def is_form(http: Request) -> bool:
    """Whether the body is multipart."""
    return http.headers.get("content-type", "").lower().startswith(_MULTIPART)


async def read_form(
    http: Request, files: Collection[str], max_files: int, content: str, lists: Collection[str] = ()
) -> Form:
    """The body as a form whose files are in the fields `files`, and whose `lists` are text that may be repeated.

    Raises Unprocessable for another kind of body, which names the expected `content`; Invalid for a file in another
    field, for text in one of `files`, and for any other text field that was sent twice with different values.
    """
    if not is_form(http):
        raise Unprocessable(f"the body must be {_MULTIPART}, with {content}")
    text: dict[str, str] = {}
    uploads: dict[str, list[File]] = {}
    repeated: dict[str, list[str]] = {}
    async with _parsed(http, max_files) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in files:
                    raise Invalid(f"the file field {name[:40]!r} is unknown: use {one_of(files)}", param=name)
                uploads.setdefault(name, []).append(File(value.filename or "", await value.read()))
            elif name in files:
                raise Invalid(f"{name} is text, but must be an uploaded file, with a file name", param=name)
            elif name in lists:
                repeated.setdefault(name, []).append(value)
            elif text.get(name, value) != value:
                raise Invalid(f"the field {name[:40]!r} was sent twice, but may have only one value", param=name)
            else:
                text[name] = value
    return Form(text, uploads, repeated)


@asynccontextmanager
async def _parsed(http: Request, max_files: int) -> AsyncGenerator[FormData]:
    """The body's fields. Raises Invalid for too much of them, before they are all read."""
    try:
        async with http.form(max_files=max_files, max_fields=_MAX_FIELDS, max_part_size=_MAX_TEXT) as form:
            yield form
    except HTTPException as error:
        for problem, message in {
            "Too many files": f"too many files were sent: send at most {max_files}",
            "Too many fields": f"too many text fields were sent: send at most {_MAX_FIELDS}",
            "Part exceeded": f"a text field has more than the allowed {_MAX_TEXT} bytes: send a shorter one, or a file "
            "with a file name",
        }.items():
            if error.detail.startswith(problem):
                raise Invalid(message) from error
        raise
