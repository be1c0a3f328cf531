"""Model families: which components become which graphs, and what the manifest records about them.

A family is one function from a loaded Source to an Exportable, listed in FAMILIES; `PIPELINES` has its pipelines.
No family is named in the runtime or the engines.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderTiny,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from oneword.engines.errors import UsageError
from oneword.engines.graph import DType, Graph, Precision, TensorSpec
from oneword.export.chroma import Chroma
from oneword.export.flux import Flux
from oneword.export.flux2 import Flux2
from oneword.export.modules import (
    AnyVae,
    DenoiseStep,
    Network,
    PooledEncoder,
    TextEncoder,
    UNet,
    VaeDecoder,
    VaeEncoder,
    latent_patch,
    latent_scale_and_shift,
)
from oneword.export.pipelines import PIPELINES, refuse_first
from oneword.export.qwen3 import Qwen3Encoder, chat_frame
from oneword.export.sd3 import StableDiffusion3
from oneword.export.source import Source
from oneword.export.t5 import T5Encoder
from oneword.runtime.bundle import (
    TIME_IDS,
    Conditioning,
    Defaults,
    Encoder,
    Manifest,
    MissingNegative,
    Preview,
    Provenance,
    Vae,
)
from oneword.runtime.samplers import default_sampler
from oneword.runtime.schedule import ScheduleKind

FLUX_SAMPLE_SIZE = 128
"""h and w, in the VAE's latents, of default pictures in diffusers' pipelines of FLUX and Chroma: no config has it."""
SAMPLE_SIZES = {"stable-diffusion": 64, "latent-diffusion": 32, "stable-diffusion-xl": 128, "stable-diffusion-3": 128}
"""The same for a model of another family whose config does not have it."""
TABLE_DTYPES = {torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.float32}
AnyEncoder: TypeAlias = TextEncoder | PooledEncoder | T5Encoder | Qwen3Encoder
TORCH_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Traceable:
    """A graph to be traced: a module with its inputs and outputs, in order."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Mapping[str, int]
    """Bounds set by the weights: `V` table rows, at most `T` tokens, `layer` below this, the VAE's `factor`, and the
    `patch` of which h and w are multiples."""

    @property
    def precision(self) -> Precision:
        """The number type the network computes in: that of most of its weights. Some are always in float32, such as the
        frequencies of positions."""
        numbers = Counter[torch.dtype]()
        for weights in self.module.parameters():
            numbers[weights.dtype] += weights.numel()
        [(dtype, _)] = numbers.most_common(1)
        return next(precision for precision, d in TORCH_DTYPES.items() if d == dtype)


@dataclass(frozen=True)
class Exportable:
    """A model of a known family, ready to be traced."""

    family: str
    graphs: tuple[Traceable, ...]
    encoders: tuple[Encoder, ...]
    tables: Mapping[str, torch.Tensor]
    conditioning: Conditioning
    columns: tuple[str, ...]
    scheduler: Mapping[str, Any]
    vae: Vae
    defaults: Defaults
    schedule: ScheduleKind
    size_multiple: int
    max_side: int | None

    def manifest(self, graphs: Mapping[str, Graph], origin: Provenance, preview: Preview | None = None) -> Manifest:
        """Everything the runtime knows about this model, with these graphs."""
        return Manifest(
            source=origin,
            graphs=dict(graphs),
            encoders=self.encoders,
            conditioning=self.conditioning,
            columns=self.columns,
            scheduler=dict(self.scheduler),
            vae=self.vae,
            defaults=self.defaults,
            schedule=self.schedule,
            size_multiple=self.size_multiple,
            max_side=self.max_side,
            preview=preview,
        )


def family_of(source: Source) -> Exportable:
    """The Exportable of a source's family. Raises UsageError that names what is not supported."""
    return FAMILIES[PIPELINES[source.pipeline]](source)


