"""A real Ray cluster on this machine, and a worker that is really killed."""

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oneword.engines.errors import UsageError
from oneword.runtime.concept import load_concept
from oneword.train.cli import main
from oneword.train.learn import learn
from oneword.train.recipe import Compute, named_recipe
from oneword.train.tasks import Task

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    # Ray does not wait for its daemons.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
    ),
]
RECIPE = named_recipe("fast").with_changes(steps=3, batch_size=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two workers, with one thread each."""
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    rng = np.random.default_rng(0)
    for word in range(3):
        (tmp_path / f"{word}").mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{word}" / f"{i}.png")
    return [Task(tmp_path / f"{word}", f"<{word}>", "star") for word in range(3)]


def workers() -> list[int]:
    """The ids of processes on this machine that run one of our tasks."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::learn_group"):
                pids.append(int(entry.parent.name))
        except OSError:
            continue
    return pids


@pytest.mark.usefixtures("cluster")
def test_words_have_the_same_bits_as_learned_locally_although_a_worker_is_killed(
    tiny_model_dir: Path, tasks: list[Task]
) -> None:
    from oneword.train.ray import learn_on_ray

    killed: list[int] = []

    def kill_one() -> None:
        for _ in range(3000):
            if pids := workers():
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    groups = learn_on_ray(str(tiny_model_dir), tasks, RECIPE, 7, group=2)
    remote = {number: concept for concepts, _ in groups for number, concept in concepts.items()}
    killer.join()

    assert len(killed) == 1
    *_, last = learn(tiny_model_dir, tasks, RECIPE.with_changes(words_per_call=1), 7)
    assert sorted(remote) == [0, 1, 2]
    for number, local in enumerate(last.concepts):
        assert remote[number].token == local.token
        np.testing.assert_array_equal(remote[number].vectors["text_encoder"], local.vectors["text_encoder"])


@pytest.mark.usefixtures("cluster")
def test_errors_and_notes_of_a_worker_are_reported_as_when_learning_locally(
    tiny_model_dir: Path, tasks: list[Task], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from oneword.train.ray import learn_on_ray

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="has no pictures"):
        list(learn_on_ray(str(tiny_model_dir), [Task(empty, "<toy>", "star")], RECIPE))
    arguments = [str(tasks[0].images), "--model", str(tiny_model_dir), "--token", "<toy>", "--init", "star"]
    arguments += ["--learning-rate", "1e-9"]
    output = tmp_path / "toy.safetensors"
    assert main([*arguments, "--output", str(output), "--steps", "2", "--batch-size", "2", "--ray", "local"]) == 0
    assert load_concept(output).token == "<toy>"
    assert "note: " in capsys.readouterr().err  # from the worker: two steps at this rate do not move a word
    assert main([*arguments, "--output", str(output), "--ray", "local", "--report", str(tmp_path / "x.html")]) == 2
    assert "--ray does not support --preview-every" in capsys.readouterr().err


def test_a_task_is_the_same_on_any_machine(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a worker's working folder and processor are."""
    from oneword.train.ray import portable

    monkeypatch.chdir(tiny_model_dir.parent)
    tasks = [Task(Path("photos"), "<a>", "start.safetensors"), Task(Path("/photos"), "<b>", "star")]
    for fast, compute in ((True, Compute.BF16), (False, Compute.FP32)):
        monkeypatch.setattr("oneword.train.compute.has_fast_bf16", lambda fast=fast: fast)
        model, config, portable_tasks, recipe = portable(tiny_model_dir.name, Path(tiny_model_dir.name), tasks, RECIPE)
        assert (recipe.words_per_call, recipe.compute) == (1, compute)
    assert (model, config) == (str(tiny_model_dir), tiny_model_dir)
    assert [(task.images, task.init) for task in portable_tasks] == [
        (tiny_model_dir.parent / "photos", str(tiny_model_dir.parent / "start.safetensors")),
        (Path("/photos"), "star"),
    ]
    assert portable("miniature", None, tasks, RECIPE)[0] == "miniature"
    assert portable("owner/name", None, tasks, RECIPE)[0] == "owner/name"
