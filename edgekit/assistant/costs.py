"""What logged answers cost: read from the server's file of conversations, or from the lines that it exports.

The file is only looked at: nothing in it expires, and a server may be writing it. Questions and answers are not read.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.assistant.records import APPLICATION_ID, SCHEMA_VERSION
from edgekit.errors import ModelError, UserError

SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True)
class Logged:
    """One answer. `read_tokens` are those of the prompt that were not in the cache; `joules` is None where no sensor
    measured it; `elsewhere`: it was handed to another model, and its energy is not known here."""

    read_tokens: int
    generated_tokens: int
    joules: float | None
    elsewhere: bool = False


def read_costs(path: Path) -> list[Logged]:
    """All answers whose cost is known, in no order that matters. Raises UserError: it is no log of ours."""
    try:
        with path.open("rb") as stream:
            is_file = stream.read(len(SQLITE)) == SQLITE
        found = [logged for facts in (_of_file(path) if is_file else _of_lines(path)) if (logged := _logged(facts))]
    except (OSError, sqlite3.Error, UnicodeDecodeError) as problem:
        raise UserError(f"a log must be a file of conversations, or its export: {path}: {problem}") from problem
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as problem:
        raise ModelError(f"a log must be whole: {path}: {problem!r}") from problem
    if not found:
        raise UserError(f"a log must hold an answer: {path} has none whose cost is known")
    return found


def _of_file(path: Path) -> Iterator[Mapping[str, Any]]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        kind = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if kind != (APPLICATION_ID, SCHEMA_VERSION):
            raise UserError(f"a log must be of this version of edgekit: {path} is another program's or version's")
        for (facts,) in db.execute("SELECT facts FROM entries WHERE role = 'assistant'"):
            yield json.loads(facts)


def _of_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for line in filter(str.strip, stream):
            for entry in json.loads(line)["entries"]:
                if entry["role"] == "assistant":
                    yield entry


def _logged(facts: Mapping[str, Any]) -> Logged | None:
    cost = facts.get("cost")
    if cost is None:  # stopped by a reader who went away
        return None
    joules = cost["joules"]
    return Logged(
        read_tokens=int(cost["prompt_tokens"]) - int(cost["reused_tokens"]),
        generated_tokens=int(cost["generated_tokens"]),
        joules=None if joules is None else float(joules),
        elsewhere=facts.get("route", {}).get("to") == "elsewhere",
    )
