"""Turn parsed TOML or JSON into frozen dataclasses, strictly.

`parse(cls, data, where=...)` checks every key and every type; an unknown key is an error that names the nearest known
one. Supported field types: str, int, float, bool, Literal, another dataclass, tuple[T, ...], list[T], dict[str, T],
T | None. An int is accepted where a float is declared; nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgekit.errors import EdgekitError, UserError

T = TypeVar("T")


def parse(cls: type[T], data: object, *, where: str, error: type[EdgekitError] = UserError) -> T:
    """Build `cls` from a mapping. `where` names the file and key for messages.

    Raises `error`: not a mapping, an unknown or missing key, a value of another type, or whatever rule the
    dataclass states in its own `__post_init__` (an EdgekitError, passed on with `where` put before it).
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} must be a table: got {_show(data)}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise error(f"{where}: unknown key {key!r}{nearest(str(key), fields)}")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}: {name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where}: the key {name!r} is missing")
    try:
        return cls(**values)
    except EdgekitError as problem:
        raise error(f"{where}: {problem}") from problem


def nearest(word: str, known: object) -> str:
    """`; did you mean 'x'?`, or the list of what is known, as the end of an error message."""
    names = sorted(str(name) for name in known)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(names)}" if names else ""


def _value(hint: Any, value: object, where: str, error: type[EdgekitError]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _value(inner, value, where, error)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):  # 4.0 and True are no ints
            raise error(f"{where} must be one of {', '.join(map(str, arguments))}: got {_show(value)}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise error(f"{where} must be a list: got {_show(value)}")
        items = [_value(arguments[0], item, f"{where}[{i}]", error) for i, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, Mapping):
            raise error(f"{where} must be a table: got {_show(value)}")
        return {str(key): _value(arguments[1], item, f"{where}.{key}", error) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where=where, error=error)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise error(f"{where} is out of range: {_show(value)}")
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise error(f"{where} must be {_NAMES.get(hint, hint.__name__)}: got {_show(value)}")
    return value


_NAMES: dict[type, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
