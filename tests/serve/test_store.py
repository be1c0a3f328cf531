"""The word store in a folder, in memory and in S3 (moto's server): first what holds in all of them."""

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from oneword.engines.errors import ConceptError, UsageError
from oneword.runtime.concept import Concept, check_token
from oneword.serve.errors import ApiError, Conflict, NotFound, Unavailable
from oneword.serve.files import Files
from oneword.serve.store import DAY, Collected, WordStore, blob_of, page

HOUR = 3600.0
HOSTILE = [
    "..", ".", "", "/", "a/b", "../../etc/passwd", "\\", "C:\\x", "a\x00b", "\n", "~", "~root", "$HOME", "%2e%2e",
    "=2e", "con", "nul.txt", "a:b", "a?b", "*", "[a]", "{a}", "a::b", "s3://x/y", "<toy>", "<Toy>", "TOY", "toy",
    "toy.json", ".lock", "store.json", "é", "e\u0301", "ß", "ss", "ẞ", "İ", "i", "ı", "K", "K", "ﬁ", "fi", "人形",
    "\ud800", "\udfff", "a" * 64, "a" * 300, "A" * 64, "é" * 64, "\U00020000" * 64, "\U0010ffff" * 64, "人" * 64,
    "人" * 63, "😀" * 40,
]  # fmt: skip


def word(token: str = "<toy>", value: float = 1.0, **provenance: str) -> Concept:
    return Concept(token, {"text_encoder": np.full((2, 8), value, np.float32)}, provenance)


