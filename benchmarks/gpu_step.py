"""A guided denoise step of full size on an NVIDIA GPU: this project's engines beside PyTorch, with the same weights.

    torch              the step's own module, fp16, channels last
    torch-compile      the same with torch.compile(mode="max-autotune")
    diffusers-tuned    diffusers' own UNet with the settings of stable-fast: fp16, channels last, fused projections of
                       queries, keys and values, and stable-fast's compiler if `sfast` can be imported, otherwise
                       torch.compile(mode="reduce-overhead"), which also captures CUDA graphs
    onnxruntime-cuda, tensorrt, tensorrt-rtx
                       the exported step, fp16; TensorRT's plans are built for this batch and size alone. Where the
                       engine allows it, the step is also captured as a CUDA graph and replayed

Random weights (benchmarks.architectures), guided pictures of the model's own size. Each contender has its own process.
Compilers take minutes for each batch, so `torch-compile` and `diffusers-tuned` run at batch 1 only. Part of
`benchmarks.gpu`; not covered: encoding, decoding, and what a scheduler adds.
"""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.architectures import CONFIGS, SHAPE, bundle_of_one, full_size
from benchmarks.pages import marked, table
from oneword.runtime.samplers import COLUMNS

SHARES = {
    "torch": 1,
    "onnxruntime-cuda": 2,
    "tensorrt": 3,
    "tensorrt-rtx": 1,
    "diffusers-tuned": 2,
    "torch-compile": 3,
}
"""The contenders and their shares of the time that is left, in this order: torch.compile, which takes longest, gets
what the others leave. TensorRT first builds a plan."""
COMPILED = ("diffusers-tuned", "torch-compile")
WEIGHTS = "weights.safetensors"
"""The random weights of a model, in its folder."""
TFLOP = {"sd15": 1.607, "sdxl": 13.5}  # per guided step of one picture of the model's own size
TOKENS = SHAPE["T"]
STEPS = 50
"""Steps in a loop of one picture; in larger batches so many in all pictures together."""
GOALS = {("sd15", 1): 6.0}
"""The most milliseconds that a step should take in the CUDA provider on an H100, H200 or B200, by model and batch."""
GOAL_CARDS = ("H100", "H200", "B200")


def export(model: str, work: Path) -> dict[str, Any]:
    """Exports the step in fp16 and stores its weights, for the contenders of this model."""
    folder = work / model
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    bundle = bundle_of_one(model, "fp16", folder, folder / WEIGHTS)
    size = sum((folder / name).stat().st_size for name in bundle.graph("denoise_step").all_files)
    return {"export, s": round(time.perf_counter() - start, 1), "on disk, MiB": size >> 20}


def contend(
    model: str, batch: int, work: Path, seconds: float, simulated: bool, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Every contender's measurements, or why it has none, within this time; contenders that have some in `before` are
    not run again, unless the reference was missing. Raises SystemExit if none has any."""
    end = time.monotonic() + seconds
    results: dict[str, Any] = {
        name: before.get(name, {"error": "not run"}) for name in SHARES if batch == 1 or name not in COMPILED
    }
    unchecked = [name for name, result in results.items() if "difference" not in result]
    due = unchecked if "error" in results["torch"] else [name for name in unchecked if "error" in results[name]]
    for number, name in enumerate(due):
        share = SHARES[name] / sum(SHARES[later] for later in due[number:])
        limit = max(1.0, (end - time.monotonic()) * share)
        command = [sys.executable, "-m", "benchmarks.gpu_step", name, model, batch, work, *(["sim"] * simulated)]
        result = finished([str(word) for word in command], limit)
        if "error" not in result or "error" in results[name]:
            results[name] = result
    if all("error" in result for result in results.values()):
        raise SystemExit("; ".join(f"{name}: {result['error']}" for name, result in results.items()))
    return results


def finished(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """The JSON that a process prints last, or its last line of error; it and its children end after this time."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"stopped after {seconds:.0f} s"}
    if process.returncode:
        lines = errors.strip().splitlines() or [f"it ended without a message, status {process.returncode}"]
        return {"error": lines[-1][:300]}
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(contender: str, model: str, batch: int, work: Path, simulated: bool) -> dict[str, Any]:
    """Runs in a contender's own process. PyTorch runs first and saves the reference for the others."""
    folder, feeds = work / model, feeds_of(model, batch)
    folder.mkdir(parents=True, exist_ok=True)
    steps = 1 if simulated else STEPS // batch
    prepare = _torch if contender.startswith(("torch", "diffusers")) else _ours
    first_step, loop, captured, device_memory = prepare(contender, model, folder, feeds, steps)
    reference = folder / f"reference-{batch}.npy"
    if contender == "torch":
        np.save(reference, first_step)
    result: dict[str, Any] = {"step_ms": 1e3 * _seconds(loop) / steps, "gpu_mib": device_memory() / 2**20}
    if captured is not None:
        result["captured_ms"] = 1e3 * _seconds(captured) / steps
    if contender == "diffusers-tuned":
        result["compiler"] = "stable-fast" if importlib.util.find_spec("sfast") else "torch.compile"
    if reference.exists():
        expected = np.load(reference)
        result["difference"] = float(np.abs(first_step - expected).max() / np.abs(expected).max())
    return result


def _torch(contender: str, model: str, folder: Path, feeds: dict[str, Any], steps: int) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} finds no GPU")
    from oneword.export.eager import to_torch  # takes seconds: imports diffusers

    graph = full_size(model, "fp16", folder / WEIGHTS)
    module = tuned_step(graph.module.network.unet) if contender == "diffusers-tuned" else graph.module
    module = module.to("cuda", memory_format=torch.channels_last)
    if contender == "torch-compile":
        module = torch.compile(module, mode="max-autotune")
    tensors = {name: value.cuda() for name, value in to_torch(graph.inputs, feeds).items()}
    if contender == "diffusers-tuned":
        module.network.unet = compiled(module.network.unet)

    def loop(count: int = steps) -> Any:
        sample = stepped(module, tensors, count)
        torch.cuda.synchronize()
        return sample

    free_and_total = torch.cuda.mem_get_info
    return loop(1).cpu().numpy(), loop, None, lambda: free_and_total()[1] - free_and_total()[0]


