"""Figures as SVG text, by matplotlib: curves over steps, scatter plots of likeness and editability. No files."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

MARKERS = ("o", "s", "^", "D")
COLOURS = ("#2f6db3", "#c8553d", "#3a8f5c", "#8d5aa8", "#b8860b", "#3aa6a6", "#7a7a7a", "#c2417c")


def curves(series: Mapping[str, Sequence[float]], label: str, *, smooth: int = 1) -> str:
    """One line per name over steps 1, 2, ...; with `smooth`, a running mean of that many steps over pale raw values."""
    figure, axes = _empty("step", label)
    lines = []
    for colour, values in zip(_cycled(len(series)), series.values(), strict=True):
        raw = np.asarray(values, float)
        steps = np.arange(1, len(raw) + 1)
        window = max(1, min(smooth, len(raw)))
        mean = np.convolve(raw, np.full(window, 1 / window), "valid")
        if window > 1:
            axes.plot(steps, raw, color=colour, alpha=0.25, linewidth=0.8)
        lines += axes.plot(steps[window - 1 :], mean, color=colour, linewidth=1.6)
    if len(series) > 1:
        _as_written(axes.legend(lines, list(series), frameon=False, fontsize=8))
    return svg(figure)


def scatter(points: Sequence[tuple[str, float, float]], across: str = "editability", near: Collection[str] = ()) -> str:
    """The paper's figure: editability across, likeness up, one dot per (name, likeness, editability).

    A second panel shows only the names in `near`.
    """
    figure = Figure(figsize=(10, 3.6) if near else (6.4, 3.2), layout="constrained")
    panels = [[name for name, _, _ in points], *([list(near)] if near else [])]
    for column, names in enumerate(panels, start=1):
        axes = dressed(figure.add_subplot(1, len(panels), column), across, "likeness")
        axes.locator_params(axis="x", nbins=5)  # more labels would overlap
        for number, (colour, (name, up, right)) in enumerate(zip(_cycled(len(points)), points, strict=True)):
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]  # another marker when colours repeat
            if name in names:
                axes.scatter([right], [up], color=colour, marker=marker, s=28, zorder=3, label=name)
        if column == 1:
            dots = list(axes.collections)
            labels = [str(dot.get_label()) for dot in dots]
            _as_written(figure.legend(dots, labels, frameon=False, fontsize=8, loc="outside right center"))
    return svg(figure)


def trajectories(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]], across: str) -> str:
    """One panel per quantity, one line per name: through the medians of points (x, ys), with bars between quartiles.

    The x axis is logarithmic.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for number, (quantity, series) in enumerate(panels.items(), start=1):
        axes = dressed(figure.add_subplot(1, len(panels), number), across, quantity)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        for colour, (name, points) in zip(_cycled(len(series)), series.items(), strict=True):
            low, middle, high = np.array([np.quantile(ys, (0.25, 0.5, 0.75)) for _, ys in points]).T
            axes.errorbar(
                [x for x, _ in points],
                middle,
                [middle - low, high - middle],
                fmt="o-",
                color=colour,
                markersize=4,
                linewidth=1.6,
                elinewidth=0.8,
                capsize=2,
                label=name,
            )
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return svg(figure)


def _empty(across: str, up: str) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    return figure, dressed(figure.subplots(), across, up)


def dressed(axes: matplotlib.axes.Axes, across: str, up: str) -> matplotlib.axes.Axes:
    """The axes, with labels, a pale grid, and no frame above and to the right."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    return axes


def _as_written(legend: Legend) -> None:
    """Shows a legend's names as they are: a word's may have dollar signs, between which matplotlib reads formulas, and
    begin with an underscore, which hides it from a legend that finds its own names."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _cycled(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def svg(figure: Figure) -> str:
    """The figure's SVG element, with text as text; the same for the same numbers."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "oneword"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
