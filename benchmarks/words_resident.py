"""What 100,000 resident words cost: python -m benchmarks.words_resident

encode      a prompt through tokenizer and text encoder, with 1 word resident and with `--words`, call about, the
            lower decile of each (others' work on the machine only adds); the bar is 2 % on top
load        one vector into a table of CLIP's size (49,408 x 768) with room for `--words` more; the bar is 1 ms
fill        all words, one after another, through the gate that every word passes

For each engine of the CPU. The words are random: what they mean costs nothing. Ends in one line of JSON.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from oneword.engines.open import Backend
from oneword.export.write import export_bundle
from oneword.runtime.concept import Concept
from oneword.runtime.model import Model
from oneword.runtime.table import EmbeddingTable

PROMPT = "a photo of a <w0> in the snow"


def main() -> None:
    """Measures every engine that is installed, prints, ends in JSON."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or export_bundle(options.model, Path(folder) / "bundle").bundle.path
        load_ms = load_one(options.words)
        print(f"load one vector into 49,408 x 768: {load_ms:.4f} ms, bar 1")
        report: dict[str, object] = {"words": options.words, "load_ms": round(load_ms, 5)}
        for backend in (Backend.ONNXRUNTIME, Backend.OPENVINO):
            if importlib.util.find_spec(backend.value) is None:
                continue
            few, fill_few = opened(bundle, backend, 1)
            many, fill = opened(bundle, backend, options.words)
            one_ms, all_ms, share = encode(few, many, options.rounds)
            print(
                f"{backend.value:12} encode {one_ms:.3f} ms with 1 word, {all_ms:.3f} ms with {options.words}:", end=""
            )
            print(f" {share:+.2%} on top, bar +2%; filled in {fill:.1f} s")
            report[backend.value] = {"one_ms": one_ms, "all_ms": all_ms, "on_top": share, "fill_s": fill - fill_few}
    print(json.dumps(report))


def opened(bundle: Path, backend: Backend, words: int) -> tuple[Model, float]:
    """A model with so many words, and the seconds that loading them took."""
    model = Model.open(bundle, backend, capacity=words)
    encoders = model.manifest.encoders
    vectors = np.random.default_rng(0).normal(0, 0.03, (words, max(encoder.width for encoder in encoders)))
    start = time.perf_counter()
    for i, vector in enumerate(vectors.astype(np.float32)):
        model.load(Concept(f"<w{i}>", {encoder.graph: vector[None, : encoder.width] for encoder in encoders}))
    return model, time.perf_counter() - start


def encode(few: Model, many: Model, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a prompt in one model and in the other, and the share that the other takes on top."""
    pairs = []
    for turn in range(rounds + 10):
        first, second = (few, many) if turn % 2 else (many, few)
        times = {id(model): _timed(model) for model in (first, second)}
        pairs.append((times[id(few)], times[id(many)]))
    pairs = pairs[10:]  # the first ones warm up
    one, all_ = (1e3 * statistics.quantiles(each, n=10)[0] for each in zip(*pairs, strict=True))
    return round(one, 4), round(all_, 4), round(all_ / one - 1, 4)


def load_one(words: int) -> float:
    """Milliseconds, the median of many: unloading is not timed."""
    table = EmbeddingTable(np.zeros((49_408, 768), np.float32), capacity=words)
    vector = np.random.default_rng(0).normal(0, 0.03, (1, 768)).astype(np.float32)
    times = []
    for i in range(200):
        start = time.perf_counter()
        table.load(f"<w{i}>", vector)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _timed(model: Model) -> float:
    model._contexts.clear()  # else the prompt is known by now
    start = time.perf_counter()
    tokens = model.tokenize(PROMPT)
    model.encode([tokens])
    model.release(tokens)
    return time.perf_counter() - start


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="miniature, or a diffusers directory")
    parser.add_argument("--bundle", type=Path, help="the model, exported; else it is exported first")
    parser.add_argument("--words", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
