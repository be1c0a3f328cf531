"""Where models come from: hub ids, against a stand-in of the hub's cache as its own client lays it out."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.export.source import digest_directory, find_model, hub_files, load_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds owner/tiny at one commit, its branch main, and no way to the hub."""
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
def test_what_neither_hub_nor_cache_has_is_one_line(cache: Path, model: str) -> None:
    with pytest.raises(FileError, match=f"{model} cannot be had from the hub .*: give a local diffusers") as caught:
        find_model(model)
    assert "\n" not in str(caught.value)


def test_a_hub_model_of_pickles_alone_is_refused(cache: Path) -> None:
    weights = cache / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OnewordError, match="pickles are not read"):
        load_source("owner/tiny")


def test_a_hub_model_in_no_diffusers_format_is_named(cache: Path) -> None:
    (cache / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"owner/tiny has no model_index\.json: give the hub id of a model"):
        find_model("owner/tiny")


def test_of_a_repository_only_what_is_used_is_fetched() -> None:
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


def test_sharded_weights_of_a_variant_are_fetched_whole() -> None:
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub_files([*shards, "unet/diffusion_pytorch_model.safetensors.index.fp16.json"])[1:] == shards
