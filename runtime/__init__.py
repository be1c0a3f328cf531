"""Generates pictures from a bundle, concepts and requests. No torch. Its names are the API: docs/guide/api.md."""

from oneword.engines.open import Backend
from oneword.runtime import refine
from oneword.runtime.aspects import Aspect, parse_aspects
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.drawing import draw, generate
from oneword.runtime.events import Event, Failed, PictureDone, StepDone
from oneword.runtime.images import read_image, read_mask, save_png
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.samplers import Guidance, Sampler
from oneword.runtime.scheduler import Scheduler
from oneword.runtime.spacing import Spacing

__all__ = [
    "Aspect",
    "Backend",
    "Concept",
    "Event",
    "Failed",
    "Guidance",
    "Lexicon",
    "Model",
    "PictureDone",
    "Request",
    "Sampler",
    "Scheduler",
    "Spacing",
    "StepDone",
    "draw",
    "generate",
    "load_concept",
    "parse_aspects",
    "read_image",
    "read_mask",
    "refine",
    "save_concept",
    "save_png",
]
