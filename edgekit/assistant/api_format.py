"""Answers in the shape of the OpenAI interface: whole objects, and the chunks of a stream.

The field `edgekit` is ours: sources with their spans, citations, the route, tools that the server ran, and what the
answer cost. Chunks on the way carry it only where the request asked for events; the last one always does.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from edgekit.assistant.answer import Filtered, Finished, Opened, Routed, Sources, Text, to_json
from edgekit.assistant.api import ApiError, EmbeddingRequest, Request
from edgekit.assistant.server_chat import Called, Ended, Event, Progress
from edgekit.runtime.embeddings import Embeddings

Kind = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"


class Writer:
    """Collects the events of one answer and writes them down as OpenAI does."""

    def __init__(self, request: Request, kind: Kind) -> None:
        self.request = request
        self.kind = kind
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}  # the field `edgekit`
        self.reason: str | None = None
        self._usage: dict[str, Any] = {}
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}

    def add(self, event: Event) -> None:
        """Take an event into the whole answer."""
        if isinstance(event, Text):
            self.text += event.text
        elif isinstance(event, Called):
            arguments = json.dumps(event.call.arguments, ensure_ascii=False)
            if event.result is None:
                function = {"name": event.call.name, "arguments": arguments}
                self.calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
            else:
                ran = {"name": event.call.name, "arguments": event.call.arguments, "result": event.result}
                self.notes.setdefault("tools", []).append(ran)
        elif isinstance(event, Sources):
            self.notes["sources"] = _fields(event)
        elif isinstance(event, Routed):
            self.notes["route"] = _fields(event)
        elif isinstance(event, Opened):
            self.notes["document"] = _fields(event)
        elif isinstance(event, Filtered):
            self.notes.setdefault("filter", []).append(_fields(event))
        elif isinstance(event, Ended):
            self._end(event)

    def whole(self) -> dict[str, Any]:
        """The answer as one object, when all its events are in."""
        if self.kind == "chat":
            message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
            if self.calls:
                message |= {"content": self.text or None, "tool_calls": self.calls}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.reason}
        else:
            choice = {"index": 0, "text": self.text, "logprobs": None, "finish_reason": self.reason}
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage, "edgekit": self.notes}

    def chunks(self, event: Event) -> Iterator[bytes]:
        """What a stream sends for an event; call `add` with it first."""
        if isinstance(event, Text):
            yield self._chunk({"content": event.text}, text=event.text)
        elif isinstance(event, Called) and event.result is None:
            yield self._chunk({"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1]}]})
        elif isinstance(event, Ended):
            yield self._chunk({}, reason=self.reason, notes=self.notes)
            if self.request.usage_chunk:
                yield self._event({**self._head, "object": self._object, "choices": [], "usage": self._usage})
            yield DONE
        elif self.request.extras.events and not isinstance(event, Finished):
            yield self._chunk({}, notes=note(event))

    def begin(self) -> bytes:
        """The first chunk of a chat, which says who speaks; of a completion there is none."""
        return self._chunk({"role": "assistant", "content": ""}) if self.kind == "chat" else b""

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _chunk(
        self, delta: dict[str, Any], *, text: str = "", reason: str | None = None, notes: dict[str, Any] | None = None
    ) -> bytes:
        part = {"delta": delta} if self.kind == "chat" else {"text": text}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        extra = {} if notes is None else {"edgekit": notes}
        return self._event({**self._head, "object": self._object, "choices": [choice], **extra})

    def _event(self, data: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def _end(self, event: Ended) -> None:
        cost, reply = event.cost, event.reply
        self.reason = event.reason
        self._usage = {
            "prompt_tokens": cost.prompt_tokens,
            "completion_tokens": cost.generated_tokens,
            "total_tokens": cost.prompt_tokens + cost.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": cost.reused_tokens},
        }
        self.notes["cost"] = dataclasses.asdict(cost)
        self.notes["finish_reason"] = reply.finish_reason
        if reply.citations:
            self.notes["citations"] = [dataclasses.asdict(citation) for citation in reply.citations]
        if reply.dropped_turns:
            self.notes["dropped_turns"] = reply.dropped_turns


def note(event: Event) -> dict[str, Any]:
    """An event that is no text, for the page: {"sources": ...}, {"route": ...}, {"progress": ...} and so on."""
    if isinstance(event, Progress):
        return {"progress": dataclasses.asdict(event)}
    if isinstance(event, Called):
        return {"tool": {"name": event.call.name, "arguments": event.call.arguments, "result": event.result}}
    name = {Sources: "sources", Routed: "route", Opened: "document", Filtered: "filter"}.get(type(event))
    assert name is not None
    return {name: _fields(event)}


def embedding(request: EmbeddingRequest, found: Embeddings) -> dict[str, Any]:
    """The vectors of a request."""
    rows = found.vectors.astype("<f4")
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if request.base64 else _short(row),
        }
        for index, row in enumerate(rows)
    ]
    total = sum(found.tokens)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "edgekit"}


def _short(row: np.ndarray[Any, np.dtype[np.float32]]) -> list[float]:
    return [float(f"{number:.7g}") for number in row.tolist()]


def _fields(event: Any) -> dict[str, Any]:
    return {key: value for key, value in to_json(event).items() if key != "type"}


def error(problem: ApiError) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + json.dumps(problem.to_json(), ensure_ascii=False).encode() + b"\n\n"
