"""A1111's way to ask for pictures: what a body of txt2img or img2img means as a `Request` of the runtime.

Pure translation: no HTTP, no files, no sampling. Some meanings differ from the runtime's own: `clip_skip` counts from
1; `eta` is passed on to DDIM only, whose default is 0: ancestral samplers have 1, and 0 makes another sampler of
them; a scheduler is a spacing, which may also end a sampler's name; picture i has the seed `seed + i`, over all
`n_iter` x `batch_size` pictures. Left out, steps, size, guidance and sampler are the model's defaults, not A1111's.

A key that requests something this server does not do is refused by name; one that requests nothing is accepted. Unknown
keys are ignored, as A1111 ignores them, unless they look like a misspelled one.
"""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Final

from oneword.engines.errors import one_of
from oneword.runtime.bundle import Manifest, Provenance
from oneword.runtime.edit import Mask
from oneword.runtime.images import A1111_SAMPLERS, A1111_SPACINGS
from oneword.runtime.request import Image, Request, ResolvedSettings, resolve
from oneword.runtime.samplers import Sampler, spacings_of
from oneword.runtime.spacing import Spacing
from oneword.serve.a1111.pictures import Crop, covering, filled, filling
from oneword.serve.a1111.schemas import ImageToImage, TextToImage
from oneword.serve.errors import NotFound, Unprocessable
from oneword.serve.pictures import Format

RANDOM_SEEDS: Final = 2**32 - 1
"""Seeds that are drawn at random are smaller, as in A1111."""
MAX_PICTURES: Final = 100
"""Of one request: A1111's own page allows n_iter 100. All of them are in memory until the last one is ready."""
PREVIEW_STEPS: Final = 10  # between two previews, A1111's default
FORMATS: Final[Mapping[str, Format]] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
ALIASES: Final[Mapping[Sampler, tuple[str, ...]]] = {
    Sampler.DDIM: ("ddim", "k_ddim"),
    Sampler.DDPM: ("ddpm", "k_ddpm"),
    Sampler.EULER: ("euler", "k_euler"),
    Sampler.EULER_A: ("euler-a", "k_euler_a", "k_euler_ancestral", "euler_ancestral"),
    Sampler.DPMPP_2M: ("dpmpp-2m", "k_dpmpp_2m", "dpmpp_2m"),
    Sampler.DPMPP_2M_KARRAS: ("dpmpp-2m-karras", "k_dpmpp_2m_ka", "dpmpp_2m_karras"),
    Sampler.DPMPP_2M_SDE: ("dpmpp-2m-sde", "k_dpmpp_2m_sde", "dpmpp_2m_sde"),
    Sampler.LCM: ("lcm", "k_lcm"),
    Sampler.HEUN: ("heun", "k_heun"),
    Sampler.DPM2_A: ("dpm2-a", "k_dpm_2_a", "dpm_2_ancestral"),
    Sampler.DPMPP_2S_A: ("dpmpp-2s-a", "k_dpmpp_2s_a", "dpmpp_2s_ancestral"),
    Sampler.DPMPP_3M_SDE: ("dpmpp-3m-sde", "k_dpmpp_3m_sde", "dpmpp_3m_sde"),
    Sampler.UNIPC: ("unipc", "uni_pc_bh2"),
}
"""Other names of the samplers: our own, k-diffusion's and ComfyUI's."""
_OF_THE_MODEL: Final = {"automatic": "Automatic", "uniform": "Uniform", "normal": "Normal"}
_SPACINGS: Final[Mapping[str, Spacing]] = {
    "karras": Spacing.KARRAS,
    "exponential": Spacing.EXPONENTIAL,
    "sgm_uniform": Spacing.SGM_UNIFORM,
    "beta": Spacing.BETA,
    "align_your_steps": Spacing.AYS,
}
SCHEDULERS: Final[Mapping[str, str]] = {
    **_OF_THE_MODEL,
    **{name: A1111_SPACINGS[spacing] for name, spacing in _SPACINGS.items()},
}
"""Names and labels."""

