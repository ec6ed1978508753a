"""Chat templates: the Jinja program that comes with a model and turns a conversation into its prompt.

A template renders here as in transformers, but it is a stranger's program. So it runs in a sandbox that bounds what it
may touch, how long it runs and how much it makes:

- It sees plain JSON data, copied. The attributes, methods, filters, tests and globals that it may use are closed lists.
- Each loop step, call, filter, test and operator goes through the sandbox, which looks at the clock there. A render is
  thus stopped in whatever thread it runs, without a signal, a trace function, another thread or a process.
- Each value that it makes is measured: before it is made where it could be much larger than its parts. The size is that
  of the tree, so a list that holds one list twice counts it twice. Hence no single step, in C or not, takes long, and
  the sum of all sizes bounds the memory.

Refused here and not in transformers: `%` and `.format` on text, template inheritance, `varargs`, a namespace inside a
list, dict or namespace, and what no published chat template is known to use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import TypedDict

from jinja2 import Template, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from edgekit.errors import ModelError, UserError
from edgekit.runtime.sandbox import MAX_DEPTH, MAX_SOURCE, Refusal, Sandbox, joined, measure


class Message(TypedDict):
    """One turn of a conversation. Any mapping with a role will do: templates read `tool_calls`, `name` and more."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template, which any thread may render at any time.

    `source`: the Jinja text. `special_tokens`: the names that it may use for them, such as `bos_token`, and their text.
    Raises ModelError when the source does not compile or uses what the sandbox does not have.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._code = _compiled(source)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for a conversation.

        Arguments: `messages`: the turns, oldest first, each with a role; `tools`: JSON schemas; `variables`: more names
        that this template reads, such as `enable_thinking`. All is JSON data, and none of it is changed.
        Raises: UserError for other data or more than MAX_SIZE of it, and with the template's own message where the
        template refuses the conversation; ModelError when the template fails or exceeds the sandbox.
        """
        for at, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UserError(f'a message must have a "role" that is text: messages[{at}] is {message!r:.100}')
        data = {
            **self._special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        plain = {name: _plain(value, name) for name, value in data.items()}
        try:
            measure(plain)
        except SecurityError as error:
            raise UserError(f"the conversation is too large: {error}; shorten it") from None
        return _rendered(self._code, plain)


def _compiled(source: str) -> CodeType:
    if len(source) > MAX_SOURCE:
        raise ModelError(f"a chat template may have {MAX_SOURCE} characters: got {len(source)}")
    try:
        return Sandbox().compile(source)
    except TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message:.500}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # too deep for Python, or too long a number
        problem = f"{type(error).__name__}: {error!s:.500}"
    raise ModelError(f"the chat template must compile: {problem}")


def _rendered(code: CodeType, data: Mapping[str, object]) -> str:
    sandbox = Sandbox()
    template = Template.from_code(sandbox, code, sandbox.make_globals(None))
    try:
        return joined("", template.generate(data))
    except Refusal as refusal:
        raise UserError(f"the chat template refuses the conversation: {refusal!s:.500}") from None
    except Exception as error:
        # Only its text goes on: the traceback would keep alive all that the template made.
        kind = "" if isinstance(error, SecurityError) else f"{type(error).__name__}: "
        problem = f"line {_line(template, error)}: {kind}{error!s:.500}"
    raise ModelError(f"the chat template failed at {problem}")


def _line(template: Template, error: Exception) -> int:
    """The line of the template where the error left it, for all the Python code that it passed through."""
    line = 1
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__jinja_template__") is template:
            line = template.get_corresponding_lineno(step.tb_lineno)
        step = step.tb_next
    return line


def _plain(value: object, place: str, depth: int = 0) -> object:
    """A copy of JSON data in Python's own types, whose methods the sandbox knows."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if depth > MAX_DEPTH:
        raise UserError(f"a conversation may be nested {MAX_DEPTH} deep: {place:.100} is deeper")
    if isinstance(value, Mapping):
        return {_plain(key, place, depth + 1): _plain(item, f"{place}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{at}]", depth + 1) for at, item in enumerate(value)]
    raise UserError(f"a conversation must be JSON data: {place:.100} is of type {type(value).__name__}")
