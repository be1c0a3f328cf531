"""Learning beside busy processes: python -m benchmarks.threads [--rounds 9] [--steps 10] [--busy 1] [--write]

One optimiser step of learning a word (recipe `fast`, the miniature), alone and beside processes that only compute:

in parts         as shipped: the parts of a batch run on threads of their own (`oneword.train.parallel`)
whole            every operation uses all of PyTorch's threads, which spin while they wait for each other
whole, passive   the same with OMP_WAIT_POLICY=PASSIVE
one thread       OMP_NUM_THREADS=1

The settings alternate every few steps, so that other load on the machine affects all of them; medians are compared.
Targets: in parts, a step beside one busy process takes at most 2.2 times as long as alone, and alone no longer than
whole. Linux only. `--write` puts the table into docs/results/training.md. Not covered: other models, and more
processors than this machine has. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from PIL import Image

from benchmarks import turns
from benchmarks.pages import marked, provenance, table, write_section
from benchmarks.training import NEW_PAGE, PAGE
from oneword.train.miniature import world

BAR = 2.2
SETTINGS = {
    "in parts": {},
    "whole": {"WHOLE": "1"},
    "whole, passive": {"WHOLE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    """Measures the settings in turn, prints the table and one line of JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--steps", type=int, default=10, help="optimiser steps per turn")
    p.add_argument("--busy", type=int, default=1, help="number of busy processes")
    p.add_argument("--write", action="store_true", help="write the table into docs/results/training.md")
    p.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        serve(args.serve, args.steps)
        return
    with TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        alone, beside = measure(Path(folder), args.rounds, args.steps, args.busy)
    ratios = {name: beside[name] / alone[name] for name in SETTINGS}
    ratios_marked = {name: marked(f"{ratio:.2f}", name != "in parts" or ratio <= BAR) for name, ratio in ratios.items()}
    rows = [[name, f"{alone[name]:.0f}", f"{beside[name]:.0f}", ratios_marked[name]] for name in SETTINGS]
    text = table(["ms per step", "alone", f"beside {args.busy} busy", "ratio"], rows)
    print(text)
    if args.write:
        write_section(PAGE, "threads", f"{provenance('threads')}\n\n{text}", NEW_PAGE)
    report = {"alone_ms": alone, "beside_ms": beside, "ratio": ratios["in parts"], "bar": BAR}
    print(json.dumps({**report, "alone_over_whole": alone["in parts"] / alone["whole"]}))


def measure(folder: Path, rounds: int, steps: int, busy: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds per step of every setting, alone and beside `busy` processes."""
    command = [sys.executable, "-m", "benchmarks.threads", "--serve", folder, "--steps", steps]
    environments = {name: {**os.environ, **setting} for name, setting in SETTINGS.items()}
    turns_of_settings = turns.measure(dict.fromkeys(SETTINGS, command), environments, rounds, busy)
    alone, beside = (
        {name: median(turn["ms"] for turn in by_name[name]) for name in SETTINGS} for by_name in turns_of_settings
    )
    return alone, beside


def serve(folder: Path, steps: int) -> None:
    """Runs `steps` optimiser steps per turn."""
    from oneword.export.source import silence_libraries
    from oneword.train import parallel
    from oneword.train.learn import learn
    from oneword.train.recipe import named_recipe
    from oneword.train.tasks import Task

    silence_libraries()
    if os.environ.get("WHOLE"):
        parallel.PARTS = 1
    run = learn("miniature", [Task(folder, "<toy>", "star")], named_recipe("fast").with_changes(steps=1_000_000))
    for _ in range(3):
        next(run)
    turns.serve(lambda: next(run), steps)


def write_pictures(folder: Path) -> None:
    """Five pictures of a held-out look."""
    thing = world.Thing(world.HELD_OUT_LOOKS[0])
    for number, background in enumerate(list(world.BACKGROUNDS)[:5]):
        pixels, _ = world.render(world.Scene((thing,), background), number)
        Image.fromarray(pixels).save(folder / f"{number}.png")


if __name__ == "__main__":
    main()
