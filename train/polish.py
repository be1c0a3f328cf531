"""What `ti-train --polish` learns further: a word of `ti-refine` and the pictures liked in its rounds. No learning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oneword.engines.errors import FileError, UsageError
from oneword.runtime.concept import load_concept
from oneword.runtime.refine import Refinement, liked, picture_file


@dataclass(frozen=True)
class RefinedWord:
    """A word of `ti-refine`: its token and number of vectors, and the pictures that were liked best."""

    token: str
    vectors: int
    liked: tuple[Path, ...]


def read_refined_word(file: Path) -> RefinedWord:
    """Reads a word and finds its liked pictures, which `ti-refine` left beside it.

    Raises `UsageError` if the file has no rounds or no liked pictures, `FileError` if one of the pictures is missing.
    """
    concept = load_concept(file)
    state = Refinement.of(concept)
    if state is None:
        raise UsageError(f"--polish {file} has no rounds of ti-refine: learn from pictures alone with --init {file}")
    pictures = tuple(picture_file(file, number, index) for number, index in liked(state))
    if not pictures:
        raise UsageError(f"no picture was liked in the rounds of {file}: learn from pictures alone with --init {file}")
    if missing := [picture for picture in pictures if not picture.is_file()]:
        raise FileError(
            f"{missing[0]} is missing, a picture liked in a round of {file}: keep the folder beside the word, "
            f"or learn from pictures alone with --init {file}"
        )
    counts = {len(rows) for rows in concept.vectors.values()}
    if len(counts) > 1:
        raise UsageError(
            f"{file} has {' and '.join(map(str, sorted(counts)))} vectors for its text encoders: "
            "--polish takes a word with as many for each"
        )
    return RefinedWord(concept.token, counts.pop(), pictures)
