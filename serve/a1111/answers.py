"""The answers of A1111's API: pictures and their `info`, progress, and the lists of what this server has.

Pure translation of results; the routes are in `oneword.serve.a1111.routes`.
"""

import json
import re
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

from oneword.runtime.bundle import Manifest
from oneword.runtime.events import PictureDone
from oneword.runtime.images import A1111_SAMPLERS
from oneword.runtime.request import Request
from oneword.serve.a1111.dialect import ALIASES, SCHEDULERS, ModelNames, Plan
from oneword.serve.a1111.schemas import (
    ModelItem,
    Progress,
    ProgressState,
    SamplerItem,
    SchedulerItem,
    TextToImage,
)
from oneword.serve.pictures import as_base64, encode

_PAIR: Final = re.compile(r'(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_SIZE: Final = re.compile(r"(\d+)x(\d+)")
_MAX_PAIRS_TEXT: Final = 20_000  # characters
_NEGATIVE: Final = "Negative prompt:"
_IMAGE_KEYS: Final = ("init_images", "mask")
_OPAQUE_KEYS: Final = ("script_args", "alwayson_scripts", "comments", "styles")


class Job(Protocol):
    """The part of a `Generation` of the pool that a progress shows."""

    @property
    def request(self) -> Request: ...
    @property
    def pictures(self) -> Sequence[PictureDone | None]: ...
    @property
    def steps(self) -> tuple[int, int]:
        """The steps of its picture in progress that are done, and all of them."""
        ...

    @property
    def progress(self) -> float: ...
    @property
    def seconds_left(self) -> float: ...


def encoded(plan: Plan, done: PictureDone) -> str:
    """One picture as the client gets it, in base64."""
    return as_base64(encode(plan.finished(done.image), plan.format, parameters=done.parameters))


def pictures_answer(
    body: TextToImage,
    plan: Plan,
    pictures: Sequence[PictureDone],
    images: Sequence[str],
    manifest: Manifest,
    version: str,
) -> bytes:
    """The answer of txt2img and img2img as JSON, `images` as they were `encoded`.

    An interrupted request returns the pictures that were ready.
    """
    details = json.dumps(info(body, plan, pictures, manifest, version))
    return json.dumps({"images": [*images], "parameters": echo(body), "info": details}).encode()


def info(
    body: TextToImage, plan: Plan, pictures: Sequence[PictureDone], manifest: Manifest, version: str
) -> dict[str, Any]:
    """What made the pictures."""
    request, settings = plan.request, plan.settings
    count = len(pictures) or request.num_images  # interrupted before the first one: those that were asked for
    seeds = [done.seed for done in pictures] or [request.seed + i for i in range(request.num_images)]
    negative = request.negative_prompt or ""
    model = ModelNames.of(manifest.source)
    subseed = -1 if body.subseed is None else body.subseed
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": subseed,
        "all_subseeds": [subseed] * count,
        "subseed_strength": 0,
        "width": settings.width,
        "height": settings.height,
        "sampler_name": A1111_SAMPLERS[settings.sampler],
        "cfg_scale": settings.guidance_scale,
        "steps": settings.steps,
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": model.hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength if request.image is not None else None,
        "extra_generation_params": {"Mask blur": request.mask_blur} if request.mask is not None else {},
        "index_of_first_image": 0,
        "infotexts": [done.parameters for done in pictures],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": request.clip_skip + 1,
        "is_using_inpainting_conditioning": False,
        "version": version,
    }


def echo(body: TextToImage) -> dict[str, Any]:
    """The body as it was understood, without pictures, unless they were requested, and without unknown keys."""
    skipped = {*_OPAQUE_KEYS, *(body.model_extra or ())}
    if not getattr(body, "include_init_images", False):
        skipped |= {*_IMAGE_KEYS}
    shown = body.model_dump(exclude=skipped)
    absent: dict[str, Any] = {name: None for name in _IMAGE_KEYS if name in type(body).model_fields}
    return {**absent, **shown, "styles": [], "script_args": [], "alwayson_scripts": {}}


def progress_of(jobs: Sequence[Job]) -> Progress:
    """One progress for all of a caller's requests, the oldest first; at rest if there are none."""
    if not jobs:
        return Progress()
    count = sum(job.request.num_images for job in jobs)
    ready = sum(sum(picture is not None for picture in job.pictures) for job in jobs)
    step, steps = jobs[0].steps
    state = ProgressState(
        job="txt2img" if jobs[0].request.image is None else "img2img",
        job_count=count,
        job_no=ready,
        sampling_step=step,
        sampling_steps=steps,
    )
    # Not 0 while there is a job: clients take 0 for a server at rest, and not 1, which they take for its end.
    part = sum(job.progress * job.request.num_images for job in jobs) / count
    return Progress(
        progress=min(max(part, 0.01), 0.99), eta_relative=max(job.seconds_left for job in jobs), state=state
    )


def parsed_parameters(text: str) -> dict[str, str]:
    """The parts of a parameters text by name: Prompt, Negative prompt, Steps and so on. Empty for an empty text.

    A size is in two parts, Size-1 and Size-2, as in A1111's `parse_generation_parameters`. Its defaults of parts that
    the text does not have are left out.
    """
    if not text.strip():
        return {}
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last[:_MAX_PAIRS_TEXT])
    if len(pairs) < 3:  # a line of the prompt, which may have colons
        lines, pairs = [*lines, last], []
    prompt, _, negative = "\n".join(["", *lines]).partition(f"\n{_NEGATIVE}")
    return {
        "Prompt": prompt.removeprefix("\n"),
        "Negative prompt": negative.strip(),
        **{key: part for name, value in pairs for key, part in _parts(name.strip(), _unquoted(value))},
    }


def samplers() -> list[SamplerItem]:
    """All samplers."""
    return [SamplerItem(name=name, aliases=[*ALIASES[sampler]]) for sampler, name in A1111_SAMPLERS.items()]


def schedulers() -> list[SchedulerItem]:
    """All schedulers."""
    return [
        SchedulerItem(name=name, label=label, default_rho=7.0 if name == "karras" else -1.0)
        for name, label in SCHEDULERS.items()
    ]


def model_items(manifest: Manifest) -> list[ModelItem]:
    """The one model of the bundle."""
    model = ModelNames.of(manifest.source)
    return [
        ModelItem(
            title=model.title,
            model_name=model.name,
            hash=model.hash or None,
            sha256=model.sha256 or None,
            filename=model.name,
        )
    ]


def _parts(name: str, value: str) -> list[tuple[str, str]]:
    """A name and its value, or a name for each side of a size."""
    size = _SIZE.fullmatch(value)
    return [(name, value)] if size is None else [(f"{name}-{side}", size[side]) for side in (1, 2)]


def _unquoted(value: str) -> str:
    value = value.strip()
    if not (len(value) > 1 and value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
