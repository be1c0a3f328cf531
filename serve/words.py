"""Learned words for requests: the ones that a tenant's prompts use, with their vectors. The store's asynchronous side.

Every read of the store runs in a thread. The name of a `<word>` or `embedding:word` is read for each request, so that a
word put by another server is used by the next request; vectors, which never change, are kept by identity. Bare names
and the shorter prefixes of embedding:words are looked up in the tenant's index, a list of its tokens that is a few
seconds old. Equal reads at the same time are made once.

Not covered: how a word is stored (`oneword.serve.store`), and how a prompt uses it (`oneword.runtime.prompt`).
"""

import asyncio
import bisect
import difflib
import functools
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, ParamSpec, TypeVar

from oneword.engines.errors import ConceptError, counted
from oneword.runtime.concept import Concept, check_token
from oneword.runtime.prompt import NamedWords, UnknownWord, Vocabulary, named_words, tokens_for, used_words
from oneword.serve.errors import ApiError, Conflict, Forbidden, Invalid, NotFound
from oneword.serve.keys import Tenant
from oneword.serve.shared import SharedCalls
from oneword.serve.store import DAMAGED, MAX_BYTES, WordRecord, WordStore, blob_of, damaged, page, taken
from oneword.serve.texts import LONG, are_long

P = ParamSpec("P")
T = TypeVar("T")

MAX_NAMES: Final = 256
"""Words that the prompts of one request may name."""
_INDEXED: Final = 2_000_000  # tokens in all tenants' indexes
_PART: Final = 8  # records that one thread reads in a row
_END: Final = re.compile(r"\W+$")
_LAST: Final = chr(0x10FFFF)
_NEAR: Final = 500  # tokens that an unknown name is compared with


