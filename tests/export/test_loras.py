"""LoRAs that are fused at export: every layer at its own strength, or none."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oneword.engines.errors import FileError, UsageError
from oneword.export.loras import Lora
from oneword.export.source import Source, load_source

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
CLIP = "encoder.layers.{}.self_attn.{}"
JOINT = "transformer_blocks.0.attn.to_q"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


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


def weights_of(source: Source, part: str) -> Mapping[str, torch.Tensor]:
    """Of the network, or of a text encoder."""
    module: Any = source.network if part == "network" else source.text_encoders[part]
    return dict(module.state_dict())


def factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ones: down [rank, in, ...] and up [out, rank, ...]."""
    kernel = (1,) * (weight.ndim - 2)
    return torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank, *kernel)


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def assert_fused(
    model: Path, file: Path, tensors: Mapping[str, torch.Tensor], deltas: Mapping[tuple[str, str], torch.Tensor]
) -> None:
    """Each weight has changed by its delta, times the scale, and no other weight has changed."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    plain, fused = load_source(model), load_source(model, loras=[Lora(file, 0.5)])
    for part in ("network", *plain.text_encoders):
        before, after = weights_of(plain, part), weights_of(fused, part)
        assert set(after) == set(before)
        for name, weight in before.items():
            expected = weight + 0.5 * deltas.get((part, name), 0.0)
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5)


def test_layers_of_any_rank_and_alpha_are_fused_at_their_own_strength(tiny_model_dir: Path, tmp_path: Path) -> None:
    """kohya's layout, whose resized files have another rank and alpha in each layer.

    A weight becomes W + scale * alpha / rank * up @ down, as in its networks/lora.py.
    """
    torch.manual_seed(0)
    source = load_source(tiny_model_dir)
    layers = [("network", f"{ATTENTION}.{name}") for name in ("attn1.to_q", "attn1.to_k", "attn2.to_q", "ff.net.2")]
    layers += [("network", "down_blocks.0.resnets.0.conv1"), ("network", "down_blocks.0.resnets.0.conv2")]
    layers += [("text_encoder", CLIP.format(layer, name)) for layer in (0, 1) for name in PROJECTIONS]
    tensors, deltas = {}, {}
    for number, (part, layer) in enumerate(layers):
        rank, alpha = (1, 2, 4, 8)[number % 4], (0.5, 4.0, 4.0, 8.0, 1.0)[number % 5]
        down, up = factors(weights_of(source, part)[f"{layer}.weight"], rank)
        prefix = "lora_unet_" if part == "network" else "lora_te_text_model_"
        key = prefix + layer.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        deltas[part, f"{layer}.weight"] = alpha / rank * product(down, up)

    assert_fused(tiny_model_dir, tmp_path / "resized.safetensors", tensors, deltas)


def assert_fused_everywhere(directory: Path, file: Path, network: str, layer: str, *, clip: bool) -> None:
    """Checks a file, in diffusers' layout, with a layer of the network and, with `clip`, the first encoder's attention.

    `network` is the network's name in the file.
    """
    torch.manual_seed(0)
    source = load_source(directory)
    places = [("network", network, layer)]
    places += [("text_encoder", "text_encoder.text_model", CLIP.format(0, name)) for name in PROJECTIONS if clip]
    tensors, deltas = {}, {}
    for part, prefix, layer in places:
        weights = weights_of(source, part)
        [name] = [name for name in weights if name in (f"{layer}.weight", f"text_model.{layer}.weight")]
        down, up = factors(weights[name], 2)
        tensors |= {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
        deltas[part, name] = product(down, up)

    assert_fused(directory, file, tensors, deltas)


def test_a_lora_is_fused_into_sdxl(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert_fused_everywhere(tiny_sdxl_dir, tmp_path / "lora.safetensors", "unet", layer, clip=True)


def test_a_lora_is_fused_into_stable_diffusion_3(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    assert_fused_everywhere(tiny_sd3_dir, tmp_path / "lora.safetensors", "transformer", JOINT, clip=True)


def test_a_lora_is_fused_into_flux(tiny_flux_dir: Path, tmp_path: Path) -> None:
    assert_fused_everywhere(tiny_flux_dir, tmp_path / "lora.safetensors", "transformer", JOINT, clip=True)


def test_a_lora_is_fused_into_chroma(tiny_chroma_dir: Path, tmp_path: Path) -> None:
    assert_fused_everywhere(tiny_chroma_dir, tmp_path / "lora.safetensors", "transformer", JOINT, clip=False)


def test_a_lora_is_fused_into_flux_2(tiny_flux2_dir: Path, tmp_path: Path) -> None:
    assert_fused_everywhere(tiny_flux2_dir, tmp_path / "lora.safetensors", "transformer", JOINT, clip=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{ATTENTION}.attn1.to_q.dora_scale", "it is a DoRA, whose magnitudes diffusers does not read"),
        (
            "down_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight",
            "the model has 1 of its 2 layers",
        ),
        (f"{ATTENTION}.attn1.to_v.hada_w1_a", "hada_w1_a"),
    ],
)
def test_a_lora_that_fits_in_part_is_refused(tiny_model_dir: Path, tmp_path: Path, name: str, message: str) -> None:
    first = f"lora_unet_{ATTENTION.replace('.', '_')}_attn1_to_q"
    layer, _, kind = name.partition(".lora")
    layer, kind = (layer, f".lora{kind}") if kind else (name.rpartition(".")[0], f".{name.rpartition('.')[2]}")
    second = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{first}.lora_down.weight": torch.ones(2, 16), f"{first}.lora_up.weight": torch.ones(16, 2)}
    tensors |= {f"{second}{kind}": torch.ones(2, 16)}
    if "down" in kind:
        tensors |= {f"{second}.lora_up.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "partial.safetensors")

    with pytest.raises(FileError, match=f"partial.safetensors cannot be fused into this model .*{message}"):
        load_source(tiny_model_dir, loras=[Lora(tmp_path / "partial.safetensors")])


def test_a_lora_without_layers_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FileError, match=r"empty.safetensors cannot be fused into this model"):
        load_source(tiny_model_dir, loras=[Lora(tmp_path / "empty.safetensors")])


def test_an_alpha_without_a_layer_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    layer = f"lora_unet_{ATTENTION.replace('.', '_')}_attn1_to_q"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, "lora_unet_x.alpha": torch.tensor(1.0)}, tmp_path / "odd.safetensors")
    with pytest.raises(FileError, match=r"lora_unet_x.alpha belongs to none of its layers"):
        load_source(tiny_model_dir, loras=[Lora(tmp_path / "odd.safetensors")])


def test_a_small_alpha_in_half_precision_loses_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Numbers of fp16 that would leave its range once they are scaled."""
    torch.manual_seed(0)
    name = f"{ATTENTION}.attn1.to_q"
    down, up = factors(weights_of(load_source(tiny_model_dir), "network")[f"{name}.weight"], 8)
    down, up = (1e3 * down).half(), (1e-3 * up).half()
    key = f"lora_unet_{name.replace('.', '_')}"
    alpha = torch.tensor(1e-3)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    delta = alpha / 8 * product(down.float(), up.float())

    save_file(tensors, tmp_path / "half.safetensors")
    plain, fused = (load_source(tiny_model_dir, loras=loras) for loras in ([], [Lora(tmp_path / "half.safetensors")]))
    found = weights_of(fused, "network")[f"{name}.weight"] - weights_of(plain, "network")[f"{name}.weight"]
    torch.testing.assert_close(found, delta, rtol=1e-2, atol=1e-7)


def test_layers_that_diffusers_loses_are_noticed(tiny_sdxl_dir: Path, tmp_path: Path) -> None:
    """It drops the layers with the original names of blocks if there are others with its own."""
    tensors = {}
    for block in ("down_blocks_1_attentions_0", "input_blocks_4_1"):
        key = f"lora_unet_{block}_transformer_blocks_0_attn1_to_q"
        tensors |= {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(FileError, match=r"diffusers reads 1 of its 2 layers"):
        load_source(tiny_sdxl_dir, loras=[Lora(tmp_path / "mixed.safetensors")])


def test_a_lora_that_is_missing_is_named_before_the_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oneword.export.source.load_folder", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=r"there is no file .*none\.safetensors"):
        load_source(tiny_model_dir, loras=[Lora(tmp_path / "none.safetensors")])
