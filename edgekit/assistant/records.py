"""Conversations and what they cost, in one SQLite file of this machine; nothing of them goes anywhere else.

    records = Records.open(path, keep_days=30)
    records.add(conversation, Entry(role="user", content="Hello"))

A question is written when its answer begins and the answer when it ends, each in a transaction of its own: a killed
server loses the answer that it was making. Deleted text is overwritten (secure_delete), the file is readable by its
owner alone, and what is older than `keep_days` goes when the server starts and once a day.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import ModelError, UserError

APPLICATION_ID = 0x656B6372  # "ekcr"
SCHEMA_VERSION = 1
DAY_S = 86_400
TITLE = 60  # characters

_TABLES = """
CREATE TABLE conversations (id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, changed REAL NOT NULL);
CREATE TABLE entries (id INTEGER PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    at REAL NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL, facts TEXT NOT NULL);
CREATE INDEX entries_of_conversation ON entries(conversation, id);
"""


@dataclass(frozen=True)
class Entry:
    """A turn. `facts` is JSON data about an answer: its sources, route, cost, and how it ended."""

    role: str
    content: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    at: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """`created` and `changed` are seconds since 1970."""

    id: str
    title: str
    created: float
    changed: float


class Records:
    """The open file. Several threads may use it; one at a time is served."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path, *, keep_days: float, now: Callable[[], float]
    ) -> None:
        self.path = path
        self.keep_days = keep_days
        self._db = connection
        self._now = now
        self._lock = threading.RLock()
        self._expired = -float("inf")

    @classmethod
    def open(cls, path: Path, *, keep_days: float = 30, now: Callable[[], float] = time.time) -> Records:
        """Open the file or make it; `keep_days` 0 keeps everything.

        Raises UserError when it cannot be opened or is another program's, ModelError when it is broken.
        """
        if keep_days < 0:
            raise UserError(f"--keep-days must be at least 0 (0 keeps everything): got {keep_days}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as problem:
            raise UserError(
                f"conversations must go to a file: {path}: {problem}; use --log FILE or --no-log"
            ) from problem
        records = cls(connection, path, keep_days=keep_days, now=now)
        try:
            records._prepare()
        except BaseException:
            connection.close()
            raise
        return records

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, conversation: str, entry: Entry) -> None:
        """Append a turn; the first one makes the conversation and gives it its title."""
        now = self._now()
        title = " ".join(entry.content.split())
        title = title if len(title) <= TITLE else title[: TITLE - 1] + "…"
        with self._transaction():
            self._db.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET changed = excluded.changed",
                (conversation, title, now, now),
            )
            self._db.execute(
                "INSERT INTO entries (conversation, at, role, content, facts) VALUES (?, ?, ?, ?, ?)",
                (conversation, now, entry.role, entry.content, json.dumps(dict(entry.facts), ensure_ascii=False)),
            )
        self.expire()

    def conversations(self, *, limit: int = 200) -> list[Conversation]:
        """The conversations, the one that changed last first."""
        rows = self._rows(
            "SELECT id, title, created, changed FROM conversations ORDER BY changed DESC, id LIMIT ?", limit
        )
        return [Conversation(*row) for row in rows]

    def read(self, conversation: str) -> list[Entry]:
        """The turns of a conversation, oldest first; none when there is no such one."""
        rows = self._rows(
            "SELECT role, content, facts, at FROM entries WHERE conversation = ? ORDER BY id", conversation
        )
        return [Entry(role, content, json.loads(facts), at) for role, content, facts, at in rows]

    def delete(self, conversation: str | None = None) -> int:
        """Delete a conversation, or all; returns how many went."""
        if conversation is None:
            return self._forget("DELETE FROM conversations")
        return self._forget("DELETE FROM conversations WHERE id = ?", conversation)

    def export(self) -> Iterator[str]:
        """Lines of JSON, one a conversation with its turns, oldest first."""
        for (conversation,) in self._rows("SELECT id FROM conversations ORDER BY created, id"):
            rows = self._rows("SELECT id, title, created, changed FROM conversations WHERE id = ?", conversation)
            for row in rows:
                entries = [
                    {"role": entry.role, "content": entry.content, "at": entry.at, **entry.facts}
                    for entry in self.read(conversation)
                ]
                keys = ("id", "title", "created", "changed")
                yield json.dumps({**dict(zip(keys, row, strict=True)), "entries": entries}, ensure_ascii=False) + "\n"

    def expire(self) -> int:
        """Delete what is older than `keep_days`, at most once a day; returns how many conversations went."""
        now = self._now()
        if not self.keep_days or now - self._expired < DAY_S:
            return 0
        self._expired = now
        return self._forget("DELETE FROM conversations WHERE changed < ?", now - self.keep_days * DAY_S)

    def _forget(self, query: str, *values: object) -> int:
        with self._lock:
            with self._transaction():
                gone = self._db.execute(query, values).rowcount
            if gone:
                self._rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the log would keep the text until the file is closed
        return gone

    def _prepare(self) -> None:
        try:
            for pragma in ("trusted_schema=OFF", "foreign_keys=ON", "secure_delete=ON", "journal_mode=WAL"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            application = self._rows("PRAGMA application_id")[0][0]
            version = self._rows("PRAGMA user_version")[0][0]
            tables = self._rows("SELECT count(*) FROM sqlite_schema")[0][0]
            if not tables and not application:
                with self._transaction():
                    for statement in filter(str.strip, _TABLES.split(";")):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif (application, version) != (APPLICATION_ID, SCHEMA_VERSION):
                raise UserError(
                    f"conversations must go to a file of this version of edgekit: {self.path} is another program's or"
                    " another version's; use another --log, or --no-log"
                )
        except sqlite3.Error as problem:
            raise self._explained(problem) from problem
        self.expire()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as problem:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(problem, sqlite3.Error):
                    raise self._explained(problem) from problem
                raise

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as problem:
                raise self._explained(problem) from problem

    def _explained(self, problem: sqlite3.Error) -> ModelError:
        return ModelError(
            f"the file of conversations must be whole: {self.path}: {problem}; move it away, or use --no-log"
        )


def default_path() -> Path:
    """Where conversations go unless the user names a file: $XDG_DATA_HOME/edgekit, or ~/.local/share/edgekit."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "edgekit" / "conversations.db"
