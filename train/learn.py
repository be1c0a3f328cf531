"""Learning from folders: `learn` turns a model, folders of pictures and a recipe into concepts, telling how it goes.

    for progress in learn("miniature", [Task(Path("photos"), "<toy>", "toy")], named_recipe("fast")):
        print(progress.step, progress.losses)
    (concept,) = progress.concepts

It reads pictures, chooses where the words start, and runs the learner; it prints nothing and writes no concept.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import transformers

from oneword import __version__
from oneword.engines.errors import OnewordError, UsageError
from oneword.export.source import Source, load_source
from oneword.runtime.concept import Concept, check_token
from oneword.train import advice
from oneword.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from oneword.train.learner import Learner, Word
from oneword.train.pictures import Picture, encode_moments, random_crops, read_pictures
from oneword.train.preview import Previewer, Sheet
from oneword.train.prompts import caption_template, probes, templates
from oneword.train.recipe import Recipe
from oneword.train.starts import concept_file, initial_rows, token_ids

MAX_SEED = 2**63 - 2  # stopping draws with the next one


@dataclass(frozen=True)
class Task:
    """One word to learn: its folder of pictures, its token, and the word or words it starts from.

    `init` is a word of the model's vocabulary, several words (their rows are averaged), `random` (a random row of the
    vocabulary's median length), or a concept file. Raises `ConceptError` for a token that could not be served.
    """

    images: Path
    token: str
    init: str = "object"

    def __post_init__(self) -> None:
        check_token(self.token)


@dataclass(frozen=True)
class Progress:
    """Where a run is after `step` of `steps`. `losses` and `stopped` are in the tasks' order.

    `notes` are warnings not told before, `sheets` samples drawn after this step. The last one also has the `concepts`,
    with the `history` of each word's losses, its `lengths` over the vocabulary's, and `timings`, seconds a stage.
    """

    step: int
    steps: int
    losses: Sequence[float]
    learning_rate: float
    stopped: Sequence[bool]
    notes: Sequence[str] = ()
    sheets: Sequence[Sheet] = ()
    concepts: Sequence[Concept] = ()
    history: Sequence[Sequence[float]] = ()
    lengths: Sequence[float] = ()
    timings: dict[str, float] = field(default_factory=dict)


def learn(
    model: str | Path | Source,
    tasks: Sequence[Task],
    recipe: Recipe,
    seed: int = 0,
    *,
    checkpoints: Path | None = None,
    checkpoint_every: int = 25,
    preview_every: int | None = None,
) -> Generator[Progress]:
    """Learn every task's word in shared batches; yields after each step, the concepts with the last.

    With `checkpoints`, a folder, the run's state is kept there every so many steps and when the iterator is closed, and
    a run found there goes on. With `preview_every`, every word is sampled so often and at the end. A `Source` given as
    the model is used up: its UNet is cast in place.

    Raises `UsageError` for tasks that cannot be learned, `FileError` for pictures that cannot be read, and what
    `load_source` raises for the model.
    """
    started = time.perf_counter()
    check_tasks(tasks)
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
    source = model if isinstance(model, Source) else load_source(model)
    check_tokens(source, tasks)
    size = picture_size(source)
    loaded = time.perf_counter()
    step = side_step(source) if recipe.buckets else None
    pictures = [read_pictures(task.images, size, step=step) for task in tasks]
    words = [make_word(source, task, some, recipe, seed) for task, some in zip(tasks, pictures, strict=True)]
    notes = [
        note
        for task, some in zip(tasks, pictures, strict=True)
        for note in advice.before(source, task.images, task.init, some)
    ]
    encoded = time.perf_counter()

    learner = Learner(source, words, recipe, seed)
    previewer = Previewer(source, probes(recipe.subject), seed) if preview_every else None
    settings = settings_of(source, tasks, pictures, recipe, seed) if checkpoints else {}
    if checkpoints and (found := load_checkpoint(checkpoints, settings)):
        learner.restore(found.tensors, found.facts)
        notes.append(f"going on from step {found.step} of {recipe.steps} ({checkpoints})")
    losses = [word.losses[-1] if word.losses else math.nan for word in words]
    rate = learner.learning_rate
    sheets: list[Sheet] = []
    while not learner.finished():
        rate = learner.learning_rate
        going = [word for word in words if not word.stopped]
        losses = learner.step()
        notes += [
            f"{word.token} has settled: it stopped at step {learner.steps_done}" for word in going if word.stopped
        ]
        if checkpoints and (learner.finished() or learner.steps_done % checkpoint_every == 0):
            save_checkpoint(checkpoints, Checkpoint(learner.steps_done, *learner.state(), settings))
        if learner.finished():
            break
        sheets = []
        if previewer and preview_every and learner.steps_done % preview_every == 0:
            sheets = draw_sheets(previewer, learner, pictures, notes)
        stopped = [word.stopped for word in words]
        try:
            yield Progress(learner.steps_done, recipe.steps, losses, rate, stopped, notes, sheets)
        except GeneratorExit:
            if checkpoints:
                save_checkpoint(checkpoints, Checkpoint(learner.steps_done, *learner.state(), settings))
            raise
        notes = []
    ended = time.perf_counter()
    notes += [note for index in range(len(words)) for note in advice.after(learner, index)]
    sheets = draw_sheets(previewer, learner, pictures, notes) if previewer else []
    yield Progress(
        learner.steps_done,
        recipe.steps,
        losses,
        rate,
        [word.stopped for word in words],
        notes,
        sheets,
        concepts=[
            learner.concept(i, provenance(source, task, recipe, seed, len(words[i].losses)))
            for i, task in enumerate(tasks)
        ],
        history=[word.losses for word in words],
        lengths=[relative_length(learner, index) for index in range(len(words))],
        timings={
            "load": loaded - started,
            "pictures": encoded - loaded,
            "learn": ended - encoded,
            "look": time.perf_counter() - ended,
        },
    )


def draw_sheets(
    previewer: Previewer, learner: Learner, pictures: Sequence[Sequence[Picture]], notes: list[str]
) -> list[Sheet]:
    """A sheet of every word; what cannot be drawn is a note and ends nothing."""
    sheets = []
    for index, some in enumerate(pictures):
        try:
            sheets.append(previewer.sheet(learner.concept(index, {}), learner.steps_done, some))
        except OnewordError as error:
            notes.append(f"no samples of {learner.words[index].token} at step {learner.steps_done}: {error}")
    return sheets


def relative_length(learner: Learner, index: int) -> float:
    """The mean length of a word's vectors over the median length of the vocabulary's."""
    vectors = learner.concept(index, {}).vectors
    return float(
        np.mean([np.linalg.norm(v, axis=1).mean() / learner.target_norms[name] for name, v in vectors.items()])
    )


def settings_of(
    source: Source, tasks: Sequence[Task], pictures: Sequence[Sequence[Picture]], recipe: Recipe, seed: int
) -> dict[str, str]:
    """What must not change while a run goes on, as text by name."""
    words = {
        f"{name} of word {number}": value
        for number, (task, some) in enumerate(zip(tasks, pictures, strict=True), start=1)
        for name, value in {
            "token": task.token,
            "init": task.init + _digest_of(task.init),
            "pictures": hashlib.sha256("".join(picture.digest for picture in some).encode()).hexdigest()[:12],
        }.items()
    }
    return {"model": source.digest[:12], "seed": str(seed), **recipe.as_text(), **words}


def _digest_of(init: str) -> str:
    """What a concept file held when the run began; a word says it all."""
    path = concept_file(init)
    return f" {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path else ""


def quiet() -> None:
    """Keep diffusers' and transformers' own bars and notes off a command's output."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises `UsageError` for no task at all or for one token twice."""
    if not tasks:
        raise UsageError("nothing to learn: give a folder of pictures")
    tokens = [task.token for task in tasks]
    if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise UsageError(f"the word {', '.join(twice)} is to be learned twice: give each folder a token of its own")


