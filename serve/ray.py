"""`ti-serve` on Ray Serve: many replicas of the same app, scaled by the seconds of work that wait.

    serve run oneword.serve.ray:app bundle=/models/bundle words=s3://bucket/words

Each replica is one engine process with its own queue. They share the word store, so any of them answers any request.
Not covered: A1111's progress and interrupt, which belong to the replica that makes the picture; metrics of all replicas
at one address, as /metrics is that of the replica that answers. Learning on a cluster is `ti-train --ray`.
"""

import asyncio
import contextlib
import math
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from starlette.types import ASGIApp

from oneword.engines.errors import EngineError, UsageError, one_of
from oneword.serve.app import build_state, create_app
from oneword.serve.command import SWITCH_SECONDS, log_to_standard_error
from oneword.serve.settings import Settings

ONGOING: Final = 1000
"""Requests that Ray passes to a replica at a time: above what its own queue accepts, so that it refuses the others."""
STOP_SECONDS: Final = 3600.0
"""How long a replica may take to finish what it has accepted if `drain_seconds` is not given: Ray needs a limit."""
_FIGURE: Final = "queued_seconds"
_PATHS: Final = ("bundle", "keys", "jobs")


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_seconds: float = 5.0
    """Seconds of queued work per replica, above which another one is started."""
    upscale_delay: float = 10.0
    downscale_delay: float = 600.0


class Replica:
    """One engine and its app, as a Ray actor."""

    def __init__(self, settings: Settings) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
        log_to_standard_error()
        replica = serve.get_replica_context().replica_id.unique_id
        if settings.model is not None:  # replicas of one machine share a port, and so the default folder
            settings = replace(settings, jobs=settings.jobs_folder / replica)
        self.state = build_state(settings)
        self.state.metrics.name_replica(replica)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = create_app(self.state)
        starts = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            """As the app's own, but Ray sends requests only once the engine is warm."""
            async with starts(app) as shared:
                await asyncio.to_thread(self.state.worker.wait_ready)
                yield shared

        app.router.lifespan_context = lifespan
        return app

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The figure that the number of replicas depends on."""
        return {_FIGURE: self.state.pool.queued_seconds}

    async def check_health(self) -> None:
        """Raises EngineError if the engine failed or hangs; Ray then replaces this replica."""
        worker = self.state.worker
        if worker.failure or worker.stalled(self.state.settings.hang_seconds):
            raise EngineError(worker.failure or "the engine hangs")


class ByQueuedSeconds:
    """Ray's autoscaling policy: as many replicas as keep the queued work of each at `target_seconds`."""

    def __init__(self, target_seconds: float) -> None:
        self.target_seconds = target_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas; Ray keeps it within its limits."""
        queued = (context.aggregated_metrics or {}).get(_FIGURE, {})
        return max(1, math.ceil(sum(queued.values()) / self.target_seconds)), {}


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Ray Serve's application builder: the fields of Settings and of Scaling by name. Raises UsageError."""
    if "bundle" not in arguments:
        raise UsageError("no bundle was given: serve run oneword.serve.ray:app bundle=FOLDER")
    settings = Settings(**{name: _typed(name, value) for name, value in arguments.items() if name in _names(Settings)})
    scaling = Scaling(**{name: _number(name, arguments[name]) for name in arguments if name in _names(Scaling)})
    if scaling.max_replicas > 1 and "words" not in arguments:
        raise UsageError("with more than one replica, words must name a folder or a URL that all nodes reach")
    if unknown := arguments.keys() - _names(Settings) - _names(Scaling):
        allowed = one_of(sorted(_names(Settings) | _names(Scaling)))
        raise UsageError(f"there is no argument {min(unknown)!r}: use {allowed}")
    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name="oneword",
        max_ongoing_requests=ONGOING,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=(
            STOP_SECONDS if settings.drain_seconds is None else settings.drain_seconds + settings.write_seconds
        ),
        health_check_period_s=5,
        health_check_timeout_s=settings.hang_seconds,
        autoscaling_config=AutoscalingConfig(
            min_replicas=int(scaling.min_replicas),
            max_replicas=int(scaling.max_replicas),
            upscale_delay_s=scaling.upscale_delay,
            downscale_delay_s=scaling.downscale_delay,
            metrics_interval_s=2,
            look_back_period_s=5,
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:{ByQueuedSeconds.__name__}",
                policy_kwargs={"target_seconds": scaling.target_seconds},
            ),
        ),
    )
    application: serve.Application = deployment.bind(settings)  # pyright: ignore[reportFunctionMemberAccess]
    return application


def _names(settings: type) -> set[str]:
    return {field.name for field in fields(settings)}


def _typed(name: str, value: Any) -> Any:
    """A value of serve.yaml or of `serve run`'s command line, as Settings has it."""
    kind = {field.name: field.type for field in fields(Settings)}[name]
    if value is None:
        if NoneType not in get_args(kind):
            raise UsageError(f"{name} is null: leave it out for its default")
        return None
    if name in _PATHS:
        return Path(value)
    if kind == tuple[str, ...]:
        return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    if isinstance(value, str) and kind in (int, float, int | None, float | None):
        return _number(name, value)
    return value


def _number(name: str, value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {value!r}, but must be a number") from None
    return int(number) if number.is_integer() and "seconds" not in name and "delay" not in name else number
