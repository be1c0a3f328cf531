"""Refining a word by likes and dislikes: `Refinement`, `propose`, `judge`, `undo`, `finish`. Pure numpy: no pictures.

    state = Refinement("<toy>", start="object", aspects=aspects, model=lexicon.digest)
    while state.room:
        concepts = propose(state, lexicon)            K candidate words: draw each with the same prompt and seed
        state = judge(state, likes=[1, 4], dislikes=[2])
    word = finish(state, lexicon)                     its provenance holds the state: Refinement.of(word)

The first rounds search over words: a candidate has the rows of one word of each aspect, then those of the start. The
words' effects have a Gaussian posterior, and candidates are drawn from it (Thompson sampling; Thompson 1933). Later
rounds search near the best word (Rocchio 1971). All randomness comes from the seed and the number of the round, so a
state is the record of its judgements, no more.

Not covered: drawing, who judges, and learning from pictures (`oneword.train`).
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt

from oneword.engines.errors import ConceptError, UsageError, counted, one_line
from oneword.runtime.aspects import DEFAULT_ASPECTS, Aspect, check_aspects
from oneword.runtime.concept import Concept, Vectors, check_token
from oneword.runtime.lexicon import Lexicon, Rows, joined

CANDIDATES: Final = 6
MIN_CANDIDATES, MAX_CANDIDATES = 3, 16
ASPECT_ROUNDS: Final = 8
MAX_ROUNDS: Final = 40
MAX_SEED: Final = 2**63 - MAX_ROUNDS  # the pictures of the last round have a seed that is higher by MAX_ROUNDS - 1
MAX_JSON: Final = 40 << 10  # of the 64 KiB that a concept file's header may have
MAX_START: Final = 24 << 10  # for a learned start: 12 rows of 768, four of 768 and 1280, one of these and 4096
PROVENANCE_KEY: Final = "refinement"

PRIOR, NOISE = 0.7, 0.5  # standard deviations of a word's effect and of a candidate's score
LIKED, DISLIKED = 1.0, 0.25  # Rocchio's weights
COMPONENTS: Final = 8  # of each encoder, for the local search
SIGMA, DECAY = 0.06, 0.93  # size of the local search's steps, beside rows of length 1
NONE: Final = -1  # the choice of no word of an aspect

Components = Mapping[str, npt.NDArray[np.float64]]
"""By encoder, the directions [C, D] in which the local search moves."""
Choice = tuple[int, ...]
"""The index of a word for each aspect; NONE leaves the aspect as the start has it."""


@dataclass(frozen=True)
class Round:
    """One judged round. A candidate's level is above 0 if it was liked, below 0 if disliked; higher is better."""

    levels: tuple[int, ...]
    choices: tuple[Choice, ...] = ()
    """What each candidate was made of; empty in the local search."""

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """The candidates' normal scores [K]."""
        return normal_scores(self.levels)


