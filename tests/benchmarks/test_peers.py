"""The latency benchmark drives contenders in environments of their own; here their programs are stand-ins."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import environments, latency

MEASURED = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "peak_mib": 200.0}
GENAI = ("openvino-genai-static", "openvino-genai-dynamic")
OPTIMUM_CLI = """#!/bin/sh
echo "$@" >> CALLS
for last; do :; done
mkdir "$last"
echo > "$last/model_index.json"
"""
PYTHON = """#!/bin/sh
echo "$2" >> CALLS
cold=$(echo "$2" | sed -n 's/.*"cold": "\\([^"]*\\)".*/\\1/p')
case "$2" in
    *'"precision": "f32"'*'"cold": "'*|*'"weights": "f32"'*) picture=exact.png ;;
    *) picture=low.png ;;
esac
test -z "$cold" || cp "FOLDER/$picture" "$cold"
echo a warning
echo 'MEASURED'
"""


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    """Environments whose programs note their arguments in `calls`: optimum-cli writes a model, python prints
    measurements and draws a black picture, in float32 one of level 16."""
    for level, name in ((0, "low.png"), (16, "exact.png")):
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(tmp_path / name)
    values = {"CALLS": str(tmp_path / "calls"), "FOLDER": str(tmp_path), "MEASURED": json.dumps(MEASURED)}
    for environment in ("genai", "sdcpp"):
        binaries = tmp_path / "peers" / environment / "bin"
        binaries.mkdir(parents=True)
        for name, script in (("optimum-cli", OPTIMUM_CLI), ("python", PYTHON)):
            for key, value in values.items():
                script = script.replace(key, value)
            (binaries / name).write_text(script)
            (binaries / name).chmod(0o755)
    return Namespace(peers=tmp_path / "peers", threads=2)


def run(name: str, tmp_path: Path, options: Namespace, precision: str = "bf16") -> environments.Result:
    home, folder = tmp_path / "home", tmp_path / "case"
    for path in (home, folder):
        path.mkdir(exist_ok=True)
    job = {**latency.job_of(latency.CASES["sd15"], 2), "precision": precision}
    return environments.measured(name, job, Path("MODEL"), home, folder, options)


def jobs_of(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("{")]


def test_the_model_is_converted_once_and_a_cold_start_follows_one_that_fills_the_cache(
    options: Namespace, tmp_path: Path
) -> None:
    for name in GENAI:
        assert run(name, tmp_path, options).keys() == {*MEASURED, "cold_s", "db"}

    converted, *lines = (tmp_path / "calls").read_text().splitlines()
    jobs = [json.loads(line) for line in lines]
    assert converted.endswith(f"--weight-format fp16 --model MODEL {tmp_path / 'home' / 'genai.partial'}")
    assert (tmp_path / "home" / "genai" / "model_index.json").exists()
    assert [(job["static"], bool(job["cold"]), job["precision"]) for job in jobs] == [
        (static, *facts)
        for static in (True, False)
        for facts in ((True, "bf16"), (False, "bf16"), (True, "bf16"), (True, "f32"))
    ]
    assert {(job["model"], job["size"], job["steps"], job["threads"]) for job in jobs} == {
        (str(tmp_path / "home" / "genai"), 256, 4, 2)
    }
    assert len({job["cache"] for job in jobs}) == 4  # of two shapes in two precisions
    assert jobs[1]["warm_up"] + jobs[1]["prompts"] == latency.PROMPTS[:3]


@pytest.mark.parametrize("name", ["optimum-intel", "sdcpp-f16", "sdcpp-q8_0"])
def test_a_picture_is_compared_with_that_of_the_same_program_in_float32(
    options: Namespace, tmp_path: Path, name: str
) -> None:
    """All levels differ by 16: 20 log10(255 / 16) = 24.05 dB."""
    assert run(name, tmp_path, options)["db"] == pytest.approx(24.05, abs=0.01)

    *low, exact = jobs_of(tmp_path)
    if name != "optimum-intel":
        assert [job["weights"] for job in (*low, exact)] == [*[name.removeprefix("sdcpp-")] * 3, "f32"]
        assert exact["model"] == "MODEL"


def test_a_picture_in_float32_is_not_compared(options: Namespace, tmp_path: Path) -> None:
    assert "db" not in run(GENAI[0], tmp_path, options, precision="f32")
    assert len(jobs_of(tmp_path)) == 3


def test_a_picture_of_ours_is_compared_with_the_one_in_float32_that_was_drawn_last(tmp_path: Path) -> None:
    assert latency.distance("oneword-openvino", tmp_path) == {}
    for name, levels in (("oneword-openvino", [200, 0]), ("oneword-onnxruntime", [200, 16])):
        folder = tmp_path / name
        folder.mkdir()
        for number, level in enumerate(levels):
            path = folder / f"{number}.png"
            Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(path)
            os.utime(path, (number, number))

    assert latency.distance("oneword-openvino", tmp_path)["db"] == pytest.approx(24.05, abs=0.01)
    assert latency.distance("diffusers", tmp_path) == {}


def test_a_missing_environment_is_named_with_the_script_that_builds_it(options: Namespace, tmp_path: Path) -> None:
    assert set(environments.available(options.peers).values()) == {""}
    missing = environments.available(tmp_path / "elsewhere")

    assert missing["optimum-intel"] == "benchmarks/peers/genai.sh"
    assert missing["sdcpp-f16"] == "benchmarks/peers/sdcpp.sh"
    for script in missing.values():
        assert (environments.SCRIPTS.parents[1] / script).is_file()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("exit 3", "no message, status 3"),
        ("echo a; echo 'Error: no room' >&2; exit 1", "Error: no room"),
        ("echo a >&2; kill -9 $$", "stopped by signal 9"),
    ],
)
def test_a_peer_that_fails_raises_one_line(options: Namespace, tmp_path: Path, program: str, message: str) -> None:
    (options.peers / "genai" / "bin" / "python").write_text(f"#!/bin/sh\n{program}\n")

    with pytest.raises(environments.ProcessError, match=f"^{message}$"):
        run(GENAI[0], tmp_path, options)


def test_what_a_process_reports_is_passed_on_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=seen.write_text, flush=lambda: None))
    wait = f"for i in $(seq 1000); do test -s {seen} && break; sleep 0.01; done; cat {seen}"

    assert environments.process(["sh", "-c", f"echo first; echo 1 of 9 >&2; {wait}"], threads=0) == "1 of 9"
    assert seen.read_text() == "1 of 9\n"


def test_a_peer_does_not_see_this_projects_modules(
    options: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("PIP_INDEX_URL", "theirs")
    for program in ("python", "optimum-cli"):
        path = options.peers / "genai" / "bin" / program
        noted = f'echo "${{PYTHONPATH-none}} $PIP_INDEX_URL $OMP_NUM_THREADS" >> {tmp_path / "paths"}\n'
        path.write_text(path.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{noted}"))

    run(GENAI[0], tmp_path, options)

    assert (tmp_path / "paths").read_text().splitlines()[1:] == ["none theirs 2"] * 4
    assert (tmp_path / "paths").read_text().startswith("none theirs")
    assert environments.process(["sh", "-c", 'echo "$PYTHONPATH"'], threads=0) == "ours"


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Models and bundles are paths that do not exist; the roof is that of one run after another, 1 FLOP/s and more."""
    peaks = itertools.count(1)
    monkeypatch.setattr(latency, "prepare", lambda model, home: home / "model")
    monkeypatch.setattr(latency, "exported", lambda model, home, weights: home / f"bundle-{weights}")
    monkeypatch.setattr(
        latency, "_python", lambda *_, **__: json.dumps({"flops": 6, "numbers": 1, "peaks": {"f32": next(peaks)}})
    )
    return Namespace(work=tmp_path, threads=1, retry=False)


