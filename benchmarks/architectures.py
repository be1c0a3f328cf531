"""The families' networks at full size, with random weights: what `benchmarks.full_size` and `benchmarks.gpu` measure.

A name is that of a model, for transformers also with a smaller number of layers: `flux-dev@2`. Weights are scaled to
preserve the size of activations. `tiny` and `tiny-flow` are of toy size, to check that the benchmarks run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINEAR: dict[str, Any] = {"use_linear_projection": True}
SD: dict[str, Any] = {"sample_size": 64, "attention_head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**SD, "cross_attention_dim": 768},
    "sd2": {**SD, **LINEAR, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": {
        **LINEAR,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "tiny": {
        **SD,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    },
    "ldm": {**SD, "sample_size": 32, "cross_attention_dim": 1280},
}
"""The UNets of SD 1.5, SD 2.1, SDXL 1.0 and ldm-text2im-large-256, without UNet2DConditionModel's defaults."""

FLOW: dict[str, dict[str, Any]] = {
    "sd35-medium": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "flux-dev": {
        "in_channels": 64,
        "num_layers": 19,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "tiny-flow": {
        "in_channels": 64,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    },
}
"""The transformers of Stable Diffusion 3.5 medium and FLUX.1 dev. FLUX.1 has twice as many single as double blocks."""

TEXT: dict[str, dict[str, Any]] = {
    "t5-xxl": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
}
"""T5 v1.1 XXL's encoder. In fp16 its `wo` stay in fp32, as in transformers; its table is an input of the graph."""

LAYERS = {
    name: int(config["num_layers"]) for name, config in (FLOW | TEXT).items() if "dual_attention_layers" not in config
}
"""Layers of the transformers whose layers are alike: FLUX.1's double blocks, T5's blocks."""
SHAPE = {"B": 1, "N": 2, "M": 2, "T": 77, "h": 32, "w": 32}
SHAPES = {"flux-dev": {**SHAPE, "N": 1, "M": 1, "T": 512, "h": 128, "w": 128}}
"""The inputs of the measured call, if other than SHAPE: for FLUX.1 a step of 1024x1024 without a negative prompt."""
T5_LENGTH = 512


def split(name: str) -> tuple[str, int | None]:
    """The model of a name, and its number of layers if it is not the model's own."""
    model, _, layers = name.partition("@")
    return model, int(layers) if layers else None


def check(name: str) -> None:
    """Raises ValueError for a name that is unknown, or whose number of layers makes no sense."""
    model, _, layers = name.partition("@")
    if model not in CONFIGS | FLOW | TEXT:
        raise ValueError(f"unknown model {model!r}: choose from {', '.join(CONFIGS | FLOW | TEXT)}")
    if layers and layers not in map(str, range(1, LAYERS.get(model, 0) + 1)):
        allowed = f"be 1 to {LAYERS[model]}" if model in LAYERS else "be left out, because its layers are not alike"
        raise ValueError(f"the number of layers of {name!r} is {layers}, but must {allowed}")


def shape(name: str) -> Mapping[str, int]:
    """The sizes of the axes in the measured call."""
    return SHAPES.get(split(name)[0], SHAPE)


def full_size(name: str, precision: str, weights: Path | None = None) -> Any:
    """A denoise step, or T5's encoder, as a graph to trace. `weights`: see random_network."""
    from oneword.export.families import denoise_graph, encoder_graph
    from oneword.export.flux import Flux
    from oneword.export.modules import DenoiseStep, UNet
    from oneword.export.sd3 import StableDiffusion3
    from oneword.export.t5 import T5Encoder

    model, network = split(name)[0], random_network(name, precision, weights)
    if model in TEXT:
        return encoder_graph("text_encoder_3", T5Encoder(network, T5_LENGTH))
    if model in FLOW:
        wrapper = StableDiffusion3 if "dual_attention_layers" in FLOW[model] else Flux
        return denoise_graph(DenoiseStep(wrapper(network)), network.config.pooled_projection_dim)
    config = CONFIGS[model]
    if "addition_embed_type" not in config:
        return denoise_graph(DenoiseStep(UNet(network)))
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return denoise_graph(DenoiseStep(UNet(network)), pooled, 6)


def random_network(name: str, precision: str, weights: Path | None = None) -> Any:
    """The diffusers or transformers model with random weights, the same ones in every process. They are stored in the
    file `weights`, if one is given, and read from it the next time: for SDXL drawing them takes most of a minute."""
    import torch
    from safetensors.torch import load_file, save_file

    from oneword.engines.graph import Precision
    from oneword.export.families import TORCH_DTYPES

    with torch.device("meta"):
        network = torch.nn.Module.to(empty(name), TORCH_DTYPES[Precision(precision)])
        if split(name)[0] in TEXT:
            for block in network.encoder.block:
                block.layer[1].DenseReluDense.wo.float()
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    if weights is not None and weights.is_file():
        network.load_state_dict(load_file(weights))
        return network
    randomize(network)
    if weights is not None:
        part = weights.with_suffix(".part")
        save_file(network.state_dict(), part)
        part.rename(weights)
    return network


def empty(name: str) -> Any:
    """The diffusers or transformers model, with its own initial weights."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

    model, layers = split(name)
    if model in CONFIGS:
        return UNet2DConditionModel(**CONFIGS[model])
    config = {**(FLOW | TEXT)[model], "num_layers": layers or (FLOW | TEXT)[model]["num_layers"]}
    if model in TEXT:
        return T5EncoderModel(T5Config(**config))
    if "dual_attention_layers" in config:
        return SD3Transformer2DModel(**config)
    return FluxTransformer2DModel(**config, num_single_layers=2 * config["num_layers"])


def randomize(network: Any) -> None:
    """Fills a model with random numbers: matrices by their inputs, norms with ones, biases with zeros."""
    import torch

    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        else:
            parameter.normal_(0, float(parameter[0].numel()) ** -0.5)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.normal_()  # SD3's table of positions
    for module in network.modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), torch.Tensor):
            module.weight.fill_(1)


def side(name: str) -> int:
    """The side, in pixels, of the model's pictures."""
    model, _ = split(name)
    return 8 * int((CONFIGS | FLOW)[model].get("sample_size", 128))


def bundle_of_one(name: str, precision: str, folder: Path, weights: Path | None = None) -> Any:
    """The exported step as a bundle of one graph, which is all an engine reads; exported if it does not exist yet.
    `weights`: see random_network."""
    import msgspec

    from oneword.engines.graph import Graph
    from oneword.export.modules import DenoiseStep
    from oneword.export.write import write_graph
    from oneword.runtime.bundle import Bundle, Conditioning, Defaults, Encoder, Manifest, Provenance, Vae

    path = folder / "graph.json"
    if path.is_file():
        graph = msgspec.json.decode(path.read_bytes(), type=Graph)
    else:
        graph = write_graph(full_size(name, precision, weights), folder)
        path.write_bytes(msgspec.json.encode(graph))
    inputs: dict[str, Any] = {spec.name: spec.axes for spec in graph.inputs}
    encoder = Encoder(
        graph="text_encoder", table="", tokenizer="", vocab_size=1, width=1, hidden_width=1, length=shape(name)["T"],
        bos_id=0, eos_id=0, pad_id=0, layers=(1,), default_layer=1,
    )  # fmt: skip
    flow = split(name)[0] in FLOW
    manifest = Manifest(
        source=Provenance(name, ""),
        graphs={"denoise_step": graph},
        encoders=(encoder,),
        conditioning=Conditioning((("text_encoder",),), repeatable=not flow),
        columns=(*DenoiseStep.COLUMNS, "embedded_guidance")[: inputs["schedule"][1]],
        scheduler={},
        vae=Vae(scale=1.0, shift=0.0, factor=8, latent_channels=inputs["sample"][1]),
        defaults=Defaults(width=side(name), height=side(name)),
        size_multiple=16 if flow else 8,
    )
    return Bundle(folder, manifest)
