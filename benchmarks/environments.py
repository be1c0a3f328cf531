"""The contenders of `benchmarks.latency` that run in Python environments of their own, built by benchmarks/peers/*.sh.

    openvino-genai-static, openvino-genai-dynamic    genai.sh
    optimum-intel                                    genai.sh too, and the model that optimum-cli converts for both
    sdcpp-f16, sdcpp-q8_0                            sdcpp.sh

Each is one script in benchmarks/peers/, which gets a job as JSON and imports nothing of this project, so that its
process has no PYTHONPATH.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.psnr import psnr

SCRIPTS = Path(__file__).parent / "peers"
Result = dict[str, Any]
"""Measurements, all of them numbers, or `error`: one line."""


class ProcessError(Exception):
    """A process failed; the message is one line."""


@dataclass(frozen=True)
class Peer:
    """A contender: its environment and script, and its settings in the job."""

    environment: str
    script: str
    converted: bool
    """Whether it reads the model that optimum-cli converts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: Mapping[str, Any] = field(default_factory=lambda: {"precision": "f32"})
    """The settings with which it computes in float32."""


PEERS = {
    "openvino-genai-static": Peer("genai", "genai.py", True, {"static": True}),
    "openvino-genai-dynamic": Peer("genai", "genai.py", True, {"static": False}),
    "optimum-intel": Peer("genai", "optimum_intel.py", True),
    "sdcpp-f16": Peer("sdcpp", "sdcpp.py", False, {"weights": "f16"}, {"weights": "f32"}),
    "sdcpp-q8_0": Peer("sdcpp", "sdcpp.py", False, {"weights": "q8_0"}, {"weights": "f32"}),
}


def available(folder: Path) -> dict[str, str]:
    """The script that builds the missing environment of each peer, or an empty string if it exists."""
    scripts = {}
    for name, peer in PEERS.items():
        exists = (folder / peer.environment / "bin" / "python").exists()
        scripts[name] = "" if exists else f"benchmarks/peers/{peer.environment}.sh"
    return scripts


def measured(
    name: str, job: Mapping[str, Any], model: Path, home: Path, folder: Path, options: argparse.Namespace
) -> Result:
    """One peer's results. `job` has what all contenders have in common; `home` holds what is made of the model,
    `folder` what is made for this case. Raises ProcessError."""
    peer = PEERS[name]
    environment = options.peers / peer.environment / "bin"
    path = converted(environment, model, home) if peer.converted else model
    job = {**job, "model": str(path), "cache": str(folder / f"{name}-cache"), "cold": None, **peer.settings}
    picture, exact_picture = folder / f"{name}.png", folder / f"{name}-f32.png"
    cold_job = {**job, "prompts": job["warm_up"][:1], "cold": str(picture)}

    def run_job(job: Mapping[str, Any]) -> str:
        line = [environment / "python", SCRIPTS / peer.script, json.dumps(job)]
        return process(line, threads=options.threads, peer=True)

    run_job(cold_job)  # fills its cache
    result: Result = json.loads(run_job(job))
    start = time.perf_counter()
    run_job(cold_job)
    result["cold_s"] = time.perf_counter() - start
    if any(job[key] != value for key, value in peer.exact.items()):
        cache = str(folder / f"{name}-f32-cache")
        run_job({**cold_job, **peer.exact, "cold": str(exact_picture), "cache": cache})
        result["db"] = decibels(picture, exact_picture)
    return result


def converted(environment: Path, model: Path, home: Path) -> Path:
    """The model in OpenVINO's format with fp16 weights, converted once."""
    folder, partial = home / "genai", home / "genai.partial"
    if not (folder / "model_index.json").exists():
        export = ["export", "openvino", "--task", "text-to-image", "--library", "diffusers", "--weight-format", "fp16"]
        shutil.rmtree(partial, ignore_errors=True)
        process([environment / "optimum-cli", *export, "--model", model, partial], threads=0, peer=True)
        partial.rename(folder)
    return folder


def decibels(picture: Path, reference: Path) -> float:
    """PSNR of two pictures on disk, 99 if they are equal."""
    arrays = (np.asarray(Image.open(path).convert("RGB")) for path in (picture, reference))
    return min(psnr(*arrays), 99.0)


def process(line: Sequence[object], threads: int, peer: bool = False) -> str:
    """The last line that a process prints; 0 threads means its own default. Raises ProcessError with its last line of
    error if it fails; all of them are passed on as they come."""
    environment = {key: value for key, value in os.environ.items() if not (peer and key == "PYTHONPATH")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    last = ""
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            [*map(str, line)], env=environment, stdout=output, stderr=subprocess.PIPE, text=True
        ) as run:
            assert run.stderr
            for message in run.stderr:
                sys.stderr.write(message)
                sys.stderr.flush()
                last = message.strip() or last
        if run.returncode:
            killed = f"stopped by signal {-run.returncode}" if run.returncode < 0 else ""
            raise ProcessError((killed or last or f"no message, status {run.returncode}")[:300])
        output.seek(0)
        return output.read().strip().rpartition("\n")[2]
