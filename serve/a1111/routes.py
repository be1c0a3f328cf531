"""The routes of A1111's API, /sdapi/v1/*, and ComfyUI's list of embeddings.

A route translates, starts a generation, and answers. `progress`, `interrupt` and `skip` are about the caller's own
requests in this dialect: those of its key, or of its address where the server has no keys. The server keeps no
settings: `options` takes them only as they are, and `override_settings` has those of one request. Not covered, and
answered with 404: upscaling, interrogation, extensions.
"""

import contextlib
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

import oneword
from oneword.runtime.bundle import Manifest
from oneword.runtime.events import PictureDone
from oneword.runtime.request import Request
from oneword.serve.a1111 import answers
from oneword.serve.a1111.dialect import (
    RANDOM_SEEDS,
    ModelNames,
    Plan,
    checked_options,
    image_to_image,
    options,
    strength_of,
    text_to_image,
)
from oneword.serve.a1111.schemas import (
    EmbeddingItem,
    Embeddings,
    Error,
    ImageToImage,
    Memory,
    ModelItem,
    PictureFile,
    PictureInfo,
    Pictures,
    Progress,
    SamplerItem,
    SchedulerItem,
    Scripts,
    TaskId,
    TextToImage,
    UpscalerItem,
)
from oneword.serve.errors import NotFound, Unprocessable
from oneword.serve.generate import enter, finish, fitted, prepare
from oneword.serve.kept import IdempotencyKey, answered, most_bytes, room
from oneword.serve.openapi import NULL_RESPONSE, error_responses
from oneword.serve.pictures import as_base64, blank, decode, decode_base64, decode_mask, read_parameters
from oneword.serve.pool import Generation
from oneword.serve.state import State, caller

_MAX_WORDS: Final = 1000

router = APIRouter(tags=["A1111"])
_api = APIRouter(prefix="/sdapi/v1", responses=error_responses(Error))


@_api.post("/txt2img", response_model=Pictures)
async def txt2img(http: HTTPRequest, body: TextToImage, idempotency_key: IdempotencyKey = None) -> Response:
    """Generates pictures from a prompt."""
    state, tenant = caller(http)
    label = _label(http, body)

    async def prepared() -> tuple[Plan, Generation]:
        plan = await _text_plan(state, body)
        return plan, await prepare(state, tenant, plan.request, plan.settings, label=label)

    return await _answer(http, body, prepared, idempotency_key)


@_api.post("/img2img", response_model=Pictures)
async def img2img(http: HTTPRequest, body: ImageToImage, idempotency_key: IdempotencyKey = None) -> Response:
    """Edits a picture, or the area of a mask in it."""
    state, tenant = caller(http)
    label = _label(http, body)

    async def prepared() -> tuple[Plan, Generation]:
        files = await state.in_thread(_files, body)
        draft = (await _text_plan(state, body)).request
        blank_request = await state.in_thread(_blank_request, body, files, draft)
        generation = await prepare(state, tenant, blank_request, label=label)  # before a pixel is decoded
        plan = await state.in_thread(_edit_plan, body, files, state.manifest, draft.seed)
        generation.request = plan.request
        if not body.include_init_images:
            body.init_images = body.mask = None  # the client may leave before the answer is ready
        return plan, generation

    return await _answer(http, body, prepared, idempotency_key)


@_api.post("/png-info")
async def png_info(http: HTTPRequest, body: PictureFile) -> PictureInfo:
    """Reads the generation parameters in a picture. PNG, JPEG and WebP can carry them."""
    state = State.of(http)
    return await state.in_thread(_picture_info, body.image)


@_api.get("/progress")
async def progress(
    http: HTTPRequest,
    skip_current_image: bool = False,
    force_task_id: TaskId = "",
) -> Progress:
    """Reports the progress of the caller's requests. `force_task_id` selects one of them; all zero if there is none."""
    state = State.of(http)
    generations = _generations(http, force_task_id)
    answer = answers.progress_of([*generations])
    shown = next((generation for generation in generations if generation.estimate is not None), None)
    if shown is not None and shown.estimate is not None and not skip_current_image:
        answer.current_image = as_base64(await state.in_thread(state.preview, shown.estimate, shown.pasted))
    answer.current_task = next(iter(generations.values())).task_id or None if generations else None
    return answer


@_api.post("/interrupt")
async def interrupt(http: HTTPRequest, force_task_id: TaskId = "") -> dict[str, str]:
    """Ends the caller's requests. `force_task_id` selects one of them; they return the pictures that are ready."""
    for generation in _generations(http, force_task_id):
        generation.cancel()
    return {}


