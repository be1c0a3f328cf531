"""The latency benchmark drives OpenVINO GenAI in an environment of its own; here its programs are stand-ins."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import latency

MEASURED = {"picture_ms": 100.0, "step_ms": 5.0, "overhead_ms": 0.1, "peak_mib": 200.0}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Programs that note their arguments in `calls`; optimum-cli writes a model, python prints measurements."""
    binaries = tmp_path / "environment" / "bin"
    binaries.mkdir(parents=True)
    calls = tmp_path / "calls"
    scripts = {
        "optimum-cli": f'echo "$@" >> {calls}\nfor last; do :; done\nmkdir "$last"\necho > "$last/model_index.json"\n',
        "python": f"echo \"$2\" >> {calls}\necho a warning\necho '{json.dumps(MEASURED)}'\n",
    }
    for name, script in scripts.items():
        (binaries / name).write_text(f"#!/bin/sh\n{script}")
        (binaries / name).chmod(0o755)
    return binaries.parent


def test_the_model_is_converted_once_and_a_cold_start_follows_one_that_fills_the_cache(
    environment: Path, tmp_path: Path
) -> None:
    options = Namespace(genai=environment, threads=2)
    case = latency.CASES["sd15"]
    for name in latency.GENAI:
        result = latency.genai(name, case, Path("MODEL"), tmp_path, options)
        assert result.keys() == {*MEASURED, "cold_s"}

    converted, *lines = (tmp_path / "calls").read_text().splitlines()
    jobs = [json.loads(line) for line in lines]
    assert converted.endswith(f"--weight-format fp16 --model MODEL {tmp_path / 'genai.partial'}")
    assert (tmp_path / "genai" / "model_index.json").exists()
    assert [(job["static"], bool(job["cold"])) for job in jobs] == [
        (True, True), (True, False), (True, True), (False, True), (False, False), (False, True)
    ]  # fmt: skip
    assert {(job["model"], job["size"], job["steps"], job["threads"]) for job in jobs} == {
        (str(tmp_path / "genai"), 256, 4, 2)
    }
    assert len({job["cache"] for job in jobs}) == 2
    assert jobs[1]["warm_up"] + jobs[1]["prompts"] == latency.PROMPTS[:3]


def test_a_peer_that_fails_stops_the_run_with_a_line_that_says_how_to_go_on(environment: Path, tmp_path: Path) -> None:
    (environment / "bin" / "python").write_text("#!/bin/sh\nexit 3\n")

    with pytest.raises(SystemExit, match=r"failed with 3; finished measurements are stored: the same command resumes"):
        latency.genai(
            latency.GENAI[0], latency.CASES["sd15"], Path("MODEL"), tmp_path, Namespace(genai=environment, threads=1)
        )
