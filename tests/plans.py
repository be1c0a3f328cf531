"""TensorRT-RTX plans for tests: built once, then cached in `.cache/plans`, keyed by everything they depend on."""

import hashlib
from pathlib import Path

import pytest

from oneword.engines import builder
from oneword.engines.builder import Flavour, installed_version, plan_cache, target_of
from oneword.engines.plans import PlanKey
from oneword.runtime.bundle import PLANS, Bundle
from oneword.runtime.profiles import DEFAULT_LIMITS, PlanLimits, build_plans, graph_ranges

CACHE = Path(__file__).parents[1] / ".cache" / "plans"


def rtx_plans(bundle: Bundle, target: str, limits: PlanLimits = DEFAULT_LIMITS) -> dict[str, list[Path]]:
    """The plans of every graph of a bundle, as `build_plans` returns them; skips if the library is not installed.

    Plans that this builder already made of the same graphs are first copied into the bundle's own cache.
    """
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module)
    version, target = installed_version(Flavour.RTX), target_of(Flavour.RTX, target)
    source = hashlib.sha256(Path(builder.__file__).read_bytes()).hexdigest()[:16]
    shared_cache = plan_cache(CACHE / source, Flavour.RTX, version, target)
    bundle_cache = plan_cache(bundle.path / PLANS, Flavour.RTX, version, target)
    keys = [
        PlanKey(graph.digest, str(Flavour.RTX), version, target, graph.precision, ranges)
        for name, graph in bundle.manifest.graphs.items()
        for ranges in graph_ranges(bundle.manifest, name, limits)
    ]
    for key in keys:
        if (plan := shared_cache.load(key)) is not None:
            bundle_cache.load_or_build(key, lambda plan=plan: plan)  # type: ignore[misc]
    plans = build_plans(bundle, Flavour.RTX, target, limits)
    for key in keys:
        built = bundle_cache.load(key)
        assert built is not None
        shared_cache.load_or_build(key, lambda built=built: built)  # type: ignore[misc]
    return plans
