import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.train.pictures import Moments
from oneword.train.prompts import caption_template
from oneword.train.recipe import Recipe
from oneword.train.word import Word, draw

RECIPE = Recipe(steps=4, batch_size=4)


def a_word() -> Word:
    mean = list(torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    return Word("<toy>", Moments(3, mean, [torch.full_like(mean[0], 0.1)] * 3, None), {}, ["a photo of a {}", "the {}"])


def test_draws_cover_pictures_and_timesteps_evenly() -> None:
    recipe = RECIPE.with_changes(batch_size=6)
    batch = draw(a_word(), recipe, 600)

    assert sorted(batch.timesteps.tolist()) == [int(batch.timesteps.min()) + 100 * i for i in range(6)]


def test_timesteps_stay_in_their_range() -> None:
    recipe = RECIPE.with_changes(batch_size=5, timesteps=(0.25, 0.75))
    batch = draw(a_word(), recipe, 1000)

    assert sorted(batch.timesteps.tolist()) == [int(batch.timesteps.min()) + 100 * i for i in range(5)]
    assert 250 <= batch.timesteps.min() < 350


@pytest.mark.parametrize(
    ("token", "caption", "template"),
    [
        ("<cat>", "a <cat> on a <cat>", "a {} on a {}"),
        ("mycat", "a mycat beside a mycathouse, mycat.", "a {} beside a mycathouse, {}."),
        ("mycat", " {one} mycat ", "(one) {}"),
        ("<\N{LATIN SMALL LETTER E WITH ACUTE}tui>", "an <e\N{COMBINING ACUTE ACCENT}tui>", "an {}"),
    ],
)
def test_a_bare_token_is_replaced_where_it_is_a_whole_word(token: str, caption: str, template: str) -> None:
    assert caption_template(caption, token, "a.txt") == template


def test_a_caption_with_the_token_inside_another_word_only_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a\.txt: the caption 'a mycathouse' does not contain the word 'mycat'"):
        caption_template("a mycathouse", "mycat", "a.txt")


def test_captions_replace_templates_and_match_their_pictures() -> None:
    """Moments 3 to 5 are the mirror images of pictures 0 to 2; a latent's value says which one was drawn."""
    moments = Moments(3, [torch.full((4, 4, 4), float(i)) for i in range(6)], [torch.zeros(4, 4, 4)] * 6, None)
    word = Word("<toy>", moments, {}, ["a photo of a {}"], ["one {}", "two {}", "three {}"])

    batch = draw(word, RECIPE.with_changes(batch_size=12), 1000, torch.Generator().manual_seed(0))

    drawn = [int(latents[0, 0, 0]) for latents in batch.latents]
    assert sorted(drawn) == sorted([*range(6)] * 2)
    assert list(batch.prompts) == [["one {}", "two {}", "three {}"][index % 3] for index in drawn]
