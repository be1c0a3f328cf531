"""Whole runs of our tables against diffusers' schedulers, with a fixed nonlinear function in place of the model."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.runtime.samplers import Sampler, Schedule, make_schedule, sampler_of

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
}


def _model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + float(np.sin(t / 150))) - 0.2 * torch.cos(3 * x) + 0.3 * x.mean()


def _run_diffusers(
    sampler: Sampler, config: dict[str, Any], steps: int, seed: int, strength: float | None, **step: Any
) -> tuple[torch.Tensor, list[float]]:
    """The latents of diffusers' scheduler, text to image or image to image, and its timesteps."""
    cls, extra = PEERS[sampler]
    scheduler = cls.from_config({**config, **extra})
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if strength is None:
        x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    else:
        start = max(len(timesteps) - min(int(len(timesteps) * strength), len(timesteps)), 0)
        timesteps = timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x = scheduler.add_noise(_image(), torch.randn(SHAPE, generator=generator), timesteps[:1])
    for t in timesteps:
        m = _model(scheduler.scale_model_input(x, t), float(t))
        drawn = {} if sampler in (Sampler.EULER,) else {"generator": generator}
        x = scheduler.step(m, t, x, return_dict=False, **drawn, **step)[0]
    return x, [float(t) for t in timesteps]


def _image() -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, int(np.prod(SHAPE))).reshape(SHAPE)


STEP = ("t", "sample_to_denoised", "model_to_denoised", "sample", "denoised", "previous", "noise")


def _table(schedule: Schedule) -> npt.NDArray[np.float32]:
    """The columns of STEP [S, 7]."""
    return np.stack([schedule.columns[name] for name in STEP], 1)


