"""Refinements in progress, as small files of the word store. Not covered: the search (`oneword.runtime.refine`)."""

from oneword.runtime.aspects import DEFAULT_ASPECTS
from oneword.runtime.concept import Concept
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.refine import Refinement, refine_concept
from oneword.serve.files import Files, quoted


class Refinements:
    """By tenant and word. Synchronous; call it in a thread."""

    def __init__(self, files: Files, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._files = files

    def read(self, tenant: str, token: str) -> Refinement | None:
        """The state of a refinement. Raises UsageError if it is damaged."""
        data = self._files.read(_path(tenant, token))
        return None if data is None else Refinement.from_json(data.decode("utf-8", "replace"))

    def write(self, tenant: str, token: str, state: Refinement) -> None:
        """Keeps the state of a refinement."""
        self._files.write(_path(tenant, token), state.to_json().encode())

    def delete(self, tenant: str, token: str) -> None:
        """Forgets a refinement, which need not exist."""
        self._files.delete(_path(tenant, token))

    def begun(self, concept: Concept) -> Refinement:
        """The refinement that a refined word carries, else a new one from it. Raises UsageError."""
        return Refinement.of(concept) or refine_concept(concept, self.lexicon, DEFAULT_ASPECTS)


def _path(tenant: str, token: str) -> str:
    return f"refinements/{quoted(tenant)}/{quoted(token)}.json"