@_api.post("/skip")
async def skip(http: HTTPRequest) -> dict[str, str]:
    """Ends the caller's oldest request. It returns the pictures that are ready."""
    for generation in [*_generations(http)][:1]:
        generation.cancel()
    return {}


@_api.get("/options")
async def read_options(http: HTTPRequest) -> dict[str, Any]:
    """The server's settings."""
    return options(State.of(http).manifest)


@_api.post("/options", responses=NULL_RESPONSE)
async def write_options(http: HTTPRequest, body: dict[str, Any]) -> None:
    """Accepts the settings as they are, and ignores those of display, saving and speed. Another value of one that
    changes pictures is refused: `override_settings` changes one request's."""
    manifest = State.of(http).manifest
    for name in checked_options(body, options(manifest), ModelNames.of(manifest.source)):
        raise Unprocessable(
            f"this server keeps no settings, so {name!r} stays as it is: send override_settings with each request", name
        )


@_api.get("/samplers")
async def samplers() -> list[SamplerItem]:
    """The samplers, by A1111's names."""
    return answers.samplers()


@_api.get("/schedulers")
async def schedulers() -> list[SchedulerItem]:
    """The schedules; all but karras are the model's own."""
    return answers.schedulers()


@_api.get("/sd-models")
async def sd_models(http: HTTPRequest) -> list[ModelItem]:
    """The one model of this server."""
    return answers.model_items(State.of(http).manifest)


@_api.get("/embeddings")
async def embeddings(http: HTTPRequest) -> Embeddings:
    """The caller's words. At most 1000 of them: /v1/words lists all."""
    state = State.of(http)
    records = await state.words.list(http.state.tenant, "", _MAX_WORDS)
    widths = {encoder.graph: encoder.width for encoder in state.manifest.encoders}
    loaded: dict[str, EmbeddingItem] = {}
    for record in records:
        encoder, vectors = next(iter(record.vectors.items()))
        loaded[record.token] = EmbeddingItem(shape=widths.get(encoder, 0), vectors=vectors)
    return Embeddings(loaded=loaded)


@router.get("/embeddings")
async def comfyui_embeddings(http: HTTPRequest) -> list[str]:
    """The caller's words, as ComfyUI lists them. At most 1000 names, for `embedding:name` in a prompt."""
    state = State.of(http)
    tokens = await state.words.tokens(http.state.tenant, _MAX_WORDS)
    return [*dict.fromkeys(token.removeprefix("<").removesuffix(">") for token in tokens)]


@_api.get("/scripts")
async def scripts() -> Scripts:
    """The scripts: none."""
    return Scripts()


@_api.get("/upscalers")
async def upscalers() -> list[UpscalerItem]:
    """The upscalers: only A1111's own "None"."""
    return [UpscalerItem(name="None")]


@_api.get("/script-info")
@_api.get("/sd-vae")
@_api.get("/loras")
@_api.get("/hypernetworks")
@_api.get("/prompt-styles")
@_api.get("/face-restorers")
@_api.get("/latent-upscale-modes")
@_api.get("/realesrgan-models")
@_api.get("/extensions")
@_api.get("/sd-modules")
async def nothing() -> list[dict[str, str]]:
    """Lists what this server does not have: nothing."""
    return []


@_api.get("/cmd-flags")
async def cmd_flags() -> dict[str, bool]:
    """The flags of the command line that clients look at."""
    return {"api": True, "nowebui": True}


@_api.get("/memory")
async def memory() -> Memory:
    """The machine's memory in bytes."""
    unavailable: dict[str, float | str] = {"error": "unavailable"}
    return Memory(ram=_memory() or unavailable, cuda=unavailable)


@_api.post("/refresh-checkpoints", responses=NULL_RESPONSE)
@_api.post("/refresh-embeddings", responses=NULL_RESPONSE)
@_api.post("/refresh-loras", responses=NULL_RESPONSE)
@_api.post("/refresh-vae", responses=NULL_RESPONSE)
async def refresh() -> None:
    """Does nothing. Words are usable as soon as they are stored."""


router.include_router(_api)


async def _answer(
    http: HTTPRequest,
    body: TextToImage,
    prepared: Callable[[], Awaitable[tuple[Plan, Generation]]],
    key: str | None,
) -> Response:
    """Answers with the pictures of what is prepared, or with those that were kept under the key."""
    state, tenant = caller(http)
    if key is None:
        content = await _drawn(state, http, body, *await prepared())
        return Response(content, media_type="application/json")

    async def draw(stack: contextlib.AsyncExitStack) -> tuple[bytes, bool]:
        plan, generation = await prepared()
        pixels = 0 if plan.crop is None else plan.crop.original[..., 0].size
        text = await state.in_thread(answers.pictures_answer, body, plan, [], [], state.manifest, "")
        # The text twice: each picture's parameters repeat its prompts.
        size = most_bytes(generation, pixels=pixels, in_json=True) + 2 * len(text)
        await stack.enter_async_context(room(state, tenant, size))
        return await _drawn(state, None, body, plan, generation), not generation.cancelled

    return await answered(http, key, body, (), draw)


