"""The contender optimum-intel of `benchmarks.latency`, in the environment that genai.sh builds.

    python optimum_intel.py '{"model": "...", "size": 256, ...}'

Takes one JSON object (see `pictures.Job`): diffusers' pipeline with every network in OpenVINO,
compiled for one size. Writes one picture to `cold` and exits, or prints the measurements as JSON. A step is timed
between two callbacks; the bare engine is the UNet's time. Imports nothing of this project, which is not installed
there.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
from diffusers.utils import logging
from optimum.intel import OVPipelineForText2Image
from pictures import Job, between, run


def main() -> None:
    """Runs one job."""
    job: Job = json.loads(sys.argv[1])
    logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    config = {
        "INFERENCE_PRECISION_HINT": job["precision"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(job["threads"]),
        "CACHE_DIR": job["cache"],
    }
    pipeline = OVPipelineForText2Image.from_pretrained(job["model"], compile=False, ov_config=config)
    pipeline.reshape(batch_size=1, height=job["size"], width=job["size"], num_images_per_prompt=1)
    pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)
    ends, spent = list[float](), list[float]()
    forward = pipeline.unet.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = forward(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    pipeline.unet.forward = timed

    def ended(_pipeline: Any, _step: int, _time: Any, kwargs: Any) -> Any:
        ends.append(time.perf_counter())
        return kwargs

    def draw(prompt: str) -> Any:
        ends.clear()
        spent.clear()
        return pipeline(
            prompt,
            width=job["size"],
            height=job["size"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            generator=torch.Generator().manual_seed(job["seed"]),
            callback_on_step_end=ended,
        ).images[0]

    run(job, draw, lambda: between(ends), lambda: statistics.mean(spent[1:]))


if __name__ == "__main__":
    main()
