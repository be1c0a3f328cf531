"""Figures for Prometheus, on a registry of the app's own. Labels are bounded: never a word, a tenant or a path.

Not covered: the figures of one request, which its log line has.
"""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from oneword.serve.pool import Outcome, Phase
from oneword.serve.worker import STAGES, Turn

_WAITS: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_STEPS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The counters, histograms and gauges of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = self._counter("requests", "Answers, by route and status.", "route", "status")
        self.pictures = self._counter(
            "pictures", "Pictures that ended, by outcome: done, failed, cancelled, dropped.", "outcome"
        )
        self.rejected = self._counter("rejected", "Requests that were refused, by reason.", "reason")
        self.cancelled = self._counter("cancelled", "Pictures that were cancelled, by phase.", "phase")
        self.queue_seconds = self._histogram("queue_seconds", "Arrival until the engine takes a picture up.", _WAITS)
        self.first_step_seconds = self._histogram("first_step_seconds", "Arrival until a picture's first step.", _WAITS)
        self.step_seconds = self._histogram("step_seconds", "Turns of the engine.", _STEPS)
        self.batch_rows = self._histogram("batch_rows", "Pictures that shared a step.", _ROWS)
        self.stage_seconds = self._counter(
            "stage_seconds", "The engine's time, by stage: encode, denoise, decode, partial.", "stage"
        )
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A value that is read whenever the metrics are."""
        Gauge(f"oneword_{name}", text, registry=self.registry).set_function(value)

    def name_replica(self, name: str) -> None:
        """Says which of several replicas behind one address these are the metrics of."""
        Info("oneword_replica", "The replica of Ray Serve that answered.", registry=self.registry).info({"id": name})

    def answered(self, route: str, status: int) -> None:
        """Counts an answer."""
        self.requests.labels(route, status).inc()

    def turn(self, turn: Turn) -> None:
        """Counts a turn of the engine; on its thread."""
        if turn.rows:
            self.step_seconds.observe(turn.seconds["denoise"])
            self.batch_rows.observe(turn.rows)
        for stage, seconds in turn.seconds.items():
            self._stages[stage].inc(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"oneword_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"oneword_{name}", text, buckets=buckets, registry=self.registry)


class PoolMetrics:
    """Counts what a pool does: its Observer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def refused(self, code: str) -> None:
        """See Observer."""
        self._metrics.rejected.labels(code).inc()

    def taken_up(self, seconds: float) -> None:
        """See Observer."""
        self._metrics.queue_seconds.observe(seconds)

    def first_step(self, seconds: float) -> None:
        """See Observer."""
        self._metrics.first_step_seconds.observe(seconds)

    def ended(self, outcome: Outcome, phase: Phase) -> None:
        """See Observer."""
        self._metrics.pictures.labels(outcome).inc()
        if outcome is Outcome.CANCELLED:
            self._metrics.cancelled.labels(phase).inc()
