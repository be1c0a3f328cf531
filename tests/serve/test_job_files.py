from pathlib import Path

import pytest
import torch

from oneword.serve.errors import NotFound, Unavailable
from oneword.serve.files import open_files
from oneword.serve.job_files import (
    Cancelled,
    Failed,
    JobFiles,
    JobRequest,
    Note,
    Progress,
    SnapshotSaved,
    State,
    Status,
    WordSaved,
)
from oneword.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

REQUEST = JobRequest(
    "alice", "<toy>", "toy", "directional", 50, 0, ("picture-1.png",), "digest", ("text_encoder",), 1.5
)
JOB = "0" * 32


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    files = JobFiles(open_files(str(tmp_path / "store")))
    files.create(JOB, REQUEST, [b"png"], State("one", 50))
    return files


def test_a_job_is_read_as_it_was_written(files: JobFiles) -> None:
    assert files.request("alice", JOB) == REQUEST
    assert files.request("bob", JOB) is None
    assert files.picture("alice", JOB, "picture-1.png") == b"png"
    assert files.newest("alice", JOB) == (1, State("one", 50))
    assert files.identifiers("alice") == files.open_identifiers() == [JOB]
    mark = files.open_job(JOB)
    assert mark is not None
    assert (mark.tenant, mark.server) == ("alice", "one")
    with pytest.raises(NotFound):
        files.word("alice", JOB)

    files.request_cancel(JOB)
    assert files.cancel_requests() == [JOB]
    files.close(JOB)
    assert (files.open_identifiers(), files.open_job(JOB), files.cancel_requests()) == ([], None, [])
    files.delete("alice", JOB)
    assert files.identifiers("alice") == []


def test_a_term_has_one_owner_and_the_newest_counts(files: JobFiles) -> None:
    assert files.take("alice", JOB, 2, State("two", 50))
    assert not files.take("alice", JOB, 2, State("three", 50))
    files.write("alice", JOB, 1, State("one", 50, step=9))  # too late

    assert files.newest("alice", JOB) == (2, State("two", 50))


def test_a_job_that_was_deleted_before_it_was_accepted_cannot_be_accepted(files: JobFiles) -> None:
    """By another server: just before the first term is written, or wholly while a picture is."""
    late, ended = "1" * 32, State("two", 50).failed("gone")
    write = files._files.write

    def paused(path: str, data: bytes, *, durable: bool = True) -> None:
        write(path, data, durable=durable)
        if path.endswith(".png"):
            assert files.delete_unaccepted("alice", late, ended)

    for delete in (lambda: files.take("alice", late, 1, ended), lambda: setattr(files._files, "write", paused)):
        delete()
        with pytest.raises(Unavailable, match="the server paused while it accepted the job: send the request again"):
            files.create(late, REQUEST, [b"png"], State("one", 50))
        files.delete("alice", late)

    assert files.open_identifiers() == files.identifiers("alice") == [JOB]


def test_a_job_that_was_accepted_is_not_deleted_as_if_it_was_not(files: JobFiles) -> None:
    assert not files.delete_unaccepted("alice", JOB, State("two", 50).failed("gone"))

    assert files.newest("alice", JOB) == (1, State("one", 50))
    assert files.open_identifiers() == [JOB]


def test_events_are_numbered_and_only_the_last_progress_is_kept() -> None:
    state = State("one", 50).after_note("few pictures").after_progress(0, 50, None, None).after_snapshot(0)
    state = state.after_progress(1, 50, 0.5, None).after_progress(2, 50, 0.25, 12.0)
    again = state.after_note("few pictures").after_snapshot(0)  # as a process that resumes does

    assert again == state
    assert (state.status, state.step, state.loss, state.seconds_left) == (Status.RUNNING, 2, 0.25, 12.0)
    assert state.events == (Note(1, "few pictures"), SnapshotSaved(3, 0), Progress(5, 2, 50, 0.25, 12.0))
    endings = [state.succeeded("identity"), state.failed("why"), state.cancelled()]
    assert [ended.events[-1] for ended in endings] == [WordSaved(6, "identity"), Failed(6, "why"), Cancelled(6)]
    assert all(ended.status.ended and ended.number == 6 for ended in endings)


def test_a_checkpoint_in_the_store_resumes_a_run_elsewhere(files: JobFiles, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert files.save_checkpoint("alice", JOB, run, until=9) is None
    for step in (1, 2, 3):
        save_checkpoint(run, Checkpoint(step, {"x": torch.full((3,), float(step))}, {"losses": [0.1]}, {"seed": "1"}))
        assert files.save_checkpoint("alice", JOB, run, until=9) == f"step-{step:08d}"

    assert files.load_checkpoint("alice", JOB, copy) == "step-00000003"

    loaded = load_checkpoint(copy, {"seed": "1"})
    assert loaded is not None
    assert loaded.step == 3
    assert torch.equal(loaded.tensors["x"], torch.full((3,), 3.0))


def test_a_checkpoint_waits_for_the_reports_before_it(files: JobFiles, tmp_path: Path) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path / "run", Checkpoint(step, {"x": torch.ones(1)}, {}, {}))

    names = [files.save_checkpoint("alice", JOB, tmp_path / "run", until) for until in (4, 5, 9, 10)]

    assert names == [None, "step-00000005", "step-00000005", "step-00000010"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "COMPLETE"])
def test_a_checkpoint_that_was_copied_in_part_is_not_used(files: JobFiles, tmp_path: Path, file: str) -> None:
    save_checkpoint(tmp_path / "here", Checkpoint(1, {"x": torch.ones(3)}, {}, {"seed": "1"}))
    files.save_checkpoint("alice", JOB, tmp_path / "here", until=1)
    (copy,) = (tmp_path / "store").rglob(file)
    copy.write_bytes(b"{}") if file == "state.json" else copy.unlink()

    assert files.load_checkpoint("alice", JOB, tmp_path / "there") is None
    assert not (tmp_path / "there").exists()


def test_a_damaged_file_makes_the_job_unavailable_and_names_no_path(files: JobFiles, tmp_path: Path) -> None:
    for path in (tmp_path / "store").rglob("*.json"):
        path.write_text("{")

    for read in (files.request, files.newest):
        with pytest.raises(Unavailable) as error:
            read("alice", JOB)
        assert "/" not in error.value.message
