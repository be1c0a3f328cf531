"""The comparison of recipes: contenders by name, means over seeds, and the table, from measurements made up here."""

import pytest

from benchmarks import recipes
from oneword.engines.errors import UsageError


def test_a_contender_names_a_recipe_a_start_and_settings() -> None:
    assert recipes.recipe_and_init("fast")[1] == "object"
    recipe, init = recipes.recipe_and_init("directional:auto:steps=25,learning_rate=0.15")

    assert (recipe.name, recipe.steps, recipe.learning_rate, init) == ("directional", 25, 0.15, "auto")
    for wrong in ("slow", "fast:auto:speed=9"):
        with pytest.raises(UsageError):
            recipes.recipe_and_init(wrong)


def test_the_table_has_means_over_seeds_relative_to_the_captions() -> None:
    costs = {"seconds": 4.0, "passes": 60.0, "search": None}
    rows = [
        {"of": recipes.CAPTION, "look": look, "seed": seed, "right": right}
        for seed, right in ((0, 0.5), (1, 1.0))
        for look in (0, 1)
    ]
    rows += [
        {"of": "quick", "look": look, "seed": seed, "likeness": like, "right": 0.75, **costs}
        for seed, like in ((0, 0.9), (1, 1.0))
        for look in (0, 1)
    ]
    rows += [{"of": "fast:auto", "look": 0, "seed": 0, "likeness": 0.98, "right": 0.6, **costs, "search": 2.0}]
    rows[-1]["passes"] = 400.0
    rows += [{"of": "quick", "style": "<a>", "seed": 0, "likeness": 0.5, "editability": 0.25, **costs}]

    text = recipes.summary(recipes.means(rows))

    assert "| quick | **0.950 (0.900, 1.000)** | 1.000 (1.000, 1.000) | 0.500 | 0.250 | 4.0 | 60 |  |" in text
    assert "| fast:auto | 0.980 (0.980, 0.980) | **0.800 (0.800, 0.800)** |  |  | 4.0 | **400** | 2.0 |" in text
    assert "which is right in 75.0%" in text
