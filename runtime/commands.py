"""Shared by all commands: common options, progress on standard error, exit status. Not covered: the commands."""

import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import oneword
from oneword.engines.errors import ConceptError, OnewordError, UsageError
from oneword.engines.open import Backend
from oneword.runtime.backends import AUTO, FASTEST_FIRST
from oneword.runtime.concept import Concept, check_token, load_concept

HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
"""Context settings of every command."""
PATH: Final = click.Path(path_type=Path)
"""An option or argument that is a path."""

version_option = click.version_option(oneword.__version__, prog_name="oneword")
engine_option = click.option(
    "--engine",
    type=click.Choice([AUTO, *(backend.value for backend in Backend)]),
    default=AUTO,
    show_default=True,
    help=f"Backend that runs the graphs; auto picks the first of {', '.join(FASTEST_FIRST)} that is installed and can "
    "run them.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")


def size(value: str) -> tuple[int, int]:
    """Parses an option such as `512x768` to (width, height)."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{value!r} is not WIDTHxHEIGHT, for example 512x512")
    return int(match[1]), int(match[2])


def token_name(value: str) -> str:
    """Parses an option that names a word, such as `<toy>`."""
    try:
        check_token(value)
    except ConceptError as error:
        raise click.BadParameter(str(error)) from None
    return value


def load_concepts(files: Iterable[Path]) -> list[Concept]:
    """The words of `--concept`. Raises UsageError if two files hold the same word, and as `load_concept`."""
    loaded: dict[str, tuple[Path, Concept]] = {}
    for file in files:
        concept = load_concept(file)
        if concept.token in loaded:
            raise UsageError(
                f"two files hold the word {concept.token}: {loaded[concept.token][0]} and {file}; leave one out, or "
                "rename it: ti-concept convert FILE OUT --token NAME"
            )
        loaded[concept.token] = file, concept
    return [concept for _, concept in loaded.values()]


def refuse_file(option: str, folder: Path) -> None:
    """Raises UsageError if an option that takes a folder names a file."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option} {folder} is a file: give a folder")


def require_folder_of(option: str, file: Path) -> None:
    """Raises UsageError if the folder that an option's file would be written into does not exist."""
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{option} {file}: the folder {file.parent} does not exist: create it first")


def print_json(document: object) -> None:
    """Prints the document of `--json` on standard output."""
    click.echo(json.dumps(document, indent=1))


class ProgressBar:
    """A bar on a terminal, plain lines elsewhere; both on standard error.

    with ProgressBar("2 pictures", unit="step") as progress:
        progress.update(completed=7, total=40)      the bar with `step 7/40`, if there is one
        progress.line("1/2 output/a-cat-0.png")     a line, if there is no bar
        progress.note("the pictures repeat")        a line, always
    """

    def __init__(self, description: str, console: Console | None = None, unit: str = "") -> None:
        """`unit` names what `update` counts."""
        self.console = Console(stderr=True) if console is None else console
        self.unit = unit
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, disable=not self.on_terminal, transient=True)
        self._task = self._bar.add_task(description, total=None, count="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def on_terminal(self) -> bool:
        """Whether there is a bar."""
        return self.console.is_terminal

    def update(
        self, *, completed: float | None = None, total: float | None = None, description: str | None = None
    ) -> None:
        """Updates the bar; None leaves a value unchanged."""
        fields: dict[str, Any] = {}
        if completed is not None and total is not None:
            fields["count"] = f"{self.unit} {completed:g}/{total:g}".lstrip()
        self._bar.update(self._task, total=total, completed=completed, description=description, **fields)

    def line(self, message: str) -> None:
        """Prints a line if there is no bar."""
        if not self.on_terminal:
            self.note(message)

    def note(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


def run_command(command: click.Command, name: str) -> NoReturn:
    """Runs a command and exits with its `exit_status`. Names of files that are not UTF-8 are printed as they are."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")
    sys.exit(exit_status(command, name))


def exit_status(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 success, 2 wrong usage, 130 interrupted, 1 any other known error.

    An error is one line on standard error, never a traceback.
    """
    try:
        status = command.main(None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        program = name if error.ctx is None else error.ctx.command_path
        message, code = f"{error.format_message()} ({program} --help)", error.exit_code
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
    except OnewordError as error:
        message, code = str(error), error.exit_code
    except (KeyboardInterrupt, click.Abort):
        message, code = "interrupted", 130
    except MemoryError as error:
        message, code = f"out of memory ({error or 'the system has no more'}): process less at a time", 1
    except OSError as error:
        message, code = str(error), 1
    else:
        return status if isinstance(status, int) else 0
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    return code
