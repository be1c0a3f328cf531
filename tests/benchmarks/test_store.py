"""Stored measurements: found again for the same model only."""

from pathlib import Path

import pytest

from benchmarks.store import Store, all_rows


def test_a_measurement_is_found_by_its_facts_for_the_same_model_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, "a")
    assert store.find({"word": 1}) is None

    store.add({"word": 1, "seconds": 2.0, "parts": [3]}, hidden=["parts"])
    Store(tmp_path, "b").add({"word": 2})

    assert capsys.readouterr().out == '{"word": 1, "seconds": 2.0}\n{"word": 2}\n'
    assert store.find({"word": 1}) == {"word": 1, "seconds": 2.0, "parts": [3], "model": "a"}
    assert store.find({"word": 2}) is None
    assert [row["word"] for row in store.rows()] == [1]
    assert [row["word"] for row in all_rows(store.file)] == [1, 2]