@dataclass(frozen=True)
class Refinement:
    """The state of a refinement: what it starts from, and every judgement so far. Raises UsageError, ConceptError."""

    token: str
    start: str
    """The word that it starts from: an ordinary or a learned word."""
    aspects: tuple[Aspect, ...]
    model: str = ""
    """The digest of the model's weights."""
    seed: int = 0
    candidates: int = CANDIDATES
    """K, the candidates of a round."""
    aspect_rounds: int = ASPECT_ROUNDS
    """Rounds before the local search."""
    start_rows: Mapping[str, str] = field(default_factory=dict[str, str])
    """By encoder, the start's rows in base64 (little-endian float16), if it is a learned word."""
    rounds: tuple[Round, ...] = ()

    def __post_init__(self) -> None:
        check_token(self.token)
        if not self.start.strip() or len(self.start) > 200 or not self.start.isprintable():
            raise UsageError(f"the start is {self.start[:60]!r}, but must be a word of up to 200 printable characters")
        check_aspects(self.aspects)
        _within("seed", self.seed, 0, MAX_SEED)
        _within("candidates", self.candidates, MIN_CANDIDATES, MAX_CANDIDATES)
        _within("aspect_rounds", self.aspect_rounds, 1, MAX_ROUNDS)
        _within("rounds", len(self.rounds), 0, MAX_ROUNDS)
        for number, judged in enumerate(self.rounds, 1):
            _check_round(self, number, judged)

    @classmethod
    def of(cls, concept: Concept) -> Self | None:
        """The state in a refined word's provenance, for the word's own name, which may have been changed since; None if
        it has none that this version can continue."""
        try:
            return replace(cls.from_json(concept.provenance[PROVENANCE_KEY]), token=concept.token)
        except (KeyError, UsageError, ConceptError):
            return None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json`. Raises UsageError, ConceptError."""
        try:
            if len(text) > MAX_JSON:
                raise ValueError(f"it has {len(text)} characters, but at most {MAX_JSON} are allowed")
            document = json.loads(text)
            state = msgspec.convert(document, cls)
            if json.loads(state.to_json()) != document:
                raise ValueError("unknown or missing fields")
        except (ValueError, RecursionError, UnicodeEncodeError) as error:  # msgspec's errors are ValueErrors
            raise UsageError(f"the state of the refinement is damaged ({one_line(error)}): start again") from None
        return state

    def to_json(self) -> str:
        """The state as one line of JSON. Raises UsageError if it is too long for a concept file."""
        text = msgspec.json.encode(self).decode()
        if len(text) > MAX_JSON:
            raise UsageError(
                f"the state has {len(text)} characters, but may have at most {MAX_JSON}: use fewer aspects or words"
            )
        return text

    @property
    def room(self) -> int:
        """How many more rounds can be judged."""
        return MAX_ROUNDS - len(self.rounds)

    @property
    def local(self) -> bool:
        """Whether the next round is one of the local search."""
        return len(self.rounds) >= self.aspect_rounds

    @property
    def words(self) -> dict[str, str]:
        """The best word so far of each aspect, without the aspects for which no word is better than none."""
        chosen = zip(self.aspects, best_choice(self), strict=True)
        return {aspect.name: aspect.words[index] for aspect, index in chosen if index != NONE}


def known_aspects(lexicon: Lexicon) -> tuple[Aspect, ...]:
    """The built-in aspects, with only those words that are one token of the model.

    Raises UsageError if no aspect has two such words.
    """
    known = [(aspect.name, tuple(w for w in aspect.words if lexicon.tokens(w) == 1)) for aspect in DEFAULT_ASPECTS]
    aspects = tuple(Aspect(name, words) for name, words in known if len(words) > 1)
    if not aspects:
        raise UsageError("the model's vocabulary has none of the built-in aspects: name your own with --aspects FILE")
    return aspects


def refine_concept(concept: Concept, lexicon: Lexicon, aspects: tuple[Aspect, ...], **settings: Any) -> Refinement:
    """A new refinement that starts from a learned word.

    Raises UsageError if the word was learned for another model, or has too many rows for the state.
    """
    halves = {name: rows.astype("<f2").tobytes() for name, rows in lexicon.rows_of(concept).items()}
    encoded = {name: base64.b64encode(data).decode() for name, data in halves.items()}
    if (size := sum(map(len, encoded.values()))) > MAX_START:
        raise UsageError(
            f"the rows of {concept.token!r} take {size} characters, but at most {MAX_START} are allowed: start from a "
            "word with fewer vectors"
        )
    return Refinement(concept.token, concept.token, aspects, lexicon.digest, start_rows=encoded, **settings)


def propose(state: Refinement, lexicon: Lexicon) -> tuple[Concept, ...]:
    """The K candidates of the next round. The same state gives the same words.

    Candidate 0 is the best word so far. Raises UsageError for another model, and for aspects with words it cannot use.
    """
    choices = _choices(state) if not state.local else [best_choice(state)] * state.candidates
    return tuple(
        Concept(state.token, rows, {"aspects": _described(state, choice)})
        for rows, choice in zip(_words(state, lexicon), choices, strict=True)
    )


def judge(
    state: Refinement,
    *,
    likes: Sequence[int] = (),
    dislikes: Sequence[int] = (),
    ranking: Sequence[int] | None = None,
) -> Refinement:
    """The state after a judgement of the proposed candidates, by index: likes and dislikes, or a ranking, best first.

    Candidates that are neither liked nor disliked are between the two; a ranking names all. Raises UsageError.
    """
    if not state.room:
        raise UsageError(f"{MAX_ROUNDS} rounds are judged, which is the most: finish, or undo one")
    if ranking is not None and (likes or dislikes):
        raise UsageError("a ranking and likes or dislikes were given: give one of them")
    if ranking is not None:
        levels = _levels_of_ranking(ranking, state.candidates)
    else:
        levels = _levels_of_likes(likes, dislikes, state.candidates)
    choices = () if state.local else _choices(state)
    return replace(state, rounds=(*state.rounds, Round(levels, choices)))


def undo(state: Refinement) -> Refinement:
    """The state before the last judgement. Raises UsageError if there is none."""
    if not state.rounds:
        raise UsageError("there is no round to undo: none has been judged")
    return replace(state, rounds=state.rounds[:-1])


def liked(state: Refinement) -> list[tuple[int, int]]:
    """The candidates that were liked best in their round: the number of the round, from 1, and the candidate's index.

    Of a ranking that is the first one; of likes, all.
    """
    return [
        (number, index)
        for number, judged in enumerate(state.rounds, 1)
        for index, level in enumerate(judged.levels)
        if level == max(judged.levels) > 0
    ]


def picture_file(word: Path, number: int, index: int = 0) -> Path:
    """Where `ti-refine` keeps the picture of candidate `index`, from 0, in round `number`, from 1: beside the word's
    file."""
    return word.with_suffix(".rounds") / f"round-{number}" / f"{index + 1}.png"


def finish(state: Refinement, lexicon: Lexicon) -> Concept:
    """The best word so far; its provenance holds the state, so that the refinement can continue from it."""
    rows = _local_search(state, lexicon)[0] if state.local else _composed(state, best_choice(state), lexicon)
    provenance = {
        "base_model_digest": state.model,
        "init": state.start,
        "aspects": _described(state, best_choice(state)),
        "rounds": str(len(state.rounds)),
        PROVENANCE_KEY: state.to_json(),
    }
    return Concept(state.token, rows, provenance)


def normal_scores(levels: Sequence[int]) -> npt.NDArray[np.float64]:
    """The expected normal values of ranks [K], by Blom (1958): equal levels share the mean of their scores."""
    values, count = np.array(levels), len(levels)
    quantiles = [NormalDist().inv_cdf((rank + 1 - 0.375) / (count + 0.25)) for rank in range(count)]
    scores = np.empty(count)
    scores[values.argsort(kind="stable")] = quantiles
    for level in set(levels):
        scores[values == level] = scores[values == level].mean()
    return scores


def posterior(state: Refinement) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean [W] and covariance [W, W] of the effects of all aspects' words, one aspect after another.

    A candidate's normal score is the sum of its words' effects, an unknown offset of the round, and noise. The best
    word so far is a candidate of every round, which puts all rounds on one scale.
    """
    rounds = [judged for judged in state.rounds if judged.choices]
    design = [_indicators(state, judged.choices) for judged in rounds]
    x = np.concatenate([np.zeros((0, _word_count(state))), *(rows - rows.mean(0) for rows in design)])
    y = np.concatenate([np.zeros(0), *(judged.scores for judged in rounds)])
    covariance = np.linalg.inv(np.eye(x.shape[1]) / PRIOR**2 + x.T @ x / NOISE**2)
    return covariance @ (x.T @ y) / NOISE**2, np.asarray(covariance, np.float64)


def best_choice(state: Refinement) -> Choice:
    """The word with the highest mean effect of each aspect; NONE where no mean is above 0."""
    mean, _ = posterior(state)
    return tuple(int(part.argmax()) if part.max() > 1e-9 else NONE for part in _by_aspect(state, mean))


def _choices(state: Refinement) -> tuple[Choice, ...]:
    """The choices of the next round's candidates: the best so far, then K - 1 draws from the posterior."""
    rng = np.random.default_rng([state.seed, len(state.rounds)])
    mean, covariance = posterior(state)
    noise = rng.standard_normal((state.candidates - 1, len(mean)))
    drawn = _by_aspect(state, mean + noise @ np.linalg.cholesky(covariance).T)
    history = [choice for judged in state.rounds for choice in judged.choices]
    words = [_best_of_draws(draws, {choice[number] for choice in history}) for number, draws in enumerate(drawn)]
    return (best_choice(state), *zip(*words, strict=True))


def _best_of_draws(draws: npt.NDArray[np.float64], earlier: set[int]) -> list[int]:
    """The best word of each draw [K, W]. A word that is not in `earlier` rounds is taken by one draw only, while there
    are others: the fewer words repeat, the sooner all are seen."""
    best: list[int] = []
    new: set[int] = set()
    for values in draws:
        if len(new) == len(values):
            new.clear()
        best.append(max((word for word in range(len(values)) if word not in new), key=values.__getitem__))
        new |= {best[-1]} - earlier
    return best


def _indicators(state: Refinement, choices: Sequence[Choice]) -> npt.NDArray[np.float64]:
    """Which words the candidates have, as 0 and 1: [K, W]."""
    columns = [
        np.array([choice[number] for choice in choices])[:, None] == np.arange(len(aspect.words))
        for number, aspect in enumerate(state.aspects)
    ]
    return np.concatenate(columns, axis=1).astype(np.float64)


def _by_aspect(state: Refinement, values: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Values [..., W], split by aspect."""
    return np.split(values, np.cumsum([len(aspect.words) for aspect in state.aspects])[:-1], axis=-1)


def _word_count(state: Refinement) -> int:
    return sum(len(aspect.words) for aspect in state.aspects)


def _words(state: Refinement, lexicon: Lexicon) -> list[Rows]:
    """The next round's candidates."""
    if not state.local:
        return [_composed(state, choice, lexicon) for choice in _choices(state)]
    centre, basis = _local_search(state, lexicon)
    return _around(state, centre, basis, len(state.rounds))


def _composed(state: Refinement, choice: Choice, lexicon: Lexicon) -> Rows:
    """The rows of the chosen words, in the order of the aspects, then those of the start."""
    words = [
        lexicon.rows(aspect.words[index]) for aspect, index in zip(state.aspects, choice, strict=True) if index != NONE
    ]
    words.append(_start(state, lexicon))
    return joined(words)


def _start(state: Refinement, lexicon: Lexicon) -> Rows:
    if state.model != lexicon.digest:
        raise UsageError("the refinement was begun with another model: use the bundle of that model, or start again")
    if not state.start_rows:
        return lexicon.rows(state.start)
    try:
        halves = {name: np.frombuffer(base64.b64decode(text), "<f2") for name, text in state.start_rows.items()}
        rows = {name: values.reshape(-1, lexicon.widths.get(name, 1)) for name, values in halves.items()}
        return lexicon.rows_of(Concept(state.token, rows))
    except (ValueError, ConceptError) as error:
        raise UsageError(f"the start's vectors are damaged ({one_line(error)}): start again") from None


def _local_search(state: Refinement, lexicon: Lexicon) -> tuple[Rows, Components]:
    """Where the local search is now, and the principal components of the words tried."""
    words = {
        aspect.words[choice[number]]
        for judged in state.rounds
        for choice in judged.choices
        for number, aspect in enumerate(state.aspects)
        if choice[number] != NONE
    }
    tried = [lexicon.rows(word) for word in sorted(words)] or [_start(state, lexicon)]
    basis = {encoder: components(_unit(rows), COMPONENTS) for encoder, rows in joined(tried).items()}
    centre = _composed(state, best_choice(state), lexicon)
    for number, judged in enumerate(state.rounds):
        if not judged.choices:
            centre = _moved(_around(state, centre, basis, number), judged.levels)
    return centre, basis


def _moved(candidates: Sequence[Rows], levels: Sequence[int]) -> Rows:
    """The centre, which is candidate 0, moved towards the liked candidates and away from the disliked (Rocchio)."""
    centre = {}
    for encoder, rows in candidates[0].items():
        tried, signs = _unit(np.stack([candidate[encoder] for candidate in candidates])), np.sign(levels)
        moved = tried[0].copy()
        for sign, weight in ((1, LIKED), (-1, -DISLIKED)):
            if (signs == sign).any():
                moved += weight * (tried[signs == sign].mean(0) - tried[0])
        centre[encoder] = _turned(rows, moved)
    return centre


def _around(state: Refinement, centre: Rows, basis: Components, number: int) -> list[Rows]:
    """A local round's candidates: the centre, then pairs on opposite sides of it."""
    rng = np.random.default_rng([state.seed, number])
    sigma, pairs = SIGMA * DECAY ** (number - state.aspect_rounds), state.candidates // 2
    steps = {
        encoder: sigma * rng.standard_normal((pairs, len(rows), len(basis[encoder]))) @ basis[encoder]
        for encoder, rows in sorted(centre.items())
    }
    candidates = [
        {encoder: _turned(rows, _unit(rows) + sign * steps[encoder][pair]) for encoder, rows in centre.items()}
        for pair in range(pairs)
        for sign in (1, -1)
    ]
    return [centre, *candidates[: state.candidates - 1]]


def _unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Rows [..., D] scaled to unit vectors; a row of zeros stays zero."""
    rows = rows.astype(np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12), np.float64)


def _turned(rows: Vectors, directions: npt.NDArray[np.float64]) -> Vectors:
    """Rows [n, D] of the lengths of `rows` and the directions of `directions` [n, D]."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(_unit(directions) * lengths, np.float32)


def components(rows: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """The first principal components of `rows` [N, D], at most `count`, as unit vectors whose largest part is above 0.

    Components without variance are left out.
    """
    _, values, basis = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    basis = basis[: min(count, int((values > 1e-6).sum()))]
    largest = np.abs(basis).argmax(1)[:, None]
    signs: npt.NDArray[np.float64] = np.sign(np.take_along_axis(basis, largest, 1))
    return basis * signs


def _described(state: Refinement, choice: Choice) -> str:
    """For example `square, yellow, dots`."""
    chosen = zip(state.aspects, choice, strict=True)
    return ", ".join(aspect.words[index] for aspect, index in chosen if index != NONE)


def _levels_of_likes(likes: Sequence[int], dislikes: Sequence[int], count: int) -> tuple[int, ...]:
    for index in (*likes, *dislikes):
        _within("candidate", index, 0, count - 1)
    if overlap := set(likes) & set(dislikes):
        raise UsageError(f"candidate {min(overlap)} is both liked and disliked: give each once")
    return tuple((index in likes) - (index in dislikes) for index in range(count))


def _levels_of_ranking(ranking: Sequence[int], count: int) -> tuple[int, ...]:
    """The upper half is liked, the lower half disliked: 5, 3, 1, -1, -3, -5 for six."""
    if sorted(ranking) != list(range(count)):
        raise UsageError(f"the ranking is {list(ranking)}, but must list every candidate once, 0 to {count - 1}")
    return tuple(count - 1 - 2 * ranking.index(index) for index in range(count))


def _check_round(state: Refinement, number: int, judged: Round) -> None:
    if (count := len(judged.levels)) != state.candidates:
        raise UsageError(
            f"round {number} has {counted(count, 'level')}, but must have {state.candidates}, one for each candidate"
        )
    for level in judged.levels:
        _within("level", level, -MAX_CANDIDATES, MAX_CANDIDATES)
    expected = state.candidates if number <= state.aspect_rounds else 0
    if (count := len(judged.choices)) != expected:
        raise UsageError(f"round {number} has {counted(count, 'choice')}, but must have {expected}")
    for choice in judged.choices:
        if len(choice) != len(state.aspects):
            raise UsageError(f"round {number} has a choice of {len(choice)} words for {len(state.aspects)} aspects")
        for aspect, index in zip(state.aspects, choice, strict=True):
            _within(f"choice of {aspect.name}", index, NONE, len(aspect.words) - 1)


def _within(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UsageError(f"{name} is {value!r}, but must be a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, but must be {low} to {high}")
