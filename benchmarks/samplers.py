"""Quality against steps, by sampler: python -m benchmarks.samplers [--write]

Draws captions of one object through the exported miniature, on fixed seeds, with every contender at every number of
steps. Two readers: the judge, as the mean share of shape, both colours, pattern and background that it reads right, and
the silhouette's intersection over union. Both are relative to what the same reader finds on real renders, the
silhouette's after the VAE's round trip. A sampler of two evaluations per step gets half the steps, rounded up, so that
a column compares equal work: n evaluations, or n - 1.

The recommendation is the contender with the best mean of both readers over all columns; fewer than 200 captions are too
few for one. Prints a table and ends in one
line of JSON; `--write` puts the table into docs/results/samplers.md. Not measured: other models, whose best sampler may
differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.exported import exported
from benchmarks.miniature import through_vae
from benchmarks.pages import RESULTS, empty_page, provenance, table, write_section
from oneword.export.source import find_model
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.samplers import Guidance, Sampler
from oneword.runtime.spacing import Spacing
from oneword.train.evaluation.judge import Judge
from oneword.train.miniature import world
from oneword.train.miniature.scores import Pictures, judged_right, judged_second_colour, mean_iou, one_object_scenes

PAGE = RESULTS / "samplers.md"
NEW_PAGE = empty_page("Samplers", "Quality against steps on the miniature.", "samplers")
STEPS = (5, 8, 12, 20)
READ = ("shape", "colour", "second_colour", "pattern", "background")
TWO_STAGES = (Sampler.HEUN, Sampler.DPM2_A, Sampler.DPMPP_2S_A)


@dataclass(frozen=True)
class Contender:
    """A sampler with a spacing and a kind of guidance."""

    sampler: Sampler
    spacing: Spacing | None = None
    guidance: Guidance = Guidance.CFG

    def __str__(self) -> str:
        guidance = None if self.guidance is Guidance.CFG else self.guidance
        return " ".join(filter(None, (self.sampler, self.spacing, guidance)))

    def steps(self, evaluations: int) -> int:
        """The steps that take so many evaluations of the network, or one fewer."""
        return -(-evaluations // 2) if self.sampler in TWO_STAGES else evaluations


CONTENDERS = (
    Contender(Sampler.DDIM),
    Contender(Sampler.EULER),
    Contender(Sampler.EULER, Spacing.KARRAS),
    Contender(Sampler.EULER_A),
    Contender(Sampler.DPMPP_2M),
    Contender(Sampler.DPMPP_2M_KARRAS),
    Contender(Sampler.DPMPP_2M, Spacing.EXPONENTIAL),
    Contender(Sampler.DPMPP_2M, Spacing.BETA),
    Contender(Sampler.DPMPP_2M, Spacing.SGM_UNIFORM),
    Contender(Sampler.DPMPP_2M, Spacing.AYS),
    Contender(Sampler.DPMPP_2M_SDE),
    Contender(Sampler.DPMPP_3M_SDE),
    Contender(Sampler.UNIPC),
    Contender(Sampler.UNIPC, Spacing.KARRAS),
    Contender(Sampler.UNIPC, Spacing.AYS),
    Contender(Sampler.HEUN),
    Contender(Sampler.DPM2_A),
    Contender(Sampler.DPMPP_2S_A),
    Contender(Sampler.DDIM, guidance=Guidance.CFG_PP),
    Contender(Sampler.DPMPP_2M, guidance=Guidance.ZERO_STAR),
)

ENOUGH = 200
"""Captions from which on a sampler is recommended."""

Scores = Mapping[int, tuple[float, float]]
"""By evaluations: judge and silhouette, relative to real renders."""


def main() -> None:
    """Draws, reads, and prints a table and one line of JSON."""
    options = _options()
    model = Model.open(options.bundle or exported(options.model, options.work / "bundle"), options.engine)
    judge = Judge(find_model(options.model)[0] / "judge")
    scenes = one_object_scenes(options.captions)
    real = np.stack([world.render(scene, 5_000 + i)[0] for i, scene in enumerate(scenes)])
    ceiling = judged(judge, real, scenes), mean_iou(through_vae(model, real), scenes)
    results: dict[Contender, dict[int, tuple[float, float]]] = {}
    for contender in CONTENDERS:
        results[contender] = {}
        for evaluations in options.steps:
            pictures = drawn(model, contender, contender.steps(evaluations), scenes, options.guidance_scale)
            read = judged(judge, pictures, scenes), mean_iou(pictures, scenes)
            results[contender][evaluations] = read[0] / ceiling[0], read[1] / ceiling[1]
        print(contender, results[contender], flush=True)
    text = summary(results, options.captions, options.guidance_scale)
    print(text)
    if options.write:
        write_section(PAGE, "samplers", f"{provenance('samplers')}\n\n{text}", NEW_PAGE)
    means = {str(contender): round(overall(scores), 4) for contender, scores in results.items()}
    recommended = str(best(results)) if options.captions >= ENOUGH else None
    print(json.dumps({"recommended": recommended, "means": means}))


def drawn(model: Model, contender: Contender, steps: int, scenes: Sequence[world.Scene], scale: float) -> Pictures:
    """One picture per scene, seed 100 + its index."""
    requests = [
        Request(
            world.caption(scene),
            seed=100 + i,
            steps=steps,
            sampler=contender.sampler,
            spacing=contender.spacing,
            guidance=contender.guidance,
            guidance_scale=None if contender.guidance is Guidance.CFG_PP else scale,
        )
        for i, scene in enumerate(scenes)
    ]
    return np.stack([picture.image for picture in draw(model, *requests)])


def judged(judge: Judge, pictures: Pictures, scenes: Sequence[world.Scene]) -> float:
    """The mean over READ of the share that the judge reads right."""
    right = judged_right(judge, pictures, list(scenes))
    right["second_colour"] = judged_second_colour(judge, pictures, list(scenes))
    return fmean(right[attribute] for attribute in READ)


def overall(scores: Scores) -> float:
    """The mean of both readers over all numbers of evaluations."""
    return fmean(value for pair in scores.values() for value in pair)


def best(results: Mapping[Contender, Scores]) -> Contender:
    """The contender with the best overall score; the earlier one of equals."""
    return max(results, key=lambda contender: overall(results[contender]))


def summary(results: Mapping[Contender, Scores], captions: int, scale: float) -> str:
    """The table, and the recommendation, in Markdown."""
    columns = [*next(iter(results.values()))]
    rows = [
        [f"`{contender}`", *(f"{judge:.1%}, {iou:.1%}" for judge, iou in scores.values()), f"{overall(scores):.1%}"]
        for contender, scores in results.items()
    ]
    head = ["judge, silhouette at n evaluations", *(f"n = {n}" for n in columns), "mean"]
    quickest = max(results, key=lambda contender: fmean(results[contender][columns[0]]))
    return "\n\n".join(
        [
            f"{captions} captions of one object, guidance {scale:g} (cfg++: 0.6). Relative to real renders: the "
            "judge's mean over shape, both colours, pattern and background, and the silhouette's intersection over "
            f"union. One picture more or less is about {1 / captions:.1%} of an attribute.",
            table(head, rows),
            f"Recommended on this model: `{best(results)}`; at {columns[0]} evaluations, `{quickest}`."
            if captions >= ENOUGH
            else f"With fewer than {ENOUGH} captions none is recommended.",
        ]
    )


def _options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="miniature")
    p.add_argument("--bundle", type=Path, help="an exported bundle of --model")
    p.add_argument("--captions", type=int, default=ENOUGH)
    p.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N", help="evaluations of the network")
    p.add_argument("--guidance-scale", type=float, default=4.0)
    p.add_argument("--engine", default="onnxruntime")
    p.add_argument("--work", type=Path, default=Path("build/miniature"))
    p.add_argument("--write", action="store_true", help="write the table into docs/results/samplers.md")
    return p.parse_args()


if __name__ == "__main__":
    main()
