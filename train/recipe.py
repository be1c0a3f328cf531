"""How a word is learned: frozen settings that are checked, and named recipes. No models, no files.

The paper's recipes (Gal et al. 2022, arXiv 2208.01618, section 5) use its batch size, steps and rate: 5,000 steps of
batch 4 at a base rate of 0.005, times 2 GPUs, times the batch size. `fast` and `directional`, the default, are our own.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

import msgspec

from oneword.engines.errors import UsageError
from oneword.runtime.concept import MAX_STAGES
from oneword.train.stopping import WINDOW

NOTHING: Final = "null"
"""The text of a setting that is None or an empty list."""


class Subject(Enum):
    """What the pictures have in common, which decides the templates."""

    OBJECT = "object"
    STYLE = "style"


class Rate(Enum):
    """Learning-rate schedule."""

    CONSTANT = "constant"
    COSINE = "cosine"


class Optimizer(Enum):
    """What a step does: AdamW's, or a turn of the word's direction at a fixed length (`oneword.train.directional`)."""

    ADAMW = "adamw"
    DIRECTIONAL = "directional"


class Norm(Enum):
    """What a step does to a vector's length: leave it, set it to the vocabulary's median, or pull it towards that."""

    FREE = "free"
    FIXED = "fixed"
    DECAYED = "decayed"


class Output(Enum):
    """The vectors that a word learns in the text encoder's output, beside its rows: none, one for all cross-attention
    layers of the network, or one for each."""

    NONE = "none"
    SHARED = "shared"
    LAYERS = "layers"


class Compute(Enum):
    """The type the frozen network computes in; `AUTO` is bf16 if the processor multiplies it natively, else fp32."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True)
