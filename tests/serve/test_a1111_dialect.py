"""The pure translation between A1111's API and the runtime, by values computed by hand."""

import base64
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest

from oneword.engines.errors import UsageError
from oneword.runtime.bundle import Bundle, Manifest
from oneword.runtime.events import PictureDone
from oneword.runtime.samplers import Sampler
from oneword.runtime.spacing import Spacing
from oneword.serve.a1111.answers import encoded, info, parsed_parameters, pictures_answer, progress_of
from oneword.serve.a1111.dialect import (
    ModelNames,
    Plan,
    checked_options,
    image_to_image,
    options,
    sampler_of,
    text_to_image,
)
from oneword.serve.a1111.schemas import ImageToImage, TextToImage
from oneword.serve.errors import ApiError, NotFound, Unprocessable

WEBUIAPI = {
    "enable_hr": False,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "denoising_strength": 0.7,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "prompt": "a red ring",
    "styles": [],
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 20,
    "cfg_scale": 7.0,
    "width": 64,
    "height": 96,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "negative_prompt": "",
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "sampler_index": "Euler a",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
}
"""What webuiapi 0.9.17 sends for txt2img(prompt="a red ring", width=64, height=96)."""
PAINTED = np.arange(64 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 64, 3)
MASK = np.zeros((96, 64), np.bool_)
MASK[40:56, 20:44] = True


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


def txt2img(manifest: Manifest, **fields: Any) -> Plan:
    return text_to_image(TextToImage(**WEBUIAPI | fields), manifest, 1234)


def img2img(manifest: Manifest, mask: np.ndarray[Any, Any] | None = None, **fields: Any) -> Plan:
    return image_to_image(ImageToImage(**WEBUIAPI | fields), manifest, 1234, PAINTED, mask)


def done(plan: Plan, index: int = 0) -> PictureDone:
    settings = plan.settings
    image = np.full((settings.height, settings.width, 3), 50, np.uint8)
    return PictureDone(0, index, plan.request.seed + index, image, plan.request, settings, "tiny")


def test_what_webuiapi_always_sends_is_a_plain_request(manifest: Manifest) -> None:
    plan = txt2img(manifest)

    request = plan.request
    assert len(WEBUIAPI) == 47
    assert (request.prompt, request.negative_prompt, request.num_images) == ("a red ring", None, 1)
    assert (request.sampler, request.steps, request.guidance_scale) == (Sampler.EULER_A, 20, 7.0)
    assert (request.size, request.seed, request.eta, request.clip_skip) == ((64, 96), 1234, 0, 0)
    assert request.image is None
    assert plan.format == "png"


def test_what_is_left_out_is_the_models_default(manifest: Manifest) -> None:
    plan = text_to_image(TextToImage(), manifest, 5)

    request, defaults = plan.request, manifest.defaults
    assert (request.prompt, request.steps, request.guidance_scale, request.sampler) == ("", None, None, None)
    assert (plan.settings.width, plan.settings.height) == (defaults.width, defaults.height)
    assert text_to_image(TextToImage(width=128), manifest, 5).request.size == (128, defaults.height)


def test_null_counts_as_left_out(manifest: Manifest) -> None:
    empty = text_to_image(TextToImage(**dict.fromkeys(TextToImage.model_fields)), manifest, 5)

    assert empty.request.size is None
    assert empty.request.num_images == 1


@pytest.mark.parametrize(
    ("name", "scheduler", "sampler"),
    [
        ("Euler", "automatic", Sampler.EULER),
        ("Euler a", None, Sampler.EULER_A),
        ("euler a", "Automatic", Sampler.EULER_A),
        ("k_euler_a", "automatic", Sampler.EULER_A),
        ("k_euler", "", Sampler.EULER),
        ("euler_ancestral", "normal", Sampler.EULER_A),
        ("DPM++ 2M", "automatic", Sampler.DPMPP_2M),
        ("DPM++ 2M", "karras", Sampler.DPMPP_2M_KARRAS),
        ("DPM++ 2M", "Karras", Sampler.DPMPP_2M_KARRAS),
        ("k_dpmpp_2m", "karras", Sampler.DPMPP_2M_KARRAS),
        ("DPM++ 2M Karras", "automatic", Sampler.DPMPP_2M_KARRAS),
        ("DPM++ 2M Karras", "karras", Sampler.DPMPP_2M_KARRAS),
        ("k_dpmpp_2m_ka", "automatic", Sampler.DPMPP_2M_KARRAS),
        ("DPM++ 2M SDE", "automatic", Sampler.DPMPP_2M_SDE),
        ("DDIM", "uniform", Sampler.DDIM),
        ("DDPM", "automatic", Sampler.DDPM),
        ("LCM", "automatic", Sampler.LCM),
        ("euler-a", "automatic", Sampler.EULER_A),
        (None, "automatic", None),
        ("", None, None),
    ],
)
def test_samplers_and_schedules_have_a1111s_names(
    manifest: Manifest, name: str | None, scheduler: str | None, sampler: Sampler | None
) -> None:
    assert sampler_of(name, scheduler, manifest) == (sampler, None)