def stable_diffusion(source: Source) -> Exportable:
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752): one CLIP text encoder, its last state after the norm."""
    refuse_unsupported(source, ("text_encoder",))
    encoder = TextEncoder(source.text_encoders["text_encoder"])
    return assemble(
        source,
        UNet(source.unet),
        {"text_encoder": encoder},
        Conditioning(context=(("text_encoder",),)),
        guidance_scale=7.5,
    )


def stable_diffusion_xl(source: Source) -> Exportable:
    """SDXL (arXiv 2307.01952): two CLIP encoders, penultimate states without norm, concatenated; the second pools."""
    refuse_unsupported(source, ("text_encoder", "text_encoder_2"))
    if source.vae.dtype == torch.float16:
        source.vae.float()  # this VAE overflows in fp16, which gives black pictures
    encoders = {
        "text_encoder": TextEncoder(source.text_encoders["text_encoder"], final_norm=False),
        "text_encoder_2": TextEncoder(source.text_encoders["text_encoder_2"], final_norm=False, pools=True),
    }
    zeros = bool(source.model_index.get("force_zeros_for_empty_prompt", True))
    conditioning = Conditioning(
        context=(("text_encoder", "text_encoder_2"),),
        missing_negative=MissingNegative.ZEROS if zeros else MissingNegative.EMPTY,
        pooled=("text_encoder_2",),
        time_ids=TIME_IDS,
    )
    network = UNet(source.unet)
    return assemble(source, network, encoders, conditioning, guidance_scale=5.0, skipped_layers=1)


def latent_diffusion(source: Source) -> Exportable:
    """The paper's own model, LDM text-to-image (arXiv 2112.10752): an LDMBert encoder over WordPiece tokens."""
    refuse_unsupported(source, ("text_encoder",))
    encoder = TextEncoder(source.text_encoders["text_encoder"])
    return assemble(
        source,
        UNet(source.unet),
        {"text_encoder": encoder},
        Conditioning(context=(("text_encoder",),)),
        guidance_scale=6.0,
    )


