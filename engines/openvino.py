"""OpenVINO: graphs on the CPU, in bfloat16 if the processor supports it. The only module that imports `openvino`
besides `oneword.engines.openvino_conversion`.

A graph exported in fp32 then computes its convolutions and products in bfloat16, and `backend` reports it; whatever
follows the last of them, such as the sampler's update in `denoise_step`, stays in float32.

A small graph is compiled once for any shape. Dynamic shapes cost a third of its time in each run, so after many runs
with the same shapes it is compiled again for these, in the background. Both are cached as plans.

Of a graph that is not small two plans are kept. The first is the graph in OpenVINO's own format, whose weights are
mapped instead of read. It is made at the first start. Where the engine computes in bfloat16, which keeps fewer bits of
a weight than fp16 does, its weights are in fp16, except for those outside fp16's range. Where it computes in float32,
only weights that fp16 represents exactly are. The second is the compiled graph without its weights, which it finds in
the first: a few MiB for each set of shapes that a process compiled first. If the first cannot be written, the ONNX file
is compiled, and a warning in the log of `oneword.engines` gives the reason.

Such a graph is first compiled for the shapes in use. That makes each run of SD 1.5's step faster and saves seconds in
the first, and its decoder needs less memory. When other shapes arrive, that version is released and one for any shape
takes its place, so its weights are in memory once. That one stays until the process ends: a single request of another
size makes the steps of all later ones slower.

One infer request serves all bindings of a compiled graph: a binding sets its tensors before it runs.
"""

import contextlib
import io
import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from oneword.engines.engine import (
    AnyArray,
    Array,
    HostArray,
    NumpyArray,
    Shape,
    ShapeUse,
    check_opened,
    complete_feeds,
    host_buffers,
)
from oneword.engines.errors import EngineError, FileError, one_line
from oneword.engines.files import Stamp, files_of, size_of, stamp
from oneword.engines.graph import Graph, Precision, TensorSpec, Weights
from oneword.engines.openvino_conversion import convert_graph, load_openvino
from oneword.engines.plans import PlanCache, PlanKey
from oneword.engines.threads import cpu_threads

OFTEN = 100  # runs with the same shapes, after which compiling a graph for them begins to pay
_SMALL = 64 << 20  # bytes; a smaller graph is cheap to hold twice
_CONVERTED = (".xml", ".bin")
_ROUNDED, _UNROUNDED = ("any", "fp16 weights, 3"), ("any in float32", "exact weights, 2")
"""Device and flag of a conversion's key: with weights rounded to fp16, or not. The numbers change with what
`convert_graph` writes. Neither depends on the processor: the "device" says where the conversion is used, since a new
plan deletes those of its graph and device, and a bundle should keep both conversions."""
_MOST_PLANS = 64
_MOST_STATIC = 8  # shapes that one graph is compiled for in the background, and whose versions are kept

