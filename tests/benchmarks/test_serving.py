"""The serving benchmark: its cores, and the journal that it adds to a server's process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.served.changes import FIRST_STEP, PROMPT, TURN, read_journal
from benchmarks.served.process import CORES, LOAD_CORE, SERVER_CORE, on_core


@pytest.mark.skipif(not {SERVER_CORE, LOAD_CORE} <= CORES, reason="needs cores 0 and 1")
def test_a_process_on_the_load_core_starts_others_on_the_server_core() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {LOAD_CORE})
        with on_core(SERVER_CORE):
            assert os.sched_getaffinity(0) == {SERVER_CORE}
        assert os.sched_getaffinity(0) == {LOAD_CORE}
    finally:
        os.sched_setaffinity(0, before)


def test_the_journal_records_turns_branches_and_prompts(tiny_bundle: Path, tmp_path: Path) -> None:
    """Two pictures of three steps, one guided, in slots that they share; their three prompts are new."""
    program = """
import sys
from benchmarks.served.changes import apply
from oneword.runtime import Model, Request
from oneword.runtime.request import resolve
from oneword.runtime.scheduler import Scheduler

apply({"journal": sys.argv[2]})
scheduler = Scheduler(Model.open(sys.argv[1], "onnxruntime", threads=1))
for request in (Request("a red star", steps=3), Request("a blue cat", steps=3, guidance_scale=1)):
    scheduler.add(request, resolve(request, scheduler.model.manifest))
while scheduler:
    scheduler.step()
"""
    journal = tmp_path / "journal"
    subprocess.run([sys.executable, "-c", program, tiny_bundle, journal], check=True)

    turns, prompts = read_journal(journal, TURN), read_journal(journal, PROMPT)
    assert [tuple(turn) for turn in turns[:, 2:] if turn[1]] == [(3, 2)] * 3
    assert (turns[:, 0] <= turns[:, 1]).all()
    assert [tuple(prompt) for prompt in prompts[:, 1:3]] == [(0, 0)] * 3
    assert len(read_journal(journal, FIRST_STEP)) == 0  # the server's metrics note these