def check_tokens(source: Source, tasks: Sequence[Task]) -> None:
    """Raises `UsageError` for a token that the model already knows as a word: it would mean something else."""
    for task in tasks:
        for tokenizer in source.tokenizers.values():
            ids = token_ids(tokenizer, task.token)
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                raise UsageError(
                    f"the token {task.token!r} is a word of the model's own vocabulary: call the new one <{task.token}>"
                )


def make_word(source: Source, task: Task, pictures: Sequence[Picture], recipe: Recipe, seed: int) -> Word:
    """The task, ready for the learner: pictures encoded, prompts chosen, rows at their start."""
    captions = None
    if any(picture.caption for picture in pictures):
        missing = [picture.path.name for picture in pictures if not picture.caption]
        if missing:
            raise UsageError(
                f"{task.images}: {', '.join(missing)} has no caption beside it, the others have: write all or none"
            )
        captions = [
            caption_template(picture.caption or "", task.token, str(picture.path.with_suffix(".txt")))
            for picture in pictures
        ]
    size, step = picture_size(source), side_step(source) if recipe.buckets else None
    crops = random_crops(pictures, recipe.crops, seed, size, step=step)
    return Word(
        task.token,
        encode_moments(source.vae, pictures, crops, flip=recipe.flip),
        initial_rows(source, task.init, recipe.vectors, seed),
        templates(recipe.subject),
        captions,
    )


def picture_size(source: Source) -> int:
    """The side in pixels the model was trained at: the UNet's sample size times the VAE's factor."""
    side = source.unet.config.sample_size
    if not isinstance(side, int):
        raise UsageError(f"the model's UNet has sample_size {side!r}: only square models can be learned with")
    return int(side * _vae_factor(source))


def side_step(source: Source) -> int:
    """Pixels by which a picture's sides may differ, so that neither the VAE nor the UNet leaves a rest."""
    return _vae_factor(source) * 2 ** (len(source.unet.config.block_out_channels) - 1)


def _vae_factor(source: Source) -> int:
    return 2 ** (len(source.vae.config.block_out_channels) - 1)


def provenance(source: Source, task: Task, recipe: Recipe, seed: int, steps: int) -> dict[str, str]:
    """What a concept's metadata says of how it came about: names, no paths, since the file is for sharing."""
    return {
        "base_model": source.model if source.revision else source.path.name,
        "base_model_digest": source.digest,
        "recipe": recipe.name,
        "init": path.name if (path := concept_file(task.init)) else task.init,
        "seed": str(seed),
        "steps": str(steps),
        "version": __version__,
    }
