import asyncio
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from oneword.engines.errors import UsageError
from oneword.export.source import load_source
from oneword.runtime.concept import Concept
from oneword.runtime.images import open_picture
from oneword.serve import jobs as module
from oneword.serve.errors import ApiError, Busy, Invalid, NotFound, NotInstalled, TooLarge, Unavailable, Unprocessable
from oneword.serve.files import open_files
from oneword.serve.job_files import Cancelled, Failed, JobFiles, JobRequest, Progress, State, Status
from oneword.serve.jobs import Done, Job, JobEvent, Jobs, Pace, Snapshot, learnable_pictures, new_identifier
from oneword.serve.learning import LearningProcess
from oneword.serve.messages import Done as Learned
from oneword.serve.messages import Order
from oneword.train import learn as train_learn
from oneword.train import pictures as train_pictures
from tests.serve.running import word_bytes

ABANDONED = "the server that had it is gone, and no other one has continued it: send the pictures again"

# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_a_job_is_shown_to_its_tenant_and_to_nobody_else(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>", "toy", seed=7)
            assert jobs._owned[job.id].request.encoders == ("text_encoder",)

            assert (job.status, job.steps, job.recipe, job.position) == (Status.QUEUED, 50, "directional", 0)
            assert await jobs.get("alice", job.id) == job
            assert (await jobs.add("alice", photos(), "<toy>", recipe="fast", steps=3)).position == 1
            for tenant, identifier in (("bob", job.id), ("alice", "0" * 32), ("alice", f"../alice/{job.id}")):
                for call in (jobs.get, jobs.cancel, jobs.word):
                    with pytest.raises(NotFound):
                        await call(tenant, identifier)
                with pytest.raises(NotFound):
                    await anext(jobs.events(tenant, identifier))
            assert await jobs.list("bob") == []

    asyncio.run(run())


def test_jobs_are_listed_from_the_newest_in_pages(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            added = [(await jobs.add("alice", photos(), f"<toy{number}>")).id for number in range(3)]

            page = await jobs.list("alice", limit=2)
            older = await jobs.list("alice", limit=2, before=page[-1].id)

            assert [job.id for job in (*page, *older)] == added[::-1]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"images": 2}, Invalid, "2 pictures were sent: send 3 to 5"),
        ({"images": 6}, Invalid, "6 pictures were sent: send 3 to 5"),
        ({"token": "<a b>"}, Unprocessable, "is not safe in a prompt"),
        ({"token": "../x"}, Unprocessable, "looks like a path"),
        ({"init": "/etc/passwd.safetensors"}, Invalid, "init is '/etc/passwd.safetensors': give one word"),
        ({"init": ""}, Invalid, "give one word"),
        ({"recipe": "slow"}, Invalid, "unknown recipe 'slow': choose from directional, fast, style, one-word"),
        ({"steps": 0}, Invalid, "steps is 0: give a whole number from 1 to 5000"),
        ({"steps": 5001}, Invalid, "steps is 5001"),
        ({"seed": -1}, Invalid, "seed is -1"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[ApiError], text: str
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            order = {"images": 3, "token": "<toy>", **changes}
            with pytest.raises(kind, match=text):
                await jobs.add("alice", **{**order, "images": photos(order["images"])})
            assert await jobs.list("alice") == []
            assert jobs.waiting == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", Unprocessable),
        (b"GIF89a" + bytes(100), Unprocessable),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), Unprocessable),
        (bytes((20 << 20) + 1), TooLarge),
    ],
)
def test_a_picture_that_cannot_be_learned_from_is_refused(data: bytes, kind: type[ApiError]) -> None:
    with pytest.raises(kind, match="picture 3"):
        learnable_pictures([*photos(2), data])


def test_a_picture_that_is_too_small_is_refused() -> None:
    with pytest.raises(Unprocessable, match="picture 1 is 15x40: too small to learn from"):
        learnable_pictures([png(15, 40), *photos(2)])


def test_pictures_keep_their_pixels_and_orientation_and_lose_other_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    exif[0x010F] = "a camera"
    picture = Image.effect_noise((64, 32), 60).convert("RGB")
    files: list[bytes] = []
    for kind in ("JPEG", "PNG", "WEBP"):
        stream = io.BytesIO()
        picture.save(stream, kind, exif=exif)
        files.append(stream.getvalue())

    clean = learnable_pictures(files)

    assert list(clean) == ["picture-1.jpg", "picture-2.png", "picture-3.png"]
    for data, (name, result) in zip(files, clean.items(), strict=True):
        (tmp_path / "original").write_bytes(data)
        (tmp_path / name).write_bytes(result)
        expected, learned = open_picture(tmp_path / "original"), open_picture(tmp_path / name)
        assert learned.size == (32, 64)
        np.testing.assert_array_equal(np.asarray(learned), np.asarray(expected))
        assert b"a camera" in data
        assert b"a camera" not in result


def test_the_limits_are_those_of_learning() -> None:
    assert module.MIN_SIDE == train_pictures.MIN_SIDE
    assert module.MAX_SEED == train_learn.MAX_SEED
    assert {f".{ending}" for ending in module.ENDINGS.values()} <= set(train_pictures.ENDINGS)


