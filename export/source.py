"""Loads a model from a diffusers directory, a hub id, a single-file checkpoint or `miniature`.

Safetensors only, no pickles.
"""

import hashlib
import importlib.resources
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Model,
    T5EncoderModel,
)

from oneword.engines.errors import FileError, OnewordError, UsageError, one_line, one_of
from oneword.engines.files import file_digest
from oneword.export.loras import Lora, fuse, refuse_pipeline
from oneword.export.pipelines import (
    OMISSIBLE,
    checked_pipeline,
    components_left_out,
    refuse_scheduler,
    tokenizer_name,
)

COMPONENTS: Mapping[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLFlux2": AutoencoderKLFlux2,
    "VQModel": VQModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "SD3Transformer2DModel": SD3Transformer2DModel,
    "FluxTransformer2DModel": FluxTransformer2DModel,
    "ChromaTransformer2DModel": ChromaTransformer2DModel,
    "Flux2Transformer2DModel": Flux2Transformer2DModel,
    "Qwen3ForCausalLM": Qwen3Model,  # without the weights that predict tokens
    "T5EncoderModel": T5EncoderModel,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "LDMBertModel": LDMBertModel,
    "CLIPTokenizer": AutoTokenizer,
    "CLIPTokenizerFast": AutoTokenizer,
    "BertTokenizer": BertTokenizer,
    "BertTokenizerFast": BertTokenizer,
    "T5Tokenizer": AutoTokenizer,
    "T5TokenizerFast": AutoTokenizer,
    "Qwen2Tokenizer": AutoTokenizer,
    "Qwen2TokenizerFast": AutoTokenizer,
}
COMPONENT_NAMES = (
    *("unet", "transformer", "vae", "vqvae"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "bert"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)
WEIGHTS = "*.safetensors"
TEXTS = ("*.json", "*.txt", "*.jinja")
PIECES = "spiece.model"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), (PIECES,))
"""The files of a tokenizer's vocabulary, in one of these forms. Without any, transformers makes one of no tokens."""


