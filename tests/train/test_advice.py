from pathlib import Path

import pytest
import torch

from oneword.export.source import load_source
from oneword.train import advice
from oneword.train.learner import Learner
from oneword.train.pictures import Moments
from oneword.train.prompts import OBJECT_PROBES, OBJECT_TEMPLATES
from oneword.train.recipe import Compute, Recipe
from oneword.train.word import Word

QUICK = Recipe(steps=2, batch_size=2, learning_rate=0.05, weight_decay=0.0, compute=Compute.FP32)


@pytest.fixture
def learner(tiny_model_dir: Path) -> Learner:
    return a_learner(tiny_model_dir, QUICK)


def a_learner(model: Path, recipe: Recipe) -> Learner:
    rng = torch.Generator().manual_seed(0)
    mean = list(torch.randn(3, 4, 4, 4, generator=rng))
    rows = {"text_encoder": torch.randn(recipe.vectors, 32, generator=rng) * 0.1}
    word = Word(
        "<toy>",
        Moments(3, mean, [torch.zeros(4, 4, 4)] * 3, None),
        rows,
        ["{}"] if recipe.vectors > 1 else OBJECT_TEMPLATES,
    )
    return Learner(load_source(model), [word], recipe, seed=7)


def test_a_word_that_learns_well_needs_no_advice(learner: Learner) -> None:
    learner.step()
    learner.words[0].start_loss = 2 * learner.probe_loss(0)

    assert list(advice.after(learner, 0)) == []


def test_a_word_that_has_not_moved_is_reported(learner: Learner) -> None:
    assert ["<toy> is where it started" in note for note in advice.after(learner, 0)] == [True]


def test_a_loss_that_did_not_fall_is_reported(learner: Learner) -> None:
    learner.step()
    learner.words[0].start_loss = learner.probe_loss(0)

    (note,) = advice.after(learner, 0)

    assert "the loss on a fixed batch was" in note
    assert "it did not fall" in note


def test_a_word_too_long_for_the_probes_is_not_an_error(tiny_model_dir: Path) -> None:
    """A prompt has 18 tokens: 17 vectors leave room for one more word."""
    learner = a_learner(tiny_model_dir, QUICK.with_changes(vectors=17))
    learner.step()
    learner.words[0].start_loss = 2 * learner.probe_loss(0)

    assert list(advice.after(learner, 0)) == []


def test_a_word_that_drowns_out_its_prompt_is_reported(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model responds to everything a little, so the threshold is set just above and below its response."""
    learner.step()
    word = learner.words[0]
    word.start_loss = 2 * learner.probe_loss(0)
    share = learner.response(0, OBJECT_PROBES, word.rows) / learner.response(0, OBJECT_PROBES, word.initial)

    monkeypatch.setattr(advice, "DEAF", share * 1.01)
    (note,) = advice.after(learner, 0)
    monkeypatch.setattr(advice, "DEAF", share * 0.99)

    assert f"changes pictures {share:.0%} as much as with its init: likely overfit" in note
    assert list(advice.after(learner, 0)) == []
