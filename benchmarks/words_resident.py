"""The cost of 100,000 resident words: python -m benchmarks.words_resident [--write]

encode      a prompt through tokenizer and text encoder, with 1 word resident and with `--words`, in alternation; the
            lower decile of each, since other load on the machine only adds time. The target is 2 % on top
load        one vector into a table of CLIP's size (49,408 x 768) with room for `--words` more; the target is 1 ms
fill        all words, one after another, through the checks that every word passes
refuse      files that fail these checks, as large and as nested as possible; the target is 50 ms from path to error

Runs on each CPU engine. The words are random, since their meaning does not affect the cost. `--write` puts the table
into docs/results/words-resident.md. Ends in one line of JSON.
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

from benchmarks.pages import RESULTS, empty_page, marked, model_name, provenance, table, write_section
from oneword.engines.errors import ConceptError
from oneword.engines.open import Backend
from oneword.export.write import export_bundle
from oneword.runtime.concept import Concept, load_concept
from oneword.runtime.model import Model
from oneword.runtime.table import EmbeddingTable

PAGE = RESULTS / "words-resident.md"
NEW_PAGE = empty_page("Resident words", "The cost of keeping 100,000 learned words loaded.", "words-resident")
ENCODE_BAR, LOAD_BAR, REFUSE_BAR = 0.02, 1, 50
PROMPT = "a photo of a <w0> in the snow"


def main() -> None:
    """Measures every installed engine; prints a table and one line of JSON."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or export_bundle(options.model, Path(folder) / "bundle").bundle.path
        load_ms = load_one(options.words)
        refused = refuse(Path(folder))
        slowest = max(refused.values())
        rows = [
            [
                "load one vector into 49,408 x 768, ms",
                f"at most {LOAD_BAR}",
                marked(f"{load_ms:.3f}", load_ms <= LOAD_BAR),
            ],
            [
                f"refuse {len(refused)} kinds of bad files, slowest, ms",
                f"at most {REFUSE_BAR}",
                marked(f"{slowest:.1f}", slowest <= REFUSE_BAR),
            ],
        ]
        report: dict[str, object] = {"words": options.words, "load_ms": round(load_ms, 5), "refuse_ms": refused}
        for backend in (Backend.ONNXRUNTIME, Backend.OPENVINO):
            if importlib.util.find_spec(backend.value) is None:
                continue
            single, fill_single = opened(bundle, backend, 1)
            full, fill = opened(bundle, backend, options.words)
            one_ms, all_ms, share = encode(single, full, options.rounds)
            rows += [
                [
                    f"{backend.value}: encode a prompt with {options.words:,} words, on top of 1 word",
                    f"at most {ENCODE_BAR:+.0%}",
                    marked(f"{share:+.1%}", share <= ENCODE_BAR),
                ],
                [f"{backend.value}: the same, ms with 1 word and with all", "", f"{one_ms:.2f}, {all_ms:.2f}"],
                [f"{backend.value}: load {options.words:,} words, s", "", f"{fill:.1f}"],
            ]
            report[backend.value] = {
                "one_ms": one_ms, "all_ms": all_ms, "on_top": share, "fill_s": fill - fill_single,
            }  # fmt: skip
    text = table(["", "target", "measured"], rows)
    print(text)
    if options.write:
        model = model_name(options.model)
        encoder = f"Loading is into a table of CLIP's size; prompts are encoded by the text encoder of {model}."
        text = f"{provenance('words_resident')}\n\n{encoder} Bold: misses its target.\n\n{text}"
        write_section(PAGE, "words-resident", text, NEW_PAGE)
    print(json.dumps(report))


def opened(bundle: Path, backend: Backend, words: int) -> tuple[Model, float]:
    """A model with `words` words, and the seconds it took to load them."""
    model = Model.open(bundle, backend, capacity=words)
    encoders = model.manifest.encoders
    vectors = np.random.default_rng(0).normal(0, 0.03, (words, max(encoder.width for encoder in encoders)))
    start = time.perf_counter()
    for i, vector in enumerate(vectors.astype(np.float32)):
        model.load(Concept(f"<w{i}>", {encoder.graph: vector[None, : encoder.width] for encoder in encoders}))
    for name, rows in model._tables.items():  # as after each word was used once
        rows.place({concept.identity: concept.vectors[name] for concept in model._words.values()})
    return model, time.perf_counter() - start


def encode(single: Model, full: Model, rounds: int) -> tuple[float, float, float]:
    """Milliseconds per prompt in either model, and the share that the second takes on top."""
    pairs = []
    for turn in range(rounds + 10):
        first, second = (single, full) if turn % 2 else (full, single)
        times = {id(model): _timed(model) for model in (first, second)}
        pairs.append((times[id(single)], times[id(full)]))
    pairs = pairs[10:]  # warm-up
    few_ms, all_ms = (1e3 * statistics.quantiles(times, n=10)[0] for times in zip(*pairs, strict=True))
    return round(few_ms, 4), round(all_ms, 4), round(all_ms / few_ms - 1, 4)


def load_one(words: int) -> float:
    """Milliseconds to load one vector, the median of 200."""
    rows = EmbeddingTable(np.zeros((49_408, 768), np.float32), capacity=words)
    vector = np.random.default_rng(0).normal(0, 0.03, (1, 768)).astype(np.float32)
    times = []
    for i in range(200):
        start = time.perf_counter()
        rows.place({f"<w{i}>": vector})
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def refuse(folder: Path) -> dict[str, float]:
    """Milliseconds from path to error by kind of bad file, medians of five."""
    rows = np.full((75, 3000), 0.01, np.float32)
    broken = rows.copy()
    broken[-1, -1] = np.nan
    good = safetensors.numpy.save({"<toy>": rows})
    deep = b'{"a":' * 6000 + b"1" + b"}" * 6000
    tensors = json.dumps(
        {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)}
    ).encode()
    files = {
        "NaN": safetensors.numpy.save({"<toy>": broken}),
        "too long": safetensors.numpy.save({"<toy>": rows * 1e6}),
        "two words": safetensors.numpy.save({"<a>": rows[:35], "<b>": rows[:35]}),
        "a key like a path": safetensors.numpy.save({"../toy": rows}),
        "bytes after the end": good + b"0" * 1000,
        "cut off": good[:-1000],
        "a header of 2^63 bytes": b"\xff" * 7 + b"\x7f" + good[8:],
        "a header 6,000 deep": len(deep).to_bytes(8, "little") + deep,
        "a header of 1,000 tensors": len(tensors).to_bytes(8, "little") + tensors,
        "100 MB": b"\0" * 100_000_000,
        "a pickle": b"PK\x03\x04" + b"\0" * 1_000_000,
    }
    times = {}
    for name, data in files.items():
        path = folder / "refused.safetensors"
        path.write_bytes(data)
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            try:
                load_concept(path)
            except ConceptError:
                tries.append(1e3 * (time.perf_counter() - start))
        if len(tries) < 5:
            raise SystemExit(f"a bad file was accepted: {name}")
        times[name] = round(statistics.median(tries), 3)
    return times


def _timed(model: Model) -> float:
    model._contexts.clear()  # else the prompt is cached
    start = time.perf_counter()
    tokens = model.tokenize(PROMPT)
    model.encode([tokens])
    return time.perf_counter() - start


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="miniature, or a diffusers directory")
    parser.add_argument("--bundle", type=Path, help="the exported model [default: exported first]")
    parser.add_argument("--words", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--write", action="store_true", help="write the table into docs/results/words-resident.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
