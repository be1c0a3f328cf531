"""Figures for Prometheus, on a registry of the app's own. Labels are bounded: never a word, a tenant or a path.

Not covered: the figures of one request, which its log line has.
"""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_WAITS: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_STEPS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The counters, histograms and gauges of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = self._counter("requests", "Answers, by route and status.", "route", "status")
        self.pictures = self._counter(
            "pictures", "Pictures that ended, by outcome: done, failed, cancelled.", "outcome"
        )
        self.rejected = self._counter("rejected", "Requests that were refused, by reason.", "reason")
        self.cancelled = self._counter("cancelled", "Pictures that were cancelled, by phase.", "phase")
        self.queue_seconds = self._histogram("queue_seconds", "Wait from arrival until a picture has a slot.", _WAITS)
        self.first_step_seconds = self._histogram("first_step_seconds", "Arrival until a picture's first step.", _WAITS)
        self.step_seconds = self._histogram("step_seconds", "Turns of the engine.", _STEPS)
        self.batch_rows = self._histogram("batch_rows", "Pictures that shared a step.", _ROWS)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A value that is read whenever the metrics are."""
        Gauge(f"oneword_{name}", text, registry=self.registry).set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"oneword_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"oneword_{name}", text, buckets=buckets, registry=self.registry)
