"""What benchmarks write into their pages, from measurements made up here."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import architectures, full_size, latency, training
from benchmarks.miniature import percent
from benchmarks.store import Store


@pytest.fixture
def words() -> list[dict[str, Any]]:
    """Two words: ours reaches the script's scores in a tenth of its time for one and never for the other."""
    parts = dict.fromkeys(training.PARTS, 1.0)
    facts = {"parts": parts, "step": 0.05, "likeness": 0.7, "editability": 0.2}
    return [
        {**facts, "contender": "oneword", "word": 0, "steps": 50, "seconds": 10.0},
        {**facts, "contender": "oneword", "word": 1, "steps": 50, "seconds": 20.0, "likeness": 0.6},
        {**facts, "contender": "diffusers", "word": 0, "steps": 100, "seconds": 100.0},
        {**facts, "contender": "diffusers", "word": 1, "steps": 100, "seconds": 200.0},
    ]


def test_learning_is_compared_by_medians_and_by_the_time_to_equal_scores(
    words: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PAGE", tmp_path / "training.md")

    text = training.compared(words, training.summarise(words))

    assert "| oneword, 50 steps | 15.0 | 0.650 | 0.200 |" in text
    assert "| diffusers, 100 steps | 150.0 | 0.700 | 0.200 |" in text
    assert "| median of words | at least 20 | **5.0** |" in text
    assert "| words of 2 for which a run of oneword reached both | at least 2 | **1** |" in text
    assert "| by word (0: no run of oneword reached both) |  | 10, 0 |" in text
    assert (tmp_path / "training.svg").read_text().startswith("<svg")


def test_ten_of_twelve_words_must_reach_the_scripts_scores() -> None:
    assert [training.reached_bar(words) for words in (12, 6, 1)] == [10, 5, 1]


def test_measurements_of_another_recipe_or_model_are_left_out(tmp_path: Path) -> None:
    args = Namespace(recipe="directional", store=Store(tmp_path, "a"))
    ours, theirs = {"contender": "oneword", "model": "a"}, {"contender": "diffusers", "model": "a"}

    assert training.is_asked_for({**ours, "recipe": "directional"}, args)
    assert training.is_asked_for(theirs, args)
    assert training.is_asked_for({**ours, "full": "sd15", "model": "b"}, args)
    assert not training.is_asked_for({**ours, "full": "sd15", "recipe": "fast"}, args)
    assert not training.is_asked_for({**ours, "recipe": "fast"}, args)
    assert not training.is_asked_for(ours, args)
    assert not training.is_asked_for({**theirs, "model": "b"}, args)


def test_the_steps_of_the_default_recipe_are_timed(tiny_model_dir: Path, tmp_path: Path) -> None:
    pictures, report, output = tmp_path / "pictures", tmp_path / "report.json", tmp_path / "toy.safetensors"
    pictures.mkdir()
    Image.effect_noise((64, 64), 60).convert("RGB").save(pictures / "0.png")
    options = ["--model", str(tiny_model_dir), "--token", "<toy>", "--init", "star", "--output", str(output)]
    line = ["ti-train", str(pictures), *options, "--steps", "3", "--batch-size", "2"]

    child = [sys.executable, "-m", "benchmarks.training", "--child", str(report), *line]
    subprocess.run(child, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)

    parts = json.loads(report.read_text())
    assert parts["optimiser"] > 0
    assert parts["step"] > 0


def test_many_words_in_one_run_are_bold_above_half_the_time_of_single_runs() -> None:
    runs = {"together": 60.0, "<word0>": 40.0, "<word1>": 60.0}
    rows = [{"contender": "oneword", "many": 2, "run": name, "seconds": seconds} for name, seconds in runs.items()]

    text = training.many_table(rows, 2)

    assert "| 2 words in one run over 2 runs | at most 0.5 | **0.60** |" in text
    assert "| one word in its own run, s, median |  | 50 |" in text


def test_full_size_is_listed_in_seconds_per_step_and_gibibytes() -> None:
    row = {"full": "sd15", "contender": "oneword", "step": 6.84, "peak_mib": 5245}

    assert training.full_size_table([row]).endswith("| oneword | 6.8 | 5.1 |")


def test_a_whole_word_of_the_script_is_its_step_times_the_pictures_of_its_readme() -> None:
    """3,000 steps of 4 pictures at 20 s each: 4,000 minutes."""
    steps = [
        {"full": "sd15", "contender": "oneword", "step": 6.0, "peak_mib": 5120},
        {"full": "sd15", "contender": "diffusers", "step": 20.0, "peak_mib": 6656},
    ]
    word = {"full": "sd15", "contender": "oneword", "recipe": "directional", "pictures": 400, "seconds": 2520.0}

    text = training.full_size_table([*steps, {**word, "step": 48.0, "peak_mib": 5632}])

    assert "| diffusers | 20.0 | 6.5 |" in text
    assert text.endswith(
        "| oneword, `directional` | 400 | 42 | 5.5 |\n| diffusers, 3000 steps, extrapolated | 12000 | 4000 | 6.5 |"
    )


def test_a_whole_transformer_is_computed_on_paper_from_two_numbers_of_layers() -> None:
    """A constant of 10 and 2 for each of FLUX.1's 19 layers: 48."""
    keys = ("parameters", "export_seconds", "export_gib", "check_gib", "disk_gib", "call_seconds")
    results = {
        f"{name} fp16": {**dict.fromkeys(keys, float(value)), "difference": 1e-4}
        for name, value in (("flux-dev@1", 12), ("flux-dev@4", 18), ("t5-xxl@2", 5), ("sd35-medium", 7))
    }

    assert full_size.on_paper(results) == {"flux-dev fp16": dict.fromkeys(keys, 48.0)}
    results["t5-xxl fp16"] = dict.fromkeys(("parameters", "export_seconds", "export_gib", "disk_gib"), 12.0)
    text = full_size.export_table(results)
    assert "| t5-xxl fp16 | 0.0 M | 12 s | 12.0 GiB | not run | 12.0 GiB |  |  |" in text
    assert "| flux-dev@4 fp16 | 0.0 M | 18 s | 18.0 GiB | 18.0 GiB | 18.0 GiB | 18 s | 1.0e-04 |" in text
    assert "| flux-dev fp16, on paper | 0.0 M | 48 s | **48.0 GiB** | **48.0 GiB** | 48.0 GiB | 48 s |  |" in text


@pytest.mark.parametrize(("name", "published"), [("sd35-medium", 2.24e9), ("flux-dev", 11.9e9), ("t5-xxl", 4.76e9)])
def test_transformers_have_the_published_numbers_of_parameters(name: str, published: float) -> None:
    """Those of the files on the Hub, which the model cards round: 2.5, 12 and 4.8 billion."""
    with torch.device("meta"):
        assert sum(p.numel() for p in architectures.empty(name).parameters()) == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd4", "unknown model 'sd4': choose from sd15, sd2"),
        (
            "sd35-medium@2",
            "the number of layers of 'sd35-medium@2' is 2, but must be left out, because its layers are not alike",
        ),
        ("sdxl@2", "the number of layers of 'sdxl@2' is 2, but must be left out, because its layers are not alike"),
        ("flux-dev@20", "the number of layers of 'flux-dev@20' is 20, but must be 1 to 19"),
        ("t5-xxl@0", "the number of layers of 't5-xxl@0' is 0, but must be 1 to 24"),
    ],
)
def test_models_of_full_size_are_named_with_their_layers(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architectures.check(name)
    architectures.check("flux-dev@19")


def test_latency_lists_targets_and_every_measure_in_which_another_contender_is_better(tmp_path: Path) -> None:
    ours = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "cold_s": 1.0, "peak_mib": 200.0}
    results = {
        "oneword-openvino": ours,
        "diffusers": {**ours, "picture_ms": 240.0, "cold_s": 5.0, "peak_mib": 400.0},
        "diffusers-openvino": {**ours, "picture_ms": 120.0, "step_ms": 4.99, "cold_s": 9.0},
    }

    lines = latency.bars("miniature", results)

    assert lines == [
        "- oneword-openvino, times faster than diffusers per picture: **2.4** (at least 2.5)",
        "- oneword-openvino, cold start relative to diffusers: 0.2 (at most 0.25)",
        "- oneword-openvino, the host's share of a step: 0.02 (at most 0.03)",
        "- oneword-openvino, a step relative to the bare UNet compiled for one shape: 1.02 (at most 1.03)",
        "- oneword-openvino: 1.002 times the time per step of diffusers-openvino",
    ]
    row = "| oneword-openvino | bf16 | fp32 | 100.0 | 2.40x | 5.00 |  | 0.10 (2.0%) | 1.00 | 5.00x | 200 |  |"
    assert row in latency.table(results, "miniature", bfloat16=True)


