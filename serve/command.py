"""`ti-serve`: its options, and what they start: the server, a check, a new key.

Not covered: what the server answers (`oneword.serve.app`), and the process that watches it (`oneword.serve.cli`).
"""

import asyncio
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from oneword.engines.errors import MissingPackage, UsageError
from oneword.runtime.commands import HELP, PATH, engine_option, json_option, print_json, version_option
from oneword.serve.keys import LOCAL, new_key
from oneword.serve.settings import B64_JSON, URL, Settings
from oneword.serve.watchdog import Heartbeat, Pulse

SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep the interpreter while the engine waits for it; Python's default is ten times as much."""

END_SECONDS: Final = 5.0
"""How long the engine may take to end after the server has."""

DATA: Final = "~/.local/share/oneword"
"""`settings.data_folder()` as --help shows it: on Linux, if XDG_DATA_HOME names no other."""


@click.command(name="ti-serve", context_settings=HELP)
@version_option
@click.argument("bundle", type=PATH, required=False)
@click.option("--words", metavar="FOLDER|URL", show_default=f"{DATA}/words", help="Where learned words are kept.")
@click.option(
    "--model", metavar="MODEL", help="The model that the bundle was exported from; needed only to learn words."
)
@click.option(
    "--jobs",
    type=PATH,
    metavar="FOLDER",
    show_default=f"{DATA}/jobs/<PORT>",
    help="Folder for this server's own learning jobs.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any but this machine's own needs --keys.",
)
@click.option("--port", type=int, default=8000, show_default=True, help="0 means any free port.")
@click.option(
    "--keys",
    type=PATH,
    help="File with the users' keys; all addresses except the page, /health and kept pictures then need one.",
)
@click.option("--new-key", metavar="NAME", help="Print a new key for NAME and its lines for --keys, then exit.")
@click.option("--max-rows", type=int, default=16, show_default=True, help="Maximum pictures per batch.")
@engine_option
@click.option("--threads", type=int, show_default="all cores", help="CPU threads of the engine.")
@click.option(
    "--max-wait",
    type=float,
    default=60.0,
    show_default=True,
    help="Longest estimated wait, in seconds; requests that would wait longer are refused.",
)
@click.option(
    "--deadline",
    type=float,
    show_default="ten times --max-wait",
    help="Seconds after which a request is dropped if the engine has taken none of its pictures.",
)
@click.option("--drain-seconds", type=float, show_default="no limit", help="Time to finish work when stopped.")
@click.option(
    "--hang-seconds",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds without a finished step after which the engine counts as hanging.",
)
@click.option("--public-url", metavar="URL", help="The address under which clients reach the server.")
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Another name of this server, such as that of its container; may be repeated.",
)
@click.option(
    "--allow-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Another site whose pages may use the server, such as https://chat.example.com; may be repeated.",
)
@click.option(
    "--response-format",
    type=click.Choice([B64_JSON, URL]),
    default=B64_JSON,
    show_default=True,
    help="How OpenAI's routes return pictures, if neither a request nor its model says.",
)
@click.option("--root-path", default="", metavar="PATH", help="The prefix that a proxy removes from paths.")
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    metavar="ADDRESS",
    help="A proxy whose X-Forwarded headers are trusted: an address or a network; may be repeated.",
)
@click.option("--supervise", is_flag=True, help="Start the server again if it fails or hangs.")
@click.option("--check", is_flag=True, help="Start, make one picture, print figures, then exit.")
@click.option(
    "--gc",
    "collect",
    is_flag=True,
    help="Delete from --words the vectors of words that were deleted or replaced more than a day ago, then exit.",
)
@json_option
def command(
    bundle: Path | None,
    new_key: str | None,
    supervise: bool,
    check: bool,
    collect: bool,
    as_json: bool,
    words: str | None,
    **options: Any,
) -> None:
    """Serve the model in BUNDLE over HTTP: OpenAI's images API, A1111's API, learned words, and a page."""
    heartbeat = Heartbeat.from_environment(lambda: Pulse.STARTING)
    if heartbeat is not None:
        heartbeat.start()
    logging.getLogger("oneword").addHandler(logging.NullHandler())  # until it serves, an error is its one line
    if new_key is not None:
        _print_key(new_key, as_json)
        return
    if bundle is None:
        raise UsageError("no bundle was given: ti-serve BUNDLE, which ti-export writes")
    settings = Settings(bundle, **options) if words is None else Settings(bundle, words, **options)
    _check_installed()
    if collect:
        _collect(settings, as_json)
        return
    if check:
        figures = asyncio.run(_check(settings))
        print_json(figures) if as_json else _print_check(figures)
        return
    if heartbeat is not None:
        heartbeat.ask(hang_seconds=settings.hang_seconds, supervise=supervise)
    serve(settings, heartbeat)


def serve(settings: Settings, heartbeat: Heartbeat | None = None) -> None:
    """Runs the server in this process until a signal or the watchdog ends it. Raises OnewordError if it cannot."""
    from oneword.serve.app import build_state, create_app
    from oneword.serve.server import Server, listening_socket

    sys.setswitchinterval(SWITCH_SECONDS)
    with listening_socket(settings) as listener:
        state = build_state(settings)
        log_to_standard_error()
        Server(create_app(state), state, heartbeat).run([listener])
    if not state.worker.join(END_SECONDS):  # it opens a model, in native code that an orderly end would crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def _check(settings: Settings) -> dict[str, object]:
    """Starts the engine, makes one picture, and returns the figures."""
    from oneword.runtime.request import Request
    from oneword.serve.app import build_state
    from oneword.serve.learning import check_model

    start = time.perf_counter()
    state = build_state(settings)
    if settings.model is not None:
        await check_model(settings.model, state.manifest)
    state.worker.start()
    await asyncio.to_thread(state.worker.wait_ready)
    ready = time.perf_counter() - start
    (picture,) = await state.pool.submit(LOCAL, Request("", seed=0)).wait()
    state.worker.stop()
    height, width, _ = picture.image.shape
    return {
        "model": state.name,
        "backend": state.worker.backend,
        "ready_seconds": round(ready, 3),
        "picture_seconds": round(time.perf_counter() - start - ready, 3),
        "size": f"{width}x{height}",
        "steps": picture.settings.steps,
        "slots": state.worker.slots,
    }


def _print_check(figures: dict[str, object]) -> None:
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' ')}: {value}")


def _collect(settings: Settings, as_json: bool) -> None:
    from oneword.serve.store import WordStore

    collected = WordStore(settings.words).gc(time.time())
    if as_json:
        print_json({"blobs": collected.blobs, "bytes": collected.bytes})
    else:
        click.echo(f"deleted {collected.blobs} files of vectors, {collected.bytes} bytes")


def _print_key(name: str, as_json: bool) -> None:
    key, lines = new_key(name)
    if as_json:
        print_json({"key": key, "lines": lines})
    else:
        click.echo(f"key, shown only now: {key}\nlines for the file of --keys:\n\n{lines}", nl=False)


def _check_installed() -> None:
    """Raises MissingPackage with the pip line if the server's packages are not there."""
    for package in ("fastapi", "fsspec", "prometheus_client", "python_multipart", "uvicorn"):
        try:
            __import__(package)
        except ImportError:
            raise MissingPackage(package.replace("_", "-"), "serve") from None


def log_to_standard_error() -> None:
    """The server's own lines and one line per request, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name, level in (("oneword", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
