import math

import pytest

from oneword.engines.errors import UsageError
from oneword.train.recipe import RECIPES, Norm, Output, Rate, Recipe, named_recipe


def test_the_one_word_recipe_has_the_papers_settings() -> None:
    recipe = named_recipe("one-word")

    assert (recipe.steps, recipe.batch_size, recipe.vectors) == (5000, 4, 1)
    assert recipe.learning_rate == pytest.approx(0.005 * 2 * 4)  # base rate x GPUs x batch


def test_progressive_vectors_join_after_2000_and_4000_optimiser_steps() -> None:
    recipe = named_recipe("progressive-three")

    assert [recipe.vectors_at(step) for step in (0, 1999, 2000, 3999, 4000, 4999)] == [1, 1, 2, 2, 3, 3]


def test_a_shorter_progressive_run_adds_vectors_at_the_same_fractions() -> None:
    assert named_recipe("progressive-three").with_changes(steps=100).grow_at == (40, 80)


def test_the_precise_recipe_learns_output_vectors_at_a_rate_that_falls_as_the_rows_does() -> None:
    recipe = named_recipe("precise")

    assert (recipe.steps, recipe.batch_size, recipe.vectors, recipe.stages) == (200, 16, 1, 4)
    assert (recipe.output, recipe.values_only, recipe.betas) == (Output.LAYERS, True, (0.9, 0.99))
    assert 0.02 <= recipe.output_rate <= 0.08
    for step in (0, 3, 100, 199):
        share = recipe.output_rate_at(step) / recipe.output_rate
        assert share == pytest.approx(recipe.learning_rate_at(step) / recipe.learning_rate)


def test_every_recipe_is_listed_under_its_own_name() -> None:
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    with pytest.raises(UsageError, match="unknown recipe 'slow': choose from fast"):
        named_recipe("slow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"vectors": 76}, "vectors is 76"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"per_image": 2.0}, "per_image is 2.0"),
        ({"size": 8}, "size is 8: give a whole number from 16 to 4096"),
        ({"min_snr": 0.0}, "min_snr is 0.0"),
        ({"stop_below": 1.5}, "stop_below is 1.5"),
        ({"stop_below": 0.15, "steps": 310}, "stop_below looks back 310 steps and steps is 310"),
        ({"vectors": 2, "grow_at": (7, 3)}, "grow_at"),
        ({"vectors": 2, "grow_at": (9000,)}, "grow_at"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"init_weight": math.nan}, "init_weight is nan"),
        ({"stages": 4}, "stages is 4 without output vectors: set output to shared or layers"),
        ({"output": Output.LAYERS, "stages": 101}, "stages is 101"),
        ({"output_rate": 0.0}, "output_rate is 0.0"),
        ({"output": Output.SHARED, "vectors": 2, "grow_at": (5,)}, "grow_at is .* with output vectors"),
        ({"colour": "red"}, "has no colour"),
    ],
)
def test_invalid_settings_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe().with_changes(**changes)


def test_any_setting_can_be_given_as_text() -> None:
    recipe = named_recipe("fast").with_text(
        ["learning_rate = 0.5", "timesteps=0.2,0.9", "rate=constant", "min_snr=5", "flip=true", "stop_below=null"]
    )

    assert recipe == named_recipe("fast").with_changes(
        learning_rate=0.5, timesteps=(0.2, 0.9), rate=Rate.CONSTANT, min_snr=5.0, flip=True, stop_below=None
    )


def test_a_list_may_have_spaces_after_its_commas() -> None:
    recipe = Recipe().with_text(["betas=0.8, 0.9", "encoders=text_encoder, text_encoder_2"])

    assert (recipe.betas, recipe.encoders) == ((0.8, 0.9), ("text_encoder", "text_encoder_2"))


def test_changes_and_text_are_checked_together() -> None:
    """Each of these changes is refused without its text."""
    for changes, text in (
        ({"norm": Norm.FIXED}, "optimizer=adamw"),
        ({"stop_below": 0.15}, "steps=400"),
        ({"vectors": 2}, "grow_at=1"),
    ):
        base = named_recipe("progressive-three" if "vectors" in changes else "directional")
        with pytest.raises(UsageError):
            base.with_changes(**changes)
        base.with_text([text], **changes)
    assert Recipe().with_text(["steps=7"], steps=5).steps == 7


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_as_text_gives_the_same_recipe(recipe: Recipe) -> None:
    assert Recipe().with_text(f"{name}={value}" for name, value in recipe.as_text().items()) == recipe


def test_settings_are_written_as_on_the_command_line() -> None:
    recipe = named_recipe("progressive-three").with_changes(flip=True, encoders=("text_encoder", "text_encoder_2"))
    text = recipe.as_text()

    assert (text["grow_at"], text["betas"], text["flip"]) == ("2000,4000", "0.9,0.999", "true")
    assert (text["learning_rate"], text["init_weight"], text["timesteps"]) == ("0.04", "0", "0,1")
    assert (text["encoders"], text["min_snr"], text["rate"]) == ("text_encoder,text_encoder_2", "null", "constant")
    assert named_recipe("fast").as_text()["grow_at"] == "null"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=9", "'speed=9' is not a setting: give name=value, the names are name, subject"),
        ("steps=many", "steps is 'many': give a whole number$"),
        ("buckets=yes", "buckets is 'yes': give true or false$"),
        ("learning_rate=", "learning_rate is '': give a number$"),
        ("min_snr=some", "min_snr is 'some': give a number or null$"),
        ("words_per_call=1.5", "words_per_call is '1.5': give a whole number or null$"),
        ("rate=fast", "rate is 'fast': give constant or cosine$"),
        ("grow_at=1,x", "grow_at is '1,x': give whole numbers with commas between$"),
        ("timesteps=0.5", "timesteps is '0.5': give two numbers with commas between$"),
        ("timesteps=0.5,0.5", "timesteps is 0.5,0.5: give two rising numbers"),
        ("betas=0.9,1.5", "betas is 0.9,1.5: give two numbers"),
        ("words_per_call=0", "words_per_call is 0"),
    ],
)
def test_an_invalid_setting_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe().with_text([text])


def test_the_rate_warms_up_and_then_falls_as_half_a_cosine() -> None:
    recipe = Recipe(steps=100, learning_rate=0.4, rate=Rate.COSINE, warmup=3)

    assert recipe.learning_rate_at(0) == pytest.approx(0.1)
    assert recipe.learning_rate_at(50) == pytest.approx(0.2)
    assert recipe.learning_rate_at(99) == pytest.approx(0.2 * (1 + math.cos(0.99 * math.pi)))
