"""The paper's comparison: which steps a set-up takes, and the claim about our recipes, from scores made up here."""

from argparse import Namespace

import pytest

from benchmarks import paper


def test_only_the_papers_set_ups_take_the_steps_of_the_command() -> None:
    steps = {setup: paper.recipe_of(setup, 300).steps for setup in paper.SETUPS}

    ours = {"fast": 200, "quick": 50, "directional": 50, "precise": 200}
    assert {setup: steps.pop(setup) for setup in ours} == ours
    assert set(steps.values()) == {300}
    assert len(steps) == 9


def test_measurements_with_other_settings_are_left_out() -> None:
    args = Namespace(steps=300, samples=16, sample_steps=20, balanced_samples=64)
    word = {"samples": 16, "steps": 20}

    assert paper.is_asked_for({**word, "setup": "one-word", "learned": 300}, args)
    assert paper.is_asked_for({**word, "setup": "quick", "learned": 50}, args)
    assert paper.is_asked_for({**word, "setup": "caption, long"}, args)
    assert paper.is_asked_for({"bias": "flower", "samples": 64, "steps": 20}, args)
    assert not paper.is_asked_for({**word, "setup": "quick", "learned": 300}, args)
    assert not paper.is_asked_for({**word, "setup": "caption, long", "samples": 64}, args)
    assert not paper.is_asked_for({"bias": "flower", "samples": 16, "steps": 20}, args)


@pytest.mark.parametrize(
    ("likeness", "editability", "holds"),
    [(0.78, 0.19, True), (0.751, 0.1885, True), (0.74, 0.19, False), (0.78, 0.187, False)],
)
def test_our_recipes_are_compared_with_three_vectors_and_one_word(
    likeness: float, editability: float, holds: bool
) -> None:
    """Three vectors have a likeness of 0.76, one word an editability of 0.19; the margins are 0.01 and 0.002."""

    def scores(like: float, edit: float) -> dict[str, float]:
        return {"look likeness": like, "look editability": edit}

    means = {"one-word": scores(0.74, 0.19), "three-vectors": scores(0.76, 0.18)}
    means["precise"] = scores(likeness, editability)

    claim = "precise has the likeness of three-vectors at the editability of one word (within 0.01 and 0.002)"
    assert (claim, holds) in paper.order(means)


def test_set_ups_are_compared_with_one_word_look_by_look() -> None:
    """Differences of 0.1 and 0.3 in likeness: 0.2, and a standard error of 0.1."""

    def row(setup: str, word: str, like: float, edit: float) -> dict[str, object]:
        return {"setup": setup, "word": word, "learned": 300, "likeness": like, "editability": edit}

    rows = [
        row("one-word", "<look0>", 0.5, 0.2), row("one-word", "<look1>", 0.6, 0.1),
        row("per-image", "<look1>", 0.9, 0.1), row("per-image", "<look0>", 0.6, 0.2),
        row("one-word", "<style0>", 0.1, 0.1), row("per-image", "<style0>", 0.9, 0.9),
        {"setup": "caption, long", "word": "<look0>", "likeness": 0.9, "editability": 0.9},
    ]  # fmt: skip

    assert paper.differences(rows, "look").splitlines()[2:] == ["| per-image | 0.2000 ± 0.1000 | 0.0000 ± 0.0000 |"]