_SAMPLERS: Final = {
    name.lower(): sampler
    for sampler, a1111_name in A1111_SAMPLERS.items()
    for name in (a1111_name, sampler.value, *ALIASES[sampler])
}
_SCHEDULERS: Final = {
    "simple": "sgm_uniform",  # the same steps, to one of a thousand
    **{alias: name for name, label in SCHEDULERS.items() for alias in (name, label.lower())},
}
_ANCESTRAL: Final = (
    Sampler.EULER_A,
    Sampler.DPM2_A,
    Sampler.DPMPP_2S_A,
    Sampler.DPMPP_2M_SDE,
    Sampler.DPMPP_3M_SDE,
)
_WITHOUT_NOISE: Final = {Sampler.EULER_A: Sampler.EULER, Sampler.DPMPP_2M_SDE: Sampler.DPMPP_2M}
"""What ancestral samplers are with eta 0."""
_NOT_DONE: Final[Mapping[str, str]] = {
    "enable_hr": "the high-resolution fix",
    "styles": "prompt styles",
    "subseed_strength": "variation seeds",
    "restore_faces": "face restoration",
    "tiling": "tiling",
    "s_churn": "churn",
    "s_min_uncond": "steps without a negative prompt",
    "refiner_checkpoint": "a refiner",
    "firstpass_image": "the high-resolution fix",
    "script_name": "scripts",
    "alwayson_scripts": "scripts and extensions",
    "infotext": "settings from a parameters text",
    "latent_mask": "masks of latents",
}
_NEUTRAL: Final[Mapping[str, float]] = {"s_noise": 1.0, "initial_noise_multiplier": 1.0}
_DEFAULT_OPTIONS: Final[Mapping[str, object]] = {
    "jpeg_quality": 80,
    "enable_pnginfo": True,
    "sd_unet": "Automatic",
    "emphasis": "Original",
    "enable_emphasis": True,  # as older versions named it
    "enable_batch_seeds": True,
    "comma_padding_backtrack": 20,
    "randn_source": "GPU",
    "sd_vae_encode_method": "Full",
    "sd_vae_decode_method": "Full",
    "inpainting_mask_weight": 1.0,
    "initial_noise_multiplier": 1.0,
    "img2img_background_color": "#ffffff",
    "overlay_inpaint": True,
    "fp8_storage": "Disable",
    "eta_ancestral": 1.0,
    "ddim_discretize": "uniform",
    "s_noise": 1.0,
    "uni_pc_variant": "bh1",
    "uni_pc_skip_type": "time_uniform",
    "uni_pc_order": 3,
    "uni_pc_lower_order_final": True,
    "sd_noise_schedule": "Default",
    "beta_dist_alpha": 0.6,
    "beta_dist_beta": 0.6,
}
"""A1111's defaults of settings that change pictures or answers at other values, 0 and false among them; some clients
send them always. Those whose default is 0, false or empty need no line. Source: AUTOMATIC1111/stable-diffusion-webui
1.10, modules/shared_options.py."""
_IGNORED_OPTIONS: Final = (
    # saving
    "samples_save", "samples_filename_pattern", "samples_log_stdout", "save_", "grid_", "n_rows", "font", "outdir_",
    "directories_", "use_save_to_dirs_for_ui", "use_original_name_batch", "use_upscaler_name_as_suffix", "temp_dir",
    "export_for_4chan", "img_downscale_threshold", "target_side_length", "img_max_size_mp", "clean_temp_dir_at_start",
    # display, and the text that is saved with a picture
    "show_", "live_preview", "js_", "gallery_", "return_grid", "do_not_show_images", "sd_webui_modal_", "open_dir_",
    "ui_", "hidden_tabs", "hide_", "gradio_", "localization", "quicksettings", "keyedit_", "extra_networks_", "send_",
    "compact_prompt_box", "samplers_in_dropdown", "dimensions_and_batch_together", "sd_checkpoint_dropdown_use_short",
    "txt2img_settings_accordion", "img2img_settings_accordion", "img2img_editor_height", "img2img_sketch_default_",
    "img2img_inpaint_mask_brush_", "img2img_inpaint_sketch_", "img2img_batch_show_", "notification_", "infotext_",
    "add_model_", "add_vae_", "add_user_name_to_info", "add_version_to_infotext", "textual_inversion_", "print_",
    "disable_token_counters", "include_styles_into_token_counters", "disable_weights_auto_swap", "auto_backcompat",
    "multiple_tqdm", "enable_console_prompts", "prevent_screen_sleep_", "enable_reloading_ui_scripts",
    # speed, memory and the program
    "cross_attention_optimization", "persistent_cond_cache", "batch_cond_uncond", "cache_fp16_weight", "pin_memory",
    "sd_checkpoints_", "sd_checkpoint_cache", "sd_vae_checkpoint_cache", "sd_vae_overrides_", "auto_vae_precision",
    "memmon_poll_rate", "auto_launch_browser", "list_hidden_files", "disable_mmap_", "hide_ldm_", "dump_stacks_",
    "api_", "disabled_extensions", "disable_all_extensions", "interrupt_after_current", "unload_models_when_training",
    # features that a request for is refused by their own names
    "training_", "dataset_filename_", "interrogate_", "deepbooru_", "ESRGAN_", "realesrgan_", "face_restoration_",
    "code_former_weight", "sdxl_refiner_", "refiner_switch_by_", "hires_fix_", "use_old_hires_fix_width_height",
    "postprocessing_disable_", "postprocessing_operation_", "postprocessing_existing_", "upscaling_max_images_",
)  # fmt: skip
"""How the names of settings begin that change no picture and no answer of this server, whatever their value."""
_IGNORED: Final = ("hr_", "config_scale")
"""How unknown keys begin that some clients send always, although they look like misspelled ones."""
_MAX_UNKNOWN: Final = 100  # keys that are compared with the known ones


