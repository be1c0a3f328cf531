"""Requests in, pictures out: loops over a Scheduler. `draw` returns the pictures, `generate` yields every event."""

from collections.abc import Iterator, Sequence
from typing import Any

from oneword.engines.errors import OnewordError, UsageError
from oneword.runtime.events import Event, Failed, PictureDone
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.scheduler import MAX_ROWS, Scheduler


def draw(model: Model, *requests: Request | str, max_rows: int = MAX_ROWS, **settings: Any) -> list[PictureDone]:
    """Every picture of the requests, in order. A request may be a plain prompt; `settings` are then Request's.

    Raises UsageError for an invalid request, before anything is computed, and the error of the first picture that
    fails.
    """
    if settings and any(isinstance(request, Request) for request in requests):
        raise UsageError(f"settings ({', '.join(settings)}) apply to prompts only: set them in each Request")
    complete = [request if isinstance(request, Request) else Request(request, **settings) for request in requests]
    pictures: dict[tuple[int, int], PictureDone] = {}
    for event in generate(model, complete, max_rows, max_steps=None):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PictureDone):
            pictures[event.id, event.index] = event
    return [pictures[key] for key in sorted(pictures)]


def generate(
    model: Model, requests: Sequence[Request], max_rows: int = MAX_ROWS, max_steps: int | None = 1
) -> Iterator[Event]:
    """Yields the events of all requests, generated together; see Scheduler. The n-th request has the id n.

    `max_steps` is how many steps may pass between two events that are not StepDone. Raises UsageError for an invalid
    request, before anything is computed.
    """
    scheduler = scheduler_for(model, requests, max_rows)
    try:
        while scheduler:
            yield from scheduler.step(max_steps)
    finally:
        model.stop_opening()


def scheduler_for(model: Model, requests: Sequence[Request], max_rows: int = MAX_ROWS) -> Scheduler:
    """A scheduler with these requests and no more slots than they can fill. Raises UsageError for an invalid one.

    The encoders and decoders that the requests need are opened in the background, while the denoiser is: call
    `Model.stop_opening` at the end, also after an error.
    """
    scheduler = Scheduler(model, max(1, min(max_rows, sum(request.num_images for request in requests))))
    try:
        for request in requests:
            scheduler.add(request)
    except OnewordError:
        scheduler.cancel_all()
        raise
    encoders = [encoder.graph for encoder in model.manifest.encoders]
    uses = {
        "vae_encoder": any(request.image is not None for request in requests),
        "vae_preview": any(
            request.draft or (request.previews and model.manifest.has_preview_decoder) for request in requests
        ),
        "vae_decoder": not all(request.draft for request in requests),
    }
    model.open_ahead([*encoders, *(name for name, used in uses.items() if used)] if requests else [])
    return scheduler
