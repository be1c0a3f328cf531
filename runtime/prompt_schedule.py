"""Prompts that change while a picture is drawn, in A1111's syntax. Independent of words, weights and the model.

    [a:b:0.5]  a, and b after half of the steps      [a:b:8]    b after step 8
    [b:0.5]    nothing, then b                       [a::0.5]   a, then nothing
    [a|b]      a and b in turn, step by step         they nest

A number with a point is a fraction of the picture's steps, those that `strength` leaves; any other is a step. Brackets
that are none of these are left alone, as in A1111. Source: AUTOMATIC1111/stable-diffusion-webui,
modules/prompt_parser.py, get_learned_conditioning_prompt_schedules.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from oneword.engines.errors import UsageError

MAX_BRANCHES: Final = 64
"""Texts between which the schedules of a prompt choose."""
MAX_READINGS: Final = 32
"""Different prompts that one picture may have, one after another."""

_PIECE: Final = re.compile(r"\\.|\{[^{}\[\]]*\}|[\[\]():|]|[^\\\[\]():|{}]+|.", re.DOTALL)
_NUMBER: Final = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass(eq=False)
class Choice:
    """A place of a prompt that has several texts, of which each step has one."""

    branches: "list[list[str | Choice]]"
    when: str | None
    """The number of a schedule; None: the branches take turns."""

    def at(self, step: int, steps: int) -> int:
        """The branch of a step, from 1."""
        if self.when is None:
            return (step - 1) % len(self.branches)
        number = float(self.when) * (steps if "." in self.when else 1)
        return int(step > int(max(0, min(number, steps))))


def prompts_by_step(prompt: str, steps: int) -> list[str]:
    """The prompt of every step. Raises UsageError if it has too many different ones."""
    pieces = parse(prompt)
    if all(isinstance(piece, str) for piece in pieces):
        return [prompt] * steps
    prompts = [_text(pieces, partial(Choice.at, step=step, steps=steps)) for step in range(1, steps + 1)]
    if (count := len(set(prompts))) > MAX_READINGS:
        raise UsageError(
            f"the prompt changes between {count} texts in {steps} steps, allowed are {MAX_READINGS}: use fewer [a|b]"
        )
    return prompts


def variants(prompt: str) -> list[str]:
    """Prompts without schedules that together contain every text that some step may have, for any number of steps."""
    pieces = parse(prompt)
    found = {_text(pieces, lambda choice: 0): None}
    pending: list[tuple[Choice, dict[Choice, int]]] = [(piece, {}) for piece in pieces if isinstance(piece, Choice)]
    while pending:
        choice, outer = pending.pop(0)
        for i, branch in enumerate(choice.branches):
            chosen = {**outer, choice: i}
            found[_text(pieces, partial(_chosen, chosen))] = None
            pending += [(piece, chosen) for piece in branch if isinstance(piece, Choice)]
    return [*found]


def parse(prompt: str) -> "list[str | Choice]":
    """The text and the choices of a prompt, in order. Raises UsageError if it has too many."""
    pieces: list[str | Choice] = []
    opened: list[tuple[str, int, list[int]]] = []  # bracket, its index, the indices of its separators
    branches = 0
    for match in _PIECE.finditer(prompt):
        text = match.group()
        if text in ("[", "("):
            opened.append((text, len(pieces), []))
        elif text in (":", "|") and opened and opened[-1][0] == "[":
            opened[-1][2].append(len(pieces))
        elif text == ")" and opened and opened[-1][0] == "(":
            opened.pop()
        elif text == "]" and any(bracket == "[" for bracket, _, _ in opened[-1:]):
            _, start, separators = opened.pop()
            if choice := _choice(pieces, start, separators):
                branches += len(choice.branches)
                if branches > MAX_BRANCHES:
                    raise UsageError(f"the prompt's schedules have more than {MAX_BRANCHES} texts: use fewer of them")
                pieces[start:] = [choice]
                continue
        pieces.append(text)
    return pieces


def _choice(pieces: "list[str | Choice]", start: int, separators: Sequence[int]) -> Choice | None:
    """What brackets that open at `start` and close now contain, if they are a schedule or alternate."""
    kinds = {pieces[i] for i in separators}
    fields = [pieces[i + 1 : end] for i, end in zip([start, *separators], [*separators, len(pieces)], strict=True)]
    if kinds == {"|"}:
        return Choice(fields, None)
    if kinds != {":"} or len(fields) > 3 or not all(isinstance(piece, str) for piece in fields[-1]):
        return None
    number = _NUMBER.fullmatch("".join(map(str, fields[-1])))
    return Choice([[], *fields[:-1]][-2:], number.group(1)) if number else None


def _chosen(chosen: dict[Choice, int], choice: Choice) -> int:
    return chosen.get(choice, 0)


def _text(pieces: "Sequence[str | Choice]", branch_of: Callable[[Choice], int]) -> str:
    return "".join(
        piece if isinstance(piece, str) else _text(piece.branches[branch_of(piece)], branch_of) for piece in pieces
    )
