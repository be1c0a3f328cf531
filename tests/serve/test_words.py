"""The words of requests, from real stores. Coroutines run by asyncio.run; reads are counted at the store's files."""

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneword.engines.errors import ConceptError, UsageError
from oneword.runtime.concept import Concept
from oneword.runtime.prompt import Vocabulary, used_words
from oneword.serve.errors import ApiError, Conflict, Forbidden, Invalid, NotFound, Unavailable
from oneword.serve.keys import Tenant
from oneword.serve.store import WordStore
from oneword.serve.words import Index, Words

T = TypeVar("T")

ALICE, BOB = Tenant("alice"), Tenant("bob")


def word(token: str = "<toy>", value: float = 1.0, **provenance: str) -> Concept:
    return Concept(token, {"text_encoder": np.full((2, 8), value, np.float32)}, provenance)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Files:
    """A store's files that count what is done with them, by kind, and can hold up the results."""

    def __init__(self, store: WordStore) -> None:
        self._inner = store._files
        self.calls: list[tuple[str, str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        store._files = self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*args: Any) -> Any:
            self.calls.append((name, args[0]))
            self.threads.add(threading.get_ident())
            result = method(*args)
            self.entered.release()
            assert self.gate.wait(20)
            return result

        return method if name == "locked" else call

    def kinds(self) -> list[str]:
        """What was read: name, blob or list."""
        kinds = {"names": "list", "read": "name"}
        return ["blob" if path.startswith("blobs/") else kinds.get(name, name) for name, path in self.calls]


@pytest.fixture
def store(tmp_path: Path) -> WordStore:
    return WordStore(str(tmp_path))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def words(store: WordStore, clock: Clock) -> Iterator[Words]:
    words = Words(store, clock=clock, knows=lambda piece: piece == "<|endoftext|>")
    yield words
    words.close()


def run(awaitable: Awaitable[T]) -> T:
    async def main() -> T:
        return await awaitable

    return asyncio.run(main())


def resolved(words: Words, *prompts: str, bare: bool = False, tenant: Tenant = ALICE) -> dict[str, float]:
    """The words that prompts use, each with its value."""
    found = run(words.resolve(tenant, prompts, bare))
    return {token: float(concept.vectors["text_encoder"][0, 0]) for token, concept in found.items()}


def test_only_the_words_that_the_prompts_use_are_returned(store: WordStore, words: Words) -> None:
    for value, token in enumerate(["<toy>", "<gem>", "<Hat>", "cat", "<other>"], 1):
        store.put("alice", word(token, value))

    assert resolved(words, "a <toy>", "no (embedding:gem:1.2)") == {"<toy>": 1, "<gem>": 2}
    assert resolved(words, "a <TOY> and <cat>, no cat") == {"<toy>": 1, "<cat>": 4}
    assert resolved(words, "embedding:<Hat> [embedding:Cat]") == {"<Hat>": 3, "<cat>": 4}
    assert resolved(words, "a cat and a toy") == {}
    assert resolved(words, "a cat and a toy", bare=True) == {"cat": 4}
    assert resolved(words, "Cats concat cat's", bare=True) == {"cat": 4}
    assert resolved(words, "") == {}
    assert resolved(words) == {}


def test_case_does_not_matter_in_a1111s_api(store: WordStore, words: Words) -> None:
    """There CLIP's tokenizer, which lower-cases all text, reads the names of embeddings too."""
    store.put("alice", word("EasyNegative", 1))
    for prompt in ("bad, easynegative", "EASYNEGATIVE", "<easyNegative>", "embedding:easynegative"):
        assert resolved(words, prompt, bare=True) == {"EasyNegative": 1}, prompt
    with pytest.raises(Invalid, match=r"there is no word '<easynegative>', similar words: EasyNegative"):
        run(words.resolve(ALICE, ["<easynegative>"], False))


def test_the_requests_own_vocabulary_finds_the_same_words(store: WordStore, words: Words) -> None:
    for value, token in enumerate(["<toy>", "toy", "TOY", "cat", "Dog"], 1):
        store.put("alice", word(token, value))
    for prompt in ("<toy> <TOY> <Toy>", "<cat> cat <CAT>", "embedding:Dog, <Dog>, Dog", "embedding:cats"):
        found = run(words.resolve(ALICE, [prompt], False))
        everything = Vocabulary(
            {record.token: store.concept(record) for record in store.records("alice", store.tokens("alice"))}, False
        )
        expected = [concept.identity for concept in used_words(prompt, everything, lambda piece: False)]
        vocabulary = Vocabulary(found, ignore_case=True)
        assert [c.identity for c in used_words(prompt, vocabulary, lambda piece: False)] == expected, prompt


PIECES = ["<", ">", "a", "A", "b", "embedding:", "-", ".", " ", "(", ")", "é", "É", "BREAK", "<a>", "<B>"]
TOKENS = ["<a>", "<A>", "a", "A", "<b>", "ab", "a.b", "b.", "é", "<É>", "a-embedding"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join), st.sets(st.sampled_from(TOKENS)), st.booleans())
def test_any_prompt_gets_the_words_that_the_tokenizer_would_find_among_all(
    prompt: str, tokens: set[str], bare_names: bool
) -> None:
    store = WordStore("memory://words-property")
    for token in store.tokens("alice"):
        if token not in tokens:
            store.delete("alice", token)
    for token in sorted(tokens - set(store.tokens("alice"))):
        store.put("alice", word(token, 1.0 + TOKENS.index(token)))
    known = {token: word(token, 1.0 + TOKENS.index(token)) for token in tokens}
    everything = Vocabulary(known, bare_names, ignore_case=bare_names)
    words = Words(store)
    try:
        expected = {concept.identity for concept in used_words(prompt, everything, lambda piece: False)}
    except UsageError:
        with pytest.raises((Invalid, UsageError)):
            run(words.resolve(ALICE, [prompt], bare_names))
    else:
        found = run(words.resolve(ALICE, [prompt], bare_names))
        assert {concept.identity for concept in found.values()} == expected
        vocabulary = Vocabulary(found, ignore_case=True)
        assert {c.identity for c in used_words(prompt, vocabulary, lambda piece: False)} == expected
    finally:
        words.close()


