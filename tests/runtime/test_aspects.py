"""Aspects and their file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.runtime.aspects import DEFAULT_ASPECTS, Aspect, parse_aspects, read_aspects


def test_an_aspect_is_a_line_with_a_name_and_words() -> None:
    text = "# mine\n\ncolour: red,  light   blue , <brass> # three\nshape:star,ring\n"

    assert parse_aspects(text) == (
        Aspect("colour", ("red", "light blue", "<brass>")),
        Aspect("shape", ("star", "ring")),
    )


def test_the_built_in_aspects_are_those_that_the_guide_names() -> None:
    assert [aspect.name for aspect in DEFAULT_ASPECTS] == ["style", "light", "texture", "colour", "material", "shape"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.txt: there are 0 aspects, but there must be 1 to 16"),
        ("red, blue", "a.txt, line 1: 'red, blue' is not NAME: WORD, WORD"),
        ("\ncolour: red", "a.txt, line 2: aspect 'colour' has 1 word, but must have 2 to 64"),
        ("colour: red,,blue", "a.txt, line 1: '' is not a name or word of an aspect"),
        (": red, blue", "a.txt, line 1: '' is not a name"),
        ("colour: red, blue, red", "a.txt, line 1: aspect 'colour' lists 'red' twice"),
        ("a: b, c\na: d, e", "a.txt: two aspects are called 'a'"),
        ("a: b, c:d", "a.txt, line 1: 'c:d' is not a name or word"),
        ("a: b, \x1b[31m", r"a.txt, line 1: '\\x1b\[31m' is not a name or word"),
        (f"a: b, {'x' * 41}", "it must be 1 to 40 printable characters"),
        ("\n".join(f"a{i}: b, c" for i in range(17)), "a.txt: there are 17 aspects, but there must be 1 to 16"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_aspects(text, "a.txt")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_large_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_bytes(b"#" * (17 << 10))
    (tmp_path / "latin.txt").write_bytes("colour: grün, rot".encode("latin-1"))
    (tmp_path / "good.txt").write_text("\ufeffcolour: grün, rot\r\n", encoding="utf-8")

    with pytest.raises(UsageError, match="there is no file"):
        read_aspects(tmp_path / "absent.txt")
    with pytest.raises(FileError, match="has more than 16384 bytes"):
        read_aspects(tmp_path / "large.txt")
    with pytest.raises(FileError, match="is not UTF-8 text"):
        read_aspects(tmp_path / "latin.txt")
    with pytest.raises(FileError, match="cannot read"):
        read_aspects(tmp_path)
    assert read_aspects(tmp_path / "good.txt") == (Aspect("colour", ("grün", "rot")),)


@given(st.text(max_size=120))
def test_any_text_is_aspects_or_one_line(text: str) -> None:
    aspects, message = parsed(text)

    assert bool(aspects) != bool(message)
    assert "\n" not in message


def parsed(text: str) -> tuple[tuple[Aspect, ...], str]:
    """The aspects, or none and the error's message."""
    try:
        return parse_aspects(text), ""
    except OnewordError as error:
        return (), str(error)
