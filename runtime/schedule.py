"""Noise schedules from a diffusers scheduler's config. Pure arrays: no models, no randomness.

Flow matching is in `runtime.flow`. Not covered, and refused by name: `thresholding`, `clip_sample` (neither suits
latents), Lu sigmas, continuous timesteps, log-linear interpolation, learned variances.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import UsageError
from oneword.runtime.spacing import Spacing

Array: TypeAlias = npt.NDArray[np.float64]

PREDICTION_TYPES: Final = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES: Final = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS: Final = ("leading", "linspace", "trailing")

_MUST_BE: Final[dict[str, tuple[Any, ...]]] = {
    "thresholding": (False, None),
    "clip_sample": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # diffusers' DPM solver reads the last three as midpoint
    "lambda_min_clipped": (-np.inf, "-inf", None),
    "variance_type": ("fixed_small", "fixed_large", None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
}

_MAX_TIMESTEPS: Final = 1_000_000
"""Beyond any model's."""

_SPACED: Final = {
    "use_karras_sigmas": Spacing.KARRAS,
    "use_exponential_sigmas": Spacing.EXPONENTIAL,
    "use_beta_sigmas": Spacing.BETA,
}


class ScheduleKind(StrEnum):
    """The kind of noise schedule that a scheduler's config describes."""

    BETAS = "betas"  # alpha^2 + sigma^2 = 1, from betas
    FLOW = "flow"  # alpha = 1 - sigma, and the scheduler chooses its sigmas
    FLOW_EVEN = "flow-even"  # as FLOW, and sigmas are even from 1 to 1 / steps before they are shifted
    FLOW_EMPIRICAL = "flow-empirical"  # as FLOW_EVEN, and a dynamic shift is that of FLUX.2


def explicit_settings(config: Mapping[str, Any], must_be: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A scheduler's config without the keys that diffusers did not find in its file.

    Raises UsageError that names a key whose value is not one of those in `must_be`.
    """
    defaults = set(config.get("_use_default_values", ()))
    explicit = {key: value for key, value in config.items() if key not in defaults}
    for key, allowed in must_be.items():
        if key in explicit and explicit[key] not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise UsageError(f"the scheduler's config says {key} = {explicit[key]!r}, supported are: {choices}")
    return explicit


def check_types(schedule: type, fields: Mapping[str, Any]) -> None:
    """Raises UsageError that names a key whose value is not of the type of the field's default in a schedule."""
    for key, value in fields.items():
        default = schedule.__dataclass_fields__[key].default  # type: ignore[attr-defined]
        kinds = (list, tuple) if default is None else (float, int) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds):
            raise UsageError(
                f"the scheduler's config says {key} = {value!r}, which is of type {type(value).__name__}, but must be "
                f"of type {kinds[0].__name__}"
            )