def test_an_embedding_is_the_longest_known_name(store: WordStore, words: Words) -> None:
    for value, token in enumerate(["<toy>", "<toys>", "t", "<Toyshop>"], 1):
        store.put("alice", word(token, value))

    assert resolved(words, "embedding:toystore") == {"<toys>": 2}
    assert resolved(words, "embedding:toy.") == {"<toy>": 1}
    assert resolved(words, "embedding:t.") == {"<t>": 3}


def test_an_unknown_word_is_refused_by_name_with_similar_ones(store: WordStore, words: Words) -> None:
    for token in ("<toy>", "<toys>", "<gem>"):
        store.put("alice", word(token))

    with pytest.raises(Invalid, match=r"^there is no word '<toyy>', similar words: <toy>, <toys>$") as info:
        run(words.resolve(ALICE, ["a <toyy>"], False))
    assert (info.value.param, info.value.code) == ("prompt", "unknown_word")
    with pytest.raises(
        Invalid, match="there is no word 'embedding:xyz', and none is similar: upload or learn it first"
    ):
        run(words.resolve(ALICE, ["embedding:xyz"], True))
    with pytest.raises(Invalid, match="there is no word '<toy>'"):
        run(words.resolve(BOB, ["a <toy>"], False))


def test_a_token_of_the_model_is_not_a_word(words: Words, store: WordStore) -> None:
    files = Files(store)

    assert resolved(words, "a <|endoftext|>") == {}
    assert files.calls == []


def test_a_malformed_prompt_is_a_usage_error(words: Words) -> None:
    with pytest.raises(UsageError, match="weight"):
        run(words.resolve(ALICE, ["(a:1.2.3)"], False))


def test_a_request_may_not_name_more_than_256_words(words: Words, store: WordStore) -> None:
    files = Files(store)

    with pytest.raises(Invalid, match="257 words, but at most 256 are allowed"):
        run(words.resolve(ALICE, ["".join(f"<w{number}>" for number in range(257))], False))
    assert files.calls == []


