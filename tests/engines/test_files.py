import errno
import os
from pathlib import Path
from typing import Any

import pytest

from oneword.engines.errors import FileError
from oneword.engines.files import read_stamps, write_whole


def failing(error: BaseException) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_file_is_replaced_whole_and_nothing_else_remains_in_its_folder(tmp_path: Path) -> None:
    for data in (b"first" * 1000, b"second"):
        write_whole(tmp_path / "word.safetensors", data)

        assert [path.read_bytes() for path in tmp_path.iterdir()] == [data]


def test_content_then_folder_are_flushed_to_disk_unless_sync_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}")))

    write_whole(tmp_path / "file", b"data")
    write_whole(tmp_path / "file", b"data", sync=False)

    assert synced == [False, True]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
        (OSError(errno.ENOSPC, "No space left on device"), FileError, r"cannot write .*file: No space left on device"),
    ],
)
def test_an_interrupted_write_leaves_the_older_file_and_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    (tmp_path / "file").write_bytes(b"older")
    monkeypatch.setattr(os, function, failing(error))

    with pytest.raises(raised, match=message):
        write_whole(tmp_path / "file", b"newer")

    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


@pytest.mark.parametrize("name", ["missing/file", "file/inside"])
def test_a_folder_that_does_not_exist_is_a_file_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(FileError, match=r"cannot write .*(No such file or directory|Not a directory)"):
        write_whole(tmp_path / name, b"data")


def test_a_file_with_the_longest_allowed_name_is_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("語" * 85), b"data")  # 255 bytes

    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"data"]


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": ["\xff"]}', b'{"\xff": ["a"]}'])
def test_damaged_stamps_are_none(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "verified.json").write_bytes(damaged)

    assert read_stamps(tmp_path / "verified.json") == {}
