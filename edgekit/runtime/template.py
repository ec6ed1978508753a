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

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from itertools import chain
from types import CodeType
from typing import Any, NoReturn, TypedDict

from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateAssertionError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, do_indent, do_round, do_sort, do_title, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgekit.errors import ModelError, UserError

MAX_SECONDS = 2.0
"""Processor time of one render."""
MAX_SOURCE = 128 * 1024
"""Characters of a template; the longest published ones have about 40,000."""
MAX_SIZE = 4_000_000
"""Size of one value, and of the prompt: its characters, and 16 for each string, number, list or dict in it."""
MAX_TOTAL = 16 * MAX_SIZE
"""Size of all values that one render makes, whether it keeps them or not."""
MAX_DEPTH = 64
MAX_BITS = 4096  # of an integer
MAX_INDENT = 64
_NODE_SIZE = 16

_FILTERS = """abs capitalize count d default dictsort e escape first float int items last length lower map max min
    reject rejectattr reverse safe select selectattr string trim upper"""  # and those that the sandbox defines
_TESTS = """boolean defined divisibleby eq equalto even false float ge greaterthan gt in integer iterable le lessthan
    lower lt mapping ne none number odd sameas sequence string true undefined upper == != < <= > >="""
_STRING_METHODS = """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"""
_ATTRIBUTES = (
    (str, frozenset(_STRING_METHODS.split())),
    (dict, frozenset({"copy", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index"})),
)
_CONTAINERS: tuple[type[Collection[object]], ...] = (
    *(dict, list, tuple, set, frozenset),
    *(type({}.keys()), type({}.values()), type({}.items())),
)


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
            if not isinstance(message.get("role"), str):
                raise UserError(
                    f'a message must have a "role" that is text: messages[{at}] has {message.get("role")!r}'
                )
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
            _size(plain)
        except SecurityError as error:
            raise UserError(f"the conversation is too large: {error}; shorten it") from None
        return _rendered(self._code, plain)


def _compiled(source: str) -> CodeType:
    if len(source) > MAX_SOURCE:
        raise ModelError(f"a chat template may have {MAX_SOURCE} characters: got {len(source)}")
    try:
        return _Sandbox().compile(source)
    except TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message:.500}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # too deep for Python, or too long a number
        problem = f"{type(error).__name__}: {error!s:.500}"
    raise ModelError(f"the chat template must compile: {problem}")


def _rendered(code: CodeType, data: Mapping[str, object]) -> str:
    sandbox = _Sandbox()
    template = Template.from_code(sandbox, code, sandbox.make_globals(None))
    try:
        return _joined("", template.generate(data))
    except _Refusal as refusal:
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


def _size(value: object, depth: int = 0) -> int:
    """The size of a value as a tree (see MAX_SIZE). Raises SecurityError as soon as it passes a limit."""
    if isinstance(value, str):
        return _NODE_SIZE + len(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise SecurityError(f"an integer may have {MAX_BITS} bits, not {value.bit_length()}")
    children: Iterable[object] = ()
    if isinstance(value, dict):
        children = chain(value, value.values())
    elif isinstance(value, _CONTAINERS):
        children = value
    elif isinstance(value, Namespace) and depth:
        raise SecurityError("a namespace may not lie inside another value")
    if depth > MAX_DEPTH:
        raise SecurityError(f"a value may be nested {MAX_DEPTH} deep")
    size = _NODE_SIZE
    for child in children:
        size += _size(child, depth + 1)
        _allow(size)
    return size


def _allow(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a value may have a size of {MAX_SIZE}, not {size} or more")


def _joined(separator: str, values: Iterable[object]) -> str:
    """The text of all values, which is measured as it grows."""
    texts: list[str] = []
    size = 0
    for value in values:
        texts.append(str(value))
        size += len(texts[-1]) + len(separator)
        _allow(size - len(separator))
    return separator.join(texts)


class _Refusal(Exception):
    """The template called `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one render, with its clock and its account."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            optimized=False,  # nothing is computed at compile time; nor is output, as `_output` needs a context
            finalize=self._output,
            cache_size=0,
        )
        own = {
            "indent": self._indent,
            "join": self._join,
            "list": self._list,
            "replace": self._replace,
            "round": self._round,
            "sort": self._sort,
            "title": self._title,
            "tojson": self._tojson,
        }
        filters = {name: FILTERS[name] for name in _FILTERS.split()} | own
        self.filters = {name: self._metered(function) for name, function in filters.items()}
        tests: dict[str, Callable[..., Any]] = {name: TESTS[name] for name in _TESTS.split()}
        self.tests = {name: self._metered(function) for name, function in tests.items()}
        self.globals = {
            "dict": _new_dict,
            "namespace": _new_namespace,
            "raise_exception": _raise_exception,
            "range": safe_range,
            "strftime_now": _strftime_now,
        }
        self._left = MAX_TOTAL
        self._end = time.thread_time() + MAX_SECONDS

    # What a template may touch.

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        for kind, names in _ATTRIBUTES:
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, (Namespace, LoopContext)) and not attr.startswith("_")

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        raise SecurityError(f"the attribute {attribute!r} of {type(obj).__name__!r} is not for chat templates")

    def wrap_str_format(self, value: object) -> None:
        """`str.format` is then refused by `is_safe_attribute`."""

    def handle_exception(self, source: str | None = None) -> NoReturn:
        raise  # as it is: jinja would compile a new frame for each one of the traceback

    # Where a render is metered.

    def _tick(self) -> None:
        if time.thread_time() > self._end:
            raise SecurityError(f"it may run for {MAX_SECONDS} s")

    def _made(self, value: Any, *, anew: bool = False) -> Any:
        """`value`, measured and paid for. `anew`: a container's items were made with it."""
        size = _size(value)
        _allow(size)
        if isinstance(value, _CONTAINERS) and not anew:
            size = _NODE_SIZE + 2 * len(value)
        self._left -= size
        if self._left < 0:
            raise SecurityError(f"it may make values of a total size of {MAX_TOTAL}")
        return value

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            made = function(*args, **kwargs)
            return self.ticking(made) if isinstance(made, Iterator) else self._made(made)

        return metered

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        owner = getattr(function, "__self__", None)
        if not isinstance(owner, str):
            return self._made(super().call(context, function, *args, **kwargs))
        if function.__name__ == "replace" and len(args) > 1:
            _allow(len(owner) + owner.count(args[0]) * len(args[1]))
        elif function.__name__ == "join" and args:
            args = (self._list(args[0]),)
            _allow(sum(map(len, args[0])) + len(owner) * len(args[0]))
        return self._made(super().call(context, function, *args, **kwargs), anew=True)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text may not be formatted by `%`")
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and integers and left.bit_length() * abs(right) > MAX_BITS:
            raise SecurityError(f"an integer may have {MAX_BITS} bits")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    _allow((len(value) if isinstance(value, str) else _size(value)) * times)
        return self._made(super().call_binop(context, operator, left, right))

    @pass_context
    def _output(self, context: Context, value: object) -> str:
        if type(value) is str:
            return value
        _size(value)
        return str(self._made(str(value)))

    def concat(self, pieces: Iterable[str], /) -> str:
        """What jinja joins the output of a macro and of a `set` block with."""
        return str(self._made(_joined("", pieces)))

    # What `_Guard` puts into the compiled template.

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Guard().visit(tree)
        return tree

    def ticking(self, values: Iterable[Any]) -> Iterator[Any]:
        if isinstance(values, str):
            _allow(_NODE_SIZE * len(values))
        for value in values:
            self._tick()
            yield value

    @staticmethod
    def joined(*values: object) -> str:
        return _joined("", values)

    @staticmethod
    def same(value: Any) -> Any:
        return value

    # Filters that could make much from little, and those that transformers changes.

    def _indent(self, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        _allow(len(value) + _indent_width(width) * (1 + len(value.splitlines())))
        return do_indent(value, width, first, blank)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        return _joined(str(d), value)

    def _list(self, value: Iterable[Any]) -> list[Any]:
        items = list(self.ticking(value))
        _size(items)
        return items

    def _replace(self, value: object, old: object, new: object, count: int = -1) -> str:
        text, old, new = str(value), str(old), str(new)
        _allow(len(text) + text.count(old) * len(new))
        return text.replace(old, new, count)

    def _round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        if abs(precision) > 15:  # 10 ** precision is computed
            raise SecurityError(f"a number may be rounded to 15 places, not {precision}")
        return do_round(value, precision, method)

    def _sort(
        self,
        value: Iterable[Any],
        reverse: bool = False,
        case_sensitive: bool = False,
        attribute: str | int | None = None,
    ) -> list[Any]:
        return do_sort(self, self._list(value), reverse, case_sensitive, attribute)

    def _title(self, value: object) -> str:
        _allow(4 * len(str(value)))  # it is taken apart into words
        return do_title(str(value))

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None:
            _indent_width(indent)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return _joined("", encoder.iterencode(value))


def _indent_width(indent: int | str) -> int:
    width = len(indent) if isinstance(indent, str) else indent
    if width > MAX_INDENT:
        raise SecurityError(f"an indent may have {MAX_INDENT} characters, not {width}")
    return width


def _new_dict(*mappings: Mapping[str, Any], **items: Any) -> dict[str, Any]:
    # Not of pairs: integers with equal hashes would make that take quadratic time.
    if not all(isinstance(mapping, dict) for mapping in mappings):
        raise SecurityError("dict() takes a dict")
    return dict(*mappings, **items)


def _new_namespace(*mappings: Mapping[str, Any], **items: Any) -> Namespace:
    namespace = _Namespace()
    for name, value in _new_dict(*mappings, **items).items():
        namespace[name] = value
    return namespace


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore (as in transformers), and never inside itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the attribute {name!r} of a namespace is not for chat templates")
        _size(value, depth=1)
        super().__setitem__(name, value)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise SecurityError(f"a date's format may have 100 characters, not {len(form)}")
    return datetime.now().strftime(form)


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant says, for training. Here only its body counts."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Guard(NodeTransformer):
    """Routes through the sandbox what jinja compiles to plain Python, and refuses what no chat template needs."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("ticking", node, node.iter)
        return node

    def meter(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through("same", node, node)

    visit_Compare = visit_Dict = visit_List = meter

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("joined", node, *node.nodes)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.meter(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self.meter(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name in {"self", "varargs", "kwargs"}:  # the last two are containers that nobody measured
            raise TemplateAssertionError(f"`{node.name}` is not for chat templates", node.lineno)
        return node

    def refuse(self, node: nodes.Node) -> NoReturn:
        raise TemplateAssertionError(f"`{type(node).__name__}` is not for chat templates", node.lineno)

    visit_Block = visit_Extends = visit_FromImport = visit_Import = visit_Include = refuse
    visit_ScopedEvalContextModifier = refuse  # autoescape: it makes text after `_output` has measured it


def _through(method: str, node: nodes.Node, *values: nodes.Node) -> nodes.Expr:
    """A call of a method of the sandbox, which is metered as all calls are."""
    return nodes.Call(nodes.EnvironmentAttribute(method), list(values), [], None, None, lineno=node.lineno)
