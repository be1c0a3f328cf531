"""The words of a tenant over HTTP: list, upload, read, download, rename, replace, delete.

Files are safetensors, in any layout that holds one word. Not covered: learning (`oneword.serve.jobs_api`).
"""

from typing import Annotated, Final

from fastapi import APIRouter, Query
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oneword.engines.errors import OnewordError
from oneword.runtime.concept import Concept, check_token, concept_bytes, concept_of, read_safetensors, token_from_stem
from oneword.runtime.model import check_fits
from oneword.serve.errors import Invalid, Unprocessable, from_oneword
from oneword.serve.fields import Fields
from oneword.serve.keys import Tenant
from oneword.serve.state import State
from oneword.serve.store import WordRecord

_MEDIA: Final = "application/octet-stream"
_NAMES: Final = "letters, digits and . + * @ # ! ~ & $ % ^ = - _ , bare or in <>, for example <toy>"

router = APIRouter(tags=["words"])


class Rename(Fields):
    """The body of PATCH /v1/words/{name}."""

    name: str


@router.get("/v1/words")
async def words(http: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, object]:
    """The caller's words by name, from the one behind `after`."""
    state, tenant = _context(http)
    records = await state.words.list(tenant, after, limit + 1)
    data = [word_body(record) for record in records[:limit]]
    return {"object": "list", "data": data, "has_more": len(records) > limit}


@router.post("/v1/words", status_code=201)
async def upload(http: Request, replace: bool = False) -> Response:
    """Stores a word from the multipart file `file`; `name` overrides the file's own. 409 if the name is taken."""
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Unprocessable("the body must be multipart/form-data, with the word's safetensors file as `file`")
    async with http.form(max_files=1, max_fields=8) as form:
        file, name = form.get("file"), form.get("name")
        if not isinstance(file, UploadFile):
            raise Invalid("file is missing: upload the word's safetensors file as `file`", param="file")
        data, stem = await file.read(), file.filename or "word"
    return await _put(http, data, stem, str(name) if name else None, if_absent=not replace)


@router.put("/v1/words/{name}")
async def put(http: Request, name: str) -> Response:
    """Creates or replaces the word `name` from a safetensors file, as the body itself or as the multipart `file`."""
    if http.headers.get("content-type", "").startswith("multipart/form-data"):
        async with http.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            data = await file.read() if isinstance(file, UploadFile) else b""
    else:
        data = await http.body()
    if not data:
        raise Invalid("the body is empty: send the word's safetensors file", param="file")
    return await _put(http, data, name, name, if_absent=False)


@router.get("/v1/words/{name}")
async def word(http: Request, name: str) -> dict[str, object]:
    """One word."""
    state, tenant = _context(http)
    return word_body(await state.words.get(tenant, name))


@router.get("/v1/words/{name}/file", response_class=Response)
async def word_file(http: Request, name: str) -> Response:
    """The word's safetensors file, which diffusers, A1111 and ComfyUI read."""
    state, tenant = _context(http)
    record = await state.words.get(tenant, name)
    concept = await state.words.concept(record)
    stem = token_from_stem(record.token).strip("<>")
    name = stem if stem.isascii() else "word"
    headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(concept_bytes(concept), media_type=_MEDIA, headers=headers)


@router.patch("/v1/words/{name}")
async def rename(http: Request, name: str, body: Rename) -> dict[str, object]:
    """Renames a word. 409 if the new name is taken."""
    state, tenant = _context(http)
    _check_name(body.name)
    return word_body(await state.words.rename(tenant, name, body.name))


@router.delete("/v1/words/{name}", status_code=204)
async def delete(http: Request, name: str) -> Response:
    """Deletes a word. Pictures that already use it are finished with it."""
    state, tenant = _context(http)
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


def _context(http: Request) -> tuple[State, Tenant]:
    return http.app.state.oneword, http.state.tenant


async def _put(http: Request, data: bytes, stem: str, name: str | None, *, if_absent: bool) -> Response:
    state, tenant = _context(http)
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
