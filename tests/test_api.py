"""Requests of the OpenAI interface: what is read, what is refused and by which name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.assistant.api import ApiError, Extras, read_chat, read_completion, read_embedding, read_json

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO, **fields}


def test_a_plain_chat() -> None:
    request = read_chat(chat())
    assert request.prompt == ({"role": "user", "content": "Hello"},)
    assert (request.model, request.max_tokens, request.stream, request.choice) == ("m", None, False, "none")
    assert request.sampling.temperature == 0


def test_every_field_is_read() -> None:
    request = read_chat(
        chat(
            max_tokens=9, max_completion_tokens=7, temperature=1, top_p=0.5, seed=3, stop="x", stream=True, n=1,
            stream_options={"include_usage": True}, tools=[TOOL], tool_choice="auto", user="me", metadata={"a": "b"},
            store=True, frequency_penalty=0, logit_bias={}, logprobs=False, parallel_tool_calls=True, top_k=5,
            response_format={"type": "text"}, edgekit={"conversation": "a" * 32, "tools": ["clock"], "events": True},
        )
    )  # fmt: skip
    assert (request.max_tokens, request.stop, request.stream, request.usage_chunk) == (7, ("x",), True, True)
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (1.0, 5, 3)
    assert [tool.name for tool in request.tools] == ["add"]
    assert request.extras == Extras("a" * 32, ("clock",), True)


def test_null_is_as_if_it_were_not_there() -> None:
    assert read_chat(chat(stop=None, tools=None, max_tokens=None, response_format=None)) == read_chat(chat())


def test_turns_become_what_templates_know() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "tool", "tool_call_id": "2", "content": "3"},
        {"role": "assistant", "content": "Two."},
    ]
    turns = read_chat(chat(messages=messages)).prompt
    assert [turn["role"] for turn in turns if isinstance(turn, dict)] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    contents = [turn["content"] for turn in turns if isinstance(turn, dict)]
    assert contents[1:3] == ["ab", '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>']
    assert contents[3].count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}, {"type": "integer"}),
    ],
)
def test_response_formats(wanted: dict[str, Any], schema: dict[str, Any] | None) -> None:
    assert read_chat(chat(response_format=wanted)).schema == schema


@pytest.mark.parametrize(
    ("choice", "read"),
    [
        (None, "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "add"}}, "=add"),
    ],
)
def test_tool_choices(choice: Any, read: str) -> None:
    assert read_chat(chat(tools=[TOOL], tool_choice=choice)).choice == read


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": -100}}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"temprature": 1}, "temprature"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 65}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"edgekit": {"conversation": "../../etc"}}, "edgekit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as problem:
        read_chat(chat(**fields))
    assert (problem.value.status, problem.value.param) == (400, param)
    assert problem.value.to_json()["error"]["type"] == "invalid_request_error"
    assert len(str(problem.value)) < 600


def test_completions() -> None:
    assert read_completion({"model": "m", "prompt": "Once"}).max_tokens == 16
    assert read_completion({"model": "m", "prompt": ["Once"], "max_tokens": 5}).prompt == "Once"
    for prompt in ("", [], ["a", "b"], [1, 2], 3):
        with pytest.raises(ApiError, match="prompt must be"):
            read_completion({"model": "m", "prompt": prompt})
    for field, value in (("echo", True), ("best_of", 2), ("suffix", "x"), ("logprobs", 1)):
        with pytest.raises(ApiError, match="not supported"):
            read_completion({"model": "m", "prompt": "a", field: value})


def test_embeddings() -> None:
    assert read_embedding({"model": "m", "input": "a"}).texts == ("a",)
    request = read_embedding({"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8})
    assert (request.texts, request.base64, request.dimensions) == (("a", "b"), True, 8)
    for texts in ("", [], [""], [1], [[1]], ["a"] * 257):
        with pytest.raises(ApiError, match="input must be"):
            read_embedding({"model": "m", "input": texts})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"null", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b"[" * 200_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"a": "\\ud800"}', b"1" * 10_000, b'{"a": ' + b"9" * 6000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_object_of_text_and_numbers(body: bytes) -> None:
    with pytest.raises(ApiError) as problem:
        read_json(body)
    assert (problem.value.status, problem.value.code) == (400, "invalid_json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = ("model", "messages", "stop", "tools", "tool_choice", "response_format", "stream_options", "edgekit", "seed")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*names, "prompt", "input", "n", "max_tokens"]), json_values, max_size=6))
def test_any_object_is_read_or_refused(data: dict[str, Any]) -> None:
    for read in (read_chat, read_completion, read_embedding):
        with contextlib.suppress(ApiError):  # anything else is a defect
            read(read_json(json.dumps(data).encode()))