def test_targets_that_full_size_misses_beside_diffusers_and_openvino_genai_are_bold() -> None:
    """Ours need 100 ms, 5 s and 200 MiB for a picture, a cold start and at the peak."""
    ours = {"picture_ms": 100.0, "step_ms": 10.0, "overhead_ms": 0.1, "cold_s": 5.0, "peak_mib": 200.0}
    results = {
        "oneword-onnxruntime": ours,
        "oneword-openvino": ours,
        "diffusers": {**ours, "step_ms": 12.0, "cold_s": 50.0, "peak_mib": 160.0},
        "openvino-genai-static": {**ours, "picture_ms": 104.0, "cold_s": 10.0},
        "openvino-genai-dynamic": {**ours, "peak_mib": 100.0},
    }
    expected = [
        "- oneword-onnxruntime, times faster than diffusers per step: **1.2** (at least 1.25)",
        "- oneword-onnxruntime, peak memory relative to diffusers: **1.25** (at most 1)",
        "- oneword-openvino, time per picture relative to openvino-genai-static: **0.962** (at most 0.95)",
        "- oneword-openvino, time for a cold start relative to openvino-genai-static: 0.5 (at most 0.8)",
        "- oneword-openvino, peak memory relative to openvino-genai-dynamic: **2** (at most 1)",
    ]

    assert [line for line in latency.bars("sd15", results) if line in expected] == expected
    assert not {*expected} & {*latency.bars("miniature", results)}


