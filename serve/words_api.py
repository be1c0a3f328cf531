"""The words of a tenant over HTTP: list, upload, read, download, rename, replace, delete.

Files are safetensors, in any layout that holds one word. Not covered: learning (`oneword.serve.jobs_api`).
"""

from typing import Annotated, Final

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oneword.engines.errors import OnewordError
from oneword.runtime.concept import Concept, check_token, concept_bytes, concept_of, read_safetensors, token_from_stem
from oneword.runtime.model import check_fits
from oneword.serve.errors import Invalid, from_oneword
from oneword.serve.fields import Fields, validated
from oneword.serve.forms import File, is_form, read_form
from oneword.serve.state import caller
from oneword.serve.store import WordRecord

_MEDIA: Final = "application/octet-stream"
_NAMES: Final = "letters, digits and . + * @ # ! ~ & $ % ^ = - _ , bare or in <>, for example <toy>"

router = APIRouter(tags=["words"])


class UploadFields(Fields):
    """The text fields of a multipart body with a word's file."""

    name: str | None = None
    """By default the file's own."""


class Rename(Fields):
    """The body of PATCH /v1/words/{name}."""

    name: str


@router.get("/v1/words")
async def words(http: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, object]:
    """The caller's words by name, from the one behind `after`."""
    state, tenant = caller(http)
    records = await state.words.list(tenant, after, limit + 1)
    data = [word_body(record) for record in records[:limit]]
    return {"object": "list", "data": data, "has_more": len(records) > limit}


@router.post("/v1/words", status_code=201)
async def upload(http: Request, replace: bool = False) -> Response:
    """Stores a word from the multipart file `file`; `name` overrides the file's own. 409 if the name is taken."""
    file, name = await _uploaded(http)
    return await _put(http, file.data, file.name or "word", name, if_absent=not replace)


@router.put("/v1/words/{name}")
async def put(http: Request, name: str) -> Response:
    """Creates or replaces the word `name` from a safetensors file, as the body itself or as the multipart `file`."""
    data = (await _uploaded(http))[0].data if is_form(http) else await http.body()
    if not data:
        raise Invalid("the body is empty: send the word's safetensors file", param="file")
    return await _put(http, data, name, name, if_absent=False)


@router.get("/v1/words/{name}")
async def word(http: Request, name: str) -> dict[str, object]:
    """One word."""
    state, tenant = caller(http)
    return word_body(await state.words.get(tenant, name))


@router.get("/v1/words/{name}/file", response_class=Response)
async def word_file(http: Request, name: str) -> Response:
    """The word's safetensors file, which diffusers, A1111 and ComfyUI read."""
    state, tenant = caller(http)
    record = await state.words.get(tenant, name)
    concept = await state.words.concept(record)
    stem = token_from_stem(record.token).strip("<>")
    name = stem if stem.isascii() else "word"
    headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(concept_bytes(concept), media_type=_MEDIA, headers=headers)


@router.patch("/v1/words/{name}")
async def rename(http: Request, name: str, body: Rename) -> dict[str, object]:
    """Renames a word. 409 if the new name is taken."""
    state, tenant = caller(http)
    _check_name(body.name)
    return word_body(await state.words.rename(tenant, name, body.name))


@router.delete("/v1/words/{name}", status_code=204)
async def delete(http: Request, name: str) -> Response:
    """Deletes a word. Pictures that already use it are finished with it."""
    state, tenant = caller(http)
    await state.words.delete(tenant, name)
    return Response(status_code=204)


def word_body(record: WordRecord) -> dict[str, object]:
    """A word as JSON."""
    return {
        "object": "word",
        "name": record.token,
        "identity": record.identity,
        "vectors": dict(record.vectors),
        "bytes": record.bytes,
        "created": int(record.created),
        "generation": record.generation,
        "provenance": dict(record.provenance),
    }


async def _uploaded(http: Request) -> tuple[File, str | None]:
    """The file of a multipart body, and the word's name if it is there. Raises ApiError."""
    form = await read_form(http, ("file",), 1, "the word's safetensors file as `file`")
    if "file" not in form.files:
        raise Invalid("file is missing: upload the word's safetensors file as `file`", param="file")
    return form.files["file"][0], validated(UploadFields, form.text).name or None


async def _put(http: Request, data: bytes, stem: str, name: str | None, *, if_absent: bool) -> Response:
    state, tenant = caller(http)
    if name is not None:
        _check_name(name)
    try:
        concept = _parsed(data, stem, name)
        check_fits(concept, state.manifest)
    except OnewordError as error:
        raise from_oneword(error) from None
    record = await state.words.put(tenant, concept, if_absent=if_absent)
    return JSONResponse(word_body(record), 201 if record.generation == 1 else 200)


def _parsed(data: bytes, stem: str, name: str | None) -> Concept:
    """The word in a file, named `name` if it is given. Raises ConceptError."""
    concept = concept_of(*read_safetensors(data, "the file"), token_from_stem(stem))
    return concept if name is None else Concept(name, concept.vectors, concept.provenance)


def _check_name(name: str) -> None:
    try:
        check_token(name)
    except OnewordError:
        raise Invalid(f"name is {name[:80]!r}, allowed are {_NAMES}", param="name") from None
