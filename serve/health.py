"""What machines ask about a server: is it alive, is it ready, and its metrics."""

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from oneword.serve.state import State
from oneword.serve.worker import State as WorkerState

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live(http: Request) -> Response:
    """200 while the engine works; 500 after it failed or stopped."""
    worker = State.of(http).worker
    alive = worker.state in (WorkerState.STARTING, WorkerState.READY)
    return JSONResponse({"status": worker.state}, 200 if alive else 500)


@router.get("/health/ready")
async def ready(http: Request) -> Response:
    """200 once the engines are open and warm; 503 before, and from the moment that the server is told to stop."""
    state = State.of(http)
    if state.pool.draining:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": state.worker.state}, 200 if state.worker.state is WorkerState.READY else 503)


@router.get("/metrics", response_class=Response)
async def metrics(http: Request) -> Response:
    """Prometheus's text format."""
    encode, media_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(State.of(http).metrics.registry), media_type=media_type)
