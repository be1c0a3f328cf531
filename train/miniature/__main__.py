"""python -m oneword.train.miniature WORK_DIR --output DIR: trains the miniature, or resumes its training."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from oneword.export.source import find_model
from oneword.train.miniature import training


def main() -> None:
    """Trains every stage for its minutes, writes the diffusers directory and prints the weights' quality."""
    parser = argparse.ArgumentParser(prog="python -m oneword.train.miniature", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the state of the training")
    parser.add_argument("--output", type=Path, help="diffusers directory to write")
    parser.add_argument(
        "--start-from",
        metavar="MODEL",
        help="diffusers directory to start from, for stages without a state; 'miniature' is the one that ships",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-minutes", type=float, default=30, help="total over all runs, as below [default: 30]")
    parser.add_argument("--judge-minutes", type=float, default=15, help="[default: 15]")
    parser.add_argument("--unet-minutes", type=float, default=240, help="[default: 240]")
    parser.add_argument(
        "--unet-rate", type=float, default=1e-3, help="the UNet's highest learning rate [default: 1e-3]"
    )
    parser.add_argument("--pictures", type=int, default=200_000, help="in the UNet's training set [default: 200000]")
    parser.add_argument("--batch", type=int, default=128, help="pictures per step of the UNet [default: 128]")
    parser.add_argument(
        "--threads", type=int, default=2, help="processes that compute a step's parts, one thread each [default: 2]"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = training.Stages(
        args.work,
        args.device,
        args.vae_minutes,
        args.judge_minutes,
        args.unet_minutes,
        args.pictures,
        args.batch,
        threads=args.threads,
        unet_rate=args.unet_rate,
        start_from=find_model(args.start_from)[0] if args.start_from else None,
    )
    training.train(stages, lambda line: print(line, flush=True))
    if args.output:
        training.export(stages, args.output)
        print("\n".join(training.quality(args.output)))
        print(f"to measure how well it follows captions: python -m benchmarks.miniature --model {args.output}")


if __name__ == "__main__":
    main()