_Key: TypeAlias = tuple[tuple[str, Shape], ...]
"""Shapes by name."""
_Port: TypeAlias = tuple[set[str], list[object]]
"""An input's or output's names and shape."""
_log = logging.getLogger("oneword.engines")
_failed: set[tuple[Path, str]] = set()
"""Plans, by folder and key, that this process could not make: it does not try again."""


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO for the CPU, or read from `plans`. `exact` keeps float32 on any processor.

    Raises:
        MissingPackage: openvino is not installed.
        EngineError: the graph cannot be compiled.
    """

    limits: Mapping[str, int] = {}

    def __init__(
        self,
        name: str,
        graph: Graph,
        folder: Path,
        threads: int | None = None,
        exact: bool = False,
        plans: PlanCache | None = None,
    ) -> None:
        ov = load_openvino()
        self.name = name
        self.inputs = {spec.name: spec for spec in graph.inputs}
        self.outputs = {spec.name: spec for spec in graph.outputs}
        core = ov.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        low = not exact and "BF16" in capabilities
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if low else "f32", "PERFORMANCE_HINT": "LATENCY"}
        settings["ENABLE_CPU_PINNING"] = "NO"  # a thread that is bound to a core waits for whatever else runs there
        if graph.weights is Weights.INT8:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"  # else products round their other operand to 8 bits too
        if count := cpu_threads(threads):
            settings["INFERENCE_NUM_THREADS"] = str(count)
        self.backend = f"openvino {ov.__version__.split('-')[0]} cpu {Precision.BF16 if low else graph.precision}"
        key = PlanKey(
            graph_digest=graph.digest,
            backend="openvino",
            version=ov.__version__,
            device=f"{core.get_property('CPU', 'FULL_DEVICE_NAME')} {sorted(capabilities)}",
            precision=graph.precision,
            ranges={},
            flags=(settings["INFERENCE_PRECISION_HINT"], settings["PERFORMANCE_HINT"]),
        )
        path = folder / graph.files[0]
        try:
            self._compiler = _Compiler(core, path, settings, plans, key, halve=low)
        except RuntimeError as error:
            raise EngineError(f"cannot open graph {name!r} ({path}): {one_line(error)}") from error
        inputs, outputs = self._compiler.inputs, self._compiler.outputs
        check_opened(name, path, graph, _named(inputs, self.inputs), _named(outputs, self.outputs))
        self.shape_use = self._compiler.shape_use

    def bind(
        self,
        shapes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, AnyArray] | None = None,
        outputs: Mapping[str, AnyArray] | None = None,
    ) -> "OpenVinoBinding":
        """See Engine.bind. Given arrays must be C-contiguous."""
        buffers = host_buffers(self.name, self.inputs, self.outputs, shapes, inputs, outputs)
        return OpenVinoBinding(self.name, self._compiler, *buffers)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """See Engine.run."""
        arrays = complete_feeds(self.name, self.inputs, feeds)
        compiled = _compiled_for(self.name, self._compiler, {name: value.shape for name, value in arrays.items()})
        request = compiled.model.create_infer_request()
        for name, value in arrays.items():
            request.set_tensor(name, _tensor(value))
        _infer(self.name, request)
        return {name: request.get_tensor(name).data.copy() for name in self.outputs}


class OpenVinoBinding:
    """Inputs and outputs in host memory that the infer request shares: a run copies nothing."""

    capturable = False

    def __init__(
        self,
        name: str,
        compiler: "_Compiler",
        inputs: Mapping[str, NumpyArray],
        outputs: Mapping[str, NumpyArray],
    ) -> None:
        self._name = name
        self._compiler = compiler
        self._shapes = {key: value.shape for key, value in inputs.items()}
        self._key = tuple(self._shapes.items())
        self.tensors = {key: _tensor(value) for key, value in {**inputs, **outputs}.items()}
        """OpenVINO's views of all inputs and outputs, by name."""
        self._compiled = compiler.cached(self._key) or _compiled_for(name, compiler, self._shapes)
        self.inputs: Mapping[str, Array] = {key: HostArray(value) for key, value in inputs.items()}
        self.outputs: Mapping[str, Array] = {key: HostArray(value) for key, value in outputs.items()}

    def run(self, stream: int | None = None) -> None:
        """See Binding.run. The CPU has no streams."""
        if self._compiled.released:
            self._compiled = _compiled_for(self._name, self._compiler, self._shapes)
        if not self._compiled.static:
            self._compiled = self._compiler.counted(self._key) or self._compiled
        _infer(self._name, self._compiled.request_of(self))

    def specialize(self) -> None:
        """See Binding. A large graph is not compiled again."""
        if self._compiler.small and not self._compiled.static:
            try:
                self._compiled = self._compiler.specialized(self._key)
            except RuntimeError as error:
                raise EngineError(f"cannot compile graph {self._name!r} for its shapes: {one_line(error)}") from error


class _Compiled:
    """A compiled graph and the one infer request that its bindings share."""

    def __init__(self, model: Any, static: bool) -> None:
        self.model: Any = model
        self.static = static
        self._request: Any = None
        self._bound: weakref.ref[OpenVinoBinding] | None = None

    def request_of(self, binding: OpenVinoBinding) -> Any:
        """The request with the binding's tensors, which it releases when the binding is gone."""
        if self._request is None or self._bound is None or self._bound() is not binding:
            self._request = self._request or self.model.create_infer_request()
            for key, tensor in binding.tensors.items():
                self._request.set_tensor(key, tensor)
            self._bound = weakref.ref(binding, self._forget)
        return self._request

    @property
    def released(self) -> bool:
        """Whether it can no longer run."""
        return self.model is None

    def release(self) -> None:
        """Frees the weights, also while bindings refer to it."""
        self.model = self._request = self._bound = None

    def _forget(self, bound: "weakref.ref[OpenVinoBinding]") -> None:
        if bound is self._bound:
            self._request = None


