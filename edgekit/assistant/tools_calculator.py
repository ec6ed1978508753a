"""A calculator with its own parser: nothing is evaluated but what stands in this grammar.

    expression := term (("+" | "-") term)*
    term       := factor (("*" | "/" | "%") factor)*
    factor     := ("+" | "-") factor | power
    power      := value (("^" | "**") factor)?              2^3^2 = 2^(3^2), -2^2 = -(2^2)
    value      := number | "pi" | "e" | name "(" expression ("," expression)* ")" | "(" expression ")"

Numbers are decimal with 28 digits, so 0.1 + 0.2 is 0.3. Length, depth, digits and powers are bounded, so that every
expression takes less than a few milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Context, Decimal, DecimalException, DivisionByZero, InvalidOperation, Overflow

from edgekit.errors import UserError

MAX_LENGTH = 500
MAX_DEPTH = 40
MAX_EXPONENT = 10_000  # of a power, and of ten in a result
_ARITHMETIC = Context(
    prec=28, Emax=MAX_EXPONENT, Emin=-MAX_EXPONENT, traps=[InvalidOperation, DivisionByZero, Overflow]
)
_PART = re.compile(
    r"\s*(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,5})?|[a-z]\w*|\*\*|[-+*/%^(),]|[\u00d7\u00f7\u2212\u00b7])", re.ASCII
)
_SAME = {"**": "^", "×": "*", "·": "*", "÷": "/", "−": "-"}
_CONSTANTS = {"pi": Decimal("3.141592653589793238462643383"), "e": Decimal("2.718281828459045235360287471")}


def _rounded(value: Decimal, places: Decimal = Decimal(0)) -> Decimal:
    if places != int(places) or not 0 <= places <= 20:
        raise UserError(f"round(x, n) needs a whole n from 0 to 20: got {places}")
    return value.quantize(Decimal(1).scaleb(-int(places)), context=_ARITHMETIC)


_FUNCTIONS: dict[str, tuple[int, int, Callable[..., Decimal]]] = {  # least and most arguments
    "sqrt": (1, 1, _ARITHMETIC.sqrt), "abs": (1, 1, _ARITHMETIC.abs), "exp": (1, 1, _ARITHMETIC.exp),
    "ln": (1, 1, _ARITHMETIC.ln), "log10": (1, 1, _ARITHMETIC.log10), "round": (1, 2, _rounded),
    "min": (1, 20, min), "max": (1, 20, max),
}  # fmt: skip


def calculate(expression: str) -> str:
    """The value of an expression as decimal text, `7/4` -> `1.75`. Raises UserError for what it cannot compute."""
    if len(expression) > MAX_LENGTH:
        raise UserError(f"an expression must have at most {MAX_LENGTH} characters: got {len(expression)}")
    reader = _Reader(_parts(expression.lower()))
    try:
        value = reader.expression(0)
    except DecimalException as problem:
        reason = {DivisionByZero: "it divides by zero", Overflow: "a value is too large"}.get(type(problem))
        raise UserError(f"an expression must have a value: {expression!r}: {reason or 'it has none'}") from problem
    if reader.next is not None:
        raise UserError(f"an expression must end after its value: {expression!r} goes on with {reader.next!r}")
    if not value.is_finite():
        raise UserError(f"an expression must have a finite value: {expression!r} has {value}")
    return _text(value)


class _Reader:
    def __init__(self, parts: list[str]) -> None:
        self._parts = parts[::-1]

    @property
    def next(self) -> str | None:
        return self._parts[-1] if self._parts else None

    def expression(self, depth: int) -> Decimal:
        if depth > MAX_DEPTH:
            raise UserError(f"an expression may be nested {MAX_DEPTH} deep")
        value = self._term(depth)
        while self.next in ("+", "-"):
            act = _ARITHMETIC.add if self._take() == "+" else _ARITHMETIC.subtract
            value = act(value, self._term(depth))
        return value

    def _term(self, depth: int) -> Decimal:
        value = self._factor(depth)
        while self.next in ("*", "/", "%"):
            act = {"*": _ARITHMETIC.multiply, "/": _ARITHMETIC.divide, "%": _ARITHMETIC.remainder}[self._take()]
            value = act(value, self._factor(depth))
        return value

    def _factor(self, depth: int) -> Decimal:
        if depth > MAX_DEPTH:
            raise UserError(f"an expression may be nested {MAX_DEPTH} deep")
        if self.next in ("+", "-"):
            sign = self._take()
            value = self._factor(depth + 1)
            return _ARITHMETIC.minus(value) if sign == "-" else value
        base = self._value(depth)
        if self.next != "^":
            return base
        self._take()
        exponent = self._factor(depth + 1)
        if abs(exponent) > MAX_EXPONENT:
            raise UserError(f"an exponent must be at most {MAX_EXPONENT}: got {_text(exponent)}")
        return _ARITHMETIC.power(base, exponent)

    def _value(self, depth: int) -> Decimal:
        part = self._take()
        if part == "(":
            value = self.expression(depth + 1)
            self._expect(")")
            return value
        if part in _CONSTANTS:
            return _CONSTANTS[part]
        if part in _FUNCTIONS:
            return self._call(part, depth)
        if part[0].isdigit() or part[0] == ".":
            return _ARITHMETIC.create_decimal(part)
        known = ", ".join([*_CONSTANTS, *_FUNCTIONS])
        raise UserError(f"an expression is made of numbers, + - * / % ^ ( ) and {known}: got {part!r}")

    def _call(self, name: str, depth: int) -> Decimal:
        least, most, function = _FUNCTIONS[name]
        self._expect("(")
        values = [self.expression(depth + 1)]
        while self.next == ",":
            self._take()
            values.append(self.expression(depth + 1))
        self._expect(")")
        if not least <= len(values) <= most:
            raise UserError(
                f"{name} takes {least if least == most else f'{least} to {most}'} values: got {len(values)}"
            )
        return function(*values)

    def _take(self) -> str:
        if not self._parts:
            raise UserError("an expression must be complete: it ends where a value or a ) should be")
        return self._parts.pop()

    def _expect(self, part: str) -> None:
        found = self._take()
        if found != part:
            raise UserError(f"an expression must have {part!r} where it has {found!r}")


def _parts(expression: str) -> list[str]:
    parts, at = [], 0
    expression = expression.strip()
    while at < len(expression):
        found = _PART.match(expression, at)
        if found is None:
            raise UserError(
                f"an expression is made of numbers, names and + - * / % ^ ( ): got {expression[at : at + 20]!r}"
            )
        part = found[0].strip()
        parts.append(_SAME.get(part, part))
        at = found.end()
    return parts


def _text(value: Decimal) -> str:
    """Plain digits where they are few, else with an exponent; no zeros at the end."""
    value = value.normalize(_ARITHMETIC)
    if value == 0:
        return "0"
    return f"{value:f}" if -12 <= value.adjusted() <= 30 else f"{value:e}"
