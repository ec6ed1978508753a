"""Conversations in SQLite: round trips, order, retention, deletion that leaves nothing, foreign and broken files."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.assistant.records import DAY_S, Conversation, Entry, Records, default_path
from edgekit.errors import ModelError, UserError

A, B = "a" * 32, "b" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> Records:
    return Records.open(tmp_path / "log.db", keep_days=30, now=clock)


def test_turns_come_back_as_they_were_written(records: Records, clock: Clock) -> None:
    facts = {"route": {"to": "here"}, "cost": {"joules": None, "seconds": 0.5}}
    records.add(A, Entry("user", "Grüße 你好 \x00 '; DROP TABLE entries"))
    clock.now += 5
    records.add(A, Entry("assistant", "Hello", facts))
    assert records.read(A) == [
        Entry("user", "Grüße 你好 \x00 '; DROP TABLE entries", {}, 1e9),
        Entry("assistant", "Hello", facts, 1e9 + 5),
    ]
    assert records.conversations() == [Conversation(A, "Grüße 你好 \x00 '; DROP TABLE entries", 1e9, 1e9 + 5)]
    assert records.read(B) == []


def test_the_latest_conversation_comes_first_and_titles_are_short(records: Records, clock: Clock) -> None:
    records.add(A, Entry("user", "first " * 40))
    clock.now += 1
    records.add(B, Entry("user", "second\n\nline"))
    assert [row.id for row in records.conversations()] == [B, A]
    clock.now += 1
    records.add(A, Entry("user", "again"))
    assert [row.id for row in records.conversations()] == [A, B]
    titles = {row.id: row.title for row in records.conversations()}
    assert titles[B] == "second line"
    assert len(titles[A]) == 60
    assert titles[A].endswith("…")


def test_old_conversations_go(records: Records, clock: Clock, tmp_path: Path) -> None:
    records.add(A, Entry("user", "old"))
    clock.now += 29 * DAY_S
    records.add(B, Entry("user", "new"))
    assert len(records.conversations()) == 2
    clock.now += 2 * DAY_S
    records.add(B, Entry("user", "newer"))
    assert [row.id for row in records.conversations()] == [B]
    assert records.read(A) == []
    clock.now += 400 * DAY_S
    records.close()
    assert Records.open(tmp_path / "log.db", keep_days=0, now=clock).conversations() != []  # 0 keeps all
    assert Records.open(tmp_path / "log.db", keep_days=30, now=clock).conversations() == []


def test_deleting_leaves_no_bytes(records: Records, tmp_path: Path) -> None:
    for number in range(20):
        records.add(A, Entry("user", f"my secret is swordfish {number} " * 50))
    records.add(B, Entry("user", "keep this"))

    def bytes_on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in tmp_path.iterdir())

    assert b"swordfish" in bytes_on_disk()
    assert records.delete(A) == 1
    assert b"swordfish" not in bytes_on_disk()
    assert records.read(A) == []
    assert records.delete(A) == 0
    assert records.delete() == 1
    assert records.conversations() == []


def test_export_is_one_line_of_json_each(records: Records, clock: Clock) -> None:
    records.add(A, Entry("user", "one\ntwo"))
    records.add(A, Entry("assistant", "three", {"cost": {"seconds": 1.0}}))
    clock.now += 1
    records.add(B, Entry("user", "four"))
    rows = [json.loads(line) for line in records.export()]
    assert [row["id"] for row in rows] == [A, B]
    assert [entry["content"] for entry in rows[0]["entries"]] == ["one\ntwo", "three"]
    assert rows[0]["entries"][1]["cost"] == {"seconds": 1.0}
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in records.export())


def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "log.db"
    records = Records.open(path)
    records.add(A, Entry("user", "x"))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


def test_foreign_broken_and_impossible_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(UserError, match="another program's"):
        Records.open(foreign)
    with sqlite3.connect(foreign) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (1,)
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database" * 100)
    with pytest.raises(ModelError, match="must be whole"):
        Records.open(broken)
    with pytest.raises(UserError, match="must go to a file"):
        Records.open(tmp_path)
    with pytest.raises(UserError, match="--keep-days must be at least 0"):
        Records.open(tmp_path / "x.db", keep_days=-1)


def test_a_killed_writer_loses_no_finished_turn(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    code = f"""
from pathlib import Path
from edgekit.assistant.records import Entry, Records
records = Records.open(Path({str(path)!r}))
number = 0
while True:
    records.add("a" * 32, Entry("user", str(number)))
    print(number, flush=True)
    number += 1
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen = -1
        while seen < 50:
            seen = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
    entries = Records.open(path).read("a" * 32)
    assert [entry.content for entry in entries] == [str(n) for n in range(len(entries))]
    assert len(entries) >= 51
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_default_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "edgekit" / "conversations.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local/share/edgekit/conversations.db"
