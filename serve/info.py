"""Routes that describe a server: its model and limits, and the caller's own place in the queue."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from oneword.runtime.samplers import Guidance, Sampler, guidance_for, samplers_for, spacings_for
from oneword.runtime.spacing import Spacing
from oneword.serve.errors import NotFound
from oneword.serve.state import State

router = APIRouter(tags=["server"])


class Defaults(BaseModel):
    """The values of settings that a request leaves out."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    embedded_guidance: float | None = Field(description="null if the model takes none")
    sampler: Sampler


class ModelBody(BaseModel):
    """The model and what this server can do."""

    model_config = ConfigDict(protected_namespaces=())

    object: Literal["model"] = "model"
    name: str
    license: str | None
    digest: str = Field(description="of the weights")
    defaults: Defaults
    samplers: list[Sampler]
    spacings: list[Spacing]
    guidance: list[Guidance]
    size_multiple: int = Field(description="width and height are multiples of it")
    max_pixels: int
    max_side: int | None = Field(description="most pixels of the longer side; null if there is no limit")
    edits: bool = Field(description="whether pictures can be edited")
    learn: bool = Field(description="whether words can be learned")
    refine: bool = Field(description="whether words can be refined by likes")
    tenant: str = Field(description="the name of the caller's key")


class QueueItem(BaseModel):
    """A request in progress, of one or several pictures."""

    id: str
    position: int = Field(description="pictures before it; 0 when it runs")
    progress: float = Field(description="from 0 to 1")
    seconds_left: float
    pictures: int


class QueueBody(BaseModel):
    """The caller's requests in progress."""

    object: Literal["list"] = "list"
    data: list[QueueItem]
    queued_seconds: float = Field(description="of the work of all callers")


@router.get("/v1/model")
async def model(http: Request) -> ModelBody:
    """Describes the model and this server. Its defaults and limits, and what can be requested."""
    state = State.of(http)
    manifest, defaults = state.manifest, state.manifest.defaults
    return ModelBody(
        name=state.name,
        license=manifest.source.license,
        digest=manifest.source.digest,
        defaults=Defaults(
            width=defaults.width,
            height=defaults.height,
            steps=defaults.steps,
            guidance_scale=defaults.guidance_scale,
            embedded_guidance=defaults.embedded_guidance,
            sampler=Sampler(defaults.sampler),
        ),
        samplers=list(samplers_for(manifest.schedule)),
        spacings=list(spacings_for(manifest.schedule)),
        guidance=list(guidance_for(manifest.schedule)),
        size_multiple=manifest.size_multiple,
        max_pixels=state.max_pixels,
        max_side=manifest.max_side,
        edits="vae_encoder" in manifest.graphs,
        learn=state.settings.model is not None,
        refine=True,
        tenant=http.state.tenant.name,
    )


@router.get("/v1/queue")
async def queue(http: Request) -> QueueBody:
    """Lists the caller's requests in progress. The oldest is first; each has its place and estimated seconds left."""
    state = State.of(http)
    data = [
        QueueItem(
            id=generation.id,
            position=generation.position,
            progress=round(generation.progress, 4),
            seconds_left=round(generation.seconds_left, 1),
            pictures=generation.request.num_images,
        )
        for generation in state.pool.generations(http.state.tenant)
    ]
    return QueueBody(data=data, queued_seconds=round(state.pool.queued_seconds, 1))


@router.delete("/v1/queue/{id}", status_code=204)
async def cancel(http: Request, id: str) -> None:
    """Cancels one of the caller's generations. One that has ended, or another tenant's, is a 404."""
    state = State.of(http)
    for generation in state.pool.generations(http.state.tenant):
        if generation.id == id:
            generation.cancel()
            return
    raise NotFound(f"there is no generation {id[:80]!r} in progress: GET /v1/queue lists yours", param="id")