@dataclass(frozen=True)
class ModelNames:
    """The names under which a client knows this server's model."""

    title: str
    name: str
    hash: str
    sha256: str

    @classmethod
    def of(cls, source: Provenance) -> "ModelNames":
        """Those of a bundle's weights, as A1111 would list a checkpoint."""
        name, short = PurePath(source.id).name, source.digest[:10]
        return cls(f"{name} [{short}]" if short else name, name, short, source.digest)

    def include(self, name: object) -> bool:
        """Whether a name means this model; so does none."""
        return not name or str(name) in (self.title, self.name, self.hash, self.sha256)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a body requests."""

    request: Request
    settings: ResolvedSettings
    crop: Crop | None = None
    """The part of the original picture that the request regenerates; None: the picture is the answer."""
    format: Format = "png"

    def finished(self, image: Image) -> Image:
        """A picture of the request as the client gets it."""
        return image if self.crop is None else self.crop.pasted(image)


def text_to_image(body: TextToImage, manifest: Manifest, random_seed: int) -> Plan:
    """The plan of a txt2img. `random_seed` replaces a seed of -1. Raises NotFound, Unprocessable and UsageError."""
    check(body)
    overrides = checked_options(body.override_settings or {}, options(manifest), ModelNames.of(manifest.source))
    sampler, spacing = sampler_of(body.sampler_name or body.sampler_index, body.scheduler, manifest)
    used = sampler or Sampler(manifest.defaults.sampler)
    if body.eta == 0 and used in _WITHOUT_NOISE:
        sampler = used = _WITHOUT_NOISE[used]
    count = (body.n_iter or 1) * (body.batch_size or 1)
    if count > MAX_PICTURES:
        raise Unprocessable(
            f"n_iter x batch_size is {count}, but at most {MAX_PICTURES} pictures are allowed", "n_iter"
        )
    seed = -1 if body.seed is None else body.seed
    if seed < -1:
        raise Unprocessable(f"seed is {seed}, but must be -1 (random) or 0 to {2**63 - 1}", "seed")
    clip_skip = overrides.get("CLIP_stop_at_last_layers") or body.clip_skip or 1
    request = Request(
        body.prompt or "",
        body.negative_prompt or None,
        seed=random_seed if seed == -1 else seed,
        num_images=count,
        steps=body.steps,
        sampler=sampler,
        spacing=spacing,
        guidance_scale=body.cfg_scale,
        eta=_eta(used, body.eta),
        clip_skip=clip_skip - 1,
        size=_size(body, manifest),
        previews=PREVIEW_STEPS,
    )
    return Plan(request, resolve(request, manifest), format=FORMATS[overrides.get("samples_format") or "png"])


def image_to_image(
    body: ImageToImage, manifest: Manifest, random_seed: int, image: Image, mask: Mask | None = None
) -> Plan:
    """The plan of an img2img: `image` is the decoded first of its `init_images`, `mask` its mask as it was sent.

    Raises as `text_to_image`.
    """
    plan = text_to_image(body, manifest, random_seed)
    mode = body.resize_mode or 0
    if mode not in (0, 1, 2):
        raise Unprocessable(f"resize_mode is {mode}, but must be 0 (stretch), 1 (crop) or 2 (fill)", "resize_mode")
    blur = 0.0
    if mask is not None:
        _check_inpainting(body)
        blur = _mask_blur(body)
        mask = ~mask if body.inpainting_mask_invert else mask
    strength = strength_of(body)
    request = replace(plan.request, image=image, mask=mask, mask_blur=blur, strength=strength)
    if request.size is None:  # the picture's
        settings = resolve(request, manifest)
        request = replace(request, size=(settings.width, settings.height))
    assert request.size is not None
    crop = None
    if mask is not None and body.inpaint_full_res is not False:
        padding = body.inpaint_full_res_padding or 0
        crop = Crop.around(mask, image, blur=blur, padding=padding, size=request.size)
        image, mask, mode = crop.cut(image), crop.cut(mask), 2
    if mode:
        resize = covering if mode == 1 else filling
        image, mask = resize(image, *request.size), None if mask is None else resize(mask, *request.size)
    if mask is not None and body.inpainting_fill != 1:  # left out, it is 0 in A1111
        image = filled(image, mask)
    request = replace(request, image=image, mask=mask, paste=crop is None)
    return replace(plan, request=request, settings=resolve(request, manifest), crop=crop)


def strength_of(body: ImageToImage) -> float:
    """How much of the picture is replaced: A1111's default is 0.75."""
    return 0.75 if body.denoising_strength is None else body.denoising_strength