def test_a_tenant_with_too_many_jobs_is_asked_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def run() -> None:
        async with idle(tmp_path) as jobs:
            for _ in range(2):
                await jobs.add("alice", photos(), "<toy>")
            with pytest.raises(Busy, match="2 of your words are waiting") as error:
                await jobs.add("alice", photos(), "<toy>")
            assert error.value.headers["Retry-After"] == "30"
            await jobs.add("bob", photos(), "<toy>")

    asyncio.run(run())


def test_a_server_without_a_model_names_the_option(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path, model=None) as jobs:
            with pytest.raises(NotInstalled, match="start it with --model"):
                await jobs.add("alice", photos(), "<toy>")

    asyncio.run(run())


def test_without_pytorch_jobs_are_refused_with_the_pip_line(tmp_path: Path) -> None:
    """In an environment whose packages are ours, but for PyTorch and what needs it."""
    packages = tmp_path / "packages"
    packages.mkdir()
    site = Path(np.__file__).parents[1]
    for path in site.iterdir():
        if not path.name.startswith(("torch", "diffusers", "transformers", "accelerate", "__editable__")):
            (packages / path.name).symlink_to(path)
    script = """
import asyncio, sys
from pathlib import Path
from oneword.serve.jobs import Jobs
async def main():
    jobs = Jobs(sys.argv[1], Path(sys.argv[1]), "miniature")
    try:
        await jobs.add("alice", [], "<toy>")
    except Exception as error:
        print(error.status, error)
asyncio.run(main())
assert "torch" not in sys.modules
"""
    source = Path(module.__file__).parents[1].parent if "src" in module.__file__ else Path(__file__).parents[2] / "src"

    process = subprocess.run(
        [sys.executable, "-S", "-c", script, str(tmp_path / "jobs")],
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )

    line = (
        "501 this server cannot learn, as PyTorch is not installed: "
        "in a checkout of oneword, pip install -c constraints.txt -e '.[train]'\n"
    )
    assert (process.stdout, process.returncode) == (line, 0), process.stderr


