"""The weights of a tiny Stable Diffusion under the names used in single-file checkpoints."""

import re

import torch

from oneword.export.source import Source


def original_layout(source: Source) -> dict[str, torch.Tensor]:
    """The weights under the names of Stable Diffusion's own code (CompVis/stable-diffusion), for two UNet levels of
    one layer and four VAE levels."""
    unet = [
        (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"conv_in", lambda m: "input_blocks.0.0"),
        (r"conv_norm_out", lambda m: "out.0"),
        (r"conv_out", lambda m: "out.2"),
        (r"down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.0"),
        (r"down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.1"),
        (r"down_blocks\.0\.downsamplers\.0\.conv", lambda m: "input_blocks.2.0.op"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"mid_block\.attentions\.0", lambda m: "middle_block.1"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
        (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
        (r"up_blocks\.0\.upsamplers\.0\.conv", lambda m: "output_blocks.1.1.conv"),
    ]
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    vae = [
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
        (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"down.{m[1]}.block.{m[2]}"),
        (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"conv_norm_out", lambda m: "norm_out"),
        (r"conv_shortcut", lambda m: "nin_shortcut"),
        (r"group_norm", lambda m: "norm"),
        (r"to_(q|k|v)", lambda m: m[1]),
        (r"to_out\.0", lambda m: "proj_out"),
    ]
    tensors = {}
    for name, value in source.unet.state_dict().items():
        for pattern, new in unet:
            name = re.sub(rf"^{pattern}(?=\.)", new, name)
        if match := re.match(r"((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.(\w+)\.", name):
            name = name.replace(match[0], f"{match[1]}.{resnet.get(match[2], match[2])}.")
        tensors[f"model.diffusion_model.{name}"] = value.contiguous()
    for name, value in source.vae.state_dict().items():
        for pattern, new in vae:
            name = re.sub(pattern, new, name)
        attention = "attn_1" in name and name.endswith("weight") and ".norm." not in name
        tensors[f"first_stage_model.{name}"] = (value[:, :, None, None] if attention else value).contiguous()
    text = source.text_encoders["text_encoder"].state_dict()
    for name, value in text.items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{name}"] = value.contiguous()
    return tensors
