"""The plan cache loads nothing that is not in the index, and builds nothing twice."""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from oneword.engines import plans
from oneword.engines.errors import FileError
from oneword.engines.graph import Precision
from oneword.engines.plans import PlanCache, PlanKey

KEY = PlanKey("digest", "tensorrt-rtx", "1.7", "sm89", Precision.FP32, {"B": (1, 1, 4)}, ("flag",))


def build_and_count(folder: Path) -> bytes:
    (folder / f"built-{os.getpid()}-{random.random()}").touch()
    return b"plan" * 1000


def race(folder: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    plan = PlanCache(folder / "plans").load_or_build(KEY, lambda: build_and_count(folder))
    assert plan == b"plan" * 1000


def refuse() -> bytes:
    raise AssertionError("built although it is cached")


def test_a_plan_is_built_once_and_found_by_another_process(tmp_path: Path) -> None:
    assert PlanCache(tmp_path).load_or_build(KEY, lambda: b"native code") == b"native code"
    assert PlanCache(tmp_path).load_or_build(KEY, refuse) == b"native code"


def test_eight_processes_that_race_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(8)
    processes = [context.Process(target=race, args=(tmp_path, barrier)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(list(tmp_path.glob("built-*"))) == 1


def build_forever(folder: Path) -> None:
    def build() -> bytes:
        (folder / "started").touch()
        time.sleep(600)
        return b"never"

    PlanCache(folder / "plans").load_or_build(KEY, build)


def test_a_killed_build_leaves_nothing_and_blocks_no_one(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=build_forever, args=(tmp_path,))
    process.start()
    while process.is_alive() and not (tmp_path / "started").exists():
        time.sleep(0.05)
    process.kill()
    process.join()
    assert (tmp_path / "started").exists()
    assert PlanCache(tmp_path / "plans").load(KEY) is None
    assert PlanCache(tmp_path / "plans").load_or_build(KEY, lambda: b"plan") == b"plan"


def test_a_thousand_bit_flips_and_truncations_are_all_refused(tmp_path: Path) -> None:
    cache, generator = PlanCache(tmp_path), random.Random(0)
    plan = generator.randbytes(4096)
    cache.load_or_build(KEY, lambda: plan)
    for _ in range(500):
        damaged = bytearray(plan)
        damaged[generator.randrange(4096)] ^= 1 << generator.randrange(8)
        cache.path(KEY).write_bytes(damaged)
        assert cache.load(KEY) is None
        cache.path(KEY).write_bytes(plan[: generator.randrange(4096)])
        assert cache.load(KEY) is None
    assert cache.load_or_build(KEY, lambda: plan) == plan
    assert cache.load(KEY) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"graph_digest": "other data file"},
        {"version": "1.8"},
        {"device": "sm120"},
        {"precision": Precision.FP16},
        {"ranges": {"B": (1, 1, 8)}},
        {"flags": ()},
    ],
)
def test_a_change_in_any_field_of_the_key_is_another_plan(tmp_path: Path, change: dict[str, object]) -> None:
    cache = PlanCache(tmp_path)
    cache.load_or_build(KEY, lambda: b"one")
    assert cache.load_or_build(replace(KEY, **change), lambda: b"two") == b"two"  # type: ignore[arg-type]
    assert cache.load(KEY) == b"one"


