"""Matching text against patterns so that spelling tricks do not help: used by the content filter and by privacy.

A text is looked at as it is and once more `normalised`: compatibility forms folded (NFKC: full-width digits and letters
become plain), invisible characters dropped, every run of white space one space, every dash "-". A pattern that matches
either one matches.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from edgekit.errors import UserError

MAX_PATTERN = 2000  # characters


def normalised(text: str) -> str:
    """The text without what the eye does not see."""
    folded = unicodedata.normalize("NFKC", text)
    seen = "".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    dashed = "".join("-" if unicodedata.category(c) == "Pd" else c for c in seen)
    return " ".join(dashed.split())


def compiled(patterns: Sequence[str], *, where: str) -> tuple[re.Pattern[str], ...]:
    """Regular expressions of Python, which ignore case. `where` names the place for messages.

    Raises UserError for one that does not compile, is longer than MAX_PATTERN, or matches the empty text.
    """
    found = []
    for at, pattern in enumerate(patterns):
        place = f"{where}[{at}]"
        if len(pattern) > MAX_PATTERN:
            raise UserError(f"{place} must have at most {MAX_PATTERN} characters: got {len(pattern)}")
        try:
            expression = re.compile(pattern, re.IGNORECASE)
        except (re.error, RecursionError, OverflowError) as problem:
            raise UserError(f"{place} must be a regular expression: {pattern!r:.80}: {problem}") from problem
        if expression.search(""):
            raise UserError(f"{place} must not match the empty text: {pattern!r:.80} does, and so matches any text")
        found.append(expression)
    return tuple(found)


def first_match(patterns: Sequence[re.Pattern[str]], text: str) -> str | None:
    """What the first pattern matches in the text or in its normalised form; None when none does."""
    for form in (text, normalised(text)):
        for pattern in patterns:
            if found := pattern.search(form):
                return found[0]
    return None
