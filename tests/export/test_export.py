"""Bundles: their contents, and that their graphs match the model."""

import gc
import json
import math
import os
import shutil
import sys
import weakref
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.numpy import load_file, save_file

from oneword.engines.engine import Engine
from oneword.engines.errors import BundleError, FileError, MissingPackage, OnewordError, UsageError
from oneword.engines.open import Backend, open_engine
from oneword.export import source, write
from oneword.export.cli import main
from oneword.export.families import Traceable, family_of
from oneword.export.loras import fuse
from oneword.export.modules import DenoiseStep
from oneword.export.parity import compare, references
from oneword.export.source import load_source
from oneword.export.write import export_bundle, write_graph
from oneword.runtime.bundle import Bundle, Defaults, Manifest, write_bundle
from oneword.runtime.profiles import PlanLimits
from oneword.runtime.samplers import COLUMNS
from oneword.runtime.schedule import NoiseSchedule
from tests.bundles import trace_once, traced_once
from tests.export.conftest import changed_copy


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


def test_a_path_that_is_not_utf8_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"mod\xe8le")
    shutil.copytree(tiny_model_dir, model)
    with pytest.raises(UsageError, match="is not a name in UTF-8, which safetensors needs: rename it"):
        load_source(model)


@pytest.mark.parametrize(("folder", "name"), [(b"model", "model"), (b"mod\xe8le", "mod\N{REPLACEMENT CHARACTER}le")])
def test_the_present_folder_has_its_name(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bytes, name: str
) -> None:
    model = tmp_path / os.fsdecode(folder)
    shutil.copytree(tiny_model_dir, model)
    monkeypatch.chdir(model)
    assert load_source(".").name == name


def replace_with(bundle: Bundle, scheduler: dict[str, object]) -> Bundle:
    """Writes a bundle again in its place, with another config of its scheduler."""

    def fill(folder: Path) -> Manifest:
        for name in bundle.manifest.files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(bundle.file(name), folder / name)
        return msgspec.structs.replace(bundle.manifest, scheduler=scheduler)

    return write_bundle(bundle.path, fill)


def test_the_infinity_of_diffusers_dpm_solver_is_exported(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    scheduler = dict(DPMSolverMultistepScheduler(beta_schedule="scaled_linear").config)
    assert scheduler["lambda_min_clipped"] == -math.inf

    config = replace_with(bundle, scheduler).manifest.scheduler

    assert config == {**json.loads(json.dumps(scheduler)), "lambda_min_clipped": None}
    assert NoiseSchedule.read(config, "leading") == NoiseSchedule.read(scheduler, "leading")


def test_a_bundle_is_not_replaced_by_one_whose_manifest_cannot_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with pytest.raises(BundleError, match=r"the manifest would not be valid .*: check the configs of the model"):
        replace_with(bundle, {"_class_name": "\udcff"})
    assert Bundle.open(bundle.path) == bundle
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


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
            "model_index.json",
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "UNet3DConditionModel: give a model with one of",
        ),
        (
            "model_index.json",
            {"unet": ["diffusers"]},
            r"has unet = \['diffusers'\], which must be a library and a class",
        ),
        ("model_index.json", {"vae": [None, None]}, "model_index.json has text_encoder, tokenizer, unet: give a model"),
        ("unet/config.json", {"quantization_config": {"quant_method": "torchao"}}, r"unet is quantised \(torchao\): "),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "gptq"}}, r"text_encoder is quantised"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name_before_weights_are_read(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change: dict[str, object],
    message: str,
) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, file, change)
    monkeypatch.setattr(source, "load_folder", lambda folder, *_: pytest.fail(f"{folder} was read"))
    with pytest.raises(OnewordError, match=message) as caught:
        export_bundle(model, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"norm_eps": ["x"]}, r"graph 'denoise_step' failed: group_norm\(\)"),
        ("unet/config.json", {"norm_num_groups": True}, r"graph 'denoise_step' failed: group_norm\(\)"),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": []},
            r"tokenizer_config\.json says model_max_length = \[\], but it must be a number of at least 3",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 2}, "model_max_length = 2, but it must be a number"),
        ("vae/config.json", {"shift_factor": [1]}, "must have numbers as scaling_factor and shift_factor, and lists"),
        ("vae/config.json", {"scaling_factor": "x"}, "latents_std: could not convert string to float: 'x'"),
    ],
)
def test_a_config_with_a_wrong_value_is_an_error_in_one_line(
    tiny_model_dir: Path, tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, file, change)
    with traced_once(), pytest.raises(OnewordError, match=message) as caught:
        export_bundle(model, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("limit", [10**30, math.inf])
def test_a_tokenizer_without_a_limit_has_that_of_its_encoder(
    tiny_model_dir: Path, tmp_path: Path, limit: float
) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "tokenizer/tokenizer_config.json", {"model_max_length": limit})
    [encoder] = family_of(load_source(model)).encoders
    assert encoder.length == 20


