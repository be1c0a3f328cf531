"""The jobs that this server has to do, in order: a SQLite file on its local disk, which outlives the process.

The file also has the server's id, under which it owns jobs in the store. One process at a time can use the folder. A
server that learns nothing has an empty queue in memory instead. Not covered: the jobs themselves, whose files are in
the store. Not thread-safe: call it from one thread.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from pathlib import Path
from typing import NamedTuple

from oneword.engines.errors import FileError, UsageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS server (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, term INTEGER NOT NULL
);
"""


class Entry(NamedTuple):
    """A job of this server, and the term in which it owns it."""

    id: str
    tenant: str
    term: int


class Queue:
    """Raises `UsageError` if another process uses the folder, `FileError` if it cannot be used."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder, the queue ends with the process."""
        self._lock = None if folder is None else self._locked(folder)
        path = ":memory:" if folder is None else folder / "queue.sqlite"
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_SCHEMA)
            self.server = self._server()
        except sqlite3.Error as error:
            self._unlock()
            raise FileError(f"{path} cannot be used ({error}): delete that file") from error

    @staticmethod
    def _locked(folder: Path) -> int:
        """The descriptor of the folder's lock."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "queue.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise FileError(f"{folder}: cannot be used for jobs ({error.strerror}): choose another folder") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UsageError(f"another server uses {folder} for its jobs: give each server its own folder") from error
        return lock

    def add(self, entry: Entry) -> None:
        """Appends a job; one that is there already keeps its place and gets the new term."""
        self._connection.execute(
            "INSERT INTO jobs (id, tenant, term) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET term = excluded.term",
            entry,
        )

    def remove(self, identifier: str) -> None:
        """Removes a job, if it is there."""
        self._connection.execute("DELETE FROM jobs WHERE id = ?", (identifier,))

    def entries(self) -> list[Entry]:
        """All jobs, in order."""
        rows = self._connection.execute("SELECT id, tenant, term FROM jobs ORDER BY number")
        return [Entry(*row) for row in rows]

    def close(self) -> None:
        """Closes the file and releases the folder."""
        self._connection.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _server(self) -> str:
        """This server's id, made on first use."""
        row = self._connection.execute("SELECT id FROM server").fetchone()
        if row is None:
            row = (secrets.token_hex(8),)
            self._connection.execute("INSERT INTO server (id) VALUES (?)", row)
        return str(row[0])
