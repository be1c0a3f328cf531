"""The events of a request's pictures, in the order in which they happen. Data only."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import OnewordError
from oneword.runtime.images import parameters_text, save_png
from oneword.runtime.request import Image, Request, ResolvedSettings

Latents: TypeAlias = npt.NDArray[np.float32]
"""[C, h, w]"""


@dataclass(frozen=True, eq=False)
class StepDone:
    """Step `step` of `steps` of picture `index` of request `id` has run; on a device it may still be queued."""

    id: int
    index: int
    step: int
    steps: int
    denoised: Latents | None = None
    """The model's current estimate of the picture, if the request has a preview at this step."""


@dataclass(frozen=True, eq=False)
class PictureDone:
    """Picture `index` of request `id` is ready: uint8 [H, W, 3]."""

    id: int
    index: int
    seed: int
    image: Image
    request: Request
    settings: ResolvedSettings
    model: str
    """Name of the model, for the picture's metadata."""

    @property
    def parameters(self) -> str:
        """The generation parameters, in the format that A1111 writes into its pictures."""
        return parameters_text(self.request, self.settings, self.seed, self.model)

    def save(self, path: str | Path) -> None:
        """Writes a PNG that contains `parameters`, whole or not at all. Raises FileError."""
        save_png(self.image, Path(path), self.parameters)


@dataclass(frozen=True, eq=False)
class Failed:
    """This picture failed; the others are unaffected."""

    id: int
    index: int
    error: OnewordError


Event: TypeAlias = StepDone | PictureDone | Failed