def stepped(module: Any, tensors: Mapping[str, Any], count: int) -> Any:
    """The sample after so many steps. Each gets copies of the outputs of the last one: a compiled module may return
    memory of a CUDA graph, which the next call overwrites."""
    import torch

    inputs = dict(tensors)
    with torch.no_grad():
        for _ in range(count):
            sample, denoised, _ = module(**inputs)
            inputs["sample"], inputs["previous"] = sample.clone(), denoised.clone()
    return inputs["sample"]


def tuned_step(unet: Any) -> Any:
    """The denoise step around diffusers' own UNet, whose projections it fuses: any other step around the same UNet no
    longer works. Each branch has a context of its own, as in diffusers: `branch_context` is not read."""
    import torch

    from oneword.export.modules import DenoiseStep

    class Network(torch.nn.Module):
        embeds_guidance = masks_context = False

        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet, self.dtype = unet, unet.dtype

        def forward(self, sample: Any, t: Any, context: Any, pooled: Any, time_ids: Any, _branch_context: Any) -> Any:
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
            return self.unet(sample, t, context, added_cond_kwargs=added, return_dict=False)[0]

    unet.fuse_qkv_projections()
    network: Any = Network(unet)
    return DenoiseStep(network)


def compiled(unet: Any) -> Any:
    """diffusers' UNet on the GPU, compiled by stable-fast if it is installed."""
    import torch

    if not importlib.util.find_spec("sfast"):
        return torch.compile(unet, mode="reduce-overhead")
    from sfast.compilers import diffusion_pipeline_compiler as sfast  # its documented settings

    config = sfast.CompilationConfig.Default()
    config.enable_xformers = bool(importlib.util.find_spec("xformers"))
    config.enable_triton = bool(importlib.util.find_spec("triton"))
    config.enable_cuda_graph = True
    return sfast.compile_unet(unet, config)


