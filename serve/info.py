"""What the page asks about a server: its model and limits, and the caller's own place in the queue."""

from fastapi import APIRouter
from starlette.requests import Request

from oneword.runtime.samplers import Sampler
from oneword.serve.errors import NotFound
from oneword.serve.state import State

router = APIRouter(tags=["server"])


@router.get("/v1/model")
async def model(http: Request) -> dict[str, object]:
    """The model's defaults and limits, and what this server can do."""
    state = State.of(http)
    manifest, defaults = state.manifest, state.manifest.defaults
    return {
        "object": "model",
        "name": state.name,
        "license": manifest.source.license,
        "digest": manifest.source.digest,
        "defaults": {
            "width": defaults.width,
            "height": defaults.height,
            "steps": defaults.steps,
            "guidance_scale": defaults.guidance_scale,
            "sampler": defaults.sampler,
        },
        "samplers": [sampler.value for sampler in Sampler],
        "size_multiple": manifest.size_multiple,
        "max_pixels": state.max_pixels,
        "max_side": manifest.max_side,
        "edits": "vae_encoder" in manifest.graphs,
        "learn": state.jobs is not None,
        "refine": False,
        "tenant": http.state.tenant.name,
    }


@router.get("/v1/queue")
async def queue(http: Request) -> dict[str, object]:
    """The caller's pictures in progress, oldest first, with their place and the estimated seconds left."""
    state = State.of(http)
    generations = state.pool.generations(http.state.tenant)
    data = [
        {
            "id": generation.id,
            "position": generation.position,
            "progress": round(generation.progress, 4),
            "seconds_left": round(generation.seconds_left, 1),
            "pictures": generation.request.num_images,
        }
        for generation in generations
    ]
    return {"object": "list", "data": data, "queued_seconds": round(state.pool.queued_seconds, 1)}


@router.delete("/v1/queue/{id}", status_code=204)
async def cancel(http: Request, id: str) -> None:
    """Cancels one of the caller's generations. One that has ended, or another tenant's, is a 404."""
    state = State.of(http)
    for generation in state.pool.generations(http.state.tenant):
        if generation.id == id:
            generation.cancel()
            return
    raise NotFound(f"there is no generation {id[:80]!r} in progress: GET /v1/queue lists yours", param="id")
