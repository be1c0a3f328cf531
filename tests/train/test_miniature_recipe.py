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
from oneword.train.miniature import recipe, world

SECOND = 1 / 60


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> recipe.Settings:
    """A work folder in which every stage has run for its second."""
    work = tmp_path_factory.mktemp("recipe")
    some = recipe.Settings(work, vae_minutes=SECOND, judge_minutes=SECOND, unet_minutes=SECOND, pictures=150, batch=8)
    recipe.train(some, lambda _: None)
    return some


def state(settings: recipe.Settings, stage: str) -> Any:
    return torch.load(settings.work / f"{stage}.pt", weights_only=True)


def test_a_stage_ends_with_its_minutes_and_goes_on_with_more(settings: recipe.Settings) -> None:
    before = state(settings, "judge")
    recipe.train_judge(settings, lambda _: None)  # its minutes are over: nothing changes
    again = state(settings, "judge")
    minutes = before["spent"] / 60 + SECOND
    started = time.monotonic()
    recipe.train_judge(replace(settings, judge_minutes=minutes), lambda _: None)
    elapsed = time.monotonic() - started
    longer = state(settings, "judge")

    assert before["step"] >= 1
    assert again["step"] == before["step"]
    assert longer["step"] > before["step"]
    assert minutes * 60 <= longer["spent"] <= before["spent"] + elapsed  # minutes are of all runs together


def test_what_is_written_is_a_model_and_says_what_it_reached(settings: recipe.Settings, tmp_path: Path) -> None:
    recipe.export(settings, tmp_path / "model")
    source = load_source(tmp_path / "model")
    vae, judge = recipe.reached(tmp_path / "model")

    assert source.unet.config.sample_size == world.SIZE // 8
    saved = torch.load(settings.work / f"latents-{state(settings, 'vae')['step']}-scale.pt", weights_only=True)
    assert source.vae.config.scaling_factor == pytest.approx(saved["scale"])
    assert re.fullmatch(r"VAE: [\d.]+ dB round trip", vae)
    assert re.match(r"judge: .*shape [\d.]+%", judge)


def test_a_vae_that_trained_on_has_latents_of_its_own(settings: recipe.Settings, tmp_path: Path) -> None:
    settings = replace(settings, work=Path(shutil.copytree(settings.work, tmp_path / "work")))
    minutes = state(settings, "vae")["spent"] / 60 + SECOND
    recipe.train_vae(replace(settings, vae_minutes=minutes), lambda _: None)

    with pytest.raises(UsageError, match="the UNet has not trained on this VAE yet, run it with more --unet-minutes"):
        recipe.export(settings, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures is 0: give at least 1"):
        recipe.Settings(tmp_path, pictures=0)