def stable_diffusion_3(source: Source) -> Exportable:
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIP encoders side by side, as in SDXL, then T5's tokens, or
    zeros without it. A word may lack rows for T5, so that words of SDXL can be used."""
    clip = ("text_encoder", "text_encoder_2")
    encoders: dict[str, AnyEncoder] = {
        name: TextEncoder(source.text_encoders[name], final_norm=False, pools=True)
        for name in clip
        if name in source.text_encoders
    }
    network, tokens = StableDiffusion3(transformer_of(source, SD3Transformer2DModel)), 256
    refuse_unsupported_flow(source, network, clip)
    t5 = source.text_encoders.get("text_encoder_3")
    if t5 is not None:
        encoders["text_encoder_3"] = T5Encoder(t5, tokens)
    conditioning = Conditioning(
        context=(clip,) if t5 is None else (clip, ("text_encoder_3",)),
        pooled=clip,
        repeatable=False,
        width=network.context_width,
        zero_tokens=tokens if t5 is None else 0,
    )
    config = network.transformer.config
    return assemble(
        source,
        network,
        encoders,
        conditioning,
        guidance_scale=7.0,
        skipped_layers=1,
        steps=28,
        schedule=ScheduleKind.FLOW,
        max_patches=int(config.pos_embed_max_size),
        word_optional=("text_encoder_3",),
    )


def flux(source: Source) -> Exportable:
    """FLUX.1 (Black Forest Labs, 2024), dev and schnell: T5's tokens, and CLIP's pooled state. Dev takes the guidance
    scale it was distilled for as an input; schnell is distilled for 4 steps without guidance."""
    network = Flux(transformer_of(source, FluxTransformer2DModel))
    refuse_unsupported_flow(source, network, ("text_encoder", "text_encoder_3"))
    encoders: dict[str, AnyEncoder] = {
        "text_encoder": PooledEncoder(source.text_encoders["text_encoder"]),
        "text_encoder_3": T5Encoder(source.text_encoders["text_encoder_3"], 512 if network.embeds_guidance else 256),
    }
    return assemble(
        source,
        network,
        encoders,
        Conditioning(context=(("text_encoder_3",),), pooled=("text_encoder",), repeatable=False),
        guidance_scale=1.0,
        embedded_guidance=3.5 if network.embeds_guidance else None,
        steps=28 if network.embeds_guidance else 4,
        schedule=ScheduleKind.FLOW_EVEN,
        word_optional=("text_encoder",),
    )


def chroma(source: Source) -> Exportable:
    """Chroma (lodestones, 2025): FLUX.1 schnell without distillation and without CLIP. T5's padding is masked, in T5
    and in the network, except for the first token of it, which the network attends to."""
    network = Chroma(transformer_of(source, ChromaTransformer2DModel))
    refuse_unsupported_flow(source, network, ("text_encoder_3",))
    encoder = T5Encoder(source.text_encoders["text_encoder_3"], 512, masks_padding=True)
    return assemble(
        source,
        network,
        {"text_encoder_3": encoder},
        Conditioning(context=(("text_encoder_3",),), repeatable=False, attended_padding=1),
        guidance_scale=5.0,
        steps=35,
        schedule=ScheduleKind.FLOW_EVEN,
    )


def flux_2_klein(source: Source) -> Exportable:
    """FLUX.2-klein (Black Forest Labs, 2026), base and distilled: the states of three layers of Qwen3, whose prompt is
    in a chat template. The sampler's latents are squares of the VAE's. The distilled model takes 4 steps without
    guidance."""
    network = Flux2(transformer_of(source, Flux2Transformer2DModel))
    refuse_unsupported_flow(source, network, ("text_encoder_qwen3",))
    encoder = Qwen3Encoder(source.text_encoders["text_encoder_qwen3"])
    distilled = bool(source.model_index.get("is_distilled"))
    return assemble(
        source,
        network,
        {"text_encoder_qwen3": encoder},
        Conditioning(context=(("text_encoder_qwen3",),), repeatable=False),
        guidance_scale=1.0 if distilled else 4.0,
        steps=4 if distilled else 50,
        schedule=ScheduleKind.FLOW_EMPIRICAL,
        draws_posterior=False,
    )


FAMILIES: dict[str, Callable[[Source], Exportable]] = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "latent-diffusion": latent_diffusion,
    "stable-diffusion-3": stable_diffusion_3,
    "flux-1": flux,
    "chroma": chroma,
    "flux-2-klein": flux_2_klein,
}


def transformer_of(source: Source, kind: type[Any]) -> Any:
    """The network of a source. Raises UsageError if it is not of the kind that the pipeline needs."""
    if not isinstance(source.network, kind):
        raise UsageError(
            f"{source.model} has the network {type(source.network).__name__}, its pipeline needs {kind.__name__}"
        )
    return source.network


def assemble(
    source: Source,
    network: Network,
    encoders: Mapping[str, AnyEncoder],
    conditioning: Conditioning,
    *,
    guidance_scale: float,
    embedded_guidance: float | None = None,
    skipped_layers: int = 0,
    steps: int = 50,
    schedule: ScheduleKind = ScheduleKind.BETAS,
    max_patches: int | None = None,
    word_optional: Collection[str] = (),
    draws_posterior: bool = True,
) -> Exportable:
    """Builds what all families share: encoders, denoise step and VAE as graphs, and the facts about them.

    `skipped_layers` is how many of its last layers a CLIP encoder does not run, `max_patches` the largest side of a
    picture in patches of the network, `word_optional` the encoders for which a word may have no vectors.
    `draws_posterior` is the manifest's.
    """
    factor = vae_factor(source)
    refuse_widths(source, network, encoders, conditioning)
    pooled_width = sum(encoders[name].pooled_width for name in conditioning.pooled)
    scale, shift = latent_scale_and_shift(source.vae)
    height, width = (side * factor // latent_patch(source.vae) for side in sample_size(source))
    step = DenoiseStep(network)
    facts = {
        name: encoder_facts(source, name, encoder, encoder.num_layers - skipped_layers, name in word_optional)
        for name, encoder in encoders.items()
    }
    return Exportable(
        family=PIPELINES[source.pipeline],
        graphs=(
            *(encoder_graph(name, encoder) for name, encoder in encoders.items()),
            denoise_graph(step, pooled_width, len(conditioning.time_ids)),
            *vae_graphs(source),
        ),
        encoders=tuple(facts.values()),
        tables={name: encoder.table.to(TABLE_DTYPES[encoder.dtype]) for name, encoder in encoders.items()},
        conditioning=conditioning,
        columns=step.columns,
        scheduler=source.scheduler_config,
        vae=Vae(
            scale=scale if isinstance(scale, float) else None,
            shift=shift if isinstance(shift, float) else None,
            factor=factor,
            latent_channels=latent_channels(source.vae),
            draws_posterior=draws_posterior,
        ),
        defaults=Defaults(
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            embedded_guidance=embedded_guidance,
            sampler=default_sampler(source.scheduler_config, schedule).value,
        ),
        schedule=schedule,
        size_multiple=factor * network.patch,
        max_side=None if max_patches is None else max_patches * network.patch * factor,
    )


def sample_size(source: Source) -> tuple[int, int]:
    """h and w, in the VAE's latents, of a model's default pictures, as in diffusers' pipelines."""
    config, family = source.network.config, PIPELINES[source.pipeline]
    match config.get("sample_size"):
        case None:
            side = SAMPLE_SIZES.get(family, FLUX_SAMPLE_SIZE)
            return side, side
        case int(side):
            if family == "stable-diffusion" and re.match(r"0\.[0-8]\b", str(config.get("_diffusers_version"))):
                side = max(side, 64)  # these configs had 32 by mistake
            return side, side
        case [int(height), int(width)]:
            return height, width
        case value:
            raise UsageError(
                f"{source.model}: the network's config says sample_size = {value!r}: it must be a number, or two"
            )