@pytest.mark.parametrize(
    ("name", "scheduler", "sampler", "spacing"),
    [
        ("Euler", "karras", Sampler.EULER, Spacing.KARRAS),
        ("Euler a", "SGM Uniform", Sampler.EULER_A, Spacing.SGM_UNIFORM),
        ("Heun", "exponential", Sampler.HEUN, Spacing.EXPONENTIAL),
        ("DPM2 a", "sgm_uniform", Sampler.DPM2_A, Spacing.SGM_UNIFORM),
        ("DPM++ 2S a", "Karras", Sampler.DPMPP_2S_A, Spacing.KARRAS),
        ("DPM++ 3M SDE", "Exponential", Sampler.DPMPP_3M_SDE, Spacing.EXPONENTIAL),
        ("UniPC", "beta", Sampler.UNIPC, Spacing.BETA),
        ("DPM++ 2M", "Align Your Steps", Sampler.DPMPP_2M, Spacing.AYS),
        (None, "sgm_uniform", None, Spacing.SGM_UNIFORM),
        ("DPM++ 2M SDE Karras", None, Sampler.DPMPP_2M_SDE, Spacing.KARRAS),
        ("DPM++ 3M SDE Exponential", "Automatic", Sampler.DPMPP_3M_SDE, Spacing.EXPONENTIAL),
        ("DPM2 a Karras", "beta", Sampler.DPM2_A, Spacing.BETA),
        ("Euler a SGM Uniform", "automatic", Sampler.EULER_A, Spacing.SGM_UNIFORM),
        ("Euler", "simple", Sampler.EULER, Spacing.SGM_UNIFORM),
        ("DDIM", "sgm_uniform", Sampler.DDIM, Spacing.SGM_UNIFORM),
        ("DDIM", "karras", Sampler.DDIM, None),
    ],
)
def test_a_scheduler_is_a_spacing(
    manifest: Manifest, name: str | None, scheduler: str | None, sampler: Sampler | None, spacing: Spacing | None
) -> None:
    plan = txt2img(manifest, sampler_name=name, sampler_index=None, scheduler=scheduler)
    assert (plan.request.sampler, plan.request.spacing) == (sampler, spacing)


def test_align_your_steps_has_other_levels_for_sdxl(manifest: Manifest) -> None:
    conditioning = msgspec.structs.replace(manifest.conditioning, time_ids=("original_height",))
    xl = msgspec.structs.replace(manifest, conditioning=conditioning)
    assert sampler_of("Euler", "align_your_steps", xl) == (Sampler.EULER, Spacing.AYS_XL)


def test_an_unknown_sampler_is_404_and_a_schedule_that_is_not_there_422(manifest: Manifest) -> None:
    for name in ("LMS", "LMS Karras", "Karras"):
        expected = rf"Sampler not found: '{name}' is not one of DDIM, DDPM, Euler, Euler a, DP"
        with pytest.raises(NotFound, match=expected):
            txt2img(manifest, sampler_name=name)
    with pytest.raises(
        Unprocessable, match=r"scheduler is 'polyexponential', but must be one of automatic, uniform, normal, "
    ):
        txt2img(manifest, scheduler="polyexponential")
    with pytest.raises(Unprocessable, match=r"scheduler is 'karras' with the sampler LCM, but must be automatic$"):
        txt2img(manifest, sampler_name="LCM", scheduler="karras")


