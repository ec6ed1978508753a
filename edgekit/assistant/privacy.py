"""What never leaves this machine, whatever the router says.

A text is private when it matches a pattern (the built-in ones below, or the user's), when the passages found for it
come from a listed folder, or when it quotes one: six words in a row that stand in a document of such a folder. `Rules`
gives the reason, and no text that has one is sent. Doubt counts as private: so do texts that are too long to look at.

Built in: e-mail addresses, telephone numbers, IBANs and card numbers with a right checksum, whatever is grouped like
an account, network addresses, national numbers in common shapes, keys and passwords, dates of birth, street addresses.
A name alone is not recognised:
list it in `patterns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgekit.assistant.patterns import compiled, first_match, normalised
from edgekit.errors import UserError

MAX_TEXT = 20_000  # characters
QUOTE_WORDS = 6


class Phrases(Protocol):
    """What can be asked for a phrase: an index."""

    def holders_of_phrase(self, words: Sequence[str]) -> list[str]:
        """The documents that have these words in a row."""
        ...


@dataclass(frozen=True)
class Privacy:
    """The user's rules: regular expressions, folders below the indexed one, and whether the built-in patterns hold."""

    patterns: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    builtin: bool = True

    def __post_init__(self) -> None:
        for folder in self.folders:
            if not folder.strip("/") or ".." in folder.split("/") or folder.startswith("/"):
                raise UserError(f"a private folder must be a path below the documents: got {folder!r}")


class Rules:
    """Privacy rules at work."""

    def __init__(self, privacy: Privacy) -> None:
        self._own = compiled(privacy.patterns, where="privacy.patterns")
        self._folders = tuple(folder.strip("/").casefold() + "/" for folder in privacy.folders)
        self._builtin = privacy.builtin

    def private_document(self, path: str) -> bool:
        """Whether a document is in a listed folder; upper and lower case are the same."""
        return path.casefold().startswith(self._folders) if self._folders else False

    def reason(
        self, texts: Iterable[str], documents: Iterable[str] = (), *, index: Phrases | None = None
    ) -> str | None:
        """Why these texts, for which these documents were found, must stay here; None when they may leave."""
        for path in documents:
            if self.private_document(path):
                return f"it is about {path}, which is in a private folder"
        for text in texts:
            if len(text) > MAX_TEXT:
                return f"it is too long to be looked through ({len(text):,} characters)"
            if first_match(self._own, text) is not None:
                return "it matches a privacy rule"
            if self._builtin and (name := builtin_match(text)):
                return f"it seems to have {name}"
            if index is not None and self._folders and (quoted := self._quoted(text, index)):
                return f"it quotes {quoted}, which is in a private folder"
        return None

    def _quoted(self, text: str, index: Phrases) -> str | None:
        words = re.findall(r"\w+", normalised(text))
        for start in range(max(1, len(words) - QUOTE_WORDS + 1)) if len(words) >= 4 else ():
            for path in index.holders_of_phrase(words[start : start + QUOTE_WORDS]):
                if self.private_document(path):
                    return path
        return None


def builtin_match(text: str) -> str | None:
    """What of the built-in kinds a text seems to have: "an e-mail address"; None when it has none."""
    for form in (text, normalised(text)):
        for name, pattern, holds in _BUILTIN:
            if any(holds(found[0]) for found in pattern.finditer(form)):
                return name
    return None


def _digits(text: str) -> list[int]:
    return [int(c) for c in text if c in "0123456789"]


def _is_card(text: str) -> bool:
    """Begins with 13 to 19 digits that have the checksum of Luhn (ISO/IEC 7812-1, annex B), whatever comes after."""
    digits = _digits(text)
    return any(_luhn(digits[:length]) for length in range(13, min(len(digits), 19) + 1))


def _luhn(digits: list[int]) -> bool:
    doubled = [d if at % 2 == 0 else d * 2 - 9 * (d > 4) for at, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _is_iban(text: str) -> bool:
    """Begins with 15 to 34 characters of which the checksum of ISO 13616 is right: the first four moved to the end, the
    number is 1 modulo 97. Whatever comes after."""
    plain = re.sub(r"[\s-]", "", text).upper()
    starts = (plain[:length] for length in range(15, min(len(plain), 34) + 1))
    return any(int("".join(str(int(c, 36)) for c in start[4:] + start[:4])) % 97 == 1 for start in starts)


def _is_phone(text: str) -> bool:
    return 7 <= len(_digits(text)) <= 15


def _always(text: str) -> bool:
    return True


_KINDS: tuple[tuple[str, tuple[str, ...], Callable[[str], bool]], ...] = (
    ("an e-mail address", (r"[\w.+-]{1,64}\s?(?:@|\(at\)|\[at\])\s?[\w-]{1,63}(?:\.[\w-]{1,63})+",), _always),
    ("an IBAN", (r"\b[a-z]{2}\d{2}(?:[ -]?[a-z0-9]){11,30}",), _is_iban),
    ("a card number", (r"\b\d(?:[ -]?\d){12,24}",), _is_card),
    (
        "an account number",
        (r"\b\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}\b", r"\b[a-z]{2}\d{2}(?: [a-z0-9]{4}){3,7}\b"),
        _always,
    ),
    (
        "a telephone number",
        (
            r"(?:\+|\b00)\d(?:[\s().-]{0,2}\d){6,13}\b",
            r"(?:\(\d{2,5}\)\s?|\b\d{3}[ \t.\u00a0-])\d{3}[ \t.\u00a0-]\d{4}\b",
            r"\b(?:phone|tel|telephone|mobile|cell|call me (?:at|on))\D{0,12}\d(?:[\s()./-]{0,2}\d){5,13}\b",
        ),
        _is_phone,
    ),
    (
        "a national number",
        (
            r"\b\d{3}[- ]\d{2}[- ]\d{4}\b",
            r"\b(?:ssn|social security|passport|national insurance|tax id|driver'?s licen[cs]e)\b.{0,30}?"
            r"\b(?=\w*\d)\w{5}",
        ),
        _always,
    ),
    ("a network address", (r"\b(?:\d{1,3}\.){3}\d{1,3}\b",), _always),
    (
        "a key",
        (
            r"\b(?:sk|pk|ghp|gho|xox[abp]|glpat|hf)[-_][\w-]{16,}",
            r"\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY",
        ),
        _always,
    ),
    (
        "a password",
        (r"\b(?:password|passphrase|passcode|pin(?: code)?|secret|token|api[ _-]?key)\b\s*(?:is|are|=|:)\s*\S",),
        _always,
    ),
    ("a date of birth", (r"\b(?:born on|date of birth|birth ?date|birthday|dob)\b.{0,20}?\d",), _always),
    (
        "a street address",
        (
            r"\b\d{1,5}\s+(?:[a-z][\w'.-]*\s+){1,4}"
            r"(?:street|st|avenue|ave|road|rd|lane|ln|drive|dr|boulevard|blvd|court|ct|square|sq)\b",
        ),
        _always,
    ),
)
_BUILTIN = tuple(
    (name, re.compile(pattern, re.IGNORECASE), holds) for name, patterns, holds in _KINDS for pattern in patterns
)