@dataclass(frozen=True)
class NoiseSchedule:
    """The part of a scheduler's config that samplers need. A missing key has the default of the sampler's diffusers
    class (they differ only in `timestep_spacing`), except that latents are never clipped."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    variance_type: str = "fixed_small"
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    spacing: Spacing | None = None
    """Of the sigmas; None means those of the timesteps."""
    algorithm_type: str = "dpmsolver++"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    alphas_cumprod: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", _alphas_cumprod(self))

    @classmethod
    def read(cls, config: Mapping[str, Any], default_spacing: str, spacing: Spacing | None = None) -> "NoiseSchedule":
        """Reads a scheduler's config, verbatim, whose spacing `spacing` replaces.

        Raises UsageError that names a key whose value is not supported.
        """
        explicit = explicit_settings(config, _MUST_BE)
        known = {key: explicit[key] for key in cls.__dataclass_fields__ if explicit.get(key) is not None}
        check_types(cls, known)
        fields: dict[str, Any] = {"timestep_spacing": default_spacing, **known}
        if spacing is not None:
            trailing = spacing is Spacing.SGM_UNIFORM
            fields |= {"timestep_spacing": "trailing" if trailing else "linspace"}
            fields["spacing"] = None if trailing else spacing
        else:
            fields["spacing"] = next((value for key, value in _SPACED.items() if explicit.get(key)), None)
        if "trained_betas" in fields:
            fields["trained_betas"] = tuple(fields["trained_betas"])
            fields["num_train_timesteps"] = len(fields["trained_betas"])
        _check_betas(fields)
        return cls(**fields)

    @property
    def final_alpha_cumprod(self) -> float:
        """abar below timestep 0, for DDIM."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    @property
    def sigmas(self) -> Array:
        """sqrt((1 - abar) / abar) [num_train_timesteps], with a finite last one, as in diffusers' Euler and DPM."""
        abar = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            abar[-1] = 2.0**-24
        return np.asarray(np.sqrt((1 - abar) / abar).astype(np.float32), np.float64)

    def timesteps(self, steps: int, *, rounded: bool) -> Array:
        """The timesteps [S] of a run of `steps` steps, falling. Source: table 2 of arXiv 2305.08891, as in diffusers.

        `rounded` rounds linspace's timesteps to integers (DDIM, DDPM); Euler keeps the fractions.
        """
        train = self.num_train_timesteps
        match self.timestep_spacing:
            case "linspace":
                t = np.linspace(0, train - 1, steps)[::-1]
                return np.round(t) if rounded else t
            case "leading":
                return np.arange(steps, dtype=np.float64)[::-1] * (train // steps) + self.steps_offset
            case _:
                return _trailing(train, steps)

    def timesteps_dpm(self, steps: int) -> Array:
        """As `timesteps`, but leading and linspace drop the last of steps + 1, as in diffusers' DPM solver."""
        train = self.num_train_timesteps
        match self.timestep_spacing:
            case "linspace":
                return np.round(np.linspace(0, train - 1, steps + 1))[::-1][:-1]
            case "leading":
                t = np.arange(steps + 1, dtype=np.float64)[::-1][:-1] * (train // (steps + 1))
                return t + self.steps_offset
            case _:
                return _trailing(train, steps)

    def timesteps_lcm(self, steps: int) -> Array:
        """Timesteps of latent consistency models, evenly spaced over those of the distillation (arXiv 2310.04378)."""
        stride = self.num_train_timesteps // self.original_inference_steps
        if steps > self.original_inference_steps:
            raise UsageError(f"{steps} steps, lcm allows at most {self.original_inference_steps}: use fewer steps")
        original = np.arange(1, self.original_inference_steps + 1, dtype=np.float64)[::-1] * stride - 1
        return original[np.floor(np.linspace(0, len(original), steps, endpoint=False)).astype(np.int64)]

    def sigma_at(self, timesteps: Array) -> Array:
        """sigma [S] at timesteps that may be fractional."""
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self.sigmas)

    def timestep_of(self, sigmas: Array) -> Array:
        """The fractional timesteps [S] of these sigmas, linear in log sigma."""
        logs = np.log(self.sigmas.astype(np.float32))  # as diffusers, whose DPM solver then rounds down
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), logs, np.arange(self.num_train_timesteps))

    def abar_at(self, timesteps: Array) -> Array:
        """abar [S] at integer timesteps. Raises UsageError if `steps_offset` leads past the last one."""
        if timesteps.max() >= self.num_train_timesteps:
            raise UsageError(
                f"timestep {timesteps.max():g} (steps_offset {self.steps_offset}) is past the last one, "
                f"{self.num_train_timesteps - 1}: use fewer steps"
            )
        return self.alphas_cumprod[timesteps.astype(np.int64)]


def _check_betas(fields: Mapping[str, Any]) -> None:
    """Raises UsageError that names a key whose betas are not between 0 and 1, or are not a possible number of them."""
    for key in ("beta_start", "beta_end", "trained_betas"):
        values = fields.get(key, ())
        for value in values if isinstance(values, tuple) else (values,):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(f"the scheduler's config says {key} = {value!r}, but betas must be from 0 to 1")
    count = fields.get("num_train_timesteps", 1)
    if not 1 <= count <= _MAX_TIMESTEPS:
        fact = f"has {count} trained_betas" if "trained_betas" in fields else f"says num_train_timesteps = {count}"
        raise UsageError(f"the scheduler's config {fact}, but the number must be from 1 to {_MAX_TIMESTEPS}")


def _trailing(train: int, steps: int) -> Array:
    """As diffusers, but never one timestep too many, -1, where rounding makes numpy's range longer: 61 of 1,000."""
    return np.round(np.arange(train, 0, -train / steps)[:steps]) - 1


@functools.lru_cache(16)  # of as many models and spacings
def _alphas_cumprod(noise: NoiseSchedule) -> Array:
    """The product of 1 - beta [num_train_timesteps], rounded where diffusers rounds to float32; read-only."""
    betas = _betas(noise).astype(np.float32)
    if noise.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(betas)
    alphas = np.float32(1) - betas
    products = np.asarray(np.cumprod(alphas.astype(np.float64)).astype(np.float32), np.float64)
    products.flags.writeable = False
    return products


def _betas(noise: NoiseSchedule) -> npt.NDArray[Any]:
    if noise.trained_betas is not None:
        return np.asarray(noise.trained_betas)
    steps = noise.num_train_timesteps
    match noise.beta_schedule:
        case "linear":
            return _linspace(noise.beta_start, noise.beta_end, steps)
        case "scaled_linear":
            return np.square(_linspace(noise.beta_start**0.5, noise.beta_end**0.5, steps))
        case _:
            bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999))


def _linspace(start: float, end: float, steps: int) -> npt.NDArray[np.float32]:
    """torch.linspace in float32, which counts from both ends; numpy's sometimes differs by one bit."""
    first, last, i = np.float32(start), np.float32(end), np.arange(steps, dtype=np.float32)
    step = (last - first) / np.float32(max(steps - 1, 1))
    return np.where(i < steps // 2, first + step * i, last - step * (np.float32(steps - 1) - i)).astype(np.float32)


def _zero_terminal_snr(betas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Algorithm 1 of arXiv 2305.08891: shifts and scales sqrt(abar) so that the last one is 0 and the first is kept."""
    root = np.sqrt(np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
