"""Learned rows are loaded and unloaded beside the model's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneword.engines.errors import ConceptError, UsageError
from oneword.runtime.table import EmbeddingTable

BASE = np.arange(20, dtype=np.float32).reshape(5, 4)


def test_loading_a_word_writes_its_rows_and_nothing_else() -> None:
    table = EmbeddingTable(BASE, capacity=6)
    array, before = table.array, table.array.numpy().copy()
    ids = table.load("<toy>", np.full((2, 4), 7, np.float32))
    assert table.array is array
    assert min(ids) >= 5
    expected = before.copy()
    expected[list(ids)] = 7
    np.testing.assert_array_equal(table.array.numpy(), expected)
    assert table.array.numpy().flags.c_contiguous
    assert table.ids == {"<toy>": ids}


def test_rows_of_an_fp16_table_are_fp16() -> None:
    table = EmbeddingTable(BASE.astype(np.float16), capacity=1)
    [row] = table.load("<toy>", np.full((1, 4), 0.1, np.float32))
    np.testing.assert_array_equal(table.array.numpy()[row], np.full(4, 0.1, np.float16))


def test_the_rows_of_an_unloaded_word_are_reused() -> None:
    table = EmbeddingTable(BASE, capacity=2)
    ids = table.load("<a>", np.ones((2, 4), np.float32))
    with pytest.raises(ConceptError, match="needs 1 rows, 0 of 2 are free: unload words first"):
        table.load("<b>", np.ones((1, 4), np.float32))
    table.unload("<a>")
    assert set(table.load("<b>", np.ones((2, 4), np.float32))) == set(ids)


def test_rows_that_a_waiting_prompt_uses_are_not_reused() -> None:
    table = EmbeddingTable(BASE, capacity=2)
    [row] = table.load("<a>", np.ones((1, 4), np.float32))
    waiting = np.array([[0, row, row, 4]])
    table.hold(waiting)
    table.hold(waiting)
    table.unload("<a>")
    assert table.free_rows == 1
    assert table.load("<b>", np.full((1, 4), 2, np.float32)) != (row,)
    np.testing.assert_array_equal(table.array.numpy()[row], np.ones(4))
    table.release(waiting)
    assert table.free_rows == 0
    table.release(waiting)
    assert table.load("<c>", np.ones((1, 4), np.float32)) == (row,)


def test_an_unsuitable_word_is_refused_with_the_reason() -> None:
    table = EmbeddingTable(BASE, capacity=4)
    with pytest.raises(ConceptError, match=r"shape \[1, 768\], this encoder takes \[n, 4\]"):
        table.load("<a>", np.ones((1, 768), np.float32))
    table.load("<a>", np.ones((1, 4), np.float32))
    with pytest.raises(ConceptError, match="already loaded"):
        table.load("<a>", np.ones((1, 4), np.float32))
    with pytest.raises(UsageError, match="no word '<b>' is loaded"):
        table.unload("<b>")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["load", "unload", "hold", "release"]), st.integers(0, 3)), max_size=40))
def test_held_rows_keep_their_vectors_whatever_is_loaded_or_unloaded(steps: list[tuple[str, int]]) -> None:
    table, holds = EmbeddingTable(BASE, capacity=6), []
    for turn, (action, word) in enumerate(steps):
        token = f"<{word}>"
        if action == "load" and token not in table.ids and table.free_rows >= word % 2 + 1:
            table.load(token, np.full((word % 2 + 1, 4), 100 + turn, np.float32))
        elif action == "unload" and token in table.ids:
            table.unload(token)
        elif action == "hold" and token in table.ids:
            ids = np.array(table.ids[token])
            table.hold(ids)
            holds.append((ids, table.array.numpy()[ids].copy()))
        elif action == "release" and holds:
            table.release(holds.pop(word % len(holds))[0])
        for ids, rows in holds:
            np.testing.assert_array_equal(table.array.numpy()[ids], rows)
        np.testing.assert_array_equal(table.array.numpy()[:5], BASE)
    for ids, _ in holds:
        table.release(ids)
    for token in table.ids:
        table.unload(token)
    assert table.free_rows == 6
