"""Requests in, events out: the loop over a batch. Progress, previews and saving are the caller's."""

from collections.abc import Iterable, Iterator

from oneword.runtime.batch import Batch, Event
from oneword.runtime.model import Model
from oneword.runtime.request import Request


def generate(model: Model, requests: Iterable[Request], max_rows: int = 16, listen: bool = True) -> Iterator[Event]:
    """Yields what happens while all requests are made together; see Batch. The n-th request has the id n.

    Raises UsageError, before anything is computed, for a request that cannot be made.
    """
    batch = Batch(model, max_rows, listen)
    for request in requests:
        batch.add(request)
    while batch:
        yield from batch.step()