def stored_files(url: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return sorted(path.removeprefix(root).lstrip("/") for path in system.find(root))


def overwrite(url: str, path: str, data: bytes) -> None:
    system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    system.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{root}/{path}", data)


def blobs(url: str) -> list[str]:
    return [path for path in stored_files(url) if path.startswith("blobs/")]


class TestAnyStore:
    """What holds in a folder, in memory and in S3."""

    def test_a_word_comes_back_with_its_vectors_and_provenance(self, url: str) -> None:
        store = WordStore(url, clock=lambda: 123.0)
        concept = Concept(
            "<toy>",
            {"text_encoder": np.ones((2, 8), np.float32), "text_encoder_2": np.full((1, 4), 2, np.float32)},
            {"steps": "50", "Größe": "ü\n\"'"},
        )

        record = store.put("alice", concept)

        assert store.get("alice", "<toy>") == record
        assert (record.generation, record.created, record.identity) == (1, 123.0, concept.identity)
        assert record.vectors == {"text_encoder": 2, "text_encoder_2": 1}
        assert record.bytes == len(blob_of(concept))
        back = store.concept(record)
        assert (back.token, back.identity, back.provenance) == (concept.token, concept.identity, concept.provenance)

    def test_another_store_object_sees_a_word_at_once(self, url: str) -> None:
        first, second = WordStore(url), WordStore(url)
        assert second.get("alice", "<toy>") is None
        assert second.tokens("alice") == []

        for value in (1.0, 2.0):
            record = first.put("alice", word(value=value))
            assert second.get("alice", "<toy>") == record
            assert second.tokens("alice") == ["<toy>"]
        first.delete("alice", "<toy>")
        assert second.get("alice", "<toy>") is None
        assert second.tokens("alice") == []

    def test_equal_vectors_under_two_names_are_one_blob(self, url: str) -> None:
        store = WordStore(url)

        records = [store.put("alice", word()), store.put("alice", word("gem")), store.put("bob", word(made_by="bob"))]

        assert len({record.identity for record in records}) == 1
        assert len(blobs(url)) == 1
        assert [store.concept(record).token for record in records] == ["<toy>", "gem", "<toy>"]
        assert store.concept(records[2]).provenance == {"made_by": "bob"}

    def test_tenants_do_not_see_each_other(self, url: str) -> None:
        store = WordStore(url)
        mine, theirs = store.put("alice", word(value=1)), store.put("Alice", word(value=2))

        assert store.get("alice", "<toy>") == mine != theirs
        assert not store.delete("bob", "<toy>")
        assert store.delete("Alice", "<toy>")
        assert [store.tokens(tenant) for tenant in ("alice", "Alice", "bob")] == [["<toy>"], [], []]
        assert store.get("alice", "<toy>") == mine

    def test_a_replacement_has_the_next_generation(self, url: str) -> None:
        store = WordStore(url)
        first, second = store.put("alice", word(value=1)), store.put("alice", word(value=2))

        assert (first.generation, second.generation) == (1, 2)
        assert store.concept(second).vectors["text_encoder"][0, 0] == 2
        assert store.concept(first).vectors["text_encoder"][0, 0] == 1, "a request that holds the old record still can"
        with pytest.raises(Conflict, match="has generation 2, expected is generation 1"):
            store.put("alice", word(value=3), generation=1)
        with pytest.raises(Conflict, match="does not exist, expected is generation 1"):
            store.put("alice", word("<new>"), generation=1)
        assert store.put("alice", word(value=3), generation=2).generation == 3

    def test_a_taken_name_is_a_conflict_if_it_should_be_absent(self, url: str) -> None:
        store = WordStore(url)
        record = store.put("alice", word(), if_absent=True)

        with pytest.raises(Conflict, match="there is a word '<toy>' already"):
            store.put("alice", word(value=2), if_absent=True)
        assert store.get("alice", "<toy>") == record
        store.put("alice", word(value=2), token="<Toy>", if_absent=True)

    def test_only_one_of_many_creates_a_name(self, url: str) -> None:
        stores = [WordStore(url) for _ in range(4)]

        def create(number: int) -> bool:
            try:
                stores[number].put("alice", word(value=number + 1), if_absent=True)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(4) as threads:
            assert sorted(threads.map(create, range(4))) == [False, False, False, True]

    def test_no_generation_is_given_twice(self, url: str) -> None:
        stores = [WordStore(url) for _ in range(3)]

        def replace(number: int) -> list[int]:
            return [stores[number].put("alice", word(value=number + 1)).generation for _ in range(4)]

        with ThreadPoolExecutor(3) as threads:
            generations = [generation for part in threads.map(replace, range(3)) for generation in part]
        assert sorted(generations) == [*range(1, 13)]

    def test_lists_are_sorted_and_paged(self, url: str) -> None:
        store = WordStore(url)
        tokens = sorted(["<toy>", "<Toy>", "toy", "a.b", "É", "人形", "zz", "#1"])
        for number, token in enumerate(reversed(tokens)):
            store.put("alice", word(token, number + 1))

        assert store.tokens("alice") == tokens
        assert [record.token for record in store.records("alice", tokens)] == tokens
        assert page(tokens, "", 3) == tokens[:3]
        assert page(tokens, tokens[2], 3) == tokens[3:6]
        assert page(tokens, "b", 2) == ["toy", "zz"]
        assert page(tokens, tokens[-1], 3) == []

    def test_a_renamed_word_keeps_all_but_its_name(self, url: str) -> None:
        store = WordStore(url)
        old = store.put("alice", word(steps="5"))
        store.put("alice", word("gem", 2))

        new = store.rename("alice", "<toy>", "<Toy>")

        assert store.tokens("alice") == ["<Toy>", "gem"]
        assert (new.identity, new.provenance, new.created) == (old.identity, old.provenance, old.created)
        assert store.concept(new).token == "<Toy>"
        with pytest.raises(Conflict):
            store.rename("alice", "<Toy>", "gem")
        with pytest.raises(NotFound):
            store.rename("alice", "<toy>", "other")
        with pytest.raises(ConceptError):
            store.rename("alice", "<Toy>", "../x")
        assert store.rename("alice", "gem", "gem") == store.get("alice", "gem")

    def test_deleting_the_last_name_deletes_the_blob_after_a_day_and_not_before(self, url: str) -> None:
        store = WordStore(url)
        store.put("alice", word())
        store.put("bob", word())
        size = len(blob_of(word()))
        now = time.time()

        assert store.delete("alice", "<toy>")
        assert store.gc(now + 30 * DAY) == Collected(0, 0), "bob still has it"
        assert store.delete("bob", "<toy>")
        assert store.gc(time.time() + DAY - HOUR) == Collected(0, 0)
        assert len(blobs(url)) == 1
        assert store.gc(time.time() + DAY + HOUR) == Collected(1, size)
        assert blobs(url) == []
        assert [path for path in stored_files(url) if not path.endswith(".lock")] == ["store.json"]

    def test_a_replaced_and_a_half_put_word_are_collected(self, url: str) -> None:
        store = WordStore(url)
        store.put("alice", word(value=1))
        record = store.put("alice", word(value=2))
        overwrite(url, f"blobs/00/{'0' * 64}.safetensors", b"the server died before the name was written")

        assert store.gc(time.time()).blobs == 0
        assert store.gc(time.time() + 2 * DAY).blobs == 2
        assert store.concept(record).identity == record.identity

    @pytest.mark.parametrize(
        "raw",
        [b"", b"{", b"[]", b"null", b'{"token": "<toy>"}', b'{"token": "\xff"}', b"\xff\xfe", b"[" * 100_000],
    )
    def test_a_damaged_record_is_a_clean_error_and_can_be_replaced_and_deleted(self, url: str, raw: bytes) -> None:
        store = WordStore(url)
        store.put("alice", word())
        store.put("alice", word("gem", 2))
        overwrite(url, "names/alice/=3ctoy=3e.json", raw)

        with pytest.raises(
            ApiError, match=r"^the stored word '<toy>' is damaged: upload it again, or delete it$"
        ) as info:
            store.get("alice", "<toy>")
        assert info.value.status == 500
        assert [record.token for record in store.records("alice", store.tokens("alice"))] == ["gem"]
        with pytest.raises(Conflict):
            store.put("alice", word(), if_absent=True)
        record = store.put("alice", word(value=3))
        assert store.get("alice", "<toy>") == record
        overwrite(url, "names/alice/=3ctoy=3e.json", raw)
        assert store.delete("alice", "<toy>")
        assert store.get("alice", "<toy>") is None

    def test_a_record_moved_to_another_name_or_with_a_path_for_identity_is_refused(self, url: str) -> None:
        store = WordStore(url)
        store.put("alice", word())
        system, root = fsspec.core.url_to_fs(url)
        raw = system.cat_file(f"{root}/names/alice/=3ctoy=3e.json")
        overwrite(url, "names/alice/gem.json", raw)
        with pytest.raises(ApiError, match="'gem' is damaged"):
            store.get("alice", "gem")

        hostile = json.loads(raw) | {"identity": "../../../names/alice/gem"}
        overwrite(url, "names/alice/=3ctoy=3e.json", json.dumps(hostile).encode())
        with pytest.raises(ApiError, match="'<toy>' is damaged"):
            store.get("alice", "<toy>")

    def test_a_damaged_or_missing_blob_is_a_clean_error(self, url: str) -> None:
        store = WordStore(url)
        record = store.put("alice", word())
        other = store.put("alice", word("gem", 2))
        [path] = [path for path in blobs(url) if record.identity in path]
        data, wrong = blob_of(word()), blob_of(word("gem", 2))

        for raw in (b"", data[:-1], data[:40], data + b"x", b"\x80\x04pickle", wrong, b"x" * (3 << 20)):
            overwrite(url, path, raw)
            with pytest.raises(ApiError, match=r"^the stored word '<toy>' is damaged: upload it again, or delete it$"):
                store.concept(record)
        store.put("alice", word())
        assert store.concept(record).identity == record.identity, "putting it again repairs it"
        system, root = fsspec.core.url_to_fs(url)
        system.rm_file(f"{root}/{path}")
        with pytest.raises(ApiError, match="is damaged"):
            store.concept(record)
        assert store.concept(other).identity == other.identity

    def test_a_damaged_record_still_holds_its_blob(self, url: str) -> None:
        store = WordStore(url)
        record = store.put("alice", word())
        overwrite(url, "names/alice/=3ctoy=3e.json", b'{"identity": "' + record.identity.encode() + b'", "tok')

        assert store.gc(time.time() + 9 * DAY).blobs == 0

    def test_hostile_names_of_words_and_tenants_are_only_names(self, url: str) -> None:
        store = WordStore(url)
        record = store.put("alice", word())
        before = stored_files(url)
        names = HOSTILE[::4] if url.startswith("s3:") else HOSTILE

        for name in names:
            if name != "<toy>":
                assert store.get("alice", name) is None
                assert not store.delete("alice", name)
            assert store.get(name, "<toy>") is None
            assert store.tokens(name) == []
        assert stored_files(url) == before
        records = {name: store.put(name, word(value=number + 2)) for number, name in enumerate(names)}
        for name in names:
            assert store.get(name, "<toy>") == records[name]
            assert store.tokens(name) == ["<toy>"]
        assert store.get("alice", "<toy>") == record

    def test_another_layout_is_refused(self, url: str) -> None:
        WordStore(url)
        WordStore(url)
        overwrite(url, "store.json", b'{"version": 2}\n')

        with pytest.raises(UsageError, match="another layout"):
            WordStore(url)


class Hooked:
    """Files that call a function before each access."""

    def __init__(self, inner: Files, hook: Callable[[], None]) -> None:
        self._inner = inner
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name == "locked":
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self._hook()
            return method(*args, **kwargs)

        return call


def accesses_while_collecting(action: str, pause: int, start: int, end: int) -> tuple[int, int]:
    """Runs gc. Before its access `start` the action begins, and makes `pause` accesses; before `end` it continues.

    The action gives a name to a blob that has none, or another name to a blob, and the blob is old. Checks that the
    blob is there in the end. Returns the number of accesses of both.
    """
    root = f"memory://gc-{random.randrange(1 << 60)}"
    collector, server = WordStore(root), WordStore(root)
    server.put("bob", word("old"))
    if action == "put":
        server.delete("bob", "old")
    for path, file in fsspec.filesystem("memory").store.items():
        if "/blobs/" in path and path.startswith(root.removeprefix("memory:/")):
            file.modified -= timedelta(days=2)
    counts, paused, resumed = [0, 0], threading.Event(), threading.Event()

    def server_hook() -> None:
        if counts[0] == pause:
            paused.set()
            assert resumed.wait(20)
        counts[0] += 1

    def act() -> None:
        if action == "put":
            server.put("bob", word("new"))
        else:
            server.rename("bob", "old", "new")
        paused.set()

    thread = threading.Thread(target=act)

    def collector_hook() -> None:
        if counts[1] == start:
            thread.start()
            assert paused.wait(20)
        if counts[1] == end:
            resumed.set()
            thread.join()
        counts[1] += 1

    server._files = Hooked(server._files, server_hook)
    collector._files = Hooked(collector._files, collector_hook)
    collector.gc(time.time())
    resumed.set()
    if counts[1] <= start:
        thread.start()
    thread.join()

    record = WordStore(root).get("bob", "new")
    assert record is not None
    assert WordStore(root).concept(record).identity == word().identity, (action, pause, start, end)
    assert not [path for path in stored_files(root) if path.startswith("doomed/")]
    fsspec.filesystem("memory").rm(root, recursive=True)
    return counts[0], counts[1]


@pytest.mark.parametrize("action", ["put", "rename"])
def test_a_blob_whose_name_is_written_while_gc_runs_is_not_lost(action: str) -> None:
    """In whatever order the accesses of both are made, with one pause of the server."""
    server, collector = accesses_while_collecting(action, 99, 99, 99)
    assert server >= 4
    _, collector = accesses_while_collecting(action, 0, collector, collector)
    collector = max(collector, 14)

    for pause, start in itertools.product(range(server + 1), range(collector + 1)):
        for end in range(start, collector + 1):
            accesses_while_collecting(action, pause, start, end)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


def hostile_names(count: int) -> list[str]:
    """Pieces of paths, escapes, control characters and look-alikes, put together at random."""
    choice = random.Random(1)
    pieces = [
        *HOSTILE,
        "..",
        "/",
        "\\",
        "\x00",
        "%2f",
        "=2f",
        "..;",
        "\u2215",
        "\uff0f",
        "store",
        "blobs",
        "names",
        ".json",
    ]
    names = ("".join(choice.choices(pieces, k=choice.randint(1, 6))) for _ in range(count * 2))
    return [*dict.fromkeys([*HOSTILE, *names])][:count]


def test_ten_thousand_hostile_names_touch_nothing_outside_the_store(tmp_path: Path) -> None:
    neighbour = tmp_path / "names" / "alice"
    neighbour.mkdir(parents=True)
    (neighbour / "=3ctoy=3e.json").write_text("secret")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("secret")
    root = tmp_path / "a" / "store"
    store = WordStore(str(root))
    record = store.put("alice", word())
    names = hostile_names(10_000)
    safe: list[str] = []
    outside = {path: stat for path, stat in snapshot(tmp_path).items() if not path.startswith("a/store")}

    for name in names:
        if name != "<toy>":
            assert store.get("alice", name) is None
            assert not store.delete("alice", name)
            with pytest.raises(NotFound):
                store.rename("alice", name, "<other>")
        assert store.get(name, "<toy>") is None
        assert not store.delete(name, "<toy>")
        try:
            check_token(name)
        except ConceptError:
            for call in (
                lambda name=name: store.put("hostile", word(), token=name),
                lambda name=name: store.rename("alice", "<toy>", name),
            ):
                with pytest.raises(ConceptError):
                    call()
        else:
            safe.append(name)

    for name in safe[:100]:
        store.put("hostile", word(), token=name)
    assert store.tokens("hostile") == sorted(safe[:100])
    assert len(safe) > 100
    assert store.tokens("alice") == ["<toy>"]
    assert store.get("alice", "<toy>") == record
    assert {path: stat for path, stat in snapshot(tmp_path).items() if not path.startswith("a/store")} == outside
    for path in root.rglob("*"):
        assert not path.is_symlink()
        assert path.parts[len(root.parts)] in ("store.json", "names", "blobs")


def test_a_put_that_is_killed_leaves_the_old_word_or_the_new_one(tmp_path: Path) -> None:
    code = (
        "import numpy as np, sys, itertools\n"
        "from oneword.runtime.concept import Concept\n"
        "from oneword.serve.store import WordStore\n"
        "store = WordStore(sys.argv[1])\n"
        "for i in itertools.count():\n"
        "    store.put('alice', Concept('<toy>', {'text_encoder': np.full((64, 512), 1.0 + i % 7, np.float32)}))\n"
        "    print(i, flush=True)\n"
    )
    identities = {
        Concept("<toy>", {"text_encoder": np.full((64, 512), 1.0 + i, np.float32)}).identity for i in range(7)
    }
    store, choice = WordStore(str(tmp_path / "store")), random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "store")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(choice.randint(1, 20)):
            process.stdout.readline()
        time.sleep(choice.random() / 500)  # anywhere within a put
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()

        record = store.get("alice", "<toy>")
        assert record is not None
        assert record.identity in identities
        assert store.concept(record).identity == record.identity
        assert store.tokens("alice") == ["<toy>"]
        store.put("alice", word("gem"))  # the dead process holds no lock
        store.delete("alice", "gem")


