"""Refining a word by likes over HTTP: `start`, `judge`, `undo`, `finish`; each but the last returns new candidates.

The state of a refinement is a small file in the store until `finish` writes the word, so any server can continue it,
and the stored word does not change until then. Not covered: the search itself (`oneword.runtime.refine`).
"""

from typing import Annotated, Final, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request as HTTPRequest

from oneword.runtime.concept import Concept
from oneword.runtime.refine import Refinement, finish, judge, propose, undo
from oneword.serve.errors import Conflict, Invalid
from oneword.serve.fields import Fields
from oneword.serve.generate import enter, prepare
from oneword.serve.generate import finish as finished_pictures
from oneword.serve.keys import Tenant
from oneword.serve.pictures import as_base64
from oneword.serve.refinements import Refinements
from oneword.serve.samples import sample_jpeg, sample_request
from oneword.serve.state import State, caller
from oneword.serve.words_api import Word

PROMPT: Final = "a photo of a {}"
_MAX_INDEX: Final = 15


class RefineBody(Fields):
    """The body of POST /v1/words/{name}/refine. `likes` and `dislikes` are candidates by index, from 0."""

    action: Literal["start", "judge", "undo", "finish"]
    likes: tuple[Annotated[int, Field(ge=0, le=_MAX_INDEX)], ...] = ()
    dislikes: tuple[Annotated[int, Field(ge=0, le=_MAX_INDEX)], ...] = ()
    round: Annotated[int, Field(ge=1)] | None = None
    """The round that is judged, needed with `judge`; or the judged round that `undo` undoes, by default the last one. A
    repeated request with a round, as after a lost answer, changes nothing."""
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
    candidates: list[Candidate] = Field(description="empty if no more rounds are possible")


router = APIRouter(tags=["refining"])


@router.post("/v1/words/{name}/refine")
async def refine(http: HTTPRequest, name: str, body: RefineBody) -> RefinementRound | Word:
    """Refines a word by likes. Answers the next round's candidates as pictures, or the word after `finish`."""
    state, tenant = caller(http)
    if body.action != "judge" and (body.likes or body.dislikes):
        raise Invalid(f"likes and dislikes were sent with {body.action!r}, but are allowed only with 'judge'", "likes")
    if "{}" not in body.prompt:
        raise Invalid(f"prompt is {body.prompt[:80]!r}, it needs a {{}} where the word should be", "prompt")
    if body.action == "judge" and body.round is None:
        raise Invalid("round is missing, it is needed with 'judge': send the number of the round", "round")
    if body.action in ("start", "finish") and body.round is not None:
        raise Invalid(
            f"round is {body.round} with {body.action!r}, but is allowed only with 'judge' and 'undo': leave it out",
            "round",
        )
    record = await state.words.get(tenant, name)
    refinements = state.refinements
    current = await state.in_thread(refinements.read, tenant.name, record)
    if current is None and body.action != "start":
        raise Conflict(f"no refinement of {name[:80]!r} is in progress: send the action 'start'")
    if current is None:
        current = await state.in_thread(refinements.begun, await state.words.concept(record))
    if body.action != "finish":  # if the store cannot be written, this fails before the pictures are drawn
        await state.in_thread(refinements.write, tenant.name, record, current)
    known = current
    match body.action:
        case "judge":
            current = await state.in_thread(_judged, current, body)
        case "undo":
            current = await state.in_thread(_undone, current, body.round)
        case "finish":
            word = await state.in_thread(_refined_word, current, refinements)
            answer = await state.words.put(tenant, word, token=name, generation=record.generation)
            await state.in_thread(refinements.delete, tenant.name, name)
            return Word.of(answer)
    candidates = await _candidates(http, state, tenant, current, body.prompt)
    if current is not known:  # a judgement that came while a `start` was drawn is kept
        await state.in_thread(refinements.write, tenant.name, record, current)
    return candidates


def _judged(current: Refinement, body: RefineBody) -> Refinement:
    """The state after the judgement; a repeated one, as after a lost answer, changes nothing. Raises Conflict."""
    done = len(current.rounds)
    if body.round == done:
        again = judge(undo(current), likes=body.likes, dislikes=body.dislikes)
        if again.rounds[-1].levels == current.rounds[-1].levels:
            return current
    if body.round != done + 1:
        raise Conflict(f"round is {body.round}, the round to judge is {done + 1}: send the action 'start' to see it")
    return judge(current, likes=body.likes, dislikes=body.dislikes)


def _undone(current: Refinement, number: int | None) -> Refinement:
    """The state before the last judgement; a repeated request, as after a lost answer, changes nothing. Raises
    Conflict, and UsageError if no round has been judged."""
    done = len(current.rounds)
    if number == done + 1:  # it is to be judged again
        return current
    if number not in (None, done):
        raise Conflict(f"round is {number}, rounds judged so far: {done}. Send the action 'start' to see the next one")
    return undo(current)


def _refined_word(current: Refinement, refinements: Refinements) -> Concept:
    return finish(current, refinements.lexicon())


def _proposed_words(current: Refinement, refinements: Refinements) -> tuple[Concept, ...]:
    return propose(current, refinements.lexicon())


async def _candidates(
    http: HTTPRequest, state: State, tenant: Tenant, current: Refinement, prompt: str
) -> RefinementRound:
    """The next round's candidates, drawn with one prompt and seed."""
    if not current.room:  # nothing is left but to finish, or to undo a round
        return RefinementRound(round=len(current.rounds) + 1, aspects=current.words, candidates=[])
    concepts = await state.in_thread(_proposed_words, current, state.refinements)
    prompt, seed = prompt.replace("{}", current.token), current.seed + len(current.rounds)
    requests = [await state.read_text((prompt,), sample_request, state, prompt, concept, seed) for concept in concepts]
    generations = [await prepare(state, tenant, request) for request in requests]
    await enter(state, *generations)
    found = await finished_pictures(http, *generations, use=lambda _, picture: sample_jpeg(state, picture))
    candidates = [
        Candidate(index=index, aspects=concept.provenance["aspects"], b64_json=as_base64(data))
        for index, (concept, (_, data)) in enumerate(zip(concepts, found, strict=True))
    ]
    return RefinementRound(round=len(current.rounds) + 1, aspects=current.words, candidates=candidates)