def test_a_tokenizer_without_a_padding_token_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "tokenizer/tokenizer_config.json", {"pad_token": None})
    with pytest.raises(UsageError, match="text_encoder's tokenizer has no pad_token: set it in its tokenizer_config"):
        export_bundle(model, tmp_path / "bundle")


def test_a_vae_with_statistics_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    model = changed_copy(tiny_model_dir, tmp_path, "vae/config.json", statistics)
    with pytest.raises(UsageError, match="its VAE has statistics of channels"):
        export_bundle(model, tmp_path / "bundle")


@pytest.mark.parametrize("content", ["", "[]", '"model"', '{"a', "\xff"])
@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_a_damaged_config_is_named(tiny_model_dir: Path, tmp_path: Path, file: str, content: str) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, file, {})
    (model / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(FileError, match=f"{file} .*: download the model again") as caught:
        load_source(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        ("text_encoder/model.safetensors", "encoder.layers.0.mlp.fc1.bias"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ],
)
def test_a_missing_weight_is_named(tiny_model_dir: Path, tmp_path: Path, file: str, weight: str) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    weights = load_file(model / file)
    del weights[next(name for name in weights if name.endswith(weight))]
    save_file(weights, model / file, {"format": "pt"})
    with pytest.raises(FileError, match=rf"{Path(file).parent} has no weights {weight}: download the model again"):
        load_source(model)


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


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"sample_size": 8}, (64, 64)),
        ({"sample_size": [8, 12]}, (96, 64)),  # h and w
        ({"sample_size": None}, (512, 512)),
        ({"sample_size": 32, "_diffusers_version": "0.6.0"}, (512, 512)),
        ({"sample_size": 96, "_diffusers_version": "0.8.1"}, (768, 768)),
        ({"sample_size": 32, "_diffusers_version": "0.10.0.dev0"}, (256, 256)),
    ],
)
@pytest.mark.parametrize("in_a_pipeline", [False, True])
def test_the_default_size_is_that_of_diffusers(
    tiny_model_dir: Path, tmp_path: Path, config: dict[str, object], size: tuple[int, int], in_a_pipeline: bool
) -> None:
    """LoRAs are fused in a pipeline of diffusers, which changes the configs of old models."""
    model = load_source(changed_copy(tiny_model_dir, tmp_path, "unet/config.json", config))
    if in_a_pipeline:
        fuse([], StableDiffusionPipeline, {**dict.fromkeys(("vae", "text_encoder", "tokenizer")), "unet": model.unet})
    assert family_of(model).defaults.size == size


def test_a_size_that_is_not_a_number_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_source(changed_copy(tiny_model_dir, tmp_path, "unet/config.json", {"sample_size": "8"}))
    with pytest.raises(UsageError, match="sample_size = '8': it must be a number, or two"):
        family_of(model)


def test_an_encoder_of_another_width_than_the_network_is_refused(
    tiny_model_dir: Path, tiny_sd2_dir: Path, tmp_path: Path
) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    shutil.rmtree(model / "text_encoder")
    shutil.copytree(tiny_sd2_dir / "text_encoder", model / "text_encoder")
    with pytest.raises(UsageError, match="its text encoders' states have width 24, its network takes 32"):
        export_bundle(model, tmp_path / "bundle")