def test_a_word_put_by_another_server_is_used_by_the_next_request(tmp_path: Path, words: Words) -> None:
    other = WordStore(str(tmp_path))
    with pytest.raises(Invalid):
        resolved(words, "<toy>")
    for value in (1.0, 2.0, 3.0):
        other.put("alice", word("<toy>", value))
        other.put("alice", word("gem", value))
        assert resolved(words, "<toy> embedding:gem, embedding:toy.") == {"<toy>": value, "<gem>": value}
    other.delete("alice", "<toy>")
    with pytest.raises(Invalid):
        resolved(words, "<toy>")


def test_bare_names_are_known_after_the_index_is_refreshed(tmp_path: Path, words: Words, clock: Clock) -> None:
    other = WordStore(str(tmp_path))
    assert resolved(words, "a toy", bare=True) == {}
    other.put("alice", word("toy", 2))
    clock.seconds = 4.9
    assert resolved(words, "a toy", bare=True) == {}
    clock.seconds = 5.0
    assert resolved(words, "a toy", bare=True) == {"toy": 2}
    other.put("alice", word("toy", 3))
    assert resolved(words, "a toy", bare=True) == {"toy": 3}, "the name itself is always read"
    other.delete("alice", "toy")
    assert resolved(words, "a toy", bare=True) == {}


def test_this_servers_own_changes_are_in_the_index_at_once(words: Words) -> None:
    assert resolved(words, "toy gem", bare=True) == {}
    run(words.put(ALICE, word("toy", 2)))
    assert resolved(words, "toy gem", bare=True) == {"toy": 2}
    run(words.rename(ALICE, "toy", "gem"))
    assert resolved(words, "toy gem", bare=True) == {"gem": 2}
    run(words.delete(ALICE, "gem"))
    assert resolved(words, "toy gem", bare=True) == {}


def test_a_lookup_is_one_name_and_the_first_time_one_blob(store: WordStore, words: Words) -> None:
    store.put("alice", word())
    files = Files(store)

    resolved(words, "a <toy> and embedding:toy")
    assert files.kinds() == ["name", "blob"]
    resolved(words, "a <toy>")
    assert files.kinds() == ["name", "blob", "name"]
    assert threading.get_ident() not in files.threads


def test_equal_reads_at_the_same_time_are_made_once_and_none_is_older_than_its_request(
    store: WordStore, words: Words
) -> None:
    store.put("alice", word(value=1))
    files = Files(store)

    async def main() -> None:
        files.gate.clear()
        early = [asyncio.ensure_future(words.resolve(ALICE, ["<toy>"], False)) for _ in range(50)]
        await asyncio.to_thread(files.entered.acquire)  # the name has been read
        late = [asyncio.ensure_future(words.resolve(ALICE, ["<toy>"], False)) for _ in range(50)]
        await asyncio.sleep(0)
        files._inner.write(*replacement)  # after the question of `late`
        files.gate.set()
        results = await asyncio.gather(*early, *late)
        values = [float(found["<toy>"].vectors["text_encoder"][0, 0]) for found in results]
        assert values == [1.0] * 50 + [2.0] * 50

    path = "names/alice/=3ctoy=3e.json"
    second = WordStore(str(store._files._inner.root))
    second.put("alice", word(value=2))
    replacement = (path, second._files.read(path))
    second.put("alice", word(value=1))
    asyncio.run(main())
    assert files.kinds().count("name") == 2
    assert files.kinds().count("blob") == 2


def test_a_cancelled_request_does_not_cancel_the_read_of_another(store: WordStore, words: Words) -> None:
    store.put("alice", word())
    files = Files(store)

    async def main() -> None:
        files.gate.clear()
        first = asyncio.ensure_future(words.resolve(ALICE, ["<toy>"], False))
        second = asyncio.ensure_future(words.resolve(ALICE, ["<toy>"], False))
        await asyncio.to_thread(files.entered.acquire)
        first.cancel()
        files.gate.set()
        assert set(await second) == {"<toy>"}
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(main())


