"""Generates one picture, step by step, from a bundle's engines: the whole algorithm on one page.

    python examples/one_picture.py bundle "a photo of a red star" star.png

`oneword.runtime.draw` does the same for many pictures at once. Not covered: SDXL (pooled vectors and sizes), prompts of
several chunks, edits.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from oneword.runtime import Model, Sampler
from oneword.runtime.noise import TorchGenerator
from oneword.runtime.samplers import make_schedule

SEED, STEPS, GUIDANCE = 7, 20, 5.0


def main(bundle: str, prompt: str, output: str) -> None:
    """Generates a picture of the prompt and writes it as a PNG."""
    model = Model.open(bundle, "onnxruntime")
    manifest = model.manifest
    width, height, factor = manifest.defaults.width, manifest.defaults.height, manifest.vae.factor
    shape = (1, manifest.vae.latent_channels, height // factor, width // factor)

    uncond, cond = model.encode([model.tokenize(""), model.tokenize(prompt)])  # hidden states [T, D]
    schedule = make_schedule(manifest.scheduler, Sampler.DPMPP_2M, STEPS, guidance_scale=GUIDANCE)
    sample = np.float32(schedule.init_scale) * TorchGenerator(SEED).randn(shape)
    previous = previous2 = np.zeros(shape, np.float32)

    step = model.engine("denoise_step")
    _, _, layers = step.inputs["branch_context"].axes  # [N, 2, L]: keys and values, of each cross-attention layer
    fixed: Mapping[str, np.ndarray] = {
        "noise": np.zeros(shape, np.float32),  # DPM++ 2M draws none
        "known": np.zeros(shape, np.float32),  # for masked edits only
        "known_noise": np.zeros(shape, np.float32),
        "mask": np.ones((1, 1, *shape[2:]), np.float32),
        "branch_row": np.array([0, 0]),  # two evaluations of the UNet, both of picture 0,
        "branch_context": np.array([0, 1])[:, None, None].repeat(2, 1).repeat(int(layers), 2),  # one for each prompt
        "uncond_branch": np.array([0]),
        "cond_branch": np.array([1]),
        "context": np.stack([uncond.hidden_states, cond.hidden_states]),
    }
    for line in schedule.table(manifest.columns):  # K numbers per step: the sampler is this table
        state = {"sample": sample, "previous": previous, "previous2": previous2}
        out = step.run({**fixed, **state, "schedule": line[None]})
        sample, previous, previous2 = out["next_sample"], out["denoised"], previous

    images, _ = model.decode(sample)
    Image.fromarray(images[0]).save(Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
