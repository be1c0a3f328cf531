"""Everything that openai-python does with images, against the server given as an address and a key; prints JSON."""

import asyncio
import base64
import io
import json
import sys

import openai
from PIL import Image

url, key = sys.argv[1] + "/v1", sys.argv[2]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=2, _strict_response_validation=True)
found: dict[str, object] = {}


def size(data: str | None) -> list[int]:
    assert data
    return list(Image.open(io.BytesIO(base64.b64decode(data))).size)


def png(colour: tuple[int, ...], mode: str = "RGB", side: int = 64) -> bytes:
    stream = io.BytesIO()
    picture = Image.new(mode, (side, side), colour)
    if mode == "RGBA":
        picture.paste((0, 0, 0, 0), (16, 16, 48, 48))
    picture.save(stream, "PNG")
    return stream.getvalue()


found["models"] = [model.id for model in client.models.list()]
answer = client.images.generate(model="gpt-image-1", prompt="a red ring", n=2, extra_body={"seed": 1, "steps": 4})
found["generate"] = [size(item.b64_json) for item in answer.data or []]
found["usage"] = answer.usage.model_dump() if answer.usage else None
answer = client.images.generate(prompt="a red ring", response_format="url", size="64x64", extra_body={"steps": 2})
link = (answer.data or [])[0]
assert link.b64_json is None
found["url"] = link.url

events = client.images.generate(
    prompt="a red ring", stream=True, partial_images=2, output_format="jpeg", extra_body={"steps": 6}
)
found["stream"] = [(event.type, size(event.b64_json)) for event in events]

picture, mask = png((200, 30, 30)), png((255, 255, 255, 255), "RGBA")
edited = client.images.edit(image=("blob", picture), mask=("m", mask), prompt="a blue star", extra_body={"steps": 4})
found["edit with mask"] = [size(item.b64_json) for item in edited.data or []]
found["edited"], found["uploaded"] = (edited.data or [])[0].b64_json, base64.b64encode(picture).decode()
edited = client.images.edit(image=[picture, png((0, 90, 0))], prompt="a blue star", extra_body={"steps": 4})
found["edit of two"] = [size(item.b64_json) for item in edited.data or []]
edited = client.images.edit(
    image=picture, prompt="a blue star", extra_body={"steps": 4, "guidance_interval": [0.2, 0.8]}
)
found["edit with an interval"] = [size(item.b64_json) for item in edited.data or []]
events = client.images.edit(image=picture, prompt="a star", stream=True, partial_images=1, extra_body={"steps": 4})
found["edit stream"] = [event.type for event in events]
varied = client.images.create_variation(image=picture, n=2, extra_body={"steps": 4})
found["variations"] = [size(item.b64_json) for item in varied.data or []]


async def asynchronous() -> list[list[int]]:
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
        calls = [client.images.generate(prompt=f"a {c} cat", extra_body={"steps": 3}) for c in ("red", "blue", "green")]
        return [size((answer.data or [])[0].b64_json) for answer in await asyncio.gather(*calls)]


async def streamed() -> list[tuple[str, list[int]]]:
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
        settings = {"stream": True, "partial_images": 1, "extra_body": {"steps": 4}}
        events = await client.images.generate(prompt="a red ring", **settings)
        return [(event.type, size(event.b64_json)) async for event in events]


found["async"] = asyncio.run(asynchronous())
found["async stream"] = asyncio.run(streamed())

# The server refuses the first request with this prompt, as it does while its queue is full.
answer = client.images.generate(prompt="a retried cat", extra_body={"steps": 2})
found["retried"] = [size(item.b64_json) for item in answer.data or []]

errors: dict[str, object] = {}
for name, call in {
    "word": lambda: client.images.generate(prompt="a photo of <nobody>"),
    "field": lambda: client.images.generate(prompt="a cat", extra_body={"guidence_scale": 3}),
    "size": lambda: client.images.generate(prompt="a cat", size="65x64"),
    "model": lambda: client.images.generate(prompt="a cat", model="another"),
    "key": lambda: openai.OpenAI(base_url=url, api_key="ow_wrong").images.generate(prompt="a cat"),
}.items():
    try:
        call()
    except openai.APIStatusError as error:
        errors[name] = [type(error).__name__, error.status_code, error.message, error.param]
found["errors"] = errors
print(json.dumps(found))
