"""The contenders sdcpp-f16 and sdcpp-q8_0 of `benchmarks.latency`, in the environment that sdcpp.sh builds.

    python sdcpp.py '{"model": "...", "weights": "q8_0", "size": 256, ...}'

Takes one JSON object (see `pictures.Job`). stable-diffusion.cpp reads the diffusers
directory and converts its weights each time it starts; it keeps no cache. Writes one picture to `cold` and exits, or
prints the measurements as JSON. A step is timed between two of its progress reports; it does not report the time within
its network, so the host's share is 0. Imports nothing of this project, which is not installed there.
"""

import json
import sys
import time
from typing import Any

from pictures import Job, run
from stable_diffusion_cpp import StableDiffusion


def main() -> None:
    """Runs one job."""
    job: Job = json.loads(sys.argv[1])
    model = StableDiffusion(
        model_path=job["model"], wtype=job["weights"], n_threads=job["threads"], vae_decode_only=True, verbose=False
    )
    ends: dict[int, float] = {}

    def ended(step: int, steps: int, _seconds: float) -> None:
        if steps == job["steps"]:  # loading and decoding report their progress too
            ends[step] = time.perf_counter()

    def draw(prompt: str) -> Any:
        ends.clear()
        return model.generate_image(
            prompt=prompt,
            width=job["size"],
            height=job["size"],
            sample_method="euler",
            sample_steps=job["steps"],
            cfg_scale=job["guidance"],
            seed=job["seed"],
            progress_callback=ended,
        )[0]

    def step() -> float:
        return (ends[job["steps"]] - ends[1]) / (job["steps"] - 1)

    run(job, draw, step, step)


if __name__ == "__main__":
    main()
