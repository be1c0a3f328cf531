"""What a profiler's trace says of a GPU: the share of the time in which it works, and its gaps between two kernels."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the events of a GPU in a trace of PyTorch's profiler."""


def gpu_use(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of a trace's events (`ts` and `dur` in microseconds): the share of the time between the first and the last in
    which the GPU works, and its gaps in microseconds. Empty if the GPU did nothing."""
    spans = sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ON_THE_GPU
    )
    if not spans:
        return {}
    begin, end = spans[0]
    gaps = []
    for start, stop in spans[1:]:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    return {
        "kernels": len(spans),
        "share busy": round(1 - sum(gaps) / (end - begin), 4),
        "median gap, us": round(statistics.median(gaps), 2) if gaps else 0,
        "longest gap, us": round(max(gaps, default=0), 2),
    }


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a file that PyTorch's profiler wrote."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events
