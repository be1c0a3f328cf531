"""Where a model comes from: a diffusers directory, a hub id, or the word `miniature`. Safetensors only, no pickles."""

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoTokenizer, BertTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from oneword.engines.errors import FileError, OnewordError, UsageError

COMPONENTS: Mapping[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "VQModel": VQModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "LDMBertModel": LDMBertModel,
    "CLIPTokenizer": AutoTokenizer,
    "CLIPTokenizerFast": AutoTokenizer,
    "BertTokenizer": BertTokenizer,
    "BertTokenizerFast": BertTokenizer,
}
WANTED = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2", "bert", "tokenizer", "tokenizer_2")
WEIGHTS = "*.safetensors"
TEXTS = ("*.json", "*.txt")


@dataclass(frozen=True)
class Source:
    """A loaded model. Modules are on the CPU, in eval mode, without gradients.

    `text_encoders` and `tokenizers` share their keys: the encoders' names ("text_encoder", "text_encoder_2").
    `revision` is the hub's commit, empty for a directory. `pipeline` is the class that model_index.json names.
    """

    model: str
    path: Path
    revision: str
    pipeline: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL | VQModel
    text_encoders: Mapping[str, nn.Module]
    tokenizers: Mapping[str, Any]
    tokenizer_paths: Mapping[str, Path]
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of the directory's configs, vocabularies and weights that are used."""
        return digest_directory(self.path)


def load_source(model: str | Path, dtype: torch.dtype = torch.float32) -> Source:
    """The model at a diffusers directory, of a hub id (`owner/name` or `owner/name@revision`), or `miniature`."""
    path, revision = find_model(str(model))
    index = read_json(path / "model_index.json")
    loaded = {
        name: load_component(path, name, str(index[name][1]), dtype)
        for name in WANTED
        if isinstance(index.get(name), list) and index[name][1] is not None
    }
    missing = {"unet", "scheduler"} - {*loaded, *(n for n in index if n == "scheduler")}
    vae = loaded.get("vae", loaded.get("vqvae"))
    encoders = {
        "text_encoder" if n == "bert" else n: m
        for n, m in loaded.items()
        if n.startswith("text_encoder") or n == "bert"
    }
    if missing or vae is None or not encoders:
        raise UsageError(
            f"{model}: model_index.json has {', '.join(sorted(loaded)) or 'nothing we know'}; "
            "a unet, a vae, a text_encoder and a scheduler are needed"
        )
    tokenizer_names = {name: name.replace("text_encoder", "tokenizer") for name in encoders}
    if absent := [t for t in tokenizer_names.values() if t not in loaded]:
        raise UsageError(f"{model}: model_index.json has no {absent[0]}, and its text encoder needs one")
    return Source(
        model=str(model),
        path=path,
        revision=revision,
        pipeline=str(index.get("_class_name", "")),
        unet=loaded["unet"],
        vae=vae,
        text_encoders=encoders,
        tokenizers={name: loaded[t] for name, t in tokenizer_names.items()},
        tokenizer_paths={name: path / t for name, t in tokenizer_names.items()},
        scheduler_config=read_json(path / "scheduler" / "scheduler_config.json"),
        model_index=index,
    )


def find_model(model: str) -> tuple[Path, str]:
    """The directory that holds a model, and the hub revision it came from ("" when it is local)."""
    if model == "miniature":
        path = Path(str(importlib.resources.files("oneword") / "miniature"))
        if not (path / "model_index.json").is_file():
            raise UsageError(f"the miniature's weights are not installed at {path}: python -m oneword.train.miniature")
        return path, ""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UsageError(f"{model} has no model_index.json: give a diffusers directory, a hub id, or 'miniature'")
        return path, ""
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        raise UsageError(
            f"{model} is no directory and no hub id: give a diffusers directory, owner/name, or 'miniature'"
        )
    return download(model)