async def _text_plan(state: State, body: TextToImage) -> Plan:
    """See `text_to_image`; with a seed at random."""
    texts, seed = (body.prompt, body.negative_prompt), secrets.randbelow(RANDOM_SEEDS)
    if body.model_extra:  # names that are compared with the known ones
        return await state.in_thread(text_to_image, body, state.manifest, seed)
    return await state.read_text(texts, text_to_image, body, state.manifest, seed)


async def _drawn(
    state: State, http: HTTPRequest | None, body: TextToImage, plan: Plan, generation: Generation
) -> bytes:
    """Queues the generation of a plan, and returns the answer with its pictures. It is cancelled if the client of
    `http` disconnects."""
    await enter(state, generation, bare_names=True)

    async def encoded(generation: Generation, done: PictureDone) -> str:
        return "" if body.send_images is False else await state.in_thread(_encoded, plan, generation, done)

    found = await finish(http, generation, use=encoded, incomplete=True)
    pictures, images = [done for done, _ in found], [image for _, image in found if image]
    version = f"oneword {oneword.__version__}"
    return await state.in_thread(answers.pictures_answer, body, plan, pictures, images, state.manifest, version)


def _encoded(plan: Plan, generation: Generation, done: PictureDone) -> str:
    return answers.encoded(plan, replace(done, image=generation.pasted(done.image)))


def _memory() -> dict[str, float | str]:
    """Bytes of memory; empty where the system does not say, such as macOS and Windows."""
    try:
        page, total, free = (os.sysconf(f"SC_{name}") for name in ("PAGE_SIZE", "PHYS_PAGES", "AVPHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return {}
    return {"free": page * free, "used": page * (total - free), "total": page * total}


def _picture_info(image: str) -> PictureInfo:
    text = read_parameters(decode_base64(image, "image"))
    return PictureInfo(
        info=text, items={"parameters": text} if text else {}, parameters=answers.parsed_parameters(text)
    )


@dataclass(frozen=True)
class _Files:
    """The picture of an img2img and its mask."""

    image: bytes
    mask: bytes | None


def _edit_plan(body: ImageToImage, files: _Files, manifest: Manifest, random_seed: int) -> Plan:
    image = decode(files.image, "init_images")
    mask = None if files.mask is None else decode_mask(files.mask, transparent=False)
    plan = image_to_image(body, manifest, random_seed, image, mask)
    return replace(plan, request=fitted(plan.request, plan.settings))


def _blank_request(body: ImageToImage, files: _Files, draft: Request) -> Request:
    """The draft as an edit of a black picture: its size is known before a pixel is decoded. Raises as `blank`."""
    return replace(draft, image=blank(files.image, "init_images"), strength=strength_of(body))


def _files(body: ImageToImage) -> _Files:
    """Raises NotFound as A1111 does, Unprocessable, TooLarge."""
    match body.init_images:
        case None | []:
            raise NotFound("Init image not found: send one picture as init_images", "init_images")
        case [text]:
            image = decode_base64(text, "init_images")
        case texts:
            raise Unprocessable(f"init_images has {len(texts)} pictures, but must have exactly one", "init_images")
    return _Files(image, decode_base64(body.mask, "mask") if body.mask else None)


@dataclass(frozen=True)
class _Label:
    """Marks the generations of this dialect."""

    address: str
    """The client's."""
    task_id: str
    """The client's own name for the request, if it gave one."""


def _label(http: HTTPRequest, body: TextToImage) -> _Label:
    return _Label(_address(http), body.force_task_id or "")


def _generations(http: HTTPRequest, task_id: str = "") -> dict[Generation, _Label]:
    """The caller's generations in this dialect that are not done, the oldest first, with their labels."""
    state, tenant = caller(http)
    found = {
        generation: generation.label
        for generation in state.pool.generations(tenant)
        if isinstance(generation.label, _Label)
    }
    return {
        generation: label
        for generation, label in found.items()
        if (state.keys is not None or label.address == _address(http)) and task_id in ("", label.task_id)
    }


def _address(http: HTTPRequest) -> str:
    return http.client.host if http.client else ""
