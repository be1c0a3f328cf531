"""Pictures that are kept for an hour: how much of them a tenant may have."""

from pathlib import Path

import pytest

from oneword.serve.errors import Busy
from oneword.serve.files import open_files
from oneword.serve.keys import Tenant
from oneword.serve.results import Results


def test_a_tenant_has_room_for_pictures_again_once_its_oldest_has_expired(tmp_path: Path) -> None:
    now = 1000.0
    results = Results(open_files(str(tmp_path)), lambda: now)
    alice, bob = Tenant("alice", max_result_bytes=150), Tenant("bob", max_result_bytes=150)

    results.check_room(alice)
    results.put(alice, bytes(100), "png")
    now = 1900.0
    results.check_room(alice)  # 50 bytes are left: that the picture will have more is not known yet
    results.put(alice, bytes(60), "png")

    with pytest.raises(
        Busy, match="160 bytes of your pictures are kept for an hour, allowed are 150: ask for"
    ) as refusal:
        results.check_room(alice)
    assert refusal.value.code == "quota_exceeded"
    assert refusal.value.headers["Retry-After"] == "2700"
    results.check_room(bob)
    now = 4601.0
    results.check_room(alice)


def test_a_tenant_without_any_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Busy, match="allowed are 0"):
        Results(open_files(str(tmp_path))).check_room(Tenant("alice", max_result_bytes=0))