def test_a_contender_that_fails_is_stored_and_started_again_only_on_request(
    prepared: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    started = []

    def measured(name: str, *_: Any) -> environments.Result:
        started.append(name)
        if name == "diffusers":
            raise environments.ProcessError("no room")
        return dict(MEASURED)

    monkeypatch.setattr(latency, "measured", measured)
    names, case = ["diffusers", "oneword-openvino"], dataclasses.replace(latency.CASES["sd15-512"], rounds=2)
    for _ in range(2):
        rounds, roof = latency.run(case, names, prepared)

        assert started == names * 2
        assert rounds == [{"diffusers": {"error": "no room"}, "oneword-openvino": MEASURED}] * 2
        assert roof["floors"] == {"f32": 3}  # the higher peak, which the second round measured
    prepared.retry = True
    latency.run(case, names, prepared)

    assert started == [*names * 2, "diffusers", "diffusers"]


def test_more_rounds_than_before_are_added_to_those_stored(
    prepared: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(100)
    monkeypatch.setattr(latency, "measured", lambda *_: {**MEASURED, "picture_ms": next(times)})
    case = latency.CASES["sd15"]
    assert case.rounds == 3

    latency.run(dataclasses.replace(case, rounds=1), ["diffusers"], prepared)
    rounds, _ = latency.run(case, ["diffusers"], prepared)

    assert [by_contender["diffusers"]["picture_ms"] for by_contender in rounds] == [100, 101, 102]
    assert latency.medians(rounds)["diffusers"]["picture_ms"] == 101


def test_a_roof_is_stored_before_a_contender_is_measured(prepared: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")

    def measured(*_: Any) -> environments.Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        latency.run(latency.CASES["sd15"], ["diffusers"], prepared)

    [(name, roof)] = json.loads(latency.stored(prepared.work, "sd15").read_text()).items()
    assert (name, roof["peaks"]) == ("0 roof 1 threads", {"f32": 1})


def test_ours_with_int8_weights_runs_on_a_bundle_of_its_own(
    prepared: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []

    def python(*line: object, threads: int) -> str:
        lines.append([str(word) for word in line])
        return json.dumps(MEASURED)

    monkeypatch.setattr(latency, "_python", python)
    prepared.quick = False
    arguments = (latency.CASES["sd15"], Path("model"), Path("home"), Path("case"), prepared)
    for name in ("oneword-openvino-int8", "oneword-openvino"):
        assert latency.measured(name, *arguments).keys() == {*MEASURED, "cold_s"}

    bundles = [next(word for word in line if word.startswith("home/")) for line in lines]
    assert bundles == ["home/bundle-int8"] * 3 + ["home/bundle"] * 3
    assert [line[line.index("--engine") + 1] for line in lines if "--engine" in line] == ["openvino"] * 4


def test_a_step_of_ours_has_the_hosts_share_also_in_a_picture_of_two_steps(tiny_bundle: Path) -> None:
    pytest.importorskip("onnxruntime")
    case = dataclasses.replace(latency.CASES["sdxl"], size=64)
    options = Namespace(bundle=tiny_bundle, contender="oneword-onnxruntime", threads=1)

    draw, step_seconds = latency._ours(case, options)
    draw("a photo of a star")
    step, bare = step_seconds()

    assert case.steps == 2
    assert 0 < bare < step


def test_cases_of_one_model_share_its_bundle_and_have_results_of_their_own(
    tmp_path: Path, prepared: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = []

    def exported(model: Path, home: Path, weights: str) -> Path:
        assert weights == "float"
        homes.append(home)
        return home / "bundle"

    monkeypatch.setattr(latency, "exported", exported)
    for name in ("sd15", "sd15-512", "sd15-20"):
        latency.run(latency.CASES[name], [], prepared)
        assert latency.stored(tmp_path, name).parent.is_dir()

    assert homes == [tmp_path / "sd15"] * 3


STAND_INS = {
    "openvino_genai": """
        class Text2ImagePipeline:
            def __init__(self, model): pass
            def reshape(self, *args): pass
            def compile(self, *args, **settings): pass
            def generate(self, prompt, num_inference_steps, callback, **_):
                drawn(num_inference_steps, None, lambda i: callback(i, num_inference_steps, None))
                return SimpleNamespace(data=np.zeros((1, 4, 4, 3), np.uint8))
            def get_performance_metrics(self):
                return SimpleNamespace(get_unet_infer_duration=lambda: SimpleNamespace(mean=1500))
        """,
    "optimum.intel": """
        class OVPipelineForText2Image:
            @classmethod
            def from_pretrained(cls, model, **settings):
                pipeline = cls()
                pipeline.unet = SimpleNamespace(forward=lambda: clock(1.5))
                return pipeline
            def reshape(self, **shape): pass
            def compile(self): pass
            def set_progress_bar_config(self, **settings): pass
            def __call__(self, prompt, num_inference_steps, callback_on_step_end, **_):
                network = lambda: self.unet.forward()
                drawn(num_inference_steps, network, lambda i: callback_on_step_end(self, i, 0, {}))
                return SimpleNamespace(images=[Image.new("RGB", (4, 4))])
        """,
    "stable_diffusion_cpp": """
        class StableDiffusion:
            def __init__(self, **settings): pass
            def generate_image(self, sample_steps, progress_callback, **_):
                progress_callback(1, sample_steps + 1, 0.0)  # of loading
                drawn(sample_steps, None, lambda i: progress_callback(i + 1, sample_steps, 0.0))
                return [Image.new("RGB", (4, 4))]
        """,
}
CLOCK = """
import time
from types import SimpleNamespace
import numpy as np
from PIL import Image

now = 0.0

def clock(seconds):
    global now
    now += seconds

def drawn(steps, network, ended):
    with open("pictures", "a") as file:
        file.write("drawn\\n")
    for i in range(steps):  # each takes 2 s, 1.5 s of them in the network
        clock(0.5)
        (network or (lambda: clock(1.5)))()
        ended(i)
    clock(1)

time.perf_counter = lambda: now
"""


@pytest.mark.parametrize("script", ["genai", "optimum_intel", "sdcpp"])
def test_a_peer_measures_pictures_and_steps_after_its_warm_up(tmp_path: Path, script: str) -> None:
    """Of four steps and a second of decoding; stand-ins for the libraries move the clock."""
    for name, text in STAND_INS.items():
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CLOCK + textwrap.dedent(text))
    job = {**latency.job_of(latency.CASES["sd15"], 1), "model": "", "cache": "", "cold": None}
    job |= {"steps": 4, "static": True, "precision": "f32", "weights": "f32", "warm_up": ["a"], "prompts": ["b", "c"]}

    def run_peer(job: dict[str, Any]) -> str:
        line = [sys.executable, environments.SCRIPTS / f"{script}.py", json.dumps(job)]
        paths = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(line, check=True, cwd=tmp_path, env=paths, capture_output=True, text=True).stdout

    result = json.loads(run_peer(job))
    assert result.pop("peak_mib") > 0
    overhead = 0 if script == "sdcpp" else 500  # which does not report its network's time
    assert result == {"picture_ms": 9000, "step_ms": 2000, "overhead_ms": overhead}
    assert (tmp_path / "pictures").read_text() == "drawn\n" * 3

    assert run_peer({**job, "cold": str(tmp_path / "cold.png")}) == ""
    with Image.open(tmp_path / "cold.png") as picture:
        assert picture.size == (4, 4)
