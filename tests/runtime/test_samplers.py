"""Whole runs of our tables against diffusers' schedulers, with a fixed nonlinear function in place of the model."""

import inspect
import itertools
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import mpmath  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.schedulers import AysSchedules
from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr

from oneword.engines.errors import UsageError
from oneword.runtime.samplers import Guidance, Sampler, Schedule, make_schedule, sampler_of, stage_at
from oneword.runtime.schedule import ScheduleKind
from oneword.runtime.spacing import Spacing, aligned_sigmas, beta_quantile

SHAPE = (2, 4, 6, 5)
BASE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
PEERS: Mapping[Sampler, tuple[Any, dict[str, Any]]] = {
    Sampler.DDIM: (diffusers.DDIMScheduler, {}),
    Sampler.DDPM: (diffusers.DDPMScheduler, {}),
    Sampler.EULER: (diffusers.EulerDiscreteScheduler, {}),
    Sampler.EULER_A: (diffusers.EulerAncestralDiscreteScheduler, {}),
    Sampler.DPMPP_2M: (diffusers.DPMSolverMultistepScheduler, {}),
    Sampler.DPMPP_2M_KARRAS: (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    Sampler.DPMPP_2M_SDE: (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    Sampler.LCM: (diffusers.LCMScheduler, {}),
    Sampler.HEUN: (diffusers.HeunDiscreteScheduler, {}),
    Sampler.DPM2_A: (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    Sampler.DPMPP_3M_SDE: (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    Sampler.UNIPC: (diffusers.UniPCMultistepScheduler, {}),
}
WITHOUT_SAMPLE_PREDICTION = (Sampler.EULER_A, Sampler.DPM2_A)  # in diffusers


def _model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + float(np.sin(t / 150))) - 0.2 * torch.cos(3 * x) + 0.3 * x.mean()


def _run_diffusers(
    sampler: Sampler, config: dict[str, Any], steps: int, seed: int, strength: float | None, **step: Any
) -> tuple[torch.Tensor, list[float]]:
    """The latents of diffusers' scheduler, text to image or image to image, and its timesteps."""
    cls, extra = PEERS[sampler]
    scheduler = cls.from_config({**config, **extra})
    scheduler.set_timesteps(steps)
    return _run_scheduler(scheduler, steps, seed, strength, **step)


def _run_scheduler(
    scheduler: Any, steps: int, seed: int, strength: float | None, **step: Any
) -> tuple[torch.Tensor, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    timesteps = scheduler.timesteps
    if strength is None:
        x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    else:
        start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
        timesteps = timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x = scheduler.add_noise(_image(), torch.randn(SHAPE, generator=generator), timesteps[:1])
    for t in timesteps:
        m = _model(scheduler.scale_model_input(x, t), float(t))
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        drawn = {"generator": generator} if takes_generator else {}
        x = scheduler.step(m, t, x, return_dict=False, **drawn, **step)[0]
    return x, [float(t) for t in timesteps]


def _image() -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, int(np.prod(SHAPE))).reshape(SHAPE)


STEP = ("t", "sample_to_denoised", "model_to_denoised", "sample", "denoised", "previous", "previous2", "noise")


def _table(schedule: Schedule) -> npt.NDArray[np.float32]:
    """The columns of STEP [R, 8]."""
    return np.stack([schedule.columns[name] for name in STEP], 1)


def _run_table(schedule: Schedule, seed: int, strength: float | None) -> torch.Tensor:
    """The latents of our table, in float32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SHAPE, generator=generator)
    x = schedule.init_scale * noise
    if strength is not None:
        x = schedule.start_scale * _image() + schedule.start_sigma * noise
    previous = previous2 = torch.zeros(SHAPE)
    for line, draws in zip(_table(schedule), schedule.draws, strict=True):
        t, a, b, c, d, e, e2, f = (float(value) for value in line)
        denoised = a * x + b * _model(x, t)
        drawn = torch.randn(SHAPE, generator=generator) if draws else torch.zeros(SHAPE)
        x = c * x + d * denoised + e * previous + e2 * previous2 + f * drawn
        previous, previous2 = denoised, previous
    return x


def _assert_equal_runs(
    sampler: Sampler, config: dict[str, Any], steps: int, strength: float | None = None, eta: float = 0.0
) -> None:
    step = {"eta": eta} if eta else {}
    expected, timesteps = _run_diffusers(sampler, config, steps, 11, strength, **step)
    schedule = make_schedule(config, sampler, steps, guidance_scale=1.0, eta=eta, strength=strength or 1.0)
    assert torch.isfinite(expected).all()
    # diffusers computes in float32: DPM2 a of two steps is the root of a difference of squares that are nearly equal
    atol = 0.02 if (sampler, steps) == (Sampler.DPM2_A, 2) else 1e-3
    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=atol)
    difference = (_run_table(schedule, 11, strength) - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-4


CASES = [
    case
    for case in itertools.product(
        PEERS, ("epsilon", "v_prediction", "sample"), ("leading", "linspace", "trailing"), (8, 20)
    )
    if case[1] != "sample" or case[0] not in WITHOUT_SAMPLE_PREDICTION
]


def test_equal_settings_share_a_schedule_that_cannot_be_changed() -> None:
    first, again, other = (make_schedule(BASE, Sampler.DDIM, steps, guidance_scale=7.0) for steps in (8, 8, 9))

    assert first is again
    assert other is not first
    with pytest.raises(ValueError, match="read-only"):
        first.timesteps[0] = 1


@pytest.mark.parametrize(("sampler", "prediction", "spacing", "steps"), CASES)
def test_a_run_ends_with_the_latents_of_diffusers(sampler: Sampler, prediction: str, spacing: str, steps: int) -> None:
    config = {**BASE, "prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 1}
    _assert_equal_runs(sampler, config, steps)


@pytest.mark.parametrize("sampler", [Sampler.DDIM, Sampler.DPMPP_2M])
@pytest.mark.parametrize("steps", [61, 103, 122])
def test_trailing_timesteps_are_as_many_as_the_steps(sampler: Sampler, steps: int) -> None:
    """diffusers adds the timestep -1 for these numbers of steps, whose quotient with 1,000 is rounded down."""
    schedule = make_schedule({**BASE, "timestep_spacing": "trailing"}, sampler, steps, guidance_scale=1.0)

    assert schedule.steps == steps
    assert schedule.timesteps[0] == 999
    np.testing.assert_allclose(schedule.timesteps[-1], 1000 / steps - 1, atol=0.5)


@pytest.mark.parametrize("sampler", PEERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_image_to_image_starts_and_ends_as_in_diffusers(sampler: Sampler, spacing: str) -> None:
    config = {**BASE, "prediction_type": "v_prediction", "timestep_spacing": spacing, "steps_offset": 1}
    for strength in (0.3, 0.65, 1.0):
        _assert_equal_runs(sampler, config, 20, strength)


@pytest.mark.parametrize(
    "sampler", [Sampler.DPMPP_2M, Sampler.DPMPP_2M_KARRAS, Sampler.DPMPP_2M_SDE, Sampler.DPMPP_3M_SDE, Sampler.UNIPC]
)
@pytest.mark.parametrize("strength", [0.65, 0.8])
def test_the_order_of_the_last_step_depends_on_the_steps_of_the_whole_run(sampler: Sampler, strength: float) -> None:
    config = {**BASE, "prediction_type": "epsilon", "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    _assert_equal_runs(sampler, config, 20, strength)  # 13 or 16 of 20 steps, and 15 is where the order changes


SHIFTING = sorted(PEERS.keys() - {Sampler.HEUN, Sampler.DPM2_A})  # the peers of those two ignore the setting


@pytest.mark.parametrize("sampler", SHIFTING)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_zero_terminal_snr_matches_diffusers(sampler: Sampler, spacing: str) -> None:
    config = {**BASE, "prediction_type": "v_prediction", "timestep_spacing": spacing, "rescale_betas_zero_snr": True}
    _assert_equal_runs(sampler, config, 10)


@pytest.mark.parametrize("sampler", [Sampler.HEUN, Sampler.DPM2_A])
@pytest.mark.parametrize(("spacing", "tolerance"), [("leading", 1e-4), ("trailing", 1e-3)])
def test_zero_terminal_snr_is_followed_by_samplers_whose_diffusers_class_lacks_it(
    sampler: Sampler, spacing: str, tolerance: float
) -> None:
    """diffusers gets the betas that its other schedulers compute. With trailing its float32 state is 4096 times ours,
    whose difference of nearly equal numbers loses some digits."""
    config = {**BASE, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    cls, _ = PEERS[sampler]
    betas = rescale_zero_terminal_snr(cls.from_config(config).betas)
    scheduler = cls.from_config({**config, "trained_betas": betas.tolist()})
    scheduler.alphas_cumprod[-1] = 2**-24  # as in EulerDiscreteScheduler
    scheduler.set_timesteps(20)
    expected, timesteps = _run_scheduler(scheduler, 20, 11, None)

    schedule = make_schedule({**config, "rescale_betas_zero_snr": True}, sampler, 20, guidance_scale=1.0)

    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=0.02)
    assert (_run_table(schedule, 11, None) - expected).abs().max() / expected.abs().max() <= tolerance


SPACED = ("use_karras_sigmas", "use_exponential_sigmas")


@pytest.mark.parametrize("sampler", sorted(PEERS.keys() - {Sampler.DPMPP_2M_KARRAS}))
@pytest.mark.parametrize("key", SPACED)
def test_a_spacing_of_sigmas_in_the_config_is_followed_if_the_diffusers_class_has_it(
    sampler: Sampler, key: str
) -> None:
    """dpmpp-2m leaves use_karras_sigmas to dpmpp-2m-karras."""
    cls, _ = PEERS[sampler]
    has_key = key in inspect.signature(cls.__init__).parameters
    config = {**BASE, "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1}
    plain, spaced = (make_schedule({**config, **extra}, sampler, 20, guidance_scale=1.0) for extra in ({}, {key: True}))

    followed = has_key and (sampler, key) != (Sampler.DPMPP_2M, "use_karras_sigmas")
    assert np.array_equal(spaced.timesteps, plain.timesteps) != followed
    if not followed:
        np.testing.assert_array_equal(_table(spaced), _table(plain))
    if not has_key:
        _assert_equal_runs(sampler, {**config, key: True}, 20)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_with_any_eta_and_final_alpha_matches_diffusers(eta: float, set_alpha_to_one: bool, steps: int) -> None:
    config = {**BASE, "prediction_type": "epsilon", "set_alpha_to_one": set_alpha_to_one, "steps_offset": 1}
    _assert_equal_runs(Sampler.DDIM, config, steps, eta=eta)
    _assert_equal_runs(Sampler.DDIM, config, steps, eta=0.0)


@pytest.mark.parametrize("sampler", PEERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 50])
def test_short_and_long_runs_match_diffusers(sampler: Sampler, steps: int) -> None:
    _assert_equal_runs(sampler, {**BASE, "prediction_type": "epsilon"}, steps)


@pytest.mark.parametrize(
    ("sampler", "extra"),
    [
        (Sampler.DDIM, {"beta_schedule": "linear"}),
        (Sampler.DDIM, {"trained_betas": list(np.linspace(1e-4, 0.02, 600)), "num_train_timesteps": 600}),
        (Sampler.DDPM, {"variance_type": "fixed_large"}),
        (Sampler.DDPM, {"beta_schedule": "squaredcos_cap_v2"}),
        (Sampler.EULER, {"use_karras_sigmas": True}),
        (Sampler.EULER, {"final_sigmas_type": "sigma_min"}),
        (Sampler.DPMPP_2M, {"final_sigmas_type": "sigma_min"}),
        (Sampler.DPMPP_2M, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        (Sampler.DPMPP_2M, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
        (Sampler.LCM, {"original_inference_steps": 40}),
        (Sampler.HEUN, {"use_karras_sigmas": True}),
        (Sampler.DPM2_A, {"use_karras_sigmas": True}),
        (Sampler.DPM2_A, {"use_exponential_sigmas": True}),
        (Sampler.UNIPC, {"use_karras_sigmas": True}),
        (Sampler.UNIPC, {"final_sigmas_type": "sigma_min"}),
        (Sampler.UNIPC, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
        (Sampler.DPMPP_3M_SDE, {"use_exponential_sigmas": True}),
        (Sampler.DPMPP_3M_SDE, {"final_sigmas_type": "sigma_min"}),
        (Sampler.DPMPP_3M_SDE, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
        (Sampler.DPMPP_2M_SDE, {"use_karras_sigmas": True}),
    ],
)
def test_other_settings_of_a_config_are_followed(sampler: Sampler, extra: dict[str, Any]) -> None:
    _assert_equal_runs(sampler, {**BASE, "prediction_type": "v_prediction", **extra}, 12)


@pytest.mark.parametrize(
    ("sampler", "spacing", "draws"),
    [
        (Sampler.EULER_A, "leading", 8),
        (Sampler.DPMPP_2M_SDE, "leading", 8),
        (Sampler.LCM, "leading", 7),
        (Sampler.DDPM, "leading", 7),
        (Sampler.DDPM, "trailing", 8),
        (Sampler.DDIM, "leading", 0),
        (Sampler.EULER, "leading", 0),
        (Sampler.DPMPP_2M, "leading", 0),
    ],
)
def test_eight_steps_draw_as_often_as_in_diffusers(sampler: Sampler, spacing: str, draws: int) -> None:
    schedule = make_schedule({**BASE, "timestep_spacing": spacing}, sampler, 8, guidance_scale=1.0)
    assert schedule.draws.sum() == draws


# A spacing as diffusers' documentation says it: settings of its scheduler.
SPACINGS: Mapping[Spacing, dict[str, Any]] = {
    Spacing.KARRAS: {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    Spacing.EXPONENTIAL: {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    Spacing.SGM_UNIFORM: {"timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "sampler",
    [Sampler.EULER, Sampler.HEUN, Sampler.DPM2_A, Sampler.DPMPP_2M, Sampler.DPMPP_3M_SDE, Sampler.UNIPC],
)
@pytest.mark.parametrize("steps", [5, 21])
def test_a_spacing_replaces_that_of_the_config_and_matches_diffusers(
    spacing: Spacing, sampler: Sampler, steps: int
) -> None:
    config = {**BASE, "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1}
    expected, timesteps = _run_diffusers(sampler, {**config, **SPACINGS[spacing]}, steps, 4, None)

    schedule = make_schedule(config, sampler, steps, guidance_scale=1.0, spacing=spacing)

    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=1e-3)
    assert (_run_table(schedule, 4, None) - expected).abs().max() / expected.abs().max() <= 1e-4


@pytest.mark.parametrize(("spacing", "name"), [(Spacing.AYS, "StableDiffusion"), (Spacing.AYS_XL, "StableDiffusionXL")])
def test_align_your_steps_matches_the_sigmas_of_diffusers_at_ten_steps(spacing: Spacing, name: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config({**BASE, "timestep_spacing": "linspace"})
    scheduler.set_timesteps(sigmas=AysSchedules[f"{name}Sigmas"])
    expected, timesteps = _run_scheduler(scheduler, 10, 4, None)

    schedule = make_schedule(BASE, Sampler.EULER, 10, guidance_scale=1.0, spacing=spacing)

    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=1e-3)
    assert (_run_table(schedule, 4, None) - expected).abs().max() / expected.abs().max() <= 1e-4


def test_align_your_steps_is_log_linear_between_its_ten_steps() -> None:
    ten, twenty = (aligned_sigmas(Spacing.AYS, steps) for steps in (10, 20))
    np.testing.assert_allclose(twenty[::2], ten)
    np.testing.assert_allclose(twenty[1:-1:2], np.sqrt(ten[:-1] * ten[1:]))


def _incomplete_beta(x: float) -> float:
    return float(mpmath.betainc(0.6, 0.6, 0, x, regularized=True))


def test_beta_spacing_matches_diffusers_with_quantiles_of_the_beta_distribution() -> None:
    ramp = 1 - np.linspace(0, 1, 12)
    quantiles = beta_quantile(ramp)
    np.testing.assert_allclose([_incomplete_beta(x) for x in quantiles], ramp, rtol=0, atol=1e-9)
    scheduler = diffusers.EulerDiscreteScheduler.from_config({**BASE, "timestep_spacing": "linspace"})
    low, high = float(scheduler.sigmas[-2]), float(scheduler.sigmas[0])
    scheduler.set_timesteps(sigmas=[*(low + quantiles * (high - low)), 0.0])  # its use_beta_sigmas needs scipy
    expected, timesteps = _run_scheduler(scheduler, 12, 4, None)

    schedule = make_schedule(BASE, Sampler.EULER, 12, guidance_scale=1.0, spacing=Spacing.BETA)

    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=1e-3)
    assert (_run_table(schedule, 4, None) - expected).abs().max() / expected.abs().max() <= 1e-4


@pytest.mark.parametrize("spacing", [None, Spacing.KARRAS])
def test_dpmpp_2s_ancestral_follows_k_diffusion(spacing: Spacing | None) -> None:
    config = {**BASE, "prediction_type": "epsilon", "timestep_spacing": "linspace"}
    scheduler = diffusers.EulerDiscreteScheduler.from_config({**config, "use_karras_sigmas": spacing is not None})
    scheduler.set_timesteps(9)
    sigmas = scheduler.sigmas.double()
    log_sigmas = np.log(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().numpy())
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator).double() * sigmas[0]

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = float(np.interp(np.log(sigma), log_sigmas, np.arange(1000)))
        return x - sigma * _model((x / (sigma**2 + 1) ** 0.5).float(), t)

    for now, after in itertools.pairwise(sigmas):  # sample_dpmpp_2s_ancestral of k-diffusion
        denoised = denoise(x, now)
        up = torch.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = torch.sqrt(after**2 - up**2)
        if after == 0:
            x = x + (x - denoised) / now * (down - now)
            break
        t, t_next = -now.log(), -down.log()
        h = t_next - t
        middle = torch.exp(-(t + h / 2))
        x_2 = middle / now * x - torch.expm1(-h / 2) * denoised
        x = down / now * x - torch.expm1(-h) * denoise(x_2, middle)
        x = x + torch.randn(SHAPE, generator=generator) * up

    schedule = make_schedule(config, Sampler.DPMPP_2S_A, 9, guidance_scale=1.0, spacing=spacing)
    assert (_run_table(schedule, 3, None) - x).abs().max() / x.abs().max() <= 1e-4


@pytest.mark.parametrize("sampler", [Sampler.HEUN, Sampler.DPM2_A, Sampler.DPMPP_2S_A])
def test_a_step_of_two_stages_has_two_lines_and_the_last_has_one(sampler: Sampler) -> None:
    schedule = make_schedule(BASE, sampler, 4, guidance_scale=1.0)
    assert (len(schedule), schedule.steps) == (7, 4)
    assert [schedule.step_of(line) for line in range(1, 8)] == [1, 1, 2, 2, 3, 3, 4]
    assert [schedule.steps_done(lines) for lines in range(8)] == [0, 0, 1, 1, 2, 2, 3, 4]
    assert schedule.per_step(np.array([1, 2, 4, 8, 16, 32, 64])).tolist() == [3, 12, 48, 64]
    assert make_schedule(BASE, sampler, 10, guidance_scale=1.0, strength=0.45).steps == 4
    assert make_schedule(BASE, Sampler.DDIM, 4, guidance_scale=1.0).steps == 4


@pytest.mark.parametrize("sampler", [Sampler.EULER, Sampler.DDIM])
def test_cfg_pp_renoises_with_the_unconditional_prediction(sampler: Sampler) -> None:
    config = {**BASE, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    scale, steps = 0.7, 5
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    abar = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [1.0]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))

    def conditional(x: torch.Tensor, t: float) -> torch.Tensor:
        return 0.5 * _model(x, t + 90)

    expected = x.clone()
    for i, t in enumerate(scheduler.timesteps):  # algorithm 2 of arXiv 2406.08070
        uncond, cond = _model(expected, float(t)), conditional(expected, float(t))
        guided = uncond + scale * (cond - uncond)
        denoised = (expected - (1 - abar[i]) ** 0.5 * guided) / abar[i] ** 0.5
        expected = abar[i + 1] ** 0.5 * denoised + (1 - abar[i + 1]) ** 0.5 * uncond

    schedule = make_schedule(config, sampler, steps, guidance_scale=scale, guidance=Guidance.CFG_PP)
    assert schedule.guided.all()
    for line in range(steps):
        c = {name: float(values[line]) for name, values in schedule.columns.items()}
        uncond, cond = _model(x, c["t"]), conditional(x, c["t"])
        guided = uncond + c["guidance"] * (cond - uncond)
        denoised, denoised_uncond = (c["sample_to_denoised"] * x + c["model_to_denoised"] * m for m in (guided, uncond))
        x = c["sample"] * x + c["denoised"] * denoised + c["uncond"] * denoised_uncond
    assert (x - expected).abs().max() / expected.abs().max() <= 1e-4


def test_cfg_zero_star_applies_to_guided_steps() -> None:
    settings: dict[str, Any] = {"guidance_scale": 5.0, "guidance_interval": (0.3, 5.0)}
    plain = make_schedule(BASE, Sampler.EULER, 10, **settings)
    zero = make_schedule(BASE, Sampler.EULER, 10, **settings, guidance=Guidance.ZERO_STAR)

    np.testing.assert_array_equal(zero.columns["zero_star"], plain.guided.astype(np.float32))
    assert 0 < plain.guided.sum() < 10
    np.testing.assert_array_equal(plain.columns["zero_star"], 0)
    np.testing.assert_array_equal(_table(zero), _table(plain))


def test_known_pixels_have_the_noise_of_the_next_step_as_in_add_noise() -> None:
    config = {**BASE, "timestep_spacing": "leading", "steps_offset": 1}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    image, noise = _image(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    columns = make_schedule(config, Sampler.DDIM, 10, guidance_scale=7.5).columns
    for i in range(10):
        known_scale, known_sigma = (float(columns[name][i]) for name in ("known_scale", "known_sigma"))
        expected = image if i == 9 else scheduler.add_noise(image, noise, scheduler.timesteps[i + 1 : i + 2])
        torch.testing.assert_close(known_scale * image + known_sigma * noise, expected, rtol=0, atol=2e-6)


def test_guidance_applies_only_inside_its_interval() -> None:
    full = make_schedule(BASE, Sampler.EULER, 12, guidance_scale=7.5, guidance_rescale=0.7)
    part = make_schedule(
        BASE, Sampler.EULER, 12, guidance_scale=7.5, guidance_rescale=0.7, guidance_interval=(0.28, 5.42)
    )
    scheduler = diffusers.EulerDiscreteScheduler.from_config(BASE)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas[:-1].numpy()
    assert full.guided.all()
    np.testing.assert_array_equal(part.guided, (sigmas > 0.28) & (sigmas <= 5.42))
    np.testing.assert_allclose(part.columns["guidance"], np.where(part.guided, 7.5, 1.0))
    np.testing.assert_allclose(part.columns["rescale"], np.where(part.guided, np.float32(0.7), 0.0))
    np.testing.assert_array_equal(_table(part), _table(full))


def test_a_run_without_guidance_needs_no_negative_prompt() -> None:
    assert not make_schedule(BASE, Sampler.DDIM, 5, guidance_scale=1.0).guided.any()


@pytest.mark.parametrize(
    ("config", "sampler", "steps", "options", "message"),
    [
        ({"thresholding": True}, Sampler.DDIM, 5, {}, "thresholding = True"),
        ({"clip_sample": True}, Sampler.DDIM, 5, {}, "clip_sample = True"),
        ({"prediction_type": "flow_prediction"}, Sampler.DDIM, 5, {}, "prediction_type = 'flow_prediction'"),
        ({"beta_schedule": "laplace"}, Sampler.DDIM, 5, {}, "beta_schedule = 'laplace'"),
        ({"timestep_spacing": "odd"}, Sampler.DDIM, 5, {}, "timestep_spacing = 'odd'"),
        (
            {"num_train_timesteps": "1000"},
            Sampler.DDIM,
            5,
            {},
            "num_train_timesteps = '1000', which is of type str, but must be of type int",
        ),
        (
            {"beta_end": [0.02]},
            Sampler.DDIM,
            5,
            {},
            r"beta_end = \[0.02\], which is of type list, but must be of type fl",
        ),
        (
            {"trained_betas": 5},
            Sampler.DDIM,
            5,
            {},
            "trained_betas = 5, which is of type int, but must be of type list",
        ),
        ({"beta_start": -0.1}, Sampler.DDIM, 5, {}, r"beta_start = -0\.1, but betas must be from 0 to 1"),
        (
            {"trained_betas": [0.1, "0.2"]},
            Sampler.DDIM,
            5,
            {},
            r"trained_betas = '0\.2', but betas must be from 0 to 1",
        ),
        ({"trained_betas": []}, Sampler.DDIM, 5, {}, "has 0 trained_betas, but the number must be from 1 to 1000000"),
        (
            {"num_train_timesteps": 10**30},
            Sampler.DDIM,
            5,
            {},
            "num_train_timesteps = 10+, but the number must be from 1 to",
        ),
        (
            {"shift": "3"},
            Sampler.EULER,
            5,
            {"kind": ScheduleKind.FLOW},
            "shift = '3', which is of type str, but must be",
        ),
        ({"sigma_max": 5.0}, Sampler.EULER, 5, {"spacing": Spacing.KARRAS}, "sigma_max = 5.0"),
        ({}, Sampler.UNIPC, 1000, {}, "unipc in 1000 steps has no finite schedule"),
        ({}, Sampler.LCM, 5, {"spacing": Spacing.BETA}, "spacing is beta with the sampler lcm, which has its own"),
        (
            {},
            Sampler.DDIM,
            5,
            {"spacing": Spacing.AYS},
            "spacing is ays with the sampler ddim, but must be sgm-uniform",
        ),
        (
            {},
            Sampler.DPMPP_2M_KARRAS,
            5,
            {"spacing": Spacing.BETA},
            "spacing is beta with the sampler dpmpp-2m-karras, but must be karras",
        ),
        (
            {},
            Sampler.UNIPC,
            5,
            {"guidance": Guidance.CFG_PP},
            r"guidance is cfg\+\+ with the sampler unipc, but the sampler must be one of ddim, euler, euler-a",
        ),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            Sampler.DDIM,
            5,
            {},
            "zero terminal SNR",
        ),
        ({}, Sampler.DDIM, 0, {}, "steps is 0, but must be 1 to 1000"),
        ({}, Sampler.DDIM, 1001, {}, "steps is 1001,"),
        ({"steps_offset": 1, "timestep_spacing": "leading"}, Sampler.DDIM, 1000, {}, "past the last one, 999"),
        ({}, Sampler.LCM, 51, {}, "lcm allows at most 50"),
        ({}, Sampler.DDIM, 5, {"strength": 2.0}, "strength is 2, but must be more than 0 and at most 1"),
        ({}, Sampler.DDIM, 5, {"strength": 0.1}, "leaves none: use 10"),
        ({}, Sampler.DDIM, 5, {"strength": 1e-309}, "strength 1e-309 of 5 steps leaves none: use a higher strength"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    config: dict[str, Any], sampler: Sampler, steps: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_schedule({**BASE, **config}, sampler, steps, **{"guidance_scale": 7.5, **options})


@pytest.mark.parametrize("sampler", PEERS)
def test_the_config_of_each_diffusers_scheduler_maps_to_its_sampler(sampler: Sampler) -> None:
    cls, extra = PEERS[sampler]

    config = json.loads(cls.from_config({**BASE, **extra}).to_json_string())  # as diffusers saves it

    assert sampler_of(config) is sampler


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": None},
        {"_class_name": "PNDMScheduler"},
        {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
        {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"},
        {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]},
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
    ],
)
def test_a_scheduler_without_a_counterpart_maps_to_none(config: dict[str, Any]) -> None:
    assert sampler_of(config) is None


def test_dpmsolver_is_not_taken_for_dpmsolver_plus_plus() -> None:
    config = {**BASE, "prediction_type": "epsilon", "algorithm_type": "dpmsolver"}
    with pytest.raises(UsageError, match="algorithm_type = 'dpmsolver', dpmpp-2m supports dpmsolver"):
        make_schedule(config, Sampler.DPMPP_2M, 10, guidance_scale=1.0)

    assert len(make_schedule(config, Sampler.DDIM, 10, guidance_scale=1.0)) == 10


def test_a_column_that_a_graph_lacks_is_refused_by_name_if_a_step_needs_it() -> None:
    names = [name for name in STEP if name != "noise"]
    samplers = Sampler.EULER, Sampler.EULER_A, Sampler.UNIPC
    plain, noisy, unipc = (make_schedule(BASE, sampler, 4, guidance_scale=1.0) for sampler in samplers)
    names += ["guidance", "rescale", "known_scale", "known_sigma"]

    assert plain.table(names).shape == (4, 11)
    with pytest.raises(UsageError, match=r"needs the column 'noise', this bundle has .*: use another one, or export"):
        noisy.table(names)
    with pytest.raises(UsageError, match="needs the column 'previous2'"):
        unipc.table([name for name in names if name != "previous2"])
    np.testing.assert_array_equal(plain.table([*names, "uncond"])[:, -1], 0)


@pytest.mark.parametrize(
    ("timesteps", "stages", "expected"),
    [
        (1000, 4, {999: 0, 750: 0, 749: 1, 500: 1, 499: 2, 250: 2, 249: 3, 0: 3, 1000: 0, 749.5: 0, 499.2: 1, -0.1: 3}),
        (600, 4, {599: 0, 450: 0, 449: 1, 300: 1, 299: 2, 150: 2, 149: 3, 0: 3}),
        (1000, 3, {999: 0, 667: 0, 666: 0, 665: 1, 333: 1, 332: 2, 0: 2}),
        (1000, 1, {999: 0, 0: 0}),
        (10, 10, {9: 0, 8: 1, 5: 4, 0: 9}),
    ],
)
def test_stages_are_equal_parts_of_the_timesteps_from_the_noisiest(
    timesteps: int, stages: int, expected: dict[float, int]
) -> None:
    """By hand: timestep T - 1 - n is in stage floor(n stages / T), at most the last; flow's T is in the first."""
    assert {t: stage_at(t, stages, timesteps) for t in expected} == expected
