"""The contender openvino-genai of `benchmarks.latency`, in the environment that genai.sh builds.

    python genai.py '{"model": "...", "static": true, "size": 256, ...}'

Takes one JSON object (see Job). Writes one picture to `cold` and exits, or prints the measurements as JSON. A step is
timed between two callbacks; the bare engine is the UNet's time as the pipeline reports it. Imports nothing of this
project, which is not installed there.
"""

import json
import resource
import statistics
import sys
import time
from typing import Any, TypedDict

import openvino_genai
from PIL import Image


class Job(TypedDict):
    """What to draw, and how."""

    model: str
    """Folder written by optimum-cli."""
    cache: str
    """Folder of OpenVINO's compiled models."""
    static: bool
    """Whether the pipeline is reshaped to one size before it is compiled."""
    precision: str
    size: int
    steps: int
    guidance: float
    seed: int
    threads: int
    warm_up: list[str]
    prompts: list[str]
    cold: str | None


def main() -> None:
    """Runs one job."""
    job: Job = json.loads(sys.argv[1])
    pipeline = openvino_genai.Text2ImagePipeline(job["model"])
    if job["static"]:
        pipeline.reshape(1, job["size"], job["size"], job["guidance"])
    pipeline.compile(
        "CPU",
        INFERENCE_PRECISION_HINT=job["precision"],
        PERFORMANCE_HINT="LATENCY",
        INFERENCE_NUM_THREADS=job["threads"],
        CACHE_DIR=job["cache"],
    )
    ends: list[float] = []

    def ended(_step: int, _steps: int, _latents: Any) -> bool:
        ends.append(time.perf_counter())
        return False  # continue

    def draw(prompt: str) -> Any:
        ends.clear()
        return pipeline.generate(
            prompt,
            width=job["size"],
            height=job["size"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            rng_seed=job["seed"],
            callback=ended,
        )

    if job["cold"]:
        Image.fromarray(draw(job["prompts"][0]).data[0]).save(job["cold"])
        return
    for prompt in job["warm_up"]:
        draw(prompt)
    pictures, steps, bare = [], [], []
    for prompt in job["prompts"]:
        start = time.perf_counter()
        draw(prompt)
        pictures.append(time.perf_counter() - start)
        steps.append((ends[-1] - ends[0]) / (len(ends) - 1))
        bare.append(pipeline.get_performance_metrics().get_unet_infer_duration().mean / 1e3)
    step = statistics.median(steps)
    result = {
        "picture_ms": 1e3 * statistics.median(pictures),
        "step_ms": 1e3 * step,
        "overhead_ms": 1e3 * (step - statistics.median(bare)),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