def _run_table(schedule: Schedule, seed: int, strength: float | None) -> torch.Tensor:
    """The latents of our table, in float32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SHAPE, generator=generator)
    x = schedule.init_scale * noise
    if strength is not None:
        x = schedule.start_scale * _image() + schedule.start_sigma * noise
    previous = torch.zeros(SHAPE)
    for line, draws in zip(_table(schedule), schedule.draws, strict=True):
        t, a, b, c, d, e, f = (float(value) for value in line)
        denoised = a * x + b * _model(x, t)
        drawn = torch.randn(SHAPE, generator=generator) if draws else torch.zeros(SHAPE)
        x, previous = c * x + d * denoised + e * previous + f * drawn, denoised
    return x


def _assert_equal_runs(
    sampler: Sampler, config: dict[str, Any], steps: int, strength: float | None = None, eta: float = 0.0
) -> None:
    step = {"eta": eta} if eta else {}
    expected, timesteps = _run_diffusers(sampler, config, steps, 11, strength, **step)
    schedule = make_schedule(config, sampler, steps, guidance_scale=1.0, eta=eta, strength=strength or 1.0)
    assert torch.isfinite(expected).all()
    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=0, atol=1e-3)
    difference = (_run_table(schedule, 11, strength) - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-4


CASES = [
    case
    for case in itertools.product(
        Sampler, ("epsilon", "v_prediction", "sample"), ("leading", "linspace", "trailing"), (8, 20)
    )
    if case[:2] != (Sampler.EULER_A, "sample")  # diffusers has none
]


@pytest.mark.parametrize(("sampler", "prediction", "spacing", "steps"), CASES)
def test_a_run_ends_with_the_latents_of_diffusers(sampler: Sampler, prediction: str, spacing: str, steps: int) -> None:
    config = {**BASE, "prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 1}
    _assert_equal_runs(sampler, config, steps)


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_image_to_image_starts_and_ends_as_in_diffusers(sampler: Sampler, spacing: str) -> None:
    config = {**BASE, "prediction_type": "v_prediction", "timestep_spacing": spacing, "steps_offset": 1}
    for strength in (0.3, 0.65, 1.0):
        _assert_equal_runs(sampler, config, 20, strength)


@pytest.mark.parametrize("sampler", [Sampler.DPMPP_2M, Sampler.DPMPP_2M_KARRAS, Sampler.DPMPP_2M_SDE])
@pytest.mark.parametrize("strength", [0.65, 0.8])
def test_the_order_of_the_last_step_depends_on_the_steps_of_the_whole_run(sampler: Sampler, strength: float) -> None:
    config = {**BASE, "prediction_type": "epsilon", "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    _assert_equal_runs(sampler, config, 20, strength)  # 13 or 16 of 20 steps, and 15 is where the order changes


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_zero_terminal_snr_matches_diffusers(sampler: Sampler, spacing: str) -> None:
    config = {**BASE, "prediction_type": "v_prediction", "timestep_spacing": spacing, "rescale_betas_zero_snr": True}
    _assert_equal_runs(sampler, config, 10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_with_any_eta_and_final_alpha_matches_diffusers(eta: float, set_alpha_to_one: bool, steps: int) -> None:
    config = {**BASE, "prediction_type": "epsilon", "set_alpha_to_one": set_alpha_to_one, "steps_offset": 1}
    _assert_equal_runs(Sampler.DDIM, config, steps, eta=eta)
    _assert_equal_runs(Sampler.DDIM, config, steps, eta=0.0)


@pytest.mark.parametrize("sampler", Sampler)
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
        ({"solver_order": 3}, Sampler.DPMPP_2M, 5, {}, "solver_order = 3"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            Sampler.DDIM,
            5,
            {},
            "zero terminal SNR",
        ),
        ({}, Sampler.DDIM, 0, {}, "0 steps, allowed are 1 to 1000"),
        ({}, Sampler.DDIM, 1001, {}, "1001 steps"),
        ({"steps_offset": 1, "timestep_spacing": "leading"}, Sampler.DDIM, 1000, {}, "past the last one, 999"),
        ({}, Sampler.LCM, 51, {}, "lcm allows at most 50"),
        ({}, Sampler.DDIM, 5, {"strength": 2.0}, "strength 2, allowed"),
        ({}, Sampler.DDIM, 5, {"strength": 0.1}, "leaves none: use 10"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    config: dict[str, Any], sampler: Sampler, steps: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_schedule({**BASE, **config}, sampler, steps, **{"guidance_scale": 7.5, **options})


@pytest.mark.parametrize("sampler", Sampler)
def test_the_config_of_each_diffusers_scheduler_maps_to_its_sampler(sampler: Sampler) -> None:
    cls, extra = PEERS[sampler]

    config = json.loads(cls.from_config({**BASE, **extra}).to_json_string())  # as diffusers saves it

    assert sampler_of(config) is sampler


@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", None])
def test_a_scheduler_without_a_counterpart_maps_to_none(name: str | None) -> None:
    assert sampler_of({"_class_name": name}) is None


def test_dpmsolver_is_not_taken_for_dpmsolver_plus_plus() -> None:
    config = {**BASE, "prediction_type": "epsilon", "algorithm_type": "dpmsolver"}
    with pytest.raises(UsageError, match="algorithm_type = 'dpmsolver', dpmpp-2m supports dpmsolver"):
        make_schedule(config, Sampler.DPMPP_2M, 10, guidance_scale=1.0)

    assert len(make_schedule(config, Sampler.DDIM, 10, guidance_scale=1.0)) == 10


def test_a_column_that_a_graph_lacks_is_refused_by_name_if_a_step_needs_it() -> None:
    names = [name for name in STEP if name != "noise"]
    plain, noisy = (make_schedule(BASE, sampler, 4, guidance_scale=1.0) for sampler in (Sampler.EULER, Sampler.EULER_A))
    names += ["guidance", "rescale", "known_scale", "known_sigma"]

    assert plain.table(names).shape == (4, 10)
    with pytest.raises(UsageError, match="this sampler needs the column 'noise'"):
        noisy.table(names)
    np.testing.assert_array_equal(plain.table([*names, "previous2"])[:, -1], 0)