@pytest.mark.parametrize(
    ("name", "floors", "share"),
    [
        ("oneword-openvino", {"bf16": 0.001, "f32": 0.002}, "20%"),
        ("openvino-genai-static", {"bf16": 0.001, "f32": 0.002}, "20%"),
        ("optimum-intel", {"bf16": 0.001, "f32": 0.002}, "20%"),
        ("sdcpp-f16", {"bf16": 0.001, "f32": 0.002}, "40%"),
        ("oneword-openvino", {"f32": 0.002}, "40%"),  # a processor without bfloat16
        ("diffusers-compile", {"bf16": 0.001, "f32": 0.002}, "40%"),
    ],
)
def test_a_step_is_compared_with_the_roof_of_its_number_format(name: str, floors: dict[str, float], share: str) -> None:
    result = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "cold_s": 1.0, "peak_mib": 200.0}

    table = latency.table(latency.with_roof({name: result}, {"floors": floors}), "sd15", bfloat16="bf16" in floors)

    assert f" | 100.0 |  | 5.00 | {share} | 0.10 (2.0%) |" in table


def test_the_roof_is_that_of_the_highest_peaks_which_the_page_lists() -> None:
    """1.6 TFLOP at 800 and 400 GFLOP/s take 2 and 4 s."""
    facts = {"flops": 1.6e12, "numbers": 1.5e9}
    rounds = [{"bf16": 800e9, "f32": 100e9, "memory": 9e9}, {"bf16": 90e9, "f32": 400e9, "memory": 12.3e9}]

    roof = latency.highest([{**facts, "peaks": peaks, "floors": {}} for peaks in rounds])

    assert roof["floors"] == {"bf16": 2, "f32": 4}
    assert latency.results_of("sd15", {}, roof).endswith(
        "- The products of a guided step are 1.6 TFLOP; without caches they move 3 GB in bfloat16, 6 GB in "
        "float32. Measured peaks: 800 GFLOP/s in bfloat16, 400 GFLOP/s in float32, 12.3 GB/s of memory"
    )
    assert latency.highest([]) == {}


