"""Prompt schedules against A1111's own test table, their limits, and the pictures they draw."""

import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oneword.engines.errors import UsageError
from oneword.runtime import prompt_schedule
from oneword.runtime.bundle import Bundle
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model
from oneword.runtime.noise import TorchGenerator
from oneword.runtime.prompt_schedule import prompts_by_step
from oneword.runtime.request import Request, resolve
from oneword.runtime.samplers import Sampler, make_schedule


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.open(tiny_bundle, "onnxruntime", threads=1)


# Steps 1 to 10, as the test table of A1111's prompt_parser.get_learned_conditioning_prompt_schedules gives them.
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", {10: "test"}),
        ("a [b:3]", {3: "a ", 10: "a b"}),
        ("a [b: 3]", {3: "a ", 10: "a b"}),
        ("a [[[b]]:2]", {2: "a ", 10: "a [[b]]"}),
        ("[(a:2):3]", {3: "", 10: "(a:2)"}),
        ("a [b : c : 1] d", {1: "a b  d", 10: "a  c  d"}),
        ("a[b:[c:d:2]:1]e", {1: "abe", 2: "ace", 10: "ade"}),
        ("a [unbalanced", {10: "a [unbalanced"}),
        ("a [b:.5] c", {5: "a  c", 10: "a b c"}),
        ("((a][:b:c [d:3]", {3: "((a][:b:c ", 10: "((a][:b:c d"}),
        (
            "[a|(b:1.1)]",
            {
                1: "a",
                2: "(b:1.1)",
                3: "a",
                4: "(b:1.1)",
                5: "a",
                6: "(b:1.1)",
                7: "a",
                8: "(b:1.1)",
                9: "a",
                10: "(b:1.1)",
            },
        ),
        (
            "[fe|]male",
            {
                1: "female",
                2: "male",
                3: "female",
                4: "male",
                5: "female",
                6: "male",
                7: "female",
                8: "male",
                9: "female",
                10: "male",
            },
        ),
        (
            "[fe|||]male",
            {1: "female", 2: "male", 3: "male", 4: "male", 5: "female", 8: "male", 9: "female", 10: "male"},
        ),
        ("[a:b:-3]", {10: "b"}),
        ("[a:b:99]", {10: "a"}),
        ("[a:b:1.5]", {10: "a"}),
        (r"\[a:b:3\]", {10: r"\[a:b:3\]"}),
        ("[a:b:c:3] [a:b:x]", {10: "[a:b:c:3] [a:b:x]"}),
    ],
)
def test_each_step_has_the_prompt_that_a1111_gives_it(prompt: str, expected: dict[int, str]) -> None:
    by_step = prompts_by_step(prompt, 10)
    start = 0
    for end, text in expected.items():
        assert by_step[start:end] == [text] * (end - start)
        start = end
    assert start == 10


def test_each_text_has_the_words_of_its_steps_and_no_others() -> None:
    assert prompts_by_step("[my|your][toy|gem]", 4) == ["mytoy", "yourgem"] * 2
    assert prompts_by_step("<[a|b]-[c|d]>", 4) == ["<a-c>", "<b-d>"] * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "[a|b|c|d|e|f|g] [h|i|j|k|l]",
            "the prompt changes between more than 32 texts in 50 steps, but at most 32 are allowed: use fewer",
        ),
        ("[a:b:3] " * 33, "the prompt's schedules have more than 64 texts: use fewer of them"),
        (
            "[a|b|c]" + "x" * 7_000,
            (
                "texts have 21003 characters in the first 3 of 50 steps, but may have at most 20000 together: "
                "shorten the prompt"
            ),
        ),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_too_many_texts_are_one_line_of_error_before_anything_runs(
    tiny_bundle: Path, prompt: str, message: str, field: str
) -> None:
    fields: dict[str, Any] = {"prompt": "a cat", field: prompt}
    with pytest.raises(UsageError, match=message):
        resolve(Request(**fields, steps=50), Bundle.open(tiny_bundle).manifest)


LONG = {
    "empty schedules": "[:" * 6_600 + "]" * 6_600,
    "weights": "[" * 9_900 + "a" + "]" * 9_900,
    "both kinds": "([" * 4_900 + "a" + "])" * 4_900,
    "crossed": "([" * 4_900 + "a" + ")]" * 4_900,
    "never closed": "[a:(" * 4_900,
    "never opened": ":1])" * 4_900,
    "colons": "[" + "a:" * 9_900 + "]",
    "bars": "[" * 4_900 + "a|:" * 3 + "]" * 4_900,
    "braces": "{" * 9_900 + "|" * 9_900,
}


