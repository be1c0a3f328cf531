"""Jobs as files in the store, which every server reads and a job's owner writes.

    jobs/tenants/<tenant>/<id>/request.json            what was requested; never changes
                               pictures/picture-1.png  ... and whatever pictures a server adds
                               terms/00000001.json     its owner and progress; the newest term counts
                               snapshots/5.safetensors
                               checkpoint/step-.../    the run's newest checkpoint, copied from time to time
                               word.safetensors
    jobs/open/<id>                                     a job that has not ended: its tenant and first owner
    jobs/cancel/<id>                                   a job whose tenant wants it to stop
    jobs/servers/<id>                                  a sign of life that its server renews

A term is one server's ownership of a job. It is created exclusively, so that one server wins, and only its owner writes
it: one that is late writes to its own old term, which nobody reads. Clocks and the times of files decide only about
what is days old. Synchronous; not covered: who takes over what and when (`oneword.serve.jobs`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from oneword.engines.errors import OnewordError
from oneword.engines.files import from_json
from oneword.runtime.concept import Concept, concept_of, read_safetensors
from oneword.serve.errors import NotFound, Unavailable
from oneword.serve.files import Files, quoted

S = TypeVar("S", bound=msgspec.Struct)
CHECKPOINT_FILES = ("state.safetensors", "state.json", "COMPLETE")


class Damaged(Unavailable):
    """A job's file was not written by a server, or not wholly."""


