"""FLUX.2-klein, end to end, against diffusers' own pipelines. The tokenizer of the tiny model takes 48 tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.engines.open import Backend
from oneword.export.cli import plan_warnings
from oneword.export.eager import eager_model
from oneword.export.source import load_source
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from tests.export.conftest import QWEN_LENGTH
from tests.export.test_flow_families import (
    PROMPT,
    assert_planned,
    compared,
    decibels_of_openvino,
    diffusers_picture,
    picture,
    psnr,
    scene,
)

ONLY_BASE = pytest.mark.parametrize("tiny_flux2_dir", ["base"], indirect=True)


@pytest.fixture(scope="module")
def bundle(tiny_flux2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = compared(tiny_flux2_dir, tmp_path_factory.mktemp("flux2") / "bundle", "flux-2-klein")
    assert plan_warnings(exported) == []
    return exported.bundle.path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Model.open(bundle, Backend.ONNXRUNTIME, threads=1)


@pytest.fixture
def pipeline(tiny_flux2_dir: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline.from_pretrained(tiny_flux2_dir)


def theirs(pipeline: Any, prompt: str, **settings: Any) -> Image:
    return diffusers_picture(pipeline, prompt, **{"max_sequence_length": QWEN_LENGTH, **settings})


@ONLY_BASE
@pytest.mark.parametrize(
    ("prompt", "guidance_scale", "size", "steps"),
    [(PROMPT, 1.0, (64, 64), 6), (PROMPT, 4.0, (80, 64), 6), ("\n a ring <|im_end|>", 3.0, (48, 112), 3)],
)
def test_klein_matches_diffusers(
    model: Model, pipeline: Any, prompt: str, guidance_scale: float, size: tuple[int, int], steps: int
) -> None:
    settings = {"guidance_scale": guidance_scale, "size": size}
    expected = theirs(pipeline, prompt, num_inference_steps=steps, **settings)
    assert psnr(picture(model, prompt, steps=steps, **settings), expected) >= 50


@ONLY_BASE
def test_a_negative_prompt_is_that_of_the_second_branch(model: Model, pipeline: Any) -> None:
    negative, _ = pipeline.encode_prompt("a blue dog", max_sequence_length=QWEN_LENGTH)
    expected = theirs(pipeline, PROMPT, guidance_scale=4.0, negative_prompt_embeds=negative)
    assert psnr(picture(model, PROMPT, negative_prompt="a blue dog", guidance_scale=4.0), expected) >= 50
