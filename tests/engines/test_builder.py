"""Plans built ahead of time with TensorRT-RTX, which needs no GPU; skipped if the library is not installed."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from oneword.engines import builder
from oneword.engines.builder import (
    Flavour,
    _Network,
    _Tensor,
    check_network,
    compute_capabilities,
    installed_version,
    profile_shapes,
    target_of,
)
from oneword.engines.cuda import Device
from oneword.engines.errors import BundleError, EngineError, MissingPackage, UsageError
from oneword.engines.graph import graph_digest
from oneword.runtime.bundle import Bundle, Manifest, write_bundle
from oneword.runtime.profiles import DEFAULT_LIMITS, PlanLimits, axis_ranges, build_plans, graph_ranges


@pytest.mark.parametrize("target", ["sm90", "sm89,sm90", "ampere", "89", "sm89,"])
def test_an_unsupported_target_is_an_error_that_lists_the_supported_ones(target: str) -> None:
    with pytest.raises(UsageError, match="builds for sm75, sm80, sm86, sm89, sm120, sm121"):
        target_of(Flavour.RTX, target)


def test_a_target_is_one_or_more_compute_capabilities() -> None:
    assert target_of(Flavour.RTX, None) == "sm89"
    assert compute_capabilities(Flavour.RTX, "sm89") == [(8, 9)]
    assert compute_capabilities(Flavour.RTX, target_of(Flavour.RTX, "sm89,sm120")) == [(8, 9), (12, 0)]


class Hopper:
    """Stands in for `Device` on a machine with an H100."""

    target = "sm90"


def test_without_a_target_tensorrt_builds_for_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "Device", Hopper)

    assert target_of(Flavour.TENSORRT, None) == target_of(Flavour.TENSORRT, "sm90") == "sm90"
    with pytest.raises(UsageError, match="--target sm89: tensorrt builds for the GPU it runs on, which is sm90"):
        target_of(Flavour.TENSORRT, "sm89")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_tensorrt_without_a_gpu_reports_that_a_driver_is_needed() -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(EngineError, match=r"an NVIDIA driver for CUDA 13 or newer is needed"):
        target_of(Flavour.TENSORRT, "sm89")


@pytest.mark.gpu
def test_tensorrt_refuses_to_build_for_another_gpu() -> None:
    installed = Device().target
    assert target_of(Flavour.TENSORRT, None) == installed
    with pytest.raises(UsageError, match=f"builds for the GPU it runs on, which is {installed}"):
        target_of(Flavour.TENSORRT, "sm75")


def test_the_error_for_a_missing_builder_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingPackage, match=r"tensorrt is not installed: in a checkout .* -e '\.\[tensorrt\]'"):
        installed_version(Flavour.TENSORRT)


def test_a_network_that_differs_from_the_manifest_is_refused(tiny_bundle: Path) -> None:
    graph = Bundle.open(tiny_bundle).graph("vae_decoder")
    network = _Network(
        [_Tensor("latents", "float32", [-1, 4, 8, 8])],
        [_Tensor("images", "uint8", [-1, -1, -1, 3]), _Tensor("finite", "bool", [-1])],
    )
    with pytest.raises(EngineError, match=r"'latents' as \('float32', \(-1, 4, 8, 8\)\)"):
        check_network("vae_decoder", graph, network)


def test_profiles_follow_the_largest_batch_and_size(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    ranges = axis_ranges(manifest, "denoise_step", PlanLimits(max_batch=3, max_size=128))
    sample = manifest.graphs["denoise_step"].inputs[0]
    assert profile_shapes(sample, ranges) == ([1, 4, 1, 1], [1, 4, 8, 8], [3, 4, 16, 16])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            PlanLimits(max_batch=3, max_size=60),
            "--max-batch 3 --max-size 60: the batch must be at least 1, the size at least 64 and a multiple of 8",
        ),
        (PlanLimits(static_sizes=((64, 60),)), "--static-size 64x60: both must be multiples of 8"),
    ],
)
def test_limits_that_the_model_cannot_meet_are_refused(tiny_bundle: Path, limits: PlanLimits, message: str) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    with pytest.raises(UsageError, match=message):
        limits.check(manifest.size_multiple, manifest.defaults)


def test_an_axis_that_no_graph_has_is_an_error(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    graph = manifest.graphs["vae_decoder"]
    first = msgspec.structs.replace(graph.inputs[0], axes=("B", 4, "height", "w"))
    changed = msgspec.structs.replace(graph, inputs=(first, *graph.inputs[1:]))
    manifest = msgspec.structs.replace(manifest, graphs={**manifest.graphs, "vae_decoder": changed})
    with pytest.raises(BundleError, match="graph 'vae_decoder' has an axis 'height', but each must be one of B, N, M"):
        graph_ranges(manifest, "vae_decoder", DEFAULT_LIMITS)


def test_a_static_size_is_one_picture_guided_or_not_and_affects_graphs_that_see_pictures(
    tiny_bundle: Path,
) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    limits = PlanLimits(static_sizes=((96, 64),))
    assert len(graph_ranges(manifest, "text_encoder", limits)) == 1
    _, guided, unguided = graph_ranges(manifest, "denoise_step", limits)
    sizes = {"B": 1, "N": 2, "M": 2, "T": 20, "h": 8, "w": 12}
    assert guided == {axis: (size, size, size) for axis, size in sizes.items()}
    assert unguided == {**guided, "N": (1, 1, 1)}
    _, pixels = graph_ranges(manifest, "vae_encoder", limits)
    assert pixels == {"B": (1, 1, 1), "H": (64, 64, 64), "W": (96, 96, 96)}


@pytest.fixture
def rtx() -> None:
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module)


@pytest.mark.plans
@pytest.mark.usefixtures("rtx")
def test_ti_export_writes_a_bundle_whose_plans_are_ready_to_ship(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ["--plans", "tensorrt-rtx", "--target", "sm89,sm120", "--max-batch", "2", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "oneword.export.cli", str(tiny_model_dir), str(tmp_path / "bundle"), *options],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    bundle = Bundle.open(tmp_path / "bundle")
    assert report["plans"].keys() == bundle.manifest.graphs.keys() == report["graphs"].keys()
    for paths in report["plans"].values():
        assert [Path(path).read_bytes()[:4] for path in paths] == [b"vtrt"]  # the magic number of a TensorRT plan
    assert "building plans with tensorrt-rtx for sm89,sm120" in run.stderr

    shipped = shutil.move(bundle.path, tmp_path / "shipped")
    built = {path: path.stat().st_mtime_ns for path in shipped.rglob("*.plan")}
    assert len(built) == 4
    build_plans(Bundle.open(shipped), Flavour.RTX, "sm89,sm120", PlanLimits(max_batch=2))  # finds them all
    assert {path: path.stat().st_mtime_ns for path in shipped.rglob("*.plan")} == built


@pytest.mark.plans
@pytest.mark.usefixtures("rtx")
def test_a_graph_that_cannot_be_built_fails_in_one_line_and_leaves_the_bundle_intact(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = with_another_decoder(Bundle.open(tiny_bundle), tmp_path / "bundle")
    with pytest.raises(EngineError, match=r"cannot build a plan of graph 'vae_decoder': .*NoSuchOperator") as caught:
        build_plans(bundle, Flavour.RTX, "sm89")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"the graph in {bundle.path} is intact and runs without it")
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert not list(bundle.path.rglob("*.plan"))
    assert not list(bundle.path.rglob(".*.plan.*"))


def with_another_decoder(bundle: Bundle, path: Path) -> Bundle:
    """The same bundle, but with a decoder that no library can compute; its plan is the first to be built."""
    specs = bundle.graph("vae_decoder")

    def fill(folder: Path) -> Manifest:
        ignored = shutil.ignore_patterns("bundle.json", ".*", "plans")
        shutil.copytree(bundle.path, folder, dirs_exist_ok=True, ignore=ignored)
        spec_of = {str(s.name): s for s in (*specs.inputs, *specs.outputs)}
        types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "bool": TensorProto.BOOL}
        values = {
            name: helper.make_tensor_value_info(name, types[spec.dtype], list(spec.axes))
            for name, spec in spec_of.items()
        }
        node = helper.make_node("NoSuchOperator", ["latents"], ["images", "finite"], domain="nowhere")
        graph = helper.make_graph([node], "decoder", [values["latents"]], [values["images"], values["finite"]])
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
        onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), folder / "vae_decoder.onnx")
        decoder = msgspec.structs.replace(specs, digest=graph_digest(folder, specs.files))
        graphs = {"vae_decoder": decoder, **{n: g for n, g in bundle.manifest.graphs.items() if n != "vae_decoder"}}
        return msgspec.structs.replace(bundle.manifest, graphs=graphs)

    return write_bundle(path, fill)
