"""Samplers as tables: `make_schedule` turns a sampler, a scheduler's config and a number of steps into numbers.

The state is x = alpha x0 + sigma eps for every sampler. In a schedule of betas alpha^2 + sigma^2 = 1, and Euler's state
is that divided by alpha, which is folded into the columns; in flow matching alpha = 1 - sigma. With m the model's
guided prediction, a step is

    denoised = c.sample_to_denoised * sample + c.model_to_denoised * m
    next     = c.sample * sample + c.denoised * denoised + c.previous * previous + c.previous2 * previous2
               + c.uncond * denoised_uncond + c.noise * noise

where `previous` and `previous2` are the last two `denoised`, `denoised_uncond` is what the unguided prediction gives,
and the columns `c` are named after what they multiply. Each sampler is a pure function (`oneword.runtime.updates`) from
the levels it visits (`oneword.runtime.levels`) to the columns of the second equation.

A line of the table is one evaluation of the network. Samplers of two stages (heun, dpm2-a, dpmpp-2s-a) have two lines
per step, the second of which recovers the step's first sample from the sample and `previous`; their last step has one.
Steps, `strength`, progress and previews count steps, not lines.

All of them match diffusers' scheduler of that name: timesteps, order of draws, first and last step; dpmpp-2s-a, which
diffusers lacks, matches k-diffusion's formulas. Not covered: what `oneword.runtime.schedule` and `oneword.runtime.flow`
refuse, Euler's churn, and orders above three.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import UsageError, one_of
from oneword.runtime.flow import FlowSchedule
from oneword.runtime.levels import (
    Levels,
    ddim_levels,
    dpm2_levels,
    dpm_levels,
    euler_levels,
    euler_levels_to_zero,
    flow_dpm_levels,
    flow_levels,
    halfway_stages,
    heun_stages,
    lcm_levels,
)
from oneword.runtime.schedule import Array, NoiseSchedule, ScheduleKind
from oneword.runtime.spacing import Spacing
from oneword.runtime.updates import (
    SamplerSettings,
    Update,
    ddim,
    ddpm,
    dpm2_ancestral,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    euler_flow,
    heun,
    lcm,
    unipc,
)

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
    HEUN = "heun"
    DPM2_A = "dpm2-a"
    DPMPP_2S_A = "dpmpp-2s-a"
    DPMPP_3M_SDE = "dpmpp-3m-sde"
    UNIPC = "unipc"


class Guidance(StrEnum):
    """How the two predictions of a guided step are combined, by the names that commands accept."""

    CFG = "cfg"
    CFG_PP = "cfg++"
    """CFG++ (arXiv 2406.08070): adds the unconditional prediction's noise back; its scale is 0 to 2."""
    ZERO_STAR = "zero-star"
    """CFG-Zero* (arXiv 2503.18886): first scales the unconditional prediction to fit the other one."""


CFG_PP_SCALE: Final = 0.6
"""The default guidance scale of CFG++."""
MAX_CFG_PP_SCALE: Final = 2.0


