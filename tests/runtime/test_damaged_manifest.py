"""Any one value of bundle.json may be wrong: the bundle is refused in one line, or it still draws."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneword.engines.errors import OnewordError
from oneword.runtime.drawing import draw
from oneword.runtime.model import Model

Key = str | int
MISSING = object()
WRONG = [MISSING, None, True, -1, 0, 3, 10**30, 1e-30, 1.5, "", "x", "../x", [], [1], ["x"], {}]


def keys_of(value: Any, above: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """The keys that lead to every value, of lists to the first two."""
    if above:
        yield above
    below = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in below:
        yield from keys_of(item, (*above, key))


def changed(value: Any, keys: tuple[Key, ...], wrong: object) -> Any:
    """A copy in which the value that the keys lead to is another, or missing."""
    value = copy.deepcopy(value)
    parent = value
    for key in keys[:-1]:
        parent = parent[key]
    if wrong is MISSING:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = wrong
    return value


@pytest.fixture(scope="module")
def damaged(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("damaged") / "bundle")


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_wrong_value_is_an_error_in_one_line_or_does_not_matter(
    tiny_bundle: Path, damaged: Path, data: st.DataObject
) -> None:
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    wrong = changed(manifest, data.draw(st.sampled_from([*keys_of(manifest)])), data.draw(st.sampled_from(WRONG)))
    (damaged / "bundle.json").write_text(json.dumps(wrong))

    message, pictures = "", []
    try:
        pictures = draw(Model.open(damaged, "onnxruntime", threads=1), "a cat", steps=1)
    except OnewordError as error:
        message = str(error)
    assert len(pictures) == 1 or (message and "\n" not in message)
