"""Pictures that are kept for an hour, and answers: how long, and how much of them a tenant may have."""

import contextlib
from pathlib import Path

import pytest

from oneword.serve.errors import Busy, Forbidden
from oneword.serve.files import open_files
from oneword.serve.keys import Tenant
from oneword.serve.results import KeptAnswer, Results


def test_a_tenant_has_room_for_pictures_again_once_its_oldest_has_expired(tmp_path: Path) -> None:
    now = 1000.0
    results = Results(open_files(str(tmp_path)), lambda: now)
    alice, bob = Tenant("alice", max_result_bytes=150), Tenant("bob", max_result_bytes=150)

    with results.reserved(alice, 150):
        results.put(alice, bytes(100), "png")
    now = 1900.0
    with results.reserved(alice, 50):
        results.put(alice, bytes(40), "png")

    with (
        pytest.raises(Busy, match=r"140 bytes of your pictures are kept .* these may have 11") as refused,
        results.reserved(alice, 11),
    ):
        pass
    assert refused.value.code == "quota_exceeded"
    assert refused.value.headers["Retry-After"] == "2700"
    with results.reserved(bob, 150):
        pass
    now = 4601.0
    with results.reserved(alice, 110):
        pass


def test_requests_in_progress_share_the_room_and_give_back_what_they_do_not_use(tmp_path: Path) -> None:
    results = Results(open_files(str(tmp_path)))
    alice = Tenant("alice", max_result_bytes=100)

    with contextlib.ExitStack() as requests:
        for _ in range(2):
            requests.enter_context(results.reserved(alice, 50))
        for _ in range(50):
            with pytest.raises(Busy, match="100 bytes"), results.reserved(alice, 1):
                pass
    with pytest.raises(ValueError, match="a test"), results.reserved(alice, 100):
        raise ValueError("a test")
    with results.reserved(alice, 100):
        pass


def test_what_a_tenant_has_is_counted_from_the_store(url: str) -> None:
    now = 1000.0
    alice, bob = Tenant("alice", max_result_bytes=150), Tenant("bob/..", max_result_bytes=150)
    before, other = (Results(open_files(url), lambda: now) for _ in range(2))
    with other.reserved(alice, 150):
        pass
    before.put(alice, bytes(100), "png")
    before.put(bob, bytes(10), "webp")

    after = Results(open_files(url), lambda: now)
    for results in (before, after):
        with pytest.raises(Busy, match="100 bytes of your pictures"), results.reserved(alice, 51):
            pass
        with results.reserved(alice, 50), results.reserved(bob, 140):
            pass
    other.collect()
    with pytest.raises(Busy), other.reserved(alice, 51):  # what another server has kept
        pass
    now = 4601.0
    assert after.collect() == 2
    for results in (before, other, after):
        with results.reserved(alice, 150), results.reserved(bob, 150):
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
    with pytest.raises(Busy, match="66 bytes"), again.reserved(alice, 85):
        pass
    now = 1600.0
    assert again.collect() == 0
    now = 1601.0
    assert again.answer(alice, "../key") is None
    assert again.collect() == 1
    now = 1000.0
    assert again.answer(alice, "../key") is None


@pytest.mark.parametrize("allowed", [0, 99])
def test_a_request_that_can_never_be_kept_is_not_one_to_send_again(tmp_path: Path, allowed: int) -> None:
    results = Results(open_files(str(tmp_path)))

    with (
        pytest.raises(Forbidden, match=f"may have 100 bytes, allowed are {allowed}: ask for b64_json"),
        results.reserved(Tenant("alice", max_result_bytes=allowed), 100),
    ):
        pass
