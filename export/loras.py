"""Fuses LoRAs into a model's weights, with diffusers' own loaders.

Every layer of a file is fused, at its own strength, or the file is refused. Not covered, and refused: DoRA, LoHa, LoKr
and other kinds.
"""

import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor, nn

from oneword.engines.errors import FileError, MissingPackage, UsageError, one_line

_UNUSED: Final = ("safety_checker", "feature_extractor", "image_encoder")
_PAIRS: Final = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
"""The two factors of a layer, in files that give each layer a strength."""
_FIRST_FACTORS: Final = ("down.weight", "lora_A.weight")
"""How the first factor's name ends, in files and in diffusers' form."""


@dataclass(frozen=True)
class Lora:
    """A LoRA to fuse at export, and its scale."""

    file: Path
    scale: float = 1.0


def refuse_pipeline(pipeline: Any) -> None:
    """Raises UsageError for a diffusers class that LoRAs cannot be fused into, and MissingPackage."""
    if not hasattr(pipeline, "fuse_lora"):
        raise UsageError(f"diffusers cannot fuse a LoRA into a {pipeline.__name__}: remove --lora")
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as e:
        raise MissingPackage("peft", "export") from e


def fuse(loras: Sequence[Lora], pipeline: Any, components: Mapping[str, Any]) -> None:
    """Fuses LoRAs into the weights of a model's components, in place, in order. `pipeline` is its diffusers class.

    Raises FileError for a file of which any part does not fit the model.
    """
    parameters = inspect.signature(pipeline.__init__).parameters
    parts = {**components, **dict.fromkeys((*_UNUSED, "scheduler")), "requires_safety_checker": False}
    model = pipeline(**{name: value for name, value in parts.items() if name in parameters})
    for lora in loras:
        try:
            _fuse(lora, model)
        except Exception as e:  # of any type: the file does not fit the model
            raise FileError(f"{lora.file} cannot be fused into this model ({one_line(e)}): give one made for it") from e
    for part in components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def _fuse(lora: Lora, model: Any) -> None:
    """Raises ValueError if a part of the file does not belong to the model, and whatever diffusers raises."""
    weights = load_file(lora.file)
    if any("dora_scale" in name for name in weights):
        raise ValueError("it is a DoRA, whose magnitudes diffusers does not read")
    plain = _at_strength_one(weights)
    if not (layers := _count_layers(plain, model)):
        raise ValueError("it has no layers")
    adapted = [name for name in model._lora_loadable_modules if getattr(model, name, None) is not None]
    model.load_lora_weights(str(lora.file) if plain.keys() == weights.keys() else plain)  # a file has metadata too
    found = sum(_has_lora(module) for name in adapted for module in getattr(model, name).modules())
    if found != layers:
        raise ValueError(f"the model has {found} of its {layers} layers")
    model.fuse_lora(components=adapted, lora_scale=lora.scale)
    model.unload_lora_weights()


def _at_strength_one(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same layers without alphas: the second factor times alpha / rank, in float32.

    diffusers passes alphas that differ from layer to layer to peft under names that match none of them. Factors whose
    file has no alphas count as they are, whatever their rank. Raises ValueError for an alpha without a layer.
    """
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith(".alpha")}
    for name in weights.keys() - plain.keys():
        layer = name.removesuffix(".alpha")
        for down, up in _PAIRS:
            if layer + down in plain and layer + up in plain:
                strength = weights[name].item() / len(plain[layer + down])
                plain[layer + up] = plain[layer + up].float() * strength
                break
        else:
            raise ValueError(f"{name} belongs to none of its layers")
    return plain


def _count_layers(weights: Mapping[str, Tensor], model: Any) -> int:
    """The number of layers in a file's weights, once diffusers has converted them; one of a fused product counts for
    each part.

    Raises ValueError for other tensors, and for layers that are lost in the conversion.
    """
    unet = getattr(model, "unet", None)
    copy = {**weights}  # which the conversion empties
    converted = model.lora_state_dict(copy, unet_config=None if unet is None else unet.config)
    names = list(converted[0] if isinstance(converted, tuple) else converted)
    if foreign := [name for name in names if "lora" not in name]:
        raise ValueError(f"{foreign[0]} is not part of a LoRA")
    layers, converted_layers = (sum(name.endswith(_FIRST_FACTORS) for name in found) for found in (weights, names))
    if converted_layers < layers:
        raise ValueError(f"diffusers reads {converted_layers} of its {layers} layers")
    return converted_layers


def _has_lora(module: nn.Module) -> bool:
    return bool(getattr(module, "lora_A", None))
