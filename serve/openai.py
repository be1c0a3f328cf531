"""OpenAI's images API: /v1/images/{generations,edits,variations} and /v1/models, as its own clients call them.

Bodies and answers follow OpenAI's API reference of November 2026; `Settings` lists the fields that are ours.
Not covered: transparent backgrounds, SVG and animations, edits as JSON, and pictures as references for a new one: each
picture is edited by itself.
"""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal

import numpy.typing as npt
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from oneword.engines.errors import OnewordError
from oneword.runtime.events import PictureDone
from oneword.runtime.request import MAX_STEPS, Image, Request, ResolvedSettings
from oneword.runtime.samplers import Guidance, Sampler
from oneword.runtime.spacing import Spacing
from oneword.serve.errors import ApiError, Invalid, NotFound, Unprocessable, from_oneword, openai_body
from oneword.serve.fields import Fields, validated
from oneword.serve.forms import read_form
from oneword.serve.generate import cancel, enter, events, finish, fitted, prepare, reduced
from oneword.serve.kept import IdempotencyKey, answered, most_bytes, room
from oneword.serve.keys import Tenant
from oneword.serve.openapi import Responses, file_field, stream_response, upload
from oneword.serve.pictures import Format, as_base64, blank, decode, decode_mask, encode
from oneword.serve.pool import Generation
from oneword.serve.results import address
from oneword.serve.settings import B64_JSON, URL
from oneword.serve.state import State, caller
from oneword.serve.streams import EventStream, sse
from oneword.serve.worker import Done, Partial, Preview, Step

MAX_IMAGES: Final = 10
"""Pictures per prompt, as in OpenAI's API."""
MAX_UPLOADS: Final = 16
_OPENAI_MODELS: Final = ("dall-e", "gpt-image", "chatgpt-image")


class Settings(Fields):
    """The fields that all three routes share. Those below `user` are extensions of ours."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    size: Annotated[str, Field(pattern=r"^(|auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = None
    """Empty text counts as left out here, as in `model` and `response_format`: some clients always send them."""
    response_format: Literal["b64_json", "url", ""] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = None
    complexity: str | None = None
    moderation: str | None = None
    style: str | None = None
    input_fidelity: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    sampler: Sampler | None = None
    spacing: Spacing | None = None
    """Where the sampler's steps are; the model's own by default."""
    guidance: Guidance = Guidance.CFG
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    embedded_guidance: Annotated[float, Field(ge=0, le=50, allow_inf_nan=False)] | None = None
    guidance_rescale: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    eta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    clip_skip: Annotated[int, Field(ge=0, le=100)] = 0
    previews: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    """Steps between small previews in a stream; 0 means none."""


class GenerationBody(Settings):
    """POST /v1/images/generations."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a photo of a cat in the snow", "n": 1, "size": "auto", "response_format": "b64_json"},
                {"prompt": "a red ring", "seed": 7, "steps": 4, "sampler": "euler-a", "output_format": "webp"},
            ]
        }
    )

    prompt: str


class EditFields(Settings):
    """The text fields of POST /v1/images/edits."""

    prompt: str
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """How much of the picture is replaced: 1 with a mask and 0.8 without, by default."""


class VariationFields(Settings):
    """The text fields of POST /v1/images/variations."""

    prompt: str = ""
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None


class Picture(BaseModel):
    """One picture: `b64_json`, or `url` where response_format is "url", which is the default for some models."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="gives the same picture again; an extension")


class TokenDetails(BaseModel):
    """What was read, by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Text tokens are the prompt's ids, image tokens are latent positions."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class PicturesAnswer(BaseModel):
    """The answer of all three routes."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str = Field(examples=["512x512"])
    usage: Usage


class ListedModel(BaseModel):
    """A model, in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "oneword"


