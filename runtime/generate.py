"""Requests in, pictures out: the loops over a Scheduler. `draw` gives pictures, `generate` everything that happens."""

from collections.abc import Iterator, Sequence
from typing import Any

from oneword.engines.errors import OnewordError, UsageError
from oneword.runtime.events import Event, Failed, PictureDone
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.scheduler import MAX_ROWS, Scheduler


def draw(model: Model, *requests: Request | str, max_rows: int = MAX_ROWS, **settings: Any) -> list[PictureDone]:
    """Every picture of the requests, in order. A prompt may stand for a request; `settings` are then Request's.

    Raises UsageError before anything is computed for a request that cannot be made, and the error of the first picture
    that fails.
    """
    if settings and any(isinstance(request, Request) for request in requests):
        raise UsageError(f"settings ({', '.join(settings)}) go with prompts: give a Request its own")
    made = [request if isinstance(request, Request) else Request(request, **settings) for request in requests]
    pictures: dict[tuple[int, int], PictureDone] = {}
    for event in generate(model, made, max_rows, max_steps=None):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PictureDone):
            pictures[event.id, event.index] = event
    return [pictures[key] for key in sorted(pictures)]


def generate(
    model: Model, requests: Sequence[Request], max_rows: int = MAX_ROWS, max_steps: int | None = 1
) -> Iterator[Event]:
    """Yields what happens while all requests are made together; see Scheduler. The n-th request has the id n.

    `max_steps` is how many steps may pass between two events that are not StepDone. Raises UsageError, before anything
    is computed, for a request that cannot be made.
    """
    scheduler = scheduler_for(model, requests, max_rows)
    while scheduler:
        yield from scheduler.step(max_steps)


def scheduler_for(model: Model, requests: Sequence[Request], max_rows: int = MAX_ROWS) -> Scheduler:
    """A scheduler with these requests and no more slots than they can fill. Raises UsageError; then none is added."""
    scheduler = Scheduler(model, max(1, min(max_rows, sum(request.num_images for request in requests))))
    try:
        for request in requests:
            scheduler.add(request)
    except OnewordError:
        scheduler.cancel_all()
        raise
    return scheduler
