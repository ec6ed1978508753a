"""The text of an HTML page: a line for each block, with the level of its heading.

In time linear in the page, whatever it holds: Python's own html.parser takes minutes for some pages of 60 kB ("<a "
again and again), and a folder of documents is a stranger's. Tags, comments and text are told apart as browsers do for
pages that are written well; in broken ones some markup may stay in the text, or some text be lost with it. Scripts,
styles, templates, navigation and the head are left out, but for the title.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_SILENT = {"script", "style", "template", "noscript", "nav", "svg", "math", "head", "iframe", "object", "select"}
_RAW = {"script", "style", "title", "textarea", "iframe", "noscript"}  # what is inside is no markup
_INLINE = {
    "a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "label",
    "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
}  # fmt: skip
_LEVELS = {f"h{level}": level for level in range(1, 7)}
_NAME = re.compile(r"/?([a-zA-Z][a-zA-Z0-9:-]{0,40})")
_MARK = re.compile(r""">|=\s{0,20}["']""")  # what ends a tag, or begins a value in quotes
_TAG = 20_000  # characters of a tag: what has no end within them is text


@dataclass(frozen=True)
class Page:
    """Lines of text, each with its level when it is a heading, else 0."""

    title: str
    lines: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Token:
    kind: Literal["open", "close", "text"]
    value: str  # a tag's name, or text


def read(text: str) -> Page:
    """The text of a page."""
    lines: list[tuple[str, int]] = []
    words: list[str] = []
    silent: list[str] = []
    title, level, in_title = "", 0, False

    def end_line() -> None:
        if line := " ".join("".join(words).split()):
            lines.append((line, level))
        words.clear()

    for token in _tokens(text):
        if token.kind == "text":
            if in_title:
                title = title or " ".join(token.value.split())
            elif not silent:
                words.append(token.value)
            continue
        name, opens = token.value, token.kind == "open"
        in_title = opens and name == "title"
        if name == "body" and opens:
            silent.clear()  # a head that was never closed
        if name in _SILENT:
            if opens and len(silent) < 100:
                silent.append(name)
            elif name in silent:
                del silent[silent.index(name) :]
        elif name not in _INLINE and name != "title":
            end_line()
            if name in _LEVELS:
                level = _LEVELS[name] if opens else 0
    end_line()
    return Page(title, tuple(lines))


def _tokens(text: str) -> Iterator[_Token]:
    lower = text.lower() if len(text.lower()) == len(text) else text  # for the ends of raw elements
    at, written = 0, 0
    gone: set[str] = set()  # what was looked for to the end of the page and is not there

    def find(what: str, start: int) -> int:
        if what in gone:
            return -1
        found = lower.find(what, start)
        if found < 0:
            gone.add(what)
        return found

    def said(end: int) -> Iterator[_Token]:
        if written < end:
            yield _Token("text", html.unescape(text[written:end]))

    while (at := find("<", at)) >= 0:
        if text.startswith("<!--", at):
            end = find("-->", at + 4)
            after = end + 3 if end >= 0 else len(text)  # as browsers do: an open comment takes the rest
            name = None
        elif text.startswith(("<!", "<?"), at):
            end = find(">", at)
            after = end + 1 if end >= 0 else len(text)
            name = None
        else:
            name = _NAME.match(text, at + 1)
            after = _end_of_tag(text, at + 1) if name else 0
            if after == 0:  # a "<" that is text; where a tag has no end, nor have those that begin in it
                at += _TAG if name else 1
                continue
        yield from said(at)
        at = written = after
        if name is None:
            continue
        tag, opens = name[1].lower(), text[name.start()] != "/"
        yield _Token("open" if opens else "close", tag)
        if opens and tag in _RAW:
            end = find(f"</{tag}", at)
            inside = text[at : end if end >= 0 else len(text)]
            if tag in ("title", "textarea"):
                yield _Token("text", html.unescape(inside))
            at = written = end if end >= 0 else len(text)
    yield from said(len(text))


def _end_of_tag(text: str, start: int) -> int:
    """Where the tag has ended whose name begins at `start`; 0 when it has no end within _TAG characters."""
    at, limit = start, min(start + _TAG, len(text))
    while found := _MARK.search(text, at, limit):
        at = found.end()
        if found[0] == ">":
            return at
        closing = text.find(found[0][-1], at, limit)
        if closing < 0:
            break
        at = closing + 1
    return text.find(">", start, limit) + 1  # an attribute without its closing quote
