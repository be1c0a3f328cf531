"""The contender openvino-genai of `benchmarks.latency`, in the environment that genai.sh builds.

    python genai.py '{"model": "...", "static": true, "size": 256, ...}'

Takes one JSON object (see `pictures.Job`). Writes one picture to `cold` and exits, or prints the measurements as JSON.
A step is timed between two callbacks; the bare engine is the UNet's time as the pipeline reports it. Imports nothing of
this project, which is not installed there.
"""

import json
import sys
import time
from typing import Any

import openvino_genai
from pictures import Job, between, run
from PIL import Image


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
        picture = pipeline.generate(
            prompt,
            width=job["size"],
            height=job["size"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            rng_seed=job["seed"],
            callback=ended,
        )
        return Image.fromarray(picture.data[0])

    def bare() -> float:
        return float(pipeline.get_performance_metrics().get_unet_infer_duration().mean) / 1e3

    run(job, draw, lambda: between(ends), bare)


if __name__ == "__main__":
    main()
