"""The job of a contender in an environment of its own, and its timing loop. Imports only the standard library."""

import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict


class Job(TypedDict):
    """What to draw, and how."""

    model: str
    """Folder written by optimum-cli; for stable-diffusion.cpp that of the diffusers model."""
    cache: str
    """Folder of OpenVINO's compiled models."""
    static: bool
    """Only openvino-genai: whether the pipeline is reshaped to one size before it is compiled."""
    precision: str
    """Only OpenVINO: that of its arithmetic."""
    weights: str
    """Only stable-diffusion.cpp: the format of its weights."""
    size: int
    steps: int
    guidance: float
    seed: int
    threads: int
    warm_up: list[str]
    prompts: list[str]
    cold: str | None
    """The file of the one picture to draw; None to measure."""


def run(
    job: Job, draw: Callable[[str], Any], step_seconds: Callable[[], float], bare_seconds: Callable[[], float]
) -> None:
    """Writes one picture to `cold`, or prints the measurements as JSON.

    `draw` makes the PIL picture of a prompt; the other two return seconds per step of the picture drawn last, of which
    `bare_seconds` are those within the network.
    """
    if job["cold"]:
        draw(job["prompts"][0]).save(job["cold"])
        return
    for prompt in job["warm_up"]:
        draw(prompt)
    pictures, steps, bare = [], [], []
    for prompt in job["prompts"]:
        start = time.perf_counter()
        draw(prompt)
        pictures.append(time.perf_counter() - start)
        steps.append(step_seconds())
        bare.append(bare_seconds())
    step = statistics.median(steps)
    result = {
        "picture_ms": 1e3 * statistics.median(pictures),
        "step_ms": 1e3 * step,
        "overhead_ms": 1e3 * (step - statistics.median(bare)),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


def between(ends: list[float]) -> float:
    """Seconds per step, from the times at which the steps of a picture ended."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)
