"""The Python of the README, docs/api.md and examples/, run as it is."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from oneword.runtime import Concept, Model, draw, read_image, save_concept

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in (ROOT / "README.md", ROOT / "docs" / "api.md")
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_makes_its_pictures(
    code: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(tiny_bundle)
    save_concept(Concept("<toy>", {"text_encoder": np.full((1, 32), 0.1, np.float32)}), "toy.safetensors")

    exec(compile(code, "example", "exec"), {"__name__": "__main__"})

    if "draw(" in code:
        assert [read_image(path).shape for path in sorted(tmp_path.glob("*.png"))] == [(64, 64, 3)] * 2
    else:
        assert capsys.readouterr().out.splitlines().count("picture 0 of request 2: (64, 64, 3)") == 1


def test_one_picture_on_one_page_is_the_picture_that_draw_makes(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "star.png"
    monkeypatch.setattr(sys, "argv", ["one_picture.py", str(tiny_bundle), "a red star", str(output)])
    runpy.run_path(str(ROOT / "examples" / "one_picture.py"), run_name="__main__")
    model = Model.open(tiny_bundle, "onnxruntime")
    [picture] = draw(model, "a red star", seed=7, steps=20, sampler="dpmpp-2m", guidance_scale=5.0)

    np.testing.assert_allclose(read_image(output).astype(int), picture.image, atol=1)