class ModelList(BaseModel):
    """The models, in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


@dataclass(frozen=True)
class Answer:
    """How the pictures go back: the settings of the response, and OpenAI's prefix of its stream's events."""

    http: HTTPRequest
    state: State
    tenant: Tenant
    settings: Settings
    prefix: str
    format: Format
    as_addresses: bool
    text_tokens: int
    image_tokens: int
    keep: bool
    """Whether the pictures are made even if the client leaves."""

    async def send(self, generations: Sequence[Generation]) -> Response:
        """The whole answer as JSON, or as a stream of events."""
        if self.settings.stream:
            return EventStream(self._events(generations), close=lambda: cancel(generations))
        files = await finish(None if self.keep else self.http, *generations, use=self._encoded)
        pictures = [picture for picture, _ in files]
        data = [await self._entry(picture, file) for picture, file in files]  # once all are ready
        first = pictures[0].settings
        answer = PicturesAnswer(
            created=int(time.time()),
            data=data,
            output_format=self.format,
            size=f"{first.width}x{first.height}",
            usage=self._usage(pictures),
        )
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    async def _entry(self, picture: PictureDone, data: bytes) -> Picture:
        if self.as_addresses:
            name = await self.state.in_thread(self.state.results.put, self.tenant, data, self.format)
            return Picture(url=address(self.http, name), seed=picture.seed)
        return Picture(b64_json=as_base64(data), seed=picture.seed)

    async def _encoded(self, generation: Generation, picture: PictureDone) -> bytes:
        compression = self.settings.output_compression
        return await self.state.in_thread(
            _file, generation, picture.image, self.format, compression, picture.parameters
        )

    async def _events(self, generations: Sequence[Generation]) -> AsyncGenerator[bytes]:
        """Server-sent events: partial pictures, our previews, one `completed` per picture, or an error."""
        partials: dict[tuple[int, int], int] = {}
        try:
            async for number, event in events(generations):
                key = number, event.index
                match event.event:
                    case Partial(image=image):
                        data = await self.state.in_thread(_file, generations[number], image, self.format, None, "")
                        index = partials.get(key, 0)
                        partials[key] = index + 1
                        yield self._event("partial_image", data, image.shape, partial_image_index=index)
                    case (
                        Step(step=step, steps=steps, denoised=estimate)
                        | Preview(step=step, steps=steps, image=estimate)
                    ) if estimate is not None:
                        preview = await self.state.in_thread(self.state.preview, estimate, generations[number].pasted)
                        yield self._event("preview", preview, None, index=event.index, step=step, steps=steps)
                    case Done(picture=picture):
                        data = await self._encoded(generations[number], picture)
                        usage = self._usage([picture]).model_dump()
                        fields = {"usage": usage, "index": event.index, "seed": picture.seed}
                        yield self._event("completed", data, picture.image.shape, **fields)
                    case _:
                        pass
        except (ApiError, OnewordError) as error:
            known = error if isinstance(error, ApiError) else from_oneword(error)
            yield sse("error", openai_body(known))

    def _event(self, name: str, data: bytes, shape: Sequence[int] | None, **fields: object) -> bytes:
        body: dict[str, object] = {"type": f"{self.prefix}.{name}", "b64_json": as_base64(data)}
        if shape is not None:
            body |= {
                "created_at": int(time.time()),
                "size": f"{shape[1]}x{shape[0]}",
                "quality": "auto",
                "background": "opaque",
                "output_format": self.format,
            }
        return sse(f"{self.prefix}.{name}", body | fields)

    def _usage(self, pictures: Sequence[PictureDone]) -> Usage:
        factor = self.state.manifest.vae.factor
        output = sum(p.settings.width * p.settings.height // factor**2 for p in pictures)
        read = self.text_tokens + self.image_tokens
        details = TokenDetails(image_tokens=self.image_tokens, text_tokens=self.text_tokens)
        return Usage(input_tokens=read, output_tokens=output, total_tokens=read + output, input_tokens_details=details)


_IMAGE: Final = file_field("the picture: PNG, JPEG or WebP")
_INTERVAL: Final[dict[str, Any]] = {
    "type": "string",
    "pattern": r"^\[?\s*[0-9.]+\s*,\s*[0-9.]+\s*\]?$",
    "description": "two numbers, between which guidance acts",
    "examples": ["0.2,0.8"],
}
_INTERVALS: Final[dict[str, Any]] = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 2,
    "maxItems": 2,
    "description": "the same, sent once for each number, instead of `guidance_interval`",
}
_TEXT: Final = {"guidance_interval": _INTERVAL, "guidance_interval[]": _INTERVALS}
_EDIT: Final = upload(
    EditFields,
    {
        "image": _IMAGE,
        "image[]": file_field("several pictures, instead of `image`", MAX_UPLOADS),
        "mask": file_field("a PNG as large as the first picture: what is transparent is repainted"),
    },
    text=_TEXT,
)
_EDIT["requestBody"]["content"]["multipart/form-data"]["schema"]["anyOf"] = [
    {"required": ["image"]},
    {"required": ["image[]"]},
]
_VARIATION: Final = upload(VariationFields, {"image": _IMAGE}, ("image",), text=_TEXT)


def _pictures_or_stream(prefix: str) -> Responses:
    """The answer of a route, whose events have this prefix."""
    names = (f"{prefix}.{name}" for name in ("partial_image", "preview", "completed"))
    return stream_response("The pictures; with `stream`, as events.", *names, "error")


router = APIRouter(tags=["OpenAI images"])


@router.get("/v1/models/", include_in_schema=False)
@router.get("/v1/models")
async def models(http: HTTPRequest) -> ModelList:
    """Lists the models: this server has one."""
    return ModelList(data=[_model(State.of(http))])


@router.get("/v1/models/{model:path}")
async def model(http: HTTPRequest, model: str) -> ListedModel:
    """Describes a model. 404 if this server does not have it."""
    _check_model(State.of(http), model)
    return _model(State.of(http))


@router.post("/v1/images/generations", response_model=PicturesAnswer, responses=_pictures_or_stream("image_generation"))
async def generations(http: HTTPRequest, body: GenerationBody, idempotency_key: IdempotencyKey = None) -> Response:
    """Generates pictures from a prompt. With `stream`, server-sent events: partial pictures, then the pictures."""
    state, tenant = caller(http)
    _check(state, body, 1)

    async def prepared() -> list[Generation]:
        request = await _request(state, body)
        return [await prepare(state, tenant, request, partials=body.partial_images or 0)]

    return await _answer(http, body, prepared, "image_generation", idempotency_key)


@router.post(
    "/v1/images/edits", response_model=PicturesAnswer, responses=_pictures_or_stream("image_edit"), openapi_extra=_EDIT
)
async def edits(http: HTTPRequest, idempotency_key: IdempotencyKey = None) -> Response:
    """Edits uploaded pictures, each by itself. The mask's transparent pixels are repainted in the first picture."""
    text, pictures, masks = await _form(http, "image", "image[]", masks=("mask",))
    body = validated(EditFields, text)
    if not pictures:
        raise Invalid("image is missing: upload a PNG, JPEG or WebP as `image`, or several as `image[]`", param="image")
    files = [_Edit(picture, masks[0] if masks and number == 0 else None) for number, picture in enumerate(pictures)]
    return await _edited(http, body, files, "image_edit", idempotency_key)


