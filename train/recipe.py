"""How a word is learned: frozen settings, checked, some of them by name. No models, no files.

The paper's set-ups (Gal et al. 2022, arXiv 2208.01618, section 5) have its batch, steps and rate: 5,000
steps of batch 4 at a base rate of 0.005, times 2 GPUs, times the batch. `fast`, the default, is our own.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import msgspec

from oneword.engines.errors import UsageError
from oneword.train.stopping import WINDOW


class Subject(Enum):
    """What the pictures have in common, hence which templates are used."""

    OBJECT = "object"
    STYLE = "style"


class Rate(Enum):
    """Learning-rate schedule."""

    CONSTANT = "constant"
    COSINE = "cosine"


class Norm(Enum):
    """What each step does to a vector's length: leave it free, set it to the vocabulary's median, or pull it there."""

    FREE = "free"
    FIXED = "fixed"
    DECAYED = "decayed"


class Compute(Enum):
    """The type the frozen UNet computes in; `AUTO` is bf16 if the processor multiplies it natively, else fp32."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True)
class Recipe:
    """One way to learn a word. Raises `UsageError` for values that make no sense.

    vectors: rows the word has at the end. grow_at: optimiser steps after which one more of them joins (progressive).
    steps: optimiser steps. batch_size: pictures per step and word. accumulation: backward passes per step, each of
    `batch_size` pictures. learning_rate: AdamW's, never scaled. warmup: steps of linear warm-up.
    init_weight: weight of the squared distance to the initial rows in the loss (regularised).
    per_image: the share of prompts that also hold a word of their own picture.
    min_snr: gamma of min-SNR weighting (Hang et al., arXiv 2303.09556), None for none.
    stop_below: the DVAR ratio that ends learning (arXiv 2302.04841), None to run all steps.
    flip: also learn from mirrored pictures. crops: also learn from this many random crops of each picture.
    buckets: pictures keep roughly their aspect ratio instead of being cut square.
    timesteps: the part of the noise schedule that timesteps are drawn from, as fractions; (0, 1) is all of it.
    words_per_call: words that share one UNet call, None for all; 1 makes each word bitwise what it is alone.
    """

    name: str = "custom"
    subject: Subject = Subject.OBJECT
    vectors: int = 1
    grow_at: tuple[int, ...] = ()
    steps: int = 5000
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 0.04
    rate: Rate = Rate.CONSTANT
    warmup: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    init_weight: float = 0.0
    per_image: float = 0.0
    norm: Norm = Norm.FREE
    min_snr: float | None = None
    stop_below: float | None = None
    flip: bool = False
    crops: int = 0
    buckets: bool = False
    timesteps: tuple[float, float] = (0.0, 1.0)
    words_per_call: int | None = None
    compute: Compute = Compute.AUTO
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for field, low, high in (
            ("vectors", 1, 75),
            ("steps", 1, 1_000_000),
            ("batch_size", 1, 4096),
            ("accumulation", 1, 4096),
            ("warmup", 0, max(0, self.steps)),
            ("crops", 0, 64),
        ):
            _within(field, getattr(self, field), low, high)
        if not 0 < self.learning_rate < 10:
            raise UsageError(f"learning_rate is {self.learning_rate}: give a number above 0 and below 10")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas is {self.betas}: give two numbers from 0 to below 1, for example 0.9,0.999")
        if self.weight_decay < 0 or self.init_weight < 0:
            raise UsageError(
                f"weight_decay {self.weight_decay} and init_weight {self.init_weight} must not be negative"
            )
        if not 0 <= self.per_image <= 1:
            raise UsageError(f"per_image is {self.per_image}: it is a share, from 0 to 1")
        if self.min_snr is not None and not self.min_snr > 0:
            raise UsageError(f"min_snr is {self.min_snr}: give a number above 0 (5 is usual)")
        if self.stop_below is not None and not 0 < self.stop_below < 1:
            raise UsageError(f"stop_below is {self.stop_below}: give a ratio between 0 and 1 (0.15 is usual)")
        if self.stop_below is not None and self.steps <= WINDOW:
            raise UsageError(
                f"stop_below looks back {WINDOW} steps and steps is {self.steps}: give more, or leave it out"
            )
        if self.words_per_call is not None:
            _within("words_per_call", self.words_per_call, 1, 4096)
        if not 0 <= self.timesteps[0] < self.timesteps[1] <= 1:
            raise UsageError(f"timesteps is {self.timesteps}: give two rising shares from 0 to 1, for example 0.2,1")
        if len(self.grow_at) >= self.vectors or list(self.grow_at) != sorted(set(self.grow_at)):
            raise UsageError(
                f"grow_at {self.grow_at} with {self.vectors} vectors: give rising steps, fewer of them than vectors"
            )
        if self.grow_at and not 0 < self.grow_at[0] <= self.grow_at[-1] < self.steps:
            raise UsageError(f"grow_at {self.grow_at}: vectors join between step 1 and step {self.steps - 1}")

    def vectors_at(self, step: int) -> int:
        """How many rows are in use after `step` optimiser steps."""
        return self.vectors - len(self.grow_at) + sum(step >= joins for joins in self.grow_at)

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimiser step `step` (the first is 0): linear warm-up, then constant or half a cosine to 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))
        if self.rate is Rate.CONSTANT:
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def with_changes(self, **changes: Any) -> Recipe:
        """This recipe with some settings changed; `steps` also scales `grow_at`, unless that is given too."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise UsageError(f"a recipe has no {', '.join(unknown)}: it has {', '.join(sorted(known))}")
        if "steps" in changes and "grow_at" not in changes and self.grow_at:
            scale = changes["steps"] / self.steps
            changes["grow_at"] = tuple(max(1, round(joins * scale)) for joins in self.grow_at)
        if "steps" in changes and "warmup" not in changes:
            changes["warmup"] = min(self.warmup, max(0, changes["steps"]))
        return dataclasses.replace(self, **changes)

    def with_text(self, settings: Iterable[str]) -> Recipe:
        """This recipe with settings given as `name=value`; tuples are written with commas, None as `null`."""
        changes: dict[str, Any] = {}
        types = typing.get_type_hints(Recipe)
        for setting in settings:
            name, _, text = (part.strip() for part in setting.partition("="))
            if name not in types:
                raise UsageError(f"{setting!r} is no setting: give name=value, the names are {', '.join(types)}")
            value = text.split(",") if typing.get_origin(types[name]) is tuple else text
            try:
                changes[name] = msgspec.convert(value, types[name], strict=False)
            except msgspec.ValidationError as error:
                raise UsageError(f"{setting!r}: {error}") from error
        return self.with_changes(**changes)

    def as_text(self) -> dict[str, str]:
        """Every setting as text, for metadata and for comparing a run with the command that resumes it."""
        return {field.name: _text(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _within(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{field} is {value!r}: give a whole number from {low} to {high}")


def _text(value: object) -> str:
    return value.value if isinstance(value, Enum) else str(value)


def _named(*recipes: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({recipe.name: recipe for recipe in recipes})


_FAST = Recipe(  # a large rate that falls to nothing, large batches, few steps
    "fast",
    steps=200,
    batch_size=16,
    learning_rate=0.02,
    rate=Rate.COSINE,
    warmup=5,
    weight_decay=0.0,
    betas=(0.9, 0.99),
)

RECIPES: Mapping[str, Recipe] = _named(
    _FAST,
    dataclasses.replace(_FAST, name="style", subject=Subject.STYLE),
    # The paper's, section 5: one word, and what it is compared with.
    Recipe("one-word"),
    Recipe("two-vectors", vectors=2),
    Recipe("three-vectors", vectors=3),
    Recipe("progressive-two", vectors=2, grow_at=(2000,)),
    Recipe("progressive-three", vectors=3, grow_at=(2000, 4000)),
    Recipe("regularized", init_weight=0.1),
    Recipe("per-image", per_image=0.25),
    Recipe("high-rate", learning_rate=0.16),
    Recipe("low-rate", learning_rate=0.0008),
)
"""The recipes by name.

fast               ours, the default
style              `fast` with the release's style templates
one-word           the paper's own: 5,000 steps of batch 4 at 0.04
two-vectors        "extended latent spaces": a word of two vectors
three-vectors      and of three
progressive-two    a second vector joins after 2,000 optimiser steps (the release counts forward calls by mistake)
progressive-three  and a third after 4,000
regularized        squared distance to the initial word's row; the paper prints no weight, 0.1 is ours
per-image          "a photo of S* with S_i" in a quarter of the prompts, as in the release; S_i is thrown away
high-rate          base rate 2e-2 in place of 5e-3, scaled alike
low-rate           base rate 1e-4, scaled alike
"""


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `UsageError` that lists them."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]
