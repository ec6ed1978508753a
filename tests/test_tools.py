"""Tools: the built-in ones, how they are told, and how text and calls are parted."""

from __future__ import annotations

import ast
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgekit.assistant.tools as module
from edgekit.assistant.tools import (
    CALCULATOR,
    MAX_RESULT,
    Call,
    Splitter,
    call_text,
    clock,
    instructions,
    read_call,
    result_message,
    run_tool,
    search_tool,
)

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "1 < 2"}}</tool_call>'


def test_the_calculator_gives_values_and_reasons() -> None:
    assert run_tool(CALCULATOR, Call("calculator", {"expression": "6 * 7"})) == "42"
    assert run_tool(CALCULATOR, Call("calculator", {"expression": "1/0"})).startswith("error: ")


def test_the_clock_tells_the_time() -> None:
    tool = clock(lambda: datetime(2026, 3, 1, 12, 0, 5, tzinfo=UTC))
    assert run_tool(tool, Call("clock", {})) == "Sunday, 01 March 2026, 12:00:05 UTC"


def test_the_search_is_bounded() -> None:
    tool = search_tool(lambda query: [(f"{query}.md", "Head", "text " * 5000)] * 5)
    result = run_tool(tool, Call("search", {"query": "x"}))
    assert len(result) <= MAX_RESULT
    assert [row["document"] for row in json.loads(result)] == ["x.md"] * 5
    assert run_tool(search_tool(lambda query: []), Call("search", {"query": "x"})) == "nothing was found"


def test_no_tool_can_reach_a_shell_a_file_or_the_network() -> None:
    folder = Path(module.__file__).parent
    for name in ("tools.py", "tools_calculator.py"):
        tree = ast.parse((folder / name).read_text())
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not {"os", "subprocess", "socket", "shutil", "urllib.request", "importlib", "ctypes"} & imported, name
        assert not {"eval", "exec", "open", "compile", "__import__", "getattr"} & called, name


def test_instructions_name_every_tool() -> None:
    text = instructions([CALCULATOR, clock()], forced=False)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"type"')]
    assert [row["function"]["name"] for row in rows] == ["calculator", "clock"]
    assert "You must" in instructions([CALCULATOR], forced=True)


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 11, 1000])
def test_text_and_call_are_parted_wherever_pieces_end(cut: int) -> None:
    whole = "Let me see: a < b. " + CALL
    splitter = Splitter()
    text = "".join(splitter.push(whole[at : at + cut]) for at in range(0, len(whole), cut)) + splitter.finish()
    assert text == "Let me see: a < b. "
    assert read_call(splitter.call) == Call("calculator", {"expression": "1 < 2"})


@given(st.text(alphabet="<tool_cal> x", max_size=40), st.integers(1, 7))
def test_text_without_a_call_comes_out_whole(text: str, cut: int) -> None:
    splitter = Splitter()
    shown = "".join(splitter.push(text[at : at + cut]) for at in range(0, len(text), cut)) + splitter.finish()
    if "<tool_call>" in text:
        assert splitter.call.startswith("<tool_call>")
    else:
        assert (shown, splitter.call) == (text, "")


def test_calls_are_written_as_they_are_read_and_cut_ones_are_none() -> None:
    assert read_call(call_text("add", '{"a": [1, {"b": "}"}]}')) == Call("add", {"a": [1, {"b": "}"}]})
    assert read_call(CALL[:-3]) is None
    assert read_call("<tool_call>") is None


def test_results_are_a_users_turn() -> None:
    message = result_message("42")
    assert message["role"] == "user"
    assert "42" in message["content"]
