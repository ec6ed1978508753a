"""The calculator: values, precedence, bounds, and texts that are no expressions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.assistant.tools_calculator import MAX_LENGTH, calculate
from edgekit.errors import UserError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7/4", "1.75"),
        ("0.1 + 0.2", "0.3"),
        ("2 + 3 * 4 - 6 / 2", "11"),
        ("(2 + 3) * 4", "20"),
        ("10 - 4 - 3", "3"),
        ("2^3^2", "512"),
        ("2 ** 10", "1024"),
        ("-2^2", "-4"),
        ("2^-2", "0.25"),
        ("--3", "3"),
        ("10 % 3", "1"),
        ("1e3 * 2", "2000"),
        (".5 × 4 ÷ 2 − 1", "0"),
        ("1.50", "1.5"),
        ("SQRT(2) ^ 2 - 2", "-2E-27"),
        ("round(2.5678, 2)", "2.57"),
        ("round(2.5)", "2"),
        ("max(1, 2, min(9, 5))", "5"),
        ("abs(-3) + ln(exp(1))", "4"),
        ("log10(1000)", "3"),
        ("pi", "3.141592653589793238462643383"),
        ("9^99", "2.951266543065275214875348023e+94"),
        ("0 * -1", "0"),
    ],
)
def test_values(expression: str, value: str) -> None:
    if "E-" in value:
        assert abs(float(calculate(expression))) < 1e-20
    else:
        assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "must be complete"),
        ("(((", "must be complete"),
        ("1 +", "must be complete"),
        ("1 2", "goes on with '2'"),
        ("2(3)", "goes on with"),
        (")", "made of numbers"),
        ("min(1", "must be complete"),
        ("min(1,2", "must be complete"),
        ("sqrt 2", "must have"),
        ("sqrt(1, 2)", "takes 1 values"),
        ("foo(1)", "got 'foo'"),
        ("__import__('os').system('id')", "made of numbers"),
        ("open('/etc/passwd')", "made of numbers"),
        ("1; 2", "made of numbers"),
        ("a.b", "made of numbers"),
        ("٣ + 1", "made of numbers"),
        ("9**9**9", "exponent must be at most"),
        ("1e99999", "too large"),
        ("exp(100000)", "too large"),
        ("1/0", "divides by zero"),
        ("5 % 0", "it has none"),
        ("0^0", "it has none"),
        ("sqrt(-1)", "it has none"),
        ("ln(0)", "finite value"),
        ("0^-1", "finite value"),
        ("round(1, 1.5)", "whole n"),
        ("round(1, 99)", "whole n"),
        ("(" * 60 + "1" + ")" * 60, "nested"),
        ("-" * 300 + "1", "nested"),
        ("2^" * 100 + "1", "nested"),
        ("1" * (MAX_LENGTH + 1), "at most"),
    ],
)
def test_what_is_no_expression_is_refused(expression: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        calculate(expression)


@given(st.text(alphabet="0123456789+-*/%^(). epi,sqrtmaxln", max_size=60))
def test_any_text_has_a_value_or_a_reason(text: str) -> None:
    try:
        value = calculate(text)
    except UserError:
        return
    assert float(value) == float(value)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.sampled_from("+-*"))
def test_whole_numbers_are_exact(a: int, b: int, sign: str) -> None:
    expected = {"+": a + b, "-": a - b, "*": a * b}[sign]
    assert int(calculate(f"({a}) {sign} ({b})")) == expected
