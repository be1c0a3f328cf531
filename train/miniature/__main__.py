"""python -m oneword.train.miniature WORK_DIR --output DIR: trains the miniature, or goes on training it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from oneword.train.miniature import training


def main() -> None:
    """Train every stage for its minutes, write the diffusers directory, say what it reached."""
    parser = argparse.ArgumentParser(prog="python -m oneword.train.miniature", description=__doc__)
    parser.add_argument("work", type=Path, help="where the state of the training is kept")
    parser.add_argument("--output", type=Path, help="where the diffusers directory is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-minutes", type=float, default=30)
    parser.add_argument("--judge-minutes", type=float, default=15)
    parser.add_argument("--unet-minutes", type=float, default=240)
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    stages = training.Stages(
        given.work,
        given.device,
        given.vae_minutes,
        given.judge_minutes,
        given.unet_minutes,
        given.pictures,
        given.batch,
    )
    training.train(stages, lambda line: print(line, flush=True))
    if given.output:
        training.export(stages, given.output)
        print("\n".join(training.reached(given.output)))
        print(f"how well it obeys captions: python -m benchmarks.miniature --model {given.output}")


if __name__ == "__main__":
    main()