def test_another_text_encoder_than_that_of_the_family_is_refused(
    tiny_model_dir: Path, tiny_chroma_dir: Path, tmp_path: Path
) -> None:
    change = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", change)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(model / part)
        shutil.copytree(tiny_chroma_dir / part, model / part)
    with pytest.raises(UsageError, match="its text encoders are text_encoder_3, without text_encoder; give a plain"):
        export_bundle(model, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "file exists and is not a bundle: choose a new folder"),
        ("file/bundle", "cannot write the bundle .*: .*file is not a folder that you may write to"),
        ("folder", "folder exists and is not a bundle: choose a new folder"),
        ("protected/new/bundle", "cannot write the bundle .*: .*protected is not a folder that you may write to"),
    ],
)
def test_a_bundle_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text").write_text("text")
    (tmp_path / "protected").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "protected")  # root may write everywhere
    monkeypatch.setattr(write, "load_source", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(OnewordError, match=message):
        export_bundle(tiny_model_dir, tmp_path / target)


def test_a_link_to_a_bundle_stays_and_the_bundle_is_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "store" / "bundle"))
    (bundle.path / "plans").mkdir(exist_ok=True)
    link = tmp_path / "link"
    link.symlink_to(bundle.path)

    replaced = replace_with(Bundle(link, bundle.manifest), {"_class_name": "DDIMScheduler"})

    assert (link.readlink(), replaced.path) == (bundle.path, bundle.path)
    assert Bundle.open(link).manifest == replaced.manifest != bundle.manifest
    assert (link / "plans").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "store"]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["bundle"]


def test_a_missing_onnxruntime_is_reported_before_the_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(write, "load_source", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(MissingPackage, match="onnxruntime is not installed"):
        export_bundle(tiny_model_dir, tmp_path / "bundle")


def test_the_digest_is_that_of_the_files_that_were_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed_copy(tiny_model_dir, tmp_path, "model_index.json", {})
    digest = load_source(model).digest

    def change(graph: Traceable, *arguments: object) -> object:
        (model / "scheduler" / "scheduler_config.json").write_text("{}")
        return trace_once(graph, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "trace", change)
    assert export_bundle(model, tmp_path / "bundle").bundle.manifest.source.digest == digest


def test_a_traced_network_can_be_freed(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = load_source(tiny_model_dir)
    [graph] = [graph for graph in family_of(source).graphs if graph.name == "denoise_step"]
    weight = weakref.ref(source.network.conv_in.weight)
    write_graph(graph, tmp_path)
    assert weight() is not None

    source.network.to("meta")
    gc.collect()
    assert weight() is None


def test_a_scheduler_without_a_counterpart_is_a_warning(tiny_model_dir: Path, tmp_path: Path) -> None:
    change = {"_class_name": "PNDMScheduler"}
    model = changed_copy(tiny_model_dir, tmp_path, "scheduler/scheduler_config.json", change)
    with traced_once():
        exported = export_bundle(model, tmp_path / "bundle")
    assert exported.warnings == ("PNDMScheduler has no counterpart here: ddim is the bundle's default sampler",)
    assert exported.bundle.manifest.defaults.sampler == "ddim"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (PlanLimits(max_size=512), "--max-size 512: .*, the size at least 64, at most 384 and a multiple of 8"),
        (PlanLimits(static_sizes=((64, 512),)), "--static-size 64x512: both must be multiples of 8, at most 384"),
    ],
)
def test_plans_for_larger_pictures_than_the_models_are_refused(limits: PlanLimits, message: str) -> None:
    PlanLimits(max_size=384, static_sizes=((384, 64),)).check(8, Defaults(width=64, height=64), 384)
    with pytest.raises(UsageError, match=message):
        limits.check(8, Defaults(width=64, height=64), 384)


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


@pytest.mark.parametrize("model", ["no-such-thing", "/tmp", "a/b/c", "./sd15", "../sd15", "/no/such", "~/sd15"])
def test_a_model_that_does_not_exist_is_wrong_usage_on_one_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ti-export", model, str(tmp_path / "bundle")])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ti-export: ")
    assert ("there is no file or folder" in error) == (model[0] in "./~" and model != "/tmp")
    assert not any(tmp_path.iterdir())
