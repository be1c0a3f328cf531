"""TensorRT and TensorRT-RTX: an ONNX graph becomes a plan. One implementation, for the two APIs agree.

Plans are built through Polygraphy in a child process (`python -m oneword.engines.tensorrt`), since Polygraphy takes its
flavour from the environment when it is first imported, and a crash of the builder must not be ours. TensorRT-RTX builds
for a GPU that is not there; TensorRT builds on the GPU it will run on. Running plans is not here yet.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from oneword.engines.bundle import PLANS, Bundle, Graph, Manifest
from oneword.engines.errors import EngineError, MissingPackage, UsageError
from oneword.engines.plans import PlanCache, PlanKey, Ranges
from oneword.engines.spec import TensorSpec

MAX_VOCABULARY = 200_000
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


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


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]


class _Network(msgspec.Struct, frozen=True):
    """What the parsed network takes and gives, -1 for a dynamic axis."""

    inputs: list[_Tensor]
    outputs: list[_Tensor]


def build_plans(
    bundle: Bundle, flavour: Flavour, target: str, *, max_batch: int = 4, max_size: int | None = None
) -> dict[str, Path]:
    """Builds (or finds in the cache) the plan of every graph of a bundle for a target such as `sm89`; the plans' paths.

    Raises UsageError (target, sizes), MissingPackage, EngineError (the builder's words), FileError (disk).
    """
    version, capability = installed_version(flavour), compute_capability(flavour, target)
    cache = PlanCache(bundle.path / PLANS / f"{flavour}-{version}-{target}")
    paths = {}
    for name, graph in bundle.manifest.graphs.items():
        ranges = axis_ranges(bundle.manifest, name, max_batch, max_size or bundle.manifest.defaults.width)
        key = PlanKey(graph.digest, str(flavour), version, target, graph.precision, ranges)
        cache.load_or_build(key, lambda n=name, r=ranges: build_plan(bundle, n, flavour, capability, r))  # type: ignore[misc]
        paths[name] = cache.path(key)
    return paths


def build_plan(bundle: Bundle, name: str, flavour: Flavour, capability: tuple[int, int], ranges: Ranges) -> bytes:
    """One graph's plan, built in a child process and compared with the manifest before it is believed."""
    graph = bundle.graph(name)
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        job = _Job(
            onnx=os.fspath(bundle.file(graph.files[0])),
            plan=os.fspath(plan),
            rtx=flavour is Flavour.RTX,
            capabilities=[capability],
            shapes={spec.name: profile_shapes(spec, ranges) for spec in graph.inputs},
        )
        child = subprocess.run(
            [sys.executable, "-m", "oneword.engines.tensorrt"],
            input=msgspec.json.encode(job),
            capture_output=True,
            env={
                **os.environ,
                "POLYGRAPHY_USE_TENSORRT_RTX": "1" if job.rtx else "0",
                "POLYGRAPHY_AUTOINSTALL_DEPS": "0",
            },
            check=False,
        )
        if child.returncode != 0 or not plan.is_file():
            raise EngineError(
                f"{flavour} cannot build a plan of graph {name!r}: {last_words(child.stderr, child.stdout)}"
            )
        check_network(name, graph, msgspec.json.decode(child.stdout.splitlines()[-1], type=_Network))
        return plan.read_bytes()


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


def axis_ranges(manifest: Manifest, graph: str, max_batch: int, max_size: int) -> dict[str, tuple[int, int, int]]:
    """Smallest, usual and largest size of every named axis of a graph. Sizes of pictures are in pixels."""
    factor, usual = manifest.vae.factor, manifest.defaults.width
    if max_batch < 1 or max_size < usual or max_size % factor:
        raise UsageError(
            f"--max-batch {max_batch} --max-size {max_size}: at least 1, and a multiple of {factor} from {usual} on"
        )
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


def compute_capability(flavour: Flavour, target: str) -> tuple[int, int]:
    """(8, 9) of `sm89`. Raises UsageError for what cannot be built for."""
    match = re.fullmatch(r"sm(\d+)(\d)", target)
    if match is None or (flavour is Flavour.RTX and target not in RTX_TARGETS):
        raise UsageError(f"--target {target}: {flavour} builds for {', '.join(RTX_TARGETS)}")
    return int(match[1]), int(match[2])


def last_words(*streams: bytes) -> str:
    """What the builder said last, on one line."""
    for stream in streams:
        lines = [line.strip() for line in stream.decode(errors="replace").splitlines() if line.strip()]
        if lines:
            errors = [line for line in lines if "[E]" in line or "Error" in line]
            return (errors or lines)[-1][:400]
    return "it ended without a word"


def _build(job: _Job) -> _Network:
    """In the child: parses, notes what the network takes and gives, builds, writes the plan."""
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path  # pyright: ignore[reportAttributeAccessIssue]

    profile = Profile()
    for name, (smallest, usual, largest) in job.shapes.items():
        profile.add(name, tuple(smallest), tuple(usual), tuple(largest))
    if job.rtx:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        config = CreateConfigRTX(use_gpu=False, compute_capabilities=job.capabilities, profiles=[profile])
    else:
        config = CreateConfig(profiles=[profile])
    builder, network, parser = network_from_onnx_path(job.onnx)
    described = _Network(
        [_describe(network.get_input(i)) for i in range(network.num_inputs)],
        [_describe(network.get_output(i)) for i in range(network.num_outputs)],
    )
    Path(job.plan).write_bytes(engine_bytes_from_network((builder, network, parser), config=config))
    return described


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
    print(msgspec.json.encode(_build(msgspec.json.decode(sys.stdin.buffer.read(), type=_Job))).decode())
