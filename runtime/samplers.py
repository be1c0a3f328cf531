"""Samplers as tables: `make_schedule` turns a sampler, a scheduler's config and a number of steps into numbers.

The state is x = alpha x0 + sigma eps for every sampler. In a schedule of betas alpha^2 + sigma^2 = 1, and Euler's state
is that divided by alpha, which is folded into the columns; in flow matching alpha = 1 - sigma. With m the model's
guided prediction, a step is

    denoised = c.sample_to_denoised * sample + c.model_to_denoised * m
    next     = c.sample * sample + c.denoised * denoised + c.previous * previous + c.noise * noise

where `previous` is the last step's `denoised`, and the columns `c` are named after what they multiply. Each sampler is
a pure function from the levels it visits to the columns of the second line.
All of them match diffusers' scheduler of that name: timesteps, order of draws, first and last step. Not covered: what
`oneword.runtime.schedule` and `oneword.runtime.flow` refuse, Euler's churn, and higher orders.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import UsageError
from oneword.runtime.flow import FlowSchedule
from oneword.runtime.schedule import Array, NoiseSchedule, ScheduleKind, karras_sigmas

COLUMNS: Final[Mapping[str, float]] = {
    "t": 0.0,
    "sample_to_denoised": 0.0,
    "model_to_denoised": 0.0,
    "sample": 1.0,
    "denoised": 0.0,
    "previous": 0.0,
    "previous2": 0.0,
    "uncond": 0.0,
    "noise": 0.0,
    "guidance": 0.0,
    "rescale": 0.0,
    "zero_star": 0.0,
    "embedded_guidance": 0.0,
    "known_scale": 0.0,
    "known_sigma": 0.0,
}
"""Every column that a graph's `schedule` may have, and its value in a line that leaves the sample unchanged."""


class Sampler(StrEnum):
    """The samplers, by the names that commands accept."""

    DDIM = "ddim"
    DDPM = "ddpm"
    EULER = "euler"
    EULER_A = "euler-a"
    DPMPP_2M = "dpmpp-2m"
    DPMPP_2M_KARRAS = "dpmpp-2m-karras"
    DPMPP_2M_SDE = "dpmpp-2m-sde"
    LCM = "lcm"


