"""Pages that are written from the code, or that must cover all of it."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import oneword.runtime
from oneword.runtime.samplers import COLUMNS, Guidance, Sampler
from oneword.runtime.spacing import Spacing
from oneword.train.recipe import DEFAULT_RECIPE, RECIPES, Recipe

DOCS = Path(__file__).parents[2] / "docs"
UNSET = ("none", "all")
"""How the training page writes values that are empty."""


def test_the_commands_page_matches_help() -> None:
    expected = runpy.run_path(str(Path(__file__).with_name("commands.py")))["page"]()

    assert (DOCS / "guide" / "commands.md").read_text("utf-8") == expected, "run python tests/docs/commands.py"


def test_the_api_page_documents_every_public_name() -> None:
    documented = re.findall(r"^::: oneword\.runtime\.(\w+)$", (DOCS / "reference" / "api.md").read_text("utf-8"), re.M)

    assert sorted(documented) == sorted(oneword.runtime.__all__)


def test_the_samplers_page_lists_every_sampler_spacing_guidance_and_column() -> None:
    first_cells = re.findall(r"^\| `(\w[\w+-]*)` \|", (DOCS / "reference" / "samplers.md").read_text("utf-8"), re.M)

    assert first_cells == [*Sampler, *Spacing, *Guidance, *COLUMNS]


def test_the_training_page_lists_every_setting_of_a_recipe_with_its_values() -> None:
    page = (DOCS / "guide" / "training.md").read_text("utf-8")
    section = page.partition("## All settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`.*? \| `?(.+?)`? \| `?(.+?)`? \| `?(.+?)`? \|", section, re.M)

    assert sorted(name for name, *_ in rows) == sorted({field.name for field in fields(Recipe)} - {"name"})
    for recipe, column in ((DEFAULT_RECIPE, 1), ("fast", 2), ("one-word", 3)):
        shown = [f"{row[0]}={row[column]}" for row in rows if row[column] not in UNSET]
        assert Recipe(recipe).with_text(shown) == RECIPES[recipe]


def test_every_page_of_the_site_is_in_its_navigation_once() -> None:
    config = (DOCS.parent / "zensical.toml").read_text("utf-8")
    listed = re.findall(r"\"([\w/-]+\.md)\"", config)
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]

    assert sorted(listed) == sorted(pages)
