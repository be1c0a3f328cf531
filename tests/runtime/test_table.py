"""Words are placed in the rows behind the model's own, and give them up in the order of their last use."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from oneword.engines.errors import BundleError, UsageError
from oneword.runtime.table import EmbeddingTable, base_table

BASE = np.arange(20, dtype=np.float32).reshape(5, 4)


def rows(value: float, count: int = 1) -> np.ndarray:
    return np.full((count, 4), value, np.float32)


def test_placing_a_word_writes_its_rows_and_nothing_else() -> None:
    table = EmbeddingTable(BASE, capacity=6)
    array, before = table.array, table.array.numpy().copy()
    [ids] = table.place({"toy": rows(7, 2)}).values()
    assert table.array is array
    assert min(ids) >= 5
    expected = before.copy()
    expected[ids] = 7
    np.testing.assert_array_equal(table.array.numpy(), expected)
    assert table.array.numpy().flags.c_contiguous


def test_rows_of_an_fp16_table_are_fp16() -> None:
    table = EmbeddingTable(BASE.astype(np.float16), capacity=1)
    [[row]] = table.place({"toy": rows(0.1)}).values()
    np.testing.assert_array_equal(table.array.numpy()[row], np.full(4, 0.1, np.float16))


def test_a_word_that_is_in_the_table_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = EmbeddingTable(BASE, capacity=2)
    [first] = table.place({"toy": rows(7)}).values()
    monkeypatch.setattr(table.array, "write", None)
    [second] = table.place({"toy": rows(7)}).values()
    np.testing.assert_array_equal(first, second)


def test_the_word_used_longest_ago_gives_up_its_rows() -> None:
    table = EmbeddingTable(BASE, capacity=3)
    a = table.place({"a": rows(1)})["a"]
    table.place({"b": rows(2)})
    b = table.place({"c": rows(3), "b": rows(2)})["b"]
    table.place({"a": rows(1)})
    d = table.place({"d": rows(4), "b": rows(2)})  # c is the oldest that is not needed
    assert table.resident == 3
    np.testing.assert_array_equal(d["b"], b)
    np.testing.assert_array_equal(table.place({"a": rows(1)})["a"], a)
    np.testing.assert_array_equal(table.array.numpy()[d["d"]], rows(4))


def test_words_that_do_not_fit_together_are_refused_and_change_nothing() -> None:
    table = EmbeddingTable(BASE, capacity=2)
    table.place({"a": rows(1)})
    before = table.array.numpy().copy()
    with pytest.raises(UsageError, match=r"words have 3 vectors, .* has room for 2: open the model with capacity=3"):
        table.place({"b": rows(2, 2), "c": rows(3)})
    np.testing.assert_array_equal(table.array.numpy(), before)
    assert table.fits({"b": rows(2, 2)})


def test_a_word_whose_rows_could_not_be_written_is_not_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = EmbeddingTable(BASE, capacity=2)
    with monkeypatch.context() as broken:
        broken.setattr(table.array, "write", None)
        with pytest.raises(TypeError):
            table.place({"a": rows(1, 2)})
    assert table.resident == 0
    ids = table.place({"b": rows(2, 2)})["b"]
    np.testing.assert_array_equal(table.array.numpy()[ids], rows(2, 2))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sets(st.integers(0, 7), max_size=4), st.lists(st.integers(0, 4))), max_size=30))
def test_every_word_of_a_call_has_rows_with_its_vectors(calls: list[tuple[set[int], list[int]]]) -> None:
    """And the model's own rows that a call looks up are those of its file; the others are not written."""
    table = EmbeddingTable(BASE, capacity=8)
    looked_up = set[int]()
    for call, base_ids in calls:
        words = {str(word): rows(100 + word, word % 2 + 1) for word in call}
        ids = table.place(words)
        assert len({*np.concatenate([*ids.values(), np.zeros(0, int)]).tolist()}) == sum(map(len, words.values()))
        for word, vectors in words.items():
            np.testing.assert_array_equal(table.array.numpy()[ids[word]], vectors)
        table.look_up(np.array([[*base_ids, 5, 12]], np.int64))
        looked_up |= {*base_ids}
        expected = [row if i in looked_up else np.zeros(4) for i, row in enumerate(BASE)]
        np.testing.assert_array_equal(table.array.numpy()[:5], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_file_of_rows_is_mapped_in_its_dtype(tmp_path: Path, dtype: type) -> None:
    save_file({"embedding_table": BASE.astype(dtype)}, tmp_path / "table")
    rows = base_table(tmp_path / "table")

    np.testing.assert_array_equal(rows, BASE)
    assert rows.dtype == dtype
    assert isinstance(rows.base, np.memmap)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"rows": BASE},
        {"embedding_table": BASE.astype(np.int64)},
        {"embedding_table": BASE, "more": BASE},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, tmp_path / "table")
    with pytest.raises(BundleError, match=r"table holds no embedding_table .*: export the model again with ti-export"):
        base_table(tmp_path / "table")


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    save_file({"embedding_table": BASE}, tmp_path / "table")
    (tmp_path / "table").write_bytes((tmp_path / "table").read_bytes()[:left])
    with pytest.raises(BundleError, match="holds no embedding_table"):
        base_table(tmp_path / "table")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no embedding_table"):
        base_table(tmp_path / "table")
