"""Pictures that are kept for an hour, and answers: how long, and how much of them a tenant may have."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oneword.serve.errors import Busy, Forbidden, Unavailable
from oneword.serve.files import FolderFiles, open_files
from oneword.serve.kept import room
from oneword.serve.keys import Tenant
from oneword.serve.results import KeptAnswer, Results
from tests.serve.running import SECONDS


class SlowFiles(FolderFiles):
    """A folder that waits before it is listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listing, self.listed = threading.Event(), threading.Event()

    def names(self, folder: str) -> Sequence[str]:
        self.listing.set()
        assert self.listed.wait(SECONDS), "nobody could go on meanwhile"
        return super().names(folder)


class SmallFiles(FolderFiles):
    """A folder of which 100 bytes are read, unless more are asked for."""

    def read(self, path: str, limit: int = 100) -> bytes | None:
        return super().read(path, limit)


@contextlib.contextmanager
def reserved(results: Results, tenant: Tenant, size: int) -> Iterator[None]:
    """Room in the store, counted first."""
    results.count(tenant)
    with results.reserved(tenant, size):
        yield


def state_of(results: Results) -> Any:
    """The part of a server's state that `room` needs."""
    return SimpleNamespace(results=results, in_thread=asyncio.to_thread)


def test_a_tenant_has_room_for_pictures_again_once_its_oldest_has_expired(tmp_path: Path) -> None:
    now = 1000.0
    results = Results(open_files(str(tmp_path)), lambda: now)
    alice, bob = Tenant("alice", max_result_bytes=150), Tenant("bob", max_result_bytes=150)

    with reserved(results, alice, 150):
        results.put(alice, bytes(100), "png")
    now = 1900.0
    with reserved(results, alice, 50):
        results.put(alice, bytes(40), "png")

    with (
        pytest.raises(Busy, match=r"140 bytes of your pictures are kept .* these could have 11") as refused,
        reserved(results, alice, 11),
    ):
        pass
    assert refused.value.code == "quota_exceeded"
    assert refused.value.headers["Retry-After"] == "2700"
    with reserved(results, bob, 150):
        pass
    now = 4601.0
    with reserved(results, alice, 110):
        pass


def test_requests_in_progress_share_the_room_and_give_back_what_they_do_not_use(tmp_path: Path) -> None:
    results = Results(open_files(str(tmp_path)))
    alice = Tenant("alice", max_result_bytes=100)

    with contextlib.ExitStack() as requests:
        for _ in range(2):
            requests.enter_context(reserved(results, alice, 50))
        for _ in range(50):
            with pytest.raises(Busy, match="100 bytes"), reserved(results, alice, 1):
                pass
    with pytest.raises(ValueError, match="a test"), reserved(results, alice, 100):
        raise ValueError("a test")
    with reserved(results, alice, 100):
        pass


def test_a_tenant_keeps_a_limited_number_however_small_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.serve.results.MAX_ENTRIES", 3)
    now = 1000.0
    results, alice, bob = Results(open_files(str(tmp_path)), lambda: now), Tenant("alice"), Tenant("bob")
    for number in range(2):
        results.put_answer(alice, f"key {number}", KeptAnswer("0" * 64, b"{}"))
    results.put(alice, b"a picture", "png")

    with pytest.raises(Busy, match="3 of your pictures and answers") as refused, reserved(results, alice, 1):
        pass
    with reserved(results, bob, 1):
        pass
    now = 1601.0  # the answers have expired
    with reserved(results, alice, 1):
        pass

    assert (refused.value.code, refused.value.headers["Retry-After"]) == ("quota_exceeded", "600")


def test_requests_in_progress_count_against_that_number_with_all_that_they_may_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.serve.results.MAX_ENTRIES", 4)
    results, alice, bob = Results(open_files(str(tmp_path)), lambda: 1000.0), Tenant("alice"), Tenant("bob")

    with results.reserved(alice, 1, entries=3):
        with pytest.raises(Busy, match=r"3 of your pictures and answers .* this request has 2") as refused:
            results.reserved(alice, 1, entries=2).__enter__()
        with results.reserved(alice, 1), results.reserved(bob, 1, entries=4):
            pass
    results.put(alice, b"a picture", "png")
    with results.reserved(alice, 1, entries=3), pytest.raises(Busy, match="4 of your pictures") as later:
        results.reserved(alice, 1).__enter__()

    # Without anything in the store, room may come as soon as a picture is drawn; else, when the oldest expires.
    assert [error.value.headers["Retry-After"] for error in (refused, later)] == ["30", "3600"]


