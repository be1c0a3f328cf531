import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from oneword.train.plots import curves, scatter, trajectories
from oneword.train.report import LearnedWord, report


class Page(HTMLParser):
    """A page's text and every address it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def a_page(words: int = 1) -> str:
    grey = np.full((8, 8, 3), 128, np.uint8)
    word = LearnedWord(
        token="<toy>",
        init="star & ring",
        output=Path("my toys/toy.safetensors"),
        vectors=2,
        pictures=[grey, grey],
        losses=[0.3, float("nan"), 0.2],
        sheets={5: Image.fromarray(grey), 10: Image.fromarray(grey)},
        prompts=["a photo of a {}"],
        likeness=0.875,
        length=3.25,
    )
    return report(
        [word] * words,
        model="miniature",
        settings={"steps": "10", "rate": "<cosine>", "min_snr": "null"},
        rates=[0.1, 0.05, 0.0],
        notes=["<toy> is where it started"],
        seconds={"load": 1.0, "learn": 2.0},
    )


def test_the_report_loads_nothing_and_shows_every_picture() -> None:
    page = Page(a_page())

    pictures = [address for address in page.addresses if address.startswith("data:image/png;base64,")]
    assert len(pictures) == 4
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)", a_page())


def test_the_report_describes_the_word_and_says_how_to_draw_it() -> None:
    text = Page(a_page()).text

    for part in (
        "<toy>",  # escaped in the page, so it is text
        "2 vectors, from star & ring,",
        "3.2 times as long",
        "likeness 0.875",
        "ti-run miniature.bundle 'a photo of a <toy>' --concept 'my toys/toy.safetensors'",
        "<toy> is where it started",
        "<cosine>",
        "in 3 s",
        "step 10",
    ):
        assert part in text, part


def test_the_report_names_its_parts_in_full_and_the_word_once_as_a_heading() -> None:
    assert re.findall(r"<h[12]>(.*?)</h[12]>", a_page(1)) == ["&lt;toy&gt;", "Curves", "The word", "Settings"]
    assert re.findall(r"<h[12]>(.*?)</h[12]>", a_page(2)) == [
        *("&lt;toy&gt;, &lt;toy&gt;", "Curves", "&lt;toy&gt;", "&lt;toy&gt;", "Settings")
    ]
    assert ">learning rate<" in a_page()
    assert ">rate<" not in a_page().replace("<td>rate<", "")
    assert "<td>steps<td>10</tr>" in a_page()
    assert "min_snr" not in a_page()  # it is not set


def test_curves_are_drawn_to_scale_and_reproducible() -> None:
    """A running mean of 2 over 1, 3, 5 is 2, 4: two points, the second higher (smaller y in SVG)."""
    svg = curves({"loss": [1.0, 3.0, 5.0]}, "loss", smooth=2)

    assert svg == curves({"loss": [1.0, 3.0, 5.0]}, "loss", smooth=2)
    lines = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in re.findall(r'<path d="([^"]+)"[^>]*clip', svg)]
    segments = [[(float(x), float(y)) for x, y in line] for line in lines if len(line) == 2]
    means = [line for line in segments if line[0][0] != line[1][0] and line[0][1] != line[1][1]]
    assert any(line[1][1] < line[0][1] for line in means)
    assert ">step<" in svg


def test_the_scatter_names_its_dots_and_axes() -> None:
    svg = scatter([("one-word", 0.8, 0.3), ("captions", 0.5, 0.2)], "editability, by hand")

    for text in ("one-word", "captions", "editability, by hand", "likeness"):
        assert f">{text}<" in svg


@pytest.mark.parametrize("word", ["<$^^$>", "<$a$>", "_toy"])
def test_the_names_of_words_are_drawn_as_they_are_written(word: str) -> None:
    for svg in (curves({word: [1.0, 2.0], "<b>": [2.0, 1.0]}, "loss"), scatter([(word, 0.8, 0.3), ("<b>", 0.5, 0.2)])):
        texts = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert texts[-2:] == [word, "<b>"]


def test_a_second_panel_of_the_scatter_has_only_the_near_points(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(Axes, "scatter", lambda axes, x, y, **options: drawn.append((id(axes), x, y, options["label"])))
    scatter([("a", 0.8, 0.3), ("bound", 0.1, 0.0)], near=["a"])

    first, second = dict.fromkeys(axes for axes, *_ in drawn)
    assert drawn == [(first, [0.3], [0.8], "a"), (first, [0.0], [0.1], "bound"), (second, [0.3], [0.8], "a")]


def test_a_trajectory_goes_through_medians_with_bars_between_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda _self, x, y, spread, **_: drawn.append((x, y, spread)))

    trajectories({"likeness": {"oneword": [(10.0, [1.0, 2.0, 3.0, 4.0, 9.0]), (20.0, [5.0])]}}, "seconds")

    [(x, y, (below, above))] = drawn
    assert (x, y.tolist(), below.tolist(), above.tolist()) == ([10.0, 20.0], [3.0, 5.0], [1.0, 0.0], [1.0, 0.0])