def test_sampler_name_goes_before_sampler_index(manifest: Manifest) -> None:
    assert txt2img(manifest, sampler_name="LCM", sampler_index="DDIM").request.sampler is Sampler.LCM
    assert txt2img(manifest, sampler_name=None, sampler_index="DDIM").request.sampler is Sampler.DDIM


def test_a_karras_schedule_needs_no_name_where_the_model_has_that_sampler(manifest: Manifest) -> None:
    dpmpp = msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, sampler="dpmpp-2m"))

    assert sampler_of(None, "karras", dpmpp) == (Sampler.DPMPP_2M_KARRAS, None)


def test_batches_are_pictures_with_consecutive_seeds(manifest: Manifest) -> None:
    plan = txt2img(manifest, seed=40, n_iter=2, batch_size=3)

    assert (plan.request.seed, plan.request.num_images) == (40, 6)
    answer = info(TextToImage(batch_size=3), plan, [done(plan, i) for i in range(6)], manifest, "v")
    assert answer["all_seeds"] == [40, 41, 42, 43, 44, 45]
    assert answer["all_prompts"] == ["a red ring"] * 6
    assert (answer["seed"], answer["batch_size"]) == (40, 3)


@pytest.mark.parametrize(
    ("fields", "eta"),
    [
        ({"sampler_name": "Euler a", "eta": 1.0}, 0),
        ({"sampler_name": "Euler a", "eta": None}, 0),
        ({"sampler_name": "DDIM", "eta": 0.5}, 0.5),
        ({"sampler_name": "DDIM", "eta": 1.0}, 1.0),
        ({"sampler_name": "DDIM", "eta": None}, 0),
        ({"sampler_name": "DPM++ 2M", "eta": 0.3}, 0),
        ({"sampler_name": "DPM++ 2M SDE", "eta": 1}, 0),
    ],
)
def test_eta_is_passed_on_to_ddim_only(manifest: Manifest, fields: dict[str, Any], eta: float) -> None:
    assert txt2img(manifest, **fields).request.eta == eta


def test_eta_0_takes_the_noise_out_of_an_ancestral_sampler(manifest: Manifest) -> None:
    assert txt2img(manifest, sampler_name="Euler a", eta=0).request.sampler is Sampler.EULER
    plan = txt2img(manifest, sampler_name="DPM++ 2M SDE", scheduler="exponential", eta=0)
    assert (plan.request.sampler, plan.request.spacing) == (Sampler.DPMPP_2M, Spacing.EXPONENTIAL)


