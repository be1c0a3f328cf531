"""`benchmarks.compression` and what other benchmarks do with int8 weights."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compression, exported, miniature
from oneword.engines.graph import Weights
from oneword.runtime.bundle import MANIFEST, Bundle


def test_a_bundle_is_drawn_with_in_processes_of_its_own_and_compared_with_the_first(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["compression", str(tiny_bundle), "--engine", "onnxruntime", "--size", "64", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*line, "--write"])
    monkeypatch.setattr(compression, "PAGE", tmp_path / "compression.md")

    compression.main()

    [(name, result)] = json.loads(capsys.readouterr().out.splitlines()[-1]).items()
    assert name == f"onnxruntime: {tiny_bundle} (fp32)"
    graphs = [*tiny_bundle.glob("*.onnx*"), *tiny_bundle.glob("*.safetensors"), *tiny_bundle.glob("tokenizer/*")]
    assert result["disk_mib"] == pytest.approx(sum(file.stat().st_size for file in graphs) / 2**20)
    assert result["psnr_db"] == float("inf")
    assert min(result["peak_mib"], result["seconds"]) > 0
    page = (tmp_path / "compression.md").read_text()
    assert f"| onnxruntime: {tiny_bundle.name} (fp32) | {result['disk_mib']:.4g} |" in page
    assert "python -m benchmarks.compression PATH --engine onnxruntime --size 64 --work PATH --write" in page
    assert str(tiny_bundle.parent) not in page


def test_two_bundles_of_one_form_and_one_given_twice_are_refused_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(tiny_bundle, copied)
    for other, error in ((copied, "are both in fp32: give one bundle of each form"), (tiny_bundle, "is given twice")):
        monkeypatch.setattr(
            sys, "argv", ["compression", str(tiny_bundle), str(other), "--work", str(tmp_path / "work")]
        )
        with pytest.raises(SystemExit, match=f"{other} {error}"):
            compression.main()
    assert not (tmp_path / "work").exists()


def test_the_peak_of_int8_weights_is_bold_above_six_tenths_of_that_of_16_bits() -> None:
    """310 of 500 MiB are 0.62, 250 are a half."""
    peaks = {
        "onnxruntime": {"fp32": 900.0, "fp16": 500.0, "fp32, int8 weights": 310.0},
        "openvino": {"fp16": 500.0, "fp32, int8 weights": 250.0},
    }

    assert compression.bars(peaks) == [
        "- onnxruntime, peak memory with int8 weights relative to fp16: **0.620** (at most 0.6)",
        "- openvino, peak memory with int8 weights relative to fp16: 0.500 (at most 0.6)",
    ]
    assert compression.bars({"openvino": {"fp32": 900.0}}) == []


def test_a_bundle_with_other_weights_is_exported_again(
    tiny_model_dir: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(exported, "export_bundle", lambda model, path, **settings: calls.append(settings))

    exported.exported(str(tiny_model_dir), tiny_bundle)
    assert calls == []

    exported.exported(str(tiny_model_dir), tiny_bundle, Weights.INT8)
    assert calls == [{"weights": Weights.INT8}]


def test_a_bundle_without_copies_for_onnxruntime_is_exported_again(
    tiny_model_dir: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(exported, "export_bundle", lambda model, path, **settings: calls.append(path))
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)
    manifest = json.loads((old / MANIFEST).read_text())
    for graph in manifest["graphs"].values():
        for name in set(graph.pop("fused", {}).values()):
            (old / name).unlink()
            del manifest["files"][name]
    (old / MANIFEST).write_text(json.dumps(manifest))
    assert not any(graph.fused for graph in Bundle.open(old).manifest.graphs.values())

    exported.exported(str(tiny_model_dir), old)
    assert calls == [old]


def test_the_miniatures_page_is_not_written_from_int8_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["miniature", "--weights", "int8", "--write"])
    with pytest.raises(SystemExit):
        miniature.main()
    assert "the page shows the miniature's own weights; drop one of them" in capsys.readouterr().err
