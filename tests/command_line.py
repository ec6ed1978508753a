"""Runs `edgekit` inside the test's process, just as its console script would."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from edgekit.cli.main import main


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status and what it printed, both streams being pipes."""

    status: int
    out: str
    err: str


def ek(*words: str | Path, stdin: str | bytes = "") -> Done:
    """`edgekit WORDS...` with `stdin` as its input."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with (
        mock.patch.object(sys, "argv", ["edgekit", *map(str, words)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
    assert isinstance(status, int)
    return Done(status, out.getvalue(), err.getvalue())


def ok(*words: str | Path, stdin: str | bytes = "") -> Done:
    """The same, of a command that must succeed."""
    done = ek(*words, stdin=stdin)
    assert done.status == 0, done.err
    return done


def listing(folder: Path) -> dict[str, int]:
    """Every path below `folder`, hidden ones too, with its time of change in ns: equal when nothing was touched."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}
