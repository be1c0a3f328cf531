"""Everything that webuiapi does with A1111's API, against the server given as an address and a key; prints JSON."""

import contextlib
import json
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageChops, ImageDraw
from webuiapi import WebUIApi

address, key = urlsplit(sys.argv[1]), sys.argv[2]
found: dict[str, object] = {}


def client() -> WebUIApi:
    settings = {"host": address.hostname, "port": address.port, "steps": 6}
    return WebUIApi(**settings, username="alice", password=key) if key else WebUIApi(**settings)


def pixel(image: Image.Image, x: int, y: int) -> list[int]:
    return list(image.convert("RGB").getpixel((x, y)))


api = client()
small = {"width": 64, "height": 64}

with contextlib.redirect_stdout(sys.stderr):  # it reports what it does
    found["samplers"] = api.util_get_sampler_names()
    found["schedulers"] = api.util_get_scheduler_names()
    found["models"] = api.util_get_model_names()
    api.refresh_checkpoints()
    api.util_set_model(api.util_get_model_names()[0])
    api.util_set_model("something like it")
    found["model"] = api.util_get_current_model()
    options = api.get_options()
    found["options"] = [bool(options), api.set_options(options), api.get_options() == options]
    found["embeddings"] = api.get_embeddings()
    found["lists"] = {
        name: getattr(api, f"get_{name}")()
        for name in ("scripts", "sd_vae", "upscalers", "loras", "hypernetworks", "prompt_styles", "cmd_flags", "memory")
    }
    found["rest"] = api.get_progress()
    api.util_wait_for_ready(check_interval=0.1)

ring = {"prompt": "a red ring", "negative_prompt": "blurry", "cfg_scale": 5, **small}
first = api.txt2img(**ring, seed=40, n_iter=2, batch_size=2)
found["txt2img"] = {
    "sizes": [list(image.size) for image in first.images],
    "seeds": first.info["all_seeds"],
    "sampler": first.info["sampler_name"],
    "infotexts": first.info["infotexts"],
    "parameters": first.parameters,
}
again = api.txt2img(**ring, seed=42, sampler_name="k_euler_a")
found["repeated"] = max(top for _, top in ImageChops.difference(again.image, first.images[2]).getextrema())
found["random"] = api.txt2img(prompt="a red ring", **small).info["seed"]
found["word"] = api.txt2img(prompt="a photo of toy", seed=1, **small).image.tobytes() != (
    api.txt2img(prompt="a photo of", seed=1, **small).image.tobytes()
)
found["png_info"] = api.png_info(first.image).info
found["karras"] = api.txt2img(
    prompt="a red ring",
    sampler_name="DPM++ 2M",
    scheduler="karras",
    override_settings={"CLIP_stop_at_last_layers": 2},
    **small,
).info["infotexts"]

picture = Image.new("RGB", (96, 64), "navy")
mask = Image.new("L", picture.size, 0)
ImageDraw.Draw(mask).rectangle((40, 24, 55, 39), fill=255)
edited = api.img2img(images=[picture], prompt="a red ring", denoising_strength=0.5, seed=7, **small)
found["img2img"] = [list(edited.image.size), edited.info["denoising_strength"], edited.parameters["init_images"]]
inpainting: dict[str, Any] = {"images": [picture], "mask_image": mask, "inpainting_fill": 1, "prompt": "a red ring"}
full = api.img2img(**inpainting, inpaint_full_res_padding=8, seed=7, **small).image
whole = api.img2img(**inpainting, inpaint_full_res=False, seed=7, width=96, height=64, denoising_strength=1).image
default = api.img2img(images=[picture], mask_image=mask, prompt="a red ring", seed=7, **small).image
inverted = api.img2img(**inpainting, inpaint_full_res=False, inpainting_mask_invert=1, mask_blur=0, width=96, height=64)
found["inpaint"] = {
    "full": [list(full.size), pixel(full, 5, 5), pixel(full, 47, 31)],
    "whole": [list(whole.size), pixel(whole, 5, 5), pixel(whole, 47, 31)],
    "default": [list(default.size), pixel(default, 5, 5), pixel(default, 47, 31)],
    "inverted": [pixel(inverted.image, 47, 31), pixel(inverted.image, 5, 5)],
}


def interrupted() -> dict[str, object]:
    """Starts eight long pictures, watches their progress from another client, and interrupts them."""
    answers: list[Any] = []
    request = {"prompt": "a red ring", "steps": 1000, "n_iter": 8, "seed": 3, **small}
    thread = threading.Thread(target=lambda: answers.append(client().txt2img(**request)))
    thread.start()
    other = client()
    seen = other.get_progress()
    while thread.is_alive() and not (seen["state"]["sampling_step"] >= 20 and seen["current_image"]):
        time.sleep(0.01)
        seen = other.get_progress()
    stopped = other.interrupt()
    thread.join(60)
    with contextlib.redirect_stdout(sys.stderr):
        other.util_wait_for_ready(check_interval=0.1)
    seen["current_image"] = bool(seen["current_image"])
    return {"progress": seen, "answer": stopped, "pictures": len(answers[0].images), "seed": answers[0].info["seed"]}


found["interrupt"] = interrupted()
found["skip"] = api.skip()

errors: dict[str, object] = {}
for name, settings in {
    "sampler": {"sampler_name": "PLMS"},
    "hr": {"enable_hr": True},
    "size": {"width": 63},
    "word": {"prompt": "a photo of <nobody>"},
}.items():
    try:
        api.txt2img(**{"prompt": "a red ring", **small, **settings})
    except RuntimeError as error:
        errors[name] = [error.args[0], json.loads(error.args[1])["detail"]]
found["errors"] = errors
print(json.dumps(found))
