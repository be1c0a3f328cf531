"""`ti-train --polish`: a refined word learned further from its liked pictures and the user's own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from oneword.export.source import load_source
from oneword.runtime.aspects import Aspect
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.refine import Refinement, finish, judge, picture_file
from oneword.train.cli import main
from oneword.train.learn import Run
from oneword.train.norms import vocabulary_mean_norm

ASPECTS = (Aspect("colour", ("red", "blue")), Aspect("shape", ("star", "ring")))


@pytest.fixture
def refined(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A word of two rounds and its pictures: one of the first round is liked, two of the second."""
    source = load_source(tiny_model_dir)
    tokenizer, table = source.tokenizers["text_encoder"], source.text_encoders["text_encoder"]
    rows = table.get_input_embeddings().weight.detach().numpy()  # type: ignore[operator]
    lexicon = Lexicon(
        {"text_encoder": rows},
        lambda _, text: tokenizer(text, add_special_tokens=False).input_ids,
        digest=source.digest,
    )
    state = Refinement("<mytoy>", "cat", ASPECTS, source.digest)
    state = judge(judge(state, likes=[3], dislikes=[0]), likes=[1, 4])
    file = tmp_path / "mytoy.safetensors"
    save_concept(finish(state, lexicon), file)
    for number in (1, 2):
        for index in range(6):
            picture = picture_file(file, number, index)
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 60).convert("RGB").save(picture)
    return file


def line(folder: Path, model: Path, refined: Path, *more: str) -> list[str]:
    output = str(refined.parent / "p.safetensors")
    return [
        str(folder),
        "--model",
        str(model),
        "--polish",
        str(refined),
        "--output",
        output,
        "--batch-size",
        "2",
        *more,
    ]


def test_it_learns_the_word_s_vectors_further_from_the_folder_and_the_liked_pictures(
    folder: Path,
    tiny_model_dir: Path,
    refined: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs: list[Run] = []
    resume = Run.resume
    monkeypatch.setattr(Run, "resume", lambda self: (runs.append(self), resume(self))[1])
    start = load_concept(refined)

    once = ("--set", "warmup=0", "--learning-rate", "0.1", "--steps", "1")
    assert main(line(folder, tiny_model_dir, refined, *once, "--json")) == 0

    report = json.loads(capsys.readouterr().out)
    assert (report["recipe"]["name"], report["recipe"]["optimizer"]) == ("directional", "directional")
    rounds = refined.with_suffix(".rounds")
    liked = [rounds / "round-1" / "4.png", rounds / "round-2" / "2.png", rounds / "round-2" / "5.png"]
    [pictures] = runs[0].pictures
    assert [picture.path for picture in pictures] == [*sorted(folder.iterdir()), *liked]
    word = load_concept(report["concepts"][0]["output"])
    assert (word.token, word.provenance["init"]) == ("<mytoy>", "mytoy.safetensors")
    first, second = (concept.vectors["text_encoder"] for concept in (start, word))
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert len(second) == len(first) > 1
    np.testing.assert_allclose(cosines, 1 / np.sqrt(1 + 0.1**2), atol=1e-4)  # one step at the rate 0.1
    encoder = load_source(tiny_model_dir).text_encoders["text_encoder"]
    mean_length = vocabulary_mean_norm(encoder.get_input_embeddings().weight)  # type: ignore[operator]
    np.testing.assert_allclose(np.linalg.norm(second, axis=1), mean_length, rtol=1e-5)


def test_it_has_fifty_steps_unless_another_number_is_given(folder: Path, tiny_model_dir: Path, refined: Path) -> None:
    assert main(line(folder, tiny_model_dir, refined, "--batch-size", "1")) == 0

    with safe_open(refined.parent / "p.safetensors", "numpy") as file:
        assert file.metadata()["steps"] == "50"


def test_liked_pictures_without_a_caption_are_named_where_the_folder_has_captions(
    folder: Path, tiny_model_dir: Path, refined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in folder.iterdir():
        picture.with_suffix(".txt").write_text("a red <mytoy>")

    assert main(line(folder, tiny_model_dir, refined)) == 2

    rounds = refined.with_suffix(".rounds")
    liked = [rounds / "round-1" / "4.png", rounds / "round-2" / "2.png", rounds / "round-2" / "5.png"]
    expected = f"no caption for {', '.join(map(str, liked))}: give every picture a caption, or none"
    assert capsys.readouterr().err == f"ti-train: {expected}\n"


@pytest.mark.parametrize(
    ("has", "learned"),
    [
        (("text_encoder", "text_encoder_2"), "tiny_model_dir"),  # of SDXL, with a model of one text encoder
        (("text_encoder",), "tiny_sdxl_dir"),
    ],
)
def test_a_word_of_other_text_encoders_than_the_model_has_is_refused_in_one_line(
    folder: Path,
    refined: Path,
    has: tuple[str, ...],
    learned: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    word = load_concept(refined)
    [rows] = word.vectors.values()
    save_concept(replace(word, vectors=dict.fromkeys(has, rows)), refined)

    assert main(line(folder, request.getfixturevalue(learned), refined)) == 2

    error = capsys.readouterr().err
    assert f"{refined} has vectors for {', '.join(has)}, the model" in error
    assert error.endswith("give the model that the word was refined with\n")
    assert error.count("\n") == 1


def test_what_cannot_be_polished_is_refused_in_one_line(
    folder: Path, tiny_model_dir: Path, refined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned, disliked, missing = (tmp_path / f"{name}.safetensors" for name in ("learned", "disliked", "missing"))
    row = {"text_encoder": torch.ones(1, 32).numpy()}
    state = Refinement("<toy>", "cat", ASPECTS, "model")
    save_concept(Concept("<toy>", row), learned)
    save_concept(Concept("<toy>", row, {"refinement": judge(state, dislikes=[1]).to_json()}), disliked)
    save_concept(Concept("<toy>", row, {"refinement": judge(state, likes=[1]).to_json()}), missing)
    good = line(folder, tiny_model_dir, refined)
    for arguments, status, message in (
        (line(folder, tiny_model_dir, learned), 2, f"{learned} has no rounds of ti-refine"),
        (line(folder, tiny_model_dir, disliked), 2, "no picture was liked in the rounds of"),
        (line(folder, tiny_model_dir, missing), 1, "2.png is missing, a picture liked in a round of"),
        (line(folder, tiny_model_dir, tmp_path / "absent.safetensors"), 2, "there is no file"),
        ([*good, "--token", "<x>"], 2, "--polish takes one IMAGES_DIR and --output"),
        ([*good, "--init", "cat"], 2, "--polish takes one IMAGES_DIR and --output"),
        ([str(folder), *good], 2, "--polish takes one IMAGES_DIR and --output"),
    ):
        assert main(arguments) == status, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "p.safetensors").exists()
