"""Reading documents: text, Markdown, HTML and PDF below a folder become plain text with headings.

A folder of documents is a stranger's. So links are not followed, only regular files are opened, and a file must stay
within limits on bytes, characters and (of a PDF) pages, seconds and memory. What is left out is named with a reason.

Text is UTF-8, or UTF-16 with a byte order mark, or else Windows-1252, in which any byte is a character. Line ends are
"\\n" and there are no NUL characters. Different from other converters: Markdown stays as it is, so that a passage shows
what its author wrote; of HTML the text outside of scripts, styles, templates and navigation is kept, one line a block.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekit.assistant import markup
from edgekit.errors import UserError

Kind = Literal["text", "markdown", "html", "pdf"]
KINDS: dict[str, Kind] = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html",
    ".xhtml": "html", ".pdf": "pdf",
}  # fmt: skip
MAX_DEPTH = 40  # folders in folders


@dataclass(frozen=True)
class Limits:
    """What one document may cost. The last three bound the process that reads a PDF."""

    file_bytes: int = 64_000_000
    characters: int = 8_000_000
    pages: int = 3_000
    seconds: float = 60
    memory_bytes: int = 512_000_000


@dataclass(frozen=True)
class Heading:
    """A heading: its lines go from character `start` to `end`; `level` 1 is the highest."""

    start: int
    end: int
    level: int
    title: str


@dataclass(frozen=True)
class Document:
    """The text of a document and its headings in order. `title` is its first heading of level 1, or its file's name."""

    title: str
    text: str
    headings: tuple[Heading, ...] = ()


@dataclass(frozen=True)
class File:
    """A file that can be read: `path` is its path below the folder, with "/"."""

    path: str
    kind: Kind


@dataclass(frozen=True)
class Skipped:
    """What was left out, and why."""

    path: str
    reason: str