@router.post(
    "/v1/images/variations",
    response_model=PicturesAnswer,
    responses=_pictures_or_stream("image_generation"),
    openapi_extra=_VARIATION,
)
async def variations(http: HTTPRequest, idempotency_key: IdempotencyKey = None) -> Response:
    """Varies one uploaded picture."""
    text, pictures, _ = await _form(http, "image")
    body = validated(VariationFields, text)
    if len(pictures) != 1:
        raise Invalid(f"{len(pictures)} pictures were uploaded: upload exactly one, as `image`", param="image")
    return await _edited(http, body, [_Edit(pictures[0])], "image_generation", idempotency_key)


@dataclass(frozen=True)
class _Edit:
    """The files of one edit."""

    picture: bytes
    mask: bytes | None = None


async def _edited(
    http: HTTPRequest, body: EditFields | VariationFields, edits: list[_Edit], prefix: str, key: str | None
) -> Response:
    """Answers with the edited pictures. They are decoded once there is room for all of them, by their files' heads."""
    state, tenant = caller(http)
    _check(state, body, len(edits))

    async def prepared() -> list[Generation]:
        generations: list[Generation] = []
        for edit in edits:
            strength = body.strength or (0.8 if edit.mask is None else 1.0)
            image = await state.in_thread(blank, edit.picture, "image")
            request = await _request(state, body, size=reduced(state, image), image=image, strength=strength)
            partials = body.partial_images or 0
            generations.append(await prepare(state, tenant, request, partials=partials, beside=generations))
        for edit, generation in zip(edits, generations, strict=True):
            generation.request = await state.in_thread(_decoded, edit, generation.request, generation.settings)
        edits.clear()  # the client may leave before the answer is ready
        return generations

    files = [data for edit in edits for data in (edit.picture, edit.mask or b"")]
    return await _answer(http, body, prepared, prefix, key, files)