def test_clip_skip_counts_from_one(manifest: Manifest) -> None:
    plan = txt2img(manifest, override_settings={"CLIP_stop_at_last_layers": 2})

    assert plan.request.clip_skip == 1
    assert info(TextToImage(), plan, [], manifest, "v")["clip_skip"] == 2
    assert txt2img(manifest, clip_skip=2).request.clip_skip == 1
    assert txt2img(manifest, override_settings={"CLIP_stop_at_last_layers": 1}).request.clip_skip == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_hr": True}, "enable_hr is true, but this server does not do the high-resolution fix: leave it out"),
        ({"restore_faces": True}, "restore_faces is true, but"),
        ({"tiling": True}, "tiling is true, but this server does not do tiling"),
        ({"styles": ["comic"]}, "styles is set, but this server does not do prompt styles"),
        ({"subseed_strength": 0.3}, "subseed_strength is 0.3, but this server does not do variation seeds"),
        ({"script_name": "xyz plot"}, "script_name is set, but this server does not do scripts"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}}, "alwayson_scripts is set, but"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"enabled": True}]}}}, "alwayson_scripts is set, but"),
        (
            {"alwayson_scripts": {"enabled": False, "x": {"enabled": False, "args": [1]}}},
            "alwayson_scripts is set, but",
        ),
        ({"alwayson_scripts": {"x": [[[[[[[[[[[]]]]]]]]]]]}}, "alwayson_scripts is set, but"),
        ({"refiner_checkpoint": "xl_refiner"}, "refiner_checkpoint is set, but this server does not do a refiner"),
        ({"s_churn": 2}, "s_churn is 2.0, but"),
        ({"s_noise": 1.1}, "s_noise is 1.1, this server allows 1 only"),
        ({"infotext": "a cat\nSteps: 20"}, "infotext is set, but"),
        ({"seed_resize_from_w": 64, "seed_resize_from_h": 64}, "seed_resize_from_w and _h are not supported"),
        ({"eta": 0.5}, "eta is 0.5 with the sampler Euler a, but must be 0 or 1: leave it out"),
        ({"sampler_name": "DPM2 a", "eta": 0}, "eta is 0 with the sampler DPM2 a, but must be 1: leave it out"),
        ({"seed": -2}, "seed is -2, but must be -1"),
        ({"n_iter": 101}, "n_iter x batch_size is 101, but at most 100 pictures are allowed"),
        ({"n_iter": 2, "batch_size": 51}, "n_iter x batch_size is 102, but at most 100 pictures are allowed"),
        ({"negative_promt": "blurry"}, "'negative_promt' is not a field of this request: did you mean 'negative_pr"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "the setting 'eta_noise_seed_delta' cannot be"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 0}},
            "CLIP_stop_at_last_layers is '0', but must be a whole number from 1 to 100",
        ),
        ({"override_settings": {"CLIP_stop_at_last_layers": "2"}}, "CLIP_stop_at_last_layers is '2', but must be a"),
        (
            {"override_settings": {"samples_format": "gif"}},
            "samples_format is 'gif', but must be one of png, jpg, jpeg, webp",
        ),
    ],
)
def test_what_this_server_does_not_do_is_refused_by_name(
    manifest: Manifest, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        txt2img(manifest, **fields)

    assert caught.value.status == 422
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [  # A1111's defaults are from its modules/shared_options.py
        ("ddim_discretize", "quad", "is 'quad', this server allows 'uniform' only"),
        ("eta_ancestral", 0.0, "is 0.0, this server allows 1.0 only"),
        ("eta_ancestral", 0.5, "is 0.5, this server allows 1.0 only"),
        ("initial_noise_multiplier", 0, "is 0, this server allows 1.0 only"),
        ("inpainting_mask_weight", 0.0, "is 0.0, this server allows 1.0 only"),
        ("s_noise", 0, "is 0, this server allows 1.0 only"),
        ("enable_emphasis", False, "is false, this server allows true only"),
        ("comma_padding_backtrack", 0, "is 0, this server allows 20 only"),
        ("emphasis", "No norm", "is 'No norm', this server allows 'Original' only"),
        ("emphasis", "None", "is 'None', this server allows 'Original' only"),
        ("randn_source", "NV", "is 'NV', this server allows 'GPU' only"),
        ("uni_pc_order", 2, "is 2, this server allows 3 only"),
        ("uni_pc_lower_order_final", False, "is false, this server allows true only"),
        ("jpeg_quality", 100, "is 100, this server allows 80 only"),
        ("enable_pnginfo", False, "is false, this server allows true only"),
        ("overlay_inpaint", False, "is false, this server allows true only"),
        ("sd_vae_decode_method", "TAESD", "is 'TAESD', this server allows 'Full' only"),
        ("sd_vae", "other.pt", "is 'other.pt', this server allows 'Automatic' only"),
        ("sd_vae", [], "is '[]', this server allows 'Automatic' only"),
    ],
)
def test_a_setting_is_refused_at_another_value_than_this_servers_or_a1111s_default(
    manifest: Manifest, name: str, value: object, message: str
) -> None:
    with pytest.raises(Unprocessable) as caught:
        txt2img(manifest, override_settings={name: value})

    assert caught.value.message == f"{name} {message}: leave it out"