def download(model: str) -> tuple[Path, str]:
    """A hub model's configs, vocabularies and safetensors in the hub's cache, at one commit: of the components that are
    used, one variant of each. Where the hub cannot be reached, what lies in the cache."""
    repo, _, revision = model.partition("@")
    try:
        info = HfApi().model_info(repo, revision=revision or None)
        wanted = hub_files([each.rfilename for each in info.siblings or []])
        path = Path(snapshot_download(repo, revision=info.sha, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError) as e:
        raise not_from_hub(model, e) from e
    except Exception as unreachable:  # of whichever HTTP library the hub's client uses in this release
        try:
            path = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            raise not_from_hub(model, unreachable) from unreachable
    if not (path / "model_index.json").is_file():
        raise UsageError(f"{model} has no model_index.json: give the hub id of a model in diffusers' format")
    return path, path.name


def not_from_hub(model: str, error: Exception) -> FileError:
    """What to raise where a model cannot be downloaded."""
    return FileError(f"{model} cannot be had from the hub ({first_line(error)}): give a local diffusers directory")


def hub_files(names: Sequence[str]) -> list[str]:
    """Those of a repository's files that are used: no other folders, no pickles, and full weights where there are any,
    else those of one variant."""
    wanted = ["model_index.json"]
    for folder in (*WANTED, "scheduler"):
        inside = [name for name in names if PurePosixPath(name).parent == PurePosixPath(folder)]
        wanted += [name for name in inside if any(PurePosixPath(name).match(pattern) for pattern in TEXTS)]
        weights = [name for name in inside if name.endswith(".safetensors")]
        variant = variant_of(PurePosixPath(name).name for name in weights)
        wanted += [name for name in weights if variant_of([PurePosixPath(name).name]) == variant]
    return [name for name in wanted if name in names]


def load_component(path: Path, name: str, class_name: str, dtype: torch.dtype) -> Any:
    """One component of a diffusers directory, by the class that model_index.json names."""
    if class_name not in COMPONENTS:
        raise UsageError(f"{name} is a {class_name}; known are {', '.join(sorted(COMPONENTS))}")
    folder, loader = path / name, COMPONENTS[class_name]
    if not folder.is_dir():
        raise FileError(f"{path} names a component {name} but has no such folder: fetch the model again")
    try:
        if "okenizer" in class_name:
            return loader.from_pretrained(folder, local_files_only=True)
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        options["torch_dtype" if hasattr(loader, "load_config") else "dtype"] = dtype
        if variant := weights_variant(folder):
            options["variant"] = variant
        module: nn.Module = loader.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
        raise FileError(f"{folder} cannot be loaded as {class_name} ({first_line(e)}): fetch the model again") from e
    return module.eval().requires_grad_(False)


def weights_variant(folder: Path) -> str | None:
    """See variant_of; an error where there is no safetensors."""
    names = [p.name for p in folder.glob(WEIGHTS)]
    if not names:
        raise OnewordError(f"{folder} has no .safetensors: pickles are not read, convert the weights first")
    return variant_of(names)


def variant_of(names: Iterable[str]) -> str | None:
    """`fp16` where all weights are like model.fp16.safetensors, None where some are plain or there are none."""
    variants = {m[1] if (m := re.fullmatch(r"[^.]+\.(\w+)(-\d+-of-\d+)?\.safetensors", n)) else None for n in names}
    return None if None in variants or not variants else min(v for v in variants if v)


def digest_directory(path: Path) -> str:
    """sha256 over every json, txt and safetensors file of the components we use, names included, in sorted order."""
    digest = hashlib.sha256()
    folders = [path / name for name in (*WANTED, "scheduler")]
    files = [path / "model_index.json", *(f for folder in folders for f in folder.glob("*"))]
    for file in sorted(f for f in files if f.suffix in (".json", ".txt", ".safetensors")):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise FileError(f"{path} cannot be read ({first_line(e)})") from e
    if not isinstance(value, dict):
        raise FileError(f"{path} does not hold a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
