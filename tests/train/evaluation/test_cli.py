import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept, save_concept
from oneword.train.evaluation.cli import main
from oneword.train.evaluation.judge import Judge


@pytest.fixture
def judge_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A CLIP model with random weights and the tiny model's vocabulary."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model_dir / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    eos = tokenizer.eos_token_id
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    vision = {**small, "image_size": 32, "patch_size": 8}
    folder = tmp_path / "judge"
    CLIPModel(
        CLIPConfig(text_config={**text, "max_position_embeddings": 20}, vision_config=vision, projection_dim=8)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path: Path, tiny_bundle: Path, judge_dir: Path) -> list[str]:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    side = Bundle.open(tiny_bundle).manifest.defaults.width
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    rows = rng.normal(0, 0.1, (1, 32)).astype(np.float32)
    save_concept(Concept("<toy>", {"text_encoder": rows}, {"recipe": "fast"}), tmp_path / "toy.safetensors")
    word = ["--concept", str(tmp_path / "toy.safetensors"), "--images", str(tmp_path / "pictures")]
    return [
        str(tiny_bundle),
        *word,
        "--judge",
        str(judge_dir),
        "--prompts",
        "miniature",
        "--samples",
        "2",
        "--steps",
        "2",
    ]


def test_a_word_is_scored_and_its_samples_are_saved(
    arguments: list[str], judge_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([*arguments, "--output", str(tmp_path / "out"), "--json"])

    captured = capsys.readouterr()
    assert status == 0, captured.err
    report = json.loads(captured.out)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == report
    (word,) = report["words"]
    assert set(word["editability"]) == {"background", "style", "composition", "mean"}
    sheet = np.asarray(Image.open(tmp_path / "out" / "samples-0.png"))
    side = sheet.shape[1] // 2
    first = np.stack([sheet[:side, :side], sheet[:side, side:]])  # "a photo of a <toy>", two samples
    training = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "pictures").iterdir())])
    judge = Judge(judge_dir)
    expected = np.mean([a @ b for a in judge.pictures(first) for b in judge.pictures(training)])
    assert word["likeness"] == pytest.approx(expected, abs=1e-4)
    embedded = judge.pictures(training)
    (snow, night, desert) = judge.texts(["a photo of in the snow", "a photo of at night", "a photo of in the desert"])
    middle = embedded.mean(0) / np.linalg.norm(embedded.mean(0))
    ends = word["bounds"]
    assert ends["training pictures"]["editability"]["background"] == pytest.approx(
        np.mean([middle @ text for text in (snow, night, desert)]), abs=1e-4
    )
    pairs = [embedded[i] @ embedded[j] for i in range(3) for j in range(3) if i != j]
    assert ends["training pictures"]["likeness"] == pytest.approx(np.mean(pairs), abs=1e-4)
    assert set(ends["prompt without the word"]["editability"]) == set(word["editability"])
    drawn = ElementTree.fromstring((tmp_path / "out" / "figure.svg").read_text())
    assert {"fast", "training pictures", "prompt without the word", "editability, the paper's formula"} <= {
        text.text for text in drawn.findall(".//{*}text")
    }


def test_a_word_of_another_model_is_refused_before_anything_is_drawn(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_concept(Concept("<b>", {"text_encoder": np.full((1, 48), 0.1)}), tmp_path / "wide.safetensors")
    monkeypatch.setattr("oneword.train.evaluation.evaluate.draw", lambda *_, **__: pytest.fail("something was drawn"))

    more = ["--concept", str(tmp_path / "wide.safetensors"), "--images", str(tmp_path / "pictures")]

    assert main([*arguments, *more]) == 1
    assert "48" in capsys.readouterr().err


def test_words_of_one_recipe_have_their_names_in_the_figure(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"text_encoder": np.full((1, 32), 0.1)}
    save_concept(Concept("<b>", rows, {"recipe": "fast"}), tmp_path / "b.safetensors")
    more = ["--concept", str(tmp_path / "b.safetensors"), "--images", str(tmp_path / "pictures")]

    assert main([*arguments, *more, "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err

    drawn = ElementTree.fromstring((tmp_path / "out" / "figure.svg").read_text())
    assert {"fast <toy>", "fast <b>"} <= {text.text for text in drawn.findall(".//{*}text")}


def test_a_table_is_printed_without_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["word", "likeness", "background", "style", "composition", "mean"]
    assert lines[1].split()[0] == "<toy>"
    assert [line[:26].strip() for line in lines[2:4]] == ["prompt without the word", "training pictures"]
    assert lines[4] == "editability by the paper's formula"


@pytest.mark.parametrize("formula", ["paper", "release"])
def test_editability_of_a_style_by_either_formula(
    arguments: list[str], judge_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], formula: str
) -> None:
    """The paper uses the cosine of the mean embedding, its released code the mean of the cosines."""
    options = ["--subject", "style", "--prompts", "miniature", "--formula", formula, "--output", str(tmp_path / "out")]
    assert main([*arguments, *options, "--json"]) == 0

    (word,) = json.loads(capsys.readouterr().out)["words"]
    assert set(word["editability"]) == {"object", "background", "mean"}
    sheet = np.asarray(Image.open(tmp_path / "out" / "samples-0.png"))
    side = sheet.shape[1] // 2
    rows = [sheet[top : top + side] for top in range(side, 4 * side, side)]  # the first row is the likeness prompt's
    judge = Judge(judge_dir)
    expected = []
    for row, text in zip(rows, judge.texts(["a red star", "a blue ring", "a green heart"]), strict=True):
        samples = judge.pictures(np.stack([row[:, :side], row[:, side:]]))
        mean = samples.mean(0)
        cosines = {"paper": mean @ text / np.linalg.norm(mean), "release": (samples @ text).mean()}
        expected.append(cosines[formula])
    assert word["editability"]["object"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_wrong_usage_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        ([*arguments, "--images", "x"], 2, "1 concept and 2 folders"),
        ([*arguments, "--samples", "0"], 2, "--samples is 0"),
        ([*arguments, "--output", str(tmp_path / "file")], 2, "file is a file: give a folder"),
        ([*arguments, "--judge", str(tmp_path / "nobody")], 2, "does not exist"),
        ([*arguments, "--judge", str(tmp_path / "pictures")], 1, "has no CLIP model"),
    ]
    for command, status, message in cases:
        assert main(command) == status
        stderr = capsys.readouterr().err
        assert message in stderr
        assert stderr.count("\n") == 1