@dataclass(frozen=True)
class Source:
    """A loaded model. Modules are on the CPU, in eval mode, without gradients.

    `text_encoders` and `tokenizers` share their keys, the encoders' names in bundles and words: those of the folders
    ("text_encoder", "text_encoder_2"), except that T5 is "text_encoder_3" and Qwen3 "text_encoder_qwen3" in every
    family.
    `revision` is the hub's commit, empty for a directory. `pipeline` is the class that model_index.json names.
    """

    model: str
    path: Path
    revision: str
    pipeline: str
    network: (
        UNet2DConditionModel
        | SD3Transformer2DModel
        | FluxTransformer2DModel
        | ChromaTransformer2DModel
        | Flux2Transformer2DModel
    )
    vae: AutoencoderKL | AutoencoderKLFlux2 | VQModel
    text_encoders: Mapping[str, nn.Module]
    tokenizers: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]
    file: Path | None = None
    """The single-file checkpoint the weights come from, if any; `path` then holds only its configs."""
    loras: tuple[Lora, ...] = ()

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network of a model that has a UNet. Raises UsageError for one with a transformer."""
        if not isinstance(self.network, UNet2DConditionModel):
            raise UsageError(f"{self.model} has the network {type(self.network).__name__}: give a model with a UNet")
        return self.network

    @property
    def name(self) -> str:
        """The origin recorded in the bundle: a hub id or a file's name, never a path, and the fused LoRAs."""
        origin = source_name(self.model, self.file or self.path, self.revision)
        return " + ".join([origin, *(f"{lora.file.name} x {lora.scale:g}" for lora in self.loras)])

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of the configs, vocabularies and weights in use, and over the checkpoint
        and the LoRAs, if any."""
        return source_digest(self.path, self.file, self.loras)


def silence_libraries() -> None:
    """Turns off the progress bars and warnings of diffusers and transformers, and the messages of the libraries that
    they use, for commands. Errors are still raised, and a download still shows its progress."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "torch.utils._sympy"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_source(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    config: Path | None = None,
    loras: Sequence[Lora] = (),
    without: Sequence[str] = (),
) -> Source:
    """Loads a diffusers directory, a hub id (`owner/name` or `owner/name@revision`), `miniature`, or a single
    .safetensors file. A single file must be of a model with a UNet and needs `config`: a diffusers directory of the
    same kind of model, whose weights are not read. LoRAs are fused in order. `without` names text encoders to
    leave out, if the model can do without them."""
    for lora in loras:
        refuse_pickles(lora.file)
    file = single_file(str(model), config)
    path, revision = find_model(str(model)) if file is None else find_model(str(config))
    index = read_json(path / "model_index.json")
    pipeline = checked_pipeline(str(model), index)
    if file is not None and "transformer" in index:  # T5's `wo` must stay float32, and most have no text encoder
        raise UsageError(
            f"{model} is a single file of a {pipeline}, whose text encoders are not read from one: single files are "
            "for models with a UNet, give a diffusers directory or a hub id"
        )
    if loras:
        refuse_pipeline(pipeline_class(pipeline))
    left_out = components_left_out(pipeline, without)
    scheduler_config = read_json(path / "scheduler" / "scheduler_config.json")
    refuse_scheduler(str(model), pipeline, scheduler_config)
    classes = checked_components(str(model), path, index, left_out, has_weights=file is None)
    if file is None:
        loaded = {name: load_folder(path / name, kind, COMPONENTS[kind], dtype) for name, kind in classes.items()}
    else:
        single = load_single_file(file, path, pipeline, dtype)
        loaded = {name: single[name] for name in classes}
    folders = {encoder_name(folder, loaded[folder]): folder for folder in classes if is_encoder(folder)}
    if loras:
        fuse(loras, pipeline_class(pipeline), {name: loaded.get(name) for name in COMPONENT_NAMES})
    return Source(
        model=str(model),
        path=path,
        revision=revision if file is None else "",
        pipeline=pipeline,
        network=loaded.get("unet", loaded.get("transformer")),
        vae=loaded.get("vae", loaded.get("vqvae")),
        text_encoders={name: loaded[folder] for name, folder in folders.items()},
        tokenizers={name: loaded[tokenizer_name(folder)] for name, folder in folders.items()},
        scheduler_config=scheduler_config,
        model_index=index,
        file=file,
        loras=tuple(loras),
    )


def checked_components(
    model: str, path: Path, index: Mapping[str, Any], left_out: Collection[str], *, has_weights: bool
) -> dict[str, str]:
    """The class of each component to load, by its folder. Nothing is loaded. Raises UsageError and FileError for a
    component that is missing or cannot be loaded."""
    classes: dict[str, str] = {}
    for name in (name for name in COMPONENT_NAMES if name in index and name not in left_out):
        match index[name]:
            case None | [_, None]:
                continue
            case [str(), str(class_name)]:
                classes[name] = class_name
            case value:
                raise FileError(
                    f"{path / 'model_index.json'} has {name} = {value!r}, which must be a library and a class: "
                    "download the model again"
                )
    encoders = [name for name in classes if is_encoder(name)]
    if not ({"unet", "transformer"} & classes.keys() and {"vae", "vqvae"} & classes.keys() and encoders):
        raise UsageError(
            f"{model}: model_index.json has {', '.join(sorted(classes)) or 'no known component'}: "
            "give a model with a unet or transformer, a vae or vqvae, and a text_encoder or bert"
        )
    if absent := [t for t in map(tokenizer_name, encoders) if t not in classes]:
        raise UsageError(f"{model}: model_index.json has no {absent[0]}: give a model with one for each encoder")
    for name, class_name in classes.items():
        check_component(path / name, class_name, has_weights)
    return classes


