"""What the `ti-*` commands share: help settings, option types, and one way to end."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

import oneword
from oneword.engines.errors import OnewordError

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
PATH = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
version_option = click.version_option(oneword.__version__, prog_name="oneword")


def run_command(command: click.Command, name: str) -> None:
    """Runs a command and exits with its `exit_status`."""
    sys.exit(exit_status(command, name))


def exit_status(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 done, 2 wrong usage, 130 interrupted, 1 any other error, in one line on standard error."""
    try:
        status = command.main(None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
    except OnewordError as error:
        message, code = str(error), error.exit_code
    except (KeyboardInterrupt, click.Abort):
        message, code = "interrupted", 130
    else:
        return status if isinstance(status, int) else 0
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    return code
