"""Plans built ahead of time with TensorRT-RTX, no GPU needed; skipped where the library is not installed."""

from pathlib import Path

import pytest

from oneword.engines.bundle import Bundle
from oneword.engines.errors import EngineError, UsageError
from oneword.engines.tensorrt import (
    Flavour,
    _Network,
    _Tensor,
    axis_ranges,
    build_plans,
    check_network,
    compute_capability,
    profile_shapes,
)


@pytest.mark.parametrize("target", ["sm90", "ampere", "89", ""])
def test_a_target_that_cannot_be_built_for_is_named_with_those_that_can(target: str) -> None:
    with pytest.raises(UsageError, match="builds for sm75, sm80, sm86, sm89, sm120, sm121"):
        compute_capability(Flavour.RTX, target)


def test_a_target_is_a_compute_capability() -> None:
    assert compute_capability(Flavour.RTX, "sm89") == (8, 9)
    assert compute_capability(Flavour.RTX, "sm120") == (12, 0)


def test_a_network_unlike_the_manifest_is_refused(tiny_bundle: Path) -> None:
    graph = Bundle.open(tiny_bundle).graph("vae_decoder")
    network = _Network(
        [_Tensor("latents", "float32", [-1, 4, 8, 8])],
        [_Tensor("images", "uint8", [-1, -1, -1, 3]), _Tensor("finite", "bool", [-1])],
    )
    with pytest.raises(EngineError, match=r"'latents' as \('float32', \(-1, 4, 8, 8\)\)"):
        check_network("vae_decoder", graph, network)


def test_profiles_follow_the_largest_batch_and_size(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    ranges = axis_ranges(manifest, "denoise_step", max_batch=3, max_size=128)
    sample = manifest.graphs["denoise_step"].inputs[0]
    assert profile_shapes(sample, ranges) == ([1, 4, 1, 1], [1, 4, 8, 8], [3, 4, 16, 16])
    with pytest.raises(UsageError, match="--max-size 60: at least 1, and a multiple of 8 from 64 on"):
        axis_ranges(manifest, "denoise_step", max_batch=3, max_size=60)


def test_every_graph_becomes_a_plan_for_two_gpus_that_are_not_here(tiny_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("polygraphy")
    bundle = Bundle.open(tiny_bundle)
    for target in ("sm89", "sm120"):
        plans = build_plans(bundle, Flavour.RTX, target)
        assert plans.keys() == bundle.manifest.graphs.keys()
        built = {path: path.stat().st_mtime_ns for path in plans.values()}
        again = build_plans(bundle, Flavour.RTX, target)
        assert {path: path.stat().st_mtime_ns for path in again.values()} == built
    assert Bundle.open(tiny_bundle).manifest == bundle.manifest
