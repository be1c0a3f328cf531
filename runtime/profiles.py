"""TensorRT's optimization profiles: the smallest, typical and largest size of every axis of a bundle's plans.

Plans are built with `oneword.engines.builder`, which knows nothing of bundles.
"""

import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from oneword.engines.builder import Flavour, build_plan, installed_version, target_of
from oneword.engines.errors import BundleError, UsageError, one_of
from oneword.engines.plans import Ranges
from oneword.runtime.bundle import PLANS, Bundle, Defaults, Manifest

MAX_VOCABULARY = 200_000
GUIDED_AND_UNGUIDED, NO_BRANCHES = (2, 1), (0,)
"""The branches of a picture, of which each count gets a plan of its own; a graph without branches gets one plan."""


class PlanLimits(msgspec.Struct, frozen=True):
    """The sizes that plans are built for."""

    max_batch: int = 4
    """Pictures per call."""
    max_size: int | None = None
    """Longest side in pixels; None means the model's default size."""
    static_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) pairs that get separate plans for one picture, guided and unguided, besides the plan for all
    sizes."""

    def check(self, size_multiple: int, defaults: Defaults, max_side: int | None = None) -> None:
        """Raises UsageError for limits that this model, whose pictures have sides of at most `max_side`, cannot be
        built for."""
        factor, typical = size_multiple, max(defaults.size)
        longest, size = max_side or math.inf, self.max_size or typical
        at_most = "" if max_side is None else f", at most {max_side}"
        if self.max_batch < 1 or not typical <= size <= longest or (self.max_size and self.max_size % factor):
            raise UsageError(
                f"--max-batch {self.max_batch} --max-size {size}: "
                f"the batch must be at least 1, the size at least {typical}{at_most} and a multiple of {factor}"
            )
        for width, height in self.static_sizes:
            if min(width, height) < factor or max(width, height) > longest or width % factor or height % factor:
                raise UsageError(f"--static-size {width}x{height}: both must be multiples of {factor}{at_most}")


DEFAULT_LIMITS = PlanLimits()


def build_plans(
    bundle: Bundle,
    flavour: Flavour,
    target: str | None,
    limits: PlanLimits = DEFAULT_LIMITS,
    report: Callable[[str], None] = lambda message: None,
    only: str | None = None,
) -> dict[str, list[Path]]:
    """Builds the plans of every graph of a bundle, or of graph `only`, unless they are cached, for a target such as
    `sm89` or `sm89,sm120`, which is one plan for both (see target_of). Returns the plans' paths, the one for all sizes
    first.

    If a graph fails, the plans built so far are kept and the bundle is unchanged.

    Raises UsageError (target, sizes), MissingPackage, EngineError (the builder's message), FileError (disk).
    """
    limits.check(bundle.manifest.size_multiple, bundle.manifest.defaults, bundle.manifest.max_side)
    version, target = installed_version(flavour), target_of(flavour, target)
    folder = bundle.path
    return {
        name: [
            build_plan(name, bundle.graph(name), folder, folder / PLANS, flavour, version, target, ranges, report)
            for ranges in graph_ranges(bundle.manifest, name, limits)
        ]
        for name in (bundle.manifest.graphs if only is None else [only])
    }


def graph_ranges(manifest: Manifest, graph: str, limits: PlanLimits) -> list[Ranges]:
    """Smallest, typical and largest size of every named axis of a graph: for all sizes, then for each static one.

    Raises BundleError if it names an axis that no graph has.
    """
    axes = {axis for spec in manifest.graphs[graph].inputs for axis in spec.axes if isinstance(axis, str)}
    ranges = axis_ranges(manifest, graph, limits)
    if unknown := axes - ranges.keys():
        raise BundleError(
            f"graph {graph!r} has an axis {min(unknown)!r}, but each must be {one_of(ranges)}: export the model again "
            "with ti-export"
        )
    dynamic: Ranges = {axis: ranges[axis] for axis in sorted(axes)}
    if not axes & {"h", "w", "H", "W"}:
        return [dynamic]
    branch_counts = GUIDED_AND_UNGUIDED if "N" in axes else NO_BRANCHES
    return [
        dynamic,
        *(_static(manifest, dynamic, size, count) for size in limits.static_sizes for count in branch_counts),
    ]


def axis_ranges(manifest: Manifest, graph: str, limits: PlanLimits) -> dict[str, tuple[int, int, int]]:
    """Smallest, typical and largest size of every axis that graphs may name."""
    factor, typical = manifest.vae.factor, max(manifest.defaults.size)
    max_batch, max_size = limits.max_batch, limits.max_size or typical
    lengths = {encoder.graph: encoder.length for encoder in manifest.encoders}
    conditioning = manifest.conditioning
    context = conditioning.zero_tokens + sum(max(lengths[name] for name in block) for block in conditioning.context)
    tokens = (1, lengths[graph], lengths[graph]) if graph in lengths else (1, context, 4 * context)
    vocabulary = {e.graph: e.vocab_size for e in manifest.encoders}.get(graph, 1)
    smallest = manifest.size_multiple
    side = (smallest // factor, typical // factor, max_size // factor)
    pixels = (smallest, typical, max_size)
    return {
        "B": (1, 1, max_batch),
        "N": (1, 2, 2 * max_batch),
        "M": (1, 2, manifest.max_contexts(max_batch)),
        "T": tokens,
        "V": (vocabulary, vocabulary, max(MAX_VOCABULARY, vocabulary)),
        "h": side,
        "w": side,
        "H": pixels,
        "W": pixels,
    }


def _static(manifest: Manifest, dynamic: Ranges, size: tuple[int, int], branches: int) -> Ranges:
    """One picture of one (width, height) and number of branches; every other axis has its typical size."""
    factor, (width, height) = manifest.vae.factor, size
    fixed = {"H": height, "W": width, "h": height // factor, "w": width // factor, "N": branches}
    sizes = {axis: fixed.get(axis, typical) for axis, (_, typical, _) in dynamic.items()}
    return {axis: (value, value, value) for axis, value in sizes.items()}
