"""The report of a run: one self-contained HTML file that loads nothing else."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from oneword.train.plots import curves
from oneword.train.recipe import NOTHING

SMOOTH = 20  # steps of the loss's running mean


@dataclass(frozen=True)
class LearnedWord:
    """One word of a run: its init, pictures, losses and sheets.

    `pictures` are uint8 [H, W, 3]; `sheets` maps steps to sample sheets; `length` is the mean length of its vectors
    over the median length of the vocabulary's.
    """

    token: str
    init: str
    output: Path
    vectors: int
    pictures: Sequence[np.ndarray]
    losses: Sequence[float]
    sheets: Mapping[int, Image.Image]
    prompts: Sequence[str]
    likeness: float | None
    length: float


def report(
    words: Sequence[LearnedWord],
    *,
    model: str,
    settings: Mapping[str, str],
    rates: Sequence[float],
    notes: Sequence[str],
    seconds: Mapping[str, float],
    config: str | None = None,
) -> str:
    """Returns the page. `rates` and the words' losses are by step, `seconds` by stage; `config` is as in `learn`.

    Settings whose text is `NOTHING` are left out.
    """
    losses = {word.token: [loss for loss in word.losses if math.isfinite(loss)] for word in words}
    return (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(PAGE)
        .render(
            words=words,
            model=model,
            config=config,
            settings=settings,
            notes=notes,
            seconds=seconds,
            loss_curves=curves(losses, "loss", smooth=SMOOTH),
            rate_curve=curves({"learning rate": rates}, "learning rate"),
            nothing=NOTHING,
            picture=as_data,
            run_line=run_line,
        )
    )


def run_line(word: LearnedWord, model: str, config: str | None = None) -> str:
    """The commands that draw pictures with the word."""
    bundle = f"{(Path(model).name or model).removesuffix('.safetensors')}.bundle"
    export = shlex.join(["ti-export", model, bundle, *(["--config", config] if config else [])])
    draw = shlex.join(["ti-run", bundle, f"a photo of a {word.token}", "--concept", str(word.output)])
    return f"{export}   # once for all words\n{draw}"


def as_data(picture: np.ndarray | Image.Image) -> str:
    """A picture as a data URI."""
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ words | map(attribute="token") | join(", ") }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
  h1 { font-size: 1.6rem; }
  h2 { border-top: 1px solid #ddd; padding-top: 1rem; }
  h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
  img { margin: 2px; vertical-align: top; }
  .picture { width: 112px; }
  .sheet { max-width: 100%; min-width: 256px; }
  svg { max-width: 100%; height: auto; }
  figure { display: inline-block; margin: 0 1rem 1rem 0; }
  figcaption { font-size: .8rem; color: #666; }
  pre { background: #f4f4f2; padding: .7rem; overflow-x: auto; }
  table { border-collapse: collapse; font-size: .85rem; }
  td { border-bottom: 1px solid #eee; padding: .1rem .8rem .1rem 0; }
  .note { background: #fff4d6; border-left: 4px solid #d9a400; padding: .3rem .7rem; margin: .3rem 0; }
</style>
<h1>{{ words | map(attribute="token") | join(", ") }}</h1>
<p>Learned with <code>{{ model }}</code> in {{ "%.0f" | format(seconds.values() | sum) }} s (
{%- for name, value in seconds.items() %}{{ name }} {{ "%.1f" | format(value) }} s{{ ", " if not loop.last }}
{%- endfor %}).</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<h2>Curves</h2>
<p>A step's loss depends mostly on the noise levels that it draws, so the curve falls little even if the word is learned
well: look at the samples.</p>
{{ loss_curves | safe }}
{{ rate_curve | safe }}
{% for word in words %}
<h2>{{ word.token if words | length > 1 else "The word" }}</h2>
<p>{{ word.vectors }} vector{{ "s" if word.vectors > 1 }}, from <code>{{ word.init }}</code>,
{{ "%.1f" | format(word.length) }} times as long as the median vector of the vocabulary
{%- if word.likeness is not none %}; likeness {{ "%.3f" | format(word.likeness) }}{% endif %}.
In <code>{{ word.output }}</code>.</p>
<pre>{{ run_line(word, model, config) }}</pre>
<h3>Learned from</h3>
{% for image in word.pictures %}<img class="picture" alt="picture {{ loop.index }}" src="{{ picture(image) }}">
{% endfor %}
{% if word.sheets %}<h3>What it draws</h3>
<p>One row per prompt: {{ word.prompts | join(" · ") }}</p>
{% for step, sheet in word.sheets.items() %}<figure><img class="sheet" alt="samples after step {{ step }}"
src="{{ picture(sheet) }}"><figcaption>step {{ step }}</figcaption></figure>
{% endfor %}{% endif %}
{% endfor %}
<h2>Settings</h2>
<table>{% for name, value in settings.items() if value != nothing %}<tr><td>{{ name }}<td>{{ value }}</tr>
{% endfor %}</table>
</html>
"""
