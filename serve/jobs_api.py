"""Learning jobs over HTTP: start one from pictures, follow it live, look at its pictures, cancel it.

While somebody watches, the word as it is after steps 0, 5, 10, 20, 35 and 50 draws the same prompts from one seed,
with this server's own engine. These pictures are made when they are first asked for, and kept with the job.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from oneword.runtime.concept import Concept
from oneword.serve.errors import ApiError, Busy, NotFound, Unavailable, openai_body
from oneword.serve.fields import Fields, validated
from oneword.serve.forms import read_form
from oneword.serve.job_files import Cancelled, Failed, Note, Progress, Status
from oneword.serve.jobs import PICTURES, Done, Job, Snapshot
from oneword.serve.keys import Tenant
from oneword.serve.openapi import (
    PICTURE_TYPES,
    WORD_NAME,
    WORD_TYPE,
    file_field,
    file_response,
    stream_response,
    upload,
)
from oneword.serve.pictures import MEDIA_TYPES, as_base64
from oneword.serve.samples import sample_jpeg, sample_request
from oneword.serve.state import State, caller
from oneword.serve.streams import EventStream, sse
from oneword.serve.words_api import word_response

PROMPTS: Final = ("a photo of a {}", "a photo of a {} in the snow", "a drawing of a {}")
"""What every snapshot of a word draws."""
PREVIEW_SEED: Final = 0
_IMAGES: Final = ("image[]", "image", "images[]", "images")
_BUSY_SECONDS: Final = 30.0  # the longest wait for an engine that is busy
_LAST_SECONDS: Final = 5.0  # that the end of a job waits for its previews
_PREVIEW: Final = re.compile(r"preview-([0-9]{1,6})-([0-9])\.jpg")
_TRIES: Final = 30  # to draw a preview for somebody who watches, a second apart


class LearnFields(Fields):
    """The text fields of POST /v1/words/learn."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "<toy>", "init": "toy"}]})

    name: Annotated[str, Field(json_schema_extra=WORD_NAME)]
    """The word, such as <toy>."""
    init: str = "object"
    """Plain words that the vector starts from."""
    recipe: str | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=(1 << 63) - 1)] = 0
    replace: bool = False
    """Whether the word may take the place of one that has its name."""


class LearnedWord(BaseModel):
    """The word that a job has learned and stored."""

    name: str
    identity: str


class JobError(BaseModel):
    """Why a job failed, in one line."""

    message: str
    code: str


class Preview(BaseModel):
    """A picture of the word as it was after `step`; `index` is that of its prompt."""

    step: int
    index: int
    url: str


class JobBody(BaseModel):
    """A job: a word that is being learned, or was."""

    object: Literal["job"] = "job"
    id: str
    kind: str = Field(examples=["learn"])
    status: Status
    created: int = Field(description="in seconds since 1970")
    name: str = Field(description="the word", examples=["<toy>"])
    init: str
    recipe: str
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    position: int | None = Field(description="jobs before this one; null if another server has it")
    word: LearnedWord | None
    error: JobError | None
    pictures: list[str] = Field(description="addresses of the pictures it learns from")
    prompts: list[str] = Field(description="what every preview of a step draws")
    previews: list[Preview]

    @classmethod
    def of(cls, http: HTTPRequest, job: Job) -> "JobBody":
        """A job as JSON, with addresses as this client reaches them."""
        address = f"{http.scope.get('root_path', '')}/v1/jobs/{job.id}/pictures"
        return cls(
            id=job.id,
            kind=job.kind,
            status=job.status,
            created=int(job.created),
            name=job.token,
            init=job.init,
            recipe=job.recipe,
            step=job.step,
            steps=job.steps,
            loss=job.loss,
            seconds_left=job.seconds_left,
            position=job.position,
            word=None if job.word is None else LearnedWord(name=job.token, identity=job.word),
            error=None if job.error is None else JobError(message=job.error, code="learning_failed"),
            pictures=[f"{address}/{name}" for name in job.pictures],
            prompts=[prompt.format(job.token) for prompt in PROMPTS],
            previews=[
                Preview(step=step, index=index, url=f"{address}/{_preview_name(step, index)}")
                for step in job.snapshots
                for index in range(len(PROMPTS))
            ],
        )


