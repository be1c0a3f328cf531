"""A bundle, concepts and requests become pictures here. No torch. The names below are the API; docs/api.md shows it."""

from oneword.engines.open import Backend
from oneword.runtime.batch import Batch, Failed, PictureDone, StepDone
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.generate import generate
from oneword.runtime.images import read_image, read_mask, save_png
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.samplers import Sampler

__all__ = [
    "Backend",
    "Batch",
    "Concept",
    "Failed",
    "Model",
    "PictureDone",
    "Request",
    "Sampler",
    "StepDone",
    "generate",
    "load_concept",
    "read_image",
    "read_mask",
    "save_concept",
    "save_png",
]