def _file(generation: Generation, image: Image, format: Format, compression: int | None, parameters: str) -> bytes:
    """A picture of a generation, or an estimate of it, as a file."""
    return encode(generation.pasted(image), format, compression, parameters)


def _decoded(edit: _Edit, request: Request, settings: ResolvedSettings) -> Request:
    """The request with its picture and mask. Raises ApiError."""
    image = decode(edit.picture, "image")
    mask = None if edit.mask is None else decode_mask(edit.mask, transparent=True)
    if request.size is not None and (mask is None or mask.shape == image.shape[:2]):
        image, mask = _middle(image, *request.size), None if mask is None else _middle(mask, *request.size)
        if mask is not None and not mask.any():
            raise Unprocessable(
                "the mask is opaque where the picture has the shape of this size, in its middle: leave the size out, "
                "or choose one of the picture's shape",
                "mask",
            )
    try:
        return fitted(replace(request, image=image, mask=mask), settings)
    except OnewordError as error:
        raise from_oneword(error) from None


def _middle(pixels: npt.NDArray[Any], width: int, height: int) -> npt.NDArray[Any]:
    """The largest part of a picture or mask, in its middle, that has the aspect ratio of this size."""
    h, w = pixels.shape[:2]
    rows, columns = max(1, min(h, round(w * height / width))), max(1, min(w, round(h * width / height)))
    top, left = (h - rows) // 2, (w - columns) // 2
    return pixels[top : top + rows, left : left + columns].copy()  # the rest is not needed while it waits


def _model(state: State) -> ListedModel:
    return ListedModel(id=state.name, created=state.created)


def _check_model(state: State, model: str) -> None:
    """Accepts this server's model and OpenAI's, which many clients always send. Raises NotFound."""
    if model != state.name and not model.startswith(_OPENAI_MODELS):
        raise NotFound(f"there is no model {model[:80]!r}, this server has {state.name!r}", param="model")


async def _request(state: State, body: GenerationBody | EditFields | VariationFields, **edit: Any) -> Request:
    """The body as a runtime Request. Raises ApiError."""
    return await state.read_text((body.prompt, body.negative_prompt), _built_request, body, body.prompt, **edit)


def _built_request(body: Settings, prompt: str, size: tuple[int, int] | None = None, **edit: Any) -> Request:
    """See `_request`; the body's own size goes before `size`. Takes milliseconds if the prompts are long."""
    steps = body.steps if body.num_inference_steps is None else body.num_inference_steps
    if body.steps is not None and steps != body.steps:
        raise Invalid(f"steps is {body.steps} and num_inference_steps {steps}: give one of the two", param="steps")
    if body.size and body.size != "auto":
        width, height = body.size.split("x")
        size = int(width), int(height)
    interval = body.guidance_interval
    try:
        return Request(
            prompt,
            body.negative_prompt,
            seed=secrets.randbelow(1 << 32) if body.seed is None else body.seed,
            num_images=body.n or 1,
            steps=steps,
            sampler=body.sampler,
            spacing=body.spacing,
            guidance=body.guidance,
            guidance_scale=body.guidance_scale,
            embedded_guidance=body.embedded_guidance,
            guidance_rescale=body.guidance_rescale,
            guidance_interval=None if interval is None else (interval[0], interval[1]),
            eta=body.eta,
            clip_skip=body.clip_skip,
            size=size,
            previews=body.previews if body.stream else 0,
            **edit,
        )
    except OnewordError as error:
        raise from_oneword(error) from None