def test_pictures_can_be_added_to_a_job_and_no_name_leaves_its_folder(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>")

            await jobs.write_picture("alice", job.id, "preview-5-0.jpg", b"jpeg")

            assert await jobs.picture("alice", job.id, "preview-5-0.jpg") == b"jpeg"
            assert (await jobs.picture("alice", job.id, job.pictures[0])).startswith(b"\x89PNG")
            for name in ("../request.json", "..", "a/b.png", "preview.exe", "preview-6-0.jpg", "PICTURE-1.png", ""):
                with pytest.raises(NotFound):
                    await jobs.picture("alice", job.id, name)
            with pytest.raises(ValueError, match="not a name"):
                await jobs.write_picture("alice", job.id, "picture-1.png", b"")

    asyncio.run(run())


def test_hostile_tenants_and_tokens_touch_nothing_outside_the_store(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path / "inside") as jobs:
            for tenant in ("../../x", "/etc", "..", "", "a\0b", "Alice", "alice", "_open", "x" * 1000):
                job = await jobs.add(tenant, photos(), "<toy>")
                assert [found.id for found in await jobs.list(tenant)] == [job.id]

    asyncio.run(run())

    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


# ---- the queue and ownership -----------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            first, second = [await jobs.add("alice", photos(), "<toy>") for _ in range(2)]

            cancelled = await jobs.cancel("alice", first.id)

            assert cancelled == replace(first, status=Status.CANCELLED, position=None, pictures=())
            assert await jobs.cancel("alice", first.id) == cancelled
            assert [event async for event in jobs.events("alice", first.id)] == [Cancelled(1)]
            assert (await jobs.get("alice", second.id)).position == 0
            with pytest.raises(NotFound):
                await jobs.picture("alice", first.id, first.pictures[0])
            assert not (tmp_path / "store/jobs/tenants/alice" / first.id / "pictures").exists()
            assert (
                await jobs.picture("alice", second.id, second.pictures[0])
                == learnable_pictures(photos())["picture-1.png"]
            )

    asyncio.run(run())


def test_a_cancelled_job_whose_end_cannot_be_stored_waits_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = list[float]()

    async def failing(owned: Any) -> None:
        attempts.append(time.monotonic())
        if len(attempts) < 4:
            raise Unavailable("the store cannot be written")

    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>")
            owned = jobs._owned[job.id]
            owned.cancel.set()
            monkeypatch.setattr(jobs, "_attempt", failing)
            monkeypatch.setattr(jobs, "_retry_seconds", 0.02)
            await jobs._carry_out(owned)

    asyncio.run(run())
    waits = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert all(wait >= least for wait, least in zip(waits, (0.04, 0.08, 0.16), strict=True))


@pytest.mark.parametrize("raw", [b"{", b'{"owner": "\xff"}', b'{"x": ' + b"[" * 5000], ids=["cut", "bytes", "deep"])
def test_a_damaged_job_stops_neither_the_list_nor_a_server_that_starts_nor_one_that_takes_over(
    tmp_path: Path, raw: bytes
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            damaged, whole = [await jobs.add("alice", photos(), token) for token in ("<a>", "<b>")]
            first_term(tmp_path, damaged.id).write_bytes(raw)
        async with idle(tmp_path) as jobs:
            assert [job.id for job in await jobs.list("alice")] == [whole.id]
            assert await jobs.open_tokens("alice") == ["<b>"]
            assert jobs.waiting == 1
            with pytest.raises(Unavailable, match="a job's file in the store is damaged"):
                await jobs.get("alice", damaged.id)
        async with idle(tmp_path, "there") as jobs:
            await until(lambda: jobs.waiting == 1)

    asyncio.run(run())


def test_a_job_that_is_damaged_while_it_waits_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            damaged, whole = [await jobs.add("alice", photos(), token) for token in ("<a>", "<b>")]
            (tmp_path / f"store/jobs/tenants/alice/{damaged.id}/terms/00000001.json").write_bytes(b"{")
            attempt, attempted = jobs._attempt, list[str]()

            async def attempted_or_ended(owned: Any) -> None:
                attempted.append(owned.id)
                if owned.id == whole.id:
                    await jobs._end(owned, owned.state.failed("a test"))
                else:
                    await attempt(owned)

            monkeypatch.setattr(jobs, "_attempt", attempted_or_ended)
            await work_until(jobs, lambda: whole.id in attempted and jobs.waiting == 0)
            assert attempted.count(damaged.id) <= 1  # the lease may have found it first

    asyncio.run(run())


def test_a_running_job_that_is_damaged_can_be_cancelled_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[int] = []

    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1000) as jobs:
            job, learning = await jobs.add("alice", photos(), "<toy>"), asyncio.Event()

            async def learn(owned: Any) -> None:
                learning.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(jobs, "_learn", learn)
            working = asyncio.create_task(jobs._work())
            await learning.wait()
            damage(tmp_path, job.id)
            with pytest.raises(Unavailable, match="a job's file in the store is damaged") as error:
                await jobs.cancel("alice", job.id)
            statuses.append(error.value.status)
            assert jobs.waiting == jobs.running == 0
            working.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    thread.join(30)  # an event loop that hangs has no time-out of its own
    assert not thread.is_alive()
    assert statuses == [503]


def test_a_damaged_sign_of_life_is_that_of_a_dead_server(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1000) as sleeping:  # it gives no further sign of life
            await sleeping.add("alice", photos(), "<toy>")
            [beat] = (tmp_path / "store/jobs/servers").iterdir()
            beat.write_bytes(b"")
            async with idle(tmp_path, "there") as other:
                await until(lambda: other.waiting == 1)
                assert [job.position for job in await other.list("alice")] == [0]

    asyncio.run(run())


def test_tenants_take_turns_and_a_tenants_own_jobs_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    async def run() -> None:
        async with idle(tmp_path) as jobs:
            for tenant, token in (
                ("alice", "<a1>"),
                ("alice", "<a2>"),
                ("alice", "<a3>"),
                ("bob", "<b1>"),
                ("bob", "<b2>"),
            ):
                await jobs.add(tenant, photos(), token)
            places = {job.token: job.position for tenant in ("alice", "bob") for job in await jobs.list(tenant)}
            assert places == {"<a1>": 0, "<b1>": 1, "<a2>": 2, "<b2>": 3, "<a3>": 4}

            async def carried_out(owned: Any) -> None:
                begun.append(owned.request.token)
                if owned.request.token == "<b1>":  # one that comes later, from a tenant without a turn so far
                    await jobs.add("carol", photos(), "<c1>")
                await jobs._end(owned, owned.state.failed("a test"))

            monkeypatch.setattr(jobs, "_carry_out", carried_out)
            await work_until(jobs, lambda: len(begun) == 6)

    asyncio.run(run())
    assert begun == ["<a1>", "<b1>", "<c1>", "<a2>", "<b2>", "<a3>"]


def test_a_tenants_oldest_jobs_that_have_ended_make_room_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 2)

    async def run() -> None:
        async with idle(tmp_path) as jobs:
            waiting = await jobs.add("alice", photos(), "<waiting>")
            bobs = await jobs.add("bob", photos(), "<bob>")
            for number in range(3):
                last = await jobs.add("alice", photos(), f"<{number}>")
                await jobs.cancel("alice", last.id)
            assert [job.token for job in await jobs.list("alice")] == ["<2>", "<1>", "<waiting>"]
            assert (await jobs.get("alice", waiting.id)).status is Status.QUEUED
            assert (await jobs.get("bob", bobs.id)).status is Status.QUEUED

    asyncio.run(run())


def test_a_server_without_a_model_shows_others_jobs_and_cancels_them_without_a_folder_of_its_own(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>")
            async with server(tmp_path, "here", model=None) as reader, server(tmp_path, "here", model=None) as another:
                assert replace(await reader.get("alice", job.id), position=0) == job
                assert [found.id for found in await another.list("alice")] == [job.id]
                assert await reader.picture("alice", job.id, job.pictures[0])
                await reader.cancel("alice", job.id)
                assert [event async for event in another.events("alice", job.id)] == [Cancelled(1)]
                assert reader.waiting == 0

    asyncio.run(run())


def test_a_server_that_starts_again_has_its_jobs_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            added = [await jobs.add(tenant, photos(), "<toy>") for tenant in ("alice", "bob", "alice")]
            await jobs.cancel("bob", added[1].id)
        (tmp_path / "here" / "queue.sqlite").unlink()  # also without the queue, the store has them

        async with idle(tmp_path) as jobs:
            assert jobs.waiting == 0  # under another id, they are another server's
        async with idle(tmp_path, "there") as jobs:
            await until(lambda: jobs.waiting == 2)
            assert [(await jobs.get("alice", job.id)).position for job in (added[0], added[2])] == [0, 1]
        async with idle(tmp_path, "there") as jobs:
            assert [(await jobs.get("alice", job.id)).position for job in (added[0], added[2])] == [0, 1]
            assert jobs.waiting == 2

    asyncio.run(run())


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path):
            with pytest.raises(UsageError, match="another server uses"):
                Jobs(str(tmp_path / "store"), tmp_path / "here", "model")

    asyncio.run(run())


