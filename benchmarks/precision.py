"""The cost of a number format in pictures: PSNR against fp32 for the same prompts and seeds.

    python -m benchmarks.precision [--model miniature|DIR] [--steps N] [--pictures N] [--write]

    pytorch fp16, bf16       the graphs' own torch modules, weights and arithmetic in that format
    onnxruntime fp32, fp16   the bundle in that precision, on the CPU
    openvino                 the fp32 bundle, computed in bf16 if the processor has it
    onnxruntime, openvino int8    the bundle with int8 weights

The reference is the torch modules in fp32. One bad picture barely changes the median, so the worst is listed too.
`--write` puts the table into docs/results/precision.md. Not covered: time (on a CPU fp16 is emulated), and GPUs. Ends
in one line of JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import RESULTS, empty_page, model_name, provenance, table, write_section
from benchmarks.psnr import psnr
from oneword.engines.errors import OnewordError
from oneword.engines.graph import Precision, Weights
from oneword.engines.open import Backend
from oneword.export.eager import eager_model
from oneword.export.families import TORCH_DTYPES
from oneword.export.source import load_source
from oneword.export.write import export_bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request

PAGE = RESULTS / "precision.md"
NEW_PAGE = empty_page("Precision", "The cost of fp16, bf16 and int8 weights in the miniature's pictures.", "precision")
PROMPTS = (
    "a photo of a red star",
    "a painting of a blue ring and a green star",
    "a drawing of a yellow moon in the snow",
    "an icon of a purple square at night",
)


def main() -> None:
    """Draws the pictures in every format; prints a table and one line of JSON."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Callable[[], Model]] = {
            "pytorch fp32": lambda: _eager(options.model, Precision.FP32),
            "pytorch fp16": lambda: _eager(options.model, Precision.FP16),
            "pytorch bf16": lambda: _eager(options.model, Precision.BF16),
            "onnxruntime fp32": lambda: _bundle(options.model, Path(folder), Precision.FP32),
            "onnxruntime fp16": lambda: _bundle(options.model, Path(folder), Precision.FP16),
            "openvino": lambda: Model.open(Path(folder) / "fp32", Backend.OPENVINO),
            "onnxruntime int8": lambda: _bundle(options.model, Path(folder), Precision.FP32, Weights.INT8),
            "openvino int8": lambda: Model.open(Path(folder) / "int8", Backend.OPENVINO),
        }
        results: dict[str, dict[str, Any]] = {}
        expected: Sequence[Image] = ()
        for name, make in models.items():
            start = time.perf_counter()
            try:
                pictures = _draw(make(), options)
            except OnewordError as error:  # an unsupported format is listed with its error
                results[name] = {"error": str(error)}
                continue
            expected = expected or pictures
            decibels = [psnr(a, b) for a, b in zip(pictures, expected, strict=True)]
            results[name] = {
                "median_db": float(np.median(decibels)),
                "worst_db": float(min(decibels)),
                "seconds": time.perf_counter() - start,
            }
            print(f"{name:18} {results[name]}", flush=True)
    rows = [
        [name, "-", r["error"]] if "error" in r else [name, _shown(r["median_db"]), _shown(r["worst_db"])]
        for name, r in results.items()
    ]
    text = table(["computed by", "median PSNR against fp32, dB", "worst picture, dB"], rows)
    count = options.pictures * len(PROMPTS)
    text += (
        f"\n\n{count} pictures of {model_name(options.model)}, {options.steps} DDIM steps, guidance 5, the same seeds."
    )
    print(text)
    if options.write:
        write_section(PAGE, "precision", f"{provenance('precision')}\n\n{text}", NEW_PAGE)
    print(json.dumps({"model": options.model, "steps": options.steps, "pictures": count, "results": results}))


def _eager(model: str, precision: Precision) -> Model:
    return eager_model(load_source(model, TORCH_DTYPES[precision]))


def _bundle(model: str, folder: Path, precision: Precision, weights: Weights = Weights.FLOAT) -> Model:
    path = folder / (precision.value if weights is Weights.FLOAT else weights.value)
    export_bundle(model, path, precision=precision, weights=weights)
    return Model.open(path, "onnxruntime")


def _draw(model: Model, options: argparse.Namespace) -> list[Image]:
    """All pictures of all prompts, in order. Raises the first failure."""
    requests = [
        Request(prompt, seed=100 * i, num_images=options.pictures, steps=options.steps, guidance_scale=5.0)
        for i, prompt in enumerate(PROMPTS)
    ]
    return [picture.image for picture in draw(model, *requests)]


def _shown(decibels: float) -> str:
    return "identical" if decibels == float("inf") else f"{decibels:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pictures", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--write", action="store_true", help="write docs/results/precision.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
