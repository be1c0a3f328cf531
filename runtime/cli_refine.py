"""`ti-refine`: makes a word better by likes and dislikes. A thin skin over `oneword.runtime.refine`."""

import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from oneword.engines.errors import UsageError, counted
from oneword.runtime.aspects import Aspect, read_aspects
from oneword.runtime.commands import (
    HELP,
    PATH,
    ProgressBar,
    engine_option,
    json_option,
    load_concepts,
    print_json,
    require_folder_of,
    run_command,
    token_name,
    version_option,
)
from oneword.runtime.concept import Concept, load_concept, save_concept, token_from_stem
from oneword.runtime.drawing import draw
from oneword.runtime.grid import labelled_grid
from oneword.runtime.images import save_png
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.model import Model
from oneword.runtime.refine import (
    CANDIDATES,
    MAX_CANDIDATES,
    MAX_ROUNDS,
    MIN_CANDIDATES,
    Refinement,
    finish,
    judge,
    known_aspects,
    picture_file,
    propose,
    refine_concept,
    undo,
)
from oneword.runtime.request import Request
from oneword.runtime.scheduler import Scheduler

ROUNDS = 8
PROMPT = "a photo of a {}"
QUESTION = "Which do you like? For example 2 5 -3 (likes 2 and 5, dislikes 3), 0 none, u undo, q quit"
_WORD_FILES = (".safetensors", ".pt", ".bin", ".pth", ".png")
_ANSWER = "numbers such as 2 5 -3, 0 for none, or all of them from best to worst, such as 2>5>1>3>4>6"


