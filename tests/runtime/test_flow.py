"""Whole runs of flow matching against diffusers' schedulers, with a fixed nonlinear function in place of the model."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from oneword.engines.errors import UsageError
from oneword.runtime.flow import FlowSchedule
from oneword.runtime.samplers import Sampler, Schedule, default_sampler, make_schedule, sampler_of, samplers_for
from oneword.runtime.schedule import ScheduleKind

SHAPE = (2, 4, 6, 5)
SD3 = {"shift": 3.0}
FLUX_DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX_SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}
STEPS = [1, 2, 4, 14, 15, 28, 50]


def _model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + float(np.sin(t / 150))) - 0.2 * torch.cos(3 * x) + 0.3 * x.mean()


def _image() -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, int(np.prod(SHAPE))).reshape(SHAPE)


def _noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))


def _run_diffusers(scheduler: Any, start: int = 0, **step: Any) -> torch.Tensor:
    """The latents after the steps from `start` on, as the pipelines of SD3 and FLUX run them."""
    x = _noise()
    scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    if start:
        x = scheduler.scale_noise(_image(), timesteps[:1], x)
    for t in timesteps:
        x = scheduler.step(_model(x, float(t)), t, x, return_dict=False, **step)[0]
    return x


def _run_table(schedule: Schedule, *, edited: bool = False) -> torch.Tensor:
    """The latents of our table, in float32; `edited` starts from the picture."""
    noise = _noise()
    x = schedule.start_scale * _image() + schedule.start_sigma * noise if edited else schedule.init_scale * noise
    previous, generator = torch.zeros(SHAPE), torch.Generator().manual_seed(12)
    names = ("t", "sample_to_denoised", "model_to_denoised", "sample", "denoised", "previous", "noise")
    for line, draws in zip(schedule.table(names_of(schedule)), schedule.draws, strict=True):
        column = dict(zip(names_of(schedule), (float(value) for value in line), strict=True))
        t, a, b, c, d, e, f = (column[name] for name in names)
        denoised = a * x + b * _model(x, t)
        drawn = torch.randn(SHAPE, generator=generator) if draws else torch.zeros(SHAPE)
        x, previous = c * x + d * denoised + e * previous + f * drawn, denoised
    return x


def names_of(schedule: Schedule) -> list[str]:
    return [*schedule.columns]


def _assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(expected).all()
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("steps", STEPS)
def test_euler_of_sd3_ends_with_the_latents_of_diffusers(steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(steps)
    schedule = make_schedule(SD3, Sampler.EULER, steps, guidance_scale=1.0, kind=ScheduleKind.FLOW)

    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps, rtol=1e-6)
    _assert_close(_run_table(schedule), _run_diffusers(scheduler))


def test_the_shift_of_sd3_acts_twice_on_the_lowest_sigma() -> None:
    schedule = make_schedule(SD3, Sampler.EULER, 28, guidance_scale=1.0, kind=ScheduleKind.FLOW)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert schedule.timesteps[-1] == pytest.approx(1000 * 3 * once / (1 + 2 * once), rel=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("size", [(128, 128), (64, 96), (8, 10)])
def test_euler_of_flux_dev_shifts_by_the_size_of_the_picture(steps: int, size: tuple[int, int]) -> None:
    tokens = size[0] // 2 * (size[1] // 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLUX_DEV)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    schedule = make_schedule(
        FLUX_DEV, Sampler.EULER, steps, guidance_scale=1.0, kind=ScheduleKind.FLOW_EVEN, image_tokens=tokens
    )

    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps, rtol=1e-6)
    _assert_close(_run_table(schedule), _run_diffusers(scheduler))


@pytest.mark.parametrize("steps", STEPS)
def test_euler_of_flux_schnell_has_even_sigmas(steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLUX_SCHNELL)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps))
    schedule = make_schedule(
        FLUX_SCHNELL, Sampler.EULER, steps, guidance_scale=1.0, kind=ScheduleKind.FLOW_EVEN, image_tokens=4096
    )

    np.testing.assert_allclose(schedule.timesteps, [1000 * (steps - i) / steps for i in range(steps)], rtol=1e-6)
    _assert_close(_run_table(schedule), _run_diffusers(scheduler))


def _dpm(config: dict[str, Any], **settings: Any) -> Any:
    """Diffusers' DPM solver for a flow model, from the config of its own scheduler."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    return diffusers.DPMSolverMultistepScheduler.from_config(euler.config, **flow, **settings)


def test_the_config_of_a_dpm_solver_is_read_as_that_of_euler() -> None:
    kind = ScheduleKind.FLOW

    assert FlowSchedule.read(_dpm(SD3).config, kind, 1000) == FlowSchedule.read(SD3, kind, 1000)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("config", "kind"),
    [(SD3, ScheduleKind.FLOW), (FLUX_DEV, ScheduleKind.FLOW_EVEN), (FLUX_SCHNELL, ScheduleKind.FLOW_EVEN)],
)
def test_dpmpp_2m_ends_with_the_latents_of_diffusers(steps: int, config: dict[str, Any], kind: ScheduleKind) -> None:
    scheduler = _dpm(config)
    dynamic = config.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(steps, **({"mu": calculate_shift(1000)} if dynamic else {}))
    schedule = make_schedule(config, Sampler.DPMPP_2M, steps, guidance_scale=1.0, kind=kind, image_tokens=1000)

    sigmas = FlowSchedule.read(config, kind, image_tokens=1000).sigmas_dpm(steps)
    np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps)
    _assert_close(_run_table(schedule), _run_diffusers(scheduler))


