"""The requests of the OpenAI interface, read strictly, and its errors.

What changes an answer and cannot be done is refused with the parameter's name (several choices, log-probabilities,
images, penalties of frequency); what has no influence on it (`user`, `metadata`, `store`) is read and left alone.
`edgekit` is our own addition, {"conversation": ..., "tools": [...], "events": true}: the OpenAI client sends it with
extra_body.

Chat templates know system, user and assistant turns with text. The others are put into those words here: `developer` is
system, a call becomes the text that a model writes for it, and the results of tools become a user's turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

from edgekit.assistant.tools import Tool, call_text, result_message
from edgekit.errors import EdgekitError, UserError
from edgekit.runtime.sampling import Sampling
from edgekit.runtime.template import Message
from edgekit.schema import parse

T = TypeVar("T")

MAX_STOPS = 16
MAX_TOOLS = 64
MAX_TEXTS = 256
CONVERSATION = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ApiError(EdgekitError):
    """A request that gets `status` and an error of OpenAI's form. `retry_after_s` becomes a header."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def to_json(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Extras:
    """Our own part of a request. `conversation`: where the page's records go; `tools`: built-in tools that the server
    runs; `events`: whether the stream tells sources, route and speed on the way; `document`: the document of the index
    that is read whole to answer from."""

    conversation: str | None = None
    tools: tuple[str, ...] = ()
    events: bool = False
    document: str | None = None

    def __post_init__(self) -> None:
        if self.conversation is not None and not CONVERSATION.fullmatch(self.conversation):
            raise UserError(f"conversation must be 32 hexadecimal digits: got {self.conversation!r:.50}")


@dataclass(frozen=True)
class Request:
    """What a chat or a completion asks for. `prompt` is messages for a chat, text for a completion.

    `schema` is what the answer must keep to, {"type": "object"} for any object; `choice` is none, auto, required or the
    name of a tool. `max_tokens` is None where the client sets no bound.
    """

    model: str
    prompt: str | tuple[Message, ...]
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage_chunk: bool
    schema: Mapping[str, Any] | None = None
    tools: tuple[Tool, ...] = ()
    choice: str = "none"
    extras: Extras = field(default_factory=Extras)


@dataclass(frozen=True)
class EmbeddingRequest:
    model: str
    texts: tuple[str, ...]
    base64: bool
    dimensions: int | None


@dataclass(frozen=True)
class _StreamOptions:
    include_usage: bool = False
    include_obfuscation: bool = False


@dataclass(frozen=True)
class _Common:
    """What chats and completions share. Fields without a use here must have the value that asks for nothing."""

    model: str
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Any = ()
    stream: bool = False
    stream_options: _StreamOptions = field(default_factory=_StreamOptions)
    n: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] = field(default_factory=dict)
    edgekit: Extras = field(default_factory=Extras)
    user: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    store: bool = False

    def sampling(self) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        return Sampling(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class _Chat(_Common):
    messages: list[Any] = field(default_factory=list)
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = False
    logprobs: bool = False
    service_tier: str = ""
    reasoning_effort: str = ""
    prompt_cache_key: str = ""
    safety_identifier: str = ""
    modalities: tuple[Literal["text"], ...] = ("text",)


@dataclass(frozen=True)
class _Completion(_Common):
    prompt: Any = ""
    echo: bool = False
    best_of: int = 1
    suffix: str = ""
    logprobs: int | None = None


@dataclass(frozen=True)
class _Embedding:
    model: str
    input: Any = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str = ""


_NEUTRAL = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": (None, False),
    "echo": False, "best_of": 1, "suffix": "",
}  # fmt: skip


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body. Raises ApiError when it is no JSON object of plain text and finite numbers."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON number")

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as problem:
        raise ApiError(f"the body must be JSON in UTF-8: {str(problem)[:200]}", code="invalid_json") from problem
    if not isinstance(data, dict):
        raise ApiError(f"the body must be a JSON object: got {type(data).__name__}", code="invalid_json")
    return data


def read_chat(data: Mapping[str, Any]) -> Request:
    """A request to /v1/chat/completions. Raises ApiError."""
    body = _parsed(_Chat, data)
    tools = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools[: MAX_TOOLS + 1]))
    if len(tools) > MAX_TOOLS:
        _refuse("tools", f"at most {MAX_TOOLS}", len(body.tools))
    if len({tool.name for tool in tools}) < len(tools):
        _refuse("tools", "of different names", [tool.name for tool in tools])
    schema = _schema(body.response_format)
    choice = _choice(body.tool_choice, tools, built_in=bool(body.edgekit.tools))
    if schema is not None and choice != "none":
        raise ApiError("response_format and tools must not come together: ask for one of them", param="tools")
    return Request(
        prompt=_messages(body.messages),
        schema=schema,
        tools=tools,
        choice=choice,
        **_options(body, body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens),
    )


