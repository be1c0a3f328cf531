"""Fused copies of graphs: what is in them, whose weights they use, and that ONNX Runtime runs them.

The numbers of operators follow from the architectures. A transformer block of a UNet has two attentions and three
norms, of which the first follows a residual sum only in the second and later blocks of a transformer. A layer of a text
encoder has one attention and two norms; the first norm of all follows the embedding. A VAE has one attention per half.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.inliner
import onnx_ir
import pytest

from oneword.engines import builder
from oneword.engines.errors import EngineError
from oneword.engines.graph import Graph, Provider
from oneword.engines.open import Backend, open_engine
from oneword.export import fusion, parity
from oneword.export.families import Traceable, family_of
from oneword.export.fusion import fuse, fused_copies
from oneword.export.parity import references
from oneword.export.source import load_source
from oneword.export.trace import OPSET, example_feeds
from oneword.export.write import check_graph, write_graph
from oneword.runtime.bundle import Bundle
from tests.export.operators import attentions_and_norms, operators_run, own_operators, random


@pytest.mark.parametrize("provider", Provider)
def test_attention_and_residual_norms_are_fused(tiny_bundle: Path, provider: Provider) -> None:
    # The UNet has a transformer in its first level, one in the middle and two in its last level, of one block each.
    transformers, layers = 1 + 1 + 2, 3
    assert attentions_and_norms(tiny_bundle, provider) == {
        "text_encoder": (layers, 2 * layers - 1),
        "denoise_step": (2 * transformers, 2 * transformers),
        "vae_decoder": (1, 0),
        "vae_encoder": (1, 0),
    }


def test_a_copy_has_no_weights_of_its_own(tiny_bundle: Path) -> None:
    for graph in Bundle.open(tiny_bundle).manifest.graphs.values():
        weights = {tensor.name: tensor for tensor in initializers(tiny_bundle / graph.files[0])}
        for name in graph.fused.values():
            for tensor in initializers(tiny_bundle / name):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    assert tensor.external_data == weights[tensor.name].external_data
                    assert {entry.key: entry.value for entry in tensor.external_data}["location"] in graph.files
                else:
                    assert np.prod(tensor.dims) <= 64  # numbers that are not worth a place in the data file


def initializers(path: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(path, load_external_data=False).graph.initializer)


def test_onnxruntime_runs_the_copy_on_the_cpu(
    tiny_model_dir: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Bundle.open(tiny_bundle).graph("denoise_step")
    feeds = example_feeds(traceable(tiny_model_dir, "denoise_step"), parity.SHAPES[0], seed=1)
    ran = Counter(operators_run("denoise_step", graph, tiny_bundle, feeds, monkeypatch))
    assert ran["MultiHeadAttention"] == ran["SkipLayerNormalization"] == 8
    assert not ran["Softmax"]


def traceable(model: Path, name: str) -> Traceable:
    return next(graph for graph in family_of(load_source(model)).graphs if graph.name == name)


def test_no_graph_itself_has_operators_of_onnxruntime(tiny_bundle: Path) -> None:
    for graph in Bundle.open(tiny_bundle).manifest.graphs.values():
        assert not own_operators(tiny_bundle / graph.files[0])


def with_missing_copies(bundle: Path) -> Graph:
    graph = Bundle.open(bundle).graph("vae_encoder")
    return msgspec.structs.replace(graph, fused=dict.fromkeys(Provider, "missing.onnx"))


def test_openvino_opens_the_graph_itself(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    engine = open_engine(Backend.OPENVINO, "vae_encoder", with_missing_copies(tiny_bundle), tiny_bundle)
    assert engine.backend.startswith("openvino")


def test_onnxruntime_does_not_fall_back_to_the_graph_itself(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot open graph 'vae_encoder' \(.*missing\.onnx\)"):
        open_engine(Backend.ONNXRUNTIME, "vae_encoder", with_missing_copies(tiny_bundle), tiny_bundle)


@pytest.mark.parametrize("flavour", builder.Flavour)
def test_plans_of_tensorrt_are_built_from_the_graph_itself(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: builder.Flavour
) -> None:
    def start(job: Any, output: object) -> None:
        os.close(job.channel)
        raise EngineError(f"started with {job.onnx}")

    monkeypatch.setattr(builder, "_start", start)
    graph, sizes = with_missing_copies(tiny_bundle), {"B": (1, 1, 1), "H": (64, 64, 64), "W": (64, 64, 64)}
    with pytest.raises(EngineError, match=r"started with .*/vae_encoder\.onnx$"):
        builder.build_plan("vae_encoder", graph, tiny_bundle, tmp_path, flavour, "1", "sm89", sizes)


def test_a_copy_that_differs_from_its_graph_is_left_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    graph = traceable(tiny_model_dir, "vae_encoder")
    written, cases = write_graph(graph, tmp_path), references(graph)
    checked = check_graph(graph, written, tmp_path, cases)
    assert (checked.graph, checked.unfused) == (written, ())
    copy = onnx.load(tmp_path / written.fused[Provider.CPU], load_external_data=False)
    [attention] = [node for node in copy.graph.node if node.op_type == "MultiHeadAttention"]
    attention.attribute.append(onnx.helper.make_attribute("scale", 0.5))
    onnx.save(copy, tmp_path / written.fused[Provider.CPU])
    bare, _, [reason] = check_graph(graph, written, tmp_path, cases)
    assert re.fullmatch(r"vae_encoder\.mean: .* differs from the graph it is a copy of.*", reason)
    assert bare == msgspec.structs.replace(written, fused={})
    assert [path.name for path in tmp_path.glob("*.onnx")] == ["vae_encoder.onnx"]


GATED = """
<ir_version: 10, opset_import: ["" : 20]>
gated (float[B, T, {width}] x, float[{width}] bias) => (float[B, T2, D2] y) {{
  projected = Add(x, bias)
  value, gate = Split <axis = {axis}, num_outputs = 2> (projected)
  activated = Gelu <approximate = "none"> (gate)
  y = Mul(value, activated)
}}
"""
DEFINITION = """
<domain: "com.microsoft", opset_import: ["" : 20]>
BiasSplitGelu (x, bias) => (y) {
  both = Add(x, bias)
  left, right = Split <axis = -1, num_outputs = 2> (both)
  activated = Gelu (right)
  y = Mul(left, activated)
}
"""
"""BiasSplitGelu as ONNX Runtime defines it: x / 2 (1 + erf(x / sqrt(2))) of the right half, times the left half."""


def operators(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(("width", "fused"), [(2560, True), (5120, True), (10240, True), (1280, False), (6144, False)])
def test_the_gated_gelu_is_fused_for_cuda_where_it_has_a_kernel(width: int, fused: bool) -> None:
    gated = onnx.parser.parse_model(GATED.format(width=width, axis=2))
    for provider in Provider:
        copy = onnx_ir.from_proto(gated)
        fuse(copy, provider)
        assert ("BiasSplitGelu" in operators(copy)) == (fused and provider is Provider.CUDA)


def test_a_gated_gelu_that_splits_the_tokens_is_not_fused() -> None:
    copy = onnx_ir.from_proto(onnx.parser.parse_model(GATED.format(width=2560, axis=1)))
    fuse(copy, Provider.CUDA)
    assert "BiasSplitGelu" not in operators(copy)


def test_no_copy_is_made_if_an_operator_without_a_kernel_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from diffusers.models.attention_processor import Attention

    program = torch.onnx.export(
        Attention(32, heads=2, dim_head=16).eval(), (torch.zeros(2, 6, 32),), dynamo=True, opset_version=OPSET
    )
    assert program is not None
    copies = fused_copies(program.model)
    assert copies.keys() == set(Provider)
    assert all(operators(copy)["MultiHeadAttention"] == 1 for copy in copies.values())
    monkeypatch.setattr(fusion, "replace_sdpa_by_mha", lambda model: None)
    monkeypatch.setattr(fusion, "fuse_mha2", lambda model: None)
    assert fused_copies(program.model) == {}


def test_the_gated_gelu_of_diffusers_is_fused_for_cuda_as_it_is_traced() -> None:
    import torch
    from diffusers.models.attention import FeedForward

    program = torch.onnx.export(
        FeedForward(320, activation_fn="geglu").eval(),  # the width of Stable Diffusion's first level
        (torch.zeros(2, 6, 320),),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    copies = fused_copies(program.model)
    assert copies.keys() == {Provider.CUDA}
    counts = operators(copies[Provider.CUDA])
    assert counts["BiasSplitGelu"] == 1
    assert not counts["Gelu"]


def test_the_gated_gelu_for_cuda_computes_the_same_by_the_definition_of_its_operator() -> None:
    import onnxruntime as ort

    gated = onnx.parser.parse_model(GATED.format(width=2560, axis=-1))
    copy = onnx_ir.from_proto(gated)
    fuse(copy, Provider.CUDA)
    proto = onnx_ir.to_proto(copy)
    onnx.checker.check_model(proto, full_check=True)
    with pytest.raises(Exception, match="Could not find an implementation for BiasSplitGelu"):  # valid, but not here
        ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    proto.functions.append(onnx.parser.parse_function(DEFINITION))
    feeds = {"x": random((2, 3, 2560)), "bias": random((2560,))}
    results = [
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for model in (gated, onnx.inliner.inline_local_functions(proto))
    ]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6, atol=1e-7)