def test_a_plan_that_is_not_in_the_index_is_never_loaded(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.path(KEY).write_bytes(b"somebody else's native code")
    assert cache.load(KEY) is None
    (tmp_path / "index.json").write_text("not json")
    assert cache.load_or_build(KEY, lambda: b"ours") == b"ours"


def test_a_build_that_fails_leaves_nothing_to_load(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("out of memory")

    cache = PlanCache(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.load_or_build(KEY, fail)
    assert cache.load(KEY) is None
    assert cache.load_or_build(KEY, lambda: b"plan") == b"plan"


def test_a_full_disk_is_one_line_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(FileError, match=r"cannot write .*\.plan: No space left on device"):
        PlanCache(tmp_path).load_or_build(KEY, lambda: b"plan")
    assert not list(tmp_path.glob("*.plan"))
    assert not list(tmp_path.glob(".*.plan.*"))


def test_ctrl_c_while_a_plan_is_written_leaves_no_file_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PlanCache(tmp_path).load_or_build(KEY, lambda: b"plan")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def write_two(xml: Path) -> None:
    """A plan of two files, and a third one that is not part of it."""
    xml.write_bytes(b"graph")
    xml.with_suffix(".bin").write_bytes(b"weights")
    xml.with_name("scratch").write_bytes(b"scratch")


def refuse_files(path: Path) -> None:
    raise AssertionError("built although it is cached")


SUFFIXES = (".xml", ".bin")


def test_a_plan_of_files_is_built_once_and_refused_if_one_has_changed_or_is_missing(tmp_path: Path) -> None:
    xml, weights = PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_two)
    assert (xml.read_bytes(), weights.read_bytes()) == (b"graph", b"weights")
    assert PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, refuse_files) == [xml, weights]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["index.json", "index.lock", "verified.json", f"{KEY.name}.lock", xml.name, weights.name]
    )

    for path, damage in [(xml, b"Graph"), (weights, b"weight"), (weights, None)]:
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        assert PlanCache(tmp_path).load_files(KEY, SUFFIXES) is None
        PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_two)
        assert PlanCache(tmp_path).load_files(KEY, SUFFIXES) == [xml, weights]


def write_build(number: int) -> Callable[[Path], None]:
    """A build whose two files both contain its number."""

    def build(xml: Path) -> None:
        xml.write_bytes(b"graph %d" % number)
        xml.with_suffix(".bin").write_bytes(b"weights %d" % number)

    return build


def loaded(folder: Path) -> list[bytes] | None:
    paths = PlanCache(folder).load_files(KEY, SUFFIXES)
    return None if paths is None else [path.read_bytes() for path in paths]


@pytest.mark.parametrize("call", range(6))
def test_files_of_two_builds_are_never_loaded_together_wherever_the_second_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    [xml, _] = PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_build(1))
    xml.write_bytes(b"damaged")
    replace_file, calls = os.replace, itertools.count()

    def killed(source: Path, target: Path) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_build(2))
    monkeypatch.undo()

    assert loaded(tmp_path) in (None, [b"graph 2", b"weights 2"])
    PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_build(3))
    assert loaded(tmp_path) in ([b"graph 2", b"weights 2"], [b"graph 3", b"weights 3"])
    assert len([*tmp_path.glob("*.xml"), *tmp_path.glob("*.bin")]) == 2  # the killed build left nothing


def test_files_that_one_process_has_found_stay_those_of_their_build(tmp_path: Path) -> None:
    """Another process replaces the plan after `load_files`, before the files are read: they may be gone, not new."""
    xml, weights = PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_build(1))
    xml.write_bytes(b"damaged")
    with weights.open("rb") as stream:
        PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_build(2))
        assert stream.read() == b"weights 1"

    assert not xml.exists()
    assert not weights.exists()
    assert loaded(tmp_path) == [b"graph 2", b"weights 2"]