def test_what_a_tenant_has_is_counted_from_the_store(url: str) -> None:
    now = 1000.0
    alice, bob = Tenant("alice", max_result_bytes=150), Tenant("bob/..", max_result_bytes=150)
    before, other = (Results(open_files(url), lambda: now) for _ in range(2))
    with reserved(other, alice, 150):
        pass
    before.put(alice, bytes(100), "png")
    before.put(bob, bytes(10), "webp")

    after = Results(open_files(url), lambda: now)
    for results in (before, after):
        with pytest.raises(Busy, match="100 bytes of your pictures"), reserved(results, alice, 51):
            pass
        with reserved(results, alice, 50), reserved(results, bob, 140):
            pass
    other.collect()
    with pytest.raises(Busy), reserved(other, alice, 51):  # what another server has kept
        pass
    now = 4601.0
    assert after.collect() == 2
    for results in (before, other, after):
        with reserved(results, alice, 150), reserved(results, bob, 150):
            pass


def test_an_answer_is_kept_for_ten_minutes_under_its_tenants_key(url: str) -> None:
    now = 1000.0
    results = Results(open_files(url), lambda: now)
    alice, bob = Tenant("alice", max_result_bytes=150), Tenant("bob")
    answer = KeptAnswer("d" * 64, b"{}")

    results.put_answer(alice, "../key", answer)

    again = Results(open_files(url), lambda: now)
    assert again.answer(alice, "../key") == answer
    assert again.answer(alice, "key") is None
    assert again.answer(bob, "../key") is None
    with pytest.raises(Busy, match="66 bytes"), reserved(again, alice, 85):
        pass
    now = 1600.0
    assert again.collect() == 0
    now = 1601.0
    assert again.answer(alice, "../key") is None
    assert again.collect() == 1
    now = 1000.0
    assert again.answer(alice, "../key") is None


def test_a_picture_that_cannot_be_written_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FolderFiles(tmp_path)
    results, alice = Results(files), Tenant("alice", max_result_bytes=100)
    write = files.write

    def fail(path: str, data: bytes) -> None:
        if path.startswith("results/"):
            raise Unavailable("a test")
        write(path, data)

    monkeypatch.setattr(files, "write", fail)
    with pytest.raises(Unavailable):
        results.put(alice, bytes(100), "png")

    with reserved(results, alice, 100):
        pass


def test_an_answer_is_read_whole_however_large_it_is(tmp_path: Path) -> None:
    results = Results(SmallFiles(tmp_path))
    answer = KeptAnswer("d" * 64, bytes(1000))

    results.put_answer(Tenant("alice"), "key", answer)

    assert results.answer(Tenant("alice"), "key") == answer


@pytest.mark.parametrize("allowed", [0, 99])
def test_a_request_that_can_never_be_kept_is_not_one_to_send_again(tmp_path: Path, allowed: int) -> None:
    results = Results(open_files(str(tmp_path)))

    with (
        pytest.raises(
            Forbidden, match=f"could have 100 bytes, but at most {allowed} can be kept: leave out the Idempotency-Key"
        ),
        reserved(results, Tenant("alice", max_result_bytes=allowed), 100),
    ):
        pass


def test_while_a_folder_is_listed_other_tenants_get_room_and_give_it_back(tmp_path: Path) -> None:
    files = SlowFiles(tmp_path)
    results = Results(files)
    alice, bob = Tenant("alice", max_result_bytes=1), Tenant("bob", max_result_bytes=1)

    async def scenario() -> None:
        files.listed.set()
        async with room(state_of(results), bob, 1):
            files.listing.clear()
            files.listed.clear()
            stack = contextlib.AsyncExitStack()
            waiting = asyncio.ensure_future(stack.enter_async_context(room(state_of(results), alice, 1)))
            await asyncio.to_thread(files.listing.wait, SECONDS)
        async with room(state_of(results), bob, 1):
            files.listed.set()
        await waiting
        with reserved(results, bob, 1):  # given back
            pass
        with pytest.raises(Busy), reserved(results, alice, 1):  # not given back yet
            pass
        await stack.aclose()

    asyncio.run(scenario())


def test_a_request_that_is_cancelled_while_a_folder_is_listed_reserves_nothing(tmp_path: Path) -> None:
    files = SlowFiles(tmp_path)
    results = Results(files)
    alice = Tenant("alice", max_result_bytes=100)

    async def scenario() -> None:
        task = asyncio.ensure_future(
            contextlib.AsyncExitStack().enter_async_context(room(state_of(results), alice, 100))
        )
        await asyncio.to_thread(files.listing.wait, SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        files.listed.set()

    asyncio.run(scenario())  # waits for its threads
    with reserved(results, alice, 100):
        pass
