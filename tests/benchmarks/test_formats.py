"""The converted graph that `benchmarks.formats` measures is complete."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.formats import converted


def test_a_conversion_that_was_interrupted_is_made_again_and_a_complete_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    calls: list[Path] = []

    def convert(core: Any, path: Path, xml: Path, *, halve: bool) -> None:
        assert list(xml.parent.iterdir()) == []
        calls.append(path)
        xml.write_bytes(b"half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        xml.write_bytes(b"whole")

    monkeypatch.setattr("oneword.engines.openvino.convert_graph", convert)
    with pytest.raises(KeyboardInterrupt):
        converted(None, tmp_path / "g.onnx", tmp_path / "work")
    paths = {converted(None, tmp_path / "g.onnx", tmp_path / "work") for _ in range(2)}

    assert [path.read_bytes() for path in paths] == [b"whole"]
    assert len(calls) == 2
