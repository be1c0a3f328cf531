"""`ti-export`'s options: the plans that are built match them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oneword.engines import builder
from oneword.engines.builder import Flavour
from oneword.engines.graph import Precision, Weights
from oneword.export import cli, write
from oneword.export.loras import Lora
from oneword.export.parity import Difference
from oneword.runtime.commands import ProgressBar
from oneword.runtime.profiles import PlanLimits

EXPORTED = SimpleNamespace(bundle="bundle", differences=(), unchecked=(), unfused=(), warnings=())


class Hopper:
    """Stands in for `Device` on a machine with an H100."""

    target = "sm90"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments plans were built with; replaces the export and the build, on a machine with an sm90."""
    calls: list[tuple[Any, ...]] = []

    def build(*arguments: Any) -> dict[str, list[Path]]:
        calls.append(arguments[1:4])
        return {"denoise_step": [Path("a.plan")]}

    monkeypatch.setattr(builder, "Device", Hopper)
    monkeypatch.setattr(cli, "installed_version", lambda flavour: "1.0")
    monkeypatch.setattr(cli, "build_plans", build)
    monkeypatch.setattr(cli, "summary", lambda exported, seconds: {})
    monkeypatch.setattr(cli, "plan_warnings", lambda exported: ["a mask"])
    monkeypatch.setattr(write, "export_bundle", lambda *_, **__: EXPORTED)
    return calls


def run(monkeypatch: pytest.MonkeyPatch, *line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ti-export", "model", "bundle", *line])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("options", "flavour", "target"),
    [
        (["--plans", "tensorrt"], Flavour.TENSORRT, "sm90"),
        (["--plans", "tensorrt", "--target", "sm90"], Flavour.TENSORRT, "sm90"),
        (["--plans", "tensorrt-rtx"], Flavour.RTX, "sm89"),
        (["--plans", "tensorrt-rtx", "--target", "sm89,sm120"], Flavour.RTX, "sm89,sm120"),
    ],
)
def test_plans_are_built_for_the_installed_or_the_requested_gpu(
    options: list[str],
    flavour: Flavour,
    target: str,
    built: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *options, "--static-size", "96x64", "--json") == 0

    assert built == [(flavour, target, PlanLimits(static_sizes=((96, 64),)))]
    assert json.loads(capsys.readouterr().out) == {
        "warnings": ["a mask"],
        "target": target,
        "plans": {"denoise_step": ["a.plan"]},
    }


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("", "precision", Precision.FP32),
        ("--precision bf16", "precision", Precision.BF16),
        ("", "weights", Weights.FLOAT),
        ("--weights int8", "weights", Weights.INT8),
        ("--config sd15", "config", Path("sd15")),
        ("--without text_encoder_3", "without", ("text_encoder_3",)),
        ("--preview taesd3", "preview", Path("taesd3")),
        (
            "--lora a.safetensors --lora b.safetensors:-0.5",
            "loras",
            [Lora(Path("a.safetensors")), Lora(Path("b.safetensors"), -0.5)],
        ),
    ],
)
def test_the_options_of_the_model_reach_the_export(
    monkeypatch: pytest.MonkeyPatch, line: str, option: str, value: object
) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(write, "export_bundle", lambda *_, **values: options.update(values) or EXPORTED)

    assert run(monkeypatch, *line.split(), "--json") == 0

    assert options[option] == value


def test_limits_of_plans_reach_the_builder(built: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--plans tensorrt --max-batch 2 --max-size 768 --static-size 512x640 --static-size 512x512"
    assert run(monkeypatch, *options.split()) == 0
    assert built == [(Flavour.TENSORRT, "sm90", PlanLimits(2, 768, ((512, 640), (512, 512))))]


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_warnings_are_printed_and_in_the_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool, terminal: bool
) -> None:
    warning = "PNDMScheduler has no counterpart here"
    exported = SimpleNamespace(**{**vars(EXPORTED), "warnings": (warning,)})
    monkeypatch.setattr(write, "export_bundle", lambda *_, **__: exported)
    monkeypatch.setattr(ProgressBar, "on_terminal", terminal)

    assert run(monkeypatch, *(["--json"] if as_json else [])) == 0

    output = capsys.readouterr()
    assert warning in output.err.splitlines()
    assert not as_json or json.loads(output.out)["warnings"] == [warning]


def test_without_plans_none_are_built_and_nothing_is_printed_about_tensorrt(
    built: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json") == 0

    assert built == []
    assert json.loads(capsys.readouterr().out) == {"warnings": [], "target": None, "plans": {}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plans", "tensorrt", "--target", "sm89"], "builds for the GPU it runs on, which is sm90"),
        (["--plans", "tensorrt-rtx", "--target", "sm90"], "builds for sm75, sm80, sm86, sm89, sm120, sm121"),
        (["--plans", "openvino"], "'openvino' is not one of 'tensorrt', 'tensorrt-rtx'"),
        (["--engine", "openvino"], "No such option"),
        (
            ["--plans", "tensorrt-rtx", "--weights", "int8"],
            "which does not run int8 weights: drop one of them",
        ),
        (["--target", "sm89"], "--target has no effect without plans: add --plans tensorrt or --plans tensorrt-rtx"),
        (["--max-batch", "4"], "--max-batch has no effect without plans"),
        (["--max-size", "64"], "--max-size has no effect without plans"),
        (["--static-size", "64x64"], "--static-size has no effect without plans"),
        (["--static-size", "64"], "'64' is not WIDTHxHEIGHT, for example 512x512"),
        (["--precision", "fp8"], "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
        (["--lora", "style.safetensors:strong"], "is not FILE or FILE:SCALE, for example style.safetensors:0.8"),
        (["--lora", "style.safetensors:inf"], "is not FILE or FILE:SCALE"),
    ],
)
def test_options_that_cannot_be_satisfied_are_wrong_usage(
    options: list[str],
    message: str,
    built: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *options) == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert built == []


def test_the_parity_report_has_a_heading_and_one_line_for_each_output_but_finite() -> None:
    exported = SimpleNamespace(
        differences=(
            Difference("vae_decoder", "images", 0.012, "levels", 0.05),
            Difference("vae_decoder", "finite", 0.0, "relative", 0.0),
        ),
        unchecked=("denoise_step: no engine",),
        unfused=("vae_decoder.images: 9 levels",),
    )

    assert cli.parity_lines(exported) == [
        "largest difference from PyTorch, by output:",
        "  vae_decoder.images: 1.2e-02 levels (allowed 0.05)",
        "not checked: denoise_step: no engine",
        "without operators of ONNX Runtime's own: vae_decoder.images: 9 levels",
    ]