def encoder_graph(name: str, encoder: AnyEncoder) -> Traceable:
    """The graph of a text encoder whose embedding table is an input."""
    vocab_size, width = encoder.table.shape
    table = DType.FLOAT16 if TABLE_DTYPES[encoder.dtype] is torch.float16 else DType.FLOAT32
    inputs = [TensorSpec("input_ids", DType.INT64, ("B", "T")), TensorSpec("embedding_table", table, ("V", width))]
    outputs = []
    if encoder.hidden_width is not None:
        outputs.append(TensorSpec("hidden_states", DType.FLOAT32, ("B", "T", encoder.hidden_width)))
        if encoder.weighs_tokens:
            inputs.append(TensorSpec("token_weights", DType.FLOAT32, ("B", "T")))
            outputs.append(TensorSpec("weight_scale", DType.FLOAT32, ("B",)))
    if encoder.num_layers:
        inputs.append(TensorSpec("layer", DType.INT64, ("B",)))
    if encoder.pools or encoder.masks_padding:
        inputs.append(TensorSpec("eos_index", DType.INT64, ("B",)))
    if encoder.pools:
        outputs.append(TensorSpec("pooled", DType.FLOAT32, ("B", encoder.pooled_width)))
    limits = {"V": vocab_size, "T": encoder.max_length, "layer": encoder.num_layers + 1}
    return Traceable(name, encoder, tuple(inputs), (*outputs, FINITE), limits)


def denoise_graph(step: DenoiseStep, pooled_width: int = 0, time_ids: int = 0) -> Traceable:
    """The graph of the denoise step, with the pooled vectors and SDXL's time ids if the family has them."""
    network, latents = step.network, ("B", step.network.in_channels, "h", "w")
    inputs = [
        TensorSpec("sample", DType.FLOAT32, latents),
        TensorSpec("previous", DType.FLOAT32, latents),
        TensorSpec("previous2", DType.FLOAT32, latents),
        TensorSpec("noise", DType.FLOAT32, latents),
        TensorSpec("known", DType.FLOAT32, latents),
        TensorSpec("known_noise", DType.FLOAT32, latents),
        TensorSpec("mask", DType.FLOAT32, ("B", 1, "h", "w")),
        TensorSpec("schedule", DType.FLOAT32, ("B", len(step.columns))),
        TensorSpec("branch_row", DType.INT64, ("N",)),
        TensorSpec("branch_context", DType.INT64, ("N", 2, network.num_layers)),
        TensorSpec("uncond_branch", DType.INT64, ("B",)),
        TensorSpec("cond_branch", DType.INT64, ("B",)),
        TensorSpec("context", DType.FLOAT32, ("M", "T", network.context_width)),
    ]
    if pooled_width:
        inputs.append(TensorSpec("branch_pooled", DType.INT64, ("N",)))
        inputs.append(TensorSpec("pooled", DType.FLOAT32, ("M", pooled_width)))
    if time_ids:
        inputs.append(TensorSpec("time_ids", DType.FLOAT32, ("B", time_ids)))
    if network.masks_context:
        inputs.append(TensorSpec("context_mask", DType.FLOAT32, ("M", "T")))
    outputs = (
        TensorSpec("next_sample", DType.FLOAT32, latents),
        TensorSpec("denoised", DType.FLOAT32, latents),
        FINITE,
    )
    return Traceable("denoise_step", step, tuple(inputs), outputs, {"patch": network.patch})


