"""Bundles of half precision, end to end."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from oneword.engines.builder import Flavour
from oneword.engines.errors import EngineError, NotFinite
from oneword.engines.graph import Precision
from oneword.engines.onnxruntime import OnnxRuntimeEngine
from oneword.export.families import Traceable, family_of
from oneword.export.parity import references
from oneword.export.source import load_source
from oneword.export.trace import trace
from oneword.export.write import export_bundle
from oneword.runtime.batch import Failed, PictureDone
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.profiles import build_plans
from oneword.runtime.request import Image, Request

WORD = np.random.default_rng(0).normal(0, 0.5, (2, 32)).astype(np.float32)


def draw(bundle: Path) -> Image:
    model = Model.open(bundle, threads=1)
    model.load(Concept("<toy>", {"text_encoder": WORD}))
    for event in generate(model, [Request("a photo of <toy>", seed=3, steps=8, guidance_scale=5.0)]):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PictureDone):
            return event.image
    raise AssertionError("no picture came")


@pytest.fixture(scope="module")
def half(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("half") / "bundle"
    return export_bundle(tiny_model_dir, path, precision=Precision.FP16).bundle


def test_a_half_precision_bundle_draws_the_same_picture(half: Bundle, tiny_bundle: Path) -> None:
    assert {graph.precision for graph in half.manifest.graphs.values()} == {Precision.FP16}
    table = load_file(half.file(half.encoder("text_encoder").table))["embedding_table"]
    assert table.dtype == torch.float16
    error = float(np.mean((draw(half.path).astype(np.float64) - draw(tiny_bundle).astype(np.float64)) ** 2))
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 40  # 8 steps of rounding at 1e-3


def test_every_graph_of_a_half_precision_bundle_becomes_a_plan(half: Bundle) -> None:
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module)
    assert build_plans(half, Flavour.RTX, "sm89").keys() == half.manifest.graphs.keys()


def test_a_bfloat16_graph_is_written_and_refused_by_the_cpu_in_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    (decoder,) = decoders(tiny_model_dir, torch.bfloat16)
    assert decoder.precision is Precision.BF16
    (file,) = trace(decoder, tmp_path)  # checked by onnx itself
    with pytest.raises(EngineError, match="computes in bf16, which ONNX Runtime does not on a CPU") as caught:
        OnnxRuntimeEngine("vae_decoder", tmp_path / file, decoder.inputs, decoder.outputs, decoder.precision)
    assert "\n" not in str(caught.value)


def test_the_vae_of_sdxl_stays_in_fp32_where_half_is_asked_for(tiny_sdxl_dir: Path) -> None:
    graphs = {g.name: g.precision for g in family_of(load_source(tiny_sdxl_dir, torch.float16)).graphs}
    assert graphs == {
        "text_encoder": Precision.FP16,
        "text_encoder_2": Precision.FP16,
        "denoise_step": Precision.FP16,
        "vae_decoder": Precision.FP32,
        "vae_encoder": Precision.FP32,
    }


def test_what_overflows_in_half_precision_is_named_with_its_graph(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_norm_out.bias"] += 60_000  # more than fp16 holds once it is convolved, nothing in fp32
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
