"""The converted graph that `benchmarks.formats` measures is complete, and that of its bundle."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.formats import converted, opened
from oneword.runtime.bundle import Bundle


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

    monkeypatch.setattr("oneword.engines.openvino_conversion.convert_graph", convert)
    with pytest.raises(KeyboardInterrupt):
        converted(None, tmp_path / "g.onnx", tmp_path / "work")
    paths = {converted(None, tmp_path / "g.onnx", tmp_path / "work") for _ in range(2)}

    assert [path.read_bytes() for path in paths] == [b"whole"]
    assert len(calls) == 2


def test_graphs_share_neither_a_conversion_nor_a_cache(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    bundle = Bundle.open(tiny_bundle)
    step = bundle.graph("denoise_step")
    graphs = {**bundle.manifest.graphs, "denoise_step": msgspec.structs.replace(step, digest="f" * 64)}
    bundles = {"first": bundle, "second": Bundle(tiny_bundle, msgspec.structs.replace(bundle.manifest, graphs=graphs))}
    monkeypatch.setattr(Bundle, "open", bundles.__getitem__)

    for name in bundles:
        opened(Namespace(bundle=name, size=64, threads=1, work=tmp_path, form="cached"))

    assert {folder.name for folder in tmp_path.iterdir()} == {step.digest[:12], "f" * 12}
    for folder in tmp_path.iterdir():
        assert {path.name for path in folder.iterdir()} == {"converted", "cached"}