@pytest.mark.parametrize("kind", LONG)
def test_reading_a_long_prompt_copies_each_of_its_pieces_a_few_times_at_most(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = 0
    merged = prompt_schedule._merged

    def counted(pieces: Any) -> Any:
        nonlocal copied
        copied += len(pieces)
        return merged(pieces)

    monkeypatch.setattr(prompt_schedule, "_merged", counted)
    assert prompts_by_step(LONG[kind], 2) == [LONG[kind]] * 2
    assert copied <= 2 * len(LONG[kind])


def test_schedules_within_schedules_copy_each_piece_a_few_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = Counter[int]()
    merged = prompt_schedule._merged
    monkeypatch.setattr(prompt_schedule, "_merged", lambda pieces: lengths.update([len(pieces)]) or merged(pieces))
    prompts_by_step("[" * 30 + r"\a" * 5_000 + ":1]" * 30, 2)
    assert sum(length * count for length, count in lengths.items()) < 3 * 5_000


def test_a_swap_at_the_start_or_end_draws_the_picture_of_one_prompt(model: Model) -> None:
    prompts = [
        "a red cat",
        "a blue dog",
        "a [red cat:blue dog:0]",
        "a [red cat:blue dog:4]",
        "a [red cat:blue dog:0.5]",
    ]
    cat, dog, at_start, at_end, half = (
        picture.image.astype(int)
        for picture in draw(model, *(Request(prompt, steps=4, seed=3, guidance_scale=4.0) for prompt in prompts))
    )

    assert np.abs(cat - dog).max() > 1
    assert np.abs(at_start - dog).max() <= 1
    assert np.abs(at_end - cat).max() <= 1
    assert min(np.abs(half - dog).max(), np.abs(half - cat).max()) > 1


def test_a_scheduled_picture_is_continued_from_the_first_prompts_state(model: Model) -> None:
    """By hand: the first steps with one prompt, then the others with another."""
    steps, seed, guidance = 5, 9, 3.0
    request = Request(
        "a [red cat:blue dog:0.4]", "[ring:0.8]", seed=seed, steps=steps, guidance_scale=guidance, sampler="euler"
    )
    [picture] = draw(model, request)
    manifest = model.manifest
    lines = make_schedule(manifest.scheduler, Sampler.EULER, steps, guidance_scale=guidance).table(manifest.columns)
    texts = ["a red cat", "a blue dog", "", "ring"]
    encoded = dict(zip(texts, model.encode([model.tokenize(text) for text in texts]), strict=True))

    factor = manifest.vae.factor
    shape = (1, manifest.vae.latent_channels, manifest.defaults.height // factor, manifest.defaults.width // factor)
    schedule = make_schedule(manifest.scheduler, Sampler.EULER, steps, guidance_scale=guidance)
    x = np.float32(schedule.init_scale) * TorchGenerator(seed).randn(shape[1:])[None]
    zeros = np.zeros(shape, np.float32)
    state = {"previous": zeros, "previous2": zeros, "noise": zeros, "known": zeros, "known_noise": zeros}
    layers = model.engine("denoise_step").inputs["branch_context"].axes[2]
    for step, line in enumerate(lines):
        cond, uncond = encoded["a red cat" if step < 2 else "a blue dog"], encoded["" if step < 4 else "ring"]
        branches = np.broadcast_to(np.arange(2)[:, None, None], (2, 2, layers if isinstance(layers, int) else 1))
        out = model.engine("denoise_step").run(
            {
                "sample": x,
                **state,
                "mask": np.ones((1, 1, *shape[2:]), np.float32),
                "schedule": line[None],
                "branch_row": np.zeros(2, np.int64),
                "branch_context": np.ascontiguousarray(branches, np.int64),
                "uncond_branch": np.zeros(1, np.int64),
                "cond_branch": np.ones(1, np.int64),
                "context": np.stack([uncond.hidden_states, cond.hidden_states]),
            }
        )
        x = out["next_sample"]
        state |= {"previous": out["denoised"], "previous2": state["previous"]}
    images, _ = model.decode(x)
    assert np.abs(picture.image.astype(int) - images[0]).max() <= 1


def test_fractions_count_the_steps_that_strength_leaves(tiny_bundle: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    request = Request("[a:b:0.5]", "[c:3]", steps=8, strength=0.5, image=image)
    settings = resolve(request, Bundle.open(tiny_bundle).manifest)
    assert settings.prompts == ["a", "a", "b", "b"]
    assert settings.negative_prompts == ["", "", "", "c"]
    assert settings.texts == ["a", "b", "", "c"]


@pytest.mark.parametrize("prompt", ["[a:b:{}x]", "{{<a>|<b>:{}"])
def test_many_digits_are_read_in_linear_time(prompt: str) -> None:
    """Digit by digit, from each digit on, they take 9 and 32 seconds."""
    start = time.process_time()
    with contextlib.suppress(UsageError):
        prompts_by_step(prompt.format("1" * 19_900), 50)
    assert time.process_time() - start < 2