class Recipe:
    """One way to learn a word. Raises `UsageError` for values that make no sense.

    vectors: rows the word has at the end. grow_at: optimiser steps after which another row joins (progressive).
    steps: optimiser steps. batch_size: pictures per step and word. accumulation: backward passes per step, each of
    `batch_size` pictures. learning_rate: the optimizer's, never scaled; the directional one's is the tangent of the
    angle of a step. warmup: steps of linear warm-up. optimizer: only AdamW uses weight_decay, betas and norm.
    output: the word's output vectors. stages: equal parts of the noise schedule with output vectors of their own.
    values_only: the keys of attention still come from the encoder's states. output_rate: the output vectors' rate, in
    their initial standard deviations; it follows the same schedule, and their optimizer is always AdamW.
    init_weight: weight of the squared distance to the initial rows in the loss (regularised).
    per_image: the share of prompts that also contain a word for their picture.
    min_snr: gamma of min-SNR weighting (Hang et al., arXiv 2303.09556), None for no weighting.
    stop_below: the DVAR ratio that ends learning (arXiv 2302.04841), None to run all steps.
    size: the side, in pixels, of the pictures that are learned from, None for the model's own.
    flip: also learn from mirrored pictures. crops: also learn from this many random crops of each picture.
    buckets: pictures keep roughly their aspect ratio instead of being cut square.
    timesteps: the part of the noise schedule that timesteps are drawn from, as fractions; (0, 1) is all of it.
    encoders: the text encoders that the word gets rows for, all if empty; in the prompts of the others, its init's
    text replaces it. words_per_call: words that share one call of the network, None for all; with 1, each word has the
    bits it has when alone.
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
    optimizer: Optimizer = Optimizer.ADAMW
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    output: Output = Output.NONE
    stages: int = 1
    values_only: bool = True
    output_rate: float = 0.05
    init_weight: float = 0.0
    per_image: float = 0.0
    norm: Norm = Norm.FREE
    min_snr: float | None = None
    stop_below: float | None = None
    size: int | None = None
    flip: bool = False
    crops: int = 0
    buckets: bool = False
    timesteps: tuple[float, float] = (0.0, 1.0)
    encoders: tuple[str, ...] = ()
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
            ("stages", 1, MAX_STAGES),
        ):
            _within(field, getattr(self, field), low, high)
        if not 0 < self.learning_rate < 10:
            raise UsageError(f"learning_rate is {self.learning_rate}: give a number above 0 and below 10")
        if not 0 < self.output_rate < 10:
            raise UsageError(f"output_rate is {self.output_rate}: give a number above 0 and below 10")
        if self.output is Output.NONE and self.stages > 1:
            raise UsageError(f"stages is {self.stages} without output vectors: set output to shared or layers")
        if self.output is not Output.NONE and self.grow_at:
            raise UsageError(
                f"grow_at is {_text(self.grow_at)} with output vectors, which all learn from the start: leave it out"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas is {_text(self.betas)}: give two numbers from 0 to below 1, for example 0.9,0.999")
        if self.optimizer is Optimizer.DIRECTIONAL and self.norm is not Norm.FREE:
            raise UsageError(
                f"norm is {self.norm.value} with the directional optimizer, which fixes lengths: leave it at free"
            )
        if not (0 <= self.weight_decay < math.inf and 0 <= self.init_weight < math.inf):
            raise UsageError(
                f"weight_decay is {self.weight_decay} and init_weight is {self.init_weight}: "
                "give finite numbers from 0 up"
            )
        if not 0 <= self.per_image <= 1:
            raise UsageError(f"per_image is {self.per_image}: give a share from 0 to 1")
        if self.min_snr is not None and not self.min_snr > 0:
            raise UsageError(f"min_snr is {self.min_snr}: give a number above 0 (5 is usual)")
        if self.stop_below is not None and not 0 < self.stop_below < 1:
            raise UsageError(f"stop_below is {self.stop_below}: give a ratio between 0 and 1 (0.15 is usual)")
        if self.stop_below is not None and self.steps <= WINDOW:
            raise UsageError(
                f"stop_below looks back {WINDOW} steps and steps is {self.steps}: raise steps or leave stop_below out"
            )
        if self.size is not None:
            _within("size", self.size, 16, 4096)
        if self.words_per_call is not None:
            _within("words_per_call", self.words_per_call, 1, 4096)
        if not 0 <= self.timesteps[0] < self.timesteps[1] <= 1:
            raise UsageError(
                f"timesteps is {_text(self.timesteps)}: give two rising numbers from 0 to 1, for example 0.2,1"
            )
        if len(self.grow_at) >= self.vectors or list(self.grow_at) != sorted(set(self.grow_at)):
            raise UsageError(
                f"grow_at is {_text(self.grow_at)} and vectors is {self.vectors}: give rising steps, fewer than vectors"
            )
        if self.grow_at and not 0 < self.grow_at[0] <= self.grow_at[-1] < self.steps:
            raise UsageError(f"grow_at is {_text(self.grow_at)}: give steps from 1 to {self.steps - 1}")

    def vectors_at(self, step: int) -> int:
        """How many rows are in use after `step` optimiser steps."""
        return self.vectors - len(self.grow_at) + sum(step >= joins for joins in self.grow_at)

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimiser step `step`, from 0: linear warm-up, then constant or half a cosine to 0."""
        return self._rate_at(step, self.learning_rate)

    def output_rate_at(self, step: int) -> float:
        """As `learning_rate_at`, for output vectors."""
        return self._rate_at(step, self.output_rate)

    def _rate_at(self, step: int, highest: float) -> float:
        rate = highest * min(1.0, (step + 1) / (self.warmup + 1))
        if self.rate is Rate.CONSTANT:
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def with_changes(self, **changes: Any) -> Recipe:
        """Returns this recipe with settings changed; `steps` also scales `grow_at`, unless that is given too."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise UsageError(f"a recipe has no {', '.join(unknown)}: its settings are {', '.join(sorted(known))}")
        if "steps" in changes and "grow_at" not in changes and self.grow_at:
            scale = changes["steps"] / self.steps
            changes["grow_at"] = tuple(max(1, round(joins * scale)) for joins in self.grow_at)
        if "steps" in changes and "warmup" not in changes:
            changes["warmup"] = min(self.warmup, max(0, changes["steps"]))
        return dataclasses.replace(self, **changes)

    def with_text(self, settings: Iterable[str], **changes: Any) -> Recipe:
        """Returns this recipe with `changes` and settings given as `name=value`, in the form of `as_text`. They are
        checked together, because one may allow another; the text wins over a change of the same setting."""
        types = typing.get_type_hints(Recipe)
        for setting in settings:
            name, _, text = (part.strip() for part in setting.partition("="))
            if name not in types:
                raise UsageError(f"{setting!r} is not a setting: give name=value, the names are {', '.join(types)}")
            value: str | list[str] = text
            if typing.get_origin(types[name]) is tuple:
                value = [] if text == NOTHING else [part.strip() for part in text.split(",")]
            try:
                changes[name] = msgspec.convert(value, types[name], strict=False)
            except msgspec.ValidationError as error:
                raise UsageError(f"{name} is {text!r}: give {_allowed(types[name])}") from error
        return self.with_changes(**changes)

    def as_text(self) -> dict[str, str]:
        """Every setting as text: lists with commas, nothing as `null`. For metadata and reports, and to compare a run
        with the command that resumes it."""
        return {field.name: _text(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _within(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{field} is {value!r}: give a whole number from {low} to {high}")


def _text(value: object) -> str:
    match value:
        case Enum():
            return str(value.value)
        case bool():
            return str(value).lower()
        case None | ():
            return NOTHING
        case tuple():
            return ",".join(map(_text, value))
        case float():
            return str(value).removesuffix(".0")
    return str(value)


_ALLOWED: Mapping[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _allowed(kind: Any) -> str:
    """What a setting of this type may be, in words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(choice.value for choice in kind)
    if kind in _ALLOWED:
        return _ALLOWED[kind]
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        count = "two numbers" if parts == (float, float) else f"{_ALLOWED[parts[0]].removeprefix('a ')}s"
        return f"{count} with commas between"
    return f"{_allowed(parts[0])} or {NOTHING}"


