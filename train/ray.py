"""Many words over a Ray cluster: a task for each group of words, tried again where a worker dies.

Every machine needs this package, and the model and the pictures under the same paths. A word comes out with the bits it
has when it is learned here: each has its own UNet call and its own random stream, and a task computes in the type and
with as many threads as this process does. Ray is imported when it is asked for (`pip install 'oneword[ray]'`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oneword.engines.errors import EngineError, MissingPackage, OnewordError
from oneword.runtime.concept import Concept
from oneword.train.learner import compute_dtype
from oneword.train.recipe import Compute, Recipe
from oneword.train.run import Task, check_tasks, learn, quiet
from oneword.train.starts import concept_file

RETRIES = 3  # of a task whose worker died
Learned = list[tuple[str, dict[str, np.ndarray], dict[str, str]]]  # what a Concept is made of, as it travels


def learn_on_ray(
    model: str, tasks: Sequence[Task], recipe: Recipe, seed: int = 0, *, address: str = "local", group: int = 4
) -> Iterator[tuple[Mapping[int, Concept], list[str]]]:
    """Yields the concepts of each group as it is done, by the tasks' numbers, and the notes of its run.

    `address` is `local` (a cluster on this machine, for the time being), `auto` (the one this machine belongs to) or
    host:port. Raises what `learn` raises, and `EngineError` where a group's workers died again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("ray", "ray") from error
    check_tasks(tasks)
    model, tasks, recipe = as_anywhere(model, tasks, recipe)
    threads = torch.get_num_threads()
    started = not ray.is_initialized()
    if started:
        here = {"num_cpus": max(threads, torch.multiprocessing.cpu_count()), "include_dashboard": False}
        try:
            ray.init(**here if address == "local" else {"address": address}, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # a node that does not come up raises just that
            raise EngineError(f"no Ray cluster at {address!r} ({str(error).splitlines()[0]}): ray start it") from error
    try:
        remote = ray.remote(num_cpus=threads, max_retries=RETRIES)(learn_group)
        numbers = [range(first, min(first + group, len(tasks))) for first in range(0, len(tasks), group)]
        waiting = {remote.remote(model, [tasks[n] for n in some], recipe, seed, threads): some for some in numbers}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            some = waiting.pop(done)
            learned, notes = _result(ray, done)
            yield dict(zip(some, [Concept(*parts) for parts in learned], strict=True)), notes
    finally:
        if started:
            ray.shutdown()


def as_anywhere(model: str, tasks: Sequence[Task], recipe: Recipe) -> tuple[str, list[Task], Recipe]:
    """The same on any machine: absolute paths (a worker has a working folder of its own), this processor's type."""
    compute = Compute.BF16 if compute_dtype(recipe.compute) is torch.bfloat16 else Compute.FP32
    moved = [
        replace(
            task,
            images=task.images.absolute(),
            init=str(path.absolute()) if (path := concept_file(task.init)) else task.init,
        )
        for task in tasks
    ]
    here = str(Path(model).absolute()) if model != "miniature" and Path(model).exists() else model
    return here, moved, recipe.with_changes(words_a_call=1, compute=compute)


def learn_group(
    model: str, tasks: Sequence[Task], recipe: Recipe, seed: int, threads: int
) -> tuple[Learned, list[str]]:
    """One group, on a worker: its words, and what there is to say of them."""
    torch.set_num_threads(threads)
    quiet()
    notes: list[str] = []
    for progress in learn(model, tasks, recipe, seed):
        notes += progress.notes
    concepts = progress.concepts  # a run always ends with them
    return [(concept.token, dict(concept.vectors), dict(concept.provenance)) for concept in concepts], notes


def _result(ray: Any, done: Any) -> tuple[Learned, list[str]]:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OnewordError):
            raise error.cause from error
        raise
    except ray.exceptions.WorkerCrashedError as error:
        raise EngineError(
            f"a group's worker died {RETRIES + 1} times: see its machine's memory and Ray's logs"
        ) from error
