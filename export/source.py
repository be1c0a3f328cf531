"""Where a model comes from: a diffusers directory, a hub id, a single-file checkpoint, or the word `miniature`; and the
LoRAs fused into it. Safetensors only, no pickles."""

import hashlib
import importlib.metadata
import importlib.resources
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoTokenizer, BertTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from oneword.engines.errors import FileError, MissingPackage, OnewordError, UsageError, one_line
from oneword.engines.files import file_digest

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
class Lora:
    """A LoRA to be fused at export, and how strongly."""

    file: Path
    scale: float = 1.0


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
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]
    file: Path | None = None
    """The single-file checkpoint that the weights are from; `path` holds its configs then."""
    loras: tuple[Lora, ...] = ()

    @property
    def name(self) -> str:
        """What the bundle says it came from: a hub id or a file's name, never a path, and the LoRAs in it."""
        whole = self.model if self.revision else (self.file or self.path).name
        return " + ".join([whole, *(f"{lora.file.name} x {lora.scale:g}" for lora in self.loras)])

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of the directory's configs, vocabularies and weights that are used; of
        the checkpoint and the LoRAs too, where there are any."""
        parts = [digest_directory(self.path)]
        if self.file is not None:
            parts.append(file_digest(self.file))
        parts += [f"{file_digest(lora.file)} {lora.scale!r}" for lora in self.loras]
        return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_source(
    model: str | Path, dtype: torch.dtype = torch.float32, *, config: Path | None = None, loras: Sequence[Lora] = ()
) -> Source:
    """The model at a diffusers directory, of a hub id (`owner/name` or `owner/name@revision`), or `miniature`; or of a
    single .safetensors file, whose kind the diffusers directory `config` tells (its weights are not read). LoRAs are
    fused into it, in order."""
    file = single_file(str(model), config)
    path, revision = find_model(str(model)) if file is None else find_model(str(config))
    index = read_json(path / "model_index.json")
    pipeline = str(index.get("_class_name", ""))
    if file is None:
        loaded = {
            name: load_component(path, name, str(index[name][1]), dtype)
            for name in WANTED
            if isinstance(index.get(name), list) and index[name][1] is not None
        }
    else:
        loaded = load_single_file(file, path, pipeline, dtype)
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
    if loras:
        fuse(loras, pipeline, loaded)
    return Source(
        model=str(model),
        path=path,
        revision=revision if file is None else "",
        pipeline=pipeline,
        unet=loaded["unet"],
        vae=vae,
        text_encoders=encoders,
        tokenizers={name: loaded[t] for name, t in tokenizer_names.items()},
        scheduler_config=read_json(path / "scheduler" / "scheduler_config.json"),
        model_index=index,
        file=file,
        loras=tuple(loras),
    )


def single_file(model: str, config: Path | None) -> Path | None:
    """The checkpoint that `model` is, None where it is none. Raises UsageError where that and `config` do not agree."""
    path = Path(model).expanduser()
    if not path.is_file():
        if config is not None:
            raise UsageError(f"--config is for a single .safetensors file, and {model} is none")
        return None
    refuse_pickles(path)
    if config is None:
        raise UsageError(f"{model} is a single file: give --config, a diffusers directory of a model of its kind")
    return path


def load_single_file(file: Path, config: Path, pipeline: str, dtype: torch.dtype) -> dict[str, Any]:
    """A checkpoint's components, as diffusers' own loader reads them, offline."""
    kind = pipeline_class(pipeline)
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    takes = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in unused.items() if name in takes}
    try:
        whole = kind.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=dtype, **options
        )
    except Exception as e:  # of many kinds, whatever in the file is not as the config says
        raise FileError(f"{file} cannot be loaded as a {pipeline} ({one_line(e)}): give its own --config") from e
    loaded = {name: part for name, part in whole.components.items() if name in WANTED and part is not None}
    for part in loaded.values():
        if isinstance(part, nn.Module):
            part.to(dtype).eval().requires_grad_(False)
    return loaded


def fuse(loras: Sequence[Lora], pipeline: str, loaded: Mapping[str, Any]) -> None:
    """Adds LoRAs to the weights of a model's components, in place, by diffusers' own means."""
    kind = pipeline_class(pipeline)
    if not hasattr(kind, "fuse_lora"):
        raise UsageError(f"a LoRA was given, and diffusers fuses none into a {pipeline}")
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as e:
        raise MissingPackage("peft", "export") from e
    takes = inspect.signature(kind.__init__).parameters
    parts = {name: loaded.get(name) for name in takes if name in WANTED}
    nothing = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in takes}
    whole = kind(**parts, **nothing, scheduler=None, **({"requires_safety_checker": False} if nothing else {}))
    for lora in loras:
        refuse_pickles(lora.file)
        try:
            whole.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name, local_files_only=True)
            if not whole.get_active_adapters():
                raise ValueError("none of its keys is of this model")
            whole.fuse_lora(lora_scale=lora.scale)
            whole.unload_lora_weights()
        except Exception as e:  # of many kinds, whatever in the file does not fit
            raise FileError(f"{lora.file} cannot be fused into this model ({one_line(e)}): give one made for it") from e
    for part in loaded.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def pipeline_class(name: str) -> Any:
    """diffusers' class of that name."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UsageError(f"diffusers has no {name or 'pipeline'}, which model_index.json names")
    return kind


def refuse_pickles(file: Path) -> None:
    """Weights are read from safetensors alone."""
    if file.suffix != ".safetensors" or not file.is_file():
        raise UsageError(f"{file} is no .safetensors file: pickles are not read, convert the weights first")


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
    return FileError(f"{model} cannot be had from the hub ({one_line(error)}): give a local diffusers directory")


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
        raise FileError(f"{folder} cannot be loaded as {class_name} ({one_line(e)}): fetch the model again") from e
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
        raise FileError(f"{path} cannot be read ({one_line(e)})") from e
    if not isinstance(value, dict):
        raise FileError(f"{path} does not hold a JSON object")
    return value
