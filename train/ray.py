"""Learns many words on a Ray cluster: one task per group of words, retried if its worker dies.

Every machine needs this package, and the model and the pictures under the same paths. A word has the same bits as one
learned in this process: each word has its own call of the network and its own random stream, and a task uses the same
number type and as many threads as this process. Ray, oneword's extra `ray`, is imported on use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oneword.engines.errors import EngineError, MissingPackage, OnewordError
from oneword.export.source import silence_libraries
from oneword.runtime.concept import Concept
from oneword.train.compute import compute_dtype
from oneword.train.initial import concept_file
from oneword.train.learn import learn
from oneword.train.recipe import Compute, Recipe
from oneword.train.tasks import Task, check_tasks

RETRIES = 3  # of a task whose worker died
Parts = dict[str, Any]  # the fields of a Concept, as values that can be pickled


def learn_on_ray(
    model: str,
    tasks: Sequence[Task],
    recipe: Recipe,
    seed: int = 0,
    *,
    config: Path | None = None,
    without: Sequence[str] = (),
    address: str = "local",
    group: int = 4,
) -> Iterator[tuple[Mapping[int, Concept], list[str]]]:
    """Yields each group's concepts, by task number, and the notes of its run as soon as the group is done.

    `address` is `local` (a cluster on this machine, for this call), `auto` (the cluster this machine belongs to) or
    host:port. Raises what `learn` raises, and `EngineError` if a group's workers keep dying.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("ray", "ray") from error
    check_tasks(tasks)
    model, config, tasks, recipe = portable(model, config, tasks, recipe)
    threads = torch.get_num_threads()
    started = not ray.is_initialized()
    if started:
        local = {"num_cpus": max(threads, torch.multiprocessing.cpu_count()), "include_dashboard": False}
        options = local if address == "local" else {"address": address}
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises a plain Exception if a node does not start
            raise EngineError(
                f"no Ray cluster at {address!r} ({str(error).splitlines()[0]}): start one with `ray start`"
            ) from error
    try:
        remote = ray.remote(num_cpus=threads, max_retries=RETRIES)(learn_group)
        groups = [range(first, min(first + group, len(tasks))) for first in range(0, len(tasks), group)]
        pending = {
            remote.remote(model, config, without, [tasks[number] for number in numbers], recipe, seed, threads): numbers
            for numbers in groups
        }
        while pending:
            (finished,), _ = ray.wait(list(pending), num_returns=1)
            numbers = pending.pop(finished)
            parts, notes = _result(ray, finished)
            yield dict(zip(numbers, [Concept(**fields) for fields in parts], strict=True)), notes
    finally:
        if started:
            ray.shutdown()


def portable(
    model: str, config: Path | None, tasks: Sequence[Task], recipe: Recipe
) -> tuple[str, Path | None, list[Task], Recipe]:
    """Makes the arguments independent of the machine: absolute paths, and this processor's number type."""
    compute = Compute.BF16 if compute_dtype(recipe.compute) is torch.bfloat16 else Compute.FP32
    portable_tasks = [
        replace(
            task,
            images=task.images.absolute(),
            more=tuple(path.absolute() for path in task.more),
            init=str(path.absolute()) if (path := concept_file(task.init)) else task.init,
        )
        for task in tasks
    ]
    return (
        _absolute(model),
        None if config is None else Path(_absolute(str(config))),
        portable_tasks,
        recipe.with_changes(words_per_call=1, compute=compute),
    )


def _absolute(model: str) -> str:
    """A model's absolute path; `miniature` and hub ids are unchanged."""
    return str(Path(model).absolute()) if model != "miniature" and Path(model).exists() else model


def learn_group(
    model: str,
    config: Path | None,
    without: Sequence[str],
    tasks: Sequence[Task],
    recipe: Recipe,
    seed: int,
    threads: int,
) -> tuple[list[Parts], list[str]]:
    """Learns one group, on a worker. Returns the fields of its concepts and the notes of its run."""
    torch.set_num_threads(threads)
    silence_libraries()
    notes: list[str] = []
    for progress in learn(model, tasks, recipe, seed, config=config, without=without):
        notes += progress.notes
    concepts = progress.concepts  # the last progress always has them
    return [fields_of(concept) for concept in concepts], notes


def fields_of(concept: Concept) -> Parts:
    """The concept's fields."""
    values = ((field.name, getattr(concept, field.name)) for field in dataclasses.fields(concept))
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values}


def _result(ray: Any, finished: Any) -> tuple[list[Parts], list[str]]:
    try:
        return ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OnewordError):
            raise error.cause from error
        raise
    except ray.exceptions.WorkerCrashedError as error:
        raise EngineError(
            f"a group's worker died {RETRIES + 1} times: check its machine's memory and Ray's logs"
        ) from error
