"""Learning from folders: `learn` turns a model, folders of pictures and a recipe into concepts, step by step.

    for progress in learn("miniature", [Task(Path("photos"), "<toy>", "toy")], named_recipe("fast")):
        print(progress.step, progress.losses)
    (concept,) = progress.concepts

A run reads pictures, chooses the words' initial rows, learns, and saves checkpoints. It prints nothing and writes no
concept files.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from oneword import __version__
from oneword.engines.errors import OnewordError, UsageError
from oneword.export.source import Source, load_source
from oneword.runtime.concept import Concept
from oneword.train import advice
from oneword.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from oneword.train.initial import AUTO, concept_file, initial_rows
from oneword.train.learner import Learner
from oneword.train.pictures import Picture, read_picture, read_pictures
from oneword.train.preview import Previewer, Sheet
from oneword.train.prompts import probes
from oneword.train.recipe import Recipe
from oneword.train.search import words_of_pictures
from oneword.train.tasks import (
    Task,
    check_encoders,
    check_polished,
    check_tasks,
    check_tokens,
    make_word,
    picture_size,
    side_step,
)
from oneword.train.word import Word

MAX_SEED = 2**63 - 2  # the fixed batch of each word uses the next one


@dataclass(frozen=True)
class Progress:
    """A run's progress after `step` of `steps`. `losses` and `stopped` are in the tasks' order. `start` is
    the step that the run resumed from, 0 if it did not.

    `notes` are new warnings, `sheets` are samples drawn after this step, `words` are the words as they are after this
    step, if it is one of `words_after`. The last progress also has the `concepts`, the `history` of each word's losses,
    `lengths` (each word's over the vocabulary's) and `timings` (seconds per stage).
    """

    step: int
    steps: int
    losses: Sequence[float]
    learning_rate: float
    stopped: Sequence[bool]
    notes: Sequence[str] = ()
    sheets: Sequence[Sheet] = ()
    words: Sequence[Concept] = ()
    concepts: Sequence[Concept] = ()
    history: Sequence[Sequence[float]] = ()
    lengths: Sequence[float] = ()
    timings: dict[str, float] = field(default_factory=dict)
    start: int = 0


def learn(
    model: str | Path | Source,
    tasks: Sequence[Task],
    recipe: Recipe,
    seed: int = 0,
    *,
    config: Path | None = None,
    without: Sequence[str] = (),
    checkpoints: Path | None = None,
    checkpoint_every: int = 25,
    preview_every: int | None = None,
    words_after: Collection[int] = (),
) -> Generator[Progress]:
    """Learns every task's word in shared batches. Yields after each step; the last progress has the concepts.

    `model`, `config` and `without` are as in `load_source`. A `Source` passed as the model is modified: its network is
    cast in place. A model that is loaded here does without the text encoders that no word is learned for once all
    prompts are encoded: their weights are freed, unless samples are drawn with them. With `checkpoints`, a folder, the
    run's state is saved there every `checkpoint_every` steps and when the iterator is closed, and a run found there is
    resumed. With `preview_every`, each word is sampled at that interval and at the end. The progress of the steps
    `words_after` has the words as they are then; a run that starts or resumes at one of these steps yields its progress
    first, with step 0 as the start.

    Raises `UsageError` for tasks that cannot be learned, `FileError` for pictures that cannot be read, and whatever
    `load_source` raises.
    """
    clock = Clock()
    check_tasks(tasks)
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
    source = model if isinstance(model, Source) else load_source(model, config=config, without=without)
    check_tokens(source, tasks)
    check_encoders(source, recipe.encoders)
    check_polished(source, tasks, recipe.encoders)
    clock.lap("load")
    run = Run(source, tasks, recipe, seed, clock, checkpoints, checkpoint_every, preview_every, words_after)
    if not isinstance(model, Source) and run.previewer is None:
        run.learner.release_encoders()
    yield from run


class Run:
    """Words, their learner, previews and checkpoints. Iterating learns and yields a `Progress` per step."""

    def __init__(
        self,
        source: Source,
        tasks: Sequence[Task],
        recipe: Recipe,
        seed: int,
        clock: Clock,
        checkpoints: Path | None,
        checkpoint_every: int,
        preview_every: int | None,
        words_after: Collection[int],
    ) -> None:
        self.source, self.tasks, self.recipe, self.seed, self.clock = source, list(tasks), recipe, seed, clock
        self.checkpoints, self.checkpoint_every, self.preview_every = checkpoints, checkpoint_every, preview_every
        self.words_after = words_after
        size, step = picture_size(source, recipe), side_step(source) if recipe.buckets else None
        folders = [read_pictures(task.images, size, step=step) for task in tasks]
        self.pictures = [
            [*pictures, *(read_picture(path, size, step=step) for path in task.more)]
            for task, pictures in zip(tasks, folders, strict=True)
        ]
        words = [
            make_word(source, task, pictures, recipe, seed) for task, pictures in zip(tasks, self.pictures, strict=True)
        ]
        clock.lap("pictures")
        self.settings = settings_of(source, tasks, self.pictures, recipe, seed) if checkpoints else {}
        self.checkpoint = load_checkpoint(checkpoints, self.settings) if checkpoints else None
        self.found: list[str] = self.checkpoint.facts.get("found", []) if self.checkpoint else []
        self.notes = self.find_starts(words)
        self.notes += [
            note
            for task, pictures in zip(self.tasks, folders, strict=True)
            for note in advice.before(source, task.images, task.init, pictures)
        ]
        self.learner = Learner(source, words, recipe, seed)
        self.previewer = Previewer(source, probes(recipe.subject), seed) if preview_every else None

    def __iter__(self) -> Generator[Progress]:
        self.resume()
        try:
            if self.learner.steps_done in self.words_after and not self.learner.finished():
                yield self.progress()
            while not self.learner.finished():
                self.step()
                if not self.learner.finished():
                    yield self.progress()
        except GeneratorExit:
            self.save()
            raise
        yield self.result()

    def find_starts(self, words: Sequence[Word]) -> list[str]:
        """Replaces each init that is `auto` by words that its pictures show, and gives the word their rows. Returns a
        note for each. A run that resumes has found them before."""
        auto = [index for index, task in enumerate(self.tasks) if task.init == AUTO]
        if not auto:
            return []
        if not self.found:
            self.found = words_of_pictures(self.source, [words[index] for index in auto], self.recipe, self.seed)
        for index, init in zip(auto, self.found, strict=True):
            self.tasks[index] = replace(self.tasks[index], init=init)
            words[index].initial = initial_rows(self.source, init, self.recipe.vectors, self.seed, self.recipe.encoders)
            words[index].text = init
        self.clock.lap("search")
        return [f"{self.tasks[index].token} starts from the mean of: {self.tasks[index].init}" for index in auto]

    def resume(self) -> None:
        """Restores the newest checkpoint, if there was one."""
        if self.checkpoint is not None:
            step = self.checkpoint.step
            self.learner.restore(self.checkpoint.tensors, self.checkpoint.facts)
            self.notes.append(f"resuming from step {step} of {self.recipe.steps} ({self.checkpoints})")
            self.checkpoint = None
        self.start = self.learner.steps_done
        self.losses = [word.losses[-1] if word.losses else math.nan for word in self.learner.words]
        self.rate = self.learner.learning_rate

    def step(self) -> None:
        """Takes one optimiser step; saves a checkpoint if it is due or the run has finished."""
        self.rate = self.learner.learning_rate
        active = [word for word in self.learner.words if not word.stopped]
        self.losses = self.learner.step()
        step = self.learner.steps_done
        self.notes += [f"{word.token} has settled: it stopped at step {step}" for word in active if word.stopped]
        if self.learner.finished() or step % self.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint, if the run has a checkpoint folder."""
        if self.checkpoints:
            tensors, facts = self.learner.state()
            facts["found"] = self.found
            save_checkpoint(self.checkpoints, Checkpoint(self.learner.steps_done, tensors, facts, self.settings))

    def progress(self) -> Progress:
        """The progress after the latest step, with the notes not reported so far."""
        due = self.preview_every and self.learner.steps_done % self.preview_every == 0
        sheets = self.sheets() if due else []
        notes, self.notes = self.notes, []
        stopped = [word.stopped for word in self.learner.words]
        step, words = self.learner.steps_done, self.words()
        return Progress(
            step, self.recipe.steps, self.losses, self.rate, stopped, notes, sheets, words, start=self.start
        )

    def words(self) -> list[Concept]:
        """The words as they are now, if this step is one of `words_after`."""
        if self.learner.steps_done not in self.words_after:
            return []
        return [self.learner.concept(index, {}) for index in range(len(self.tasks))]

    def result(self) -> Progress:
        """The last progress, with the concepts."""
        self.clock.lap("learn")
        learner, words = self.learner, self.learner.words
        self.notes += [note for index in range(len(words)) for note in advice.after(learner, index)]
        sheets = self.sheets()
        concepts = [
            learner.concept(index, provenance(self.source, task, self.recipe, self.seed, len(words[index].losses)))
            for index, task in enumerate(self.tasks)
        ]
        lengths = [relative_length(learner, index) for index in range(len(words))]
        self.clock.lap("samples")
        return Progress(
            learner.steps_done,
            self.recipe.steps,
            self.losses,
            self.rate,
            [word.stopped for word in words],
            self.notes,
            sheets,
            self.words(),
            concepts,
            history=[word.losses for word in words],
            lengths=lengths,
            timings=self.clock.seconds,
            start=self.start,
        )

    def sheets(self) -> list[Sheet]:
        """Draws a sheet for every word; a failure becomes a note."""
        sheets: list[Sheet] = []
        if self.previewer is None:
            return sheets
        step = self.learner.steps_done
        for index, pictures in enumerate(self.pictures):
            try:
                sheets.append(self.previewer.sheet(self.learner.concept(index, {}), step, pictures))
            except OnewordError as error:
                self.notes.append(f"no samples of {self.learner.words[index].token} at step {step}: {error}")
        return sheets


