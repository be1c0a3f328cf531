"""Bundles: their contents, and that their graphs match the model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from oneword.engines.engine import Engine
from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.engines.open import Backend, open_engine
from oneword.export.cli import main
from oneword.export.families import family_of
from oneword.export.modules import DenoiseStep
from oneword.export.parity import compare, references
from oneword.export.source import load_source
from oneword.export.write import export_bundle
from oneword.runtime.bundle import Bundle
from oneword.runtime.samplers import COLUMNS


def opened(bundle: Bundle, name: str) -> Engine:
    return open_engine(Backend.ONNXRUNTIME, name, bundle.graph(name), bundle.path)


OTHER_SHAPES = (
    {"B": 1, "N": 1, "M": 1, "T": 20, "h": 8, "w": 8},
    {"B": 5, "N": 7, "M": 3, "T": 13, "h": 15, "w": 15},
    {"B": 2, "N": 3, "M": 6, "T": 40, "h": 11, "w": 20},
)


def test_every_graph_matches_its_torch_module_at_new_shapes(tiny_model_dir: Path, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for graph in family_of(load_source(tiny_model_dir)).graphs:
        engine = opened(bundle, graph.name)
        for difference in compare(engine, references(graph, OTHER_SHAPES), graph.precision):
            assert difference.value <= (1e-2 if difference.unit == "levels" else 2e-5), str(difference)


def test_every_axis_of_the_onnx_is_named_as_in_the_manifest(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for graph in bundle.manifest.graphs.values():
        model = onnx.load(bundle.file(graph.files[0]))
        for values, specs in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
            for value, spec in zip(values, specs, strict=True):
                axes = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                assert (value.name, axes) == (spec.name, spec.axes)


def test_the_table_is_an_input_and_is_not_in_the_graph(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    encoder = bundle.manifest.encoder("text_encoder")
    table = load_file(bundle.file(encoder.table))["embedding_table"]
    assert table.shape == (encoder.vocab_size, encoder.width)
    model = onnx.load(bundle.file(bundle.graph("text_encoder").files[0]))
    assert all(list(weight.dims) != list(table.shape) for weight in model.graph.initializer)


def test_a_longer_table_gives_a_new_word_its_row(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    engine = opened(bundle, "text_encoder")
    table = load_file(bundle.file(bundle.manifest.encoder("text_encoder").table))["embedding_table"]
    longer = np.concatenate([table, table[7:8]])
    feeds = {"token_weights": np.ones((1, 4), np.float32), "layer": np.array([3])}
    vocabulary = engine.run({"input_ids": np.array([[1, 7, 2, 3]]), "embedding_table": table, **feeds})
    new = engine.run({"input_ids": np.array([[1, len(table), 2, 3]]), "embedding_table": longer, **feeds})
    np.testing.assert_array_equal(new["hidden_states"], vocabulary["hidden_states"])


def test_the_manifest_agrees_with_the_model(tiny_model_dir: Path, tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.scheduler == json.loads((tiny_model_dir / "scheduler/scheduler_config.json").read_text())
    (encoder,) = manifest.encoders
    assert (encoder.length, encoder.width, encoder.layers, encoder.default_layer) == (20, 32, (1, 2, 3), 3)
    assert (manifest.vae.factor, manifest.vae.latent_channels) == (8, 4)
    assert (manifest.defaults.width, manifest.defaults.height) == (64, 64)
    assert [path.name for path in (tiny_bundle / encoder.tokenizer).iterdir()] == ["tokenizer.json"]
    assert manifest.columns == DenoiseStep.COLUMNS
    assert set(manifest.columns) <= set(COLUMNS)  # those the runtime knows
    assert manifest.conditioning.context == (("text_encoder",),)
    assert manifest.preview is not None


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"thresholding": True}, "dynamic thresholding"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "predicts flow"),
        ("scheduler/scheduler_config.json", {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas = True, supported are: False"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        (
            "model_index.json",
            {"_class_name": "KandinskyPipeline"},
            "is a KandinskyPipeline: give a model of StableDiffusionPipeline",
        ),
        ("model_index.json", {"tokenizer": [None, None]}, "no tokenizer"),
        (
            "vae/config.json",
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
            "its VAE has statistics of channels",
        ),
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "UNet3DConditionModel: give a model with one of",
        ),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, file, change)
    with pytest.raises(UsageError, match=message):
        export_bundle(model, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 9}, "9 channels"),
        ({"time_cond_proj_dim": 32}, "timestep_cond"),
        ({"num_class_embeds": 3}, "class labels"),
    ],
)
def test_a_unet_with_inputs_we_do_not_feed_is_refused(
    tiny_model_dir: Path, tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    from diffusers import UNet2DConditionModel

    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    config = dict(UNet2DConditionModel.load_config(model / "unet"))
    UNet2DConditionModel.from_config({**config, **settings}).save_pretrained(model / "unet")
    with pytest.raises(UsageError, match=message):
        family_of(load_source(model))


def test_pickled_weights_are_not_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OnewordError, match="pickles are not read"):
        load_source(model)


def test_broken_weights_are_reported_on_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    (model / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FileError, match="cannot be loaded as UNet2DConditionModel") as caught:
        load_source(model)
    assert "\n" not in str(caught.value)


def test_half_precision_files_with_a_variant_name_are_found(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (model / f"{name}.safetensors").rename(model / f"{name}.fp16.safetensors")
    assert load_source(model).unet.config.in_channels == 4


def test_the_digest_depends_on_the_weights_and_not_on_the_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    shutil.copy(tiny_model_dir / "model_index.json", model / "model_index.json")
    digest = load_source(model).digest
    assert digest == load_source(tiny_model_dir).digest
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_source(model).digest != digest


@pytest.mark.parametrize("model", ["no-such-thing", "/tmp", "a/b/c"])
def test_a_model_that_does_not_exist_is_wrong_usage_on_one_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ti-export", model, str(tmp_path / "bundle")])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("ti-export: ")
    assert not any(tmp_path.iterdir())


def changed_copy(model: Path, folder: Path, file: str, change: dict[str, object]) -> Path:
    copy = folder / "model"
    shutil.copytree(model, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return copy
