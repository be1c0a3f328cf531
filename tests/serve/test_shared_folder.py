import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oneword.engines.errors import UsageError
from oneword.serve.errors import Unavailable
from oneword.serve.job_files import JobFiles, JobRequest, State
from oneword.serve.shared_folder import SharedFolder, quoted


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    match request.param:
        case "folder":
            yield str(tmp_path / "store")
        case "file":
            yield f"file://{tmp_path}/store"
        case "memory":
            yield f"memory://{uuid.uuid4().hex}"
        case _:
            yield request.getfixturevalue("bucket")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a local S3 server, and the environment that leads to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="store")
        yield "s3://store/some/folder"
    server.stop()


def test_files_are_written_read_listed_and_deleted_in_every_kind_of_store(url: str) -> None:
    folder, reader = SharedFolder(url), SharedFolder(url)

    assert folder.read("a/b") is None
    assert folder.list("a") == []
    folder.write("a/b", b"1")
    folder.write("a/b", b"2")
    folder.write("a/c/d", b"3", sync=False)

    assert reader.read("a/b") == b"2"
    assert reader.list("a") == ["b", "c"]
    folder.delete("a/b")
    assert reader.list("a") == ["c"]
    folder.delete("a")
    folder.delete("a")
    assert reader.read("a/c/d") is None


def test_jobs_can_be_kept_in_every_kind_of_store(url: str) -> None:
    files, other = JobFiles(SharedFolder(url)), JobFiles(SharedFolder(url))
    request = JobRequest("alice", "<toy>", "toy", "quick", 50, 0, ("picture-1.png",), "digest", 1.5)
    files.create("1", request, [b"png"], State("one", 50))
    files.write_beat("one", "tick")

    assert other.take("alice", "1", 2, State("two", 50))
    files.write("alice", "1", 1, State("one", 50, step=3))
    assert not files.take("alice", "1", 2, State("one", 50))
    assert files.newest("alice", "1") == (2, State("two", 50))
    assert other.beats() == {"one": "tick"}
    assert other.request("alice", "1") == request
    assert (other.open_identifiers(), other.identifiers("alice")) == (["1"], ["1"])
    files.close("1")
    assert other.delete_ended("2") == 1
    assert other.request("alice", "1") is None


def test_of_many_writers_exactly_one_creates_a_file(url: str) -> None:
    folder = SharedFolder(url)
    writers = 4 if url.startswith("memory") else 16  # fsspec's memory:// is for one thread

    with ThreadPoolExecutor(1 if url.startswith("memory") else 8) as threads:
        created = list(threads.map(lambda number: folder.create("x/y", b"%d" % number), range(writers)))

    assert created.count(True) == 1
    assert folder.read("x/y") == b"%d" % created.index(True)
    assert folder.list("x") == ["y"]


def test_a_store_that_cannot_be_reached_is_unavailable_and_says_no_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = SharedFolder(str(tmp_path / "file"))

    with pytest.raises(Unavailable) as error:
        folder.write("a", b"")

    assert str(tmp_path) not in error.value.message


def test_a_url_of_no_known_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be used as a store"):
        SharedFolder("nonsense://x")


@given(st.text(), st.text())
@example("Toy", "toy")
@example("..", "%2e%2e")
@example("a" * 500, "a" * 501)
@example("", "_open")
def test_names_are_quoted_injectively_also_where_case_does_not_count(first: str, second: str) -> None:
    names = quoted(first), quoted(second)

    assert (names[0].lower() == names[1].lower()) == (first == second)
    for name in names:
        assert 0 < len(name) <= 200
        assert name.isascii()
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-%")
