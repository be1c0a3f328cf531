"""The noise levels that samplers visit, as arrays: those of a run's steps, or of its lines.

Not covered: what a step computes (`oneword.runtime.updates`), and noise schedules (`oneword.runtime.schedule`,
`oneword.runtime.flow`).
"""

from typing import NamedTuple

import numpy as np

from oneword.runtime.flow import FlowSchedule
from oneword.runtime.schedule import Array, NoiseSchedule
from oneword.runtime.spacing import Spacing, spaced_sigmas


class Levels(NamedTuple):
    """The noise levels of a run, or of its lines: t, alpha, sigma [S], and the level at its end."""

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


def _integer_levels(noise: NoiseSchedule, t: Array) -> Levels:
    abar = noise.abar_at(t)
    return Levels(t, np.sqrt(abar), np.sqrt(1 - abar), 1.0, 0.0)


def _sigma_levels(noise: NoiseSchedule, t: Array, sigmas: Array) -> Levels:
    last = noise.sigmas[0] if noise.final_sigmas_type == "sigma_min" else 0.0
    ve = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(ve**2 + 1)
    return Levels(t, alpha[:-1], (ve * alpha)[:-1], float(alpha[-1]), float(ve[-1] * alpha[-1]))


def ddim_levels(noise: NoiseSchedule, steps: int) -> Levels:
    """Integer timesteps, for DDIM and DDPM."""
    return _integer_levels(noise, noise.timesteps(steps, rounded=True))


def lcm_levels(noise: NoiseSchedule, steps: int) -> Levels:
    """The timesteps that a consistency model was distilled for."""
    return _integer_levels(noise, noise.timesteps_lcm(steps))


def euler_levels(noise: NoiseSchedule, steps: int) -> Levels:
    """Evenly spaced timesteps, or sigmas in the schedule's spacing."""
    t = noise.timesteps(steps, rounded=False)
    sigmas = noise.sigma_at(t)
    if noise.spacing is not None:
        sigmas = spaced_sigmas(noise.spacing, sigmas[0], sigmas[-1], steps)
        t = noise.timestep_of(sigmas)
    return _sigma_levels(noise, t, sigmas)


def euler_levels_to_zero(noise: NoiseSchedule, steps: int) -> Levels:
    """`euler_levels`, ending without noise."""
    return euler_levels(noise, steps)._replace(last_alpha=1.0, last_sigma=0.0)


def dpm2_levels(noise: NoiseSchedule, steps: int) -> Levels:
    """`euler_levels_to_zero`, with integer timesteps in Karras's spacing."""
    levels = euler_levels_to_zero(noise, steps)
    return levels._replace(t=np.round(levels.t)) if noise.spacing is Spacing.KARRAS else levels


def dpm_levels(noise: NoiseSchedule, steps: int) -> Levels:
    """The levels of diffusers' DPM solvers and UniPC."""
    if noise.spacing is None:
        t = noise.timesteps_dpm(steps)
        return _sigma_levels(noise, t, noise.sigma_at(t))
    sigmas = spaced_sigmas(noise.spacing, noise.sigmas[-1], noise.sigmas[0], steps)
    t = noise.timestep_of(sigmas)
    rounded = noise.spacing not in (Spacing.EXPONENTIAL, Spacing.BETA) and noise.beta_schedule != "squaredcos_cap_v2"
    return _sigma_levels(noise, np.round(t) if rounded else np.floor(t), sigmas)


def heun_stages(noise: NoiseSchedule, levels: Levels) -> Levels:
    """The levels of lines: between two steps, the level of the second."""
    return _interleaved(levels, levels.t[1:], levels.sigma[1:] / levels.alpha[1:])


def halfway_stages(noise: NoiseSchedule, levels: Levels) -> Levels:
    """The levels of lines: between two steps, the geometric mean of the first and its sigma_down."""
    ve = levels.sigma / levels.alpha
    middle = np.sqrt(ve[:-1] * ancestral_step(ve[:-1], ve[1:])[0])
    return _interleaved(levels, noise.timestep_of(middle), middle)


def _interleaved(levels: Levels, t: Array, ve: Array) -> Levels:
    """Levels with others, t and sigma / alpha [S - 1], between them."""
    alpha = 1 / np.sqrt(ve**2 + 1)
    lines = np.zeros((3, 2 * len(levels.t) - 1))
    lines[:, ::2], lines[:, 1::2] = levels[:3], (t, alpha, ve * alpha)
    return Levels(lines[0], lines[1], lines[2], levels.last_alpha, levels.last_sigma)


def flow_levels(noise: FlowSchedule, steps: int) -> Levels:
    """The scheduler's own sigmas, shifted."""
    sigmas = noise.sigmas(steps)
    return Levels(sigmas * noise.num_train_timesteps, 1 - sigmas, sigmas, 1.0, 0.0)


def flow_dpm_levels(noise: FlowSchedule, steps: int) -> Levels:
    """The levels of diffusers' DPM solver for flows, whose timesteps are integers."""
    sigmas = noise.sigmas_dpm(steps)
    return Levels(np.floor(sigmas * noise.num_train_timesteps), 1 - sigmas, sigmas, 1.0, 0.0)


def ancestral_step(ve: Array, ve_next: Array) -> tuple[Array, Array]:
    """sigma_down and sigma_up of a step, as in k-diffusion with eta 1."""
    return ve_next**2 / ve, ve_next * np.sqrt(np.maximum(ve**2 - ve_next**2, 0)) / ve