class Status(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (Status.QUEUED, Status.RUNNING)


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The run is after `step`. `seconds_left` is None until two steps have been timed."""

    number: int
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None


class SnapshotSaved(msgspec.Struct, frozen=True, tag="snapshot"):
    """The word's vectors after `step` are in the store."""

    number: int
    step: int


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A warning for the user."""

    number: int
    text: str


class WordSaved(msgspec.Struct, frozen=True, tag="done"):
    """The word is in the store. The last event."""

    number: int
    identity: str


class Failed(msgspec.Struct, frozen=True, tag="error"):
    """The word could not be learned. The last event."""

    number: int
    error: str


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """The job was cancelled. The last event."""

    number: int


StoredEvent: TypeAlias = Progress | SnapshotSaved | Note | WordSaved | Failed | Cancelled


class JobRequest(msgspec.Struct, frozen=True):
    """What a tenant requested. `pictures` are the names of the job's own pictures, `digest` is the model's, `encoders`
    are the bundle's text encoders. `replace` says whether the word may take the place of another."""

    tenant: str
    token: str
    init: str
    recipe: str
    steps: int
    seed: int
    pictures: tuple[str, ...]
    digest: str
    encoders: tuple[str, ...]
    created: float
    replace: bool = False


class State(msgspec.Struct, frozen=True):
    """How far a job is in its owner's term. `events` are all that a new reader needs; of progress, only the last."""

    owner: str
    steps: int
    status: Status = Status.QUEUED
    step: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    identity: str | None = None
    error: str | None = None
    machine: Mapping[str, str] = {}
    number: int = 0
    """The last event's."""
    events: tuple[StoredEvent, ...] = ()

    def snapshots(self) -> tuple[int, ...]:
        """The steps whose snapshots are in the store."""
        return tuple(event.step for event in self.events if isinstance(event, SnapshotSaved))

    def after_progress(self, step: int, steps: int, loss: float | None, seconds_left: float | None) -> State:
        """This state after a step."""
        event = Progress(self.number + 1, step, steps, loss, seconds_left)
        events = tuple(event for event in self.events if not isinstance(event, Progress))
        changed = msgspec.structs.replace(
            self, status=Status.RUNNING, step=step, steps=steps, loss=loss, seconds_left=seconds_left
        )
        return msgspec.structs.replace(changed, number=event.number, events=(*events, event))

    def after_snapshot(self, step: int) -> State:
        """This state with one more snapshot; unchanged if it has it already, as after a restart."""
        return self if step in self.snapshots() else self._with(SnapshotSaved(self.number + 1, step))

    def after_note(self, text: str) -> State:
        """This state with one more note, unless it is there already."""
        if any(isinstance(event, Note) and event.text == text for event in self.events):
            return self
        return self._with(Note(self.number + 1, text))

    def succeeded(self, identity: str) -> State:
        """The last state of a job whose word is in the store."""
        ended = msgspec.structs.replace(self, status=Status.SUCCEEDED, identity=identity, seconds_left=None)
        return ended._with(WordSaved(self.number + 1, identity))

    def failed(self, error: str) -> State:
        """The last state of a job that cannot be done."""
        ended = msgspec.structs.replace(self, status=Status.FAILED, error=error, seconds_left=None)
        return ended._with(Failed(self.number + 1, error))

    def cancelled(self) -> State:
        """The last state of a job that its tenant stopped."""
        ended = msgspec.structs.replace(self, status=Status.CANCELLED, seconds_left=None)
        return ended._with(Cancelled(self.number + 1))

    def _with(self, event: StoredEvent) -> State:
        return msgspec.structs.replace(self, number=event.number, events=(*self.events, event))


class OpenJob(msgspec.Struct, frozen=True):
    """A job that has not ended: whose it is, and the server that accepted it."""

    tenant: str
    server: str


class JobFiles:
    """The jobs in a store. Every method raises `Unavailable` if the store cannot be reached."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def create(self, identifier: str, request: JobRequest, pictures: Sequence[bytes], state: State) -> None:
        """Writes a new job, owned by `state.owner` in term 1. Its open mark is written first.

        Raises `Unavailable` if another server has deleted it meanwhile, as after a long pause of this one.
        """
        mark = OpenJob(request.tenant, state.owner)
        self._files.write(f"jobs/open/{identifier}", msgspec.json.encode(mark))
        folder = _folder(request.tenant, identifier)
        for name, data in zip(request.pictures, pictures, strict=True):
            self._files.write(f"{folder}/pictures/{name}", data)
        self._files.write(f"{folder}/request.json", msgspec.json.encode(request))
        if not self.take(request.tenant, identifier, 1, state) or self.open_job(identifier) is None:
            raise Unavailable("the server paused while it accepted the job: send the request again")

    def request(self, tenant: str, identifier: str) -> JobRequest | None:
        """What was requested; None if there is no such job."""
        return _decoded(self._files.read(f"{_folder(tenant, identifier)}/request.json"), JobRequest)

    def newest(self, tenant: str, identifier: str) -> tuple[int, State] | None:
        """The newest term and its state; None if there is no such job."""
        folder = f"{_folder(tenant, identifier)}/terms"
        for name in sorted(self._files.names(folder), reverse=True):
            state = _decoded(self._files.read(f"{folder}/{name}"), State)
            return None if state is None else (int(name.removesuffix(".json")), state)
        return None

    def take(self, tenant: str, identifier: str, term: int, state: State) -> bool:
        """Begins a term. Returns whether it did: of several servers, one succeeds."""
        return self._files.create(_term(tenant, identifier, term), msgspec.json.encode(state))

    def write(self, tenant: str, identifier: str, term: int, state: State) -> None:
        """Writes the state of an own term; the last state is synced."""
        data = msgspec.json.encode(state)
        self._files.write(_term(tenant, identifier, term), data, durable=state.status.ended)

    def close(self, identifier: str) -> None:
        """Marks a job as ended."""
        for mark in ("cancel", "open"):
            self._files.delete(f"jobs/{mark}/{identifier}")

    def delete(self, tenant: str, identifier: str) -> None:
        """Deletes a job and everything in it."""
        self._files.delete_folder(_folder(tenant, identifier))
        self.close(identifier)

    def delete_unaccepted(self, tenant: str, identifier: str, ended: State) -> bool:
        """Deletes a job without a term, so that it cannot be accepted any more. Returns False if it has one meanwhile.

        `ended` is written as its first term, then the mark is deleted: `create` finds the one or misses the other."""
        if not self.take(tenant, identifier, 1, ended):
            return False
        self.close(identifier)
        self._files.delete_folder(_folder(tenant, identifier))
        return True

    def delete_pictures(self, tenant: str, identifier: str) -> None:
        """Deletes a job's pictures, and the copy of its run."""
        for name in ("pictures", "checkpoint"):
            self._files.delete_folder(f"{_folder(tenant, identifier)}/{name}")

    def delete_oldest(self, tenant: str, count: int) -> None:
        """Deletes a tenant's oldest jobs that have ended, while there are more than `count`."""
        identifiers = self.identifiers(tenant)
        if len(identifiers) <= count:
            return
        unfinished = set(self.open_identifiers())
        for identifier in identifiers[:-count]:
            if identifier not in unfinished:
                self._files.delete_folder(_folder(tenant, identifier))

    def identifiers(self, tenant: str) -> list[str]:
        """A tenant's jobs, the oldest first."""
        return sorted(self._files.names(_tenant(tenant)))

    def delete_ended(self, created_before: str, ended_before: float) -> int:
        """Deletes all tenants' jobs that ended before a time, among those with ids that sort before `created_before`.
        Returns their number."""
        unfinished, count = set(self.open_identifiers()), 0
        for tenant in self._files.names("jobs/tenants"):
            for identifier in self._files.names(f"jobs/tenants/{tenant}"):
                folder = f"jobs/tenants/{tenant}/{identifier}"
                if identifier >= created_before or identifier in unfinished or self._written(folder) >= ended_before:
                    continue
                self._files.delete_folder(folder)
                count += 1
        return count

    def last_sign(self, identifier: str, tenant: str | None, server: str | None) -> float:
        """The last sign that an open job is continued, in seconds since 1970: the newest time of its mark, its newest
        term and a server's sign of life, of those that are known and exist."""
        paths = [f"jobs/open/{identifier}", *([] if server is None else [f"jobs/servers/{server}"])]
        written = 0.0 if tenant is None else self._written(_folder(tenant, identifier))
        return max(written, *(self._files.modified(path) or 0.0 for path in paths))

    def _written(self, folder: str) -> float:
        """When the newest term of the job in a folder was last written; 0 if it has none."""
        names = self._files.names(f"{folder}/terms")
        return (self._files.modified(f"{folder}/terms/{max(names)}") or 0.0) if names else 0.0

    # ---- marks -------------------------------------------------------------------------------------------------------

    def open_identifiers(self) -> list[str]:
        """All servers' jobs that have not ended, the oldest first."""
        return sorted(self._files.names("jobs/open"))

    def open_job(self, identifier: str) -> OpenJob | None:
        """The mark of a job that has not ended; None if it has."""
        return _decoded(self._files.read(f"jobs/open/{identifier}"), OpenJob)

    def request_cancel(self, identifier: str) -> None:
        """Asks a job's owner to cancel it."""
        self._files.write(f"jobs/cancel/{identifier}", b"{}")

    def cancel_requests(self) -> Sequence[str]:
        """The jobs that are to be cancelled."""
        return self._files.names("jobs/cancel")

    def write_beat(self, server: str, beat: str) -> None:
        """Renews a server's sign of life: any text that differs from the last one. Empty means that it has stopped."""
        self._files.write(f"jobs/servers/{server}", json.dumps({"beat": beat}).encode(), durable=False)

    def beats(self) -> dict[str, str]:
        """The servers' last signs of life."""
        result: dict[str, str] = {}
        for server in self._files.names("jobs/servers"):
            try:
                content = _decoded(self._files.read(f"jobs/servers/{server}"), _Beat)
                result[server] = content.beat if content else ""
            except Damaged:  # a live server writes another one
                result[server] = "damaged"
        return result

    def forget_server(self, server: str) -> None:
        """Deletes a dead server's sign of life."""
        self._files.delete(f"jobs/servers/{server}")

    # ---- contents ----------------------------------------------------------------------------------------------------

    def picture(self, tenant: str, identifier: str, name: str) -> bytes:
        """One of a job's pictures. Raises `NotFound`."""
        data = self._files.read(f"{_folder(tenant, identifier)}/pictures/{name}")
        if data is None:
            raise NotFound("the job has no such picture")
        return data

    def write_picture(self, tenant: str, identifier: str, name: str, data: bytes) -> None:
        """Adds a picture to a job."""
        self._files.write(f"{_folder(tenant, identifier)}/pictures/{name}", data, durable=False)

    def snapshot(self, tenant: str, identifier: str, step: int) -> Concept:
        """The word after `step`. Raises `NotFound`."""
        return self._concept(f"{_folder(tenant, identifier)}/snapshots/{step}.safetensors")

    def write_snapshot(self, tenant: str, identifier: str, step: int, data: bytes) -> None:
        """Writes the file of the word after `step`."""
        self._files.write(f"{_folder(tenant, identifier)}/snapshots/{step}.safetensors", data, durable=False)

    def word(self, tenant: str, identifier: str) -> Concept:
        """The learned word. Raises `NotFound`."""
        return self._concept(f"{_folder(tenant, identifier)}/word.safetensors")

    def write_word(self, tenant: str, identifier: str, data: bytes) -> None:
        """Writes the learned word's file."""
        self._files.write(f"{_folder(tenant, identifier)}/word.safetensors", data)

    def save_checkpoint(self, tenant: str, identifier: str, run: Path, until: int) -> str | None:
        """Copies a run's newest whole checkpoint to the store, and deletes older copies. Returns its name.

        Checkpoints after step `until` are skipped: the run's reports before them may not be in the store yet."""
        folder = f"{_folder(tenant, identifier)}/checkpoint"
        for path in sorted(run.glob("step-*"), reverse=True):
            if int(path.name.removeprefix("step-")) > until:
                continue
            try:
                contents = [(path / name).read_bytes() for name in CHECKPOINT_FILES]
            except OSError:  # being deleted
                continue
            older = [name for name in self._files.names(folder) if name != path.name]
            for name, content in zip(CHECKPOINT_FILES, contents, strict=True):  # the mark last
                self._files.write(f"{folder}/{path.name}/{name}", content)
            for name in older:
                self._files.delete_folder(f"{folder}/{name}")
            return path.name
        return None

    def load_checkpoint(self, tenant: str, identifier: str, run: Path) -> str | None:
        """Copies the newest whole checkpoint from the store to a run that has none. Returns its name."""
        folder = f"{_folder(tenant, identifier)}/checkpoint"
        for name in sorted(self._files.names(folder), reverse=True):
            contents = [self._files.read(f"{folder}/{name}/{file}") for file in CHECKPOINT_FILES]
            if not _is_whole(contents):
                continue
            (run / name).mkdir(parents=True)
            for file, content in zip(CHECKPOINT_FILES, contents, strict=True):
                (run / name / file).write_bytes(content or b"")
            return name
        return None

    def _concept(self, name: str) -> Concept:
        data = self._files.read(name)
        if data is None:
            raise NotFound("the job has no such word: it may not be learned yet")
        try:
            return concept_of(*read_safetensors(data, "the word"), "the word")
        except OnewordError as error:
            raise Damaged("the word's file in the store is damaged") from error


class _Beat(msgspec.Struct, frozen=True):
    beat: str


def _folder(tenant: str, identifier: str) -> str:
    return f"{_tenant(tenant)}/{identifier}"


def _tenant(tenant: str) -> str:
    return f"jobs/tenants/{quoted(tenant)}"


def _term(tenant: str, identifier: str, term: int) -> str:
    return f"{_folder(tenant, identifier)}/terms/{term:08d}.json"


def _decoded(data: bytes | None, kind: type[S]) -> S | None:
    """The object in a file; None if there is no file. Raises `Damaged` for one that was not written by a server."""
    if data is None:
        return None
    try:
        return from_json(data, kind)
    except ValueError as error:
        raise Damaged("a job's file in the store is damaged") from error


def _is_whole(contents: Sequence[bytes | None]) -> bool:
    """Whether a checkpoint's files are all there and have the hashes in its mark."""
    *states, mark = contents
    if mark is None or None in states:
        return False
    try:
        hashes = json.loads(mark)
    except ValueError:
        return False
    return bool(hashes == [hashlib.sha256(state or b"").hexdigest() for state in states])
