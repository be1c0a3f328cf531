"""The arithmetic of a graph is counted as by hand, and as PyTorch counts it."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper

from benchmarks.roof import Work, floors, step_of, step_shapes, work_of

pytest.importorskip("openvino")


def save(path: Path, nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str]) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "graph", values, results)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_convolution_and_a_product_are_counted_as_by_hand(tmp_path: Path) -> None:
    """The convolution makes 2 x 8 x 5 x 5 numbers of 4 x 3 x 3 terms, the product 3 batches of 7 x 6 of 5 terms."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("MatMul", ["a", "b"], ["c"]),
    ]
    inputs = {"x": ["B", 4, "h", 10], "w": [8, 4, 3, 3], "a": ["M", 7, 5], "b": ["M", 5, 6]}
    graph = save(tmp_path / "g.onnx", nodes, inputs, ["y", "c"])

    work = work_of(graph, {"x": [2, 4, 10, 10], "w": [8, 4, 3, 3], "a": [3, 7, 5], "b": [3, 5, 6]})

    assert work.flops == 2 * (2 * 8 * 5 * 5) * (4 * 3 * 3) + 2 * (3 * 7 * 6) * 5
    assert work.numbers == (2 * 4 * 100 + 8 * 4 * 9 + 2 * 8 * 25) + 3 * (7 * 5 + 5 * 6 + 7 * 6)


def test_grouped_channels_see_their_own_group_only(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], group=2)]
    graph = save(tmp_path / "g.onnx", nodes, {"x": [1, 4, 6, 6], "w": [8, 2, 3, 3]}, ["y"])

    assert work_of(graph, {"x": [1, 4, 6, 6]}).flops == 2 * (8 * 4 * 4) * (2 * 3 * 3)


def test_a_guided_step_has_the_arithmetic_of_two_branches_as_pytorch_counts_it(
    tiny_bundle: Path, tiny_model_dir: Path
) -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from oneword.runtime.bundle import Bundle

    manifest = Bundle.open(tiny_bundle).manifest
    unet = UNet2DConditionModel.from_pretrained(tiny_model_dir / "unet")
    side, length = 64 // manifest.vae.factor, manifest.encoders[0].length
    sample = torch.zeros(2, unet.config.in_channels, side, side)
    context = torch.zeros(2, length, unet.config.cross_attention_dim)
    # The counter knows the products that attention is made of, but not the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(sample, 1, context)

    counted = step_of(tiny_bundle, 64).flops

    # Guidance of the zero-star kind takes two more products, of all latents.
    assert counter.get_total_flops() <= counted <= 1.001 * counter.get_total_flops()


def unet_flops(channels: list[int], layers: int, attention: list[bool], width: int, side: int, tokens: int) -> int:
    """The products of one branch of Stable Diffusion's UNet, from its description: two operations for each weight at
    each position, and four for each pair of positions and channel in attention."""
    total, embedded = 0, 4 * channels[0]

    def conv(c_in: int, c_out: int, side: int, kernel: int = 3) -> None:
        nonlocal total
        total += 2 * c_in * c_out * kernel**2 * side**2

    def linear(c_in: int, c_out: int, positions: int = 1) -> None:
        nonlocal total
        total += 2 * c_in * c_out * positions

    def residual(c_in: int, c_out: int, side: int) -> None:
        conv(c_in, c_out, side)
        conv(c_out, c_out, side)
        linear(embedded, c_out)
        if c_in != c_out:
            conv(c_in, c_out, side, kernel=1)

    def transformer(c: int, side: int) -> None:
        nonlocal total
        n = side**2
        for c_in, c_out in ((c, c), *[(c, c)] * 4, *[(c, c)] * 2, (c, 8 * c), (4 * c, c), (c, c)):
            linear(c_in, c_out, n)  # in; q, k, v, out of self-attention; q, out of cross-attention; GEGLU; out
        for _ in range(2):
            linear(width, c, tokens)  # k and v of cross-attention
        total += 4 * n * n * c + 4 * n * tokens * c

    linear(channels[0], embedded)
    linear(embedded, embedded)
    conv(4, channels[0], side)
    skips, c = [channels[0]], channels[0]
    for level, c_out in enumerate(channels):
        for _ in range(layers):
            residual(c, c_out, side)
            c = c_out
            if attention[level]:
                transformer(c, side)
            skips.append(c)
        if level < len(channels) - 1:
            side //= 2
            conv(c, c, side)
            skips.append(c)
    residual(c, c, side)
    transformer(c, side)
    residual(c, c, side)
    for level, c_out in reversed([*enumerate(channels)]):
        for _ in range(layers + 1):
            residual(c + skips.pop(), c_out, side)
            c = c_out
            if attention[level]:
                transformer(c, side)
        if level:
            side *= 2
            conv(c, c, side)
    conv(c, 4, side)
    return total


def test_a_guided_step_is_counted_as_the_architecture_is_by_hand(tiny_bundle: Path) -> None:
    """The same calculation gives SD 1.5's step at 512x512 the 1.607 TFLOP that docs/results/latency.md quotes."""
    by_hand = 2 * unet_flops([16, 32], 1, [True, False], width=32, side=8, tokens=20)

    assert by_hand <= step_of(tiny_bundle, 64).flops <= 1.001 * by_hand
    full_size = unet_flops([320, 640, 1280, 1280], 2, [True, True, True, False], width=768, side=64, tokens=77)
    assert 2 * full_size == pytest.approx(1.607e12, rel=1e-3)


@pytest.mark.parametrize(("context", "zeros"), [((("l", "g"), ("t5",)), 0), ((("l", "g"),), 256)])
def test_the_context_of_stable_diffusion_3_has_the_tokens_of_clip_and_of_t5(
    tiny_bundle: Path, context: tuple[tuple[str, ...], ...], zeros: int
) -> None:
    """diffusers concatenates 77 tokens of both CLIPs and 256 of T5, or as many zeros without T5."""
    from oneword.runtime.bundle import Bundle

    manifest = Bundle.open(tiny_bundle).manifest
    lengths = {"l": 77, "g": 77, "t5": 256}
    encoders = [replace(manifest.encoders[0], graph=name, length=length) for name, length in lengths.items()]
    conditioning = replace(manifest.conditioning, context=context, zero_tokens=zeros)
    shapes = step_shapes(replace(manifest, encoders=tuple(encoders), conditioning=conditioning), 64)

    [axes] = [spec.axes for spec in manifest.graphs["denoise_step"].inputs if spec.name == "context"]
    assert shapes["context"][axes.index("T")] == 77 + 256


def test_the_arithmetic_takes_at_least_its_time_at_the_peak_of_its_number_format() -> None:
    work = Work(flops=100, numbers=10)

    assert floors(work, {"bf16": 50.0, "f32": 25.0, "memory": 5.0}) == {"bf16": 2.0, "f32": 4.0}
    assert floors(work, {"f32": 10.0, "memory": 5.0}) == {"f32": 10.0}