def check_component(folder: Path, class_name: str, has_weights: bool) -> None:
    """Raises UsageError or FileError for a component that cannot be loaded, by its files' names and its config."""
    if class_name not in COMPONENTS:
        raise UsageError(f"{folder.name} is a {class_name}: give a model with {one_of(sorted(COMPONENTS))}")
    if not folder.is_dir():
        raise FileError(
            f"{folder.parent} names a component {folder.name} but has no such folder: download the model again"
        )
    if is_tokenizer(class_name):
        if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
            forms = ", ".join(" and ".join(names) for names in VOCABULARIES)
            raise FileError(f"{folder} has no vocabulary ({forms}): download the model again")
        return
    if quantization := read_json(folder / "config.json").get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(f"{folder} is quantised ({method}): give the model with weights that are floats")
    if has_weights:
        weights_variant(folder)  # raises if there are none


def is_encoder(folder: str) -> bool:
    """Whether the component in a folder of this name is a text encoder."""
    return folder.startswith("text_encoder") or folder == "bert"


def is_tokenizer(class_name: str) -> bool:
    """Whether a component of this class is a tokenizer."""
    return "okenizer" in class_name


def encoder_name(folder: str, module: nn.Module) -> str:
    """The name of a component's encoder in bundles and words; see `Source`."""
    if isinstance(module, T5EncoderModel):
        return "text_encoder_3"
    if isinstance(module, Qwen3Model):
        return "text_encoder_qwen3"
    return folder.replace("bert", "text_encoder")


def encoders_left_out(model: str, encoders: Collection[str]) -> tuple[str, ...]:
    """The text encoders of a model that a bundle with these encoders was exported without, for `load_source`."""
    path, _ = find_model(model)
    omissible = OMISSIBLE.get(str(read_json(path / "model_index.json").get("_class_name", "")))
    return () if omissible is None or omissible in encoders else (omissible,)


def single_file(model: str, config: Path | None) -> Path | None:
    """The path of `model` if it is a single file, else None. Raises UsageError if `config` does not go with it."""
    path = Path(model).expanduser()
    if not path.is_file():
        if config is not None:
            raise UsageError(f"--config is for a single .safetensors file, which {model} is not: remove --config")
        return None
    refuse_pickles(path)
    if config is None:
        raise UsageError(f"{model} is a single file: give --config, a diffusers directory of the same kind of model")
    return path


