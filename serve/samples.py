"""Small pictures that show what vectors mean, for previews of learning and for candidates of a refinement.

Not covered: queueing them, which each caller does in its own way.
"""

from typing import Final

from oneword.runtime.concept import Concept
from oneword.runtime.events import PictureDone
from oneword.runtime.request import Request
from oneword.serve.pictures import encode
from oneword.serve.state import State

STEPS: Final = 20
"""Denoising steps, if the bundle's default is not fewer."""
_QUALITY: Final = 90


def sample_request(state: State, prompt: str, concept: Concept, seed: int) -> Request:
    """One picture of a prompt that uses these vectors, whatever word is stored under their name."""
    steps = min(STEPS, state.manifest.defaults.steps)
    return Request(prompt, seed=seed, steps=steps, words={concept.token: concept})


async def sample_jpeg(state: State, picture: PictureDone) -> bytes:
    """The picture as it is sent and kept."""
    return await state.in_thread(encode, picture.image, "jpeg", _QUALITY, "")