def _check(state: State, body: Settings, count: int) -> None:
    """Raises ApiError for fields that do not go together, with so many pictures to edit or prompts."""
    if body.model:
        _check_model(state, body.model)
    if count * (body.n or 1) > MAX_IMAGES:
        raise Invalid(
            f"{count} pictures with n={body.n or 1} are too many: at most {MAX_IMAGES} results are allowed", param="n"
        )
    if body.stream and body.response_format == URL:
        raise Invalid("response_format is 'url' with stream, but must be b64_json", param="response_format")
    if body.partial_images and not body.stream:
        raise Invalid(f"partial_images is {body.partial_images} without stream: set stream to true", "partial_images")


async def _answer(
    http: HTTPRequest,
    body: Settings,
    prepared: Callable[[], Awaitable[Sequence[Generation]]],
    prefix: str,
    key: str | None,
    files: Sequence[bytes] = (),
) -> Response:
    """Answers with the pictures of what is prepared, or with those that were kept under the key."""
    if key is None:
        async with contextlib.AsyncExitStack() as stack:
            return await _drawn(http, body, await prepared(), prefix, stack)
    if body.stream:
        raise Invalid("stream is true with an Idempotency-Key: use one of the two", "stream")

    async def draw(stack: contextlib.AsyncExitStack) -> tuple[bytes, bool]:
        return bytes((await _drawn(http, body, await prepared(), prefix, stack, keep=True)).body), True

    return await answered(http, key, body, files, draw)


async def _drawn(
    http: HTTPRequest,
    body: Settings,
    generations: Sequence[Generation],
    prefix: str,
    stack: contextlib.AsyncExitStack,
    *,
    keep: bool = False,
) -> Response:
    """Queues the generations, all or none, and answers with their pictures. `stack` holds room for what is kept."""
    state, tenant = caller(http)
    in_json = bool(body.stream) or _response_format(state, body) == B64_JSON
    if keep or not in_json:
        size = sum(most_bytes(generation, in_json=in_json) for generation in generations)
        addresses = 0 if in_json else sum(generation.request.num_images for generation in generations)
        await stack.enter_async_context(room(state, tenant, size, addresses + int(keep)))
    factor = state.manifest.vae.factor
    requests = [generation.request for generation in generations]
    sources = [request.image.shape for request in requests if request.image is not None]
    answer = Answer(
        http=http,
        state=state,
        tenant=tenant,
        settings=body,
        prefix=prefix,
        format=body.output_format or "png",
        as_addresses=not in_json,
        text_tokens=await state.count_tokens(requests[0].prompt),  # before they are queued: it may fail
        image_tokens=sum((height // factor) * (width // factor) for height, width, _ in sources),
        keep=keep,
    )
    await enter(state, *generations)
    return await answer.send(generations)


def _response_format(state: State, body: Settings) -> str:
    """As the body says, else as OpenAI does for its own models, else as the server is set."""
    if body.response_format:
        return body.response_format
    if body.model and body.model != state.name:
        return URL if body.model.startswith("dall-e") else B64_JSON
    return state.settings.response_format


async def _form(
    http: HTTPRequest, *images: str, masks: Sequence[str] = ()
) -> tuple[dict[str, object], list[bytes], list[bytes]]:
    """A multipart body: text fields, pictures and at most one mask. Raises ApiError."""
    content = "the picture as the file `image`"
    form = await read_form(http, (*images, *masks), MAX_UPLOADS + 1, content, ("guidance_interval[]",))
    text: dict[str, object] = dict(form.text)
    if numbers := form.lists.get("guidance_interval[]"):
        if "guidance_interval" in text:
            raise Invalid("guidance_interval was sent with and without []: use one of the two", "guidance_interval")
        text["guidance_interval"] = numbers
    elif "guidance_interval" in text:
        text["guidance_interval"] = form.text["guidance_interval"].strip("[] ").split(",")
    given_masks = form.data(*masks)
    if len(given_masks) > 1:
        raise Invalid(f"{len(given_masks)} masks were uploaded, but at most one is allowed", param="mask")
    return text, form.data(*images), given_masks