def vae_graphs(source: Source) -> tuple[Traceable, ...]:
    """The graphs of the VAE's decoder and encoder."""
    channels, factor = latent_channels(source.vae), vae_factor(source)
    latents = ("B", channels, "h", "w")
    encoder = Traceable(
        "vae_encoder",
        VaeEncoder(source.vae),
        (TensorSpec("images", DType.UINT8, PIXELS),),
        (TensorSpec("mean", DType.FLOAT32, latents), TensorSpec("std", DType.FLOAT32, latents), FINITE),
        {"factor": factor},
    )
    return decoder_graph("vae_decoder", VaeDecoder(source.vae), channels, factor), encoder


def decoder_graph(name: str, decoder: VaeDecoder, channels: int, factor: int) -> Traceable:
    """The graph of a decoder of latents with so many channels; a latent's side is `factor` pixels."""
    latents = TensorSpec("latents", DType.FLOAT32, ("B", channels, "h", "w"))
    images = TensorSpec("images", DType.UINT8, PIXELS)
    return Traceable(name, decoder, (latents,), (images, FINITE), {"factor": factor})


def with_preview_decoder(exportable: Exportable, tiny: AutoencoderTiny, path: Path) -> Exportable:
    """The same model with the graph `vae_preview`, the decoder of an AutoencoderTiny from `path`. It takes the
    sampler's latents, as in diffusers' pipelines. Raises UsageError if its sizes are not those of the model's VAE."""
    vae, config = exportable.vae, tiny.config
    factor = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
    for name, value, allowed in (
        ("channels of a latent", config.latent_channels, vae.latent_channels),
        ("pixels along a latent's side", factor, vae.factor),
        ("channels of a picture", config.out_channels, 3),
    ):
        if value != allowed:
            raise UsageError(
                f"--preview {path}: its {name} are {value}, the model's {allowed}: give the AutoencoderTiny that was "
                "made for this model"
            )
    graph = decoder_graph("vae_preview", VaeDecoder(tiny), vae.latent_channels, vae.factor)
    return replace(exportable, graphs=(*exportable.graphs, graph))


def latent_channels(vae: AnyVae) -> int:
    """C: channels of the denoiser's latents."""
    return int(vae.config.get("vq_embed_dim") or vae.config.latent_channels) * latent_patch(vae) ** 2


def vae_factor(source: Source) -> int:
    """Pixels along the side of one of the denoiser's latents."""
    return int(2 ** (len(source.vae.config.block_out_channels) - 1)) * latent_patch(source.vae)


FINITE = TensorSpec("finite", DType.BOOL, ("B",))
PIXELS = ("B", "H", "W", 3)


def encoder_facts(source: Source, name: str, encoder: AnyEncoder, default_layer: int, word_optional: bool) -> Encoder:
    """The manifest's entry for one encoder."""
    tokenizer = source.tokenizers[name]
    vocab_size, width = encoder.table.shape
    wordpiece = "Bert" in type(tokenizer).__name__
    bos, eos = (
        (tokenizer.cls_token_id, tokenizer.sep_token_id)
        if wordpiece
        else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"{name} has {vocab_size} rows but its tokenizer {len(tokenizer)} tokens: give a model whose files match"
        )
    if eos is None or tokenizer.pad_token_id is None:
        missing = "token for the end of a text" if eos is None else "pad_token"
        raise UsageError(f"{name}'s tokenizer has no {missing}: set it in its tokenizer_config.json")
    length = tokenizer.model_max_length
    if not isinstance(length, int | float) or not length >= 3:
        raise UsageError(
            f"{name}'s tokenizer_config.json says model_max_length = {length!r}, but it must be a number of at least 3"
        )
    prefix, suffix = chat_frame(tokenizer) if isinstance(encoder, Qwen3Encoder) else ("", "")
    return Encoder(
        graph=name,
        table=f"{name.replace('text_encoder', 'embedding_table')}.safetensors",
        tokenizer=name.replace("text_encoder", "tokenizer"),
        vocab_size=vocab_size,
        width=width,
        hidden_width=encoder.hidden_width,
        length=int(min(length, encoder.max_length)),
        bos_id=bos,
        eos_id=eos,
        pad_id=tokenizer.pad_token_id,
        layers=tuple(range(1, encoder.num_layers + 1)),
        default_layer=default_layer if encoder.num_layers else None,
        pooled_width=encoder.pooled_width if encoder.pools else None,
        masks_padding=encoder.masks_padding,
        word_optional=word_optional,
        weighs_tokens=encoder.weighs_tokens,
        prefix=prefix,
        suffix=suffix,
    )