def _ours(contender: str, model: str, folder: Path, feeds: dict[str, Any], steps: int) -> Any:
    from oneword.engines.open import Backend, EngineOptions, gpu_stream, open_engine

    stream = gpu_stream()  # before the long work, since there may be no GPU
    bundle = bundle_of_one(model, "fp16", folder, folder / WEIGHTS)
    graph = bundle.graph("denoise_step")
    ranges = {
        axis: (size, size, size)
        for spec in graph.inputs
        for axis, size in zip(spec.axes, feeds[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }
    # Plans of one batch each: with another's in the same folder, no plan would be built for this one.
    plans = folder / f"plans-{len(feeds['sample'])}"
    options = EngineOptions(plans=plans, ranges=[ranges])
    engine = open_engine(Backend(contender), "denoise_step", graph, folder, options)
    binding = engine.bind({name: value.shape for name, value in feeds.items()})

    def start() -> None:
        for name, value in feeds.items():
            binding.inputs[name].write(..., value)

    def step() -> None:
        stream.run(binding)
        stream.copy(binding.inputs["previous2"], binding.inputs["previous"])
        stream.copy(binding.inputs["previous"], binding.outputs["denoised"])
        stream.copy(binding.inputs["sample"], binding.outputs["next_sample"])

    def loop(queue_step: Callable[[], None]) -> None:
        start()
        for _ in range(steps):
            queue_step()
        stream.wait()

    start()
    step()
    first = binding.inputs["sample"].numpy()
    if not binding.capturable:
        return first, lambda: loop(step), None, stream.memory_in_use
    loop(step)
    replay = stream.capture(step)
    return first, lambda: loop(step), lambda: loop(replay), stream.memory_in_use


def feeds_of(model: str, batch: int) -> dict[str, Any]:
    """Guided pictures of the model's own size, at a step that keeps the state near unit variance."""
    config = CONFIGS[model]
    side, random = int(config["sample_size"]), np.random.default_rng(0)
    latents, branches = (batch, 4, side, side), np.arange(2 * batch)
    zeros = {name: np.zeros(latents, np.float32) for name in ("previous", "previous2", "noise", "known", "known_noise")}
    values = {
        "t": 500,
        "sample_to_denoised": 1,
        "model_to_denoised": -0.1,
        "sample": 0.9,
        "denoised": 0.1,
        "guidance": 5,
    }
    schedule = np.array([[values.get(name, 0) for name in COLUMNS if name != "embedded_guidance"]], np.float32)
    feeds = {
        "sample": random.standard_normal(latents, np.float32),
        **zeros,
        "mask": np.ones((batch, 1, side, side), np.float32),
        "schedule": np.repeat(schedule, batch, axis=0),
        "branch_row": branches // 2,
        "branch_context": np.tile(branches[:, None, None], (1, 2, _layers(config))),
        "uncond_branch": branches[::2].copy(),
        "cond_branch": branches[1::2].copy(),
        "context": random.standard_normal((2 * batch, TOKENS, config["cross_attention_dim"]), np.float32),
    }
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        feeds["branch_pooled"] = branches
        feeds["pooled"] = random.standard_normal((2 * batch, pooled), np.float32)
        feeds["time_ids"] = np.tile(np.array([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], np.float32), (batch, 1))
    return feeds


def _layers(config: dict[str, Any]) -> int:
    """L, the transformers of a UNet: `count` per down block, one more per up block, and one in the middle."""
    down = config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3)
    up = config.get("up_block_types", ("CrossAttnUpBlock2D",) * 3)
    count = int(config.get("layers_per_block", 2))
    return sum(count for name in down if "Cross" in name) + 1 + sum(count + 1 for name in up if "Cross" in name)


def _seconds(work: Callable[[], object]) -> float:
    """The median of five runs, after two to warm up."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def latency_table(model: str, batch: int, results: Mapping[str, Mapping[str, Any]], device: str) -> str:
    """One model at one batch, in Markdown; a step that misses its goal on such a card is bold."""
    goal = GOALS.get((model, batch)) if any(card in device for card in GOAL_CARDS) else None
    rows = []
    for name, r in results.items():
        if "error" in r:
            rows.append([name, r["error"], *[""] * 5])
            continue
        best = min(r["step_ms"], r.get("captured_ms", r["step_ms"]))
        met = goal is None or name != "onnxruntime-cuda" or best <= goal
        rows.append(
            [
                name,
                marked(f"{r['step_ms']:.2f}", met),
                f"{r['captured_ms']:.2f}" if "captured_ms" in r else "",
                f"{STEPS * best / 1e3:.2f}",
                f"{1e3 * batch * TFLOP[model] / best:.0f}" if model in TFLOP else "",
                f"{r['difference']:.1e}" if "difference" in r else "",
                f"{r['gpu_mib']:.0f}",
            ]
        )
    head = [
        f"{model}, batch {batch}",
        "ms per step",
        "captured",
        f"{STEPS} steps, s",
        "TFLOP/s",
        "difference",
        "GPU MiB",
    ]
    return table(head, rows)


def main() -> None:
    """Measures one contender; prints one line of JSON, or one line that says why it cannot run."""
    from oneword.engines.errors import OnewordError

    contender, model, batch, work, *simulated = sys.argv[1:]
    if simulated:
        from benchmarks.simulated import simulate_cuda

        simulate_cuda()
    try:
        print(json.dumps(measure(contender, model, int(batch), Path(work), bool(simulated))))
    except OnewordError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
