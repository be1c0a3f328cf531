"""Plans for TensorRT and TensorRT-RTX, built from a bundle's graphs. One implementation, for the two APIs agree.

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

from oneword.engines.bundle import PLANS, Bundle, Defaults, Graph, Manifest, Vae
from oneword.engines.cuda import Device
from oneword.engines.errors import EngineError, MissingPackage, UsageError
from oneword.engines.plans import PlanCache, PlanKey, Ranges
from oneword.engines.spec import TensorSpec

MAX_VOCABULARY = 200_000
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
Report = Callable[[str], None]


class Flavour(StrEnum):
    """Which of the two libraries; the name is also that of its extra."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"


class Limits(msgspec.Struct, frozen=True):
    """What plans are made for: up to so many pictures, up to such a side in pixels, and these sizes above all."""

    max_batch: int = 4
    max_size: int | None = None
    """None: the model's own size."""
    static_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) pairs that get, beside the plan of all sizes, one of their own: one guided picture, nothing
    dynamic."""

    def check(self, vae: Vae, defaults: Defaults) -> None:
        """Raises UsageError for what this model cannot be built for."""
        factor, usual = vae.factor, defaults.width
        if self.max_batch < 1 or (self.max_size is not None and (self.max_size < usual or self.max_size % factor)):
            raise UsageError(
                f"--max-batch {self.max_batch} --max-size {self.max_size or usual}: "
                f"at least 1, and a multiple of {factor} from {usual} on"
            )
        for width, height in self.static_sizes:
            if min(width, height) < factor or width % factor or height % factor:
                raise UsageError(f"--static-size {width}x{height}: both must be multiples of {factor}")


DEFAULT_LIMITS = Limits()


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


def build_plans(
    bundle: Bundle,
    flavour: Flavour,
    target: str | None,
    limits: Limits = DEFAULT_LIMITS,
    report: Report = lambda message: None,
    only: str | None = None,
) -> dict[str, list[Path]]:
    """Builds (or finds in the cache) the plans of every graph of a bundle, or of `only` one, for a target such as
    `sm89` or, one plan for both, `sm89,sm120` (see target_of); the plans' paths, that of all sizes first. `report`
    hears how far the builder is.

    What was built stays when a later graph fails, and the bundle is as it was.

    Raises UsageError (target, sizes), MissingPackage, EngineError (the builder's words), FileError (disk).
    """
    limits.check(bundle.manifest.vae, bundle.manifest.defaults)
    version, target = installed_version(flavour), target_of(flavour, target)
    capabilities = compute_capabilities(flavour, target)
    cache = plan_cache(bundle, flavour, version, target)
    paths: dict[str, list[Path]] = {}
    for name in bundle.manifest.graphs if only is None else [only]:
        graph = bundle.graph(name)
        paths[name] = []
        for ranges in graph_ranges(bundle.manifest, name, limits):
            key = PlanKey(graph.digest, str(flavour), version, target, graph.precision, ranges)

            def build(name: str = name, ranges: Ranges = ranges) -> bytes:
                return build_plan(bundle, name, flavour, capabilities, ranges, report)

            cache.load_or_build(key, build)
            paths[name].append(cache.path(key))
    return paths


def plan_cache(bundle: Bundle, flavour: Flavour, version: str, target: str) -> PlanCache:
    """Where the plans of a bundle for one library and target lie."""
    return PlanCache(bundle.path / PLANS / f"{flavour}-{version}-{target.replace(',', '+')}")


def build_plan(
    bundle: Bundle,
    name: str,
    flavour: Flavour,
    capabilities: Sequence[tuple[int, int]],
    ranges: Ranges,
    report: Report = lambda message: None,
) -> bytes:
    """One graph's plan, built in a child process whose network is compared with the manifest before it is believed."""
    graph = bundle.graph(name)
    with tempfile.TemporaryDirectory() as folder:
        plan, words = Path(folder) / "plan", Path(folder) / "words"
        readable, writable = os.pipe()
        job = _Job(
            onnx=os.fspath(bundle.file(graph.files[0])),
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
                f"the bundle {bundle.path} is whole and runs without it"
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


def graph_ranges(manifest: Manifest, graph: str, limits: Limits) -> list[Ranges]:
    """Smallest, usual and largest size of every named axis a graph has: for all sizes, then for each static one."""
    axes = {axis for spec in manifest.graphs[graph].inputs for axis in spec.axes if isinstance(axis, str)}
    ranges = axis_ranges(manifest, graph, limits)
    dynamic: Ranges = {axis: ranges[axis] for axis in sorted(axes)}
    if not axes & {"h", "w", "H", "W"}:
        return [dynamic]
    return [dynamic, *(_static(manifest, dynamic, width, height) for width, height in limits.static_sizes)]


def axis_ranges(manifest: Manifest, graph: str, limits: Limits) -> dict[str, tuple[int, int, int]]:
    """Smallest, usual and largest size of every axis that graphs may name."""
    factor, usual = manifest.vae.factor, manifest.defaults.width
    max_batch, max_size = limits.max_batch, limits.max_size or usual
    length = max(encoder.length for encoder in manifest.encoders)
    tokens = (1, length, length) if any(graph == e.graph for e in manifest.encoders) else (1, length, 4 * length)
    vocabulary = {e.graph: e.vocab_size for e in manifest.encoders}.get(graph, 1)
    side = (1, usual // factor, max_size // factor)
    pixels = (factor, usual, max_size)
    return {
        "B": (1, 1, max_batch),
        "N": (1, 2, 2 * max_batch),
        "M": (1, 2, 2 * max_batch),
        "T": tokens,
        "V": (vocabulary, vocabulary, max(MAX_VOCABULARY, vocabulary)),
        "h": side,
        "w": side,
        "H": pixels,
        "W": pixels,
    }


def _static(manifest: Manifest, dynamic: Ranges, width: int, height: int) -> Ranges:
    """One guided picture of one size: every axis at its usual size, but for the picture's."""
    factor = manifest.vae.factor
    sides = {"H": height, "W": width, "h": height // factor, "w": width // factor}
    sizes = {axis: sides.get(axis, usual) for axis, (_, usual, _) in dynamic.items()}
    return {axis: (size, size, size) for axis, size in sizes.items()}


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
    "BF16": "bfloat16",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def _describe(tensor: Any) -> _Tensor:
    dtype = str(tensor.dtype).rsplit(".", 1)[-1]
    return _Tensor(tensor.name, _DTYPES.get(dtype, dtype), [int(size) for size in tensor.shape])


if __name__ == "__main__":
    _build(msgspec.json.decode(sys.stdin.buffer.read(), type=_Job))