class Clock:
    """Seconds per stage of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends `stage` and starts the next one."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def relative_length(learner: Learner, index: int) -> float:
    """The mean length of a word's vectors over the median length of the vocabulary's."""
    vectors = learner.concept(index, {}).vectors
    return float(
        np.mean([np.linalg.norm(v, axis=1).mean() / learner.target_norms[name] for name, v in vectors.items()])
    )


def settings_of(
    source: Source, tasks: Sequence[Task], pictures: Sequence[Sequence[Picture]], recipe: Recipe, seed: int
) -> dict[str, str]:
    """What must not change before a run is resumed, as text by name."""
    words = {
        f"{name} of word {number}": value
        for number, (task, task_pictures) in enumerate(zip(tasks, pictures, strict=True), start=1)
        for name, value in {
            "token": task.token,
            "init": task.init + _digest_of(task.init),
            "pictures": hashlib.sha256("".join(picture.digest for picture in task_pictures).encode()).hexdigest()[:12],
        }.items()
    }
    return {
        "model": source.digest[:12],
        "text encoders": ", ".join(source.text_encoders),
        "seed": str(seed),
        **recipe.as_text(),
        **words,
    }


def _digest_of(init: str) -> str:
    """The digest of an init that is a concept file; empty for words."""
    path = concept_file(init)
    return f" {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path else ""


def provenance(source: Source, task: Task, recipe: Recipe, seed: int, steps: int) -> dict[str, str]:
    """The metadata of a concept: how it was learned. Names only, no paths, because the file may be shared."""
    facts = {
        "base_model": source.name,
        "base_model_digest": source.digest,
        "recipe": recipe.name,
        "init": path.name if (path := concept_file(task.init)) else task.init,
        "seed": str(seed),
        "steps": str(steps),
        "version": __version__,
    }
    return {name: text.encode(errors="replace").decode() for name, text in facts.items()}  # file names may not be UTF-8