def test_equal_vectors_are_resident_once_under_any_name(store: WordStore, words: Words) -> None:
    store.put("alice", word("<toy>", note="a"))
    store.put("bob", word("gem", note="b"))

    mine = run(words.resolve(ALICE, ["<toy>"], False))["<toy>"]
    theirs = run(words.resolve(BOB, ["<gem>"], False))["<gem>"]

    assert words.resident == 1
    assert (mine.token, mine.provenance, theirs.token, theirs.provenance) == (
        "<toy>",
        {"note": "a"},
        "gem",
        {"note": "b"},
    )
    assert mine.identity == theirs.identity


def test_the_words_used_longest_ago_are_evicted(store: WordStore) -> None:
    for value in range(1, 5):
        store.put("alice", word(f"w{value}", value))
    words = Words(store, resident=2)
    files = Files(store)
    for prompt in ("<w1>", "<w2>", "<w1>", "<w3>", "<w1>"):
        resolved(words, prompt)
    assert (words.resident, words.evictions) == (2, 1)
    assert files.kinds().count("blob") == 3
    resolved(words, "<w2>")
    assert files.kinds().count("blob") == 4
    assert len(resolved(words, "<w1> <w2> <w3> <w4>")) == 4
    words.close()

    words = Words(store, resident_bytes=word().vectors["text_encoder"].nbytes * 2)
    assert len(resolved(words, "<w1> <w2> <w3> <w4>")) == 4
    assert words.resident == 2
    words.close()

    words = Words(store, resident_bytes=1)
    assert resolved(words, "<w1> <w2>") == {"<w1>": 1, "<w2>": 2}
    assert words.resident == 0
    words.close()


def test_a_deleted_word_is_not_kept_in_memory(words: Words) -> None:
    run(words.put(ALICE, word()))
    assert words.resident == 1
    run(words.delete(ALICE, "<toy>"))
    assert words.resident == 0
    with pytest.raises(NotFound):
        run(words.delete(ALICE, "<toy>"))


def test_words_are_put_got_listed_and_renamed(words: Words, store: WordStore) -> None:
    records = [run(words.put(ALICE, word(token))) for token in ("<b>", "<a>", "c")]

    assert run(words.get(ALICE, "<a>")) == records[1]
    assert [record.token for record in run(words.list(ALICE))] == ["<a>", "<b>", "c"]
    assert [record.token for record in run(words.list(ALICE, "<a>", 1))] == ["<b>"]
    assert run(words.tokens(ALICE, 2)) == ["<a>", "<b>"]
    assert run(words.list(BOB)) == []
    assert run(words.rename(ALICE, "c", "d")).token == "d"
    with pytest.raises(NotFound, match="there is no word 'c'"):
        run(words.get(ALICE, "c"))
    with pytest.raises(NotFound):
        run(words.get(BOB, "d"))
    with pytest.raises(NotFound):
        run(words.get(ALICE, "../d"))
    with pytest.raises(Conflict):
        run(words.put(ALICE, word("d"), if_absent=True))
    with pytest.raises(ConceptError):
        run(words.put(ALICE, word("d"), token="a/b"))
    assert run(words.put(ALICE, word("d"), token="e", generation=None)).token == "e"
    store.put("alice", word("f"))
    assert [record.token for record in run(words.list(ALICE))] == ["<a>", "<b>", "d", "e", "f"], "page one is fresh"


def test_the_quota_of_words_is_kept(words: Words) -> None:
    tenant = Tenant("alice", max_words=2)
    run(words.put(tenant, word("a")))
    run(words.put(tenant, word("b")))

    with pytest.raises(Forbidden, match="you have 2 words, and may have at most 2: delete some first") as info:
        run(words.put(tenant, word("c")))
    assert (info.value.status, info.value.code) == (403, "quota_exceeded")
    assert run(words.put(tenant, word("b", 2))).generation == 2
    run(words.delete(tenant, "a"))
    run(words.put(tenant, word("c")))
    assert len(run(words.tokens(tenant))) == 2


