"""`ti-refine` from the command line: rounds on a terminal and in scripts, continued, undone, and wrong usage."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from oneword.runtime import cli_refine
from oneword.runtime.aspects import DEFAULT_ASPECTS
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.drawing import draw
from oneword.runtime.grid import labelled_grid
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.model import Model
from oneword.runtime.refine import Refinement, judge, propose
from oneword.runtime.request import Request

ASPECTS = "colour: red, blue, green\nshape: star, ring\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "aspects.txt").write_text(ASPECTS)
    save_concept(Concept("<toy>", {"text_encoder": np.full((2, 32), 0.1, np.float32)}), tmp_path / "toy.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refine(monkeypatch: pytest.MonkeyPatch, *line: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ti-refine", *map(str, line)])
    with pytest.raises(SystemExit) as caught:
        cli_refine.main()
    return int(caught.value.code or 0)


def scripted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Path, *line: object
) -> dict[str, Any]:
    """The document of a run that succeeds."""
    assert refine(monkeypatch, bundle, *line, "--steps", 1, "--engine", "onnxruntime", "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_script_answers_a_round_at_a_time_and_the_word_keeps_its_rounds(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--start", "cat", "--aspects", "aspects.txt", "--output", "cat.safetensors", "--seed", 3]

    first = scripted(monkeypatch, capsys, tiny_bundle, *start)
    second = scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat.safetensors", "--likes", "2 5 -3")

    assert (first["rounds"], first["sheet"], first["aspects"]) == (0, "cat.rounds/round-1.png", {})
    assert (second["rounds"], second["sheet"], second["token"]) == (1, "cat.rounds/round-2.png", "<cat>")
    word = load_concept("cat.safetensors")
    state = Refinement.of(word)
    assert state is not None
    assert [judged.levels for judged in state.rounds] == [(0, 1, -1, 0, 1, 0)]
    assert (state.seed, word.identity) == (3, second["identity"])
    assert word.provenance["aspects"] == ", ".join(second["aspects"].values())
    assert len(second["candidates"]) == 6


@pytest.mark.parametrize("mistake", [["--prompt", "{} <nope>"], ["--prompt", "(a:1000) {}"], ["--guidance-scale", 101]])
def test_a_mistake_in_what_to_draw_leaves_no_file_that_the_next_try_would_find(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, mistake: list[object]
) -> None:
    line = [tiny_bundle, "--start", "cat", "--aspects", "aspects.txt", "--output", "cat.safetensors"]

    assert refine(monkeypatch, *line, *mistake) == 2
    assert not (folder / "cat.safetensors").exists()
    assert refine(monkeypatch, *line, "--steps", 1, "--engine", "onnxruntime") == 0


def test_a_sheet_and_files_show_the_candidates_with_one_prompt_and_seed(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--start", "cat", "--aspects", "aspects.txt", "--output", "cat.safetensors", "--candidates", 3]
    report = scripted(monkeypatch, capsys, tiny_bundle, *line, "--likes", "1", "--prompt", "a painting of {}")

    state = Refinement.of(load_concept("cat.safetensors"))
    assert state is not None
    concepts = propose(state, Lexicon.read(Bundle.open(tiny_bundle)))
    requests = [Request("a painting of <cat>", seed=1, steps=1, words={"<cat>": concept}) for concept in concepts]
    pictures = draw(Model.open(tiny_bundle, "onnxruntime"), *requests)
    headings = [f"{i}: {concept.provenance['aspects'] or 'as it began'}" for i, concept in enumerate(concepts, 1)]
    expected = labelled_grid([[picture.image for picture in pictures]], [""], [headings])
    with PIL.Image.open(report["sheet"]) as sheet:
        np.testing.assert_allclose(np.asarray(sheet).astype(int), expected.astype(int), atol=1)
    for index, picture in enumerate(pictures, 1):
        with PIL.Image.open(f"cat.rounds/round-2/{index}.png") as alone:
            np.testing.assert_allclose(np.asarray(alone).astype(int), picture.image.astype(int), atol=1)


def test_on_a_terminal_it_asks_until_the_rounds_are_done_and_an_answer_can_be_undone(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_refine, "on_terminal", lambda: True)
    line = [tiny_bundle, "--start", "cat", "--rounds", 2, "--steps", 1, "--engine", "onnxruntime"]

    result = CliRunner().invoke(cli_refine.command, list(map(str, line)), input="u\nx\n1\nu\n2 -3\n6>5>4>3>2>1\n")

    assert result.exit_code == 0, result.stderr
    assert "there is no round to undo" in result.stderr
    assert "the answer is 'x', but must be numbers such as 2 5 -3" in result.stderr
    assert result.stdout.splitlines()[0].startswith("<cat> after 2 rounds: ")
    state = Refinement.of(load_concept("cat-refined.safetensors"))
    assert state is not None
    assert [judged.levels for judged in state.rounds] == [(0, 1, -1, 0, 0, 0), (-5, -3, -1, 1, 3, 5)]


def test_quitting_keeps_the_rounds_so_far(tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_refine, "on_terminal", lambda: True)
    line = [tiny_bundle, "--start", "cat", "--steps", 1, "--engine", "onnxruntime"]

    result = CliRunner().invoke(cli_refine.command, list(map(str, line)), input="1\nq\n")

    assert result.exit_code == 0
    assert load_concept("cat-refined.safetensors").provenance["rounds"] == "1"


def test_undoing_and_answering_again_gives_the_word_of_the_other_answer(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["--start", "cat", "--rounds", 0]
    other = scripted(monkeypatch, capsys, tiny_bundle, *begin, "--likes", "1 -2", "--output", "a.safetensors")
    scripted(monkeypatch, capsys, tiny_bundle, *begin, *["--likes", "4"] * 3, "--output", "b.safetensors")

    again = ["--start", "b.safetensors", "--rounds", 0, "--undo", 3, "--likes", "1 -2"]
    assert scripted(monkeypatch, capsys, tiny_bundle, *again)["identity"] == other["identity"]


def test_undoing_deletes_the_pictures_of_the_rounds_that_other_answers_would_draw(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aspects = ["--aspects", "aspects.txt", "--candidates", 3]
    scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat", *aspects)
    for _ in range(2):
        scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat-refined.safetensors", "--likes", "1")
    first = Path("cat-refined.rounds/round-1/1.png").read_bytes()
    assert sorted(path.name for path in Path("cat-refined.rounds").glob("*.png")) == [
        f"round-{number}.png" for number in (1, 2, 3)
    ]

    line = ["--undo", 2, "--likes", "2", "--likes", "3", "--rounds", 2]
    scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat-refined.safetensors", *line)

    assert sorted(path.name for path in Path("cat-refined.rounds").iterdir()) == ["round-1", "round-1.png"]
    assert Path("cat-refined.rounds/round-1/1.png").read_bytes() == first


@pytest.mark.parametrize("start", ["cat", "other.safetensors"])
def test_pictures_of_another_refinement_are_neither_mixed_with_nor_deleted(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: str
) -> None:
    line = ["--aspects", "aspects.txt"]
    scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat", *line, "--candidates", 3)
    Path("cat-refined.safetensors").rename("other.safetensors")
    line = ["--start", start, *(line if start == "cat" else []), "--output", "cat-refined.safetensors"]

    assert refine(monkeypatch, tiny_bundle, *line) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("cat-refined.rounds has the pictures of another refinement: move it, or choose another --output")
    )
    assert Path("cat-refined.rounds/round-1/1.png").exists()
    assert not Path("cat-refined.safetensors").exists()


def test_undoing_on_a_terminal_deletes_the_pictures_of_later_rounds(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_refine, "on_terminal", lambda: True)
    line = [tiny_bundle, "--start", "cat", "--aspects", "aspects.txt", "--steps", 1, "--engine", "onnxruntime"]

    result = CliRunner().invoke(cli_refine.command, list(map(str, line)), input="1\nu\nq\n")

    assert result.exit_code == 0, result.stderr
    rounds = Path("cat-refined.rounds")
    assert sorted(path.name for path in rounds.iterdir()) == ["round-1", "round-1.png"]


def test_a_refined_word_that_was_renamed_keeps_its_new_name_and_its_rounds(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat", "--rounds", 0, "--likes", "1")
    save_concept(replace(load_concept("cat-refined.safetensors"), token="<gem>"), "gem.safetensors")

    report = scripted(monkeypatch, capsys, tiny_bundle, "--start", "gem.safetensors", "--rounds", 0, "--likes", "2")

    assert (report["token"], report["rounds"]) == ("<gem>", 2)
    assert load_concept("gem.safetensors").token == "<gem>"


@pytest.mark.parametrize("name", ["toy.SAFETENSORS", "./toy", "./folder/toy"])
def test_a_start_that_is_a_file_is_not_taken_for_a_word(
    tiny_bundle: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """Of these only the first is a file that is read; `./toy` and `./folder/toy` have no suffix of a word's file."""
    Path("folder").mkdir()
    Path("toy.safetensors").rename(name)
    line = ("--start", name, "--rounds", 0)
    if name == "toy.SAFETENSORS":
        assert scripted(monkeypatch, capsys, tiny_bundle, *line)["token"] == "<toy>"
        vectors = load_concept("toy-refined.safetensors").vectors["text_encoder"]
        np.testing.assert_allclose(vectors, np.full((2, 32), 0.1), rtol=1e-3)  # those of the file, as float16
        return
    assert refine(monkeypatch, tiny_bundle, *line) == 2
    assert "but must be a .safetensors file: convert it with ti-concept convert" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_word_with_the_name_of_a_file_or_folder_is_a_word(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "folder":
        Path("cat").mkdir()
    else:
        Path("cat").write_text("mine")

    assert scripted(monkeypatch, capsys, tiny_bundle, "--start", "cat", "--rounds", 0)["token"] == "<cat>"


def test_a_word_with_a_slash_is_a_word(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = scripted(monkeypatch, capsys, tiny_bundle, "--start", "black/white", "--rounds", 0)

    assert (report["token"], report["file"]) == ("<black_white>", "black_white-refined.safetensors")


def test_a_learned_word_is_refined_into_another_file(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("toy.safetensors").read_bytes()

    report = scripted(monkeypatch, capsys, tiny_bundle, "--start", "toy.safetensors", "--rounds", 0)

    assert report["file"] == "toy-refined.safetensors"
    assert Path("toy.safetensors").read_bytes() == before
    refined, learned = load_concept("toy-refined.safetensors"), load_concept("toy.safetensors")
    np.testing.assert_allclose(refined.vectors["text_encoder"], learned.vectors["text_encoder"], rtol=1e-3)


def test_a_refined_word_whose_rounds_cannot_be_read_is_a_new_start(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"text_encoder": np.full((1, 32), 0.1, np.float32)}
    save_concept(Concept("<cat>", row, {"refinement": "{}"}), "damaged.safetensors")

    report = scripted(monkeypatch, capsys, tiny_bundle, "--start", "damaged.safetensors", "--rounds", 0)

    assert (report["file"], report["rounds"]) == ("cat-refined.safetensors", 0)


def test_aspects_may_name_learned_words(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.txt").write_text("kind: <toy>, red")
    line = ["--start", "cat", "--aspects", "mine.txt", "--concept", "toy.safetensors", "--candidates", 16]

    report = scripted(monkeypatch, capsys, tiny_bundle, *line)

    assert set(report["candidates"]) == {"as it began", "<toy>", "red"}


def test_a_start_that_may_be_misspelt_is_noted(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = Lexicon.read(Bundle.open(tiny_bundle)).tokens("teapotte")
    assert count > 1
    aspects = ["--aspects", "aspects.txt"]

    assert refine(monkeypatch, tiny_bundle, "--start", "red teapotte", *aspects, "--rounds", 0) == 0
    assert capsys.readouterr().err == (
        f"note: 'teapotte' is {count} tokens in this model; a common word works better (check the spelling)\n"
    )
    for line in (["red", *aspects], ["toy.safetensors", *aspects], ["red_teapotte-refined.safetensors"]):
        assert refine(monkeypatch, tiny_bundle, "--start", *line, "--rounds", 0) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ([], 2, "Missing option '--start'"),
        (["--start", ""], 2, "'' has no token in this model"),
        (["--start", "absent.safetensors"], 2, "there is no file absent.safetensors"),
        (["--start", "<gone>"], 2, "no word '<gone>' is loaded"),
        (["--start", "cat", "--token", "a b"], 2, "token 'a b' is not safe"),
        (["--start", "cat", "--concept", "toy.safetensors", "--concept", "toy.safetensors"], 2, "two files hold the w"),
        (["--start", "cat", "--aspects", "absent.txt"], 2, "there is no file absent.txt"),
        (["--start", "cat", "--aspects", "toy.safetensors"], 1, "toy.safetensors is not UTF-8 text"),
        (["--start", "cat", "--aspects", "mine.txt"], 2, "no word '<gone>' is loaded, loaded words: none"),
        (["--start", "cat", "--candidates", 2], 2, "candidates is 2, but must be 3 to 16"),
        (["--start", "cat", "--seed", -1], 2, "seed is -1"),
        (
            ["--start", "cat", "--seed", 2**63 - 1],
            2,
            "seed is 9223372036854775807, but must be 0 to 922337203685477576",
        ),
        (["--start", "./nope.SAFETENSORS"], 2, "there is no file nope.SAFETENSORS"),
        (["--start", "nope.pt"], 2, "there is no file nope.pt"),
        (["--start", "./folder/nope"], 2, "there is no file folder/nope"),
        (["--start", "../nope"], 2, "there is no file ../nope"),
        (["--start", "/nope"], 2, "there is no file /nope"),
        (["--start", "~/nope"], 2, "there is no file ~/nope"),
        (["--start", "folder/nope.PNG"], 2, "there is no file folder/nope.PNG"),
        (
            ["--start", "word.pt"],
            2,
            "word.pt, but must be a .safetensors file: convert it with ti-concept convert word",
        ),
        (["--start", "cat", "--likes", "seven"], 2, "the answer is 'seven', but must be numbers such as 2 5 -3"),
        (["--start", "cat", "--likes", ""], 2, "the answer is '', but must be numbers"),
        (["--start", "cat", "--likes", "7"], 2, "names picture 7 of 6"),
        (["--start", "cat", "--likes", "2 -2"], 2, "both likes and dislikes picture 2"),
        (["--start", "cat", "--likes", "0 2"], 2, "has 0 beside other numbers"),
        (["--start", "cat", "--likes", "1>2"], 2, "does not rank each of 1 to 6 once"),
        (["--start", "cat", "--undo", 1], 2, "--undo is 1, but no round has been judged"),
        (["--start", "once.safetensors", "--undo", 9], 2, "--undo is 9, but only 1 round has been judged"),
        (["--start", "twice.safetensors", "--undo", 9], 2, "--undo is 9, but only 2 rounds have been judged"),
        (["--start", "cat", "--prompt", "a cat"], 2, "needs a {} where the word should be"),
        (["--start", "cat", "--output", "no/a.safetensors"], 2, "the folder no does not exist: create it first"),
        (["--start", "cat", "--output", "a.pt"], 2, "--output is a.pt, but must end in .safetensors"),
        (["--start", "cat", "--output", "toy.safetensors"], 2, "toy.safetensors exists: continue it with --start"),
        (["--start", "begun.safetensors", "--seed", 1], 2, "--seed cannot change in a refinement that has begun"),
        (["--start", "other.safetensors"], 2, "begun with another model"),
        (["--start", "wide.safetensors"], 2, "vectors of width 40"),
        (["--start", "cat", "--steps", 0], 2, "steps is 0, but must be 1 to 1000"),
        (["--start", "cat", "--engine", "none"], 2, "Invalid value for '--engine'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_no_word(
    line: list[object],
    status: int,
    message: str,
    tiny_bundle: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"text_encoder": np.full((1, 32), 0.1, np.float32)}
    state = Refinement("<cat>", "cat", DEFAULT_ASPECTS, Bundle.open(tiny_bundle).manifest.source.digest)
    for name, text in [
        ("begun", state.to_json()),
        ("once", judge(state, likes=[1]).to_json()),
        ("twice", judge(judge(state, likes=[1]), likes=[2]).to_json()),
        ("other", Refinement("<cat>", "cat", DEFAULT_ASPECTS, "another").to_json()),
    ]:
        save_concept(Concept("<cat>", row, {"refinement": text}), f"{name}.safetensors")
    save_concept(Concept("<cat>", {"text_encoder": np.ones((1, 40), np.float32)}), "wide.safetensors")
    Path("mine.txt").write_text("kind: <gone>, red")
    Path("word.pt").write_bytes(b"PK")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert refine(monkeypatch, tiny_bundle, *line) == status

    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
