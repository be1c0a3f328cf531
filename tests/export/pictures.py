"""Pictures of models and of diffusers' pipelines, and plans for every graph of a bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from oneword.runtime.bundle import Bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.profiles import PlanLimits
from oneword.runtime.request import Image
from tests.plans import rtx_plans


def picture(model: Model, prompt: str, **settings: Any) -> Image:
    [result] = draw(model, prompt, **{"seed": 4, "steps": 6, "size": (80, 64), **settings})
    assert result.image.std() > 1  # not a blank picture
    return result.image


def diffusers_picture(pipeline: Any, prompt: str | None, size: tuple[int, int] = (80, 64), **settings: Any) -> Image:
    pipeline.set_progress_bar_config(disable=True)
    defaults = {"num_inference_steps": 6, "width": size[0], "height": size[1], "output_type": "np"}
    output = pipeline(prompt=prompt, generator=torch.Generator().manual_seed(4), **{**defaults, **settings})
    return np.asarray((output.images[0] * 255).round(), np.uint8)


def assert_planned(path: Path) -> None:
    """Builds plans without a GPU; the builder fails if the parsed network differs from the manifest."""
    bundle = Bundle.open(path)
    plans = rtx_plans(bundle, "sm89", PlanLimits(max_batch=1))
    assert plans.keys() == bundle.manifest.graphs.keys()
    assert all(path.stat().st_size > 1000 for paths in plans.values() for path in paths)