def test_the_quota_of_bytes_is_kept_also_for_words_of_other_servers(
    words: Words, store: WordStore, clock: Clock
) -> None:
    size = store.put("alice", word("a")).bytes
    tenant = Tenant("alice", max_bytes=2 * size)
    run(words.put(tenant, word("b")))

    message = f"your others have {2 * size}, but together they may have at most {2 * size}: delete"
    with pytest.raises(Forbidden, match=message):
        run(words.put(tenant, word("c")))
    run(words.put(tenant, word("b", 2)))
    assert sum(record.bytes for record in run(words.list(tenant))) == 2 * size
    store.delete("alice", "a")
    clock.seconds += 5
    run(words.put(tenant, word("c")))
    assert sum(record.bytes for record in run(words.list(tenant))) == 2 * size


def test_many_puts_at_once_do_not_exceed_the_quota(words: Words, store: WordStore) -> None:
    tenant = Tenant("alice", max_words=5)

    async def main() -> list[object]:
        puts = (words.put(tenant, word(f"w{number}")) for number in range(20))
        return [*await asyncio.gather(*puts, return_exceptions=True)]

    results = asyncio.run(main())
    assert sum(isinstance(result, Forbidden) for result in results) == 15
    assert len(store.tokens("alice")) == 5


def test_a_damaged_word_is_an_error_that_names_only_the_callers_word(
    tmp_path: Path, store: WordStore, words: Words
) -> None:
    store.put("alice", word("<toy>"))
    store.put("bob", word("<secret>"))
    [blob] = (tmp_path / "blobs").glob("*/*")
    blob.write_bytes(b"damaged")

    async def main() -> list[Any]:
        requests = (words.resolve(BOB, ["<secret>"], False), words.resolve(ALICE, ["<toy>"], False))
        return [*await asyncio.gather(*requests, return_exceptions=True)]

    theirs, mine = asyncio.run(main())
    assert isinstance(mine, ApiError)
    assert mine.message == "the stored word '<toy>' is damaged: upload it again, or delete it"
    assert "<secret>" in theirs.message
    run(words.delete(ALICE, "<toy>"))
    (tmp_path / "names" / "bob" / "=3csecret=3e.json").write_bytes(b"{")
    with pytest.raises(ApiError, match="'<secret>' is damaged"):
        run(words.resolve(BOB, ["<secret>"], False))
    run(words.delete(BOB, "<secret>"))


def test_a_store_that_fails_is_a_503(tmp_path: Path, words: Words) -> None:
    (tmp_path / "names").write_text("in the way")

    with pytest.raises(Unavailable) as info:
        run(words.resolve(ALICE, ["<toy>"], False))
    assert str(tmp_path) not in info.value.message


def test_the_longest_prompt_of_punctuation_is_resolved(store: WordStore, words: Words) -> None:
    for token in ("toy", ".", ".!", "<toy>"):
        store.put("alice", word(token))

    assert resolved(words, "~!.*" * 5000, bare=True) == {".": 1}
    with pytest.raises(Invalid):
        resolved(words, "embedding:" + "x" * 19_000)


@settings(max_examples=500, deadline=None)
@given(st.sets(st.text("aAbé.<>", min_size=1, max_size=6)), st.text("aAbBé.", max_size=8))
def test_the_prefixes_in_an_index_are_all_there(tokens: set[str], run: str) -> None:
    index = Index([], 0)
    for token in tokens:
        index.set(token, present=True)
    expected = {token for token in tokens if run.casefold().startswith(token.strip("<>").casefold())}

    assert set(index.prefixes(run)) == expected == set(Index(tokens, 0).prefixes(run))
    for token in sorted(tokens):
        assert token in index
        index.set(token, present=False)
        assert token not in index
    assert index.tokens == []
    assert index.prefixes(run) == []


def test_similar_names_are_searched_in_a_few_neighbours_only() -> None:
    index = Index((f"<word{number:06}>" for number in range(100_000)), 0)

    near = index.near("<word050000x>")

    assert near[0] == "<word050000>"
    assert len(near) == 3
    assert Index([], 0).near("x") == []