class Index:
    """A tenant's tokens, sorted, and by their names without <> and case."""

    def __init__(self, tokens: Iterable[str], stamp: float) -> None:
        self.tokens = sorted(tokens)
        self.stamp = stamp
        """When it was read, on the clock."""
        self._names = sorted((_folded(token), token) for token in self.tokens)

    def __contains__(self, token: str) -> bool:
        position = bisect.bisect_left(self.tokens, token)
        return self.tokens[position : position + 1] == [token]

    def set(self, token: str, *, present: bool) -> None:
        """Adds or removes a token."""
        if present == (token in self):
            return
        tokens, names = self.tokens.copy(), self._names.copy()  # threads may be reading the old ones
        if present:
            bisect.insort(tokens, token)
            bisect.insort(names, (_folded(token), token))
        else:
            tokens.remove(token)
            names.remove((_folded(token), token))
        self.tokens, self._names = tokens, names

    def prefixes(self, run: str) -> list[str]:
        """The tokens whose names are prefixes of a run, without regard to <> and case."""
        names, text, matches = self._names, _folded(run), list[str]()
        position = bisect.bisect_right(names, (text, _LAST))
        while position > 0:
            name, token = names[position - 1]
            position -= 1
            if text.startswith(name):
                matches.append(token)
            else:  # what is still to come is at most as long as what this name and the text have in common
                text = text[: _common(text, name)]
                position = min(position, bisect.bisect_right(names, (text, _LAST)))
        return matches

    def near(self, name: str) -> list[str]:
        """Up to three tokens with a similar name, among those that are next to it in the alphabet. Takes up to half a
        second: call it in a thread."""
        names, text = self._names, _folded(name)
        middle = bisect.bisect_left(names, (text, ""))
        start = max(0, min(middle - _NEAR // 2, len(names) - _NEAR))
        nearby = dict(names[start : start + _NEAR])
        return [nearby[match] for match in difflib.get_close_matches(text, nearby, 3, 0.5)]


@dataclass(eq=False)
class _Tenant:
    """What is remembered of a tenant."""

    index: Index | None = None
    changes: list[tuple[str, bool]] | None = None
    """Tokens put (True) and deleted (False) while the index is being read."""
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes of words, by token, as far as they are known."""

    @property
    def entries(self) -> int:
        """Tokens that are remembered."""
        return (0 if self.index is None else len(self.index.tokens)) + len(self.sizes)


class Words:
    """The words of all tenants. To be used from one event loop."""

    def __init__(
        self,
        store: WordStore,
        *,
        knows: Callable[[str], bool] = lambda piece: False,
        resident: int = 100_000,
        resident_bytes: int = 2 << 30,
        index_seconds: float = 5.0,
        threads: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`knows` says whether a text such as <|endoftext|> is a token of the model, and no word: Tokenizer.knows.

        At most `resident` words, and `resident_bytes` of vectors, are kept in memory.
        """
        self.store = store
        self.evictions = 0
        """Words that had to make room for others."""
        self._knows = knows
        self._capacity, self._byte_capacity = resident, resident_bytes
        self._index_seconds = index_seconds
        self._clock = clock
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="words")
        self._concepts: OrderedDict[str, Concept] = OrderedDict()
        self._bytes = 0
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._quotas: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._reads = SharedCalls()

    @property
    def resident(self) -> int:
        """Words whose vectors are in memory."""
        return len(self._concepts)

    def close(self) -> None:
        """Ends the threads, after the reads and writes that are running."""
        self._threads.shutdown(cancel_futures=True)

    async def resolve(self, tenant: Tenant, prompts: Sequence[str], bare_names: bool) -> dict[str, Concept]:
        """The words that these prompts use, for Request.words.

        With `bare_names`, as in A1111, also those without <>, and those whose names differ in case.

        Raises Invalid for an unknown <word> or embedding:word, UsageError for a malformed prompt, and ApiError if the
        store fails or a word is damaged.
        """
        names = await self._names(prompts)
        if not (names.bracketed or names.embeddings or (bare_names and names.bare)):
            return {}
        records = await self._records(tenant, names, bare_names)
        concepts = await asyncio.gather(*map(self.concept, records))
        vocabulary = Vocabulary({concept.token: concept for concept in concepts}, bare_names, bare_names)
        try:
            used = await self._scan(prompts, lambda prompt: used_words(prompt, vocabulary, self._knows))
        except UnknownWord as error:
            index = await self._index(tenant, self._index_seconds)
            near = await self._run(index.near, error.name.removeprefix("embedding:"))
            similar = f"similar words: {', '.join(near)}" if near else "and none is similar: upload or learn it first"
            raise Invalid(f"there is no word {error.name[:80]!r}, {similar}", "prompt", "unknown_word") from None
        words = {concept.token: concept for concepts in used for concept in concepts}
        # Without bare names, a word is entered in a form that only <> finds: `cat` alone stays a cat.
        return words if bare_names else {f"<{token.strip('<>')}>": concept for token, concept in words.items()}

    async def put(
        self,
        tenant: Tenant,
        concept: Concept,
        *,
        token: str | None = None,
        if_absent: bool = False,
        generation: int | None = None,
    ) -> WordRecord:
        """As WordStore.put. Raises Forbidden if it would exceed the tenant's quota.

        To sum up the bytes, every record is read once, unless so many words of 2 MiB would fit into the quota.
        """
        token = concept.token if token is None else token
        async with self._quotas.setdefault(tenant.name, asyncio.Lock()):
            await self._check_quota(tenant, token, len(await self._run(blob_of, concept)))
            record = await self._run(
                self.store.put, tenant.name, concept, token=token, if_absent=if_absent, generation=generation
            )
            self._note(tenant, token, record)
        self._remember(await self._run(_named, concept, record))
        return record

    async def check_room(
        self, tenant: Tenant, token: str, size: int, learning: Collection[str], *, replace: bool
    ) -> None:
        """Whether a word of at least so many bytes can be put once those that the tenant is learning have been. Raises
        Conflict if its name is taken and it does not replace that word, Forbidden if it would exceed the quota."""
        if not replace:
            if token in learning:
                message = f"{token!r} is being learned: wait for the job or cancel it, or take another name"
                raise Conflict(message, code="word_exists")
            if await self._first(tenant, (token,)) is not None:
                raise taken(token)
        await self._check_quota(tenant, token, size, learning)

    async def get(self, tenant: Tenant, token: str) -> WordRecord:
        """The word with exactly this token. Raises NotFound."""
        record = await self._first(tenant, (token,))
        if record is None:
            raise NotFound(f"there is no word {token[:80]!r}: GET /v1/words lists yours", code="word_not_found")
        return record

    async def concept(self, record: WordRecord) -> Concept:
        """The word itself, from memory or by one read. Raises ApiError if its vectors are damaged."""
        concept = self._concepts.get(record.identity)
        if concept is None:
            try:
                concept = await self._reads(("vectors", record.identity), lambda: self._load(record))
            except ApiError as error:  # it may be that of another tenant's word with the same vectors
                raise (damaged(record.token) if error.code == DAMAGED else error) from None
        if record.identity in self._concepts:
            self._concepts.move_to_end(record.identity)
        if concept.token != record.token or dict(concept.provenance) != record.provenance:
            concept = _named(concept, record)
            if record.identity in self._concepts:
                self._concepts[record.identity] = concept
        return concept

    async def tokens(self, tenant: Tenant, limit: int | None = None) -> Sequence[str]:
        """The names of a tenant's words, sorted, at most a few seconds old."""
        return (await self._index(tenant, self._index_seconds)).tokens[:limit]

    async def rename(self, tenant: Tenant, old: str, new: str) -> WordRecord:
        """As WordStore.rename."""
        record = await self._run(self.store.rename, tenant.name, old, new)
        self._note(tenant, old, None)
        self._note(tenant, new, record)
        return record

    async def delete(self, tenant: Tenant, token: str) -> None:
        """Deletes a word. Raises NotFound."""
        deleted, identity = await self._run(_deleted, self.store, tenant.name, token)
        self._note(tenant, token, None)
        if identity is not None:
            self._forget(identity)
        if not deleted:
            raise NotFound(f"there is no word {token[:80]!r}: GET /v1/words lists yours", code="word_not_found")

    async def _names(self, prompts: Sequence[str]) -> NamedWords:
        """The names in all prompts together."""
        found = await self._scan(prompts, _named_words)
        return NamedWords(
            frozenset[str]().union(*(names.bracketed for names in found)),
            frozenset[str]().union(*(names.embeddings for names in found)),
            frozenset[str]().union(*(names.bare for names in found)),
        )

    async def _scan(self, prompts: Sequence[str], function: Callable[[str], T]) -> Sequence[T]:
        """A function of each prompt; in a thread if they are long."""
        if not are_long(prompts):
            return [function(prompt) for prompt in prompts]
        return await self._run(lambda: [function(prompt) for prompt in prompts])

    async def _records(self, tenant: Tenant, names: NamedWords, bare_names: bool) -> Sequence[WordRecord]:
        """The words that the names may mean, perhaps more than the prompts use."""
        exact = sorted(names.bracketed | names.embeddings)
        _check_count(len(exact))
        found = await asyncio.gather(*(self._first(tenant, tokens_for(name)) for name in exact))
        unfound = {name for name, record in zip(exact, found, strict=True) if record is None}
        missing = unfound & names.embeddings
        runs = names.bare | unfound if bare_names else missing
        if runs:
            index = await self._index(tenant, self._index_seconds)
            prefixes = await self._run(_prefixes, index, runs) if len(runs) > LONG // 8 else _prefixes(index, runs)
            # The end of a sentence belongs to the run but hardly to the name, which may be too new for the index.
            unended = {_END.sub("", run) for run in missing} - missing
            choices = [*(tokens_for(name) for name in unended), *((token,) for token in prefixes)]
            _check_count(len(choices))
            found += await asyncio.gather(*(self._first(tenant, tokens) for tokens in choices))
        return [*{record.token: record for record in found if record is not None}.values()]

    async def _first(self, tenant: Tenant, tokens: Sequence[str]) -> WordRecord | None:
        """The first of these words that exists now."""
        safe = tuple(filter(_is_token, tokens))
        if not safe:
            return None
        return await self._reads(("name", tenant.name, safe), lambda: self._run(self.store.first, tenant.name, safe))

    async def _load(self, record: WordRecord) -> Concept:
        concept = self._concepts.get(record.identity)
        if concept is None:
            concept = await self._run(_loaded, self.store, record)
            self._remember(concept)
        return concept

    def _remember(self, concept: Concept) -> None:
        """Keeps a word in memory, and evicts those that were used longest ago."""
        self._forget(concept.identity)
        self._concepts[concept.identity] = concept
        self._bytes += _bytes(concept)
        while self._concepts and (len(self._concepts) > self._capacity or self._bytes > self._byte_capacity):
            self._forget(next(iter(self._concepts)))
            self.evictions += 1

    def _forget(self, identity: str) -> None:
        concept = self._concepts.pop(identity, None)
        if concept is not None:
            self._bytes -= _bytes(concept)

    async def _index(self, tenant: Tenant, max_age: float) -> Index:
        """The tenant's index, read again if it is as old as `max_age` seconds."""
        known = self._tenant(tenant)
        if known.index is not None and self._clock() - known.index.stamp < max_age:
            return known.index
        return await self._reads(("index", tenant.name), lambda: self._read_index(tenant))

    async def _read_index(self, tenant: Tenant) -> Index:
        known, stamp = self._tenant(tenant), self._clock()
        known.changes = changes = list[tuple[str, bool]]()
        try:
            index = await self._run(_read_index, self.store, tenant.name, stamp)
        finally:
            known.changes = None
        for token, present in changes:
            index.set(token, present=present)
        known.index = index
        while len(self._tenants) > 1 and sum(known.entries for known in self._tenants.values()) > _INDEXED:
            self._tenants.popitem(last=False)
        return index

    def _tenant(self, tenant: Tenant) -> _Tenant:
        known = self._tenants.setdefault(tenant.name, _Tenant())
        self._tenants.move_to_end(tenant.name)
        return known

    def _note(self, tenant: Tenant, token: str, record: WordRecord | None) -> None:
        """Brings what is remembered of a tenant up to date: this word was put, or deleted if there is no record."""
        known = self._tenant(tenant)
        if known.index is not None:
            known.index.set(token, present=record is not None)
        if known.changes is not None:
            known.changes.append((token, record is not None))
        if record is not None:
            known.sizes[token] = record.bytes
        else:
            known.sizes.pop(token, None)

    async def _check_quota(self, tenant: Tenant, token: str, size: int, learning: Collection[str] = ()) -> None:
        """Raises Forbidden if a word of so many bytes, and those of the same size that are learned, are too many."""
        index = await self._index(tenant, self._index_seconds)
        coming = {name for name in learning if name not in index} - {token}
        count = len(index.tokens) + len(coming) + (token not in index)
        if count > tenant.max_words and token not in index:
            learned = f" and are learning {len(coming)}" if coming else ""
            raise Forbidden(
                f"you have {counted(len(index.tokens), 'word')}{learned}, and may have at most {tenant.max_words}: "
                "delete some first",
                code="quota_exceeded",
            )
        if count * MAX_BYTES <= tenant.max_bytes:
            return
        used = sum((await self._sizes(tenant)).values()) - self._tenant(tenant).sizes.get(token, 0)
        used += len(coming) * size
        if used + size > tenant.max_bytes:
            raise Forbidden(
                f"this word has {size} bytes and your others have {used}, but together they may have at most "
                f"{tenant.max_bytes}: delete some first",
                code="quota_exceeded",
            )

    async def _sizes(self, tenant: Tenant) -> Mapping[str, int]:
        """The bytes of all of a tenant's words, by token. Reads the records that are new to this server."""
        index, known = await self._index(tenant, self._index_seconds), self._tenant(tenant)
        missing = [token for token in index.tokens if token not in known.sizes]
        known.sizes |= dict.fromkeys(missing, 0)  # what a damaged word has
        known.sizes |= {record.token: record.bytes for record in await self._read(tenant, missing)}
        known.sizes = {token: known.sizes[token] for token in index.tokens if token in known.sizes}
        return known.sizes

    async def _read(self, tenant: Tenant, tokens: Sequence[str]) -> Sequence[WordRecord]:
        """The words of these tokens that exist and are not damaged."""
        parts = [tokens[start : start + _PART] for start in range(0, len(tokens), _PART)]
        found = await asyncio.gather(*(self._run(_records, self.store, tenant.name, part) for part in parts))
        return [record for records in found for record in records]

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function in a thread."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def list(self, tenant: Tenant, after: str = "", limit: int = 100) -> Sequence[WordRecord]:
        """A page of a tenant's words, sorted by token, from the first after `after`."""
        index = await self._index(tenant, self._index_seconds if after else 0)
        records = list[WordRecord]()
        while len(records) < limit and (tokens := page(index.tokens, after, limit - len(records))):
            records += await self._read(tenant, tokens)  # without those that are damaged or have just been deleted
            after = tokens[-1]
        return records


def _named_words(prompt: str) -> NamedWords:
    return named_words(prompt) if are_long((prompt,)) else _remembered_words(prompt)


@functools.lru_cache(64)  # most requests differ in their seed only
def _remembered_words(prompt: str) -> NamedWords:
    return named_words(prompt)


def _read_index(store: WordStore, tenant: str, stamp: float) -> Index:
    return Index(store.tokens(tenant), stamp)


def _prefixes(index: Index, runs: Iterable[str]) -> set[str]:
    return {token for run in runs for token in index.prefixes(run)}


def _records(store: WordStore, tenant: str, tokens: Sequence[str]) -> Sequence[WordRecord]:
    return [*store.records(tenant, tokens)]


def _deleted(store: WordStore, tenant: str, token: str) -> tuple[bool, str | None]:
    """Deletes a word: whether there was one, and its identity if that could be read."""
    identity = next((record.identity for record in store.records(tenant, [token])), None)
    return store.delete(tenant, token), identity


def _loaded(store: WordStore, record: WordRecord) -> Concept:
    return _named(store.concept(record), record)


def _named(concept: Concept, record: WordRecord) -> Concept:
    """The same vectors under a record's name; the identity is computed here, in the caller's thread."""
    named = replace(concept, token=record.token, provenance=record.provenance)
    _ = named.identity
    return named


def _bytes(concept: Concept) -> int:
    parts = (concept.vectors, concept.out, concept.layer_rows)
    return sum(vectors.nbytes for part in parts for vectors in part.values())


def _is_token(text: str) -> bool:
    try:
        check_token(text)
    except ConceptError:
        return False
    return True


def _check_count(count: int) -> None:
    if count > MAX_NAMES:
        raise Invalid(f"the prompts could name {count} words, but at most {MAX_NAMES} are allowed: use fewer", "prompt")


def _folded(text: str) -> str:
    return text.strip("<>").casefold()


def _common(a: str, b: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
