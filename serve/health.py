"""Routes for monitoring: whether the server is alive, whether it is ready, and its metrics."""

from typing import Final

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oneword.serve.openapi import Responses
from oneword.serve.state import State
from oneword.serve.worker import State as WorkerState

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The state of the engine: starting, ready, failed or stopped; or that the server is stopping."""

    status: str


_METRICS: Final[Responses] = {
    200: {
        "description": "Prometheus's text format, or OpenMetrics's where it is asked for.",
        "content": {media: {"schema": {"type": "string"}} for media in ("text/plain", "application/openmetrics-text")},
    }
}


@router.head("/health/live", include_in_schema=False)
@router.get(
    "/health/live", response_model=Health, responses={500: {"model": Health, "description": "Failed or stopped."}}
)
async def live(http: Request) -> Response:
    """Whether the engine works. 200 if so, 500 after it failed or stopped."""
    worker = State.of(http).worker
    alive = worker.state in (WorkerState.STARTING, WorkerState.READY)
    return JSONResponse({"status": worker.state}, 200 if alive else 500)


@router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)  # where others have it
@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready", response_model=Health, responses={503: {"model": Health, "description": "Not ready, or stopping."}}
)
async def ready(http: Request) -> Response:
    """Whether to send requests. 200 once the engine is warm; 503 before, and once the server stops."""
    state = State.of(http)
    if state.pool.draining:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": state.worker.state}, 200 if state.worker.state is WorkerState.READY else 503)


@router.get("/metrics", response_class=Response, responses=_METRICS)
async def metrics(http: Request) -> Response:
    """Metrics, in Prometheus's text format."""
    encode, media_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(State.of(http).metrics.registry), media_type=media_type)