def test_a_dead_servers_job_is_taken_over_once_and_what_it_still_writes_is_ignored(tmp_path: Path) -> None:
    """A server that is stopped as by SIGSTOP: it gives no sign of life, and then wakes up."""

    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1000) as sleeping:  # it gives no further sign of life
            job = await sleeping.add("alice", photos(), "<toy>")
            async with idle(tmp_path, "there") as second, idle(tmp_path, "elsewhere") as third:
                await until(lambda: second.waiting + third.waiting > 0)
                owner, other = (second, third) if second.waiting else (third, second)
                late = State("sleeping", 50).after_note("too late")
                sleeping._files.write("alice", job.id, 1, late)

                assert (await other.get("alice", job.id)).status is Status.QUEUED
                await other.cancel("alice", job.id)
                events = [event async for event in owner.events("alice", job.id)]

                assert events == [Cancelled(1)]
                assert [event async for event in other.events("alice", job.id)] == events
                assert (second.waiting, third.waiting) == (0, 0)

    asyncio.run(run())


def test_a_server_that_wakes_up_cancels_a_job_for_its_new_owner_and_deletes_nothing_of_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1000) as sleeping:
            job = await sleeping.add("alice", photos(), "<toy>")
            async with idle(tmp_path, "there", lease_seconds=1000) as owner:
                newest = owner._files.newest("alice", job.id)
                assert newest is not None
                assert owner._files.take("alice", job.id, 2, owned_by(newest[1], owner))  # as in `_take_over`
                await owner._adopt("alice", job.id, 2, owned_by(newest[1], owner))

                cancelled = await sleeping.cancel("alice", job.id)

                assert (cancelled.status, cancelled.position) == (Status.QUEUED, None)
                assert sleeping.waiting == 0
                assert await owner.picture("alice", job.id, job.pictures[0])
                assert owner._files.open_identifiers() == list(owner._files.cancel_requests()) == [job.id]
                await owner.cancel("alice", job.id)
                assert (await sleeping.get("alice", job.id)).status is Status.CANCELLED
                assert (owner._files.open_identifiers(), list(owner._files.cancel_requests())) == ([], [])

    asyncio.run(run())


def test_a_job_that_ends_just_before_it_is_cancelled_leaves_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as owner, idle(tmp_path, "there", model=None) as other:
            job = await owner.add("alice", photos(), "<toy>")
            owned, request = owner._owned[job.id], other._files.request_cancel

            def late(identifier: str) -> None:
                ending = owner._end(owned, owned.state.failed("a test"))
                asyncio.run_coroutine_threadsafe(ending, loop).result(30)
                request(identifier)

            loop = asyncio.get_running_loop()
            monkeypatch.setattr(other._files, "request_cancel", late)
            assert (await other.cancel("alice", job.id)).status is Status.FAILED
            assert list(other._files.cancel_requests()) == []

    asyncio.run(run())


def test_a_word_is_not_kept_if_its_job_was_cancelled_while_the_server_slept(tmp_path: Path) -> None:
    words: list[str] = []

    async def keep(tenant: str, concept: Concept, replace: bool) -> None:
        words.append(concept.token)

    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1000, keep=keep) as sleeping:
            job = await sleeping.add("alice", photos(), "<toy>")
            owned = sleeping._owned[job.id]
            async with idle(tmp_path, "there", lease_seconds=0.1) as other:
                other._is_alive(sleeping._queue.server, other._files.beats(), time.monotonic() - 1)
                cancelled = await other.cancel("alice", job.id)
                assert cancelled.status is Status.CANCELLED

                with pytest.raises(module._TakenOver):
                    await sleeping._finish(owned, owned.state, word_bytes())

                assert words == []
                assert [path.name for path in files_of(tmp_path, job.id) if path.suffix == ".safetensors"] == []

    asyncio.run(run())


def test_a_job_without_its_pictures_fails_and_the_next_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            lost, other = [await jobs.add(tenant, photos(), "<toy>") for tenant in ("alice", "bob")]
            jobs._files.delete_pictures("alice", lost.id)
            prepared, begun = jobs._prepare, asyncio.Event()

            def prepare(owned: Any, folder: Path) -> None:
                if owned.id == other.id:
                    loop.call_soon_threadsafe(begun.set)
                    raise OSError("a test")
                prepared(owned, folder)

            loop = asyncio.get_running_loop()
            monkeypatch.setattr(jobs, "_prepare", prepare)
            await work_until(jobs, begun.is_set)

            failed = await jobs.get("alice", lost.id)
            assert (failed.status, failed.error) == (
                Status.FAILED,
                "its pictures are not in the store: send them again",
            )

    asyncio.run(run())


