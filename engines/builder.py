"""Plans for TensorRT and TensorRT-RTX, built from ONNX graphs. One implementation serves both: their APIs agree.

Plans are built through Polygraphy in a child process (`python -m oneword.engines.builder`): Polygraphy reads its
flavour from the environment when it is first imported, and a crash of the builder must not take this process down.
TensorRT-RTX builds for GPUs that are not installed; TensorRT builds on the GPU it will run on. Not covered: running
plans, which is in `oneword.engines.tensorrt`.
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
from oneword.engines.graph import Graph, TensorSpec, Weights
from oneword.engines.plans import PlanCache, PlanKey, Ranges

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
Report = Callable[[str], None]


class Flavour(StrEnum):
    """Which of the two libraries; its name is also the name of its pip extra."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"


class _Job(msgspec.Struct, frozen=True):
    """What the child should build."""

    onnx: str
    plan: str
    rtx: bool
    capabilities: list[tuple[int, int]]
    shapes: dict[str, tuple[list[int], list[int], list[int]]]
    channel: int
    """File descriptor for the child's messages: one JSON document per line."""


class _Progress(msgspec.Struct, frozen=True, tag="progress"):
    phase: str
    step: int
    steps: int


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]


class _Network(msgspec.Struct, frozen=True, tag="network"):
    """Inputs and outputs of the parsed network, -1 for a dynamic axis."""

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
    """Builds the plan of one graph, whose files are in `folder`, for sizes within `ranges` and for a target (see
    target_of), unless it is already in the cache under `plans`. Returns the plan's path; `report` is called with the
    builder's progress.

    Raises EngineError (int8 weights; the builder's own message), FileError (disk).
    """
    if graph.weights is Weights.INT8:
        raise EngineError(
            f"graph {name!r} has int8 weights, which {flavour} does not run: export the model without --weights int8"
        )
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
    """One graph's plan, built in a child process; the parsed network is first compared with the graph's specs."""
    with tempfile.TemporaryDirectory() as temporary:
        plan, log = Path(temporary) / "plan", Path(temporary) / "log"
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
        with os.fdopen(readable, "rb") as messages, log.open("wb") as output:
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
                f"{flavour} cannot build a plan of graph {name!r}: {last_words(log.read_bytes(), child.returncode)}; "
                f"the graph in {folder} is intact and runs without it"
            )
        check_network(name, graph, network)
        return plan.read_bytes()


def _start(job: _Job, output: Any) -> "subprocess.Popen[bytes]":
    """Starts the child and sends it the job; closes this end of the channel, so that it ends with the child."""
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
    with contextlib.suppress(BrokenPipeError), child.stdin as stream:  # it died early; its output says why
        stream.write(msgspec.json.encode(job))
    return child


def check_network(name: str, graph: Graph, network: _Network) -> None:
    """Raises EngineError if the inputs and outputs of the parsed network are not those of the manifest."""
    for specs, tensors in ((graph.inputs, network.inputs), (graph.outputs, network.outputs)):
        built = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors}
        expected = {s.name: (str(s.dtype), tuple(a if isinstance(a, int) else -1 for a in s.axes)) for s in specs}
        for tensor in expected.keys() | built.keys():
            if expected.get(tensor) != built.get(tensor):
                raise EngineError(
                    f"the plan of {name} has {tensor!r} as {built.get(tensor)}, "
                    f"its manifest says {expected.get(tensor)}: "
                    "export the model again with ti-export"
                )


def profile_shapes(spec: TensorSpec, ranges: Ranges) -> tuple[list[int], list[int], list[int]]:
    """Smallest, typical and largest shape of an input."""
    smallest, typical, largest = (
        [axis if isinstance(axis, int) else ranges[axis][bound] for axis in spec.axes] for bound in range(3)
    )
    return smallest, typical, largest


def installed_version(flavour: Flavour) -> str:
    """The library's version. Raises MissingPackage with the pip line."""
    try:
        importlib.metadata.version("polygraphy")
        return importlib.metadata.version(str(flavour))
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackage(str(flavour), str(flavour)) from error


def target_of(flavour: Flavour, target: str | None) -> str:
    """What to build for: TensorRT-RTX for any GPU, by default sm89; TensorRT for the installed GPU.

    Raises UsageError for a target that cannot be built for, EngineError if TensorRT finds no GPU.
    """
    if flavour is Flavour.TENSORRT:
        installed = Device().target
        if target not in (None, installed):
            raise UsageError(
                f"--target {target}: {flavour} builds for the GPU it runs on, which is {installed}: leave out --target"
            )
        return installed
    target = target or "sm89"
    compute_capabilities(flavour, target)
    return target


def compute_capabilities(flavour: Flavour, target: str) -> list[tuple[int, int]]:
    """[(8, 9), (12, 0)] for `sm89,sm120`. Raises UsageError for a target that cannot be built for."""
    names = target.split(",")
    if flavour is Flavour.RTX and any(name not in RTX_TARGETS for name in names):
        raise UsageError(f"--target {target}: {flavour} builds for {', '.join(RTX_TARGETS)}")
    return [(int(name[2:-1]), int(name[-1])) for name in names]


def last_words(output: bytes, status: int) -> str:
    """The builder's last error, else its last line of output."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"it ended without output, status {status}"
    errors = [line for line in lines if "[E]" in line or "Error" in line]
    return (errors or lines)[-1][:400]


def _build(job: _Job) -> None:
    """In the child: parses the graph, reports the network's inputs and outputs, builds and writes the plan."""
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path  # pyright: ignore[reportAttributeAccessIssue]

    profile = Profile()
    for name, (smallest, typical, largest) in job.shapes.items():
        profile.add(name, tuple(smallest), tuple(typical), tuple(largest))
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
    """Reports the builder's outermost phases to the parent, at most once per second."""
    trt = importlib.import_module("tensorrt_rtx" if rtx else "tensorrt")

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.last_report = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps and time.monotonic() - self.last_report > 1:
                self.last_report = time.monotonic()
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
