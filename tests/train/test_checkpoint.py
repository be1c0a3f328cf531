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


def test_the_newest_checkpoint_comes_back_as_it_was_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run", at(step))

    found = load_checkpoint(tmp_path / "run", {"seed": "1"})

    assert found is not None
    assert (found.step, found.facts) == (3, {"losses": [0.1] * 3})
    assert torch.equal(found.tensors["x"], torch.full((3,), 3.0))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, at(1))
    save_checkpoint(tmp_path, at(2))
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])

    found = load_checkpoint(tmp_path, {"seed": "1"})

    assert found is not None
    assert found.step == 1


def test_a_run_whose_states_are_all_damaged_does_not_silently_begin_anew(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(1))
    (tmp_path / "step-00000001" / "COMPLETE").unlink()
    with pytest.raises(FileError, match="delete that folder to begin anew"):
        load_checkpoint(tmp_path, {"seed": "1"})


def test_nothing_but_a_runs_own_states_is_ever_deleted(tmp_path: Path) -> None:
    """A folder with a user's files, one of them named much like a state, is given for the states."""
    (tmp_path / "thesis.tex").write_text("years of work")
    for name in ("step-1000", "step-00000001", ".step-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").write_text("irreplaceable")
    for step in (2, 3, 4, 5):
        save_checkpoint(tmp_path, at(step))

    forget(tmp_path)

    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == [".step-notes/photo.png", "step-00000001/photo.png", "step-1000/photo.png", "thesis.tex"]


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(UsageError, match="another ti-train is at the run"):
        held(tmp_path / "run").__enter__()
    with held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, at(1))
    with pytest.raises(UsageError, match="seed was 1 and is 2; give the same command or delete that folder"):
        load_checkpoint(tmp_path, {"seed": "2"})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whatever_write_fails_the_last_good_state_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Every call that changes the disk is made to fail in turn, as on a full or broken one."""
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
        found = load_checkpoint(tmp_path, {"seed": "1"})
        assert found is not None
        assert found.step in (1, 2)
    assert failures >= 12
    found = load_checkpoint(tmp_path, {"seed": "1"})
    assert found is not None
    assert found.step == 2
    assert not list(tmp_path.glob(".step-*"))


def test_a_state_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, at(1))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: pytest.fail("the only state was taken away"))
    save_checkpoint(tmp_path, at(1))
    assert load_checkpoint(tmp_path, {"seed": "1"}) is not None


def test_killed_while_it_forgets_a_run_leaves_nothing_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    """A run of 30 steps that keeps its state after every one."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    learn_it = [str(tmp_path / "pictures"), "--model", str(tiny_model_dir), "--token", "<toy>", "--init", "star"]
    return [*learn_it, "--steps", "30", "--batch-size", "2", "--checkpoint-every", "1"]


RUN_ONCE = """
import os, sys, torch
from oneword.train.cli import main
torch.set_num_threads(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
sys.exit(main(ARGUMENTS))
"""


def a_process(arguments: list[str], output: Path) -> Any:
    """`ti-train` in a process of its own, forked from a server that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oneword.train.learn", "oneword.train.cli"])
    script = output.parent / "run_once.py"
    script.write_text(RUN_ONCE)
    told = {"ARGUMENTS": [*arguments, "--output", str(output)]}
    process = context.Process(target=runpy.run_path, args=(str(script),), kwargs={"init_globals": told})
    process.start()
    return process


def kill_until_done(arguments: list[str], output: Path, kills: int, seed: int, bits: bytes = b"") -> dict[str, int]:
    """Start the command again and again, each time killed at a random instant, then let it end. Every word that comes
    out on the way has the `bits`; returned is how many kills hit, after how many a state was there, and half a one."""
    rng, hit, kept, unfinished = random.Random(seed), 0, 0, 0
    while hit < kills:
        process = a_process(arguments, output)
        process.join(rng.uniform(0.3, 2.5))
        if process.exitcode is None:
            process.kill()
            process.join()
            hit += 1
            kept += bool(list(output.with_suffix(".run").glob("step-*")))
            unfinished += bool(list(output.with_suffix(".run").glob(".step-*")))
        else:
            assert process.exitcode == 0
            assert vectors_of(output) == bits
            output.unlink()  # done before it was hit: the next one begins anew
    process = a_process(arguments, output)
    process.join()
    assert process.exitcode == 0
    return {"killed": hit, "with a state kept": kept, "with one half written": unfinished}


def vectors_of(concept: Path) -> bytes:
    return load_concept(concept).vectors["text_encoder"].tobytes()


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_instants_ends_with_the_bits_of_one_that_was_not(
    arguments: list[str], tmp_path: Path, kills: int
) -> None:
    kill_until_done(arguments, tmp_path / "whole.safetensors", 0, seed=0)
    bits = vectors_of(tmp_path / "whole.safetensors")

    counted = kill_until_done(arguments, tmp_path / "killed.safetensors", kills, seed=1, bits=bits)

    print(counted)
    assert vectors_of(tmp_path / "killed.safetensors") == bits
    if kills > 100:
        assert counted["with a state kept"] > kills / 4
    assert not list(tmp_path.glob("*.run"))


def test_ctrl_c_ends_the_step_and_says_how_to_go_on(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from oneword.train.cli import main; sys.exit(main())", *arguments]
    command += ["--output", str(tmp_path / "toy.safetensors"), "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("toy.run/step-*")):
        assert process.poll() is None
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "the same command goes on from there" in told.splitlines()[-1]
    step = int(told.splitlines()[-1].split("stopped at step ")[1].split()[0])
    assert (tmp_path / "toy.run" / f"step-{step:08d}").is_dir()
    assert not (tmp_path / "toy.safetensors").exists()


def test_a_run_begun_otherwise_is_refused_by_name(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "toy.safetensors")
    module.save_checkpoint(tmp_path / "toy.run", Checkpoint(3, {}, {}, {"seed": "9"}))

    assert main([*arguments, "--output", output]) == 2
    assert "seed was 9 and is 0" in capsys.readouterr().err
