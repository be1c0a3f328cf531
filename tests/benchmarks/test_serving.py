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
    """Twice two pictures of three steps, one of them guided, together; their three prompts are new at first."""
    program = """
import sys
from benchmarks.served.changes import apply
from oneword.runtime import Model, Request
from oneword.runtime.request import resolve
from oneword.runtime.scheduler import Scheduler
from oneword.serve.metrics import Metrics, PoolMetrics

apply({"journal": sys.argv[2]})
scheduler = Scheduler(Model.open(sys.argv[1], "onnxruntime", threads=1))
for requests in ((Request("a red star", steps=3), Request("a blue cat", steps=3, guidance_scale=1)),) * 2:
    for request in requests:
        scheduler.add(request, resolve(request, scheduler.model.manifest))
    while scheduler:
        scheduler.step()
PoolMetrics(Metrics()).first_step(0.5)
"""
    journal = tmp_path / "journal"
    subprocess.run([sys.executable, "-c", program, tiny_bundle, journal], check=True)

    turns, prompts = read_journal(journal, TURN), read_journal(journal, PROMPT)
    assert [tuple(turn) for turn in turns[:, 2:] if turn[1]] == [(3, 2)] * 6
    assert (turns[:, 0] <= turns[:, 1]).all()
    assert [tuple(prompt) for prompt in prompts[:, 1:3]] == [(0, 0)] * 3 + [(1, 0)] * 3
    [(arrival, now, *_)] = read_journal(journal, FIRST_STEP)
    assert now - arrival == pytest.approx(0.5)