def refuse_unsupported(source: Source, encoders: Collection[str]) -> None:
    """Raises UsageError that names the first setting of a model with a UNet and these text encoders that no graph here
    can express."""
    unet, channels = source.unet.config, latent_channels(source.vae)
    problems: list[tuple[Any, str]] = [
        (
            source.model_index.get("requires_aesthetics_score"),
            "this is SDXL's refiner (requires_aesthetics_score), which finishes another model's pictures",
        ),
        missing_encoders(source, encoders),
        (unet.in_channels != channels, f"the UNet takes {unet.in_channels} channels but the VAE has {channels}"),
        (unet.out_channels != channels, f"the UNet returns {unet.out_channels} channels but the VAE has {channels}"),
        (unet.get("time_cond_proj_dim"), "the UNet needs timestep_cond (distilled guidance)"),
        (unet.get("class_embed_type") or unet.get("num_class_embeds"), "the UNet needs class labels"),
        (unet.get("encoder_hid_dim_type"), f"the UNet needs {unet.get('encoder_hid_dim_type')} for its context"),
        (
            unet.get("addition_embed_type") not in ((None, "text_time") if len(encoders) > 1 else (None,)),
            f"the UNet needs added conditions of type {unet.get('addition_embed_type')}",
        ),
        (source.vae.config.get("norm_type") == "spatial", "the VAE's decoder also takes the codes (norm_type spatial)"),
        (unet.get("center_input_sample"), "the UNet centres its input (center_input_sample)"),
        (unet.get("attention_type", "default") != "default", f"the UNet's attention is {unet.get('attention_type')}"),
        *vae_problems(source),
    ]
    refuse_first(source.model, problems)


def refuse_unsupported_flow(source: Source, network: Network, encoders: Collection[str]) -> None:
    """As refuse_unsupported, for a transformer that is trained by flow matching and needs these text encoders."""
    channels = latent_channels(source.vae)
    out_channels = int(source.network.config.out_channels or source.network.config.in_channels)
    if source.network.config.in_channels != network.in_channels:  # packed
        out_channels //= network.patch**2
    problems: list[tuple[Any, str]] = [
        missing_encoders(source, encoders),
        (network.in_channels != channels, f"the network takes {network.in_channels} channels, the VAE has {channels}"),
        (out_channels != channels, f"the network returns {out_channels} channels but the VAE has {channels}"),
        *vae_problems(source),
    ]
    refuse_first(source.model, problems)


def missing_encoders(source: Source, encoders: Collection[str]) -> tuple[Any, str]:
    """The problem that not all of these text encoders are among a source's."""
    missing = [name for name in encoders if name not in source.text_encoders]
    return missing, f"its text encoders are {', '.join(source.text_encoders)}, without {', '.join(missing)}"


def refuse_widths(source: Source, network: Network, encoders: Mapping[str, AnyEncoder], facts: Conditioning) -> None:
    """Raises UsageError if the text encoders' outputs are not as wide as the network's inputs."""
    config, input_width = source.network.config, network.context_width
    width = max(sum(encoders[name].hidden_width or 0 for name in block) for block in facts.context)
    is_padded = facts.width is not None
    pooled_width = sum(encoders[name].pooled_width for name in facts.pooled)
    pooled_input_width = config.get("pooled_projection_dim") or 0
    if config.get("addition_embed_type") == "text_time":
        time_width = len(facts.time_ids) * config.addition_time_embed_dim
        pooled_input_width = config.projection_class_embeddings_input_dim - time_width
    problems = [
        (
            width > input_width or (width < input_width and not is_padded),
            f"its text encoders' states have width {width}, its network takes {input_width}",
        ),
        (
            pooled_width != pooled_input_width,
            f"its text encoders' pooled states have width {pooled_width}, its network takes {pooled_input_width}",
        ),
    ]
    refuse_first(source.model, problems)


def vae_problems(source: Source) -> list[tuple[Any, str]]:
    """The settings of a VAE that the source's pipeline does not read in diffusers."""
    config = source.vae.config
    has_statistics = config.get("latents_mean") is not None or config.get("latents_std") is not None
    is_sdxl = source.pipeline.startswith("StableDiffusionXL")
    return [
        (has_statistics and not is_sdxl, "its VAE has statistics of channels (latents_mean), which only SDXL's uses"),
        (has_statistics and config.get("shift_factor"), "its VAE has a shift_factor and statistics of channels"),
    ]
