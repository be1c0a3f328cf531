"""`--init auto`: the gradient it uses, the words it finds, and runs that start from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oneword.engines.errors import EngineError
from oneword.export.source import Source, load_source
from oneword.runtime.concept import Concept, load_concept
from oneword.train import search
from oneword.train.cli import main
from oneword.train.initial import token_ids
from oneword.train.learn import learn
from oneword.train.learner import Learner
from oneword.train.miniature import world
from oneword.train.pictures import read_pictures
from oneword.train.recipe import Compute, Recipe, named_recipe
from oneword.train.tasks import Task, make_word
from oneword.train.word import draw
from tests.conftest import WORDS

RECIPE = Recipe(batch_size=4, compute=Compute.FP32)


def learner_of(source: Source, folder: Path, init: str) -> Learner:
    task = Task(folder, "<toy>", init)
    return Learner(source, [make_word(source, task, read_pictures(folder, 64), RECIPE, 0)], RECIPE, 0)


def test_the_gradient_is_the_slope_of_the_loss_and_nothing_is_learned(folder: Path, tiny_model_dir: Path) -> None:
    learner = learner_of(load_source(tiny_model_dir), folder, "auto")
    rows = learner.words[0].rows["text_encoder"]
    batches = [draw(learner.words[0], RECIPE, 1000, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    start = rows.detach().clone()

    gradient = learner.gradient(0, batches)["text_encoder"]

    torch.testing.assert_close(rows.detach(), start, rtol=0, atol=0)
    assert rows.grad is None
    step = 0.01 * gradient / gradient.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            rows.copy_(start + sign * step)
        losses.append(sum(learner.probe_loss(0, batch) for batch in batches) / 2)
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_the_gradient_leaves_none_of_output_vectors_behind(folder: Path, tiny_model_dir: Path) -> None:
    recipe = named_recipe("precise").with_changes(batch_size=2, compute=Compute.FP32)
    source = load_source(tiny_model_dir)
    word = make_word(source, Task(folder, "<toy>", "star"), read_pictures(folder, 64), recipe, 0)
    learner = Learner(source, [word], recipe, 0)

    learner.gradient(0, [draw(word, recipe, 1000, torch.Generator().manual_seed(1))])

    assert len(word.parameters()) == 2
    assert [parameter.grad for parameter in word.parameters()] == [None, None]


def test_the_words_with_the_lowest_losses_are_found(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every word tried, they are the best of all words of at least three letters."""
    monkeypatch.setattr(search, "TRIED", 100)
    source = load_source(tiny_model_dir)
    word = make_word(source, Task(folder, "<toy>", "auto"), read_pictures(folder, 64), RECIPE, 0)
    vocabulary = [word for word in WORDS if len(word) >= 3]

    [found] = search.words_of_pictures(source, [word], RECIPE, 0)

    losses = {}
    for init in vocabulary:
        learner, generator = learner_of(source, folder, init), torch.Generator().manual_seed(0)
        batches = [draw(learner.words[0], RECIPE, 1000, generator) for _ in range(8)]  # of 4 pictures: 32
        losses[init] = sum(learner.probe_loss(0, batch) for batch in batches)
    assert found.split() == sorted(vocabulary, key=lambda init: losses[init])[:3]


def test_the_words_tried_are_those_in_whose_direction_the_loss_falls_most(tiny_model_dir: Path) -> None:
    """For a gradient against one row, the slope along each row is minus its cosine to that row, so it comes first."""
    source = load_source(tiny_model_dir)
    table = source.text_encoders["text_encoder"].get_input_embeddings().weight.detach()  # type: ignore[operator]
    ids = {name: token_ids(source.tokenizers["text_encoder"], name) for name in WORDS if len(name) >= 3}
    rows = {name: table[of_word[0]] for name, of_word in ids.items() if len(of_word) == 1}
    star = rows["star"]
    cosines = {name: float(torch.cosine_similarity(row, star, dim=0)) for name, row in rows.items()}

    tried = list(search._steepest(source, {"text_encoder": -star[None]}))

    assert tried == sorted(cosines, key=lambda name: -cosines[name])[: search.TRIED]
    assert tried[0] == "star"


@pytest.mark.parametrize("quantity", ["gradient", "loss"])
def test_what_is_not_finite_is_refused_in_one_line(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, quantity: str
) -> None:
    if quantity == "gradient":
        nan = {"text_encoder": torch.full((1, 32), torch.nan)}
        monkeypatch.setattr(Learner, "gradient", lambda *arguments: nan)
    else:
        monkeypatch.setattr(Learner, "probe_loss", lambda *arguments: float("nan"))
    source = load_source(tiny_model_dir)
    word = make_word(source, Task(folder, "<toy>", "auto"), read_pictures(folder, 64), RECIPE, 0)

    with pytest.raises(EngineError, match=f"^the {quantity} of '<toy>' is not finite, so no start can be found"):
        search.words_of_pictures(source, [word], RECIPE, 0)


