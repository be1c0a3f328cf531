import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from oneword.engines.errors import UsageError
from oneword.export.source import load_source, read_json
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import load_concept
from oneword.serve import learning
from oneword.serve.errors import Invalid
from oneword.serve.learning import LearningProcess, ProcessLost, check_model, model_digest, public_text, recipe_of
from oneword.serve.messages import Done, Failed, Order, Report, Snapshot, Started, Step, snapshot_steps
from oneword.train.checkpoint import held
from oneword.train.job import learn_word, reported
from oneword.train.recipe import RECIPES


def test_a_words_vectors_are_reported_while_it_is_learned(order: Order) -> None:
    reports = asyncio.run(learned(order))

    assert isinstance(reports[0], Started)
    assert reports[0].machine["threads"] == "1"
    assert [report.step for report in reports if isinstance(report, Step)] == list(range(order.steps + 1))
    snapshots = {report.step: report.file for report in reports if isinstance(report, Snapshot)}
    assert list(snapshots) == [0, 2, 6]
    assert isinstance(reports[-1], Done)
    vectors = {step: bits(order, file) for step, file in snapshots.items()}
    assert len(set(vectors.values())) == 3
    assert vectors[6] == bits(order, reports[-1].file)
    assert load_concept(Path(order.folder) / reports[-1].file).provenance["steps"] == "6"


def test_vectors_whose_report_was_not_read_are_reported_again(order: Order) -> None:
    def snapshots(reports: list[Report]) -> list[tuple[int, bytes]]:
        return [(report.step, bits(order, report.file)) for report in reports if isinstance(report, Snapshot)]

    first = snapshots(asyncio.run(learned(order)))  # a server that is killed may have read none of them

    reports = asyncio.run(learned(order))

    assert [report.step for report in reports if isinstance(report, Step)] == [6]
    assert [step for step, _ in first] == [0, 2, 6]
    assert snapshots(reports)[:3] == first


def test_an_order_for_other_weights_fails_with_one_line_without_a_path(order: Order) -> None:
    reports = asyncio.run(learned(msgspec.structs.replace(order, digest="0" * 64)))

    assert reports == [Failed("the model's weights are not those the bundle was exported from: export it again")]


def test_a_missing_package_is_reported_with_the_command_that_installs_it() -> None:
    def work() -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    reports: list[Report] = []
    reported(reports.append, work)

    [failed] = reports
    assert isinstance(failed, Failed)
    assert re.match(r"diffusers is not installed: .*pip install .*\[train\]", failed.error)


@pytest.mark.parametrize("encoders", [("text_encoder", "text_encoder_2"), ("text_encoder", "text_encoder_3")])
def test_an_encoder_that_the_bundle_leaves_out_is_not_loaded(
    order: Order, encoders: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[str] = []

    def load(model: str, *, without: tuple[str, ...]) -> None:
        left_out.extend(without)
        raise UsageError("a test")

    monkeypatch.setattr("oneword.export.source.load_source", load)
    stable_diffusion_3 = {"_class_name": "StableDiffusion3Pipeline"}
    monkeypatch.setattr("oneword.export.source.read_json", lambda path: read_json(path) | stable_diffusion_3)

    with pytest.raises(UsageError, match="a test"):
        learn_word(msgspec.structs.replace(order, encoders=encoders), lambda report: None, threading.Event())

    assert left_out == ([] if "text_encoder_3" in encoders else ["text_encoder_3"])


def test_a_model_that_does_not_exist_is_named_when_the_server_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--model: nowhere has no model_index.json: give a diffusers directory"):
        asyncio.run(model_digest(str(make_folder(tmp_path / "nowhere"))))


def test_a_models_digest_is_that_of_its_bundle_and_another_bundle_is_refused(
    tiny_model_dir: Path, tiny_bundle: Path
) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    other = msgspec.structs.replace(manifest, source=msgspec.structs.replace(manifest.source, digest="0" * 64))

    async def check() -> str:
        _, digest = await asyncio.gather(refused(), check_model(str(tiny_model_dir), manifest))
        return digest

    async def refused() -> None:
        with pytest.raises(UsageError, match=r"have different weights \(the bundle is of model\)"):
            await check_model(str(tiny_model_dir), other)

    assert asyncio.run(check()) == load_source(tiny_model_dir).digest


def test_only_recipes_that_exist_are_offered() -> None:
    for name, choice in learning.RECIPES.items():
        assert RECIPES[name].steps == choice.steps
    assert recipe_of(None, None) == ("directional", 50)
    assert recipe_of("style", 3) == ("style", 3)
    with pytest.raises(Invalid, match="unknown recipe 'slow': choose from directional, fast, style, one-word"):
        recipe_of("slow", None)


def test_words_are_shown_at_early_steps_then_rarely_and_at_the_end() -> None:
    assert snapshot_steps(50) == (0, 5, 10, 20, 35, 50)
    assert snapshot_steps(12) == (0, 5, 10, 12)
    assert snapshot_steps(500) == (0, 5, 10, 20, 35, 50, 100, 200, 400, 500)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("picture-1.png is 8x8: too small", True),
        ("step 3/50: give 1/2 of it, or and/or", True),
        ("pip install -c constraints.txt -e '.[train]'", True),
        ("cannot read /root/jobs/x.png", False),
        ("'~/jobs/x.png' is missing", False),
        ("C:\\jobs\\x.png is missing", False),
    ],
)
def test_a_text_that_holds_a_path_is_not_shown(text: str, shown: bool) -> None:
    assert (public_text(text) == text) == shown


