"""Pages that are written from the code, or that must cover all of it."""

import re
import runpy
from pathlib import Path

import oneword.runtime
from oneword.runtime.samplers import COLUMNS, Guidance, Sampler
from oneword.runtime.spacing import Spacing

DOCS = Path(__file__).parents[2] / "docs"


def test_the_commands_page_matches_help() -> None:
    expected = runpy.run_path(str(Path(__file__).with_name("commands.py")))["page"]()

    assert (DOCS / "guide" / "commands.md").read_text("utf-8") == expected, "run python tests/docs/commands.py"


def test_the_api_page_documents_every_public_name() -> None:
    documented = re.findall(r"^::: oneword\.runtime\.(\w+)$", (DOCS / "reference" / "api.md").read_text("utf-8"), re.M)

    assert sorted(documented) == sorted(oneword.runtime.__all__)


def test_the_samplers_page_lists_every_sampler_spacing_guidance_and_column() -> None:
    first_cells = re.findall(r"^\| `(\w[\w+-]*)` \|", (DOCS / "reference" / "samplers.md").read_text("utf-8"), re.M)

    assert first_cells == [*Sampler, *Spacing, *Guidance, *COLUMNS]


def test_every_page_of_the_site_is_in_its_navigation_once() -> None:
    config = (DOCS.parent / "zensical.toml").read_text("utf-8")
    listed = re.findall(r"\"([\w/-]+\.md)\"", config)
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]

    assert sorted(listed) == sorted(pages)
