"""Learning from folders: `learn` turns a model, folders of pictures and a recipe into concepts, telling how it goes.

    for progress in learn("miniature", [Task(Path("photos"), "<toy>", "toy")], named_recipe("fast")):
        print(progress.step, progress.losses)
    (concept,) = progress.concepts

It reads pictures, chooses where the words start, and runs the learner; it prints nothing and writes no concept.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from oneword import __version__
from oneword.engines.errors import UsageError
from oneword.export.source import Source, load_source
from oneword.runtime.concept import Concept, check_token, load_concept
from oneword.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from oneword.train.learner import Learner, Rows, Word, vocabulary_norm
from oneword.train.pictures import Picture, encode_moments, near_duplicates, random_crops, read_pictures
from oneword.train.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, caption_template
from oneword.train.recipe import Recipe, Subject


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

    `concepts` is empty until the last one. `notes` are warnings not told before, `timings` seconds a stage.
    """

    step: int
    steps: int
    losses: Sequence[float]
    learning_rate: float
    stopped: Sequence[bool]
    notes: Sequence[str] = ()
    concepts: Sequence[Concept] = ()
    timings: dict[str, float] = field(default_factory=dict)


def learn(
    model: str | Path | Source,
    tasks: Sequence[Task],
    recipe: Recipe,
    seed: int = 0,
    *,
    checkpoints: Path | None = None,
    checkpoint_every: int = 25,
) -> Generator[Progress]:
    """Learn every task's word in shared batches; yields after each step, the concepts with the last.

    With `checkpoints`, a folder, the run's state is kept there every so many steps and when the iterator is closed, and
    a run found there goes on. A `Source` given as the model is used up: its UNet is cast in place.

    Raises `UsageError` for tasks that cannot be learned, `FileError` for pictures that cannot be read, and what
    `load_source` raises for the model.
    """
    started = time.perf_counter()
    check_tasks(tasks)
    source = model if isinstance(model, Source) else load_source(model)
    check_tokens(source, tasks)
    size = picture_size(source)
    loaded = time.perf_counter()
    step = side_step(source) if recipe.buckets else None
    pictures = [read_pictures(task.images, size, step=step) for task in tasks]
    words = [make_word(source, task, some, recipe, seed) for task, some in zip(tasks, pictures, strict=True)]
    notes = [note for task, some in zip(tasks, pictures, strict=True) for note in warnings_about(source, task, some)]
    encoded = time.perf_counter()

    learner = Learner(source, words, recipe, seed)
    settings = settings_of(source, tasks, pictures, recipe, seed) if checkpoints else {}
    if checkpoints and (found := load_checkpoint(checkpoints, settings)):
        learner.restore(found.tensors, found.facts)
        notes.append(f"going on from step {found.step} of {recipe.steps} ({checkpoints})")
    losses = [word.losses[-1] if word.losses else math.nan for word in words]
    rate = learner.learning_rate
    while not learner.finished():
        rate = learner.learning_rate
        losses = learner.step()
        if checkpoints and (learner.finished() or learner.steps_done % checkpoint_every == 0):
            save_checkpoint(checkpoints, Checkpoint(learner.steps_done, *learner.state(), settings))
        if learner.finished():
            break
        try:
            yield Progress(learner.steps_done, recipe.steps, losses, rate, [word.stopped for word in words], notes)
        except GeneratorExit:
            if checkpoints:
                save_checkpoint(checkpoints, Checkpoint(learner.steps_done, *learner.state(), settings))
            raise
        notes = []
    ended = time.perf_counter()
    notes += [f"{word.token} is where it started: nothing was learned" for word in words if not has_moved(word)]
    yield Progress(
        learner.steps_done,
        recipe.steps,
        losses,
        rate,
        [word.stopped for word in words],
        notes,
        [
            learner.concept(i, provenance(source, task, recipe, seed, learner.steps_done))
            for i, task in enumerate(tasks)
        ],
        {"load": loaded - started, "pictures": encoded - loaded, "learn": ended - encoded},
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
            "init": task.init,
            "pictures": hashlib.sha256("".join(picture.digest for picture in some).encode()).hexdigest()[:12],
        }.items()
    }
    return {"model": source.digest[:12], "seed": str(seed), **recipe.as_text(), **words}


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
        STYLE_TEMPLATES if recipe.subject is Subject.STYLE else OBJECT_TEMPLATES,
        captions,
    )


