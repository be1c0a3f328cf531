"""`ti-serve`'s first process: starts the server in a child, watches it, and ends with its exit status.

It reads no arguments, so that it imports only the standard library and stays small. The child reads them, reports
errors in them, and sets how it is watched. Not covered: the options and the server (`serve.command`).
"""

import os
import sys
from typing import Any

from oneword.serve.watchdog import VARIABLE, WatchdogSettings, watch


def main() -> None:
    """The console script; in the child, the command itself."""
    if VARIABLE not in os.environ:
        sys.exit(watch([sys.executable, "-m", "oneword.serve.cli", *sys.argv[1:]], WatchdogSettings()))
    from oneword.runtime.commands import run_command
    from oneword.serve.command import command

    run_command(command, "ti-serve")


def __getattr__(name: str) -> Any:
    """`command`, as in the modules of the other scripts, but imported only when it is asked for."""
    if name != "command":
        raise AttributeError(name)
    from oneword.serve.command import command

    return command


if __name__ == "__main__":
    main()
