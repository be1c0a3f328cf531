"""How benchmarks compile a graph in OpenVINO for the CPU: as this project's engine does, without its plans."""

import importlib.util
from typing import Any


def precision_of(core: Any) -> str:
    """`bf16` if the processor has it, otherwise `f32`."""
    return "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def settings(precision: str, threads: int) -> dict[str, str]:
    """Properties of a compiled graph."""
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(threads),
        "ENABLE_CPU_PINNING": "NO",
    }


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 here; False if it is not installed."""
    if not importlib.util.find_spec("openvino"):
        return False
    import openvino

    return precision_of(openvino.Core()) == "bf16"
