"""Refining a word by likes over HTTP: `start`, `judge`, `undo`, `finish`; each but the last answers new candidates.

The state of a refinement is a small file in the store until `finish` writes the word, so any server can go on with it,
and the word itself stays as it is meanwhile. Not covered: the search itself (`oneword.runtime.refine`).
"""

from typing import Annotated, Final, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request as HTTPRequest

from oneword.engines.errors import UsageError
from oneword.runtime.refine import Refinement, finish, judge, propose, undo
from oneword.runtime.request import Request
from oneword.serve.errors import Conflict, Invalid
from oneword.serve.fields import Fields
from oneword.serve.generate import finish as finished
from oneword.serve.keys import Tenant
from oneword.serve.pictures import as_base64, encode
from oneword.serve.state import State, caller
from oneword.serve.words_api import Word

PROMPT: Final = "a photo of a {}"
STEPS: Final = 20
"""Denoising steps of a candidate's picture, if the bundle's default is not fewer."""
_MAX_INDEX: Final = 15


class RefineBody(Fields):
    """The body of POST /v1/words/{name}/refine. `likes` and `dislikes` are candidates by index, from 0."""

    action: Literal["start", "judge", "undo", "finish"]
    likes: tuple[Annotated[int, Field(ge=0, le=_MAX_INDEX)], ...] = ()
    dislikes: tuple[Annotated[int, Field(ge=0, le=_MAX_INDEX)], ...] = ()
    prompt: str = PROMPT
    """What the candidates draw; {} is the word."""


class Candidate(BaseModel):
    """A candidate of a round."""

    index: int
    aspects: str = Field(description="what it is made of")
    b64_json: str
    output_format: Literal["jpeg"] = "jpeg"


class RefinementRound(BaseModel):
    """A round to judge."""

    object: Literal["refinement"] = "refinement"
    round: int = Field(description="from 1")
    aspects: dict[str, str] = Field(description="the best word so far of each aspect")
    candidates: list[Candidate]


router = APIRouter(tags=["refining"])


@router.post("/v1/words/{name}/refine")
async def refine(http: HTTPRequest, name: str, body: RefineBody) -> RefinementRound | Word:
    """Refines a word by likes. Answers the next round's candidates as pictures, or the word after `finish`."""
    state, tenant = caller(http)
    if body.action != "judge" and (body.likes or body.dislikes):
        raise Invalid(f"likes and dislikes were sent with {body.action!r}, allowed is action 'judge'", "likes")
    if "{}" not in body.prompt:
        raise Invalid(f"prompt is {body.prompt[:80]!r}, it needs a {{}} where the word should be", "prompt")
    record = await state.words.get(tenant, name)
    refinements = state.refinements
    current = await state.in_thread(refinements.read, tenant.name, name)
    if body.action == "start" or current is None:
        if body.action != "start":
            raise Conflict(f"no refinement of {name[:80]!r} is in progress: send the action 'start'")
        current = await state.in_thread(refinements.begun, await state.words.concept(record))
    match body.action:
        case "judge":
            current = judge(current, likes=body.likes, dislikes=body.dislikes)
        case "undo":
            current = undo(current)
        case "finish":
            word = await state.in_thread(finish, current, refinements.lexicon)
            answer = Word.of(await state.words.put(tenant, word, token=name))
            await state.in_thread(refinements.delete, tenant.name, name)
            return answer
    candidates = await _candidates(http, state, tenant, current, body.prompt)
    await state.in_thread(refinements.write, tenant.name, name, current)
    return candidates


async def _candidates(
    http: HTTPRequest, state: State, tenant: Tenant, current: Refinement, prompt: str
) -> RefinementRound:
    """The next round's candidates, drawn with one prompt and seed."""
    if not current.room:
        raise UsageError("this word has had the most rounds that are possible: finish, or undo one")
    concepts = await state.in_thread(propose, current, state.refinements.lexicon)
    requests = [
        Request(
            prompt.replace("{}", current.token),
            seed=current.seed + len(current.rounds),
            steps=min(STEPS, state.manifest.defaults.steps),
            words={current.token: concept},
        )
        for concept in concepts
    ]
    generations = [state.pool.submit(tenant, request) for request in requests]
    pictures = await finished(http, *generations)
    encoded = [await state.in_thread(encode, picture.image, "jpeg", 90, "") for picture in pictures]
    candidates = [
        Candidate(index=index, aspects=concept.provenance["aspects"], b64_json=as_base64(data))
        for index, (concept, data) in enumerate(zip(concepts, encoded, strict=True))
    ]
    return RefinementRound(round=len(current.rounds) + 1, aspects=current.words, candidates=candidates)
