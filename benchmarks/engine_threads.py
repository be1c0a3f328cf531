"""Drawing beside busy processes: the settings of an engine's threads, in turn.

    python -m benchmarks.engine_threads BUNDLE [--rounds 9] [--pictures 3] [--busy 1] [--write]

One picture of the model's own size, 20 steps, alone and beside processes that only compute:

onnxruntime, shipped       threads that wait spin for 10 microseconds, then sleep (`session.intra_op.spin_duration_us`)
onnxruntime, spins         they spin for up to a millisecond while a graph runs, and stop when it ends
onnxruntime, spins on      they also spin for so long after a run, as by ONNX Runtime's own default
onnxruntime, sleeps        they never spin (`session.intra_op.allow_spinning` 0)
onnxruntime, one thread
openvino, shipped          threads are not bound to cores (`ENABLE_CPU_PINNING` NO)
openvino, pinned           they are, as by OpenVINO's own default
openvino, one thread

The settings alternate every few pictures, so that other load on the machine affects all of them; medians are compared,
and processor time is that of the drawing process alone. Bold: the shipped setting takes over 1.1 times as long as the
fastest of its engine. Linux only. `--write` puts the table into docs/results/latency.md, or latency-float32.md on a
processor without bfloat16. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import turns
from benchmarks.latency import NEW_PAGE, page_of
from benchmarks.pages import marked, model_name, provenance, table, write_section
from benchmarks.turns import Turns
from oneword.runtime.bundle import Bundle

BAR = 1.1
STEPS = 20
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "onnxruntime, shipped": {},
    "onnxruntime, spins": {"session.intra_op.spin_duration_us": "1000"},
    "onnxruntime, spins on": {"session.intra_op.spin_duration_us": "1000", "session.force_spinning_stop": "0"},
    "onnxruntime, sleeps": {"session.intra_op.allow_spinning": "0"},
    "onnxruntime, one thread": {"threads": "1"},
    "openvino, shipped": {},
    "openvino, pinned": {"ENABLE_CPU_PINNING": "YES"},
    "openvino, one thread": {"threads": "1"},
}
"""By engine and name: settings of its sessions, or the number of threads."""


def main() -> None:
    """Measures the settings in turn; prints a table and one line of JSON."""
    options = _options()
    if options.serve:
        serve(options)
        return
    alone, beside = measure(options)
    milliseconds = {
        name: {
            "alone": median(turn["ms"] for turn in alone[name]),
            "beside": median(turn["ms"] for turn in beside[name]),
            "cpu": median(turn["cpu_ms"] for turn in alone[name]),
        }
        for name in SETTINGS
    }
    text = threads_table(milliseconds, options.busy)
    print(text)
    if options.write:
        model = model_name(Bundle.open(options.bundle).manifest.source.id)
        about = f"A picture of {model}, {STEPS} steps, {options.threads} threads."
        write_section(page_of(), "engine-threads", f"{provenance('engine_threads')}\n\n{about}\n\n{text}", NEW_PAGE)
    print(json.dumps({"threads": options.threads, "milliseconds": milliseconds, "bar": BAR}))


def threads_table(milliseconds: Mapping[str, Mapping[str, float]], busy: int) -> str:
    """Every setting; a shipped one is bold where it misses the bar."""
    rows = []
    for name, ms in milliseconds.items():
        engine, _, setting = name.partition(", ")
        peers = [other for other_name, other in milliseconds.items() if other_name.startswith(f"{engine},")]
        met = {
            key: setting != "shipped" or ms[key] <= BAR * min(peer[key] for peer in peers)
            for key in ("alone", "beside")
        }
        times = [marked(f"{ms[key]:.0f}", met[key]) for key in ("alone", "beside")]
        rows.append([name, *times, f"{ms['beside'] / ms['alone']:.2f}", f"{ms['cpu']:.0f}"])
    return table(["ms per picture", "alone", f"beside {busy} busy", "ratio", "processor time, alone"], rows)


def measure(options: argparse.Namespace) -> tuple[Turns, Turns]:
    """The turns of every setting, alone and beside busy processes."""
    shared = ["--pictures", options.pictures, "--threads", options.threads]
    start = [sys.executable, "-m", "benchmarks.engine_threads", options.bundle, *shared, "--serve"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    commands = {name: [*start, name] for name in SETTINGS}
    return turns.measure(commands, dict.fromkeys(SETTINGS, environment), options.rounds, options.busy)


def serve(options: argparse.Namespace) -> None:
    """Draws `pictures` pictures per turn."""
    from oneword.runtime.drawing import draw
    from oneword.runtime.model import Model
    from oneword.runtime.request import Request

    engine, _, _ = options.serve.partition(", ")
    settings = {**SETTINGS[options.serve]}
    threads = int(settings.pop("threads", options.threads))
    (set_onnxruntime if engine == "onnxruntime" else set_openvino)(settings)
    model = Model.open(options.bundle, engine, threads=threads)

    def picture() -> None:
        draw(model, Request("a photo of a red star", seed=1, steps=STEPS, guidance_scale=5.0))

    for _ in range(6):  # OpenVINO compiles a small graph again for shapes that come often
        picture()
    turns.serve(picture, options.pictures)


def set_onnxruntime(settings: Mapping[str, str]) -> None:
    """Adds these entries to the configuration of every session that this process opens; they override others."""
    import onnxruntime

    library: Any = onnxruntime
    open_session: Callable[..., Any] = library.InferenceSession

    def opened(path: str, options: Any, **more: Any) -> Any:
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        return open_session(path, options, **more)

    library.InferenceSession = opened


def set_openvino(settings: Mapping[str, str]) -> None:
    """Adds these properties to every graph that this process compiles."""
    import openvino

    library: Any = openvino

    class Core(library.Core):  # type: ignore[misc]
        def compile_model(self, model: Any, device: str, config: Mapping[str, str]) -> Any:
            return super().compile_model(model, device, {**config, **settings})

        def import_model(self, stream: Any, device: str, config: Mapping[str, str]) -> Any:
            return super().import_model(stream, device, {**config, **settings})

    library.Core = Core


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pictures", type=int, default=3, help="per turn")
    parser.add_argument("--busy", type=int, default=1, help="number of busy processes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true", help="write the table into the page of latency")
    parser.add_argument("--serve", choices=SETTINGS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