class JobList(BaseModel):
    """Jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobBody]
    has_more: bool = Field(description="whether there are older jobs: ask for those `before` the last one's id")


router = APIRouter(tags=["learning"])


@router.post(
    "/v1/words/learn",
    status_code=202,
    response_model=JobBody,
    openapi_extra=upload(
        LearnFields,
        {"image[]": file_field("pictures of one thing, PNG, JPEG or WebP", PICTURES[1], PICTURES[0])},
        ("image[]",),
    ),
)
async def learn(http: HTTPRequest) -> Response:
    """Starts learning a word from three to five pictures. Answers with the job."""
    state, tenant = caller(http)
    state.jobs.check_accepting()
    form = await read_form(http, _IMAGES, 8, "three to five pictures as `image[]`")
    images, body = form.data(*_IMAGES), validated(LearnFields, form.text)
    widths = [encoder.width for encoder in state.manifest.encoders if not encoder.word_optional]
    order = body.name, body.init, body.recipe, body.steps, body.seed
    async with state.jobs.admission(tenant.name):
        tokens = await state.jobs.open_tokens(tenant.name)
        await state.words.check_room(tenant, body.name, 4 * sum(widths), tokens, replace=body.replace)  # float32
        job = await state.jobs.add(tenant.name, images, *order, replace=body.replace)
    return JSONResponse(JobBody.of(http, job).model_dump(mode="json"), 202)


@router.get("/v1/jobs")
async def jobs(
    http: HTTPRequest,
    before: Annotated[str, Query(description="the last id of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    """Lists the caller's jobs, the newest first."""
    state, tenant = caller(http)
    found = await state.jobs.list(tenant.name, limit + 1, before)
    return JobList(data=[JobBody.of(http, job) for job in found[:limit]], has_more=len(found) > limit)


@router.get("/v1/jobs/{id}")
async def job(http: HTTPRequest, id: str) -> JobBody:
    """Describes a job."""
    state, tenant = caller(http)
    return JobBody.of(http, await state.jobs.get(tenant.name, id))


@router.delete("/v1/jobs/{id}")
async def cancel(http: HTTPRequest, id: str) -> JobBody:
    """Cancels a job. One that has ended stays as it is."""
    state, tenant = caller(http)
    return JobBody.of(http, await state.jobs.cancel(tenant.name, id))


@router.get(
    "/v1/jobs/{id}/events",
    response_class=Response,
    responses=stream_response(
        "Events `progress`, `note` and `preview`, then `done`, `error` or `cancelled`.",
        *("progress", "note", "preview", "done", "error", "cancelled"),
    ),
)
async def job_events(
    http: HTTPRequest, id: str, after: Annotated[int, Query(ge=0, description="the last number you have")] = 0
) -> Response:
    """Follows a job live. Server-sent events: progress, notes, previews (pictures), then how it ended."""
    state, tenant = caller(http)
    found = await state.jobs.get(tenant.name, id)
    return EventStream(_events(state, tenant, found, after))


@router.get(
    "/v1/jobs/{id}/pictures/{name}",
    response_class=Response,
    responses=file_response("The picture.", *PICTURE_TYPES),
)
async def job_picture(http: HTTPRequest, id: str, name: str) -> Response:
    """A picture of a job. Either one that it learns from, or preview-STEP-INDEX.jpg, drawn when it is first read."""
    state, tenant = caller(http)
    found = await state.jobs.get(tenant.name, id)
    data = await _picture(state, tenant, found, name)
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(data, media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=headers)


@router.get("/v1/jobs/{id}/word", response_class=Response, responses=file_response("A safetensors file.", WORD_TYPE))
async def job_word(http: HTTPRequest, id: str) -> Response:
    """Downloads a job's learned word, also if its name was taken meanwhile. 404 if it has none."""
    state, tenant = caller(http)
    return word_response(await state.jobs.word(tenant.name, id))