def test_a_server_that_stops_begins_and_accepts_no_job_and_leaves_its_own_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        begun: list[str] = []

        async def carry_out(self: Jobs, owned: Any) -> None:
            begun.append(owned.id)
            await asyncio.Event().wait()

        monkeypatch.setattr(Jobs, "_carry_out", carry_out)
        async with idle(tmp_path, at_once=1) as stopping:
            first, second = [await stopping.add("alice", photos(), "<toy>") for _ in range(2)]
            await until(lambda: begun == [first.id])

            await stopping.drain()

            assert begun == [first.id]
            with pytest.raises(Unavailable, match="the server stops and learns no more words"):
                await stopping.add("alice", photos(), "<toy>")
            assert [job.id for job in await stopping.list("alice")] == [second.id, first.id]
            await stopping.cancel("alice", second.id)
            async with idle(tmp_path, "there", lease_seconds=0.3) as other:
                await until(lambda: other.waiting == 1)
                assert [event async for event in stopping.events("alice", second.id)] == [Cancelled(1)]
                assert (await other.get("alice", first.id)).position == 0

    asyncio.run(run())


@pytest.mark.parametrize("goodbye", [True, False])
def test_the_job_of_a_server_that_is_gone_is_cancelled_by_one_that_cannot_learn(tmp_path: Path, goodbye: bool) -> None:
    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1000) as gone, server(tmp_path, "", model=None) as reader:
            job = await gone.add("alice", photos(), "<toy>")
            if goodbye:
                await gone.drain()
            else:
                assert (await reader.cancel("alice", job.id)).status is Status.QUEUED  # it may still be alive
                reader._lease_seconds = 0.0

            assert (await reader.cancel("alice", job.id)).status is Status.CANCELLED
            assert [event async for event in reader.events("alice", job.id)] == [Cancelled(1)]
            assert not (tmp_path / "store/jobs/tenants/alice" / job.id / "pictures").exists()
            assert (reader._files.open_identifiers(), list(reader._files.cancel_requests())) == ([], [])
        async with idle(tmp_path) as back:
            assert back.waiting == 0

    asyncio.run(run())


def test_a_cancelled_job_gets_no_more_pictures(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>")
            await jobs.cancel("alice", job.id)
            for call in (
                jobs.snapshot("alice", job.id, 0),
                jobs.write_picture("alice", job.id, "preview-0-0.jpg", b"jpeg"),
            ):
                with pytest.raises(NotFound, match="the job was cancelled, and its pictures were deleted"):
                    await call
            assert not (tmp_path / "store/jobs/tenants/alice" / job.id / "pictures").exists()

    asyncio.run(run())


def test_a_job_on_other_weights_is_not_taken_over(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path, digest="a") as jobs:
            await jobs.add("alice", photos(), "<toy>")
        async with idle(tmp_path, "there", digest="b") as other:
            await other._take_over()
            assert other.waiting == 0

    asyncio.run(run())


def test_what_a_server_had_not_accepted_when_it_died_is_removed(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>")
        for path in (tmp_path / "store").rglob("terms/*"):
            path.unlink()
        async with idle(tmp_path) as jobs:
            await jobs._recover()
            assert await jobs.list("alice") == []
            assert files_of(tmp_path, job.id) == []

    asyncio.run(run())


@pytest.mark.parametrize("model", ["model", None])
def test_what_a_dead_server_had_not_accepted_is_deleted_by_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.1)
    identifier = stored_job(tmp_path, "killed", time.time(), accepted=False)
    assert len(files_of(tmp_path, identifier)) == 3  # its mark, its picture and what was requested

    async def run() -> None:
        async with idle(tmp_path, "there", model=model) as other:
            await until(lambda: not files_of(tmp_path, identifier))
            assert await other.list("alice") == []

    asyncio.run(run())


def test_what_a_live_server_is_accepting_is_left_to_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path, lease_seconds=1) as accepting, idle(tmp_path, "there", lease_seconds=1):
            identifier = stored_job(tmp_path, accepting._queue.server, time.time(), accepted=False)
            await asyncio.sleep(3)
            assert len(files_of(tmp_path, identifier)) == 3

    asyncio.run(run())


def test_a_job_that_was_deleted_while_it_was_accepted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with idle(tmp_path) as paused:
            take = paused._files.take

            def late(tenant: str, identifier: str, term: int, state: State) -> bool:
                monkeypatch.undo()
                assert paused._files.delete_unaccepted(tenant, identifier, State("other", 0).failed("gone"))
                return take(tenant, identifier, term, state)

            monkeypatch.setattr(paused._files, "take", late)
            with pytest.raises(Unavailable, match="send the request again"):
                await paused.add("alice", photos(), "<toy>")
            assert (await paused.list("alice"), paused.waiting) == ([], 0)
            assert list((tmp_path / "store").rglob("picture-*")) == []

    asyncio.run(run())


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("owner", ["another, which is dead", "this one, which does not have it in its queue"])
def test_a_job_that_no_server_has_continued_for_a_week_is_ended(tmp_path: Path, owner: str, damaged: bool) -> None:
    """A week, as docs/guide/server.md says."""

    async def run() -> None:
        async with idle(tmp_path, digest="b") as other:
            name = "gone" if owner.startswith("another") else other._queue.server
            old, young = [stored_job(tmp_path, name, time.time() - days * 86400) for days in (7.1, 6.9)]
            if damaged:
                damage(tmp_path, old)
            await until(lambda: other._files.open_identifiers() == [young])

            if not damaged:
                job = await other.get("alice", old)
                assert (job.status, job.error) == (Status.FAILED, ABANDONED)
                assert [event async for event in other.events("alice", old)] == [Failed(1, ABANDONED)]
                assert len(await other.open_tokens("alice")) == 1
            assert await other.delete_old() == int(damaged)  # the others are kept for another week
            assert await other.delete_old(time.time() + 7.1 * 86400) == int(not damaged)
            assert files_of(tmp_path, old) == []
            assert len(files_of(tmp_path, young)) == 4

    asyncio.run(run())