def test_what_killed_writes_leave_behind_is_swept_after_a_day(tmp_path: Path) -> None:
    store = WordStore(str(tmp_path))
    store.put("alice", word())
    leftovers = [tmp_path / "names" / "alice" / f".=3ctoy=3e.json.{'0' * 16}", tmp_path / "blobs" / f".00.{'f' * 16}"]
    for path in leftovers:
        path.write_bytes(b"half")

    assert store.tokens("alice") == ["<toy>"]
    store.gc(time.time())
    assert all(path.exists() for path in leftovers)
    store.gc(time.time() + DAY + HOUR)
    assert not any(path.exists() for path in leftovers)
    assert store.get("alice", "<toy>") is not None


def test_readers_see_the_old_word_or_the_new_one_while_it_is_replaced(tmp_path: Path) -> None:
    writer, reader = WordStore(str(tmp_path)), WordStore(str(tmp_path))
    words = [word(value=value) for value in (1.0, 2.0)]
    writer.put("alice", words[0])
    done = threading.Event()

    def replace() -> None:
        for number in range(100):
            writer.put("alice", words[number % 2])
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not done.is_set():
        record = reader.get("alice", "<toy>")
        assert record is not None
        assert reader.concept(record).identity in {concept.identity for concept in words}
        assert reader.tokens("alice") == ["<toy>"]
    thread.join()