def sampler_of(name: str | None, scheduler: str | None, manifest: Manifest) -> tuple[Sampler | None, Spacing | None]:
    """The sampler and spacing of a name and a scheduler; None is the model's own. Raises NotFound and Unprocessable."""
    schedule = (scheduler or "automatic").strip().lower()
    sampler = None
    if name:
        base, ending = _without_scheduler(name.strip().lower())
        if base not in _SAMPLERS:
            raise NotFound(f"Sampler not found: {name[:60]!r} is not {one_of(A1111_SAMPLERS.values())}", "sampler_name")
        sampler = _SAMPLERS[base]
        schedule = ending if schedule == "automatic" else schedule
    if schedule not in _SCHEDULERS:
        raise Unprocessable(f"scheduler is {schedule[:60]!r}, but must be {one_of(SCHEDULERS)}", "scheduler")
    spacing = _SPACINGS.get(_SCHEDULERS[schedule])
    used = sampler or Sampler(manifest.defaults.sampler)
    if spacing is Spacing.KARRAS and used in (Sampler.DPMPP_2M, Sampler.DPMPP_2M_KARRAS):
        return Sampler.DPMPP_2M_KARRAS, None
    if spacing is not None and spacing not in spacings_of(used):
        if sampler is Sampler.DDIM:  # it has steps of its own in A1111
            return sampler, None
        names = [name for name, other in _SPACINGS.items() if other in spacings_of(used)]
        raise Unprocessable(
            f"scheduler is {schedule!r} with the sampler {A1111_SAMPLERS[used]}, but must be "
            f"{one_of(['automatic', *names])}",
            "scheduler",
        )
    return sampler, Spacing.AYS_XL if spacing is Spacing.AYS and manifest.conditioning.time_ids else spacing


def _without_scheduler(name: str) -> tuple[str, str]:
    """A sampler's name in lower case, and the scheduler that it ends in, as in "dpm++ 2m sde karras"."""
    if name not in _SAMPLERS:
        for ending in _SCHEDULERS:
            base = name.removesuffix(f" {ending}")
            if base != name and base in _SAMPLERS:
                return base, ending
    return name, "automatic"


def options(manifest: Manifest) -> dict[str, Any]:
    """The server's settings, as A1111 names them."""
    model = ModelNames.of(manifest.source)
    return {
        "sd_model_checkpoint": model.title,
        "sd_checkpoint_hash": model.sha256,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "show_progress_every_n_steps": PREVIEW_STEPS,
        "live_previews_enable": True,
    }


def checked_options(overrides: Mapping[str, Any], current: Mapping[str, Any], model: ModelNames) -> dict[str, Any]:
    """The settings that a request changes for itself.

    Raises NotFound for another model, Unprocessable for a setting that cannot be changed. An empty text and "None"
    request nothing; neither do 0 and false, unless the setting is known to have another value. Settings of display,
    saving and speed are ignored.
    """
    known = {**_DEFAULT_OPTIONS, **current}
    changed: dict[str, Any] = {}
    for name, value in overrides.items():
        if name == "sd_model_checkpoint":
            if not model.include(value):
                raise NotFound(f"this server has no model {str(value)[:80]!r}, only {model.title!r}", name)
        elif value is None or (name in known and value == known[name]) or (name, value) == ("randn_source", "CPU"):
            continue  # noise is drawn on the CPU; A1111's default is GPU, and some clients send it always
        elif name == "CLIP_stop_at_last_layers":
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 100:
                raise Unprocessable(f"{name} is {str(value)[:60]!r}, but must be a whole number from 1 to 100", name)
            changed[name] = value
        elif name == "samples_format":
            if str(value).lower() not in FORMATS:
                raise Unprocessable(f"{name} is {str(value)[:60]!r}, but must be {one_of(FORMATS)}", name)
            changed[name] = str(value).lower()
        elif name.startswith(_IGNORED_OPTIONS):
            continue
        elif name in known and (_asks(value) or not isinstance(value, str) or (name, value) == ("emphasis", "None")):
            raise Unprocessable(
                f"{name} is {_shown(value)}, this server allows {_shown(known[name])} only: leave it out", name
            )
        elif _asks(value):
            raise Unprocessable(f"the setting {name[:60]!r} cannot be changed on this server: leave it out", name[:60])
    return changed


