"""The recipe that makes the miniature, every stage of it for a second: its time box, its state, what it writes."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.export.source import load_source
from oneword.train.miniature import training, world

SECOND = 1 / 60


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> training.Stages:
    """A work folder in which every stage has run for its second."""
    work = tmp_path_factory.mktemp("recipe")
    some = training.Stages(work, vae_minutes=SECOND, judge_minutes=SECOND, unet_minutes=SECOND, pictures=150, batch=8)
    training.train(some, lambda _: None)
    return some


def state(stages: training.Stages, stage: str) -> Any:
    return torch.load(stages.work / f"{stage}.pt", weights_only=True)


def test_a_stage_ends_with_its_minutes_and_goes_on_with_more(stages: training.Stages) -> None:
    before = state(stages, "judge")
    training.train_judge(stages, lambda _: None)  # its minutes are over: nothing changes
    again = state(stages, "judge")
    minutes = before["spent"] / 60 + SECOND
    started = time.monotonic()
    training.train_judge(replace(stages, judge_minutes=minutes), lambda _: None)
    elapsed = time.monotonic() - started
    longer = state(stages, "judge")

    assert before["step"] >= 1
    assert again["step"] == before["step"]
    assert longer["step"] > before["step"]
    assert minutes * 60 <= longer["spent"] <= before["spent"] + elapsed  # minutes are of all runs together


def test_what_is_written_is_a_model_and_says_what_it_reached(stages: training.Stages, tmp_path: Path) -> None:
    training.export(stages, tmp_path / "model")
    source = load_source(tmp_path / "model")
    vae, judge = training.reached(tmp_path / "model")

    assert source.unet.config.sample_size == world.SIZE // 8
    saved = torch.load(stages.work / f"latents-{state(stages, 'vae')['step']}-scale.pt", weights_only=True)
    assert source.vae.config.scaling_factor == pytest.approx(saved["scale"])
    assert re.fullmatch(r"VAE: [\d.]+ dB round trip", vae)
    assert re.match(r"judge: .*shape [\d.]+%", judge)


def test_a_vae_that_trained_on_has_latents_of_its_own(stages: training.Stages, tmp_path: Path) -> None:
    stages = replace(stages, work=Path(shutil.copytree(stages.work, tmp_path / "work")))
    minutes = state(stages, "vae")["spent"] / 60 + SECOND
    training.train_vae(replace(stages, vae_minutes=minutes), lambda _: None)

    with pytest.raises(UsageError, match="the UNet has not trained on this VAE yet, run it with more --unet-minutes"):
        training.export(stages, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures is 0: give at least 1"):
        training.Stages(tmp_path, pictures=0)