def walk(root: Path) -> Iterator[File | Skipped]:
    """The documents below a folder, sorted by path. What its name says is no document is passed over in silence, as
    are hidden files and folders; links and what is no regular file come as `Skipped`.

    Raises UserError when `root` is no folder that can be read.
    """
    try:
        entries = _entries(root)
    except OSError as problem:
        raise UserError(f"--docs must be a folder that can be read: {root}: {problem.strerror}") from problem
    yield from _walk(entries, "", 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as listing:
        return sorted(listing, key=lambda entry: entry.name)


def _walk(entries: list[os.DirEntry[str]], prefix: str, depth: int) -> Iterator[File | Skipped]:
    for entry in entries:
        path = prefix + entry.name
        if entry.name.startswith("."):
            continue
        kind = KINDS.get(os.path.splitext(entry.name)[1].lower())
        if entry.is_symlink():
            if kind or entry.is_dir():
                yield Skipped(_shown(path), "a link: links are not followed")
        elif entry.is_dir(follow_symlinks=False):
            if depth == MAX_DEPTH:
                yield Skipped(_shown(path), f"more than {MAX_DEPTH} folders deep")
                continue
            try:
                inner = _entries(Path(entry.path))
            except OSError as problem:
                yield Skipped(_shown(path), f"the folder cannot be read: {problem.strerror}")
                continue
            yield from _walk(inner, f"{path}/", depth + 1)
        elif kind and not entry.is_file(follow_symlinks=False):
            yield Skipped(path, "not a regular file")
        elif kind:
            yield File(path, kind) if _shown(path) == path else Skipped(_shown(path), "its name is not UTF-8")


def _shown(path: str) -> str:
    """A path that can be stored and printed: bytes of a name that are no UTF-8 are replaced."""
    return path.encode("utf-8", "replace").decode()


def load(root: Path, file: File, limits: Limits = Limits()) -> bytes | Skipped:
    """The bytes of a file, or why it was left out. What is opened is what is checked: no link can come between."""
    try:
        descriptor = os.open(root / file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return Skipped(file.path, "not a regular file")
            data = stream.read(limits.file_bytes + 1)
    except OSError as problem:
        return Skipped(file.path, f"it cannot be read: {problem.strerror}")
    if len(data) > limits.file_bytes:
        return Skipped(file.path, f"more than {limits.file_bytes / 1e6:g} MB")
    return data


def digest(data: bytes) -> str:
    """The sha256 of a document's bytes, in hex: what tells whether it changed."""
    return hashlib.sha256(data).hexdigest()


def read(file: File, data: bytes, limits: Limits = Limits()) -> Document | Skipped:
    """The document that a file's bytes hold, or why there is none."""
    name = os.path.splitext(file.path.rpartition("/")[2])[0]
    if file.kind == "pdf":
        from edgekit.assistant import pdf

        pages = pdf.pages(data, limits)
        if isinstance(pages, str):
            return Skipped(file.path, pages)
        document = _from_pages(name, pages)
    else:
        if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return Skipped(file.path, "not text: it has NUL bytes")
        text = decoded(data)
        document = {"text": _from_text, "markdown": _from_markdown, "html": _from_html}[file.kind](name, text)
    if len(document.text) > limits.characters:
        return Skipped(file.path, f"more than {limits.characters:,} characters")
    if not document.text.strip():
        return Skipped(file.path, "no text in it" + (" (scanned pages?)" if file.kind == "pdf" else ""))
    return document


def decoded(data: bytes) -> str:
    """Text of bytes in an encoding that is found out; line ends become "\\n", NUL characters spaces."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")


def _from_text(name: str, text: str) -> Document:
    return Document(name, text)


def _from_pages(name: str, pages: list[str]) -> Document:
    """Each page that has text begins with its heading, which is no part of the text."""
    parts: list[str] = []
    headings: list[Heading] = []
    length = 0
    for number, page in enumerate(pages, 1):
        text = decoded(page.encode("utf-8", "replace")).strip()
        if text:
            headings.append(Heading(length, length, 1, f"page {number}"))
            parts.append(text + "\n\n")
            length += len(parts[-1])
    return Document(name, "".join(parts), tuple(headings))


_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FRONT = re.compile(r"---\n.{0,5000}?\n(?:---|\.\.\.)[ \t]*\n", re.DOTALL)


def _from_markdown(name: str, text: str) -> Document:
    """Headings after CommonMark, sections 4.2, 4.3 and 4.5: ATX and one-line setext ones, outside of fenced code."""
    front = _FRONT.match(text)
    headings: list[Heading] = []
    fence, before, before_at, at = "", "", 0, front.end() if front else 0
    for line in text[at:].splitlines(keepends=True):
        bare = line.rstrip("\n")
        mark = _FENCE.match(bare)
        if fence:
            if mark and mark[1].startswith(fence) and not bare.strip().strip(fence[0]):
                fence = ""
            before = ""
        elif mark:
            fence, before = mark[1], ""
        elif len(bare) < 1000 and (found := _ATX.match(bare)):
            headings.append(Heading(at, at + len(line), len(found[1]), (found[2] or "").strip()))
            before = ""
        elif before.strip() and _SETEXT.match(bare):
            headings.append(Heading(before_at, at + len(line), 1 if "=" in bare else 2, before.strip()))
            before = ""
        else:
            before, before_at = ("" if before.strip() and bare.strip() else bare), at
        at += len(line)
    return Document(_title(name, headings), text, tuple(headings))


def _title(name: str, headings: list[Heading]) -> str:
    return next((heading.title for heading in headings if heading.level == 1 and heading.title), name)


def _from_html(name: str, text: str) -> Document:
    page = markup.read(text)
    headings, length = [], 0
    for line, level in page.lines:
        if level:
            headings.append(Heading(length, length + len(line), level, line[:300]))
        length += len(line) + 2
    body = "".join(line + "\n\n" for line, _ in page.lines)
    return Document(_title(page.title[:300] or name, headings), body, tuple(headings))