@pytest.mark.parametrize("model", ["model", None])
@pytest.mark.parametrize("damaged", [False, True])
def test_an_old_job_is_kept_for_a_week_after_its_server_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool, model: str | None
) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.1)
    identifier = stored_job(tmp_path, "restarting", time.time() - 30 * 86400)
    if damaged:
        damage(tmp_path, identifier)

    async def run() -> None:
        async with idle(tmp_path, "there", model=model, digest="b") as other:
            other._files.write_beat("restarting", "")  # as the server does when it stops
            await asyncio.sleep(1.5)  # five leases
            assert other._files.open_identifiers() == [identifier]

            date(tmp_path / "store/jobs/servers/restarting", time.time() - 7.1 * 86400)
            await until(lambda: other._files.open_identifiers() == [])

    asyncio.run(run())


def test_a_job_that_is_ended_by_a_server_without_a_model_is_shown_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.1)
    identifier = stored_job(tmp_path, "gone", time.time() - 8 * 86400)

    async def run() -> None:
        async with server(tmp_path, "", model=None, lease_seconds=0.1) as reader:
            await until(lambda: reader._files.open_identifiers() == [])
            await asyncio.sleep(0.5)  # several sweeps
            assert (await reader.get("alice", identifier)).error == ABANDONED

    asyncio.run(run())


@pytest.mark.parametrize("damaged", [False, True])
def test_an_old_job_of_a_live_server_is_left_to_it(tmp_path: Path, damaged: bool) -> None:
    async def run() -> None:
        async with idle(tmp_path) as owner, idle(tmp_path, "there", digest="b") as other:
            identifier = stored_job(tmp_path, owner._queue.server, time.time() - 30 * 86400)
            await owner._adopt("alice", identifier, 1, State(owner._queue.server, 50))
            if damaged:
                damage(tmp_path, identifier)
            await asyncio.sleep(1.5)  # five leases
            assert other._files.open_identifiers() == [identifier]
            if not damaged:
                assert (await other.get("alice", identifier)).status is Status.QUEUED

    asyncio.run(run())