def initial_rows(source: Source, init: str, vectors: int, seed: int) -> Rows:
    """Where a word starts, `vectors` rows for each text encoder; see `Task.init`."""
    if init.endswith(".safetensors"):
        return _rows_of_concept(load_concept(Path(init)), source, vectors)
    rows: dict[str, torch.Tensor] = {}
    for name, model in source.text_encoders.items():
        table = embedding_table(model)
        if init == "random":
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(vectors, table.shape[1], generator=generator)
            rows[name] = direction / direction.norm(dim=-1, keepdim=True) * vocabulary_norm(table)
        else:
            ids = [i for word in split_words(init) for i in token_ids(source.tokenizers[name], word)]
            rows[name] = table[ids].mean(0, keepdim=True).repeat(vectors, 1)
    return rows


def _rows_of_concept(concept: Concept, source: Source, vectors: int) -> Rows:
    rows: dict[str, torch.Tensor] = {}
    for name, model in source.text_encoders.items():
        width = embedding_table(model).shape[1]
        if name not in concept.vectors or concept.vectors[name].shape[1] != width:
            raise UsageError(
                f"the concept {concept.token!r} has no rows {width} wide for {name}: start from another word"
            )
        given = torch.from_numpy(concept.vectors[name].copy())
        rows[name] = given[torch.arange(vectors).clamp(max=len(given) - 1)]
    return rows


def embedding_table(model: Any) -> torch.Tensor:
    """A text encoder's vocabulary rows [V, D] float32."""
    table: torch.Tensor = model.get_input_embeddings().weight
    return table.detach().float()


def split_words(init: str) -> list[str]:
    """The words of an init, parted by spaces or commas. Raises `UsageError` if there are none."""
    words = re.split(r"[\s,]+", init.strip())
    if not words[0]:
        raise UsageError("init is empty: give a word that says roughly what the pictures show, for example toy")
    return words


def token_ids(tokenizer: Any, word: str) -> list[int]:
    """The ids of a word, without BOS and EOS."""
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise UsageError(
            f"init {word!r} is no token at all for this model: give a word that says what the pictures show"
        )
    return ids


def warnings_about(source: Source, task: Task, pictures: Sequence[Picture]) -> Iterator[str]:
    """What the user should know before a minute is spent."""
    if len(pictures) < 3:
        yield f"{task.images} holds {len(pictures)} picture{'s'[: len(pictures) - 1]}: three to five are usual"
    for one, other in near_duplicates(pictures):
        yield f"{one.name} and {other.name} in {task.images} are nearly the same picture: one of them teaches nothing"
    if task.init == "random" or task.init.endswith(".safetensors"):
        return
    tokenizer = next(iter(source.tokenizers.values()))
    for word in split_words(task.init):
        if len(token_ids(tokenizer, word)) > 1:
            yield f"init {word!r} is several tokens of this model, their mean is used: a common word starts better"


def has_moved(word: Word) -> bool:
    """Whether learning changed the word by more than a hundredth of its length."""
    return any(
        float((rows.detach() - word.initial[name]).norm()) > 0.01 * float(word.initial[name].norm())
        for name, rows in word.rows.items()
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
    """What a concept's metadata says of how it came about."""
    return {
        "base_model": str(source.model),
        "base_model_digest": source.digest,
        "recipe": recipe.name,
        "init": task.init,
        "seed": str(seed),
        "steps": str(steps),
        "version": __version__,
    }