def read_completion(data: Mapping[str, Any]) -> Request:
    """A request to /v1/completions. Raises ApiError."""
    body = _parsed(_Completion, data)
    prompt = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str) or not prompt:
        _refuse("prompt", "one text that is not empty", prompt)
    return Request(prompt=prompt, **_options(body, 16 if body.max_tokens is None else body.max_tokens))


def read_embedding(data: Mapping[str, Any]) -> EmbeddingRequest:
    """A request to /v1/embeddings. Raises ApiError."""
    body = _parsed(_Embedding, data)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        _refuse("input", "a text or a list of texts, none of them empty", body.input)
    if len(texts) > MAX_TEXTS:
        _refuse("input", f"at most {MAX_TEXTS} texts", len(texts))
    return EmbeddingRequest(body.model, tuple(texts), body.encoding_format == "base64", body.dimensions)


def _parsed(cls: type[T], data: Mapping[str, Any]) -> T:
    given = {key: value for key, value in data.items() if value is not None}
    try:
        body = parse(cls, given, where="the request")
    except UserError as problem:
        found = re.match(r"the request: (?:unknown key '([^']+)'|the key '([^']+)'|(\w+))", str(problem))
        raise ApiError(str(problem), param=next(filter(None, found.groups()), None) if found else None) from problem
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, neutral)
        if value != neutral and not (isinstance(neutral, tuple) and value in neutral):
            raise ApiError(f"{name} is not supported: got {value!r:.50}; leave it out", param=name)
    return body


def _options(body: _Common, max_tokens: int | None) -> dict[str, Any]:
    if max_tokens is not None and max_tokens < 1:
        _refuse("max_tokens", "at least 1", max_tokens)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    good = isinstance(stop, (list, tuple)) and all(isinstance(text, str) and 0 < len(text) <= 200 for text in stop)
    if not good or len(stop) > MAX_STOPS:
        _refuse("stop", f"up to {MAX_STOPS} texts of 1 to 200 characters", body.stop)
    try:
        sampling = body.sampling()
    except UserError as problem:
        raise ApiError(str(problem), param=str(problem).partition(" ")[0]) from problem
    return {
        "model": body.model,
        "max_tokens": max_tokens,
        "sampling": sampling,
        "stop": tuple(stop),
        "stream": body.stream,
        "usage_chunk": body.stream_options.include_usage,
        "extras": body.edgekit,
    }


def _messages(rows: Sequence[Any]) -> tuple[Message, ...]:
    if not rows:
        _refuse("messages", "at least one message", rows)
    messages: list[Message] = []
    after_tool = False
    for at, row in enumerate(rows):
        where = f"messages[{at}]"
        role = row.get("role") if isinstance(row, Mapping) else None
        text = _content(row.get("content"), where) if isinstance(row, Mapping) else ""
        if role in ("system", "developer"):
            messages.append({"role": "system", "content": text})
        elif role == "user":
            messages.append({"role": "user", "content": text})
        elif role == "assistant":
            calls = [_past_call(call, where) for call in row.get("tool_calls") or ()]
            messages.append({"role": "assistant", "content": "\n".join([*([text] if text else []), *calls])})
        elif role == "tool":
            result = result_message(text)
            if after_tool:
                messages[-1]["content"] += "\n" + result["content"]
            else:
                messages.append(result)
        else:
            _refuse(f"{where}.role", "system, developer, user, assistant or tool", role)
        after_tool = role == "tool"
    return tuple(messages)


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        _refuse(f"{where}.content", "a text or a list of parts", content)
    for part in content:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            _refuse(f"{where}.content", "text: this model reads no images, sounds or files", part)
    return "".join(part["text"] for part in content)


def _past_call(call: Any, where: str) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else (0, 0)
    if not isinstance(name, str) or not isinstance(arguments, str):
        _refuse(f"{where}.tool_calls", "functions with a name and arguments as text", call)
    return call_text(name, arguments)


def _tool(tool: Any, where: str) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        _refuse(where, 'of type "function"', tool)
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{where}.function.name", "1 to 64 letters, digits, _, - or dots", name)
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        _refuse(f"{where}.function.parameters", 'a JSON schema of type "object"', parameters)
    return Tool(name, str(description), parameters)


def _choice(choice: Any, tools: Sequence[Tool], *, built_in: bool) -> str:
    names = {tool.name for tool in tools}
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in names:
            _refuse("tool_choice", f"one of the tools {sorted(names)}", name)
        return f"={name}"
    if choice is None:
        return "auto" if tools or built_in else "none"
    if choice not in ("none", "auto", "required"):
        _refuse("tool_choice", "none, auto, required or a function", choice)
    if choice == "required" and not tools and not built_in:
        _refuse("tool_choice", "none or auto without tools", choice)
    return str(choice) if tools or built_in else "none"


def _schema(wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = wanted.get("json_schema")
    if kind != "json_schema" or not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        _refuse("response_format", 'text, json_object, or json_schema with a "schema"', wanted)
    schema: Mapping[str, Any] = inner["schema"]
    return schema


def _refuse(param: str, rule: str, value: object) -> NoReturn:
    raise ApiError(f"{param} must be {rule}: got {value!r:.100}", param=param)
