"""Shared by all commands: options, progress, exit status."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import click
import pytest
from rich.console import Console

import oneword
from oneword.engines.errors import EngineError, MissingPackage, UsageError
from oneword.runtime.commands import HELP, ProgressBar, json_option, print_json, run_command, size, version_option

COMMANDS = ("ti-run", "ti-export", "ti-concept", "ti-refine", "ti-train", "ti-eval")


def script(name: str) -> Callable[[], None]:
    """A function that runs the console script."""
    (entry,) = entry_points(group="console_scripts", name=name)
    return lambda: sys.exit(entry.load()())


def ending(monkeypatch: pytest.MonkeyPatch, outcome: Callable[[], Any], *line: str) -> int:
    """The exit status of a command that calls `outcome`."""

    @click.command(name="ti-do", context_settings=HELP)
    @version_option
    @click.option("--size", type=size)
    @json_option
    def command(size: tuple[int, int] | None, as_json: bool) -> None:
        outcome()
        if as_json:
            print_json({"size": size})

    monkeypatch.setattr(sys, "argv", ["ti-do", *line])
    with pytest.raises(SystemExit) as caught:
        run_command(command, "ti-do")
    return int(caught.value.code or 0)


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("option", "expected"),
    [("-h", "Usage: {name} [OPTIONS]"), ("--help", "Usage: {name} [OPTIONS]"), ("--version", "oneword, version ")],
)
def test_every_command_has_help_and_a_version(
    name: str, option: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, option])

    with pytest.raises(SystemExit) as caught:
        script(name)()

    assert not caught.value.code
    assert capsys.readouterr().out.startswith(expected.format(name=name))


@pytest.mark.parametrize(
    "line", [["ti-run"], ["ti-export"], ["ti-refine"], *(["ti-concept", c] for c in ("show", "check", "convert"))]
)
def test_every_command_has_a_json_option(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*line, "-h"])

    with pytest.raises(SystemExit):
        script(line[0])()

    assert " ".join(capsys.readouterr().out.split()).count("--json Print one JSON document on standard output.") == 1


@pytest.mark.parametrize(
    ("name", "words", "completions"),
    [
        ("ti-run", "ti-run --engine open", ["plain,openvino"]),
        ("ti-run", "ti-run --guidance-", ["plain,--guidance-scale", "plain,--guidance-rescale"]),
        ("ti-export", "ti-export --plans tensorrt-", ["plain,tensorrt-rtx"]),
        ("ti-concept", "ti-concept con", ["plain,convert"]),
    ],
)
def test_a_shell_completes_options_and_commands(name: str, words: str, completions: list[str]) -> None:
    def run(**variables: str) -> str:
        module = {"ti-run": "runtime.cli", "ti-export": "export.cli", "ti-concept": "runtime.cli_concept"}[name]
        line = [sys.executable, "-m", f"oneword.{module}"]
        return subprocess.run(line, env=os.environ | variables, capture_output=True, text=True, check=True).stdout

    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"

    assert f"complete -o nosort -F _{name.replace('-', '_')}_completion {name}" in run(**{variable: "bash_source"})
    answer = run(**{variable: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)})
    assert set(completions) <= set(answer.split())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("no\nsuch\tthing"), 2, "ti-do: no such thing"),
        (EngineError("graph 'vae_decoder' failed"), 1, "ti-do: graph 'vae_decoder' failed"),
        (
            MissingPackage("openvino", "openvino"),
            1,
            "ti-do: openvino is not installed: in a checkout of oneword, "
            "pip install -c constraints.txt -e '.[openvino]'",
        ),
        (PermissionError(13, "Permission denied", "secret"), 1, "ti-do: [Errno 13] Permission denied: 'secret'"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "ti-do: out of memory (Unable to allocate 9 TiB): process less"),
        (KeyboardInterrupt(), 130, "ti-do: interrupted"),
    ],
)
def test_a_command_that_fails_ends_with_one_line(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ending(monkeypatch, failing(error), "--json") == status

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().startswith(message)
    assert len(captured.err.strip().splitlines()) == 1


def test_the_name_of_a_file_that_is_not_utf8_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8", "strict"))

    assert ending(monkeypatch, lambda: click.echo(os.fsdecode(b"output\xff/a-cat-0.png"))) == 0
    sys.stdout.flush()
    assert out.getvalue() == b"output\xff/a-cat-0.png\n"


def test_letters_that_a_terminal_lacks_are_printed_as_the_user_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PYTHONIOENCODING=latin-1:replace."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "latin-1", "replace"))

    assert ending(monkeypatch, lambda: click.echo("\N{CAT FACE}.png")) == 0
    sys.stdout.flush()
    assert out.getvalue() == b"?.png\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["--size", "big"],
            "Invalid value for '--size': 'big' is not WIDTHxHEIGHT, for example 512x512 (ti-do --help)",
        ),
        (["--size", "٥x٥"], "is not WIDTHxHEIGHT"),
        (["--colour"], "No such option"),
        (["more"], "Got unexpected extra argument (more) (ti-do --help)"),
    ],
)
def test_wrong_usage_points_to_the_help(
    line: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, lambda: None, *line) == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_command_that_succeeds_prints_its_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, lambda: None, "--size", "640x480", "--json") == 0

    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"size": [640, 480]}
    assert captured.err == ""


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, lambda: None, "--version") == 0

    assert capsys.readouterr().out == f"oneword, version {oneword.__version__}\n"


def shown(terminal: bool) -> str:
    out = io.StringIO()
    with ProgressBar("2 [pictures]", Console(file=out, force_terminal=terminal, width=100), unit="step") as progress:
        progress.line("1/2 [a].png")
        progress.note("note: [b]")
        progress.update(completed=20, total=40, description="2 [pictures]")
    return out.getvalue()


def test_progress_is_plain_lines_without_a_terminal() -> None:
    assert shown(terminal=False) == "1/2 [a].png\nnote: [b]\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    output = shown(terminal=True)

    assert "2 [pictures]" in output
    assert "step 20/40" in output
    assert "note: [b]" in output
    assert "1/2 [a].png" not in output