@pytest.mark.parametrize(
    "fields",
    [
        {"alwayson_scripts": {"ControlNet": {"args": []}, "ADetailer": {"args": [False]}}},
        {"alwayson_scripts": {"controlnet": {"args": [{"enabled": False, "model": "canny", "weight": 1}]}}},
        {"override_settings": {"randn_source": "CPU"}},  # as it is here
        {"refiner_checkpoint": "None", "refiner_switch_at": 0.8},
        {"refiner_checkpoint": "", "script_name": "", "script_args": [1, 2]},
        {"subseed": 5, "seed_resize_from_w": -1, "seed_resize_from_h": -1},
        {"save_images": True, "comments": {"by": "me"}, "s_min_uncond": 0.0},
        {"hr_scale": 4, "hr_upscaler": "ESRGAN", "hr_prompt": "a cat"},
        {"use_deprecated_controlnet": False, "distilled_cfg_scale": 3.5, "sampler": "Euler a"},
        {"hr_cfg_scale": 3.5, "hr_denoising_strength": 0.7, "config_scale": 7.0},
        {"override_settings": {"sd_vae": "Automatic", "forge_additional_modules": [], "samples_save": False}},
        {"override_settings": {"sd_vae": "None", "eta_ancestral": 1, "s_noise": 1.0, "eta_ddim": 0.0}},
        {
            "override_settings": {  # A1111's defaults
                "emphasis": "Original",
                "randn_source": "GPU",
                "uni_pc_variant": "bh1",
                "uni_pc_skip_type": "time_uniform",
                "uni_pc_order": 3,
                "uni_pc_lower_order_final": True,
                "sd_noise_schedule": "Default",
                "beta_dist_alpha": 0.6,
                "sd_unet": "Automatic",
                "sd_vae_encode_method": "Full",
                "enable_batch_seeds": True,
                "img2img_background_color": "#ffffff",
                "overlay_inpaint": True,
                "fp8_storage": "Disable",
                "enable_pnginfo": True,
                "return_grid": True,
                "jpeg_quality": 80,
                "hires_fix_refiner_pass": "second pass",
                "sdxl_refiner_low_aesthetic_score": 2.5,
                "face_restoration_model": "CodeFormer",
            }
        },
        {
            "override_settings": {  # of display, saving and speed
                "live_previews_enable": False,
                "show_progress_every_n_steps": 0,
                "live_preview_content": "Negative prompt",
                "return_grid": False,
                "samples_filename_pattern": "[seed]",
                "samples_save": True,
                "save_images_add_number": True,
                "grid_format": "webp",
                "outdir_samples": "pictures",
                "add_model_name_to_info": False,
                "cross_attention_optimization": "Doggettx",
                "batch_cond_uncond": True,
                "sd_checkpoints_limit": 2,
                "notification_volume": 50,
                "ESRGAN_tile": 256,
            }
        },
        {
            "override_settings": {  # KoboldAI Lite's
                "eta_noise_seed_delta": 0.0,
                "CLIP_stop_at_last_layers": 1.0,
                "ddim_discretize": "uniform",
                "img2img_fix_steps": False,
                "sd_hypernetwork": "None",
                "inpainting_mask_weight": 1.0,
                "initial_noise_multiplier": 1.0,
                "comma_padding_backtrack": 20.0,
            }
        },
    ],
)
def test_keys_that_request_nothing_are_accepted(manifest: Manifest, fields: dict[str, Any]) -> None:
    assert done(txt2img(manifest, **fields)).parameters == done(txt2img(manifest)).parameters


def test_the_model_is_named_by_its_title_name_or_hash_and_no_other_exists(manifest: Manifest) -> None:
    model, current = ModelNames.of(manifest.source), options(manifest)
    assert model.title == f"{model.name} [{manifest.source.digest[:10]}]"

    for name in (model.title, model.name, model.hash, model.sha256, "", None):
        assert checked_options({"sd_model_checkpoint": name}, current, model) == {}
    with pytest.raises(NotFound, match="this server has no model 'sdxl', only"):
        txt2img(manifest, override_settings={"sd_model_checkpoint": "sdxl"})


def test_the_options_can_be_sent_back_as_they_are(manifest: Manifest) -> None:
    current = options(manifest)

    assert checked_options(json.loads(json.dumps(current)), current, ModelNames.of(manifest.source)) == {}
    assert checked_options({"samples_format": "JPG"}, current, ModelNames.of(manifest.source)) == {
        "samples_format": "jpg"
    }


def test_a_picture_is_edited_at_the_requested_size(manifest: Manifest) -> None:
    plan = img2img(manifest, width=64, height=64, denoising_strength=0.4)

    request = plan.request
    assert request.image is PAINTED  # stretched by the runtime
    assert (request.size, request.strength, request.mask) == ((64, 64), 0.4, None)
    assert plan.crop is None
    assert img2img(manifest, width=None, height=None).request.size == (64, 96)
    assert img2img(manifest, denoising_strength=None).request.strength == 0.75


