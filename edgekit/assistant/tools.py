"""Tools: what a model may ask for, how it is told, and how its answer is read.

Models with and without a tool format of their own are told the same, in the system message, in the form that Qwen and
Hermes models know; a call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and a grammar holds the model
to the names and schemas that it was offered. What stands in a question, a document or a tool's result is never
read as a call: only what the model itself writes is.

The built-in tools only compute, read the clock or search the index. None writes, opens a connection or runs a program.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from edgekit.assistant.structure import CALL_BEGIN, CALL_END
from edgekit.assistant.tools_calculator import calculate
from edgekit.errors import EdgekitError
from edgekit.runtime.template import Message

MAX_RESULT = 4000  # characters of a built-in tool's result


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for. `parameters`: the JSON schema of its arguments, an object. `run` is None for
    tools that the client runs."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], str] | None = None


@dataclass(frozen=True)
class Call:
    """What a model asked for. `arguments` is a JSON object that keeps to the tool's schema."""

    name: str
    arguments: Mapping[str, Any]


def _object(required: Sequence[str] = (), **properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


CALCULATOR = Tool(
    "calculator",
    "Computes an expression of numbers with + - * / % ^ and sqrt, abs, round, min, max, exp, ln, log10, pi, e.",
    _object(["expression"], expression={"type": "string", "pattern": "^[0-9a-z(-][0-9a-z+*/%^()., -]{0,99}$"}),
    lambda arguments: calculate(str(arguments["expression"])),
)


def clock(now: Callable[[], datetime] = lambda: datetime.now().astimezone()) -> Tool:
    """Tells the date and time of this machine's zone."""

    def tell(arguments: Mapping[str, Any]) -> str:
        moment = now()
        return f"{moment:%A, %d %B %Y, %H:%M:%S} {moment.tzname()}"

    return Tool("clock", "Tells the current date and time.", _object(), tell)


def search_tool(search: Callable[[str], Sequence[tuple[str, str, str]]]) -> Tool:
    """Looks passages up: `search` gives (document, heading, text) of the best ones for a query."""

    def look_up(arguments: Mapping[str, Any]) -> str:
        found = search(str(arguments["query"]))
        each = MAX_RESULT // max(1, len(found)) - 200
        rows = [{"document": name, "heading": heading, "text": text[:each]} for name, heading, text in found]
        return json.dumps(rows, ensure_ascii=False) if rows else "nothing was found"

    return Tool(
        "search",
        "Searches the user's documents and gives the passages that fit best.",
        _object(["query"], query={"type": "string", "description": "what to look for"}),
        look_up,
    )


def run_tool(tool: Tool, call: Call) -> str:
    """The result of a built-in tool as text for the model; what goes wrong is a result too."""
    assert tool.run is not None
    try:
        return tool.run(call.arguments)[:MAX_RESULT]
    except EdgekitError as problem:
        return f"error: {problem}"[:MAX_RESULT]


def instructions(tools: Sequence[Tool], *, forced: bool) -> str:
    """What the system message says about tools."""
    signatures = "\n".join(
        json.dumps(
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
            },
            ensure_ascii=False,
        )
        for tool in tools
    )
    when = "You must call one of these functions." if forced else "You may call one of these functions."
    return (
        f"# Tools\n\n{when} Their signatures:\n<tools>\n{signatures}\n</tools>\n\nTo call a function, answer with its"
        f' name and arguments:\n{CALL_BEGIN}\n{{"name": "NAME", "arguments": {{...}}}}\n{CALL_END}'
    )


class Splitter:
    """Parts a stream of text into what is shown and the call that follows it."""

    def __init__(self) -> None:
        self.call = ""  # from the marker on
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certainly not the beginning of a call; often none."""
        if self.call:
            self.call += piece
            return ""
        text = self._held + piece
        at = text.find(CALL_BEGIN)
        if at >= 0:
            self._held, self.call = "", text[at:]
            return text[:at]
        held = next((n for n in range(len(CALL_BEGIN) - 1, 0, -1) if text.endswith(CALL_BEGIN[:n])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The rest of the text, when no call came."""
        held, self._held = self._held, ""
        return held


def read_call(text: str) -> Call | None:
    """The call that a text is; None when it was cut."""
    body, end, _ = text.removeprefix(CALL_BEGIN).partition(CALL_END)
    if not end:
        return None
    call = json.loads(body)
    return Call(str(call["name"]), call["arguments"])


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it; `arguments` is JSON text."""
    return f'{CALL_BEGIN}{{"name": {json.dumps(name)}, "arguments": {arguments}}}{CALL_END}'


def result_message(result: str) -> Message:
    """A tool's result as a turn that every chat template knows."""
    return {"role": "user", "content": f"<tool_response>\n{result}\n</tool_response>"}