async def _events(state: State, tenant: Tenant, job: Job, after: int) -> AsyncGenerator[bytes]:
    """A job's events as they happen; previews follow as soon as the engine has drawn them."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    steps: asyncio.Queue[int | None] = asyncio.Queue()

    async def read() -> None:
        last: bytes | None = None
        try:
            async for event in state.jobs.events(tenant.name, job.id, after):
                if isinstance(event, Snapshot):
                    steps.put_nowait(event.step)
                elif isinstance(event, Done | Failed | Cancelled):
                    last = _event(job, event)
                else:
                    queue.put_nowait(_event(job, event))
        except ApiError as error:
            last = sse("error", openai_body(error))
        finally:
            steps.put_nowait(None)
            await asyncio.wait((drawing,), timeout=_LAST_SECONDS)  # the last previews, if they can be drawn now
            if last is not None:
                queue.put_nowait(last)
            queue.put_nowait(None)

    async def draw() -> None:
        while (step := await steps.get()) is not None:
            names = [_preview_name(step, index) for index in range(len(PROMPTS))]
            pictures = [_patiently(state, tenant, job, name) for name in names]  # they share engine calls
            for index, data in enumerate(await asyncio.gather(*pictures, return_exceptions=True)):
                if isinstance(data, bytes):  # one that cannot be drawn now is drawn when it is looked at
                    prompt = PROMPTS[index].format(job.token)
                    body = {"step": step, "index": index, "prompt": prompt, "output_format": "jpeg"}
                    queue.put_nowait(sse("preview", {**body, "b64_json": as_base64(data)}))

    async def stop() -> None:
        await state.stopping.wait()
        queue.put_nowait(None)

    drawing = asyncio.create_task(draw())
    tasks = drawing, asyncio.create_task(read()), asyncio.create_task(stop())
    try:
        while (chunk := await queue.get()) is not None:
            yield chunk
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(job: Job, event: Progress | Note | Done | Failed | Cancelled) -> bytes:
    match event:
        case Progress(number=number, step=step, steps=steps, loss=loss, seconds_left=left):
            return sse("progress", {"number": number, "step": step, "steps": steps, "loss": loss, "seconds_left": left})
        case Note(number=number, text=text):
            return sse("note", {"number": number, "text": text})
        case Done(number=number, concept=concept):
            word = {"name": job.token, "identity": concept.identity}
            return sse("done", {"number": number, "word": word})
        case Failed(number=number, error=text):
            return sse("error", {"number": number, **openai_body(ApiError(500, text, "learning_failed"))})
        case Cancelled(number=number):
            return sse("cancelled", {"number": number})


async def _picture(state: State, tenant: Tenant, job: Job, name: str) -> bytes:
    """A job's picture; a preview is drawn unless it has been, once for all who look at it now. Raises ApiError."""
    key = tenant.name, job.id, name
    return await state.job_pictures(key, lambda: _read_or_drawn(state, tenant, job, name))


async def _read_or_drawn(state: State, tenant: Tenant, job: Job, name: str) -> bytes:
    """See `_picture`. What is drawn is kept."""
    jobs = state.jobs
    with contextlib.suppress(NotFound):
        return await jobs.picture(tenant.name, job.id, name)
    step, index = _preview_of(name)
    concept = await jobs.snapshot(tenant.name, job.id, step)
    data = await _drawn(state, tenant, concept, index)
    with contextlib.suppress(Unavailable):  # which the store has logged; drawing it again would not help
        await jobs.write_picture(tenant.name, job.id, name, data)
    return data


async def _patiently(state: State, tenant: Tenant, job: Job, name: str) -> bytes:
    """A job's picture, also if the engine is just starting or has too much to do. Raises ApiError."""
    for _ in range(_TRIES):
        with contextlib.suppress(Busy, Unavailable):
            return await _picture(state, tenant, job, name)
        await asyncio.sleep(1)
    return await _picture(state, tenant, job, name)


async def _drawn(state: State, tenant: Tenant, concept: Concept, index: int) -> bytes:
    """The picture of prompt `index` as a JPEG."""
    request = sample_request(state, PROMPTS[index].format(concept.token), concept, PREVIEW_SEED)
    pictures = await state.pool.submit(tenant, request, deadline=_BUSY_SECONDS).wait()
    if not pictures:
        raise Unavailable("the preview was cancelled: ask for it again")
    return await sample_jpeg(state, pictures[0])


def _preview_name(step: int, index: int) -> str:
    return f"preview-{step}-{index}.jpg"


def _preview_of(name: str) -> tuple[int, int]:
    """Step and index of a preview's name. Raises NotFound, also for another spelling of a name."""
    match = _PREVIEW.fullmatch(name)
    if match is None or int(match[2]) >= len(PROMPTS) or name != _preview_name(int(match[1]), int(match[2])):
        raise NotFound("the job has no such picture")
    return int(match[1]), int(match[2])
