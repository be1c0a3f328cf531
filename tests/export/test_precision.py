"""Half-precision bundles, end to end."""

import shutil
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from benchmarks.psnr import psnr
from oneword.engines.errors import EngineError, NotFinite
from oneword.engines.graph import Graph, Precision
from oneword.engines.onnxruntime import OnnxRuntimeEngine
from oneword.export.cli import plan_warnings
from oneword.export.families import TORCH_DTYPES, Traceable, family_of
from oneword.export.inspection import inspect_graph
from oneword.export.parity import references
from oneword.export.source import load_source
from oneword.export.trace import trace
from oneword.export.write import write_graph
from oneword.runtime.backends import choose_backend
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Image
from tests.bundles import export_once
from tests.plans import rtx_plans

WORD = np.random.default_rng(0).normal(0, 0.5, (2, 32)).astype(np.float32)


def picture(bundle: Path) -> Image:
    model = Model.open(bundle, "onnxruntime", threads=1)
    model.load(Concept("<toy>", {"text_encoder": WORD}))
    [result] = draw(model, "a photo of <toy>", seed=3, steps=8, guidance_scale=5.0)
    return result.image


@pytest.fixture(scope="module")
def half(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    exported = export_once(tiny_model_dir, tmp_path_factory.mktemp("half") / "bundle", precision=Precision.FP16)
    assert plan_warnings(exported) == []
    return exported.bundle


@pytest.mark.plans
def test_a_half_precision_bundle_draws_the_same_picture(half: Bundle, tiny_bundle: Path) -> None:
    assert {graph.precision for graph in half.manifest.graphs.values()} == {Precision.FP16}
    table = load_file(half.file(half.manifest.encoder("text_encoder").table))["embedding_table"]
    assert table.dtype == torch.float16
    assert psnr(picture(half.path), picture(tiny_bundle)) >= 40  # 8 steps of rounding at 1e-3


FLOAT32_PARTS = "parts in float32 between parts in half precision"


def step_in_half_precision(model: Path, dtype: torch.dtype = torch.float16) -> Traceable:
    [step] = [graph for graph in family_of(load_source(model, dtype)).graphs if graph.name == "denoise_step"]
    return step


def test_the_step_of_flux_computes_in_the_number_type_of_most_of_its_weights(tiny_flux_dir: Path) -> None:
    """The frequencies of positions are in float32."""
    assert step_in_half_precision(tiny_flux_dir).precision is Precision.FP16
    assert step_in_half_precision(tiny_flux_dir, torch.bfloat16).precision is Precision.BF16


def test_the_step_of_flux2_computes_in_the_number_type_of_most_of_its_weights(tiny_flux2_dir: Path) -> None:
    assert step_in_half_precision(tiny_flux2_dir).precision is Precision.FP16


def test_the_step_of_chroma_computes_in_the_number_type_of_most_of_its_weights(tiny_chroma_dir: Path) -> None:
    assert step_in_half_precision(tiny_chroma_dir).precision is Precision.FP16


def warnings_in_half_precision(model: Path, folder: Path) -> list[str]:
    """Of the denoise step."""
    files, _ = trace(step_in_half_precision(model), folder)
    return [line.partition(": ")[2] for line in inspect_graph(folder / files[0]).warnings()]


@pytest.mark.plans
def test_the_step_of_stable_diffusion_2_in_half_precision_has_the_form_that_tensorrt_fuses(
    tiny_sd2_dir: Path, tmp_path: Path
) -> None:
    assert warnings_in_half_precision(tiny_sd2_dir, tmp_path) == []


@pytest.mark.plans
def test_the_step_of_latent_diffusion_in_half_precision_has_that_form(tiny_ldm_dir: Path, tmp_path: Path) -> None:
    assert warnings_in_half_precision(tiny_ldm_dir, tmp_path) == []


@pytest.mark.plans
def test_the_step_of_sd3_in_half_precision_normalises_queries_and_keys_in_float32(
    tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    """Three blocks with queries and keys of both streams, one of them with a second attention: 3 x 4 + 2 norms."""
    assert warnings_in_half_precision(tiny_sd3_dir, tmp_path) == [f"{FLOAT32_PARTS}: 14"]


@pytest.mark.plans
def test_the_step_of_flux_in_half_precision_has_parts_in_float32_and_nothing_else_in_the_way(
    tiny_flux_dir: Path, tmp_path: Path
) -> None:
    [parts] = warnings_in_half_precision(tiny_flux_dir, tmp_path)
    assert parts.startswith(FLOAT32_PARTS)


@pytest.mark.plans
def test_the_step_of_flux2_in_half_precision_has_parts_in_float32_and_nothing_else_in_the_way(
    tiny_flux2_dir: Path, tmp_path: Path
) -> None:
    [parts] = warnings_in_half_precision(tiny_flux2_dir, tmp_path)
    assert parts.startswith(FLOAT32_PARTS)


@pytest.mark.plans
def test_the_step_of_chroma_in_half_precision_also_masks_attention(tiny_chroma_dir: Path, tmp_path: Path) -> None:
    """In all of its four blocks."""
    [masks, parts] = warnings_in_half_precision(tiny_chroma_dir, tmp_path)
    assert masks == "attentions with a mask before the softmax: 4 of 4"
    assert parts.startswith(FLOAT32_PARTS)


@pytest.mark.plans
def test_every_graph_of_a_half_precision_bundle_becomes_a_plan(half: Bundle) -> None:
    assert rtx_plans(half, "sm89").keys() == half.manifest.graphs.keys()


def test_a_bfloat16_graph_is_written_and_refused_by_the_cpu_in_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    (decoder,) = decoders(tiny_model_dir, torch.bfloat16)
    assert decoder.precision is Precision.BF16
    files, copies = trace(decoder, tmp_path)  # checked by onnx itself
    assert not copies
    graph = Graph(files, "", decoder.precision, decoder.inputs, decoder.outputs)
    with pytest.raises(EngineError, match="computes in bf16, which ONNX Runtime does not support on a CPU") as caught:
        OnnxRuntimeEngine("vae_decoder", graph, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("precision", "table"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "float32")])
def test_a_table_is_float32_or_float16_for_every_precision_of_the_network(
    tiny_model_dir: Path, precision: str, table: str
) -> None:
    exportable = family_of(load_source(tiny_model_dir, TORCH_DTYPES[Precision(precision)]))
    [graph] = [graph for graph in exportable.graphs if graph.name == "text_encoder"]
    assert graph.precision == precision
    dtypes = {spec.name: str(spec.dtype) for spec in (*graph.inputs, *graph.outputs)}
    assert dtypes.pop("embedding_table") == table
    assert set(dtypes.values()) == {"float32", "int64", "bool"}
    assert str(exportable.tables["text_encoder"].dtype) == f"torch.{table}"
    if precision == "bf16":  # a learned row is more precise than the network, which casts it
        [case] = references(graph, [{"B": 1, "N": 1, "M": 1, "T": 5, "h": 4, "w": 4}])
        assert case.outputs["hidden_states"].dtype == np.float32


def test_the_vae_of_sdxl_stays_in_fp32_in_a_half_precision_export(tiny_sdxl_dir: Path) -> None:
    graphs = {g.name: g.precision for g in family_of(load_source(tiny_sdxl_dir, torch.float16)).graphs}
    assert graphs == {
        "text_encoder": Precision.FP16,
        "text_encoder_2": Precision.FP16,
        "denoise_step": Precision.FP16,
        "vae_decoder": Precision.FP32,
        "vae_encoder": Precision.FP32,
    }


def test_t5_in_half_precision_has_outputs_beyond_fp16_as_in_transformers(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    source = load_source(tiny_sd3_dir, torch.float16)
    reference = T5EncoderModel.from_pretrained(tiny_sd3_dir / "text_encoder_3").requires_grad_(False)
    for model in (source.text_encoders["text_encoder_3"], reference):
        for block in model.encoder.block:  # outputs of about 1e5, where fp16 ends at 65,504
            block.layer[1].DenseReluDense.wo.weight *= 1e5
    exportable = family_of(source)
    [traceable] = [graph for graph in exportable.graphs if graph.name == "text_encoder_3"]
    graph = write_graph(traceable, tmp_path)

    ids, table = torch.arange(2, 18)[None], exportable.tables["text_encoder_3"].numpy()
    feeds = {"input_ids": ids.numpy(), "embedding_table": table, "token_weights": np.ones((1, 16), np.float32)}
    outputs = OnnxRuntimeEngine("text_encoder_3", graph, tmp_path).run(feeds)

    assert (traceable.precision, table.dtype) == (Precision.FP16, np.float16)
    expected = reference(ids)[0].numpy()
    assert outputs["finite"].all()
    assert np.abs(outputs["hidden_states"] - expected).max() <= 0.02 * np.abs(expected).max()  # fp16 rounds at 1e-3
    for file in (graph.files[0], *graph.fused.values()):  # two layers, each with a wo, two wi, and q, k, v and o
        assert matrices(tmp_path / file) == {"FLOAT": {(37, 32): 2}, "FLOAT16": {(32, 37): 4, (32, 32): 8}}


def matrices(file: Path) -> dict[str, Counter[tuple[int, ...]]]:
    """The weights of a graph's products: how many of each shape, by the type that they are multiplied in."""
    graph = onnx.load(file, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    counts: dict[str, Counter[tuple[int, ...]]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            tensor = weights[node.input[1]]
            counts.setdefault(onnx.TensorProto.DataType.Name(tensor.data_type), Counter())[tuple(tensor.dims)] += 1
    return counts


def test_a_bundle_in_bfloat16_is_left_to_the_gpu(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    graphs = {name: msgspec.structs.replace(graph, precision=Precision.BF16) for name, graph in manifest.graphs.items()}
    bundle = Bundle(tiny_bundle, msgspec.structs.replace(manifest, graphs=graphs))
    with pytest.raises(
        EngineError, match=r"no backend can run this bundle here: .*computes in bf16, which it does not"
    ):
        choose_backend(bundle)


def test_an_overflow_in_half_precision_is_reported_with_its_graph(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_norm_out.bias"] += 60_000  # after the convolution too large for fp16, harmless in fp32
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"].abs()
    save_file(tensors, weights)
    shapes = [{"B": 1, "N": 1, "M": 1, "T": 1, "h": 4, "w": 4}]

    (decoder,) = decoders(tmp_path / "model", torch.float32)
    assert references(decoder, shapes)
    (decoder,) = decoders(tmp_path / "model", torch.float16)
    with pytest.raises(NotFinite, match=r"vae_decoder gives NaN or infinity in fp16: export it with --precision fp32"):
        references(decoder, shapes)


def decoders(model: Path, dtype: torch.dtype) -> list[Traceable]:
    return [graph for graph in family_of(load_source(model, dtype)).graphs if graph.name == "vae_decoder"]
