"""Structured answers: what a grammar lets through, with a random model too, and schemas that are refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ek
from serving import endless_bundle
from tiny import tiny_tokenizer

from edgekit.assistant.structure import MAX_SCHEMA, Grammar, Structures
from edgekit.errors import ModelError, UserError
from edgekit.runtime.sampling import Sampling
from edgekit.runtime.session import Session

VOCABULARY = 384
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "clock": {"type": "object", "properties": {}, "additionalProperties": False},
}


@pytest.fixture(scope="module")
def structures() -> Structures:
    return Structures(tiny_tokenizer(VOCABULARY), vocabulary=VOCABULARY, eos_ids=[2])


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session.open(endless_bundle(tmp_path_factory.mktemp("structure") / "bundle"), threads=1)


def fed(grammar: Grammar, text: str) -> int:
    """How many tokens of a text the grammar allows, one after the other; -1 for all."""
    ids = tiny_tokenizer(VOCABULARY).encode(text).ids
    for at, token in enumerate(ids):
        if not np.isfinite(grammar.allow(np.zeros(VOCABULARY, np.float32))[token]):
            return at
        grammar.accept(token)
    return -1


def test_a_schema_lets_its_own_through_and_nothing_else(structures: Structures) -> None:
    good = structures.json_schema(PERSON)
    assert fed(good, '{"name": "Bob", "age": 3}') == -1
    assert (good.complete, good.done) == (True, True)
    for text in (
        "Hello",
        '{"age"',
        '{"name": 3',
        '{ "name"',
        '{"name": "Bob", "age": 999',
        '{"name": "much too long a',
    ):
        assert fed(structures.json_schema(PERSON), text) >= 0, text


def test_the_mask_leaves_allowed_logits_and_the_given_array_alone(structures: Structures) -> None:
    logits = np.arange(VOCABULARY, dtype=np.float32)
    masked = structures.json_schema({"type": "integer"}).allow(logits)
    tokenizer = tiny_tokenizer(VOCABULARY)
    allowed = {tokenizer.id_to_token(int(token)) for token in np.flatnonzero(np.isfinite(masked))}
    assert allowed == set("-0123456789")
    assert all(masked[token] in (token, -np.inf) for token in range(VOCABULARY))
    assert logits.tolist() == list(range(VOCABULARY))


def test_padding_of_the_vocabulary_is_never_allowed() -> None:
    tokenizer = tiny_tokenizer(300)
    larger = Structures(tokenizer, vocabulary=400, eos_ids=[2])
    masked = larger.json_schema({"type": "string"}).allow(np.zeros(400, np.float32))
    assert np.isfinite(masked).any()
    assert not np.isfinite(masked[tokenizer.get_vocab_size() :]).any()


def test_a_number_may_end_and_go_on(structures: Structures) -> None:
    grammar = structures.json_schema({"type": "integer"})
    assert fed(grammar, "12") == -1
    assert (grammar.complete, grammar.done) == (True, False)
    masked = grammar.allow(np.zeros(VOCABULARY, np.float32))
    assert np.isfinite(masked[2])  # the token that ends an answer


@pytest.mark.parametrize("seed", range(6))
def test_a_random_model_keeps_to_the_schema(session: Session, seed: int) -> None:
    constraint = Structures.of(session).json_schema(PERSON)
    sampling = Sampling(temperature=1.5, seed=seed)
    answer = session.generate("Tell me", max_tokens=120, sampling=sampling, constraint=constraint)
    data = json.loads(answer.text())
    assert set(data) == {"name", "age"}
    assert len(data["name"]) <= 8
    assert 0 <= data["age"] <= 150
    assert answer.finish_reason == "stop"


def test_max_tokens_cuts_the_form(session: Session) -> None:
    constraint = Structures.of(session).json_schema(PERSON)
    answer = session.generate("Tell me", max_tokens=3, constraint=constraint)
    text = answer.text()
    assert answer.finish_reason == "length"
    assert '{"name": '.startswith(text[:9]) or text.startswith('{"name": ')


def test_tool_calls(structures: Structures) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 5}}</tool_call>'
    for text, forced, free in (
        (call, -1, -1),
        (call.replace(">{", ">\n{").replace("}<", "}\n<"), -1, -1),
        ('<tool_call>{"name": "clock", "arguments": {}}</tool_call>', -1, -1),
        ("just text", 0, -1),
        ("text first " + call, 0, -1),
        ("a < b and <tool_ca", 0, -1),
    ):
        assert fed(structures.tool_calls(TOOLS, forced=True), text) == forced, text
        assert fed(structures.tool_calls(TOOLS, forced=False), text) == free, text
    for text in (
        '<tool_call>{"name": "rm"',
        '<tool_call>{"name": "add", "arguments": {}}',
        '<tool_call>{"name": "add", "arguments": {"a": "x',
        call + " and more",
        "<tool_call>no json",
    ):
        assert fed(structures.tool_calls(TOOLS, forced=False), text) >= 0, text


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "nonsense"}, "Invalid type"),
        ({"type": "string", "pattern": "["}, "regex"),
        ({"$ref": "#/definitions/none"}, "does not exist"),
        ({"$ref": "http://example.com/schema"}, "can be followed"),
        ({"$ref": "file:///etc/passwd"}, "can be followed"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "description": "x" * MAX_SCHEMA}, "at most"),
        ({"const": float("nan")}, "plain JSON"),
        ({"enum": [object()]}, "plain JSON"),
        ([], "JSON object"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(structures: Structures, schema: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        structures.json_schema(schema)


def test_bombs_are_refused_or_followed_but_end(structures: Structures) -> None:
    deep: dict[str, Any] = {"type": "string"}
    chain: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    for n in range(30):
        chain = {"type": "string", "pattern": f"(a|b){{0,{n}}}c", "anyOf": [chain]}
    every = {"allOf": [{"type": "string", "pattern": f"(a|b){{0,{n}}}c"} for n in range(100, 140)]}
    for bomb in (chain, every):
        with pytest.raises(UserError, match="patterns and formats: got"):
            structures.json_schema(bomb)
    apart = {f"p{n}": {"type": "string", "pattern": f"[a-z]{{{n + 1}}}"} for n in range(20)}
    structures.json_schema({"type": "object", "properties": apart})
    few = {"allOf": every["allOf"][:8]}
    for bomb in (deep, few, {"type": "string", "pattern": "((a{1,999}){1,999}){1,999}"}):
        with contextlib.suppress(UserError, ModelError):
            structures.json_schema(bomb).allow(np.zeros(VOCABULARY, np.float32))


def test_a_wrong_token_is_an_error(structures: Structures) -> None:
    grammar = structures.json_schema(PERSON)
    with pytest.raises(ModelError, match="must keep to its grammar"):
        grammar.accept(tiny_tokenizer(VOCABULARY).encode("x").ids[0])


def test_the_command_line_reads_a_schema(session: Session, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    words = ["run", session.bundle.path, "Tell me", "--threads", "1", "--temperature", "1", "--seed", "1"]
    done = ek(*map(str, words), "--schema", schema)
    assert done.status == 0, done.err
    assert set(json.loads(done.out)) == {"name", "age"}
    schema.write_text("{")
    done = ek(*map(str, words), "--schema", schema)
    assert (done.status, "must be a file of JSON" in done.err) == (2, True)