@dataclass(frozen=True)
class Schedule:
    """The steps of one request: a column of numbers for each term of a step, and the scales of the first sample."""

    columns: Mapping[str, npt.NDArray[np.float32]]
    """[R] by the names of COLUMNS, R lines; a missing one has the value of COLUMNS in every line."""
    draws: npt.NDArray[np.bool_]
    """[R]: the lines that draw noise, in this order, after the noise of the first sample."""
    guided: npt.NDArray[np.bool_]
    """[R]: the lines that also evaluate the negative prompt."""
    init_scale: float
    """Text to image: sample = init_scale * noise."""
    start_scale: float
    """Image to image: sample = start_scale * latents + start_sigma * noise."""
    start_sigma: float
    lines_per_step: int = 1
    """2 for samplers of two stages, whose last step has one line."""
    train_timesteps: int = 1000
    """Timesteps are below it; in flow matching at most it."""

    def __len__(self) -> int:
        """R."""
        return len(self.draws)

    @property
    def steps(self) -> int:
        """S."""
        return -(-len(self) // self.lines_per_step)

    def step_of(self, line: int) -> int:
        """The step, from 1, that a line belongs to, from 1."""
        return -(-line // self.lines_per_step)

    def steps_done(self, lines: int) -> int:
        """The steps that are complete after so many lines."""
        return self.steps if lines == len(self) else lines // self.lines_per_step

    def stage_of(self, step: int, stages: int) -> int:
        """The part of the noise schedule that a step, from 0, is in, if its timesteps are divided into equal parts,
        from the noisiest. Both lines of a step are in the same part. See `stage_at`."""
        return stage_at(float(self.timesteps[step * self.lines_per_step]), stages, self.train_timesteps)

    def per_step(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[S]: the sums over each step of values [R]."""
        return np.asarray(np.add.reduceat(values, np.arange(0, len(self), self.lines_per_step)), np.int64)

    @property
    def timesteps(self) -> npt.NDArray[np.float32]:
        """[R]"""
        return self.columns["t"]

    def check(self, names: Sequence[str]) -> None:
        """Raises UsageError if a line needs a column that a graph with these columns lacks."""
        for name in sorted(self.columns.keys() - set(names)):
            if (self.columns[name] != COLUMNS[name]).any():
                raise UsageError(
                    f"this sampler or guidance needs the column {name!r}, this bundle has {', '.join(names)}: use "
                    "another one, or export the model again"
                )

    def table(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        """[R, K]: the columns of a graph, in its order. Raises as `check`."""
        self.check(names)
        columns = (self.columns.get(name, np.full(len(self), COLUMNS[name], np.float32)) for name in names)
        return np.stack([*columns], axis=1)


def stage_at(timestep: float, stages: int, train_timesteps: int) -> int:
    """The stage, from 0 for the noisiest, of a timestep: the timesteps T - 1 ... 0 are divided into equal parts."""
    stage = int((train_timesteps - 1 - timestep) * stages / train_timesteps)
    return min(max(stage, 0), stages - 1)


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
    spacing: Spacing | None = None,
    guidance: Guidance = Guidance.CFG,
) -> Schedule:
    """The steps of a whole run.

    `kind` is what `scheduler_config` describes. `image_tokens` is the picture's size in tokens of the network, on which
    a flow's shift may depend; `embedded_guidance` is an input of guidance-distilled networks (arXiv 2210.03142).
    `spacing` replaces that of the config.

    `guidance_rescale` is phi of arXiv 2305.08891. `guidance_interval` (low, high] bounds sigma / alpha of the guided
    steps (arXiv 2404.07724). `strength` in (0, 1] skips the first steps, for image to image; `eta` is DDIM's.
    Raises UsageError for numbers out of range and for a scheduler's config that this runtime does not support.
    """
    noise: NoiseSchedule | FlowSchedule
    if kind is ScheduleKind.BETAS:
        method = _METHODS[sampler]
        noise = _noise_schedule(scheduler_config, sampler, spacing)
    else:
        method = _flow_method(sampler, spacing, guidance)
        noise = FlowSchedule.read(scheduler_config, kind, image_tokens)
    _check(noise, sampler, steps)
    interval = None if guidance_interval is None else (guidance_interval[0], guidance_interval[1])
    scales = (guidance_scale, guidance_rescale, embedded_guidance)
    return _schedule(noise, method, sampler, steps, kind, guidance, scales, interval, eta, strength)


@functools.lru_cache(32)  # most requests of a server differ in their prompt and seed only
def _schedule(
    noise: NoiseSchedule | FlowSchedule,
    method: "_Method",
    sampler: Sampler,
    steps: int,
    kind: ScheduleKind,
    guidance: Guidance,
    scales: tuple[float, float, float],
    guidance_interval: tuple[float, float] | None,
    eta: float,
    strength: float,
) -> Schedule:
    """See `make_schedule`; the arrays are read-only. `scales` are those of guidance, rescale and embedded guidance."""
    guidance_scale, guidance_rescale, embedded_guidance = scales
    levels = method.levels(noise, steps)
    start = _start(len(levels.t), strength, kind)
    levels = Levels(levels.t[start:], levels.alpha[start:], levels.sigma[start:], levels.last_alpha, levels.last_sigma)
    levels = levels if method.stages is None else method.stages(noise, levels)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        update = method.update(noise, levels, SamplerSettings(steps, eta))
    if guidance is Guidance.CFG_PP:
        update = _cfg_pp(update, levels, sampler)
    a, b = prediction(noise.prediction_type, levels)
    guided = _guided(levels, guidance_scale > 1 or guidance is Guidance.CFG_PP, guidance_interval)
    known_scale, known_sigma = np.append(levels.alpha[1:], 1.0), np.append(levels.sigma[1:], 0.0)
    columns = {
        "t": levels.t,
        "sample_to_denoised": a,
        "model_to_denoised": b,
        "sample": update.sample,
        "denoised": update.denoised,
        "previous": update.previous,
        "previous2": np.zeros_like(update.noise) if update.previous2 is None else update.previous2,
        "uncond": np.zeros_like(update.noise) if update.uncond is None else update.uncond,
        "noise": update.noise,
        "guidance": np.where(guided, guidance_scale, 1.0),
        "rescale": np.where(guided, guidance_rescale, 0.0),
        "zero_star": np.where(guided & (guidance is Guidance.ZERO_STAR), 1.0, 0.0),
        "embedded_guidance": np.full(len(levels.t), embedded_guidance),
        "known_scale": known_scale,
        "known_sigma": known_sigma,
    }
    columns = {name: np.asarray(column, np.float32) for name, column in columns.items()}
    if not all(np.isfinite(column).all() for column in columns.values()):
        raise UsageError(f"{sampler} in {steps} steps has no finite schedule with this model: change the steps")
    for array in (*columns.values(), update.draws, guided):
        array.flags.writeable = False
    euler_start = method.divided and isinstance(noise, NoiseSchedule) and noise.timestep_spacing != "leading"
    return Schedule(
        columns=columns,
        draws=update.draws,
        guided=guided,
        init_scale=float(levels.sigma[0]) if euler_start else 1.0,
        start_scale=float(levels.alpha[0]),
        start_sigma=float(levels.sigma[0]),
        lines_per_step=1 if method.stages is None else 2,
        train_timesteps=noise.num_train_timesteps,
    )


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


def _cfg_pp(update: Update, levels: Levels, sampler: Sampler) -> Update:
    """CFG++ (arXiv 2406.08070): what a step keeps of its noise is that of the unconditional prediction."""
    if sampler not in _FIRST_ORDER:
        raise UsageError(
            f"guidance is cfg++ with the sampler {sampler}, but the sampler must be {one_of(_FIRST_ORDER)}"
        )
    moved = update.sample * levels.alpha
    return update._replace(denoised=update.denoised + moved, uncond=-moved)


class _Method(NamedTuple):
    levels: Callable[[Any, int], Levels]  # of a NoiseSchedule, or of a FlowSchedule in _FLOW_METHODS
    update: Callable[[Any, Levels, SamplerSettings], Update]
    default_spacing: str = ""  # of the diffusers class, for a config of betas without one
    divided: bool = False  # Euler's state, ours divided by alpha, starts at sigma * noise
    stages: Callable[[Any, Levels], Levels] | None = None  # the levels of its lines, if two per step


_METHODS: Final = {
    Sampler.DDIM: _Method(ddim_levels, ddim, "leading"),
    Sampler.DDPM: _Method(ddim_levels, ddpm, "leading"),
    Sampler.EULER: _Method(euler_levels, euler, "linspace", divided=True),
    Sampler.EULER_A: _Method(euler_levels_to_zero, euler_ancestral, "linspace", divided=True),
    Sampler.DPMPP_2M: _Method(dpm_levels, dpmpp_2m, "linspace"),
    Sampler.DPMPP_2M_KARRAS: _Method(dpm_levels, dpmpp_2m, "linspace"),
    Sampler.DPMPP_2M_SDE: _Method(dpm_levels, dpmpp_2m_sde, "linspace"),
    Sampler.LCM: _Method(lcm_levels, lcm, "leading"),
    Sampler.HEUN: _Method(euler_levels_to_zero, heun, "linspace", divided=True, stages=heun_stages),
    Sampler.DPM2_A: _Method(dpm2_levels, dpm2_ancestral, "linspace", divided=True, stages=halfway_stages),
    Sampler.DPMPP_2S_A: _Method(
        euler_levels_to_zero, dpmpp_2s_ancestral, "linspace", divided=True, stages=halfway_stages
    ),
    Sampler.DPMPP_3M_SDE: _Method(dpm_levels, dpmpp_3m_sde, "linspace"),
    Sampler.UNIPC: _Method(dpm_levels, unipc, "linspace"),
}

_FLOW_METHODS: Final = {
    Sampler.EULER: _Method(flow_levels, euler_flow),
    Sampler.DPMPP_2M: _Method(flow_dpm_levels, dpmpp_2m),
    Sampler.DPMPP_2M_SDE: _Method(flow_dpm_levels, dpmpp_2m_sde),
}


_DPM: Final = (Sampler.DPMPP_2M, Sampler.DPMPP_2M_KARRAS, Sampler.DPMPP_2M_SDE, Sampler.DPMPP_3M_SDE)
_FIRST_ORDER: Final = (Sampler.DDIM, Sampler.EULER, Sampler.EULER_A)
_SPACINGS: Final[Mapping[Sampler, tuple[Spacing, ...]]] = {
    Sampler.DDIM: (Spacing.SGM_UNIFORM,),
    Sampler.DDPM: (Spacing.SGM_UNIFORM,),
    Sampler.LCM: (),
    Sampler.DPMPP_2M_KARRAS: (Spacing.KARRAS,),
}
"""The spacings of samplers that do not allow all."""


def samplers_for(kind: ScheduleKind) -> tuple[Sampler, ...]:
    """The samplers that suit a kind of schedule."""
    return tuple(_METHODS if kind is ScheduleKind.BETAS else _FLOW_METHODS)


def spacings_for(kind: ScheduleKind) -> tuple[Spacing, ...]:
    """The spacings that a kind of schedule allows; a sampler may allow fewer."""
    return tuple(Spacing) if kind is ScheduleKind.BETAS else ()


def guidance_for(kind: ScheduleKind) -> tuple[Guidance, ...]:
    """The kinds of guidance that a kind of schedule allows; a sampler may allow fewer."""
    return tuple(Guidance) if kind is ScheduleKind.BETAS else (Guidance.CFG, Guidance.ZERO_STAR)


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
            order = scheduler_config.get("solver_order", 2)
            if scheduler_config.get("algorithm_type", "dpmsolver++") == "sde-dpmsolver++":
                return {2: Sampler.DPMPP_2M_SDE, 3: Sampler.DPMPP_3M_SDE}.get(order)
            if order != 2:
                return None
            return Sampler.DPMPP_2M_KARRAS if scheduler_config.get("use_karras_sigmas") else Sampler.DPMPP_2M
        case "HeunDiscreteScheduler":
            return Sampler.HEUN
        case "KDPM2AncestralDiscreteScheduler":
            return Sampler.DPM2_A
        case "UniPCMultistepScheduler":
            known = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []}
            known |= {"solver_p": None, "use_flow_sigmas": False}
            return Sampler.UNIPC if known == {k: scheduler_config.get(k, known[k]) for k in known} else None
    return None


def default_sampler(scheduler_config: Mapping[str, Any], kind: ScheduleKind) -> Sampler:
    """The sampler for a diffusers scheduler's config; if it has no counterpart, the first that suits the schedule."""
    named, allowed = sampler_of(scheduler_config), samplers_for(kind)
    return named if named is not None and named in allowed else allowed[0]


def _flow_method(sampler: Sampler, spacing: Spacing | None, guidance: Guidance) -> _Method:
    if sampler not in _FLOW_METHODS:
        raise UsageError(f"the sampler {sampler} does not suit flow matching: it must be {one_of(_FLOW_METHODS)}")
    if spacing is not None:
        raise UsageError(f"spacing is {spacing}, a model of flow matching has its own: leave it out")
    if guidance not in (allowed := guidance_for(ScheduleKind.FLOW)):
        raise UsageError(f"guidance is {guidance} with flow matching, but must be {one_of(allowed)}")
    return _FLOW_METHODS[sampler]


def spacings_of(sampler: Sampler) -> tuple[Spacing, ...]:
    """The spacings that a sampler allows."""
    return _SPACINGS.get(sampler, tuple(Spacing))


def _noise_schedule(config: Mapping[str, Any], sampler: Sampler, spacing: Spacing | None) -> NoiseSchedule:
    """The config's noise schedule in this spacing. Raises UsageError for one that the sampler does not allow."""
    allowed = spacings_of(sampler)
    if spacing is not None and spacing not in allowed:
        choices = f"but must be {one_of(allowed)}" if allowed else "which has its own: leave it out"
        raise UsageError(f"spacing is {spacing} with the sampler {sampler}, {choices}")
    if sampler is Sampler.DPMPP_2M_KARRAS:
        spacing = Spacing.KARRAS
    noise = NoiseSchedule.read(config, _METHODS[sampler].default_spacing, spacing)
    karras = sampler is Sampler.DPMPP_2M and noise.spacing is Spacing.KARRAS  # which dpmpp-2m-karras is for
    if spacing is None and (karras or sampler is Sampler.EULER_A):  # whose class ignores the config's spacing of sigmas
        return replace(noise, spacing=None)
    return noise


def _start(steps: int, strength: float, kind: ScheduleKind) -> int:
    """The steps that `strength` skips. Diffusers' pipelines round the others down for betas, and up for flows."""
    if not 0 < strength <= 1:
        raise UsageError(f"strength is {strength:g}, but must be more than 0 and at most 1")
    count = int(steps * strength) if kind is ScheduleKind.BETAS else steps - int(steps - steps * strength)
    if count == 0:
        more = f"use {math.ceil(1 / strength)} or more" if strength >= 0.001 else "use a higher strength"
        raise UsageError(f"strength {strength:g} of {steps} steps leaves none: {more}")
    return steps - count


def _guided(levels: Levels, guided_at_all: bool, interval: tuple[float, float] | None) -> npt.NDArray[np.bool_]:
    guided = np.full(len(levels.t), guided_at_all)
    if interval is None:
        return guided
    with np.errstate(divide="ignore"):
        sigma = levels.sigma / levels.alpha
    return guided & (interval[0] < sigma) & (sigma <= interval[1])


def _check(noise: NoiseSchedule | FlowSchedule, sampler: Sampler, steps: int) -> None:
    """Refuses what the scheduler's config rules out; `Request` checks the ranges of its numbers."""
    if not 1 <= steps <= noise.num_train_timesteps:
        raise UsageError(f"steps is {steps}, but must be 1 to {noise.num_train_timesteps}")
    if sampler in _DPM and noise.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        raise UsageError(
            f"the scheduler's config says algorithm_type = {noise.algorithm_type!r}, {sampler} supports dpmsolver++ "
            "and sde-dpmsolver++: use another sampler such as euler"
        )