@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_sde_ends_with_the_latents_of_diffusers(steps: int) -> None:
    scheduler = _dpm(SD3, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(steps)
    schedule = make_schedule(SD3, Sampler.DPMPP_2M_SDE, steps, guidance_scale=1.0, kind=ScheduleKind.FLOW)

    generator = torch.Generator().manual_seed(12)
    _assert_close(_run_table(schedule), _run_diffusers(scheduler, generator=generator))


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.66, 0.99])
@pytest.mark.parametrize("steps", [10, 28])
def test_image_to_image_starts_and_ends_as_in_diffusers(strength: float, steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(steps)
    # StableDiffusion3Img2ImgPipeline.get_timesteps, which reads only the scheduler
    start = int(max(steps - min(steps * strength, steps), 0))
    schedule = make_schedule(SD3, Sampler.EULER, steps, guidance_scale=1.0, kind=ScheduleKind.FLOW, strength=strength)

    assert len(schedule) == steps - start
    _assert_close(_run_table(schedule, edited=True), _run_diffusers(scheduler, start))


def test_known_pixels_have_the_noise_of_the_next_step_as_in_scale_noise() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(0)
    columns = make_schedule(SD3, Sampler.EULER, 10, guidance_scale=1.0, kind=ScheduleKind.FLOW).columns
    image, noise = _image(), _noise()
    for i, t in enumerate(scheduler.timesteps):
        scheduler.step(noise, t, noise)  # moves on to the next sigma
        expected = image if i == 9 else scheduler.scale_noise(image, scheduler.timesteps[i + 1 : i + 2], noise)
        known_scale, known_sigma = (float(columns[name][i]) for name in ("known_scale", "known_sigma"))
        torch.testing.assert_close(known_scale * image + known_sigma * noise, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, Sampler.EULER),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, Sampler.DPMPP_2M),
        ({"_class_name": "DPMSolverSinglestepScheduler", "use_flow_sigmas": True}, Sampler.EULER),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, Sampler.EULER),
    ],
)
def test_the_default_sampler_of_a_flow_model_suits_flow_matching(config: dict[str, Any], sampler: Sampler) -> None:
    assert default_sampler(config, ScheduleKind.FLOW) is sampler


def test_guidance_includes_the_first_step_without_an_upper_bound() -> None:
    for high, first in ((np.inf, True), (1e9, False)):
        schedule = make_schedule(
            SD3, Sampler.EULER, 10, guidance_scale=5.0, kind=ScheduleKind.FLOW, guidance_interval=(0, high)
        )
        assert schedule.guided.tolist() == [first, *[True] * 9]


def test_embedded_guidance_is_a_column_of_every_step() -> None:
    schedule = make_schedule(
        FLUX_DEV, Sampler.EULER, 4, guidance_scale=1.0, kind=ScheduleKind.FLOW_EVEN, embedded_guidance=3.5
    )
    np.testing.assert_array_equal(schedule.columns["embedded_guidance"], [3.5] * 4)
    with pytest.raises(UsageError, match="needs the column 'embedded_guidance'"):
        schedule.table([name for name in schedule.columns if name != "embedded_guidance"])


@pytest.mark.parametrize(
    ("change", "sampler", "steps", "message"),
    [
        ({"time_shift_type": "linear"}, Sampler.EULER, 5, "time_shift_type = 'linear', supported are: 'exponential'"),
        ({"shift_terminal": 0.02}, Sampler.EULER, 5, "shift_terminal = 0.02"),
        ({"stochastic_sampling": True}, Sampler.EULER, 5, "stochastic_sampling = True"),
        ({"use_karras_sigmas": True}, Sampler.DPMPP_2M, 5, "use_karras_sigmas = True"),
        ({"base_image_seq_len": 4096}, Sampler.EULER, 5, "equal base_image_seq_len and max_image_seq_len"),
        (
            {},
            Sampler.DDIM,
            5,
            "the sampler ddim does not suit flow matching: it must be one of euler, dpmpp-2m, ",
        ),
        ({}, Sampler.EULER, 1001, "steps is 1001, but must be 1 to 1000"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    change: dict[str, Any], sampler: Sampler, steps: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_schedule({**SD3, **change}, sampler, steps, guidance_scale=1.0, kind=ScheduleKind.FLOW)


def test_every_sampler_that_is_offered_for_a_kind_of_schedule_makes_one() -> None:
    assert samplers_for(ScheduleKind.BETAS) == tuple(Sampler)
    assert samplers_for(ScheduleKind.FLOW) == (Sampler.EULER, Sampler.DPMPP_2M, Sampler.DPMPP_2M_SDE)
    for sampler in samplers_for(ScheduleKind.FLOW_EVEN):
        schedule = make_schedule(FLUX_SCHNELL, sampler, 4, guidance_scale=1.0, kind=ScheduleKind.FLOW_EVEN)
        assert len(schedule) == 4


def test_the_config_of_a_flow_scheduler_maps_to_its_sampler() -> None:
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    assert sampler_of({**euler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}) is Sampler.EULER


@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4300, 4301, 9216])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_sigmas_of_flux_2_are_those_of_diffusers(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    config = {"use_dynamic_shifting": True, "shift": 3.0}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))

    noise = FlowSchedule.read(config, ScheduleKind.FLOW_EMPIRICAL, tokens)

    np.testing.assert_allclose(noise.sigmas(steps), scheduler.sigmas[:-1].numpy(), rtol=1e-5)