def test_a_damaged_job_whose_mark_is_damaged_too_is_ended_after_a_week(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as other:
            old, young = [stored_job(tmp_path, "gone", time.time() - days * 86400) for days in (7.1, 6.9)]
            for identifier, days in ((old, 7.1), (young, 6.9)):
                mark = tmp_path / "store/jobs/open" / identifier
                mark.write_bytes(b"{")
                date(mark, time.time() - days * 86400)
            await until(lambda: other._files.open_identifiers() == [young])
            await asyncio.sleep(1.5)  # five leases
            assert other._files.open_identifiers() == [young]

    asyncio.run(run())


def test_another_server_that_has_an_old_jobs_model_has_two_leases_to_take_it_over(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path, model=None, lease_seconds=15) as jobs:
            old, young = [stored_job(tmp_path, "gone", time.time() - days * 86400) for days in (8, 6)]
            for identifier, expected in ((old, [False, False, True]), (young, [False, False, False])):
                found = [await jobs._is_abandoned(identifier, "alice", "gone", now) for now in (1000, 1029, 1031)]
                assert found == expected

    asyncio.run(run())


def test_old_jobs_are_deleted_with_their_pictures(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            waiting, ended = [await jobs.add("alice", photos(), "<toy>") for _ in range(2)]
            await jobs.cancel("alice", ended.id)

            assert await jobs.delete_old() == 0
            assert await jobs.delete_old(time.time() + 6.9 * 86400) == 0
            assert await jobs.delete_old(time.time() + 7.1 * 86400) == 1

            assert [job.id for job in await jobs.list("alice")] == [waiting.id]

    asyncio.run(run())


def test_the_logs_of_failed_jobs_are_kept_for_a_week(tmp_path: Path) -> None:
    async def run() -> None:
        async with idle(tmp_path) as jobs:
            job = await jobs.add("alice", photos(), "<toy>")
            owned, log = jobs._owned[job.id], tmp_path / "here/failed" / f"{job.id}.log"
            run_folder = jobs._run_folder(job.id)
            run_folder.mkdir(parents=True)
            (run_folder / "learn.log").write_text("why")
            await jobs._end(owned, owned.state.failed("a test"))

            await jobs.delete_old(time.time() + 6.9 * 86400)
            assert log.read_text() == "why"
            await jobs.delete_old(time.time() + 7.1 * 86400)
            assert not log.exists()

    asyncio.run(run())


def test_ids_sort_by_time() -> None:
    identifiers = [new_identifier(seconds) for seconds in (0, 1.5, 1.501, 2_000_000_000)]

    assert sorted(identifiers) == identifiers
    assert {len(identifier) for identifier in identifiers} == {32}


def test_seconds_left_follow_from_the_steps_after_the_first() -> None:
    pace = Pace()

    assert [pace.seconds_left(step, 10, now) for step, now in ((0, 0.0), (1, 50.0), (2, 52.0), (6, 60.0))] == [
        None, None, 16.0, 8.0
    ]  # fmt: skip


# ---- learning --------------------------------------------------------------------------------------------------------

STEPS = 40


def test_a_job_is_learned_and_every_server_shows_the_same_events(
    tmp_path: Path, tiny_model_dir: Path, reference: bytes
) -> None:
    words: list[tuple[str, Concept]] = []

    async def keep(tenant: str, concept: Concept, replace: bool) -> None:
        words.append((tenant, concept))

    async def run() -> None:
        options = {"model": str(tiny_model_dir), "digest": load_source(tiny_model_dir).digest, "keep": keep}
        async with server(tmp_path, "here", **options) as jobs, idle(tmp_path, "there", lease_seconds=1000) as other:
            job = await jobs.add("alice", photos(), "<toy>", "star", steps=STEPS, seed=3)
            watching = [collected(replica.events("alice", job.id)) for replica in (jobs, other)]
            local, remote = await asyncio.gather(*watching)

            *_, done = local
            assert isinstance(done, Done)
            assert bits(done.concept) == reference
            assert [(tenant, bits(concept)) for tenant, concept in words] == [("alice", reference)]
            steps = [event.step for event in local if isinstance(event, Snapshot)]
            assert steps == [0, 5, 10, 20, 35, STEPS]
            assert numbers(local) == sorted(set(numbers(local)))
            lasting = [event.number for event in local if not isinstance(event, Progress)]
            assert [number for number in numbers(remote) if number in lasting] == lasting
            replayed = await collected(other.events("alice", job.id, after=lasting[0]))
            assert [event.number for event in replayed if not isinstance(event, Progress)] == lasting[1:]
            ended = await other.get("alice", job.id)
            assert (ended.status, ended.step, ended.word) == (Status.SUCCEEDED, STEPS, done.concept.identity)
            assert bits(await other.word("alice", job.id)) == reference
            assert bits(await other.snapshot("alice", job.id, STEPS)) == reference
            await until(lambda: jobs.running == 0)
            assert list((tmp_path / "here" / "runs").iterdir()) == []

            failing = await jobs.add("alice", photos(), "star", "ring", steps=STEPS)
            *_, failed = await collected(jobs.events("alice", failing.id))
            assert isinstance(failed, Failed)
            assert failed.error == "the token 'star' is already in the model's vocabulary: use <star> instead"

    asyncio.run(run())


def test_a_running_job_that_is_cancelled_leaves_no_process(tmp_path: Path, tiny_model_dir: Path) -> None:
    async def run() -> None:
        options = {"model": str(tiny_model_dir), "digest": load_source(tiny_model_dir).digest}
        async with server(tmp_path, "here", **options) as jobs:
            job = await jobs.add("alice", photos(), "<toy>", "star", steps=5000)
            async for event in jobs.events("alice", job.id):
                if isinstance(event, Progress) and event.step:
                    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in learners()] == [min(os.nice(0) + 10, 19)]
                    assert (await jobs.cancel("alice", job.id)).status is Status.CANCELLED
            assert isinstance(event, Cancelled)
            assert learners() == []

    asyncio.run(run())


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_servers_and_processes_killed_at_random_instants_end_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, tiny_model_dir: Path, reference: bytes, kills: int
) -> None:
    """Each time, the learning process, its server or both are killed; a process that is held outlives its server."""
    digest, rng = load_source(tiny_model_dir).digest, random.Random(0)

    async def accepted() -> Job:
        async with idle(tmp_path, model=str(tiny_model_dir), digest=digest) as jobs:
            return await jobs.add("alice", photos(), "<toy>", "star", steps=STEPS, seed=3)

    job = asyncio.run(accepted())
    files = JobFiles(open_files(str(tmp_path / "store")))
    command = [sys.executable, Path(__file__).parent / "learning_server.py", tmp_path / "store", tmp_path / "here"]
    process: subprocess.Popen[str] | None = None
    held: list[int] = []
    timers: list[threading.Timer] = []

    def reached(step: int) -> bool:
        """Whether the job has ended or is after `step`."""
        newest = files.newest("alice", job.id)
        return newest is not None and (newest[1].status.ended or newest[1].step >= step)

    def ended() -> bool:
        return reached(STEPS + 1)

    try:
        for _ in range(kills):
            if process is None:
                process = subprocess.Popen([*command, tiny_model_dir, digest], stdout=subprocess.PIPE, text=True)
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            wait_until(lambda: learners() or ended(), time.monotonic() + 60)
            target = rng.randrange(-STEPS, STEPS)  # below 0: while the process starts
            wait_until(lambda target=target: reached(target), time.monotonic() + 120)
            time.sleep(rng.uniform(0, 0.2 if target >= 0 else 8))
            if ended():
                break
            kind, victims = rng.choice(["learner", "server", "both", "held"]), learners()
            assert len([victim for victim in victims if victim not in held]) <= 1
            for victim in victims:
                os.kill(victim, signal.SIGSTOP if kind == "held" else signal.SIGKILL)
            held = victims if kind == "held" else []
            if kind != "learner":
                process.kill()
                process.wait()
                process.stdout.close()
                process = None
            for victim in held:
                timers.append(threading.Timer(2, wake, (victim,)))
                timers[-1].start()
        if process is None:
            process = subprocess.Popen([*command, tiny_model_dir, digest], stdout=subprocess.PIPE, text=True)
        wait_until(ended, time.monotonic() + 300)
    finally:
        for timer in timers:
            timer.join()
        if process is not None and process.stdout is not None:
            process.kill()
            process.wait()
            process.stdout.close()

    newest = files.newest("alice", job.id)
    assert newest is not None
    assert newest[1].status is Status.SUCCEEDED, newest[1].error
    assert bits(files.word("alice", job.id)) == reference


