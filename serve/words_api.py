"""The words of a tenant over HTTP: list, upload, read, download, rename, replace, delete.

Files are safetensors, in any layout that holds one word. Not covered: learning (`oneword.serve.jobs_api`).
"""

from dataclasses import replace
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oneword.engines.errors import ConceptError, OnewordError, one_line
from oneword.runtime.concept import Concept, check_token, concept_bytes, concept_of, read_safetensors, token_from_stem
from oneword.runtime.model import check_fits
from oneword.serve.errors import Invalid, from_oneword
from oneword.serve.fields import Body, Fields, validated
from oneword.serve.forms import File, is_form, read_form
from oneword.serve.openapi import WORD_NAME, WORD_TYPE, file_field, file_response, upload
from oneword.serve.state import caller
from oneword.serve.store import WordRecord

_PNG: Final = b"\x89PNG"  # A1111 keeps words in pictures too

router = APIRouter(tags=["words"])


class Rename(Fields):
    """The body of PATCH /v1/words/{name}."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "<bear>"}]})

    name: Annotated[str, Field(json_schema_extra=WORD_NAME)]
    """The new name."""


class UploadFields(Fields):
    """The text fields of POST /v1/words."""

    name: str | None = None


class Word(BaseModel):
    """A learned word."""

    object: Literal["word"] = "word"
    name: str = Field(description="as it is written in prompts", examples=["<toy>"])
    identity: str = Field(description="a hash of the vectors: words of the same vectors have the same")
    vectors: dict[str, int] = Field(description="the number of vectors by encoder")
    bytes: int
    created: int = Field(description="in seconds since 1970")
    generation: int = Field(description="1 when the name is new, and one more with each replacement")
    provenance: dict[str, str] = Field(description="how it was learned, as its file says")

    @classmethod
    def of(cls, record: WordRecord) -> "Word":
        """The word of a record in the store."""
        return cls(
            name=record.token,
            identity=record.identity,
            vectors=dict(record.vectors),
            bytes=record.bytes,
            created=int(record.created),
            generation=record.generation,
            provenance=dict(record.provenance),
        )


class WordList(BaseModel):
    """Words in the order of their names."""

    object: Literal["list"] = "list"
    data: list[Word]
    has_more: bool = Field(description="whether there are more words after the last one")


_FILE: Final = file_field("a safetensors file of diffusers, A1111, ComfyUI or ti-train, with one word")
_UPLOAD: Final = upload(
    UploadFields,
    {"file": _FILE},
    ("file",),
    media=WORD_TYPE,
    text={"name": {**WORD_NAME, "description": "replaces the name in the file"}},
)
_REPLACEMENT: Final = upload(Fields, {"file": _FILE}, ("file",), media=WORD_TYPE)
_REPLACEMENT["requestBody"]["content"][WORD_TYPE] = {"schema": {"type": "string", "format": "binary"}}


@router.get("/v1/words")
async def words(
    http: Request,
    after: Annotated[str, Query(description="the last name of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> WordList:
    """Lists the caller's words by name, a page at a time."""
    state, tenant = caller(http)
    records = await state.words.list(tenant, after, limit + 1)
    return WordList(data=[Word.of(record) for record in records[:limit]], has_more=len(records) > limit)


@router.post(
    "/v1/words",
    status_code=201,
    response_model=Word,
    responses={200: {"model": Word, "description": "The word was replaced."}},
    openapi_extra=_UPLOAD,
)
async def upload_word(http: Request, replace: bool = False) -> Response:
    """Stores a word from a safetensors file. `name` overrides the file's own. 409 if the name is taken."""
    file, body = await _uploaded(http, UploadFields)
    return await _put(http, file.data, file.name or "word", body.name or None, if_absent=not replace)


@router.put(
    "/v1/words/{name}",
    response_model=Word,
    responses={201: {"model": Word, "description": "The word is new."}},
    openapi_extra=_REPLACEMENT,
)
async def put(http: Request, name: str) -> Response:
    """Creates or replaces a word. The safetensors file is the body itself, or `file` of a multipart body."""
    data = (await _uploaded(http, Fields))[0].data if is_form(http) else await http.body()
    if not data:
        raise Invalid("the body is empty: send the word's safetensors file", param="file")
    return await _put(http, data, name, name, if_absent=False)


@router.get("/v1/words/{name}")
async def word(http: Request, name: str) -> Word:
    """Describes a word."""
    state, tenant = caller(http)
    return Word.of(await state.words.get(tenant, name))


@router.get("/v1/words/{name}/file", response_class=Response, responses=file_response("A safetensors file.", WORD_TYPE))
async def word_file(http: Request, name: str) -> Response:
    """Downloads a word's file. diffusers, A1111 and ComfyUI read it, the first two only if the word has no vectors for
    layers."""
    state, tenant = caller(http)
    return word_response(await state.words.concept(await state.words.get(tenant, name)))


def word_response(concept: Concept) -> Response:
    """A word's file, as a download."""
    stem = token_from_stem(concept.token).strip("<>")
    name = stem if stem.isascii() else "word"
    headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(concept_bytes(concept), media_type=WORD_TYPE, headers=headers)


@router.patch("/v1/words/{name}")
async def rename(http: Request, name: str, body: Rename) -> Word:
    """Renames a word, and forgets its refinement in progress. 409 if the new name is taken."""
    state, tenant = caller(http)
    _check_name(body.name)
    renamed = await state.words.rename(tenant, name, body.name)
    if body.name != name:
        await state.in_thread(state.refinements.delete, tenant.name, name)
    return Word.of(renamed)


@router.delete("/v1/words/{name}", status_code=204)
async def delete(http: Request, name: str) -> Response:
    """Deletes a word. Pictures that already use it are finished with it."""
    state, tenant = caller(http)
    await state.words.delete(tenant, name)
    await state.in_thread(state.refinements.delete, tenant.name, name)
    return Response(status_code=204)


async def _uploaded(http: Request, fields: type[Body]) -> tuple[File, Body]:
    """The file of a multipart body, and its text fields. Raises ApiError."""
    form = await read_form(http, ("file",), 1, "the word's safetensors file as `file`")
    if "file" not in form.files:
        raise Invalid("file is missing: upload the word's safetensors file as `file`", param="file")
    return form.files["file"][0], validated(fields, form.text)


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
    return JSONResponse(Word.of(record).model_dump(), 201 if record.generation == 1 else 200)


def _parsed(data: bytes, stem: str, name: str | None) -> Concept:
    """The word in a file, named `name` if it is given. Raises ConceptError."""
    if data.startswith(_PNG):
        raise ConceptError(
            "the file is a picture, but must be safetensors: run ti-concept convert first if it has a word"
        )
    concept = concept_of(*read_safetensors(data, "the file"), token_from_stem(stem))
    return concept if name is None else replace(concept, token=name)


def _check_name(name: str) -> None:
    try:
        check_token(name, "name")
    except OnewordError as error:
        raise Invalid(one_line(error), param="name") from None