def test_cropping_and_filling_happen_before_the_edit(manifest: Manifest) -> None:
    cropped = img2img(manifest, resize_mode=1, width=64, height=64).request.image
    filled = img2img(manifest, resize_mode=2, width=128, height=96).request.image

    assert cropped is not None
    assert filled is not None
    np.testing.assert_array_equal(cropped, PAINTED[16:80])
    np.testing.assert_array_equal(filled[:, 32:96], PAINTED)
    with pytest.raises(Unprocessable, match=r"resize_mode is 3, but must be 0 \(stretch\), 1 \(crop\) or 2 \(fill\)"):
        img2img(manifest, resize_mode=3)


def test_inpainting_the_whole_picture_softens_the_paste_mask_only(manifest: Manifest) -> None:
    plan = img2img(manifest, MASK, inpaint_full_res=False, mask_blur=4, inpainting_fill=1)

    request = plan.request
    assert request.image is PAINTED
    assert request.mask is not None
    assert request.mask.dtype == np.bool_
    np.testing.assert_array_equal(request.mask, MASK)
    assert (request.mask_blur, request.paste, plan.crop) == (4, True, None)


def test_inpainting_starts_from_the_colours_around_the_mask_or_from_the_picture(manifest: Manifest) -> None:
    original, filled = (
        img2img(manifest, MASK, inpaint_full_res=False, inpainting_fill=fill).request.image for fill in (1, 0)
    )

    assert original is PAINTED
    assert filled is not None
    np.testing.assert_array_equal(filled[~MASK], PAINTED[~MASK])
    assert (filled[MASK] != PAINTED[MASK]).any()


@pytest.mark.parametrize("fields", [{}, {"inpainting_fill": None}, {"inpainting_fill": 0}])
def test_inpainting_fill_is_0_if_it_is_left_out_as_in_a1111(manifest: Manifest, fields: dict[str, Any]) -> None:
    """`inpainting_fill: int = 0` in A1111's StableDiffusionProcessingImg2Img, where its API takes its defaults from."""
    picture = np.full_like(PAINTED, (10, 120, 250))
    picture[MASK] = 0

    body = ImageToImage(**WEBUIAPI | {"inpaint_full_res": False} | fields)
    image = image_to_image(body, manifest, 1234, picture, MASK).request.image

    assert image is not None
    np.testing.assert_allclose(image.astype(int), np.full_like(PAINTED, (10, 120, 250)), rtol=0, atol=2)  # blurs round


def test_an_inverted_mask_regenerates_the_rest(manifest: Manifest) -> None:
    request = img2img(manifest, MASK, inpaint_full_res=False, inpainting_mask_invert=1).request

    assert request.mask is not None
    np.testing.assert_array_equal(request.mask, ~MASK)


def test_inpainting_at_full_resolution_regenerates_a_crop_and_pastes_it_back(manifest: Manifest) -> None:
    plan = img2img(manifest, MASK, mask_blur=0, inpaint_full_res_padding=4, width=64, height=64)

    # The mask is 24x16 at (20, 40); with padding 32x24; as a square 32x32.
    crop = plan.crop
    assert crop is not None
    assert (crop.left, crop.top, crop.right, crop.bottom) == (16, 32, 48, 64)
    request = plan.request
    assert request.image is not None
    assert request.mask is not None
    assert request.image.shape == (64, 64, 3)
    assert (request.size, request.paste) == ((64, 64), False)
    white = np.zeros((64, 64), np.bool_)
    white[16:48, 8:56] = True  # twice as large
    np.testing.assert_array_equal(request.mask, white)
    picture = plan.finished(np.full((64, 64, 3), 9, np.uint8))
    assert picture.shape == PAINTED.shape
    assert (picture[MASK] == 9).all()
    np.testing.assert_array_equal(picture[~MASK], PAINTED[~MASK])


def test_full_resolution_is_the_default_and_needs_a_mask(manifest: Manifest) -> None:
    assert img2img(manifest, MASK).crop is not None
    assert img2img(manifest, MASK).request.mask_blur == 4
    assert img2img(manifest, inpaint_full_res=True).crop is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inpainting_fill": 2}, "inpainting_fill is 2, but must be 0 (the colours around the mask) or 1"),
        ({"mask_round": False}, "mask_round is false"),
        ({"mask_blur_x": 2}, "mask_blur_x is 2 and mask_blur_y 4, they must be equal"),
        ({"initial_noise_multiplier": 1.2}, "initial_noise_multiplier is 1.2, this server allows 1 only"),
        ({"latent_mask": "aGk="}, "latent_mask is set, but"),
    ],
)
def test_what_is_not_done_with_a_mask_is_refused_by_name(
    manifest: Manifest, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unprocessable) as caught:
        img2img(manifest, MASK, **fields)

    assert caught.value.message.startswith(message)