@pytest.mark.parametrize("line", [b"a library says hello\n", b'"\xe9"\n', b'{"type": "note", "text": "\xff"}\n', b"\n"])
def test_a_line_that_is_no_report_ends_the_process(
    order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, signal\nos.write(1, {line!r})\nsignal.pause()\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))

    with pytest.raises(ProcessLost, match="the learning process ended with status -9"):
        asyncio.run(learned(order))


def test_the_process_saves_and_ends_when_its_server_is_killed(order: Order, tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    long = msgspec.structs.replace(order, steps=100_000, snapshots=(1,))
    server = subprocess.Popen([sys.executable, script, msgspec.json.encode(long)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    process = int(server.stdout.readline())
    assert server.stdout.readline() == "learning\n"

    server.kill()
    server.wait()
    server.stdout.close()

    descriptor = os.pidfd_open(process) if alive(process) else None
    if descriptor is not None:
        waiting = subprocess.run(  # until the process has ended
            [sys.executable, "-c", f"import select; exit(not select.select([{descriptor}], [], [], 30)[0])"],
            pass_fds=[descriptor],
            check=False,
        )
        os.close(descriptor)
        assert waiting.returncode == 0
    with held(Path(order.folder) / "run"):  # nobody else holds it
        assert list((Path(order.folder) / "run").glob("step-*"))


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


SERVER = """
import asyncio, sys
from pathlib import Path
import msgspec
from oneword.serve import learning
from oneword.serve.errors import Invalid
from oneword.serve.learning import LearningProcess, check_model, model_digest, public_text, recipe_of
from oneword.serve.messages import Order, Snapshot

async def main():
    order = msgspec.json.decode(sys.argv[1], type=Order)
    async with LearningProcess(order, Path(order.folder) / "log") as reports:
        print(reports.pid, flush=True)
        async for report in reports:
            if isinstance(report, Snapshot):
                print("learning", flush=True)

asyncio.run(main())
"""


@pytest.fixture
def order(tmp_path: Path, tiny_model_dir: Path) -> Order:
    """Six steps on random pictures."""
    write_pictures(tmp_path / "job" / "pictures")
    return Order(
        folder=str(tmp_path / "job"),
        model=str(tiny_model_dir),
        digest=load_source(tiny_model_dir).digest,
        token="<toy>",
        init="star",
        recipe="directional",
        steps=6,
        seed=3,
        encoders=("text_encoder",),
        snapshots=(0, 2, 6),
        checkpoint_every=2,
    )


def write_pictures(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"picture-{number + 1}.png")


async def learned(order: Order) -> list[Report]:
    async with LearningProcess(order, Path(order.folder) / "log") as reports:
        return [report async for report in reports]


def bits(order: Order, file: str) -> bytes:
    return load_concept(Path(order.folder) / file).vectors["text_encoder"].tobytes()