def test_on_the_miniature_every_word_found_shares_something_with_the_look(tmp_path: Path) -> None:
    """Its shape, its first colour, or its pattern in the second colour; two of three words one of the first two. Words
    of the miniature are shapes, colours and made-up nouns, each of which names a look."""
    look = world.HELD_OUT_LOOKS[4]
    for number, background in enumerate(list(world.BACKGROUNDS)[:5]):
        pixels, _ = world.render(world.Scene((world.Thing(look),), background), number)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    source = load_source("miniature")
    recipe = named_recipe("fast")
    word = make_word(source, Task(tmp_path, "<toy>", "auto"), read_pictures(tmp_path, 64), recipe, 0)

    [found] = search.words_of_pictures(source, [word], recipe, 0)

    shared = 0  # words that share the shape or the first colour
    for name in found.split():
        named = {name}
        if noun := world.NOUNS.get(name):
            named = {noun.shape, noun.colour, f"{noun.second_colour} {noun.pattern}"}
        assert named & {look.shape, look.colour, f"{look.second_colour} {look.pattern}"}
        shared += bool(named & {look.shape, look.colour})
    assert shared >= 2


def test_the_command_says_what_it_found_and_starts_from_the_mean_of_it(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(init: str, name: str) -> list[str]:
        options = [str(folder), "--model", str(tiny_model_dir), "--token", "<toy>", "--output", str(tmp_path / name)]
        return [*options, "--init", init, "--steps", "2", "--batch-size", "2", "--json"]

    assert main(line("auto", "a.safetensors")) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["concepts"][0]["init"]
    assert main(line(found, "b.safetensors")) == 0

    assert len(found.split()) == 3
    assert f"note: <toy> starts from the mean of: {found}" in captured.err
    found_start, same_start = (load_concept(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert found_start.provenance["init"] == found
    assert found_start.identity == same_start.identity


def test_words_found_on_a_cluster_are_reported_as_those_found_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        number: Concept(token, {"text_encoder": np.ones((1, 32), np.float32)}, {"init": init})
        for number, (token, init) in enumerate({"<toy>": "ring pink dots", "<gem>": "star"}.items())
    }
    monkeypatch.setattr("oneword.train.ray.learn_on_ray", lambda *arguments, **options: [(words, [])])
    options = [str(folder), str(folder), "--model", "miniature", "--token", "<toy>", "--token", "<gem>"]
    options += ["--init", "auto", "--init", "star", "--ray", "local", "--json"]

    outputs = [str(tmp_path / name) for name in ("toy.safetensors", "gem.safetensors")]
    assert main([*options, "--output", outputs[0], "--output", outputs[1]]) == 0

    reported = json.loads(capsys.readouterr().out)["concepts"]
    assert [word["init"] for word in reported] == ["ring pink dots", "star"]


def test_a_run_that_found_its_start_resumes_with_the_same_bits_and_without_a_search(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [Task(folder, "<toy>", "auto"), Task(folder, "<gem>", "star")]
    recipe = named_recipe("directional").with_changes(steps=3, batch_size=2)
    *_, whole = learn(tiny_model_dir, tasks, recipe)

    run = learn(tiny_model_dir, tasks, recipe, checkpoints=tmp_path / "run", checkpoint_every=1)
    next(run)
    run.close()
    monkeypatch.setattr("oneword.train.learn.words_of_pictures", lambda *arguments: pytest.fail("searched again"))
    *_, resumed = learn(tiny_model_dir, tasks, recipe, checkpoints=tmp_path / "run")

    for first, second in zip(whole.concepts, resumed.concepts, strict=True):
        np.testing.assert_array_equal(first.vectors["text_encoder"], second.vectors["text_encoder"])
        assert first.provenance == second.provenance
    assert whole.concepts[1].provenance["init"] == "star"


def test_a_start_is_found_for_all_text_encoders_of_a_model(folder: Path, tiny_sd3_dir: Path) -> None:
    recipe = named_recipe("directional").with_changes(steps=1, batch_size=2)

    *_, last = learn(tiny_sd3_dir, [Task(folder, "<toy>", "auto")], recipe)

    [concept] = last.concepts
    assert len(concept.provenance["init"].split()) == 3
    assert set(concept.vectors) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