def test_a_mask_of_another_size_or_without_white_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="the mask is 64x64, the image 64x96"):
        img2img(manifest, MASK[:64])
    with pytest.raises(UsageError, match="the mask is all black"):
        img2img(manifest, np.zeros_like(MASK))


def test_the_answer_has_the_pictures_and_info_as_a_json_string(manifest: Manifest) -> None:
    body = TextToImage(**WEBUIAPI | {"seed": 3, "negative_prompt": "blurry", "unknown": 1})
    plan = text_to_image(body, manifest, 0)

    answer = json.loads(pictures_answer(body, plan, [done(plan)], [encoded(plan, done(plan))], manifest, "oneword 0"))

    assert answer.keys() == {"images", "parameters", "info"}
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert picture.size == (64, 96)
    assert picture.info["parameters"] == done(plan).parameters
    assert answer["parameters"] == {**WEBUIAPI, "seed": 3, "negative_prompt": "blurry"} | {
        name: answer["parameters"][name] for name in answer["parameters"].keys() - WEBUIAPI.keys()
    }
    assert "unknown" not in answer["parameters"]
    details = json.loads(answer["info"])
    assert set(details) == {
        *[
            "prompt",
            "all_prompts",
            "negative_prompt",
            "all_negative_prompts",
            "seed",
            "all_seeds",
            "subseed",
            "all_subseeds",
        ],
        *["subseed_strength", "width", "height", "sampler_name", "cfg_scale", "steps", "batch_size", "restore_faces"],
        *[
            "face_restoration_model",
            "sd_model_name",
            "sd_model_hash",
            "sd_vae_name",
            "sd_vae_hash",
            "seed_resize_from_w",
        ],
        *["seed_resize_from_h", "denoising_strength", "extra_generation_params", "index_of_first_image", "infotexts"],
        *["styles", "job_timestamp", "clip_skip", "is_using_inpainting_conditioning", "version"],
    }
    assert details["infotexts"] == [done(plan).parameters]
    assert details["infotexts"][0].startswith(
        "a red ring\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7.0, Seed: 3, Size: 64x96"
    )
    assert (details["sampler_name"], details["width"], details["height"]) == ("Euler a", 64, 96)
    assert details["job_timestamp"].isdigit()


def test_pictures_are_sent_in_the_requested_format_or_not_at_all(manifest: Manifest) -> None:
    body = TextToImage(prompt="a cat", override_settings={"samples_format": "jpg"})
    plan = text_to_image(body, manifest, 0)
    silent = TextToImage(send_images=False)

    data = base64.b64decode(encoded(plan, done(plan)))
    answer = json.loads(pictures_answer(silent, plan, [done(plan)], [], manifest, "v"))

    assert PIL.Image.open(io.BytesIO(data)).format == "JPEG"
    assert answer["images"] == []
    assert len(json.loads(answer["info"])["infotexts"]) == 1


def test_an_interrupted_request_answers_the_pictures_that_were_ready(manifest: Manifest) -> None:
    plan = txt2img(manifest, seed=5, n_iter=3)

    first = info(TextToImage(), plan, [done(plan, 0)], manifest, "v")
    none = info(TextToImage(), plan, [], manifest, "v")

    assert (first["all_seeds"], len(first["infotexts"])) == ([5], 1)
    assert (none["seed"], none["all_seeds"], none["infotexts"]) == (5, [5, 6, 7], [])


def test_the_init_pictures_are_echoed_only_if_requested(manifest: Manifest) -> None:
    bodies = [
        ImageToImage(init_images=["aaaa"], mask="bbbb", include_init_images=include, inpainting_fill=1)
        for include in (False, True)
    ]

    answers = [
        json.loads(pictures_answer(body, image_to_image(body, manifest, 0, PAINTED), [], [], manifest, "v"))[
            "parameters"
        ]
        for body in bodies
    ]

    assert (answers[0]["init_images"], answers[0]["mask"]) == (None, None)
    assert (answers[1]["init_images"], answers[1]["mask"]) == (["aaaa"], "bbbb")


