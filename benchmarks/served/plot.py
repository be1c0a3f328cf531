"""The figure of the mixed traffic, as SVG text. No files."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from oneword.train.plots import COLOURS, dressed, svg

PHASES = {"0.6": "load 0.6", "0.8": "load 0.8", "closed": "closed loop"}
CONTENDERS = {"steps": "step by step", "whole requests": "whole requests", "one row": "--max-rows 1"}


def answers(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Seconds until the answer, by load and contender: a dot at the median, a line up to p99.

    `found` is, by contender and phase, milliseconds as `ready50` and `ready99`.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = dressed(figure.subplots(), "", "seconds until the answer\n(dot: median, dash: p99)")
    for number, (contender, title) in enumerate(CONTENDERS.items()):
        places = [place + 0.2 * (number - 1) for place in range(len(PHASES))]
        middle, high = ([found[contender][phase][key] / 1e3 for phase in PHASES] for key in ("ready50", "ready99"))
        colour = COLOURS[number]
        axes.vlines(places, middle, high, color=colour, linewidth=1.6)
        axes.scatter(places, high, color=colour, marker="_", s=60)
        axes.scatter(places, middle, color=colour, s=32, zorder=3, label=title)
        for place, seconds in zip(places * 2, middle + high, strict=True):
            axes.annotate(f"{seconds:.2g}", (place, seconds), (6, -3), textcoords="offset points", fontsize=7)
    axes.set_xticks(range(len(PHASES)), PHASES.values())
    axes.set_xlim(-0.5, len(PHASES) - 0.5)
    axes.set_ylim(0)
    axes.grid(axis="x", visible=False)
    figure.legend(frameon=False, fontsize=8, ncols=len(CONTENDERS), loc="outside upper center")
    return svg(figure)
