"""The word store: every tenant's learned words, in a folder or at an fsspec URL. Synchronous, thread-safe, no cache.

    store.json                                        the layout's version
    blobs/<aa>/<sha256>.safetensors                   vectors, by identity; equal vectors are stored once
    names/<quoted tenant>/<quoted token>.json         WordRecord: which vectors a name means
    doomed/<sha256>                                   a blob that `gc` is about to delete

A name is one small file, and is written after its blob, so a reader of a name finds its vectors, and a word that is
put by one machine is visible to all others at once. Names of files are lower-case ASCII, so that two words never share
one, also where the file system ignores case or normalises Unicode.

**Deleting.** A blob is deleted by `gc` if no name refers to it and it was last touched longer ago than the grace.
`put`, `rename` and `delete` touch the blobs they are about to refer to or to release. A blob whose name is written
while `gc` runs is not lost: `gc` writes a mark, looks at the blob's age, deletes the blob, and puts it back if the mark
is gone by then; `put` writes the blob, then the name, then removes the mark, then writes the blob again if it is gone.
Whatever the order, either `gc` sees the young blob or the missing mark, or `put` sees the missing blob. This needs a
grace longer than a `put` takes.

Not covered: quotas, caches and prompts (`oneword.serve.words`). Two machines that replace the same word at the same
moment at a URL are not kept apart: the later one wins, whole. In a folder they are, by a lock.
"""

import bisect
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import msgspec

from oneword.engines.errors import ConceptError, UsageError
from oneword.engines.files import from_json
from oneword.runtime.concept import Concept, check_token, concept_bytes, concept_of, read_safetensors
from oneword.serve.errors import ApiError, Conflict, NotFound
from oneword.serve.files import Files, open_files, quoted, unquoted

DAY: Final = 86400.0
DAMAGED: Final = "damaged_word"
"""The code of the error for a word whose files are broken."""
MAX_BYTES: Final = 2 << 20  # a word's file has at most 1 MiB; the rest is room for its record
_VERSION: Final = b'{"version": 1}\n'
_IDENTITY: Final = re.compile(r"[0-9a-f]{64}")
_IDENTITIES: Final = re.compile(rb"[0-9a-f]{64}")
_GC_THREADS: Final = 16


@dataclass(frozen=True)
class WordRecord:
    """A name's content."""

    token: str
    identity: str
    """Of the vectors, as Concept.identity."""
    provenance: Mapping[str, str]
    generation: int
    """1 for a new name, one more with every replacement."""
    created: float
    """Seconds since 1970."""
    bytes: int
    """Of the blob."""
    vectors: Mapping[str, int]
    """The number of vectors by encoder."""


@dataclass(frozen=True)
class Collected:
    """What `gc` has deleted."""

    blobs: int = 0
    bytes: int = 0


