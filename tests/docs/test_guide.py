"""Every code block of the README and the guide runs as it is written, in the order of its page.

A block that is not run has `<!-- not run: REASON -->` above it. Each page gets a folder with the files it starts from.
Only `ti-export` is replaced, by `python -m tests.bundles`, which copies a graph that a test has traced before.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oneword.runtime import Concept, save_concept
from oneword.train.miniature.world import HELD_OUT_LOOKS, Scene, Thing, render
from tests.bundles import export_once

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
FROM_PICTURES = ("README.md", "quickstart.md")
"""Pages that learn their word and export their model themselves."""
SERVED = ("server.md",)
"""Pages that talk to a server, which the test starts."""
ADDRESS = "127.0.0.1:8000"
"""The server's address in the pages."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    reason: str
    """Why it is not run, if it is not."""


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that are code and are run; a block of `text` is not code."""
    blocks = [Block(language, code, reason) for reason, language, code in BLOCK.findall(page.read_text("utf-8"))]
    return [block for block in blocks if block.language != "text" and not block.reason]


@pytest.fixture(scope="session")
def miniature_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("guide") / "bundle"
    return export_once("miniature", bundle).bundle.path


@pytest.mark.docs
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if runnable(page)])
def test_every_code_block_of_a_page_runs(page: Path, miniature_bundle: Path, search_path: str, tmp_path: Path) -> None:
    pictures = tmp_path / ("demo-output/pictures" if page.name in FROM_PICTURES else "pictures")
    draw_photographs(pictures)
    if page.name not in FROM_PICTURES:
        shutil.copytree(miniature_bundle, tmp_path / "bundle")
        save_concept(
            Concept("<toy>", {"text_encoder": np.full((1, 128), 0.03, np.float32)}), tmp_path / "toy.safetensors"
        )

    with server(tmp_path) if page.name in SERVED else contextlib.nullcontext(ADDRESS) as address:
        for block in runnable(page):
            code = block.code.replace(ADDRESS, address)
            if block.language == "sh":
                run(["bash", "-euo", "pipefail", "-c", code], tmp_path, search_path)
            else:
                assert block.language == "python", f"{page.name}: say why {block.language!r} is not run"
                run([sys.executable, "-c", code], tmp_path, search_path)

    code = "".join(block.code for block in runnable(page))
    saved = re.findall(r"--output (\S+\.safetensors)|picture\.save\(f?\"(\S+)\"\)", code)
    for word, picture in saved:
        pattern = word or re.sub(r"\{.*?\}", "*", picture)
        assert list(tmp_path.glob(pattern)), f"{page.name} should have written {pattern}"


def test_every_code_block_is_fenced() -> None:
    """An indented block would escape the test above, and could not say why it is not run."""
    for page in PAGES:
        assert not re.search(r"\n\n {4}\S", BLOCK.sub("", page.read_text("utf-8"))), page.name


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of a server of the folder's bundle, which learns."""
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "oneword.serve.cli", "bundle", "--model", "miniature", "--port", str(port)]
    command += ["--words", "words", "--jobs", "jobs"]
    with (folder / "server.log").open("wb") as log, subprocess.Popen(command, cwd=folder, stderr=log) as process:
        try:
            while not is_ready(f"http://127.0.0.1:{port}/health/ready"):
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def draw_photographs(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, background in enumerate(("studio", "kitchen", "desert", "meadow", "brick")):
        image, _ = render(Scene((Thing(HELD_OUT_LOOKS[0]),), background), seed=1000 + i)
        Image.fromarray(image).save(folder / f"{background}.png")


@pytest.fixture(scope="session")
def search_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The search path of the pages' commands."""
    folder = tmp_path_factory.mktemp("commands")
    export = folder / "ti-export"
    path = f'"{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"'
    export.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec "{sys.executable}" -m tests.bundles "$@"\n')
    export.chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def run(command: list[str], folder: Path, path: str) -> None:
    process = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert process.returncode == 0, f"{' '.join(command)}\n{process.stdout[-2000:]}{process.stderr[-2000:]}"
