import os
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oneword.engines.errors import UsageError
from oneword.serve import files as files_module
from oneword.serve.errors import Unavailable
from oneword.serve.files import Files, FolderFiles, open_files, quoted, unquoted
from oneword.serve.job_files import JobFiles, JobRequest, State


def test_files_are_written_read_listed_and_deleted_in_every_kind_of_store(url: str) -> None:
    files, reader = open_files(url), open_files(url)

    assert files.read("a/b") is None
    assert list(files.names("a")) == []
    files.write("a/b", b"1")
    files.write("a/b", b"2")
    files.write("a/c/d", b"3", durable=False)
    files.write("a/c/e/f", b"4")

    assert reader.read("a/b") == b"2"
    assert sorted(reader.names("a")) == ["b", "c"]
    files.delete("a/b")
    files.delete("a/b")
    assert list(reader.names("a")) == ["c"]
    files.delete_folder("a/c")
    files.delete_folder("a/c")
    assert (reader.read("a/c/d"), reader.read("a/c/e/f"), list(reader.names("a/c"))) == (None, None, [])


def test_a_file_over_its_readers_limit_is_recognised(url: str) -> None:
    files = open_files(url)
    files.write("a", b"12345")

    assert files.read("a", 5) == b"12345"
    assert len(files.read("a", 4) or b"") == 5


def test_jobs_can_be_kept_in_every_kind_of_store(url: str) -> None:
    files, other = JobFiles(open_files(url)), JobFiles(open_files(url))
    request = JobRequest(
        "alice", "<toy>", "toy", "directional", 50, 0, ("picture-1.png",), "digest", ("text_encoder",), 1.5
    )
    files.create("1", request, [b"png"], State("one", 50))
    files.write_beat("one", "tick")

    assert other.take("alice", "1", 2, State("two", 50))
    files.write("alice", "1", 1, State("one", 50, step=3))
    assert not files.take("alice", "1", 2, State("one", 50))
    assert files.newest("alice", "1") == (2, State("two", 50))
    assert other.beats() == {"one": "tick"}
    assert other.request("alice", "1") == request
    assert (other.open_identifiers(), other.identifiers("alice")) == (["1"], ["1"])
    now = time.time()
    assert other.last_sign("1", "alice", "one") == pytest.approx(now, abs=60)
    assert other.last_sign("1", None, None) == pytest.approx(now, abs=60)
    assert other.last_sign("2", "alice", "two") == 0
    files.close("1")
    assert [other.delete_ended("2", now - 60), other.delete_ended("0", now + 60)] == [0, 0]
    assert other.delete_ended("2", now + 60) == 1
    assert other.request("alice", "1") is None


def test_of_many_writers_exactly_one_creates_a_file(url: str) -> None:
    files = open_files(url)
    writers = 4 if url.startswith("memory") else 16  # fsspec's memory:// is for one thread

    with ThreadPoolExecutor(1 if url.startswith("memory") else 8) as threads:
        created = list(threads.map(lambda number: files.create("x/y", b"%d" % number), range(writers)))

    assert created.count(True) == 1
    assert files.read("x/y") == b"%d" % created.index(True)
    assert list(files.names("x")) == ["y"]


def test_a_folder_that_another_writer_creates_in_between_is_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files_module.write_whole

    def delayed(path: Path, data: bytes, *, sync: bool) -> None:
        try:
            write(path, data, sync=sync)
        finally:
            path.parent.mkdir(exist_ok=True)  # after the first write has found no folder

    monkeypatch.setattr(files_module, "write_whole", delayed)
    files = open_files(str(tmp_path))

    files.write("x/y", b"1")

    assert files.read("x/y") == b"1"


def test_of_many_processes_exactly_one_creates_a_file(tmp_path: Path) -> None:
    script = (
        "import sys; from oneword.serve.files import open_files; files = open_files(sys.argv[1]);"
        "input();"
        "print(sum(files.create(f'x/{n}', sys.argv[2].encode()) for n in range(200)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(3)]

    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=60)[0]) for process in processes]

    owners = [(tmp_path / "x" / str(n)).read_text() for n in range(200)]
    assert counts == [owners.count(str(number)) for number in range(3)]
    assert len(list((tmp_path / "x").iterdir())) == 200


def test_a_folder_that_two_servers_delete_at_once_is_gone(tmp_path: Path) -> None:
    files = FolderFiles(tmp_path)
    for round in range(5):
        for n in range(100):
            files.write(f"{round}/{n % 10}/{n}", b"x", durable=False)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(files.delete_folder, [str(round)] * 4))

        assert not (tmp_path / str(round)).exists()


def test_only_what_interrupted_writes_left_behind_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that others use too."""
    files = FolderFiles(tmp_path / "store")
    user_files = [
        tmp_path / "store" / name for name in (".bashrc", ".env.0123456789", ".git/.hidden", "names/.lock", "a")
    ]
    for path in user_files:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # the process is killed before it tidies up
        patch.setattr(os, "replace", interrupted)
        patch.setattr(os, "link", interrupted)
        for write in (files.write, files.create):
            with pytest.raises(Unavailable):
                write("names/bob", b"2")
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - {*user_files}
    assert len(left) == 2

    files.sweep(time.time() - 60)
    assert all(path.exists() for path in left)
    files.sweep(time.time() + 60)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*user_files}


def interrupted(*_: object, **__: object) -> None:
    raise OSError("a test")


def test_a_store_that_cannot_be_reached_is_unavailable_and_says_no_path(tmp_path: Path) -> None:
    files: Files = open_files(str(tmp_path / "store"))
    (tmp_path / "store" / "a").write_text("not a folder")

    calls: list[Callable[[], object]] = [
        lambda: files.write("a/b", b""),
        lambda: files.create("a/b", b""),
        lambda: files.read("a/b"),
        lambda: files.names("a"),
        lambda: files.delete("."),
    ]
    for call in calls:
        with pytest.raises(Unavailable) as error:
            call()
        assert str(tmp_path) not in error.value.message


def test_a_url_of_no_known_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        open_files("nonsense://x")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
@example("<Toy>", "<toy>")
@example("é" * 64, "É" * 64)
@example("\ud800", "=ed=a0=80")
@example("", "=")
@example("人" * 64, "人" * 65)
def test_two_names_never_share_a_file(first: str, second: str) -> None:
    """Also where the file system ignores case or normalises Unicode."""
    names = [quoted(text) for text in (first, second)]

    assert (names[0] == names[1]) == (first == second)
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-=~")
        assert len(name) <= 250
        assert name == unicodedata.normalize("NFKD", name).casefold()


SAFE = st.text(st.characters(categories=["L", "N"]) | st.sampled_from(".+*@#!~&$%^=-_<>"), min_size=1, max_size=64)


@settings(max_examples=500, deadline=None)
@given(SAFE)
@example("\U00020000" * 64)
@example("A" * 64)
@example("<toy>")
def test_the_name_of_a_tokens_file_is_read_back_as_the_token(token: str) -> None:
    assert unquoted(quoted(token)) == token


@given(st.text("abz019_-=~", max_size=80))
def test_a_file_that_belongs_to_no_token_is_not_listed(name: str) -> None:
    token = unquoted(name)

    assert token is None or quoted(token) == name
