"""Answers that keep to a JSON schema or to the form of a tool call.

    structures = Structures.of(session)
    answer = session.generate(messages, constraint=structures.json_schema({"type": "object", ...}))
    data = json.loads(answer.text())

llguidance holds the grammar and says after each token which ones may follow; the others' logits become -inf before the
sampler sees them. It needs to know the bytes of each token: it takes them from tokenizer.json, for byte-level and for
byte-fallback tokenizers; ids past the tokenizer's own are padding and never allowed.

JSON is written as `json.dumps` does, `{"a": 1, "b": [2, 3]}`: a free choice of white space is one in which small models
go round in circles. What a schema says and llguidance does not know is refused, never ignored. Only the end of the
answer may break the form: when max_tokens or the context cuts it.
Source: M. Moskal et al., llguidance, docs/json_schema.md and docs/syntax.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekit.errors import ModelError, UserError
from edgekit.runtime.session import Session

if TYPE_CHECKING:
    import llguidance

MAX_SCHEMA = 64_000  # characters of JSON
MAX_TOGETHER = 8  # patterns that one text may have to match: the time for n of them grows as 2^n, past all limits
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A `Constraint` of the runtime's: one answer's place in a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Whether the answer is complete, so that nothing may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def allow(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of `logits` (V,) with -inf for each token that may not come next.

        Raises ModelError when the grammar became too large to go on with.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=logits.size, bitorder="little").view(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on after an allowed token. Raises ModelError when it was none, or the grammar became too large."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ModelError(f"the answer must keep to its grammar: {self._matcher.get_error()[:300]}")


class Structures:
    """Makes grammars for one tokenizer. Making it takes 0.2 s for 49,000 tokens, so one serves all answers."""

    def __init__(self, tokenizer: Tokenizer, *, vocabulary: int, eos_ids: Sequence[int]) -> None:
        """`vocabulary` is the number of logits, `eos_ids` the tokens that end an answer.

        Raises UserError when llguidance is not installed, ModelError when it cannot read the tokenizer.
        """
        try:
            import llguidance
        except ImportError as problem:
            raise UserError('structured output needs llguidance: pip install "edgekit[assistant]"') from problem
        self._library = llguidance
        try:
            self._tokens = llguidance.LLTokenizer(
                tokenizer.to_str(),
                n_vocab=vocabulary,
                eos_token=list(eos_ids) or None,
                slices=llguidance.LLTokenizer.json_slices(),
            )
        except Exception as problem:  # a plain ValueError, or a panic of the library
            raise ModelError(f"structured output cannot use this tokenizer: {str(problem)[:300]}") from problem

    @classmethod
    def of(cls, session: Session) -> Structures:
        spec = session.bundle.spec
        return cls(session.tokenizer, vocabulary=spec.vocabulary, eos_ids=spec.eos_ids)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that keeps to a schema. Raises UserError for one that is none, is too large, or asks for the unknown."""
        return self._grammar(self._library.LLMatcher.grammar_from_json_schema(written(schema)))

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def tool_calls(self, functions: Mapping[str, Mapping[str, Any]], *, forced: bool) -> Grammar:
        """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`: at once when `forced`, else after any text.

        `functions`: JSON schemas of the arguments by name. Text without a call is allowed too unless `forced`.
        """
        names = " | ".join(f"call_{at}" for at in range(len(functions)))
        rules = [f'body: "\\n"? ({names}) "\\n"? "{CALL_END}"']
        if forced:
            rules.append(f'start: "{CALL_BEGIN}" body')
        else:
            rules += ["start: /(.|\\n)*/ | marker body", f'marker[lazy]: /(.|\\n)*/ "{CALL_BEGIN}"']
        for at, (name, parameters) in enumerate(functions.items()):
            rules.append(f'call_{at}: {json.dumps(_head(name))} %json {written(parameters)} "}}"')
        return self._grammar(self._library.LLMatcher.grammar_from_lark("%llguidance {}\n" + "\n".join(rules)))

    def _grammar(self, grammar: str) -> Grammar:
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"a schema must be one that can be followed: {matcher.get_error().strip()[:300]}")
        if unknown := matcher.get_grammar_warnings():
            raise UserError(f"a schema must be one that can be followed: {unknown[0][:300]}")
        return Grammar(matcher)


def written(schema: Mapping[str, Any]) -> str:
    """A schema as JSON text, with how its answers are written. Raises UserError for one that is none or too large."""
    if not isinstance(schema, Mapping):
        raise UserError(f"a schema must be a JSON object: got {type(schema).__name__}")
    try:
        text = json.dumps({**schema, "x-guidance": _WRITING}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise UserError(f"a schema must be plain JSON: {problem}") from problem
    if len(text) > MAX_SCHEMA:
        raise UserError(f"a schema must have at most {MAX_SCHEMA} characters: got {len(text)}")
    patterns, together = _patterns(schema)
    if together and patterns > MAX_TOGETHER:
        raise UserError(
            f"a schema that puts patterns together (allOf, or pattern beside anyOf, oneOf or $ref) may have"
            f" {MAX_TOGETHER} patterns and formats: got {patterns}"
        )
    return text


def _patterns(schema: object) -> tuple[int, bool]:
    """How many patterns and formats a schema has, and whether one text may have to match several of them."""
    count, together, left = 0, False, [schema]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            own = sum(isinstance(value.get(key), str) for key in ("pattern", "format"))
            count += own
            together = together or "allOf" in value or (own > 0 and any(k in value for k in ("anyOf", "oneOf", "$ref")))
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return count, together


def _head(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '
