"""Draws every task on the miniature, as pictures to look at: python -m benchmarks.gallery [--write]

Learns three words that the miniature was not trained on (two objects and a style, five pictures each), exports the
model and draws all pictures in one call. Words and bundle are stored in `--work` and reused as long as the model is the
same, with the pictures that the page's commands name. The page's pictures are written there, or with `--write` into
docs/gallery/, which docs/guide/gallery.md shows, and three rounds of a refinement, which docs/guide/refining.md shows.
Nothing is measured and nothing is selected: every picture uses the first seed. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image as Pillow
from PIL import ImageDraw

from benchmarks.exported import exported
from benchmarks.pages import RESULTS, empty_page, provenance, write_section
from oneword.engines.open import Backend
from oneword.runtime import cli_refine
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import load_concept
from oneword.runtime.drawing import draw
from oneword.runtime.grid import labelled_grid
from oneword.runtime.images import save_png
from oneword.runtime.model import Model
from oneword.runtime.request import Image, Request
from oneword.runtime.samplers import Sampler
from oneword.train import cli
from oneword.train.miniature.world import HELD_OUT_LOOKS, HELD_OUT_STYLES, NOUNS, STYLES, Look, Scene, Thing, render

DOCS = RESULTS.parent
PAGE = DOCS / "guide" / "gallery.md"
NEW_PAGE = empty_page("Gallery", "The main things that `ti-run` does, on the miniature.", "gallery")
LOOKS = {"<toy>": HELD_OUT_LOOKS[0], "<gem>": HELD_OUT_LOOKS[3]}
STYLE = next(iter(HELD_OUT_STYLES))
PHOTOGRAPHED = ("studio", "kitchen", "desert", "meadow", "brick")
PLACES = ("in the snow", "at night", "by the sea", "in the forest", "at sunset")
STAR = "a photo of a red star in the meadow"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
SEED = 7
COLUMNS = 100  # of a command
GUIDANCE = 4.0
AVOID = "avoid.safetensors"
LIKES = ("4>2>5>3>6>1", "2>1>3>5>4>6", "1>4>6>2>3>5", "1>2>4>6>5>3", "1>2>5>6>4>3")
"""Answers to the first rounds of a refinement, for a pink heart with dots."""


@dataclass(frozen=True)
class Section:
    """One picture of the page: a table of cells, each a request to draw or a finished image."""

    name: str
    title: str
    text: str
    command: str
    rows: Sequence[tuple[str, Sequence[Request | Image]]]
    headings: Sequence[Sequence[str]]


def main() -> None:
    """Learns, exports and draws; prints one line of JSON."""
    options = _options()
    start = time.perf_counter()
    bundle = options.bundle or exported(options.model, options.work / "bundle")
    of_model = options.work / Bundle.open(bundle).manifest.source.digest[:12]
    words, learned_from = learn(of_model, options.model, options.learn_steps)
    write_inputs(options.work, words)
    model = Model.open(bundle, options.engine)
    for word in (*words, options.work / AVOID):
        model.load(load_concept(word))
    learned = time.perf_counter()
    sections = [*of_the_model(options.steps), *of_words(learned_from, options.steps)]
    grids = drawn(model, sections)
    folder = DOCS / "gallery" if options.write else options.work / "pictures"
    for section, grid in zip(sections, grids, strict=True):
        save_png(grid, folder / f"{section.name}.png", section.command)
    for count in (0, 2, len(LIKES)):
        sheet = refined(bundle, options.work / "refined", options.engine, LIKES[:count])
        shutil.copy(sheet, folder / f"refining-{count + 1}.png")
    if options.write:
        write_section(PAGE, "gallery", markdown(sections, options.steps), NEW_PAGE)
    seconds = {"prepare": learned - start, "generate": time.perf_counter() - learned}
    pictures = sum(isinstance(cell, Request) for section in sections for _, row in section.rows for cell in row)
    print(json.dumps({"pictures": pictures, "sections": len(sections), **{k: round(v, 1) for k, v in seconds.items()}}))


def learn(work: Path, model: str, steps: int | None) -> tuple[list[Path], dict[str, list[Image]]]:
    """Learns three words; returns their files, and the five training pictures per token."""
    names = [*NOUNS][:5]
    scenes = {
        token: [Scene((Thing(look),), background) for background in PHOTOGRAPHED] for token, look in LOOKS.items()
    }
    scenes["<style>"] = [
        Scene((Thing(NOUNS[name], name),), background, None, STYLE)
        for name, background in zip(names, PHOTOGRAPHED, strict=True)
    ]
    pictures: dict[str, list[Image]] = {}
    outputs = []
    for token, drawn_scenes in scenes.items():
        name = token.strip("<>")
        pictures[token] = [render(scene, 1000 + i)[0] for i, scene in enumerate(drawn_scenes)]
        folder, output = work / name, work / f"{name}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures[token]):
            Pillow.fromarray(picture).save(folder / f"{i}.png")
        outputs.append(output)
        if output.is_file():
            continue
        style = token == "<style>"
        line = [str(folder), "--model", model, "--token", token, "--output", str(output), "--seed", str(SEED)]
        line += ["--init", next(iter(STYLES)) if style else "object", "--recipe", "style" if style else "fast"]
        if status := cli.main([*line, *(["--steps", str(steps)] if steps else [])]):
            raise SystemExit(status)
    return outputs, pictures


def write_inputs(folder: Path, words: Sequence[Path]) -> None:
    """Puts the files that the page's commands name beside the bundle: words, their pictures, star.png, strokes.png and
    mask.png."""
    for word in words:
        shutil.copy(word, folder / word.name)
        shutil.copytree(word.with_suffix(""), folder / word.stem, dirs_exist_ok=True)
    avoid = load_concept(folder / "style.safetensors").vectors["text_encoder"]
    safetensors.numpy.save_file({"emb_params": avoid}, folder / AVOID)  # easynegative's layout
    save_png(strokes(), folder / "strokes.png", "")
    star, mask = star_and_mask()
    save_png(star, folder / "star.png", "")
    save_png(np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1), folder / "mask.png", "")


def star_and_mask() -> tuple[Image, np.ndarray]:
    """A picture to edit, and the area of it to regenerate."""
    star, _ = render(Scene((Thing(Look("star", "red", "white", "plain")),), "meadow"), SEED)
    return star, disc(64, 27)


def strokes() -> Image:
    """A few strokes of a brush: a round thing on the ground."""
    canvas = Pillow.new("RGB", (64, 64), (96, 160, 220))
    brush = ImageDraw.Draw(canvas)
    brush.rectangle((0, 40, 63, 63), fill=(235, 235, 240))
    brush.line((20, 38, 32, 20, 44, 38, 24, 28, 42, 28, 22, 38), fill=(220, 60, 50), width=9, joint="curve")
    return np.asarray(canvas)


def of_the_model(steps: int) -> list[Section]:
    """The sections that need no learned word."""
    things = ("a red star", "a blue heart with white dots", "a green ring", "a purple moon")
    media = ("a photo", "a drawing", "an icon", "a painting")
    source, mask = star_and_mask()
    shown_mask = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    sizes = ((64, 64), (96, 64), (64, 96), (72, 56), (120, 72))
    strengths = (0.3, 0.5, 0.7, 0.9)
    return [
        Section(
            "text-to-image",
            "Text to image",
            "One prompt per row, one object per column; every picture has the same seed.",
            command(
                [f"{medium} of {{}} {PLACES[0]}" for medium in media],
                *(part for thing in things for part in ("--word", thing)),
            ),
            [
                (f"{medium} of ... {PLACES[0]}", [ask(f"{medium} of {thing} {PLACES[0]}", steps) for thing in things])
                for medium in media
            ],
            [things],
        ),
        Section(
            "variations",
            "Variations",
            "One prompt, six seeds: picture *i* of a request has seed *s + i*.",
            command([STAR], "--num-images", "6"),
            [(STAR, [ask(STAR, steps, seed=SEED + i) for i in range(6)])],
            [[f"seed {SEED + i}" for i in range(6)]],
        ),
        Section(
            "samplers",
            "Samplers",
            "The same prompt and seed, one sampler per column; the command is that of `euler`.",
            command([STAR], "--sampler", "euler"),
            [
                (f"{count} steps", [ask(STAR, count, sampler=sampler) for sampler in Sampler])
                for count in (max(steps // 3, 1), steps)
            ],
            [[sampler.value for sampler in Sampler]],
        ),
        Section(
            "image-to-image",
            "Image to image",
            "Noise is added to the first picture up to `--strength`, then it is denoised to the prompt.",
            command(["a painting of a blue heart in the meadow"], "--image", "star.png", "--strength", "0.7"),
            [
                (
                    f"{medium} of a blue heart in the meadow",
                    [
                        source,
                        *(
                            ask(f"{medium} of a blue heart in the meadow", steps, image=source, strength=strength)
                            for strength in strengths
                        ),
                    ],
                )
                for medium in ("a photo", "a painting")
            ],
            [["--image", *(f"strength {strength}" for strength in strengths)]],
        ),
        Section(
            "strokes",
            "Strokes",
            "Paint roughly what you want, with any program, and draw over it: `--strength` 0.6 to 0.8 keeps the layout "
            "and colours of the strokes, and the prompt adds the rest (SDEdit, arXiv 2108.01073).",
            command(["a photo of a red star in the snow"], "--image", "strokes.png", "--strength", "0.7"),
            [
                (
                    f"a photo of a {thing} in the snow",
                    [
                        strokes(),
                        *(
                            ask(f"a photo of a {thing} in the snow", steps, image=strokes(), strength=strength)
                            for strength in (0.5, 0.6, 0.7, 0.8)
                        ),
                    ],
                )
                for thing in ("red star", "red heart with white dots")
            ],
            [["--image", *(f"strength {strength}" for strength in (0.5, 0.6, 0.7, 0.8))]],
        ),
        Section(
            "masked-edit",
            "Masked edit",
            "Only the white area is regenerated (Blended Latent Diffusion); all other pixels stay unchanged.",
            command(
                ["a photo of a green ring in the meadow"],
                *("--image", "star.png", "--mask", "mask.png", "--strength", "1"),
            ),
            [
                (
                    "a photo of ... in the meadow",
                    [
                        source,
                        shown_mask,
                        *(
                            ask(f"a photo of {thing} in the meadow", steps, image=source, mask=mask, strength=1.0)
                            for thing in things[1:]
                        ),
                    ],
                )
            ],
            [["--image", "--mask", *things[1:]]],
        ),
        Section(
            "sizes",
            "Odd sizes",
            "The same exported graphs take any multiple of 8. The model was trained at 64x64 only: three of the four "
            "other sizes show a second star.",
            command([STAR], "--size", "120x72"),
            [(STAR, [ask(STAR, steps, size=size) for size in sizes])],
            [[f"{width}x{height}" for width, height in sizes]],
        ),
    ]


def of_words(learned_from: dict[str, list[Image]], steps: int) -> list[Section]:
    """The sections with learned words."""
    toy, gem = LOOKS.values()
    style, other_style = [*STYLES][:2]
    concepts = [part for token in LOOKS for part in ("--concept", f"{token.strip('<>')}.safetensors")]
    style_concept = ("--concept", "style.safetensors")
    return [
        Section(
            "learned-from",
            "What the words were learned from",
            f"`<toy>` ({toy.words}) and `<gem>` ({gem.words}) are objects that the miniature was not trained on, and "
            "`<style>` is a drawing style. Five drawn pictures each.",
            'ti-train toy --model miniature --token "<toy>" --init object --recipe fast '
            f"--seed {SEED} --output toy.safetensors",
            list(learned_from.items()),
            [PHOTOGRAPHED],
        ),
        Section(
            "word",
            "A learned word",
            "The words in places that their pictures do not show.",
            command([f"a photo of a {{}} {place}" for place in PLACES], *concepts),
            [
                (f"a photo of a {token} ...", [ask(f"a photo of a {token} {place}", steps) for place in PLACES])
                for token in LOOKS
            ],
            [PLACES],
        ),
        Section(
            "style",
            "A style word",
            "`<style>` was learned from pictures of five other objects.",
            command([f"a red star {place} in the style of <style>" for place in PLACES], *style_concept),
            [
                (
                    "a red star ... in the style of <style>",
                    [ask(f"a red star {place} in the style of <style>", steps) for place in PLACES],
                ),
                (
                    f"the same in the style of {style}, which the model knows",
                    [ask(f"a red star {place} in the style of {style}", steps) for place in PLACES],
                ),
            ],
            [PLACES],
        ),
        Section(
            "two-words",
            "Two words composed",
            "Both learned words in one prompt, and each with an object that the model knows.",
            command([f"a photo of a <toy> and a <gem> {place}" for place in PLACES], *concepts),
            [
                (
                    f"a photo of {things} ...",
                    [ask(f"a photo of {things} {place}", steps) for place in PLACES],
                )
                for things in ("a <toy> and a <gem>", "a <toy> and a red star", "a green ring and a <gem>")
            ],
            [PLACES],
        ),
        Section(
            "slider",
            "Between two words",
            "A word between two learned words: the number is the second word's share.",
            command([f"a photo of a {{<toy>|<gem>:0.5}} {PLACES[0]}"], *concepts),
            [
                (
                    f"a photo of a {{<toy>|<gem>:...}} {place}",
                    [ask(f"a photo of a {{<toy>|<gem>:{share}}} {place}", steps) for share in SHARES],
                )
                for place in PLACES[:2]
            ],
            [[f"{share}" for share in SHARES]],
        ),
        Section(
            "prompt-schedule",
            "Another word half-way",
            "`[a:b:0.2]` draws a for a fifth of the steps, then b.",
            command([f"a photo of a [red star:<toy>:0.2] {PLACES[0]}"], *concepts),
            [
                (
                    f"a photo of a [{thing}:<toy>:...] {PLACES[0]}",
                    [ask(f"a photo of a [{thing}:<toy>:{when}] {PLACES[0]}", steps) for when in FRACTIONS],
                )
                for thing in ("red star", "<gem>")
            ],
            [[f"{when}" for when in FRACTIONS]],
        ),
        Section(
            "negative-word",
            "A word to avoid",
            "A word in the negative prompt, from a file in the layout of popular negative words such as easynegative "
            "(`emb_params`; the file's name is the word). This one has the vectors of `<style>`.",
            command(
                [f"a red star {place}" for place in PLACES],
                *("--concept", AVOID, "--negative-prompt", "in the style of avoid"),
            ),
            [
                (label, [ask(f"a red star {place}{positive}", steps, negative_prompt=negative) for place in PLACES])
                for label, positive, negative in (
                    ("without", "", None),
                    ("--negative-prompt ...", "", "in the style of avoid"),
                    ("for comparison, in the style to avoid", " in the style of <style>", None),
                )
            ],
            [PLACES],
        ),
        Section(
            "word-and-style",
            "A word with a style word",
            "A learned object in a learned style, then in a known style and in known media.",
            command([f"a {{}} {PLACES[0]} in the style of <style>"], *concepts, *style_concept, "--word", "<toy>"),
            [
                (
                    f"... {PLACES[0]}, {token}",
                    [
                        ask(f"a {token} {PLACES[0]} in the style of <style>", steps),
                        ask(f"a {token} {PLACES[0]} in the style of {other_style}", steps),
                        ask(f"a drawing of a {token} {PLACES[0]}", steps),
                        ask(f"an icon of a {token} {PLACES[0]}", steps),
                        ask(f"a painting of a {token} {PLACES[0]}", steps),
                    ],
                )
                for token in LOOKS
            ],
            [["in the style of <style>", f"in the style of {other_style}", "drawing", "icon", "painting"]],
        ),
    ]


def drawn(model: Model, sections: Sequence[Section]) -> list[Image]:
    """Each section as one labelled picture; all requests are drawn together."""
    cells = [cell for section in sections for _, row in section.rows for cell in row]
    requests = [cell for cell in cells if isinstance(cell, Request)]
    images = (picture.image for picture in draw(model, *requests))
    return [
        labelled_grid(
            [[next(images) if isinstance(cell, Request) else cell for cell in row] for _, row in section.rows],
            [label for label, _ in section.rows],
            section.headings,
        )
        for section in sections
    ]


def refined(bundle: Path, work: Path, engine: str, likes: Sequence[str]) -> Path:
    """Refines a word by the answers to the first rounds, as docs/guide/refining.md shows; the sheet of the next one."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    line = [str(bundle), "--start", "object", "--token", "<mytoy>", "--output", str(work / "mytoy.safetensors")]
    line += ["--steps", "20", "--engine", engine]
    cli_refine.command.main([*line, *(part for answer in likes for part in ("--likes", answer))], standalone_mode=False)
    return work / "mytoy.rounds" / f"round-{len(likes) + 1}.png"