class WordStore:
    """Words by tenant and token. The tenants' names may be any text."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """`url` is a folder or an fsspec URL. Raises UsageError if it cannot be used, or has another layout."""
        self._files: Files = open_files(url)
        self._clock = clock
        try:
            version = self._files.read("store.json")
            if version in (None, _VERSION):  # written each time: a store that can only be read is of no use
                self._files.write("store.json", _VERSION)
        except ApiError as error:
            cause = type(error.__cause__).__name__
            raise UsageError(
                f"the word store given by --words cannot be read and written ({cause}): check its address and rights"
            ) from error
        if version not in (None, _VERSION):
            raise UsageError("the word store given by --words has another layout: it is of another version of oneword")

    def put(
        self,
        tenant: str,
        concept: Concept,
        *,
        token: str | None = None,
        if_absent: bool = False,
        generation: int | None = None,
    ) -> WordRecord:
        """Stores a word under a name, by default its own, and replaces the word that had it.

        With `if_absent` there must be none, with `generation` it must have that one, else Conflict is raised. Raises
        ConceptError for an unsafe token.
        """
        token = concept.token if token is None else token
        check_token(token)
        data = blob_of(concept)
        path = _name_path(tenant, token)
        with self._files.locked(_folder(tenant)):
            raw = self._read(path)
            if if_absent and raw is not None:
                raise taken(token)
            old = None if raw is None else _record_or_none(raw, token)
            if generation is not None and (old is None or old.generation != generation):
                state = "does not exist" if raw is None else f"has generation {old.generation if old else 'unknown'}"
                raise Conflict(f"{token!r} {state}, expected is generation {generation}: read it again")
            record = WordRecord(
                token=token,
                identity=concept.identity,
                provenance=dict(concept.provenance),
                generation=1 + (0 if old is None else old.generation),
                created=self._clock(),
                bytes=len(data),
                vectors={encoder: len(rows) for encoder, rows in sorted(concept.vectors.items())},
            )
            if old is not None and old.identity != record.identity:
                self._files.touch(_blob_path(old.identity))  # its grace begins now
            self._files.write(_blob_path(record.identity), data)
            self._write_name(path, record, if_absent=if_absent)
            self._settle(record.identity, data)
        return record

    def get(self, tenant: str, token: str) -> WordRecord | None:
        """The word of this name, by one read; None if there is none. Raises ApiError if its record is damaged."""
        raw = self._read(_name_path(tenant, token))
        return None if raw is None else _record(raw, token)

    def first(self, tenant: str, tokens: Iterable[str]) -> WordRecord | None:
        """The first of these words that exists."""
        return next(filter(None, (self.get(tenant, token) for token in tokens)), None)

    def concept(self, record: WordRecord) -> Concept:
        """The word itself, by one read. Raises ApiError if its vectors are missing or damaged."""
        raw = self._read(_blob_path(record.identity))
        try:
            if raw is None or len(raw) > MAX_BYTES:
                raise damaged(record.token)
            concept = concept_of(*read_safetensors(raw, "blob"), "blob")
            if concept.identity != record.identity:
                raise damaged(record.token)
            return replace(concept, token=record.token, provenance=record.provenance)
        except ConceptError:
            raise damaged(record.token) from None

    def tokens(self, tenant: str) -> list[str]:
        """The names of all of a tenant's words, sorted, by listing one folder."""
        names = (name.removesuffix(".json") for name in self._files.names(_folder(tenant)) if name.endswith(".json"))
        return sorted(token for token in map(unquoted, names) if token is not None)

    def records(self, tenant: str, tokens: Iterable[str]) -> Iterator[WordRecord]:
        """The words of these names that exist and whose records are not damaged."""
        for token in tokens:
            raw = self._read(_name_path(tenant, token))
            record = None if raw is None else _record_or_none(raw, token)
            if record is not None:
                yield record

    def rename(self, tenant: str, old: str, new: str) -> WordRecord:
        """Gives a word another name. If it is interrupted, the word may have both.

        Raises NotFound, Conflict if the new name is taken, ConceptError if it is unsafe.
        """
        check_token(new)
        path = _name_path(tenant, new)
        with self._files.locked(_folder(tenant)):
            record = self.get(tenant, old)
            if record is None:
                raise NotFound(f"there is no word {old[:80]!r}: GET /v1/words lists yours", code="word_not_found")
            if new == old:
                return record
            data = self._read(_blob_path(record.identity))
            if data is None:
                raise damaged(old)
            if self._read(path) is not None:
                raise taken(new)
            record = replace(record, token=new, generation=1)
            self._files.write(_blob_path(record.identity), data)
            self._write_name(path, record, if_absent=True)
            self._settle(record.identity, data)
            self._files.delete(_name_path(tenant, old))
        return record

    def delete(self, tenant: str, token: str) -> bool:
        """Deletes a name; False if there is none. The vectors stay for the grace, and for other names."""
        path = _name_path(tenant, token)
        if self._read(path) is None:
            return False
        with self._files.locked(_folder(tenant)):
            raw = self._read(path)
            if raw is None:
                return False
            if record := _record_or_none(raw, token):
                self._files.touch(_blob_path(record.identity))
            self._files.delete(path)
        return True

    def gc(self, now: float, grace: float = DAY) -> Collected:
        """Deletes blobs that no name refers to and that nobody touched since `now - grace`, and interrupted writes.

        Reads every record; it may run at any time, beside any number of servers.
        """
        before = now - grace
        self._files.sweep(before)
        blobs, size = 0, 0
        for identity in sorted(self._identities() - self._identities_in_use()):
            deleted = self._delete_blob(identity, before)
            if deleted is not None:
                blobs, size = blobs + 1, size + deleted
        return Collected(blobs, size)

    def _read(self, path: str) -> bytes | None:
        """A file's content, of which more than MAX_BYTES count as damaged."""
        return self._files.read(path, MAX_BYTES)

    def _write_name(self, path: str, record: WordRecord, *, if_absent: bool) -> None:
        data = msgspec.json.encode(record)
        if len(data) > MAX_BYTES:
            raise ConceptError(
                f"{record.token!r} has a provenance of {len(data)} bytes, but at most {MAX_BYTES} are allowed"
            )
        if not if_absent:
            self._files.write(path, data)
        elif not self._files.create(path, data):
            raise taken(record.token)

    def _settle(self, identity: str, data: bytes) -> None:
        """The end of writing a name: whatever `gc` did in the meantime, the blob is there and stays."""
        if self._files.modified(_mark_path(identity)) is not None:
            self._files.delete(_mark_path(identity))
        if self._files.modified(_blob_path(identity)) is None:
            self._files.write(_blob_path(identity), data)

    def _delete_blob(self, identity: str, before: float) -> int | None:
        """Deletes a blob that has no name, if it is old; its size if it did."""
        path, mark = _blob_path(identity), _mark_path(identity)
        if self._is_younger(path, before):
            return None
        self._files.write(mark, b"-")
        try:
            data = self._read(path)
            if data is None or self._is_younger(path, before):
                return None
            self._files.delete(path)
            if self._files.modified(mark) is None:
                self._files.write(path, data)
                return None
            return len(data)
        finally:
            self._files.delete(mark)

    def _is_younger(self, path: str, before: float) -> bool:
        modified = self._files.modified(path)
        return modified is None or modified > before

    def _identities(self) -> set[str]:
        """Of all blobs."""
        names = (name for folder in self._files.names("blobs") for name in self._files.names(f"blobs/{folder}"))
        stems = (name.removesuffix(".safetensors") for name in names)
        return {stem for stem in stems if _IDENTITY.fullmatch(stem)}

    def _identities_in_use(self) -> set[str]:
        """Of all names. A record is searched for whatever may be one, so that a damaged record still holds its blob."""
        identities = set[str]()
        with ThreadPoolExecutor(_GC_THREADS) as threads:
            for tenant in self._files.names("names"):
                paths = (f"names/{tenant}/{name}" for name in self._files.names(f"names/{tenant}"))
                while part := [*islice(paths, 1000)]:
                    for raw in threads.map(self._read, part):
                        identities.update(match.decode() for match in _IDENTITIES.findall(raw or b""))
        return identities