@dataclass(frozen=True)
class Schedule:
    """The steps of one request: a column of numbers for each term of a step, and the scales of the first sample."""

    columns: Mapping[str, npt.NDArray[np.float32]]
    """[S] by the names of COLUMNS; a missing one has the value of COLUMNS at every step."""
    draws: npt.NDArray[np.bool_]
    """[S]: the steps that draw noise, in this order, after the noise of the first sample."""
    guided: npt.NDArray[np.bool_]
    """[S]: the steps that also evaluate the negative prompt."""
    init_scale: float
    """Text to image: sample = init_scale * noise."""
    start_scale: float
    """Image to image: sample = start_scale * latents + start_sigma * noise."""
    start_sigma: float

    def __len__(self) -> int:
        """S."""
        return len(self.draws)

    @property
    def timesteps(self) -> npt.NDArray[np.float32]:
        """[S], falling."""
        return self.columns["t"]

    def table(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        """[S, K]: the columns of a graph, in its order. Raises UsageError if a step needs a column that it lacks."""
        for name in self.columns.keys() - set(names):
            if (self.columns[name] != COLUMNS[name]).any():
                raise UsageError(f"this sampler needs the column {name!r}, this bundle has {', '.join(names)}")
        columns = (self.columns.get(name, np.full(len(self), COLUMNS[name], np.float32)) for name in names)
        return np.stack([*columns], axis=1)


def make_schedule(
    scheduler_config: Mapping[str, Any],
    sampler: Sampler,
    steps: int,
    *,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    kind: ScheduleKind = ScheduleKind.BETAS,
    image_tokens: int = 0,
    embedded_guidance: float = 0.0,
) -> Schedule:
    """The steps of a whole run.

    `kind` is what `scheduler_config` describes. `image_tokens` is the picture's size in tokens of the network, on which
    a flow's shift may depend; `embedded_guidance` is an input of guidance-distilled networks (arXiv 2210.03142).

    `guidance_rescale` is phi of arXiv 2305.08891. `guidance_interval` (low, high] bounds sigma / alpha of the guided
    steps (arXiv 2404.07724). `strength` in (0, 1] skips the first steps, for image to image; `eta` is DDIM's.
    Raises UsageError for numbers out of range and for a scheduler's config that this runtime does not support.
    """
    noise: NoiseSchedule | FlowSchedule
    if kind is ScheduleKind.BETAS:
        method = _METHODS[sampler]
        noise = NoiseSchedule.read(scheduler_config, method.default_spacing)
    else:
        method = _flow_method(sampler)
        noise = FlowSchedule.read(scheduler_config, kind, image_tokens)
    _check(noise, sampler, steps)
    levels = method.levels(noise, steps)
    start = _start(len(levels.t), strength, kind)
    levels = Levels(levels.t[start:], levels.alpha[start:], levels.sigma[start:], levels.last_alpha, levels.last_sigma)
    update = method.update(noise, levels, SamplerSettings(steps, eta))
    a, b = prediction(noise.prediction_type, levels)
    guided = _guided(levels, guidance_scale, guidance_interval)
    guidance, rescale = np.where(guided, guidance_scale, 1.0), np.where(guided, guidance_rescale, 0.0)
    known_scale, known_sigma = np.append(levels.alpha[1:], 1.0), np.append(levels.sigma[1:], 0.0)
    columns = {
        "t": levels.t,
        "sample_to_denoised": a,
        "model_to_denoised": b,
        "sample": update.sample,
        "denoised": update.denoised,
        "previous": update.previous,
        "noise": update.noise,
        "guidance": guidance,
        "rescale": rescale,
        "embedded_guidance": np.full(len(levels.t), embedded_guidance),
        "known_scale": known_scale,
        "known_sigma": known_sigma,
    }
    columns = {name: np.asarray(column, np.float32) for name, column in columns.items()}
    if not all(np.isfinite(column).all() for column in columns.values()):
        raise UsageError(f"{sampler} in {steps} steps has no finite schedule with this model: change the steps")
    euler_start = method.divided and isinstance(noise, NoiseSchedule) and noise.timestep_spacing != "leading"
    return Schedule(
        columns=columns,
        draws=update.draws,
        guided=guided,
        init_scale=float(levels.sigma[0]) if euler_start else 1.0,
        start_scale=float(levels.alpha[0]),
        start_sigma=float(levels.sigma[0]),
    )


class Levels(NamedTuple):
    """The noise levels of a run: t, alpha, sigma [S], and the level at its end."""

    t: Array
    alpha: Array
    sigma: Array
    last_alpha: float
    last_sigma: float

    @property
    def next_alpha(self) -> Array:
        """[S]"""
        return np.append(self.alpha[1:], self.last_alpha)

    @property
    def next_sigma(self) -> Array:
        """[S]"""
        return np.append(self.sigma[1:], self.last_sigma)


class SamplerSettings(NamedTuple):
    """What a sampler needs besides the levels: the request's steps (before `strength`) and eta."""

    steps: int
    eta: float


class Update(NamedTuple):
    """The columns of a step, each [S], named after what it multiplies, and which steps draw the noise."""

    sample: Array
    denoised: Array
    previous: Array
    noise: Array
    draws: npt.NDArray[np.bool_]


def prediction(prediction_type: str, levels: Levels) -> tuple[Array, Array]:
    """sample_to_denoised, model_to_denoised [S]. Raises UsageError for eps at zero signal, as x0 is undefined there."""
    match prediction_type:
        case "v_prediction":
            return levels.alpha, -levels.sigma
        case "sample":
            return np.zeros_like(levels.t), np.ones_like(levels.t)
        case "flow_prediction":  # m = eps - x0
            return np.ones_like(levels.t), -levels.sigma
        case _:
            if not levels.alpha.all():
                raise UsageError(
                    "zero terminal SNR (rescale_betas_zero_snr) leaves nothing for epsilon prediction to divide by: "
                    "use spacing leading, or another sampler such as euler"
                )
            return 1 / levels.alpha, -levels.sigma / levels.alpha


def ddim(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """DDIM update, eq. 12 of Song et al. (2021), any eta; the step below is t - train // steps, as in diffusers."""
    below = levels.t - noise.num_train_timesteps // settings.steps
    abar, abar_next = (
        levels.alpha**2,
        np.where(below >= 0, noise.abar_at(np.maximum(below, 0)), noise.final_alpha_cumprod),
    )
    variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    direction = np.sqrt(np.maximum(1 - abar_next - settings.eta**2 * variance, 0)) / levels.sigma
    return Update(
        sample=direction,
        denoised=np.sqrt(abar_next) - direction * levels.alpha,
        previous=np.zeros_like(abar),
        noise=settings.eta * np.sqrt(variance),
        draws=np.full(len(abar), settings.eta > 0),
    )


def ddpm(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """DDPM update, eq. 7 of Ho et al. (2020); the variance is clamped to 1e-20 as in diffusers."""
    abar, abar_next = levels.alpha**2, levels.next_alpha**2
    alpha = abar / abar_next
    variance = np.maximum((1 - abar_next) / (1 - abar) * (1 - alpha), 1e-20)
    draws = levels.t > 0
    return Update(
        sample=np.sqrt(alpha) * (1 - abar_next) / (1 - abar),
        denoised=np.sqrt(abar_next) * (1 - alpha) / (1 - abar),
        previous=np.zeros_like(abar),
        noise=np.where(draws, np.sqrt(variance if noise.variance_type == "fixed_small" else 1 - alpha), 0),
        draws=draws,
    )


def euler(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """Euler's step of algorithm 2 of Karras et al. (2022), without churn."""
    ve, ve_next = levels.sigma / levels.alpha, levels.next_sigma / levels.next_alpha
    return _divided(levels, ve_next / ve, np.zeros_like(ve), draws=False)


def euler_ancestral(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """Euler to sigma_down = sigma_next^2 / sigma, then noise of sigma_up, as k-diffusion's `sample_euler_ancestral`."""
    ve, ve_next = levels.sigma / levels.alpha, levels.next_sigma / levels.next_alpha
    up = np.sqrt(ve_next**2 * (ve**2 - ve_next**2) / ve**2)
    return _divided(levels, (ve_next / ve) ** 2, up, draws=True)


def euler_flow(noise: FlowSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """Euler's step along the flow from noise to picture, x + (sigma_next - sigma) m, of Lipman et al. (2023)."""
    ratio = levels.next_sigma / levels.sigma
    zeros = np.zeros_like(ratio)
    return Update(ratio, levels.next_alpha - ratio * levels.alpha, zeros, zeros, np.full(len(ratio), False))


def dpmpp_2m(noise: NoiseSchedule | FlowSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """DPM-Solver++(2M), midpoint, algorithm 2 of Lu et al. (2022); first order in the first and last steps."""
    h = _log_snr_steps(levels)
    gain = -levels.next_alpha * np.expm1(-h)
    keep = levels.next_sigma / levels.sigma
    return _multistep(noise, settings, h, keep, gain, np.zeros_like(h), draws=False)


def dpmpp_2m_sde(noise: NoiseSchedule | FlowSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """SDE-DPM-Solver++(2M), midpoint, of Lu et al. (2022); draws at every step, the last one included."""
    h = _log_snr_steps(levels)
    gain = -levels.next_alpha * np.expm1(-2 * h)
    keep = levels.next_sigma / levels.sigma * np.exp(-h)
    return _multistep(noise, settings, h, keep, gain, levels.next_sigma * np.sqrt(-np.expm1(-2 * h)), draws=True)


def lcm(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """Multistep consistency sampling, algorithm 3 of Luo et al. (2023): no noise after the last step."""
    time = levels.t * noise.timestep_scaling
    c_skip, c_out = 0.25 / (time**2 + 0.25), time / np.sqrt(time**2 + 0.25)
    scale, sigma = np.append(levels.alpha[1:], 1.0), np.append(levels.sigma[1:], 0.0)
    draws = np.arange(len(time)) < len(time) - 1
    return Update(scale * c_skip, scale * c_out, np.zeros_like(time), sigma, draws)


def _divided(levels: Levels, ratio: Array, up: Array, *, draws: bool) -> Update:
    """A step in Euler's state, which is ours divided by alpha, except for the last one, which is not divided."""
    scale = np.append(levels.alpha[1:], 1.0)
    return Update(
        sample=scale / levels.alpha * ratio,
        denoised=scale * (1 - ratio),
        previous=np.zeros_like(ratio),
        noise=scale * up,
        draws=np.full(len(ratio), draws),
    )


def _log_snr_steps(levels: Levels) -> Array:
    """h [S]: the steps in log(alpha / sigma); the last one is infinite if a run ends without noise."""
    with np.errstate(divide="ignore"):
        return np.log(levels.next_alpha / levels.next_sigma) - np.log(levels.alpha / levels.sigma)


def _multistep(
    noise: NoiseSchedule | FlowSchedule,
    settings: SamplerSettings,
    h: Array,
    keep: Array,
    gain: Array,
    up: Array,
    *,
    draws: bool,
) -> Update:
    """The second-order correction 0.5 / r (denoised - previous), r = h_previous / h, in the steps of order two."""
    short = settings.steps < 15  # of the whole run, including those that `strength` skips
    last_is_first_order = (
        noise.euler_at_final or noise.final_sigmas_type == "zero" or (noise.lower_order_final and short)
    )
    second = np.arange(len(h)) > 0
    second[-1] &= not last_is_first_order
    correction = np.zeros_like(h)
    correction[second] = gain[second] * 0.5 * h[second] / np.append(1.0, h[:-1])[second]
    return Update(keep, gain + correction, -correction, up, np.full(len(h), draws))


def _integer_levels(noise: NoiseSchedule, t: Array) -> Levels:
    abar = noise.abar_at(t)
    return Levels(t, np.sqrt(abar), np.sqrt(1 - abar), 1.0, 0.0)


def _sigma_levels(noise: NoiseSchedule, t: Array, sigmas: Array) -> Levels:
    last = noise.sigmas[0] if noise.final_sigmas_type == "sigma_min" else 0.0
    ve = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(ve**2 + 1)
    return Levels(t, alpha[:-1], (ve * alpha)[:-1], float(alpha[-1]), float(ve[-1] * alpha[-1]))


def _ddim_levels(noise: NoiseSchedule, steps: int) -> Levels:
    return _integer_levels(noise, noise.timesteps(steps, rounded=True))


def _lcm_levels(noise: NoiseSchedule, steps: int) -> Levels:
    return _integer_levels(noise, noise.timesteps_lcm(steps))


def _euler_levels(noise: NoiseSchedule, steps: int) -> Levels:
    t = noise.timesteps(steps, rounded=False)
    sigmas = noise.sigma_at(t)
    if noise.use_karras_sigmas:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
        t = noise.timestep_of(sigmas)
    return _sigma_levels(noise, t, sigmas)


def _euler_ancestral_levels(noise: NoiseSchedule, steps: int) -> Levels:
    t = noise.timesteps(steps, rounded=False)
    return _sigma_levels(noise, t, noise.sigma_at(t))._replace(last_alpha=1.0, last_sigma=0.0)


def _dpm_levels(noise: NoiseSchedule, steps: int) -> Levels:
    t = noise.timesteps_dpm(steps)
    return _sigma_levels(noise, t, noise.sigma_at(t))


def _dpm_karras_levels(noise: NoiseSchedule, steps: int) -> Levels:
    sigmas = karras_sigmas(noise.sigmas[-1], noise.sigmas[0], steps)
    t = noise.timestep_of(sigmas)
    return _sigma_levels(noise, np.floor(t) if noise.beta_schedule == "squaredcos_cap_v2" else np.round(t), sigmas)


def _flow_levels(noise: FlowSchedule, steps: int) -> Levels:
    sigmas = noise.sigmas(steps)
    return Levels(sigmas * noise.num_train_timesteps, 1 - sigmas, sigmas, 1.0, 0.0)


def _flow_dpm_levels(noise: FlowSchedule, steps: int) -> Levels:
    sigmas = noise.sigmas_dpm(steps)
    return Levels(np.floor(sigmas * noise.num_train_timesteps), 1 - sigmas, sigmas, 1.0, 0.0)


class _Method(NamedTuple):
    levels: Callable[[Any, int], Levels]  # of a NoiseSchedule, or of a FlowSchedule in _FLOW_METHODS
    update: Callable[[Any, Levels, SamplerSettings], Update]
    default_spacing: str = ""  # of the diffusers class, for a config of betas without one
    divided: bool = False  # Euler's state, ours divided by alpha, starts at sigma * noise


_METHODS: Final = {
    Sampler.DDIM: _Method(_ddim_levels, ddim, "leading"),
    Sampler.DDPM: _Method(_ddim_levels, ddpm, "leading"),
    Sampler.EULER: _Method(_euler_levels, euler, "linspace", divided=True),
    Sampler.EULER_A: _Method(_euler_ancestral_levels, euler_ancestral, "linspace", divided=True),
    Sampler.DPMPP_2M: _Method(_dpm_levels, dpmpp_2m, "linspace"),
    Sampler.DPMPP_2M_KARRAS: _Method(_dpm_karras_levels, dpmpp_2m, "linspace"),
    Sampler.DPMPP_2M_SDE: _Method(_dpm_levels, dpmpp_2m_sde, "linspace"),
    Sampler.LCM: _Method(_lcm_levels, lcm, "leading"),
}

_FLOW_METHODS: Final = {
    Sampler.EULER: _Method(_flow_levels, euler_flow),
    Sampler.DPMPP_2M: _Method(_flow_dpm_levels, dpmpp_2m),
    Sampler.DPMPP_2M_SDE: _Method(_flow_dpm_levels, dpmpp_2m_sde),
}


_DPM: Final = (Sampler.DPMPP_2M, Sampler.DPMPP_2M_KARRAS, Sampler.DPMPP_2M_SDE)


def sampler_of(scheduler_config: Mapping[str, Any]) -> Sampler | None:
    """The sampler for a diffusers scheduler's config; None if its class has no counterpart."""
    match scheduler_config.get("_class_name"):
        case "DDIMScheduler":
            return Sampler.DDIM
        case "DDPMScheduler":
            return Sampler.DDPM
        case "EulerDiscreteScheduler" | "FlowMatchEulerDiscreteScheduler":
            return Sampler.EULER
        case "EulerAncestralDiscreteScheduler":
            return Sampler.EULER_A
        case "LCMScheduler":
            return Sampler.LCM
        case "DPMSolverMultistepScheduler":
            if scheduler_config.get("algorithm_type", "dpmsolver++") == "sde-dpmsolver++":
                return Sampler.DPMPP_2M_SDE
            return Sampler.DPMPP_2M_KARRAS if scheduler_config.get("use_karras_sigmas") else Sampler.DPMPP_2M
    return None


def _flow_method(sampler: Sampler) -> _Method:
    if sampler not in _FLOW_METHODS:
        raise UsageError(f"the sampler {sampler} does not suit flow matching, allowed are {', '.join(_FLOW_METHODS)}")
    return _FLOW_METHODS[sampler]


def _start(steps: int, strength: float, kind: ScheduleKind) -> int:
    """The steps that `strength` skips. Diffusers' pipelines round the others down for betas, and up for flows."""
    if not 0 < strength <= 1:
        raise UsageError(f"strength {strength:g}, allowed are 0 < strength <= 1")
    count = int(steps * strength) if kind is ScheduleKind.BETAS else steps - int(steps - steps * strength)
    if count == 0:
        raise UsageError(f"strength {strength:g} of {steps} steps leaves none: use {math.ceil(1 / strength)} or more")
    return steps - count


def _guided(levels: Levels, guidance_scale: float, interval: tuple[float, float] | None) -> npt.NDArray[np.bool_]:
    guided = np.full(len(levels.t), guidance_scale > 1)
    if interval is None:
        return guided
    with np.errstate(divide="ignore"):
        sigma = levels.sigma / levels.alpha
    return guided & (interval[0] < sigma) & (sigma <= interval[1])


def _check(noise: NoiseSchedule | FlowSchedule, sampler: Sampler, steps: int) -> None:
    """Refuses what the scheduler's config rules out; `Request` checks the ranges of its numbers."""
    if not 1 <= steps <= noise.num_train_timesteps:
        raise UsageError(f"{steps} steps, allowed are 1 to {noise.num_train_timesteps}")
    if sampler in _DPM and noise.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        raise UsageError(
            f"the scheduler's config says algorithm_type = {noise.algorithm_type!r}, {sampler} supports dpmsolver++ "
            "and sde-dpmsolver++: use another sampler such as ddim"
        )
