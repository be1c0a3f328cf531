"""The Python that the README and docs/api.md show, run as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest

from oneword.runtime import Concept, read_image, save_concept

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

    if "save_png" in code:
        assert [read_image(path).shape for path in sorted(tmp_path.glob("*.png"))] == [(64, 64, 3)] * 2
    else:
        assert capsys.readouterr().out.splitlines().count("picture 0 of request 2: (64, 64, 3)") == 1