def test_a_plan_of_files_replaces_those_of_other_versions_of_the_same_graph_only(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    other = replace(KEY, graph_digest="another graph", version="1.6")
    keys = [replace(KEY, version="1.6"), replace(KEY, version="1.6", flags=()), other, KEY]
    for number, key in enumerate(keys):
        cache.load_or_build_files(key, SUFFIXES, write_build(number))
    cache.load_or_build(replace(KEY, version="1.5"), lambda: b"one file")

    assert sorted(path.read_bytes() for path in tmp_path.glob("*.bin")) == [b"weights 2", b"weights 3"]
    assert cache.load(replace(KEY, version="1.5")) == b"one file"
    assert {(key.graph_digest, key.version) for key in cache.recorded()} == {
        ("another graph", "1.6"),
        ("digest", "1.7"),
        ("digest", "1.5"),
    }
    assert len(cache.recorded()) == 3  # one per plan, not per file


def test_the_plans_of_other_graphs_are_deleted(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    for digest in ("old", "new"):
        key = replace(KEY, graph_digest=digest)
        cache.load_or_build(replace(key, flags=()), lambda: b"plan")
        cache.load_or_build_files(key, SUFFIXES, write_two)

    cache.keep_graphs({"new"})

    assert {key.graph_digest for key in cache.recorded()} == {"new"}
    assert [len([*tmp_path.glob(f"*{suffix}")]) for suffix in (".plan", *SUFFIXES)] == [1, 1, 1]
    assert cache.load(replace(KEY, graph_digest="new", flags=())) == b"plan"


def test_the_plans_of_other_versions_are_deleted(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    for version in ("1.7", "1.8"):
        cache.load_or_build(replace(KEY, version=version), lambda: b"plan")

    cache.keep_version("1.8")

    assert [key.version for key in cache.recorded()] == ["1.8"]
    assert len([*tmp_path.glob("*.plan")]) == 1


@pytest.mark.parametrize("damaged", [b"{", b'{"\xff": {}}', b'{"a": {"files": {}, "key": {"b": ' + b"[" * 100_000])
def test_a_damaged_index_is_an_empty_one(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "index.json").write_bytes(damaged)

    assert PlanCache(tmp_path).load(KEY) is None
    assert PlanCache(tmp_path).load_or_build(KEY, lambda: b"plan") == b"plan"
    assert PlanCache(tmp_path).load(KEY) == b"plan"


def test_a_disk_without_locks_is_one_line_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)

    with pytest.raises(FileError, match=r"^cannot lock .*\.lock: No locks available$"):
        PlanCache(tmp_path).load_or_build(KEY, refuse)  # type: ignore[arg-type]


def test_a_name_in_a_damaged_index_deletes_nothing_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"a picture")
    cache = PlanCache(tmp_path / "plans")
    cache.load_or_build(KEY, lambda: b"plan")
    index = tmp_path / "plans" / "index.json"
    index.write_text(index.read_text().replace(cache.path(KEY).name, "../precious"))

    cache.keep_graphs(())

    assert (tmp_path / "precious").read_bytes() == b"a picture"


def test_files_are_hashed_again_only_if_they_have_moved_or_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    digest = plans.file_digest

    def noted(path: Path) -> str:
        hashed.append(path.suffix)
        return digest(path)

    paths = PlanCache(tmp_path / "a").load_or_build_files(KEY, SUFFIXES, write_two)
    monkeypatch.setattr(plans, "file_digest", noted)
    assert PlanCache(tmp_path / "a").load_files(KEY, SUFFIXES) == paths
    assert hashed == []

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for _ in range(2):
        assert PlanCache(tmp_path / "b").load_files(KEY, SUFFIXES)
    assert hashed == [".xml", ".bin"]


def test_a_killed_build_of_files_leaves_nothing_that_is_loaded(tmp_path: Path) -> None:
    (tmp_path / f"{KEY.name}.partial").mkdir()
    (tmp_path / f"{KEY.name}.partial" / "scratch").write_bytes(b"of a process that was killed")

    def fail(path: Path) -> None:
        assert list(path.parent.iterdir()) == []
        path.write_bytes(b"half")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, fail)
    assert PlanCache(tmp_path).load_files(KEY, SUFFIXES) is None
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.name}.lock"]


def test_the_error_for_files_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    def write_one(xml: Path) -> None:
        xml.write_bytes(b"graph")

    with pytest.raises(FileError, match=rf"cannot write into {tmp_path}: No such file"):
        PlanCache(tmp_path).load_or_build_files(KEY, SUFFIXES, write_one)
