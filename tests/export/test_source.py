"""Sources of models: hub ids, against a stand-in for the hub's cache in its client's layout; single files in the layout
of published checkpoints; LoRAs."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.export.source import Lora, digest_directory, find_model, hub_files, load_source
from tests.original_layout import original_layout

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds owner/tiny at one commit, its branch main; the hub is unreachable."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for number, file in enumerate(path for path in tiny_model_dir.rglob("*") if path.is_file()):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(tiny_model_dir)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("model", ["owner/tiny", "owner/tiny@main", f"owner/tiny@{COMMIT}"])
def test_a_hub_id_is_the_model_in_the_cache_at_one_commit(cache: Path, tiny_model_dir: Path, model: str) -> None:
    source = load_source(model)
    assert (source.path, source.revision) == (cache, COMMIT)
    assert source.digest == digest_directory(tiny_model_dir)


@pytest.mark.parametrize("model", ["owner/other", "owner/tiny@v2"])
def test_a_model_in_neither_hub_nor_cache_is_reported_on_one_line(cache: Path, model: str) -> None:
    message = f"{model} could not be downloaded from the Hub .*: give a local diffusers"
    with pytest.raises(FileError, match=message) as caught:
        find_model(model)
    assert "\n" not in str(caught.value)


def test_a_hub_model_with_only_pickles_is_refused(cache: Path) -> None:
    weights = cache / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OnewordError, match="pickles are not read"):
        load_source("owner/tiny")


def test_a_hub_model_that_is_not_in_diffusers_format_is_named(cache: Path) -> None:
    (cache / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"owner/tiny has no model_index\.json: give the hub id of a model"):
        find_model("owner/tiny")


def test_only_the_files_in_use_are_downloaded_from_a_repository() -> None:
    stable_diffusion = [
        "README.md", "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt",
        "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "safety_checker/model.safetensors", "safety_checker/config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "unet/onnx/model.safetensors",
    ]  # fmt: skip
    assert sorted(hub_files(stable_diffusion)) == [
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip


def test_sharded_weights_of_a_variant_are_downloaded_completely() -> None:
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub_files([*shards, "unet/diffusion_pytorch_model.safetensors.index.fp16.json"])[1:] == shards


@pytest.fixture(scope="module")
def lora(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 on the UNet's and the text encoder's attention, made by peft and written by diffusers."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    torch.manual_seed(0)
    layers = {}
    for name, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
        module = getattr(pipeline, name)
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights="gaussian"))
        for key, weight in module.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, 0, 0.3)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
    folder = tmp_path_factory.mktemp("lora")
    pipeline.save_lora_weights(folder, **layers)
    return (folder / "pytorch_lora_weights.safetensors").rename(folder / "style.safetensors")


def outputs(unet: Any, text_encoder: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    with torch.no_grad():
        states = text_encoder(torch.tensor([[1, 5, 9, 3]])).last_hidden_state
        return [unet(sample, 500, context).sample, states]


def test_a_lora_is_fused_at_the_requested_scale(tiny_model_dir: Path, lora: Path) -> None:
    from diffusers import StableDiffusionPipeline

    source = load_source(tiny_model_dir, loras=[Lora(lora, 0.5)])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_dir, safety_checker=None)
    plain = outputs(pipeline.unet, pipeline.text_encoder)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="style")
    pipeline.set_adapters("style", 0.5)
    expected = outputs(pipeline.unet, pipeline.text_encoder)
    ours = outputs(source.unet, source.text_encoders["text_encoder"])
    for fused, adapted, before in zip(ours, expected, plain, strict=True):
        torch.testing.assert_close(fused, adapted, rtol=1e-4, atol=1e-5)
        assert (fused - before).abs().max() > 1e-2
    assert not any("lora" in name for name, _ in source.unet.named_modules())


def test_a_lora_changes_the_origin_in_the_bundle(tiny_model_dir: Path, lora: Path) -> None:
    plain, fused = load_source(tiny_model_dir), load_source(tiny_model_dir, loras=[Lora(lora, 0.5)])
    assert (plain.name, fused.name) == ("model", "model + style.safetensors x 0.5")
    assert len({plain.digest, fused.digest, load_source(tiny_model_dir, loras=[Lora(lora)]).digest}) == 3


def test_a_lora_that_does_not_fit_or_is_a_pickle_is_refused(
    tiny_model_dir: Path, tiny_ldm_dir: Path, lora: Path, tmp_path: Path
) -> None:
    save_file({"another.model.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match=r"other\.safetensors cannot be fused into this model") as caught:
        load_source(tiny_model_dir, loras=[Lora(tmp_path / "other.safetensors")])
    assert "\n" not in str(caught.value)
    shutil.copy(lora, tmp_path / "style.bin")
    with pytest.raises(UsageError, match=r"style\.bin is not a \.safetensors file: pickles are not read"):
        load_source(tiny_model_dir, loras=[Lora(tmp_path / "style.bin")])
    with pytest.raises(UsageError, match="diffusers cannot fuse a LoRA into a LDMTextToImagePipeline"):
        load_source(tiny_ldm_dir, loras=[Lora(lora)])


def test_a_single_file_matches_the_model_it_was_made_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = load_source(tiny_model_dir)
    checkpoint = tmp_path / "tiny.safetensors"
    save_file(original_layout(directory), checkpoint)
    config = tmp_path / "config"
    shutil.copytree(tiny_model_dir, config, ignore=shutil.ignore_patterns("*.safetensors"))

    source = load_source(checkpoint, config=config)

    assert (source.name, source.pipeline) == ("tiny.safetensors", "StableDiffusionPipeline")
    for ours, theirs in (
        (source.unet, directory.unet),
        (source.vae, directory.vae),
        (source.text_encoders["text_encoder"], directory.text_encoders["text_encoder"]),
    ):
        expected = dict(theirs.named_parameters())
        assert dict(ours.named_parameters()).keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.named_parameters())
    assert source.digest != directory.digest


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_a_single_file_of_a_model_with_t5_is_refused(tiny_sd3_dir: Path, tiny_flux_dir: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "large.safetensors"
    save_file({"weight": torch.ones(3)}, checkpoint)
    for config, pipeline in ((tiny_sd3_dir, "StableDiffusion3Pipeline"), (tiny_flux_dir, "FluxPipeline")):
        message = (
            rf"large\.safetensors is a single file of a {pipeline}, whose text encoders are not read from one: "
            "single files are for models with a UNet, give a diffusers directory or a hub id"
        )
        for dtype in (torch.float32, torch.float16):
            with pytest.raises(UsageError, match=message) as caught:
                load_source(checkpoint, dtype, config=config)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("model.ckpt", True, r"model\.ckpt is not a \.safetensors file: pickles are not read, convert"),
        ("model.safetensors", False, r"model\.safetensors is a single file: give --config, a diffusers directory"),
        ("model.safetensors", True, r"model\.safetensors cannot be loaded as a StableDiffusionPipeline"),
    ],
)
def test_a_single_file_that_cannot_be_used_is_reported_on_one_line(
    tiny_model_dir: Path, tmp_path: Path, name: str, config: bool, message: str
) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / name)
    with pytest.raises(OnewordError, match=message) as caught:
        load_source(tmp_path / name, config=tiny_model_dir if config else None)
    assert "\n" not in str(caught.value)
