"""Plans for TensorRT and TensorRT-RTX, built from ONNX graphs. One implementation, since the two APIs agree.

Plans are built through Polygraphy in a child process (`python -m oneword.engines.builder`), since Polygraphy takes its
flavour from the environment when it is first imported, and a crash of the builder must not be ours. TensorRT-RTX builds
for GPUs that are not there; TensorRT builds on the GPU it will run on. Plans are run in `oneword.engines.tensorrt`.
"""

import contextlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from oneword.engines.cuda import Device
from oneword.engines.errors import EngineError, MissingPackage, UsageError
from oneword.engines.graph import Graph, TensorSpec
from oneword.engines.plans import PlanCache, PlanKey, Ranges

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
Report = Callable[[str], None]


class Flavour(StrEnum):
    """Which of the two libraries; the name is also that of its extra."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"


class _Job(msgspec.Struct, frozen=True):
    """What the child is asked to build."""

    onnx: str
    plan: str
    rtx: bool
    capabilities: list[tuple[int, int]]
    shapes: dict[str, tuple[list[int], list[int], list[int]]]
    channel: int
    """File descriptor for what the child has to say: one JSON document a line."""


class _Progress(msgspec.Struct, frozen=True, tag="progress"):
    phase: str
    step: int
    steps: int


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]


class _Network(msgspec.Struct, frozen=True, tag="network"):
    """What the parsed network takes and gives, -1 for a dynamic axis."""

    inputs: list[_Tensor]
    outputs: list[_Tensor]


def build_plan(
    name: str,
    graph: Graph,
    folder: Path,
    plans: Path,
    flavour: Flavour,
    version: str,
    target: str,
    ranges: Ranges,
    report: Report = lambda message: None,
) -> Path:
    """Builds (or finds in the cache under `plans`) the plan of one graph, whose files are in `folder`, for sizes within
    `ranges` and for a target (see target_of). Returns the plan's path; `report` is called with the builder's progress.

    Raises EngineError (the builder's own message), FileError (disk).
    """
    cache = plan_cache(plans, flavour, version, target)
    key = PlanKey(graph.digest, str(flavour), version, target, graph.precision, ranges)
    capabilities = compute_capabilities(flavour, target)
    cache.load_or_build(key, lambda: _plan_bytes(name, graph, folder, flavour, capabilities, ranges, report))
    return cache.path(key)


def plan_cache(plans: Path, flavour: Flavour, version: str, target: str) -> PlanCache:
    """The cache of the plans for one library version and target."""
    return PlanCache(plans / f"{flavour}-{version}-{target.replace(',', '+')}")


def _plan_bytes(
    name: str,
    graph: Graph,
    folder: Path,
    flavour: Flavour,
    capabilities: Sequence[tuple[int, int]],
    ranges: Ranges,
    report: Report,
) -> bytes:
    """One graph's plan, built in a child process whose network is compared with the graph's specs first."""
    with tempfile.TemporaryDirectory() as temporary:
        plan, words = Path(temporary) / "plan", Path(temporary) / "words"
        readable, writable = os.pipe()
        job = _Job(
            onnx=os.fspath((folder / graph.files[0]).resolve()),
            plan=os.fspath(plan),
            rtx=flavour is Flavour.RTX,
            capabilities=list(capabilities),
            shapes={spec.name: profile_shapes(spec, ranges) for spec in graph.inputs},
            channel=writable,
        )
        network = None
        with os.fdopen(readable, "rb") as messages, words.open("wb") as output:
            child = _start(job, output)
            try:
                for line in messages:
                    message = msgspec.json.decode(line, type=_Progress | _Network)
                    if isinstance(message, _Network):
                        network = message
                    else:
                        report(f"building {name}: {message.phase} {message.step}/{message.steps}")
                child.wait()
            finally:
                child.kill()
                child.wait()
        if child.returncode != 0 or network is None or not plan.is_file():
            raise EngineError(
                f"{flavour} cannot build a plan of graph {name!r}: {last_words(words.read_bytes(), child.returncode)}; "
                f"the graph in {folder} is intact and runs without it"
            )
        check_network(name, graph, network)
        return plan.read_bytes()


def _start(job: _Job, output: Any) -> "subprocess.Popen[bytes]":
    """Starts the child and hands it the job; our end of the channel is closed, so that it ends with the child."""
    environment = {
        **os.environ,
        "POLYGRAPHY_USE_TENSORRT_RTX": "1" if job.rtx else "0",
        "POLYGRAPHY_AUTOINSTALL_DEPS": "0",
    }
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "oneword.engines.builder"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[job.channel],
        )
    finally:
        os.close(job.channel)
    assert child.stdin is not None  # it is a pipe
    with contextlib.suppress(BrokenPipeError), child.stdin as stream:  # it died early; its last words say why
        stream.write(msgspec.json.encode(job))
    return child


def check_network(name: str, graph: Graph, network: _Network) -> None:
    """Raises EngineError where the network that was built does not take and give what the manifest says."""
    for specs, tensors in ((graph.inputs, network.inputs), (graph.outputs, network.outputs)):
        found = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors}
        wanted = {s.name: (str(s.dtype), tuple(a if isinstance(a, int) else -1 for a in s.axes)) for s in specs}
        for tensor in wanted.keys() | found.keys():
            if wanted.get(tensor) != found.get(tensor):
                raise EngineError(
                    f"the plan of {name} has {tensor!r} as {found.get(tensor)}, "
                    f"its manifest says {wanted.get(tensor)}: "
                    "export the model again with ti-export"
                )


def profile_shapes(spec: TensorSpec, ranges: Ranges) -> tuple[list[int], list[int], list[int]]:
    """Smallest, usual and largest shape of an input."""
    smallest, usual, largest = (
        [axis if isinstance(axis, int) else ranges[axis][which] for axis in spec.axes] for which in range(3)
    )
    return smallest, usual, largest


def installed_version(flavour: Flavour) -> str:
    """The library's version. Raises MissingPackage with the pip line."""
    try:
        importlib.metadata.version("polygraphy")
        return importlib.metadata.version(str(flavour))
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackage(str(flavour), str(flavour)) from error


def target_of(flavour: Flavour, target: str | None) -> str:
    """What to build for: RTX for any GPU, sm89 unless told; TensorRT for the one that is here.

    Raises UsageError for a target that cannot be, EngineError where TensorRT finds no GPU.
    """
    if flavour is Flavour.TENSORRT:
        own = Device().target
        if target not in (None, own):
            raise UsageError(f"--target {target}: {flavour} builds for the GPU it runs on, which is {own}")
        return own
    target = target or "sm89"
    compute_capabilities(flavour, target)
    return target


def compute_capabilities(flavour: Flavour, target: str) -> list[tuple[int, int]]:
    """[(8, 9), (12, 0)] of `sm89,sm120`. Raises UsageError for what cannot be built for."""
    names = target.split(",")
    if flavour is Flavour.RTX and any(name not in RTX_TARGETS for name in names):
        raise UsageError(f"--target {target}: {flavour} builds for {', '.join(RTX_TARGETS)}")
    return [(int(name[2:-1]), int(name[-1])) for name in names]


def last_words(words: bytes, status: int) -> str:
    """What the builder said last, on one line."""
    lines = [line.strip() for line in words.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"it ended without a word, status {status}"
    errors = [line for line in lines if "[E]" in line or "Error" in line]
    return (errors or lines)[-1][:400]


def _build(job: _Job) -> None:
    """In the child: parses, tells what the network takes and gives, builds, writes the plan."""
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path  # pyright: ignore[reportAttributeAccessIssue]

    profile = Profile()
    for name, (smallest, usual, largest) in job.shapes.items():
        profile.add(name, tuple(smallest), tuple(usual), tuple(largest))
    with os.fdopen(job.channel, "wb", buffering=0) as channel:
        settings = {"profiles": [profile], "progress_monitor": _monitor(job.rtx, channel)}
        if job.rtx:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            config = CreateConfigRTX(use_gpu=False, compute_capabilities=job.capabilities, **settings)
        else:
            config = CreateConfig(**settings)
        builder, network, parser = network_from_onnx_path(job.onnx)
        described = _Network(
            [_describe(network.get_input(i)) for i in range(network.num_inputs)],
            [_describe(network.get_output(i)) for i in range(network.num_outputs)],
        )
        channel.write(msgspec.json.encode(described) + b"\n")
        Path(job.plan).write_bytes(engine_bytes_from_network((builder, network, parser), config=config))


def _monitor(rtx: bool, channel: Any) -> Any:
    """Tells the parent of the builder's outermost phases, at most once a second."""
    trt = importlib.import_module("tensorrt_rtx" if rtx else "tensorrt")

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps and time.monotonic() - self.told > 1:
                self.told = time.monotonic()
                channel.write(msgspec.json.encode(_Progress(phase_name, step, self.steps[phase_name])) + b"\n")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def _describe(tensor: Any) -> _Tensor:
    dtype = str(tensor.dtype).rsplit(".", 1)[-1]
    return _Tensor(tensor.name, _DTYPES.get(dtype, dtype), [int(size) for size in tensor.shape])


if __name__ == "__main__":
    _build(msgspec.json.decode(sys.stdin.buffer.read(), type=_Job))
