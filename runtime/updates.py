"""What each sampler computes in a step: pure functions from the levels that it visits to the columns of a table.

The equation of these columns is in `oneword.runtime.samplers`. Not covered: guidance, and the levels
(`oneword.runtime.levels`).
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from oneword.runtime.flow import FlowSchedule
from oneword.runtime.levels import Levels, ancestral_step
from oneword.runtime.schedule import Array, NoiseSchedule

_SHORT_RUN: Final = 15  # steps below which diffusers' DPM solver lowers the order at the end


class SamplerSettings(NamedTuple):
    """What a sampler needs besides the levels: the request's steps (before `strength`) and eta."""

    steps: int
    eta: float


class Update(NamedTuple):
    """The columns of a step, each [S], named after what it multiplies, and which steps draw the noise.

    None stands for zeros.
    """

    sample: Array
    denoised: Array
    previous: Array
    noise: Array
    draws: npt.NDArray[np.bool_]
    previous2: Array | None = None
    uncond: Array | None = None


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
    return _divided(levels, ve_next / ve, 1 - ve_next / ve, np.zeros_like(ve), np.zeros_like(ve), np.zeros(len(ve)))


def euler_ancestral(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """Euler to sigma_down = sigma_next^2 / sigma, then noise of sigma_up, as k-diffusion's `sample_euler_ancestral`."""
    ve, ve_next = levels.sigma / levels.alpha, levels.next_sigma / levels.next_alpha
    down, up = ancestral_step(ve, ve_next)
    return _divided(levels, down / ve, 1 - down / ve, np.zeros_like(ve), up, np.ones(len(ve)))


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


def heun(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """Algorithm 2 of Karras et al. (2022), without churn: Euler to the next level, then the mean of both slopes."""
    stages = _Stages.of(levels)
    ratio = stages.middle / stages.start
    half = (1 - ratio) / (2 * ratio)
    return stages.update(levels, np.ones_like(ratio), half, -half, np.zeros_like(ratio), draws=False)


def dpm2_ancestral(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """DPM-Solver-2 to sigma_down with the slope half-way, then noise, as k-diffusion's `sample_dpm_2_ancestral`."""
    stages = _Stages.of(levels)
    down, up = ancestral_step(stages.start, stages.end)
    ratio = stages.middle / stages.start
    slope = (down - stages.start) / stages.middle
    return stages.update(levels, 1 / ratio + slope, -slope, 1 - 1 / ratio, up, draws=True)


def dpmpp_2s_ancestral(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """DPM-Solver++(2S), algorithm 1 of Lu et al. (2022), to sigma_down, then noise, as k-diffusion's
    `sample_dpmpp_2s_ancestral`."""
    stages = _Stages.of(levels)
    down, up = ancestral_step(stages.start, stages.end)
    return stages.update(
        levels,
        down / stages.middle,
        1 - down / stages.start,
        down / stages.start - down / stages.middle,
        up,
        draws=True,
    )


def dpmpp_3m_sde(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """SDE-DPM-Solver++(3M), as in diffusers: of lower order in the first two steps, and in the last two of few."""
    h = _log_snr_steps(levels)
    second = dpmpp_2m_sde(noise, levels, settings)
    third = np.arange(len(h)) > 1
    third[-1] &= not _last_is_first_order(noise, settings)
    third[-2:-1] &= not (noise.lower_order_final and settings.steps < _SHORT_RUN)
    i = np.flatnonzero(third)
    last, before = h[i - 1] / h[i], h[i - 2] / h[i]  # r0, r1
    alpha, phi = levels.next_alpha[i], -np.expm1(-2 * h[i])
    gain1, gain2 = alpha * (1 - phi / (2 * h[i])), alpha * ((phi - 2 * h[i]) / (2 * h[i]) ** 2 - 0.5)
    slope, curve = gain1 * (1 + last / (last + before)) + gain2 / (last + before), -gain1 * last / (last + before)
    curve = curve - gain2 / (last + before)
    denoised, previous, previous2 = second.denoised.copy(), second.previous.copy(), np.zeros_like(h)
    denoised[i] = alpha * phi + slope / last
    previous[i] = -slope / last + curve / before
    previous2[i] = -curve / before
    return second._replace(denoised=denoised, previous=previous, previous2=previous2)


def unipc(noise: NoiseSchedule, levels: Levels, settings: SamplerSettings) -> Update:
    """UniPC of order 2 with B2 (Zhao et al. 2023), as in diffusers: a step first corrects its sample with its newest
    prediction, then predicts the next. The first step has no correction, the last one has order one."""
    h = _log_snr_steps(levels)
    before = np.append(np.nan, h[:-1])  # the step that led to each sample
    ratio = -np.append(np.nan, before[:-1]) / before  # log-SNR of the level before that, relative
    second = np.arange(len(h)) > 0
    second[-1] &= not noise.lower_order_final
    gain = -levels.next_alpha * np.expm1(-h)
    with np.errstate(invalid="ignore"):
        slope = np.where(second, gain * 0.5 * h / before, 0)
        keep, corrected = levels.next_sigma / levels.sigma, levels.alpha * np.expm1(-before)
        phi1 = np.expm1(-before) / -before - 1
        phi2 = phi1 / -before - 0.5
        b1, b2 = phi1 / np.expm1(-before), 2 * phi2 / np.expm1(-before)
        rho = (b1 - b2) / (1 - ratio)
        wide = np.append(False, second[:-1])  # corrections of order two
        newest = np.where(wide, b1 - rho, 0.5) * corrected
        older = np.where(wide, (0.5 - rho) / ratio, 0) * corrected
    newest, older = np.where(np.arange(len(h)) > 0, (newest, older), 0)
    return Update(
        sample=keep,
        denoised=gain + slope - keep * newest,
        previous=-slope + keep * (newest - older),
        noise=np.zeros_like(h),
        draws=np.zeros(len(h), bool),
        previous2=keep * older,
    )


class _Stages(NamedTuple):
    """sigma / alpha at the start, in the middle and at the end of every step of two stages, all [S - 1]."""

    start: Array
    middle: Array
    end: Array

    @classmethod
    def of(cls, levels: Levels) -> "_Stages":
        """Those of the levels of lines."""
        ve = np.append(levels.sigma / levels.alpha, levels.last_sigma / levels.last_alpha)
        return cls(ve[:-2:2], ve[1:-1:2], ve[2::2])

    def update(
        self, levels: Levels, sample: Array, denoised: Array, previous: Array, up: Array, *, draws: bool
    ) -> Update:
        """Euler to the middle, then a second stage of these columns; the last step is Euler's, to the end."""
        count = len(levels.t)
        columns = np.zeros((5, count))  # sample, denoised, previous, noise, draws
        columns[0, :-1:2] = self.middle / self.start
        columns[1, ::2] = 1 - columns[0, ::2]
        columns[:, 1::2] = sample, denoised, previous, up, np.full(count // 2, draws)
        return _divided(levels, *columns)


def _divided(levels: Levels, sample: Array, denoised: Array, previous: Array, noise: Array, draws: Array) -> Update:
    """A step in Euler's state, which is ours divided by alpha, except for the last one, which is not divided."""
    scale = np.append(levels.alpha[1:], 1.0)
    return Update(scale / levels.alpha * sample, scale * denoised, scale * previous, scale * noise, draws > 0)


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
    second = np.arange(len(h)) > 0
    second[-1] &= not _last_is_first_order(noise, settings)
    correction = np.zeros_like(h)
    correction[second] = gain[second] * 0.5 * h[second] / np.append(1.0, h[:-1])[second]
    return Update(keep, gain + correction, -correction, up, np.full(len(h), draws))


def _last_is_first_order(noise: NoiseSchedule | FlowSchedule, settings: SamplerSettings) -> bool:
    short = settings.steps < _SHORT_RUN  # of the whole run, including those that `strength` skips
    return noise.euler_at_final or noise.final_sigmas_type == "zero" or (noise.lower_order_final and short)