class Job:
    """A generation of the pool, as far as a progress shows it."""

    def __init__(self, plan: Plan, ready: int, steps: tuple[int, int], progress: float, seconds_left: float) -> None:
        self.request = plan.request
        self.pictures = [done(plan) if i < ready else None for i in range(plan.request.num_images)]
        self.steps, self.progress, self.seconds_left = steps, progress, seconds_left


def test_progress_adds_up_a_callers_requests(manifest: Manifest) -> None:
    first = Job(txt2img(manifest, n_iter=3), 1, (5, 20), 0.5, 4.0)
    second = Job(img2img(manifest), 0, (0, 20), 0.1, 9.0)

    progress = progress_of([first, second])

    assert progress.progress == pytest.approx((0.5 * 3 + 0.1) / 4)
    assert progress.eta_relative == 9
    state = progress.state
    assert (state.job, state.job_count, state.job_no) == ("txt2img", 4, 1)
    assert (state.sampling_step, state.sampling_steps) == (5, 20)


def test_progress_is_zero_at_rest_and_only_then(manifest: Manifest) -> None:
    begun = progress_of([Job(img2img(manifest), 0, (0, 20), 0.0, 9.0)])
    idle = progress_of([])

    assert (idle.progress, idle.eta_relative, idle.state.job_count) == (0, 0, 0)
    assert 0 < begun.progress < 0.1
    assert (begun.state.job, begun.state.job_count) == ("img2img", 1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", {}),
        (
            "a cat,\nwith colons: two\nNegative prompt: dog\nand ring\nSteps: 20, Sampler: Euler a, Seed: 3",
            {
                "Prompt": "a cat,\nwith colons: two",
                "Negative prompt": "dog\nand ring",
                "Steps": "20",
                "Sampler": "Euler a",
                "Seed": "3",
            },
        ),
        (
            'a cat\nSteps: 4, Size: 64x96, Lora hashes: "a: 1, b: 2", Version: 1',
            {
                "Prompt": "a cat",
                "Negative prompt": "",
                "Steps": "4",
                "Size-1": "64",
                "Size-2": "96",
                "Lora hashes": "a: 1, b: 2",
                "Version": "1",
            },
        ),
        (
            "a cat\nSteps : 4,  Seed: 3,Size: 64x96",
            {"Prompt": "a cat", "Negative prompt": "", "Steps": "4", "Seed": "3", "Size-1": "64", "Size-2": "96"},
        ),
        (  # what A1111's `parse_generation_parameters` makes of it, without the defaults of parts that are missing
            'a 2x4\nNegative prompt: 3x5\nSteps: 4, Size: 64x96, Hires resize: 128x0, Tile: "7x9", Box: 1x2x3',
            {
                "Prompt": "a 2x4",
                "Negative prompt": "3x5",
                "Steps": "4",
                "Size-1": "64",
                "Size-2": "96",
                "Hires resize-1": "128",
                "Hires resize-2": "0",
                "Tile-1": "7",
                "Tile-2": "9",
                "Box": "1x2x3",
            },
        ),
        ("just: text, of a user", {"Prompt": "just: text, of a user", "Negative prompt": ""}),
    ],
)
def test_a_parameters_text_is_taken_apart(text: str, parts: dict[str, str]) -> None:
    assert parsed_parameters(text) == parts


@pytest.mark.parametrize("piece", [" ", "a", "a ", "a:", 'a:"', 'a:"\\', ",  "])
def test_a_parameters_text_takes_linear_time(piece: str) -> None:
    start = time.process_time()

    parsed_parameters("x" + 20_000 // len(piece) * piece + "x")

    assert time.process_time() - start < 5  # quadratic: 10 to 60 s


def test_our_own_parameters_text_is_taken_apart(manifest: Manifest) -> None:
    plan = img2img(manifest, MASK, negative_prompt="blurry", seed=9)

    parts = parsed_parameters(done(replace(plan, crop=None)).parameters)

    assert parts["Prompt"] == "a red ring"
    assert parts["Negative prompt"] == "blurry"
    assert (parts["Seed"], parts["Size-1"], parts["Size-2"], parts["Mask blur"]) == ("9", "64", "96", "4")
    assert "Size" not in parts
    assert parts["Denoising strength"] == "0.7"
