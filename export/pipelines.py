"""Which of diffusers' pipelines are supported, and what their schedulers' configs may say. Nothing is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oneword.engines.errors import UsageError
from oneword.runtime.flow import FlowSchedule
from oneword.runtime.schedule import NoiseSchedule, ScheduleKind

PIPELINES = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionImg2ImgPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusionXLImg2ImgPipeline": "stable-diffusion-xl",
    "LDMTextToImagePipeline": "latent-diffusion",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "StableDiffusion3Img2ImgPipeline": "stable-diffusion-3",
    "FluxPipeline": "flux-1",
    "FluxImg2ImgPipeline": "flux-1",
    "ChromaPipeline": "chroma",
    "ChromaImg2ImgPipeline": "chroma",
    "Flux2KleinPipeline": "flux-2-klein",
    "Flux2KleinInpaintPipeline": "flux-2-klein",
}
"""The family of each supported pipeline."""
FLOW_FAMILIES = ("stable-diffusion-3", "flux-1", "chroma", "flux-2-klein")
"""The families of transformers, which are trained by flow matching; the rest have a UNet and a schedule of betas."""
OMISSIBLE = {"StableDiffusion3Pipeline": "text_encoder_3", "StableDiffusion3Img2ImgPipeline": "text_encoder_3"}
"""The text encoder that a pipeline runs without, by the pipeline's name."""
UNSUPPORTED = {
    "Flux2Pipeline": "Mistral as its text encoder",
    "Flux2KleinKVPipeline": "a network that keeps the keys and values of reference pictures",
    "ZImagePipeline": "prompts without padding",
    "QwenImagePipeline": "Qwen2.5-VL as its text encoder, and a mask of the prompt",
    "QwenImage21Pipeline": "Qwen3-VL as its text encoder",
    "PixArtAlphaPipeline": "a mask of the prompt in cross-attention",
    "PixArtSigmaPipeline": "a mask of the prompt in cross-attention",
    "SanaPipeline": "Gemma2 as its text encoder, and a mask of the prompt",
    "SanaSprintPipeline": "Gemma2 as its text encoder, and a mask of the prompt",
    "Lumina2Pipeline": "Gemma2 as its text encoder, and a mask of the prompt",
    "HiDreamImagePipeline": "Llama as one of its text encoders",
    "Krea2Pipeline": "Qwen3-VL as its text encoder",
    "Ideogram4Pipeline": "Qwen3-VL as its text encoder, and a second network without a prompt",
    "ErnieImagePipeline": "Mistral as its text encoder",
    "ZImageOmniPipeline": "prompts without padding",
    "QwenImageEditPipeline": "Qwen2.5-VL as its text encoder, which also reads pictures",
    "QwenImageEditPlusPipeline": "Qwen2.5-VL as its text encoder, which also reads pictures",
    "LuminaPipeline": "Gemma as its text encoder, and a mask of the prompt",
    "HunyuanVideoPipeline": "Llama as one of its text encoders, and latents of several frames",
    "StableCascadeCombinedPipeline": "two networks in turn",
    "StableCascadePriorPipeline": "a second network, which decodes its latents",
    "StableCascadeDecoderPipeline": "a prior before its network",
    "WuerstchenCombinedPipeline": "two networks in turn",
    "WuerstchenPriorPipeline": "a second network, which decodes its latents",
    "WuerstchenDecoderPipeline": "a prior before its network",
    "KandinskyV22CombinedPipeline": "a prior before its network",
    "KandinskyV22PriorPipeline": "a second network, which draws from its embeddings",
    "KandinskyV22Pipeline": "a prior before its network",
    "FluxFillPipeline": "a masked picture as more channels of its input",
    "FluxKontextPipeline": "a reference picture as more tokens of its network",
    "FluxKontextInpaintPipeline": "a reference picture as more tokens of its network",
    "FluxPriorReduxPipeline": "an encoder of pictures",
    **dict.fromkeys(
        ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"),
        "a control picture as more channels of its input",
    ),
    **dict.fromkeys(
        (
            *("FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"),
            *("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline"),
        ),
        "a ControlNet beside its network",
    ),
}
"""Pipelines that are refused, with the first thing that is missing in `oneword.export.families`."""


def checked_pipeline(model: str, index: Mapping[str, Any]) -> str:
    """The name of the pipeline in a model's model_index.json. Raises UsageError if it is not supported."""
    pipeline = str(index.get("_class_name", ""))
    if pipeline in UNSUPPORTED:
        raise UsageError(
            f"{model} is a {pipeline}, which needs {UNSUPPORTED[pipeline]}: give a model of a supported family"
        )
    if pipeline not in PIPELINES:
        raise UsageError(f"{model} is a {pipeline or 'model without pipeline'}: give a model of {', '.join(PIPELINES)}")
    return pipeline


def components_left_out(pipeline: str, without: Sequence[str]) -> set[str]:
    """The components of the text encoders to leave out. Raises UsageError for one that the pipeline needs."""
    for name in without:
        if name != OMISSIBLE.get(pipeline):
            needs = "it needs all its encoders"
            if pipeline in OMISSIBLE:
                needs = f"whose only optional encoder is {OMISSIBLE[pipeline]}"
            raise UsageError(f"--without {name}: the model is a {pipeline}, {needs}")
    return {*without, *map(tokenizer_name, without)}


def tokenizer_name(encoder: str) -> str:
    """The folder of a text encoder's tokenizer, by the encoder's folder."""
    return encoder.replace("text_encoder", "tokenizer").replace("bert", "tokenizer")


def refuse_scheduler(model: str, pipeline: str, config: Mapping[str, Any]) -> None:
    """Raises UsageError that names the first setting of a scheduler's config that no schedule here can express."""
    name = config.get("_class_name")
    if PIPELINES[pipeline] in FLOW_FAMILIES:
        flow = name == "FlowMatchEulerDiscreteScheduler" or config.get("use_flow_sigmas")
        refuse_first(model, [(not flow, f"the scheduler is {name}, which is not one of flow matching")])
        FlowSchedule.read(config, ScheduleKind.FLOW, image_tokens=0)
        return
    prediction = config.get("prediction_type", "epsilon")
    problems = [
        (config.get("thresholding"), "the scheduler uses dynamic thresholding, which depends on every pixel"),
        (config.get("clip_sample"), "the scheduler clips samples (clip_sample)"),
        ("beta_schedule" not in config, f"the scheduler is {name}, which has no beta_schedule"),
        (prediction not in ("epsilon", "v_prediction", "sample"), f"the scheduler predicts {prediction}"),
    ]
    refuse_first(model, problems)
    NoiseSchedule.read(config, "leading")


def refuse_first(model: str, problems: Iterable[tuple[Any, str]]) -> None:
    """Raises UsageError for the first problem that applies."""
    for applies, problem in problems:
        if applies:
            raise UsageError(f"{model} is not supported: {problem}; give a plain text-to-image model")