def test_a_lookup_reads_one_file_however_many_words_there_are(tmp_path: Path) -> None:
    store = WordStore(str(tmp_path))
    store.put("alice", word())
    for number in range(1000):
        (tmp_path / "names" / "alice" / f"w{number}.json").write_bytes(b"never read")
    accesses: list[int] = []
    store._files = Hooked(store._files, lambda: accesses.append(1))

    record = store.get("alice", "<toy>")
    assert record is not None
    assert len(accesses) == 1
    store.concept(record)
    assert len(accesses) == 2
    assert len(store.tokens("alice")) == 1001
    assert len(accesses) == 3


def test_a_word_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    store = WordStore(str(tmp_path))

    message = "the file of '<toy>' would have 2400128 bytes, but at most 1048576 are allowed"
    with pytest.raises(ConceptError, match=message):
        store.put("alice", Concept("<toy>", {"text_encoder": np.ones((75, 8000), np.float32)}))
    with pytest.raises(ConceptError, match="provenance"):
        store.put("alice", word(note="x" * (3 << 20)))
    assert store.tokens("alice") == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/words", "--words nosuch://... cannot be opened"),
        ("gs://bucket/words", r"--words gs://... needs a package that is missing: .*install gcsfs"),
        ("s3://no-such-bucket-at-all/words", "cannot be read and written"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_usage_error(url: str, message: str, s3_endpoint: str) -> None:
    with pytest.raises(UsageError, match=message) as info:
        WordStore(url)
    assert "\n" not in str(info.value)


def test_a_folder_that_cannot_be_used_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match="cannot be created as a folder: there is a file of that name"):
        WordStore(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be created as a folder"):
        WordStore(str(tmp_path / "file" / "below"))


def test_a_failing_store_answers_503_without_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = WordStore(str(tmp_path / "store"))
    (tmp_path / "store" / "names").write_text("in the way")

    for call in (
        lambda: store.put("alice", word()),
        lambda: store.get("alice", "<toy>"),
        lambda: store.tokens("alice"),
    ):
        with pytest.raises(Unavailable) as info:
            call()
        assert str(tmp_path) not in str(info.value)
    assert str(tmp_path) not in caplog.text
    assert "NotADirectoryError" in caplog.text


def test_the_folder_is_below_the_home_folder_if_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    WordStore("~/words").put("alice", word())

    assert (tmp_path / "words" / "names" / "alice" / "=3ctoy=3e.json").is_file()
