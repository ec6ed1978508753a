"""The sandbox that chat templates run in: what they may touch, how long they run, how much they make.

`edgekit.runtime.template` says what is bounded and why. Here, an AST pass (`Guard`) sends each step of a template
through one metered place (`Sandbox`), and every value is measured as the tree that it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from itertools import chain
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateAssertionError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, do_indent, do_round, do_sort, do_title, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

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


def measure(value: object, depth: int = 0) -> int:
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
        size += measure(child, depth + 1)
        _allow(size)
    return size


def _allow(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a value may have a size of {MAX_SIZE}, not {size} or more")


def joined(separator: str, values: Iterable[object]) -> str:
    """The text of all values, which is measured as it grows."""
    texts: list[str] = []
    size = 0
    for value in values:
        texts.append(str(value))
        size += len(texts[-1]) + len(separator)
        _allow(size - len(separator))
    return separator.join(texts)


class Refusal(Exception):
    """The template called `raise_exception`."""


class Sandbox(ImmutableSandboxedEnvironment):
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
        tests: dict[str, Any] = {name: TESTS[name] for name in _TESTS.split()}
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
        size = measure(value)
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
                    _allow((len(value) if isinstance(value, str) else measure(value)) * times)
        return self._made(super().call_binop(context, operator, left, right))

    @pass_context
    def _output(self, context: Context, value: object) -> str:
        if type(value) is str:
            return value
        measure(value)
        return str(self._made(str(value)))

    def concat(self, pieces: Iterable[str], /) -> str:
        """What jinja joins the output of a macro and of a `set` block with."""
        return str(self._made(joined("", pieces)))

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
        return joined("", values)

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
        return joined(str(d), value)

    def _list(self, value: Iterable[Any]) -> list[Any]:
        items = list(self.ticking(value))
        measure(items)
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
        return joined("", encoder.iterencode(value))


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
        measure(value, depth=1)
        super().__setitem__(name, value)


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(str(message))


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
