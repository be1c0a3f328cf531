"""How a console script ends: its exit status, and one line on standard error when it could not be done."""

import sys

import click

from oneword.engines.errors import OnewordError


def run_command(command: click.Command, name: str) -> None:
    """Runs a command and exits: 0 done, 2 wrong usage, 130 stopped, 1 anything else that can be named."""
    try:
        status = command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
    except OnewordError as error:
        message, code = str(error), error.exit_code
    except (KeyboardInterrupt, click.Abort):
        message, code = "stopped", 130
    else:
        sys.exit(status if isinstance(status, int) else 0)
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(code)