class _Compiler:
    """Compiles one graph, for any shape or for fixed ones, or reads what an earlier start compiled.

    A graph that is not small is compiled from its plan in OpenVINO's own format, whose weights `halve` rounds to fp16.
    """

    def __init__(
        self,
        core: Any,
        path: Path,
        settings: Mapping[str, str],
        plans: PlanCache | None,
        key: PlanKey,
        *,
        halve: bool,
    ) -> None:
        self._core, self._path, self._settings, self._key, self._halve = core, path, settings, key, halve
        self._stamps = self._read_stamps()
        self.small = size_of(path) <= _SMALL
        self.shape_use = ShapeUse.PADDED if self.small else ShapeUse.FIRST
        self._lock = threading.Lock()
        self._first: tuple[Mapping[str, Shape], _Compiled] | None = None
        self._dynamic: _Compiled | None = None
        self._background: ThreadPoolExecutor | None = None
        self._runs = Counter[_Key]()  # of a small graph, by shapes that it was not compiled for
        self._pending: dict[_Key, Future[_Compiled]] = {}
        self._attempted = set[_Key]()
        self._static: OrderedDict[_Key, _Compiled] = OrderedDict()  # the most recently used
        self._plans = plans
        if self.small:
            self._dynamic = self.compile()
        model = self._dynamic.model if self._dynamic else core.read_model(*self._files())
        # Their names include those of the conversions that compiling removed.
        self.inputs, self.outputs = ([_port(value) for value in values] for values in (model.inputs, model.outputs))

    def compiled_for(self, shapes: Mapping[str, Shape]) -> _Compiled:
        """The compiled graph for these shapes. Raises RuntimeError, which is OpenVINO's."""
        with self._lock:
            if self._dynamic is not None:
                return self._dynamic
            if self._first is None:
                self._first = dict(shapes), self.compile(shapes)
            if self._first[0] == shapes:
                return self._first[1]
            self._check_source(self._files())  # while the first version can still be used
            self._first[1].release()  # before another copy of the weights is made
            self._first = None
            self._dynamic = self.compile()
            return self._dynamic

    def counted(self, key: _Key) -> _Compiled | None:
        """Counts a run of a small graph. Compiles it for shapes that come often, in the background, and returns that
        version once it exists."""
        if not self.small:
            return None
        self._runs[key] += 1
        if self._runs[key] >= OFTEN and key not in self._attempted and len(self._attempted) < _MOST_STATIC:
            self._attempted.add(key)
            self._background = self._background or ThreadPoolExecutor(1, "openvino-compile")
            self._pending[key] = self._background.submit(self.compile, dict(key))
        if key in self._pending and self._pending[key].done():
            future = self._pending.pop(key)
            if future.exception() is None:  # else it keeps the version that it has
                return self._remember(key, future.result())
        return self._static.get(key)

    def compile(self, shapes: Mapping[str, Shape] | None = None) -> _Compiled:
        """Compiles for these shapes, or reads the plan. Raises RuntimeError, which is OpenVINO's."""
        files = self._files()
        fresh: _Compiled | None = None

        def build() -> bytes:
            nonlocal fresh
            fresh = self._compile(files, shapes)
            stream = io.BytesIO()
            fresh.model.export_model(stream)
            self._check_source(files)  # it was not replaced meanwhile: the plan is kept under this graph's key
            return stream.getvalue()

        plans = self._plans if self.small or len(files) > 1 else None
        if plans is not None and self._has_room(plans):
            with contextlib.suppress(FileError):  # a full or read-only disk should not keep it from running
                plan = plans.load_or_build(self._key_for(files, shapes), build)
                return fresh or self._read(plan, files, shapes) or self._compile(files, shapes)
        return fresh or self._load(files, shapes) or self._compile(files, shapes)

    def _has_room(self, plans: PlanCache) -> bool:
        """Whether another plan may be written. If there are many, those of other versions of OpenVINO go first."""
        count = len([*plans.folder.glob("*.plan")])
        if count >= _MOST_PLANS:
            with contextlib.suppress(FileError):  # a read-only disk
                plans.keep_version(self._key.version)
            count = len([*plans.folder.glob("*.plan")])
        return count < _MOST_PLANS

    def cached(self, key: _Key) -> _Compiled | None:
        """The version of a small graph for these shapes that was compiled before, in this process or an earlier one."""
        if not self.small:
            return None
        compiled = self._static.get(key) or self._load(self._files(), dict(key))
        return None if compiled is None else self._remember(key, compiled)

    def specialized(self, key: _Key) -> _Compiled:
        """The version of a small graph for these shapes. Raises RuntimeError, which is OpenVINO's."""
        return self.cached(key) or self._remember(key, self.compile(dict(key)))

    def _remember(self, key: _Key, compiled: _Compiled) -> _Compiled:
        """Keeps a version for bindings to come: reading its plan takes as long as several runs."""
        self._static[key] = compiled
        self._static.move_to_end(key)
        if len(self._static) > _MOST_STATIC:
            self._static.popitem(last=False)
        return compiled

    def _load(self, files: Sequence[Path], shapes: Mapping[str, Shape] | None) -> _Compiled | None:
        if self._plans is None or (plan := self._plans.load(self._key_for(files, shapes))) is None:
            return None
        return self._read(plan, files, shapes)

    def _read(self, plan: bytes, files: Sequence[Path], shapes: Mapping[str, Shape] | None) -> _Compiled | None:
        settings = self._settings_for(files)
        if len(files) > 1:
            settings["WEIGHTS_PATH"] = str(files[1])
        try:
            return _Compiled(self._core.import_model(io.BytesIO(plan), "CPU", settings), shapes is not None)
        except RuntimeError:
            return None

    def _compile(self, files: Sequence[Path], shapes: Mapping[str, Shape] | None) -> _Compiled:
        self._check_source(files)
        model = self._core.read_model(*files)
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        return _Compiled(self._core.compile_model(model, "CPU", self._settings_for(files)), shapes is not None)

    def _files(self) -> list[Path]:
        """The graph's file, or the two of its plan; found again each time, since another version may delete them."""
        if self.small or self._plans is None:
            return [self._path]
        return _converted(self._core, self._path, self._plans, self._key, self._halve, self._check_unchanged)

    def _check_source(self, files: Sequence[Path]) -> None:
        """Raises EngineError if these are the graph's own files, and no longer those that were opened."""
        if len(files) == 1:
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Raises EngineError if the graph's files are no longer those that were opened."""
        if self._read_stamps() != self._stamps:
            raise EngineError(f"{self._path} was replaced or removed after it was opened: open the bundle again")

    def _read_stamps(self) -> Mapping[str, Stamp] | None:
        """Those of the .onnx file and its external data; None if they cannot be read."""
        try:
            return {file.name: stamp(self._key.graph_digest, file.stat()) for file in files_of(self._path)}
        except OSError:
            return None

    def _settings_for(self, files: Sequence[Path]) -> dict[str, str]:
        """With weights in a file of their own, what is exported refers to it instead of holding them."""
        return {**self._settings, "CACHE_MODE": "OPTIMIZE_SIZE"} if len(files) > 1 else {**self._settings}

    def _key_for(self, files: Sequence[Path], shapes: Mapping[str, Shape] | None) -> PlanKey:
        ranges = {f"{name}.{i}": (n, n, n) for name, shape in (shapes or {}).items() for i, n in enumerate(shape)}
        weights = [path.name for path in files[1:]]  # the name contains the file's hash
        return replace(self._key, ranges=ranges, flags=(*self._key.flags, *weights))


