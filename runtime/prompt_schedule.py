"""Prompts that change while a picture is drawn, in A1111's syntax. Independent of words, weights and the model.

    [a:b:0.5]  a, and b after half of the steps      [a:b:8]    b after step 8
    [b:0.5]    nothing, then b                       [a::0.5]   a, then nothing
    [a|b]      a and b in turn, step by step         they nest

A number with a point is a fraction of the picture's steps, those that `strength` leaves; any other is a step. Brackets
that are none of these are left alone, as in A1111. A slider's bar and colon (`oneword.runtime.slider`) do not count.
A prompt is read in time proportional to its length, and its texts together may be as long as one prompt. Source:
AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, get_learned_conditioning_prompt_schedules.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from oneword.engines.errors import UsageError
from oneword.runtime.prompt import MAX_CHARACTERS
from oneword.runtime.slider import SLIDER, START, slider_at

MAX_BRANCHES: Final = 64
"""Texts between which the schedules of a prompt choose."""
MAX_TEXTS: Final = 32
"""Different texts that one prompt may have, one after another."""

_PIECE: Final = re.compile(rf"\\[^{{]|{SLIDER.pattern}|[\[\]():|]|[^\\\[\]():|{{]+|.", re.DOTALL)
_NUMBER: Final = re.compile(r"\s*([+-]?(?:\d++\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass(eq=False)
class Choice:
    """A place of a prompt that has several texts, of which each step has one."""

    branches: "list[list[str | Choice]]"
    when: float | None = None
    """The number of a schedule; None: the branches take turns."""
    is_fraction: bool = False
    """Of the steps."""

    def at(self, step: int, steps: int) -> "list[str | Choice]":
        """The branch of a step, from 1."""
        if self.when is None:
            return self.branches[(step - 1) % len(self.branches)]
        number = self.when * steps if self.is_fraction else self.when
        return self.branches[step > int(max(0, min(number, steps)))]


def prompts_by_step(prompt: str, steps: int) -> list[str]:
    """The text of every step. Raises UsageError for a malformed slider, and for too many or too long texts."""
    for start in START.finditer(prompt):
        slider_at(prompt, start.start())
    pieces = parse(prompt)
    if all(isinstance(piece, str) for piece in pieces):
        return [prompt] * steps
    texts: dict[str, str] = {}
    prompts: list[str] = []
    for step in range(1, steps + 1):
        text = _text(pieces, step, steps)
        prompts.append(texts.setdefault(text, text))
        if len(texts) > MAX_TEXTS:
            raise UsageError(
                f"the prompt changes between more than {MAX_TEXTS} texts in {steps} steps, but at most {MAX_TEXTS} "
                "are allowed: use fewer [a|b]"
            )
        if (count := sum(map(len, texts))) > MAX_CHARACTERS:
            raise UsageError(
                f"the prompt's texts have {count} characters in the first {step} of {steps} steps, but may have "
                f"at most {MAX_CHARACTERS} together: shorten the prompt, or use fewer schedules"
            )
    return prompts


def parse(prompt: str) -> "list[str | Choice]":
    """The text and the choices of a prompt, in order. Raises UsageError if it has too many."""
    pieces: list[str | Choice] = []
    opened: list[tuple[str, int, list[int]]] = []  # bracket, its index, the indices of its separators
    branches = 0
    for match in _PIECE.finditer(prompt):
        text = match.group()
        innermost = opened[-1][0] if opened else ""
        if text in ("[", "("):
            opened.append((text, len(pieces), []))
        elif text in (":", "|") and innermost == "[":
            opened[-1][2].append(len(pieces))
        elif text == ")" and innermost == "(":
            opened.pop()
        elif text == "]" and innermost == "[":
            _, start, separators = opened.pop()
            if choice := _choice(pieces, start, separators):
                branches += len(choice.branches)
                if branches > MAX_BRANCHES:
                    raise UsageError(f"the prompt's schedules have more than {MAX_BRANCHES} texts: use fewer of them")
                pieces[start:] = [choice]
                continue
        pieces.append(text)
    return _merged(pieces)


def _choice(pieces: "list[str | Choice]", start: int, separators: Sequence[int]) -> Choice | None:
    """What brackets that open at `start` and close now contain, if they are a schedule or alternate.

    Copies the pieces only then: they become one piece, so that all copies together are as long as the prompt.
    """
    kinds = {pieces[i] for i in separators}
    number = None
    if kinds == {":"} and len(separators) <= 2 and separators[-1] == len(pieces) - 2:  # one piece comes after it
        number = _NUMBER.fullmatch(str(pieces[-1])) if isinstance(pieces[-1], str) else None
    if number is None and kinds != {"|"}:
        return None
    fields = [
        _merged(pieces[i + 1 : end]) for i, end in zip([start, *separators], [*separators, len(pieces)], strict=True)
    ]
    if number is None:
        return Choice(fields)
    return Choice([[], *fields[:-1]][-2:], float(number.group(1)), is_fraction="." in number.group(1))


def _merged(pieces: "Sequence[str | Choice]") -> "list[str | Choice]":
    """The pieces with adjacent texts joined."""
    merged: list[str | Choice] = []
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        run = [*group]
        merged += ["".join(map(str, run))] if is_text else run
    return merged


def _text(pieces: "Sequence[str | Choice]", step: int, steps: int) -> str:
    return "".join([p if isinstance(p, str) else _text(p.at(step, steps), step, steps) for p in pieces])
