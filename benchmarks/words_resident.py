"""What 100,000 resident words cost: python -m benchmarks.words_resident

encode      a prompt through tokenizer and text encoder, with 1 word resident and with `--words`, call about, the
            lower decile of each (others' work on the machine only adds); the bar is 2 % on top
load        one vector into a table of CLIP's size (49,408 x 768) with room for `--words` more; the bar is 1 ms
fill        all words, one after another, through the gate that every word passes
refuse      files that the gate refuses, as large and as tangled as may be; the bar is 50 ms from a path to the error

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
import safetensors.numpy

from oneword.engines.errors import ConceptError
from oneword.engines.open import Backend
from oneword.export.write import export_bundle
from oneword.runtime.concept import Concept, load_concept
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
        refused = refuse(Path(folder))
        slowest = max(refused, key=lambda name: refused[name])
        print(f"refuse {len(refused)} kinds of bad files: at most {refused[slowest]:.1f} ms ({slowest}), bar 50")
        report: dict[str, object] = {"words": options.words, "load_ms": round(load_ms, 5), "refuse_ms": refused}
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


def refuse(folder: Path) -> dict[str, float]:
    """Milliseconds from a path to the error, the median of five, of files as large and as tangled as may be."""
    rows = np.full((75, 3000), 0.01, np.float32)
    broken = rows.copy()
    broken[-1, -1] = np.nan
    good = safetensors.numpy.save({"<toy>": rows})
    deep = b'{"a":' * 6000 + b"1" + b"}" * 6000
    many = json.dumps({f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)}).encode()
    files = {
        "NaN": safetensors.numpy.save({"<toy>": broken}),
        "too long": safetensors.numpy.save({"<toy>": rows * 1e6}),
        "two words": safetensors.numpy.save({"<a>": rows[:35], "<b>": rows[:35]}),
        "a key like a path": safetensors.numpy.save({"../toy": rows}),
        "bytes after the end": good + b"0" * 1000,
        "cut off": good[:-1000],
        "a header of 2^63 bytes": b"\xff" * 7 + b"\x7f" + good[8:],
        "a header 6,000 deep": len(deep).to_bytes(8, "little") + deep,
        "a header of 1,000 tensors": len(many).to_bytes(8, "little") + many,
        "100 MB": b"\0" * 100_000_000,
        "a pickle": b"PK\x03\x04" + b"\0" * 1_000_000,
    }
    times = {}
    for name, data in files.items():
        path = folder / "refused.safetensors"
        path.write_bytes(data)
        each = []
        for _ in range(5):
            start = time.perf_counter()
            try:
                load_concept(path)
            except ConceptError:
                each.append(1e3 * (time.perf_counter() - start))
        if len(each) < 5:
            raise SystemExit(f"the gate let a bad file pass: {name}")
        times[name] = round(statistics.median(each), 3)
    return times


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
