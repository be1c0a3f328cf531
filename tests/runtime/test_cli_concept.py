"""`ti-concept` from the command line, and its files in diffusers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

from oneword.runtime import cli_concept
from oneword.runtime.aspects import Aspect
from oneword.runtime.concept import Concept, load_concept, save_concept
from oneword.runtime.layouts import FoundConcept, read_concepts
from oneword.runtime.refine import Refinement, judge

ROWS = np.random.default_rng(0).normal(0, 0.02, (2, 32)).astype(np.float32)


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oneword.runtime.cli_concept", *map(str, arguments)], capture_output=True, text=True
    )


def _main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["ti-concept", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli_concept.main()
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out + output.err


def test_show_prints_one_json_document(tmp_path: Path) -> None:
    torch.save({"<toy>": torch.from_numpy(ROWS)}, tmp_path / "learned_embeds.bin")
    result = CliRunner().invoke(cli_concept.command, ["show", str(tmp_path / "learned_embeds.bin"), "--json"])
    [word] = json.loads(result.stdout)
    assert (word["token"], word["layout"]) == ("<toy>", "diffusers, pickle")
    assert word["vectors"]["text_encoder"]["count"] == 2
    assert word["vectors"]["text_encoder"]["norms"] == pytest.approx(np.linalg.norm(ROWS, axis=1), abs=1e-6)
    assert "text_encoder: 2 x 32" in CliRunner().invoke(cli_concept.command, ["show", str(tmp_path)]).stdout


def test_check_names_every_refused_file_and_exits_1(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"<toy>": ROWS}, tmp_path / "good.safetensors")
    safetensors.numpy.save_file({"<toy>": ROWS * np.float32(np.nan)}, tmp_path / "nan.safetensors")
    result = _run("check", tmp_path / "good.safetensors", tmp_path / "nan.safetensors", tmp_path / "absent.pt")
    assert result.returncode == 1
    good, nan, absent = result.stdout.splitlines()
    assert good.startswith("ok")
    assert "NaN or infinity" in nan
    assert "there is no file" in absent
    assert "Traceback" not in result.stderr
    assert _run("check", tmp_path / "good.safetensors").returncode == 0


def test_check_reports_a_file_that_fails_in_an_unforeseen_way_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.numpy.save_file({"<toy>": ROWS}, tmp_path / "good.safetensors")

    def read(path: Path) -> list[FoundConcept]:
        if path.name == "odd.pt":
            raise ZeroDivisionError("\x1b[31m \ud800\nno")
        return read_concepts(path)

    monkeypatch.setattr(cli_concept, "read_concepts", read)
    for option in ([], ["--json"]):
        code, output = _main(monkeypatch, capsys, "check", tmp_path / "odd.pt", tmp_path / "good.safetensors", *option)
        assert code == 1
        assert not any(character in output for character in "\x1b\ud800")
        if option:
            assert [result["ok"] for result in json.loads(output)] == [False, True]
        else:
            odd, good = output.splitlines()
            assert re.fullmatch(r"refused  .*odd.pt cannot be read \(ZeroDivisionError\): .\[31m . no", odd)
            assert good.startswith("ok")


@pytest.mark.parametrize("dtype", ["\x9b2J\x07ok       toy.safetensors", "\ud800"])
def test_check_prints_no_part_of_a_header_that_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    header = json.dumps({"<toy>": {"dtype": dtype, "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "bad.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    safetensors.numpy.save_file({"<toy>": ROWS}, tmp_path / "good.safetensors")

    code, output = _main(monkeypatch, capsys, "check", tmp_path / "bad.safetensors", tmp_path / "good.safetensors")

    assert code == 1
    bad, good = output.splitlines()
    assert bad.isprintable()
    assert bad.startswith("refused")
    assert good.startswith("ok")


@pytest.mark.parametrize("name", ["toy.safetensors", "toy.bin", "toy.pt", "named.safetensors"])
def test_a_word_with_a_name_that_is_refused_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rows, expected = torch.from_numpy(ROWS), {"text_encoder": ROWS}
    match name:
        case "toy.safetensors":
            safetensors.numpy.save_file({"<my toy>": ROWS}, tmp_path / name)
        case "toy.bin":
            torch.save({"<my toy>": rows}, tmp_path / name)
        case "toy.pt":
            torch.save({"string_to_param": {"my toy": rows}}, tmp_path / name)
        case _:
            wide = np.linspace(0.1, 0.2, 2 * 48, dtype=np.float32).reshape(2, 48)
            safetensors.numpy.save_file({"clip_l": ROWS, "clip_g": wide}, tmp_path / name, {"token": "my toy"})
            expected["text_encoder_2"] = wide
    line, out = ["convert", tmp_path / name, tmp_path / "out.safetensors"], tmp_path / "out.safetensors"

    refused, message = _main(monkeypatch, capsys, *line)
    code, output = _main(monkeypatch, capsys, *line, "--token", "<toy>")

    assert (refused, code) == (1, 0), output
    assert "my toy>' is not safe" in message or "'my toy' is not safe" in message
    word = load_concept(out)
    assert (word.token, word.vectors.keys()) == ("<toy>", expected.keys())
    for encoder, vectors in expected.items():
        np.testing.assert_array_equal(word.vectors[encoder], vectors)


def test_several_words_with_names_that_are_refused_are_not_renamed_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = torch.from_numpy(ROWS)
    torch.save({"<a b>": rows, "<c d>": rows}, tmp_path / "flat.bin")
    torch.save({"string_to_param": {"a b": rows, "c d": rows}}, tmp_path / "two.pt")
    for name in ("flat.bin", "two.pt"):
        line = ("convert", tmp_path / name, tmp_path / "out.safetensors", "--token", "<toy>")
        code, output = _main(monkeypatch, capsys, *line)
        assert code == 2
        assert "--token '<toy>' for 2 words" in output
    assert not (tmp_path / "out.safetensors").exists()


def test_a_converted_pickle_loads_in_diffusers(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.from_numpy(ROWS)}, "name": "x"},
        tmp_path / "toy.pt",
    )
    out = tmp_path / "toy.safetensors"
    assert _main(monkeypatch, capsys, "convert", tmp_path / "toy.pt", out, "--token", "<toy>")[0] == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_textual_inversion(out)
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
    loaded = pipeline.text_encoder.get_input_embeddings().weight[ids].detach().numpy()
    np.testing.assert_array_equal(loaded, ROWS)


def test_a_pair_of_diffusers_sdxl_files_becomes_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = np.linspace(0.1, 0.2, 2 * 48, dtype=np.float32).reshape(2, 48)
    safetensors.numpy.save_file({"<toy>": ROWS}, tmp_path / "1.safetensors")
    safetensors.numpy.save_file({"<toy>": wide}, tmp_path / "2.safetensors")
    out = tmp_path / "toy.safetensors"
    assert _main(monkeypatch, capsys, "convert", tmp_path / "2.safetensors", tmp_path / "1.safetensors", out)[0] == 0
    written, word = safetensors.numpy.load_file(out), load_concept(out)
    assert written.keys() == {"clip_l", "clip_g"}
    for key, encoder, expected in (("clip_l", "text_encoder", ROWS), ("clip_g", "text_encoder_2", wide)):
        np.testing.assert_array_equal(written[key], expected)
        np.testing.assert_array_equal(word.vectors[encoder], expected)


def test_a_pair_with_names_that_are_refused_or_differ_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = np.linspace(0.1, 0.2, 2 * 48, dtype=np.float32).reshape(2, 48)
    safetensors.numpy.save_file({"<my toy>": ROWS}, tmp_path / "1.safetensors")
    torch.save({"string_to_param": {"*": torch.from_numpy(wide)}, "name": "x"}, tmp_path / "2.pt")
    out = tmp_path / "toy.safetensors"
    line = ("convert", tmp_path / "1.safetensors", tmp_path / "2.pt", out)

    code, output = _main(monkeypatch, capsys, *line, "--token", "<toy>")

    assert code == 0, output
    word = load_concept(out)
    assert word.token == "<toy>"
    for encoder, expected in (("text_encoder", ROWS), ("text_encoder_2", wide)):
        np.testing.assert_array_equal(word.vectors[encoder], expected)


def test_several_words_become_a_folder_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"<a>": torch.from_numpy(ROWS), "<b>": torch.from_numpy(-ROWS)}, tmp_path / "two.bin")
    code, output = _main(monkeypatch, capsys, "convert", tmp_path / "two.bin", tmp_path / "words", "--json")
    assert code == 0
    assert [word["token"] for word in json.loads(output)] == ["<a>", "<b>"]
    for name, rows in (("a", ROWS), ("b", -ROWS)):
        word = load_concept(tmp_path / "words" / f"{name}.safetensors")
        assert word.token == f"<{name}>"
        np.testing.assert_array_equal(word.vectors["text_encoder"], rows)


def test_words_go_into_an_existing_folder_with_a_dot_in_its_name_and_into_a_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"<a>": torch.from_numpy(ROWS), "a": torch.from_numpy(-ROWS)}, tmp_path / "two.bin")
    (tmp_path / "v1.5").mkdir()

    assert _main(monkeypatch, capsys, "convert", tmp_path / "two.bin", tmp_path / "v1.5")[0] == 0

    for token, rows in (("<a>", ROWS), ("a", -ROWS)):
        word = load_concept(tmp_path / "v1.5" / f"{token}.safetensors")
        assert word.token == token
        np.testing.assert_array_equal(word.vectors["text_encoder"], rows)


def test_wrong_usage_exits_2_and_refused_files_exit_1_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"<a>": torch.from_numpy(ROWS), "<b>": torch.from_numpy(ROWS)}, tmp_path / "two.bin")
    safetensors.numpy.save_file({"<a>": ROWS}, tmp_path / "two.safetensors")
    safetensors.numpy.save_file({"<b>": ROWS}, tmp_path / "other.safetensors")
    (tmp_path / "file").write_text("")
    before = (tmp_path / "two.safetensors").read_bytes()
    out = tmp_path / "out.safetensors"
    for arguments, code, message in [
        (("convert", tmp_path / "two.bin", out), 2, "2 words do not fit into the file"),
        (("convert", tmp_path / "two.bin", tmp_path / "out.pt"), 2, "is neither a .safetensors file"),
        (("convert", tmp_path / "two.bin", tmp_path / "out", "--token", "<c>"), 2, "--token '<c>' for 2 words"),
        (("convert", tmp_path / "absent.pt", out), 2, "there is no file"),
        (("convert", tmp_path / "two.bin", tmp_path / "file"), 2, "file is a file: give a folder"),
        (
            ("convert", tmp_path / "other.safetensors", tmp_path / "no" / "x.safetensors"),
            2,
            "does not exist: create it",
        ),
        (("convert", tmp_path / "other.safetensors", out, "--token", "x y"), 2, "token 'x y' is not safe"),
        (("convert", tmp_path / "other.safetensors", tmp_path / "two.safetensors"), 2, "two.safetensors exists: "),
        (("show", tmp_path / "absent.pt"), 2, "there is no file"),
        (("show",), 2, "Missing argument"),
        (("sho",), 2, "No such command"),
    ]:
        actual, output = _main(monkeypatch, capsys, *arguments)
        assert (actual, len(output.strip().splitlines())) == (code, 1), output
        assert message in output
    assert not out.exists()
    assert (tmp_path / "two.safetensors").read_bytes() == before


def test_the_metadata_of_a_file_cannot_control_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"author": "\x1b]0;evil\x07 and \x9b31m", "where": "Köln"}
    safetensors.numpy.save_file({"<a>": ROWS}, tmp_path / "a.safetensors", metadata)
    for option in ([], ["--json"]):
        code, output = _main(monkeypatch, capsys, "show", tmp_path / "a.safetensors", *option)
        assert code == 0
        assert "evil" in output
        assert not any(character in output for character in "\x1b\x07\x9b")


def test_show_counts_the_rounds_of_a_refinement_and_json_has_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = judge(Refinement("<a>", "cat", (Aspect("colour", ("red", "blue")),), "model"), likes=[1])
    for name, text in (("a", state.to_json()), ("b", "{}")):
        save_concept(Concept("<a>", {"text_encoder": ROWS}, {"refinement": text}), tmp_path / f"{name}.safetensors")

    _, shown = _main(monkeypatch, capsys, "show", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    _, document = _main(monkeypatch, capsys, "show", tmp_path / "a.safetensors", "--json")

    assert [line for line in shown.splitlines() if "refinement" in line] == [
        "  refinement: 1 round, 1 aspect",
        "  refinement: cannot be read by this version",
    ]
    assert json.loads(document)[0]["provenance"]["refinement"] == state.to_json()


def test_a_word_for_only_the_second_encoder_is_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    save_concept(Concept("<a>", {"text_encoder_2": ROWS}), tmp_path / "a.safetensors")

    concept = load_concept(tmp_path / "a.safetensors")
    assert (concept.token, set(concept.vectors)) == ("<a>", {"text_encoder_2"})
    np.testing.assert_array_equal(concept.vectors["text_encoder_2"], ROWS)
