import errno
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oneword.engines.errors import FileError, UsageError
from oneword.runtime.concept import load_concept
from oneword.train import checkpoint as module
from oneword.train.checkpoint import Checkpoint, forget, held, load_checkpoint, save_checkpoint
from oneword.train.cli import main


def at(step: int) -> Checkpoint:
    return Checkpoint(step, {"x": torch.full((3,), float(step))}, {"losses": [0.1] * step}, {"seed": "1"})


def test_the_newest_checkpoint_loads_unchanged_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run", at(step))

    loaded = load_checkpoint(tmp_path / "run", {"seed": "1"})

    assert loaded is not None
    assert (loaded.step, loaded.facts) == (3, {"losses": [0.1] * 3})
    assert torch.equal(loaded.tensors["x"], torch.full((3,), 3.0))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, at(1))
    save_checkpoint(tmp_path, at(2))
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else bytes([content[0] ^ 1]) + content[1:])

    loaded = load_checkpoint(tmp_path, {"seed": "1"})

    assert loaded is not None
    assert loaded.step == 1


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(1))
    (tmp_path / "step-00000001" / "COMPLETE").unlink()
    with pytest.raises(FileError, match="delete that folder to start over"):
        load_checkpoint(tmp_path, {"seed": "1"})


def test_only_a_runs_own_checkpoints_are_ever_deleted(tmp_path: Path) -> None:
    """The checkpoint folder already holds a user's files, some of them named much like a checkpoint."""
    (tmp_path / "thesis.tex").write_text("years of work")
    for name in ("step-1000", "step-00000001", ".step-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").write_text("irreplaceable")
    for step in (2, 3, 4, 5):
        save_checkpoint(tmp_path, at(step))

    forget(tmp_path)

    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [".step-notes/photo.png", "step-00000001/photo.png", "step-1000/photo.png", "thesis.tex"]


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(UsageError, match="another ti-train is using"):
        held(tmp_path / "run").__enter__()
    with held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_setting_that_differs_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(1))
    with pytest.raises(UsageError, match="seed was 1 and is 2; give the same command or delete that folder"):
        load_checkpoint(tmp_path, {"seed": "2"})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_the_last_good_checkpoint_loads_whichever_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Each call that changes the disk fails in turn, as on a full or broken disk."""
    save_checkpoint(tmp_path, at(1))
    calls = {"left": 0}

    def failing(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call

    failures = 0
    for nth in range(1, 100):
        with monkeypatch.context() as patch:
            calls_that_write = ((os, "open"), (os, "write"), (os, "fsync"), (shutil, "rmtree"))
            for owner, name in (*calls_that_write, (Path, "mkdir"), (Path, "rename")):
                patch.setattr(owner, name, failing(getattr(owner, name)))
            calls["left"] = nth
            try:
                save_checkpoint(tmp_path, at(2))
                break
            except FileError:
                failures += 1
        loaded = load_checkpoint(tmp_path, {"seed": "1"})
        assert loaded is not None
        assert loaded.step in (1, 2)
    assert failures >= 12
    loaded = load_checkpoint(tmp_path, {"seed": "1"})
    assert loaded is not None
    assert loaded.step == 2
    assert not list(tmp_path.glob(".step-*"))


def test_an_existing_checkpoint_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, at(1))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: pytest.fail("the only checkpoint was deleted"))
    save_checkpoint(tmp_path, at(1))
    assert load_checkpoint(tmp_path, {"seed": "1"}) is not None


def test_forget_killed_midway_leaves_nothing_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, at(1))
    save_checkpoint(tmp_path, at(2))

    def killed(path: Path, **_: Any) -> None:
        (path / module.MARK).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            module.forget(tmp_path)
    assert load_checkpoint(tmp_path, {"seed": "1"}) is None


# ---- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    """A run of 30 steps with a checkpoint after each."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    options = [str(tmp_path / "pictures"), "--model", str(tiny_model_dir), "--token", "<toy>", "--init", "star"]
    return [*options, "--steps", "30", "--batch-size", "2", "--checkpoint-every", "1"]


RUN_ONCE = """
import os, sys, torch
from oneword.train.cli import main
torch.set_num_threads(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
sys.exit(main(ARGUMENTS))
"""


def a_process(arguments: list[str], output: Path) -> Any:
    """`ti-train` in a separate process, forked from a server that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oneword.train.learn", "oneword.train.cli"])
    script = output.parent / "run_once.py"
    script.write_text(RUN_ONCE)
    variables = {"ARGUMENTS": [*arguments, "--output", str(output)]}
    process = context.Process(target=runpy.run_path, args=(str(script),), kwargs={"init_globals": variables})
    process.start()
    return process


def kill_until_done(arguments: list[str], output: Path, kills: int, seed: int, bits: bytes = b"") -> dict[str, int]:
    """Starts the command repeatedly, kills it at a random instant each time, then lets it finish.

    Every word learned in between must equal `bits`. Returns how many kills hit a running process, and after how many
    of them there was a checkpoint and an unfinished checkpoint.
    """
    rng, killed, saved, unfinished = random.Random(seed), 0, 0, 0
    while killed < kills:
        process = a_process(arguments, output)
        process.join(rng.uniform(0.3, 2.5))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            saved += bool(list(output.with_suffix(".run").glob("step-*")))
            unfinished += bool(list(output.with_suffix(".run").glob(".step-*")))
        else:
            assert process.exitcode == 0
            assert vectors_of(output) == bits
            output.unlink()  # finished before it was killed: the next one starts over
    process = a_process(arguments, output)
    process.join()
    assert process.exitcode == 0
    return {"killed": killed, "with a checkpoint": saved, "with an unfinished checkpoint": unfinished}


def vectors_of(concept: Path) -> bytes:
    return load_concept(concept).vectors["text_encoder"].tobytes()


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_instants_ends_with_the_same_bits_as_an_uninterrupted_run(
    arguments: list[str], tmp_path: Path, kills: int
) -> None:
    kill_until_done(arguments, tmp_path / "whole.safetensors", 0, seed=0)
    bits = vectors_of(tmp_path / "whole.safetensors")

    counted = kill_until_done(arguments, tmp_path / "killed.safetensors", kills, seed=1, bits=bits)

    print(counted)
    assert vectors_of(tmp_path / "killed.safetensors") == bits
    if kills > 100:
        assert counted["with a checkpoint"] > kills / 4
    assert not list(tmp_path.glob("*.run"))


def test_ctrl_c_finishes_the_step_and_says_how_to_resume(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from oneword.train.cli import main; sys.exit(main())", *arguments]
    command += ["--output", str(tmp_path / "toy.safetensors"), "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("toy.run/step-*")):
        assert process.poll() is None
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "run the same command to resume" in stderr.splitlines()[-1]
    step = int(stderr.splitlines()[-1].split("stopped at step ")[1].split()[0])
    assert (tmp_path / "toy.run" / f"step-{step:08d}").is_dir()
    assert not (tmp_path / "toy.safetensors").exists()


def test_a_run_with_other_settings_is_refused_by_name(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "toy.safetensors")
    module.save_checkpoint(tmp_path / "toy.run", Checkpoint(3, {}, {}, {"seed": "9"}))

    assert main([*arguments, "--output", output]) == 2
    assert "seed was 9 and is 0" in capsys.readouterr().err