def load_single_file(file: Path, config: Path, pipeline: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loads a checkpoint's components with diffusers' own loader, offline, by the configs and tokenizers of a diffusers
    directory, without its weights."""
    kind = pipeline_class(pipeline)
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    parameters = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in unused.items() if name in parameters}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in used_files(config, weights=False):
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                shutil.copy(config / name, Path(folder) / name)
            model = kind.from_single_file(str(file), config=folder, local_files_only=True, torch_dtype=dtype, **options)
    except Exception as e:  # of any type: the file does not match the config, or there is no room for the configs
        raise FileError(f"{file} cannot be loaded as a {pipeline} ({one_line(e)}): give a matching --config") from e
    loaded = {name: part for name, part in model.components.items() if name in COMPONENT_NAMES and part is not None}
    for part in loaded.values():
        if isinstance(part, nn.Module):
            refuse_missing(file, (name for name, weight in part.state_dict().items() if weight.is_meta))
            part.to(dtype).eval().requires_grad_(False)
    return loaded


def pipeline_class(name: str) -> Any:
    """The diffusers class with this name."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UsageError(f"model_index.json names the pipeline {name!r}, unknown to diffusers: give another model")
    return kind


def refuse_pickles(file: Path) -> None:
    """Raises UsageError if `file` is not a .safetensors file."""
    if not file.is_file():
        raise UsageError(f"there is no file {file}: check the path")
    if file.suffix != ".safetensors":
        raise UsageError(f"{file} is not a .safetensors file: pickles are not read, convert the weights first")
    refuse_name(file)


def refuse_name(path: Path) -> None:
    """Raises UsageError for a path that is not UTF-8, which safetensors cannot open."""
    if str(path).encode(errors="replace").decode() != str(path):
        raise UsageError(f"{path} is not a name in UTF-8, which safetensors needs: rename it")


def find_model(model: str) -> tuple[Path, str]:
    """The directory that holds a model, and its hub revision ("" for a local model)."""
    if model == "miniature":
        path = Path(str(importlib.resources.files("oneword") / "miniature"))
        if not (path / "model_index.json").is_file():
            raise UsageError(f"the miniature's weights are not at {path}: run python -m oneword.train.miniature")
        return path, ""
    path = Path(model).expanduser()
    if path.is_dir():
        refuse_name(path)
        if not (path / "model_index.json").is_file():
            if (path / "bundle.json").is_file():
                raise UsageError(f"{model} is an exported bundle: give the model that it was made from")
            raise UsageError(f"{model} has no model_index.json: give a diffusers directory, a hub id, or 'miniature'")
        return path, ""
    if model.startswith((".", "/", "~")) and not path.exists():
        raise UsageError(f"there is no file or folder {model}: check the path")
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        raise UsageError(
            f"{model} is neither a directory nor a hub id: give a diffusers directory, owner/name, or 'miniature'"
        )
    return download(model)


def download(model: str) -> tuple[Path, str]:
    """Downloads a hub model's configs, vocabularies and safetensors to the hub's cache, at one commit: one variant of
    each component in use. An unsupported model is refused by its model_index.json, before the rest is downloaded. Falls
    back to the cache if the hub cannot be reached."""
    repo, _, revision = model.partition("@")
    try:
        path = Path(snapshot_download(repo, revision=revision or None, allow_patterns=["model_index.json"]))
    except Exception as e:  # its type depends on the HTTP library of the hub's client
        raise not_from_hub(model, e) from e
    if not (path / "model_index.json").is_file():
        raise not_in_diffusers_format(model)
    index = read_json(path / "model_index.json")
    checked_pipeline(model, index)
    try:
        info = HfApi().model_info(repo, revision=path.name)
    except HfHubHTTPError as e:
        raise not_from_hub(model, e) from e
    except Exception as e:  # the hub cannot be reached: the folder may be that of an earlier download
        if not all((path / name).is_dir() for name in COMPONENT_NAMES if name in index):
            raise not_from_hub(model, e) from e
        return path, path.name
    files = hub_files([file.rfilename for file in info.siblings or []])
    try:
        snapshot_download(repo, revision=path.name, allow_patterns=files)
    except Exception as e:
        raise not_from_hub(model, e) from e
    return path, path.name


def not_in_diffusers_format(model: str) -> UsageError:
    """The error for a repository of something else."""
    return UsageError(f"{model} has no model_index.json: give the hub id of a model in diffusers' format")


def not_from_hub(model: str, error: Exception) -> FileError:
    """The error for a model that cannot be downloaded."""
    return FileError(
        f"{model} could not be downloaded from the Hub ({one_line(error)}): give a local diffusers directory"
    )


def hub_files(names: Sequence[str]) -> list[str]:
    """The files of a model that are used, given the names of all: no other folders, no pickles, SentencePiece's files
    only for a tokenizer without another form, and of the weights those without a variant if there are any, else those
    of one variant."""
    files = ["model_index.json"]
    for folder in (*COMPONENT_NAMES, "scheduler"):
        inside = [name for name in names if PurePosixPath(name).parent == PurePosixPath(folder)]
        files += [name for name in inside if any(PurePosixPath(name).match(pattern) for pattern in TEXTS)]
        if f"{folder}/tokenizer.json" not in inside:
            files += [name for name in inside if PurePosixPath(name).name == PIECES]
        weights = [name for name in inside if name.endswith(".safetensors")]
        variant = variant_of(PurePosixPath(name).name for name in weights)
        files += [name for name in weights if variant_of([PurePosixPath(name).name]) == variant]
    return [name for name in files if name in names]


def load_preview_decoder(path: Path, dtype: torch.dtype) -> AutoencoderTiny:
    """Loads a diffusers directory of an AutoencoderTiny. Raises UsageError if it is not one."""
    config = path / "config.json"
    class_name = read_json(config).get("_class_name") if config.is_file() else None
    if class_name != "AutoencoderTiny":
        problem = f"is a {class_name}" if class_name else "has no config.json of a model"
        raise UsageError(
            f"--preview {path} {problem}: give a diffusers directory of an AutoencoderTiny, such as TAESD's"
        )
    decoder: AutoencoderTiny = load_folder(path, "AutoencoderTiny", AutoencoderTiny, dtype)
    return decoder


def load_folder(folder: Path, class_name: str, loader: Any, dtype: torch.dtype) -> Any:
    """Loads a tokenizer or a module, in eval mode and without gradients. Raises FileError."""
    try:
        if is_tokenizer(class_name):
            return loader.from_pretrained(folder, local_files_only=True)
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        options["torch_dtype" if hasattr(loader, "load_config") else "dtype"] = dtype
        if variant := weights_variant(folder):
            options["variant"] = variant
        module, loading = loader.from_pretrained(folder, **options)
    except OnewordError:
        raise
    except Exception as e:  # of any type: the folder is damaged, or of another kind of model
        raise FileError(f"{folder} cannot be loaded as {class_name} ({one_line(e)}): download the model again") from e
    refuse_missing(folder, loading["missing_keys"])
    evaluated: nn.Module = module.eval().requires_grad_(False)
    return evaluated


def refuse_missing(path: Path, weights: Iterable[str]) -> None:
    """Raises FileError for weights that a model needs and that are not in its file or folder."""
    if names := sorted(weights):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FileError(f"{path} has no weights {', '.join(names[:3])}{more}: download the model again")


def weights_variant(folder: Path) -> str | None:
    """See variant_of. Raises OnewordError if the folder has no safetensors."""
    names = [p.name for p in folder.glob(WEIGHTS)]
    if not names:
        raise OnewordError(f"{folder} has no .safetensors file: pickles are not read, convert the weights first")
    return variant_of(names)


def variant_of(names: Iterable[str]) -> str | None:
    """`fp16` if all weights are named like model.fp16.safetensors; None if any has no variant or there are none."""
    variants = {m[1] if (m := re.fullmatch(r"[^.]+\.(\w+)(-\d+-of-\d+)?\.safetensors", n)) else None for n in names}
    return None if None in variants or not variants else min(v for v in variants if v)


def used_files(path: Path, *, weights: bool = True) -> list[str]:
    """The files of a diffusers directory that are used (`hub_files`), sorted; without `weights`, its configs and
    vocabularies alone."""
    names = ["model_index.json", *(file.relative_to(path).as_posix() for file in path.glob("*/*"))]
    return sorted(name for name in hub_files(names) if weights or not name.endswith(".safetensors"))


def digest_directory(path: Path, *, weights: bool = True) -> str:
    """sha256 over the files of a model that are used (`used_files`), with their names."""
    digest = hashlib.sha256()
    for name in used_files(path, weights=weights):
        digest.update(name.encode() + b"\0" + bytes.fromhex(file_digest(path / name)))
    return digest.hexdigest()


def source_digest(path: Path, file: Path | None = None, loras: Sequence[Lora] = ()) -> str:
    """The digest of a source, without loading it; see `Source.digest`."""
    parts = [digest_directory(path, weights=file is None)]
    if file is not None:
        parts.append(file_digest(file))
    parts += [f"{file_digest(lora.file)} {lora.scale!r}" for lora in loras]
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def source_name(model: str, path: Path, revision: str) -> str:
    """The origin of a source without its LoRAs; see `Source.name`."""
    return model if revision else os.fsencode(os.path.basename(os.path.abspath(path))).decode(errors="replace")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise FileError(f"{path} cannot be read ({one_line(e)}): download the model again") from e
    if not isinstance(value, dict):
        raise FileError(f"{path} does not hold a JSON object: download the model again")
    return value
