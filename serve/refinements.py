"""Refinements in progress, as small files of the word store. Not covered: the search (`oneword.runtime.refine`)."""

import threading
from collections.abc import Callable

import msgspec

from oneword.engines.errors import OnewordError
from oneword.engines.files import from_json
from oneword.runtime.concept import Concept
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.refine import Refinement, known_aspects, refine_concept
from oneword.serve.files import Files, quoted
from oneword.serve.store import WordRecord


class _Record(msgspec.Struct, frozen=True):
    """A refinement, and the word that it was begun from."""

    identity: str
    generation: int
    refinement: str


class Refinements:
    """By tenant and word. Synchronous; call it in a thread."""

    def __init__(self, files: Files, read_lexicon: Callable[[], Lexicon]) -> None:
        """`read_lexicon` is called once, when somebody first refines a word: it reads the model's whole vocabulary."""
        self._files, self._read_lexicon = files, read_lexicon
        self._lexicon: Lexicon | None = None
        self._lock = threading.Lock()

    def lexicon(self) -> Lexicon:
        """The rows of the model's vocabulary."""
        with self._lock:  # the first users wait for one read
            if self._lexicon is None:
                self._lexicon = self._read_lexicon()
            return self._lexicon

    def read(self, tenant: str, record: WordRecord) -> Refinement | None:
        """The state of a word's refinement; None if there is none, or if the word has been replaced since it began."""
        data = self._files.read(_path(tenant, record.token))
        if data is None:
            return None
        try:
            progress = from_json(data, _Record)
            same = (progress.identity, progress.generation) == (record.identity, record.generation)
            return Refinement.from_json(progress.refinement) if same else None
        except (ValueError, OnewordError):  # damaged, or of another version: as if there were none
            return None

    def write(self, tenant: str, record: WordRecord, state: Refinement) -> None:
        """Keeps the state of a word's refinement."""
        progress = _Record(record.identity, record.generation, state.to_json())
        self._files.write(_path(tenant, record.token), msgspec.json.encode(progress))

    def delete(self, tenant: str, token: str) -> None:
        """Forgets a refinement, which need not exist."""
        self._files.delete(_path(tenant, token))

    def begun(self, concept: Concept) -> Refinement:
        """The refinement that a refined word carries, else a new one that starts from the word. Raises UsageError."""
        carried = Refinement.of(concept)
        if carried and carried.room:
            return carried
        lexicon = self.lexicon()
        return refine_concept(concept, lexicon, known_aspects(lexicon))


def _path(tenant: str, token: str) -> str:
    return f"refinements/{quoted(tenant)}/{quoted(token)}.json"