def test_a_contender_that_failed_is_a_row_and_not_compared(tmp_path: Path) -> None:
    ours = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "cold_s": 1.0, "peak_mib": 200.0}
    failed = {"error": "cannot open /home/me/model | no room"}
    flaky = {**ours, "picture_ms": 60.0}
    rounds = [
        {"oneword-onnxruntime": ours, "diffusers": failed, "diffusers-compile": failed},
        {"oneword-onnxruntime": ours, "diffusers": failed, "diffusers-compile": flaky},
    ]

    results = latency.with_roof(latency.medians(rounds), {"floors": {"f32": 0.001}})

    assert results["diffusers"] == failed
    assert results["diffusers-compile"] == {**flaky, "roof": 0.2}
    text = latency.table(results, "sd15", bfloat16=False)
    assert f"| diffusers | fp32 | fp32 | failed: cannot open PATH / no room |{'  |' * 8}" in text
    assert not any("of diffusers" in line.replace("diffusers-compile", "") for line in latency.bars("sd15", results))
    assert "- 32 bits, time per picture: oneword-onnxruntime **1.67** of diffusers-compile" in latency.class_lines(
        results, bfloat16=False
    )
    latency.plot({"sd15": results}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_the_panels_of_two_cases_have_different_titles() -> None:
    titles = {latency.plot_title(case) for case in latency.CASES}

    assert len(titles) == len(latency.CASES)
    assert "SD 1.5's architecture, 512x512, 4 steps" in titles


@pytest.mark.parametrize(
    ("name", "bfloat16", "numbers", "bits"),
    [
        ("oneword-openvino", True, ("bf16", "fp16"), 16),
        ("oneword-openvino", False, ("fp32", "fp16"), 32),
        ("oneword-onnxruntime-int8", True, ("fp32", "int8"), 8),
        ("openvino-genai-dynamic", False, ("fp32", "fp16"), 32),
        ("sdcpp-q8_0", True, ("int8", "int8"), 8),
    ],
)
def test_the_class_of_precision_is_that_of_products_or_eight_bits_for_such_weights(
    name: str, bfloat16: bool, numbers: tuple[str, str], bits: int
) -> None:
    assert latency.numbers_of(name, "sd15", bfloat16) == numbers
    assert latency.bits_of(name, bfloat16) == bits


def test_the_best_of_each_class_of_precision_are_compared() -> None:
    ours = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "cold_s": 1.0, "peak_mib": 200.0}
    results = {
        "oneword-onnxruntime": ours,
        "diffusers": {**ours, "picture_ms": 125.0, "cold_s": 0.8},
        "diffusers-compile": {**ours, "picture_ms": 200.0, "peak_mib": 100.0},
        "openvino-genai-static": {**ours, "picture_ms": 50.0},
        "sdcpp-q8_0": {**ours, "picture_ms": 50.0},
    }

    assert latency.class_lines(results, bfloat16=True) == [
        "- 32 bits, time per picture: oneword-onnxruntime 0.8 of diffusers",
        "- 32 bits, time per step: oneword-onnxruntime 1 of diffusers",
        "- 32 bits, time for a cold start: oneword-onnxruntime **1.25** of diffusers",
        "- 32 bits, peak memory: oneword-onnxruntime **2** of diffusers-compile",
    ]
    [picture, *_] = latency.class_lines(results, bfloat16=False)
    assert picture == "- 32 bits, time per picture: oneword-onnxruntime **2** of openvino-genai-static"


def test_the_latency_page_has_a_section_for_each_model(tmp_path: Path) -> None:
    stored = latency.stored(tmp_path, "miniature")
    stored.parent.mkdir(parents=True)
    stored.write_text("{}")
    ours = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "cold_s": 1.0, "peak_mib": 200.0}
    results = {name: {"oneword-onnxruntime": ours} for name in latency.CASES}
    roofs: dict[str, latency.Roof] = {name: {} for name in latency.CASES}

    text = latency.section(results, roofs, Namespace(work=tmp_path, threads=2), "latency.png")

    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {case.title}" for case in latency.CASES.values()
    ]
    assert "](latency.png)" in text


@pytest.mark.parametrize(("share", "text"), [(0.9798, "97.98%"), (0.975, "97.5%"), (0.98, "98.0%"), (1.0, "100.0%")])
def test_a_share_that_misses_its_target_has_enough_digits_to_show_it(share: float, text: str) -> None:
    assert percent(share, 0.98) == text
