"""The serving benchmark puts the server and its load on different cores."""

import os

import pytest

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