def page(tokens: Sequence[str], after: str, limit: int) -> Sequence[str]:
    """At most `limit` of sorted tokens, those after a token that need not be among them."""
    start = bisect.bisect_right(tokens, after) if after else 0
    return tokens[start : start + limit]


def blob_of(concept: Concept) -> bytes:
    """A word's vectors as bytes, without its name and provenance. Raises ConceptError if they are too many."""
    return concept_bytes(replace(concept, token="word", provenance={}), f"the file of {concept.token!r}")


def _folder(tenant: str) -> str:
    return f"names/{quoted(tenant)}"


def _name_path(tenant: str, token: str) -> str:
    return f"{_folder(tenant)}/{quoted(token)}.json"


def _blob_path(identity: str) -> str:
    return f"blobs/{identity[:2]}/{identity}.safetensors"


def _mark_path(identity: str) -> str:
    return f"doomed/{identity}"


def _record(raw: bytes, token: str) -> WordRecord:
    """A record that was read from the file of this token. Raises ApiError if it is damaged."""
    try:
        record = from_json(raw, WordRecord)
    except ValueError:
        raise damaged(token) from None
    if record.token != token or not _IDENTITY.fullmatch(record.identity) or len(raw) > MAX_BYTES:
        raise damaged(token)
    return record


def _record_or_none(raw: bytes, token: str) -> WordRecord | None:
    try:
        return _record(raw, token)
    except ApiError:
        return None


def taken(token: str) -> Conflict:
    """The answer to a request for a new word whose name is not free."""
    return Conflict(f"there is a word {token!r} already: replace it, or take another name", code="word_exists")


def damaged(token: str) -> ApiError:
    """The answer to a request for a word whose file is broken."""
    return ApiError(500, f"the stored word {token[:80]!r} is damaged: upload it again, or delete it", DAMAGED)
