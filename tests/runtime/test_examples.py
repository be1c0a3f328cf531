"""Runs the Python code in examples/ unchanged. Not covered: the code in the guide, which tests/docs runs."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from oneword.runtime import Model, draw, read_image

ROOT = Path(__file__).parents[2]


def test_the_one_page_example_generates_the_same_picture_as_draw(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "star.png"
    monkeypatch.setattr(sys, "argv", ["one_picture.py", str(tiny_bundle), "a red star", str(output)])
    runpy.run_path(str(ROOT / "examples" / "one_picture.py"), run_name="__main__")
    model = Model.open(tiny_bundle, "onnxruntime")
    [picture] = draw(model, "a red star", seed=7, steps=20, sampler="dpmpp-2m", guidance_scale=5.0)

    np.testing.assert_allclose(read_image(output).astype(int), picture.image, atol=1)