# ---- helpers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The word of a process that is not disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "pictures").mkdir()
    for name, data in learnable_pictures(photos()).items():
        (folder / "pictures" / name).write_bytes(data)
    digest = load_source(tiny_model_dir).digest
    order = Order(str(folder), str(tiny_model_dir), digest, "<toy>", "star", "directional", STEPS, 3, ("text_encoder",))

    async def run() -> str:
        async with LearningProcess(order, folder / "log") as reports:
            async for report in reports:
                if isinstance(report, Learned):
                    return report.file
        raise AssertionError("the word was not learned")

    from oneword.runtime.concept import load_concept

    return bits(load_concept(folder / asyncio.run(run())))


@asynccontextmanager
async def server(tmp_path: Path, folder: str, **options: Any) -> AsyncIterator[Jobs]:
    """A started server with its own folder and the common store."""
    jobs = Jobs(str(tmp_path / "store"), tmp_path / folder, **{"lease_seconds": 3.0, "poll_seconds": 0.05, **options})
    await jobs.start()
    try:
        yield jobs
    finally:
        await jobs.stop()


def stored_job(tmp_path: Path, owner: str, created: float, *, accepted: bool = True) -> str:
    """The id of a job of Alice, with one picture, that a server without a sign of life has written to the store.

    One that was not accepted is as its server leaves it if it is killed just before the first term."""
    files, identifier = JobFiles(open_files(str(tmp_path / "store"))), new_identifier(created)
    pictures, encoders = ("picture-1.png",), ("text_encoder",)
    request = JobRequest("alice", "<toy>", "toy", "directional", 50, 0, pictures, "", encoders, created)
    files.create(identifier, request, photos(1), State(owner, 50))
    if not accepted:
        first_term(tmp_path, identifier).unlink()
    for path in files_of(tmp_path, identifier):
        date(path, created)
    return identifier


def first_term(tmp_path: Path, identifier: str) -> Path:
    """The file of a job's first state."""
    return tmp_path / f"store/jobs/tenants/alice/{identifier}/terms/00000001.json"


def damage(tmp_path: Path, identifier: str) -> None:
    """Damages the file of a job's first state, which keeps its time."""
    path = first_term(tmp_path, identifier)
    written = path.stat().st_mtime
    path.write_bytes(b"{")
    date(path, written)


def date(path: Path, seconds: float) -> None:
    """Dates a file to a time since 1970."""
    os.utime(path, (seconds, seconds))


def files_of(tmp_path: Path, identifier: str) -> list[Path]:
    """All files of a job in the store, from which a server may delete at the same time."""
    paths = [Path(folder, name) for folder, _, names in os.walk(tmp_path / "store") for name in names]
    return [path for path in paths if identifier in str(path)]


def owned_by(state: State, owner: Jobs) -> State:
    """The state under another owner."""
    return msgspec.structs.replace(state, owner=owner._queue.server)


def idle(tmp_path: Path, folder: str = "here", **options: Any) -> Any:
    """A server that accepts jobs and does not begin them."""
    return server(tmp_path, folder, **{"model": "model", "at_once": 0, "lease_seconds": 0.3, **options})


async def work_until(jobs: Jobs, condition: Callable[[], bool]) -> None:
    """Has an idle server begin its jobs until the condition holds."""
    working = asyncio.create_task(jobs._work())
    await until(condition)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def wait_until(condition: Callable[[], object], deadline: float) -> None:
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wake(process: int) -> None:
    """Continues a process, which may be gone."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


async def collected(events: AsyncIterator[JobEvent]) -> list[JobEvent]:
    return [event async for event in events]


def learners() -> list[int]:
    """The learning processes that were started from this process or from its children, zombies aside."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (path / "cmdline").read_bytes(), (path / "stat").read_text().rpartition(")")[2].split()[0]
            tests = str(os.getpid()).encode() in (path / "environ").read_bytes().split(b"LEARNING_TEST=")[-1]
        except OSError:
            continue
        if b"oneword.train.job" in command and state != "Z" and tests:
            found.append(int(path.name))
    return found


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks this test's processes."""
    monkeypatch.setenv("LEARNING_TEST", f"{os.getpid()}.")


def photos(count: int = 3) -> list[bytes]:
    return [png(32, 32, number) for number in range(count)]


def png(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def bits(concept: Concept) -> bytes:
    return concept.vectors["text_encoder"].tobytes()


def numbers(events: list[JobEvent]) -> list[int]:
    return [event.number for event in events]