def _named(*recipes: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({recipe.name: recipe for recipe in recipes})


_FAST = Recipe(  # a high rate that falls to zero, large batches, few steps
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
    dataclasses.replace(_FAST, name="quick", steps=50, batch_size=8, learning_rate=0.04),
    dataclasses.replace(
        _FAST,
        name="directional",
        steps=50,
        batch_size=8,
        learning_rate=0.1,
        warmup=6,
        optimizer=Optimizer.DIRECTIONAL,
    ),
    dataclasses.replace(
        _FAST,
        name="precise",
        learning_rate=0.04,
        warmup=6,
        optimizer=Optimizer.DIRECTIONAL,
        output=Output.LAYERS,
        stages=4,
    ),
    dataclasses.replace(_FAST, name="style", subject=Subject.STYLE),
    # From section 5 of the paper: one word, and the variants it is compared with.
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

fast               our own, with more pictures
quick              `fast` with an eighth of its pictures, at twice the rate: the peer of `directional`
directional        the default: an eighth of `fast`'s pictures; learns a direction, at the vocabulary's mean length
precise            the word's direction, and output vectors for each cross-attention layer and four stages, for values
style              `fast` with the style templates of the paper's released code
one-word           the paper's method: 5,000 steps of batch 4 at 0.04
two-vectors        "extended latent spaces": a word of two vectors
three-vectors      a word of three vectors
progressive-two    a second vector joins after 2,000 optimiser steps (the released code counts forward calls by mistake)
progressive-three  also a third vector after 4,000 steps
regularized        adds the squared distance to the initial row; the paper gives no weight, 0.1 is ours
per-image          "a photo of S* with S_i" in a quarter of the prompts, as in the released code; S_i is discarded
high-rate          base rate 2e-2 instead of 5e-3, scaled in the same way
low-rate           base rate 1e-4, scaled in the same way
"""


DEFAULT_RECIPE: Final = "directional"


def named_recipe(name: str) -> Recipe:
    """Returns the recipe of that name. Raises `UsageError`, listing the recipes, if there is none."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]
