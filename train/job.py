"""Learns one word for a server: `python -m oneword.train.job`.

The server writes an order to standard input, as one line of JSON, and keeps it open; this process reports on standard
output, one JSON object per line (`oneword.serve.messages`). When standard input is closed, by the server or because it
is gone, the run saves a checkpoint and the process ends. Killed at any instant, the same order resumes the run.

`python -m oneword.train.job --digest MODEL` prints the digest of a model's files instead.

Not covered: the queue, pictures and previews, which the server has.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from oneword.engines.errors import MissingPackage, OnewordError, UsageError, one_line
from oneword.runtime.concept import Concept, save_concept
from oneword.serve.messages import Digest, Done, Failed, Note, Order, Report, Snapshot, Started, Step

NICENESS = 10
GRACE = 1.0  # seconds for the step in progress once standard input is closed
LOCK_SECONDS = 30.0  # for a process of an earlier server to end
CLOSED = 3  # exit status: standard input was closed before the word was learned
LOCKED = 4  # exit status: another process has the run


class Closing:
    """Watches standard input on a thread. Once it is closed, `requested` is set and the process ends within GRACE."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="stdin").start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        self.requested.set()
        time.sleep(GRACE)
        os._exit(CLOSED)  # the step takes longer; the last checkpoint is whole


class Reporter:
    """Writes reports to what was standard output; anything else that prints there goes to standard error."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def __call__(self, report: Report) -> None:
        line = memoryview(msgspec.json.encode(report) + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if a report says how it ended, else CLOSED or LOCKED."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    os.nice(NICENESS)
    report = Reporter()
    if arguments[:1] == ["--digest"] and len(arguments) == 2:
        return reported(report, lambda: report(digest_of(arguments[1])), Path(arguments[1]))
    if arguments:
        raise SystemExit("usage: python -m oneword.train.job [--digest MODEL]")
    order = msgspec.json.decode(read_line(), type=Order)
    closing_ = Closing()
    status = reported(report, lambda: learn_word(order, report, closing_.requested), Path(order.folder), order.model)
    return CLOSED if closing_.requested.is_set() else status


def read_line() -> bytes:
    """The first line of standard input, read without reading ahead."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            raise SystemExit(CLOSED)
        line += byte
    return line


def digest_of(model: str) -> Digest:
    """The digest of a model's files. Nothing is loaded."""
    from oneword.export.source import find_model, source_digest, source_name

    path, revision = find_model(model)
    return Digest(source_digest(path), source_name(model, path, revision))


def reported(report: Callable[[Report], None], work: Callable[[], None], *paths: Path | str) -> int:
    """Runs `work`; an error becomes a report of one line, without `paths`. Returns the exit status."""
    try:
        work()
    except BrokenPipeError:
        return CLOSED
    except OnewordError as error:
        report(Failed(without_paths(one_line(error), *paths)))
    except Exception as error:  # a library's: its text may hold anything
        traceback.print_exc()
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("oneword"):
            report(Failed(str(MissingPackage(error.name, "train"))))
        else:
            report(Failed(f"learning failed unexpectedly ({type(error).__name__}): the server's log has the reason"))
    return 0


def learn_word(order: Order, report: Callable[[Report], None], closed: threading.Event) -> None:
    """Learns the order's word and reports what happens, until the word is learned or `closed` is set."""
    folder = Path(order.folder)
    with locked(folder / "run"):
        from oneword.export.source import encoders_left_out, load_source, silence_libraries
        from oneword.train.compute import compute_dtype
        from oneword.train.learn import learn
        from oneword.train.recipe import named_recipe
        from oneword.train.tasks import Task

        silence_libraries()
        recipe = named_recipe(order.recipe).with_changes(steps=order.steps)
        if digest_of(order.model).digest != order.digest:
            raise UsageError("the model's weights are not those the bundle was exported from: export it again")
        source = load_source(order.model, without=encoders_left_out(order.model, order.encoders))
        report(Started(machine_of(str(compute_dtype(recipe.compute)))))
        run = learn(
            source,
            [Task(folder / "pictures", order.token, order.init)],
            recipe,
            order.seed,
            checkpoints=folder / "run",
            checkpoint_every=order.checkpoint_every,
            words_after=order.snapshots,
        )
        (folder / "snapshots").mkdir(exist_ok=True)
        for step in order.snapshots:  # saved by an earlier process, whose reports may not have been read
            if (folder / _snapshot_file(step)).exists():
                report(Snapshot(step, _snapshot_file(step)))
        with closing(run):
            for progress in run:
                for note in progress.notes:
                    report(Note(without_paths(note.replace(f" ({folder / 'run'})", ""), folder, order.model)))
                (loss,) = progress.losses
                report(Step(progress.step, progress.steps, loss if math.isfinite(loss) else None))
                for concept in progress.words:
                    report(Snapshot(progress.step, save(concept, folder, _snapshot_file(progress.step))))
                for concept in progress.concepts:
                    report(Done(save(concept, folder, "word.safetensors")))
                if closed.is_set():
                    return


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run's lock; waits for a process that an earlier server has started to end, and exits if it does not."""
    from oneword.train.checkpoint import held

    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(run))
                break
            except UsageError:
                if time.monotonic() > deadline:
                    raise SystemExit(LOCKED) from None
            time.sleep(0.05)
        yield


def save(concept: Concept, folder: Path, file: str) -> str:
    """Writes a concept whole to a file in `folder`. Returns the file's relative name."""
    save_concept(concept, folder / file)
    return file


def _snapshot_file(step: int) -> str:
    return f"snapshots/{step}.safetensors"


def machine_of(dtype: str) -> Mapping[str, str]:
    """What a word's last bits depend on, besides its order."""
    import torch

    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "compute": dtype.removeprefix("torch."),
    }


def without_paths(text: str, *paths: Path | str) -> str:
    """The text with files named relative to `paths`, and `paths` themselves by their last part."""
    for path in map(str, paths):
        if os.sep in path:
            for folder in (f"{path}/pictures", path):
                text = text.replace(f"{folder}{os.sep}", "").replace(folder, Path(folder).name)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