def check(body: TextToImage) -> None:
    """Raises Unprocessable for a key that requests something this server does not do, or is misspelled."""
    for name, feature in _NOT_DONE.items():
        value = getattr(body, name, None)
        if _asks(value):
            shown = str(value).lower() if isinstance(value, bool) else "set" if not _is_number(value) else value
            raise Unprocessable(f"{name} is {shown}, but this server does not do {feature}: leave it out", name)
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, None)
        if value not in (None, neutral):
            raise Unprocessable(f"{name} is {value:g}, this server allows {neutral:g} only: leave it out", name)
    if (body.seed_resize_from_w or 0) > 0 and (body.seed_resize_from_h or 0) > 0:
        raise Unprocessable("seed_resize_from_w and _h are not supported: set both to 0", "seed_resize_from_w")
    known = type(body).model_fields
    for name, value in itertools.islice((body.model_extra or {}).items(), _MAX_UNKNOWN):
        near = difflib.get_close_matches(name[:60], known, 1, 0.85)
        if near and _asks(value) and not name.startswith(_IGNORED):
            raise Unprocessable(f"{name[:60]!r} is not a field of this request: did you mean {near[0]!r}?", name[:60])


def _check_inpainting(body: ImageToImage) -> None:
    """Raises Unprocessable for what is not done with a mask."""
    if body.inpainting_fill not in (None, 0, 1):
        raise Unprocessable(
            f"inpainting_fill is {body.inpainting_fill}, but must be 0 (the colours around the mask) or 1 "
            "(the original picture)",
            "inpainting_fill",
        )
    if body.mask_round is False:
        raise Unprocessable("mask_round is false, but this server's masks are black and white: leave it out")


def _mask_blur(body: ImageToImage) -> float:
    """In pixels; A1111's default is 4."""
    if body.mask_blur is not None:
        return body.mask_blur
    x, y = (4.0 if blur is None else blur for blur in (body.mask_blur_x, body.mask_blur_y))
    if x != y:
        raise Unprocessable(f"mask_blur_x is {x:g} and mask_blur_y {y:g}, they must be equal: use mask_blur")
    return x


def _size(body: TextToImage, manifest: Manifest) -> tuple[int, int] | None:
    """Width and height; None if both are left out."""
    if body.width is None and body.height is None:
        return None
    defaults = manifest.defaults
    return (
        defaults.width if body.width is None else body.width,
        defaults.height if body.height is None else body.height,
    )


def _eta(sampler: Sampler, eta: float | None) -> float:
    """The runtime's eta. Ancestral samplers have 1 built in; the others ignore it, as in A1111."""
    if sampler in _ANCESTRAL and eta not in (None, 1):
        name = A1111_SAMPLERS[sampler]
        zero = "0 or " if sampler in _WITHOUT_NOISE else ""
        raise Unprocessable(f"eta is {eta:g} with the sampler {name}, but must be {zero}1: leave it out", "eta")
    return (eta or 0.0) if sampler is Sampler.DDIM else 0.0


def _asks(value: Any, depth: int = 8) -> bool:
    """Whether a value requests something. False, 0, null, "None", a disabled item of a list, and what is empty or made
    of these do not."""
    match value:
        case str():
            return value.strip().lower() not in ("", "none")
        case Mapping() | list():
            items = value.values() if isinstance(value, Mapping) else [item for item in value if not _is_disabled(item)]
            return depth == 0 or any(_asks(item, depth - 1) for item in items)
        case _:
            return bool(value)


def _is_disabled(item: Any) -> bool:
    """Whether an item of a list is switched off as a whole, as a unit of ControlNet."""
    return isinstance(item, Mapping) and item.get("enabled") is False


def _shown(value: object) -> str:
    """A setting's value for an error, cut off."""
    text = str(value)[:60]
    return text.lower() if isinstance(value, bool) else text if _is_number(value) else repr(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