@click.command(name="ti-refine", context_settings=HELP)
@version_option
@click.argument("bundle", type=PATH)
@click.option(
    "--start",
    required=True,
    metavar="WORD|FILE",
    help="An ordinary word, or the file of a learned word; a refined word's file continues its rounds.",
)
@click.option(
    "--token", type=token_name, metavar="NAME", help="Name of the refined word.", show_default="<WORD>, or the FILE's"
)
@click.option("--aspects", type=PATH, help="File of aspects, one per line: NAME: WORD, WORD.", show_default="built in")
@click.option(
    "--concept",
    "concepts",
    type=PATH,
    multiple=True,
    help="File of a learned word that --aspects or --start names; may be repeated.",
)
@click.option(
    "--rounds",
    type=click.IntRange(0),
    default=ROUNDS,
    show_default=True,
    help=f"Rounds in all; at most {MAX_ROUNDS} are drawn.",
)
@click.option(
    "--candidates", type=int, help=f"Pictures per round, {MIN_CANDIDATES} to {MAX_CANDIDATES}.  [default: {CANDIDATES}]"
)
@click.option(
    "--seed", type=int, help="Seed of the candidates and, counted up by round, of the pictures.  [default: 0]"
)
@click.option(
    "--likes",
    "answers",
    metavar="ANSWER",
    multiple=True,
    help="The answer to the next round, such as '2 5 -3' or '2>5>1>3>4>6'; may be repeated.",
)
@click.option("--undo", "undone", type=click.IntRange(0), default=0, help="Drop this many of the last rounds first.")
@click.option("--prompt", default=PROMPT, show_default=True, help="What to draw; {} is the word.")
@click.option("--steps", type=int, show_default="the bundle's", help="Denoising steps.")
@click.option("--guidance-scale", type=float, show_default="the bundle's", help="Weight of the prompt.")
@engine_option
@click.option(
    "--output",
    type=PATH,
    metavar="FILE",
    show_default="the FILE that is continued, else NAME-refined.safetensors",
    help="File of the refined word.",
)
@json_option
def command(
    bundle: Path,
    start: str,
    token: str | None,
    aspects: Path | None,
    concepts: Sequence[Path],
    rounds: int,
    candidates: int | None,
    seed: int | None,
    answers: Sequence[str],
    undone: int,
    prompt: str,
    engine: str,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Refine a word by likes and dislikes, with the model in BUNDLE and without PyTorch.

    Each round draws candidates of the word, with one prompt and seed, into a folder beside the output. On a terminal it
    asks which you like. Elsewhere, answers come from --likes; then the next round's sheet is drawn and the command
    ends. The word is saved after each round, with its rounds, so that --start OUTPUT can continue later.
    """
    if "{}" not in prompt:
        raise UsageError(f"--prompt is {prompt[:80]!r}, it needs a {{}} where the word should be")
    learned = load_concepts(concepts)
    lexicon = Lexicon.read(bundle, learned)
    fresh = {"token": token, "aspects": aspects, "candidates": candidates, "seed": seed}
    state, continued = _state(start, lexicon, learned, fresh)
    if output is None:
        output = Path(start if continued else f"{state.token.strip('<>')}-refined.safetensors")
    if output.suffix.lower() != ".safetensors":
        raise UsageError(f"--output is {output}, but must end in .safetensors")
    require_folder_of("--output", output)
    if output.exists() and not (continued and output.samefile(start)):
        raise UsageError(f"{output} exists: continue it with --start {output}, or choose another --output")
    pictures = output.with_suffix(".rounds")
    if pictures.exists() and not output.exists():
        raise UsageError(f"{pictures} has the pictures of another refinement: move it, or choose another --output")
    state = _without_last(state, undone)
    drawn = len(state.rounds) + 1
    for answer in answers:
        state = judged(state, answer)
    session = _Session(Model.open(bundle, engine), lexicon, prompt, output, settings)
    word = finish(state, lexicon)
    if len(state.rounds) < rounds and state.room:
        session.check(state, word)
    if not continued and not state.start_rows:
        for note in _notes(start, lexicon):
            click.echo(f"note: {note}", err=True)
    if undone:
        _delete_pictures(output, after=drawn)
    save_concept(word, output)
    while len(state.rounds) < rounds and state.room:
        session.show(state)
        if not on_terminal():
            break
        after = _asked(state)
        if after is None:
            break
        if len(after.rounds) < len(state.rounds):
            _delete_pictures(output, after=len(after.rounds) + 1)
        state, word = after, finish(after, lexicon)
        save_concept(word, output)

    if as_json:
        print_json(_report(state, word, output, session))
    else:
        rounds_judged = counted(len(state.rounds), "round")
        click.echo(f"{state.token} after {rounds_judged}: {word.provenance['aspects'] or 'as it began'}")
        for file in (session.sheet, output):
            if file is not None:
                click.echo(file)


class _Session:
    """Draws the rounds, each on a sheet."""

    def __init__(self, model: Model, lexicon: Lexicon, prompt: str, output: Path, settings: dict[str, Any]) -> None:
        Request(prompt, **settings)  # raises if a setting is wrong
        self.model, self.lexicon, self.prompt, self.settings = model, lexicon, prompt, settings
        self.output = output
        self.sheet: Path | None = None
        """The last sheet."""
        self.labels: list[str] = []
        """The last sheet's candidates."""
        self.seconds: list[float] = []
        """The time that each sheet took."""

    def check(self, state: Refinement, word: Concept) -> None:
        """Raises UsageError if the word cannot be drawn, before its file is written, which would have to be moved."""
        Scheduler(self.model).add(self._request(state, word))

    def _request(self, state: Refinement, concept: Concept) -> Request:
        """That of a candidate of the next round."""
        prompt, seed = self.prompt.replace("{}", state.token), state.seed + len(state.rounds)
        return Request(prompt, seed=seed, words={state.token: concept}, **self.settings)

    def show(self, state: Refinement) -> None:
        """Draws the next round's candidates, each in its file and all on a sheet."""
        start = time.perf_counter()
        concepts, number = propose(state, self.lexicon), len(state.rounds) + 1
        requests = [self._request(state, concept) for concept in concepts]
        with ProgressBar(f"round {number}: {counted(len(requests), 'picture')}") as progress:
            pictures = draw(self.model, *requests)
            self.labels = [concept.provenance["aspects"] or "as it began" for concept in concepts]
            headings = [f"{i}: {label}" for i, label in enumerate(self.labels, 1)]
            self.sheet = picture_file(self.output, number).parent.with_suffix(".png")
            for index, picture in enumerate(pictures):
                save_png(picture.image, picture_file(self.output, number, index), picture.parameters)
            images = [picture.image for picture in pictures]
            save_png(labelled_grid([images], [""], [headings]), self.sheet, pictures[0].parameters)
            self.seconds.append(time.perf_counter() - start)
            progress.note(f"round {number}: {self.sheet}")


def on_terminal() -> bool:
    """Whether the user can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def judged(state: Refinement, answer: str) -> Refinement:
    """The state after an answer such as `2 5 -3`, `0` or `2>5>1>3>4>6`, which count from 1. Raises UsageError."""
    numbers = re.split(r"\s*>\s*|[\s,]+", answer.strip())
    if not all(re.fullmatch(r"-?\d{1,3}", number, re.ASCII) for number in numbers):
        raise UsageError(f"the answer is {answer[:60]!r}, but must be {_ANSWER}")
    values = [int(number) for number in numbers]
    if unknown := [value for value in values if abs(value) > state.candidates]:
        raise UsageError(
            f"the answer {answer[:60]!r} names picture {abs(unknown[0])} of {state.candidates}: give {_ANSWER}"
        )
    if ">" in answer:
        if sorted(values) != list(range(1, state.candidates + 1)):
            raise UsageError(
                f"the answer {answer[:60]!r} does not rank each of 1 to {state.candidates} once: give {_ANSWER}"
            )
        return judge(state, ranking=[value - 1 for value in values])
    if 0 in values and len(values) > 1:
        raise UsageError(f"the answer {answer[:60]!r} has 0 beside other numbers: give {_ANSWER}")
    if overlap := {value for value in values if value and -value in values}:
        raise UsageError(f"the answer {answer[:60]!r} both likes and dislikes picture {max(overlap)}: give {_ANSWER}")
    return judge(state, likes=[v - 1 for v in values if v > 0], dislikes=[-v - 1 for v in values if v < 0])


def _asked(state: Refinement) -> Refinement | None:
    """The state after the user's answer, or after the rounds undone; None to quit."""
    while True:
        answer = click.prompt(QUESTION, err=True, prompt_suffix=": ").strip()
        try:
            match answer.lower():
                case "q":
                    return None
                case "u":
                    return undo(state)
                case _:
                    return judged(state, answer)
        except UsageError as error:
            click.echo(str(error), err=True)


def _without_last(state: Refinement, count: int) -> Refinement:
    """The state before the last `count` judgements. Raises UsageError if there are fewer."""
    if count > (total := len(state.rounds)):
        rounds = {0: "no round has", 1: "only 1 round has"}.get(total, f"only {total} rounds have")
        raise UsageError(f"--undo is {count}, but {rounds} been judged")
    for _ in range(count):
        state = undo(state)
    return state


def _delete_pictures(word: Path, after: int) -> None:
    """Deletes the sheets and pictures of the rounds after that number, which were undone: `ti-train --polish` would
    learn from them."""
    for folder in word.with_suffix(".rounds").glob("round-*/"):
        number = folder.name.removeprefix("round-")
        if number.isdecimal() and int(number) > after:
            folder.with_suffix(".png").unlink(missing_ok=True)
            shutil.rmtree(folder)


def _state(start: str, lexicon: Lexicon, learned: Sequence[Concept], fresh: dict[str, Any]) -> tuple[Refinement, bool]:
    """The state to begin with, and whether it continues the rounds of a file."""
    concept = next((word for word in learned if word.token == start), None)
    if concept is None and _is_file(start):
        concept = _learned(Path(start))
        if state := Refinement.of(concept):
            _refuse(fresh)
            propose(state, lexicon)  # raises if its words or its model are others
            return state, True
    settings = {name: fresh[name] for name in ("candidates", "seed") if fresh[name] is not None}
    aspects = _aspects(fresh["aspects"], lexicon)
    if concept is not None:
        state = refine_concept(concept, lexicon, aspects, **settings)
        return (state if fresh["token"] is None else replace(state, token=fresh["token"])), False
    lexicon.rows(start)  # raises if the model does not have the word
    token = fresh["token"] or f"<{token_from_stem(start.replace('/', '_') + '.x').strip('<>')}>"
    return Refinement(token, start, aspects, lexicon.digest, **settings), False


def _notes(start: str, lexicon: Lexicon) -> Iterator[str]:
    """Warns of ordinary words that the model does not have as one token."""
    for word in start.split():
        if (count := lexicon.tokens(word)) > 1:
            yield f"{word!r} is {count} tokens in this model; a common word works better (check the spelling)"


def _is_file(start: str) -> bool:
    """Whether --start names a file, which need not exist, and not a word: by its suffix or the beginning of a path."""
    return start.startswith(("./", "../", "/", "~")) or Path(start).suffix.lower() in _WORD_FILES


def _learned(path: Path) -> Concept:
    """The word in the file of --start. Raises UsageError, ConceptError."""
    if path.exists() and path.suffix.lower() != ".safetensors":
        raise UsageError(
            f"--start is {path}, but must be a .safetensors file: convert it with ti-concept convert {path} "
            "NAME.safetensors"
        )
    return load_concept(path)


def _refuse(fresh: dict[str, Any]) -> None:
    """Raises UsageError for settings that only a new refinement has."""
    for name, value in fresh.items():
        if value is not None:
            raise UsageError(f"--{name} cannot change in a refinement that has begun: leave it out, or start again")


def _aspects(path: Path | None, lexicon: Lexicon) -> tuple[Aspect, ...]:
    """The aspects in a file; by default the built-in ones."""
    if path is not None:
        aspects = read_aspects(path)
        for aspect in aspects:
            for word in aspect.words:
                lexicon.rows(word)  # raises if the model does not have the word
        return aspects
    return known_aspects(lexicon)


def _report(state: Refinement, word: Concept, output: Path, session: _Session) -> dict[str, Any]:
    return {
        "file": str(output),
        "token": state.token,
        "rounds": len(state.rounds),
        "aspects": state.words,
        "identity": word.identity,
        "sheet": None if session.sheet is None else str(session.sheet),
        "candidates": session.labels,
        "engine": session.model.engine("denoise_step").backend if session.sheet is not None else None,
        "seconds": session.seconds,
    }


def main() -> None:
    """The console script."""
    run_command(command, "ti-refine")


if __name__ == "__main__":
    main()