def _converted(
    core: Any, path: Path, plans: PlanCache, key: PlanKey, halve: bool, check_unchanged: Callable[[], None]
) -> list[Path]:
    """The graph as OpenVINO's own two files; the ONNX file if they cannot be written or read. `check_unchanged` raises
    EngineError if that is another file by now."""
    device, form = _ROUNDED if halve else _UNROUNDED
    key = replace(key, device=device, flags=(form,))
    if (plans.folder, key.name) in _failed:
        return plans.load_files(key, _CONVERTED) or [path]  # another process may have made them

    def convert(xml: Path) -> None:
        check_unchanged()
        convert_graph(core, path, xml, halve=halve)
        check_unchanged()

    try:
        return plans.load_or_build_files(key, _CONVERTED, convert)
    except (FileError, RuntimeError, MemoryError) as error:  # a full or read-only disk should not keep it from running
        _failed.add((plans.folder, key.name))
        _log.warning(
            "%s is compiled from its ONNX file, which takes more memory: it cannot be kept in OpenVINO's format: %s",
            path.name,
            one_line(error),
        )
        return [path]


def _port(value: Any) -> _Port:
    shape = value.get_partial_shape()
    return value.names, [] if shape.rank.is_dynamic else [str(d) if d.is_dynamic else d.get_length() for d in shape]


def _named(ports: Iterable[_Port], specs: Mapping[str, TensorSpec]) -> dict[str, Sequence[object]]:
    """Shapes by the names that the manifest uses."""
    return {min(names & specs.keys() or names or ["(no name)"]): shape for names, shape in ports}


def _tensor(value: NumpyArray) -> Any:
    return load_openvino().Tensor(value, shared_memory=True)


def _compiled_for(name: str, compiler: _Compiler, shapes: Mapping[str, Shape]) -> _Compiled:
    try:
        return compiler.compiled_for(shapes)
    except RuntimeError as error:
        raise EngineError(f"cannot compile graph {name!r} for {dict(shapes)}: {one_line(error)}") from error


def _infer(name: str, request: Any) -> None:
    try:
        request.infer()
    except RuntimeError as error:
        raise EngineError(f"graph {name!r} failed: {one_line(error)}") from error
