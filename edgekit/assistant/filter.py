"""The content filter: what a policy file says about a question or an answer.

    mode = "block"                          # off, warn or block: the most that any rule may do

    [[rules]]
    name = "medicine"
    action = "warn"                         # default: block
    where = ["question", "answer"]          # default: both
    patterns = ['\\bdosage\\b']             # regular expressions, case ignored
    examples = ["How much aspirin may I take?"]
    cosine = 0.55                           # how near to an example a text must be
    explanation = "This assistant gives no medical advice."

A rule acts when one of its patterns matches, or when the text's vector is near to one of its examples' (its topic). An
answer is checked as it comes, sentence by sentence: its patterns on all that there is so far, its topics on each
sentence, and nothing of a sentence is shown before it was checked. Everything happens on this machine.

Different from filters that are models: this one does what its file says and nothing else, and it can be got around by
who words a thing differently. It is a policy's enforcement, no judge of intent.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekit.assistant.patterns import compiled, first_match
from edgekit.errors import UserError
from edgekit.runtime.embeddings import Embedder, Floats
from edgekit.schema import parse

Action = Literal["warn", "block"]
Where = Literal["question", "answer"]
_END = re.compile(r"[.!?][\"')\]]*\s+|\n")


@dataclass(frozen=True)
class Verdict:
    """What the filter says about a text: which rule of the policy acted, and a sentence for the user why."""

    action: Action
    where: Where
    rule: str
    explanation: str


@dataclass(frozen=True)
class Rule:
    """One rule of a policy, as the module's text shows it. Raises UserError for a rule that can never act."""

    name: str
    action: Action = "block"
    where: tuple[Where, ...] = ("question", "answer")
    patterns: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    cosine: float = 0.55
    explanation: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("a rule must have a name: got an empty one")
        if not self.patterns and not self.examples:
            raise UserError(f"a rule needs patterns or examples: {self.name!r} has none of them")
        if not self.where:
            raise UserError(f'where must name "question", "answer" or both: {self.name!r} has none of them')
        if not 0 < self.cosine < 1:
            raise UserError(f"cosine must be between 0 and 1: got {self.cosine} in {self.name!r}")


@dataclass(frozen=True)
class Policy:
    """A policy file. `mode` "off" checks nothing, "warn" never blocks."""

    mode: Literal["off", "warn", "block"] = "block"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"each rule must have a name of its own: {name!r} is there {names.count(name)} times")


def load_policy(path: Path) -> Policy:
    """A policy from its file. Raises UserError for one that cannot be read, is no TOML, or breaks a rule above."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"a policy must be a file that can be read: {path}: {problem.strerror}") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise UserError(f"a policy must be TOML: {path}: {problem}") from problem
    return parse(Policy, data, where=str(path))


class Filter:
    """A policy at work. `embedder` is needed when a rule has examples."""

    def __init__(self, policy: Policy, embedder: Embedder | None = None) -> None:
        self.policy = policy
        self._embedder = embedder
        self._patterns = [compiled(rule.patterns, where=f"patterns of rule {rule.name!r}") for rule in policy.rules]
        self._topics: list[Floats | None] = []
        for rule in policy.rules:
            if rule.examples and embedder is None:
                raise UserError(f"examples need an embedder: rule {rule.name!r} has some; pass --embedder")
            vectors = embedder.embed(rule.examples, truncate=True) if rule.examples and embedder else None
            self._topics.append(vectors)

    def check(self, text: str, where: Where, *, topic: str | None = None) -> list[Verdict]:
        """What the policy says about a text. Patterns look at `text`, topics at `topic`, which defaults to it."""
        policy, found = self.policy, []
        if policy.mode == "off" or not text.strip():
            return []
        vector: Floats | None = None
        for rule, patterns, topics in zip(policy.rules, self._patterns, self._topics, strict=True):
            if where not in rule.where:
                continue
            reason = None
            if (match := first_match(patterns, text)) is not None:
                reason = f"it has {match!r:.60}"
            elif topics is not None and self._embedder is not None:
                if vector is None:
                    vector = self._embedder.embed([topic or text], truncate=True)[0]
                near = topics @ vector
                if (best := int(near.argmax())) >= 0 and near[best] >= rule.cosine:
                    reason = f"it is close to {rule.examples[best]!r:.60} (cosine {near[best]:.2f})"
            if reason:
                action: Action = "warn" if "warn" in (policy.mode, rule.action) else "block"
                why = f"{rule.explanation} " if rule.explanation else ""
                found.append(Verdict(action, where, rule.name, f"{why}The rule {rule.name!r} acted: {reason}."))
        return found


class Gate:
    """Lets an answer through sentence by sentence, as far as the filter has no objection."""

    def __init__(self, content_filter: Filter | None) -> None:
        self._filter = content_filter
        self._told: set[str] = set()
        self._out = ""
        self._held = ""

    def push(self, piece: str) -> Iterator[str | Verdict]:
        """The text that a new piece makes free, and the verdicts on it; after a block comes no more text."""
        if self._filter is None or self._filter.policy.mode == "off":
            yield piece
            return
        self._held += piece
        while found := _END.search(self._held):
            sentence, self._held = self._held[: found.end()], self._held[found.end() :]
            yield from self._checked(sentence)

    def finish(self) -> Iterator[str | Verdict]:
        """What was still held."""
        rest, self._held = self._held, ""
        if rest:
            yield from self._checked(rest)

    def _checked(self, sentence: str) -> Iterator[str | Verdict]:
        assert self._filter is not None
        verdicts = self._filter.check(self._out + sentence, "answer", topic=sentence)
        fresh: Sequence[Verdict] = [verdict for verdict in verdicts if verdict.rule not in self._told]
        self._told.update(verdict.rule for verdict in fresh)
        yield from fresh
        if not any(verdict.action == "block" for verdict in verdicts):
            self._out += sentence
            yield sentence