def markdown(sections: Sequence[Section], steps: int) -> str:
    """The generated part of docs/guide/gallery.md."""
    measured, _, line = provenance("gallery").partition("\n\n    ")
    parts = [
        measured,
        shell(line, "it takes minutes"),
        "This learns three words, exports the model and draws all pictures in one call. It leaves the bundle, the "
        "words, the folders of pictures they were learned from, `star.png`, `strokes.png` and `mask.png` in "
        "`build/gallery/`: run the commands below there. Some commands draw the whole sheet; for others, the labels "
        "say what to change for the remaining pictures. No picture was picked for its quality. Pictures have "
        "64x64 pixels and are shown enlarged.",
    ]
    settings = f" --guidance-scale {GUIDANCE:g} --steps {steps} --seed {SEED}"
    for section in sections:
        line = section.command + settings * section.command.startswith("ti-run")
        picture = f"![{section.title}](../gallery/{section.name}.png)"
        code = shell(line, "needs the files that the benchmark leaves, which has drawn the same")
        parts.append(f"## {section.title}\n\n{section.text}\n\n{code}\n\n{picture}")
    return "\n\n".join(parts)


def shell(line: str, reason: str) -> str:
    """A command as a block of the guide, with the reason why the tests do not run it; long ones on several lines."""
    rows = [""]
    for part in re.findall(r'(?:--\S+ )?(?:"[^"]*"|[^"\s-]\S*)|\S+', line):
        if len(f"{rows[-1]} {part}") > COLUMNS:
            rows.append("   ")
        rows[-1] = f"{rows[-1]} {part}" if rows[-1] else part
    code = " \\\n".join(rows)
    return f"<!-- not run: {reason} -->\n\n```sh\n{code}\n```"


def command(prompts: Sequence[str], *options: str) -> str:
    """A `ti-run` line as a reader would type it."""
    quoted = (f'"{word}"' if re.search(r"[ <>{}]", word) else word for word in (*prompts, *options))
    return " ".join(["ti-run bundle", *quoted])


def ask(prompt: str, steps: int, **settings: object) -> Request:
    """A request with the page's seed and guidance."""
    return Request(prompt, **{"seed": SEED, "steps": steps, "guidance_scale": GUIDANCE, **settings})  # type: ignore[arg-type]


def disc(size: int, radius: float) -> np.ndarray:
    """A mask [size, size] that is True within `radius` of the centre."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    inside: np.ndarray = np.hypot(x, y) <= radius
    return inside


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="miniature, or a diffusers directory of the same world")
    parser.add_argument("--bundle", type=Path, help="the exported model [default: exported first]")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learn-steps", type=int, help="steps per word [default: the recipe's]")
    parser.add_argument("--engine", default="onnxruntime", choices=[backend.value for backend in Backend])
    parser.add_argument(
        "--work", type=Path, default=Path("build/gallery"), help="folder for words, bundle and pictures"
    )
    parser.add_argument("--write", action="store_true", help="write docs/guide/gallery.md and its pictures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
