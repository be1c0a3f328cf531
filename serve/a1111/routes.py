"""The routes of A1111's API, /sdapi/v1/*, and ComfyUI's list of embeddings.

A route translates, starts a generation, and answers. `progress`, `interrupt` and `skip` are about the caller's own
requests in this dialect: those of its key, or of its address where the server has no keys. The server keeps no
settings: `options` takes what it lists itself, and `override_settings` has those of one request. Not covered, and
answered with 404: upscaling, interrogation, extensions.
"""

import os
import secrets
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

import oneword
from oneword.runtime.edit import Mask
from oneword.runtime.request import Image
from oneword.serve.a1111 import answers
from oneword.serve.a1111.dialect import (
    RANDOM_SEEDS,
    ModelNames,
    Plan,
    checked_options,
    image_to_image,
    options,
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
from oneword.serve.generate import finish, start
from oneword.serve.openapi import NULL_RESPONSE, error_responses
from oneword.serve.pictures import as_base64, decode, decode_base64, decode_mask, read_parameters
from oneword.serve.pool import Generation
from oneword.serve.state import State, caller

_MAX_WORDS: Final = 1000

router = APIRouter(tags=["A1111"])
_api = APIRouter(prefix="/sdapi/v1", responses=error_responses(Error))


@_api.post("/txt2img", response_model=Pictures)
async def txt2img(http: HTTPRequest, body: TextToImage) -> Response:
    """Generates pictures from a prompt."""
    state = State.of(http)
    plan = text_to_image(body, state.manifest, secrets.randbelow(RANDOM_SEEDS))
    return await _drawn(http, body, plan)


@_api.post("/img2img", response_model=Pictures)
async def img2img(http: HTTPRequest, body: ImageToImage) -> Response:
    """Edits a picture, or the area of a mask in it."""
    state = State.of(http)
    plan = await state.in_thread(_edit_plan, body, state)
    return await _drawn(http, body, plan)


@_api.post("/png-info")
async def png_info(http: HTTPRequest, body: PictureFile) -> PictureInfo:
    """Reads the generation parameters in a picture. PNG, JPEG and WebP can carry them."""
    state = State.of(http)
    text = await state.in_thread(lambda: read_parameters(decode_base64(body.image, "image"), "image"))
    return PictureInfo(
        info=text, items={"parameters": text} if text else {}, parameters=answers.parsed_parameters(text)
    )


@_api.get("/progress")
async def progress(
    http: HTTPRequest,
    skip_current_image: bool = False,
    force_task_id: TaskId = "",
) -> Progress:
    """The progress of the caller's requests. Or of the one that `force_task_id` names; all zero if there is none."""
    state = State.of(http)
    generations = _generations(http, force_task_id)
    answer = answers.progress_of([*generations])
    denoised = next((generation.denoised for generation in generations if generation.denoised is not None), None)
    if denoised is not None and not skip_current_image:
        answer.current_image = as_base64(await state.in_thread(state.preview, denoised))
    answer.current_task = next(iter(generations.values())).task_id or None if generations else None
    return answer


@_api.post("/interrupt")
async def interrupt(http: HTTPRequest, force_task_id: TaskId = "") -> dict[str, str]:
    """Ends the caller's requests. Or the one that `force_task_id` names: they answer the pictures that are ready."""
    for generation in _generations(http, force_task_id):
        generation.cancel()
    return {}


@_api.post("/skip")
async def skip(http: HTTPRequest) -> dict[str, str]:
    """Ends the caller's oldest request. It answers the pictures that are ready."""
    for generation in [*_generations(http)][:1]:
        generation.cancel()
    return {}


@_api.get("/options")
async def read_options(http: HTTPRequest) -> dict[str, Any]:
    """The server's settings."""
    return options(State.of(http).manifest)


@_api.post("/options", responses=NULL_RESPONSE)
async def write_options(http: HTTPRequest, body: dict[str, Any]) -> None:
    """Accepts the settings as they are. Another value is refused: `override_settings` changes one request's."""
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
    records = await state.words.list(http.state.tenant, "", _MAX_WORDS)
    return [*dict.fromkeys(record.token.removeprefix("<").removesuffix(">") for record in records)]


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
async def nothing() -> list[dict[str, str]]:
    """What this server has none of."""
    return []


@_api.get("/cmd-flags")
async def cmd_flags() -> dict[str, bool]:
    """The flags of the command line that clients look at."""
    return {"api": True, "nowebui": True}


@_api.get("/memory")
async def memory() -> Memory:
    """The machine's memory in bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return Memory(ram={"free": free, "used": total - free, "total": total}, cuda={"error": "unavailable"})


@_api.post("/refresh-checkpoints", responses=NULL_RESPONSE)
@_api.post("/refresh-embeddings", responses=NULL_RESPONSE)
@_api.post("/refresh-loras", responses=NULL_RESPONSE)
@_api.post("/refresh-vae", responses=NULL_RESPONSE)
async def refresh() -> None:
    """Does nothing. Words are usable as soon as they are stored."""


router.include_router(_api)


async def _drawn(http: HTTPRequest, body: TextToImage, plan: Plan) -> Response:
    """Runs a plan, and answers its pictures."""
    state = State.of(http)
    generation = await start(
        state,
        http.state.tenant,
        plan.request,
        bare_names=True,
        label=_Label(_address(http), body.force_task_id or ""),
    )
    pictures = await finish(http, generation, incomplete=True)
    version = f"oneword {oneword.__version__}"
    content = await state.in_thread(answers.pictures_answer, body, plan, pictures, state.manifest, version)
    return Response(content, media_type="application/json")


def _edit_plan(body: ImageToImage, state: State) -> Plan:
    image, mask = _decoded(body)
    return image_to_image(body, state.manifest, secrets.randbelow(RANDOM_SEEDS), image, mask)


def _decoded(body: ImageToImage) -> tuple[Image, Mask | None]:
    """The picture and the mask of an img2img. Raises NotFound as A1111 does, Unprocessable, TooLarge."""
    match body.init_images:
        case None | []:
            raise NotFound("Init image not found: send one picture as init_images", "init_images")
        case [text]:
            image = decode(decode_base64(text, "init_images"), "init_images")
        case texts:
            raise Unprocessable(f"init_images has {len(texts)} pictures, allowed is one", "init_images")
    return image, decode_mask(decode_base64(body.mask, "mask"), transparent=False) if body.mask else None


@dataclass(frozen=True)
class _Label:
    """Marks the generations of this dialect."""

    address: str
    """The client's."""
    task_id: str
    """The client's own name for the request, if it gave one."""


def _generations(http: HTTPRequest, task_id: str = "") -> dict[Generation, _Label]:
    """The caller's generations in this dialect that are not done, the oldest first, with their labels."""
    state, tenant = caller(http)
    found = {one: one.label for one in state.pool.generations(tenant) if isinstance(one.label, _Label)}
    return {
        generation: label
        for generation, label in found.items()
        if (state.keys is not None or label.address == _address(http)) and task_id in ("", label.task_id)
    }


def _address(http: HTTPRequest) -> str:
    return http.client.host if http.client else ""
