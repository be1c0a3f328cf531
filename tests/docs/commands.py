"""Writes docs/guide/commands.md from the commands' own `--help`.

    python tests/docs/commands.py

A test fails if the page is not what this writes.
"""

import importlib
import importlib.metadata
from pathlib import Path

import click

from oneword.engines.files import write_whole

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "commands.md"
WIDTH = 100
HEAD = """# Commands

<!-- Written by `python tests/docs/commands.py` from the commands' --help: edit the help texts. -->

Every command has `-h` and `--version`. With `--json`, which for `ti-concept` is an option of its subcommands, a command
prints one JSON document on standard output; progress goes to standard error. Errors are one line that says how to fix
them. The exit status is 0 for success, 2 for wrong usage, 1 for any other error and 130 after Ctrl-C, except
that `ti-serve` then finishes what it has accepted and exits with 0. An output file is written completely or not at all.

Guides: [Training](training.md) for `ti-train` (its [recipes](training.md#recipes) and
[settings](training.md#all-settings)) and `ti-eval`, [Refining by likes](refining.md) for `ti-refine`,
[The server](server.md) for `ti-serve`, [Samplers](../reference/samplers.md) for the samplers of `ti-run`.

For completion in bash: `eval "$(_TI_RUN_COMPLETE=bash_source ti-run)"`; in zsh and fish, `zsh_source` and
`fish_source`; the same for the other commands.
"""


def main() -> None:
    """Writes the page."""
    write_whole(PAGE, page().encode())


def page() -> str:
    """The page's text."""
    scripts = importlib.metadata.distribution("oneword").entry_points.select(group="console_scripts")
    commands = {script.name: importlib.import_module(script.module).command for script in scripts}
    names = ["ti-train", "ti-export", "ti-run", "ti-concept", "ti-refine", "ti-eval"]
    sections = [_section(name, commands[name]) for name in [*names, *sorted(commands.keys() - {*names})]]
    return "\n".join([HEAD, *sections])


def _section(name: str, command: click.Command, parent: click.Context | None = None) -> str:
    settings = {**command.context_settings, "max_content_width": WIDTH, "terminal_width": WIDTH}
    context = click.Context(command, parent, info_name=name, **settings)
    heading = f"{'##' if parent is None else '###'} {context.command_path}"
    text = f"{heading}\n\n```text\n{command.get_help(context)}\n```\n"
    subcommands = command.commands.items() if isinstance(command, click.Group) else ()
    return "\n".join([text, *(_section(sub, part, context) for sub, part in sorted(subcommands))])


if __name__ == "__main__":
    main()
