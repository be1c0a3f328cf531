"""The JSON bodies of A1111's API: what clients send and receive.

Data only. Every field that A1111 documents is here, so that a misspelled one can be found;
`oneword.serve.a1111.dialect` says which of them have an effect. A field that is null counts as left out, as in A1111.
"""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

TaskId: TypeAlias = Annotated[str, Field(max_length=200, pattern=r"^[ -~]*$")]
"""A client's own name for a request, in ASCII."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


class TextToImage(_Body):
    """The body of txt2img. Left out, a setting has the model's default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "a red ring", "seed": 7, "steps": 4, "sampler_name": "Euler a", "cfg_scale": 5}]
        }
    )

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = Field(None, description="-1 draws one at random; picture i of the request has seed + i")
    sampler_name: str | None = Field(None, description="a name or alias that /sdapi/v1/samplers lists")
    sampler_index: str | None = Field(None, description="an older name of sampler_name, which goes first")
    scheduler: str | None = Field(None, description="a name that /sdapi/v1/schedulers lists")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    n_iter: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1, description="n_iter x batch_size pictures are generated")
    eta: float | None = Field(None, description="noise of DDIM's steps, 0 to 1; ancestral samplers allow 1")
    clip_skip: int | None = Field(None, ge=1, description="as CLIP_stop_at_last_layers, which goes first")
    override_settings: dict[str, Any] | None = Field(
        None, description="CLIP_stop_at_last_layers and samples_format; the others only at this server's values"
    )
    force_task_id: TaskId | None = Field(None, description="names the request for progress and interrupt")
    send_images: bool | None = Field(None, description="false: only `info` is returned")

    # Accepted if they request nothing.
    styles: list[str] | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    save_images: bool | None = Field(None, description="the server keeps no pictures, so this does nothing")
    s_churn: float | None = None
    s_min_uncond: float | None = None
    s_noise: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    override_settings_restore_afterwards: bool | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = None
    firstpass_image: str | None = None
    comments: dict[str, Any] | None = None
    enable_hr: bool | None = None
    denoising_strength: float | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    script_name: str | None = None
    script_args: list[Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    infotext: str | None = None


class ImageToImage(TextToImage):
    """The body of img2img, and of inpainting."""

    init_images: list[str] | None = Field(None, description="one picture in base64, with or without data:image/...")
    mask: str | None = Field(None, description="white is regenerated, in base64")
    mask_blur: float | None = Field(None, ge=0, le=64, description="softens the edge where the picture is pasted")
    mask_blur_x: float | None = Field(None, ge=0, le=64)
    mask_blur_y: float | None = Field(None, ge=0, le=64)
    mask_round: bool | None = None
    inpainting_fill: int | None = Field(
        None, description="[default: 0] 0: starts from the colours around the mask; 1: from the picture"
    )
    inpainting_mask_invert: int | None = Field(None, ge=0, le=1, description="1: black is regenerated")
    inpaint_full_res: bool | None = Field(None, description="[default: true] regenerates a crop around the mask")
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=4096)
    resize_mode: int | None = Field(None, description="0 stretches, 1 crops and resizes, 2 resizes and fills")
    include_init_images: bool | None = None
    image_cfg_scale: float | None = Field(None, description="for other models than this server's: does nothing")
    initial_noise_multiplier: float | None = None
    latent_mask: str | None = None


class PictureFile(_Body):
    """The body of png-info."""

    image: str = Field(description="a picture in base64, with or without data:image/...")


class Pictures(BaseModel):
    """The answer of txt2img and img2img."""

    images: list[str]
    parameters: dict[str, Any]
    info: str = Field(description="JSON as text")


class PictureInfo(BaseModel):
    """The answer of png-info."""

    info: str
    items: dict[str, str]
    parameters: dict[str, str] = Field(description="by name; a size NAME is in two parts, NAME-1 and NAME-2")


class ProgressState(BaseModel):
    """The part `state` of a progress."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """The answer of progress: the caller's own requests only."""

    progress: float = 0.0
    eta_relative: float = 0.0
    state: ProgressState = ProgressState()
    current_image: str | None = None
    textinfo: str | None = None
    current_task: str | None = None


class Error(BaseModel):
    """The answer when something is wrong: one line that says what was given, what is allowed, how to fix it."""

    error: str
    detail: str
    body: str
    errors: str


class SamplerItem(BaseModel):
    """One of the samplers."""

    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class SchedulerItem(BaseModel):
    """One of the schedulers."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1.0
    need_inner_model: bool = False


class ModelItem(BaseModel):
    """The model of this server."""

    model_config = ConfigDict(protected_namespaces=())

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None = None


class UpscalerItem(BaseModel):
    """One of the upscalers."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float = 1.0


class EmbeddingItem(BaseModel):
    """A learned word."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    vectors: int


class Embeddings(BaseModel):
    """The caller's words."""

    loaded: dict[str, EmbeddingItem]
    skipped: dict[str, EmbeddingItem] = {}


class Scripts(BaseModel):
    """The scripts for each kind of request: none."""

    txt2img: list[str] = []
    img2img: list[str] = []


class Memory(BaseModel):
    """Bytes of memory. There are no figures of a GPU."""

    ram: dict[str, float | str]
    cuda: dict[str, float | str]
